"""Draws README's picture, ``docs/plots/peers.svg``, from committed results.

    python bench/picture.py [--output docs/plots/peers.svg]

Peak memory and speed beside transformers + PEFT + bitsandbytes, and the peak by sequence length. Every number in the
picture is read from a file in ``bench/results``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PEERS = ("smollm2-peers-cpu",)
LENGTHS = "memory-lengths-cpu"
SIDES = {  # in the result files: label, colour
    "mebp": ("mebp train", "#1a66c2"),
    "mebp-resident": ("mebp train, resident", "#1a66c2"),
    "nf4-float32+mebp": ("PEFT with our layers", "#83b3e8"),
    "nf4-float32": ("PEFT + bitsandbytes", "#a3a3a3"),
    "nf4-float32-scalar": ("the same, no AVX-512", "#a3a3a3"),
    "float32": ("PEFT, float32", "#c9c9c9"),
}
MIB = 1 << 20
WIDTH, ROW, LEFT = 940, 24, 175  # pixels; the bars begin at LEFT


class Drawing:
    """Elements of an SVG picture."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, size: int = 13, anchor: str = "start", colour: str = "#222") -> None:
        place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
        self.parts.append(f"<text {place}>{escape(text)}</text>")

    def bar(self, x: float, y: float, length: float, colour: str) -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{length:.1f}" height="{ROW - 8}" fill="{colour}"/>')

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 2) -> None:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>')

    def dot(self, x: float, y: float, colour: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')

    def svg(self, height: float, title: str) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif">'
        back = f'<rect width="{WIDTH}" height="{height:g}" rx="6" fill="#fff"/>'
        return "\n".join([head, f"<title>{escape(title)}</title>", back, *self.parts, "</svg>", ""])


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def speeds(summary: dict[str, Any]) -> tuple[float, float] | None:
    """The smallest and largest tokens per second of a side's rounds; None in a file without rounds."""
    if "seconds_per_step" not in summary:
        return None
    tokens = summary["tokens_per_second_median"] * summary["seconds_per_step_median"]
    shortest, longest = summary["seconds_per_step"]["spread"]
    return tokens / longest, tokens / shortest


def heading(environment: dict[str, Any]) -> str:
    """What a group of bars was measured on."""
    words = f"{environment['processor']}, {environment['threads']} threads"
    if "native" in environment:
        words += f", our products by {environment['native'] or 'plain torch'}"
    if environment.get("bitsandbytes"):
        words += f", bitsandbytes by {environment['bitsandbytes'].replace('scalar', 'scalar code')}"
    return words


def bars(drawing: Drawing, records: Sequence[dict[str, Any]], top: float) -> float:
    """Peak and speed of every side, a group of rows for each file; returns where the rows end.

    A thin line across a bar's end goes from the slowest round to the fastest.
    """
    columns = {"peak_rss_mib_max": ("peak memory, MiB", LEFT), "tokens_per_second_median": ("tokens/s", LEFT + 220)}
    room = 165
    drawn = [record["summary"][name] for record in records for name in SIDES if name in record["summary"]]
    longest = {key: max(side[key] for side in drawn) for key in columns}
    longest["tokens_per_second_median"] = max(
        (speeds(side) or (0, side["tokens_per_second_median"]))[1] for side in drawn
    )
    for title, x in columns.values():
        drawing.text(x, top, title, colour="#555")
    y = top + 24
    for record in records:
        drawing.text(14, y, heading(record["environment"]), size=12, colour="#555")
        y += 8
        for name, (label, colour) in SIDES.items():
            if name not in record["summary"]:
                continue
            drawing.text(14, y + 13, label)
            for key, (_, x) in columns.items():
                value = record["summary"][name][key]
                scale, end = room / longest[key], value
                drawing.bar(x, y, scale * value, colour)
                if key == "tokens_per_second_median" and (found := speeds(record["summary"][name])):
                    end = found[1]
                    drawing.line([(x + scale * speed, y + (ROW - 8) / 2) for speed in found], "#222", 1.5)
                drawing.text(x + scale * end + 5, y + 13, f"{value:.0f}", size=12)
            y += ROW
        y += 22
    return y


def lines(drawing: Drawing, record: dict[str, Any], top: float, bottom: float) -> None:
    """Peak memory by sequence length, of ours and of the peer."""
    left, right = 660.0, WIDTH - 60.0
    drawing.text(left - 30, top, "peak memory by tokens in a sequence, MiB", colour="#555")
    peaks: dict[str, dict[int, float]] = {"mebp": {}, "peft nf4": {}}
    for row in record["rows"]:
        if row["side"] in peaks:
            peaks[row["side"]][row["settings"]["max_length"]] = row["peak_rss_bytes"] / MIB
    tokens = sorted(peaks["mebp"])
    highest = max(max(values.values()) for values in peaks.values())

    def place(count: int, peak: float) -> tuple[float, float]:
        return left + (right - left) * count / tokens[-1], bottom - (bottom - top - 30) * peak / highest

    drawing.line([(left, bottom), (right, bottom)], "#888", 1)
    for count in tokens[2:]:  # the first two would touch
        drawing.text(place(count, 0)[0], bottom + 16, str(count), size=12, anchor="middle", colour="#555")
    for side, colour in (("peft nf4", SIDES["nf4-float32"][1]), ("mebp", SIDES["mebp"][1])):
        points = [place(count, peaks[side][count]) for count in tokens]
        drawing.line(points, colour)
        for x, y in points:
            drawing.dot(x, y, colour)
        drawing.text(points[-1][0] + 8, points[-1][1] + 4, f"{peaks[side][tokens[-1]]:.0f}", size=12)


def picture() -> str:
    records, lengths = [read(name) for name in PEERS], read(LENGTHS)
    drawing = Drawing()
    drawing.text(14, 24, "Fine-tuning SmolLM2-135M with LoRA on a CPU, float32", size=15)
    end = bars(drawing, records, 54)
    lines(drawing, lengths, 54, end - 46)
    settings = records[0]["settings"]
    commits = [record["environment"]["commit"][:7] for record in records]
    sources = " and ".join(f"{name}.json ({commit})" for name, commit in zip(PEERS, commits, strict=True))
    bar_note = f"Bars: rank {settings['lora_r']}, {settings['max_length']} tokens per step; {sources}."
    if any(speeds(side) for record in records for side in record["summary"].values()):
        bar_note += " Thin lines: slowest to fastest round."
    line_note = f"Lines: {lengths['environment']['threads']} CPU threads; {LENGTHS}.json ({lengths['commit'][:7]})."
    drawing.text(14, end, bar_note, size=11, colour="#555")
    line_note += " The peer is transformers + PEFT + bitsandbytes NF4."
    drawing.text(14, end + 16, line_note, size=11, colour="#555")
    return drawing.svg(end + 30, "Peak memory and speed beside transformers + PEFT + bitsandbytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "plots" / "peers.svg", help="SVG file to write")
    parser.parse_args().output.write_text(picture())


if __name__ == "__main__":
    main()
