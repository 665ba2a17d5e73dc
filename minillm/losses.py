"""All the mathematics of every stage: tensors in, tensors out.

Three rules hold for every function here.
- A loss is minimised; rewards and advantages are "larger is better"; masks are bool, True = this token counts.
- Only the first argument of a loss (the first two of a preference loss) is trained. Everything else (old and
  reference logprobs, advantages, returns) is a constant: no gradient flows into it, and no input is ever written to.
- What lies outside the mask does not exist: an inf or a NaN there changes neither the loss nor a gradient. With no
  token inside the mask, or no pair in the batch, the loss is 0 and so is its gradient, and the stats are finite.

The optional n_tokens, n_pairs, n_sequences (a number or a tensor without dimensions) is the count over the whole
optimizer step. With it the losses of the micro-batches add up to the loss of the step, however ragged they are;
without it a call counts what it is given. The stats are plain means over the tokens or pairs of one call.

Results are float32, also from bf16 or fp16 input (float64 stays float64). Nothing here waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.logprobs import check_sequences, check_shapes, denominator, fp32, masked, token_logprobs


# Pretraining and supervised fine-tuning: train_pretrain.py, train_sft.py, train_lora.py; tests: chapter 5

def sft_loss(logits: Tensor, tokens: Tensor, loss_mask: Tensor, n_tokens=None) -> Tensor:
    """Cross-entropy on the tokens that are supervised: pretraining (all of them) and SFT (what the assistant says).

    Paper: InstructGPT, arXiv 2203.02155, section 3.5 (SFT); the negative log-likelihood of every language model.
    loss = -sum(loss_mask[:, 1:] * token_logprobs(logits, tokens)) / n_tokens

    logits (B, T, V), tokens (B, T).  loss_mask (B, T) bool: True = this token is to be predicted; the first of a row
    never is.  n_tokens: supervised tokens of the whole optimizer step (default: those of this call).
    Returns a scalar. Raises ValueError for shapes that do not fit or a mask that is not bool.
    The mean is over tokens, not over conversations: a long answer weighs more than a short one.
    """
    check_shapes("B, T", tokens=tokens, loss_mask=loss_mask)
    check_sequences("logits", logits, tokens)
    # log_softmax turns an inf or NaN into NaN gradients even where nothing is to be predicted: clear those rows.
    logits = logits.masked_fill(~loss_mask.roll(-1, dims=1)[..., None], 0.0)
    mask = loss_mask[:, 1:]
    return -masked(token_logprobs(logits, tokens), mask).sum() / denominator(n_tokens, mask.sum())


# Preferences: train_reward.py, train_dpo.py; tests: chapter 15

def reward_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin=None, n_pairs=None) -> Tensor:
    """Bradley-Terry: the chosen answer should score higher than the rejected one.

    Paper: InstructGPT, arXiv 2203.02155, Eq. 1 (with K = 2); margin: Llama 2, arXiv 2307.09288, Eq. 2.
    loss = mean(-log sigmoid(chosen_rewards - rejected_rewards - margin))

    chosen_rewards, rejected_rewards (B,): both trained.  margin (B,) or a number, optional: by how much it should win.
    n_pairs: pairs of the whole optimizer step (default B).
    Returns a scalar. Raises ValueError for shapes that do not fit.
    Rewards are fixed only up to a constant: no term here centres them.
    """
    check_shapes("B", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    difference = fp32(chosen_rewards) - fp32(rejected_rewards)
    if margin is not None:
        if isinstance(margin, Tensor):
            check_shapes("B", chosen_rewards=chosen_rewards, margin=margin)
            margin = margin.detach()
        difference = difference - margin
    return -F.logsigmoid(difference).sum() / denominator(n_pairs, len(difference))


def dpo_loss(policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor,
             ref_rejected_logprobs: Tensor, beta: float = 0.1, label_smoothing: float = 0.0, n_pairs=None):
    """Bradley-Terry on the implicit reward beta * (policy - reference): a policy trained like a reward model.

    Paper: DPO, arXiv 2305.18290, Eq. 7; label_smoothing: cDPO, ericmitchell.ai/cdpo.pdf, Eq. 3.
    chosen_rewards   = beta * (policy_chosen_logprobs - ref_chosen_logprobs), rejected_rewards likewise
    z                = chosen_rewards - rejected_rewards
    loss             = mean(-(1 - label_smoothing) * log sigmoid(z) - label_smoothing * log sigmoid(-z))

    The four logprobs (B,): summed over the tokens of the answer, not averaged.  beta > 0: how strongly the
    policy is held to the reference.  label_smoothing: the probability that a label is wrong.  n_pairs: pairs of the
    whole optimizer step.
    Returns (scalar, stats): means of chosen_rewards, rejected_rewards, accuracy (share with z > 0) and margin (z).
    Raises ValueError for shapes that do not fit, beta <= 0, label_smoothing outside 0..1.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is a probability, got {label_smoothing}")
    z, stats = _implicit_rewards(policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs,
                                 ref_rejected_logprobs, beta)
    losses = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return losses.sum() / denominator(n_pairs, len(z)), stats


def ipo_loss(policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor,
             ref_rejected_logprobs: Tensor, beta: float = 0.1, n_pairs=None):
    """DPO with a target: h is pulled to 1 / (2 beta) and not beyond, so that it cannot run away.

    Paper: IPO, arXiv 2310.12036, Eq. 17 (its tau is beta).
    h    = (policy_chosen_logprobs - ref_chosen_logprobs) - (policy_rejected_logprobs - ref_rejected_logprobs)
    loss = mean((h - 1 / (2 * beta)) ** 2)

    Arguments, stats and errors: as in dpo_loss, but the logprobs are averages over the tokens of the answer. The paper
    writes the log-probability of the whole answer; its authors confirmed the average, without which one target cannot
    fit answers of all lengths. The rewards in the stats are beta times the difference of these averages, policy minus
    reference, and the margin, beta h, goes to 1/2.
    """
    z, stats = _implicit_rewards(policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs,
                                 ref_rejected_logprobs, beta)
    losses = (z / beta - 1 / (2 * beta)) ** 2
    return losses.sum() / denominator(n_pairs, len(z)), stats


def _implicit_rewards(policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs,
                      beta):
    check_shapes("B", policy_chosen_logprobs=policy_chosen_logprobs, policy_rejected_logprobs=policy_rejected_logprobs,
                 ref_chosen_logprobs=ref_chosen_logprobs, ref_rejected_logprobs=ref_rejected_logprobs)
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    chosen_rewards = beta * (fp32(policy_chosen_logprobs) - fp32(ref_chosen_logprobs.detach()))
    rejected_rewards = beta * (fp32(policy_rejected_logprobs) - fp32(ref_rejected_logprobs.detach()))
    z = chosen_rewards - rejected_rewards
    stats = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards, "accuracy": z > 0, "margin": z}
    return z, {name: x.detach().sum() / max(len(z), 1) for name, x in stats.items()}


# Reinforcement learning, KL and advantages: train_grpo.py (tests: chapter 18), train_ppo.py (chapter 19)

def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || ref) from sampled tokens, the plain estimator: unbiased, but single values may be negative.

    Source: J. Schulman, Approximating KL Divergence (joschu.net/blog/kl-approx.html), k1.
    kl = logprobs - ref_logprobs

    logprobs, ref_logprobs: any one shape, of tokens sampled from the policy. Returns that shape.
    Raises ValueError for different shapes. What PPO takes off the reward of every token.
    """
    check_shapes("...", logprobs=logprobs, ref_logprobs=ref_logprobs)
    return fp32(logprobs) - fp32(ref_logprobs)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || ref) from sampled tokens, the estimator that is never negative: unbiased, and less noisy than k1.

    Source: J. Schulman, Approximating KL Divergence, k3; GRPO, arXiv 2402.03300, Eq. 4.
    kl = exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1

    logprobs, ref_logprobs: any one shape, of tokens sampled from the policy. Returns that shape.
    Raises ValueError for different shapes. Subtracted in float32, like k1, and by torch.expm1: where the two nearly
    agree, exp(x) - 1 as written would lose all its digits.
    """
    log_ratio = -kl_k1(logprobs, ref_logprobs)
    return torch.expm1(log_ratio) - log_ratio


@torch.no_grad()
def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """How much better an answer is than the others to the same prompt: the group's mean takes the critic's place.

    Paper: GRPO, arXiv 2402.03300, section 4.1.2 (outcome supervision).
    advantages = (rewards - mean) / (std + eps), mean and std over the group

    rewards (N, G): G answers to each of N prompts.  eps: without it equal rewards, whose std is 0, would give NaN.
    Equal rewards give exactly 0: each is first measured from the first of its group, for their rounded mean may not be
    the number itself (float32: eight times 0.7), and divided by so small an eps that error would become an advantage.
    Returns (N, G), a constant. Raises ValueError for another number of dimensions or groups of fewer than two.
    The paper does not say which std; here it has Bessel's correction, as in most code. Dr. GRPO only centres:
    rewards - rewards.mean(1, keepdim=True).
    """
    check_shapes("N, G", rewards=rewards)
    if rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 answers to compare, got rewards {tuple(rewards.shape)}")
    rewards = fp32(rewards)
    rewards = rewards - rewards[:, :1]  # changes neither a difference nor the std; equal rewards are now exactly 0
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95):
    """Generalised advantage estimation: what followed a token, against what the critic expected.

    Paper: GAE, arXiv 1506.02438, Eq. 16, computed backwards.
    delta[t]      = rewards[t] + gamma * values[t + 1] - values[t]
    advantages[t] = delta[t] + gamma * gae_lambda * advantages[t + 1]
    returns       = advantages + values

    rewards, values (B, T), response-aligned: values[t] is the critic's guess before token t is said; the score sits
    on the last response token.  mask (B, T) bool.  gae_lambda 0 trusts the critic, 1 trusts the rewards.
    Returns (advantages, returns), both (B, T), constants, 0 outside the mask (also for a row without any token).
    Raises ValueError for shapes that do not fit or a mask that is not bool.
    An answer ends with its last token: the value after it is 0 even if the length limit cut it off. Tokens outside the
    mask are stepped over, wherever they are: t + 1 is the next token inside it, and gamma counts one step.
    """
    check_shapes("B, T", rewards=rewards, values=values, mask=mask)
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * gae_lambda * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantages[:, t], next_advantage)
    return masked(advantages, mask), masked(advantages + values, mask)


def whiten(x: Tensor, mask: Tensor, reduce=None) -> Tensor:
    """Shifts and scales to mean 0 and variance 1 over all positions inside the mask.

    Source: the code of arXiv 1909.08593 (Ziegler et al.), as told in arXiv 2403.17031 (N+ details of RLHF with PPO);
    that code divides by n for the variance, which is the unbiased one here (n - 1), as in TRL.
    whitened = (x - mean) * rsqrt(variance + 1e-8)

    x (B, T).  mask (B, T) bool.  reduce, optional: adds a tensor up over all processes, whose positions then count
    together. Returns (B, T), 0 outside the mask.
    Raises ValueError for shapes that do not fit or a mask that is not bool.
    Equal values and a single one become 0.
    """
    check_shapes("B, T", x=x, mask=mask)
    x, reduce = masked(x, mask), reduce or (lambda tensor: tensor)
    total, n = reduce(torch.stack([x.sum(), mask.sum().to(x.dtype)]))
    centred = masked(x - total / n.clamp(min=1), mask)
    # Twice: the mean was rounded, and of equal values that error is all that is left, to be divided by sqrt(1e-8).
    centred = masked(centred - reduce(centred.sum()[None])[0] / n.clamp(min=1), mask)
    variance = reduce((centred**2).sum()[None])[0] / (n - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)


# Reinforcement learning, policy and value losses: train_grpo.py (chapter 18), train_ppo.py (chapter 19)

def _clipped_surrogate(logprobs, old_logprobs, ref_logprobs, advantages, mask, clip_eps_low, clip_eps_high, beta):
    """What the four policy losses share: the loss of each token (B, T), 0 outside the mask, and the stats.

    They differ in the advantages that go in, in the range of the clip, and in what this, summed, is divided by.
    """
    tensors = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "mask": mask}
    if ref_logprobs is not None:
        tensors["ref_logprobs"] = ref_logprobs
    elif beta:
        raise ValueError(f"beta {beta} asks for a KL term, so ref_logprobs must be given")
    check_shapes("B, T", **tensors)

    # Masked before anything else: outside the mask the ratio is then 1 and the advantage, KL and gradient are 0.
    logprobs = masked(logprobs, mask)
    old_logprobs = masked(old_logprobs.detach(), mask)
    advantages = masked(advantages.detach(), mask)

    ratio = (logprobs - old_logprobs).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high) * advantages
    losses = -torch.minimum(unclipped, clipped)  # the smaller one for either sign of A: a lower bound of unclipped

    stats = {"approx_kl": kl_k3(old_logprobs, logprobs), "clip_fraction": clipped < unclipped, "ratio_mean": ratio}
    if ref_logprobs is not None:
        stats["kl"] = kl_k3(logprobs if beta else logprobs.detach(), masked(ref_logprobs.detach(), mask))
        if beta:
            losses = losses + beta * stats["kl"]
    n_tokens = mask.sum().clamp(min=1)
    return losses, {name: masked(x.detach(), mask).sum() / n_tokens for name, x in stats.items()}


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    if mask.dim() != 2 or advantages.shape != mask.shape[:1]:
        shapes = f"{tuple(advantages.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"expected advantages (B,) and mask (B, T), got {shapes}")
    return advantages[:, None].expand_as(mask)


def grpo_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None, advantages: Tensor, mask: Tensor,
              clip_eps: float = 0.2, beta: float = 0.04, n_sequences=None):
    """PPO's clipped objective with one advantage per answer, and the KL to the reference inside the loss.

    Paper: GRPO, arXiv 2402.03300, Eq. 3 and 4.
    ratio = exp(logprobs - old_logprobs)
    loss  = mean over answers of (mean over the answer's tokens of
            -min(ratio * advantages, clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantages) + beta * kl_k3)

    logprobs, old_logprobs, ref_logprobs (B, T), response-aligned; ref_logprobs may be None if beta is 0.
    advantages (B,): from group_advantages.  mask (B, T) bool.  n_sequences: answers of the whole optimizer step
    (default B). An answer without a token adds 0 and is counted.
    Returns (scalar, stats): approx_kl (k3, old to new policy), clip_fraction (share of tokens whose gradient the clip
    removes), ratio_mean and, if ref_logprobs is given, kl (k3, policy to reference).
    Raises ValueError for shapes that do not fit, a mask that is not bool, beta without ref_logprobs.
    As in the paper the KL term is not multiplied by the ratio: it estimates the KL to the reference without bias only
    in the first optimizer step on a rollout, while the tokens are the policy's own.
    """
    losses, stats = _clipped_surrogate(logprobs, old_logprobs, ref_logprobs, _per_token(advantages, mask), mask,
                                       clip_eps, clip_eps, beta)
    per_sequence = losses.sum(1) / mask.sum(1).clamp(min=1)
    return per_sequence.sum() / denominator(n_sequences, len(mask)), stats


def dr_grpo_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None, advantages: Tensor, mask: Tensor,
                 max_response_tokens: int, clip_eps: float = 0.2, beta: float = 0.0, n_sequences=None):
    """GRPO without the division by the answer's own length, which made long wrong answers cheap.

    Paper: Dr. GRPO, arXiv 2503.20783, section 3.2.
    loss = sum over tokens of (-min(ratio * advantages, clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantages)
           + beta * kl_k3) / (n_sequences * max_response_tokens)

    advantages (B,): centred in their group, not divided by the std.  max_response_tokens: the length limit of sampling,
    the same number for every answer.  The other arguments, stats and errors: as in grpo_loss.
    The constant only sets the scale; the authors' code uses the length limit, and so does this.
    """
    if max_response_tokens < 1:
        raise ValueError(f"max_response_tokens must be at least 1, got {max_response_tokens}")
    losses, stats = _clipped_surrogate(logprobs, old_logprobs, ref_logprobs, _per_token(advantages, mask), mask,
                                       clip_eps, clip_eps, beta)
    return losses.sum() / (denominator(n_sequences, len(mask)) * max_response_tokens), stats


def dapo_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None, advantages: Tensor, mask: Tensor,
              clip_eps_low: float = 0.2, clip_eps_high: float = 0.28, beta: float = 0.0, n_tokens=None):
    """GRPO with a mean over all tokens, and more room upwards so that rare tokens can grow.

    Paper: DAPO, arXiv 2503.14476, Eq. 8 (clip-higher and token-level loss).
    loss = sum over tokens of (-min(ratio * advantages, clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high) * advantages)
           + beta * kl_k3) / n_tokens

    n_tokens: response tokens of the whole optimizer step (default: those of this call).
    The other arguments, stats and errors: as in grpo_loss.
    The paper's other ideas (dropping groups of equal rewards, its length penalty) belong to sampling and reward; it
    has no KL term, so beta is 0 unless asked for.
    """
    losses, stats = _clipped_surrogate(logprobs, old_logprobs, ref_logprobs, _per_token(advantages, mask), mask,
                                       clip_eps_low, clip_eps_high, beta)
    return losses.sum() / denominator(n_tokens, mask.sum()), stats


def ppo_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_eps: float = 0.2,
                    n_tokens=None):
    """The policy gradient, cut off where the policy has already moved far enough in the wanted direction.

    Paper: PPO, arXiv 1707.06347, Eq. 7.
    ratio = exp(logprobs - old_logprobs)
    loss  = mean over tokens of -min(ratio * advantages, clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantages)

    logprobs, old_logprobs, advantages (B, T), response-aligned.  mask (B, T) bool.  n_tokens: response tokens of the
    whole optimizer step (default: those of this call).
    Returns (scalar, stats): approx_kl, clip_fraction, ratio_mean, as in grpo_loss.
    Raises ValueError for shapes that do not fit or a mask that is not bool.
    The KL to the reference is not here: RLHF takes it off the rewards (kl_k1).
    """
    losses, stats = _clipped_surrogate(logprobs, old_logprobs, None, advantages, mask, clip_eps, clip_eps, beta=0)
    return losses.sum() / denominator(n_tokens, mask.sum()), stats


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_eps: float = 0.2,
                   n_tokens=None):
    """Squared error of the critic, cut off where the value has already moved by clip_eps towards the return.

    Source: OpenAI's PPO code; described in arXiv 2005.12729 (Implementation Matters), not in the PPO paper.
    clipped = clip(values, old_values - clip_eps, old_values + clip_eps)
    loss    = 0.5 * mean over tokens of max((values - returns) ** 2, (clipped - returns) ** 2)

    values, old_values, returns (B, T), response-aligned.  mask (B, T) bool.  n_tokens: as in ppo_policy_loss.
    Returns (scalar, stats): clip_fraction (share of tokens whose gradient the clip removes), value_mean, return_mean.
    Raises ValueError for shapes that do not fit or a mask that is not bool.
    """
    check_shapes("B, T", values=values, old_values=old_values, returns=returns, mask=mask)
    values = masked(values, mask)
    old_values, returns = masked(old_values.detach(), mask), masked(returns.detach(), mask)
    clipped = values.clamp(old_values - clip_eps, old_values + clip_eps)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    losses = 0.5 * torch.maximum(error, clipped_error)
    stats = {"clip_fraction": clipped_error > error, "value_mean": values.detach(), "return_mean": returns}
    stats = {name: x.sum() / mask.sum().clamp(min=1) for name, x in stats.items()}  # all 0 outside the mask
    return losses.sum() / denominator(n_tokens, mask.sum()), stats
