"""Chapter 8: one folder, two programs. What is written here opens in transformers, and the other way round.

After this chapter you know what a Hugging Face folder promises, and how RoPE is stretched for longer contexts.

One number compares names, shapes and formulas all at once: the largest difference between two logits.
"""

import json
from dataclasses import make_dataclass

import pytest
import torch

import train_dpo
import train_grpo
import train_lora
import train_ppo
import train_reward
import train_sft
from minillm import run, token_cache
from minillm.checkpoint import choose_defaults, load_model, save_model
from minillm.config import flag, parse_config
from minillm.hf_config import config_from_json
from minillm.model import CausalLM, ModelConfig, RotaryEmbedding
from minillm.origin import tokens_without_rows
from minillm.safetensors import save_json
from minillm.tokenizer import Tokenizer, train_tokenizer
from minillm.training_state import remove_training_state
from tests.helpers import close

TEXTS = ["Hello, world! How are you?", "你好，世界！1234 + 5678 = 6912", "  two  spaces\n\n\tand a tab\r\n",
         "naïve café 🙂 I'll <|im_end|>"]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  2+2?\n"},
     {"role": "assistant", "content": "4"}, {"role": "tool", "content": "{}"}, {"role": "assistant", "content": ""},
     {"role": "user", "content": "谢谢"}],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, 300)


def strengthen(model):
    """Weights five times as large: with the usual 0.02 attention is nearly uniform, and a wrong rotation hardly shows.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
            else:  # norms and biases away from their 1 and 0
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def assert_same_logits(ours, theirs):
    """Two rows; 40 positions, so that slow and fast rotations differ."""
    tokens = torch.randint(ours.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert a.std() > 0.1, "logits too small to tell anything"
    assert a.shape == b.shape and (a - b).abs().max() < 1e-4


@pytest.fixture(scope="module")
def our_folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ours")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=12, intermediate_size=40, max_position_embeddings=64)
    save_model(folder, strengthen(CausalLM(config)), tokenizer)
    return folder


def test_our_folder_opens_in_transformers(our_folder):
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(our_folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.dtype == torch.float32
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert_same_logits(load_model(our_folder), theirs.eval())


def test_our_config_means_the_same_in_transformers(our_folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(our_folder)
    expected = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 40, "max_position_embeddings": 64,
                "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "hidden_act": "silu",
                "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    assert {key: getattr(config, key) for key in expected} == expected
    # version 5 keeps theta in rope_parameters, version 4 beside it
    version = int(transformers.__version__.split(".")[0])
    assert (config.rope_parameters["rope_theta"] if version >= 5 else config.rope_theta) == 10000.0
    generation = transformers.GenerationConfig.from_pretrained(our_folder)
    assert (generation.eos_token_id, generation.pad_token_id) == ([2, 0], 0)


def test_our_tokenizer_gives_the_same_ids_and_chats_in_transformers(our_folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(our_folder)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text, allow_special=True)
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for chat in CHATS:
        for prompt in (False, True):
            ids, _ = tokenizer.render(chat, add_generation_prompt=prompt)
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert text == tokenizer.decode(ids)


def test_generation_in_transformers_ends_where_ours_would(our_folder, tokenizer):
    """Greedy replies are equal token by token, in the first 20."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(our_folder), load_model(our_folder)
    prompt, _ = tokenizer.render(CHATS[0], add_generation_prompt=True)
    reply = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                            max_new_tokens=20)[0].tolist()
    tokens = list(prompt)
    while len(tokens) < len(prompt) + 20 and (len(tokens) == len(prompt) or tokens[-1] not in (0, 2)):
        tokens.append(int(ours(torch.tensor([tokens]))[0, -1].argmax()))
    assert reply == tokens


SIZES = dict(vocab_size=70, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=40, max_position_embeddings=256, bos_token_id=0, eos_token_id=1)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


@pytest.mark.parametrize("kind, changes", [
    ("Qwen3", dict(head_dim=12, tie_word_embeddings=True)),
    ("Qwen3", dict(head_dim=8, tie_word_embeddings=False, attention_bias=True)),
    ("Qwen2", dict(tie_word_embeddings=True)),
    ("Qwen2", dict(tie_word_embeddings=False, rms_norm_eps=1e-3)),
    ("Llama", dict(tie_word_embeddings=False)),
    ("Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    ("Llama", dict(tie_word_embeddings=True, rope_scaling=LLAMA3)),
    ("Llama", dict(rope_scaling={"rope_type": "linear", "factor": 4.0})),
    ("Qwen3", dict(head_dim=16, rope_scaling=YARN)),
    ("Llama", dict(rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False, "beta_fast": 8})),
    ("Mistral", dict(sliding_window=None)),
])
def test_a_folder_of_transformers_loads_here(tmp_path, tokenizer, kind, changes):
    """And what is then saved here gives the same in transformers again."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **changes)
    theirs = strengthen(getattr(transformers, f"{kind}ForCausalLM")(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert_same_logits(ours, theirs)
    save_model(tmp_path / "ours", ours, tokenizer)
    assert_same_logits(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval())


@pytest.mark.parametrize("scaling, frequencies, attention_factor", [
    ({"rope_type": "linear", "factor": 4.0}, [0.25, 0.025, 0.0025, 0.00025], 1.0),
    (YARN, [1.0, 0.0625, 0.0025, 0.00025], 1.138629436),
    ({**YARN, "factor": None}, [1.0, 0.0625, 0.0025, 0.00025], 1.138629436),  # 256 / 64
    ({**YARN, "attention_factor": 1.5}, [1.0, 0.0625, 0.0025, 0.00025], 1.5),
    ({**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False, "beta_fast": 8, "beta_slow": 2},
     [1.0, 0.025, 0.0025, 0.00025], 0.963474657),
])
def test_rope_for_longer_contexts(scaling, frequencies, attention_factor):
    """Heads of 8 numbers: without scaling 1, 0.1, 0.01 and 0.001. Linear divides all by the factor 4.

    YaRN keeps what turns over 32 times within the old context of 64 tokens, and divides what turns less than once.
    Pair i turns 64 / (2 pi 10^i) times: 10.2, 1.02, 0.1, 0.01. In whole pairs the ramp goes from 0 to 2, so pair 1 is
    halfway between 0.1 and 0.025: 0.0625. Queries and keys grow by 0.1 ln 4 + 1 = 1.1386.
    """
    document = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 256,
                "rope_scaling": scaling}
    rotary = RotaryEmbedding(config_from_json(document, "here"))
    assert close(rotary.frequencies, frequencies)
    cos, sin = rotary(torch.zeros(1, 1, dtype=torch.long))
    assert close(cos.flatten(), [attention_factor] * 8) and close(sin.flatten(), [0.0] * 8)


def test_the_llama3_scaling_of_rope_changes_the_logits(tmp_path):
    """Guards the test above: without the scaling the logits differ."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = strengthen(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_scaling=LLAMA3)))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_scaling", "rope_parameters"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        assert_same_logits(load_model(tmp_path), theirs)


def test_shards_and_bf16_of_transformers_load_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = strengthen(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8))).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    ours = load_model(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    # read again: .bfloat16() also rounded the rotary frequencies of `theirs`, which no file holds
    assert_same_logits(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval())


# What was downloaded comes back

def download(folder, dtype=torch.bfloat16, **config):
    """A folder as from the hub: bf16, other settings, a template of its own, a license."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 3, 300)
    model = CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, head_dim=4,
                                 intermediate_size=8, max_position_embeddings=64))
    save_model(folder, model, tokenizer, "bfloat16" if dtype == torch.bfloat16 else "float32")
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del document["made_by"], document["dtype"]
    document.update({"torch_dtype": str(dtype)[6:], "transformers_version": "4.42.3", "pad_token_id": 2}, **config)
    (folder / "config.json").write_text(json.dumps(document, indent=4), encoding="utf-8")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.6}', encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.update(chat_template="{{ messages }}", enable_thinking=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "LICENSE").write_text("Apache", encoding="utf-8")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_that_comes_in_goes_out_byte_for_byte(tmp_path):
    folder = download(tmp_path / "in")
    save_model(tmp_path / "out", load_model(folder), Tokenizer.load(folder))
    assert contents(tmp_path / "out") == contents(folder)


def test_a_training_run_that_changes_nothing_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    """One step of SFT with learning rate 0: every file that came in goes out, byte for byte; three tell of the run."""
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(run, "remove_training_state", remove_training_state)
    folder, data = download(tmp_path / "in"), tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data.write_text((json.dumps({"conversations": chat}) + "\n") * 3, encoding="utf-8")
    cfg = train_sft.Config(model=str(folder), data=[str(data)], eval_data=str(data), out=str(tmp_path / "out"), lr=0.0,
                           max_steps=1, max_questions=1, max_new_tokens=2, device="cpu")
    cfg.given = {"lr", "max_steps"}
    train_sft.main(cfg)
    before, after = contents(folder), contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"metrics.jsonl", "run_config.json", "summary.json"}


def test_only_what_has_to_change_changes(tmp_path):
    """Other weights; another dtype; and a base model, whose replies never ended with a turn, gets the token for it."""
    folder = download(tmp_path / "in")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.6}', encoding="utf-8")
    save_model(tmp_path / "out", load_model(folder), Tokenizer.load(folder), "float32")
    before, after = contents(folder), contents(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {
        "config.json", "generation_config.json", "model.safetensors"}
    config = json.loads(after["config.json"])
    assert config == {**json.loads(before["config.json"]), "torch_dtype": "float32"}
    assert json.loads(after["generation_config.json"]) == {"eos_token_id": [2, 0], "temperature": 0.6}


@pytest.mark.parametrize("i", [[], {}, "7", 7.0, True, None])
def test_an_added_token_whose_id_is_no_number_has_no_row(tmp_path, i):
    """The tokenizer refuses it later, by name."""
    save_json(tmp_path / "tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"id": i, "content": "<a>"}]})
    assert tokens_without_rows(tmp_path, 1) == []


def test_added_tokens_get_the_mean_embedding(tmp_path, capsys):
    folder = download(tmp_path / "in", torch.float32)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    old = load_model(folder).lm_head.weight.detach()
    for i, token in enumerate(["<a>", "<b>"], len(old)):
        document["added_tokens"].append({**document["added_tokens"][0], "id": i, "content": token})
    large = " " * 5_000_000  # as of Qwen3, with its 150,000 tokens
    (folder / "tokenizer.json").write_text(json.dumps(document) + large, encoding="utf-8")
    model = load_model(folder)
    assert "the vocabulary grows by 2 added tokens (<a>, <b>)" in capsys.readouterr().out
    assert model.config.vocab_size == len(old) + 2 == len(model.lm_head.weight)
    assert torch.equal(model.lm_head.weight[:-2], old) and close(model.lm_head.weight[-1], old.mean(0))
    save_model(tmp_path / "out", model, Tokenizer.load(folder))
    capsys.readouterr()
    assert load_model(tmp_path / "out").config.vocab_size == len(old) + 2
    assert capsys.readouterr().out == ""  # now it has them


def test_a_downloaded_model_has_its_own_defaults(tmp_path, capsys):
    class_of = {"lr": flag(2e-3, "rate", downloaded=2e-5), "max_seq_len": flag(256, "length", downloaded=1024),
                "epochs": flag(6, "passes")}
    config_class = make_dataclass("Config", [(name, type(f.default), f) for name, f in class_of.items()])
    folder = download(tmp_path / "in")
    cfg = parse_config(config_class, "", [])
    choose_defaults(cfg, folder)
    assert (cfg.lr, cfg.max_seq_len, cfg.epochs) == (2e-5, 64, 6)  # the context is 64 tokens
    assert "not made by minillm: the defaults for downloaded models are used, lr 2e-05, max_seq_len 64" in (
        capsys.readouterr().out)
    cfg = parse_config(config_class, "", ["--lr", "2e-3"])  # given by hand, if only the other default
    choose_defaults(cfg, folder)
    assert (cfg.lr, cfg.max_seq_len) == (2e-3, 64)
    save_model(tmp_path / "ours", CausalLM(load_model(folder).config), Tokenizer.load(folder))
    cfg = parse_config(config_class, "", [])
    choose_defaults(cfg, tmp_path / "ours")
    assert (cfg.lr, cfg.max_seq_len) == (2e-3, 256)
    assert "was made by minillm" in capsys.readouterr().out


@pytest.mark.parametrize("script, flags, rates", [
    (train_sft, "", {"lr": 2e-5, "optimizer": "adamw", "epochs": 3}),
    (train_lora, "", {"lr": 2e-4, "epochs": 3}),
    (train_lora, "--lr 1e-3", {"lr": 1e-3}),
    (train_reward, "", {"lr": 1e-5}),
    (train_reward, "--peft lora", {"lr": 1e-4}),
    (train_dpo, "", {"lr": 1e-6, "beta": 0.1}),
    (train_dpo, "--peft lora", {"lr": 2e-5, "beta": 0.1}),
    (train_dpo, "--peft lora --lr 1e-6", {"lr": 1e-6}),  # by hand, if only the other default
    (train_grpo, "", {"lr": 1e-6}),
    (train_grpo, "--peft lora", {"lr": 2e-5}),
    (train_ppo, "", {"lr": 1e-6, "value_lr": 1e-5}),
    (train_ppo, "--peft lora", {"lr": 2e-5, "value_lr": 1e-4}),
    (train_ppo, "--peft lora --value_lr 1e-5", {"lr": 2e-5, "value_lr": 1e-5}),
])
def test_the_rates_for_a_downloaded_model(tmp_path, capsys, script, flags, rates):
    """A LoRA takes far higher rates than all weights: it starts at zero, and its update is a product."""
    folder = download(tmp_path / "in")
    cfg = parse_config(script.Config, "", flags.split())
    choose_defaults(cfg, folder)
    assert {name: getattr(cfg, name) for name in rates} == rates
    said = capsys.readouterr().out
    assert ("with a LoRA are used" in said) is ("--peft lora" in flags or script is train_lora)
    chosen = {name: value for name, value in rates.items() if f"--{name}" not in flags}
    assert said.count("\n") == 1 and all(f"{name} {value}" in said for name, value in chosen.items())


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_rope_for_longer_contexts: `"factor": 4.0}, [0.25` -> `"factor": 8.0}, [0.25`. What are the four frequencies?
# 2. test_rope_for_longer_contexts: `"max_position_embeddings": 256` -> `"max_position_embeddings": 512`. Which of the
#    five cases notices?
