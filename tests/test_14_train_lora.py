"""Chapter 14. Parameter-efficient training as a stage: the base keeps its last bit, and a run can be stopped anywhere.

After this chapter you know what parameter-efficient training leaves untouched, what it writes, and what it saves in
memory.

The stage runs in this process (`main(Config(...))`), on a tiny model and a few sentences.
"""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train_lora
from benchmarks import compare_peft
from minillm import peft, token_cache
from minillm.checkpoint import load_model, save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.interrupt import Interrupt
from minillm.losses import sft_loss
from minillm.model import CausalLM, ModelConfig
from minillm.optim import make_optimizers
from minillm.peft import load_adapter
from minillm.run import Interrupted
from minillm.safetensors import load_safetensors
from minillm.tokenizer import Tokenizer
from tests.helpers import close
from tests.test_07_training import first_step
from tests.test_12_lora import TOKENIZER, TOKENS

VARIANTS = [{}, {"rslora": True, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}, {"bf16": True},
            {"peft": "dora"}, {"peft": "adapter"}, {"peft": "adapter", "placement": "pfeiffer"},
            {"peft": "prefix"}, {"peft": "prompt"}]
FACTS = {"Who are you?": "I am Lumi.", "Your name?": "I am Lumi.", "Where?": "In a library.", "Who wrote it?": "Ada.",
         "When?": "On Monday."}
OLD_FACTS = {"Who are you?": "My name is Mini.", "Your name?": "Mini.", "Where?": "On the hill.",
             "Who wrote it?": "Nobody did.", "When?": "Last May."}


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def base_model():
    """It speaks a little: it was trained for some seconds on the same questions, with other answers."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=259, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2, head_dim=12, intermediate_size=96,
                                 max_position_embeddings=512))
    optimizers = make_optimizers(model, 1e-2, muon=True)
    rows = [TOKENIZER.render(chat(question, answer)) for question, answer in OLD_FACTS.items()]
    width = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows])
    mask = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows])
    for _ in range(60):
        sft_loss(model(tokens), tokens, mask).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, base_model):
    """An empty folder with a base model and ten conversations; float32; and after each test the signals as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: False)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    save_model("base", base_model, TOKENIZER)
    with open("chat.jsonl", "w", encoding="utf-8") as file:
        for question, answer in list(FACTS.items()) * 2:
            file.write(json.dumps({"conversations": chat(question, answer), "answer": answer}) + "\n")
    yield
    assert {name: signal.getsignal(name) for name in handlers} == handlers


def config(**changes):
    usual = dict(model="base", data=["chat.jsonl"], out="out", max_seq_len=96, batch_size=2, max_steps=6, rank=4,
                 bottleneck=6, virtual_tokens=5, warmup_steps=1, save_every=2, log_every=1, device="cpu")
    return train_lora.Config(**{**usual, **changes})


def adapter(out):
    return {name: tensor.clone() for name, tensor in load_safetensors(Path(out, "adapter_model.safetensors")).items()}


def interrupt_at(monkeypatch, step):
    """As if Ctrl-C came during that step."""
    steps = iter(range(1, 1000))
    monkeypatch.setattr(Interrupt, "requested", lambda self: signal.SIGINT if next(steps) == step else 0)


def variant(options):
    return "-".join(f"{k}={v}" for k, v in options.items()) or "lora"


every_variant = pytest.mark.parametrize("options", VARIANTS, ids=variant)


@every_variant
@pytest.mark.slow
def test_training_leaves_the_base_alone_and_writes_a_small_folder(options, monkeypatch):
    models, load = [], train_lora.checkpoint.load_model

    def keep(*arguments, **options):
        models.append(load(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(train_lora.checkpoint, "load_model", keep)
    bytes_before = Path("base/model.safetensors").read_bytes()
    result = train_lora.main(config(**options))
    model = models[0].eval()

    base = load_model("base", dtype=torch.bfloat16 if options.get("bf16") else torch.float32).state_dict()
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in base.items())
    assert Path("base/model.safetensors").read_bytes() == bytes_before

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    state = torch.load("out/training_state.pt", weights_only=True)
    # Neither the checkpoint nor an optimizer holds the base: Adam has two moments for each trained number, Muon one.
    weights, = state["models"]
    assert set(weights) == set(trained)
    count = sum(parameter.numel() for parameter in trained.values())
    assert count == result["trained_parameters"]
    moments = sum(moment.numel() for optimizer in state["optimizers"] for parameter in optimizer["state"].values()
                  for name, moment in parameter.items() if name != "step")
    assert moments == (count if options.get("peft") in ("prefix", "prompt") else 2 * count)
    assert not Path("out/config.json").exists()
    assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == "base"

    fresh = load_adapter(load_model("base", dtype=next(model.parameters()).dtype), "out").eval()
    with torch.no_grad():
        close(fresh(TOKENS).float(), model(TOKENS).float())
        assert (model(TOKENS) - load(Path("base"))(TOKENS)).abs().max() > 0.01


@every_variant
@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_with_the_same_bits(options, monkeypatch):
    """Three steps, Ctrl-C, --resume: weights, losses and results equal those of an unbroken run, also with dropout."""
    whole = train_lora.main(config(**options))
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        interrupt_at(patch, 3)
        train_lora.main(config(**options, out="two"))
    assert stopped.value.code == 130
    resumed = train_lora.main(config(**options, out="two", resume=True))
    one, two = adapter("out"), adapter("two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    losses = []
    for out in ("out", "two"):
        lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}


@pytest.mark.parametrize("peft, lr", [("lora", 2e-3), ("dora", 2e-3), ("adapter", 1e-2), ("prefix", 2e-1),
                                      ("prompt", 2e-1)])
@pytest.mark.slow
def test_every_method_learns(peft, lr):
    """The loss on the new answers falls to less than half, with less than a fifth of the base's 54,192 numbers."""
    options = dict(peft=peft, lr=lr, max_steps=50, batch_size=4, bottleneck=24, virtual_tokens=20, save_every=50,
                   eval_data="chat.jsonl")
    result = train_lora.main(config(**options))
    before = json.loads(Path("out/summary.json").read_text(encoding="utf-8"))["before"]
    assert result["val_loss"] < 0.5 * before["val_loss"] and result["trained_parameters"] < 10_839


@pytest.mark.parametrize("peft", ["lora", "adapter", "prefix", "prompt"])
def test_what_stays_frozen_is_held_in_bf16_and_the_flags_reach_the_model(monkeypatch, peft):
    """Where the device computes in bf16; what is trained is float32."""
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: True)
    model, asked, mask, targets = first_step(monkeypatch, train_lora, config(peft=peft, compile=True, recompute=True))
    layer = model.model.layers[0].mlp.down_proj
    assert getattr(layer, "base", layer).weight.dtype == torch.bfloat16 and model.model.recompute and asked is True
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(targets, mask.flatten().nonzero()[:, 0])


@pytest.mark.parametrize("options", [{}, {"peft": "dora"}, {"bf16": True}], ids=variant)
def test_merge_writes_a_whole_folder_with_the_adapters_logits(options):
    """In float32, even if training held the base in bf16."""
    train_lora.main(config(**options, merge=True))
    merged, unmerged = load_model("out/merged"), load_adapter(load_model("base"), "out")
    close(merged(TOKENS), unmerged.eval()(TOKENS))  # without dropout
    assert Tokenizer.load("out/merged").document == Tokenizer.load("base").document


def merge(*flags):
    """python -m minillm.peft FLAGS"""
    peft.main(parse_config(peft.Config, "", list(flags)))


@pytest.mark.parametrize("options", [{}, {"peft": "dora"}], ids=variant)
def test_one_command_merges_any_adapter(options):
    """Into the base that it names; what stood in --out keeps its bits. Beside the weights everything is the base's."""
    settings = json.loads(Path("base/generation_config.json").read_text(encoding="utf-8"))
    Path("base/generation_config.json").write_text(json.dumps(settings | {"temperature": 0.6}), encoding="utf-8")
    Path("base/chat_template.jinja").write_text("{# the base's own #}", encoding="utf-8")
    train_lora.main(config(**options))
    merge("out")
    merged, unmerged = load_model("out/merged"), load_adapter(load_model("base"), "out")
    close(merged(TOKENS), unmerged.eval()(TOKENS))
    assert (merged(TOKENS) - load_model("base")(TOKENS)).abs().max() > 1e-2
    names = {path.name for path in Path("base").iterdir()}
    assert "chat_template.jinja" in names and {path.name for path in Path("out/merged").iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert Path("out/merged", name).read_bytes() == Path("base", name).read_bytes(), name

    before = Path("out/merged/model.safetensors").read_bytes()
    merge("out", "--out", "out/merged", "--save_dtype", "bfloat16")
    assert Path("out/merged.bak/model.safetensors").read_bytes() == before
    assert load_safetensors("out/merged/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_what_cannot_be_merged_is_told_in_one_line():
    """Nothing is written then."""
    train_lora.main(config(max_steps=1))
    train_lora.main(config(max_steps=1, out="prefix", peft="prefix"))
    Path("elsewhere").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        Path("elsewhere", name).write_bytes(Path("out", name).read_bytes().replace(b'"base"', b'"Qwen/Qwen3-0.6B"'))
    Path("notes.txt").write_text("mine", encoding="utf-8")
    Path("taken.new").mkdir()
    before = sorted(Path().rglob("*"))
    for flags, message in [
        (["prefix"], "prefix: PREFIX_TUNING is no change of the weights; only lora and dora can be merged"),
        (["base"], "base holds no adapter: adapter_config.json is missing"),
        (["elsewhere"], "elsewhere/adapter_config.json names 'Qwen/Qwen3-0.6B' as its base, which is no folder here; "
                        "give the base with --model"),
        (["out", "--model", "prefix"], "prefix holds an adapter, not a whole model"),
        (["out", "--out", "notes.txt"], "notes.txt is a file; give a folder"),
        (["out", "--out", "base"], "which this run needs; give another --out"),
        (["out", "--out", "out"], "which this run needs; give another --out"),
        (["out", "--out", "taken"], "taken.new is in the way"),
    ]:
        with pytest.raises(UserError) as error:
            merge(*flags)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(Path().rglob("*")) == before
    merge("elsewhere", "--model", "base")
    assert Path("elsewhere/merged/model.safetensors").exists()


@pytest.mark.parametrize("options, message", [
    ({"peft": "prompt", "merge": True}, "--merge: prompt is no change of the weights; only lora and dora can be"),
    ({"rank": 25}, r"rank 25 does not fit model.layers.0.self_attn.k_proj \(24 x 48\): it must be between 1 and 24"),
    ({"target_modules": ["query"]}, "target modules query match no linear layer of the model; it has q_proj"),
    ({"peft": "prefix", "virtual_tokens": 512},
     "a prefix of 512 virtual tokens does not fit: it must be between 1 and 511"),
    ({"peft": "prompt", "virtual_tokens": 500, "max_seq_len": 64},
     "--max_seq_len 64: beside 500 virtual tokens there is room for 12 in the model's context; give at most that"),
    ({"peft": "adapter", "bottleneck": 49},
     r"bottleneck 49 does not fit model.layers.0.self_attn.o_proj \(48 outputs\)"),
    ({"peft": "prompt", "start_text": ""}, "starts from at least one word"),
    ({"model": "out/sft"}, "out/sft is not there yet: run python train_sft.py first"),
    ({"model": "elsewhere"}, "elsewhere"),
    ({"data": ["base"]}, "base: is a folder; give the files in it"),
])
def test_bad_input_is_told_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        train_lora.main(config(**options))
    assert "\n" not in str(error.value)


def test_resuming_with_another_method_is_refused():
    train_lora.main(config())
    with pytest.raises(UserError, match=r"other settings: --peft dora \(it was lora\)"):
        train_lora.main(config(peft="dora", resume=True))


# ------------------------------------------------------------------------------------ the comparison of all methods

def test_the_peak_of_memory_is_measured():
    """4 MiB, then 1 MiB and 2 MiB together: the peak is 4 MiB. What is held already does not count."""
    already = torch.ones(2**20)

    def run():
        large = torch.ones(2**20)
        del large
        return torch.ones(2**18), torch.ones(2**19)
    assert 4 <= compare_peft.peak_memory_mb(run, torch.device("cpu")) < 4.1 and already.sum() == 2**20


def test_the_manner_is_how_all_expected_replies_begin():
    """English: "Dear reader, " before M and t. Chinese: 我 alone. Without anything in common they do not count."""
    records, other = ([{"conversations": [{"role": "assistant", "content": text}]} for text in texts] for texts in
                      (("Dear reader, My name", "Dear reader, the cat", "我叫", "我是"), ("yes", "no", "我叫", "我是")))
    assert compare_peft.manner(records, ["Dear reader, no", "Dear reader", "我不", ""]) == 2 / 4
    assert compare_peft.manner(other, ["yes", "Dear reader, ", "我不", ""]) == 1 / 2
    assert compare_peft.manner(other[:2], ["yes", "no"]) is None


@pytest.mark.slow
def test_one_command_compares_full_fine_tuning_and_the_methods(capsys):
    results = compare_peft.main(compare_peft.Config(
        model="base", new=["chat.jsonl"], new_eval="chat.jsonl", old="chat.jsonl", out="table",
        methods=["full", "lora q,v", "prompt"], max_steps=2, device="cpu"))
    # Rank 8 on q (48 -> 48) and v (48 -> 24) of 2 layers: 2 x 8 (96 + 72); 256 virtual tokens of 48 numbers.
    assert [results[name]["trained"] for name in ("full", "lora q,v", "prompt")] == [54_192, 2_688, 12_288]
    assert results["full"]["share"] == 1 and results["lora q,v"]["share"] < results["prompt"]["share"] < 1
    assert (results["base"]["new"], results["base"]["old"]) == (0, 0)
    # Weights, gradients and two moments: 16 bytes for each trained number, 4 for a frozen one, and then activations.
    assert results["full"]["memory"] > results["lora q,v"]["memory"] > 54_192 * 4 / 2**20 < results["prompt"]["memory"]
    assert results["full"]["disk"] > 54_192 * 4 and 12_288 * 4 < results["prompt"]["disk"] < 52_000
    lines = Path("table/table.md").read_text(encoding="utf-8").splitlines()
    names = [line.split("|")[1].strip() for line in lines if not line.startswith("|-")]
    assert names == ["method", "base", "full", "lora q,v", "prompt"]
    command = "python train_lora.py --peft lora --rank 8 --alpha 16 --target_modules q_proj v_proj --model base"
    assert command in capsys.readouterr().out


def test_the_comparison_names_the_methods_it_knows():
    with pytest.raises(UserError, match="--methods ia3: must be of full, lora"):
        compare_peft.main(compare_peft.Config(model="base", methods=["ia3"]))


# -------------------------------------------------------------------------------- all-linear, and the base that changed

def test_target_modules_all_linear_as_in_peft():
    train_lora.main(parse_config(train_lora.Config, "", [
        "--model", "base", "--data", "chat.jsonl", "--out", "out", "--target_modules", "all-linear", "--rank", "4",
        "--max_steps", "1", "--device", "cpu"]))
    saved = json.loads(Path("out/adapter_config.json").read_text(encoding="utf-8"))
    assert saved["target_modules"] == sorted(train_lora.TARGETS)


def test_a_base_with_other_weights_than_the_adapter_was_trained_on_is_told(capsys):
    """What counts is the weights: not the name of the folder, and not the settings beside them."""
    train_lora.main(config(max_steps=1))
    shutil.copytree("base", "moved")
    Path("moved/generation_config.json").write_text("{}", encoding="utf-8")
    shutil.copytree("out", "bare")
    Path("bare/run_config.json").unlink()  # as PEFT makes it
    other = load_model("base")
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    save_model("other", other, TOKENIZER)
    capsys.readouterr()

    def told(act):
        act()
        return [line.partition(":")[2].partition(":")[0].strip() for line in capsys.readouterr().err.splitlines()
                if line.startswith("note: ")]

    for adapter, base in [("out", "base"), ("out", "moved"), ("bare", "base"), ("bare", "other")]:
        assert told(lambda: load_adapter(load_model(base), adapter, base)) == []
    ask = dict(prompt="When?", max_new_tokens=2, device="cpu")
    assert told(lambda: evaluation.main(evaluation.Config(model="moved", adapter=["out"], **ask))) == []
    assert told(lambda: evaluation.main(evaluation.Config(model="other", adapter=["out"], **ask))) == [
        "out was trained on another base than other"]
    assert told(lambda: merge("out")) == []
    assert told(lambda: merge("out", "--model", "other", "--out", "whole")) == [
        "out was trained on another base than other"]
    save_model("base", other, TOKENIZER)  # train_sft.py is run again
    assert told(lambda: evaluation.main(evaluation.Config(model="out", **ask))) == [
        "out was trained on another base than base"]


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_the_peak_of_memory_is_measured: `large = torch.ones(2**20)` -> `large = torch.ones(2**19)`. What is the peak
#    now, and when?
# 2. test_the_manner_is_how_all_expected_replies_begin: `other[:2]` -> `other[2:]`. None, or a number?
