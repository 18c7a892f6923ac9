"""``mebp merge``: the loss before and after it, and what is refused with one line."""

import json
import re
import shlex
import shutil

import pytest
from commands import adapter, answer, assert_refused
from runs import sentences
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mebp_triton.cli.commands import merge as command
from mebp_triton.convert.recipe import TABLE_FORM
from mebp_triton.kernels.names import DEFAULT_FORM, DEFAULT_FORMS, Form
from mebp_triton.store.reader import Store
from mebp_triton.system import strict_json


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


@pytest.mark.parametrize("options", [["--as-store"], ["--embedding-bits=4"], ["--group-size=64", "--no-scale-search"]])
def test_the_loss_of_a_store_is_what_eval_says_of_it(world, mebp, tmp_path, options):
    out = tmp_path / "out"
    value = answer(mebp("merge", world / "store", out, adapter(world), *options, *validation(world)))
    evaluated = answer(mebp("eval", out, *validation(world)))
    assert value["loss_merged"] == evaluated["loss"] and "dtype" not in value
    # The embedding has no adapter, and its form is asked for by --embedding-bits.
    assert value["quantized_anew"] == (22 if options[0] == "--embedding-bits=4" else 21)
    assert 0 < value["relative_error_worst"] < 0.2
    if "--no-scale-search" in options:
        searched = answer(mebp("merge", world / "store", tmp_path / "searched", adapter(world), options[0], "--json"))
        assert searched["relative_error_worst"] < value["relative_error_worst"]
    forms = {name: info.form for name, info in Store(out).matrices.items()}
    assert forms.pop("model.embed_tokens") == (DEFAULT_FORM if options[0] == "--embedding-bits=4" else TABLE_FORM)
    wanted = Form(DEFAULT_FORM.scheme, 64 if "--group-size=64" in options else 32)
    if value["tried"][-1]["bits"] == 8 and "--as-store" in options:  # their own levels lost too much
        wanted = DEFAULT_FORMS[8]
    assert set(forms.values()) == {wanted}


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


def test_a_store_is_measured_on_the_text_of_its_run(world, mebp, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ENOUGH", 0.75)  # rounding costs more in a model as narrow as this one
    code, out, err = mebp("merge", world / "store", tmp_path / "out", adapter(world), "--as-store", "--json")
    assert code == 0, err
    value = json.loads(out)
    assert value["measured_on"] == str(world / "train.txt") and value["loss_with_adapter"] < value["loss_untrained"]
    won = value["loss_untrained"] - value["loss_with_adapter"]
    assert (
        value["kept"] == pytest.approx((value["loss_untrained"] - value["loss_merged"]) / won) and value["kept"] > 0.75
    )
    (tried,) = value["tried"]
    assert tried["loss"] == value["loss_merged"] and tried["bytes"] == value["bytes"]
    line = next(line for line in err.splitlines() if line.startswith("loss on"))
    assert f"{value['loss_merged']:.4g} merged: {value['kept']:.1%} of what training won is kept" in line
    shown = mebp("merge", world / "store", tmp_path / "table", adapter(world), "--as-store")[1]
    assert f"{value['kept']:.1%}" in shown and "tried" not in shown


def test_a_merge_that_loses_too_much_says_so_and_what_keeps_it(world, mebp, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ENOUGH", 2.0)  # nothing keeps that much
    code, out, err = mebp("merge", world / "store", tmp_path / "out", adapter(world), "--as-store", "--json")
    value = json.loads(out)
    assert code == 0 and {made["bits"] for made in value["tried"]} == {None, 8}
    assert value["loss_merged"] == min(made["loss"] for made in value["tried"])
    (line,) = (line for line in err.splitlines() if line.startswith("warning: "))
    for made in value["tried"]:
        assert f"{made['bytes'] / 2**20:.1f} MiB, loss {made['loss']:.4g}" in line
    narrow, wide = sorted(value["tried"], key=lambda made: made["bytes"])
    line_of_size = f"groups of 64): {wide['bytes'] / 2**20:.1f} MiB and loss {wide['loss']:.4g}; with their own levels "
    assert f"{line_of_size}{narrow['bytes'] / 2**20:.1f} MiB and {narrow['loss']:.4g}" in err
    way = re.search("`mebp (.*)` makes a model directory, which keeps it", line)
    arguments = [str(tmp_path / "way") if word == "OUT" else word for word in shlex.split(way[1])]
    assert mebp(*arguments)[0] == 0
    monkeypatch.undo()
    whole = answer(mebp(*arguments[:2], tmp_path / "measured", *arguments[3:], *validation(world)))
    assert whole["kept"] == pytest.approx(1, abs=1e-3) and "dtype" in whole
    for flags in (["--scheme=symmetric", "--as-store"], ["--dtype=float16"]):
        monkeypatch.setattr(command, "ENOUGH", 2.0)
        result = mebp("merge", world / "store", tmp_path / flags[0], adapter(world), *flags, *validation(world))
        advice = "leave --scheme out" if "--as-store" in flags else "; --dtype float32 keeps it"
        assert len(answer(result).get("tried", [0])) == 1 and advice in result[2]


def test_where_the_adapter_does_not_help_that_is_said(world, mebp, tmp_path):
    harmful = shutil.copytree(world / "run" / "adapter", tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(harmful)
    save_file({name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}, harmful)
    flags = [f"--adapter={harmful.parent}", "--as-store", *validation(world)]
    result = mebp("merge", world / "store", tmp_path / "out", *flags)
    value = answer(result)
    assert value["loss_with_adapter"] > value["loss_untrained"] and value["kept"] is None and len(value["tried"]) == 1
    assert "the adapter does not lower it, so give another text by --validation-file" in result[2]


@pytest.mark.parametrize("directory", ["run", "run/adapter_best"])
def test_a_run_directory_and_its_best_adapter_are_measured_too(world, mebp, tmp_path, monkeypatch, directory):
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.copytree(world / "run" / "adapter", tmp_path / "run" / "adapter_best")
    monkeypatch.setattr(command, "ENOUGH", 0.75)
    flags = [f"--adapter={tmp_path / directory}", "--as-store", "--json"]
    value = answer(mebp("merge", world / "store", tmp_path / "out", *flags))
    assert value["measured_on"] == str(world / "train.txt") and value["kept"] > 0.75
    assert value["adapter"] == str(tmp_path / ("run/adapter" if directory == "run" else directory))


@pytest.mark.parametrize("what", ["elsewhere", "text gone"])
def test_a_store_that_cannot_be_measured_says_so(world, mebp, tmp_path, what):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(world / "run" / "adapter", run / "adapter")
    if what == "text gone":
        record = strict_json.read_sealed(world / "run" / "run.json")
        record["settings"]["train_file"] = "gone.txt"
        strict_json.write_json(run / "run.json", strict_json.sealed(record))
    code, out, err = mebp("merge", world / "store", tmp_path / "out", f"--adapter={run / 'adapter'}", "--as-store")
    assert code == 0 and "loss" not in out
    assert ("lies in no run directory" if what == "elsewhere" else "gone.txt: no such file") in err
    assert "give a text by --validation-file" in err
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    flags = [f"--adapter={run / 'adapter'}", "--as-store"]
    assert_refused(mebp, ["merge", world / "store", tmp_path / "again", *flags], ["adapter_model"], tmp_path)


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
        (["--adapter=nowhere", "--as-store"], "nowhere is not an adapter"),
        (["--validation-file=nowhere.txt"], "validation-file nowhere.txt: no such file"),
        (["--max-eval-windows=0"], "--max-eval-windows: must be a whole number of at least 1, got 0"),
        (["--dtype=int4"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, arguments, words):
    assert_refused(mebp, ["merge", world / "store", tmp_path / "out", *arguments], [words], world, tmp_path)


def test_an_existing_directory_is_kept(mebp, world):
    assert_refused(mebp, ["merge", world / "store", world / "run", adapter(world)], ["run exists already"], world)
