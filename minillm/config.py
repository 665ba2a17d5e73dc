"""A dataclass becomes command-line flags.

    @dataclass
    class Config:
        lr: float = flag(3e-4, "peak learning rate", low=0)

    cfg = parse_config(Config, __doc__)        # python train_x.py --lr 1e-3
"""

import argparse
import dataclasses
import errno
import math
import os
import sys
import typing

from minillm.errors import UserError


def flag(default, help: str, choices=None, low=None, high=None):
    """A dataclass field with its line of help and its range (low <= value <= high)."""
    meta = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse_config(cls, doc: str, argv=None):
    """Parse the command line into an instance of the dataclass `cls`; raises UserError.

    bool fields are switches (--resume, --no-resume), list fields take several values. `doc` is shown by --help.
    Called for a script (argv None), it also makes a UserError one line on the terminal instead of a traceback.
    """
    if argv is None:
        sys.excepthook = _one_line
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show Chinese must not end the run
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = "" if default in (None, "", []) else f" (default {default})"
        options = {"default": default, "help": (f.metadata["help"] + shown).replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            options.update(nargs="+", type=typing.get_args(kind)[0], metavar=f.name.upper())
        else:
            options.update(type=kind, metavar=kind.__name__, choices=f.metadata["choices"])
            if f.metadata["choices"]:
                options["metavar"] = "|".join(map(str, f.metadata["choices"]))
        parser.add_argument(f"--{f.name}", **options)
    cfg = cls(**vars(parser.parse_args(argv)))
    check_ranges(cfg)
    return cfg


def check_ranges(cfg):
    """Raise UserError for a value outside its field's range or choices."""
    for f in dataclasses.fields(cfg):
        value, low, high, choices = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"], f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"--{f.name} {value}: must be one of {', '.join(map(str, choices))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{f.name} {value}: must be a finite number")
        if low is not None and value < low or high is not None and value > high:
            bounds = f"between {low} and {high}"
            if low is None or high is None:
                bounds = f"at least {low}" if high is None else f"at most {high}"
            raise UserError(f"--{f.name} {value}: must be {bounds}")


def _one_line(kind, error, trace):
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    elif issubclass(kind, OSError) and error.errno == errno.ENOSPC:
        print(f"error: the disk is full ({error}); what was saved before is whole, make room and use --resume",
              file=sys.stderr, flush=True)
    elif issubclass(kind, BrokenPipeError):  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    else:
        sys.__excepthook__(kind, error, trace)
