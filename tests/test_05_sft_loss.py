"""Chapter 5: the log-probability of a token, and the loss of supervised fine-tuning.

Code: minillm/logprobs.py and sft_loss in minillm/losses.py, used by train_pretrain.py, train_sft.py and train_lora.py.

Everything after this chapter (DPO, PPO, GRPO) is built on one number: how probable was this token, given those before
it? Supervised fine-tuning just makes that number larger for the tokens that a good assistant would have said.

After this chapter you can compute the loss of a text by hand, know which logit belongs to which token, and see what a
mean of means does to it.

Drawn in tests/figures/mask_and_shift.svg.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import logprobs
from minillm.logprobs import denominator, head_entropy, head_logprobs, linear_cross_entropy, masked
from minillm.losses import sft_loss, token_logprobs
from tests.helpers import close

# A vocabulary of three and a text of three tokens. After token 0 the model says (1/2, 1/4, 1/4), after token 2 it says
# (1/8, 5/8, 2/8). What it says after the last token is not scored: nothing follows.
TOKENS = torch.tensor([[0, 2, 1]])
LOGITS64 = torch.tensor([[[2, 1, 1], [1, 5, 2], [7, 1, 1]]], dtype=torch.float64).log()
LOGITS = LOGITS64.float()


def random_batch(rows=8, length=6, vocabulary=5, seed=0):
    """Rows of ragged length: row r has 1 + r % (length - 1) supervised tokens, the rest is padding."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocabulary, generator=g)
    tokens = torch.randint(vocabulary, (rows, length), generator=g)
    mask = torch.arange(length) <= 1 + torch.arange(rows)[:, None] % (length - 1)
    mask[:, 0] = False
    return logits, tokens, mask


# ---------------------------------------------------------------- token_logprobs

def test_each_token_is_scored_by_the_row_before_it():
    """Token 2 is predicted by row 0: ln 1/4 = -1.386294. Token 1 is predicted by row 1: ln 5/8 = -0.470004."""
    close(token_logprobs(LOGITS, TOKENS), [[-1.3862944, -0.4700036]])
    close(token_logprobs(LOGITS64, TOKENS), [[-1.3862943611198906, -0.4700036292457356]])


def test_mistake_no_shift():
    """Scoring a token by its own row asks the model to repeat its input, which is easy and teaches nothing."""
    unshifted = LOGITS.log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0]
    with pytest.raises(AssertionError):
        close(unshifted[:, 1:], token_logprobs(LOGITS, TOKENS))


def test_temperature_divides_the_logits_and_not_the_logprobs():
    """Temperature 2 takes the square root of every weight and normalises again:
    sqrt(1) / (sqrt 2 + 1 + 1) = 0.292893, ln = -1.227947;   sqrt 5 / (1 + sqrt 5 + sqrt 2) = 0.480845, ln = -0.732209.
    """
    warm = token_logprobs(LOGITS, TOKENS, temperature=2.0)
    close(warm, [[-1.2279472, -0.7322088]])
    with pytest.raises(AssertionError):
        close(token_logprobs(LOGITS, TOKENS) / 2.0, warm)  # the mistake: not a distribution any more


def test_half_precision_logits_give_float32_logprobs():
    """bf16 has 8 bits. The logits 3, 0, 0 are exact in it; ln of e^3 / (e^3 + 2) = -0.094923 is not. Neither is 3 / 0.7
    = 4.285714, which bf16 rounds to 4.28125: ln of e^4.285714 / (e^4.285714 + 2) = -0.027156.
    """
    logits = torch.tensor([[[3.0, 0, 0], [0, 0, 0]]], dtype=torch.bfloat16)
    logprobs = token_logprobs(logits, torch.tensor([[1, 0]]))
    assert logprobs.dtype == torch.float32
    close(logprobs, [[-0.0949229]])
    close(token_logprobs(logits, torch.tensor([[1, 0]]), temperature=0.7), [[-0.0271555]])
    assert masked(logits, torch.tensor(True)).dtype == torch.float32  # so are sums inside a mask


def test_huge_logits_do_not_overflow():
    """exp(1000) is inf, and a logprob of a hopeless token is just very negative."""
    logits = torch.tensor([[[1000.0, 0, -1000], [0, 0, 0]]])
    close(token_logprobs(logits, torch.tensor([[0, 0]])), [[0.0]])
    close(token_logprobs(logits, torch.tensor([[0, 2]])), [[-2000.0]])


# ---------------------------------------------------------------- sft_loss

def test_worked_example():
    """Two supervised tokens: (1.386294 + 0.470004) / 2 = 0.928149. Only the last one: 0.470004.
    The first token of a row is predicted by nothing, so its mask makes no difference.
    """
    close(sft_loss(LOGITS, TOKENS, torch.tensor([[False, True, True]])), 0.9281490)
    close(sft_loss(LOGITS, TOKENS, torch.tensor([[True, True, True]])), 0.9281490)
    close(sft_loss(LOGITS, TOKENS, torch.tensor([[False, False, True]])), 0.4700036)


def test_gradient_is_probability_minus_target():
    """Row 0 said (1/2, 1/4, 1/4), token 2 came: ((1/2, 1/4, 1/4) - (0, 0, 1)) / 2 tokens = (1/4, 1/8, -3/8).
    Row 1 said (1/8, 5/8, 2/8), token 1 came: ((1/8, 5/8, 2/8) - (0, 1, 0)) / 2 tokens = (1/16, -3/16, 1/8).
    """
    logits = LOGITS.clone().requires_grad_()
    sft_loss(logits, TOKENS, torch.tensor([[False, True, True]])).backward()
    close(logits.grad, [[[0.25, 0.125, -0.375], [0.0625, -0.1875, 0.125], [0.0, 0.0, 0.0]]])


def test_mistake_mean_of_means():
    """Row A: one token, loss ln 4. Row B: three tokens, loss ln 2 each. Their mean is (ln 4 + 3 ln 2) / 4 = 0.866434.
    The mean of the rows' means, (ln 4 + ln 2) / 2 = 1.039721, gives A's only token three times the weight of B's.
    """
    logits = torch.zeros(2, 4, 4)
    logits[1, :, 2:] = -100.0  # row B chooses between two tokens, row A between four
    tokens = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[False, True, False, False], [False, True, True, True]])
    close(sft_loss(logits, tokens, mask), 0.8664340)
    micro_batches = [sft_loss(logits[i : i + 1], tokens[i : i + 1], mask[i : i + 1]) for i in range(2)]
    close(sum(micro_batches) / 2, 1.0397208)
    close(sum(sft_loss(logits[i : i + 1], tokens[i : i + 1], mask[i : i + 1], n_tokens=4) for i in range(2)), 0.8664340)


@pytest.mark.parametrize("rows, size", [(8, 1), (7, 2), (7, 3)])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(rows, size):
    """8 x 1 equals 1 x 8; so do ragged lengths and a left-over micro-batch, with n_tokens of the whole step."""
    logits, tokens, mask = random_batch(rows)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    n_tokens = mask.sum()
    loss = sft_loss(whole, tokens, mask)
    loss.backward()
    total = 0.0
    for i in range(0, rows, size):
        part = sft_loss(parts[i : i + size], tokens[i : i + size], mask[i : i + size], n_tokens)
        part.backward()
        total += part.item()
    close(total, loss)
    close(parts.grad, whole.grad)


@pytest.mark.parametrize("n_tokens", [None, 0, torch.tensor(0), 5])
def test_nothing_to_learn_is_zero_and_not_nan(n_tokens):
    """A prompt longer than the limit leaves no supervised token. The mean over none is 0 / 0; here it is 0."""
    logits, tokens, mask = random_batch()
    logits.requires_grad_()
    loss = sft_loss(logits, tokens, torch.zeros_like(mask), n_tokens)
    loss.backward()
    close(loss, 0.0)
    close(logits.grad, torch.zeros_like(logits))
    mistake = -token_logprobs(logits, tokens)[torch.zeros_like(mask[:, 1:])].mean()
    assert mistake.isnan()


def test_padding_changes_nothing():
    """Three more columns of padding on the right, with any logits at all, inf and NaN included."""
    logits, tokens, mask = random_batch()
    padded = torch.cat([logits, torch.full((8, 3, 5), float("nan"))], dim=1)
    padded[:, -1] = float("inf")
    padded.requires_grad_()
    logits.requires_grad_()
    more = torch.zeros(8, 3, dtype=torch.long)
    loss = sft_loss(logits, tokens, mask)
    padded_loss = sft_loss(padded, torch.cat([tokens, more], 1), torch.cat([mask, more.bool()], 1))
    close(padded_loss, loss)
    loss.backward()
    padded_loss.backward()
    close(padded.grad[:, :6], logits.grad)
    close(padded.grad[:, 6:], torch.zeros(8, 3, 5))


def test_mistake_multiplying_by_the_mask():
    """NaN * 0 is NaN: one bad row of padding would spoil the whole batch."""
    logits = LOGITS.clone()
    logits[0, 1] = float("nan")
    mask = torch.tensor([[False, True, False]])
    assert (token_logprobs(logits, TOKENS) * mask[:, 1:]).sum().isnan()
    close(sft_loss(logits, TOKENS, mask), 1.3862944)


# ---------------------------------------------------------------- head_logprobs

def head_inputs(rows=3, length=7, width=4, vocabulary=11, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows, length), generator=g)


@pytest.fixture
def small_chunks(monkeypatch):
    """18 tokens in chunks of 5, 5, 5 and 3."""
    def chunks(hidden, weight):
        return [slice(i, i + 5) for i in range(0, hidden.shape[0], 5)]
    monkeypatch.setattr(logprobs._HeadLogprobs, "chunks", staticmethod(chunks))


def test_head_worked_example():
    """hidden 1 times the weights ln(2, 1, 1) is row 0 of the first example, times ln(1, 5, 2) would be row 1.
    With D = 2 both stand in one weight matrix: hidden (1, 0) picks the first column, (0, 1) the second.
    """
    weight = torch.tensor([[2.0, 1], [1, 5], [1, 2]]).log()
    hidden = torch.tensor([[[1.0, 0], [0, 1], [0, 0]]])
    close(head_logprobs(hidden, weight, TOKENS), [[-1.3862944, -0.4700036]])
    close(head_logprobs(hidden, weight, TOKENS, temperature=2.0), [[-1.2279472, -0.7322088]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.5])
def test_head_equals_its_plain_twin(small_chunks, dtype, temperature):
    """Same logprobs, same gradients, but never all the logits."""
    hidden, weight, tokens = head_inputs(dtype=dtype)
    factors = torch.linspace(-1, 1, 18, dtype=dtype).view(3, 6)
    logprobs = head_logprobs(hidden, weight, tokens, temperature)
    (logprobs * factors).sum().backward()
    twin_hidden, twin_weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    twin = token_logprobs(twin_hidden @ twin_weight.T, tokens, temperature)
    (twin * factors).sum().backward()
    close(logprobs, twin)
    close(hidden.grad, twin_hidden.grad)
    close(weight.grad, twin_weight.grad)


def test_head_gradient_equals_finite_differences(small_chunks):
    hidden, weight, tokens = head_inputs()
    assert torch.autograd.gradcheck(lambda h, w: head_logprobs(h, w, tokens, 1.3), (hidden, weight))


@pytest.mark.parametrize("trained", ["hidden", "weight", "none"])
def test_head_with_a_part_frozen(trained):
    """LoRA freezes the head; a linear probe freezes all but the head; evaluation freezes both."""
    hidden, weight, tokens = head_inputs()
    h, w = hidden.detach().requires_grad_(trained == "hidden"), weight.detach().requires_grad_(trained == "weight")
    logprobs = head_logprobs(h, w, tokens)
    assert logprobs.requires_grad == (trained != "none")
    if trained != "none":
        logprobs.sum().backward()
        token_logprobs(hidden @ weight.T, tokens).sum().backward()
        ours, expected, frozen = (h, hidden, w) if trained == "hidden" else (w, weight, h)
        close(ours.grad, expected.grad)
        assert frozen.grad is None


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


class NoWaiting(TorchDispatchMode):
    """An error for what a GPU would have to be waited for: a tensor's number, or how many rows a mask picks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(x.dtype == torch.bool for x in args[1] if x is not None)
        if by_mask or func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
            raise RuntimeError(f"{func} waits")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device, compiled, vocabulary, rows", [
    ("cpu", False, 1024, 2048), ("cpu", True, 1024, 2048), ("meta", False, 1024, 16384), ("meta", True, 8192, 16384),
    ("cpu", False, 100_000, 512), ("meta", True, 1_000_000, 512)])
def test_how_many_rows_a_chunk_has(monkeypatch, device, compiled, vocabulary, rows):
    """2^21 logits on a CPU (8 MiB in float32), 2^24 elsewhere (64 MiB), 2^27 where they are compiled, and at least 512
    rows."""
    monkeypatch.setattr(logprobs, "compiled", compiled)
    hidden, weight = torch.empty(40_000, 1, device=device), torch.empty(vocabulary, 1)
    chunks = logprobs._HeadLogprobs.chunks(hidden, weight)
    assert chunks[:2] == [slice(0, rows), slice(rows, 2 * rows)] and chunks[-1].start < 40_000 <= chunks[-1].stop


def test_head_never_holds_all_the_logits(monkeypatch):
    """2 x 1025 tokens, vocabulary 300: all logits are 614,400 numbers. In chunks of 512 tokens the largest tensor is
    512 x 300 = 153,600 numbers; four times the tokens do not make it larger. The plain twin holds them all.
    """
    monkeypatch.setitem(logprobs.LOGITS_PER_CHUNK, "cpu", 1)
    largest = {}
    for length in (1025, 4097):
        for function in (head_logprobs, lambda h, w, t: token_logprobs(h @ w.T, t)):
            hidden, weight, tokens = head_inputs(2, length, 4, 300, torch.float32)
            with LargestTensor() as mode:
                function(hidden, weight, tokens).sum().backward()
            largest[function is head_logprobs, length] = mode.largest
    assert largest[True, 1025] == largest[True, 4097] == 512 * 300
    assert largest[False, 1025] >= 2 * 1024 * 300


def test_logits_kept_for_the_backward_pass_change_no_bit(small_chunks, monkeypatch):
    """18 tokens, one of them masked by the loss and NaN: the same gradients whether the logits are kept or made again,
    and once more from the same graph, where those that were kept are gone.
    """
    gradients = []
    for kept in (0, logprobs.LOGITS_KEPT):
        monkeypatch.setattr(logprobs, "LOGITS_KEPT", kept)
        hidden, weight, tokens = head_inputs(dtype=torch.float32)
        with torch.no_grad():
            hidden[0, 1] = float("nan")
        mask = torch.ones(3, 6, dtype=torch.bool)
        mask[0, 1] = False
        loss = torch.where(mask, head_logprobs(hidden, weight, tokens), 0.0).sum()
        for _ in range(2):
            gradients.append(torch.autograd.grad(loss, (hidden, weight), retain_graph=True))
    for others in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], others))
    assert gradients[0][1].isfinite().all()


@pytest.mark.parametrize("how", ["bf16 tensors", "autocast"])
def test_head_in_bf16_takes_the_softmax_in_float32(how):
    """Small whole numbers are exact in bf16, so the logits are too; what follows must not be rounded to 8 bits:
    hidden (2, 1) times the weights (1, 1), (0, 1), (1, -1) gives the logits 3, 1, 1, and the first has probability
    e^2 / (e^2 + 2) = 0.786986, ln = -0.239545.
    """
    dtype = torch.bfloat16 if how == "bf16 tensors" else torch.float32
    hidden = torch.tensor([[[2.0, 1.0], [0.0, 0.0]]], dtype=dtype)
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, -1.0]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        logprobs = head_logprobs(hidden, weight, torch.tensor([[1, 0]]))
    assert logprobs.dtype == torch.float32
    close(logprobs, [[-0.2395448]])
    logprobs.sum().backward()
    assert weight.grad.dtype == dtype


def test_under_autocast_the_head_multiplies_in_bf16():
    """1 + 1/256 is 1 in bf16. Logits 1 and 0: ln of e / (e + 1) = -0.313262, where float32 gives -0.312213."""
    hidden, weight = torch.tensor([[[1.00390625], [0.0]]]), torch.tensor([[1.0], [0.0]])
    tokens = torch.tensor([[1, 0]])
    close(head_logprobs(hidden, weight, tokens), [[-0.3122126]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(head_logprobs(hidden, weight, tokens), [[-0.3132617]])


@pytest.mark.parametrize("rows, length", [(2, 1), (2, 0), (0, 0)])
def test_rows_of_less_than_two_tokens_have_no_logprobs(rows, length):
    """The first token of a row is predicted by nothing."""
    tokens = torch.zeros(rows, length, dtype=torch.long)
    assert token_logprobs(torch.zeros(rows, length, 9), tokens).shape == (rows, 0)
    assert head_logprobs(torch.zeros(rows, length, 4), torch.zeros(9, 4), tokens).shape == (rows, 0)


@pytest.mark.parametrize("dtype, expected", [(torch.float32, 81_664.0), (torch.bfloat16, 81_920.0)])
def test_head_sums_the_weight_gradient_in_float32(monkeypatch, dtype, expected):
    """64 chunks of 512 tokens, hidden states of 1, two tokens equally likely: each token adds (1/2, -1/2), a chunk 256.
    The first chunk counts 256 times: 65,536. In bf16 65,536 + 256 is 65,536 again, and the other 63 chunks would be
    lost; the gradient is 65,536 + 63 x 256 = 81,664. A weight in bf16 gets that number, rounded once: 81,920.
    """
    monkeypatch.setitem(logprobs.LOGITS_PER_CHUNK, "cpu", 1)
    hidden = torch.ones(1, 64 * 512 + 1, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    result = head_logprobs(hidden, weight, torch.zeros(1, 64 * 512 + 1, dtype=torch.long))
    result.backward(torch.where(torch.arange(64 * 512) < 512, 256.0, 1.0)[None])
    close(weight.grad, [[expected], [-expected]])
    big = torch.tensor(65536.0, dtype=torch.bfloat16)
    assert big + 256 == big


def test_head_ignores_tokens_that_the_loss_masks():
    """A hidden state of NaN where nothing is trained changes no gradient."""
    hidden, weight, tokens = head_inputs()
    mask = torch.arange(6) < torch.tensor([[2], [6], [4]])
    broken = hidden.detach().clone()
    broken[:, :-1][~mask] = float("nan")
    broken.requires_grad_()
    twin = weight.detach().clone().requires_grad_()
    torch.where(mask, head_logprobs(broken, twin, tokens), 0.0).sum().backward()
    torch.where(mask, head_logprobs(hidden, weight, tokens), 0.0).sum().backward()
    close(twin.grad, weight.grad)
    close(broken.grad, hidden.grad)


@pytest.mark.parametrize("picks, targets", [
    (True, None), (False, None), (False, [1, 2, 8, 9, 10, 11, 12, 13]), (True, [1, 2, 8, 9, 10, 11, 12, 13])])
def test_head_makes_only_the_logits_that_are_asked_for(monkeypatch, picks, targets):
    """With a mask: the same values and gradients as masking afterwards, NaN outside it no matter, and 0 where nothing
    is asked. Also where, as on a GPU, all logits are made, since to count those asked for would be to wait, unless it
    is told which they are: 2 tokens of the first row of 7, and 6 of the second."""
    monkeypatch.setattr(logprobs, "_picks_rows", lambda x: picks)
    hidden, weight, tokens = head_inputs()
    mask = torch.arange(6) < torch.tensor([[2], [6], [0]])
    targets = targets and torch.tensor(targets)
    broken = hidden.detach().clone()
    broken[:, :-1][~mask] = float("nan")
    broken.requires_grad_()
    twin = weight.detach().clone().requires_grad_()
    scale = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    asked = head_logprobs(broken, twin, tokens, 1.3, mask, targets)
    masked = torch.where(mask, head_logprobs(hidden, weight, tokens, 1.3), 0.0)
    close(asked, masked)
    (asked * scale).sum().backward()
    (masked * scale).sum().backward()
    close(twin.grad, weight.grad)
    close(broken.grad, hidden.grad)


@pytest.fixture
def counted(monkeypatch):
    """The head is compiled, by a backend that counts the programs and runs them as they are."""
    counter, compile_it = CompileCounter(), torch.compile
    torch.compiler.reset()
    logprobs._program.cache_clear()
    monkeypatch.setattr(logprobs, "_is_compiled", lambda x: True)
    monkeypatch.setattr(torch, "compile", lambda function: compile_it(function, backend=counter, fullgraph=True))
    yield counter
    logprobs._program.cache_clear()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_compiled_head_is_two_programs_and_equals_its_plain_twin(small_chunks, monkeypatch, counted, temperature):
    """Whatever the number of tokens, in training and in evaluation, summed or not: 18 tokens in chunks of 5, 5, 5 and
    3, then 5 and 2, then 5, 5 and a single one, which is left out, then none. The entropy is a third program."""
    for rows, length, programs in ((3, 7, 2), (1, 8, 2), (1, 12, 2), (1, 1, 2)):
        found = []
        for compiled in (True, False):
            monkeypatch.setattr(logprobs, "_is_compiled", lambda x, compiled=compiled: compiled)
            hidden, weight, tokens = head_inputs(rows, length, dtype=torch.float32)
            result = head_logprobs(hidden, weight, tokens, temperature)
            result.sum().backward()
            (head_logprobs(hidden, weight, tokens, temperature) * torch.arange(rows * (length - 1)).view(rows, -1)
             ).sum().backward()
            with torch.no_grad():
                assert torch.equal(head_logprobs(hidden, weight, tokens, temperature), result)
            found.append((result, hidden.grad, weight.grad))
        assert all(torch.equal(one, other) for one, other in zip(*found))
        assert counted.frame_count == programs
    hidden, weight, _ = head_inputs(dtype=torch.float32)
    entropies = []
    for compiled in (True, False):
        monkeypatch.setattr(logprobs, "_is_compiled", lambda x, compiled=compiled: compiled)
        entropies.append(head_entropy(hidden, weight, torch.ones(3, 6, dtype=torch.bool), temperature))
    assert torch.equal(*entropies) and counted.frame_count == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows, temperature", [(64, 1.0), (40, 1.0), (40, 0.7)])
def test_the_compiled_head_equals_its_plain_twin_on_a_gpu(monkeypatch, rows, temperature):
    """In bf16, whose rounding is the difference: it is 2^-8 of a number."""
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(logprobs, "compiled", compiled)
        hidden, weight, tokens = head_inputs(rows, 100, 64, 3000, torch.float32)
        hidden, weight = (x.detach().cuda().requires_grad_() for x in (hidden, weight))
        with torch.autocast("cuda", torch.bfloat16):
            result = head_logprobs(hidden, weight, tokens.cuda(), temperature)
            result.mean().backward()
        found.append((result, hidden.grad, weight.grad))
    for one, other in zip(*found):
        assert (one - other).norm() < 2**-8 * other.norm()


# ---------------------------------------------------------------- linear_cross_entropy

@pytest.mark.parametrize("n_tokens", [None, 40])
def test_the_loss_from_hidden_states_equals_its_plain_twin(small_chunks, n_tokens):
    hidden, weight, tokens = head_inputs()
    mask = torch.arange(7) < torch.tensor([[2], [7], [4]])
    twin_hidden, twin_weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss, twin = linear_cross_entropy(hidden, weight, tokens, mask, n_tokens), sft_loss(twin_hidden @ twin_weight.T,
                                                                                        tokens, mask, n_tokens)
    close(loss, twin)
    loss.backward()
    twin.backward()
    close(hidden.grad, twin_hidden.grad)
    close(weight.grad, twin_weight.grad)


@pytest.mark.parametrize("targets", [[], [5], [1, 2, 5, 8, 9, 20]])
def test_on_a_gpu_the_targets_are_told_and_only_their_logits_are_made(monkeypatch, targets):
    """The same loss and gradients as from the mask, of 3 rows of 7."""
    monkeypatch.setattr(logprobs, "_picks_rows", lambda x: False)  # as on a GPU
    hidden, weight, tokens = head_inputs()
    mask, targets = torch.zeros(21, dtype=torch.bool), torch.tensor(targets, dtype=torch.long)
    mask[targets] = True
    twin_hidden, twin_weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, tokens, mask.view(3, 7), targets=targets)
    twin = sft_loss(twin_hidden @ twin_weight.T, tokens, mask.view(3, 7))
    close(loss, twin)
    loss.backward()
    twin.backward()
    close(hidden.grad, twin_hidden.grad)
    close(weight.grad, twin_weight.grad)

    large, weight, tokens = head_inputs(2, 1025, 4, 300, torch.float32)
    mask = torch.zeros(2, 1025, dtype=torch.bool)
    mask[1, 7:12] = True
    with LargestTensor() as mode:
        linear_cross_entropy(large, weight, tokens, mask, 5, torch.arange(1032, 1037)).backward()
        head_logprobs(large, weight, tokens, 1.0, mask[:, 1:], torch.arange(1032, 1037)).sum().backward()
        head_entropy(large, weight, mask[:, 1:], 1.0, torch.arange(1032, 1037))
    assert mode.largest == large.numel()


def test_the_loss_from_hidden_states_makes_no_logits_that_nobody_asks_for():
    """Of 2 x 1025 tokens 5 are supervised: 5 x 300 logits, fewer numbers than the hidden states have."""
    hidden, weight, tokens = head_inputs(2, 1025, 4, 300, torch.float32)
    mask = torch.zeros(2, 1025, dtype=torch.bool)
    mask[1, 7:12] = True
    with LargestTensor() as mode:
        linear_cross_entropy(hidden, weight, tokens, mask).backward()
    assert mode.largest == hidden.numel() > 5 * 300


def test_on_a_gpu_nothing_is_waited_for(monkeypatch):
    """Neither for how many tokens a mask picks, nor for a number to divide by. Any integers will do for tokens."""
    monkeypatch.setattr(logprobs, "_picks_rows", lambda x: False)  # as on a GPU
    hidden, weight, tokens = head_inputs()
    mask, targets = torch.zeros(3, 7, dtype=torch.bool), torch.tensor([1, 2, 5, 8, 9, 20])
    mask.view(-1)[targets] = True
    twin = sft_loss(hidden @ weight.T, tokens, mask, n_tokens=40)
    with NoWaiting():
        for told in (None, targets):
            head_logprobs(hidden, weight, tokens.short(), 1.0, mask[:, 1:], told).sum().backward()
            head_entropy(hidden, weight, mask[:, 1:], 1.0, told)
        losses = [sft_loss(hidden @ weight.T, tokens.short(), mask),
                  linear_cross_entropy(hidden, weight, tokens.short(), mask),
                  linear_cross_entropy(hidden, weight, tokens.short(), mask, targets=targets)]
        counted = linear_cross_entropy(hidden, weight, tokens.short(), mask, 40, targets)
    for loss in losses:
        close(loss, twin * 40 / 6)
    close(counted, twin)
    for mistake in (lambda: hidden[mask], lambda: mask.nonzero(), lambda: max(mask.sum(), 1)):
        with pytest.raises(RuntimeError, match="waits"), NoWaiting():
            mistake()


def test_the_loss_from_hidden_states_ignores_what_is_masked():
    """NaN outside the mask changes nothing; with no token inside it the loss is 0, and so is its gradient."""
    hidden, weight, tokens = head_inputs()
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 1] = True
    broken = hidden.detach().clone()
    broken[1:], broken[0, 1:] = float("nan"), float("inf")
    broken.requires_grad_()
    close(linear_cross_entropy(broken, weight, tokens, mask), sft_loss(hidden @ weight.T, tokens, mask))
    linear_cross_entropy(broken, weight, tokens, mask).backward()
    assert broken.grad.isfinite().all() and weight.grad.isfinite().all()
    empty = linear_cross_entropy(hidden, weight, tokens, torch.zeros_like(mask))
    empty.backward()
    assert empty == 0 and not hidden.grad.any()


@pytest.mark.parametrize("picks, largest", [(True, 2 * 1025 * 4), (False, 512 * 300)])
def test_the_entropy_makes_no_logits_that_nobody_asks_for(monkeypatch, picks, largest):
    """Of 2 x 1024 distributions 5 are asked for: 5 x 300 logits, fewer numbers than the hidden states have. As on a GPU
    all of them, but 512 at a time.
    """
    monkeypatch.setattr(logprobs, "_picks_rows", lambda x: picks)
    monkeypatch.setitem(logprobs.LOGITS_PER_CHUNK, "cpu", 1)
    mask = torch.zeros(2, 1024, dtype=torch.bool)
    mask[1, 7:12] = True
    with LargestTensor() as mode:
        close(head_entropy(torch.zeros(2, 1025, 4), torch.zeros(300, 4), mask), 5.7037825)  # ln 300
    assert mode.largest == largest


def test_the_entropy_of_half_precision_is_in_float32():
    """Logits 3, 1, 1 as above: -0.786986 ln 0.786986 - 2 x 0.106507 ln 0.106507 = 0.665572."""
    hidden = torch.tensor([[[2.0, 1.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, -1.0]])
    close(head_entropy(hidden, weight, torch.tensor([[True]])), 0.6655724)
    close(head_entropy(torch.ones(1, 2, 1), torch.tensor([[2.0], [0.0], [0.0]]), torch.tensor([[True]])), 0.6655724)


# ---------------------------------------------------------------- for all of them

def test_inputs_are_left_alone():
    logits, tokens, mask = random_batch()
    hidden, weight, ids = head_inputs()
    inputs = [logits.requires_grad_(), tokens, mask, hidden, weight, ids]
    before = [x.detach().clone() for x in inputs]
    (token_logprobs(logits, tokens, 0.5).sum() + sft_loss(logits, tokens, mask)).backward()
    head_logprobs(hidden, weight, ids, 0.5).sum().backward()
    linear_cross_entropy(hidden, weight, ids, ids > 0).backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


@pytest.mark.parametrize("call", [
    lambda: token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long)),
    lambda: token_logprobs(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)),
    lambda: token_logprobs(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)),
    lambda: token_logprobs(torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, dtype=torch.long)),
    lambda: token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 3)),
    lambda: token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool)),
    lambda: token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), temperature=0.0),
    lambda: head_logprobs(torch.zeros(2, 3, 4), torch.zeros(4, 9), torch.zeros(2, 3, dtype=torch.long)),
    lambda: head_logprobs(torch.zeros(2, 3, 4), torch.zeros(9, 4, 2), torch.zeros(2, 3, dtype=torch.long)),
    lambda: head_logprobs(torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 2, dtype=torch.long)),
    lambda: head_logprobs(torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.long), 0.0),
    lambda: head_logprobs(torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.long),
                          mask=torch.ones(2, 2)),
    lambda: head_logprobs(torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.long),
                          mask=torch.ones(2, 3, dtype=torch.bool)),
    lambda: linear_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(4, 9), torch.zeros(2, 3, dtype=torch.long),
                                 torch.ones(2, 3, dtype=torch.bool)),
    lambda: linear_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.long),
                                 torch.ones(2, 3)),
    lambda: sft_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)),
    lambda: sft_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool)),
    lambda: sft_loss(torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)),
])
def test_wrong_shapes_and_types_are_refused_in_one_line(call):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weight, mask", [
    (torch.zeros(4, 9), torch.ones(2, 3, dtype=torch.bool)), (torch.zeros(9, 4), torch.ones(2, 3)),
    (torch.zeros(9, 4), torch.ones(2, 2, dtype=torch.bool))])
def test_they_are_refused_as_well_where_the_targets_are_told(monkeypatch, weight, mask):
    """Also a mask that the targets make superfluous."""
    monkeypatch.setattr(logprobs, "_picks_rows", lambda x: False)  # as on a GPU
    with pytest.raises(ValueError):
        linear_cross_entropy(torch.zeros(2, 3, 4), weight, torch.zeros(2, 3, dtype=torch.long), mask,
                             targets=torch.tensor([1]))


def test_a_count_on_a_gpu_stays_there():
    """The device "meta" has no numbers, so to ask for one is an error: the count is at least 1 without asking."""
    assert denominator(torch.zeros((), device="meta"), None).device.type == "meta"


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. TOKENS: `[[0, 2, 1]]` -> `[[0, 0, 1]]`. What is the loss in test_worked_example?
# 2. test_temperature_divides_the_logits_and_not_the_logprobs: `temperature=2.0` -> `temperature=0.5`. Which of the
#    two tokens gains, and why?
