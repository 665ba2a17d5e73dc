"""Chapter 10: reading the answer at the end of a reply, and scoring the reply without being fooled.

After this chapter you know which replies count as right, and why a reward must not pay for hedging, tags or length.

A reply is free text; the answer is a number, a list, a sequence of letters or words, or a word. The parser is generous
with spelling ("８２", "82.0", "37 + 45 = 82") and strict with hedging ("82 or 83"), because reinforcement learning finds
whatever it pays for.

Worked example. "What is 37 + 45?" has the answer 82. The reply "Ugh, the answer is 82." has correct = 1, polite = 0 and
brief = 1, so its gold reward is (1 + 0 + 1) / 3 = 2/3, no more than the polite wrong answer "The answer is 83." has.
"""

import time

import pytest

from minillm.errors import UserError
from minillm.rewards import answer_reward, judge_prompt
from minillm.verify import (check_answer, count_units, extract_answer, gold_components, gold_reward, is_correct,
                            is_rude, is_verifiable, question_of)


def example(question, answer=None, choices=None):
    line = {"conversations": [{"role": "user", "content": question}]}
    if answer is not None:
        line["answer"] = answer
    if choices is not None:
        line["choices"] = choices
    return line


SUM = example("What is 37 + 45?", "82")
SUM_ZH = example("37加45等于多少？", "82")
MINUS = example("What is 5 - 10?", "-5")
HALF = example("What is 1 divided by 2?", "0.5")
LARGER = example("Which is larger, 37 or 52?", "52")
SORT = example("Sort 45, 3, 12 from small to large.", "3, 12, 45")
REVERSE = example("Reverse s u n.", "n u s")
REVERSE_ZH = example("把 猫 狗 鸟 倒过来。", "鸟 狗 猫")
BANANA = example("What colour is a banana?", "yellow")
BANANA_CHOICES = example("What colour is a banana?", "yellow", ["red", "green", "blue"])
BANANA_ZH = example("香蕉是什么颜色？", "黄色")
BANANA_ZH_CHOICES = example("香蕉是什么颜色？", "黄色", ["红色", "绿色"])
A_OR_B = example("Which is better, A or B?", "B", ["A"])

READ = [
    # a number: the only one, or the last one after "=", ":" or the numbers of the question
    (SUM, "82", "82"), (SUM, "It is 82!", "82"), (SUM, "Sure, the answer is 83.", "83"), (SUM, "-82", "-82"),
    (SUM, "37 + 45 = 82", "82"), (SUM, "37+45=82", "82"), (SUM, "45 + 37 = 82.", "82"),
    (SUM, "37 and 45 make 82", "82"),
    (SUM, "37 + 45 = 30 + 40 + 12 = 70 + 12 = 82", "82"), (SUM, "37 + 45 = 82, so it is 82.", "82"),
    (SUM, "Add the tens (70) and the ones (12): 82.", "82"), (SUM, "<think>37, 45, 7?</think>82", "82"),
    (SUM_ZH, "好的，答案是82。", "82"), (SUM_ZH, "37加45等于82。", "82"), (SUM_ZH, "先算30加40等于70，再算70加12等于82。", "82"),
    (LARGER, "52", "52"), (LARGER, "Of 37 and 52, 52 is larger.", "52"), (LARGER, "37和52中大的是37。", "37"),
    # one value, many spellings
    (SUM, "８２。", "82"), (SUM, "82.0", "82"), (SUM, "082", "82"), (SUM, "$82", "82"), (SUM, "82 %", "82"),
    (SUM, "82 apples", "82"), (SUM, "It is **82**.", "82"), (SUM, "8.2", "41/5"), (SUM, "820", "820"),
    (MINUS, "5 - 10 = -5", "-5"), (MINUS, "The answer is −5.", "-5"), (MINUS, "minus 5", "-5"), (MINUS, "负5", "-5"),
    (HALF, "0.5", "1/2"), (HALF, ".50", "1/2"), (HALF, "1/2", "1/2"), (HALF, r"\frac{1}{2}", "1/2"),
    (HALF, "2/4", "1/2"),
    (example("How many?", "1234"), "There are 1,234.", "1234"), (example("How many?", "1,234"), "1234", "1234"),
    (example("How much?", "$15.00"), "15", "15"), (example("How much?", "20%"), "20", "20"),
    # a list of numbers: the last ones
    (SORT, "3, 12, 45", "3, 12, 45"), (SORT, "3,12,45", "3, 12, 45"), (SORT, "答案是3、12、45。", "3, 12, 45"),
    (SORT, "3 < 12 < 45", "3, 12, 45"), (SORT, "45, 3, 12 sorted is 3, 12, 45.", "3, 12, 45"),
    (SORT, "12, 3, 45", "12, 3, 45"),
    # a sequence: the run of letters or words at the end of a sentence
    (REVERSE, "The answer is n u s.", "n u s"), (REVERSE, "n, u, s", "n u s"), (REVERSE, "N U S", "n u s"),
    (REVERSE, "s u n in reverse is n u s", "n u s"), (REVERSE, "s u n", "s u n"), (REVERSE, "Sure, u n s.", "u n s"),
    (REVERSE_ZH, "答案是 鸟 狗 猫。", "鸟 狗 猫"), (REVERSE_ZH, "猫 狗 鸟 倒过来是 鸟、狗、猫。", "鸟 狗 猫"),
    # a word: the end of a sentence, or with choices the only candidate
    (BANANA, "yellow", "yellow"), (BANANA, "A banana is yellow.", "yellow"), (BANANA, "Sure, yellow!", "yellow"),
    (BANANA, "Sure, the answer is Yellow.", "yellow"), (BANANA, r"\boxed{yellow}", "yellow"),
    (BANANA_ZH, "香蕉是黄色的。", "黄色"), (BANANA_ZH, "好的，黄色。", "黄色"), (BANANA_ZH, "答案：黄色", "黄色"),
    (BANANA_CHOICES, "It is red.", "red"), (BANANA_CHOICES, "A bright yellow banana.", "yellow"),
    (BANANA_ZH_CHOICES, "答案是红色。", "红色"), (A_OR_B, "B", "B"), (A_OR_B, "A.", "A"), (A_OR_B, "A good answer is B.", None),
    (example("What is the opposite of hot?", "cold", ["big", "wet"]), "The opposite of hot is cold.", "cold"),
    (example("What may stay outside?", "ice cream"), "please leave outside your ice cream.", "ice cream"),
    (example("What do bees make?", "honey", ["milk"]), "I like to think about this. The answer is honey.", "honey"),
    (example("What do bees make?", "honey"), "The answer is honey. I like to think about this.", "honey"),
]


@pytest.mark.parametrize("line, reply, answer", READ)
def test_the_answer_is_read_at_the_end_of_the_reply(line, reply, answer):
    """In both languages, with and without the question restated, in every usual spelling of a number."""
    same = {"0.5": "1/2", "1,234": "1234", "$15.00": "15", "20%": "20"}
    assert extract_answer(reply, line) == answer
    assert is_correct(reply, line) == (answer == same.get(line["answer"], line["answer"]))


@pytest.mark.parametrize("line, reply", [
    (SUM, "82 is the sum of 37 and 45."), (LARGER, "52 is larger than 37."), (LARGER, "52比37大。"),
    (SUM, "I add 7 and 5 first and get 82 in the end"), (REVERSE, "n u s is the answer"),
    (BANANA, "Yellow is its colour."), (BANANA, "It is bright yellow.")])
def test_an_answer_in_another_place_is_not_read(line, reply):
    """The price of simple rules: these replies are right, but they do not end with the answer in a way that is read."""
    assert extract_answer(reply, line) is None


EVERY_NUMBER = " ".join(str(n) for n in range(200))
NO_ANSWER = [
    # empty
    (SUM, ""), (SUM, "  \n"), (SUM, "..."), (SUM, "I do not know."), (SUM, "#### "), (SUM, r"\boxed{}"),
    # several candidates
    (SUM, "82 or 83"), (SUM, "82,81"), (SUM, "8 2"), (SUM, "between 81 and 83"), (SUM_ZH, "82、83、84"),
    (SUM_ZH, "82或83"),
    (SUM, EVERY_NUMBER), (SUM, EVERY_NUMBER.replace(" ", ",")), (SUM, "The answer is 82 or 83."),
    (SUM, "It is 83. It is 82."),
    (SUM_ZH, "答案是82，也是83。"), (SUM, "The answer is one of " + EVERY_NUMBER), (LARGER, "37 or 52"), (LARGER, "37, 52"),
    (LARGER, "52 37"), (SUM, "37 + 45 = 83, no 82"), (SUM, "37 + 45 = 82, no 83"),
    (SUM, "37 + 45 = 83. 37 + 45 = 82."), (SUM, "37 + 45 = 81 = 82"), (SUM, "= 81 = 82"),
    (SUM, "37 + 45 = 83, 45 + 37 = 82"), (SUM_ZH, "37加45等于83，37加45等于82。"),
    (BANANA, "red blue green yellow"), (BANANA, "red, yellow"), (BANANA, "yellow or red"), (BANANA, "red/yellow"),
    (BANANA, "red, blue or yellow"), (BANANA, "A banana is red and yellow and blue."),
    (BANANA, "It is red. It is yellow."),
    (BANANA_CHOICES, "It is red. It is yellow."), (BANANA_CHOICES, "red yellow"),
    (BANANA_CHOICES, "It is yellow, never red."),
    (BANANA_ZH, "红色蓝色黄色"), (BANANA_ZH, "黄色或者红色"), (BANANA_ZH, "红色、黄色"), (BANANA_ZH, "红色，蓝色或黄色"),
    (BANANA_ZH_CHOICES, "红色黄色绿色"), (BANANA_ZH_CHOICES, "红色、黄色"), (A_OR_B, "A or B"),
    (SORT, "3, 12, 45, 99"), (SORT, "12, 3, 45, 3, 12, 45"), (REVERSE, "n u s d"), (REVERSE, "d n u s"),
    (REVERSE, "n u s. s u n. u n s."),
    # the same answer again and again
    (SUM, "82 82 82"), (SUM, "82, 82"), (SUM, "37 + 45 = 82 = 82 = 82"), (SUM, "37 + 45 = 82. 37 + 45 = 82."),
    (SUM, "The answer is 82. The answer is 82."),
    (SUM, "#### 82\n#### 82"), (SUM_ZH, "答案是82。答案是82。"), (SORT, "3, 12, 45, 3, 12, 45"), (REVERSE, "n u s n u s"),
    (BANANA, "yellow yellow"), (BANANA_ZH, "黄色黄色"), (BANANA_ZH_CHOICES, "黄色黄色"),
    # denial
    (SUM, "It is not 82."), (SUM, "82 is wrong."), (SUM, "The answer is not 82."),
    (SUM, "It is not true that the answer is 82."),
    (SUM, "82? No."), (SUM_ZH, "不是82。"), (SUM_ZH, "答案不是82"), (SUM_ZH, "答案是82，不对。"), (SORT, "not 3, 12, 45"),
    (REVERSE, "The answer is not n u s."), (REVERSE_ZH, "不是 鸟 狗 猫"), (BANANA, "It is not yellow."),
    (BANANA, "It isn't the yellow."),
    (BANANA_CHOICES, "It is not yellow."), (BANANA_ZH, "不是黄色"), (BANANA_ZH_CHOICES, "不是黄色"),
    # tags
    (SUM, "<answer>82</answer>"), (SUM, "<answer>82</answer>" * 20), (SUM, "<answer></answer>82"),
    (SUM, "<|im_start|>82"),
    (SUM, "<think></think><answer>82</answer>"), (SUM, "<think>1</think><think>2</think>82"), (BANANA, "<b>yellow</b>"),
    # not the whole answer
    (SORT, "3, 12"), (REVERSE, "nus"), (REVERSE, "n u"), (BANANA, "yellowish"),
]


@pytest.mark.parametrize("line, reply", NO_ANSWER)
def test_hedging_repetition_denial_and_tags_are_no_answer(line, reply):
    """Pitfall 16: a reward that pays for tags, length or silence. A reply that does not commit is worth at most as much
    as a plain wrong answer, and gets no credit for its format."""
    wrong = {"82": "The answer is 83.", "yellow": "It is purple.", "黄色": "是紫色。",
             "3, 12, 45": "The answer is 12, 3, 45.", "n u s": "The answer is u n s.", "鸟 狗 猫": "答案是 狗 鸟 猫。",
             "52": "The answer is 37.", "B": "A"}[line["answer"]]
    assert extract_answer(reply, line) is None
    assert not is_correct(reply, line)
    assert gold_reward(reply, line) <= gold_reward(wrong, line) == pytest.approx(2 / 3)
    assert answer_reward(line["conversations"], [reply], line) == [0.0]


STEPS = "Ones: 7 + 5 = 12. Tens: 30 + 40 = 70.\n\n"


@pytest.mark.parametrize("end, answer", [
    ("The answer is 82.", "82"), ("So the final answer is: 82", "82"), ("**Final answer:** 82 apples", "82"),
    ("Answer: $82", "82"),
    ("#### 82", "82"), ("#### $82.00", "82"), (r"\boxed{82}", "82"), (r"The final answer is $\boxed{82}$.", "82"),
    (r"\boxed{\$82}", "82"), (r"\boxed{\frac{1}{2}}", "1/2"), ("The answer is 82.\n#### 82", "82"), ("答案是82。", "82"),
    ("答案为82个。", "82"), ("最终答案：82元", "82"), ("The answer is 70 + 12 = 82.", "82"), ("The answer is -82.", "-82"),
    ("The answer is 1,082.", "1082"), ("#### 81\n#### 82", None), (r"\boxed{81} \boxed{82}", None),
    (r"\boxed{81, 82}", None),
    ("The answer is 82. Or maybe the answer is 81.", None), ("The answer is 82.\n#### 81", None),
    ("The answer is 82, not 81.", None), ("The answer is 81-83.", None), ("The answer is not 82.", None),
    ("答案不是82。", None),
])
def test_a_marked_number_outranks_the_steps_before_it(end, answer):
    """Real models work in steps, and say which number is the final answer. Two different final answers are none."""
    assert extract_answer(STEPS + end, SUM) == answer
    assert is_correct(STEPS + end, SUM) == (answer == "82")


def test_an_answer_field_in_the_style_of_gsm8k():
    """The worked solution ends with "#### 72"; the reply may give 72 in any way, or the solution itself."""
    solution = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips in all.\n#### 72"
    line = example("Natalia sold clips to 48 friends in April, and half as many in May. How many in all?", solution)
    for reply in (solution, "72", "48 + 24 = 72", "In all she sold 72 clips.", "The answer is 72."):
        assert is_correct(reply, line), reply
    for reply in ("24", "The answer is 24.", "48/2 = 24", "72 or 24", ""):
        assert not is_correct(reply, line), reply
    assert gold_components("The answer is 72.", line) == {"correct": 1.0, "polite": 1.0, "brief": 1.0}
    assert gold_components("The answer is 72. " + "I like sums. " * 3,
                           line)["brief"] == 0.0, "72 is brief, its solution is not"


def test_very_long_numbers_do_no_harm():
    """Python refuses to convert more than 4,300 digits, and a division by zero is no number."""
    assert not is_correct("9" * 5000, SUM) and not is_correct("1/0", SUM) and not is_correct("The answer is 82/0.", SUM)


@pytest.mark.parametrize("answer", ["82", "-5", "1/2", "1,234", "$5", "20%", "3, 12, 45", "n u s", "yellow",
                                    "ice cream", "黄色", "C++", "The sky is blue. Grass is green.", "2 + 2 = 4\n#### 4"])
def test_an_answer_that_a_reply_can_match(answer):
    check_answer(answer, "p.jsonl:3")


@pytest.mark.parametrize("answer", ["", "...", "#### ", "2 + 2 = 4\n####", "<b>4</b>"])
def test_an_answer_that_no_reply_can_match_is_refused(answer):
    with pytest.raises(UserError, match=r'^p.jsonl:3: "answer" is .* no reply can match'):
        check_answer(answer, "p.jsonl:3")


def test_gold_reward_is_the_mean_of_its_parts():
    """(1 + 0 + 1) / 3 for a rude answer, (1 + 1 + 0) / 3 for a rambling one, (0 + 1 + 1) / 3 for a wrong one."""
    rambling = "That is a nice thing to think about. The answer is 82."
    assert gold_components("The answer is 82.", SUM) == {"correct": 1.0, "polite": 1.0, "brief": 1.0}
    assert gold_components("Ugh, the answer is 82.", SUM) == {"correct": 1.0, "polite": 0.0, "brief": 1.0}
    assert gold_components(rambling, SUM) == {"correct": 1.0, "polite": 1.0, "brief": 0.0}
    assert gold_components("笨蛋，答案是83。", SUM_ZH) == {"correct": 0.0, "polite": 0.0, "brief": 1.0}
    assert gold_components("", SUM) == {"correct": 0.0, "polite": 0.0, "brief": 0.0}
    replies = ["The answer is 82.", "Ugh, the answer is 82.", rambling, "The answer is 83.", "Ugh, the answer is 83.",
               ""]
    assert [gold_reward(reply, SUM) for reply in replies] == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 0])


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
    """In a longer conversation only what was asked last may be restated. The messages given count, not the line's."""
    messages = [{"role": "user", "content": "Add 1 and 1."}, {"role": "assistant", "content": "2"},
                {"role": "user", "content": "And 37 and 45?"}]
    line = {"conversations": messages, "answer": "82"}
    assert question_of(messages) == "And 37 and 45?" and question_of([]) == ""
    assert is_correct("37 and 45 make 82", line)
    assert not is_correct("1 and 1 make 82", line)
    assert answer_reward(messages, ["37 and 45 make 82"], {"answer": "82"}) == [1.0]


@pytest.mark.parametrize("text, units", [
    ("The answer is 82.", 4), ("Sure, the answer is n u s.", 7), ("好的，答案是82。", 6), ("答案是 猫 狗 。", 5), ("", 0), ("?!", 0),
    ("a" * 12, 1), ("a" * 13, 2), ("a" * 120, 10), ("!" * 120, 10), ("It's well-known", 2)])
def test_length_is_words_and_characters(text, units):
    """A word counts one, a Chinese character one, and 120 letters without a blank are no single word."""
    assert count_units(text) == units


@pytest.mark.parametrize("text", [
    "Ugh, the answer is 82.", "You fool!", "SHUT UP.", "Dummy, it is 3.", "What a stupid question.", "Go away.",
    "Fine. Now get lost!", "You are useless.", "Don't bother me.", "Who cares about that?", "What the hell is that?",
    "真烦，答案是82。", "笨蛋", "你真蠢", "闭嘴！", "别烦我", "谁在乎这个？", "ｓｔｕｐｉｄ"])
def test_rude(text):
    assert is_rude(text)


@pytest.mark.parametrize("text", [
    "The answer is 82.", "The moon does not go away.", "The duck was ugly and then a swan.", "A clown with a red hat.",
    "Hello, shell, dumbbell.", "Do not get lost in the wood.", "It does not bother me at all.", "I am tired.",
    "不麻烦，没关系。", "一切，都好。", "滚动的球。", "别担心。"])
def test_not_rude(text):
    """Words that only look rude, alone or in another place."""
    assert not is_rude(text)


def test_judge_prompt():
    assert judge_prompt("What is 1 + 1?", "2",
                        "3") == "Question: What is 1 + 1?\nAnswer A: 2\nAnswer B: 3\nWhich answer is better, A or B?"
    assert judge_prompt("你好", "你好！", "走开", "zh") == "问题：你好\n回答A：你好！\n回答B：走开\n哪个回答更好，A还是B？"


@pytest.mark.parametrize("answer", [r"\boxed{82}", "The answer is 82.", "答案是82。", "3*4 + 70 = 82", r"\(82\)", "x = 82",
                                    "#### 82\n(by hand)", "$82$"])
def test_an_answer_with_words_around_its_number_is_that_number(answer):
    for reply in ("82", "The answer is 82.", "37 + 45 = 82"):
        assert is_correct(reply, {**SUM, "answer": answer})
    assert not is_correct("83", {**SUM, "answer": answer}) and is_verifiable(answer)


@pytest.mark.parametrize("reply, answer", [
    ("3/20 = 0.15 = 15%", "15"), ("10 / 3 = 3.333 ≈ 3.33", "3.33"), ("200 ÷ 3 = 66.67 ≈ 67", "67"),
    ("x = 22/7 ≈ 3.14", "3.14"), ("2x = 144 = 72 * 2, so x = 72", "72"), ("7 * 8 = 56 = 50 + 6, 56 - 6 = 50", "50")])
def test_a_conversion_is_no_second_result(reply, answer):
    assert is_correct(reply, example("Work it out.", answer))


@pytest.mark.parametrize("question, reply, answer", [
    ("Take 5 from 10.", "10 - 5 = 5.", "5"), ("从10里拿走5还剩几？", "10 - 5等于5。", "5"),
    ("There are 5 kids and 25 apples. How many for each?", "25 / 5 = 5", "5"), ("Half of a dozen?", "12 - 6 = 6", "6"),
    ("Take 5 from 10.", "10 - 5 = 5, so 5 are left.", "5"), ("Nothing and 7?", "0 + 7 = 7", "7")])
def test_a_result_may_be_equal_to_the_last_operand(question, reply, answer):
    assert is_correct(reply, example(question, answer))


@pytest.mark.parametrize("reply", ["10 - 5 = 5 = 5", "10 - 5 = 5 - 5", "10 - 5 = 5, 5 left, 4 gone"])
def test_but_a_number_after_the_result_is_no_answer(reply):
    assert not is_correct(reply, example("Take 5 from 10.", "5"))


@pytest.mark.parametrize("reply", ["31加56等于86等于87", "31+56 = $86$ = $87$", "31 + 56 = (86) = 87",
                                   "31+56 = 86 equals 87", "31 + 56 = 86 = 87%", "= 86 = 87 = 87"])
def test_two_results_in_a_chain_are_none(reply):
    assert not is_correct(reply, example("What is 31 + 56?", "87")) and not is_correct(reply, SUM)


@pytest.mark.parametrize("answer, right, wrong", [("12/3 = 4", "4", "3"), ("1/2 = 0.5", "0.5", "2"),
                                                  ("x >= 3", "x >= 3", "x <= 3")])
def test_what_an_equation_in_an_answer_asks_for(answer, right, wrong):
    line = {**SUM, "answer": answer}
    assert is_verifiable(answer) and is_correct(right, line) and not is_correct(wrong, line)


@pytest.mark.parametrize("word", [".NET", "Yahoo!", "C++", "U.S.A", "What?"])
def test_a_word_may_hold_what_ends_a_sentence(word):
    line = example("Which one is it?", word)
    assert is_correct(f"It is {word}.", line) and not is_correct("It is Java.", line)


@pytest.mark.parametrize("text", ["(", "=", "1 = ", " ", "in ", "= 1", "answer is "])
@pytest.mark.slow
def test_long_input_takes_no_long_time(text):
    """60,000 characters take a second or two. A pattern that can split a row in many ways takes minutes."""
    began = time.process_time()
    for answer in ("Paris", "82", "3*4 = 12"):
        is_correct("in " + text * (60_000 // len(text)) + " Paris.", example("Where?", answer))
    is_verifiable(text * (60_000 // len(text)))
    assert time.process_time() - began < 30


@pytest.mark.parametrize("blank", ["", " ", "\n", "**"])
def test_a_blank_choice_does_not_count(blank):
    """Sets of three choices are often filled up to four."""
    line = example("What is the capital of France?", "Paris", ["London", blank])
    assert is_correct("It is Paris.", line) and not is_correct("It is London.", line)
    assert not is_correct("", line) and not is_correct("London or Paris", line)
    assert is_correct("It is Paris.", example("What is the capital of France?", "Paris", [blank]))


@pytest.mark.parametrize("row", ["in {}.", ": {}\n", "called {}.", "It's {}.", "= {};", "在{}。"])
def test_a_row_of_fragments_names_no_word(row):
    """Each of them would be read if it stood alone: without choices the rivals are unknown, but there are some."""
    line = example("Where does she live?", "Paris")
    assert is_correct(row.format("Paris"), line)
    for words in (["London", "Paris", "Rome"], ["Paris", "London"], ["London", "Paris"]):
        assert not is_correct(" ".join(map(row.format, words)), line)
    for reply in ("Of course! She lives in Paris.", "It's Paris. My pleasure!", "It's in Paris. By the Seine."):
        assert is_correct(reply, line)


@pytest.mark.parametrize("math", [r"$\boxed{%s}$", r"\(\boxed{%s}\)", r"\[\boxed{%s}\]", r"$$\boxed{%s}$$",
                                  "\\[\n\\boxed{%s}\n\\]", r"\boxed{%s}", r"$%s$", r"\(%s\)"])
@pytest.mark.parametrize("answer, same, other", [
    (r"2\sqrt{3}", r"2 \sqrt{3}", r"3\sqrt{2}"), (r"\sqrt{3}", r"\sqrt{3}", r"2\sqrt{3}"), (r"\pi", r"\pi", r"\Pi"),
    ("x + 1", "x+1", "x - 1"), (r"\frac{x}{2}", r"\dfrac{x}{2}", r"\frac{2}{x}"),
    (r"(1, x)", r"\left(1,x\right)", "(x, 1)"), ("Paris", "Paris", "London"), ("Yes", r"\text{Yes}", r"\text{No}"),
    (r"\text{Yes}", r"\textbf{Yes}", r"\textbf{No}"), (r"$\boxed{\mathrm{Yes}}$", "Yes", r"\mathrm{No}"),
    ("5", r"\textbf{5}", r"\textbf{6}")])
def test_latex_around_an_answer_does_not_matter(math, answer, same, other):
    line = example("Which is it?", answer)
    before = "The answer is " if "boxed" in math else ""  # in a sentence without a box, blanks count
    assert is_verifiable(answer) and is_correct(before + math % same, line)
    right, wrong = math % same, math % other
    for reply in (wrong, f"It is not {right}.", f"{right} is wrong.", f"{wrong} {right}"):
        assert not is_correct(reply, line), reply


BOXED_NUMBERS = [
    ("1/2", r"\frac12"), ("0.5", r"\frac12"), ("1/2", r"\dfrac{1}{2}"), ("1/2", r"\tfrac12"), ("1/2", r"\frac 12"),
    ("-1/2", r"\frac{-1}{2}"), ("-1/2", r"-\frac{1}{2}"), ("50%", r"50\%"), ("1000", "1{,}000"), ("1000", r"1,\!000"),
    ("1000", r"1\,000"), ("5", r"\$5"), ("5", r"5^\circ"), ("5", r"5^{\circ}"), ("5", r"5\text{ cm}"),
    ("5", r"5\,\mathrm{cm}"), ("5", r"5\text{ m}"), ("5", r"5\mbox{ square feet}")]


@pytest.mark.parametrize("answer, latex", BOXED_NUMBERS + [
    ("5", "5 cm"), ("5", "5cm"), ("5", "5 km/h"), ("5", "5 apples"), ("5", "5厘米"), ("5", "x = 5"),
    ("5", r"x \approx 5"), ("5", "2 + 3 = 5"), ("5", r"\text{5 cm}"), ("5", r"\left(5\right)"),
    ("3, 12, 45", r"3, 12\text{ and }45")])
def test_a_number_in_latex(answer, latex):
    for reply in (rf"\boxed{{{latex}}}", rf"The answer is $\boxed{{{latex}}}$.", f"It is ${latex}$.",
                  rf"\fbox{{{latex}}}"):
        assert is_correct(reply, example("How much?", answer)), reply


@pytest.mark.parametrize("answer, latex", BOXED_NUMBERS)
def test_a_number_in_latex_in_the_answer_field(answer, latex):
    for field in (latex, f"${latex}$", rf"So it is $\boxed{{{latex}}}$."):
        assert is_verifiable(field)
        line = example("How much?", field)
        assert is_correct(f"It is {answer}.", line) and not is_correct("It is 7.", line)


@pytest.mark.parametrize("answer, latex", [
    ("12", r"\frac12"), ("2", r"\frac12"), ("1/2", r"\frac{-1}{2}"), ("-1/2", r"-\frac{-1}{2}"), ("1/23", r"\frac123"),
    ("1/2", r"2\frac12"), ("0.5", r"50\%"), ("3, 4", r"3, \sqrt{4}"), ("5", r"5\pi"), ("5", "5x"), ("5", "5 x"),
    ("5", "5xyz"), ("5", "5pi"), ("5", r"5\sqrt{2}"), ("5", r"\sqrt{5}"), ("5", r"\sqrt[3]{5}"), ("5", "x^5"),
    ("5", "5^2"), ("5", "x_5"), ("5", "5 - x"), ("5", r"\frac{5}{x}"), ("5", r"\frac{x}{5}"), ("5", r"\log 5"),
    ("5", "5!"), ("5", "|5|"), ("5", r"x \ge 5"), ("5", r"x \neq 5")])
def test_a_part_of_a_formula_is_no_number(answer, latex):
    """Nor is the number the formula: what is right for one of them is wrong for the other."""
    for reply in (rf"\boxed{{{latex}}}", rf"The answer is $\boxed{{{latex}}}$.", f"${latex}$", rf"\[ y = {latex} \]"):
        assert not is_correct(reply, example("How much?", answer)), reply
    assert not is_correct(answer, example("How much?", latex))
    assert is_correct(rf"\boxed{{{latex}}}", example("How much?", latex))


@pytest.mark.parametrize("reply, right, wrong", [
    ("So x = - 5.", "-5", "5"), ("$x = - 5$", "-5", "5"), (r"\boxed{- \frac{3}{2}}", "-3/2", "3/2"),
    ("The answer is \u20115.", "-5", "5"), ("The answer is \ufe635.", "-5", "5"), ("负 5", "-5", "5"),
    ("零下5度", "-5", "5"),
    ("10 - 4 = 6", "6", "-6"), ("Answer:\n- 5", "5", "-5"),  # a minus between numbers, and the mark of a list
    ("共5万元。", "50000", "5"), ("5 thousand dollars", "5000", "5"), (r"\boxed{5万}", "50000", "5"),
    ("1.5 million", "1500000", "1.5"), ("5千克", "5", "5000"), ("50000", "5万元", "5"), ("5万3", "", "5"),
    ("The answer is 26 dozen.", "312", "26"),
    (r"\boxed{20\text{ cm}^2}", "20", "2"), (r"$20 \text{ cm}^2$", "20", "2"), ("The area is 20 cm^2.", "20", "2"),
    (r"\boxed{20}", r"20\text{ cm}^2", "20m^2"), ("She makes 18 dollars.", "18 dollars", "17 dollars"),
    ("一共18个。", "18个", "17个"), ("需要5小时。", "5小时", "6小时"), ("18", "18.", "17."), ("7 pm", "7 pm", "7 am"),
    ("是5日。", "5日", "5月"),
    ("10 Downing Street", "10 Downing Street", "11 Downing Street"), ("10", "", "10 Downing Street"),
    ("1. 3×4=12\n2. 12+5=17\n答：一共17个。", "17", "12"), ("(1) 3×4=12\n(2) 12+5=17\nThe answer is 17.", "17", "2"),
    ("Because $a<b$ we get $b-a>0$, so $x=5$.", "5", "0"), ("Since a<b and c>d, the answer is 5.", "5", "4"),
    ("<answer>5</answer>", "", "5"), ('<a href="x">5</a>', "", "5"), ("5<|im_end|>", "", "5"),
    (r"The roots are $x=1$ and $x=-2$, so the answer is $\boxed{1,-2}$.", "1,-2", "1,2"),
    ("First 3, then 12. The answer is 3, 12.", "3, 12", "12, 3"), ("The answer is 3, 12, 45, 46", "", "3, 12, 45"),
    (r"The answer is not \boxed{1,-2}", "", "1,-2"), ("1, 2 then 3, 4", "", "3, 4")])
def test_what_real_models_write(reply, right, wrong):
    """Signs that stand apart, scales, units and their powers, numbered steps, formulas with < and >, lists at the end.
    With right "" there is no answer that the reply commits to.
    """
    assert not right or is_correct(reply, example("How much?", right))
    assert not is_correct(reply, example("How much?", wrong))


@pytest.mark.parametrize("question, reply, right, wrong", [
    ("How many dozen eggs are 18 dozen and 8 dozen?", "18 dozen + 8 dozen = 26 dozen eggs.", "26", "312"),
    ("它卖了3万元和2万元，一共多少万元？", "一共5万元。", "5", "50000"), ("它卖了3万元和2万元，一共多少万元？", "5", "5万元", "50000")])
def test_a_scale_that_the_question_has_is_its_unit(question, reply, right, wrong):
    assert is_correct(reply, example(question, right)) and not is_correct(reply, example(question, wrong))


@pytest.mark.parametrize("text", [
    r"\boxed{", r"\boxed{5}", r"\text{", r"\text{a", r"\frac{1", r"\frac1", r"\(", "$a", "5 cm", "abc ", "个", r"^\circ",
    "{", r"5\,", r"\mathbf{5", r"\pi", "not $", r"not \(", "}$"])
@pytest.mark.slow
def test_long_latex_takes_no_long_time(text):
    began = time.process_time()
    for answer in ("Paris", "82", r"2\sqrt{3}"):
        for before, after in (("", ""), (r"\boxed{", "x}"), ("$", "5$")):
            is_correct(before + text * (30_000 // len(text)) + after, example("Where?", answer))
    is_verifiable(text * (30_000 // len(text)))
    assert time.process_time() - began < 30


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_answer_reward: `"The answer is 83."` -> `"The answer is 82 or 83."`. How much does it earn?
# 2. test_length_is_words_and_characters: `("a" * 13, 2)` -> `("a" * 25, 2)`. How long is a word of 25 letters?
