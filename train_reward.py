"""Reward model: learn from pairs of answers to score an answer, as the person who compared them would.

The first half of RLHF (InstructGPT, arXiv 2203.02155, Eq. 1, with two answers per prompt). r(x, y) is a scalar head on
the SFT model, read at the <|im_end|> that closes answer y to prompt x:

    loss = -log sigmoid(r(x, chosen) - r(x, rejected) - margin) - sft_coef * mean_t log p(chosen_t | before it)

    python train_reward.py                                # the pairs in data/, from out/sft
    python train_reward.py --sft_coef 0                   # InstructGPT's loss alone
    python train_reward.py --data mine.jsonl --model Qwen3-0.6B --lr 1e-5 --epochs 1 --max_seq_len 1024

Only differences of scores mean something. A pair may have a "margin" by which its chosen answer should win (Llama 2,
arXiv 2307.09288, Eq. 2). The folder opens in transformers as a sequence classifier with one label.

Deviations: the head begins at random and all weights are trained. No term centres the scores. The second term is the SFT
regularisation of GRM (arXiv 2406.10216, section 3.2) as a plain SFT loss: the hidden states go on knowing what an answer
should be, and tell wrong ones better. It needs the LM head, which is trained where it is the embedding too; else it
stays frozen, and is not saved.
"""

from collections import Counter
from dataclasses import asdict, dataclass

import torch

from minillm import checkpoint, runtime
from minillm.config import flag, parse_config
from minillm.data import PairLoader, load_pairs
from minillm.heads import RewardModel, save_reward_model
from minillm.losses import reward_loss, sft_loss_from_hidden
from minillm.metrics import Progress, before_after, table
from minillm.optim import make_optimizers, schedule, set_lr
from minillm.preferences import rank_pairs, score_pairs
from minillm.tokenizer import Tokenizer

DATA, EVAL_DATA = "data/preference.jsonl", "data/preference_eval.jsonl"


@dataclass
class Config:
    model: str = flag("out/sft", "checkpoint folder to start from")
    data: list[str] = flag([DATA], "pairs of a chosen and a rejected answer, .jsonl or .jsonl.gz")
    eval_data: str = flag("", f"held-out pairs (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/reward", "folder to write")
    max_seq_len: int = flag(256, "tokens of prompt and answer; longer answers are cut", low=8)
    batch_size: int = flag(24, "pairs per micro-batch", low=1)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1)
    epochs: int = flag(6, "passes over the data", low=1)
    max_steps: int = flag(0, "optimizer steps; overrides --epochs", low=0)
    sft_coef: float = flag(1.0, "weight of the SFT loss on the chosen answers (0: none)", low=0)
    lr: float = flag(5e-4, "peak learning rate", low=0)
    warmup_steps: int = flag(20, "optimizer steps of linear warm-up", low=0)
    weight_decay: float = flag(0.1, "weight decay of the matrices", low=0)
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm", low=1e-6)
    log_every: int = flag(20, "optimizer steps between log lines", low=1)
    eval_every: int = flag(100, "optimizer steps between evaluations", low=1)
    save_every: int = flag(500, "optimizer steps between checkpoints", low=1)
    resume: bool = flag(False, "continue the run in --out")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of everything random", low=0)
    compile: bool = flag(True, "torch.compile (on CUDA)")


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py")
    run = checkpoint.start_run(cfg.out, cfg.resume, asdict(cfg), inputs=[cfg.model, *cfg.data])
    if run and run["finished"]:
        return run["metrics"]

    # 2. Data
    tokenizer = Tokenizer.load(cfg.model)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    train_data, eval_data = load_pairs(cfg.data, eval_path, tokenizer, cfg.max_seq_len, cfg.seed, runtime.say)
    loader = PairLoader(train_data, cfg.batch_size, cfg.seed, runtime.rank(), runtime.world_size())
    total_steps = cfg.max_steps or -(-sum(loader.batches(e) for e in range(cfg.epochs)) // cfg.grad_accum)

    # 3. Models
    lm = checkpoint.load_model(cfg.model, device)
    checkpoint.check_tokenizer(lm, tokenizer, cfg.model)
    reward_model = RewardModel.from_lm(lm)  # the same backbone; a scalar head instead of the LM head
    hidden_of = runtime.maybe_compile(reward_model.model, cfg.compile, device, dynamic=True)
    lm_head = lm.lm_head.weight if lm.config.tie_word_embeddings else lm.lm_head.weight.detach()  # for the SFT loss

    # 4. Optimizer
    optimizers = make_optimizers(reward_model, cfg.lr, cfg.weight_decay)

    def evaluate() -> dict:
        chosen, rejected = score_pairs(lambda b: reward_model(b.tokens, b.lengths), eval_data, cfg.batch_size, device).unbind(1)
        return {**rank_pairs(chosen - rejected, eval_data.kinds), "chosen_rewards": chosen.mean().item(), "rejected_rewards": rejected.mean().item()}

    # 5. Train
    step, before = checkpoint.restore_run(run, reward_model, optimizers, loader) if run else (0, evaluate())
    progress = Progress(cfg.out, total_steps, step, show=runtime.rank() == 0)
    interrupt, batches, logged = runtime.Interrupt(), iter(loader), []
    while step < total_steps:
        lr = cfg.lr * schedule(step, total_steps, cfg.warmup_steps)
        set_lr(optimizers, lr)
        micro_batches = [next(batches) for _ in range(cfg.grad_accum)]
        n_pairs = runtime.sum_over_processes(sum(len(b.pairs) for b in micro_batches))  # of the whole step
        n_tokens = runtime.sum_over_processes(sum(int(b.answer_mask[:len(b.pairs)].sum()) for b in micro_batches))  # of its chosen answers
        logged.append(Counter())
        for batch in micro_batches:
            batch = batch.to(device)
            with runtime.autocast(device):
                hidden = hidden_of(batch.tokens)  # (2B, T, D)
            chosen_rewards, rejected_rewards = reward_model.read(hidden, batch.lengths).chunk(2)
            loss = reward_loss(chosen_rewards, rejected_rewards, batch.margins, n_pairs)
            margins = (chosen_rewards - rejected_rewards).detach()
            logged[-1].update(loss=loss.detach(), accuracy=(margins > 0).sum() / n_pairs, margin=margins.sum() / n_pairs)
            if cfg.sft_coef:
                chosen = slice(len(batch.pairs))  # the first half of the rows
                sft_loss = sft_loss_from_hidden(hidden[chosen], lm_head, batch.tokens[chosen], batch.answer_mask[chosen], n_tokens)
                logged[-1].update(sft_loss=sft_loss.detach())
                loss = loss + cfg.sft_coef * sft_loss
            loss.backward()
        runtime.sum_gradients(reward_model.parameters())
        torch.nn.utils.clip_grad_norm_(reward_model.parameters(), cfg.max_grad_norm)
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
            progress.log(step, **evaluate())
        if save_now:
            checkpoint.save_run(cfg.out, step, reward_model, tokenizer, optimizers, loader, before,
                                save=lambda out: save_reward_model(out, reward_model, tokenizer))
        if stop_now:
            interrupt.close()
            return progress.interrupted(step)

    # 6. Save
    interrupt.close()
    after = evaluate()
    runtime.say(before_after(before, after))
    runtime.say(table([["stated confidence", "accuracy", "pairs"]] + after["reliability"]))
    return progress.finish(train_data.stats, before, after, runtime.peak_memory_mb(device))


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
