"""Answers that can be checked, and the rule-based scores made of them.

A verifiable reward is only as good as its parser: whatever the parser pays for, reinforcement learning will find
(arXiv 1606.06565, section 4, calls it reward hacking). Hence three rules here. A reply has to commit to one answer:
several numbers, a list of all candidate words, the same answer again and again, or tags around it are no answer. An
empty reply earns nothing. And manners are the absence of rudeness and of length, so that nothing can be piled up.

A reward function takes `(messages, answers, example)`: the prompt's messages, the replies sampled for it, and the line
of the data file that they came from; it returns one float for each reply.
"""

import importlib.util
import math
import os
import re
import traceback

import torch

from minillm.checkpoint import check_tokenizer, load_model
from minillm.errors import UserError
from minillm.generate import generate
from minillm.heads import load_reward_model
from minillm.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------- reading a reply

# Full-width forms to ASCII, one by one: NFKC would also turn "10²" into "102". The full-width comma only ever separates
# (never groups thousands), so it gets a blank after it.
_ASCII = {0xFF01 + i: 0x21 + i for i in range(94)} | {0xFF0C: ", ", 0x3000: " ", 0x2212: "-", 0x2013: "-", 0x2019: "'"}

# A minus is a sign only where nothing stands directly before it: "37-45" has two positive numbers.
_SIGN = r"(?P<sign>(?<![\w.)])[-+]|(?<!\d)(?<!\d )(?:\b(?:minus|negative) |负))?"
_REST = r"(?P<rest>\.\d+)?"
_NUMBER = re.compile(_SIGN + r"(?P<whole>\d{1,3}(?:,\d{3})+(?![\d,])|\d+)" + _REST, re.A | re.I)
_LISTED_NUMBER = re.compile(_SIGN + r"(?P<whole>\d+)" + _REST, re.A | re.I)  # in a list a comma separates
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:['-][^\W{_CJK}]+)*")
_UNIT = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_TAG = re.compile(r"</?[A-Za-z_|][^<>]*>")
_THINK = re.compile(r"\A\s*<think>.*?</think>", re.S)
_DENIED_BEFORE = re.compile(r"(?:(?:\b(?:not|never|no|neither|nor|cannot)\b|n't\b)(?:\s+\w+){0,3}\s*|"
                            r"(?:不|并非|没有|不是|不等于|不会是|不可能是)\s*)\Z", re.I)
_DENIED_AFTER = re.compile(r"\s*(?:(?:is|was)\s+)?(?:wrong|not\b|isn't|不对|不是|是错)", re.I)

# Whole words, and of those only the ones that friendly talk does not need: "the moon does not go away" is no insult.
RUDE = re.compile(
    r"\b(?:stupid|dumb|dummy|dummies|idiots?|idiotic|morons?|moronic|fools?|loser|losers|blockhead|dimwit|halfwit|"
    r"pathetic|worthless|lazybones|shut up|buzz off|leave me alone|who cares|i don't care|(?:don't|stop) bother(?:ing)? me|"
    r"was(?:te|ting) (?:of )?my time|are you blind|ugh|duh|damn|damned|crap|(?:what the|go to) hell|hate you|"
    r"(?:sick|tired) of (?:you|this)|you(?:'re| are)? (?:so )?(?:silly|useless|lazy|clown|ugly)|silly question)\b"
    r"|(?:\A|[.!?,;]\s*)(?:just |now )?(?:go away|get lost|get out|shut it)\b"
    r"|笨|蠢|傻|白痴|废物|闭嘴|滚开|滚蛋|快滚|讨厌你|烦人|烦死|真烦|别烦|少烦|没脑子|脑残|猪头|懒得理|懒得说|关我什么事|谁在乎",
    re.I)

# Words that carry an answer without being one: `_in_a_list` reads no candidate in them.
_CARRIER = set("""a an the is are was were be it its it's that that's this these those they he she you your we i my me of to
    in on at by for from with as so then than sure certainly yes please well here happy help answer result called call name
    will would can do does has have say says""".split()) | set("的了是在有我你他她它们这那个吧呢啊吗也就都很好请答案结果为叫做作说")
_JOINT = re.compile(r"[,、;/|&+]|\b(?:or|and)\b|或|和|与", re.I)

BRIEF_EXTRA = 8     # units that a brief reply may have besides its answer
BRIEF_TALK = 20     # units that a brief reply may have where no single answer is asked for
FORMAT_CREDIT = 0.1


def count_units(text):
    """The length of a text in any language: CJK characters plus words. A word counts once per begun 12 characters (a
    missing blank hides nothing), punctuation on its own once per full 12."""
    units = _UNIT.findall(text)
    return sum(1 if re.match(f"[{_CJK}]", u) else (len(u) + 11 * any(c.isalnum() for c in u)) // 12 for u in units)


def is_rude(text):
    """True where the text has a rude word or phrase. A list of words, nothing cleverer: it misses what it lacks."""
    return RUDE.search(_normalise(text)) is not None


def is_empty(text):
    """True where a reply holds neither a letter nor a digit."""
    return not any(character.isalnum() for character in text)


def _normalise(text):
    return text.translate(_ASCII)


def _value(match):
    """"082.50" -> "82.5": one spelling for each value."""
    whole = match["whole"].replace(",", "").lstrip("0") or "0"
    value = whole + (match["rest"] or "").rstrip("0").rstrip(".")
    return "-" + value if match["sign"] not in (None, "+") and value != "0" else value


def _numbers(text, listed=False):
    return [_value(match) for match in (_LISTED_NUMBER if listed else _NUMBER).finditer(_normalise(text))]


def _words(text):
    return [word.lower() for word in _WORD.findall(_normalise(text))]


def _expected(answer, question):
    """(kind, answer in the one spelling that the readers below use). The kind is "number", "numbers", "sequence" (its
    items stand in the question, in another order) or "word"."""
    answer = _normalise(str(answer)).strip()
    if _NUMBER.fullmatch(answer):
        return "number", _numbers(answer)[0]
    if re.fullmatch(r"[-+\d.,、;\s]+", answer, re.A) and len(_numbers(answer, listed=True)) > 1:
        return "numbers", ", ".join(_numbers(answer, listed=True))
    words = _words(answer)
    if len(words) > 1 and set(words) <= set(_words(question)):
        return "sequence", " ".join(words)
    return "word", answer


def _question(messages):
    """What the user said last."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def _denied(reply, start, end):
    """True where "not" or the like stands just before, or just after, a place in the reply."""
    return _DENIED_BEFORE.search(reply[:start]) is not None or _DENIED_AFTER.match(reply[end:]) is not None


def _read_number(reply, question):
    """One number is the answer; beside it only the numbers of the question may stand, as in "37 + 45 = 82"."""
    matches = list(_NUMBER.finditer(reply))
    values, asked = [_value(match) for match in matches], sorted(_numbers(question))
    if len(values) == 1:
        place = 0
    elif asked and sorted(values[:-1]) == asked:  # "37 + 45 = 82"
        place = -1
    elif asked and sorted(values[:-2]) == asked and values[-2] == values[-1]:  # "37 + 45 = 82, so it is 82"
        place = -1
    elif asked and sorted(values[1:]) == asked:  # "82 is 37 + 45"
        place = 0
    elif len(values) == 2 and sorted(values) == asked and re.search(r"\bthan\b|比", reply[matches[0].end():matches[1].start()]):
        place = 0  # "52 is larger than 37"
    else:
        return None
    return None if _denied(reply, *matches[place].span()) else values[place]


def _read_numbers(reply, question, length):
    """A list of so many numbers, which the question's list may precede."""
    matches = list(_LISTED_NUMBER.finditer(reply))
    values, asked = [_value(match) for match in matches], _numbers(question, listed=True)
    if len(values) == len(asked) + length and values[:len(asked)] == asked:
        values, matches = values[len(asked):], matches[len(asked):]
    if len(values) != length or _denied(reply, matches[0].start(), matches[-1].end()):
        return None
    return ", ".join(values)


def _runs(text, known):
    """[words, start, end] of each stretch of at least two known words with nothing but blanks and commas between. (A
    single one is no stretch: "a" is also an article.)"""
    runs, open_ = [], False
    for match in _WORD.finditer(text):
        word = match.group().lower()
        if open_ and word in known and re.fullmatch(r"[\s,、;]*", text[runs[-1][2]:match.start()]):
            runs[-1] = [runs[-1][0] + [word], runs[-1][1], match.end()]
        elif word in known:
            runs.append([[word], match.start(), match.end()])
        open_ = word in known
    return [run for run in runs if len(run[0]) > 1]


def _read_sequence(reply, question, answer):
    """The only stretch of the answer's letters or words, as many as it has, which the question's own may precede."""
    items = _words(answer)
    runs, asked = _runs(reply, set(items)), _runs(question, set(items))
    if len(runs) == 2 and len(asked) == 1 and runs[0][0] == asked[0][0]:
        runs = runs[1:]
    if len(runs) != 1 or len(runs[0][0]) != len(items):
        return None
    found, start, end = runs[0]
    one_more = re.search(r"(?<!\w)\w[\s,、]+\Z", reply[:start]) or re.match(r"[\s,、]+\w(?!\w)", reply[end:])
    return None if one_more or _denied(reply, start, end) else " ".join(found)


def _places(word, text):
    """Where a word stands in a text: whole words only, except in scripts that write no blanks; in any case of letters,
    except for a single one ("A" is no article)."""
    before = "" if re.match(f"[{_CJK}]", word[0]) else rf"(?<![^\W{_CJK}])"
    after = "" if re.match(f"[{_CJK}]", word[-1]) else rf"(?![^\W{_CJK}])"
    return [match.start() for match in re.finditer(before + re.escape(word) + after, text, re.I if len(word) > 1 else 0)]


def _read_word(reply, question, answer, choices):
    """The one candidate that is named, and named once. With `choices` any other candidate spoils it; without them a row
    of unknown words around the answer does ("red, blue or yellow")."""
    named = {word: _places(word, reply) for word in dict.fromkeys([answer, *choices])}
    named = {word: places for word, places in named.items() if places}
    for word in list(named):  # "hot" is not named by "hot dog"
        if any(word != other and word.lower() in other.lower() for other in named):
            del named[word]
    if len(named) != 1:
        return None
    word, places = next(iter(named.items()))
    start, end = places[-1], places[-1] + len(word)
    if len(places) > 1 + len(_places(word, question)) or _denied(reply, start, end):
        return None
    return None if not choices and _in_a_list(reply, question, start, end) else word


def _in_a_list(reply, question, start, end):
    """True where words that neither the question has nor a sentence needs are strung together with the answer."""
    asked = set(_words(question))

    def stranger(match):
        word = match.group().lower()
        if re.match(f"[{_CJK}]", word):  # no blanks tell where a word ends: the question has it together with a neighbour
            pairs = (reply[match.start() - 1:match.end()], reply[match.start():match.end() + 1])
            return word not in _CARRIER and not any(len(pair) == 2 and pair in question for pair in pairs)
        return word not in _CARRIER and word not in asked

    left, right = start, end
    for match in reversed(list(_WORD.finditer(reply, 0, start))):
        if not stranger(match) or re.search(r"[.!?。:]", reply[match.end():left]):
            break
        left = match.start()
    for match in _WORD.finditer(reply, end):
        if not stranger(match) or re.search(r"[.!?。:]", reply[right:match.start()]):
            break
        right = match.end()
    others = [w for w in _words(reply[left:start]) + _words(reply[end:right]) if not _JOINT.fullmatch(w)]
    size = sum(1 / 3 if re.match(f"[{_CJK}]", w) else 1 for w in others)
    return size > 1 or bool(others and _JOINT.search(reply[left:right]))


def extract_answer(reply, example, question=None):
    """The answer that a reply commits to; None where it names none, several, the same one repeatedly, or wraps it in tags.

    `example["answer"]` says what to look for: a number ("82"), a list of numbers ("3, 12, 45"), a list of letters or
    words of the question ("n u s"), or a word ("yellow"). `example["choices"]`, optional, holds the other words that the
    answer could have been; without it a word's rivals are only guessed. The question, for its restatement
    ("37 + 45 = 82"), is the last user message of the example unless given. One leading `<think>...</think>` is skipped:
    that is how some models reply.
    """
    if question is None:
        question = _question(example.get("conversations", []))
    question, reply = _normalise(question), _normalise(_THINK.sub("", reply))
    if is_empty(reply) or _TAG.search(reply):
        return None
    kind, answer = _expected(example["answer"], question)
    if kind == "number":
        return _read_number(reply, question)
    if kind == "numbers":
        return _read_numbers(reply, question, len(answer.split(", ")))
    if kind == "sequence":
        return _read_sequence(reply, question, answer)
    return _read_word(reply, question, answer, [_normalise(choice) for choice in example.get("choices", [])])


def is_correct(reply, example, question=None):
    """True where the reply commits to exactly the answer of the example, which must have one."""
    if question is None:
        question = _question(example.get("conversations", []))
    return extract_answer(reply, example, question) == _expected(example["answer"], question)[1]


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
    if example.get("answer") is None:
        raise UserError(f'a prompt without "answer" cannot be checked: {_question(messages)[:60]!r} (use another reward, or drop it)')
    question, rewards = _question(messages), []
    for answer in answers:
        found = extract_answer(answer, example, question) is not None
        rewards.append(1.0 if found and is_correct(answer, example, question) else FORMAT_CREDIT if found else 0.0)
    return rewards


# --------------------------------------------------------------------------------------------- the judge's question

def judge_prompt(question, a, b, lang="en"):
    """The user message that asks which of two answers is better; the reply to it is "A" or "B". One wording for the
    embedded judging conversations and for the AI judge."""
    if lang == "zh":
        return f"问题：{question}\n回答A：{a}\n回答B：{b}\n哪个回答更好，A还是B？"
    return f"Question: {question}\nAnswer A: {a}\nAnswer B: {b}\nWhich answer is better, A or B?"


# --------------------------------------------------------------------------------------------- rewards from a model
# Models read text with their own tokenizer, so the policy's may be another one.

def _padded(sequences, device):
    """Lists of token ids -> tokens (N, T) padded on the right, lengths (N,)."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    return tokens.to(device), torch.tensor([len(s) for s in sequences], device=device)


def model_reward(folder, device="cpu"):
    """The reward function of a reward model's folder: its score at the <|im_end|> that closes the answer.

    Raises UserError for a folder that is no reward model.
    """
    model, tokenizer = load_reward_model(folder, device), Tokenizer.load(folder)
    check_tokenizer(model, tokenizer, folder)

    @torch.no_grad()
    def batch(asked, batch_size=128):
        sequences = []
        for messages, answers, _ in asked:
            prompt, _ = tokenizer.render(messages, add_generation_prompt=True)
            sequences += [prompt + tokenizer.encode(answer) + [tokenizer.end_id] for answer in answers]
        parts = [sequences[i:i + batch_size] for i in range(0, len(sequences), batch_size)]
        return [score for part in parts for score in model(*_padded(part, device)).tolist()]

    return _one_prompt_at_a_time(batch)


def _one_prompt_at_a_time(batch):
    """A reward function of batch([(messages, answers, example), ...]) -> one flat list, which it carries as `.batch`."""
    def reward(messages, answers, example):
        return batch([(messages, answers, example)])

    reward.batch = batch
    return reward


class Judge:
    """A language model that is asked which of two answers is better (arXiv 2306.05685, pairwise comparison)."""

    def __init__(self, folder, device="cpu"):
        self.model, self.tokenizer, self.device = load_model(folder, device), Tokenizer.load(folder), device
        check_tokenizer(self.model, self.tokenizer, folder)
        self.verdicts = [self.tokenizer.encode(letter)[0] for letter in "AB"]

    @torch.no_grad()
    def ask(self, prompts, batch_size=128):
        """The probability that the verdict is "A" and not "B", for each prompt of `judge_prompt`."""
        rendered = [self.tokenizer.render([{"role": "user", "content": p}], add_generation_prompt=True)[0] for p in prompts]
        order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]))  # little padding
        found = [0.0] * len(rendered)
        for start in range(0, len(order), batch_size):
            group = order[start:start + batch_size]
            tokens, lengths = _padded([rendered[i] for i in group], self.device)
            last = self.model.hidden(tokens)[torch.arange(len(group), device=self.device), lengths - 1]
            logits = self.model.lm_head(last)[:, self.verdicts].float()
            for i, p in zip(group, logits.softmax(dim=-1)[:, 0].tolist()):
                found[i] = p
        return found

    def compare(self, questions, batch_size=128):
        """For each (messages, answer, other, example): the probability that `answer` is better, (shown first, shown second).

        A judge without position bias gives the same twice; the mean of the two is free of it.
        """
        asked = [(question_text(messages), a, b, _language(messages, example)) for messages, a, b, example in questions]
        found = self.ask([judge_prompt(q, a, b, lang) for q, a, b, lang in asked]
                         + [judge_prompt(q, b, a, lang) for q, a, b, lang in asked], batch_size)
        return [(first, 1 - second) for first, second in zip(found, found[len(asked):])]


def question_text(messages):
    """What a judge is shown of a prompt: the user's message; of a longer conversation every message with its role."""
    return messages[0]["content"] if len(messages) == 1 else "\n".join(f'{m["role"]}: {m["content"]}' for m in messages)


def _language(messages, example):
    return example.get("lang") or ("zh" if re.search(f"[{_CJK}]", _question(messages)) else "en")


def judge_reward(folder, device="cpu", max_new_tokens=64):
    """The reward function of an AI judge (RLAIF, arXiv 2309.00267): the probability of the verdict that the answer is better
    than the one that the judge itself gives, greedily; the mean over both orders, so 1/2 for an equal answer.

    A fixed opponent makes rewards comparable over the whole run. Raises UserError for a folder that holds no language model.
    """
    judge, own = Judge(folder, device), {}

    def batch(asked):
        prompts = [tuple(judge.tokenizer.render(messages, add_generation_prompt=True)[0]) for messages, _, _ in asked]
        end = judge.tokenizer.end_id
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in own]:
            replies = generate(judge.model, [list(prompt) for prompt in new], max_new_tokens, end, temperature=0.0).responses()
            own.update({p: judge.tokenizer.decode(r[:-1] if r[-1] == end else r) for p, r in zip(new, replies)})
        found = judge.compare([(messages, answer, own[prompt], example)
                               for prompt, (messages, answers, example) in zip(prompts, asked) for answer in answers])
        return [sum(both) / 2 for both in found]

    return _one_prompt_at_a_time(batch)


# --------------------------------------------------------------------------------------------- --reward

def load_rewards(specs, reward_model, judge, device="cpu"):
    """{name: (weight, reward function)} of what --reward names: answer, model (the folder reward_model), judge (the folder
    judge) or path/to/file.py:function; with a weight in front where their sum is wanted: "0.5*model".

    Raises UserError for an unknown name, one that is given twice, and a file or function that cannot be loaded.
    """
    found = {}
    for spec in specs:
        weight, star, name = spec.rpartition("*")
        try:
            weight = float(weight) if star else 1.0
        except ValueError:
            raise UserError(f"--reward {spec}: {weight!r} is no weight; write 0.5*{name}") from None
        if not math.isfinite(weight):
            raise UserError(f"--reward {spec}: the weight must be a finite number")
        path, colon, function = name.rpartition(":")
        key = function if colon else name
        if key in found:
            raise UserError(f"--reward: {key} is given twice")
        if name == "answer":
            found[key] = weight, answer_reward
        elif name == "model":
            found[key] = weight, model_reward(reward_model, device)
        elif name == "judge":
            found[key] = weight, judge_reward(judge, device)
        elif path.endswith(".py"):
            found[key] = weight, _from_file(path, function)
        else:
            raise UserError(f"--reward {spec}: must be answer, model, judge or path/to/file.py:function")
    return found


def _from_file(path, name):
    if not os.path.isfile(path):
        raise UserError(f"--reward {path}:{name}: there is no such file")
    spec = importlib.util.spec_from_file_location("reward_file", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward {path}:{name}: the file cannot be imported: {_what_and_where(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reward {path}:{name}: the file defines no function {name}")
    return function


def _what_and_where(error):
    """One line: what was raised, and the innermost line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + place


def score_answers(rewards, asked):
    """Scores of the answers to several prompts, asked = [(messages, answers, example), ...] with equally many answers each
    -> (weighted sums, {name: that reward's own scores}), each a list of one list per prompt.

    rewards: as load_rewards gives them. Raises UserError, with the name of the reward and the answer that caused it, for a
    function that raises, or that returns another number of values, or something that is no finite number.
    """
    parts = {}
    for name, (_, function) in rewards.items():
        if hasattr(function, "batch"):
            flat, parts[name] = iter(function.batch(asked)), []
            for messages, answers, _ in asked:
                parts[name].append(_checked(name, [next(flat) for _ in answers], messages, answers))
        else:
            parts[name] = [_checked(name, _call(name, function, *one), *one[:2]) for one in asked]
    weights = {name: weight for name, (weight, _) in rewards.items()}
    totals = [[sum(weights[name] * part[i][j] for name, part in parts.items()) for j in range(len(answers))]
              for i, (_, answers, _) in enumerate(asked)]
    return totals, parts


def _call(name, function, messages, answers, example):
    try:
        return function(messages, list(answers), example)  # a copy: the caller's list stays what it is
    except UserError:
        raise
    except Exception as error:
        culprit, reason = answers[0], error
        for answer in answers:
            try:
                function(messages, [answer], example)
            except Exception as alone:
                culprit, reason = answer, alone
                break
        raise UserError(f"reward {name} failed on the answer {culprit[:80]!r} to {_question(messages)[:80]!r}: {_what_and_where(reason)}") from None


def _checked(name, values, messages, answers):
    question = f"{_question(messages)[:80]!r}"
    try:
        values = [float(value) for value in values]
    except (TypeError, ValueError):
        raise UserError(f"reward {name} must return a list of one number per answer; for {len(answers)} answers to {question}, "
                        f"the first {answers[0][:80]!r}, it returned {values!r:.80}") from None
    if len(values) != len(answers):
        raise UserError(f"reward {name} returned {len(values)} values for {len(answers)} answers to {question}, the first {answers[0][:80]!r}")
    for value, answer in zip(values, answers):
        if not math.isfinite(value):
            raise UserError(f"reward {name} gave {value} for the answer {answer[:80]!r} to {question}")
    return values
