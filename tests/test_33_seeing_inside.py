"""Chapter 33: seeing inside. The curves of runs, a group of answers, and a conversation token by token.

After this chapter you can read a line of blocks: the lowest value of a curve is the lowest block, the highest the full
one, so 1, 4.5 and 8 are ▁ ▄ █ (the range from 1 to 8 in steps of one block each). And you can read a conversation as
the loss sees it: 4{-0.69} is a token of log-probability -0.69, that is of probability 0.5.
"""

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import eval as evaluation
from minillm import checkpoint, curves
from minillm.errors import UserError
from minillm.metrics import show_samples
from minillm.model import CausalLM, ModelConfig
from minillm.rollouts import MicroBatch, MiniBatch
from minillm.token_view import save_rollout, show_rollout, show_tokens, token_texts
from minillm.tokenizer import train_tokenizer
from tests.helpers import close

BYTES = train_tokenizer(["a"], 259)  # no merges: a token is a byte


@pytest.fixture
def runs(tmp_path):
    """a: reward 1 to 8 in eight steps, and a line torn by a crash; b: two steps only."""
    for name, values in (("a", range(1, 9)), ("b", (5, 3))):
        (tmp_path / name).mkdir()
        text = "".join(f'{{"step": {i}, "reward": {value}}}\n' for i, value in enumerate(values, 1))
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"step": 9, "rew', encoding="utf-8")
    return [str(tmp_path / name) for name in "ab"]


def test_a_curve_as_blocks():
    assert curves.sparkline([(1, 1), (2, 4.5), (3, 8)]) == "▁▄█"
    assert curves.sparkline([(1, 3.0), (2, 3.0)]) == "▁▁"
    assert len(curves.sparkline([(i, i) for i in range(1000)])) == 40


def test_both_runs_are_named_in_text_and_drawing(runs, tmp_path, capsys):
    curves.main([*runs, "--svg", str(tmp_path / "x.svg")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["reward", "▁▂▃▄▅▆▇█", "1", "->", "8", runs[0]]
    assert lines[1].split() == ["reward", "█▁", "5", "->", "3", runs[1]]
    drawing = ElementTree.parse(tmp_path / "x.svg").getroot()
    texts = [element.text for element in drawing.iter() if element.tag.endswith("text")]
    lines = [element.get("points") for element in drawing.iter() if element.tag.endswith("polyline")]
    assert {"reward", "a", "b", "step 8"} <= set(texts) and [len(line.split()) for line in lines] == [8, 2]
    # From x 50 to 410 and from y 200 (the lowest value, 1) to 50 (the highest, 8).
    assert lines[0].startswith("50.0,200.0 ") and lines[0].endswith(" 410.0,50.0")


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        curves.main([str(tmp_path / "nowhere")])
    assert "metrics.jsonl is not there" in capsys.readouterr().err


def test_a_group_is_shown_from_the_best_answer_to_the_worst():
    """Rewards 0 and 1: mean 0.5, so dr_grpo's advantages are -0.5 and 0.5."""
    lines = show_samples("2 + 2?", ["5|", "4"], torch.tensor([0.0, 1.0]), torch.tensor([-0.5, 0.5])).splitlines()
    assert [line.split() for line in lines[2:]] == [["|", "1.000", "|", "0.500", "|", "4", "|"],
                                                    ["|", "0.000", "|", "-0.500", "|", "5/", "|"]]
    assert "2 + 2?" in lines[0]


# One conversation, token by token

def test_a_token_is_printable_whatever_its_bytes_are():
    """A character of three bytes in three tokens shows the bytes; what could move the cursor is written out."""
    assert token_texts(BYTES, BYTES.encode("a\n你\033")) == ["a", r"\n", r"\xe4", r"\xbd", r"\xa0", r"\x1b"]


def test_without_a_terminal_the_number_stands_behind_the_token():
    """p = 0.5 is log p = -0.69, p = 0.01 is -4.61; nothing predicts the first token."""
    texts, logprobs = ["<s>", "Hi", r"\n", "Bo"], [None, math.log(0.5), 0.0, math.log(0.01)]
    assert show_tokens(texts, [False, False, False, True], "mask", False) == (
        "loss mask, 1: trained on\n<s>{0}Hi{0}\\n{0}\nBo{1}\n")
    assert show_tokens(texts, logprobs, "logprob", False) == (
        "log-probability given the tokens before it, in nats\n<s>Hi{-0.69}\\n{0.00}\nBo{-4.61}\n")


def test_on_a_terminal_it_is_a_colour():
    """Green 32, yellow 33, magenta 35, red 31; grey 2. The last line holds the tokens, the one above is the legend."""
    def colours(values, kind):
        line = show_tokens(["x"] * len(values), values, kind, True).splitlines()[-1]
        return [part.removeprefix("\033[") for part in line.split("mx\033[0m")[:-1]]

    assert colours([False, True], "mask") == ["2", "32"]
    assert colours([math.log(p) for p in (0.9, 0.2, 0.05, 0.001)], "logprob") == ["32", "33", "35", "31"]
    assert colours([2.0, 0.5, 0.0, -0.5, -2.0], "change") == ["1;32", "32", "2", "31", "1;31"]
    assert colours([2.0, 0.5, 0.0, -0.5, -2.0], "advantage") == ["1;32", "32", "2", "31", "1;31"]
    assert colours([1.3, 1.1, 1.0, 0.9, 0.5], "ratio") == ["1;32", "32", "2", "31", "1;31"]


@pytest.fixture
def folders(tmp_path):
    """flat: each of 259 tokens is equally likely. sharp: the same, with random weights in its head."""
    for name, scale in (("flat", 0.0), ("sharp", 1.0)):
        torch.manual_seed(0)
        model = CausalLM(ModelConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=1, head_dim=8, intermediate_size=16,
                                     max_position_embeddings=32))
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        checkpoint.save_model(tmp_path / name, model, BYTES)
    record = {"conversations": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (tmp_path / "text.jsonl").write_text('{"text": "abc"}\n', encoding="utf-8")
    return tmp_path


def view(folder, data="talk.jsonl", **settings):
    return evaluation.main(evaluation.Config(tokens=True, data=str(folder / data), device="cpu", **settings))


def test_a_conversation_with_its_mask_and_log_probabilities(folders, capsys):
    """ln(1 / 259) = -5.5568 for each token. Trained on: the reply and the token that ends it, not the line after."""
    result = view(folders, model=str(folders / "flat"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [r"<|im_start|>{0}u{0}s{0}e{0}r{0}\n{0}", r"1{0}+{0}1{0}?{0}<|im_end|>{0}\n{0}",
                          r"<|im_start|>{0}a{0}s{0}s{0}i{0}s{0}t{0}a{0}n{0}t{0}\n{0}"]
    assert lines[4] == r"2{1}<|im_end|>{1}\n{0}"
    assert lines[7] == r"<|im_start|>u{-5.56}s{-5.56}e{-5.56}r{-5.56}\n{-5.56}"
    assert result["logprobs"][0] is None and close(result["logprobs"][1:], [-5.5568281] * (len(result["mask"]) - 1))


def test_the_change_between_two_models(folders, capsys):
    """After minus before: what the second model finds likelier than the first is above 0."""
    flat, sharp = str(folders / "flat"), str(folders / "sharp")
    same = view(folders, compare=[sharp, sharp])
    assert same["change"] == [None] + [0.0] * (len(same["mask"]) - 1)
    change = view(folders, compare=[flat, sharp])["change"]
    back = view(folders, compare=[sharp, flat])["change"]
    assert close(change[1:], [-x for x in back[1:]]) and any(x > 0.01 for x in change[1:])
    assert capsys.readouterr().out.count("change of the log-probability, in nats\n<|im_start|>u{0.00}") == 1


def test_what_cannot_be_shown_is_refused_in_one_line(folders):
    model = str(folders / "flat")
    with pytest.raises(UserError, match="holds no conversations; --tokens shows one"):
        view(folders, "text.jsonl", model=model)
    with pytest.raises(UserError, match="leave out --chat and --prompt"):
        view(folders, model=model, prompt="Hi")


# A rollout, token by token

ANSWER = {"step": 5, "reward": 1.0, "tokens": ["<s>", "2+2?", r"\n", "4", "</s>"],
          "advantages": [None, None, None, 0.5, -2.0], "ratios": [None, None, None, 1.25, 1.0]}


def test_an_answer_is_shown_by_advantage_and_by_ratio():
    """PPO: the 4 was half a reward better than the critic had expected, ending there was worse. The prompt has neither
    number: nobody sampled it. The 4 is now 1.25 times as likely; at clip_eps 0.2 nothing pushes it on.
    """
    assert show_rollout(ANSWER, False) == (
        "step 5, reward 1.000\n"
        "advantage, above 0: to be made likelier\n<s>2+2?\\n\n4{0.50}</s>{-2.00}\n"
        "\n"
        "ratio, probability now / when it was sampled\n<s>2+2?\\n\n4{1.25}</s>{1.00}\n")


@pytest.mark.parametrize("advantages, kept", [
    (torch.tensor([0.5, -0.5]), [[None, None, 0.5, 0.5], [None, None, -0.5]]),  # GRPO: one for the answer
    (torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]]), [[None, None, 1.0, 2.0], [None, None, 3.0]]),  # PPO: for a token
])
def test_what_is_kept_of_a_rollout(tmp_path, advantages, kept):
    """Two answers to "ab": "cd", whose d has become twice as likely (log-probability up by 0.693147), and "e", which
    has become half as likely; behind it stands padding. The micro-batch before them is not kept.
    """
    tokens = torch.tensor([BYTES.encode("abcd"), BYTES.encode("abe") + [BYTES.pad_id]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    part = MicroBatch(tokens, mask, last=torch.tensor([2, 1]), n_tokens=3, scores=torch.tensor([1.0, 0.0]),
                      advantages=advantages, old_logprobs=torch.full((2, 3), -2.0),
                      logprobs=torch.tensor([[-2.0, -2.0, -1.306853], [-2.0, -2.693147, -9.0]]))
    save_rollout(tmp_path, 6, BYTES, [MiniBatch([None], 1, 1), MiniBatch([part], 2, 3)])
    lines = [json.loads(line) for line in (tmp_path / "rollout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"step": 7, "reward": 1.0, "tokens": list("abcd"), "advantages": kept[0], "ratios": [None, None, 1.0, 2.0]},
        {"step": 7, "reward": 0.0, "tokens": list("abe"), "advantages": kept[1], "ratios": [None, None, 0.5]}]
    save_rollout(tmp_path, 6, BYTES, [MiniBatch([part], 2, 3)], most=1)
    assert len((tmp_path / "rollout.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_a_rollout_needs_no_model_to_be_shown(folders, capsys):
    (folders / "rollout.jsonl").write_text(json.dumps(ANSWER) + "\n" + json.dumps({**ANSWER, "reward": 0}) + "\n",
                                           encoding="utf-8")
    assert view(folders, "rollout.jsonl")["answers"][0] == ANSWER
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("4{0.50}</s>{-2.00}") == lines.count("4{1.25}</s>{1.00}") == 2
    assert lines[0] == "step 5, reward 1.000" and lines[9] == "step 5, reward 0.000"
    with pytest.raises(UserError, match="holds the numbers of its own policy; leave out --model"):
        view(folders, "rollout.jsonl", model="out/ppo")
    with pytest.raises(UserError, match="is a rollout; --tokens shows it"):
        evaluation.main(evaluation.Config(model=str(folders / "flat"), data=str(folders / "rollout.jsonl"),
                                          device="cpu"))


@pytest.mark.parametrize("change", [
    {"advantages": [None, 0.5]}, {"ratios": None}, {"ratios": [None, None, None, "1.25", 1.0]}, {"tokens": [1] * 5},
    {"reward": "good"}, {"advantages": [None, None, None, float("nan"), 1.0]}])
def test_a_damaged_rollout_is_refused_with_its_line(tmp_path, change):
    (tmp_path / "rollout.jsonl").write_text(json.dumps(ANSWER) + "\n" + json.dumps({**ANSWER, **change}) + "\n",
                                            encoding="utf-8")
    with pytest.raises(UserError, match="rollout.jsonl:2: not a line of rollout.jsonl, which --show_every writes"):
        view(tmp_path, "rollout.jsonl")


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_a_curve_as_blocks: `[(1, 3.0), (2, 3.0)]` -> `[(1, 3.0), (2, 3.1)]`. A change of 0.1: which two blocks?
# 2. test_without_a_terminal_the_number_stands_behind_the_token: `0.0, math.log(0.01)]` -> `0.0, math.log(0.1)]`.
#    Which number follows Bo?
