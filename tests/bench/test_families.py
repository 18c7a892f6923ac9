"""The sweep over all causal language models: what it calls equal, refused and upstream's, and what the page says."""

import json
import os

import pytest
import torch
import transformers
from sources import ROOT

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="the tiny configs are those of transformers 5")


@pytest.fixture
def families(bench_path):
    import families

    return families


def test_a_family_that_works_and_one_that_is_refused(families):
    record = families.record_of("olmo2")
    assert record["result"] == "equal" and record["worst"] <= families.TOLERANCE and record["gradients"] == 56
    assert record["class"] == "Olmo2ForCausalLM" and record["loss_error"] <= families.TOLERANCE
    refused = families.record_of("xlm")
    assert refused["result"] == "refused" and refused["why"].startswith("XLMWithLMHeadModel has several lists of")
    assert families.record_of("git")["result"] == "upstream"


def test_another_gradient_is_seen(families):
    truth = {"a": torch.tensor([3.0, 4.0]), "b": None, "c": torch.tensor([1e-9])}
    assert families.errors(truth, truth) == {"a": 0, "b": 0, "c": 0}
    found = families.errors(truth | {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([5e-6])}, truth)
    assert found == pytest.approx({"a": 0.1, "b": 1, "c": 0})
    assert families.errors({"a": None, "b": None, "c": None}, truth)["a"] == 1


def test_a_process_that_dies_is_told(families):
    assert families.in_a_process(lambda: {"result": "equal"}) == {"result": "equal"}
    assert families.in_a_process(lambda: os._exit(3))["result"] == "broken"


def test_the_page_has_the_committed_results(families):
    record = json.loads(families.RESULTS.read_text())
    page = (ROOT / "docs" / "models.md").read_text()
    assert families.tables(record) in page
    assert sum(record["counts"].values()) == len(record["models"]) > 150
    if record["environment"]["versions"]["transformers"] == transformers.__version__:
        assert record["models"].keys() == families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert record["counts"]["different"] == record["counts"]["broken"] == 0
