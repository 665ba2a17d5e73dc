"""Bottleneck adapters: small modules between the layers of a frozen model.

An adapter (Houlsby et al., arXiv 1902.00751, section 2.1) squeezes a hidden vector h (D) through m << D numbers:

    h <- h + W_up gelu(W_down h + b_down) + b_up          2 m D + D + m parameters

Houlsby puts one after the attention and one after the MLP of every layer, each before the residual addition; Pfeiffer
(arXiv 2005.00247, section 3) keeps only the one after the MLP. The last thing that either half computes is a linear layer
(o_proj, down_proj), so an adapter is put around that layer, as a LoRA would be. Unlike a LoRA it is not linear and cannot
be merged.

Deviations: W_up starts at zero, not merely near it, so that training starts at the base exactly; the base's norms stay
frozen (the paper trains a copy of them for each task).
"""

import torch
import torch.nn.functional as F
from torch import nn

from minillm.checkpoint import check_weights, read_adapter, save_adapter
from minillm.errors import UserError

PLACES = {"houlsby": ("self_attn.o_proj", "mlp.down_proj"), "pfeiffer": ("mlp.down_proj",)}


class AdapterLinear(nn.Module):
    """A frozen linear layer and an adapter on its output: x (..., in) -> (..., out).

    Trained are down (out -> bottleneck) and up (bottleneck -> out), in float32 also where the base is bf16. Raises
    UserError for a bottleneck below 1 or above the output's size.
    """

    def __init__(self, base: nn.Linear, bottleneck: int):
        super().__init__()
        check_bottleneck(base, bottleneck)
        self.base = base.requires_grad_(False)
        like = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.down = nn.Linear(base.out_features, bottleneck, **like)
        self.up = nn.Linear(bottleneck, base.out_features, **like)
        nn.init.normal_(self.down.weight, std=base.out_features**-0.5)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x):
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h.to(self.down.weight.dtype)))).to(h.dtype)


def check_bottleneck(base: nn.Linear, bottleneck: int, name: str = "this layer"):
    """Raise UserError for a width that an adapter on `base` cannot have."""
    if not 1 <= bottleneck <= base.out_features:
        raise UserError(f"bottleneck {bottleneck} does not fit {name} ({base.out_features} outputs): it must be between 1 and {base.out_features}")


def find_places(model: nn.Module, placement: str) -> dict:
    """{name: nn.Linear} of the layers that get an adapter; raises UserError for a model that has adapters already."""
    if placement not in PLACES:
        raise UserError(f"placement {placement!r} must be one of {', '.join(PLACES)}")
    places = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name.endswith(PLACES[placement])}
    if not places or any(isinstance(module, AdapterLinear) for module in model.modules()):
        raise UserError("the model has adapters already, or no o_proj and down_proj layers of its own; take off what is on it first")
    return places


def apply_bottleneck(model: nn.Module, bottleneck: int, placement: str = "houlsby") -> nn.Module:
    """Freeze the model and insert the adapters, in place; returns the model.

    Raises UserError for a bottleneck that does not fit, or a second set of adapters: the model is then as before.
    """
    places = find_places(model, placement)
    for name, base in places.items():
        check_bottleneck(base, bottleneck, name)
    model.requires_grad_(False)
    for name, base in places.items():
        model.set_submodule(name, AdapterLinear(base, bottleneck))
    return model


def adapter_tensors(model: nn.Module) -> dict:
    """{name in the file: parameter} of the model's adapters."""
    return {f"base_model.model.{name}.{key}": parameter for name, module in model.named_modules() if isinstance(module, AdapterLinear)
            for key, parameter in module.named_parameters() if not key.startswith("base.")}


def save_bottleneck(model: nn.Module, folder, base: str | None = None):
    """Write adapter_config.json and adapter_model.safetensors (the PEFT package has no such adapters; the kind of folder is its).

    base: the folder of the base model, for the record. Raises ValueError for a model without adapters.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}
    if not layers:
        raise ValueError("the model holds no adapters")
    placement = "houlsby" if any(name.endswith("o_proj") for name in layers) else "pfeiffer"
    config = {"peft_type": "BOTTLENECK", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
              "bottleneck": next(iter(layers.values())).down.out_features, "placement": placement}
    save_adapter(folder, config, adapter_tensors(model))


@torch.no_grad()
def load_bottleneck(model: nn.Module, folder) -> nn.Module:
    """Insert the adapters of a folder into the model, in place; returns the model.

    Raises UserError, and leaves the model as it was, when the folder holds something else or does not fit this base:
    then the tensors and their shapes are named.
    """
    config, stored = read_adapter(folder, "BOTTLENECK")
    bottleneck, placement = config.get("bottleneck"), config.get("placement")
    if type(bottleneck) is not int or placement not in PLACES:
        raise UserError(f"{folder}/adapter_config.json: bottleneck = {bottleneck} must be a number, placement = {placement} one of {', '.join(PLACES)}")
    expected = {}
    for name, base in find_places(model, placement).items():
        shapes = {"down.weight": (bottleneck, base.out_features), "down.bias": (bottleneck,),
                  "up.weight": (base.out_features, bottleneck), "up.bias": (base.out_features,)}
        expected |= {f"base_model.model.{name}.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    check_weights(expected, stored, folder, "the adapter does not fit this base model")
    apply_bottleneck(model, bottleneck, placement)
    for name, parameter in adapter_tensors(model).items():
        parameter.copy_(stored[name])
    return model
