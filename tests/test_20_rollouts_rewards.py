"""Chapter 20: what is asked, and what an answer is worth: prompts, and rewards from rules, models, judges and one's own file.

A reward function takes (messages, answers, example) and returns one number per answer. Worked example of a weighted sum,
`--reward answer 0.5*mine.py:short`, for "What is 37 + 45?" (82):

    answer                  answer   short (1 / letters)     sum
    "82"                       1           1/2             1 + 0.5/2 = 1.25
    "83 !"                   0.1           1/4           0.1 + 0.5/4 = 0.225
"""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from minillm import losses, rollouts
from minillm.checkpoint import save_model
from minillm.data import PackedLoader
from minillm.errors import UserError
from minillm.generate import Rollout
from minillm.heads import RewardModel, save_reward_model
from minillm.losses import head_entropy
from minillm.model import CausalLM, ModelConfig
from minillm.rewards import load_rewards, score_answers
from minillm.rollouts import Conversations, PromptLoader, States, load_prompts, read_answers, sampled_scores, score_rollout, split_rollout
from minillm.tokenizer import train_tokenizer
from tests.helpers import close


def turn(role, content):
    return {"role": role, "content": content}


SUM = [turn("user", "What is 37 + 45?")], {"answer": "82"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["It is red. It is blue."] * 3, 280)


def small(tokenizer, seed=0):
    torch.manual_seed(seed)
    return CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                num_key_value_heads=1, head_dim=16, intermediate_size=32, max_position_embeddings=256))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_lines(path, records):
    return write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


# ---------------------------------------------------------------- rewards by name, and one's own

OWN = '''"""A reward of one's own, in ten lines."""


def short(messages, answers, example):
    assert messages[-1]["role"] == "user" and example["answer"]
    return [1 / max(1, len(answer)) for answer in answers]


def words(messages, answers, example):
    return [len(answer.split()) for answer in answers]
'''


def test_a_weighted_sum_with_its_parts(tmp_path):
    mine = write(tmp_path / "mine.py", OWN)
    rewards = load_rewards(["answer", f"0.5*{mine}:short"], "", "")
    totals, parts = score_answers(rewards, [(SUM[0], ["82", "83 !"], SUM[1])])
    close(torch.tensor(totals), [[1.25, 0.225]])
    assert parts == {"answer": [[1.0, 0.1]], "short": [[0.5, 0.25]]}, "the parts are not weighted"
    totals, _ = score_answers(load_rewards([f"-2*{mine}:words"], "", ""), [(SUM[0], ["a b c"], SUM[1]), (SUM[0], ["a"], SUM[1])])
    assert totals == [[-6.0], [-2.0]]


def test_numbers_of_any_kind_are_taken(tmp_path):
    mine = write(tmp_path / "mine.py", "import torch\ndef tensor(m, answers, e): return torch.ones(len(answers))\ndef truth(m, answers, e): return [a == 'x' for a in answers]\n")
    for name, expected in (("tensor", [[1.0, 1.0]]), ("truth", [[1.0, 0.0]])):
        assert score_answers(load_rewards([f"{mine}:{name}"], "", ""), [(SUM[0], ["x", "y"], SUM[1])])[0] == expected


@pytest.mark.parametrize("body, message", [
    ("return [1 / len(a) for a in answers]", r"reward score failed on the answer '' to 'What is 37 \+ 45\?': ZeroDivisionError: .*mine.py:2\)"),
    ("return [float('nan') if a == '' else 1 for a in answers]", r"reward score gave nan for the answer '' to 'What is"),
    ("return [float('inf')] * len(answers)", r"reward score gave inf for the answer '82' to 'What is"),
    ("return [1.0]", r"reward score returned 1 values for 2 answers to 'What is 37 \+ 45\?', the first '82'"),
    ("return None", r"reward score must return a list of one number per answer; for 2 answers to .* it returned None"),
    ("return ['good', 'bad']", r"reward score must return a list of one number per answer; .* it returned \['good', 'bad'\]"),
])
def test_a_reward_function_that_fails_is_named_with_the_answer_that_caused_it(tmp_path, body, message):
    rewards = load_rewards([write(tmp_path / "mine.py", f"def score(messages, answers, example):\n    {body}\n") + ":score"], "", "")
    with pytest.raises(UserError, match=message) as caught:
        score_answers(rewards, [(SUM[0], ["82", ""], SUM[1])])
    assert "\n" not in str(caught.value)


def test_a_reward_function_cannot_change_the_answers(tmp_path):
    rewards = load_rewards([write(tmp_path / "mine.py", "def score(m, answers, e):\n    answers.sort()\n    return [0] * len(answers)\n") + ":score"], "", "")
    answers = ["b", "a"]
    score_answers(rewards, [(SUM[0], answers, SUM[1])])
    assert answers == ["b", "a"]


@pytest.mark.parametrize("specs, message", [
    (["gold"], "--reward gold: must be answer, model, judge or path/to/file.py:function"),
    (["nowhere.py:score"], "nowhere.py:score: there is no such file"),
    (["MINE:other"], "defines no function other"),
    (["BROKEN:score"], "the file cannot be imported: NameError: .*broken.py:1"),
    (["x*answer"], "'x' is no weight; write 0.5\\*answer"),
    (["nan*answer"], "the weight must be a finite number"),
    (["answer", "2*answer"], "answer is given twice"),
])
def test_a_reward_that_cannot_be_loaded(tmp_path, specs, message):
    mine, broken = write(tmp_path / "mine.py", OWN), write(tmp_path / "broken.py", "undefined_name\n")
    with pytest.raises(UserError, match=message) as caught:
        load_rewards([spec.replace("MINE", mine).replace("BROKEN", broken) for spec in specs], "", "")
    assert "\n" not in str(caught.value)


def test_model_and_judge_score_a_whole_rollout_as_they_score_one_prompt(tmp_path, tokenizer):
    """Answers of all prompts share batches, padded to one length: neither the padding nor the company changes a score."""
    save_reward_model(tmp_path / "reward", RewardModel.from_lm(small(tokenizer)), tokenizer)
    save_model(tmp_path / "judge", small(tokenizer, seed=1), tokenizer)
    asked = [([turn("user", "hi")], ["It is red.", ""], {}), ([turn("user", "a much longer question?")], ["blue", "red " * 8], {})]
    rewards = load_rewards(["model", "0.5*judge"], tmp_path / "reward", tmp_path / "judge")
    totals, parts = score_answers(rewards, asked)
    for name, (_, function) in rewards.items():
        close(torch.tensor(parts[name]), [function(*one) for one in asked])
        assert len({round(x, 4) for part in parts[name] for x in part}) == 4
    close(torch.tensor(totals), torch.tensor(parts["model"]) + 0.5 * torch.tensor(parts["judge"]))


# ---------------------------------------------------------------- prompts

def questions(n, **more):
    return [{"conversations": [turn("user", f"thing {i}?")], "answer": str(i), **more} for i in range(n)]


def test_prompts_are_read_counted_and_held_out(tmp_path, tokenizer):
    """20 prompts, of which two are held out, one is too long, five of another task, and one without an answer."""
    lines = questions(12, task="add") + questions(17, task="sort")[12:]
    lines += [{"conversations": [turn("user", "no answer")], "task": "add"}, {"conversations": [turn("user", "long " * 50)], "answer": "1", "task": "add"}]
    held_out = write_lines(tmp_path / "eval.jsonl", questions(2) + [{"conversations": [turn("user", "other")]}])
    said = []
    train, held, stats = load_prompts([write_lines(tmp_path / "p.jsonl", lines)], held_out, tokenizer, 60, 0, ["add"], True, said.append)
    assert [p.record["answer"] for p in train] == [str(i) for i in range(2, 12)] and len(held) == 3
    assert stats == {"prompts": 19, "longer than there is room for": 1, "held out": 2, "of other tasks or without an answer": 6}
    assert "10 of 19 prompts to train on (1 longer than there is room for; 2 held out; 6 of other tasks or without an answer)" in said[0]
    assert tokenizer.decode(train[0].tokens) == "<|im_start|>user\nthing 2?<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_that_occurs_twice_is_never_on_both_sides(tmp_path, tokenizer):
    train, held, _ = load_prompts([write_lines(tmp_path / "p.jsonl", questions(20) * 3)], "", tokenizer, 60, 1, say=lambda line: None)
    assert len(held) == 1 and len(train) == 57
    assert not {tuple(p.tokens) for p in train} & {tuple(p.tokens) for p in held}
    train, held, _ = load_prompts([write_lines(tmp_path / "one.jsonl", questions(1))], "", tokenizer, 60, 1, say=lambda line: None)
    assert len(train) == len(held) == 1


def test_minimind_style_prompts_are_read_unchanged(tmp_path, tokenizer):
    """rlaif.jsonl: conversations whose last turn is the assistant's, empty or not; it is what the model is to say."""
    lines = [{"conversations": [turn("user", "你好"), turn("assistant", "")]},
             {"conversations": [turn("system", "kind"), turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "无")], "id": 3}]
    train, held, _ = load_prompts([write_lines(tmp_path / "rlaif.jsonl", lines)], "", tokenizer, 200, 0, say=lambda line: None)
    messages = {p.messages[-1]["content"]: p.messages for p in train + held}
    assert set(messages) == {"你好", "c"} and len(messages["c"]) == 4


@pytest.mark.parametrize("line, message", [
    ('{"conversations": [{"role": "assistant", "content": "hi"}]}', r"p.jsonl:2: a prompt ends with a message of the user .* ends with nothing"),
    ('{"conversations": [{"role": "system", "content": "hi"}]}', r"p.jsonl:2: .* ends with role 'system'"),
    ('{"prompt": "hi"}', r'p.jsonl:2: no key "conversations"; found: \'prompt\''),
    ('{"conversations": [{"role": "user", "content": "x"}], "answer": 7}', r'p.jsonl:2: "answer" must be text'),
])
def test_bad_prompts_are_one_line_with_their_place(tmp_path, tokenizer, line, message):
    path = write(tmp_path / "p.jsonl", json.dumps(questions(1)[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        load_prompts([path], "", tokenizer, 60, 0)


def test_no_room_for_an_answer(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", questions(3))
    with pytest.raises(UserError, match=r"p.jsonl: no prompt is left to train on \(3 longer than there is room for\); a prompt has room for 4 tokens"):
        load_prompts([path], "", tokenizer, 4, 0, say=lambda line: None)


def test_batches_of_prompts_are_full_and_go_on_where_they_were():
    """7 prompts in batches of 3: each epoch has 3 batches, in which every prompt occurs, and two of them twice."""
    loader = PromptLoader(list(range(7)), 3, seed=0)
    taken = iter(loader)
    first, second = ([next(taken) for _ in range(3)] for _ in range(2))
    assert loader.batches(0) == 3 and first != second
    for epoch in (first, second):
        numbers = sum(epoch, [])
        assert len(numbers) == 9 and set(numbers) == set(range(7)) and all(len(batch) == 3 for batch in epoch)
    again = PromptLoader(list(range(7)), 3, seed=0)
    again.load_state({"epoch": 1, "taken": 1})
    assert [next(iter(again))] == second[1:2]
    halves = [PromptLoader(list(range(7)), 2, seed=0, rank=rank, world=2) for rank in (0, 1)]
    parts = [[next(taken) for _ in range(2)] for taken in map(iter, halves)]
    assert {x for half in parts for batch in half for x in batch} == set(range(7)), "two processes take different prompts"


# ---------------------------------------------------------------- what was sampled

def test_answers_are_read_without_their_end():
    class Spelling:
        end_id = 1
        decode = staticmethod(lambda ids: "".join("..abc"[i] for i in ids))

    tokens = torch.tensor([[4, 2, 1, 0], [4, 2, 3, 3], [4, 1, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]).bool()
    rollout = Rollout(tokens, mask, torch.zeros(3, 4))
    texts, ended = read_answers(rollout, Spelling)
    assert texts == ["a", "abb", ""] and ended.tolist() == [True, False, True]
    assert rollout.lengths.tolist() == [3, 4, 2]


def test_scores_stand_beside_their_answers(tmp_path, tokenizer):
    mine = write(tmp_path / "mine.py", "def length(m, answers, e): return [len(a) + 10 * int(e['answer']) for a in answers]\n")
    train, held, _ = load_prompts([write_lines(tmp_path / "p.jsonl", questions(2))], "", tokenizer, 60, 0, say=lambda line: None)
    prompts = sorted(train + held, key=lambda p: p.record["answer"])
    rewards, parts = score_rollout(load_rewards([f"{mine}:length"], "", ""), prompts, ["a", "bb", "ccc", ""], torch.device("cpu"))
    assert rewards.tolist() == [[1, 2], [13, 10]] and rewards.dtype == torch.float32 and parts["length"].tolist() == rewards.tolist()


def test_sampled_scores_measure_the_reward_on_held_out_prompts(tmp_path, tokenizer):
    mine = write(tmp_path / "mine.py", "def one(m, answers, e): return [int(e['answer'])] * len(answers)\n")
    train, held, _ = load_prompts([write_lines(tmp_path / "p.jsonl", questions(4))], "", tokenizer, 60, 0, say=lambda line: None)
    found = sampled_scores(small(tokenizer), tokenizer, train + held, load_rewards([f"{mine}:one", f"2*answer"], "", ""), torch.device("cpu"), 3, 1.0)
    close(found["sampled_reward_one"], 1.5)  # (0 + 1 + 2 + 3) / 4
    assert {"sampled_reward", "sampled_reward_answer", "sampled_gold_reward", "sampled_accuracy", "sampled_reply_tokens", "sampled_stopped"} <= set(found)
    found = sampled_scores(small(tokenizer), tokenizer, train + held, load_rewards([f"{mine}:one"], "", ""), torch.device("cpu"), 3, 1.0)
    close(found["sampled_reward_std"], math.sqrt(1.25))  # (2.25 + 0.25 + 0.25 + 2.25) / 4
    assert sampled_scores(None, tokenizer, [], {}, None, 3, 1.0) == {}


@pytest.mark.parametrize("prompts, answers", [(1, 4), (4, 4), (9, 2), (12, 1), (30, 1)])
def test_few_prompts_are_sampled_several_times(tmp_path, tokenizer, monkeypatch, prompts, answers):
    """At most four answers to a prompt, as long as there are no more than MOST_SAMPLED in all; every prompt has one."""
    monkeypatch.setattr(rollouts, "MOST_SAMPLED", 20)
    seen = tmp_path / "seen.txt"
    mine = write(tmp_path / "mine.py", f"def ones(m, answers, e):\n    open({str(seen)!r}, 'a').write(f\"{{e['answer']}} \" * len(answers))\n"
                 "    return [1] * len(answers)\n")
    train, held, _ = load_prompts([write_lines(tmp_path / "p.jsonl", questions(prompts))], "", tokenizer, 60, 0, say=lambda line: None)
    everything = (train + held)[:prompts]
    sampled_scores(small(tokenizer), tokenizer, everything, load_rewards([f"{mine}:ones"], "", ""), torch.device("cpu"), 3, 1.0)
    assert Counter(seen.read_text().split()) == {str(p.record["answer"]): answers for p in everything}


@pytest.mark.parametrize("picks", [True, False])
def test_entropy_of_whole_distributions(monkeypatch, picks):
    """Logits 0, 0, 0, 0: ln 4. Logits ln 2, 0, 0 with a fourth at -inf: 1/2, 1/4, 1/4 -> 1.5 ln 2. At temperature 1/2 the
    latter become 4/6, 1/6, 1/6 -> 0.8675632. Rows outside the mask are picked out (on a CPU) or count nothing, NaN or not."""
    monkeypatch.setattr(losses, "_picks_rows", lambda x: picks)
    weight = torch.eye(4)
    hidden = torch.tensor([[[0.0] * 4, [math.log(2), 0, 0, -1e4], [math.nan, 0, 0, 0]]])
    entropy = lambda mask, **options: head_entropy(hidden, weight, torch.tensor([mask]), **options)
    close(entropy([True, False]), 1.3862944)
    close(entropy([False, True]), 1.0397208)
    close(entropy([True, True]), 1.2130076)
    close(entropy([False, True], temperature=0.5), 0.8675632)
    close(entropy([False, False]), 0.0)
    with pytest.raises(ValueError, match="one shape"):
        head_entropy(hidden, weight, torch.ones(1, 3, dtype=torch.bool))


# ---------------------------------------------------------------- what is trained together

def test_a_rollout_is_split_into_mini_and_micro_batches():
    """Seven of eight rows in two mini-batches (in their order) of two micro-batches (the shorter rows first)."""
    lengths, counts = torch.tensor([9, 3, 7, 5, 8, 2, 6, 4]), torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    found = split_rollout(torch.tensor([4, 0, 2, 1, 7, 5, 3]), lengths, counts, 2, 2, "cpu")
    assert [[part.rows.tolist() for part in mini] for mini in found] == [[[1, 2], [4, 0]], [[5, 7], [3]]]
    assert [[(part.longest, part.n_tokens) for part in mini] for mini in found] == [[(7, 5), (9, 6)], [(4, 14), (5, 4)]]
    assert [[part.rows.tolist() for part in mini] for mini in split_rollout(torch.tensor([3]), lengths, counts, 2, 2, "cpu")] == [[[3]], []]
    assert split_rollout(torch.tensor([], dtype=torch.long), lengths, counts, 2, 1, "cpu") == [[], []]


# ---------------------------------------------------------------- demonstrations beside the reward

def test_demonstrations_leave_out_the_tasks_that_are_trained(tmp_path, tokenizer):
    pair = lambda task, text: {"conversations": [turn("user", "q"), turn("assistant", text)], **({"task": task} if task else {})}
    path = write_lines(tmp_path / "sft.jsonl", [pair("add", "1"), pair("sort", "22"), pair(None, "333"), pair("add", "4")])
    said = []
    replay = Conversations([path], tokenizer, 64, without=["add"], say=said.append)
    assert [tokenizer.decode(np.array(tokens)[mask]) for tokens, mask in replay] == ["22<|im_end|>", "333<|im_end|>"]
    assert "2 conversations to replay, 2 of the tasks that are trained left out" in said[0]
    batch = next(iter(PackedLoader(replay, 1, 64, seed=0)))
    assert batch.loss_mask.sum() == 2 + 1 + 3 + 1 and (batch.doc_ids >= 0).sum() == sum(len(t) for t, _ in replay)
    with pytest.raises(UserError, match="no conversation to replay is left; give another --sft_data, or --sft_coef 0"):
        Conversations([write_lines(tmp_path / "a.jsonl", [pair("add", "1")])], tokenizer, 64, without=["add"])


def test_states_are_saved_as_one():
    one, two = PromptLoader(list(range(7)), 3, seed=0), PromptLoader(list(range(5)), 2, seed=0)
    both = States(one=one, two=two)
    taken = iter(one), iter(two)
    next(taken[0]), next(taken[1]), next(taken[1])
    assert both.state() == {"one": {"epoch": 0, "taken": 1}, "two": {"epoch": 0, "taken": 2}}
    both.load_state({"one": {"epoch": 4, "taken": 0}, "two": {"epoch": 1, "taken": 1}})
    assert (one.epoch, two.epoch, two.taken) == (4, 1, 1)
