"""Chapter 7, third part. A run that is killed, asked to stop, or spread over several processes.

After this chapter you know what each way to stop a run leaves on the disk, and what --resume makes of it.

Processes are killed for real. The toy stage is that of the second part; two tests use the real stages.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_sft
from minillm import interrupt, runtime, token_cache
from minillm import model as model_file
from minillm.config import _one_line as one_line
from minillm.errors import UserError
from minillm.optim import schedule, update
from minillm.training_state import load_training_state
from tests.helpers import close, in_processes, keep_states, start_script
from tests.test_07_training import ROOT, log, place, sft  # noqa: F401 (place is a fixture)
from tests.test_07b_run import (Config, assert_same_run, interrupted, logged, main, numbers, same,  # noqa: F401
                                summary, weights)

pytestmark = pytest.mark.slow  # all of this chapter

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks a process in which torch is loaded")


# ------------------------------------------------------------------------------------ killed

def child(work) -> int:
    """Run work() in a fork; returns how it ended. A UserError goes to the file "error", and the code is 3."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            code = 0
        except UserError as error:
            code = 3
            Path("error").write_text(str(error), encoding="utf-8")
        os._exit(code)
    return os.waitpid(pid, 0)[1]


def run_to(moment: int, out: str, events=None):
    """Run until this many moments have passed, and die. 0: never; the moments are written to the file `events`."""
    passed = []

    def at(name):
        passed.append(name)
        if events is not None:
            events.write(name + "\n")
            events.flush()
        if len(passed) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function):
        def call(source, target):
            at(f"before {os.path.basename(target)}")  # which is after the file before it
            return function(source, target)
        return call

    os.replace, Path.rename = around(os.replace), around(Path.rename)
    main(Config(out=out), lambda step, run: at(f"in step {step}"), lambda: at("evaluating"))
    at("after summary.json")


def beside_an_older_run(folder) -> str:
    os.mkdir(folder)
    shutil.copytree("older", f"{folder}/out")
    return f"{folder}/out"


def kill_everywhere():
    """A run beside an older one is recorded, then killed at each of its moments and resumed. In a process that has
    computed nothing, so that it may fork.
    """
    like_the_fixtures()
    assert child(lambda: main(Config(out="older", seed=5, max_steps=3))) == 0
    out = beside_an_older_run("recorded")
    with open("events.txt", "w", encoding="utf-8") as events:
        assert child(lambda: run_to(0, out, events)) == 0
    for moment in range(1, len(Path("events.txt").read_text(encoding="utf-8").splitlines()) + 1):
        out = beside_an_older_run(f"killed{moment}")
        assert child(lambda: run_to(moment, out)) == signal.SIGKILL
        code = child(lambda: main(Config(out=out, resume=True)))
        if code == 3 << 8 and "had other settings: --max_steps 8 (it was 3), --seed 0" in Path("error").read_text(
                encoding="utf-8"):
            code = child(lambda: main(Config(out=out)))  # OUT is still the older run
        assert code == 0, (moment, code)


@LINUX
def test_sigkill_at_any_moment_costs_no_bit(place):  # noqa: F811
    """A new run takes an older one's place. It is killed before each rename of a file or a folder, in each step, in
    each evaluation, and at the end. Resumed (or, before its first checkpoint, started again), it always ends as the
    undisturbed run does: state, weights, log and summary. The older run is whole, and nothing is left over."""
    in_processes(kill_everywhere, timeout=300)
    moments = Path("events.txt").read_text(encoding="utf-8").splitlines()
    assert moments.count("before model.safetensors") == moments.count("before training_state.pt") == 3  # checkpoints
    assert moments.count("before out.bak") == moments.count("before out") == moments.count("before summary.json") == 1
    assert moments.count("evaluating") == 3 and moments[-1] == "after summary.json"
    for number, moment in enumerate(moments, 1):
        folder = f"killed{number}"
        try:
            assert set(os.listdir(folder)) - {"out.lock"} == {"out", "out.bak"}  # a lock that nobody holds is harmless
            assert not list(Path(folder, "out").glob("*.tmp"))
            assert_same_run(f"{folder}/out", "recorded/out")
            assert weights(f"{folder}/out.bak") == weights("older") and summary(f"{folder}/out.bak") == summary("older")
        except AssertionError as error:
            raise AssertionError(f"killed at moment {number}, {moment}") from error


def like_the_fixtures():
    """In a process of its own: what the fixtures set."""
    torch.set_num_threads(1)
    token_cache.CACHE = Path("cache").absolute()
    keep_states()
    runtime.autocast = lambda device: contextlib.nullcontext()
    model_file.PRESETS["tiny"] = (32, 2, 2, 1, 16, 64)


# ------------------------------------------------------------------------------------ asked to stop

POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows sends no such signals")
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_saves_and_says_how_to_go_on(capsys, number, code):
    """It arrives in step 5, between two checkpoints: the step is finished and saved, and the run goes on to the bit."""
    def body(step, run):
        if step == 4:
            signal.raise_signal(number)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        main(Config(), body)
    assert stopped.value.code == code
    assert "saved after step 5 of 8; the same command with --resume continues" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not Path("out", "summary.json").exists() and not Path("out.lock").exists()
    main(Config(resume=True))
    assert "resuming after step 5 of 8" in capsys.readouterr().out
    main(Config(out="undisturbed"))
    assert_same_run("out", "undisturbed", logs=False)  # this one has a line after step 5


def test_a_signal_before_the_first_checkpoint_of_a_new_run():
    """Then this is its first checkpoint, and the new run takes the older one's place."""
    main(Config(seed=1))
    interrupted(Config(), 2)
    assert load_training_state("out")["step"] == 2 and summary("out.bak")["steps"] == 8
    main(Config(resume=True))
    main(Config(out="undisturbed"))
    assert_same_run("out", "undisturbed", logs=False)


ONCE_MORE = " this step is finished and saved first; another Ctrl-C ends the run at once"
LONG_RUN = [str(ROOT / "train_sft.py"), "--data", "sft.jsonl", "--tokenizer", "tokenizer.json", "--max_steps", "100000",
            "--batch_size", "1", "--device", "cpu", "--out", "out"]


def wait_for_a_step(still_runs):
    metrics_file, give_up = Path("out", "metrics.jsonl"), time.time() + 60
    while not metrics_file.exists() or not metrics_file.read_text(encoding="utf-8"):
        assert still_runs() and time.time() < give_up
        time.sleep(0.05)


def assert_saved_after_its_last_step(said):
    step = load_training_state("out")["step"]
    assert f"interrupted: saved after step {step} of 100000" in said and log("out")[-1]["step"] == step


@POSIX
def test_the_exit_code_of_a_real_command(place):  # noqa: F811
    """130 for Ctrl-C, as a shell expects of a program that it ends."""
    with subprocess.Popen([sys.executable, *LONG_RUN], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        try:
            wait_for_a_step(lambda: run.poll() is None)
            run.send_signal(signal.SIGINT)
            out, errors = run.communicate(timeout=60)
        finally:
            run.kill()
    chosen, *said = errors.splitlines()
    assert run.returncode == 130 and said == [ONCE_MORE], errors
    assert_saved_after_its_last_step(out)


@POSIX
def test_the_exit_code_after_sigterm(place):  # noqa: F811
    """143, of the same command in a fork that has PyTorch loaded."""
    run = start_script("said", *LONG_RUN)
    try:
        wait_for_a_step(run.is_alive)
        run.terminate()
        run.join(timeout=60)
    finally:
        run.kill()
    said = Path("said").read_text(encoding="utf-8")
    assert run.exitcode == 143 and "Traceback" not in said, said
    assert_saved_after_its_last_step(said)


@LINUX
def test_a_closed_terminal_asks_like_the_other_signals():
    """What is printed from then on would fail, and must not keep the run from saving. 129 is 128 + SIGHUP."""
    import pty

    def body(step, run):
        if step == 4:
            Path("there").touch()
            while os.isatty(1):
                time.sleep(0.01)
            print("the step goes on", flush=True)

    pid, terminal = pty.fork()
    if not pid:
        code = 1
        try:
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # in place of pytest's
            main(Config(), body)
        except SystemExit as error:
            code = error.code
        finally:
            os._exit(code)
    while not Path("there").exists():
        time.sleep(0.01)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert load_training_state("out")["step"] == 5 and log("out")[-1]["step"] == 5


@LINUX
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (HANGUP, 129)])
def test_a_signal_that_also_ends_the_reader_of_the_output(number, code):
    """In `python train_sft.py 2>&1 | tee log` Ctrl-C goes to both. tee ends at once, and what the run then prints
    fails. It saves all the same."""
    def body(step, run):
        run.progress.last_line = 0.0  # so that each step prints a line
        if step == 4:
            os.close(reader)
            signal.raise_signal(number)

    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.close(writer)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # in place of pytest's
            main(Config(log_every=1), body)
        except SystemExit as error:
            code = error.code
        finally:
            os._exit(code)
    os.close(writer)
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    assert load_training_state("out")["step"] == 5 and log("out")[-1]["step"] == 5


def test_a_second_ctrl_c_stops_at_once(monkeypatch, capfd):
    """The first one says so: the step may take minutes, or be compiled. But not its echo within a second: torchrun
    passes on a Ctrl-C that the terminal has sent to every process."""
    clock = iter([100.0, 100.2, 101.5])
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(interrupt.Interrupt, "ctrl_c", False)
    asked = interrupt.Interrupt()
    try:
        assert asked.requested() == 0
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert asked.requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        asked.close()
    assert capfd.readouterr().err == ONCE_MORE + "\n" and interrupt.Interrupt.ctrl_c


@LINUX
@pytest.mark.parametrize("error, line", [
    (KeyboardInterrupt(), "interrupted\n"),
    (RuntimeError("C++ compile error\n\nmore"), "interrupted (RuntimeError: C++ compile error)\n")])
def test_ctrl_c_waits_for_no_compiler_and_shows_no_traceback_of_one(capfd, monkeypatch, error, line):
    """A terminal sends it to the compiler too, whose end then is an error. And at its own end Python would wait for the
    threads in which PyTorch starts compilers. The program dies of the signal, so that a loop in a shell ends too."""
    monkeypatch.setattr(interrupt.Interrupt, "ctrl_c", True)

    def work():
        threading.Thread(target=time.sleep, args=(60,)).start()
        print("said before", end="")
        one_line(Config, type(error), error, None)

    began = time.monotonic()
    assert child(work) == signal.SIGINT and time.monotonic() - began < 30
    said = capfd.readouterr()
    assert said.out.endswith("said before") and said.err == line


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, HANGUP])
def test_a_signal_that_was_ignored_stays_ignored(number):
    """nohup does that to SIGHUP, and a shell script to the Ctrl-C of what it starts in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        asked = interrupt.Interrupt()
        signal.raise_signal(number)
        assert asked.requested() == 0
        asked.close()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


# ------------------------------------------------------------------------------------ several processes

def together():
    return sft(out="two", optimizer="adamw", lr=1e-4, weight_decay=0.0, batch_size=4)


def terminated(call, *arguments):
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    assert stopped.value.code == 143
    torch.distributed.barrier()  # the second process must not look for the state while the first still writes it


def one_of_two():
    """What each of the two processes does."""
    like_the_fixtures()
    rank = int(os.environ["RANK"])

    def interrupting(step, *rest):
        if step == 5 and rank == 1:  # one process alone is asked
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, *rest)

    def body(step, run):  # each process draws random numbers of its own number
        torch.rand(rank + 1)

    def interrupting_body(step, run):
        body(step, run)
        if step == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    cfg = together()
    for changes in ({}, {"out": "older", "max_steps": 1}, {"out": "older", "max_steps": 1, "seed": 5}):
        train_sft.main(replace(cfg, **changes))
    train_sft.schedule = interrupting
    terminated(train_sft.main, replace(cfg, out="stopped"))
    train_sft.schedule = schedule
    train_sft.main(replace(cfg, out="stopped", resume=True))

    main(Config(out="toys", batch_size=4), body)
    terminated(main, Config(out="stopped toys", batch_size=4), interrupting_body)
    main(Config(out="stopped toys", batch_size=4, resume=True), body)

    # Of three parameters the first has a gradient in the first process, the second in both, the third in none.
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2)) for _ in range(3)])
    for number in (1,) if rank else (0, 1):
        model[number].grad = torch.full((2,), float(rank + 1))
    runtime.sum_gradients(model.parameters())
    assert [p.grad if p.grad is None else p.grad.tolist() for p in model] == [[1.0, 1.0], [3.0, 3.0], None]
    for p in model:
        p.grad = None
    before = [p.detach().clone() for p in model]
    update(model, [torch.optim.AdamW(model.parameters())], 1.0)
    assert all(p.grad is None for p in model) and all(map(torch.equal, model, before))


def torchrun():
    """`torchrun --standalone --nproc_per_node 2`, except that its two processes are forks and need not load PyTorch."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d",
                                rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork"), one_of_two)()


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo")
def test_two_processes_train_like_one(place):  # noqa: F811
    """torchrun with two processes of two rows each, and one process of four: the same weights to 1e-5, the same log.
    Only the first process writes and prints. A signal to the second stops both at the same step, and both resume, each
    with its own random numbers. At the end of an epoch of nine numbers the second process has none, and the log of both
    is still that of one process."""
    (out,) = in_processes(torchrun)
    train_sft.main(replace(together(), out="one"))
    one, two = load_training_state("one"), load_training_state("two")
    for name, weight in one["models"][0].items():
        assert close(two["models"][0][name], weight)
    assert same([one["loader"], one["step"]], [two["loader"], two["step"]])
    for a, b in zip(logged("one"), logged("two"), strict=True):
        assert a["step"] == b["step"] and close(a["loss"], b["loss"])
    assert summary("one")["tokens"] == summary("two")["tokens"]

    said = out.splitlines()
    assert sum(line.startswith("step 10/10") for line in said) == 2  # two whole runs, not four
    assert sum("held an older run" in line for line in said) == 1 and Path("older.bak", "summary.json").exists()
    assert sum("interrupted: saved after step 6 of 10" in line for line in said) == 1
    assert "resuming after step 6 of 10" in said
    assert_same_run("two", "stopped", logs=False)

    # Four numbers a step, nine in an epoch: the mean of each is that of one process.
    main(Config(out="toy", batch_size=4))
    assert [entry["step"] for entry in log("toys")] == [1, 3, 5, 6, 8]
    for a, b in zip(logged("toy"), logged("toys"), strict=True):
        assert "val_loss" in a or close(a["number"], b["number"])
    first, second = load_training_state("toys")["rng"]
    assert not torch.equal(first["torch"], second["torch"])
    assert_same_run("toys", "stopped toys", logs=False)


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_a_polite_signal_saves_and_says_how_to_go_on: `if step == 4` -> `if step == 5`. After which step is it saved?
# 2. test_a_polite_signal_saves_and_says_how_to_go_on: `if step == 4` -> `if step == 7`. A signal in the last step: is
#    there anything to resume?
