"""Reading data files: one line, one object, and for every mistake the file and the line."""

import functools
import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path

from minillm.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


def is_text(path) -> bool:
    """Whether a file is plain text (.txt, .txt.gz, in any case). Every other file holds one JSON object per line."""
    return str(path).lower().endswith((".txt", ".txt.gz"))


def is_gzipped(path) -> bool:
    """Whether a file is compressed, judged by its first bytes and not by its name."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def check_file(path):
    """Raise UserError unless path is a file."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give the files in it")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such data file")


def read_lines(path, blank: bool = False):
    """Yield (line number, text with its line ending) of a UTF-8 file, gzipped or not. Blank lines only if asked for.

    A byte-order mark at the start of any line is dropped: joined files have one in the middle. Raises UserError with
    file and line.
    """
    check_file(path)
    try:
        with (gzip.open if is_gzipped(path) else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8").removeprefix("\ufeff")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: not valid UTF-8 (byte {error.start + 1} of the line); "
                                    "convert the file to UTF-8") from None
                if blank or text.strip():
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def parse_line(text: str, where: str) -> dict:
    """One JSON object; `where` ("file:line") begins the message of the UserError."""
    advice = "each line must be an object"
    if text.lstrip().startswith("["):
        advice += "; jq -c '.[]' OLD > NEW converts a JSON array"
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:  # its own message counts lines from the start of this one
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {advice}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object like {{...}}, not a {type(record).__name__}; {advice}")
    return record


def read_records(paths, check=None):
    """Yield the objects of JSON Lines files. check(record, where) may raise UserError; an empty file raises it too."""
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        number = None
        for number, text in read_lines(path):
            record = parse_line(text, f"{path}:{number}")
            if check:
                check(record, f"{path}:{number}")
            yield record
        if number is None:
            raise UserError(f"{path}: the file is empty")


def read_texts(paths: list):
    """Yield every text in data files of any kind, for training a tokenizer. Raises UserError with file and line."""
    for path in paths:
        for number, text in read_lines(path, blank=is_text(path)):
            if is_text(path):
                yield text
                continue
            record, where = parse_line(text, f"{path}:{number}"), f"{path}:{number}"
            if "text" in record:
                check_text(record["text"], where, '"text"')
                yield record["text"]
            elif "conversations" in record or "chosen" in record:
                if "conversations" in record:
                    check_conversation(record, where)
                    conversations = [record["conversations"]]
                else:
                    conversations = read_pair(record, where)
                for messages in conversations:
                    yield from (message["content"] for message in messages)
            else:
                raise UserError(f'{where}: must be {{"text": ...}}, {{"conversations": [...]}} or '
                                '{"chosen": [...], "rejected": [...]}')


def check_text(value, where: str, name: str):
    """Raise UserError unless value is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name} holds half of a surrogate pair (\\ud800-\\udfff), "
                        "which is not a character") from None


def check_messages(messages, where: str, key: str = "conversations"):
    """Raise UserError unless messages is a list of {"role", "content"} with known roles and text."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: "{key}" must be a list of messages with at least one')
    for i, message in enumerate(messages, 1):
        if isinstance(message, dict) and "from" in message and "value" in message:
            raise UserError(f"{where}: this is the ShareGPT format; convert it with "
                            """sed 's/"from"/"role"/g; s/"value"/"content"/g; s/"human"/"user"/g; """
                            """s/"gpt"/"assistant"/g' OLD > NEW""")
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f'{where}: message {i} of "{key}" needs "role" and "content"')
        check_unread(message, ("reasoning_content", "tool_calls"), f'{where}: message {i} of "{key}"')
        if message.get("weight") not in (None, 1):
            raise UserError(f'{where}: message {i} of "{key}" has the weight {message["weight"]}; only 1 is supported')
        if message["role"] not in ROLES:
            raise UserError(f'{where}: message {i} of "{key}" has the unknown role {message["role"]!r}; '
                            f'known: {", ".join(ROLES)}')
        check_text(message["content"], where, f'"content" of message {i} of "{key}"')


def check_unread(found: dict, keys: tuple, where: str):
    """Raise UserError if one of these keys is filled: nothing reads them, so their content would be lost silently."""
    for key in keys:
        if found.get(key):
            raise UserError(f'{where}: "{key}" is not supported; write it into the content of a message, or remove it')


def require(record: dict, key: str, where: str):
    """record[key]. Raises a UserError that lists the keys found."""
    if key not in record:
        raise UserError(f'{where}: no key "{key}"; found: {", ".join(map(repr, record)) or "nothing"}')
    return record[key]


def check_conversation(record: dict, where: str):
    """Raise UserError unless record has a list of messages under "conversations" (SFT data and prompts)."""
    if "messages" in record and "conversations" not in record:
        raise UserError(f"{where}: this is the OpenAI format; convert it with "
                        """sed 's/"messages"/"conversations"/' OLD > NEW""")
    check_messages(require(record, "conversations", where), where)
    check_unread(record, ("system", "tools"), where)


def read_pair(record: dict, where: str) -> tuple:
    """(chosen, rejected): both sides of a preference pair as whole conversations, lists of messages.

    Either each side begins with the prompt, or the prompt stands once, under "prompt". With "prompt", plain text is
    accepted for messages: the user's in the prompt, the assistant's in a side. Raises UserError.
    """
    def turns(messages):
        return {(message["role"], message["content"]) for message in messages}

    check_unread(record, ("system", "tools"), where)
    prompt = record.get("prompt", [])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if "prompt" in record:
        check_messages(prompt, where, "prompt")
    sides = []
    for side in ("chosen", "rejected"):
        messages = require(record, side, where)
        if prompt and isinstance(messages, str):
            messages = [{"role": "assistant", "content": messages}]
        check_messages(messages, where, side)
        if prompt and messages[0]["role"] == "assistant":
            messages = prompt + messages
        elif not turns(prompt) <= turns(messages):
            raise UserError(f'{where}: "{side}" must begin with the messages of "prompt" or with the assistant')
        sides.append(messages)
    return tuple(sides)


def content_hash(path) -> str:
    """SHA-256 of a file's content. Within a process an unchanged file is read only once. Raises UserError."""
    try:
        found = os.stat(path)
        return _content_hash(os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


@functools.cache
def _content_hash(path, *identity) -> str:  # identity: what changes when the file does
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
