"""Chapter 21: train_grpo.py as it runs: what a rollout becomes, what is trained on it, what is left behind.

The learner is random, with 280 tokens, and answers in six of them. What it is paid for is the share of small letters among
the characters it says, by a reward file of three lines; or nothing at all, or the same to everybody.
"""

import json
import math

import pytest
import torch

import train_grpo
from minillm import runtime
from minillm.checkpoint import load_model, load_safetensors, save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.heads import RewardModel, save_reward_model
from minillm.metrics import Progress
from minillm.model import CausalLM, ModelConfig
from minillm.tokenizer import train_tokenizer
from tests.helpers import close, forbid_waiting_in_updates

LETTERS = '''
def letters(messages, answers, example):
    return [sum("a" <= c <= "z" for c in answer) / max(1, len(answer)) for answer in answers]
def equal(messages, answers, example):
    return [0.7] * len(answers)
def broken(messages, answers, example):
    return [float("nan")] * len(answers)
'''


@pytest.fixture
def float32(monkeypatch):
    """bf16, which the scripts take where a CPU has it, would hide the digits that are compared here."""
    monkeypatch.setattr("minillm.runtime.torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["It is red. It is blue."] * 3, 280)


def small_model(tokenizer, seed=0):
    """Random, with larger weights than usual, so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1, head_dim=16, intermediate_size=64, max_position_embeddings=128))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


def turn(role, content):
    return {"role": role, "content": content}


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training_steps(folder):
    return [line for line in logged(folder) if "policy_loss" in line or "no_signal" in line]


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder with a model, prompts, held-out prompts, demonstrations and a reward file."""
    save_model(tmp_path / "model", small_model(tokenizer), tokenizer)
    ask = lambda text, **more: {"conversations": [turn("user", text)], **more}
    write(tmp_path / "p.jsonl", [ask(c + "?", task="letters", answer="red") for c in "abcdefghijkl"])
    write(tmp_path / "e.jsonl", [ask(c + "!", task="letters", answer="red") for c in "abcd"])
    write(tmp_path / "sft.jsonl", [{"conversations": [turn("user", c), turn("assistant", "It is red.")], "task": task} for c in "abcdef" for task in ("colour", "letters")])
    (tmp_path / "mine.py").write_text(LETTERS, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(folder):
    """run(out, flags...) -> train_grpo's result, in this process."""
    def go(out, *flags):
        argv = ["--model", folder / "model", "--data", folder / "p.jsonl", "--eval_data", folder / "e.jsonl", "--out", folder / out, "--device", "cpu",
                "--reward", f"{folder}/mine.py:letters", "--batch_size", 4, "--group_size", 8, "--max_new_tokens", 6, "--max_seq_len", 64,
                "--lr", 3e-3, "--warmup_steps", 0, "--missing_end_penalty", 0, *flags]
        return train_grpo.main(parse_config(train_grpo.Config, "", [str(x) for x in argv]))

    return go


def spy(monkeypatch, module, name):
    """Let module.name run as it does; returns the list of (arguments, result) of its calls."""
    calls, function = [], getattr(module, name)

    def record(*args, **options):
        result = function(*args, **options)
        calls.append((args, result))
        return result

    monkeypatch.setattr(module, name, record)
    return calls


# ---------------------------------------------------------------- does it learn

@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_a_reward_file_of_ones_own_trains(folder, run, loss):
    result = run("grpo", "--max_steps", 25, "--loss", loss, "--lr", 1e-2 if loss == "dr_grpo" else 5e-3)
    lines = training_steps(folder / "grpo")
    assert lines[0]["reward"] < 0.5 and result["sampled_reward"] > lines[0]["reward"] + 0.3
    summary = json.loads((folder / "grpo" / "summary.json").read_text())
    assert summary["before"]["sampled_reward"] < result["sampled_reward"] and summary["data"]["prompts"] == 12 and summary["tokens"] > 0
    assert {"policy_loss", "approx_kl", "clip_fraction", "ratio_mean", "kl", "reward", "no_signal", "response_tokens", "truncated", "entropy", "lr"} <= set(lines[0])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    load_model(folder / "grpo")


def test_held_out_accuracy_is_logged_at_intervals(folder, run):
    run("grpo", "--max_steps", 4, "--eval_every", 2, "--reward", "0.5*answer", f"{folder}/mine.py:letters")
    evaluations = [line for line in logged(folder / "grpo") if "accuracy" in line]
    assert [line["step"] for line in evaluations] == [2]
    assert {"sampled_reward", "sampled_reward_answer", "sampled_reward_letters", "sampled_accuracy", "accuracy_by_task"} <= set(evaluations[0])
    first = training_steps(folder / "grpo")[0]
    assert first["reward"] == pytest.approx(0.5 * first["reward_answer"] + first["reward_letters"], abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_update_waits_for_the_gpu(monkeypatch, folder, run):
    """From the first optimizer step of a rollout to the last: the shapes of all micro-batches are known before."""
    happened = forbid_waiting_in_updates(monkeypatch, Progress, "step")
    run("grpo", "--device", "cuda", "--no-compile", "--max_steps", 2, "--mini_batches", 3, "--grad_accum", 2, "--beta", 0.04, "--sft_data", folder / "sft.jsonl")
    assert happened == (["sum_gradients"] * 3 + ["step"]) * 2


# ---------------------------------------------------------------- one distribution, one ratio

@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_ratio_is_exactly_1_and_the_kl_0_and_then_they_move(run, monkeypatch, bf16):
    """Pitfall 5. Two passes of one optimizer step of two micro-batches: in the first pass, old, reference and new
    log-probabilities are equal bit for bit; in the second they are not. The classic mistake, old log-probabilities taken
    from the sampler (another batch, a cache), is off by rounding at once, and in bf16 by a percent."""
    if bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16")
    monkeypatch.setattr("minillm.runtime.torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: bf16)
    calls = spy(monkeypatch, train_grpo, "grpo_loss")
    run("grpo", "--max_steps", 1, "--inner_epochs", 2, "--mini_batches", 1, "--grad_accum", 2, "--beta", 0.04)
    assert len(calls) == 4
    for (logprobs, old, ref, _, mask, *_), (_, stats) in calls[:2]:
        assert torch.equal(logprobs[mask], old[mask]) and torch.equal(logprobs[mask], ref[mask])
        assert stats["ratio_mean"] == 1 and stats["kl"] == 0 and stats["approx_kl"] == 0 and stats["clip_fraction"] == 0
    for (logprobs, old, ref, _, mask, *_), (_, stats) in calls[2:]:
        assert not torch.equal(logprobs[mask], old[mask]) and stats["approx_kl"] > 1e-6 and stats["kl"] > 1e-6
        assert torch.equal(old[mask], ref[mask]), "the policy that sampled was still the reference"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_those_that_are_trained(run, monkeypatch, float32, temperature):
    rollouts, calls = spy(monkeypatch, train_grpo, "generate"), spy(monkeypatch, train_grpo, "grpo_loss")
    run("grpo", "--max_steps", 1, "--beta", 0.04, "--grad_accum", 2, "--temperature", temperature)
    rollout = rollouts[0][1]
    old = torch.cat([call[0][1][call[0][4]] for call in calls]).sort().values  # of all micro-batches, in whatever order
    assert (old - rollout.logprobs[rollout.response_mask].sort().values).abs().max() < 1e-4


def test_micro_batches_add_up(folder, run, float32):
    """One step on 32 answers, whole or in 3 ragged micro-batches of similar length: the same numbers and the same weights."""
    for loss in ("grpo", "dapo"):
        for out, parts in (("whole", 1), ("parts", 3)):
            run(out, "--max_steps", 1, "--mini_batches", 1, "--grad_accum", parts, "--loss", loss, "--beta", 0.04, "--sft_data", folder / "sft.jsonl")
        whole, parts = training_steps(folder / "whole")[0], training_steps(folder / "parts")[0]
        for name in whole.keys() - {"tokens_per_s"}:
            assert whole[name] == pytest.approx(parts[name], abs=1e-5), name
        a, b = (load_safetensors(folder / out / "model.safetensors") for out in ("whole", "parts"))
        # AdamW's first step has the size of lr whatever the gradient's: compare where a gradient is not mere rounding
        assert sum(((a[name] - b[name]).abs() > 1e-5).sum().item() for name in a) / sum(x.numel() for x in a.values()) < 0.01


# ---------------------------------------------------------------- groups without signal

def weights_of(folder):
    return {name: tensor.clone() for name, tensor in load_safetensors(folder / "model.safetensors").items()}


@pytest.mark.parametrize("flags", [[], ["--beta", 0.0, "--loss", "dr_grpo"], ["--loss", "dapo"]])
def test_equal_rewards_change_no_weight(folder, run, flags):
    """Pitfall 14. Every group has equal rewards: said in the log, no NaN, and the policy stays what it was, bit for bit."""
    run("grpo", "--max_steps", 3, "--reward", f"{folder}/mine.py:equal", *flags)
    assert [line["no_signal"] for line in training_steps(folder / "grpo")] == [1.0] * 3
    assert all(math.isfinite(value) for line in training_steps(folder / "grpo") for value in line.values())
    before, after = weights_of(folder / "model"), weights_of(folder / "grpo")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_signal_not_even_the_momentum_moves_the_policy(folder, run, monkeypatch):
    """The first rollout teaches, all others have equal rewards. An optimizer step on a zero gradient would go on."""
    (folder / "once.py").write_text("calls = []\ndef once(m, answers, e):\n    calls.append(1)\n    return [len(a) * (len(calls) in range(5, 9)) for a in answers]\n", encoding="utf-8")
    seen, take = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: (take(self, *args), seen.append(1)))
    run("grpo", "--max_steps", 3, "--reward", f"{folder}/once.py:once")  # 4 calls for the held-out prompts, then 4 per rollout
    assert [line["no_signal"] < 1 for line in training_steps(folder / "grpo")] == [True, False, False]
    assert len(seen) == 4  # mini-batches


def test_only_groups_with_signal_are_computed_unless_there_is_a_kl_term(folder, run, monkeypatch):
    """Of the prompts a? to l? only those of a and b are paid for: whoever asks for the rest computes in vain."""
    (folder / "ab.py").write_text("def ab(m, answers, e): return [len(a) * (m[-1]['content'][0] in 'abcd') for a in answers]\n", encoding="utf-8")
    calls = spy(monkeypatch, train_grpo, "grpo_loss")
    for beta, expected in ((0.0, 4 * 8), (0.04, 12 * 8)):
        calls.clear()
        run("grpo", "--max_steps", 1, "--batch_size", 12, "--reward", f"{folder}/ab.py:ab", "--beta", beta)
        assert sum(len(args[3]) for args, _ in calls) == expected
        assert training_steps(folder / "grpo")[0]["no_signal"] == pytest.approx(8 / 12)


def test_advantages_are_relative_to_the_group(run, monkeypatch):
    calls = spy(monkeypatch, train_grpo, "group_advantages")
    losses = spy(monkeypatch, train_grpo, "grpo_loss")
    run("grpo", "--max_steps", 1, "--beta", 0.04)
    (rewards,), advantages = calls[0]
    assert rewards.shape == (4, 8) and rewards.min() >= 0
    close(advantages.mean(dim=1), [0.0] * 4)
    assert sorted(torch.cat([args[3] for args, _ in losses]).tolist()) == sorted(advantages.flatten().tolist())
    losses = spy(monkeypatch, train_grpo, "dr_grpo_loss")
    run("dr", "--max_steps", 1, "--loss", "dr_grpo", "--beta", 0.04)
    centred = torch.cat([args[3] for args, _ in losses])
    assert sorted(centred.tolist()) == pytest.approx(sorted((rewards - rewards.mean(1, keepdim=True)).flatten().tolist()), abs=1e-6)
    assert losses[0][0][5] == 6, "the length limit"


def test_an_answer_that_does_not_end_costs(folder, run, monkeypatch):
    """The score of a text that was cut off is the score of a text: what is missing has to be charged apart."""
    calls = spy(monkeypatch, train_grpo, "group_advantages")
    monkeypatch.setattr(train_grpo, "read_answers", lambda rollout, tokenizer: (["x"] * 32, torch.tensor([True, False, True, True] * 8)))
    run("grpo", "--max_steps", 1, "--reward", f"{folder}/mine.py:equal", "--missing_end_penalty", 0.5)
    close(calls[0][0][0], [[0.7, 0.2, 0.7, 0.7, 0.7, 0.2, 0.7, 0.7]] * 4)
    line = training_steps(folder / "grpo")[0]
    close([line["truncated"], line["no_signal"], line["reward"]], [0.25, 0.0, 0.575])


# ---------------------------------------------------------------- the SFT term on the side

def test_the_sft_term_keeps_what_it_replays(folder, run):
    """Rewards are equal, so that the demonstrations are all that is learned from; those of the trained task are left out."""
    flags = ["--max_steps", 12, "--reward", f"{folder}/mine.py:equal", "--sft_data", folder / "sft.jsonl", "--tasks", "letters", "--sft_coef", 1]
    run("grpo", *flags)
    losses = [line["sft_loss"] for line in training_steps(folder / "grpo")]
    assert losses[-1] < losses[0] / 2
    run("none", *flags, "--sft_coef", 0)
    assert "sft_loss" not in training_steps(folder / "none")[0]


def test_ones_own_prompts_have_no_sft_term_by_themselves(folder, run):
    run("grpo", "--max_steps", 1)
    assert "sft_loss" not in training_steps(folder / "grpo")[0]


# ---------------------------------------------------------------- resume

class Crash(Exception):
    pass


def interrupt_at(monkeypatch, step):
    calls = []
    monkeypatch.setattr(runtime.Interrupt, "requested", lambda self: calls.append(1) or len(calls) == step)


def same_runs(folder, one, other):
    a, b = (torch.load(folder / out / "training_state.pt", weights_only=True) for out in (one, other))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for x, y in zip(a["optimizers"], b["optimizers"], strict=True):
        assert all(torch.equal(s[k], y["state"][i][k]) for i, s in x["state"].items() for k in s)
    assert a["loader"] == b["loader"] and a["step"] == b["step"]
    lines = [[{k: v for k, v in line.items() if k != "tokens_per_s"} for line in logged(folder / out) if not line.get("resumed")] for out in (one, other)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_resume_is_exact(folder, run, monkeypatch, how):
    """Pitfall 4. Interrupted after step 3 of 5, or killed in step 4 after the checkpoint of step 2: rollouts, weights,
    optimizer, replay and log end bit for bit as if nothing had happened, even if other random numbers were drawn meanwhile."""
    flags = ["--max_steps", 5, "--save_every", 2, "--eval_every", 2, "--inner_epochs", 2, "--sft_data", folder / "sft.jsonl"]
    expected = run("whole", *flags)
    with monkeypatch.context() as patch:
        if how == "stopped":
            interrupt_at(patch, 3)
            assert run("parts", *flags) == {"interrupted": True, "step": 3}
        else:
            sample, calls = train_grpo.generate, []

            def fail(*args, **options):
                calls.append(1)
                if len(calls) == 4:
                    raise Crash
                return sample(*args, **options)

            patch.setattr(train_grpo, "generate", fail)
            with pytest.raises(Crash):
                run("parts", *flags)
    torch.rand(7)
    found = run("parts", *flags, "--resume")
    same_runs(folder, "whole", "parts")
    numbers = lambda result: {k: v for k, v in result.items() if k != "seconds"}
    assert numbers(found) == numbers(expected)
    assert numbers(run("parts", *flags, "--resume")) == numbers(expected), "finished: nothing is done"


def test_a_reward_that_fails_on_the_way_loses_nothing(folder, run, monkeypatch):
    """In step 3 the reward gives NaN. The two steps before are kept although no checkpoint was due; mended, the run goes on
    with the rollout that failed, and ends as one that never failed."""
    flags = ["--max_steps", 4, "--save_every", 100, "--reward", f"{folder}/mine.py:letters"]
    run("whole", *flags)
    score, calls = train_grpo.score_rollout, []

    def fail(rewards, *rest):
        calls.append(1)
        if len(calls) == 3:
            from minillm.rewards import load_rewards
            rewards = load_rewards([f"{folder}/mine.py:broken"], "", "")
        return score(rewards, *rest)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="reward broken gave nan for the answer '"):
        patch.setattr(train_grpo, "score_rollout", fail)
        run("parts", *flags)
    assert torch.load(folder / "parts" / "training_state.pt", weights_only=True)["step"] == 2
    run("parts", *flags, "--resume")
    same_runs(folder, "whole", "parts")


# ---------------------------------------------------------------- other data, mistakes

def test_minimind_style_prompts_train_with_a_reward_model_and_with_a_judge(folder, run, tokenizer):
    """No answers, no tasks, an assistant's turn at the end, no held-out file."""
    path = write(folder / "rlaif.jsonl", [{"conversations": [turn("user", f"你好 {i}"), turn("assistant", "")]} for i in range(8)])
    save_reward_model(folder / "reward", RewardModel.from_lm(small_model(tokenizer, seed=1)), tokenizer)
    for reward in ("model", "judge"):
        result = run(f"by_{reward}", "--data", path, "--eval_data", "", "--reward", reward, "--reward_model", folder / "reward", "--max_steps", 2)
        assert math.isfinite(result["sampled_reward"]) and result["accuracy"] is None
        assert training_steps(folder / f"by_{reward}")[0]["no_signal"] == 0


def test_mistakes_are_one_clear_line(folder, run, monkeypatch):
    def refused(message, *flags):
        with pytest.raises(UserError, match=message) as caught:
            run("x", *flags)
        assert "\n" not in str(caught.value)

    refused("--group_size 1: must be at least 2", "--group_size", 1)
    refused("no prompt is left to train on .*has room for 0 tokens", "--max_seq_len", 8, "--max_new_tokens", 8)
    refused("reward broken gave nan", "--reward", f"{folder}/mine.py:broken")
    refused("no prompt is left to train on \\(12 of other tasks", "--tasks", "add")
    refused("--temperature 0.0: must be at least", "--temperature", 0)
    refused("p.jsonl.* no conversation to replay|no conversation to replay is left", "--sft_data", folder / "p.jsonl")
    monkeypatch.chdir(folder)
    refused("out/sft is not there yet: run python train_sft.py first", "--model", "out/sft")
    refused("out/reward is not there yet: run python train_reward.py first", "--reward", "model")
    refused("model is no reward model", "--reward", "model", "--reward_model", "model")
