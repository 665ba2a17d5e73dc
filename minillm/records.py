"""Reading data files: one line, one object, and for every mistake the file and the line."""

import codecs
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import stat
import zlib
from pathlib import Path

from minillm.chat import ROLES, write_calls
from minillm.errors import UserError, printable
from minillm.forms import normalise, tools_message
from minillm.runtime import say
from minillm.safetensors import LFS, MAX_DEPTH, check_depth, no_duplicates

# By the key that shows what a record is: all keys that are read. (Only eval.py --tokens reads "advantages".)
READ = {"conversations": ("conversations",), "text": ("text",), "chosen": ("prompt", "chosen", "rejected", "margin"),
        "advantages": ("step", "reward", "tokens", "advantages", "ratios")}
ENCODERS = {"encode_text": "text", "encode_conversation": "conversations", "encode_pair": "chosen"}
# Keys that change nothing in training. Any other key is named once (see UnknownKeys).
IGNORED = set("id idx index uuid source dataset subset split score lang language kind task answer choices category "
              "topic tags url title author date timestamp license meta metadata label level difficulty type model "
              "generator num_turns prompt_id conversation_id score_chosen score_rejected chosen_score rejected_score "
              "chosen_rating rejected_rating chosen_model rejected_model parallel_tool_calls weight loss train "
              "kto_tag".split())
KNOWN_IN_MESSAGE = {"role", "content", "reasoning_content", "tool_calls", "train", "id", "name", "tool_call_id"}
MOST_UNPACKED = 20  # bytes of a line for a byte of the file; gzip makes text 3 to 10 times smaller
SMALL = 1 << 26  # bytes that any file may unpack to
MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
               "generation_config.json", "chat_template.jinja")  # what is read of a model besides its weights
PROJECT = Path(__file__).parent.parent
DECODER = json.JSONDecoder(object_pairs_hook=no_duplicates)  # otherwise the last of two equal keys counts, silently
# How other files than text begin, what they are, and how to make text of them.
PANDAS = "python -c \"import pandas as p; p.read_{}('OLD').to_json('NEW.jsonl', orient='records', lines=True)\""
OTHER_FORMATS = {
    b"PAR1": ("a Parquet file", PANDAS.format("parquet")), b"ARROW1": ("an Arrow file", PANDAS.format("feather")),
    b"\xff\xff\xff\xff": ("an Arrow file of datasets",
                          "python -c \"import datasets as d; d.Dataset.from_file('OLD').to_json('NEW.jsonl')\""),
    b"PK\3\4": ("a zip archive", "unzip"), b"\x1f\x8b": ("compressed twice with gzip", "gzip -d"),
    b"(\xb5/\xfd": ("compressed with zstd", "zstd -d"), b"\xfd7zXZ": ("compressed with xz", "xz -d"),
    b"BZh": ("compressed with bzip2", "bzip2 -d"), b"%PDF": ("a PDF file", "pdftotext")}


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
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is a pipe or a device, and data is read more than once; write it into a file first")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such data file{advice_on_folder(path)}")


def advice_on_folder(path) -> str:
    """The end of a message about a path that is missing here but exists in the project's folder; else ""."""
    found = path and not os.path.isabs(path) and os.path.exists(PROJECT / path)
    return f"; run the command in the project's folder, {PROJECT}" if found else ""


def read_lines(path, blank: bool = False):
    """Yield (line number, text with its line ending) of a UTF-8 file, gzipped or not. Blank lines only if asked for.

    A JSON array gives its items, each with the number of the line where it begins. A byte-order mark at the start of
    any line is dropped: joined files have one in the middle. Raises UserError with file and line.
    """
    check_file(path)
    try:
        with (gzip.open if is_gzipped(path) else open)(path, "rb") as file:
            start = file.read(4096)
            check_encoding(path, start)
            file.seek(0)
            is_array = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" and not is_text(path)
            lines = limited_lines(path, file, is_array)
            if is_array:
                yield from array_items(path, "".join(text_of_line(path, *line, start) for line in lines))
                return
            for number, line in lines:
                text = text_of_line(path, number, line, start)
                if blank or text.strip():
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def limited_lines(path, file, whole: bool):
    """Yield (number, line) of an open file. Raises UserError where a line (with `whole`: all lines together) is far
    longer than the file: a few bytes of gzip can unpack to what no memory holds.
    """
    most = left = MOST_UNPACKED * os.path.getsize(path) + SMALL
    for number in itertools.count(1):
        line = file.readline(left)
        if not line:
            return
        left = left - len(line) if whole else most
        if not left or len(line) == most:
            raise UserError(f"{path}:{number}: unpacks to more than {most:,} bytes in one piece; unpack the file, and "
                            "write one object per line")
        yield number, line


def check_encoding(path, start: bytes):
    """Raise UserError if a file that begins like this is UTF-16 or UTF-32 (it has a byte-order mark), or no data."""
    if start.startswith(LFS):
        raise UserError(f"{path}: is a Git LFS pointer; git lfs pull fetches the file itself")
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
             codecs.BOM_UTF16_BE: "UTF-16"}
    name = next((name for mark, name in marks.items() if start.startswith(mark)), None)
    if name:
        raise UserError(f"{path}:1: is {name}, not UTF-8; iconv -f {name} -t UTF-8 OLD > NEW converts such a file")


def check_format(path, start: bytes):
    """Raise UserError if a file that is no text, and begins like this, is of a format that can be converted."""
    for mark, (what, command) in OTHER_FORMATS.items():
        if start.startswith(mark):
            raise UserError(f"{path}: is {what}; minillm reads text and JSON Lines; convert it first ({command})")


def text_of_line(path, number: int, line: bytes, start: bytes) -> str:
    """A line of a file that begins with the bytes `start`, as text without a byte-order mark. Raises UserError."""
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        check_format(path, start)
        if b"\0" in start:
            line = b"\0"
        else:
            raise UserError(f"{path}:{number}: not valid UTF-8 (byte {error.start + 1} of the line); convert the file "
                            "to UTF-8, a Chinese one perhaps with iconv -f GB18030 -t UTF-8 OLD > NEW") from None
    if b"\0" in line:
        check_format(path, start)
        raise UserError(f"{path}:{number}: holds NUL bytes, as UTF-16 does; "
                        "iconv -f UTF-16 -t UTF-8 OLD > NEW converts such a file")
    return text


def array_items(path, text: str):
    """Yield (line number, JSON text) of the items of a JSON array, which is a whole file. Raises UserError."""
    def refuse(what):
        raise UserError(f"{path}:{line + text.count(chr(10), done, at)}: {what}")

    def skip(start):
        return re.compile(r"\s*").match(text, start).end()

    decoder, line, done = json.JSONDecoder(), 1, 0
    at = skip(skip(0) + 1)
    while text[at:at + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            refuse(f"not JSON ({error})")
        line, done = line + text.count("\n", done, at), at
        yield line, text[at:end]
        at = skip(end)
        if text[at:at + 1] == ",":
            at = skip(at + 1)
        elif text[at:at + 1] != "]":
            refuse("not JSON (the items of an array need commas between them, and a ] after the last one)")
    at = skip(at + 1)
    if at < len(text):
        refuse("text after the end of the array; a file is one array, or has one object per line")


def parse_line(text: str, where: str) -> dict:
    """One JSON object, normalised; `where` ("file:line") begins the message of the UserError."""
    advice = "each line must be an object, or the file one array of objects; plain text is read from .txt files"
    try:
        record = DECODER.decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            check_depth(record)
    except json.JSONDecodeError as error:  # its own message counts lines from the start of this one
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {advice}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object like {{...}}, not a {type(record).__name__}; {advice}")
    return normalise(record, where)


class UnknownKeys:
    """The keys of one file's records that nothing reads, each with the line where it first holds something."""

    def __init__(self, lines=()):
        self.lines = dict(lines)

    def add(self, record: dict, line: int, encoder: str = ""):
        """Note the unknown keys of a record and of its messages. encoder: what reads one kind of records alone."""
        read_as = ENCODERS.get(encoder)
        kinds = [kind for kind in READ if kind in record and (read_as not in record or kind == read_as)]
        read = [key for kind in kinds for key in READ[kind]]
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
            named = ", ".join(f'"{printable(key)}" (line {line:,})' for key, line in self.lines.items())
            say(f"{path}: unknown keys are ignored: {named}")


def read_records(paths, check=None, most: int | None = None):
    """Yield the objects of JSON Lines files, normalised, at most so many of each, and name the keys that nothing reads.

    check(record, where) may raise UserError; an empty file raises it too.
    """
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        number, unknown = None, UnknownKeys()
        for number, text in itertools.islice(read_lines(path), most):
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
                for message in itertools.chain(*conversations):
                    calls = write_calls(message.get("tool_calls") or [], after_content=False)
                    yield from filter(None, (message.get("reasoning_content"), message["content"], calls))
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
        if message["role"] not in ROLES and not (message["role"] == "tools" and i == 1):
            raise UserError(f'{where}: message {i} of "{key}" has the unknown role {message["role"]!r}; '
                            f'known: {", ".join(ROLES)}')
        for name in ("content", "reasoning_content"):
            check_text(message.get(name, ""), where, f'"{name}" of message {i} of "{key}"')
        check_text(write_calls(message.get("tool_calls", []), False), where, f'"tool_calls" of message {i} of "{key}"')
        if message["role"] == "tools":
            tools_message(message["content"], f'{where}: message {i} of "{key}"')


def require(record: dict, key: str, where: str):
    """record[key]. Raises a UserError that lists the keys found."""
    if key not in record:
        names = ["a conversation" if name == "conversations" else repr(name) for name in record]  # perhaps "messages"
        raise UserError(f'{where}: no key "{key}"; found: {", ".join(names) or "nothing"} '
                        "(data/README.md lists the forms that are understood)")
    return record[key]


def check_conversation(record: dict, where: str):
    """Raise UserError unless record has a list of messages under "conversations" (SFT data and prompts)."""
    if "conversations" not in record and "chosen" in record and "messages" in record:  # UltraFeedback
        raise UserError(f'{where}: no key "conversations", as "messages" beside "chosen" and "rejected" are not read; '
                        "remove these two to train on the messages")
    check_messages(require(record, "conversations", where), where)


def read_pair(record: dict, where: str) -> tuple:
    """(chosen, rejected): both sides of a preference pair as whole conversations, lists of messages.

    Either each side begins with the prompt, or the prompt stands once, under "prompt". Raises UserError.
    """
    def begins_with(messages, prompt):  # a system message, tools or earlier turns may stand before it
        turns, asked = ([(m["role"], m["content"]) for m in part] for part in (messages, prompt))
        return any(turns[i:i + len(asked)] == asked for i in range(len(turns)))

    for side in ("chosen", "rejected"):
        require(record, side, where)
    prompt = record.get("prompt", [])
    if "prompt" in record:
        check_messages(prompt, where, "prompt")
    sides = []
    for side in ("chosen", "rejected"):
        messages = record[side]
        check_messages(messages, where, side)
        if not prompt and len(messages) == 1 and messages[0]["role"] == "assistant":
            raise UserError(f'{where}: nothing stands before the answer in "{side}"; put the question under "prompt"')
        if messages[-1].get("train") is False:
            raise UserError(f'{where}: the answer in "{side}" is marked as not to be trained on; remove the pair')
        if prompt and messages[0]["role"] == "assistant" and not begins_with(messages, prompt):
            if prompt[-1]["role"] == "assistant":
                raise UserError(f'{where}: the last message of "prompt" is an answer already, before the one in '
                                f'"{side}"; remove it')
            messages = prompt + messages
        elif prompt and messages[0]["role"] == "assistant" != prompt[0]["role"]:
            raise UserError(f'{where}: "{side}" begins with the assistant, and "prompt" stands in it later; does it '
                            'also stand before it? Begin both sides with all messages, and leave "prompt" out')
        elif not begins_with(messages, prompt):
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


def fingerprint(path: str) -> str:
    """A hash of a file, or of a model folder's weights, settings, tokenizer and chat template; raises UserError."""
    files = [path] if os.path.isfile(path) else []
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).iterdir()
                       if file.suffix == ".safetensors" or file.name in MODEL_FILES)
    try:
        return " ".join(content_hash(file) for file in files)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
