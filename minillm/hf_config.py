"""config.json of Hugging Face as a ModelConfig, and back.

A key that changes what is computed is computed or refused by name; one that changes nothing is ignored. Of the two ways
to write RoPE's settings, rope_theta and rope_scaling (transformers 4) and rope_parameters (5), both are read and
written.
"""

import json
import math
from dataclasses import asdict

from minillm.errors import UserError
from minillm.model import PRESETS, ModelConfig

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM",
                 "mistral": "MistralForCausalLM"}


MARK = {"made_by": "minillm"}  # in the config.json of a model that was created here


def is_made_here(document: dict) -> bool:
    """Whether a config.json is of a model that minillm created: by its mark, or by a preset's sizes."""
    sizes = tuple(document.get(key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                                "num_key_value_heads", "head_dim", "intermediate_size"))
    return all(document.get(key) == value for key, value in MARK.items()) or sizes in PRESETS.values()


def config_to_json(config: ModelConfig, tokenizer=None) -> dict:
    """transformers' config.json; readable by its versions 4 (rope_theta) and 5 (rope_parameters)."""
    result = {
        "architectures": [ARCHITECTURES[config.model_type]], **asdict(config),
        "rope_scaling": config.rope_scaling or None,
        "rope_parameters": {"rope_type": "default", **config.rope_scaling, "rope_theta": config.rope_theta},
        "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "torch_dtype": "float32", "dtype": "float32", **MARK}
    if config.model_type != "llama":
        del result["mlp_bias"]  # a key of Llama only
        result.update(use_sliding_window=False, sliding_window=None, max_window_layers=config.num_hidden_layers)
    if config.model_type in ("qwen2", "mistral"):
        del result["attention_bias"]  # Qwen2's q, k and v always have one, Mistral's never
    if tokenizer is not None:
        result.update(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.pad_id)
    return result


def config_from_json(document: dict, where) -> ModelConfig:
    """The ModelConfig of a Qwen3, Qwen2, Llama or Mistral config.json; `where` names the file in messages.

    Raises UserError that names the key for one that is missing or that asks for a computation which this model does
    not have.
    """
    def refuse(key, why):
        raise UserError(f"{where}: {key} = {json.dumps(document.get(key))[:80]} {why}")

    def integer(key, default=None):
        value = document.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 2**31:
            refuse(key, "must be a positive whole number")
        return value

    def boolean(key):
        value = document.get(key)
        if type(value) not in (bool, type(None)):
            refuse(key, "must be true or false")
        return bool(value)

    model_type = document.get("model_type")
    if model_type not in list(ARCHITECTURES):
        refuse("model_type", f"is not supported; it must be one of {', '.join(ARCHITECTURES)}")
    if document.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "is not supported; only silu is")
    for key in ("quantization_config", "num_experts", "num_local_experts"):
        if document.get(key):
            refuse(key, "is not supported; a dense, unquantized checkpoint is needed")
    if document.get("is_causal") is False:
        refuse("is_causal", "is not supported; only causal attention is")
    layers, heads = integer("num_hidden_layers"), integer("num_attention_heads")
    context = integer("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(model_type, 32768))
    if model_type == "mistral":  # without the key transformers assumes a window
        window = document.get("sliding_window", 4096)
        if window is not None and not (type(window) is int and window >= context):
            raise UserError(f"{where}: sliding_window = {json.dumps(window)} is not supported; only full attention is "
                            "(null, as in Mistral 7B from version 0.2 on)")
    elif model_type != "llama" and document.get("use_sliding_window") and document.get("sliding_window", 4096):
        kinds = document.get("layer_types")  # where it is absent, the layers from max_window_layers on are meant
        full = isinstance(kinds, list) and len(kinds) == layers and all(kind == "full_attention" for kind in kinds)
        if not full and (kinds or integer("max_window_layers", 28) < layers):
            refuse("use_sliding_window", "is not supported; only full attention is")
    theta, scaling = _rope_from_json(document, context, refuse)

    # What transformers assumes where a key is absent; a wrong size would show in the shapes of the weights.
    head_dim = 128 if model_type == "qwen3" and "head_dim" not in document else max(1, integer("hidden_size") // heads)
    kv_heads = heads if "num_key_value_heads" in document else {"llama": heads, "mistral": 8}.get(model_type, 32)
    eps = document.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        refuse("rms_norm_eps", "must be a number between 0 and 1")
    try:
        return ModelConfig(
            vocab_size=integer("vocab_size"), hidden_size=integer("hidden_size"), num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=integer("num_key_value_heads", kv_heads),
            head_dim=integer("head_dim", head_dim), intermediate_size=integer("intermediate_size"),
            max_position_embeddings=context,
            rope_theta=theta, rope_scaling=scaling, rms_norm_eps=float(eps),
            tie_word_embeddings=boolean("tie_word_embeddings"),
            attention_bias=boolean("attention_bias") and model_type in ("qwen3", "llama"),
            mlp_bias=boolean("mlp_bias") and model_type == "llama", model_type=model_type)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _rope_from_json(document, context, refuse):
    """(theta, scaling) from rope_theta and rope_scaling (transformers 4) or rope_parameters (5).

    What YaRN and Llama 3 leave out is filled in as transformers does it.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(document.get(key) or {}, dict):
            refuse(key, "must be a JSON object")
    key = "rope_scaling" if document.get("rope_scaling") else "rope_parameters"
    rope = document.get(key) or {}
    stated = [part.get("rope_theta") for part in (rope, document.get("rope_parameters") or {}, document)]
    thetas = [theta for theta in stated if theta is not None] or [10000.0]
    if any(type(theta) not in (int, float) or not 1 <= theta <= 1e15 for theta in thetas):
        refuse("rope_theta", "must be a number between 1 and 1e15, in rope_parameters too")
    if len(set(thetas)) > 1:
        refuse("rope_theta", f"disagrees with rope_parameters: {thetas}")
    theta = float(thetas[0])
    for part in (rope, document):
        if part.get("partial_rotary_factor") not in (None, 1, 1.0):
            refuse(key if part is rope else "partial_rotary_factor", "is not supported; all of a head is rotated")

    def number(name, default=None, part=rope):
        value = part.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not 1e-3 <= value <= 1e9:
            refuse(key, f"needs a positive {name} (at most 1e9)")
        return value

    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, {}
    if kind == "linear":
        return theta, {"rope_type": kind, "factor": number("factor")}
    if kind not in ("yarn", "llama3"):
        refuse(key, "is not supported; rope_type must be default, linear, yarn or llama3")
    name = "original_max_position_embeddings"
    old_context = number(name, number(name, context), part=document)
    if kind == "llama3":
        scaling = {"rope_type": kind, "original_max_position_embeddings": old_context, "factor": number("factor"),
                   "low_freq_factor": number("low_freq_factor"), "high_freq_factor": number("high_freq_factor")}
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            refuse(key, "needs high_freq_factor above low_freq_factor")
        return theta, scaling
    if theta <= 1:
        refuse("rope_theta", "must be above 1 for YaRN")
    factor = number("factor", context / old_context)
    scaling = {"rope_type": kind, "original_max_position_embeddings": old_context, "factor": factor,
               "beta_fast": number("beta_fast", 32), "beta_slow": number("beta_slow", 1),
               "truncate": rope.get("truncate", True) is not False,
               "attention_factor": number("attention_factor", 0.1 * math.log(factor) + 1 if factor > 1 else 1.0)}
    if rope.get("attention_factor") is None and rope.get("mscale") and rope.get("mscale_all_dim") and factor > 1:
        whole, part = (0.1 * number(name) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
        scaling["attention_factor"] = whole / part
    return theta, scaling
