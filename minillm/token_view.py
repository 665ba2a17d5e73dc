"""A conversation token by token, each with a number: loss mask, log-probability, its change; advantage, ratio.

    python eval.py --tokens                               # which tokens are trained on, and how likely each is
    python eval.py --tokens --compare out/sft out/dpo     # what the second model finds likelier, or less likely
    python eval.py --tokens --data out/ppo/rollout.jsonl  # what --show_every kept of a rollout: advantages, ratios

On a terminal the number is a colour. Elsewhere it stands behind the token: 4{-0.69} has log p = -0.69, so p = 0.5.
"""

import json
import math
from pathlib import Path

import torch

from minillm import runtime
from minillm.errors import UserError
from minillm.logprobs import head_logprobs
from minillm.safetensors import atomic_write

GREY, GREEN, YELLOW, MAGENTA, RED, BOLD_GREEN, BOLD_RED = "2", "32", "33", "35", "31", "1;32", "1;31"
# Of each kind of number: what it is, and from which value on a token has which colour.
SCALES = {
    "mask": ("loss mask, 1: trained on", [(1, GREEN), (-math.inf, GREY)]),
    "logprob": ("log-probability given the tokens before it, in nats",
                [(math.log(0.5), GREEN), (math.log(0.1), YELLOW), (math.log(0.01), MAGENTA), (-math.inf, RED)]),
    "change": ("change of the log-probability, in nats",
               [(1, BOLD_GREEN), (0.1, GREEN), (-0.1, GREY), (-1, RED), (-math.inf, BOLD_RED)]),
    "advantage": ("advantage, above 0: to be made likelier",
                  [(1, BOLD_GREEN), (0.1, GREEN), (-0.1, GREY), (-1, RED), (-math.inf, BOLD_RED)]),
    "ratio": ("ratio, probability now / when it was sampled",
              [(1.2, BOLD_GREEN), (1.02, GREEN), (0.98, GREY), (0.8, RED), (-math.inf, BOLD_RED)])}
NAMES = {"mask": ["trained on", "not"], "logprob": ["p from 0.5", "from 0.1", "from 0.01", "below"],
         "change": ["up by 1 or more", "by 0.1", "as before", "down by 0.1", "by more than 1"],
         "advantage": ["1 or more", "from 0.1", "about 0", "below -0.1", "below -1"],
         "ratio": ["1.2 or more", "from 1.02", "about 1", "below 0.98", "below 0.8"]}


def token_texts(tokenizer, tokens) -> list:
    """Each token as one line of printable text: a line end is \\n, a part of a character its bytes, like \\xe4\\xbd."""
    texts = [tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace") for token in tokens]
    return ["".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) for text in texts]


@torch.no_grad()
def logprobs_of(model, tokens, device) -> list:
    """log p of each token given those before it, as a list of numbers; None for the first, which nothing predicts."""
    tokens = torch.tensor([tokens], device=device)  # (1, T)
    with runtime.autocast(device):
        logprobs = head_logprobs(model.hidden(tokens), model.lm_head.weight, tokens)  # (1, T - 1)
    return [None, *logprobs[0].tolist()]


def show_tokens(texts: list, values: list, kind: str, colour: bool) -> str:
    """The tokens in a row, a new line after each line end; above them what the numbers or the colours mean.

    texts: as from token_texts.  values: a number for each token, or None.  kind: one of SCALES.
    """
    title, scale = SCALES[kind]
    if colour:
        title += ": " + ", ".join(paint(name, code) for name, (_, code) in zip(NAMES[kind], scale))
    shown = []
    for text, value in zip(texts, values):
        if value is None:
            shown.append(text)
        elif colour:
            shown.append(paint(text, next(code for least, code in scale if value >= least)))
        else:
            shown.append(f"{text}{{{value:d}}}" if kind == "mask" else f"{text}{{{value:.2f}}}")
        if text.endswith("\\n"):
            shown.append("\n")
    return f"{title}\n{''.join(shown).rstrip()}\n"


def paint(text: str, code: str) -> str:
    """The text in a colour of the terminal (ANSI, SGR)."""
    return f"\033[{code}m{text}\033[0m"


# What --show_every keeps of a rollout: an answer a line, with the numbers that its tokens were trained with.

def save_rollout(folder, step: int, tokenizer, minibatches: list, most: int = 8):
    """Write FOLDER/rollout.jsonl: up to `most` answers of the last micro-batch that this process trained on.

    The ratios are those of the last pass over the rollout (its MicroBatch keeps them): what the clip saw there.
    """
    micro_batches = [batch for minibatch in minibatches for batch in minibatch.micro_batches]
    if runtime.rank() > 0 or not micro_batches:
        return
    batch = micro_batches[-1]
    ratios = (batch.logprobs - batch.old_logprobs).exp()  # (b, t - 1)
    advantages = batch.advantages[:, None].expand_as(ratios) if batch.advantages.dim() == 1 else batch.advantages
    with atomic_write(Path(folder) / "rollout.jsonl") as file:
        for row in range(0, len(ratios), -(-len(ratios) // most)):
            length = int(batch.last[row]) + 2
            record = {"step": step + 1, "reward": batch.scores[row].item(),
                      "tokens": token_texts(tokenizer, batch.tokens[row, :length].tolist())}
            for name, values in (("advantages", advantages), ("ratios", ratios)):
                pairs = zip(values[row].tolist(), batch.mask[row, :length - 1].tolist())
                record[name] = [None, *(round(value, 4) if sampled else None for value, sampled in pairs)]
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def check_rollout(record: dict, where: str):
    """Raise UserError unless record is a line of rollout.jsonl."""
    def is_number(value):
        return type(value) is float and value == value or type(value) is int and abs(value) < 2**53

    texts = record.get("tokens")
    fits = isinstance(texts, list) and all(isinstance(text, str) and text.isprintable() for text in texts)
    for name in ("advantages", "ratios"):
        values = record.get(name)
        fits = fits and isinstance(values, list) and len(values) == len(texts) and all(
            value is None or is_number(value) for value in values)
    if not fits or not is_number(record.get("reward")) or not is_number(record.get("step", 0)):
        raise UserError(f'{where}: not a line of rollout.jsonl, which --show_every writes: "reward", and for each of '
                        'its "tokens" one of "advantages" and "ratios"')


def show_rollout(record: dict, colour: bool) -> str:
    """A line of rollout.jsonl, twice: by advantage and by ratio. What the model did not write has no number."""
    views = [show_tokens(record["tokens"], record[f"{kind}s"], kind, colour) for kind in ("advantage", "ratio")]
    return f"step {record.get('step', '?')}, reward {record['reward']:.3f}\n" + "\n".join(views)
