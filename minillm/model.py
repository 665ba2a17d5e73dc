"""A decoder-only transformer with the module names of Qwen3 in transformers.

    tokens -> embedding -> [RMSNorm -> attention -> + -> RMSNorm -> SwiGLU -> +] x layers -> RMSNorm -> logits

Attention (Vaswani et al., arXiv 1706.03762) with rotary positions (RoPE, arXiv 2104.09864), grouped
key/value heads (GQA, arXiv 2305.13245) and normalised queries and keys (QK-norm, arXiv 2302.05442);
RMSNorm (arXiv 1910.07467); SwiGLU (arXiv 2002.05202). Because the names are the same, a Qwen3, Qwen2 or
Llama folder loads here and a folder written here loads there (see checkpoint.py). Masks and kernels: attention.py.

Shape symbols: B rows, T tokens, S keys (T plus what the cache holds), H heads, K key/value heads,
d head_dim, D hidden_size, V vocab_size.
"""

import math
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillm import runtime
from minillm.attention import (BLOCK, attend, attention_mask_2d, can_flex, document_block_mask, document_lengths,
                               document_positions, one_by_one)


@dataclass
class ModelConfig:
    """The architecture, in transformers' field names."""

    vocab_size: int = 3072
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # for longer contexts: linear, yarn or llama3, with its numbers
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    model_type: str = "qwen3"  # qwen3: QK-norm; qwen2: biases on q, k, v; llama, mistral: neither

    def __post_init__(self):
        if self.model_type not in ("qwen3", "qwen2", "llama", "mistral"):
            raise ValueError(f"model_type {self.model_type!r} is not one of qwen3, qwen2, llama, mistral")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key/value "
                             "heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")


#                    D   layers H  K   d   MLP
PRESETS = {
    "tiny": (128, 4, 4, 2, 32, 384),
    "mini": (512, 8, 8, 2, 64, 1408),
    "small": (768, 8, 8, 4, 96, 2432),
    "base": (768, 16, 12, 4, 64, 2048),
}


def preset_config(name: str, vocab_size: int, context: int = 2048) -> ModelConfig:
    """The ModelConfig of a preset, with at least `context` positions; raises KeyError for a name not in PRESETS."""
    hidden, layers, heads, kv_heads, head_dim, mlp = PRESETS[name]
    return ModelConfig(vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=mlp,
                       max_position_embeddings=max(2048, context))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # Statistics in float32 also under autocast: the squares of bf16 values lose too many digits.
        normed = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)
        device = x.device.type  # under autocast the matrices that follow take bf16: cast once here, not once for each
        return normed.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


class RotaryEmbedding(nn.Module):
    """The angles of RoPE: position p turns the pair (i, i + d/2) of a head by p * theta^(-2i/d)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = 1.0 / config.rope_theta**exponent  # (d/2,)
        kind = config.rope_scaling.get("rope_type")
        if kind == "linear":  # positions as if they stood closer together
            frequencies = frequencies / config.rope_scaling["factor"]
        elif kind == "yarn":
            frequencies = yarn_frequencies(frequencies, config.rope_theta, config.rope_scaling)
        elif kind == "llama3":
            frequencies = llama3_frequencies(frequencies, config.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.attention_factor = config.rope_scaling.get("attention_factor", 1.0)  # YaRN's: longer queries and keys

    def forward(self, positions):
        """positions (B, T) -> cos, and sin with apply_rope's signs, both (B, 1, T, d) float32 (the 1: heads)."""
        angles = positions[:, None, :, None].float() * self.frequencies.float()  # (B, 1, T, d/2)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def yarn_frequencies(frequencies, theta: float, scaling: dict):
    """YaRN (arXiv 2309.00071, section 3.2): frequencies (d/2,) that turn less than `beta_slow` times within the old
    context are divided by `factor`, those that turn more than `beta_fast` times are kept, and a ramp lies between.
    """
    pairs, context = len(frequencies), scaling["original_max_position_embeddings"]

    def pair_that_turns(times):
        return pairs * math.log(context / (times * 2 * math.pi)) / math.log(theta)

    first, last = pair_that_turns(scaling["beta_fast"]), pair_that_turns(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = last - first or 0.001
    divide = ((torch.arange(pairs) - first) / width).clamp(0, 1)  # 0: fast, kept; 1: slow, divided
    return frequencies * (1 - divide) + frequencies / scaling["factor"] * divide


def llama3_frequencies(frequencies, scaling: dict):
    """Llama 3.1's long-context change of the RoPE frequencies: slow ones divided by `factor`, fast ones kept."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, kept; 0: slow, divided
    return frequencies * (keep + (1 - keep) / factor)


def apply_rope(x, cos, sin):
    """Turn each pair (x_i, x_{i+d/2}) of the last dimension by its angle, in float32:

    x_i <- x_i cos - x_{i+d/2} sin    x_{i+d/2} <- x_{i+d/2} cos + x_i sin
    """
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([second, first], dim=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of all layers for up to `max_length` positions, allocated once.

    `valid` (B, S) bool tells which stored positions are real tokens (False: left padding).
    """

    def __init__(self, config: ModelConfig, batch: int, max_length: int, device="cpu", dtype=torch.float32):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.valid = torch.zeros(batch, max_length, device=device, dtype=torch.bool)
        self.length = 0  # positions filled so far
        self.prefix = None  # what a learned prefix (prefix.py) computes once for all these positions
        self.padded = False  # whether any of them is padding

    def extend(self, tokens, attention_mask=None):
        """Make room for tokens (B, T), before their keys come.

        Returns (B, S) bool, which of the stored positions are real tokens; None if all are.
        """
        end = self.length + tokens.shape[1]
        if end > self.valid.shape[1]:
            raise ValueError(f"the cache holds {self.valid.shape[1]} positions; {end} are needed")
        self.valid[:, self.length:end] = True if attention_mask is None else attention_mask
        self.padded = self.padded or attention_mask is not None
        return self.valid[:, :end] if self.padded else None

    def append(self, layer: int, keys, values):
        """Store (B, K, T, d) after the filled positions; return all of the layer's (B, K, S, d)."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length:end] = keys
        self.values[layer][:, :, self.length:end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows):
        """Keep only these rows (a tensor of indices; a row may be repeated)."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[rows]
        self.valid = self.valid[rows]


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=qkv_bias)
        o_bias = config.attention_bias and config.model_type != "qwen2"
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=o_bias)
        qk_norm = config.model_type == "qwen3"
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask, cache):
        split = (-1, self.head_dim)  # view(B, T, -1, d) would not do for a batch without rows
        q = self.q_norm(self.q_proj(x).unflatten(2, split)).transpose(1, 2)  # (B, H, T, d)
        k = self.k_norm(self.k_proj(x).unflatten(2, split)).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).unflatten(2, split).transpose(1, 2)  # (B, K, T, d)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, d)
            k, v = k.to(q.dtype), v.to(q.dtype)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))  # (B, H, T, d) -> (B, T, H d) -> (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer; both halves add to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything but the head: tokens (B, T) -> hidden states (B, T, D) after the final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.prefix = None  # prefix.py puts learned keys and values here, which every document sees before its own
        self.recompute = False  # activation checkpointing (arXiv 1604.06174): run a layer again in the backward pass

    @staticmethod
    def run_layer(layer, *inputs):
        """One layer, as the function that runtime.compile_layers compiles: once for all layers, for training."""
        return layer(*inputs)

    def forward(self, tokens, attention_mask=None, doc_ids=None, positions=None, cache=None, block_mask=None):
        B, T = tokens.shape
        past = cache.length if cache is not None else 0
        valid = cache.extend(tokens, attention_mask) if cache is not None else attention_mask
        if positions is None:
            if doc_ids is not None:
                positions = document_positions(doc_ids)
            elif valid is not None:  # count real tokens only, so that padding on the left moves nothing
                columns = past + torch.arange(T, device=tokens.device)
                positions = (valid.long().cumsum(dim=1) - 1).clamp(min=0)[:, columns]
            else:
                positions = torch.arange(past, past + T, device=tokens.device).expand(B, T)
        prefix = self.prefix.length if self.prefix is not None else 0
        cos, sin = self.rotary(positions + prefix)
        if block_mask is not None and not prefix:
            mask = block_mask
        elif doc_ids is not None and valid is None and not prefix and one_by_one(tokens.device.type, T):
            mask = document_lengths(doc_ids)
        else:
            mask = attention_mask_2d(valid, doc_ids, T, past, tokens.device, prefix)
        keys_values = self.prefix(self, cache) if self.prefix is not None else cache

        # runtime.compile_layers puts a compiled function in the place of self.run_layer. It is for training alone:
        # without gradients, with a cache, and for each list of documents there would be more programs to compile.
        compiled = torch.is_grad_enabled() and keys_values is None and not isinstance(mask, list)
        run_layer = self.run_layer if compiled else Backbone.run_layer
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(run_layer, layer, x, cos, sin, mask, keys_values, use_reentrant=False)
            else:
                x = run_layer(layer, x, cos, sin, mask, keys_values)
        if cache is not None:
            cache.length += T
        return self.norm(x)


class CausalLM(nn.Module):
    """A language model: logits for the next token at every position."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.origin = None  # the files of the folder that it was loaded from (origin.py)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.lm_head.weight.is_meta:  # there it would draw nothing, and take seven times as long
            self.apply(self._init)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) and not weight.is_meta:
                # GPT-2: the residual stream adds 2 x layers terms; keep its variance at the start.
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def context(self) -> int:
        """How many tokens a row may have: the positions of the config, less those of a learned prefix."""
        prefix = self.model.prefix
        return self.config.max_position_embeddings - (prefix.length if prefix is not None else 0)

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, tokens, attention_mask=None, doc_ids=None, positions=None, cache=None, block_mask=None):
        """Hidden states (B, T, D) after the final norm; arguments as in forward, and document_block_mask's result."""
        return self.model(tokens, attention_mask, doc_ids, positions, cache, block_mask)

    def forward(self, tokens, attention_mask=None, doc_ids=None, positions=None, cache=None):
        """Logits (B, T, V); logits[:, t] predict token t + 1.

        tokens (B, T) int64; attention_mask (B, T) bool, False = padding (left or right); doc_ids (B, T) for
        packed rows, equal within a document; positions (B, T), by default counted from the start of the
        document or row, padding not counted; cache: a KVCache that these tokens continue.
        """
        return self.lm_head(self.hidden(tokens, attention_mask, doc_ids, positions, cache))


def packed_forward(model: CausalLM, asked=None, row_length: int = 0):
    """model.hidden for packed rows of one length, as f(tokens, doc_ids, blocks), which are those of a Batch.

    Where runtime.wants_compile(model, asked), it is compiled, and where attention.can_flex, with flex attention, which
    skips what lies outside a document; its plain twin is model.hidden itself. A smaller batch, such as the last one of
    an epoch, gets copies of its first row, because each new shape would be compiled anew.
    """
    def plain(tokens, doc_ids, blocks):
        return model.hidden(tokens, doc_ids=doc_ids)  # looked up at each call: sharding (shard.py) puts another there

    device, reason = next(model.parameters()).device, ""  # why there would be too many programs: see Backbone.forward
    with runtime.autocast(device):
        if one_by_one(device.type, row_length):
            reason = f"on a CPU the documents of rows of {row_length} tokens are computed one by one"
    if model.model.prefix is not None:
        reason = "a model with a learned prefix"
    if reason and asked:
        runtime.say(f"not compiled: {reason}", file=sys.stderr)
    if reason or not runtime.wants_compile(model, asked):
        return plain
    config = model.config
    flex = can_flex(device, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                    model.model.recompute)
    runtime.compile_layers(model)
    most = 0

    def forward(tokens, doc_ids, blocks):
        nonlocal most
        rows = len(tokens)
        most = max(most, rows)

        def filled(x, dim=0):
            more = list(x.shape)
            more[dim] = most - rows
            return torch.cat([x, x.narrow(dim, 0, 1).expand(more)], dim)

        if rows < most:
            tokens, doc_ids, blocks = filled(tokens), filled(doc_ids), [filled(x, dim=1) for x in blocks]
        mask = document_block_mask(doc_ids, *blocks) if flex and tokens.shape[1] >= BLOCK else None
        return model.hidden(tokens, doc_ids=doc_ids, block_mask=mask)[:rows]

    return forward
