"""Chapter 30: one file for llama.cpp and Ollama. A GGUF file is read back here by a few lines of our own, and by the
gguf package and llama.cpp itself where they are installed.

After this chapter you know what is in a GGUF file, and what must be reordered or renamed on the way into it.
"""

import struct

import pytest
import torch

from minillm.checkpoint import save_model
from minillm.errors import UserError
from minillm.generate import generate
from minillm.gguf import export_gguf, model_settings
from minillm.model import CausalLM, ModelConfig
from minillm.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["Hello, world! How are you?", "你好，世界！1234 + 5678 = 6912", "  two  spaces\n\n\tand a tab\r\n"]
SIZES = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
             intermediate_size=12, max_position_embeddings=64)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, 270)


def read(path):
    """(settings, {name: (shape as written, type, numbers)}) of a GGUF file, by the specification."""
    data, at = path.read_bytes(), 0

    def take(format):
        nonlocal at
        values = struct.unpack_from("<" + format, data, at)
        at += struct.calcsize("<" + format)
        return values if len(values) > 1 else values[0]

    def value(kind):
        nonlocal at
        if kind == 8:
            length = take("Q")
            at += length
            return data[at - length:at].decode()
        if kind == 9:
            item, length = take("IQ")
            return [value(item) for _ in range(length)]
        return take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    assert data[:4] == b"GGUF"
    at = 4
    version, tensors, settings = take("IQQ")
    assert version == 3
    settings = {value(8): value(take("I")) for _ in range(settings)}
    places = {value(8): ([take("Q") for _ in range(take("I"))], *take("IQ")) for _ in range(tensors)}
    start, result = at + -at % 32, {}
    for name, (shape, kind, offset) in places.items():
        assert (start + offset) % 32 == 0
        count = torch.Size(shape).numel()
        numbers = struct.unpack_from(f"<{count}{'fe'[kind]}", data, start + offset)
        result[name] = shape, kind, torch.tensor(numbers).reshape(shape[::-1])
    return settings, result


@pytest.mark.parametrize("dtype, number", [("f32", 0), ("f16", 1)])
def test_settings_and_weights_of_a_model(tmp_path, tokenizer, dtype, number):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=272, **SIZES))  # two rows more than the tokenizer has tokens
    save_model(tmp_path / "sft", model, tokenizer)
    export_gguf(tmp_path / "sft", tmp_path / "model.gguf", dtype)
    settings, tensors = read(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "qwen3", "general.name": "sft", "general.file_type": number, "qwen3.block_count": 1,
        "qwen3.context_length": 64, "qwen3.embedding_length": 8, "qwen3.feed_forward_length": 12,
        "qwen3.attention.head_count": 2, "qwen3.attention.head_count_kv": 1, "qwen3.attention.key_length": 4,
        "qwen3.rope.freq_base": 10000.0, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False}
    assert {name: settings[name] for name in expected} == expected
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert kinds[:4] == [3, 3, 3, 1]  # three control tokens, then normal ones
    assert tokens[270:] == ["[PAD270]", "[PAD271]"] and kinds[270:] == [5, 5]  # unused
    assert settings["tokenizer.ggml.merges"] == tokenizer.document["model"]["merges"]
    assert "<|im_start|>" in settings["tokenizer.chat_template"]
    assert len(tensors) == 13 and "output.weight" not in tensors  # tied
    shape, kind, numbers = tensors["blk.0.ffn_down.weight"]
    assert (shape, kind) == ([12, 8], number)  # the last dimension first
    weight = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(numbers, weight if dtype == "f32" else weight.half().float())
    assert tensors["blk.0.attn_q_norm.weight"][:2] == ([4], 0)  # vectors stay float32


def test_llama_has_other_pairs_for_rope(tmp_path, tokenizer):
    """Of a head with d = 4, RoPE turns the rows (0, 2) and (1, 3) here; in llama.cpp's llama (0, 1) and (2, 3)."""
    model = CausalLM(ModelConfig(vocab_size=270, model_type="llama", tie_word_embeddings=False, **SIZES))
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(model.model.layers[0].self_attn, name).weight
            weight.copy_(torch.arange(float(len(weight)))[:, None].expand_as(weight))
    save_model(tmp_path, model, tokenizer)
    export_gguf(tmp_path, tmp_path / "model.gguf", "f32")
    _, tensors = read(tmp_path / "model.gguf")
    assert tensors["blk.0.attn_q.weight"][2][:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert tensors["blk.0.attn_k.weight"][2][:, 0].tolist() == [0, 2, 1, 3]
    assert tensors["blk.0.attn_v.weight"][2][:, 0].tolist() == [0, 1, 2, 3]
    assert tensors["output.weight"][0] == [8, 270]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
        "truncate": True, "attention_factor": 1.1386294361119891}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def test_longer_contexts(tmp_path, tokenizer):
    linear = model_settings(ModelConfig(rope_scaling={"rope_type": "linear", "factor": 4}), "here")
    assert (linear["qwen3.rope.scaling.type"], linear["qwen3.rope.scaling.factor"]) == ("linear", 4.0)
    yarn = model_settings(ModelConfig(rope_scaling=YARN), "here")
    assert yarn["qwen3.rope.scaling.original_context_length"] == 64
    assert yarn["qwen3.rope.scaling.attn_factor"] == pytest.approx(1.0)  # the usual one is llama.cpp's own
    config = ModelConfig(vocab_size=270, model_type="llama", rope_scaling=LLAMA3, **SIZES)
    save_model(tmp_path, CausalLM(config), tokenizer)
    export_gguf(tmp_path, tmp_path / "model.gguf")
    # Frequencies 1 and 1 / 100; within 64 positions the second turns 0.1 times: slow, so divided by 8.
    assert read(tmp_path / "model.gguf")[1]["rope_freqs.weight"][2].tolist() == pytest.approx([1.0, 8.0])


@pytest.mark.parametrize("config, words", [
    (ModelConfig(attention_bias=True), "attention_bias"),
    (ModelConfig(rope_scaling=LLAMA3), "rope_scaling llama3"),
    (ModelConfig(rope_scaling={**YARN, "beta_fast": 16}), "beta_fast"),
    (ModelConfig(rope_scaling={**YARN, "truncate": False}), "truncate"),
])
def test_what_llama_cpp_cannot_compute_is_refused(config, words):
    with pytest.raises(UserError, match=f"here: .*{words}.* not supported by llama.cpp"):
        model_settings(config, "here")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """Weights five times as large as at the start, so that the replies are not all alike."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, head_dim=16)
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim == 2 else 1)
    folder = tmp_path_factory.mktemp("trained")
    save_model(folder, model, tokenizer)
    export_gguf(folder, folder / "model.gguf", "f32")
    return model, folder / "model.gguf"


def test_the_gguf_package_reads_the_file(trained):
    gguf = pytest.importorskip("gguf")
    model, path = trained
    reader = gguf.GGUFReader(str(path))
    assert reader.fields["general.architecture"].contents() == "qwen3"
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert torch.equal(found["token_embd.weight"], model.lm_head.weight)
    assert torch.equal(found["blk.1.attn_k.weight"], model.model.layers[1].self_attn.k_proj.weight)


def test_llama_cpp_gives_the_same_greedy_reply(trained, tokenizer):
    llama = pytest.importorskip("xllamacpp")
    model, path = trained
    prompt, _ = tokenizer.render([{"role": "user", "content": "Hello, 世界"}], add_generation_prompt=True)
    ours = generate(model, [prompt], 12, tokenizer.end_id, 0.0).tokens[0, len(prompt):].tolist()
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 64, 1, False
    reply = llama.Server(params).handle_completions({"prompt": prompt, "temperature": 0, "max_tokens": 12})
    assert reply["choices"][0]["text"] == tokenizer.decode([i for i in ours if i not in (0, 2)])


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_settings_and_weights_of_a_model: `vocab_size=272` -> `vocab_size=271`. How many tokens are made up to fill
#    the vocabulary?
# 2. test_longer_contexts: `"linear", "factor": 4}` -> `"linear", "factor": 8}`. Which setting of the file changes?
