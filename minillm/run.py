"""The training run: everything a stage does around its algorithm.

    run = Run(cfg, inputs=[...])       # checks settings and folders; nothing is written yet
    run.start(model, optimizers, loader, tokenizer, total_steps, evaluate)    # restores the run, or evaluates first
    for step in run:                   # the script's own loop body; after each step: log, evaluate and save when due
        n_tokens = run.count(...)      # what the step averages over, on all processes
        run.add({"loss": loss})        # what is logged
    return run.finish(stats)           # the last evaluation, the before/after table, summary.json

Run never calls the model, the loss or the optimizer. What it guarantees:
- `training_state.pt` alone holds all that exact resume needs, fp32 weights included. It is written after the model
  folder, so the weights in the folder are never older than the state. A run that ends has those of its last step,
  and then no state: with its moments it is three times as large as the model.
- On one CPU with one number of threads a resumed run ends with the bits of an uninterrupted one. On CUDA it goes on
  from the same state, but some kernels add in any order there: even two equal runs may differ in the last bits.
- A new run replaces an older one in OUT only with its first checkpoint: until then it lives in OUT.new. The older one
  becomes OUT.bak, OUT.bak2, ...; no run is ever deleted (--keep_last: older checkpoints of this one are).
- However the loop ends (Ctrl-C, SIGTERM, a closed terminal, an exception in its body), signals, progress bar and files
  are put in order.
"""

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minillm import machine, runtime, shard
from minillm.checkpoint import save_model
from minillm.config import flag
from minillm.errors import UserError
from minillm.heads import RewardModel, merge_reward_model, save_reward_model
from minillm.interrupt import Interrupt
from minillm.metrics import Progress, before_after, cut_metrics, numbers, show_replies
from minillm.out_folder import Lock, check_out, ended_in_first_save, is_new_run, keep_checkpoint, take_place
from minillm.peft import has_adapter, save_adapter
from minillm.records import fingerprint
from minillm.runtime import say
from minillm.safetensors import is_temporary, load_json, save_json
from minillm.training_state import (capture_rng, load_training_state, remove_training_state, restore, restore_rng,
                                    save_training_state, trained_weights)

# Settings that may change when a run is resumed; device and compile cost no more than the last bits.
FREE_ON_RESUME = ("out", "resume", "device", "compile", "save_every", "log_every", "eval_every", "show_every",
                  "save_dtype", "shard", "keep_last")
# A folder that holds one of these is kept.
RUN_FILES = ("config.json", "adapter_config.json", "summary.json", "training_state.pt")


@dataclass
class RunConfig:
    """The flags that every stage has. A step is an optimizer step; in GRPO and PPO it is a rollout."""

    out: str = flag("", "folder to write")
    resume: bool = flag(False, "continue the run in --out")
    max_steps: int = flag(0, "steps; overrides --epochs", low=0)
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm", low=1e-6)
    log_every: int = flag(20, "steps between log lines", low=1)
    eval_every: int = flag(500, "steps between evaluations", low=1)
    save_every: int = flag(500, "steps between checkpoints", low=1)
    keep_last: int = flag(0, "keep the last N checkpoints, also as OUT/step_N (default: only the newest)", low=0)
    device: str = flag("", "cuda, mps or cpu (default: the best that is available)")
    seed: int = flag(0, "seed of everything random", low=0)
    compile: bool = flag(None, "torch.compile (default: on CUDA, for models above 16 million parameters)")
    save_dtype: str = flag("auto", "of the saved weights; auto: as in --model", choices=["auto", "float32", "bfloat16"])


class Interrupted(SystemExit):
    """Ends the program after a checkpoint, with 128 + the signal's number: Ctrl-C 130, SIGTERM 143."""


class Run:
    """One run of a stage; see the top of this file. If `finished`, OUT holds this very run, complete, with `result`.

    Raises UserError for an OUT that cannot be used, and, with --resume, for a run that was started differently.
    """

    def __init__(self, cfg: RunConfig, inputs=()):
        self.cfg, self.out = cfg, Path(os.path.realpath(cfg.out))  # one folder has one lock, whatever leads there
        self.state = self.result = self.progress = self.lock = None
        shard.prepare(cfg)
        inputs = [str(path) for path in inputs if path and os.path.exists(path)]
        check_out(self.out, inputs)
        self.new = self.out.with_name(self.out.name + ".new")
        self.settings = json.loads(json.dumps(asdict(cfg), default=str))
        # A reward function (.py) may be corrected in the middle of a run.
        self.settings["contents"] = {path: fingerprint(path) for path in inputs if not path.endswith(".py")}
        # OUT.new with a checkpoint: a kill came before it could take its place.
        self.folder = self.new if is_new_run(self.new, self.out, "training_state.pt") else self.out
        if cfg.resume and self.folder == self.out and is_new_run(self.new, self.out, "run_config.json"):
            say(f"note: {self.new} is a later run that ended before its first checkpoint; this goes on with {cfg.out}")
        if cfg.resume and any((self.folder / name).exists() for name in ("training_state.pt", "summary.json")):
            self._read()
        elif cfg.resume:
            say(f"nothing to continue in {cfg.out}: starting from step 0")
        self.finished = self.result is not None

    def start(self, model, optimizers: list, loader, tokenizer, total_steps: int, evaluate, beside=()):
        """Go to where the run was, or, for a new one, call evaluate() for the numbers before training.

        model: what the folder will hold. beside: other models that are trained and belong in the state (a critic).
        evaluate() returns a dict of plain values; "replies" among them, [[question, reply], ...], is shown as a table.
        """
        self.model, self.tokenizer, self.optimizers, self.loader = model, tokenizer, optimizers, loader
        self.models, self.total_steps, self.evaluate = [model, *beside], total_steps, evaluate
        self.device = next(model.parameters()).device
        self.steps, self.updates, self.tokens = [], 0, 0
        self.first = self.step = self.state["step"] if self.state else 0
        runtime.gather(None)  # the first process changes nothing in the folder before the others have read it
        try:
            if runtime.rank() == 0:
                self.lock = Lock(self.out)
                try:
                    self._choose_folder()
                except OSError as error:  # no permission, or something else stands where a file belongs
                    raise UserError(f"cannot write {error.filename or self.out}: {error.strerror or error}; "
                                    "give another --out") from None
            if self.state:
                self._restore()
                if runtime.rank() == 0:
                    cut_metrics(self.folder / "metrics.jsonl", self.step)
                if self.cfg.keep_last:
                    with shard.whole(self.model):
                        self._keep_restored()
            else:
                self.before = self.evaluate()
            self.progress = Progress(self.folder, total_steps, self.step, show=runtime.rank() == 0)
        except BaseException:
            self._close()
            raise

    def __iter__(self):
        interrupt = Interrupt()
        try:
            while self.step < self.total_steps:
                self.steps.append({})
                yield self.step
                self.step += 1
                self._after_step(interrupt.requested())
        except BaseException:  # an exception in the loop's body arrives here as GeneratorExit
            self._close()
            raise
        finally:
            interrupt.close()

    def generator(self, step: int, *more: int, device=None) -> torch.Generator:
        """A random generator of this step's own: after a resume it draws the same numbers."""
        return runtime.generator(device or self.device, self.cfg.seed, step, *more)

    def count(self, *counts: int):
        """An optimizer step begins: what it averages over, summed over all processes. Returns one number for each."""
        totals = [int(total) for total in runtime.sums_over_processes(counts)]
        self.updates += any(totals)  # over nothing there is no step
        return totals[0] if len(totals) == 1 else totals

    def add(self, stats: dict, weight=None, tokens: int = 0):
        """Log these values of a micro-batch: numbers, or tensors without dimensions, which are not waited for.

        With a weight the log has their weighted mean; weight 0 counts for nothing. Without one they are parts of a sum
        over the micro-batches of an optimizer step (a loss divided by the whole step's count), and the log has the mean
        of these sums over the optimizer steps. tokens: how many the micro-batch had, for the speed.
        """
        self.tokens += tokens
        values = self.steps[-1]
        for name, value in stats.items() if weight != 0 else ():  # a mean over nothing is NaN
            value = value.detach() if isinstance(value, torch.Tensor) else float(value)
            total, weights = values.get(name, (0.0, 0.0))
            values[name] = (total + value, 0.0) if weight is None else (total + value * weight, weights + weight)

    def finish(self, data: dict, **more) -> dict:
        """Evaluate, show the table of before and after, and write summary.json; returns the numbers after training.

        data: what went into the run. more: further numbers for the table.
        """
        try:
            if self.step == self.first:  # nothing was left to train, but perhaps to save
                with shard.whole(self.model):
                    if runtime.rank() == 0:
                        self._save_model()
            after = {**self.evaluate(), **more}
            say(before_after(self.before, after))
            if after.get("replies") and self.before.get("replies"):
                say(show_replies(["before", "after"], [self.before["replies"], after["replies"]]))
            seconds = round(time.time() - self.progress.began, 1)
            if runtime.rank() == 0:
                save_json(self.folder / "summary.json", {
                    "data": data, "steps": self.total_steps, "resumed_after": self.first,
                    "tokens": self.progress.tokens, "seconds": seconds,  # since the last start
                    "peak_memory_mb": round(machine.peak_memory_mb(self.device), 1),
                    "before": numbers(self.before), "after": numbers(after)})
                remove_training_state(self.folder)
            return {**numbers(after), "seconds": seconds}
        finally:
            self._close()

    # What happens after a step

    def _after_step(self, signal_number: int):
        self.progress.step()
        last = self.step == self.total_steps
        save_now = last or self.step % self.cfg.save_every == 0 or signal_number
        if save_now or self.step % self.cfg.log_every == 0 or self.step == 1:
            self._log()
        if self.step % self.cfg.eval_every == 0 and not last:
            rng = capture_rng(self.device)  # replies draw from the generators that a LoRA's dropout draws from
            self.progress.log(self.step, **numbers(self.evaluate()))
            restore_rng(rng, self.device)
        if save_now:
            states = [shard.gathered(optimizer.state_dict()) for optimizer in self.optimizers]
            with shard.whole(self.model):
                self._save(states)
        if signal_number:
            runtime.gather(None)  # torchrun ends them all soon after the first: that one may still be writing
            say(f"interrupted: saved after step {self.step} of {self.total_steps}; "
                "the same command with --resume continues")
            raise Interrupted(128 + signal_number)

    def _log(self):
        """One line: the means over the steps since the last one, over all processes."""
        # A process without data of its own may have added less than the others.
        added = runtime.gather([list(step) for step in self.steps])
        names = list(dict.fromkeys(name for process in added for step in process for name in step))
        sums = torch.zeros(len(self.steps), len(names), 2, device=self.device)  # of the values, of their weights
        for row, step in zip(sums, self.steps):
            for cell, name in zip(row, names):  # fill_: on CUDA cell[0] = 0.5 would wait for the device
                for part, value in zip(cell, step.get(name, (0.0, 0.0))):
                    part.fill_(value)
        sums = runtime.sum_tensor_over_processes(sums).tolist()
        line = {}
        for i, name in enumerate(names):
            for number, step in enumerate(sums, self.step - len(self.steps) + 1):
                if not math.isfinite(step[i][0]):
                    raise UserError(f"{name} became {step[i][0]} at step {number}; stopped, {self._what_is_left()} "
                                    "(a lower --lr or --max_grad_norm helps most often)")
            total, weight = sum(step[i][0] for step in sums), sum(step[i][1] for step in sums)
            line[name] = total / (weight or self.updates or 1)
        line["lr"] = self.optimizers[0].param_groups[0]["lr"]
        self.progress.log(self.step, tokens=int(runtime.sum_over_processes(self.tokens)), **line)
        self.steps, self.updates, self.tokens = [], 0, 0

    # Saving and restoring

    def _choose_folder(self):
        """Where the run writes. Everything in here happens with the lock, and in the first process only."""
        if is_new_run(self.new, self.out, "training_state.pt"):
            take_place(self.new, self.out)
        found = {path.name for path in self.new.iterdir()} if self.new.is_dir() else set()
        if self.new.is_dir() and all(map(is_temporary, found)) or is_new_run(self.new, self.out, "run_config.json"):
            shutil.rmtree(self.new, ignore_errors=True)  # of a run that ended before its first checkpoint
        self.folder = self.out
        if self.state:
            return
        if any((self.out / name).exists() for name in RUN_FILES) and not ended_in_first_save(self.out):
            self.folder = self.new
        if self.folder == self.new and self.new.exists():
            raise UserError(f"{self.new} is in the way: a new run writes there until its first checkpoint; rename it")
        self.folder.mkdir(parents=True, exist_ok=True)
        save_json(self.folder / "run_config.json", self.settings)
        (self.folder / "metrics.jsonl").unlink(missing_ok=True)

    def _save(self, states: list):
        for model in self.models:
            finite = all(torch.isfinite(shard.local(parameter)).all() for parameter in model.parameters())
            if runtime.sum_over_processes(not finite):
                raise UserError(f"the weights became NaN or infinite by step {self.step}; stopped, "
                                f"{self._what_is_left()} (a lower --lr helps most often)")
        rng = runtime.gather(capture_rng(self.device))  # of each process
        if runtime.rank() > 0:
            return
        self._save_model()
        save_training_state(self.folder, {
            "step": self.step, "models": [trained_weights(model) for model in self.models],
            "optimizers": states, "loader": self.loader.state(),
            "rng": rng, "before": self.before})
        if self.folder == self.new:
            self.progress.close_file()  # Windows renames no folder that holds an open file
            take_place(self.new, self.out)
            self.folder = self.out
            self.progress.open_file(self.out)
        keep_checkpoint(self.folder, self.step, self.cfg.keep_last)

    def _what_is_left(self) -> str:
        saved = (self.folder / "training_state.pt").exists()
        return f"{self.cfg.out} keeps its last checkpoint" if saved else "before the first checkpoint of this run"

    def _keep_restored(self):
        """Keep the checkpoint that was restored, where a kill came before it, or --keep_last was not given then."""
        if runtime.rank() > 0:
            return
        if not (self.folder / f"step_{self.step:06d}").exists():
            self._save_model()  # a kill may have come after a newer one, and before its state
        keep_checkpoint(self.folder, self.step, self.cfg.keep_last)

    def _save_model(self):
        if isinstance(self.model, RewardModel):
            merged = merge_reward_model(self.model, self.cfg.model)
            save_reward_model(self.folder, merged, self.tokenizer, self.cfg.save_dtype)
        elif has_adapter(self.model):
            save_adapter(self.model, self.folder, self.cfg.model)
        else:
            save_model(self.folder, self.model, self.tokenizer, self.cfg.save_dtype)

    def _read(self):
        """The state to continue from; refuses one of other settings or other inputs."""
        path, out = self.folder / "run_config.json", self.cfg.out
        saved = load_json(path)
        if not isinstance(saved.get("contents"), dict):
            raise UserError(f"--resume: {path} does not say what the run was started with; "
                            "start again without --resume")
        differing = [key for key in self.settings if key in saved and saved[key] != self.settings[key]]
        if "contents" in differing:
            differing.remove("contents")
            before, now = saved["contents"], self.settings["contents"]
            changed = [path for path in {**before, **now} if before.get(path) != now.get(path)]
            raise UserError(f"--resume: {', '.join(changed)} changed since the run in {out} began; "
                            "put back what was there, or start again without --resume")
        notes = {key: f"--{key} {self.settings[key]} (it was {saved[key]})".replace("None", "by default")
                 for key in differing}
        if fixed := [note for key, note in notes.items() if key not in FREE_ON_RESUME]:
            raise UserError(f"--resume: the run in {out} had other settings: {', '.join(fixed)}; give the same ones, "
                            "or start again without --resume")
        for key in {"device", "compile"} & notes.keys():
            say(f"note: {notes[key]}: results may differ in the last bits")
        if not (self.folder / "summary.json").exists():  # written last of all
            self.state = load_training_state(self.folder, mapped=shard.is_on(self.cfg))
            return
        self.result = load_json(self.folder / "summary.json").get("after")
        if not isinstance(self.result, dict):
            raise UserError(f"{self.folder / 'summary.json'} holds no results; start again without --resume")
        if runtime.rank() == 0:
            remove_training_state(self.folder)  # where a kill came before
        say(f"the run in {out} is finished: nothing to do")

    def _restore(self):
        self.before = restore(self.state, self.models, self.optimizers, self.loader, self.total_steps,
                              self.folder / "training_state.pt", self.device)
        self.state = None

    def _close(self):
        if self.progress:
            self.progress.close()
        if self.lock:
            self.lock.release()
        self.lock = None
