"""From records to batches. A text or a conversation becomes tokens with a loss mask; these are packed into rows.

    record -> (tokens, loss mask) -> the token cache (token_cache.py) -> rows packed with whole documents -> Batch
"""

import contextlib
import itertools
import queue
import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from minillm import runtime
from minillm.attention import BLOCK, document_blocks
from minillm.chat import CHATML, ChatFormat, last_question, lost_think, thought_and_said
from minillm.records import check_conversation, check_text, require
from minillm.runtime import say
from minillm.token_cache import Subset, load_dataset
from minillm.tokenizer import Tokenizer

WINDOW = 2048  # sequences that are shuffled and packed together
SPAN = 64  # a window is made of runs of this many neighbours, taken from all over the file


# Encoding: one record becomes sequences (tokens, loss mask) of at most max_seq_len tokens.

def encode_text(record: dict, where: str, tokenizer: Tokenizer, max_seq_len: int, stats: Counter) -> list:
    """{"text"} -> <|endoftext|> text <|endoftext|>, cut into pieces of at most max_seq_len tokens.

    A piece begins with the last token of the piece before. The first token of a piece is never a target, so every token
    of the document after the first is trained on exactly once.
    """
    text = require(record, "text", where)
    check_text(text, where, '"text"')
    if not text.strip():
        stats["blank, dropped"] += 1
        return []
    tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.endoftext_id]
    if len(tokens) > max_seq_len:
        stats["cut into pieces"] += 1
    pieces = [tokens[i:i + max_seq_len] for i in range(0, len(tokens) - 1, max_seq_len - 1)]
    stats["bytes"] += len(text.encode())
    return [(piece, [False] + [True] * (len(piece) - 1)) for piece in pieces]


def without_silence(messages: list, chat: ChatFormat = CHATML) -> list:
    """The messages, with "train": False where the assistant says and calls nothing, and has no think text that counts:
    that of a reply before the last question is not written.
    """
    last = last_question(messages)

    def is_silent(i, message):
        if message["role"] != "assistant" or message.get("train") is False:
            return False
        thought, said = thought_and_said(chat, message)
        return not (said.strip() or i > last and thought.strip() or message.get("tool_calls"))

    return [{**message, "train": False} if is_silent(i, message) else message for i, message in enumerate(messages)]


def encode_conversation(record: dict, where: str, tokenizer: Tokenizer, max_seq_len: int, stats: Counter) -> list:
    """{"conversations"} -> tokens in the tokenizer's chat format; the loss mask is True on what the assistant says.

    One that is too long is cut at the end; one with nothing left to learn is dropped. Both are counted, and so are
    think text that no format writes because a later question follows, and empty replies, which would teach silence.
    """
    check_conversation(record, where)
    chat = tokenizer.chat_format
    messages = without_silence(record["conversations"], chat)
    if silent := sum(one is not other for one, other in zip(messages, record["conversations"])):
        stats["empty replies, not trained on"] += silent
    tokens, mask = tokenizer.render(messages)
    if lost := lost_think(record["conversations"], chat):
        stats["replies without their think text, because another question follows"] += lost
    if not any(mask):
        stats["without an assistant turn to train on, dropped"] += 1
        return []
    if len(tokens) > max_seq_len:
        stats["trained tokens lost to --max_seq_len"] += sum(mask[max_seq_len:])
        if not any(mask[:max_seq_len]):
            stats["prompt alone longer than --max_seq_len, dropped"] += 1
            return []
        stats["longer than --max_seq_len, cut"] += 1
    return [(tokens[:max_seq_len], mask[:max_seq_len])]


# Splitting: what is held out is never trained on.

def hold_out(keys, seed: int):
    """The indices of the items to hold out, sorted: those of 5 % of the distinct keys (1 to 500 keys), drawn by seed.

    Items with equal keys stay together, so no copy of a held-out item is trained on. Empty if all keys are equal.
    """
    keys = np.asarray(keys)
    first = np.sort(np.unique(keys, return_index=True)[1])  # where each distinct key first occurs
    if len(first) < 2:
        return np.zeros(0, np.int64)
    count = max(1, min(500, len(first) // 20))
    chosen = first[np.random.default_rng(seed).choice(len(first), count, replace=False)]
    return np.flatnonzero(np.isin(keys, keys[chosen]))


def load_split(encode, paths: list, eval_path: str, tokenizer: Tokenizer, max_seq_len: int, seed: int) -> tuple:
    """(training data, held-out data). Held out is the file eval_path, or else 5 % of the sequences (hold_out).

    What a file eval_path shares with the training data is counted and said.
    """
    def hashes(sequences):
        return [hash(sequences[i][0].tobytes()) for i in range(len(sequences))]

    if eval_path:  # first, because it is the smaller one and may have a mistake
        eval_data = load_dataset(encode, [eval_path], tokenizer, max_seq_len)
    dataset = load_dataset(encode, paths, tokenizer, max_seq_len)
    if eval_path:
        say_overlap(hashes(dataset), hashes(eval_data), eval_path, "sequences")
        return dataset, eval_data
    held_out = hold_out(hashes(dataset), seed)
    if not len(held_out):
        say("a single sequence: it is trained on and evaluated on")
        return dataset, dataset
    say(f"held out for evaluation: {len(held_out):,} of {len(dataset):,} sequences")
    stats = {"sequences": len(held_out)}
    if "bytes" in dataset.stats:  # of texts: the UTF-8 bytes of the held-out targets
        targets = [t for i in held_out for t in dataset[i][0][1:].tolist() if t != tokenizer.endoftext_id]
        stats["bytes"] = len(tokenizer.decode_bytes(targets))
    rest = np.setdiff1d(np.arange(len(dataset)), held_out)
    train = Subset(dataset, rest, {**dataset.stats, "sequences held out": len(held_out)})
    return train, Subset(dataset, held_out, stats)


def say_overlap(train: list, held_out: list, eval_path, kind: str):
    """Say how many of the held-out items (hashes) are trained on as well; nothing, if none is."""
    known = set(train)
    count = sum(item in known for item in held_out)
    if count:
        say(f"{eval_path}: {count:,} of {len(held_out):,} held-out {kind} are in the training data too; "
            "what is measured on them says nothing about new ones")


# Batches: rows packed with whole sequences.

def to_device(tensor, device):
    """The tensor on the device. For CUDA it is copied from pinned memory, so the program does not wait for the copy."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class Batch:
    """Packed rows: tokens (B, T) int64; loss_mask (B, T) bool; doc_ids (B, T) int64, one per document, -1: padding.

    targets (N,) int64: where loss_mask.flatten() is True. To count them a GPU would have to be waited for.
    blocks: attention.document_blocks of doc_ids, for flex attention. Dozens of kernels would make it on a GPU.
    """

    tokens: torch.Tensor
    loss_mask: torch.Tensor
    doc_ids: torch.Tensor
    targets: torch.Tensor
    blocks: tuple

    @classmethod
    def of(cls, tokens, loss_mask, doc_ids):
        """A Batch of these NumPy arrays, with the rest of what it holds."""
        given = map(torch.from_numpy, (tokens, loss_mask, doc_ids, np.flatnonzero(loss_mask)))
        return cls(*given, tuple(map(torch.from_numpy, document_blocks(doc_ids))))

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.doc_ids >= 0).sum())

    @property
    def n_targets(self) -> int:
        """Tokens that are trained on."""
        return int(self.loss_mask.sum())

    def to(self, device):
        """The same batch on a device."""
        tensors = (self.tokens, self.loss_mask, self.doc_ids, self.targets)
        return Batch(*(to_device(t, device) for t in tensors), tuple(to_device(t, device) for t in self.blocks))


def pack(lengths, row_length: int) -> list:
    """Best-fit decreasing: rows, as lists of indices whose lengths add up to at most row_length, with little room left.

    Raises ValueError for a length above row_length.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a sequence of {lengths.max()} tokens does not fit a row of {row_length}")
    rows, with_room = [], [[] for _ in range(row_length + 1)]  # with_room[r]: rows that have room for r more tokens
    rooms = 0  # bit r is set while with_room[r] holds a row; the best fit is the lowest set bit from the length upwards
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


def shorter_rows(dataset, rows: int, length: int) -> tuple:
    """(rows, length) of a batch, halved in length and doubled in number while all sequences are short.

    Attention costs the square of a row, and the number of tokens stays. A row still has room for the longest sequence,
    for three average ones, so that little of it stays empty, and for a BLOCK of flex attention.
    """
    if length < 2 * BLOCK:
        return rows, length
    longest = total = 0
    for start in range(0, len(dataset), 2**20):  # little at a time, for memory
        lengths = dataset.lengths(np.arange(start, min(start + 2**20, len(dataset))))
        longest, total = max(longest, int(lengths.max())), total + int(lengths.sum())
    dataset.reopen()
    while length % 2 == 0 and length // 2 >= max(BLOCK, longest, 3 * total / len(dataset)):
        rows, length = 2 * rows, length // 2
    return rows, length


def ahead(items, depth: int = 2):
    """Yield the items of an iterator while another thread prepares the next `depth` of them."""
    ready, closed = queue.Queue(depth), threading.Event()

    def stopped():
        # Not a daemon thread: Python stops those wherever they are when it ends, and inside PyTorch that aborts.
        return closed.is_set() or not threading.main_thread().is_alive()

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
        except BaseException as error:  # raised where the items are used
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


class Loader:
    """Endless batches, shuffled anew each epoch. `state()` tells the position, and `load_state` returns to it.

    batch_size counts the items of all processes together: each takes its share of them, so the batches do not depend on
    the number of processes, and neither does the position. With shared=False a process takes everything. Subclasses
    define the order of the items (`order`) and how some of them become a batch (`collate`, which may get none).
    """

    def __init__(self, dataset, batch_size: int, seed: int, shared: bool = True):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world = (runtime.rank(), runtime.world_size()) if shared else (0, 1)
        self.epoch = self.taken = 0  # taken: batches of this epoch

    def order(self, epoch: int):
        """Yield the items of an epoch."""
        raise NotImplementedError

    def collate(self, items: list):
        """Some of these items as a batch."""
        raise NotImplementedError

    def state(self) -> dict:
        """The position as plain numbers: the next batch is number `taken` of `epoch`."""
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state(self, state: dict):
        """Go to where `state()` was called. An iterator made earlier must not be used any more."""
        self.epoch, self.taken = state["epoch"], state["taken"]

    def batches(self, epoch: int) -> int:
        """How many batches an epoch has; every process has the same number."""
        return -(-sum(1 for _ in self.order(epoch)) // self.batch_size)

    def steps(self, epochs: int, grad_accum: int = 1) -> int:
        """How many optimizer steps of grad_accum batches these epochs make."""
        return -(-sum(self.batches(epoch) for epoch in range(epochs)) // grad_accum)

    def epoch_batches(self, epoch: int, skip: int = 0):
        """Yield this process's shares of the batches of one epoch, without the first `skip`."""
        items = self.order(epoch)
        for number in itertools.count():
            group = list(itertools.islice(items, self.batch_size))
            if not group:
                return
            if number >= skip:  # a process may get no items
                yield self.collate(group[self.rank::self.world])

    def __iter__(self):
        def endless(epoch, taken):
            while True:
                for taken, batch in enumerate(self.epoch_batches(epoch, taken), taken + 1):
                    yield epoch, taken, batch
                epoch, taken = epoch + 1, 0

        for epoch, taken, batch in ahead(endless(self.epoch, self.taken)):
            self.epoch, self.taken = epoch, taken
            yield batch


class PackedLoader(Loader):
    """Batches of batch_size rows of row_length tokens, packed with whole sequences (see shorter_rows).

    One window of WINDOW sequences (runs of SPAN neighbours from all over the file) is shuffled and packed at a time, so
    memory stays flat however large the file is. A data set that fits into one window is shuffled completely.
    """

    def __init__(self, dataset, batch_size: int, row_length: int, seed: int, shuffle: bool = True, shared: bool = True):
        batch_size, self.row_length = shorter_rows(dataset, batch_size, row_length)
        super().__init__(dataset, batch_size, seed, shared)
        self.shuffle = shuffle

    def order(self, epoch: int):
        """Yield the rows of an epoch as arrays of sequence numbers."""
        chance = np.random.default_rng([self.seed, epoch])
        spans = np.arange(0, len(self.dataset), SPAN)
        if self.shuffle:
            chance.shuffle(spans)
        for i in range(0, len(spans), WINDOW // SPAN):
            indices = np.concatenate([np.arange(start, min(start + SPAN, len(self.dataset)))
                                      for start in spans[i:i + WINDOW // SPAN]])
            if self.shuffle:
                chance.shuffle(indices)
            self.dataset.reopen()
            rows = pack(self.dataset.lengths(indices), self.row_length)
            if self.shuffle:  # best-fit decreasing sorted them by length
                chance.shuffle(rows)
            yield from (indices[row] for row in rows)

    def collate(self, rows: list) -> Batch:
        """Rows of sequence numbers -> a Batch. No rows become a row of padding."""
        shape = (max(1, len(rows)), self.row_length)
        tokens, mask, doc_ids = np.zeros(shape, np.int64), np.zeros(shape, bool), np.full(shape, -1, np.int64)
        for b, row in enumerate(rows):
            at = 0
            for document, index in enumerate(row):
                sequence, loss_mask = self.dataset[index]
                end = at + len(sequence)
                tokens[b, at:end] = sequence
                mask[b, at:end] = loss_mask
                mask[b, at] = False  # the first token of a document has no context to be predicted from
                doc_ids[b, at:end] = document
                at = end
        return Batch.of(tokens, mask, doc_ids)
