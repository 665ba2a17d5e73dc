"""Proximal policy optimization (PPO): reinforcement learning from human feedback with its four models.

InstructGPT (arXiv 2203.02155, section 3.5) with PPO (arXiv 1707.06347, Eq. 7) and GAE (arXiv 1506.02438, Eq. 16):

    policy (actor)         answers, and is trained
    value model (critic)   says at each token which return it expects, and is trained
    ref_model              the policy as it was, frozen: moving away from it costs
    reward model           scores a finished answer, frozen

    reward_t  = -kl_coef (log policy - log ref)_t, and at the last token of the answer also its score
    delta_t   = reward_t + gamma V_{t+1} - V_t          advantage_t = delta_t + gamma gae_lambda advantage_{t+1}
    policy    : -mean_t min(ratio A, clip(ratio, 1 - clip_eps, 1 + clip_eps) A)          with A = whitened advantages
    critic    : 1/2 mean_t max((V - returns)^2, (clip(V, V_old - value_clip_eps, V_old + value_clip_eps) - returns)^2)

The clip. ratio = policy / old_policy of a token is 1 when the updates of a rollout begin.
    A > 0: the minimum is A min(ratio, 1 + clip_eps). Above 1 + clip_eps it is flat: likely enough, no more gradient.
    A < 0: the minimum is A max(ratio, 1 - clip_eps). Below 1 - clip_eps it is flat: rare enough, no more gradient.
On the wrong side (A > 0 and the ratio below 1, A < 0 and above) the gradient stays, however far: it leads back. So one
rollout can serve several steps. With the maximum instead of the minimum it would be the other way round.

The advantage. Its deltas add up: advantage_t = sum_l (gamma gae_lambda)^l delta_{t+l}, and returns = advantage + V.
    gae_lambda = 0: delta_t = reward_t + gamma V_{t+1} - V_t. Little noise, but as wrong as the critic is.
    gae_lambda = 1: the V in between cancel, what is left is the sum of the (discounted) rewards from t on, minus V_t.
                    Right on average whatever the critic says, with the noise of the whole rest of the answer.
In between the weight of what comes later shrinks by gamma gae_lambda a token.

In memory: policy and critic with gradients and moments (16 bytes a parameter each), reference and reward model as
weights alone, and the cache of keys and values while sampling. With --peft lora policy and reference share weights, and
gradients and moments are those of the LoRA.

    python train_reward.py --model out/grpo && python train_ppo.py   # from out/sft, scored by out/reward
    python train_ppo.py --kl_coef 0                       # nothing holds the policy: watch it fool the reward model
    python train_ppo.py --data mine.jsonl --model Qwen3-0.6B --reward_model out/my_reward

A step is a rollout (one answer to each of batch_size prompts) and the optimizer steps on it: update_epochs passes over
num_minibatches mini-batches. The KL to the reference is part of the rewards, by the estimator k1, and not of the loss.
The ratio is exactly 1 in the first optimizer step on each rollout.
Losses: ppo_policy_loss, ppo_value_loss, gae and whiten in minillm/losses.py. Tests: chapters 19, 21 and 23.

Deviations: policy and critic share no weights, and each has an optimizer of its own. The critic starts as the reward
model, or without one as the language model with a new head. Scores are normalised by their mean and standard deviation
on held-out prompts before training (arXiv 1909.08593, section 2, normalises the reward model), and the critic's head
with them. A head that is new, or that does not know all of the reward, starts at 0, the mean of the normalised scores.
For the first critic_steps rollouts only the critic is trained: before it has learned, its advantages are noise. An
answer that does not end by itself loses missing_eos_penalty (in standard deviations of the score). By default a
rollout's updates stop early at target_kl. The mini-batches of a rollout are the same in each pass over it. No
pretraining gradients are mixed in (no PPO-ptx).
"""

from dataclasses import dataclass

import torch

from minillm import checkpoint, runtime
from minillm.config import by_hand, flag, parse_config
from minillm.evaluate import answer_questions
from minillm.heads import ValueModel, load_reward_model
from minillm.lora import apply_lora, lora_off
from minillm.losses import gae, kl_k1, kl_k3, ppo_policy_loss, ppo_value_loss
from minillm.metrics import evenly_spaced, show_samples
from minillm.optim import make_optimizers, schedule, set_lr, update
from minillm.preferences import same_tokenizer
from minillm.rewards import load_rewards, reward_sources
from minillm.rollouts import (PromptLoader, batch_texts, explained_variance, load_prompts, read_answers,
                              response_logprobs, response_values, sample_rollout, sampled_scores, score_rollout,
                              select, split_rollout, whiten_advantages)
from minillm.run import Run, RunConfig
from minillm.token_view import save_rollout
from minillm.tokenizer import Tokenizer

DATA, EVAL_DATA = "data/prompts.jsonl", "data/prompts_eval.jsonl"


@dataclass
class Config(RunConfig):
    model: str = flag("out/sft", "checkpoint folder of the policy to start from, which is also the reference")
    data: list[str] = flag([DATA], "prompts, .jsonl or .jsonl.gz")
    eval_data: str = flag("", f"held-out prompts (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/ppo", "folder to write")
    reward: list[str] = flag(["model"], "answer, model, judge (a copy of --model) or path/to/file.py:function; a sum: "
                             "answer 0.5*model")
    reward_model: str = flag("out/reward", "checkpoint folder of the reward model; the value model starts from it too")
    batch_size: int = flag(256, "prompts per rollout", low=1, downloaded=32)
    max_seq_len: int = flag(256, "tokens of prompt and answer together; longer prompts are left out", low=8,
                            downloaded=1024)
    max_new_tokens: int = flag(48, "tokens of an answer", low=1, downloaded=256)
    temperature: float = flag(1.0, "of sampling, and of the log-probabilities that are trained", low=0.01)
    update_epochs: int = flag(2, "passes over a rollout", low=1)
    num_minibatches: int = flag(2, "optimizer steps per pass", low=1)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1, downloaded=4)
    epochs: int = flag(4, "passes over the prompts", low=1, downloaded=1)
    clip_eps: float = flag(0.2, "clipping range of the ratio", low=0, high=1)
    value_clip_eps: float = flag(0.2, "clipping range of the values", low=0)
    gamma: float = flag(1.0, "discount per token", low=0, high=1)
    gae_lambda: float = flag(0.95, "0: trust the critic, 1: trust the rewards", low=0, high=1)
    kl_coef: float = flag(0.4, "weight of the KL to the reference in the rewards", low=0, downloaded=0.05)
    target_kl: float = flag(0.2, "stop updating on a rollout once the policy is further than this, in nats per token, "
                            "from the one that sampled it (0: never)", low=0)
    missing_eos_penalty: float = flag(2.0, "taken off the normalised score of an answer that is cut off", low=0)
    peft: str = flag("none", "train all weights, or a LoRA of policy and critic (--out: the policy's adapter)",
                     choices=["none", "lora"])
    rank: int = flag(8, "lora: rank r of the update", low=1)
    alpha: float = flag(16.0, "lora: the update is scaled by alpha / r", low=0)
    lr: float = flag(1e-4, "peak learning rate of the policy", low=0, downloaded=1e-6, with_lora=2e-5)
    value_lr: float = flag(1e-3, "peak learning rate of the value model", low=0, downloaded=1e-5, with_lora=1e-4)
    critic_steps: int = flag(10, "first rollouts, which train the value model alone (at most a tenth of all)", low=0)
    warmup_steps: int = flag(5, "steps of linear warm-up", low=0)
    thinking: bool = flag(False, "let a model that can think do so before it answers (Qwen3)")
    max_questions: int = flag(500, "held-out prompts asked in an evaluation, of a larger file evenly spaced", low=1,
                              downloaded=200)
    log_every: int = flag(1, "steps between log lines", low=1)
    eval_every: int = flag(24, "steps between evaluations", low=1)
    save_every: int = flag(20, "steps between checkpoints", low=1)
    show_every: int = flag(0, "steps between printed samples with rewards and advantages, whose tokens are kept in "
                              "OUT/rollout.jsonl for eval.py --tokens (0: never)", low=0)


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.choose_defaults(cfg, cfg.model)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py", max_seq_len=cfg.max_seq_len)
    sources, files = reward_sources(cfg.reward)
    has_reward_model = "model" in sources or bool(by_hand(cfg, "reward_model"))  # to score, or only for the critic
    if has_reward_model:
        checkpoint.require_stage(cfg.reward_model, "out/reward", "train_reward.py", "--reward_model", cfg.max_seq_len)
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    run = Run(cfg, inputs=[cfg.model, *files, *cfg.data, eval_path, cfg.reward_model if has_reward_model else ""])
    if run.finished:
        return run.result

    # 2. Data
    room, need_answers = cfg.max_seq_len - cfg.max_new_tokens, "answer" in sources
    train_prompts, eval_prompts, stats = load_prompts(cfg.data, eval_path, tokenizer, room, cfg.seed, (), need_answers,
                                                      cfg.thinking)
    eval_prompts = evenly_spaced(eval_prompts, cfg.max_questions)
    scored_prompts = select(eval_prompts, (), need_answers)
    loader = PromptLoader(train_prompts, cfg.batch_size, cfg.seed)

    # 3. Models
    policy = checkpoint.load_model(cfg.model, device, frozen=cfg.peft == "lora")
    if cfg.peft == "lora":
        apply_lora(policy, cfg.rank, cfg.alpha)
        ref_model = policy  # with the LoRA switched off
    else:
        ref_model = checkpoint.load_model(cfg.model, device, frozen=True)  # no optimizer holds it
    reward_functions = load_rewards(cfg.reward, cfg.reward_model, cfg.model, device, cfg.max_new_tokens)  # frozen too
    expects_scores = False  # whether the critic's head predicts what the answers will be scored with
    if has_reward_model and same_tokenizer(tokenizer, Tokenizer.load(cfg.reward_model)):
        value_model = ValueModel.from_reward_model(load_reward_model(cfg.reward_model, device))
        expects_scores = list(reward_functions) == ["model"] and reward_functions["model"][0] == 1  # its weight
    else:
        runtime.say(f"no reward model with the policy's tokenizer: the value model starts from {cfg.model}")
        value_model = ValueModel.from_lm(checkpoint.load_model(cfg.model, device, frozen=cfg.peft == "lora"))
    if not expects_scores:
        torch.nn.init.zeros_(value_model.score.weight)  # the mean of the normalised scores
    if cfg.peft == "lora":
        apply_lora(runtime.hold_in_bf16(value_model), cfg.rank, cfg.alpha)
        value_model.score.requires_grad_()
        value_model.bias.requires_grad_()
    for model in {policy, ref_model, value_model}:
        runtime.compile_backbone(model, cfg.compile)

    # 4. Optimizer
    policy_optimizers = make_optimizers(policy, cfg.lr, weight_decay=0.0, betas=(0.9, 0.99))
    value_optimizers = make_optimizers(value_model, cfg.value_lr, weight_decay=0.0, betas=(0.9, 0.99))

    def evaluate() -> dict:
        asked = [prompt.record for prompt in eval_prompts]
        tokens = max(64, cfg.max_new_tokens)  # of a greedy reply: at least as many as in the other scripts' tables
        return {**answer_questions(policy, tokenizer, asked, device, max_new_tokens=tokens, thinking=cfg.thinking),
                **sampled_scores(policy, tokenizer, scored_prompts, reward_functions, device,
                                 cfg.max_new_tokens, cfg.temperature, cfg.thinking)}

    # 5. Train
    total_steps = cfg.max_steps or loader.steps(cfg.epochs)
    critic_steps = min(cfg.critic_steps, total_steps // 10)
    optimizers = policy_optimizers + value_optimizers
    run.start(policy, optimizers, loader, tokenizer, total_steps, evaluate, beside=[value_model])
    score_mean, score_std = run.before.get("sampled_reward", 0.0), run.before.get("sampled_reward_std", 0.0) or 1.0
    if run.step == 0 and expects_scores:
        value_model.normalise(score_mean, score_std)
    batches = iter(loader)
    for step in run:
        policy_step = step - critic_steps  # below 0 the critic learns alone
        factor = schedule(policy_step, total_steps - critic_steps, cfg.warmup_steps) if policy_step >= 0 else 0.0
        set_lr(policy_optimizers, cfg.lr * factor)
        set_lr(value_optimizers, cfg.value_lr * schedule(step, total_steps, cfg.warmup_steps))

        # Rollout: an answer to each prompt, with a random generator of this step's own
        prompts = next(batches)
        rollout = sample_rollout(policy, prompts, cfg.max_new_tokens, tokenizer.end_ids, cfg.temperature,
                                 run.generator(step), pad_id=tokenizer.pad_id)
        answers, ended = read_answers(rollout, tokenizer)

        # Score of each answer
        raw_scores, components = score_rollout(reward_functions, prompts, answers, device)  # (B, 1)
        unfinished = (~ended).to(device)
        scores = (raw_scores[:, 0] - score_mean) / score_std - cfg.missing_eos_penalty * unfinished  # (B,)
        run.add({"reward": raw_scores.mean(), "response_tokens": rollout.response_mask.sum() / len(answers),
                 "truncated": 1 - ended.float().mean(),
                 **{f"reward_{name}": value.mean() for name, value in components.items() if len(components) > 1}},
                weight=len(answers), tokens=rollout.n_tokens / runtime.world_size())

        # Shuffle the answers into mini-batches. Log-probabilities and values before the update come from the same
        # micro-batches as the update, so that the first ratio is exactly 1. (Gradients stay enabled: without them
        # PyTorch may choose kernels that round differently.)
        minibatches = split_rollout(rollout, cfg.num_minibatches, cfg.grad_accum, run.generator(step, 1, device="cpu"),
                                    scores=scores)
        micro_batches = [batch for minibatch in minibatches for batch in minibatch.micro_batches]
        for batch in micro_batches:
            logprobs, entropy = response_logprobs(policy, batch, cfg.temperature, with_entropy=True)
            logprobs = logprobs.detach()  # and its activations are gone before the next forward pass
            batch.old_logprobs = batch.logprobs = logprobs
            with lora_off(ref_model):
                batch.ref_logprobs = response_logprobs(ref_model, batch, cfg.temperature).detach()
            batch.old_values = response_values(value_model, batch).detach()
            run.add({"entropy": entropy}, weight=batch.n_tokens)

        # Reward of each token, and advantages, which are whitened over the whole rollout
        for batch in micro_batches:
            kl = kl_k1(batch.old_logprobs, batch.ref_logprobs)  # (b, t - 1), 0 outside the answers
            rewards = -cfg.kl_coef * kl
            rewards[torch.arange(len(rewards), device=device), batch.last] += batch.scores
            batch.advantages, batch.returns = gae(rewards, batch.old_values, batch.mask, cfg.gamma, cfg.gae_lambda)
            run.add({"kl_answer": kl.sum() / len(kl)}, weight=len(kl))  # by k1, as it is paid; "kl" by k3, per token
            run.add({"kl": kl_k3(batch.old_logprobs, batch.ref_logprobs).sum() / batch.n_tokens,
                     "returns": batch.returns.sum() / batch.n_tokens,
                     "values": (batch.old_values * batch.mask).sum() / batch.n_tokens}, weight=batch.n_tokens)
        whiten_advantages(micro_batches, device)
        if cfg.show_every and step % cfg.show_every == 0 and micro_batches:  # one of several processes may have none
            batch = micro_batches[0]  # the advantage of an answer: the mean of its tokens'
            means = (batch.advantages * batch.mask).sum(dim=1) / batch.mask.sum(dim=1)
            runtime.say(show_samples("answers to several prompts; reward: the normalised score",
                                     batch_texts(batch, tokenizer)[:8], batch.scores[:8], means[:8]))
        run.add({"explained_variance": explained_variance(micro_batches, device)}, weight=len(answers))

        # Update
        updates = 0
        for minibatch in minibatches * cfg.update_epochs:
            n_tokens, approx_kl = run.count(minibatch.n_tokens), 0.0
            if not n_tokens:  # fewer answers than mini-batches
                continue
            for batch in minibatch.micro_batches:
                # While only the critic is trained, the policy does not move: its log-probabilities stay as they are.
                logprobs = response_logprobs(policy, batch, cfg.temperature) if policy_step >= 0 else batch.old_logprobs
                policy_loss, policy_stats = ppo_policy_loss(
                    logprobs, batch.old_logprobs, batch.advantages, batch.mask, cfg.clip_eps, n_tokens)
                if policy_step >= 0:
                    policy_loss.backward()  # before the critic's forward pass: the activations of one model at a time
                values = response_values(value_model, batch)
                value_loss, value_stats = ppo_value_loss(
                    values, batch.old_values, batch.returns, batch.mask, cfg.value_clip_eps, n_tokens)
                value_loss.backward()
                batch.logprobs = logprobs.detach()  # only save_rollout reads it
                approx_kl = approx_kl + policy_stats["approx_kl"] * batch.n_tokens / n_tokens
                run.add({"policy_loss": policy_loss, "value_loss": value_loss})
                run.add({**policy_stats, "value_clip_fraction": value_stats["clip_fraction"]}, weight=batch.n_tokens)
            if cfg.target_kl and runtime.sum_over_processes(float(approx_kl)) > cfg.target_kl:
                policy.zero_grad()  # too far: neither this update is made nor the rest of this rollout's
                value_model.zero_grad()
                break
            update(policy, policy_optimizers, cfg.max_grad_norm)
            update(value_model, value_optimizers, cfg.max_grad_norm)
            updates += 1
        run.add({"updates": updates}, weight=1)
        if cfg.show_every and step % cfg.show_every == 0:
            save_rollout(run.folder, step, tokenizer, minibatches)

    # 6. Result
    return run.finish(stats)


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
