"""README's picture is what the script draws from the committed results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_picture_is_drawn_from_the_committed_results(tmp_path):
    script, drawn = ROOT / "bench" / "picture.py", tmp_path / "peers.svg"
    subprocess.run([sys.executable, str(script), "--output", str(drawn)], check=True)
    assert drawn.read_text() == (ROOT / "docs" / "plots" / "peers.svg").read_text(), "run bench/picture.py"


def test_a_bar_has_the_spread_of_its_rounds_and_the_heading_says_what_computed(bench_path):
    from picture import Drawing, bars

    rounds = {"rounds": [1.0, 2.0, 4.0], "median": 2.0, "spread": [1.0, 4.0]}
    side = {"seconds_per_step_median": 2.0, "tokens_per_second_median": 100.0, "peak_rss_mib_max": 500.0}
    machine = {"processor": "A processor", "threads": 2, "native": None, "bitsandbytes": "scalar"}
    drawing = Drawing()
    summary = {"mebp": side | {"seconds_per_step": rounds}, "mebp beside 2": side | {"peak_rss_mib_max": 9999.0}}
    bars(drawing, [{"summary": summary, "environment": machine}], 54)
    svg = drawing.svg(200, "")
    assert "A processor, 2 threads, our products by plain torch, bitsandbytes by scalar code" in svg
    # 165 pixels are the fastest round's 200 tokens/s, or the largest peak that is drawn; 50 tokens/s are the slowest.
    assert [part.split('width="')[1].split('"')[0] for part in drawing.parts if part.startswith("<rect")] == [
        "165.0",
        "82.5",
    ]
    assert 'points="436.2,94.0 560.0,94.0"' in svg
