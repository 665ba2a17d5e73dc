"""Proximal policy optimization (PPO): reinforcement learning from human feedback with its four models.

InstructGPT (arXiv 2203.02155, section 3.5) with PPO (arXiv 1707.06347, Eq. 7) and GAE (arXiv 1506.02438, Eq. 16):

    policy (actor)         answers, and is trained
    value model (critic)   says at each token what score it expects, and is trained; begins as the reward model
    ref_model              the policy as it was, frozen: straying from it costs
    reward model           scores a finished answer, frozen

    reward_t  = -kl_coef (log policy - log ref)_t, and at the last token of the answer also its score
    delta_t   = reward_t + gamma V_t+1 - V_t            advantage_t = delta_t + gamma gae_lambda advantage_t+1
    policy    : -mean_t min(ratio A, clip(ratio, 1 - clip_eps, 1 + clip_eps) A)          with A = whitened advantages
    critic    : 1/2 mean_t max((V - returns)^2, (clip(V, V_old - value_clip_eps, V_old + value_clip_eps) - returns)^2)

    python train_reward.py && python train_ppo.py         # the prompts in data/, from out/sft, scored by out/reward
    python train_ppo.py --kl_coef 0                       # nothing holds the policy back: watch it fool the reward model
    python train_ppo.py --data rlaif.jsonl --model Qwen3-0.6B --reward_model mine --lr 1e-6 --value_lr 1e-5 --max_new_tokens 256

A step is a rollout (one answer to each of batch_size prompts) and the optimizer steps on it: inner_epochs passes over
mini_batches parts.

Deviations: two models are trained apart, each with an optimizer of its own. Scores are normalised by their mean and
standard deviation on held-out prompts before training (arXiv 1909.08593, section 2.1, normalises the reward model), the
value model's head is divided by the latter, and it is trained alone for the first critic_steps rollouts: what a critic
says that has not learned yet would push the policy anywhere. An answer that does not end by itself loses
missing_end_penalty. No pretraining gradients are mixed in (no PPO-ptx).
"""

from collections import Counter
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from minillm import checkpoint, runtime
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.evaluate import answer_questions
from minillm.generate import generate
from minillm.heads import ValueModel, load_reward_model
from minillm.losses import gae, head_entropy, head_logprobs, kl_k1, kl_k3, ppo_policy_loss, ppo_value_loss, whiten
from minillm.metrics import Progress, before_after, show_replies
from minillm.optim import make_optimizers, schedule, set_lr
from minillm.rewards import load_rewards
from minillm.rollouts import PromptLoader, States, load_prompts, read_answers, sampled_scores, score_rollout, select, split_rollout
from minillm.tokenizer import Tokenizer

DATA, EVAL_DATA = "data/prompts.jsonl", "data/prompts_eval.jsonl"


@dataclass
class Config:
    model: str = flag("out/sft", "checkpoint folder of the policy to start from, which is also the reference")
    data: list[str] = flag([DATA], "prompts, .jsonl or .jsonl.gz")
    eval_data: str = flag("", f"held-out prompts (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/ppo", "folder to write")
    reward: list[str] = flag(["model"], "answer, model, judge or path/to/file.py:function; a sum: answer 0.5*model")
    reward_model: str = flag("out/reward", "checkpoint folder of the reward model, from which the value model starts too")
    normalise: bool = flag(True, "scores with mean 0 and variance 1 before training")
    batch_size: int = flag(256, "prompts per rollout", low=1)
    max_seq_len: int = flag(256, "tokens of prompt and answer together; longer prompts are left out", low=8)
    max_new_tokens: int = flag(48, "tokens of an answer", low=1)
    temperature: float = flag(1.0, "of sampling, and of the log-probabilities that are trained", low=0.01)
    inner_epochs: int = flag(2, "passes over a rollout", low=1)
    mini_batches: int = flag(2, "optimizer steps per pass", low=1)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1)
    epochs: int = flag(9, "passes over the prompts", low=1)
    max_steps: int = flag(0, "rollouts; overrides --epochs", low=0)
    clip_eps: float = flag(0.2, "clipping range of the ratio", low=0, high=1)
    value_clip_eps: float = flag(0.2, "clipping range of the values", low=0)
    gamma: float = flag(1.0, "discount per token", low=0, high=1)
    gae_lambda: float = flag(0.95, "0: trust the critic, 1: trust the rewards", low=0, high=1)
    kl_coef: float = flag(0.3, "what a nat of KL to the reference costs", low=0)
    target_kl: float = flag(0.0, "adapt kl_coef until an answer is so many nats from the reference (0: leave it)", low=0)
    stop_kl: float = flag(0.2, "leave a rollout when the policy is further than this, per token, from the one that sampled it (0: never)", low=0)
    missing_end_penalty: float = flag(2.0, "what an answer loses that does not end by itself", low=0)
    lr: float = flag(6e-5, "peak learning rate of the policy", low=0)
    value_lr: float = flag(1e-3, "peak learning rate of the value model", low=0)
    critic_steps: int = flag(10, "rollouts at the start that train the value model alone (at most a tenth of all)", low=0)
    warmup_steps: int = flag(5, "rollouts of linear warm-up", low=0)
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm", low=1e-6)
    log_every: int = flag(1, "rollouts between log lines", low=1)
    eval_every: int = flag(20, "rollouts between evaluations", low=1)
    save_every: int = flag(20, "rollouts between checkpoints", low=1)
    resume: bool = flag(False, "continue the run in --out")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of everything random", low=0)
    compile: bool = flag(True, "torch.compile (on CUDA)")


class KLCoefficient:
    """kl_coef: fixed, or pulled towards a KL of `target` nats per answer (arXiv 1909.08593, section 2.2)."""

    def __init__(self, value: float, target: float):
        self.value, self.target = value, target

    def update(self, kl: float):
        if self.target:
            self.value *= 1 + 0.1 * max(-0.2, min(0.2, kl / self.target - 1))

    def state(self) -> dict:
        return {"value": self.value}

    def load_state(self, state: dict):
        self.value = state["value"]


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py")
    kinds = [name.rpartition("*")[2] for name in cfg.reward]
    if "model" in kinds:
        checkpoint.require_stage(cfg.reward_model, "out/reward", "train_reward.py")
    inputs = [cfg.model, cfg.reward_model, *[kind.rpartition(":")[0] for kind in kinds], *cfg.data]
    run = checkpoint.start_run(cfg.out, cfg.resume, asdict(cfg), inputs)
    if run and run["finished"]:
        return run["metrics"]

    # 2. Data
    tokenizer = Tokenizer.load(cfg.model)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    train_prompts, eval_prompts, stats_in = load_prompts(
        cfg.data, eval_path, tokenizer, cfg.max_seq_len - cfg.max_new_tokens, cfg.seed, need_answers="answer" in kinds, say=runtime.say)
    trained_kind = select(eval_prompts, need_answers="answer" in kinds)
    loader = PromptLoader(train_prompts, cfg.batch_size, cfg.seed, runtime.rank(), runtime.world_size())
    total_steps = cfg.max_steps or sum(loader.batches(e) for e in range(cfg.epochs))
    critic_steps = min(cfg.critic_steps, total_steps // 10)
    kl_coef = KLCoefficient(cfg.kl_coef, cfg.target_kl)
    states = States(prompts=loader, kl_coef=kl_coef)

    # 3. Models
    policy = checkpoint.load_model(cfg.model, device)
    checkpoint.check_tokenizer(policy, tokenizer, cfg.model)
    ref_model = checkpoint.load_model(cfg.model, device)  # frozen: no optimizer holds it
    rewards_of = load_rewards(cfg.reward, cfg.reward_model, cfg.model, device)  # the frozen reward model is in here
    value_model = None
    if "model" in kinds:
        theirs = Tokenizer.load(cfg.reward_model)
        if (theirs.ids, theirs.added) == (tokenizer.ids, tokenizer.added):
            value_model = load_reward_model(cfg.reward_model, device, cls=ValueModel)
        else:
            runtime.say(f"{cfg.reward_model} has another tokenizer than the policy: it scores text, but the value model starts from {cfg.model}")
    critic_scores = value_model is not None  # it knows the reward model's scores; a new head knows nothing
    value_model = value_model or ValueModel.from_lm(checkpoint.load_model(cfg.model, device))
    compiled = lambda model: runtime.maybe_compile(model, cfg.compile, device, dynamic=True)
    policy_hidden, ref_hidden, values_hidden = compiled(policy.model), compiled(ref_model.model), compiled(value_model.model)

    # 4. Optimizer
    policy_optimizers = make_optimizers(policy, cfg.lr, weight_decay=0.0, betas=(0.9, 0.99))
    value_optimizers = make_optimizers(value_model, cfg.value_lr, weight_decay=0.0, betas=(0.9, 0.99))
    trained, optimizers = torch.nn.ModuleDict({"policy": policy, "value_model": value_model}), policy_optimizers + value_optimizers

    def beside(x):  # (b, t) -> (b, T-1): 0 behind the longest of these rows
        return F.pad(x, (0, mask.shape[1] - x.shape[1]))

    def logprobs_of(model, hidden_of, part):
        """(b, T-1) log p of the answers' tokens in these rows, 0 elsewhere; and the hidden states."""
        tokens = rollout.tokens[part.rows, :part.longest]  # padding is on the right: a causal model needs no mask
        with runtime.autocast(device):  # all models in one precision
            hidden = hidden_of(tokens)
            return beside(head_logprobs(hidden, model.lm_head.weight, tokens, cfg.temperature, mask[part.rows, :part.longest - 1])), hidden

    def values_of(part):
        """(b, T-1): what the critic expects before each token is said, beside its logprob."""
        with runtime.autocast(device):
            return beside(value_model.scores(values_hidden(rollout.tokens[part.rows, :part.longest]))[:, :-1])

    def evaluate(greedy: bool = True) -> dict:
        metrics = answer_questions(policy, tokenizer, [prompt.record for prompt in eval_prompts], device) if greedy else {}
        return metrics | sampled_scores(policy, tokenizer, trained_kind, rewards_of, device, cfg.max_new_tokens, cfg.temperature)

    # 5. Train
    step, before = checkpoint.restore_run(run, trained, optimizers, states) if run else (0, evaluate())
    reward_mean, reward_std = (before["sampled_reward"], before["sampled_reward_std"] or 1.0) if cfg.normalise and trained_kind else (0.0, 1.0)
    if not run and critic_scores:
        value_model.score.weight.data /= reward_std  # it shall expect scores that are normalised
    progress = Progress(cfg.out, total_steps, step, show=runtime.rank() == 0)
    save = lambda: checkpoint.save_run(cfg.out, step, trained, tokenizer, optimizers, states, before,
                                       save=lambda out: checkpoint.save_model(out, policy, tokenizer))
    interrupt, prompts, logged, began = runtime.Interrupt(), iter(loader), [], step
    while step < total_steps:
        # 5a Rollout, with a random generator of this step's own, so that a resume is exact
        place = states.state()
        examples = next(prompts)
        with runtime.autocast(device):
            rollout = generate(policy, [p.tokens for p in examples], cfg.max_new_tokens, tokenizer.end_id, cfg.temperature,
                               pad_id=tokenizer.pad_id, generator=runtime.generator(device, cfg.seed, step))
        mask = rollout.response_mask[:, 1:]  # (B, T-1) beside the logprobs
        lengths, counts = rollout.lengths.cpu(), mask.sum(1).cpu()  # (B,): tokens of prompt and answer, of the answer
        texts, ended = read_answers(rollout, tokenizer)
        n_answers, n_response = (int(runtime.sum_over_processes(n)) for n in (len(texts), int(counts.sum())))
        rows = torch.randperm(len(texts), generator=runtime.generator("cpu", cfg.seed, step, 1))
        # The same micro-batches for old, reference and new logprobs: the first ratio is exactly 1.
        mini_batches = split_rollout(rows, lengths, counts, cfg.mini_batches, cfg.grad_accum, device)
        old_logprobs, ref_logprobs, old_values = (torch.zeros(mask.shape, device=device) for _ in range(3))
        entropy = 0.0
        for part in sum(mini_batches, []):
            # With gradients on, though none is wanted: off, other kernels may run, which round otherwise.
            logprobs, hidden = logprobs_of(policy, policy_hidden, part)
            old_logprobs[part.rows] = logprobs.detach()
            ref_logprobs[part.rows] = logprobs_of(ref_model, ref_hidden, part)[0].detach()
            old_values[part.rows] = values_of(part).detach()
            asked = mask[part.rows, :part.longest - 1]
            entropy = entropy + head_entropy(hidden, policy.lm_head.weight, asked, cfg.temperature) * asked.sum()

        # 5b Reward: the score at the last token of the answer, and at every token what it costs to stray from the reference
        try:
            scores, components = score_rollout(rewards_of, examples, texts, device)  # (B, 1)
        except UserError:
            if step > began:  # what was learned is kept: with the reward mended, --resume asks the same prompts again
                states.load_state(place)
                save()
            raise
        scores = scores[:, 0]
        normalised = (scores - reward_mean) / reward_std - cfg.missing_end_penalty * ~ended.to(device)
        kl = torch.where(mask, kl_k1(old_logprobs, ref_logprobs), 0.0)  # (B, T-1)
        rewards = -kl_coef.value * kl
        rewards[torch.arange(len(rewards), device=device), rollout.lengths - 2] += normalised  # token t stands in column t - 1

        # 5c Advantage
        advantages, returns = gae(rewards, old_values, mask, cfg.gamma, cfg.gae_lambda)
        advantages = whiten(advantages, mask)

        # 5d Update
        # An untrained critic's advantages would only push the policy about: first it learns to judge, then the policy moves.
        factor = schedule(step - critic_steps, total_steps - critic_steps, cfg.warmup_steps) if step >= critic_steps else 0.0
        set_lr(policy_optimizers, cfg.lr * factor)
        set_lr(value_optimizers, cfg.value_lr * schedule(step, total_steps, cfg.warmup_steps))
        updates, totals = 0, Counter()
        for mini_batch in mini_batches * cfg.inner_epochs:
            n_tokens = int(runtime.sum_over_processes(sum(part.n_tokens for part in mini_batch)))  # of the whole optimizer step
            sums = Counter()
            for part in mini_batch:
                logprobs, _ = logprobs_of(policy, policy_hidden, part)
                policy_loss, stats = ppo_policy_loss(logprobs, old_logprobs[part.rows], advantages[part.rows], mask[part.rows], cfg.clip_eps, n_tokens)
                value_loss, value_stats = ppo_value_loss(values_of(part), old_values[part.rows], returns[part.rows], mask[part.rows], cfg.value_clip_eps, n_tokens)
                (policy_loss + value_loss).backward()
                stats["value_clip_fraction"] = value_stats["clip_fraction"]
                share = part.n_tokens / n_tokens
                sums.update(policy_loss=policy_loss.detach(), value_loss=value_loss.detach(), **{name: value * share for name, value in stats.items()})
            updates += 1
            totals.update(sums)
            if cfg.stop_kl and runtime.sum_over_processes(float(sums["approx_kl"])) > cfg.stop_kl:
                trained.zero_grad()  # too far already: this update is not made, nor the rest of this rollout's
                break
            for optimizers_of, model in ((policy_optimizers, policy), (value_optimizers, value_model)):
                runtime.sum_gradients(model.parameters())
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
                for optimizer in optimizers_of:
                    optimizer.step()
                    optimizer.zero_grad()
        step += 1
        progress.step(n_response)

        mean = lambda x: x.float().sum().to(device) / n_answers
        token_mean = lambda x: x[mask].sum() / n_response
        variance = lambda x: x[mask].var(correction=0)
        shown = {name: value / updates for name, value in totals.items()}
        shown.update(reward=mean(scores), kl=token_mean(kl_k3(old_logprobs, ref_logprobs)), kl_answer=mean(kl),
                     returns=token_mean(returns), values=token_mean(old_values),
                     explained_variance=(1 - variance(returns - old_values) / variance(returns).clamp(min=1e-8)) / runtime.world_size(),
                     entropy=entropy / n_response, response_tokens=mean(counts), truncated=mean(~ended),
                     **{f"reward_{name}": mean(part) for name, part in components.items() if len(components) > 1})
        logged.append(shown)
        used = kl_coef.value
        kl_coef.update(runtime.sum_over_processes(float(shown["kl_answer"])))
        stop_now = interrupt.requested()
        save_now = step % cfg.save_every == 0 or step == total_steps or stop_now
        if step % cfg.log_every == 0 or save_now:
            numbers = {name: runtime.finite_mean([values[name] for values in logged], step, cfg.out) for name in logged[0]}
            progress.log(step, **numbers, kl_coef=used, updates=updates, lr=cfg.lr * factor)
            logged.clear()
        if step % cfg.eval_every == 0 and step < total_steps:
            progress.log(step, **evaluate(greedy=False))
        if save_now:
            save()
        if stop_now:
            interrupt.close()
            return progress.interrupted(step)

    # 6. Save
    interrupt.close()
    after = evaluate()
    runtime.say(before_after(before, after))
    runtime.say(show_replies([prompt.record for prompt in eval_prompts], before["replies"], after["replies"]))
    return progress.finish(stats_in, before, after, runtime.peak_memory_mb(device))


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
