"""One block's float weights are in memory at a time, and what cannot be followed is refused."""

import pytest
from models import save_tiny_model
from source_runs import opened_source, random_rows, source_run

from mebp_triton.convert.calibration.source_run import SourceRun


def test_one_block_is_in_memory_at_a_time(tmp_path):
    run = source_run(tmp_path, "llama")
    assert run.path == "model.layers"
    for index, block in enumerate(run.stream.runner.blocks):
        assert run.prefix == f"model.layers.{index}."
        with run.block():
            resident = {name for name, value in run.model.named_parameters() if value.device.type != "meta"}
            inside = {name for name in resident if name.startswith("model.layers.")}
            assert inside == {f"{run.prefix}{name}" for name, _ in block.named_parameters()}
            run.stream.advance()
    assert all(value.device.type == "meta" for block in run.stream.runner.blocks for value in block.parameters())


def test_windows_are_evenly_spaced(tmp_path):
    source = opened_source(save_tiny_model("llama", tmp_path / "model"))
    data = random_rows(6)
    run = SourceRun(source, data, 2, tmp_path)
    assert [batch["input_ids"].tolist() for batch in run.stream.batches] == [
        [data[place].input_ids.tolist()] for place in (0, 3)
    ]


def test_tokens_of_another_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the text has the token id 1\\d\\d, and the model 97 tokens"):
        source_run(tmp_path, "llama", random_rows(vocabulary=200))


def test_a_model_that_changes_its_weights_is_refused(tmp_path):
    """RWKV divides the weights of its upper blocks when it runs for the first time."""
    run = source_run(tmp_path, "rwkv")
    with run.block(), pytest.raises(ValueError, match="RwkvForCausalLM changes its weights while it runs"):
        run.stream.advance()


def test_the_blocks_can_be_named(tmp_path):
    source = opened_source(save_tiny_model("llama", tmp_path / "model"))
    assert SourceRun(source, random_rows(), None, tmp_path, "model.layers").path == "model.layers"
    with pytest.raises(ValueError, match="is no module"):
        SourceRun(source, random_rows(), None, tmp_path, "model.blocks")
