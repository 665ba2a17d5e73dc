"""Optimizers with parameter groups, and the learning-rate schedule."""

import math

import torch


def make_optimizers(model, lr: float, weight_decay: float = 0.1, betas=(0.9, 0.95), muon: bool = False) -> list:
    """The optimizers for all trainable parameters of `model`.

    AdamW (arXiv 1711.05101); weight decay only on matrices, not on norms, biases and embeddings. With `muon`, the
    hidden matrices are trained by Muon (arXiv 2502.16982: the momentum is orthogonalised, and scaled by
    0.2 sqrt(max(rows, columns)) so that one learning rate suits both optimizers).
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    is_embedding = lambda n: "embed_tokens" in n or "lm_head" in n
    matrices = [p for n, p in named if p.ndim == 2 and not is_embedding(n)]
    others = [p for n, p in named if p.ndim != 2 or is_embedding(n)]
    fused = bool(named) and named[0][1].device.type == "cuda"
    adamw = lambda groups: torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=fused)
    rest = {"params": others, "weight_decay": 0.0}
    if muon and matrices:
        optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
        optimizers += [adamw([rest])] if others else []
    else:
        optimizers = [adamw([{"params": matrices, "weight_decay": weight_decay}, rest])]
    return optimizers


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
