"""Chapter 13. Adapters, prefix tuning and prompt tuning: small modules between the layers, and learned tokens before them.

An adapter squeezes a hidden vector h through a few numbers and adds what comes out. With one number, h = [1, -2],
W_down = [1, 0], b_down = 0, W_up = [2, 1], b_up = [1/2, 0]:

    W_down h = 1    gelu(1) = 0.84134475    h + [2, 1] 0.84134475 + [1/2, 0] = [3.18268950, -1.15865525]

Prefix tuning adds a key and a value that every token sees before its own document. With head size 1, a prefix of key ln 3
and value 2, and two documents of one token each, with query 1, key 0 and the values 6 and 10: the prefix weighs
e^(ln 3) / (e^(ln 3) + e^0) = 3/4, so the results are 3/4 2 + 1/4 6 = 3 and 3/4 2 + 1/4 10 = 4.
"""

import json
import re

import pytest
import torch
from torch import nn

from minillm.adapter import AdapterLinear, apply_bottleneck, load_bottleneck, save_bottleneck
from minillm.checkpoint import load_model, load_safetensors, save_model
from minillm.errors import UserError
from minillm.generate import generate, stream
from minillm.losses import sft_loss
from minillm.model import CausalLM, KVCache, attend, attention_mask_2d, preset_config
from minillm.peft import load_adapter, remove_adapter
from minillm.prefix import Prefixed, apply_prefix, apply_prompt, load_prefix, save_prefix
from tests.helpers import close
from tests.test_12_lora import TOKENIZER, TOKENS, far, linear, small_model, trained

WORDS = [40, 41, 42, 43, 44]
METHODS = {
    "adapter": lambda model: apply_bottleneck(model, 6),
    "pfeiffer": lambda model: apply_bottleneck(model, 6, "pfeiffer"),
    "prefix": lambda model: apply_prefix(model, 5, WORDS),
    "prefix with mlp": lambda model: apply_prefix(model, 5, hidden=7),
    "prompt": lambda model: apply_prompt(model, 5, WORDS),
}
PREFIXES = ["prefix", "prefix with mlp", "prompt"]
every_method = pytest.mark.parametrize("method", METHODS)
every_prefix = pytest.mark.parametrize("method", PREFIXES)


def adapted(method, **changes):
    torch.manual_seed(2)
    return trained(METHODS[method](small_model(**changes)))


def save(model, folder):
    (save_prefix if model.model.prefix is not None else save_bottleneck)(model, folder)


# --------------------------------------------------------------------------------------------- adapters

def test_the_worked_example_of_an_adapter():
    layer = AdapterLinear(linear([[1, 0], [0, 1]]), 1)
    layer.down.weight.data, layer.up.weight.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [1.0]])
    layer.up.bias.data = torch.tensor([0.5, 0.0])
    close(layer(torch.tensor([1.0, -2.0])), [3.18268950, -1.15865525])


@pytest.mark.parametrize("placement, expected", [("houlsby", 405_760), ("pfeiffer", 202_880)])
def test_the_counts_of_adapters(placement, expected):
    """2 m D + D + m = 25,360 for D = 768 and m = 16; the small preset has 8 layers, with two adapters each or one."""
    with torch.device("meta"):
        model = apply_bottleneck(CausalLM(preset_config("small", 6400)), 16, placement)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_where_the_adapters_sit():
    """Houlsby: on the outputs of attention and MLP, before the residual addition. Pfeiffer: of the MLP alone."""
    names = lambda method: [n for n, m in METHODS[method](small_model()).named_modules() if isinstance(m, AdapterLinear)]
    assert names("adapter") == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj",
                                "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    assert names("pfeiffer") == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("method", ["adapter", "pfeiffer"])
def test_adapters_start_as_the_identity_and_can_leave_it(method):
    """Both matrices at zero would be the identity for ever: no gradient would reach either."""
    model = small_model()
    base = model(TOKENS)
    METHODS[method](model)
    assert (model(TOKENS) - base).abs().max() < 1e-6
    model(TOKENS).logsumexp(-1).sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if n.endswith("up.weight"))
    assert far(trained(model)(TOKENS), base)


# --------------------------------------------------------------------------------------------- prefix and prompt

def test_the_worked_example_of_a_prefix():
    prefix = Prefixed([(torch.full((1, 1, 1, 1), 1.09861229), torch.full((1, 1, 1, 1), 2.0))], cache=None)
    keys, values = prefix.append(0, torch.zeros(1, 1, 2, 1), torch.tensor([6.0, 10.0]).view(1, 1, 2, 1))
    mask = attention_mask_2d(None, torch.tensor([[0, 1]]), T=2, past=0, device="cpu", prefix=1)
    assert mask.tolist() == [[[[True, True, False], [True, False, True]]]]
    close(attend(torch.ones(1, 1, 2, 1), keys, values, mask).flatten(), [3, 4])


def test_the_counts_of_prefixes():
    """P = 5: prompt 5 x 32; prefix 5 x 2 layers x 2 x 2 heads x 12; with the MLP 5 x 24 + (24 + 1) 7 + (7 + 1) 96."""
    count = lambda method: sum(p.numel() for p in METHODS[method](small_model()).parameters() if p.requires_grad)
    assert {method: count(method) for method in PREFIXES} == {"prompt": 160, "prefix": 480, "prefix with mlp": 1063}


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("changes", [{}, {"model_type": "llama"}])
def test_at_the_start_the_logits_are_those_of_the_base_after_the_words(method, changes):
    """Also in a packed row, before each document, where the base needs the words once for each."""
    model = small_model(**changes)
    expected = model(torch.cat([torch.tensor([WORDS, WORDS]), TOKENS], dim=1))[:, 5:]
    METHODS[method](model)
    close(model(TOKENS), expected)
    packed = model(TOKENS.view(1, 14), doc_ids=torch.tensor([[3] * 7 + [4] * 7]))
    close(packed.view(2, 7, -1), expected)


def test_with_the_mlp_a_prefix_starts_at_random():
    """What holds at the start: the logits are those of the folded prefix, and differ from the base and between seeds."""
    base, logits = small_model()(TOKENS), []
    for seed in (0, 1):
        model = small_model()
        torch.manual_seed(seed)
        METHODS["prefix with mlp"](model)
        logits.append(model(TOKENS))
        folded = apply_prefix(small_model(), 5, WORDS)
        folded.model.prefix.prompt_embeddings.data = model.model.prefix.folded().data
        close(folded(TOKENS), logits[-1])
    assert far(logits[0], base) and far(logits[0], logits[1])


def test_fewer_words_are_repeated_more_are_cut_and_none_are_drawn():
    model = small_model()
    embedding = model.model.embed_tokens.weight
    close(apply_prompt(model, 5, [40, 41]).model.prefix.prompt_embeddings, embedding[[40, 41, 40, 41, 40]])
    model.model.prefix = None
    close(apply_prompt(model, 2, WORDS).model.prefix.prompt_embeddings, embedding[[40, 41]])
    model.model.prefix = None
    drawn = apply_prompt(model, 4).model.prefix.prompt_embeddings
    assert all((embedding == row).all(dim=1).any() for row in drawn)


@every_prefix
def test_positions_after_a_prefix_start_at_its_length(method):
    """Given ones are counted from the prefix's end too: a shift of all of them changes what a prefix key weighs."""
    model = adapted(method)
    logits = model(TOKENS)
    close(model(TOKENS, positions=torch.arange(7).expand(2, 7)), logits)
    assert far(model(TOKENS, positions=torch.arange(7).expand(2, 7) + 5), logits)


@every_prefix
def test_no_label_falls_on_a_prefix(method):
    """The mistake elsewhere: virtual tokens in the labels. Here there is no place for one: the logits are those of the
    tokens alone, and the loss of a packed row is the mean over its documents' tokens, one by one."""
    model = adapted(method)
    row, doc_ids = TOKENS.view(1, 14), torch.tensor([[0] * 7 + [1] * 7])
    mask = torch.tensor([[False] * 3 + [True] * 4 + [False] * 2 + [True] * 5])
    logits = model(row, doc_ids=doc_ids)
    assert logits.shape == (1, 14, 259)
    one, two = (sft_loss(model(TOKENS[i:i + 1]), TOKENS[i:i + 1], mask.view(2, 7)[i:i + 1], n_tokens=9) for i in (0, 1))
    close(sft_loss(logits, row, mask), (one + two).item())


# --------------------------------------------------------------------------------------------- what holds for all

@every_method
def test_packed_padded_and_cached_rows_give_the_same_logits(method):
    """The mistake elsewhere: the prefix is lost when the cache begins."""
    model = adapted(method)
    logits = model(TOKENS)
    packed = model(TOKENS.view(1, 14), doc_ids=torch.tensor([[0] * 7 + [1] * 7]))
    close(packed.view(2, 7, -1), logits)
    right = torch.cat([TOKENS, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    close(model(right, attention_mask=torch.arange(10).expand(2, 10) < 7)[:, :7], logits)
    left, valid = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1), torch.arange(10).expand(2, 10) >= 3
    close(model(left, attention_mask=valid)[:, 3:], logits)
    for tokens, mask, first in [(TOKENS, None, 4), (left, valid, 7)]:
        cache = KVCache(model.config, 2, tokens.shape[1])
        parts = [model(tokens[:, :first], attention_mask=None if mask is None else mask[:, :first], cache=cache)]
        parts += [model(tokens[:, first:first + 2], cache=cache)]  # several at once, and one by one
        parts += [model(tokens[:, t:t + 1], cache=cache) for t in range(first + 2, tokens.shape[1])]
        close(torch.cat(parts, dim=1)[:, -7:], logits)


@every_method
def test_generation_equals_the_argmax_of_fresh_forward_passes(method):
    """Prompts of different lengths (padded on the left), two samples each, rows that end early."""
    model = adapted(method)
    prompts, fresh = [[7, 8, 9], [30, 31, 32, 33, 34, 35], [50]], []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        fresh.append(tokens[len(prompt):])
    end = fresh[0][3]
    expected = [reply[:reply.index(end) + 1] if end in reply else reply for reply in fresh]
    responses = generate(model, prompts, 8, end, temperature=0, group_size=2).responses()
    assert responses == [reply for reply in expected for _ in range(2)]
    assert list(stream(model, prompts[1], 8, end_id=-1, temperature=0)) == fresh[1]


def test_the_virtual_tokens_of_a_prompt_run_once_per_cache():
    model, runs = adapted("prompt"), []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: runs.append(inputs[0].shape[1]))
    generate(model, [[7, 8, 9]], 4, end_id=-1, temperature=0)
    assert runs == [5, 3, 1, 1, 1]


@every_method
def test_the_base_may_be_bf16(method):
    model = trained(METHODS[method](small_model().bfloat16()))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    logits = model(TOKENS).float()
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(TOKENS).float()
    expected = model.float()(TOKENS)
    assert expected.std() > 0.4 and (logits - expected).abs().mean() < 0.01 and (under_autocast - expected).abs().mean() < 0.01


@every_prefix
def test_it_compiles_into_one_graph(method):
    model = adapted(method)
    doc_ids = torch.tensor([[0] * 7 + [1] * 7])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(TOKENS.view(1, 14), doc_ids=doc_ids), model(TOKENS.view(1, 14), doc_ids=doc_ids))


# --------------------------------------------------------------------------------------------- folders and mistakes

@every_method
def test_saved_loaded_and_taken_off(tmp_path, method):
    model, other = adapted(method), small_model()
    base = other(TOKENS)
    save(model, tmp_path)
    close(load_adapter(other, tmp_path)(TOKENS), model(TOKENS))
    assert not any(name.startswith("mlp") for name in load_safetensors(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(remove_adapter(other)(TOKENS), base) and set(other.state_dict()) == set(small_model().state_dict())


def test_one_kind_takes_the_place_of_another(tmp_path):
    model, expected = small_model(), {}
    for method in METHODS:
        other = adapted(method)
        save(other, tmp_path / method)
        expected[method] = other(TOKENS)
    for method in [*METHODS, *reversed(METHODS)]:
        close(load_adapter(model, tmp_path / method)(TOKENS), expected[method])


@pytest.mark.parametrize("method, changes, message", [
    ("adapter", {"hidden_size": 16}, "base_model.model.model.layers.0.self_attn.o_proj.down.weight (6, 32) instead of (6, 16)"),
    ("adapter", {"num_hidden_layers": 1}, "unexpected base_model.model.model.layers.1.mlp.down_proj.down.bias, "),
    ("prefix", {"num_hidden_layers": 3}, "prompt_embeddings (5, 96) instead of (5, 144)"),
    ("prompt", {"hidden_size": 16}, "prompt_embeddings (5, 32) instead of (5, 16)"),
    ("prompt", {"max_position_embeddings": 5}, "a prefix of 5 virtual tokens does not fit: it must be between 1 and 4, for the model's context is 5"),
])
def test_an_adapter_for_another_base(tmp_path, method, changes, message):
    save(adapted(method), tmp_path)
    model = small_model(**changes)
    before = model(TOKENS)
    with pytest.raises(UserError, match=re.escape(message)):
        load_adapter(model, tmp_path)
    assert torch.equal(model(TOKENS), before)


def test_an_unknown_kind_names_the_known_ones(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="peft_type = IA3 is not supported here; only LORA, BOTTLENECK, PREFIX_TUNING, PROMPT_TUNING"):
        load_adapter(small_model(), tmp_path)


@pytest.mark.parametrize("apply", [apply_prefix, apply_prompt])
@pytest.mark.parametrize("length", [0, 64, 1000])
def test_a_prefix_longer_than_the_context(apply, length):
    model = small_model()
    with pytest.raises(UserError, match=f"a prefix of {length} virtual tokens does not fit: it must be between 1 and 63"):
        apply(model, length, WORDS)
    assert model.model.prefix is None and all(p.requires_grad for p in model.parameters())


def test_a_second_one_and_sizes_that_do_not_fit():
    model = small_model()
    with pytest.raises(UserError, match=r"bottleneck 33 does not fit model.layers.0.self_attn.o_proj \(32 outputs\): it must be between 1 and 32"):
        apply_bottleneck(model, 33)
    with pytest.raises(UserError, match="placement 'both' must be one of houlsby, pfeiffer"):
        apply_bottleneck(model, 8, "both")
    apply_bottleneck(model, 8)
    with pytest.raises(UserError, match="has adapters already"):
        apply_bottleneck(model, 8)
    apply_prefix(model, 5, WORDS)
    with pytest.raises(UserError, match="has a prefix already"):
        apply_prompt(model, 5, WORDS)


@pytest.mark.parametrize("name, key, value, message", [
    ("adapter", "bottleneck", "6", "bottleneck = 6 must be a number"), ("adapter", "placement", "both", "placement = both one of houlsby, pfeiffer"),
    ("prompt", "num_virtual_tokens", None, "num_virtual_tokens = None must be a number"), ("prompt", "num_virtual_tokens", 6, "(5, 32) instead of (6, 32)"),
])
def test_a_config_that_cannot_be_meant(tmp_path, name, key, value, message):
    save(adapted(name), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=re.escape(message)):
        (load_bottleneck if name == "adapter" else load_prefix)(small_model(), tmp_path)


# --------------------------------------------------------------------------------------------- the PEFT package

@pytest.fixture
def theirs(tmp_path):
    """make(config) -> the PEFT package's model on our base folder, trained; make(folder) -> one that it loads."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    save_model(tmp_path / "base", small_model(), TOKENIZER)

    def make(what):
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if isinstance(what, peft.PeftConfig):
            torch.manual_seed(2)
            return trained(peft.get_peft_model(base, what)).eval()
        return peft.PeftModel.from_pretrained(base, what).eval()
    return make


@every_prefix
def test_our_folder_opens_in_peft_with_the_same_logits_loss_and_replies(tmp_path, theirs, method):
    """Our cached replies to prompts of two lengths are the argmax of its forward passes, each prompt alone and nothing cached.
    (Its own generate() is not the measure: with transformers 5.24, peft 0.21 forgets the prefix there.)"""
    model = adapted(method)
    save(model, tmp_path / "adapter")
    other = theirs(tmp_path / "adapter")
    logits = model(TOKENS)
    mask = torch.tensor([[False] * 3 + [True] * 4, [False] * 2 + [True] * 5])
    labels = TOKENS.masked_fill(~mask, -100)
    with torch.no_grad():
        result = other(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=labels)
    close(result.logits[:, -7:], logits)  # for a prompt, the package also gives logits for the virtual tokens
    close(sft_loss(logits, TOKENS, mask), result.loss.item())
    prompts = [[7, 8, 9], [30, 31, 32, 33, 34, 35]]
    replies = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(8):
                tokens = torch.cat([tokens, other(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
        replies.append(tokens[0, -8:].tolist())
    assert generate(model, prompts, 8, end_id=258, temperature=0).responses() == replies


@pytest.mark.parametrize("kind, options", [("PromptTuning", {}), ("PrefixTuning", {}), ("PrefixTuning", {"prefix_projection": True, "encoder_hidden_size": 7})])
def test_an_adapter_of_peft_loads_here_with_the_same_logits(tmp_path, theirs, kind, options):
    peft = pytest.importorskip("peft")
    other = theirs(getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=5, **options))
    other.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        close(model(TOKENS), other(input_ids=TOKENS).logits[:, -7:])


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_one_step_of_training_gives_the_gradients_of_peft(tmp_path, theirs, kind):
    peft = pytest.importorskip("peft")
    other = theirs(getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=5))
    other.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    mask = torch.tensor([[False] * 3 + [True] * 4, [False] * 2 + [True] * 5])
    sft_loss(model(TOKENS), TOKENS, mask).backward()
    other(input_ids=TOKENS, labels=TOKENS.masked_fill(~mask, -100)).loss.backward()
    close(model.model.prefix.prompt_embeddings.grad, other.prompt_encoder["default"].embedding.weight.grad)
