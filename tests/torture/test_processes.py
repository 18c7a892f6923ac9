"""Several commands at once, in processes that know nothing of each other."""

import json

import pytest
import ranks

from mebp_triton.store.reader import Store
from mebp_triton.system.temporaries import TEMPORARY_PREFIX


def at_once(root, *commands):
    return ranks.run_ranks(
        ranks.command_alone, root / "log", [list(map(str, one)) for one in commands], size=len(commands)
    )


def refused(ended, *lines):
    """Checks that all commands but one were refused, each with one line, which contains one of ``lines``."""
    assert sorted(one.code for one in ended) == [0] + [2] * (len(ended) - 1), [one.err for one in ended]
    for one in ended:
        if one.code == 2:
            assert one.err.startswith("mebp: error: ") and one.err.count("\n") == 1 and not one.out, one.err
            assert any(line in one.err for line in lines), one.err


def files_in(*places):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for place in places
        for path in place.rglob("*")
        if path.is_file()
    }


def test_runs_share_a_store_and_do_not_share_a_directory(world, tmp_path):
    def train(output):
        flags = ["--max-steps=6", "--max-length=24", "--lora-r=4", "--device=cpu", "--save-steps=2"]
        return ["train", world / "store", f"--train-file={world / 'data/train.txt'}", f"--output-dir={output}", *flags]

    before = files_in(world)
    run, other = tmp_path / "run", tmp_path / "other"
    one, another, elsewhere = at_once(tmp_path, train(run), train(run), train(other))
    refused([one, another], "run is in use by another process", "run exists already")
    assert elsewhere.code == 0, elsewhere.err
    assert files_in(world) == before
    for name in ("adapter/adapter_model.safetensors", "checkpoint/state.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(6)) and (run / "run.json").exists()


@pytest.mark.parametrize("name", ["quantize", "merge"])
def test_one_of_three_commands_makes_the_directory_and_the_others_are_refused(world, tmp_path, name):
    made = tmp_path / "made"
    source, flags = (world / "model", ["--group-size=32"]) if name == "quantize" else (world / "store", ["--as-store"])
    ended = at_once(tmp_path, *[[name, source, made, *flags]] * 3)
    refused(ended, "made was made by another process meanwhile, and stays", "made exists already")
    for file in Store(made).files.values():
        file.verify()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]
