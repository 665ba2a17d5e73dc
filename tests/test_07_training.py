"""Chapter 7. The training loop: one denominator per step, a run that can be killed at any moment, and mistakes told in one line.

The stages run in-process (`main(Config(...))`) on a few sentences and with the tokenizer of the data chapter (one byte,
one token). Where bits are compared, PyTorch uses one thread: another count may add the same numbers in another order.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train_pretrain
import train_sft
from minillm import checkpoint, data, metrics, model, runtime
from minillm.config import check_ranges, flag, parse_config
from minillm.data import PackedLoader, load_dataset
from minillm.errors import UserError
from minillm.losses import sft_loss, sft_loss_from_hidden
from minillm.model import CausalLM, preset_config
from minillm.optim import make_optimizers, schedule, set_lr
from minillm.tokenizer import Tokenizer, train_tokenizer
from tests.helpers import close, forbid_waiting_in_updates

ROOT = Path(__file__).parent.parent
BYTES = train_tokenizer(["a"], 259)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in, one thread, float32, a narrow model, and the signals as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(runtime, "autocast", lambda device: contextlib.nullcontext())
    monkeypatch.setitem(model.PRESETS, "tiny", (32, 2, 2, 1, 16, 64))
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    BYTES.save("tokenizer.json")
    write_data(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)
    for name, handler in handlers.items():
        signal.signal(name, handler)


def write_data(folder):
    """45 conversations of ragged lengths, and 45 texts."""
    words = "one two three four five six seven eight nine".split()
    with open(folder / "sft.jsonl", "w", encoding="utf-8") as chats, open(folder / "text.jsonl", "w", encoding="utf-8") as texts:
        for i in range(45):
            question, answer = " ".join(words[:i % 4 + 1]), " ".join(words[i % 5:i % 7 + 3])
            chats.write(json.dumps({"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}) + "\n")
            texts.write(json.dumps({"text": f"{i} {question} {answer}."}) + "\n")


def sft(**changes):
    return train_sft.Config(**{**dict(data=["sft.jsonl"], tokenizer="tokenizer.json", out="out", max_seq_len=96, batch_size=4, max_steps=10,
                                      warmup_steps=2, save_every=4, log_every=3, eval_every=100, device="cpu"), **changes})


def pretrain(**changes):
    return train_pretrain.Config(**{**vars(sft()), "data": ["text.jsonl"], **changes})


def log(out="out"):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def one_line(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# ------------------------------------------------------------------------------------ schedule and groups

def test_schedule_worked_example():
    """Four steps of warm-up: 1/4, 2/4, 3/4, 1. Then a cosine from 1 down to 0.1 over the other eight: after half of them
    (1 + 0.1) / 2, after a quarter 0.1 + 0.9 (1 + cos 45 degrees) / 2 = 0.868198. Beyond the end it stays at 0.1."""
    factors = [schedule(step, 12, 4) for step in (0, 1, 2, 3, 4, 6, 8, 12, 99)]
    assert close(factors, [0.25, 0.5, 0.75, 1.0, 1.0, 0.868198, 0.55, 0.1, 0.1])
    assert schedule(0, 1, 0) == 1.0  # a run of one step and no warm-up


@pytest.mark.parametrize("muon", [False, True])
def test_every_trained_parameter_is_in_one_group(muon):
    """Weight decay and Muon are for the hidden matrices: four of attention and three of the MLP in each of two layers.
    Norms, and the embedding with its tied head, are AdamW's, without decay. A frozen parameter is in no group."""
    lm = CausalLM(preset_config("tiny", 259))
    lm.model.norm.weight.requires_grad_(False)
    optimizers = make_optimizers(lm, 0.1, weight_decay=0.3, muon=muon)
    names = {id(p): n for n, p in lm.named_parameters()}
    groups = [(type(o).__name__, g["weight_decay"], sorted(names[id(p)] for p in g["params"])) for o in optimizers for g in o.param_groups]
    matrices, others = groups
    assert matrices[:2] == ("Muon" if muon else "AdamW", 0.3) and others[:2] == ("AdamW", 0.0)
    assert len(matrices[2]) == 14 and all("_proj" in name for name in matrices[2])
    assert len(others[2]) == 9 and "model.embed_tokens.weight" in others[2] and "model.norm.weight" not in others[2]
    set_lr(optimizers, 0.7)
    assert all(g["lr"] == 0.7 for o in optimizers for g in o.param_groups)


# ------------------------------------------------------------------------------------ one denominator

def gradients(monkeypatch, cfg):
    """The gradient of each step of a run whose learning rate is 0."""
    recorded = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_",
                      lambda parameters, norm: recorded.append(torch.cat([p.grad.flatten() for p in parameters])))
        train_sft.main(replace(cfg, lr=0.0))
    return recorded


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what PyTorch loads to compile says so of itself
@pytest.mark.parametrize("triton", [True, False])
def test_compiled_is_on_cuda_and_where_triton_is(monkeypatch, triton):
    """PyTorch for Windows has CUDA but no Triton: there the same command trains uncompiled, instead of failing."""
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: object() if triton and name == "triton" else None)
    model = torch.nn.Linear(1, 1)
    assert (runtime.maybe_compile(model, True, torch.device("cuda")) is not model) == triton
    assert runtime.maybe_compile(model, False, torch.device("cuda")) is runtime.maybe_compile(model, True, torch.device("cpu")) is model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_no_step_waits_for_the_gpu(monkeypatch, optimizer):
    """But where a line is logged, the program is ahead of the device: no copy of a batch, no count of tokens holds it up."""
    happened = forbid_waiting_in_updates(monkeypatch, runtime, "finite_mean")
    train_sft.main(sft(device="cuda", compile=False, optimizer=optimizer, log_every=5, save_every=100))
    assert happened == (["sum_gradients"] * 5 + ["finite_mean"]) * 2


def test_micro_batches_change_no_gradient(monkeypatch):
    """Pitfall 3. 8 x 1, 2 x 4 and 4 x 2 rows give the gradient of 1 x 8, although the rows hold different numbers of
    trained tokens."""
    whole, = gradients(monkeypatch, sft(batch_size=8, max_steps=1))
    assert whole.norm() > 0.1
    for batch_size, grad_accum in ((1, 8), (2, 4), (4, 2)):
        parts, = gradients(monkeypatch, sft(batch_size=batch_size, grad_accum=grad_accum, max_steps=1))
        assert close(parts, whole)


def test_left_over_micro_batches_weigh_what_they_hold(monkeypatch):
    """An epoch of an odd number of rows, taken one by one, four a step: the last step of the epoch holds what is left of
    it and begins the next. Every step's gradient is the sum over its tokens by the number of its tokens.

    The classic mistake, the mean of the micro-batches' means, is another gradient.
    """
    dataset = load_dataset("chat", "sft.jsonl", BYTES, 96, say=lambda line: None)
    monkeypatch.setattr(train_sft, "load_split", lambda *arguments: (dataset, dataset))
    rows = PackedLoader(dataset, 1, 96, seed=0).batches(0)
    assert rows % 4 and rows % 2
    steps = rows // 4 + 1
    found = gradients(monkeypatch, sft(batch_size=1, grad_accum=4, max_steps=steps))

    torch.manual_seed(0)
    lm = CausalLM(preset_config("tiny", 259))
    stream = iter(PackedLoader(dataset, 1, 96, seed=0))
    for step in range(steps):
        batches = [next(stream) for _ in range(4)]
        lm.zero_grad()
        tokens, mask, doc_ids = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "loss_mask", "doc_ids"))
        logprobs = lm(tokens, doc_ids=doc_ids).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        (-logprobs[mask[:, 1:]].mean()).backward()
        assert close(found[step], torch.cat([p.grad.flatten() for p in lm.parameters()]))

    lm.zero_grad()
    for batch in batches:
        (sft_loss(lm(batch.tokens, doc_ids=batch.doc_ids), batch.tokens, batch.loss_mask) / 4).backward()
    assert not torch.allclose(found[-1], torch.cat([p.grad.flatten() for p in lm.parameters()]), atol=1e-3)


def test_the_logged_loss_is_the_mean_of_its_steps(monkeypatch):
    """Pitfall 12. Five steps of two micro-batches, logged after three and five: not the last step's loss alone, not the last
    micro-batch's, and nothing counted twice."""
    losses = iter([1.0, 2.0, 10.0, 20.0, 100.0, 200.0, 1.0, 1.0, 2.0, 2.0])  # each already divided by the step's tokens

    def loss(hidden, *rest):
        return hidden.sum() * 0 + next(losses)

    monkeypatch.setattr(train_sft, "sft_loss_from_hidden", loss)
    train_sft.main(sft(batch_size=2, grad_accum=2, max_steps=5, log_every=3))
    assert [entry["loss"] for entry in log()] == [111.0, 2.0, 4.0]  # (3 + 30 + 300) / 3; step 4, saved; step 5, the last


def test_bf16_autocast_learns_like_float32(monkeypatch):
    train_sft.main(sft(optimizer="adamw", lr=1e-3))
    exact = [entry["loss"] for entry in log()]
    monkeypatch.setattr(runtime, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    train_sft.main(sft(optimizer="adamw", lr=1e-3, out="bf16"))
    assert exact[-1] < exact[0] - 0.2
    torch.testing.assert_close([entry["loss"] for entry in log("bf16")], exact, atol=0.03, rtol=0)


# ------------------------------------------------------------------------------------ a run and its folder

def test_what_a_run_leaves(capsys):
    result = train_sft.main(sft(eval_every=5, epochs=99))
    said = capsys.readouterr()
    assert "sft.jsonl: 45 documents" in said.out and "held out for evaluation: 2 of 45 sequences" in said.out
    assert "starting from random weights, preset tiny" in said.out
    assert re.search(r"^step 10/10  loss \d\.\d+  lr .*  tokens_per_s \d+  left 0s$", said.out, re.MULTILINE)
    assert re.search(r"\| val_loss *\| *5\.\d+ *\| *[2345]\.\d+ *\|", said.out)
    assert "\r" not in said.out + said.err and "\x1b" not in said.out + said.err  # plain lines: this is no terminal
    assert sorted(os.listdir("out")) == ["config.json", "generation_config.json", "metrics.jsonl", "model.safetensors", "run_config.json",
                                         "summary.json", "tokenizer.json", "tokenizer_config.json", "training_state.pt"]
    entries = log()
    assert [entry["step"] for entry in entries] == [3, 4, 5, 6, 8, 9, 10]  # log_every 3, save_every 4, eval_every 5
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [5]
    # two steps of warm-up, then 8 of cosine: at the last step 0.1 + 0.9 (1 + cos(7/8 * 180 degrees)) / 2 = 0.134254
    assert close(entries[-1]["lr"], 0.002 * 0.134254)
    summary = json.loads(Path("out", "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 10 and summary["resumed_after"] == 0 and summary["data"]["documents"] == 45
    assert summary["data"]["sequences held out"] == 2
    assert summary["before"]["val_loss"] > summary["after"]["val_loss"] == result["val_loss"]
    assert 0 < summary["seconds"] < 60 and 10 * 4 * 96 * 0.7 < summary["tokens"] <= 10 * 4 * 96
    saved = json.loads(Path("out", "run_config.json").read_text(encoding="utf-8"))
    assert saved == {**vars(sft(eval_every=5, epochs=99))}


def test_pretraining_measures_bits_per_byte():
    """Nats per target by ln 2 and by the bytes: of a text of n bytes n + 1 targets, so the two numbers are tied."""
    result = train_pretrain.main(pretrain())
    _, held_out = data.load_split("text", ["text.jsonl"], "", BYTES, 96, 0, say=lambda line: None)
    lengths = held_out.lengths(np.arange(len(held_out)))
    bits = result["val_loss"] * (lengths - 1).sum() / 0.693147 / (lengths - 2).sum()
    torch.testing.assert_close(result["bits_per_byte"], bits, atol=1e-4, rtol=0)


def test_the_number_of_steps_follows_from_the_epochs():
    """Every row once per epoch: ceil(rows / batch) batches, two epochs, two micro-batches a step."""
    train_sft.main(sft(max_steps=0, epochs=2, grad_accum=2, batch_size=3))
    dataset, _ = data.load_split("chat", ["sft.jsonl"], "", BYTES, 96, 0, say=lambda line: None)
    rows = [sum(1 for _ in PackedLoader(dataset, 1, 96, seed=0).rows(epoch)) for epoch in (0, 1)]
    assert log()[-1]["step"] == math.ceil(sum(math.ceil(n / 3) for n in rows) / 2)


@pytest.mark.parametrize("count", [1, 2])
def test_a_handful_of_conversations_is_enough(count, capsys):
    """One (then it is also the held-out one) or two, fewer than a batch holds: the model learns the one it sees."""
    lines = Path("sft.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    Path("few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    train_sft.main(sft(data=["few.jsonl"], max_steps=20, log_every=1, lr=0.01))
    assert ("a single sequence" in capsys.readouterr().out) is (count == 1)
    losses = [entry["loss"] for entry in log()]
    assert losses[-1] < 0.5 * losses[0]


def test_sft_starts_from_pretrain_when_it_is_there(capsys):
    train_pretrain.main(pretrain(out="out/pretrain"))
    capsys.readouterr()
    seen = {}
    restore = train_sft.make_optimizers

    def look(lm, *arguments, **options):
        seen.update({name: weight.clone() for name, weight in lm.state_dict().items()})
        return restore(lm, *arguments, **options)

    train_sft.make_optimizers = look
    try:
        train_sft.main(sft(out="out/sft", tokenizer="nowhere.json"))  # not read: the model brings its own
    finally:
        train_sft.make_optimizers = restore
    assert "random" not in capsys.readouterr().out
    stored = checkpoint.load_model("out/pretrain").state_dict()
    assert seen.keys() == stored.keys() and all(torch.equal(seen[name], stored[name]) for name in stored)


def test_an_older_run_is_moved_aside(capsys):
    train_sft.main(sft(max_steps=1, seed=1))
    older = Path("out", "model.safetensors").read_bytes()
    train_sft.main(sft(max_steps=1, seed=2))
    assert "out.bak" in capsys.readouterr().out
    assert Path("out.bak", "model.safetensors").read_bytes() == older != Path("out", "model.safetensors").read_bytes()


def test_resume_of_a_finished_run_does_nothing(capsys):
    result = train_sft.main(sft())
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("out").iterdir()}
    capsys.readouterr()
    assert train_sft.main(sft(resume=True)) == {key: value for key, value in result.items() if key != "seconds"}
    assert "finished: nothing to do" in capsys.readouterr().out
    before.pop("metrics.jsonl")  # written again, with the same content
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == before[path.name] for path in Path("out").iterdir() if path.name in before)


def test_resume_of_nothing_starts_at_step_0(capsys):
    train_sft.main(sft(resume=True, max_steps=2))
    assert "starting from step 0" in capsys.readouterr().out and log()[-1]["step"] == 2


def test_resume_with_another_learning_rate_is_refused():
    train_sft.main(sft(max_steps=2))
    assert "--lr 0.5 (it was 0.002)" in one_line(train_sft.main, sft(max_steps=2, resume=True, lr=0.5))


# ------------------------------------------------------------------------------------ killed and resumed

def same(a, b) -> bool:
    """Equal to the bit, in every corner of a training state."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def steps(out):
    """The log without what a clock measured, the lines that tell of a resume, and those of a save that the other run lacks."""
    return [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in log(out) if "resumed" not in entry]


def assert_same_run(a, b):
    first, second = checkpoint.load_training_state(a), checkpoint.load_training_state(b)
    assert first["step"] == second["step"] == 10
    for key in first:
        assert same(first[key], second[key]), key
    assert Path(a, "model.safetensors").read_bytes() == Path(b, "model.safetensors").read_bytes()
    summaries = [json.loads(Path(out, "summary.json").read_text(encoding="utf-8")) for out in (a, b)]
    assert summaries[0]["after"] == summaries[1]["after"] and summaries[0]["before"] == summaries[1]["before"]


KILLED = r"""
import contextlib, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
import train_pretrain, train_sft
from minillm import checkpoint, data, model, runtime
from tests import test_07_training as tests

torch.set_num_threads(1)
data.CACHE = data.Path("cache").absolute()
runtime.autocast = lambda device: contextlib.nullcontext()
model.PRESETS["tiny"] = (32, 2, 2, 1, 16, 64)
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
save_run = checkpoint.save_run

def right_after_the_save(out, step, *rest):
    save_run(out, step, *rest)
    step == 8 and kill()

def right_before_the_save(out, step, *rest):
    step == 8 and kill()
    save_run(out, step, *rest)

def between_the_files_of_the_save(folder, *rest):
    state = checkpoint.load_training_state(folder)  # of step 8 already, beside the model folder of step 4
    state["step"] == 8 and kill()
    save_model(folder, *rest)

save_model = checkpoint.save_model
for name, cfg in tests.killed_runs().items():
    if os.fork() == 0:
        stage = train_pretrain if isinstance(cfg, train_pretrain.Config) else train_sft
        if name == "in_step_7":
            stage.schedule = lambda step, *rest: kill() if step == 6 else tests.schedule(step, *rest)
        elif name == "between_the_files_of_the_save":
            checkpoint.save_model = between_the_files_of_the_save
        else:
            checkpoint.save_run = globals()[name]
        stage.main(cfg)
        os._exit(0)
    print(name, os.wait()[1] == signal.SIGKILL, flush=True)
"""


def killed_runs():
    return {"in_step_7": sft(out="in_step_7", grad_accum=2, batch_size=2),
            "right_after_the_save": sft(out="right_after_the_save", optimizer="adamw"),
            "right_before_the_save": pretrain(out="right_before_the_save"),
            "between_the_files_of_the_save": pretrain(out="between_the_files_of_the_save", optimizer="adamw", grad_accum=3, batch_size=1)}


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process in which torch is loaded")
def test_sigkill_costs_no_bit(place, capsys):
    """Pitfall 4. Four runs of ten steps that save every four, killed at step 7 or around the save of step 8: resumed from
    step 4 or 8, they end with the weights, the optimizer, the generators and the log of a run that nothing disturbed."""
    run = subprocess.run([sys.executable, "-c", KILLED, str(ROOT)], capture_output=True, text=True, cwd=place,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.stdout.count("True") == 4, run.stdout + run.stderr
    for name, cfg in killed_runs().items():
        stage = train_pretrain if isinstance(cfg, train_pretrain.Config) else train_sft
        capsys.readouterr()
        stage.main(replace(cfg, resume=True))
        start = 4 if name in ("in_step_7", "right_before_the_save") else 8
        assert f"resuming after step {start} of 10" in capsys.readouterr().out
        assert {"step": start, "resumed": True} in log(name)
        stage.main(replace(cfg, out="undisturbed"))
        assert_same_run(name, "undisturbed")
        assert steps(name) == steps("undisturbed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_and_says_how_to_go_on(monkeypatch, capsys, number):
    """It arrives in step 6, between two saves; the step is finished, saved, and the run goes on from there to the bit."""
    def interrupting(step, *rest):
        if step == 5:
            signal.raise_signal(number)
        return schedule(step, *rest)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(train_sft, "schedule", interrupting)
        assert train_sft.main(sft()) == {"interrupted": True, "step": 6}
    assert "saved after step 6 of 10; the same command with --resume continues" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not Path("out", "summary.json").exists()
    train_sft.main(sft(resume=True))
    assert "resuming after step 6 of 10" in capsys.readouterr().out
    train_sft.main(sft(out="undisturbed"))
    assert_same_run("out", "undisturbed")


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    """But not the echo within a second: torchrun passes on a Ctrl-C that the terminal has sent to all processes already."""
    clock = iter([100.0, 100.2, 101.5])
    monkeypatch.setattr(runtime.time, "monotonic", lambda: next(clock))
    interrupt = runtime.Interrupt()
    assert not interrupt.requested()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert interrupt.requested()
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)
    interrupt.close()


# ------------------------------------------------------------------------------------ what goes wrong

def good_checkpoint():
    return checkpoint.load_training_state("out")["step"], Path("out", "model.safetensors").read_bytes()


def test_a_loss_that_is_not_a_number_stops_the_run(monkeypatch):
    """At step 6, logged at step 8 where a save is due: the save of step 4 stays, and the message names step 6."""
    calls, kept = [], []

    def loss(*arguments):
        calls.append(1)
        kept.append(good_checkpoint()) if len(calls) == 5 else None
        return sft_loss_from_hidden(*arguments) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(train_sft, "sft_loss_from_hidden", loss)
    message = one_line(train_sft.main, sft(log_every=100))
    assert message.startswith("the loss became nan at step 6; stopped, out keeps its last checkpoint")
    assert good_checkpoint() == kept[0] and kept[0][0] == 4
    assert all(math.isfinite(entry["loss"]) for entry in log())


def test_weights_that_are_not_numbers_are_never_saved(monkeypatch):
    """The loss of step 4 was fine, its gradient overflows, and step 4 is to be saved: the loss of step 5 would be too late."""
    calls = []

    def clip(parameters, norm):
        calls.append(1)
        for p in parameters if len(calls) == 4 else []:
            p.grad.fill_(math.inf)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    message = one_line(train_sft.main, sft(save_every=2, optimizer="adamw"))
    assert message.startswith("the weights became NaN or infinite by step 4; stopped, out keeps its last checkpoint")
    assert checkpoint.load_training_state("out")["step"] == 2


def test_an_absurd_learning_rate_ends_in_one_line():
    message = one_line(train_sft.main, sft(lr=1e30, optimizer="adamw", save_every=100))
    assert re.match(r"the (loss became (nan|inf) at|weights became NaN or infinite by) step \d+; stopped", message)


def test_the_step_of_a_bad_loss_is_counted_back():
    """Losses of steps 8, 9, 10, read after step 10: the second is bad. Without one their mean is 2."""
    losses = lambda *values: [torch.tensor(v) for v in values]
    assert runtime.finite_mean(losses(1.0, 2.0, 3.0), 10, "out") == 2.0
    assert "became inf at step 9" in one_line(runtime.finite_mean, losses(1.0, math.inf, math.nan), 10, "out")


def test_a_model_that_was_given_must_be_there():
    for stage, cfg in ((train_sft, sft(model="nowhere")), (train_pretrain, pretrain(model="nowhere"))):
        assert "nowhere" in one_line(stage.main, cfg)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    train_pretrain.main(pretrain(out="base", max_steps=1))
    train_tokenizer(["ababab"], 261).save("base/tokenizer.json")
    message = one_line(train_sft.main, sft(model="base"))
    assert message == "base: the tokenizer has 261 tokens, the model only 259; use the tokenizer that the model was trained with"


@pytest.mark.parametrize("flags, message", [
    (["--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
    (["--batch"], "unrecognized arguments: --batch"),  # no guessing from a beginning
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--lr", "-1"], "--lr -1.0: must be at least 0"),
    (["--lr", "nan"], "--lr nan: must be a finite number"),
    (["--lr", "inf"], "--lr inf: must be a finite number"),
    (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
    (["--batch_size", "1.5"], "argument --batch_size: invalid int value: '1.5'"),
    (["--max_grad_norm", "0"], "--max_grad_norm 0.0: must be at least"),
    (["--max_seq_len", "1"], "--max_seq_len 1: must be at least 8"),
    (["--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
    (["--data"], "argument --data: expected at least one argument"),
    (["--seed"], "argument --seed: expected one argument"),
    (["--resume", "yes"], "unrecognized arguments: yes"),
    (["stray"], "unrecognized arguments: stray"),
])
@pytest.mark.parametrize("stage", [train_sft, train_pretrain])
def test_a_wrong_flag_is_named(stage, flags, message):
    assert one_line(parse_config, stage.Config, stage.__doc__, flags).startswith(message)


def test_an_unknown_device_is_named():
    assert one_line(train_sft.main, sft(device="tpu")).startswith("--device tpu is not available here; available: ")


def test_flags_become_fields():
    cfg = parse_config(train_sft.Config, "", ["--data", "a.jsonl", "b.jsonl.gz", "--lr", "1e-4", "--resume", "--no-compile"])
    assert cfg.data == ["a.jsonl", "b.jsonl.gz"] and cfg.lr == 1e-4 and cfg.resume is True and cfg.compile is False
    assert parse_config(train_sft.Config, "", []) == train_sft.Config()
    assert train_sft.Config().data is not train_sft.Config().data  # a list that two runs share could be changed by one


def test_a_choice_is_checked_without_a_command_line_too():
    @dataclass
    class Config:
        width: int = flag(3, "between", low=1, high=5)
        kind: str = flag("a", "one of two", choices=["a", "b"])

    check_ranges(Config())
    assert one_line(check_ranges, Config(width=6)) == "--width 6: must be between 1 and 5"
    assert one_line(check_ranges, Config(kind="c")) == "--kind c: must be one of a, b"


@pytest.mark.parametrize("stage", [train_sft, train_pretrain])
def test_help_names_every_flag_and_its_default(stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(stage.Config, stage.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "Deviations" in text
    for field in fields(stage.Config):
        assert f"--{field.name}" in text
    assert "(default 0.002)" in text and "muon|adamw" in text


def test_a_script_prints_one_line_and_no_traceback(place):
    run = subprocess.run([sys.executable, str(ROOT / "train_sft.py"), "--data", "missing.jsonl", "--tokenizer", "tokenizer.json"],
                         capture_output=True, text=True, cwd=place)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "error: missing.jsonl: no such data file\n")


# ------------------------------------------------------------------------------------ tables

def test_a_table_aligns_chinese_too():
    """A Chinese character is two columns wide."""
    assert metrics.table([["", "a"], ["\u4e16\u754c", 0.5], ["xy", "z"]]).splitlines() == [
        "|      | a     |", "|------|-------|", "| \u4e16\u754c | 0.500 |", "| xy   | z     |"]


def test_before_and_after_side_by_side():
    text = metrics.before_after({"loss": 2.0, "by_task": {"add": 0.0}, "replies": ["a"]}, {"loss": 1.0, "by_task": {"add": 0.5, "sort": 1.0}, "replies": ["b"]})
    assert [re.sub(r" +", " ", line) for line in text.splitlines()] == [
        "| | before | after |", "|--------|--------|-------|", "| loss | 2.000 | 1.000 |", "| add | 0.000 | 0.500 |", "| sort | | 1.000 |"]


# ------------------------------------------------------------------------------------ several processes

TOGETHER = r"""
import contextlib, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
import train_sft
from minillm import data, model, runtime
from tests import test_07_training as tests

torch.set_num_threads(1)
data.CACHE = data.Path("cache2").absolute()
runtime.autocast = lambda device: contextlib.nullcontext()
model.PRESETS["tiny"] = (32, 2, 2, 1, 16, 64)
rank = int(os.environ["RANK"])

def interrupting(step, *rest):
    if step == 5 and rank == 1:  # one process alone is asked
        os.kill(os.getpid(), signal.SIGTERM)
    return tests.schedule(step, *rest)

cfg = tests.together()
for changes in ({}, {"out": "older", "max_steps": 1}, {"out": "older", "max_steps": 1, "seed": 5}):
    train_sft.main(tests.replace(cfg, batch_size=2, **changes))
train_sft.schedule = interrupting
assert train_sft.main(tests.replace(cfg, batch_size=2, out="stopped")) == {"interrupted": True, "step": 6}
train_sft.schedule = tests.schedule
torch.distributed.barrier()  # the second process must not look for the state while the first still writes it
train_sft.main(tests.replace(cfg, batch_size=2, out="stopped", resume=True))
"""


def together():
    return sft(out="two", optimizer="adamw", lr=1e-4, weight_decay=0.0, batch_size=4)


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo")
def test_two_processes_train_like_one(place, capsys):
    """torchrun with two processes of two rows each and one process of four: the same weights to 1e-5, the same log. Only
    the first process writes and prints; a signal to the second stops both at the same step, and both resume."""
    Path("together.py").write_text(TOGETHER, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "together.py", str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        try:
            out, errors = run.communicate(timeout=120)
        except subprocess.TimeoutExpired:  # one process waits for another that went on: torchrun ends both
            run.terminate()
            raise
    assert run.returncode == 0, errors
    train_sft.main(replace(together(), out="one"))
    one, two = (checkpoint.load_training_state(out) for out in ("one", "two"))
    for name, weight in one["model"].items():
        assert close(two["model"][name], weight)
    assert all(map(same, (one["loader"], one["step"]), (two["loader"], two["step"])))
    for a, b in zip(steps("one"), steps("two"), strict=True):
        assert a["step"] == b["step"] and close(a["loss"], b["loss"])
    counts = [json.loads(Path(out, "summary.json").read_text(encoding="utf-8"))["tokens"] for out in ("one", "two")]
    assert counts[0] == counts[1]

    said = out.splitlines()
    assert sum(line.startswith("step 10/10") for line in said) == 2  # two whole runs, not four
    assert sum("held an older run" in line for line in said) == 1 and Path("older.bak", "summary.json").exists()
    assert sum("interrupted: saved after step 6 of 10" in line for line in said) == 1
    assert "resuming after step 6 of 10" in said
    assert_same_run("two", "stopped")
