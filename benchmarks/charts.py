"""Two kinds of pictures as SVG, without any package: lines over steps, and groups of bars with their range."""

from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 16, 40, 56
COLOURS = ["#1f77b4", "#d95f02", "#2a9d5c", "#7b52ab", "#666666"]


def text(x, y, words, anchor="middle", size=12, turn=0) -> str:
    """A piece of text; turn: degrees to the left."""
    rotate = f' transform="rotate(-{turn} {x:.1f} {y:.1f})"' if turn else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{rotate}>'
            f"{escape(str(words))}</text>")


def ticks(low, high) -> list:
    """Four to eight round numbers between low and high."""
    step = 10.0 ** len(str(int(max(high - low, 1))))
    while (high - low) / step < 4:
        step /= 2 if str(step).strip("0.").startswith(("1", "5")) else 2.5
    first = -(-low // step)
    return [round((first + i) * step, 6) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def number(value) -> str:
    """A number on an axis."""
    return f"{value:,.6g}"


class Frame:
    """Axes, title and legend; place() turns values into points of the picture."""

    def __init__(self, title, y_label, x_range, y_range):
        self.x_range, self.y_range = x_range, y_range
        self.parts = [text(WIDTH / 2, 20, title, size=15), text(16, HEIGHT / 2, y_label, turn=90)]
        for value in ticks(*y_range):
            y = self.place(x_range[0], value)[1]
            self.parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
            self.parts.append(text(LEFT - 6, y + 4, number(value), "end"))

    def place(self, x, y) -> tuple:
        """Values -> (x, y) in the picture."""
        (left, right), (low, high) = self.x_range, self.y_range
        return (LEFT + (x - left) / ((right - left) or 1) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM))

    def legend(self, names):
        """A coloured square and a name for each."""
        for i, name in enumerate(names):
            x = LEFT + i * (WIDTH - LEFT - RIGHT) / len(names)
            self.parts.append(f'<rect x="{x:.1f}" y="{HEIGHT - 16}" width="10" height="10" fill="{COLOURS[i]}"/>')
            self.parts.append(text(x + 15, HEIGHT - 7, name, "start"))

    def save(self, path):
        """Write the file."""
        Path(path).write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
                              'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>\n'
                              + "\n".join(self.parts) + "\n</svg>\n", encoding="utf-8")


def lines(path, title: str, x_label: str, y_label: str, series: dict, y_range=None):
    """series: {name: [a line, ...]}, each line [(x, y), ...]: the lines of one name share a colour."""
    points = [point for each in series.values() for line in each for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    frame = Frame(title, y_label, (min(xs), max(xs)), y_range or (min(ys), max(ys)))
    for value in ticks(*frame.x_range):
        x = frame.place(value, frame.y_range[0])[0]
        frame.parts.append(text(x, HEIGHT - BOTTOM + 16, number(value)))
    frame.parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 24, x_label))
    for colour, each in zip(COLOURS, series.values()):
        for line in each:
            path_of = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.place(*point) for point in line))
            frame.parts.append(f'<polyline points="{path_of}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    frame.legend(series)
    frame.save(path)


def bars(path, title: str, y_label: str, groups: list, series: dict, y_range=(0, 100)):
    """series: {name: [(mean, smallest, largest) of each group]}: a bar up to the mean, a thin line over the range."""
    frame = Frame(title, y_label, (0, len(groups)), y_range)
    width = 0.8 / len(series)
    for i, group in enumerate(groups):
        frame.parts.append(text(frame.place(i + 0.5, 0)[0], HEIGHT - BOTTOM + 16, group))
    for number_of, (colour, values) in enumerate(zip(COLOURS, series.values())):
        for i, (mean, low, high) in enumerate(values):
            left, top = frame.place(i + 0.1 + number_of * width, mean)
            right, bottom = frame.place(i + 0.1 + (number_of + 1) * width, y_range[0])
            frame.parts.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" '
                               f'height="{bottom - top:.1f}" fill="{colour}"/>')
            middle, (_, y1), (_, y2) = (left + right) / 2 - 1, frame.place(0, low), frame.place(0, high)
            frame.parts.append(f'<line x1="{middle:.1f}" y1="{y1:.1f}" x2="{middle:.1f}" y2="{y2:.1f}" '
                               'stroke="black"/>')
    frame.legend(series)
    frame.save(path)
