"""Chapter 23: train_ppo.py as it runs: four models, a reward for every token, and when to leave a rollout.

After this chapter you can write down the reward of every token of an answer, and say when a rollout is left early.

The learner is that of chapter 22. Worked example for the reward of each token: the log-probabilities of an answer of
three tokens are 0.5, 0 and -0.25 above the reference's, kl_coef is 0.2, and the normalised score is 2:

    reward     -0.1, 0, 0.05 + 2
    return     1.95, 2.05, 2.05         with gamma 1 and lambda 1: the sum of this reward and all later ones

Drawn in tests/figures/reward_row.svg and tests/figures/four_models.svg.
"""

import json
import math
import re
import shutil
import weakref

import pytest
import torch

import train_ppo
from minillm import runtime
from minillm.checkpoint import load_model, save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.heads import RewardModel, load_reward_model, save_reward_model
from minillm.metrics import Progress
from minillm.run import Interrupted
from minillm.tokenizer import train_tokenizer
from tests.helpers import close, forbid_waiting_in_updates
from tests.test_22_train_grpo import (Crash, ask, crash_in, float32, folder, interrupt_after,  # noqa: F401
                                      never_ending, ragged, same, same_runs, small_model, spy, state_of, summary,
                                      tokenizer, training_steps, weights_of, without_seconds, write)


@pytest.fixture
def run(folder, tokenizer):  # noqa: F811
    """run(out, flags...) -> train_ppo's result, in this process; a random reward model is in folder/reward, and its
    folder is given to the run unless reward_model is empty."""
    save_reward_model(folder / "reward", RewardModel.from_lm(small_model(tokenizer, seed=1)), tokenizer)

    def go(out, *flags, reward_model="reward"):
        scorer = ["--reward_model", folder / reward_model] if reward_model else []
        argv = ["--model", folder / "model", *scorer, "--data", folder / "p.jsonl", "--eval_data",
                folder / "e.jsonl", "--out", folder / out, "--device", "cpu", "--batch_size", 12,
                "--max_new_tokens", 6, "--max_seq_len", 48, "--lr", 3e-3, "--value_lr", 3e-3, "--warmup_steps", 0,
                "--missing_eos_penalty", 0, "--target_kl", 0, *flags]
        return train_ppo.main(parse_config(train_ppo.Config, "", [str(x) for x in argv]))

    return go


# ---------------------------------------------------------------- does it learn

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_update_waits_for_the_gpu(monkeypatch, run):
    """Without --target_kl, for which the program has to know each update's KL."""
    happened = forbid_waiting_in_updates(monkeypatch, Progress, "step")
    run("ppo", "--device", "cuda", "--no-compile", "--max_steps", 2, "--grad_accum", 2, "--num_minibatches", 2)
    assert happened == (["sum_gradients"] * 8 + ["step"]) * 2  # 2 passes, 2 mini-batches, policy and value model


@pytest.mark.slow
def test_the_score_of_the_reward_model_rises(folder, run):
    result = run("ppo", "--max_steps", 16, "--kl_coef", 0.02, "--batch_size", 24, "--lr", 2e-2)
    before = summary(folder / "ppo")["before"]
    assert result["sampled_reward"] > before["sampled_reward"] + 1.5 * before["sampled_reward_std"]
    lines = training_steps(folder / "ppo")
    assert {"policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction", "ratio_mean", "kl",
            "kl_answer", "reward", "returns", "values", "explained_variance", "entropy", "response_tokens",
            "truncated", "updates", "lr"} <= set(lines[0])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["kl"] == 0 and lines[-1]["kl"] > 0 and max(line["explained_variance"] for line in lines) <= 1
    load_model(folder / "ppo")


@pytest.mark.slow
def test_a_reward_file_of_ones_own_trains(folder, run, capsys):
    """There is no reward model, so the critic starts with a new head on the policy's backbone."""
    result = run("ppo", "--max_steps", 12, "--reward", f"{folder}/mine.py:letters", "--kl_coef", 0,
                 "--lr", 2e-2, "--batch_size", 24, reward_model="")
    assert result["sampled_reward"] > training_steps(folder / "ppo")[0]["reward"] + 0.3
    assert f"the value model starts from {folder / 'model'}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_critic_learns_what_to_expect(folder, run):
    """The policy stands still and the score depends on the question alone: the critic learns to tell it in advance."""
    (folder / "half.py").write_text("""
def half(m, answers, e):
    return [2.0 * (m[-1]["content"][0] in "abcdef") - 1] * len(answers)
""", encoding="utf-8")
    run("ppo", "--max_steps", 12, "--reward", f"{folder}/half.py:half", "--lr", 0, "--update_epochs", 4,
        "--value_clip_eps", 100)
    lines = training_steps(folder / "ppo")
    assert lines[-1]["value_loss"] < lines[0]["value_loss"] / 2
    assert sum(line["explained_variance"] for line in lines[-3:]) / 3 > lines[0]["explained_variance"] + 0.2
    assert same(weights_of(folder / "model"), weights_of(folder / "ppo"))


@pytest.mark.slow
def test_the_first_rollouts_train_the_critic_alone(folder, run, monkeypatch):
    """--critic_steps 50, but no more than a tenth of 20 steps: the policy's learning rate is 0 in two steps only. In
    these the policy says the same throughout, so it is run before the updates (as the reference is, for each of two
    mini-batches), and not in them (two passes over both)."""
    calls = spy(monkeypatch, train_ppo, "response_logprobs")
    run("ppo", "--max_steps", 20, "--critic_steps", 50, "--batch_size", 2, "--max_new_tokens", 2)
    lines = training_steps(folder / "ppo")
    assert [line["lr"] > 0 for line in lines] == [False] * 2 + [True] * 18
    assert len(calls) == 2 * 4 + 18 * (4 + 4)
    assert [line["ratio_mean"] for line in lines[:2]] == [1, 1] and lines[3]["ratio_mean"] != 1


def test_the_policy_does_not_move_while_the_critic_learns(folder, run, monkeypatch):
    with pytest.raises(Interrupted):
        interrupt_after(monkeypatch, 1)
        run("ppo", "--max_steps", 10, "--critic_steps", 1)
    policy, critic = state_of(folder / "ppo")["models"]
    before = {name: tensor for name, tensor in load_model(folder / "model").state_dict().items()}
    assert all(torch.equal(policy[name], before[name]) for name in policy)
    assert not torch.equal(critic["model.norm.weight"], load_reward_model(folder / "reward").model.norm.weight)


# ---------------------------------------------------------------- the four models

@pytest.mark.parametrize("bf16, peft", [(False, "none"), (True, "none"), (False, "lora"), (True, "lora")])
def test_the_first_ratio_is_exactly_1_and_the_kl_0_and_then_they_move(run, monkeypatch, bf16, peft):
    """As in chapter 22: two passes of one optimizer step with two micro-batches."""
    if bf16 and not runtime.cpu_has_bf16():
        pytest.skip("this CPU has no bf16")
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: bf16)
    calls, kls = spy(monkeypatch, train_ppo, "ppo_policy_loss"), spy(monkeypatch, train_ppo, "kl_k1")
    run("ppo", "--max_steps", 1, "--update_epochs", 2, "--num_minibatches", 1, "--grad_accum", 2, "--peft", peft)
    assert len(calls) == 4 and len(kls) == 2
    assert not any(kl.any() for _, kl in kls), "the policy that sampled is still the reference"
    for (logprobs, old, _, mask, *_), (_, stats) in calls[:2]:
        assert torch.equal(logprobs[mask], old[mask])
        assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0 and stats["clip_fraction"] == 0
    for (logprobs, old, _, mask, *_), (_, stats) in calls[2:]:
        assert not torch.equal(logprobs[mask], old[mask]) and stats["approx_kl"] > 1e-6


@pytest.mark.parametrize("peft, trained, held", [
    ("none", ["CausalLM", "ValueModel"], ["CausalLM", "RewardModel"]),  # the reference is a copy
    ("lora", [], ["CausalLM", "RewardModel", "ValueModel"])])
def test_what_is_frozen_is_held_in_bf16(run, monkeypatch, peft, trained, held):
    """The reference and the reward model always; policy and critic where a LoRA is all that they train."""
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)
    in_bf16, models = spy(monkeypatch, runtime, "hold_in_bf16"), []
    monkeypatch.setattr(runtime, "compile_backbone", lambda model, asked: models.append(model))
    run("ppo", "--max_steps", 1, "--batch_size", 4, "--peft", peft)
    models += [model for (model,), _ in in_bf16 if model not in models]
    found = {torch.float32: [], torch.bfloat16: []}
    for model in models:
        mlp = model.model.layers[0].mlp.up_proj
        found[getattr(mlp, "base", mlp).weight.dtype].append(type(model).__name__)
    assert sorted(found[torch.float32]) == trained and sorted(found[torch.bfloat16]) == held


def test_the_policys_activations_are_gone_before_the_critic_runs(run, monkeypatch):
    """What each model's backward pass needs is most of the memory, and the two share no parameter: one after the other
    has the gradients of one backward pass through both, in half of it. Two micro-batches. Before the update no model
    runs backward: there a result is let go of, and all that led to it, before the next model runs."""
    events, graphs = [], []

    def spied(name, original):
        def call(*args, **options):
            assert len(events) > 6 or not any(graph() for graph in graphs)
            result = original(*args, **options)
            events.append(name)
            result = result[0] if isinstance(result, tuple) else result
            graphs.append(weakref.ref(result))
            result.register_hook(lambda gradient: events.append(f"{name} backward"))
            return (result, torch.zeros(())) if options.get("with_entropy") else result
        return call

    for name in ("response_logprobs", "response_values"):
        monkeypatch.setattr(train_ppo, name, spied(name.removeprefix("response_"), getattr(train_ppo, name)))
    run("ppo", "--max_steps", 1, "--update_epochs", 1, "--num_minibatches", 1, "--grad_accum", 2)
    before, update = events[:6], events[6:]
    assert before == ["logprobs", "logprobs", "values"] * 2  # policy, reference, critic
    assert update == ["logprobs", "logprobs backward", "values", "values backward"] * 2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_those_that_are_trained(run, monkeypatch, float32, temperature):  # noqa: F811
    ragged(monkeypatch, train_ppo)
    rollouts, calls = spy(monkeypatch, train_ppo, "sample_rollout"), spy(monkeypatch, train_ppo, "ppo_policy_loss")
    kls = spy(monkeypatch, train_ppo, "kl_k1")
    run("ppo", "--max_steps", 1, "--update_epochs", 1, "--grad_accum", 2, "--temperature", temperature)
    rollout = rollouts[0][1]
    old = torch.cat([args[1][args[3]] for args, _ in calls])  # of all micro-batches, in whatever order
    sampled = rollout.logprobs[rollout.response_mask]
    assert (old.sort().values - sampled.sort().values).abs().max() < 1e-4
    assert calls[0][1][1]["ratio_mean"] == 1 and not any(kl.any() for _, kl in kls), "they have the same temperature"


def test_the_critic_starts_as_the_normalised_reward_model(folder, run, monkeypatch, float32):  # noqa: F811
    """values[:, t] stands beside token t + 1. It is (score - mean) / std, with the reward model's score of the sequence
    that ends with token t. The classic mistake is to let the critic read the token whose return it has to guess.
    """
    splits, calls = spy(monkeypatch, train_ppo, "split_rollout"), spy(monkeypatch, train_ppo, "gae")
    run("ppo", "--max_steps", 1, "--grad_accum", 2)
    before = summary(folder / "ppo")["before"]
    mean, std = before["sampled_reward"], before["sampled_reward_std"]
    assert abs(mean) > 0.01 and abs(std - 1) > 0.01, "a normalisation that would be seen if it were left out"
    reward_model = load_reward_model(folder / "reward")
    micro_batches = [batch for minibatch in splits[0][1] for batch in minibatch.micro_batches]
    assert len(micro_batches) == len(calls) == 4
    for batch, ((_, values, mask, *_), _) in zip(micro_batches, calls):
        with torch.no_grad():
            scores = [reward_model(batch.tokens, torch.full((len(batch.tokens),), t + 1)) for t in range(mask.shape[1])]
        close(values[mask], ((torch.stack(scores, dim=1) - mean) / std)[mask])


def test_a_new_critic_starts_at_the_mean_whatever_is_added_to_every_reward(folder, run, monkeypatch):
    """With a reward function of one's own the head is new: it expects 0, the mean of the normalised scores."""
    calls = spy(monkeypatch, train_ppo, "gae")
    found = []
    for name, constant in (("plain", 0), ("shifted", 10)):
        code = f"def length(m, answers, e): return [len(a) / 8 + {constant} for a in answers]\n"
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
        calls.clear()
        run(name, "--max_steps", 1, "--grad_accum", 2, "--reward", f"{folder}/{name}.py:length",
            reward_model="")
        found.append([(rewards, values, advantages) for (rewards, values, *_), (advantages, _) in calls])
    for (rewards, values, advantages), (more_rewards, more_values, more_advantages) in zip(*found, strict=True):
        assert not values.any() and not more_values.any() and rewards.any()
        assert torch.allclose(rewards, more_rewards, atol=1e-4)
        assert torch.allclose(advantages, more_advantages, atol=1e-4)


def test_another_tokenizer_of_the_reward_model(folder, run, capsys):
    """It reads text, so it can score. But its weights know other tokens, so the critic cannot start from them."""
    other = train_tokenizer(["another tokenizer"], 270)
    save_reward_model(folder / "foreign", RewardModel.from_lm(small_model(other, seed=2)), other)
    result = run("ppo", "--max_steps", 1, "--reward_model", folder / "foreign")
    assert f"no reward model with the policy's tokenizer: the value model starts from {folder / 'model'}" in (
        capsys.readouterr().out)
    assert math.isfinite(result["sampled_reward"])


# ---------------------------------------------------------------- rewards, token by token

def two_points(folder):
    """A reward file that gives every answer 2 points."""
    (folder / "two.py").write_text("def two(m, answers, e): return [2.0] * len(answers)\n", encoding="utf-8")
    return f"{folder}/two.py:two"


def test_every_token_pays_for_its_kl_and_the_last_one_has_the_score(folder, run, monkeypatch):
    """The worked example of the chapter, in answers to prompts of three lengths. The score is (2 - 1) / 0.5."""
    write(folder / "p.jsonl", [ask("why" + "?" * (i % 3)) for i in range(12)])
    never_ending(monkeypatch, train_ppo)
    splits, calls = spy(monkeypatch, train_ppo, "split_rollout"), spy(monkeypatch, train_ppo, "gae")

    def kl(logprobs, ref_logprobs):  # 0.5, 0 and -0.25 on the three tokens of each answer, 0 elsewhere
        batch = splits[0][1][len(calls) // 2].micro_batches[len(calls) % 2]
        return torch.zeros_like(logprobs).masked_scatter(batch.mask, torch.tensor([0.5, 0.0, -0.25] * len(logprobs)))

    def evaluation(*args):
        return {"sampled_reward": 1.0, "sampled_reward_std": 0.5}

    monkeypatch.setattr(train_ppo, "kl_k1", kl)
    monkeypatch.setattr(train_ppo, "sampled_scores", evaluation)
    run("ppo", "--max_steps", 1, "--max_new_tokens", 3, "--gae_lambda", 1, "--kl_coef", 0.2, "--grad_accum", 2,
        "--reward", two_points(folder))
    assert len(calls) == 4
    for (rewards, _, mask, *_), (_, returns) in calls:
        assert len(rewards) == 3
        close(rewards[mask].view(3, 3), [[-0.1, 0.0, 2.05]] * 3)
        close(returns[mask].view(3, 3), [[1.95, 2.05, 2.05]] * 3)
        assert not rewards[~mask].any()
    starts = {start for (_, _, mask, *_), _ in calls for start in mask.int().argmax(dim=1).tolist()}
    assert len(starts) == 3, "prompts of three lengths"


def test_the_score_stands_on_the_last_token_of_answers_of_any_length(folder, run, monkeypatch):
    """Answers of 1 to 6 tokens, kl_coef 0: only the last token inside the mask has a reward that is not 0."""
    ragged(monkeypatch, train_ppo)
    monkeypatch.setattr(train_ppo, "sampled_scores", lambda *args: {"sampled_reward": 0.0, "sampled_reward_std": 1.0})
    calls = spy(monkeypatch, train_ppo, "gae")
    run("ppo", "--max_steps", 1, "--kl_coef", 0, "--grad_accum", 2, "--reward", two_points(folder))
    lengths = []
    for (rewards, _, mask, *_), _ in calls:
        for row, here in zip(rewards.tolist(), mask.tolist()):
            last = max(t for t, inside in enumerate(here) if inside)
            assert {t: reward for t, reward in enumerate(row) if reward} == {last: 2.0}
            lengths.append(sum(here))
    assert sorted(lengths) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_scores_are_normalised_as_they_were_before_training(folder, run, monkeypatch):
    """(score - mean) / std of the answers to held-out prompts at the start. A third of the answers do not end: -2."""
    calls, scores = spy(monkeypatch, train_ppo, "gae"), spy(monkeypatch, train_ppo, "score_rollout")
    ended = torch.tensor([True, False, True] * 4)
    monkeypatch.setattr(train_ppo, "read_answers", lambda rollout, tokenizer: ([str(i) for i in range(12)], ended))
    run("ppo", "--max_steps", 1, "--kl_coef", 0, "--missing_eos_penalty", 2)
    before = summary(folder / "ppo")["before"]
    raw = scores[0][1][0][:, 0]
    assert raw.std() > 0
    expected = [(x - before["sampled_reward"]) / before["sampled_reward_std"] - (2 if i % 3 == 1 else 0)
                for i, x in enumerate(raw.tolist())]
    found = torch.cat([rewards.sum(dim=1) for (rewards, *_), _ in calls])
    assert sorted(found.tolist()) == pytest.approx(sorted(expected), abs=1e-4)
    line = training_steps(folder / "ppo")[0]
    close([line["reward"], line["truncated"]], [raw.mean().item(), 1 / 3])


def test_equal_scores_are_not_divided_by_their_spread(folder, run):
    """All answers score 2: the mean is 2 and the std 0, so the normalised score is 0 / 1 and not 0 / 0."""
    run("ppo", "--max_steps", 2, "--reward", two_points(folder), "--kl_coef", 0, "--gae_lambda", 1)
    lines = training_steps(folder / "ppo")
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line["returns"] for line in lines] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_advantages_are_whitened_over_the_rollout(run, monkeypatch):
    """Over all four micro-batches together: mean 0 and variance 1. No single micro-batch has them."""
    calls = spy(monkeypatch, train_ppo, "ppo_policy_loss")
    run("ppo", "--max_steps", 1, "--update_epochs", 1, "--num_minibatches", 2, "--grad_accum", 2)
    micro_batches = [args[2][args[3]] for args, _ in calls]
    assert len(micro_batches) == 4 and all(batch.mean().abs() > 1e-3 for batch in micro_batches)
    close(torch.cat(micro_batches).mean(), 0.0)
    close(torch.cat(micro_batches).var(), 1.0)


def test_micro_batches_add_up(folder, run, monkeypatch, float32):  # noqa: F811
    """Pitfall 3. One optimizer step on 12 answers, whole or in 3 ragged micro-batches: the same log, and the same
    gradients of policy and critic.
    """
    ragged(monkeypatch, train_ppo)
    logs, gradients, update = [], [], train_ppo.update

    def keep_gradient(model, *args):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        update(model, *args)

    monkeypatch.setattr(train_ppo, "update", keep_gradient)
    for out, micro_batches in (("whole", 1), ("micro_batches", 3)):
        run(out, "--max_steps", 1, "--num_minibatches", 1, "--update_epochs", 1, "--grad_accum", micro_batches)
        logs.append(training_steps(folder / out)[0])
    assert logs[0].keys() == logs[1].keys()
    for name in logs[0].keys() - {"tokens_per_s"}:
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-6, abs=1e-5), name
    assert gradients[0].norm() > 1e-3 and gradients[1].norm() > 1e-3
    close(gradients[2], gradients[0])
    close(gradients[3], gradients[1])


def test_policy_and_critic_have_clips_of_their_own(run, monkeypatch):
    """The second pass over a rollout. A clip of 0 stops every token that moved in the right direction; one of the other
    model's does not.
    """
    def clip_fractions(*flags):
        with monkeypatch.context() as patch:
            calls = [spy(patch, train_ppo, f"ppo_{name}_loss") for name in ("policy", "value")]
            run("ppo", "--max_steps", 1, "--num_minibatches", 1, *flags)
        return [losses[1][1][1]["clip_fraction"].item() for losses in calls]

    policy, value = clip_fractions("--clip_eps", 0, "--value_clip_eps", 1000)
    loose_policy, tight_value = clip_fractions("--clip_eps", 1, "--value_clip_eps", 0)
    assert policy > loose_policy + 0.3 and tight_value > value + 0.1


def test_a_mini_batch_without_an_answer_is_no_update(folder, run):
    """Two answers in three mini-batches: one of these is empty. The mean of the losses is that over two updates."""
    run("ppo", "--max_steps", 1, "--batch_size", 2, "--num_minibatches", 3, "--update_epochs", 1)
    few = training_steps(folder / "ppo")[0]
    run("two", "--max_steps", 1, "--batch_size", 2, "--num_minibatches", 2, "--update_epochs", 1)
    two = training_steps(folder / "two")[0]
    assert few["updates"] == two["updates"] == 2
    assert few["value_loss"] == pytest.approx(two["value_loss"], rel=0.2)


# ---------------------------------------------------------------- the early stop

def test_the_early_stop_is_a_break(folder, run, monkeypatch):
    """Pitfall 6. Any move exceeds the limit. So of 6 updates the first is made (its KL is 0), the second is computed
    but not made, and the others are not even computed. Weights and momenta are those after the first, bit for bit. The
    classic mistake, a loss multiplied by 0 and stepped all the same, moves them on (and turns inf into NaN).
    """
    after, update = [], train_ppo.update

    def watched(model, optimizers, max_grad_norm):
        update(model, optimizers, max_grad_norm)
        after.append([{name: tensor.clone() for name, tensor in model.state_dict().items()},
                      [{key: value.clone() for key, value in moment.items()}
                       for optimizer in optimizers for moment in optimizer.state_dict()["state"].values()]])

    monkeypatch.setattr(train_ppo, "update", watched)
    losses = spy(monkeypatch, train_ppo, "ppo_policy_loss")
    run("ppo", "--max_steps", 1, "--target_kl", 1e-12, "--update_epochs", 3, "--num_minibatches", 2)
    assert len(after) == 2 and len(losses) == 2, "policy and value model once each"
    assert training_steps(folder / "ppo")[0]["updates"] == 1
    state = state_of(folder / "ppo")
    for model, optimizer, (weights, moments) in zip(state["models"], state["optimizers"], after, strict=True):
        assert same(model, weights) and same(list(optimizer["state"].values()), moments)

    after.clear()
    losses.clear()
    run("ppo", "--max_steps", 1, "--target_kl", 0, "--update_epochs", 3, "--num_minibatches", 2)
    assert len(after) == 12 and len(losses) == 6


def test_an_update_that_is_not_made_leaves_no_gradient(run, monkeypatch):
    """Two passes, of which the second is always stopped, are the same as one pass: also in the next rollout."""
    gradients, update = {1: [], 2: []}, train_ppo.update
    for epochs, found in gradients.items():
        def watched(model, *args, found=found):
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            update(model, *args)

        monkeypatch.setattr(train_ppo, "update", watched)
        run("ppo", "--max_steps", 2, "--target_kl", 1e-12, "--num_minibatches", 1, "--update_epochs", epochs)
    assert len(gradients[1]) == 4, "policy and value model in two rollouts"
    assert same(gradients[1], gradients[2])


def test_the_early_stop_looks_at_the_whole_update(run, monkeypatch, float32):  # noqa: F811
    """Its KL is the mean over all tokens of the update, however many micro-batches it has."""
    found = {1: [], 3: []}
    for grad_accum, kls in found.items():
        def total(value, kls=kls):
            if isinstance(value, float):  # the other sums are counts
                kls.append(value)
            return value

        ragged(monkeypatch, train_ppo)
        monkeypatch.setattr(train_ppo.runtime, "sum_over_processes", total)
        run("ppo", "--max_steps", 1, "--target_kl", 1000, "--num_minibatches", 1, "--grad_accum", grad_accum)
    assert found[1][0] == found[3][0] == 0 and found[1][1] > 1e-3
    close(found[3][1] / found[1][1], 1.0)


# ---------------------------------------------------------------- resume, mistakes

@pytest.mark.slow
def test_resume_is_exact(folder, run, monkeypatch):
    """Pitfall 4. Stopped after step 3 of 5, or killed in step 4 after the checkpoint of step 2: both models, both
    optimizers, the normalisation of scores, rollouts and log end as if nothing had happened.
    """
    flags = ["--max_steps", 5, "--save_every", 2, "--eval_every", 2, "--grad_accum", 2]
    expected = run("whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        interrupt_after(patch, 3)
        run("stopped", *flags)
    assert stopped.value.code == 130
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, train_ppo, 4)
        run("killed", *flags)
    for out, step in (("stopped", 3), ("killed", 2)):
        state = state_of(folder / out)
        assert state["step"] == step and len(state["models"]) == len(state["optimizers"]) == 2
        torch.rand(7)
        found = run(out, *flags, "--resume")
        same_runs(folder, "whole", out)
        assert without_seconds(found) == without_seconds(expected)


def test_mistakes_are_one_clear_line(folder, run, monkeypatch):
    def refused(message, *flags):
        with pytest.raises(UserError, match=message) as caught:
            run("x", *flags)
        assert "\n" not in str(caught.value)

    refused("reward broken gave nan for the answer", "--reward", f"{folder}/mine.py:broken")
    refused("model is no reward model .* python train_reward.py makes one", "--reward_model", folder / "model")
    refused("--gae_lambda 1.5: must be between 0 and 1", "--gae_lambda", 1.5)
    shutil.copytree(folder / "reward", folder / "short")
    document = json.loads((folder / "short/config.json").read_text(encoding="utf-8"))
    (folder / "short/config.json").write_text(json.dumps(document | {"max_position_embeddings": 47}), encoding="utf-8")
    refused("--max_seq_len 48 is longer than the context of .*short, which is 47", "--reward_model", folder / "short")
    refused("3 of other tasks or without an answer.* no prompt has an \"answer\"", "--reward", "answer",
            "--data", write(folder / "talk.jsonl", [ask("hi")] * 3))
    monkeypatch.chdir(folder)
    refused("out/sft is not there yet: run python train_sft.py first", "--model", "out/sft")
    refused("out/reward is not there yet: run python train_reward.py first, or give another",
            "--reward_model", "out/reward")


def test_what_show_every_prints_and_keeps(run, folder, capsys):
    """In PPO each token has an advantage of its own. In the only pass over a rollout every ratio is 1."""
    run("out", "--max_steps", 1, "--show_every", 1, "--num_minibatches", 1, "--update_epochs", 1)
    printed = capsys.readouterr().out
    assert "answers to several prompts" in printed and re.search(r"\| .* user \S+ assistant: ", printed)
    kept = [json.loads(line) for line in (folder / "out/rollout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(kept) == 6  # every second one of twelve
    assert any(len(set(line["advantages"]) - {None}) > 1 for line in kept)
    assert {ratio for line in kept for ratio in line["ratios"]} == {None, 1.0}


def test_a_reward_model_given_by_hand_is_the_start_of_the_critic_whatever_scores(folder, run, monkeypatch, capsys):
    """It gives no score, so its head is put to 0: only what it reads in an answer is used. Its folder is an input."""
    taken = spy(monkeypatch, train_ppo.ValueModel, "from_reward_model")
    calls = spy(monkeypatch, train_ppo, "gae")
    run("out", "--max_steps", 1, "--reward", f"{folder}/mine.py:letters")
    assert len(taken) == 1 and not any(values.any() for (_, values, *_), _ in calls)
    assert "the value model starts from" not in capsys.readouterr().out
    contents = json.loads((folder / "out/run_config.json").read_text(encoding="utf-8"))["contents"]
    assert str(folder / "reward") in contents
    with pytest.raises(UserError, match="nowhere"):
        run("x", "--max_steps", 1, "--reward", f"{folder}/mine.py:letters", "--reward_model", "nowhere")


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_every_token_pays_for_its_kl_and_the_last_one_has_the_score: `"--kl_coef", 0.2` -> `"--kl_coef", 0.4`. What
#    are the three rewards?
# 2. test_every_token_pays_for_its_kl_and_the_last_one_has_the_score: `"--gae_lambda", 1` -> `"--gae_lambda", 0`.
#    Which changes: the rewards or the returns?
