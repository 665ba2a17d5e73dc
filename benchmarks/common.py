"""What the benchmarks share: the machine and its limits, what a model has to compute, timing, peak memory, tables."""

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
from minillm.metrics import table
from minillm.model import PRESETS, ModelConfig, preset_config
from minillm.safetensors import save_json

# Qwen3-0.6B and Qwen3-1.7B. A model of the same shape with random weights costs the same.
QWEN3 = {"qwen3-0.6b": (1024, 3072), "qwen3-1.7b": (2048, 6144)}  # width, MLP


def config_of(shape: str, vocab_size: int, context: int) -> ModelConfig:
    """A preset or a key of QWEN3, with this vocabulary and context."""
    if shape in PRESETS:
        return replace(preset_config(shape, vocab_size), max_position_embeddings=context)
    hidden, mlp = QWEN3[shape]
    return ModelConfig(vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=28, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=128, intermediate_size=mlp, max_position_embeddings=context,
                       rope_theta=1e6)


def size_of(sizes: dict, cfg, device) -> dict:
    """The sizes for this machine, or the quick ones. A flag of the same name overrides them."""
    size = sizes["quick" if cfg.quick else "cuda" if device.type == "cuda" else "cpu"]
    return size | {name: getattr(cfg, name) for name in size if getattr(cfg, name, 0)}


def compute_dtype(device) -> torch.dtype:
    """The dtype of matrix products: autocast's, where it is on."""
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
    """Seconds that run() takes, including the work that it leaves to the device."""
    wait = getattr(torch, device.type).synchronize
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def side_by_side(runs: dict, device, repeats: int) -> dict:
    """{name: median seconds} of functions that take turns (A B A B ...), so that a slow minute is shared by all."""
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def ceilings(device, quick: bool) -> dict:
    """What this machine can do just now: {"flops": in matrix products a second, "bytes": of a copy a second}.

    flops: the best of several square products in the precision of training. bytes: what a large copy reads and writes.
    """
    sizes, n_bytes = ((512, 1024, 2048), 2**28) if device.type == "cpu" else ((4096, 8192, 16384), 2**30)
    if quick:
        sizes, n_bytes = (256,), 2**23
    dtype = compute_dtype(device)

    def fastest(run):
        return min(seconds(run, device) for _ in range(1 + 5))  # the first is the warm-up

    flops = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        flops = max(flops, 2 * n**3 / fastest(lambda: a @ b))
    source, target = (torch.ones(n_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return {"flops": flops, "bytes": 2 * n_bytes / fastest(lambda: target.copy_(source))}


def forward_flops(config: ModelConfig, lengths, n_logits: int) -> float:
    """Floating-point operations of a forward pass over sequences of these lengths, with the logits of n_logits tokens.

    Each token costs two operations per weight of a layer. Each pair of a token and one that it attends to costs
    4 x heads x head_dim. Padding is not counted.
    """
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = config.hidden_size * (2 * d * (H + K) + 3 * config.intermediate_size)
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    layers = config.num_hidden_layers * (2 * layer * tokens + 4 * H * d * pairs)
    return layers + 2 * config.hidden_size * config.vocab_size * n_logits


def decode_bytes(model, batch: int, length: float, dtype) -> float:
    """The least that a decoding step has to read: every weight once, and a cache of `length` positions.

    An embedding table that is not tied to the head is not counted: of it only a few rows are read.
    """
    c = model.config
    weights = sum(p.numel() for p in model.parameters())
    if not c.tie_word_embeddings:
        weights -= c.vocab_size * c.hidden_size
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * batch * length
    return dtype.itemsize * (weights + cache)


def peak_memory_mb(run, device):
    """Peak MiB that PyTorch held on the device during run(), beyond what it held before.

    Measured by CUDA's allocator, or on a CPU by PyTorch's profiler. "out of memory" if it did not fit; None on MPS,
    which keeps no peak.
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
    held = [event["args"] for event in trace["traceEvents"]
            if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    return (max(h["Total Allocated"] for h in held) - (held[0]["Total Allocated"] - held[0]["Bytes"])) / 2**20


def peer(package: str):
    """The package, or None (and a line that says so) if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        print(f"{package} is left out: {error}", flush=True)
        return None


@contextlib.contextmanager
def as_it_comes():
    """For the peers: PyTorch's own choice of attention kernels. runtime.start has switched off cuDNN's."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def transformers_twin(model, transformers):
    """The same model with the same weights, built by transformers."""
    twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config.from_dict(config_to_json(model.config)))
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).device)


class Report:
    """Prints the machine and its ceilings, then each table as soon as it is measured; --json writes them all."""

    def __init__(self, device, quick: bool, path: str):
        self.path, self.ceilings = path, ceilings(device, quick)
        self.results = {"machine": machine(device), "ceilings": self.ceilings}
        print(self.results["machine"])
        flops, copied = self.ceilings["flops"] / 1e12, self.ceilings["bytes"] / 1e9
        print(f"ceilings measured now: matrix products {flops:.3g} TFLOP/s, copy {copied:.3g} GB/s", flush=True)

    def add(self, title: str, rows: list):
        """Rows are dicts with the same keys, the columns. None is shown as -."""
        cells = [[self.text(value) for value in row.values()] for row in rows]
        print(f"\n{title}\n\n{table([list(rows[0]), *cells])}", flush=True)
        self.results[title] = rows
        if self.path:
            save_json(self.path, self.results)

    @staticmethod
    def text(value) -> str:
        """A cell of a table: three digits, or all that stand before the point."""
        if isinstance(value, str):
            return value
        if value is None:
            return "-"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
