"""Chapter 19: reinforcement learning with a critic. GAE, whitening, PPO's policy loss and value loss.

Code: minillm/losses.py, used by train_ppo.py.

The critic guesses, before every token, what score the answer will get. A token's advantage is how much better things
went than the critic had guessed: one step later (lambda 0), at the very end (lambda 1), or in between.

After this chapter you can compute GAE backwards by hand, and say for either sign of the advantage where the clip ends
the gradient.

Drawn in tests/figures/gae.svg.
"""

import pytest
import torch

from minillm.losses import gae, ppo_policy_loss, ppo_value_loss, whiten
from tests.helpers import close

NAN = float("nan")

# Three tokens, score 1 on the last. The critic's guess rises from 0.2 over 0.4 to 0.6.
REWARDS = torch.tensor([[0.0, 0.0, 1.0]])
VALUES = torch.tensor([[0.2, 0.4, 0.6]])
MASK = torch.tensor([[True, True, True]])


def random_rollout(rows=7, length=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=g)
    logprobs = old + 0.3 * torch.randn(rows, length, generator=g)
    mask = torch.arange(length) <= torch.arange(rows)[:, None] % length
    return logprobs, old, torch.randn(rows, length, generator=g), mask


# ---------------------------------------------------------------- gae

@pytest.mark.parametrize("gamma, lam, advantages, returns", [
    (1.0, 0.0, [0.2, 0.2, 0.4], [0.4, 0.6, 1.0]),
    (1.0, 1.0, [0.8, 0.6, 0.4], [1.0, 1.0, 1.0]),
    (1.0, 0.25, [0.275, 0.3, 0.4], [0.475, 0.7, 1.0]),
    (0.9, 0.5, [0.304, 0.32, 0.4], [0.504, 0.72, 1.0]),
])
def test_gae_by_hand(gamma, lam, advantages, returns):
    """One-step surprises (delta) at gamma 1: 0.4 - 0.2 = 0.2, 0.6 - 0.4 = 0.2, 1 - 0.6 = 0.4.
    lambda 0: just these. lambda 1: all that follow added up, 0.8, 0.6, 0.4, so every return is the score itself.
    lambda 1/4: 0.4; 0.2 + 0.4/4 = 0.3; 0.2 + 0.3/4 = 0.275.
    gamma 0.9, lambda 1/2: deltas 0.36 - 0.2 = 0.16, 0.54 - 0.4 = 0.14, 0.4; then 0.4; 0.14 + 0.45 x 0.4 = 0.32;
    0.16 + 0.45 x 0.32 = 0.304. Returns are advantages + values.
    """
    actual_advantages, actual_returns = gae(REWARDS, VALUES, MASK, gamma, lam)
    close(actual_advantages, [advantages])
    close(actual_returns, [returns])


def test_gae_defaults_are_gamma_1_and_lambda_095():
    """0.4; 0.2 + 0.95 x 0.4 = 0.58; 0.2 + 0.95 x 0.58 = 0.751."""
    close(gae(REWARDS, VALUES, MASK)[0], [[0.751, 0.58, 0.4]])


def test_gae_with_a_kl_penalty_on_every_token():
    """Rewards -0.1, 0.05 and 1 - 0.2 = 0.8: deltas 0.1, 0.25, 0.2; lambda 1 adds up to 0.55, 0.45, 0.2."""
    close(gae(torch.tensor([[-0.1, 0.05, 0.8]]), VALUES, MASK, gae_lambda=1.0)[0], [[0.55, 0.45, 0.2]])


def test_gae_of_a_perfect_critic_is_zero():
    """The score is 1 and the critic knew it all along."""
    advantages, returns = gae(REWARDS, torch.ones(1, 3), MASK)
    close(advantages, [[0.0, 0.0, 0.0]])
    close(returns, [[1.0, 1.0, 1.0]])


def test_gae_equals_the_sum_of_the_paper():
    """Eq. 16 is a sum over all later surprises, (gamma lambda)^l delta[t + l]; the loop runs it backwards."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 9, generator=g, dtype=torch.float64)
    advantages, _ = gae(rewards, values, torch.ones(3, 9, dtype=torch.bool), gamma=0.9, gae_lambda=0.8)
    after = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    powers = torch.tensor([[0.72 ** (later - t) if later >= t else 0.0 for later in range(9)] for t in range(9)],
                          dtype=torch.float64)
    close(advantages, (rewards + 0.9 * after - values) @ powers.T)


@pytest.mark.parametrize("mask, advantages", [
    ([True, True, True, False, False], [0.304, 0.32, 0.4, 0.0, 0.0]),     # padding on the right
    ([False, False, True, True, True], [0.0, 0.0, 0.304, 0.32, 0.4]),     # the prompt in front
    ([False, True, True, True, False], [0.0, 0.304, 0.32, 0.4, 0.0]),     # both
    ([True, False, True, True, False], [0.304, 0.0, 0.32, 0.4, 0.0]),     # a tool's words in between
])
def test_gae_steps_over_what_is_masked(mask, advantages):
    """The same three tokens among others, in which anything may stand; the value after the last one is 0. gamma 0.9 and
    lambda 1/2, as in test_gae_by_hand: at gamma 1 and lambda 1 the values in between cancel, and a masked token that
    takes part as a 0 would not show. Here it would: -0.2 + 0.45 x (0.36 + 0.45 x 0.32) = 0.0268 in place of 0.304.
    """
    mask = torch.tensor([mask])
    rewards, values = torch.full((1, 5), NAN), torch.full((1, 5), float("inf"))
    rewards[mask], values[mask] = REWARDS[0], VALUES[0]
    actual, returns = gae(rewards, values, mask, 0.9, 0.5)
    close(actual, [advantages])
    close(returns[mask], [0.504, 0.72, 1.0])
    close(returns[~mask], [0.0, 0.0])


def test_gae_mistake_bootstrapping_from_the_padding():
    """The critic also says something about padding, here 0.9. Taken as the value after the last token it turns the
    last surprise 1 - 0.6 = 0.4 into 1 + 0.9 - 0.6 = 1.3.
    """
    values = torch.cat([VALUES, torch.tensor([[0.9]])], 1)
    rewards = torch.cat([REWARDS, torch.tensor([[0.0]])], 1)
    mistake, _ = gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), gae_lambda=0.0)
    close(mistake[0, 2], 1.3)
    advantages, _ = gae(rewards, values, torch.tensor([[True, True, True, False]]), gae_lambda=0.0)
    close(advantages, [[0.2, 0.2, 0.4, 0.0]])


def test_gae_in_half_precision_is_computed_in_float32():
    """A reward of 3 and a value of 0.0078125, both exact in bf16: the advantage 2.9921875 would be rounded to 3."""
    reward, value = torch.tensor([[3.0, 0.0078125]], dtype=torch.bfloat16).split(1, dim=1)
    advantages, returns = gae(reward, value, torch.tensor([[True]]))
    assert advantages.dtype == returns.dtype == torch.float32
    close(advantages, [[2.9921875]])
    close(returns, [[3.0]])


def test_gae_rows_do_not_touch():
    """An answer without a token gives zeros and leaves its neighbours alone."""
    rewards, values = torch.cat([REWARDS, REWARDS]), torch.cat([VALUES, VALUES])
    advantages, returns = gae(rewards, values, torch.tensor([[True] * 3, [False] * 3]), gae_lambda=1.0)
    close(advantages, [[0.8, 0.6, 0.4], [0.0, 0.0, 0.0]])
    close(returns, [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


def test_gae_leaves_its_inputs_alone_and_is_a_constant():
    """Advantages and returns are targets: a gradient through them would teach the critic to move its own goal."""
    rewards, values = REWARDS.clone(), VALUES.clone().requires_grad_()
    advantages, returns = gae(rewards, values, MASK)
    assert not advantages.requires_grad and not returns.requires_grad
    advantages += 1
    returns += 1
    assert torch.equal(rewards, REWARDS) and torch.equal(values, VALUES)


# ---------------------------------------------------------------- whiten

def test_whiten_worked_example():
    """1, 2, 3 and padding: mean 2, variance (1 + 0 + 1) / (3 - 1) = 1, so -1, 0, 1 (times 1 / sqrt(1 + 1e-8)).
    2, 4, 4, 6 over two rows: mean 4, variance (4 + 4) / 3, so -2 / 1.632993 = -1.224745.
    """
    x = torch.tensor([[1.0, 2.0, 3.0, NAN]], dtype=torch.float64)
    close(whiten(x, torch.tensor([[True, True, True, False]])), [[-0.999999995, 0.0, 0.999999995, 0.0]])
    x = torch.tensor([[2.0, 4.0, 100.0], [4.0, 6.0, NAN]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    close(whiten(x, mask), [[-1.2247449, 0.0, 0.0], [0.0, 1.2247449, 0.0]])


def test_whiten_gives_mean_0_and_variance_1():
    _, _, x, mask = random_rollout()
    whitened = whiten(50 + 7 * x, mask)
    close(whitened[mask].mean(), 0.0)
    close(whitened[mask].var(), 1.0)
    close(whitened[~mask], torch.zeros(int((~mask).sum())))


def test_whiten_mistakes():
    """Dividing without shifting keeps the mean, so that all tokens of a lucky batch are pushed up. Dividing by n and
    not n - 1 gives 1.224745 for 1, 2, 3. Counting the padding as zeros gives a mean of 1.5.
    """
    x, mask = torch.tensor([[1.0, 2.0, 3.0, 0.0]]), torch.tensor([[True, True, True, False]])
    expected = whiten(x, mask)
    keeps_the_mean = x / x[mask].std()
    biased = torch.where(mask, (x - 2) / x[mask].std(unbiased=False), 0)
    padding_counted = (x - x.mean()) / x.std()
    for mistake in (keeps_the_mean, biased, padding_counted):
        with pytest.raises(AssertionError):
            close(mistake, expected)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_whiten_of_equal_values_is_zero_and_not_nan(count):
    """No token, one token (its unbiased variance is 0 / 0), three equal ones."""
    mask = torch.arange(4)[None] < count
    close(whiten(torch.full((1, 4), 5.0), mask), torch.zeros(1, 4))


def test_whiten_over_two_processes():
    """This process has 2 and 4 (sum 6, count 2), the other one 4 and 6 (sum 10, count 2). All four have the mean 4. The
    squares of the deviations are 4 + 0 here and 0 + 4 there: variance 8 / 3, so 2 becomes -2 / 1.632993 = -1.224745.
    """
    here = []

    def reduce(tensor):
        here.append(tensor.tolist())
        return tensor + torch.tensor([[10.0, 2.0], [2.0], [4.0]][len(here) - 1])

    x, mask = torch.tensor([[2.0, 4.0, NAN]]), torch.tensor([[True, True, False]])
    close(whiten(x, mask, reduce), [[-1.2247449, 0.0, 0.0]])
    assert here == [[6.0, 2.0], [-2.0], [4.0]]


@pytest.mark.parametrize("value", [0.7, 3.3, 100.1, 12345.678])
def test_equal_values_whiten_to_exactly_zero(value):
    """The rounded mean of 3,000 numbers is not the number itself. That error, divided by sqrt(1e-8), would be up to 1:
    a push for or against every token of a rollout in which all answers had the same reward.
    """
    x = torch.full((30, 100), value)
    once = (x - x.mean()) * torch.rsqrt((x - x.mean()).square().mean() + 1e-8)  # centred once: the mistake
    assert once.abs().max() > 1e-4 or value == 0.7
    assert whiten(x, torch.ones(30, 100, dtype=torch.bool)).abs().max() == 0


# ---------------------------------------------------------------- policy loss

def test_policy_worked_example():
    """clip_eps 0.2. Ratios 3/2, 1/2 with advantage 1 and 3/2 with advantage -2:
    min(1.5, 1.2) = 1.2, min(0.5, 0.8) = 0.5, min(-3, -2.4) = -3; loss = -(1.2 + 0.5 - 3) / 3 = 0.433333.
    One of three is clipped, mean ratio 3.5 / 3, KL(old || new) by k3 (0.094535 + 0.193147 + 0.094535) / 3 = 0.127406.
    """
    logprobs = torch.tensor([[1.5, 0.5], [1.5, 9.0]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0], [-2.0, 5.0]])
    loss, stats = ppo_policy_loss(logprobs, torch.zeros(2, 2), advantages, torch.tensor([[True, True], [True, False]]))
    loss.backward()
    close(loss, 0.4333333)
    close(logprobs.grad, [[0.0, -0.1666667], [1.0, 0.0]])
    assert set(stats) == {"approx_kl", "clip_fraction", "ratio_mean"}
    assert all(x.dim() == 0 and not x.requires_grad for x in stats.values())
    close(stats["clip_fraction"], 1 / 3)
    close(stats["ratio_mean"], 3.5 / 3)
    close(stats["approx_kl"], 0.1274057)


@pytest.mark.parametrize("ratio, advantage, value, slope", [
    (1.5, 1.0, -1.2, 0.0),   # good token, already much more probable: enough
    (0.5, 1.0, -0.5, -0.5),  # good token that became less probable: push
    (1.5, -1.0, 1.5, 1.5),   # bad token that became more probable: push
    (0.5, -1.0, 0.8, 0.0),   # bad token, already much less probable: enough
    (1.1, 2.0, -2.2, -2.2),  # inside the clip nothing is cut
    (0.9, -2.0, 1.8, 1.8),
])
def test_policy_four_quadrants(ratio, advantage, value, slope):
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    loss, stats = ppo_policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.tensor([[True]]))
    loss.backward()
    close(loss, value)
    close(logprobs.grad, [[slope]])
    close(stats["clip_fraction"], float(slope == 0.0))


@pytest.mark.parametrize("clip_eps, ratio, advantage, value, slope", [
    (0.1, 1.15, 1.0, -1.1, 0.0), (0.1, 0.85, -1.0, 0.9, 0.0), (0.1, 1.05, 1.0, -1.05, -1.05),
    (0.5, 1.4, 1.0, -1.4, -1.4), (0.5, 0.6, -1.0, 0.6, 0.6), (0.5, 1.6, 1.0, -1.5, 0.0), (0.5, 0.4, -1.0, 0.5, 0.0),
])
def test_policy_clip_eps_counts_in_both_directions(clip_eps, ratio, advantage, value, slope):
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    mask = torch.tensor([[True]])
    loss, _ = ppo_policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, clip_eps)
    loss.backward()
    close(loss, value)
    close(logprobs.grad, [[slope]])


def test_policy_at_ratio_one_is_reinforce():
    """Before the first update the gradient is -advantage / tokens: -1/2 of 3, -1/2 of -1. The ratio is exactly 1."""
    old = torch.tensor([[-0.3, -1.7, -2.0]])
    logprobs = old.clone().requires_grad_()
    advantages, mask = torch.tensor([[3.0, -1.0, 7.0]]), torch.tensor([[True, True, False]])
    loss, stats = ppo_policy_loss(logprobs, old, advantages, mask)
    loss.backward()
    close(logprobs.grad, [[-1.5, 0.5, 0.0]])
    assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0 and stats["clip_fraction"] == 0


def test_policy_mistake_clipping_with_the_maximum():
    """A bad token at ratio 1.5: max(-1.5, -1.2) = -1.2, a constant. It would stay as probable as it has become."""
    logprobs = torch.tensor([[1.5]]).log().requires_grad_()
    ratio, advantage = logprobs.exp(), -1.0
    mistake = -torch.maximum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    assert torch.autograd.grad(mistake, logprobs)[0].item() == 0
    loss, _ = ppo_policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[-1.0]]), torch.tensor([[True]]))
    close(torch.autograd.grad(loss, logprobs)[0], [[1.5]])


# ---------------------------------------------------------------- value loss

@pytest.mark.parametrize("value, target, loss, slope", [
    (0.5, 1.0, 0.32, 0.0),     # moved up by 0.5 towards the target, more than 0.2: enough.   (0.2 - 1)^2 / 2
    (-0.5, -1.0, 0.32, 0.0),   # the same downwards
    (0.5, -1.0, 1.125, 1.5),   # moved away from the target: pull back, (0.5 + 1)^2 / 2, slope 0.5 + 1
    (-0.5, 1.0, 1.125, -1.5),
    (0.1, 1.0, 0.405, -0.9),   # inside the clip: the plain squared error, (0.1 - 1)^2 / 2
    (1.5, 1.0, 0.32, 0.0),     # overshot, but the clipped value 0.2 looks worse still
])
def test_value_four_quadrants(value, target, loss, slope):
    """The old value is 0 and clip_eps 0.2."""
    values = torch.tensor([[value]], requires_grad=True)
    actual, stats = ppo_value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), torch.tensor([[True]]))
    actual.backward()
    close(actual, loss)
    close(values.grad, [[slope]])
    close(stats["clip_fraction"], float(slope == 0.0))


@pytest.mark.parametrize("value, target, loss, slope", [
    (3.0, 4.0, 1.125, 0.0),     # up by 1 towards the target, more than 0.5: enough.   (2.5 - 4)^2 / 2
    (1.0, 0.0, 1.125, 0.0),     # the same downwards.   (1.5 - 0)^2 / 2
    (3.0, 1.0, 2.0, 2.0),       # away from the target: (3 - 1)^2 / 2, slope 3 - 1
    (1.0, 3.0, 2.0, -2.0),
    (2.25, 4.0, 1.53125, -1.75),  # inside the clip: (2.25 - 4)^2 / 2
    (1.75, 0.0, 1.53125, 1.75),
])
def test_value_is_clipped_around_the_old_value(value, target, loss, slope):
    """The old value is 2 and clip_eps 0.5: the clipped value lies between 1.5 and 2.5, and not around 0."""
    values, mask = torch.tensor([[value]], requires_grad=True), torch.tensor([[True]])
    actual, _ = ppo_value_loss(values, torch.tensor([[2.0]]), torch.tensor([[target]]), mask, clip_eps=0.5)
    actual.backward()
    close(actual, loss)
    close(values.grad, [[slope]])


def test_value_worked_example():
    """Tokens one and three of the first table, and padding: (0.32 + 1.125) / 2 = 0.7225, slopes 0 and 1.5 / 2."""
    values = torch.tensor([[0.5, 0.5, NAN]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss, stats = ppo_value_loss(values, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, NAN]]), mask)
    loss.backward()
    close(loss, 0.7225)
    close(values.grad, [[0.0, 0.75, 0.0]])
    assert set(stats) == {"clip_fraction", "value_mean", "return_mean"}
    assert all(x.dim() == 0 and not x.requires_grad for x in stats.values())
    close(torch.stack([stats["clip_fraction"], stats["value_mean"], stats["return_mean"]]), [0.5, 0.5, 0.0])
    _, stats = ppo_value_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor([[4.0, 5.0]]), mask[:, :2])
    close(torch.stack([stats["value_mean"], stats["return_mean"]]), [2.0, 4.5])


def test_value_mistake_the_smaller_error():
    """The minimum of the two errors lets a value that ran away from its target go: 1.44 / 2, slope 0."""
    values = torch.tensor([[0.5]], requires_grad=True)
    target, clipped = -1.0, values.clamp(-0.2, 0.2)
    mistake = 0.5 * torch.minimum((values - target) ** 2, (clipped - target) ** 2).sum()
    close(mistake, 0.72)
    assert torch.autograd.grad(mistake, values)[0].item() == 0


# ---------------------------------------------------------------- both losses

LOSSES = {"policy": ppo_policy_loss, "value": ppo_value_loss}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_micro_batches_add_up(name, size):
    """Seven ragged answers in micro-batches of 1, 2 (one is left over) or 7, with n_tokens of the whole step."""
    x, old, y, mask = random_rollout()
    whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    value, _ = LOSSES[name](whole, old, y, mask)
    value.backward()
    total = 0.0
    for i in range(0, 7, size):
        part, _ = LOSSES[name](*(t[i : i + size] for t in (parts, old, y, mask)), n_tokens=mask.sum())
        part.backward()
        total += part.item()
    close(total, value)
    close(parts.grad, whole.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
    """Whatever stands in the padding, inf and NaN included, and however much of it there is."""
    x, old, y, mask = random_rollout()
    clean = x.clone().requires_grad_()
    value, stats = LOSSES[name](clean, old, y, mask)
    value.backward()
    bad = torch.full((7, 2), float("inf"))
    padded, *others = [torch.cat([t.masked_fill(~mask, NAN), bad], 1) for t in (x, old, y)]
    padded.requires_grad_()
    more, more_stats = LOSSES[name](padded, *others, torch.cat([mask, torch.zeros(7, 2, dtype=torch.bool)], 1))
    more.backward()
    close(more, value)
    close(padded.grad, torch.cat([clean.grad, torch.zeros(7, 2)], 1))
    assert all(close(more_stats[k], stats[k]) for k in stats)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n_tokens", [None, 0, torch.tensor(0)])
def test_no_token_is_zero_and_not_nan(name, n_tokens):
    x, old, y, mask = random_rollout()
    x.requires_grad_()
    value, stats = LOSSES[name](x, old, y, torch.zeros_like(mask), n_tokens=n_tokens)
    value.backward()
    close(value, 0.0)
    close(x.grad, torch.zeros_like(x))
    assert all(torch.isfinite(s) for s in stats.values())


@pytest.mark.parametrize("name", LOSSES)
def test_inputs_are_left_alone_and_only_the_first_gets_a_gradient(name):
    x, old, y, mask = random_rollout()
    inputs = [t.requires_grad_() for t in (x, old, y)]
    before = [t.detach().clone() for t in inputs]
    LOSSES[name](*inputs, mask)[0].backward()
    whiten(y.detach(), mask)
    assert all(torch.equal(t, b) for t, b in zip(inputs, before))
    assert x.grad is not None and old.grad is None and y.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_input_is_computed_in_float32(name):
    """In bf16 the square 1.2 x 1.2 or the ratio e^0.25 would keep 8 bits; 0.25 and 1.25 themselves are exact.
    Policy: -min(e^0.25 x 1, 1.2) = -1.2. Value: (0.25 - 1.25)^2 / 2 = 0.5, clipped (0.2 - 1.25)^2 / 2 = 0.55125.
    """
    x, zero = torch.tensor([[0.25]], dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.bfloat16)
    y = torch.tensor([[1.0 if name == "policy" else 1.25]], dtype=torch.bfloat16)
    loss, _ = LOSSES[name](x, zero, y, torch.tensor([[True]]))
    assert loss.dtype == torch.float32
    close(loss, -1.2 if name == "policy" else 0.55125)


@pytest.mark.parametrize("call", [
    lambda x, m: gae(x[:1], x, m),
    lambda x, m: gae(x, x[:, :2], m),
    lambda x, m: gae(x, x, m.float()),
    lambda x, m: gae(x[0], x[0], m[0]),
    lambda x, m: whiten(x, m[:1]),
    lambda x, m: whiten(x, m.long()),
    lambda x, m: ppo_policy_loss(x[:1], x, x, m),
    lambda x, m: ppo_policy_loss(x, x, x[:, :1], m),
    lambda x, m: ppo_policy_loss(x, x, x[:, 0], m),
    lambda x, m: ppo_value_loss(x[:1], x, x, m),
    lambda x, m: ppo_value_loss(x, x[:1], x, m),
    lambda x, m: ppo_value_loss(x, x, x[:1], m),
    lambda x, m: ppo_value_loss(x, x, x, m.float()),
])
def test_wrong_shapes_and_types_are_refused_in_one_line(call):
    """A column of returns against a row of values would broadcast to a square of errors."""
    with pytest.raises(ValueError) as error:
        call(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert "\n" not in str(error.value) and "torch.Size" not in str(error.value)


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_gae_by_hand: `(1.0, 0.25, [0.275` -> `(1.0, 0.5, [0.275`. What are the three advantages?
# 2. VALUES: `[[0.2, 0.4, 0.6]]` -> `[[0.2, 0.4, 1.0]]`. A critic that knows the score before the last token: which
#    token gets the credit?
