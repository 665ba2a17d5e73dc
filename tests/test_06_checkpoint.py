"""Chapter 6: what is on the disk. A crash costs the steps since the last checkpoint, never the checkpoint.

After this chapter you can read a safetensors file with a hex editor, and know in which order files are written so that
no crash costs a checkpoint.

A model is stored as safetensors: the length of a header (8 bytes, little endian), the header (JSON) and the numbers.
The two numbers 1.0 and -2.0 as a tensor "a" of shape (2,) in float32 are

    38 00 00 00 00 00 00 00                                             the header is 0x38 = 56 bytes long
    {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}              54 characters, then 2 spaces
    00 00 80 3f  00 00 00 c0                                            1.0 and -2.0 in IEEE 754

No pickle is involved, so a file from a stranger can be opened. A file that was cut short or tampered with is refused,
whatever it claims about itself.
"""

import contextlib
import errno
import json
import os
import pickle
import random
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minillm import runtime, safetensors, training_state
from minillm.checkpoint import (check_tokenizer, config_from_json, config_to_json, load_config, load_model, save_model,
                                weights_of)
from minillm.errors import UserError
from minillm.model import CausalLM, ModelConfig
from minillm.safetensors import DTYPES, atomic_write, load_json, load_safetensors, save_json, save_safetensors
from minillm.training_state import capture_rng, load_training_state, restore_rng, save_training_state, trained_weights
from tests.helpers import in_processes

ONE_AND_MINUS_TWO = (b"\x38\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + b" " * 2
                     + b"\x00\x00\x80\x3f\x00\x00\x00\xc0")
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs fork and resource limits")


class SmallTokenizer:
    """What checkpoint.py needs of a tokenizer."""

    vocab_size, bos_id, endoftext_id, pad_id, end_id, end_ids = 20, 0, 0, 0, 2, [2, 0]
    start_id, end_ids = 1, [2, 0]

    def documents(self, max_length):
        return {"tokenizer.json": {}}


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=6, intermediate_size=20)
    return CausalLM(ModelConfig(**{**sizes, **changes}))


@pytest.fixture
def folder(tmp_path):
    """A small tied checkpoint."""
    save_model(tmp_path / "model", small_model(), SmallTokenizer())
    return tmp_path / "model"


def edit_json(path, **changes):
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))


def edit_weights(folder, change):
    """Write the folder's weights again after change(dict of tensors)."""
    weights = {name: tensor.clone() for name, tensor in load_safetensors(folder / "model.safetensors").items()}
    change(weights)
    save_safetensors(folder / "model.safetensors", weights)


@contextlib.contextmanager
def disk_full_after(size):
    """Files cannot grow beyond `size` bytes, as on a disk with no more room."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------------------------------- safetensors

def test_the_worked_example_is_read(tmp_path):
    (tmp_path / "x").write_bytes(ONE_AND_MINUS_TWO)
    tensors = load_safetensors(tmp_path / "x")
    assert list(tensors) == ["a"] and tensors["a"].dtype == torch.float32 and tensors["a"].tolist() == [1.0, -2.0]


def test_the_worked_example_is_written(tmp_path):
    save_safetensors(tmp_path / "x", {"a": torch.tensor([1.0, -2.0])})
    data = (tmp_path / "x").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert json.loads(data[8:8 + length]) == {
        "__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    assert length % 8 == 0 and data[8 + length:].hex() == "0000803f000000c0"


def assorted_tensors():
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES.values()}
    strange = {"a number": torch.tensor(3.5), "nothing": torch.zeros(0, 4), "transposed": torch.randn(4, 3).t(),
               "a slice, ¿名字?": torch.randn(9)[1::2], "odd size": torch.ones(3, dtype=torch.int8)}
    return {**tensors, **strange}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype and torch.equal(actual[name], expected[name]), name


def test_every_dtype_and_shape_comes_back(tmp_path):
    save_safetensors(tmp_path / "x", assorted_tensors())
    loaded = load_safetensors(tmp_path / "x")
    assert_same(loaded, assorted_tensors())
    # one mapping holds all: none had to be moved to a place that suits its type
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 1


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    contiguous = {name: tensor.contiguous() for name, tensor in assorted_tensors().items()}
    save_safetensors(tmp_path / "ours", assorted_tensors())
    assert_same(package.load_file(tmp_path / "ours"), contiguous)
    package.save_file(contiguous, tmp_path / "theirs", metadata={"by": "them"})
    assert_same(load_safetensors(tmp_path / "theirs"), contiguous)


def test_a_tensor_at_an_odd_byte_is_read(tmp_path):
    """Other writers need not align the numbers: here they start at byte 8 + 55."""
    (tmp_path / "x").write_bytes(struct.pack("<Q", 55) + ONE_AND_MINUS_TWO[8:63] + ONE_AND_MINUS_TWO[-8:])
    assert load_safetensors(tmp_path / "x")["a"].tolist() == [1.0, -2.0]


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    (tmp_path / "x").write_bytes(ONE_AND_MINUS_TWO)
    load_safetensors(tmp_path / "x")["a"].zero_()
    assert (tmp_path / "x").read_bytes() == ONE_AND_MINUS_TWO


def test_a_file_cut_anywhere_is_refused(tmp_path):
    for size in range(len(ONE_AND_MINUS_TWO)):
        (tmp_path / "cut").write_bytes(ONE_AND_MINUS_TWO[:size])
        with pytest.raises(UserError, match="cut is truncated or corrupted"):
            load_safetensors(tmp_path / "cut")


def header(**entries):
    return json.dumps({name: dict(zip(("dtype", "shape", "data_offsets"), entry)) for name, entry in entries.items()})


@pytest.mark.parametrize("text", [
    header(a=("F32", [2], [0, 4])),  # the span is not 2 x 4 bytes
    header(a=("F32", [4], [0, 16])),  # beyond the end of the file
    header(a=("F32", [1], [0, 4])),  # four bytes that belong to nobody
    header(a=("F32", [1], [4, 8])),  # a hole at the start
    header(a=("F32", [2], [0, 8]), b=("F32", [1], [4, 8])),  # two tensors share bytes
    header(a=("F32", [-2], [0, -8])),
    header(a=("F32", [2], [8, 0])),
    header(a=("F32", [2.0], [0, 8])),
    header(a=("F32", [True, 2], [0, 8])),
    header(a=("F32", [2**62, 4], [0, 2**66])),
    header(a=("F32", [2**62, 2**62, 0], [0, 0]), b=("F32", [2], [0, 8])),
    header(a=("F32", 2, [0, 8])),
    header(a=("F32", [2], [0])),
    header(a=("F32", [2], None)),
    header(a=("F31", [2], [0, 8])),
    header(a=([], [2], [0, 8])),
    '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    '{"a":[]}', "[]", "null", "{", "[" * 100_000, "\udcff",
])
def test_a_hostile_header_is_refused(tmp_path, text):
    data = text.encode("utf-8", "surrogateescape")
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(data)) + data + bytes(8))
    with pytest.raises(UserError, match="x is truncated or corrupted"):
        load_safetensors(tmp_path / "x")


def test_a_header_length_beyond_the_file_is_refused_before_anything_is_read(tmp_path):
    for length in (2**63, 2**64 - 1, 200_000_000, 0, 1):
        (tmp_path / "x").write_bytes(struct.pack("<Q", length) + ONE_AND_MINUS_TWO[8:])
        with pytest.raises(UserError, match="x is truncated or corrupted"):
            load_safetensors(tmp_path / "x")


def large_files():
    """In a process of its own: how much memory it takes at most, in MiB."""
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    with open("big", "wb") as file:
        text = json.dumps({"a": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}}).ljust(80).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2**30)
    start = peak()
    assert load_safetensors("big")["a"][-1] == 0
    assert peak() - start < 50, peak() - start
    tensors = {str(i): torch.ones(2**21) for i in range(8)}
    start = peak()
    save_safetensors("small", tensors)
    assert peak() - start < 24, peak() - start


@POSIX
@pytest.mark.slow
def test_memory_follows_what_is_used(tmp_path, monkeypatch):
    """One GiB of zeros (a file with a hole) opens without being read; writing 64 MiB needs no second copy of them."""
    monkeypatch.chdir(tmp_path)
    in_processes(large_files)


# ------------------------------------------------------------------------------------ atomic writing

def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "x") as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_system_call_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call):
    save_training_state(tmp_path, {"step": 1})

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="cannot write .*training_state.pt: No space left on device; .*unchanged"):
        save_training_state(tmp_path, {"step": 2})
    monkeypatch.undo()
    assert load_training_state(tmp_path)["step"] == 1 and os.listdir(tmp_path) == ["training_state.pt"]


@POSIX
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    """The whole folder is saved again with other weights while no file can grow beyond 4,000 bytes."""
    old, new = small_model(seed=1), small_model(seed=2)
    save_model(tmp_path, old, SmallTokenizer())
    save_training_state(tmp_path, {"step": 1, "model": old.state_dict()})
    with disk_full_after(4000):
        with pytest.raises(UserError, match="cannot write .*model.safetensors: File too large; .*unchanged"):
            save_model(tmp_path, new, SmallTokenizer())
        with pytest.raises(UserError, match="cannot write .*training_state.pt: File too large; .*unchanged"):
            save_training_state(tmp_path, {"step": 2, "model": new.state_dict()})
        with pytest.raises(UserError, match="cannot write .*first.safetensors: File too large; nothing"):
            save_safetensors(tmp_path / "first.safetensors", new.state_dict())
    assert_same(load_model(tmp_path).state_dict(), old.state_dict())
    assert_same(load_training_state(tmp_path)["model"], old.state_dict())
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file"):
        save_model(tmp_path / "file", small_model(), SmallTokenizer())


def test_json_is_written_whole_and_read_with_care(tmp_path):
    path = tmp_path / "folder" / "x.json"
    save_json(path, {"text": "你好", "list": [1, None]})
    assert path.read_bytes() == '{\n  "text": "你好",\n  "list": [\n    1,\n    null\n  ]\n}\n'.encode()
    assert load_json(path) == {"text": "你好", "list": [1, None]}
    for text, message in (("[1]", "must hold a JSON object, not list"), ("{", "is not valid JSON"),
                          ("\xff", "is not valid JSON"), ("[" * 100_000, "is not valid JSON")):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=message):
            load_json(path)
    with pytest.raises(UserError, match="cannot read .*nowhere.json: No such file"):
        load_json(tmp_path / "nowhere.json")


def kill_saves(random_kills: int):
    """In a process that has computed nothing, so that it may fork: a child saves state after state; it is killed inside
    each system call of a save, then at random moments."""
    def state(step):
        return {"step": step, "weights": torch.full((50_000,), float(step))}

    def check(at_least):
        found = load_training_state("states")
        step = found["step"]
        assert step >= at_least and torch.equal(found["weights"], state(step)["weights"]), step
        return step

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_after(function):
        return lambda *args: (function(*args), die())

    save_training_state("states", state(1))
    real_fsync, real_replace, step = os.fsync, os.replace, 1
    for fsync, replace, saved in [(die, real_replace, 0), (die_after(real_fsync), real_replace, 0),
                                  (real_fsync, die, 0), (real_fsync, die_after(real_replace), 1)]:
        child = os.fork()
        if child == 0:
            os.fsync, os.replace = fsync, replace
            save_training_state("states", state(step + 1))
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert check(step) == step + saved
        step += saved
    tries = 0
    while tries < random_kills or step == 2 and tries < 200:  # beside other work a save takes longer
        tries += 1
        child = os.fork()
        if child == 0:
            while True:
                step += 1
                save_training_state("states", state(step))
        time.sleep(random.uniform(0.002, 0.08) * (1 + tries // random_kills))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = check(step)
    save_training_state("states", state(step + 1))
    assert check(step + 1) == step + 1 and os.listdir("states") == ["training_state.pt"], os.listdir("states")
    assert step > 2, "no save got through"


@POSIX
@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_a_whole_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("states").mkdir()
    in_processes(kill_saves, 12)


# --------------------------------------------------------------------------------------- model folders

def test_a_model_comes_back_to_the_bit(folder):
    model, again = small_model(), load_model(folder)
    assert again.config == model.config and load_config(folder) == model.config
    assert_same(again.state_dict(), model.state_dict())
    tokens = torch.randint(24, (2, 7))
    assert torch.equal(again(tokens), model(tokens))
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert sorted(os.listdir(folder)) == ["config.json", "generation_config.json", "model.safetensors",
                                          "tokenizer.json"]


def test_tied_embeddings_are_stored_once_and_tied_after_reload(folder):
    """Pitfall 18: saved twice, or two separate matrices after a reload."""
    assert "lm_head.weight" not in load_safetensors(folder / "model.safetensors")
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # embedding 24 x 16; a layer: q 24x16, k and v 12x16, o 16x24, norms 6+6+16+16, MLP 3 x 20x16; final norm 16
    assert sum(p.numel() for p in model.parameters()) == 384 + 2 * (384 + 2 * 192 + 384 + 44 + 960) + 16


def test_untied_embeddings_are_two_matrices(tmp_path):
    save_model(tmp_path, small_model(tie_word_embeddings=False), SmallTokenizer())
    model = load_model(tmp_path)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert_same(model.state_dict(), small_model(tie_word_embeddings=False).state_dict())


def test_a_loaded_model_does_not_depend_on_its_file(folder):
    """The file is only mapped while it is read; Windows could not replace it otherwise."""
    model = load_model(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert_same(model.state_dict(), small_model().state_dict())


def test_a_drive_that_maps_no_files(folder, monkeypatch):
    """Some network drives cannot. There the weights, and the state of a sharded run, are read instead."""
    def refuse(*args, **options):
        raise OSError(errno.ENODEV, "No such device")

    def refuse_storage(*args, **options):  # in PyTorch's words
        raise RuntimeError("unable to mmap 1000 bytes from file <training_state.pt>: No such device (19)")

    monkeypatch.setattr(safetensors.mmap, "mmap", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse_storage)
    assert_same(load_model(folder).state_dict(), small_model().state_dict())
    save_training_state(folder, {"step": 1, "weights": torch.arange(3.0)})
    assert load_training_state(folder, mapped=True)["weights"].tolist() == [0, 1, 2]


def test_loading_draws_no_random_numbers(folder):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_model(folder)
    assert torch.equal(torch.rand(4), expected)


def test_a_bf16_checkpoint_becomes_float32(folder):
    edit_weights(folder, lambda w: w.update({name: tensor.bfloat16() for name, tensor in w.items()}))
    expected = small_model().model.norm.weight.bfloat16().float()
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and torch.equal(model.model.norm.weight, expected)
    q = small_model().model.layers[1].self_attn.q_proj.weight
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, q.bfloat16().float())
    assert {p.dtype for p in load_model(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_what_stays_frozen_is_loaded_straight_into_bf16(folder, monkeypatch):
    """The layers' matrices take half the memory from the start: no float32 copy of them is ever made."""
    monkeypatch.setattr(runtime, "precision", lambda device: torch.bfloat16)
    later = runtime.hold_in_bf16(load_model(folder))
    copies, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **more: (copies.append(args), to(x, *args, **more))[1])
    model = load_model(folder, frozen=True)
    assert_same(model.state_dict(), later.state_dict())
    assert {name: x.dtype for name, x in model.state_dict().items()} == {
        name: torch.bfloat16 if "_proj" in name else torch.float32 for name in model.state_dict()}
    wide = [args for args in copies if args[:2] == ("cpu", torch.float32)]
    assert len(wide) == len([name for name in weights_of(model) if "_proj" not in name])
    monkeypatch.setattr(runtime, "precision", lambda device: torch.float32)
    assert {x.dtype for x in load_model(folder, frozen=True).parameters()} == {torch.float32}


def test_missing_unexpected_and_misshapen_tensors_are_named(folder):
    """Pitfall 19: strict=False leaves a layer at random and says nothing."""
    edit_weights(folder, lambda w: w.update(extra=w.pop("model.norm.weight")))
    with pytest.raises(UserError, match="missing model.norm.weight; unexpected extra"):
        load_model(folder)
    edit_weights(folder, lambda w: w.update({"model.norm.weight": w.pop("extra")[:15]}))
    with pytest.raises(UserError, match=r"model.norm.weight \(15,\) instead of \(16,\)"):
        load_model(folder)


def test_extra_tensors_of_older_files_are_accepted_only_if_harmless(folder):
    def add(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    edit_weights(folder, add)
    assert_same(load_model(folder).state_dict(), small_model().state_dict())
    edit_weights(folder, lambda w: w["lm_head.weight"][0].add_(1))
    with pytest.raises(UserError, match="lm_head.weight differs"):
        load_model(folder)


def shard(folder, **changed_places):
    """Replace model.safetensors by two shards and their index."""
    weights = {name: tensor.clone() for name, tensor in load_safetensors(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_safetensors(folder / file, {name: weights[name] for name in weights if places[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**places, **changed_places}}))


def test_shards_are_put_together(folder):
    shard(folder)
    assert_same(load_model(folder).state_dict(), small_model().state_dict())


@pytest.mark.parametrize("changed, message", [
    ({"model.embed_tokens.weight": "model-00002-of-00002.safetensors"},
     "model.embed_tokens.weight, which .* places in model-00002"),
    ({"nobody": "model-00003-of-00003.safetensors"}, "cannot read .*model-00003"),
    ({"nobody": "model-00001-of-00002.safetensors"}, "do not hold: nobody"),
    ({"model.norm.weight": "../elsewhere.safetensors"}, "file name of this folder"),
    ({"model.norm.weight": "/etc/passwd"}, "file name of this folder"),
    ({"model.norm.weight": "..\\elsewhere"}, "file name of this folder"),
    ({"model.norm.weight": 3}, "file name of this folder"),
])
def test_an_index_that_lies_is_refused(folder, changed, message):
    shard(folder, **changed)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_each_folder_that_is_no_checkpoint_is_told_apart(folder, tmp_path):
    weights, config = folder / "model.safetensors", folder / "config.json"
    with pytest.raises(UserError, match="Qwen/Qwen3-0.6B does not exist; .*download"):
        load_model("Qwen/Qwen3-0.6B")
    with pytest.raises(UserError, match="config.json is a file"):
        load_model(config)
    edit_json(config, architectures=["Qwen3ForSequenceClassification"])
    with pytest.raises(UserError, match="is a reward model"):
        load_model(folder)
    edit_json(config, architectures=["Qwen3ForCausalLM"])
    whole = weights.read_bytes()
    save_safetensors(weights, {f"_orig_mod.{name}": x for name, x in load_safetensors(weights).items()})
    with pytest.raises(UserError, match="no tensor's name begins with model.layers.; there are _orig_mod"):
        load_model(folder)
    weights.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="model.safetensors is truncated or corrupted"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        load_model(folder)
    (folder / "model-00001-of-00001.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match="model.safetensors.index.json is missing; .* model-00001-of-00001.safetensors"):
        load_model(folder)
    (folder / "model-00001-of-00001.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_model(folder)
    config.write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        load_model(folder)
    config.unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        load_model(folder)
    (folder / "model-f16.gguf").write_bytes(b"GGUF")
    for place in (folder, folder / "model-f16.gguf"):
        with pytest.raises(UserError, match="a GGUF file, which llama.cpp and Ollama run and nobody trains"):
            load_model(place)
    cache = tmp_path / "models--Qwen--Qwen3-0.6B"
    (cache / "snapshots" / "c1899d").mkdir(parents=True)
    (cache / "snapshots" / "c1899d" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="of the Hugging Face cache; give the model in it, .*snapshots.c1899d$"):
        load_model(cache)
    (folder / "training_state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="unfinished run; finish it with --resume"):
        load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter, not a whole model"):
        load_model(folder)


def test_a_model_with_other_tensors_is_not_saved_as_if_it_were_plain(tmp_path):
    """A LoRA that was not merged, or the prefix of a wrapper: the folder would be unreadable."""
    model = small_model()
    model.model.extra = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="model.extra.weight"):
        save_model(tmp_path, model, SmallTokenizer())
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_must_fit_the_model():
    tokenizer = SmallTokenizer()
    check_tokenizer(small_model().config, tokenizer, "here")  # 20 tokens, 24 rows: Qwen rounds up, too
    tokenizer.vocab_size = 25
    with pytest.raises(UserError, match="here: the tokenizer has 25 tokens, the model only 24"):
        check_tokenizer(small_model().config, tokenizer, "here")


# ---------------------------------------------------------------------------------------------- config
# As published, without most of the keys that change nothing (a few are kept, and must be ignored).

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936, "transformers_version": "4.51.0", "use_cache": True}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936}
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "vocab_size": 128256}


@pytest.mark.parametrize("document, parameters", [
    (QWEN3_06B, 596_049_920), (QWEN25_05B, 494_032_768), (LLAMA32_1B, 1_235_814_400)])
def test_published_configs_give_the_published_sizes(document, parameters):
    with torch.device("meta"):
        model = CausalLM(config_from_json(document, "config.json"))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_fields_of_published_configs():
    config = config_from_json(QWEN3_06B, "config.json")
    assert (config.rope_theta, config.rope_scaling, config.rms_norm_eps, config.head_dim) == (1e6, {}, 1e-6, 128)
    config = config_from_json(QWEN25_05B, "config.json")
    assert (config.head_dim, config.attention_bias, config.tie_word_embeddings) == (64, False, True)
    config = config_from_json(LLAMA32_1B, "config.json")
    assert (config.rope_theta, config.rms_norm_eps, config.rope_scaling["factor"]) == (5e5, 1e-5, 32.0)


def test_what_is_absent_is_what_transformers_assumes():
    bare = {"model_type": "llama", "vocab_size": 9, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 8}
    assert config_from_json(bare, "here") == ModelConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        intermediate_size=8, max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=False, model_type="llama")
    qwen = config_from_json({**bare, "model_type": "qwen3", "num_key_value_heads": 2}, "here")
    assert (qwen.head_dim, qwen.max_position_embeddings, qwen.tie_word_embeddings) == (128, 32768, False)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("scaling", [{}, LLAMA32_1B["rope_scaling"]])
def test_config_round_trip(model_type, scaling):
    config = ModelConfig(model_type=model_type, rope_theta=5e5, rope_scaling=scaling, tie_word_embeddings=False)
    document = json.loads(json.dumps(config_to_json(config)))
    assert config_from_json(document, "here") == config
    # transformers 4 reads the first line, 5 the second; a file by either has only one of them
    only_4 = {key: value for key, value in document.items() if key != "rope_parameters"}
    only_5 = {key: value for key, value in document.items() if key not in ("rope_theta", "rope_scaling")}
    assert config_from_json(only_4, "here") == config_from_json(only_5, "here") == config


@pytest.mark.parametrize("changes, key", [
    ({"model_type": "gpt2"}, "model_type"),
    ({"model_type": "qwen3_moe"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"model_type": ["qwen3"]}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4}, "use_sliding_window"),
    ({"use_sliding_window": True, "sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]},
     "use_sliding_window"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": -4.0}}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1}, "rope_theta"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_scaling"),
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling"),
    ({"rope_theta": "large"}, "rope_theta"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"num_experts": 8}, "num_experts"),
    ({"is_causal": False}, "is_causal"),
    ({"hidden_size": None}, "hidden_size"),
    ({"vocab_size": "many"}, "vocab_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_attention_heads": True}, "num_attention_heads"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ({"num_key_value_heads": 3}, "key/value heads"),
    ({"head_dim": 127}, "head_dim"),
])
def test_a_config_that_would_compute_something_else_is_refused_by_name(changes, key):
    with pytest.raises(UserError, match=f"^here/config.json: .*{key}"):
        config_from_json({**QWEN3_06B, **changes}, "here/config.json")


def test_a_sliding_window_that_is_switched_off_is_no_reason_to_refuse():
    assert config_from_json({**QWEN3_06B, "sliding_window": 4096, "max_window_layers": 4}, "x").hidden_size == 1024
    assert config_from_json({**QWEN3_06B, "use_sliding_window": True, "max_window_layers": 28}, "x").hidden_size == 1024


# ---------------------------------------------------------------------------------------- exact resume

def draw():
    return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist(),
            torch.randn(1).item())


def test_random_generators_go_on_where_they_were(tmp_path):
    """Pitfall 4. An odd number of normal numbers before: NumPy and Python draw them in pairs and keep the second."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1), draw()
    save_training_state(tmp_path, {"step": 1, "rng": capture_rng()})
    expected = draw()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    restore_rng(load_training_state(tmp_path)["rng"])
    assert draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_generators_of_a_gpu_go_on_where_they_were(tmp_path):
    save_training_state(tmp_path, {"step": 1, "rng": capture_rng("cuda")})
    expected = torch.rand(3, device="cuda")
    torch.rand(5, device="cuda")
    restore_rng(load_training_state(tmp_path)["rng"], "cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_training_goes_on_to_the_bit(tmp_path):
    """Six steps in one go, and three steps, a save into a new process's objects, three steps: equal weights."""
    def train(model, optimizer, steps):
        for _ in range(steps):
            tokens = torch.randint(24, (2, 5))
            optimizer.zero_grad()
            model(tokens).logsumexp(-1).sum().backward()
            optimizer.step()

    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    save_training_state(tmp_path, {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                   "rng": capture_rng()})
    train(model, optimizer, 3)

    state = load_training_state(tmp_path)
    again = small_model(seed=7)
    again.load_state_dict(state["model"])
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.5)
    optimizer.load_state_dict(state["optimizer"])
    restore_rng(state["rng"])
    train(again, optimizer, 3)
    assert_same(again.state_dict(), model.state_dict())


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    save_training_state(tmp_path, {"step": 1})
    for value in (np.float64(1), {3}, print):
        with pytest.raises(ValueError, match=r"state\['deep'\]\[1\] is a "):
            save_training_state(tmp_path, {"step": 2, "deep": [0, value]})
    assert load_training_state(tmp_path)["step"] == 1


def test_a_damaged_or_hostile_state_is_refused(tmp_path):
    path = tmp_path / "training_state.pt"
    with pytest.raises(UserError, match="cannot read .*training_state.pt"):
        load_training_state(tmp_path)
    save_training_state(tmp_path, {"step": 1, "weights": torch.ones(1000)})
    whole = path.read_bytes()
    for bad in (b"", b"not a zip", whole[:-100], whole[:500], pickle.dumps({"step": 1}, protocol=2)):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="training_state.pt is truncated or corrupted"):
            load_training_state(tmp_path)

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"step": Attack()}, path)
    with pytest.raises(UserError, match="training_state.pt is truncated or corrupted"):
        load_training_state(tmp_path)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_lack_of_memory_is_not_called_a_damaged_state(tmp_path, monkeypatch, error):
    """Its advice would be to start again without --resume, and the run would be lost."""
    def fail(*args, **options):
        raise error

    save_training_state(tmp_path, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(torch, "load", fail)
        load_training_state(tmp_path)
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    monkeypatch.setattr(training_state, "restore_optimizer", fail)
    state = {"step": 1, "models": [trained_weights(model)], "optimizers": [optimizer.state_dict()]}
    with pytest.raises(type(error)):
        training_state.restore(state, [model], [optimizer], None, 2, "here", "cpu")


def test_another_thread_count_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    save_training_state(tmp_path, {"step": 1})
    load_training_state(tmp_path)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    load_training_state(tmp_path)
    assert "threads 3 -> 5" in capsys.readouterr().out


def test_frozen_weights_are_not_part_of_the_state():
    """The base model's folder holds them. A tied head is frozen and trained together with its embedding."""
    model = small_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    assert list(trained_weights(model)) == ["model.norm.weight"]
    model.model.embed_tokens.weight.requires_grad_(True)
    assert sorted(trained_weights(model)) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_the_worked_example_is_written: `torch.tensor([1.0, -2.0])` -> `torch.tensor([1.0, 2.0])`. Which single byte
#    changes?
# 2. QWEN3_06B: `"tie_word_embeddings": True` -> `"tie_word_embeddings": False`. How many parameters does
#    test_published_configs count?
