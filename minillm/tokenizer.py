"""Byte-level BPE by hand (training, encoding, decoding), and conversations as tokens with a loss mask.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) starts from single symbols and merges, again and again, the
pair of neighbours that occurs most often into a new symbol. The merges, in the order in which they were learned, are
the tokenizer: a word is encoded by doing the same merges to it, the earliest learned first. The symbols to start from
are the 256 bytes (Radford et al. 2019, GPT-2), so there is no text without an encoding. A regular expression cuts the
text into words, and no merge crosses their borders.

    text --regex--> words --UTF-8--> bytes --merges--> ids            ids --join the tokens' bytes--> text

The file is the tokenizer.json of Hugging Face; the ids are those of the `tokenizers` package, for every string.

    python -m minillm.tokenizer --data FILE... --vocab_size 6400 --out tokenizer.json
"""

import argparse
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
from minillm.records import ROLES, read_texts
from minillm.safetensors import save_json

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END)  # ids 0, 1, 2 of a tokenizer that is trained here

# `render` below, in the words of transformers' apply_chat_template.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# ------------------------------------------------------ words --------------------------------------------------------

# In order: English endings; letters, with the space or sign before them; a single digit, so that sums can be learned;
# signs; line ends; white space, of which the last one is left to the word that follows.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def word_finder(split: str):
    """A function that cuts a text into its words by one of the splits above; together they are the whole text."""
    everything, common = compile_split(split, 0x10FFFF).findall, compile_split(split, 0xFFFF).findall
    # `re` tests the ranges beyond U+FFFF one by one, and few texts have such a character: a fourfold gain.
    beyond = re.compile("[\U00010000-\U0010ffff]").search
    return lambda text: (everything if beyond(text) else common)(text)


def compile_split(split: str, highest: int) -> re.Pattern:
    r"""A split for `re`, which has no \p{L} and \p{N} and a wider \s, exact for code points up to `highest`."""
    letters = unicode_ranges.regex_class(unicode_ranges.LETTERS, highest)
    numbers = unicode_ranges.regex_class(unicode_ranges.NUMBERS, highest)
    spaces = unicode_ranges.regex_class(unicode_ranges.WHITE_SPACE, highest)
    split = split.replace(r"[^\s\p{L}\p{N}]", f"[^{spaces}{letters}{numbers}]")
    split = split.replace(r"[^\r\n\p{L}\p{N}]", rf"[^\r\n{letters}{numbers}]")
    split = split.replace(r"\p{L}", f"[{letters}]").replace(r"\p{N}", f"[{numbers}]")
    split = split.replace(r"\S", f"[^{spaces}]").replace(r"\s", f"[{spaces}]")
    return re.compile(split)


# ------------------------------------------------------ bytes --------------------------------------------------------

# In the file a token is text, so GPT-2 gave each byte a character that can be seen: the space, for one, is "Ġ".
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
CHAR_OF_BYTE = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}

_SURROGATE = re.compile("[\ud800-\udfff]")


def utf8(word: str) -> bytes:
    """The bytes of a word. Half a surrogate pair, which JSON can smuggle into a str, counts as U+FFFD."""
    return _SURROGATE.sub("\ufffd", word).encode()


def token_bytes(token: str) -> bytes:
    """The bytes that a token of the file stands for. Only an added token has other characters; it means itself."""
    if all(char in BYTE_OF_CHAR for char in token):
        return bytes(BYTE_OF_CHAR[char] for char in token)
    return token.encode()


# ----------------------------------------------------- training ------------------------------------------------------

MOST_WORDS = 1_000_000  # keeps a file of any size within memory: beyond it, the rarer half is forgotten
LONGEST_WORD = 1000  # bytes; a longer run without a border is no word, and its beginning teaches enough


def train_tokenizer(texts, vocab_size: int, progress: bool = False) -> "Tokenizer":
    """Learn a tokenizer of `vocab_size` tokens, special ones included, from an iterable of texts.

    The texts are read once; only how often each word occurs is kept. The tokenizer gets smaller than asked for if no
    pair is left that occurs twice. Raises UserError below 259 tokens (3 special ones and 256 bytes) and without text.
    """
    tokens = [*SPECIAL_TOKENS, *CHAR_OF_BYTE.values()]
    if vocab_size < len(tokens):
        raise UserError(f"vocab_size {vocab_size} is too small: {len(tokens)} hold the bytes and special tokens alone")
    find_words = word_finder(QWEN2_SPLIT)
    word_counts = Counter()
    for text in tqdm(texts, "reading", unit=" texts", disable=None if progress else True):
        word_counts.update(find_words(text))
        if len(word_counts) > MOST_WORDS:
            word_counts = Counter(dict(word_counts.most_common(MOST_WORDS // 2)))
    if not word_counts:
        raise UserError("there is no text to train a tokenizer on")
    merges = learn_merges(word_counts, tokens, vocab_size, progress)
    return Tokenizer(make_document(tokens, merges))


def learn_merges(word_counts: dict, tokens: list, vocab_size: int, progress: bool = False) -> list:
    """Byte-pair encoding: append to `tokens` until there are `vocab_size`; returns the merges (left, right) in order.

    Of several pairs that are equally frequent, the one with the smallest ids is merged. Counting all pairs anew after
    every merge would do the same; here only the words that hold the pair are looked at, and the counts kept up to date.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    words = [[ids[CHAR_OF_BYTE[byte]] for byte in utf8(word)[:LONGEST_WORD]] for word in word_counts]
    counts = list(word_counts.values())
    pair_counts = Counter()
    words_with = defaultdict(list)  # pair -> numbers of the words that had it when it was counted
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            words_with[pair].append(i)

    # An entry of the heap whose count has fallen meanwhile is too high. So it comes up too early, never too late, and
    # is put back with its true count. Counts that rise are those of pairs with the new token; they are entered anew.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges = []
    bar = tqdm(None, "merging", vocab_size, initial=len(tokens), unit=" tokens", disable=None if progress else True)
    while heap and len(tokens) < vocab_size:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair] > 1:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if -count < 2:
            break
        left, right = pair
        token = tokens[left] + tokens[right]
        merges.append((tokens[left], tokens[right]))
        if token not in ids:  # a + bc can spell the same as ab + c
            ids[token] = len(tokens)
            tokens.append(token)
            bar.update()
        new = ids[token]
        risen = set()
        for i in words_with.pop(pair):
            word, at = words[i], 0
            while at < len(word) - 1:
                if word[at] == left and word[at + 1] == right:
                    word[at : at + 2] = [new]
                    changes = []  # what the neighbours' pairs were, and what they are now
                    if at > 0:
                        changes.append(((word[at - 1], left), (word[at - 1], new)))
                    if at + 1 < len(word):
                        changes.append(((right, word[at + 1]), (new, word[at + 1])))
                    for gone, born in changes:
                        pair_counts[gone] -= counts[i]
                        pair_counts[born] += counts[i]
                        words_with[born].append(i)
                        risen.add(born)
                at += 1
        del pair_counts[pair]
        for pair in risen:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    bar.close()
    return merges


def make_document(tokens: list, merges: list) -> dict:
    """The content of a tokenizer.json from which the `tokenizers` package does the same as we do."""
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


# -------------------------------------------------- the tokenizer ---------------------------------------------------

CACHED_WORDS = 1 << 17  # words whose ids are remembered; then all are forgotten, so memory stays bounded


class Tokenizer:
    """Made from the content of a tokenizer.json; what raises ValueError here is a UserError in `load`."""

    def __init__(self, document: dict):
        self.document = document
        self.normal_form, split = check_document(document)
        self.find_words = word_finder(split)
        model = document["model"]
        self.ids = model["vocab"]
        self.byte_ids = [self.ids[CHAR_OF_BYTE[byte]] for byte in range(256)]
        self.ignore_merges = model.get("ignore_merges", False)  # Llama 3: a word that is a token is taken whole
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        self.rank_of = {(self.ids[left], self.ids[right]): rank for rank, (left, right) in enumerate(merges)}
        self.merged = [self.ids[left + right] for left, right in merges]

        self.bytes_of = {i: token_bytes(token) for token, i in self.ids.items()}
        self.added, verbatim, normalized, special = {}, [], [], set()
        for token in document["added_tokens"]:
            text = token["content"]
            self.bytes_of.setdefault(token["id"], text.encode())
            if token.get("normalized"):
                text = self._normalize(text)
                normalized.append(text)
            else:
                verbatim.append(text)
            if token["special"] or text in SPECIAL_TOKENS:
                special.add(text)
            self.added[text] = token["id"]
        # Looked for in this order: in the text as it came, then in the normalized text.
        self.find_added = any_of(verbatim), any_of(normalized)
        self.find_added_text = any_of({*verbatim} - special), any_of({*normalized} - special)
        self.vocab_size = max(self.bytes_of) + 1
        self.cache = {}

    def __reduce__(self):
        return Tokenizer, (self.document,)  # pickled for a worker process as what it was made from

    # text -> ids

    def encode(self, text: str, allow_special: bool = False) -> list:
        """The ids of a text, nothing added around it. <|im_end|> and the like are text too, unless `allow_special`."""
        verbatim, normalized = self.find_added if allow_special else self.find_added_text
        ids = []
        for i, part in enumerate(verbatim.split(text)):  # plain text and tokens in turns
            if i % 2:
                ids.append(self.added[part])
                continue
            for j, part in enumerate(normalized.split(self._normalize(part))):
                if j % 2:
                    ids.append(self.added[part])
                    continue
                for word in self.find_words(part):
                    ids += self.cache.get(word) or self._encode_word(word)
        return ids

    def _normalize(self, text: str) -> str:
        # By Python's Unicode. That of tokenizers is older: it leaves some 100 combining marks of rare scripts unsorted.
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def _encode_word(self, word: str) -> list:
        encoded = utf8(word)
        whole = self.ids.get("".join(CHAR_OF_BYTE[byte] for byte in encoded)) if self.ignore_merges else None
        ids = self.merge([self.byte_ids[byte] for byte in encoded]) if whole is None else [whole]
        if len(self.cache) >= CACHED_WORDS:
            self.cache.clear()
        if len(word) <= 64:
            self.cache[word] = ids
        return ids

    def merge(self, symbols: list) -> list:
        """Merge the pair that was learned first (where there are several, the leftmost), until none is left.

        Plainly: `while pairs: replace min(pairs, key=rank)`. Here the pairs wait in a heap of (rank, position), because
        the plain way is quadratic in the length of the word.
        """
        end = len(symbols)
        symbols = [*symbols, None]  # no pair has None in it, so nothing merges with the end
        after, before = [*range(1, end + 1), end], [*range(-1, end)]
        rank_of, merged = self.rank_of.get, self.merged
        heap = [(rank, i) for i, pair in enumerate(zip(symbols, symbols[1:])) if (rank := rank_of(pair)) is not None]
        heapq.heapify(heap)
        while heap:
            rank, left = heapq.heappop(heap)
            right = after[left]
            if rank_of((symbols[left], symbols[right])) != rank:
                continue  # another merge has taken one of the two
            symbols[left], symbols[right] = merged[rank], None
            after[left] = after[right]
            before[after[right]] = left
            for i in (before[left], left):
                rank = rank_of((symbols[i], symbols[after[i]]))
                if rank is not None:
                    heapq.heappush(heap, (rank, i))
        return [symbol for symbol in symbols if symbol is not None]

    # ids -> text

    def decode_bytes(self, ids) -> bytes:
        """The bytes of the tokens, special ones included. An id without a token (a padded vocabulary) has none."""
        return b"".join([self.bytes_of.get(int(i), b"") for i in ids])

    def decode(self, ids) -> str:
        """The text of the tokens, special ones included; what is not UTF-8 shows as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    # conversations

    def render(self, messages: list, add_generation_prompt: bool = False) -> tuple:
        r"""A conversation as (tokens, loss_mask): each turn is <|im_start|>role\ncontent<|im_end|>\n.

        The mask is True on an assistant's content and on the <|im_end|> that closes it; it is made here, turn by turn,
        never found in the ids afterwards. The header is encoded apart from the content, so the prompt for a reply is a
        prefix of the conversation with that reply. (For that, content that starts with white space gets other ids than
        transformers gives, which encodes "\n" and the white space together; they decode to the same text.)
        Raises UserError for an unknown role and for content that is not text.
        """
        if not isinstance(messages, (list, tuple)):
            raise UserError(f"a conversation must be a list of messages, not {type(messages).__name__}")
        tokens, loss_mask = [], []

        def add(ids, trained=False):
            tokens.extend(ids)
            loss_mask.extend([trained] * len(ids))

        for number, message in enumerate(messages, 1):
            role, content = check_message(message, number)
            add([self.start_id, *self.encode(role + "\n")])
            add([*self.encode(content), self.end_id], trained=role == "assistant")
            add(self.encode("\n"))
        if add_generation_prompt:
            add([self.start_id, *self.encode("assistant\n")])
        return tokens, loss_mask

    def _special_id(self, token):
        if token not in self.added:
            raise UserError(f"the tokenizer has no token {token}: take one that has it, or add it to tokenizer.json")
        return self.added[token]

    endoftext_id = property(lambda self: self._special_id(ENDOFTEXT), doc="<|endoftext|>, around each document")
    pad_id = property(lambda self: self._special_id(ENDOFTEXT), doc="<|endoftext|> pads: never the end of a turn")
    start_id = property(lambda self: self._special_id(IM_START), doc="<|im_start|>, the start of a turn")
    end_id = property(lambda self: self._special_id(IM_END), doc="<|im_end|>, the end of a turn")

    # files

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read a tokenizer.json, given as a file or by its folder. Raises UserError, also for what is not supported."""
        path = os.fspath(path)
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        try:
            with open(path, encoding="utf-8") as file:
                return cls(json.load(file))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except KeyError as error:
            raise UserError(f"{path}: not a usable tokenizer.json ({error} is missing)") from None
        except (TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a usable tokenizer.json (a part is of the wrong kind: {error})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a usable tokenizer.json ({error})") from None

    def save(self, path, max_length: int = 32768):
        """Write a tokenizer.json; into a folder also the tokenizer_config.json that transformers reads."""
        path = os.fspath(path)
        if not os.path.isdir(path):
            return save_json(path, self.document)
        save_json(os.path.join(path, "tokenizer.json"), self.document)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": IM_END,
            "pad_token": ENDOFTEXT,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        save_json(os.path.join(path, "tokenizer_config.json"), config)


def check_message(message, number: int) -> tuple:
    """(role, content) of the message with this number (from 1). Raises UserError."""
    if not isinstance(message, dict):
        raise UserError(f"message {number} must have a role and content, but is a {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"message {number} has content that is not text, but {type(content).__name__}")
    return role, content


def check_document(document: dict) -> tuple:
    """(normal form or None, split) of a tokenizer.json. Raises ValueError for all that would give other ids here."""
    model = document["model"]
    if model.get("type", "BPE") != "BPE" or any(
        model.get(key) for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise ValueError("only BPE over bytes is supported, without dropout, prefix or suffix")
    ids = dict(model["vocab"])
    if not all(type(i) is int and i >= 0 for i in ids.values()):
        raise ValueError("an id must be a whole number")
    for token in document["added_tokens"]:
        text = token["content"]
        if not text or token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise ValueError(f"the added token {text!r} is empty or has lstrip, rstrip or single_word")
        if token["id"] != ids.setdefault(text, len(ids)):  # the tokenizers package would number it differently
            raise ValueError(f"the added token {text!r} has the id {token['id']}, but the id {ids[text]} is its place")
    normalizer = document.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"the normalizer {normalizer} is not supported")

    *splits, last = document["pre_tokenizer"].get("pretokenizers", [document["pre_tokenizer"]])
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True) or any(s["type"] != "Split" for s in splits):
        raise ValueError("the pre_tokenizer must be a Split and then ByteLevel without add_prefix_space")
    # Both of these say that each match is a word. The splits that we know leave nothing between the matches.
    if any((s["behavior"], s["invert"]) not in (("Isolated", False), ("Removed", True)) for s in splits):
        raise ValueError("the Split must isolate its matches")
    regexes = [s["pattern"]["Regex"] for s in splits] + [GPT2_SPLIT] * last.get("use_regex", True)
    if len(regexes) != 1 or regexes[0] not in (QWEN2_SPLIT, LLAMA3_SPLIT, GPT2_SPLIT):
        raise ValueError(f"the split {' and '.join(regexes)} is not supported")
    return normalizer and normalizer["type"], regexes[0]


def any_of(tokens) -> re.Pattern:
    """A regex whose `split` gives plain text and tokens in turns; where two tokens match, the longer one counts."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


# ------------------------------------------- python -m minillm.tokenizer --------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def main():
    parser = _Parser("python -m minillm.tokenizer", description="Train a byte-level BPE tokenizer.", allow_abbrev=False)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .txt files")
    parser.add_argument("--vocab_size", type=int, required=True, metavar="N", help="tokens, special ones included")
    parser.add_argument("--out", default="tokenizer.json", metavar="FILE", help="written here (default %(default)s)")
    try:
        args = parser.parse_args()
        folder = os.path.dirname(args.out) or "."
        if not os.path.isdir(folder):
            raise UserError(f"--out {args.out}: there is no folder {folder}")
        tokenizer = train_tokenizer(read_texts(args.data), args.vocab_size, progress=True)
        tokenizer.save(args.out)
        print(f"{args.out}: {tokenizer.vocab_size} tokens")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
