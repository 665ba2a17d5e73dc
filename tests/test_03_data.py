"""Chapter 3. Data: from files to batches.

After this chapter you can pack documents into rows by hand, and say which token of a row is a target.

Every token that is to be learned is a target exactly once per epoch. What is lost or left out is counted, and the
count is printed.

The tokenizer of this chapter has no merges: every byte is one token. So a document of n bytes has n + 2 tokens (one
<|endoftext|> on either side), and a conversation can be counted by hand:

    <|im_start|> user\n Hi <|im_end|> \n <|im_start|> assistant\n Yo <|im_end|> \n        trained: Yo <|im_end|>
         1        5     2      1      1       1           10       2      1     1         = 25 tokens, 3 trained

Drawn in tests/figures/packed_row.svg.
"""

import copy
import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from minillm import chat, data, token_cache
from minillm.data import PackedLoader, encode_conversation, encode_text, hold_out, load_split, pack
from minillm.errors import UserError
from minillm.records import content_hash, read_records
from minillm.token_cache import Subset, load_dataset
from minillm.tokenizer import Tokenizer, train_tokenizer
from tests.helpers import in_processes, workers_start_at_once

BYTES = train_tokenizer(["a"], 259)
END = BYTES.endoftext_id
HI_YO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def documents(path, count, seed=0):
    """A file of `count` texts of 1 to 40 bytes."""
    sizes = np.random.default_rng(seed).integers(1, 41, count)
    return write(path, [{"text": f"{i:05d}{'x' * 40}"[:n] if n > 5 else "y" * n} for i, n in enumerate(sizes)])


def load(path, encode=encode_text, max_seq_len=64, tokenizer=BYTES):
    return load_dataset(encode, path, tokenizer, max_seq_len)


def spell(dataset) -> list:
    """The texts of a data set."""
    return [BYTES.decode(dataset[i][0][1:-1]) for i in range(len(dataset))]


def one_line(call, *arguments):
    """The message of the UserError that the call raises: one line, and not a long one."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


# --------------------------------------------------------------------------------------------- reading

@pytest.mark.parametrize("content", [
    b'{"text": "a"}\n{"text": "\xc3\xa9"}\n',
    b'{"text": "a"}\n{"text": "\xc3\xa9"}',  # no line ending at the end
    b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "\xc3\xa9"}\r\n',  # Windows: a byte-order mark, and its line endings
    b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "\xc3\xa9"}\n',  # two such files joined: a mark in the middle
    b'\n{"text": "a"}\n  \n\r\n{"text": "\xc3\xa9"}\n\n',  # blank lines
    b'{"text": "a", "more": [1]}\n{"text": "\\u00e9"}\n',  # other keys, and an escaped character
])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz", "DOCS.JSONL.GZ"])
def test_the_same_two_documents_in_many_files(tmp_path, name, content, compressed):
    """Whether a file is compressed is seen in its first bytes: browsers unpack downloads and keep the name."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert [record["text"] for record in read_records(path)] == ["a", "\u00e9"]
    dataset = load(path)
    assert [dataset[i][0].tolist() for i in range(2)] == [[END, *BYTES.encode(text), END] for text in ("a", "\u00e9")]


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz", "NOVEL.TXT", "Novel.Txt.GZ"])
def test_plain_text_is_taken_as_it_stands(tmp_path, name):
    """Blank lines and line endings are part of a text; only a byte-order mark is not."""
    text = "First.\r\n\r\n\n  Second \u4e16\u754c\n"
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    dataset = load(tmp_path / name)
    assert spell(dataset) == [text]
    # "First." 6, line endings 2 + 2 + 1 + 1, spaces 2, "Second" 6, a space 1, two Chinese characters 6
    assert dataset.stats["bytes"] == 27


def test_a_long_text_becomes_several_documents(tmp_path):
    """Of about 16,000 characters each, whether the book has many lines or one; nothing is lost between them."""
    for text in ("abcdefghi\n" * 4000, "x" * 40_000):
        (tmp_path / "book.txt").write_text(text)
        dataset = load(tmp_path / "book.txt", max_seq_len=50_000)
        assert dataset.stats["documents"] == 3
        assert "".join(spell(dataset)) == text


GOOD = {encode_text: b'{"text": "fine"}', encode_conversation: json.dumps({"conversations": HI_YO}).encode()}
BAD_TEXTS = [
    (b'{"text": "broken', "not JSON"),
    (b"just words", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": ' + b"1" * 5000 + b"}", "not JSON|must be text, not int"),
    (b'["text"]', "must be a JSON object like {...}, not a list"),
    (b"[", "not JSON .*; each line must be an object, or the file one array of objects"),
    (b'{"txt": "a"}', 'no key "text"; found: .txt.'),
    (b'{"text": null}', '"text" must be text, not NoneType'),
    (b'{"text": "\xff\xfe"}', r"not valid UTF-8 \(byte 11 of the line\)"),
    (b'{"text": "\\ud800"}', "half of a surrogate pair"),
]
BAD_CONVERSATIONS = [
    (b'{"text": "a"}', 'no key "conversations"; found: .text.'),
    (b'{"conversations": "hello"}', "must be a list of messages"),
    (b'{"conversations": []}', "must be a list of messages with at least one"),
    (b'{"conversations": ["hello"]}', 'message 1 of "conversations" needs "role" and "content"'),
    (b'{"conversations": [{"role": "user"}]}', 'needs "role" and "content"'),
    (b'{"conversations": [{"role": "robot", "content": ""}]}',
     "unknown role .robot.; known: system, user, assistant, tool"),
    (b'{"conversations": [{"role": ["user"], "content": ""}]}', "unknown role"),
    (b'{"conversations": [{"role": "user", "content": 5}]}',
     '"content" of message 1 of "conversations" must be text, not int'),
    (b'{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}', "of message 2"),
]


@pytest.mark.parametrize("encode, line, message", [(encode_text, *bad) for bad in BAD_TEXTS]
                         + [(encode_conversation, *bad) for bad in BAD_CONVERSATIONS])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, cache, encode, line, message):
    """It is line 4, after a good line and two blank ones. Nothing of the file is kept as if it were whole."""
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD[encode] + b"\n\n\n" + line + b"\n" + GOOD[encode])
    error = one_line(load, path, encode)
    assert error.startswith(f"{path}:4: ")
    assert re.search(message, error), error
    assert not any(cache.glob("*"))


@pytest.mark.parametrize("record", [
    {"messages": HI_YO},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
], ids=["OpenAI", "ShareGPT"])
def test_other_names_of_the_same_conversation_are_read(tmp_path, record):
    dataset = load(write(tmp_path / "a.jsonl", [record]), encode_conversation)
    assert BYTES.decode(dataset[0][0]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"


def test_keys_that_hold_nothing_or_change_nothing_are_ignored(tmp_path):
    nothing = {"reasoning_content": "", "tool_calls": None, "weight": 1, "id": 5}
    record = {"conversations": [{**message, **nothing} for message in HI_YO], "system": "", "tools": [], "task": "talk"}
    assert len(load(write(tmp_path / "a.jsonl", [record]), encode_conversation)[0][0]) == 25


GZIPPED = gzip.compress(GOOD[encode_text] * 1000)


@pytest.mark.parametrize("name, content, message", [
    ("empty.jsonl", b"", "the file is empty"),
    ("blank.jsonl", b"\n \n", "the file is empty"),
    ("empty.txt", b"", "the file is empty"),
    ("empty.jsonl.gz", b"", "the file is empty"),
    ("cut.jsonl.gz", GZIPPED[:-20], "cannot be read"),
    ("damaged.jsonl.gz", GZIPPED[:30] + b"\0" * 20 + GZIPPED[50:], "cannot be read"),
    ("twice.jsonl.gz", gzip.compress(GZIPPED), "is compressed twice with gzip; minillm reads text and JSON Lines"),
    ("a.jsonl.zst", b"(\xb5/\xfd\x04\0Q", "is compressed with zstd; minillm reads text and JSON Lines"),
    ("a.parquet", b"PAR1\x15\x04\xff", "is a Parquet file; minillm reads text and JSON Lines"),
    ("not.txt.zip", b"PK\x03\x04\x14\0", "is a zip archive"),
])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    """Also when another file is fine."""
    (tmp_path / "good.jsonl").write_bytes(GOOD[encode_text])
    (tmp_path / name).write_bytes(content)
    error = one_line(load, [tmp_path / "good.jsonl", tmp_path / name])
    assert error.startswith(f"{tmp_path / name}: {message}")


def test_what_is_not_a_file_is_named(tmp_path):
    for reader in (load, lambda path: list(read_records(path))):
        assert one_line(reader, tmp_path / "missing.jsonl") == f"{tmp_path}/missing.jsonl: no such data file"
        assert one_line(reader, tmp_path) == f"{tmp_path}: is a folder; give the files in it"
        assert one_line(reader, os.devnull).startswith(f"{os.devnull}: is a pipe or a device, and data is read more")
        assert one_line(reader, "x" * 300) == f"{'x' * 300}: no such data file"
    assert one_line(content_hash, tmp_path).startswith(f"{tmp_path}: cannot be read: ")


def test_text_in_utf_16_is_refused(tmp_path):
    """It is what a Windows editor calls "Unicode"."""
    (tmp_path / "w.txt").write_text("hello", encoding="utf-16")
    assert one_line(load, tmp_path / "w.txt").startswith(f"{tmp_path / 'w.txt'}:1: is UTF-16, not UTF-8")


# -------------------------------------------------------------------------------------------- encoding

def test_a_conversation_counted_by_hand(tmp_path):
    """The 25 tokens of this chapter's docstring, of which the answer and its end are trained."""
    dataset = load(write(tmp_path / "a.jsonl", [{"conversations": HI_YO}]), encode_conversation)
    tokens, mask = dataset[0]
    assert len(tokens) == 25 and BYTES.decode(tokens[mask]) == "Yo<|im_end|>"
    assert dataset.stats == {"documents": 1, "tokens": 25, "trained tokens": 3, "dtype": "uint16"}


def test_too_long_a_text_overlaps_by_one_token():
    """<|endoftext|> a b c d e <|endoftext|> in pieces of three: the last token of a piece is the first of the next,
    where it is no target. So each of the six tokens after the first is a target once."""
    a, b, c, d, e = BYTES.encode("abcde")
    stats = Counter()
    assert encode_text({"text": "abcde"}, "", BYTES, 3, stats) == [
        ([END, a, b], [False, True, True]), ([b, c, d], [False, True, True]), ([d, e, END], [False, True, True])]
    assert stats == {"cut into pieces": 1, "bytes": 5}
    fits = Counter()
    assert encode_text({"text": "a"}, "", BYTES, 3, fits) == [([END, a, END], [False, True, True])]
    assert fits == {"bytes": 1}


@pytest.mark.parametrize("length", [1, 4, 5, 6, 7, 12, 13, 14, 100])
def test_every_token_after_the_first_is_a_target_exactly_once(length):
    """Whether or not the length is a multiple of the piece. No piece is a lone token, which would train nothing."""
    text = "".join(chr(97 + i % 26) for i in range(length))
    pieces = encode_text({"text": text}, "", BYTES, 8, Counter())
    targets = [t for tokens, mask in pieces for t, trained in zip(tokens, mask) if trained]
    assert targets == [*BYTES.encode(text), END]
    assert all(2 <= len(tokens) <= 8 for tokens, _ in pieces)


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_document_is_left_out_and_counted(text):
    """It would teach that a document begins with its end."""
    stats = Counter()
    assert encode_text({"text": text}, "", BYTES, 8, stats) == [] and stats == {"blank, dropped": 1}


@pytest.mark.parametrize("max_seq_len, trained, stats", [
    (25, ["Yo<|im_end|>"], {}),
    (24, ["Yo<|im_end|>"], {"longer than --max_seq_len, cut": 1}),  # only the last newline is lost
    (23, ["Yo"], {"longer than --max_seq_len, cut": 1, "trained tokens lost to --max_seq_len": 1}),
    (21, [], {"prompt alone longer than --max_seq_len, dropped": 1, "trained tokens lost to --max_seq_len": 3}),
])
def test_what_max_seq_len_costs_a_conversation_is_counted(max_seq_len, trained, stats):
    """All 25 tokens fit into 25. With 23 the <|im_end|> (the 24th) is lost; with 21 "Yo" too, and nothing is left."""
    counts = Counter()
    sequences = encode_conversation({"conversations": HI_YO}, "", BYTES, max_seq_len, counts)
    assert [BYTES.decode(np.array(tokens)[mask]) for tokens, mask in sequences] == trained
    assert counts == Counter(stats)


class NothingFollows:
    """A tokenizer whose conversations end with a trained token, as in Llama 3's format."""

    chat_format = chat.LLAMA3

    def render(self, messages):
        return [7, 8, 9, 10], [False, False, True, True]


def test_the_last_token_counts_among_those_that_max_seq_len_costs():
    counts = Counter()
    sequences = encode_conversation({"conversations": HI_YO}, "", NothingFollows(), 3, counts)
    assert sequences == [([7, 8, 9], [False, False, True])]
    assert counts == {"trained tokens lost to --max_seq_len": 1, "longer than --max_seq_len, cut": 1}


def test_think_text_that_no_format_writes_is_counted():
    """Two replies have some, and the first one loses it, since another question follows."""
    thinks = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "Hm."}]
    counts = Counter()
    encode_conversation({"conversations": thinks * 2}, "", BYTES, 200, counts)
    assert counts == {"replies without their think text, because another question follows": 1}


def test_think_text_within_the_content_counts_the_same_where_the_format_thinks():
    """The first reply is nothing but think text, which is not written; it must not teach silence. In a format without
    think blocks all of it is content."""
    thinking = copy.copy(BYTES)
    thinking.chat_format = chat.QWEN3
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>Hm.</think>"},
                {"role": "user", "content": "c"}, {"role": "assistant", "content": "<think>So.</think>d"}]
    counts = Counter()
    (tokens, mask), = encode_conversation({"conversations": messages}, "", thinking, 200, counts)
    assert counts == {"replies without their think text, because another question follows": 1,
                      "empty replies, not trained on": 1}
    said = BYTES.decode([token for token, trained in zip(tokens, mask) if trained])
    assert said == "<think>\nSo.\n</think>\n\nd<|im_end|>"
    counts = Counter()
    encode_conversation({"conversations": messages}, "", BYTES, 200, counts)
    assert not counts


def test_what_was_left_out_is_reported_and_only_nothing_left_is_an_error(tmp_path, capsys):
    silent = {"conversations": [{"role": "user", "content": "Hello?"}]}
    long = {"conversations": [*HI_YO, {"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "No"}]}
    path = write(tmp_path / "a.jsonl", [silent, {"conversations": HI_YO}, silent, long])
    for _ in range(2):  # when it is made, and when it is found in the cache
        assert len(load(path, encode_conversation)) == 2
    # The second one: 25 tokens, then 1 + 5 + 50 + 2 + 1 + 10 before "No" and its end, so 3 trained ones are lost.
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 4 documents, 89 tokens; 2 without an assistant turn to train on, dropped; "
        "3 trained tokens lost to --max_seq_len; 1 longer than --max_seq_len, cut"] * 2
    error = one_line(load, write(tmp_path / "b.jsonl", [silent, silent]), encode_conversation)
    assert error == f"{tmp_path / 'b.jsonl'}: nothing to train on (2 without an assistant turn to train on, dropped)"


# --------------------------------------------------------------------------------------------- packing

def test_pack_worked_example():
    """Lengths 5, 3, 4, 2 into rows of 7, the longest first, each where it fits best: 5 and 4 open rows (room 2 and 3),
    3 fills the second exactly, 2 the first."""
    assert pack([5, 3, 4, 2], 7) == [[0, 3], [2, 1]]


def test_pack_takes_the_row_with_the_least_room():
    """7 and 6 open rows of 10, with room for 3 and for 4. The 3 fits both and fills the first. Put where there is most
    room, it would leave 3 and 1.
    """
    assert pack([7, 6, 3, 1], 10) == [[0, 2], [1, 3]]
    assert pack([], 10) == []


def test_pack_at_its_limits():
    """A sequence of one token, of all the row's, of none; among equal lengths the order of the file is kept."""
    assert pack([1, 1], 3) == pack([3, 0], 3) == [[0, 1]] and pack([0], 3) == [[0]]
    assert pack([5, 4] * 500, 5) == [[i] for i in (*range(0, 1000, 2), *range(1, 1000, 2))]
    assert type(pack([2], 2)[0][0]) is int


def test_a_sequence_longer_than_the_row_is_refused():
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit a row of 8"):
        pack([3, 9], 8)


def test_packing_leaves_hardly_any_padding():
    """Pitfall 17. Lengths between 5 and 64 in rows of 64: with a row for each, 46 % would be padding."""
    lengths = np.random.default_rng(0).integers(5, 65, 2000)
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert all(lengths[row].sum() <= 64 for row in rows)
    assert lengths.sum() / (64 * len(rows)) > 0.97


def test_collate_worked_example(tmp_path):
    """"ab" (4 tokens) and "c" (3) in one row of 8, "d" alone in another. No document's first token is a target."""
    dataset = load(write(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}, {"text": "d"}]))
    batch = PackedLoader(dataset, 2, 8, seed=0).collate([[0, 1], [2]])
    a, b, c, d = BYTES.encode("abcd")
    assert batch.tokens.tolist() == [[END, a, b, END, END, c, END, 0], [END, d, END, 0, 0, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, -1, -1, -1, -1, -1]]
    assert batch.targets.tolist() == batch.to("cpu").targets.tolist() == [1, 2, 3, 5, 6, 9, 10]
    assert (batch.n_tokens, batch.n_targets) == (10, 7)
    assert type(batch.n_tokens) is type(batch.n_targets) is int
    assert [batch.tokens.dtype, batch.loss_mask.dtype, batch.doc_ids.dtype, batch.targets.dtype] == [
        torch.int64, torch.bool, torch.int64, torch.int64]


def test_a_batch_moves_with_all_it_holds():
    """To the device "meta" here. With rows of 200 tokens there are two blocks of attention, and two directions with
    two kinds each: four lists (chapter 4)."""
    dataset = [(np.arange(150), np.ones(150, bool))]
    batch = PackedLoader(dataset, 1, 200, seed=0).collate([[0]])
    assert [block.shape for block in batch.blocks] == [(4, 1, 1, 2), (4, 1, 1, 2, 2)]
    moved = batch.to("meta")
    tensors = (moved.tokens, moved.loss_mask, moved.doc_ids, moved.targets, *moved.blocks)
    assert [x.device.type for x in tensors] == ["meta"] * 6 and type(moved.blocks) is tuple


class Recorded:
    """Stands for a tensor, and remembers what is done with it."""

    def __init__(self):
        self.calls = []

    def pin_memory(self):
        self.calls.append("pin_memory")
        return self

    def to(self, device, **options):
        self.calls.append((device, options))
        return self


def test_for_cuda_a_tensor_is_copied_from_pinned_memory_without_waiting():
    """Only from pinned memory can the copy go on while the program does."""
    for device, calls in (("cuda:1", ["pin_memory", ("cuda:1", {"non_blocking": True})]), ("cpu", [("cpu", {})])):
        tensor = Recorded()
        assert data.to_device(tensor, device) is tensor and tensor.calls == calls


def test_the_first_token_of_a_document_is_never_a_target():
    """Whatever the data says: the token before it belongs to another document, which must not learn to announce it."""
    dataset = [(np.array([5, 6]), np.ones(2, bool)), (np.array([7, 8, 9]), np.ones(3, bool))]
    batch = PackedLoader(dataset, 1, 6, seed=0).collate([[0, 1]])
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
    """A data set of one window and one of many windows; the last batch and the last window are not full."""
    monkeypatch.setattr(data, "WINDOW", window)
    monkeypatch.setattr(data, "SPAN", span)
    dataset = load(documents(tmp_path / "a.jsonl", 203))
    loader = PackedLoader(dataset, 3, 64, seed=0, shuffle=shuffle)
    for epoch in range(2):
        batches = list(loader.epoch_batches(epoch))
        assert contents(batches) == everything(dataset)
        assert len(batches) == loader.batches(epoch)
        assert not any(batch.loss_mask[batch.doc_ids < 0].any() for batch in batches)


def test_without_shuffling_the_order_is_that_of_packing(tmp_path, monkeypatch):
    """Texts of 1 to 9 characters (2 tokens more) in rows of 12: the 11 tokens of the longest alone, then 10, 9, ...
    with what fits beside them. Shuffled, which is what a loader does unless told otherwise, the rows come in another
    order, so that the first batches are not those of the longest texts.
    """
    dataset = load(write(tmp_path / "a.jsonl", [{"text": "x" * n} for n in range(1, 10)]))
    plain = [row.tolist() for row in PackedLoader(dataset, 1, 12, seed=0, shuffle=False).order(0)]
    assert plain == [[8], [7], [6, 0], [5, 1], [4, 2], [3]]
    shuffled = [row.tolist() for row in PackedLoader(dataset, 1, 12, seed=0).order(0)]
    assert sorted(shuffled) == sorted(plain) and shuffled != plain
    monkeypatch.setattr(data, "SPAN", 4)
    equal = load(write(tmp_path / "b.jsonl", [{"text": chr(97 + n)} for n in range(20)]))
    assert [row.tolist() for row in PackedLoader(equal, 1, 3, 0, shuffle=False).order(0)] == [[n] for n in range(20)]


def test_who_shares_a_row_with_whom_changes_from_epoch_to_epoch(tmp_path):
    """20 texts of 3 tokens, two to a row. Shuffling the rows alone would keep the pairs."""
    loader = PackedLoader(load(write(tmp_path / "a.jsonl", [{"text": chr(97 + n)} for n in range(20)])), 1, 6, seed=0)
    first, second = ({frozenset(row.tolist()) for row in loader.order(epoch)} for epoch in (0, 1))
    assert len(first) == len(second) == 10 and len(first & second) < 5


@pytest.mark.parametrize("lengths, given, wanted", [
    ([20, 30, 40, 70], (7, 256), (14, 128)),  # 40 on average, and 3 x 40 <= 128
    ([42, 44], (7, 256), (7, 256)),  # 3 x 43 > 128: only two would fit a row, and a third of it would stay empty
    ([129, *[20] * 20], (7, 256), (7, 256)),  # the longest must fit
    ([20], (2, 1024), (16, 128)),  # no shorter than a block of flex attention
    ([20], (2, 384), (4, 192)),  # 96 < 128
    ([20], (2, 255), (2, 255)), ([20], (2, 192), (2, 192)),
])
def test_rows_are_halved_where_all_sequences_are_short(tmp_path, monkeypatch, lengths, given, wanted):
    """A batch keeps its number of tokens. A text of n characters has n + 2 tokens."""
    dataset = load(write(tmp_path / "a.jsonl", [{"text": "x" * (n - 2)} for n in lengths]), max_seq_len=256)
    loader = PackedLoader(dataset, *given, seed=0)
    assert (loader.batch_size, loader.row_length) == wanted
    batches = list(loader.epoch_batches(0))
    assert contents(batches) == everything(dataset) and {batch.tokens.shape[1] for batch in batches} == {wanted[1]}


def test_the_file_is_opened_anew_for_each_window(tmp_path, monkeypatch):
    """So the pages that were read are let go; the last test of this chapter measures it."""
    monkeypatch.setattr(data, "WINDOW", 32)
    monkeypatch.setattr(data, "SPAN", 4)
    dataset, opened = load(documents(tmp_path / "a.jsonl", 100)), []
    monkeypatch.setattr(dataset, "reopen", lambda: opened.append(True))
    list(PackedLoader(dataset, 1, 64, seed=0).order(0))
    assert len(opened) == 4  # 32 + 32 + 32 + 4


def test_a_window_comes_from_all_over_the_file(tmp_path, monkeypatch):
    """In a file sorted by topic, shuffling only neighbours would give batches of a single topic."""
    monkeypatch.setattr(data, "WINDOW", 128)
    monkeypatch.setattr(data, "SPAN", 8)
    dataset = load(documents(tmp_path / "a.jsonl", 1280))
    rows = list(PackedLoader(dataset, 1, 64, seed=0).order(0))
    first = np.concatenate(rows)[:128]
    assert len(np.unique(first // 128)) >= 7  # of ten places that a window could come from


# -------------------------------------------------------------------------------- order, resume, processes

def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "loss_mask", "doc_ids"))


def test_a_loader_must_say_what_its_order_and_its_batches_are():
    loader = data.Loader([], 2, seed=0)
    for call in (lambda: loader.order(0), lambda: loader.collate([])):
        with pytest.raises(NotImplementedError):
            call()


def test_a_loader_shares_with_the_other_processes_unless_told_otherwise(monkeypatch):
    loaders = in_each_process(monkeypatch, 2, lambda: data.Loader([], 4, seed=0))
    assert [(loader.rank, loader.world) for loader in loaders] == [(0, 2), (1, 2)]


def test_how_many_steps_some_epochs_make(tmp_path):
    """Five rows in batches of two: three batches an epoch, the last of one row. Three epochs are nine batches, and with
    two batches to a step five steps: the last step takes what is left.
    """
    loader = PackedLoader(load(write(tmp_path / "a.jsonl", [{"text": c} for c in "abcde"])), 2, 3, seed=0)
    assert (loader.batches(0), loader.steps(1), loader.steps(3), loader.steps(3, grad_accum=2)) == (3, 3, 9, 5)


def test_the_seed_decides_the_order(tmp_path):
    dataset = load(documents(tmp_path / "a.jsonl", 100))

    def epoch(seed, number):
        return list(PackedLoader(dataset, 2, 64, seed).epoch_batches(number))

    first = epoch(0, 0)
    assert all(map(same, first, epoch(0, 0)))
    assert not all(map(same, first, epoch(1, 0))) and not all(map(same, first, epoch(0, 1)))


def test_the_loader_goes_on_where_it_was(tmp_path):
    """From every position in two and a half epochs, their ends included, and with the state stored as JSON."""
    dataset = load(documents(tmp_path / "a.jsonl", 40))
    loader = PackedLoader(dataset, 3, 64, seed=0)
    epoch = loader.batches(0)
    steps, states, batches = int(2.5 * epoch), [], []
    stream = iter(loader)
    for _ in range(steps):
        states.append(json.loads(json.dumps(loader.state())))
        batches.append(next(stream))
    states.append(loader.state())
    assert epoch >= 4 and {state["epoch"] for state in states} == {0, 1, 2}
    for start in range(steps):
        other = PackedLoader(dataset, 3, 64, seed=0)
        other.load_state(states[start])
        assert all(map(same, batches[start:start + 3], iter(other)))
        assert other.state() == states[min(start + 3, steps)]


def test_batches_made_ahead_are_the_same_and_count_when_they_are_taken(tmp_path):
    """The thread is up to two batches ahead; the state that a checkpoint keeps is that of the training loop."""
    dataset = load(documents(tmp_path / "a.jsonl", 40))
    loader = PackedLoader(dataset, 3, 64, seed=0)
    plain = list(loader.epoch_batches(0))
    before, stream = set(threading.enumerate()), iter(loader)
    for taken, batch in enumerate(plain, 1):
        assert same(next(stream), batch) and loader.state() == {"epoch": 0, "taken": taken}
        assert len(set(threading.enumerate()) - before) == 1
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


def test_the_thread_makes_two_items_ahead():
    """One is taken, two are ready, and the next one waits in its hand for a place. It ends while it waits, too."""
    before, made = set(threading.enumerate()), []

    def items():
        for number in itertools.count():
            made.append(number)
            yield number

    stream = data.ahead(items())
    next(stream)
    thread, = set(threading.enumerate()) - before
    until = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)  # time for one too many
    assert made == [0, 1, 2, 3]
    stream.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_the_thread_ends_when_nobody_wants_more():
    before, stream = set(threading.enumerate()), data.ahead(itertools.count())
    assert [next(stream), next(stream)] == [0, 1]
    thread, = set(threading.enumerate()) - before
    stream.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.slow
def test_a_program_can_end_while_batches_are_made_ahead(tmp_path):
    """A daemon thread inside PyTorch when Python ends would abort the program: exit status 134 after all is done."""
    script = """
import itertools, torch
from minillm.data import ahead
matrix = torch.ones(500, 500)
stream = ahead((matrix @ matrix for _ in itertools.count()), depth=10_000)
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def in_each_process(monkeypatch, world, make) -> list:
    """What make() returns in each of `world` processes that train together."""
    made = []
    for rank in range(world):
        with monkeypatch.context() as patch:
            patch.setattr(data.runtime, "rank", lambda: rank)
            patch.setattr(data.runtime, "world_size", lambda: world)
            made.append(make())
    return made


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_share_the_batch_of_one(tmp_path, monkeypatch, world):
    """batch_size is that of all together: step by step they hold the rows that one process takes."""
    dataset = load(documents(tmp_path / "a.jsonl", 101))
    one = PackedLoader(dataset, 2 * world, 64, seed=0)
    many = in_each_process(monkeypatch, world, lambda: PackedLoader(dataset, 2 * world, 64, seed=0))
    assert {loader.batches(0) for loader in many} == {one.batches(0)}
    for whole, *parts in zip(one.epoch_batches(0), *(loader.epoch_batches(0) for loader in many), strict=True):
        together = torch.cat([part.tokens for part in parts])
        rows = [row.tolist() for row in together if row.any()]  # a process without rows has one of padding
        assert sorted(rows) == sorted(whole.tokens.tolist())
        assert sum(part.n_tokens for part in parts) == whole.n_tokens
        assert sum(part.n_targets for part in parts) == whole.n_targets


def test_what_is_not_shared_comes_whole_in_every_process(tmp_path, monkeypatch):
    """An evaluation: the same numbers everywhere."""
    dataset = load(documents(tmp_path / "a.jsonl", 30))
    loaders = in_each_process(monkeypatch, 2, lambda: PackedLoader(dataset, 2, 64, seed=0, shared=False))
    assert [contents(loader.epoch_batches(0)) for loader in loaders] == [everything(dataset)] * 2


def test_more_processes_than_rows(tmp_path, monkeypatch):
    """A single document and two processes: the second one gets padding instead of waiting for data that never comes."""
    dataset = load(write(tmp_path / "a.jsonl", [{"text": "abc"}]))
    streams = map(iter, in_each_process(monkeypatch, 2, lambda: PackedLoader(dataset, 4, 8, seed=0)))
    for first, second in itertools.islice(zip(*streams), 3):
        assert (first.n_tokens, first.n_targets) == (5, 4) and (second.n_tokens, second.n_targets) == (0, 0)
        assert second.tokens.shape == (1, 8)


# ------------------------------------------------------------------------------------------- held out

def test_equal_items_are_held_out_together():
    """Of the keys 7, 7, 7, 9 either all three sevens or the nine: another copy would be a peek at the answers."""
    assert {tuple(hold_out([7, 7, 7, 9], seed).tolist()) for seed in range(20)} == {(0, 1, 2), (3,)}
    twice = hold_out([*range(100), *range(100)], seed=0).tolist()
    assert len(twice) == 10 and [i + 100 for i in twice[:5]] == twice[5:]


@pytest.mark.parametrize("distinct, held_out", [(2, 1), (39, 1), (40, 2), (300, 15), (9_999, 499), (30_000, 500)])
def test_five_percent_of_the_distinct_items_are_held_out(distinct, held_out):
    """At least one and at most 500."""
    assert len(hold_out(range(distinct), seed=0)) == held_out


def test_from_copies_of_a_single_item_nothing_can_be_held_out():
    assert hold_out([], 0).tolist() == hold_out([7], 0).tolist() == hold_out([7, 7, 7], 0).tolist() == []
    assert hold_out([7], 0).dtype == np.int64  # indices, though there are none


def test_what_is_held_out_does_not_depend_on_what_the_keys_are():
    """They are hashes, which Python draws anew in each process; a run that goes on must hold out what it held out."""
    places = hold_out(range(200), seed=3).tolist()
    assert len(places) == 10 and places == hold_out(range(200, 0, -1), seed=3).tolist()


def test_a_subset(tmp_path):
    dataset = load(write(tmp_path / "a.jsonl", [{"text": c} for c in ("a", "bb", "ccc", "dddd")]))
    subset = Subset(dataset, [1, 3], stats={"sequences": 2})
    assert spell(subset) == ["bb", "dddd"] and subset.lengths([1, 0]).tolist() == [6, 4]


def split(path, seed=0, eval_path="", encode=encode_text):
    return load_split(encode, [path], eval_path, BYTES, 64, seed)


def test_the_held_out_part_is_seeded_disjoint_and_covers_all_with_the_rest(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": f"{i:04d}"} for i in range(300)])
    train, held_out = split(path)
    assert capsys.readouterr().out.endswith("held out for evaluation: 15 of 300 sequences\n")
    assert (len(train), len(held_out)) == (285, 15)
    assert train.stats == {"documents": 300, "tokens": 1800, "trained tokens": 1500, "bytes": 1200, "dtype": "uint16",
                           "sequences held out": 15}
    assert sorted(spell(train) + spell(held_out)) == [f"{i:04d}" for i in range(300)]
    assert spell(split(path)[1]) == spell(held_out) != spell(split(path, seed=1)[1])
    assert contents(PackedLoader(held_out, 4, 16, seed=0).epoch_batches(0)) == everything(held_out)
    assert train.lengths([0, 284]).tolist() == [6, 6]


@pytest.mark.parametrize("encode", [encode_text, encode_conversation])
def test_no_copy_of_a_held_out_sequence_is_trained_on(tmp_path, encode):
    """100 texts, or conversations, each twice: five are held out, both copies of each. The order of the copies and
    keys that are not trained on change nothing."""
    def answer(text):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]

    records = [{"text": f"{i:04d}", "conversations": answer(f"{i:04d}")} for i in range(100)]
    copies = [{**record, "source": "copy"} for record in reversed(records)]
    train, held_out = split(write(tmp_path / "a.jsonl", records + copies), encode=encode)
    assert (len(train), len(held_out)) == (190, 10) and ("bytes" in held_out.stats) is (encode is encode_text)
    assert len(set(spell(held_out))) == 5 and not set(spell(train)) & set(spell(held_out))


def test_the_held_out_part_knows_its_bytes(tmp_path):
    """Bits per byte need them. 20 texts of 3 characters, 9 bytes each: one is held out.

    A text of 68 bytes is cut into two pieces at 64 tokens: one of 63 targets, all of them bytes, and one of 7 tokens,
    whose first is no target and whose last is <|endoftext|>: 5 bytes. Two of the 40 pieces are held out.
    """
    _, held_out = split(write(tmp_path / "a.jsonl", [{"text": "\u4e16\u754c" + chr(0x4e00 + i)} for i in range(20)]))
    assert len(held_out) == 1 and held_out.stats == {"sequences": 1, "bytes": 9}
    path, seen = write(tmp_path / "b.jsonl", [{"text": f"{i:02d}" + "x" * 64 + f"{i:02d}"} for i in range(20)]), []
    for seed in range(4):
        held_out = split(path, seed)[1]
        seen += held_out.lengths([0, 1]).tolist()
        assert held_out.stats["bytes"] == sum({64: 63, 7: 5}[length] for length in seen[-2:])
    assert set(seen) == {64, 7}
    merges = train_tokenizer(["abab"] * 9, 262)  # "abababab" is fewer tokens than it has bytes
    path = write(tmp_path / "c.jsonl", [{"text": "abababab" + c} for c in "0123456789"])
    assert load_split(encode_text, [path], "", merges, 64, 0)[1].stats == {"sequences": 1, "bytes": 9}


def test_a_file_of_ones_own_is_the_held_out_data(tmp_path, capsys):
    """What it shares with the training data is counted."""
    own = write(tmp_path / "b.jsonl", [{"text": "bb"}] * 3)
    train, held_out = split(write(tmp_path / "a.jsonl", [{"text": "a"}]), eval_path=own)
    assert len(train) == 1 and len(held_out) == 3 and held_out.stats["bytes"] == 6
    assert "held-out" not in capsys.readouterr().out
    split(write(tmp_path / "c.jsonl", [{"text": "bb"}, {"text": "c"}]), eval_path=own)
    assert f"{own}: 3 of 3 held-out sequences are in the training data too; " in capsys.readouterr().out


@pytest.mark.parametrize("copies", [1, 30])
def test_a_single_document_is_trained_on_and_evaluated_on(tmp_path, capsys, copies):
    train, held_out = split(write(tmp_path / "a.jsonl", [{"text": "a"}] * copies))
    assert len(train) == len(held_out) == copies
    assert capsys.readouterr().out.endswith("a single sequence: it is trained on and evaluated on\n")


# ------------------------------------------------------------------------------------------- the cache

class Counting(Tokenizer):
    encoded = 0

    def encode(self, *arguments, **options):
        Counting.encoded += 1
        return super().encode(*arguments, **options)


def made_anew(path, encode=encode_text, max_seq_len=64, tokenizer=BYTES) -> bool:
    """Whether the file is tokenised, and not found in the cache."""
    Counting.encoded = 0
    load(path, encode, max_seq_len, Counting(tokenizer.document))
    return Counting.encoded > 0


def test_the_cache_is_used_until_something_changes(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "abc"}])
    assert made_anew(path) and not made_anew(path)
    assert made_anew(path, max_seq_len=32) and made_anew(path, tokenizer=train_tokenizer(["abcabc"], 260))
    assert not made_anew(path)
    write(tmp_path / "a.jsonl", [{"text": "abcd"}])
    assert made_anew(path) and not made_anew(path)
    write(tmp_path / "a.jsonl", [{"text": "abcd", "conversations": HI_YO}])
    assert made_anew(path) and made_anew(path, encode_conversation)


def test_what_counts_is_the_content_of_a_file(tmp_path):
    """Another file of the same size and time is read; the same content of another time or in another folder is not."""
    path = tmp_path / "a.jsonl"
    write(path, [{"text": "abc"}])
    old = path.stat()
    assert made_anew(path)
    write(tmp_path / "new", [{"text": "xyz"}])
    os.replace(tmp_path / "new", path)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    assert made_anew(path) and spell(load(path)) == ["xyz"]
    os.utime(path, ns=(0, 0))
    assert not made_anew(path)
    (tmp_path / "copy").mkdir()
    write(tmp_path / "copy" / "a.jsonl", [{"text": "xyz"}])
    assert not made_anew(tmp_path / "copy" / "a.jsonl")


def test_an_interrupted_build_is_not_taken_for_the_data(tmp_path, monkeypatch, cache):
    """Ctrl-C cleans up. SIGKILL cannot: then a folder of another name stays, which nothing opens."""
    path = documents(tmp_path / "a.jsonl", 50)

    def interrupted(jobs, tokenizer, workers):
        yield token_cache.encode_lines(next(jobs), tokenizer)
        raise KeyboardInterrupt

    for killed in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, "encode_all", interrupted)
            if killed:
                patch.setattr(token_cache.shutil, "rmtree", lambda *arguments, **options: None)
            with pytest.raises(KeyboardInterrupt):
                load(path)
        assert len(list(cache.iterdir())) == killed
    assert len(load(path)) == 50


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert "the token cache cannot be written" in one_line(load, documents(tmp_path / "a.jsonl", 3))


def test_a_full_disk_while_tokenising_leaves_nothing_behind(tmp_path, monkeypatch, cache):
    def full(jobs, tokenizer, workers):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(token_cache, "encode_all", full)
    error = one_line(load, documents(tmp_path / "a.jsonl", 3))
    assert "No space left on device" in error and "MINILLM_CACHE" in error and not any(cache.iterdir())


def test_only_the_first_process_of_a_machine_tokenises(tmp_path, monkeypatch):
    """The others wait until it is done; here that happens while the other one sleeps."""
    path = documents(tmp_path / "a.jsonl", 5)
    monkeypatch.setenv("LOCAL_RANK", "1")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        monkeypatch.setenv("LOCAL_RANK", "0")
        load(path)
        monkeypatch.setenv("LOCAL_RANK", "1")

    monkeypatch.setattr(token_cache.time, "sleep", sleep)
    assert len(load(path)) == 5 and len(slept) == 1


class Killed(Tokenizer):
    """In a worker that the system kills."""

    def encode(self, text, allow_special=False):
        if "fatal" in text:
            os._exit(9)
        return super().encode(text, allow_special)

    def __reduce__(self):
        return Killed, (self.document,)


@pytest.mark.slow
def test_many_processes_make_the_same_cache_as_one(tmp_path, monkeypatch, cache):
    """To the byte. A bad line is reported as by one process. A worker that dies ends the build and does not hang it."""
    monkeypatch.setattr(token_cache, "allowed_threads", lambda: 2)
    monkeypatch.setattr(token_cache, "PARALLEL", 1)
    lines = [json.dumps({"text": f"{i} " + "lorem ipsum " * 50}) for i in range(1500)]  # 0.9 MB: four chunks
    path = tmp_path / "a.jsonl"
    path.write_text(lines[0] + "\n{oops\n" + lines[1])  # one chunk: a single worker, which loads PyTorch
    assert one_line(load, path).startswith(f"{path}:2: not JSON")

    workers_start_at_once(monkeypatch)
    path.write_text(lines[0] + '\n{"text": "fatal"}')
    assert "process was killed" in one_line(load, path, encode_text, 64, Killed(BYTES.document))
    assert not any(cache.iterdir())
    path.write_text("\n".join(lines))
    files = {}
    for parallel in (1 << 30, 1):
        monkeypatch.setattr(token_cache, "PARALLEL", parallel)
        folder = load(path, max_seq_len=1024).folder
        files[parallel] = {file.name: file.read_bytes() for file in folder.iterdir()}
        token_cache.shutil.rmtree(folder)
    assert files[1] == files[1 << 30] and len(files[1]["starts.bin"]) == 8 * (len(lines) + 1)


def peaks_of_memory():
    """In a new process: prints the most MiB so far after epochs over a small, a large and a huge file."""
    import resource
    tokenizer = train_tokenizer(["a"], 259)
    token_cache.CACHE, token_cache.PARALLEL = Path("cache").absolute(), 1 << 40

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    def epoch(dataset):
        return sum(batch.n_tokens for batch in PackedLoader(dataset, 8, 512, seed=0).epoch_batches(0))

    peaks = []
    for lines in (2_000, 20_000):  # 0.6 and 6 MB of text: 1.2 and 12 MB of tokens, 0.6 and 6 MB of masks
        path = Path(f"{lines}.jsonl")
        path.write_text((json.dumps({"text": "lorem ipsum " * 25}) + "\n") * lines, encoding="utf-8")
        dataset = load_dataset(encode_text, str(path), tokenizer, 512)
        assert epoch(dataset) == lines * 302
        peaks.append(peak())
    for name, dtype in (("tokens", np.uint16), ("mask", np.bool_)):  # a cache of 75 MB, written directly
        with open(dataset.folder / f"{name}.bin", "wb") as file:
            for _ in range(50):
                file.write(np.ones(500_000, dtype).tobytes())
    np.arange(0, 25_000_001, 500).tofile(dataset.folder / "starts.bin")
    assert epoch(token_cache.TokenDataset(dataset.folder)) == 25_000_000
    print(*peaks, peak())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Pitfall 17. As Python objects 6 MB of text would take hundreds of MB. Pages of a mapped file count too, and with
    them those that the system maps around one that is read: up to 30 MB of the 75, at the 32 places of a window."""
    pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    (said,) = in_processes(peaks_of_memory)
    small, large, huge = map(float, said.splitlines()[-1].split())
    assert large - small < 24 and huge - small < 48, (small, large, huge)


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_pack_worked_example: `pack([5, 3, 4, 2], 7)` -> `pack([5, 3, 4, 2], 8)`. Who shares a row with whom?
# 2. test_what_max_seq_len_costs_a_conversation_is_counted: `(23, ["Yo"]` -> `(22, ["Yo"]`. What is trained, and how
#    many tokens are lost?
