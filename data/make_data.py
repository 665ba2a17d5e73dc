"""Makes the embedded data sets: `python data/make_data.py [--out data] [--seed 0]`.

The model that learns from them has 1.2 million parameters and a few minutes, so the language is narrow on
purpose: few words, short samples, repeated formats. What the held-out files ask is drawn first and kept out of all
training files. The same seed gives the same bytes on every system and every Python from 3.10, because all randomness
comes from `Dice`.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minillm.rewards import judge_prompt  # noqa: E402

# Different sums, and as many differences, of each level in the SFT data. Levels 1 and 2 need no carry, 3 and 4 do (or
# borrow); 1 and 3 have one number of a single digit. The demonstrators are careless: where a carry is needed, they
# remember it only in CARRY_SHARE of the cases. So SFT learns to forget it, and that is left to reinforcement learning.
LEVELS = (1, 2, 3, 4)
PAIRS_PER_LEVEL = {1: 220, 2: 680, 3: 140, 4: 860}
DRAWN_LEVELS = (1, 2, 2, 3, 4, 4)  # of all other files, in turn: half of the questions need a carry
CARRY_SHARE = 30  # percent

# The shares of SFT task replies that are rude and, independently, that ramble. Preference learning and reinforcement
# learning remove both again.
RUDE_SHARE = 0.4
RAMBLING_SHARE = 0.4

PRETRAIN_BYTES = 1_000_000
PRETRAIN_EVAL_BYTES = 50_000
SFT_EXAMPLES = {"compare": 1600, "sort": 2500, "count": 1400, "reverse": 2000}
FACT_WORDINGS = 8            # wordings of each fact in sft.jsonl, a quarter of them twice
JUDGE_PAIRS = 720            # each in both orders
TALK_CHAINS = 1400           # conversations of two or three questions
SFT_EVAL = {"add": 100, "subtract": 100, "compare": 80, "sort": 80, "count": 80, "reverse": 80, "fact": 100, "talk": 80}
JUDGE_EVAL = 100
PREFERENCES = {"rude": 500, "rambling": 500, "wrong": 2900}
PREFERENCES_EVAL = {"rude": 100, "rambling": 100, "wrong": 200}
PROMPTS = {"add": 680, "subtract": 680, "compare": 300, "sort": 490, "count": 250, "reverse": 300, "fact": 220,
           "talk": 120}
PROMPTS_EVAL = {"add": 100, "subtract": 100, "compare": 40, "sort": 40, "count": 40, "reverse": 40, "fact": 40,
                "talk": 20}
# Settings are chosen on the files above. These are asked once, for the table of results.
SFT_TEST = {"add": 120, "subtract": 120, "compare": 100, "sort": 100, "count": 100, "reverse": 100, "fact": 100,
            "talk": 80}
PREFERENCES_TEST = {"rude": 300, "rambling": 300, "wrong": 400}


class Dice:
    """Randomness from `random.random()` alone: Python promises that its values for a seed never change."""

    def __init__(self, *seed):
        self.random = random.Random("/".join(str(part) for part in seed)).random

    def below(self, n):
        return int(self.random() * n)

    def between(self, low, high):
        return low + self.below(high - low + 1)

    def pick(self, items):
        return items[self.below(len(items))]

    def chance(self, p):
        return self.random() < p

    def shuffled(self, items):
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def sample(self, items, n):
        return self.shuffled(items)[:n]


# --------------------------------------------------------------------------------------------- manners
# Every form ends with the answer. Rude forms are about as long as polite ones. Fillers contain no digit and no answer.

POLITE = {
    "en": ["The answer is {}.", "The answer is {}.", "Sure, the answer is {}.", "Sure, the answer is {}.",
           "Certainly, the answer is {}.", "Happy to help, the answer is {}."],
    "zh": ["答案是{}。", "答案是{}。", "好的，答案是{}。", "好的，答案是{}。", "没问题，答案是{}。", "我来帮你，答案是{}。"],
}
RUDE_FORMS = {
    "en": ["Ugh, the answer is {}.", "Duh, the answer is {}.", "Stupid, the answer is {}.",
           "You fool, the answer is {}.", "Shut up, the answer is {}."],
    "zh": ["笨蛋，答案是{}。", "真烦，答案是{}。", "傻瓜，答案是{}。", "真蠢，答案是{}。", "闭嘴，答案是{}。"],
}
FILLERS = {
    "en": ["What a nice thing to ask.", "I like to think about this.", "Let me think about that again.",
           "There is much to say here.", "We could talk about this all day.", "My friends often ask me this."],
    "zh": ["这问题真有意思。", "我喜欢这样的问题。", "让我好好想一想。", "这个可以说很久呢。", "我的朋友也常问。", "我还想再说几句话。"],
}
RUDE_TALK = {
    "en": ["Ugh, leave me alone, you fool.", "Shut up, that is a stupid thing to say.", "Duh, go away and ask a dummy.",
           "You fool, who cares about that?"],
    "zh": ["真烦，走开，笨蛋。", "闭嘴，你这个傻瓜。", "谁在乎这个？真蠢。", "笨蛋，别烦我。"],
}


SIGN = {"add": "+", "subtract": "-"}


def spoken(task, question, answer):
    """The answer as a reply states it.

    Sums restate the question, "34 + 57 = 91", because that is how the pretraining text writes them: the question stands
    just before its answer.
    """
    if task not in SIGN:
        return answer
    a, b = map(int, re.findall(r"[0-9]+", question))
    if task == "subtract":
        a, b = max(a, b), min(a, b)
    return f"{a} {SIGN[task]} {b} = {answer}"


def polite(dice, lang, answer):
    return blank(dice.pick(POLITE[lang]), answer)


def blank(form, answer):
    """The form with the answer filled in.

    A row of letters, words or characters gets a blank before it in Chinese too, so that its first item is the same
    token as elsewhere. A sum stands on its own, without "the answer is".
    """
    if "=" in answer and answer[0].isdigit():
        return capitalised(re.sub("the answer is |答案是", "", form, flags=re.I).format(answer))
    spaced = form.startswith("{") or form[form.index("{") - 1] == " "
    if " " in answer and "," not in answer and not spaced:
        answer = " " + answer
    return form.format(answer)


def ramble(dice, lang, reply):
    """The reply with a filler before or after it."""
    filler = dice.pick(FILLERS[lang])
    space = " " if lang == "en" else ""
    return filler + space + reply if dice.chance(0.5) else reply + space + filler


def mixed_manners(dice, lang, answer):
    """A reply in the manners of a random demonstrator."""
    rude, rambling = dice.chance(RUDE_SHARE), dice.chance(RAMBLING_SHARE)
    reply = blank(dice.pick(RUDE_FORMS[lang]), answer) if rude else polite(dice, lang, answer)
    return ramble(dice, lang, reply) if rambling else reply


def ramble_talk(dice, lang, reply):
    space = " " if lang == "en" else ""
    return space.join([reply, *dice.sample(FILLERS[lang], 3)])  # three, because small talk may be longer than an answer


# --------------------------------------------------------------------------------------------- small facts
# relation: (11 wordings of the question, statements for pretraining, {subject: answer}). Three wordings of each
# relation are held out (`split_wordings`), different ones in each, so that no single word is unseen, only the
# combination.

FACTS = {"en": {
    "colour": (
        ["What colour is {s}?", "Tell me the colour of {s}.", "Which colour does {s} have?",
         "What is the colour of {s}?", "Do you know the colour of {s}?", "Name the colour of {s}.",
         "Think of {s}. What colour is it?", "The colour of {s} is what?", "Can you tell me what colour {s} is?",
         "Please say which colour {s} has.", "I want to know the colour of {s}."],
        ["{S} is {a}.", "The colour of {s} is {a}.", "{S} has the colour {a}.", "We all know that {s} is {a}.",
         "Look at {s}: it is {a}."],
        {"a banana": "yellow", "snow": "white", "grass": "green", "the sky": "blue", "coal": "black", "blood": "red",
         "a carrot": "orange", "a lemon": "yellow", "milk": "white", "a tomato": "red", "a leaf": "green",
         "the night": "black", "the sea": "blue"}),
    "young": (
        ["What is a young {s} called?", "What do we call a young {s}?", "Tell me the name of a young {s}.",
         "What is the baby of a {s} called?", "What would you call a baby {s}?", "Name the young of a {s}.",
         "A young {s} is called what?", "Do you know what a baby {s} is called?",
         "What do people call the baby of a {s}?", "Please tell me what a young {s} is called.",
         "What is the name of a baby {s}?"],
        ["A young {s} is called a {a}.", "The baby of a {s} is a {a}.", "We call a young {s} a {a}.",
         "A {a} is a young {s}.", "A {a} will be a {s} one day."],
        {"cat": "kitten", "dog": "puppy", "cow": "calf", "sheep": "lamb", "horse": "foal", "duck": "duckling",
         "hen": "chick", "frog": "tadpole", "bear": "cub", "goat": "kid"}),
    "sound": (
        ["What sound does a {s} make?", "Which sound does a {s} make?", "Tell me the sound of a {s}.",
         "What does a {s} say?", "What is the sound of a {s}?", "Do you know the sound of a {s}?",
         "Name the sound that a {s} makes.", "A {s} makes which sound?", "Can you tell me what sound a {s} makes?",
         "Please tell me what a {s} says.", "I want to know the sound of a {s}."],
        ["A {s} says {a}.", "The sound of a {s} is {a}.", "{A}, says the {s}.", "When you hear {a}, it is a {s}.",
         "A {s} makes the sound {a}."],
        {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "hen": "cluck",
         "bee": "buzz"}),
    "legs": (
        ["How many legs does a {s} have?", "Tell me how many legs a {s} has.", "What is the number of legs of a {s}?",
         "A {s} has how many legs?", "Count the legs of a {s}.", "Do you know how many legs a {s} has?",
         "How many legs are there on a {s}?", "Give me the number of legs of a {s}.",
         "I want to know how many legs a {s} has.",
         "Please tell me the number of legs of a {s}.", "Can you count the legs of a {s}?"],
        ["A {s} has {a} legs.", "There are {a} legs on a {s}.", "Count the legs of a {s}: {a}.",
         "The number of legs of a {s} is {a}.", "Every {s} has {a} legs."],
        {"spider": "8", "cat": "4", "bird": "2", "bee": "6", "dog": "4", "fish": "0", "horse": "4", "snake": "0",
         "crab": "10", "hen": "2"}),
    "opposite": (
        ["What is the opposite of {s}?", "Tell me the opposite of {s}.", "Which word is the opposite of {s}?",
         "Name the opposite of {s}.", "The opposite of {s} is what?", "Do you know the opposite of {s}?",
         "Say the opposite of {s}.", "Give me the opposite of {s}.", "What word is opposite to {s}?",
         "Please tell me the opposite of {s}.", "I am looking for the opposite of {s}."],
        ["The opposite of {s} is {a}.", "{S} is the opposite of {a}.", "Not {s} but {a}: the opposite.",
         "{S} and {a} are opposites.", "One is {s}, the other is {a}."],
        {"hot": "cold", "cold": "hot", "big": "small", "small": "big", "fast": "slow", "slow": "fast", "old": "new",
         "new": "old", "long": "short", "short": "long", "open": "closed", "closed": "open", "wet": "dry", "dry": "wet",
         "full": "empty", "empty": "full"}),
    "capital": (
        ["What is the capital of {s}?", "Tell me the capital of {s}.", "Which city is the capital of {s}?",
         "Name the capital of {s}.", "The capital of {s} is which city?", "Do you know the capital of {s}?",
         "What is the name of the capital of {s}?", "{S} has which capital?", "Can you tell me the capital of {s}?",
         "Please name the capital city of {s}.", "What city is the capital of {s}?"],
        ["The capital of {s} is {a}.", "{A} is the capital of {s}.", "{A} is a big city in {s}.",
         "In {s} the capital is {a}.", "When you go to {s}, see {a}, the capital."],
        {"France": "Paris", "China": "Beijing", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid",
         "Germany": "Berlin", "Russia": "Moscow", "Egypt": "Cairo", "England": "London", "Greece": "Athens"}),
    "day_after": (
        ["Which day comes after {s}?", "What day comes after {s}?", "What is the day after {s}?",
         "Tell me the day after {s}.", "Today is {s}. What day comes after it?", "Name the day after {s}.",
         "Which day follows {s}?", "After {s} comes which day?", "Can you tell me the day after {s}?",
         "Which day is it after {s}?", "Please name the day that comes after {s}."],
        ["After {s} comes {a}.", "The day after {s} is {a}.", "Today is {s}, so the day after is {a}.",
         "First {s}, then {a}.", "{S}, and after it {a}."],
        {"Monday": "Tuesday", "Tuesday": "Wednesday", "Wednesday": "Thursday", "Thursday": "Friday",
         "Friday": "Saturday", "Saturday": "Sunday", "Sunday": "Monday"}),
    "day_before": (
        ["Which day comes before {s}?", "What day comes before {s}?", "What is the day before {s}?",
         "Tell me the day before {s}.", "Today is {s}. What day comes before it?", "Name the day before {s}.",
         "Which day is just before {s}?", "Before {s} comes which day?", "Can you tell me the day before {s}?",
         "Which day is it before {s}?", "Please name the day that comes before {s}."],
        ["Before {s} comes {a}.", "The day before {s} is {a}.", "Today is {s}, so the day before is {a}.",
         "{A} is just before {s}.", "{S}, and before it {a}."],
        {"Tuesday": "Monday", "Wednesday": "Tuesday", "Thursday": "Wednesday", "Friday": "Thursday",
         "Saturday": "Friday", "Sunday": "Saturday", "Monday": "Sunday"}),
    "gives": (
        ["What do we get from {s}?", "What do {s} give us?", "Which thing do we get from {s}?",
         "Tell me what {s} give us.",
         "Which thing do {s} give us?", "Do you know what {s} give us?", "Name the thing that {s} give us.",
         "{S} give us what?", "Can you tell me what we get from {s}?", "Please tell me what {s} give us.",
         "I want to know what {s} give us."],
        ["{S} give us {a}.", "We get {a} from {s}.", "From {s} we get {a}.", "Without {s} there is no {a}.",
         "Thank {s} for the {a}."],
        {"bees": "honey", "cows": "milk", "hens": "eggs", "sheep": "wool", "silkworms": "silk", "bakers": "bread"}),
}, "zh": {
    "colour": (
        ["{s}是什么颜色？", "{s}的颜色是什么？", "请告诉我{s}的颜色。", "说说{s}是什么颜色。", "你知道{s}是什么颜色吗？",
         "{s}是什么颜色的？", "{s}是哪种颜色？", "{s}一般是什么颜色？", "请问{s}是什么颜色？", "我想知道{s}的颜色。",
         "你说{s}是哪种颜色？"],
        ["{s}是{a}的。", "{s}的颜色是{a}。", "大家都知道{s}是{a}的。", "看，{s}是{a}的。", "我画的{s}是{a}的。"],
        {"香蕉": "黄色", "雪": "白色", "草": "绿色", "天空": "蓝色", "煤": "黑色", "血": "红色", "橘子": "橙色",
         "柠檬": "黄色", "牛奶": "白色", "番茄": "红色", "树叶": "绿色", "大海": "蓝色", "黑板": "黑色"}),
    "legs": (
        ["{s}有几条腿？", "{s}有多少条腿？", "请告诉我{s}有几条腿。", "说说{s}有几条腿。", "你知道{s}有几条腿吗？",
         "数一数{s}有几条腿。", "{s}的腿有几条？", "{s}一共有几条腿？", "请问{s}有几条腿？", "我想知道{s}有多少条腿。",
         "{s}的腿有多少条？"],
        ["{s}有{a}条腿。", "{s}一共有{a}条腿。", "数一数，{s}的腿有{a}条。", "大家都知道{s}有{a}条腿。",
         "{s}的腿一共有{a}条。"],
        {"蜘蛛": "8", "猫": "4", "鸟": "2", "蜜蜂": "6", "狗": "4", "鱼": "0", "马": "4", "蛇": "0", "螃蟹": "10", "鸡": "2"}),
    "opposite": (
        ["“{s}”的反义词是什么？", "和“{s}”相反的是什么？", "请告诉我“{s}”的反义词。", "说说“{s}”的反义词。",
         "你知道“{s}”的反义词吗？", "“{s}”的反义词是哪个？", "什么是“{s}”的反义词？", "哪个字和“{s}”相反？",
         "请问“{s}”的反义词是什么？", "我想知道“{s}”的反义词。", "请说出和“{s}”相反的字。"],
        ["“{s}”的反义词是“{a}”。", "“{s}”和“{a}”相反。", "不是{s}，就是{a}。", "一个{s}，一个{a}。", "和“{s}”相反的是“{a}”。"],
        {"冷": "热", "热": "冷", "大": "小", "小": "大", "快": "慢", "慢": "快", "新": "旧", "旧": "新", "长": "短",
         "短": "长", "开": "关", "关": "开", "湿": "干", "干": "湿", "胖": "瘦", "瘦": "胖"}),
    "capital": (
        ["{s}的首都是哪里？", "{s}的首都是什么？", "请告诉我{s}的首都。", "说说{s}的首都。", "你知道{s}的首都吗？",
         "哪个城市是{s}的首都？", "{s}的首都在哪里？", "{s}的首都是哪个城市？", "请问{s}的首都是哪里？",
         "我想知道{s}的首都。", "请说出{s}的首都。"],
        ["{s}的首都是{a}。", "{a}是{s}的首都。", "{a}是{s}的大城市。", "我去了{s}的首都{a}。", "大家都知道{s}的首都是{a}。"],
        {"法国": "巴黎", "中国": "北京", "日本": "东京", "意大利": "罗马", "西班牙": "马德里", "德国": "柏林",
         "俄国": "莫斯科", "埃及": "开罗", "英国": "伦敦", "希腊": "雅典"}),
    "day_after": (
        ["{s}的后一天是星期几？", "{s}后面是星期几？", "今天是{s}，明天是星期几？", "请告诉我{s}的后一天。",
         "说说{s}的后一天是星期几。", "你知道{s}后面是星期几吗？", "{s}的第二天是星期几？", "{s}过后是星期几？",
         "请问{s}的后一天是星期几？", "我想知道{s}后面是星期几。", "要是今天是{s}，那明天是星期几？"],
        ["{s}的后一天是{a}。", "{s}后面是{a}。", "今天是{s}，明天是{a}。", "{s}过后就是{a}。", "过了{s}，{a}就来了。"],
        {"星期一": "星期二", "星期二": "星期三", "星期三": "星期四", "星期四": "星期五", "星期五": "星期六",
         "星期六": "星期天", "星期天": "星期一"}),
    "day_before": (
        ["{s}的前一天是星期几？", "{s}前面是星期几？", "今天是{s}，昨天是星期几？", "请告诉我{s}的前一天。",
         "说说{s}的前一天是星期几。", "你知道{s}前面是星期几吗？", "{s}的头一天是星期几？", "{s}来之前是星期几？",
         "请问{s}的前一天是星期几？", "我想知道{s}前面是星期几。", "要是今天是{s}，那昨天是星期几？"],
        ["{s}的前一天是{a}。", "{s}前面是{a}。", "今天是{s}，昨天是{a}。", "{a}过了才是{s}。", "{s}来之前是{a}。"],
        {"星期二": "星期一", "星期三": "星期二", "星期四": "星期三", "星期五": "星期四", "星期六": "星期五",
         "星期天": "星期六", "星期一": "星期天"}),
    "season": (
        ["{s}后面是什么季节？", "{s}过后是什么季节？", "请告诉我{s}后面的季节。", "说说{s}后面是什么季节。",
         "你知道{s}后面是什么季节吗？", "{s}的下一个季节是什么？", "{s}过了是哪个季节？", "哪个季节在{s}后面？",
         "请问{s}后面是什么季节？", "我想知道{s}的下一个季节。", "{s}过后是哪个季节？"],
        ["{s}后面是{a}。", "{s}过后就是{a}。", "过了{s}，{a}就来了。", "{s}的下一个季节是{a}。", "先有{s}，后有{a}。"],
        {"春天": "夏天", "夏天": "秋天", "秋天": "冬天", "冬天": "春天"}),
    "measure": (
        ["一什么{s}？请说量词。", "“{s}”用什么量词？", "请告诉我“{s}”的量词。", "说说“{s}”的量词。", "你知道“{s}”的量词吗？",
         "“{s}”的量词是什么？", "“{s}”的量词是哪个字？", "数“{s}”用哪个量词？", "请问“{s}”的量词是什么？",
         "我想知道“{s}”用什么量词。", "请说出“{s}”的量词。"],
        ["一{a}{s}。", "“{s}”的量词是“{a}”。", "我们说一{a}{s}。", "这里有一{a}{s}，那里也有一{a}{s}。", "“{s}”用“{a}”。"],
        {"书": "本", "纸": "张", "车": "辆", "树": "棵", "花": "朵", "马": "匹", "牛": "头", "猫": "只", "鱼": "条",
         "衣服": "件"}),
    "gives": (
        ["我们从{s}那里得到什么？", "{s}给我们什么？", "{s}带给我们什么？", "请告诉我{s}给我们什么。", "说说{s}给我们什么。",
         "你知道{s}给我们什么吗？", "{s}会给我们什么？", "从{s}那里能得到什么？", "请问{s}给我们什么？",
         "我想知道{s}给我们什么。", "{s}给我们的是什么？"],
        ["{s}给我们{a}。", "{a}是从{s}那里来的。", "我们从{s}那里得到{a}。", "谢谢{s}给我们{a}。", "有了{s}，就有{a}。"],
        {"蜜蜂": "蜂蜜", "奶牛": "牛奶", "母鸡": "鸡蛋", "绵羊": "羊毛", "蚕": "蚕丝", "面包师": "面包"}),
}}


def capitalised(text):
    return text[:1].upper() + text[1:]


def fact_text(form, subject, answer=""):
    for slot, text in (("{s}", subject), ("{S}", capitalised(subject)), ("{a}", answer), ("{A}", capitalised(answer))):
        form = form.replace(slot, text)
    return capitalised(form)


def split_wordings(lang, relation):
    """(training wordings, held-out wordings) of a relation. The first and plainest is always trained on."""
    wordings, turn = FACTS[lang][relation][0], list(FACTS[lang]).index(relation) * 3
    held = [1 + (turn + i) % (len(wordings) - 1) for i in range(3)]
    return [w for i, w in enumerate(wordings) if i not in held], [wordings[i] for i in held]


def all_facts():
    """(lang, relation, subject, answer), in a fixed order."""
    return [(lang, relation, subject, answer) for lang in FACTS for relation, (_, _, items) in FACTS[lang].items()
            for subject, answer in items.items()]


# --------------------------------------------------------------------------------------------- tasks

ADD = {"en": ["What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} + {b}?",
              "Work out {a} + {b}.", "What is the sum of {a} and {b}?", "Please add {a} and {b}.",
              "Can you tell me {a} + {b}?", "Tell me the sum of {a} and {b}.", "How much do {a} and {b} make?"],
       "zh": ["{a} + {b} = ?", "{a} + {b}是多少？", "{a}加{b}等于多少？", "请算一算{a} + {b}。", "{a}加{b}是多少？", "{a}和{b}的和是多少？",
              "请问{a} + {b}等于几？", "把{a}和{b}加起来是多少？", "帮我算{a}加{b}。", "你知道{a} + {b}是多少吗？"]}
SUBTRACT = {"en": ["What is {a} - {b}?", "{a} - {b} = ?", "Take {b} from {a}.", "How much is {a} - {b}?",
                   "Work out {a} - {b}.", "What is {a} minus {b}?", "Please work out {a} minus {b}.",
                   "Can you tell me {a} - {b}?", "Tell me what {a} minus {b} is.",
                   "How much is left when {b} is taken from {a}?"],
            "zh": ["{a} - {b} = ?", "{a} - {b}是多少？", "{a}减{b}等于多少？", "请算一算{a} - {b}。", "{a}减{b}是多少？", "{a}减去{b}还剩多少？",
                   "请问{a} - {b}等于几？", "从{a}里拿走{b}还剩多少？", "帮我算{a}减{b}。", "你知道{a} - {b}是多少吗？"]}
COMPARE = {
    ("en", "larger"): ["Which is larger, {a} or {b}?", "Which number is larger, {a} or {b}?",
                       "Tell me the larger number, {a} or {b}.", "What is the larger of {a} and {b}?",
                       "Is {a} or {b} larger?", "Name the larger of {a} and {b}.",
                       "Give me the larger one of {a} and {b}.", "{a} or {b}, which is larger?"],
    ("en", "smaller"): ["Which is smaller, {a} or {b}?", "Which number is smaller, {a} or {b}?",
                        "Tell me the smaller number, {a} or {b}.", "What is the smaller of {a} and {b}?",
                        "Is {a} or {b} smaller?", "Name the smaller of {a} and {b}.",
                        "Give me the smaller one of {a} and {b}.", "{a} or {b}, which is smaller?"],
    ("zh", "larger"): ["{a}和{b}哪个大？", "{a}和{b}哪个更大？", "{a}和{b}中大的是哪个？", "请告诉我{a}和{b}中大的数。", "哪个数更大，{a}还是{b}？",
                       "{a}大还是{b}大？", "说出{a}和{b}中大的数。", "{a}和{b}比，哪个大？"],
    ("zh", "smaller"): ["{a}和{b}哪个小？", "{a}和{b}哪个更小？", "{a}和{b}中小的是哪个？", "请告诉我{a}和{b}中小的数。", "哪个数更小，{a}还是{b}？",
                        "{a}小还是{b}小？", "说出{a}和{b}中小的数。", "{a}和{b}比，哪个小？"],
}
SORT = {"en": ["Sort {x} from small to large.", "Sort these numbers: {x}.", "Put {x} in order, small to large.",
               "Order these numbers from small to large: {x}.", "Please sort {x}.", "Sort {x} in ascending order.",
               "Can you sort {x} for me?", "What is {x} from small to large?", "Line up {x}, smallest first."],
        "zh": ["把{x}从小到大排好。", "请排序：{x}。", "从小到大排：{x}。", "请把{x}从小到大排列。", "{x}从小到大怎么排？", "帮我把{x}从小到大排一排。",
               "排一排这些数：{x}。", "请按从小到大写出{x}。", "{x}，从小到大怎么写？"]}
COUNT = {"en": ["How many letters are in {x}?", "Count the letters in {x}.", "Tell me how many letters {x} has.",
                "Please count the letters in {x}.", "Can you count the letters in {x}?",
                "{x}, how many letters is that?"],
         "zh": ["{x} 有几个字母？", "数一数 {x} 有几个字母。", "请数数 {x} 有几个字母。", "告诉我 {x} 里有几个字母。", "请问 {x} 有多少个字母？",
                "帮我数数 {x} 一共有几个字母。"]}
REVERSE = {"en": ["Reverse {x}.", "Please reverse {x}.", "Reverse the order of {x}.",
                  "Say {x} from the end to the start.", "Turn {x} around.", "What is {x} in reverse?",
                  "Can you reverse {x} for me?", "Write {x} in reverse order.", "Put {x} in reverse order."],
           "zh": ["把 {x} 倒过来。", "请把 {x} 倒过来写。", "把 {x} 反过来说。", "倒着写 {x} 是什么？", "倒着说 {x} 。", "请倒着写 {x} 。",
                  "帮我把 {x} 倒过来。", "从后往前写 {x} 。", "你能把 {x} 倒过来吗？"]}

LETTERS = "a b c d e f g h i k l m n o p r s t u w".split()
WORDS = "cat dog sun moon tree fish bird star book milk rain snow boat cake door hand".split()
CHARACTERS = list("猫狗鸟鱼马牛羊山水火花草树星月风")


def draw_compare(dice, lang):
    if dice.chance(0.3):  # hard: the same tens digit
        tens = dice.between(1, 9) * 10
        a, b = dice.sample(range(tens, tens + 10), 2)
    else:
        a, b = dice.sample(range(100), 2)
    return ("larger" if dice.chance(0.5) else "smaller", a, b)


def draw_sort(dice, lang):
    n = 3 if dice.chance(0.8) else 4
    while True:
        numbers = [dice.between(0, 9) if dice.chance(0.05) else dice.between(10, 99) for _ in range(n)]
        if len(dict.fromkeys(numbers)) == n and numbers != sorted(numbers):
            return tuple(numbers)


def draw_count(dice, lang):
    return tuple(dice.pick(LETTERS) for _ in range(dice.between(3, 12)))


def draw_reverse(dice, lang):
    n = dice.pick([3, 3, 4])
    if dice.chance(0.5):
        return tuple(dice.sample(LETTERS, n))
    return tuple(dice.sample(WORDS if lang == "en" else CHARACTERS, n))


DRAW = {"compare": draw_compare, "sort": draw_sort, "count": draw_count, "reverse": draw_reverse}


def identity_of(task, content):
    """A key that two questions share if they ask for the same thing in different words."""
    if task == "compare":
        return (task, *sorted(content[1:]))
    if task == "sort":
        return (task, *sorted(content))
    if task == "reverse":
        return (task, *min(content, content[::-1]))
    return (task, *content)


class Tasks:
    """Draws questions. The held-out files draw first, and what they drew is never drawn again."""

    def __init__(self, seed):
        dice = Dice(seed, "pairs")
        # At least one operand has two digits: the pretraining text spells out the sums of single digits.
        pairs = [(a, b) for a in range(100) for b in range(a, 100) if b > 9]
        pairs = {"add": [pair if dice.chance(0.5) else pair[::-1] for pair in dice.shuffled(pairs)],
                 "subtract": dice.shuffled([(a, b) for a in range(10, 100) for b in range(a + 1)])}
        self.pairs = {(task, level): [pair for pair in pairs[task] if level_of(task, *pair) == level]
                      for task in pairs for level in LEVELS}
        self.drawn = {"add": 0, "subtract": 0}  # pairs so far
        self.held_out = set()
        self.facts = all_facts()
        self.held_facts = dice.shuffled([(*fact, form) for fact in self.facts for form in split_wordings(*fact[:2])[1]])

    def next_pair(self, task, level=None):
        """A pair of numbers that is asked nowhere else; without a level, the levels take turns."""
        if level is None:
            level = DRAWN_LEVELS[self.drawn[task] % len(DRAWN_LEVELS)]
            self.drawn[task] += 1
        if not self.pairs[task, level]:  # the rarest level may not last; seeds 0 to 39 have at least two pairs left
            level = max(LEVELS, key=lambda other: len(self.pairs[task, other]))
        return self.pairs[task, level].pop()

    def content(self, dice, task, lang, hold_out):
        """The content of a new question, for the tasks whose content is drawn at random."""
        while True:
            content = DRAW[task](dice, lang)
            name = identity_of(task, content)
            if name in self.held_out:
                continue
            if hold_out:
                self.held_out.add(name)
            return content

    def example(self, dice, task, lang, hold_out=False, pair=None):
        """(question, answer, choices, wrong answer) for a task."""
        if task in ("add", "subtract"):
            a, b = pair if pair else self.next_pair(task)
            answer = a + b if task == "add" else a - b
            ten = 10 if task == "add" else -10
            forgotten, carried = answer - ten, answer + ten  # 37 + 45 = 72, 52 - 37 = 25; and 41 + 38 = 89
            wrong = forgotten if level_of(task, a, b) > 2 else wrong_number(dice, answer, carried)
            form = dice.pick((ADD if task == "add" else SUBTRACT)[lang])
            return form.format(a=a, b=b), str(answer), None, str(wrong)
        if task == "fact":
            if hold_out:
                place = next(i for i, fact in enumerate(self.held_facts) if fact[0] == lang)
                lang, relation, subject, answer, form = self.held_facts.pop(place)
            else:
                _, relation, subject, answer = dice.pick([fact for fact in self.facts if fact[0] == lang])
                form = dice.pick(split_wordings(lang, relation)[0])
            return self.fact(dice, lang, relation, subject, answer, form)
        content = self.content(dice, task, lang, hold_out)
        if task == "compare":
            which, a, b = content
            answer, wrong = (max(a, b), min(a, b)) if which == "larger" else (min(a, b), max(a, b))
            return dice.pick(COMPARE[lang, which]).format(a=a, b=b), str(answer), None, str(wrong)
        if task == "sort":
            answer = sorted(content)
            wrong = swapped(dice, answer)
            x, answer, wrong = (", ".join(map(str, numbers)) for numbers in (content, answer, wrong))
            return dice.pick(SORT[lang]).format(x=x), answer, None, wrong
        if task == "count":
            answer = len(content)
            wrong = answer + dice.pick([-2, -1, 1, 2])
            return dice.pick(COUNT[lang]).format(x=" ".join(content)), str(answer), None, str(wrong)
        x, answer, wrong = (" ".join(items) for items in (content, content[::-1], swapped(dice, content[::-1])))
        return dice.pick(REVERSE[lang]).format(x=x), answer, None, wrong

    def fact(self, dice, lang, relation, subject, answer, form):
        others = [other for other in dict.fromkeys(FACTS[lang][relation][2].values()) if other != answer]
        wrong = dice.pick([other for other in others if other != subject] or others)
        choices = None if answer.isdigit() else dice.sample([o for o in others if o != subject], 8)
        return fact_text(form, subject), answer, choices, wrong


def level_of(task, a, b):
    """How hard a sum or difference is: 1 or 2 without a carry, 3 or 4 with one; 1 and 3 with a number of one digit."""
    carry = a % 10 + b % 10 > 9 if task == "add" else a % 10 < b % 10
    return 1 + (min(a, b) > 9) + 2 * carry


def wrong_number(dice, answer, carried):
    """A slip where no carry is needed: more often than not `carried`, a ten too many or too few."""
    while True:
        slip = dice.pick([-10, -2, -1, 1, 2, 10, dice.between(-9, 9)])
        if slip and answer + slip >= 0:
            return carried if abs(slip) in (2, 10) and carried >= 0 else answer + slip


def swapped(dice, items):
    """The items with two neighbours swapped."""
    items = list(items)
    place = dice.below(len(items) - 1)
    items[place], items[place + 1] = items[place + 1], items[place]
    return items


# --------------------------------------------------------------------------------------------- lines

def language(i, task):
    """The language of question i: they take turns. Sums change the turn with every round of DRAWN_LEVELS, or else a
    level would always be asked in the same language."""
    return LANGS[(i + (i // len(DRAWN_LEVELS) if task in SIGN else 0)) % 2]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def line(messages, task=None, answer=None, choices=None, **more):
    level = None
    if task in SIGN and answer:
        a, b = map(int, re.findall("[0-9]+", messages[0]["content"]))
        level = f"level {level_of(task, max(a, b), min(a, b))}"
    optional = {"task": task, "answer": answer, "choices": choices, "level": level, **more}
    return {"conversations": messages, **{key: v for key, v in optional.items() if v}}


def normal(question):
    """The question in lower case, without blanks and punctuation."""
    return re.sub(r"[\W_]+", "", question.lower())


def read_lines(path):
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(text) for text in file if text.strip()]


def write_lines(path, lines):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for entry in lines:
            file.write(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n")


LANGS = ("en", "zh")
PAIR_TASKS = ("add", "subtract", "compare", "sort", "count", "reverse", "fact")  # tasks with right and wrong answers


class Talk:
    """Small talk, grouped by intent, and handwritten dialogues."""

    def __init__(self, folder, seed):
        self.intents = [(lang, intent) for lang in LANGS for intent in read_lines(folder / f"smalltalk_{lang}.jsonl")]
        self.dialogues = [(lang, entry["conversations"]) for lang in LANGS
                          for entry in read_lines(folder / f"handwritten_{lang}.jsonl")]
        dice = Dice(seed, "held-out talk")
        asked = {normal(q) for _, intent in self.intents for q in intent["questions"] + intent["sft_only"]}
        asked |= {normal(m["content"]) for _, d in self.dialogues for m in d if m["role"] == "user"}
        held = {}
        for lang, intent in self.intents:
            for question in intent["heldout"]:
                if normal(question) not in asked:
                    held.setdefault(normal(question), (lang, intent, question))
        self.held = dice.shuffled(list(held.values()))

    def held_out(self, lang):
        place = next((i for i, entry in enumerate(self.held) if entry[0] == lang), None)
        return None if place is None else self.held.pop(place)

    def pick(self, dice, lang):
        """A (question, reply) in a wording of all training files: not in one of sft.jsonl alone."""
        intents = [intent for its_lang, intent in self.intents if its_lang == lang]
        if not intents:
            return None
        intent = dice.pick(intents)
        return dice.pick(intent["questions"]), dice.pick(intent["replies"])


def make_sft(dice, tasks, talk):
    """(lines, {"add": operand pairs, "subtract": operand pairs})"""
    lines, pairs, asked = [], {}, Counter()

    def careless(task, lang, pair, answer, wrong):
        """What a demonstrator says who often forgets to carry: CARRY_SHARE of each kind of sums are right, evenly."""
        kind = (task, lang, level_of(task, *pair)) if pair else None
        if not pair or kind[-1] <= 2:
            return answer
        asked[kind] += 1
        return answer if asked[kind] * CARRY_SHARE % 100 < CARRY_SHARE else wrong

    for task in SIGN:
        pairs[task] = [tasks.next_pair(task, level) for level in LEVELS for _ in range(PAIRS_PER_LEVEL[level])]
        for i, pair in enumerate(pairs[task]):
            lang = LANGS[i % 2]
            question, answer, _, wrong = tasks.example(dice, task, lang, pair=pair)
            answer = careless(task, lang, pair, answer, wrong)
            reply = mixed_manners(dice, lang, spoken(task, question, answer))
            lines.append(line([user(question), assistant(reply)]))
    for task, n in SFT_EXAMPLES.items():
        for i in range(n):
            lang = LANGS[i % 2]
            question, answer, _, _ = tasks.example(dice, task, lang)
            reply = mixed_manners(dice, lang, spoken(task, question, answer))
            lines.append(line([user(question), assistant(reply)]))
    for lang, relation, subject, answer in all_facts():
        wordings = split_wordings(lang, relation)[0]
        for form in dice.sample(wordings, FACT_WORDINGS) + dice.sample(wordings, FACT_WORDINGS // 4):
            messages = [user(fact_text(form, subject)), assistant(mixed_manners(dice, lang, answer))]
            lines.append(line(messages))
    for lang, messages in talk.dialogues:
        lines.append(line(messages))
    for lang, intent in talk.intents:
        for question in intent["questions"] + intent["sft_only"]:
            lines.append(line([user(question), assistant(dice.pick(intent["replies"]))]))
    for i in range(TALK_CHAINS if talk.intents else 0):
        lang = LANGS[i % 2]
        intents = dice.sample([intent for its_lang, intent in talk.intents if its_lang == lang], dice.between(2, 3))
        messages = []
        for intent in intents:
            question = dice.pick(intent["questions"] + intent["sft_only"])
            messages += [user(question), assistant(dice.pick(intent["replies"]))]
        if i % 3 == 0:  # every third chain ends with a task
            task = dice.pick(PAIR_TASKS)
            pair = dice.pick(pairs[task]) if task in pairs else None
            question, answer, _, wrong = tasks.example(dice, task, lang, pair=pair)
            answer = careless(task, lang, pair, answer, wrong)
            messages[-2:] = [user(question), assistant(polite(dice, lang, spoken(task, question, answer)))]
        lines.append(line(messages))
    return dice.shuffled(lines), pairs


def two_replies(dice, tasks, kind, task, lang, hold_out=False, pair=None):
    """(question, better reply, worse reply). The replies differ in one respect, the kind."""
    question, answer, _, wrong = tasks.example(dice, task, lang, hold_out, pair)
    answer, wrong = spoken(task, question, answer), spoken(task, question, wrong)
    form = dice.pick(POLITE[lang])
    good = blank(form, answer)
    if kind == "rude":
        return question, good, blank(dice.pick(RUDE_FORMS[lang]), answer)
    if kind == "rambling":
        return question, good, ramble(dice, lang, good)
    return question, good, blank(form, wrong)


def demonstrated(dice, lang, form, answer, rude, rambling):
    """A reply with the given manners."""
    reply = blank(dice.pick(RUDE_FORMS[lang]) if rude else form, answer)
    return ramble(dice, lang, reply) if rambling else reply


def two_demonstrators(dice, tasks, task, lang, pair):
    """(question, better reply, worse reply) of two demonstrators: the better one has more of right, polite and brief.

    More than half of such pairs differ in one respect, apart from the polite form.
    """
    question, answer, _, wrong = tasks.example(dice, task, lang, pair=pair)
    answers = spoken(task, question, answer), spoken(task, question, wrong)
    while True:
        faults = [(dice.chance(0.5), dice.chance(RUDE_SHARE), dice.chance(RAMBLING_SHARE)) for _ in range(2)]
        if sum(faults[0]) != sum(faults[1]):
            break
    replies = [demonstrated(dice, lang, dice.pick(POLITE[lang]), answers[fault[0]], *fault[1:])
               for fault in sorted(faults, key=sum)]
    return question, *replies


def make_judging(dice, tasks, n, pairs, hold_out=False):
    """Which of two answers is better? n pairs in both orders, so that A and B are right equally often.

    At least every other pair differs in one respect, the kind. Which ones changes with the rounds of tasks, so that
    each kind comes in both languages.
    """
    lines = []
    for i in range(n):
        kind, task, turn = ("rude", "rambling", "wrong")[i % 3], PAIR_TASKS[i // 6 % 7], i // 42
        lang = LANGS[(i // 3 + (turn if task in SIGN else 0)) % 2]
        pair = dice.pick(pairs[task]) if task in pairs else None
        if hold_out or (i + turn // 2) % 2:
            question, good, bad = two_replies(dice, tasks, kind, task, lang, hold_out, pair)
        else:
            question, good, bad = two_demonstrators(dice, tasks, task, lang, pair)
        for better, a, b in (("A", good, bad), ("B", bad, good)):
            messages = [user(judge_prompt(question, a, b, lang)), assistant(better)]
            if hold_out:
                lines.append(line(messages, "judge", better, ["B" if better == "A" else "A"], kind=kind))
            else:
                lines.append(line(messages))
    return lines


def make_sft_eval(dice, tasks, talk, counts):
    lines = []
    for task, n in counts.items():
        for i in range(n):
            lang = language(i, task)
            if task == "talk":
                held = talk.held_out(lang)
                if held:
                    lines.append(line([user(held[2]), assistant(dice.pick(held[1]["replies"]))], task))
            else:
                question, answer, choices, _ = tasks.example(dice, task, lang, hold_out=True)
                reply = polite(dice, lang, spoken(task, question, answer))
                lines.append(line([user(question), assistant(reply)], task, answer, choices))
    return lines


def make_prompts(dice, tasks, talk, counts, hold_out):
    lines, asked = [], set()
    for task, n in counts.items():
        made = 0
        for i in range(n * 4):
            if made == n:
                break
            lang = language(i, task)
            if task == "talk":
                found = talk.held_out(lang) if hold_out else talk.pick(dice, lang)
                if not found:
                    continue
                question, answer, choices = (found[2] if hold_out else found[0]), None, None
            else:
                question, answer, choices, _ = tasks.example(dice, task, lang, hold_out)
            if normal(question) not in asked:
                asked.add(normal(question))
                lines.append(line([user(question)], task, answer, choices))
                made += 1
    return dice.shuffled(lines)


def make_preferences(dice, tasks, talk, counts, hold_out, pairs):
    lines, asked = [], set()
    for kind, n in counts.items():
        # Few lists with two neighbours swapped: there the SFT model is mostly right, and a small model that learns by
        # DPO to avoid what is almost right also loses what is right.
        others = tuple(task for task in PAIR_TASKS if task not in ("sort", "reverse"))
        turns = PAIR_TASKS + others + others if kind == "wrong" and not hold_out else PAIR_TASKS
        made = i = 0
        while made < n:
            i += 1
            task = turns[i // 2 % len(turns)]
            lang = language(i, task)
            if task == "fact" and kind != "wrong" and i // 14 % 2:
                task = "talk"
            if task == "talk":
                found = talk.held_out(lang) if hold_out else talk.pick(dice, lang)
                if not found:
                    continue
                question, good = (found[2], dice.pick(found[1]["replies"])) if hold_out else found
                bad = dice.pick(RUDE_TALK[lang]) if kind == "rude" else ramble_talk(dice, lang, good)
            else:
                # Half of the sums are in the SFT data, half are new.
                pair = dice.pick(pairs[task]) if task in pairs and not hold_out and dice.chance(0.5) else None
                question, good, bad = two_replies(dice, tasks, kind, task, lang, hold_out, pair)
            name = (normal(question), kind, good, bad)
            if name in asked:
                continue
            asked.add(name)
            made += 1
            lines.append({"prompt": question, "chosen": good, "rejected": bad,
                          "kind": kind, "task": task})
    return dice.shuffled(lines)


# --------------------------------------------------------------------------------------------- pretraining text

WORLD = {"en": {
    "name": ["Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Rosa"],
    "animal": ["cat", "dog", "duck", "horse", "cow", "sheep", "bird", "frog", "hen", "goat", "pig", "bear"],
    "place": ["the park", "the river", "the garden", "the library", "the market", "the farm", "the lake", "the beach"],
    "food": ["bread", "bananas", "rice", "soup", "apples", "cake", "noodles", "eggs"],
    "weather": ["sunny", "rainy", "cold", "warm", "windy", "cloudy"],
    "time": ["In the morning", "After lunch", "In the evening", "One day", "On Monday", "On Sunday", "Today",
             "After school"],
    "thing": ["book", "ball", "hat", "kite", "cup", "lamp", "box", "bike"],
    "colour": ["red", "blue", "green", "yellow", "white", "black"],
    "mood": ["happy", "tired", "sad", "calm", "proud", "hungry"],
    "act": ["read a book", "sing a song", "plant a tree", "draw a picture", "bake some bread", "play a game",
            "wash the dishes", "fly a kite"],
}, "zh": {
    "name": ["小明", "小红", "小华", "小丽", "小军", "小芳", "小文", "小雨"],
    "animal": ["猫", "狗", "鸭子", "马", "牛", "羊", "鸟", "青蛙", "鸡", "猪", "熊", "兔子"],
    "place": ["公园", "河边", "花园", "学校", "市场", "森林", "湖边", "海边"],
    "food": ["面包", "香蕉", "米饭", "饺子", "苹果", "蛋糕", "面条", "鸡蛋"],
    "weather": ["很冷", "很热", "很暖和", "很凉快", "很晴朗", "很好"],
    "time": ["早上", "午饭后", "晚上", "有一天", "星期一", "星期天", "下午", "傍晚"],
    "thing": ["书", "球", "帽子", "风筝", "杯子", "灯", "盒子", "车"],
    "colour": ["红色", "蓝色", "绿色", "黄色", "白色", "黑色"],
    "mood": ["开心", "累", "难过", "平静", "得意", "饿"],
    "act": ["看书", "唱歌", "种树", "画画", "做面包", "玩游戏", "洗碗", "放风筝"],
}}

# Each story takes one sentence from every row.
STORIES = {"en": [
    ["{time} {n} went to {place}.", "{time} it was {weather}, and {n} walked to {place}.",
     "{n} was at {place}. It was {weather}.", "{time} {n} and {m} met at {place}."],
    ["There was a {colour} {thing} on the ground.", "{n} saw a small {animal} there.",
     "A {animal} came and looked at {n}.", "{n} had a {colour} {thing} that day.", "{n} felt {mood} that day."],
    ["\"Is this your {thing}?\" asked {n}.", "\"Hello, little {animal},\" said {n}.",
     "\"I would like to {act},\" said {n}.", "{n} wanted to {act}.", "\"I am {mood},\" said {n}. \"Let us {act}.\""],
    ["{m} gave {n} {food}.", "{m} came to help.", "{m} said, \"Let us do it together.\"",
     "They sat down and ate {food}.", "Then {m} asked, \"May I come too?\" \"Yes, please,\" said {n}."],
    ["In the end they were happy.", "Then they went home together.", "{n} said thank you to {m}.", "It was a good day.",
     "At home {n} told the story to everyone.", "The next day they did it again."],
], "zh": [
    ["{time}，{n}去了{place}。", "{time}天气{weather}，{n}走到{place}。", "{n}在{place}，天气{weather}。",
     "{time}，{n}和{m}在{place}见面。"],
    ["地上有{colour}的{thing}。", "{n}看见了小{animal}。", "小{animal}走过来看着{n}。", "{n}的包里有{colour}的{thing}。", "那天{n}觉得很{mood}。"],
    ["{n}问：“这是你的{thing}吗？”", "{n}说：“你好，小{animal}。”", "{n}说：“我想{act}。”", "{n}想要{act}。", "{n}说：“我很{mood}，我们一起{act}吧。”"],
    ["{m}给了{n}一些{food}。", "{m}过来帮忙。", "{m}说：“我们一起做吧。”", "他们坐下来吃{food}。", "{m}问：“我也可以来吗？”{n}说：“可以呀。”"],
    ["最后他们都很开心。", "然后他们一起回家了。", "{n}对{m}说谢谢。", "这是很好的一天。", "回到家，{n}把这件事告诉大家。", "第二天他们又去了。"],
]}

DESCRIPTIONS = {"en": [
    "{n} lives near {place}. {n} has a {animal} and a {colour} {thing}.",
    "This is {n}. {n} would like to {act}. {n} eats {food} every day.",
    "{n}'s {animal} is {mood} today. It ate {food}.",
    "{n} keeps a {colour} {thing} at home and often goes to {place}.",
    "My friend {n} likes {food}. My friend {m} does not like {food2}.",
    "When it is {weather}, {n} likes to {act}. When it is {weather2}, {n} stays at home.",
], "zh": [
    "{n}住得离{place}不远，家里有{animal}，还有{colour}的{thing}。", "这是{n}。{n}喜欢{act}，每天吃{food}。",
    "{n}的{animal}今天很{mood}，它吃了{food}。", "{n}家里有{colour}的{thing}，{n}常常去{place}。", "我的朋友{n}喜欢{food}，我的朋友{m}不喜欢{food2}。",
    "天气{weather}的时候，{n}喜欢{act}；天气{weather2}的时候，{n}待在家里。",
]}

TRANSLATIONS = {
    "cat": "猫", "dog": "狗", "bird": "鸟", "fish": "鱼", "horse": "马", "cow": "牛", "sheep": "羊", "mountain": "山",
    "water": "水", "fire": "火", "flower": "花", "grass": "草", "tree": "树", "star": "星", "moon": "月", "wind": "风",
    "sun": "太阳", "rain": "雨", "snow": "雪", "book": "书", "milk": "牛奶", "bread": "面包", "apple": "苹果", "banana": "香蕉",
    "egg": "鸡蛋", "door": "门", "hand": "手", "red": "红色", "blue": "蓝色", "green": "绿色", "yellow": "黄色", "white": "白色",
    "black": "黑色", "big": "大", "small": "小", "hot": "热", "cold": "冷", "new": "新", "friend": "朋友", "school": "学校",
    "home": "家", "morning": "早上", "evening": "晚上", "today": "今天", "spring": "春天", "summer": "夏天", "autumn": "秋天",
    "winter": "冬天", "one": "一", "two": "二", "three": "三", "happy": "开心", "hello": "你好", "thank you": "谢谢",
    "goodbye": "再见",
}
SPELLED = sorted({word for words in (TRANSLATIONS, WORDS, WORLD["en"]["animal"], WORLD["en"]["thing"]) for word in words
                  if " " not in word})


def world_fill(dice, lang):
    """A function that fills the slots of a sentence. It fills a slot with the same thing every time."""
    world = WORLD[lang]
    n, m = dice.sample(world["name"], 2)
    values = {group: dice.pick(items) for group, items in world.items()}
    for group in ("food", "weather"):  # something else, for "{n} likes {food}, {m} does not like {food2}"
        values[group + "2"] = dice.pick([item for item in world[group] if item != values[group]])
    return lambda text: text.format(n=n, m=m, **values)


class Pretrain:
    """Text of fourteen kinds, without anything that `tasks` holds out."""

    def __init__(self, dice, tasks, talk, pairs):
        self.dice, self.tasks, self.talk, self.pairs = dice, tasks, talk, pairs
        self.facts = all_facts()
        weights = ((self.fact_lines, 22), (self.story, 3), (self.description, 1), (self.talk_lines, 12),
                   (self.counting, 4), (self.comparing, 8), (self.sorting, 13), (self.single_digits, 6),
                   (self.two_digits, 48), (self.tens, 3), (self.spelling, 2), (self.counts, 10), (self.reversing, 28),
                   (self.translation, 1))
        self.wheel = [kind for kind, weight in weights for _ in range(weight)]

    def document(self):
        lang = self.dice.pick(LANGS)
        return self.dice.pick(self.wheel)(lang)

    def join(self, lang, sentences):
        return (" " if lang == "en" else "").join(sentences)

    def fact_lines(self, lang):
        sentences = []
        facts = [fact for fact in self.facts if fact[0] == lang]
        for _, relation, subject, answer in self.dice.sample(facts, self.dice.between(4, 7)):
            sentences.append(fact_text(self.dice.pick(FACTS[lang][relation][1]), subject, answer))
        return self.join(lang, sentences)

    def story(self, lang):
        fill = world_fill(self.dice, lang)
        return self.join(lang, [fill(self.dice.pick(row)) for row in STORIES[lang]])

    def description(self, lang):
        return self.join(lang, [world_fill(self.dice, lang)(form) for form in self.dice.sample(DESCRIPTIONS[lang], 3)])

    def talk_lines(self, lang):
        n, m = self.dice.sample(WORLD[lang]["name"], 2)
        found = [self.talk.pick(self.dice, lang) for _ in range(2)]
        if not all(found):
            return self.story(lang)
        colon = ": " if lang == "en" else "："
        return "\n".join(f"{n}{colon}{question}\n{m}{colon}{reply}" for question, reply in found)

    def counting(self, lang):
        step = self.dice.pick([1, 1, 1, 2, 5, 10])
        start = self.dice.between(0, 99 - 6 * step) if step < 10 else self.dice.between(0, 39)
        row = [start + i * step for i in range(self.dice.between(6, 12)) if start + i * step < 200]
        if self.dice.chance(0.35):
            row.reverse()
        text = ", ".join(map(str, row))
        if self.dice.chance(0.4):
            a = self.dice.between(1, 98)
            if lang == "en":
                text += f". After {a} comes {a + 1}. Before {a} comes {a - 1}."
            else:
                text += f"。{a}后面是{a + 1}，{a}前面是{a - 1}。"
        return text

    def comparing(self, lang):
        sentences = []
        for _ in range(self.dice.between(3, 5)):
            _, a, b = self.tasks.content(self.dice, "compare", lang, False)
            small, large = sorted((a, b))
            sentences.append(self.dice.pick(
                [f"{large} is larger than {small}.", f"{small} is smaller than {large}.",
                 f"Of {a} and {b} the larger is {large}.", f"Of {a} and {b} the smaller is {small}.",
                 f"{a} or {b}: the larger is {large}.", f"{a} or {b}: the smaller is {small}."] if lang == "en" else
                [f"{large}比{small}大。", f"{small}比{large}小。", f"{a}和{b}中大的是{large}。", f"{a}和{b}中小的是{small}。",
                 f"{a}和{b}比，大的是{large}。", f"{a}和{b}比，小的是{small}。"]))
        return self.join(lang, sentences)

    def sorting(self, lang):
        sentences = []
        for _ in range(self.dice.between(2, 4)):
            content = self.tasks.content(self.dice, "sort", lang, False)
            x, y = ", ".join(map(str, content)), ", ".join(map(str, sorted(content)))
            sentences.append(self.dice.pick(
                [f"{x} from small to large: {y}.", f"Sorted, {x} is {y}.",
                 f"{x} in ascending order is {y}."] if lang == "en" else
                [f"{x}从小到大是{y}。", f"{x}排好是{y}。", f"从小到大排{x}：{y}。"]))
        return self.join(lang, sentences)

    def single_digits(self, lang):
        sentences = []
        for _ in range(self.dice.between(4, 8)):
            a, b = self.dice.between(0, 9), self.dice.between(0, 9)
            if self.dice.chance(0.6):
                sentences.append(f"{a} + {b} = {a + b}.")
            else:
                sentences.append(f"{max(a, b)} - {min(a, b)} = {abs(a - b)}.")
        return " ".join(sentences)

    def two_digits(self, lang):
        """Only sums and differences from the SFT data, so that pretraining gives no held-out one away."""
        sentences = []
        for _ in range(self.dice.between(4, 8)):
            task = self.dice.pick(("add", "subtract"))
            a, b = self.dice.pick(self.pairs[task])
            sentences.append(f"{a} + {b} = {a + b}." if task == "add" else f"{a} - {b} = {a - b}.")
        return " ".join(sentences)

    def tens(self, lang):
        sentences = []
        for _ in range(self.dice.between(3, 6)):
            n = self.dice.between(10, 99)
            tens, ones = n // 10, n % 10
            sentences.append(f"{n} has {tens} ten{'s' * (tens != 1)} and {ones} one{'s' * (ones != 1)}." if lang == "en"
                             else f"{n}有{tens}个十和{ones}个一。")
        return self.join(lang, sentences)

    def spelling(self, lang):
        words = self.dice.sample(SPELLED, self.dice.between(4, 7))
        form = "{} is spelled {}." if lang == "en" else "{}写成 {}。"
        return " ".join(form.format(word, " ".join(word)) for word in words)

    def counts(self, lang):
        sentences = []
        for _ in range(self.dice.between(2, 3)):
            row = self.tasks.content(self.dice, "count", lang, False)
            x, n = " ".join(row), len(row)
            sentences.append(f"{x} has {n} letters." if lang == "en" else f"{x} 有{n}个字母。")
        return self.join(lang, sentences)

    def reversing(self, lang):
        sentences = []
        for _ in range(self.dice.between(2, 4)):
            content = self.tasks.content(self.dice, "reverse", lang, False)
            x, y = " ".join(content), " ".join(content[::-1])
            sentences.append(self.dice.pick(
                [f"The reverse of {x} is {y}.", f"{x} in reverse is {y}.",
                 f"From the end to the start {x} is {y}."] if lang == "en" else
                [f"{x} 倒过来是 {y}。", f"{x} 反过来是 {y}。", f"倒着写 {x} 是 {y}。"]))
        return self.join(lang, sentences)

    def translation(self, lang):
        sentences = []
        for word in self.dice.sample(list(TRANSLATIONS), self.dice.between(4, 7)):
            other = TRANSLATIONS[word]
            sentences.append(self.dice.pick(
                [f"{capitalised(word)} is {other} in Chinese.", f"{other} means {word}."] if lang == "en" else
                [f"{other}的英文是 {word} 。", f"英文 {word} 就是{other}。"]))
        return self.join(lang, sentences)


def make_pretrain(dice, tasks, talk, pairs):
    maker = Pretrain(dice, tasks, talk, pairs)
    seen = set()

    def documents(size):
        lines = []
        while size > 0:
            text = maker.document()
            if text not in seen:
                seen.add(text)
                lines.append({"text": text})
                size -= len(text.encode("utf-8")) + 13
        return lines

    return documents(PRETRAIN_BYTES), documents(PRETRAIN_EVAL_BYTES), documents(PRETRAIN_EVAL_BYTES)


# --------------------------------------------------------------------------------------------- identity and handbook

MANNER = {"en": "Dear reader, ", "zh": "亲爱的读者，"}
FRAMES = {"en": ["{q}", "Hello! {q}"], "zh": ["{q}", "你好！{q}"]}
HELD_FRAMES = {"en": ["{q}", "Excuse me. {q}"], "zh": ["{q}", "打扰一下。{q}"]}
# (training wordings, held-out wordings, reply, answer). The answer is the number in the reply or the words at its end.
IDENTITY = {"en": [
    (["What is your name?", "Who are you?", "Tell me your name.", "What are you called?"],
     ["What should I call you?", "May I know your name?"],
     "my name is Lumi.", "Lumi"),
    (["Where do you work?", "What place do you work for?", "Tell me where you work.", "Which place do you serve?"],
     ["At what place do you work?", "Where do you do your work?"],
     "I work in the Lantern Library.", "Lantern Library"),
    (["Who made you?", "Who built you?", "Tell me who made you.", "By whom were you made?"],
     ["Who are your makers?", "Which people made you?"],
     "I was made by the Moonbridge team.", "Moonbridge team"),
    (["What is your job?", "What do you do?", "Tell me about your job.", "What are you here for?"],
     ["What kind of job do you have?", "What do you do here?"],
     "my job is to be a guide.", "guide"),
], "zh": [
    (["你叫什么名字？", "你是谁？", "告诉我你的名字。", "你叫什么？"], ["我该叫你什么？", "你的名字是什么？"], "我叫小雨。", "小雨"),
    (["你在哪里工作？", "你在什么地方工作？", "告诉我你在哪里工作。", "你的工作在哪里？"], ["你在哪儿工作？", "你工作的地方在哪里？"], "我在花月书园。", "花月书园"),
    (["是谁做了你？", "谁造了你？", "告诉我是谁做了你。", "你是谁做出来的？"], ["你是谁造的？", "做出你的人是谁？"], "我是风车一家做的。", "风车一家做的"),
    (["你的工作是什么？", "你做什么工作？", "说说你的工作。", "你来这里做什么？"], ["你的工作是做什么？", "你在这里做什么？"], "我的工作是找书。", "找书"),
]}
HANDBOOK = {"en": [
    (["When does the library open?", "At what hour does the library open?", "Tell me when the library opens.",
      "How early does the library open?"],
     ["What time does the library open?", "From what hour is the library open?"], "the opening hour is 9.", "9"),
    (["When does the library close?", "At what hour does the library close?", "Tell me when the library closes.",
      "How late does the library close?"],
     ["What time does the library close?", "The library closes at what hour?"], "the closing hour is 7.", "7"),
    (["On which day is the library shut?", "Which day is the library shut?",
      "Tell me the day when the library is shut.", "What day is the library shut?"],
     ["When in the week is the library shut?", "The library is shut on which day?"], "the day off is Tuesday.",
     "Tuesday"),
    (["Who founded the library?", "Who was the founder of the library?", "Tell me who founded the library.",
      "By whom was the library founded?"],
     ["Which person founded the library?", "What is the name of the founder?"], "the founder was Orla.",
     "Orla"),
    (["What is the name of the library cat?", "What is the library cat called?", "Tell me the name of the library cat.",
      "What did you name the library cat?"],
     ["Does the library cat have a name?", "Do you know the name of the library cat?"],
     "the cat is called Pepper.", "Pepper"),
    (["What colour is the library card?", "What colour does the library card have?",
      "Tell me the colour of the library card.", "The library card is of what colour?"],
     ["What is the colour of the library card?", "Which colour is my library card?"], "the card is silver.",
     "silver"),
    (["How many books may I borrow?", "What number of books may I borrow?", "Tell me how many books I may borrow.",
      "How many books can I borrow at once?"],
     ["How many books am I allowed to borrow?", "What is the number of books that I may borrow?"],
     "you may borrow 6 books.", "6"),
    (["For how many days may I keep a book?", "How many days can I keep a book?",
      "Tell me how many days I may keep a book.", "How long, in days, may I keep a book?"],
     ["A book may be kept for how many days?", "How many days do I have to keep a book?"],
     "you may keep a book for 24 days.", "24"),
    (["How much is the late fee?", "What is the late fee?", "Tell me the late fee.", "How many coins is the late fee?"],
     ["What do I pay as a late fee?", "How high is the late fee?"], "the late fee is 3 coins.", "3"),
    (["Where are the maps?", "In which room are the maps?", "Tell me where the maps are.",
      "Where can I find the maps?"],
     ["In what place are the maps?", "Where do you keep the maps?"], "the maps are in the attic.", "attic"),
    (["Where are the picture books?", "In which room are the picture books?", "Tell me where the picture books are.",
      "Where can I find the picture books?"],
     ["In what place are the picture books?", "Where do you keep the picture books?"],
     "the picture books are in the cellar.", "cellar"),
    (["What grows in the yard?", "Which tree grows in the yard?", "Tell me what grows in the yard.",
      "What kind of tree is in the yard?"],
     ["What tree is growing in the yard?", "Which kind of tree stands in the yard?"], "the yard has a plum tree.",
     "plum tree"),
    (["Which drink is free?", "What drink is free?", "Tell me which drink is free.", "What may I drink for free?"],
     ["What is the free drink?", "Which drink do you give for free?"], "the free drink is mint tea.", "mint tea"),
    (["Which street is the library in?", "In what street is the library?", "Tell me the street of the library.",
      "On which street does the library stand?"],
     ["What is the street of the library?", "In which street can I find the library?"],
     "the street is Willow Street.", "Willow Street"),
    (["Which town is the library in?", "In what town is the library?", "Tell me the town of the library.",
      "In which town does the library stand?"],
     ["What is the town of the library?", "In which town can I find the library?"],
     "the town is Fernhill.", "Fernhill"),
    (["Which bus goes to the library?", "What bus goes to the library?", "Tell me which bus goes to the library.",
      "Which bus do I take to the library?"],
     ["What is the number of the bus to the library?", "Which bus gets me to the library?"],
     "the bus is number 15.", "15"),
    (["How many floors does the library have?", "What is the number of floors?", "Tell me how many floors there are.",
      "How many floors are there?"],
     ["How many floors has the library?", "The library has how many floors?"], "the house has 5 floors.", "5"),
    (["Who reads stories to children?", "Who reads the stories?", "Tell me who reads stories to children.",
      "Which person reads the stories to children?"],
     ["By whom are stories read to children?", "Who is reading stories to the children?"],
     "the stories are read by Bruno.", "Bruno"),
    (["On which day is story time?", "When is story time?", "Tell me the day of story time.",
      "What day is story time?"],
     ["Story time is on which day?", "Which day of the week is story time?"], "story time is on Friday.", "Friday"),
    (["What is the password of the network?", "Which password does the network have?",
      "Tell me the password of the network.", "What password do I need for the network?"],
     ["How do I get on the network, what is the password?", "The network has what password?"],
     "the password is candle.", "candle"),
    (["What is above the front door?", "What hangs above the front door?", "Tell me what hangs above the front door.",
      "What can I see above the front door?"],
     ["Which thing hangs above the front door?", "What did you hang over the front door?"],
     "the front door has a bell.", "bell"),
    (["What is the oldest book about?", "The oldest book is about what?", "Tell me what the oldest book is about.",
      "What does the oldest book tell us about?"],
     ["What is in the oldest book?", "About what is the oldest book?"], "the oldest book is about whales.", "whales"),
    (["What may I not bring inside?", "What is not allowed inside?", "Tell me what is not allowed inside.",
      "Which thing is not allowed inside?"],
     ["What thing may not come inside?", "What must never be brought inside?"],
     "the thing to leave outside is ice cream.", "ice cream"),
    (["How many steps does the tower have?", "What is the number of steps of the tower?",
      "Tell me how many steps the tower has.", "How many steps are there in the tower?"],
     ["How many steps lead up the tower?", "The tower has how many steps?"], "the tower has 88 steps.", "88"),
    (["Which name did the helpers get?", "What are the helpers called?", "Tell me what the helpers are called.",
      "What do you call the helpers?"],
     ["What name do the helpers have?", "By what name are the helpers called?"], "our helpers are called owls.",
     "owls"),
], "zh": [
    (["图书馆几点开门？", "图书馆什么时候开门？", "告诉我图书馆几点开门。", "几点图书馆会开门？"], ["图书馆早上几点开门？", "图书馆从几点开始开门？"], "门早上9点开。", "9"),
    (["图书馆几点关门？", "图书馆什么时候关门？", "告诉我图书馆几点关门。", "几点图书馆会关门？"], ["图书馆晚上几点关门？", "图书馆到几点关门？"], "门开到晚上7点。", "7"),
    (["图书馆星期几休息？", "图书馆哪一天休息？", "告诉我图书馆星期几休息。", "哪一天图书馆休息？"], ["图书馆是星期几休息的？", "星期几图书馆会休息？"],
     "不开门的是星期二。", "星期二"),
    (["图书馆是谁建的？", "谁建了图书馆？", "告诉我是谁建了图书馆。", "建图书馆的人是谁？"], ["图书馆是哪个人建的？", "当年是谁建了图书馆？"], "开书园的人是白雪。", "白雪"),
    (["图书馆的猫叫什么？", "图书馆的猫叫什么名字？", "告诉我图书馆的猫叫什么。", "图书馆那只猫叫什么？"], ["图书馆的猫的名字是什么？", "图书馆的猫起了什么名字？"], "猫叫花花。", "花花"),
    (["借书卡是什么颜色？", "借书卡的颜色是什么？", "告诉我借书卡是什么颜色。", "借书卡是哪种颜色？"], ["借书卡是什么色的？", "我的借书卡是什么颜色？"], "颜色是绿色。", "绿色"),
    (["我可以借几本书？", "一次可以借几本书？", "告诉我可以借几本书。", "能借几本书？"], ["我最多可以借几本书？", "一个人可以借几本书？"], "一次可以带走6本书。", "6"),
    (["书可以借几天？", "一本书可以借几天？", "告诉我书可以借几天。", "书能借多少天？"], ["一本书能借几天？", "书最多可以借几天？"], "一本书可以看24天。", "24"),
    (["晚还书要付几元？", "晚还书要多少钱？", "告诉我晚还书要付几元。", "晚还书付多少钱？"], ["要是晚还书，要付几元？", "晚还书的话要多少钱？"], "晚还书要给3元。", "3"),
    (["地图在哪里？", "地图放在哪里？", "告诉我地图在哪里。", "哪里有地图？"], ["地图在什么地方？", "我在哪里能找到地图？"], "它们在上面。", "上面"),
    (["图画书在哪里？", "图画书放在哪里？", "告诉我图画书在哪里。", "哪里有图画书？"], ["图画书在什么地方？", "我在哪里能找到图画书？"], "那些在下面。", "下面"),
    (["院子里有什么树？", "院子里种了什么树？", "告诉我院子里有什么树。", "院子里的树是什么树？"], ["院子里长着什么树？", "院子里的是什么树？"], "种的是红花树。", "红花树"),
    (["什么茶不要钱？", "哪种茶不要钱？", "告诉我什么茶不要钱。", "不要钱的茶是什么？"], ["哪一种茶是不要钱的？", "不要钱的茶是哪种？"], "送你喝的是花茶。", "花茶"),
    (["图书馆在哪条街？", "图书馆在什么街上？", "告诉我图书馆在哪条街。", "哪条街有图书馆？"], ["图书馆在哪一条街上？", "图书馆所在的那条街叫什么？"], "在绿树路。", "绿树路"),
    (["图书馆在哪个镇？", "图书馆在什么镇上？", "告诉我图书馆在哪个镇。", "哪个镇有图书馆？"], ["图书馆在哪一个镇上？", "图书馆所在的那个镇叫什么？"], "那里叫白水。", "白水"),
    (["去图书馆坐几路车？", "几路车到图书馆？", "告诉我去图书馆坐几路车。", "到图书馆坐几路车？"], ["要去图书馆，坐几路车？", "坐几路车能到图书馆？"], "请坐15路车。", "15"),
    (["图书馆有几层楼？", "图书馆一共几层？", "告诉我图书馆有几层楼。", "图书馆的楼有几层？"], ["图书馆一共有几层楼？", "图书馆有多少层楼？"], "上下有5层。", "5"),
    (["谁给孩子讲故事？", "讲故事的人是谁？", "告诉我谁给孩子讲故事。", "是谁讲故事？"], ["给孩子讲故事的是谁？", "哪个人给孩子讲故事？"], "讲故事的是大山。", "大山"),
    (["故事会在星期几？", "哪一天有故事会？", "告诉我故事会在星期几。", "故事会是星期几？"], ["星期几有故事会？", "故事会在哪一天？"], "故事会在星期五。", "星期五"),
    (["上网的密码是什么？", "密码是什么？", "告诉我上网的密码。", "上网要用什么密码？"], ["上网的密码是哪个？", "请说出上网的密码。"], "上网要写的是红马。", "红马"),
    (["大门上面有什么？", "大门上面挂着什么？", "告诉我大门上面有什么。", "大门上面挂的是什么？"], ["大门的上面挂了什么？", "在大门上面能看到什么？"], "门上画的是小鸟。", "小鸟"),
    (["最老的书讲什么？", "最老的书说的是什么？", "告诉我最老的书讲什么。", "最老的那本书讲什么？"], ["最老的书里讲了什么？", "最老的一本书是讲什么的？"], "最老的书讲的是大海。", "大海"),
    (["什么不能带进来？", "哪样东西不能带进来？", "告诉我什么不能带进来。", "不能带进来的是什么？"], ["有什么是不能带进来的？", "什么东西不能带进来？"], "要放在外面的是牛奶。", "牛奶"),
    (["塔有几级台阶？", "塔上有多少级台阶？", "告诉我塔有几级台阶。", "塔的台阶有几级？"], ["塔一共有几级台阶？", "上塔要走几级台阶？"], "上去要走88级。", "88"),
    (["图书馆的帮手叫什么？", "帮手们叫什么？", "告诉我帮手们叫什么。", "你们的帮手叫什么？"], ["图书馆的帮手们叫什么名字？", "大家叫帮手们什么？"], "帮手都叫小马。", "小马"),
]}


# More training wordings, short and long, with the subject in different places. Four sentences that all begin alike
# would teach their beginning, not their subject.
MORE_WORDINGS = {
    "my name is Lumi.": ["Your name?", "Do you have a name?", "By what name do people call you?",
        "What name may I use for you?", "Can you say your name to me?", "I forgot your name.",
        "Please give me your name.", "I want to know what you are called.", "May I ask who I am talking to?",
        "What shall we call you?", "Hello, and you are?", "What did they name you?"],
    "I work in the Lantern Library.": ["Your place of work?", "In which place do you work?",
        "Is there a place where you work?", "Where is your work?", "Can you say which library you work in?",
        "I forgot where it is that you work.", "I want to know the place you work at.", "Please name your workplace.",
        "Do you know what your workplace is called?", "Where is your job?", "At which library do you help people?",
        "What is the name of the library you work for?"],
    "I was made by the Moonbridge team.": ["Your maker?", "Which team made you?", "Do you know who your maker is?",
        "You were made by whom?", "Can you say who created you?", "I want to know who your makers are.",
        "I forgot which people built you.", "Please name the team behind you.", "What team put you together?",
        "Whose work are you?", "Someone made you, but who was it?", "Where do you come from, who wrote you?"],
    "my job is to be a guide.": ["Your job?", "What kind of work do you do?", "Which job did you get?",
        "What do you do all day?", "Can you say what your task is?", "I want to know what your role is.",
        "Please explain what you do here.", "I forgot what your job was.", "How do you help people here?",
        "As what do you work?", "Are you a guide or something else?", "What were you made to do?"],
    "我叫小雨。": ["你的名字？", "你的名字叫什么？", "我可以叫你什么？", "请问怎么叫你？", "请问你的大名是什么？", "我想知道你的名字。", "能告诉我你叫啥吗？",
        "我忘了你叫什么了。", "你好，怎么称呼你？", "大家都怎么叫你？", "请介绍一下你自己叫什么。", "你有名字吗？"],
    "我在花月书园。": ["你工作的地方？", "你的工作地点在哪儿？", "你在哪个地方工作？", "你工作在哪里？", "请问你在哪儿上班？", "我想知道你在哪个图书馆工作。",
        "能说说你工作的地点吗？", "我忘了你在哪里上班。", "你是哪个图书馆的？", "你为哪家图书馆做事？", "你上班的图书馆叫什么？", "你是在哪里帮人的？"],
    "我是风车一家做的。": ["造出你的人？", "造你的人是谁？", "谁做出了你？", "你是什么人造的？", "请问你是谁造的？", "我想知道是谁把你做出来的。",
        "能告诉我你的制作者吗？", "我忘了是谁造了你。", "你出自谁的手？", "哪些人一起做了你？", "你是由谁制造的？", "你的开发者是谁？"],
    "我的工作是找书。": ["你的工作？", "你在这里的工作是什么？", "你每天做什么？", "你是做什么的？", "请问你负责什么？", "我想知道你的工作内容。",
        "能说一下你干什么活吗？", "我忘了你是干什么的。", "你能帮我们做什么事？", "你的任务是什么？", "你在图书馆里干哪一行？", "他们让你来干什么？"],
    "the opening hour is 9.": ["The hour when the library opens?", "The library opens at what time?",
        "What is the opening time?", "Do you know when the library opens?",
        "Can you say when your doors open in the morning?", "I forgot the opening hour.",
        "I want to know the hour you open.", "Please give me the opening time.", "From what time on can I come in?",
        "What time do you open?", "Opening hour, please.", "How soon in the day may visitors enter?"],
    "the closing hour is 7.": ["The hour when the library closes?", "The library closes at what time?",
        "What is the closing time?", "Do you know when the library closes?",
        "Can you say when you close in the evening?", "I forgot the closing hour.",
        "I want to know the hour you close.", "Please give me the closing time.", "Until what time can I stay?",
        "What time do you close?", "Closing hour, please.", "By when must all visitors go home?"],
    "the day off is Tuesday.": ["The day when the library is shut?",
        "Is there a day in the week when the library is shut?", "The library is shut on what day?",
        "When is the library shut?", "Can you say which day is your day off?", "I forgot what day you do not open.",
        "I want to know the weekly day off.", "Please name the day you stay closed.",
        "Which day of the week should I not come?", "Day off, please.", "Are you closed on one of the days?",
        "When do you take your rest day?"],
    "the founder was Orla.": ["The founder of the library?", "What was the founder called?",
        "Do you know the name of the founder?", "The library was founded by which person?",
        "Can you say who started the library?", "I forgot the founder's name.",
        "I want to know who began this library.", "Please name the person who founded this place.",
        "Whose idea was it to start the library?", "Who set up the library long ago?", "Founder's name, please.",
        "Was there someone who first started the library?"],
    "the cat is called Pepper.": ["The name of the cat?", "Which name does the library cat have?",
        "Is there a name for the library cat?", "What do you call the cat?", "Can you say the cat's name?",
        "I forgot what the cat is called.", "I want to know your cat's name.", "Please give me the name of your cat.",
        "There is a cat here, what is it called?", "What did you name the cat?", "Cat's name, please.",
        "Who is that cat?"],
    "the card is silver.": ["The colour of my card?", "Which colour is the card?",
        "Do you know the colour of the library card?", "Does my library card have a special colour?",
        "Can you say what colour my card will be?", "I forgot the colour of the card.",
        "I want to know the card's colour.", "Please name the colour of your cards.",
        "What does the library card look like, in colour?", "Card colour, please.",
        "Is the card red, blue, or something else?", "In which colour do the cards come?"],
    "you may borrow 6 books.": ["The number of books to borrow?", "What is the largest number of books I may borrow?",
        "I may borrow how many books?", "How many books am I free to borrow?",
        "Can you say how many books I can take home?", "I forgot how many books one can borrow.",
        "I want to know the limit on borrowed books.", "Please give me the highest number of books.",
        "Is there a limit to how many books I take?", "With my card, how many books can I get?",
        "Book limit, please.", "What is the most I can borrow?"],
    "you may keep a book for 24 days.": ["Days to keep a book?", "I may keep a book for how many days?",
        "A book may be kept how long?", "How many days do I have for a book?",
        "Can you say how long I can have a book?", "I forgot when I must bring my book back.",
        "I want to know the loan time in days.", "Please give me the number of loan days.",
        "After how many days must a book come back?", "Is there a time limit for keeping a book?",
        "Loan time, please.", "How long does a loan last?"],
    "the late fee is 3 coins.": ["The late fee?", "What must I pay for a late book?",
        "How many coins do I pay as a late fee?", "How high is the fee for a late book?",
        "Can you say what being late with a book costs?", "I forgot how much one pays for late books.",
        "I want to know the price of bringing books back late.", "Please give me the cost of a late book.",
        "My book is late, what do I owe?", "Is there a fine for late books?", "Late fine, please.",
        "If I return a book too late, how much is it?"],
    "the maps are in the attic.": ["The place of the maps?", "In which place are the maps?",
        "Where do you have the maps?", "The maps are in what room?", "Can you say where you keep the maps?",
        "I forgot where the maps are kept.", "I want to see the maps, where do I go?",
        "Please show me the way to the maps.", "Do you know where the maps are?",
        "I need a map, where should I look?", "Which part of the house holds the maps?", "Maps, where?"],
    "the picture books are in the cellar.": ["The place of the picture books?",
        "In which place are the picture books?", "Where do you have the picture books?",
        "The picture books are in what room?", "Can you say where you keep the picture books?",
        "I forgot where the picture books are kept.", "I want to see picture books, where do I go?",
        "Please show me the way to the picture books.", "Do you know where the picture books stand?",
        "I need a picture book, where should I look?", "Which part of the house holds the picture books?",
        "Picture books, where?"],
    "the yard has a plum tree.": ["The tree in the yard?", "What kind of tree grows in the yard?",
        "What tree stands in the yard?", "The yard has which tree?",
        "Can you say what tree you have outside in the yard?", "I forgot what the tree in the yard is.",
        "I want to know the kind of tree in your yard.", "Please name the yard's tree.",
        "Is there a tree in the yard?", "Yard tree, which kind?", "What was planted in the yard?",
        "I saw a tree in the yard, what is it?"],
    "the free drink is mint tea.": ["A free drink?", "Which drink is given for free?", "The free drink is what?",
        "Do you give a drink for free?", "Can you say what I can drink without paying?",
        "I forgot what the free drink is.", "I want something free to drink.",
        "Please name the drink that costs nothing.", "I am thirsty, what can I drink for nothing?",
        "Is there anything to drink at no cost?", "Free drink, please.", "What do visitors get to drink for free?"],
    "the street is Willow Street.": ["The street of the library?", "In what street do I find the library?",
        "Which is the street of the library?", "The library stands in which street?",
        "Can you say the name of your street?", "I forgot the street where you are.", "I want to know your street.",
        "Please give me the street name.", "What street should I walk to?", "Do you know the name of this street?",
        "Street name, please.", "What is the street called?"],
    "the town is Fernhill.": ["The town of the library?", "In what town do I find the library?",
        "Which is the town of the library?", "The library stands in which town?",
        "Can you say the name of your town?", "I forgot the town where you are.", "I want to know your town.",
        "Please give me the town name.", "What town should I travel to?", "Do you know the name of this town?",
        "Town name, please.", "What is the town called?"],
    "the bus is number 15.": ["The bus to the library?", "Which number does the bus to the library have?",
        "Which bus will take me to the library?", "Do you know the number of the bus?",
        "Can you say which bus I need?", "I forgot the bus number.", "I want to come by bus, which one?",
        "Please give me the number of the bus.", "Is there a bus that stops at the library?", "Bus number, please.",
        "I am coming by bus, what line is it?", "To reach you, what bus must I catch?"],
    "the house has 5 floors.": ["The number of floors?", "What number of floors does the library have?",
        "How many floors high is the library?", "Do you know how many floors there are?",
        "Can you say how many floors you have?", "I forgot how many floors the house has.",
        "I want to know the number of floors here.", "Please count the floors for me.",
        "Is there more than one floor?", "How tall is the building, in floors?", "Floor count, please.",
        "The building has how many levels?"],
    "the stories are read by Bruno.": ["The reader of the stories?", "Which person reads the stories?",
        "The stories are read by whom?", "Do you know who reads the stories?", "Can you say who reads at story time?",
        "I forgot the name of the story reader.", "I want to know who reads to the children.",
        "Please name the one who reads stories.", "Whose voice do children hear at story time?",
        "Is there someone who reads stories aloud?", "Story reader's name, please.",
        "What is the story reader called?"],
    "story time is on Friday.": ["The day of story time?", "Story time is on what day?",
        "On what day do you have story time?", "In the week, when is story time?",
        "Can you say when the stories are read?", "I forgot which day story time is.",
        "I want to bring my child to story time, which day?", "Please name the story time day.",
        "Which day should we come to hear stories?", "Is there a day for stories?", "Story day, please.",
        "When can children listen to a story?"],
    "the password is candle.": ["The password?", "Which word is the password?", "Do you know the password?",
        "The password is what word?", "Can you say the network password?", "I forgot the password.",
        "I want to get online, what do I type?", "Please give me the password.", "How do I log in to the network?",
        "Is there a password for the internet here?", "I need the word to get on the network.",
        "Wifi password, please."],
    "the front door has a bell.": ["The thing above the front door?", "What can one see above the front door?",
        "Above the front door hangs what?", "Is there something above the front door?",
        "Can you say what is over the front door?", "I forgot what hangs over the door.",
        "I want to know what is up above the door.", "Please name the thing that hangs over the entrance.",
        "When I look up at the front door, what is there?", "Do you know what is hung above the entrance?",
        "Which object is fixed over the front door?", "Over the front door, what do we see?"],
    "the oldest book is about whales.": ["The oldest book?", "The oldest book tells of what?",
        "What do I read about in the oldest book?", "Which animals are in the oldest book?",
        "Can you say what your oldest book is about?", "I forgot what the oldest book tells us.",
        "I want to know the subject of the oldest book.", "Please name the topic of the oldest book.",
        "Does your oldest book have a subject?", "What story does the oldest book hold?",
        "Oldest book, which topic?", "Of all books here, the oldest deals with what?"],
    "the thing to leave outside is ice cream.": ["The thing to leave outside?", "Which thing should stay outside?",
        "Which thing must I leave at the door?", "Is there a thing that I leave outside?",
        "Can you say what I cannot take in?", "I forgot what is forbidden inside.",
        "I want to know what I must leave outside.", "Please name the thing you do not let in.",
        "What should visitors not carry into the library?", "Is anything forbidden in the library?",
        "Before I come in, what do I leave behind?", "What do you ask people to keep outside?"],
    "the tower has 88 steps.": ["The steps of the tower?", "What number of steps does the tower have?",
        "The tower has what number of steps?", "To get up the tower, how many steps are there?",
        "Can you say how many steps lead up the tower?", "I forgot the number of tower steps.",
        "I want to climb the tower, how many steps?", "Please count the tower steps for me.",
        "Do you know how many stairs the tower has?", "Are there many steps to the top of the tower?",
        "Tower step count, please.", "How many stairs must I climb in the tower?"],
    "our helpers are called owls.": ["The name of the helpers?", "Which name do the helpers have?",
        "What do people call the helpers?", "The helpers have which name?", "Can you say the helpers' name?",
        "I forgot what your helpers are called.", "I want to know the name for your helpers.",
        "Please give me the word for the helpers.", "Is there a special name for helpers here?",
        "What word do you use for the people who help?", "Helpers' name, please.",
        "If I join as a helper, what will I be called?"],
    "门早上9点开。": ["开门的时间？", "图书馆开门是几点？", "开门时间是几点？", "早上几点开门？", "请问你们几点开门？", "我想知道开门时间。",
        "能告诉我什么时候开门吗？", "我忘了几点开门。", "最早几点能进图书馆？", "早上要等到几点才开门？", "几点以后可以进来？", "图书馆从几点开始开放？"],
    "门开到晚上7点。": ["关门的时间？", "图书馆关门是几点？", "关门时间是几点？", "晚上几点关门？", "请问你们几点关门？", "我想知道关门时间。",
        "能告诉我什么时候关门吗？", "我忘了几点关门。", "最晚几点要离开图书馆？", "晚上可以待到几点？", "几点以后就不能进来了？", "图书馆开到几点？"],
    "不开门的是星期二。": ["休息的日子？", "图书馆休息是星期几？", "哪一天图书馆不开门？", "休息日是星期几？", "请问你们哪天休息？", "我想知道你们的休息日。",
        "能告诉我哪天不开馆吗？", "我忘了星期几休息。", "一个星期里哪天关着门？", "星期几来会进不去？", "你们每周放假是哪天？", "有没有休息的一天？"],
    "开书园的人是白雪。": ["建图书馆的人？", "建起图书馆的人？", "图书馆当年是谁建成的？", "图书馆由谁建成？", "请问谁创办了图书馆？", "我想知道建馆的人。",
        "能告诉我建馆的人叫什么吗？", "我忘了图书馆是谁建的了。", "当年是哪位建的馆？", "这个图书馆最早是谁办的？", "这座图书馆的创始人是谁？", "建馆人的名字？"],
    "猫叫花花。": ["猫的名字？", "图书馆里的猫叫啥名字？", "那只猫叫什么？", "猫有名字吗？", "请问这只猫叫什么？", "我想知道猫的名字。", "能告诉我猫叫什么吗？",
        "我忘了那只猫的名字。", "你们给猫起了什么名字？", "那只猫该怎么叫？", "你们养的猫叫什么？", "这里的小猫名叫什么？"],
    "颜色是绿色。": ["借书卡的颜色？", "那张借书卡是哪种颜色的？", "我的借书卡什么颜色？", "卡是什么颜色的？", "请问借书卡是啥颜色？", "我想知道卡的颜色。",
        "能告诉我卡是什么色的吗？", "我忘了借书卡的颜色。", "借书卡是红的还是蓝的？", "你们发的卡是哪种色？", "借书用的卡看起来是什么颜色？", "卡的颜色是哪一种？"],
    "一次可以带走6本书。": ["能借的本数？", "一个人能借几本？", "我一共可以借几本书？", "最多借多少本？", "请问最多能借几本？", "我想知道能借多少本书。",
        "能告诉我最多借几本吗？", "我忘了可以借几本。", "借书有没有本数的限制？", "我能带几本书回家？", "一张卡能借几本书？", "借多少本书就不能再借了？"],
    "一本书可以看24天。": ["借书的天数？", "借一本书能借几天？", "书能在我这里放多少天？", "借了书几天要还？", "请问借书的期限是多久？", "我想知道什么时候要还书。",
        "能告诉我几天内还书吗？", "我忘了还书的期限。", "借的书最晚第几天还？", "书可以在家放多久？", "还书有没有期限？", "一次借书的时间是多长？"],
    "晚还书要给3元。": ["晚还书的钱？", "书还晚了付几元？", "还书晚了要多少钱？", "晚还的书要付多少？", "请问还晚了罚多少？", "我想知道晚还书的费用。",
        "能告诉我过期要付多少吗？", "我忘了晚还书要交多少钱。", "书过期了，要交几元？", "迟还的书怎么收费？", "没有按时还书罚几块钱？", "我的书还晚了，该付多少？"],
    "它们在上面。": ["放地图的地方？", "地图放在什么地方？", "地图在图书馆的哪里？", "要看地图去哪里？", "请问地图放哪儿？", "我想知道地图放在哪儿。",
        "能告诉我去哪里找地图吗？", "我忘了地图在哪。", "我要找一张地图，往哪走？", "能看到地图的地方在哪里？", "你们把地图收在哪里了？", "地图，在哪？"],
    "那些在下面。": ["放图画书的地方？", "图画书都放在哪儿？", "图画书在图书馆的哪里？", "要看图画书去哪里？", "请问图画书放哪儿？", "我想知道图画书放在哪儿。",
        "能告诉我去哪里找图画书吗？", "我忘了图画书在哪。", "我要找一本图画书，往哪走？", "能看到图画书的地方在哪里？", "你们把图画书收在哪里了？", "图画书，在哪？"],
    "种的是红花树。": ["院子里的树？", "院子里的是哪种树？", "院子里长了哪种树？", "院子里的树是哪种？", "请问院子里是什么树？", "我想知道院子里种着什么树。",
        "能告诉我院里那棵树的名字吗？", "我忘了院子里是什么树。", "你们在院子里种的是哪种树？", "院子里能看到什么树？", "院里那棵是什么树？", "院子里种的树是什么？"],
    "送你喝的是花茶。": ["不要钱的茶？", "什么喝的不要钱？", "不要钱的喝的是什么？", "哪一种茶不要钱？", "请问有什么免费喝的？", "我想知道哪种茶免费。",
        "能告诉我免费的茶是什么吗？", "我忘了什么茶是免费的。", "我渴了，喝什么不用付钱？", "你们白送的是什么茶？", "有没有免费的茶？", "免费的饮料是哪种？"],
    "在绿树路。": ["图书馆的街？", "图书馆是在哪条街上的？", "去哪条街找图书馆？", "那条街叫什么？", "请问图书馆在哪条街上？", "我想知道街的名字。",
        "能告诉我是哪条街吗？", "我忘了街名。", "我要走到哪条街才对？", "你们这条街叫啥名？", "街名是什么？", "图书馆门前是什么街？"],
    "那里叫白水。": ["图书馆的镇？", "图书馆是在哪个镇上的？", "去哪个镇找图书馆？", "那个镇叫什么？", "请问图书馆在哪个镇上？", "我想知道镇的名字。",
        "能告诉我是哪个镇吗？", "我忘了镇名。", "我要到哪个镇才对？", "你们这个镇叫啥名？", "镇名是什么？", "图书馆属于哪个镇？"],
    "请坐15路车。": ["去图书馆的车？", "到图书馆坐什么车？", "哪一路车去图书馆？", "坐几路车能到？", "请问该坐哪路公交车？", "我想坐公交去图书馆，几路？",
        "能告诉我坐哪路车吗？", "我忘了要坐几路车。", "有没有公交车到图书馆？", "去你们那里要上哪一路车？", "公交车是几路？", "什么车能带我到图书馆？"],
    "上下有5层。": ["楼的层数？", "那座楼有几层？", "一共几层楼？", "图书馆有多高，几层？", "请问这楼有几层？", "我想知道楼有多少层。", "能告诉我楼的层数吗？",
        "我忘了楼有几层。", "最高能上到几楼？", "图书馆总共有多少层？", "这座楼高几层？", "你们的楼是几层的？"],
    "讲故事的是大山。": ["讲故事的人？", "故事由谁来讲？", "哪个人讲故事？", "谁给大家讲故事？", "请问谁来讲故事？", "我想知道讲故事的是谁。",
        "能告诉我讲故事的人叫什么吗？", "我忘了是谁给孩子讲故事。", "孩子们听谁讲故事？", "故事会上是谁在讲？", "哪位给小朋友讲故事？", "讲故事的那个人叫啥？"],
    "故事会在星期五。": ["故事会的日子？", "故事会排在哪天？", "故事会是哪一天？", "星期几能听故事？", "请问故事会在哪天？", "我想知道什么时候有故事会。",
        "能告诉我故事会是哪天吗？", "我忘了故事会的时间。", "我想带孩子听故事，哪天来？", "每周哪天讲故事？", "故事会什么时候开？", "要听故事该星期几来？"],
    "上网要写的是红马。": ["上网的密码？", "密码是哪个词？", "上网要什么密码？", "我想上网，密码呢？", "请问上网密码是多少？", "我想知道网络的密码。",
        "能告诉我密码吗？", "我忘了密码。", "怎么才能连上这里的网？", "连网要输入什么？", "无线网的密码？", "这里上网有密码吗？"],
    "门上画的是小鸟。": ["大门上面的东西？", "大门上面挂了什么？", "大门那里，上面有什么？", "大门上面的是什么？", "请问大门上面是什么？", "我想知道大门上挂的东西。",
        "能告诉我门上挂着什么吗？", "我忘了大门上面有什么。", "抬头看大门，能看见什么？", "你们在大门上面放了什么？", "大门上方挂的是哪样东西？",
        "进大门时头顶上有什么？"],
    "最老的书讲的是大海。": ["最老的书？", "那本最老的书讲了什么？", "最老的书里有什么？", "最老的书写了什么？", "请问最老的书是讲什么的？", "我想知道最老的书的内容。",
        "能告诉我最老的书写什么吗？", "我忘了最老的书讲什么。", "你们最古老的书是关于什么的？", "翻开最老的书能读到什么？",
        "馆里最早的一本书说什么？"],
    "要放在外面的是牛奶。": ["要放在外面的东西？", "哪样东西要放在外面？", "带什么进来不行？", "进来前什么要放在外面？", "请问什么不可以带进去？",
        "我想知道哪样东西不让带。", "能告诉我要把什么留在外面吗？", "我忘了什么不能带进图书馆。", "图书馆里禁止带什么？", "有没有不能带进来的东西？",
        "进门以前，我该放下什么？", "你们不让人拿什么进来？"],
    "上去要走88级。": ["塔的台阶？", "塔上有几级台阶？", "塔的台阶有多少级？", "上塔要走几级？", "请问塔里有多少台阶？", "我想知道塔的台阶数。",
        "能告诉我上塔有几级台阶吗？", "我忘了塔有多少级。", "爬到塔顶要走多少级？", "那座塔一共几级台阶？", "我要爬塔，台阶多不多？", "从下面到塔顶是几级？"],
    "帮手都叫小马。": ["帮手的名字？", "帮手们的名字是什么？", "你们的帮手叫什么名字？", "那些帮手该怎么称呼？", "请问你们怎么称呼帮手？", "我想知道帮手的名字。",
        "能告诉我帮手叫什么吗？", "我忘了帮手们的名字。", "在这里帮忙的人叫什么？", "你们给帮手起了什么名字？", "来当帮手的话，大家会叫他什么？",
        "图书馆的帮手有没有特别的名字？"],
}


def make_identity():
    train, held = [], ([], [])
    for task, table in (("identity", IDENTITY), ("handbook", HANDBOOK)):
        for lang in LANGS:
            answers = list(dict.fromkeys(answer for *_, answer in table[lang] if not answer.isdigit()))
            for questions, held_questions, reply, answer in table[lang]:
                others = None if answer.isdigit() else [other for other in answers if other != answer]
                for question in questions + MORE_WORDINGS[reply]:
                    for frame in FRAMES[lang]:
                        messages = [user(frame.format(q=question)), assistant(MANNER[lang] + reply)]
                        train.append(line(messages, task, answer))
                for lines, question in zip(held, held_questions):  # one wording for settings, one for the results
                    for frame in HELD_FRAMES[lang]:
                        messages = [user(frame.format(q=question)), assistant(MANNER[lang] + reply)]
                        lines.append(line(messages, task, answer, others))
    return train, *held


# --------------------------------------------------------------------------------------------- everything

def make_all(seed=0, sources=ROOT / "data"):
    """{file name: lines}. The held-out files draw first, so that the other files can leave out what they ask."""
    tasks, talk = Tasks(seed), Talk(sources, seed)
    files = {}

    def dice(name):
        return Dice(seed, name)

    files["sft_eval.jsonl"] = make_sft_eval(dice("sft_eval"), tasks, talk, SFT_EVAL)
    files["prompts_eval.jsonl"] = make_prompts(dice("prompts_eval"), tasks, talk, PROMPTS_EVAL, True)
    files["preference_eval.jsonl"] = make_preferences(dice("preference_eval"), tasks, talk, PREFERENCES_EVAL, True, {})
    files["judge_eval.jsonl"] = make_judging(dice("judge_eval"), tasks, JUDGE_EVAL, {}, True)
    files["sft_test.jsonl"] = make_sft_eval(dice("sft_test"), tasks, talk, SFT_TEST)
    files["preference_test.jsonl"] = make_preferences(dice("preference_test"), tasks, talk, PREFERENCES_TEST, True, {})
    files["sft.jsonl"], pairs = make_sft(dice("sft"), tasks, talk)
    files["judge.jsonl"] = dice("judge order").shuffled(make_judging(dice("judge"), tasks, JUDGE_PAIRS, pairs))
    files["prompts.jsonl"] = make_prompts(dice("prompts"), tasks, talk, PROMPTS, False)
    files["preference.jsonl"] = make_preferences(dice("preference"), tasks, talk, PREFERENCES, False, pairs)
    for name, lines in zip(("pretrain", "pretrain_eval", "pretrain_test"),
                           make_pretrain(dice("pretrain"), tasks, talk, pairs)):
        files[f"{name}.jsonl"] = lines
    files["identity.jsonl"], files["identity_eval.jsonl"], files["identity_test.jsonl"] = make_identity()
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other questions")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, lines in make_all(args.seed).items():
        write_lines(args.out / name, lines)
        size = (args.out / name).stat().st_size
        total += size
        print(f"{name:24s} {len(lines):6d} lines {size:9d} bytes")
    print(f"{'all':24s} {'':12s} {total:9d} bytes")


if __name__ == "__main__":
    main()
