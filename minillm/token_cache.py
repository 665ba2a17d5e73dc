"""Data files as token sequences in memory-mapped files. A file far larger than memory is tokenised once, on all cores.

    lines -> encode(record) in several processes -> .cache/KIND-HASH/{tokens.bin, mask.bin, starts.bin, stats.json}

The encoder decides what a record becomes (encode_text and encode_conversation in data.py, encode_pair in
preferences.py). encode(record, where, tokenizer, max_seq_len, stats) returns a list of sequences (tokens, loss mask)
or (tokens, loss mask, label). It counts in `stats` what it drops or cuts, by reason.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minillm.errors import UserError
from minillm.records import UnknownKeys, check_file, content_hash, is_gzipped, is_text, parse_line, read_lines
from minillm.runtime import say
from minillm.tokenizer import Tokenizer

CACHE = Path(os.environ.get("MINILLM_CACHE", ".cache"))
FORMAT = 4  # increase it when the meaning of a cached file changes
PARALLEL = 1 << 23  # bytes of data per worker process: a smaller file is not worth starting one
# Every other key of the stats counts what was lost.
FACTS = ("documents", "bytes", "tokens", "trained tokens", "dtype", "unknown keys")


class TokenDataset:
    """len() token sequences; [i] -> (tokens, mask) as arrays, read from the mapped files; `stats`: what went in."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.stats = json.loads((self.folder / "stats.json").read_text(encoding="utf-8"))
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
        return json.loads((self.folder / "labels.json").read_text(encoding="utf-8"))


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
    contents = [[os.path.basename(path), content_hash(path)] for path in paths]
    kind = encode.__name__.removeprefix("encode_")
    key = json.dumps([FORMAT, kind, max_seq_len, contents, tokenizer.document, tokenizer.chat_format,
                      tokenizer.bos_id, tokenizer.endoftext_id], sort_keys=True)
    folder = CACHE / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    done = folder / "stats.json"
    while int(os.environ.get("LOCAL_RANK", 0)) and not done.exists():
        time.sleep(0.2)  # under torchrun one process of each machine tokenises; if it fails, torchrun ends the others
    if not done.exists():
        temporary = Path(f"{folder}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            _build(encode, paths, tokenizer, max_seq_len, temporary)
            os.replace(temporary, folder)
        except OSError as error:
            if not done.exists():  # otherwise another run has made it in the meantime
                raise UserError(f"{folder}: the token cache cannot be written ({error}); "
                                "set MINILLM_CACHE to a folder with room") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    dataset = TokenDataset(folder)
    lost = "".join(f"; {count:,} {reason}" for reason, count in dataset.stats.items() if reason not in FACTS)
    say(f"{', '.join(paths)}: {dataset.stats['documents']:,} documents, {dataset.stats['tokens']:,} tokens{lost}")
    for path, lines in zip(paths, dataset.stats.get("unknown keys", [])):
        UnknownKeys(lines).tell(path)
    return dataset


def _build(encode, paths, tokenizer, max_seq_len, folder):
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    size = sum(os.path.getsize(p) for p in paths)
    workers = min(os.cpu_count() or 1, 1 + size // PARALLEL)
    if workers > 1:
        say(f"tokenising {size / 1e6:,.0f} MB in {workers} processes, once")
    total = None if any(is_gzipped(p) for p in paths) else size
    stats, labels, count, trained = Counter(), [], 0, 0
    unknown = {path: UnknownKeys() for path in paths}
    jobs = ((encode, path, lines, max_seq_len) for path in paths for lines in chunks(path))
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "mask.bin", "wb") as mask_file, \
            open(folder / "starts.bin", "wb") as starts_file, \
            tqdm(total=total, desc="tokenising", unit="B", unit_scale=True,
                 disable=workers == 1 or not sys.stderr.isatty()) as bar:
        starts_file.write(np.zeros(1, np.int64).tobytes())
        for tokens, mask, lengths, new_labels, new_stats, (path, keys), done in encode_all(jobs, tokenizer, workers):
            tokens_file.write(tokens.astype(dtype).tobytes())
            mask_file.write(mask.tobytes())
            starts_file.write((count + np.cumsum(lengths)).astype(np.int64).tobytes())
            count += len(tokens)
            trained += int(mask.sum())
            labels += new_labels
            stats = stats + new_stats
            unknown[path].merge(keys)
            bar.update(done)
    if not count:
        lost = "; ".join(f"{number:,} {reason}" for reason, number in stats.items() if reason not in FACTS)
        raise UserError(f"{', '.join(paths)}: nothing to train on ({lost})")
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    stats = {**stats, "tokens": count, "trained tokens": trained, "dtype": np.dtype(dtype).name}
    if any(keys.lines for keys in unknown.values()):
        stats["unknown keys"] = [keys.lines for keys in unknown.values()]
    (folder / "stats.json").write_text(json.dumps(stats), encoding="utf-8")


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
        unknown.add(record, number)
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
    except BrokenProcessPool:
        raise UserError("a tokenising process was killed, perhaps because memory ran out; nothing was cached, "
                        "run the command again") from None
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
