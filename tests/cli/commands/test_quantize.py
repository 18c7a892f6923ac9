"""``mebp quantize``: its answer, its table, and what it refuses."""

import json
import math

import pytest
from commands import answer, assert_refused, evaluate, pickled, texts, train, with_remote_code, without
from packed_layouts import awq, mlx_affine
from packed_models import packed_directory
from runs import model_directory

from mebp_triton.kernels.names import Form
from mebp_triton.store.reader import Store


def test_its_answer_is_about_the_store(mebp, world, tmp_path):
    value = answer(mebp("quantize", world / "model", tmp_path / "store", "--group-size=32", "--json"))
    opened = Store(tmp_path / "store")
    assert value["store"] == str(tmp_path / "store")
    assert value["matrices"] == len(opened.matrices) == len(value["relative_error"]) == 22
    assert value["schemes"] == ["codebook", "symmetric"] and value["bits"] == [4, 8] and value["taken_over"] == 0
    assert value["relative_error_worst"] == max(value["relative_error"].values()) < 0.15
    assert value["relative_error"] == {name: info.relative_error for name, info in opened.matrices.items()}
    assert value["int4_bytes"] > value["float_bytes"] > 0


def test_flags_and_table(mebp, world, tmp_path):
    flags = ["--scheme=symmetric", "--bits=8", "--group-size=16", "--embedding-bits=4", "--no-scale-search"]
    code, out, _ = mebp("quantize", world / "model", tmp_path / "store", *flags)
    assert code == 0 and "q_proj" in out and "8 bits, symmetric, 16" in out
    forms = {name: info.form for name, info in Store(tmp_path / "store").matrices.items()}
    assert forms.pop("model.embed_tokens") == Form("symmetric", 32)
    assert set(forms.values()) == {Form("symmetric", 16, 8)}


def test_a_budget_of_bits_is_kept_and_told(mebp, world, tmp_path):
    value = answer(mebp("quantize", world / "model", tmp_path / "store", "--bits-per-weight=8", "--json"))
    matrices = Store(tmp_path / "store").matrices
    linear = [info for name, info in matrices.items() if name != "model.embed_tokens"]
    bits = [8 * sum(math.prod(shape) * dtype.itemsize for dtype, shape in info.tensors().values()) for info in linear]
    assert value["bits_per_weight"]["linear"] == sum(bits) / sum(math.prod(info.shape) for info in linear) <= 8
    assert {info.bits for info in linear} == {4, 8}
    shown = mebp("quantize", world / "model", tmp_path / "table", "--bits-per-weight=8")[1]
    assert f"{value['bits_per_weight']['linear']:.3f}" in shown and f"{value['bits_per_weight']['all']:.3f}" in shown


def test_layers_that_a_4_bit_source_keeps_in_16_bits_are_counted(mebp, world, tmp_path):
    from int4_models import with_bitsandbytes

    model_directory(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    with_bitsandbytes(tmp_path / "plain").save_pretrained(tmp_path / "model")
    code, _, err = mebp("quantize", tmp_path / "model", tmp_path / "store")
    opened = Store(tmp_path / "store").matrices.values()
    rounded = [info.relative_error for info in opened if info.relative_error > 0]
    assert code == 0 and 0 < len(rounded) < len(opened)
    assert f"{len(opened) - len(rounded)} of {len(opened)} matrices were taken over bit for bit" in err
    assert f"{len(rounded)} of {len(opened)} matrices are floats in" in err
    assert f"relative error up to {max(rounded):.3f}" in err


def test_quantize_and_train_say_it(mebp, tmp_path):
    """``train`` says it of a store that was there before; of one that it makes, ``quantize`` has said it."""
    source, line = model_directory(tmp_path / "model", "llama4_text"), "24 matrices stay float (experts"
    code, _, err = mebp("quantize", source, tmp_path / "store", "--group-size=32")
    assert code == 0 and err.count(line) == 1
    text = tmp_path / "text.txt"
    text.write_text("the cat sees the moon . " * 20)
    options = ("--max-steps=1", "--max-length=16", "--lora-r=2", f"--train-file={text}")
    for given, run in ((tmp_path / "store", "run"), (source, "other")):
        code, _, err = mebp("train", given, *options, f"--output-dir={tmp_path / run}")
        assert code == 0 and err.count(line) == 1, err


@pytest.mark.parametrize("kind", ["awq", "mlx"])
def test_a_store_of_packed_codes_is_an_ordinary_one(mebp, world, tmp_path, kind):
    """It is verified, planned, trained, evaluated, merged and generated from; its adapter names the checkpoint."""
    model, store, run = (tmp_path / name for name in ("model", "store", "run"))
    if kind == "awq":
        packed_directory(model, awq(), {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}})
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 192}
        config = {"quantization": {"group_size": 32, "bits": 4}}
        layout = mlx_affine(of=lambda module: (6 if "v_proj" in module else 4, 32))
        packed_directory(model, layout, config, extra=("model.embed_tokens",), **sizes)
    made = answer(mebp("quantize", model, store, "--json"))
    assert made["taken_over"] == (14 if kind == "awq" else 15) and not made["decoded"]
    assert mebp("verify", store)[0] == 0 and mebp("plan", store, "--max-length=24", "--json")[0] == 0
    trained = answer(mebp(*train(world, tmp_path, texts(world)[1], store=store), "--json"))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model.resolve())
    loss = answer(mebp(*evaluate(world, store, f"--adapter={run / 'adapter'}"), "--json"))["loss"]
    assert loss == pytest.approx(trained["loss_after"], rel=1e-5)
    assert mebp("merge", store, tmp_path / "merged", f"--adapter={run / 'adapter'}", "--dtype=float32")[0] == 0
    assert (
        not {"quantization", "quantization_config"} & json.loads((tmp_path / "merged/config.json").read_text()).keys()
    )
    assert mebp("generate", store, "--prompt=the cat", "--max-new-tokens=2")[0] == 0


MISTAKES = {
    "no config.json": (lambda w, t: [without(w, t, "config.json"), t / "o"], ["config.json is missing"]),
    "only pickles": (lambda w, t: [pickled(w, t), t / "o"], ["only pickled weights (pytorch_model.bin)"]),
    "code in the checkpoint": (lambda w, t: [with_remote_code(w, t), t / "o"], ["'mine'", "never run"]),
    "no weights": (lambda w, t: [without(w, t, "*.safetensors"), t / "o"], ["neither model.safetensors"]),
    "a text": (lambda w, t: [w / "train.txt", t / "o"], ["train.txt"]),
    "nothing": (lambda w, t: [t / "none", t / "o"], ["none does not exist"]),
    "onto something": (lambda w, t: [w / "model", w / "store"], ["store exists already"]),
    "an unknown scheme": (lambda w, t: [w / "model", t / "o", "--scheme=nf4"], ["'nf4'", "symmetric"]),
    "an unknown group size": (lambda w, t: [w / "model", t / "o", "--group-size=48"], ["48", "32"]),
    "no bits to spend": (lambda w, t: [w / "model", t / "o", "--bits-per-weight=3"], ["--bits-per-weight", "got 3"]),
    "bits in two ways": (
        lambda w, t: [w / "model", t / "o", "--bits-per-weight=5", "--bits=4"],
        ["--bits-per-weight chooses", "give no other width"],
    ),
    "small groups of 4 bits": (lambda w, t: [w / "model", t / "o", "--group-size=16"], ["32, 64, 128", "4 bits"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, name):
    typed, parts = MISTAKES[name]
    assert_refused(mebp, ["quantize", *typed(world, tmp_path)], parts, world, tmp_path)
