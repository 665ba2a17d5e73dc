"""A job of several processes: when one of them dies, all end within a minute, and one line says why.

torchrun ends the other processes of a machine once one has failed. What it does not see are a machine that is gone and
a process that hangs; and without more, every process that lost another prints a traceback of its own. So here

- each process has a thread that counts upwards in the job's store (a small server of torchrun's) and looks whether its
  neighbour's thread still does. Threads go on while their process tokenises, compiles or saves for hours. That is why
  the processes may wait for each other for a day, and a dead one is found in less than a minute all the same.
- the first process that fails notes this in the store, and says why. The others then end without a word.
"""

import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(days=1)  # how long a process waits for what another has to give; the threads find dead ones
BEAT = 2  # seconds between two signs of life
SILENCE = 40  # seconds without one after which a process counts as dead
START = 600  # seconds that it has for the first one: Python may load from a slow disk
UNREACHABLE = (RuntimeError, ValueError, KeyError)  # the store is gone, or its address is not in the environment
# What gloo and NCCL say when the process at the other end is gone.
LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe")

_watchers, _leaving = [], threading.Event()  # the thread of this process, and that it may end


def has_several() -> bool:
    """Whether torchrun, or what is like it, has started this process together with others."""
    size = os.environ.get("WORLD_SIZE", "")
    return "RANK" in os.environ and size.isdecimal() and int(size) > 1


@functools.cache
def _store():
    # As torch.distributed itself joins it: the wheels for Windows have no libuv.
    libuv = os.environ.get("USE_LIBUV", "0" if sys.platform == "win32" else "1") == "1"
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=5),
                         use_libuv=libuv)


def _key(name: str) -> str:
    return f"minillm {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {name}"


def is_first_to_fail() -> bool:
    """Whether no other process of the job has failed before. The others, which ask later, need not say anything."""
    try:
        rank = os.environ.get("RANK")
        return not has_several() or _store().compare_set(_key("failed"), "", rank) == rank.encode()
    except UNREACHABLE:  # nobody knows, so all speak
        return True


def has_lost_another(error) -> bool:
    """Whether an exception means that another process, which this one waited for, is gone."""
    return has_several() and isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def end(code: int):
    """End this process of a job at once. An orderly exit could wait for the processes that it has lost."""
    if has_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch():
    """From now on this process shows that it lives, and ends when its neighbour does not, or when another has failed.

    On SIGTERM, which torchrun sends when a process has died, it says so if nobody else has said anything.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    _watchers.append(threading.Thread(target=_watch, daemon=True))
    _watchers[-1].start()


def _watch():
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    neighbour = (rank + 1) % size
    count, heard, reached = 0, time.monotonic(), False
    while not _leaving.is_set():
        failed, now, gone = False, count, False  # failed: another process
        try:
            _store().add(_key(f"lives {rank}"), 1)
            now = _store().add(_key(f"lives {neighbour}"), 0)
            gone = _store().check([_key(f"left {neighbour}")])
            failed = _store().check([_key("failed")]) and not is_first_to_fail()
            reached = True
        except UNREACHABLE:
            if not reached:  # whoever was never in the store knows nothing about the neighbour
                heard = time.monotonic()
        if failed:
            time.sleep(BEAT)  # for the main thread to put its files in order
            end(1)
        if now != count or gone:
            count, heard = now, time.monotonic()
        elif time.monotonic() - heard > (SILENCE if count else START):
            if is_first_to_fail():
                _say(f"process {neighbour} of this job gives no sign of life")
            end(1)
        _leaving.wait(BEAT)


def _say(what: str):
    print(f"error: {what}; the last checkpoint is whole, and the same command with --resume goes on from it",
          file=sys.stderr, flush=True)


def say_lost():
    """The line of a process that has lost another one, which could not say anything itself."""
    _say("another process of this job has died, perhaps killed because memory ran out")


def _on_sigterm(number, frame):
    if is_first_to_fail():
        _say("ended by SIGTERM, as by torchrun when another process of this job has died")
    end(128 + number)


def leave():
    """This process has done its work: its silence means nothing from now on."""
    if has_several():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _leaving.set()
        for thread in _watchers:  # one that is in the store when Python ends would abort the process
            thread.join()
        with contextlib.suppress(*UNREACHABLE):
            _store().set(_key(f"left {os.environ['RANK']}"), "1")
