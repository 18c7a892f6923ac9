"""Where rows come from: files, directories of splits, saved datasets."""

import pytest

from mebp_triton.data import load_data


def test_missing_file_and_directory(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="train-file .*gone.txt: no such file"):
        load_data(tmp_path / "gone.txt", tokenizer, 8)
    with pytest.raises(ValueError, match="is a directory"):
        load_data(str(tmp_path), tokenizer, 8)
