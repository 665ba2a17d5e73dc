"""The last chapter: can the benchmarks be trusted? They time fairly, count what they say, and compare the same work.

How fast anything is, is not tested here: that depends on the machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks import generate as bench_generate
from benchmarks import grpo as bench_grpo
from benchmarks import train as bench_train
from minillm.data import PackedLoader
from minillm.errors import UserError
from minillm.generate import generate
from minillm.model import CausalLM, KVCache, ModelConfig
from tests.helpers import close

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def small_config(**changes):
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=20)
    return ModelConfig(**{**sizes, **changes})


def test_what_is_compared_takes_turns(monkeypatch):
    """A B A B A B, so that a slow minute of the machine is nobody's fault; and one slow turn of three does not count."""
    clock, order = [0.0], []
    durations = {"a": iter([1.0, 90.0, 2.0]), "b": iter([5.0, 4.0, 6.0])}

    def run(name):
        order.append(name)
        clock[0] += next(durations[name])

    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    assert common.side_by_side({"a": lambda: run("a"), "b": lambda: run("b")}, CPU, repeats=3) == {"a": 2.0, "b": 5.0}
    assert "".join(order) == "ababab"


def test_the_operations_of_a_forward_pass():
    """One token: PyTorch counts the same. A causal row of three: its pairs of tokens are 1 + 2 + 3, each for 4 x heads x head_dim."""
    config = small_config()
    model = CausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    pair = config.num_hidden_layers * 4 * 4 * 6
    assert common.forward_flops(config, [1], 1) == products + pair
    assert common.forward_flops(config, [3], 3) == 3 * products + 6 * pair
    assert common.forward_flops(config, [1, 2], 0) == 3 * (products - 2 * 16 * 50) + 4 * pair  # two documents do not see each other


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_decoding_step_has_to_read(tied):
    model = CausalLM(small_config(tie_word_embeddings=tied))
    cache = KVCache(model.config, 3, 10)
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tied else model.model.embed_tokens.weight.nbytes)
    assert common.decode_bytes(model, 3, 10, torch.float32) == weights + sum(x.nbytes for x in cache.keys + cache.values)


def test_every_turn_trains_on_the_same_conversations():
    """Epoch after epoch, and padded as well; they are as uneven as chats are, and leave little room in the rows."""
    data = bench_train.Chats(vocab_size=1000, rows=24, row_length=256, seed=0)
    loader = PackedLoader(data, 8, 256, seed=0)

    def conversations(batches):
        """The tokens of each with what is supervised of it, sorted."""
        return sorted((row[ids == d].tolist(), mask[ids == d].tolist()) for batch in batches
                      for row, mask, ids in zip(batch.tokens, batch.loss_mask, batch.doc_ids) for d in ids.unique().tolist() if d >= 0)

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
    # Every third token is computed, and stands for three.
    tokens = bench_generate.recompute(model, prompts, 8, temperature=0.0, every=3)[:, 3:]
    assert tokens.shape == (2, 8) and tokens.tolist() == tokens[:, [0, 0, 0, 3, 3, 3, 6, 6]].tolist()


def test_memory_of_full_training_and_lora():
    rows = bench_train.memory(["tiny"], [16, 256], bench_train.Config(), CPU)
    full, _, lora, lora_bf16, _ = (row["16 tokens"] for row in rows)
    weights = 4 * sum(p.numel() for p in CausalLM(common.config_of("tiny", 6400, 16)).parameters()) / 2**20
    assert full > 4 * weights  # with gradients and AdamW's two moments
    assert lora_bf16 < lora < 0.6 * full
    full, full_recompute, lora, lora_bf16, lora_recompute = (row["256 tokens"] for row in rows)
    assert lora_recompute < lora_bf16 < lora < full and lora_recompute < full_recompute < full


def same_losses(rows):
    losses = [row["first loss"] for row in rows]
    return len(rows) > 1 and max(losses) - min(losses) < 0.01  # bf16, in rows that are packed or padded


def test_train(tmp_path, capsys):
    path = tmp_path / "train.json"
    results = bench_train.main(bench_train.Config(quick=True, parts=["methods", "vocabulary"], peers=False, device="cpu", json=str(path)))
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
    results = bench_generate.main(bench_generate.Config(quick=True, parts=["batch", "context"], peers=False, device="cpu"))
    batch, context = [value for key, value in results.items() if key not in ("machine", "ceilings")]
    assert [(row["batch"], row[""]) for row in batch] == [(b, way) for b in ("1", "2") for way in ("minillm", "minillm, recompute")]
    for row in batch + context:
        assert all(row[column] is not None for column in bench_generate.COLUMNS)
        assert close(row["x floor"] * row["floor ms"] / row["ms a step"], 1.0)


def test_grpo(capsys):
    results = bench_grpo.main(bench_grpo.Config(quick=True, parts=["step", "answers"], device="cpu"))
    step, answers = [value for key, value in results.items() if key not in ("machine", "ceilings")]
    assert [row["answers"] for row in answers] == ["4"]
    for row in step + answers:
        assert close(sum(row[phase] for phase in bench_grpo.PHASES) / row["step s"], 1.0)  # of one step: its medians are its times
        assert all(row[column] > 0 for column in bench_grpo.COLUMNS)


def test_a_package_that_is_not_here_is_said_and_left_out(capsys):
    assert common.peer("no_such_package") is None
    assert capsys.readouterr().out == "no_such_package is left out: No module named 'no_such_package'\n"


def test_memory(capsys):
    results = bench_train.main(bench_train.Config(quick=True, memory=True, device="cpu"))
    rows = results["peak MiB of training, one row"]
    assert [row["method"] for row in rows] == ["full", "full, recompute", "LoRA", "LoRA, base in bf16", "LoRA, base in bf16, recompute"]
    again = bench_train.main(bench_train.Config(quick=True, memory=True, shapes=["tiny"], max_seq_len=24, device="cpu"))
    assert set(again["peak MiB of training, one row"][0]) == {"shape", "method", "24 tokens"}
    assert all(row["shape"] == "tiny" and 3 < row["16 tokens"] < 50 for row in rows)
    with pytest.raises(UserError, match="--shapes huge: must be of tiny, "):
        bench_train.main(bench_train.Config(quick=True, memory=True, shapes=["huge"], device="cpu"))


def test_they_are_commands_wherever_one_stands(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), "--quick", "--parts", "model", "--no-peers", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(common.machine(CPU).split(",")[0]), done.stderr


@pytest.mark.parametrize("bench", [bench_train, bench_generate, bench_grpo])
def test_an_unknown_part_is_named(bench):
    with pytest.raises(UserError, match="--parts speed: must be of"):
        bench.main(bench.Config(parts=["speed"]))
