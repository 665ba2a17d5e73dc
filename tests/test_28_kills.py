"""Chapter 28. Every stage is killed everywhere, and resumed, and no bit is lost.

After this chapter you know at which moments a run can die, and why none of them costs a bit.

A run with two checkpoints is killed with SIGKILL: before, between and after the files of a save, while a file is
written, in the token cache, in a rollout, in a step, in an evaluation, or at a random time. It is resumed, and perhaps
killed again, until it ends. Or the disk is full from one of these moments on: then it must end with one line, and go on
where there is room again. Weights, adapter, training state, log and summary must then be those of a run that nothing
disturbed. `pytest tests/test_28_kills.py --kills 200` kills that many times; without it, one stage is killed once.

The runs are forks of one process that has PyTorch loaded and small models at hand: a run takes less than a second.
"""

import contextlib
import errno
import faulthandler
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import train_dpo
import train_grpo
import train_lora
import train_ppo
import train_pretrain
import train_reward
import train_sft
from minillm import run as run_file
from minillm import runtime, token_cache
from minillm.checkpoint import save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.heads import RewardModel, save_reward_model
from minillm.model import CausalLM, ModelConfig
from minillm.tokenizer import train_tokenizer
from minillm.training_state import load_training_state
from tests.helpers import in_processes

pytestmark = pytest.mark.slow  # all of this chapter

RL = "--batch_size 4 --max_new_tokens 4 --warmup_steps 0 --data ../p.jsonl --eval_data ../e.jsonl"
PAIRS = "--data ../pairs.jsonl --eval_data ../pairs.jsonl --batch_size 3"
CHATS = "--data ../chats.jsonl --eval_data ../chats.jsonl --batch_size 2"
# {name: (stage, its flags)}
STAGES = {
    "pretrain": (train_pretrain, "--data ../text.jsonl --eval_data ../text.jsonl --batch_size 2 --grad_accum 2"),
    "sft": (train_sft, CHATS + " --keep_last 1"),
    "lora": (train_lora, CHATS + " --rank 2 --dropout 0.1"),
    "merge": (train_lora, CHATS + " --rank 2 --merge"),
    "prefix": (train_lora, CHATS + " --peft prefix --virtual_tokens 3"),
    "reward": (train_reward, PAIRS),
    "dpo": (train_dpo, PAIRS),
    "ipo": (train_dpo, PAIRS + " --loss ipo --peft lora --rank 2"),
    "grpo": (train_grpo, RL + " --group_size 2 --num_minibatches 2 --reward ../letters.py:letters --beta 0.1"),
    "dr_grpo": (train_grpo, RL + " --group_size 2 --num_minibatches 1 --reward ../letters.py:letters --loss dr_grpo"),
    "dapo": (train_grpo, RL + " --group_size 2 --num_minibatches 2 --reward ../letters.py:letters --loss dapo"),
    "ppo": (train_ppo, RL + " --reward_model ../reward --num_minibatches 2 --update_epochs 2"),
}
STUCK = 120  # seconds after which a run is ended, and says where it was
EVERYWHERE = "--max_steps 4 --save_every 2 --eval_every 3 --log_every 1 --max_seq_len 64 --device cpu --out out"


# ------------------------------------------------------------------------------------ in the parent of all runs

def write_inputs():
    """Small models and data, in the folder above those of the runs."""
    tokenizer = train_tokenizer(["red blue green"] * 3, 270)
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=16,
                                 max_position_embeddings=96))
    save_model("model", model, tokenizer)
    save_reward_model("reward", RewardModel.from_lm(model), tokenizer)
    words = "red blue green grey pink white".split()
    questions = [[{"role": "user", "content": f"{word} {i}?"}] for i, word in enumerate(words)]
    answers = [[{"role": "assistant", "content": words[-i]}] for i in range(len(words))]
    files = {
        "text": [{"text": f"{word} {word[::-1]}"} for word in words * 2],
        "chats": [{"conversations": q + a} for q, a in zip(questions, answers)],
        "pairs": [{"chosen": q + a, "rejected": q + b} for q, a, b in zip(questions, answers, answers[1:] + answers)],
        "p": [{"conversations": q} for q in questions],
        "e": [{"conversations": [{"role": "user", "content": "black?"}]}],
    }
    for name, records in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    Path("letters.py").write_text("def letters(messages, answers, example):\n"
                                  "    return [float(len(answer) % 3) for answer in answers]\n", encoding="utf-8")


def start(name: str, resume: bool):
    """Run a stage in the current folder."""
    stage, flags = STAGES[name]
    argv = ["--model", "../model", *EVERYWHERE.split(), *flags.split(), *["--resume"] * resume]
    stage.main(parse_config(stage.Config, "", argv))


def set_aside(folder):
    """What a finished run does with its training state, which is still to be compared."""
    with contextlib.suppress(FileNotFoundError):
        shutil.move(Path(folder) / "training_state.pt", "training_state.pt")  # a rename


def watch(at):
    """Call at(name of the moment) wherever a kill could hurt."""
    def around(owner, name, describe):
        function = getattr(owner, name)

        def call(*args, **options):
            what = describe(*args)
            at(f"before {what}")
            result = function(*args, **options)
            at(f"after {what}")
            return result

        setattr(owner, name, call)

    def target(source, target):
        # A temporary name is random; what is in a folder of the cache is named by a hash.
        return re.sub(r"[0-9a-f]{16,}", "*", os.path.basename(target))

    around(os, "replace", target)
    around(pathlib.Path, "rename", target)
    around(os, "fsync", lambda descriptor: "flushing a file")
    around(run_file, "remove_training_state", lambda folder: "the end")
    around(token_cache, "encode_lines", lambda *_: "tokenising")
    around(run_file.Run, "_after_step", lambda *_: "a step's end")
    for stage in (train_grpo, train_ppo):
        around(stage, "sample_rollout", lambda *_: "a rollout")
    begin = run_file.Run.start

    def start(self, model, optimizers, loader, tokenizer, total_steps, evaluate, beside=()):
        def evaluating():
            at("evaluating")
            return evaluate()
        begin(self, model, optimizers, loader, tokenizer, total_steps, evaluating, beside)

    run_file.Run.start = start


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    """From now on no file gets to the disk."""
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    os.fsync = refuse


def fork(name: str, resume: bool, moment: int = 0, events=None, trouble=die) -> int:
    """Start a run in another process, with trouble at this moment (0: never); returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 9
    try:
        os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        faulthandler.register(signal.SIGALRM, file=2, chain=True)
        signal.alarm(STUCK)
        token_cache.CACHE = Path("cache").absolute()
        passed = []

        def at(what):
            passed.append(what)
            if len(passed) == moment:
                trouble()

        run_file.remove_training_state = set_aside
        if moment or events:
            watch(at)
        start(name, resume)
        if events:
            Path(events).write_text("\n".join(passed), encoding="utf-8")
        code = 0
    except UserError as error:
        print("error:", error, flush=True)
        code = 3
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def says_that_the_disk_is_full() -> bool:
    last = Path("said.txt").read_text(encoding="utf-8").splitlines()[-1]
    return last.startswith("error: ") and "No space left on device" in last


def kill_one(name: str, chance: random.Random, moments: list, seconds: float) -> list:
    """Run a stage in the current folder and kill it, perhaps more than once, until it ends; returns the moments."""
    killed, resume = [], False
    while True:
        if len(killed) < chance.choice([1, 1, 1, 2, 3]):
            if chance.random() < 0.7:
                moment, trouble = chance.randrange(1, len(moments) + 1), chance.choice([die, die, die, fill_disk])
                status = ended(fork(name, resume, moment, trouble=trouble))
                what = moments[moment - 1]
                if trouble is fill_disk:
                    what = f"full disk: {what}"
            else:
                pid = fork(name, resume)
                time.sleep(chance.random() * seconds)
                os.kill(pid, signal.SIGKILL)
                status, what = ended(pid), "a random time"
        else:
            status, what = ended(fork(name, resume)), ""
        if status == signal.SIGKILL or status >> 8 == 3 and says_that_the_disk_is_full():
            killed.append(("resumed: " if resume else "") + what)
        elif status:
            raise AssertionError(f"{name}, killed at {killed}: {Path('said.txt').read_text(encoding='utf-8')[-1500:]}")
        else:
            return killed
        resume = True


def kill_all(kills: int, seed: int, names: list):
    """Kill the stages in turns, at least this often in all; prints one line for each that came to its end.

    In a process that has computed nothing and may fork.
    """
    write_inputs()
    runtime.cpu_has_bf16 = lambda: False  # float32: no autocast
    chance, count, number, known = random.Random(seed), 0, 0, {}
    while count < kills or number < len(names):
        name = names[number % len(names)]
        number += 1
        if name not in known:
            os.mkdir(f"{name}-whole")
            os.chdir(f"{name}-whole")
            began = time.time()
            assert ended(fork(name, False, events="events.txt")) == 0, Path("said.txt").read_text(encoding="utf-8")
            known[name] = Path("events.txt").read_text(encoding="utf-8").splitlines(), time.time() - began
            os.chdir("..")
        folder = f"{name}-{number}"
        os.mkdir(folder)
        os.chdir(folder)
        killed = kill_one(name, chance, *known[name])
        os.chdir("..")
        problems = differences(folder, f"{name}-whole")
        count += sum("full disk" not in what for what in killed)
        print(json.dumps({"stage": name, "killed": killed, "differences": problems}), flush=True)
        if not problems:
            shutil.rmtree(folder)


# ------------------------------------------------------------------------------------ comparing

def flat(value, name=""):
    """(place, value) of everything in a training state or a summary."""
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{name}/{key}")
    else:
        yield name, value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def steps_of(folder) -> list:
    """The log without what a clock measured, and without the lines that tell of a resume."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s" and "seconds" not in key}
            for line in lines if "resumed" not in line]


def differences(folder: str, whole: str) -> list:
    """What differs between two finished runs; [] if they are equal to the bit."""
    a, b = Path(folder), Path(whole)
    found = []

    def names(folder):
        return sorted(str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*") if path.is_file())

    def differ(what, one, other):
        if one != other:
            found.append(what)

    differ("files in OUT", names(a), names(b))
    left = {path.name for path in a.iterdir()} - {"out", "out.lock", "cache", "said.txt", "events.txt",
                                                  "training_state.pt"}
    if any((a / "out.bak").glob("*model.safetensors")) and not (a / "out.bak" / "training_state.pt").exists():
        left.remove("out.bak")  # killed between the first weights and the first state: weights are never removed
    differ("files beside OUT", left, set())
    differ("files in the cache", sorted(path.name for path in (a / "cache").glob("*/*")),
           sorted(path.name for path in (b / "cache").glob("*/*")))
    differ("temporary files", [str(path) for path in a.rglob("*") if path.suffix in (".tmp", ".part")], [])
    if found:
        return [*found, *names(a)]
    for name in names(a):
        if not name.endswith((".pt", "metrics.jsonl", "summary.json", "run_config.json")):  # it says --resume
            differ(name, (a / "out" / name).read_bytes(), (b / "out" / name).read_bytes())
    differ("state", list(flat(load_training_state(a))), list(flat(load_training_state(b))))
    differ("log", steps_of(a / "out"), steps_of(b / "out"))
    one, other = (json.loads((x / "out" / "summary.json").read_text(encoding="utf-8")) for x in (a, b))
    for key in ("data", "steps", "before", "after"):
        differ(f"summary: {key}", one[key], other[key])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process in which torch is loaded")
def test_killed_and_resumed_every_stage_ends_as_if_nothing_had_happened(tmp_path, monkeypatch, request):
    kills = request.config.getoption("--kills")
    names = list(STAGES) if kills else ["grpo"]
    monkeypatch.chdir(tmp_path)
    (said,) = in_processes(kill_all, kills, kills, names, timeout=2 * STUCK + 20 * kills)
    runs = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    print(f"kills: {sum(len(run['killed']) for run in runs)} in {len(runs)} runs")
    assert {run["stage"] for run in runs} == set(names)
    assert [run for run in runs if run["differences"]] == []


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. kill_one: `chance.random() < 0.7` -> `chance.random() < 0.0`. Every kill comes at a random time: is anything
#    lost?
# 2. EVERYWHERE: `--save_every 2` -> `--save_every 9`. No checkpoint before the last step: what does a kill cost now,
#    time or bits?
