"""Where and how a run computes: device, precision, seeds, compilation, interruption, several processes.

One process per GPU with `torchrun --nproc_per_node N train_x.py ...`: every process takes its own batches, and
`sum_gradients` adds the gradients up. Because each loss is divided by the tokens of the whole step, over all
processes, a sum (not a mean) is exactly the gradient of the one big batch.
"""

import contextlib
import importlib.util
import math
import os
import random
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from minillm.errors import UserError


def pick_device(name: str = "") -> torch.device:
    """The device of that name, or, without one, cuda before mps before cpu. Raises UserError for one that is not here."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(d for d in found if found[d])
    kind = name.split(":")[0]
    if kind not in found or not found[kind]:
        raise UserError(f"--device {name} is not available here; available: {', '.join(d for d in found if found[d])}")
    return torch.device(f"cuda:{local_rank}" if name == "cuda" else name)


def start(device_name: str, seed: int) -> torch.device:
    """Choose the device, seed every random generator, join the other processes when torchrun started us."""
    device = pick_device(device_name)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 autocast does not reach
        if not can_compile(device):
            say("Triton is not installed: nothing is compiled, so training takes longer")
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and here nearly every batch has one of its own
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank() -> int:
    """The number of this process among those that train together; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*args):
    """print, by the first process only."""
    if rank() == 0:
        print(*args, flush=True)


def generator(device, *numbers: int) -> torch.Generator:
    """A random generator that the numbers (seed, step) and this process's rank decide: the same after a resume."""
    seed = np.random.SeedSequence([*numbers, rank()]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) % 2**63)


def sum_over_processes(value: float) -> float:
    """The sum of a number over all processes."""
    if world_size() == 1:
        return value
    total = torch.tensor(float(value), dtype=torch.float64 if dist.get_backend() == "gloo" else torch.float32)
    total = total.cuda() if dist.get_backend() == "nccl" else total
    dist.all_reduce(total)
    return total.item()


def sum_gradients(parameters):
    """Add each gradient up over all processes, in one message."""
    if world_size() == 1:
        return
    for p in (parameters := [p for p in parameters if p.requires_grad]):
        if p.grad is None:  # a process without work of its own in this step adds zeros
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def finite_mean(losses: list, step: int, out: str) -> float:
    """The mean loss of the last len(losses) steps, `step` being the latest: scalars on the device, read at once.

    A loss that is not finite raises UserError with its step: the weights are spoilt, the last checkpoint is not.
    """
    values = torch.stack(losses)
    if world_size() > 1:
        dist.all_reduce(values)
    values = values.tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise UserError(f"the loss became {value} at step {step - len(values) + 1 + i}; stopped, {out} keeps its last checkpoint "
                            "(a lower --lr or --max_grad_norm helps most often)")
    return sum(values) / len(values)


def autocast(device: torch.device):
    """bf16 for the matrix products where the hardware has it, fp32 for the rest; weights stay fp32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile is worth it there: on CUDA, with Triton, which PyTorch for Windows does not bring."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def maybe_compile(model, enabled: bool, device: torch.device, dynamic: bool = False):
    """torch.compile on CUDA when `enabled`; the returned module shares its weights with `model`.

    dynamic: one program for batches of all shapes, where their shapes differ.
    """
    return torch.compile(model, dynamic=dynamic) if enabled and can_compile(device) else model


class Interrupt:
    """Ctrl-C or SIGTERM asks the training loop to save and stop after the step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked_at, self.before = None, {}
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self.before[name] = signal.signal(name, self._ask)

    def _ask(self, number, frame):
        # torchrun passes on a Ctrl-C that the terminal has sent to every process already: that is no second one.
        if number == signal.SIGINT and self.asked_at and time.monotonic() - self.asked_at > 1:
            sys.exit(130)
        self.asked_at = self.asked_at or time.monotonic()

    def requested(self) -> bool:
        """Whether any process was asked. All must call this at the same steps, so that they stop at the same step."""
        return sum_over_processes(self.asked_at is not None) > 0

    def close(self):
        """Give the signals back: from here on Ctrl-C stops at once."""
        for name, handler in self.before.items():
            signal.signal(name, handler or signal.SIG_DFL)  # None: set by something other than Python


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MiB: of the GPU's allocator on CUDA, else of this process (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
