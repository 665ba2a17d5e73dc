"""What a folder holds beside the weights, so that it can be written back with them: nothing downloaded gets lost.

Settings that minillm does not know, the chat template, how to sample, the license: all of it comes back byte for byte,
unless it has to change. What may have to:
- config.json: the size of a vocabulary that grew, the dtype where another one was asked for, and for a reward model
  what makes it one;
- generation_config.json: the token that ends a turn, where it is not among those that end a reply;
- tokenizer_config.json: the chat template, where there was none.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import UserError
from minillm.safetensors import load_json

OWN_FILES = ("run_config.json", "summary.json", "model.safetensors.index.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "tokenizer.model")
MOST_BYTES = 2**26  # of a file; what is larger is no setting


@dataclass
class Origin:
    """The folder that a model was loaded from: {name: bytes} of its small files, {name: dtype} of its tensors."""

    files: dict
    dtypes: dict

    def document(self, name: str) -> dict:
        """The content of a JSON file; {} without it."""
        try:
            value = json.loads(self.files.get(name, b"{}"))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


def read_origin(folder, stored: dict) -> Origin:
    """The Origin of a checkpoint folder whose tensors are `stored`; raises UserError when a file cannot be read."""
    files = {}
    for path in sorted(Path(folder).iterdir()):
        kept = path.suffix in (".json", ".jinja", ".txt", ".md", ".model") or path.name in ("LICENSE", "NOTICE")
        if kept and path.name not in OWN_FILES and path.is_file() and path.stat().st_size <= MOST_BYTES:
            try:
                files[path.name] = path.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return Origin(files, {name: tensor.dtype for name, tensor in stored.items()})


def files_of(origin: Origin | None, config: dict, generation: dict, tokenizer, drafts: dict) -> dict:
    """{name: bytes} of what is written beside the weights.

    config: what config.json has to say. generation, drafts: what generation_config.json and the tokenizer's files are
    without an origin. Those of the origin are kept, the tokenizer's as long as it is still the same one.
    """
    new = {"config.json": config, "generation_config.json": generation}
    if origin is None:
        return {**{name: as_json(value) for name, value in new.items()}, **drafts}
    files = {name: content for name, content in origin.files.items() if name not in TOKENIZER_FILES}
    old = origin.document("generation_config.json")
    if old:
        ends = old.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        end = generation["eos_token_id"][0]
        new["generation_config.json"] = old if end in ends else {**old, "eos_token_id": [end, *ends]}
    if has_its_tokenizer(origin, tokenizer):
        ours = drafts["tokenizer_config.json"]
        drafts = {**drafts, **{name: content for name, content in origin.files.items() if name in TOKENIZER_FILES}}
        old, template = origin.document("tokenizer_config.json"), json.loads(ours)["chat_template"]
        if old and "chat_template" not in old and not {"chat_template.jinja", "chat_template.json"} & {*drafts}:
            new["tokenizer_config.json"] = {**old, "chat_template": template}
    changed = {name: as_json(value) for name, value in new.items() if origin.document(name) != value}
    return {**files, **drafts, **changed}


def has_its_tokenizer(origin: Origin, tokenizer) -> bool:
    """Whether the origin's tokenizer.json is what this tokenizer was made from."""
    document = origin.document("tokenizer.json")
    if not isinstance(document.get("model"), dict) or "merges" not in document["model"]:
        return False
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    return {**document, "model": {**document["model"], "merges": merges}} == tokenizer.document


def as_json(value) -> bytes:
    """A JSON document, as all files of minillm have it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def tokens_without_rows(folder, vocab_size: int) -> list:
    """The added tokens of a folder's tokenizer.json for which a vocabulary of this size has no room."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return []
    document = load_json(path, MOST_BYTES)  # Qwen3's has 11 million
    model, added = document.get("model"), document.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        return []  # the tokenizer complains when it is loaded
    tokens = {token["id"]: token.get("content") for token in added
              if isinstance(token, dict) and type(token.get("id")) is int}
    new = sorted(i for i in tokens if i >= vocab_size)
    if new != list(range(vocab_size, vocab_size + len(new))) or any(
            type(i) is int and i >= vocab_size and tokens.get(i) != token for token, i in vocabulary.items()):
        return []  # that is the tokenizer of another model
    return [str(tokens[i]) for i in new]
