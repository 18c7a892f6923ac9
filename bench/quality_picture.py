"""Draws ``docs/plots/quality.svg``: KL divergence from the source over bits a weight, from committed results.

    python bench/quality_picture.py [--output docs/plots/quality.svg]

A column for each model. Above, forms of the linear layers, with embedding and head kept in 16 bits; below, whole models
as a tool makes them. Every point is a setting in ``bench/results/quality-*.json``, on Python's topics.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from picture import ROOT, WIDTH, Drawing, read

MODELS = {"quality-gemma-spread": "Gemma-3-270M", "quality-smollm2-spread": "SmolLM2-135M"}
TOOLS = {"mebp": ("mebp", "#1a66c2"), "bitsandbytes": ("bitsandbytes", "#7a7a7a"), "libgguf": ("GGUF", "#d08a1d")}
HEIGHT, GAP, TOP, LEFT = 330, 60, 84, 60  # pixels: of a panel, below it, above the first, and left of one
LABEL = 10  # font size
MOST_BITS = 6  # where the panels of linear layers end, because the points of more bits would push the others together


class Point(NamedTuple):
    tool: str
    label: str
    bits: float
    divergence: float


def short(setting: dict[str, Any]) -> str:
    """The label of a setting, without its tool, which the colour tells."""
    if setting["tool"] == "mebp quantize":
        flags = setting["linear"].replace("--calibration-file TEXT", "calibrated").replace("--bits-per-weight ", "")
        return flags.replace("--", "") or "no flags"
    words = {"symmetric": "sym", "affine": "aff", "codebook": "nf4", "float16": "", "int8": "2-level", "4": ""}
    return " ".join(filter(None, (words.get(word, word) for word in setting["linear"].split())))


def points(record: dict[str, Any], whole: bool) -> Iterator[Point]:
    for setting in record["settings"].values():
        made = setting["tool"] == "bitsandbytes" or (setting["linear"] and setting["tables"])
        made = made or (setting["tool"], setting["tables"]) == ("mebp quantize", "store")
        bits = setting["bits" if whole else "bits_linear"]
        if made if whole else setting["linear"] and not setting["tables"] and bits < MOST_BITS:
            yield Point(setting["tool"].split()[0], short(setting), bits, setting["topics"]["kl"])


class Panel:
    """Axes at a place of the drawing, bits from left to right and divergence upwards by its logarithm."""

    def __init__(self, drawing: Drawing, left: float, top: float, width: float, shown: Sequence[Point]) -> None:
        self.drawing, self.left, self.top, self.width = drawing, left, top, width
        bits, logs = [p.bits for p in shown], [math.log10(p.divergence) for p in shown]
        self.low_bits, self.high_bits = math.floor(min(bits) * 2) / 2, math.ceil(max(bits) * 2 + 0.5) / 2
        self.low, self.high = min(logs) - 0.15, max(logs) + 0.15
        self.taken: list[tuple[float, float, float, float]] = []

    def place(self, bits: float, divergence: float) -> tuple[float, float]:
        across = (bits - self.low_bits) / (self.high_bits - self.low_bits)
        up = (math.log10(divergence) - self.low) / (self.high - self.low)
        return self.left + self.width * across, self.top + HEIGHT * (1 - up)

    def axes(self, title: str) -> None:
        bottom, right = self.top + HEIGHT, self.left + self.width
        self.drawing.text(self.left, self.top - 8, title, size=12, colour="#555")
        for exponent in range(math.floor(self.low), math.ceil(self.high)):
            for step in (1, 2, 3, 5, 7):
                if 10**self.low <= (value := step * 10.0**exponent) <= 10**self.high:
                    y = self.place(self.low_bits, value)[1]
                    self.drawing.line([(self.left, y), (right, y)], "#e4e4e4", 1)
                    self.drawing.text(self.left - 6, y + 4, f"{value:g}", size=LABEL, anchor="end", colour="#555")
        for half in range(math.ceil(self.low_bits * 2), math.floor(self.high_bits * 2) + 1):
            bits = half / 2
            x = self.place(bits, 10**self.low)[0]
            self.drawing.line([(x, self.top), (x, bottom)], "#e4e4e4", 1)
            self.drawing.text(x, bottom + 14, f"{bits:g}", size=LABEL, anchor="middle", colour="#555")
        self.drawing.line([(self.left, bottom), (right, bottom)], "#888", 1)

    def dots(self, shown: Sequence[Point]) -> None:
        for point in shown:
            x, y = self.place(point.bits, point.divergence)
            self.drawing.dot(x, y, TOOLS[point.tool][1])
            self.taken.append((x - 3, y - 3, x + 3, y + 3))
        for point in sorted(shown, key=lambda p: p.divergence):
            self._label(point)

    def _label(self, point: Point) -> None:
        """Beside its dot, at the first place where nothing is."""
        x, y = self.place(point.bits, point.divergence)
        long = 0.56 * LABEL * len(point.label)
        for shift in (0, 9, -9, 18, -18, 27, -27):
            for anchor, start in (("start", x + 6), ("end", x - 6 - long)):
                box = (start, y + shift - 4, start + long, y + shift + 4)
                inside = self.left < box[0] and box[2] < self.left + self.width + 30 and self.top < box[1]
                if inside and not any(_meet(box, other) for other in self.taken):
                    self.taken.append(box)
                    text = x + 6 if anchor == "start" else x - 6
                    self.drawing.text(text, y + shift + 4, point.label, LABEL, anchor, TOOLS[point.tool][1])
                    return


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def picture() -> str:
    drawing, width = Drawing(), WIDTH / 2 - LEFT - 40
    drawing.text(14, 24, "KL divergence from the 16-bit model, over bits a weight (Python's topics)", size=15)
    for number, (label, colour) in enumerate(TOOLS.values()):
        drawing.dot(20 + 110 * number, 42, colour)
        drawing.text(30 + 110 * number, 46, label, colour=colour)
    for column, (name, title) in enumerate(MODELS.items()):
        record = read(name)
        for row, (whole, what) in enumerate(((False, "linear layers, the rest kept"), (True, "whole models"))):
            shown = list(points(record, whole))
            panel = Panel(drawing, column * WIDTH / 2 + LEFT, TOP + row * (HEIGHT + GAP), width, shown)
            panel.axes(f"{title}: {what}")
            panel.dots(shown)
    return drawing.svg(TOP + 2 * (HEIGHT + GAP) - 20, "KL divergence over bits a weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "plots" / "quality.svg", help="SVG file to write"
    )
    parser.parse_args().output.write_text(picture())


if __name__ == "__main__":
    main()
