"""The texts of ``mebp quantize``: what calibration changes, the losses of source and store, and what is refused."""

import json

import pytest
import torch
from commands import answer, assert_refused
from models import decoded_model
from runs import sentences, word_tokenizer
from transformers import AutoModelForCausalLM

from mebp_triton.cli import inference, source_texts
from mebp_triton.data.loading import load_data
from mebp_triton.store.reader import Store
from mebp_triton.training.evaluation import evaluate, plain_score


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "calibration.txt"
    path.write_text(sentences(40, seed=3))
    return path


@pytest.fixture
def quantized(mebp, world, tmp_path):
    """Makes ``tmp_path / name`` of the model of ``world``. The command's answer."""

    def run(*options, name="store"):
        length = ["--max-length=16"] if options else []
        return answer(mebp("quantize", world / "model", tmp_path / name, *length, *options, "--json"))

    return run


def test_losses_are_those_of_transformers(quantized, world, tmp_path):
    value = quantized(f"--validation-file={world / 'held-out.txt'}", "--max-eval-windows=3")
    data = load_data(world / "held-out.txt", word_tokenizer(), 16)
    original = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    for name, model in {"source": original, "store": decoded_model(tmp_path / "store")}.items():
        truth = evaluate(model, data, 3, score=plain_score)
        assert value[f"loss_{name}"] == pytest.approx(truth.loss, rel=1e-5)
        assert value[f"token_accuracy_{name}"] == truth.token_accuracy
        assert value["tokens"] == truth.tokens and value["windows"] == 3


def test_a_table_names_the_losses(mebp, world, tmp_path):
    held_out = world / "held-out.txt"
    code, out, err = mebp(
        "quantize", world / "model", tmp_path / "store", f"--validation-file={held_out}", "--max-length=16"
    )
    assert code == 0 and "loss of the source" in out and "of the store" in out
    assert f"{held_out}: " in err


def test_a_calibration_changes_linear_layers_alone(mebp, quantized, world, tmp_path, text):
    quantized(name="plain")
    value = quantized(f"--calibration-file={text}", "--calibration-windows=4")
    assert value["compensated"] == 21 and value["unseen"] == value["weighted"] == []
    plain, made = Store(tmp_path / "plain"), Store(tmp_path / "store")
    for name in made.matrices:
        same = torch.equal(made.weight(name).packed, plain.weight(name).packed)
        assert same == ("layers" not in name), name
    code, _, err = mebp("verify", tmp_path / "store")
    assert code == 0, err


def test_the_text_and_what_was_done_with_it_are_said(mebp, world, tmp_path, text):
    options = (f"--calibration-file={text}", "--calibration-windows=4", "--max-length=16")
    code, _, err = mebp("quantize", world / "model", tmp_path / "store", *options)
    assert code == 0 and f"{text}: " in err and "are used, evenly spaced" in err
    assert "21 of 22 matrices were rounded so that what they give on the text changes little" in err


def test_two_texts_take_one_tokenizer(quantized, world, text, monkeypatch):
    loads, load = [], inference.load_tokenizer
    monkeypatch.setattr(inference, "load_tokenizer", lambda *given: loads.append(given) or load(*given))
    texts = (f"--calibration-file={text}", f"--validation-file={world / 'held-out.txt'}")
    value = quantized(*texts, "--calibration-windows=2", "--max-eval-windows=2")
    assert len(loads) == 1 and value["compensated"] == 21 and value["windows"] == 2


def test_a_budget_is_spent_by_the_text(mebp, world, tmp_path, text):
    """The text goes through the model twice, and is read once."""
    options = (f"--calibration-file={text}", "--calibration-windows=4", "--max-length=16", "--bits-per-weight=9")
    code, _, err = mebp("quantize", world / "model", tmp_path / "store", *options)
    assert code == 0 and err.count(f"{text}: ") == 1, err
    widths = [info.bits for name, info in Store(tmp_path / "store").matrices.items() if "layers" in name]
    assert set(widths) == {4, 8}


def test_a_long_text_is_not_read_to_its_end(quantized, text, monkeypatch):
    monkeypatch.setattr(source_texts, "SPREAD", 2)
    long = text.with_name("long.jsonl")
    long.write_text((json.dumps({"text": "the cat sees the moon"}) + "\n") * 50 + "no JSON\n")
    assert quantized(f"--calibration-file={long}", "--calibration-windows=2")["compensated"] == 21


WRONG = {
    "gone.txt": (None, "calibration-file gone.txt: no such file"),
    "model.bin": (b"x", "calibration-file model.bin: unknown suffix '.bin'"),
    "empty.txt": (b"", "calibration-file empty.txt: nothing to calibrate with, it is empty; add text"),
    "latin.txt": (b"caf\xe9", "calibration-file latin.txt: not UTF-8"),
    "rows.jsonl": (b'{"text": 3}\n', "calibration-file rows.jsonl:1: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_text_is_one_line_and_writes_nothing(mebp, world, tmp_path, monkeypatch, name):
    content, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    options = (f"--calibration-file={name}", "--max-length=16")
    assert_refused(mebp, ["quantize", world / "model", "store", *options], [message], tmp_path)


def test_windows_longer_than_the_model_takes_are_refused(mebp, world, tmp_path, text):
    options = (f"--calibration-file={text}", "--max-length=5000")
    assert_refused(
        mebp, ["quantize", world / "model", tmp_path / "store", *options], ["--max-length 5000 is longer"], tmp_path
    )


@pytest.mark.parametrize("flag", ["--calibration-windows=4", "--max-eval-windows=4", "--max-length=16"])
def test_a_flag_for_a_file_that_is_not_given_is_refused(mebp, world, tmp_path, flag):
    name, _, value = flag.partition("=")
    message = f"{name} {value} has nothing to be used for: give --"
    assert_refused(mebp, ["quantize", world / "model", tmp_path / "store", flag], [message], tmp_path)
