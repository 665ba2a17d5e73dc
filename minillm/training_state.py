"""training_state.pt: a plain dict with all that exact resume needs, loaded without unpickling objects."""

import contextlib
import math
import os
import pickletools
import random
import zipfile
from pathlib import Path

import numpy as np
import torch

from minillm.checkpoint import check_finite, check_weights
from minillm.errors import UserError, is_out_of_memory
from minillm.optim import Muon
from minillm.runtime import rank, say
from minillm.safetensors import atomic_write, open_file, short
from minillm.shard import split_like

# What each optimizer keeps for a parameter.
KEPT = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}
MOST_VALUES = 100_000  # in the evaluation before training


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


def remove_training_state(folder):
    """Make room once a run is finished; the weights stay, as the folder's model."""
    with contextlib.suppress(OSError):  # nothing needs it any more
        (Path(folder) / "training_state.pt").unlink()


def _check_plain(value, name):
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(item, f"{name}[{key!r}]")
    elif value is not None and type(value) not in (bool, int, float, str) and not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; weights_only loading would refuse it")


def load_training_state(folder, mapped: bool = False) -> dict:
    """Read training_state.pt to the CPU without unpickling objects; prints a note where bit-exactness is not promised.

    mapped: its tensors stay in the file, for a sharded run, which copies its part of them. Raises UserError when it is
    missing or damaged.
    """
    path = Path(folder) / "training_state.pt"
    try:
        with open_file(path) as file:
            _check_archive(file)
            state = _load(path, file, mapped)
        before = dict(state["environment"])
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError("no step")
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # zip, pickle and torch errors alike: the file is not what we wrote
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is truncated or corrupted ({type(error).__name__}); "
                        "start again without --resume") from None
    now = _environment()
    before = {key: value if isinstance(value, int) else ascii(value).strip("'")[:80] for key, value in before.items()}
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        say(f"note: resumed with {', '.join(changed)}: results may differ in the last bits from an uninterrupted run")
    return state


def _load(path, file, mapped: bool) -> dict:
    if mapped:
        with contextlib.suppress(RuntimeError):  # some network drives map no files: then it is read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(file):
    """Raise ValueError unless the zip is as torch.save writes it: not compressed, and with the right checksums."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
            raise ValueError("what it holds is larger than the file")
        if damaged := archive.testzip():  # torch.load does not look at the checksums
            raise ValueError(f"{damaged} has another checksum")
        for entry in entries:  # of what torch.load would call, this alone makes much out of few bytes
            if entry.filename.endswith("/data.pkl") and any(
                    code.name == "GLOBAL" and name.endswith(" bytearray")
                    for code, name, _ in pickletools.genops(archive.read(entry))):
                raise ValueError("it asks for memory")


def restore(state: dict, models, optimizers, loader, total_steps: int, where, device) -> dict:
    """Put models, optimizers, loader and random generators where the run was; returns the evaluation before training.

    Raises UserError, in one line with the file `where`, for a state that is not of such a run: whatever is missing, or
    of another type, size or shape.
    """
    try:
        if state["step"] > total_steps:
            raise ValueError(f"it is that of step {state['step']:,}, this run has {total_steps:,}")
        for model, saved in zip(models, state["models"], strict=True):
            now = trained_weights(model)
            check_weights(now, saved, where, "the weights do not fit the model")
            check_finite(saved, where)
            saved = {name: split_like(tensor, now[name]) for name, tensor in saved.items()}
            model.load_state_dict(saved, strict=False)  # strictly checked above; the frozen ones are not in it
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            restore_optimizer(optimizer, saved)
        position = {key: state["loader"][key] for key in loader.state()}
        if any(type(number) is not int or not 0 <= number < 2**53 for number in position.values()):
            raise TypeError("the position in the data is no number")
        loader.load_state(position)
        restore_rng(state["rng"][rank() % len(state["rng"])], device)
        if rank() >= len(state["rng"]):  # more processes than before; the others go on with what they had
            torch.manual_seed(torch.initial_seed() + rank())
        return check_before(state["before"])
    except UserError:
        raise
    except Exception as error:  # see the docstring: there are many kinds
        if is_out_of_memory(error):
            raise
        raise UserError(f"{where} is not a state of this run ({type(error).__name__}: {error}); "
                        "start again without --resume") from None


def check_before(before: dict) -> dict:
    """The evaluation before training, as evaluate() returned it; raises ValueError or TypeError for anything else."""
    left = MOST_VALUES

    def walk(value):
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("the evaluation before training is too large")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, (dict, list, tuple)):
                walk(item)
            elif item is not None and type(item) not in (bool, int, float, str) or type(key) not in (int, str):
                raise TypeError(f"the evaluation before training holds a {type(item).__name__}")

    walk(before)
    for question, reply in before.get("replies") or ():
        if not isinstance(question, str) or not isinstance(reply, str):
            raise TypeError("a reply in the evaluation before training is no text")
    return dict(before)


def restore_optimizer(optimizer, saved: dict):
    """optimizer.load_state_dict, which would take tensors of any shape. Raises ValueError, TypeError or KeyError."""
    now = optimizer.state_dict()["param_groups"]
    for group, ours in zip(saved["param_groups"], now, strict=True):
        if group["params"] != ours["params"] or group.keys() != ours.keys():
            raise ValueError("an optimizer has other parameters or settings")
        for key, value in ours.items():
            numbers = isinstance(value, (int, float)) and isinstance(group[key], (int, float))
            if isinstance(group[key], float) and not math.isfinite(group[key]):
                raise ValueError(f"the optimizer's {key} is {group[key]}")
            if not numbers and None not in (value, group[key]) and type(value) is not type(group[key]):
                raise TypeError(f"the optimizer's {key} is {short(group[key])}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, kept in saved["state"].items():
        if set(kept) != KEPT.get(type(optimizer), set(kept)):
            raise ValueError(f"the optimizer keeps {short(sorted(map(str, kept)))} for a parameter")
        for key, value in kept.items():
            shape = torch.Size() if key == "step" else parameters[number].shape
            if value.shape != shape or not value.is_floating_point() or not value.isfinite().all():
                raise ValueError(f"the optimizer's {key} has another shape or type, or is not finite")
    kept = {number: {key: value.clone() if key == "step" else split_like(value, parameters[number])
                     for key, value in kept.items()} for number, kept in saved["state"].items()}
    optimizer.load_state_dict(for_this_device({**saved, "state": kept}, optimizer))


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
    if gauss is not None and type(gauss) is not float:
        raise TypeError("a random generator's state is not as it was written")
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    if not 0 <= position <= 624:  # NumPy does not check it, and would read beyond its array
        raise ValueError("a random generator's state is not as it was written")
    np.random.set_state((name, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    device = torch.device(device)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
