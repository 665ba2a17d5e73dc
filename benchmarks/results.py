"""Every stage with its defaults, for several seeds, measured on the test files: benchmarks/RESULTS.md and its curves.

    python benchmarks/results.py                                    # three seeds, one run after the other: some hours
    python benchmarks/results.py --seeds 0 1 2 3 4 --jobs 8         # eight runs at a time, each on one core
    python benchmarks/results.py --stages pretrain sft --precision fp32
    python benchmarks/results.py --report                           # write the page again from the runs that are there

A run is a stage's own command in a process of its own; each starts as soon as those it builds on are done. A finished
run is not repeated, one that was interrupted goes on. OUT/PRECISION/SEED/STAGE holds it; beside it are STAGE.log and
STAGE.json, what it scored. Nothing but this program reads the *_test.jsonl files. How many small-talk replies fit only
a reader can tell: "fitting": {"English": 36, "Chinese": 40}, written into sft.json by hand, comes onto the page.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_dpo
import train_grpo
import train_lora
import train_ppo
import train_pretrain
import train_reward
import train_sft
from benchmarks import charts, common
from data import label_preferences
from minillm import checkpoint, runtime
from minillm.config import flag, parse_config
from minillm.data import encode_text
from minillm.errors import UserError
from minillm.evaluate import answer_questions, held_out_loss, prompt_messages, read_questions, sample_answers
from minillm.heads import load_reward_model
from minillm.metrics import table
from minillm.peft import load_adapter
from minillm.preferences import PairDataset, encode_pair, pair_logprobs, rank_pairs, score_pairs
from minillm.records import read_records
from minillm.rewards import Judge
from minillm.safetensors import load_json, save_json
from minillm.token_cache import load_dataset
from minillm.tokenizer import Tokenizer

FULL = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 10, "epochs": 20,
        "eval_data": "data/identity_eval.jsonl"}
NEW, OLD, OLD_LINES = ["data/identity.jsonl"], "old.jsonl", 2000  # OLD, in cfg.out: the first lines of data/sft.jsonl
# A twentieth of the tokens are old. Old lines are read once, and new ones as often as in the runs without old data.
MIXED = {"data": [*NEW * 20, OLD], "epochs": 1, "eval_data": "data/identity_eval.jsonl"}
# {name: (script, {flag that takes the folder of another run: that run}, flags)}
STAGES = {
    "pretrain": (train_pretrain, {}, {}),
    "sft": (train_sft, {"model": "pretrain"}, {}),
    "grpo": (train_grpo, {"model": "sft"}, {}),
    "reward": (train_reward, {"model": "grpo"}, {}),  # GRPO's model knows more right answers, so it tells them better
    "ppo": (train_ppo, {"model": "sft", "reward_model": "reward"}, {}),
    "dpo": (train_dpo, {"model": "sft"}, {}),
    "judge": (train_sft, {"model": "sft"}, {"data": ["data/judge.jsonl"], "eval_data": "data/judge_eval.jsonl",
                                            "lr": 1e-3, "epochs": 6}),
    "rlaif": (label_preferences, {"policy": "sft", "judge": "judge"}, {}),
    "dpo_rlaif": (train_dpo, {"model": "sft", "data": "rlaif"}, {"eval_data": "data/preference_eval.jsonl"}),
    "full": (train_sft, {"model": "sft"}, {"data": NEW, **FULL}),
    "full_mixed": (train_sft, {"model": "sft"}, {**FULL, **MIXED}),
    "full_low": (train_sft, {"model": "sft"}, {"data": NEW, **FULL, "lr": 1e-4}),
    "lora": (train_lora, {"model": "sft"}, {}),
    "lora_mixed": (train_lora, {"model": "sft"}, MIXED),
    "lora_low": (train_lora, {"model": "sft"}, {"lr": 2e-4}),
    "adapter": (train_lora, {"model": "sft"}, {"peft": "adapter"}),
    "prefix": (train_lora, {"model": "sft"}, {"peft": "prefix"}),
    "prompt": (train_lora, {"model": "sft"}, {"peft": "prompt"}),
}
PEFT = ["full", "full_mixed", "full_low", "lora", "lora_mixed", "lora_low", "adapter", "prefix", "prompt"]
POLICIES = ["sft", "grpo", "ppo", "dpo", "dpo_rlaif"]
OTHERS = ("compare", "sort", "count", "reverse", "fact")


@dataclass
class Config:
    seeds: list[int] = flag([0, 1, 2], "one run of each stage for each")
    stages: list[str] = flag(list(STAGES), "which stages, those they build on included")
    precision: list[str] = flag(["auto"], "auto: bf16 where the hardware has it; fp32: float32 everywhere")
    jobs: int = flag(1, "runs at a time, each on one core", low=1)
    minutes: float = flag(0.0, "start nothing after this many minutes (0: no end)", low=0)
    max_steps: int = flag(0, "optimizer steps of each run (default: its own)", low=0)
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    report: bool = flag(False, "run nothing, write the page from the runs that are there")
    out: str = flag("out/results", "folder for the runs")
    page: str = flag("", "the page to write, its pictures beside it (default: benchmarks/RESULTS.md; with --max_steps "
                         "RESULTS.md in OUT)")
    job: str = flag("", "used by this program itself: PRECISION/SEED/STAGE to run and measure")


# --------------------------------------------------------------------------------------------- one run

def from_root(path: str) -> str:
    """The same place for the runs, which start in the project's folder, where the data are."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def folder_of(cfg, precision, seed, stage) -> Path:
    """Where a run is."""
    return Path(cfg.out, precision, f"seed{seed}", stage)


def scores_of(folder: Path) -> Path:
    """What a finished run scored: beside its folder, whose files a model that starts from it would take along."""
    return Path(f"{folder}.json")


def options_of(cfg, precision: str, seed: int, stage: str) -> dict:
    """The flags of a run."""
    script, before, options = STAGES[stage]
    folders = {name: str(folder_of(cfg, precision, seed, run)) for name, run in before.items()}
    out = str(folder_of(cfg, precision, seed, stage))
    if "data" in folders:
        folders["data"] = [folders["data"] + "/preference.jsonl"]
    if options.get("data", [""])[-1] == OLD:
        options = {**options, "data": [*options["data"][:-1], str(Path(cfg.out, OLD))]}
    if script is label_preferences:
        return {**folders, "seed": seed, "out": out + "/preference.jsonl"}
    options = {**folders, **options, "seed": seed, "out": out}
    return options | ({"max_steps": cfg.max_steps} if cfg.max_steps else {})


def command_of(script, options: dict) -> str:
    """The command line of a stage with these flags."""
    words = ["python", "data/label_preferences.py" if script is label_preferences else f"{script.__name__}.py"]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def without_place(command: str) -> str:
    """The command with the folder of all runs left out of its paths: that one may have been moved since."""
    return re.sub(rf"\S*?/(?=(?:auto|fp32)/seed\d|{OLD})", "", command)


def settings_of(cfg: Config, precision: str, seed: int, stage: str) -> list:
    """Every flag of a run, as "--lr 0.004": those with their defaults too, which may change with a commit."""
    flags = dataclasses.asdict(STAGES[stage][0].Config(**options_of(cfg, precision, seed, stage)))
    return [without_place(f"--{name} {value}") for name, value in flags.items()]


def float32(device) -> torch.dtype:
    """In place of runtime.precision for --precision fp32."""
    return torch.float32


def run_job(cfg: Config):
    """Train one stage, unless it is finished, and write what it scores on the test files beside its folder."""
    precision, seed, stage = cfg.job.split("/")
    script, before, _ = STAGES[stage]
    if precision == "fp32":
        runtime.precision = float32
    options, folder = options_of(cfg, precision, int(seed), stage), folder_of(cfg, precision, seed, stage)
    began, sources = time.time(), made_of()
    if script is label_preferences:
        label_preferences.main(script.Config(**options, device=cfg.device))
    else:
        # Compiling takes longer than it saves a model of this size. One checkpoint, at the end, is enough here.
        script.main(script.Config(**options, device=cfg.device, compile=False, save_every=10**6,
                                  resume=(folder / "run_config.json").exists()))
    done = folder / "summary.json"
    took = load_json(done)["seconds"] if done.exists() else time.time() - began
    device = runtime.pick_device(cfg.device)
    base = folder_of(cfg, precision, seed, "sft")
    save_json(scores_of(folder), {"command": command_of(script, options), "seconds": took,
                                  "settings": settings_of(cfg, precision, int(seed), stage),
                                  "machine": common.machine(device), "date": str(datetime.date.today()),
                                  "made_of": sources, **measure(stage, folder, base, device)})


def made_of() -> str:
    """The commit, and a fingerprint of the data, which may have been made with another seed."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    files = sorted([*ROOT.glob("data/*.jsonl"), ROOT / "data/tokenizer.json"])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
    return f"commit {commit or 'unknown'} and data {digest}"


def measure(stage: str, folder: Path, base: Path, device) -> dict:
    """What a finished run scores on the test files of its kind; base: the SFT model that it started from."""
    holds_a_model = stage.startswith("full") or stage not in [*PEFT, "rlaif"]
    if stage == "judge":
        return {"judge": judged_right(folder, device)}
    tokenizer = Tokenizer.load(folder if holds_a_model else base)
    if stage == "pretrain":
        text = load_dataset(encode_text, ["data/pretrain_test.jsonl"], tokenizer, 192)
        return held_out_loss(checkpoint.load_model(folder, device), text, 192, device)
    if stage == "reward":
        pairs, model = read_pairs(tokenizer), load_reward_model(folder, device)

        def score(batch):
            return model(batch.tokens, batch.lengths)

        return rank_pairs(score_pairs(score, pairs, 64, device), pairs.kinds)
    if stage == "rlaif":
        report = load_json(folder / "preference.jsonl.report.json")
        kept = {name: report[name] for name in ("prompts", "pairs", "first_answer_preferred", "orders_disagree")}
        return {**kept, "agreement": {name: share for name, (share, _) in report["agreement"].items()}}
    questions = read_questions("data/sft_test.jsonl")
    if stage in PEFT:
        model = checkpoint.load_model(folder if holds_a_model else base, device)
        if not holds_a_model:
            load_adapter(model, folder)
        new = answer_questions(model, tokenizer, read_questions("data/identity_test.jsonl"), device)
        return {"new": new["accuracy"], "old": answer_questions(model, tokenizer, questions, device)["accuracy"]}
    model = checkpoint.load_model(folder, device)
    found = answer_questions(model, tokenizer, questions, device)
    del found["replies"]
    asked = [record for record in questions if record.get("answer") is not None]
    found |= sample_answers(model, tokenizer, asked, device, times=4)[0]
    if stage == "sft":
        fresh = read_questions("data/smalltalk_test.jsonl")
        found["talk"] = answer_questions(model, tokenizer, fresh, device)["replies"]
    if stage.startswith("dpo"):
        pairs = read_pairs(tokenizer)
        ref_logprobs = pair_logprobs(checkpoint.load_model(base, device), pairs, 64, device)
        found |= rank_pairs(pair_logprobs(model, pairs, 64, device) - ref_logprobs, pairs.kinds)
    return found


def read_pairs(tokenizer) -> PairDataset:
    """The pairs of preference_test.jsonl."""
    dataset = load_dataset(encode_pair, ["data/preference_test.jsonl"], tokenizer, 256)
    return PairDataset(dataset, np.arange(len(dataset) // 2))


def judged_right(folder, device) -> dict:
    """{kind: share of the pairs of preference_test.jsonl that a judge decides right}, both orders averaged."""
    records = list(read_records("data/preference_test.jsonl"))
    asked = [({"conversations": record["chosen"]}, record) for record in records]
    pairs = [(prompt_messages(prompt), record["chosen"][-1]["content"], record["rejected"][-1]["content"], record)
             for prompt, record in asked]
    with runtime.autocast(device):
        found = Judge(folder, device).compare(pairs)
    right = {}
    for record, (first, second) in zip(records, found):
        right.setdefault(record["kind"], []).append(first + second > 1)
    return {kind: mean(values) for kind, values in sorted(right.items())}


# --------------------------------------------------------------------------------------------- all runs

def needed(stages: list) -> list:
    """The stages and all that they build on, in the order of STAGES."""
    wanted = set(stages)
    for name in reversed(STAGES):
        if name in wanted:
            wanted |= set(STAGES[name][1].values())
    return [name for name in STAGES if name in wanted]


def run_all(cfg: Config) -> list:
    """Run what is not finished, up to cfg.jobs runs at a time. A run that fails is named; those that need it are left.

    Returns the runs that failed. Raises UserError for a finished run that had other flags, such as --max_steps, or
    other defaults. One that was measured with other data is kept, and named.
    """
    todo = [(precision, seed, stage) for stage in needed(cfg.stages) for precision in cfg.precision
            for seed in cfg.seeds]
    running, failed, began = {}, [], time.time()
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with open(ROOT / "data/sft.jsonl", encoding="utf-8") as file:
        Path(cfg.out, OLD).write_text("".join(itertools.islice(file, OLD_LINES)), encoding="utf-8", newline="\n")

    def is_done(job):
        return scores_of(folder_of(cfg, *job)).exists()

    sources = made_of()
    for job in filter(is_done, todo):
        path, wanted = scores_of(folder_of(cfg, *job)), settings_of(cfg, *job)
        found = load_json(path)
        had = found.get("settings", ["flags that it did not note"])
        if had != wanted:
            theirs, ours = (" ".join(one for one in these if one not in those)
                            for these, those in ((had, wanted), (wanted, had)))
            raise UserError(f"{path} is of a run with {theirs}; now it would be {ours}: give another --out, or remove "
                            "that file and its folder")
        if found["made_of"].split()[-1] != sources.split()[-1]:
            print(f"note: {path} is kept, made of {found['made_of']}; now it would be {sources}", flush=True)

    def is_ready(job):
        return all(is_done((*job[:2], before)) for before in STAGES[job[2]][1].values())

    try:
        while todo or running:
            for job in [job for job, process in running.items() if process.poll() is not None]:
                process = running.pop(job)
                print(f"{time.time() - began:6.0f} s  {'/'.join(map(str, job))}"
                      + ("" if process.returncode == 0 else f" failed, see {folder_of(cfg, *job)}.log"), flush=True)
                failed += [job] if process.returncode else []
            todo = [job for job in todo if not is_done(job)]
            late = cfg.minutes and time.time() - began > 60 * cfg.minutes
            ready = [] if late else [job for job in todo if is_ready(job)][:cfg.jobs - len(running)]
            if not ready and not running:
                break
            for job in ready:
                todo.remove(job)
                running[job] = start(cfg, job)
            time.sleep(0.2)
    finally:  # after Ctrl-C or kill the runs save a checkpoint each
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if todo:
        print("not run:", ", ".join("/".join(map(str, job)) for job in todo), flush=True)
    return failed


def start(cfg: Config, job: tuple) -> subprocess.Popen:
    """Begin a run in a process of its own; what it prints goes to STAGE.log beside its folder."""
    folder = folder_of(cfg, *job)
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, "--job", "/".join(map(str, job)), "--out", from_root(cfg.out),
             "--device", cfg.device, "--max_steps", str(cfg.max_steps)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"NVIDIA_TF32_OVERRIDE": "0"} if job[0] == "fp32" else {})
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=env)


# --------------------------------------------------------------------------------------------- the page

def mean(values) -> float:
    """The mean of some numbers."""
    values = list(values)
    return sum(values) / len(values)


def spread(values: list, factor: float = 100, digits: int = 1) -> str:
    """The mean, and the smallest and the largest value."""
    if not values:
        return "-"
    low, middle, high = (f"{factor * value:.{digits}f}" for value in (min(values), mean(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def arithmetic(found: dict) -> float:
    """The share of right sums and differences."""
    return mean(found["accuracy_by_task"][task] for task in ("add", "subtract"))


def others(found: dict) -> float:
    """The share of right answers to the other tasks."""
    return mean(found["accuracy_by_task"][task] for task in OTHERS)


def read_runs(cfg: Config) -> dict:
    """{(precision, stage): {seed: what it scored}} of the finished runs."""
    runs = {}
    for path in sorted(Path(cfg.out).glob("*/seed*/*.json")):
        precision, folder = path.parts[-3:-1]
        seed = folder.removeprefix("seed")
        if seed.isdecimal() and path.stem in STAGES:  # seed0.bak is none of ours
            runs.setdefault((precision, path.stem), {})[int(seed)] = load_json(path)
    return runs


def listed(seeds) -> str:
    """"seed 0", or "seeds 0, 1"."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def named(stage: str, by_seed: dict, seeds: list) -> str:
    """The stage, and its seeds where it has not all of them."""
    return stage if len(by_seed) == len(seeds) else f"{stage} ({listed(by_seed)})"


def policy_row(name: str, runs: list) -> list:
    """A row of the table of policies."""
    levels = sorted({level for run in runs for level in run["accuracy_by_level"]})
    return [name, spread([arithmetic(run) for run in runs]),
            *(spread([run["accuracy_by_level"][level] for run in runs], digits=0) for level in levels),
            spread([others(run) for run in runs]), spread([run["sampled_accuracy"] for run in runs]),
            spread([run["sampled_gold_reward"] for run in runs], 1, 3), spread([run["stopped"] for run in runs]),
            spread([run["seconds"] for run in runs], 1, 0)]


def changes(before: dict, after: dict, measures: dict) -> list:
    """{title: function} measured after and before the same seeds -> the cells of their differences."""
    seeds = sorted(before.keys() & after.keys())
    return [spread([measure(after[seed]) - measure(before[seed]) for seed in seeds], factor, digits)
            for measure, factor, digits in measures.values()]


def sampled_right(found: dict) -> float:
    """The share of right samples."""
    return found["sampled_accuracy"]


def sampled_gold(found: dict) -> float:
    """The mean gold reward of samples."""
    return found["sampled_gold_reward"]


MEASURES = {"sums, greedy": (arithmetic, 100, 1), "other tasks, greedy": (others, 100, 1),
            "right, sampled": (sampled_right, 100, 1), "gold, sampled": (sampled_gold, 1, 3)}


def each_seed(runs: dict, seeds: list) -> list:
    """{stage: {seed: what it scored}} -> rows of stage, measure and its value for each seed, without a mean."""
    def all_pairs(found):
        return found["preference_accuracy"]

    def wrong_pairs(found):
        return found["accuracy_by_kind"]["wrong"]

    def new(found):
        return found["new"]

    def old(found):
        return found["old"]

    pairs = {"pairs ranked right": (all_pairs, 100, 1), "of the kind wrong": (wrong_pairs, 100, 1)}
    kinds = [*((stage, MEASURES) for stage in POLICIES), *((stage, pairs) for stage in ("reward", "dpo", "dpo_rlaif")),
             *((stage, {"new": (new, 100, 1), "old": (old, 100, 1)}) for stage in PEFT)]
    return [[stage, name, *(f"{factor * measure(runs[stage][seed]):.{digits}f}" if seed in runs[stage] else "-"
                            for seed in seeds)]
            for stage, measures in kinds if runs.get(stage) for name, (measure, factor, digits) in measures.items()]


def section(cfg: Config, precision: str, runs: dict) -> list:
    """The tables of one precision, as pieces of Markdown."""
    def of(stage):
        return runs.get((precision, stage), {})

    mine = [by_seed for (its, _), by_seed in runs.items() if its == precision]
    machines, dates = (sorted({run[key] for by_seed in mine for run in by_seed.values()})
                       for key in ("machine", "date"))
    sources = sorted({run.get("made_of", "a commit not noted") for by_seed in mine for run in by_seed.values()})
    seeds = sorted({seed for by_seed in mine for seed in by_seed})
    out = [f"## {'Float32' if precision == 'fp32' else 'The precision of the machine'}",
           f"{'; '.join(machines)}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}; "
           f"seeds {', '.join(map(str, seeds))}; made of {', '.join(sources)}. Mean (smallest to largest) over the "
           "seeds; shares in percent."]
    if of("pretrain"):
        out.append("Pretraining: bits per byte of `pretrain_test.jsonl` "
                   + spread([run["bits_per_byte"] for run in of("pretrain").values()], 1, 3) + ", "
                   + spread([run["seconds"] for run in of("pretrain").values()], 1, 0) + " seconds.")
    if of("sft"):
        sft = list(of("sft").values())
        tasks = ("add", "subtract", *OTHERS)
        out += ["### SFT, by task", table([["", *tasks], ["greedy", *(
            spread([run["accuracy_by_task"][task] for run in sft]) for task in tasks)]])]
        levels = sorted(sft[0]["accuracy_by_level"])
        head = ["", "sums", *levels, "other tasks", "right, sampled", "gold, sampled", "ended", "seconds"]
        rows = [policy_row(named(stage, of(stage), seeds), list(of(stage).values()))
                for stage in POLICIES if of(stage)]
        out += ["### Policies on `sft_test.jsonl`", table([head, *rows])]
        rows = [[named(stage, {seed: of(stage)[seed] for seed in of(stage) if seed in of("sft")}, seeds),
                 *changes(of("sft"), of(stage), MEASURES)] for stage in POLICIES[1:] if of(stage)]
        if rows:
            out += ["What each seed gained over its own SFT model:", table([["", *MEASURES], *rows])]
    rows = []
    for stage, name in (("reward", "reward model"), ("dpo", "DPO, implicit reward"),
                        ("dpo_rlaif", "DPO on AI labels, implicit reward")):
        if found := list(of(stage).values()):
            kinds = sorted(found[0]["accuracy_by_kind"])
            rows.append([named(name, of(stage), seeds), spread([run["preference_accuracy"] for run in found]),
                         *(spread([run["accuracy_by_kind"][kind] for run in found]) for kind in kinds)])
    if judges := list(of("judge").values()):
        kinds = sorted(judges[0]["judge"])
        rows.append([named("AI judge", of("judge"), seeds), "-",
                     *(spread([run["judge"][kind] for run in judges]) for kind in kinds)])
    if rows:
        out += ["### Pairs of `preference_test.jsonl` ranked right", table([["", "all", *kinds], *rows])]
    if labels := list(of("rlaif").values()):
        out.append(f"{named('RLAIF', of('rlaif'), seeds)}: of "
                   f"{spread([run['prompts'] for run in labels], 1, 0)} prompts "
                   f"{spread([run['pairs'] for run in labels], 1, 0)} pairs were kept; the labels agree with the gold "
                   f"reward in {spread([run['agreement']['gold reward'] for run in labels])} % of those that differ in "
                   f"it. The two orders disagree on {spread([run['orders_disagree'] for run in labels])} %.")
    rows = [[named(stage, of(stage), seeds), spread([run["new"] for run in of(stage).values()]),
             spread([run["old"] for run in of(stage).values()]),
             spread([run["old"] / max(of("sft")[seed]["accuracy"], 0.01) for seed, run in of(stage).items()
                     if seed in of("sft")]),
             spread([run["seconds"] for run in of(stage).values()], 1, 0)] for stage in PEFT if of(stage)]
    if rows:
        out += ["### Fine-tuning on `identity.jsonl`",
                "full: all weights. low: at a tenth of the learning rate. mixed: the new data twenty times and "
                f"{OLD_LINES:,} lines of `sft.jsonl` once, instead of the new data alone.",
                table([["", "new: identity_test", "old: sft_test", "old, share of SFT's", "seconds"], *rows])]
    rows = each_seed({stage: of(stage) for stage in STAGES}, seeds)
    if rows:
        out += ["### Each seed", table([["", "", *(f"seed {seed}" for seed in seeds)], *rows])]
    return out


def draw(cfg: Config, precision: str, runs: dict) -> list:
    """The pictures of one precision, beside the page; returns the Markdown that shows them."""
    shown, folder = [], Path(cfg.page).parent

    def of(stage):
        return runs.get((precision, stage), {})

    def picture(name, title):
        shown.append(f"![{title}]({name}.svg)")
        return folder / f"{name}.svg"

    names = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
    there = {stage: name for stage, name in names.items() if of(stage)}
    if there:
        levels = sorted(next(iter(of(next(iter(there))).values()))["accuracy_by_level"])
        values = {name: [[100 * run["accuracy_by_level"][level] for run in of(stage).values()] for level in levels]
                  for stage, name in there.items()}
        series = {name: [(mean(found), min(found), max(found)) for found in each] for name, each in values.items()}
        charts.bars(picture("levels", "right answers by level"), "Sums and differences by level of difficulty",
                    "right answers, %", levels, series)
    for stage, title, wanted in (
            ("grpo", "GRPO: samples of prompts_eval", {"sampled_accuracy": "right"}),
            ("ppo", "PPO: samples of prompts_eval", {"sampled_gold_reward": "gold", "sampled_accuracy": "right"})):
        series = {}
        for seed in of(stage):
            points = read_curve(folder_of(cfg, precision, seed, stage))
            for key, name in wanted.items():
                if line := [(point["step"], point[key]) for point in points if key in point]:
                    series.setdefault(name, []).append(line)
        if series:
            charts.lines(picture(stage, title), title, "rollouts", "share", series, (0, 1))
    return shown


def read_curve(folder: Path) -> list:
    """A run's evaluations: before training, on the way, after it; none where its folder is gone."""
    if not (folder / "summary.json").exists():
        return []
    summary = load_json(folder / "summary.json")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{"step": 0, **summary["before"]}, *lines, {"step": summary["steps"], **summary["after"]}]


def write_page(cfg: Config):
    """Write the page from all finished runs under cfg.out."""
    runs = read_runs(cfg)
    if not runs:
        raise UserError(f"{cfg.out} holds no finished run" + ("; run without --report" if cfg.report else ""))
    precisions = sorted({precision for precision, _ in runs})
    Path(cfg.page).parent.mkdir(parents=True, exist_ok=True)
    page = ["# Results", "Made by `python benchmarks/results.py`. Every run is a stage with its defaults but for the "
            "flags shown at the end, on one thread and not compiled. Settings were chosen on `*_eval.jsonl`, and "
            "these figures come from the `*_test.jsonl` files; what was tried, and what was changed after a look "
            "at a test file, is in [LOG.md](LOG.md). Levels 1 and 2 of the sums and differences "
            "need no carry, 3 and 4 do; in 1 and 3 one number has a single digit."]
    page += draw(cfg, precisions[0], runs)
    for precision in precisions:
        page += section(cfg, precision, runs)
    if first := runs.get((precisions[0], "sft"), {}):
        seed = min(first)
        replies = [[question.replace("|", "/"), reply.replace("|", "/").replace("\n", " ")]
                   for question, reply in first[seed]["talk"]]
        page.append(f"## Small talk: questions of `smalltalk_test.jsonl`, answered after SFT (seed {seed})")
        if read := {its: run["fitting"] for its, run in first.items() if "fitting" in run}:
            languages = [f"{name} {', '.join(str(found[name]) for found in read.values())}"
                         for name in read[min(read)]]
            page.append("Replies that fit, as read by readers who saw only questions and replies, "
                        f"{listed(read)}: {'; '.join(languages)}.")
        page.append(table([["question", "reply"], *replies]))
    commands = {stage: by_seed[min(by_seed)]["command"] for (precision, stage), by_seed in runs.items()
                if precision == precisions[0]}
    wrapped = [" \\\n    ".join(textwrap.wrap(commands[stage], 112, break_on_hyphens=False))
               for stage in STAGES if stage in commands]
    cut = f"head -n {OLD_LINES} data/sft.jsonl > {Path(from_root(cfg.out), OLD)}"
    first_lines = [cut] if "lora_mixed" in commands else []
    page += ["## Commands", "```\n" + "\n".join(first_lines + wrapped) + "\n```"]
    page = [piece if piece.startswith(("#", "|", "!", "`")) else textwrap.fill(piece, 120) for piece in page]
    Path(cfg.page).write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print(f"{cfg.page} is written", flush=True)


def main(cfg: Config):
    """Run what is asked for and write the page, or do the one job of --job."""
    for name, given, allowed in (("stages", cfg.stages, list(STAGES)), ("precision", cfg.precision, ["auto", "fp32"])):
        if unknown := [value for value in given if value not in allowed]:
            raise UserError(f"--{name} {' '.join(unknown)}: must be of {', '.join(allowed)}")
    if min(cfg.seeds) < 0:
        raise UserError(f"--seeds {min(cfg.seeds)}: must be 0 or above")
    if cfg.job:
        return run_job(cfg)
    if not cfg.page:
        cfg.page = str(Path(cfg.out, "RESULTS.md")) if cfg.max_steps else "benchmarks/RESULTS.md"
    failed = [] if cfg.report else run_all(cfg)
    if not failed or read_runs(cfg):
        write_page(cfg)
    if failed:
        logs = ", ".join(f"{folder_of(cfg, *job)}.log" for job in failed)
        raise UserError(f"these runs failed and are not on the page: {logs} say why; the same command runs the rest")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # run_all then ends its runs
    main(parse_config(Config, __doc__))
