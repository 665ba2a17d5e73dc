"""Chapter 7. The training loop: one denominator per step, honest logs, and one clear line for every mistake.

After this chapter you can say what a training step divides by, what a line of the log averages over, and what the
learning rate is at any step.

The stages run in-process (`main(Config(...))`) on a few sentences and with the tokenizer of the data chapter (one byte,
one token). PyTorch uses one thread: with another number it may add the same numbers in another order.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_dpo
import train_lora
import train_pretrain
import train_sft
from minillm import metrics, model, optim, run, runtime, token_cache
from minillm.config import check_ranges, flag, parse_config
from minillm.data import PackedLoader, encode_conversation, encode_text, load_split
from minillm.errors import UserError
from minillm.logprobs import linear_cross_entropy
from minillm.losses import sft_loss
from minillm.model import CausalLM, preset_config
from minillm.optim import Muon, make_optimizers, newton_schulz, schedule, set_lr
from minillm.token_cache import load_dataset
from minillm.tokenizer import train_tokenizer
from minillm.training_state import load_training_state, remove_training_state
from tests.helpers import close, forbid_waiting_in_updates

ROOT = Path(__file__).parent.parent
BYTES = train_tokenizer(["a"], 259)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in, one thread, float32 and a narrow model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(runtime, "autocast", lambda device: contextlib.nullcontext())
    monkeypatch.setitem(model.PRESETS, "tiny", (32, 2, 2, 1, 16, 64))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    BYTES.save("tokenizer.json")
    write_data(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)


def write_data(folder):
    """45 conversations of ragged lengths, and 45 texts."""
    words = "one two three four five six seven eight nine".split()
    chats, texts = [], []
    for i in range(45):
        question, answer = " ".join(words[:i % 4 + 1]), " ".join(words[i % 5:i % 7 + 3] or words[4:5])
        turns = {"user": question, "assistant": answer}
        chats.append({"conversations": [{"role": role, "content": content} for role, content in turns.items()]})
        texts.append({"text": f"{i} {question} {answer}."})
    for name, records in (("sft.jsonl", chats), ("text.jsonl", texts)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def sft(**changes):
    usual = dict(data=["sft.jsonl"], tokenizer="tokenizer.json", out="out", max_seq_len=96, batch_size=4, max_steps=10,
                 warmup_steps=2, save_every=4, log_every=3, eval_every=100, device="cpu")
    return train_sft.Config(**{**usual, **changes})


def pretrain(**changes):
    shared = {name: value for name, value in vars(sft()).items() if name in vars(train_pretrain.Config())}
    return train_pretrain.Config(**{**shared, "data": ["text.jsonl"], **changes})


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
    """Four steps of warm-up: 1/4, 2/4, 3/4, 1. Then a cosine from 1 down to 0.1 over the other eight. After half of
    them it is (1 + 0.1) / 2, after a quarter 0.1 + 0.9 (1 + cos 45 degrees) / 2 = 0.868198. Beyond the end it stays
    at 0.1."""
    factors = [schedule(step, 12, 4) for step in (0, 1, 2, 3, 4, 6, 8, 12, 99)]
    assert close(factors, [0.25, 0.5, 0.75, 1.0, 1.0, 0.868198, 0.55, 0.1, 0.1])
    assert schedule(0, 1, 0) == 1.0  # a run of one step and no warm-up


@pytest.mark.parametrize("muon", [False, True])
def test_every_trained_parameter_is_in_one_group(muon):
    """Weight decay and Muon are for the hidden matrices: four of attention and three of the MLP in each of two layers.
    Norms and the embedding with its tied head go to AdamW, without decay. A frozen parameter is in no group."""
    lm = CausalLM(preset_config("tiny", 259))
    lm.model.norm.weight.requires_grad_(False)
    optimizers = make_optimizers(lm, 0.1, weight_decay=0.3, muon=muon)
    names = {id(p): n for n, p in lm.named_parameters()}
    groups = [(type(o).__name__, g["weight_decay"], sorted(names[id(p)] for p in g["params"]))
              for o in optimizers for g in o.param_groups]
    matrices, others = groups
    assert matrices[:2] == ("Muon" if muon else "AdamW", 0.3) and others[:2] == ("AdamW", 0.0)
    assert len(matrices[2]) == 14 and all("_proj" in name for name in matrices[2])
    assert len(others[2]) == 9 and "model.embed_tokens.weight" in others[2] and "model.norm.weight" not in others[2]
    set_lr(optimizers, 0.7)
    assert all(g["lr"] == 0.7 for o in optimizers for g in o.param_groups)


# ------------------------------------------------------------------------------------ Muon

def test_newton_schulz_worked_example():
    """The diagonal matrix (3, 4) has the Frobenius norm 5, so its singular values begin at 0.6 and 0.8. One step:
    p(0.6) = 3.4445 * 0.6 - 4.775 * 0.216 + 2.0315 * 0.07776 = 1.193269, p(0.8) = 2.7556 - 2.4448 + 0.665682 = 0.976482.
    """
    matrix = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    close(newton_schulz(matrix, steps=1), [[[1.193269, 0.0], [0.0, 0.976482]]])
    turned = matrix.flip(-1)  # (0, 3), (4, 0): the directions stay what they are
    close(newton_schulz(turned, steps=1), [[[0.0, 1.193269], [0.976482, 0.0]]])


@pytest.mark.parametrize("rows, columns", [(8, 8), (8, 24), (24, 8)])
def test_newton_schulz_makes_all_directions_about_equally_long(rows, columns):
    """A matrix whose singular values differ by a factor of 100 ends with all of them between 0.68 and 1.21."""
    random = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(3, rows, columns, generator=random), full_matrices=False)
    stretched = U * torch.logspace(0, -2, 8) @ V
    values = torch.linalg.svdvals(newton_schulz(stretched))
    assert torch.linalg.svdvals(stretched).min() < 0.011 and 0.68 < values.min() and values.max() < 1.21


def muon_steps(optimizer_of, shapes, steps=4):
    """The weights after some steps with random gradients; in step 2 the first matrix has none."""
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]
    optimizer = optimizer_of(weights)
    for step in range(steps):
        for i, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=random)
            weight.grad = None if (step, i) == (1, 0) else gradient
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 600, 2**22])
def test_muon_equals_its_plain_twin(monkeypatch, dtype, at_once):
    """torch.optim.Muon, over four steps, with square, wide and tall matrices, one at a time or all of one shape. It
    computes in bf16; without its cast both agree to the last digits of float32.

    In bf16 a number has 8 bits, so each entry of U is off by some 2^-8 of its size, which is at most 1.2. Four steps of
    lr * 0.2 sqrt(24) = 0.0098 add up to less than 4 * 0.0098 * 1.2 / 2^8 * 8 (for five iterations that each round
    twice) = 0.0015.
    """
    monkeypatch.setattr(runtime, "precision", lambda device: dtype)
    monkeypatch.setitem(optim.NUMBERS_AT_ONCE, "cpu", at_once)
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (8, 24), (16, 16), (1, 8)]
    ours = muon_steps(lambda weights: Muon(weights, 0.01, weight_decay=0.3), shapes)
    twin = muon_steps(lambda weights: torch.optim.Muon(weights, 0.01, weight_decay=0.3,
                                                       adjust_lr_fn="match_rms_adamw"), shapes)
    for one, other in zip(ours, twin):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.0015)


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something; a view computes nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_muon_starts_few_kernels(monkeypatch):
    """The 28 matrices of `tiny` have four shapes. One loop over the matrices starts 644 kernels."""
    monkeypatch.setitem(model.PRESETS, "tiny", (128, 4, 4, 2, 32, 384))
    lm = CausalLM(preset_config("tiny", 259))
    for p in lm.parameters():
        p.grad = torch.randn_like(p)
    optimizers = make_optimizers(lm, 0.01, muon=True)
    for optimizer in optimizers:
        optimizer.step()  # the first step makes the state
    with Kernels() as kernels:
        for optimizer in optimizers:
            optimizer.step()
    assert kernels.count < 150


def test_muon_continues_exactly_from_its_state():
    """One buffer for each matrix, whatever is stacked: saved after two steps, loaded into a new optimizer."""
    weights = [torch.randn(4, 6).requires_grad_() for _ in range(3)]
    gradients = torch.randn(4, 3, 4, 6)

    def steps(parameters, optimizer, numbers):
        for step in numbers:
            for weight, gradient in zip(parameters, gradients[step]):
                weight.grad = gradient.clone()
            optimizer.step()

    optimizer = Muon(weights, 0.1)
    steps(weights, optimizer, [0, 1])
    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    resumed = Muon(copies, 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(weights, optimizer, [2, 3])
    steps(copies, resumed, [2, 3])
    assert all(torch.equal(one, other) for one, other in zip(weights, copies))


# ------------------------------------------------------------------------------------ one denominator

def gradients(monkeypatch, cfg):
    """The gradient of each step of a run whose learning rate is 0."""
    recorded = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_",
                      lambda parameters, norm: recorded.append(torch.cat([p.grad.flatten() for p in parameters])))
        train_sft.main(replace(cfg, lr=0.0))
    return recorded


class OnDevice:
    """As much of a model as compile_backbone looks at."""

    def __init__(self, device):
        self.device, self.model = torch.device(device), self

    def parameters(self):
        yield self  # what has a device and a size

    def numel(self):
        return 10**8

    def run_layer(self, tokens):
        return "plain"

    def forward(self, tokens):
        return self.run_layer(tokens)


@pytest.mark.parametrize("works", [True, False])
def test_the_backbone_is_compiled_on_cuda_where_that_works(monkeypatch, works):
    """Where it does not (chapter 25) the same command trains too, uncompiled. --no-compile and a CPU never compile."""
    monkeypatch.setattr(runtime, "can_compile", lambda device: works and device.type == "cuda")
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda tokens: f"compiled, dynamic: {dynamic}")
    for device, enabled, expected in (("cuda", True, works), ("cuda", None, works), ("cuda", False, False),
                                      ("cpu", True, False), ("cpu", None, False)):
        model = OnDevice(device)
        runtime.compile_backbone(model, enabled)
        assert model.forward("ab") == ("compiled, dynamic: True" if expected else "plain")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_no_step_waits_for_the_gpu(monkeypatch, optimizer):
    """Except where a line is logged, the program runs ahead of the device: no copy of a batch and no count of tokens
    waits. Step 1 is logged, then every fifth."""
    happened = forbid_waiting_in_updates(monkeypatch, runtime, "sum_tensor_over_processes")
    train_sft.main(sft(device="cuda", compile=False, optimizer=optimizer, log_every=5, save_every=100))
    assert happened == [name for updates in (1, 4, 5)
                        for name in ["sum_gradients"] * updates + ["sum_tensor_over_processes"]]


def first_step(monkeypatch, script, cfg):
    """Run a script that packs rows until its first loss -> (model, what was asked of the compiler, the batch's loss
    mask, the targets that were told)."""
    class Seen(Exception):
        """That is all there is to see here."""

    def look(model, asked, row_length):
        found.extend([model, asked])
        return lambda tokens, doc_ids, blocks: tokens

    def loss(hidden, weight, tokens, loss_mask, n_targets, targets=None):
        found.extend([loss_mask, targets])
        raise Seen

    found = []
    monkeypatch.setattr(script, "packed_forward", look)
    monkeypatch.setattr(script, "linear_cross_entropy", loss)
    with pytest.raises(Seen):
        script.main(cfg)
    return found


@pytest.mark.parametrize("script, cfg", [(train_sft, sft), (train_pretrain, pretrain)])
def test_a_script_asks_for_what_its_flags_say_and_tells_a_gpu_the_targets(monkeypatch, script, cfg):
    """Where the supervised tokens are comes with the batch: a GPU would have to be waited for."""
    lm, asked, mask, targets = first_step(monkeypatch, script, cfg(compile=True, recompute=True))
    assert lm.model.recompute and asked is True
    assert torch.equal(targets, mask.flatten().nonzero()[:, 0]) and 0 < len(targets) < mask.numel()


def test_micro_batches_change_no_gradient(monkeypatch):
    """Pitfall 3. Micro-batches of 1, 2 or 4 rows give the gradient of one batch of 8, although the rows hold different
    numbers of trained tokens."""
    whole, = gradients(monkeypatch, sft(batch_size=8, max_steps=1))
    assert whole.norm() > 0.1
    for batch_size, grad_accum in ((1, 8), (2, 4), (4, 2)):
        parts, = gradients(monkeypatch, sft(batch_size=batch_size, grad_accum=grad_accum, max_steps=1))
        assert close(parts, whole)


def test_left_over_micro_batches_weigh_what_they_hold(monkeypatch):
    """An epoch has an odd number of rows, and a step takes four of them, one by one: the epoch's last step takes
    what is left, and the beginning of the next epoch. Every step's gradient is the sum over its tokens, divided by
    their number.

    The classic mistake, the mean of the micro-batches' means, is another gradient.
    """
    dataset = load_dataset(encode_conversation, "sft.jsonl", BYTES, 96)
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
        tokens, mask = torch.cat([b.tokens for b in batches]), torch.cat([b.loss_mask for b in batches])
        doc_ids = torch.cat([b.doc_ids for b in batches])
        logprobs = lm(tokens, doc_ids=doc_ids).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        (-logprobs[mask[:, 1:]].mean()).backward()
        assert close(found[step], torch.cat([p.grad.flatten() for p in lm.parameters()]))

    lm.zero_grad()
    for batch in batches:
        (sft_loss(lm(batch.tokens, doc_ids=batch.doc_ids), batch.tokens, batch.loss_mask) / 4).backward()
    assert not torch.allclose(found[-1], torch.cat([p.grad.flatten() for p in lm.parameters()]), atol=1e-3)


def test_the_logged_loss_is_the_mean_of_its_steps(monkeypatch):
    """Pitfall 12. Five steps of two micro-batches: not the last step's loss alone, not the last micro-batch's, and
    nothing counted twice. Step 1 (1 + 2) is always logged; steps 2 and 3 have the mean (30 + 300) / 2 = 165; step 4
    (1 + 1) is logged because it is saved, step 5 (2 + 2) because it is the last."""
    losses = iter([1.0, 2.0, 10.0, 20.0, 100.0, 200.0, 1.0, 1.0, 2.0, 2.0])  # each already divided by the step's tokens

    def loss(hidden, *rest):
        return hidden.sum() * 0 + next(losses)

    monkeypatch.setattr(train_sft, "linear_cross_entropy", loss)
    train_sft.main(sft(batch_size=2, grad_accum=2, max_steps=5, log_every=3))
    assert [(entry["step"], entry["loss"]) for entry in log()] == [(1, 3.0), (3, 165.0), (4, 2.0), (5, 4.0)]


def test_bf16_autocast_learns_like_float32(monkeypatch):
    train_sft.main(sft(optimizer="adamw", lr=1e-3))
    exact = [entry["loss"] for entry in log()]
    monkeypatch.setattr(runtime, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    train_sft.main(sft(optimizer="adamw", lr=1e-3, out="bf16"))
    assert exact[-1] < exact[0] - 0.2
    torch.testing.assert_close([entry["loss"] for entry in log("bf16")], exact, atol=0.03, rtol=0)


# ------------------------------------------------------------------------------------ a run and its folder

def test_what_a_run_leaves(capsys, monkeypatch):
    monkeypatch.setattr(run, "remove_training_state", remove_training_state)
    result = train_sft.main(sft(eval_every=5, epochs=99))
    said = capsys.readouterr()
    assert "sft.jsonl: 45 documents" in said.out and "held out for evaluation: 2 of 45 sequences" in said.out
    assert "starting from random weights, preset tiny" in said.out
    assert re.search(r"^step 10/10  loss \d\.\d+  lr .*  tokens_per_s \d+  left 0s$", said.out, re.MULTILINE)
    assert re.search(r"\| val_loss *\| *5\.\d+ *\| *[2345]\.\d+ *\|", said.out)
    assert "\r" not in said.out + said.err and "\x1b" not in said.out + said.err  # plain lines: this is no terminal
    assert sorted(os.listdir("out")) == [
        "config.json", "generation_config.json", "metrics.jsonl", "model.safetensors", "run_config.json",
        "summary.json", "tokenizer.json", "tokenizer_config.json"]
    assert not list(Path().glob("out?*"))  # no OUT.new, no OUT.lock
    entries = log()
    assert [entry["step"] for entry in entries] == [1, 3, 4, 5, 6, 8, 9, 10]  # log_every 3, save_every 4, eval_every 5
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [5]
    # two steps of warm-up, then 8 of cosine: at the last step 0.1 + 0.9 (1 + cos(7/8 * 180 degrees)) / 2 = 0.134254
    assert close(entries[-1]["lr"], 0.002 * 0.134254)
    summary = json.loads(Path("out", "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 10 and summary["resumed_after"] == 0 and summary["data"]["documents"] == 45
    assert summary["data"]["sequences held out"] == 2
    assert summary["before"]["val_loss"] > summary["after"]["val_loss"] == result["val_loss"]
    assert 0 < summary["seconds"] < 60 and 10 * 4 * 96 * 0.7 < summary["tokens"] <= 10 * 4 * 96
    saved = json.loads(Path("out", "run_config.json").read_text(encoding="utf-8"))
    sha256 = hashlib.sha256(Path("sft.jsonl").read_bytes()).hexdigest()
    assert saved.pop("contents")["sft.jsonl"] == sha256
    assert saved == {**vars(sft(eval_every=5, epochs=99))}


def test_pretraining_measures_bits_per_byte():
    """Bits per byte = nats per target / ln 2 x targets / bytes. A text of n bytes has n + 1 targets: its end is one."""
    result = train_pretrain.main(pretrain())
    _, held_out = load_split(encode_text, ["text.jsonl"], "", BYTES, 96, 0)
    lengths = held_out.lengths(np.arange(len(held_out)))
    bits = result["val_loss"] * (lengths - 1).sum() / 0.693147 / (lengths - 2).sum()
    torch.testing.assert_close(result["bits_per_byte"], bits, atol=1e-4, rtol=0)


def test_the_number_of_steps_follows_from_the_epochs():
    """Every row once per epoch: ceil(rows / batch) batches, two epochs, two micro-batches a step."""
    train_sft.main(sft(max_steps=0, epochs=2, grad_accum=2, batch_size=3))
    dataset, _ = load_split(encode_conversation, ["sft.jsonl"], "", BYTES, 96, 0)
    rows = [sum(1 for _ in PackedLoader(dataset, 1, 96, seed=0).order(epoch)) for epoch in (0, 1)]
    assert log()[-1]["step"] == math.ceil(sum(math.ceil(n / 3) for n in rows) / 2)


@pytest.mark.parametrize("count", [1, 2])
def test_a_handful_of_conversations_is_enough(count, capsys):
    """One (which is then held out as well) or two, fewer than a batch holds: the model learns the one it sees."""
    lines = Path("sft.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    Path("few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    train_sft.main(sft(data=["few.jsonl"], max_steps=20, log_every=1, lr=0.01))
    assert ("a single sequence" in capsys.readouterr().out) is (count == 1)
    losses = [entry["loss"] for entry in log()]
    assert losses[-1] < 0.5 * losses[0]


def test_sft_starts_from_pretrain_when_it_is_there(capsys):
    train_pretrain.main(pretrain(out="out/pretrain"))
    capsys.readouterr()
    # with a learning rate of 0 it keeps what it starts from; its tokenizer is the model's own
    train_sft.main(sft(out="out/sft", tokenizer="nowhere.json", lr=0.0))
    assert "random" not in capsys.readouterr().out
    assert Path("out/sft/model.safetensors").read_bytes() == Path("out/pretrain/model.safetensors").read_bytes()



# ------------------------------------------------------------------------------------ what goes wrong

def good_checkpoint():
    return load_training_state("out")["step"], Path("out", "model.safetensors").read_bytes()


def test_a_loss_that_is_not_a_number_stops_the_run(monkeypatch):
    """It happens at step 6 and is seen at step 8, which would be saved: the save of step 4 stays, and the message names
    step 6."""
    calls, kept = [], []

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 5:
            kept.append(good_checkpoint())
        return linear_cross_entropy(*arguments) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(train_sft, "linear_cross_entropy", loss)
    message = one_line(train_sft.main, sft(log_every=100))
    assert message.startswith("loss became nan at step 6; stopped, out keeps its last checkpoint")
    assert good_checkpoint() == kept[0] and kept[0][0] == 4
    assert [entry["step"] for entry in log()] == [1, 4] and all(math.isfinite(entry["loss"]) for entry in log())
    calls.clear()  # a new run, while OUT holds another's checkpoint
    message = one_line(train_sft.main, sft(log_every=100, save_every=100))
    assert message.startswith("loss became nan at step 6; stopped, before the first checkpoint of this run (")


def test_weights_that_are_not_numbers_are_never_saved(monkeypatch):
    """Step 4 has a good loss, a gradient that overflows, and is to be saved: the loss of step 5 would tell too late."""
    calls = []

    def clip(parameters, norm):
        calls.append(1)
        if len(calls) == 4:
            for p in parameters:
                p.grad.fill_(math.inf)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    message = one_line(train_sft.main, sft(save_every=2, optimizer="adamw"))
    assert message.startswith("the weights became NaN or infinite by step 4; stopped, out keeps its last checkpoint")
    assert good_checkpoint()[0] == 2


def test_an_absurd_learning_rate_ends_in_one_line():
    message = one_line(train_sft.main, sft(lr=1e30, optimizer="adamw", save_every=100))
    assert re.match(r"(loss became (nan|inf) at|the weights became NaN or infinite by) step \d+; stopped", message)


def test_a_model_that_was_given_must_be_there():
    for stage, cfg in ((train_sft, sft(model="nowhere")), (train_pretrain, pretrain(model="nowhere"))):
        assert "nowhere" in one_line(stage.main, cfg)


def by_flags(script, *flags):
    return script.main(parse_config(script.Config, "", [str(flag) for flag in flags]))


def test_flags_of_random_weights_ask_for_them(capsys):
    """--preset and --tokenizer say nothing about a model that is loaded: given beside one, somebody is mistaken."""
    train_pretrain.main(pretrain(out="out/pretrain", max_steps=1))
    capsys.readouterr()
    flags = ["--data", "sft.jsonl", "--max_steps", 1, "--max_seq_len", 96, "--device", "cpu", "--tokenizer",
             "tokenizer.json", "--out", "other"]
    by_flags(train_sft, *flags)
    assert "starting from random weights, preset tiny" in capsys.readouterr().out
    for script in (train_sft, train_pretrain):
        message = one_line(by_flags, script, *flags, "--model", "out/pretrain")
        assert message == ("--tokenizer is for random weights, and --model out/pretrain has its own; leave one of them "
                           "out")


@pytest.mark.parametrize("script, flags, message", [
    (train_dpo, ["--rank", 4], "--rank belongs to --peft lora; leave it out with --peft none"),
    (train_lora, ["--peft", "prefix", "--dropout", 0.2],
     "--dropout belongs to --peft lora or dora; leave it out with --peft prefix"),
    (train_lora, ["--bottleneck", 4], "--bottleneck belongs to --peft adapter; leave it out with --peft lora")])
def test_a_flag_of_another_method_is_refused(script, flags, message):
    assert one_line(by_flags, script, *flags) == message


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    train_pretrain.main(pretrain(out="base", max_steps=1))
    train_tokenizer(["ababab"], 261).save("base/tokenizer.json")
    message = one_line(train_sft.main, sft(model="base"))
    assert message == ("base: the tokenizer has 261 tokens, the model only 259; "
                       "use the tokenizer that the model was trained with")


@pytest.mark.parametrize("flags, message", [
    (["--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
    (["--batch"], "unrecognized arguments: --batch"),  # no guessing from a beginning
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--lr", "-1"], "--lr -1.0: must be at least 0"),
    (["--lr", "nan"], "--lr nan: must be a finite number"),
    (["--lr", "inf"], "--lr inf: must be a finite number"),
    (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
    (["--seed", "9223372036854775808"], "--seed 9223372036854775808: must be below 2**63"),
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
    flags = ["--data", "a.jsonl", "b.jsonl.gz", "--lr", "1e-4", "--resume", "--no-compile"]
    cfg = parse_config(train_sft.Config, "", flags)
    assert cfg.data == ["a.jsonl", "b.jsonl.gz"] and cfg.lr == 1e-4 and cfg.resume is True and cfg.compile is False
    assert parse_config(train_sft.Config, "", []) == train_sft.Config()
    assert train_sft.Config().data is not train_sft.Config().data  # one run cannot change the list of another


def test_a_choice_is_checked_without_a_command_line_too():
    @dataclass
    class Config:
        width: int = flag(3, "between", low=1, high=5)
        kind: str = flag("a", "one of two", choices=["a", "b"])

    check_ranges(Config())
    assert one_line(check_ranges, Config(width=6)) == "--width 6: must be between 1 and 5"
    assert one_line(check_ranges, Config(kind="c")) == "--kind c: must be one of a, b"


@pytest.mark.parametrize("stage, lr", [(train_sft, "0.002"), (train_pretrain, "0.004")])
def test_help_names_every_flag_and_its_default(stage, lr, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(stage.Config, stage.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "Deviations" in text
    for field in fields(stage.Config):
        assert f"--{field.name}" in text
    assert f"(default {lr})" in text and "muon|adamw" in text


@pytest.mark.slow
def test_a_script_prints_one_line_and_no_traceback(place):
    command = [sys.executable, str(ROOT / "train_sft.py"), "--data", "missing.jsonl", "--tokenizer", "tokenizer.json",
               "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=place)
    chosen, *errors = run.stderr.splitlines()  # first what the machine was found to be (chapter 25)
    assert (run.returncode, run.stdout, errors) == (1, "", ["error: missing.jsonl: no such data file"])
    assert chosen.split(",")[0] == "cpu"


# ------------------------------------------------------------------------------------ tables

def test_a_table_aligns_chinese_too():
    """A Chinese character is two columns wide."""
    assert metrics.table([["", "a"], ["\u4e16\u754c", 0.5], ["xy", "z"]]).splitlines() == [
        "|      | a     |", "|------|-------|", "| \u4e16\u754c | 0.500 |", "| xy   | z     |"]
    assert metrics.table([["task\n\x1b[2J"]]).splitlines()[0] == "| task  [2J |"  # a name from a data file


def test_before_and_after_side_by_side():
    text = metrics.before_after({"loss": 2.0, "by_task": {"add": 0.0}, "replies": [["q", "a"]]},
                                {"loss": 1.0, "by_task": {"add": 0.5, "sort": 1.0}, "replies": [["q", "b"]]})
    assert [re.sub(r" +", " ", line) for line in text.splitlines()] == [
        "| | before | after |", "|--------|--------|-------|", "| loss | 2.000 | 1.000 |", "| add | 0.000 | 0.500 |",
        "| sort | | 1.000 |"]


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_schedule_worked_example: `3, 4, 6, 8, 12, 99)` -> `3, 4, 10, 8, 12, 99)`. What is the factor after three
#    quarters of the cosine?
# 2. test_the_logged_loss_is_the_mean_of_its_steps: `log_every=3` -> `log_every=2`. Which steps have a line, and with
#    which loss?
