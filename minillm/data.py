"""From files to batches.

    JSON lines -> token sequences with loss masks -> a cache on disk, mapped into memory -> rows packed with whole documents

Everything streams: a file far larger than memory is tokenised once, on all cores, into `.cache/` (keyed by the file, the
tokenizer and the settings), and read from there through a memory map.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minillm.errors import UserError
from minillm.tokenizer import Tokenizer

CACHE = Path(os.environ.get("MINILLM_CACHE", ".cache"))
FORMAT = 1  # counted up when the meaning of a cached file changes
WINDOW = 2048  # sequences that are shuffled and packed together
SPAN = 64  # a window is made of so long runs of neighbours, from all over the file
PARALLEL = 1 << 23  # bytes from which on it pays to start a process per core
ROLES = ("system", "user", "assistant", "tool")


# Reading: one line, one object, and for every mistake the file and the line.

def read_lines(path, blank: bool = False):
    """Yield (line number, text with its line end) of a UTF-8 file, .gz or not; blank lines only if asked for. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such data file")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}:{number}: not valid UTF-8 (byte {e.start + 1} of the line); convert the file to UTF-8") from None
                if blank or text.strip():
                    yield number, text
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None


def parse_line(text: str, where: str) -> dict:
    """One JSON object; `where` ("file:line") begins the message of the UserError."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        why = f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else e  # its own text counts lines anew
        raise UserError(f"{where}: not JSON ({why}); one object per line is needed") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object like {{...}}, not a {type(record).__name__}")
    return record


def read_records(paths, check=None):
    """Yield the objects of JSON-lines files; check(record, where) may raise UserError. An empty file is an error."""
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        number = None
        for number, text in read_lines(path):
            record = parse_line(text, f"{path}:{number}")
            if check:
                check(record, f"{path}:{number}")
            yield record
        if number is None:
            raise UserError(f"{path}: the file is empty")


def check_text(value, where: str, name: str):
    """Raise UserError unless value is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name} holds half of a surrogate pair (\\ud800-\\udfff), which is no character") from None


def check_messages(messages, where: str, key: str = "conversations"):
    """Raise UserError unless `messages` is a list of {"role", "content"} with known roles and text."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: "{key}" must be a list of messages with at least one')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f'{where}: message {i + 1} of "{key}" needs "role" and "content"')
        if message["role"] not in ROLES:
            raise UserError(f'{where}: message {i + 1} of "{key}" has the unknown role {message["role"]!r}; known: {", ".join(ROLES)}')
        check_text(message["content"], where, f'"content" of message {i + 1} of "{key}"')


def require(record: dict, key: str, where: str):
    """record[key], or UserError that names the keys that are there."""
    if key not in record:
        raise UserError(f'{where}: no key "{key}"; found: {", ".join(map(repr, record)) or "nothing"}')
    return record[key]


def check_conversation(record: dict, where: str):
    """Raise UserError unless record is a line of SFT data or a prompt."""
    check_messages(require(record, "conversations", where), where)


# Encoding: one record becomes sequences (tokens, loss mask) of at most max_seq_len tokens.

def encode_text(text: str, tokenizer: Tokenizer, max_seq_len: int, stats: dict) -> list:
    """<|endoftext|> text <|endoftext|>, cut into pieces where it is longer than max_seq_len.

    A piece begins with the last token of the piece before: the first token of a row is never a target, so this way
    every token of the document is trained on exactly once.
    """
    if not text.strip():
        stats["blank, dropped"] += 1
        return []
    end = tokenizer.endoftext_id
    tokens = [end, *tokenizer.encode(text), end]
    if len(tokens) > max_seq_len:
        stats["cut into pieces"] += 1
    pieces = [tokens[i:i + max_seq_len] for i in range(0, len(tokens) - 1, max_seq_len - 1)]
    stats["bytes"] += len(text.encode())
    return [(piece, [False] + [True] * (len(piece) - 1)) for piece in pieces]


def encode_conversation(messages: list, tokenizer: Tokenizer, max_seq_len: int, stats: dict) -> list:
    """ChatML tokens with their loss mask. Too long: cut at the end, and counted; nothing left to learn: dropped, and counted."""
    tokens, mask = tokenizer.render(messages)
    if not any(mask):
        stats["without an assistant turn, dropped"] += 1
        return []
    if len(tokens) > max_seq_len:
        kept = any(mask[:max_seq_len])
        stats["longer than --max_seq_len, cut" if kept else "prompt alone longer than --max_seq_len, dropped"] += 1
        stats["trained tokens lost to --max_seq_len"] += sum(mask[max_seq_len:])
        return [(tokens[:max_seq_len], mask[:max_seq_len])] if kept else []
    return [(tokens, mask)]


COUNTED = ["documents", "bytes", "cut into pieces", "blank, dropped", "without an assistant turn, dropped", "longer than --max_seq_len, cut",
           "prompt alone longer than --max_seq_len, dropped", "trained tokens lost to --max_seq_len"]


def new_stats(kind: str) -> dict:
    """What is counted while a file is encoded; of preference pairs also the kind and the margin of each."""
    if kind == "preference":
        return {**dict.fromkeys(COUNTED[:2] + PAIRS_COUNTED, 0), "pairs": []}
    return dict.fromkeys(COUNTED, 0)


def is_plain(kind: str, path: str) -> bool:
    """Whether a file is text as it stands; every other one holds a JSON object per line."""
    return kind == "text" and path.endswith((".txt", ".txt.gz"))


def encode_lines(job, tokenizer: Tokenizer) -> tuple:
    """Encode a chunk of lines -> (tokens, mask, lengths, stats, size in bytes). Raises UserError with file and line."""
    kind, path, lines, max_seq_len = job
    stats, tokens, mask, lengths = new_stats(kind), [], [], []
    for number, text in lines:
        where = f"{path}:{number}"
        if is_plain(kind, path):
            sequences = encode_text(text, tokenizer, max_seq_len, stats)
        elif kind == "text":
            text_of_record = require(parse_line(text, where), "text", where)
            check_text(text_of_record, where, '"text"')
            sequences = encode_text(text_of_record, tokenizer, max_seq_len, stats)
        elif kind == "preference":
            record = parse_line(text, where)
            check_preference(record, where)
            sequences = encode_pair(record, tokenizer, max_seq_len, stats)
        else:
            record = parse_line(text, where)
            check_conversation(record, where)
            sequences = encode_conversation(record["conversations"], tokenizer, max_seq_len, stats)
        stats["documents"] += 1
        for t, m in sequences:
            tokens += t
            mask += m
            lengths.append(len(t))
    size = sum(len(text.encode()) for _, text in lines)
    return np.array(tokens, np.uint32), np.array(mask, bool), np.array(lengths, np.int64), stats, size


def chunks(path: str, kind: str):
    """Group the lines of a file for `encode_lines`; of plain text each group is one document of about 16,000 characters."""
    plain = is_plain(kind, path)
    size = 1 << 14 if plain else 1 << 18
    group, total, number = [], 0, None
    for number, text in read_lines(path, blank=plain):
        for part in [text[i:i + size] for i in range(0, len(text), size)] if plain else [text]:  # a line may be the whole book
            group.append((number, part))
            total += len(part)
            if total >= size:
                yield [(group[0][0], "".join(t for _, t in group))] if plain else group
                group, total = [], 0
    if group:
        yield [(group[0][0], "".join(t for _, t in group))] if plain else group
    if number is None:
        raise UserError(f"{path}: the file is empty")


def encode_all(jobs, tokenizer: Tokenizer, workers: int):
    """Yield encode_lines of each job, in order; with several workers, in that many processes."""
    if workers == 1:
        for job in jobs:
            yield encode_lines(job, tokenizer)
        return
    # "spawn" everywhere: a fork of a process that already runs threads (torch does) may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,))
    try:
        waiting = []
        for job in jobs:
            waiting.append(pool.submit(_encode_in_worker, job))
            if len(waiting) >= workers * 4:  # no more than this, or the whole file would pile up in memory
                yield waiting.pop(0).result()
        for result in waiting:
            yield result.result()
    except BrokenProcessPool:
        raise UserError("a tokenising process was killed, perhaps for want of memory; the data was not cached, run the command again") from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker = {}  # in a worker process: its tokenizer, sent once and not with every chunk


def _start_worker(tokenizer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    _worker["tokenizer"] = tokenizer


def _encode_in_worker(job):
    return encode_lines(job, _worker["tokenizer"])


# The cache: flat arrays of all tokens and masks, and where each sequence begins.

class TokenDataset:
    """Token sequences in three mapped files. len() sequences; [i] -> (tokens, mask) as arrays; `stats` tells what went in."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.stats = json.loads((self.folder / "stats.json").read_text(encoding="utf-8"))
        self.reopen()

    def reopen(self):
        """Map the files anew: pages that were read count as this process's memory until their mapping is gone."""
        read = lambda name, dtype: np.memmap(self.folder / name, dtype, "r").view(np.ndarray)
        self.tokens = read("tokens.bin", np.dtype(self.stats["dtype"]))
        self.mask, self.starts = read("mask.bin", np.bool_), read("starts.bin", np.int64)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        a, b = self.starts[i], self.starts[i + 1]
        return self.tokens[a:b], self.mask[a:b]

    def lengths(self, indices):
        """The numbers of tokens of these sequences."""
        return self.starts[np.asarray(indices) + 1] - self.starts[indices]


class Part:
    """A TokenDataset without some sequences (`held_out`, sorted numbers), or with these alone (`only`)."""

    def __init__(self, dataset: TokenDataset, held_out, only: bool, stats: dict):
        self.dataset, self.held_out, self.only, self.stats = dataset, np.asarray(held_out), only, stats
        self.reopen = dataset.reopen
        self.skip = self.held_out - np.arange(len(self.held_out))  # held-out number j stands after skip[j] others

    def __len__(self):
        return len(self.held_out) if self.only else len(self.dataset) - len(self.held_out)

    def _place(self, i):
        return self.held_out[i] if self.only else np.asarray(i) + np.searchsorted(self.skip, i, side="right")

    def __getitem__(self, i):
        return self.dataset[self._place(i)]

    def lengths(self, indices):
        """The numbers of tokens of these sequences."""
        return self.dataset.lengths(self._place(indices))


def load_split(kind: str, paths: list, eval_path: str, tokenizer: Tokenizer, max_seq_len: int, seed: int, say=print) -> tuple:
    """(training data, held-out data): the held-out file when one is given, else 5 % (at most 500) of the sequences, by seed."""
    dataset = load_dataset(kind, paths, tokenizer, max_seq_len, say)
    if eval_path:
        return dataset, load_dataset(kind, [eval_path], tokenizer, max_seq_len, say)
    if len(dataset) < 2:
        say("a single sequence: it is trained on and evaluated on")
        return dataset, dataset
    count = max(1, min(500, len(dataset) // 20))
    held_out = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False))
    say(f"held out for evaluation: {count:,} of {len(dataset):,} sequences")
    # The UTF-8 bytes that the held-out targets stand for (the first token of a sequence is no target).
    targets = [t for i in held_out for t in dataset[i][0][1:].tolist() if t != tokenizer.endoftext_id]
    size = len(tokenizer.decode_bytes(targets)) if kind == "text" else 0
    return (Part(dataset, held_out, only=False, stats={**dataset.stats, "sequences held out": count}),
            Part(dataset, held_out, only=True, stats={"bytes": size, "sequences": count}))


def load_dataset(kind: str, paths: list, tokenizer: Tokenizer, max_seq_len: int, say=print) -> TokenDataset:
    """Tokenise the files ("text" for pretraining, "chat" for SFT, "preference" for pairs), or open what an earlier call made of them.

    The cache is keyed by each file's path, size and time of change, the tokenizer, the kind and max_seq_len. Raises
    UserError for bad input, with file and line. What was dropped or cut is said and stands in `stats`.
    """
    paths = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such data file")
    identity = [[os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in paths]
    key = json.dumps([FORMAT, kind, max_seq_len, identity, tokenizer.document], sort_keys=True)
    folder = CACHE / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    done = folder / "stats.json"
    while int(os.environ.get("LOCAL_RANK", 0)) and not done.exists():
        time.sleep(0.2)  # started by torchrun: the first process of each machine makes it (and if it fails, all are ended)
    if not done.exists():
        temporary = Path(f"{folder}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            _build(kind, paths, tokenizer, max_seq_len, temporary, say)
            os.replace(temporary, folder)
        except OSError as e:
            if not done.exists():  # else another run made it meanwhile
                raise UserError(f"{folder}: the token cache cannot be written ({e}); set MINILLM_CACHE to a folder with room") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    dataset = TokenDataset(folder)
    noted = {k: v for k, v in dataset.stats.items() if v and k in COUNTED[2:] + PAIRS_COUNTED}
    say(f"{', '.join(map(str, paths))}: {dataset.stats['documents']:,} documents, {dataset.stats['tokens']:,} tokens"
        + "".join(f"; {v:,} {k}" for k, v in noted.items()))
    return dataset


def _build(kind, paths, tokenizer, max_seq_len, folder, say):
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    size = sum(os.path.getsize(p) for p in paths)
    workers = min(os.cpu_count() or 1, 1 + size // PARALLEL)
    if workers > 1:
        say(f"tokenising {size / 1e6:,.0f} MB in {workers} processes, once")
    total = None if any(p.endswith(".gz") for p in paths) else size
    totals, count, trained = new_stats(kind), 0, 0
    jobs = ((kind, path, lines, max_seq_len) for path in paths for lines in chunks(path, kind))
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "mask.bin", "wb") as mask_file, \
            open(folder / "starts.bin", "wb") as starts_file, \
            tqdm(total=total, desc="tokenising", unit="B", unit_scale=True, disable=workers == 1 or not sys.stderr.isatty()) as bar:
        starts_file.write(np.zeros(1, np.int64).tobytes())
        for tokens, mask, lengths, stats, done in encode_all(jobs, tokenizer, workers):
            tokens_file.write(tokens.astype(dtype).tobytes())
            mask_file.write(mask.tobytes())
            starts_file.write((count + np.cumsum(lengths)).astype(np.int64).tobytes())
            count += len(tokens)
            trained += int(mask.sum())
            totals = {k: v + stats[k] for k, v in totals.items()}
            bar.update(done)
    if kind == "preference":
        (folder / "pairs.json").write_text(json.dumps(totals.pop("pairs")), encoding="utf-8")
    if not count:
        dropped = "; ".join(f"{v:,} {k}" for k, v in totals.items() if v and k not in COUNTED[:3])
        raise UserError(f"{', '.join(paths)}: nothing to train on ({dropped})")
    (folder / "stats.json").write_text(json.dumps({**totals, "tokens": count, "trained tokens": trained, "dtype": np.dtype(dtype).name}), encoding="utf-8")


# Batches: rows packed with whole sequences.

def to_device(tensor, device):
    """The tensor there. On CUDA from pinned memory: the program does not wait until the device has come to the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)


@dataclass
class Batch:
    """Packed rows. tokens (B, T) int64; loss_mask (B, T) bool; doc_ids (B, T) int64, equal within a document, -1 on padding."""

    tokens: torch.Tensor
    loss_mask: torch.Tensor
    doc_ids: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.doc_ids >= 0).sum())

    def to(self, device):
        """The same batch on a device."""
        return Batch(*(to_device(t, device) for t in (self.tokens, self.loss_mask, self.doc_ids)))


def pack(lengths, row_length: int) -> list:
    """Best-fit decreasing: lists of indices whose lengths add up to at most row_length, few rows, little room left.

    Raises ValueError for a length that fits no row.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a sequence of {lengths.max()} tokens does not fit a row of {row_length}")
    rows, with_room = [], [[] for _ in range(row_length + 1)]  # with_room[r]: rows that have room for r more tokens
    rooms = 0  # bit r is set while with_room[r] holds a row: the best fit is the lowest bit from the length upwards
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist()):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, []
            rows.append(row)
        row.append(i)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def ahead(items, depth: int = 2):
    """Yield the items of an iterator; the next `depth` are made on another thread meanwhile."""
    ready, closed = queue.Queue(depth), threading.Event()
    # No daemon: Python stops those wherever they are when it ends, and inside PyTorch that aborts the whole program.
    stopped = lambda: closed.is_set() or not threading.main_thread().is_alive()

    def put(kind, value):
        while not stopped():
            with contextlib.suppress(queue.Full):
                return ready.put((kind, value), timeout=0.1)

    def work():
        try:
            for item in items:
                put("item", item)
                if stopped():
                    return
            put("end", None)
        except BaseException as error:  # it belongs to who waits for the items
            put("error", error)

    threading.Thread(target=work).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        closed.set()


class PackedLoader:
    """Endless batches of packed rows, shuffled anew each epoch; `state()` says where it is, `load_state` goes there.

    A window of WINDOW sequences (runs of SPAN neighbours from all over the file) is shuffled and packed at a time, so that
    memory stays flat however large the file is; what fits into one window is shuffled completely. Of each batch_size x
    world rows, every one of the `world` processes takes batch_size: together they train on the rows that one process
    would take with a batch_size that much larger.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, row_length: int, seed: int, rank: int = 0, world: int = 1, shuffle: bool = True):
        self.dataset, self.batch_size, self.row_length = dataset, batch_size, row_length
        self.seed, self.rank, self.world, self.shuffle = seed, rank, world, shuffle
        self.epoch = self.taken = 0  # batches taken of this epoch

    def state(self) -> dict:
        """Where the loader is, as plain numbers: the next batch is number `taken` of `epoch`."""
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state(self, state: dict):
        """Go to where `state()` was called; an iterator made before must not be used any more."""
        self.epoch, self.taken = state["epoch"], state["taken"]

    def rows(self, epoch: int):
        """Yield the rows of an epoch as arrays of sequence numbers."""
        order = np.random.default_rng([self.seed, epoch])
        spans = np.arange(0, len(self.dataset), SPAN)
        if self.shuffle:
            order.shuffle(spans)
        for i in range(0, len(spans), WINDOW // SPAN):
            indices = np.concatenate([np.arange(start, min(start + SPAN, len(self.dataset))) for start in spans[i:i + WINDOW // SPAN]])
            if self.shuffle:
                order.shuffle(indices)
            self.dataset.reopen()
            rows = pack(self.dataset.lengths(indices), self.row_length)
            if self.shuffle:  # best-fit decreasing sorted them by length
                order.shuffle(rows)
            yield from (indices[row] for row in rows)

    def batches(self, epoch: int) -> int:
        """How many batches an epoch has: the same number for each process."""
        return -(-sum(1 for _ in self.rows(epoch)) // (self.batch_size * self.world))

    def epoch_batches(self, epoch: int, skip: int = 0):
        """Yield this process's batches of one epoch, the first `skip` left out."""
        rows = self.rows(epoch)
        for number in itertools.count():
            group = list(itertools.islice(rows, self.batch_size * self.world))
            if not group:
                return
            if number >= skip:
                mine = group[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]
                yield self.collate(mine or [[]])  # at the end of an epoch a process may be left with padding alone

    def __iter__(self):
        def endless(epoch, taken):
            while True:
                for taken, batch in enumerate(self.epoch_batches(epoch, taken), taken + 1):
                    yield epoch, taken, batch
                epoch, taken = epoch + 1, 0

        for self.epoch, self.taken, batch in ahead(endless(self.epoch, self.taken)):
            yield batch

    def collate(self, rows: list) -> Batch:
        """Rows of sequence numbers -> a Batch."""
        shape = (len(rows), self.row_length)
        tokens, mask, doc_ids = np.zeros(shape, np.int64), np.zeros(shape, bool), np.full(shape, -1, np.int64)
        for b, row in enumerate(rows):
            at = 0
            for document, index in enumerate(row):
                t, m = self.dataset[index]
                tokens[b, at:at + len(t)] = t
                mask[b, at:at + len(t)] = m
                mask[b, at] = False  # the first token of a document has nothing to be predicted from
                doc_ids[b, at:at + len(t)] = document
                at += len(t)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(doc_ids))


# Preference pairs: two answers to one prompt. In the cache a pair is two sequences, the chosen and the rejected one; the
# mask is True on the answer and the <|im_end|> that closes it.

PAIRS_COUNTED = ["pairs without an assistant's answer at the end, dropped", "pairs with different prompts, dropped", "pairs with an empty answer, dropped",
               "pairs whose prompt leaves no room for an answer, dropped", "pairs with an answer cut at --max_seq_len", "pairs with equal answers, dropped"]


def check_preference(record: dict, where: str):
    """Raise UserError unless record is a pair: two lists of messages, and perhaps a number "margin"."""
    for side in ("chosen", "rejected"):
        check_messages(require(record, side, where), where, side)
    margin = record.get("margin", 0)
    if type(margin) not in (int, float) or not math.isfinite(margin):
        raise UserError(f'{where}: "margin" must be a number, not {margin!r}')


def encode_pair(record: dict, tokenizer: Tokenizer, max_seq_len: int, stats: dict) -> list:
    """[(tokens, mask) of the chosen side, of the rejected one]; [] where there is nothing to learn, which is counted.

    The prompt is encoded once for both sides. Too long: the answers lose their ends, never the prompt its beginning.
    """
    def drop(reason):
        stats[reason] += 1
        return []

    sides = [[(m["role"], m["content"]) for m in record[side]] for side in ("chosen", "rejected")]
    if not sides[0][-1][0] == sides[1][-1][0] == "assistant":
        return drop("pairs without an assistant's answer at the end, dropped")
    if sides[0][:-1] != sides[1][:-1]:
        return drop("pairs with different prompts, dropped")
    if not all(side[-1][1].strip() for side in sides):
        return drop("pairs with an empty answer, dropped")
    prompt, _ = tokenizer.render(record["chosen"][:-1], add_generation_prompt=True)
    if len(prompt) >= max_seq_len:
        return drop("pairs whose prompt leaves no room for an answer, dropped")
    whole = [prompt + tokenizer.encode(side[-1][1]) + [tokenizer.end_id] for side in sides]
    chosen, rejected = (tokens[:max_seq_len] for tokens in whole)
    if chosen == rejected:  # perhaps only after the cut: such a pair would cost ln 2 for ever and teach nothing
        return drop("pairs with equal answers, dropped")
    stats["pairs with an answer cut at --max_seq_len"] += max(map(len, whole)) > max_seq_len
    stats["pairs"].append([str(record.get("kind", "")), float(record.get("margin", 0))])
    return [(tokens, [False] * len(prompt) + [True] * (len(tokens) - len(prompt))) for tokens in (chosen, rejected)]


class PairDataset:
    """Some pairs (`indices`) of a TokenDataset; `kinds` and `margins` of each, and `key`, which names this content."""

    def __init__(self, dataset: TokenDataset, indices):
        self.dataset, self.indices, self.stats = dataset, np.asarray(indices), dataset.stats
        about = json.loads((dataset.folder / "pairs.json").read_text(encoding="utf-8"))
        self.kinds = [about[i][0] for i in self.indices]
        self.margins = np.array([about[i][1] for i in self.indices], np.float32)
        self.key = f"{dataset.folder.name}-{hashlib.sha256(self.indices.astype(np.int64).tobytes()).hexdigest()[:20]}"

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        """((tokens, mask) of the chosen side, (tokens, mask) of the rejected one)."""
        return self.dataset[2 * self.indices[i]], self.dataset[2 * self.indices[i] + 1]

    def lengths(self):
        """(N,): tokens of the longer side of each pair."""
        return np.maximum(self.dataset.lengths(2 * self.indices), self.dataset.lengths(2 * self.indices + 1))


def load_pairs(paths: list, eval_path: str, tokenizer: Tokenizer, max_seq_len: int, seed: int, say=print) -> tuple:
    """(training pairs, held-out pairs): the held-out file when one is given, else 5 % (at most 500) of the pairs, by seed."""
    dataset = load_dataset("preference", paths, tokenizer, max_seq_len, say)
    everything = np.arange(len(dataset) // 2)
    if eval_path:
        held_out = load_dataset("preference", [eval_path], tokenizer, max_seq_len, say)
        return PairDataset(dataset, everything), PairDataset(held_out, np.arange(len(held_out) // 2))
    if len(everything) < 2:
        return PairDataset(dataset, everything), PairDataset(dataset, everything)
    shuffled = np.random.default_rng(seed).permutation(everything)
    count = max(1, min(500, len(everything) // 20))
    say(f"held out for evaluation: {count:,} of {len(everything):,} pairs")
    return PairDataset(dataset, np.sort(shuffled[count:])), PairDataset(dataset, np.sort(shuffled[:count]))


@dataclass
class PairBatch:
    """B pairs as 2B rows, first the chosen sides, then the rejected ones, padded on the right.

    tokens (2B, T) int64; answer_mask (2B, T) bool; lengths (2B,) without padding; margins (B,); pairs (B,): which pairs of
    the data set these are.
    """

    tokens: torch.Tensor
    answer_mask: torch.Tensor
    lengths: torch.Tensor
    margins: torch.Tensor
    pairs: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum())

    def to(self, device):
        """The same batch on a device."""
        return PairBatch(*(to_device(t, device) for t in (self.tokens, self.answer_mask, self.lengths, self.margins, self.pairs)))


class PairLoader(PackedLoader):
    """Endless batches of pairs of similar length, shuffled anew each epoch; unshuffled: sorted by length."""

    def __init__(self, dataset: PairDataset, batch_size: int, seed: int, rank: int = 0, world: int = 1, shuffle: bool = True):
        super().__init__(dataset, batch_size, 0, seed, rank, world, shuffle)

    def rows(self, epoch: int):
        """Yield the pairs of an epoch, as numbers; batch_size of them in a row have similar lengths."""
        chance, size, lengths = np.random.default_rng([self.seed, epoch]), self.batch_size, self.dataset.lengths()
        order = chance.permutation(len(lengths)) if self.shuffle else np.arange(len(lengths))
        window = 16 * size if self.shuffle else len(lengths)  # sorting everything would give each epoch the same batches
        windows = [order[i:i + window] for i in range(0, len(order), window)]
        order = np.concatenate([w[np.argsort(lengths[w], kind="stable")] for w in windows])
        batches = [order[i:i + size] for i in range(0, len(order), size)]
        if self.shuffle:  # but the last, which may be smaller
            batches = [batches[i] for i in chance.permutation(len(batches) - 1)] + batches[-1:]
        for batch in batches:
            yield from batch.tolist()

    def collate(self, pairs: list) -> PairBatch:
        """Numbers of pairs -> a PairBatch; of no pairs ([[]], see epoch_batches) one without rows."""
        pairs = [] if pairs == [[]] else pairs
        sequences = [side for both in zip(*(self.dataset[i] for i in pairs)) for side in both]
        lengths = [len(tokens) for tokens, _ in sequences]
        shape = (len(sequences), -(-max(lengths, default=1) // 8) * 8)
        tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for row, (t, m) in enumerate(sequences):
            tokens[row, :len(t)] = t
            mask[row, :len(t)] = m
        return PairBatch(torch.from_numpy(tokens), torch.from_numpy(mask), torch.tensor(lengths, dtype=torch.long),
                         torch.from_numpy(self.dataset.margins[pairs]), torch.tensor(pairs, dtype=torch.long))
