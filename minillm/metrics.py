"""What a run shows: a progress bar, metrics.jsonl, tables.

    python -m minillm.metrics OUT [OUT ...]      # the curves of one or several runs (curves.py)
"""

import contextlib
import json
import math
import os
import re
import sys
import time
import unicodedata
from pathlib import Path

from tqdm import tqdm

from minillm import curves
from minillm.errors import UserError, printable
from minillm.safetensors import atomic_write, open_file


class Progress:
    """Shows steps, metrics and the time left, and appends every logged step to FOLDER/metrics.jsonl.

    On a terminal a bar; elsewhere (a file, a pipe, CI) plain lines, at most one every five seconds.
    """

    def __init__(self, folder, total: int, start: int = 0, show: bool = True):
        self.total, self.first, self.show, self.file = total, start, show, None
        self.began, self.tokens, self.last_line, self.last_log = time.time(), 0, 0.0, time.time()
        self.bar = tqdm(total=total, initial=start, dynamic_ncols=True) if show and sys.stderr.isatty() else None
        self.open_file(folder)
        if start and show:
            print(f"resuming after step {start} of {total}", flush=True)
            self._write({"step": start, "resumed": True})

    def open_file(self, folder):
        """Go on writing to the metrics.jsonl of this folder."""
        if self.show:
            self.path = Path(folder) / "metrics.jsonl"
            try:
                self.file = open_file(self.path, writable=True)
                self.file.seek(0, os.SEEK_END)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None

    def close_file(self):
        """Let go of metrics.jsonl."""
        if self.file:
            self.file.close()

    def _write(self, line: dict):
        try:
            self.file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            self.file.flush()
        except OSError as error:  # the disk is full, or a file may not be so large
            with contextlib.suppress(OSError):
                self.file.close()  # it tries to write once more
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; the last checkpoint is whole: "
                            "make room and use --resume") from None

    def step(self):
        """One step is done."""
        if self.bar:
            self.bar.update()

    def log(self, step: int, tokens: int = 0, **values):
        """Record a step (counted from 1); values are plain numbers. tokens: how many there were since the last line."""
        now = time.time()
        if tokens:
            values["tokens_per_s"] = round(tokens / max(now - self.last_log, 1e-6))
            self.tokens, self.last_log = self.tokens + tokens, now
        if not self.show:
            return
        self._write({"step": step, **values})
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        if self.bar:
            self.bar.set_postfix_str(text)
        elif now - self.last_line >= 5 or step == self.total:
            left = (now - self.began) / max(1, step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {text}  left {left:.0f}s", flush=True)
            self.last_line = now

    def close(self):
        """Leave the terminal and the file in order."""
        if self.bar:
            self.bar.close()
        self.close_file()


def cut_metrics(path: Path, step: int):
    """Keep the lines of metrics.jsonl up to a step; a line torn by a crash belongs to no step."""
    def step_of(line: bytes) -> float:
        try:
            return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return math.inf

    if not os.path.lexists(path):
        return
    try:
        with open_file(path) as lines, atomic_write(path) as file:
            file.writelines(line for line in lines if step_of(line) <= step)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def numbers(metrics: dict) -> dict:
    """An evaluation without the replies."""
    return {name: value for name, value in metrics.items() if name != "replies"}


def width(text: str) -> int:
    """Columns on a terminal; Chinese characters take two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(rows: list) -> str:
    """Rows of cells (the first row is the head) as a Markdown table with aligned columns."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else "-" if c is None else printable(str(c)) for c in row]
             for row in rows]
    widths = [max(width(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c + " " * (w - width(c)) for c, w in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def compare(columns: list, results: list) -> str:
    """A table of several evaluations, one column each; a dict (accuracy_by_task) becomes a row per key."""
    rows = [["", *columns]]
    for name, value in results[-1].items():
        if isinstance(value, dict):
            columns = [found if isinstance(found := result.get(name), dict) else {} for result in results]
            rows += [[f"  {key}", *(column.get(key, "") for column in columns)] for key in value]
        elif value is None or isinstance(value, (int, float)):
            rows.append([name, *(result.get(name, "") for result in results)])
    return table(rows)


def before_after(before: dict, after: dict) -> str:
    """The table at the end of a run."""
    return compare(["before", "after"], [before, after])


def evenly_spaced(items: list, count: int) -> list:
    """`count` of the items (all, where there are fewer), the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count)]


def show_replies(columns: list, replies: list, count: int = 10) -> str:
    """A table of a few questions with the replies of each column: replies[column] = [[question, reply], ...]."""
    def cut(text):
        return printable(text).replace("|", "/")[:48]

    rows = [[cut(same[0][0]), *(cut(reply) for _, reply in same)] for same in evenly_spaced(list(zip(*replies)), count)]
    return table([["question", *columns]] + rows)


def show_samples(title: str, answers: list, rewards, advantages) -> str:
    """A table of sampled answers, the best first, with the reward and the advantage of each: tensors (G,).

    answers: texts, or (prompt, answer). Of a prompt the end is shown, which is where the question stands.
    """
    def shown(answer):
        if isinstance(answer, str):
            return printable(answer)[:64]
        prompt = " ".join(printable(re.sub(r"<\|\w+\|>", " ", answer[0])).split())  # without special tokens
        return f"{prompt[-64:]}: {printable(answer[1])[:64]}"

    rows = sorted(zip(rewards.tolist(), advantages.tolist(), map(shown, answers)), reverse=True)
    return table([["reward", "advantage", printable(title)[:64]]] + [list(row) for row in rows])


if __name__ == "__main__":
    curves.main()
