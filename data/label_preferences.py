"""RLAIF: preference pairs from AI feedback, with no human labels (arXiv 2212.08073; 2309.00267).

A policy samples two answers to each prompt, and a judge says which is better. It is asked in both orders, because
judges tend to favour one of the two places. The mean of the two probabilities is free of that bias (2309.00267, section
3.1), and decides. The pairs of which the judge is sure enough are written as

    {"chosen": [messages], "rejected": [messages], "confidence": mean probability of the verdict, "task"}

    python train_sft.py --model out/sft --data data/judge.jsonl --lr 1e-3 --epochs 6 --out out/judge
    python data/label_preferences.py     # out/sft answers, out/judge judges; writes out/rlaif/preference.jsonl
    python train_dpo.py --data out/rlaif/preference.jsonl --eval_data data/preference_eval.jsonl --out out/dpo_rlaif

Any checkpoint folder can be the policy or the judge, each with its own tokenizer. The report says how often the labels
agree with the rule-based score; the score has no influence on the labels.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minillm import checkpoint, runtime  # noqa: E402
from minillm.config import flag, parse_config  # noqa: E402
from minillm.errors import UserError  # noqa: E402
from minillm.evaluate import prompt_messages, read_questions, reply_to  # noqa: E402
from minillm.metrics import table  # noqa: E402
from minillm.rewards import Judge  # noqa: E402
from minillm.safetensors import atomic_write, check_file_out, save_json  # noqa: E402
from minillm.tokenizer import Tokenizer  # noqa: E402
from minillm.verify import gold_components, is_empty  # noqa: E402


@dataclass
class Config:
    policy: str = flag("out/sft", "checkpoint folder that writes the answers")
    judge: str = flag("out/judge", "checkpoint folder that judges them")
    prompts: list[str] = flag(["data/prompts.jsonl"],
                              "prompts, .jsonl or .jsonl.gz; a reply after the last user message is ignored")
    out: str = flag("out/rlaif/preference.jsonl", "file to write")
    max_prompts: int = flag(0, "number of prompts to use, from the start (0: all)", low=0)
    rounds: int = flag(1, "pairs to sample for each prompt", low=1)
    temperature: float = flag(1.0, "of the answers", low=0.01)
    max_new_tokens: int = flag(64, "longest answer", low=1)
    min_confidence: float = flag(0.6, "drop pairs whose mean probability of the verdict is below this", low=0.5, high=1)
    batch_size: int = flag(128, "answers sampled, or questions asked, at once", low=1)
    device: str = flag("", "cuda, mps or cpu (default: the best available)")
    seed: int = flag(0, "seed of the sampling", low=0)


def main(cfg: Config) -> dict:
    # 1. Setup
    check_file_out("--out", cfg.out, cfg.prompts)
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.require_stage(cfg.policy, "out/sft", "train_sft.py", "--policy")
    checkpoint.require_stage(cfg.judge, "out/judge", "train_sft.py with data/judge.jsonl (see --help)", "--judge")
    policy, tokenizer = checkpoint.load_model(cfg.policy, device), Tokenizer.load(cfg.policy)
    checkpoint.check_tokenizer(policy.config, tokenizer, cfg.policy)
    judge = Judge(cfg.judge, device)
    records = [record for path in cfg.prompts for record in read_questions(path)]
    records = (records[:cfg.max_prompts] if cfg.max_prompts else records) * cfg.rounds

    # 2. Two answers to every prompt
    texts, _, stopped = reply_to(policy, tokenizer, records * 2, device, cfg.max_new_tokens, cfg.temperature,
                                 seed=cfg.seed, batch_size=cfg.batch_size)
    N, pairs = len(records), []
    dropped = {"equal answers": 0, "an empty answer": 0, "a NUL character": 0, "an answer cut at --max_new_tokens": 0}
    for i, record in enumerate(records):
        a, b = texts[i], texts[i + N]
        if a == b:
            dropped["equal answers"] += 1
        elif is_empty(a) or is_empty(b):
            dropped["an empty answer"] += 1
        elif "\0" in a + b:  # no data file may hold it
            dropped["a NUL character"] += 1
        elif not (stopped[i] and stopped[i + N]):
            dropped["an answer cut at --max_new_tokens"] += 1
        else:
            pairs.append((prompt_messages(record), a, b, record))

    # 3. The judge, in both orders
    found = judge.compare(pairs, cfg.batch_size)
    first_place = sum((shown_first > 0.5) + (shown_second < 0.5) for shown_first, shown_second in found)
    disagree = sum((shown_first > 0.5) != (shown_second > 0.5) for shown_first, shown_second in found)
    dropped["confidence too low"] = 0
    lines, agreement = [], {}
    for (messages, a, b, record), (shown_first, shown_second) in zip(pairs, found):
        p = (shown_first + shown_second) / 2
        if max(p, 1 - p) < cfg.min_confidence:
            dropped["confidence too low"] += 1
        else:
            chosen, rejected = (a, b) if p > 0.5 else (b, a)
            lines.append({"chosen": [*messages, {"role": "assistant", "content": chosen}],
                          "rejected": [*messages, {"role": "assistant", "content": rejected}],
                          "confidence": round(max(p, 1 - p), 4),
                          **({"task": record["task"]} if "task" in record else {})})
            good, bad = gold_components(chosen, record), gold_components(rejected, record)
            gains = {name: good[name] - bad[name] for name in good}
            gains["gold reward"] = sum(gains.values())
            for name, gain in gains.items():
                if gain:
                    agreement.setdefault(name, []).append(gain > 0)
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
    if not lines:
        raise UserError(f"no pair is left of {N:,} prompts: {reasons}")

    # 4. Save
    with atomic_write(cfg.out) as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    report = {"prompts": N, "pairs": len(lines), "dropped": dropped,
              "confidence": sum(line["confidence"] for line in lines) / len(lines),
              "first_answer_preferred": first_place / (2 * len(pairs)),
              "orders_disagree": disagree / len(pairs),
              "agreement": {name: [sum(wins) / len(wins), len(wins)] for name, wins in agreement.items()}}
    save_json(f"{cfg.out}.report.json", report)
    runtime.say(f"{len(lines):,} pairs from {N:,} prompts -> {cfg.out}" + (f"; dropped: {reasons}" if reasons else ""))
    runtime.say(f"position bias: the answer shown first wins {report['first_answer_preferred']:.1%} of the time "
                f"(50 % means no bias); the two orders disagree on {report['orders_disagree']:.1%}")
    header = ["where the two answers differ in", "judge agrees", "pairs"]
    runtime.say(table([header] + [[name, *share] for name, share in report["agreement"].items()]))
    return report


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
