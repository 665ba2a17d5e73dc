"""What only a GPU can show, in the order of what would break most: the first thing to run where there is one.

    python benchmarks/first_hour.py --out out/first_hour              # all of it, about 15 minutes
    python benchmarks/first_hour.py --minutes 5                       # what does not fit any more is skipped
    python benchmarks/first_hour.py --steps tests zeros twice         # some of it
    python benchmarks/first_hour.py --device cpu --steps zeros twice  # does it run?

A step is a process of its own with a limit of time, so one that fails stops no other. First comes `stages`, which makes
the checkpoints that others need. Then the steps that check run side by side, and those that measure run one by one.
OUT/first_hour.json and OUT/first_hour.md are written anew after each step, and OUT/steps/ has what each step printed.
The table STEPS says what each step shows; gpu_steps.py has the steps themselves. Nothing has to be trained before.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_steps
from minillm import runtime
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.metrics import table
from minillm.safetensors import save_json

SIDE_BY_SIDE = 4  # checking steps at a time

Step = namedtuple("Step", "name seconds measures shows")
STEPS = {step.name: step for step in (
    Step("machine", 60, False, "versions, capability, what is chosen on this machine"),
    Step("stages", 60, False, "a few steps of pretraining, SFT and a reward model, not compiled, to start from"),
    Step("recompiles", 120, False, "compilations in 400 steps of SFT: a layer, and two of the head"),
    Step("tests", 150, False, "the tests that need a GPU, file by file"),
    Step("zeros", 100, False, "learning rate 0: every ratio is exactly 1, every KL and DPO margin exactly 0"),
    Step("zeros_compiled", 240, False, "the same, compiled, with a larger model (KL: below 1e-5)"),
    Step("twice", 100, False, "two equal runs, and an interrupted and resumed one, compared bit for bit"),
    Step("captured", 60, True, "decoding captured as a CUDA graph against plain, the sampler against the trainer"),
    Step("presets", 90, True, "training of the presets, without torch.compile"),
    Step("qwen", 150, True, "the shape of Qwen3-0.6B on 4,096 tokens a step, not compiled: memory and time"),
    Step("compiled", 150, True, "the presets with torch.compile"),
    Step("peers_generate", 120, True, "benchmarks/generate.py"),
    Step("peers_train", 60, True, "benchmarks/train.py --no-compile"),
    Step("step_of_grpo", 60, True, "benchmarks/grpo.py --no-compile"),
    Step("peers_train_compiled", 240, True, "benchmarks/train.py"),
    Step("suite", 400, True, "all tests, on this machine"),
)}
NEED_STAGES = {"zeros", "zeros_compiled", "twice"}


@dataclass
class Config:
    out: str = flag("out/first_hour", "folder to write")
    steps: list[str] = flag([], "only these steps, of those in the table STEPS (default: all)")
    minutes: float = flag(0.0, "time for everything; a step that no longer fits is skipped (0: no limit)", low=0)
    device: str = flag("", "cuda or cpu (default: the best that is here)")
    tests: list[str] = flag([], "for the step `tests`: only these tests (default: all that need a GPU)")
    child: str = flag("", "run this step in this process, as the script does for each of its steps")


def run_step(name: str, cfg: Config, deadline: float) -> dict:
    """A step in a process of its own -> {"status", "seconds", "checks", "rows"}."""
    step, path = STEPS[name], Path(cfg.out, "steps", f"{name}.json")
    limit = min(step.seconds, deadline - time.time())
    if limit < min(20, step.seconds / 3):
        return {"status": "skipped: no time", "seconds": 0, "checks": [], "rows": []}
    path.unlink(missing_ok=True)  # of an earlier run
    began, status, environment = time.time(), "", dict(os.environ)
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic matrix products need
    if not step.measures:
        environment.setdefault("OMP_NUM_THREADS", "2")
    command = [sys.executable, __file__, "--child", name, "--out", cfg.out, "--device", cfg.device]
    command += ["--tests", *cfg.tests] if cfg.tests else []
    with open(path.with_suffix(".log"), "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            code = process.wait(limit)
            status = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:  # after Ctrl-C too
            with contextlib.suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                else:  # Windows
                    process.kill()
            process.wait()
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"checks": [], "rows": []}
    failed = sum(check["result"] == "FAILED" for check in result["checks"])
    status = "; ".join(filter(None, [status, f"{failed} FAILED" if failed else ""])) or "ok"
    return {"status": status, "seconds": round(time.time() - began, 1), **result}


def to_markdown(results: dict) -> str:
    """The tables of all steps that have ended."""
    order = [name for name in STEPS if name in results]
    lines = ["# The first hour on this machine\n", table([["step", "status", "seconds", "shows"]] + [
        [name, results[name]["status"], results[name]["seconds"], STEPS[name].shows] for name in order])]
    for name in order:
        lines.append(f"\n## {name}: {results[name]['status']}\n\n{STEPS[name].shows}\n")
        for rows in (results[name]["checks"], results[name]["rows"]):
            while rows:
                alike = [row for row in rows if row.keys() == rows[0].keys()]
                rows = [row for row in rows if row.keys() != alike[0].keys()]
                lines.append(table([list(alike[0])] + [list(row.values()) for row in alike]) + "\n")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict:
    """Run the steps; returns {step: its result}."""
    if unknown := [name for name in cfg.steps if name not in STEPS]:
        raise UserError(f"--steps {' '.join(unknown)}: must be of {', '.join(STEPS)}")
    if ":" in cfg.device:
        raise UserError(f"--device {cfg.device}: of several GPUs choose one by CUDA_VISIBLE_DEVICES=N, which the tests "
                        "follow, too")
    cfg.out, cfg.device = os.path.abspath(cfg.out), runtime.pick_device(cfg.device).type
    if cfg.child:
        os.chdir(ROOT)
        found = gpu_steps.Found(cfg.out, cfg.device, cfg.child, cfg.tests)
        getattr(gpu_steps, cfg.child)(found)
        return found.result
    (Path(cfg.out) / "steps").mkdir(parents=True, exist_ok=True)
    deadline, results, writing = time.time() + (60 * cfg.minutes or 1e9), {}, threading.Lock()
    chosen = [name for name in STEPS if not cfg.steps or name in cfg.steps]
    if not set(chosen).isdisjoint(NEED_STAGES) and not Path(cfg.out, "reward", "config.json").exists():
        chosen = ["stages", *(name for name in chosen if name != "stages")]

    def done(name, result):
        print(f"{name}: {result['status']} ({result['seconds']} s)", flush=True)
        with writing:
            results[name] = result
            save_json(f"{cfg.out}/first_hour.json", results)
            Path(cfg.out, "first_hour.md").write_text(to_markdown(results), encoding="utf-8")

    def start(name):
        done(name, run_step(name, cfg, deadline))

    if "stages" in chosen:
        start("stages")
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        list(pool.map(start, [name for name in chosen if name != "stages" and not STEPS[name].measures]))
    for name in chosen:
        if STEPS[name].measures:
            start(name)
    return results


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
