"""Chapter 25. Machines: what is chosen on which hardware, and one line for everything that cannot run there.

After this chapter you know what is chosen on which hardware, and by what.

No machine has all of it. The tests fake what PyTorch and the system say about one (its processor, its GPU, its quota),
and check what follows.
"""

import contextlib
import errno
import os
import platform
import subprocess
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import train_dpo
import train_lora
import train_sft
import minillm.model
from minillm import attention, config, job, logprobs, machine, runtime, shard
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.interrupt import Interrupt
from minillm.model import CausalLM, ModelConfig
from minillm.run import Run
from minillm.training_state import restore_optimizer
from tests.helpers import close, in_processes

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CACHED = (runtime.cpu_has_bf16, runtime.why_not_compiled, runtime.can_compile, attention.can_flex)


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    """Before each test nothing has been asked yet, and nothing that was faked stays."""
    for function in CACHED:
        function.cache_clear()
    Interrupt.ctrl_c = False
    yield
    for function in CACHED:
        function.cache_clear()


def failing(error):
    def fail(*args, **options):
        raise error
    return fail


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability=(9, 0), triton=True): from now on PyTorch says that there is such a GPU."""
    def fake(capability=(9, 0), triton=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        # What torch.cuda.is_bf16_supported looks at. Were it allowed to count emulation, it would try a tensor.
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(
            major=capability[0], minor=capability[1], gcnArchName=""))
        monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2**30, 80 * 2**30))
        monkeypatch.setattr(runtime, "_run_a_kernel", lambda device: None)
        monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: "found" if triton else None)
        # What start() sets for the whole process
        fake.set = []
        monkeypatch.setattr(torch, "set_float32_matmul_precision", fake.set.append)
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", fake.set.append)

    return fake


# Precision

@pytest.mark.parametrize("machine, avx512_bf16, amx, arm_bf16, expected", [
    ("x86_64", True, False, True, torch.bfloat16),   # AMD Zen 4, Intel Cooper Lake
    ("AMD64", False, True, True, torch.bfloat16),    # the name on Windows; AMX alone is enough
    ("x86_64", False, False, True, torch.float32),   # Ice Lake: oneDNN says yes, and emulates
    ("aarch64", False, False, True, torch.bfloat16),  # Graviton 3
    ("aarch64", False, False, False, torch.float32),
])
def test_a_cpu_uses_bf16_only_where_it_has_instructions_for_it(monkeypatch, machine, avx512_bf16, amx, arm_bf16,
                                                               expected):
    """The classic mistake is to ask oneDNN on x86: it says yes to every AVX-512, and emulates bf16 2 to 4 times slower
    than float32."""
    monkeypatch.setattr(runtime.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm_bf16, raising=False)
    assert runtime.precision(CPU) == expected
    with runtime.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    monkeypatch.setattr(runtime.platform, "machine", failing(AssertionError("asked twice")))
    assert runtime.precision(CPU) == expected


def test_without_onednn_there_is_no_bf16(monkeypatch):
    """Such builds (macOS) do not even have the question."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert runtime.precision(CPU) == torch.float32


@pytest.mark.parametrize("capability, expected", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_uses_bf16_only_where_it_is_native(gpu, capability, expected):
    """A T4 (7.5) would emulate it."""
    gpu(capability)
    assert runtime.precision(CUDA) == expected


def test_mps_computes_in_float32():
    assert runtime.precision(torch.device("mps")) == torch.float32


# What is said at the start

@pytest.mark.parametrize("threads, bf16, line", [
    (2, True, "cpu, 2 threads, bfloat16"),
    (1, True, "cpu, 1 thread, bfloat16"),
    (2, False, "cpu, 2 threads, float32 (no bf16 instructions)"),
])
def test_one_line_says_what_was_chosen(monkeypatch, capsys, threads, bf16, line):
    """On stderr: `eval.py --prompt` prints the reply to stdout, and nothing else."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(runtime, "allowed_threads", lambda: threads)
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: bf16)
    assert runtime.start("cpu", 0) == CPU
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", line + "\n")


@pytest.mark.parametrize("capability, line", [
    ((9, 0), "cuda (NVIDIA Fake), bfloat16"), ((7, 5), "cuda (NVIDIA Fake), float32 (no bf16 instructions)")])
def test_the_line_on_a_gpu(gpu, capsys, capability, line):
    gpu(capability)
    assert runtime.start("", 0) == CUDA
    assert capsys.readouterr().err == line + "\n" and gpu.set == ["high", False]


@pytest.mark.parametrize("kind, dtype", [
    ("gfx942:sramecc+:xnack-", torch.bfloat16), ("gfx90a", torch.bfloat16), ("gfx1100", torch.bfloat16),
    ("gfx1032", torch.float32), ("gfx906:sramecc+", torch.float32)])
def test_an_amd_gpu_is_not_asked_for_bf16_that_it_lacks(gpu, monkeypatch, kind, dtype):
    """ROCm says that every GPU has bf16, and a compiled product of it ends the process on those that do not."""
    gpu((10, 3))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(gcnArchName=kind))
    assert runtime.precision(CUDA) == dtype


def test_on_mps_long_products_are_made_of_shorter_ones(monkeypatch):
    """On some of Apple's GPUs a product over 32,767 numbers or more is wrong. The sum of three is as exact as one."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 40_000, dtype=torch.float64), torch.randn(40_000, 5, dtype=torch.float64)
    products = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: products.append(x.shape[1]) or torch.mm(x, y))
    assert torch.allclose(logprobs.product(a, b, "mps"), logprobs.product(a, b, "cpu"), rtol=0, atol=1e-9)
    assert products == [2**14, 2**14, 40_000 - 2**15, 40_000]


def test_tensors_of_mps_are_summed_over_the_processes_on_the_cpu(monkeypatch):
    """No backend of torch.distributed takes them where they are."""
    class OnMps:
        device = torch.device("mps")

        def __init__(self, values):
            self.values = values

        def cpu(self):
            return self.values.clone()

        def copy_(self, values):
            self.values.copy_(values)

    def all_reduce(values):
        assert isinstance(values, torch.Tensor) and values.device == CPU
        values *= 2  # the other process has the same

    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    monkeypatch.setattr(runtime.dist, "all_reduce", all_reduce)
    ours = OnMps(torch.tensor([1.0, 3.0]))
    assert runtime.sum_tensor_over_processes(ours) is ours and ours.values.tolist() == [2.0, 6.0]
    assert runtime.sum_tensor_over_processes(torch.ones(2)).tolist() == [2.0, 2.0]


def test_on_mps_a_model_cannot_be_split(monkeypatch):
    monkeypatch.setattr(shard, "is_on", lambda cfg: True)
    with pytest.raises(UserError, match="--shard: no backend moves tensors between processes on mps; leave it out"):
        shard.shard(None, None, torch.device("mps"))


@pytest.mark.parametrize("platform, given, libuv", [
    ("linux", None, True), ("darwin", None, True), ("win32", None, False), ("win32", "1", True), ("linux", "0", False)])
def test_the_store_of_a_job_is_joined_as_pytorch_joins_it(monkeypatch, platform, given, libuv):
    """The wheels for Windows have no libuv, which is the default of this class but not of init_process_group there."""
    asked = {}
    monkeypatch.setattr(job.dist, "TCPStore", lambda *args, **options: asked.update(options))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("USE_LIBUV", raising=False)
    if given:
        monkeypatch.setenv("USE_LIBUV", given)
    job._store.__wrapped__()
    assert asked["use_libuv"] == libuv


def test_who_never_reached_the_store_ends_no_job(monkeypatch):
    """It knows nothing of its neighbour. Once it has been there, silence counts."""
    ends, reached = [], iter([True] * 4)  # the four questions of a first look
    monkeypatch.setattr(job, "_store", lambda: failing(RuntimeError("no store"))())
    monkeypatch.setattr(job, "end", lambda code: ends.append(code) or job._leaving.set())
    monkeypatch.setattr(job, "_leaving", threading.Event())
    monkeypatch.setattr(job, "BEAT", 0.01)
    monkeypatch.setattr(job, "START", 0.1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    thread = threading.Thread(target=job._watch)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not ends
    job._leaving.set()
    thread.join()

    class Store:
        def __init__(self):
            if not next(reached, False):
                raise RuntimeError("no store")

        def add(self, key, number):
            return number

        def check(self, keys):
            return False

    job._leaving.clear()
    monkeypatch.setattr(job, "_store", Store)
    monkeypatch.setattr(job, "is_first_to_fail", lambda: False)
    job._watch()
    assert ends == [1]


def test_the_line_of_several_processes(monkeypatch):
    monkeypatch.setattr(runtime, "world_size", lambda: 4)
    assert runtime.describe(torch.device("mps")) == "mps, float32, 4 processes"


# Threads

@pytest.mark.parametrize("files, expected", [
    ({}, 8),
    ({"cpu.max": "max 100000"}, 8),
    ({"cpu.max": "200000 100000"}, 2),
    ({"cpu.max": "250000 100000"}, 2),    # 2.5 cores
    ({"cpu.max": "50000 100000"}, 1),     # half a core
    ({"cpu.max": "1600000 100000"}, 8),   # more than there is
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "0"}, 8),
    ({"cpu.max": "what?"}, 8),
    ({"own": "0::/batch/job7", "batch/job7/cpu.max": "300000 100000"}, 3),  # systemd-run -p CPUQuota=300%
    ({"own": "0::/batch/job7", "batch/cpu.max": "200000 100000", "batch/job7/cpu.max": "max 100000"}, 2),  # of a parent
    ({"own": "0::/batch/job7", "batch/cpu.max": "500000 100000", "batch/job7/cpu.max": "400000 100000"}, 4),
    ({"own": "0::/batch/job7", "batch/job8/cpu.max": "100000 100000"}, 8),  # of another job
    ({"own": "9:memory:/m\n4:cpu,cpuacct:/job\n0::/", "cpu/job/cpu.cfs_quota_us": "600000",
      "cpu/job/cpu.cfs_period_us": "100000", "cpu/m/cpu.cfs_quota_us": "100000",
      "cpu/m/cpu.cfs_period_us": "100000"}, 6),
    ({"own": "4:cpuacct,cpu:/job", "cpuacct,cpu/job/cpu.cfs_quota_us": "200000",  # no link with the name "cpu"
      "cpuacct,cpu/job/cpu.cfs_period_us": "100000"}, 2),
    ({"own": "0::/docker/12ab", "cpu.max": "200000 100000"}, 2),  # the name outside of this container
    ({"own": "\nno colon\n4:cpu\n0::/a\xff", "cpu.max": "200000 100000"}, 2),  # lines that say nothing
])
def test_the_quota_of_a_container_or_job_bounds_the_threads(tmp_path, monkeypatch, files, expected):
    """With `docker run --cpus 2` on 64 cores, 64 threads share the time of two and wait for each other."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="latin-1")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert machine.allowed_threads() == expected


def test_without_an_affinity_mask_all_cores_count(tmp_path, monkeypatch):
    """macOS and Windows."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.allowed_threads() == 6


@pytest.mark.parametrize("error", [PermissionError(1, "Operation not permitted"), OSError(38, "not implemented")])
def test_a_sandbox_that_does_not_tell_the_affinity(tmp_path, monkeypatch, error):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", failing(error), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.allowed_threads() == 6


@pytest.mark.parametrize("usual, allowed, expected", [
    (64, 2, [2]),
    (2, 2, []),    # left alone: MKL may divide its work in another way after any call
    (1, 8, []),    # OMP_NUM_THREADS=1
])
def test_threads_are_only_ever_taken_away(monkeypatch, usual, allowed, expected):
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: usual)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(runtime, "allowed_threads", lambda: allowed)
    monkeypatch.setattr(runtime.os, "environ", {})
    runtime.start("cpu", 0)
    assert chosen == expected and os.environ == {"TORCHINDUCTOR_COMPILE_THREADS": str(allowed)}


@pytest.mark.parametrize("bf16, native, dtype, said", [
    (False, False, torch.float32, ""), (True, True, torch.bfloat16, ""),
    (True, False, torch.bfloat16, "--bf16: saves memory")])
def test_bf16_that_is_asked_for_to_save_memory_may_be_slow(monkeypatch, capsys, bf16, native, dtype, said):
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: native)
    assert runtime.dtype_to_hold(bf16, CPU) == dtype
    err = capsys.readouterr().err
    assert err.startswith(said) and bool(err) == bool(said)


FREED_AND_TAKEN_AGAIN = """
import resource, sys, torch
from minillm import runtime
runtime.start("cpu", 0)
for step in range(201):
    torch.zeros(2**22 // 4).add_(1.0)  # 4 MiB: 1,024 pages
    if step == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.slow
def test_freed_memory_is_kept_for_the_next_step():
    """The system clears the pages of a block once, not in each of 200 steps: these would be 204,800 page faults."""
    said = subprocess.run([sys.executable, "-c", FREED_AND_TAKEN_AGAIN], cwd=ROOT, capture_output=True, text=True)
    assert int(said.stdout) < 20_000, said.stderr



# The device

def test_a_gpu_without_kernels_in_this_build_is_told_in_one_line(gpu, monkeypatch):
    """PyTorch for CUDA 12.8 and later sees a GTX 1080, but has no kernels for it."""
    gpu((6, 1))
    error = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nmore\n")
    monkeypatch.setattr(runtime, "_run_a_kernel", failing(error))
    with pytest.raises(UserError, match="has no code for NVIDIA Fake; .*/whl/cu126.*--device cpu") as caught:
        runtime.pick_device()
    assert "\n" not in str(caught.value)
    assert runtime.pick_device("cpu") == CPU


@pytest.mark.parametrize("name, error, message", [
    ("cuda:7", RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range\n"),
     "--device cuda:7 does not work: CUDA error: invalid device ordinal; --device cpu does"),
    ("cuda", torch.OutOfMemoryError("CUDA out of memory."),
     "--device cuda:0 does not work: CUDA out of memory.; --device cpu does"),
    ("cuda:x", None, "--device cuda:x does not work: Invalid device string: 'cuda:x'; --device cpu does"),
])
def test_a_gpu_that_does_not_work_is_named(gpu, monkeypatch, name, error, message):
    gpu()
    if error:
        monkeypatch.setattr(runtime, "_run_a_kernel", failing(error))
    with pytest.raises(UserError) as caught:
        runtime.pick_device(name)
    assert str(caught.value) == message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_works_is_taken():
    assert runtime.pick_device() == torch.device("cuda:0")


# Compilation

class Large:
    """A model of so many parameters, which say that they are on a device, and take no memory."""

    def __init__(self, size, device):
        self.size, self.device = size, device

    def parameters(self):
        yield self

    def numel(self):
        return self.size


@pytest.mark.parametrize("asked, size, expected", [
    (None, 16_000_000, False), (None, 16_000_001, True), (True, 10, True), (False, 10**9, False)])
def test_large_models_are_compiled_and_a_flag_given_by_hand_decides(gpu, monkeypatch, capsys, asked, size, expected):
    """What is not compiled does not say that it is."""
    gpu()
    monkeypatch.setattr(runtime, "_compile_something", lambda device: None)
    assert runtime.wants_compile(Large(size, CUDA), asked) is expected
    assert capsys.readouterr().err == "compiling, about a minute, once\n" * expected


@pytest.mark.parametrize("flags, expected", [([], None), (["--compile"], True), (["--no-compile"], False)])
def test_the_flag_has_three_states(flags, expected):
    assert parse_config(train_sft.Config, "", flags).compile is expected


def test_on_a_cpu_nothing_is_compiled_and_nothing_is_said_unless_asked(monkeypatch, capsys):
    """There it gains about a tenth of a training step. It needs a C++ compiler, which is tried."""
    tried = []
    monkeypatch.setattr(runtime, "_compile_something", tried.append)
    assert not runtime.wants_compile(Large(10**9, CPU), None) and not runtime.wants_compile(Large(10, CPU), False)
    assert capsys.readouterr().err == "" and tried == []
    assert runtime.wants_compile(Large(10, CPU), True)
    assert capsys.readouterr().err == "compiling, about a minute, once\n" and tried == [CPU]
    runtime.why_not_compiled.cache_clear()
    runtime.can_compile.cache_clear()
    monkeypatch.setattr(runtime, "_compile_something", failing(RuntimeError("No working C++ compiler found")))
    assert not runtime.wants_compile(Large(10, CPU), True)
    assert "torch.compile fails: No working C++ compiler found" in capsys.readouterr().err
    assert not runtime.wants_compile(Large(10, torch.device("mps")), True)
    assert "only on CUDA and on CPUs" in capsys.readouterr().err


@pytest.mark.parametrize("machine, reason", [
    (dict(capability=(7, 5)), "compute capability 7.5 is below 8.0"),
    (dict(triton=False), "Triton is not installed"),
])
def test_a_gpu_that_cannot_compile_says_why_once(gpu, monkeypatch, capsys, machine, reason):
    monkeypatch.setattr(runtime, "_compile_something", failing(AssertionError("not tried")))
    gpu(**machine)
    assert not runtime.can_compile(CUDA) and not runtime.can_compile(CUDA)
    assert capsys.readouterr().err == f"not compiled, so training takes longer: {reason}\n"


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("Failed to find C compiler. Please specify via CC\nmore"),
     "Failed to find C compiler. Please specify via CC"),
    (ValueError("backend='inductor' raised:\nOSError: no Python.h\n\nSet TORCHDYNAMO_VERBOSE=1"),
     "OSError: no Python.h"),
    (AssertionError(), "AssertionError"),
])
def test_a_compiler_that_fails_costs_a_line_and_not_the_run(gpu, monkeypatch, capsys, error, reason):
    gpu()
    monkeypatch.setattr(runtime, "_compile_something", failing(error))
    assert not runtime.can_compile(CUDA)
    assert capsys.readouterr().err == ("compiling, about a minute, once\n"
                                       f"not compiled, so training takes longer: torch.compile fails: {reason}\n")


def test_the_long_silence_is_announced_once_and_before_the_trial_which_is_a_part_of_it(gpu, monkeypatch, capsys):
    gpu()
    said = []
    monkeypatch.setattr(runtime, "_compile_something", lambda device: said.append(capsys.readouterr().err))
    assert runtime.can_compile(CUDA) and runtime.can_compile(CUDA)
    assert said == ["compiling, about a minute, once\n"] and capsys.readouterr().err == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_trivial_function_is_really_compiled():
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    runtime._compile_something(runtime.pick_device())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


SHARED = ("No valid triton configs. OutOfMemoryError: out of resource: shared memory, Required: 131074, "
          "Hardware limit: 101376")
ALIKE = "Out Of Resources"  # half of the words, and in other letters
OTHER = "LoweringException: AssertionError"


@pytest.mark.parametrize("failures, works, blocks, line", [
    ([], True, None, ""),
    ([SHARED], True, 32, f"flex attention in smaller blocks: {SHARED}\n"),
    ([ALIKE], True, 32, f"flex attention in smaller blocks: {ALIKE}\n"),
    ([SHARED, SHARED], False, None, f"no flex attention, so long packed rows take longer: {SHARED}\n"),
    ([SHARED, OTHER], False, None, f"no flex attention, so long packed rows take longer: {OTHER}\n"),
    ([OTHER], False, None, f"no flex attention, so long packed rows take longer: {OTHER}\n")])
def test_flex_attention_is_tried_with_large_blocks_then_small_ones_then_not_used(monkeypatch, capsys, failures, works,
                                                                                blocks, line):
    """The RTX 3090 and 4090 have 101,376 bytes of shared memory a block of threads, an A100 166,912."""
    monkeypatch.setattr(attention, "KERNEL_OPTIONS", {})
    left, tried = list(failures), []

    def compile_flex(*shape):
        tried.append((shape, attention.KERNEL_OPTIONS.get("BLOCK_N2")))
        if left:
            raise RuntimeError(f"backend='inductor' raised:\n{left.pop(0)}\nand more")

    monkeypatch.setattr(attention, "_compile_flex", compile_flex)
    for _ in range(2):  # the second time it is known
        assert attention.can_flex(CUDA, 8, 4, 96, True) is works
    assert tried == [((CUDA, 8, 4, 96, True), size) for size in (None, 32)[:1 + (failures[:1] in ([SHARED], [ALIKE]))]]
    if works:
        assert attention.KERNEL_OPTIONS.get("BLOCK_M") == blocks
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("works, recompute", [(True, False), (False, False), (True, True)])
def test_packed_rows_use_flex_attention_only_where_it_was_seen_to_work(monkeypatch, works, recompute):
    """It is tried with the model's own numbers of heads and head_dim, and as it runs with --recompute. Rows shorter
    than a block need no mask of blocks."""
    model = CausalLM(ModelConfig(num_attention_heads=6, num_key_value_heads=3, head_dim=96, num_hidden_layers=1))
    model.model.recompute = recompute
    tried, masks = [], []
    monkeypatch.setattr(runtime, "can_compile", lambda device: True)
    monkeypatch.setattr(minillm.model, "can_flex", lambda *shape: tried.append(shape) or works)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(model, "hidden", lambda tokens, doc_ids, block_mask: masks.append(block_mask) or tokens)
    forward = minillm.model.packed_forward(model, True)
    for length in (127, 128):
        tokens, doc_ids = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.long)
        forward(tokens, doc_ids, [torch.from_numpy(x) for x in attention.document_blocks(doc_ids.numpy())])
    assert tried == [(CPU, 6, 3, 96, recompute)] and [mask is not None for mask in masks] == [False, works]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_tried_is_one_program_of_flex_attention_with_the_options(monkeypatch, capsys, recompute):
    """Traced on a CPU, where PyTorch's backward pass is not allowed but there, by a backend that keeps the program and
    runs it as it is. It must be one program: a break in it would leave flex attention uncompiled. Outside of this test
    a CPU is not asked."""
    assert not attention.can_flex(CPU, 4, 2, 16) and capsys.readouterr().err == ""
    monkeypatch.setattr(runtime, "precision", lambda device: torch.bfloat16)
    programs, runs, compile_it = [], [], torch.compile
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "KERNEL_OPTIONS", dict(attention.SMALLER))

    def keep(program, inputs):
        programs.append(program.print_readable(print_output=False))
        return lambda *tensors: runs.append(1) or program(*tensors)

    def compile_whole(function, fullgraph):
        assert fullgraph
        return compile_it(function, fullgraph=True, backend=keep)

    monkeypatch.setattr(torch, "compile", compile_whole)
    attention._compile_flex(CPU, 4, 2, 16, recompute)
    (program,) = programs
    assert len(runs) == (2 if recompute else 1), "once more in the backward pass"
    assert program.count("flex_attention(") == 1 and "'BLOCK_M1': 32" in program and "'num_stages': 1" in program
    # q with 4 heads, k and v with 2, on a row of two blocks
    assert '"bf16[1, 4, 256, 16]", ' in program and program.count('"bf16[1, 2, 256, 16]", ') >= 2


# Another device on resume

@pytest.mark.parametrize("before, now", [(False, True), (True, False)])
def test_a_resumed_run_uses_the_fused_optimizer_where_this_device_has_one(before, now):
    """A state from an Apple GPU, where AdamW is not fused, goes on with fused=True on CUDA, and the other way round.
    load_state_dict alone would take over what the saved run had, and what is not fused there takes 12 times the
    kernels. The averages and the count of steps go on in both cases."""
    def adamw(fused):
        weight = torch.nn.Parameter(torch.ones(2))
        return weight, torch.optim.AdamW([weight], lr=0.5, fused=fused)

    weight, optimizer = adamw(before)
    weight.grad = torch.tensor([1.0, 3.0])
    optimizer.step()
    saved = optimizer.state_dict()
    other, resumed = adamw(now)
    restore_optimizer(resumed, saved)
    assert resumed.param_groups[0]["fused"] is now and resumed.param_groups[0]["lr"] == 0.5
    state = resumed.state[other]
    assert state["step"].item() == 1 and close(state["exp_avg"], [0.1, 0.3])  # (1 - 0.9) times the gradient
    other.grad = torch.tensor([1.0, 3.0])
    resumed.step()
    assert state["step"].item() == 2


# Several processes

@pytest.mark.parametrize("device, nccl, backend", [("cuda", True, "cpu:gloo,cuda:nccl"), ("cuda", False, "gloo"),
                                                   ("cpu", True, "gloo")])
def test_counts_go_over_gloo_and_gradients_over_nccl(gpu, monkeypatch, device, nccl, backend):
    """Windows has no NCCL. Each process works on the GPU of its own number."""
    gpu()
    joined, at_exit, current = [], [], []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(job, "watch", lambda: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: joined.append(backend))
    monkeypatch.setattr(runtime.atexit, "register", at_exit.append)
    runtime.start(device, 0)
    assert joined == [backend] and current == ([torch.device("cuda:1")] if device == "cuda" else [])
    left = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: not left)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    for function in at_exit * 2:
        function()
    assert left == [True], "left at the end, and only once"


@pytest.mark.parametrize("rank, size, message", [
    (None, "2", ""),    # of a cluster, which numbers its processes in other variables
    (None, "many", ""),
    ("0", "many", "RANK and WORLD_SIZE are set, as torchrun does, but invalid literal for int"),
    ("0", "2", "RANK and WORLD_SIZE are set, as torchrun does, but .*MASTER_ADDR expected, but not set"),
])
def test_a_world_size_that_torchrun_has_not_set(monkeypatch, rank, size, message):
    """Without a rank this process is alone, and with one what is wrong is said in one line."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    if rank:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(job, "watch", lambda: None)
    assert job.has_several() == (rank is not None and size == "2")
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        runtime.start("cpu", 0)
    assert not torch.distributed.is_initialized()


def test_a_number_is_summed_on_the_cpu_in_float64(monkeypatch):
    """2^53 - 1 tokens keep their last digit; float32 would lose 29 bits. gloo takes the tensor, whatever the device."""
    seen = []
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", seen.append)
    assert runtime.sum_over_processes(2**53 - 1) == 9007199254740991
    assert seen[0].device == CPU and seen[0].dtype == torch.float64
    assert runtime.sums_over_processes([7, 2**53 - 1]) == [7, 9007199254740991]
    assert len(seen) == 2, "several numbers are one message"


def test_an_update_over_several_processes_is_two_messages_and_waits_for_no_gpu(monkeypatch):
    """The counts of a step are one vector on the CPU, whatever their number. Of the gradients a second one, on the CPU
    too, tells which there are anywhere; they themselves are one flat message, where they are."""
    seen = []
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", seen.append)
    run = types.SimpleNamespace(updates=0)
    assert Run.count(run, 3, 40) == [3, 40] and [x.tolist() for x in seen] == [[3, 40]] and run.updates == 1
    parameters = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in ((2, 3), (4,), (5,))]
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    runtime.sum_gradients(parameters)  # on this device there is nothing to be read, and nothing to wait for
    assert [(x.device.type, tuple(x.shape)) for x in seen[1:]] == [("cpu", (3,)), ("meta", (10,))]
    assert parameters[2].grad is None


def two_backends():
    """What stands for the GPU's backend is never reached: numbers and objects are on the CPU."""
    dist = torch.distributed
    dist.is_nccl_available = lambda: True
    real = dist.init_process_group
    dist.init_process_group = lambda backend, timeout: real(backend.replace("cuda:nccl", "cuda:gloo"), timeout=timeout)
    runtime.pick_device = lambda name: torch.device("cuda:0")
    runtime.describe = lambda device: "a fake"
    torch.cuda.set_device = lambda device: None
    runtime.start("", 0)
    rank = runtime.rank()
    assert runtime.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert runtime.sum_over_processes(10 + rank) == 21
    assert runtime.sum_tensor_over_processes(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo")
def test_two_backends_side_by_side():
    assert "".join(in_processes(two_backends, count=2)).count("a fake") == 1


def test_a_build_without_torch_distributed(monkeypatch):
    """Some builds for Windows: only is_available is there. One process trains alone; torchrun's is told why not."""
    monkeypatch.setattr(runtime, "dist", types.SimpleNamespace(is_available=lambda: False))
    assert runtime.start("cpu", 0) == CPU and (runtime.rank(), runtime.world_size()) == (0, 1)
    assert runtime.gather(1) == [1] and runtime.sum_over_processes(2) == 2
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="built without torch.distributed; for a process alone unset them"):
        runtime.start("cpu", 0)


# Out of memory

CUDA_MESSAGE = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80.00 GiB of which 1.00 "
                "GiB is free.\nmore")
CPU_MESSAGE = ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
               "allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)")


def hook(cfg, error):
    config._one_line(cfg, type(error), error, None)


@pytest.mark.parametrize("cfg, advice", [
    (train_sft.Config, "a smaller --batch_size with a larger --grad_accum, --recompute"),  # before the flags are read
    (train_sft.Config(batch_size=1), "--recompute"),
    (train_sft.Config(recompute=True), "a smaller --batch_size with a larger --grad_accum"),
    (train_lora.Config(), "a smaller --batch_size with a larger --grad_accum, --recompute, --bf16"),
    (train_lora.Config(bf16=True), "a smaller --batch_size with a larger --grad_accum, --recompute"),
    (train_dpo.Config(), "a smaller --batch_size with a larger --grad_accum, --peft lora"),
    (train_dpo.Config(peft="lora"), "a smaller --batch_size with a larger --grad_accum"),
])
def test_a_full_gpu_is_one_line_with_the_flags_that_help(gpu, monkeypatch, capsys, cfg, advice):
    """80 GiB, of which 2 are free: 78 are in use. A flag that is in use already is no advice."""
    gpu()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    hook(cfg, torch.OutOfMemoryError(CUDA_MESSAGE))
    assert capsys.readouterr().err == (
        "error: out of memory: 78.0 of 80.0 GiB of the GPU's memory were in use when 2 GiB more were asked for; "
        f"what helps: {advice}\n")


@pytest.mark.parametrize("error", [
    RuntimeError("std::bad_alloc"), OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError(),
    RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)")])
def test_beside_a_gpu_it_may_be_the_machine_that_is_full(gpu, monkeypatch, capsys, error):
    gpu()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    hook(Plain, error)
    said = capsys.readouterr().err
    assert "of this machine's memory were in use" in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_MESSAGE),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")])
def test_a_gpu_that_no_longer_says_how_full_it_is(gpu, monkeypatch, capsys, error):
    """After some errors every further call fails."""
    gpu()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", failing(RuntimeError("CUDA error: unspecified launch failure")))
    hook(Plain, error)
    assert capsys.readouterr().err.startswith("error: out of memory")


@dataclass
class Plain:
    """A script without any of these flags."""

    name: str = flag("", "a name")


@pytest.mark.parametrize("error, line", [
    (RuntimeError(CPU_MESSAGE), "out of memory: 8.0 of 16.0 GiB of this machine's memory were in use when 3.0 GiB more "
                                "were asked for"),
    (MemoryError(), "out of memory: 8.0 of 16.0 GiB of this machine's memory were in use"),
    (RuntimeError("std::bad_alloc"), "out of memory: 8.0 of 16.0 GiB of this machine's memory were in use"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1073741824 bytes."),  # Windows
     "out of memory: 8.0 of 16.0 GiB of this machine's memory were in use when 1.0 GiB more were asked for"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB, other allocations: 1.50 MB, max allowed: 9.07 GB)."
                  " Tried to allocate 256.00 MB on private pool."),
     "out of memory: 9 GB of the GPU's memory were in use when 256 MB more were asked for"),
    (RuntimeError("Invalid buffer size: 16.00 GiB"), "out of memory when 16 GiB more were asked for"),  # MPS, one block
])
def test_so_is_a_full_machine(monkeypatch, capsys, error, line):
    monkeypatch.setattr(config, "memory_gib", lambda device: (8.0, 16.0))
    hook(Plain, error)
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("number, line", [
    (errno.ENOSPC, "the disk is full"), (errno.EFBIG, "no file may be so large here (ulimit -f)"),
    (errno.EMFILE, "no more files may be open in one process (ulimit -n)"),
    (errno.EIO, "the disk or the network drive fails"), (errno.EROFS, "the disk can only be read")])
def test_what_the_system_refuses_in_the_middle_of_a_run_is_one_line(capsys, number, line):
    """Such an error names no file when it comes from print, or from mapping a file that is open already."""
    hook(Plain, OSError(number, "refused"))
    assert capsys.readouterr().err == (f"error: {line} ([Errno {number}] refused); what was saved before is whole: put "
                                       "that right and use --resume\n")


def test_another_error_keeps_its_traceback(capsys):
    hook(Plain, RuntimeError("shapes differ"))
    assert capsys.readouterr().err == "RuntimeError: shapes differ\n"


SCRIPT = """
import torch
from minillm.config import parse_config
import train_sft


def main(cfg):
    model = torch.nn.Linear(2**25, 2**25)
    print("made")

main(parse_config(train_sft.Config, ""))
"""


@pytest.mark.slow
def test_a_script_says_what_it_was_doing_and_ends_with_1(tmp_path):
    """Its own line, not the line of PyTorch's that asked for the memory: 4 PiB, which no machine of today has. (Chapter
    7 has the exit code of a mistake.)"""
    (tmp_path / "memory.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run([sys.executable, "memory.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: out of memory in line 8 of memory.py (model = torch.nn.Linear(2**25, 2**25))")
    assert done.stderr.count("\n") == 1 and "when 4194304.0 GiB more were asked for; what helps: " in done.stderr


def test_memory_is_what_the_system_says(tmp_path, gpu, monkeypatch):
    gpu()
    free, total = machine.memory_gib(CUDA)
    assert close([free, total], [2.0, 80.0])
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    4194304 kB\n",
                                      encoding="utf-8")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert close(list(machine.memory_gib(CPU)), [4.0, 16.0])
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "none")
    assert machine.memory_gib(CPU) == (0.0, 0.0)


@pytest.mark.parametrize("text, expected", [
    ("MemTotal: 16777216 kB\nMemFree: 4194304 kB", [4.0, 16.0]),  # before Linux 3.14
    ("        total:    used:    free:\nMem:  1 2 3\n\nMemTotal: 16777216 kB\nMemFree: 4194304 kB", [4.0, 16.0]),
    ("MemTotal: 16777216 kB", [0.0, 0.0]),
    ("MemTotal: much\nMemFree:", [0.0, 0.0]),
    ("", [0.0, 0.0]),
])
def test_memory_where_the_system_says_it_in_another_way(tmp_path, monkeypatch, text, expected):
    """An unreadable line must not stop the report about a machine, nor the line about memory that is full."""
    (tmp_path / "meminfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert close(list(machine.memory_gib(CPU)), expected)


@pytest.mark.parametrize("own, folder, limit, used, expected", [
    ("0::/", "", "memory.max", "memory.current", [1.5, 4.0]),
    ("0::/pod/app", "pod/", "memory.max", "memory.current", [1.5, 4.0]),
    ("9:memory:/job", "memory/job/", "memory.limit_in_bytes", "memory.usage_in_bytes", [2.0, 4.0]),
    ("0::/", "", "memory.max", "no such file", [12.0, 16.0]),
])
def test_memory_is_no_more_than_a_container_may_use(tmp_path, monkeypatch, own, folder, limit, used, expected):
    """`docker run -m 4g` on a machine of 16 GiB, 12 of them free. 3 of the 4 are in use, but half a GiB by copies of
    files, which give way. Version 1 counts the group's own (here half a GiB) and, in total, those of groups in it."""
    files = {"meminfo": "MemTotal: 16777216 kB\nMemAvailable: 12582912 kB", "own": own,
             f"{folder}{limit}": str(4 * 2**30), f"{folder}{used}": str(3 * 2**30),
             f"{folder}memory.stat": f"anon 7\ninactive_file {2**29}\nactive_file 5"
             + (f"\ntotal_inactive_file {2**30}" if "in_bytes" in limit else "")}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    for name, path in (("MEMINFO", "meminfo"), ("OWN_CGROUPS", "own"), ("CGROUP", "")):
        monkeypatch.setattr(machine, name, tmp_path / path)
    assert close(list(machine.memory_gib(CPU)), expected)


# python -m minillm.runtime

NAMES = ["python", "torch", "device", "capability", "precision", "compile", "attention", "threads", "memory"]


def rows(text):
    return dict(line.split(maxsplit=1) for line in text.splitlines())


@pytest.mark.slow
def test_the_report_about_a_machine():
    """A process of its own, because the command is one."""
    done = subprocess.run([sys.executable, "-m", "minillm.runtime"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert list(found) == NAMES and found["torch"].startswith(torch.__version__)


def test_the_report_about_a_gpu(gpu, monkeypatch, capsys):
    gpu()
    monkeypatch.setattr(runtime, "_compile_something", lambda device: None)
    runtime.main()
    found = rows(capsys.readouterr().out)
    assert list(found) == NAMES
    assert (found["device"], found["capability"]) == ("cuda (NVIDIA Fake), bfloat16", "9.0")
    assert found["compile"] == "models above 16 million parameters, and others with --compile"
    assert found["memory"] == "2.0 of 80.0 GiB free"
    assert found["attention"].startswith("flex attention for packed rows")


def test_the_report_about_a_gpu_that_does_not_work(gpu, monkeypatch, capsys):
    gpu()
    monkeypatch.setattr(runtime, "_run_a_kernel", failing(RuntimeError("CUDA error: busy")))
    runtime.main()
    device = rows(capsys.readouterr().out)["device"]
    assert device.startswith("cpu, ") and "(--device cuda:0 does not work: CUDA error: busy;" in device


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_the_quota_of_a_container_or_job_bounds_the_threads: `"250000 100000"}, 2)` -> `"290000 100000"}, 3)`. How many
#    threads for 2.9 cores?
# 2. test_threads_are_only_ever_taken_away: `(64, 2, [2])` -> `(64, 128, [2])`. What is set on a machine with more
#    cores than threads?
