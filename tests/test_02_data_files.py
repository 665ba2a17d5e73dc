"""Chapter 2: the embedded data. What is in the files, and that nothing held out is in what trains.

After this chapter you know what a held-out score needs before it means anything, and how the arithmetic is divided into
levels.

A held-out score means something only if the questions are unseen. Unseen is more than another spelling: 45 + 37 gives
37 + 45 away, and so does a worked example in the pretraining text or an answer shown to a judge.
"""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from minillm.verify import gold_components, is_correct, is_rude

DATA = Path(__file__).resolve().parent.parent / "data"
TRAINING = ["sft", "judge", "prompts", "preference", "identity"]
TESTS = ["sft_test", "preference_test"]
HELD_OUT = ["sft_eval", "prompts_eval", "preference_eval", "judge_eval", *TESTS]
GENERATED = [*TRAINING, *HELD_OUT, "identity_eval", "identity_test", "pretrain", "pretrain_eval", "pretrain_test"]
TASKS = {"add", "subtract", "compare", "sort", "count", "reverse", "fact", "talk"}


@pytest.fixture(scope="module")
def files():
    return {name: [json.loads(text) for text in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
            for name in GENERATED}


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_data", DATA / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task_of(maker):
    """The task of a line of sft.jsonl, which does not say it: whose wording its first question is, or "talk"."""
    tables = {"add": [maker.ADD], "subtract": [maker.SUBTRACT], "compare": [maker.COMPARE], "sort": [maker.SORT],
              "count": [maker.COUNT], "reverse": [maker.REVERSE]}
    asked = {}
    for task, found in tables.items():
        wordings = [form for table in found for forms in table.values() for form in forms]
        asked[task] = re.compile("|".join(re.sub(r"\\{\w\\}", ".+", re.escape(form)) for form in wordings))
    facts = {maker.fact_text(form, subject) for relations in maker.FACTS.values()
             for forms, _, items in relations.values() for form in forms for subject in items}

    def named(line):
        question = messages_of(line)[0]["content"]
        found = [task for task in asked if asked[task].fullmatch(question)] + ["fact"] * (question in facts)
        assert len(found) <= 1, question
        return found[0] if found and len(messages_of(line)) == 2 else "talk"
    return named


def messages_of(line):
    """The conversation of a line; of a pair, the prompt and the better answer."""
    if "prompt" in line:
        return [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["chosen"]}]
    return line["conversations"]


def is_english(line):
    """All English text of these files is ASCII. A sum is asked alike in both languages, so the reply counts too."""
    return all(message["content"].isascii() for message in messages_of(line))


def normal(text):
    """Without case, blanks and punctuation; operators stay."""
    return re.sub(r"[^\w+]|_", "", text.lower().replace("-", "minus"))


def questions(lines):
    """Every user turn of the lines."""
    return {normal(m["content"]) for line in lines for m in messages_of(line) if m["role"] == "user"}


def edits(one, other):
    """How many items must be put in, left out or replaced to make one sequence of the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, item in enumerate(one, 1):
        before, row = row, [i]
        for j, its in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (item != its)))
    return row[-1]


def shown_tasks(text):
    """The question in a judging prompt, or the text itself."""
    found = re.match(r"(?:Question: |问题：)(.*)\n(?:Answer A|回答A)", text)
    return found.group(1) if found else text


def sums(maker, lines, task):
    """(question, its two numbers) of every sum (or difference) that the lines ask for, judging conversations and chats
    included."""
    wordings = [form for forms in {"add": maker.ADD, "subtract": maker.SUBTRACT}[task].values() for form in forms]
    asked = re.compile("|".join(re.sub(r"\\{[ab]\\}", r"\\d+", re.escape(form)) for form in wordings))
    for line in lines:
        for message in messages_of(line):
            text = shown_tasks(message["content"])
            if message["role"] == "user" and asked.fullmatch(text):
                yield text, [int(number) for number in re.findall(r"\d+", text)]


def operands(maker, lines, task):
    """The operand pairs of these sums (or differences), in one order."""
    return {tuple(sorted(numbers)) for _, numbers in sums(maker, lines, task)}


@pytest.mark.slow
def test_made_again_they_are_the_same_to_the_byte(maker, tmp_path):
    """No chance but the seed: no set order, no locale, no line ends of the system."""
    for name, lines in maker.make_all().items():
        maker.write_lines(tmp_path / name, lines)
        same = (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
        assert same, f"{name} is stale: run python data/make_data.py"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.jsonl" for name in GENERATED}


def test_another_seed_asks_other_questions(maker):
    ours, others = (questions(maker.make_sft_eval(maker.Dice(seed, "sft_eval"), maker.Tasks(seed),
                                                  maker.Talk(DATA, seed), maker.SFT_EVAL)) for seed in (0, 1))
    assert len(ours & others) < len(ours) / 2


def test_a_level_without_pairs_left_gives_way_to_another(maker):
    """The one with the most left, so no seed of the data ends in a traceback, and still nothing is asked twice."""
    tasks = maker.Tasks(0)
    count = len(tasks.pairs["subtract", 3])
    pairs = [tasks.next_pair("subtract", 3) for _ in range(count + 5)]
    assert [maker.level_of("subtract", *pair) for pair in pairs] == [3] * count + [2] * 5
    assert len(set(pairs)) == count + 5


def test_they_are_small():
    assert sum(path.stat().st_size for path in DATA.iterdir() if path.suffix in (".jsonl", ".json")) < 8e6


def test_schemas(files):
    """One JSON object a line with the keys that data/README.md names, roles in turn, no empty text."""
    for name, lines in files.items():
        for line in lines:
            if name.startswith("pretrain"):
                assert set(line) == {"text"} and line["text"].strip()
                continue
            messages = messages_of(line)
            roles = "".join(m["role"][0] for m in messages)  # system, user, assistant, tool
            assert re.fullmatch("u" if name.startswith("prompts") else "s?(ua(ta)*)+", roles), roles
            assert all(set(m) == {"role", "content"} and m["content"].strip() for m in messages)
            if name in ("sft", "judge"):
                assert set(line) == {"conversations"}
                continue
            pair = {"prompt", "chosen", "rejected", "kind"}
            allowed = pair if name.startswith("preference") else {"conversations", "answer", "choices"}
            allowed |= {"kind"} if name == "judge_eval" else set()
            allowed |= {"level"} if line["task"] in ("add", "subtract") and "answer" in line else set()
            assert set(line) - allowed == {"task"}
            if name.startswith("preference"):
                assert set(line) == pair | {"task"} and line["rejected"].strip()
                assert line["chosen"] != line["rejected"]


def test_counts(files, task_of):
    sft, eval_ = Counter(task_of(line) for line in files["sft"]), Counter(line["task"] for line in files["sft_eval"])
    assert set(sft) == TASKS and 12_000 <= sum(sft.values()) <= 28_000
    assert all(sft[task] >= 500 for task in sft)
    assert set(eval_) == TASKS and all(60 <= n <= 100 for n in eval_.values())
    assert len(files["judge_eval"]) == 200 and len(files["preference_eval"]) == 400
    prompts = Counter(line["task"] for line in files["prompts"])
    assert set(prompts) == TASKS and prompts["add"] + prompts["subtract"] > 0.35 * sum(prompts.values())
    assert Counter(line["kind"] for line in files["preference"]) == {"rude": 500, "rambling": 500, "wrong": 2900}
    tested = Counter(line["kind"] for line in files["preference_test"])
    assert sum(tested.values()) == 1000 and min(tested.values()) >= 300
    for name in ("sft", "sft_eval", "prompts", "preference", "identity", "judge_eval"):
        english = sum(is_english(line) for line in files[name])
        assert 0.4 < english / len(files[name]) < 0.6, name


def level(task, a, b):
    """1, 2: no carry; 3, 4: a carry, or a borrowed ten; 1, 3: with a number of a single digit."""
    a, b = max(a, b), min(a, b)
    carry = a % 10 + b % 10 >= 10 if task == "add" else a % 10 < b % 10
    return (3 if carry else 1) + (b >= 10)


def test_the_number_of_sums_is_as_set(files, maker):
    """What SFT sees of arithmetic, judging conversations and chats included, is exactly the budget of operand pairs."""
    for task in ("add", "subtract"):
        pairs = operands(maker, files["sft"], task)
        assert Counter(level(task, *pair) for pair in pairs) == maker.PAIRS_PER_LEVEL


def test_levels(files):
    """Worked examples, and every line that names its level; half of the held-out sums need a carry."""
    for task, pair, expected in (("add", (62, 7), 1), ("add", (41, 38), 2), ("add", (58, 6), 3), ("add", (37, 45), 4),
                                 ("add", (91, 47), 2), ("subtract", (58, 6), 1), ("subtract", (58, 26), 2),
                                 ("subtract", (52, 7), 3), ("subtract", (52, 37), 4), ("subtract", (40, 40), 2)):
        assert level(task, *pair) == expected, (task, pair)
    for name in ("sft_eval", "sft_test", "prompts", "prompts_eval"):
        levels = Counter()
        for line in files[name]:
            if line["task"] in ("add", "subtract"):
                a, b = map(int, re.findall(r"\d+", messages_of(line)[0]["content"]))
                assert line["level"] == f"level {level(line['task'], a, b)}"
                levels[line["level"]] += 1
        assert abs(levels["level 3"] + levels["level 4"] - levels.total() / 2) <= 0.05 * levels.total(), (name, levels)


def test_demonstrators_forget_the_carry(files, task_of):
    """Without a carry they are always right; with one in three cases of ten, and otherwise they are ten off.

    The three of ten hold for each kind of sums by itself: chance would give one level 23 % and another 44 %.
    """
    off = Counter()
    for line in files["sft"]:
        task = task_of(line)
        if task in ("add", "subtract"):
            question, reply = (m["content"] for m in messages_of(line))
            a, b = map(int, re.findall(r"\d+", question))
            x, y, said = map(int, re.findall(r"(\d+) [-+] (\d+) = (\d+)", reply)[0])
            right = a + b if task == "add" else max(a, b) - min(a, b)
            assert sorted((x, y)) == sorted((a, b))
            off[(task, level(task, a, b), is_english(line)), said - right] += 1
    for kind in {kind for kind, _ in off}:
        task, number, _ = kind
        wrong = off[kind, -10 if task == "add" else 10]
        assert off[kind, 0] + wrong == sum(n for (other, _), n in off.items() if other == kind) > 50, kind
        assert wrong == 0 if number < 3 else 0.29 < off[kind, 0] / (off[kind, 0] + wrong) < 0.31, kind


def test_no_held_out_question_is_trained_on(files):
    trained = set().union(*(questions(files[name]) for name in TRAINING))
    for name in HELD_OUT:
        assert not questions(files[name]) & trained, name
    for i, one in enumerate(HELD_OUT):
        for other in HELD_OUT[i + 1:]:
            assert not questions(files[one]) & questions(files[other])
    for name in ("identity_eval", "identity_test"):
        assert not questions(files[name]) & questions(files["identity"])
    assert not questions(files["identity_eval"]) & questions(files["identity_test"])


def test_only_the_results_command_reads_the_test_files():
    """No setting can be chosen on what no other program reads."""
    root = DATA.parent
    for path in [*root.glob("*.py"), *root.glob("minillm/*.py"), *root.glob("benchmarks/*.py"), *DATA.glob("*.py")]:
        if path.name not in ("results.py", "make_data.py"):
            assert "_test.jsonl" not in path.read_text(encoding="utf-8"), path


@pytest.mark.slow
def test_small_talk_that_nobody_asked_before(files):
    """80 questions written for the results by writers who knew no other; in no other file, nor almost.

    Of the runs of letters (three in English, two in Chinese) that a question and one of another file have, they share
    less than 70 %. And to make a question of the training data into it, 30 % or more of its words (in Chinese: of its
    characters) have to be changed.
    """
    lines = [json.loads(text) for text in (DATA / "smalltalk_test.jsonl").read_text(encoding="utf-8").splitlines()]
    known = set().union(*(questions(lines) for name, lines in files.items() if "pretrain" not in name
                          and not name.startswith("preference")))
    assert Counter(map(is_english, lines)) == {True: 40, False: 40}

    def runs(question):
        size = 3 if question.isascii() else 2
        return {question[i:i + size] for i in range(len(question) - size + 1)}

    asked_with = {}  # {run of letters: the questions that have it}
    for question in known:
        for run in runs(question):
            asked_with.setdefault(run, []).append(question)
    for question in questions(lines):
        mine = runs(question)
        shared = Counter(other for run in mine for other in asked_with.get(run, ()))
        assert all(count < 0.7 * len(mine | runs(other)) for other, count in shared.items()), question

    def words(question):
        return re.findall(r"[a-z']+" if question.isascii() else r"\w", question.lower())

    asked = {tuple(words(m["content"])) for name, others in files.items() if name in TRAINING
             for line in others for m in messages_of(line) if m["role"] == "user"}
    for line in lines:
        mine = words(line["conversations"][0]["content"])
        enough = 0.3 * len(mine)
        near = [other for other in asked if len({*mine} - {*other}) < enough]  # each of those is one edit at least
        assert all(edits(mine, other) >= enough for other in near), mine


def test_plain_small_talk_is_in_sft_alone(files):
    """So that more of it leaves the pretrained models, the prompts and the preference pairs as they are."""
    intents = [json.loads(text) for lang in ("en", "zh")
               for text in (DATA / f"smalltalk_{lang}.jsonl").read_text(encoding="utf-8").splitlines()]
    plain = {normal(question) for intent in intents for question in intent["sft_only"]}
    assert len(plain) == sum(len(intent["sft_only"]) for intent in intents) > 1600  # none is there twice
    assert plain <= questions(files["sft"])
    for name in ("prompts", "preference", "judge", *HELD_OUT):
        assert not plain & questions(files[name]), name


def test_no_held_out_sum_is_trained_on_in_any_order(files, maker):
    """Neither as another question, nor turned around, nor inside a judging conversation or a longer chat."""
    for task in ("add", "subtract"):
        held = set().union(*(operands(maker, files[name], task) for name in HELD_OUT))
        trained = set().union(*(operands(maker, files[name], task) for name in TRAINING[:4]))
        assert len(held) > 200 and len(trained) > 1000
        assert not held & trained


def test_no_level_of_the_sums_is_always_asked_in_one_language(maker, files):
    """Or GRPO learns to carry in one language and not in the other, and a test set like that cannot tell. (In
    judge_eval there are four sums of a level: with another seed they may be in one language.)"""
    for name in ("sft", "prompts", "preference", "sft_eval", "prompts_eval", "preference_eval", *TESTS):
        for task in ("add", "subtract"):
            found = Counter((level(task, *numbers), text.isascii()) for text, numbers in sums(maker, files[name], task)
                            if not text.endswith("= ?"))  # which is asked in both
            for number in maker.LEVELS:
                counts = found[number, True], found[number, False]
                assert min(counts) > 0.25 * sum(counts), (name, task, number, counts)


def test_rl_prompts_ask_sums_that_sft_has_not_seen(files, maker):
    for task in ("add", "subtract"):
        assert not operands(maker, files["prompts"], task) & operands(maker, files["sft"], task)


def test_pretraining_text_gives_no_sums_away(files, maker):
    """Sums of single digits, and those that SFT trains on; any other would be a worked example of what is held out."""
    seen = {"+": operands(maker, files["sft"], "add"), "-": operands(maker, files["sft"], "subtract")}
    for line in files["pretrain"] + files["pretrain_eval"]:
        for a, sign, b in re.findall(r"(\d+) *([-+*]) *(\d+)", line["text"]):
            a, b = int(a), int(b)
            assert a <= 9 and b <= 9 or (a, b) in seen[sign] or (b, a) in seen[sign], line
    for task in ("add", "subtract"):
        held = set().union(*(operands(maker, files[name], task) for name in HELD_OUT))
        assert all(max(pair) > 9 for pair in held)


def content_of(maker, task, question):
    """What a question is about, whatever its words: the numbers of a comparison or a list, or the row of items."""
    if task in ("compare", "sort"):
        return task, tuple(sorted(map(int, re.findall(r"\d+", question))))
    forms = [form for table in {"count": maker.COUNT, "reverse": maker.REVERSE}[task].values() for form in table]
    found = [re.fullmatch(re.escape(form).replace(re.escape("{x}"), "(.+)"), question) for form in forms]
    row = min((match[1] for match in found if match), key=len).split()
    return task, tuple(row if task == "count" else min(row, row[::-1]))


def test_no_held_out_content_is_asked_anywhere_else(files, maker, task_of):
    """Nor in another held-out file: comparisons, lists and rows, in whatever words."""
    def contents(name):
        for line in files[name]:
            task = line.get("task") or task_of(line)
            if task in ("compare", "sort", "count", "reverse"):
                yield content_of(maker, task, messages_of(line)[0]["content"])

    found = {name: set(contents(name)) for name in ["sft", "prompts", "preference", *HELD_OUT] if name != "judge_eval"}
    for name in found.keys() & HELD_OUT:
        assert len(found[name]) > 100
        assert not found[name] & set().union(*(found[other] for other in found if other != name)), name


def test_pretraining_text_gives_no_held_out_content_away(files):
    """Pairs to compare, lists to sort or reverse, letters to count: none of the held-out ones is in the text, and no
    held-out question."""
    text = "\n".join(line["text"] for line in files["pretrain"] + files["pretrain_eval"])
    patterns = [r"(\d+) is (?:larg|small)er than (\d+)", r"(\d+)比(\d+)[大小]",
                r"(\d+) (?:and|or) (\d+)", r"(\d+)和(\d+)"]
    compared = {tuple(sorted(map(int, pair))) for pattern in patterns for pair in re.findall(pattern, text)}
    assert len(compared) > 1000
    lists = {tuple(sorted(map(int, found.split(", ")))) for found in re.findall(r"\d+(?:, \d+)+", text)}
    sentences = {normal(sentence) for sentence in re.split(r"[.?!。？！\n]", text)}
    for name in ("sft_eval", "prompts_eval", "preference_eval", *TESTS):
        for line in files[name]:
            question = messages_of(line)[0]["content"]
            numbers = tuple(sorted(int(n) for n in re.findall(r"\d+", question)))
            if line["task"] == "compare":
                assert numbers not in compared
            elif line["task"] == "sort":
                assert numbers not in lists
            elif line["task"] in ("count", "reverse"):
                spaced = max(re.findall(r"(?:\b\w+ ){2,}\w+", question), key=len)
                alone = rf"(?<!\b[a-z] ){re.escape(spaced)}(?! [a-z]\b)"  # not as a part of a longer row
                assert spaced not in text or not re.search(alone, text)
            elif line["task"] == "talk" and len(question) > 12:
                assert normal(question) not in sentences


def test_facts_are_asked_in_wordings_never_trained_on(files, maker, task_of):
    """The wording is held out, not only the pair of wording and fact; all its facts are trained in other words."""
    wordings = {}
    for lang, relations in maker.FACTS.items():
        for relation, (_, statements, items) in relations.items():
            train, held = maker.split_wordings(lang, relation)
            assert len(train) >= 6 and len(held) >= 3 and len(statements) >= 5
            assert not {normal(w) for w in train + statements} & {normal(w) for w in held}
            wordings.update({normal(maker.fact_text(form, subject)): False for form in train for subject in items})
            wordings.update({normal(maker.fact_text(form, subject)): True for form in held for subject in items})
    for name in ("sft_eval", "prompts_eval", "preference_eval", *TESTS):
        assert all(wordings[normal(messages_of(line)[0]["content"])] for line in files[name]
                   if line["task"] == "fact"), name
    for name in ("sft", "prompts", "preference"):
        assert not any(wordings[normal(messages_of(line)[0]["content"])] for line in files[name]
                       if task_of(line) == "fact"), name


def test_answers_are_right(files):
    """The reference reply of every checkable line is correct by the rules of chapter 10, and by independent arithmetic.
    """
    for name in ("sft_eval", "sft_test", "judge_eval", "identity", "identity_eval", "identity_test"):
        for line in files[name]:
            if "answer" in line:
                assert is_correct(messages_of(line)[-1]["content"], line), line
    for line in files["prompts"] + files["prompts_eval"] + files["sft_eval"] + files["sft_test"]:
        question = messages_of(line)[0]["content"]
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        if line["task"] == "add":
            assert sum(numbers) == int(line["answer"])
        elif line["task"] == "subtract":
            assert abs(numbers[0] - numbers[1]) == int(line["answer"])
        elif line["task"] == "sort":
            assert ", ".join(map(str, sorted(numbers))) == line["answer"]


@pytest.mark.slow
def test_demonstrators_are_mixed_and_the_best_manner_is_the_commonest(files, task_of):
    """40 % of the SFT replies to tasks are rude and, independently, 40 % ramble, so that a sample often has bad
    manners; polite and brief is still the largest group. Held-out references have none of it, nor has any chat."""
    counts = Counter()
    for line in files["sft"]:
        if task_of(line) != "talk":
            reply = messages_of(line)[-1]["content"]
            counts[is_rude(reply), len(re.split(r"(?<=[.。])", reply)) > 2] += 1
        else:
            assert not any(is_rude(m["content"]) for m in messages_of(line) if m["role"] == "assistant"), line
    total = sum(counts.values())
    assert 0.37 < (counts[True, False] + counts[True, True]) / total < 0.43
    assert 0.37 < (counts[False, True] + counts[True, True]) / total < 0.43
    assert counts[False, False] == max(counts.values()) > 0.33 * total
    for line in files["sft_eval"]:
        assert set(gold_components(messages_of(line)[-1]["content"], line).values()) == {1.0}, line


def test_every_manner_is_recognised(maker):
    """The phrases of the data and the rules of minillm.verify agree, for every form and filler."""
    for lang, question, answer in (("en", "What is 37 + 45?", "82"), ("zh", "37加45等于多少？", "82")):
        line = {"conversations": [{"role": "user", "content": question}], "answer": answer}
        for rude, forms in ((0, maker.POLITE[lang]), (1, maker.RUDE_FORMS[lang])):
            for form in forms:
                reply = maker.blank(form, answer)
                assert gold_components(reply, line) == {"correct": 1.0, "polite": 1.0 - rude, "brief": 1.0}
                for filler in maker.FILLERS[lang]:
                    assert not re.search(r"\d", filler)
                    for rambling in (f"{filler} {reply}", f"{reply} {filler}"):
                        assert gold_components(rambling, line) == {"correct": 1.0, "polite": 1.0 - rude, "brief": 0.0}
        assert all(is_rude(text) for text in maker.RUDE_TALK[lang])


def test_pairs_differ_in_what_their_kind_says(files):
    """rude: only the rejected is rude. rambling: only the rejected is long. wrong: the same form, and another answer.
    """
    for line in files["preference"] + files["preference_eval"]:
        good, bad = (gold_components(reply, {}) for reply in (line["chosen"], line["rejected"]))
        assert good["polite"] == 1
        if line["kind"] == "rude":
            assert bad["polite"] == 0
        else:
            assert bad["polite"] == 1
            longer = len(line["rejected"]) / len(line["chosen"])
            if line["kind"] == "rambling":
                assert line["chosen"] in line["rejected"] and longer > 1.3
            else:
                assert 0.7 < longer < 1.4
    by = Counter((line["kind"], line["task"]) for line in files["preference"])
    assert all(by["wrong", task] >= 100 for task in TASKS - {"talk"}) and by["rude", "talk"] >= 20 and by["rambling",
                                                                                                          "talk"] >= 20


def test_judging_favours_no_position(files):
    """A judge that always says A is right half the time, in every kind of pair and in both languages."""
    for name, slack in (("judge", 0.01), ("judge_eval", 0.01)):
        for english in (True, False):
            verdicts = [messages_of(line)[-1]["content"] for line in files[name] if is_english(line) is english]
            assert set(verdicts) == {"A", "B"} and abs(verdicts.count("A") / len(verdicts) - 0.5) < slack
    kinds = Counter((line["kind"], line["answer"]) for line in files["judge_eval"])
    assert len(kinds) == 6 and min(kinds.values()) >= 28


def test_judging_shows_every_kind_in_both_languages(maker, monkeypatch):
    """Pairs that differ in one respect, for sums and for the rest: or the judge learns rudeness in one language."""
    found, two_replies = Counter(), maker.two_replies

    def counted(dice, tasks, kind, task, lang, *more):
        found[kind, task in maker.SIGN, lang] += 1
        return two_replies(dice, tasks, kind, task, lang, *more)

    monkeypatch.setattr(maker, "two_replies", counted)
    for n, hold_out in ((maker.JUDGE_PAIRS, False), (maker.JUDGE_EVAL, True)):
        found.clear()
        maker.make_judging(maker.Dice(0, "judge"), maker.Tasks(0), n, {}, hold_out)
        assert len(found) == 12
        assert all(abs(count - found[kind, is_sum, "zh"]) <= 0.2 * count for (kind, is_sum, _), count in found.items())


def test_dialogues_written_by_hand(files):
    """At least 300, in both languages, many of several turns, all of them in the SFT data."""
    counts = []
    trained = {json.dumps(messages_of(line)) for line in files["sft"]}
    for lang in ("en", "zh"):
        text = (DATA / f"handwritten_{lang}.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        assert all(json.dumps(line["conversations"]) in trained for line in lines)
        counts.append((len(lines), sum(len(line["conversations"]) > 2 for line in lines)))
    assert sum(n for n, _ in counts) >= 300 and min(n for n, _ in counts) >= 120
    assert all(several > n / 2 for n, several in counts)


def test_the_language_is_small(files):
    """At most 900 Chinese characters over everything: each is seen often enough for a tiny model."""
    text = "".join((DATA / f"{name}.jsonl").read_text(encoding="utf-8") for name in GENERATED)
    assert len({c for c in text if "\u4e00" <= c <= "\u9fff"}) < 900


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_levels: `("add", (91, 47), 2)` -> `("add", (91, 49), 2)`. Which level is this sum?
# 2. test_another_seed_asks_other_questions: `in (0, 1)` -> `in (0, 0)`. What are the two numbers that are compared?
