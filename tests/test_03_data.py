r"""Chapter 3. Data: from files to batches. Every token of the files is a target exactly once per epoch, or its loss is counted and said.

The tokenizer of this chapter has no merges: every byte is one token. So a document of n bytes has n + 2 tokens (one
<|endoftext|> on either side), and a conversation can be counted by hand:

    <|im_start|> user\n Hi <|im_end|> \n <|im_start|> assistant\n Yo <|im_end|> \n        trained: Yo <|im_end|>
         1        5     2      1      1       1           10       2      1     1         = 25 tokens, 3 trained
"""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minillm import data
from minillm.data import (PackedLoader, Part, TokenDataset, encode_conversation, encode_text, load_dataset, load_split, pack,
                          read_records)
from minillm.errors import UserError
from minillm.tokenizer import Tokenizer, train_tokenizer

BYTES = train_tokenizer(["a"], 259)
END = BYTES.endoftext_id
HI_YO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def documents(path, count, seed=0):
    """A file of `count` texts of 1 to 40 bytes."""
    sizes = np.random.default_rng(seed).integers(1, 41, count)
    return write(path, [{"text": f"{i:05d}{'x' * 40}"[:n] if n > 5 else "y" * n} for i, n in enumerate(sizes)])


def load(kind, path, max_seq_len=64, tokenizer=BYTES):
    return load_dataset(kind, path, tokenizer, max_seq_len, say=lambda line: None)


def one_line(call, *arguments):
    """The message of the UserError that the call raises: one line, not a novel."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


# --------------------------------------------------------------------------------------------- reading

@pytest.mark.parametrize("name, content", [
    ("plain.jsonl", b'{"text": "a"}\n{"text": "\xc3\xa9"}\n'),
    ("no_newline_at_the_end.jsonl", b'{"text": "a"}\n{"text": "\xc3\xa9"}'),
    ("windows.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "\xc3\xa9"}\r\n'),
    ("blank_lines.jsonl", b'\n{"text": "a"}\n  \n\r\n{"text": "\xc3\xa9"}\n\n'),
    ("escaped.jsonl", b'{"text": "a", "more": [1]}\n{"text": "\\u00e9"}\n'),
])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_same_two_documents_in_many_files(tmp_path, name, content, compressed):
    path = tmp_path / (name + ".gz" if compressed else name)
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert [record["text"] for record in read_records(path)] == ["a", "\u00e9"]
    dataset = load("text", path)
    assert [dataset[i][0].tolist() for i in range(2)] == [[END, *BYTES.encode(text), END] for text in ("a", "\u00e9")]


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_plain_text_is_taken_as_it_stands(tmp_path, name):
    """Blank lines and line ends are part of a text; only the mark at the head of the file (BOM) is not."""
    text = "First.\r\n\r\n\n  Second \u4e16\u754c\n"
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    dataset = load("text", tmp_path / name)
    assert len(dataset) == 1 and BYTES.decode(dataset[0][0][1:-1]) == text
    assert dataset.stats["bytes"] == 27  # First. 6, line ends 5, spaces 2, Second 6, space 1, two Chinese characters 6, line end 1


def test_a_long_text_becomes_several_documents(tmp_path):
    """Of about 16,000 characters each, a book in one line as well as one in many; nothing is lost between them."""
    for text in ("abcdefghi\n" * 4000, "x" * 40_000):
        (tmp_path / "book.txt").write_text(text)
        dataset = load("text", tmp_path / "book.txt", 50_000)
        assert dataset.stats["documents"] == 3
        assert "".join(BYTES.decode(dataset[i][0][1:-1]) for i in range(3)) == text


GOOD = {"text": b'{"text": "fine"}', "chat": json.dumps({"conversations": HI_YO}).encode()}
BAD_LINES = [
    ("text", b'{"text": "broken', "not JSON"),
    ("text", b"just words", "not JSON"),
    ("text", b"[" * 100_000, "not JSON"),
    ("text", b'{"text": ' + b"1" * 5000 + b"}", "not JSON|must be text, not int"),
    ("text", b'["text"]', "must be a JSON object"),
    ("text", b'{"txt": "a"}', 'no key "text"; found: .txt.'),
    ("text", b'{"text": null}', '"text" must be text, not NoneType'),
    ("text", b'{"text": "\xff\xfe"}', r"not valid UTF-8 \(byte 11 of the line\)"),
    ("text", b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ("chat", b'{"messages": []}', 'no key "conversations"; found: .messages.'),
    ("chat", b'{"conversations": "hello"}', "must be a list of messages"),
    ("chat", b'{"conversations": []}', "must be a list of messages with at least one"),
    ("chat", b'{"conversations": ["hello"]}', 'message 1 of "conversations" needs "role" and "content"'),
    ("chat", b'{"conversations": [{"from": "human", "value": "hi"}]}', 'needs "role" and "content"'),
    ("chat", b'{"conversations": [{"role": "user"}]}', 'needs "role" and "content"'),
    ("chat", b'{"conversations": [{"role": "robot", "content": ""}]}', "unknown role .robot.; known: system, user, assistant, tool"),
    ("chat", b'{"conversations": [{"role": ["user"], "content": ""}]}', "unknown role"),
    ("chat", b'{"conversations": [{"role": "user", "content": 5}]}', '"content" of message 1 of "conversations" must be text, not int'),
    ("chat", b'{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}', "of message 2"),
]


@pytest.mark.parametrize("kind, line, message", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, cache, kind, line, message):
    """It stands in line 4, after a good one and two blank ones; nothing of the file is kept as if it were whole."""
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD[kind] + b"\n\n\n" + line + b"\n" + GOOD[kind])
    error = one_line(load, kind, path)
    assert error.startswith(f"{path}:4: ")
    assert re.search(message, error), error
    assert not any(cache.glob("*"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    paths = {name: tmp_path / name for name in ("missing.jsonl", "empty.jsonl", "blank.jsonl", "empty.txt", "cut.jsonl.gz",
                                                "bad.jsonl.gz", "not.jsonl.gz", "good.jsonl")}
    whole = gzip.compress(GOOD["text"] * 1000)
    for name, content in {"empty.jsonl": b"", "blank.jsonl": b"\n \n", "empty.txt": b"", "cut.jsonl.gz": whole[:-20],
                          "bad.jsonl.gz": whole[:30] + b"\0" * 20 + whole[50:], "not.jsonl.gz": GOOD["text"], "good.jsonl": GOOD["text"]}.items():
        paths[name].write_bytes(content)
    for name, message in {"missing.jsonl": "no such data file", "empty.jsonl": "the file is empty", "blank.jsonl": "the file is empty",
                          "empty.txt": "the file is empty", "cut.jsonl.gz": "cannot be read", "bad.jsonl.gz": "cannot be read",
                          "not.jsonl.gz": "cannot be read"}.items():
        error = one_line(load, "text", [paths["good.jsonl"], paths[name]])  # also when another file is fine
        assert error.startswith(f"{paths[name]}: {message}")
    assert one_line(load, "text", tmp_path).startswith(f"{tmp_path}: no such data file")


def test_text_in_utf_16_is_told_apart(tmp_path):
    """What a Windows editor calls "Unicode"."""
    (tmp_path / "w.txt").write_text("hello", encoding="utf-16")
    assert one_line(load, "text", tmp_path / "w.txt").startswith(f"{tmp_path / 'w.txt'}:1: not valid UTF-8 (byte 1")


# -------------------------------------------------------------------------------------------- encoding

def test_a_conversation_counted_by_hand(tmp_path):
    """The 25 tokens of the module's docstring, of which the answer and its end are trained."""
    dataset = load("chat", write(tmp_path / "a.jsonl", [{"conversations": HI_YO}]))
    tokens, mask = dataset[0]
    assert len(tokens) == 25 and BYTES.decode(tokens[mask]) == "Yo<|im_end|>"
    assert dataset.stats["tokens"] == 25 and dataset.stats["trained tokens"] == 3


def counted():
    return dict.fromkeys(data.COUNTED, 0)


def test_too_long_a_text_overlaps_by_one_token():
    """<|endoftext|> a b c d e <|endoftext|> in pieces of three: the last token of a piece is the first of the next,
    where it is no target. So each of the six tokens after the first is a target once."""
    a, b, c, d, e = BYTES.encode("abcde")
    stats = counted()
    assert encode_text("abcde", BYTES, 3, stats) == [([END, a, b], [False, True, True]), ([b, c, d], [False, True, True]),
                                                     ([d, e, END], [False, True, True])]
    assert stats["cut into pieces"] == 1 and stats["bytes"] == 5


@pytest.mark.parametrize("length", [1, 4, 5, 6, 7, 12, 13, 14, 100])
def test_every_token_after_the_first_is_a_target_exactly_once(length):
    """Whether the length is a multiple of the piece or not; and no piece is a lone token, which would train nothing."""
    text = "".join(chr(97 + i % 26) for i in range(length))
    pieces = encode_text(text, BYTES, 8, counted())
    targets = [t for tokens, mask in pieces for t, trained in zip(tokens, mask) if trained]
    assert targets == [*BYTES.encode(text), END]
    assert all(2 <= len(tokens) <= 8 for tokens, _ in pieces)


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_document_is_left_out_and_counted(text):
    """It would teach that a document begins with its end."""
    stats = counted()
    assert encode_text(text, BYTES, 8, stats) == [] and stats["blank, dropped"] == 1


def test_what_max_seq_len_costs_a_conversation_is_counted():
    """At 25 tokens all fits. At 23 the <|im_end|> (the 24th) is lost, at 21 "Yo" too, and nothing is left to learn."""
    def encode(max_seq_len):
        stats = counted()
        sequences = encode_conversation(HI_YO, BYTES, max_seq_len, stats)
        return [BYTES.decode(np.array(t)[m]) for t, m in sequences], {k: v for k, v in stats.items() if v}

    assert encode(25) == (["Yo<|im_end|>"], {})
    assert encode(24) == (["Yo<|im_end|>"], {"longer than --max_seq_len, cut": 1})  # only the line's end is lost
    assert encode(23) == (["Yo"], {"longer than --max_seq_len, cut": 1, "trained tokens lost to --max_seq_len": 1})
    assert encode(21) == ([], {"prompt alone longer than --max_seq_len, dropped": 1, "trained tokens lost to --max_seq_len": 3})


def test_what_was_left_out_is_said_and_only_nothing_left_is_an_error(tmp_path):
    silent = {"conversations": [{"role": "user", "content": "Hello?"}]}
    long = {"conversations": [*HI_YO, {"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "No"}]}
    path = write(tmp_path / "a.jsonl", [silent, {"conversations": HI_YO}, silent, long])
    said = []
    for _ in range(2):  # when it is made, and when it is found in the cache
        dataset = load_dataset("chat", path, BYTES, 64, said.append)
        assert len(dataset) == 2
    # the second: 25 tokens, then 1 + 5 + 50 + 2 + 1 + 10 before "No" and its end: 3 trained ones are lost
    assert said == [f"{path}: 4 documents, 89 tokens; 2 without an assistant turn, dropped; 1 longer than --max_seq_len, cut; "
                    "3 trained tokens lost to --max_seq_len"] * 2
    error = one_line(load, "chat", write(tmp_path / "b.jsonl", [silent, silent]))
    assert error == f"{tmp_path / 'b.jsonl'}: nothing to train on (2 without an assistant turn, dropped)"


# --------------------------------------------------------------------------------------------- packing

def test_pack_worked_example():
    """Lengths 5, 3, 4, 2 into rows of 7, the longest first, each where it fits best: 5 and 4 open rows (room 2 and 3),
    3 fills the second exactly, 2 the first."""
    assert pack([5, 3, 4, 2], 7) == [[0, 3], [2, 1]]


def test_a_sequence_longer_than_the_row_is_refused():
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit a row of 8"):
        pack([3, 9], 8)


def test_packing_leaves_hardly_any_padding():
    """Pitfall 17. Lengths between 5 and 64 in rows of 64: one row each would be 46 % padding."""
    lengths = np.random.default_rng(0).integers(5, 65, 2000)
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert all(lengths[row].sum() <= 64 for row in rows)
    assert lengths.sum() / (64 * len(rows)) > 0.97


def test_collate_worked_example(tmp_path):
    """The texts "ab" (4 tokens) and "c" (3) in one row of 8, "d" alone in another. No document's first token is a target."""
    dataset = load("text", write(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}, {"text": "d"}]))
    batch = PackedLoader(dataset, 2, 8, seed=0).collate([[0, 1], [2]])
    a, b, c, d = BYTES.encode("abcd")
    assert batch.tokens.tolist() == [[END, a, b, END, END, c, END, 0], [END, d, END, 0, 0, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, -1, -1, -1, -1, -1]]
    assert batch.n_tokens == 10


def test_the_first_token_of_a_document_is_never_a_target():
    """Whatever the data says: before it stands another document, which must not be trained to announce it."""
    batch = PackedLoader([(np.array([5, 6]), np.ones(2, bool)), (np.array([7, 8, 9]), np.ones(3, bool))], 1, 6, seed=0).collate([[0, 1]])
    assert batch.loss_mask.int().tolist() == [[0, 1, 0, 1, 1, 0]]


def contents(batches) -> list:
    """The documents in the batches, sorted."""
    found = []
    for batch in batches:
        for tokens, mask, doc_ids in zip(batch.tokens, batch.loss_mask, batch.doc_ids):
            for document in range(int(doc_ids.max()) + 1):
                found.append((tokens[doc_ids == document].tolist(), mask[doc_ids == document].tolist()))
    return sorted(found)


def everything(dataset) -> list:
    return sorted((tokens.tolist(), mask.tolist()) for tokens, mask in (dataset[i] for i in range(len(dataset))))


@pytest.mark.parametrize("window, span", [(2048, 64), (32, 4), (16, 16)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_token_once(tmp_path, monkeypatch, window, span, shuffle):
    """A data set of one window and one of many; with a last batch and a last window that are not full."""
    monkeypatch.setattr(data, "WINDOW", window)
    monkeypatch.setattr(data, "SPAN", span)
    dataset = load("text", documents(tmp_path / "a.jsonl", 203))
    loader = PackedLoader(dataset, 3, 64, seed=0, shuffle=shuffle)
    for epoch in range(2):
        batches = list(loader.epoch_batches(epoch))
        assert contents(batches) == everything(dataset)
        assert len(batches) == loader.batches(epoch)
        assert not any(batch.loss_mask[batch.doc_ids < 0].any() for batch in batches)


def test_a_window_comes_from_all_over_the_file(tmp_path, monkeypatch):
    """A file sorted by topic: were neighbours shuffled among themselves only, a batch would know one topic."""
    monkeypatch.setattr(data, "WINDOW", 128)
    monkeypatch.setattr(data, "SPAN", 8)
    dataset = load("text", documents(tmp_path / "a.jsonl", 1280))
    rows = list(PackedLoader(dataset, 1, 64, seed=0).rows(0))
    first = np.concatenate(rows)[:128]
    assert len(np.unique(first // 128)) >= 7  # of ten places that a window could come from


# -------------------------------------------------------------------------------- order, resume, processes

def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "loss_mask", "doc_ids"))


def test_the_seed_decides_the_order(tmp_path):
    dataset = load("text", documents(tmp_path / "a.jsonl", 100))
    epoch = lambda seed, number: list(PackedLoader(dataset, 2, 64, seed).epoch_batches(number))
    first = epoch(0, 0)
    assert all(map(same, first, epoch(0, 0)))
    assert not all(map(same, first, epoch(1, 0))) and not all(map(same, first, epoch(0, 1)))


def test_the_loader_goes_on_where_it_was(tmp_path):
    """From every position in two and a half epochs, the ends of epochs among them, through the JSON of a checkpoint."""
    dataset = load("text", documents(tmp_path / "a.jsonl", 40))
    loader = PackedLoader(dataset, 3, 64, seed=0)
    epoch = loader.batches(0)
    steps, states, batches = int(2.5 * epoch), [], []
    stream = iter(loader)
    for _ in range(steps):
        states.append(json.loads(json.dumps(loader.state())))
        batches.append(next(stream))
    assert epoch >= 4 and len({state["epoch"] for state in states}) == 3
    for start, state in enumerate(states):
        other = PackedLoader(dataset, 3, 64, seed=0)
        other.load_state(state)
        assert all(map(same, batches[start:start + 3], iter(other)))


def test_batches_made_ahead_are_the_same_ones_and_count_when_they_are_taken(tmp_path):
    """The thread is up to two batches further; the state that a checkpoint keeps is that of the training loop."""
    dataset = load("text", documents(tmp_path / "a.jsonl", 40))
    loader = PackedLoader(dataset, 3, 64, seed=0)
    plain = list(loader.epoch_batches(0))
    stream = iter(loader)
    for taken, batch in enumerate(plain, 1):
        assert same(next(stream), batch) and loader.state() == {"epoch": 0, "taken": taken}
        time.sleep(0.01)  # time for the thread to run ahead


def test_what_goes_wrong_ahead_is_raised_where_the_items_are_taken():
    def items():
        yield 1
        raise UserError("a.jsonl line 7: broken")

    stream = data.ahead(items())
    assert next(stream) == 1
    with pytest.raises(UserError, match="line 7"):
        next(stream)
    assert list(data.ahead(iter([1, 2, 3, 4]))) == [1, 2, 3, 4] and list(data.ahead(iter([]))) == []


def test_the_thread_ends_when_nobody_wants_more():
    before, stream = set(threading.enumerate()), data.ahead(itertools.count())
    assert [next(stream), next(stream)] == [0, 1]
    thread, = set(threading.enumerate()) - before
    stream.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_program_can_end_while_batches_are_made_ahead(tmp_path):
    """A daemon thread that is inside PyTorch when Python ends aborts the whole program: exit status 134 after all is done."""
    script = """
import itertools, torch
from minillm.data import ahead
matrix = torch.ones(500, 500)
stream = ahead((matrix @ matrix for _ in itertools.count()), depth=10_000)
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_share_the_batch_of_one(tmp_path, world):
    """Each takes 2 rows; together, step by step, they hold the rows that one process takes with 2 x world."""
    dataset = load("text", documents(tmp_path / "a.jsonl", 101))
    one = PackedLoader(dataset, 2 * world, 64, seed=0)
    many = [PackedLoader(dataset, 2, 64, seed=0, rank=rank, world=world) for rank in range(world)]
    assert {loader.batches(0) for loader in many} == {one.batches(0)}
    for whole, *parts in zip(one.epoch_batches(0), *(loader.epoch_batches(0) for loader in many), strict=True):
        together = torch.cat([part.tokens for part in parts])
        assert torch.equal(together[:len(whole.tokens)], whole.tokens) and not together[len(whole.tokens):].any()
        assert sum(part.n_tokens for part in parts) == whole.n_tokens
        assert sum(int(part.loss_mask.sum()) for part in parts) == int(whole.loss_mask.sum())


def test_more_processes_than_rows(tmp_path):
    """A single conversation and two processes: the second gets padding, and does not wait for data that never comes."""
    dataset = load("text", write(tmp_path / "a.jsonl", [{"text": "abc"}]))
    streams = [iter(PackedLoader(dataset, 4, 8, seed=0, rank=rank, world=2)) for rank in (0, 1)]
    for _ in range(3):
        first, second = next(streams[0]), next(streams[1])
        assert first.n_tokens == 5 and second.n_tokens == 0 and not second.loss_mask.any()


# ------------------------------------------------------------------------------------------- held out

def test_a_part_and_its_rest(tmp_path):
    dataset = load("text", write(tmp_path / "a.jsonl", [{"text": c} for c in "abcdef"]))
    spell = lambda part: "".join(BYTES.decode(part[i][0][1:-1]) for i in range(len(part)))
    assert spell(Part(dataset, [1, 4], only=True, stats={})) == "be"
    assert spell(Part(dataset, [1, 4], only=False, stats={})) == "acdf"
    assert spell(Part(dataset, [0, 5], only=False, stats={})) == "bcde"
    assert spell(Part(dataset, [0, 1, 2], only=False, stats={})) == "def"


def split(path, seed=0, eval_path="", said=None):
    return load_split("text", [path], eval_path, BYTES, 16, seed, (said if said is not None else []).append)


def test_the_held_out_part_is_seeded_disjoint_and_covers_all_with_the_rest(tmp_path):
    path, said = write(tmp_path / "a.jsonl", [{"text": f"{i:04d}"} for i in range(300)]), []
    train, held_out = split(path, said=said)
    assert (len(train), len(held_out)) == (285, 15) and said[-1] == "held out for evaluation: 15 of 300 sequences"
    names = lambda part: [BYTES.decode(part[i][0][1:-1]) for i in range(len(part))]
    assert sorted(names(train) + names(held_out)) == [f"{i:04d}" for i in range(300)]
    assert names(split(path)[1]) == names(held_out) != names(split(path, seed=1)[1])
    assert contents(PackedLoader(held_out, 4, 16, seed=0).epoch_batches(0)) == everything(held_out)
    assert train.lengths([0, 284]).tolist() == [6, 6]


def test_the_held_out_part_knows_its_bytes(tmp_path):
    """20 texts of 3 characters, 9 bytes each, in pieces: what is held out is one of 20 x 1 pieces; bits per byte need it.

    A text of 20 bytes is cut in two pieces at 16 tokens: 15 targets, all of them bytes, and 6 of which 5 are.
    """
    _, held_out = split(write(tmp_path / "a.jsonl", [{"text": "\u4e16\u754c\u4eba"}] * 20))
    assert len(held_out) == 1 and held_out.stats["bytes"] == 9
    _, held_out = split(write(tmp_path / "b.jsonl", [{"text": "x" * 20}] * 20))
    lengths = sorted(held_out.lengths([0, 1]).tolist())
    assert held_out.stats["bytes"] == sum({16: 15, 7: 5}[n] for n in lengths)


def test_a_file_of_ones_own_is_the_held_out_data(tmp_path):
    train, held_out = split(write(tmp_path / "a.jsonl", [{"text": "a"}]), eval_path=write(tmp_path / "b.jsonl", [{"text": "bb"}] * 3))
    assert len(train) == 1 and len(held_out) == 3 and held_out.stats["bytes"] == 6


def test_a_single_document_is_trained_on_and_evaluated_on(tmp_path):
    said = []
    train, held_out = split(write(tmp_path / "a.jsonl", [{"text": "a"}]), said=said)
    assert len(train) == len(held_out) == 1 and said[-1] == "a single sequence: it is trained on and evaluated on"


# ------------------------------------------------------------------------------------------- the cache

class Counting(Tokenizer):
    encoded = 0

    def encode(self, *arguments, **options):
        Counting.encoded += 1
        return super().encode(*arguments, **options)


def test_the_cache_is_used_until_something_changes(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [{"text": "abc"}])
    other_tokenizer = Counting(train_tokenizer(["abcabc"], 260).document)

    def made_anew(kind="text", max_seq_len=64, tokenizer=Counting(BYTES.document)):
        Counting.encoded = 0
        load(kind, path, max_seq_len, tokenizer)
        return Counting.encoded > 0

    assert made_anew() and not made_anew()
    assert made_anew(max_seq_len=32) and made_anew(tokenizer=other_tokenizer)
    assert not made_anew()
    time = path.stat().st_mtime_ns
    os.utime(path, ns=(time, time + 1_000_000_000))
    assert made_anew() and not made_anew()
    write(path, [{"text": "abcd"}])  # another size, even if the clock stood still
    os.utime(path, ns=(time, time + 1_000_000_000))
    assert made_anew() and not made_anew()
    write(path, [{"conversations": HI_YO, "text": "abcd"}])
    assert made_anew() and made_anew(kind="chat")


def test_an_interrupted_build_is_not_taken_for_the_data(tmp_path, monkeypatch, cache):
    """Ctrl-C cleans up. SIGKILL cannot: then a folder of another name stays, which nothing opens."""
    path = documents(tmp_path / "a.jsonl", 50)

    def interrupted(jobs, tokenizer, workers):
        yield data.encode_lines(next(jobs), tokenizer)
        raise KeyboardInterrupt

    for killed in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(data, "encode_all", interrupted)
            if killed:
                patch.setattr(data.shutil, "rmtree", lambda *arguments, **options: None)
            with pytest.raises(KeyboardInterrupt):
                load("text", path)
        assert len(list(cache.iterdir())) == killed
    assert len(load("text", path)) == 50


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert "the token cache cannot be written" in one_line(load, "text", documents(tmp_path / "a.jsonl", 3))


def test_a_full_disk_while_tokenising_leaves_nothing_behind(tmp_path, monkeypatch, cache):
    def full(jobs, tokenizer, workers):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(data, "encode_all", full)
    error = one_line(load, "text", documents(tmp_path / "a.jsonl", 3))
    assert "No space left on device" in error and "MINILLM_CACHE" in error and not any(cache.iterdir())


def test_only_the_first_process_of_a_machine_tokenises(tmp_path, monkeypatch):
    """The others wait until it is done; here it is done while the other one sleeps."""
    path = documents(tmp_path / "a.jsonl", 5)
    monkeypatch.setenv("LOCAL_RANK", "1")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        monkeypatch.setenv("LOCAL_RANK", "0")
        load("text", path)
        monkeypatch.setenv("LOCAL_RANK", "1")

    monkeypatch.setattr(data.time, "sleep", sleep)
    assert len(load("text", path)) == 5 and len(slept) == 1


class Killed(Tokenizer):
    """A worker that the system kills."""

    def encode(self, text, allow_special=False):
        os._exit(9) if "fatal" in text else None
        return super().encode(text, allow_special)

    def __reduce__(self):
        return Killed, (self.document,)


def test_many_processes_make_the_same_cache_as_one(tmp_path, monkeypatch, cache):
    """To the byte; a bad line is told as by one; and a worker that dies ends the build instead of hanging it."""
    monkeypatch.setattr(data.os, "cpu_count", lambda: 2)
    lines = [json.dumps({"text": f"{i} " + "lorem ipsum " * 50}) for i in range(1500)]  # 0.9 MB: four chunks
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    files = {}
    for parallel in (1 << 30, 1):
        monkeypatch.setattr(data, "PARALLEL", parallel)
        folder = load("text", path, 1024).folder
        files[parallel] = {file.name: file.read_bytes() for file in folder.iterdir()}
        data.shutil.rmtree(folder)
    assert files[1] == files[1 << 30] and len(files[1]["starts.bin"]) == 8 * (len(lines) + 1)

    path.write_text(lines[0] + "\n{oops\n" + lines[1])
    assert one_line(load, "text", path).startswith(f"{path}:2: not JSON")
    path.write_text(lines[0] + '\n{"text": "fatal"}')
    assert "process was killed" in one_line(load, "text", path, 64, Killed(BYTES.document))
    assert not any(cache.iterdir())


MEMORY = r"""
import json, resource, sys
from pathlib import Path
import numpy as np
from minillm import data
from minillm.tokenizer import train_tokenizer

folder, scale = Path(sys.argv[1]), 2**20 if sys.platform == "darwin" else 2**10
data.CACHE, data.PARALLEL = folder / "cache", 1 << 40
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
tokenizer = train_tokenizer(["a"], 259)

def epoch(dataset):
    return sum(batch.n_tokens for batch in data.PackedLoader(dataset, 8, 512, seed=0).epoch_batches(0))

peaks = []
for lines in (2_000, 20_000):  # 0.6 and 6 MB of text: 1.2 and 12 MB of tokens, 0.6 and 6 MB of masks
    path = folder / f"{lines}.jsonl"
    with open(path, "w") as file:
        for i in range(lines):
            file.write(json.dumps({"text": "lorem ipsum " * 25}) + "\n")
    dataset = data.load_dataset("text", str(path), tokenizer, 512, say=lambda line: None)
    assert epoch(dataset) == lines * 302
    peaks.append(peak())
for name, dtype in (("tokens", np.uint16), ("mask", np.bool_)):  # a cache of 150 MB, written directly
    with open(dataset.folder / f"{name}.bin", "wb") as file:
        for _ in range(100):
            file.write(np.ones(500_000, dtype).tobytes())
np.arange(0, 50_000_001, 500).tofile(dataset.folder / "starts.bin")
assert epoch(data.TokenDataset(dataset.folder)) == 50_000_000
print(*peaks, peak())
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Pitfall 17. As Python objects 6 MB of text were hundreds of MB; and pages of a mapped file count as memory too."""
    pytest.importorskip("resource")
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    small, large, huge = map(float, run.stdout.split())
    assert large - small < 24 and huge - small < 24, (small, large, huge)
