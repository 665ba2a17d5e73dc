"""Bottleneck adapters: small trainable modules inside the layers of a frozen model.

An adapter (Houlsby et al., arXiv 1902.00751, section 2.1) squeezes a hidden vector h (D) through m << D numbers and
adds the result back:

    h <- h + W_up gelu(W_down h + b_down) + b_up          2 m D + D + m parameters

Houlsby places one after the attention and one after the MLP of every layer, each before the residual addition. Pfeiffer
(arXiv 2005.00247) keeps only the one after the MLP. Attention and MLP both end in a linear layer (o_proj,
down_proj), so here an adapter wraps that layer, as a LoRA would. Unlike a LoRA it is not linear and cannot be merged.

Deviations: W_up starts at exactly zero instead of near zero, so training starts from the base model's outputs. The
base's norms stay frozen; the paper trains a copy of them for each task.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minillm.errors import UserError

PLACES = {"houlsby": ("self_attn.o_proj", "mlp.down_proj"), "pfeiffer": ("mlp.down_proj",)}


class AdapterLinear(nn.Module):
    """A frozen linear layer with an adapter on its output: x (..., in) -> (..., out).

    The trainable layers are down (out -> bottleneck) and up (bottleneck -> out). They are float32 even when the base is
    bf16. Raises UserError if the bottleneck is below 1 or above the size of the output.
    """

    def __init__(self, base: nn.Linear, bottleneck: int):
        super().__init__()
        check_bottleneck(base, bottleneck)
        self.base = base.requires_grad_(False)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.down = nn.Linear(base.out_features, bottleneck, dtype=dtype)  # on the CPU, as in lora.py
        self.up = nn.Linear(bottleneck, base.out_features, dtype=dtype)
        nn.init.normal_(self.down.weight, std=base.out_features**-0.5)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)
        for linear in (self.down, self.up):
            linear.to(base.weight.device)

    def forward(self, x):
        h = self.base(x)
        # The base may be bf16 while `down` is float32. Under autocast h would be cast straight back, into another copy.
        wide = h if torch.is_autocast_enabled(h.device.type) else h.to(self.down.weight.dtype)
        return h + self.up(F.gelu(self.down(wide))).to(h.dtype)


def check_bottleneck(base: nn.Linear, bottleneck: int, name: str = "this layer"):
    """Raise UserError if an adapter on `base` cannot have this width."""
    if not 1 <= bottleneck <= base.out_features:
        raise UserError(f"bottleneck {bottleneck} does not fit {name} ({base.out_features} outputs): "
                        f"it must be between 1 and {base.out_features}")


def apply_bottleneck(model: nn.Module, bottleneck: int, placement: str = "houlsby") -> nn.Module:
    """Freeze the model and insert the adapters, in place. Returns the model.

    placement: a key of PLACES. Raises UserError for an unknown one, a bottleneck that does not fit, or a second set of
    adapters; the model is then unchanged.
    """
    if placement not in PLACES:
        raise UserError(f"placement {placement!r} must be one of {', '.join(PLACES)}")
    places = {name: module for name, module in model.named_modules()
              if type(module) is nn.Linear and name.endswith(PLACES[placement])}
    if not places or any(isinstance(module, AdapterLinear) for module in model.modules()):
        raise UserError("the model has adapters already, or no plain o_proj and down_proj layers; "
                        "take off what is on it first")
    for name, base in places.items():
        check_bottleneck(base, bottleneck, name)
    model.requires_grad_(False)
    for name, base in places.items():
        model.set_submodule(name, AdapterLinear(base, bottleneck))
    return model
