"""Group relative policy optimization (GRPO): ask the same question several times, and prefer what scored above the group.

DeepSeekMath (arXiv 2402.03300), Algorithm 1 and Eq. 3. For each prompt sample G answers o_1..o_G, score them, and

    A_i   = (r_i - mean(r)) / (std(r) + eps)                                      the group takes the critic's place
    loss  = - mean_i mean_t [ min(ratio A_i, clip(ratio, 1 - clip_eps, 1 + clip_eps) A_i) - beta KL(policy || ref) ]
    ratio = policy(o_i,t) / old_policy(o_i,t)

    python train_grpo.py                                  # sums and differences, from out/sft, reward: is it right?
    python train_grpo.py --sft_coef 0 --beta 0.04         # the paper's setting
    python train_grpo.py --data mine.jsonl --reward my_reward.py:score --lr 1e-6

A step is a rollout (batch_size prompts, group_size answers to each) and the optimizer steps on it: inner_epochs passes
over mini_batches parts. --loss dr_grpo (arXiv 2503.20783) and --loss dapo (arXiv 2503.14476) change the denominators.

Deviations: by default beta is 0, and on the side there is a little SFT loss on demonstrations of the other tasks (the
ptx term of InstructGPT, arXiv 2203.02155, Eq. 2), which keeps the other skills. Without a KL term, groups whose rewards
are all equal are left out (as in DAPO, but not sampled again): their advantage is 0. An answer that does not end by
itself loses missing_end_penalty. The reference stays what it was at the start; only finished answers are scored.
"""

from collections import Counter
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from minillm import checkpoint, runtime
from minillm.config import flag, parse_config
from minillm.data import PackedLoader
from minillm.errors import UserError
from minillm.evaluate import answer_questions
from minillm.generate import generate
from minillm.losses import dapo_loss, dr_grpo_loss, group_advantages, grpo_loss, head_entropy, head_logprobs, sft_loss_from_hidden
from minillm.metrics import Progress, before_after, show_replies
from minillm.optim import make_optimizers, schedule, set_lr
from minillm.rewards import load_rewards
from minillm.rollouts import Conversations, PromptLoader, States, load_prompts, read_answers, sampled_scores, score_rollout, select, split_rollout
from minillm.tokenizer import Tokenizer

DATA, EVAL_DATA, SFT_DATA, TASKS = "data/prompts.jsonl", "data/prompts_eval.jsonl", "data/sft.jsonl", ["add", "subtract"]


@dataclass
class Config:
    model: str = flag("out/sft", "checkpoint folder of the policy to start from, which is also the reference")
    data: list[str] = flag([DATA], "prompts, .jsonl or .jsonl.gz")
    tasks: list[str] = flag([], f"train on prompts of these tasks only (default: {' '.join(TASKS)} of the embedded ones, all of your own)")
    eval_data: str = flag("", f"held-out prompts (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/grpo", "folder to write")
    reward: list[str] = flag(["answer"], "answer, model, judge or path/to/file.py:function; a sum: answer 0.5*model")
    reward_model: str = flag("out/reward", "checkpoint folder for --reward model")
    loss: str = flag("grpo", "which objective", choices=["grpo", "dr_grpo", "dapo"])
    batch_size: int = flag(64, "prompts per rollout", low=1)
    group_size: int = flag(8, "answers to each prompt", low=2)
    max_seq_len: int = flag(256, "tokens of prompt and answer together; longer prompts are left out", low=8)
    max_new_tokens: int = flag(32, "tokens of an answer", low=1)
    temperature: float = flag(1.0, "of sampling, and of the log-probabilities that are trained", low=0.01)
    inner_epochs: int = flag(1, "passes over a rollout", low=1)
    mini_batches: int = flag(4, "optimizer steps per pass", low=1)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1)
    epochs: int = flag(9, "passes over the prompts", low=1)
    max_steps: int = flag(0, "rollouts; overrides --epochs", low=0)
    clip_eps: float = flag(0.2, "clipping range of the ratio (dapo: downwards; upwards it has 0.28)", low=0, high=1)
    beta: float = flag(0.0, "weight of KL(policy || ref) in the loss", low=0)
    missing_end_penalty: float = flag(1.0, "what an answer loses that does not end by itself", low=0)
    sft_coef: float = flag(0.2, "weight of the SFT loss on the side (0: none, as in the paper)", low=0)
    sft_data: list[str] = flag([], f"demonstrations for it, of which those of --tasks are left out (default: {SFT_DATA} with the embedded prompts, else none)")
    sft_batch_size: int = flag(4, "packed rows of demonstrations per optimizer step", low=1)
    lr: float = flag(1.5e-4, "peak learning rate", low=0)
    warmup_steps: int = flag(5, "rollouts of linear warm-up", low=0)
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm", low=1e-6)
    log_every: int = flag(1, "rollouts between log lines", low=1)
    kl_every: int = flag(5, "rollouts between looks at the KL to the reference and the entropy (with --beta: each)", low=1)
    eval_every: int = flag(20, "rollouts between evaluations", low=1)
    save_every: int = flag(20, "rollouts between checkpoints", low=1)
    resume: bool = flag(False, "continue the run in --out")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of everything random", low=0)
    compile: bool = flag(True, "torch.compile (on CUDA)")


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py")
    kinds = [name.rpartition("*")[2] for name in cfg.reward]
    if "model" in kinds:
        checkpoint.require_stage(cfg.reward_model, "out/reward", "train_reward.py")
    inputs = [cfg.model, cfg.reward_model, *[kind.rpartition(":")[0] for kind in kinds], *cfg.data, *cfg.sft_data]
    run = checkpoint.start_run(cfg.out, cfg.resume, asdict(cfg), inputs)
    if run and run["finished"]:
        return run["metrics"]

    # 2. Data
    tokenizer = Tokenizer.load(cfg.model)
    embedded = cfg.data == [DATA]
    eval_path, tasks = cfg.eval_data or (EVAL_DATA if embedded else ""), cfg.tasks or (TASKS if embedded else [])
    train_prompts, eval_prompts, stats_in = load_prompts(
        cfg.data, eval_path, tokenizer, cfg.max_seq_len - cfg.max_new_tokens, cfg.seed, tasks, "answer" in kinds, runtime.say)
    trained_kind = select(eval_prompts, tasks, "answer" in kinds)
    loader = PromptLoader(train_prompts, cfg.batch_size, cfg.seed, runtime.rank(), runtime.world_size())
    total_steps = cfg.max_steps or sum(loader.batches(e) for e in range(cfg.epochs))
    loaders, replay = States(prompts=loader), None
    sft_data = cfg.sft_data or ([SFT_DATA] if embedded else [])
    if cfg.sft_coef and sft_data:
        others = Conversations(sft_data, tokenizer, cfg.max_seq_len, without=tasks, say=runtime.say)
        replay_loader = PackedLoader(others, cfg.sft_batch_size, cfg.max_seq_len, cfg.seed, runtime.rank(), runtime.world_size())
        loaders, replay = States(prompts=loader, replay=replay_loader), iter(replay_loader)

    # 3. Models
    policy = checkpoint.load_model(cfg.model, device)
    checkpoint.check_tokenizer(policy, tokenizer, cfg.model)
    ref_model = checkpoint.load_model(cfg.model, device)  # frozen: no optimizer holds it
    rewards_of = load_rewards(cfg.reward, cfg.reward_model, cfg.model, device)
    policy_hidden, ref_hidden = (runtime.maybe_compile(m.model, cfg.compile, device, dynamic=True) for m in (policy, ref_model))

    # 4. Optimizer
    optimizers = make_optimizers(policy, cfg.lr, weight_decay=0.0, betas=(0.9, 0.99))

    def logprobs_of(model, hidden_of, part):
        """(b, T-1) log p of the answers' tokens in these rows, 0 elsewhere; and the hidden states."""
        tokens = rollout.tokens[part.rows, :part.longest]  # padding is on the right: a causal model needs no mask
        with runtime.autocast(device):  # policy and reference in one precision
            hidden = hidden_of(tokens)
            logprobs = head_logprobs(hidden, model.lm_head.weight, tokens, cfg.temperature, mask[part.rows, :part.longest - 1])
        return F.pad(logprobs, (0, mask.shape[1] - logprobs.shape[1])), hidden

    def evaluate(prompts) -> dict:
        metrics = answer_questions(policy, tokenizer, [prompt.record for prompt in prompts], device)
        return metrics | sampled_scores(policy, tokenizer, trained_kind, rewards_of, device, cfg.max_new_tokens, cfg.temperature)

    # 5. Train
    step, before = checkpoint.restore_run(run, policy, optimizers, loaders) if run else (0, evaluate(eval_prompts))
    progress = Progress(cfg.out, total_steps, step, show=runtime.rank() == 0)
    save = lambda: checkpoint.save_run(cfg.out, step, policy, tokenizer, optimizers, loaders, before)
    interrupt, prompts, logged, began = runtime.Interrupt(), iter(loader), [], step
    while step < total_steps:
        # 5a Rollout: group_size answers to each prompt, with a random generator of this step's own, so that a resume is exact
        place = loaders.state()
        examples = next(prompts)
        with runtime.autocast(device):
            rollout = generate(policy, [p.tokens for p in examples], cfg.max_new_tokens, tokenizer.end_id, cfg.temperature, group_size=cfg.group_size,
                               pad_id=tokenizer.pad_id, generator=runtime.generator(device, cfg.seed, step))
        mask = rollout.response_mask[:, 1:]  # (B, T-1) beside the logprobs
        lengths, counts = rollout.lengths.cpu(), mask.sum(1).cpu()  # (B,): tokens of prompt and answer, of the answer
        texts, ended = read_answers(rollout, tokenizer)
        n_answers, n_response = (int(runtime.sum_over_processes(n)) for n in (len(texts), int(counts.sum())))

        # 5b Reward: one number for each answer
        try:
            rewards, components = score_rollout(rewards_of, examples, texts, device)  # (N, G)
        except UserError:
            if step > began:  # what was learned is kept: with the reward mended, --resume asks the same prompts again
                loaders.load_state(place)
                save()
            raise
        rewards = rewards - cfg.missing_end_penalty * ~ended.to(device).view_as(rewards)

        # 5c Advantage: relative to the group
        advantages = rewards - rewards.mean(dim=1, keepdim=True) if cfg.loss == "dr_grpo" else group_advantages(rewards)
        signal = (rewards != rewards[:, :1]).any(dim=1)  # equal rewards: all advantages are 0
        advantages = advantages.flatten()  # (B,)
        rows = torch.randperm(len(texts), generator=runtime.generator("cpu", cfg.seed, step, 1))
        rows = rows if cfg.beta else rows[signal.cpu().repeat_interleave(cfg.group_size)[rows]]
        # The same micro-batches for old, reference and new logprobs: the first ratio is exactly 1.
        mini_batches = split_rollout(rows, lengths, counts, cfg.mini_batches, cfg.grad_accum, device)

        # 5d Update
        n_trained = runtime.sum_over_processes(sum(part.n_tokens for part in sum(mini_batches, [])))
        watched = cfg.beta > 0 or step % cfg.kl_every == 0  # without beta, the reference is only there to be looked at
        several = cfg.mini_batches * cfg.inner_epochs > 1  # with one update, the policy that is trained is the one that answered
        old_logprobs, ref_logprobs = (torch.zeros(mask.shape, device=device) for _ in range(2))
        for part in sum(mini_batches, []):
            # With gradients on, though none is wanted: off, other kernels may run, which round otherwise.
            if several:
                old_logprobs[part.rows] = logprobs_of(policy, policy_hidden, part)[0].detach()
            if watched:
                ref_logprobs[part.rows] = logprobs_of(ref_model, ref_hidden, part)[0].detach()
        names = (("policy_loss", "approx_kl", "clip_fraction", "ratio_mean") + ("kl", "entropy") * watched) if n_trained else ()
        totals = Counter({name: torch.zeros((), device=device) for name in names})
        lr = cfg.lr * schedule(step, total_steps, cfg.warmup_steps)
        set_lr(optimizers, lr)
        for mini_batch in mini_batches * cfg.inner_epochs:
            n_sequences = int(runtime.sum_over_processes(sum(len(part.rows) for part in mini_batch)))  # of the whole optimizer step
            n_tokens = int(runtime.sum_over_processes(sum(part.n_tokens for part in mini_batch)))
            for part in mini_batch:
                logprobs, hidden = logprobs_of(policy, policy_hidden, part)
                old = old_logprobs[part.rows] if several else logprobs.detach()
                given = logprobs, old, ref_logprobs[part.rows] if watched else None, advantages[part.rows], mask[part.rows]
                if cfg.loss == "grpo":
                    loss, stats = grpo_loss(*given, cfg.clip_eps, cfg.beta, n_sequences)
                elif cfg.loss == "dr_grpo":
                    loss, stats = dr_grpo_loss(*given, cfg.max_new_tokens, cfg.clip_eps, cfg.beta, n_sequences)
                else:
                    loss, stats = dapo_loss(*given, cfg.clip_eps, beta=cfg.beta, n_tokens=n_tokens)
                loss.backward()
                if watched:
                    stats["entropy"] = head_entropy(hidden.detach(), policy.lm_head.weight, mask[part.rows, :part.longest - 1], cfg.temperature)
                share = part.n_tokens / (n_trained * cfg.inner_epochs)  # means over the tokens of the whole step
                totals.update(policy_loss=loss.detach() / len(mini_batches) / cfg.inner_epochs, **{name: value * share for name, value in stats.items()})
            if replay:  # the SFT term
                batch = next(replay)
                n_tokens, batch = runtime.sum_over_processes(int(batch.loss_mask.sum())), batch.to(device)
                with runtime.autocast(device):
                    hidden = policy_hidden(batch.tokens, doc_ids=batch.doc_ids)
                loss = cfg.sft_coef * sft_loss_from_hidden(hidden, policy.lm_head.weight, batch.tokens, batch.loss_mask, n_tokens)
                loss.backward()
                totals.update(sft_loss=loss.detach() / cfg.sft_coef / len(mini_batches) / cfg.inner_epochs)
            if not n_sequences and not replay:
                continue  # nothing to learn from: a step without a gradient would still move weights by the momentum
            runtime.sum_gradients(policy.parameters())
            torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        step += 1
        progress.step(n_response)

        mean = lambda x: x.float().sum().to(device) / n_answers
        totals.update(reward=mean(rewards), no_signal=mean((~signal).repeat_interleave(cfg.group_size)), response_tokens=mean(counts),
                      truncated=mean(~ended), **{f"reward_{name}": mean(part) for name, part in components.items() if len(components) > 1})
        logged.append(totals)
        stop_now = interrupt.requested()
        save_now = step % cfg.save_every == 0 or step == total_steps or stop_now
        if step % cfg.log_every == 0 or save_now:
            names = dict.fromkeys(name for values in logged for name in values)  # a step without signal has fewer
            progress.log(step, **{name: runtime.finite_mean([v[name] for v in logged if name in v], step, cfg.out) for name in names}, lr=lr)
            logged.clear()
        if step % cfg.eval_every == 0 and step < total_steps:
            progress.log(step, **{name: value for name, value in evaluate(trained_kind).items() if name != "replies"})
        if save_now:
            save()
        if stop_now:
            interrupt.close()
            return progress.interrupted(step)

    # 6. Save
    interrupt.close()
    after = evaluate(eval_prompts)
    runtime.say(before_after(before, after))
    runtime.say(show_replies([prompt.record for prompt in eval_prompts], before["replies"], after["replies"]))
    return progress.finish(stats_in, before, after, runtime.peak_memory_mb(device))


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
