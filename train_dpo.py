"""Direct preference optimization (DPO): learn from pairs of answers without a reward model and without sampling.

DPO (arXiv 2305.18290, Eq. 7). The policy itself is read as a reward model: its implicit reward for an answer y to a
prompt x is beta * (log pi(y|x) - log pi_ref(y|x)), where the reference pi_ref is the model before training, frozen:

    loss = -log sigmoid(reward(x, chosen) - reward(x, rejected))

    python train_dpo.py                                   # the pairs in data/, from out/sft
    python train_dpo.py --loss ipo                        # IPO (arXiv 2310.12036, Eq. 17), which does not push without end
    python train_dpo.py --data mine.jsonl --model Qwen3-0.6B --beta 0.1 --lr 1e-6 --epochs 1 --max_seq_len 1024

Watch chosen_logprob: the loss falls as long as the rejected answer falls faster, even when the chosen one falls too.

Deviations: log-probabilities of IPO are averages over an answer's tokens, as its authors advise. AdamW for RMSprop.
The default beta is 5 where 0.1 to 0.5 is usual: the tiny model has 0.9 million parameters for everything it knows, and
with 0.1 it learns the manners of the chosen answers and unlearns a sixth of its right ones.
"""

from collections import Counter
from dataclasses import asdict, dataclass

import torch

from minillm import checkpoint, runtime
from minillm.config import flag, parse_config
from minillm.data import PairLoader, load_pairs
from minillm.errors import UserError
from minillm.evaluate import answer_questions, read_questions
from minillm.lora import apply_lora, save_lora
from minillm.losses import dpo_loss, ipo_loss
from minillm.metrics import Progress, before_after, show_replies
from minillm.optim import make_optimizers, schedule, set_lr
from minillm.preferences import answer_logprobs, check_same_tokenizer, pair_logprobs, rank_pairs, reference_logprobs, sample_answers
from minillm.tokenizer import Tokenizer

DATA, EVAL_DATA, QUESTIONS = "data/preference.jsonl", "data/preference_eval.jsonl", "data/sft_eval.jsonl"


@dataclass
class Config:
    model: str = flag("out/sft", "checkpoint folder to start from")
    ref_model: str = flag("", "checkpoint folder of the frozen reference (default: --model)")
    data: list[str] = flag([DATA], "pairs of a chosen and a rejected answer, .jsonl or .jsonl.gz")
    eval_data: str = flag("", f"held-out pairs (default: {EVAL_DATA}, or 5 % of your own --data)")
    questions: str = flag("", f"questions to answer before and after (default: {QUESTIONS} where the held-out pairs are those of data/, else none)")
    out: str = flag("out/dpo", "folder to write")
    max_seq_len: int = flag(256, "tokens of prompt and answer; longer answers are cut", low=8)
    batch_size: int = flag(24, "pairs per micro-batch", low=1)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1)
    epochs: int = flag(5, "passes over the data", low=1)
    max_steps: int = flag(0, "optimizer steps; overrides --epochs", low=0)
    loss: str = flag("dpo", "dpo or ipo", choices=["dpo", "ipo"])
    beta: float = flag(5.0, "how dear it is to leave the reference (0.1 is usual; see Deviations)", low=1e-6)
    label_smoothing: float = flag(0.0, "probability that a label is wrong (conservative DPO)", low=0, high=0.5)
    peft: str = flag("none", "train all weights, or a LoRA (its folder then holds the adapter alone)", choices=["none", "lora"])
    rank: int = flag(8, "lora: rank r of the update", low=1)
    alpha: float = flag(16.0, "lora: the update is scaled by alpha / r", low=0)
    lr: float = flag(3e-5, "peak learning rate", low=0)
    warmup_steps: int = flag(10, "optimizer steps of linear warm-up", low=0)
    weight_decay: float = flag(0.0, "weight decay of the matrices", low=0)
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm", low=1e-6)
    log_every: int = flag(10, "optimizer steps between log lines", low=1)
    eval_every: int = flag(50, "optimizer steps between evaluations", low=1)
    save_every: int = flag(500, "optimizer steps between checkpoints", low=1)
    resume: bool = flag(False, "continue the run in --out")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of everything random", low=0)
    compile: bool = flag(True, "torch.compile (on CUDA)")


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py")
    if cfg.loss == "ipo" and cfg.label_smoothing:
        raise UserError(f"--label_smoothing {cfg.label_smoothing} belongs to --loss dpo; leave it out with ipo")
    run = checkpoint.start_run(cfg.out, cfg.resume, asdict(cfg), inputs=[cfg.model, cfg.ref_model, *cfg.data])
    if run and run["finished"]:
        return run["metrics"]

    # 2. Data
    tokenizer = Tokenizer.load(cfg.model)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    train_data, eval_data = load_pairs(cfg.data, eval_path, tokenizer, cfg.max_seq_len, cfg.seed, runtime.say)
    questions_path = cfg.questions or (QUESTIONS if eval_path == EVAL_DATA else "")
    questions = read_questions(questions_path) if questions_path else []
    loader = PairLoader(train_data, cfg.batch_size, cfg.seed, runtime.rank(), runtime.world_size())
    total_steps = cfg.max_steps or -(-sum(loader.batches(e) for e in range(cfg.epochs)) // cfg.grad_accum)

    # 3. Models
    policy = checkpoint.load_model(cfg.model, device)
    checkpoint.check_tokenizer(policy, tokenizer, cfg.model)
    ref_folder, ref_model = cfg.model, policy  # before its first update the policy is the reference: one copy is enough
    if cfg.ref_model:
        ref_folder, ref_model = cfg.ref_model, checkpoint.load_model(cfg.ref_model, device)
        check_same_tokenizer(tokenizer, Tokenizer.load(ref_folder), ref_folder)
    average = cfg.loss == "ipo"  # of the log-probabilities of an answer's tokens; DPO takes their sum
    ref_logprobs, ref_eval = (reference_logprobs(ref_model, ref_folder, data, cfg.batch_size, device, average) for data in (train_data, eval_data))
    ref_logprobs = ref_logprobs.to(device)  # (N, 2): all that training needs of the reference
    del ref_model
    if cfg.peft == "lora":
        apply_lora(policy, cfg.rank, cfg.alpha)
    forward = runtime.maybe_compile(policy.model, cfg.compile, device, dynamic=True)

    # 4. Optimizer
    optimizers = make_optimizers(policy, cfg.lr, cfg.weight_decay)

    def evaluate_pairs() -> dict:
        rewards = cfg.beta * (pair_logprobs(policy, eval_data, cfg.batch_size, device, average) - ref_eval)
        return {**rank_pairs(rewards[:, 0] - rewards[:, 1], eval_data.kinds), **dict(zip(("chosen_rewards", "rejected_rewards"), rewards.mean(0).tolist()))}

    def evaluate() -> dict:
        metrics = evaluate_pairs()
        if questions:
            metrics |= {**sample_answers(policy, tokenizer, questions, device), **answer_questions(policy, tokenizer, questions, device)}
        return metrics

    # 5. Train
    step, before = checkpoint.restore_run(run, policy, optimizers, loader) if run else (0, evaluate())
    progress = Progress(cfg.out, total_steps, step, show=runtime.rank() == 0)
    interrupt, batches, logged = runtime.Interrupt(), iter(loader), []
    while step < total_steps:
        lr = cfg.lr * schedule(step, total_steps, cfg.warmup_steps)
        set_lr(optimizers, lr)
        micro_batches = [next(batches) for _ in range(cfg.grad_accum)]
        n_pairs = runtime.sum_over_processes(sum(len(b.pairs) for b in micro_batches))  # of the whole step
        logged.append(Counter())
        for batch in micro_batches:
            batch = batch.to(device)
            with runtime.autocast(device):
                logprobs = answer_logprobs(forward(batch.tokens), policy.lm_head.weight, batch, average)
            four = [*logprobs.chunk(2), *ref_logprobs[batch.pairs].unbind(1)]  # policy's and reference's, of chosen and rejected
            if cfg.loss == "dpo":
                loss, stats = dpo_loss(*four, cfg.beta, cfg.label_smoothing, n_pairs)
            else:
                loss, stats = ipo_loss(*four, cfg.beta, n_pairs)
            loss.backward()
            stats["chosen_logprobs"] = four[0].detach().mean()
            logged[-1].update({"loss": loss.detach(), **{name: value * len(batch.pairs) / n_pairs for name, value in stats.items()}})
        runtime.sum_gradients(policy.parameters())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        progress.step(int(runtime.sum_over_processes(sum(b.n_tokens for b in micro_batches))))

        stop_now = interrupt.requested()
        save_now = step % cfg.save_every == 0 or step == total_steps or stop_now
        if step % cfg.log_every == 0 or save_now:
            progress.log(step, **{name: runtime.finite_mean([values[name] for values in logged], step, cfg.out) for name in logged[0]}, lr=lr)
            logged.clear()
        if step % cfg.eval_every == 0 and step < total_steps:
            progress.log(step, **evaluate_pairs())
        if save_now:
            save = (lambda out: save_lora(policy, out, cfg.model)) if cfg.peft == "lora" else None
            checkpoint.save_run(cfg.out, step, policy, tokenizer, optimizers, loader, before, save)
        if stop_now:
            interrupt.close()
            return progress.interrupted(step)

    # 6. Save
    interrupt.close()
    after = evaluate()
    runtime.say(before_after(before, after))
    if questions:
        runtime.say(show_replies(questions, before["replies"], after["replies"]))
    return progress.finish(train_data.stats, before, after, runtime.peak_memory_mb(device))


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
