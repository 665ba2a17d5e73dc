"""A dataclass becomes command-line flags.

    @dataclass
    class Config:
        lr: float = flag(3e-4, "peak learning rate", low=0)

    cfg = parse_config(Config, __doc__)        # python train_x.py --lr 1e-3
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import math
import os
import re
import signal
import sys
import traceback
import typing

import torch

from minillm import job, runtime
from minillm.errors import UserError, is_out_of_memory
from minillm.interrupt import Interrupt
from minillm.machine import memory_gib


# What the system may refuse at any moment of a run.
REFUSED = {errno.ENOSPC: "the disk is full", errno.EFBIG: "no file may be so large here (ulimit -f)",
           errno.EMFILE: "no more files may be open in one process (ulimit -n)",
           errno.ENFILE: "no more files may be open on this machine", errno.EIO: "the disk or the network drive fails",
           errno.EROFS: "the disk can only be read"}
if hasattr(errno, "EDQUOT"):  # Windows has no quotas
    REFUSED[errno.EDQUOT] = "the disk quota is used up"


def flag(default, help: str, choices=None, low=None, high=None, positional=False, downloaded=None, with_lora=None):
    """A dataclass field with its line of help and its range (low <= value <= high).

    positional: given without --. downloaded: the default for a model that was not made here (set_downloaded_defaults),
    with_lora: the same with --peft lora, which takes far higher rates.
    """
    meta = {"help": help, "choices": choices, "low": low, "high": high, "positional": positional,
            "downloaded": downloaded, "with_lora": with_lora}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options)
        # By itself it takes -0.5 for a value but -0.5*model for a flag.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse_config(cls, doc: str, argv=None):
    """Parse the command line into an instance of the dataclass `cls`; raises UserError.

    bool fields are switches (--resume, --no-resume), list fields take several values. `doc` is shown by --help.
    Called for a script (argv None), it also makes a UserError one line on the terminal instead of a traceback, and
    likewise a lack of memory or of disk space.
    """
    if argv is None:
        sys.excepthook = functools.partial(_one_line, cls)
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show Chinese must not end the run
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = "" if default in (None, "", []) or "(default:" in f.metadata["help"] else f" (default {default})"
        if f.metadata["downloaded"] is not None:
            with_lora = f", with a LoRA {f.metadata['with_lora']}" if f.metadata["with_lora"] is not None else ""
            shown += f" (downloaded model: {f.metadata['downloaded']}{with_lora})"
        options = {"default": argparse.SUPPRESS, "help": (f.metadata["help"] + shown).replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            options.update(nargs="+", type=typing.get_args(kind)[0], metavar=f.name.upper())
        else:
            options.update(type=kind, metavar=kind.__name__, choices=f.metadata["choices"])
            if f.metadata["choices"]:
                options["metavar"] = "|".join(map(str, f.metadata["choices"]))
        if f.metadata["positional"]:
            parser.add_argument(f.name, nargs="?", **options)
        else:
            parser.add_argument(f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    cfg = cls(**given)
    cfg.given = set(given)  # by hand
    if argv is None:
        sys.excepthook = functools.partial(_one_line, cfg)  # which knows now what is in use
    check_ranges(cfg)
    check_methods(cfg)
    return cfg


def by_hand(cfg, *names) -> list:
    """Which of these flags were given on the command line."""
    return [name for name in names if name in getattr(cfg, "given", ())]


def check_random_weights(cfg):
    """Raise UserError where --model is given together with what is for random weights."""
    if cfg.model and (names := by_hand(cfg, "preset", "tokenizer")):
        raise UserError(f"--{names[0]} is for random weights, and --model {cfg.model} has its own; leave one of them "
                        "out")


def set_downloaded_defaults(cfg, context: int, keep=()) -> dict:
    """Give cfg the defaults for a downloaded model, except where a flag was given by hand. Returns {flag: value}.

    context: the model's, which no max_seq_len may exceed. Without a command line (a Config made in Python), a value
    other than the default counts as given.
    """
    changed = {}
    for f in dataclasses.fields(cfg):
        value = f.metadata["downloaded"]
        if f.metadata["with_lora"] is not None and cfg.peft == "lora":
            value = f.metadata["with_lora"]
        given = f.name in cfg.given if hasattr(cfg, "given") else getattr(cfg, f.name) != f.default
        if value is not None and not given and f.name not in keep:
            changed[f.name] = min(value, context) if f.name == "max_seq_len" else value
            setattr(cfg, f.name, changed[f.name])
    return changed


def check_ranges(cfg):
    """Raise UserError for a value outside its field's range or choices."""
    for f in dataclasses.fields(cfg):
        value, low, high, choices = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"], f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"--{f.name} {value}: must be one of {', '.join(map(str, choices))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{f.name} {value}: must be a finite number")
        if isinstance(value, int) and value >= 2**63:  # as large as PyTorch's whole numbers can be
            raise UserError(f"--{f.name} {str(value)[:40]}: must be below 2**63")
        if low is not None and value < low or high is not None and value > high:
            bounds = f"between {low} and {high}"
            if low is None or high is None:
                bounds = f"at least {low}" if high is None else f"at most {high}"
            raise UserError(f"--{f.name} {value}: must be {bounds}")


def check_methods(cfg):
    """Raise UserError for a flag that another --peft reads: its help begins with the names of those that do."""
    known = next((f.metadata["choices"] for f in dataclasses.fields(cfg) if f.name == "peft"), [])
    for f in dataclasses.fields(cfg):
        methods = f.metadata["help"].partition(": ")[0].split(", ")
        asked = f.name in cfg.given and getattr(cfg, f.name) is not False  # --no-merge fits all
        if asked and set(methods) <= set(known) and cfg.peft not in methods:
            raise UserError(f"--{f.name} belongs to --peft {' or '.join(methods)}; leave it out with --peft {cfg.peft}")


def _out_of_memory(cfg, error, trace) -> str:
    """One line: what was being done, what was in use, how much more was needed, and which of the script's flags help.

    What was being done is the line of the script, such as loss.backward(): its main() is flat and says it best.
    """
    text = str(error)
    on_gpu = isinstance(error, torch.OutOfMemoryError) or any(name in text for name in ("CUDA", "CUBLAS", "CUDNN"))
    on_cpu = not (on_gpu and torch.cuda.is_initialized())
    free = total = 0.0
    with contextlib.suppress(RuntimeError):  # a GPU that has failed does not even say that
        if "MPS" not in text and "Invalid buffer size" not in text:
            free, total = memory_gib(torch.device("cpu" if on_cpu else "cuda"))
    line, frames = "out of memory", traceback.extract_tb(trace)
    if frames:  # the outermost is in the script
        frame = [frame for frame in frames if frame.filename == frames[0].filename][-1]
        line += f" in line {frame.lineno} of {os.path.basename(frame.filename)} ({frame.line[:80]})"
    if total:
        where = "this machine's memory" if on_cpu else "the GPU's memory"
        line += f": {total - free:.1f} of {total:.1f} GiB of {where} were in use"
    if used := re.search(r"MPS allocated: ([\d.]+) (\w+)", text):
        line += f": {float(used[1]):g} {used[2]} of the GPU's memory were in use"
    if wanted := re.search(r"(?:ried to allocate|Invalid buffer size:) ([\d.]+) (\w+)", text):
        size, unit = float(wanted[1]), wanted[2]
        line += f" when {size / 2**30:.1f} GiB" if unit == "bytes" else f" when {size:g} {unit}"
        line += " more were asked for"
    helpful = []
    if getattr(cfg, "batch_size", 1) > 1:
        more = " with a larger --grad_accum" if hasattr(cfg, "grad_accum") else ""
        helpful.append(f"a smaller --batch_size{more}")
    elif hasattr(cfg, "group_size"):  # which splits the answers to a single prompt, too
        helpful.append("a larger --grad_accum")
    # What the script has and what is not in use already
    helpful += [f"--{name}" for name in ("recompute", "bf16") if getattr(cfg, name, True) is False]
    helpful += ["--peft lora"] if getattr(cfg, "peft", "") == "none" else []
    return f"{line}; what helps: {', '.join(helpful)}" if helpful else line


def _one_line(cfg, kind, error, trace):
    interrupted = issubclass(kind, KeyboardInterrupt)
    if issubclass(kind, BrokenPipeError):  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    elif not job.is_first_to_fail():
        pass  # of several processes one says why
    elif issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif is_out_of_memory(error):
        print(f"error: {_out_of_memory(cfg, error, trace)}", file=sys.stderr, flush=True)
    elif interrupted:
        print("interrupted", file=sys.stderr, flush=True)
    elif issubclass(kind, OSError) and error.errno in REFUSED:
        print(f"error: {REFUSED[error.errno]} ({UserError(error)}); what was saved before is whole: put that right and "
              "use --resume", file=sys.stderr, flush=True)
    elif issubclass(kind, OSError) and error.filename:
        print(f"error: {UserError(f'{error.filename}: {error.strerror}')}", file=sys.stderr, flush=True)
    elif job.has_lost_another(error):
        job.say_lost()
    elif Interrupt.ctrl_c:
        interrupted = True
        print(f"interrupted ({kind.__name__}: {runtime.in_one_line(error)})", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)
    job.end(1)
    if interrupted:  # Python itself would first wait for threads, and so for a compiler
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # a shell's loop ends with it
