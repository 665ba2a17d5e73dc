"""Model folders in the format of Hugging Face: config.json, model.safetensors and the tokenizer's files, both ways.

The names of modules, tensors and settings are those of Qwen3, Qwen2 and Llama in transformers, so a folder written here
opens there with no conversion, and a downloaded one loads here. No pickle is ever loaded from a weights file.
"""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch

from minillm.errors import UserError
from minillm.model import CausalLM, ModelConfig, RotaryEmbedding
from minillm.records import advice_on_folder
from minillm.safetensors import load_json, load_safetensors, save_json, save_safetensors, short

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
MAX_SHARDS = 1000  # files of weights; each is kept open as a mapping


# config.json

def config_to_json(config: ModelConfig, tokenizer=None) -> dict:
    """transformers' config.json; readable by its versions 4 (rope_theta) and 5 (rope_parameters)."""
    result = {
        "architectures": [ARCHITECTURES[config.model_type]], **asdict(config),
        "rope_scaling": config.rope_scaling or None,
        "rope_parameters": {"rope_type": "default", **config.rope_scaling, "rope_theta": config.rope_theta},
        "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "torch_dtype": "float32", "dtype": "float32"}
    if config.model_type != "llama":
        del result["mlp_bias"]  # a key of Llama only
        result.update(use_sliding_window=False, sliding_window=None, max_window_layers=config.num_hidden_layers)
    if config.model_type == "qwen2":
        del result["attention_bias"]  # always on q, k and v
    if tokenizer is not None:
        result.update(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.pad_id)
    return result


def config_from_json(document: dict, where) -> ModelConfig:
    """The ModelConfig of a Qwen3, Qwen2 or Llama config.json; `where` names the file in messages.

    Keys that change nothing are ignored. Raises UserError that names the key for one that is missing or that
    asks for a computation which this model does not have.
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
        if value not in (None, True, False) or type(value) not in (bool, type(None)):
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
    if model_type != "llama" and document.get("use_sliding_window") and document.get("sliding_window", 4096):
        kinds = document.get("layer_types")  # where it is absent, the layers from max_window_layers on are meant
        if kinds != ["full_attention"] * layers and (kinds or integer("max_window_layers", 28) < layers):
            refuse("use_sliding_window", "is not supported; only full attention is")
    theta, scaling = _rope_from_json(document, refuse)

    # What transformers assumes where a key is absent; a wrong size would show in the shapes of the weights.
    head_dim = 128 if model_type == "qwen3" and "head_dim" not in document else max(1, integer("hidden_size") // heads)
    kv_heads = heads if model_type == "llama" or "num_key_value_heads" in document else 32
    eps = document.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        refuse("rms_norm_eps", "must be a number between 0 and 1")
    try:
        return ModelConfig(
            vocab_size=integer("vocab_size"), hidden_size=integer("hidden_size"), num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=integer("num_key_value_heads", kv_heads),
            head_dim=integer("head_dim", head_dim), intermediate_size=integer("intermediate_size"),
            max_position_embeddings=integer("max_position_embeddings", 2048 if model_type == "llama" else 32768),
            rope_theta=theta, rope_scaling=scaling, rms_norm_eps=float(eps),
            tie_word_embeddings=boolean("tie_word_embeddings"),
            attention_bias=boolean("attention_bias") and model_type != "qwen2",
            mlp_bias=boolean("mlp_bias") and model_type == "llama", model_type=model_type)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _rope_from_json(document, refuse):
    """(theta, scaling) from rope_theta and rope_scaling (transformers 4) or rope_parameters (5)."""
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
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, {}
    if kind != "llama3":
        refuse(key, "is not supported; rope_type must be default or llama3")
    scaling = {"rope_type": "llama3", "original_max_position_embeddings": document.get("max_position_embeddings")}
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        scaling[name] = rope.get(name, scaling.get(name))
        if type(scaling[name]) not in (int, float) or not 1e-3 <= scaling[name] <= 1e9:
            refuse(key, f"needs a positive {name} (at most 1e9)")
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        refuse(key, "needs high_freq_factor above low_freq_factor")
    return theta, scaling


# Folders

def load_config(folder) -> ModelConfig:
    """The ModelConfig of a checkpoint folder; raises UserError."""
    folder = checkpoint_folder(folder)
    return config_from_json(load_json(folder / "config.json"), folder / "config.json")


def checkpoint_folder(folder) -> Path:
    """The folder as a Path; raises UserError, with advice, when it holds no model."""
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder} is a file; give the folder that holds it, with config.json beside it")
        advice = advice_on_folder(folder) or "; give a checkpoint folder"
        if len(folder.parts) == 2 and not folder.parent.exists():
            advice += (f" (a model of the Hugging Face hub is downloaded first: hf download {folder.as_posix()} "
                       f"--local-dir {folder.name})")
        raise UserError(f"{folder} does not exist{advice}")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} holds an adapter, not a whole model; eval.py takes its base with --model and "
                            "this with --adapter; to train on, make a whole model with train_lora.py --merge")
        if (folder / "training_state.pt").is_file():
            raise UserError(f"{folder} holds an unfinished run; finish it with --resume first")
        raise UserError(f"{folder} is no checkpoint folder: config.json is missing")
    return folder


def require_stage(folder, default: str = "", script: str = "", option: str = "--model", max_seq_len: int = 0):
    """Raise UserError unless the folder holds a model with its tokenizer, and a context of max_seq_len tokens.

    If it is the default of the option and missing, the message names the script to run first. Only small files are
    read, so a script can ask this before it reads its data.
    """
    if str(folder) == default and not Path(folder).exists():
        older = f" ({default}.bak is an older run)" if Path(f"{default}.bak").exists() else ""
        raise UserError(f"{default} is not there yet: run python {script} first, or give another {option}{older}"
                        + advice_on_folder(folder))
    config = load_config(folder)
    check_model(folder, config)
    check_tokenizer_file(folder)
    if max_seq_len > config.max_position_embeddings:
        raise UserError(f"--max_seq_len {max_seq_len} is longer than the context of {folder}, which is "
                        f"{config.max_position_embeddings} tokens (max_position_embeddings); give at most that")


def check_model(folder, config: ModelConfig):
    """Raise UserError unless the files of a language model hold its tensors. Only their headers are read."""
    architectures = load_json(Path(folder) / "config.json").get("architectures") or [""]
    if "SequenceClassification" in str(architectures[0]):
        return  # its head is checked where it is loaded
    with torch.device("meta"):
        expected = weights_of(CausalLM(config))
    stored = {name: tensor for name, tensor in load_weights(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    check_weights(expected, stored, folder)


def check_tokenizer_file(path):
    """Raise UserError unless path is a tokenizer.json or a folder with one."""
    path = Path(path)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        older = [name for name in ("vocab.json", "tokenizer.model") if (path / name).is_file()]
        if older:
            raise UserError(f"{path} has {older[0]} but no tokenizer.json; save_pretrained of transformers' "
                            "AutoTokenizer (a recent version) writes one beside it")
        raise UserError(f"{path} has no tokenizer.json; copy it from the model that this one was made of, or make it "
                        "with save_pretrained of transformers' AutoTokenizer")
    if not path.exists():
        raise UserError(f"{path}: there is no such tokenizer{advice_on_folder(path)}")


def load_weights(folder) -> dict:
    """{name: tensor} of model.safetensors or of its shards, mapped from disk; raises UserError."""
    folder = checkpoint_folder(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return load_safetensors(folder / "model.safetensors")
    if not index.is_file():
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        if pickled and pickled != ["training_state.pt"]:
            raise UserError(f"{folder} holds only pickled weights ({_some(pickled)}), which can run code when loaded "
                            "and are never opened here; convert it to safetensors with save_pretrained of transformers")
        raise UserError(f"{folder}: model.safetensors is missing")
    shard_of = load_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or any(
            not isinstance(s, str) or Path(s).name != s or "\\" in s for s in shard_of.values()):
        raise UserError(f"{index}: weight_map must give a file name of this folder for each tensor")
    if len(set(shard_of.values())) > MAX_SHARDS:
        raise UserError(f"{index}: weight_map names more than {MAX_SHARDS:,} files")
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        for name, tensor in load_safetensors(folder / shard).items():
            if shard_of.get(name) != shard:
                raise UserError(f"{folder / shard} holds {_some([name])}, which {index.name} places in "
                                f"{_some([str(shard_of.get(name))])}")
            tensors[name] = tensor
    if missing := sorted(set(shard_of) - set(tensors)):
        raise UserError(f"{index} lists tensors that its files do not hold: {_some(missing)}")
    return tensors


def load_model(folder, device="cpu", dtype=torch.float32) -> CausalLM:
    """The model of a checkpoint folder, its weights converted to `dtype` one tensor at a time.

    Raises UserError when the folder is no causal language model of a supported architecture, or when a tensor is
    missing, unexpected or of the wrong shape: no weight is ever left random.
    """
    folder = checkpoint_folder(folder)
    document = load_json(folder / "config.json")
    config = config_from_json(document, folder / "config.json")
    architecture = architecture_of(document, folder / "config.json")
    if "SequenceClassification" in architecture:
        raise UserError(f"{folder} is a reward model ({short(architecture)}), not a language model; "
                        "give the folder of a language model, such as out/sft")
    stored = load_weights(folder)
    check_sizes(config, stored, folder)
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        head, embedding = stored.pop("lm_head.weight"), stored.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise UserError(f"{folder}: config.json ties the embeddings, yet lm_head.weight differs from "
                            "model.embed_tokens.weight; set tie_word_embeddings to false")
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    with torch.device("meta"):  # no time and no memory for initial values that are replaced anyway
        model = CausalLM(config)
    check_weights(weights_of(model), stored, folder)
    weights = {name: tensor.to(device, dtype, copy=True) for name, tensor in stored.items()}
    check_finite(weights, folder)
    model.load_state_dict(weights, strict=False, assign=True)  # checked above; only the tied copy is missing
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary = RotaryEmbedding(config).to(device)
    return model


def architecture_of(document: dict, where) -> str:
    """The class that a config.json names first; "" if it names none. Raises UserError for what is no list of names."""
    names = document.get("architectures") or [""]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: architectures = {json.dumps(names)[:80]} must be a list of names")
    return names[0]


def check_sizes(config: ModelConfig, stored: dict, where):
    """Raise UserError if config.json describes another size than the weights: before a model of that size is built."""
    found = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in stored)
    layers = len({match[1] for match in found if match})
    if layers != config.num_hidden_layers:
        raise UserError(f"{where}: the weights do not fit config.json: num_hidden_layers is "
                        f"{config.num_hidden_layers:,}, the weights are those of {layers:,} layers")
    largest = max((tensor.numel() for tensor in stored.values()), default=0)
    rows = {"vocab_size": config.vocab_size, "intermediate_size": config.intermediate_size,
            "num_attention_heads x head_dim": config.num_attention_heads * config.head_dim}
    for name, size in rows.items():
        if size * config.hidden_size > largest:
            raise UserError(f"{where}: the weights do not fit config.json: {name} is {size:,} and hidden_size is "
                            f"{config.hidden_size:,}, the largest tensor has {largest:,} numbers")


def check_finite(weights: dict, where):
    """Raise UserError that names the first tensor with NaN or infinite numbers."""
    for name, tensor in weights.items():
        # The sum is quick and needs no memory. It can overflow, so it only clears a tensor.
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {short(name)} holds NaN or infinite numbers; copy or download the weights again,"
                            " or train again (a lower --lr helps most often)")


def weights_of(model: CausalLM) -> dict:
    """{name: tensor} as stored: a tied head only once, as model.embed_tokens.weight."""
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def check_weights(expected: dict, stored: dict, where, complaint: str = "the weights do not fit config.json"):
    """Raise UserError unless both hold the same names with the same shapes, all floating-point numbers."""
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or unexpected:
        raise UserError(f"{where}: {complaint}: missing {_some(missing)}; unexpected {_some(unexpected)}")
    wrong = [f"{name} {tuple(stored[name].shape)} instead of {tuple(expected[name].shape)}"
             for name in expected if stored[name].shape != expected[name].shape]
    if wrong:
        raise UserError(f"{where}: {complaint}: {_some(wrong)}")
    for name, tensor in stored.items():
        if not tensor.is_floating_point():
            raise UserError(f"{where}: {short(name)} holds {str(tensor.dtype).removeprefix('torch.')} numbers; weights "
                            "are floating-point numbers (quantized ones are not supported)")


def _some(names):
    shown = ", ".join(name if len(name) <= 100 else name[:97] + "..." for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def save_model(folder, model: CausalLM, tokenizer):
    """Write a checkpoint folder that transformers opens (float32); raises UserError when the disk refuses.

    Raises ValueError for a model whose tensors are not those of CausalLM(model.config): a LoRA must be merged
    first, and a wrapper (compiled, distributed) removed.
    """
    with torch.device("meta"):
        names = set(weights_of(CausalLM(model.config)))
    weights = {name: tensor.float() for name, tensor in weights_of(model).items()}
    if set(weights) != names:
        raise ValueError(f"not a plain CausalLM: {_some(sorted(set(weights) ^ names))}")
    save_folder(folder, config_to_json(model.config, tokenizer), weights, tokenizer)


def save_folder(folder, config: dict, weights: dict, tokenizer):
    """Write config.json, the tokenizer's files, generation_config.json and, last, model.safetensors."""
    folder = Path(folder)
    save_json(folder / "config.json", config)
    save_json(folder / "generation_config.json", {
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.end_ids, "pad_token_id": tokenizer.pad_id})
    try:
        tokenizer.save(folder, config["max_position_embeddings"])
    except OSError as error:
        raise UserError(f"cannot write the tokenizer to {folder}: {error.strerror or error}") from error
    save_safetensors(folder / "model.safetensors", weights)


def check_tokenizer(config: ModelConfig, tokenizer, where):
    """Raise UserError when the tokenizer has ids beyond the model's vocabulary, or lacks the tokens of a chat.

    A model may have more ids than its tokenizer: Qwen rounds up.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
                        f"{config.vocab_size}; use the tokenizer that the model was trained with")
    try:
        _ = tokenizer.start_id, tokenizer.end_ids, tokenizer.pad_id  # what is missing raises now, not after training
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
