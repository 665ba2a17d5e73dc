r"""Byte-level BPE by hand (training, encoding, decoding), and the renderer of conversations.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) starts from single symbols and, again and again, merges
the pair of neighbours that occurs most often into a new symbol. The list of merges, in the order in which they were
learned, *is* the tokenizer: to encode a word, do the same merges to it, the earliest learned first. The symbols to
start from are the 256 bytes (Radford et al. 2019, GPT-2), so every text has an encoding and nothing is "unknown".
Merges never cross the border of a word; a regular expression says what a word is.

    text --split--> words --bytes--> symbols --merges--> ids          ids --join bytes--> text

The file format is the Hugging Face tokenizer.json; the ids are those of the `tokenizers` package, for every string.

    python -m minillm.tokenizer --data FILE... --vocab_size 6400 --out tokenizer.json
"""

import argparse
import gzip
import heapq
import json
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict

from tqdm import tqdm

from minillm import unicode_ranges
from minillm.errors import UserError

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END)  # ids 0, 1, 2 of a tokenizer that is trained here
ROLES = ("system", "user", "assistant", "tool")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# ---------------------------------------------------------------------------------------------------------------------
# Words: no merge crosses their borders
# ---------------------------------------------------------------------------------------------------------------------

# Single digits, so that a sum can be learned; letters with the space or sign before them; runs of signs; white space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def word_finder(split: str):
    """A function that cuts a text into words (nothing is left out), by one of the three regexes above."""
    everything, common = compile_split(split, 0x10FFFF).findall, compile_split(split, 0xFFFF).findall
    # `re` looks at a character beyond U+FFFF range by range, and few texts have one.
    beyond = re.compile("[\U00010000-\U0010ffff]").search
    return lambda text: (everything if beyond(text) else common)(text)


def compile_split(split: str, highest: int) -> re.Pattern:
    r"""Translate a split for `re`, which has no \p{L} and another idea of \s, for characters up to `highest`."""
    classes = {
        r"\p{L}": unicode_ranges.regex_class(unicode_ranges.LETTERS, highest),
        r"\p{N}": unicode_ranges.regex_class(unicode_ranges.NUMBERS, highest),
        r"\s": unicode_ranges.regex_class(unicode_ranges.WHITE_SPACE, highest),
    }
    split = split.replace(r"\S", r"[^\s]")

    def inside(bracket):  # [^\s\p{L}] needs the ranges, \p{L} alone needs brackets around them
        return re.sub(r"\\p{.}|\\s", lambda name: classes[name[0]], bracket)

    return re.compile(re.sub(r"\[.*?\]|\\p{.}|\\s", lambda m: inside(m[0] if m[0][0] == "[" else f"[{m[0]}]"), split))


# ---------------------------------------------------------------------------------------------------------------------
# Bytes: tokenizer.json is text, so GPT-2 gave every byte a printable character; the space, for one, is written as "Ġ"
# ---------------------------------------------------------------------------------------------------------------------

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
CHAR_OF_BYTE = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts, vocab_size: int, progress: bool = False) -> "Tokenizer":
    """Learn a tokenizer of at most `vocab_size` tokens (special ones included) from an iterable of texts.

    The texts are read once and not kept, only how often each word occurs. The result depends on nothing but these
    counts. It is smaller than asked for when no pair is left that occurs twice. Raises UserError below 259 tokens.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is too small: the special tokens and the 256 bytes are {smallest}")
    find_words = word_finder(QWEN2_SPLIT)
    word_counts = Counter()
    for text in tqdm(texts, "reading", unit=" texts", disable=None if progress else True):
        word_counts.update(find_words(text))
    tokens = [*SPECIAL_TOKENS, *CHAR_OF_BYTE.values()]
    merges = learn_merges(word_counts, tokens, vocab_size, progress)
    return Tokenizer(make_document(tokens, merges))


def learn_merges(word_counts: dict, tokens: list, vocab_size: int, progress: bool = False) -> list:
    """Byte-pair encoding: grow `tokens` to `vocab_size` by merges; return them as pairs of tokens, in order."""
    ids = {token: i for i, token in enumerate(tokens)}
    words = [[ids[CHAR_OF_BYTE[byte]] for byte in _utf8(word)] for word in word_counts]
    counts = list(word_counts.values())

    pair_counts = Counter()
    words_with = defaultdict(list)  # pair -> the words to look at; some may have lost it since
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            words_with[pair].append(i)

    # The heap's top is the most frequent pair, of several equal ones that with the smallest ids. Counts only fall after
    # a pair has entered (but see `changed`), so an entry that is out of date is too high: it comes up early, is
    # corrected and goes back.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges = []
    bar = tqdm(total=vocab_size, initial=len(tokens), desc="merging", unit=" tokens", disable=None if progress else True)
    while len(tokens) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if -count < 2:
            break
        left, right = pair
        token = tokens[left] + tokens[right]
        if token not in ids:
            ids[token] = len(tokens)
            tokens.append(token)
            bar.update()
        new = ids[token]
        merges.append((tokens[left], tokens[right]))

        changed = set()
        for i in words_with.pop(pair):
            word, count = words[i], counts[i]
            at = 0
            while at < len(word) - 1:
                if word[at] == left and word[at + 1] == right:
                    if at > 0:
                        before = word[at - 1]
                        pair_counts[before, left] -= count
                        pair_counts[before, new] += count
                        words_with[before, new].append(i)
                        changed.add((before, new))
                    if at + 2 < len(word):
                        after = word[at + 2]
                        pair_counts[right, after] -= count
                        pair_counts[new, after] += count
                        words_with[new, after].append(i)
                        changed.add((new, after))
                    word[at : at + 2] = [new]
                at += 1
        del pair_counts[pair]
        for pair in changed:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    bar.close()
    return merges


def make_document(tokens: list, merges: list) -> dict:
    """The content of a tokenizer.json: what `tokenizers` needs to do the same as we do."""
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------

NO_MERGE = 1 << 60  # ranks higher than every merge
CACHED_WORDS = 1 << 17


class Tokenizer:
    """Made from the content of a tokenizer.json; ValueError for what it does not support (`load` says it nicely)."""

    def __init__(self, document: dict):
        self.document = document
        model = document["model"]
        self.normalize, split = read_pipeline(document)
        self.find_words = word_finder(split)
        self.ids = model["vocab"]
        self.byte_ids = [self.ids[CHAR_OF_BYTE[byte]] for byte in range(256)]

        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        self.rank_of = {(self.ids[left], self.ids[right]): rank for rank, (left, right) in enumerate(merges)}
        self.merged = [self.ids[left + right] for left, right in merges]
        self.ignore_merges = model.get("ignore_merges", False)

        self.added = {token["content"]: token["id"] for token in document["added_tokens"]}
        self.special = {token["content"] for token in document["added_tokens"] if token["special"]}
        self.split_added = _splitter(self.added.keys() - self.special)
        self.split_special = _splitter(self.added)

        self.vocab_size = max([*self.ids.values(), *self.added.values()]) + 1
        self.token_bytes = [b""] * self.vocab_size
        for token, i in self.ids.items():
            if token not in self.added:
                self.token_bytes[i] = bytes(BYTE_OF_CHAR[char] for char in token)
        for token, i in self.added.items():
            self.token_bytes[i] = token.encode()
        self.cache = {}

    # -- text to ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list:
        """The ids of a text. Special tokens in it are plain text unless `allow_special`.

        Half of a surrogate pair, which no file can hold, is read as U+FFFD.
        """
        text = _repair(text)
        ids = []
        split = self.split_special if allow_special else self.split_added
        for i, part in enumerate(split(text)):
            if i % 2:
                ids.append(self.added[part])
                continue
            for word in self.find_words(self.normalize(part)):
                ids += self.cache.get(word) or self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list:
        symbols = [self.byte_ids[byte] for byte in word.encode()]
        if self.ignore_merges and (token := "".join(CHAR_OF_BYTE[byte] for byte in word.encode())) in self.ids:
            symbols = [self.ids[token]]
        symbols = self._merge(symbols)
        if len(self.cache) >= CACHED_WORDS:
            self.cache.clear()
        if len(word) <= 64:
            self.cache[word] = symbols
        return symbols

    def _merge(self, symbols: list) -> list:
        """Merge the pair that was learned earliest (of several the leftmost), until no pair is left."""
        rank_of = self.rank_of.get
        ranks = [rank_of(pair, NO_MERGE) for pair in zip(symbols, symbols[1:])]
        while ranks:
            rank = min(ranks)
            if rank == NO_MERGE:
                break
            at = ranks.index(rank)
            symbols[at : at + 2] = [self.merged[rank]]
            del ranks[at]
            if at > 0:
                ranks[at - 1] = rank_of((symbols[at - 1], symbols[at]), NO_MERGE)
            if at < len(ranks):
                ranks[at] = rank_of((symbols[at], symbols[at + 1]), NO_MERGE)
        return symbols

    # -- ids to text --------------------------------------------------------------------------------------------------

    def decode_bytes(self, ids) -> bytes:
        """The bytes of the tokens, special ones included; an id that no token has (a padded vocabulary) gives none."""
        return b"".join([self.token_bytes[i] if 0 <= i < self.vocab_size else b"" for i in ids])

    def decode(self, ids) -> str:
        """The text of the tokens, special ones included; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    # -- conversations ------------------------------------------------------------------------------------------------

    def render(self, messages: list, add_generation_prompt: bool = False) -> tuple:
        r"""A conversation as (tokens, loss_mask), each turn <|im_start|>role\ncontent<|im_end|>\n.

        The mask is True on what an assistant said and on the <|im_end|> that closes it, and is made while rendering.
        Header and content are encoded apart, so the prompt for a reply is a prefix of the render with that reply; only
        where content starts with white space can the ids differ from those of the whole text encoded at once.
        """
        tokens, mask = [], []

        def add(ids, trained=False):
            tokens.extend(ids)
            mask.extend([trained] * len(ids))

        for i, message in enumerate(messages):
            role, content = check_message(message, i)
            add([self.start_id, *self.encode(role + "\n")])
            add([*self.encode(content), self.end_id], trained=role == "assistant")
            add(self.encode("\n"))
        if add_generation_prompt:
            add([self.start_id, *self.encode("assistant\n")])
        return tokens, mask

    @property
    def endoftext_id(self) -> int:
        """<|endoftext|>, before and after a document."""
        return self._special_id(ENDOFTEXT)

    @property
    def pad_id(self) -> int:
        """<|endoftext|> fills a batch; never the end of a turn, which is to be learned."""
        return self._special_id(ENDOFTEXT)

    @property
    def start_id(self) -> int:
        return self._special_id(IM_START)

    @property
    def end_id(self) -> int:
        """<|im_end|>, the end of a turn."""
        return self._special_id(IM_END)

    def _special_id(self, token: str) -> int:
        if token not in self.added:
            raise UserError(f"the tokenizer has no {token}: add it to tokenizer.json, or take a tokenizer that has it")
        return self.added[token]

    # -- files --------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a folder. Raises UserError."""
        path = os.fspath(path)
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        try:
            with open(path, encoding="utf-8") as file:
                return cls(json.load(file))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path}: not a byte-level BPE tokenizer.json ({error!r})") from None

    def save(self, path, max_length: int = 32768):
        """Write tokenizer.json; into a folder also the tokenizer_config.json that transformers reads."""
        path = os.fspath(path)
        if not os.path.isdir(path):
            return _write_json(path, self.document)
        _write_json(os.path.join(path, "tokenizer.json"), self.document)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": IM_END,
            "pad_token": ENDOFTEXT,
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        }
        _write_json(os.path.join(path, "tokenizer_config.json"), config)


def check_message(message, i: int) -> tuple:
    """(role, content) of a message; UserError if it is not {"role": one of ROLES, "content": text}."""
    if not isinstance(message, dict):
        raise UserError(f'message {i + 1}: must be {{"role": ..., "content": ...}}, not {type(message).__name__}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"message {i + 1}: unknown role {role!r}; must be one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"message {i + 1}: the content must be text, not {type(content).__name__}")
    return role, content


def read_pipeline(document: dict):
    """(normalize, split regex) of a tokenizer.json; ValueError for anything that would give other ids here."""
    model, normalizer = document["model"], document.get("normalizer")
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise ValueError("the model must be BPE over bytes, without byte_fallback and dropout")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("prefixes and suffixes of subwords are not supported")
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"the normalizer {normalizer} is not supported")
    steps = document["pre_tokenizer"].get("pretokenizers", [document["pre_tokenizer"]])
    splits = [s["pattern"]["Regex"] for s in steps if s["type"] == "Split" and s["behavior"] == "Isolated"]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(splits) != len(steps) - 1:
        raise ValueError("the pre_tokenizer must be Split, then ByteLevel without add_prefix_space")
    if last.get("use_regex", True):
        splits.append(GPT2_SPLIT)
    if len(splits) != 1 or splits[0] not in (QWEN2_SPLIT, LLAMA3_SPLIT, GPT2_SPLIT):
        raise ValueError(f"the split {splits} is not supported")
    for token in document["added_tokens"]:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"lstrip, rstrip and single_word of the token {token['content']!r} are not supported")
    return (lambda text: unicodedata.normalize("NFC", text)) if normalizer else str, splits[0]


def _splitter(tokens):
    """A function that splits a text into [plain, token, plain, token, ..., plain]; the longest token wins."""
    if not tokens:
        return lambda text: [text]
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")").split


def _repair(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _utf8(text: str) -> bytes:
    return _repair(text).encode()


def _write_json(path: str, content):
    # A crash leaves the old file or the new one, never half of it.
    temporary = path + ".tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


# ---------------------------------------------------------------------------------------------------------------------
# python -m minillm.tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def read_texts(paths: list):
    """Every text in files of the project's schemas (data/README.md) or .txt, one line at a time. Raises UserError."""
    for path in paths:
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        text = line.decode()
                        yield from [text] if path.endswith(".txt") else texts_of(json.loads(text)) if text.strip() else []
                    except (ValueError, KeyError, TypeError, AttributeError):
                        raise UserError(f"{path}:{number}: not a line of a data file; data/README.md shows them") from None
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None


def texts_of(sample: dict) -> list:
    if "text" in sample:
        return [sample["text"]]
    messages = sample["conversations"] if "conversations" in sample else sample["chosen"] + sample["rejected"]
    return [message["content"] for message in messages]


def main():
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (see --help)")

    try:
        parser = Parser("python -m minillm.tokenizer", description="Train a byte-level BPE tokenizer.", allow_abbrev=False)
        parser.add_argument("--data", nargs="+", required=True, help=".jsonl, .jsonl.gz or .txt files")
        parser.add_argument("--vocab_size", type=int, required=True, help="tokens, the 3 special ones included")
        parser.add_argument("--out", default="tokenizer.json", help="the file to write")
        args = parser.parse_args()
        tokenizer = train_tokenizer(read_texts(args.data), args.vocab_size, progress=True)
        tokenizer.save(args.out)
        print(f"{tokenizer.vocab_size} tokens -> {args.out}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
