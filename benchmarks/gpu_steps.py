"""The steps of first_hour.py. Each takes a Found, which keeps what the step checks and measures."""

import ast
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

from benchmarks import generate as bench_generate
from benchmarks import grpo as bench_grpo
from benchmarks import train as bench_train
from benchmarks.common import Report, ceilings, config_of, forward_flops
from minillm import run as run_module
from minillm import runtime
from minillm.attention import can_flex
from minillm.checkpoint import save_model
from minillm.config import parse_config
from minillm.cuda_graph import StaticStep
from minillm.data import PackedLoader
from minillm.generate import generate
from minillm.heads import RewardModel, save_reward_model
from minillm.interrupt import Interrupt
from minillm.logprobs import head_logprobs
from minillm.machine import peak_memory_mb
from minillm.model import CausalLM
from minillm.safetensors import load_safetensors, save_json
from minillm.tokenizer import Tokenizer

SIZES = {
    "cuda": dict(stages=60, recompiles=400, large="mini", presets=("base", "small", "mini", "tiny"), rows=32,
                 row_length=768, vocab_size=6400, compiled=("base", "small", "tiny"), qwen="qwen3-0.6b",
                 qwen_vocab=151936, length=4096, answer=448, twice=30),
    "cpu": dict(stages=3, recompiles=4, large="tiny", presets=("tiny",), rows=2, row_length=64,
                vocab_size=3072, compiled=("tiny",), qwen="tiny", qwen_vocab=4096, length=256, answer=16, twice=4),
}


class Found:
    """What a step found: checks that passed or failed, and rows of a table. Written at once: a kill loses nothing."""

    def __init__(self, out: str, device: str, step: str, tests: list):
        self.out, self.device, self.tests = Path(out), torch.device(device), tests
        self.size = SIZES["cuda" if self.device.type == "cuda" else "cpu"]
        self.path, self.result = self.out / "steps" / f"{step}.json", {"checks": [], "rows": []}

    def write(self):
        save_json(self.path, self.result)

    def check(self, what: str, ok: bool, found=""):
        """ok: True, False, or None for what is only to be known."""
        self.result["checks"].append({"check": what, "result": {True: "ok", False: "FAILED", None: "-"}[ok],
                                      "found": str(found).replace("|", "/")})
        print(f"{what}: {self.result['checks'][-1]['result']} {found}", flush=True)
        self.write()

    def row(self, **cells):
        self.result["rows"].append(cells)
        print(cells, flush=True)
        self.write()

    @contextlib.contextmanager
    def part(self, what: str):
        """An error in here is a failed check, and what follows goes on."""
        try:
            yield
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.check(what, False, f"{type(error).__name__}: {error}"[:300])

    def stage(self, name: str, out: str, *flags) -> list:
        """Run train_NAME.py in this process -> the lines of its metrics.jsonl."""
        module, folder = importlib.import_module(f"train_{name}"), self.out / out
        argv = ["--out", str(folder), "--device", self.device.type, "--log_every", 1, "--eval_every", 10**6, *flags]
        module.main(parse_config(module.Config, module.__doc__, [str(word) for word in argv]))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if "resumed" not in line]

    def few(self, name: str, count: int = 16) -> str:
        """The first lines of a file of data/: neither reading nor evaluation is what is measured here."""
        path = self.out / "steps" / f"{self.path.stem}_{name}.jsonl"
        with open(ROOT / "data" / f"{name}.jsonl", encoding="utf-8") as file:
            path.write_text("".join(line for line, _ in zip(file, range(count))), encoding="utf-8")
        return str(path)


@contextlib.contextmanager
def after_each_step(function):
    """Call function(number of the step, from 1) after each training step; it may return a signal's number, or 0."""
    original, count = Interrupt.requested, [0]

    def requested(self):
        count[0] += 1
        return function(count[0]) or original(self)

    Interrupt.requested = requested
    try:
        yield
    finally:
        Interrupt.requested = original


# The steps that check

def machine(found: Found):
    done = subprocess.run([sys.executable, "-m", "minillm.runtime"], capture_output=True, text=True)
    found.check("python -m minillm.runtime", done.returncode == 0, done.stderr.strip()[-200:])
    for line in done.stdout.splitlines():
        found.row(what=line[:12].strip(), value=line[12:].strip())
    for command in ("nvidia-smi", f"{sys.executable} -m pip freeze"):
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        print(done.stdout, done.stderr, flush=True)


def stages(found: Found):
    def train(name, data, *flags):
        return found.stage(name, name, "--data", found.few(data, 3000), "--eval_data", found.few(f"{data}_eval"),
                           "--max_steps", found.size["stages"], "--no-compile", *flags)

    train("pretrain", "pretrain")
    lines = train("sft", "sft", "--model", found.out / "pretrain")
    found.check("SFT lowers the loss", lines[-1]["loss"] < lines[0]["loss"], f"{lines[0]['loss']} {lines[-1]['loss']}")
    lines = train("reward", "preference", "--model", found.out / "sft")
    found.check("the reward model's loss", None, f"{lines[0]['loss']} {lines[-1]['loss']}")


def gpu_tests(only: list) -> dict:
    """{file: [test, ...]} of the tests that are skipped without a GPU; only: some of their names, or none for all."""
    chosen = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if "cuda" in text else ():
            if isinstance(node, ast.FunctionDef) and (not only or node.name in only) and any(
                    "cuda.is_available" in ast.unparse(d) or "needs_a_gpu" in ast.unparse(d)
                    for d in node.decorator_list):
                chosen.setdefault(f"tests/{path.name}", []).append(node.name)
    return chosen


def pytest_files(found: Found, chosen: dict, at_a_time: int):
    """Run these files, each in a pytest of its own; chosen: {file: names of its tests, or [] for all}."""
    def one(item):
        path, names = item
        command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "--tb=short"]
        return subprocess.run([*command, *([f"{path}::{name}" for name in names] or [path])], cwd=ROOT,
                              capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})

    with ThreadPoolExecutor(at_a_time) as pool:
        for path, done in zip(chosen, pool.map(one, chosen.items())):
            print(done.stdout, done.stderr, flush=True)
            found.check(path, done.returncode == 0, (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1])
            for line in done.stdout.splitlines():
                if line.startswith(("FAILED", "ERROR")):
                    found.row(failed=line[:300].replace("|", "/"))
            if done.returncode and "short test summary" in done.stdout:  # where the last of them failed
                before = done.stdout[:done.stdout.index("short test summary")].splitlines()
                for line in before[-1 - 25:-1]:
                    found.row(traceback=line[:300].replace("|", "/"))


def tests(found: Found):
    pytest_files(found, gpu_tests(found.tests), at_a_time=4)


def suite(found: Found):
    pytest_files(found, {f"tests/{path.name}": [] for path in sorted((ROOT / "tests").glob("test_*.py"))}, at_a_time=8)


def recompiles(found: Found):
    counters = importlib.import_module("torch._dynamo.utils").counters
    # What is tried first is not counted: a trivial function, under the settings of the run (TF32 would make it another
    # one), and flex attention of the model's shape.
    device = runtime.start(found.device.type, 0)
    runtime.can_compile(device)
    shape = config_of(found.size["large"], found.size["vocab_size"], 2048)
    can_flex(device, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim)
    seconds, probe = [], counters["stats"]["unique_graphs"]
    began = time.perf_counter()
    with after_each_step(lambda step: seconds.append(time.perf_counter() - began)):
        found.stage("sft", "recompiles", "--preset", found.size["large"], "--max_steps", found.size["recompiles"],
                    "--tokenizer", "data/tokenizer.json", "--eval_data", found.few("sft_eval"))
    programs = counters["stats"]["unique_graphs"] - probe
    # A layer and the two functions of the head.
    found.check(f"SFT, {len(seconds)} steps: three programs", programs <= 3 and not counters["graph_break"],
                f"{programs} programs, graph breaks {dict(counters['graph_break'])}")
    gaps = [later - earlier for earlier, later in zip(seconds, seconds[1:])]
    found.check("steps that took over a second", None, f"{sum(gap > 1 for gap in gaps)}; the first step "
                f"{seconds[0]:.1f} s after the start, then {sorted(gaps)[len(gaps) // 2] * 1e3:.1f} ms a step")


def same_numbers(found: Found, what: str, lines: list, expected: dict):
    for name, value in expected.items():
        values = [line[name] for line in lines]
        found.check(f"{what}: {name} is exactly {value}", all(v == value for v in values), values[:4])


RATIO = {"ratio_mean": 1.0, "approx_kl": 0.0, "clip_fraction": 0.0}


def rl_numbers(found: Found, what: str, lines: list, compiled: bool):
    """The ratio compares two runs of one program. The reference is another one, and compiled ones round differently."""
    same_numbers(found, what, lines, RATIO if compiled else {**RATIO, "kl": 0.0})
    if compiled:
        kl = [line["kl"] for line in lines]
        found.check(f"{what}: kl is below 1e-5", all(0 <= value < 1e-5 for value in kl), kl)


def zeros(found: Found, model: str = "sft", compiled: bool = False):
    model = found.out / model
    common = ["--model", model, "--lr", 0, "--max_steps", 2, "--compile" if compiled else "--no-compile"]
    rl = [*common, "--batch_size", 16, "--grad_accum", 2, "--update_epochs", 2,
          "--eval_data", found.few("prompts_eval")]
    pairs = [*common, "--data", found.few("preference", 400), "--eval_data", found.few("preference_eval")]
    for lora in ([], ["--peft", "lora"]):
        name = f"{found.path.stem}_lora" if lora else found.path.stem
        with found.part(f"GRPO{' LoRA' * bool(lora)}"):
            lines = found.stage("grpo", f"{name}/grpo", *rl, *lora, "--num_minibatches", 2, "--beta", 0.04)
            rl_numbers(found, f"GRPO{' LoRA' * bool(lora)}", lines, compiled)
        with found.part(f"PPO{' LoRA' * bool(lora)}"):
            lines = found.stage("ppo", f"{name}/ppo", *rl, *lora, "--value_lr", 0, "--reward_model",
                                found.out / "reward", "--critic_steps", 0)
            rl_numbers(found, f"PPO{' LoRA' * bool(lora)}", lines, compiled)
        with found.part(f"DPO{' LoRA' * bool(lora)}"):
            lines = found.stage("dpo", f"{name}/dpo", *pairs, *lora, "--grad_accum", 2)
            same_numbers(found, f"DPO{' LoRA' * bool(lora)}", lines,
                         {"margin": 0.0, "chosen_rewards": 0.0, "rejected_rewards": 0.0})


def zeros_compiled(found: Found):
    tokenizer, counters = Tokenizer.load("data/tokenizer.json"), importlib.import_module("torch._dynamo.utils").counters
    torch.manual_seed(0)
    save_model(found.out / "large", CausalLM(config_of(found.size["large"], tokenizer.vocab_size, 2048)), tokenizer)
    zeros(found, "large", compiled=True)
    found.check("programs in all", None, counters["stats"]["unique_graphs"])


def differences(one: Path, other: Path) -> str:
    one, other = (load_safetensors(path / "model.safetensors") for path in (one, other))
    worst = max((one[name].float() - other[name].float()).abs().max().item() for name in one)
    return "equal bit for bit" if worst == 0 else f"differ by up to {worst:.2g}"


def twice(found: Found):
    steps = found.size["twice"]
    common = {"sft": ["--model", found.out / "pretrain", "--max_steps", steps, "--no-compile", "--data",
                      found.few("sft", 3000), "--eval_data", found.few("sft_eval")],
              "grpo": ["--model", found.out / "sft", "--max_steps", 4, "--no-compile", "--batch_size", 16,
                       "--eval_data", found.few("prompts_eval")]}
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        for name, flags in common.items():
            with found.part(name):
                out = f"twice/{name}{int(deterministic)}"
                for number in "12":
                    found.stage(name, out + number, *flags)
                stop = steps // 2 if name == "sft" else 2
                with contextlib.suppress(run_module.Interrupted):
                    with after_each_step(lambda step: signal.SIGINT if step == stop else 0):
                        found.stage(name, out + "r", *flags)
                found.stage(name, out + "r", *flags, "--resume")
                one, two, resumed = (found.out / (out + number) for number in "12r")
                found.row(script=name, deterministic_algorithms=str(deterministic), two_runs=differences(one, two),
                          interrupted_and_resumed=differences(one, resumed))


# The steps that measure

def captured(found: Found):
    device, size = found.device, found.size
    torch.manual_seed(0)
    model = CausalLM(config_of(size["large"], size["vocab_size"], 1024)).to(device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)  # so that its distributions are not flat
    prompts = [torch.randint(size["vocab_size"], (length,)).tolist() for length in (3, 17, 64, 40) * 4]
    for dtype in ("float32", "bfloat16") if runtime.precision(device) == torch.bfloat16 else ("float32",):
        torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
        precision = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        rollouts, speed = {}, {}
        for static in (True, False):
            with precision:
                for turn in range(3):  # the last one is timed
                    began = time.perf_counter()
                    rollout = generate(model, prompts, 300, end_id=-1, static=static,
                                       generator=torch.Generator(device).manual_seed(1))
                    n_tokens = rollout.n_tokens  # waits for the device
                    speed[static] = n_tokens / (time.perf_counter() - began)
            rollouts[static] = rollout
            if static and device.type == "cuda":  # one that cannot be captured decodes as the plain one does
                found.check(f"{dtype}: decoding is captured", StaticStep.works)
            with precision, torch.no_grad():
                again = head_logprobs(model.hidden(rollout.tokens), model.lm_head.weight, rollout.tokens)
            off = (again - rollout.logprobs[:, 1:])[rollout.response_mask[:, 1:]].abs()
            limit = 1e-4 if dtype == "float32" else 0.1
            found.check(f"{dtype}, {'captured' if static else 'plain'}: sampler and trainer agree "
                        f"on average to {limit}", bool(off.mean() < limit),
                        f"mean {off.mean():.2g}, max {off.max():.2g}")
        equal = (rollouts[True].tokens == rollouts[False].tokens).float().mean().item()
        found.check(f"{dtype}: captured and plain decoding draw the same tokens",
                    equal == 1 if dtype == "float32" else None, f"{equal:.2%}")
        found.row(dtype=dtype, rows=len(prompts), captured_tokens_per_s=round(speed[True]),
                  plain_tokens_per_s=round(speed[False]))


def speed(found: Found, shape: str, recompute: bool, compiled: bool, flops: float):
    """A row of the table of presets: training steps of the SFT loop on random conversations."""
    device, size = found.device, found.size
    config = config_of(shape, size["vocab_size"], size["row_length"])
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = CausalLM(config).to(device)
    model.model.recompute = recompute
    step, _ = bench_train.trainer(bench_train.WAYS["minillm, muon"], model, compiled)
    data = bench_train.Chats(config.vocab_size, size["rows"] * 4, size["row_length"], seed=0)
    loader = PackedLoader(data, size["rows"], size["row_length"], seed=0)
    batches = [(batch.to(device), batch.n_targets) for batch in loader.epoch_batches(0)]
    began = time.perf_counter()
    step(*batches[0]).item()
    first = time.perf_counter() - began
    step(*batches[1]).item()
    began = time.perf_counter()
    turns = 3 if device.type == "cuda" else 1
    for _ in range(turns):
        loss = torch.stack([step(*batch) for batch in batches])
    loss.tolist()
    seconds = (time.perf_counter() - began) / turns
    lengths = data.lengths(range(len(data))).tolist()
    work = 3 * forward_flops(config, lengths, sum(n for _, n in batches)) / seconds
    peak = peak_memory_mb(device)
    found.row(preset=shape, recompute=str(recompute), compiled=str(compiled),
              tokens_per_s=round(sum(lengths) / seconds),
              ms_a_step=round(1e3 * seconds / len(batches), 1), first_step_s=round(first, 1),
              TFLOP_per_s=round(work / 1e12, 2), share_of_matmul=f"{work / flops:.1%}", peak_MiB=round(peak))


def presets(found: Found):
    runtime.start(found.device.type, 0)
    limits = ceilings(found.device, quick=found.device.type == "cpu")
    found.check("fastest matrix products", None, f"{limits['flops'] / 1e12:.0f} TFLOP/s")
    found.check("fastest copy", None, f"{limits['bytes'] / 1e9:.0f} GB/s")
    for shape in found.size["presets"]:
        for recompute in (False, True):
            with found.part(shape):
                speed(found, shape, recompute, False, limits["flops"])


def compiled(found: Found):
    runtime.start(found.device.type, 0)
    limits = ceilings(found.device, quick=found.device.type == "cpu")
    for shape, recompute in [(shape, False) for shape in found.size["compiled"]] + [("small", True), ("mini", False)]:
        if shape in found.size["presets"]:
            with found.part(f"{shape}{', recompute' * recompute}"):
                speed(found, shape, recompute, True, limits["flops"])


def qwen(found: Found):
    size, tokenizer, folder = found.size, Tokenizer.load("data/tokenizer.json"), found.out / "qwen"
    torch.manual_seed(0)
    with found.device:
        model = CausalLM(config_of(size["qwen"], size["qwen_vocab"], size["length"]))
        save_model(folder, model, tokenizer)
        save_reward_model(found.out / "qwen_reward", RewardModel.from_lm(model), tokenizer)
    del model
    # Without checkpoints and fingerprints: 10 GB of disk for each of these runs is not what is measured.
    def nothing(*args):
        return ""

    run_module.Run._save = run_module.Run._save_model = run_module.fingerprint = nothing
    words, half = "all the words that fit in here ", size["length"] // 2
    user = {"role": "user", "content": "Tell me more."}
    answer = tokenizer.decode(tokenizer.encode(words * half)[:half - 40])
    sides = [[user, {"role": "assistant", "content": answer + end}] for end in (" yes", " no")]
    pairs = found.out / "steps" / "long_pairs.jsonl"
    pairs.write_text("".join(json.dumps({"chosen": sides[i % 2], "rejected": sides[1 - i % 2], "margin": i}) + "\n"
                             for i in range(8)), encoding="utf-8")
    sft = ["--max_seq_len", size["length"], "--batch_size", 1, "--eval_data", found.few("sft_eval", 4)]
    dpo = ["--max_seq_len", half, "--batch_size", 1, "--data", pairs, "--eval_data", pairs]
    rl = ["--max_new_tokens", size["answer"], "--max_seq_len", size["answer"] + 64, "--num_minibatches", 1,
          "--eval_data", found.few("prompts_eval", 4)]
    grpo, ppo = [*rl, "--batch_size", 1], [*rl, "--batch_size", 8, "--reward_model", found.out / "qwen_reward"]
    lora = ["--peft", "lora"]
    for name, what, flags in (
            ("sft", "full", [*sft, "--optimizer", "adamw"]), ("lora", "LoRA", [*sft, *lora]),
            ("grpo", "LoRA", [*grpo, *lora]), ("dpo", "LoRA", [*dpo, *lora]), ("ppo", "LoRA", [*ppo, *lora]),
            ("dpo", "full", dpo), ("reward", "LoRA", [*dpo, *lora]),
            ("sft", "full, recompute", [*sft, "--optimizer", "adamw", "--recompute"]),
            ("lora", "LoRA, recompute", [*sft, *lora, "--recompute"]), ("grpo", "full", grpo)):
        with found.part(f"{name}, {what}"):
            times = []
            if found.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            with after_each_step(lambda step: times.append(time.perf_counter())):
                found.stage(name, f"qwen_{name}_{len(found.result['rows'])}", "--model", folder, *flags,
                            "--max_steps", 3, "--no-compile")
            found.row(script=f"train_{name}.py", what=what, seconds_a_step=round(times[-1] - times[-2], 2),
                      peak_GiB=round(peak_memory_mb(found.device) / 2**10, 1),
                      load_and_evaluate_s=round(times[0] - began, 1))


def benchmark(found: Found, module, *flags, **sizes):
    """A benchmark with its peers, at these sizes; each of its tables becomes rows."""
    kind, add = "cuda" if found.device.type == "cuda" else "quick", Report.add
    module.SIZES[kind].update(sizes if kind == "cuda" else {})

    def also_here(self, title, rows):
        add(self, title, rows)
        for row in rows:
            found.row(**{name or "way": self.text(value) for name, value in row.items()})

    Report.add = also_here
    quick = [] if kind == "cuda" else ["--quick"]
    module.main(parse_config(module.Config, module.__doc__, ["--device", found.device.type, *quick, *flags]))


def peers_generate(found: Found):
    benchmark(found, bench_generate, "--parts", "batch", batch=(64, 1), new_tokens=128, repeats=2)


def peers_train(found: Found):
    benchmark(found, bench_train, "--parts", "methods", "--no-compile", steps=3, repeats=3)


def peers_train_compiled(found: Found):
    benchmark(found, bench_train, "--parts", "methods", steps=3, repeats=3)


def step_of_grpo(found: Found):
    benchmark(found, bench_grpo, "--parts", "step", "--no-compile", repeats=3)
