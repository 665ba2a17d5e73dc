"""Where and how a run computes: device, precision, seeds, compilation, interruption, several processes.

One process per GPU with `torchrun --nproc_per_node N train_x.py ...`: every process takes its own batches, and
`sum_gradients` adds the gradients up. Because each loss is divided by the tokens of the whole step, over all
processes, a sum (not a mean) is exactly the gradient of the one big batch.
"""

import contextlib
import importlib.util
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
    """The device of that name, or else cuda before mps before cpu. Raises UserError for one that is not available."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(d for d in found if found[d])
    kind = name.split(":")[0]
    if kind not in found or not found[kind]:
        raise UserError(f"--device {name} is not available here; available: {', '.join(d for d in found if found[d])}")
    return torch.device(f"cuda:{local_rank}" if name == "cuda" else name)


def start(device_name: str, seed: int) -> torch.device:
    """Choose the device, seed every random generator and, under torchrun, join the other processes."""
    device = pick_device(device_name)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 autocast does not reach
        if not can_compile(device):
            say("Triton is not installed: nothing is compiled, so training takes longer")
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and most batches have a new one
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


def sum_tensor_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sums of a tensor's elements over all processes."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value) -> list:
    """A plain value of each process, as a list on all of them."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def sum_gradients(parameters):
    """Sum each gradient over all processes, in one message. What has none in any process stays without one."""
    parameters = [p for p in parameters if p.requires_grad]
    if world_size() == 1 or not parameters:
        return
    found = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    parameters = [p for p, anywhere in zip(parameters, sum_tensor_over_processes(found).tolist()) if anywhere]
    if not parameters:
        return
    for p in parameters:
        if p.grad is None:  # a process without work of its own in this step adds zeros
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def autocast(device: torch.device):
    """bf16 for the matrix products where the hardware has it, fp32 for the rest; weights stay fp32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile pays there: on CUDA with Triton, which PyTorch for Windows does not include."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def compile_backbone(model, enabled: bool):
    """If enabled and possible, compile the model's backbone in place, as one program for all shapes."""
    if enabled and can_compile(next(model.parameters()).device):
        model.model.compile(dynamic=True)
        model.compiled = True


class Interrupt:
    """Ctrl-C or SIGTERM asks the training loop to save and stop after the step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal, self.asked_at, self.handlers = 0, None, {}
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self.handlers[name] = signal.signal(name, self._ask)

    def _ask(self, number, frame):
        # torchrun passes on a Ctrl-C that the terminal has sent to every process already: that is no second one.
        if number == signal.SIGINT and self.signal and time.monotonic() - self.asked_at > 1:
            sys.exit(130)
        self.signal, self.asked_at = self.signal or number, self.asked_at or time.monotonic()

    def requested(self) -> int:
        """The number of the signal that any process got, or 0. All call this after the same steps, to stop together."""
        return max(gather(self.signal)) if sum_over_processes(self.signal > 0) else 0

    def close(self):
        """Restore the signals' handlers: from here on Ctrl-C stops at once."""
        for name, handler in self.handlers.items():
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
