"""One door to the three families: put any saved adapter on a loaded base, exchange it for another, take it off."""

from torch import nn

from minillm import adapter, checkpoint, lora, prefix

LOADERS = {"LORA": lora.load_lora, "BOTTLENECK": adapter.load_bottleneck, "PREFIX_TUNING": prefix.load_prefix,
           "PROMPT_TUNING": prefix.load_prefix}


def load_adapter(model: nn.Module, folder) -> nn.Module:
    """Put the adapter of a folder on the model, in place of the one that may be there; returns the model, frozen.

    The adapter's kind is read from the folder: LoRA, DoRA, bottleneck adapters, prefix or prompt tuning. The base's
    weights are not touched, so several adapters can be tried on one loaded base. Raises UserError when it does not fit.
    """
    config, _ = checkpoint.read_adapter(folder, *LOADERS)
    remove_adapter(model)
    return LOADERS[config["peft_type"]](model, folder)


def remove_adapter(model: nn.Module) -> nn.Module:
    """Take any adapter off, in place; returns the model, which computes what the base computed. It stays frozen."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (lora.LoRALinear, adapter.AdapterLinear)):
            model.set_submodule(name, module.base)
    model.model.prefix = None
    return model
