"""What a step of supervised fine-tuning costs, compared with plain ways to do it and with transformers.

    python benchmarks/train.py                                # a GPU: some minutes; a CPU: small sizes, two minutes
    python benchmarks/train.py --preset base --max_seq_len 2048 --batch_size 12
    python benchmarks/train.py --memory                       # what fits (slow on a GPU: each model is compiled anew)
    python benchmarks/train.py --quick                        # does it run? (seconds; the numbers mean nothing)

All rows of a table train on the same conversations, from the same weights, and take turns. The tokens are random; the
lengths are log-normal, with a mean of about 0.37 of a row; 60 % of the tokens are supervised. The rows:

    minillm              train_sft.py's loop: packed rows from the loader, bf16 autocast, AdamW, compiled on CUDA
    minillm, muon        the same with Muon for the hidden matrices, which is train_sft.py's default
    minillm, bare        the same model and optimizer, without clipping, on tensors that are already on the device: the
                         difference to the first row is the cost of the loop, data included
    minillm, eager       (CUDA) the first row without torch.compile
    minillm, plain       one conversation per row, padded to the longest; all logits at once; not compiled
    transformers, ...    its Qwen3 with AdamW on ready tensors: padded as above; packed with a mask; (CUDA) compiled

and the columns:

    tokens/s             useful: of conversations; computed: with padding
    time x               seconds for the same conversations, relative to the first row
    % matmul             what the useful tokens need (3 x common.forward_flops for forward and backward, logits only for
                         supervised tokens), as a share of the fastest matrix products of this run
    % copy               weights, gradients and optimizer state, read and written once a step, as a share of the fastest
                         copy of this run
    peak MiB             the most that PyTorch held: weights, gradients, optimizer, activations
    first loss           before any update: the same in all rows, up to rounding

The other tables change one thing at a time: the context (with as many tokens per step), the batch, the vocabulary, the
model.
"""

import itertools
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import (QWEN3, Report, as_it_comes, config_of, forward_flops, peak_memory_mb, peer,
                               side_by_side, size_of, transformers_twin)
from minillm import runtime
from minillm.attention import document_positions
from minillm.config import flag, parse_config
from minillm.data import Batch, PackedLoader, ahead, pack
from minillm.errors import UserError
from minillm.logprobs import linear_cross_entropy
from minillm.lora import apply_lora
from minillm.losses import sft_loss
from minillm.model import PRESETS, CausalLM, packed_forward
from minillm.optim import make_optimizers

PARTS = ["methods", "context", "batch", "vocabulary", "model"]
COLUMNS = ["useful tokens/s", "computed tokens/s", "ms a step", "time x", "% matmul", "% copy", "peak MiB",
           "first loss"]
SIZES = {  # steps: optimizer steps of a turn
    "cuda": dict(preset="small", vocab_size=6400, max_seq_len=768, batch_size=32, steps=4, repeats=5,
                 context=(512, 2048, 8192, 32768), batch=(8, 32, 128), vocabulary=(6400, 32000, 151936),
                 model=("mini", "small", "base", "qwen3-0.6b"), memory_shapes=(*PRESETS, *QWEN3),
                 memory_lengths=(1024, 4096, 16384)),
    "cpu": dict(preset="tiny", vocab_size=3072, max_seq_len=256, batch_size=8, steps=3, repeats=3,
                context=(128, 512, 2048), batch=(2, 8, 32), vocabulary=(3072, 8192, 32768), model=("tiny", "mini"),
                memory_shapes=(*PRESETS,), memory_lengths=(1024, 4096)),
    "quick": dict(preset="tiny", vocab_size=300, max_seq_len=64, batch_size=2, steps=1, repeats=1, context=(32, 64),
                  batch=(1,), vocabulary=(600,), model=("tiny",), memory_shapes=("tiny",), memory_lengths=(16, 128)),
}


@dataclass
class Config:
    parts: list[str] = flag(PARTS, f"tables to make, of {', '.join(PARTS)}")
    preset: str = flag("", "architecture (default: small, on a CPU tiny)", choices=["", *PRESETS, *QWEN3])
    vocab_size: int = flag(0, "tokens of the vocabulary (default: 6400, on a CPU 3072)", low=0)
    max_seq_len: int = flag(0, "tokens per row (default: 768, on a CPU 256; with --memory several)", low=0)
    batch_size: int = flag(0, "rows per step (default: 32, on a CPU 8)", low=0)
    repeats: int = flag(0, "turns of each row; their median counts (default: 5, on a CPU 3)", low=0)
    peers: bool = flag(True, "compare with transformers, if it is installed")
    memory: bool = flag(False, "measure only the peak memory of full fine-tuning and LoRA, by shape and length")
    shapes: list[str] = flag([], f"shapes for --memory, of {', '.join([*PRESETS, *QWEN3])} (default: all; on a CPU the "
                             "presets)")
    compile: bool = flag(True, "torch.compile (on CUDA)")
    quick: bool = flag(False, "tiny sizes")
    json: str = flag("", "file to write the numbers to")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of weights, lengths and tokens", low=0)


class Chats:
    """Random conversations, as many as fit into `rows` packed rows, so that every epoch has the same number of batches.

    A dataset for PackedLoader, in memory.
    """

    def __init__(self, vocab_size: int, rows: int, row_length: int, seed: int):
        draw = np.random.default_rng(seed)
        # The lengths of real chats are skewed. These have a mean of about 285 in rows of 768, and some fill a row.
        lengths = np.exp(draw.normal(np.log(0.315 * row_length), 0.7, size=8 * rows)).clip(8, row_length).astype(int)
        count = int(np.searchsorted(lengths.cumsum(), rows * row_length, side="right"))
        while len(pack(lengths[:count], row_length)) > rows:
            count -= 1
        self.sequences = [(draw.integers(vocab_size, size=n), np.arange(n) >= 0.4 * n) for n in lengths[:count]]

    def __len__(self):
        return len(self.sequences)

    def __getitem__(self, i):
        return self.sequences[i]

    def lengths(self, indices):
        """The numbers of tokens of these conversations."""
        return np.array([len(self.sequences[i][0]) for i in indices])

    def reopen(self):
        """Nothing to do: no file is mapped."""


def padded(batch: Batch) -> Batch:
    """The same conversations, one per row, padded on the right to the longest. doc_ids mark only the padding."""
    parts = []
    for tokens, loss_mask, doc_ids in zip(batch.tokens, batch.loss_mask, batch.doc_ids):
        for d in range(int(doc_ids.max()) + 1):
            here = doc_ids == d
            parts.append((tokens[here], loss_mask[here], torch.zeros_like(doc_ids[here])))
    columns = zip(zip(*parts), (0, False, -1))  # tokens, loss_mask, doc_ids, each with what pads it
    return Batch.of(*(pad_sequence(rows, batch_first=True, padding_value=pad).numpy() for rows, pad in columns))


# The loss in four ways. forward is the model or its `hidden`, perhaps compiled; n_tokens counts the supervised tokens.

def ours(model, forward, batch, n_tokens):
    with runtime.autocast(batch.tokens.device):
        hidden = forward(batch.tokens, batch.doc_ids, batch.blocks)
    return linear_cross_entropy(hidden, model.lm_head.weight, batch.tokens, batch.loss_mask, n_tokens, batch.targets)


def plain(model, forward, batch, n_tokens):
    with runtime.autocast(batch.tokens.device):
        logits = model(batch.tokens, attention_mask=batch.doc_ids >= 0)
    return sft_loss(logits, batch.tokens, batch.loss_mask, n_tokens)


def theirs(model, forward, batch, n_tokens, mask=None, positions=None):
    mask = batch.doc_ids >= 0 if mask is None else mask
    labels = batch.tokens.masked_fill(~batch.loss_mask, -100)
    with runtime.autocast(batch.tokens.device), as_it_comes():
        return forward(input_ids=batch.tokens, attention_mask=mask, position_ids=positions, labels=labels,
                       use_cache=False).loss


def theirs_packed(model, forward, batch, n_tokens):
    mask = (batch.doc_ids[:, None, :, None] == batch.doc_ids[:, None, None, :]).tril()  # (B, 1, T, T)
    return theirs(model, forward, batch, n_tokens, mask, document_positions(batch.doc_ids))


Way = namedtuple("Way", "loss batches compile muon clip", defaults=(True, False, True))
WAYS = {
    "minillm": Way(ours, "loader"),
    "minillm, muon": Way(ours, "loader", muon=True),
    "minillm, bare": Way(ours, "ready", clip=False),
    "minillm, eager": Way(ours, "loader", compile=False),
    "minillm, plain": Way(plain, "padded", compile=False),
    "transformers, padded": Way(theirs, "padded", compile=False),
    "transformers, packed": Way(theirs_packed, "ready", compile=False),
    "transformers, compiled": Way(theirs_packed, "ready"),
}


def trainer(way: Way, model, compiled: bool):
    """(the function that trains on one batch, its optimizers)"""
    optimizers = make_optimizers(model, lr=1e-4, muon=way.muon)
    device = next(model.parameters()).device
    compiled = compiled and way.compile and device.type == "cuda" and runtime.can_compile(device)
    if way.loss is ours:
        forward = packed_forward(model, compiled)
    else:
        forward = torch.compile(model) if compiled else model

    def step(batch, n_tokens):
        loss = way.loss(model, forward, batch, n_tokens)
        loss.backward()
        if way.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step, optimizers


def measure(names, config, cfg, size: dict, report: Report, device, transformers=None) -> list:
    """These ways side by side, each on all batches of the same conversations: the rows of a table."""
    data = Chats(config.vocab_size, size["batch_size"] * size["steps"], size["max_seq_len"], cfg.seed)
    loader, epochs = PackedLoader(data, size["batch_size"], size["max_seq_len"], cfg.seed), itertools.count()

    def counted(batches):
        for batch in batches:
            yield batch.to(device), batch.n_targets

    ready = list(counted(loader.epoch_batches(0)))
    one_a_row = list(counted(map(padded, loader.epoch_batches(0))))

    def feed(kind):
        if kind == "loader":
            return counted(ahead(loader.epoch_batches(next(epochs))))
        return ready if kind == "ready" else one_a_row

    lengths = data.lengths(range(len(data))).tolist()
    flops = 3 * forward_flops(config, lengths, sum(n for _, n in ready))
    runs, work, found = {}, {}, {name: dict.fromkeys(COLUMNS) for name in names}

    def prepare(name):
        way = WAYS[name]
        torch.manual_seed(cfg.seed)
        model = CausalLM(config).to(device)
        model = transformers_twin(model, transformers) if "transformers" in name else model
        step, optimizers = trainer(way, model, cfg.compile)
        batches = one_a_row if way.batches == "padded" else ready
        found[name]["first loss"] = step(*batches[0]).item()
        # The peak of all: the largest batch, when the optimizer has its state.
        step(*max(batches, key=lambda pair: pair[0].tokens.numel()))
        runs[name] = lambda: torch.stack([step(*batch) for batch in feed(way.batches)]).tolist()
        state = sum(value.nbytes for optimizer in optimizers for values in optimizer.state.values()
                    for value in values.values() if torch.is_tensor(value))
        moved = 2 * (2 * sum(p.nbytes for p in model.parameters()) + state) * len(batches)
        work[name] = sum(batch.tokens.numel() for batch, _ in batches), moved  # of a turn

    if device.type == "cuda":
        torch.compiler.reset()  # the programs of earlier tables count towards a limit
    for name in names:
        found[name]["peak MiB"] = peak_memory_mb(lambda: prepare(name), device)
    seconds = side_by_side(runs, device, size["repeats"])
    for name, turn in seconds.items():
        computed, moved = work[name]
        found[name] |= {
            "useful tokens/s": sum(lengths) / turn, "computed tokens/s": computed / turn,
            "ms a step": 1e3 * turn / len(ready), "time x": turn / seconds.get(names[0], turn),
            "% matmul": 100 * flops / turn / report.ceilings["flops"],
            "% copy": 100 * moved / turn / report.ceilings["bytes"]}
    return [{"": name, **row} for name, row in found.items()]


def memory(shapes, lengths, cfg, device) -> list:
    """Peak MiB of a step on one row of each length."""
    def two_steps(shape, method, length):
        config = config_of(shape, 151936 if shape in QWEN3 else 6400, length)
        torch.set_default_dtype(torch.bfloat16 if "bf16" in method else torch.float32)  # never held in both
        try:
            model = CausalLM(config).to(device)
        finally:
            torch.set_default_dtype(torch.float32)
        if "LoRA" in method:
            model = apply_lora(model, r=8, alpha=16)
        model.model.recompute = "recompute" in method
        step, _ = trainer(WAYS["minillm"], model, cfg.compile)
        tokens = torch.randint(config.vocab_size, (1, length)).numpy()
        batch = Batch.of(tokens, np.arange(length)[None] > 0, np.zeros_like(tokens)).to(device)
        for _ in range(2):  # the optimizer has its state from the second one on
            step(batch, length - 1)

    rows = []
    for shape in shapes:
        for method in ("full", "full, recompute", "LoRA", "LoRA, base in bf16", "LoRA, base in bf16, recompute"):
            rows.append({"shape": shape, "method": method})
            for length in lengths:
                if device.type == "cuda":
                    torch.compiler.reset()
                peak = peak_memory_mb(lambda: two_steps(shape, method, length), device)
                rows[-1][f"{length:,} tokens"] = peak
    return rows


def main(cfg: Config) -> dict:
    """Measure and print; returns the numbers."""
    if unknown := [part for part in cfg.parts if part not in PARTS]:
        raise UserError(f"--parts {' '.join(unknown)}: must be of {', '.join(PARTS)}")
    if unknown := [shape for shape in cfg.shapes if shape not in (*PRESETS, *QWEN3)]:
        raise UserError(f"--shapes {' '.join(unknown)}: must be of {', '.join([*PRESETS, *QWEN3])}")
    device = runtime.start(cfg.device, cfg.seed)
    size = size_of(SIZES, cfg, device)
    report = Report(device, cfg.quick, cfg.json)
    if cfg.memory:
        lengths = (cfg.max_seq_len,) if cfg.max_seq_len else size["memory_lengths"]
        report.add("peak MiB of training, one row", memory(cfg.shapes or size["memory_shapes"], lengths, cfg, device))
        return report.results

    transformers = peer("transformers") if cfg.peers else None
    compiled = cfg.compile and device.type == "cuda" and runtime.can_compile(device)
    names = [name for name in WAYS if compiled or name not in ("minillm, eager", "transformers, compiled")]
    names = [name for name in names if transformers or "transformers" not in name]
    fields = {"methods": "preset", "context": "max_seq_len", "batch": "batch_size", "vocabulary": "vocab_size",
              "model": "preset"}
    for part in cfg.parts:
        rows = []
        for value in [size["preset"]] if part == "methods" else size[part]:
            one = size | {fields[part]: value}
            if part == "context":  # as many tokens per step
                one["batch_size"] = max(1, size["batch_size"] * size["max_seq_len"] // value)
            config = config_of(one["preset"], one["vocab_size"], one["max_seq_len"])
            compared = names if part == "methods" else ["minillm", "minillm, plain"]
            measured = measure(compared, config, cfg, one, report, device, transformers)
            rows += [{"model" if part == "methods" else part: str(value), **row} for row in measured]
        report.add(f"{part}; else {size['preset']}, vocabulary {size['vocab_size']:,}, {size['batch_size']} rows of "
                   f"{size['max_seq_len']} tokens", rows)
    return report.results


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
