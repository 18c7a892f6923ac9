"""What the script has recorded of real models in the real llama.cpp keeps its bounds."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "gguf-export.json"


@pytest.mark.parametrize("model", ["SmolLM2-135M", "Gemma-3-270M"])
def test_recorded_divergences_keep_their_bounds(model):
    found = json.loads(RESULTS.read_text())[model]
    assert found["positions"] == 50
    assert found["base_adapter"] <= 1e-2
    assert max(found["F32_adapter"], found["merged"]["F16"]["kl"]) <= 1e-3 < found["F32_control"]
