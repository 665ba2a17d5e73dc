"""Chapter 4. The model: what one position computes, and why neither padding, packing nor the cache may change it.

After this chapter you can compute RMSNorm, RoPE, attention and SwiGLU for numbers that fit on a napkin, and say who may
look at whom in a packed, padded or cached row.

Attention in the smallest case, two tokens and one head of width d = 4. The second token's query is (2, 0, 0, 0), the
keys are (ln 3, 0, 0, 0) and (0, 0, 0, 0), the values (1, 0, 0, 0) and (5, 0, 0, 0):

    scores     q k / sqrt(d)      2 ln 3 / 2 = ln 3   and   0
    weights    softmax            3 / 4               and   1 / 4
    output                        3/4 * 1 + 1/4 * 5 = 2

The first token sees itself alone: its output is its own value, 1.

Drawn in tests/figures/packed_row.svg.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from minillm import attention, logprobs, runtime
from minillm.attention import (attend, attention_mask_2d, document_block_mask, document_blocks, document_lengths,
                               document_positions, one_by_one)
from minillm.data import to_device
from minillm.model import (MLP, CausalLM, KVCache, ModelConfig, RMSNorm, RotaryEmbedding, llama3_frequencies,
                           apply_rope, packed_forward, preset_config)
from minillm.generate import Rollout, generate
from minillm.heads import RewardModel, ValueModel
from minillm.lora import apply_lora, lora_off
from minillm.preferences import PairLoader
from minillm.prefix import apply_prefix
from minillm.rollouts import split_rollout
from tests.helpers import close, waiting_forbidden

SIZES = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8,
             intermediate_size=20)


def small_model(seed=0, **changes) -> CausalLM:
    """A small model whose norms are not all one: a norm that is left out or applied twice would show."""
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()


def ids(*shape, seed=1):
    return torch.randint(24, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ the parts

def test_rmsnorm_worked_example():
    """x = (3, 4): rms = sqrt((9 + 16) / 2) = 3.535534, x / rms = (0.848528, 1.131371), times the weight (2, 0.5)."""
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([2.0, 0.5])
    assert close(norm(torch.tensor([3.0, 4.0])), [1.697056, 0.565685])


def test_rmsnorm_mistake_subtracting_the_mean():
    """LayerNorm takes the mean away: (3, 4) and (13, 14) become the same. RMSNorm tells them apart."""
    norm = RMSNorm(2, eps=0.0)
    assert close(torch.layer_norm(torch.tensor([[3.0, 4.0], [13.0, 14.0]]), (2,), eps=0.0), [[-1.0, 1.0], [-1.0, 1.0]])
    assert close(norm(torch.tensor([13.0, 14.0])), [0.962317, 1.036342])  # rms = sqrt((169 + 196) / 2) = 13.509256


def test_rmsnorm_of_small_bf16_numbers_is_computed_in_float32():
    """The square of 1e-3 in half precision has three digits left, its mean over a row of them fewer; eps sits at 1e-6.

    x = (1e-3, 1e-3): the mean square is 1e-6, plus eps 2e-6, so the result is 1e-3 / sqrt(2e-6) = 0.7071.
    """
    x = torch.full((2,), 1e-3, dtype=torch.bfloat16)
    y = RMSNorm(2, eps=1e-6).bfloat16()(x)
    assert y.dtype == torch.bfloat16 and close(y.float(), [0.70703125, 0.70703125])  # the bf16 number next to 0.7071


def test_rope_turns_each_pair_by_its_own_angle():
    """d = 4, theta = 10000: the pairs (0, 2) and (1, 3) turn by 1 and by 10000^(-1/2) = 0.01 per position.

    Position 100: (x0, x2) = (1, 0) turns by 100 rad to (cos 100, sin 100) = (0.862319, -0.506366), and
    (x1, x3) = (1, 0) by 1 rad to (0.540302, 0.841471).
    """
    rotary = RotaryEmbedding(ModelConfig(**{**SIZES, "head_dim": 4}))
    cos, sin = rotary(torch.tensor([[100]]))
    turned = apply_rope(torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4), cos, sin)
    assert close(turned.flatten(), [0.862319, 0.540302, -0.506366, 0.841471])
    turned = apply_rope(torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4), cos, sin)  # (0, 1) to (-sin, cos)
    assert close(turned.flatten(), [0.506366, -0.841471, 0.862319, 0.540302])
    rotary.attention_factor = 2.0  # YaRN also makes queries and keys longer
    turned = apply_rope(torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4), *rotary(torch.tensor([[100]])))
    assert close(turned.flatten(), [1.724638, 1.080604, -1.012732, 1.682942])


@pytest.mark.parametrize("query_at, key_at", [(3, 0), (7, 4), (503, 500)])
def test_rope_knows_distances_only(query_at, key_at):
    """A query (1, 0) and a key (1, 0), three positions apart: the product is cos 3 = -0.989992, wherever they stand."""
    rotary = RotaryEmbedding(ModelConfig(**{**SIZES, "head_dim": 2}))
    one = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    query, key = (apply_rope(one, *rotary(torch.tensor([[at]]))) for at in (query_at, key_at))
    # 500 rad has 4 digits after the point
    torch.testing.assert_close((query * key).sum().item(), -0.989992, atol=5e-5, rtol=0)


def test_rope_mistake_neighbours_as_pairs():
    """The paper pairs (0, 1), (2, 3); the checkpoints of Llama and Qwen pair (0, 2), (1, 3). The product tells which.

    Query (1, 0, 0, 0) and key (0, 0, 1, 0), one position apart: they are one pair here, so the product is
    (cos 1, sin 1) . (0, 1) = sin 1 = 0.841471. With neighbours as pairs it is 0.
    """
    rotary = RotaryEmbedding(ModelConfig(**{**SIZES, "head_dim": 4}))
    query = apply_rope(torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 4), *rotary(torch.tensor([[1]])))
    key = apply_rope(torch.tensor([0, 0, 1.0, 0]).view(1, 1, 1, 4), *rotary(torch.tensor([[0]])))
    assert close((query * key).sum(), 0.841471)


def test_llama3_scaling_slows_the_slow_frequencies():
    """Of a pair that turns 10 times within the old 100 positions nothing changes (10 > high = 4), of one that turns 0.5
    times the frequency becomes an eighth (0.5 < low = 1), and 2.5 turns are half way: (1 + 1/8) / 2 = 0.5625 of it."""
    per_turn = 2 * math.pi / 100
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=100)
    scaled = llama3_frequencies(torch.tensor([10.0, 2.5, 0.5]) * per_turn, scaling)
    assert close(scaled / per_turn, [10.0, 1.40625, 0.0625])


@pytest.mark.parametrize("device, dtype, queries, masked, plainly", [
    ("mps", torch.float32, 1, True, True),      # decoding rows of unequal length: the fused kernel has been wrong there
    ("mps", torch.float32, 8, True, True),
    ("mps", torch.float32, 9, True, False),
    ("mps", torch.float32, 8, False, True),
    ("mps", torch.float32, 9, False, False),
    ("mps", torch.bfloat16, 64, False, True),   # causal bf16 has looked ahead
    ("cpu", torch.bfloat16, 64, False, True),   # faster
    ("cpu", torch.bfloat16, 1, False, False),
    ("cpu", torch.bfloat16, 2, False, True),
    ("cpu", torch.bfloat16, 1, True, True),
    ("cpu", torch.bfloat16, 4096, False, True),   # of 64 keys: 2^18 scores
    ("cpu", torch.bfloat16, 4097, False, False),
    ("cpu", torch.float32, 64, True, False),
    ("cuda", torch.bfloat16, 64, True, False)])
def test_where_attention_is_computed_as_the_formula_is_written(device, dtype, queries, masked, plainly):
    assert attention.two_products(device, dtype, queries, 64, masked) is plainly


def worked_attention(dtype=torch.float32):
    q, k, v = torch.zeros(3, 1, 1, 2, 4, dtype=dtype)
    q[0, 0, 1, 0], k[0, 0, 0, 0], v[0, 0, 0, 0], v[0, 0, 1, 0] = 2.0, math.log(3), 1.0, 5.0
    return q, k, v


def test_attention_worked_example():
    """Of the module's docstring; the plain causal path, the masked one, and the two products written out."""
    q, k, v = worked_attention()
    causal = attention_mask_2d(None, torch.zeros(1, 2), 2, 0, "cpu")
    for output in (attend(q, k, v, None), attend(q, k, v, causal), attention._attend_in_two_products(q, k, v, causal)):
        assert close(output[0, 0, :, 0], [1.0, 2.0])


@pytest.mark.parametrize("plainly", [False, True])
def test_one_of_both_ways_is_taken(monkeypatch, plainly):
    """What decides is told the device, the dtype, how many queries and keys there are, and whether there is a mask."""
    asked = []
    monkeypatch.setattr(attention, "two_products", lambda *question: asked.append(question) or plainly)
    monkeypatch.setattr(*((F, "scaled_dot_product_attention") if plainly else (attention, "_attend_in_two_products")),
                        None)  # the other way: an error
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8)
    attend(q, k, k, attention_mask_2d(None, None, 3, 2, "cpu"))
    attend(q, q, q, None)
    assert asked == [("cpu", torch.float32, 3, 5, True), ("cpu", torch.float32, 3, 3, False)]


def test_the_kind_of_device_decides(monkeypatch):
    """That of the queries: here of tensors that hold no numbers, and so need no such device."""
    asked = []
    monkeypatch.setattr(attention, "two_products", lambda device, *rest: asked.append(device) or True)
    q = torch.zeros(1, 4, 3, 8, device="meta")
    attend(q, q, q, None)
    assert asked == ["meta"]


@pytest.mark.parametrize("plainly", [False, True])
def test_query_heads_share_a_key_head(monkeypatch, plainly):
    """Six query heads, two key heads, one query: heads 0 to 2 look at the first key head's values 1 and 5, heads 3 to 5
    at the second's, 10 and 50. The weights are 1/2 and 1/2 (score 0) or 1/4 and 3/4 (score ln 3, of heads 2 and 5).
    """
    monkeypatch.setattr(attention, "two_products", lambda *_: plainly)
    q, k, v = torch.zeros(1, 6, 1, 4), torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4)
    q[0, [2, 5], 0, 0], k[0, :, 1, 0] = 2.0, math.log(3)  # 2 ln 3 / sqrt(4) = ln 3
    v[0, :, :, 0] = torch.tensor([[1.0, 5.0], [10.0, 50.0]])
    close(attend(q, k, v, None)[0, :, 0, 0], [3, 3, 4, 30, 30, 40])


@pytest.mark.parametrize("length", [1, 3])
def test_attention_takes_what_a_kernel_returns_however_it_lies_in_memory(monkeypatch, length):
    """CUDA's kernels return the heads of a token side by side, CPUs' the tokens of a head."""
    model, tokens = small_model(), ids(2, 4)
    expected = model(tokens)[:, -length:]
    kernel = F.scaled_dot_product_attention
    lies_otherwise = lambda *args, **options: kernel(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lies_otherwise)
    cache = KVCache(model.config, 2, 4)
    model(tokens[:, :-length], cache=cache)
    close(model(tokens[:, -length:], cache=cache), expected)


def test_attention_mistake_no_scale():
    """Without 1 / sqrt(d) the weights were 9 : 1 and the output 1.4."""
    q, k, v = worked_attention()
    assert close(torch.softmax((q @ k.mT)[0, 0, 1], -1) @ v[0, 0, :, 0], 1.4)
    assert not torch.allclose(attend(q, k, v, None)[0, 0, 1, 0], torch.tensor(1.4))


@pytest.mark.parametrize("masked", [False, True])
def test_bf16_on_the_cpu_takes_another_path_to_the_same_numbers(masked):
    """In bf16, where a number has 8 bits, both paths are within rounding of float32; with grouped heads and padding."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 9, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    padding = torch.ones(3, 9, dtype=torch.bool)
    padding[0, :4] = padding[1, 6:] = padding[2] = False
    mask = attention_mask_2d(padding, None, 9, 0, "cpu") if masked else None
    expected = attend(q, k, v, mask)
    actual = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert actual.dtype == torch.bfloat16 and (actual.float() - expected).abs().max() < 0.03
    causal = torch.ones(9, 9, dtype=torch.bool).tril()  # and the formula itself, in float32, to the usual digits
    assert close(attention._attend_in_two_products(q, k, v, mask if masked else causal), expected)


def test_swiglu_worked_example():
    """down(silu(gate x) * up x) with gate 1, up 2, down 3 at x = 1: silu(1) = 1 / (1 + e^-1) = 0.731059, times 6."""
    mlp = MLP(ModelConfig(**{**SIZES, "hidden_size": 1, "intermediate_size": 1}))
    for layer, weight in ((mlp.gate_proj, 1.0), (mlp.up_proj, 2.0), (mlp.down_proj, 3.0)):
        layer.weight.data.fill_(weight)
    assert close(mlp(torch.ones(1)), [4.386351])


def test_positions_restart_with_each_document():
    doc_ids = torch.tensor([[5, 5, 5, 2, 2, -1, -1], [0, 1, 2, 2, 2, 2, 3]])
    assert document_positions(doc_ids).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 0]]


def test_who_may_look_at_whom():
    """Two documents of two tokens, and a padding token that sees itself alone (a softmax over nothing is NaN)."""
    mask = attention_mask_2d(None, torch.tensor([[0, 0, 1, 1, -1]]), 5, 0, "cpu")
    assert mask.int().tolist() == [[[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0],
                                     [0, 0, 0, 0, 1]]]]
    mask = attention_mask_2d(torch.tensor([[False, True, True]]), None, 3, 0, "cpu")
    assert mask.int().tolist() == [[[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]]
    mask = attention_mask_2d(torch.tensor([[False, True, True, True]]), None, 2, 2, "cpu")  # two in the cache, two new
    assert mask.int().tolist() == [[[[0, 1, 1, 0], [0, 1, 1, 1]]]]


def test_only_keys_before_several_new_tokens_need_a_mask():
    """Two new tokens after two keys: both in the cache, both of a prefix, or one of each. Without any, or with one new
    token alone, plain causal attention is right and faster."""
    for past, prefix in ((2, 0), (0, 2), (1, 1)):
        mask = attention_mask_2d(None, None, 2, past, "cpu", prefix)
        assert mask.int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]
    for T, past, prefix in ((3, 0, 0), (1, 0, 0), (1, 2, 0), (1, 0, 2)):
        assert attention_mask_2d(None, None, T, past, "cpu", prefix) is None
    mask = attention_mask_2d(torch.tensor([[False, True]]), None, 2, 0, "cpu", 1)  # everyone sees the prefix
    assert mask.int().tolist() == [[[[1, 1, 0], [1, 0, 1]]]]


def test_nothing_is_made_on_another_device(monkeypatch):
    """On the device "meta", where tensors have no numbers: two devices in one operation are an error there too."""
    monkeypatch.setattr(attention, "two_products", lambda *_: True)
    q = torch.zeros(1, 4, 2, 8, device="meta")
    results = [document_positions(torch.zeros(2, 3, dtype=torch.long, device="meta")),
               attention_mask_2d(None, None, 2, 2, "meta"), attend(q, q, q, None)]
    assert [x.device.type for x in results] == ["meta"] * 3
    monkeypatch.setattr(attention, "_attend_in_two_products", lambda q, k, v, mask: mask)
    assert attend(q, q, q, None).device.type == "meta"


# ------------------------------------------------------------------------------------------ the whole

@pytest.mark.parametrize("preset, parameters", [("tiny", 1_607_040), ("mini", 25_830_912), ("small", 63_912_192),
                                                ("base", 105_605_888)])
def test_parameters_of_the_presets(preset, parameters):
    """With 6,400 tokens. small, counted by hand: embedding 6400 x 768 = 4,915,200 (the head is the same matrix); per
    layer q 768 x 768, k and v 768 x 384 each, o 768 x 768, q_norm and k_norm 96 each, MLP 3 x 768 x 2432, two norms of
    768 = 7,374,528, times 8; last norm 768."""
    with torch.device("meta"):
        model = CausalLM(preset_config(preset, 6400))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_tied_embeddings_are_one_tensor():
    """Pitfall 18. Its gradient is the sum of both uses: with a fixed head, a token that is never read gets none."""
    tied, untied = small_model(), small_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    for model in (tied, untied):
        model(torch.tensor([[3, 4]])).logsumexp(-1).sum().backward()
    assert not untied.model.embed_tokens.weight.grad[7].any() and untied.lm_head.weight.grad[7].any()
    assert tied.model.embed_tokens.weight.grad[7].any()


def test_a_new_model_knows_nothing():
    """All of 3,072 tokens are about equally likely at first: the loss is ln 3072 = 8.030 within 0.1."""
    torch.manual_seed(0)
    model = CausalLM(preset_config("tiny", 3072))
    tokens = torch.randint(3072, (4, 64))
    loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].reshape(-1, 3072), tokens[:, 1:].reshape(-1))
    assert abs(loss.item() - 8.030) < 0.1


@pytest.mark.parametrize("prefix", [False, True])
def test_activation_checkpointing_changes_the_memory_and_nothing_else(prefix):
    """What the backward pass holds on to: per layer its input (and the mask's share of it) instead of every product in
    it."""
    model, tokens, docs = small_model(), ids(2, 12), torch.arange(12).expand(2, 12) // 5
    if prefix:
        apply_prefix(model, 3, [1, 2])
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for model.model.recompute in (False, True):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            logits = model(tokens, doc_ids=docs)
        found.append((logits, torch.autograd.grad(logits.logsumexp(-1).sum(), trained), sum(held)))
    (plain, gradients, much), (logits, again, little) = found
    assert torch.equal(plain, logits) and all(torch.equal(a, b) for a, b in zip(gradients, again))
    assert little < 0.5 * much


def test_the_future_is_not_seen():
    """Another last token leaves the logits before it as they were, to the bit."""
    model, a, b = small_model(), ids(2, 7), ids(2, 7)
    b[:, -1] = (b[:, -1] + 1) % 24
    before, after = model(a), model(b)
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.allclose(before[:, -1], after[:, -1])


def test_grouped_heads_equal_repeated_heads():
    """Four query heads on two key/value heads = four on four, where heads 0, 1 hold the first and 2, 3 the second.
    The mistake of tiling (first, second, first, second) gives other logits."""
    grouped, full = small_model(), small_model(num_key_value_heads=4)
    tokens = ids(2, 7)
    for order, equal in (([0, 0, 1, 1], True), ([0, 1, 0, 1], False)):
        weights = {}
        for name, weight in grouped.state_dict().items():
            if "k_proj" in name or "v_proj" in name:
                weight = weight.view(2, 8, 16)[order].reshape(32, 16)
            weights[name] = weight
        full.load_state_dict(weights)
        assert torch.allclose(full(tokens), grouped(tokens), atol=1e-5) is equal


@pytest.mark.parametrize("model_type, same", [("qwen3", True), ("qwen2", False), ("llama", False)])
def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant(model_type, same):
    """The reason for it: attention logits cannot grow without bound. Only Qwen3 has it."""
    model, tokens = small_model(model_type=model_type), ids(2, 7)
    before = model(tokens)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 50
            layer.self_attn.k_proj.weight *= 50
    assert torch.allclose(model(tokens), before, atol=1e-3) is same


@pytest.mark.parametrize("model_type, biases", [("qwen3", []), ("llama", []),
                                                ("qwen2", ["k_proj.bias", "q_proj.bias", "v_proj.bias"])])
def test_which_biases_each_family_has(model_type, biases):
    names = [name for name, _ in small_model(model_type=model_type).named_parameters() if "layers.0" in name
             and "bias" in name]
    assert sorted(name.removeprefix("model.layers.0.self_attn.") for name in names) == biases


@pytest.mark.parametrize("changes", [{"model_type": "gpt2"}, {"num_key_value_heads": 3}, {"head_dim": 7}])
def test_an_impossible_architecture_is_refused(changes):
    with pytest.raises(ValueError):
        ModelConfig(**{**SIZES, **changes})


# ----------------------------------------------------------------------------- what must change nothing

@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    """Pitfall 7. Sequences of 7, 4 and 1 tokens in one batch, whatever stands in the padding."""
    model = small_model()
    lengths, tokens = [7, 4, 1], ids(3, 7)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, 7 - n:] = True if side == "left" else mask[row, 7 - n:]
        mask[row, :n] = True if side == "right" else mask[row, :n]
    logits = model(tokens, attention_mask=mask)
    for row in range(3):
        alone = tokens[row][mask[row]][None]
        assert close(logits[row][mask[row]], model(alone)[0])


def test_right_padding_needs_no_mask_under_causal_attention():
    model, tokens = small_model(), ids(1, 4)
    padded = torch.cat([tokens, ids(1, 3, seed=2)], dim=1)
    assert close(model(padded)[:, :4], model(tokens))


def test_packing_changes_nothing():
    """Documents of 3, 1 and 4 tokens and some padding in one row: each has the logits that it has alone."""
    model, tokens = small_model(), ids(1, 10)
    doc_ids = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, -1, -1]])
    packed = model(tokens, doc_ids=doc_ids)
    for start, end in ((0, 3), (3, 4), (4, 8)):
        assert close(packed[:, start:end], model(tokens[:, start:end]))


def test_packing_changes_no_gradient():
    """The gradient of a packed row is the sum of its documents' gradients, padding adding nothing."""
    def gradient(score):
        model = small_model()
        score(model).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    tokens, doc_ids = ids(1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
    packed = gradient(lambda model: model(tokens, doc_ids=doc_ids)[:, :7].logsumexp(-1).sum())
    alone = gradient(lambda model: sum(model(tokens[:, a:b]).logsumexp(-1).sum() for a, b in ((0, 3), (3, 7))))
    assert close(packed, alone)


def test_packing_mistake_one_document_reads_the_other():
    """Plain causal attention over a packed row: the second document sees the first, and its logits move."""
    model, tokens = small_model(), ids(1, 7)
    assert not torch.allclose(model(tokens)[:, 3:], model(tokens[:, 3:]), atol=1e-2)


def test_the_same_number_in_another_place_is_another_document():
    """doc_ids 0 0 1 1 and 4 4 9 9 mean the same; only equality within a row counts."""
    model, tokens = small_model(), ids(1, 4)
    assert torch.equal(model(tokens, doc_ids=torch.tensor([[0, 0, 1, 1]])),
                       model(tokens, doc_ids=torch.tensor([[4, 4, 9, 9]])))


def blocks_of(doc_ids, *block):
    return [torch.from_numpy(array) for array in document_blocks(doc_ids.cpu().numpy(), *block)]


def block_mask(doc_ids, block=128):
    return document_block_mask(doc_ids, *blocks_of(doc_ids, block), block)


def listed(counts, indices):
    """(B, 1, Q) numbers of key blocks and (B, 1, Q, blocks) which ones come first -> (B, Q, blocks) bool."""
    chosen = torch.zeros(indices.shape, dtype=torch.bool)
    return chosen.scatter(-1, indices.long(), torch.arange(indices.shape[-1]) < counts[..., None])[:, 0]


@pytest.mark.parametrize("length", [12, 16, 18])
def test_the_block_mask_is_the_mask_in_blocks(length):
    """Blocks of 4: skipped where no pair may look, whole where all may, and read through the mask in between; never two
    of these."""
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        doc_ids = (torch.rand(2, length, generator=random) < torch.tensor([[0.1], [0.4]])).long().cumsum(1)
        doc_ids[:, length - int(torch.randint(0, length, (), generator=random)):] = -1
        blocks = block_mask(doc_ids, block=4)
        mask, n = attention_mask_2d(None, doc_ids, length, 0, "cpu")[:, 0], -(-length // 4)
        pad = (0, 4 * n - length) * 2
        tiles = F.pad(mask, pad).view(2, n, 4, n, 4).transpose(2, 3)
        some, whole = listed(blocks.kv_num_blocks, blocks.kv_indices), listed(blocks.full_kv_num_blocks,
                                                                              blocks.full_kv_indices)
        assert ((some | whole) == tiles.any(-1).any(-1)).all() and not (some & whole).any()
        assert (whole == tiles.all(-1).all(-1)).all()
        b, q, k = torch.meshgrid(torch.arange(2), torch.arange(length), torch.arange(length), indexing="ij")
        assert (blocks.mask_mod(b, 0, q, k) == mask).all()


@pytest.mark.parametrize("length", [12, 16, 17, 18, 160])
def test_the_loaders_blocks_are_pytorchs(length):
    """NumPy makes, from the ends of the blocks, what create_block_mask makes of all pairs: every tensor is the same,
    of both directions, the forward pass's and the backward pass's."""
    random = np.random.default_rng(0)
    for _ in range(10):
        doc_ids = (random.random((3, length)) < [[0.1], [0.4], [0.0]]).cumsum(1)
        doc_ids[0, length - random.integers(length):] = -1
        ours = block_mask(torch.from_numpy(doc_ids), block=4)
        pytorchs = create_block_mask(ours.mask_mod, 3, None, length, length, device="cpu", BLOCK_SIZE=4)
        assert ours.seq_lengths == pytorchs.seq_lengths and ours.BLOCK_SIZE == pytorchs.BLOCK_SIZE
        for side in ("kv", "full_kv", "q", "full_q"):
            for name in (f"{side}_num_blocks", f"{side}_indices"):
                one, other = getattr(ours, name), getattr(pytorchs, name)
                assert one.equal(other) and one.dtype == other.dtype and one.is_contiguous()


def test_long_packed_rows_equal_their_documents_alone():
    """On CPUs long rows are attended to document by document: forward and backward, with padding at the end."""
    model, tokens = small_model(num_key_value_heads=2, max_position_embeddings=1024), ids(2, 600)
    lengths = [[200, 1, 310, 89], [600]]
    doc_ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    doc_ids[0, -89:] = -1
    assert document_lengths(doc_ids) == lengths
    hidden = model.hidden(tokens, doc_ids=doc_ids)
    alone = [model.hidden(part[None]) for row, n in zip(tokens, lengths) for part in row.split(n)]
    close(hidden.flatten(0, 1), torch.cat(alone, dim=1)[0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(*(torch.autograd.grad((x ** 2).mean(), parameters)
                            for x in (hidden, torch.cat(alone, dim=1)))):
        close(one, other)
    mask = attention_mask_2d(None, doc_ids, 600, 0, "cpu")
    q, k, v = torch.randn(2, 4, 600, 8), torch.randn(2, 2, 600, 8), torch.randn(2, 2, 600, 8)
    close(attend(q, k, v, document_lengths(doc_ids)), attend(q, k, v, mask))


@pytest.mark.parametrize("device, bf16, length, expected", [
    ("cpu", False, 256, False), ("cpu", False, 257, True), ("cpu", True, 512, False), ("cpu", True, 513, True),
    ("mps", False, 4096, False)])
def test_only_a_cpu_goes_document_by_document_in_float32_sooner(device, bf16, length, expected):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert one_by_one(device, length) == expected


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flex_attention_equals_the_plain_mask(kv_heads):
    """Its compiled form runs on CUDA only; here the formula, with grouped heads and padding, and a row of padding
    alone."""
    model, tokens = small_model(num_key_value_heads=kv_heads).requires_grad_(False), ids(3, 10)
    doc_ids = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, -1, -1], [0] * 10, [-1] * 10])
    close(model.hidden(tokens, doc_ids=doc_ids, block_mask=block_mask(doc_ids)),
          model.hidden(tokens, doc_ids=doc_ids))


@pytest.fixture
def no_programs():
    """PyTorch keeps at most 8 programs of one function."""
    torch.compiler.reset()


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.slow
def test_one_program_serves_all_layers_and_batches_of_all_shapes(recompute):
    """A model of three layers, as the scripts compile those that read batches of ever other shapes: in one piece, once
    without and once with doc_ids. Hidden states and gradients are those of the plain twin."""
    model, counter = small_model(num_hidden_layers=3), CompileCounter()
    plain = copy.deepcopy(model)
    model.model.recompute = recompute
    model.model.run_layer = torch.compile(model.model.run_layer, dynamic=True, backend=counter, fullgraph=True)
    for rows, length in ((3, 7), (5, 12), (4, 9)):
        tokens = ids(rows, length)
        for doc_ids in (None, torch.arange(length).expand(rows, length) // 4):
            found, expected = model.hidden(tokens, doc_ids=doc_ids), plain.hidden(tokens, doc_ids=doc_ids)
            assert close(found, expected)
            for hidden in (found, expected):
                hidden.square().mean().backward()
    assert counter.frame_count == 2
    for one, other in zip(model.model.parameters(), plain.model.parameters()):
        assert close(one.grad, other.grad)


@pytest.mark.usefixtures("no_programs")
def test_a_smaller_batch_is_not_compiled_again(monkeypatch):
    """The last batch of an epoch may have any number of rows: it is padded to the most rows seen, and the result has
    the rows that were asked for."""
    model, counter, compile_it = small_model(), CompileCounter(), torch.compile
    plain = copy.deepcopy(model)
    monkeypatch.setattr(runtime, "can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compile_it(function, backend=counter,
                                                                               dynamic=dynamic))
    forward = packed_forward(model, True)
    for rows in (7, 7, 1, 7, 3, 5):
        tokens, doc_ids = ids(rows, 12), torch.arange(12).expand(rows, 12) // 5
        assert close(forward(tokens, doc_ids, blocks_of(doc_ids)), plain.hidden(tokens, doc_ids=doc_ids))
    assert counter.frame_count == 1


def test_a_copy_of_a_compiled_model_runs_its_own_weights(monkeypatch):
    monkeypatch.setattr(runtime, "can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    model, tokens = small_model(), ids(2, 5)
    monkeypatch.setattr("minillm.logprobs.compiled", False)
    runtime.compile_backbone(model, True)
    assert logprobs.compiled  # the softmax too
    copied = copy.deepcopy(model)
    before = model.hidden(tokens)
    model.model.norm.weight.data.zero_()
    assert close(copied.hidden(tokens), before) and not model.hidden(tokens).any()
    assert copied.state_dict().keys() == small_model().state_dict().keys()


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("prefix, programs", [(0, 1), (2, 0)])
def test_what_has_a_cache_or_needs_no_gradient_runs_uncompiled(prefix, programs):
    """Each layer has its own place in a cache, and so has a learned prefix: that would be a program for each layer."""
    model, counter = small_model(num_hidden_layers=3), CompileCounter()
    model.model.run_layer = torch.compile(model.model.run_layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        model.hidden(ids(2, 5))
    model.hidden(ids(2, 5), cache=KVCache(model.config, 2, 5))
    assert counter.frame_count == 0
    if prefix:
        apply_prefix(model, prefix)
    model.hidden(ids(2, 5)).mean().backward()
    assert counter.frame_count == programs


@pytest.mark.parametrize("asked, said", [(True, "not compiled: a model with a learned prefix\n"), (None, "")])
def test_with_a_learned_prefix_nothing_says_that_it_compiles(monkeypatch, capsys, asked, said):
    monkeypatch.setattr(runtime, "wants_compile", lambda *args: pytest.fail("asked"))
    packed_forward(apply_prefix(small_model(), 2), asked)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("bf16, longest", [(False, 256), (True, 512)])
def test_nor_for_rows_whose_documents_a_cpu_computes_one_by_one(monkeypatch, capsys, bf16, longest):
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: bf16)
    asked = []
    monkeypatch.setattr(runtime, "wants_compile", lambda model, wanted: asked.append(wanted))
    packed_forward(small_model(), True, longest)
    assert asked == [True] and capsys.readouterr().err == ""
    packed_forward(small_model(), None, longest + 1)
    assert asked == [True] and capsys.readouterr().err == ""
    packed_forward(small_model(), True, longest + 1)
    assert asked == [True] and capsys.readouterr().err == (
        f"not compiled: on a CPU the documents of rows of {longest + 1} tokens are computed one by one\n")


class Pairs:
    """A data set for PairLoader: the pairs of answers have these lengths."""

    margins = np.zeros(7, np.float32)

    def __len__(self):
        return 7

    def __getitem__(self, i):
        return [(np.arange(n), np.arange(n) > 1) for n in (3 * i + 2, i + 5)]

    def lengths(self):
        return np.arange(7) * 3 + 5


def micro_batches():
    """10 answers in micro-batches of 1 to 3, of which three have no gradient."""
    lengths = torch.tensor([4, 9, 3, 7, 5, 8, 12, 6, 11, 10])
    mask = (torch.arange(12) > 1) & (torch.arange(12) < lengths[:, None])
    rollout = Rollout(ids(10, 12), mask, torch.zeros(10, 12))
    return [batch for minibatch in split_rollout(rollout, 3, 2, torch.Generator().manual_seed(0), keep=lengths > 4)
            for batch in minibatch.micro_batches]


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("stage, programs", [("dpo", 1), ("reward", 1), ("critic", 1), ("rl lora", 3)])
@pytest.mark.slow
def test_one_program_trains_on_pairs_and_on_rollouts(monkeypatch, stage, programs):
    """Batches of all heights and lengths, the last and smaller one, one of a single row and one without any. Evaluation
    and decoding compile nothing. With a LoRA the first layer has a program of its own, since what comes from the frozen
    embedding needs no gradient; switched off, so that the policy is its own reference, it makes a third one.

    No batch is as long as the model is wide, here 30 and 32: PyTorch takes equal sizes for one, which then is fixed."""
    language_model, counter, compile_it = small_model(hidden_size=30, head_dim=32), CompileCounter(), torch.compile
    heads = {"reward": RewardModel.from_lm, "critic": ValueModel.from_lm}
    model = heads[stage](language_model) if stage in heads else language_model
    if "lora" in stage:
        apply_lora(model, r=2, alpha=4)
    plain = copy.deepcopy(model)
    monkeypatch.setattr(runtime, "can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compile_it(function, backend=counter,
                                                                               dynamic=dynamic, fullgraph=True))
    runtime.compile_backbone(model, True)
    loader = PairLoader(Pairs(), 3, seed=0)
    batches = [*loader.epoch_batches(0), loader.collate([])] if stage in ("dpo", "reward") else micro_batches()
    rows = [len(batch.tokens) for batch in batches]
    assert {6, 2, 0} <= set(rows) if stage in ("dpo", "reward") else {1, 2} <= set(rows)
    for batch in batches:
        tokens = batch.tokens % 24
        close(model.model(tokens), plain.model(tokens))
        if "lora" in stage:
            with lora_off(model), lora_off(plain):
                close(model.hidden(tokens), plain.hidden(tokens))
        with torch.no_grad():
            close(model.model(tokens), plain.model(tokens))
    assert counter.frame_count == programs
    generate(language_model, [[1, 2]], 3, end_id=-1)
    assert counter.frame_count == programs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length, recompute", [(30, False), (127, False), (128, False), (129, True), (384, False)])
def test_the_compiled_forward_of_packed_rows_equals_its_plain_twin(length, recompute):
    """Flex attention and torch.compile, once with activation checkpointing, against the dense mask: hidden states and
    gradients, in float32; the mask is made without waiting."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=64, num_hidden_layers=2)).cuda()
    model.model.recompute = recompute
    wanted = torch.randn(2, length, model.config.hidden_size, device="cuda")  # a normed state's mean square is constant
    tokens = torch.randint(64, (2, length), device="cuda")
    doc_ids = (torch.rand(2, length, device="cuda") < 0.02).long().cumsum(1)
    found = []
    blocks = [to_device(x, "cuda") for x in blocks_of(doc_ids)]
    for forward in (packed_forward(model, True), packed_forward(model, False)):
        forward(tokens, doc_ids, blocks).mean().backward()  # compiles
        model.zero_grad()
        with waiting_forbidden():
            hidden = forward(tokens, doc_ids, blocks)
            (hidden * wanted).mean().backward()
        found.append((hidden.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for compiled, plain in zip(*found):
        assert (compiled - plain).abs().max() < 2e-3 * plain.abs().max()  # TF32 inside the fused kernel


@pytest.mark.parametrize("steps", [[7], [4, 1, 1, 1], [3, 4], [1] * 7])
def test_cached_equals_the_full_forward(steps):
    model, tokens = small_model(), ids(2, 7)
    cache, parts = KVCache(model.config, 2, 7), []
    for n in steps:
        parts.append(model(tokens[:, cache.length:cache.length + n], cache=cache))
    assert close(torch.cat(parts, dim=1), model(tokens))


@pytest.mark.parametrize("steps", [[5, 1, 1], [5, 2]])
def test_cached_with_left_padding_equals_each_sequence_alone(steps):
    """Prompts of 5, 2 and 1 tokens, padded on the left, and two more tokens each."""
    model, tokens = small_model(), ids(3, 7)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, :3] = mask[2, :4] = False
    cache = KVCache(model.config, 3, 7)
    parts = [model(tokens[:, :5], attention_mask=mask, cache=cache)]
    for n in steps[1:]:
        parts.append(model(tokens[:, cache.length:cache.length + n], cache=cache))
    logits = torch.cat(parts, dim=1)
    for row, start in enumerate((0, 3, 4)):
        assert close(logits[row, start:], model(tokens[row:row + 1, start:])[0])


def test_rows_of_the_cache_can_be_chosen_and_repeated():
    model, tokens = small_model(), ids(3, 5)
    cache = KVCache(model.config, 3, 6)
    model(tokens, cache=cache)
    cache.select(torch.tensor([2, 2, 0]))
    following = ids(3, 1, seed=5)
    whole = torch.cat([tokens[[2, 2, 0]], following], dim=1)
    assert close(model(following, cache=cache)[:, -1], model(whole)[:, -1])


def test_a_full_cache_says_so():
    model = small_model()
    with pytest.raises(ValueError, match="the cache holds 4 positions; 5 are needed"):
        model(ids(1, 5), cache=KVCache(model.config, 1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_padding_alone_are_finite(dtype):
    """Pitfall 7. Such rows happen (the last batch of an epoch, a masked prompt); their values mean nothing, yet NaN
    would spread through the gradient to every weight."""
    model, tokens = small_model().to(dtype), ids(3, 6)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0], mask[1, :4] = False, False
    for arguments in ({"attention_mask": mask}, {"doc_ids": torch.where(mask, 0, -1)}):
        logits = model(tokens, **arguments)
        assert logits.dtype == dtype and logits.isfinite().all()
        (logits[mask].float().logsumexp(-1).sum()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_large_weights_in_half_precision_stay_finite():
    """Weights 30 times as large: with queries and keys normalised and norms in float32 nothing overflows fp16's 65,504.
    """
    model = small_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "embed" in name:
                weight *= 30
    assert model.half()(ids(2, 6)).isfinite().all()


def test_bf16_autocast_is_close_to_float32():
    model, tokens = small_model(), ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, doc_ids=torch.tensor([[0] * 4 + [1] * 5] * 2))
    exact = model(tokens, doc_ids=torch.tensor([[0] * 4 + [1] * 5] * 2))
    assert logits.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in model.parameters())
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_rmsnorm_worked_example: `torch.tensor([3.0, 4.0])` -> `torch.tensor([30.0, 40.0])`. By what factor does the
#    result grow?
# 2. test_swiglu_worked_example: `(mlp.gate_proj, 1.0)` -> `(mlp.gate_proj, -1.0)`. Is the result 0, as it would be
#    with a ReLU?
