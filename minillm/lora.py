"""LoRA, rsLoRA and DoRA: the change of a frozen matrix is the product of two thin ones.

LoRA (arXiv 2106.09685, section 4.1). Beside a frozen W (out, in) two matrices of rank r are trained:

    y = W x + alpha / r * B A dropout(x)          A (r, in) Gaussian, B (out, r) zero: at the start y = W x exactly

rsLoRA (arXiv 2312.03732, theorem 3.2) scales by alpha / sqrt(r) instead, so that a larger r does not slow learning.

DoRA (arXiv 2402.09353, equation 5) trains the length of each row of the weight apart from its direction:

    V = W + alpha / r * B A        W' = m * V / ||V||        m = ||W|| at the start

After training, the change can be added to W (merge_lora): the model is then as fast as the base.

Deviations: DoRA's norm is taken for each output (the row of W that makes it), as in the authors' code. As in their
section 4.3, ||V|| counts as a constant in the backward pass.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from minillm.checkpoint import check_weights, read_adapter, save_adapter
from minillm.errors import UserError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Settings of the PEFT package that change what is computed, and that only their empty values leave as it is here.
UNSUPPORTED = ("alora_invocation_tokens", "alpha_pattern", "arrow_config", "exclude_modules", "fan_in_fan_out", "kasa_config",
               "layer_replication", "layers_pattern", "layers_to_transform", "lora_bias", "megatron_config", "modules_to_save",
               "monteclora_config", "rank_pattern", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
               "velora_config")


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update: x (..., in) -> (..., out).

    Trained are lora_A (r, in) and lora_B (out, r), in float32 also where the base is bf16. Raises UserError for a rank
    below 1 or above the smaller side of the matrix.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        check_rank(base, r)
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = nn.Dropout(dropout)
        like = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features, **like) / r)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))

    def update(self, x):
        """scaling * B A dropout(x)"""
        x = self.dropout(x).to(self.lora_A.dtype)
        return self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def forward(self, x):
        y = self.base(x)
        return y + self.update(x).to(y.dtype)

    def merged_weight(self):
        """W + scaling * B A, in float32 also under autocast."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.base.weight.to(self.lora_A.dtype) + self.scaling * self.lora_B @ self.lora_A


class DoRALinear(LoRALinear):
    """LoRALinear whose rows keep the trained length lora_magnitude_vector (out,)."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base, r, alpha, dropout, rslora)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())  # B is zero: these are the norms of W

    @torch.no_grad()
    def row_norms(self):
        """||V||, one number for each output; no gradient flows through it."""
        return torch.linalg.vector_norm(super().merged_weight(), dim=1)

    def forward(self, x):
        y = self.base(x)
        without_bias = y if self.base.bias is None else y - self.base.bias
        change = self.lora_magnitude_vector / self.row_norms() * (without_bias + self.update(x)) - without_bias
        return y + change.to(y.dtype)  # at the start the change is exactly zero, which m / ||V|| * V x + bias is not

    def merged_weight(self):
        """m * V / ||V||"""
        return (self.lora_magnitude_vector / self.row_norms())[:, None] * super().merged_weight()


def check_rank(base: nn.Linear, r: int, name: str = "this layer"):
    """Raise UserError for a rank that a LoRA on `base` cannot have."""
    largest = min(base.in_features, base.out_features)
    if not 1 <= r <= largest:
        raise UserError(f"rank {r} does not fit {name} ({base.out_features} x {base.in_features}): it must be between 1 and {largest}")


def find_targets(model: nn.Module, target_modules) -> dict:
    """{name: nn.Linear} of the modules that are meant: by the last parts of their names, or (a str) by a regular expression.

    Raises UserError for a name that matches no linear layer.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError("the model has a LoRA already; merge it or take it off first")
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if target_modules == "all-linear":
        return {name: module for name, module in linear.items() if name != "lm_head"}
    if isinstance(target_modules, str):
        matches = {target_modules: [name for name in linear if re.fullmatch(target_modules, name)]}
    else:
        matches = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in target_modules}
    known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linear if name != "lm_head"))
    if nothing := [target for target, names in matches.items() if not names] or ([] if matches else ["(none given)"]):
        raise UserError(f"target modules {', '.join(map(str, nothing))} match no linear layer of the model; it has {known}")
    chosen = set().union(*matches.values())
    if "lm_head" in chosen:  # its weight is read elsewhere (often tied to the embedding), where an update would be missed
        raise UserError(f"target module lm_head cannot take a LoRA here; choose among {known}")
    return {name: linear[name] for name in linear if name in chosen}


def apply_lora(model: nn.Module, r: int, alpha: float, target_modules=TARGETS, dropout: float = 0.0, rslora: bool = False,
               dora: bool = False) -> nn.Module:
    """Freeze the model and put a LoRALinear (or DoRALinear) around each target, in place; returns the model.

    Raises UserError for targets that match nothing, a rank that does not fit, or a second LoRA: the model is then as before.
    """
    targets = find_targets(model, target_modules)
    for name, base in targets.items():
        check_rank(base, r, name)
    model.requires_grad_(False)
    for name, base in targets.items():
        model.set_submodule(name, (DoRALinear if dora else LoRALinear)(base, r, alpha, dropout, rslora))
    return model


def lora_layers(model: nn.Module) -> dict:
    """{name: LoRALinear} of the model, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> dict:
    """Replace each LoRA by one plain linear layer with the merged weight; returns what unmerge_lora takes to undo it.

    Raises UserError when there is no LoRA (as when it is merged already), or when the base is in half precision, where
    the sum would be rounded: call model.float() first.
    """
    layers = lora_layers(model)
    if not layers:
        raise UserError("nothing to merge: the model holds no LoRA (it may be merged already)")
    if any(layer.base.weight.dtype.itemsize < 4 for layer in layers.values()):
        raise UserError("the base is in half precision, where merging rounds the update away; load it in float32 to merge")
    for name, layer in layers.items():
        merged = nn.Linear(layer.base.in_features, layer.base.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
        merged.bias = layer.base.bias
        model.set_submodule(name, merged)
    return layers


def unmerge_lora(model: nn.Module, layers: dict):
    """Undo merge_lora with what it returned. The base's weights come back to the last bit: they were never written to."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)


# ------------------------------------------------------------------------------------------- the PEFT package's folder

def stored_name(name: str) -> str:
    """model.layers.0.mlp.up_proj.lora_A -> base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"""
    return f"base_model.model.{name}" + (".weight" if name.endswith(("lora_A", "lora_B")) else "")


def save_lora(model: nn.Module, folder, base: str | None = None):
    """Write adapter_config.json and adapter_model.safetensors, for load_lora and for the PEFT package.

    base: the folder of the base model, for the record. Raises ValueError for a model without a LoRA.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model holds no LoRA")
    one = next(iter(layers.values()))
    targets = sorted({name.split(".")[-1] for name in layers})
    same_name = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear)) and n.split(".")[-1] in targets]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": one.r,
              "lora_alpha": one.alpha, "lora_dropout": one.dropout.p, "use_rslora": one.rslora, "use_dora": isinstance(one, DoRALinear),
              "target_modules": targets if len(same_name) == len(layers) else list(layers), "bias": "none",
              "fan_in_fan_out": False, "modules_to_save": None}
    save_adapter(folder, config, {stored_name(f"{name}.{key}"): p for name, layer in layers.items()
                                  for key, p in layer.named_parameters(recurse=False)})


@torch.no_grad()
def load_lora(model: nn.Module, folder) -> nn.Module:
    """Put the LoRA or DoRA of a folder (ours or the PEFT package's) on the model, in place; returns the model.

    Raises UserError, and leaves the model as it was, when the folder holds something else, asks for what is not
    supported, or does not fit this base: then the tensors and their shapes are named.
    """
    config, stored = read_adapter(folder, "LORA")
    for key in UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{folder}/adapter_config.json: {key} = {config[key]} is not supported")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder}/adapter_config.json: bias = {config['bias']} is not supported; only none is")
    r, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(r) is not int or type(alpha) not in (int, float) or type(dropout) not in (int, float) or not 0 <= dropout <= 1:
        raise UserError(f"{folder}/adapter_config.json: r = {r}, lora_alpha = {alpha} and lora_dropout = {dropout} must be numbers")
    dora, targets = bool(config.get("use_dora")), find_targets(model, config.get("target_modules") or TARGETS)
    expected = {}
    for name, base in targets.items():
        expected[stored_name(f"{name}.lora_A")] = torch.empty(r, base.in_features, device="meta")
        expected[stored_name(f"{name}.lora_B")] = torch.empty(base.out_features, r, device="meta")
        if dora:
            expected[stored_name(f"{name}.lora_magnitude_vector")] = torch.empty(base.out_features, device="meta")
    check_weights(expected, stored, folder, "the adapter does not fit this base model")
    apply_lora(model, r, alpha, list(targets), dropout, bool(config.get("use_rslora")), dora)
    for name, layer in lora_layers(model).items():
        for key, parameter in layer.named_parameters(recurse=False):
            parameter.copy_(stored[stored_name(f"{name}.{key}")])
    return model
