"""Chapter 7, second part. The run around the loop: what it logs, which folder it writes to, and what it resumes.

After this chapter you know when a run writes what, and why a wrong command never costs you an older run.

The tests run the toy stage below. It has everything that a stage has (a model, data, random numbers, an evaluation), so
it also shows how run.py is used.
"""

import errno
import json
import math
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from minillm import checkpoint, metrics, runtime, training_state
from minillm import run as run_file
from minillm.config import flag
from minillm.data import Loader
from minillm.errors import UserError
from minillm.model import CausalLM, ModelConfig
from minillm.optim import make_optimizers, schedule, set_lr, update
from minillm.run import Run, RunConfig
from minillm.safetensors import load_safetensors
from minillm.training_state import capture_rng, load_training_state, restore_rng
from tests.helpers import close
from tests.test_06_checkpoint import POSIX, disk_full_after
from tests.test_07_training import log, one_line, place  # noqa: F401 (place is a fixture)


# ------------------------------------------------------------------------------------ a toy stage

@dataclass
class Config(RunConfig):
    """Eight steps; log lines after 1, 3, 6; an evaluation after 5; checkpoints after 3, 6 and 8."""

    model: str = flag("", "folder to start from")
    data: list[str] = flag(["numbers.txt"], "a number per line")
    out: str = flag("out", "folder to write")
    lr: float = flag(0.01, "learning rate")
    batch_size: int = flag(2, "numbers per step")
    max_steps: int = flag(8, "steps")
    log_every: int = flag(3, "steps between log lines")
    eval_every: int = flag(5, "steps between evaluations")
    save_every: int = flag(3, "steps between checkpoints")
    device: str = flag("cpu", "device")


class Numbers(Loader):
    """Batches of the data's numbers, in order."""

    def order(self, epoch):
        yield from self.dataset

    def collate(self, items):
        return items


class NoTokenizer:
    """What a checkpoint asks of a tokenizer."""

    vocab_size, bos_id, endoftext_id, pad_id, end_id, end_ids = 8, 0, 0, 0, 2, [2, 0]

    def documents(self, max_length):
        return {"tokenizer.json": {}}


def main(cfg: Config, body=lambda step, run: None, measure=lambda: None) -> dict:
    """body is called in every step, measure in every evaluation."""
    runtime.start(cfg.device, cfg.seed)
    run = Run(cfg, inputs=[cfg.model, *cfg.data])
    if run.finished:
        return run.result
    numbers = []
    for path in cfg.data:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such data file")
        numbers += [float(line) for line in Path(path).read_text(encoding="utf-8").split()]
    loader = Numbers(numbers, cfg.batch_size, cfg.seed)
    sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                 head_dim=4, intermediate_size=8)
    model = checkpoint.load_model(cfg.model) if cfg.model else CausalLM(ModelConfig(**sizes))
    optimizers = make_optimizers(model, cfg.lr)

    def evaluate() -> dict:
        measure()
        with torch.no_grad():
            return {"val_loss": model(torch.arange(8)[None]).square().mean().item(), "replies": [["1 + 1?", "2"]]}

    run.start(model, optimizers, loader, NoTokenizer(), cfg.max_steps, evaluate)
    batches = iter(loader)
    for step in run:
        set_lr(optimizers, cfg.lr * schedule(step, cfg.max_steps, 2))
        batch = next(batches)
        n_numbers = run.count(len(batch))
        for number in batch:
            noise = torch.rand(8) + random.random() + np.random.rand() + torch.rand(8, generator=run.generator(step))
            logits = model(torch.randint(8, (1, 5)))  # (1, 5, 8)
            loss = (logits + number * noise).square().mean() / n_numbers
            loss.backward()
            run.add({"loss": loss}, tokens=5)
        run.add({"number": sum(batch) / len(batch) if batch else math.nan}, weight=len(batch))
        body(step, run)
        update(model, optimizers, cfg.max_grad_norm)
    return run.finish({"numbers": len(numbers)})


@pytest.fixture(autouse=True)
def numbers(place):  # noqa: F811
    """Nine numbers: an epoch of five batches, the last of which is not full. And the signals as they were."""
    Path("numbers.txt").write_text("\n".join(str(n / 4) for n in range(1, 10)), encoding="utf-8")
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {name: signal.getsignal(name) for name in handlers} == handlers


def weights(out="out"):
    return Path(out, "model.safetensors").read_bytes()


def summary(out="out"):
    return json.loads(Path(out, "summary.json").read_text(encoding="utf-8"))


def same(a, b) -> bool:
    """Equal to the bit, in every corner of a training state."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def logged(out):
    """The log without what a clock measured, and without the lines that tell of a resume."""
    return [{key: value for key, value in entry.items() if key != "tokens_per_s"}
            for entry in log(out) if "resumed" not in entry]


def assert_same_run(a, b, logs=True):
    """Two finished runs are equal: state, weights, log and summary; and their weights are those of the last step."""
    first, second = load_training_state(a), load_training_state(b)
    for key in first:
        assert same(first[key], second[key]), key
    assert weights(a) == weights(b)
    for name, tensor in load_safetensors(Path(a, "model.safetensors")).items():
        assert torch.equal(tensor, first["models"][0][name]), name
    for key in ("before", "after", "steps", "data"):
        assert summary(a)[key] == summary(b)[key]
    assert not logs or logged(a) == logged(b)


def listing(folder="."):
    """{path: (content, time of change)} of all files in a folder."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------ the log

def test_when_a_line_is_logged():
    """Step 1, every third, each checkpoint and the last; the evaluation after step 5 is a line of its own."""
    main(Config())
    assert [entry["step"] for entry in log()] == [1, 3, 5, 6, 8]
    assert [entry["step"] for entry in log() if "val_loss" in entry] == [5]
    assert all("loss" in entry and "lr" in entry for entry in log() if "val_loss" not in entry)


def test_sums_and_weighted_means():
    """A step of two optimizer steps. The first has two micro-batches, the second one:

        loss, without a weight    0.1 + 0.3 and 0.8: the mean of the two sums is (0.4 + 0.8) / 2 = 0.6
        length, by its weight     2 (weight 3) and 10 (weight 1): (6 + 10) / 4 = 4
        empty, weight 0           counts for nothing, although a mean over nothing is NaN
    """
    def body(step, run):
        run.steps[-1].clear()
        run.updates = 0
        for part in ((0.1, 0.3), (0.8,)):
            run.count(7)
            for loss in part:
                run.add({"loss": torch.tensor(loss)})
        run.add({"length": 2}, weight=3)
        run.add({"length": 10.0}, weight=1)
        run.add({"length": math.nan, "empty": torch.tensor(math.nan)}, weight=0)

    main(Config(max_steps=1), body)
    entry, = log()
    assert close(entry["loss"], 0.6) and close(entry["length"], 4.0) and "empty" not in entry


def test_a_line_covers_the_steps_since_the_last_one():
    """Means over steps 2 and 3: the sums 4 and 6 give 5; the weighted values 1 (weight 1) and 4 (weight 2) give 3."""
    def body(step, run):
        run.add({"sum": [9.0, 4.0, 6.0][step]})
        run.add({"mean": [9.0, 1.0, 4.0][step]}, weight=[9, 1, 2][step])

    main(Config(max_steps=3), body)
    assert [(entry["sum"], entry["mean"]) for entry in log()] == [(9.0, 9.0), (5.0, 3.0)]


def test_a_run_that_adds_nothing_still_logs():
    main(Config(max_steps=1), lambda step, run: run.steps[-1].clear())
    assert [(entry["step"], set(entry) - {"tokens_per_s"}) for entry in log()] == [(1, {"step", "lr"})]


def test_the_step_of_a_bad_loss_is_counted_back():
    """It is seen after step 6 only, where lines 4 to 6 are logged; step 5 was the first bad one."""
    def body(step, run):
        run.add({"score": {4: math.inf, 5: math.nan}.get(step, 1.0)})

    message = one_line(main, Config(), body)
    assert message.startswith("score became inf at step 5; stopped, out keeps its last checkpoint")
    assert load_training_state("out")["step"] == 3 and log()[-1]["step"] == 5  # the evaluation
    assert not Path("out", "summary.json").exists()


def test_the_first_batches_of_an_epoch_are_counted_in_numbers():
    """The mean of the numbers, weighted by how many a batch has: 0.375; 1.125 averages batches 2 and 3; then 1.875, the
    short batch 2.25 and 0.375 again: (2 x 1.875 + 2.25 + 2 x 0.375) / 5 = 1.35."""
    main(Config(max_steps=6))
    assert close([entry["number"] for entry in log() if "number" in entry], [0.375, 1.125, 1.35])


# ------------------------------------------------------------------------------------ the last checkpoints

def kept(out="out"):
    return sorted(path.name for path in Path(out).glob("step_*"))


def test_the_last_checkpoints_are_kept_and_can_be_gone_back_to():
    """Checkpoints after 3, 6 and 8 steps; of these the last two stay. From step 6 on, the run ends with the same bits,
    with the kept folder as its --out; the folder is also a --model."""
    main(Config(keep_last=2))
    assert kept() == ["step_000006", "step_000008"]
    sixth, eighth = Path("out/step_000006"), Path("out/step_000008")
    assert load_training_state(sixth)["step"] == 6 and weights(eighth) == weights() != weights(sixth)
    before = listing(eighth)
    main(Config(keep_last=2, out=str(sixth), resume=True))
    assert_same_run(sixth, "out", logs=False)
    assert listing(eighth) == before and kept(sixth) == ["step_000006", "step_000008"]
    main(Config(model=str(eighth), lr=0.0, max_steps=1, out="other"))
    assert weights("other") == weights()


def test_a_kept_checkpoint_takes_no_room_a_second_time():
    main(Config(keep_last=1))
    assert Path("out/model.safetensors").stat().st_nlink == 2 or os.name == "nt"


def test_what_a_kill_leaves_of_a_kept_checkpoint_is_removed_and_made_up_for(monkeypatch):
    """Killed before step 6's folder has its name: --resume removes the draft, and makes the folder."""
    def fail(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        with pytest.raises(KeyboardInterrupt):
            main(Config(keep_last=3), lambda step, run: patch.setattr(Path, "rename", fail) if step == 5 else None)
    assert kept()[0] == "step_000003" and kept()[1].endswith(".tmp")
    main(Config(keep_last=3, resume=True))
    assert kept() == ["step_000003", "step_000006", "step_000008"]
    main(Config(out="undisturbed"))
    assert_same_run("out", "undisturbed", logs=False)


# ------------------------------------------------------------------------------------ the folder

def test_an_older_run_is_renamed_with_the_first_checkpoint(capsys):
    """Until then it stays in OUT, and the new run lives in OUT.new."""
    main(Config(seed=1))
    older, seen = weights(), []

    def body(step, run):
        seen.append((weights() == older, Path("out.new", "metrics.jsonl").exists(), Path("out.bak").exists()))

    main(Config(seed=2), body)
    assert seen == [(True, True, False)] * 3 + [(False, False, True)] * 5
    assert weights("out.bak") == older != weights() and "out held an older run; it is now" in capsys.readouterr().out
    assert not Path("out.new").exists() and not Path("out.lock").exists()
    main(Config(seed=2, out="elsewhere"))
    assert_same_run("out", "elsewhere")


def test_no_older_run_is_ever_deleted():
    for seed in range(4):
        main(Config(seed=seed, max_steps=1))
    found = [json.loads(Path(out, "run_config.json").read_text(encoding="utf-8"))["seed"]
             for out in ("out.bak", "out.bak2", "out.bak3", "out")]
    assert found == [0, 1, 2, 3]


@pytest.mark.parametrize("changes", [{"data": ["typo.jsonl"]}, {"model": "nowhere"}, {"device": "tpu"}])
@pytest.mark.parametrize("resume", [False, True])
def test_a_wrong_command_touches_nothing(changes, resume):
    main(Config())
    before = listing()
    one_line(main, Config(resume=resume, **changes))
    assert listing() == before


def test_a_run_that_fails_before_its_first_checkpoint_leaves_the_older_one():
    """Twice, so that the second finds what the first left in OUT.new."""
    main(Config())
    before = listing("out")

    def body(step, run):
        run.add({"score": math.nan})

    for _ in range(2):
        assert one_line(main, Config(seed=1), body).startswith("score became nan at step 1")
        assert listing("out") == before and sorted(os.listdir()) == sorted(
            ["numbers.txt", "out", "out.new", "sft.jsonl", "text.jsonl", "tokenizer.json"])
    main(Config(seed=1))
    assert list(listing("out.bak").values()) == list(before.values()) and not Path("out.new").exists()
    assert [entry["step"] for entry in log()] == [1, 3, 5, 6, 8]


def test_what_a_failed_run_left_is_cleared_by_a_resumed_one(capsys):
    interrupted(Config(), 3)
    with pytest.raises(Broken):
        main(Config(seed=1), *failing("before"))
    assert Path("out.new", "run_config.json").exists()
    main(Config(resume=True))
    assert "out.new is a later run that ended before its first checkpoint; this goes on with out" in (
        capsys.readouterr().out)
    assert not Path("out.new").exists() and not Path("out.bak").exists()


def test_a_folder_without_a_run_stays_where_it_is():
    Path("out").mkdir()
    Path("out", "notes.txt").write_text("mine", encoding="utf-8")
    main(Config(max_steps=1))
    assert Path("out", "notes.txt").read_text(encoding="utf-8") == "mine" and not Path("out.bak").exists()


def test_a_model_in_out_bak_is_kept():
    """`--model OUT.bak --out OUT` starts from what the last run moved aside: the next one goes to OUT.bak2."""
    main(Config(seed=1, max_steps=1))
    main(Config(seed=2, max_steps=1))
    start, second = weights("out.bak"), weights()
    main(Config(model="out.bak", lr=0.0, max_steps=1))
    assert weights("out.bak") == start == weights() and weights("out.bak2") == second


def test_what_the_run_reads_cannot_be_in_its_folder(monkeypatch):
    main(Config(max_steps=1))
    Path("out", "mine.txt").write_text("1", encoding="utf-8")
    Path("other").mkdir()
    Path("out.new").mkdir()
    Path("out.new", "mine.txt").write_text("1", encoding="utf-8")
    before = listing()
    for changes in ({"model": "out"}, {"data": ["out/mine.txt"]}, {"data": ["other/../out/mine.txt"]},
                    {"data": [str(Path("out/mine.txt").absolute())]}, {"data": ["out.new/mine.txt"]}):
        assert "which this run needs; give another --out" in one_line(main, Config(**changes))
    monkeypatch.chdir("out")
    assert "which this run needs" in one_line(main, Config(out=".", data=["../numbers.txt"]))
    monkeypatch.chdir("..")
    assert listing() == before


def test_a_folder_of_the_users_called_out_new_is_not_deleted():
    """--out out while out.new is a run of its own (its --out was out.new), or any other folder."""
    main(Config(max_steps=1, out="out.new"))
    main(Config(max_steps=1))  # a fresh OUT does not need OUT.new
    for _ in range(2):
        before = listing()
        assert "out.new is in the way" in one_line(main, Config(max_steps=1, seed=1))
        main(Config(max_steps=1, resume=True))  # of OUT, which is finished
        assert listing() == before
        Path("out.new", "run_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("out", ["file", "file/x", "file/x/y"])
def test_out_must_be_a_folder(out):
    Path("file").write_text("mine", encoding="utf-8")
    assert "file is a file; give a folder" in one_line(main, Config(out=out))
    assert Path("file").read_text(encoding="utf-8") == "mine"


@POSIX
def test_on_a_disk_that_is_full_from_the_start_the_line_is_about_what_was_to_be_written(capsys):
    """Not about the lock, which works all the same: only the number of the process is missing in it. (capsys: what is
    printed goes to memory.)"""
    with disk_full_after(0):
        message = one_line(main, Config())
    assert "run_config.json: File too large; nothing was written" in message
    assert os.listdir("out") == [] and not os.path.exists("out.lock")


@POSIX
def test_an_out_that_is_a_link_is_the_folder_behind_it():
    """It has that folder's lock, so a run to the one name keeps out a run to the other, and the link stays."""
    Path("folder").mkdir()
    Path("link").symlink_to("folder")

    def body(step, run):
        if step == 0:
            assert Path("folder.lock").exists() and not Path("link.lock").exists()

    main(Config(out="link"), body)
    main(Config(out="link", seed=1), body)
    interrupted(Config(out="link", seed=2), 1)
    main(Config(out="link", seed=2, resume=True))
    assert os.readlink("link") == "folder" and not Path("link.bak").exists()
    assert [json.loads(Path(name, "run_config.json").read_text(encoding="utf-8"))["seed"]
            for name in ("folder.bak", "folder.bak2", "folder")] == [0, 1, 2]


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(monkeypatch):
    """The disk is full when step 6 is to be saved; with room again, the run goes on from step 3."""
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        def body(step, run):
            if step == 5:
                patch.setattr(os, "replace", full)

        message = one_line(main, Config(), body)
    assert "No space left on device; the file that was there is unchanged" in message
    assert load_training_state("out")["step"] == 3 and not Path("out.lock").exists()
    main(Config(resume=True))
    main(Config(out="undisturbed"))
    assert_same_run("out", "undisturbed")


def test_a_rename_that_fails_says_what_to_do(monkeypatch):
    """Some file system does not let OUT be renamed (a mounted folder): the checkpoint in OUT.new is not lost."""
    main(Config(seed=1))

    def busy(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", busy)
        message = one_line(main, Config())
    assert "Device or resource busy; do it yourself, then use --resume" in message
    Path("out").rename("older")
    main(Config(resume=True))
    main(Config(out="undisturbed"))
    assert_same_run("out", "undisturbed")


# ------------------------------------------------------------------------------------ one run at a time

def test_a_second_run_in_the_same_folder_is_refused():
    """It names the process that is there, and disturbs nothing."""
    def body(step, run):
        if step == 4:
            before = listing()
            rng = capture_rng()
            message = one_line(main, Config(seed=3))
            restore_rng(rng)
            assert message.startswith(f"another run (process {os.getpid()}) is writing to")
            assert listing() == before

    main(Config(), body)
    main(Config(out="undisturbed"))
    assert_same_run("out", "undisturbed")


def test_a_stale_lock_does_not_matter():
    """The lock is the system's, not the file: what a killed process left keeps nobody out."""
    Path("out.lock").write_text("1", encoding="utf-8")
    main(Config(max_steps=1))
    assert not Path("out.lock").exists() and Path("out", "summary.json").exists()


def test_a_file_system_without_locks_is_good_enough(monkeypatch):
    """Some network drives have none: that is no other run."""
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    main(Config(max_steps=1))
    assert Path("out", "summary.json").exists()


class Broken(Exception):
    pass


def failing(where):
    """(body, measure), of which one raises: in the loop, or in the first, the second or the last evaluation."""
    calls = []

    def body(step, run):
        if where == "body" and step == 4:
            raise Broken

    def measure():
        calls.append(1)
        if len(calls) == {"before": 1, "between": 2, "after": 3}.get(where):
            raise Broken

    return body, measure


@pytest.mark.parametrize("where", ["body", "before", "between", "after"])
def test_an_exception_leaves_everything_in_order(where, monkeypatch):
    """Signals, bar, metrics.jsonl and lock. The same process can run again."""
    bars, files = [], []

    class Bar:
        def __init__(self, **options):
            bars.append(self)

        def update(self):
            pass

        def set_postfix_str(self, text):
            pass

        def close(self):
            self.closed = True

    remember = metrics.Progress.open_file

    def open_file(self, folder):
        remember(self, folder)
        files.append(self.file)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(metrics, "tqdm", Bar)
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(metrics.Progress, "open_file", open_file)
    with pytest.raises(Broken):
        main(Config(), *failing(where))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert len(bars) == len(files) == (where != "before")
    assert all(bar.closed for bar in bars) and all(file.closed for file in files)
    assert not Path("out.lock").exists()
    main(Config(resume=True))
    main(Config(out="undisturbed"))
    assert_same_run("out", "undisturbed")


# ------------------------------------------------------------------------------------ resume

def stop_after(steps):
    """A body that has the run interrupted after so many steps."""
    def body(step, run):
        if step == steps - 1:
            signal.raise_signal(signal.SIGTERM)

    return body


def interrupted(cfg, steps):
    with pytest.raises(SystemExit) as stopped:
        main(cfg, stop_after(steps))
    assert stopped.value.code == 143


def test_resume_of_a_finished_run_does_nothing(capsys):
    result = main(Config())
    before = listing()
    capsys.readouterr()
    assert main(Config(resume=True)) == {key: value for key, value in result.items() if key != "seconds"}
    assert capsys.readouterr().out == "the run in out is finished: nothing to do\n"
    assert listing() == before


@pytest.mark.parametrize("killed", [False, True])
def test_a_finished_run_has_no_training_state(monkeypatch, killed):
    """Fp32 weights and moments: of a model of 0.6 billion parameters 7 GB. The weights stay, as the folder's model.
    A kill may come after the summary and before the removal; --resume then makes up for it, and changes nothing else.
    """
    def remove(folder):
        assert Path(folder, "summary.json").exists()  # until then, --resume needs the state
        if not killed:
            training_state.remove_training_state(folder)

    main(Config(out="undisturbed"))
    monkeypatch.setattr(run_file, "remove_training_state", remove)
    result = main(Config())
    assert Path("out", "training_state.pt").exists() is killed
    monkeypatch.setattr(run_file, "remove_training_state", training_state.remove_training_state)
    before = {path: found for path, found in listing("out").items() if path != "out/training_state.pt"}
    assert main(Config(resume=True)) == {key: value for key, value in result.items() if key != "seconds"}
    assert listing("out") == before and weights("out") == weights("undisturbed")
    assert "had other settings: --max_steps 9 (it was 8)" in one_line(main, Config(resume=True, max_steps=9))
    main(Config())
    assert listing("out.bak").keys() == {path.replace("out", "out.bak") for path in before}


def test_resume_of_nothing_starts_at_step_0(capsys):
    main(Config(resume=True))
    assert "nothing to continue in out: starting from step 0" in capsys.readouterr().out
    assert log()[-1]["step"] == 8 and summary()["resumed_after"] == 0


def test_the_log_of_a_resumed_run_is_cut():
    """Steps 4 and 5 were logged, but not saved: they are trained again. So is a line that a crash has torn."""
    interrupted(Config(), 3)
    with open("out/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 5, "loss": 1}\n{"no step": 1}\n[]\n{"step": 1, "lo')
    main(Config(resume=True))
    assert [entry["step"] for entry in log()] == [1, 3, 3, 5, 6, 8]
    assert [entry for entry in log() if "resumed" in entry] == [{"step": 3, "resumed": True}]
    assert summary()["resumed_after"] == 3


def test_a_run_that_was_moved_goes_on():
    interrupted(Config(), 4)
    Path("out").rename("elsewhere")
    main(Config(out="elsewhere", resume=True, log_every=2, save_every=100, eval_every=100))
    main(Config())
    assert_same_run("elsewhere", "out", logs=False)


def test_to_measure_is_not_to_change():
    """An evaluation samples replies, from the generators that the training draws from too (dropout): it gives them back
    as they were. So --eval_every decides about the log alone, and may change in the middle of a run."""
    def measure():
        torch.rand(3), random.random(), np.random.rand()

    main(Config(out="rarely", eval_every=100), measure=measure)
    main(Config(out="often", eval_every=1), measure=measure)
    assert weights("often") == weights("rarely")


@pytest.mark.parametrize("change", ["missing", "older"])
def test_the_weights_of_a_finished_run_are_those_of_its_last_step(change):
    """The state is at the last step, and the model's file is not: finishing the run writes it again."""
    def measure():
        if Path("out", "training_state.pt").exists() and load_training_state("out")["step"] == 8:
            raise Broken  # the last evaluation

    main(Config(out="undisturbed"))
    interrupted(Config(), 3)
    older = weights()
    with pytest.raises(Broken):
        main(Config(resume=True), measure=measure)
    if change == "older":
        Path("out", "model.safetensors").write_bytes(older)
    else:
        Path("out", "model.safetensors").unlink()
    main(Config(resume=True))
    assert_same_run("out", "undisturbed")


def test_the_weights_in_the_folder_are_never_older_than_the_state(monkeypatch):
    """The state is written last. Where that fails, the folder holds the new weights and the old state."""
    def fail(folder, state):
        if state["step"] == 3:
            return training_state.save_training_state(folder, state)
        for name, tensor in load_safetensors(Path(folder, "model.safetensors")).items():
            assert torch.equal(tensor, state["models"][0][name])
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(run_file, "save_training_state", fail)
        with pytest.raises(Broken):
            main(Config())
    assert load_training_state("out")["step"] == 3
    main(Config(resume=True))
    main(Config(out="undisturbed"))
    assert_same_run("out", "undisturbed")


def test_other_settings_are_refused(capsys):
    interrupted(Config(), 3)
    message = one_line(main, Config(resume=True, lr=0.5, seed=1))
    assert message == ("--resume: the run in out had other settings: --seed 1 (it was 0), --lr 0.5 (it was 0.01); "
                       "give the same ones, or start again without --resume")
    capsys.readouterr()
    main(Config(resume=True, compile=False))
    assert "note: --compile False (it was by default): results may differ in the last bits" in capsys.readouterr().out


def change_data():
    Path("numbers.txt").write_text("1\n2\n", encoding="utf-8")
    return "numbers.txt"


def change_base():
    main(Config(out="base", max_steps=1, seed=9))
    return "base"


def change_chat_template():
    Path("base", "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return "base"


def change_tokenizer():
    Path("base", "tokenizer.json").write_text('{"other": 1}', encoding="utf-8")
    return "base"


@pytest.mark.parametrize("change", [change_data, change_base, change_tokenizer, change_chat_template])
def test_other_contents_are_refused(change):
    """The file names are the same; what is in the files is not."""
    main(Config(out="base", max_steps=1))
    interrupted(Config(model="base"), 3)
    before = listing("out")
    name = change()
    message = one_line(main, Config(model="base", resume=True))
    assert message.startswith(f"--resume: {name} changed since the run in out began")
    assert listing("out") == before


def test_a_run_goes_on_with_another_number_of_processes(monkeypatch):
    """The order of the data and the batch are those of the whole job. A state holds one generator for each process
    that there was; a second process, which has none, goes on with a seed of its own."""
    interrupted(Config(), 3)
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    run = Run(Config(resume=True), ["numbers.txt"])
    assert run.state["step"] == 3 and len(run.state["rng"]) == 1


def state_without(key):
    def change(state):
        del state[key]

    return change


def state_with(**changes):
    return lambda state: state.update(changes)


@pytest.mark.parametrize("change", [
    *map(state_without, ("step", "models", "optimizers", "loader", "rng", "before", "environment")),
    state_with(step="3"), state_with(step=-1), state_with(step=None), state_with(step=True),
    state_with(models=3), state_with(models=[]), state_with(models=[{}]), state_with(models=[3]),
    state_with(optimizers={}), state_with(optimizers=[{}]), state_with(optimizers=[[1]]),
    state_with(loader={}), state_with(loader=[]), state_with(loader={"epoch": "0", "taken": 0}),
    state_with(rng=[]), state_with(rng=[{}]), state_with(rng=[{"python": 1}]), state_with(rng=None),
    state_with(before=7), state_with(before=None), state_with(environment=0),
])
@pytest.mark.slow
def test_a_state_that_is_not_one_is_told_in_one_line(change):
    interrupted(Config(), 3)
    state = torch.load("out/training_state.pt", weights_only=True)
    change(state)
    torch.save(state, "out/training_state.pt")
    before = listing()
    assert "training_state.pt" in one_line(main, Config(resume=True))
    assert listing() == before


def test_a_damaged_state_is_told_in_one_line():
    """A flipped bit in the middle of the weights (the checksum shows it), or a part that is missing."""
    interrupted(Config(), 3)
    path = Path("out", "training_state.pt")
    whole = path.read_bytes()
    place_of_a_weight = whole.index(load_training_state("out")["models"][0]["model.norm.weight"].numpy().tobytes())
    flipped = bytearray(whole)
    flipped[place_of_a_weight] ^= 1
    for damaged in (bytes(flipped), whole[:-1000], whole[:100], b""):
        path.write_bytes(damaged)
        assert "training_state.pt is truncated or corrupted" in one_line(main, Config(resume=True))
    path.write_bytes(whole)
    main(Config(resume=True))


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_when_a_line_is_logged: `main(Config())` -> `main(Config(log_every=4))`. Which steps have a line?
# 2. test_sums_and_weighted_means: `run.add({"length": 2}, weight=3)` -> `run.add({"length": 2}, weight=1)`. What is
#    the mean length?
