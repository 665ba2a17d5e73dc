"""Model folders in the format of Hugging Face: config.json, model.safetensors and the tokenizer's files, both ways.

The names of modules, tensors and settings are those of Qwen3, Qwen2 and Llama in transformers, so a folder written here
opens there with no conversion, and a downloaded one loads here. No pickle is ever loaded from a weights file.
"""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from minillm.config import set_downloaded_defaults
from minillm.errors import UserError, printable
from minillm.hf_config import ARCHITECTURES, config_from_json, config_to_json, is_made_here
from minillm.model import CausalLM, ModelConfig, RotaryEmbedding
from minillm.origin import as_json, files_of, read_origin, tokens_without_rows
from minillm.records import advice_on_folder
from minillm.runtime import hold_in_bf16, say
from minillm.safetensors import atomic_write, load_json, load_safetensors, save_safetensors, short
from minillm.tokenizer import Tokenizer

MAX_SHARDS = 1000  # files of weights; each is kept open as a mapping

# Folders

def load_config(folder) -> ModelConfig:
    """The ModelConfig of a folder, with room for tokens that were added to its tokenizer; raises UserError."""
    folder = checkpoint_folder(folder)
    config = config_from_json(load_json(folder / "config.json"), folder / "config.json")
    return replace(config, vocab_size=config.vocab_size + len(tokens_without_rows(folder, config.vocab_size)))


def checkpoint_folder(folder) -> Path:
    """The folder as a Path; raises UserError, with advice, when it holds no model."""
    folder = Path(folder)
    if not folder.is_dir():
        if folder.suffix == ".gguf" and folder.exists():
            raise UserError(f"{folder} is a GGUF file, which llama.cpp and Ollama run and nobody trains; give the "
                            "folder of the model in safetensors that it was made from")
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
                            f"this with --adapter; to train on, make a whole model: python -m minillm.peft {folder}")
        if (folder / "training_state.pt").is_file():
            raise UserError(f"{folder} holds an unfinished run; finish it with --resume first")
        if snapshots := sorted(folder.glob("snapshots/*/config.json")):  # the hub's cache: models--Qwen--Qwen3-0.6B
            raise UserError(f"{folder} is a folder of the Hugging Face cache; give the model in it, "
                            f"{snapshots[-1].parent}")
        if any(folder.glob("*.gguf")):
            raise UserError(f"{folder} holds a GGUF file, which llama.cpp and Ollama run and nobody trains; give the "
                            "folder of the model in safetensors that it was made from")
        raise UserError(f"{folder} is no checkpoint folder: config.json is missing")
    return folder


def choose_defaults(cfg, folder, keep=()):
    """Give cfg the defaults that suit the model in the folder, made here or downloaded, and say which in one line.

    keep: flags that have one default for both. The default rates are those of small models that were trained for
    minutes. A downloaded model has learned far more, and forgets it at such rates.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return  # require_stage complains
    document = load_json(path)
    if is_made_here(document):
        say(f"{folder} was made by minillm: the defaults for small models are used")
        return
    changed = set_downloaded_defaults(cfg, config_from_json(document, path).max_position_embeddings, keep)
    lora = " with a LoRA" if getattr(cfg, "peft", "") == "lora" else ""
    say(f"{folder} was not made by minillm: the defaults for downloaded models{lora} are used"
        + "".join(f", {name} {value}" for name, value in changed.items()))


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
    check_model(folder)
    check_tokenizer_file(folder)
    if max_seq_len > config.max_position_embeddings:
        raise UserError(f"--max_seq_len {max_seq_len} is longer than the context of {folder}, which is "
                        f"{config.max_position_embeddings} tokens (max_position_embeddings); give at most that")


def check_model(folder):
    """Raise UserError unless the files of a language model hold its tensors. Only their headers are read."""
    where = Path(folder) / "config.json"
    document = load_json(where)
    if "SequenceClassification" in architecture_of(document, where):
        return  # its head is checked where it is loaded
    config, stored = config_from_json(document, where), load_weights(folder)
    check_sizes(config, stored, folder)
    with torch.device("meta"):
        expected = weights_of(CausalLM(config))
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
    """{name: tensor} of model.safetensors or of its shards, mapped from disk; raises UserError.

    Without RoPE's frequencies, which old checkpoints hold and config.json tells.
    """
    tensors = _stored_tensors(checkpoint_folder(folder))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _stored_tensors(folder) -> dict:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return load_safetensors(folder / "model.safetensors")
    if not index.is_file():
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        if pickled and pickled != ["training_state.pt"]:
            raise UserError(f"{folder} holds only pickled weights ({_some(pickled)}), which can run code when loaded "
                            "and are never opened here; convert it to safetensors with save_pretrained of transformers")
        if shards := sorted(path.name for path in folder.glob("model-*-of-*.safetensors")):
            raise UserError(f"{folder}: model.safetensors.index.json is missing; it tells which tensors are in "
                            f"{_some(shards)}")
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


def load_model(folder, device="cpu", dtype=torch.float32, frozen: bool = False, mapped: bool = False) -> CausalLM:
    """The model of a checkpoint folder, its weights converted to `dtype` one tensor at a time.

    frozen: nobody will train these weights, so they go straight to where runtime.hold_in_bf16 would put them. A float32
    copy, which is twice as large, then never exists. mapped: the weights stay in the file, as they are stored there,
    until shard.py fetches them part by part; `held_in` of a parameter is the dtype that it then gets.
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
    config = grow_vocabulary(config, stored, folder)
    with torch.device("meta"):  # no time and no memory for initial values that are replaced anyway
        model = CausalLM(config).to(dtype)
    expected = weights_of(hold_in_bf16(model, torch.device(device)) if frozen else model)
    check_weights(expected, stored, folder)
    weights = stored if mapped else {name: tensor.to(device, expected[name].dtype, copy=True)
                                     for name, tensor in stored.items()}
    check_finite(weights, folder)
    model.load_state_dict(weights, strict=False, assign=True)  # checked above; only the tied copy is missing
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary = RotaryEmbedding(config).to("cpu" if mapped else device)
    for name, parameter in model.named_parameters() if mapped else ():
        parameter.held_in = expected[name].dtype
    model.origin = read_origin(folder, stored)
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
    if not layers and stored and config.num_hidden_layers:
        raise UserError(f"{where}: no tensor's name begins with model.layers.; there are {_some(sorted(stored))}. They "
                        "must have the names of a causal language model of transformers")
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


def grow_vocabulary(config: ModelConfig, stored: dict, folder) -> ModelConfig:
    """Give tokens that were added to the folder's tokenizer.json rows in the stored weights: the mean of the others."""
    names = [name for name in ("model.embed_tokens.weight", "lm_head.weight")
             if name in stored and stored[name].shape == (config.vocab_size, config.hidden_size)]
    added = tokens_without_rows(folder, config.vocab_size) if names else []
    if not added:
        return config
    for name in names:
        mean = stored[name].float().mean(dim=0, keepdim=True).to(stored[name].dtype)  # (1, D)
        stored[name] = torch.cat([stored[name], mean.expand(len(added), -1)])
    shown = ", ".join(token[:80] for token in added[:5]) + (", ..." if len(added) > 5 else "")
    _say_grown(str(folder), printable(shown), len(added))
    return replace(config, vocab_size=config.vocab_size + len(added))


@functools.cache  # a policy and its reference come from one folder
def _say_grown(folder, tokens, count):
    say(f"{folder}: the vocabulary grows by {count} added tokens ({tokens}), whose embeddings start as the mean of all")


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


def save_model(folder, model: CausalLM, tokenizer, dtype: str = "auto"):
    """Write a checkpoint folder that transformers opens; raises UserError when the disk refuses.

    dtype: float32 or bfloat16; auto: what the folder had that the model was loaded from, float32 for a new model. What
    else that folder held is written back too (origin.py). Raises ValueError for a model whose tensors are not those of
    CausalLM(model.config): a LoRA must be merged first, and a wrapper (compiled, distributed) removed.
    """
    with torch.device("meta"):
        names = set(weights_of(CausalLM(model.config)))
    weights = weights_of(model)
    if set(weights) != names:
        raise ValueError(f"not a plain CausalLM: {_some(sorted(set(weights) ^ names))}")
    save_folder(folder, model.config, weights, tokenizer, model.origin, dtype)


def save_folder(folder, config: ModelConfig, weights: dict, tokenizer, origin=None, dtype: str = "auto", **settings):
    """Write config.json (with these settings), the other files and, last, model.safetensors."""
    folder = Path(folder)
    document = config_to_json(config, tokenizer)
    if origin is not None:
        document = origin.document("config.json")
        was = config_from_json(document, "config.json")
        document |= {key: value for key, value in vars(config).items() if value != getattr(was, key)}
    if dtype != "auto":
        document |= {key: dtype for key in ("torch_dtype", "dtype") if key in document} or {"torch_dtype": dtype}
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.end_ids,
                  "pad_token_id": tokenizer.pad_id}
    # the files of the tokenizer, of which some may be kept as they were
    drafts = {name: as_json(value) for name, value in tokenizer.documents(config.max_position_embeddings).items()}
    for name, content in files_of(origin, {**document, **settings}, generation, tokenizer, drafts).items():
        with atomic_write(folder / name) as file:
            file.write(content)
    dtypes = origin.dtypes if origin is not None else {}
    save_safetensors(folder / "model.safetensors", weights, dtypes={
        name: getattr(torch, dtype) if dtype != "auto" else dtypes.get(name, torch.float32) for name in weights})


def load_tokenizer(folder) -> Tokenizer:
    """The tokenizer of a model's folder; raises UserError also where the two do not fit together."""
    tokenizer = Tokenizer.load(folder)
    check_tokenizer(load_config(folder), tokenizer, folder)
    return tokenizer


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
