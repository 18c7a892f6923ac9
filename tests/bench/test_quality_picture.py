"""The picture of quality is what the script draws from the committed results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_picture_is_drawn_from_the_committed_results(tmp_path):
    script, drawn = ROOT / "bench" / "quality_picture.py", tmp_path / "quality.svg"
    subprocess.run([sys.executable, str(script), "--output", str(drawn)], check=True)
    assert drawn.read_text() == (ROOT / "docs" / "plots" / "quality.svg").read_text(), "run bench/quality_picture.py"
