"""Optimizers with parameter groups, and the learning-rate schedule."""

import math

import torch

from minillm import runtime

# How many numbers Muon orthogonalises at a time: enough to keep the device busy, and no more memory than that.
NUMBERS_AT_ONCE = {"cpu": 2**22, "gpu": 2**26}


def make_optimizers(model, lr: float, weight_decay: float = 0.1, betas=(0.9, 0.95), muon: bool = False) -> list:
    """The optimizers for all trainable parameters of `model`.

    AdamW (arXiv 1711.05101); weight decay only on hidden matrices (and a reward model's head), not on norms, biases,
    embeddings and the LM head. With `muon`, the hidden matrices are trained by Muon.
    """
    if runtime.in_lockstep(model):
        model.reshard()  # since a forward pass embedding and head are whole
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed_tokens" in n or "lm_head" in n]
    groups, optimizers = [{"params": others, "weight_decay": 0.0}] if others else [], []
    if muon and matrices:
        optimizers = [Muon(matrices, lr, weight_decay)]
    elif matrices:
        groups = [{"params": matrices, "weight_decay": weight_decay}] + groups
    if groups:
        fused = named[0][1].device.type in ("cpu", "cuda")  # one kernel instead of a dozen
        optimizers += [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)]
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon, arXiv 2502.16982): momentum, orthogonalised, for matrices.

    With gradient G, momentum M, weight W (rows, columns):

        M <- momentum * M + (1 - momentum) * G
        U <- newton_schulz(momentum * M + (1 - momentum) * G)        (Nesterov: one step ahead)
        W <- W - lr * (weight_decay * W + 0.2 sqrt(max(rows, columns)) * U)

    Why orthogonalise: the gradient of a matrix is nearly of low rank. A few directions are large and would get all of
    the step; in U every direction has about the same length, so the rare ones are learned too. The factor
    0.2 sqrt(max(rows, columns)) gives U the size of AdamW's updates, so one learning rate suits both optimizers.

    torch.optim.Muon is the plain twin (adjust_lr_fn="match_rms_adamw"), a loop over the matrices with some 23 kernels
    for each. Here all matrices of one shape are stacked and share theirs.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for params in batches_of_one_shape(trained):
                self._update(params, group["lr"], group["weight_decay"], group["momentum"])

    def _update(self, params: list, lr: float, weight_decay: float, momentum: float):
        """One step of N matrices of one shape. A _foreach function is one kernel for a whole list of tensors."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients, momenta = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        device, dtype = params[0].device, params[0].dtype
        ahead = torch.empty(len(params), *params[0].shape, device=device, dtype=runtime.precision(device))
        torch._foreach_copy_(ahead.unbind(), torch._foreach_lerp(gradients, momenta, momentum))  # stacked and rounded
        updates = newton_schulz(ahead).to(dtype)  # (N, rows, columns)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates.unbind(), alpha=-lr * 0.2 * math.sqrt(max(params[0].shape)))


def batches_of_one_shape(matrices: list) -> list:
    """The matrices as lists of equal shape and dtype, in order, none much larger than the device needs."""
    alike = {}
    for matrix in matrices:
        alike.setdefault((matrix.shape, matrix.dtype), []).append(matrix)
    batches = []
    for (shape, _), group in alike.items():
        numbers = NUMBERS_AT_ONCE["cpu" if group[0].device.type == "cpu" else "gpu"]
        size = max(1, numbers // shape.numel())
        batches += [group[i:i + size] for i in range(0, len(group), size)]
    return batches


def newton_schulz(x, steps: int = 5):
    """Roughly the nearest orthogonal matrix to each of x (N, rows, columns): U V^T, where U S V^T is its SVD.

    Every step applies p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5 to all singular values s, with products of matrices
    alone: p(X) = a X + (b A + c A A) X with A = X X^T. They begin in [0, 1], because X is divided by its Frobenius
    norm. p is steep at 0, which lifts small ones fast; the price is that those above 0.002 end anywhere between 0.68
    and 1.21, and not at 1, which does no harm. Computed in x's dtype; bf16 is enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT  # so that A is the smaller square
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


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
