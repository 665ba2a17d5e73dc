"""What tests share: the one comparison, the states of finished runs, processes that start at once, and a disk and a GPU
not to wait for.
"""

import contextlib
import functools
import multiprocessing.connection
import os
import runpy
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from minillm import run, runtime, token_cache

ROOT = Path(__file__).parent.parent
STAGES = ["train_pretrain", "train_sft", "train_lora", "train_reward", "train_dpo", "train_grpo", "train_ppo"]

CAN_FORK = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # neither threads nor CUDA survive a fork
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def close(actual, expected) -> bool:
    """Asserts that two numbers, lists or tensors have one shape and agree to 1e-5 in float32, to 1e-9 in float64.

    The tolerance is absolute and relative alike, and fixed: a test that needs a wider one has found something. A plain
    number counts as float32; all other types must be equal. NaN is close to nothing. Returns True, so that
    `assert close(a, b)` reads well too.
    """
    actual = torch.as_tensor(actual).detach().cpu()
    tolerance = TOLERANCE.get(actual.dtype, 0)
    # Only a float is converted: 1.5 made a whole number would be 1.
    dtype = actual.dtype if actual.is_floating_point() else None
    expected = torch.as_tensor(expected, dtype=dtype).detach().cpu()
    def message(difference):
        numbers = f"\n{actual.tolist()} came out\n{expected.tolist()} is expected" if actual.numel() <= 40 else ""
        return difference + numbers

    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, msg=message)
    return True


def keep_states():
    """A finished run removes its training state. Here it stays, so that tests can compare it, moments and all."""
    def keep(folder):
        pass

    run.remove_training_state = keep


@functools.cache
def loaded():
    """Where processes come from: forks of one that has PyTorch and the stages loaded, which takes three seconds.

    It has computed nothing, so it has no threads, which would be missing in a fork. pytest itself has some.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pytest", *STAGES])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CAN_FORK, "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        context.Process(target=int).start()  # with which the first one starts
    return context


def _speak_into(path, environment: dict, work, arguments):
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ |= environment
    torch.set_num_threads(1)  # this and the next two: as in conftest.py
    keep_states()
    do_not_wait_for_the_disk()
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forks: one that is killed in it stops all the others
    try:
        work(*arguments)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())  # which a script may have replaced
        sys.exit(1)
    finally:
        runtime._leave()


def in_processes(work, *arguments, count: int = 1, timeout: float = 120) -> list:
    """Run work(*arguments), a function of a module, in a process of its own; returns what it has said, in a list.

    count: in so many processes that find each other, as torchrun starts them. If one fails, the others are killed.
    Not on Windows. Raises AssertionError, with all that was said, unless every process ends with 0 in this time.
    """
    with tempfile.TemporaryDirectory() as folder:
        environments, store = [{}], None
        if count > 1:
            store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True"}
            environments = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        files = [Path(folder, str(rank)) for rank in range(count)]
        processes = [loaded().Process(target=_speak_into, args=(file, environment, work, arguments))
                     for file, environment in zip(files, environments)]
        for process in processes:
            process.start()
        running, give_up = processes, time.time() + timeout
        while running and time.time() < give_up and not any(process.exitcode for process in processes):
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
            running = [process for process in running if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        said = [file.read_text(encoding="utf-8") for file in files]
        assert [process.exitcode for process in processes] == [0] * count, "\n".join(said)
        return said


def _run_script(*argv):
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")


def start_script(said, *argv):
    """Start `python argv` in a fork of `loaded`; what it says goes to the file `said`. Returns the process."""
    process = loaded().Process(target=_speak_into, args=(said, {}, _run_script, argv))
    process.start()
    return process


def workers_start_at_once(monkeypatch):
    """The workers of the token cache are forked from `loaded` instead of loading PyTorch each; not on Windows."""
    if hasattr(os, "fork"):
        context = loaded()
        monkeypatch.setattr(token_cache.multiprocessing, "get_context", lambda method: context)


def do_not_wait_for_the_disk():
    """What a test has written need not survive a power failure: thousands of waits less. A kill loses nothing."""
    def fsync(descriptor):
        pass

    os.fsync = fsync


@contextlib.contextmanager
def waiting_forbidden():
    """CUDA: whatever makes the program wait for the GPU is an error in here."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def forbid_waiting_in_updates(monkeypatch, module, name):
    """CUDA: the same in a training script, from an optimizer step until module.name is called.

    Returns the list of both events, in the order in which they happen.
    """
    with pytest.raises(RuntimeError, match="synchronizing"), waiting_forbidden():
        torch.zeros((), device="cuda").item()
    happened = []

    def before(owner, name, mode):
        function = getattr(owner, name)

        def call(*args, **options):
            happened.append(name)
            torch.cuda.set_sync_debug_mode(mode)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)

    before(runtime, "sum_gradients", "error")
    before(module, name, "default")
    return happened
