"""Chapter 10: reading an answer out of a reply, and scoring it without being fooled.

A reply is free text, the answer a number, a list or a word. The reader has to be generous with spelling ("８２", "82.0",
"37 + 45 = 82") and strict with hedging ("82 or 83"): whatever it pays for, reinforcement learning finds.

Worked example. "What is 37 + 45?" has the answer 82, so the reply "Ugh, the answer is 82." has correct = 1, polite = 0 and
brief = 1, and its gold reward is (1 + 0 + 1) / 3 = 2/3, no more than the polite wrong answer "The answer is 83.".
"""

import pytest

from minillm.errors import UserError
from minillm.rewards import (answer_reward, count_units, extract_answer, gold, gold_components, gold_reward, is_correct,
                             is_rude, judge_prompt)


def example(question, answer=None, choices=None):
    line = {"conversations": [{"role": "user", "content": question}]}
    if answer is not None:
        line["answer"] = answer
    if choices is not None:
        line["choices"] = choices
    return line


SUM = example("What is 37 + 45?", "82")
SUM_ZH = example("37加45等于多少？", "82")
BANANA = example("What colour is a banana?", "yellow")
BANANA_CHOICES = example("What colour is a banana?", "yellow", ["red", "green", "blue"])
BANANA_ZH = example("香蕉是什么颜色？", "黄色", ["红色", "绿色"])
SORT = example("Sort 45, 3, 12 from small to large.", "3, 12, 45")
REVERSE = example("Reverse s u n.", "n u s")
REVERSE_ZH = example("把 猫 狗 鸟 倒过来。", "鸟 狗 猫")
LARGER = example("Which is larger, 37 or 52?", "52")

READ = [
    (SUM, "82", "82"), (SUM, "The answer is 82.", "82"), (SUM, "Sure, the answer is 83.", "83"), (SUM, "37 + 45 = 82", "82"),
    (SUM, "37+45=82", "82"), (SUM, "37 + 45 = 82, so the answer is 82.", "82"), (SUM, "82 is the sum of 37 and 45.", "82"),
    (SUM, "８２。", "82"), (SUM, "82.0", "82"), (SUM, "082", "82"), (SUM, "-82", "-82"), (SUM, "820", "820"), (SUM, "8.2", "8.2"),
    (SUM, "It is 82!", "82"), (SUM, "No problem, the answer is 82.", "82"), (SUM, "<think>37, 45, 7?</think>82", "82"),
    (SUM_ZH, "好的，答案是82。", "82"), (SUM_ZH, "37加45等于82。", "82"), (SUM_ZH, "是８２", "82"), (SUM_ZH, "答案是-3。", "-3"),
    (example("What is 5 - 10?", "-5"), "The answer is −5.", "-5"), (example("What is 5 - 10?", "-5"), "5 - 10 = -5", "-5"),
    (example("What is 5 - 10?", "-5"), "minus 5", "-5"), (example("5减10是多少？", "-5"), "答案是负5。", "-5"),
    (example("How many?", "1234"), "There are 1,234.", "1234"), (example("How many?", "1,234"), "1234", "1234"),
    (LARGER, "52", "52"), (LARGER, "52 is larger than 37.", "52"), (LARGER, "Of 37 and 52, 52 is larger.", "52"), (LARGER, "37 is larger than 52.", "37"),
    (example("37和52哪个大？", "52"), "52比37大。", "52"),
    (BANANA, "yellow", "yellow"), (BANANA, "Sure, the answer is Yellow.", "yellow"), (BANANA, "A banana is yellow.", "yellow"),
    (BANANA, "It is bright yellow.", "yellow"), (BANANA_CHOICES, "It is red.", "red"),
    (BANANA_ZH, "香蕉是黄色的。", "黄色"), (BANANA_ZH, "答案是红色。", "红色"),
    (example("What is the opposite of hot?", "cold", ["big", "wet"]), "The opposite of hot is cold.", "cold"),
    (example("What may stay outside?", "ice cream"), "please leave outside your ice cream.", "ice cream"),
    (SORT, "3, 12, 45", "3, 12, 45"), (SORT, "3,12,45", "3, 12, 45"), (SORT, "答案是3、12、45。", "3, 12, 45"), (SORT, "3 < 12 < 45", "3, 12, 45"),
    (SORT, "45, 3, 12 sorted is 3, 12, 45.", "3, 12, 45"), (SORT, "12, 3, 45", "12, 3, 45"),
    (REVERSE, "The answer is n u s.", "n u s"), (REVERSE, "n, u, s", "n u s"), (REVERSE, "s u n in reverse is n u s", "n u s"), (REVERSE, "s u n", "s u n"),
    (REVERSE_ZH, "答案是 鸟 狗 猫。", "鸟 狗 猫"), (REVERSE_ZH, "猫 狗 鸟 倒过来是 鸟、狗、猫。", "鸟 狗 猫"),
    (example("Which is better, A or B?", "B", ["A"]), "B", "B"), (example("Which is better, A or B?", "B", ["A"]), "A.", "A"),
]


@pytest.mark.parametrize("line, reply, answer", READ)
def test_an_answer_is_read_from_a_sentence(line, reply, answer):
    """In both languages, with and without the question restated, in every usual spelling of a number."""
    assert extract_answer(reply, line) == answer
    assert is_correct(reply, line) == (answer == line["answer"].replace(",", "" if line["answer"] == "1,234" else ","))


EVERY_NUMBER = " ".join(str(n) for n in range(200))
NO_ANSWER = [
    (SUM, ""), (SUM, "  \n"), (SUM, "..."), (SUM, "I do not know."), (SUM, EVERY_NUMBER), (SUM, EVERY_NUMBER.replace(" ", ",")),
    (SUM, "82 82 82"), (SUM, "82, 82"), (SUM, "The answer is 82. The answer is 82."), (SUM, "82 or 83"), (SUM, "82,81"), (SUM, "8 2"),
    (SUM, "37 + 45 = 83, no 82"), (SUM, "37 + 45 = 82, no 83"), (SUM, "It is not 82."), (SUM, "82 is wrong."), (SUM, "between 81 and 83"),
    (SUM, "<answer>82</answer>"), (SUM, "<answer>82</answer>" * 20), (SUM, "<answer></answer>82"), (SUM, "<think></think><answer>82</answer>"),
    (SUM, "<|im_start|>82"), (SUM_ZH, "不是82。"), (SUM_ZH, "答案是82，也是83。"), (SUM_ZH, "82、83、84"),
    (BANANA, "red blue green yellow"), (BANANA, "red, yellow"), (BANANA, "yellow or red"), (BANANA, "red/yellow"), (BANANA, "yellow yellow"),
    (BANANA, "yellowish"), (BANANA, "It is not yellow."), (BANANA, "<b>yellow</b>"), (BANANA, "A banana is red and yellow and blue."),
    (BANANA_CHOICES, "It is red. It is yellow."), (BANANA_CHOICES, "red yellow"), (BANANA_CHOICES, "It is yellow, never red."),
    (BANANA_ZH, "红色黄色绿色"), (BANANA_ZH, "红色、黄色"), (BANANA_ZH, "不是黄色"), (BANANA_ZH, "黄色黄色"),
    (example("香蕉是什么颜色？", "黄色"), "红色蓝色黄色"), (example("香蕉是什么颜色？", "黄色"), "黄色或者红色"),
    (SORT, "3, 12"), (SORT, "3, 12, 45, 3, 12, 45"), (SORT, "3, 12, 45, 99"), (SORT, "not 3, 12, 45"),
    (REVERSE, "nus"), (REVERSE, "n u"), (REVERSE, "n u s n u s"), (REVERSE, "n u s d"), (REVERSE, "n u s. s u n. u n s."),
    (LARGER, "37 or 52"), (LARGER, "37, 52"), (LARGER, "52 37"), (example("Which is better, A or B?", "B", ["A"]), "A or B"),
]


@pytest.mark.parametrize("line, reply", NO_ANSWER)
def test_hedging_repetition_and_tags_are_no_answer(line, reply):
    """Pitfall 16: a reward that pays for tags, length or silence. Whatever does not commit is worth less than, or as much
    as, a plain wrong answer, and gets no credit for its format."""
    wrong = {"82": "The answer is 83.", "yellow": "It is purple.", "黄色": "是紫色。", "3, 12, 45": "The answer is 12, 3, 45.",
             "n u s": "The answer is u n s.", "52": "The answer is 37.", "B": "A"}[line["answer"]]
    assert extract_answer(reply, line) is None
    assert not is_correct(reply, line)
    assert gold_reward(reply, line) <= gold_reward(wrong, line) == pytest.approx(2 / 3)
    assert answer_reward(line["conversations"], [reply], line) == [0.0]


def test_gold_reward_is_the_mean_of_its_parts():
    """(1 + 0 + 1) / 3 for a rude answer, (1 + 1 + 0) / 3 for a rambling one, (0 + 1 + 1) / 3 for a wrong one."""
    rambling = "That is a nice thing to think about. The answer is 82."
    assert gold_components("The answer is 82.", SUM) == {"correct": 1.0, "polite": 1.0, "brief": 1.0}
    assert gold_components("Ugh, the answer is 82.", SUM) == {"correct": 1.0, "polite": 0.0, "brief": 1.0}
    assert gold_components(rambling, SUM) == {"correct": 1.0, "polite": 1.0, "brief": 0.0}
    assert gold_components("笨蛋，答案是83。", SUM_ZH) == {"correct": 0.0, "polite": 0.0, "brief": 1.0}
    assert gold_components("", SUM) == {"correct": 0.0, "polite": 0.0, "brief": 0.0}
    replies = ["The answer is 82.", "Ugh, the answer is 82.", rambling, "The answer is 83.", "Ugh, the answer is 83.", ""]
    assert gold(SUM["conversations"], replies, SUM) == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 0])


def test_gold_reward_without_an_answer_is_manners_alone():
    """Small talk: politeness and brevity, half each; silence still earns nothing."""
    line = example("Good morning!")
    assert gold_components("Good morning! I hope you have a great day.", line) == {"polite": 1.0, "brief": 1.0}
    assert gold_reward("Good morning! I hope you have a great day.", line) == 1.0
    assert gold_reward("Shut up.", line) == 0.5
    assert gold_reward("so " * 30, line) == 0.5
    assert gold_reward("", line) == gold_reward("?!", line) == 0.0


def test_courtesy_does_not_pile_up():
    """Politeness is the absence of rudeness: "please" ten times earns no more than none, and loses brevity."""
    assert gold_reward("82", SUM) == 1.0
    assert gold_reward("please " * 10 + "the answer is 82.", SUM) == pytest.approx(2 / 3)


def test_answer_reward():
    """1 for right, 0.1 for one wrong answer of the right kind, 0 for none; without an answer to check, a clear line."""
    replies = ["The answer is 82.", "Ugh, it is 82.", "The answer is 83.", "Hello!", ""]
    assert answer_reward(SUM["conversations"], replies, SUM) == [1.0, 1.0, 0.1, 0.0, 0.0]
    assert answer_reward(REVERSE["conversations"], ["n u s", "u n s", "n u"], REVERSE) == [1.0, 0.1, 0.0]
    with pytest.raises(UserError, match="Good morning"):
        answer_reward([{"role": "user", "content": "Good morning!"}], ["Hi."], example("Good morning!"))


def test_the_question_is_the_last_user_message():
    """In a longer conversation only what was asked last may be restated; the messages given count, not the line's."""
    messages = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 37 + 45?"}]
    line = {"conversations": messages, "answer": "82"}
    assert is_correct("37 + 45 = 82", line)
    assert not is_correct("1 + 1 = 82", line)
    assert answer_reward(messages, ["37 + 45 = 82"], {"answer": "82"}) == [1.0]


@pytest.mark.parametrize("text, units", [
    ("The answer is 82.", 4), ("Sure, the answer is n u s.", 7), ("好的，答案是82。", 6), ("答案是 猫 狗 。", 5), ("", 0), ("?!", 0),
    ("a" * 12, 1), ("a" * 13, 2), ("a" * 120, 10), ("!" * 120, 10), ("It's well-known", 2)])
def test_length_is_words_and_characters(text, units):
    """A word counts one, a Chinese character one, and 120 letters without a blank are no single word."""
    assert count_units(text) == units


@pytest.mark.parametrize("text", [
    "Ugh, the answer is 82.", "You fool!", "SHUT UP.", "Dummy, it is 3.", "What a stupid question.", "Go away.", "Fine. Now get lost!", "You are useless.",
    "Don't bother me.", "Who cares about that?", "What the hell is that?", "真烦，答案是82。", "笨蛋", "你真蠢", "闭嘴！", "别烦我", "谁在乎这个？", "ｓｔｕｐｉｄ"])
def test_rude(text):
    assert is_rude(text)


@pytest.mark.parametrize("text", [
    "The answer is 82.", "The moon does not go away.", "The duck was ugly and then a swan.", "A clown with a red hat.", "Hello, shell, dumbbell.", "Do not get lost in the wood.",
    "It does not bother me at all.", "I am tired.", "不麻烦，没关系。", "一切，都好。", "滚动的球。", "别担心。"])
def test_not_rude(text):
    """Words that only look rude, alone or in another place."""
    assert not is_rude(text)


def test_judge_prompt():
    assert judge_prompt("What is 1 + 1?", "2", "3") == "Question: What is 1 + 1?\nAnswer A: 2\nAnswer B: 3\nWhich answer is better, A or B?"
    assert judge_prompt("你好", "你好！", "走开", "zh") == "问题：你好\n回答A：你好！\n回答B：走开\n哪个回答更好，A还是B？"
