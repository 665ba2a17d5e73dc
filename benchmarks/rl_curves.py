"""What reinforcement learning adds, and what it breaks: curves over several seeds, in one command.

    python benchmarks/rl_curves.py                              # everything; needs out/sft and out/reward
    python benchmarks/rl_curves.py --parts hacking --seeds 0    # only how PPO fools a weak reward model, KL off
    python benchmarks/rl_curves.py --parts grpo --model mine --steps 200

    grpo       train_grpo.py with its defaults, against the same time of further SFT on the same demonstrations
    ppo        train_ppo.py with its defaults, against the reward model of out/reward
    hacking    train_ppo.py --kl_coef 0 against a reward model that knows 200 pairs, none of which has a wrong answer:
               (40 rollouts, lr 3e-4, 4 mini-batches): its score rises, and correctness falls. Gold alone would hide it for a while: better manners lift it.

Every run is a stage's own command, which is printed, followed by an evaluation of what it wrote: greedy replies to both
held-out files (prompts_eval and sft_eval together; sums, which are additions and subtractions, also of prompts_eval alone), and
four samples at temperature 1 to each prompt of prompts_eval, as the scripts take them themselves. Runs that are finished are not repeated. Written to --out:
table.md, results.json, curves.json, and curves.png with matplotlib.
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
from minillm.records import read_records
from minillm.errors import UserError
from minillm.evaluate import answer_questions, prompt_messages, read_questions
from minillm.metrics import table
from minillm.rewards import load_rewards
from minillm.rollouts import Prompt, sampled_scores
from minillm.tokenizer import Tokenizer

PARTS = ["grpo", "ppo", "hacking"]
EVAL_DATA, PAIRS = ["data/prompts_eval.jsonl", "data/sft_eval.jsonl"], "data/preference.jsonl"
ARITHMETIC = ("add", "subtract")


@dataclass
class Config:
    model: str = flag("out/sft", "checkpoint folder to start from")
    reward_model: str = flag("out/reward", "reward model for ppo")
    parts: list[str] = flag(PARTS, f"which of {', '.join(PARTS)}")
    seeds: list[int] = flag([0, 1, 2], "one run each")
    steps: int = flag(0, "rollouts per run (default: each script's own)", low=0)
    sft_lr: float = flag(5e-4, "peak learning rate of further SFT", low=0)
    weak_pairs: int = flag(200, "pairs that the weak reward model sees", low=1)
    out: str = flag("out/rl_curves", "folder for the runs and the results")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")


def run(stage, out: Path, **options) -> dict:
    """Run a stage, or take up where it was; returns its summary."""
    cfg = stage.Config(**options, out=str(out))
    changed = [f for f in fields(cfg) if f.name in options or f.name == "out"]
    words = [f"--{f.name} {value}" if (value := getattr(cfg, f.name)) != "" else "" for f in changed if not isinstance(getattr(cfg, f.name), list)]
    words += [f"--{f.name} {shlex.join(map(str, getattr(cfg, f.name)))}" for f in changed if isinstance(getattr(cfg, f.name), list)]
    print(f"\n# python {stage.__name__}.py {' '.join(filter(None, words))}", flush=True)
    cfg.resume = (out / "run_config.json").exists()
    if stage.main(cfg).get("interrupted"):
        raise UserError("interrupted; the same command goes on")
    return checkpoint.load_json(out / "summary.json")


def measure(folder, reward_model, device) -> dict:
    """Correctness of greedy replies by kind of task; gold, correctness and reward of samples."""
    tokenizer, policy = Tokenizer.load(folder), checkpoint.load_model(folder, device)
    asked, more = map(read_questions, EVAL_DATA)
    by_task = answer_questions(policy, tokenizer, asked + more, device)["accuracy_by_task"]
    share = lambda tasks: sum(by_task[task] for task in tasks) / len(tasks)
    sums = [record for record in asked if record.get("task") in ARITHMETIC]
    found = {"rl_sums": answer_questions(policy, tokenizer, sums, device)["accuracy"],
             "arithmetic": share([task for task in by_task if task in ARITHMETIC]), "others": share([task for task in by_task if task not in ARITHMETIC]),
             "all": share(list(by_task)), "by_task": by_task}
    prompts = [Prompt(tokenizer.render(messages, add_generation_prompt=True)[0], messages, record) for record in asked for messages in [prompt_messages(record)]]
    rewards = load_rewards(["model"], reward_model, "", device) if reward_model else {}
    if rewards:
        sampled = sampled_scores(policy, tokenizer, prompts, rewards, device, max_new_tokens=48, temperature=1.0)
        found |= {name: sampled[f"sampled_{name}"] for name in ("gold_reward", "accuracy", "reward", "reply_tokens")}
    return found


def curve(out: Path, summary: dict, *names) -> dict:
    """{"seconds": [...], name: [...]} of a run: its evaluations before, on the way (from metrics.jsonl) and after."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points = [{"step": 0, **summary["before"]}, *(line for line in lines if names[0] in line), {"step": summary["steps"], **summary["after"]}]
    return {"seconds": [round(p["step"] / summary["steps"] * summary["seconds"], 1) for p in points], **{n: [p[n] for p in points] for n in names}}


def grpo(cfg: Config, device, start: dict) -> tuple:
    """GRPO and as many seconds of further SFT, for each seed."""
    results, curves = [], []
    for seed in cfg.seeds:
        out = Path(cfg.out, f"grpo_{seed}")
        summary = run(train_grpo, out, model=cfg.model, seed=seed, device=cfg.device, max_steps=cfg.steps)
        trial = run(train_sft, Path(cfg.out, f"sft_speed_{seed}"), model=cfg.model, seed=seed, device=cfg.device, max_steps=30, lr=cfg.sft_lr, optimizer="adamw")
        lines = [json.loads(line) for line in Path(cfg.out, f"sft_speed_{seed}", "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rate = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line][-1]  # the last one: without what the start costs
        steps = max(60, round(summary["seconds"] * rate / (trial["tokens"] / trial["steps"])))
        sft_out = Path(cfg.out, f"sft_{seed}")
        if (sft_out / "run_config.json").exists():  # measured before: the speed of today may be another
            steps = checkpoint.load_json(sft_out / "run_config.json")["max_steps"]
        more = run(train_sft, sft_out, model=cfg.model, seed=seed, device=cfg.device, max_steps=steps, lr=cfg.sft_lr, optimizer="adamw")
        results.append({"grpo": {**measure(out, "", device), "seconds": summary["seconds"]},
                        "further SFT": {**measure(sft_out, "", device), "seconds": more["seconds"]}})
        accuracy = curve(out, summary, "accuracy_by_task")
        accuracy["arithmetic"] = [sum(by_task[t] for t in ARITHMETIC) / len(ARITHMETIC) for by_task in accuracy.pop("accuracy_by_task")]
        curves.append({"grpo": accuracy, "further SFT": {"seconds": [0, more["seconds"]], "arithmetic": [start["rl_sums"], results[-1]["further SFT"]["rl_sums"]]}})
    return results, curves


def ppo(cfg: Config, device, start: dict) -> tuple:
    """PPO with the embedded reward model, for each seed."""
    results, curves = [], []
    for seed in cfg.seeds:
        out = Path(cfg.out, f"ppo_{seed}")
        summary = run(train_ppo, out, model=cfg.model, reward_model=cfg.reward_model, seed=seed, device=cfg.device, max_steps=cfg.steps)
        results.append({"ppo": {**measure(out, cfg.reward_model, device), "seconds": summary["seconds"]}})
        curves.append({"ppo": curve(out, summary, "sampled_reward", "sampled_gold_reward", "sampled_accuracy")})
    return results, curves


def hacking(cfg: Config, device, start: dict) -> tuple:
    """PPO without a KL term against a reward model that never saw a wrong answer lose, for each seed."""
    pairs = [record for record in read_records(PAIRS) if record["kind"] != "wrong"][:cfg.weak_pairs]
    Path(cfg.out, "weak_pairs.jsonl").write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    weak = Path(cfg.out, "weak_reward")
    run(train_reward, weak, model=cfg.model, data=[str(Path(cfg.out, "weak_pairs.jsonl"))], eval_data="data/preference_eval.jsonl", device=cfg.device)
    start["hacking"] = measure(cfg.model, weak, device)
    results, curves = [], []
    for seed in cfg.seeds:
        out = Path(cfg.out, f"hacking_{seed}")
        summary = run(train_ppo, out, model=cfg.model, reward_model=str(weak), kl_coef=0.0, stop_kl=0.0, lr=3e-4, num_minibatches=4, eval_every=5, seed=seed, device=cfg.device, max_steps=cfg.steps or 40)
        results.append({"hacking": {**measure(out, weak, device), "seconds": summary["seconds"]}})
        curves.append({"hacking": curve(out, summary, "sampled_reward", "sampled_gold_reward", "sampled_accuracy")})
    return results, curves


def spread(values: list, percent: bool) -> str:
    """The mean, and the smallest and largest of the seeds."""
    form = (lambda x: f"{100 * x:.0f}") if percent else (lambda x: f"{x:.2f}")
    mean = form(sum(values) / len(values))
    return f"{mean} ({form(min(values))} to {form(max(values))})" if len(values) > 1 else mean


def make_table(start: dict, results: dict) -> str:
    """Percent, but for the reward, gold and seconds; of several seeds the mean and the range."""
    columns = {"rl_sums": True, "arithmetic": True, "others": True, "accuracy": True, "gold_reward": False, "reward": False}
    titles = ["", "sums of prompts_eval %", "all sums %", "other tasks %", "sampled: right %", "sampled: gold", "sampled: reward", "seconds"]
    line = lambda name, runs: [name, *(spread([r[c] for r in runs], p) if c in runs[0] else "-" for c, p in columns.items()),
                               f"{sum(r['seconds'] for r in runs) / len(runs):.0f}" if "seconds" in runs[0] else "-"]
    rows = [titles, line("before", [start])]
    for part, runs in results.items():
        if part == "hacking":
            rows.append(line("before, by the weak reward model", [start["hacking"]]))
        rows += [line(name, [r[name] for r in runs]) for name in runs[0]]
    return table(rows)


def plot(curves: dict, path):
    """One panel per part; a line per seed. Without matplotlib nothing is drawn."""
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
        axes.set(title=part, xlabel="seconds", ylabel="sums of prompts_eval that are right" if part == "grpo" else "gold reward, accuracy of samples")
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
        # After every part: what is done is kept
        text = make_table(start, results)
        Path(cfg.out, "table.md").write_text(text + "\n", encoding="utf-8")
        checkpoint.save_json(Path(cfg.out, "results.json"), {"before": start, **results})
        checkpoint.save_json(Path(cfg.out, "curves.json"), curves)
        plot(curves, Path(cfg.out, "curves.png"))
    print("\n" + text, flush=True)
    return results


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
