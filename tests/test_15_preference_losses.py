"""Chapter 15: learning from pairs. A reward model, DPO and IPO.

Code: reward_loss, dpo_loss and ipo_loss in minillm/losses.py, used by train_reward.py and train_dpo.py.

Somebody preferred one answer to another. Bradley and Terry say how likely that was: sigmoid(score of the one - score of
the other). A reward model learns the scores. DPO notes that a policy already has one: how much more probable than its
reference it makes the answer, times beta.

After this chapter you know why DPO starts at ln 2, which pairs move the policy most, and why the loss can fall while
the chosen answer becomes less probable.

Drawn in tests/figures/pair.svg.
"""

import pytest
import torch

from minillm.losses import dpo_loss, ipo_loss, reward_loss
from tests.helpers import close

LN2 = 0.6931471805599453


def pair(difference, dtype=torch.float32):
    """One pair whose implicit margin, at beta 1, is `difference`; the policy's chosen logprob carries the gradient."""
    chosen = torch.tensor([-5.0 + difference], dtype=dtype, requires_grad=True)
    rest = torch.tensor([-5.0], dtype=dtype)
    return chosen, rest, rest.clone(), rest.clone()


def random_pairs(n=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [-5 * torch.rand(n, generator=g) for _ in range(4)]


# ---------------------------------------------------------------- reward model

def test_reward_worked_example():
    """Scores 2 against 1, and 0 against 1. -ln sigmoid(1) = 0.313262, -ln sigmoid(-1) = 1.313262; mean 0.813262.
    The gradient of a pair is -sigmoid(-difference) / 2 for the chosen one: -sigmoid(-1) / 2 = -0.134471 where the
    model was right, -sigmoid(1) / 2 = -0.365529 where it was wrong, and the opposite for the rejected one.
    """
    chosen, rejected = torch.tensor([2.0, 0.0], requires_grad=True), torch.tensor([1.0, 1.0], requires_grad=True)
    loss = reward_loss(chosen, rejected)
    close(loss, 0.8132617)
    loss.backward()
    close(chosen.grad, [-0.1344707, -0.3655293])
    close(rejected.grad, [0.1344707, 0.3655293])


def test_reward_equal_scores_cost_ln_2():
    close(reward_loss(torch.tensor([3.0]), torch.tensor([3.0])), LN2)
    close(reward_loss(torch.zeros(2).double(), torch.zeros(2).double()), LN2)


def test_reward_margin_asks_for_a_clear_win():
    """A margin of 1/2 makes the differences 1/2 and -3/2: (0.474077 + 1.701413) / 2 = 1.087745.
    A margin per pair of 1 and -1 makes both differences 0: ln 2.
    """
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    close(reward_loss(chosen, rejected, margin=torch.tensor([0.5, 0.5])), 1.0877451)
    close(reward_loss(chosen, rejected, margin=0.5), 1.0877451)
    close(reward_loss(chosen, rejected, margin=torch.tensor([1.0, -1.0])), LN2)
    margin = torch.zeros(2, requires_grad=True)  # a constant, whatever it came from
    assert not reward_loss(chosen, rejected, margin=margin).requires_grad


def test_reward_sees_differences_only():
    """Adding a constant to all scores changes nothing, which is why reward models must be compared in pairs."""
    chosen, rejected = random_pairs()[:2]
    close(reward_loss(chosen + 100, rejected + 100), reward_loss(chosen, rejected))


def test_reward_in_half_precision_is_computed_in_float32():
    """Between 2 and 4 bf16 knows multiples of 1/64, so 3 - 0.0078125 = 2.9921875 would be 3: ln(1 + e^-3) = 0.048587 in
    place of ln(1 + e^-2.9921875) = 0.048959.
    """
    chosen, rejected = torch.tensor([3.0, 0.0078125], dtype=torch.bfloat16).split(1)
    loss = reward_loss(chosen, rejected)
    assert loss.dtype == torch.float32
    close(loss, 0.0489592)


def test_reward_of_a_hopeless_pair_is_finite():
    """log(sigmoid(-1000)), written like that, is log(0) = -inf."""
    close(reward_loss(torch.tensor([-500.0]), torch.tensor([500.0])), 1000.0)
    close(reward_loss(torch.tensor([500.0]), torch.tensor([-500.0])), 0.0)
    assert torch.sigmoid(torch.tensor(-1000.0)).log().isinf()


# ---------------------------------------------------------------- DPO

def test_dpo_worked_example():
    """beta 0.5. Pair A: the policy gives the chosen answer -10 where the reference gives -11, the rejected one -12
    against -11. Implicit rewards 0.5 x (-10 + 11) = 0.5 and 0.5 x (-12 + 11) = -0.5, margin 1.
    Pair B, the wrong way round: -9 against -8 and -6 against -7, rewards -0.5 and 0.5, margin -1.
    loss = (-ln sigmoid(1) - ln sigmoid(-1)) / 2 = (0.313262 + 1.313262) / 2 = 0.813262.
    gradient of the chosen logprobs = -beta sigmoid(-margin) / 2 = (-0.067235, -0.182765).
    """
    policy_chosen = torch.tensor([-10.0, -9.0], requires_grad=True)
    policy_rejected = torch.tensor([-12.0, -6.0], requires_grad=True)
    ref_chosen, ref_rejected = torch.tensor([-11.0, -8.0]), torch.tensor([-11.0, -7.0])
    loss, stats = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.5)
    close(loss, 0.8132617)
    close(stats["chosen_rewards"], 0.0)
    close(stats["rejected_rewards"], 0.0)
    close(stats["margin"], 0.0)
    close(stats["accuracy"], 0.5)
    loss.backward()
    close(policy_chosen.grad, [-0.0672353, -0.1827646])
    close(policy_rejected.grad, [0.0672353, 0.1827646])

    _, a = dpo_loss(policy_chosen[:1], policy_rejected[:1], ref_chosen[:1], ref_rejected[:1], beta=0.5)
    assert set(a) == {"chosen_rewards", "rejected_rewards", "accuracy", "margin"}
    assert all(x.dim() == 0 and not x.requires_grad for x in a.values())
    close(torch.stack([a["chosen_rewards"], a["rejected_rewards"], a["accuracy"], a["margin"]]), [0.5, -0.5, 1.0, 1.0])


def test_dpo_beta_is_a_tenth_unless_told_otherwise():
    """A nat more for the chosen answer: margin 0.1 x 1, loss ln(1 + e^-0.1) = 0.644397."""
    loss, stats = dpo_loss(*pair(1.0))
    close(stats["margin"], 0.1)
    close(loss, 0.6443967)


def test_dpo_at_the_start_is_ln_2():
    """Policy = reference: every margin is 0, the loss ln 2, the accuracy 0 (nothing is preferred yet), whatever beta,
    smoothing or the answers. The gradient is not 0: -beta / 2 to the chosen answer, +beta / 2 to the rejected one.
    """
    chosen, rejected = random_pairs()[:2]
    for beta, smoothing in [(0.1, 0.0), (0.5, 0.0), (2.0, 0.3)]:
        loss, stats = dpo_loss(chosen, rejected, chosen.clone(), rejected.clone(), beta, smoothing)
        close(loss, LN2)
        close(stats["accuracy"], 0.0)
    policy_chosen, policy_rejected = chosen[:1].clone().requires_grad_(), rejected[:1].clone().requires_grad_()
    dpo_loss(policy_chosen, policy_rejected, chosen[:1], rejected[:1], beta=0.5)[0].backward()
    close(policy_chosen.grad, [-0.25])
    close(policy_rejected.grad, [0.25])


@pytest.mark.parametrize("z, loss, weight", [
    (-4.0, 4.0181499279178094, 0.9820137900379085),
    (-1.0, 1.3132616875182228, 0.7310585786300049),
    (0.0, 0.6931471805599453, 0.5),
    (1.0, 0.31326168751822286, 0.2689414213699951),
    (4.0, 0.01814992791780978, 0.01798620996209156),
])
def test_dpo_gradient_is_weighted_by_how_wrong_the_policy_is(z, loss, weight):
    """-ln sigmoid(z) falls as z grows, and its slope is -sigmoid(-z): a pair that is badly wrong pulls with almost full
    weight, one that is clearly right hardly at all. (The paper's equation below Eq. 7.)
    """
    chosen, *others = pair(z, torch.float64)
    actual, _ = dpo_loss(chosen, *others, beta=1.0)
    actual.backward()
    close(actual, loss)
    close(chosen.grad, [-weight])


def test_dpo_label_smoothing():
    """One label in ten is wrong: 0.9 x 0.313262 + 0.1 x 1.313262 = 0.413262 at margin 1.
    The slope is -0.9 sigmoid(-z) + 0.1 sigmoid(z). It is 0 at z = ln 9 = 2.197225, where the policy says "right with
    probability 0.9", and pushes back beyond: +0.093307 at z = 5, where plain DPO would still push on.
    """
    chosen, *others = pair(1.0)
    close(dpo_loss(chosen, *others, beta=1.0, label_smoothing=0.1)[0], 0.4132617)
    for z, slope in [(1.0, -0.1689414), (2.1972246, 0.0), (5.0, 0.0933071)]:
        chosen, *others = pair(z)
        dpo_loss(chosen, *others, beta=1.0, label_smoothing=0.1)[0].backward()
        close(chosen.grad, [slope])


def test_dpo_swapping_the_sides():
    """Exchanging chosen and rejected flips the margin and the accuracy, and exchanges the rewards.
    The losses of a pair and of its mirror image differ by the margin: -ln sigmoid(z) + ln sigmoid(-z) = -z.
    """
    a, b, c, d = random_pairs()
    loss, stats = dpo_loss(a, b, c, d)
    mirrored_loss, mirrored = dpo_loss(b, a, d, c)
    close(mirrored["margin"], -stats["margin"])
    close(mirrored["accuracy"], 1 - stats["accuracy"])
    close(mirrored["chosen_rewards"], stats["rejected_rewards"])
    close(loss - mirrored_loss, -stats["margin"])
    close(dpo_loss(a, b, c, d, label_smoothing=1.0)[0], mirrored_loss)


def test_dpo_mistake_no_reference():
    """Without the reference, an answer that was always probable counts as learned. Here the policy has not moved:
    the loss must be ln 2 although it finds the chosen answer e^3 times as probable as the rejected one.
    """
    chosen, rejected = torch.tensor([-4.0]), torch.tensor([-7.0])
    close(dpo_loss(chosen, rejected, chosen, rejected, beta=1.0)[0], LN2)
    with pytest.raises(AssertionError):
        close(-torch.nn.functional.logsigmoid(chosen - rejected).mean(), LN2)


def test_dpo_mistake_a_pair_without_a_difference():
    """A pair that is cut off before its answers differ costs 0.693 for ever and teaches nothing: the gradient to the
    logprob of the one text that is left, once as chosen and once as rejected, cancels. (Such pairs are dropped and
    counted when the data are read.)
    """
    text = torch.tensor([-3.0], requires_grad=True)
    loss, _ = dpo_loss(text, text, torch.tensor([-2.0]), torch.tensor([-2.0]))
    close(loss, LN2)
    loss.backward()
    close(text.grad, [0.0])


def test_dpo_in_half_precision_is_computed_in_float32():
    """-100.5 and -100 are exact in bf16, the reward 0.05 x (-100.5 + 100) = -0.025 is not; ln(1 + e^0.025) = 0.705725.
    """
    chosen = torch.tensor([-100.5], dtype=torch.bfloat16)
    loss, stats = dpo_loss(chosen, chosen + 0.5, chosen + 0.5, chosen + 0.5, beta=0.05)
    assert loss.dtype == stats["margin"].dtype == torch.float32
    close(stats["margin"], -0.025)
    close(loss, 0.7057253)


# ---------------------------------------------------------------- IPO

def test_ipo_worked_example():
    """Averages per token. Chosen: -1.0 against the reference's -1.2, up by 0.2; rejected: -1.5 against -1.4, down by
    0.1; h = 0.3. With beta 0.5 the target is 1 / (2 x 0.5) = 1: loss (0.3 - 1)^2 = 0.49, slope 2 x (0.3 - 1) = -1.4.
    """
    chosen, rejected = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.5], requires_grad=True)
    loss, stats = ipo_loss(chosen, rejected, torch.tensor([-1.2]), torch.tensor([-1.4]), beta=0.5)
    close(loss, 0.49)
    loss.backward()
    close(chosen.grad, [-1.4])
    close(rejected.grad, [1.4])
    close(torch.stack([stats[k] for k in ("chosen_rewards", "rejected_rewards", "accuracy", "margin")]),
          [0.1, -0.05, 1.0, 0.15])


@pytest.mark.parametrize("h, loss, slope", [(0.0, 25.0, -10.0), (4.0, 1.0, -2.0), (5.0, 0.0, 0.0), (6.0, 1.0, 2.0)])
def test_ipo_has_a_target_that_dpo_has_not(h, loss, slope):
    """beta 0.1: the target is 5. At policy = reference the loss is 5^2; past the target the slope turns round, while
    DPO's would never end pushing.
    """
    chosen, *others = pair(h)
    actual, _ = ipo_loss(chosen, *others)
    actual.backward()
    close(actual, loss)
    close(chosen.grad, [slope])
    chosen, *others = pair(h)
    dpo_loss(chosen, *others)[0].backward()
    assert chosen.grad.item() < 0


def test_ipo_mistake_sums_instead_of_averages():
    """Both answers have moved by half a nat per token in the right direction, h = 1, the target for beta 0.5. As sums
    over 10 and 30 tokens the same policy would be 5 + 15 = 20 from the reference, and be pulled back hard.
    """
    averages = [torch.tensor([x]) for x in (-1.0, -2.0, -1.5, -1.5)]
    close(ipo_loss(*averages, beta=0.5)[0], 0.0)
    sums = [x * n for x, n in zip(averages, (10, 30, 10, 30))]
    close(ipo_loss(*sums, beta=0.5)[0], 361.0)  # (20 - 1)^2


# ---------------------------------------------------------------- all of them

def test_dpo_and_ipo_agree_with_trl():
    """TRL 1.16.0 (DPOTrainer._compute_loss, "sigmoid" and "ipo", beta 0.3) gave these numbers for two pairs with
    answers of 3 and 2 tokens (chosen), 2 and 3 tokens (rejected).
    """
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, False], [True, True, True]])
    policy = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -1.2, -9.0], [-1.5, -0.7, -9.0], [-0.9, -0.2, -1.1]])
    ref = torch.tensor([[-1.2, -0.9, -2.5], [-0.2, -1.0, -9.0], [-1.0, -0.9, -9.0], [-1.3, -0.4, -0.8]])

    def total(x):
        return torch.where(mask, x, 0).sum(1)

    sums = policy.clone().requires_grad_()
    loss, stats = dpo_loss(*total(sums).chunk(2), *total(ref).chunk(2), beta=0.3)
    loss.backward()
    close(loss, 0.6461143)
    close(stats["chosen_rewards"], 0.12)
    close(stats["rejected_rewards"], 0.0)
    close(stats["accuracy"], 0.5)
    close(stats["margin"], 0.12)
    close(sums.grad, [[-0.0594775] * 3, [-0.0817318, -0.0817318, 0.0], [0.0594775, 0.0594775, 0.0], [0.0817318] * 3])

    averages = policy.clone().requires_grad_()
    n = mask.sum(1)
    loss, _ = ipo_loss(*(total(averages) / n).chunk(2), *(total(ref) / n).chunk(2), beta=0.3)
    loss.backward()
    close(loss, 2.4980555)
    close(averages.grad, [[-0.3833333] * 3, [-0.9583333, -0.9583333, 0.0], [0.575, 0.575, 0.0], [0.6388889] * 3])


LOSSES = {
    "reward": lambda x, **n: reward_loss(x[0], x[1], **n),
    "dpo": lambda x, **n: dpo_loss(*x, **n)[0],
    "dpo, smoothed": lambda x, **n: dpo_loss(*x, label_smoothing=0.1, **n)[0],
    "ipo": lambda x, **n: ipo_loss(*x, **n)[0],
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_micro_batches_add_up(name, size):
    """Seven pairs in micro-batches of 1, 2 (one is left over) or 7, each divided by n_pairs = 7."""
    pairs = random_pairs()
    whole, parts = pairs[0].clone().requires_grad_(), pairs[0].clone().requires_grad_()
    loss = LOSSES[name]([whole, *pairs[1:]])
    loss.backward()
    total = 0.0
    for i in range(0, 7, size):
        part = LOSSES[name]([x[i : i + size] for x in (parts, *pairs[1:])], n_pairs=7)
        part.backward()
        total += part.item()
    close(total, loss)
    close(parts.grad, whole.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs_cost_nothing(name):
    empty = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    close(LOSSES[name](empty), 0.0)
    close(LOSSES[name](empty, n_pairs=0), 0.0)
    for loss in (dpo_loss, ipo_loss):
        assert all(value == 0 for value in loss(*empty)[1].values())


@pytest.mark.parametrize("name", LOSSES)
def test_inputs_are_left_alone_and_the_reference_gets_no_gradient(name):
    pairs = [x.requires_grad_() for x in random_pairs()]
    before = [x.detach().clone() for x in pairs]
    LOSSES[name](pairs).backward()
    assert all(torch.equal(x, y) for x, y in zip(pairs, before))
    assert pairs[0].grad.abs().min() > 0 and pairs[1].grad.abs().min() > 0
    assert pairs[2].grad is None and pairs[3].grad is None


@pytest.mark.parametrize("call", [
    lambda a, b: reward_loss(a, b),
    lambda a, b: reward_loss(a[:, None], a[:, None]),
    lambda a, b: reward_loss(a, a, margin=b),
    lambda a, b: dpo_loss(b, a, a, a),
    lambda a, b: dpo_loss(a, a, b, a),
    lambda a, b: dpo_loss(a, a, a, b),
    lambda a, b: dpo_loss(a, a, a, a, beta=0.0),
    lambda a, b: dpo_loss(a, a, a, a, label_smoothing=-0.1),
    lambda a, b: dpo_loss(a, a, a, a, label_smoothing=1.1),
    lambda a, b: ipo_loss(a, b, a, a),
    lambda a, b: ipo_loss(a, a, a, a, beta=-1.0),
])
def test_wrong_shapes_and_values_are_refused_in_one_line(call):
    """Three scores and one score would broadcast to a loss that looks fine."""
    with pytest.raises(ValueError) as error:
        call(torch.zeros(3), torch.zeros(1))
    assert "\n" not in str(error.value) and "torch.Size" not in str(error.value)


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_dpo_worked_example: `[-10.0, -9.0]` -> `[-9.0, -9.0]`. Pair A's margin grows by a half. What is the loss?
# 2. test_dpo_label_smoothing: `pair(1.0)` -> `pair(-1.0)`. What does a wrong pair cost when one label in ten is
#    wrong?
