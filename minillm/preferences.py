"""Pairs of answers to one prompt: encoded, held out, batched, scored and ranked.

In the token cache a pair is two sequences, first the chosen one, then the rejected one. Both begin with the same prompt
tokens. The mask is True on the answer and on the <|im_end|> that closes it.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from minillm.chat import split_think, thought_and_said
from minillm.data import Loader, hold_out, say_overlap, to_device
from minillm.errors import UserError
from minillm.logprobs import head_logprobs
from minillm.records import read_pair
from minillm.runtime import autocast, say, sum_tensor_over_processes, world_size
from minillm.token_cache import TokenDataset, load_dataset
from minillm.tokenizer import Tokenizer


# From a file to batches.

def check_margin(margin, where: str):
    """Raise UserError unless the margin of a pair is a number of sensible size."""
    if type(margin) not in (int, float) or not abs(margin) < 1e6:  # NaN fails here too
        raise UserError(f'{where}: "margin" must be a number below a million, not {margin!r:.80}')


def encode_pair(record: dict, where: str, tokenizer: Tokenizer, max_seq_len: int, stats: Counter) -> list:
    """A pair (see read_pair) -> [(tokens, mask, [kind, margin]) of the chosen, (tokens, mask) of the rejected side].

    Both sides begin with the tokens of the prompt. A side that is too long loses the end of its answer, never a part of
    its prompt. Where no answer has think text, an empty think block belongs to the prompt, in formats that have one. A
    pair that cannot teach anything becomes [] and is counted.
    """
    def drop(reason):
        stats[reason] += 1
        return []

    def said(messages):
        return [[m.get(key) for key in ("role", "content", "reasoning_content", "tool_calls")] for m in messages]

    sides = read_pair(record, where)
    kind, margin = record.get("kind"), record.get("margin")  # null is as if the key were not there
    margin = 0 if margin is None else margin
    check_margin(margin, where)
    prompts, answers = [side[:-1] for side in sides], [side[-1] for side in sides]
    if not answers[0]["role"] == answers[1]["role"] == "assistant":
        return drop("pairs without an assistant's answer at the end, dropped")
    if said(prompts[0]) != said(prompts[1]):
        return drop("pairs with different prompts, dropped")
    if not all(thought_and_said(tokenizer.chat_format, answer)[1].strip() or answer.get("tool_calls")
               for answer in answers):
        return drop("pairs with an empty answer, dropped")
    thinking = any(split_think(answer)[0] for answer in answers)
    prompt, _ = tokenizer.render(prompts[0], add_generation_prompt=True, thinking=thinking)
    if len(prompt) >= max_seq_len:
        return drop("pairs whose prompt leaves no room for an answer, dropped")
    chosen, rejected = (tokenizer.render(side, thinking=thinking)[0] for side in sides)
    for tokens in (chosen, rejected):
        while tokens[-1] != tokenizer.end_id:  # a score is read at the end of the turn
            tokens.pop()
    if chosen[:max_seq_len] == rejected[:max_seq_len]:  # perhaps only once they are cut
        return drop("pairs with equal answers, dropped")
    if max(len(chosen), len(rejected)) > max_seq_len:
        stats["pairs with an answer cut at --max_seq_len"] += 1
    sides = [(tokens, [False] * len(prompt) + [True] * (len(tokens) - len(prompt)))
             for tokens in (chosen[:max_seq_len], rejected[:max_seq_len])]
    return [(*sides[0], ["" if kind is None else str(kind), float(margin)]), sides[1]]


class PairDataset:
    """The pairs of a TokenDataset with these indices, with the kind and the margin of each."""

    def __init__(self, dataset: TokenDataset, indices):
        self.dataset, self.indices, self.stats = dataset, np.asarray(indices), dataset.stats
        labels = dataset.labels()
        self.kinds = [labels[i][0] for i in self.indices]
        self.margins = np.array([labels[i][1] for i in self.indices], np.float32)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        """((tokens, mask) of the chosen side, (tokens, mask) of the rejected one)."""
        return self.dataset[2 * self.indices[i]], self.dataset[2 * self.indices[i] + 1]

    def lengths(self):
        """(N,): the tokens of the longer side of each pair."""
        return np.maximum(self.dataset.lengths(2 * self.indices), self.dataset.lengths(2 * self.indices + 1))


def load_pairs(paths: list, eval_path: str, tokenizer: Tokenizer, max_seq_len: int, seed: int) -> tuple:
    """(training pairs, held-out pairs). Held out is the file eval_path, or without one 5 % of the pairs (hold_out).

    What a file eval_path shares with the training data is counted and said.
    """
    def load(files):
        dataset = load_dataset(encode_pair, files, tokenizer, max_seq_len)
        hashes = [hash(dataset[i][0].tobytes() + b"|" + dataset[i + 1][0].tobytes()) for i in range(0, len(dataset), 2)]
        return dataset, PairDataset(dataset, np.arange(len(dataset) // 2)), hashes

    if eval_path:  # first, because it is the smaller one and may have a mistake
        _, eval_pairs, eval_hashes = load([eval_path])
    dataset, pairs, hashes = load(paths)
    if eval_path:
        say_overlap(hashes, eval_hashes, eval_path, "pairs")
        return pairs, eval_pairs
    held_out = hold_out(hashes, seed)
    if not len(held_out):
        say("a single pair: it is trained on and evaluated on")
        return pairs, pairs
    say(f"held out for evaluation: {len(held_out):,} of {len(pairs):,} pairs")
    return PairDataset(dataset, np.setdiff1d(pairs.indices, held_out)), PairDataset(dataset, held_out)


@dataclass
class PairBatch:
    """B pairs as 2B rows: first the chosen sides, then the rejected ones, padded on the right.

    tokens (2B, T) int64; answer_mask (2B, T) bool; targets (N,): where answer_mask.flatten() is True, as in Batch;
    lengths (2B,) without padding; margins (B,); pairs (B,): the indices of these pairs in the data set.
    """

    tokens: torch.Tensor
    answer_mask: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    margins: torch.Tensor
    pairs: torch.Tensor

    @property
    def n_pairs(self) -> int:
        """B."""
        return len(self.pairs)

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum())

    @property
    def n_chosen_tokens(self) -> int:
        """Tokens of the chosen answers."""
        return int(self.answer_mask[:self.n_pairs].sum())

    def to(self, device):
        """The same batch on a device."""
        tensors = (self.tokens, self.answer_mask, self.targets, self.lengths, self.margins, self.pairs)
        return PairBatch(*(to_device(tensor, device) for tensor in tensors))


class PairLoader(Loader):
    """Batches of pairs of similar length. Without shuffling, all pairs come sorted by length."""

    def __init__(self, dataset: PairDataset, batch_size: int, seed: int, shuffle: bool = True, shared: bool = True):
        super().__init__(dataset, batch_size, seed, shared)
        self.shuffle = shuffle

    def order(self, epoch: int):
        """Yield the indices of the pairs of an epoch; those of one batch have similar lengths."""
        chance, size = np.random.default_rng([self.seed, epoch]), self.batch_size
        lengths = self.dataset.lengths()
        order = chance.permutation(len(lengths)) if self.shuffle else np.arange(len(lengths))
        # Were everything sorted, each epoch would have the same batches.
        window = 16 * size if self.shuffle else len(lengths)
        windows = [order[i:i + window] for i in range(0, len(order), window)]
        order = np.concatenate([w[np.argsort(lengths[w], kind="stable")] for w in windows])
        batches = [order[i:i + size] for i in range(0, len(order), size)]
        if self.shuffle:  # all but the last, which may be smaller
            batches = [batches[i] for i in chance.permutation(len(batches) - 1)] + batches[-1:]
        for batch in batches:
            yield from batch.tolist()

    def collate(self, pairs: list) -> PairBatch:
        """Indices of pairs -> a PairBatch. No pairs become a batch without rows."""
        sides = [self.dataset[i] for i in pairs]
        sequences = [chosen for chosen, _ in sides] + [rejected for _, rejected in sides]
        lengths = [len(tokens) for tokens, _ in sequences]
        shape = (len(sequences), -(-max(lengths, default=1) // 8) * 8)
        tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for row, (sequence, answer_mask) in enumerate(sequences):
            tokens[row, :len(sequence)] = sequence
            mask[row, :len(sequence)] = answer_mask
        return PairBatch(*map(torch.from_numpy, (tokens, mask, np.flatnonzero(mask))),
                         torch.tensor(lengths, dtype=torch.long), torch.from_numpy(self.dataset.margins[pairs]),
                         torch.tensor(pairs, dtype=torch.long))


# Scores of both sides, and how good the ranking is that follows from them.

def same_tokenizer(tokenizer, other) -> bool:
    """Whether both give the same ids to the same text."""
    return (tokenizer.ids, tokenizer.added, tokenizer.rank_of) == (other.ids, other.added, other.rank_of)


def check_same_tokenizer(tokenizer, other, where):
    """Raise UserError unless both give the same ids to the same text: log-probabilities of ids are compared."""
    if not same_tokenizer(tokenizer, other):
        raise UserError(f"{where} has another tokenizer than the policy; the same ids must mean the same text to both")


def answer_logprobs(hidden, head, batch: PairBatch, average: bool = False):
    """log p(answer | prompt) of both sides, (2B,): the sum (or average) over the answer's tokens and its <|im_end|>.

    hidden (2B, T, D): final hidden states of batch.tokens; head (V, D): the weight of the LM head.
    """
    mask = batch.answer_mask[:, 1:]
    total = head_logprobs(hidden, head, batch.tokens, mask=mask, targets=batch.targets).sum(dim=1)
    return total / mask.sum(dim=1) if average else total


def _collect(score_batch, loader: PairLoader, device) -> torch.Tensor:
    """(N, 2) float32 on the CPU: score_batch(batch), (2B,), of the pairs in the loader's first epoch, all processes."""
    scores = torch.zeros(len(loader.dataset), 2)
    for batch in loader.epoch_batches(0):
        with autocast(device):  # also without pairs: the processes of a sharded model run it together
            found = score_batch(batch.to(device)).detach()
        scores[batch.pairs] = found.float().view(2, batch.n_pairs).T.cpu()  # (2B,) -> (B, 2)
    return sum_tensor_over_processes(scores)


@torch.no_grad()
def score_pairs(score_batch, pairs: PairDataset, batch_size: int, device) -> torch.Tensor:
    """(N, 2) float32 on the CPU: the scores of both sides of each pair. score_batch(batch) gives (2B,).

    The processes share the work: each takes batch_size pairs at a time, and all get all scores.
    """
    loader = PairLoader(pairs, batch_size * world_size(), seed=0, shuffle=False)
    return _collect(score_batch, loader, device)


def pair_logprobs(model, pairs: PairDataset, batch_size: int, device, average: bool = False) -> torch.Tensor:
    """(N, 2): answer_logprobs of every pair under a language model."""
    return score_pairs(_answer_scorer(model, average), pairs, batch_size, device)


def reference_logprobs(model, loader: PairLoader, device, average: bool = False) -> torch.Tensor:
    """(N, 2): answer_logprobs of every pair, to the last bit as the first epoch of training would compute them.

    The batches, and so the padding, are those of that epoch, and gradients stay enabled: without them PyTorch may
    choose kernels that round differently.
    """
    return _collect(_answer_scorer(model, average), loader, device)


def _answer_scorer(model, average: bool):
    return lambda batch: answer_logprobs(model.hidden(batch.tokens), model.lm_head.weight, batch, average)


def rank_pairs(scores, kinds: list) -> dict:
    """How often and how surely the chosen side wins. scores (N, 2): of the chosen and of the rejected side.

    Returns preference_accuracy (a tie counts half), accuracy_by_kind (where the data names kinds), margin (the mean of
    chosen minus rejected), and how well calibrated the probability sigmoid(margin) is: reliability, rows [confidence,
    accuracy, pairs] in five bins, and calibration_error, their weighted distance (ECE, arXiv 1706.04599, Eq. 3).
    sigmoid(margin) is a probability for losses of Bradley-Terry's kind; IPO has another one, and pulls margins to 1/2.
    """
    margins = (scores[:, 0] - scores[:, 1]).double()
    wins = (margins > 0).double() + 0.5 * (margins == 0).double()
    confidence = torch.sigmoid(margins.abs())
    rows, error = [], 0.0
    for b in range(5):
        inside = ((confidence - 0.5) * 10).long().clamp(max=4) == b
        if inside.any():
            rows.append([round(confidence[inside].mean().item(), 4), round(wins[inside].mean().item(), 4),
                         int(inside.sum())])
            error += (confidence - wins)[inside].sum().abs().item() / len(wins)
    by_kind = {kind: wins[torch.tensor([k == kind for k in kinds])].mean().item() for kind in sorted(set(kinds) - {""})}
    return {"preference_accuracy": wins.mean().item(), "accuracy_by_kind": by_kind, "margin": margins.mean().item(),
            "calibration_error": error, "reliability": rows}
