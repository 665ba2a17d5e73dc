"""Chapter 13. Adapters add small modules inside the layers; prefix and prompt tuning add tokens before the text.

After this chapter you can compute a bottleneck adapter and a prefix by hand, and know where learned tokens stand.

An adapter squeezes a hidden vector h through a few numbers and adds the result back. With one number, h = [1, -2],
W_down = [1, 0], b_down = 0, W_up = [2, 1], b_up = [1/2, 0]:

    W_down h = 1    gelu(1) = 0.84134475    h + [2, 1] 0.84134475 + [1/2, 0] = [3.18268950, -1.15865525]

Prefix tuning adds a key and a value that every token sees before its own document. With head size 1, a prefix of key
ln 3 and value 2, and two documents of one token each, with query 1, key 0 and the values 6 and 10: the prefix weighs
e^(ln 3) / (e^(ln 3) + e^0) = 3/4, so the results are 3/4 2 + 1/4 6 = 3 and 3/4 2 + 1/4 10 = 4.
"""

import json
import re

import pytest
import torch
from torch import nn

from minillm.adapter import AdapterLinear, apply_bottleneck
from minillm.attention import attend, attention_mask_2d
from minillm.checkpoint import load_model, save_model
from minillm.errors import UserError
from minillm.generate import generate, stream
from minillm.losses import sft_loss
from minillm.lora import apply_lora
from minillm.model import CausalLM, KVCache, preset_config
from minillm.peft import has_adapter, load_adapter, remove_adapter, save_adapter
from minillm.prefix import Prefixed, apply_prefix, apply_prompt
from minillm.safetensors import load_safetensors, save_safetensors
from tests.helpers import close
from tests.test_12_lora import TOKENIZER, TOKENS, change, far, linear, refused, small_model, trained

WORDS = [40, 41, 42, 43, 44]
METHODS = {
    "adapter": lambda model: apply_bottleneck(model, 6),
    "pfeiffer": lambda model: apply_bottleneck(model, 6, "pfeiffer"),
    "prefix": lambda model: apply_prefix(model, 5, WORDS),
    "prompt": lambda model: apply_prompt(model, 5, WORDS),
}
PREFIXES = ["prefix", "prompt"]
every_method = pytest.mark.parametrize("method", METHODS)
every_prefix = pytest.mark.parametrize("method", PREFIXES)


def adapted(method, **changes):
    torch.manual_seed(2)
    return trained(METHODS[method](small_model(**changes)))


# Adapters

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
    names = {placement: [name for name, module in apply_bottleneck(small_model(), 6, placement).named_modules()
                         if isinstance(module, AdapterLinear)] for placement in ("houlsby", "pfeiffer")}
    assert names["houlsby"] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj",
                                "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    assert names["pfeiffer"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("method", ["adapter", "pfeiffer"])
def test_adapters_start_as_the_identity_and_can_leave_it(method):
    """With both matrices at zero an adapter would stay the identity: no gradient would reach either."""
    model = small_model()
    base = model(TOKENS)
    METHODS[method](model)
    assert (model(TOKENS) - base).abs().max() < 1e-6
    model(TOKENS).logsumexp(-1).sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if n.endswith("up.weight"))
    assert far(trained(model)(TOKENS), base)


def test_under_autocast_an_adapter_keeps_no_copy_of_its_input():
    """As for LoRA (chapter 12): only the base's output h is kept, and what follows from it."""
    layer, x = AdapterLinear(nn.Linear(5, 6), 2), torch.randn(3, 5, dtype=torch.bfloat16)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert sum(tensor.shape == (3, 6) for tensor in kept) == 1


# Prefix and prompt

def test_the_worked_example_of_a_prefix():
    prefix = Prefixed([(torch.full((1, 1, 1, 1), 1.09861229), torch.full((1, 1, 1, 1), 2.0))], cache=None)
    keys, values = prefix.append(0, torch.zeros(1, 1, 2, 1), torch.tensor([6.0, 10.0]).view(1, 1, 2, 1))
    mask = attention_mask_2d(None, torch.tensor([[0, 1]]), T=2, past=0, device="cpu", prefix=1)
    assert mask.tolist() == [[[[True, True, False], [True, False, True]]]]
    close(attend(torch.ones(1, 1, 2, 1), keys, values, mask).flatten(), [3, 4])


def test_the_counts_of_prefixes():
    """P = 5: prompt 5 x 32; prefix 5 x 2 layers x (keys and values) 2 x 2 heads x 12."""
    counts = {method: sum(p.numel() for p in METHODS[method](small_model()).parameters() if p.requires_grad)
              for method in PREFIXES}
    assert counts == {"prompt": 160, "prefix": 480}


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("changes", [{}, {"model_type": "llama"}])
def test_at_the_start_the_logits_are_those_of_the_base_after_the_words(method, changes):
    """Also in a packed row, where one prefix serves every document and the base would need the words before each."""
    model = small_model(**changes)
    expected = model(torch.cat([torch.tensor([WORDS, WORDS]), TOKENS], dim=1))[:, 5:]
    METHODS[method](model)
    close(model(TOKENS), expected)
    packed = model(TOKENS.view(1, 14), doc_ids=torch.tensor([[3] * 7 + [4] * 7]))
    close(packed.view(2, 7, -1), expected)


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
    """Given positions also count from the end of the prefix. Shifting all of them changes the attention to it."""
    model = adapted(method)
    logits = model(TOKENS)
    close(model(TOKENS, positions=torch.arange(7).expand(2, 7)), logits)
    assert far(model(TOKENS, positions=torch.arange(7).expand(2, 7) + 5), logits)


@every_prefix
def test_no_label_falls_on_a_prefix(method):
    """The mistake elsewhere: virtual tokens among the labels. Here they have no place: there are logits for the tokens
    alone, and the loss of a packed row is the mean over the tokens of its documents, each computed alone."""
    model = adapted(method)
    row, doc_ids = TOKENS.view(1, 14), torch.tensor([[0] * 7 + [1] * 7])
    mask = torch.tensor([[False] * 3 + [True] * 4 + [False] * 2 + [True] * 5])
    logits = model(row, doc_ids=doc_ids)
    assert logits.shape == (1, 14, 259)
    losses = [sft_loss(model(TOKENS[[i]]), TOKENS[[i]], mask.view(2, 7)[[i]], n_tokens=9) for i in (0, 1)]
    close(sft_loss(logits, row, mask), (losses[0] + losses[1]).item())


# What holds for all

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
    assert expected.std() > 0.4
    assert (logits - expected).abs().mean() < 0.01 and (under_autocast - expected).abs().mean() < 0.01


@every_prefix
@pytest.mark.slow
def test_it_compiles_into_one_graph(method):
    model = adapted(method)
    doc_ids = torch.tensor([[0] * 7 + [1] * 7])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(TOKENS.view(1, 14), doc_ids=doc_ids), model(TOKENS.view(1, 14), doc_ids=doc_ids))


# Folders and mistakes

@every_method
def test_saved_loaded_and_taken_off(tmp_path, method):
    model, other = adapted(method), small_model()
    base = other(TOKENS)
    save_adapter(model, tmp_path)
    close(load_adapter(other, tmp_path)(TOKENS), model(TOKENS))
    assert has_adapter(other)
    remove_adapter(other)
    assert not has_adapter(other)
    assert torch.equal(other(TOKENS), base) and set(other.state_dict()) == set(small_model().state_dict())


def test_one_kind_takes_the_place_of_another(tmp_path):
    model, expected = small_model(), {}
    for method in METHODS:
        other = adapted(method)
        save_adapter(other, tmp_path / method)
        expected[method] = other(TOKENS)
    for method in [*METHODS, *reversed(METHODS)]:
        close(load_adapter(model, tmp_path / method)(TOKENS), expected[method])


@pytest.mark.parametrize("method, changes, message", [
    ("adapter", {"hidden_size": 16},
     "base_model.model.model.layers.0.self_attn.o_proj.down.weight (6, 32) instead of (6, 16)"),
    ("adapter", {"num_hidden_layers": 1}, "unexpected base_model.model.model.layers.1.mlp.down_proj.down.bias, "),
    ("prefix", {"num_hidden_layers": 3}, "prompt_embeddings (5, 96) instead of (5, 144)"),
    ("prefix", {"num_key_value_heads": 4, "head_dim": 6},
     "does not fit this base model: num_attention_heads 2 instead of 4"),
    ("prompt", {"hidden_size": 16}, "prompt_embeddings (5, 32) instead of (5, 16)"),
    ("prompt", {"max_position_embeddings": 5}, "a prefix of 5 virtual tokens does not fit: it must be between 1 and 4, "
     "because the model's context is 5 tokens"),
])
def test_an_adapter_for_another_base(tmp_path, method, changes, message):
    """Two heads of 12 numbers and four of 6 give tensors of one shape."""
    save_adapter(adapted(method), tmp_path)
    refused(small_model(**changes), tmp_path, message)


@every_method
def test_a_failed_load_keeps_the_adapter_that_was_on(tmp_path, method):
    save_adapter(adapted(method), tmp_path)
    tensors = load_safetensors(tmp_path / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors = {**tensors, name: torch.full_like(tensors[name], float("nan"))}
    save_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    for other in METHODS:
        refused(adapted(other), tmp_path, f"{name} holds NaN or infinite numbers")


def test_an_unknown_kind_names_the_known_ones(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    message = 'peft_type = "IA3" is not supported; it must be one of LORA, BOTTLENECK, PREFIX_TUNING, PROMPT_TUNING'
    with pytest.raises(UserError, match=message):
        load_adapter(small_model(), tmp_path)


@pytest.mark.parametrize("apply", [apply_prefix, apply_prompt])
@pytest.mark.parametrize("length", [0, 64, 1000])
def test_a_prefix_longer_than_the_context(apply, length):
    model = small_model()
    message = f"a prefix of {length} virtual tokens does not fit: it must be between 1 and 63"
    with pytest.raises(UserError, match=message):
        apply(model, length, WORDS)
    assert model.model.prefix is None and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("apply", [apply_prefix, apply_prompt])
def test_virtual_tokens_take_their_part_of_the_context(apply):
    """Positions start at the prefix's length: 16 of 64 are gone, so 48 are left for prompt and reply."""
    model = small_model()
    assert model.context == 64
    apply(model, 16, WORDS)
    assert model.context == 48
    assert generate(model, [[5] * 40], 8, end_id=-1).tokens.shape == (1, 48)
    with pytest.raises(UserError, match="a prompt of 41 tokens and 8 new ones do not fit the model's context of 48"):
        generate(model, [[5] * 41], 8, end_id=-1)
    remove_adapter(model)
    assert model.context == 64


def test_a_second_one_and_sizes_that_do_not_fit():
    model = small_model()
    message = "bottleneck 33 does not fit model.layers.0.self_attn.o_proj (32 outputs): it must be between 1 and 32"
    with pytest.raises(UserError, match=re.escape(message)):
        apply_bottleneck(model, 33)
    with pytest.raises(UserError, match="placement 'both' must be one of houlsby, pfeiffer"):
        apply_bottleneck(model, 8, "both")
    apply_bottleneck(model, 8)
    with pytest.raises(UserError, match="has adapters already"):
        apply_bottleneck(model, 8)
    apply_prefix(model, 5, WORDS)
    with pytest.raises(UserError, match="has a prefix already"):
        apply_prompt(model, 5, WORDS)


@pytest.mark.parametrize("method, key, value, message", [
    ("adapter", "bottleneck", "6", 'bottleneck = "6" is not supported; it must be a positive whole number'),
    ("adapter", "bottleneck", None, "bottleneck = null is not supported; it must be a positive whole number"),
    ("adapter", "placement", "both", 'placement = "both" is not supported; it must be one of houlsby, pfeiffer'),
    ("adapter", "placement", ["houlsby"], 'placement = ["houlsby"] is not supported'),
    ("adapter", "modules_to_save", ["lm_head"], 'modules_to_save = ["lm_head"] is not supported; it must be empty'),
    ("prompt", "num_virtual_tokens", None, "num_virtual_tokens = null is not supported; it must be a positive whole"),
    ("prompt", "num_virtual_tokens", 5.0, "num_virtual_tokens = 5.0 is not supported"),
    ("prompt", "num_virtual_tokens", 6, "(5, 32) instead of (6, 32)"),
    ("prompt", "num_transformer_submodules", 2, "num_transformer_submodules = 2 is not supported; it must be 1"),
    ("prompt", "modules_to_save", ["lm_head"], 'modules_to_save = ["lm_head"] is not supported; it must be empty'),
    ("prefix", "num_virtual_tokens", 10**30, "num_virtual_tokens = 1000000000000000000000000000000 is not supported"),
    ("prefix", "num_attention_heads", "2", 'num_attention_heads = "2" is not supported; it must be a positive whole'),
    ("prefix", "num_transformer_submodules", [1], "num_transformer_submodules = [1] is not supported; it must be 1"),
    ("prefix", "modules_to_save", ["lm_head"], 'modules_to_save = ["lm_head"] is not supported; it must be empty'),
    ("prefix", "a_later_setting", 1, "a_later_setting = 1 is not supported; it must be empty"),
])
def test_a_setting_that_is_refused(tmp_path, method, key, value, message):
    save_adapter(adapted(method), tmp_path)
    change(tmp_path, **{key: value})
    refused(small_model(), tmp_path, message)


@every_prefix
def test_settings_that_change_nothing_are_ignored(tmp_path, method):
    """Records, how training started, and sizes that the tensors show anyway."""
    model = adapted(method)
    save_adapter(model, tmp_path)
    change(tmp_path, peft_version="0.21.2", auto_mapping=None, revision=None, task_type=None, token_dim=None,
           num_layers=None, num_attention_heads=None, num_transformer_submodules=None, modules_to_save=None,
           prefix_projection=True, encoder_hidden_size=7, init_weights="zero", prompt_tuning_init="TEXT",
           prompt_tuning_init_text="hello", tokenizer_name_or_path="gpt2", tokenizer_kwargs={"use_fast": True})
    close(load_adapter(small_model(), tmp_path)(TOKENS), model(TOKENS))


def test_a_model_with_two_kinds_cannot_be_saved(tmp_path):
    for apply in (apply_lora, apply_bottleneck):
        model = apply_prefix(small_model(), 5, WORDS)
        apply(model, 4, *([8] if apply is apply_lora else []))
        with pytest.raises(ValueError, match="must hold one kind of adapter"):
            save_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


# The PEFT package

@pytest.fixture
def theirs(tmp_path):
    """make(config) -> PEFT's model on our base folder, trained; make(folder) -> PEFT's model with that adapter."""
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
    """Our cached replies to prompts of two lengths equal the argmax of PEFT's forward passes, one prompt at a time and
    without a cache. (Its own generate() is no reference: with transformers 5.24, peft 0.21 drops the prefix there.)"""
    model = adapted(method)
    save_adapter(model, tmp_path / "adapter")
    other = theirs(tmp_path / "adapter")
    logits = model(TOKENS)
    mask = torch.tensor([[False] * 3 + [True] * 4, [False] * 2 + [True] * 5])
    labels = TOKENS.masked_fill(~mask, -100)
    with torch.no_grad():
        result = other(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=labels)
    close(result.logits[:, -7:], logits)  # PEFT also returns logits for the virtual tokens of a prompt
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


@pytest.mark.parametrize("kind, options", [
    ("PromptTuning", {}), ("PrefixTuning", {}),
    ("PrefixTuning", {"prefix_projection": True, "encoder_hidden_size": 7})])
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


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_the_worked_example_of_an_adapter: `torch.tensor([1.0, -2.0])` -> `torch.tensor([0.0, -2.0])`. What is left
#    of the adapter?
# 2. test_the_worked_example_of_a_prefix: `1.09861229` -> `0.0`. How much does the prefix weigh?
