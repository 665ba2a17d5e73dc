"""Chapter 33: seeing inside. The curves of runs, in the terminal and as a drawing.

After this chapter you can read a line of blocks: the lowest value of a curve is the lowest block, the highest the full
one, so 1, 4.5 and 8 are ▁ ▄ █ (the range from 1 to 8 in steps of one block each).

Two questions. What does the line of a run look like whose loss never moves? And with one NaN among its values?
"""

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from minillm import curves
from minillm.metrics import show_samples


@pytest.fixture
def runs(tmp_path):
    """a: reward 1 to 8 in eight steps, and a line torn by a crash; b: two steps only."""
    for name, values in (("a", range(1, 9)), ("b", (5, 3))):
        (tmp_path / name).mkdir()
        text = "".join(f'{{"step": {i}, "reward": {value}}}\n' for i, value in enumerate(values, 1))
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"step": 9, "rew', encoding="utf-8")
    return [str(tmp_path / name) for name in "ab"]


def test_a_curve_as_blocks():
    assert curves.sparkline([(1, 1), (2, 4.5), (3, 8)]) == "▁▄█"
    assert curves.sparkline([(1, 3.0), (2, 3.0)]) == "▁▁"
    assert len(curves.sparkline([(i, i) for i in range(1000)])) == 40


def test_both_runs_are_named_in_text_and_drawing(runs, tmp_path, capsys):
    curves.main([*runs, "--svg", str(tmp_path / "x.svg")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["reward", "▁▂▃▄▅▆▇█", "1", "->", "8", runs[0]]
    assert lines[1].split() == ["reward", "█▁", "5", "->", "3", runs[1]]
    drawing = ElementTree.parse(tmp_path / "x.svg").getroot()
    texts = [element.text for element in drawing.iter() if element.tag.endswith("text")]
    lines = [element.get("points") for element in drawing.iter() if element.tag.endswith("polyline")]
    assert {"reward", "a", "b", "step 8"} <= set(texts) and [len(line.split()) for line in lines] == [8, 2]
    # From x 50 to 410 and from y 200 (the lowest value, 1) to 50 (the highest, 8).
    assert lines[0].startswith("50.0,200.0 ") and lines[0].endswith(" 410.0,50.0")


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        curves.main([str(tmp_path / "nowhere")])
    assert "metrics.jsonl is not there" in capsys.readouterr().err


def test_a_group_is_shown_from_the_best_answer_to_the_worst():
    """Rewards 0 and 1: mean 0.5, so dr_grpo's advantages are -0.5 and 0.5."""
    lines = show_samples("2 + 2?", ["5|", "4"], torch.tensor([0.0, 1.0]), torch.tensor([-0.5, 0.5])).splitlines()
    assert [line.split() for line in lines[2:]] == [["|", "1.000", "|", "0.500", "|", "4", "|"],
                                                    ["|", "0.000", "|", "-0.500", "|", "5/", "|"]]
    assert "2 + 2?" in lines[0]
