"""Files that are whole or not there: atomic writes, JSON, and the safetensors format of Hugging Face, by hand.

A file is written under a temporary name, flushed to the disk and renamed: a crash, SIGKILL or a full disk leaves the
previous file whole. A safetensors file is

    8 bytes: length of the header, little endian | header: JSON {name: {dtype, shape, data_offsets}} | the tensors

It holds only numbers: reading it runs no code, whereas loading a pickle can.
"""

import contextlib
import json
import math
import mmap
import os
import struct
from pathlib import Path

import torch

from minillm.errors import UserError


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to; it becomes `path` only when the block ends without an error.

    Raises UserError when the system refuses (disk full, no permission): an existing `path` is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # a fixed name: what a killed process left is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the name points at them
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the rename must survive a power cut, where folders can be flushed
            descriptor = os.open(path.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch.save hides the OSError of a full disk behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, (OSError, RuntimeError)) and isinstance(cause, OSError):
            kept = "the file that was there is unchanged" if path.exists() else "nothing was written"
            raise UserError(f"cannot write {path}: {cause.strerror or cause}; {kept}") from error
        raise


def save_json(path, value):
    """Write JSON atomically; raises UserError when the disk refuses."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def load_json(path) -> dict:
    """Read a JSON object; raises UserError that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


# safetensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the limit of the safetensors package


def save_safetensors(path, tensors: dict, metadata: dict | None = None, dtypes: dict | None = None):
    """Write {name: tensor} atomically, one tensor at a time: no second copy of the model in memory.

    dtypes: {name: dtype} to write in, by default each tensor's own. metadata: {str: str}; transformers insists on
    {"format": "pt"}, the default. Raises UserError when the disk refuses, ValueError for a dtype that the format does
    not know.
    """
    dtypes = {name: (dtypes or {}).get(name, tensor.dtype) for name, tensor in tensors.items()}
    # The widest dtype first keeps every tensor aligned, whatever their sizes.
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header, end = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name in names:
        tensor, dtype, start = tensors[name], dtypes[name], end
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: safetensors cannot store {dtype}")
        end = start + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()  # as the package writes it
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            flat = tensors[name].detach().to(dtypes[name]).cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def load_safetensors(path) -> dict:
    """{name: tensor}, mapped from the file: memory is used only for what is read.

    The mapping is private: writing to a tensor never changes the file. Windows cannot replace the file while a
    tensor of it is alive. Raises UserError for a missing, truncated or corrupted file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError(f"{size} bytes, header of {length}")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _map_tensors(header, torch.frombuffer(mapped, dtype=torch.uint8)[8 + length:])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RuntimeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is truncated or corrupted ({error}); copy or download it again") from None


def _no_duplicates(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return dict(pairs)


def _map_tensors(header, data) -> dict:
    """Views of data (uint8) as the header says; raises ValueError unless they fill it without gap or overlap."""
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    places = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in list(DTYPES):
            raise ValueError(f"{name!r}: unknown dtype in {entry}")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
                raise ValueError(f"{name!r}: shape {shape}, data_offsets {offsets}")
        dtype = DTYPES[entry["dtype"]]
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r}: data_offsets {offsets} do not fit shape {shape} of {entry['dtype']}")
        places.append((offsets[0], offsets[1], name, dtype, shape))
    tensors, end = {}, 0
    for start, stop, name, dtype, shape in sorted(places, key=lambda place: place[:2]):
        if start != end:
            raise ValueError(f"{name!r} starts at byte {start}, the tensor before it ends at {end}")
        end = stop
        part = data[start:stop]
        if part.data_ptr() % dtype.itemsize:
            part = part.clone()  # other writers need not align
        tensors[name] = part.view(dtype).reshape(shape)
    if end != len(data):
        raise ValueError(f"the tensors end at byte {end}, the file at {len(data)}")
    return tensors
