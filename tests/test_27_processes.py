"""Chapter 27. Several processes: the same command gives the same result, however many processes share the work.

After this chapter you know what several processes must agree on so that their number does not matter, and how small the
difference is.

One job of several processes runs all stages one after the other; then this process runs them alone. The batches do not
divide by the number of processes: 5 rows, 3 pairs or 3 prompts for two processes, and at the end of an epoch a single
one.

    pytest tests/test_27_processes.py --processes 3 -s      all stages, and the table of differences for 3 processes
"""

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_dpo
import train_grpo
import train_lora
import train_ppo
import train_pretrain
import train_reward
import train_sft
from minillm import job, run, runtime, shard, token_cache
from minillm.checkpoint import load_model, save_model
from minillm.config import parse_config
from minillm.errors import UserError
from minillm.heads import RewardModel, save_reward_model
from minillm.interrupt import Interrupt
from minillm.model import Block
from minillm.run import Interrupted
from minillm.safetensors import load_safetensors
from minillm.tokenizer import Tokenizer, train_tokenizer
from minillm.training_state import load_training_state, save_training_state
from tests.helpers import close, in_processes, keep_states
from tests.test_22_train_grpo import ask, small_model, turn, write

pytestmark = pytest.mark.slow  # all of this chapter

ROOT = Path(__file__).parent.parent
TEXT = ["--model", "model", "--data", "text.jsonl", "--eval_data", "text.jsonl", "--batch_size", 5, "--epochs", 2]
CHATS = ["--model", "model", "--data", "chats.jsonl", "--eval_data", "chats.jsonl", "--batch_size", 3, "--epochs", 2]
PAIRS = ["--model", "model", "--data", "pairs.jsonl", "--eval_data", "pairs.jsonl", "--batch_size", 3, "--epochs", 2]
PROMPTS = ["--model", "model", "--data", "prompts.jsonl", "--eval_data", "asked.jsonl", "--max_new_tokens", 5,
           "--max_steps", 3, "--warmup_steps", 0, "--lr", 1e-3, "--grad_accum", 2]
GROUPS = [*PROMPTS, "--reward", "mine.py:letters", "--batch_size", 3, "--group_size", 4, "--num_minibatches", 2]
COMMON = ["--device", "cpu", "--max_seq_len", 64, "--log_every", 1, "--no-compile"]
STAGES = {
    "pretrain": (train_pretrain, [*TEXT, "--grad_accum", 2]),
    "pretrain adamw": (train_pretrain, [*TEXT, "--optimizer", "adamw"]),
    "sft": (train_sft, CHATS),
    "sft adamw": (train_sft, [*CHATS, "--optimizer", "adamw"]),
    "lora": (train_lora, [*CHATS, "--rank", 4, "--dropout", 0]),  # dropout differs from process to process
    "reward": (train_reward, PAIRS),
    "dpo": (train_dpo, [*PAIRS, "--beta", 0.1]),
    "ipo": (train_dpo, [*PAIRS, "--loss", "ipo"]),
    "grpo": (train_grpo, [*GROUPS, "--beta", 0.1, "--update_epochs", 2]),
    "dr_grpo": (train_grpo, [*GROUPS, "--loss", "dr_grpo"]),
    "dapo": (train_grpo, [*GROUPS, "--loss", "dapo"]),
    "grpo, one prompt": (train_grpo, [*GROUPS, "--batch_size", 1, "--group_size", 2]),  # the second has none
    "ppo": (train_ppo, [*PROMPTS, "--reward_model", "scorer", "--batch_size", 7, "--critic_steps", 1,
                        "--value_lr", 1e-3, "--num_minibatches", 3]),
    "ppo, one prompt": (train_ppo, [*PROMPTS, "--reward_model", "scorer", "--batch_size", 1, "--show_every", 1,
                                    "--max_steps", 1]),  # here too
}
QUICK = ["ppo", "ppo, one prompt"]  # without --processes; chapter 7c has SFT
SHARDED = ["pretrain adamw", "sft adamw", "lora", "dpo"]
LETTERS = '''
def letters(messages, answers, example):
    return [answer.count("e") + 0.1 * len(answer) for answer in answers]
'''


def make_inputs():
    """Models and data, in the working directory."""
    tokenizer = train_tokenizer(["It is red. It is blue."] * 3, 280)
    save_model("model", small_model(tokenizer), tokenizer)
    save_reward_model("scorer", RewardModel.from_lm(small_model(tokenizer, seed=1)), tokenizer)
    write(Path("text.jsonl"), [{"text": "It is red. " * n} for n in range(2, 23)])
    chats = [[turn("user", "Is it " + "blue " * n), turn("assistant", "It is " + "red " * (n % 5))]
             for n in range(1, 8)]
    write(Path("chats.jsonl"), [{"conversations": chat} for chat in chats])
    write(Path("pairs.jsonl"), [{"chosen": chat, "rejected": [chat[0], turn("assistant", "blue" * (n % 3 + 1))]}
                                for n, chat in enumerate(chats)])
    write(Path("prompts.jsonl"), [ask(letter * (i % 3 + 1) + "?", answer="red")
                                  for i, letter in enumerate("abcdefghi")])
    write(Path("asked.jsonl"), [ask(letter + "!", answer="red") for letter in "abcde"])
    Path("mine.py").write_text(LETTERS, encoding="utf-8")


def run_stage(name, out, *more):
    """A stage with its flags, in float32; it writes the folder out/name."""
    module, flags = STAGES[name]
    argv = [str(x) for x in (*COMMON, *flags, "--out", f"{out}/{name}", *more)]
    module.main(parse_config(module.Config, "", argv))


def run_all(out, names=STAGES):
    """Every stage."""
    for name in names:
        run_stage(name, out)


def stop(name, *more):
    """A stage that is asked to stop after two steps; writes stopped/."""
    steps, requested = iter([0, signal.SIGTERM]), Interrupt.requested
    Interrupt.requested = lambda self: next(steps)
    with contextlib.suppress(Interrupted):
        run_stage(name, "stopped", *more)
    Interrupt.requested = requested


def like_the_fixture():
    """In a process of its own: what the fixture `place` sets, and conftest.py."""
    torch.set_num_threads(1)
    runtime.cpu_has_bf16 = lambda: False
    token_cache.CACHE = Path("cache").absolute()
    keep_states()


def run_alike(out, names):
    """run_all in a process of its own."""
    like_the_fixture()
    run_all(out, names)


def run_or_stop(how: str, name):
    """The first or the second part of a run."""
    if how == "stop":
        stop(name)
    else:
        run_stage(name, "stopped", "--resume")


def stop_and_resume(name, *more):
    """A stage that is stopped after two steps, and goes on from a copy of what it left; writes stopped/ and sharded/.
    """
    with measure_whole(name):  # without the state of a resumed run, which is whole in main memory
        stop(name, *more)
    if runtime.rank() == 0:
        shutil.copytree(f"stopped/{name}", f"sharded/{name}")
    runtime.gather(None)
    run_stage(name, "sharded", *more, "--resume")


def large_matrices(module):
    """The embedding and the matrices of the MLPs: no part of one of them has the shape of another."""
    return [parameter for name, parameter in module.named_parameters() if "embed_tokens" in name or "mlp" in name]


def bytes_of(parameters, processes):
    """In float32; the rows are filled up to a multiple of the processes, which all get as many."""
    return sum(-(-len(parameter) // processes) * processes * parameter[0].numel() * 4 for parameter in parameters)


@contextlib.contextmanager
def measure_whole(name):
    """The most bytes that a process has in whole matrices of the model, and not in parts of them, after some layers
    that run without gradients and while a save gathers. Written to the file whole-RANK-NAME.
    """
    shapes = {tuple(parameter.shape) for parameter in large_matrices(load_model("model"))}
    most, gathered, left = 0, shard.gathered, {"layers": 12, "tensors": 12}  # each look takes a moment

    def measure(kind):
        nonlocal most
        left[kind] -= 1
        if left[kind] < 0:
            return
        gc.collect()
        matrices = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)
                    and x.dtype == torch.float32 and tuple(x.shape) in shapes]
        found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in matrices}
        most = max(most, sum(found.values()))

    def after_layer(module, *_):
        if isinstance(module, Block) and not torch.is_grad_enabled():
            measure("layers")

    def measured(value):
        result = gathered(value)
        if runtime.rank() > 0 and isinstance(value, torch.Tensor) and value.dim() == 2:
            measure("tensors")  # the first process gathers in main memory, which gloo calls its device
        return result

    hook = torch.nn.modules.module.register_module_forward_hook(after_layer)
    shard.gathered = measured
    try:
        yield
    finally:
        hook.remove()
        shard.gathered = gathered
        Path(f"whole-{runtime.rank()}-{name}").write_text(str(most))


def torchrun(processes, *argv):
    """Run this file's main with so many processes, and all that a user's command does."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           str(processes), "-m", "tests.test_27_processes", os.getcwd(), *argv], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    return done.stdout


def logged(folder):
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "resumed" not in line]


def largest_difference(one, many):
    """(of the logged values, of the weights): max |a - b| / (1 + |b|) between two runs."""
    numbers, tensors = [0.0], [0.0]
    for a, b in zip(logged(one), logged(many), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_s"}:
            if isinstance(a[key], (int, float)):
                numbers.append(abs(a[key] - b[key]) / (1 + abs(b[key])))
    first, second = load_training_state(one), load_training_state(many)
    assert first["loader"] == second["loader"] and first["step"] == second["step"]
    for a, b in zip(first["models"], second["models"], strict=True):
        for name, weight in a.items():
            tensors.append(((weight - b[name]).abs() / (1 + weight.abs())).max().item())
    return max(numbers), max(tensors)


# ------------------------------------------------------------------------------------ a process dies

def die(how: str):
    """What happens to the second process in the middle of its second step."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "hangs":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "out of memory":
        raise MemoryError
    raise UserError("mine.jsonl: cannot be read")


def start_process(how: str, rank: int, port: int) -> int:
    """Fork one of the two processes of a job that trains; returns its number. What it says is in said-RANK.txt."""
    if pid := os.fork():
        return pid
    said = os.open(f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    job.BEAT, job.SILENCE = 0.2, 10
    calls, update = [], train_sft.update

    def dying_update(*arguments):
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            die(how)
        update(*arguments)

    train_sft.update = dying_update
    try:
        sys.argv = ["train_sft.py", *map(str, (*COMMON, *CHATS, "--out", how))]
        train_sft.main(parse_config(train_sft.Config, ""))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(7)


def let_them_die(*ways: str):
    """Prints for each of these ways of dying: how the first process ended, and what both said. There is no torchrun
    here, which would end the first process when the second is gone: as on two machines.

    In a process that has computed nothing, so that it may fork.
    """
    like_the_fixture()
    make_inputs()
    for how in ways:
        store, began = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), time.time()
        pids = [start_process(how, rank, store.port) for rank in range(2)]
        _, status = os.waitpid(pids[0], 0)
        seconds = time.time() - began
        os.kill(pids[1], signal.SIGKILL)
        os.waitpid(pids[1], 0)
        said = "".join(Path(f"said-{rank}.txt").read_text(encoding="utf-8") for rank in range(2))
        print(json.dumps({"how": how, "code": os.waitstatus_to_exitcode(status), "seconds": seconds, "said": said}))


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo, forks")
def test_when_a_process_dies_the_others_end_and_one_line_says_why(tmp_path, monkeypatch, request):
    """In a moment where a connection breaks or another one fails; in SILENCE, here 10 seconds, where it only hangs."""
    ways = ("killed", "mistake", "hangs", "out of memory") if request.config.getoption("--processes") else ("killed",)
    monkeypatch.chdir(tmp_path)
    (said,) = in_processes(let_them_die, *ways, timeout=300)
    last = "the last checkpoint is whole, and the same command with --resume goes on from it"
    expected = {"killed": f"error: another process of this job has died, perhaps killed because memory ran out; {last}",
                "hangs": f"error: process 1 of this job gives no sign of life; {last}",
                "out of memory": "error: out of memory", "mistake": "error: mine.jsonl: cannot be read"}
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [case["how"] for case in found] == list(ways)
    for case in found:
        lines = [line for line in case["said"].splitlines() if "error" in line.lower() or "Traceback" in line]
        assert case["code"] == 1 and len(lines) == 1 and lines[0].startswith(expected[case["how"]]), case
        print(case["how"], round(case["seconds"], 1))


def stop_while_the_first_saves():
    """Prints whether the checkpoint was there when this process ended."""
    like_the_fixture()
    save = run.save_training_state

    def take_time(*arguments):
        time.sleep(0.5)
        save(*arguments)

    run.save_training_state = take_time
    stop("sft adamw")
    print("saved:", Path("stopped", "sft adamw", "training_state.pt").exists())


# ------------------------------------------------------------------------------------ the same numbers

@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")
    make_inputs()


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo")
def test_every_stage_gives_what_one_process_gives(place, request):
    """Losses, everything else that is logged, and weights, to 1e-5."""
    processes, names = request.config.getoption("--processes"), STAGES
    if not processes:
        processes, names = 2, QUICK
    in_processes(run_alike, "many", list(names), count=processes, timeout=300)
    print(f"\n{'stage':<20}{'steps':>6}{'logged values':>16}{'weights':>16}   one process against {processes}")
    run_all("one", names)
    for name in names:
        numbers, tensors = largest_difference(f"one/{name}", f"many/{name}")
        steps = load_training_state(f"one/{name}")["step"]
        print(f"{name:<20}{steps:>6}{numbers:>16.1e}{tensors:>16.1e}")
        assert numbers <= 1e-5 and tensors <= 1e-5, name
        before, after = (json.loads(Path(folder, name, "summary.json").read_text()) for folder in ("one", "many"))
        assert before["tokens"] == after["tokens"]


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo")
def test_who_is_asked_to_stop_waits_until_the_first_process_has_saved(place):
    """It ends with 143, and torchrun gives the others 30 seconds from then on."""
    said = in_processes(stop_while_the_first_saves, count=2)
    assert all("saved: True" in text for text in said), said


@pytest.mark.parametrize("cfg", [train_pretrain.Config(shard=True), train_sft.Config(shard=True),
                                 train_lora.Config(shard=True, peft="prefix")])
def test_what_cannot_be_sharded_is_refused_before_anything_is_read(cfg):
    """Muon, the default of pretraining and SFT, and what has no LoRA; with AdamW the same command is accepted."""
    with pytest.raises(UserError, match="--shard: .* give (--optimizer adamw|another --peft)"):
        shard.prepare(cfg)
    shard.prepare(train_pretrain.Config(shard=True, optimizer="adamw"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what Linux says about the process")
def test_what_is_to_be_split_stays_in_its_file_until_then(place):
    """So the main memory that a process needs is that of its own part, and of one layer."""
    def mapped():
        return {name for name in ("model.safetensors", "training_state.pt")
                if name in Path("/proc/self/maps").read_text(encoding="utf-8")}

    save_model("half", load_model("model"), Tokenizer.load("model"), "bfloat16")
    model = load_model("half", mapped=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.held_in for parameter in model.parameters()} == {torch.float32}
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1  # the file
    assert mapped() == {"model.safetensors"}
    del model
    save_training_state("half", {"step": 1, "moments": torch.ones(1000)})
    state = load_training_state("half", mapped=True)
    assert state["moments"].sum() == 1000 and mapped() == {"training_state.pt"}
    del state
    gc.collect()
    assert mapped() == set()


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo")
def test_a_sharded_run_gives_what_one_process_gives(place, request):
    """Stopped and resumed, as processes that split the model or as one that holds it all. It takes half a minute.

    No process ever has more of the model whole than two parts: embedding and head, and one layer.
    """
    processes = request.config.getoption("--processes")
    if not processes:
        pytest.skip("run with --processes 2, as .ci/run does")
    torchrun(processes, "sharded", *SHARDED)
    model = load_model("model")
    layer, everything = (bytes_of(large_matrices(module), processes)
                         for module in (model.model.layers[0], model))
    two_parts = everything - (len(model.model.layers) - 1) * layer
    for name in SHARDED:
        run_stage(name, "one")
        run_stage(name, "stopped", "--resume")  # by one process, not sharded
        for other in ("sharded", "stopped"):
            assert max(largest_difference(f"one/{name}", f"{other}/{name}")) <= 1e-5, (name, other)
        weights = [load_safetensors(next(Path(folder, name).glob("*model.safetensors")))
                   for folder in ("one", "sharded")]
        assert weights[0].keys() == weights[1].keys()
        for key, weight in weights[0].items():
            close(weights[1][key], weight)
        whole = [int(Path(f"whole-{rank}-{name}").read_text()) for rank in range(processes)]
        print(f"{name:<20}{max(whole):>10,} of {everything:,} bytes at most; two parts: {two_parts:,}")
        assert layer < max(whole) <= two_parts < everything


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo")
@pytest.mark.parametrize("first, then", [(1, 3), (3, 1), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(place, request, first, then):
    """Stopped after two steps, and resumed: the same weights, to 1e-5, as of one process that nothing stopped."""
    if not request.config.getoption("--processes"):
        pytest.skip("run with --processes 2, as .ci/run does")
    names = [name for name in STAGES if name not in ("grpo, one prompt", "sft adamw", "pretrain adamw")]
    for processes, job_name in ((first, "stop"), (then, "resume")):
        if processes > 1:
            torchrun(processes, job_name, *names)
        else:
            for name in names:
                run_or_stop(job_name, name)
    for name in names:
        run_stage(name, "one")
        numbers, tensors = largest_difference(f"one/{name}", f"stopped/{name}")
        print(f"{name:<20}{first} -> {then}{numbers:>16.1e}{tensors:>16.1e}")
        assert numbers <= 1e-5 and tensors <= 1e-5, name


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    like_the_fixture()
    if sys.argv[2] == "sharded":
        for stage in sys.argv[3:]:
            stop_and_resume(stage, "--shard")
    elif sys.argv[2] in ("stop", "resume"):
        for stage in sys.argv[3:]:
            run_or_stop(sys.argv[2], stage)


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_every_stage_gives_what_one_process_gives: `numbers <= 1e-5` -> `numbers <= 0`. Is the log the same to the
#    last bit, too?
# 2. test_every_stage_gives_what_one_process_gives: `processes, names = 2, QUICK` -> `processes, names = 3, QUICK`.
#    The batches divide by 3: do the numbers differ less?
