"""Pairs of answers, measured: the log-probability of each side, the reference's kept on disk, and how good a ranking is."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch

from minillm import data
from minillm.checkpoint import atomic_write
from minillm.data import PairBatch, PairDataset, PairLoader
from minillm.errors import UserError
from minillm.evaluate import reply_to, score
from minillm.generate import eval_mode
from minillm.losses import head_logprobs
from minillm.runtime import autocast


def check_same_tokenizer(tokenizer, other, where):
    """Raise UserError unless both give the same ids to the same text: log-probabilities of ids are compared."""
    if (tokenizer.ids, tokenizer.added, tokenizer.rank_of) != (other.ids, other.added, other.rank_of):
        raise UserError(f"{where} has another tokenizer than the policy: to both the same tokens must mean the same text")


def answer_logprobs(hidden, head, batch: PairBatch, average: bool = False):
    """log p(answer | prompt) of both sides, (2B,): the sum (or average) over the answer's tokens, its <|im_end|> included.

    hidden (2B, T, D): final hidden states of batch.tokens; head (V, D): the weight of the LM head.
    """
    mask = batch.answer_mask[:, 1:]
    total = head_logprobs(hidden, head, batch.tokens, mask=mask).sum(dim=1)
    return total / mask.sum(dim=1) if average else total


@torch.no_grad()
def score_pairs(score_batch, pairs: PairDataset, batch_size: int, device) -> torch.Tensor:
    """(N, 2) float32 on the CPU: score_batch(batch) -> (2B,) of the chosen and the rejected side of every pair, in order."""
    scores = torch.zeros(len(pairs), 2)
    for batch in PairLoader(pairs, batch_size, seed=0, shuffle=False).epoch_batches(0):
        with autocast(device):
            scores[batch.pairs] = score_batch(batch.to(device)).float().view(2, -1).T.cpu()
    return scores


def pair_logprobs(model, pairs: PairDataset, batch_size: int, device, average: bool = False) -> torch.Tensor:
    """(N, 2): answer_logprobs of every pair under a language model."""
    return score_pairs(lambda b: answer_logprobs(model.hidden(b.tokens), model.lm_head.weight, b, average), pairs, batch_size, device)


def reference_logprobs(model, folder, pairs: PairDataset, batch_size: int, device, average: bool = False) -> torch.Tensor:
    """pair_logprobs of the frozen reference, whose folder is `folder`: computed once, and then read from the cache.

    The key holds the content of the weights and of the config, the pairs and the precision, so it cannot be stale.
    """
    with autocast(device):
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    key = hashlib.sha256(f"{pairs.key} {device.type} {precision} {average}".encode())
    for path in sorted(path for path in Path(folder).iterdir() if path.name == "config.json" or path.suffix == ".safetensors"):
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                key.update(block)
    path = data.CACHE / f"reference-{key.hexdigest()[:20]}.npy"
    try:
        return torch.from_numpy(np.load(path))
    except (OSError, ValueError, EOFError):  # not there, or damaged
        scores = pair_logprobs(model, pairs, batch_size, device, average)
    content = io.BytesIO()
    np.save(content, scores.numpy())
    with atomic_write(path) as file:
        file.write(content.getvalue())
    return scores


def rank_pairs(margins, kinds: list) -> dict:
    """How often and how surely the chosen side wins. margins (N,): score of the chosen side - score of the rejected one.

    preference_accuracy (a tie counts half), accuracy_by_kind (where the data names kinds), margin (mean), and how far the
    stated probability sigmoid(margin) is from what happens: reliability, rows of (confidence, accuracy, pairs) in five
    bins, and their weighted distance, calibration_error (ECE, arXiv 1706.04599, Eq. 3).
    """
    margins = margins.double()
    wins = (margins > 0).double() + 0.5 * (margins == 0).double()
    confidence = torch.sigmoid(margins.abs())
    rows, error = [], 0.0
    for b in range(5):
        inside = ((confidence - 0.5) * 10).long().clamp(max=4) == b
        if inside.any():
            rows.append([round(confidence[inside].mean().item(), 4), round(wins[inside].mean().item(), 4), int(inside.sum())])
            error += (confidence - wins)[inside].sum().abs().item() / len(wins)
    by_kind = {kind: wins[torch.tensor([k == kind for k in kinds])].mean().item() for kind in sorted(set(kinds) - {""})}
    return {"preference_accuracy": wins.mean().item(), "accuracy_by_kind": by_kind, "margin": margins.mean().item(),
            "calibration_error": error, "reliability": rows}


def sample_answers(model, tokenizer, records: list, device) -> dict:
    """score() of two samples per question at temperature 1, where a change of manners shows (greedy replies start near the
    top); and "sampled_varied", the share of questions to which the two differ."""
    with eval_mode(model):
        texts, counts, stopped = reply_to(model, tokenizer, records * 2, device, temperature=1.0)
    scores = score(records * 2, texts, counts, stopped)
    differ = sum(a != b for a, b in zip(texts, texts[len(records):]))
    return {**{f"sampled_{name}": scores[name] for name in ("gold_reward", "accuracy", "reply_tokens", "stopped")},
            "sampled_varied": differ / len(records)}
