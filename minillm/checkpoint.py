"""Checkpoints are Hugging Face folders; a run folder adds what exact resume needs.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json     the model
    run_config.json  metrics.jsonl  summary.json  training_state.pt                                   the run

Every file is written under a temporary name, flushed to the disk and renamed, so that a crash, SIGKILL or a full
disk leaves the previous file whole. `training_state.pt` alone holds all that resume needs (fp32 weights too), so no
crash can pair new weights with an old optimizer. No pickle is loaded from a weights file.
"""

import contextlib
import json
import math
import mmap
import os
import random
import shutil
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from minillm.errors import UserError
from minillm.model import CausalLM, ModelConfig, RotaryEmbedding

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


# ---------------------------------------------------------------------------------------------- files

@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to; it becomes `path` only when the block ends without an error.

    Raises UserError when the system refuses (disk full, no permission): an existing `path` is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # a fixed name: what a killed process left is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the name points at them
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the rename must survive a power cut, where folders can be flushed
            descriptor = os.open(path.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch.save hides the OSError of a full disk behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, (OSError, RuntimeError)) and isinstance(cause, OSError):
            kept = "the file that was there is unchanged" if path.exists() else "nothing is there"
            raise UserError(f"cannot write {path}: {cause.strerror or cause}; {kept}") from error
        raise


def save_json(path, value):
    """Write JSON atomically; raises UserError when the disk refuses."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def load_json(path) -> dict:
    """Read a JSON object; raises UserError that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------------------- safetensors
# 8 bytes: length of the header, little endian | header: JSON {name: {dtype, shape, data_offsets}} | the tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the limit of the safetensors package


def save_safetensors(path, tensors: dict, metadata: dict | None = None):
    """Write {name: tensor} atomically, one tensor at a time: no second copy of the model in memory.

    metadata: {str: str}; transformers insists on {"format": "pt"}, the default. Raises UserError when the disk
    refuses, ValueError for a dtype that the format does not know.
    """
    # The widest dtype first keeps every tensor aligned, whatever their sizes.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name in names:
        tensor, start = tensors[name], end
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: safetensors cannot store {tensor.dtype}")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def load_safetensors(path) -> dict:
    """{name: tensor}, mapped from the file: memory is used only for what is read.

    The mapping is private: writing to a tensor never changes the file. Windows cannot replace the file while a
    tensor of it is alive. Raises UserError for a missing, truncated or corrupted file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError(f"{size} bytes, header of {length}")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _map_tensors(header, torch.frombuffer(mapped, dtype=torch.uint8)[8 + length:])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RuntimeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is truncated or corrupted ({error}); copy or download it again") from None


def _no_duplicates(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return dict(pairs)


def _map_tensors(header, data) -> dict:
    """Views of data (uint8) as the header says; raises ValueError unless they fill it without gap or overlap."""
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    places = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in list(DTYPES):
            raise ValueError(f"{name!r}: unknown dtype in {entry}")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
                raise ValueError(f"{name!r}: shape {shape}, data_offsets {offsets}")
        dtype = DTYPES[entry["dtype"]]
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r}: data_offsets {offsets} do not fit shape {shape} of {entry['dtype']}")
        places.append((offsets[0], offsets[1], name, dtype, shape))
    tensors, end = {}, 0
    for start, stop, name, dtype, shape in sorted(places, key=lambda place: place[:2]):
        if start != end:
            raise ValueError(f"{name!r} starts at byte {start}, the tensor before it ends at {end}")
        end = stop
        part = data[start:stop]
        if part.data_ptr() % dtype.itemsize:
            part = part.clone()  # other writers need not align
        tensors[name] = part.view(dtype).reshape(shape)
    if end != len(data):
        raise ValueError(f"the tensors end at byte {end}, the file at {len(data)}")
    return tensors


# --------------------------------------------------------------------------------------------- config

def config_to_json(config: ModelConfig, tokenizer=None) -> dict:
    """transformers' config.json; readable by its versions 4 (rope_theta) and 5 (rope_parameters)."""
    result = {
        "architectures": [ARCHITECTURES[config.model_type]], **asdict(config), "rope_scaling": config.rope_scaling or None,
        "rope_parameters": {"rope_type": "default", **config.rope_scaling, "rope_theta": config.rope_theta},
        "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "torch_dtype": "float32", "dtype": "float32"}
    if config.model_type != "llama":
        del result["mlp_bias"]  # a key of Llama only
        result.update(use_sliding_window=False, sliding_window=None, max_window_layers=config.num_hidden_layers)
    if config.model_type == "qwen2":
        del result["attention_bias"]  # always on q, k and v
    if tokenizer is not None:
        result.update(bos_token_id=tokenizer.endoftext_id, eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.pad_id)
    return result


def config_from_json(document: dict, where) -> ModelConfig:
    """The ModelConfig of a Qwen3, Qwen2 or Llama config.json; `where` names the file in messages.

    Keys that change nothing are ignored. Raises UserError that names the key for one that is missing or that
    asks for a computation which this model does not have.
    """
    def refuse(key, why):
        raise UserError(f"{where}: {key} = {json.dumps(document.get(key))} {why}")

    def integer(key, default=None):
        value = document.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 2**31:
            refuse(key, "must be a positive whole number")
        return value

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
            tie_word_embeddings=bool(document.get("tie_word_embeddings", False)),
            attention_bias=bool(document.get("attention_bias", False)) and model_type != "qwen2",
            mlp_bias=bool(document.get("mlp_bias", False)) and model_type == "llama", model_type=model_type)
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
    if any(type(theta) not in (int, float) or not 0 < theta < math.inf for theta in thetas):
        refuse("rope_theta", "must be a positive number, in rope_parameters too")
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
        if type(scaling[name]) not in (int, float) or not 0 < scaling[name] < math.inf:
            refuse(key, f"needs a positive {name}")
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        refuse(key, "needs high_freq_factor above low_freq_factor")
    return theta, scaling


# --------------------------------------------------------------------------------------- model folders

def load_config(folder) -> ModelConfig:
    """The ModelConfig of a checkpoint folder; raises UserError."""
    folder = checkpoint_folder(folder)
    return config_from_json(load_json(folder / "config.json"), folder / "config.json")


def checkpoint_folder(folder) -> Path:
    """The folder as a Path; raises UserError, with advice, when it holds no model."""
    folder = Path(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {kind}; give a checkpoint folder (download a model of the Hugging Face hub first)")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} holds an adapter, not a whole model; give its base model with --model and this with --adapter")
        if (folder / "training_state.pt").is_file():
            raise UserError(f"{folder} holds an unfinished run; finish it with --resume first")
        raise UserError(f"{folder} is no checkpoint folder: config.json is missing")
    return folder


def require_stage(folder, default: str, script: str):
    """Raise UserError, with the command to run first, when a stage's default --model (what `script` writes) is not there yet."""
    if str(folder) == default and not Path(folder).exists():
        raise UserError(f"{default} is not there yet: run python {script} first, or give another --model")


def load_weights(folder) -> dict:
    """{name: tensor} of model.safetensors or of its shards, mapped from disk; raises UserError."""
    folder = checkpoint_folder(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return load_safetensors(folder / "model.safetensors")
    if not index.is_file():
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        if pickled and pickled != ["training_state.pt"]:
            raise UserError(f"{folder} holds pickled weights only ({_some(pickled)}), which can run code when loaded and are "
                            "never opened here; write it again as safetensors with save_pretrained of transformers")
        raise UserError(f"{folder}: model.safetensors is missing")
    shard_of = load_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or any(not isinstance(s, str) or Path(s).name != s or "\\" in s for s in shard_of.values()):
        raise UserError(f"{index}: weight_map must give a file name of this folder for each tensor")
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        for name, tensor in load_safetensors(folder / shard).items():
            if shard_of.get(name) != shard:
                raise UserError(f"{folder / shard} holds {name}, which {index.name} places in {shard_of.get(name)}")
            tensors[name] = tensor
    if missing := sorted(set(shard_of) - set(tensors)):
        raise UserError(f"{index} lists tensors that its files do not hold: {_some(missing)}")
    return tensors


def load_model(folder, device="cpu", dtype=torch.float32) -> CausalLM:
    """The model of a checkpoint folder, its weights converted to `dtype` one tensor at a time.

    Raises UserError when the folder is no causal language model of a supported architecture, or when a tensor is
    missing, unexpected or of the wrong shape: nothing is ever left at random.
    """
    folder = checkpoint_folder(folder)
    document = load_json(folder / "config.json")
    config = config_from_json(document, folder / "config.json")
    architectures = document.get("architectures") or [ARCHITECTURES[config.model_type]]
    if "SequenceClassification" in str(architectures[0]):
        raise UserError(f"{folder} is a reward model ({architectures[0]}), not a language model; give a language model's folder, out/sft for one")
    stored = load_weights(folder)
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
    model.load_state_dict(weights, strict=False, assign=True)  # strictly checked above; only the tied copy lacks
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary = RotaryEmbedding(config).to(device)
    return model


def weights_of(model: CausalLM) -> dict:
    """{name: tensor} as stored: a tied head only once, as model.embed_tokens.weight."""
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def check_weights(expected: dict, stored: dict, where, complaint: str = "the weights do not fit config.json"):
    """Raise UserError unless both hold the same names with the same shapes."""
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or unexpected:
        raise UserError(f"{where}: {complaint}: missing {_some(missing)}; unexpected {_some(unexpected)}")
    wrong = [f"{name} {tuple(stored[name].shape)} instead of {tuple(expected[name].shape)}"
             for name in expected if stored[name].shape != expected[name].shape]
    if wrong:
        raise UserError(f"{where}: {complaint}: {_some(wrong)}")


def _some(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def save_model(folder, model: CausalLM, tokenizer):
    """Write a checkpoint folder that transformers opens (float32); raises UserError when the disk refuses.

    Raises ValueError for a model whose tensors are not those of CausalLM(model.config): a LoRA must be merged
    first, a compiled or distributed wrapper taken off.
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
    stops = list(dict.fromkeys([tokenizer.end_id, tokenizer.endoftext_id]))
    save_json(folder / "generation_config.json", {
        "bos_token_id": tokenizer.endoftext_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id})
    draft = folder / "tokenizer.tmp"  # the tokenizer writes plainly; its files are then moved in one by one
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        tokenizer.save(draft, config["max_position_embeddings"])
        for source in sorted(draft.iterdir()):
            with atomic_write(folder / source.name) as file:
                file.write(source.read_bytes())
    except OSError as error:
        raise UserError(f"cannot write the tokenizer to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    save_safetensors(folder / "model.safetensors", weights)


def save_adapter(folder, config: dict, tensors: dict):
    """Write an adapter folder as the PEFT package does: adapter_config.json and adapter_model.safetensors."""
    save_json(Path(folder) / "adapter_config.json", config)
    save_safetensors(Path(folder) / "adapter_model.safetensors", tensors)


def read_adapter(folder, *kinds: str) -> tuple:
    """(config, {name: tensor}) of an adapter folder; raises UserError unless its peft_type is one of `kinds`."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter: adapter_config.json is missing (train_lora.py writes one to out/lora)")
    config = load_json(folder / "adapter_config.json")
    if config.get("peft_type") not in kinds:
        raise UserError(f"{folder}/adapter_config.json: peft_type = {config.get('peft_type')} is not supported here; only {', '.join(kinds)}")
    return config, load_safetensors(folder / "adapter_model.safetensors")


def check_tokenizer(model: CausalLM, tokenizer, where):
    """Raise UserError when the tokenizer has ids beyond the model's vocabulary, or lacks the ChatML tokens.

    A model may have more ids than its tokenizer: Qwen rounds up.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
                        "use the tokenizer that the model was trained with")
    _ = tokenizer.end_id, tokenizer.pad_id  # a tokenizer without them raises now, not after training


# ---------------------------------------------------------------------------------------- exact resume

def capture_rng(device="cpu") -> dict:
    """The state of every random generator that training on `device` may use."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {"python": [version, list(words), gauss], "numpy": [name, keys.tolist(), *map(float, rest)],
             "torch": torch.get_rng_state()}
    device = torch.device(device)
    if device.type in ("cuda", "mps"):
        module = getattr(torch, device.type)
        state[device.type] = module.get_rng_state(device) if device.type == "cuda" else module.get_rng_state()
    return state


def restore_rng(state: dict, device="cpu"):
    """Set the generators as capture_rng found them; one that this machine lacks is left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    device = torch.device(device)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def _environment() -> dict:
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability()}


def save_training_state(folder, state: dict):
    """Write training_state.pt atomically; raises UserError when the disk refuses.

    Raises ValueError for anything but dicts, lists, tuples, numbers, text and tensors: it could be written, but
    load_training_state would refuse it, and the run with it.
    """
    _check_plain(state, "state")
    with atomic_write(Path(folder) / "training_state.pt") as file:
        torch.save({**state, "environment": _environment()}, file)


def _check_plain(value, name):
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(item, f"{name}[{key!r}]")
    elif value is not None and type(value) not in (bool, int, float, str) and not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; weights_only loading would refuse it")


def load_training_state(folder) -> dict:
    """Read training_state.pt to the CPU without unpickling objects; says it when bit-exactness is not promised.

    Raises UserError when it is missing or damaged.
    """
    path = Path(folder) / "training_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["environment"]
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # zip, pickle and torch errors alike: the file is not what we wrote
        raise UserError(f"{path} is truncated or corrupted ({type(error).__name__}); start again without --resume") from None
    now = _environment()
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        _say(f"note: resumed with {', '.join(changed)}: results may differ in the last bits from an uninterrupted run")
    return state


# Settings that may differ between the parts of one run; compile and device cost only the last bits.
FREE_ON_RESUME = ("out", "resume", "device", "compile", "save_every", "log_every", "eval_every", "kl_every")
RUN_FILES = {"config.json", "adapter_config.json", "run_config.json", "metrics.jsonl", "summary.json", "training_state.pt"}


def start_run(out, resume: bool, config: dict, inputs=()) -> dict | None:
    """Prepare the run folder `out`; return the training state to continue from, or None to start at step 0.

    Without resume an older run in `out` is renamed to OUT.bak (the previous .bak goes). With resume, `config` must
    equal the saved one but for FREE_ON_RESUME, metrics.jsonl is cut to the steps that the state holds, and
    state["finished"] tells a run with nothing left to do. inputs: paths that the run reads. Raises UserError.
    Started by torchrun, every process calls this, and the first one alone writes.
    """
    out = Path(os.path.abspath(out))
    config = json.loads(json.dumps(config, default=str))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if resume and (out / "training_state.pt").exists():
        return _continue_run(out, config)
    if resume:
        _say(f"nothing to continue in {out}: starting from step 0")
    if _is_main():
        # A run that died before its first checkpoint left these two; two wrong commands must not push a good run out of OUT.bak.
        died_early = not any((out / name).exists() for name in RUN_FILES - {"run_config.json", "metrics.jsonl"})
        if died_early:
            (out / "metrics.jsonl").unlink(missing_ok=True)
        elif any((out / name).exists() for name in RUN_FILES):
            _move_aside(out, inputs)
        save_json(out / "run_config.json", config)
    return None


def _move_aside(out: Path, inputs):
    for path in filter(None, [*inputs, os.getcwd()]):
        if Path(path).resolve().is_relative_to(out.resolve()):
            raise UserError(f"--out {out} holds {path}, which this run needs and which would be overwritten; give another --out")
    backup = out.with_name(out.name + ".bak")
    try:
        if backup.is_dir() and not backup.is_symlink():
            shutil.rmtree(backup)
        else:
            backup.unlink(missing_ok=True)
        out.rename(backup)
    except OSError as error:
        raise UserError(f"cannot rename {out} to {backup}: {error.strerror or error}") from None
    _say(f"{out} held an older run; it is now {backup}")


def _continue_run(out: Path, config: dict) -> dict:
    saved = load_json(out / "run_config.json") if (out / "run_config.json").exists() else {}
    differing = [key for key in config if key in saved and saved[key] != config[key]]
    if fixed := [f"--{key} {config[key]} (it was {saved[key]})" for key in differing if key not in FREE_ON_RESUME]:
        raise UserError(f"--resume: the run in {out} had other settings: {', '.join(fixed)}; give the same ones, or start anew without --resume")
    for key in {"device", "compile"}.intersection(differing):
        _say(f"note: --{key} {config[key]} (it was {saved[key]}): results may differ in the last bits")
    state = load_training_state(out)
    metrics = out / "metrics.jsonl"
    if _is_main() and metrics.exists():
        lines = metrics.read_bytes().splitlines(keepends=True)
        with atomic_write(metrics) as file:
            file.writelines(line for line in lines if _step_of(line) <= state["step"])
    summary = out / "summary.json"  # written last of all: without it a run may have nothing left to train, but is not finished
    state["finished"] = summary.exists()
    if state["finished"]:
        state["metrics"] = load_json(summary).get("after", {})
        _say(f"the run in {out} is finished: nothing to do")
    return state


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; a line torn by a crash belongs to no step."""
    try:
        return json.loads(line).get("step", 0) if line.endswith(b"\n") else math.inf
    except (ValueError, AttributeError):
        return math.inf


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _say(line: str):
    if _is_main():
        print(line, flush=True)


def save_run(out, step: int, model, tokenizer, optimizers: list, loader, before: dict, save=None):
    """Save the model folder, and training_state.pt with all that resume needs; by the first process only.

    before: the evaluation at step 0, for the table at the end. save(out): writes the model where it is not a whole CausalLM.
    """
    state = {"step": step, "model": trained_weights(model), "optimizers": [o.state_dict() for o in optimizers],
             "loader": loader.state(), "rng": capture_rng(next(model.parameters()).device), "before": before}
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise UserError(f"the weights became NaN or infinite by step {step}; stopped, {out} keeps its last checkpoint (a lower --lr helps most often)")
    if _is_main():
        save_training_state(out, state)
        save(out) if save else save_model(out, model, tokenizer)


def trained_weights(model) -> dict:
    """{name: tensor} of all that training changes: without the parameters that are frozen, which the base model's folder holds."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def restore_run(state: dict, model, optimizers: list, loader) -> tuple:
    """Put everything back as save_run found it -> (step, before)."""
    check_weights(trained_weights(model), state["model"], "training_state.pt", "the weights do not fit the model")
    model.load_state_dict(state["model"], strict=False)  # strictly checked; the frozen ones lack
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    loader.load_state(state["loader"])
    restore_rng(state["rng"], next(model.parameters()).device)
    return state["step"], state["before"]
