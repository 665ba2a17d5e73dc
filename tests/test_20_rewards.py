"""Chapter 20: what an answer is worth: rewards from rules, models, judges and one's own file.

After this chapter you can write a reward in a file of your own, and say what a weighted sum of rewards pays.

A reward function in a user's file takes (messages, answers, example) and returns one number per answer. A reward source
takes a whole batch of them, [(messages, answers, example), ...], and returns one number per answer of the batch. Worked
example of a weighted sum, `--reward answer 0.5*mine.py:short`, for "What is 37 + 45?" (82):

    answer                  answer   short (1 / letters)     sum
    "82"                       1           1/2             1 + 0.5/2 = 1.25
    "83 !"                   0.1           1/4           0.1 + 0.5/4 = 0.225
"""

import json
import os
import sys
from collections import Counter

import pytest
import torch

import train_grpo
from minillm import chat, runtime
from minillm import rewards as rewards_module
from minillm.checkpoint import save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.heads import RewardModel, save_reward_model
from minillm.model import CausalLM, ModelConfig
from minillm.preferences import encode_pair
from minillm.rewards import load_rewards, score_answers
from minillm.tokenizer import Tokenizer, train_tokenizer
from tests.helpers import close


def turn(role, content):
    return {"role": role, "content": content}


SUM = [turn("user", "What is 37 + 45?")], {"answer": "82"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["It is red. It is blue."] * 3, 280)


def small(tokenizer, seed=0):
    torch.manual_seed(seed)
    return CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1,
                                num_attention_heads=2,
                                num_key_value_heads=1, head_dim=16, intermediate_size=32, max_position_embeddings=256))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


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
    totals, _ = score_answers(load_rewards([f"-2*{mine}:words"], "", ""),
                              [(SUM[0], ["a b c"], SUM[1]), (SUM[0], ["a"], SUM[1])])
    assert totals == [[-6.0], [-2.0]]


def test_a_reward_may_count_against_an_answer(tmp_path):
    """A weight below 0: the longer one of two right answers is worth less. On the command line it is no flag."""
    mine = write(tmp_path / "mine.py", OWN)
    cfg = parse_config(train_grpo.Config, "", ["--reward", "answer", f"-2*{mine}:words", "--lr", "1e-3"])
    assert cfg.reward == ["answer", f"-2*{mine}:words"] and cfg.lr == 1e-3
    assert parse_config(train_grpo.Config, "", ["--reward", "-.5*model"]).reward == ["-.5*model"]
    totals, _ = score_answers(load_rewards(cfg.reward, "", ""), [(SUM[0], ["82", "It is 82"], SUM[1])])
    close(torch.tensor(totals), [[1 - 2 * 1, 1 - 2 * 3]])


def test_numbers_of_any_kind_are_taken(tmp_path):
    mine = write(tmp_path / "mine.py", "import torch\n"
                 "def tensor(m, answers, e): return torch.ones(len(answers))\n"
                 "def truth(m, answers, e): return [a == 'x' for a in answers]\n")
    for name, expected in (("tensor", [[1.0, 1.0]]), ("truth", [[1.0, 0.0]])):
        assert score_answers(load_rewards([f"{mine}:{name}"], "", ""), [(SUM[0], ["x", "y"], SUM[1])])[0] == expected


@pytest.mark.parametrize("body, message", [
    ("return [1 / len(a) for a in answers]",
     r"reward score failed on the answer '' to 'What is 37 \+ 45\?': ZeroDivisionError: .*mine.py:2\)"),
    ("return [float('nan') if a == '' else 1 for a in answers]",
     r"reward score gave nan for the answer '' to 'What is"),
    ("return [float('inf')] * len(answers)", r"reward score gave inf for the answer '82' to 'What is"),
    ("return [1.0]", r"reward score returned 1 values for 2 answers to 'What is 37 \+ 45\?', the first '82'"),
    ("return None", r"reward score must return a list of one number per answer; for 2 answers to .* it returned None"),
    ("return [1e300] * len(answers)", r"gave 1e\+300 for the answer '82' .*; a score must be a number below 1e\+15"),
    ("return '12345'[:len(answers)]", r"reward score must return a list of one number per answer; .* it returned '12'"),
    ("return dict.fromkeys(range(len(answers)), 0.0)", r"reward score must return a list of one number per answer"),
    ("yield 1.0\n    raise StopIteration", r"reward score failed on the answer '82' .*RuntimeError: generator raised"),
    ("return ['good', 'bad']",
     r"reward score must return a list of one number per answer; .* it returned \['good', 'bad'\]"),
])
def test_a_reward_function_that_fails_is_named_with_the_answer_that_caused_it(tmp_path, body, message):
    rewards = load_rewards([write(tmp_path / "mine.py",
                                  f"def score(messages, answers, example):\n    {body}\n") + ":score"], "", "")
    with pytest.raises(UserError, match=message) as caught:
        score_answers(rewards, [(SUM[0], ["82", ""], SUM[1])])
    assert "\n" not in str(caught.value)


def test_a_lack_of_memory_in_a_reward_function_is_no_mistake_of_an_answer(tmp_path):
    code = "def score(m, answers, e): raise MemoryError\n"
    with pytest.raises(MemoryError):
        score_answers(load_rewards([write(tmp_path / "mine.py", code) + ":score"], "", ""), [(SUM[0], ["82"], SUM[1])])


def test_a_reward_function_cannot_change_what_it_is_given(tmp_path):
    code = ("def score(m, answers, e):\n    answers.sort()\n    m[-1]['content'] = e['answer'] = 'XXX'\n"
            "    return [0] * len(answers)\n")
    rewards = load_rewards([write(tmp_path / "mine.py", code) + ":score"], "", "")
    answers, before = ["b", "a"], json.dumps(SUM)
    score_answers(rewards, [(SUM[0], answers, SUM[1])])
    assert json.dumps(SUM) == before
    assert answers == ["b", "a"]


@pytest.mark.parametrize("specs, message", [
    (["gold"], "--reward gold: must be answer, model, judge or path/to/file.py:function"),
    (["nowhere.py:score"], "nowhere.py:score: there is no such file"),
    (["MINE:other"], "defines no function other"),
    (["BROKEN:score"], "the file cannot be imported: NameError: .*broken.py:1"),
    (["x*answer"], "--reward x\\*answer: the weight stands in front; write 0.5\\*answer"),
    (["answer*0.5"], "--reward answer\\*0.5: the weight stands in front; write 0.5\\*answer"),
    (["nan*answer"], "the weight must be a finite number"),
    (["answer", "2*answer"], "answer is given twice"),
])
def test_a_reward_that_cannot_be_loaded(tmp_path, specs, message):
    mine, broken = write(tmp_path / "mine.py", OWN), write(tmp_path / "broken.py", "undefined_name\n")
    with pytest.raises(UserError, match=message) as caught:
        load_rewards([spec.replace("MINE", mine).replace("BROKEN", broken) for spec in specs], "", "")
    assert "\n" not in str(caught.value)


def loaded(text_by_name, tmp_path, *specs):
    """The rewards that `specs` name, FOLDER standing for a folder with these files."""
    for name, text in text_by_name.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, text)
    return load_rewards([spec.replace("FOLDER", str(tmp_path)) for spec in specs], "", "")


def test_a_reward_file_may_define_dataclasses(tmp_path):
    """dataclasses look their module up in sys.modules when annotations are strings: a file that is not there fails."""
    text = ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Rule:\n"
            "    word: str = 'a'\nRULE = Rule()\n"
            "def score(messages, answers, example):\n    return [float(RULE.word in a) for a in answers]\n")
    rewards = loaded({"mine.py": text}, tmp_path, "FOLDER/mine.py:score")
    assert score_answers(rewards, [(SUM[0], ["cat", "dog"], SUM[1])])[0] == [[1.0, 0.0]]


def test_a_reward_file_may_import_files_beside_it(tmp_path):
    """Each file gets the helper of its own folder, and the search path is left as it was."""
    text = "import beside\ndef score(messages, answers, example):\n    return [beside.VALUE for _ in answers]\n"
    path = list(sys.path)
    files = {"one/mine.py": text, "one/beside.py": "VALUE = 1", "two/mine.py": text, "two/beside.py": "VALUE = 2"}
    rewards = loaded(files, tmp_path, "FOLDER/one/mine.py:score", "10*FOLDER/two/mine.py:score")
    assert score_answers(rewards, [(SUM[0], ["x"], SUM[1])])[0] == [[21.0]]
    assert sys.path == path


def test_folders_without_init_and_the_standard_library(tmp_path):
    """A module's parent is looked up while its path is read. What belongs to Python itself stays everybody's."""
    code = ("import ns.deep.values\nimport wave\n"
            "def score(m, answers, e):\n    import ns.deep.late\n    yield from [ns.deep.values.X] * len(answers)\n")
    files = {"mine.py": code, "ns/deep/values.py": "X = 3", "ns/deep/late.py": ""}
    assert score_answers(loaded(files, tmp_path, "FOLDER/mine.py:score"), [(SUM[0], ["x"], SUM[1])])[0] == [[3.0]]
    beside = rewards_module._modules_beside(str(tmp_path))
    with beside():
        import ns.deep.late  # noqa: F401
    assert not any(name.startswith("ns") for name in sys.modules if name.partition(".")[0] == "ns")
    sys.modules.pop("wave", None)
    with rewards_module._modules_beside(os.path.dirname(os.path.dirname(os.path.realpath(os.__file__))))():
        import wave  # noqa: F401
    assert "wave" in sys.modules


@pytest.mark.parametrize("code, imported", [
    ("import utils\ndef score(m, answers, e): return [utils.VALUE for _ in answers]\n", "utils/__init__.py"),
    ("from lib.values import VALUE\ndef score(m, answers, e): return [VALUE for _ in answers]\n", "lib/values.py"),
    ("def score(m, answers, e):\n    import late\n    late.VALUE += 1\n    return [late.VALUE - 1]\n", "late.py")])
def test_packages_and_late_imports_beside_a_reward_file_are_its_own(tmp_path, code, imported):
    """A package, one without __init__.py, and an import in the function, which is made once."""
    files = {f"{name}/{file}": text for name, value in (("one", 1), ("two", 20))
             for file, text in (("mine.py", code), (imported, f"VALUE = {value}"))}
    known = set(sys.modules)
    rewards = loaded(files, tmp_path, "FOLDER/one/mine.py:score", "FOLDER/two/mine.py:score")
    assert score_answers(rewards, [(SUM[0], ["x"], SUM[1])])[0] == [[21.0]]
    assert score_answers(rewards, [(SUM[0], ["x"], SUM[1])])[0] == [[23.0 if imported == "late.py" else 21.0]]
    assert not {name.partition(".")[0] for name in set(sys.modules) - known} & {"utils", "lib", "late"}


def test_a_reward_file_that_ends_the_program_is_named(tmp_path):
    """Silently, and with the exit status 0, nothing would have been trained."""
    with pytest.raises(UserError, match=r"mine.py:score: the file cannot be imported: SystemExit: 0"):
        loaded({"mine.py": "import sys\nsys.exit(0)\ndef score(m, answers, e): return [0.0]\n"}, tmp_path,
               "FOLDER/mine.py:score")
    rewards = loaded({"b.py": "import sys\ndef score(m, answers, e): sys.exit()\n"}, tmp_path, "FOLDER/b.py:score")
    with pytest.raises(UserError, match="reward score failed on the answer '82'"):
        score_answers(rewards, [(SUM[0], ["82"], SUM[1])])


def test_a_function_written_in_c_has_no_signature_to_read(tmp_path):
    with pytest.raises(UserError, match="this one takes arguments that it does not tell"):
        loaded({"mine.py": "score = max\n"}, tmp_path, "FOLDER/mine.py:score")


def test_functions_of_one_name_in_two_files_keep_their_files_names(tmp_path):
    """Only a name that is not unique is written out. The very same function twice is a mistake, in any spelling."""
    files = {"a.py": OWN, "b.py": OWN.replace("1 / max", "2 / max"),
             "c.py": "def answer(m, answers, e): return [7] * len(answers)"}
    rewards = loaded(files, tmp_path, "FOLDER/a.py:short", "FOLDER/b.py:short", "FOLDER/b.py:words")
    assert list(rewards) == [f"{tmp_path}/a.py:short", f"{tmp_path}/b.py:short", "words"]
    totals, parts = score_answers(rewards, [(SUM[0], ["four"], SUM[1])])
    assert totals == [[0.25 + 0.5 + 1]] and parts["words"] == [[1.0]]
    assert list(loaded(files, tmp_path, "answer", "FOLDER/c.py:answer")) == ["answer", f"{tmp_path}/c.py:answer"]
    with pytest.raises(UserError, match="short is given twice"):
        loaded(files, tmp_path, "FOLDER/a.py:short", f"0.5*FOLDER/../{tmp_path.name}/a.py:short")


@pytest.mark.parametrize("signature", ["completions, **kwargs", "prompts, completions, answer, **kwargs", "answers",
                                       "*, messages, answers, example"])
def test_a_function_of_another_signature_is_told_the_right_one(tmp_path, signature):
    """The first two are reward functions for TRL."""
    wanted = r"mine.py:score: the function must take \(messages, answers, example\)"
    with pytest.raises(UserError, match=wanted) as caught:
        loaded({"mine.py": f"def score({signature}):\n    return [0.0]\n"}, tmp_path, "FOLDER/mine.py:score")
    assert str(caught.value).endswith(f"this one takes ({signature})")


def test_model_and_judge_score_a_whole_rollout_as_they_score_one_prompt(tmp_path, tokenizer, monkeypatch):
    """Answers of all prompts share batches, padded to one length: neither the padding nor the company changes a score.
    """
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)  # all digits are compared
    save_reward_model(tmp_path / "reward", RewardModel.from_lm(small(tokenizer)), tokenizer)
    save_model(tmp_path / "judge", small(tokenizer, seed=1), tokenizer)
    asked = [([turn("user", "hi")], ["It is red.", ""], {}), ([turn("user", "a much longer question?")],
                                                              ["blue", "red " * 8], {})]
    rewards = load_rewards(["model", "0.5*judge"], tmp_path / "reward", tmp_path / "judge")
    totals, parts = score_answers(rewards, asked)
    for name, (_, source) in rewards.items():
        close(torch.tensor(parts[name]), [source([one]) for one in asked])
        assert len({round(x, 4) for part in parts[name] for x in part}) == 4
    close(torch.tensor(totals), torch.tensor(parts["model"]) + 0.5 * torch.tensor(parts["judge"]))


@pytest.mark.parametrize("chat_format, answer, block", [
    (chat.CHATML, "4", ""), (chat.QWEN3, "4", "<think>\n\n</think>\n\n"),
    (chat.QWEN3, "<think>\n2+2\n</think>\n\n4", "")])
def test_an_answer_is_scored_as_a_pair_was_read(tmp_path, tokenizer, monkeypatch, chat_format, answer, block):
    """The classic mistake: an answer with think text behind the empty think block of an answer without."""
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    thinker = Tokenizer(tokenizer.document, {"template": chat.template_of(chat_format)})
    save_reward_model(tmp_path / "reward", RewardModel.from_lm(small(tokenizer)), thinker)
    seen, question = [], turn("user", "2+2?")

    def watched(self, tokens, lengths):
        seen.extend(tokens.tolist())
        return torch.zeros(len(tokens))

    monkeypatch.setattr(RewardModel, "forward", watched)
    score_answers(load_rewards(["model"], tmp_path / "reward", ""), [([question], [answer], {})])
    assert thinker.decode(seen[0]) == ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
                                       f"{block}{answer}<|im_end|>")
    pair = {side: [question, turn("assistant", text)] for side, text in (("chosen", answer), ("rejected", "5"))}
    (chosen, *_), _ = encode_pair(pair, "here", thinker, 256, Counter())
    assert seen == [chosen]


def test_a_judge_is_shown_no_think_text(tmp_path, tokenizer):
    """Two answers that differ in it alone are worth the same; one that never stopped thinking says nothing."""
    save_model(tmp_path / "judge", small(tokenizer, seed=1), tokenizer)
    answers = ["red", "<think>\nblue?\n</think>\n\nred", "", "<think>\nblue?"]
    (scores,), _ = score_answers(load_rewards(["judge"], "", tmp_path / "judge"), [([turn("user", "hi")], answers, {})])
    assert scores[0] == scores[1] != scores[2] == scores[3]


def test_the_judges_own_answers_are_as_long_as_they_may_be_and_not_all_at_once(tmp_path, tokenizer, monkeypatch):
    """Of 5 prompts, two of them equal, 2 at a time, those of similar lengths together."""
    save_model(tmp_path / "judge", small(tokenizer, seed=1), tokenizer)
    real, calls = rewards_module.generate, []

    def watched(model, prompts, max_new_tokens, *rest):
        calls.append(([len(prompt) for prompt in prompts], max_new_tokens))
        return real(model, prompts, max_new_tokens, *rest)

    monkeypatch.setattr(rewards_module, "generate", watched)
    batch = [([turn("user", "x" * n)], ["red"], {}) for n in (3, 9, 1, 9, 5)]
    source = rewards_module.judge_reward(tmp_path / "judge", max_new_tokens=7, batch_size=2)
    assert len(source(batch)) == 5
    assert [limit for _, limit in calls] == [7, 7]
    lengths = [length for prompts, _ in calls for length in prompts]
    assert len(lengths) == 4 and lengths == sorted(lengths)
    (_, source), = load_rewards(["judge"], "", tmp_path / "judge", max_new_tokens=5).values()
    source(batch[:1])
    assert calls[-1][1] == 5



# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_a_weighted_sum_with_its_parts: `"answer", f"0.5*` -> `"answer", f"2*`. What are the two totals, and which
#    parts change?
# 2. test_a_weighted_sum_with_its_parts: `["82", "83 !"]` -> `["82", "82 !"]`. What is the right answer with a blank
#    and a mark worth?
