"""Is the answer right? Reading the final answer of a reply, and scoring the reply by rules.

A verifiable reward is only as good as its parser: reinforcement learning finds whatever the parser pays for by mistake
(reward hacking; arXiv 1606.06565, section 4). So a reply has to commit to one answer, at its end. Several candidates,
the same answer again and again, a denial, tags or an empty reply are no answer. Manners are the absence of rudeness and
of length, so there is nothing to pile up. There is one rule for each kind of answer:

    number            the last number, if it is the only one, or comes after "=", ":" or the numbers of the question.
                      "The answer is 82", "#### 82" and "\\boxed{82}" mark a final answer; any steps may come before it
    list of numbers   the last numbers, as many as the answer has; before them at most the list of the question, or
                      what stands before the one "answer is", "####" or box
    sequence          letters or words of the question in another order: the only run of them, at the end of a sentence
    word              with "choices": the only candidate named, and named once. Without them, the end of a sentence,
                      after a word such as "is", "the" or "in", so that a row of candidates is not read, and neither
                      is one of fragments ("in London. in Paris.")

LaTeX (latex.py) is read by the same rules. A number may have a unit beside it, and "5万" is 50000.
"""

import functools
import re
from fractions import Fraction

from minillm.errors import UserError
from minillm.latex import CJK, STYLED, boxes, is_part, is_plain, spelled_out, without_markup

# Full-width forms to ASCII, one by one, because NFKC would also turn "10²" into "102". The full-width comma and full
# stop never stand inside a number, so a blank follows them.
_ASCII = {0xFF01 + i: 0x21 + i for i in range(94)} | {0xFF0C: ", ", 0x3002: ". ", 0x3000: " ", 0x2212: "-", 0x2013: "-",
                                                      0x2010: "-", 0x2011: "-", 0x207B: "-", 0xFE63: "-",
                                                      0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}
_UNIT = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
_CJK_CHARACTER = re.compile(f"[{CJK}]")
_ASKED = re.compile(rf"[{CJK}]|[^\W{CJK}]+")  # a CJK character, or a word of a script that puts blanks between words
_TAG = re.compile(r"</?[A-Za-z_|][\w|:-]*(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>")  # not "a < b, so b > a"
_THINK = re.compile(r"\A\s*<think>.*?</think>", re.S)
_DENIED_BEFORE = re.compile(r"(?:(?:\b(?:not|never|no|neither|nor|cannot)\b|n't\b)(?:\s+\w+){0,3}|"
                            r"(?:不|并非|没有)(?:是|等于|会是|可能是)?)(?:[\s$]|\\[(\[])*(?:\\boxed\s*\{)?\Z", re.I)
_DENIED_AFTER = re.compile(r"(?:[\s.,!?}$]|\\[)\]])*(?:(?:is|was)\s+)?(?:wrong|not\b|isn't|no\b(?!\s+\w)|不对|不是|是?错)",
                           re.I)

# Whole words and phrases, and only those that friendly talk does not need: "the moon does not go away" is no insult.
RUDE = re.compile(
    r"\b(?:stupid|dumb|dummy|dummies|idiots?|idiotic|morons?|moronic|fools?|loser|losers|blockhead|dimwit|halfwit|"
    r"pathetic|worthless|lazybones|shut up|buzz off|leave me alone|who cares|i don't care|"
    r"(?:don't|stop) bother(?:ing)? me|was(?:te|ting) (?:of )?my time|are you blind|ugh|duh|damn|damned|crap|"
    r"(?:what the|go to) hell|hate you|(?:sick|tired) of (?:you|this)|silly question|"
    r"you(?:'re| are)? (?:so )?(?:silly|useless|lazy|clown|ugly))\b"
    r"|(?:\A|[.!?,;]\s*)(?:just |now )?(?:go away|get lost|get out|shut it)\b"
    r"|笨|蠢|傻|白痴|废物|闭嘴|滚开|滚蛋|快滚|讨厌你|烦人|烦死|真烦|别烦|少烦|没脑子|脑残|猪头|懒得理|懒得说|关我什么事|谁在乎",
    re.I)
BRIEF_EXTRA = 8  # units that a brief reply may have besides its answer
BRIEF_TALK = 20  # units that a brief reply may have if no single answer is asked for


def _normalise(text):
    """ASCII punctuation, no **bold** around words and numbers, "= - 5" as "= -5", and LaTeX spelled out."""
    text = re.sub(r"(?<!\d)\*\*|\*\*(?!\d)", "", spelled_out(text.translate(_ASCII)))
    return _SPACED_MINUS.sub(r"\1-", text)


def _denied(reply, start, end):
    """True if "not" or the like stands just before or just after reply[start:end]."""
    return _DENIED_BEFORE.search(reply[:start]) is not None or _DENIED_AFTER.match(reply[end:]) is not None


# --------------------------------------------------------------------------------------------- numbers

# A minus is a sign only if nothing stands directly before it: "37-45" has two positive numbers.
_SCALES = {"万": 10**4, "亿": 10**8, "千": 1000, "百": 100, "dozen": 12, "hundred": 100, "thousand": 1000,
           "million": 10**6, "billion": 10**9}
_SCALE = r"\s?(?:万|亿|千(?![克米瓦卡赫])|百(?!分))|\s(?:dozen|hundred|thousand|million|billion)\b"
_NUMBER = (r"(?P<sign>(?<![\w.)])[-+](?=[$€£¥]?[\d.])|(?<!\d)(?<!\d )(?:\b(?:minus|negative) |(?:负|零下)\s?))?[$€£¥]?"
           r"(?P<size>\d+/0*[1-9]\d*|\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
           rf"(?:(?P<scale>{_SCALE})|(?!{_SCALE}))")
_SPACED_MINUS = re.compile(r"((?:[=:({≈$]|\b(?:is|are|was)|[是为])[ \t]*)-[ \t]+(?=[$€£¥\\]*[\d.])", re.I)
_ONE_NUMBER = re.compile(_NUMBER, re.A | re.I)
_MARKED_NUMBER = re.compile(r"(?P<mark>\\boxed\s*\{|####|\b(?:final )?answer(?:\s+is\b|\s*:)+|答案(?:是|为|:)+)"
                            rf"[\s(\[\"\\]*\$?{_NUMBER}(?!\s*[-+*/×÷=]\s*[($\d]|[\d,.]*\d)", re.A | re.I)
_WORKED = re.compile(rf"(?:(?:the )?(?:final )?answer(?:\s+is\b|\s*:)+|答案(?:是|为|:)+|[^=<>!]*=)\s*\$?"
                     rf"(?P<result>{_NUMBER})\s*\}}?\$?\s*\.?", re.A | re.I | re.S)
_CHAIN = re.compile(r"(?=.*(?:[=≈]|等于|equals))(?:[\s=≈()\[\]{}$\\]|等于|\bequals\b)+", re.I | re.S)  # said to be equal
_MARK = re.compile(r"####|\b(?:final )?answer(?:\s+is\b|\s*:)+|答案(?:是|为|:)+", re.I)
# A gold answer with its unit. A time or a date is more than the number in it.
_WITH_UNIT = re.compile(rf"{_NUMBER}\s*(?!(?:[ap]m|bc|ad)\b)(?:[A-Za-z]+|(?:(?![年月日号点])[{CJK}]){{1,3}})?\.?",
                        re.A | re.I)
_BEFORE_RESULT = re.compile(r"(?:[=:≈]|\bequals|等于)[\s(\[\\]*\Z", re.I)


def _value(match):
    """"082.50", "82.5" and "165/2" -> "165/2": one spelling for each value, a whole number or a reduced fraction."""
    size = match["size"].replace(",", "")
    if len(size) > 1000:  # Python refuses to convert very long digit strings
        return size
    scale = _SCALES[match["scale"].strip().lower()] if match["scale"] else 1
    return str((int if size.isdecimal() else Fraction)(size) * (scale if match["sign"] in (None, "+") else -scale))


def _unscaled(text, question):
    """Without "dozen", "万" and the like where the question has them: they are the unit that it asks for."""
    for word in _SCALES:
        if word in question.lower():
            text = re.sub(rf"(?<=\d)(\s?){word}(?![a-z])", r"\1", text, flags=re.I)
    return text


def _values(text):
    return [_value(match) for match in _ONE_NUMBER.finditer(text)]


def _contradict(reply, first, second):
    """True for "= 86 = 87", but not for "= 0.15 = 15%", "= 3.333 ≈ 3.33" and "= 56 = 50 + 6"."""
    between, rest = reply[first.end():second.start()], reply[second.end():]
    if not _CHAIN.fullmatch(between) or re.match(r"\s*[-+*/×÷^]\s*[\d(]", rest):
        return False
    if max(len(first["size"]), len(second["size"])) > 1000:  # see _value
        return first["size"] != second["size"]
    a, b = Fraction(_value(first)), Fraction(_value(second))
    rounded = abs(a - b) * 2 * 10 ** len(second["size"].partition(".")[2]) <= 1
    return a != b and not rounded and not (rest.startswith("%") and a * 100 == b)


def _read_number(reply, question):
    """The marked number, or else the last one."""
    matches, marked, values = list(_ONE_NUMBER.finditer(reply)), list(_MARKED_NUMBER.finditer(reply)), _values(reply)
    if not matches:
        return None
    last = matches[-1]
    if marked:  # each mark once, all with the same number, and no number after them
        marks = [match["mark"].lower() for match in marked]
        clear = len(set(marks)) == len(marks) and len(set(map(_value, marked))) == 1 and marked[-1].end() == last.end()
        last = marked[-1]
    elif len(values) == 1 or values[:-1] == _values(question):
        clear = True
    else:  # "31 + 56 = 80 + 7 = 87" and "31 + 56 = 87, so it is 87", but no "= 87 = 87", no two results of 31 + 56
        starts = [match.start() for match in matches]
        results = [i for i, start in enumerate(starts) if _BEFORE_RESULT.search(reply, max(0, start - 20), start)]
        sides = [sorted(values[max(0, i - 2):i]) for i in results]  # what each result was calculated from
        result, between = len(values) - 1, "and"
        torn = any(_contradict(reply, *matches[i:i + 2]) for i in results if i + 1 < len(values))
        if values[-1] == values[-2] and len(values) - 2 in results:  # not the operand of "10 - 5 = 5"
            result, between = len(values) - 2, reply[matches[-2].end():last.start()]
        clear = results and not torn and sides[-1] not in sides[:-1] and results[-1] == result and not is_empty(between)
    return values[-1] if clear and not _denied(reply, *last.span()) and not is_part(reply, matches[-1]) else None


def _read_numbers(reply, question, length):
    """The last `length` numbers, of a marked answer if there is one. In a list a comma always separates."""
    reply = reply.replace(",", ", ")
    in_boxes, marks = boxes(reply), [match.end() for match in _MARK.finditer(reply)]
    start, end = in_boxes[0] if len(in_boxes) == 1 else (marks[0] if len(marks) == 1 else 0, len(reply))
    matches = list(_ONE_NUMBER.finditer(reply, start, end))
    values = list(map(_value, matches))
    if len(values) < length or values[:-length] not in ([], _values(question.replace(",", ", "))):
        return None
    wrong = is_part(reply, matches[-1]) or _denied(reply, matches[-length].start(), matches[-1].end())
    return None if wrong else ", ".join(values[-length:])


# --------------------------------------------------------------------------------------------- sequences and words

_COURTESY = "(?:sure|certainly|of course|yes|okay|ok|dear reader|好的|当然|没问题|亲爱的读者)[,.!:]"
_START = (rf"(?:\A\s*(?:{_COURTESY}\s*)?|\b(?:is|are|was|were|be)\s+|'s\s+|(?<!不)[是为]\s*|[:=]\s*|####\s*|"
          r"\\boxed\{)[\"(]*\Z")
_BEFORE_SEQUENCE = re.compile(_START, re.I)
_BEFORE_WORD = re.compile(rf"{_START}|(?:\b(?:called|named|in|on|at|by|of|to|about|the|an?|your|my|our)\s+|[叫在有]\s*)"
                          r"[\"(]*\Z", re.I)
_END = r"(?=的?[\"')\]}]*\s*(?:[.!?;\n]|\Z))"
_FRAGMENT = re.compile(r"\s*(?:(?P<how>it'?s|called|named|in|on|at|by|of|to|about|the|an?|your|my|our)\s+|"
                       r"(?P<sign>[叫在有:=])\s*)\S+(?: \S+)?\s*", re.I)
_STATED = re.compile(rf"(?:\b(?:is|are|was|were)\s+(?:the |an? )?|是)(\w+?){_END}", re.I)


def _letter(character):
    """True for a letter or digit of a script that puts blanks between words."""
    return (character.isalnum() or character == "_") and not _CJK_CHARACTER.match(character)


def _whole(text, start, end):
    """True if text[start:end] is not a part of a longer word."""
    before, after = text[max(0, start - 2):start], text[end:end + 1]
    inside = before and (_letter(before[-1]) or before[-1] == "'" and len(before) == 2 and _letter(before[0]))
    return not (_letter(text[start]) and inside) and not (_letter(text[end - 1]) and after and _letter(after))


def _named(words, text, flags=re.I):
    """[(start, end), ...] of these words in the text. Of two the longer counts: "hot dog" does not name "hot"."""
    words = [word for word in words if word.split()]  # nothing stands everywhere
    if not words:
        return []
    patterns = [re.compile(r"\s+".join(map(re.escape, word.split())), flags)
                for word in sorted(words, key=len, reverse=True)]
    anywhere, spans, at = re.compile("|".join(pattern.pattern for pattern in patterns), flags), [], 0
    while found := anywhere.search(text, at):
        matches = [pattern.match(text, found.start()) for pattern in patterns]
        whole = [match for match in matches if match and _whole(text, *match.span())]
        spans += [match.span() for match in whole[:1]]
        at = whole[0].end() if whole else found.start() + 1
    return spans


def _runs(items, text):
    """[(start, end), ...] of each row of at least two of the items with nothing but blanks and commas between them."""
    runs = []
    for start, end in _named(items, text):
        if runs and re.fullmatch(r"[\s,、]+", text[runs[-1][1]:start]):
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return [(start, end) for start, end in runs if len(_items(text[start:end])) > 1]


def _items(text):
    return re.split(r"[\s,、]+", text.strip().lower())


def _read_sequence(reply, question, items):
    """The only run of the items. The run of the question may come before it."""
    runs, asked = _runs(items, reply), _runs(items, question)
    if len(runs) == 2 and asked and _items(reply[slice(*runs[0])]) == _items(question[slice(*asked[0])]):
        runs = runs[1:]
    if len(runs) != 1 or len(_items(reply[slice(*runs[0])])) != len(items) or _denied(reply, *runs[0]):
        return None
    start, end = runs[0]
    complete = _BEFORE_SEQUENCE.search(reply[:start]) and re.match(_END, reply[end:])  # not one item more
    return " ".join(_items(reply[start:end])) if complete else None


def _read_word(reply, answer, choices):
    """The only candidate that is named. Without choices the rivals are unknown, so its place has to be right."""
    words = [answer, *choices]
    named = _named(words, reply, 0 if min(map(len, words)) == 1 or "\\" in "".join(words) else re.I)  # "A" is not "a"
    if len(named) != 1 or _denied(reply, *named[0]):
        return None
    start, end = named[0]
    if not choices:
        rivals = [m for m in _STATED.finditer(reply) if not start <= m.start(1) < end]  # "It is red. It is yellow."
        pieces = list(re.finditer(r"[^.!?;\n]+", reply))
        here = next((piece for piece in pieces if piece.start() < end <= piece.end()), None)  # None: "It is Yahoo!"
        if here and (row := _FRAGMENT.fullmatch(here[0].lower())):  # "in London. in Paris."
            others = [_FRAGMENT.fullmatch(piece[0].lower()) for piece in pieces if piece is not here]
            rivals += [other for other in others if other and other.group("how", "sign") == row.group("how", "sign")]
        if rivals or not _BEFORE_WORD.search(reply[:start]) or not re.match(_END, reply[end:]):
            return None
    return next(word for word in words if word.lower().split() == reply[start:end].lower().split())


# --------------------------------------------------------------------------------------------- the answer

def question_of(messages):
    """The last user message; "" if there is none."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def _final(answer):
    """The line after "####" in a worked solution in the style of GSM8K; otherwise the answer itself."""
    _, mark, final = str(answer).rpartition("####")
    return final.strip().partition("\n")[0].strip() if mark else final.strip()


@functools.lru_cache(typed=True)  # all answers of a group share them
def _expected(answer, question):
    """(kind, the answer in the spelling that the readers return)."""
    answer = _unscaled(_normalise(_final(answer)), question)
    latex, in_boxes = "\\" in answer, boxes(answer)
    answer = re.sub(r"\\[()\[\]]", "", answer[slice(*in_boxes[-1])] if in_boxes else answer)
    answer = re.sub(r"\A\s*\$+([^$]*)\$+\s*\Z", r"\1", answer).strip()
    if latex and len(_values(answer)) == 1 and is_plain(answer) and (found := _ONE_NUMBER.match(answer)):
        return "number", _value(found)  # "5\text{ cm}"
    answer = STYLED.sub(r"\1", answer).strip()
    if found := _WORKED.fullmatch(answer):  # "The answer is 12.", "3*4 = 12"
        answer = found["result"]
    if number := _ONE_NUMBER.fullmatch(answer.rstrip("%$€£¥元. ")) or is_plain(answer) and _WITH_UNIT.fullmatch(answer):
        return "number", _value(number)
    if re.fullmatch(r"[-+\d.,、;\s]+", answer, re.A) and len(_values(answer.replace(",", ", "))) > 1:
        return "numbers", ", ".join(_values(answer.replace(",", ", ")))
    asked = set(_ASKED.findall(_normalise(question).lower()))
    if len(_items(answer)) > 1 and set(_items(answer)) <= asked:
        return "sequence", " ".join(_items(answer))
    return "word", answer


def extract_answer(reply, example, question=None):
    """The answer that a reply commits to, in one spelling (numbers as reduced fractions); None if it commits to none.

    `example["answer"]` says what to look for; of a worked solution it is what follows "####". `example["choices"]`,
    optional, holds the other words that the answer could have been (blank ones do not count). The question is the last
    user message of the example unless given. One leading `<think>...</think>` is skipped.
    """
    question = question_of(example.get("conversations", [])) if question is None else question
    kind, answer = _expected(example["answer"], question)
    reply = _unscaled(_normalise(_THINK.sub("", reply)), question)
    question = _unscaled(_normalise(question), question)
    if is_empty(reply) or is_empty(answer) or _TAG.search(reply):
        return None
    if kind == "number":
        return _read_number(reply, question)
    if kind == "numbers":
        return _read_numbers(reply, question, len(answer.split(", ")))
    choices = [STYLED.sub(r"\1", _normalise(choice)).strip() for choice in example.get("choices", [])]
    choices = [choice for choice in choices if choice]
    reply = without_markup(reply, [answer, *choices])
    return _read_sequence(reply, question, answer.split()) if kind == "sequence" else _read_word(reply, answer, choices)


def is_correct(reply, example, question=None):
    """True if the reply commits to the answer of the example, which must have one."""
    question = question_of(example.get("conversations", [])) if question is None else question
    return extract_answer(reply, example, question) == _expected(example["answer"], question)[1]


def is_verifiable(answer):
    """True if a reply can be right: at least the answer itself is."""
    return is_correct(_expected(answer, "")[1], {"answer": answer}, "")


def check_answer(answer, where):
    """Raise UserError, beginning with `where`, if no reply can be right."""
    if not is_verifiable(answer):
        raise UserError(f'{where}: "answer" is {answer!r:.80}, which no reply can match; give a number, a list of '
                        "numbers or words, or leave the key out where no single answer is right")


# --------------------------------------------------------------------------------------------- scores

def is_empty(text):
    """True if the text has neither a letter nor a digit."""
    return not any(character.isalnum() for character in text)


def is_rude(text):
    """True if the text has a rude word or phrase. `RUDE` is only a list: it misses what it lacks."""
    return RUDE.search(_normalise(text)) is not None


def count_units(text):
    """The length of a text in any language: CJK characters plus words.

    A word counts once per 12 characters or part of them (a missing blank hides nothing), punctuation once per full 12.
    """
    units = _UNIT.findall(text)
    return sum((len(unit) + (0 if is_empty(unit) else 11)) // 12 for unit in units)


def gold_components(reply, example, question=None):
    """{"correct", "polite", "brief"}, each 0.0 or 1.0; no "correct" if the example has no answer.

    polite: no rude word (`RUDE`). brief: at most BRIEF_EXTRA units more than the answer has, or BRIEF_TALK units if
    there is no answer (`count_units`). All are 0 for an empty reply.
    """
    has_answer, said = example.get("answer") is not None, not is_empty(reply)
    limit = BRIEF_EXTRA + count_units(_final(example["answer"])) if has_answer else BRIEF_TALK
    components = {"correct": float(is_correct(reply, example, question))} if has_answer else {}
    components["polite"] = float(said and not is_rude(reply))
    components["brief"] = float(said and count_units(reply) <= limit)
    return components


def gold_reward(reply, example, question=None):
    """The mean of `gold_components`: correctness, politeness and brevity in equal parts, in [0, 1].

    A plain wrong answer has 2/3, and no reply that is not correct can have more.
    """
    components = gold_components(reply, example, question)
    return sum(components.values()) / len(components)
