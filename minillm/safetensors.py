"""Files that are whole or not there: atomic writes, JSON, and the safetensors format of Hugging Face, by hand.

A file is written under a temporary name, flushed to the disk and renamed: a crash, SIGKILL or a full disk leaves the
previous file whole. A safetensors file is

    8 bytes: length of the header, little endian | header: JSON {name: {dtype, shape, data_offsets}} | the tensors

It holds only numbers: reading it runs no code, whereas loading a pickle can. What is read may be damaged, or made by
somebody who means harm: sizes are compared with the file's size before anything is allocated.
"""

import contextlib
import errno
import json
import math
import mmap
import os
import re
import secrets
import stat
import struct
from collections import Counter
from pathlib import Path

import torch

from minillm.errors import UserError

MAX_JSON = 1 << 22  # bytes; parsed JSON can take twenty times as much memory
MAX_DEPTH = 100  # levels of JSON
LFS = b"version https://git-lfs"  # how the file begins that git leaves in the place of a large one
TEMPORARY = re.compile(r".+\.[0-9a-f]{16}\.tmp")


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to; it becomes `path` only when the block ends without an error.

    The temporary file has a random name, and must not exist before: nobody can have planted a link there. What a killed
    process left at such a name is removed. Raises UserError when the system refuses (disk full, no permission): an
    existing `path` is then unchanged.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with _new_file(path) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the name points at them
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if temporary:
                temporary.unlink()
        # torch.save hides the OSError of a full disk behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, (OSError, RuntimeError)) and isinstance(cause, OSError):
            kept = "the file that was there is unchanged" if os.path.exists(path) else "nothing was written"
            raise UserError(f"cannot write {path}: {cause.strerror or cause}; {kept}") from error
        raise


def _new_file(path: Path):
    while True:
        file = open(path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp"), "xb")
        # The lock shows others that this is no leftover; one may have taken it for that in the moment before.
        if try_lock(file) and os.path.exists(file.name):
            return file
        file.close()


def remove_leftovers(path: Path):
    """Remove the temporary files of `path` whose process was killed: those that nobody holds a lock on."""
    for entry in os.scandir(path.parent):
        if entry.name.startswith(path.name) and is_temporary(entry.name) and len(entry.name) == len(path.name) + 21:
            with contextlib.suppress(OSError):
                if entry.is_symlink() or not entry.is_file():
                    continue  # not ours
                with open_file(entry.path) as file:
                    if not try_lock(file):
                        continue
                os.unlink(entry.path)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that atomic_write had not finished."""
    return TEMPORARY.fullmatch(name) is not None


def flush_folder(folder):
    """Make what was renamed in a folder survive a power cut, where folders can be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def try_lock(file) -> bool:
    """Lock an open file until it is closed, at the latest when the process ends; False if another process holds it.

    Windows and some network drives have no such locks: then True.
    """
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def open_file(path, writable: bool = False):
    """Open a regular file: binary, to read, or (writable, made where it is missing) to read and write.

    Raises OSError for a pipe or a device, which could be waited for without end; for writing, also for a link.
    """
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if writable:
        flags |= os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a regular file")
        if not writable and os.read(descriptor, len(LFS)) == LFS:
            raise OSError(0, "it is a Git LFS pointer; git lfs pull fetches the file itself")
        os.lseek(descriptor, 0, os.SEEK_SET)
        return os.fdopen(descriptor, "r+b" if writable else "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_file_out(option: str, out: str, inputs: list):
    """Make the folder of a file that will be written. Raises UserError if it cannot be, or if the file is an input."""
    if os.path.isdir(out) or out.endswith(("/", os.sep)):
        raise UserError(f"{option} {out}: is a folder; give the name of a file")
    for path in inputs:
        if os.path.realpath(out) == os.path.realpath(path):
            raise UserError(f"{option} {out}: this command reads that file; give another name")
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {out}: cannot make its folder: {error.strerror or error}") from None


def save_json(path, value):
    """Write JSON atomically; raises UserError when the disk refuses."""
    with atomic_write(path) as file:
        # Half of a surrogate pair, as in a file's name that is not UTF-8, is written as JSON's own \\udXXX.
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def load_json(path, limit: int = MAX_JSON) -> dict:
    """Read a JSON object from a file of at most `limit` bytes; raises UserError that names the file."""
    try:
        with open_file(path) as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            raise UserError(f"{path} is too large: such a file has at most {limit:,} bytes")
        value = json.loads(text.decode("utf-8"))
        check_depth(value)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({short(error)}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def check_depth(value):
    """Raise ValueError for a JSON value nested so deeply that reading it may work, but not showing or writing it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for container in level if isinstance(container, (dict, list))
                 for item in (container.values() if isinstance(container, dict) else container)
                 if isinstance(item, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def no_duplicates(pairs: list) -> dict:
    """The members of a JSON object as a dict, for object_pairs_hook; raises ValueError where a name appears twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {short(name)} appears twice in one object")
    return found


def short(value) -> str:
    """A value from a file as it may stand in a message: in one line, and cut where it is long."""
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return short(value[:8])[:-1] + ", ...]"
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# safetensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
OTHER_DTYPES = re.compile("F[468]_E\\d.*|[FIU]4|U16|U32|U64|C64")  # of the format, but not of weights that are trained
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_DIMENSIONS = 16


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
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= min(size - 8, MAX_JSON):
                raise ValueError(f"{size:,} bytes, a header of {length:,}; at most {MAX_JSON:,} are read")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=no_duplicates)
            mapped = _map_file(file)
        return _map_tensors(header, torch.frombuffer(mapped, dtype=torch.uint8)[8 + length:])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RuntimeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is truncated or corrupted ({str(error)[:200]}); copy or download it again") from None


def _map_file(file):
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        file.seek(0)  # some network drives map no files
        return bytearray(file.read())


def _map_tensors(header, data) -> dict:
    """Views of data (uint8) as the header says; raises ValueError unless they fill it without gap or overlap."""
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    places = []
    for name, entry in header.items():
        if isinstance(entry, dict) and OTHER_DTYPES.fullmatch(str(entry.get("dtype"))):
            raise UserError(f"{short(name)} holds {entry['dtype']} numbers, which are not supported (is the model "
                            "quantized?); give one in BF16, F16 or F32")
        if not isinstance(entry, dict) or entry.get("dtype") not in list(DTYPES):
            raise ValueError(f"{short(name)}: unknown dtype in {short(entry)}")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        for numbers in (shape, offsets):
            if (not isinstance(numbers, list) or len(numbers) > MAX_DIMENSIONS
                    or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers)):
                raise ValueError(f"{short(name)}: shape {short(shape)}, data_offsets {short(offsets)}")
        dtype = DTYPES[entry["dtype"]]
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{short(name)}: data_offsets {short(offsets)} do not fit shape {short(shape)} of "
                             f"{entry['dtype']}")
        places.append((offsets[0], offsets[1], name, dtype, shape))
    tensors, end = {}, 0
    for start, stop, name, dtype, shape in sorted(places, key=lambda place: place[:2]):
        if start != end:
            raise ValueError(f"{short(name)} starts at byte {start}, the tensor before it ends at {end}")
        end = stop
        if end > len(data):
            break
        part = data[start:stop]
        address = part.data_ptr() if len(part) else part.storage_offset()  # what is empty has no address
        if address % dtype.itemsize:
            part = part.clone()  # other writers need not align
        tensors[name] = part.view(dtype).reshape(shape)
    if end != len(data):
        raise ValueError(f"the tensors end at byte {end}, the file at {len(data)}")
    return tensors
