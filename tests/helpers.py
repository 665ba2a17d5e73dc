"""What tests share: the one comparison, the states of finished runs, and a GPU that must not be waited for."""

import contextlib

import pytest
import torch

from minillm import run, runtime

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
