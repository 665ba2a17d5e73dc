"""Chapter 29. Files that are damaged, or made by somebody who means harm.

After this chapter you know what a reader must check before it believes a file, and in which order.

A seeded mutator changes a good file: bits, missing and doubled pieces, JSON values of another type, absurd numbers,
deep nesting, keys that appear twice. Whoever reads the result works, or raises a UserError: one line of at most 500
characters, within seconds, with little memory. `pytest tests/test_29_fuzz.py --fuzz 2000` tries that many files.

The second part names the cases one by one, and says what the message is.
"""

import gzip
import json
import math
import os
import random
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch

from minillm import records, token_cache
from minillm.checkpoint import load_model, require_stage, save_model
from minillm.curves import read_curves
from minillm.data import PackedLoader, encode_conversation, encode_text
from minillm.errors import UserError
from minillm.heads import RewardModel, load_reward_model, save_reward_model
from minillm.lora import apply_lora
from minillm.metrics import Progress, cut_metrics
from minillm.model import CausalLM, ModelConfig
from minillm.optim import make_optimizers, update
from minillm.out_folder import Lock, check_out
from minillm.peft import load_adapter, save_adapter
from minillm.preferences import encode_pair, load_pairs
from minillm.prefix import apply_prefix
from minillm.records import fingerprint
from minillm.safetensors import atomic_write, load_json, load_safetensors, save_safetensors
from minillm.token_cache import load_dataset
from minillm.token_view import check_rollout
from minillm.tokenizer import Tokenizer, train_tokenizer
from minillm.training_state import (capture_rng, load_training_state, restore, restore_rng, save_training_state,
                                    trained_weights)

resource = pytest.importorskip("resource")  # Windows cannot tell how much memory a process took
SECONDS, MEGABYTES = 10, 400  # for one file; parsed JSON takes some twenty times its size
BYTES = train_tokenizer(["abc"], 259)
SIZES = dict(vocab_size=259, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             head_dim=4, intermediate_size=8)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")


def one_line(read, *arguments, **options) -> str:
    """The message of the UserError."""
    with pytest.raises(UserError) as error:
        read(*arguments, **options)
    message = str(error.value)
    assert message.isprintable() and len(message) <= 500
    return message


# ------------------------------------------------------------------------------------ the mutator

ABSURD = [None, True, False, 0, 1, -1, 2**31, 2**62, -2**63, 10**21, 10**400, 1e308, math.inf, math.nan, 0.5, "", "x",
          "\0\n\x1b[31m", "\ud800", "a" * 100_000, "(a+)+$", "(", "../../etc/passwd", [], {}, [[]], [None], {"a": {}},
          [2**62] * 40]


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip bits, cut the end off, leave a piece out, double one, overwrite one."""
    data, kind = bytearray(data), chance.randrange(6)
    at, length = chance.randrange(len(data)), chance.randrange(1, 1 + min(64, len(data)))
    if kind == 0:
        for _ in range(chance.choice([1, 1, 8])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at:at + length]
    elif kind == 3:
        data[at:at] = data[at:at + length]
    elif kind == 4:
        data[at:at + length] = chance.randbytes(length)
    else:
        data += chance.randbytes(length)
    return bytes(data)


def mutate_json(value, chance: random.Random):
    """Replace, remove or add one value somewhere inside, or wrap it."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.7:
        value = dict(value) if isinstance(value, dict) else list(value)
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = chance.randrange(6)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[chance.choice(["x", "a" * 1000, "\n", ""])] = chance.choice(ABSURD)
        else:
            value[key] = mutate_json(value[key], chance)
        return value
    return chance.choice([*ABSURD, [value], {"x": value}, str(value), -value if type(value) in (int, float) else 3])


def to_json(value, chance: random.Random) -> bytes:
    """As bytes; now and then with a key twice, nested beyond all bounds, or damaged as text."""
    text = json.dumps(value).encode()
    kind = chance.randrange(12)
    if kind == 0 and text.startswith(b'{"'):
        text = b'{"' + text[2:].split(b'"')[0] + b'": 7, ' + text[1:]
    elif kind == 1:
        text = text[:-1] + b', "deep": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    elif kind == 2:
        text = mutate_bytes(text, chance)
    return text


def mutate_file(path: Path, chance: random.Random):
    """Change a file in place, in a way that suits its kind."""
    data = path.read_bytes()
    if not data:
        path.write_bytes(b"x")
    elif path.suffix == ".json":
        path.write_bytes(to_json(mutate_json(json.loads(data), chance), chance))
    elif path.suffix == ".jsonl":
        lines = data.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = to_json(mutate_json(json.loads(lines[at]), chance), chance)
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif path.suffix == ".safetensors" and chance.random() < 0.6:
        length = struct.unpack("<Q", data[:8])[0]
        header = to_json(mutate_json(json.loads(data[8:8 + length]), chance), chance)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length:])
    elif path.suffix == ".pt" and chance.random() < 0.6:
        state = torch.load(path, weights_only=True)
        torch.save(mutate_state(state, chance), path)
    else:
        path.write_bytes(mutate_bytes(data, chance))


def mutate_state(value, chance: random.Random):
    """Like mutate_json, for what a training state holds: tensors too."""
    if isinstance(value, (dict, list, tuple)) and value and chance.random() < 0.9:
        value = dict(value) if isinstance(value, dict) else list(value)
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if chance.random() < 0.25:
            del value[key]
        else:
            value[key] = mutate_state(value[key], chance)
        return value
    if isinstance(value, torch.Tensor) and chance.random() < 0.8:
        return chance.choice([value[..., :-1] if value.ndim else value[None], value.to(torch.int8), value * math.nan,
                              value.double(), torch.zeros(1).expand(2**40), value.tolist(), value.flatten()])
    return chance.choice([*ABSURD, torch.zeros(3), [value]])


# ------------------------------------------------------------------------------------ what is read

def tiny_model():
    torch.manual_seed(0)
    return CausalLM(ModelConfig(**SIZES))


def model_folder():
    save_model("model", tiny_model(), BYTES)


def read_model():
    require_stage("model", max_seq_len=16)
    fingerprint("model")
    model, tokenizer = load_model("model"), Tokenizer.load("model")
    if tokenizer.vocab_size <= 259:
        with torch.no_grad():
            model(torch.tensor([tokenizer.encode("hello") or [1]]) % 259)


def sharded_folder():
    save_model("model", tiny_model(), BYTES)
    weights = tiny_model().state_dict()
    weights.pop("lm_head.weight")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_safetensors(Path("model", file), {name: weights[name] for name in weights if places[name] == file})
    Path("model", "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    Path("model", "model.safetensors").unlink()


def reward_folder():
    save_reward_model("model", RewardModel.from_lm(tiny_model()), BYTES)


def lora_folder():
    save_adapter(apply_lora(tiny_model(), 2, 4, ["q_proj", "down_proj"]), "adapter", "model")


def prefix_folder():
    save_adapter(apply_prefix(tiny_model(), 3, [1]), "adapter", "model")


def read_adapter():
    load_adapter(tiny_model(), "adapter")


class Position:
    """A loader, as far as a state knows it."""

    at = {"epoch": 0, "taken": 1}

    def state(self):
        return self.at

    def load_state(self, state):
        self.at = state


def training():
    torch.manual_seed(0)
    model = tiny_model()
    optimizers = make_optimizers(model, 1e-3, muon=True)
    model(torch.tensor([[1, 2, 3]])).square().mean().backward()
    update(model, optimizers, 1.0)
    return model, optimizers


def state_folder():
    model, optimizers = training()
    Path("run").mkdir()
    save_training_state("run", {
        "step": 1, "models": [trained_weights(model)], "optimizers": [o.state_dict() for o in optimizers],
        "loader": {"epoch": 0, "taken": 1}, "rng": [capture_rng()],
        "before": {"val_loss": 5.5, "accuracy_by_task": {"add": 0.5}, "replies": [["1 + 1?", "2"]]}})


def read_state():
    state = load_training_state("run")
    model, optimizers = training()
    generators = capture_rng()
    try:
        restore(state, [model], optimizers, Position(), 8, "run/training_state.pt", torch.device("cpu"))
        model(torch.tensor([[1, 2, 3]])).square().mean().backward()
        update(model, optimizers, 1.0)  # whatever is accepted can be trained on
        torch.rand(1), random.gauss(0, 1)
    finally:
        restore_rng(generators)


def log_folder():
    Path("run").mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    Path("run", "metrics.jsonl").write_text("\n".join(lines) + "\n")
    Path("run", "summary.json").write_text('{"steps": 5, "after": {"val_loss": 1.0}}')


def read_log():
    cut_metrics(Path("run", "metrics.jsonl"), 3)
    load_json(Path("run", "summary.json"))


def write_records(name, records):
    Path("data").mkdir()
    Path("data", name).write_text("".join(json.dumps(record) + "\n" for record in records))


def cache_folder():
    write_records("text.jsonl", [{"text": f"number {i}"} for i in range(20)])
    load_dataset(encode_text, "data/text.jsonl", BYTES, 64)


def read_cache():
    dataset = load_dataset(encode_text, "data/text.jsonl", BYTES, 64)
    assert len(dataset) == 20 and dataset.stats["documents"] == 20  # a damaged one is made again
    assert sum(batch.n_tokens for batch in PackedLoader(dataset, 4, 64, seed=0).epoch_batches(0)) == 20 * 10 + 10


TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def conversation_file():
    write_records("chats.jsonl", [{"conversations": TURNS}] * 3)


def read_conversations():
    dataset = load_dataset(encode_conversation, "data/chats.jsonl", BYTES, 64)
    assert len(dataset) <= 3


def pair_file():
    other = [TURNS[0], {"role": "assistant", "content": "3"}]
    write_records("pairs.jsonl", [{"chosen": TURNS, "rejected": other, "margin": 1.5, "kind": "sum"}] * 3)


def read_pairs():
    load_pairs(["data/pairs.jsonl"], "", BYTES, 64, seed=0)
    load_dataset(encode_pair, ["data/pairs.jsonl"], BYTES, 64).labels()


# {kind: (make it, the files that are changed, read it)}
KINDS = {
    "config": (model_folder, "model/config.json", read_model),
    "tokenizer": (model_folder, "model/tokenizer.json", read_model),
    "tokenizer's config": (model_folder, "model/[tg]*_config.json", read_model),
    "weights": (model_folder, "model/model.safetensors", read_model),
    "index": (sharded_folder, "model/*.index.json", read_model),
    "reward model": (reward_folder, "model/[cm]*", lambda: load_reward_model("model")),
    "LoRA": (lora_folder, "adapter/*", read_adapter),
    "prefix": (prefix_folder, "adapter/*", read_adapter),
    "state": (state_folder, "run/training_state.pt", read_state),
    "log": (log_folder, "run/*", read_log),
    "cache": (cache_folder, "cache/*/*", read_cache),
    "conversations": (conversation_file, "data/*", read_conversations),
    "pairs": (pair_file, "data/*", read_pairs),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_is_read_or_refused_in_one_line(kind, request):
    """Seeded: the same files each time. At the end the good file is read, so the refusals are those of the changes."""
    count = -(-max(request.config.getoption("--fuzz"), 40) // len(KINDS))
    make, pattern, read = KINDS[kind]
    make()
    read()
    for folder in [path for path in Path().iterdir() if path.is_dir()]:
        shutil.copytree(folder, Path("good", folder))
    found = {"read": 0, "refused": 0}
    for number in range(count):
        chance = random.Random(f"{kind} {number}")
        path = chance.choice(sorted(path for path in Path().glob(pattern) if path.is_file()))
        mutate_file(path, chance)
        began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read()
            found["read"] += 1
        except UserError as error:
            found["refused"] += 1
            assert str(error).isprintable() and len(str(error)) <= 500, (kind, number)
        except BaseException as error:
            raise AssertionError(f"{kind}, file {number}: {type(error).__name__}: {str(error)[:500]}") from error
        assert time.process_time() - began < SECONDS, (kind, number)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES << 10, (kind, number)
        for folder in Path("good").iterdir():
            shutil.rmtree(folder.name, ignore_errors=True)
            shutil.copytree(folder, folder.name)
    read()
    print(f"fuzz {kind}: {count} files, {found['read']} read, {found['refused']} refused")
    assert found["refused"] or kind in ("log", "cache", "tokenizer's config")


# ------------------------------------------------------------------------------------ models and adapters

def edit(path, **changes):
    content = {**json.loads(Path(path).read_text(encoding="utf-8")), **changes}
    Path(path).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("changes, message", [
    ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2,147,483,647, the weights are those of 2 layers"),
    ({"vocab_size": 2**31 - 1}, "vocab_size is 2,147,483,647 and hidden_size is 8, the largest tensor has 2,072"),
    ({"head_dim": 2**31 - 2}, "num_attention_heads x head_dim is 4,294,967,292 and hidden_size is 8"),
    ({"architectures": 7}, "architectures = 7 must be a list of names"),
    ({"architectures": [["Qwen3ForCausalLM"]]}, "must be a list of names"),
    ({"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no" must be true or false'),
    ({"rope_theta": 1e-300, "rope_parameters": None}, "rope_theta = 1e-300 must be a number between 1 and 1e15"),
    ({"model_type": "x" * 10**6}, "is not supported"),
])
def test_a_config_is_compared_with_the_weights_before_anything_is_built(changes, message):
    model_folder()
    edit("model/config.json", **changes)
    began = time.process_time()
    assert message in one_line(load_model, "model")
    assert time.process_time() - began < 2


def test_weights_that_are_no_numbers_are_named():
    """NaN, infinity and whole numbers, in a model, a reward model and an adapter."""
    for make, read, name in ((model_folder, read_model, "model/model.safetensors"),
                             (reward_folder, lambda: load_reward_model("model"), "model/model.safetensors"),
                             (lora_folder, read_adapter, "adapter/adapter_model.safetensors")):
        make()
        good = {name: tensor.clone() for name, tensor in load_safetensors(name).items()}
        last = sorted(good)[-1]
        for value in (math.nan, math.inf, -math.inf):
            bad = {**good, last: good[last].clone()}
            bad[last].view(-1)[-1] = value
            save_safetensors(name, bad)
            error = one_line(read)
            assert last in error and "NaN or infinite" in error
        save_safetensors(name, {**good, last: torch.full_like(good[last], 3e38)})  # its sum is infinite, it is not
        read()
        for dtype in (torch.int8, torch.bool):
            save_safetensors(name, {**good, last: good[last].to(dtype)})
            assert f"{last}' holds {str(dtype)[6:]} numbers" in one_line(read)


def test_a_header_of_99_mb_is_not_parsed():
    with open("x.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b'{"a": [[')
        file.truncate(100_000_000)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "at most 4,194,304 are read" in one_line(load_safetensors, "x.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50 << 10


def test_numbers_that_only_quantized_models_have_are_named():
    """Such a file is not damaged, and another copy of it would be no better."""
    for dtype, size in (("F8_E4M3", 1), ("F4", 1), ("U32", 4)):
        header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}).encode()
        Path("x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
        assert f"x.safetensors: 'a' holds {dtype} numbers, which are not" in one_line(load_safetensors, "x.safetensors")


def test_an_empty_tensor_needs_no_alignment():
    header = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'  # 54 bytes: the data begins at byte 62
    Path("x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert load_safetensors("x.safetensors")["a"].shape == (0,)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "data.jsonl"])
def test_a_file_that_git_lfs_has_not_fetched_is_named(name):
    model_folder()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12345\n"
    Path("model", name).write_text(pointer, encoding="utf-8")
    read = read_model if name != "data.jsonl" else lambda: list(records.read_lines(Path("model", name)))
    message = one_line(read)
    assert name in message and "Git LFS pointer; git lfs pull fetches the file itself" in message


def test_the_ids_of_a_tokenizer_are_near_its_number_of_tokens():
    BYTES.save("tokenizer.json")
    for big in (2**31, 10**21):
        document = json.loads(Path("tokenizer.json").read_text(encoding="utf-8"))
        document["model"]["vocab"]["a"] = big
        Path("big.json").write_text(json.dumps(document), encoding="utf-8")
        assert "far beyond the number of tokens, 259" in one_line(Tokenizer.load, "big.json")


@pytest.mark.parametrize("merge", ["a b c", "ab", "", ["a", "b", "c"], ["a b", "c"], "zz zz", "z z"])
def test_a_merge_that_is_none_is_named(merge):
    """Three tokens, one, none; tokens that the vocabulary lacks, or two whose sum it lacks."""
    BYTES.save("tokenizer.json")
    document = json.loads(Path("tokenizer.json").read_text(encoding="utf-8"))
    document["model"]["merges"] = [merge]
    Path("tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    assert "] is not two tokens that make a third one" in one_line(Tokenizer.load, "tokenizer.json")


def test_a_prefix_gets_no_room_before_its_tensor_has_it():
    prefix_folder()
    edit("adapter/adapter_config.json", num_virtual_tokens=2000)
    assert "(3, 16) instead of (2000, 16)" in one_line(read_adapter)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_not_waited_for():
    for make, read, paths in (
            (model_folder, read_model, ["model/config.json", "model/tokenizer.json", "model/model.safetensors"]),
            (lora_folder, read_adapter, ["adapter/adapter_model.safetensors"]),
            (state_folder, read_state, ["run/training_state.pt"])):
        for path in paths:
            for put in (os.mkfifo, os.mkdir):
                shutil.rmtree(Path(path).parent, ignore_errors=True)
                make()
                os.remove(path)
                put(path)
                one_line(read)


SIDE_FILES = ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_damaged_file_beside_the_tokenizer_is_named(name):
    """No model needs these files. But without one, a reply would end elsewhere, or be written in another format."""
    model_folder()
    path = Path("model", name)
    whole = path.read_bytes() if path.exists() else b""
    not_json = [whole[:len(whole) // 2], b"[]", b"null", b"NaN", b"7", b'{"a":' + b"[" * 100_000, b"\0" * 40]
    for content in [b"", b"\xff\xfe{}", whole + b" " * 2**22, b"{}\xe9", *not_json * name.endswith(".json")]:
        path.write_bytes(content)
        assert str(path) in one_line(Tokenizer.load, "model")
    for put in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("gone")):
        path.rmdir() if path.is_dir() else path.unlink()
        put(path)
        assert f"cannot read {path}" in one_line(Tokenizer.load, "model")


@pytest.mark.parametrize("name, key, values, must_be", [
    ("tokenizer_config.json", "eos_token", [5, True, [], ["x"], {}, {"content": 5}, math.nan], "must be a token"),
    ("tokenizer_config.json", "chat_template", [5, False, {}, ["x"], [{"name": "default"}], [None]], "must be text or"),
    ("tokenizer_config.json", "added_tokens_decoder", [[], "x", {"1": 5}, {"x": {"content": "y"}}, {"1": {}},
                                                       {"9" * 5000: {"content": "y"}}], "must be an object"),
    ("tokenizer_config.json", "added_tokens_decoder", [{"1": {"content": "<|im_end|>"}}, {"2": {"content": "y"}},
                                                       {"7": {"content": "<|im_end|>"}}], "tokenizer.json does not"),
    ("generation_config.json", "eos_token_id", ["x", True, 2.0, -2, 10**400, [[2]], [None], {}], "must be the id of"),
    ("config.json", "pad_token_id", ["x", 10**400, {}], "must be the id of"),
])
def test_a_setting_of_the_wrong_type_beside_the_tokenizer_is_named(name, key, values, must_be):
    for value in values:
        model_folder()
        edit(f"model/{name}", **{key: value})
        message = one_line(Tokenizer.load, "model")
        assert must_be in message and f"model/{name}: {key}" in message.replace(os.sep, "/")


def test_half_of_a_surrogate_pair_in_a_setting_comes_back():
    model_folder()
    Path("model", "generation_config.json").write_text(r'{"a": "\ud800"}', encoding="utf-8")
    save_model("again", load_model("model"), Tokenizer.load("model"))
    assert load_json(Path("again", "generation_config.json"))["a"] == "\ud800"


@pytest.mark.parametrize("context", ["x", [1], -5, 10**30, math.nan, math.inf])
def test_the_old_context_of_rope_is_a_number(context):
    for kind in ("yarn", "llama3"):
        model_folder()
        edit("model/config.json", original_max_position_embeddings=context, rope_scaling={
            "rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0})
        assert "needs a positive original_max_position_embeddings" in one_line(load_model, "model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_json_that_python_can_just_read_and_not_write_is_refused(name):
    """Python stops at a depth of about 1,000. Showing or writing a value takes some levels more than reading it."""
    model_folder()
    whole = Path("model", name).read_text(encoding="utf-8").rstrip()[:-1]
    for depth in (100, *range(900, 1000, 4)):
        Path("model", name).write_text(whole + f', "x": {"[" * depth}{"]" * depth}}}', encoding="utf-8")
        message = one_line(read_model)
        assert name in message and ("nested more than 100 levels deep" in message or "recursion" in message)
    line = '{"conversations": [{"role": "user", "content": "a", "weight": %s}]}' % ('{"a":' * 900 + "1" + "}" * 900)
    assert one_line(records.parse_line, line, "a.jsonl:3").startswith("a.jsonl:3: not JSON (nested more than 100")


def test_a_list_of_layers_is_not_made_as_long_as_config_json_says():
    model_folder()
    edit("model/config.json", num_hidden_layers=2**31 - 1, use_sliding_window=True, layer_types=["full_attention"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one_line(load_model, "model")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50 << 10


def test_names_and_patterns_of_an_adapter_are_few():
    for names in ([f"n{i}" for i in range(10_001)], "a" * 1001):
        lora_folder()
        edit("adapter/adapter_config.json", target_modules=names)
        assert "it must be a list of names, or a simple pattern" in one_line(read_adapter)


# ------------------------------------------------------------------------------------ states and logs

def test_a_state_that_lacks_anything_is_refused():
    state_folder()
    state = torch.load("run/training_state.pt", weights_only=True)
    for key in state:
        torch.save({name: value for name, value in state.items() if name != key}, "run/training_state.pt")
        assert "start again without --resume" in one_line(read_state)


def test_a_state_that_unpacks_to_more_than_it_is_is_not_unpacked():
    state_folder()
    with zipfile.ZipFile("run/training_state.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(10**7))
    assert Path("run/training_state.pt").stat().st_size < 10**6
    assert "truncated or corrupted" in one_line(load_training_state, "run")


def test_a_state_that_asks_for_memory_is_not_loaded():
    """What torch.load calls without asking: bytearray(2**40)."""
    state_folder()
    with zipfile.ZipFile("run/training_state.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("/data.pkl"))
    entries[name] = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R."
    with zipfile.ZipFile("run/training_state.pt", "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    assert "truncated or corrupted (ValueError)" in one_line(load_training_state, "run")


def test_a_state_may_hold_replies_about_anything():
    """Also the name of what is refused above: a reply of the evaluation before training is text, and calls nothing."""
    state_folder()
    path = Path("run/training_state.pt")
    said = [["What is a bytearray?", "cbuiltins\nbytearray\n"]]
    torch.save({**torch.load(path, weights_only=True), "before": {"replies": said}}, path)
    assert load_training_state("run")["before"] == {"replies": said}


def test_curves_leave_out_what_is_no_step(capsys):
    Path("run").mkdir()
    lines = ["null", "[1]", '{"loss": 9}', '{"step": "a", "loss": 9}', '{"step": 2, "loss": NaN}', "[" * 10**5,
             '{"step": 2, "loss": 1e400}', '{"step": 2, "loss": ' + "9" * 400 + "}", "\ud800",
             '{"step": null, "loss": 9}']
    text = "\n".join(['{"step": 1, "loss": 2.0}', *lines, '{"step": 3, "loss": 1.0}'])
    Path("run", "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read_curves("run") == {"loss": [(1, 2.0), (3, 1.0)]}


def test_a_rollout_with_a_number_of_400_digits_or_a_terminals_commands_is_refused():
    good = {"step": 1, "reward": 1.0, "tokens": ["a"], "advantages": [None], "ratios": [None]}
    check_rollout(good, "x:1")
    for change in ({"reward": 10**400}, {"step": "\x1b[2J"}, {"tokens": ["\x1b[2J"]}, {"ratios": [10**400]}):
        assert "x:1: not a line of rollout.jsonl" in one_line(check_rollout, {**good, **change}, "x:1")


def test_a_line_that_unpacks_to_far_more_than_the_file_is_refused(monkeypatch):
    monkeypatch.setattr(records, "SMALL", 1 << 20)
    for line in (b"a" * (1 << 23), b"[" + b"1,\n" * (1 << 21)):
        Path("x.jsonl").write_bytes(gzip.compress(line))
        assert "unpacks to more than" in one_line(list, records.read_lines("x.jsonl"))


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_the_lock_of_a_run_follows_no_link_and_waits_for_no_pipe():
    Path("victim").write_text("precious", encoding="utf-8")
    os.symlink("victim", "out.lock")
    assert "cannot write out.lock" in one_line(Lock, Path("out"))
    assert Path("victim").read_text(encoding="utf-8") == "precious"
    os.remove("out.lock")
    os.mkfifo("out.lock")
    assert "cannot write out.lock" in one_line(Lock, Path("out"))
    os.symlink("loop", "loop")
    for out in ("loop", "a" * 300, "victim/x"):
        with pytest.raises(UserError):
            check_out(Path(out).absolute(), [])
            Lock(Path(out).absolute())


def test_a_log_that_cannot_be_written_names_the_way_out(capsys):
    """A limit on the size of files acts like a full disk. The same for a folder in the place of the log."""
    progress, limits = Progress(".", 10), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        error = one_line(progress.log, 1, 0, **{"loss" * 100: 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics.jsonl: File too large; the last checkpoint is whole: make room and use --resume" in error
    progress.close()
    os.remove("metrics.jsonl")
    os.mkdir("metrics.jsonl")
    assert "cannot write metrics.jsonl" in one_line(Progress, ".", 10)
    assert "cannot read metrics.jsonl" in one_line(cut_metrics, Path("metrics.jsonl"), 3)


# ------------------------------------------------------------------------------------ temporary files

@pytest.mark.skipif(os.name != "posix", reason="needs links and locks")
def test_what_a_killed_write_left_is_removed_and_no_link_is_followed():
    """A name of the past, a planted link at it, a leftover, and the file of a process that is still at work."""
    Path("victim").write_text("precious", encoding="utf-8")
    os.symlink("victim", "a.json.tmp")
    os.symlink("victim", "a.json.0123456789abcdef.tmp")
    Path("a.json.fedcba9876543210.tmp").write_text("half", encoding="utf-8")
    with atomic_write("b.json") as other:
        other_name = other.name
        for _ in range(2):
            with atomic_write("a.json") as file:
                assert Path(file.name).stat().st_size == 0 and file.name != "a.json.tmp"
                file.write(b"whole")
            with atomic_write("b.json") as file:
                file.write(b"second")
        assert Path(other_name).exists()
        other.write(b"first")
    assert Path("victim").read_text(encoding="utf-8") == "precious" and Path("b.json").read_bytes() == b"first"
    assert sorted(os.listdir()) == ["a.json", "a.json.0123456789abcdef.tmp", "a.json.tmp", "b.json", "victim"]


# ------------------------------------------------------------------------------------ the token cache

def texts(count):
    write_records("text.jsonl", [{"text": f"number {i} " + "red " * 17_500} for i in range(count)])  # 4 to a chunk


def load():
    return load_dataset(encode_text, "data/text.jsonl", BYTES, 64)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def interrupted_after(chunks):
    def encode_all(jobs, tokenizer, workers):
        for number, job in enumerate(jobs):
            if number == chunks:
                raise KeyboardInterrupt
            yield token_cache.encode_lines(job, tokenizer)
    return encode_all


def test_a_damaged_cache_is_made_again(capsys):
    cache_folder()
    folder = load().folder
    good = contents(folder)
    assert sorted(good) == ["labels.jsonl", "mask.bin", "starts.bin", "stats.json", "tokens.bin"]
    for name, change in (("tokens.bin", good["tokens.bin"][:-2]), ("tokens.bin", good["tokens.bin"] + b"\0\0"),
                         ("mask.bin", good["mask.bin"][::-1]), ("starts.bin", None), ("stats.json", b"{}"),
                         ("stats.json", good["stats.json"].replace(b'"documents": 20', b'"documents": 21'))):
        os.remove(folder / name)
        if change is not None:
            (folder / name).write_bytes(change)
        capsys.readouterr()
        load()
        said = capsys.readouterr().out.splitlines()
        assert "the token cache is damaged" in said[0] and "made again" in said[0]
        assert contents(folder) == good and len(os.listdir("cache")) == 1
        load()
        assert "damaged" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_build_that_was_ended_goes_on_where_it_was(monkeypatch, capsys):
    """Of five chunks two were flushed and a third was not; what follows the second is encoded, and the result is that
    of a build that nothing disturbed. A build of other data removes what is left of this one."""
    texts(18)
    folder = load().folder
    whole = contents(folder)
    shutil.rmtree(folder)
    monkeypatch.setattr(token_cache, "PART", 500_000)  # two chunks of 280,000 bytes
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "encode_all", interrupted_after(3))
        with pytest.raises(KeyboardInterrupt):
            load()
    part = Path(f"{folder}.part")
    assert part.is_dir() and not folder.exists()
    with open(part / "tokens.bin", "ab") as file:
        file.write(b"torn")
    encoded, encode_lines = [], token_cache.encode_lines

    def count(job, tokenizer):
        encoded.append(job)
        return encode_lines(job, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "encode_lines", count)
        load()
    assert len(encoded) == 3 and contents(folder) == whole and not part.exists()
    assert "1 MB of them were tokenised before a run was ended: going on from there" in capsys.readouterr().out

    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "encode_all", interrupted_after(3))
        with pytest.raises(KeyboardInterrupt):
            load()
    assert part.exists()
    load_dataset(encode_text, "data/text.jsonl", BYTES, 32)
    assert not part.exists() and len(os.listdir("cache")) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(monkeypatch):
    """Also where the change shows as a mistake in a line."""
    texts(9)
    for addition in ('{"text": "new"}\n', '{"text": "half'):
        def encode_all(jobs, tokenizer, workers):
            for number, job in enumerate(jobs):
                if number == 1:
                    with open("data/text.jsonl", "a", encoding="utf-8") as file:
                        file.write(addition)
                yield token_cache.encode_lines(job, tokenizer)

        monkeypatch.setattr(token_cache, "encode_all", encode_all)
        assert one_line(load) == "data/text.jsonl: changed while it was read; " \
                                 "run the command again once nothing writes to it"
        assert os.listdir("cache") == []


@pytest.mark.skipif(os.name != "posix", reason="needs links and locks")
def test_a_planted_link_in_the_cache_is_not_followed(capsys):
    cache_folder()
    folder = load().folder
    shutil.rmtree(folder)
    part, victim = Path(f"{folder}.part"), Path("victim")
    victim.mkdir()
    (victim / "tokens.bin").write_text("precious", encoding="utf-8")
    part.symlink_to(victim.absolute())
    load()
    shutil.rmtree(folder)
    part.mkdir()
    (part / "tokens.bin").symlink_to((victim / "tokens.bin").absolute())
    assert "cannot be written" in one_line(load)
    load()
    assert contents(victim) == {"tokens.bin": b"precious"} and os.listdir("cache") == [folder.name]


@pytest.mark.skipif(os.name != "posix", reason="needs locks")
def test_a_second_run_waits_for_the_first(monkeypatch, capsys):
    """The first is at work in this very process; it finishes while the second sleeps."""
    cache_folder()
    folder = load().folder
    moved = folder.rename("made elsewhere")
    part = Path(f"{folder}.part")
    part.mkdir()
    first = open(part / "tokens.bin", "wb")
    assert token_cache.try_lock(first)

    def sleep(seconds):
        shutil.rmtree(part)
        first.close()
        moved.rename(folder)

    monkeypatch.setattr(token_cache.time, "sleep", sleep)
    assert len(load()) == 20
    assert "another run is tokenising data/text.jsonl: waiting for it" in capsys.readouterr().out
    assert os.listdir("cache") == [folder.name]


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_the_ids_of_a_tokenizer_are_near_its_number_of_tokens: `(2**31, 10**21)` -> `(300, 10**21)`. Is 300 far
#    beyond 259?
# 2. test_a_config_is_compared_with_the_weights_before_anything_is_built: `{"rope_theta": 1e-300` -> `{"rope_theta":
#    0.5`. Is it refused?
