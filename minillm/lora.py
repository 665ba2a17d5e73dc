"""LoRA, rsLoRA and DoRA: train a low-rank update beside a frozen matrix.

LoRA (arXiv 2106.09685, section 4.1) leaves W (out, in) frozen and trains two thin matrices of rank r:

    y = W x + alpha / r * B A dropout(x)

A (r, in) starts Gaussian and B (out, r) starts at zero, so y = W x exactly at the start.

rsLoRA (arXiv 2312.03732, theorem 3.2) scales by alpha / sqrt(r) instead, so that a larger r does not learn more slowly.

DoRA (arXiv 2402.09353, equation 5) trains the length of each row of the weight separately from its direction:

    V = W + alpha / r * B A        W' = m * V / ||V||        m = ||W|| at the start

After training, merge_lora adds the update to W. The merged model is as fast as the base.

Deviations: A starts with standard deviation 1 / r (PEFT's "gaussian"; the papers leave it open). The theorem of rsLoRA
assumes one that does not depend on r; so here a larger r still learns more slowly. DoRA's norm is taken per output (per
row of W), as in the authors' code; the paper's text says per column. ||V|| is treated as a constant in the backward
pass (the paper's section 4.3). Dropout falls on the input of B A alone; in the authors' code and in the PEFT package,
DoRA's falls on a part of W x as well: (m / ||V|| - 1) W dropout(x).
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from minillm.errors import UserError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update: x (..., in) -> (..., out).

    The trainable tensors are lora_A (r, in) and lora_B (out, r). They are float32 even when the base is bf16.
    Raises UserError if r is below 1 or above the smaller side of the matrix.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        check_rank(base, r)
        self.enabled = True
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = nn.Dropout(dropout)
        device, dtype = base.weight.device, torch.promote_types(base.weight.dtype, torch.float32)
        # Drawn on the CPU, so that a seed gives the same A wherever the model is (--shard loads it into main memory).
        self.lora_A = nn.Parameter((torch.randn(r, base.in_features, dtype=dtype) / r).to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=dtype, device=device))

    def update(self, x):
        """scaling * B A dropout(x)"""
        x = self.dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            # The base may be bf16 while A is float32. Under autocast x would be cast straight back, into another copy.
            x = x.to(self.lora_A.dtype)
        return self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def forward(self, x):
        y = self.base(x)
        return y + self.update(x).to(y.dtype) if self.enabled else y

    def merged_weight(self):
        """W + scaling * B A, in float32 even under autocast."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.base.weight.to(self.lora_A.dtype) + self.scaling * self.lora_B @ self.lora_A


class DoRALinear(LoRALinear):
    """A LoRALinear that also trains the length of each row, lora_magnitude_vector (out,)."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base, r, alpha, dropout, rslora)
        weight = base.weight.detach()  # B is still zero: the norms are those of W, as the model will hold it (shard.py)
        weight = weight.to(getattr(base.weight, "held_in", weight.dtype)).to(self.lora_A.dtype)
        self.lora_magnitude_vector = nn.Parameter(torch.linalg.vector_norm(weight, dim=1))

    @torch.no_grad()
    def row_norms(self):
        """||V||, one number per output. No gradient flows through it. (Above 0: a row of zeros has m = 0 as well.)"""
        return torch.linalg.vector_norm(super().merged_weight(), dim=1).clamp(min=1e-12)

    def forward(self, x):
        y = self.base(x)
        if not self.enabled:
            return y
        without_bias = y if self.base.bias is None else y - self.base.bias
        # Adding the change to y keeps the start exact: the change is then 0, while m / ||V|| * V x + bias is rounded.
        change = self.lora_magnitude_vector / self.row_norms() * (without_bias + self.update(x)) - without_bias
        return y + change.to(y.dtype)

    def merged_weight(self):
        """m * V / ||V||"""
        return (self.lora_magnitude_vector / self.row_norms())[:, None] * super().merged_weight()


def check_rank(base: nn.Linear, r: int, name: str = "this layer"):
    """Raise UserError if `base` cannot take a LoRA of rank r."""
    largest = min(base.in_features, base.out_features)
    if type(r) is not int or not 1 <= r <= largest:
        raise UserError(f"rank {r} does not fit {name} ({base.out_features} x {base.in_features}): "
                        f"it must be between 1 and {largest}")


def find_targets(model: nn.Module, target_modules) -> dict:
    """{name: nn.Linear} of the layers to adapt.

    target_modules: the last parts of their names ("q_proj", "mlp.up_proj"), or "all-linear" for all but the head.
    Raises UserError for a name that matches no linear layer, for the head, or if the model already has a LoRA.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError("the model has a LoRA already; merge it or take it off first")
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    body = {name: module for name, module in linear.items() if name != "lm_head"}
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if targets == ["all-linear"]:
        return body
    matches = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in targets}
    known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in body))
    if nothing := [target for target in matches if not matches[target]] or ([] if matches else ["(none given)"]):
        raise UserError(f"target modules {', '.join(nothing)} match no linear layer of the model; it has {known}")
    chosen = set().union(*matches.values())
    if "lm_head" in chosen:
        # Other code reads the head's weight directly (it is often tied to the embedding) and would miss the update.
        raise UserError(f"target module lm_head cannot take a LoRA here; choose among {known}")
    return {name: module for name, module in body.items() if name in chosen}


def apply_lora(model: nn.Module, r: int, alpha: float, target_modules=TARGETS, dropout: float = 0.0,
               rslora: bool = False, dora: bool = False) -> nn.Module:
    """Freeze the model and wrap each target in a LoRALinear (or DoRALinear), in place. Returns the model.

    target_modules as in find_targets. Raises UserError for targets that match nothing, a rank that does not fit, or a
    second LoRA; the model is then unchanged.
    """
    targets = find_targets(model, target_modules)
    for name, base in targets.items():
        check_rank(base, r, name)
    model.requires_grad_(False)
    for name, base in targets.items():
        model.set_submodule(name, (DoRALinear if dora else LoRALinear)(base, r, alpha, dropout, rslora))
    return model


@contextlib.contextmanager
def lora_off(model: nn.Module):
    """Inside the block the model is the frozen base. So a model with a LoRA is also its own reference, held once.

    Of a model without a LoRA nothing changes.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge_lora(model: nn.Module) -> dict:
    """Replace each LoRA by one plain linear layer with the merged weight. Returns what unmerge_lora needs to undo it.

    Raises UserError if there is no LoRA, or if the base is in half precision, where the sum would be rounded.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise UserError("nothing to merge: the model holds no LoRA (it may be merged already)")
    if any(layer.base.weight.dtype.itemsize < 4 for layer in layers.values()):
        raise UserError("the base is in half precision, where merging rounds the update away; "
                        "load it in float32 to merge")
    for name, layer in layers.items():
        merged = nn.Linear(layer.base.in_features, layer.base.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
        merged.bias = layer.base.bias
        model.set_submodule(name, merged)
    return layers


def unmerge_lora(model: nn.Module, layers: dict):
    """Undo merge_lora, given what it returned. The base's weights were never written to: they come back bit for bit."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)
