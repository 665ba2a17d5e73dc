"""What the files beside a tokenizer.json say about it: which tokens begin, end and pad a text, and the chat template.

transformers, and what serves a model, read the same files: tokenizer_config.json, generation_config.json, config.json
and chat_template.jinja. None of them must be there. But one that is there and damaged is refused by its name: left out,
it would change without a word where a reply ends, or how a conversation is written.
"""

import os
import re

from minillm.errors import UserError
from minillm.safetensors import MAX_JSON, load_json, open_file, short

KINDS = ("bos", "eos", "pad")


def read_folder(folder) -> dict:
    """What the files of a model's folder say about its tokenizer; raises UserError for one that is damaged.

    "bos", "eos" and "pad" are lists of texts and ids, preferred ones first. "template" is the chat template, or "".
    "added" is {id: text} of the added tokens, as far as tokenizer_config.json lists them.
    """
    named = {**{kind: [] for kind in KINDS}, "template": "", "added": {}}
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            continue
        config = load_json(path)
        for kind in KINDS:
            named[kind] += _token(config, f"{kind}_token", path) + _ids(config, f"{kind}_token_id", path)
        if name == "tokenizer_config.json":
            named["template"], named["added"] = _template(config, path), _added(config, path)
    path = os.path.join(folder, "chat_template.jinja")  # where newer versions of transformers write it
    if os.path.lexists(path):
        named["template"] = _read_template(path)
    return named


def _refuse(path, key, value, must_be):
    raise UserError(f"{path}: {key} = {short(value)} must be {must_be}; copy or download the file again")


def _text(token):
    """The text of a token that is given as text or as an object with its flags; None for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _token(config, key, path) -> list:
    value = config.get(key)
    if value is not None and _text(value) is None:
        _refuse(path, key, value, 'a token: text, or an object with "content"')
    return [] if value is None else [_text(value)]


def _ids(config, key, path) -> list:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or not -1 <= i < 2**31 for i in ids):  # -1: none, in old folders of Llama
        _refuse(path, key, value, "the id of a token or a list of ids")
    return ids


def _template(config, path) -> str:
    value = config.get("chat_template")
    if isinstance(value, list) and all(isinstance(one, dict) and isinstance(one.get("name"), str)
                                       and isinstance(one.get("template"), str) for one in value):
        return next((one["template"] for one in value if one["name"] == "default"), "")
    if value is not None and not isinstance(value, str):
        _refuse(path, "chat_template", value, 'text or a list of {"name", "template"}')
    return value or ""


def _read_template(path) -> str:
    try:
        with open_file(path) as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise UserError(f"{path} is too large: such a file has at most {MAX_JSON:,} bytes")
        if not text.strip():
            raise UserError(f"{path} is empty; copy or download it again")
        return text.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 ({short(error)}); copy or download it again") from None


def _added(config, path) -> dict:
    value = {} if config.get("added_tokens_decoder") is None else config["added_tokens_decoder"]
    if not isinstance(value, dict) or not all(re.fullmatch("[0-9]{1,10}", i) and isinstance(token, dict)
                                              and _text(token) is not None for i, token in value.items()):
        _refuse(path, "added_tokens_decoder", value, "an object that gives a token for each id")
    return {int(i): token["content"] for i, token in value.items()}


def check_added(document: dict, named: dict, folder) -> list:
    """The tokens that tokenizer_config.json names and the document, a tokenizer.json, lacks.

    Raises UserError where the two files contradict each other.
    """
    ours = {token["id"]: token["content"] for token in document["added_tokens"]}
    id_of = {text: i for i, text in ours.items()}
    for i, text in named["added"].items():
        if ours.get(i, text) != text or id_of.get(text, i) != i:
            path = os.path.join(folder, "tokenizer_config.json")
            raise UserError(f"{path}: added_tokens_decoder gives {short(text)} the id {i}, tokenizer.json does not; "
                            "copy or download both from one model")
    texts = [*named["added"].values(), *(token for kind in KINDS for token in named[kind] if isinstance(token, str))]
    return [text for text in dict.fromkeys(texts) if text not in id_of and text not in document["model"]["vocab"]]
