"""What a run tells: a progress bar, metrics.jsonl, tables."""

import json
import sys
import time
import unicodedata
from pathlib import Path

from tqdm import tqdm


class Progress:
    """Shows steps, metrics and time left, appends every logged step to OUT/metrics.jsonl, writes OUT/summary.json.

    On a terminal a bar; elsewhere (a file, a pipe, CI) plain lines, at most one every five seconds.
    """

    def __init__(self, out: str, total: int, start: int = 0, show: bool = True):
        self.out, self.total, self.first, self.show = Path(out), total, start, show
        self.began, self.tokens, self.last_line, self.last_log = time.time(), 0, 0.0, (time.time(), 0)
        self.file = open(self.out / "metrics.jsonl", "a", encoding="utf-8") if show else None
        self.bar = tqdm(total=total, initial=start, dynamic_ncols=True) if show and sys.stderr.isatty() else None
        if start and show:
            print(f"resuming after step {start} of {total}", flush=True)
            self.file.write(json.dumps({"step": start, "resumed": True}) + "\n")

    def step(self, tokens: int):
        """One optimizer step over so many tokens (padding not counted) is done."""
        self.tokens += tokens
        if self.bar:
            self.bar.update()

    def log(self, step: int, **values):
        """Record one optimizer step (1-based); values are plain numbers."""
        if not self.show:
            return
        now, (then, tokens) = time.time(), self.last_log
        if self.tokens > tokens:
            values["tokens_per_s"] = round((self.tokens - tokens) / (now - then))
            self.last_log = now, self.tokens
        self.file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        self.file.flush()
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        if self.bar:
            self.bar.set_postfix_str(text)
        elif now - self.last_line >= 5 or step == self.total:
            left = (now - self.began) / max(1, step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {text}  left {left:.0f}s", flush=True)
            self.last_line = now

    def close(self):
        if self.bar:
            self.bar.close()
        if self.file:
            self.file.close()

    def interrupted(self, step: int) -> dict:
        """Say that the run was saved, and how it goes on."""
        self.close()
        if self.show:
            print(f"interrupted: saved after step {step} of {self.total}; the same command with --resume continues", flush=True)
        return {"interrupted": True, "step": step}

    def finish(self, data: dict, before: dict, after: dict, peak_memory_mb: float) -> dict:
        """Write OUT/summary.json (what went in, before and after, MiB; seconds and tokens since the last start) and return the numbers of `after`."""
        self.close()
        numbers = lambda metrics: {k: v for k, v in metrics.items() if k != "replies"}
        summary = {"data": data, "steps": self.total, "resumed_after": self.first, "tokens": self.tokens, "seconds": round(time.time() - self.began, 1),
                   "peak_memory_mb": round(peak_memory_mb, 1), "before": numbers(before), "after": numbers(after)}
        if self.show:
            write_json(self.out / "summary.json", summary)
        return {**numbers(after), "seconds": summary["seconds"]}


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def width(text: str) -> int:
    """Columns on a terminal; Chinese characters take two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(rows: list) -> str:
    """Rows of cells (the first row is the head) as a Markdown table with aligned columns."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(width(row[i]) for row in cells) for i in range(len(cells[0]))]
    line = lambda row: "| " + " | ".join(c + " " * (w - width(c)) for c, w in zip(row, widths)) + " |"
    return "\n".join([line(cells[0]), "|" + "|".join("-" * (w + 2) for w in widths) + "|"] + [line(r) for r in cells[1:]])


def before_after(before: dict, after: dict) -> str:
    """A table of the numbers of two evaluations; a dict among them (accuracy_by_task) becomes a row per key."""
    rows = [["", "before", "after"]]
    for key, value in after.items():
        if isinstance(value, dict):
            rows += [[f"  {k}", before[key].get(k, ""), v] for k, v in value.items()]
        elif isinstance(value, (int, float)):
            rows.append([key, before.get(key, ""), value])
    return table(rows)


def show_replies(records: list, before: list, after: list, count: int = 10) -> str:
    """A table of a few questions (evenly spaced over the file) with the replies before and after."""
    count = min(count, len(records))
    picked = [round(i * (len(records) - 1) / max(1, count - 1)) for i in range(count)]
    cut = lambda text: text.replace("\n", " ").replace("|", "/")[:48]
    asked = lambda record: next((m["content"] for m in reversed(record["conversations"]) if m["role"] == "user"), "")
    return table([["question", "before", "after"]] + [[cut(asked(records[i])), cut(before[i]), cut(after[i])] for i in picked])
