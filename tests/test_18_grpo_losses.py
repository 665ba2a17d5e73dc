"""Chapter 18: reinforcement learning without a critic. Group advantages, the KL estimators, GRPO, Dr. GRPO and DAPO.

Code: minillm/losses.py, used by train_grpo.py.

Ask the same question several times. Answers better than the group's mean are made more probable, worse ones less; a
clip keeps each step small, and a KL term keeps the policy near its reference. The three losses differ in two places
only: what the sum over tokens is divided by, and how far up the clip lets a token go.

After this chapter you can turn the rewards of a group into advantages, say which tokens the clip stops, and tell k1
from k3 by their signs.

Drawn in tests/figures/group.svg.
"""

import pytest
import torch

from minillm.losses import dapo_loss, dr_grpo_loss, group_advantages, grpo_loss, kl_k1, kl_k3
from tests.helpers import close

LN2, LN3_2 = 0.6931471805599453, 0.4054651081081644  # ln 2 and ln 3/2


def dr_grpo(logprobs, old, ref, advantages, mask, **options):
    """With a length limit of 8 tokens, so that all three take the same arguments."""
    return dr_grpo_loss(logprobs, old, ref, advantages, mask, 8, **options)


grpo, dapo = grpo_loss, dapo_loss
THREE = [grpo, dr_grpo, dapo]


def random_rollout(rows=7, length=6, seed=0):
    """Answers of 1 to 6 tokens with padding on the right; policy, old policy and reference differ a little."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=g)
    logprobs, ref = (old + 0.3 * torch.randn(rows, length, generator=g) for _ in range(2))
    mask = torch.arange(length) <= torch.arange(rows)[:, None] % length
    return logprobs, old, ref, torch.randn(rows, generator=g), mask


# ---------------------------------------------------------------- group_advantages

def test_advantages_worked_example():
    """Four answers, two right: mean 1/2, std = sqrt(4 x 1/4 / 3) = 0.577350, so 0.5 / (0.577350 + 0.0001) = 0.865875.
    Four answers, one scores 4: mean 1, std = sqrt((1 + 1 + 1 + 9) / 3) = 2, so -1 / 2.0001 and 3 / 2.0001.
    """
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    close(group_advantages(rewards), [[0.8658754, -0.8658754, -0.8658754, 0.8658754],
                                      [-0.4999750, -0.4999750, -0.4999750, 1.4999250]])
    with pytest.raises(AssertionError):  # without Bessel's correction it would be 0.5 / 0.5001
        close(group_advantages(rewards)[0, 0], 0.9998000)


def test_equal_rewards_give_advantage_zero():
    """All right or all wrong: nothing to learn. Without the small constant it would be 0 / 0. And the float32 mean of
    eight times 0.7 is not 0.7: divided by that constant, the rounding error would become an advantage. So rewards are
    measured from the first of their group before the mean is taken: equal ones are then 0, whatever their value.
    """
    rewards = torch.tensor([[0.7] * 8, [0.0] * 8, [1.0] * 8])
    assert torch.equal(group_advantages(rewards), torch.zeros(3, 8))
    for size in range(2, 20):
        assert torch.equal(group_advantages(torch.full((1, size), -1 / 3)), torch.zeros(1, size))
    centred = rewards - rewards.mean(1, keepdim=True)
    assert (centred / centred.std(1, keepdim=True))[1].isnan().all()
    assert (centred / (centred.std(1, keepdim=True) + 1e-4))[0].abs().max() > 5e-4


def test_advantages_see_differences_within_the_group_only():
    """Harder prompts (lower rewards throughout) get the same advantages, in any order, whatever the other groups."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(3, 4, generator=g, dtype=torch.float64)
    advantages = group_advantages(rewards)
    close(group_advantages(rewards - torch.tensor([[0.0], [5.0], [100.0]])), advantages)
    close(group_advantages(rewards[[2]]), advantages[[2]])
    close(group_advantages(rewards.flip(1)), advantages.flip(1))
    close(advantages.sum(1), torch.zeros(3))


def test_advantages_are_constants_in_float32():
    """A reward model's scores may carry a graph: no gradient may flow into it. And 3, 0, 0, 0 in bf16 is mean 0.75, std
    1.5: 2.25 / 1.5001 = 1.499900, which bf16 would round to 1.5.
    """
    rewards = torch.tensor([[3.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    advantages = group_advantages(rewards)
    assert not advantages.requires_grad and advantages.dtype == torch.float32
    close(advantages, [[1.4999000, -0.4999667, -0.4999667, -0.4999667]])


def test_a_group_of_one_is_refused():
    """Compared with itself an answer is always average, and the std of one number is NaN."""
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.tensor([[1.0], [0.0]]))


def test_mistake_the_advantage_overwrites_the_reward():
    """In-place arithmetic would leave the caller with rewards of mean 0 to log: no progress to be seen."""
    rewards = torch.tensor([[1.0, 0.0]])
    group_advantages(rewards)
    assert torch.equal(rewards, torch.tensor([[1.0, 0.0]]))


# ---------------------------------------------------------------- KL

def test_kl_worked_example():
    """The policy says 1/2, the reference 1/4: k1 = ln 2 = 0.693147, k3 = 1/2 - 1 + ln 2 = 0.193147.
    The other way round: k1 = -ln 2, but k3 = 2 - 1 - ln 2 = 0.306853: a k3 is never negative.
    """
    logprobs, ref = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    close(kl_k1(logprobs, ref), [0.6931472, -0.6931472])
    close(kl_k3(logprobs, ref), [0.1931472, 0.3068528])


def test_kl_in_half_precision_is_computed_in_float32():
    """-8 and -0.01171875 are exact in bf16. Their difference, -7.98828125, would be rounded to -8, and k3 would say
    e^8 - 1 - 8 = 2972.0 instead of 2937.2. The other way round it is e^-7.98828 - 1 + 7.98828 = 6.988621.
    """
    logprobs, ref = torch.tensor([-8.0, -0.01171875], dtype=torch.bfloat16).split(1)
    assert kl_k1(logprobs, ref).dtype == kl_k3(logprobs, ref).dtype == torch.float32
    close(kl_k1(logprobs, ref), [-7.9882812])
    close(kl_k3(ref, logprobs), [6.9886206])
    close(kl_k3(logprobs, ref) / 1000, [2.9372405])
    with pytest.raises(AssertionError):  # subtracted in bf16
        close(kl_k3(ref - logprobs, torch.zeros(1)), [6.9886206])


def test_both_estimators_are_right_on_average():
    """Policy (1/2, 1/2), reference (1/4, 3/4): KL(policy || ref) = 1/2 ln 2 + 1/2 ln 2/3 = 0.143841. The policy samples
    both tokens equally often, so the plain mean over both must be that. KL(ref || policy) = 0.130812 is another number,
    and with the arguments exchanged k1 comes out negative: a KL logged like that seems to fall as the policy drifts.
    """
    logprobs, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    close(kl_k1(logprobs, ref).mean(), 0.1438410)
    close(kl_k3(logprobs, ref).mean(), 0.1438410)
    close(kl_k1(ref, logprobs).mean(), -0.1438410)


def test_k3_gradient():
    """d k3 / d logprobs = 1 - exp(ref - logprobs): 0 where they agree, 1/2 where the policy is twice as sure, -1 where
    it is half as sure. It always pulls back; k1's gradient is 1 everywhere and pulls nowhere.
    """
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    kl_k3(logprobs, torch.tensor([-1.0, -1.0 - LN2, -1.0 + LN2])).sum().backward()
    close(logprobs.grad, [0.0, 0.5, -1.0])


def test_k3_keeps_its_digits_where_policy_and_reference_nearly_agree():
    """x = 0.0001: k3 = x^2/2 + x^3/6 + x^4/24 + ... = 5.000166670833e-9. Written as exp(x) - 1 - x it loses its digits
    to the 1: in float32 all of them, in float64 half.
    """
    x = torch.tensor(1e-4, dtype=torch.float64)
    close(kl_k3(torch.zeros_like(x), x) * 1e9, 5.000166670833417)
    with pytest.raises(AssertionError):
        close((x.exp() - 1 - x) * 1e9, 5.000166670833417)
    assert (x.float().exp() - 1 - x.float()).abs() > 2 * 5e-9


# ---------------------------------------------------------------- the three losses

def worked_example():
    """Answer 1 (advantage 1) has two tokens with ratios 3/2 and 1/2; answer 2 (advantage -1) one token with ratio 3/2,
    then padding. The reference finds every token twice as probable as the policy.
    """
    old = torch.full((2, 2), -2.0)
    logprobs = torch.tensor([[-2 + LN3_2, -2 - LN2], [-2 + LN3_2, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    return logprobs, old, logprobs.detach() + LN2, torch.tensor([1.0, -1.0]), mask


def test_grpo_worked_example():
    """clip_eps 0.2. Answer 1: min(3/2, 1.2) = 1.2 and min(1/2, 0.8) = 1/2, mean 0.85, loss -0.85.
    Answer 2: min(-3/2, -1.2) = -3/2, loss 1.5. Mean over answers: (1.5 - 0.85) / 2 = 0.325.
    KL: k3 = 2 - 1 - ln 2 = 0.306853 at every token; beta 0.1 adds 0.030685, whatever the ratio.
    One of three tokens is clipped; mean ratio (1.5 + 0.5 + 1.5) / 3 = 1.166667;
    KL(old || new) by k3: (ratio - 1 - ln ratio) = 0.094535, 0.193147, 0.094535, mean 0.127406.
    """
    logprobs, old, ref, advantages, mask = worked_example()
    close(grpo_loss(logprobs, old, None, advantages, mask, beta=0.0)[0], 0.325)
    loss, stats = grpo_loss(logprobs, old, ref, advantages, mask, beta=0.1)
    close(loss, 0.3556853)
    assert set(stats) == {"approx_kl", "clip_fraction", "ratio_mean", "kl"}
    assert all(x.dim() == 0 and not x.requires_grad for x in stats.values())
    close(stats["kl"], 0.3068528)
    close(stats["clip_fraction"], 1 / 3)
    close(stats["ratio_mean"], 1.1666667)
    close(stats["approx_kl"], 0.1274057)


def test_dr_grpo_and_dapo_worked_example():
    """The same tokens. Dr. GRPO with a limit of 4 tokens: (-1.2 - 0.5 + 1.5) / (2 x 4) = -0.025.
    DAPO lets a good token go up to 1.28: (-1.28 - 0.5 + 1.5) / 3 tokens = -0.093333.
    """
    logprobs, old, ref, advantages, mask = worked_example()
    loss, stats = dr_grpo_loss(logprobs, old, None, advantages, mask, max_response_tokens=4)
    close(loss, -0.025)
    assert set(stats) == {"approx_kl", "clip_fraction", "ratio_mean"}
    close(dapo_loss(logprobs, old, None, advantages, mask)[0], -0.0933333)
    close(dapo_loss(logprobs, old, None, advantages, mask, clip_eps_high=0.2)[0], -0.0666667)


def test_ratio_one_gives_the_reinforce_gradient():
    """On the first update the policy is still the old one: nothing is clipped and d loss / d logprob = -advantage times
    the weight of the token. Answer 1 (advantage 1) has one token, answer 2 (advantage -1) has three, the limit is 8.
    GRPO: 1/1 x 1/2 and 1/3 x 1/2; Dr. GRPO: 1 / (2 x 8) for all; DAPO: 1/4 for all.
    In GRPO each token of the long wrong answer is punished a third as much: that is its length bias.
    """
    old = torch.full((2, 3), -1.0)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    for loss, good, bad in [(grpo, -0.5, 1 / 6), (dr_grpo, -0.0625, 0.0625), (dapo, -0.25, 0.25)]:
        logprobs = old.clone().requires_grad_()
        value, stats = loss(logprobs, old, None, torch.tensor([1.0, -1.0]), mask, beta=0.0)
        value.backward()
        close(logprobs.grad, [[good, 0.0, 0.0], [bad, bad, bad]])
        assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0 and stats["clip_fraction"] == 0


# What a single token contributes, and its slope with respect to the logprob (which is ratio x advantage, or 0 when
# clipped). Where the policy has gone too far already the slope is 0; where it went the wrong way it is never cut.
QUADRANTS = [
    # ratio, advantage, loss,  slope
    (1.5, 1.0, -1.2, 0.0),   # good token, already much more probable: enough
    (0.5, 1.0, -0.5, -0.5),  # good token that became less probable: push
    (1.5, -1.0, 1.5, 1.5),   # bad token that became more probable: push
    (0.5, -1.0, 0.8, 0.0),   # bad token, already much less probable: enough
    (1.1, 1.0, -1.1, -1.1),  # inside the clip nothing is cut
    (0.9, -1.0, 0.9, 0.9),
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("loss", [grpo, dr_grpo, dapo])
@pytest.mark.parametrize("ratio, advantage, value, slope", QUADRANTS)
def test_four_quadrants(loss, ratio, advantage, value, slope):
    scale = 8 if loss is dr_grpo else 1  # one answer of one token; Dr. GRPO divides by the limit of 8
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    eps = {"clip_eps_low": 0.2, "clip_eps_high": 0.2} if loss is dapo else {}
    inputs = logprobs, torch.zeros(1, 1), None, torch.tensor([advantage]), torch.tensor([[True]])
    actual, stats = loss(*inputs, beta=0.0, **eps)
    actual.backward()
    close(actual * scale, value)
    close(logprobs.grad * scale, [[slope]])
    close(stats["clip_fraction"], float(slope == 0.0 and advantage != 0))


@pytest.mark.parametrize("ratio, advantage, value, slope", [
    (1.25, 1.0, -1.25, -1.25), (1.5, 1.0, -1.28, 0.0), (0.7, -1.0, 0.8, 0.0), (0.85, -1.0, 0.85, 0.85)])
def test_dapo_clips_higher(ratio, advantage, value, slope):
    """1 + 0.28 above and 1 - 0.2 below: a token at ratio 1.25, where GRPO has stopped, still grows."""
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    loss, _ = dapo_loss(logprobs, torch.zeros(1, 1), None, torch.tensor([advantage]), torch.tensor([[True]]))
    loss.backward()
    close(loss, value)
    close(logprobs.grad, [[slope]])


@pytest.mark.parametrize("loss", THREE)
@pytest.mark.parametrize("ratio, advantage, value, slope", [
    (1.15, 1.0, -1.1, 0.0), (0.65, -1.0, 0.7, 0.0), (1.05, 1.0, -1.05, -1.05), (0.75, -1.0, 0.75, 0.75)])
def test_clip_eps_counts_in_both_directions(loss, ratio, advantage, value, slope):
    """At most 1 + 0.1 upwards and 1 - 0.3 downwards; grpo and dr_grpo have one clip_eps for both."""
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    inputs = logprobs, torch.zeros(1, 1), None, torch.tensor([advantage]), torch.tensor([[True]])
    if loss is dapo:
        actual, _ = dapo_loss(*inputs, clip_eps_low=0.3, clip_eps_high=0.1)
    else:
        actual, _ = loss(*inputs, clip_eps=0.1 if advantage > 0 else 0.3, beta=0.0)
    scale = 8 if loss is dr_grpo else 1
    actual.backward()
    close(actual * scale, value)
    close(logprobs.grad * scale, [[slope]])


@pytest.mark.parametrize("loss", THREE)
def test_mistake_clipping_without_the_minimum(loss):
    """A bad token whose ratio rose to 1.5. Clipping alone (or a maximum where the advantage is negative) gives 1.2 with
    slope 0: the one token that most needs correcting is let go.
    """
    logprobs = torch.tensor([[1.5]]).log().requires_grad_()
    mistake = -(logprobs.exp().clamp(0.8, 1.2) * -1.0).sum()
    mistake.backward()
    assert logprobs.grad.item() == 0
    logprobs.grad = None
    loss(logprobs, torch.zeros(1, 1), None, torch.tensor([-1.0]), torch.tensor([[True]]), beta=0.0)[0].backward()
    assert logprobs.grad.item() > 0.1


@pytest.mark.parametrize("loss", THREE)
def test_equal_rewards_leave_the_policy_alone(loss):
    """Advantage 0 everywhere: loss 0 and gradient 0, exactly, whatever the ratios."""
    logprobs, old, _, _, mask = random_rollout()
    logprobs.requires_grad_()
    advantages = group_advantages(torch.full((1, 7), 0.7))[0]
    value, _ = loss(logprobs, old, None, advantages, mask, beta=0.0)
    value.backward()
    assert value == 0 and torch.equal(logprobs.grad, torch.zeros_like(logprobs))


@pytest.mark.parametrize("loss", THREE)
def test_the_kl_term_pulls_back_to_the_reference(loss):
    """With advantage 0 only beta x k3 is left: less sure than the reference means up, surer means down."""
    logprobs = torch.tensor([[-2.0, -1.0]], requires_grad=True)
    ref = torch.tensor([[-1.0, -2.0]])
    loss(logprobs, logprobs.detach(), ref, torch.zeros(1), torch.ones(1, 2, dtype=torch.bool), beta=0.1)[0].backward()
    assert logprobs.grad[0, 0] < 0 < logprobs.grad[0, 1]


@pytest.mark.parametrize("loss", THREE)
def test_without_beta_the_reference_is_only_logged(loss):
    """beta 0: the reference may be missing; if it is there, kl is reported and neither loss nor gradient changes.
    (grpo_loss has beta 0.04 unless told otherwise, and then asks for the reference.)
    """
    logprobs, old, ref, advantages, mask = random_rollout()
    grads = []
    for given in (ref, None):
        x = logprobs.clone().requires_grad_()
        value, stats = loss(x, old, given, advantages, mask, beta=0.0)
        value.backward()
        grads.append(x.grad)
        assert ("kl" in stats) == (given is not None)
    assert torch.equal(*grads)
    with pytest.raises(ValueError, match="ref_logprobs"):
        loss(logprobs, old, None, advantages, mask, beta=0.1)
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo_loss(logprobs, old, None, advantages, mask)


@pytest.mark.parametrize("loss", THREE)
def test_without_beta_no_kl_can_spoil_the_loss(loss):
    """A token that the policy has given up, 100 nats below the reference: k3 = e^100 - 101 is inf in float32, and 0 x
    inf is NaN. The loss of one token at ratio 1 and advantage 1 is -1 (of Dr. GRPO -1/8), its slope the same.
    """
    logprobs = torch.tensor([[-100.0]], requires_grad=True)
    inputs = logprobs, logprobs.detach(), torch.zeros(1, 1), torch.tensor([1.0]), torch.tensor([[True]])
    value, stats = loss(*inputs, beta=0.0)
    value.backward()
    assert stats["kl"].isinf()
    scale = 8 if loss is dr_grpo else 1
    close(value * scale, -1.0)
    close(logprobs.grad * scale, [[-1.0]])


@pytest.mark.parametrize("loss", THREE)
def test_padding_changes_nothing(loss):
    """Columns of padding, and whatever stands in the padding already: inf and NaN included."""
    logprobs, old, ref, advantages, mask = random_rollout()
    clean, padded = logprobs.clone().requires_grad_(), logprobs.masked_fill(~mask, float("nan"))
    padded = torch.cat([padded, torch.full((7, 2), -float("inf"))], 1).requires_grad_()
    value, stats = loss(clean, old, ref, advantages, mask, beta=0.1)
    value.backward()
    others = [torch.cat([x.masked_fill(~mask, float("nan")), torch.full((7, 2), -float("inf"))], 1) for x in (old, ref)]
    padded_mask = torch.cat([mask, torch.zeros(7, 2, dtype=torch.bool)], 1)
    more, more_stats = loss(padded, *others, advantages, padded_mask, beta=0.1)
    more.backward()
    close(more, value)
    close(padded.grad, torch.cat([clean.grad, torch.zeros(7, 2)], 1))
    assert all(close(more_stats[k], stats[k]) for k in stats)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("loss", THREE)
def test_micro_batches_add_up(loss, size):
    """Seven ragged answers in micro-batches of 1, 2 (one is left over) or 7, with the count of the whole step."""
    logprobs, old, ref, advantages, mask = random_rollout()
    n = {"n_tokens": mask.sum()} if loss is dapo else {"n_sequences": 7}
    whole, parts = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    value, _ = loss(whole, old, ref, advantages, mask, beta=0.1)
    value.backward()
    total = 0.0
    for i in range(0, 7, size):
        part, _ = loss(*(x[i : i + size] for x in (parts, old, ref, advantages, mask)), beta=0.1, **n)
        part.backward()
        total += part.item()
    close(total, value)
    close(parts.grad, whole.grad)


@pytest.mark.parametrize("loss", THREE)
def test_no_token_is_zero_and_not_nan(loss):
    logprobs, old, ref, advantages, mask = random_rollout()
    logprobs.requires_grad_()
    n = {"n_tokens": 0} if loss is dapo else {"n_sequences": 0}
    for counts in ({}, n):
        value, stats = loss(logprobs, old, ref, advantages, torch.zeros_like(mask), beta=0.1, **counts)
        value.backward()
        close(value, 0.0)
        assert all(torch.isfinite(x) for x in stats.values())
    close(logprobs.grad, torch.zeros_like(logprobs))


def test_an_empty_answer_is_counted():
    """Two answers, one of them without a token: GRPO's mean is over both, so -1.0 becomes -0.5; DAPO has no mean over
    answers and does not notice.
    """
    old, mask = torch.zeros(2, 1), torch.tensor([[True], [False]])
    close(grpo_loss(old, old, None, torch.tensor([1.0, 1.0]), mask, beta=0.0)[0], -0.5)
    close(dr_grpo_loss(old, old, None, torch.tensor([1.0, 1.0]), mask, 1)[0], -0.5)
    close(dapo_loss(old, old, None, torch.tensor([1.0, 1.0]), mask)[0], -1.0)


@pytest.mark.parametrize("loss", THREE)
def test_inputs_are_left_alone_and_only_the_policy_gets_a_gradient(loss):
    logprobs, old, ref, advantages, mask = random_rollout()
    inputs = [x.requires_grad_() for x in (logprobs, old, ref, advantages)]
    before = [x.detach().clone() for x in inputs]
    loss(*inputs, mask, beta=0.1)[0].backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))
    assert logprobs.grad is not None and all(x.grad is None for x in (old, ref, advantages))


@pytest.mark.parametrize("loss", THREE)
def test_half_precision_input_is_computed_in_float32(loss):
    """-2 and -1.5 are exact in bf16, their ratio e^0.5 = 1.648721 is not: rounded to 8 bits it would be 1.6484375."""
    logprobs = torch.tensor([[-1.5]], dtype=torch.bfloat16)
    value, stats = loss(logprobs, logprobs - 0.5, None, torch.tensor([-1.0]), torch.tensor([[True]]), beta=0.0)
    assert value.dtype == torch.float32
    close(stats["ratio_mean"], 1.6487213)


@pytest.mark.parametrize("loss, options, value, grad", [
    (grpo_loss, {}, 0.3971991, [[-0.1461477, -0.0007011, -0.1079556], [0.5061971, 0.3048100, 0.0]]),
    (dr_grpo_loss, {"max_response_tokens": 4, "beta": 0.1},
     0.0950208, [[-0.1082512, -0.0013146, -0.0796072], [0.2530985, 0.1507445, 0.0]]),
    (dapo_loss, {}, 0.1379526, [[-0.1768274, 0.0, -0.1309969], [0.4049577, 0.2456192, 0.0]]),
])
def test_agrees_with_trl(loss, options, value, grad):
    """TRL 1.16.0 (GRPOTrainer._compute_loss) gave these numbers for the same tensors, with beta 0.04, 0.1 and 0, and a
    limit of 4 tokens for Dr. GRPO. One token in five is clipped; the KL to the reference is 0.012807.
    """
    logprobs = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -1.2, -0.7]], requires_grad=True)
    old = torch.tensor([[-1.1, -0.9, -1.8], [-0.6, -1.0, -0.2]])
    ref = torch.tensor([[-1.2, -0.4, -2.2], [-0.3, -1.0, -0.9]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    actual, stats = loss(logprobs, old, ref, torch.tensor([0.8, -1.5]), mask, **options)
    actual.backward()
    close(actual, value)
    close(logprobs.grad, grad)
    close(stats["clip_fraction"], 0.2)
    close(stats["kl"], 0.0128070)


@pytest.mark.parametrize("call", [
    lambda x, a, m: grpo_loss(x[:1], x, x, a, m),
    lambda x, a, m: grpo_loss(x, x[:, :2], x, a, m),
    lambda x, a, m: grpo_loss(*[x[..., None]] * 3, a, m[..., None]),
    lambda x, a, m: grpo_loss(x, x, x, a[:1], m),
    lambda x, a, m: grpo_loss(x, x, x, x, m),
    lambda x, a, m: grpo_loss(x, x, x, a, m.float()),
    lambda x, a, m: grpo_loss(x, x, x[:1], a, m),
    lambda x, a, m: dr_grpo_loss(x, x, x, a, m, 0),
    lambda x, a, m: dapo_loss(x, x, None, a, m[:1]),
    lambda x, a, m: kl_k1(x, a),
    lambda x, a, m: kl_k3(x, x[:1]),
    lambda x, a, m: group_advantages(a),
])
def test_wrong_shapes_and_values_are_refused_in_one_line(call):
    """One advantage for two answers would broadcast to a loss that looks fine."""
    with pytest.raises(ValueError) as error:
        call(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3, dtype=torch.bool))
    assert "\n" not in str(error.value) and "torch.Size" not in str(error.value)


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_advantages_worked_example: `[0.0, 0.0, 0.0, 4.0]` -> `[5.0, 5.0, 5.0, 13.0]`. Rewards doubled, and 5 more:
#    what moves the fifth digit?
# 2. test_ratio_one_gives_the_reinforce_gradient: `[True, True, True]]` -> `[True, True, False]]`. What does a token
#    of answer 2 weigh in GRPO now?
