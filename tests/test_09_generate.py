"""Chapter 9: from probabilities to text. Drawing a token, and drawing many texts at once with a key/value cache.

After this chapter you can turn probabilities, a temperature and a nucleus into the distribution that is sampled, and
know why its log-probabilities are what PPO needs.

Four tokens with the probabilities 1/2, 1/4, 1/8, 1/8:

    temperature 1/2    squares 16/64, 4/64, 1/64, 1/64 -> 8/11, 2/11, 1/22, 1/22
    temperature 2      roots   .7071, .5, .3536, .3536 over their sum 1.9142 -> .3694, .2612, .1847, .1847
    top_k 2            1/2, 1/4 over 3/4 -> 2/3, 1/3
    top_p 0.6          the likeliest reaches 0.5 only, the first two 0.75 -> 2/3, 1/3
    top_p 0.4          the likeliest reaches it alone -> 1

A cache must change nothing but the time: whatever is sampled with it, together with prompts of other lengths, after
other rows have ended, has the log-probabilities of one plain forward pass over that text alone.
"""

import contextlib
import math
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.cuda_graph import StaticStep
from minillm.errors import UserError
from minillm.generate import _decoding, generate, sample, stream
from minillm.losses import token_logprobs
from minillm.model import CausalLM, ModelConfig
from minillm.prefix import apply_prefix
from tests.helpers import close

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
END = 1


def tiny_model(model_type="qwen3", seed=0, **changes) -> CausalLM:
    """Random weights, ten times the usual, so that its distributions are far from uniform and from one another."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=8, intermediate_size=24, max_position_embeddings=64,
                 tie_word_embeddings=False, model_type=model_type)
    model = CausalLM(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
            else:  # norms and biases away from their 1 and 0
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PROMPTS = [[3], [5, 6, 7, 8, 9, 10, 11, 2, 4], [7, 7, 3], [2, 9, 4, 4, 8]]


# Drawing one token

@pytest.mark.parametrize("options, expected", [
    ({}, [0.5, 0.25, 0.125, 0.125]),
    ({"temperature": 0.5}, [8 / 11, 2 / 11, 1 / 22, 1 / 22]),
    ({"temperature": 2.0}, [0.36939806, 0.26120387, 0.18469903, 0.18469903]),
    ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
    ({"top_k": 4}, [0.5, 0.25, 0.125, 0.125]),
    ({"top_k": 9}, [0.5, 0.25, 0.125, 0.125]),
    ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
    ({"top_p": 0.4}, [1, 0, 0, 0]),
    ({"top_p": 0.0}, [1, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),  # of 4/7, 2/7, 1/7 the first two reach 0.8
    ({"temperature": 0.5, "top_p": 0.8}, [0.8, 0.2, 0, 0]),  # temperature first, then the nucleus
])
def test_tokens_come_as_often_as_their_probability_says_and_with_its_logarithm(options, expected):
    n = 40_000
    tokens, logprobs = sample(LOGITS.expand(n, 4), generator=seeded(), **options)
    for token, p in enumerate(expected):
        share = (tokens == token).float().mean().item()
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / n), f"token {token}: {share} instead of {p}"
        if share:
            assert (logprobs[tokens == token] - math.log(p)).abs().max() < 1e-5


def test_a_nucleus_that_stops_before_top_p_is_reached_is_rejected():
    """The classic mistake: dropping every token at which the cumulative sum is above top_p. Of 1/2, 1/4 | 1/8, 1/8 with
    top_p 0.6 that leaves the first alone (0.75 > 0.6), with half of the probability instead of at least 0.6."""
    mistaken = LOGITS[0].exp().cumsum(0) > 0.6
    assert mistaken.tolist() == [False, True, True, True]
    tokens, _ = sample(LOGITS.expand(200, 4), top_p=0.6, generator=seeded())
    assert set(tokens.tolist()) == {0, 1}


def test_of_equal_tokens_top_k_keeps_exactly_k():
    tokens, logprobs = sample(torch.zeros(200, 4), top_k=2, generator=seeded())
    assert set(tokens.tolist()) == {0, 1}
    assert close(logprobs, [-0.6931472] * 200)


def test_temperature_zero_is_argmax_and_certain():
    tokens, logprobs = sample(torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 5.0]]), temperature=0)
    assert tokens.tolist() == [1, 0] and logprobs.tolist() == [0.0, 0.0]


def test_temperature_has_the_right_limits():
    logits = 100 * torch.randn(500, 7, generator=seeded(1))
    assert (logits / 1e-37).isinf().any(), "beyond float32"
    tokens, logprobs = sample(logits, temperature=1e-37, generator=seeded())
    assert torch.equal(tokens, logits.argmax(dim=-1)) and close(logprobs, [0.0] * 500)
    _, logprobs = sample(logits, temperature=1e9, generator=seeded())
    assert close(logprobs, [-1.9459101] * 500)  # ln 1/7


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": -0.1}, {"top_k": -1}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="must not be negative"):
        sample(LOGITS, **options)


# Drawing texts

class Counter(nn.Module):
    """A stand-in for a model that always goes on with the next number."""

    def __init__(self):
        super().__init__()
        self.config = ModelConfig(vocab_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                                  head_dim=2, max_position_embeddings=6)
        self.context = 6
        self.lm_head = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(()))

    def hidden(self, tokens, attention_mask=None, cache=None):
        return 50.0 * nn.functional.one_hot((tokens + 1) % 8, 8)

    def forward(self, tokens, cache=None):
        return self.lm_head(self.hidden(tokens, cache=cache))


def test_rollouts_are_prompt_response_padding():
    """End token 6, at most 4 new tokens, padding 0. The response holds its end token; nothing follows it."""
    rollout = generate(Counter(), [[3], [1, 2], [5], [7]], 4, end_id=6, temperature=0)
    assert rollout.tokens.tolist() == [[3, 4, 5, 6, 0, 0],
                                       [1, 2, 3, 4, 5, 6],
                                       [5, 6, 0, 0, 0, 0],
                                       [7, 0, 1, 2, 3, 0]]  # cut: the first 0 is a response, the last is padding
    assert rollout.response_mask.int().tolist() == [[0, 1, 1, 1, 0, 0],
                                                    [0, 0, 1, 1, 1, 1],
                                                    [0, 1, 0, 0, 0, 0],
                                                    [0, 1, 1, 1, 1, 0]]
    assert rollout.responses() == [[4, 5, 6], [3, 4, 5, 6], [6], [0, 1, 2, 3]]
    assert rollout.logprobs.shape == (4, 6) and close(rollout.logprobs, torch.zeros(4, 6))  # certain, or not sampled
    assert list(stream(Counter(), [2], 5, end_id=6)) == [3, 4, 5]


@torch.no_grad()
def greedy_without_cache(model, prompt, max_new_tokens):
    """What generation is, in four lines: the plain twin."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens and tokens[len(prompt):][-1:] != [END]:
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt):]


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_cached_generation_of_a_padded_batch_equals_full_recomputation_of_each_text_alone(model_type):
    model = tiny_model(model_type)
    expected = [greedy_without_cache(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(e) for e in expected}) == 4, "the replies must differ, else a mixed-up batch would not show"
    assert generate(model, PROMPTS, 20, END, temperature=0).responses() == expected
    for prompt, response in zip(PROMPTS, expected):
        assert generate(model, [prompt], 20, END, temperature=0).responses() == [response]
        assert list(stream(model, prompt, 20, END, temperature=0)) == [t for t in response if t != END]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_fresh_forward_pass(temperature):
    """The classic mistake: sampling at one temperature and scoring at another, so that PPO's ratio does not start at 1.
    """
    model = tiny_model()
    rollout = generate(model, PROMPTS, 24, END, temperature, group_size=8, generator=seeded())
    lengths = rollout.response_mask.sum(dim=1)
    assert lengths.min() < 4 and lengths.max() == 24, "some must end early and leave the batch, some never"
    with torch.no_grad():
        logits = model(rollout.tokens)  # padding stands on the right: a causal model needs no mask
    fresh = token_logprobs(logits, rollout.tokens, temperature)
    mask = rollout.response_mask[:, 1:]
    assert (rollout.logprobs[:, 1:] - fresh)[mask].abs().max() < 1e-4
    assert not rollout.logprobs[~rollout.response_mask].any()
    other = token_logprobs(logits, rollout.tokens, 1.3)
    assert (rollout.logprobs[:, 1:] - other)[mask].abs().max() > 0.1


def test_logprobs_of_top_k_are_those_of_the_distribution_that_was_sampled_from():
    """With top_k 1 every token is certain; with top_k 2 the two that are left share the probability."""
    model = tiny_model()
    rollout = generate(model, PROMPTS, 10, END, top_k=1, generator=seeded())
    assert close(rollout.logprobs, torch.zeros_like(rollout.logprobs))
    assert rollout.responses() == generate(model, PROMPTS, 10, END, temperature=0).responses()
    rollout = generate(model, PROMPTS, 10, END, top_k=2, generator=seeded())
    with torch.no_grad():
        best = model(rollout.tokens)[:, :-1].topk(2).values
    gap = best[..., 0] - best[..., 1]  # likelier: -ln(1 + e^-gap), other: -ln(1 + e^gap)
    sampled, mask = rollout.logprobs[:, 1:], rollout.response_mask[:, 1:]
    likelier, other = -(1 + (-gap).exp()).log(), -(1 + gap.exp()).log()
    assert torch.minimum((sampled - likelier).abs(), (sampled - other).abs())[mask].max() < 1e-4
    assert (sampled < -math.log(2))[mask].any(), "the second-best token must occur"


def test_rows_of_a_group_stand_together_and_differ():
    model = tiny_model()
    rollout = generate(model, [[3, 4], [5]], 12, END, group_size=4, generator=seeded())
    assert rollout.tokens[:4, :2].tolist() == [[3, 4]] * 4 and rollout.tokens[4:, 0].tolist() == [5] * 4
    responses = [tuple(r) for r in rollout.responses()]
    assert len(set(responses[:4])) > 1 and len(set(responses[4:])) > 1
    for response in responses:
        assert END not in response[:-1] and (response[-1] == END or len(response) == 12)


def test_a_prompt_is_computed_once_for_its_group_and_rows_that_ended_leave():
    model, shapes = tiny_model(), []
    model.model.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[:2])))
    rollout = generate(model, PROMPTS, 30, END, group_size=16, generator=seeded())
    lengths = rollout.response_mask.sum(dim=1)
    assert shapes[0] == (4, 9), "one row per prompt, as long as the longest"
    assert len(shapes) == lengths.max(), "one pass for the prompts, and one for each further token"
    assert all(tokens == 1 for _, tokens in shapes[1:])
    for t, (rows, _) in enumerate(shapes[1:], 1):
        running = int((lengths > t).sum())
        assert running <= rows <= running / 0.75, "few rows are computed in vain"
    assert shapes[1][0] > 40 > shapes[-1][0]


def test_seeds_decide_and_the_global_generator_is_left_alone():
    model = tiny_model()
    state = torch.get_rng_state()
    first, again, other = (generate(model, PROMPTS, 16, END, generator=seeded(s)).tokens.tolist() for s in (0, 0, 1))
    assert first == again != other
    one, two, three = (list(stream(model, PROMPTS[1], 16, END, generator=seeded(s))) for s in (3, 3, 4))
    assert one == two != three
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_needs_no_gradient_and_no_dropout_and_changes_no_mode():
    """The classic mistake: a dropout (of a LoRA, say) that is still on while sampling."""
    model = tiny_model()
    expected = generate(model, PROMPTS, 12, END, temperature=0)
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.9))
    assert model.training
    rollout = generate(model, PROMPTS, 12, END, temperature=0)
    assert rollout.responses() == expected.responses() and not rollout.logprobs.requires_grad
    assert list(stream(model, PROMPTS[1], 12, END, temperature=0)) == [t for t in expected.responses()[1] if t != END]
    assert model.training and model.model.layers[0].mlp.training and torch.is_grad_enabled()
    model.eval()
    generate(model, PROMPTS, 2, END)
    assert not model.training


def test_what_cannot_be_generated_is_refused_in_one_line():
    model = tiny_model(max_position_embeddings=16)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [], 4, END)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[3], []], 4, END)
    with pytest.raises(ValueError, match="at least one token"):
        next(stream(model, [], 4, END))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, [[3]], 0, END)
    for call in (lambda: generate(model, [[3], [4] * 11], 6, END), lambda: next(stream(model, [4] * 11, 6, END))):
        with pytest.raises(UserError, match="a prompt of 11 tokens and 6 new ones do not fit .* context of 16"):
            call()
    assert generate(model, [[4] * 10], 6, -1, temperature=0).tokens.shape == (1, 16)  # exactly full


def allow(monkeypatch, rows, weights):
    """Let so many rows of a model of so many weights be decoded in float32."""
    monkeypatch.setattr("minillm.generate.FEW_ROWS", rows)
    monkeypatch.setattr("minillm.generate.FEW_WEIGHTS", weights)


def test_few_rows_are_decoded_in_float32_on_a_cpu(monkeypatch):
    """Under bf16 autocast few rows of a small model give the tokens and logprobs of float32; one row more, or a model
    one parameter too large, gives those of bf16. What the caller computes between two streamed tokens, and after a
    stream that it leaves, is still under its own autocast."""
    model, rows = tiny_model(), len(PROMPTS)
    size = sum(p.numel() for p in model.parameters())

    def logprobs(few):
        allow(monkeypatch, *few)
        return generate(model, PROMPTS, 8, end_id=-1, generator=seeded()).logprobs

    exact = logprobs((0, 0))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logprobs((0, 0))
        assert not rounded.equal(exact)
        assert logprobs((rows, size)).equal(exact)
        assert logprobs((rows - 1, size)).equal(rounded) and logprobs((rows, size - 1)).equal(rounded)
        allow(monkeypatch, rows, size)
        for _ in stream(model, [3, 4], 4, END):
            assert torch.is_autocast_enabled("cpu")
            break
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("device, more, inference", [("cpu", {}, True), ("cuda", {}, False),
                                                     ("cpu", {"reshard": None}, False)])
def test_on_cuda_no_generation_is_in_inference_mode(device, more, inference):
    """A captured graph of one mode may not be replayed in the other, and under autocast it has to be no_grad. So it is
    always, and in a sharded model too: training goes on with the tensors that decoding gathers."""
    weight = types.SimpleNamespace(device=torch.device(device), dtype=torch.float32, numel=lambda: 10)
    model = types.SimpleNamespace(parameters=lambda: [weight], **more)
    with _decoding(model, 1):
        assert torch.is_inference_mode_enabled() is inference and not torch.is_grad_enabled()


def test_autocast_makes_one_copy_of_a_weight_for_all_tokens(monkeypatch):
    """Of frozen weights too. The classic mistake: inference_mode, in which each token pays for a copy of the whole
    model."""
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
                copied.append(args[0].data_ptr())
            return function(*args, **(kwargs or {}))

    allow(monkeypatch, 0, 0)
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    frozen = [p.requires_grad for p in model.parameters()]
    matrices = [m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Linear)]
    for run in (lambda: generate(model, PROMPTS, 6, end_id=-1), lambda: list(stream(model, [3, 4], 6, end_id=-1)),
                lambda: next(stream(model, [3, 4], 6, end_id=-1))):
        copied = []
        with torch.autocast("cpu", torch.bfloat16):
            with Copies():
                run()
            assert [copied.count(pointer) for pointer in matrices] == [1] * len(matrices)
            assert [p.requires_grad for p in model.parameters()] == frozen


def test_a_generation_sees_the_weights_as_they_are(monkeypatch):
    """Inside the caller's autocast weights change: copies from before are not used, and none are left, by a stream that
    the caller leaves or a generation that fails either."""
    allow(monkeypatch, 0, 0)
    model, first, second = tiny_model(), tiny_model(), tiny_model(seed=1)
    tokens, replies = torch.tensor([[3, 4]]), lambda m: generate(m, PROMPTS, 6, end_id=-1, temperature=0).responses()

    def fails():
        with pytest.raises(ValueError, match="negative"):  # at the first draw
            generate(model, PROMPTS, 6, end_id=-1, temperature=-1)

    with torch.autocast("cpu", torch.bfloat16):
        expected = replies(second)
        assert replies(first) != expected
        for run in (lambda: replies(model), lambda: next(stream(model, [3, 4], 6, END)), fails):
            model.load_state_dict(first.state_dict())
            model(tokens)  # makes copies
            model.load_state_dict(second.state_dict())
            assert replies(model) == expected
            model.load_state_dict(first.state_dict())
            run()
            model.load_state_dict(second.state_dict())
            assert model(tokens).equal(second(tokens))


# The step that a CUDA graph can hold: one program for every token

@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
@pytest.mark.parametrize("bucket", [4, 8, 128])
def test_the_static_step_samples_what_the_plain_one_samples(model_type, bucket, monkeypatch):
    """Tokens and logprobs, with prompts of four lengths and with a learned prefix, over several buckets of attention.
    """
    monkeypatch.setattr("minillm.cuda_graph.BUCKET", bucket)
    for model in (tiny_model(model_type), apply_prefix(tiny_model(model_type), 3, [5, 6])):
        plain, static = (generate(model, PROMPTS, 20, end_id=-1, group_size=2, generator=seeded(), static=static)
                         for static in (False, True))
        assert plain.tokens.equal(static.tokens) and plain.response_mask.equal(static.response_mask)
        close(static.logprobs, plain.logprobs)


def test_the_static_step_stops_where_the_plain_one_stops(monkeypatch):
    """Rows end at different tokens; looked at every third one, they leave the batch later, and all that they say after
    their end is dropped."""
    monkeypatch.setattr("minillm.generate.CHECK_EVERY", 3)
    monkeypatch.setattr("minillm.cuda_graph.BUCKET", 8)
    model, ended = tiny_model(), set()
    for end_id in range(12):
        plain, static = (generate(model, PROMPTS, 16, end_id, temperature=0, static=static) for static in (False, True))
        assert plain.tokens.equal(static.tokens) and plain.response_mask.equal(static.response_mask)
        ended |= {(end_id, n) for n in plain.response_mask.sum(1).tolist() if n < 16}
    assert len(ended) >= 4  # the test is about rows that end early


def test_after_one_failed_capture_no_more_are_tried(monkeypatch, capsys):
    """A capture that failed may leave the random generators unusable for another. Decoding goes on plainly, in this
    generation and in all that follow; it is said once. The GPU is a fake."""
    tried, model = [], tiny_model()

    class NoGraph:
        def capture_begin(self, *pool, capture_error_mode):
            tried.append(capture_error_mode)
            raise RuntimeError("operation not permitted when stream is capturing\nFor debugging consider more\n")

    class Stream:
        def wait_stream(self, other):
            pass

    class OnDevice(StaticStep):
        def __init__(self, model, cache):
            super().__init__(model, cache)
            self.captures = StaticStep.works  # as on CUDA

    for name, fake in (("CUDAGraph", NoGraph), ("Stream", lambda device: Stream()), ("current_stream", Stream),
                       ("stream", contextlib.nullcontext)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("minillm.cuda_graph._capture_stream", lambda device: Stream())
    monkeypatch.setattr(StaticStep, "works", True)
    monkeypatch.setattr("minillm.generate.StaticStep", OnDevice)
    expected = generate(model, PROMPTS, 6, end_id=-1, generator=seeded(), static=False)
    for _ in range(2):
        found = generate(model, PROMPTS, 6, end_id=-1, generator=seeded(), static=True)
        assert found.tokens.equal(expected.tokens)
    assert capsys.readouterr().err == ("decoding without a CUDA graph, which is slower: operation not permitted when "
                                       "stream is capturing\n")
    assert tried == ["thread_local"] and not StaticStep.works


def test_a_random_number_falls_into_the_part_of_its_token():
    """Probabilities 0.2, 0.5, 0.3: their parts of [0, 1) end at 0.2, 0.7 and 1. A token of probability 0 has none."""
    logits = torch.tensor([0.2, 0.5, 0.0, 0.3]).log().expand(7, 4)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.99, 1 - 2**-24])
    tokens, logprobs = sample(logits, uniforms=uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3, 3] and close(logprobs[2].exp(), 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_graphs_share_their_memory():
    """One after the other: each with memory of its own, or on a stream of its own, for which cuBLAS keeps a workspace,
    they would fill the GPU."""
    model, held = tiny_model().cuda(), []
    for _ in range(6):
        generate(model, PROMPTS, 20, end_id=-1, group_size=2)
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(held[1:])) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_samples_what_the_plain_step_samples(monkeypatch):
    """And it is captured: else two plain steps would be compared."""
    monkeypatch.setattr("minillm.cuda_graph.BUCKET", 8)
    monkeypatch.setattr(StaticStep, "works", True)
    model = tiny_model().cuda()
    plain, graph = (generate(model, PROMPTS, 20, end_id=-1, group_size=2,
                             generator=torch.Generator("cuda").manual_seed(0), static=static)
                    for static in (False, True))
    assert StaticStep.works and StaticStep.newest is not None
    assert plain.tokens.equal(graph.tokens)
    close(graph.logprobs, plain.logprobs)


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_tokens_come_as_often_as_their_probability_says_and_with_its_logarithm: `({"top_p": 0.6}` -> `({"top_p":
#    0.8}`. Which tokens are left, and how probable are they?
# 2. test_rollouts_are_prompt_response_padding: `4, end_id=6` -> `3, end_id=6`. Which answers are cut?
