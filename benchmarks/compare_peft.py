"""Full fine-tuning and every PEFT method on the same new material: what each costs, what it learns, what is forgotten.

    python benchmarks/compare_peft.py                              # teaches data/identity.jsonl to out/sft
    python benchmarks/compare_peft.py --methods lora prompt        # some of them
    python benchmarks/compare_peft.py --model Qwen3-0.6B --new mine.jsonl --new_eval mine_eval.jsonl --old others.jsonl
    python benchmarks/compare_peft.py --max_steps 3                # does it run?

Each row is one run of train_sft.py or train_lora.py with the defaults of its method; the command is printed. The
columns:

    trained        parameters that are trained, and their share of the base's
    disk           what has to be kept of the run, besides the base
    memory         the most that PyTorch held (weights, gradients, optimizer, activations) in three steps of training
    seconds        training, and the evaluation at its end
    new            accuracy on held-out paraphrases of the new material, greedy replies
    manner         share of these replies that begin as all expected ones in their language do ("Dear reader, ")
    old            accuracy on the earlier tasks. The first row is the base: what the others lack of it was forgotten
"""

import contextlib
import io
import json
import os.path
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_lora
import train_sft
from benchmarks.common import peak_memory_mb
from minillm import checkpoint, runtime
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.evaluate import answer_questions, check_question
from minillm.metrics import table
from minillm.peft import load_adapter, remove_adapter
from minillm.records import read_records
from minillm.safetensors import save_json
from minillm.tokenizer import Tokenizer

FULL = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 10, "epochs": 20, "save_every": 100}
METHODS = {
    "full": FULL,
    "lora": {"peft": "lora"},
    "lora q,v": {"peft": "lora", "rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"peft": "lora", "rslora": True},
    "dora": {"peft": "dora"},
    "adapter": {"peft": "adapter"},
    "pfeiffer": {"peft": "adapter", "placement": "pfeiffer"},
    "prefix": {"peft": "prefix"},
    "prompt": {"peft": "prompt"},
}


@dataclass
class Config:
    model: str = flag("out/sft", "checkpoint folder of the base model")
    new: list[str] = flag(["data/identity.jsonl"], "the new material: conversations")
    new_eval: str = flag("data/identity_eval.jsonl", "held-out questions about it")
    old: str = flag("data/sft_eval.jsonl", "questions of the tasks that the base knows")
    methods: list[str] = flag(list(METHODS), f"rows of the table, of {', '.join(METHODS)}")
    out: str = flag("out/compare_peft", "folder for the runs, table.md and results.json")
    max_steps: int = flag(0, "optimizer steps of each run (default: its own)", low=0)
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of everything random", low=0)


def command(script: str, options: dict) -> str:
    """The command line with these options."""
    words = ["python", script]
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def disk_bytes(folder) -> int:
    """The size of the model or adapter in a run's folder, without the files that only the run needs."""
    run_files = {"run_config.json", "metrics.jsonl", "summary.json", "training_state.pt"}
    kept = [path for path in Path(folder).iterdir() if path.is_file() and path.name not in run_files]
    return sum(path.stat().st_size for path in kept)


def manner(records: list, replies: list):
    """The share of replies that begin as all expected replies in their alphabet do: English ones, and Chinese ones.

    None if the expected replies have no common beginning.
    """
    texts = [record["conversations"][-1]["content"] for record in records]
    begins = {english: os.path.commonprefix([text for text in texts if text.isascii() is english])
              for english in (True, False)}
    found = [reply.startswith(begins[text.isascii()]) for text, reply in zip(texts, replies) if begins[text.isascii()]]
    return sum(found) / len(found) if found else None


def percent(value) -> str:
    """A share as text; None is -."""
    return "-" if value is None else f"{100 * value:.1f} %"


def row(name: str, result: dict) -> list:
    """A method's row of the table; the base has no costs."""
    costs = ["-"] * 5
    if "trained" in result:
        costs = [f"{result['trained']:,}", f"{result['share']:.2%}", f"{result['disk'] / 1024:,.0f} KiB",
                 "-" if result["memory"] is None else f"{result['memory']:.0f}", f"{result['seconds']:.0f}"]
    return [name, *costs, *(percent(result[column]) for column in ("new", "manner", "old"))]


def main(cfg: Config) -> dict:
    """Run the methods and write the table; returns {method: {column: number}}."""
    if unknown := [name for name in cfg.methods if name not in METHODS]:
        raise UserError(f"--methods {' '.join(unknown)}: must be of {', '.join(METHODS)}")
    device = runtime.pick_device(cfg.device)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py")
    tokenizer, base = Tokenizer.load(cfg.model), checkpoint.load_model(cfg.model, device)
    total = sum(parameter.numel() for parameter in base.parameters())
    new, old = (list(read_records(path, check_question)) for path in (cfg.new_eval, cfg.old))

    def measure(model) -> dict:
        found = answer_questions(model, tokenizer, new, device)
        return {"new": found["accuracy"], "manner": manner(new, [reply for _, reply in found["replies"]]),
                "old": answer_questions(model, tokenizer, old, device)["accuracy"]}

    results = {"base": measure(base)}
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    Path(cfg.out, "one.jsonl").write_text(json.dumps(new[0]) + "\n", encoding="utf-8")

    for name in cfg.methods:
        stage = train_sft if name == "full" else train_lora
        out = str(Path(cfg.out, name.replace(" ", "_").replace(",", "")))
        options = {**METHODS[name], "model": cfg.model, "data": cfg.new, "eval_data": cfg.new_eval, "out": out,
                   "device": device.type, "seed": cfg.seed}
        if cfg.max_steps:
            options["max_steps"] = cfg.max_steps
        print(f"\n# {command(f'{stage.__name__}.py', options)}", flush=True)
        after = stage.main(stage.Config(**options))
        # Memory is measured in a run of its own: the evaluation at the end of the first one needs more than training.
        short = {**options, "eval_data": str(Path(cfg.out, "one.jsonl")), "out": str(Path(cfg.out, "memory")),
                 "max_steps": 3, "compile": False}
        with contextlib.redirect_stdout(io.StringIO()):
            memory = peak_memory_mb(lambda: stage.main(stage.Config(**short)), device)
        if name == "full":
            model = checkpoint.load_model(out, device)
        else:
            model = load_adapter(base, out)  # replaces the adapter before
        trained = after.get("trained_parameters", total)
        results[name] = {"trained": trained, "share": trained / total, "disk": disk_bytes(out), "memory": memory,
                         "seconds": after["seconds"], **measure(model)}
    remove_adapter(base)

    titles = ["method", "trained", "share", "disk", "memory MiB", "seconds", "new", "manner", "old"]
    text = table([titles, *(row(name, result) for name, result in results.items())])
    print("\n" + text, flush=True)
    Path(cfg.out, "table.md").write_text(text + "\n", encoding="utf-8")
    save_json(Path(cfg.out, "results.json"), results)
    return results


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
