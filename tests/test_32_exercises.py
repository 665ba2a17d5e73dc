"""Chapter 32: exercises. Functions to write yourself, and seven scripts with a mistake in their loop.

After this chapter you will read a log as a doctor reads a chart: each mistake below trains without an error, its loss
is a finite number, and one logged metric gives it away within two steps. Find it before you read the test. The first
line of broken.py is the command that shows it; the real script with the same flags shows what should be there.

    python -m tests.exercise --broken 3 > broken.py && head -1 broken.py
"""

import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
import types

import pytest
import torch

import train_dpo
from minillm import lora, losses, model, token_cache
from minillm.checkpoint import save_model
from minillm.config import parse_config
from minillm.heads import RewardModel, save_reward_model
from tests import (exercise, test_04_model, test_05_sft_loss, test_09_generate, test_12_lora,
                   test_15_preference_losses, test_18_grpo_losses, test_19_ppo_losses)
from tests.helpers import close
from tests.test_22_train_grpo import REWARDS, ask, small_model, tokenizer, turn, write  # noqa: F401

LN2 = 0.6931471805599453


# ---------------------------------------------------------------- functions to write

@pytest.mark.parametrize("name", exercise.PATH)
def test_each_step_of_the_path_has_a_chapter_and_no_body(name):
    text = exercise.exercise([name])
    assert exercise.chapter_of(name) and f"pytest --mine mine.py {exercise.chapter_of(name)}" in text
    mine = types.ModuleType("mine")
    exec(compile(text, "mine.py", "exec"), mine.__dict__)
    real = getattr(importlib.import_module(f"minillm.{exercise.definitions()[name][0].stem}"), name)
    assert inspect.getdoc(getattr(mine, name)) == inspect.getdoc(real)
    assert inspect.signature(getattr(mine, name)) == inspect.signature(real)
    assert "NotImplementedError" in text and len(text) < len(inspect.getsource(inspect.getmodule(real)))


# A test of its chapter for each step of the path.
WORKED = {
    "token_logprobs": test_05_sft_loss.test_each_token_is_scored_by_the_row_before_it,
    "sft_loss": test_05_sft_loss.test_worked_example,
    "LoRALinear": test_12_lora.test_the_worked_example,
    "reward_loss": test_15_preference_losses.test_reward_worked_example,
    "dpo_loss": test_15_preference_losses.test_dpo_worked_example,
    "group_advantages": test_18_grpo_losses.test_advantages_worked_example,
    "kl_k3": test_18_grpo_losses.test_kl_worked_example,
    "grpo_loss": test_18_grpo_losses.test_grpo_worked_example,
    "gae": test_19_ppo_losses.test_gae_with_a_kl_penalty_on_every_token,
    "ppo_policy_loss": test_19_ppo_losses.test_policy_worked_example,
    "ppo_value_loss": test_19_ppo_losses.test_value_worked_example,
    "RMSNorm": test_04_model.test_rmsnorm_worked_example,
    "RotaryEmbedding": test_04_model.test_rope_turns_each_pair_by_its_own_angle,
    "attention_mask_2d": test_04_model.test_who_may_look_at_whom,
    "sample": test_09_generate.test_temperature_zero_is_argmax_and_certain,
}


@pytest.mark.parametrize("name", exercise.PATH)
def test_a_blank_is_red_and_the_real_body_in_its_place_green(tmp_path, name):
    """The imports of the file are all that the real body needs."""
    path, text = tmp_path / "mine.py", exercise.exercise([name])
    module = importlib.import_module(f"minillm.{exercise.definitions()[name][0].stem}")
    real = inspect.getsource(getattr(module, name))
    filled = text[:text.index(real.splitlines()[0])] + real
    for written, error in ((text, NotImplementedError), (filled, None)):
        path.write_text(written, encoding="utf-8")
        undo = exercise.use(path)
        try:
            assert getattr(module, name).__module__ == "mine"
            if error:
                with pytest.raises(error, match="yours to write"):
                    WORKED[name]()
            else:
                WORKED[name]()
        finally:
            exercise.restore(undo)


def imports_of(text):
    """The part of an exercise between its docstring and the rules of the first file."""
    return text.split('"""\n\n')[1].split("\n\n\n# minillm/")[0]


def test_a_file_imports_what_the_real_bodies_use_from_where_it_is_defined():
    """Python's own modules, then packages, then minillm; at most 120 columns. What is itself to be written is not
    imported (token_logprobs), and an argument or a variable of a body is no name from outside.
    """
    assert exercise.names_used("def f(a=N):\n    b = [a for c in G.d]\n    return math.exp(b)") == {"N", "G", "math"}
    assert imports_of(exercise.exercise(["dpo_loss", "LoRALinear", "token_logprobs", "sft_loss"])) == """\
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.logprobs import check_sequences, check_shapes, denominator, fp32, masked, shift
from minillm.lora import check_rank
from minillm.losses import _implicit_rewards"""
    wanted = {name: ("minillm.verify", name) for name in (f"a_long_name_of_number_{i}" for i in range(10, 15))}
    assert exercise.import_lines(wanted | {"np": ("numpy", None), "os": ("os", None)}) == """\
import os

import numpy as np

from minillm.verify import (a_long_name_of_number_10, a_long_name_of_number_11, a_long_name_of_number_12,
                            a_long_name_of_number_13, a_long_name_of_number_14)"""


def test_every_exercise_is_a_file_of_python_with_no_import_too_many():
    """All public functions and classes of minillm, not those of the path alone."""
    for name, (path, node) in exercise.definitions().items():
        text = exercise.exercise([name])
        assert max(map(len, text.splitlines())) <= 120
        exec(compile(text, "mine.py", "exec"), {"__name__": "mine"})
        body = ast.dump(node)
        for statement in ast.parse(imports_of(text)).body:
            for alias in statement.names:
                assert f"Name(id='{(alias.asname or alias.name).split('.')[0]}'" in body, (name, alias.name)


def test_what_another_docstring_explains_is_printed_too():
    """IPO's says "as in dpo_loss", which the file does not hold; where it does, once is enough."""
    line = "# dpo_loss:\n#\n# Bradley-Terry on the implicit reward"
    assert exercise.exercise(["ipo_loss"]).count(line) == 1
    assert exercise.exercise(["ipo_loss", "dpo_loss"]).count(line) == 0
    assert "as in" not in exercise.exercise(["kl_k3"]).split("def kl_k3")[1]


def test_what_is_written_takes_the_place_of_the_real_one_everywhere(tmp_path):
    """A function that a script imported by name, one that three files hold, a class that another one is built on, and
    one that the model uses by its name. Afterwards everything is as it was.
    """
    names = ["dpo_loss", "token_logprobs", "LoRALinear", "RMSNorm"]
    path = tmp_path / "mine.py"
    path.write_text(exercise.exercise(names), encoding="utf-8")
    real = train_dpo.dpo_loss, losses.token_logprobs, lora.LoRALinear, model.RMSNorm
    undo = exercise.use(path)
    try:
        mine = losses.dpo_loss, losses.token_logprobs, lora.LoRALinear, model.RMSNorm
        assert [part.__module__ for part in mine] == ["mine"] * 4
        assert train_dpo.dpo_loss is losses.dpo_loss
        assert lora.DoRALinear.__mro__[1] is lora.LoRALinear
        with pytest.raises(NotImplementedError, match="dpo_loss is yours"):
            train_dpo.dpo_loss(*[None] * 4)
        norm = model.Block(model.ModelConfig(), 0).input_layernorm
        with pytest.raises(NotImplementedError):
            norm(None)
    finally:
        exercise.restore(undo)
    assert real == (train_dpo.dpo_loss, losses.token_logprobs, lora.LoRALinear, model.RMSNorm)
    assert lora.DoRALinear.__mro__[1] is real[2]


def test_the_command_knows_what_it_can_give():
    path = exercise.main([])
    assert [line.split()[1] for line in path.splitlines()[1:]] == exercise.PATH
    with pytest.raises(SystemExit, match="minillm has no public gea; the path is token_logprobs sft_loss"):
        exercise.main(["gae", "gea"])
    assert exercise.main(["pack"]).count("raise NotImplementedError") == 1  # any public function will do
    assert exercise.main(["--help"]) == exercise.__doc__
    for wrong in (["--broken"], ["--broken", "8"], ["--broken", "two"], ["--broken", "1", "2"]):
        with pytest.raises(SystemExit, match="^--broken takes one number: 1 2 3 4 5 6 7$"):
            exercise.main(wrong)


# ---------------------------------------------------------------- a loss of one's own

@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_recipes_for_a_loss_of_ones_own_work_as_they_stand(name):
    """RLOO: rewards 1, 0, 0 and two tokens an answer; SimPO: averages -1 and -1.5, beta 2, target 1/2. The other blocks
    go into train_grpo.py and train_dpo.py, which have the lines that they stand beside.
    """
    text = (exercise.ROOT / "minillm" / name).read_text(encoding="utf-8")
    rloo, advantage, rloo_call, simpo, simpo_call = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    here = dict(vars(losses))
    exec(rloo + simpo, here)
    logprobs = torch.full((3, 2), -1.0, requires_grad=True)
    scope = {"cfg": types.SimpleNamespace(loss="rloo", group_size=3), "rewards": torch.tensor([[1.0, 0.0, 0.0]])}
    exec(textwrap.dedent(advantage).replace("elif", "if"), scope)
    close(scope["advantages"], [[1.0, -0.5, -0.5]])
    loss, _ = here["rloo_loss"](logprobs, logprobs.detach(), None, scope["advantages"][0],
                                torch.ones(3, 2, dtype=torch.bool))
    loss.backward()
    close(logprobs.grad, [[-1 / 3] * 2, [1 / 6] * 2, [1 / 6] * 2])
    close(here["simpo_loss"](torch.tensor([-1.0]), torch.tensor([-1.5]))[0], 0.4740770)
    grpo, dpo = ((exercise.ROOT / script).read_text(encoding="utf-8") for script in ("train_grpo.py", "train_dpo.py"))
    assert 'choices=["grpo", "dr_grpo", "dapo"]' in grpo and 'if cfg.loss == "dr_grpo":\n            adv' in grpo
    assert rloo_call.startswith(re.search(r'\n( +elif cfg.loss == ")dapo', grpo)[1])
    assert 'choices=["dpo", "ipo"]' in dpo and 'average = cfg.loss == "ipo"' in dpo
    assert simpo_call.startswith(re.search(r'\n( +)if cfg.loss == "dpo"', dpo)[1] + "elif")


# ---------------------------------------------------------------- scripts with a mistake

@pytest.fixture
def run(tmp_path, monkeypatch, tokenizer):  # noqa: F811
    """run(number, flags...) -> (the logged training steps, the numbers before training) of the broken script."""
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: False)
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", small_model(tokenizer), tokenizer)
    save_reward_model(tmp_path / "reward", RewardModel.from_lm(small_model(tokenizer, seed=1)), tokenizer)
    (tmp_path / "mine.py").write_text(REWARDS, encoding="utf-8")
    questions = "abcdefghijkl"
    write(tmp_path / "sft.jsonl", [{"conversations": [turn("user", c * 9), turn("assistant", c)]} for c in questions])
    write(tmp_path / "pairs.jsonl", [{"prompt": c, "chosen": c, "rejected": c * 2} for c in questions])
    write(tmp_path / "prompts.jsonl", [ask(c + "?") for c in questions])
    write(tmp_path / "held_out.jsonl", [ask("x!")])

    def go(number, *flags):
        name, source = exercise.broken(number)
        script = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, script)  # dataclasses look their module up
        exec(compile(source, name, "exec"), script.__dict__)
        argv = ["--model", "model", "--out", "out", "--device", "cpu", "--log_every", 1, "--warmup_steps", 0, *flags]
        script.main(parse_config(script.Config, "", [str(flag) for flag in argv]))
        lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        before = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))["before"]
        return [line for line in lines if "lr" in line], before

    return go


SFT = ["--data", "sft.jsonl", "--eval_data", "sft.jsonl", "--optimizer", "adamw", "--batch_size", 8, "--max_steps", 1,
       "--max_seq_len", 64]
PAIRS = ["--data", "pairs.jsonl", "--eval_data", "pairs.jsonl", "--max_seq_len", 64, "--beta", 1]
RL = ["--data", "prompts.jsonl", "--eval_data", "held_out.jsonl", "--reward", "mine.py:letters", "--max_new_tokens", 4,
      "--max_seq_len", 64, "--num_minibatches", 1, "--lr", 3e-3, "--missing_eos_penalty", 0]


@pytest.mark.parametrize("number, flags", [
    (1, ""), (2, " --grad_accum 4"), (3, ""), (4, ""), (5, " --num_minibatches 1 --temperature 0.5"),
    (6, " --num_minibatches 1"), (7, "")])
def test_every_patch_still_applies(number, flags):
    """Found where the lines are now; and what comes out is Python, with the command at its top. With the default flags
    the second and the fifth mistake would change nothing: they need several micro-batches, and a temperature.
    """
    script, source = exercise.broken(number)
    command, rest = source.split("\n", 1)
    assert command == f"# python broken.py --max_steps 2 --log_every 1{flags}"
    assert rest != (exercise.ROOT / script).read_text(encoding="utf-8")
    compile(source, script, "exec")
    assert exercise.main(["--broken", str(number)]) == source


def test_1_the_loss_betrays_it(run):
    """The same data for training and evaluation: before the first update `loss` must be `val_loss`. Supervising every
    token, questions and all, and dividing by the number of those that should have been, makes it several
    times as large.
    """
    lines, before = run(1, *SFT)
    assert lines[0]["loss"] > 2 * before["val_loss"]


def test_2_the_loss_betrays_it_with_more_micro_batches(run):
    """Each micro-batch is divided by its own count: four of them, four times the loss (and the gradient)."""
    lines, before = run(2, *SFT, "--batch_size", 1, "--grad_accum", 4)
    assert 3 * before["val_loss"] < lines[0]["loss"] < 5 * before["val_loss"]


def test_3_the_first_loss_betrays_it(run):
    """Before the first update the policy is the reference: ln 2 and margin 0. With the reference's two sides exchanged
    the margin starts elsewhere.
    """
    lines, _ = run(3, *PAIRS, "--max_steps", 1)
    assert abs(lines[0]["margin"]) > 0.1 and abs(lines[0]["loss"] - LN2) > 0.01


def test_4_the_margin_betrays_it(run):
    """A reference that follows the policy: ln 2, margin 0 and accuracy 0 for ever, while the held-out margin moves."""
    lines, _ = run(4, *PAIRS, "--max_steps", 3, "--lr", 1e-2)
    assert all(line["margin"] == 0 and abs(line["loss"] - LN2) < 1e-6 for line in lines)


def test_5_the_clip_fraction_betrays_it(run):
    """Sampled at temperature 0.5 and trained at 1: in the first optimizer step of a rollout `approx_kl` and
    `clip_fraction` must be 0, and are not. (The mean of the ratios alone may well be near 1.)
    """
    lines, _ = run(5, *RL, "--max_steps", 1, "--batch_size", 4, "--temperature", 0.5)
    assert lines[0]["approx_kl"] > 0.01 and lines[0]["clip_fraction"] > 0.1


def test_6_the_kl_betrays_it(run):
    """The reference is the policy itself: `kl` stays 0 while the policy moves."""
    lines, _ = run(6, *RL, "--max_steps", 3, "--batch_size", 4)
    assert [line["kl"] for line in lines] == [0.0, 0.0, 0.0]


def test_7_the_second_pass_betrays_it(run):
    """The old log-probabilities follow the policy: also after updates the ratio is 1 and nothing is ever clipped."""
    lines, _ = run(7, *RL, "--reward_model", "reward", "--max_steps", 2, "--batch_size", 8, "--update_epochs", 3,
                   "--target_kl", 0)
    assert all(line["ratio_mean"] == 1 and line["approx_kl"] == line["clip_fraction"] == 0 for line in lines)


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_2_the_loss_betrays_it_with_more_micro_batches: `"--grad_accum", 4` -> `"--grad_accum", 1`. Who notices this
#    mistake now?
# 2. test_5_the_clip_fraction_betrays_it: `"--temperature", 0.5` -> `"--temperature", 1`. And this one?
