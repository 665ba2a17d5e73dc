"""Chapter 33: seeing inside. Curves of runs, a group of answers, a conversation token by token, and the drawings.

After this chapter you can read a line of blocks: the lowest value of a curve is the lowest block, the highest the full
one, so 1, 4.5 and 8 are ▁ ▄ █ (the range from 1 to 8 in steps of one block each). And you can read a conversation as
the loss sees it: 4{-0.69} is a token of log-probability -0.69, that is of probability 0.5.

The drawings in figures/ show the worked examples of other chapters. Every number in them is compared with the code.
"""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train_ppo
from minillm import checkpoint, curves
from minillm.attention import attention_mask_2d, document_positions
from minillm.data import PackedLoader
from minillm.errors import UserError
from minillm.losses import dpo_loss, gae, group_advantages
from minillm.metrics import show_samples
from minillm.model import CausalLM, ModelConfig
from minillm.optim import make_optimizers
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
                                                    ["|", "0.000", "|", "-0.500", "|", "5|", "|"]]
    assert "2 + 2?" in lines[0]


def test_answers_to_several_prompts_stand_behind_the_end_of_their_prompts():
    """A template's tokens go from a prompt, and stay in an answer: there they show whether it ended by itself."""
    prompt = "<|im_start|>system\n" + "x" * 99 + "\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    answers = [(prompt, "4<|im_end|>"), ("1?", "1\n2")]
    lines = show_samples("answers", answers, torch.ones(2), torch.zeros(2)).splitlines()
    assert lines[2].endswith("| " + "x" * 42 + " user 2 + 2? assistant: 4<|im_end|> |")  # 64 characters of the prompt
    assert lines[3].rstrip(" |").endswith("| 1?: 1 2")


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


# The drawings of the chapters

FIGURES = Path(__file__).parent / "figures"
SVG = "{http://www.w3.org/2000/svg}"


def part(figure, name):
    """The element of a drawing that has this id."""
    root = ElementTree.parse(FIGURES / f"{figure}.svg").getroot()
    return next(element for element in root.iter(f"{SVG}g") if element.get("id") == name)


def words(figure, *names):
    return [text.text for name in names for text in part(figure, name).iter(f"{SVG}text")]


def numbers(figure, name):
    return [float(word) for word in words(figure, name)]


def test_drawing_of_mask_and_shift():
    """Chapter 1: "1+1" is asked, "2" is said, one token for each byte."""
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    tokens, mask = BYTES.render(messages)
    drawn = [word.replace(r"\n", "\n") for word in words("mask_and_shift", "text1", "text2")]
    assert drawn == [BYTES.decode([token]) for token in tokens]
    assert [int(word) for word in words("mask_and_shift", "ids1", "ids2")] == tokens
    assert [word == "1" for word in words("mask_and_shift", "mask1", "mask2")] == mask


def test_drawing_of_a_packed_row():
    """Chapter 3's row of "ab" and "c": a document looks at itself alone, and padding at itself."""
    a, b, c = BYTES.encode("abc")
    documents = [(np.array([0, *text, 0]), np.array([False] + [True] * (len(text) + 1))) for text in ([a, b], [c])]
    batch = PackedLoader(documents, 1, 8, seed=0).collate([[0, 1]])
    names = {0: "end", a: "a", b: "b", c: "c"}
    assert words("packed_row", "tokens") == [names[token] for token in batch.tokens[0, :7].tolist()] + ["pad"]
    assert numbers("packed_row", "doc_ids") == batch.doc_ids[0].tolist()
    assert numbers("packed_row", "positions") == document_positions(batch.doc_ids)[0].tolist()
    assert numbers("packed_row", "loss_mask") == batch.loss_mask[0].tolist()
    seen = [int(cell.get("data-sees")) for cell in part("packed_row", "mask").iter(f"{SVG}rect")]
    assert seen == attention_mask_2d(None, batch.doc_ids, 8, 0, "cpu").int().flatten().tolist()


def test_drawing_of_a_pair():
    """Pair A of chapter 15, beta 0.5."""
    chosen, ref_chosen, reward = numbers("pair", "chosen")
    rejected, ref_rejected, rejected_reward = numbers("pair", "rejected")
    loss, stats = dpo_loss(*(torch.tensor([x]) for x in (chosen, rejected, ref_chosen, ref_rejected)), beta=0.5)
    assert (chosen, ref_chosen, rejected, ref_rejected) == (-10, -11, -12, -11)
    close([stats["chosen_rewards"], stats["rejected_rewards"]], [reward, rejected_reward])
    close([stats["margin"], loss], numbers("pair", "margin") + numbers("pair", "loss"))


def test_drawing_of_a_group():
    """The first group of chapter 18: two of four are right."""
    rewards = torch.tensor([numbers("group", "rewards")])
    assert rewards.tolist() == [[1, 0, 0, 1]]
    close(rewards - rewards.mean(), [numbers("group", "centred")])
    close(rewards.std(), numbers("group", "std")[0])
    assert words("group", "advantages") == [f"{a:.3f}" for a in group_advantages(rewards)[0].tolist()]


def test_drawing_of_the_rewards_of_ppo():
    """Chapter 23: kl_coef 0.2, the score 2 on the last token, gamma and lambda 1."""
    k1, score = torch.tensor(numbers("reward_row", "k1")), [0.0, 0.0, float(words("reward_row", "score")[0][2:])]
    assert k1.tolist() == [0.5, 0, -0.25] and score[2] == 2
    close(-0.2 * k1, numbers("reward_row", "kl"))
    rewards = numbers("reward_row", "rewards")
    close(-0.2 * k1 + torch.tensor(score), rewards)
    _, returns = gae(torch.tensor([rewards]), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    close(returns, [numbers("reward_row", "returns")])


def test_drawing_of_gae():
    """The three tokens of chapter 19, with gamma 1 and lambda 1/4."""
    rewards, values = torch.tensor([numbers("gae", "rewards")]), torch.tensor([numbers("gae", "values")])
    assert rewards.tolist() == [[0, 0, 1]]
    close(values, [[0.2, 0.4, 0.6]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    close(gae(rewards, values, mask, 1.0, 0.0)[0], [numbers("gae", "deltas")])
    advantages, returns = gae(rewards, values, mask, 1.0, 0.25)
    close(advantages, [numbers("gae", "advantages")])
    close(returns, [numbers("gae", "returns")])


def test_drawing_of_the_four_models():
    """Trained with AdamW, a parameter is four numbers of four bytes; frozen, it is one."""
    model = CausalLM(ModelConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, head_dim=8, intermediate_size=16))
    frozen = sum(p.nbytes for p in model.parameters())
    optimizers = make_optimizers(model, 1e-3)
    model(torch.tensor([[1, 2]])).sum().backward()
    trained = frozen + sum(p.grad.nbytes for p in model.parameters())
    for optimizer in optimizers:
        optimizer.step()
        trained += sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.numel() > 1)
    drawn = {name: sum(int(re.search(r" (\d+)$", word)[1]) for word in words("four_models", name))
             for name in ("policy", "value_model", "ref_model", "reward_model")}
    assert drawn == {"policy": 16, "value_model": 16, "ref_model": 4, "reward_model": 4}
    count = sum(p.numel() for p in model.parameters())
    assert (trained, frozen) == (16 * count, 4 * count) and "16 bytes a parameter each" in train_ppo.__doc__


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_a_curve_as_blocks: `[(1, 3.0), (2, 3.0)]` -> `[(1, 3.0), (2, 3.1)]`. A change of 0.1: which two blocks?
# 2. test_without_a_terminal_the_number_stands_behind_the_token: `0.0, math.log(0.01)]` -> `0.0, math.log(0.1)]`.
#    Which number follows Bo?
