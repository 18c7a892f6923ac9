"""The plots show a run's numbers, where they can be drawn."""

import importlib.util

import torch

from mebp_triton.system.memory import MemoryWatch
from mebp_triton.training.plots import draw_plots


def rows(count):
    return [{"step": step, "loss": 3.0 - step / 10} for step in range(count)]


def watched():
    """A step over three blocks, forwards and backwards."""
    watch = MemoryWatch(torch.device("cpu"))
    events = [("forward", 0), ("forward", 1), ("forward", 2), ("backward", 2), ("backward", 0)]
    watch.timeline = [(10.0 + i / 8, event, block, 1 << 24, 1 << 22, 0) for i, (event, block) in enumerate(events)]
    return watch


def test_plots_without_a_recorded_step(tmp_path):
    assert draw_plots(tmp_path, rows(2), MemoryWatch(torch.device("cpu"))) == ["loss.png"]
    assert draw_plots(tmp_path / "nowhere", [], watched()) == []


def test_without_matplotlib_there_are_no_plots_and_no_error(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name, *rest)
    )
    assert draw_plots(tmp_path, rows(2), watched()) == []
    assert list(tmp_path.iterdir()) == []


def test_the_plots_show_the_numbers(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    axes = {}

    def savefig(figure, *args, **kwargs):
        axes[figure.axes[0].get_title()] = figure.axes[0]

    monkeypatch.setattr(Figure, "savefig", savefig)
    assert draw_plots(tmp_path, rows(3), watched()) == ["loss.png", "memory.png", "time_per_block.png"]
    line, *others = axes["Loss"].lines
    assert not others
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [3.0, 2.9, 2.8]
    # Blocks 1 and 2 forward, block 0 backward took 125 ms; what lies between the passes is no block's.
    bars = {(round(bar.get_x() + bar.get_width() / 2, 6), bar.get_height()) for bar in axes["Time per block"].patches}
    assert bars == {(1.0, 125.0), (2.0, 125.0), (0.4, 125.0)}
    top = max(path.get_extents().y1 for area in axes["Memory over a step"].collections for path in area.get_paths())
    assert top == 16 + 4


def test_evaluations_are_drawn_beside_the_loss(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure.axes[0]))
    draw_plots(tmp_path, rows(4), MemoryWatch(torch.device("cpu")), [{"step": 1, "eval_loss": 2.5}])
    _, line = drawn[0].lines
    assert list(line.get_xdata()) == [2] and list(line.get_ydata()) == [2.5] and drawn[0].get_legend() is not None


def test_a_step_without_a_loss_leaves_a_gap(tmp_path):
    assert draw_plots(tmp_path, [*rows(2), {"step": 2, "loss": None}], watched())
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
