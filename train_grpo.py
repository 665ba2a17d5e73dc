"""Group relative policy optimization (GRPO): answer a question several times, and prefer what scored above the group.

DeepSeekMath (arXiv 2402.03300), Algorithm 1 and Eq. 3. For each prompt sample G answers o_1..o_G, score them, and

    A_i   = (r_i - mean(r)) / (std(r) + eps)            the group's mean is the baseline, where PPO asks a critic
    loss  = - mean_i mean_t [ min(ratio A_i, clip(ratio, 1 - clip_eps, 1 + clip_eps) A_i) - beta KL(policy || ref) ]
    ratio = policy(o_i,t) / old_policy(o_i,t)

Why the mean is a baseline: the gradient of the expected reward is E[r grad log policy(o)]. Since
E[grad log policy(o)] = grad sum_o policy(o) = grad 1 = 0, any number that does not depend on o may be taken off r: the
expectation stays, the noise shrinks. Without one, rewards of 0 and 1 would only ever push up. The mean contains r_i
itself, but r_i - mean(r) = (G - 1)/G (r_i - mean of the others): the same direction, a little shorter. The division by
std is another matter: it gives prompts that are almost always or almost never solved more weight (dr_grpo leaves it
out). For what the clip does, see train_ppo.py.

k1 against k3: with x = log ref - log policy of a token that the policy sampled, k1 = -x and k3 = exp(x) - x - 1. Both
have the mean KL(policy || ref), because the mean of exp(x) is sum_o policy(o) ref(o) / policy(o) = 1; k3 is never
negative and less noisy where the two are close. In a loss the gradient counts: k1's is grad log policy, of mean 0: it
holds nothing. k3's is (1 - ref / policy) grad log policy, which pulls back (on average it is the gradient of KL(ref ||
policy)). So it is k3 here and in the logs, and k1 where PPO takes the value off the reward.
In memory: the policy with gradients and moments, the frozen reference (with --peft lora the same weights), and the
cache of keys and values while sampling.

    python train_grpo.py                                  # the prompts in data/, from out/sft; reward: is it right?
    python train_grpo.py --beta 0.04                      # with the paper's KL term
    python train_grpo.py --data mine.jsonl --reward my_reward.py:score --model Qwen3-0.6B

A step is a rollout (batch_size prompts, group_size answers to each) and the optimizer steps on it: update_epochs passes
over num_minibatches mini-batches. --loss chooses the objective (all in minillm/losses.py; chapters 18, 21 and 22):

    --loss    advantage                 denominator of an optimizer step         clip of the ratio        KL term
    grpo      (r - mean) / (std + eps)  each answer's length, then the answers   1 +- clip_eps            beta k3
    dr_grpo   r - mean                  answers x max_new_tokens                 1 +- clip_eps            beta k3
    dapo      (r - mean) / (std + eps)  tokens of groups with unequal rewards    1 - clip_eps .. 1.28     beta k3

(Dr. GRPO: arXiv 2503.20783; DAPO: arXiv 2503.14476.) A group of equal rewards has advantage 0. grpo and dr_grpo count
its answers in the denominator, as their papers do; dapo leaves them out (its authors also sample others in their
place). Where beta is 0 such a group has no gradient at all, and is not computed: entropy and KL in the log are then
those of the other groups, and the KL is that of the first of the num_minibatches mini-batches.

On each rollout the ratio is exactly 1 and clip_fraction 0 in the first optimizer step, and in the first rollout the KL
to the reference is 0: with --num_minibatches 1 the first line of the log shows it.

Deviations: by default beta is 0 (the reference then only shows in the log how far the policy has moved). An answer that
does not end by itself loses missing_eos_penalty. The reference stays what it was at the start. An answer is scored as a
whole, not step by step.
"""

from dataclasses import dataclass

from minillm import checkpoint, runtime
from minillm.config import by_hand, flag, parse_config
from minillm.errors import UserError
from minillm.evaluate import answer_questions
from minillm.lora import apply_lora, lora_off
from minillm.losses import dapo_loss, dr_grpo_loss, group_advantages, grpo_loss
from minillm.metrics import evenly_spaced, show_samples
from minillm.optim import make_optimizers, schedule, set_lr, update
from minillm.rewards import load_rewards, reward_sources
from minillm.rollouts import (PromptLoader, load_prompts, read_answers, response_logprobs, sample_rollout,
                              sampled_scores, score_rollout, select, split_rollout)
from minillm.run import Run, RunConfig
from minillm.token_view import save_rollout

DATA, EVAL_DATA = "data/prompts.jsonl", "data/prompts_eval.jsonl"


@dataclass
class Config(RunConfig):
    model: str = flag("out/sft", "checkpoint folder of the policy to start from, which is also the reference")
    data: list[str] = flag([DATA], "prompts, .jsonl or .jsonl.gz")
    tasks: list[str] = flag([], "train on prompts of these tasks only (default: all)")
    eval_data: str = flag("", f"held-out prompts (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/grpo", "folder to write")
    reward: list[str] = flag(["answer"], "answer, model, judge (a copy of --model) or path/to/file.py:function; a sum: "
                             "answer 0.5*model")
    reward_model: str = flag("out/reward", "checkpoint folder for --reward model")
    loss: str = flag("grpo", "which objective", choices=["grpo", "dr_grpo", "dapo"])
    batch_size: int = flag(64, "prompts per rollout", low=1, downloaded=8)
    group_size: int = flag(8, "answers to each prompt", low=2)
    max_seq_len: int = flag(256, "tokens of prompt and answer together; longer prompts are left out", low=8,
                            downloaded=1024)
    max_new_tokens: int = flag(32, "tokens of an answer", low=1, downloaded=256)
    temperature: float = flag(1.0, "of sampling, and of the log-probabilities that are trained", low=0.01)
    update_epochs: int = flag(1, "passes over a rollout", low=1)
    num_minibatches: int = flag(4, "optimizer steps per pass", low=1)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1, downloaded=4)
    epochs: int = flag(3, "passes over the prompts", low=1, downloaded=1)
    clip_eps: float = flag(0.2, "clipping range of the ratio (dapo: downwards; upwards it has 0.28)", low=0, high=1)
    beta: float = flag(0.0, "weight of KL(policy || ref) in the loss", low=0)
    missing_eos_penalty: float = flag(1.0, "taken off the reward of an answer that does not end by itself", low=0)
    peft: str = flag("none", "train all weights, or a LoRA (--out then holds the adapter)", choices=["none", "lora"])
    rank: int = flag(8, "lora: rank r of the update", low=1)
    alpha: float = flag(16.0, "lora: the update is scaled by alpha / r", low=0)
    lr: float = flag(2e-4, "peak learning rate", low=0, downloaded=1e-6, with_lora=2e-5)
    warmup_steps: int = flag(5, "steps of linear warm-up", low=0)
    thinking: bool = flag(False, "let a model that can think do so before it answers (Qwen3)")
    max_questions: int = flag(500, "held-out prompts asked in an evaluation, of a larger file evenly spaced", low=1,
                              downloaded=200)
    log_every: int = flag(1, "steps between log lines", low=1)
    eval_every: int = flag(40, "steps between evaluations", low=1)
    save_every: int = flag(20, "steps between checkpoints", low=1)
    show_every: int = flag(0, "steps between printed samples with rewards and advantages, whose tokens are kept in "
                              "OUT/rollout.jsonl for eval.py --tokens (0: never)", low=0)


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.choose_defaults(cfg, cfg.model)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py", max_seq_len=cfg.max_seq_len)
    sources, files = reward_sources(cfg.reward)
    if "model" in sources:
        checkpoint.require_stage(cfg.reward_model, "out/reward", "train_reward.py", "--reward_model", cfg.max_seq_len)
    elif by_hand(cfg, "reward_model"):
        raise UserError(f"--reward_model {cfg.reward_model}: --reward {' '.join(cfg.reward)} asks for no score of a "
                        "reward model; add model to --reward, or leave --reward_model out")
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    run = Run(cfg, inputs=[cfg.model, *files, *cfg.data, eval_path, cfg.reward_model if "model" in sources else ""])
    if run.finished:
        return run.result

    # 2. Data
    room, need_answers = cfg.max_seq_len - cfg.max_new_tokens, "answer" in sources
    train_prompts, eval_prompts, stats = load_prompts(cfg.data, eval_path, tokenizer, room, cfg.seed,
                                                      cfg.tasks, need_answers, cfg.thinking)
    eval_prompts = evenly_spaced(eval_prompts, cfg.max_questions)
    scored_prompts = select(eval_prompts, cfg.tasks, need_answers)
    loader = PromptLoader(train_prompts, cfg.batch_size, cfg.seed)

    # 3. Models
    policy = checkpoint.load_model(cfg.model, device, frozen=cfg.peft == "lora")
    if cfg.peft == "lora":
        apply_lora(policy, cfg.rank, cfg.alpha)
        ref_model = policy  # with the LoRA switched off
    else:
        ref_model = checkpoint.load_model(cfg.model, device, frozen=True)  # no optimizer holds it
    reward_functions = load_rewards(cfg.reward, cfg.reward_model, cfg.model, device, cfg.max_new_tokens)
    for model in {policy, ref_model}:
        runtime.compile_backbone(model, cfg.compile)

    # 4. Optimizer
    optimizers = make_optimizers(policy, cfg.lr, weight_decay=0.0, betas=(0.9, 0.99))

    def evaluate() -> dict:
        asked = [prompt.record for prompt in eval_prompts]
        tokens = max(64, cfg.max_new_tokens)  # of a greedy reply: at least as many as in the other scripts' tables
        return {**answer_questions(policy, tokenizer, asked, device, max_new_tokens=tokens, thinking=cfg.thinking),
                **sampled_scores(policy, tokenizer, scored_prompts, reward_functions, device,
                                 cfg.max_new_tokens, cfg.temperature, cfg.thinking)}

    # 5. Train
    total_steps = cfg.max_steps or loader.steps(cfg.epochs)
    run.start(policy, optimizers, loader, tokenizer, total_steps, evaluate)
    batches = iter(loader)
    for step in run:
        set_lr(optimizers, cfg.lr * schedule(step, total_steps, cfg.warmup_steps))

        # Rollout: group_size answers to each prompt, with a random generator of this step's own
        prompts = next(batches)
        rollout = sample_rollout(policy, prompts, cfg.max_new_tokens, tokenizer.end_ids, cfg.temperature,
                                 run.generator(step), cfg.group_size, tokenizer.pad_id)
        answers, ended = read_answers(rollout, tokenizer)

        # Reward: one number for each answer
        raw_scores, components = score_rollout(reward_functions, prompts, answers, device)  # (N, G)
        unfinished = (~ended).to(device).view_as(raw_scores)
        rewards = raw_scores - cfg.missing_eos_penalty * unfinished

        # Advantage: relative to the group
        if cfg.loss == "dr_grpo":
            advantages = rewards - rewards.mean(dim=1, keepdim=True)
        else:
            advantages = group_advantages(rewards)  # (N, G)
        if cfg.show_every and step % cfg.show_every == 0:
            group = answers[:cfg.group_size]
            runtime.say(show_samples(prompts[0].messages[-1]["content"], group, rewards[0], advantages[0]))
        has_signal = (rewards != rewards[:, :1]).any(dim=1).repeat_interleave(cfg.group_size)  # (B,) with B = N G
        run.add({"reward": raw_scores.mean(), "no_signal": 1 - has_signal.float().mean(),
                 "response_tokens": rollout.response_mask.sum() / len(answers), "truncated": 1 - ended.float().mean(),
                 **{f"reward_{name}": value.mean() for name, value in components.items() if len(components) > 1}},
                weight=len(answers), tokens=rollout.n_tokens / runtime.world_size())

        # Shuffle the answers into mini-batches; one without a gradient only counts in n_sequences, and is not computed
        keep = has_signal if cfg.loss == "dapo" or not cfg.beta else None  # None: all
        minibatches = split_rollout(rollout, cfg.num_minibatches, cfg.grad_accum, run.generator(step, 1, device="cpu"),
                                    scores=rewards.flatten(), advantages=advantages.flatten(), keep=keep)

        # Log-probabilities before the update, in the micro-batches of the update, so that the first ratio is exactly 1.
        # (Gradients stay enabled: without them PyTorch may choose kernels that round differently.)
        for minibatch in minibatches:
            for batch in minibatch.micro_batches:
                logprobs, entropy = response_logprobs(policy, batch, cfg.temperature, with_entropy=True)
                logprobs = logprobs.detach()  # and its activations are gone before the next forward pass
                batch.old_logprobs = batch.logprobs = logprobs
                run.add({"entropy": entropy}, weight=batch.n_tokens)
                if cfg.beta or minibatch is minibatches[0]:  # else the KL is for the log alone: a sample will do
                    with lora_off(ref_model):
                        batch.ref_logprobs = response_logprobs(ref_model, batch, cfg.temperature).detach()

        # Update
        for minibatch in minibatches * cfg.update_epochs:
            n_sequences, n_tokens = run.count(minibatch.n_sequences, minibatch.n_tokens)
            for batch in minibatch.micro_batches:
                logprobs = response_logprobs(policy, batch, cfg.temperature)
                given = logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages, batch.mask
                if cfg.loss == "grpo":
                    loss, loss_stats = grpo_loss(*given, cfg.clip_eps, cfg.beta, n_sequences)
                elif cfg.loss == "dr_grpo":
                    loss, loss_stats = dr_grpo_loss(*given, cfg.max_new_tokens, cfg.clip_eps, cfg.beta, n_sequences)
                elif cfg.loss == "dapo":
                    loss, loss_stats = dapo_loss(*given, cfg.clip_eps, beta=cfg.beta, n_tokens=n_tokens)
                loss.backward()
                batch.logprobs = logprobs.detach()  # only save_rollout reads it
                run.add({"policy_loss": loss})  # no weight: the micro-batches add up to the step's loss
                run.add(loss_stats, weight=batch.n_tokens)
            update(policy, optimizers, cfg.max_grad_norm)
        if cfg.show_every and step % cfg.show_every == 0:
            save_rollout(run.folder, step, tokenizer, minibatches)

    # 6. Result
    return run.finish(stats)


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
