"""Curves of runs: metrics.jsonl as lines of text in the terminal and as an SVG file.

    python -m minillm.metrics out/grpo out/ppo --svg curves.svg
"""

import argparse
import html
import json
from pathlib import Path

from minillm.errors import UserError, printable
from minillm.safetensors import open_file

BARS, COLOURS = "▁▂▃▄▅▆▇█", ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bc4c00")
WIDTH, HEIGHT, MARGIN = 360, 150, 50


def read_curves(folder) -> dict:
    """{metric: [(step, value), ...]} of FOLDER/metrics.jsonl. Raises UserError without one."""
    path, curves = Path(folder) / "metrics.jsonl", {}
    if not path.is_file():
        raise UserError(f"{path} is not there: give the --out folder of a run")
    with open_file(path) as file:
        lines = file.read().splitlines()
    for line in lines:
        try:
            record = json.loads(line)
            step = record["step"]
            values = {name: float(value) for name, value in record.items() if type(value) in (int, float)}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # torn by a crash, or no such line
            continue
        for name, value in values.items() if type(step) is int else ():
            if name != "step" and abs(value) < 1e300:  # also false for NaN
                curves.setdefault(printable(name)[:40], []).append((step, value))
    return curves


def sparkline(points: list, width: int = 40) -> str:
    """At most `width` characters whose height is the value, the lowest and the highest one filling the range."""
    values = [value for _, value in points]
    values = [values[i * len(values) // min(width, len(values))] for i in range(min(width, len(values)))]
    low, high = min(values), max(values)
    return "".join(BARS[int((value - low) / (high - low or 1) * (len(BARS) - 1))] for value in values)


def as_text(runs: dict) -> str:
    """runs: {folder: curves}. One line for each metric of each run: its curve, its first and its last value."""
    lines = []
    for name in dict.fromkeys(name for curves in runs.values() for name in curves):
        for folder, curves in runs.items():
            if name in curves:
                first, last = curves[name][0][1], curves[name][-1][1]
                lines.append(f"{name:<22} {sparkline(curves[name]):<40} {first:.4g} -> {last:.4g}  {folder}")
    return "\n".join(lines)


def as_svg(runs: dict) -> str:
    """One plot for each metric, two beside each other, a line for each run, named under the title."""
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    cell_w, cell_h = WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN
    parts = []
    for i, name in enumerate(names):
        drawn = {folder: curves[name] for folder, curves in runs.items() if name in curves}
        points = [point for curve in drawn.values() for point in curve]
        (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points))
        x0, y0 = i % 2 * cell_w + MARGIN, i // 2 * cell_h + MARGIN
        parts.append(f'<text x="{x0}" y="{y0 - 24}" font-weight="bold">{html.escape(name)}</text>')
        parts.append(f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#8b949e"/>')
        parts += [f'<text x="{x0 - 4}" y="{y}" text-anchor="end" font-size="10">{value:.3g}</text>'
                  for value, y in ((high, y0 + 10), (low, y0 + HEIGHT))]
        parts.append(f'<text x="{x0 + WIDTH}" y="{y0 + HEIGHT + 14}" text-anchor="end" font-size="10">'
                     f"step {right}</text>")
        for number, (folder, curve) in enumerate(drawn.items()):
            colour = COLOURS[list(runs).index(folder) % len(COLOURS)]
            path = " ".join(f"{x0 + (x - left) / (right - left or 1) * WIDTH:.1f},"
                            f"{y0 + HEIGHT - (y - low) / (high - low or 1) * HEIGHT:.1f}" for x, y in curve)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts.append(f'<text x="{x0 + number * 120}" y="{y0 - 8}" fill="{colour}" font-size="11">'
                         f"{html.escape(Path(folder).name)}</text>")
    height = (len(names) + 1) // 2 * cell_h
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * cell_w}" height="{height}" font-family="sans-serif" '
            f'fill="#768390" font-size="13">\n' + "\n".join(parts) + "\n</svg>\n")


def main(argv=None):
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="OUT", help="the --out folders of one or several runs")
    parser.add_argument("--svg", default="curves.svg", help="the drawing (default curves.svg)")
    options = parser.parse_args(argv)
    try:
        runs = {folder: read_curves(folder) for folder in options.folders}
        print(as_text(runs))
        Path(options.svg).write_text(as_svg(runs), encoding="utf-8")
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    except OSError as error:
        parser.exit(1, f"error: {options.svg}: {error.strerror}\n")
    print(f"drawn: {options.svg}")
