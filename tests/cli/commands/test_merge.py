"""``mebp merge``: the loss before and after it, and what is refused with one line."""

import json

import pytest
from commands import adapter, answer, assert_refused
from runs import sentences
from transformers import AutoModelForCausalLM

from mebp_triton.store.reader import Store


def validation(world):
    return [f"--validation-file={world / 'train.txt'}", "--max-length=24", "--max-eval-windows=4", "--json"]


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 5e-2), ("float16", 5e-3)])
def test_the_loss_of_a_directory_beside_that_of_the_adapter(world, mebp, tmp_path, dtype, near):
    value = answer(
        mebp("merge", world / "store", tmp_path / "out", adapter(world), f"--dtype={dtype}", *validation(world))
    )
    evaluated = answer(mebp("eval", world / "store", adapter(world), *validation(world)))
    plain = answer(mebp("eval", world / "store", *validation(world)))
    assert value["loss_with_adapter"] == evaluated["loss"] < plain["loss"] - 0.3
    assert value["loss_merged"] == pytest.approx(evaluated["loss"], abs=near)
    assert value["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("options", [["--as-store"], ["--scheme=affine"], ["--group-size=64", "--no-scale-search"]])
def test_the_loss_of_a_store_is_what_eval_says_of_it(world, mebp, tmp_path, options):
    out = tmp_path / "out"
    value = answer(mebp("merge", world / "store", out, adapter(world), *options, *validation(world)))
    evaluated = answer(mebp("eval", out, *validation(world)))
    assert value["loss_merged"] == evaluated["loss"] and "dtype" not in value
    assert value["quantized_anew"] == (21 if options == ["--as-store"] else 22)
    assert 0 < value["relative_error_worst"] < 0.2
    if "--no-scale-search" in options:
        searched = answer(mebp("merge", world / "store", tmp_path / "searched", adapter(world), options[0], "--json"))
        assert searched["relative_error_worst"] < value["relative_error_worst"]
    schemes = {info.scheme for info in Store(out).matrices.values()}
    assert schemes == {"affine" if options == ["--scheme=affine"] else "symmetric"}


def test_the_validation_file_is_what_eval_takes(world, mebp, tmp_path):
    directory, out = tmp_path / "rows", tmp_path / "out"
    directory.mkdir()
    talk = [{"prompt": sentences(1, place).strip(), "completion": sentences(1, place + 9)} for place in range(3)]
    (directory / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    losses = {}
    for flag in ("--completion-only-loss", "--no-completion-only-loss"):
        options = [f"--validation-file={directory}", flag, "--max-length=64", "--json", adapter(world)]
        losses[flag] = answer(mebp("eval", world / "store", *options))["loss"]
        value = answer(mebp("merge", world / "store", out / flag, "--as-store", *options))
        assert value["loss_with_adapter"] == losses[flag]
    assert len(set(losses.values())) == 2


def test_without_a_text_nothing_is_evaluated(world, mebp, tmp_path):
    code, out, _ = mebp("merge", world / "store", tmp_path / "out")
    assert code == 0 and "float32" in out and "loss" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype=float16", "--as-store"], "choose one"),
        (["--dtype=float16", "--scheme=affine"], "choose one"),
        (["--dtype=float16", "--group-size=32"], "choose one"),
        (["--adapter=nowhere"], "nowhere is not an adapter"),
        (["--validation-file=nowhere.txt"], "validation-file nowhere.txt: no such file"),
        (["--max-eval-windows=0"], "--max-eval-windows: must be a whole number of at least 1, got 0"),
        (["--dtype=int4"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, arguments, words):
    assert_refused(mebp, ["merge", world / "store", tmp_path / "out", *arguments], [words], world, tmp_path)


def test_an_existing_directory_is_kept(mebp, world):
    assert_refused(mebp, ["merge", world / "store", world / "run", adapter(world)], ["run exists already"], world)
