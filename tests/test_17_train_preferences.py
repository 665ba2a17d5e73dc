"""Chapter 17: train_reward.py and train_dpo.py as they run: what they start from, what they log, what they leave.

After this chapter you know the first line that a right DPO run logs, and what must not change when it is resumed.
"""

import json
import math
import signal

import pytest
import torch

import eval as evaluation
import train_dpo
import train_reward
from minillm import logprobs, peft, runtime, token_cache
from minillm.checkpoint import load_model, save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.heads import load_reward_model
from minillm.interrupt import Interrupt
from minillm.model import CausalLM, ModelConfig
from minillm.preferences import load_pairs, pair_logprobs, reference_logprobs
from minillm.run import Interrupted
from minillm.safetensors import load_safetensors
from minillm.tokenizer import train_tokenizer
from tests.helpers import close, forbid_waiting_in_updates

LN2 = 0.6931471805599453
THINGS = "abcdefghijklmnopqrstuvwxyzABCDEF"


@pytest.fixture(autouse=True)
def own_cache_and_float32(tmp_path, monkeypatch):
    """bf16, which the scripts use where a CPU has it, would hide the digits that are compared here."""
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["It is red. It is blue."] * 3, 280)


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    save_model(tmp_path / "model", small_model(tokenizer), tokenizer)
    return tmp_path / "model"


def small_model(tokenizer, seed=0):
    """Random, with weights larger than usual: it tells one prompt from another, as a trained model does."""
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128))
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
    """run(script, out, flags...) -> the script's result, in this process. The held-out pairs are the training pairs."""
    path = write(tmp_path / "pairs.jsonl", some_pairs())

    def go(script, out, *flags):
        argv = ["--model", model_folder, "--data", path, "--eval_data", path, "--out", tmp_path / out,
                "--device", "cpu", "--log_every", 1, *flags]
        return script.main(parse_config(script.Config, "", [str(x) for x in argv]))

    return go


def logged(folder) -> list:
    """The log, without what a clock measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- does it learn

def test_a_reward_model_trained_with_a_lora_is_saved_merged(tmp_path, run, monkeypatch):
    """In float32 OUT scores as the model with its LoRA does. (In bf16 the held base is rounded, OUT is not.)"""
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: False)
    trained, update = [], train_reward.update
    monkeypatch.setattr(train_reward, "update", lambda model, *rest: (update(model, *rest), trained.append(model)))
    run(train_reward, "lora", "--max_steps", 3, "--peft", "lora", "--lr", 1e-2)
    tokens, lengths = torch.tensor([[5, 9, 30, 41], [7, 8, 9, 0]]), torch.tensor([4, 3])
    with torch.no_grad():
        scores = trained[-1](tokens, lengths)
        assert close(load_reward_model(tmp_path / "lora")(tokens, lengths), scores) and scores[0] != scores[1]
    assert not (tmp_path / "lora" / "adapter_config.json").exists()


@pytest.mark.slow
def test_a_reward_model_learns_32_pairs_by_heart(tmp_path, run):
    result = run(train_reward, "reward", "--max_steps", 60, "--batch_size", 16, "--lr", 3e-3)
    assert result["preference_accuracy"] > 0.95 and set(result["accuracy_by_kind"]) == {"even", "odd"}
    assert result["margin"] > 1
    close(result["chosen_rewards"] - result["rejected_rewards"], result["margin"])
    found = summary(tmp_path / "reward")
    assert 0.2 < found["before"]["preference_accuracy"] < 0.8 and found["data"]["documents"] == 32
    assert {"loss", "reward_loss", "accuracy", "margin", "sft_loss", "lr"} <= set(logged(tmp_path / "reward")[0])
    load_reward_model(tmp_path / "reward")


@pytest.mark.parametrize("flags", [[], ["--loss", "ipo", "--beta", 0.2],
                                   ["--peft", "lora", "--rank", 16, "--lr", 1e-2]], ids=["dpo", "ipo", "lora"])
@pytest.mark.slow
def test_dpo_learns_32_pairs_by_heart(run, flags):
    """Pitfall 8."""
    result = run(train_dpo, "dpo", "--max_steps", 30, "--batch_size", 16, "--beta", 0.1, "--lr", 3e-3, *flags)
    assert result["preference_accuracy"] > 0.95
    assert result["chosen_rewards"] > result["rejected_rewards"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", [train_reward, train_dpo])
def test_no_step_waits_for_the_gpu(monkeypatch, run, script):
    """Except where a line is logged: after steps 1, 3 and 6."""
    happened = forbid_waiting_in_updates(monkeypatch, runtime, "sum_tensor_over_processes")
    run(script, "out", "--device", "cuda", "--no-compile", "--max_steps", 6, "--log_every", 3)
    assert happened == [name for updates in (1, 2, 3)
                        for name in ["sum_gradients"] * updates + ["sum_tensor_over_processes"]]


# ---------------------------------------------------------------- where it starts, what it says

@pytest.mark.parametrize("flags", [[], ["--peft", "lora"]], ids=["dpo", "lora"])
def test_dpo_starts_at_ln_2(tmp_path, run, flags):
    """Before its first update the policy is the reference: no reward, no margin, loss ln 2, and every pair is a tie.
    The first step is logged, whatever --log_every says, so every reader can check it.
    """
    run(train_dpo, "dpo", "--max_steps", 3, "--batch_size", 32, "--beta", 0.1, "--lr", 1e-3, "--log_every", 10, *flags)
    first, last = logged(tmp_path / "dpo")
    assert (first["step"], last["step"]) == (1, 3)
    close(first["loss"], LN2)
    assert [first["margin"], first["chosen_rewards"], first["rejected_rewards"], first["accuracy"]] == [0, 0, 0, 0]
    assert last["loss"] < LN2 and last["margin"] > 0
    assert {"loss", "accuracy", "margin", "chosen_rewards", "rejected_rewards", "chosen_logprobs", "lr"} <= set(first)
    assert summary(tmp_path / "dpo")["before"]["preference_accuracy"] == 0.5


@pytest.mark.parametrize("flags", [[], ["--ref_model", "model"]], ids=["dpo", "ref_model"])
def test_the_first_margin_is_0_to_the_last_bit(tmp_path, run, model_folder, flags):
    """Answers of very different lengths, in batches that shuffling has put together, two to a step. The classic mistake
    scores the reference in other batches: with other padding it rounds otherwise, and a margin of 1e-8 is left.
    """
    long = [{**pair, side: [pair[side][0], {"role": "assistant", "content": "It is red. " * (1 + i * i % 13)}]}
            for i, pair in enumerate(some_pairs()) for side in (("chosen", "rejected")[i % 2],)]
    flags = ["--data", write(tmp_path / "long.jsonl", long), "--batch_size", 5, "--grad_accum", 2, "--max_steps", 1,
             *[model_folder if flag == "model" else flag for flag in flags]]
    run(train_dpo, "right", *flags)
    first = logged(tmp_path / "right")[0]
    assert [first["margin"], first["chosen_rewards"], first["rejected_rewards"], first["accuracy"]] == [0, 0, 0, 0]


def test_ipo_starts_at_its_targets_square(tmp_path, run):
    """h = 0: the loss is (1 / (2 x 0.25)) ** 2 = 4."""
    run(train_dpo, "ipo", "--max_steps", 1, "--loss", "ipo", "--beta", 0.25)
    close(logged(tmp_path / "ipo")[0]["loss"], 4.0)


def test_label_smoothing_reaches_the_loss(tmp_path, run):
    """With half the labels wrong there is nothing to learn: the gradient at the start is 0, and ln 2 stays."""
    run(train_dpo, "dpo", "--max_steps", 4, "--label_smoothing", 0.5, "--lr", 1e-3)
    close([line["loss"] for line in logged(tmp_path / "dpo")], [LN2] * 4)


def test_a_margin_in_the_data_reaches_the_reward_loss(tmp_path, run):
    """A chosen answer that should win by 50 costs about 50 at the start, not ln 2."""
    path = write(tmp_path / "margins.jsonl", [{**r, "margin": 50} for r in some_pairs(8)])
    run(train_reward, "plain", "--max_steps", 1)
    run(train_reward, "margin", "--max_steps", 1, "--data", path)
    assert abs(logged(tmp_path / "plain")[0]["reward_loss"] - LN2) < 0.3
    assert abs(logged(tmp_path / "margin")[0]["reward_loss"] - 50) < 1


@pytest.mark.parametrize("script", [train_reward, train_dpo])
def test_micro_batches_add_up_to_the_batch(tmp_path, run, script):
    """Pitfall 3. 8 pairs at once, or 3 + 3 + 2 in three ragged micro-batches of one step: the same loss and update. The
    mean of the three means would give the pairs of the last one half as much weight again.
    """
    path = write(tmp_path / "eight.jsonl", some_pairs(8))
    for out, size, parts in (("whole", 8, 1), ("parts", 3, 3)):
        run(script, out, "--data", path, "--max_steps", 1, "--batch_size", size, "--grad_accum", parts, "--lr", 1e-3,
            "--warmup_steps", 0)
    whole, parts = logged(tmp_path / "whole")[0], logged(tmp_path / "parts")[0]
    assert whole.keys() == parts.keys()
    for name in whole:
        close(parts[name], whole[name])
    a, b = (load_safetensors(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    # AdamW's first step has the size of lr whatever the gradient's: compare where a gradient is not mere rounding.
    moved = [((a[name] - b[name]).abs() > 1e-5).float().mean().item() for name in a]
    assert sum(moved) / len(moved) < 0.02


@pytest.mark.parametrize("picks", [True, False])
def test_the_sft_loss_beside_the_reward_is_that_of_the_chosen_answers(tmp_path, run, model_folder, tokenizer,
                                                                      monkeypatch, picks):
    """Logged before the first update: the mean of -log p over the tokens of all chosen answers, and of no rejected one,
    whether a mask picks them or, as on a GPU, their places do. With --sft_coef 0 it is missing, and other weights are
    learned.
    """
    monkeypatch.setattr(logprobs, "_picks_rows", lambda x: picks)
    run(train_reward, "both", "--max_steps", 1, "--batch_size", 32, "--lr", 1e-3)
    run(train_reward, "alone", "--max_steps", 1, "--batch_size", 32, "--lr", 1e-3, "--sft_coef", 0)
    model, total, count = load_model(model_folder), 0.0, 0
    for record in some_pairs():
        tokens, mask = tokenizer.render(record["chosen"])
        predicted = model(torch.tensor([tokens]))[0].log_softmax(-1)
        for t in range(1, len(tokens)):
            if mask[t]:
                total, count = total - predicted[t - 1, tokens[t]].item(), count + 1
    first, alone = logged(tmp_path / "both")[0], logged(tmp_path / "alone")[0]
    close(first["sft_loss"], total / count)
    close(first["loss"], first["reward_loss"] + first["sft_loss"])
    close(alone["loss"], first["reward_loss"])
    assert "sft_loss" not in alone
    one, other = (load_safetensors(tmp_path / out / "model.safetensors") for out in ("both", "alone"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_reward_model_of_untied_weights_leaves_the_lm_head_out(tmp_path, run, tokenizer, monkeypatch):
    """The SFT loss reads the separate LM head and does not train it. The folder is that of a one-label classifier."""
    untied = CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48,
                                  tie_word_embeddings=False))
    save_model(tmp_path / "untied", untied, tokenizer)
    models, load = [], train_reward.checkpoint.load_model

    def keep(*arguments, **options):
        models.append(load(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(train_reward.checkpoint, "load_model", keep)
    run(train_reward, "reward", "--model", tmp_path / "untied", "--max_steps", 2)
    head = models[0].lm_head.weight
    assert head.grad is None and torch.equal(head, untied.lm_head.weight)
    assert not torch.equal(models[0].model.norm.weight, untied.model.norm.weight)  # while the backbone is trained
    names = load_safetensors(tmp_path / "reward" / "model.safetensors").keys()
    assert "score.weight" in names and not any("lm_head" in name for name in names)


# ---------------------------------------------------------------- LoRA

@pytest.mark.parametrize("script", [train_dpo, train_reward])
def test_what_a_lora_leaves_frozen_is_held_in_bf16(run, monkeypatch, script):
    """Where the device computes in bf16; what is trained stays float32. The flag says what is compiled."""
    class Seen(Exception):
        """That is all there is to see here."""

    def look(model, asked):
        layer, trained = model.model.layers[0].mlp.up_proj, {p.dtype for p in model.parameters() if p.requires_grad}
        raise Seen(layer.base.weight.dtype, trained, asked)

    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("minillm.runtime.compile_backbone", look)
    with pytest.raises(Seen) as seen:
        run(script, "out", "--peft", "lora", "--no-compile")
    assert seen.value.args == (torch.bfloat16, {torch.float32}, False)


def test_dpo_with_a_lora_writes_an_adapter_that_is_all_it_changed(tmp_path, run, model_folder, tokenizer):
    """Base and adapter, loaded anew, give the margin that the run reported: neither base nor anything else moved."""
    result = run(train_dpo, "lora", "--max_steps", 5, "--batch_size", 16, "--peft", "lora", "--rank", 4, "--beta", 0.1,
                 "--lr", 1e-2)
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    path = str(tmp_path / "pairs.jsonl")
    pairs, _ = load_pairs([path], path, tokenizer, 256, 0)
    base, cpu = load_model(model_folder), torch.device("cpu")
    before = pair_logprobs(base, pairs, 8, cpu)
    after = pair_logprobs(peft.load_adapter(base, tmp_path / "lora"), pairs, 8, cpu)
    rewards = 0.1 * (after - before)  # (N, 2)
    margin = (rewards[:, 0] - rewards[:, 1]).mean()
    assert abs(margin) > 1e-4 and close(margin, result["margin"])
    peft.merge_adapter(tmp_path / "lora", tmp_path / "whole")  # for whoever trains on: GRPO, a reward model
    close(pair_logprobs(load_model(tmp_path / "whole"), pairs, 8, cpu), after)


# ---------------------------------------------------------------- stop, crash, resume

class Crash(Exception):
    pass


def stop_after(monkeypatch, step):
    """As if Ctrl-C came during that step."""
    steps = iter(range(1, 1000))
    monkeypatch.setattr(Interrupt, "requested", lambda self: signal.SIGINT if next(steps) == step else 0)


def crash_in(monkeypatch, step):
    """The backward pass of that step is done, its update is not."""
    clip, steps = torch.nn.utils.clip_grad_norm_, iter(range(1, 1000))

    def fail(*arguments):
        if next(steps) == step:
            raise Crash
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fail)


@pytest.mark.parametrize("interrupt, raised, at", [(stop_after, Interrupted, 5), (crash_in, Crash, 6)],
                         ids=["stopped", "killed"])
@pytest.mark.parametrize("script, flags", [(train_reward, []), (train_dpo, []), (train_dpo, ["--peft", "lora"])],
                         ids=["reward", "dpo", "lora"])
@pytest.mark.slow
def test_resume_is_exact(tmp_path, run, monkeypatch, script, flags, interrupt, raised, at):
    """Pitfall 4. Stopped after step 5 of 8, or killed in step 6 after the checkpoint of step 4, in the middle of an
    epoch of 3 batches: weights, optimizer and log end bit for bit as if nothing had happened.
    """
    flags = [*flags, "--max_steps", 8, "--batch_size", 12, "--save_every", 4, "--eval_every", 2, "--lr", 1e-3]
    expected = run(script, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(raised):
        interrupt(patch, at)
        run(script, "parts", *flags)
    found = run(script, "parts", *flags, "--resume")

    a, b = (torch.load(tmp_path / out / "training_state.pt", weights_only=True) for out in ("whole", "parts"))
    for one, other in zip(a["models"], b["models"], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for one, other in zip(a["optimizers"], b["optimizers"], strict=True):
        assert all(torch.equal(s[k], other["state"][i][k]) for i, s in one["state"].items() for k in s)
    assert a["loader"] == b["loader"] and a["step"] == b["step"] == 8
    del expected["seconds"], found["seconds"]
    assert found == expected
    assert [line for line in logged(tmp_path / "parts") if not line.get("resumed")] == logged(tmp_path / "whole")
    assert run(script, "parts", *flags, "--resume") == expected, "finished: nothing is done"


def test_a_resumed_run_keeps_its_reference(tmp_path, run, monkeypatch):
    """It is the model before training, and not the policy of step 2, also when the token cache is lost."""
    flags = ["--max_steps", 4, "--batch_size", 32, "--lr", 1e-3]
    run(train_dpo, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        stop_after(patch, 2)
        run(train_dpo, "parts", *flags)
    assert stopped.value.code == 130
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "another cache")
    run(train_dpo, "parts", *flags, "--resume")
    margins = [[line["margin"] for line in logged(tmp_path / out) if "margin" in line] for out in ("whole", "parts")]
    assert margins[0] == margins[1] and margins[0][-1] > 0


def test_the_reference_is_asked_once(tmp_path, run, monkeypatch):
    """It never changes: it sees the 8 training pairs and the 32 held-out ones at the start. What follows are the
    policy's evaluations before and after training.
    """
    asked = []

    def counting(model, pairs, *options):
        asked.append(len(pairs))
        return pair_logprobs(model, pairs, *options)

    def counting_reference(model, loader, *options):
        asked.append(len(loader.dataset))
        return reference_logprobs(model, loader, *options)

    monkeypatch.setattr(train_dpo, "pair_logprobs", counting)
    monkeypatch.setattr(train_dpo, "reference_logprobs", counting_reference)
    run(train_dpo, "dpo", "--data", write(tmp_path / "eight.jsonl", some_pairs(8)), "--max_steps", 5)
    assert asked == [8, 32, 32, 32]


# ---------------------------------------------------------------- other data, other references, mistakes

@pytest.mark.parametrize("script", [train_dpo, train_reward])
@pytest.mark.slow
def test_minimind_style_conversations_train_unchanged(tmp_path, run, script):
    """Several turns, keys of their own, no held-out file: 5 % are held out."""
    def turn(role, content):
        return {"role": role, "content": content}

    lines = []
    for i in range(40):
        before = [turn("user", f"hello {i}")]
        if i % 2:
            before = [turn("user", f"你好 {i}"), turn("assistant", "你好！"), turn("user", "再见吗？")]
        lines.append({"chosen": before + [turn("assistant", "好的。")],
                      "rejected": before + [turn("assistant", "不。")], "id": i})
    path = write(tmp_path / "dpo.jsonl", lines)
    result = run(script, "out", "--data", path, "--eval_data", "", "--max_steps", 10, "--lr", 1e-3)
    assert result["preference_accuracy"] == 1.0 and result["accuracy_by_kind"] == {}
    assert summary(tmp_path / "out")["data"]["documents"] == 40


@pytest.mark.parametrize("script", [train_dpo, train_reward])
def test_pairs_with_their_prompt_beside_them_train_the_same(tmp_path, run, script):
    """{"prompt", "chosen", "rejected"} with the messages in three places, and the same pairs as whole conversations."""
    split = [{"prompt": pair["chosen"][:-1], "chosen": pair["chosen"][-1:], "rejected": pair["rejected"][-1:],
              "kind": pair["kind"]} for pair in some_pairs()]
    flags = ["--max_steps", 2, "--lr", 1e-3]
    run(script, "whole", *flags)
    run(script, "split", *flags, "--data", write(tmp_path / "split.jsonl", split))
    assert logged(tmp_path / "whole") == logged(tmp_path / "split")


def test_another_reference(tmp_path, run, tokenizer):
    """Against a reference that is not the policy the loss does not begin at ln 2."""
    save_model(tmp_path / "other", small_model(tokenizer, seed=1), tokenizer)
    run(train_dpo, "dpo", "--max_steps", 1, "--ref_model", tmp_path / "other")
    assert abs(logged(tmp_path / "dpo")[0]["loss"] - LN2) > 1e-4


def test_a_reference_of_its_own_is_held_in_bf16_and_scores_as_the_same_model_does(run, tmp_path, model_folder,
                                                                                  monkeypatch):
    """Where the device computes in bf16. The same folder once more, as the reference: the first margin is exactly 0."""
    monkeypatch.setattr("minillm.runtime.cpu_has_bf16", lambda: True)
    dtypes = []

    def spy(model, *rest):
        dtypes.append(model.model.layers[0].mlp.up_proj.weight.dtype)
        return reference_logprobs(model, *rest)

    monkeypatch.setattr(train_dpo, "reference_logprobs", spy)
    run(train_dpo, "dpo", "--max_steps", 1, "--ref_model", model_folder)
    first = logged(tmp_path / "dpo")[0]
    assert dtypes == [torch.bfloat16] and (first["margin"], first["chosen_rewards"]) == (0, 0)


def test_before_and_after_on_questions(tmp_path, run, monkeypatch):
    """With the embedded data: length, correctness and variety of sampled answers are in the summary, so reward hacking
    shows.
    """
    questions = [{"conversations": [{"role": "user", "content": f"thing {i}?"}], "answer": "red", "task": "fact"}
                 for i in range(6)]
    monkeypatch.setattr(train_dpo, "QUESTIONS", write(tmp_path / "q.jsonl", questions))
    monkeypatch.setattr(train_dpo, "EVAL_DATA", str(tmp_path / "pairs.jsonl"))
    run(train_dpo, "dpo", "--max_steps", 1)
    found = summary(tmp_path / "dpo")
    for part in (found["before"], found["after"]):
        assert {"sampled_gold_reward", "sampled_accuracy", "sampled_reply_tokens", "sampled_stopped"} <= set(part)
        assert {"gold_reward", "accuracy", "accuracy_by_task", "reply_tokens"} <= set(part)
        assert 0 <= part["sampled_stopped"] <= 1 and math.isfinite(part["sampled_reply_tokens"])


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
        refused("cache: is a folder; give the files in it", script, "--data", tmp_path / "cache")
        refused("nothing to train on .*32 pairs whose prompt leaves no room", script, "--max_seq_len", 8)
        monkeypatch.chdir(tmp_path)
        refused("out/sft is not there yet: run python train_sft.py first", script, "--model", "out/sft")


# ---------------------------------------------------------------- eval.py

def evaluate(*flags) -> dict:
    argv = [str(flag) for flag in ("--device", "cpu", *flags)]
    return evaluation.main(parse_config(evaluation.Config, "", argv))


@pytest.mark.parametrize("script, train_flags, is_policy", [(train_reward, [], False), (train_dpo, ["--beta", 5], True),
                                                            (train_dpo, ["--beta", 5, "--peft", "lora"], True)],
                         ids=["reward", "dpo", "lora"])
def test_evaluation_ranks_pairs(tmp_path, run, model_folder, script, train_flags, is_policy):
    """eval.py finds what the run reported: of a reward model by its scores, of a policy against its reference."""
    expected = run(script, "out", "--max_steps", 8, "--lr", 3e-3, *train_flags)
    found = evaluate("--model", tmp_path / "out", "--data", tmp_path / "pairs.jsonl", "--json", tmp_path / "x.json",
                     *(["--ref", model_folder] if is_policy else []))
    written = json.loads((tmp_path / "x.json").read_text())
    for name in ("preference_accuracy", "accuracy_by_kind"):
        assert found[name] == expected[name] == written[name]
    assert expected["preference_accuracy"] > 0.5


def test_evaluation_says_what_pairs_need(tmp_path, run, model_folder):
    run(train_reward, "reward", "--max_steps", 1)
    with pytest.raises(UserError, match="pairs.jsonl holds pairs: give --ref"):
        evaluate("--model", model_folder, "--data", tmp_path / "pairs.jsonl")
    for flags in (["--chat"], ["--reward_model", tmp_path / "reward"]):
        with pytest.raises(UserError, match="is a reward model: it scores answers and gives none"):
            evaluate("--model", tmp_path / "reward", *flags)
    with pytest.raises(UserError, match="--reward_model scores the replies to questions, and .*pairs.jsonl holds none"):
        evaluate("--model", model_folder, "--ref", model_folder, "--data", tmp_path / "pairs.jsonl",
                 "--reward_model", tmp_path / "reward")


def test_evaluation_scores_replies_with_a_reward_model(tmp_path, run, model_folder):
    run(train_reward, "reward", "--max_steps", 1)
    questions = [{"conversations": [{"role": "user", "content": f"{c}?"}]} for c in "abc"]
    found = evaluate("--model", model_folder, "--reward_model", tmp_path / "reward", "--max_new_tokens", 5,
                     "--data", write(tmp_path / "q.jsonl", questions))
    assert math.isfinite(found["reward"]) and found["reward"] != 0


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_ipo_starts_at_its_targets_square: `"--beta", 0.25` -> `"--beta", 0.5`. What is the first loss?
# 2. test_label_smoothing_reaches_the_loss: `"--label_smoothing", 0.5` -> `"--label_smoothing", 0.25`. Which of the
#    four losses is still ln 2?
