"""training_state.pt: a plain dict with all that exact resume needs, loaded without unpickling objects."""

import random
import zipfile
from pathlib import Path

import numpy as np
import torch

from minillm.errors import UserError
from minillm.runtime import say
from minillm.safetensors import atomic_write


def trained_weights(model) -> dict:
    """{name: tensor} of all that training changes. The frozen parameters are in the base model's folder."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def for_this_device(saved: dict, optimizer) -> dict:
    """An optimizer's saved state with `fused` as it is here: another device may have chosen otherwise.

    load_state_dict puts the counts of steps on the device that `fused` needs, so this comes before it.
    """
    groups = [{**old, "fused": new["fused"]} if "fused" in new else old
              for old, new in zip(saved["param_groups"], optimizer.param_groups)]
    return {**saved, "param_groups": groups}


def save_training_state(folder, state: dict):
    """Write training_state.pt atomically; raises UserError when the disk refuses.

    Raises ValueError for anything but dicts, lists, tuples, numbers, text and tensors: it could be written, but
    load_training_state would not load it.
    """
    _check_plain(state, "state")
    with atomic_write(Path(folder) / "training_state.pt") as file:
        torch.save({**state, "environment": _environment()}, file)


def _check_plain(value, name):
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(item, f"{name}[{key!r}]")
    elif value is not None and type(value) not in (bool, int, float, str) and not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; weights_only loading would refuse it")


def load_training_state(folder) -> dict:
    """Read training_state.pt to the CPU without unpickling objects; prints a note where bit-exactness is not promised.

    Raises UserError when it is missing or damaged.
    """
    path = Path(folder) / "training_state.pt"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = dict(state["environment"])
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError("no step")
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # zip, pickle and torch errors alike: the file is not what we wrote
        raise UserError(f"{path} is truncated or corrupted ({type(error).__name__}); "
                        "start again without --resume") from None
    now = _environment()
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        say(f"note: resumed with {', '.join(changed)}: results may differ in the last bits from an uninterrupted run")
    return state


def _environment() -> dict:
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability()}


def capture_rng(device="cpu") -> dict:
    """The state of every random generator that training on `device` may use."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {"python": [version, list(words), gauss], "numpy": [name, keys.tolist(), *map(float, rest)],
             "torch": torch.get_rng_state()}
    device = torch.device(device)
    if device.type in ("cuda", "mps"):
        module = getattr(torch, device.type)
        state[device.type] = module.get_rng_state(device) if device.type == "cuda" else module.get_rng_state()
    return state


def restore_rng(state: dict, device="cpu"):
    """Set the generators to what capture_rng found; one that this machine lacks is left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    device = torch.device(device)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
