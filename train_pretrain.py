"""Pretraining: a transformer learns to predict the next token of plain text.

The objective of GPT (arXiv 2005.14165), over every token x of every document:

    loss = - mean_t log p(x_t | x_<t)

    python train_pretrain.py                                       # the text in data/, tiny preset
    python train_pretrain.py --data novel.txt wiki.jsonl.gz --preset small --max_seq_len 1024

Deviations: documents are packed into rows, and attention stays within each document (GPT lets it run across). By
default Muon (arXiv 2502.16982) trains the hidden matrices, which learns faster than AdamW alone.
"""

from dataclasses import asdict, dataclass

import torch

from minillm import checkpoint, runtime
from minillm.config import flag, parse_config
from minillm.data import PackedLoader, load_split
from minillm.evaluate import continuations, held_out_loss
from minillm.losses import sft_loss_from_hidden
from minillm.metrics import Progress, before_after
from minillm.model import PRESETS, CausalLM, preset_config, packed_forward
from minillm.optim import make_optimizers, schedule, set_lr
from minillm.tokenizer import Tokenizer

DATA, EVAL_DATA = "data/pretrain.jsonl", "data/pretrain_eval.jsonl"


@dataclass
class Config:
    model: str = flag("", "checkpoint folder to continue from (default: random weights)")
    data: list[str] = flag([DATA], 'text: {"text": ...} in .jsonl or .jsonl.gz, or .txt')
    eval_data: str = flag("", f"held-out text (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/pretrain", "folder to write")
    preset: str = flag("tiny", "architecture, for random weights only", choices=list(PRESETS))
    tokenizer: str = flag("data/tokenizer.json", "tokenizer, for random weights only")
    max_seq_len: int = flag(192, "tokens per row; longer documents become several pieces", low=8)
    batch_size: int = flag(8, "rows per micro-batch", low=1)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1)
    epochs: int = flag(7, "passes over the data", low=1)
    max_steps: int = flag(0, "optimizer steps; overrides --epochs", low=0)
    optimizer: str = flag("muon", "Muon for the hidden matrices, or AdamW for all", choices=["muon", "adamw"])
    lr: float = flag(2e-3, "peak learning rate", low=0)
    warmup_steps: int = flag(50, "optimizer steps of linear warm-up", low=0)
    weight_decay: float = flag(0.1, "weight decay of the matrices", low=0)
    recompute: bool = flag(False, "activation checkpointing: less memory, slower")
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm", low=1e-6)
    log_every: int = flag(20, "optimizer steps between log lines", low=1)
    eval_every: int = flag(500, "optimizer steps between evaluations", low=1)
    save_every: int = flag(500, "optimizer steps between checkpoints", low=1)
    resume: bool = flag(False, "continue the run in --out")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of everything random", low=0)
    compile: bool = flag(True, "torch.compile (on CUDA)")


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    run = checkpoint.start_run(cfg.out, cfg.resume, asdict(cfg), inputs=[cfg.model, *cfg.data])
    if run and run["finished"]:
        return run["metrics"]

    # 2. Data
    tokenizer = Tokenizer.load(cfg.model or cfg.tokenizer)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    train_data, eval_data = load_split("text", cfg.data, eval_path, tokenizer, cfg.max_seq_len, cfg.seed, runtime.say)
    loader = PackedLoader(train_data, cfg.batch_size, cfg.max_seq_len, cfg.seed, runtime.rank(), runtime.world_size())
    total_steps = cfg.max_steps or -(-sum(loader.batches(e) for e in range(cfg.epochs)) // cfg.grad_accum)

    # 3. Models
    if cfg.model:
        model = checkpoint.load_model(cfg.model, device)
        checkpoint.check_tokenizer(model, tokenizer, cfg.model)
    else:
        model = CausalLM(preset_config(cfg.preset, tokenizer.vocab_size, cfg.max_seq_len)).to(device)
    model.model.recompute = cfg.recompute
    forward = packed_forward(model, cfg.compile and runtime.can_compile(device))

    # 4. Optimizer
    optimizers = make_optimizers(model, cfg.lr, cfg.weight_decay, muon=cfg.optimizer == "muon")

    def evaluate() -> dict:
        return held_out_loss(model, eval_data, cfg.max_seq_len, device)

    # 5. Train
    step, before = checkpoint.restore_run(run, model, optimizers, loader) if run else (0, evaluate())
    progress = Progress(cfg.out, total_steps, step, show=runtime.rank() == 0)
    interrupt, batches, losses = runtime.Interrupt(), iter(loader), []
    while step < total_steps:
        lr = cfg.lr * schedule(step, total_steps, cfg.warmup_steps)
        set_lr(optimizers, lr)
        micro_batches = [next(batches) for _ in range(cfg.grad_accum)]
        n_tokens = runtime.sum_over_processes(sum(int(b.loss_mask.sum()) for b in micro_batches))  # of the whole step
        losses.append(torch.zeros((), device=device))
        for batch in micro_batches:
            batch = batch.to(device)
            with runtime.autocast(device):
                hidden = forward(batch.tokens, doc_ids=batch.doc_ids)
            # here the mask is every token of a document but its first
            loss = sft_loss_from_hidden(hidden, model.lm_head.weight, batch.tokens, batch.loss_mask, n_tokens)
            loss.backward()
            losses[-1] += loss.detach()
        runtime.sum_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        progress.step(int(runtime.sum_over_processes(sum(b.n_tokens for b in micro_batches))))

        stop_now = interrupt.requested()
        save_now = step % cfg.save_every == 0 or step == total_steps or stop_now
        if step % cfg.log_every == 0 or save_now:
            progress.log(step, loss=runtime.finite_mean(losses, step, cfg.out), lr=lr)
            losses.clear()
        if step % cfg.eval_every == 0 and step < total_steps:
            progress.log(step, **evaluate())
        if save_now:
            checkpoint.save_run(cfg.out, step, model, tokenizer, optimizers, loader, before)
        if stop_now:
            interrupt.close()
            return progress.interrupted(step)

    # 6. Save
    interrupt.close()
    after = evaluate()
    runtime.say(before_after(before, after))
    runtime.say(continuations(model, tokenizer, eval_data, device))
    return progress.finish(train_data.stats, before, after, runtime.peak_memory_mb(device))


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
