"""Chapter 22: train_ppo.py as it runs: four models, a reward for every token, and when to leave a rollout.

The learner is that of chapter 21. Worked example for the reward of each token: an answer of three tokens whose
log-probabilities are 0.5, 0 and -0.25 above the reference's, kl_coef 0.2 and a normalised score of 2:

    reward    -0.1, 0, 0.05 + 2      with lambda 1 the returns are the sums of what follows: 1.95, 2.05, 2.05
"""

import json
import math

import pytest
import torch

import train_ppo
from minillm.checkpoint import load_model, save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.heads import RewardModel, ValueModel, load_reward_model, save_reward_model
from minillm.metrics import Progress
from minillm.tokenizer import train_tokenizer
from tests.helpers import close, forbid_waiting_in_updates
from tests.test_21_train_grpo import (Crash, float32, folder, interrupt_at, logged, same_runs, small_model, spy, tokenizer,  # noqa: F401
                                      training_steps, turn, weights_of, write)


@pytest.fixture
def run(folder, tokenizer):  # noqa: F811
    """run(out, flags...) -> train_ppo's result, in this process; a random reward model is in folder/reward."""
    save_reward_model(folder / "reward", RewardModel.from_lm(small_model(tokenizer, seed=1)), tokenizer)

    def go(out, *flags):
        argv = ["--model", folder / "model", "--reward_model", folder / "reward", "--data", folder / "p.jsonl", "--eval_data", folder / "e.jsonl",
                "--out", folder / out, "--device", "cpu", "--batch_size", 12, "--max_new_tokens", 6, "--max_seq_len", 64,
                "--lr", 3e-3, "--value_lr", 3e-3, "--warmup_steps", 0, "--missing_end_penalty", 0, "--stop_kl", 0, *flags]
        return train_ppo.main(parse_config(train_ppo.Config, "", [str(x) for x in argv]))

    return go


# ---------------------------------------------------------------- does it learn

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_update_waits_for_the_gpu(monkeypatch, run):
    """Without --stop_kl, for which the program has to know each update's KL."""
    happened = forbid_waiting_in_updates(monkeypatch, Progress, "step")
    run("ppo", "--device", "cuda", "--no-compile", "--max_steps", 2, "--grad_accum", 2, "--mini_batches", 2)
    assert happened == (["sum_gradients"] * 8 + ["step"]) * 2  # of 2 passes over 2 mini-batches, for policy and value model


def test_the_score_of_the_reward_model_rises(folder, run):
    result = run("ppo", "--max_steps", 40, "--kl_coef", 0.02, "--batch_size", 24, "--lr", 5e-3)
    summary = json.loads((folder / "ppo" / "summary.json").read_text())
    assert result["sampled_reward"] > summary["before"]["sampled_reward"] + 1.5 * summary["before"]["sampled_reward_std"]
    lines = training_steps(folder / "ppo")
    assert {"policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction", "ratio_mean", "kl", "kl_answer", "kl_coef", "reward", "returns",
            "values", "explained_variance", "entropy", "response_tokens", "truncated", "updates", "lr"} <= set(lines[0])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["kl"] == 0 and lines[-1]["kl"] > 0 and max(line["explained_variance"] for line in lines) <= 1
    load_model(folder / "ppo")


def test_a_reward_file_of_ones_own_trains(folder, run):
    """No reward model: the critic begins with a new head on the policy's backbone."""
    result = run("ppo", "--max_steps", 20, "--reward", f"{folder}/mine.py:letters", "--reward_model", "nowhere", "--kl_coef", 0, "--lr", 5e-3, "--batch_size", 24)
    assert result["sampled_reward"] > training_steps(folder / "ppo")[0]["reward"] + 0.3


def test_the_critic_learns_what_to_expect(folder, run):
    """The policy stands still and the score depends on the question alone: only the value model is trained, and explains it."""
    (folder / "half.py").write_text("def half(m, answers, e): return [2.0 * (m[-1]['content'][0] in 'abcdef') - 1] * len(answers)\n", encoding="utf-8")
    run("ppo", "--max_steps", 12, "--reward", f"{folder}/half.py:half", "--lr", 0, "--inner_epochs", 4, "--value_clip_eps", 100)
    lines = training_steps(folder / "ppo")
    assert lines[-1]["value_loss"] < lines[0]["value_loss"] / 2
    assert sum(line["explained_variance"] for line in lines[-3:]) / 3 > lines[0]["explained_variance"] + 0.2
    before, after = weights_of(folder / "model"), weights_of(folder / "ppo")
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------- the four models

@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_ratio_is_exactly_1_and_the_kl_0_and_then_they_move(run, monkeypatch, bf16):
    if bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16")
    monkeypatch.setattr("minillm.runtime.torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: bf16)
    calls, kls = spy(monkeypatch, train_ppo, "ppo_policy_loss"), spy(monkeypatch, train_ppo, "kl_k1")
    run("ppo", "--max_steps", 1, "--inner_epochs", 2, "--mini_batches", 1, "--grad_accum", 2)
    assert len(calls) == 4 and not kls[0][1].any(), "the policy that sampled is still the reference"
    for (logprobs, old, _, mask, *_), (_, stats) in calls[:2]:
        assert torch.equal(logprobs[mask], old[mask]) and stats["ratio_mean"] == 1 and stats["approx_kl"] == 0
    for (logprobs, old, _, mask, *_), (_, stats) in calls[2:]:
        assert not torch.equal(logprobs[mask], old[mask]) and stats["approx_kl"] > 1e-6


def test_the_samplers_logprobs_are_those_that_are_trained(run, monkeypatch, float32):  # noqa: F811
    rollouts, kls = spy(monkeypatch, train_ppo, "generate"), spy(monkeypatch, train_ppo, "kl_k1")
    run("ppo", "--max_steps", 1, "--grad_accum", 2)
    rollout = rollouts[0][1]
    mask = rollout.response_mask[:, 1:]
    assert (kls[0][0][0] - rollout.logprobs[:, 1:])[mask].abs().max() < 1e-4


@pytest.mark.parametrize("normalise", [False, True])
def test_the_critic_begins_as_the_reward_model_and_reads_before_the_token(folder, run, monkeypatch, float32, normalise):  # noqa: F811
    """values[:, t] stands beside token t + 1, and is what the value model says after token t: the classic mistake is to let
    it read the token whose return it is to guess. Where scores are divided by their spread, so are the values that expect them."""
    calls, rollouts = spy(monkeypatch, train_ppo, "gae"), spy(monkeypatch, train_ppo, "generate")
    run("ppo", "--max_steps", 1, "--grad_accum", 2, "--normalise" if normalise else "--no-normalise")
    (_, values, mask, *_), _ = calls[0]
    spread = json.loads((folder / "ppo" / "summary.json").read_text())["before"]["sampled_reward_std"] if normalise else 1
    critic = load_reward_model(folder / "reward", cls=ValueModel)
    with torch.no_grad():
        expected = critic(rollouts[0][1].tokens)[:, :-1]
    close(values[mask] * spread, expected[mask])


def test_another_tokenizer_of_the_reward_model(folder, run, capsys, monkeypatch):
    """It reads text, so it scores; but its weights know other tokens, so the critic cannot begin there."""
    other = train_tokenizer(["another tokenizer"], 270)
    save_reward_model(folder / "foreign", RewardModel.from_lm(small_model(other, seed=2)), other)
    result = run("ppo", "--max_steps", 1, "--reward_model", folder / "foreign")
    assert "foreign has another tokenizer than the policy: it scores text, but the value model starts from" in capsys.readouterr().out
    assert math.isfinite(result["sampled_reward"])


# ---------------------------------------------------------------- rewards, token by token

def test_every_token_pays_for_its_kl_and_the_last_one_has_the_score(folder, run, monkeypatch):
    """The worked example of the chapter: what the script gives to gae, and the returns that follow with lambda 1."""
    kl = torch.tensor([0.5, 0.0, -0.25])

    def placed(logprobs, ref_logprobs):  # in the second row's response alone, wherever it stands
        out = torch.zeros_like(logprobs)
        mask = rollouts[0][1].response_mask[1, 1:]
        out[1, mask] = kl[:int(mask.sum())]
        return out

    rollouts, calls = spy(monkeypatch, train_ppo, "generate"), spy(monkeypatch, train_ppo, "gae")
    monkeypatch.setattr(train_ppo, "kl_k1", placed)
    (folder / "two.py").write_text("def two(m, answers, e): return [2.0] * len(answers)\n", encoding="utf-8")
    run("ppo", "--max_steps", 1, "--max_new_tokens", 3, "--gae_lambda", 1, "--kl_coef", 0.2, "--no-normalise", "--reward", f"{folder}/two.py:two")
    (rewards, _, mask, *_), (_, returns) = calls[0]
    assert mask[1].sum() == 3 and mask[0].sum() == 3
    close(rewards[1][mask[1]], [-0.1, 0.0, 2.05])
    close(returns[1][mask[1]], [1.95, 2.05, 2.05])
    close(rewards[0][mask[0]], [0.0, 0.0, 2.0])
    assert not rewards[~mask].any()


def test_scores_are_normalised_as_they_were_before_training(folder, run, monkeypatch):
    """(score - mean) / std of the held-out prompts' answers at the start; a reply that does not end loses the penalty."""
    calls, scores = spy(monkeypatch, train_ppo, "gae"), spy(monkeypatch, train_ppo, "score_rollout")
    monkeypatch.setattr(train_ppo, "read_answers", lambda rollout, tokenizer: ([str(i) for i in range(12)], torch.tensor([True, False, True] * 4)))
    run("ppo", "--max_steps", 1, "--kl_coef", 0, "--missing_end_penalty", 2)
    before = json.loads((folder / "ppo" / "summary.json").read_text())["before"]
    (rewards, _, mask, *_), _ = calls[0]
    raw = scores[0][1][0][:, 0]
    assert raw.std() > 0
    expected = [(x - before["sampled_reward"]) / before["sampled_reward_std"] - 2 * (i % 3 == 1) for i, x in enumerate(raw.tolist())]
    assert rewards.sum(dim=1).tolist() == pytest.approx(expected, abs=1e-4)
    assert (rewards != 0).sum() == 12, "one token of each answer has the score"
    close([training_steps(folder / "ppo")[0]["reward"], training_steps(folder / "ppo")[0]["truncated"]], [raw.mean().item(), 1 / 3])


def test_advantages_are_whitened_over_the_rollout(run, monkeypatch):
    calls = spy(monkeypatch, train_ppo, "ppo_policy_loss")
    run("ppo", "--max_steps", 1, "--inner_epochs", 1, "--grad_accum", 2)
    advantages = torch.cat([args[2][args[3]] for args, _ in calls])
    close(advantages.mean(), 0.0)
    close(advantages.var(), 1.0)


# ---------------------------------------------------------------- KL: early stop, adaptive coefficient

def test_the_early_stop_is_a_break(folder, run, monkeypatch):
    """Pitfall 6. With a limit that any move exceeds, the first of 6 updates is made (its KL is 0), the second is computed
    and not made, the others are not even computed. The weights are those after the first, bit for bit. The classic
    mistake, a loss multiplied by 0 and stepped all the same, moves them by the momentum (and turns inf into NaN)."""
    after_each, take = [], torch.optim.AdamW.step

    def step(self, *args):
        take(self, *args)
        after_each.append([p.detach().clone() for group in self.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    losses = spy(monkeypatch, train_ppo, "ppo_policy_loss")
    run("ppo", "--max_steps", 1, "--stop_kl", 1e-12, "--inner_epochs", 3, "--mini_batches", 2)
    assert len(after_each) == 2 and len(losses) == 2, "policy and value model once each"
    assert training_steps(folder / "ppo")[0]["updates"] == 2
    state = torch.load(folder / "ppo" / "training_state.pt", weights_only=True)["model"]
    for name, weights in (("policy", after_each[0]), ("value_model", after_each[1])):
        saved = {tensor.data_ptr(): tensor for key, tensor in state.items() if key.startswith(name + ".")}.values()
        assert sum(any(w.shape == s.shape and torch.equal(w, s) for s in saved) for w in weights) == len(weights)
    after_each.clear(), losses.clear()
    run("ppo", "--max_steps", 1, "--stop_kl", 0, "--inner_epochs", 3, "--mini_batches", 2)
    assert len(after_each) == 12 and len(losses) == 6


def test_the_coefficient_follows_its_target(folder, run):
    """Target 6 nats per answer. At 12 the error 1 is cut to 0.2: 0.2 x 1.02. At 5.4 it is -0.1: x 0.99. Without a target: fixed."""
    coefficient = train_ppo.KLCoefficient(0.2, 6.0)
    coefficient.update(12.0)
    close(coefficient.value, 0.204)
    coefficient.update(5.4)
    close(coefficient.value, 0.20196)
    fixed = train_ppo.KLCoefficient(0.2, 0.0)
    fixed.update(100.0)
    assert fixed.value == 0.2
    run("ppo", "--max_steps", 3, "--kl_coef", 0.2, "--target_kl", 1000)
    close([line["kl_coef"] for line in training_steps(folder / "ppo")], [0.2, 0.196, 0.19208])


# ---------------------------------------------------------------- resume, mistakes

def test_micro_batches_add_up(folder, run, float32):  # noqa: F811
    for out, parts in (("whole", 1), ("parts", 3)):
        run(out, "--max_steps", 1, "--mini_batches", 1, "--inner_epochs", 1, "--grad_accum", parts)
    whole, parts = training_steps(folder / "whole")[0], training_steps(folder / "parts")[0]
    for name in whole.keys() - {"tokens_per_s"}:
        assert whole[name] == pytest.approx(parts[name], abs=1e-5), name


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_resume_is_exact(folder, run, monkeypatch, how):
    """Interrupted after step 3 of 5, or killed in step 4 after the checkpoint of step 2: rollouts, both models, both
    optimizers, the adaptive coefficient and the log end bit for bit as if nothing had happened."""
    flags = ["--max_steps", 5, "--save_every", 2, "--eval_every", 2, "--target_kl", 0.05]
    expected = run("whole", *flags)
    with monkeypatch.context() as patch:
        if how == "stopped":
            interrupt_at(patch, 3)
            assert run("parts", *flags) == {"interrupted": True, "step": 3}
        else:
            sample, calls = train_ppo.generate, []

            def fail(*args, **options):
                calls.append(1)
                if len(calls) == 4:
                    raise Crash
                return sample(*args, **options)

            patch.setattr(train_ppo, "generate", fail)
            with pytest.raises(Crash):
                run("parts", *flags)
    torch.rand(7)
    found = run("parts", *flags, "--resume")
    same_runs(folder, "whole", "parts")
    numbers = lambda result: {k: v for k, v in result.items() if k != "seconds"}
    assert numbers(found) == numbers(expected)


def test_mistakes_are_one_clear_line(folder, run, monkeypatch, tokenizer):  # noqa: F811
    def refused(message, *flags):
        with pytest.raises(UserError, match=message) as caught:
            run("x", *flags)
        assert "\n" not in str(caught.value)

    refused("reward broken gave nan for the answer", "--reward", f"{folder}/mine.py:broken")
    refused("model is no reward model .* python train_reward.py makes one", "--reward_model", folder / "model")
    refused("--gae_lambda 1.5: must be between 0 and 1", "--gae_lambda", 1.5)
    write(folder / "talk.jsonl", [{"conversations": [turn("user", "hi")]}] * 3)
    refused("no prompt is left to train on .*3 of other tasks or without an answer", "--reward", "answer", "--data", folder / "talk.jsonl")
    monkeypatch.chdir(folder)
    refused("out/sft is not there yet: run python train_sft.py first", "--model", "out/sft")
    refused("out/reward is not there yet: run python train_reward.py first, or give another", "--reward_model", "out/reward")
