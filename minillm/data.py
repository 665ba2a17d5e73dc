"""From files to batches.

    JSON lines -> token sequences with loss masks -> a cache on disk, mapped into memory -> rows packed with whole documents

Everything streams: a file far larger than memory is tokenised once, on all cores, into `.cache/` (keyed by the file, the
tokenizer and the settings), and read from there through a memory map.
"""

import bisect
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minillm.errors import UserError
from minillm.tokenizer import Tokenizer

CACHE = Path(os.environ.get("MINILLM_CACHE", ".cache"))
FORMAT = 1  # counted up when the meaning of a cached file changes
WINDOW = 2048  # documents that are shuffled and packed together
ROLES = ("system", "user", "assistant", "tool")


# Reading: one line, one object, and for every mistake the file and the line.

def read_lines(path):
    """Yield (line number, text) of a UTF-8 file, .gz or not; empty lines are skipped. Raises UserError."""
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
                if text.strip():
                    yield number, text
    except (OSError, EOFError) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None


def parse_line(text: str, where: str) -> dict:
    """One JSON object; `where` ("file:line") begins the message of the UserError."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e})") from None
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
    if not any(m["role"] == "assistant" for m in messages):
        stats["without an assistant turn, dropped"] += 1
        return []
    if len(tokens) > max_seq_len:
        stats["longer than --max_seq_len, cut"] += 1
        stats["trained tokens lost to the cut"] += sum(mask[max_seq_len:])
        tokens, mask = tokens[:max_seq_len], mask[:max_seq_len]
    if not any(mask):
        stats["prompt alone longer than --max_seq_len, dropped"] += 1
        return []
    return [(tokens, mask)]


def new_stats() -> dict:
    return dict.fromkeys(["documents", "cut into pieces", "bytes", "without an assistant turn, dropped", "longer than --max_seq_len, cut",
                          "trained tokens lost to the cut", "prompt alone longer than --max_seq_len, dropped"], 0)


def encode_lines(job):
    """Encode a chunk of lines (runs in a worker process): -> (tokens, mask, lengths, stats) or the UserError."""
    kind, path, lines, tokenizer, max_seq_len = job
    stats, tokens, mask, lengths = new_stats(), [], [], []
    try:
        for number, text in lines:
            where = f"{path}:{number}"
            if kind == "text" and not path.endswith((".jsonl", ".jsonl.gz")):  # plain text: a chunk of lines is a document
                sequences = encode_text(text, tokenizer, max_seq_len, stats)
            elif kind == "text":
                record = parse_line(text, where)
                check_text(require(record, "text", where), where, '"text"')
                sequences = encode_text(record["text"], tokenizer, max_seq_len, stats)
            else:
                record = parse_line(text, where)
                check_conversation(record, where)
                sequences = encode_conversation(record["conversations"], tokenizer, max_seq_len, stats)
            stats["documents"] += 1
            for t, m in sequences:
                tokens += t
                mask += m
                lengths.append(len(t))
    except UserError as e:
        return e
    return np.array(tokens, np.uint32), np.array(mask, bool), np.array(lengths, np.int64), stats


def chunks(path: str, kind: str, size: int = 1 << 18):
    """Group the lines of a file into chunks of about `size` characters; of plain text each chunk is one document."""
    plain = kind == "text" and not path.endswith((".jsonl", ".jsonl.gz"))
    size = 1 << 14 if plain else size
    lines, total = [], 0
    for number, text in read_lines(path):
        lines.append((number, text))
        total += len(text)
        if total >= size:
            yield [(lines[0][0], "".join(t for _, t in lines))] if plain else lines
            lines, total = [], 0
    if lines:
        yield [(lines[0][0], "".join(t for _, t in lines))] if plain else lines


# The cache: flat arrays of all tokens and masks, and where each sequence begins.

class TokenDataset:
    """Token sequences in three mapped files. len() sequences; [i] -> (tokens, mask) as arrays; `stats` tells what went in."""

    def __init__(self, folder):
        folder = Path(folder)
        self.stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
        self.tokens = np.memmap(folder / "tokens.bin", np.dtype(self.stats["dtype"]), "r")
        self.mask = np.memmap(folder / "mask.bin", np.bool_, "r")
        self.starts = np.memmap(folder / "starts.bin", np.int64, "r")

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        a, b = self.starts[i], self.starts[i + 1]
        return self.tokens[a:b], self.mask[a:b]

    def lengths(self, indices):
        return self.starts[np.asarray(indices) + 1] - self.starts[indices]


class Part:
    """A TokenDataset without some sequences (`held_out`, a few sorted numbers), or with these alone."""

    def __init__(self, dataset: TokenDataset, held_out, only: bool):
        self.dataset, self.held_out, self.only = dataset, np.asarray(held_out), only
        self.stats = {**dataset.stats, "bytes": 0}  # of the whole; the bytes of a part are not known
        self.skip = self.held_out - np.arange(len(self.held_out))  # held-out number j stands after skip[j] others

    def __len__(self):
        return len(self.held_out) if self.only else len(self.dataset) - len(self.held_out)

    def _place(self, i):
        return self.held_out[i] if self.only else np.asarray(i) + np.searchsorted(self.skip, i, side="right")

    def __getitem__(self, i):
        return self.dataset[self._place(i)]

    def lengths(self, indices):
        return self.dataset.lengths(self._place(indices))


def load_split(kind: str, paths: list, eval_path: str, tokenizer: Tokenizer, max_seq_len: int, seed: int, say=print) -> tuple:
    """(training data, held-out data): the held-out file when one is given, else 5 % (at most 500) of the sequences, by seed."""
    dataset = load_dataset(kind, paths, tokenizer, max_seq_len, say)
    if eval_path:
        return dataset, load_dataset(kind, [eval_path], tokenizer, max_seq_len, say)
    if len(dataset) < 2:
        return dataset, dataset
    count = max(1, min(500, len(dataset) // 20))
    held_out = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False))
    say(f"held out for evaluation: {count:,} of {len(dataset):,} sequences")
    return Part(dataset, held_out, only=False), Part(dataset, held_out, only=True)


def load_dataset(kind: str, paths: list, tokenizer: Tokenizer, max_seq_len: int, say=print) -> TokenDataset:
    """Tokenise the files ("text" for pretraining or "chat" for SFT), or open what an earlier call made of them.

    The cache is keyed by each file's path, size and time of change, the tokenizer, the kind and max_seq_len. Raises
    UserError for bad input, with file and line. What was dropped or cut is said and stands in `stats`.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such data file")
    identity = [[os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in paths]
    key = json.dumps([FORMAT, kind, max_seq_len, identity, tokenizer.document], sort_keys=True)
    folder = CACHE / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    if not (folder / "stats.json").exists():
        temporary = Path(f"{folder}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            _build(kind, paths, tokenizer, max_seq_len, temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except OSError as e:
            if not (folder / "stats.json").exists():  # else another process made it meanwhile
                raise UserError(f"{temporary}: the token cache cannot be written ({e}); set MINILLM_CACHE to a folder with room") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    dataset = TokenDataset(folder)
    noted = {k: v for k, v in dataset.stats.items() if v and k not in ("documents", "bytes", "dtype", "tokens", "trained tokens")}
    say(f"{', '.join(paths)}: {dataset.stats['documents']:,} documents, {dataset.stats['tokens']:,} tokens"
        + "".join(f"; {v:,} {k}" for k, v in noted.items()))
    return dataset


def _build(kind, paths, tokenizer, max_seq_len, folder):
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    totals = new_stats()
    size = sum(os.path.getsize(p) for p in paths)
    count = trained = 0
    jobs = ((kind, str(path), lines, tokenizer, max_seq_len) for path in paths for lines in chunks(str(path), kind))
    workers = os.cpu_count() or 1
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "mask.bin", "wb") as mask_file, \
            open(folder / "starts.bin", "wb") as starts_file, tqdm(total=None, desc="tokenising", unit=" documents", disable=size < 1 << 23) as bar:
        # Small files are not worth starting processes for.
        pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 and size > 1 << 23 else None
        try:
            results = bounded_imap(pool, encode_lines, jobs, workers * 4) if pool else map(encode_lines, jobs)
            starts_file.write(np.zeros(1, np.int64).tobytes())
            for result in results:
                if isinstance(result, UserError):
                    raise result
                tokens, mask, lengths, stats = result
                tokens_file.write(tokens.astype(dtype).tobytes())
                mask_file.write(mask.tobytes())
                starts_file.write((count + np.cumsum(lengths)).astype(np.int64).tobytes())
                count += len(tokens)
                trained += int(mask.sum())
                bar.update(stats["documents"])
                totals = {k: v + stats[k] for k, v in totals.items()}
        finally:
            if pool:
                pool.terminate()
    if not count:
        dropped = "; ".join(f"{v:,} {k}" for k, v in totals.items() if v and k not in ("documents", "bytes"))
        raise UserError(f"{', '.join(map(str, paths))}: nothing to train on ({dropped or 'the file is empty'})")
    (folder / "stats.json").write_text(json.dumps({**totals, "tokens": count, "trained tokens": trained, "dtype": np.dtype(dtype).name}), encoding="utf-8")


def bounded_imap(pool, function, jobs, ahead: int):
    """pool.imap that reads at most `ahead` jobs before their results are taken: the file never piles up in memory."""
    waiting = []
    for job in jobs:
        waiting.append(pool.apply_async(function, (job,)))
        if len(waiting) >= ahead:
            yield waiting.pop(0).get()
    for result in waiting:
        yield result.get()


# Batches: rows packed with whole sequences.

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
        return Batch(*(t.to(device, non_blocking=True) for t in (self.tokens, self.loss_mask, self.doc_ids)))


def pack(lengths, row_length: int) -> list:
    """Best-fit decreasing: lists of indices whose lengths add up to at most row_length, few rows, little room left."""
    rows, free = [], []  # free: sorted (room left, row number)
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        place = bisect.bisect_left(free, (int(lengths[i]), -1))
        if place < len(free):
            room, row = free.pop(place)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(int(i))
        bisect.insort(free, (room - int(lengths[i]), row))
    return rows


class PackedLoader:
    """Endless batches of packed rows, shuffled anew each epoch; `state()` says where it is, `load_state` goes there.

    Shuffled are blocks of WINDOW sequences and then the sequences within a block, so that memory stays flat however
    large the file is (a data set smaller than a block is shuffled completely). With several processes, each takes
    every world-th batch.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, row_length: int, seed: int, rank: int = 0, world: int = 1, shuffle: bool = True):
        self.dataset, self.batch_size, self.row_length = dataset, batch_size, row_length
        self.seed, self.rank, self.world, self.shuffle = seed, rank, world, shuffle
        self.epoch = self.taken = 0  # batches taken of this epoch, by all processes

    def state(self) -> dict:
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state(self, state: dict):
        self.epoch, self.taken = state["epoch"], state["taken"]

    def rows(self, epoch: int):
        """Yield the rows of an epoch as arrays of sequence numbers."""
        order = np.random.default_rng([self.seed, epoch])
        blocks = range(0, len(self.dataset), WINDOW)
        for block in order.permutation(len(blocks)) if self.shuffle else range(len(blocks)):
            indices = np.arange(blocks[block], min(blocks[block] + WINDOW, len(self.dataset)))
            if self.shuffle:
                order.shuffle(indices)
            rows = pack(self.dataset.lengths(indices), self.row_length)
            if self.shuffle:  # best-fit decreasing sorted them by length
                order.shuffle(rows)
            yield from (indices[row] for row in rows)

    def batches(self, epoch: int) -> int:
        """How many batches an epoch has, for each process."""
        rows = sum(1 for _ in self.rows(epoch))
        return -(-rows // self.batch_size) // self.world or 1

    def epoch_batches(self, epoch: int, skip: int = 0):
        """Yield this process's batches of one epoch, the first `skip` (of all processes) left out."""
        group, number = [], 0
        limit = self.batches(epoch) * self.world if self.world > 1 else None  # every process takes equally many
        for row in self.rows(epoch):
            group.append(row)
            if len(group) == self.batch_size:
                if number >= skip and number % self.world == self.rank and (limit is None or number < limit):
                    yield self.collate(group)
                group, number = [], number + 1
        if group and number >= skip and number % self.world == self.rank and (limit is None or number < limit):
            yield self.collate(group)

    def __iter__(self):
        while True:
            for batch in self.epoch_batches(self.epoch, self.taken):
                self.taken += self.world
                yield batch
            self.epoch, self.taken = self.epoch + 1, 0

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
