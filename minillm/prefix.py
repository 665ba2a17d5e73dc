"""Prefix tuning and prompt tuning: the model stays as it is, and learns what to read before every document.

Prefix tuning (arXiv 2101.00190, equation 3) trains P keys and P values for each layer; a token attends to them and then
to its own document:

    softmax(q [K_prefix; K]^T / sqrt(d)) [V_prefix; V]

Prompt tuning (arXiv 2104.08691, section 2) trains P input vectors, which stand before the first token like the embeddings
of P words. What the layers make of them depends on nothing that comes later, so it is the same before every document:
it is computed once, as keys and values, and the rest is prefix tuning. Hence both cost one row of P positions and
no room in the rows of tokens; both work in packed rows (every document sees the prefix), with padding on the left,
and in cached generation; and no label can ever fall on a virtual token.

As in the PEFT package, the positions of a document start after the prefix, at P, and the learned keys are what attention
sees: neither RoPE nor k-norm is applied to them.

A prompt starts from real words (section 3.2 of its paper): at the start the logits are those of the base with these words
before each document. So does a prefix (section 7.4 of its paper), unless it is reparametrised, P' -> MLP -> keys and
values (section 4.3): then it starts at random. With AdamW it learns far more so, as the paper says; with Muon, which
train_lora.py takes, as much without.
"""

import torch
from torch import nn

from minillm.checkpoint import check_weights, read_adapter, save_adapter
from minillm.errors import UserError
from minillm.model import Backbone, CausalLM, ModelConfig


class Prefix(nn.Module):
    """What both kinds share. `length` is P; keys_values(backbone) gives for each layer (keys, values), each (1, K, P, d)."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def keys_values(self, backbone: Backbone) -> list:
        raise NotImplementedError

    def forward(self, backbone: Backbone, cache):
        """What the layers append their keys and values to, instead of to the cache. With a cache it is computed once."""
        if cache is None:
            return Prefixed(self.keys_values(backbone), None)
        if cache.prefix is None:
            cache.prefix = self.keys_values(backbone)
        return Prefixed(cache.prefix, cache)


class Prefixed:
    """The prefix of each layer, and then what the cache (if there is one) holds."""

    def __init__(self, layers: list, cache):
        self.layers, self.cache = layers, cache

    def append(self, layer: int, keys, values):
        """(B, K, T, d) -> the prefix and all keys and values so far, (B, K, P + S, d)."""
        if self.cache is not None:
            keys, values = self.cache.append(layer, keys, values)
        before = [x.to(keys.dtype).expand(len(keys), -1, -1, -1) for x in self.layers[layer]]
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


class Recorder:
    """Takes the place of a cache, and keeps what each layer computes."""

    def __init__(self):
        self.layers = []

    def append(self, layer: int, keys, values):
        self.layers.append((keys, values))
        return keys, values


def read(backbone: Backbone, embeddings) -> list:
    """The keys and values that each layer computes for embeddings (P, D) at positions 0 to P - 1."""
    recorder, x = Recorder(), embeddings[None].to(backbone.embed_tokens.weight.dtype)
    cos, sin = backbone.rotary(torch.arange(len(embeddings), device=x.device)[None])
    for layer in backbone.layers:
        x = layer(x, cos, sin, None, recorder)
    return recorder.layers


class PromptTuning(Prefix):
    """Trained: prompt_embeddings (P, D). `words` are P token ids to start from."""

    def __init__(self, backbone: Backbone, words):
        super().__init__(len(words))
        self.prompt_embeddings = nn.Parameter(backbone.embed_tokens.weight[words].detach().float())

    def keys_values(self, backbone):
        return read(backbone, self.prompt_embeddings)

    def folded(self):
        return self.prompt_embeddings


class PrefixTuning(Prefix):
    """Trained: prompt_embeddings (P, layers x 2 x K x d), the PEFT package's layout. `words` are P token ids to start from.

    With hidden > 0, the reparametrisation is trained instead: P vectors of size K x d and an MLP with that many hidden
    units that makes the prefix of them; folded() is what it makes.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig, words, hidden: int = 0):
        super().__init__(len(words))
        self.shape = (len(words), config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        size, device = config.num_key_value_heads * config.head_dim, backbone.embed_tokens.weight.device
        self.mlp = None
        if hidden:
            self.embeddings = nn.Parameter(torch.randn(self.length, size, device=device))
            self.mlp = nn.Sequential(nn.Linear(size, hidden, device=device), nn.Tanh(),
                                     nn.Linear(hidden, config.num_hidden_layers * 2 * size, device=device))
        else:
            with torch.no_grad():
                layers = read(backbone, backbone.embed_tokens.weight[words])
            start = torch.stack([torch.cat(pair) for pair in layers])  # (layers, 2, K, P, d)
            self.prompt_embeddings = nn.Parameter(start.float().permute(3, 0, 1, 2, 4).reshape(self.length, -1))

    def folded(self):
        return self.mlp(self.embeddings) if self.mlp is not None else self.prompt_embeddings

    def keys_values(self, backbone):
        layers = self.folded().view(self.shape).permute(1, 2, 3, 0, 4)[:, :, None]  # (layers, 2, 1, K, P, d)
        return [(keys, values) for keys, values in layers]


def check_length(model: CausalLM, length: int):
    """Raise UserError for a prefix that leaves no room in the context, or on a model that has one already."""
    context = model.config.max_position_embeddings
    if not 1 <= length < context:
        raise UserError(f"a prefix of {length} virtual tokens does not fit: it must be between 1 and {context - 1}, for the "
                        f"model's context is {context} tokens")
    if model.model.prefix is not None:
        raise UserError("the model has a prefix already; take it off first")


def start_words(model: CausalLM, length: int, words=None):
    """`length` token ids: the given ones, repeated or cut, or some drawn at random."""
    check_length(model, length)
    if words is None:
        words = torch.randint(model.config.vocab_size, (length,)).tolist()
    if not words:
        raise UserError("a prefix starts from at least one word")
    return torch.tensor((list(words) * length)[:length], device=model.model.embed_tokens.weight.device)


def apply_prefix(model: CausalLM, length: int, words=None, hidden: int = 0) -> CausalLM:
    """Freeze the model and put a prefix of `length` learned keys and values before all others, in place; returns the model.

    words: token ids to start from (default: random ones). hidden: units of the reparametrisation MLP, 0 for none.
    Raises UserError for a length that does not fit the context, or a second prefix.
    """
    prefix = PrefixTuning(model.model, model.config, start_words(model, length, words), hidden)
    model.requires_grad_(False).model.prefix = prefix
    return model


def apply_prompt(model: CausalLM, length: int, words=None) -> CausalLM:
    """Freeze the model and put `length` learned input vectors before all documents, in place; returns the model.

    words: token ids to start from (default: random ones). Raises as apply_prefix.
    """
    prefix = PromptTuning(model.model, start_words(model, length, words))
    model.requires_grad_(False).model.prefix = prefix
    return model


def save_prefix(model: CausalLM, folder, base: str | None = None):
    """Write adapter_config.json and adapter_model.safetensors for either kind, as the PEFT package does.

    The reparametrisation is folded away: its result alone is stored. base: the folder of the base model, for the
    record. Raises ValueError for a model without a prefix.
    """
    prefix, c = model.model.prefix, model.config
    if prefix is None:
        raise ValueError("the model holds no prefix")
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "num_virtual_tokens": prefix.length,
              "num_layers": c.num_hidden_layers, "num_transformer_submodules": 1}
    if isinstance(prefix, PromptTuning):
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": c.hidden_size, "num_attention_heads": c.num_attention_heads,
                   "prompt_tuning_init": "RANDOM"}
    else:
        size = c.num_key_value_heads * c.head_dim
        config |= {"peft_type": "PREFIX_TUNING", "token_dim": size, "num_attention_heads": c.num_key_value_heads,
                   "prefix_projection": False, "encoder_hidden_size": size}
    save_adapter(folder, config, {"prompt_embeddings": prefix.folded()})


@torch.no_grad()
def load_prefix(model: CausalLM, folder) -> CausalLM:
    """Put the prefix or prompt of a folder (ours or the PEFT package's) on the model, in place; returns the model.

    Raises UserError, and leaves the model as it was, when the folder holds something else or does not fit this base:
    then the tensors and their shapes are named.
    """
    config, stored = read_adapter(folder, "PREFIX_TUNING", "PROMPT_TUNING")
    length, c = config.get("num_virtual_tokens"), model.config
    if type(length) is not int:
        raise UserError(f"{folder}/adapter_config.json: num_virtual_tokens = {length} must be a number")
    check_length(model, length)
    prompt = config["peft_type"] == "PROMPT_TUNING"
    size = c.hidden_size if prompt else c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim
    check_weights({"prompt_embeddings": torch.empty(length, size, device="meta")}, stored, folder, "the adapter does not fit this base model")
    (apply_prompt if prompt else apply_prefix)(model, length, [0])
    model.model.prefix.prompt_embeddings.copy_(stored["prompt_embeddings"])
    return model
