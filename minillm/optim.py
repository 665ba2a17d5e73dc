"""Optimizers with parameter groups, and the learning-rate schedule."""

import math

import torch

from minillm import runtime


def make_optimizers(model, lr: float, weight_decay: float = 0.1, betas=(0.9, 0.95), muon: bool = False) -> list:
    """The optimizers for all trainable parameters of `model`.

    AdamW (arXiv 1711.05101); weight decay only on matrices, not on norms, biases and embeddings. With `muon`, the
    hidden matrices are trained by Muon (arXiv 2502.16982: the momentum is orthogonalised, and scaled by
    0.2 sqrt(max(rows, columns)) so that one learning rate suits both optimizers).
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed_tokens" in n or "lm_head" in n]
    groups, optimizers = [{"params": others, "weight_decay": 0.0}] if others else [], []
    if muon and matrices:
        optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
    elif matrices:
        groups = [{"params": matrices, "weight_decay": weight_decay}] + groups
    if groups:
        on_cuda = named[0][1].device.type == "cuda"
        optimizers += [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=on_cuda)]
    return optimizers


def update(model, optimizers: list, max_grad_norm: float):
    """An optimizer step: gradients are summed over the processes, scaled down where they are longer than max_grad_norm,
    applied, and cleared."""
    runtime.sum_gradients(model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def schedule(step: int, total_steps: int, warmup_steps: int, floor: float = 0.1) -> float:
    """The factor on the peak learning rate before update `step` (0-based): linear warm-up, cosine down to `floor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizers: list, lr: float):
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
