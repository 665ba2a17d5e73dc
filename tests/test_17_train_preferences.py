"""Chapter 17: train_reward.py and train_dpo.py as they run: what they start from, what they log, what they leave behind."""

import itertools
import json
import math

import pytest
import torch

import eval as evaluation
import train_dpo
import train_reward
from minillm import data, peft, runtime
from minillm.checkpoint import load_model, load_safetensors, save_model
from minillm.config import parse_config
from minillm.data import PairDataset, load_pairs
from minillm.errors import UserError
from minillm.heads import load_reward_model
from minillm.model import CausalLM, ModelConfig
from minillm.preferences import pair_logprobs
from minillm.tokenizer import train_tokenizer
from tests.helpers import close, forbid_waiting_in_updates

LN2 = 0.6931471805599453
THINGS = "abcdefghijklmnopqrstuvwxyzABCDEF"


@pytest.fixture(autouse=True)
def own_cache_and_float32(tmp_path, monkeypatch):
    """bf16, which the scripts take where a CPU has it, would hide the digits that are compared here."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("minillm.runtime.torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["It is red. It is blue."] * 3, 280)


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    save_model(tmp_path / "model", small_model(tokenizer), tokenizer)
    return tmp_path / "model"


def small_model(tokenizer, seed=0):
    """Random, with larger weights than usual: it tells one prompt from another, as a model that has learned something does."""
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 head_dim=16, intermediate_size=128))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def some_pairs(n=32):
    """Which colour is preferred follows no rule: it has to be learned by heart."""
    colours, records = ("It is red.", "It is blue."), []
    chance = torch.Generator().manual_seed(0)
    for i in range(n):
        first = int(torch.randint(2, (1,), generator=chance))
        ask = [{"role": "user", "content": THINGS[i] + "?"}]
        chosen, rejected = (ask + [{"role": "assistant", "content": colours[j]}] for j in (first, 1 - first))
        records.append({"chosen": chosen, "rejected": rejected, "kind": ("even", "odd")[i % 2]})
    return records


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(tmp_path, model_folder):
    """run(script, out, flags...) -> the script's result, in this process; data and held-out data are the same 32 pairs."""
    path = write(tmp_path / "pairs.jsonl", some_pairs())

    def go(script, out, *flags):
        argv = ["--model", model_folder, "--data", path, "--eval_data", path, "--out", tmp_path / out, "--device", "cpu", "--log_every", 1, *flags]
        return script.main(parse_config(script.Config, "", [str(x) for x in argv]))

    return go


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- does it learn

def test_a_reward_model_learns_32_pairs_by_heart(tmp_path, run):
    result = run(train_reward, "reward", "--max_steps", 60, "--batch_size", 16, "--lr", 3e-3)
    assert result["preference_accuracy"] > 0.95 and set(result["accuracy_by_kind"]) == {"even", "odd"}
    assert result["margin"] > 1 and result["chosen_rewards"] - result["rejected_rewards"] == pytest.approx(result["margin"], abs=1e-4)
    summary = json.loads((tmp_path / "reward" / "summary.json").read_text())
    assert 0.2 < summary["before"]["preference_accuracy"] < 0.8 and summary["data"]["documents"] == 32
    assert {"loss", "accuracy", "margin", "lr"} <= set(logged(tmp_path / "reward")[0])
    load_reward_model(tmp_path / "reward")


@pytest.mark.parametrize("flags", [[], ["--loss", "ipo", "--beta", 0.2], ["--peft", "lora", "--rank", 16, "--lr", 1e-2]], ids=["dpo", "ipo", "lora"])
def test_dpo_learns_32_pairs_by_heart(run, flags):
    result = run(train_dpo, "dpo", "--max_steps", 30, "--batch_size", 16, "--beta", 0.1, "--lr", 3e-3, *flags)
    assert result["preference_accuracy"] > 0.95
    assert result["chosen_rewards"] > result["rejected_rewards"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", [train_reward, train_dpo])
def test_no_step_waits_for_the_gpu(monkeypatch, run, script):
    happened = forbid_waiting_in_updates(monkeypatch, runtime, "finite_mean")
    run(script, "out", "--device", "cuda", "--no-compile", "--max_steps", 6, "--log_every", 3)
    assert [name for name, _ in itertools.groupby(happened)] == ["sum_gradients", "finite_mean"] * 2 and happened.count("sum_gradients") == 6


# ---------------------------------------------------------------- where it starts, what it says

def test_dpo_starts_at_ln_2(tmp_path, run):
    """Before its first update the policy is the reference: no reward, no margin, loss ln 2, and every pair is a tie."""
    run(train_dpo, "dpo", "--max_steps", 3, "--batch_size", 32, "--beta", 0.1, "--lr", 1e-3)
    first, second, _ = logged(tmp_path / "dpo")
    close(first["loss"], LN2)
    close([first["margin"], first["chosen_rewards"], first["rejected_rewards"]], [0.0, 0.0, 0.0])
    assert second["loss"] < LN2 and second["margin"] > 0
    assert {"loss", "accuracy", "margin", "chosen_rewards", "rejected_rewards", "chosen_logprobs", "lr"} <= set(first)
    assert json.loads((tmp_path / "dpo" / "summary.json").read_text())["before"]["preference_accuracy"] == 0.5


def test_ipo_starts_at_its_targets_square(tmp_path, run):
    """h = 0: the loss is (1 / (2 x 0.25)) ** 2 = 4."""
    run(train_dpo, "ipo", "--max_steps", 1, "--loss", "ipo", "--beta", 0.25)
    close(logged(tmp_path / "ipo")[0]["loss"], 4.0)


def test_label_smoothing_reaches_the_loss(tmp_path, run):
    """With half the labels wrong there is nothing to learn: the gradient at the start is 0, and ln 2 stays."""
    run(train_dpo, "dpo", "--max_steps", 4, "--label_smoothing", 0.5, "--lr", 1e-3)
    close([line["loss"] for line in logged(tmp_path / "dpo")], [LN2] * 4)


def test_a_margin_in_the_data_reaches_the_reward_loss(tmp_path, run):
    """A chosen answer that should win by 50 costs about 50 at the start, and not ln 2."""
    path = write(tmp_path / "margins.jsonl", [{**r, "margin": 50} for r in some_pairs(8)])
    run(train_reward, "plain", "--max_steps", 1)
    run(train_reward, "margin", "--max_steps", 1, "--data", path)
    assert abs(logged(tmp_path / "plain")[0]["loss"] - LN2) < 0.3 and abs(logged(tmp_path / "margin")[0]["loss"] - 50) < 1


@pytest.mark.parametrize("script", [train_reward, train_dpo])
def test_micro_batches_add_up_to_the_batch(tmp_path, run, script):
    """Pitfall 3. 8 pairs at once, or 3 + 3 + 2 in three ragged micro-batches of one step: the same loss and update. A mean of
    the three means would weigh the pairs of the last one half as much again."""
    path = write(tmp_path / "eight.jsonl", some_pairs(8))
    for out, size, parts in (("whole", 8, 1), ("parts", 3, 3)):
        run(script, out, "--data", path, "--max_steps", 1, "--batch_size", size, "--grad_accum", parts, "--lr", 1e-3, "--warmup_steps", 0)
    whole, parts = logged(tmp_path / "whole")[0], logged(tmp_path / "parts")[0]
    for name in whole.keys() - {"tokens_per_s"}:
        assert whole[name] == pytest.approx(parts[name], abs=1e-5), name
    a, b = (load_safetensors(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    # AdamW's first step has the size of lr whatever the gradient's: compare where a gradient is not mere rounding
    moved = [((a[name] - b[name]).abs() > 1e-5).float().mean().item() for name in a]
    assert sum(moved) / len(moved) < 0.02


def test_the_sft_loss_beside_the_reward_is_that_of_the_chosen_answers(tmp_path, run, model_folder, tokenizer):
    """Logged before the first update: the mean of -log p over the tokens of all chosen answers, each alone, and of no rejected one.
    With --sft_coef 0 it is not there; with it, other weights are learned."""
    run(train_reward, "both", "--max_steps", 1, "--batch_size", 32, "--lr", 1e-3)
    run(train_reward, "alone", "--max_steps", 1, "--batch_size", 32, "--lr", 1e-3, "--sft_coef", 0)
    model, total, count = load_model(model_folder), 0.0, 0
    for record in some_pairs():
        tokens, mask = tokenizer.render(record["chosen"])
        logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)
        for t in range(1, len(tokens)):
            if mask[t]:
                total, count = total - logprobs[t - 1, tokens[t]].item(), count + 1
    first, alone = logged(tmp_path / "both")[0], logged(tmp_path / "alone")[0]
    assert first["sft_loss"] == pytest.approx(total / count, abs=1e-4)
    assert "sft_loss" not in alone and alone["loss"] == pytest.approx(first["loss"], abs=1e-5)
    one, other = (load_safetensors(tmp_path / out / "model.safetensors") for out in ("both", "alone"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_reward_model_of_untied_weights_leaves_the_lm_head_out(tmp_path, run, tokenizer, monkeypatch):
    """The SFT loss reads the LM head of its own and does not train it; the folder is that of a one-label classifier."""
    untied = CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                  num_key_value_heads=1, head_dim=16, intermediate_size=48, tie_word_embeddings=False))
    save_model(tmp_path / "untied", untied, tokenizer)
    models, load = [], train_reward.checkpoint.load_model
    monkeypatch.setattr(train_reward.checkpoint, "load_model", lambda *arguments: models.append(load(*arguments)) or models[-1])
    run(train_reward, "reward", "--model", tmp_path / "untied", "--max_steps", 2)
    head = models[0].lm_head.weight
    assert head.grad is None and torch.equal(head, untied.lm_head.weight)
    assert not torch.equal(models[0].model.norm.weight, untied.model.norm.weight)  # while the backbone is trained
    names = load_safetensors(tmp_path / "reward" / "model.safetensors").keys()
    assert "score.weight" in names and not any("lm_head" in name for name in names)


# ---------------------------------------------------------------- LoRA

def test_dpo_with_a_lora_writes_an_adapter_that_is_all_it_changed(tmp_path, run, model_folder, tokenizer):
    """Base and adapter, loaded anew, give the margin that the run reported: neither the base nor anything else moved."""
    result = run(train_dpo, "lora", "--max_steps", 5, "--batch_size", 16, "--peft", "lora", "--rank", 4, "--beta", 0.1, "--lr", 1e-2)
    close(logged(tmp_path / "lora")[0]["loss"], LN2)  # B is zero at the start, and the reference is the base without it
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    pairs, _ = load_pairs([str(tmp_path / "pairs.jsonl")], "", tokenizer, 256, 0, lambda line: None)
    pairs = PairDataset(pairs.dataset, range(32))
    base, cpu = load_model(model_folder), torch.device("cpu")
    before = pair_logprobs(base, pairs, 8, cpu)
    after = pair_logprobs(peft.load_adapter(base, tmp_path / "lora"), pairs, 8, cpu)
    margin = 0.1 * ((after - before)[:, 0] - (after - before)[:, 1]).mean()
    assert abs(margin) > 1e-4 and margin == pytest.approx(result["margin"], abs=1e-5)


# ---------------------------------------------------------------- stop, crash, resume

class Crash(Exception):
    pass


@pytest.mark.parametrize("how", ["stopped", "killed"])
@pytest.mark.parametrize("script, flags", [(train_reward, []), (train_dpo, []), (train_dpo, ["--peft", "lora"])], ids=["reward", "dpo", "lora"])
def test_resume_is_exact(tmp_path, run, monkeypatch, script, flags, how):
    """Pitfall 4. Interrupted after step 5 of 8, or killed in step 6 after the checkpoint of step 4 (in the middle of an epoch of
    3 batches): weights, optimizer and log end bit for bit as if nothing had happened."""
    flags = [*flags, "--max_steps", 8, "--batch_size", 12, "--save_every", 4, "--eval_every", 2, "--lr", 1e-3]
    expected = run(script, "whole", *flags)

    calls = {"n": 0}
    if how == "stopped":
        def ask(self):
            calls["n"] += 1
            return calls["n"] == 5
        with monkeypatch.context() as patch:
            patch.setattr(runtime.Interrupt, "requested", ask)
            assert run(script, "parts", *flags) == {"interrupted": True, "step": 5}
    else:
        clip = torch.nn.utils.clip_grad_norm_
        def fail(*args):
            calls["n"] += 1
            if calls["n"] == 6:
                raise Crash
            return clip(*args)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(torch.nn.utils, "clip_grad_norm_", fail)
            run(script, "parts", *flags)
    found = run(script, "parts", *flags, "--resume")

    a, b = (torch.load(tmp_path / out / "training_state.pt", weights_only=True) for out in ("whole", "parts"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for one, other in zip(a["optimizers"], b["optimizers"]):
        assert all(torch.equal(s[k], other["state"][i][k]) for i, s in one["state"].items() for k in s)
    assert a["loader"] == b["loader"] and a["step"] == b["step"] == 8
    numbers = lambda result: {k: v for k, v in result.items() if k != "seconds"}
    assert numbers(found) == numbers(expected)
    lines = [[{k: v for k, v in line.items() if k != "tokens_per_s"} for line in logged(tmp_path / out) if not line.get("resumed")] for out in ("whole", "parts")]
    assert lines[0] == lines[1]
    assert run(script, "parts", *flags, "--resume").keys() == numbers(expected).keys() - {"replies"}, "finished: nothing is done"


def test_the_reference_survives_a_lost_cache(tmp_path, run, monkeypatch):
    """Resumed without the cache, the reference must be computed from its own folder and not from the policy of step 2."""
    flags = ["--max_steps", 4, "--batch_size", 32, "--lr", 1e-3]
    run(train_dpo, "whole", *flags)
    calls = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Interrupt, "requested", lambda self: next(calls))
        run(train_dpo, "parts", *flags)
    monkeypatch.setattr(data, "CACHE", tmp_path / "another cache")
    run(train_dpo, "parts", *flags, "--resume")
    margins = [[line["margin"] for line in logged(tmp_path / out) if "margin" in line] for out in ("whole", "parts")]
    assert margins[0] == margins[1] and margins[0][-1] > 0


# ---------------------------------------------------------------- other data, other references, mistakes

def test_minimind_style_conversations_train_unchanged(tmp_path, run):
    """Several turns, keys of their own, no held-out file: 5 % are held out."""
    turn = lambda role, content: {"role": role, "content": content}
    lines = []
    for i in range(40):
        before = [turn("user", f"你好 {i}"), turn("assistant", "你好！"), turn("user", "再见吗？")] if i % 2 else [turn("user", f"hello {i}")]
        lines.append({"chosen": before + [turn("assistant", "好的。")], "rejected": before + [turn("assistant", "不。")], "id": i})
    path = write(tmp_path / "dpo.jsonl", lines)
    for script in (train_dpo, train_reward):
        result = run(script, script.__name__, "--data", path, "--eval_data", "", "--max_steps", 10, "--lr", 1e-3)
        assert result["preference_accuracy"] == 1.0 and result["accuracy_by_kind"] == {}
        assert json.loads((tmp_path / script.__name__ / "summary.json").read_text())["data"]["documents"] == 40


def test_another_reference(tmp_path, run, tokenizer):
    """Against a reference that is not the policy the loss does not begin at ln 2."""
    save_model(tmp_path / "other", small_model(tokenizer, seed=1), tokenizer)
    run(train_dpo, "dpo", "--max_steps", 1, "--ref_model", tmp_path / "other")
    assert abs(logged(tmp_path / "dpo")[0]["loss"] - LN2) > 1e-4


def test_before_and_after_on_questions(tmp_path, run):
    """Length, correctness and variety of sampled answers stand in the summary, so that reward hacking shows."""
    questions = write(tmp_path / "q.jsonl", [{"conversations": [{"role": "user", "content": f"thing {i}?"}], "answer": "red", "task": "fact"} for i in range(6)])
    run(train_dpo, "dpo", "--max_steps", 1, "--questions", questions)
    summary = json.loads((tmp_path / "dpo" / "summary.json").read_text())
    for part in ("before", "after"):
        assert {"sampled_gold_reward", "sampled_accuracy", "sampled_reply_tokens", "sampled_stopped", "sampled_varied", "accuracy",
                "accuracy_by_task", "reply_tokens", "gold_reward", "preference_accuracy", "accuracy_by_kind"} <= set(summary[part])
        assert 0 <= summary[part]["sampled_varied"] <= 1 and math.isfinite(summary[part]["sampled_reply_tokens"])


def test_mistakes_are_one_clear_line(tmp_path, run, model_folder, monkeypatch):
    def refused(message, script, *flags):
        with pytest.raises(UserError, match=message) as caught:
            run(script, "x", *flags)
        assert "\n" not in str(caught.value)

    small = train_tokenizer(["another tokenizer"], 270)
    save_model(tmp_path / "foreign", load_model(model_folder), small)
    refused("foreign has another tokenizer than the policy", train_dpo, "--ref_model", tmp_path / "foreign")
    refused("--label_smoothing 0.1 belongs to --loss dpo", train_dpo, "--loss", "ipo", "--label_smoothing", 0.1)
    refused("--beta 0.0: must be at least", train_dpo, "--beta", 0)
    run(train_reward, "reward", "--max_steps", 1)
    refused("is a reward model", train_dpo, "--model", tmp_path / "reward")
    sft = write(tmp_path / "sft.jsonl", [{"conversations": [{"role": "user", "content": "q"}]}])
    for script in (train_reward, train_dpo):
        refused('sft.jsonl:1: no key "chosen"', script, "--data", sft)
        refused("nothing to train on .*32 pairs whose prompt leaves no room", script, "--max_seq_len", 8)
        monkeypatch.chdir(tmp_path)
        refused("out/sft is not there yet: run python train_sft.py first", script, "--model", "out/sft")


# ---------------------------------------------------------------- eval.py

def test_evaluation_ranks_the_pairs_of_a_reward_model_and_of_a_policy(tmp_path, run, model_folder):
    """eval.py gives what the runs reported: of a reward model by its scores, of a policy against its reference."""
    evaluate = lambda *flags: evaluation.main(parse_config(evaluation.Config, "", [str(x) for x in ("--data", tmp_path / "pairs.jsonl", "--device", "cpu", *flags)]))
    names = ("preference_accuracy", "accuracy_by_kind")
    for script, out, flags in ((train_reward, "reward", []), (train_dpo, "dpo", ["--ref", model_folder]),
                               (train_dpo, "lora", ["--ref", model_folder])):
        expected = run(script, out, "--max_steps", 8, "--lr", 3e-3, *(["--peft", "lora"] if out == "lora" else []))
        found = evaluate("--model", tmp_path / out, "--json", tmp_path / "x.json", *flags)
        assert {n: found[n] for n in names} == {n: expected[n] for n in names} == {n: json.loads((tmp_path / "x.json").read_text())[n] for n in names}
        assert expected["preference_accuracy"] > 0.5
    with pytest.raises(UserError, match="pairs.jsonl holds pairs: give --ref"):
        evaluate("--model", model_folder)
    with pytest.raises(UserError, match="is a reward model: it scores answers and gives none"):
        evaluate("--model", tmp_path / "reward", "--chat")


def test_evaluation_scores_replies_with_a_reward_model(tmp_path, run, model_folder):
    run(train_reward, "reward", "--max_steps", 1)
    questions = write(tmp_path / "q.jsonl", [{"conversations": [{"role": "user", "content": f"{c}?"}]} for c in "abc"])
    argv = ["--model", model_folder, "--reward_model", tmp_path / "reward", "--data", questions, "--max_new_tokens", 5, "--device", "cpu"]
    found = evaluation.main(parse_config(evaluation.Config, "", [str(x) for x in argv]))
    assert math.isfinite(found["reward"]) and found["reward"] != 0
