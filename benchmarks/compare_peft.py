"""Full fine-tuning and every PEFT method on the same new material: what each costs, learns and forgets.

    python benchmarks/compare_peft.py                              # teaches data/identity.jsonl to out/sft
    python benchmarks/compare_peft.py --methods lora prompt        # some of them
    python benchmarks/compare_peft.py --model Qwen3-0.6B --new mine.jsonl --new_eval mine_eval.jsonl --old others.jsonl

Each row is one run of train_sft.py or train_lora.py with its defaults, which are those of the method; the command is
printed. The columns:

    trained        parameters that are trained, and their share of the base's
    disk           what one has to keep of the run beside the base
    memory         peak of what PyTorch holds in training (weights, gradients, optimizer, activations), in three steps of it
    seconds        training, and the evaluation at its end
    new            accuracy on held-out paraphrases of the new material, greedy replies
    manner         share of these replies that begin as all the expected ones in their language do ("Dear reader, ")
    old            accuracy on the tasks of before; the first row is the base, and what is lost is forgotten
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
from minillm.records import read_records
from minillm.errors import UserError
from minillm.evaluate import answer_questions
from minillm.metrics import table
from minillm.peft import load_adapter, remove_adapter
from minillm.tokenizer import Tokenizer

FULL = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 10, "epochs": 20, "save_every": 100}
METHODS = {
    "full": FULL,
    "lora": {"peft": "lora"},
    "lora q,v": {"peft": "lora", "target_modules": ["q_proj", "v_proj"]},
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
    """The options as one would type them."""
    words = ["python", script]
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def disk_bytes(folder) -> int:
    """The size of the model or adapter in a run's folder, without what only the run needs."""
    run_files = {"run_config.json", "metrics.jsonl", "summary.json", "training_state.pt"}
    return sum(path.stat().st_size for path in Path(folder).iterdir() if path.is_file() and path.name not in run_files)


def manner(records: list, replies: list):
    """The share of replies that begin as all expected replies in the same language do; None where these have no common beginning."""
    expected = lambda lang: [r["conversations"][-1]["content"] for r in records if r.get("lang") == lang]
    begin = {lang: os.path.commonprefix(expected(lang)) for lang in {r.get("lang") for r in records}}
    found = [reply.startswith(begin[r.get("lang")]) for r, reply in zip(records, replies) if begin[r.get("lang")]]
    return sum(found) / len(found) if found else None


def main(cfg: Config) -> dict:
    """Run the methods and write the table; returns {method: {column: number}}."""
    if unknown := [name for name in cfg.methods if name not in METHODS]:
        raise UserError(f"--methods {' '.join(unknown)}: must be of {', '.join(METHODS)}")
    device = runtime.pick_device(cfg.device)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py")
    tokenizer, base = Tokenizer.load(cfg.model), checkpoint.load_model(cfg.model, device)
    total = sum(parameter.numel() for parameter in base.parameters())
    new, old = list(read_records(cfg.new_eval)), list(read_records(cfg.old))

    def measure(model) -> dict:
        found = answer_questions(model, tokenizer, new, device)
        return {"new": found["accuracy"], "manner": manner(new, found["replies"]), "old": answer_questions(model, tokenizer, old, device)["accuracy"]}

    results = {"base": measure(base)}
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    Path(cfg.out, "one.jsonl").write_text(json.dumps(new[0]) + "\n", encoding="utf-8")

    for name in cfg.methods:
        stage = train_sft if name == "full" else train_lora
        out = str(Path(cfg.out, name.replace(" ", "_").replace(",", "")))
        options = {**METHODS[name], "model": cfg.model, "data": cfg.new, "eval_data": cfg.new_eval, "out": out, "device": device.type, "seed": cfg.seed}
        if cfg.max_steps:
            options["max_steps"] = cfg.max_steps
        print(f"\n# {command(f'{stage.__name__}.py', options)}", flush=True)
        after = stage.main(stage.Config(**options))
        # A run of its own, for the evaluation at the end needs memory that training does not.
        short = {**options, "eval_data": str(Path(cfg.out, "one.jsonl")), "out": str(Path(cfg.out, "memory")), "max_steps": 3, "compile": False}
        with contextlib.redirect_stdout(io.StringIO()):
            memory = peak_memory_mb(lambda: stage.main(stage.Config(**short)), device)
        if name == "full":
            model = checkpoint.load_model(out, device)
        else:
            model = load_adapter(base, out)  # in place of the adapter before, on the same base
        results[name] = {"trained": after.get("trained_parameters", total), "share": after.get("trained_parameters", total) / total,
                         "disk": disk_bytes(out), "memory": memory, "seconds": after["seconds"], **measure(model)}
    remove_adapter(base)

    percent = lambda value: "-" if value is None else f"{100 * value:.1f} %"
    rows = [["method", "trained", "share", "disk", "memory MiB", "seconds", "new", "manner", "old"]]
    for name, r in results.items():
        costs = [f"{r['trained']:,}", f"{r['share']:.2%}", f"{r['disk'] / 1024:,.0f} KiB", f"{r['memory']:.0f}", f"{r['seconds']:.0f}"] if "trained" in r else ["-"] * 5
        rows.append([name, *costs, *(percent(r[column]) for column in ("new", "manner", "old"))])
    print("\n" + table(rows), flush=True)
    Path(cfg.out, "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    checkpoint.save_json(Path(cfg.out, "results.json"), results)
    return results


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
