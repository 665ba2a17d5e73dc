"""Reading data files: one line, one object, and for every mistake the file and the line."""

import functools
import gzip
import hashlib
import json
import os
import stat
import zlib
from pathlib import Path

from minillm.errors import UserError
from minillm.runtime import say

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# By the key that shows what a record is: all keys that training reads.
READ = {"conversations": ("conversations",), "text": ("text",), "chosen": ("prompt", "chosen", "rejected", "margin")}
# Keys that change nothing in training. Any other key is named once (see UnknownKeys).
IGNORED = set("id idx index uuid source dataset subset split score lang language kind task level answer choices "
              "category topic tags url title author date timestamp license meta metadata".split())
UNREAD = ("system", "tools", "history", "images")  # beside the messages; must be empty
UNREAD_IN_MESSAGE = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "tools", "images")
KNOWN_IN_MESSAGE = {"role", "content", "id", "weight", "loss", "train"}
PROJECT = Path(__file__).parent.parent


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
        raise UserError(f"{path}: no such data file{advice_on_folder(path)}")


def advice_on_folder(path) -> str:
    """The end of a message about a path that is missing here but exists in the project's folder; else ""."""
    found = not os.path.isabs(path) and (PROJECT / path).exists()
    return f"; run the command in the project's folder, {PROJECT}" if found else ""


def read_lines(path, blank: bool = False):
    """Yield (line number, text with its line ending) of a UTF-8 file, gzipped or not. Blank lines only if asked for.

    A byte-order mark at the start of any line is dropped: joined files have one in the middle. Raises UserError with
    file and line.
    """
    check_file(path)
    try:
        with (gzip.open if is_gzipped(path) else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise UserError(f"{path}:{number}: holds NUL bytes, as UTF-16 does; "
                                    "iconv -f UTF-16 -t UTF-8 OLD > NEW converts such a file")
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
    """One JSON object, normalised; `where` ("file:line") begins the message of the UserError."""
    advice = "each line must be an object"
    if text.lstrip().startswith("["):
        advice += "; jq -c '.[]' OLD > NEW converts a JSON array"
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:  # its own message counts lines from the start of this one
        found = "Lines but an array" if text.lstrip().startswith("[") else f"({error.msg}, column {error.colno})"
        raise UserError(f"{where}: not JSON {found}; {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {advice}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object like {{...}}, not a {type(record).__name__}; {advice}")
    return normalise(record, where)


def normalise(record: dict, where: str) -> dict:
    """The record with {"conversations": [{"role", "content"}, ...]} in place of the other usual forms.

    These are OpenAI's "messages", ShareGPT's "from" and "value", Alpaca's instruction, input and output, and a prompt
    with or without a completion, each as text or as messages. A "system" beside the conversation becomes its first
    turn. The prompt of a pair is left, or put, under "prompt". Raises UserError.
    """
    record = dict(record)
    if "chosen" in record:
        find_prompt(record, where)
    elif "conversations" in record or "text" in record:
        pass
    elif "messages" in record:
        record["conversations"] = record.pop("messages")
    elif "instruction" in record and "output" in record:
        question, answer = instruction_of(record, where), record.pop("output")
        record["conversations"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    elif "prompt" in record:
        prompt, completion = as_messages(record.pop("prompt"), "user"), record.pop("completion", [])
        completion = as_messages(completion, "assistant")
        for name, messages in (("prompt", prompt), ("completion", completion)):
            if not isinstance(messages, list):
                raise UserError(f'{where}: "{name}" must be text or a list of messages')
        record["conversations"] = prompt + completion
    for key in ("conversations", "prompt", "chosen", "rejected"):
        if isinstance(record.get(key), list):
            record[key] = [from_sharegpt(message) for message in record[key]]
    system, messages = record.get("system"), record.get("conversations")
    if system and isinstance(system, str) and isinstance(messages, list) and not has_system_turn(messages):
        record["conversations"] = [{"role": "system", "content": record.pop("system")}, *messages]
    return record


def instruction_of(record: dict, where: str) -> str:
    """Alpaca's question, taken out of the record: the instruction, and the input, if there is one, on a new line."""
    parts = record.pop("instruction"), record.pop("input", None) or ""
    for part in parts:
        check_text(part, where, "each of instruction and input")
    return "\n".join(part for part in parts if part)


def find_prompt(record: dict, where: str):
    """In a pair whose sides are answers alone, move what stands for the prompt under "prompt"."""
    for side in ("chosen", "rejected"):
        if isinstance(record.get(side), dict):
            record[side] = [record[side]]  # a single message
    chosen = record["chosen"]
    first = from_sharegpt(chosen[0]) if isinstance(chosen, list) and chosen else {}
    if "prompt" in record or (isinstance(first, dict) and first.get("role") in ("system", "user")):
        return
    for key in ("conversations", "messages"):
        if key in record and "prompt" not in record:
            record["prompt"] = record.pop(key)
    if "instruction" in record and "prompt" not in record:
        record["prompt"] = instruction_of(record, where)


def has_system_turn(messages: list) -> bool:
    """Whether one of the messages is a system message."""
    return any(isinstance(message, dict) and message.get("role") == "system" for message in messages)


def as_messages(value, role: str):
    """Text as a single message of this role; anything else as it is."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def from_sharegpt(message):
    """{"from", "value"} as {"role", "content"}; anything else as it is."""
    if not isinstance(message, dict) or not {"from", "value"} <= set(message) or "role" in message:
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    role = message["from"]
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": message["value"], **rest}


class UnknownKeys:
    """The keys of one file's records that nothing reads, each with the line where it first holds something."""

    def __init__(self, lines=()):
        self.lines = dict(lines)

    def add(self, record: dict, line: int):
        """Note the unknown keys of a record and of its messages."""
        kind = next((kind for kind in READ if kind in record), None)
        read = READ.get(kind, ())
        self._add(record, {*read, *IGNORED}, "", line)
        for name in read:
            for message in record[name] if isinstance(record.get(name), list) else ():
                if isinstance(message, dict):
                    self._add(message, KNOWN_IN_MESSAGE, f"{name}: ", line)

    def _add(self, found, known, prefix, line):
        unknown = [key for key, value in found.items() if key not in known and value not in (None, "", [], {})]
        self.merge(UnknownKeys({prefix + key: line for key in unknown}))

    def merge(self, other: "UnknownKeys"):
        """Add the keys of lines that come later, up to twenty keys in all."""
        for key, line in other.lines.items():
            if len(self.lines) < 20:
                self.lines.setdefault(key, line)

    def tell(self, path):
        """Print one line, if there were any."""
        if self.lines:
            named = ", ".join(f'"{key}" (line {line:,})' for key, line in self.lines.items())
            say(f"{path}: unknown keys are ignored: {named}")


def read_records(paths, check=None):
    """Yield the objects of JSON Lines files, normalised, and name the keys that nothing reads.

    check(record, where) may raise UserError; an empty file raises it too.
    """
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        number, unknown = None, UnknownKeys()
        for number, text in read_lines(path):
            record = parse_line(text, f"{path}:{number}")
            if check:
                check(record, f"{path}:{number}")
            unknown.add(record, number)
            yield record
        if number is None:
            raise UserError(f"{path}: the file is empty")
        unknown.tell(path)


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
    if "\0" in value:
        raise UserError(f"{where}: {name} holds a NUL character (\\u0000); remove it")


def check_messages(messages, where: str, key: str = "conversations"):
    """Raise UserError unless messages is a list of {"role", "content"} with known roles and text."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: "{key}" must be a list of messages with at least one')
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f'{where}: message {i} of "{key}" needs "role" and "content"')
        check_unread(message, UNREAD_IN_MESSAGE, f'{where}: message {i} of "{key}"')
        trained = message["role"] == "assistant"
        for name in ("weight", "loss", "train") if trained else ("loss", "train"):
            if message.get(name) not in (None, int(trained)):  # True is 1
                raise UserError(f'{where}: message {i} of "{key}" has "{name}": {json.dumps(message[name])[:80]}; not '
                                "supported: every assistant message is trained on, and no other; remove the "
                                "conversation, or the key")
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
    check_messages(require(record, "conversations", where), where)
    check_unread(record, UNREAD, where)


def read_pair(record: dict, where: str) -> tuple:
    """(chosen, rejected): both sides of a preference pair as whole conversations, lists of messages.

    Either each side begins with the prompt, or the prompt stands once, under "prompt". With "prompt", plain text is
    accepted for messages: the user's in the prompt, the assistant's in a side. Raises UserError.
    """
    def turns(messages):
        return {(message["role"], message["content"]) for message in messages}

    check_unread(record, UNREAD, where)
    prompt = record.get("prompt", [])
    prompt = as_messages(prompt, "user")
    if "prompt" in record:
        check_messages(prompt, where, "prompt")
    sides = []
    for side in ("chosen", "rejected"):
        messages = require(record, side, where)
        if prompt:
            messages = as_messages(messages, "assistant")
        check_messages(messages, where, side)
        if not prompt and messages[0]["role"] == "assistant":
            raise UserError(f'{where}: nothing stands before the answer in "{side}"; put the question under "prompt"')
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
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "it is no regular file")  # a pipe would be waited for without end
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
