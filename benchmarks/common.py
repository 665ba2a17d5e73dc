"""What the benchmarks share: the machine and its ceilings, what a model has to compute, timing side by side, peak memory, tables."""

import contextlib
import gc
import importlib
import json
import platform
import re
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from minillm import runtime
from minillm.checkpoint import config_to_json
from minillm.metrics import table, write_json
from minillm.model import PRESETS, ModelConfig, preset_config

# Qwen3-0.6B and Qwen3-1.7B; a model of the same shape with random weights costs the same.
QWEN3 = {"qwen3-0.6b": (1024, 3072), "qwen3-1.7b": (2048, 6144)}  # width, MLP


def config_of(shape: str, vocab_size: int, context: int) -> ModelConfig:
    """A preset or a key of QWEN3, with this vocabulary and context."""
    if shape in PRESETS:
        return replace(preset_config(shape, vocab_size), max_position_embeddings=context)
    hidden, mlp = QWEN3[shape]
    return ModelConfig(vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                       head_dim=128, intermediate_size=mlp, max_position_embeddings=context, rope_theta=1e6)


def size_of(sizes: dict, cfg, device) -> dict:
    """The sizes for this machine, or the quick ones; flags of the same names that are given go before."""
    size = sizes["quick" if cfg.quick else "cuda" if device.type == "cuda" else "cpu"]
    return size | {name: getattr(cfg, name) for name in size if getattr(cfg, name, 0)}


def compute_dtype(device) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on."""
    with runtime.autocast(device):
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def machine(device) -> str:
    """One line: CPU or GPU, threads, torch, precision."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")  # on Linux the only place that knows
        found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.exists() else None
        name = found[1] if found else platform.processor() or platform.machine()
    dtype = str(compute_dtype(device)).removeprefix("torch.")
    return f"{name} ({device.type}), {torch.get_num_threads()} CPU threads, torch {torch.__version__}, {dtype}"


def seconds(run, device) -> float:
    """Seconds that run() takes, the work that it leaves to the device included."""
    wait = getattr(torch, device.type).synchronize
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def side_by_side(runs: dict, device, repeats: int) -> dict:
    """{name: median seconds} of functions that take turns (A B A B ...): what slows the machine down for a while slows down all."""
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def ceilings(device, quick: bool) -> dict:
    """The most that this machine was seen to do just now: {"flops": in matrix products a second, "bytes": copied a second}.

    The best of several square products in the precision of training; of a large copy, what is read and what is written counts.
    """
    on_gpu, dtype = device.type != "cpu", compute_dtype(device)
    sizes, n_bytes = ((256,), 2**23) if quick else ((4096, 8192, 16384), 2**30) if on_gpu else ((512, 1024, 2048), 2**28)
    fastest = lambda run: min(seconds(run, device) for _ in range(5 + 1))  # the first is the warm-up
    flops = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        flops = max(flops, 2 * n**3 / fastest(lambda: a @ b))
    source, target = (torch.ones(n_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return {"flops": flops, "bytes": 2 * n_bytes / fastest(lambda: target.copy_(source))}


def forward_flops(config: ModelConfig, lengths, n_logits: int) -> float:
    """Floating-point operations that a forward pass over sequences of these lengths needs, with the logits of n_logits tokens.

    Two for each weight of a layer and token; 4 x heads x head_dim for each pair of a token and one that it looks at; no padding.
    """
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = config.hidden_size * (2 * d * (H + K) + 3 * config.intermediate_size)
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    return config.num_hidden_layers * (2 * layer * tokens + 4 * H * d * pairs) + 2 * config.hidden_size * config.vocab_size * n_logits


def decode_bytes(model, batch: int, length: float, dtype) -> float:
    """What a decoding step reads at least: every weight but an embedding table of its own once, and the cache of `length` positions."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    return dtype.itemsize * (weights + 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * batch * length)


def peak_memory_mb(run, device):
    """MiB that PyTorch held on the device at most while run() ran, beyond what it held before; "out of memory" where it did not fit.

    By the allocator of CUDA; on a CPU by PyTorch's profiler; None on MPS, which counts no peak.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            run()
        except torch.OutOfMemoryError:
            return "out of memory"
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    if device.type != "cpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8", errors="replace"))
    held = [event["args"] for event in trace["traceEvents"] if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    return (max(h["Total Allocated"] for h in held) - (held[0]["Total Allocated"] - held[0]["Bytes"])) / 2**20


def peer(package: str):
    """The package, or None where it is not installed, which is said."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        print(f"{package} is left out: {e}", flush=True)
        return None


@contextlib.contextmanager
def as_it_comes():
    """PyTorch's own choice among its attention kernels, for the peers: runtime.start takes cuDNN's away."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def transformers_twin(model, transformers):
    """The same model, with the same weights, as transformers has it."""
    twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config.from_dict(config_to_json(model.config)))
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).device)


class Report:
    """Prints the machine and its ceilings, then each table as soon as it is measured; --json keeps them all."""

    def __init__(self, device, quick: bool, path: str):
        self.path, self.ceilings = path, ceilings(device, quick)
        self.results = {"machine": machine(device), "ceilings": self.ceilings}
        print(self.results["machine"])
        speeds = f"matrix products {self.ceilings['flops'] / 1e12:.3g} TFLOP/s, copy {self.ceilings['bytes'] / 1e9:.3g} GB/s"
        print(f"ceilings measured now: {speeds}", flush=True)

    def add(self, title: str, rows: list):
        """Rows are dicts with the same keys, the columns; None is shown as -."""
        text = lambda x: "-" if x is None else x if isinstance(x, str) else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
        print(f"\n{title}\n\n{table([list(rows[0]), *([text(x) for x in row.values()] for row in rows)])}", flush=True)
        self.results[title] = rows
        if self.path:
            write_json(self.path, self.results)
