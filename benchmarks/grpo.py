"""What one whole step of GRPO costs, phase by phase, compared with TRL's GRPOTrainer.

    python benchmarks/grpo.py                                 # a GPU: some minutes; a CPU: small sizes, two minutes
    python benchmarks/grpo.py --peers                         # with TRL also on a CPU, where it is slow
    python benchmarks/grpo.py --preset base --group_size 16 --new_tokens 512
    python benchmarks/grpo.py --quick                         # does it run? (seconds; the numbers mean nothing)

A step is train_grpo.py's, with one mini-batch and the paper's KL term: sample group_size answers to each prompt, score
them, compute log-probabilities under policy and reference, then loss, backward and AdamW. (Not measured, because TRL
has none with one mini-batch: the policy's forward pass before the update, for later mini-batches and the entropy.)
Weights are random, answers never end before their last token, and the reward is a count, so that only the machinery is
measured. TRL does the same work, with gradient checkpointing off and sampling by transformers; the two take turns, step
by step. The columns:

    rollout s ... optimizer s    the phases of a step (of TRL only the whole step is known)
    logprobs s                   of the reference, before the update (the policy's own come from the update)
    update s                     loss and backward
    step s                       all phases; the median step
    tokens/s                     sampled tokens, by the time of the whole step
    time x                       relative to a step of minillm
    rollout x floor              the rollout, relative to reading the weights and the cache once per token, at the speed
                                 of the fastest copy of this run
    update % matmul              what logprobs and update have to compute, as a share of the fastest matrix products of
                                 this run
    peak MiB                     the most that PyTorch held: both models, gradients, optimizer, rollout, activations
"""

import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import (QWEN3, Report, as_it_comes, compute_dtype, config_of, decode_bytes, forward_flops,
                               peak_memory_mb, peer, size_of)
from minillm import runtime
from minillm.checkpoint import save_model
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.generate import generate
from minillm.losses import group_advantages, grpo_loss
from minillm.model import PRESETS, CausalLM
from minillm.optim import make_optimizers, update
from minillm.rollouts import response_logprobs, split_rollout
from minillm.tokenizer import Tokenizer

PARTS = ["step", "answers", "length", "vocabulary", "model"]
PHASES = ["rollout s", "reward s", "logprobs s", "update s", "optimizer s"]
COLUMNS = [*PHASES, "step s", "tokens/s", "time x", "rollout x floor", "update % matmul", "peak MiB"]
SIZES = {
    "cuda": dict(preset="small", vocab_size=6400, prompts=8, group_size=8, prompt=64, new_tokens=256, repeats=5,
                 answers=(2, 8, 32), length=(256, 1024, 4096), vocabulary=(6400, 32000, 151936),
                 model=("mini", "small", "base", "qwen3-0.6b")),
    "cpu": dict(preset="tiny", vocab_size=3072, prompts=4, group_size=8, prompt=32, new_tokens=64, repeats=3,
                answers=(1, 4, 16), length=(32, 128, 512), vocabulary=(3072, 8192, 32768), model=("tiny", "mini")),
    "quick": dict(preset="tiny", vocab_size=3072, prompts=1, group_size=2, prompt=8, new_tokens=4, repeats=1,
                  answers=(2,), length=(8,), vocabulary=(4096,), model=("tiny",)),
}
WORDS = "What is the sum of these two numbers, and how did you find it? "


@dataclass
class Config:
    parts: list[str] = flag(PARTS, f"tables to make, of {', '.join(PARTS)}")
    preset: str = flag("", "architecture (default: small, on a CPU tiny)", choices=["", *PRESETS, *QWEN3])
    vocab_size: int = flag(0, "tokens of the vocabulary (default: 6400, on a CPU 3072)", low=0)
    prompts: int = flag(0, "prompts of a step (default: 8, on a CPU 4)", low=0)
    group_size: int = flag(0, "answers to each (default: 8)", low=0)
    new_tokens: int = flag(0, "tokens of an answer (default: 256, on a CPU 64)", low=0)
    repeats: int = flag(0, "steps; their median counts (default: 5, on a CPU 3)", low=0)
    peers: bool = flag(False, "compare with TRL also on a CPU, if it is installed")
    compile: bool = flag(True, "torch.compile (on CUDA)")
    quick: bool = flag(False, "tiny sizes")
    json: str = flag("", "file to write the numbers to")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of weights and tokens", low=0)


def reward(answers: list) -> list:
    """The share of even tokens in each answer."""
    return [sum(token % 2 == 0 for token in answer) / len(answer) for answer in answers]


class Ours:
    """Policy, reference and optimizer. step() is one step of train_grpo.py and returns the seconds of its phases."""

    def __init__(self, config, prompts: list, cfg, size: dict, device):
        torch.manual_seed(cfg.seed)
        self.prompts, self.size, self.device = prompts, size, device
        self.policy, self.ref_model = CausalLM(config).to(device), CausalLM(config).to(device)
        self.ref_model.load_state_dict(self.policy.state_dict())
        self.optimizers = make_optimizers(self.policy, lr=1e-5, weight_decay=0.0)
        for model in (self.policy, self.ref_model):
            runtime.compile_backbone(model, cfg.compile and device.type == "cuda")

    def step(self) -> list:
        times = []

        def phase_ends():
            getattr(torch, self.device.type).synchronize()
            times.append(time.perf_counter())

        phase_ends()

        # Rollout
        with runtime.autocast(self.device):
            rollout = generate(self.policy, self.prompts, self.size["new_tokens"], end_id=-1,
                               group_size=self.size["group_size"])
        phase_ends()

        # Reward and advantage; a single mini-batch, on a GPU a single micro-batch
        rewards = torch.tensor(reward(rollout.responses()), device=self.device).view(len(self.prompts), -1)  # (N, G)
        advantages = group_advantages(rewards).flatten()
        minibatch, = split_rollout(rollout, 1, 1, torch.Generator(), advantages=advantages)
        phase_ends()

        # Log-probabilities of the reference, with gradients on as in train_grpo.py: off, other kernels may run
        for batch in minibatch.micro_batches:
            batch.ref_logprobs = response_logprobs(self.ref_model, batch).detach()
        phase_ends()

        # Update
        for batch in minibatch.micro_batches:
            logprobs = response_logprobs(self.policy, batch)
            loss, _ = grpo_loss(logprobs, logprobs.detach(), batch.ref_logprobs, batch.advantages, batch.mask,
                                clip_eps=0.2, beta=0.04, n_sequences=minibatch.n_sequences)
            loss.backward()
        phase_ends()
        update(self.policy, self.optimizers, max_grad_norm=1.0)
        phase_ends()
        return [end - begin for begin, end in zip(times, times[1:])]


def beside_trl(ours, tokenizer, text: str, size: dict, device) -> tuple:
    """Steps of TRL and of ours take turns -> (seconds of TRL's, phases of ours, TRL's peak MiB or on a CPU None).

    The first step of each is not counted.
    """
    import datasets
    import transformers
    import trl

    on_cuda, seconds, phases, peaks = device.type == "cuda", [], [], []
    before = torch.cuda.memory_allocated(device) if on_cuda else 0

    class TakeTurns(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.theirs = contextlib.ExitStack()
            self.theirs.enter_context(as_it_comes())
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(device)
            getattr(torch, device.type).synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            getattr(torch, device.type).synchronize()
            seconds.append(time.perf_counter() - self.began)
            peaks.append((torch.cuda.max_memory_allocated(device) - before) / 2**20 if on_cuda else 0)
            self.theirs.close()
            phases.append(ours.step())

    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, ours.policy, tokenizer)  # TRL reads the reference from there
        trainer = trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder), callbacks=[TakeTurns()],
            train_dataset=datasets.Dataset.from_dict({"prompt": [text] * size["prompts"] * (size["repeats"] + 1)}),
            reward_funcs=lambda completion_ids, **kwargs: reward(completion_ids),
            args=trl.GRPOConfig(
                output_dir=folder, per_device_train_batch_size=size["prompts"] * size["group_size"],
                num_generations=size["group_size"], max_completion_length=size["new_tokens"],
                generation_kwargs={"min_new_tokens": size["new_tokens"]}, temperature=1.0, top_p=1.0, top_k=0,
                beta=0.04, learning_rate=1e-5, max_steps=size["repeats"] + 1,
                bf16=compute_dtype(device) == torch.bfloat16, use_cpu=device.type == "cpu",
                gradient_checkpointing=False, save_strategy="no", logging_strategy="no", report_to="none",
                disable_tqdm=True))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return seconds[1:], phases[1:], max(peaks) or None


def measure(config, tokenizer, cfg, size: dict, report: Report, device, with_trl: bool = False) -> list:
    """The rows of a table: a step of ours, and one of TRL's."""
    text = tokenizer.decode(tokenizer.encode(WORDS * size["prompt"])[:size["prompt"]])
    prompt = tokenizer.encode(text)
    B, P, new_tokens, made = size["prompts"] * size["group_size"], len(prompt), size["new_tokens"], []

    def prepare():
        ours = Ours(config, [prompt] * size["prompts"], cfg, size, device)
        for _ in range(2):  # compiles; the optimizer has its state from the second one on
            ours.step()
        made.append(ours)

    if device.type == "cuda":
        torch.compiler.reset()  # the programs of earlier tables count towards a limit
    rows = [{"": "minillm", **dict.fromkeys(COLUMNS), "peak MiB": peak_memory_mb(prepare, device)}]
    if not made:
        return rows
    if with_trl:
        seconds, phases, peak = beside_trl(made[0], tokenizer, text, size, device)
        step = statistics.median(seconds)
        rows.append({"": "TRL", **dict.fromkeys(COLUMNS), "step s": step, "tokens/s": B * new_tokens / step,
                     "peak MiB": peak})
    else:
        phases = [made[0].step() for _ in range(size["repeats"])]

    step = statistics.median(map(sum, phases))
    parts = dict(zip(PHASES, map(statistics.median, zip(*phases))))
    read = new_tokens * decode_bytes(made[0].policy, B, P + new_tokens / 2, compute_dtype(device))
    floor = read / report.ceilings["bytes"]
    flops = (1 + 3) * forward_flops(config, [P + new_tokens] * B, B * new_tokens)  # a forward; a forward and backward
    rows[0] |= {**parts, "step s": step, "tokens/s": B * new_tokens / step,
                "rollout x floor": parts["rollout s"] / floor,
                "update % matmul": 100 * flops / (parts["logprobs s"] + parts["update s"]) / report.ceilings["flops"]}
    return [row | {"time x": row["step s"] / step} for row in rows]


def main(cfg: Config) -> dict:
    """Measure and print; returns the numbers."""
    if unknown := [part for part in cfg.parts if part not in PARTS]:
        raise UserError(f"--parts {' '.join(unknown)}: must be of {', '.join(PARTS)}")
    device = runtime.start(cfg.device, cfg.seed)
    size = size_of(SIZES, cfg, device)
    tokenizer = Tokenizer.load(ROOT / "data" / "tokenizer.json")
    if size["vocab_size"] < tokenizer.vocab_size:
        raise UserError(f"--vocab_size {size['vocab_size']}: must be at least {tokenizer.vocab_size}, the tokenizer's")
    with_trl = (cfg.peers or device.type == "cuda") and peer("trl") is not None
    report = Report(device, cfg.quick, cfg.json)
    fields = {"step": "preset", "answers": "prompts", "length": "new_tokens", "vocabulary": "vocab_size",
              "model": "preset"}
    for part in cfg.parts:
        rows = []
        for value in [size["preset"]] if part == "step" else size[part]:
            one = size | {fields[part]: value}
            config = config_of(one["preset"], one["vocab_size"], 2 * one["prompt"] + one["new_tokens"])
            column = "model" if part == "step" else part
            label = str(value * size["group_size"] if part == "answers" else value)
            measured = measure(config, tokenizer, cfg, one, report, device, with_trl and part == "step")
            rows += [{column: label, **row} for row in measured]
        report.add(f"{part}; else {size['preset']}, vocabulary {size['vocab_size']:,}, {size['prompts']} prompts of "
                   f"{size['prompt']} tokens, {size['group_size']} answers of {size['new_tokens']} tokens each", rows)
    return report.results


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
