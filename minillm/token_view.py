"""A conversation token by token, each with a number: its loss mask, its log-probability, or how that changed.

    python eval.py --tokens                               # which tokens are trained on, and how likely each is
    python eval.py --tokens --compare out/sft out/dpo     # what the second model finds likelier, or less likely

On a terminal the number is a colour. Elsewhere it stands behind the token: 4{-0.69} has log p = -0.69, so p = 0.5.
"""

import math

import torch

from minillm import runtime
from minillm.logprobs import head_logprobs

GREY, GREEN, YELLOW, MAGENTA, RED, BOLD_GREEN, BOLD_RED = "2", "32", "33", "35", "31", "1;32", "1;31"
# Of each kind of number: what it is, and from which value on a token has which colour.
SCALES = {
    "mask": ("loss mask, 1: trained on", [(1, GREEN), (-math.inf, GREY)]),
    "logprob": ("log-probability given the tokens before it, in nats",
                [(math.log(0.5), GREEN), (math.log(0.1), YELLOW), (math.log(0.01), MAGENTA), (-math.inf, RED)]),
    "change": ("change of the log-probability, in nats",
               [(1, BOLD_GREEN), (0.1, GREEN), (-0.1, GREY), (-1, RED), (-math.inf, BOLD_RED)])}
NAMES = {"mask": ["trained on", "not"], "logprob": ["p from 0.5", "from 0.1", "from 0.01", "below"],
         "change": ["up by 1 or more", "by 0.1", "as before", "down by 0.1", "by more than 1"]}


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

    texts: as from token_texts.  values: a number for each token, or None.  kind: "mask", "logprob" or "change".
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
