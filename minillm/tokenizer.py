"""Byte-level BPE from scratch (training, encoding, decoding), and conversations as tokens with a loss mask.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) starts from single symbols and repeatedly merges the most
frequent pair of neighbours into a new symbol. The list of merges, in the order they were learned, is the tokenizer: to
encode a word, apply the same merges, earliest first. The initial symbols are the 256 bytes (Radford et al. 2019,
GPT-2), so every text has an encoding. A regular expression first splits the text into words; merges never cross them.

    text --regex--> words --UTF-8--> bytes --merges--> ids            ids --join the tokens' bytes--> text

The file format is Hugging Face's tokenizer.json, and the ids equal those of the `tokenizers` package for every string.

    python -m minillm.tokenizer --data FILE... --vocab_size 6400 --out tokenizer.json
"""

import codecs
import functools
import heapq
import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from tqdm import tqdm

from minillm import chat
from minillm.chat import ENDOFTEXT, IM_END, IM_START
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.records import read_texts
from minillm.runtime import say
from minillm.safetensors import check_depth, check_file_out, open_file, save_json, short
from minillm.tokenizer_config import check_added, read_folder
from minillm.unicode_ranges import QWEN2_SPLIT, nfc, splits_of, word_cutter, word_finder

SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END)  # ids 0, 1, 2 of a tokenizer that is trained here

# ------------------------------------------------------ bytes --------------------------------------------------------

# In the file a token is text, so GPT-2 gave each byte a visible character: the space, for one, is "Ġ".
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
CHAR_OF_BYTE = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
# That is a character encoding like Latin-1, so Python's codecs can convert whole words at once.
_CHARS = "".join(CHAR_OF_BYTE[byte] for byte in range(256))
_BYTES = codecs.charmap_build(_CHARS)
# Bytes that a vocabulary may lack: control characters, what UTF-8 never has, planes of Unicode without characters.
RARE_BYTES = {*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)} - {*b"\t\n\r"}

_SURROGATE = re.compile("[\ud800-\udfff]")


def utf8(word: str) -> bytes:
    """The bytes of a word. Half of a surrogate pair, which JSON can smuggle into a str, counts as U+FFFD."""
    return _SURROGATE.sub("\ufffd", word).encode()


def token_bytes(token: str) -> bytes:
    """The bytes that a token of the file stands for. Only an added token has other characters; it means itself."""
    try:
        return codecs.charmap_encode(token, "strict", _BYTES)[0]
    except UnicodeEncodeError:
        return token.encode()


# ----------------------------------------------------- training ------------------------------------------------------

MOST_WORDS = 1_000_000  # beyond that, the rarer half is forgotten, so a file of any size fits into memory
LONGEST_WORD = 1000  # bytes; of a longer one only the beginning is used


def train_tokenizer(texts, vocab_size: int, progress: bool = False) -> "Tokenizer":
    """Learn a tokenizer of `vocab_size` tokens, special ones included, from an iterable of texts.

    The texts are read once; only the number of times each word occurs is kept. The result is smaller than asked for if
    no pair is left that occurs twice. Raises UserError below 259 tokens (3 special, 256 bytes) and without text.
    """
    tokens = [*SPECIAL_TOKENS, *CHAR_OF_BYTE.values()]
    if vocab_size < len(tokens):
        raise UserError(f"vocab_size {vocab_size} is too small: the bytes and special tokens alone need {len(tokens)}")
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

    Of several equally frequent pairs, the one with the smallest ids is merged. Recounting all pairs after every merge
    would give the same; here only the words that contain the pair are visited, and the counts are kept up to date.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    words = [[ids[CHAR_OF_BYTE[byte]] for byte in utf8(word)[:LONGEST_WORD]] for word in word_counts]
    counts = list(word_counts.values())
    pair_counts = Counter()
    words_with = defaultdict(list)  # pair -> indices of the words that had it when it was counted
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            words_with[pair].append(i)

    # A heap entry is stale if its count has fallen since. It then comes up too early, never too late, and is put back
    # with its true count. Only pairs with the new token rise in count, and those get a new entry.
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
    """The content of a tokenizer.json with which the `tokenizers` package gives the same ids."""
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
            **dict.fromkeys(("unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


# -------------------------------------------------- the tokenizer ---------------------------------------------------

MAX_FILE = 1 << 26  # bytes of a tokenizer.json; Qwen3's has 11 million
CACHE_SIZE = 1 << 16  # entries of a cache; a full one is emptied, so memory stays bounded
LONG = 100  # bytes of a word from which on `merge_long` is faster than `merge`
NEVER = 1 << 60  # the rank of a pair that does not merge


class Tokenizer:
    """Made from the content of a tokenizer.json; what raises ValueError here is a UserError in `load`.

    named: what the other files of a model's folder say about it, as tokenizer_config.read_folder returns it.
    """

    def __init__(self, document: dict, named: dict = None):
        self.document, self.named = document, named or {}
        self.normalize, splits = check_document(document)
        self.find_words = word_finder(*splits)
        model = document["model"]
        self.ids = model["vocab"]
        self.byte_ids = [self.ids.get(CHAR_OF_BYTE[byte]) for byte in range(256)]
        # SmolLM2 has no token for some of the rare bytes. Like the tokenizers package, we drop them.
        self.missing_bytes = bytes(byte for byte in range(256) if self.byte_ids[byte] is None)
        self.ignore_merges = model.get("ignore_merges", False)  # Llama 3: a word that is a token needs no merges
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        try:
            self.rank_of = {(self.ids[left], self.ids[right]): rank for rank, (left, right) in enumerate(merges)}
            self.merged = [self.ids[left + right] for left, right in merges]
        except (KeyError, ValueError):
            culprit = next(pair for pair in merges if len(pair) != 2 or not {*pair, "".join(pair)} <= self.ids.keys())
            raise ValueError(f"the merge {short(culprit)} is not two tokens that make a third one") from None

        self.bytes_of = {i: token_bytes(token) for token, i in self.ids.items()}
        self.cut_word = word_cutter(self.bytes_of.values())
        self.added, verbatim, normalized, special = {}, [], [], set()
        for token in document["added_tokens"]:
            text = token["content"]
            self.bytes_of.setdefault(token["id"], token_bytes(text))
            if token.get("normalized"):
                text = self.normalize(text)
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
        self.chat_template = self.named.get("template", "")
        self.chat_format, self.knows_template = chat.choose_format(self.added, self.chat_template)
        self._words, self._pieces = {}, {}  # caches: ids of words and of pieces of words

    def __reduce__(self):
        return Tokenizer, (self.document, self.named)  # pickled for a worker process as what it was made from

    # text -> ids

    def encode(self, text: str, allow_special: bool = False) -> list:
        """The ids of a text, nothing added around it. <|im_end|> and the like are text too, unless `allow_special`."""
        find_verbatim, find_normalized = self.find_added if allow_special else self.find_added_text
        ids = []
        for i, part in enumerate(find_verbatim(_SURROGATE.sub("\ufffd", text))):  # plain text and tokens in turns
            if i % 2:
                ids.append(self.added[part])
                continue
            for j, part in enumerate(find_normalized(self.normalize(part))):
                if j % 2:
                    ids.append(self.added[part])
                    continue
                for word in self.find_words(part):
                    ids += self._words.get(word) or self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list:
        token = codecs.charmap_decode(word.encode(), "strict", _CHARS)[0] if self.ignore_merges else None
        if token in self.ids:
            return remember(self._words, word, [self.ids[token]])
        # Where a byte is dropped, its neighbours meet. Such a word is rare, and stays whole.
        dropped = self.missing_bytes and self._bytes(word) != word.encode()
        ids, pieces = [], [word] if dropped else self.cut_word(word)
        for piece in pieces:
            ids += self._pieces.get(piece) or self._encode_piece(piece)
        return remember(self._words, word, ids) if len(pieces) < 3 else ids  # the pieces are in a cache already

    def _encode_piece(self, piece: str) -> list:
        return remember(self._pieces, piece, self.merge([self.byte_ids[byte] for byte in self._bytes(piece)]))

    def _bytes(self, text: str) -> bytes:
        return text.encode().translate(None, self.missing_bytes)

    def merge(self, symbols: list) -> list:
        """Merge the pair that was learned first (the leftmost of several), until no pair is left that merges."""
        if len(symbols) > LONG:
            return self.merge_long(symbols)
        rank_of = self.rank_of.get
        ranks = [rank_of(pair, NEVER) for pair in zip(symbols, symbols[1:])]
        while ranks and (rank := min(ranks)) < NEVER:
            i = ranks.index(rank)
            symbols[i : i + 2] = [self.merged[rank]]
            del ranks[i]
            if i > 0:
                ranks[i - 1] = rank_of((symbols[i - 1], symbols[i]), NEVER)
            if i < len(ranks):
                ranks[i] = rank_of((symbols[i], symbols[i + 1]), NEVER)
        return symbols

    def merge_long(self, symbols: list) -> list:
        """The result of `merge`, which takes quadratic time; here the pairs wait in a heap of (rank, position)."""
        end = len(symbols)
        symbols = [*symbols, None]  # no pair contains None, so nothing merges with the end
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

    def render(self, messages: list, add_generation_prompt: bool = False, thinking: bool = True) -> tuple:
        """A conversation as (tokens, loss_mask), in the tokenizer's chat format (see chat.py).

        The mask is True on what an assistant writes and on the token that ends its turn; it is built here, turn by
        turn, never found in the ids afterwards. A message's text is encoded without special tokens. The header of an
        assistant's turn is encoded apart from its content, so the prompt for a reply is a prefix of the conversation
        with that reply. (So a reply that starts with white space may get other ids than in transformers, which encodes
        it together with the header's line end; they decode to the same text.) thinking: see chat.render.
        Raises UserError for an unknown role and for content that is not text.
        """
        if not isinstance(messages, (list, tuple)):
            raise UserError(f"a conversation must be a list of messages, not {type(messages).__name__}")
        tokens, loss_mask = [], []
        for piece in chat.render(self.chat_format, messages, add_generation_prompt, thinking):
            ids = [self._id(piece.text)] if piece.special else self.encode(piece.text)
            tokens += ids
            loss_mask += [piece.trained] * len(ids)
        return tokens, loss_mask

    def _special_id(self, kind: str, *texts: str) -> int:
        """The first of these special tokens that exists, else the one that the folder names; never part of a turn."""
        turn = {self.added.get(self.chat_format.start), self.added.get(self.chat_format.end)}
        ids = [self.added.get(name, name) for name in (*texts, *self.named.get(kind, ()))]
        ids = [i for i in ids if i in self.bytes_of and i not in turn]
        if not ids and kind != "eos":
            return self.endoftext_id
        return ids[0] if ids else self._id(ENDOFTEXT)

    def _id(self, token: str) -> int:
        if token not in self.added:
            raise UserError(f"the tokenizer has no token {token}: chats are written as ChatML or as Llama 3 does; "
                            "take a model of these kinds, or add the token to tokenizer.json (it gets an embedding)")
        return self.added[token]

    bos_id = property(lambda self: self._special_id("bos", chat.LLAMA3.first, ENDOFTEXT), doc="begins a document")
    endoftext_id = property(lambda self: self._special_id("eos", ENDOFTEXT, "<|end_of_text|>"), doc="ends a document")
    pad_id = property(lambda self: self._special_id("pad", ENDOFTEXT), doc="pads: never the end of a turn")
    start_id = property(lambda self: self._id(self.chat_format.start), doc="<|im_start|>, the start of a turn")
    end_id = property(lambda self: self._id(self.chat_format.end), doc="<|im_end|>, the end of a turn")

    @property
    def end_ids(self) -> list:
        """All tokens that end a reply: the end of a turn, the end of a document, and what the folder names."""
        named = [self.added.get(name, name) for name in self.named.get("eos", ())]
        ends = [self.end_id, self.endoftext_id, *(i for i in named if i in self.bytes_of)]
        return list(dict.fromkeys(ends))

    # files

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read a tokenizer.json, given as a file or by its folder. Raises UserError, also for what is not supported."""
        path = os.fspath(path)
        named = read_folder(path)
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        try:
            with open_file(path) as file:
                text = file.read(MAX_FILE + 1)
            if len(text) > MAX_FILE:
                raise ValueError(f"it has more than {MAX_FILE:,} bytes")
            document = json.loads(text.decode("utf-8"))
            check_depth(document)
            # Newer files have each merge as a list. A string is smaller, and nothing for the garbage collector.
            if "merges" in (model := document["model"]):
                model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            tokenizer = cls(document, named)
            if not tokenizer.knows_template and tokenizer.chat_format.start in tokenizer.added:
                say_once(f"{path}: minillm does not know the chat template beside it, and does not run it; "
                         f"conversations are written as {tokenizer.chat_format.name} (minillm/chat.py)")
            if lacking := check_added(document, named, os.path.dirname(path)):
                say_once(f"{path}: it lacks tokens that tokenizer_config.json names, so they are plain text here: "
                         f"{', '.join(map(short, lacking[:5]))}")
            return tokenizer
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except KeyError as error:
            raise UserError(f"{path}: not a usable tokenizer.json ({error} is missing); copy or download it "
                            "again") from None
        except (TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a usable tokenizer.json (a part is of the wrong kind: {error}); copy or "
                            "download it again") from None
        except (ValueError, RecursionError, LookupError, OverflowError) as error:
            raise UserError(f"{path}: not a usable tokenizer.json ({error})") from None

    def save(self, path, max_length: int = 32768):
        """Write a tokenizer.json; into a folder also the tokenizer_config.json that transformers reads."""
        path = os.fspath(path)
        if not os.path.isdir(path):
            return save_json(path, self.document)
        for name, document in self.documents(max_length).items():
            save_json(os.path.join(path, name), document)

    def documents(self, max_length: int = 32768) -> dict:
        """{name: content} of the JSON files of a folder: tokenizer.json, and what transformers reads beside it."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.chat_format.end,
            "pad_token": self.decode([self.pad_id]),
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template or chat.template_of(self.chat_format),
        }
        if self.chat_format.first:
            config["bos_token"] = self.chat_format.first
        return {"tokenizer.json": self.document, "tokenizer_config.json": config}


def remember(cache: dict, text: str, ids: list) -> list:
    """Put ids into a cache that stays small; returns them."""
    if len(cache) >= CACHE_SIZE:
        cache.clear()
    if len(text) <= 64:
        cache[text] = ids
    return ids


say_once = functools.cache(say)


def check_document(document: dict) -> tuple:
    """(how a text is normalized, splits) of a tokenizer.json. Raises ValueError for what would give other ids here."""
    model = document["model"]
    if model.get("type", "BPE") != "BPE" or any(
        model.get(key) for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise ValueError("only BPE over bytes is supported, as of Qwen, Llama 3 and SmolLM2, without dropout, prefix "
                         "or suffix; SentencePiece, as of Llama 2 and Gemma, is not")
    ids = dict(model["vocab"])
    if not all(type(i) is int and i >= 0 for i in ids.values()) or len({*ids.values()}) < len(ids):
        raise ValueError("an id must be a whole number, and no two tokens may share one")
    if max(ids.values(), default=0) > 2 * len(ids) + 1000:  # a model of that size would be made
        raise ValueError(f"the id {short(max(ids.values()))} is far beyond the number of tokens, {len(ids):,}")
    missing = {byte for byte, char in CHAR_OF_BYTE.items() if char not in ids}
    if missing - RARE_BYTES or missing and model.get("unk_token"):
        raise ValueError(f"the vocabulary lacks the bytes {', '.join(map(hex, sorted(missing)))}")
    for token in document["added_tokens"]:
        text = token["content"]
        if not text or token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise ValueError(f"the added token {text!r} is empty or has lstrip, rstrip or single_word")
        if token["id"] != ids.setdefault(text, len(ids)):  # the tokenizers package would number it differently
            raise ValueError(f"the added token {text!r} has the id {token['id']}, but the id {ids[text]} is its place")
    normalizer = document.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        raise ValueError(f"the normalizer {normalizer} is not supported")
    return nfc if normalizer == {"type": "NFC"} else str, splits_of(document["pre_tokenizer"])


def any_of(tokens):
    """A function that splits a text into plain text and tokens in turns; where two tokens match, the longer counts."""
    if not tokens:
        return lambda text: [text]
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")").split


# ------------------------------------------- python -m minillm.tokenizer --------------------------------------------


@dataclass
class Config:
    """The flags of the command."""

    data: list[str] = flag([], "data files: .jsonl, .jsonl.gz or .txt")
    vocab_size: int = flag(6400, "number of tokens, special ones included")
    out: str = flag("tokenizer.json", "where to write the tokenizer")


def main(cfg: Config):
    if not cfg.data:
        raise UserError("--data: give at least one file")
    folder = os.path.dirname(cfg.out) or "."
    if not os.path.isdir(folder):
        raise UserError(f"--out {cfg.out}: there is no folder {folder}")
    check_file_out("--out", cfg.out, cfg.data)
    tokenizer = train_tokenizer(read_texts(cfg.data), cfg.vocab_size, progress=True)
    tokenizer.save(cfg.out)
    fewer = f"; no pair of tokens is left for the other {cfg.vocab_size - tokenizer.vocab_size:,} of --vocab_size"
    print(f"{cfg.out}: {tokenizer.vocab_size} tokens" + (fewer if tokenizer.vocab_size < cfg.vocab_size else ""))


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
