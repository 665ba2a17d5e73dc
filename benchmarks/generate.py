"""What a decoded token costs, compared with recomputing the whole sequence and with transformers.

    python benchmarks/generate.py                             # a GPU: some minutes; a CPU: small sizes, two minutes
    python benchmarks/generate.py --preset base --parts batch --new_tokens 1024
    python benchmarks/generate.py --quick                     # does it run? (seconds; the numbers mean nothing)

Every row continues prompts of random tokens, samples at temperature 1 and never ends early. All rows have the same
weights. Rows of one table with the same batch take turns. The rows:

    minillm                  minillm.generate under autocast, as reinforcement learning calls it, log-probabilities too
    minillm, recompute       no cache: the whole sequence again for each token. Only every 16th token is computed, and
                             its time counts for all 16, which is slightly too low
    transformers             generate of its Qwen3 with a dynamic cache, weights in bf16 where ours run under autocast
    transformers, static     (CUDA) the same with cache_implementation="static", which it compiles

and the columns:

    prefill ms               the prompts and one token
    ms a step                each further token, of all rows of the batch
    tokens/s                 new tokens, by the time of the whole call
    time x                   a step, relative to minillm's
    floor ms, x floor        floor: the weights and a cache of mean length, read once a step at the speed of the fastest
                             copy of this run; and a step, relative to that
    % matmul                 what the new tokens need, as a share of the fastest matrix products of this run
    peak MiB                 the most that PyTorch held beyond the weights: cache, activations (and, of ours, a copy of
                             the weights in bf16)

The tables change one thing at a time: the batch, the length of the prompt (at batch 8 or less), the vocabulary, the
model.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import (QWEN3, Report, as_it_comes, compute_dtype, config_of, decode_bytes, forward_flops,
                               peak_memory_mb, peer, side_by_side, size_of, transformers_twin)
from minillm import runtime
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.generate import eval_mode, generate, sample
from minillm.model import PRESETS, CausalLM

PARTS = ["batch", "context", "vocabulary", "model"]
SIZES = {
    "cuda": dict(preset="small", vocab_size=6400, batch_size=64, prompt=64, new_tokens=256, repeats=5,
                 batch=(1, 8, 64, 256, 1024, 2048), context=(512, 2048, 8192, 32256),
                 vocabulary=(6400, 32000, 151936), model=("mini", "small", "base", "qwen3-0.6b")),
    "cpu": dict(preset="tiny", vocab_size=3072, batch_size=8, prompt=64, new_tokens=256, repeats=2,
                batch=(1, 8, 64), context=(64, 512, 2048), vocabulary=(3072, 8192, 32768), model=("tiny", "mini")),
    "quick": dict(preset="tiny", vocab_size=300, batch_size=2, prompt=8, new_tokens=4, repeats=1,
                  batch=(1, 2), context=(16,), vocabulary=(600,), model=("tiny",)),
}
COLUMNS = ["prefill ms", "ms a step", "tokens/s", "time x", "x floor", "floor ms", "% matmul", "peak MiB"]
EVERY = 16  # "recompute" computes one of this many tokens


@dataclass
class Config:
    parts: list[str] = flag(PARTS, f"tables to make, of {', '.join(PARTS)}")
    preset: str = flag("", "architecture (default: small, on a CPU tiny)", choices=["", *PRESETS, *QWEN3])
    vocab_size: int = flag(0, "tokens of the vocabulary (default: 6400, on a CPU 3072)", low=0)
    batch_size: int = flag(0, "prompts, except in the table of batches (default: 64, on a CPU 8)", low=0)
    new_tokens: int = flag(0, "tokens after each prompt (default: 256)", low=0)
    repeats: int = flag(0, "turns of each row; their median counts (default: 5, on a CPU 2)", low=0)
    peers: bool = flag(True, "compare with transformers, if it is installed")
    quick: bool = flag(False, "tiny sizes")
    json: str = flag("", "file to write the numbers to")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of weights and tokens", low=0)


@torch.no_grad()
def recompute(model, prompts: list, new_tokens: int, temperature: float = 1.0, every: int = 1, generator=None):
    """The plain twin of generate: tokens (B, P + new_tokens). Each computed token is repeated `every` times."""
    tokens = torch.tensor(prompts, device=next(model.parameters()).device)
    length = tokens.shape[1] + new_tokens
    with eval_mode(model):
        while tokens.shape[1] < length:
            logits = model.lm_head(model.hidden(tokens)[:, -1])
            drawn = sample(logits, temperature, generator=generator)[0]
            tokens = torch.cat([tokens, drawn[:, None].expand(-1, min(every, length - tokens.shape[1]))], dim=1)
    return tokens


def measure(config, cfg, size: dict, report: Report, device, transformers=None, plain: bool = False) -> list:
    """Rows of a table: all ways side by side for one batch of prompts."""
    torch.manual_seed(cfg.seed)
    B, P, new_tokens, dtype = size["batch_size"], size["prompt"], size["new_tokens"], compute_dtype(device)
    model = CausalLM(config).to(device).eval()
    prompts = torch.randint(config.vocab_size, (B, P))
    inputs, prompts = prompts.to(device), prompts.tolist()

    def ours(n):
        with runtime.autocast(device):
            generate(model, prompts, n, end_id=-1)

    def again(n):
        with runtime.autocast(device):
            recompute(model, prompts, n, every=EVERY)

    ways = {"minillm": ours} | ({"minillm, recompute": again} if plain else {})
    if transformers:
        twin = transformers_twin(model, transformers).to(dtype).eval()
        options = dict(attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                       pad_token_id=0)

        def theirs(n, **more):
            with as_it_comes():
                twin.generate(inputs, max_new_tokens=n, **options, **more)

        ways["transformers"] = theirs
        if device.type == "cuda":
            ways["transformers, static"] = functools.partial(theirs, cache_implementation="static")

    runs, found = {}, {name: dict.fromkeys(COLUMNS) for name in ways}

    def prepare(name):
        way = ways[name]
        way(1)
        way(new_tokens)  # compiles the model and captures the graphs
        runs.update({name: lambda: way(new_tokens), f"{name}, prefill": lambda: way(1)})

    if device.type == "cuda":
        torch.compiler.reset()  # the programs of earlier tables count towards a limit
    for name in ways:
        found[name]["peak MiB"] = peak_memory_mb(lambda: prepare(name), device)
    seconds = side_by_side(runs, device, size["repeats"])

    floor = decode_bytes(model, B, P + new_tokens / 2, dtype) / report.ceilings["bytes"]
    flops = B * (forward_flops(config, [P + new_tokens], new_tokens) - forward_flops(config, [P], 0)) / new_tokens
    for name in ways.keys() & runs.keys():
        whole, prefill = seconds[name], seconds[f"{name}, prefill"]
        step = (whole - prefill) / (new_tokens - 1)
        if name == "minillm, recompute":
            step = whole / -(-new_tokens // EVERY)  # the mean of those that were computed
            whole = step * new_tokens
        found[name] |= {"prefill ms": 1e3 * prefill, "ms a step": 1e3 * step, "tokens/s": B * new_tokens / whole,
                        "floor ms": 1e3 * floor, "x floor": step / floor,
                        "% matmul": 100 * flops / step / report.ceilings["flops"]}
    for row in found.values():
        base = found["minillm"]["ms a step"]
        row["time x"] = row["ms a step"] / base if base and row["ms a step"] else None
    return [{"": name, **row} for name, row in found.items()]


def main(cfg: Config) -> dict:
    """Measure and print; returns the numbers."""
    if unknown := [part for part in cfg.parts if part not in PARTS]:
        raise UserError(f"--parts {' '.join(unknown)}: must be of {', '.join(PARTS)}")
    device = runtime.start(cfg.device, cfg.seed)
    size = size_of(SIZES, cfg, device)
    if size["new_tokens"] < 2:
        raise UserError("--new_tokens must be at least 2: the first one belongs to the prefill")
    report = Report(device, cfg.quick, cfg.json)
    transformers = peer("transformers") if cfg.peers else None
    fields = {"batch": "batch_size", "context": "prompt", "vocabulary": "vocab_size", "model": "preset"}
    for part in cfg.parts:
        base = dict(size)
        if part == "context":
            base["batch_size"] = min(size["batch_size"], 8)  # many long prompts fit no memory
        rows = []
        for value in size[part]:
            one = base | {fields[part]: value}
            config = config_of(one["preset"], one["vocab_size"], one["prompt"] + one["new_tokens"])
            measured = measure(config, cfg, one, report, device, transformers, plain=part == "batch")
            rows += [{part: str(value), **row} for row in measured]
        report.add(f"{part}; else {base['preset']}, vocabulary {base['vocab_size']:,}, batch {base['batch_size']}, "
                   f"prompt of {base['prompt']} tokens, {base['new_tokens']} new tokens", rows)
    return report.results


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
