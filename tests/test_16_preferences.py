"""Chapter 16: pairs of answers. How they become tokens, how an answer is scored, and who may be the judge.

After this chapter you know which tokens of a pair are compared, where a score is read, and how far a judge can be
trusted.

A pair is one prompt and two answers. Its tokens are

    <|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n          the prompt, encoded once, the same for both sides
    good<|im_end|>        bad<|im_end|>                             the answers: the only tokens that are compared

DPO compares log p(answer | prompt) of the two. A reward model reads a score at the last token, <|im_end|>.

Drawn in tests/figures/pair.svg.
"""

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import checkpoint, logprobs, rewards, runtime, token_cache
from minillm.checkpoint import load_model, save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.heads import RewardModel, ValueModel, load_reward_model, save_reward_model
from minillm.model import CausalLM, ModelConfig
from minillm.preferences import PairLoader, answer_logprobs, load_pairs, pair_logprobs, rank_pairs
from minillm.records import read_texts
from minillm.rewards import Judge, judge_reward, model_reward, question_text
from minillm.safetensors import load_safetensors, save_safetensors
from minillm.tokenizer import Tokenizer, train_tokenizer
from tests.helpers import close

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """On CPUs with bf16 the scripts use it; here all digits are compared."""
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "What is two plus two? The answer is four. Question: Answer A: B: Which answer is better, A or B?"
    return train_tokenizer([text] * 3, 300)


def small_lm(tokenizer, seed=0, **changes):
    """Weights five times the usual size, so that every token and position matters."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=512)
    model = CausalLM(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


@pytest.fixture
def lm_folder(tmp_path, tokenizer):
    save_model(tmp_path / "lm", small_lm(tokenizer), tokenizer)
    return tmp_path / "lm"


@pytest.fixture
def reward_folder(tmp_path, tokenizer):
    save_reward_model(tmp_path / "reward", RewardModel.from_lm(small_lm(tokenizer)), tokenizer)
    return tmp_path / "reward"


def turn(role, content):
    return {"role": role, "content": content}


def pair(question, chosen, rejected, **more):
    ask = [turn("user", question)]
    return {"chosen": ask + [turn("assistant", chosen)], "rejected": ask + [turn("assistant", rejected)], **more}


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def load(tmp_path, tokenizer, records, max_seq_len=64):
    """All the pairs of these records, as training data."""
    path = write(tmp_path / "pairs.jsonl", records)
    return load_pairs([path], path, tokenizer, max_seq_len, 0)[0]


# ---------------------------------------------------------------- from a line to tokens

@pytest.mark.parametrize("question, answers", [("two?", ("four", " five ")),
                                               ("<|im_end|>", ("<|im_start|>", "\n\n x"))])
def test_both_sides_share_the_prompts_tokens(tmp_path, tokenizer, question, answers):
    """Pitfall 8. Encoded as one text, "a: " + "b" could merge across the border on one side and not on the other."""
    pairs = load(tmp_path, tokenizer, [pair(question, *answers)])
    prompts = []
    for (tokens, mask), answer in zip(pairs[0], answers):
        assert mask.tolist() == sorted(mask.tolist()), "the answer is the end of the sequence"
        prompts.append(tokens[~mask].tolist())
        assert tokenizer.decode(tokens[mask].tolist()) == answer + "<|im_end|>"
        assert tokens[mask][-1] == tokenizer.end_id and (tokens[mask][:-1] != tokenizer.end_id).all()
    assert prompts[0] == prompts[1] == tokenizer.render([turn("user", question)], add_generation_prompt=True)[0]
    assert tokenizer.decode(prompts[0]) == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_only_the_last_answer_of_a_conversation_is_compared(tmp_path, tokenizer):
    """Before it stand a system message and an earlier answer, which both sides have."""
    before = [turn("system", "Be brief."), turn("user", "two?"), turn("assistant", "four"), turn("user", "sure?")]
    record = {"chosen": before + [turn("assistant", "Yes.")], "rejected": before + [turn("assistant", "No!")]}
    (chosen, mask), (rejected, _) = load(tmp_path, tokenizer, [record], max_seq_len=256)[0]
    start = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n"
             "<|im_start|>assistant\nfour<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(chosen.tolist()) == start + "Yes.<|im_end|>"
    assert tokenizer.decode(rejected.tolist()) == start + "No!<|im_end|>"
    assert tokenizer.decode(chosen[mask].tolist()) == "Yes.<|im_end|>"


@pytest.mark.parametrize("record", [
    {"prompt": [turn("user", "two?")], "chosen": [turn("assistant", "4")], "rejected": [turn("assistant", "5")]},
    {"prompt": "two?", "chosen": "4", "rejected": "5"},
    {"prompt": "two?", "chosen": [turn("assistant", "4")], "rejected": "5"},
    {"prompt": "two?", **pair("two?", "4", "5")},  # once more in front of each answer: it is not doubled
    {"prompt": [{**turn("user", "two?"), "id": 7}], **pair("two?", "4", "5")},
])
def test_a_prompt_beside_the_answers_is_their_prompt(tmp_path, tokenizer, record):
    """Its key is easily taken for one that may be ignored. Then answers are trained on without their question."""
    (chosen, chosen_mask), (rejected, rejected_mask) = load(tmp_path, tokenizer, [record])[0]
    assert tokenizer.decode(chosen.tolist()) == "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    assert tokenizer.decode(rejected.tolist()) == "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    assert tokenizer.decode(chosen[chosen_mask].tolist()) == "4<|im_end|>"
    assert tokenizer.decode(rejected[rejected_mask].tolist()) == "5<|im_end|>"


def test_a_prompt_of_several_messages_stands_before_both_answers(tmp_path, tokenizer):
    """A system message that only one of the two places has is kept."""
    prompt = [turn("system", "Be brief."), turn("user", "two?")]
    four, five = turn("assistant", "4"), turn("assistant", "5")
    for record in ({"prompt": prompt, "chosen": [four], "rejected": [five]},
                   {"prompt": "two?", "chosen": [*prompt, four], "rejected": [*prompt, five]}):
        for (tokens, _), answer in zip(load(tmp_path, tokenizer, [record])[0], "45"):
            assert tokenizer.decode(tokens.tolist()) == (
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n"
                f"<|im_start|>assistant\n{answer}<|im_end|>")


def test_a_tokenizer_is_trained_on_the_prompt_too(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "two?", "chosen": "4", "rejected": "5"}, pair("six?", "7", "8")])
    assert list(read_texts([path])) == ["two?", "4", "two?", "5", "six?", "7", "six?", "8"]


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path, tokenizer, capsys):
    """Each of these would cost ln 2 = 0.693 for ever, or teach the opposite of what was meant."""
    long = "word " * 60
    other = {**pair("q", "a", "b"), "rejected": [turn("user", "another q"), turn("assistant", "b")]}
    unanswered = {"chosen": [turn("user", "q")], "rejected": [turn("user", "q")]}
    pairs = load(tmp_path, tokenizer, [
        pair("kept", "a", "b"), other, pair("q", "same", "same"), pair("q", "", "b"), pair("q", "a", " \n"), unanswered,
        pair(long, "a", "b"), pair("q", long + "a", long + "b"), pair("cut", long, "b")])
    assert len(pairs) == 2
    counts = {reason: count for reason, count in pairs.stats.items() if "pairs" in reason}
    assert counts == {
        "pairs with different prompts, dropped": 1, "pairs with equal answers, dropped": 2,
        "pairs with an empty answer, dropped": 2, "pairs without an assistant's answer at the end, dropped": 1,
        "pairs whose prompt leaves no room for an answer, dropped": 1, "pairs with an answer cut at --max_seq_len": 1}
    printed = capsys.readouterr().out.splitlines()[0]
    assert all(f"{count} {reason}" in printed for reason, count in counts.items())
    (cut, mask), (whole, _) = pairs[1]
    assert len(cut) == 64 and mask.any() and cut[-1] != tokenizer.end_id and whole[-1] == tokenizer.end_id


def test_a_pair_keeps_all_it_can_hold(tmp_path, tokenizer):
    """Exactly as long as the limit: nothing is cut. One token more: the <|im_end|> goes."""
    whole = tokenizer.render(pair("q", "word word", "b")["chosen"])[0][:-len(tokenizer.encode("\n"))]
    for room, stats in ((len(whole), {}), (len(whole) - 1, {"pairs with an answer cut at --max_seq_len": 1})):
        pairs = load(tmp_path, tokenizer, [pair("q", "word word", "b")], max_seq_len=room)
        assert pairs[0][0][0].tolist() == whole[:room]
        assert {reason: count for reason, count in pairs.stats.items() if "pairs" in reason} == stats


def test_nothing_left_is_an_error(tmp_path, tokenizer):
    with pytest.raises(UserError, match="nothing to train on .*2 pairs with equal answers"):
        load(tmp_path, tokenizer, [pair("q", "a", "a"), pair("r", "b", "b")])


@pytest.mark.parametrize("record, message", [
    ({"conversations": [turn("user", "q")]}, "no key \"chosen\"; found: a conversation"),
    ({"chosen": "a", "rejected": "b"}, 'nothing stands before the answer in "chosen"'),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, '"prompt" must be a list of messages with at least one'),
    ({"prompt": "q", "chosen": "a"}, "no key \"rejected\"; found: 'prompt', 'chosen'"),
    ({"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "chosen": "a", "rejected": "b"},
     '"prompt" is written in the format of a chat template already (<|im_start|>); give the messages themselves'),
    ({"prompt": "q", "chosen": "a<|im_end|>\n", "rejected": "b<|im_end|>\n"},
     '"chosen" is written in the format of a chat template already (<|im_end|>)'),
    ({"prompt": "q", "chosen": "a", "rejected": 5}, '"rejected" must be text or a list of messages, not int'),
    ({"prompt": "q", **pair("another q", "a", "b")},
     '"chosen" must begin with the messages of "prompt" or with the assistant'),
    (pair("q", "a", None), '"content" of message 2 of "rejected" must be text'),
    (pair("q", "a", "b", margin="large"), "\"margin\" must be a number below a million, not 'large'"),
    (pair("q", "a", "b", margin=float("nan")), '"margin" must be a number below a million, not nan'),
])
def test_a_file_of_another_kind_is_refused_with_its_line(tmp_path, tokenizer, record, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, tokenizer, [pair("fine", "a", "b"), record])
    assert f"pairs.jsonl:2: {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_as_minimind_has_them(tmp_path, tokenizer, capsys):
    """dpo.jsonl: lists of messages, some with several turns and keys of their own; here compressed."""
    several = [turn("user", "你好"), turn("assistant", "你好！"), turn("user", "二加二？")]
    lines = [pair("q", "a", "b"), {"chosen": several + [turn("assistant", "四")],
                                   "rejected": several + [turn("assistant", "五")], "source": "x"}]
    with gzip.open(tmp_path / "dpo.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    pairs, held_out = load_pairs([str(tmp_path / "dpo.jsonl.gz")], "", tokenizer, 128, 0)
    assert len(pairs) == len(held_out) == 1 and pairs.kinds == [""] and pairs.margins.tolist() == [0.0]
    assert capsys.readouterr().out.endswith("held out for evaluation: 1 of 2 pairs\n")


def test_held_out_pairs_are_never_trained_on(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.jsonl",
                 [pair(f"question {i}", "a", "b", kind="rude", margin=i) for i in range(100)])
    pairs, held_out = load_pairs([path], "", tokenizer, 64, 3)
    assert len(held_out) == 5 and sorted(pairs.margins.tolist() + held_out.margins.tolist()) == list(range(100))
    for part in (pairs, held_out):
        text = tokenizer.decode(part[2][0][0].tolist())
        assert f"question {part.margins[2]:.0f}<" in text, "a margin belongs to its pair"


def test_no_copy_of_a_held_out_pair_is_trained_on(tmp_path, tokenizer, capsys):
    """100 pairs, each twice: five are held out, both copies of each. With another answer it is another pair."""
    records = [pair(f"question {i}", "a", "b", margin=i) for i in range(100)]
    path = write(tmp_path / "pairs.jsonl", records + records[::-1])
    pairs, held_out = load_pairs([path], "", tokenizer, 64, 0)
    assert (len(pairs), len(held_out), len(set(held_out.margins))) == (190, 10, 5)
    assert not set(pairs.margins) & set(held_out.margins)

    path = write(tmp_path / "two.jsonl", [pair("q", "a", "b"), pair("q", "a", "c")])
    assert [len(part) for part in load_pairs([path], "", tokenizer, 64, 0)] == [1, 1]
    path = write(tmp_path / "one.jsonl", [pair("q", "a", "b")] * 3)
    assert [len(part) for part in load_pairs([path], "", tokenizer, 64, 0)] == [3, 3]
    assert capsys.readouterr().out.endswith("a single pair: it is trained on and evaluated on\n")


# ---------------------------------------------------------------- batches

def numbered(tmp_path, tokenizer, n=50):
    """Pairs of many lengths, each with its number as its margin."""
    return load(tmp_path, tokenizer, [pair(f"q {i}" + " word" * (i * 7 % 11), f"yes {i}",
                                           f"no {i}" + " word" * (i % 5), margin=i) for i in range(n)])


def test_a_batch_holds_both_sides_of_its_pairs(tmp_path, tokenizer):
    """Row b and row B + b are one pair; a reward model and DPO compare exactly these."""
    pairs = numbered(tmp_path, tokenizer)
    for batch in PairLoader(pairs, 8, seed=0).epoch_batches(0):
        B = batch.n_pairs
        assert batch.tokens.shape == batch.answer_mask.shape and len(batch.tokens) == 2 * B
        for row in range(2 * B):
            i, side, n = batch.pairs[row % B], row // B, batch.lengths[row]
            tokens, mask = pairs[i][side]
            assert batch.tokens[row, :n].tolist() == tokens.tolist()
            assert batch.answer_mask[row, :n].tolist() == mask.tolist()
            assert not batch.answer_mask[row, n:].any() and batch.margins[row % B] == i
        answers = [tokens[mask] for side in (0, 1) for tokens, mask in (pairs[i][side] for i in batch.pairs)]
        assert batch.tokens.flatten()[batch.targets].tolist() == np.concatenate(answers).tolist()
        assert batch.n_tokens == sum(len(tokens) for i in batch.pairs for tokens, _ in pairs[i])
        assert batch.n_chosen_tokens == sum(int(pairs[i][0][1].sum()) for i in batch.pairs)


def order(batches) -> list:
    """The pairs of each batch."""
    return [batch.pairs.tolist() for batch in batches]


def test_every_pair_comes_once_in_an_epoch_and_in_another_order_in_the_next(tmp_path, tokenizer):
    loader = PairLoader(numbered(tmp_path, tokenizer), 8, seed=0)
    epochs = [order(loader.epoch_batches(epoch)) for epoch in (0, 1)]
    assert len(epochs[0]) == loader.batches(0) == 7
    assert all(sorted(i for batch in epoch for i in batch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_batches_of_similar_length_hold_little_padding(tmp_path, tokenizer):
    """Pitfall 17: in the order of the file more than a fifth of the batches would be padding."""
    def padding(batches):
        return 1 - sum(batch.n_tokens for batch in batches) / sum(batch.tokens.numel() for batch in batches)

    loader = PairLoader(numbered(tmp_path, tokenizer, 200), 10, seed=0)
    assert padding([loader.collate(list(range(i, i + 10))) for i in range(0, 200, 10)]) > 0.2
    assert padding(list(loader.epoch_batches(0))) < 0.13


def test_the_loader_goes_on_where_it_was(tmp_path, tokenizer):
    pairs = numbered(tmp_path, tokenizer)
    first, second = PairLoader(pairs, 8, seed=5), PairLoader(pairs, 8, seed=5)
    batches = iter(first)
    for _ in range(10):
        next(batches)
    second.load_state(first.state())
    again = iter(second)
    for _ in range(9):
        assert torch.equal(next(batches).tokens, next(again).tokens)


def test_two_processes_share_the_batches_of_one(tmp_path, tokenizer, monkeypatch):
    """17 pairs in batches of 8: each of two processes takes 4 of them, and in the last step, of a single pair, the
    second has none. It must take part all the same, with a batch without rows.
    """
    pairs = numbered(tmp_path, tokenizer, 17)
    whole = order(PairLoader(pairs, 8, seed=1).epoch_batches(0))
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(runtime, "rank", lambda: rank)
        parts.append(list(PairLoader(pairs, 8, seed=1).epoch_batches(0)))
    assert [len(batch) for batch in whole] == [8, 8, 1]
    for first, second, batch in zip(order(parts[0]), order(parts[1]), whole, strict=True):
        assert (first, second) == (batch[::2], batch[1::2])
    empty = parts[1][-1]
    assert (empty.n_pairs, empty.n_tokens, empty.n_chosen_tokens) == (0, 0, 0)
    assert empty.tokens.shape == empty.answer_mask.shape == (0, 8) and len(empty.margins) == 0


# ---------------------------------------------------------------- log p(answer | prompt)

def test_the_logprob_of_an_answer_is_the_sum_over_its_own_tokens(tmp_path, tokenizer):
    """Token by token with softmax and log, from a row without padding: with the <|im_end|>, without the prompt."""
    pairs, model = numbered(tmp_path, tokenizer, 6), small_lm(tokenizer)
    found = pair_logprobs(model, pairs, 4, CPU)
    average = pair_logprobs(model, pairs, 4, CPU, average=True)
    for i in range(6):
        for side in (0, 1):
            tokens, mask = pairs[i][side]
            with torch.no_grad():
                p = model(torch.tensor([tokens.tolist()])).double().softmax(-1)[0]
            expected = [p[t - 1, tokens[t]].log().item() for t in range(1, len(tokens)) if mask[t]]
            close(found[i, side], sum(expected))
            close(average[i, side], sum(expected) / len(expected))


def test_padding_changes_no_logprob_and_swapping_the_sides_flips_the_margin(tmp_path, tokenizer):
    model = small_lm(tokenizer)
    records = [pair(f"q {i}", "yes" + " word" * (3 * i), "no") for i in range(4)]
    together = pair_logprobs(model, load(tmp_path, tokenizer, records), 4, CPU)
    alone = pair_logprobs(model, load(tmp_path, tokenizer, records), 1, CPU)
    close(together, alone)
    swapped = [{"chosen": r["rejected"], "rejected": r["chosen"]} for r in records]
    close(pair_logprobs(model, load(tmp_path, tokenizer, swapped), 4, CPU), together.flip(1))


@pytest.mark.parametrize("picks", [True, False])
def test_no_gradient_reaches_the_model_from_the_prompt(tmp_path, monkeypatch, tokenizer, picks):
    """Only positions that predict a token of the answer have a gradient on their hidden state, on a CPU and elsewhere.
    """
    monkeypatch.setattr(logprobs, "_picks_rows", lambda x: picks)
    pairs, model = numbered(tmp_path, tokenizer, 2), small_lm(tokenizer)
    batch = next(iter(PairLoader(pairs, 2, seed=0)))
    hidden = model.hidden(batch.tokens).detach().requires_grad_()
    answer_logprobs(hidden, model.lm_head.weight, batch).sum().backward()
    used = hidden.grad.abs().sum(-1) > 0  # position t predicts token t + 1
    assert torch.equal(used[:, :-1], batch.answer_mask[:, 1:]) and not used[:, -1].any()


# ---------------------------------------------------------------- how good is a ranking

def test_accuracy_margin_and_calibration():
    """Margins ln 3, ln 3, -ln 3, 0: the stated confidences are 3/4, 3/4, 3/4, 1/2. Two wins, a loss and a tie are an
    accuracy of (2 + 1/2) / 4 = 0.625. The mean margin is ln 3 / 4 = 0.274653. In the bin of 3/4 the accuracy is 2/3,
    off by 1/12 for 3 of 4 pairs; in the bin of 1/2 it is 1/2. The calibration error is 1/12 x 3/4 = 0.0625.
    """
    ln3 = 1.0986122886681098
    scores = torch.tensor([[ln3, 0.0], [1.0, 1.0 - ln3], [-ln3, 0.0], [5.0, 5.0]])  # chosen, rejected
    found = rank_pairs(scores, ["rude", "wrong", "wrong", "rude"])
    close(found["preference_accuracy"], 0.625)
    assert found["accuracy_by_kind"] == {"rude": 0.75, "wrong": 0.5}
    close(found["margin"], 0.2746531)
    close(found["calibration_error"], 0.0625)
    assert found["reliability"] == [[0.5, 0.5, 1], [0.75, 0.6667, 3]]


def test_a_policy_that_is_the_reference_prefers_nothing():
    """Ties count half: 0 would read as "always wrong", 1 as "always right"."""
    found = rank_pairs(torch.zeros(8, 2), [""] * 8)
    assert (found["preference_accuracy"], found["calibration_error"], found["accuracy_by_kind"]) == (0.5, 0.0, {})


def test_sure_and_wrong_is_badly_calibrated():
    close(rank_pairs(torch.tensor([[-20.0, 0.0]] * 4), [""] * 4)["calibration_error"], 1.0)


# ---------------------------------------------------------------- the scalar head

def test_a_score_is_read_at_the_last_token_whatever_stands_behind_it(tokenizer):
    """Also when the padding is the end token itself. A search for the first pad, or for the last token that is no pad,
    would then read the score one token too early.
    """
    model = RewardModel.from_lm(small_lm(tokenizer))
    tokens, end = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0)), tokenizer.end_id
    tokens[0, 6] = end
    alone = model(tokens[:1, :7], torch.tensor([7]))
    for filler in (tokenizer.pad_id, end, 77):
        tokens[0, 7:] = filler
        scores = model(tokens, torch.tensor([7, 12]))
        assert scores.shape == (2,) and scores.dtype == torch.float32
        close(scores[:1], alone)
    for length in (6, 8):
        assert abs(model(tokens[:1], torch.tensor([length])) - alone) > 1e-2


def test_a_value_for_each_token_from_what_came_before_it(tokenizer):
    """Causal: a later token changes no earlier value. The last value is the reward of the same weights."""
    reward_model = RewardModel.from_lm(small_lm(tokenizer))
    value_model = ValueModel.from_reward_model(reward_model)
    tokens = torch.arange(20).view(2, 10) + 5
    values = value_model(tokens)
    assert values.shape == (2, 10)
    close(values[:, -1], reward_model(tokens, torch.tensor([10, 10])))
    tokens[:, 7] += 1
    changed = value_model(tokens)
    close(changed[:, :7], values[:, :7])
    assert (changed[:, 7:] - values[:, 7:]).abs().min() > 1e-4


def test_values_are_shifted_and_scaled_as_the_scores_are(tokenizer):
    """Hidden states (2, 1) and (0, 1), weight (3, 1), bias 0: values 7 and 1. If scores become (score - 3) / 4, the
    values become (7 - 3) / 4 = 1 and (1 - 3) / 4 = -0.5. Once more with (score + 1) / 0.5: 4 and 1.
    """
    value_model = ValueModel.from_reward_model(RewardModel.from_lm(small_lm(tokenizer, hidden_size=2)))
    with torch.no_grad():
        value_model.score.weight.copy_(torch.tensor([[3.0, 1.0]]))
        hidden = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        close(value_model.scores(hidden), [7.0, 1.0])
        value_model.normalise(3.0, 4.0)
        close(value_model.scores(hidden), [1.0, -0.5])
        value_model.normalise(-1.0, 0.5)
        close(value_model.scores(hidden), [4.0, 1.0])


def test_the_final_norm_is_applied_once(tokenizer):
    """Pitfall 6: the hidden states are normed already. By hand: weight times hidden state, at the last token."""
    lm = small_lm(tokenizer)
    model, tokens = RewardModel.from_lm(lm), torch.tensor([[5, 6, 7]])
    close(model(tokens, torch.tensor([3])), (lm.hidden(tokens)[0, 2] * model.score.weight[0]).sum()[None])


def test_scores_keep_their_digits_under_autocast(tokenizer):
    """bf16 has 8 bits: near 300 it knows only even numbers."""
    model = RewardModel.from_lm(small_lm(tokenizer))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.score.weight.mul_(1e3)
        scores = model(torch.arange(40).view(4, 10) + 5, torch.full((4,), 10))
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


class Products(TorchDispatchMode):
    """The names of the products that are computed."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head, shape", [(RewardModel, (3, 32)), (ValueModel, (2, 5, 32)), (ValueModel, (0, 5, 32))])
def test_the_head_takes_no_product_that_a_gpu_would_round(tokenizer, head, shape):
    """On CUDA the scripts let PyTorch multiply two float32 matrices in TF32, which has 11 significant bits instead of
    24. A matrix and a vector it multiplies in full, forward and backward."""
    model, hidden = head.from_lm(small_lm(tokenizer)), torch.ones(shape, requires_grad=True)
    with Products() as products:
        scores = model.scores(hidden)
        scores.sum().backward()
    assert scores.shape == shape[:-1] and "mv" in products.names
    assert not {"mm", "addmm", "bmm", "baddbmm", "linear"} & set(products.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(64, 1024), (4, 256, 1024), (1, 1, 1024)])
def test_on_a_gpu_scores_have_all_digits(shape):
    """With TF32 allowed, as in the scripts. It would be off by a thousandth of |hidden| |weight|."""
    torch.manual_seed(0)
    model = ValueModel.from_lm(CausalLM(ModelConfig(hidden_size=1024, num_hidden_layers=1))).cuda()
    hidden = torch.randn(shape, device="cuda", requires_grad=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        scores = model.scores(hidden)
        scores.sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)
    exact = (hidden.double() @ model.score.weight[0].double()).float()
    assert (scores - exact).abs().max() < 1e-5 * 32 * model.score.weight.norm()  # |hidden| is about sqrt(1024)
    assert close(hidden.grad, model.score.weight[0].expand(shape))
    exact = hidden.double().flatten(0, -2).sum(0)
    assert (model.score.weight.grad[0] - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_reward_model_comes_back_from_its_folder(reward_folder, tokenizer):
    model, tokens = RewardModel.from_lm(small_lm(tokenizer)), torch.tensor([[5, 6, 7]])
    save_reward_model(reward_folder, model, tokenizer)
    again = load_reward_model(reward_folder)
    assert torch.equal(model(tokens, torch.tensor([3])), again(tokens, torch.tensor([3])))
    config = json.loads((reward_folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert config["num_labels"] == 1 and config["pad_token_id"] == tokenizer.pad_id
    assert set(load_safetensors(reward_folder / "model.safetensors")) == set(model.state_dict())


def test_a_language_model_is_no_reward_model_nor_the_other_way_round(lm_folder, reward_folder):
    with pytest.raises(UserError, match="is no reward model .it holds .'Qwen3ForCausalLM'..; python train_reward.py"):
        load_reward_model(lm_folder)
    with pytest.raises(UserError, match="is a reward model"):
        load_model(reward_folder)


@pytest.mark.parametrize("change, message", [
    ({"score.weight": torch.zeros(2, 32)}, r"score.weight \(2, 32\) instead of \(1, 32\)"),
    ({"score.weight": None}, "missing score.weight"),
    ({"score.bias": torch.zeros(1)}, "unexpected score.bias"),
])
def test_weights_that_do_not_fit_are_refused(reward_folder, change, message):
    """Pitfall 19."""
    weights = {**load_safetensors(reward_folder / "model.safetensors"), **change}
    weights = {name: tensor.clone() for name, tensor in weights.items() if tensor is not None}
    save_safetensors(reward_folder / "model.safetensors", weights)
    with pytest.raises(UserError, match=message):
        load_reward_model(reward_folder)


def test_transformers_gives_the_same_scores(reward_folder, tokenizer):
    """It reads the score at the last token that is no padding."""
    transformers = pytest.importorskip("transformers")
    classifier = transformers.AutoModelForSequenceClassification
    theirs, report = classifier.from_pretrained(reward_folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(theirs).__name__ == "Qwen3ForSequenceClassification" and theirs.config.num_labels == 1
    chats = [pair("two?", answer, "x")["chosen"] for answer in ("four", "four, of course, what else", "五")]
    rows = [tokenizer.render(chat[:-1], add_generation_prompt=True)[0] + tokenizer.encode(chat[-1]["content"])
            + [tokenizer.end_id] for chat in chats]
    tokens = torch.full((3, max(map(len, rows))), tokenizer.pad_id)
    for row, ids in zip(tokens, rows):
        row[:len(ids)] = torch.tensor(ids)
    ours = load_reward_model(reward_folder)
    with torch.no_grad():
        scores = ours(tokens, torch.tensor([len(r) for r in rows]))
        same = theirs.eval()(tokens, attention_mask=tokens != tokenizer.pad_id).logits[:, 0]
    assert scores.std() > 0.1 and (scores - same).abs().max() < 1e-4
    answers = [answer["content"] for _, answer in chats]
    close(torch.tensor(model_reward(reward_folder)([(chats[0][:1], answers, {})])), scores)


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_a_reward_model_of_transformers_loads_here(tmp_path, kind, tokenizer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=70, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=40, num_labels=1, pad_token_id=0, initializer_range=0.3)
    theirs = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(1, 70, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits[:, 0]
        assert (load_reward_model(tmp_path / "theirs")(tokens, torch.tensor([9, 9])) - expected).abs().max() < 1e-4


# ---------------------------------------------------------------- models as rewards

def test_a_reward_model_scores_each_answer_up_to_its_end(reward_folder, tokenizer):
    """It reads the sequence that it was trained on: prompt, answer, <|im_end|>, and no newline after it. Neither the
    order of the answers nor the other answers change a score.
    """
    reward, model = model_reward(reward_folder), load_reward_model(reward_folder)
    messages = [turn("user", "two?")]
    scores = reward([(messages, ["four", "I do not know that", ""], {})])
    assert len(scores) == 3 and all(type(s) is float for s in scores)
    prompt = "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.encode(prompt, allow_special=True) + tokenizer.encode("four") + [tokenizer.end_id]
    assert tokenizer.decode(tokens) == prompt + "four<|im_end|>"
    tokens = torch.tensor([tokens])
    close(scores[0], model(tokens, torch.tensor([tokens.shape[1]]))[0])
    close(torch.tensor(reward([(messages, [""], {}), (messages, ["four"], {})])), [scores[2], scores[0]])


def test_a_reward_model_from_elsewhere_is_read_at_the_last_token_of_its_chat_template(reward_folder, tokenizer):
    """Its config.json lacks our label. Its users score what apply_chat_template writes, and that ends with a new line.
    """
    document = json.loads((reward_folder / "config.json").read_text(encoding="utf-8"))
    document |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    theirs = reward_folder.parent / "theirs"
    shutil.copytree(reward_folder, theirs)
    (theirs / "config.json").write_text(json.dumps(document), encoding="utf-8")
    chats = [[turn("user", "two?"), turn("assistant", answer)] for answer in ("four", "I do not know that")]
    rows = [tokenizer.render(chat)[0] for chat in chats]
    assert all(tokenizer.decode(row).endswith("<|im_end|>\n") for row in rows)
    model = load_reward_model(theirs)
    expected = torch.stack([model(torch.tensor([row]), torch.tensor([len(row)]))[0] for row in rows]).detach()
    found = model_reward(theirs)([(chats[0][:1], [chat[1]["content"] for chat in chats], {})])
    assert close(torch.tensor(found), expected)
    assert not torch.allclose(expected, torch.tensor(model_reward(reward_folder)(
        [(chats[0][:1], [chat[1]["content"] for chat in chats], {})])))


@pytest.mark.parametrize("answer", ["four", " four", "four\n", "\n\nfour", ""])
def test_an_answer_is_scored_as_the_pairs_write_it(reward_folder, tokenizer, monkeypatch, answer):
    """Llama 3's template strips what is said: white space around a sampled answer must not reach the model either."""
    stripping = Tokenizer.load(reward_folder)
    stripping.chat_format = stripping.chat_format._replace(trim=True)
    monkeypatch.setattr(Tokenizer, "load", lambda folder: stripping)
    seen = []
    monkeypatch.setattr(rewards, "_in_batches", lambda model, rows, device: seen.extend(rows) or [0.0] * len(rows))
    model_reward(reward_folder)([([turn("user", "two?")], [answer], {})])
    said = [turn("user", "two?"), turn("assistant", answer.strip())]
    assert seen == [stripping.render(said)[0][:len(seen[0])]]
    assert seen[0][-1] == tokenizer.end_id and tokenizer.decode(seen[0]).endswith(f"\n{answer.strip()}<|im_end|>")


def test_more_tokens_than_a_reward_model_has_context_are_refused(reward_folder, tokenizer):
    document = json.loads((reward_folder / "config.json").read_text(encoding="utf-8"))
    short = reward_folder.parent / "short"
    shutil.copytree(reward_folder, short)
    (short / "config.json").write_text(json.dumps(document | {"max_position_embeddings": 64}), encoding="utf-8")
    reward = model_reward(short)
    length = len(tokenizer.render([turn("user", "?")], add_generation_prompt=True)[0])
    assert reward([([turn("user", "?")], ["x" * (63 - length)], {})])
    with pytest.raises(UserError, match="has a context of 64 tokens, and a prompt with its answer has 65; shorten"):
        reward([([turn("user", "?")], ["x" * (64 - length)], {})])


def test_a_frozen_reward_model_is_held_in_bf16_where_that_changes_no_score(reward_folder, monkeypatch):
    """Autocast rounds the matrices anyway: all scores are the same to the bit. The 2 x 7,680 numbers of the layers
    take 2 bytes instead of 4. The head stays float32."""
    answers = [([turn("user", "two?")], ["four", "I do not know that", ""], {})]
    whole = load_reward_model(reward_folder)
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(rewards, "load_reward_model", lambda *_: whole)
        patch.setattr(runtime, "hold_in_bf16", lambda model: model)
        expected = model_reward(reward_folder)(answers)
    held = load_reward_model(reward_folder)
    monkeypatch.setattr(rewards, "load_reward_model", lambda *_: held)
    assert model_reward(reward_folder)(answers) == expected and len(set(expected)) == 3
    sizes = [sum(p.nbytes for p in model.parameters()) for model in (whole, held)]
    assert sizes[0] - sizes[1] == 2 * 2 * 7_680  # q, o 1,024 each, k, v 512 each, mlp 3 x 1,536
    assert held.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert held.score.weight.dtype == held.model.embed_tokens.weight.dtype == torch.float32


def test_a_judge_says_a_or_b(lm_folder, tokenizer):
    """The probability of "A" against "B" as the first token of the verdict, the same alone and in a batch."""
    judge = Judge(lm_folder)
    prompts = ["Which answer is better, A or B?", "short", "两个都好吗？ and a longer one besides"]
    found = judge.ask(prompts)
    close(torch.tensor(judge.ask(prompts, batch_size=1)), found)
    model = load_model(lm_folder)
    a, b = tokenizer.encode("A")[0], tokenizer.encode("B")[0]
    for prompt, p in zip(prompts, found):
        tokens, _ = tokenizer.render([turn("user", prompt)], add_generation_prompt=True)
        with torch.no_grad():
            odds = model(torch.tensor([tokens]))[0, -1].double().exp()
        close(p, (odds[a] / (odds[a] + odds[b])).item())


def test_a_frozen_judge_is_held_in_bf16_where_that_changes_no_verdict(lm_folder, monkeypatch):
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)
    held, prompts = Judge(lm_folder), ["Which answer is better, A or B?", "short"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "hold_in_bf16", lambda model, *_: model)
        whole = Judge(lm_folder)
    weights = [judge.model.model.layers[0].mlp.up_proj.weight.dtype for judge in (held, whole)]
    assert weights == [torch.bfloat16, torch.float32]
    assert held.ask(prompts) == whole.ask(prompts)


def test_both_orders_cancel_a_judges_love_for_the_first_place(lm_folder, monkeypatch):
    """A judge that says "A" with 0.9 whatever it reads: 0.9 in the first place, 0.1 in the second, a mean of 1/2."""
    judge = Judge(lm_folder)
    asked = []

    def always_a(prompts, batch_size):
        asked.extend(prompts)
        return [0.9] * len(prompts)

    monkeypatch.setattr(judge, "ask", always_a)
    ((first, second),) = judge.compare([([turn("user", "q")], "one", "two", {})])
    close([first, second], [0.9, 0.1])
    assert asked == ["Question: q\nAnswer A: one\nAnswer B: two\nWhich answer is better, A or B?",
                     "Question: q\nAnswer A: two\nAnswer B: one\nWhich answer is better, A or B?"]
    judge.compare([([turn("user", "二加二？")], "四", "五", {"lang": "zho"})])  # a key of one's own data says nothing
    assert asked[2] == "问题：二加二？\n回答A：四\n回答B：五\n哪个回答更好，A还是B？"


def test_a_judge_sees_the_whole_conversation():
    assert question_text([turn("user", "q")]) == "q"
    several = [turn("system", "s"), turn("user", "q"), turn("assistant", "a"), turn("user", "r")]
    assert question_text(several) == "system: s\nuser: q\nassistant: a\nuser: r"


def test_the_judge_as_a_reward_is_a_probability_and_half_for_its_own_answer(lm_folder, tokenizer):
    reward, model = judge_reward(lm_folder, max_new_tokens=5), load_model(lm_folder)
    messages = [turn("user", "two?")]
    tokens, own = tokenizer.render(messages, add_generation_prompt=True)[0], []
    while len(own) < 5:  # the judge's own greedy answer
        own.append(int(model(torch.tensor([tokens + own]))[0, -1].argmax()))
        if own[-1] == tokenizer.end_id:
            own.pop()
            break
    scores = reward([(messages, [tokenizer.decode(own), "four", "no idea at all"], {})])
    close(scores[0], 0.5)
    assert all(0 < s < 1 and type(s) is float for s in scores) and abs(scores[1] - scores[2]) > 1e-3


# ---------------------------------------------------------------- AI feedback

def label(*flags) -> dict:
    """data/label_preferences.py, run in this process on the CPU: its report."""
    spec = importlib.util.spec_from_file_location("label_preferences", ROOT / "data" / "label_preferences.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main(parse_config(script.Config, "", [str(flag) for flag in ("--device", "cpu", *flags)]))


@pytest.fixture
def talkative(tmp_path, tokenizer):
    """A folder whose model ends its random answers soon."""
    model = small_lm(tokenizer, tie_word_embeddings=False)
    with torch.no_grad():  # about every fifth token is <|im_end|>
        direction = model.hidden(torch.randint(3, 200, (4, 30))).mean((0, 1))
        model.lm_head.weight.mul_(0.2)
        model.lm_head.weight[tokenizer.end_id] = 4.0 * direction / direction.norm() ** 2
    save_model(tmp_path / "talkative", model, tokenizer)
    return tmp_path / "talkative"


def test_ai_feedback_becomes_ordinary_pairs(tmp_path, tokenizer, talkative, lm_folder):
    prompts = [{"conversations": [turn("user", f"question {i}?")], "task": "talk", "lang": "en"} for i in range(80)]
    out = tmp_path / "made" / "preference.jsonl"
    report = label("--policy", talkative, "--judge", lm_folder, "--out", out, "--max_new_tokens", 40,
                   "--min_confidence", 0.5, "--prompts", write(tmp_path / "prompts.jsonl", prompts))
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == report["pairs"] > 0
    assert report["pairs"] + sum(report["dropped"].values()) == report["prompts"] == 80
    assert 0 <= report["first_answer_preferred"] <= 1 and all(0.5 <= line["confidence"] <= 1 for line in lines)
    pairs, _ = load_pairs([str(out)], str(out), tokenizer, 256, 0)
    assert len(pairs) == len(lines)
    # the judge does prefer what was chosen, on the mean of both orders
    found = Judge(lm_folder).compare([(line["chosen"][:-1], line["chosen"][-1]["content"],
                                       line["rejected"][-1]["content"], line) for line in lines])
    assert all(first + second > 1 - 1e-4 for first, second in found)


def test_a_judge_that_only_sees_the_place_labels_nothing(tmp_path, tokenizer, talkative, monkeypatch):
    monkeypatch.setattr(Judge, "ask", lambda self, prompts, batch_size: [0.9] * len(prompts))
    path = write(tmp_path / "prompts.jsonl", [{"conversations": [turn("user", f"q {i}")]} for i in range(10)])
    with pytest.raises(UserError, match="no pair is left of 10 prompts: .*confidence too low"):
        label("--policy", talkative, "--judge", talkative, "--prompts", path, "--out", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_the_mean_of_both_orders_decides(tmp_path, tokenizer, talkative, monkeypatch):
    """A judge that likes the first place: it gives A 0.9 where the answer is shown first and, with the places changed,
    again 0.7 to the one shown first, so 0.3 to the answer. Its mean is (0.9 + 0.3) / 2 = 0.6: the answer wins. The two
    orders disagree, and yet something was learned about the pair."""
    monkeypatch.setattr(Judge, "ask", lambda self, prompts, batch_size:
                        [0.9] * (len(prompts) // 2) + [0.7] * (len(prompts) // 2))
    path = write(tmp_path / "prompts.jsonl", [{"conversations": [turn("user", f"q {i}")]} for i in range(10)])
    report = label("--policy", talkative, "--judge", talkative, "--prompts", path, "--out", tmp_path / "x.jsonl",
                   "--min_confidence", 0.55)
    assert report["orders_disagree"] == 1 and report["pairs"] > 0
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["confidence"] for line in lines} == {0.6}


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_accuracy_margin_and_calibration: `[5.0, 5.0]` -> `[6.0, 5.0]`. What becomes of the accuracy and of the mean
#    margin?
# 2. test_both_orders_cancel_a_judges_love_for_the_first_place: `[0.9] * len` -> `[0.6] * len`. What is the mean of
#    both orders?
