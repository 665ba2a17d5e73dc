"""What reinforcement learning adds, and what it breaks: curves over several seeds.

    python benchmarks/rl_curves.py                              # everything; needs out/sft and out/reward
    python benchmarks/rl_curves.py --parts hacking --seeds 0    # only how PPO fools a weak reward model
    python benchmarks/rl_curves.py --parts grpo --model mine --steps 200

    grpo       train_grpo.py with its defaults, compared with as many seconds of further SFT (train_sft.py's data)
    ppo        train_ppo.py with its defaults, against the reward model of out/reward
    hacking    train_ppo.py --kl_coef 0 --target_kl 0 (40 rollouts, lr 3e-4, 4 mini-batches) against a reward model that
               was trained on only 200 pairs, without those whose rejected answer is wrong. Its score rises, while fewer
               answers are right. The gold reward hides that for a while, because manners improve

Every run is a stage's own command, which is printed. What it wrote is then evaluated on two held-out files: greedy
replies to prompts_eval and sft_eval together (the sums, additions and subtractions, also on prompts_eval alone), and
four samples at temperature 1 to each prompt of prompts_eval. The same command repeats no run that is finished, and
continues one that is not. Written to --out: table.md, results.json, curves.json, and curves.png if matplotlib is
installed.
"""

import json
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_grpo
import train_ppo
import train_reward
import train_sft
from minillm import checkpoint, runtime
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.evaluate import answer_questions, read_questions
from minillm.metrics import table
from minillm.records import read_records
from minillm.rewards import load_rewards
from minillm.rollouts import make_prompt, sampled_scores
from minillm.safetensors import load_json, save_json
from minillm.tokenizer import Tokenizer

PARTS = ["grpo", "ppo", "hacking"]
EVAL_DATA = ["data/prompts_eval.jsonl", "data/sft_eval.jsonl"]
PAIRS, PAIRS_EVAL = "data/preference.jsonl", "data/preference_eval.jsonl"
ARITHMETIC = ("add", "subtract")


@dataclass
class Config:
    model: str = flag("out/sft", "checkpoint folder to start from")
    reward_model: str = flag("out/reward", "checkpoint folder of the reward model for ppo")
    parts: list[str] = flag(PARTS, f"which of {', '.join(PARTS)}")
    seeds: list[int] = flag([0, 1, 2], "one run for each")
    steps: int = flag(0, "rollouts per run (default: each script's own)", low=0)
    sft_lr: float = flag(5e-4, "peak learning rate of further SFT", low=0)
    weak_pairs: int = flag(200, "pairs that the weak reward model sees", low=1)
    out: str = flag("out/rl_curves", "folder for the runs and the results")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")


def run(stage, out: Path, **options) -> dict:
    """Run a stage, or continue where it stopped; returns its summary."""
    cfg = stage.Config(**options, out=str(out))
    words = ["python", f"{stage.__name__}.py"]
    for name in [*options, "out"]:
        value = getattr(cfg, name)
        if value != "":
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    print(f"\n# {shlex.join(words)}", flush=True)
    cfg.resume = (out / "run_config.json").exists()
    stage.main(cfg)
    return load_json(out / "summary.json")


def mean(values):
    """The mean of some numbers."""
    values = list(values)
    return sum(values) / len(values)


def measure(folder, reward_model, device) -> dict:
    """Share of right greedy replies, by task. With a reward model also its score, gold and right answers of samples."""
    tokenizer, policy = Tokenizer.load(folder), checkpoint.load_model(folder, device)
    asked, more = map(read_questions, EVAL_DATA)
    by_task = answer_questions(policy, tokenizer, asked + more, device)["accuracy_by_task"]
    sums = [record for record in asked if record.get("task") in ARITHMETIC]
    found = {"rl_sums": answer_questions(policy, tokenizer, sums, device)["accuracy"],
             "arithmetic": mean(by_task[task] for task in by_task if task in ARITHMETIC),
             "others": mean(by_task[task] for task in by_task if task not in ARITHMETIC),
             "all": mean(by_task.values()), "by_task": by_task}
    if reward_model:
        prompts = [make_prompt(record, tokenizer) for record in asked]
        rewards = load_rewards(["model"], reward_model, "", device)
        sampled = sampled_scores(policy, tokenizer, prompts, rewards, device, max_new_tokens=48, temperature=1.0)
        found |= {name: sampled[f"sampled_{name}"] for name in ("gold_reward", "accuracy", "reward", "reply_tokens")}
    return found


def read_metrics(out: Path) -> list:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(out: Path, summary: dict, *names) -> dict:
    """{"seconds": [...], name: [...]} of a run: its evaluations before training, on the way, and after it."""
    on_the_way = [line for line in read_metrics(out) if names[0] in line]
    points = [{"step": 0, **summary["before"]}, *on_the_way, {"step": summary["steps"], **summary["after"]}]
    seconds = [round(point["step"] / summary["steps"] * summary["seconds"], 1) for point in points]
    return {"seconds": seconds, **{name: [point[name] for point in points] for name in names}}


def sft_steps(cfg: Config, seed: int, out: Path, seconds: float) -> int:
    """How many steps of SFT take this many seconds here, measured in a short run; at least 60."""
    if (out / "run_config.json").exists():  # measured before: today's speed may be another
        return load_json(out / "run_config.json")["max_steps"]
    trial_out = Path(cfg.out, f"sft_speed_{seed}")
    trial = run(train_sft, trial_out, model=cfg.model, seed=seed, device=cfg.device, max_steps=30, lr=cfg.sft_lr,
                optimizer="adamw")
    # The speed in the last line of the log leaves out what the start costs.
    tokens_per_s = [line["tokens_per_s"] for line in read_metrics(trial_out) if "tokens_per_s" in line][-1]
    return max(60, round(seconds * tokens_per_s / (trial["tokens"] / trial["steps"])))


def grpo(cfg: Config, device, start: dict) -> tuple:
    """GRPO, and as many seconds of further SFT, for each seed."""
    results, curves = [], []
    for seed in cfg.seeds:
        out, sft_out = Path(cfg.out, f"grpo_{seed}"), Path(cfg.out, f"sft_{seed}")
        summary = run(train_grpo, out, model=cfg.model, seed=seed, device=cfg.device, max_steps=cfg.steps)
        steps = sft_steps(cfg, seed, sft_out, summary["seconds"])
        more = run(train_sft, sft_out, model=cfg.model, seed=seed, device=cfg.device, max_steps=steps, lr=cfg.sft_lr,
                   optimizer="adamw")
        results.append({"grpo": {**measure(out, "", device), "seconds": summary["seconds"]},
                        "further SFT": {**measure(sft_out, "", device), "seconds": more["seconds"]}})
        points = curve(out, summary, "accuracy_by_task")
        points["arithmetic"] = [mean(by_task[task] for task in ARITHMETIC)
                                for by_task in points.pop("accuracy_by_task")]
        further = {"seconds": [0, more["seconds"]],
                   "arithmetic": [start["rl_sums"], results[-1]["further SFT"]["rl_sums"]]}
        curves.append({"grpo": points, "further SFT": further})
    return results, curves


def ppo(cfg: Config, device, start: dict) -> tuple:
    """PPO against the given reward model, for each seed."""
    results, curves = [], []
    for seed in cfg.seeds:
        out = Path(cfg.out, f"ppo_{seed}")
        summary = run(train_ppo, out, model=cfg.model, reward_model=cfg.reward_model, seed=seed, device=cfg.device,
                      max_steps=cfg.steps)
        results.append({"ppo": {**measure(out, cfg.reward_model, device), "seconds": summary["seconds"]}})
        curves.append({"ppo": curve(out, summary, "sampled_reward", "sampled_gold_reward", "sampled_accuracy")})
    return results, curves


def hacking(cfg: Config, device, start: dict) -> tuple:
    """PPO without a KL term against a reward model that never saw a wrong answer lose, for each seed."""
    pairs = [record for record in read_records(PAIRS) if record["kind"] != "wrong"][:cfg.weak_pairs]
    data, weak = Path(cfg.out, "weak_pairs.jsonl"), Path(cfg.out, "weak_reward")
    data.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    run(train_reward, weak, model=cfg.model, data=[str(data)], eval_data=PAIRS_EVAL, device=cfg.device)
    start["hacking"] = measure(cfg.model, weak, device)
    results, curves = [], []
    for seed in cfg.seeds:
        out = Path(cfg.out, f"hacking_{seed}")
        summary = run(train_ppo, out, model=cfg.model, reward_model=str(weak), kl_coef=0.0, target_kl=0.0, lr=3e-4,
                      num_minibatches=4, eval_every=5, seed=seed, device=cfg.device, max_steps=cfg.steps or 40)
        results.append({"hacking": {**measure(out, weak, device), "seconds": summary["seconds"]}})
        curves.append({"hacking": curve(out, summary, "sampled_reward", "sampled_gold_reward", "sampled_accuracy")})
    return results, curves


def spread(values: list, percent: bool) -> str:
    """The mean over the seeds, and the smallest and the largest value."""
    def show(value):
        return f"{100 * value:.0f}" if percent else f"{value:.2f}"

    if len(values) == 1:
        return show(values[0])
    return f"{show(mean(values))} ({show(min(values))} to {show(max(values))})"


# The columns of the table: {key of a result: (title, whether it is shown in percent)}
COLUMNS = {"rl_sums": ("sums of prompts_eval %", True), "arithmetic": ("all sums %", True),
           "others": ("other tasks %", True), "accuracy": ("sampled: right %", True),
           "gold_reward": ("sampled: gold", False), "reward": ("sampled: reward", False)}


def make_table(start: dict, results: dict) -> str:
    """A row for each kind of run, with the mean and the range over its seeds."""
    def row(name, runs):
        cells = [spread([run[key] for run in runs], percent) if key in runs[0] else "-"
                 for key, (_, percent) in COLUMNS.items()]
        return [name, *cells, f"{mean(run['seconds'] for run in runs):.0f}" if "seconds" in runs[0] else "-"]

    rows = [["", *(title for title, _ in COLUMNS.values()), "seconds"], row("before", [start])]
    for part, seeds in results.items():
        if part == "hacking":
            rows.append(row("before, by the weak reward model", [start["hacking"]]))
        rows += [row(name, [runs[name] for runs in seeds]) for name in seeds[0]]
    return table(rows)


def plot(curves: dict, path):
    """One panel per part, one line per seed. Draws nothing if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False)
    for axes, (part, seeds) in zip(panels[0], curves.items()):
        colours, lines = {}, {}
        right = axes.twinx() if part != "grpo" else axes  # the reward has a scale of its own
        for runs in seeds:
            for name, values in runs.items():
                for quantity in sorted(values.keys() - {"seconds"}):
                    label = name if part == "grpo" else quantity.replace("sampled_", "")
                    colours.setdefault(label, f"C{len(colours)}")
                    side = right if quantity == "sampled_reward" else axes
                    lines[label], = side.plot(values["seconds"], values[quantity], color=colours[label], marker=".")
        what = "sums of prompts_eval that are right" if part == "grpo" else "gold reward, accuracy of samples"
        axes.set(title=part, xlabel="seconds", ylabel=what)
        if part != "grpo":
            right.set_ylabel("reward of samples")
        axes.legend(lines.values(), lines.keys())
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(cfg: Config) -> dict:
    """Run the parts for all seeds; print and write the table and the curves."""
    if unknown := [part for part in cfg.parts if part not in PARTS]:
        raise UserError(f"--parts {' '.join(unknown)}: must be of {', '.join(PARTS)}")
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py")
    if "ppo" in cfg.parts:
        checkpoint.require_stage(cfg.reward_model, "out/reward", "train_reward.py")
    device = runtime.pick_device(cfg.device)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    start = measure(cfg.model, cfg.reward_model if "ppo" in cfg.parts else "", device)
    results, curves = {}, {}
    for part in cfg.parts:
        results[part], curves[part] = {"grpo": grpo, "ppo": ppo, "hacking": hacking}[part](cfg, device, start)
        # Written after every part, so that an interruption costs one part only.
        text = make_table(start, results)
        Path(cfg.out, "table.md").write_text(text + "\n", encoding="utf-8")
        save_json(Path(cfg.out, "results.json"), {"before": start, **results})
        save_json(Path(cfg.out, "curves.json"), curves)
        plot(curves, Path(cfg.out, "curves.png"))
    print("\n" + text, flush=True)
    return results


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
