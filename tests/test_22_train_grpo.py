"""Chapter 22: train_grpo.py as it runs: what a rollout becomes, what is trained on it, and what is not.

After this chapter you know the first line that a right GRPO run logs, and what a token's gradient is divided by.

The learner is random, has a vocabulary of 280 tokens, and says at most six in an answer. Unless a test says otherwise,
its reward is the share of lower-case letters in the answer, computed by a function of two lines.

Drawn in tests/figures/group.svg.
"""

import json
import math
import signal
import weakref

import pytest
import torch

import train_grpo
from minillm import rollouts as rollouts_file
from minillm import runtime
from minillm.checkpoint import load_model, save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.generate import Rollout, generate
from minillm.heads import RewardModel, save_reward_model
from minillm.interrupt import Interrupt
from minillm.lora import lora_off
from minillm.metrics import Progress
from minillm.model import CausalLM, ModelConfig
from minillm.peft import load_adapter
from minillm.run import Interrupted
from minillm.safetensors import load_safetensors
from minillm.tokenizer import train_tokenizer
from tests.helpers import close, forbid_waiting_in_updates

REWARDS = '''
def letters(messages, answers, example):
    return [sum("a" <= c <= "z" for c in answer) / max(1, len(answer)) for answer in answers]


def equal(messages, answers, example):
    return [0.7] * len(answers)


def first_prompt(messages, answers, example):
    """Half of the answers to the first prompt, "a?", score 1; all others score 0."""
    return [float(i % 2 == 0 and messages[-1]["content"] == "a?") for i in range(len(answers))]


def broken(messages, answers, example):
    return [float("nan")] * len(answers)
'''


@pytest.fixture
def float32(monkeypatch):
    """bf16, which the scripts use where a CPU has it, would hide the digits that are compared here."""
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["It is red. It is blue."] * 3, 280)


def small_model(tokenizer, seed=0, context=96):
    """Random, with larger weights than usual, so that its distributions are far from uniform. In evaluation a reply has
    at most half the context, and this model's hardly ever ends before that.
    """
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64,
                                 max_position_embeddings=context))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


def turn(role, content):
    return {"role": role, "content": content}


def ask(text, **more):
    return {"conversations": [turn("user", text)], **more}


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def training_steps(folder):
    return [line for line in logged(folder) if "truncated" in line]


def summary(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def weights_of(folder):
    return {name: tensor.clone() for name, tensor in load_safetensors(folder / "model.safetensors").items()}


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder with a model, twelve prompts, four held-out prompts and a reward file."""
    save_model(tmp_path / "model", small_model(tokenizer, context=48), tokenizer)
    write(tmp_path / "p.jsonl", [ask(c + "?", task="letters", answer="red") for c in "abcdefghijkl"])
    write(tmp_path / "four.jsonl", [ask(c + "?") for c in "abcd"])
    write(tmp_path / "e.jsonl", [ask(c + "!", task="letters", answer="red") for c in "abcd"])
    (tmp_path / "mine.py").write_text(REWARDS, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(folder):
    """run(out, flags...) -> train_grpo's result, in this process."""
    def go(out, *flags):
        argv = ["--model", folder / "model", "--data", folder / "p.jsonl", "--eval_data", folder / "e.jsonl",
                "--out", folder / out, "--device", "cpu", "--reward", f"{folder}/mine.py:letters", "--batch_size", 4,
                "--group_size", 8, "--max_new_tokens", 6, "--max_seq_len", 48, "--lr", 3e-3, "--warmup_steps", 0,
                "--missing_eos_penalty", 0, *flags]
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


def never_ending(monkeypatch, module):
    """Answers do not end by themselves: each has --max_new_tokens tokens."""
    def sample(model, prompts, max_new_tokens, end_id, *args, **options):
        return generate(model, prompts, max_new_tokens, -1, *args, **options)

    monkeypatch.setattr(rollouts_file, "generate", sample)


def ragged(monkeypatch, module):
    """Answer i is cut after 1 + i % 6 tokens; by itself hardly one of this learner's answers ends before the limit."""
    def sample(model, prompts, max_new_tokens, end_id, *args, **options):
        whole = generate(model, prompts, max_new_tokens, -1, *args, **options)
        place = whole.response_mask.cumsum(dim=1)  # 0 on the prompt, 1 on the first token of the answer, ...
        mask = whole.response_mask & (place <= 1 + torch.arange(len(place))[:, None] % 6)
        return Rollout(whole.tokens.masked_fill((place > 0) & ~mask, 0), mask, whole.logprobs.masked_fill(~mask, 0))

    monkeypatch.setattr(rollouts_file, "generate", sample)


# ---------------------------------------------------------------- does it learn

@pytest.mark.parametrize("loss, lr", [("grpo", 1e-2), ("dr_grpo", 2e-2), ("dapo", 1e-2)])
@pytest.mark.slow
def test_a_reward_file_of_ones_own_trains(folder, run, loss, lr):
    result = run("grpo", "--max_steps", 12, "--loss", loss, "--lr", lr)
    lines = training_steps(folder / "grpo")
    assert lines[0]["reward"] < 0.5 and result["sampled_reward"] > lines[0]["reward"] + 0.3
    found = summary(folder / "grpo")
    assert found["before"]["sampled_reward"] < result["sampled_reward"]
    assert found["data"]["prompts"] == 12 and found["tokens"] > 0
    assert {"policy_loss", "approx_kl", "clip_fraction", "ratio_mean", "kl", "reward", "no_signal", "response_tokens",
            "truncated", "entropy", "lr"} <= set(lines[0])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    load_model(folder / "grpo")


def test_held_out_accuracy_is_logged_at_intervals(folder, run):
    run("grpo", "--max_steps", 4, "--eval_every", 2, "--reward", "0.5*answer", f"{folder}/mine.py:letters")
    evaluations = [line for line in logged(folder / "grpo") if "accuracy" in line]
    assert [line["step"] for line in evaluations] == [2]
    assert {"sampled_reward", "sampled_reward_answer", "sampled_reward_letters", "sampled_accuracy",
            "accuracy_by_task"} <= set(evaluations[0])
    first = training_steps(folder / "grpo")[0]
    assert first["reward"] == pytest.approx(0.5 * first["reward_answer"] + first["reward_letters"], abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_update_waits_for_the_gpu(monkeypatch, run):
    """From the first optimizer step of a rollout to the last: the shapes of all micro-batches are known before."""
    happened = forbid_waiting_in_updates(monkeypatch, Progress, "step")
    run("grpo", "--device", "cuda", "--no-compile", "--max_steps", 2, "--num_minibatches", 3, "--grad_accum", 2,
        "--beta", 0.04)
    assert happened == (["sum_gradients"] * 3 + ["step"]) * 2


# ---------------------------------------------------------------- one distribution, one ratio

@pytest.mark.parametrize("bf16, peft", [(False, "none"), (True, "none"), (False, "lora"), (True, "lora")])
def test_the_first_ratio_is_exactly_1_and_the_kl_0_and_then_they_move(run, monkeypatch, bf16, peft):
    """Two passes over a rollout, of one optimizer step with two micro-batches each. In the first pass the
    old, the reference's and the new log-probabilities are equal bit for bit; in the second they are not. The classic
    mistake is to take the old ones from the sampler: its batches and its cache round differently, in bf16 by a percent.
    With a LoRA the reference is the policy without it. What is frozen is held in bf16 where that is computed in.
    """
    if bf16 and not runtime.cpu_has_bf16():
        pytest.skip("this CPU has no bf16")
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: bf16)
    calls, models = spy(monkeypatch, train_grpo, "grpo_loss"), []
    monkeypatch.setattr(runtime, "compile_backbone", lambda model, asked: models.append(model))
    run("grpo", "--max_steps", 1, "--update_epochs", 2, "--num_minibatches", 1, "--grad_accum", 2, "--beta", 0.04,
        "--peft", peft)
    dtypes = [getattr(model.model.layers[0].mlp.up_proj, "base", model.model.layers[0].mlp.up_proj).weight.dtype
              for model in models]
    frozen = torch.bfloat16 if bf16 else torch.float32
    assert dtypes == ([frozen] if peft == "lora" else [torch.float32, frozen]), "the policy, and a reference of its own"
    assert len(calls) == 4
    for (logprobs, old, ref, _, mask, *_), (_, stats) in calls[:2]:
        assert torch.equal(logprobs[mask], old[mask]) and torch.equal(logprobs[mask], ref[mask])
        assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0 and stats["kl"] == 0 and stats["clip_fraction"] == 0
    for (logprobs, old, ref, _, mask, *_), (_, stats) in calls[2:]:
        assert not torch.equal(logprobs[mask], old[mask]) and stats["approx_kl"] > 1e-6 and stats["kl"] > 1e-6
        assert torch.equal(old[mask], ref[mask]), "the policy that sampled was still the reference"


def test_a_lora_is_saved_as_an_adapter_and_without_it_the_policy_is_the_base(folder, run, float32, monkeypatch):
    """The adapter in OUT, put on the base again, gives the trained policy's logits to the bit."""
    trained, update = [], train_grpo.update
    monkeypatch.setattr(train_grpo, "update", lambda model, *rest: (update(model, *rest), trained.append(model)))
    run("lora", "--max_steps", 2, "--peft", "lora", "--rank", 4)
    tokens = torch.tensor([[5, 9, 30, 41, 7]])
    base, again = load_model(folder / "model"), load_model(folder / "model")
    load_adapter(again, folder / "lora")
    with torch.no_grad():
        assert torch.equal(again(tokens), trained[-1](tokens)) and not torch.equal(again(tokens), base(tokens))
        with lora_off(trained[-1]):
            assert torch.equal(trained[-1](tokens), base(tokens))
    assert not (folder / "lora" / "model.safetensors").exists()  # the base is not written again


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_reference_stays_and_the_old_policy_follows(run, monkeypatch, peft):
    """In the second rollout the first ratio is 1 again, while the KL to the reference is not 0 any more."""
    calls = spy(monkeypatch, train_grpo, "grpo_loss")
    run("grpo", "--max_steps", 2, "--num_minibatches", 1, "--beta", 0.04, "--peft", peft)
    stats = calls[1][1][1]
    assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0 and stats["kl"] > 1e-6


@pytest.mark.parametrize("beta, scored", [(0.0, [True, False]), (0.04, [True, True])])
def test_without_a_kl_term_the_reference_scores_one_of_the_mini_batches(folder, run, monkeypatch, beta, scored):
    """Only the log asks for the KL then. It is measured before the first update, so it is 0 exactly."""
    calls = spy(monkeypatch, train_grpo, "grpo_loss")
    run("grpo", "--max_steps", 1, "--num_minibatches", 2, "--beta", beta, "--reward", f"{folder}/mine.py:letters")
    assert [args[2] is not None for args, _ in calls] == scored
    if not beta:
        assert training_steps(folder / "grpo")[0]["kl"] == 0


def test_before_the_update_one_forward_pass_is_forgotten_before_the_next(run, monkeypatch):
    """It is made with gradients, for the same kernels as in the update, but none runs backward. The classic mistake
    keeps its result in a variable, and with it all activations: those of two micro-batches at a time."""
    graphs, original = [], train_grpo.response_logprobs

    def watched(*args, **options):
        assert len(graphs) >= 6 or not any(graph() for graph in graphs)
        result = original(*args, **options)
        graphs.append(weakref.ref(result[0] if options.get("with_entropy") else result))
        return result

    monkeypatch.setattr(train_grpo, "response_logprobs", watched)
    run("grpo", "--max_steps", 1, "--num_minibatches", 1, "--grad_accum", 3)
    assert len(graphs) == 3 * 2 + 3  # policy and reference, then the update


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_those_that_are_trained(run, monkeypatch, float32, temperature):
    """Pitfall 5. Sampler and trainer see one distribution, temperature included, up to rounding."""
    ragged(monkeypatch, train_grpo)
    rollouts, calls = spy(monkeypatch, train_grpo, "sample_rollout"), spy(monkeypatch, train_grpo, "grpo_loss")
    run("grpo", "--max_steps", 1, "--beta", 0.04, "--grad_accum", 2, "--temperature", temperature)
    rollout = rollouts[0][1]
    old = torch.cat([args[1][args[4]] for args, _ in calls])  # of all micro-batches, in whatever order
    sampled = rollout.logprobs[rollout.response_mask]
    assert (old.sort().values - sampled.sort().values).abs().max() < 1e-4
    stats = calls[0][1][1]
    assert stats["ratio_mean"] == 1 and stats["kl"] == 0, "policy and reference have the same temperature"


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta, reward", [(0.04, "letters"), (0.0, "first_prompt")])
def test_micro_batches_add_up(folder, run, monkeypatch, float32, loss, beta, reward):
    """Pitfall 3. One optimizer step on 32 answers, whole or in 3 ragged micro-batches: the same log and the same
    gradient. Also where three of four groups are not computed.
    """
    ragged(monkeypatch, train_grpo)
    logs, gradients, update = [], [], train_grpo.update

    def keep_gradient(policy, *args):
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        update(policy, *args)

    monkeypatch.setattr(train_grpo, "update", keep_gradient)
    for out, parts in (("whole", 1), ("parts", 3)):
        run(out, "--max_steps", 1, "--num_minibatches", 1, "--grad_accum", parts, "--loss", loss, "--beta", beta,
            "--data", folder / "four.jsonl", "--reward", f"{folder}/mine.py:{reward}")
        logs.append(training_steps(folder / out)[0])
    assert logs[0].keys() == logs[1].keys() >= {"policy_loss", "entropy", "kl"}
    for name in logs[0].keys() - {"tokens_per_s"}:
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-5), name
    assert gradients[0].norm() > 1e-3
    close(gradients[1], gradients[0])


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_every_loss_gets_its_clip_and_its_kl_term(run, monkeypatch, loss):
    """The second pass over a rollout, after an update. With clip_eps 0 every token that moved in the right direction is
    clipped (of dapo those that moved down; by default hardly one); a KL term with weight 10000 is most of the loss.
    """
    def second_pass(*flags):
        with monkeypatch.context() as patch:
            calls = spy(patch, train_grpo, f"{loss}_loss")
            run("grpo", "--max_steps", 1, "--update_epochs", 2, "--num_minibatches", 1, "--loss", loss, *flags)
        assert len(calls) == 2
        return calls[1][1]

    plain, stats = second_pass()
    _, clipped = second_pass("--clip_eps", 0)
    assert clipped["clip_fraction"] > stats["clip_fraction"] + 0.2
    with_kl, stats = second_pass("--beta", 10_000)
    assert plain.abs() < 1 < with_kl


# ---------------------------------------------------------------- advantages

def test_advantages_are_relative_to_the_group(run, monkeypatch):
    """Every group has mean 0. Dr. GRPO's advantages are the rewards minus the group's mean, without the division."""
    calls, losses = spy(monkeypatch, train_grpo, "group_advantages"), spy(monkeypatch, train_grpo, "grpo_loss")
    run("grpo", "--max_steps", 1, "--beta", 0.04)
    (rewards,), advantages = calls[0]
    assert rewards.shape == (4, 8) and rewards.min() >= 0
    close(advantages.mean(dim=1), [0.0] * 4)
    assert sorted(torch.cat([args[3] for args, _ in losses]).tolist()) == sorted(advantages.flatten().tolist())
    losses = spy(monkeypatch, train_grpo, "dr_grpo_loss")
    run("dr", "--max_steps", 1, "--loss", "dr_grpo", "--beta", 0.04)
    centred = (rewards - rewards.mean(1, keepdim=True)).flatten()
    close(torch.cat([args[3] for args, _ in losses]).sort().values, centred.sort().values)


def test_an_answer_that_does_not_end_costs(folder, run, monkeypatch):
    """A reward sees only the text and does not know that it was cut off, so that is charged separately. Two of eight
    answers do not end: 0.7 - 0.5. The log has what the reward function gave.
    """
    calls = spy(monkeypatch, train_grpo, "group_advantages")
    ended = torch.tensor([True, False, True, True] * 8)
    monkeypatch.setattr(train_grpo, "read_answers", lambda rollout, tokenizer: (["x"] * 32, ended))
    run("grpo", "--max_steps", 1, "--reward", f"{folder}/mine.py:equal", "--missing_eos_penalty", 0.5)
    close(calls[0][0][0], [[0.7, 0.2, 0.7, 0.7, 0.7, 0.2, 0.7, 0.7]] * 4)
    line = training_steps(folder / "grpo")[0]
    close([line["truncated"], line["no_signal"], line["reward"]], [0.25, 0.0, 0.7])


# ---------------------------------------------------------------- groups of equal rewards, and what a step divides by

def first_gradients(monkeypatch, name):
    """(logprobs, advantages, mask) of each call of this loss; after the run the logprobs have their gradient."""
    calls, function = [], getattr(train_grpo, name)

    def record(logprobs, old, ref, advantages, mask, *args, **options):
        logprobs.retain_grad()
        calls.append((logprobs, advantages, mask))
        return function(logprobs, old, ref, advantages, mask, *args, **options)

    monkeypatch.setattr(train_grpo, name, record)
    return calls


@pytest.mark.parametrize("loss, step", [("grpo", 0.9352395 / (2 * 32)), ("dr_grpo", 0.5 / (32 * 2)),
                                        ("dapo", 0.9352395 / 16)])
def test_the_denominator_of_an_optimizer_step(folder, run, monkeypatch, loss, step):
    """4 groups of 8 answers of 2 tokens. Four answers of one group score 1; everything else scores 0.

    In that group the mean is 1/2 and the std sqrt(8 x 1/4 / 7) = 0.534522, so the advantages are +- 0.5 / 0.534622 =
    +- 0.935240; Dr. GRPO has +- 0.5. At ratio 1 the gradient of a token is -advantage times its weight:
        grpo      1 / 2 tokens of the answer, 1 / 32 answers: all 4 groups count
        dr_grpo   1 / (32 answers x 2 tokens, the limit)
        dapo      1 / 16 tokens: only the group that differs counts
    """
    never_ending(monkeypatch, train_grpo)
    calls = first_gradients(monkeypatch, f"{loss}_loss")
    run("grpo", "--max_steps", 1, "--num_minibatches", 1, "--grad_accum", 2, "--loss", loss, "--max_new_tokens", 2,
        "--data", folder / "four.jsonl", "--reward", f"{folder}/mine.py:first_prompt")
    assert [len(advantages) for _, advantages, _ in calls] == [4, 4], "the other groups are not computed"
    for logprobs, advantages, mask in calls:
        assert mask.sum() == 8
        for row, (advantage, here) in enumerate(zip(advantages, mask)):
            close(logprobs.grad[row][here] * 1000, [-1000 * step if advantage > 0 else 1000 * step] * 2)
        assert not logprobs.grad[~mask].any()
    assert training_steps(folder / "grpo")[0]["no_signal"] == 0.75


def test_only_the_kl_term_needs_groups_of_equal_rewards(folder, run, monkeypatch):
    """One of four groups differs. With beta 0 only its 8 answers are computed; with a KL term grpo computes all 32, and
    dapo, which leaves the other groups out, still 8.
    """
    for loss, beta, expected in (("grpo", 0.0, 8), ("grpo", 0.04, 32), ("dapo", 0.04, 8)):
        with monkeypatch.context() as patch:
            calls = spy(patch, train_grpo, f"{loss}_loss")
            run("grpo", "--max_steps", 1, "--loss", loss, "--beta", beta, "--data", folder / "four.jsonl",
                "--reward", f"{folder}/mine.py:first_prompt")
        assert sum(len(args[3]) for args, _ in calls) == expected


@pytest.mark.parametrize("flags", [[], ["--loss", "dr_grpo"], ["--loss", "dapo"]])
def test_equal_rewards_change_no_weight(folder, run, flags):
    """Pitfall 14. All rewards are equal: the log says so, nothing is NaN, and no bit of the policy changes."""
    run("grpo", "--max_steps", 3, "--reward", f"{folder}/mine.py:equal", *flags)
    lines = training_steps(folder / "grpo")
    assert [line["no_signal"] for line in lines] == [1.0] * 3
    assert all(math.isfinite(value) for line in lines for value in line.values())
    before, after = weights_of(folder / "model"), weights_of(folder / "grpo")
    assert all(torch.equal(before[name], after[name]) for name in before)


def same(a, b) -> bool:
    """Equal to the bit, in every corner of a training state."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(folder):
    return torch.load(folder / "training_state.pt", weights_only=True)


def test_of_many_held_out_prompts_some_are_asked(run, monkeypatch):
    """Of four, the first and the last, before and after."""
    asked = spy(monkeypatch, train_grpo, "answer_questions")
    sampled = spy(monkeypatch, train_grpo, "sampled_scores")
    run("grpo", "--max_steps", 1, "--max_questions", 2)
    questions = [[record["conversations"][0]["content"] for record in call[0][2]] for call in asked]
    assert questions == [["a!", "d!"], ["a!", "d!"]] and [len(call[0][2]) for call in sampled] == [2, 2]


def test_without_signal_not_even_the_momentum_moves_the_policy(folder, run, monkeypatch):
    """The first rollout has a signal; in the others all rewards are equal. An optimizer step on a gradient of zeros
    would go on in the old direction, and the momentum would fade.
    """
    states, update = [], train_grpo.update

    def watched(policy, optimizers, max_grad_norm):
        update(policy, optimizers, max_grad_norm)
        moments = [optimizer.state_dict()["state"] for optimizer in optimizers]
        states.append([{name: tensor.clone() for name, tensor in policy.state_dict().items()},
                       [{k: v.clone() for k, v in moment.items()} for state in moments for moment in state.values()]])

    score, calls = train_grpo.score_rollout, []

    def only_once(rewards, prompts, answers, device):
        calls.append(1)
        total, parts = score(rewards, prompts, answers, device)
        return (total if len(calls) == 1 else torch.zeros_like(total)), parts

    monkeypatch.setattr(train_grpo, "update", watched)
    monkeypatch.setattr(train_grpo, "score_rollout", only_once)
    run("grpo", "--max_steps", 3, "--num_minibatches", 1)
    assert [line["no_signal"] < 1 for line in training_steps(folder / "grpo")] == [True, False, False]
    assert len(states) == 3 and states[0][1][0]["exp_avg"].any()
    assert same(states[0], states[1]) and same(states[1], states[2])


# ---------------------------------------------------------------- resume

class Crash(Exception):
    pass


def interrupt_after(monkeypatch, steps):
    """Ctrl-C arrives during this step."""
    calls = []

    def requested(self):
        calls.append(1)
        return signal.SIGINT if len(calls) == steps else 0

    monkeypatch.setattr(Interrupt, "requested", requested)


def crash_in(monkeypatch, module, step):
    """The rollout of this step, counted from 1, raises."""
    sample, calls = rollouts_file.generate, []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == step:
            raise Crash
        return sample(*args, **options)

    monkeypatch.setattr(rollouts_file, "generate", fail)


def same_runs(folder, one, other):
    """Weights, optimizers, random generators, position in the data and log are equal to the bit."""
    assert same(state_of(folder / one), state_of(folder / other))
    assert same(weights_of(folder / one), weights_of(folder / other))
    one, other = ([{name: value for name, value in line.items() if name != "tokens_per_s"}
                   for line in logged(folder / out) if "resumed" not in line] for out in (one, other))
    assert one == other


def without_seconds(result):
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.slow
def test_resume_is_exact(folder, run, monkeypatch):
    """Pitfall 4. Stopped after step 3 of 5, or killed in step 4 after the checkpoint of step 2: weights, optimizer,
    rollouts and log end as if nothing had happened, even if other random numbers were drawn in between.
    """
    flags = ["--max_steps", 5, "--save_every", 2, "--eval_every", 2, "--update_epochs", 2, "--grad_accum", 2]
    expected = run("whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        interrupt_after(patch, 3)
        run("stopped", *flags)
    assert stopped.value.code == 130
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, train_grpo, 4)
        run("killed", *flags)
    for out, step in (("stopped", 3), ("killed", 2)):
        assert state_of(folder / out)["step"] == step
        torch.rand(7)
        found = run(out, *flags, "--resume")
        same_runs(folder, "whole", out)
        assert without_seconds(found) == without_seconds(expected)
        assert run(out, *flags, "--resume") == without_seconds(expected), "finished: nothing is done"


@pytest.mark.slow
def test_a_reward_that_fails_on_the_way_is_one_line_and_the_run_goes_on_from_its_last_save(folder, run, monkeypatch):
    """In step 4 the reward is NaN. Step 3 is lost, because step 2 was the last to be saved. Once the file is corrected,
    the run ends like one that never failed.
    """
    flags = ["--max_steps", 5, "--save_every", 2]
    run("whole", *flags)
    score, calls = train_grpo.score_rollout, []

    def fail(rewards, *rest):
        calls.append(1)
        if len(calls) == 4:
            rewards = train_grpo.load_rewards([f"{folder}/mine.py:broken"], "", "", "cpu")
        return score(rewards, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "score_rollout", fail)
        with pytest.raises(UserError, match="reward broken gave nan for the answer '") as caught:
            run("parts", *flags)
    assert "\n" not in str(caught.value)
    assert state_of(folder / "parts")["step"] == 2
    with open(folder / "mine.py", "a", encoding="utf-8") as file:
        file.write("# corrected\n")
    run("parts", *flags, "--resume")
    same_runs(folder, "whole", "parts")


# ---------------------------------------------------------------- other data, mistakes

@pytest.mark.slow
def test_minimind_style_prompts_train_with_a_reward_model_and_with_a_judge(folder, run, tokenizer):
    """No answers, no tasks, an assistant's turn at the end, no held-out file."""
    path = write(folder / "rlaif.jsonl", [{"conversations": [turn("user", f"你好 {i}"), turn("assistant", "")]}
                                          for i in range(8)])
    save_model(folder / "model", small_model(tokenizer), tokenizer)  # the judge may answer with 64 tokens
    save_reward_model(folder / "reward", RewardModel.from_lm(small_model(tokenizer, seed=1)), tokenizer)
    for reward, scorer in (("model", ["--reward_model", folder / "reward"]), ("judge", [])):
        result = run(f"by_{reward}", "--data", path, "--eval_data", "", "--reward", reward, *scorer, "--max_steps", 2)
        assert math.isfinite(result["sampled_reward"]) and result["accuracy"] is None
        assert training_steps(folder / f"by_{reward}")[0]["no_signal"] == 0


def test_mistakes_are_one_clear_line(folder, run, monkeypatch):
    def refused(message, *flags):
        with pytest.raises(UserError, match=message) as caught:
            run("x", *flags)
        assert "\n" not in str(caught.value)

    refused("--group_size 1: must be at least 2", "--group_size", 1)
    refused("--max_new_tokens leaves no room for a prompt in --max_seq_len", "--max_seq_len", 8, "--max_new_tokens", 8)
    refused("reward broken gave nan", "--reward", f"{folder}/mine.py:broken")
    refused("--tasks add: no prompt has such a task; found: letters", "--tasks", "add")
    refused("--temperature 0.0: must be at least", "--temperature", 0)
    refused("no prompt has an \"answer\"", "--data", folder / "four.jsonl", "--reward", "answer")
    monkeypatch.chdir(folder)
    refused("out/sft is not there yet: run python train_sft.py first", "--model", "out/sft")
    refused("out/reward is not there yet: run python train_reward.py first", "--reward", "model")
    refused("model is no reward model", "--reward", "model", "--reward_model", "model")


def test_what_show_every_prints_and_keeps(run, folder, capsys):
    """The first group, best answer first; and answers token by token: in GRPO each has one advantage. In the second
    pass over the rollout the policy has moved, so ratios are no longer 1.
    """
    run("out", "--max_steps", 1, "--show_every", 1, "--num_minibatches", 1, "--update_epochs", 2)
    assert "| reward | advantage |" in capsys.readouterr().out
    kept = [json.loads(line) for line in (folder / "out/rollout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(kept) == 8 and all(line["step"] == 1 and 0 <= line["reward"] <= 1 for line in kept)
    for line in kept:
        sampled = [text for text, ratio in zip(line["tokens"], line["ratios"]) if ratio is not None]
        assert line["tokens"][0] == "<|im_start|>" and line["tokens"][-len(sampled):] == sampled
        assert len(set(line["advantages"]) - {None}) == 1
    assert any(abs(ratio - 1) > 0.01 for line in kept for ratio in line["ratios"] if ratio is not None)


def test_a_reward_model_that_would_score_nothing_is_refused(folder, run):
    """It is the default of --reward_model that may be there and not be used; one given by hand is meant."""
    with pytest.raises(UserError, match="--reward_model nowhere: --reward answer .* add model to --reward, or leave"):
        run("x", "--reward", "answer", "--reward_model", "nowhere")
    assert not (folder / "x").exists()


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_an_answer_that_does_not_end_costs: `"--missing_eos_penalty", 0.5` -> `"--missing_eos_penalty", 0.7`. What is
#    an answer worth that does not end?
# 2. test_an_answer_that_does_not_end_costs: `[True, False, True, True]` -> `[False, False, False, False]`. No answer
#    ends. Does the penalty teach the model to stop?
