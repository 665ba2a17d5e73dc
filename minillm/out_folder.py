"""The folder that a run writes to: who may write there, how a new run takes an older one's place, what is kept.

OUT holds the newest checkpoint. OUT.new is a run that has none yet, OUT.bak, OUT.bak2, ... are older runs. OUT.lock
keeps a second run away. With --keep_last the last checkpoints are also OUT/step_000500, ...: each has the model's
files, so it is good for --model, and the state, so `--resume --out OUT/step_000500` goes on from there.
"""

import os
import re
import secrets
import shutil
from pathlib import Path

from minillm.errors import UserError
from minillm.runtime import say
from minillm.safetensors import flush_folder, is_temporary, load_json, open_file

KEPT = re.compile(r"step_\d{6,}")
NOT_KEPT = ("metrics.jsonl", "summary.json")  # they are still written to


def check_out(out: Path, inputs: list):
    """Raise UserError for an --out that is no folder, or that holds what the run reads."""
    for place in (out, *out.parents):
        if os.path.lexists(place) and not os.path.isdir(place):  # a link that leads nowhere, too
            raise UserError(f"--out {out}: {place} is a file; give a folder")
    for path in [*inputs, os.getcwd()]:
        for place in (out, Path(f"{out}.new")):
            if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(place)):
                raise UserError(f"--out {out}: {place} holds {path}, which this run needs; give another --out")


def is_new_run(new: Path, out: Path, name: str) -> bool:
    """Whether OUT.new belongs to a run to OUT (the name alone proves nothing) and holds a file of this name."""
    if not os.path.exists(new / "run_config.json") or not os.path.exists(new / name):
        return False
    said = str(load_json(new / "run_config.json").get("out"))
    return out.name in (os.path.basename(os.path.abspath(said)), os.path.basename(os.path.realpath(said)))


def ended_in_first_save(folder: Path) -> bool:
    """Whether a folder is what a run left that was killed before it had any weights. Removes its temporary files."""
    found = [path.name for path in folder.iterdir()]
    for name in found:
        if is_temporary(name):
            (folder / name).unlink(missing_ok=True)
    kept = [name for name in found if name.endswith(".safetensors") or name in ("training_state.pt", "summary.json")]
    return "run_config.json" in found and not kept


def take_place(new: Path, out: Path):
    """OUT becomes the first of OUT.bak, OUT.bak2, ... that is free, and OUT.new becomes OUT; raises UserError."""
    number = 1
    while (backup := out.with_name(f"{out.name}.bak{number if number > 1 else ''}")).exists():
        number += 1
    try:
        if out.exists():
            out.rename(backup)
            say(f"{out} held an older run; it is now {backup}")
        new.rename(out)
    except OSError as error:
        raise UserError(f"cannot rename {out} to {backup} and {new} to {out}: {error.strerror or error}; "
                        "do it yourself, then use --resume") from None


def keep_checkpoint(out: Path, step: int, count: int):
    """Make OUT/step_STEP of the checkpoint in OUT, and remove all but the newest `count` such folders.

    A file takes no room a second time: both names are links to one content, where the file system has such links. A
    kill leaves a folder of a temporary name, which is removed here.
    """
    if not count:
        return
    try:
        for folder in list(out.iterdir()):
            if folder.name.startswith("step_") and is_temporary(folder.name):
                shutil.rmtree(folder)
        folder = out / f"step_{step:06d}"
        if not folder.exists():
            draft = out / f"{folder.name}.{secrets.token_hex(8)}.tmp"
            draft.mkdir()
            for path in out.iterdir():
                if path.is_file() and path.name not in NOT_KEPT and not is_temporary(path.name):
                    _link(path, draft / path.name)
            flush_folder(draft)
            draft.rename(folder)
        kept = [path for path in out.iterdir() if KEPT.fullmatch(path.name) and (path / "training_state.pt").exists()]
        for old in sorted(kept, key=_step_of)[:-count]:
            old = old.rename(f"{old}.{secrets.token_hex(8)}.tmp")  # never half a checkpoint
            shutil.rmtree(old)
    except OSError as error:
        raise UserError(f"--keep_last: cannot keep the checkpoint of step {step} in {out}: {error.strerror or error}; "
                        "the checkpoint itself is whole") from None


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _link(source: Path, target: Path):
    try:
        os.link(source, target)
    except OSError:  # there are no links here
        shutil.copyfile(source, target)


class Lock:
    """OUT.lock keeps a second run out of OUT. The system drops the lock when the process ends, however it ends.

    Raises UserError when another run holds it. Windows and some network drives have no such locks: take care there.
    """

    def __init__(self, out: Path):
        self.path = out.with_name(out.name + ".lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open_file(self.path, writable=True)  # follows no link, waits for no pipe
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None
        try:
            import fcntl
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.file.truncate(0)
            os.write(self.file.fileno(), str(os.getpid()).encode())  # no buffer: close() cannot fail on a full disk
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read(20).decode("ascii", "replace").strip() or "unknown"
            self.file.close()
            raise UserError(f"another run (process {holder}) is writing to {out}; wait for it, end it, "
                            "or give another --out") from None
        except (ImportError, OSError):
            pass

    def release(self):
        """Let others in."""
        try:
            self.path.unlink(missing_ok=True)  # before the lock goes: after it the file may be another run's
        except OSError:  # Windows removes no open file
            pass
        self.file.close()
