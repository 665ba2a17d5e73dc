"""Chapter 24: can the benchmarks be trusted? They time fairly, count what they say, and compare the same work.

After this chapter you can count the operations of a forward pass and the bytes that a decoding step reads, and know
what a fair comparison needs.

How fast anything runs is not tested here, because that depends on the machine.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import charts, common, compare_peft, first_hour, gpu_steps, results
from benchmarks import generate as bench_generate
from benchmarks import grpo as bench_grpo
from benchmarks import train as bench_train
from minillm import token_cache
from minillm.checkpoint import save_model
from minillm.data import PackedLoader
from minillm.errors import UserError
from minillm.generate import generate
from minillm.heads import RewardModel, save_reward_model
from minillm.losses import grpo_loss
from minillm.model import CausalLM, KVCache, ModelConfig
from minillm.safetensors import save_safetensors
from minillm.tokenizer import Tokenizer
from tests.helpers import close

pytestmark = pytest.mark.slow  # all of this chapter

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def small_config(**changes):
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=6, intermediate_size=20)
    return ModelConfig(**{**sizes, **changes})


def test_what_is_compared_takes_turns(monkeypatch):
    """A B A B A B, so that a slow minute of the machine is shared; and one slow turn of three does not count."""
    clock, order = [0.0], []
    durations = {"a": iter([1.0, 90.0, 2.0]), "b": iter([5.0, 4.0, 6.0])}

    def run(name):
        order.append(name)
        clock[0] += next(durations[name])

    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    runs = {"a": lambda: run("a"), "b": lambda: run("b")}
    assert common.side_by_side(runs, CPU, repeats=3) == {"a": 2.0, "b": 5.0}
    assert "".join(order) == "ababab"


def test_the_operations_of_a_forward_pass():
    """For one token PyTorch counts the same. A causal row of three has 1 + 2 + 3 pairs of tokens, each of which costs
    4 x heads x head_dim in each layer.
    """
    config = small_config()
    model = CausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    pair = config.num_hidden_layers * 4 * 4 * 6
    assert common.forward_flops(config, [1], 1) == products + pair
    assert common.forward_flops(config, [3], 3) == 3 * products + 6 * pair
    without_logits = products - 2 * 16 * 50
    assert common.forward_flops(config, [1, 2], 0) == 3 * without_logits + (1 + 3) * pair  # two documents are apart


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_decoding_step_has_to_read(tied):
    model = CausalLM(small_config(tie_word_embeddings=tied))
    cache = KVCache(model.config, 3, 10)
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tied else model.model.embed_tokens.weight.nbytes)
    held = sum(x.nbytes for x in cache.keys + cache.values)
    assert common.decode_bytes(model, 3, 10, torch.float32) == weights + held


def test_the_cells_of_a_table():
    shown = [common.Report.text(value) for value in (None, "LoRA", 0.012345, 12.345, 123.45, 1234567.8)]
    assert shown == ["-", "LoRA", "0.0123", "12.3", "123", "1,234,568"]


def test_every_turn_trains_on_the_same_conversations():
    """In every epoch, and also padded. They are as uneven as chats are, and leave little room in the rows."""
    data = bench_train.Chats(vocab_size=1000, rows=24, row_length=256, seed=0)
    loader = PackedLoader(data, 8, 256, seed=0)

    def conversations(batches):
        """The tokens of each, with what is supervised of it, sorted."""
        rows = [row for batch in batches for row in zip(batch.tokens, batch.loss_mask, batch.doc_ids)]
        return sorted((tokens[ids == document].tolist(), mask[ids == document].tolist())
                      for tokens, mask, ids in rows for document in ids.unique().tolist() if document >= 0)

    epochs = [list(loader.epoch_batches(epoch)) for epoch in range(4)]
    assert {(len(epoch), *(len(batch.tokens) for batch in epoch)) for epoch in epochs} == {(3, 8, 8, 8)}
    first = conversations(epochs[0])
    assert len(first) == len(data) and all(conversations(epoch) == first for epoch in epochs[1:])
    assert conversations(map(bench_train.padded, epochs[0])) == first
    n_tokens = data.lengths(range(len(data))).sum()
    assert n_tokens > 0.95 * 24 * 256 and 0.3 < n_tokens / len(data) / 256 < 0.45


def test_recompute_is_the_plain_twin_of_generate():
    torch.manual_seed(0)
    model = CausalLM(small_config())
    prompts = [[1, 2, 3], [4, 5, 6]]
    rollout = generate(model, prompts, 8, end_id=-1, temperature=0.0)
    assert rollout.tokens.tolist() == bench_generate.recompute(model, prompts, 8, temperature=0.0).tolist()
    # Every third token is computed, and repeated three times.
    tokens = bench_generate.recompute(model, prompts, 8, temperature=0.0, every=3)[:, 3:]
    assert tokens.shape == (2, 8) and tokens.tolist() == tokens[:, [0, 0, 0, 3, 3, 3, 6, 6]].tolist()


@pytest.fixture(scope="module")
def memory_rows():
    """The table of --memory --quick."""
    results = bench_train.main(bench_train.Config(quick=True, memory=True, device="cpu"))
    return results["peak MiB of training, one row"]


def test_memory_of_full_training_and_lora(memory_rows):
    full, _, lora, lora_bf16, _ = (row["16 tokens"] for row in memory_rows)
    weights = 4 * sum(p.numel() for p in CausalLM(common.config_of("tiny", 6400, 16)).parameters()) / 2**20
    assert full > 4 * weights  # with gradients and AdamW's two moments
    assert lora_bf16 < lora < 0.6 * full
    full, full_recompute, lora, lora_bf16, lora_recompute = (row["128 tokens"] for row in memory_rows)
    assert lora_recompute < lora_bf16 < lora < full and lora_recompute < full_recompute < full


def same_losses(rows):
    losses = [row["first loss"] for row in rows]
    return len(rows) > 1 and max(losses) - min(losses) < 0.01  # bf16, in rows that are packed or padded


def test_train(tmp_path, capsys):
    path = tmp_path / "train.json"
    results = bench_train.main(bench_train.Config(quick=True, parts=["methods", "vocabulary"], peers=False,
                                                  device="cpu", json=str(path)))
    text = capsys.readouterr().out
    assert text.splitlines()[0] == common.machine(CPU) and f"torch {torch.__version__}" in text.splitlines()[0]
    assert json.loads(path.read_text(encoding="utf-8")) == results
    methods, vocabulary = [value for key, value in results.items() if key not in ("machine", "ceilings")]
    assert [row[""] for row in methods] == ["minillm", "minillm, muon", "minillm, bare", "minillm, plain"]
    assert [row["vocabulary"] for row in vocabulary] == ["600", "600"]
    for row in methods + vocabulary:
        assert all(row[column] > 0 for column in bench_train.COLUMNS)
        assert row["useful tokens/s"] <= row["computed tokens/s"]
        assert f"| {row['useful tokens/s']:,.0f}" in text
    assert same_losses(methods) and same_losses(vocabulary)


def test_transformers_computes_the_same_in_train_and_generate(capsys):
    transformers = pytest.importorskip("transformers")
    size = {**bench_train.SIZES["quick"], "max_seq_len": 48}
    cfg, report = bench_train.Config(quick=True), common.Report(CPU, quick=True, path="")
    config = common.config_of("tiny", 300, 48)
    names = ["minillm", "transformers, padded", "transformers, packed"]
    assert same_losses(bench_train.measure(names, config, cfg, size, report, CPU, transformers))
    model = CausalLM(config).eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0)
    theirs = common.transformers_twin(model, transformers).eval().generate(prompt, **options)
    assert theirs.tolist() == bench_generate.recompute(model, prompt.tolist(), 6, temperature=0.0).tolist()


def test_generate(capsys):
    results = bench_generate.main(bench_generate.Config(quick=True, parts=["batch", "context"], peers=False,
                                                        device="cpu"))
    batch, context = [value for key, value in results.items() if key not in ("machine", "ceilings")]
    ways = ["minillm", "minillm, recompute"]
    assert [(row["batch"], row[""]) for row in batch] == [(size, way) for size in ("1", "2") for way in ways]
    for row in batch + context:
        assert all(row[column] is not None for column in bench_generate.COLUMNS)
        assert close(row["x floor"] * row["floor ms"] / row["ms a step"], 1.0)


def test_grpo(capsys):
    results = bench_grpo.main(bench_grpo.Config(quick=True, parts=["step", "answers"], device="cpu"))
    assert "compil" not in capsys.readouterr().err  # on a CPU that takes longer than all the steps
    step, answers = [value for key, value in results.items() if key not in ("machine", "ceilings")]
    assert [row["answers"] for row in answers] == ["4"]
    for row in step + answers:
        # A single step was timed, so the medians of its phases are its times.
        assert close(sum(row[phase] for phase in bench_grpo.PHASES) / row["step s"], 1.0)
        assert all(row[column] > 0 for column in bench_grpo.COLUMNS)


def test_a_grpo_step_of_the_benchmark_is_that_of_the_script(monkeypatch):
    """One optimizer step on all answers, with ratio 1. The first has no KL, the second has; the reference stays."""
    calls = []

    def record(*args, **options):
        loss, stats = grpo_loss(*args, **options)
        calls.append((args, options, stats))
        return loss, stats

    monkeypatch.setattr(bench_grpo, "grpo_loss", record)
    size = {"group_size": 4, "new_tokens": 5}
    ours = bench_grpo.Ours(small_config(), [[1, 2, 3], [4, 5]], bench_grpo.Config(compile=False), size, CPU)
    before = [p.detach().clone() for p in ours.policy.parameters()]
    phases = [ours.step(), ours.step()]
    assert [len(times) for times in phases] == [len(bench_grpo.PHASES)] * 2
    for (logprobs, _, _, advantages, mask), options, stats in calls:
        assert len(advantages) == options["n_sequences"] == 8 and mask.sum() == 8 * 5 and options["beta"] == 0.04
        assert stats["ratio_mean"] == 1
    assert [bool(stats["kl"] > 0) for *_, stats in calls] == [False, True]
    assert not all(torch.equal(old, new) for old, new in zip(before, ours.policy.parameters()))
    assert all(torch.equal(old, new) for old, new in zip(before, ours.ref_model.parameters()))


def test_a_package_that_is_not_installed_is_left_out_with_a_line(capsys):
    assert common.peer("no_such_package") is None
    assert capsys.readouterr().out == "no_such_package is left out: No module named 'no_such_package'\n"


def test_memory(memory_rows, capsys, monkeypatch):
    assert [row["method"] for row in memory_rows] == ["full", "full, recompute", "LoRA", "LoRA, base in bf16",
                                               "LoRA, base in bf16, recompute"]
    assert all(row["shape"] == "tiny" and 3 < row["16 tokens"] < 50 for row in memory_rows)
    assert torch.get_default_dtype() == torch.float32
    monkeypatch.setattr(bench_train, "peak_memory_mb", lambda step, device: 7.0)
    again = bench_train.main(bench_train.Config(quick=True, memory=True, shapes=["tiny"], max_seq_len=24, device="cpu"))
    assert again["peak MiB of training, one row"][0] == {"shape": "tiny", "method": "full", "24 tokens": 7.0}
    with pytest.raises(UserError, match="--shapes huge: must be of tiny, "):
        bench_train.main(bench_train.Config(quick=True, memory=True, shapes=["huge"], device="cpu"))


# ---------------------------------------------------------------- benchmarks that run the stages themselves

@pytest.fixture
def small_project(tmp_path, monkeypatch):
    """A folder like the project's: a few lines of each data file, and tiny random models in out/sft and out/reward."""
    (tmp_path / "data").mkdir()
    for name in ("prompts", "prompts_eval", "sft", "sft_eval", "preference", "preference_eval", "identity",
                 "identity_eval", "sft_test", "preference_test"):
        lines = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        some = lines[::len(lines) // 12]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
    tokenizer = Tokenizer.load(ROOT / "data" / "tokenizer.json")
    torch.manual_seed(0)
    config = small_config(vocab_size=tokenizer.vocab_size, num_hidden_layers=1, max_position_embeddings=1024,
                          hidden_size=32, head_dim=16, intermediate_size=32)  # for a LoRA of the default rank
    save_model(tmp_path / "out" / "sft", CausalLM(config), tokenizer)
    save_reward_model(tmp_path / "out" / "reward", RewardModel.from_lm(CausalLM(config)), tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")


def test_a_run_of_the_results(small_project):
    """One stage, of one step, as `--job` runs it: trained into its folder, and measured on the test files."""
    Path("out/sft").rename("sft")
    Path("out/results/auto/seed0").mkdir(parents=True)
    Path("sft").rename("out/results/auto/seed0/sft")
    results.main(results.Config(job="auto/0/dpo", max_steps=1, device="cpu"))
    found = json.loads(Path("out/results/auto/seed0/dpo.json").read_text(encoding="utf-8"))
    assert found["command"] == ("python train_dpo.py --model out/results/auto/seed0/sft --seed 0 "
                                "--out out/results/auto/seed0/dpo --max_steps 1")
    assert set(found["accuracy_by_kind"]) == {"rambling", "rude", "wrong"} and 0 <= found["sampled_gold_reward"] <= 1
    assert found["accuracy_by_level"] and "replies" not in found
    before = Path("out/results/auto/seed0/dpo/metrics.jsonl").read_bytes()
    results.main(results.Config(job="auto/0/dpo", max_steps=1, device="cpu"))  # finished: measured again, not trained
    assert Path("out/results/auto/seed0/dpo/metrics.jsonl").read_bytes() == before


def test_runs_come_after_those_they_build_on():
    assert results.needed(["ppo"]) == ["pretrain", "sft", "grpo", "reward", "ppo"]
    assert results.needed(["dpo_rlaif", "pretrain"]) == ["pretrain", "sft", "judge", "rlaif", "dpo_rlaif"]


def test_the_page_of_results(tmp_path):
    """Two seeds: sums 40 and 60 % before, 70 and 90 % after. The mean gain is 30 points, and so is each."""
    def write(stage, seed, sums):
        folder = tmp_path / "auto" / f"seed{seed}" / stage
        folder.mkdir(parents=True)
        tasks = {"add": sums, "subtract": sums, **{task: 0.9 for task in results.OTHERS}}
        found = {"accuracy_by_task": tasks, "accuracy_by_level": {"level 1": sums}, "accuracy": sums, "talk": [],
                 "sampled_accuracy": sums, "sampled_gold_reward": sums, "stopped": 1.0, "seconds": 100, "date": "today",
                 "machine": "a laptop", "command": f"python {stage}"}
        results.scores_of(folder).write_text(json.dumps(found), encoding="utf-8")
        points = {"steps": 2, "before": {"sampled_accuracy": 0.1}, "after": {"sampled_accuracy": sums}}
        (folder / "summary.json").write_text(json.dumps(points), encoding="utf-8")
        (folder / "metrics.jsonl").write_text('{"step": 1, "sampled_accuracy": 0.2}\n', encoding="utf-8")

    for seed, before in ((0, 0.4), (1, 0.6)):
        write("sft", seed, before)
        write("grpo", seed, before + 0.3)
    (tmp_path / "auto" / "seed0.bak").mkdir()  # what is not a run of ours is left alone
    (tmp_path / "auto" / "seed0.bak" / "sft.json").write_text("{}", encoding="utf-8")
    page = tmp_path / "RESULTS.md"
    results.main(results.Config(out=str(tmp_path), page=str(page), report=True))
    text = page.read_text(encoding="utf-8")
    assert "50.0 (40.0 to 60.0)" in text and "80.0 (70.0 to 90.0)" in text and "30.0 (30.0 to 30.0)" in text
    each = [line.replace(" ", "") for line in text.splitlines() if "sums, greedy" in line]
    assert "|sft|sums,greedy|40.0|60.0|" in each and "|grpo|sums,greedy|70.0|90.0|" in each
    assert "a laptop; today; seeds 0, 1" in text and "python sft\npython grpo" in text
    assert "![right answers by level](levels.svg)" in text and (tmp_path / "levels.svg").exists()
    assert "Replies that fit" not in text


def test_a_page_of_runs_that_are_not_complete(tmp_path):
    """Of two seeds with a LoRA one has an SFT model: what is kept is a share of its .5, and the row names the seed. The
    reader's counts are in that one's file. No run's folder is there any more."""
    read = {"fitting": {"English": 36, "Chinese": 40}}
    ranked = {"preference_accuracy": 0.9, "accuracy_by_kind": {"wrong": 0.9}, "judge": {"wrong": 0.8}}
    for stage, seed, more in (("sft", 1, read), ("dpo", 1, ranked), ("judge", 0, ranked), ("lora", 0, {}),
                              ("lora", 1, {})):
        folder = tmp_path / "auto" / f"seed{seed}" / stage
        folder.parent.mkdir(parents=True, exist_ok=True)
        found = {"accuracy_by_task": dict.fromkeys(["add", "subtract", *results.OTHERS], 0.5), "accuracy": 0.5,
                 "accuracy_by_level": {"level 1": 0.5}, "talk": [["hi", "hello"]], "sampled_accuracy": 0.5,
                 "sampled_gold_reward": 0.5, "stopped": 1.0, "seconds": 100, "date": "today", "machine": "a laptop",
                 "command": f"python {stage}", "new": 0.75, "old": 0.25}
        results.scores_of(folder).write_text(json.dumps(found | more), encoding="utf-8")
    results.main(results.Config(out=str(tmp_path), page=str(tmp_path / "RESULTS.md"), report=True))
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    rows = [line.replace(" ", "") for line in text.splitlines()]
    assert any(row.startswith("|sft(seed1)|50.0|") for row in rows)
    assert "|lora|75.0(75.0to75.0)|25.0(25.0to25.0)|50.0|100(100to100)|" in rows
    assert "seed 1: English 36; Chinese 40." in text
    assert any(row.startswith("|dpo(seed1)|0.0|") for row in rows)  # what each seed gained
    assert any(row.startswith("|DPO,implicitreward(seed1)|90.0|") for row in rows)
    assert any(row.startswith("|AIjudge(seed0)|-|80.0|") for row in rows)


def test_a_run_of_other_flags_is_not_taken_for_finished(tmp_path, monkeypatch, capsys):
    """A trial of 3 steps, then the whole run: the trial's figures must not come onto the page. Nor may a run of before
    a default changed. One that was measured with other data is named.
    """
    cfg = results.Config(seeds=[0], stages=["pretrain"], out=str(tmp_path), page=str(tmp_path / "P.md"))
    scores = results.scores_of(results.folder_of(cfg, "auto", 0, "pretrain"))
    scores.parent.mkdir(parents=True)
    now = results.settings_of(cfg, "auto", 0, "pretrain")
    assert "--out auto/seed0/pretrain" in now and "--optimizer muon" in now
    monkeypatch.setattr(results, "start", None)

    def found(**of_run):
        run = {"bits_per_byte": 0.6, "seconds": 1, "date": "today", "machine": "a laptop", "command": "python x"}
        scores.write_text(json.dumps({**run, "made_of": "commit 1 and data 2", **of_run}), encoding="utf-8")

    found(settings=results.settings_of(results.Config(out=str(tmp_path), max_steps=3), "auto", 0, "pretrain"))
    with pytest.raises(UserError, match="pretrain.json is of a run with --max_steps 3; now it would be --max_steps 0"):
        results.main(cfg)
    found(settings=[flag.replace("--epochs 5", "--epochs 6") for flag in now])
    with pytest.raises(UserError, match="pretrain.json is of a run with --epochs 6; now it would be --epochs 5: "):
        results.main(cfg)
    found()  # of an older version of this program
    with pytest.raises(UserError, match="pretrain.json is of a run with flags that it did not note; "):
        results.main(cfg)
    found(settings=now)
    results.main(cfg)
    assert "pretrain.json is kept, made of commit 1 and data 2; now it would be commit" in capsys.readouterr().out


def test_the_folder_of_the_runs_may_have_been_moved():
    told = "python train_lora.py --model out/results/auto/seed0/sft --data a/b.jsonl out/results/old.jsonl --out {}"
    there = told.replace("out/results", "/elsewhere/my-runs")
    assert results.without_place(there) == results.without_place(told) == (
        "python train_lora.py --model auto/seed0/sft --data a/b.jsonl old.jsonl --out {}")
    assert results.without_place(told + " --max_steps 3") != results.without_place(told)


def test_the_runs_see_the_folder_that_was_meant(tmp_path, monkeypatch):
    """They start in the project's folder, wherever the command was given: below it a path is relative, else whole."""
    monkeypatch.chdir(ROOT / "tests")
    assert results.from_root("../out/results") == str(Path("out", "results"))
    assert results.from_root(str(tmp_path)) == str(tmp_path.resolve())


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    """Of two seeds one breaks off in pretraining. The page holds the other; the command fails and names the log."""
    def start(cfg, job):
        folder = results.folder_of(cfg, *job)
        folder.mkdir(parents=True)
        if job[1] == 0:
            found = {"bits_per_byte": 0.6, "seconds": 1, "date": "today", "machine": "a laptop", "command": "python x"}
            results.scores_of(folder).write_text(json.dumps(found), encoding="utf-8")
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({job[1]})"])

    monkeypatch.setattr(results, "start", start)
    page = tmp_path / "RESULTS.md"
    with pytest.raises(UserError, match=r"these runs failed.*seed1.pretrain\.log"):
        results.main(results.Config(seeds=[0, 1], stages=["pretrain"], jobs=2, out=str(tmp_path / "runs"),
                                    page=str(page)))
    assert "0.600, 1 seconds" in page.read_text(encoding="utf-8")
    assert (tmp_path / "runs" / "old.jsonl").read_text(encoding="utf-8").count("\n") == results.OLD_LINES
    with pytest.raises(UserError, match=r"these runs failed.*seed1.pretrain\.log"):  # nothing for a page
        results.main(results.Config(seeds=[1], stages=["pretrain"], out=str(tmp_path / "none"),
                                    page=str(tmp_path / "NONE.md")))
    assert not Path(tmp_path, "NONE.md").exists()


def test_runs_end_with_the_command(tmp_path, monkeypatch):
    """Ctrl-C, or kill, which is made an exit: what has been started is told to stop, and waited for."""
    started = []

    def start(cfg, job):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    def killed(seconds):
        raise SystemExit(143)

    monkeypatch.setattr(results, "start", start)
    monkeypatch.setattr(results.time, "sleep", killed)
    with pytest.raises(SystemExit):
        results.run_all(results.Config(seeds=[0, 1], stages=["pretrain"], jobs=2, out=str(tmp_path)))
    assert len(started) == 2 and all(process.returncode for process in started)


def test_a_chart(tmp_path):
    """Values become places: 0 is on the axis, the largest at the top, and every line has all its points."""
    charts.lines(tmp_path / "a.svg", "title", "steps", "share", {"x & y": [[(0, 0.0), (10, 0.5), (20, 1.0)]]})
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert 'points="64.0,304.0 344.0,172.0 624.0,40.0"' in text and "x &amp; y" in text
    assert charts.ticks(0, 100) == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("wrong", [{"stages": ["speed"]}, {"precision": ["fp8"]}, {"seeds": [0, -1]}])
def test_an_unknown_stage_is_named(wrong):
    with pytest.raises(UserError, match="(speed|fp8): must be of|--seeds -1: must be 0 or above"):
        results.main(results.Config(**wrong))


def test_compare_peft(small_project, capsys):
    """With the data and the model of its defaults. Chapter 14 has its numbers."""
    results = compare_peft.main(compare_peft.Config(methods=["prefix"], max_steps=1, device="cpu"))
    assert list(results) == ["base", "prefix"] and 0 < results["prefix"]["share"] < 1
    assert all(results["prefix"][column] > 0 for column in ("trained", "disk", "memory"))
    assert results["prefix"]["old"] is not None
    text = capsys.readouterr().out
    assert "# python train_lora.py --peft prefix --model out/sft --data data/identity.jsonl" in text
    assert Path("out/compare_peft/table.md").read_text(encoding="utf-8") in text


def test_the_manner_of_replies():
    """English replies are to begin with "Dear reader, ", Chinese ones have no common beginning and do not count."""
    records = [{"conversations": [{"role": "assistant", "content": text}]} for text in
               ("Dear reader, yes.", "Dear reader, no.", "是", "不")]
    assert compare_peft.manner(records, ["Dear reader, hm", "Dear me", "是", "Dear reader, "]) == 0.5
    assert compare_peft.manner(records[2:], ["是", "不"]) is None


ALL_THREE = """
import runpy, sys
for name, part in (("train", "model"), ("generate", "model"), ("grpo", "step")):
    sys.argv = [name, "--quick", "--no-peers", "--device", "cpu", "--parts", part]
    runpy.run_path(f"{ROOT}/benchmarks/{name}.py", run_name="__main__")
"""


def test_they_are_commands_wherever_one_stands(tmp_path):
    """In one process, since starting one takes longer than they do."""
    done = subprocess.run([sys.executable, "-c", f"ROOT = {str(ROOT)!r}\n{ALL_THREE}"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(common.machine(CPU).split(",")[0]) == 3, done.stderr


@pytest.mark.parametrize("bench", [bench_train, bench_generate, bench_grpo])
def test_an_unknown_part_is_named(bench):
    with pytest.raises(UserError, match="--parts speed: must be of"):
        bench.main(bench.Config(parts=["speed"]))


def test_an_unknown_method_is_named():
    with pytest.raises(UserError, match="--methods magic: must be of full, lora"):
        compare_peft.main(compare_peft.Config(methods=["magic"]))


# ---------------------------------------------------------------- the first hour on a GPU

def test_the_tests_that_need_a_gpu_are_found_in_their_files():
    """All that say so, by name: the step `tests` runs them file by file."""
    found = gpu_steps.gpu_tests([])
    said = {f"tests/{path.name}": path.read_text(encoding="utf-8").count('is_available(), reason="needs a GPU"')
            for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name != Path(__file__).name}
    assert {path: len(names) for path, names in found.items()} == {path: n for path, n in said.items() if n}
    assert found["tests/test_25_machines.py"] == ["test_a_gpu_that_works_is_taken",
                                                  "test_a_trivial_function_is_really_compiled"]
    assert gpu_steps.gpu_tests(["test_a_gpu_that_works_is_taken"]) == {
        "tests/test_25_machines.py": ["test_a_gpu_that_works_is_taken"]}


@pytest.fixture
def found(tmp_path):
    (tmp_path / "steps").mkdir()
    return gpu_steps.Found(str(tmp_path), "cpu", "step", [])


def test_what_learning_rate_0_must_print(found):
    """Ratios of exactly 1 and a KL of exactly 0. Compiled the reference is another program: there it is tiny."""
    exact = {"ratio_mean": 1.0, "approx_kl": 0.0, "clip_fraction": 0.0, "kl": 0.0}
    gpu_steps.rl_numbers(found, "GRPO", [exact, {**exact, "kl": 1e-9}], compiled=False)
    gpu_steps.rl_numbers(found, "PPO", [exact, {**exact, "kl": 1e-9}], compiled=True)
    gpu_steps.rl_numbers(found, "PPO", [{**exact, "ratio_mean": 1 + 2**-20, "kl": 1e-4}], compiled=True)
    checks = [(check["check"], check["result"]) for check in found.result["checks"]]
    assert [what for what, result in checks[:8] if result == "FAILED"] == ["GRPO: kl is exactly 0.0"]
    assert [what for what, result in checks[8:] if result == "FAILED"] == ["PPO: ratio_mean is exactly 1.0",
                                                                           "PPO: kl is below 1e-5"]


def test_an_error_in_a_step_is_a_failed_check_and_the_next_part_goes_on(found):
    with found.part("one"):
        raise RuntimeError("no memory")
    with found.part("two"):
        found.row(preset="tiny", tokens=5)
    assert json.loads(found.path.read_text(encoding="utf-8")) == {
        "checks": [{"check": "one", "result": "FAILED", "found": "RuntimeError: no memory"}],
        "rows": [{"preset": "tiny", "tokens": 5}]}


def test_two_folders_are_compared_bit_for_bit(tmp_path):
    for name, number in (("a", 0.5), ("b", 0.5), ("c", 0.75)):
        (tmp_path / name).mkdir()
        save_safetensors(tmp_path / name / "model.safetensors", {"w": torch.tensor([1.0, number])})
    assert gpu_steps.differences(tmp_path / "a", tmp_path / "b") == "equal bit for bit"
    assert gpu_steps.differences(tmp_path / "a", tmp_path / "c") == "differ by up to 0.25"


def test_the_presets_are_measured(found, monkeypatch):
    """On a CPU `tiny` alone, with and without --recompute."""
    monkeypatch.setattr(gpu_steps, "ceilings", lambda device, quick: {"flops": 1e12, "bytes": 1e9})
    gpu_steps.presets(found)
    assert [(row["preset"], row["recompute"], row["compiled"]) for row in found.result["rows"]] == [
        ("tiny", "False", "False"), ("tiny", "True", "False")]
    assert all(row["tokens_per_s"] > 0 and row["peak_MiB"] > 0 for row in found.result["rows"])


A_STEP = """
import json, sys, time
name, out = sys.argv[2], sys.argv[4]
checks = [{"check": "a", "result": "ok", "found": ""}, {"check": "b", "result": "FAILED", "found": "2 / 3"}]
if name != "twice":
    with open(f"{out}/steps/{name}.json", "w") as file:
        json.dump({"checks": checks[:1 + (name == "zeros")], "rows": [{"preset": "tiny"}]}, file)
print("said", name, flush=True)
time.sleep(60 if name == "presets" else 0)
sys.exit(3 if name == "twice" else 0)
"""


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch, capsys):
    """Each is a process of its own. One has a failed check, one ends with 3, one is stopped: both files say so."""
    (tmp_path / "step.py").write_text(A_STEP, encoding="utf-8")
    monkeypatch.setattr(first_hour, "__file__", str(tmp_path / "step.py"))
    monkeypatch.setitem(first_hour.STEPS, "presets", first_hour.STEPS["presets"]._replace(seconds=1))
    chosen = ["stages", "machine", "zeros", "twice", "captured", "presets"]
    found = first_hour.main(first_hour.Config(out=str(tmp_path / "out"), steps=chosen, device="cpu"))
    assert {name: result["status"] for name, result in found.items()} == {
        "machine": "ok", "stages": "ok", "zeros": "1 FAILED", "twice": "exit status 3", "captured": "ok",
        "presets": "stopped after 1 s"}
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("stages: ") and said[-1].startswith("presets: ")  # what the others need; what measures
    assert json.loads((tmp_path / "out" / "first_hour.json").read_text(encoding="utf-8")) == found
    page = (tmp_path / "out" / "first_hour.md").read_text(encoding="utf-8")
    assert "## zeros: 1 FAILED" in page and "| b     | FAILED | 2 / 3 |" in page and "| tiny   |" in page
    assert (tmp_path / "out" / "steps" / "twice.log").read_text(encoding="utf-8") == "said twice\n"


def test_what_no_longer_fits_is_skipped_and_what_is_needed_comes_first(tmp_path, monkeypatch):
    """`twice` alone: the stages that it starts from are trained first. With no time left nothing is started."""
    monkeypatch.setattr(first_hour.subprocess, "Popen", lambda *args, **options: pytest.fail("started"))
    found = first_hour.main(first_hour.Config(out=str(tmp_path), steps=["twice"], minutes=1e-9, device="cpu"))
    assert {name: result["status"] for name, result in found.items()} == {"stages": "skipped: no time",
                                                                          "twice": "skipped: no time"}
    with pytest.raises(UserError, match="--steps speed: must be of machine, stages, "):
        first_hour.main(first_hour.Config(out=str(tmp_path), steps=["speed"], device="cpu"))
    with pytest.raises(UserError, match="--device cuda:1: .*CUDA_VISIBLE_DEVICES=N"):
        first_hour.main(first_hour.Config(out=str(tmp_path), device="cuda:1"))
    assert all(callable(getattr(gpu_steps, name)) for name in first_hour.STEPS)


STARTS_ANOTHER = '''
import subprocess, sys, time
held = "import fcntl, time; lock = open('lock', 'w'); fcntl.flock(lock, fcntl.LOCK_EX); lock.write('held'); " \
       "lock.flush(); time.sleep(100)"
subprocess.Popen([sys.executable, "-c", held])
time.sleep(100)
'''


def test_ctrl_c_ends_what_a_step_has_started(tmp_path, monkeypatch):
    """A step starts programs of its own, which Ctrl-C does not reach: they have a process group of their own."""
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "step.py").write_text(STARTS_ANOTHER, encoding="utf-8")
    lock = tmp_path / "lock"

    class Interrupted(first_hour.subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            until = time.monotonic() + 30
            while not (lock.exists() and lock.read_text(encoding="utf-8") == "held") and time.monotonic() < until:
                time.sleep(0.05)
            raise KeyboardInterrupt

    monkeypatch.setattr(first_hour, "__file__", str(tmp_path / "step.py"))
    monkeypatch.setattr(first_hour, "ROOT", tmp_path)
    monkeypatch.setattr(first_hour.subprocess, "Popen", Interrupted)
    (tmp_path / "out" / "steps").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        first_hour.run_step("presets", first_hour.Config(out=str(tmp_path / "out"), device="cpu"), time.time() + 1000)
    with open(lock, "r+", encoding="utf-8") as file:
        for _ in range(200):  # the lock is free as soon as the process that holds it is gone
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            pytest.fail("what the step has started goes on")


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_the_operations_of_a_forward_pass: `(config, [3], 3) == 3 *` -> `(config, [4], 4) == 3 *`. How many pairs of
#    tokens does a causal row of four have?
# 2. test_what_a_decoding_step_has_to_read: `3, 10, torch.float32` -> `6, 10, torch.float32`. Twice the rows: twice
#    the bytes?
