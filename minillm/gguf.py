"""GGUF, the file of llama.cpp and Ollama: weights, settings, tokenizer and chat template of a model folder in one file.

    python -m minillm.gguf out/sft                                          # writes out/sft/model-f16.gguf
    python -m minillm.gguf out/sft --dtype f32 --out sft.gguf
    llama-cli -m out/sft/model-f16.gguf                                     # llama.cpp: chat in the terminal

llama.cpp's own converter knows a tokenizer by a hash of its ids, so it refuses one that was trained here. This one
knows it by its splits. The file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    "GGUF", version 3 | number of tensors, number of settings | settings: name, type, value
    | tensors: name, shape (the last dimension first), type, offset | their numbers, each on a multiple of 32 bytes
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minillm.checkpoint import check_tokenizer, load_model, weights_of
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.model import ModelConfig, RotaryEmbedding
from minillm.runtime import say
from minillm.safetensors import atomic_write
from minillm.tokenizer import Tokenizer
from minillm.unicode_ranges import (DEEPSEEK_SPLITS, DIGITS_SPLIT, GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT, QWEN35_SPLIT,
                                    splits_of)

ARCHITECTURES = {"qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama", "mistral": "llama"}
TENSOR_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
# (splits of the text, whether a word that is a token needs no merges): what llama.cpp calls it
PRE_TOKENIZERS = {
    ((QWEN2_SPLIT,), False): "qwen2", ((QWEN35_SPLIT,), False): "qwen35", ((LLAMA3_SPLIT,), True): "llama-bpe",
    ((LLAMA3_SPLIT,), False): "smaug-bpe", ((DIGITS_SPLIT, GPT2_SPLIT), False): "smollm",
    ((GPT2_SPLIT,), False): "gpt-2", (DEEPSEEK_SPLITS, False): "deepseek-v3"}
DTYPES = {"f32": (torch.float32, 0), "f16": (torch.float16, 1)}  # and their numbers in the file
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens


def export_gguf(folder, path, dtype: str = "f16"):
    """Write the model of a checkpoint folder as a GGUF file with its matrices in `dtype`, f16 or f32.

    Raises UserError for a folder that is no language model, and for what llama.cpp cannot compute or tokenize.
    """
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    check_tokenizer(model.config, tokenizer, folder)
    settings = {"general.architecture": ARCHITECTURES[model.config.model_type], "general.type": "model",
                "general.name": Path(folder).resolve().name, "general.file_type": DTYPES[dtype][1]}
    settings |= model_settings(model.config, folder) | tokenizer_settings(tokenizer, model.config.vocab_size, folder)
    write_gguf(path, settings, tensors_of(model), DTYPES[dtype][0])


def model_settings(config: ModelConfig, where) -> dict:
    """{name: value} of the architecture; raises UserError for what llama.cpp has no setting for."""
    arch, scaling = ARCHITECTURES[config.model_type], config.rope_scaling
    if config.attention_bias and arch == "qwen3":
        raise UserError(f"{where}: attention_bias is not supported by llama.cpp's {arch}")
    settings = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta, "vocab_size": config.vocab_size}
    kind = scaling.get("rope_type")
    if kind == "llama3" and arch != "llama":
        raise UserError(f"{where}: the rope_scaling llama3 is not supported by llama.cpp's {arch}")
    if kind in ("linear", "yarn"):
        settings |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        if not scaling["truncate"] or (scaling["beta_fast"], scaling["beta_slow"]) != (32, 1):
            raise UserError(f"{where}: YaRN with beta_fast, beta_slow or truncate is not supported by llama.cpp")
        # llama.cpp multiplies the factor that it is given by YaRN's usual one.
        usual = 1 + 0.1 * math.log(scaling["factor"]) if scaling["factor"] > 1 else 1.0
        settings |= {
            "rope.scaling.original_context_length": int(scaling["original_max_position_embeddings"]),
            "rope.scaling.attn_factor": scaling["attention_factor"] / usual}
    return {f"{arch}.{name}": value for name, value in settings.items()}


def tokenizer_settings(tokenizer: Tokenizer, vocab_size: int, folder) -> dict:
    """{name: value} of the tokenizer and the chat template; raises UserError for splits that llama.cpp lacks."""
    splits = tuple(splits_of(tokenizer.document["pre_tokenizer"]))
    pre = PRE_TOKENIZERS.get((splits, bool(tokenizer.ignore_merges)))
    if pre is None:
        raise UserError(f"{folder}: llama.cpp has no tokenizer with these splits and ignore_merges = "
                        f"{str(tokenizer.ignore_merges).lower()}")
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size  # a padded vocabulary
    for token, i in tokenizer.ids.items():
        tokens[i], kinds[i] = token, NORMAL
    for token in tokenizer.document["added_tokens"]:
        tokens[token["id"]], kinds[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    settings = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds,
        "merges": tokenizer.document["model"]["merges"], "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.end_id, "eot_token_id": tokenizer.end_id, "padding_token_id": tokenizer.pad_id,
        "add_bos_token": "<|begin_of_text|>" in tokenizer.added}  # Llama 3; ChatML has none
    settings = {f"tokenizer.ggml.{name}": value for name, value in settings.items()}
    if tokenizer.chat_template:  # the folder's own
        settings["tokenizer.chat_template"] = tokenizer.chat_template
    return settings


def tensors_of(model) -> dict:
    """{llama.cpp's name: tensor}."""
    config, tensors = model.config, {}
    for name, tensor in weights_of(model).items():
        module, _, kind = name.rpartition(".")
        prefix = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            prefix = f"blk.{number}."
        if ARCHITECTURES[config.model_type] == "llama" and module.endswith(("q_proj", "k_proj")):
            # There RoPE turns the neighbours (2i, 2i + 1) of a head instead of (i, i + d/2).
            pairs = tensor.view(-1, 2, config.head_dim // 2, *tensor.shape[1:])  # (heads, 2, d/2, in)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)  # (heads x d/2 x 2, in)
        tensors[f"{prefix}{TENSOR_NAMES[module]}.{kind}"] = tensor
    if config.rope_scaling.get("rope_type") == "llama3":
        plain = RotaryEmbedding(ModelConfig(rope_theta=config.rope_theta, head_dim=config.head_dim)).frequencies
        tensors["rope_freqs.weight"] = plain / model.model.rotary.frequencies.cpu()  # (d/2,)
    return tensors


# The file

def write_gguf(path, settings: dict, tensors: dict, dtype: torch.dtype):
    """Write the file atomically, one tensor at a time: matrices in dtype, vectors in float32."""
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(settings))]
    header += [encode(name) + struct.pack("<I", type_of(value)) + encode(value) for name, value in settings.items()]
    places, end = [], 0
    for name, tensor in tensors.items():
        stored = dtype if tensor.ndim > 1 else torch.float32  # llama.cpp wants norms and biases in float32
        number = next(number for kind, number in DTYPES.values() if kind == stored)
        shape = struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape))
        header.append(encode(name) + struct.pack("<I", tensor.ndim) + shape + struct.pack("<IQ", number, end))
        places.append((tensor, stored))
        size = tensor.numel() * stored.itemsize
        end += size + -size % 32
    header = b"".join(header)
    with atomic_write(path) as file:
        file.write(header + bytes(-len(header) % 32))
        for tensor, stored in places:
            numbers = tensor.detach().cpu().to(stored).contiguous().numpy()
            if not np.isfinite(numbers).all():
                raise UserError(f"{path}: float16 cannot hold the weights, which reach {tensor.abs().max():.3g} (at "
                                "most 65504); give --dtype f32")
            file.write(numbers.tobytes() + bytes(-numbers.nbytes % 32))


def type_of(value) -> int:
    """The number of a value's type: of a whole number UINT32, of one in a list INT32."""
    return {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING, list: ARRAY}[type(value)]


def encode(value) -> bytes:
    """The bytes of a value; a list is the type of its items, their number, and the items."""
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return struct.pack(f"<IQ{len(value)}i", INT32, len(value), *value)
        return struct.pack("<IQ", type_of(value[0]) if value else STRING, len(value)) + b"".join(map(encode, value))
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text
    return struct.pack({bool: "<?", int: "<I", float: "<f"}[type(value)], value)


# python -m minillm.gguf

@dataclass
class Config:
    """The flags of the command."""

    model: str = flag("out/sft", "checkpoint folder", positional=True)
    out: str = flag("", "file to write (default: model-f16.gguf in the folder)")
    dtype: str = flag("f16", "numbers of the matrices", choices=list(DTYPES))


def main(cfg: Config):
    path = Path(cfg.out or Path(cfg.model) / f"model-{cfg.dtype}.gguf")
    export_gguf(cfg.model, path, cfg.dtype)
    say(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
