"""An adapter is found in its own directory, and in the directory of its run."""

from mebp_triton.models.adapter_directory import CONFIG, find_adapter


def test_where_an_adapter_lies(tmp_path):
    run, own = tmp_path / "run", tmp_path / "run" / "adapter"
    own.mkdir(parents=True)
    assert find_adapter(run) == run  # without an adapter; whoever reads it says so
    (own / CONFIG).write_text("{}")
    assert find_adapter(str(run)) == find_adapter(own) == own
    (run / CONFIG).write_text("{}")
    assert find_adapter(run) == run
