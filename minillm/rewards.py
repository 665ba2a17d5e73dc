"""Answers that can be checked, and the rule-based scores made of them.

A verifiable reward is only as good as its parser: whatever the parser pays for, reinforcement learning will find
(arXiv 1606.06565, section 4, calls it reward hacking). Hence three rules here. A reply has to commit to one answer:
several numbers, a list of all candidate words, the same answer again and again, or tags around it are no answer. An
empty reply earns nothing. And manners are the absence of rudeness and of length, so that nothing can be piled up.

A reward function takes `(messages, answers, example)`: the prompt's messages, the replies sampled for it, and the line
of the data file that they came from; it returns one float for each reply.
"""

import re
from math import ceil

# --------------------------------------------------------------------------------------------- reading a reply

# Full-width forms to ASCII, one by one: NFKC would also turn "10²" into "102". The full-width comma only ever separates
# (never groups thousands), so it gets a blank after it.
_ASCII = {0xFF01 + i: 0x21 + i for i in range(94)} | {0xFF0C: ", ", 0x3000: " ", 0x2212: "-", 0x2013: "-", 0x2019: "'"}

# A minus is a sign only where no number or word stands directly before it: "37-45" has two positive numbers.
_NUMBER = re.compile(r"(?<![\w.,-])(?P<sign>[-+]?)(?P<grouped>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<rest>\.\d+)?", re.A)
_PLAIN_NUMBER = re.compile(r"(?P<sign>(?<![\d.)-])-)?(?P<whole>\d+)(?P<rest>\.\d+)?", re.A)
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:['’-][^\W{_CJK}]+)*")
_UNIT = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_TAG = re.compile(r"</?[A-Za-z_|][^<>]*>")
_THINK = re.compile(r"\A\s*<think>.*?</think>", re.S)
_NEGATION = re.compile(r"(?:\b(?:not|never|no|neither|nor|isn't|aren't|cannot|can't|don't)\b|n't\b|不是|并非|没有|不等于|不)"
                       r"(?:\s+\w+){0,2}\s*\Z", re.I)

# Whole words, and of those only the ones that friendly talk does not need: "the moon does not go away" is no insult.
RUDE = re.compile(
    r"\b(?:stupid|dumb|dummy|dummies|idiots?|idiotic|morons?|moronic|fools?|loser|losers|blockhead|dimwit|halfwit|"
    r"pathetic|worthless|lazybones|shut up|buzz off|leave me alone|who cares|i don't care|(?:don't|stop) bother(?:ing)? me|"
    r"was(?:te|ting) (?:of )?my time|are you blind|ugh|duh|damn|damned|crap|(?:what the|go to) hell|hate you|"
    r"(?:sick|tired) of (?:you|this)|you(?:'re| are)? (?:so )?(?:silly|useless|lazy|clown|ugly)|silly question)\b"
    r"|(?:\A|[.!?,;]\s*)(?:just |now )?(?:go away|get lost|get out|shut it)\b"
    r"|笨|蠢|傻|白痴|废物|闭嘴|滚开|滚蛋|快滚|讨厌你|烦人|烦死|真烦|别烦|少烦|没脑子|脑残|猪头|懒得理|懒得说|关我什么事|谁在乎",
    re.I)

# Words that carry an answer without being one. Only the check for lists of candidates reads them.
_CARRIER = set("""a an the is are was were be am it its it's that that's this these those they he she you your we i my me
    of to in on at by for from with as and or so then than sure certainly yes no please well here happy help answer
    result called named call name would will can do does did has have had say says one always""".split())
_CARRIER |= set("的了是在有我你他她它们这那个吧呢啊吗也就都很好请答案结果为叫做作说")
_JOINT = re.compile(r"[\s,、;/|&+]*(?:\b(?:or|and)\b|或者|或|和|跟|与|以及|还是)?[\s,、;/|&+]*\Z", re.I)

BRIEF_EXTRA = 8     # units that a brief reply may have besides its answer
BRIEF_TALK = 20     # units that a brief reply may have where no single answer is asked for
FORMAT_CREDIT = 0.1


def count_units(text):
    """The length of a text in any language: CJK characters plus words, a word counting once per begun 12 characters
    (so that a missing blank hides nothing)."""
    return sum(1 if re.match(rf"[{_CJK}]", unit) else ceil(len(unit) / 12) for unit in _UNIT.findall(text))


def is_rude(text):
    """True where the text has a rude word or phrase. A list of words, nothing cleverer: it misses what it lacks."""
    return RUDE.search(_normalise(text)) is not None


def is_empty(text):
    """True where a reply holds neither a letter nor a digit."""
    return not any(character.isalnum() for character in text)


def _normalise(text):
    return text.translate(_ASCII)


def _value(match):
    """'+082.50' -> '82.5': one spelling for each value."""
    whole = match.group("grouped") if "grouped" in match.re.groupindex else match.group("whole")
    whole = whole.replace(",", "").lstrip("0") or "0"
    rest = (match.group("rest") or "").rstrip("0").rstrip(".")
    sign = "-" if match.group("sign") == "-" and (whole != "0" or rest) else ""
    return sign + whole + rest


def numbers_in(text, grouped=True):
    """The numbers of a text, in order, as strings of one spelling: full-width digits, "82.0" and "1,234" (where
    `grouped`) are understood. Number words ("eight", 八) are not numbers."""
    pattern = _NUMBER if grouped else _PLAIN_NUMBER
    return [_value(match) for match in pattern.finditer(_normalise(text))]


def _kind(answer):
    text = _normalise(answer).strip()
    if _NUMBER.fullmatch(text):
        return "number"
    if len(_WORD.findall(text)) > 1 and re.search(r"[\s,、;]", text):
        return "numbers" if re.fullmatch(r"[-+\d.,、;\s]+", text, re.A) else "sequence"
    return "word"


def _question(messages):
    """What the user said last."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def _negated(text, start):
    return _NEGATION.search(text[:start]) is not None


def _read_number(reply, question):
    """One number is the answer; beside it only the numbers of the question may stand, as in "37 + 45 = 82"."""
    matches = list(_NUMBER.finditer(reply))
    values = [_value(match) for match in matches]
    asked = numbers_in(question)
    if len(values) == 1:
        place = 0
    elif asked and len(values) == len(asked) + 1 and sorted(values[:-1]) == sorted(asked):
        place = len(values) - 1
    elif asked and len(values) == len(asked) + 1 and sorted(values[1:]) == sorted(asked):
        place = 0
    elif asked and len(values) == len(asked) + 2 and values[-1] == values[-2] and sorted(values[:-2]) == sorted(asked):
        place = len(values) - 1
    elif len(values) == 2 and sorted(values) == sorted(asked) and values[0] != values[1] and re.search(
            r"\bthan\b|比", reply[matches[0].end():matches[1].start()]):  # "52 is larger than 37"
        place = 0
    else:
        return None
    return None if _negated(reply, matches[place].start()) else values[place]


def _read_numbers(reply, question, length):
    """A list of numbers, which the question's list may precede."""
    matches = list(_PLAIN_NUMBER.finditer(reply))
    values = [_value(match) for match in matches]
    asked = numbers_in(question, grouped=False)
    if len(values) == len(asked) + length and values[:len(asked)] == asked:
        values, matches = values[len(asked):], matches[len(asked):]
    if len(values) != length or _negated(reply, matches[0].start()):
        return None
    return values


def _read_sequence(reply, question, items):
    """A list of letters or words: the only run of at least two of the answer's items, though the question's own run
    may precede it. (A single item is no run: "a" is also an article.)"""
    known = set(items)

    def runs(text):
        found, last_end = [], None
        for match in _WORD.finditer(text):
            word = match.group().lower()
            if word not in known:
                last_end = None
            elif last_end is not None and re.fullmatch(r"[\s,、;]*", text[last_end:match.start()]):
                found[-1][1].append(word)
                last_end = match.end()
            else:
                found.append((match.start(), [word]))
                last_end = match.end()
        return [(start, run) for start, run in found if len(run) > 1]

    found, asked = runs(reply), [run for _, run in runs(_normalise(question))]
    if len(found) == 2 and [found[0][1]] == asked:
        found = found[1:]
    if len(found) != 1 or _negated(reply, found[0][0]):
        return None
    return found[0][1]


def _places(word, text):
    """Where a word stands in a text: whole words only, except in scripts that write no blanks."""
    pattern = re.escape(word.lower())
    if not re.match(rf"[{_CJK}]", word):
        pattern = rf"(?<![^\W{_CJK}]){pattern}"
    if not re.match(rf"[{_CJK}]", word[-1:]):
        pattern = rf"{pattern}(?![^\W{_CJK}])"
    return [match.start() for match in re.finditer(pattern, text.lower())]


def _read_word(reply, question, answer, choices):
    """The one candidate that is named, and named once. With `choices` any other candidate spoils it; without them a
    row of unknown words around the answer does ("red, blue or yellow")."""
    named = {}
    for word in dict.fromkeys([answer, *choices]):
        places = _places(word, reply)
        if places:
            named[word] = places
    # 黄 within 黄色, "hot" within "hot dog": a candidate inside a longer named one is not named itself
    for word in list(named):
        if any(word != other and word.lower() in other.lower() for other in named):
            del named[word]
    asked = _normalise(question)
    if len(named) != 1:
        return None
    word, places = next(iter(named.items()))
    if len(places) > 1 + len(_places(word, asked)) or _negated(reply, places[0]):
        return None
    if word == answer and not choices and _in_a_list(reply, asked, answer, places[-1]):
        return None
    return word


def _in_a_list(reply, question, answer, start):
    """True where words that neither the question has nor a sentence needs are strung together with the answer."""
    known = {w.lower() for w in _WORD.findall(question)} | _CARRIER

    def strangers(text, step):
        count, edge, joined = 0, None, False
        words = list(_WORD.finditer(text))
        for match in (reversed(words) if step < 0 else words):
            gap = text[match.end():edge] if step < 0 else text[edge or 0:match.start()]
            if match.group().lower() in ("or", "and", "或", "和", "与"):
                continue
            if match.group().lower() in known or re.search(r"[.!?。:：]", gap):
                break
            if edge is None or step > 0 or _JOINT.fullmatch(gap):
                count += 1
                joined = joined or re.search(r"[,、;/|]|\b(?:or|and)\b|或|和|与", gap) is not None
            edge = match.start() if step < 0 else match.end()
        return count, joined

    before, joined_before = strangers(reply[:start], -1)
    after, joined_after = strangers(reply[start + len(answer):], 1)
    return before + after > 1 or joined_before or joined_after


def extract_answer(reply, example, question=None):
    """The answer that a reply commits to, spelled like `example["answer"]`; None where it names none, several, the
    same one repeatedly, or wraps it in tags.

    `example["answer"]` says what to look for: a number ("82"), a list of numbers ("3, 12, 45"), a list of letters or
    words ("n u s"), or a word ("yellow"). `example["choices"]`, optional, holds the other words that it could have
    been. The question, for its restatement ("37 + 45 = 82"), is the last user message of the example unless given. One
    leading `<think>...</think>` is skipped: that is how some models reply.
    """
    answer = example["answer"]
    if question is None:
        question = _question(example.get("conversations", []))
    reply = _normalise(_THINK.sub("", reply))
    if is_empty(reply) or _TAG.search(reply):
        return None
    kind = _kind(answer)
    if kind == "number":
        return _read_number(reply, question)
    if kind == "numbers":
        found = _read_numbers(reply, question, len(numbers_in(answer, grouped=False)))
        return None if found is None else ", ".join(found)
    if kind == "sequence":
        found = _read_sequence(reply, question, [w.lower() for w in _WORD.findall(_normalise(answer))])
        return None if found is None else " ".join(found)
    return _read_word(reply, question, _normalise(answer).strip(), [_normalise(c) for c in example.get("choices", [])])


def is_correct(reply, example, question=None):
    """True where the reply commits to exactly the answer of the example, which must have one."""
    found = extract_answer(reply, example, question)
    if found is None:
        return False
    answer = _normalise(example["answer"]).strip()
    kind = _kind(answer)
    if kind == "number":
        return found == numbers_in(answer)[0]
    if kind == "numbers":
        return found == ", ".join(numbers_in(answer, grouped=False))
    if kind == "sequence":
        return found == " ".join(w.lower() for w in _WORD.findall(answer))
    return found == answer


# --------------------------------------------------------------------------------------------- rewards

def gold_components(reply, example, question=None):
    """{"correct", "polite", "brief"}, each 0.0 or 1.0; without "correct" where the example has no answer.

    polite: no rude word (`RUDE`), and nothing more. brief: at most BRIEF_EXTRA units besides those of the answer, or
    BRIEF_TALK units where there is no answer (`count_units`). All are 0 for an empty reply.
    """
    has_answer = example.get("answer") is not None
    limit = BRIEF_EXTRA + count_units(example["answer"]) if has_answer else BRIEF_TALK
    said = not is_empty(reply)
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


def gold(messages, answers, example):
    """`gold_reward` of each sampled reply, as a reward function."""
    return [gold_reward(answer, example, _question(messages)) for answer in answers]


def answer_reward(messages, answers, example):
    """1 for the right answer; FORMAT_CREDIT for a reply that commits to one wrong answer of the right kind; else 0.

    The credit cannot be farmed: it is paid for one answer, once, and whatever hedges (see the top) is paid nothing.
    """
    question = _question(messages)
    rewards = []
    for answer in answers:
        if is_correct(answer, example, question):
            rewards.append(1.0)
        else:
            rewards.append(FORMAT_CREDIT if extract_answer(answer, example, question) is not None else 0.0)
    return rewards


# --------------------------------------------------------------------------------------------- the judge's question

def judge_prompt(question, a, b, lang="en"):
    """The user message that asks which of two answers is better; the reply to it is "A" or "B". One wording for the
    embedded judging conversations and for the AI judge."""
    if lang == "zh":
        return f"问题：{question}\n回答A：{a}\n回答B：{b}\n哪个回答更好，A还是B？"
    return f"Question: {question}\nAnswer A: {a}\nAnswer B: {b}\nWhich answer is better, A or B?"
