"""Chapter 12. LoRA: the change of a frozen matrix W is the product of two thin ones, scaled by alpha / r.

After this chapter you can compute a LoRA layer forwards and backwards by hand, and say what merging may cost.

Worked example (W is 3 x 2: rank 1 is enough to see every index, and a transposed matrix would not fit):

    W = [[1, 2], [3, 4], [5, 6]]    A = [[1, -1]]    B = [[1], [0], [2]]    alpha = 2, r = 1: scaling 2    x = [1, 2]
    W x = [5, 11, 17]    A x = -1    2 B A x = [-2, 0, -4]    y = [3, 11, 13]
    merged W + 2 B A = [[3, 0], [3, 4], [9, 2]], and times x again [3, 11, 13]

Backwards, with the loss y1 + y2 + y3:

    dL/dB = 2 (A x) for each row = -2    dL/dA = 2 (B1 + B2 + B3) x = 6 x = [6, 12]
    dL/dx = W'1 + 2 A'(3) = [9, 12] + [6, -6] = [15, 6]
"""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from minillm.checkpoint import load_model, save_model
from minillm.errors import UserError
from minillm.generate import generate
from minillm.lora import (TARGETS, DoRALinear, LoRALinear, apply_lora, find_targets, lora_off, merge_lora,
                          unmerge_lora)
from minillm.model import CausalLM, ModelConfig, preset_config
from minillm.peft import COMPUTED, IGNORED, has_adapter, load_adapter, remove_adapter, save_adapter
from minillm.safetensors import load_safetensors, save_safetensors
from minillm.tokenizer import train_tokenizer
from tests.helpers import close

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [20, 3, 20, 3, 9, 1, 2]])
TOKENIZER = train_tokenizer(["a"], 259)


def linear(weight, bias=None):
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight, dtype=torch.float32)
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float32)
    return layer


def filled(cls, weight, A, B, alpha, bias=None, **options):
    layer = cls(linear(weight, bias), len(A), alpha, **options)
    layer.lora_A.data, layer.lora_B.data = torch.tensor(A), torch.tensor(B)
    return layer


def example():
    return filled(LoRALinear, [[1, 2], [3, 4], [5, 6]], [[1.0, -1.0]], [[1.0], [0.0], [2.0]], alpha=2)


def small_model(seed=0, **changes):
    """A model whose weights are four times the usual size: with logits near zero, any two models would look alike."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=12, intermediate_size=40, max_position_embeddings=64)
    model = CausalLM(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def trained(model, size=0.1):
    """The model as if after training: every trainable number has moved."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def far(a, b):
    return (a - b).abs().max() > 0.1


# The layer

def test_the_worked_example():
    layer, x = example(), torch.tensor([1.0, 2.0], requires_grad=True)
    y = layer(x)
    close(y, [3, 11, 13])
    y.sum().backward()
    close(layer.lora_B.grad, [[-2], [-2], [-2]])
    close(layer.lora_A.grad, [[6, 12]])
    close(x.grad, [15, 6])
    close(layer.merged_weight(), [[3, 0], [3, 4], [9, 2]])
    assert layer.base.weight.grad is None


def test_the_mistake_without_alpha():
    """Without the scaling of 2 the update is half as large, and y = [4, 11, 15]."""
    layer, x = example(), torch.tensor([1.0, 2.0])
    without = layer.base(x) + layer.lora_B @ layer.lora_A @ x
    close(without, [4, 11, 15])
    with pytest.raises(AssertionError):
        close(layer(x), without)


def test_rslora_divides_by_the_root_of_the_rank():
    """A x = [-1, 2], B A x = [-1, 2, 1]. alpha = 2, r = 2: LoRA scales by 1, rsLoRA by 2 / sqrt(2) = 1.41421356."""
    W, A, B = [[1, 2], [3, 4], [5, 6]], [[1.0, -1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    x = torch.tensor([1.0, 2.0])
    close(filled(LoRALinear, W, A, B, alpha=2)(x), [4, 13, 18])
    close(filled(LoRALinear, W, A, B, alpha=2, rslora=True)(x), [3.58578644, 13.82842712, 18.41421356])


def test_the_scaling_of_dora_is_alpha_over_r_unless_told_otherwise():
    """alpha = 6, r = 2: 3. With the root of the rank it would be 4.242641."""
    assert DoRALinear(linear([[1, 2], [3, 4]]), 2, 6).scaling == 3
    close(DoRALinear(linear([[1, 2], [3, 4]]), 2, 6, rslora=True).scaling, 4.2426407)


def dora_example(bias=None):
    """W = [[3, 4], [0, 5], [5, 12]], m = [5, 5, 13]    2 B A = [[2, 8], [0, 0], [-2, -8]]

    V = [[5, 12], [0, 5], [3, 4]]
    """
    return filled(DoRALinear, [[3, 4], [0, 5], [5, 12]], [[1.0, 4.0]], [[1.0], [0.0], [-1.0]], alpha=2, bias=bias)


def test_the_worked_example_of_dora():
    """||V|| = [13, 5, 5]; m / ||V|| = [5/13, 1, 13/5]; V x = [29, 10, 11] for x = [1, 2]. With the loss y1 + y2 + y3:

    dL/dm = V x / ||V|| = [29/13, 2, 11/5]    dL/dB = m / ||V|| 2 (A x), A x = 9    dL/dA = 2 (5/13 - 13/5) x
    """
    layer = dora_example()
    close(layer.lora_magnitude_vector, [5, 5, 13])
    y = layer(torch.tensor([1.0, 2.0]))
    close(y, [11.15384615, 10, 28.6])
    y.sum().backward()
    close(layer.lora_magnitude_vector.grad, [2.23076923, 2, 2.2])
    close(layer.lora_B.grad, [[6.92307692], [18], [46.8]])
    close(layer.lora_A.grad, [[-4.43076923, -8.86153846]])
    close(layer.merged_weight(), [[1.92307692, 4.61538462], [0, 5], [7.8, 10.4]])


def test_the_mistake_of_differentiating_through_doras_norm():
    """A change of B along V only changes the length of V, and the norm removes it: B gets another gradient.

    For the first row, dL/dB = 2 A P x 5 / 13 with P = 1 - V V' / 169 = [[144, -60], [-60, 25]] / 169:
    P x = [24, -10] / 169, A P x = -16 / 169, and dL/dB = -0.0728 instead of 6.92.
    """
    layer = dora_example()
    V = layer.base.weight + 2 * layer.lora_B @ layer.lora_A
    (layer.lora_magnitude_vector * (V @ torch.tensor([1.0, 2.0])) / V.norm(dim=1)).sum().backward()
    close(layer.lora_B.grad[0], [-0.07282658])
    with pytest.raises(AssertionError):
        close(layer.lora_B.grad[0], [6.92307692])


def test_dora_with_a_bias_scales_the_matrix_alone():
    layer = dora_example(bias=[100, 200, 300])
    close(layer(torch.tensor([1.0, 2.0])), [111.15384615, 210, 328.6])


def test_a_row_of_zeros_is_no_row_of_nan_in_dora():
    """Its magnitude and its norm are both 0, and 0 / 0 would be NaN."""
    base = nn.Linear(4, 3)
    with torch.no_grad():
        base.weight[1] = 0
    layer, x = DoRALinear(base, 2, 4.0), torch.randn(5, 4)
    assert close(layer(x), base(x)) and close(layer.merged_weight(), base.weight)
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))


def test_a_starts_gaussian_with_std_one_over_r_and_b_at_zero():
    """4 x 10,000 numbers: the standard deviation is known to 0.4 %, so 2 % is five times that; 1/4 = 0.25."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(10_000, 20), 4, 8.0)
    assert layer.lora_A.shape == (4, 10_000) and layer.lora_B.shape == (20, 4)
    assert 0.245 < layer.lora_A.std() < 0.255 and layer.lora_A.mean().abs() < 0.006
    assert 2.8 < (layer.lora_A / layer.lora_A.std()).pow(4).mean() < 3.2  # 3 for a Gaussian, 1.8 for a uniform one
    assert not layer.lora_B.any()


def test_a_seed_gives_the_same_start_on_every_device():
    """A is drawn on the CPU also for a model that is elsewhere, here on the meta device, which has no numbers at all:
    so what is drawn next is the same. A model under --shard is in main memory while its LoRA is made."""
    following = []
    for base in (nn.Linear(6, 4), nn.Linear(6, 4, device="meta")):
        torch.manual_seed(0)
        layer = LoRALinear(base, 2, 4.0)
        assert layer.lora_A.device == layer.lora_B.device == base.weight.device
        following.append(torch.rand(3))
    assert torch.equal(*following)


@pytest.mark.parametrize("base, expected", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                                            (torch.float64, torch.float64)])
def test_the_update_lies_beside_its_base_and_never_in_half_precision(base, expected):
    """On the device "meta", where tensors have no numbers."""
    layer = LoRALinear(nn.Linear(3, 2, device="meta", dtype=base), 1, 2.0)
    assert [(t.device.type, t.dtype) for t in (layer.lora_A, layer.lora_B)] == [("meta", expected)] * 2


def test_dropout_falls_on_the_update_alone_and_only_in_training():
    """x = [1, 1], W = 10: kept entries of x are doubled at p = 1/2, so y is 10 + 10 + (0, 2 or 4)."""
    torch.manual_seed(0)
    layer = filled(LoRALinear, [[10, 10]], [[1.0, 1.0]], [[1.0]], alpha=1, dropout=0.5)
    assert {layer(torch.ones(2)).item() for _ in range(50)} == {20, 22, 24}
    layer.eval()
    assert {layer(torch.ones(2)).item() for _ in range(5)} == {22}


def saved_copies(layer, x):
    """Under bf16 autocast, how many tensors as large as x are kept for the backward pass, besides x."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    return sum(tensor.shape == x.shape and tensor.data_ptr() != x.data_ptr() for tensor in kept)


def test_under_autocast_no_copy_of_the_input_is_kept():
    """The mistake: x is cast to A's float32. Autocast casts it back, and that copy is kept for the backward pass."""
    layer, x = LoRALinear(nn.Linear(6, 5), 2, 4.0), torch.randn(3, 6, dtype=torch.bfloat16)
    assert saved_copies(layer, x) == 0

    class CastFirst(LoRALinear):
        def update(self, x):
            return super().update(x.float())

    assert saved_copies(CastFirst(nn.Linear(6, 5), 2, 4.0), x) == 1


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("r", [-1, 0, 3, 1.5])
def test_a_rank_that_does_not_fit(cls, r):
    with pytest.raises(UserError, match=rf"rank {r} does not fit this layer \(3 x 2\): it must be between 1 and 2"):
        cls(linear([[1, 2], [3, 4], [5, 6]]), r, 8)


# The whole model

@pytest.mark.parametrize("targets, expected", [(TARGETS, 958_464), (["q_proj", "v_proj"], 172_032)])
def test_the_counts_on_the_small_preset(targets, expected):
    """Width 768, 8 layers, q 768 -> 768, k and v 768 -> 384, o 768 -> 768, MLP 768 <-> 2432. Rank 8 costs 8 (in + out):

    q 12,288 + k 9,216 + v 9,216 + o 12,288 + gate, up, down 25,600 each = 119,808 a layer, 958,464 in all.
    """
    with torch.device("meta"):
        model = CausalLM(preset_config("small", 6400))
    assert sum(p.numel() for p in model.parameters()) == 63_912_192
    apply_lora(model, 8, 16, targets)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2"}, {"tie_word_embeddings": False}])
def test_at_the_start_the_logits_are_the_bases_to_the_last_bit(dora, changes):
    """Even where q, k and v have a bias (qwen2)."""
    model = small_model(**changes)
    base = model(TOKENS)
    apply_lora(model, 4, 8, dora=dora)
    assert torch.equal(model(TOKENS), base)
    assert far(trained(model)(TOKENS), base)


def test_only_what_is_named_is_adapted_square_or_not():
    """The mistake elsewhere: only square matrices are found. Here k_proj is 24 x 32 and down_proj is 32 x 40."""
    model = apply_lora(small_model(), 4, 8, ["k_proj", "down_proj"])
    layers = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert layers == ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj",
                      "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert model.model.layers[0].mlp.down_proj.lora_A.shape == (4, 40)


def test_all_linear_means_every_layer_but_the_head():
    """Of each of the two layers q, k, v, o, gate, up and down. Here the head has a matrix of its own."""
    model = apply_lora(small_model(tie_word_embeddings=False), 4, 8, "all-linear")
    layers = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert [name.split(".")[-1] for name in layers] == [*TARGETS, *TARGETS] and type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("dora", [False, True])
def test_the_whole_model_gets_the_options_of_a_layer(dora):
    """alpha = 8, r = 4: rsLoRA scales by 8 / sqrt(4) = 4, and LoRA by 2."""
    for rslora, scaling in ((True, 4.0), (False, 2.0)):
        model = apply_lora(small_model(), 4, 8, dropout=0.1, rslora=rslora, dora=dora)
        layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
        assert {(type(layer), layer.scaling, layer.dropout.p) for layer in layers} == {
            (DoRALinear if dora else LoRALinear, scaling, 0.1)}


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
def test_merged_equals_unmerged_and_comes_back_to_the_last_bit(options, tmp_path):
    model = trained(apply_lora(small_model(), 4, 8, **options))
    expected, names = model(TOKENS), set(model.state_dict())
    layers = merge_lora(model)
    close(model(TOKENS), expected)
    save_model(tmp_path, model, TOKENIZER)  # it is a plain model again, under the plain names
    close(load_model(tmp_path)(TOKENS), expected)
    unmerge_lora(model, layers)
    assert torch.equal(model(TOKENS), expected) and set(model.state_dict()) == names


def test_a_merged_layer_keeps_its_bias_and_is_frozen():
    """W x + b = [5, 11, 17] + [1, 0, -1], and the update adds [-2, 0, -4] as in the worked example."""
    layer = filled(LoRALinear, [[1, 2], [3, 4], [5, 6]], [[1.0, -1.0]], [[1.0], [0.0], [2.0]], 2, bias=[1, 0, -1])
    model, x = nn.Sequential(layer), torch.tensor([1.0, 2.0])
    close(model(x), [4, 11, 12])
    merge_lora(model)
    close(model(x), [4, 11, 12])
    assert trainable(model) == set() and (model[0].in_features, model[0].out_features) == (2, 3)


def test_merging_under_autocast_is_done_in_float32():
    """W = 1, 2 B A = 2 x 1.00390625 (1 + 1/256, which bf16 rounds to 1): the merged weight is 3.0078125, not 3."""
    layer = filled(LoRALinear, [[1]], [[1.00390625]], [[1.0]], alpha=2)
    with torch.autocast("cpu", torch.bfloat16):
        close(layer.merged_weight(), [[3.0078125]])


@pytest.mark.parametrize("make", [example, lambda: dora_example(bias=[1, 2, 3])])
def test_with_its_lora_off_a_model_is_its_own_reference(make):
    """To the last bit, within the block only, and also when an error ends it; however deep the layer lies."""
    model, x = nn.Sequential(nn.Sequential(make())), torch.tensor([1.0, 2.0])
    before = model(x)
    with pytest.raises(RuntimeError), lora_off(model):
        assert torch.equal(model(x), model[0][0].base(x)) and far(model(x), before)
        raise RuntimeError
    assert torch.equal(model(x), before)


def test_merging_twice():
    model = apply_lora(small_model(), 4, 8)
    merge_lora(model)
    with pytest.raises(UserError, match="nothing to merge: the model holds no LoRA"):
        merge_lora(model)


def test_the_mistake_of_merging_in_half_precision():
    """bf16 has 8 significant bits: 1 + 0.001 is 1, and the training is lost. In float32 it is kept."""
    assert torch.tensor(1.0, dtype=torch.bfloat16) + 0.001 == 1
    model = trained(apply_lora(small_model().bfloat16(), 4, 8), size=0.01)
    refusal = "half precision, where merging rounds the update away; load it in float32"
    with pytest.raises(UserError, match=refusal):
        merge_lora(model)
    model.float()
    last = model.model.layers[1].mlp.down_proj.base  # one layer in half precision is enough
    last.bfloat16()
    with pytest.raises(UserError, match=refusal):
        merge_lora(model)
    last.float()
    expected = model(TOKENS)
    merge_lora(model)
    close(model(TOKENS), expected)


def test_dora_begins_with_the_lengths_of_the_rows_as_they_will_be_held():
    """With --shard a model stays in its file at first, here in float32, and becomes bf16 later. 1.001 rounds to 1."""
    base = nn.Linear(1, 1, bias=False)
    base.weight.data.fill_(1.001)
    close(DoRALinear(base, 1, 1).lora_magnitude_vector, [1.001])
    base.weight.held_in = torch.bfloat16  # as load_model notes it
    assert DoRALinear(base, 1, 1).lora_magnitude_vector.tolist() == [1]


@pytest.mark.parametrize("dora", [False, True])
def test_the_base_may_be_bf16(dora):
    """The trained tensors stay float32. The logits are around 5, where 0.5 is 16 to 32 steps of bf16."""
    expected = trained(apply_lora(small_model(), 4, 8, dora=dora))(TOKENS)
    model = trained(apply_lora(small_model().bfloat16(), 4, 8, dora=dora))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    logits = model(TOKENS)
    assert (logits.float() - expected).abs().max() < 0.5
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(TOKENS).float() - expected).abs().max() < 0.5


@pytest.mark.parametrize("dora", [False, True])
def test_cached_packed_and_padded_rows_give_the_same_logits(dora):
    model = trained(apply_lora(small_model(), 4, 8, dora=dora))
    logits = model(TOKENS)
    packed = model(TOKENS.view(1, 14), doc_ids=torch.tensor([[0] * 7 + [1] * 7]))
    close(packed.view(2, 7, -1), logits)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1)
    close(model(padded, attention_mask=torch.arange(10).expand(2, 10) >= 3)[:, 3:], logits)
    reply = generate(model, [TOKENS[0].tolist()], 1, end_id=-1, temperature=0).responses()[0]
    assert reply == [logits[0, -1].argmax().item()]


# Mistakes

@pytest.mark.parametrize("targets, named", [(["query"], "query"), (["q_proj", "qproj", "w1"], "qproj, w1"),
                                            ([], r"\(none given\)"), ("nothing.*", r"nothing\.\*"),
                                            (["embed_tokens"], "embed_tokens"), (["_proj"], "_proj")])
def test_targets_that_match_nothing(targets, named):
    model = small_model()
    message = (f"target modules {named} match no linear layer of the model; "
               "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj$")
    with pytest.raises(UserError, match=message):
        apply_lora(model, 4, 8, targets)
    assert all(p.requires_grad for p in model.parameters()), "nothing was frozen by the failed call"


def test_a_rank_larger_than_a_matrix_names_it_and_leaves_the_model_alone():
    model = small_model()
    with pytest.raises(UserError, match=r"rank 25 does not fit model.layers.0.self_attn.k_proj \(24 x 32\)"):
        apply_lora(model, 25, 8)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_a_second_lora_and_one_on_the_head():
    model = small_model()
    with pytest.raises(UserError, match="lm_head cannot take a LoRA"):
        apply_lora(model, 4, 8, ["q_proj", "lm_head"])
    apply_lora(model, 4, 8)
    with pytest.raises(UserError, match="has a LoRA already"):
        apply_lora(model, 4, 8)


# Folders

@pytest.mark.parametrize("options", [{}, {"rslora": True, "dropout": 0.1}, {"dora": True},
                                     {"target_modules": ["q_proj", "up_proj"]},
                                     {"target_modules": ["model.layers.1.mlp.up_proj"]}])
def test_saved_and_loaded(tmp_path, options):
    """The model is in evaluation mode, and so is the loaded adapter: its dropout is off."""
    model = trained(apply_lora(small_model(), 4, 8.0, **options)).eval()
    save_adapter(model, tmp_path)
    other = load_adapter(small_model().eval(), tmp_path)
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert trainable(other) == trainable(model)


def test_what_a_folder_holds(tmp_path):
    save_adapter(apply_lora(small_model(), 4, 8.0, ["q_proj"], dora=True), tmp_path, base="out/sft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "out/sft", "r": 4,
                "lora_alpha": 8.0, "use_dora": True, "use_rslora": False, "target_modules": ["q_proj"], "bias": "none",
                "rank_pattern": {}, "alpha_pattern": {}}
    assert {key: config[key] for key in expected} == expected
    start = "base_model.model.model.layers.0.self_attn.q_proj."
    stored = load_safetensors(tmp_path / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert {n.removeprefix(start): s for n, s in shapes.items() if n.startswith(start)} == {
        "lora_A.weight": (4, 32), "lora_B.weight": (48, 4), "lora_magnitude_vector": (48,)}
    assert len(shapes) == 6


@pytest.fixture
def folder(tmp_path):
    save_adapter(trained(apply_lora(small_model(), 4, 8.0)), tmp_path)
    return tmp_path


def change(folder, **changes):
    """Write other values into the folder's adapter_config.json."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def refused(model, folder, message):
    """The error is one line, and the model is as before."""
    before, names = model(TOKENS), trainable(model)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value)
    assert torch.equal(model(TOKENS), before) and trainable(model) == names


def test_an_adapter_for_a_wider_base_names_tensors_and_shapes(folder):
    refused(small_model(hidden_size=16), folder, "does not fit this base model: "
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (4, 32) instead of (4, 16), ")


def test_an_adapter_for_a_deeper_base_names_what_is_too_many(folder):
    refused(small_model(num_hidden_layers=1), folder,
            "missing none; unexpected base_model.model.model.layers.1.mlp.down_proj.lora_A.weight, ")


def test_an_adapter_for_a_shallower_base_names_what_is_missing(folder):
    """The mistake elsewhere: strict=False loads nothing, or half, and says nothing."""
    refused(small_model(num_hidden_layers=3), folder,
            "missing base_model.model.model.layers.2.mlp.down_proj.lora_A.weight, ")


def test_a_file_that_lost_a_tensor(folder):
    tensors = {n: t.clone() for n, t in load_safetensors(folder / "adapter_model.safetensors").items()}
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    refused(small_model(), folder, "missing base_model.model.model.layers.1.mlp.up_proj.lora_B.weight; unexpected none")


def test_a_failed_load_keeps_the_adapter_that_was_on(folder):
    """It is still there, and still trainable."""
    model = trained(apply_lora(small_model(), 2, 8.0, ["q_proj"]))
    change(folder, r=5)
    refused(model, folder, "q_proj.lora_A.weight (4, 32) instead of (5, 32)")
    assert model.model.layers[0].self_attn.q_proj.lora_A.shape == (2, 32)
    assert {name.split(".")[-1] for name in trainable(model)} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_adapter_that_holds_nan_or_infinity(folder, number):
    tensors = {n: t.clone() for n, t in load_safetensors(folder / "adapter_model.safetensors").items()}
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 2] = number
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    refused(small_model(), folder, "layers.1.mlp.up_proj.lora_B.weight holds NaN or infinite numbers")


@pytest.mark.parametrize("changes, message", [
    ({"peft_type": "IA3"}, 'peft_type = "IA3" is not supported; it must be one of LORA, BOTTLENECK, PREFIX_TUNING, '),
    ({"bias": "all"}, 'bias = "all" is not supported; it must be none'),
    ({"target_modules": ["query"]}, "target modules query match no linear layer"),
    ({"target_modules": []}, "target modules (none given) match no linear layer"),
    ({"target_modules": "model\\.decoder.*"}, "target modules model\\.decoder.* match no linear layer"),
    ({"use_dora": True}, "missing base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"),
    ({"r": 5}, "q_proj.lora_A.weight (4, 32) instead of (5, 32)"),
    ({"r": 2000000000}, "rank 2000000000 does not fit model.layers.0.self_attn.q_proj (48 x 32)"),
    ({"rank_pattern": {"k_proj": 3}}, "layers.0.self_attn.k_proj.lora_A.weight (4, 32) instead of (3, 32)"),
    ({"rank_pattern": {"k_proj": 2.5}}, "rank 2.5 does not fit model.layers.0.self_attn.k_proj (24 x 32)"),
    ({"layers_to_transform": [1]}, "unexpected base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
    ({"layers_to_transform": 2}, "exclude_modules and layers_to_transform leave nothing to adapt"),
    ({"exclude_modules": ["k_proj"]}, "unexpected base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"),
])
def test_a_config_that_asks_for_something_else(folder, changes, message):
    change(folder, **changes)
    refused(small_model(), folder, message)


@pytest.mark.parametrize("key, value", [
    ("peft_type", None), ("peft_type", ["LORA"]), ("peft_type", {}), ("r", "8"), ("r", 4.0), ("r", True), ("r", 0),
    ("r", 10**30), ("lora_alpha", "8"), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
    ("lora_alpha", 10**400), ("lora_dropout", 2), ("lora_dropout", [0]), ("use_rslora", "yes"),
    ("use_dora", {}), ("use_dora", 2),
    ("target_modules", 7), ("target_modules", [7]), ("target_modules", {"q_proj": 1}),
    ("exclude_modules", [["k_proj"]]), ("exclude_modules", 1.5), ("layers_to_transform", "1"),
    ("layers_to_transform", [0, None]), ("layers_pattern", "h"),
    ("layers_pattern", 3), ("rank_pattern", [4]), ("rank_pattern", {"q_proj": "4"}), ("rank_pattern", {"q_proj": None}),
    ("rank_pattern", {".*_proj": 4}), ("alpha_pattern", {"q_proj": []}), ("alpha_pattern", 1), ("bias", ["none"]),
    ("init_lora_weights", ["pissa"]), ("init_lora_weights", 3),
])
def test_a_value_that_a_setting_cannot_have(folder, key, value):
    """It is named in one line, never a traceback."""
    change(folder, **{key: value})
    refused(small_model(), folder, f"adapter_config.json: {key} = {json.dumps(value)[:80]}")


# PEFT's settings that change what is computed, each as a PEFT adapter has it.
REFUSED = [
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"), ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
    ("bias", "lora_only"), ("lora_bias", True), ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [3]),
    ("layer_replication", [[0, 2], [1, 2]]), ("target_parameters", ["mlp.experts.up"]), ("megatron_config", {"a": 1}),
    ("alora_invocation_tokens", [7]), ("use_qalora", True), ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 3}), ("kasa_config", {"beta": 1e-4}), ("monteclora_config", {"num_samples": 8}),
    ("velora_config", {"scale": 1.0}),
    ("enable_lora", [True, False, True]), ("a_setting_of_a_later_version", 1),
]


@pytest.mark.parametrize("key, value", REFUSED)
def test_a_setting_that_changes_what_is_computed_is_refused_by_name(folder, key, value):
    """A PiSSA adapter was trained beside W minus the largest singular vectors of W: beside W itself it is noise."""
    change(folder, **{key: value})
    refused(small_model(), folder, f"adapter_config.json: {key} = {json.dumps(value)} is not supported; it must be ")


def test_settings_that_change_nothing_are_ignored(folder):
    """Records, how training started, what only matters beside a refused setting, and whatever is empty."""
    expected = load_adapter(small_model(), folder)(TOKENS)
    change(folder, peft_version="0.21.2", auto_mapping={"unsloth_fixed": True}, revision="main", inference_mode=False,
           task_type=None, runtime_config={"ephemeral_gpu_offload": False}, megatron_core="megatron.core",
           fan_in_fan_out=True, merge_weights=True, qalora_group_size=16, ensure_weight_tying=True,
           loftq_config={"loftq_bits": 4}, eva_config={"rho": 2.0}, corda_config={"corda_method": "ipm"},
           lora_ga_config={"direction": "ArB2r"}, use_dora=None, lora_bias=False, modules_to_save=None, use_bdlora=None,
           layer_replication=[], a_setting_of_a_later_version=None)
    for init in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        change(folder, init_lora_weights=init)
        assert torch.equal(load_adapter(small_model(), folder)(TOKENS), expected)


def test_what_peft_assumes_where_a_setting_is_absent(tmp_path):
    """r = 8, lora_alpha = 8, no dropout, q_proj and v_proj: so the scaling is 1."""
    save_adapter(trained(apply_lora(small_model(), 8, 8, ["q_proj", "v_proj"])), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    model = load_adapter(small_model(), tmp_path)
    layer = model.model.layers[1].self_attn.v_proj
    assert (layer.r, layer.scaling, layer.dropout.p) == (8, 1.0, 0.0)


def test_ranks_and_alphas_by_name(tmp_path):
    """The first key that is the end of a module's name counts; after ^, it must be the whole name. The scalings:

    layer 0: q_proj 6 / 2 = 3, v_proj 8 / 4 = 2    layer 1: q_proj 6 / 3 = 2, v_proj 1 / 4 = 0.25
    """
    model = apply_lora(small_model(), 4, 8.0, ["q_proj", "v_proj"])
    for name, r in (("model.layers.0.self_attn.q_proj", 2), ("model.layers.1.self_attn.q_proj", 3)):
        model.set_submodule(name, LoRALinear(model.get_submodule(name).base, r, 8.0))
    save_adapter(trained(model), tmp_path / "plain")
    stored = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert stored["r"] == 2 and stored["rank_pattern"] == {
        "model.layers.0.self_attn.v_proj": 4, "model.layers.1.self_attn.q_proj": 3,
        "model.layers.1.self_attn.v_proj": 4}
    assert torch.equal(load_adapter(small_model(), tmp_path / "plain")(TOKENS), model(TOKENS))

    change(tmp_path / "plain", r=4, rank_pattern={"1.self_attn.q_proj": 3, "q_proj": 2, "proj": 9},
           alpha_pattern={"^self_attn.v_proj": 5, "^model.layers.1.self_attn.v_proj": 1, "q_proj": 6})
    model = load_adapter(small_model(), tmp_path / "plain")
    scalings = [layer.scaling for layer in model.modules() if isinstance(layer, LoRALinear)]
    assert scalings == [3.0, 2.0, 2.0, 0.25]
    save_adapter(model, tmp_path / "again")
    assert torch.equal(load_adapter(small_model(), tmp_path / "again")(TOKENS), model(TOKENS))


UP_1, Q_1 = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("modules, changes", [
    ([UP_1], {"target_modules": ["up_proj"], "layers_to_transform": 1}),
    ([UP_1], {"target_modules": ["mlp.up_proj"], "layers_to_transform": [1, 7], "layers_pattern": "layers"}),
    ([UP_1], {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"],
              "exclude_modules": ["down_proj"]}),
    ([UP_1, Q_1], {"target_modules": ["up_proj", "q_proj"], "exclude_modules": r".*\.0\..*"}),
    ([UP_1, Q_1], {"target_modules": r".*\.1\..*(up|q)_proj"}),
    ([UP_1, Q_1], {"target_modules": r"^model\.layers\.1\.(?:mlp|self_attn)\.(?:up_proj|q_proj)$"}),
    ([UP_1, Q_1], {"target_modules": r"(.*1.mlp.up_proj)|(model.layers.1.*q_proj)"}),
])
def test_which_layers_are_adapted(tmp_path, modules, changes):
    """Written in several ways; the tensors in the folder are those of the modules named."""
    model = trained(apply_lora(small_model(), 4, 8.0, modules))
    save_adapter(model, tmp_path)
    change(tmp_path, **changes)
    assert torch.equal(load_adapter(small_model(), tmp_path)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(.*)*_proj", r".*.*.*_proj", r"(a|a)(a|a)(a|a)x", "(q_proj",
                                     r"q_proj{2}", r"[a-z]*_proj", r"(?!lm_head).*", "|".join(["q_proj"] * 42)])
def test_a_pattern_that_could_be_matched_for_ever_is_refused_by_name(folder, pattern):
    """The first needs 2^n steps for a name of n letters a."""
    change(folder, target_modules=pattern)
    refused(small_model(), folder, f"target_modules = {json.dumps(pattern)[:80]}")


def test_has_adapter_and_a_model_without_one():
    """save_adapter needs exactly one kind of adapter; a merged LoRA is none."""
    model = small_model()
    with pytest.raises(ValueError, match="must hold one kind of adapter"):
        save_adapter(model, "nowhere")
    assert not has_adapter(model)
    apply_lora(model, 4, 8)
    assert has_adapter(model)
    merge_lora(model)
    assert not has_adapter(model)


def test_no_adapter_there(tmp_path):
    refused(small_model(), tmp_path, f"{tmp_path} holds no adapter: adapter_config.json is missing")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    refused(small_model(), tmp_path, f"cannot read {tmp_path}/adapter_model.safetensors")


def test_several_adapters_on_one_base(tmp_path):
    """The second replaces the first. Once it is off, the base is as it was to the last bit."""
    model = small_model()
    base, weights = model(TOKENS), {n: t.clone() for n, t in model.state_dict().items()}
    expected = {}
    for name, options in {"lora": {}, "dora": {"dora": True}}.items():
        other = trained(apply_lora(small_model(), 4, 8, **options))
        save_adapter(other, tmp_path / name)
        expected[name] = other(TOKENS)
    for name in ("lora", "dora", "lora"):
        assert torch.equal(load_adapter(model, tmp_path / name)(TOKENS), expected[name]) and far(expected[name], base)
    remove_adapter(model)
    after = model.state_dict()
    assert torch.equal(model(TOKENS), base) and list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)


# The PEFT package

PEFT_OPTIONS = [
    {}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": r".*\.1\..*(up|k)_proj"}, {"target_modules": "all-linear"}, {"target_modules": None},
    {"rank_pattern": {"q_proj": 2, "^model.layers.0.mlp.up_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 3.5}},
    {"rank_pattern": {"^model.layers.1.self_attn.k_proj": 1, "k_proj": 2}, "use_rslora": True},
    {"layers_to_transform": 1}, {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}, {"exclude_modules": r".*\.(gate|up)_proj"},
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "mica"},
    {"init_lora_weights": "eva"}, {"fan_in_fan_out": True}]


@pytest.fixture
def theirs(tmp_path):
    """make(config) -> PEFT's model on our base folder, trained; make(folder) -> PEFT's model with that adapter."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

    def make(what, **changes):
        save_model(tmp_path / "base", small_model(**changes), TOKENIZER)
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if isinstance(what, peft.PeftConfig):
            torch.manual_seed(2)
            return trained(peft.get_peft_model(base, what)).eval()
        return peft.PeftModel.from_pretrained(base, what).eval()
    return make


def lora_config(**options):
    peft = pytest.importorskip("peft")
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), **options}
    return peft.LoraConfig(**settings)


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2", "head_dim": 8}])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True},
                                     {"target_modules": ["model.layers.1.mlp.up_proj"]}])
def test_our_folder_opens_in_peft_with_the_same_logits(tmp_path, theirs, options, changes):
    model = trained(apply_lora(small_model(**changes), 4, 8.0, **options))
    save_adapter(model, tmp_path / "adapter")
    other = theirs(tmp_path / "adapter", **changes)
    with torch.no_grad():
        close(other(TOKENS).logits, model(TOKENS))
        close(other.merge_and_unload()(TOKENS).logits, model(TOKENS))


@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_an_adapter_of_peft_loads_here_with_the_same_logits(tmp_path, theirs, options):
    """And saved again, it opens in PEFT with these logits."""
    other = theirs(lora_config(**options))
    other.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter").eval()
    save_adapter(model, tmp_path / "again")
    with torch.no_grad():
        expected = other(TOKENS).logits
        close(model(TOKENS), expected)
        close(theirs(tmp_path / "again")(TOKENS).logits, expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_peft_beside_a_changed_base_is_refused_until_peft_converts_it(tmp_path, theirs, init):
    """PEFT trains it beside W - s B A of the start. Converted, it is a plain LoRA of twice the rank beside W."""
    config = lora_config(init_lora_weights=init)
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path / "base", small_model(), TOKENIZER)
    other = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    other.save_pretrained(tmp_path / "start")
    trained(other).eval()
    other.save_pretrained(tmp_path / "adapter")
    refused(load_model(tmp_path / "base"), tmp_path / "adapter", f'init_lora_weights = "{init}" is not supported')
    with torch.no_grad():
        expected = other(TOKENS).logits
    start = tmp_path / "start"
    (start / "adapter_config.json").write_text((start / "adapter_config.json").read_text().replace(f'"{init}"', "true"))
    other.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=start)
    close(load_adapter(load_model(tmp_path / "base"), tmp_path / "converted")(TOKENS), expected)


def test_peft_writes_no_other_setting_that_is_in_use_by_default():
    """A setting that is neither computed nor ignored is refused unless it is empty, so it must be empty by default."""
    peft = pytest.importorskip("peft")
    for kind, config in (("LORA", peft.LoraConfig), ("PREFIX_TUNING", peft.PrefixTuningConfig),
                         ("PROMPT_TUNING", peft.PromptTuningConfig)):
        written, known = dataclasses.asdict(config()), {*COMPUTED[kind], *IGNORED}
        assert [key for key in written if written[key] and key not in known] == []


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_one_step_of_training_gives_the_gradients_of_peft(tmp_path, theirs, options):
    """The same loss on the same adapter: every gradient agrees. DoRA's norm is held constant there too."""
    other = theirs(lora_config(**options))
    other.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    for logits in (ours(TOKENS), other(TOKENS).logits):
        logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).mean().backward()
    gradients = {name.replace(".default", "").removesuffix(".weight").removeprefix("base_model.model."): parameter.grad
                 for name, parameter in other.named_parameters() if parameter.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, gradients.pop(name))
    assert not gradients


def test_all_linear_as_a_list_is_what_the_command_line_gives():
    """And "all-linear" beside a name is not a layer, as before."""
    found = find_targets(small_model(), "all-linear")
    assert list(find_targets(small_model(), ["all-linear"])) == list(found) and len(found) == 14
    with pytest.raises(UserError, match="target modules all-linear match no linear layer"):
        find_targets(small_model(), ["all-linear", "q_proj"])


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_the_worked_example: `torch.tensor([1.0, 2.0]` -> `torch.tensor([2.0, 2.0]`. What is left of the update, and
#    what is the gradient of B?
# 2. test_rslora_divides_by_the_root_of_the_rank: `A, B, alpha=2)(x)` -> `A, B, alpha=4)(x)`. What is the result?
