"""Where and how a run computes: device, precision, threads, seeds, compilation, several processes.

    python -m minillm.runtime       # what this machine is, and what is chosen on it: for a bug report

What is fast is decided by what the hardware can do, never by a timing, so a resumed run computes the same. What cannot
run falls back with one line. Such lines go to stderr, so stdout holds only what a script was asked for.

One process per GPU with `torchrun --nproc_per_node N train_x.py ...`: every process takes its share of each batch, and
`sum_gradients` adds the gradients up. Because each loss is divided by the tokens of the whole step, over all
processes, a sum (not a mean) is exactly the gradient of the whole batch. What is drawn at random is drawn for the whole
batch, in every process alike, so the result does not depend on the number of processes.
"""

import atexit
import contextlib
import functools
import importlib.util
import os
import platform
import random
import sys
import types

import numpy as np
import torch
import torch.distributed as dist

from minillm import job, logprobs
from minillm.errors import UserError
from minillm.machine import allowed_threads, keep_freed_memory, memory_gib

COMPILED_ABOVE = 16_000_000  # parameters: a smaller model trains for less time than compiling it takes


def pick_device(name: str = "") -> torch.device:
    """The device of that name, or else cuda before mps before cpu. Raises UserError for one that does not work."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(d for d in found if found[d])
    kind = name.split(":")[0]
    if kind not in found or not found[kind]:
        raise UserError(f"--device {name} is not available here; available: {', '.join(d for d in found if found[d])}")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        device = torch.device(name)
        if device.type == "cuda":
            _run_a_kernel(device)
    except RuntimeError as error:
        if "no kernel image is available" in str(error):
            raise UserError(f"PyTorch {torch.__version__} has no code for {torch.cuda.get_device_name(device)}; older "
                            "GPUs need the build for CUDA 12.6 (pip install torch --index-url "
                            "https://download.pytorch.org/whl/cu126), the newest a newer PyTorch; "
                            "or give --device cpu") from None
        raise UserError(f"--device {name} does not work: {in_one_line(error)}; --device cpu does") from None
    return device


def _run_a_kernel(device: torch.device):
    (torch.ones(1, device=device) + 1).item()  # PyTorch may see a GPU that it has no kernels for


def in_one_line(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.endswith(":")]  # "backend='inductor' raised:" says nothing
    return said[0][:200] if said else type(error).__name__


def start(device_name: str, seed: int) -> torch.device:
    """Choose device and threads, seed every random generator and, under torchrun, join the other processes."""
    device = pick_device(device_name)
    keep_freed_memory()
    if torch.get_num_threads() > allowed_threads():  # otherwise left alone: any set_num_threads also reconfigures MKL
        torch.set_num_threads(allowed_threads())
    # torch.compile reads this when it is first used; by itself it does not know of control groups
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, allowed_threads())))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 autocast does not reach
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and most batches have a new one
    if {"WORLD_SIZE", "RANK"} <= os.environ.keys() and not has_joined():
        if not dist.is_available():
            raise UserError("RANK and WORLD_SIZE are set, as torchrun does, but this PyTorch was built without "
                            "torch.distributed; for a process alone unset them")
        if job.has_several():
            job.watch()
        # Counts and objects are summed and gathered on the CPU, gradients where they are. Windows has no NCCL.
        nccl = device.type == "cuda" and dist.is_nccl_available()
        hook = sys.excepthook  # PyTorch puts another in its place, which holds back what is printed until it returns
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=job.PATIENCE)
        except ValueError as error:
            raise UserError(f"RANK and WORLD_SIZE are set, as torchrun does, but {in_one_line(error)}; for a process "
                            "alone unset them") from None
        finally:
            sys.excepthook = hook
        atexit.register(_leave)
    say(describe(device), file=sys.stderr)
    return device


def _leave():
    job.leave()
    if has_joined():
        dist.destroy_process_group()


def describe(device: torch.device) -> str:
    """What was chosen, in one line, such as "cpu, 2 threads, bfloat16"."""
    parts, threads = [device.type], torch.get_num_threads()
    if device.type == "cuda":
        parts = [f"cuda ({torch.cuda.get_device_name(device)})"]
    elif device.type == "cpu":
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    dtype = str(precision(device)).removeprefix("torch.")
    parts.append(f"{dtype} (no bf16 instructions)" if dtype == "float32" and device.type != "mps" else dtype)
    if world_size() > 1:
        parts.append(f"{world_size()} processes")
    return ", ".join(parts)


def has_joined() -> bool:
    """Whether this process trains together with others. (Some builds of PyTorch have no torch.distributed.)"""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process among those that train together; the first is 0."""
    return dist.get_rank() if has_joined() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if has_joined() else 1


def say(*args, file=None):
    """print, by the first process only."""
    if rank() == 0:
        print(*args, flush=True, file=file)


def generator(device, *numbers: int) -> torch.Generator:
    """A random generator that the numbers (seed, step) decide: the same after a resume and in every process."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) % 2**63)


def in_lockstep(model) -> bool:
    """Whether the processes must call this model together, since each holds only a part of it (shard.py)."""
    return hasattr(model, "reshard")


def share(items: list) -> list:
    """This process's part of these items: every world_size()-th one, so sorted items give parts of like sizes."""
    return items[rank()::world_size()]


def sum_over_processes(value: float) -> float:
    """The sum of a number over all processes."""
    return sums_over_processes([value])[0]


def sums_over_processes(values: list) -> list:
    """The sum of each of these numbers over all processes, in one message."""
    if world_size() == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64)  # on the CPU: no wait for the GPU
    dist.all_reduce(totals)
    return totals.tolist()


def sum_tensor_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sums of a tensor's elements over all processes, in the same tensor."""
    if world_size() > 1 and values.device.type == "mps":  # no backend takes tensors from there
        whole = values.cpu()
        dist.all_reduce(whole)
        values.copy_(whole)
    elif world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value) -> list:
    """A plain value of each process, as a list on all of them."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def sum_gradients(parameters):
    """Sum each gradient over all processes, in one message. What has none in any process stays without one.

    Those of sharded parameters (shard.py) are summed already.
    """
    if world_size() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad and not hasattr(p, "device_mesh")]
    found = sums_over_processes([p.grad is not None for p in parameters]) if parameters else []
    parameters = [p for p, anywhere in zip(parameters, found) if anywhere]
    if not parameters:
        return
    for p in parameters:
        if p.grad is None:  # a process without work of its own in this step adds zeros
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters]
    flat = sum_tensor_over_processes(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bf16. Without them PyTorch emulates it, slower than float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):  # there the question below also means the emulation
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def precision(device: torch.device) -> torch.dtype:
    """The dtype of the matrix products: bfloat16 where the hardware has instructions for it, else float32."""
    native = device.type == "cpu" and cpu_has_bf16()
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if torch.version.hip:  # ROCm always says yes, and some AMD GPUs have no such instructions
            kind = torch.cuda.get_device_properties(device).gcnArchName
            native = not kind.startswith(("gfx8", "gfx900", "gfx902", "gfx906", "gfx10"))
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device):
    """bf16 for the matrix products where the hardware has it, float32 for the rest; weights stay float32."""
    if precision(device) == torch.bfloat16:
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def hold_in_bf16(model, device=None):
    """Hold the matrices of a frozen model's layers in bf16 where the device (default: the model's) computes in it.

    Autocast rounds them to that anyway, so nothing that is computed changes, and they take half the memory.
    Embeddings, norms and heads stay float32, and so does what a LoRA adds later. Returns the model.
    """
    if precision(device or next(model.parameters()).device) == torch.bfloat16:
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.to(torch.bfloat16)
    return model


def dtype_to_hold(bf16: bool, device) -> torch.dtype:
    """bfloat16 for a frozen base that is to take half the memory (--bf16), which may cost time; else float32."""
    if bf16 and precision(device) != torch.bfloat16:
        say("--bf16: saves memory, but without bf16 instructions a step takes several times as long", file=sys.stderr)
    return torch.bfloat16 if bf16 else torch.float32


@functools.cache
def why_not_compiled(device: torch.device, announced: str = "") -> str:
    """Why torch.compile is not used there, or "". `announced` is said before the trial, once, which takes seconds."""
    if device.type not in ("cuda", "cpu"):
        return "only on CUDA and on CPUs"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 0):
            return f"compute capability {major}.{minor} is below 8.0"
        if importlib.util.find_spec("triton") is None:  # as in PyTorch for Windows
            return "Triton is not installed"
    if announced:
        say(announced, file=sys.stderr)
    try:
        _compile_something(device)
    except Exception as error:  # no C compiler, no Python headers, a driver that does not fit: there are many
        return f"torch.compile fails: {in_one_line(error)}"
    return ""


def _compile_something(device: torch.device):
    @torch.compile
    def double(x):
        return 2 * x

    double(torch.ones(8, device=device)).sum().item()


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works there. Says, once, that it begins, or why it does not."""
    reason = why_not_compiled(device, announced="compiling, about a minute, once")
    if reason:
        say(f"not compiled, so training takes longer: {reason}", file=sys.stderr)
    return not reason


def wants_compile(model, asked) -> bool:
    """Whether to compile this model. asked: True (--compile), False (--no-compile), or None: a large one, on CUDA."""
    device = next(model.parameters()).device
    if asked is None:
        asked = device.type == "cuda" and sum(p.numel() for p in model.parameters()) > COMPILED_ABOVE
    return asked and can_compile(device)


def compile_layers(model, dynamic=None):
    """Compile the layers of a model's backbone, in place, for training: one program, which all layers share, so that
    compiling takes as long for 28 layers as for one. And, on a GPU, the softmax of the head (logprobs.py)."""
    model.model.run_layer = torch.compile(model.model.run_layer, dynamic=dynamic)
    logprobs.compiled = True


def compile_backbone(model, asked):
    """If wanted and possible, compile the layers: one program, for training batches of all shapes.

    A batch of 0 or 1 rows would need another one: where larger ones have been seen, it gets rows of padding.
    """
    if not wants_compile(model, asked):
        return
    compile_layers(model, dynamic=True)
    most = 0

    def forward(backbone, tokens, *others):
        nonlocal most
        plain = functools.partial(type(backbone).forward, backbone)
        rows = len(tokens)
        if torch.is_grad_enabled():
            most = max(most, rows)
            if rows < min(most, 2) and not any(x is not None for x in others):
                return plain(torch.nn.functional.pad(tokens, (0, 0, 0, 2 - rows)))[:rows]
        return plain(tokens, *others)

    model.model.forward = types.MethodType(forward, model.model)  # a copy of the model gets one that runs the copy


def main():
    """Print what this machine is and what is chosen on it; whether torch.compile works is tried, for some seconds."""
    os.environ.pop("WORLD_SIZE", None)  # a report waits for no other process
    try:
        device = start("", seed=0)
        chosen = describe(device)
    except UserError as error:
        device = start("cpu", seed=0)
        chosen = f"{describe(device)} ({error})"
    attention, uncompiled = "scaled_dot_product_attention", why_not_compiled(device)
    compiled = "with --compile"
    free, total = memory_gib(device)
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        compiled = f"models above {COMPILED_ABOVE // 10**6} million parameters, and others with --compile"
        if not uncompiled:
            attention = f"flex attention for packed rows of compiled models, where it compiles; else {attention}"
    elif device.type == "mps":
        attention += ", explicit for up to 8 queries"
    elif cpu_has_bf16():
        attention = f"explicit for short rows, {attention} for others, one document after the other above 512 tokens"
    else:
        attention += ", one document after the other above 256 tokens"
    rows = {"python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
            "torch": f"{torch.__version__}, "
                     + (f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none'}"),
            "device": chosen, "capability": capability, "precision": str(precision(device)).removeprefix("torch."),
            "compile": f"no: {uncompiled}" if uncompiled else compiled, "attention": attention,
            "threads": f"{torch.get_num_threads()} (cores allowed: {allowed_threads()}, "
                       f"OMP_NUM_THREADS: {os.environ.get('OMP_NUM_THREADS', 'not set')})",
            "memory": f"{free:.1f} of {total:.1f} GiB free" if total else "unknown"}
    print("\n".join(f"{name:<12}{value}" for name, value in rows.items()))  # all at once, or "| head -1" would break it


if __name__ == "__main__":
    main()
