"""Prefix tuning and prompt tuning: learn what a frozen model reads before every document.

Prefix tuning (arXiv 2101.00190, equation 3) trains P keys and P values for each layer. A token attends to them and to
its own document:

    softmax(q [K_prefix; K]^T / sqrt(d)) [V_prefix; V]

Prompt tuning (arXiv 2104.08691, section 2) trains P input vectors that stand before the first token, like the
embeddings of P extra words. Attention is causal, so what the layers make of these vectors does not depend on the text
that follows. It is computed once, as keys and values, and from there on prompt tuning is prefix tuning.

This makes both cheap and safe. A forward pass processes the P virtual tokens once, however many documents it holds, and
they take no room in the rows of tokens. Every document of a packed row sees the prefix, and so does cached generation,
with or without padding on the left. No label can fall on a virtual token.

As in the PEFT package, a document's positions start after the prefix, at P. The learned keys are used as they are:
neither RoPE nor k-norm is applied to them.

Both start from real words (section 3.2 of the prompt tuning paper, section 7.4 of the prefix tuning paper). At the
start the logits are those of the base with these words before each document.

Deviations: prefix tuning's MLP, which computes the prefix during training (section 4.3), is left out. The paper needs
it to train stably with AdamW; train_lora.py trains the prefix with Muon, which does as well without.
"""

import torch
from torch import nn

from minillm.errors import UserError
from minillm.model import Backbone, CausalLM, ModelConfig


class Prefix(nn.Module):
    """What both kinds share: `length` (P) and how a forward pass uses the prefix."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def keys_values(self, backbone: Backbone) -> list:
        """A pair (keys, values) for each layer, each (1, K, P, d)."""
        raise NotImplementedError

    def forward(self, backbone: Backbone, cache):
        """What the layers use in place of the cache. With a cache, the prefix is computed once and kept there."""
        if cache is None:
            return Prefixed(self.keys_values(backbone), None)
        if cache.prefix is None:
            cache.prefix = self.keys_values(backbone)
        return Prefixed(cache.prefix, cache)


class Prefixed:
    """Stands in for a cache: puts each layer's prefix before the keys and values of the tokens (and of the cache)."""

    def __init__(self, layers: list, cache):
        self.layers, self.cache = layers, cache

    def append(self, layer: int, keys, values):
        """(B, K, T, d) -> the prefix and all keys and values so far, (B, K, P + S, d)."""
        if self.cache is not None:
            keys, values = self.cache.append(layer, keys, values)
        before = [x.to(keys.dtype).expand(len(keys), -1, -1, -1) for x in self.layers[layer]]  # two of (B, K, P, d)
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


class Recorder:
    """Stands in for a cache: records the keys and values of each layer."""

    def __init__(self):
        self.layers = []

    def append(self, layer: int, keys, values):
        """Keep (B, K, T, d) and return them unchanged."""
        self.layers.append((keys, values))
        return keys, values


def read(backbone: Backbone, embeddings) -> list:
    """What each layer computes for embeddings (P, D) at positions 0 to P - 1: (keys, values), both (1, K, P, d)."""
    recorder, x = Recorder(), embeddings[None].to(backbone.embed_tokens.weight.dtype)
    cos, sin = backbone.rotary(torch.arange(len(embeddings), device=x.device)[None])
    for layer in backbone.layers:
        x = layer(x, cos, sin, None, recorder)
    return recorder.layers


class PromptTuning(Prefix):
    """The trainable tensor is prompt_embeddings (P, D). `words` are P token ids to start from."""

    def __init__(self, backbone: Backbone, words):
        super().__init__(len(words))
        self.prompt_embeddings = nn.Parameter(backbone.embed_tokens.weight[words].detach().float())

    def keys_values(self, backbone):
        return read(backbone, self.prompt_embeddings)


class PrefixTuning(Prefix):
    """The trainable tensor is prompt_embeddings (P, layers x 2 x K x d), the PEFT package's layout.

    `words` are P token ids to start from.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig, words):
        super().__init__(len(words))
        self.shape = (len(words), config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        with torch.no_grad():
            layers = read(backbone, backbone.embed_tokens.weight[words])
        start = torch.stack([torch.cat(pair) for pair in layers])  # (layers, 2, K, P, d)
        start = start.float().permute(3, 0, 1, 2, 4)  # (P, layers, 2, K, d)
        self.prompt_embeddings = nn.Parameter(start.reshape(self.length, -1))

    def keys_values(self, backbone):
        layers = self.prompt_embeddings.view(self.shape).permute(1, 2, 3, 0, 4)  # (layers, 2, K, P, d)
        return [(keys[None], values[None]) for keys, values in layers]


def start_words(model: CausalLM, length: int, words=None):
    """`length` token ids: the given ones, repeated or cut to fit, or random ones if none are given.

    Raises UserError if so many virtual tokens leave no room in the context, or if the model already has a prefix.
    """
    context = model.config.max_position_embeddings
    if not 1 <= length < context:
        raise UserError(f"a prefix of {length} virtual tokens does not fit: it must be between 1 and {context - 1}, "
                        f"because the model's context is {context} tokens")
    if model.model.prefix is not None:
        raise UserError("the model has a prefix already; take it off first")
    if words is None:
        words = torch.randint(model.config.vocab_size, (length,)).tolist()
    if not words:
        raise UserError("a prefix starts from at least one word")
    return torch.tensor((list(words) * length)[:length], device=model.model.embed_tokens.weight.device)


def apply_prefix(model: CausalLM, length: int, words=None) -> CausalLM:
    """Freeze the model and put `length` learned keys and values before every document, in place. Returns the model.

    words: token ids to start from (default: random ones). Raises UserError for a length that does not fit the context,
    or a second prefix; the model is then unchanged.
    """
    prefix = PrefixTuning(model.model, model.config, start_words(model, length, words))
    model.requires_grad_(False).model.prefix = prefix
    return model


def apply_prompt(model: CausalLM, length: int, words=None) -> CausalLM:
    """Freeze the model and put `length` learned input vectors before every document, in place. Returns the model.

    words: token ids to start from (default: random ones). Raises as apply_prefix does.
    """
    prefix = PromptTuning(model.model, start_words(model, length, words))
    model.requires_grad_(False).model.prefix = prefix
    return model
