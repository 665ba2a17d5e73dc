"""Chapter 12. LoRA: the change of a frozen matrix W is the product of two thin ones, scaled by alpha / r.

Worked example (W is 3 x 2: rank 1 is enough to see every index, and a transposed matrix would not fit):

    W = [[1, 2], [3, 4], [5, 6]]    A = [[1, -1]]    B = [[1], [0], [2]]    alpha = 2, r = 1: scaling 2    x = [1, 2]
    W x = [5, 11, 17]    A x = -1    2 B A x = [-2, 0, -4]    y = [3, 11, 13]
    merged W + 2 B A = [[3, 0], [3, 4], [9, 2]], and times x again [3, 11, 13]

Backwards, with the loss y1 + y2 + y3:

    dL/dB = 2 (A x) for each row = -2    dL/dA = 2 (B1 + B2 + B3) x = 6 x = [6, 12]    dL/dx = W'1 + 2 A'(3) = [9, 12] + [6, -6]
"""

import json
import re

import pytest
import torch
from torch import nn

from minillm.checkpoint import load_model, load_safetensors, save_model, save_safetensors
from minillm.errors import UserError
from minillm.generate import generate
from minillm.lora import TARGETS, DoRALinear, LoRALinear, apply_lora, load_lora, merge_lora, save_lora, unmerge_lora
from minillm.model import CausalLM, ModelConfig, preset_config
from minillm.peft import load_adapter, remove_adapter
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
    """Weights four times the usual size, so that the logits tell something."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
                 intermediate_size=40, max_position_embeddings=64)
    model = CausalLM(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def trained(model, size=0.1):
    """As after training: every trainable number has moved."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model


def far(a, b):
    return (a - b).abs().max() > 0.1


# --------------------------------------------------------------------------------------------- the layer

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
    """Some leave the scaling out: with alpha = 2 the update would be half as large, y = [4, 11, 15]."""
    layer = example()
    with pytest.raises(AssertionError):
        close(layer.base(torch.tensor([1.0, 2.0])) + layer.update(torch.tensor([1.0, 2.0])) / 2, [3, 11, 13])


def test_rslora_divides_by_the_root_of_the_rank():
    """A x = [-1, 2], B A x = [-1, 2, 1]. alpha = 2, r = 2: LoRA scales by 1, rsLoRA by 2 / sqrt(2) = 1.41421356."""
    W, A, B = [[1, 2], [3, 4], [5, 6]], [[1.0, -1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    x = torch.tensor([1.0, 2.0])
    close(filled(LoRALinear, W, A, B, alpha=2)(x), [4, 13, 18])
    close(filled(LoRALinear, W, A, B, alpha=2, rslora=True)(x), [3.58578644, 13.82842712, 18.41421356])


def dora_example():
    """W = [[3, 4], [0, 5], [5, 12]], so m = [5, 5, 13]; 2 B A = [[2, 8], [0, 0], [-2, -8]]; V = [[5, 12], [0, 5], [3, 4]]."""
    return filled(DoRALinear, [[3, 4], [0, 5], [5, 12]], [[1.0, 4.0]], [[1.0], [0.0], [-1.0]], alpha=2)


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
    """A change of B along V changes its length alone, which the norm takes out again: B's gradient is another one.

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
    layer = filled(DoRALinear, [[3, 4], [0, 5], [5, 12]], [[1.0, 4.0]], [[1.0], [0.0], [-1.0]], alpha=2, bias=[100, 200, 300])
    close(layer(torch.tensor([1.0, 2.0])), [111.15384615, 210, 328.6])


def test_a_starts_gaussian_with_std_one_over_r_and_b_at_zero():
    """4 x 10,000 numbers: the standard deviation is known to 0.4 %, so 2 % is five times that; 1/4 = 0.25."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(10_000, 20), 4, 8.0)
    assert layer.lora_A.shape == (4, 10_000) and layer.lora_B.shape == (20, 4)
    assert 0.245 < layer.lora_A.std() < 0.255 and layer.lora_A.mean().abs() < 0.006
    assert 2.8 < (layer.lora_A / layer.lora_A.std()).pow(4).mean() < 3.2  # of a uniform distribution it is 1.8
    assert not layer.lora_B.any()


def test_dropout_falls_on_the_update_alone_and_only_in_training():
    """x = [1, 1], W = 10: kept entries of x are doubled at p = 1/2, so y is 10 + 10 + (0, 2 or 4)."""
    torch.manual_seed(0)
    layer = filled(LoRALinear, [[10, 10]], [[1.0, 1.0]], [[1.0]], alpha=1, dropout=0.5)
    assert {layer(torch.ones(2)).item() for _ in range(50)} == {20, 22, 24}
    layer.eval()
    assert {layer(torch.ones(2)).item() for _ in range(5)} == {22}


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("r", [-1, 0, 3])
def test_a_rank_that_does_not_fit(cls, r):
    with pytest.raises(UserError, match=rf"rank {r} does not fit this layer \(3 x 2\): it must be between 1 and 2"):
        cls(linear([[1, 2], [3, 4], [5, 6]]), r, 8)


# --------------------------------------------------------------------------------------------- the whole model

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
    """Also where q, k and v have a bias (qwen2)."""
    model = small_model(**changes)
    base = model(TOKENS)
    apply_lora(model, 4, 8, dora=dora)
    assert torch.equal(model(TOKENS), base)
    assert far(trained(model)(TOKENS), base)


def test_only_what_is_named_is_adapted_square_or_not():
    """The mistake elsewhere: to look for square matrices. Here k_proj is 24 x 32 and down_proj 32 x 40."""
    model = apply_lora(small_model(), 4, 8, ["k_proj", "down_proj"])
    layers = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert layers == ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj",
                      "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert model.model.layers[0].mlp.down_proj.lora_A.shape == (4, 40)


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


def test_merging_twice():
    model = apply_lora(small_model(), 4, 8)
    merge_lora(model)
    with pytest.raises(UserError, match="nothing to merge: the model holds no LoRA"):
        merge_lora(model)


def test_the_mistake_of_merging_in_half_precision():
    """bf16 has 8 significant bits: 1 + 0.001 is 1 again, and the training is gone. In float32 it stays."""
    assert torch.tensor(1.0, dtype=torch.bfloat16) + 0.001 == 1
    model = trained(apply_lora(small_model().bfloat16(), 4, 8), size=0.01)
    with pytest.raises(UserError, match="half precision, where merging rounds the update away; load it in float32"):
        merge_lora(model)
    model.float()
    expected = model(TOKENS)
    merge_lora(model)
    close(model(TOKENS), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_the_base_may_be_bf16(dora):
    """What is trained stays float32; 32 units in the last place of bf16 logits (some 5) are 0.5."""
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


# --------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("targets, named", [(["query"], "query"), (["q_proj", "qproj", "w1"], "qproj, w1"), ([], r"\(none given\)"),
                                            ("nothing.*", r"nothing\.\*"), (["embed_tokens"], "embed_tokens"), (["_proj"], "_proj")])
def test_targets_that_match_nothing(targets, named):
    model = small_model()
    with pytest.raises(UserError, match=f"target modules {named} match no linear layer of the model; it has q_proj, k_proj, "):
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


# --------------------------------------------------------------------------------------------- folders

@pytest.mark.parametrize("options", [{}, {"rslora": True, "dropout": 0.1}, {"dora": True}, {"target_modules": ["q_proj", "up_proj"]},
                                     {"target_modules": ["model.layers.1.mlp.up_proj"]}])
def test_saved_and_loaded(tmp_path, options):
    model = trained(apply_lora(small_model(), 4, 8.0, **options)).eval()
    save_lora(model, tmp_path)
    other = load_lora(small_model(), tmp_path).eval()
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}


def test_what_a_folder_holds(tmp_path):
    save_lora(apply_lora(small_model(), 4, 8.0, ["q_proj"], dora=True), tmp_path, base="out/sft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "out/sft", "r": 4, "lora_alpha": 8.0,
                "use_dora": True, "use_rslora": False, "target_modules": ["q_proj"], "bias": "none"}
    assert {key: config[key] for key in expected} == expected
    start = "base_model.model.model.layers.0.self_attn.q_proj."
    shapes = {name: tuple(tensor.shape) for name, tensor in load_safetensors(tmp_path / "adapter_model.safetensors").items()}
    assert {n.removeprefix(start): s for n, s in shapes.items() if n.startswith(start)} == {
        "lora_A.weight": (4, 32), "lora_B.weight": (48, 4), "lora_magnitude_vector": (48,)}
    assert len(shapes) == 6


@pytest.fixture
def folder(tmp_path):
    save_lora(trained(apply_lora(small_model(), 4, 8.0)), tmp_path)
    return tmp_path


def refused(model, folder, message):
    """The error is one line, and the model is as before."""
    before = model(TOKENS)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_lora(model, folder)
    assert "\n" not in str(error.value)
    assert torch.equal(model(TOKENS), before) and not any(isinstance(m, LoRALinear) for m in model.modules())


def test_an_adapter_for_a_wider_base_names_tensors_and_shapes(folder):
    refused(small_model(hidden_size=16), folder, "does not fit this base model: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight "
            "(4, 32) instead of (4, 16), ")


def test_an_adapter_for_a_deeper_base_names_what_is_too_many(folder):
    refused(small_model(num_hidden_layers=1), folder, "missing none; unexpected base_model.model.model.layers.1.mlp.down_proj.lora_A.weight, ")


def test_an_adapter_for_a_shallower_base_names_what_lacks(folder):
    """The mistake elsewhere: strict=False, where nothing (or half) is loaded and nothing is said."""
    refused(small_model(num_hidden_layers=3), folder, "missing base_model.model.model.layers.2.mlp.down_proj.lora_A.weight, ")


def test_a_file_that_lost_a_tensor(folder):
    tensors = {n: t.clone() for n, t in load_safetensors(folder / "adapter_model.safetensors").items()}
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    refused(small_model(), folder, "missing base_model.model.model.layers.1.mlp.up_proj.lora_B.weight; unexpected none")


@pytest.mark.parametrize("changes, message", [
    ({"peft_type": "IA3"}, "peft_type = IA3 is not supported here; only LORA"),
    ({"bias": "all"}, "bias = all is not supported"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2} is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not supported"),
    ({"r": "8"}, "r = 8, lora_alpha = 8.0 and lora_dropout = 0.0 must be numbers"),
    ({"target_modules": ["query"]}, "target modules query match no linear layer"),
    ({"use_dora": True}, "missing base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"),
    ({"r": 5}, "q_proj.lora_A.weight (4, 32) instead of (5, 32)"),
])
def test_a_config_that_asks_for_something_else(folder, changes, message):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    refused(small_model(), folder, message)


def test_no_adapter_there(tmp_path):
    refused(small_model(), tmp_path, f"{tmp_path} holds no adapter: adapter_config.json is missing")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    refused(small_model(), tmp_path, f"cannot read {tmp_path}/adapter_model.safetensors")


def test_several_adapters_on_one_base(tmp_path):
    """The second takes the place of the first; taken off, the base is as it was to the last bit."""
    model = small_model()
    base, weights = model(TOKENS), {n: t.clone() for n, t in model.state_dict().items()}
    expected = {}
    for name, options in {"lora": {}, "dora": {"dora": True}}.items():
        other = trained(apply_lora(small_model(), 4, 8, **options))
        save_lora(other, tmp_path / name)
        expected[name] = other(TOKENS)
    for name in ("lora", "dora", "lora"):
        assert torch.equal(load_adapter(model, tmp_path / name)(TOKENS), expected[name]) and far(expected[name], base)
    remove_adapter(model)
    assert torch.equal(model(TOKENS), base)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()) and len(weights) == len(model.state_dict())


# --------------------------------------------------------------------------------------------- the PEFT package

PEFT_OPTIONS = [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": r".*\.1\..*(up|k)_proj"},
                {"target_modules": "all-linear"}]


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2", "head_dim": 8}])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"target_modules": ["model.layers.1.mlp.up_proj"]}])
def test_our_folder_opens_in_peft_with_the_same_logits(tmp_path, options, changes):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = small_model(**changes)
    save_model(tmp_path / "base", model, TOKENIZER)
    save_lora(trained(apply_lora(model, 4, 8.0, **options)), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        close(theirs(TOKENS).logits, model(TOKENS))
        close(theirs.merge_and_unload()(TOKENS).logits, model(TOKENS))


@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_an_adapter_of_peft_loads_here_with_the_same_logits(tmp_path, options):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    save_model(tmp_path / "base", small_model(), TOKENIZER)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **{"target_modules": list(TARGETS), **options})
    theirs = trained(peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        close(ours(TOKENS), theirs(TOKENS).logits)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_one_step_of_training_gives_the_gradients_of_peft(tmp_path, options):
    """The same loss on the same adapter: every gradient agrees, DoRA's with its norm held constant too."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    save_model(tmp_path / "base", small_model(), TOKENIZER)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=list(TARGETS), **options)
    theirs = trained(peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_lora(load_model(tmp_path / "base"), tmp_path / "adapter")
    for logits in (ours(TOKENS), theirs(TOKENS).logits):
        logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).mean().backward()
    gradients = {n.replace(".default", "").removesuffix(".weight").removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, gradients.pop(name))
    assert not gradients
