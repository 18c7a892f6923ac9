"""``mebp verify``: a whole store, a damaged one, and changes that are accepted."""

import shutil
from pathlib import Path

import pytest
from commands import answer, assert_refused, flipped, truncated


def test_a_whole_store(mebp, world):
    value = answer(mebp("verify", world / "store", "--json"))
    size = sum(path.stat().st_size for path in (world / "store").glob("*.safetensors"))
    assert value == {"store": str(world / "store"), "files": 4, "bytes": size, "whole": True}
    code, out, _ = mebp("verify", world / "store")
    assert code == 0 and "all agree" in out


def test_changed_companions_are_accepted_when_that_is_meant(mebp, world, tmp_path):
    store = Path(shutil.copytree(world / "store", tmp_path / "store"))
    (store / "chat_template.jinja").write_text("{{ messages }}")
    code, _, err = mebp("verify", store)
    assert code == 2 and f"`mebp verify --accept-changes {store}`" in err
    code, _, err = mebp("verify", "--accept-changes", store)
    assert code == 0 and err.startswith("chat_template.jinja is taken as it is\n")
    assert mebp("verify", store)[0] == 0


MISTAKES = {
    "no store": (lambda w, t: t / "none", ["none is not a directory"]),
    "an empty directory": (lambda w, t: t, ["no manifest.json; make one with `mebp quantize`"]),
    "a file": (lambda w, t: w / "train.txt", ["train.txt is not a directory"]),
    "a truncated store": (truncated, ["block-00001.safetensors has 500 bytes", "cut short"]),
    "a flipped bit": (flipped, ["block-00001.safetensors is damaged"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, name):
    store, parts = MISTAKES[name]
    assert_refused(mebp, ["verify", store(world, tmp_path)], parts, world, tmp_path)
