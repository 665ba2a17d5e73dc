"""Data files as token sequences in memory-mapped files. A file far larger than memory is tokenised once, on all cores.

    lines -> encode(record) in several processes -> .cache/KIND-HASH/{tokens.bin, mask.bin, starts.bin, labels.jsonl}

Beside them stats.json tells what went in, and holds checksums: a damaged cache is discarded and made again. Until it is
whole, a cache is called KIND-HASH.part. After every PART bytes of data it is flushed to the disk, and progress.json
tells how far it is: a build that was killed goes on from there.

The encoder decides what a record becomes (encode_text and encode_conversation in data.py, encode_pair in
preferences.py). encode(record, where, tokenizer, max_seq_len, stats) returns a list of sequences (tokens, loss mask)
or (tokens, loss mask, label). It counts in `stats` what it drops or cuts, by reason.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minillm.errors import UserError
from minillm.machine import allowed_threads
from minillm.records import UnknownKeys, check_file, content_hash, is_gzipped, is_text, parse_line, read_lines
from minillm.runtime import say
from minillm.safetensors import flush_folder, load_json, open_file, save_json, try_lock
from minillm.tokenizer import Tokenizer

CACHE = Path(os.environ.get("MINILLM_CACHE", ".cache"))
FORMAT = 7  # increase it when the meaning of a cached file changes
FILES = ("tokens.bin", "mask.bin", "starts.bin", "labels.jsonl")
PART = 1 << 23  # bytes of data after which an unfinished cache is flushed
PARALLEL = 1 << 23  # bytes of data per worker process: a smaller file is not worth starting one
# Every other key of the stats counts what was lost.
FACTS = ("documents", "bytes", "tokens", "trained tokens", "dtype", "unknown keys")


class TokenDataset:
    """len() token sequences; [i] -> (tokens, mask) as arrays, read from the mapped files; `stats`: what went in."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.stats = load_json(self.folder / "stats.json")["stats"]
        self.reopen()

    def reopen(self):
        """Map the files anew. Pages that were read count as this process's memory until their mapping is gone."""
        self.tokens = self._map("tokens.bin", np.dtype(self.stats["dtype"]))
        self.mask, self.starts = self._map("mask.bin", np.bool_), self._map("starts.bin", np.int64)

    def _map(self, name, dtype):
        return np.memmap(self.folder / name, dtype, "r").view(np.ndarray)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        start, end = self.starts[i], self.starts[i + 1]
        return self.tokens[start:end], self.mask[start:end]

    def lengths(self, indices):
        """The numbers of tokens of these sequences."""
        return self.starts[np.asarray(indices) + 1] - self.starts[indices]

    def labels(self) -> list:
        """The encoder's labels, in order."""
        with open(self.folder / "labels.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]


class Subset:
    """The sequences of a TokenDataset with these indices."""

    def __init__(self, dataset: TokenDataset, indices, stats: dict):
        self.dataset, self.indices, self.stats, self.reopen = dataset, np.asarray(indices), stats, dataset.reopen

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.dataset[self.indices[i]]

    def lengths(self, indices):
        """The numbers of tokens of these sequences."""
        return self.dataset.lengths(self.indices[indices])


def load_dataset(encode, paths: list, tokenizer: Tokenizer, max_seq_len: int) -> TokenDataset:
    """Tokenise the files, or open what an earlier call made of them.

    The cache is keyed by the files' names and contents, the tokenizer, the encoder and max_seq_len. What was dropped or
    cut is printed and kept in `stats`, and so are keys that nothing reads. Raises UserError with file and line.
    """
    paths = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    for path in paths:
        check_file(path)
    sources = {path: identity(path) for path in paths}
    contents = [[os.path.basename(path), content_hash(path)] for path in paths]
    kind = encode.__name__.removeprefix("encode_")
    key = json.dumps([FORMAT, kind, max_seq_len, contents, tokenizer.document, tokenizer.chat_format,
                      tokenizer.bos_id, tokenizer.endoftext_id], sort_keys=True)
    folder = CACHE / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    while int(os.environ.get("LOCAL_RANK", 0)) and damage(folder):
        time.sleep(0.2)  # under torchrun one process of each machine tokenises; if it fails, torchrun ends the others
    if damage(folder):
        _make(encode, paths, sources, tokenizer, max_seq_len, folder)
    dataset = TokenDataset(folder)
    lost = "".join(f"; {count:,} {reason}" for reason, count in dataset.stats.items() if reason not in FACTS)
    say(f"{', '.join(paths)}: {dataset.stats['documents']:,} documents, {dataset.stats['tokens']:,} tokens{lost}")
    for path, lines in zip(sources, dataset.stats.get("unknown keys", [])):
        UnknownKeys(lines).tell(path)
    return dataset


# Which files a cache was made from, and whether it is still what was written.

def identity(path) -> tuple:
    """What changes when a file does: its size, times and number. None for one that is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def check_unchanged(sources: dict):
    """Raise UserError if one of the files is not what it was when reading began."""
    for path, before in sources.items():
        if identity(path) != before:
            raise UserError(f"{path}: changed while it was read; run the command again once nothing writes to it")


def damage(folder: Path) -> str:
    """What is wrong with a cache; "" if it is whole."""
    if not os.path.lexists(folder):
        return "missing"
    try:
        _read_summary(folder, "stats.json")
    except (UserError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return str(error)
    return ""


def _save_summary(folder: Path, name: str, content: dict):
    """A JSON file with a checksum of its own. content["files"] has the size and the checksum of each file."""
    save_json(folder / name, {**content, "checksum": zlib.crc32(json.dumps(content, sort_keys=True).encode())})


def _read_summary(folder: Path, name: str) -> dict:
    """What _save_summary wrote. Raises UserError, OSError, ValueError, TypeError or KeyError for any change."""
    content = load_json(folder / name)
    if content.pop("checksum") != zlib.crc32(json.dumps(content, sort_keys=True).encode()):
        raise ValueError(f"{name} has another checksum")
    for file_name in FILES:
        size, checksum = content["files"][file_name]
        with open_file(folder / file_name) as file:
            found = 0
            while size > 0 and (block := file.read(min(size, 1 << 20))):
                found, size = zlib.crc32(block, found), size - len(block)
            if size or found != checksum or name == "stats.json" and file.read(1):
                raise ValueError(f"{file_name} has another checksum or size")
    return content


# Making one.

def _make(encode, paths, sources: dict, tokenizer, max_seq_len, folder: Path):
    """Build the cache in a folder of another name, or go on with what a killed run left there; then rename it."""
    part = Path(f"{folder}.part")
    try:
        with contextlib.ExitStack() as opened:
            tokens_file = opened.enter_context(_claim(part, sources))
            if reason := damage(folder):  # otherwise another run has made it in the meantime
                if reason != "missing":
                    say(f"{folder}: the token cache is damaged ({reason}); it is made again")
                    _discard(folder)
                _discard_leftovers(part)
                files = {"tokens.bin": tokens_file}
                for name in FILES[1:]:
                    files[name] = opened.enter_context(open_file(part / name, writable=True))
                _build(encode, paths, sources, tokenizer, max_seq_len, part, files)
                if os.name == "nt":  # Windows renames no folder that holds an open file
                    opened.close()
                os.replace(part, folder)
                flush_folder(CACHE)
                return
        _discard(part)
    except BrokenProcessPool:
        raise UserError("a tokenising process was killed, perhaps because memory ran out; "
                        "run the command again, it goes on where this one was") from None
    except (UserError, OSError) as error:
        _discard(part)
        if isinstance(error, UserError):
            check_unchanged(sources)  # a line that was being written is no mistake in the data
            raise
        raise UserError(f"{folder}: the token cache cannot be written ({error}); "
                        "set MINILLM_CACHE to a folder with room") from None
    finally:
        if not (part / "progress.json").exists():
            _discard(part)


def _claim(part: Path, sources: dict):
    """tokens.bin of an unfinished cache, locked: whoever has the lock is the one that works in this folder."""
    waiting = False
    while True:
        if part.is_symlink() or part.exists() and not part.is_dir():  # not ours
            _discard(part)
        part.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process has just finished and renamed the folder
            file = open_file(part / "tokens.bin", writable=True)
            if try_lock(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(part / "tokens.bin")):
                return file
            file.close()
        if not waiting:
            say(f"another run is tokenising {', '.join(sources)}: waiting for it")
            waiting = True
        time.sleep(0.2)


def _discard(folder: Path):
    """Remove a folder, and never half of it: it is renamed first."""
    gone = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.tmp")
    with contextlib.suppress(OSError):  # it is gone already; or Windows, where another process works in it
        os.replace(folder, gone)
        if gone.is_dir() and not gone.is_symlink():
            shutil.rmtree(gone, ignore_errors=True)
        else:
            gone.unlink()


def _discard_leftovers(ours: Path):
    """Remove what killed runs left of other caches."""
    for folder in list(ours.parent.iterdir()):
        if folder != ours and re.fullmatch(r"\w+-[0-9a-f]{20}(\.\w+)*\.(part|tmp)", folder.name):
            with contextlib.suppress(OSError), open_file(folder / "tokens.bin") as file:
                if not try_lock(file):
                    continue
            _discard(folder)


def _build(encode, paths, sources, tokenizer, max_seq_len, part, files):
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    size = sum(os.path.getsize(path) for path in paths)
    workers = min(allowed_threads(), 1 + size // PARALLEL)
    if workers > 1:
        say(f"tokenising {size / 1e6:,.0f} MB in {workers} processes, once")
    done = {"files": {name: [0, 0] for name in FILES}, "chunks": 0, "bytes": 0, "stats": {}, "trained": 0,
            "unknown": [{} for _ in sources]}
    with contextlib.suppress(UserError, OSError, ValueError, TypeError, KeyError, RecursionError):
        done = _read_summary(part, "progress.json")
        say(f"{done['bytes'] / 1e6:,.0f} MB of them were tokenised before a run was ended: going on from there")
    for name, file in files.items():
        file.truncate(done["files"][name][0])
        file.seek(0, os.SEEK_END)

    def write(name, data: bytes):
        files[name].write(data)
        before, checksum = done["files"][name]
        done["files"][name] = [before + len(data), zlib.crc32(data, checksum)]

    def flush():
        check_unchanged(sources)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())

    if not done["chunks"]:
        write("starts.bin", np.zeros(1, np.int64).tobytes())
    stats, flushed = Counter(done["stats"]), done["bytes"]
    unknown = {path: UnknownKeys(lines) for path, lines in zip(sources, done["unknown"])}
    jobs = ((encode, path, lines, max_seq_len) for path in paths for lines in chunks(path))
    jobs = itertools.islice(jobs, done["chunks"], None)
    total = None if any(is_gzipped(p) for p in paths) else size
    with tqdm(total=total, initial=done["bytes"], desc="tokenising", unit="B", unit_scale=True,
              disable=workers == 1 or not sys.stderr.isatty()) as bar:
        for tokens, mask, lengths, labels, new_stats, (path, keys), read in encode_all(jobs, tokenizer, workers):
            count = done["files"]["mask.bin"][0]
            write("tokens.bin", tokens.astype(dtype).tobytes())
            write("mask.bin", mask.tobytes())
            write("starts.bin", (count + np.cumsum(lengths)).astype(np.int64).tobytes())
            write("labels.jsonl", "".join(json.dumps(label) + "\n" for label in labels).encode())
            done["trained"] += int(mask.sum())
            stats = stats + new_stats
            unknown[path].merge(keys)
            done.update(chunks=done["chunks"] + 1, bytes=done["bytes"] + read, stats=dict(stats),
                        unknown=[{key[:100]: line for key, line in keys.lines.items()} for keys in unknown.values()])
            bar.update(read)
            if done["bytes"] - flushed >= PART:
                flush()
                _save_summary(part, "progress.json", done)
                flushed = done["bytes"]
    count = done["files"]["mask.bin"][0]
    if not count:
        lost = "; ".join(f"{number:,} {reason}" for reason, number in stats.items() if reason not in FACTS)
        raise UserError(f"{', '.join(paths)}: nothing to train on ({lost})")
    flush()
    stats = {**stats, "tokens": count, "trained tokens": done["trained"], "dtype": np.dtype(dtype).name}
    if any(done["unknown"]):
        stats["unknown keys"] = done["unknown"]
    _save_summary(part, "stats.json", {"stats": stats, "files": done["files"]})
    (part / "progress.json").unlink(missing_ok=True)


# Chunks of lines, encoded in several processes.

def chunks(path: str):
    """Group the lines of a file for encode_lines. A group of plain text is one document of about 16,000 characters."""
    plain = is_text(path)
    size = 1 << 14 if plain else 1 << 18
    group, total, number = [], 0, None
    for number, text in read_lines(path, blank=plain):
        # a single line of plain text may be the whole book
        for part in [text[i:i + size] for i in range(0, len(text), size)] if plain else [text]:
            group.append((number, part))
            total += len(part)
            if total >= size:
                yield group
                group, total = [], 0
    if group:
        yield group
    if number is None:
        raise UserError(f"{path}: the file is empty")


def encode_lines(job, tokenizer: Tokenizer) -> tuple:
    """Encode a chunk -> (tokens, mask, lengths, labels, stats, (path, its unknown keys), size in bytes).

    Raises UserError with file and line.
    """
    encode, path, lines, max_seq_len = job
    if is_text(path):
        records = [(lines[0][0], {"text": "".join(text for _, text in lines)})]
    else:
        records = [(number, parse_line(text, f"{path}:{number}")) for number, text in lines]
    stats, tokens, mask, lengths, labels = Counter(documents=len(records)), [], [], [], []
    unknown = UnknownKeys()
    for number, record in records:
        unknown.add(record, number, encode.__name__)
        for sequence, loss_mask, *label in encode(record, f"{path}:{number}", tokenizer, max_seq_len, stats):
            tokens += sequence
            mask += loss_mask
            lengths.append(len(sequence))
            labels += label
    size = sum(len(text.encode()) for _, text in lines)
    arrays = np.array(tokens, np.uint32), np.array(mask, bool), np.array(lengths, np.int64)
    return *arrays, labels, stats, (path, unknown), size


def encode_all(jobs, tokenizer: Tokenizer, workers: int):
    """Yield encode_lines of each job, in order; with several workers, in that many processes."""
    if workers == 1:
        for job in jobs:
            yield encode_lines(job, tokenizer)
        return
    # "spawn" everywhere: a fork may hang when the process already runs threads, as it does with torch.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,))
    try:
        waiting = []
        for job in jobs:
            waiting.append(pool.submit(_encode_in_worker, job))
            if len(waiting) >= workers * 4:  # more would pile up in memory, up to the whole file
                yield waiting.pop(0).result()
        for result in waiting:
            yield result.result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker = {}  # in a worker process: its tokenizer, which is sent once instead of with every chunk


def _start_worker(tokenizer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["tokenizer"] = tokenizer


def _end_with_parent():
    # Without this, a worker whose parent was killed would wait for work forever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(job):
    return encode_lines(job, _worker["tokenizer"])
