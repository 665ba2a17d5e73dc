"""What this process may use of the machine: cores and memory, also where a container is given only a part of them."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import torch

CGROUP, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # where Linux tells what is ours
MEMINFO = Path("/proc/meminfo")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def allowed_threads() -> int:
    """How many cores this process may use: those of its affinity mask, and no more than the CPU quota of any control
    group that it is in (a container's, a batch job's). Of 2.5 cores it uses 2: with three threads, each step would
    wait for the one that is stopped for the rest of a period.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # macOS and Windows have no such call, and a sandbox may refuse it
        cores = os.cpu_count() or 1
    for kind, names in (("", ["cpu.max"]), ("cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"])):
        for group in _control_groups(kind):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quota, period = " ".join((group / name).read_text(encoding="utf-8") for name in names).split()
                if int(quota) > 0:  # v1 says -1 when there is no quota, v2 says "max"
                    cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _control_groups(kind: str) -> list:
    """The folders of the control groups that this process is in, from its own to the outermost: of cgroup v2 (kind ""),
    or those of v1 that limit "cpu" or "memory"."""
    try:  # a line is "0::/user.slice/job" (v2) or "4:cpu,cpuacct:/job" (v1)
        lines = [line.split(":", 2) for line in OWN_CGROUPS.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        lines = []
    own = {name: line[1:] for line in lines if len(line) == 3 for name in line[1].split(",")}
    names, path = own.get(kind, (kind, ""))
    groups = [CGROUP / folder / path.lstrip("/") for folder in dict.fromkeys([kind, names])]  # "cpu" may be missing
    return [folder for group in groups for folder in (group, *group.parents) if folder.is_relative_to(CGROUP)]


def memory_gib(device: torch.device) -> tuple:
    """(free, total) memory in GiB: of the GPU on CUDA, else of the machine, and no more than a control group's limit.
    (0, 0) where that is unknown."""
    if device.type == "cuda":
        return tuple(size / 2**30 for size in torch.cuda.mem_get_info(device))
    sizes = {}
    with contextlib.suppress(OSError):  # only Linux has it; a line is "MemTotal:       24684100 kB"
        for line in MEMINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, IndexError):
                name, size = line.split(":")
                sizes[name] = int(size.split()[0]) / 2**20
    free, total = sizes.get("MemAvailable", sizes.get("MemFree")), sizes.get("MemTotal")
    if free is None or total is None:
        return 0.0, 0.0
    for kind, names in (("", ["memory.max", "memory.current"]),
                        ("memory", ["memory.limit_in_bytes", "memory.usage_in_bytes"])):
        for group in _control_groups(kind):
            with contextlib.suppress(OSError, ValueError):  # v2 says "max" when there is no limit
                limit, used = (int((group / name).read_text(encoding="utf-8")) / 2**30 for name in names)
                with contextlib.suppress(OSError, ValueError):  # copies of files give way; v1 has a sum over the group
                    lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
                    stat = dict(line.split() for line in lines)
                    used -= int(stat.get("total_inactive_file", stat.get("inactive_file", 0))) / 2**30
                free, total = min(free, max(limit - used, 0.0)), min(total, limit)
    return free, total


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


def keep_freed_memory():
    """Keep the memory of freed tensors for the next ones, where the C library is glibc.

    It gives large blocks back to the system, which clears each page anew when the next step asks for them. Without that
    a training step of `tiny` on a CPU takes a sixth less time. The values are the largest block that glibc can keep and
    the most that it keeps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
