"""The models of the tests are so small that a second thread only waits for the first; beside other work it waits long.
"""

import enum
import gc
import signal

import pytest
import torch

from tests import exercise, helpers

torch.set_num_threads(1)
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    # nohup and a script's background ignore signals, and minillm and all that a test starts would leave it at that.
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)
helpers.keep_states()
helpers.do_not_wait_for_the_disk()


def pytest_addoption(parser):
    parser.addoption("--mine", metavar="FILE", help="run the chapters against your own functions (tests/exercise.py)")
    parser.addoption("--slow", action="store_true", help="also the tests that start programs, compile, or train longer")
    parser.addoption("--fuzz", type=int, default=0, help="chapter 29: how many damaged files to try")
    parser.addoption("--kills", type=int, default=0, help="chapter 28: how many times to kill a run")
    parser.addoption("--processes", type=int, default=0, help="chapter 27: compare so many with one, in all stages")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow, or where its chapter is named")
    if config.getoption("--mine"):
        exercise.use(config.getoption("--mine"))


def pytest_collection_modifyitems(config, items):
    """All chapters at once take three minutes, without the slow tests. A chapter by itself has all of its own."""
    if config.getoption("--slow") or any(".py" in argument for argument in config.args):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_searched():
    """PyTorch's million objects outlive all chapters: garbage collections need not look at them time and again."""
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val, argname):
    """`pytest -v` then shows tied=True, SIGTERM or r=4,dora=True in place of True, 15 or options1."""
    if isinstance(val, enum.Enum):
        return val.name
    if isinstance(val, dict):
        shown = ",".join(f"{name}={value}" for name, value in val.items()) or f"no {argname}"
    elif isinstance(val, (bool, int, list, tuple, torch.dtype)) or val is None:
        shown = f"{argname}={val}"
    elif isinstance(val, float):
        shown = f"{argname}={val:g}"
    else:
        return None
    # Else it gets a number: what is long, and what has an address in memory, which differs from run to run.
    return ascii(shown.replace("torch.", ""))[1:-1] if len(shown) < 60 and " at 0x" not in shown else None
