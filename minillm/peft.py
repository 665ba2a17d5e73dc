"""Adapter folders in the PEFT package's format: LoRA, DoRA, bottleneck adapters, prefix tuning and prompt tuning.

A folder holds adapter_config.json and adapter_model.safetensors. Adapters saved here open in PEFT, and PEFT's adapters
load here. (PEFT has no bottleneck adapters; only the layout of their folder is the same.)

    python -m minillm.peft out/dpo                        # a LoRA and its base become a whole model, out/dpo/merged
    python -m minillm.peft out/dpo --out out/dpo-whole --model out/sft

Each setting in adapter_config.json is computed, ignored because it changes nothing, or refused by name. The tables
COMPUTED and IGNORED list the first two. Any other setting is refused unless it is empty, PEFT's way to say "not used".
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minillm.adapter import PLACES, AdapterLinear, apply_bottleneck
from minillm.checkpoint import check_tokenizer, check_weights, load_model, save_model
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.lora import DoRALinear, LoRALinear, check_rank, find_targets, merge_lora
from minillm.out_folder import check_out, take_place
from minillm.prefix import PromptTuning, apply_prefix, apply_prompt
from minillm.records import content_hash
from minillm.runtime import say
from minillm.safetensors import load_json, load_safetensors, save_json, save_safetensors, short
from minillm.tokenizer import Tokenizer


def save_adapter(model: nn.Module, folder, base: str | None = None):
    """Write the model's adapter, of any kind, to a folder that load_adapter and PEFT open.

    base: the folder of the base model, recorded for the reader. Raises UserError when the disk refuses, ValueError
    unless the model holds exactly one kind of adapter.
    """
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, **_describe(model)}
    save_json(Path(folder) / "adapter_config.json", config)
    save_safetensors(Path(folder) / "adapter_model.safetensors", _tensors(model))


def load_adapter(model: nn.Module, folder, base=None) -> nn.Module:
    """Put the adapter of a folder, of any kind, on the model, replacing the one it has. Returns the model, frozen.

    The base's weights are not changed, so several adapters can be tried on one loaded base. Raises UserError if the
    folder holds no adapter, needs something unsupported, or does not fit this base (the message then names tensors and
    shapes). The model is left as it was. base: the folder of the model; given, and where the run that made the adapter
    recorded a base of other weights, a note on stderr says so.
    """
    settings, stored = _read_folder(folder)
    before, prefix = _layers(model), model.model.prefix
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    remove_adapter(model)
    try:
        _apply(model, settings, stored, folder)
        tensors = _tensors(model)
        check_weights(tensors, stored, folder, "the adapter does not fit this base model")
        with torch.no_grad():
            for name, parameter in tensors.items():
                parameter.copy_(stored[name])
                if not parameter.isfinite().all():
                    raise UserError(f"{folder}/adapter_model.safetensors: {name} holds NaN or infinite numbers; "
                                    "train the adapter again (a lower --lr helps most often)")
    except BaseException:
        remove_adapter(model)
        for name, layer in before.items():
            model.set_submodule(name, layer)
        model.model.prefix = prefix
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        raise
    if base and _is_other_base(folder, base):
        say(f"note: {folder} was trained on another base than {base}: its weights have changed since, or it is another "
            "model; if the replies are worse than they were, train the adapter again", file=sys.stderr)
    return model.train(model.training)  # new layers start in training mode, with dropout


def _is_other_base(folder, base) -> bool:
    """Whether run_config.json beside an adapter tells of a base of other weights; its name and settings do not count.
    """
    path = Path(folder) / "run_config.json"
    run = load_json(path) if path.is_file() else {}
    contents = run.get("contents")  # {path: hashes of its files, with spaces between}, by records.fingerprint
    recorded = contents.get(str(run.get("model"))) if isinstance(contents, dict) else None
    return isinstance(recorded, str) and not {
        content_hash(file) for file in Path(base).glob("model*.safetensors")} <= set(recorded.split())


def remove_adapter(model: nn.Module) -> nn.Module:
    """Take any adapter off, in place. Returns the model, which is the base again; it stays frozen."""
    for name, layer in _layers(model).items():
        model.set_submodule(name, layer.base)
    model.model.prefix = None
    return model


def has_adapter(model: nn.Module) -> bool:
    """Whether the model holds an adapter of any kind. A merged LoRA does not count."""
    return bool(_layers(model)) or model.model.prefix is not None


def merge_adapter(folder, out, base: str = "", dtype: str = "auto"):
    """Write the base with the LoRA of a folder merged into it: a whole model, with what else the base's folder holds.

    base: its folder (default: the one that the adapter names). dtype: of the weights, as in save_model; they are added
    up in float32. What stood in `out` is renamed to out.bak. Raises UserError for an adapter that is no LoRA or does
    not fit, and for an `out` that cannot be used.
    """
    kind = _read_folder(folder)[0]["peft_type"]
    if kind != "LORA":
        raise UserError(f"{folder}: {kind} is no change of the weights; only lora and dora can be merged")
    if not base:
        base = str(load_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path"))
        if not os.path.isdir(base):  # PEFT may record a name of the hub
            raise UserError(f"{folder}/adapter_config.json names {short(base)} as its base, which is no folder here; "
                            "give the base with --model")
    out = Path(os.path.abspath(out))
    check_out(out, [folder, base])
    draft = out.with_name(out.name + ".new")
    if draft.exists():
        raise UserError(f"{draft} is in the way: the model is written there first; rename it")
    model, tokenizer = load_model(base), Tokenizer.load(base)
    check_tokenizer(model.config, tokenizer, base)
    merge_lora(load_adapter(model, folder, base))
    save_model(draft, model, tokenizer, dtype)
    take_place(draft, out)


# The settings of adapter_config.json

MOST_NAMES = 10_000  # of layers: each is compared with all layers of the model


def _is_whole(value):
    return type(value) is int and 1 <= value < 2**31


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 2**31  # NaN fails here too


def _is_fraction(value):
    return _is_number(value) and 0 <= value <= 1


def _is_layers(value):
    return all(type(layer) is int for layer in value) if isinstance(value, list) else type(value) is int


def _is_names(value):
    r"""A list of names, or a pattern.

    PEFT takes a str as a regular expression, and matching some of those never ends. Here only `.` and `\d` can be
    repeated, and repetitions, groups and alternatives are limited: matching a name takes milliseconds at worst.
    """
    if isinstance(value, list):
        return len(value) <= MOST_NAMES and all(isinstance(name, str) for name in value)
    if not isinstance(value, str) or len(value) > 1000:
        return False
    if not re.fullmatch(r"(\w|-|\\\.|\\d\+?|\.[*+]?|\(\?:|[()|^$])*", value):
        return False
    try:
        re.compile(value)
    except re.error:  # unbalanced parentheses
        return False
    return value.count("*") + value.count("+") <= 2 and value.count("(") <= 2 and value.count("|") <= 40


def _is_numbers_by_name(value):
    return isinstance(value, dict) and len(value) <= MOST_NAMES and all(
        re.fullmatch(r"\^?[\w.]+", key) and _is_number(value[key]) for key in value)


WHOLE = "a positive whole number"
NAMES = r"a list of names, or a simple pattern such as .*\.(q_proj|v_proj)"
BY_NAME = "an object {name: number}, where a name is no regular expression"
# {kind: {setting: (default, None if it is required; the allowed values or a test for them; what it must be)}}
COMPUTED = {
    "LORA": {
        "r": (8, _is_whole, WHOLE),
        "lora_alpha": (8, _is_number, "a number"),
        "lora_dropout": (0.0, _is_fraction, "a number between 0 and 1"),
        "use_rslora": (False, (True, False), "true or false"),
        "use_dora": (False, (True, False), "true or false"),
        "target_modules": (["q_proj", "v_proj"], _is_names, NAMES),
        "exclude_modules": ([], _is_names, NAMES),
        "layers_to_transform": ([], _is_layers, "the number of a layer or a list of them"),
        "layers_pattern": ([], ([], "", "layers", ["layers"]), "layers"),
        "rank_pattern": ({}, _is_numbers_by_name, BY_NAME),
        "alpha_pattern": ({}, _is_numbers_by_name, BY_NAME),
        "bias": ("none", ("none",), "none"),
        # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train beside a base whose weights they have changed.
        "init_lora_weights": (True, (True, False, "gaussian", "eva", "orthogonal", "mica"),
                              "one that leaves the base alone; in PEFT, save_pretrained(..., "
                              "path_initial_model_for_weight_conversion=...) converts the adapter to a plain LoRA"),
    },
    "BOTTLENECK": {
        "bottleneck": (None, _is_whole, WHOLE),
        "placement": (None, tuple(PLACES), f"one of {', '.join(PLACES)}"),
    },
    "PREFIX_TUNING": {
        "num_virtual_tokens": (None, _is_whole, WHOLE),
        "num_transformer_submodules": (1, (1,), "1"),
        "num_attention_heads": (0, _is_whole, WHOLE),
    },
    "PROMPT_TUNING": {
        "num_virtual_tokens": (None, _is_whole, WHOLE),
        "num_transformer_submodules": (1, (1,), "1"),
    },
}
# Records, how training started, settings that only matter beside a refused one, and sizes that the tensors show anyway.
IGNORED = set("""
    task_type peft_type peft_version auto_mapping base_model_name_or_path revision inference_mode runtime_config
    fan_in_fan_out merge_weights megatron_core qalora_group_size ensure_weight_tying
    loftq_config eva_config corda_config lora_ga_config
    init_weights prefix_projection encoder_hidden_size token_dim num_layers num_attention_heads
    prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs
""".split())


def _read_folder(folder) -> tuple:
    """(settings, {name: tensor}) of an adapter folder. The settings are the computed ones of its kind, all valid."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter: {path.name} is missing (train_lora.py writes one to out/lora)")
    config = load_json(path)

    def refuse(key, must_be):
        value = json.dumps(config.get(key))
        shown = value if len(value) <= 80 else value[:80] + "..."
        raise UserError(f"{path}: {key[:80]} = {shown} is not supported; it must be {must_be}")

    kind = config.get("peft_type")
    if kind not in list(COMPUTED):
        refuse("peft_type", f"one of {', '.join(COMPUTED)}")
    settings = {"peft_type": kind}
    for key, (default, allowed, must_be) in COMPUTED[kind].items():
        value = config.get(key)
        settings[key] = default if value is None else value
        if value is None and default is not None:
            continue
        if not (allowed(value) if callable(allowed) else value in allowed):
            refuse(key, must_be)
    for key in config:  # what is not in the tables
        if config[key] and key not in settings and key not in IGNORED:
            refuse(key, "empty")
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file() and path.with_suffix(".bin").is_file():
        raise UserError(f"{folder} holds only adapter_model.bin, a pickle, which can run code when loaded and is never "
                        "opened here; save the adapter again with a recent PEFT (save_pretrained)")
    return settings, load_safetensors(path)


# From settings to a model

def _apply(model, settings, stored, folder):
    """Put an adapter with these settings on a plain model; its tensors are still to be loaded."""
    kind, length = settings["peft_type"], settings.get("num_virtual_tokens")
    for name, tensor in stored.items() if length else ():  # before room is made for so many
        if tensor.shape[:1] != (length,):
            raise UserError(f"{folder}: the adapter does not fit num_virtual_tokens: {short(name)} "
                            f"{tuple(tensor.shape)} instead of {(length, *tensor.shape[1:])}")
    if kind == "BOTTLENECK":
        apply_bottleneck(model, settings["bottleneck"], settings["placement"])
    elif kind == "PROMPT_TUNING":
        apply_prompt(model, length, [0])
    elif kind == "PREFIX_TUNING":
        apply_prefix(model, length, [0])
        # Two heads of 12 numbers and four heads of 6 make tensors of one shape.
        stored_heads, heads = settings["num_attention_heads"], model.config.num_key_value_heads
        if stored_heads not in (0, heads):
            raise UserError(f"{folder}: the adapter does not fit this base model: num_attention_heads {stored_heads} "
                            f"instead of {heads}")
    else:
        targets = _find_targets(model, settings, folder)
        model.requires_grad_(False)
        for name, base in targets.items():
            rank = _by_name(settings["rank_pattern"], name, settings["r"])
            alpha = _by_name(settings["alpha_pattern"], name, settings["lora_alpha"])
            check_rank(base, rank, name)
            layer_class = DoRALinear if settings["use_dora"] else LoRALinear
            layer = layer_class(base, rank, alpha, settings["lora_dropout"], settings["use_rslora"])
            model.set_submodule(name, layer)


def _find_targets(model, settings, folder) -> dict:
    """{name: nn.Linear} as chosen by target_modules, exclude_modules and layers_to_transform."""
    wanted, excluded, numbers = (settings[key] for key in ("target_modules", "exclude_modules", "layers_to_transform"))
    if isinstance(wanted, str) and wanted != "all-linear":
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        wanted = [name for name in linear if _matches(name, wanted)] or wanted  # find_targets then names the pattern
    numbers = numbers if isinstance(numbers, list) else [numbers]
    targets = {name: base for name, base in find_targets(model, wanted).items() if not _matches(name, excluded)
               and (not numbers or int(name.split(".")[2]) in numbers)}  # model.layers.7.mlp.up_proj
    if not targets:
        raise UserError(f"{folder}/adapter_config.json: exclude_modules and layers_to_transform leave nothing to adapt")
    return targets


def _matches(name: str, wanted) -> bool:
    """Whether a module is meant: by the end of its name (a list), or by a pattern for the whole name (a str)."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted)


def _by_name(values: dict, name: str, default):
    """The value of the first key that is the end of the module's name, or, after ^, the whole name."""
    found = [values[key] for key in values if _matches(name, [key]) or key == f"^{name}"]
    return found[0] if found else default


# From a model to settings and tensors

def _layers(model) -> dict:
    """{name: layer} of all LoRA and adapter layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (LoRALinear, AdapterLinear))}


def _tensors(model) -> dict:
    """{name in the file: parameter} of the adapter."""
    if model.model.prefix is not None:
        return {"prompt_embeddings": model.model.prefix.prompt_embeddings}
    tensors = {}
    for name, layer in _layers(model).items():
        for key, parameter in layer.named_parameters():
            if not key.startswith("base."):
                # PEFT's A and B are linear layers, its magnitude is a plain vector.
                suffix = ".weight" if key in ("lora_A", "lora_B") else ""
                tensors[f"base_model.model.{name}.{key}{suffix}"] = parameter
    return tensors


def _describe(model) -> dict:
    """The settings of the model's adapter, as in adapter_config.json."""
    layers, prefix, c = _layers(model), model.model.prefix, model.config
    if len({isinstance(layer, LoRALinear) for layer in layers.values()}) + (prefix is not None) != 1:
        raise ValueError("the model must hold one kind of adapter to save it")
    if prefix is not None:
        prompt = isinstance(prefix, PromptTuning)
        heads = c.num_attention_heads if prompt else c.num_key_value_heads
        return {"peft_type": "PROMPT_TUNING" if prompt else "PREFIX_TUNING", "num_virtual_tokens": prefix.length,
                "num_transformer_submodules": 1, "num_layers": c.num_hidden_layers, "num_attention_heads": heads,
                "token_dim": c.hidden_size if prompt else heads * c.head_dim}
    one = next(iter(layers.values()))
    if isinstance(one, AdapterLinear):
        placement = "houlsby" if any(name.endswith("o_proj") for name in layers) else "pfeiffer"
        return {"peft_type": "BOTTLENECK", "bottleneck": one.down.out_features, "placement": placement}
    ends = sorted({name.split(".")[-1] for name in layers})
    # Short names where they mean just these layers, else whole ones.
    same_ends = [name for name, module in model.named_modules()
                 if isinstance(module, (nn.Linear, LoRALinear)) and name.split(".")[-1] in ends]
    return {"peft_type": "LORA", "r": one.r, "lora_alpha": one.alpha, "lora_dropout": one.dropout.p,
            "use_rslora": one.rslora, "use_dora": isinstance(one, DoRALinear), "bias": "none", "fan_in_fan_out": False,
            "target_modules": ends if len(same_ends) == len(layers) else list(layers),
            "rank_pattern": {name: layer.r for name, layer in layers.items() if layer.r != one.r},
            "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != one.alpha}}


# python -m minillm.peft

@dataclass
class Config:
    """The flags of the command."""

    adapter: str = flag("out/lora", "folder of a LoRA", positional=True)
    out: str = flag("", "folder to write (default: merged, in the adapter's)")
    model: str = flag("", "checkpoint folder of its base (default: the one that adapter_config.json names)")
    save_dtype: str = flag("auto", "of the saved weights; auto: as in the base",
                           choices=["auto", "float32", "bfloat16"])


def main(cfg: Config):
    out = cfg.out or Path(cfg.adapter) / "merged"
    merge_adapter(cfg.adapter, out, cfg.model, cfg.save_dtype)
    say(f"{out}: a whole model, for --model")


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
