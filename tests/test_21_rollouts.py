"""Chapter 21: rollouts. Prompts go in, answers are scored, and what is trained on comes out in micro-batches.

After this chapter you know how a rollout becomes mini-batches and micro-batches, and what is counted over all of them.

Worked example for the last part: six answers, in the shuffled order 4 0 2 1 5 3, become two mini-batches of two
micro-batches. Inside a mini-batch the answers are sorted by length, so that little padding is computed.

    answer                 0  1  2  3  4  5          mini-batch 1: 4 0 2, by length 4 2 | 0
    tokens of the prompt   2  1  3  1  2  1          mini-batch 2: 1 5 3, by length 1 3 | 5
    tokens of the answer   4  1  2  3  1  6
    together               6  2  5  4  3  7
"""

import json
import math
from collections import Counter

import pytest
import torch

from minillm import chat, logprobs, rollouts, runtime
from minillm.errors import UserError
from minillm.generate import Rollout, generate
from minillm.heads import RewardModel, ValueModel
from minillm.logprobs import head_entropy
from minillm.model import CausalLM, ModelConfig
from minillm.rewards import load_rewards
from minillm.rollouts import (MicroBatch, PromptLoader, explained_variance, load_prompts, read_answers,
                              response_logprobs, response_values, sampled_scores, score_rollout, select,
                              split_rollout, whiten_advantages)
from minillm.tokenizer import Tokenizer, train_tokenizer
from tests.helpers import close

CPU = torch.device("cpu")


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["It is red. It is blue."] * 3, 280)


@pytest.fixture
def float32(monkeypatch):
    """bf16, which is used where a CPU has it, would hide the digits that are compared here."""
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: False)


def small(vocab_size, seed=0):
    torch.manual_seed(seed)
    return CausalLM(ModelConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                num_key_value_heads=1, head_dim=16, intermediate_size=32,
                                max_position_embeddings=256))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_lines(path, records):
    return write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


# ---------------------------------------------------------------- prompts

def questions(n, **more):
    return [{"conversations": [turn("user", f"thing {i}?")], "answer": str(i), **more} for i in range(n)]


def test_prompts_are_read_counted_and_held_out(tmp_path, tokenizer, capsys):
    """Of 19 prompts two are held out, one is too long, five belong to another task, and one has no answer."""
    lines = questions(12, task="add") + questions(17, task="sort")[12:]
    lines += [{"conversations": [turn("user", "no answer")], "task": "add"},
              {"conversations": [turn("user", "long " * 50)], "answer": "1", "task": "add"}]
    path = write_lines(tmp_path / "p.jsonl", lines)
    held_out = write_lines(tmp_path / "eval.jsonl", questions(2) + [{"conversations": [turn("user", "other")]}])
    train, held, stats = load_prompts([path], held_out, tokenizer, 60, 0, ["add"], True)
    assert [prompt.record["answer"] for prompt in train] == [str(i) for i in range(2, 12)]
    assert len(held) == 3
    assert stats == {"prompts": 19, "longer than there is room for": 1, "held out": 2,
                     "of other tasks or without an answer": 6}
    assert ("10 of 19 prompts to train on (1 longer than there is room for; 2 held out; "
            "6 of other tasks or without an answer)") in capsys.readouterr().out
    assert tokenizer.decode(train[0].tokens) == "<|im_start|>user\nthing 2?<|im_end|>\n<|im_start|>assistant\n"


def test_a_held_out_prompt_for_which_there_is_no_room_is_dropped(tmp_path, tokenizer):
    lines = [{"conversations": [turn("user", text)]} for text in ("a", "b" * 99)]
    held_out = write_lines(tmp_path / "eval.jsonl", lines)
    _, held, _ = load_prompts([write_lines(tmp_path / "p.jsonl", questions(3))], held_out, tokenizer, 60, 0)
    assert [prompt.messages[-1]["content"] for prompt in held] == ["a"]


def test_a_model_that_can_think_is_asked_with_or_without(tmp_path, tokenizer):
    """Without --thinking the prompt holds an empty think block. A format that has none refuses the flag."""
    path = write_lines(tmp_path / "p.jsonl", questions(3))
    with pytest.raises(UserError, match="--thinking: the model's chat format .ChatML. has no think blocks"):
        load_prompts([path], "", tokenizer, 60, 0, thinking=True)
    thinker = Tokenizer(tokenizer.document, {"template": chat.template_of(chat.QWEN3)})
    ends = [tokenizer.decode(load_prompts([path], "", thinker, 60, 0, thinking=flag)[0][0].tokens)[-32:]
            for flag in (False, True)]
    assert ends[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n"[-32:])
    assert ends[1].endswith("<|im_end|>\n<|im_start|>assistant\n"[-32:])


def test_five_per_cent_are_held_out_and_no_prompt_is_on_both_sides(tmp_path, tokenizer):
    """20 questions, each three times: one question is held out, with its copies."""
    train, held, _ = load_prompts([write_lines(tmp_path / "p.jsonl", questions(20) * 3)], "", tokenizer, 60, 1)
    assert len(held) == 3 and len(train) == 57
    assert not {tuple(prompt.tokens) for prompt in train} & {tuple(prompt.tokens) for prompt in held}


@pytest.mark.parametrize("copies", [1, 3])
def test_a_single_prompt_is_on_both_sides(tmp_path, tokenizer, capsys, copies):
    train, held, _ = load_prompts([write_lines(tmp_path / "one.jsonl", questions(1) * copies)], "", tokenizer, 60, 1)
    assert len(train) == copies and len(held) == 1
    assert "there is only one prompt: it is used for training and for evaluation" in capsys.readouterr().out


def test_minimind_style_prompts_are_read_unchanged(tmp_path, tokenizer):
    """rlaif.jsonl: conversations that end with an assistant turn, empty or not. That turn is the model's to write."""
    lines = [{"conversations": [turn("user", "你好"), turn("assistant", "")]},
             {"conversations": [turn("system", "kind"), turn("user", "a"), turn("assistant", "b"), turn("user", "c"),
                                turn("assistant", "无")], "id": 3}]
    train, held, _ = load_prompts([write_lines(tmp_path / "rlaif.jsonl", lines)], "", tokenizer, 200, 0)
    messages = {prompt.messages[-1]["content"]: prompt.messages for prompt in train + held}
    assert set(messages) == {"你好", "c"} and len(messages["c"]) == 4


@pytest.mark.parametrize("line, message", [
    ({"conversations": [turn("assistant", "hi")]}, r"p.jsonl:2: a prompt must end with a user message .* with nothing"),
    ({"conversations": [turn("system", "hi")]}, r"p.jsonl:2: .* ends with role 'system'"),
    ({"words": "hi"}, r'p.jsonl:2: no key "conversations"; found: \'words\''),
    ({"conversations": [turn("user", "x")], "answer": [7]}, r'p.jsonl:2: "answer" must be text'),
])
def test_bad_prompts_are_one_line_with_their_place(tmp_path, tokenizer, line, message):
    path = write_lines(tmp_path / "p.jsonl", [*questions(1), line])
    with pytest.raises(UserError, match=message) as caught:
        load_prompts([path], "", tokenizer, 60, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options, message", [
    ({"room": 4}, r"\(3 longer than there is room for\); a prompt has room for 4 tokens \(--max_seq_len minus"),
    ({"need_answers": True}, r"no prompt has an \"answer\", which --reward answer needs; use --reward model"),
    ({"held_out": True}, r"\(3 held out\); the held-out file contains them all"),
])
def test_no_prompt_left_says_why(tmp_path, tokenizer, options, message):
    path = write_lines(tmp_path / "p.jsonl", [{"conversations": [turn("user", f"{i}?")]} for i in range(3)])
    options = {"room": 60, **options}
    eval_path = path if options.pop("held_out", False) else ""
    if not eval_path:
        eval_path = write_lines(tmp_path / "e.jsonl", [{"conversations": [turn("user", "other")]}])
    with pytest.raises(UserError, match=r"p.jsonl: no prompt is left to train on .*" + message) as caught:
        load_prompts([path], eval_path, tokenizer, seed=0, **options)
    assert "\n" not in str(caught.value)


def test_each_of_the_tasks_must_be_there(tmp_path, tokenizer):
    """A misspelt one among several would be left out."""
    path = write_lines(tmp_path / "p.jsonl", [*questions(4, task="add"), *questions(4, task="subtract")])
    with pytest.raises(UserError, match="--tasks substract: no prompt has such a task; found: add, subtract"):
        load_prompts([path], "", tokenizer, 60, 0, tasks=["add", "substract"])


def test_select_by_task_and_answer(tmp_path, tokenizer):
    without_answer = {"conversations": [turn("user", "hi")], "task": "add"}
    lines = [*questions(2, task="add"), *questions(1, task="sort"), without_answer]
    path = write_lines(tmp_path / "e.jsonl", lines)
    _, prompts, _ = load_prompts([write_lines(tmp_path / "p.jsonl", questions(9)[8:])], path, tokenizer, 60, 0)
    assert [len(select(prompts)), len(select(prompts, ["add"]))] == [4, 3]
    assert [len(select(prompts, (), True)), len(select(prompts, ["add"], True))] == [3, 2]


def test_held_out_prompts_that_no_reward_can_be_measured_on_are_said(tmp_path, tokenizer, capsys):
    """Else the table would only have a dash. Without a held-out file some of the training prompts are held out."""
    own = write_lines(tmp_path / "p.jsonl", questions(9, task="add")[3:])
    held_out = write_lines(tmp_path / "e.jsonl", [{"conversations": [turn("user", "hi")]}])
    for tasks, need_answers, lacking in ([], True, 'an "answer"'), (["add"], False, 'one of --tasks as its "task"'):
        load_prompts([own], held_out, tokenizer, 60, 0, tasks, need_answers)
        words = f"e.jsonl: no prompt that has {lacking}, so held-out rewards are not measured"
        assert words in capsys.readouterr().out
    load_prompts([write_lines(tmp_path / "s.jsonl", [{"prompt": "a"}])], own, tokenizer, 20, 0)
    assert "p.jsonl: no prompt that has at most 20 tokens (--max_seq_len minus" in capsys.readouterr().out
    load_prompts([own], held_out, tokenizer, 60, 0)
    load_prompts([own], "", tokenizer, 60, 0, ["add"], True)
    assert "not measured" not in capsys.readouterr().out


def test_batches_of_prompts_are_full_and_go_on_where_they_were(monkeypatch):
    """7 prompts in batches of 3: an epoch has 3 batches. Every prompt occurs in it, and two of them occur twice."""
    loader = PromptLoader(list(range(7)), 3, seed=0)
    taken = iter(loader)
    first, second = ([next(taken) for _ in range(3)] for _ in range(2))
    assert loader.batches(0) == 3 and first != second
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [3, 3, 3]
        assert sorted(Counter(number for batch in epoch for number in batch).values()) == [1, 1, 1, 1, 1, 2, 2]
    again = PromptLoader(list(range(7)), 3, seed=0)
    again.load_state({"epoch": 1, "taken": 1})
    assert next(iter(again)) == second[1]


def test_each_of_two_processes_gets_the_whole_batch_of_prompts(monkeypatch):
    """9 prompts in batches of 4: an epoch has 3 batches, 12 places in all, so three come twice. Who samples the answers
    to which prompt is decided later."""
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    seen = Counter()
    for rank in (0, 1):
        monkeypatch.setattr(runtime, "rank", lambda: rank)
        loader = PromptLoader(list(range(9)), 4, seed=0)
        batches = list(loader.epoch_batches(0))
        assert loader.batches(0) == 3 and [len(batch) for batch in batches] == [4, 4, 4]
        seen.update(number for batch in batches for number in batch)
    assert sorted(seen.values()) == [2, 2, 2, 2, 2, 2, 4, 4, 4]


# ---------------------------------------------------------------- scores of sampled answers

def test_answers_are_read_without_their_end():
    class Spelling:
        end_ids = [0, 1]

        def decode(self, ids):
            return "".join("..abc"[i] for i in ids)

    tokens = torch.tensor([[4, 2, 1, 0], [4, 2, 3, 3], [4, 1, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]).bool()
    rollout = Rollout(tokens, mask, torch.zeros(3, 4))
    texts, ended = read_answers(rollout, Spelling())
    assert texts == ["a", "abb", ""] and ended.tolist() == [True, False, True]
    assert rollout.lengths.tolist() == [3, 4, 2]


def both_sides(tmp_path, tokenizer, n):
    """n prompts, in order; those that would be held out included."""
    train, held, _ = load_prompts([write_lines(tmp_path / "p.jsonl", questions(n))], "", tokenizer, 60, 0)
    return sorted(train + held, key=lambda prompt: int(prompt.record["answer"]))[:n]


def test_scores_stand_beside_their_answers(tmp_path, tokenizer):
    """Two answers each to prompts 0 and 1; the score is 10 x the prompt's number + the length of the answer."""
    mine = write(tmp_path / "mine.py",
                 "def length(m, answers, e): return [len(a) + 10 * int(e['answer']) for a in answers]\n")
    prompts, rewards = both_sides(tmp_path, tokenizer, 2), load_rewards([f"{mine}:length"], "", "")
    scores, components = score_rollout(rewards, prompts, ["a", "bb", "ccc", ""], CPU)
    assert scores.tolist() == [[1, 2], [13, 10]] and scores.dtype == torch.float32
    assert components["length"].tolist() == scores.tolist()


def test_sampled_scores_measure_the_reward_on_held_out_prompts(tmp_path, tokenizer):
    """Every answer to prompt i is worth i: the mean is 6 / 4, the variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25."""
    mine = write(tmp_path / "mine.py", "def one(m, answers, e): return [int(e['answer'])] * len(answers)\n")
    prompts, model = both_sides(tmp_path, tokenizer, 4), small(tokenizer.vocab_size)
    rewards = load_rewards([f"{mine}:one"], "", "")
    found = sampled_scores(model, tokenizer, prompts, rewards, CPU, max_new_tokens=3, temperature=1.0)
    close([found["sampled_reward"], found["sampled_reward_std"]], [1.5, math.sqrt(1.25)])
    assert set(found) == {"sampled_reward", "sampled_reward_std", "sampled_gold_reward", "sampled_accuracy",
                          "sampled_reply_tokens", "sampled_stopped"}
    rewards = load_rewards([f"{mine}:one", "2*answer"], "", "")
    found = sampled_scores(model, tokenizer, prompts, rewards, CPU, max_new_tokens=3, temperature=1.0)
    close(found["sampled_reward"], 1.5 + 2 * found["sampled_reward_answer"])
    close(found["sampled_reward_one"], 1.5)
    assert sampled_scores(None, tokenizer, [], {}, None, 3, 1.0) == {}


def test_equal_rewards_have_a_std_of_exactly_0(tmp_path, tokenizer):
    """PPO divides by it. In float32 the mean of 20 times 0.7 is not 0.7: the std would be 6e-8, and not 0."""
    mine = write(tmp_path / "mine.py", "def equal(m, answers, e): return [0.7] * len(answers)\n")
    prompts, rewards = both_sides(tmp_path, tokenizer, 5), load_rewards([f"{mine}:equal"], "", "")
    found = sampled_scores(small(tokenizer.vocab_size), tokenizer, prompts, rewards, CPU, 3, 1.0)
    assert found["sampled_reward_std"] == 0.0


@pytest.mark.parametrize("prompts, answers", [(1, 4), (4, 4), (9, 2), (12, 1), (30, 1)])
def test_few_prompts_are_sampled_several_times(tmp_path, tokenizer, monkeypatch, prompts, answers):
    """At most four answers to a prompt, and at least one; no more than MOST_SAMPLED in all, if that is possible."""
    monkeypatch.setattr(rollouts, "MOST_SAMPLED", 20)
    seen = tmp_path / "seen.txt"
    mine = write(tmp_path / "mine.py", f"""
def ones(m, answers, e):
    with open({str(seen)!r}, 'a') as file:
        file.write(f"{{e['answer']}} " * len(answers))
    return [1] * len(answers)
""")
    rewards = load_rewards([f"{mine}:ones"], "", "")
    asked = both_sides(tmp_path, tokenizer, prompts)
    sampled_scores(small(tokenizer.vocab_size), tokenizer, asked, rewards, CPU, 3, 1.0)
    assert Counter(seen.read_text().split()) == {str(i): answers for i in range(prompts)}


# ---------------------------------------------------------------- a rollout as micro-batches

def six_answers():
    """The rollout of the worked example. Token `column` of row `row` is 10 x row + column; the padding is 99."""
    prompt, answer = torch.tensor([2, 1, 3, 1, 2, 1])[:, None], torch.tensor([4, 1, 2, 3, 1, 6])[:, None]
    column = torch.arange(7)
    tokens = (10 * torch.arange(6)[:, None] + column).masked_fill(column >= prompt + answer, 99)
    return Rollout(tokens, (column >= prompt) & (column < prompt + answer), torch.zeros(6, 7))


@pytest.fixture
def shuffled(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.tensor([4, 0, 2, 1, 5, 3]))


def rows(minibatch):
    """The numbers of the answers in each micro-batch."""
    return [(batch.tokens[:, 0] // 10).tolist() for batch in minibatch.micro_batches]


def test_a_rollout_is_split_into_mini_and_micro_batches(shuffled):
    one, two = split_rollout(six_answers(), 2, 2, None, scores=torch.arange(6.0), advantages=-torch.arange(6.0))
    assert rows(one) == [[4, 2], [0]] and rows(two) == [[1, 3], [5]]
    assert (one.n_sequences, one.n_tokens) == (3, 1 + 4 + 2) and (two.n_sequences, two.n_tokens) == (3, 1 + 6 + 3)
    batch = one.micro_batches[0]  # answers 4 and 2, cropped to the five tokens of the longer one
    assert batch.tokens.tolist() == [[40, 41, 42, 99, 99], [20, 21, 22, 23, 24]]
    assert batch.mask.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 1]]
    assert batch.last.tolist() == [1, 3] and batch.n_tokens == 3
    assert batch.targets.tolist() == [2, 5 + 3, 5 + 4]  # where those three tokens are, row after row
    assert batch.scores.tolist() == [4, 2] and batch.advantages.tolist() == [-4, -2]


def test_the_mask_stands_beside_the_logprobs_and_last_is_its_last_column(shuffled):
    """Answer 5 has the tokens 51 to 56. Column t of the mask is token t + 1, so they are columns 0 to 5."""
    batch = split_rollout(six_answers(), 2, 2, None)[1].micro_batches[1]
    assert batch.tokens[:, 1:][batch.mask].tolist() == [51, 52, 53, 54, 55, 56]
    assert batch.tokens[0, 1:][batch.last].tolist() == [56]


def test_what_is_not_kept_is_counted_and_not_computed(shuffled):
    """Answers 0 and 5 have no gradient. GRPO's denominator still counts them; there is no micro-batch with them."""
    keep = torch.tensor([False, True, True, True, True, False])
    one, two = split_rollout(six_answers(), 2, 2, None, keep=keep)
    assert rows(one) == [[4], [2]] and rows(two) == [[1], [3]]
    assert (one.n_sequences, one.n_tokens) == (3, 1 + 2) and (two.n_sequences, two.n_tokens) == (3, 1 + 3)
    one, two = split_rollout(six_answers(), 2, 2, None, keep=torch.zeros(6, dtype=torch.bool))
    assert (one.micro_batches, one.n_sequences, one.n_tokens) == ([], 3, 0)


def test_more_mini_and_micro_batches_than_answers():
    minibatches = split_rollout(six_answers(), 8, 4, torch.Generator().manual_seed(0))
    assert [minibatch.n_sequences for minibatch in minibatches] == [1] * 6 + [0, 0]
    assert [len(minibatch.micro_batches) for minibatch in minibatches] == [1] * 6 + [0, 0]


@pytest.mark.parametrize("answers, widths", [(32, [10]), (34, [2, 10])])
def test_on_a_cpu_a_micro_batch_has_at_most_32_answers(answers, widths):
    """Those of 2 tokens apart from those of 10, where there are more."""
    lengths = torch.tensor([2, 10] * (answers // 2))[:, None]
    places = torch.arange(10)
    rollout = Rollout(torch.ones(answers, 10, dtype=torch.long), (places > 0) & (places < lengths),
                      torch.zeros(answers, 10))
    minibatch, = split_rollout(rollout, 1, 1, torch.Generator().manual_seed(0))
    assert [batch.tokens.shape[1] for batch in minibatch.micro_batches] == widths
    assert sum(len(batch.tokens) for batch in minibatch.micro_batches) == minibatch.n_sequences == answers
    assert minibatch.n_tokens == answers * 5


def test_the_order_is_random_and_decided_by_the_generator():
    def order(seed):
        minibatches = split_rollout(six_answers(), 6, 1, torch.Generator().manual_seed(seed))
        return [row for minibatch in minibatches for batch in rows(minibatch) for row in batch]

    assert sorted(order(0)) == [0, 1, 2, 3, 4, 5]
    assert order(0) == order(0) and len({tuple(order(seed)) for seed in range(10)}) > 5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_logprobs_of_micro_batches_are_those_of_the_sampler(float32, temperature):
    """Answers of 1 to 12 tokens, in micro-batches with another padding than the sampler's."""
    model, sampling = small(30), torch.Generator().manual_seed(0)
    rollout = generate(model, [[1, 2, 3], [4], [5, 6]], 12, end_id=7, temperature=temperature, group_size=8,
                       generator=sampling)
    lengths = rollout.response_mask.sum(1)
    assert len(lengths.unique()) > 2
    found = 0
    for minibatch in split_rollout(rollout, 2, 3, sampling, scores=torch.arange(24)):
        for batch in minibatch.micro_batches:
            logprobs = response_logprobs(model, batch, temperature)
            sampled = rollout.logprobs[batch.scores][:, 1:batch.tokens.shape[1]]  # the scores tell which rows these are
            assert (logprobs - sampled).abs().max() < 1e-4
            assert not logprobs[~batch.mask].any()
            found += batch.n_tokens
    assert found == lengths.sum()


def test_values_stand_beside_the_token_that_they_have_not_seen_yet(float32, shuffled):
    """Column t belongs to token t + 1 and is read after token t: the score of the sequence that ends there."""
    reward_model = RewardModel.from_lm(small(100))
    value_model = ValueModel.from_reward_model(reward_model)
    batch = split_rollout(six_answers(), 2, 2, None)[0].micro_batches[0]
    values = response_values(value_model, batch)
    assert values.shape == batch.mask.shape
    for t in range(values.shape[1]):
        close(values[:, t], reward_model(batch.tokens[:, :t + 1], torch.tensor([t + 1, t + 1])))


@pytest.mark.parametrize("picks, told", [(True, False), (False, False), (False, True)])
def test_entropy_of_whole_distributions(monkeypatch, picks, told):
    """Four equal logits: ln 4 = 1.386294. Logits ln 2, 0, 0 and -10000: probabilities 1/2, 1/4, 1/4 and 0, so 1.5 ln 2
    = 1.039721. At temperature 1/2 these become 4/6, 1/6, 1/6: 0.867563. Rows outside the mask do not count, NaN or not,
    whether they are left out before the product (on a CPU, or where it is told which they are) or after it.
    """
    monkeypatch.setattr(logprobs, "_picks_rows", lambda x: picks)
    weight = torch.eye(4)
    hidden = torch.tensor([[[0.0] * 4, [math.log(2), 0, 0, -1e4], [math.nan, 0, 0, 0]]])

    def entropy(mask, temperature=1.0):
        targets = torch.tensor([t for t, wanted in enumerate(mask, 1) if wanted], dtype=torch.long)
        return head_entropy(hidden, weight, torch.tensor([mask]), temperature, targets if told else None)

    close(entropy([True, False]), 1.3862944)
    close(entropy([False, True]), 1.0397208)
    close(entropy([True, True]), 1.2130076)
    close(entropy([False, True], temperature=0.5), 0.8675632)
    close(entropy([False, False]), 0.0)
    with pytest.raises(ValueError, match="one shape"):
        head_entropy(hidden, weight, torch.ones(1, 3, dtype=torch.bool))


def test_the_entropy_of_a_micro_batch(float32, shuffled):
    """All 100 tokens are equally likely: the entropy is ln 100, the logprobs are -ln 100, and these have a gradient."""
    model = small(100)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    batch = split_rollout(six_answers(), 2, 2, None)[0].micro_batches[0]
    logprobs, entropy = response_logprobs(model, batch, with_entropy=True)
    close(entropy, 4.6051702)
    close(logprobs[batch.mask], [-4.6051702] * 3)
    assert logprobs.requires_grad and not entropy.requires_grad


class OneDistribution(torch.nn.Module):
    """Four tokens; whatever came before, the logits are ln 2, 0, 0 and -10000."""

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(4, 4, bias=False)
        self.lm_head.weight.data.copy_(torch.eye(4))

    def hidden(self, tokens):
        return torch.tensor([math.log(2), 0, 0, -1e4]).expand(*tokens.shape, 4)


@pytest.mark.parametrize("temperature, expected, entropy", [
    (1.0, [-0.6931472, -1.3862944], 1.0397208),  # probabilities 1/2, 1/4, 1/4
    (0.5, [-0.4054651, -1.7917595], 0.8675632),  # probabilities 4/6, 1/6, 1/6
])
def test_logprobs_and_entropy_are_those_of_the_distribution_that_was_sampled(float32, temperature, expected, entropy):
    """The answer is the tokens 0 and 2, after the prompt 1."""
    batch = MicroBatch(torch.tensor([[1, 0, 2, 3]]), torch.tensor([[True, True, False]]), torch.tensor([1]), 2)
    logprobs, found = response_logprobs(OneDistribution(), batch, temperature, with_entropy=True)
    close(logprobs, [[*expected, 0.0]])
    close(found, entropy)
    close(response_logprobs(OneDistribution(), batch, temperature), [[*expected, 0.0]])


# ---------------------------------------------------------------- PPO: over the whole rollout

def with_advantages(*values, **more):
    """Micro-batches with these advantages (NaN stands for padding), and further tensors of the same shapes."""
    micro_batches = []
    for i, numbers in enumerate(values):
        advantages = torch.tensor(numbers)
        given = {name: torch.tensor(tensors[i]) for name, tensors in more.items()}
        mask = ~advantages.isnan()
        micro_batches.append(MicroBatch(tokens=None, mask=mask, last=None, n_tokens=0, advantages=advantages, **given))
    return micro_batches


NAN = math.nan


@pytest.mark.parametrize("values, expected", [
    ([[[2.0, 4.0], [4.0, 6.0]]], [[[-1.2247449, 0.0], [0.0, 1.2247449]]]),
    ([[[2.0, 4.0, NAN]], [[4.0], [6.0]]], [[[-1.2247449, 0.0, 0.0]], [[0.0], [1.2247449]]]),
    ([[[2.0]], [[4.0, NAN]], [[4.0]], [[6.0]]], [[[-1.2247449]], [[0.0, 0.0]], [[0.0]], [[1.2247449]]]),
])
def test_advantages_are_whitened_over_the_whole_rollout(values, expected):
    """2, 4, 4, 6: mean 4, variance (4 + 4) / 3, so 2 becomes -2 / 1.632993 = -1.224745, whatever the micro-batches.
    Whitened one by one, the micro-batches of the last example would all be 0.
    """
    micro_batches = with_advantages(*values)
    whiten_advantages(micro_batches, CPU)
    for batch, numbers in zip(micro_batches, expected, strict=True):
        close(batch.advantages, numbers)


def test_advantages_are_whitened_over_all_processes(monkeypatch):
    """This process has 2 and 4 (sum 6, count 2), the other one 4 and 6 (sum 10, count 2). The mean of all is 4. The
    deviations add up to -2 here and to 2 there, their squares to 4 and 4. The result is that of one process with all.
    """
    sums = []

    def reduce(tensor):
        sums.append(tensor.tolist())
        return tensor + torch.tensor([[10.0, 2.0], [2.0], [4.0]][len(sums) - 1])

    monkeypatch.setattr(rollouts, "sum_tensor_over_processes", reduce)
    micro_batches = with_advantages([[2.0, NAN]], [[4.0]])
    whiten_advantages(micro_batches, CPU)
    assert sums == [[6.0, 2.0], [-2.0], [4.0]]
    close(micro_batches[0].advantages, [[-1.2247449, 0.0]])
    close(micro_batches[1].advantages, [[0.0]])


@pytest.mark.parametrize("old_values, expected", [
    ([[[1.0, 2.0, 9.0]], [[3.0]]], 1.0),  # the returns themselves
    ([[[5.0, 6.0, 9.0]], [[7.0]]], 1.0),  # always 4 too much: a constant error is not seen
    ([[[0.0, 0.0, 9.0]], [[0.0]]], 0.0),  # always the same guess
    ([[[1.0, 1.0, 9.0]], [[2.0]]], 2 / 3),  # errors 0, 1, 1: variance 2/9, of 2/3
    ([[[3.0, 2.0, 9.0]], [[1.0]]], -3.0),  # errors -2, 0, 2: variance 8/3, of 2/3
])
def test_explained_variance_by_hand(old_values, expected):
    """Returns 1, 2 (and padding) in one micro-batch and 3 in the other: mean 2, variance (1 + 0 + 1) / 3 = 2/3."""
    micro_batches = with_advantages([[0.0, 0.0, NAN]], [[0.0]], returns=[[[1.0, 2.0, 100.0]], [[3.0]]],
                                    old_values=old_values)
    close(explained_variance(micro_batches, CPU), expected)


def test_explained_variance_of_equal_returns_is_no_nan():
    micro_batches = with_advantages([[0.0, 0.0]], returns=[[[1.0, 1.0]]], old_values=[[[1.0, 1.0]]])
    close(explained_variance(micro_batches, CPU), 1.0)


# ---------------------------------------------------------------- what is held out where few prompts are usable

@pytest.mark.parametrize("tasks, need_answers, usable", [(["add"], False, 40), ([], True, 40), (["add"], True, 20),
                                                         ([], False, 420)])
def test_the_held_out_prompts_are_of_those_that_are_trained_on(tmp_path, tokenizer, tasks, need_answers, usable):
    """Of 420 prompts 20 have a task, 20 have an answer, and 20 have both: 5 % of what is usable is held out."""
    lines = [{"conversations": [turn("user", f"talk {i}?")], **({"task": "add"} if i < 20 else {})} for i in range(380)]
    lines += [{**record, **({"task": "add"} if i < 20 else {})} for i, record in enumerate(questions(40))]
    path = write_lines(tmp_path / "p.jsonl", lines)
    train, held, stats = load_prompts([path], "", tokenizer, 60, 0, tasks, need_answers)
    assert len(held) == usable // 20 and len(train) == usable - len(held)
    assert len(select(held, tasks, need_answers)) == len(held) == stats["held out"]
    assert stats["of other tasks or without an answer"] == 420 - usable


def test_a_single_usable_prompt_is_on_both_sides(tmp_path, tokenizer):
    talk = [{"conversations": [turn("user", f"talk {i}?")]} for i in range(40)]
    path = write_lines(tmp_path / "p.jsonl", talk + questions(1))
    train, held, _ = load_prompts([path], "", tokenizer, 60, 0, (), True)
    assert [prompt.record["answer"] for prompt in train + held] == ["0", "0"]


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_explained_variance_by_hand: `[[7.0]]], 1.0)` -> `[[8.0]]], 1.0)`. A constant error is not seen. And one that
#    is constant but for one token?
# 2. test_logprobs_and_entropy_are_those_of_the_distribution_that_was_sampled: `(0.5, [-0.4054651` -> `(2.0,
#    [-0.4054651`. Which of the two log-probabilities rises against temperature 1?
