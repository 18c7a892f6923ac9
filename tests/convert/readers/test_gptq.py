"""GPTQ directories laid out by hand: every weight is what the format's formula makes of it."""

import json
import re

import numpy as np
import pytest
import torch
from models import relative_rms
from packed_layouts import gptq
from packed_models import assert_exact, drawn, edited, opened, packed_directory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mebp_triton.convert.merge import merge
from mebp_triton.convert.quantize import quantize
from mebp_triton.kernels.names import Form
from mebp_triton.kernels.reference import decode
from mebp_triton.models.load import load
from mebp_triton.store.reader import Store


def settings(group_size=32, symmetric=False, version=1, bits=4, **more):
    named = {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    stated = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": False}
    return {"quantization_config": stated | named | more}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
def test_weights_are_taken_over_to_the_bit(tmp_path, version, symmetric, group_size):
    layout = gptq(group_size, symmetric, version)
    truth = packed_directory(tmp_path / "model", layout, settings(group_size, symmetric, version))
    report = quantize(tmp_path / "model", tmp_path / "store")
    assert set(report.taken_over) == truth.keys() and not report.decoded and len(truth) == 14
    ours = {group_size if group_size in (32, 64) else 128}
    form = ("symmetric", "F16") if symmetric else ("affine", "F32")
    assert_exact(tmp_path / "store", truth, *form, ours)


@pytest.mark.parametrize("sym", [True, False])
def test_the_zeros_tell_whether_it_is_symmetric_and_not_the_settings(tmp_path, sym):
    truth = packed_directory(tmp_path / "model", gptq(32, symmetric=not sym), settings(32, symmetric=sym))
    quantize(tmp_path / "model", tmp_path / "store")
    form = ("affine", "F32") if sym else ("symmetric", "F16")
    assert_exact(tmp_path / "store", truth, *form, {32})


@pytest.mark.parametrize("architecture", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("head", [False, True])
def test_architectures_with_biases_fused_projections_heads_and_transposed_layers(tmp_path, architecture, head):
    model, store = tmp_path / "model", tmp_path / "store"
    head = head and architecture != "gpt2"  # whose head is the embedding
    truth = packed_directory(model, gptq(64), settings(64), architecture, head=head)
    assert ("lm_head" in truth) == head
    quantize(model, store)
    assert_exact(store, truth, "affine", "F32", {64})
    held = load_file(model / "model.safetensors")
    biases = [name for name in Store(store).floats if name.endswith(".bias")]
    assert all(torch.equal(Store(store).float_tensor(name), held[name]) for name in biases)
    assert bool(biases) == (architecture != "phi3")


def test_a_store_computes_what_the_decoded_model_computes_and_merges_back(tmp_path):
    truth = packed_directory(tmp_path / "model", gptq(64), settings(64), "qwen2")
    quantize(tmp_path / "model", tmp_path / "store")
    store = Store(tmp_path / "store")
    assert "quantization_config" not in json.loads((tmp_path / "store" / "config.json").read_text())
    assert store.base.name_or_path == str((tmp_path / "model").resolve()) and store.source == "GPTQ directory model"
    merge(store, tmp_path / "merged", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(theirs.config, "quantization_config")
    for name, weight in truth.items():
        assert torch.equal(theirs.get_submodule(name).weight, weight.float())
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_rms(load(tmp_path / "store")(ids).logits, theirs(ids).logits) < 1e-5


OLD = "gptq_model-4bit-128g"


@pytest.mark.parametrize("shards", [False, True])
def test_older_files_have_names_of_their_own(tmp_path, shards):
    """AutoGPTQ named a model by its form, and wrote its settings into quantize_config.json."""
    model, store = tmp_path / "model", tmp_path / "store"
    truth = packed_directory(model, gptq(128, True), {})
    (model / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128, "desc_act": False}))
    if shards:
        held = load_file(model / "model.safetensors")
        parts = {key: f"{OLD}-0000{1 + (key > 'model.layers.1')}-of-00002.safetensors" for key in held}
        for part in set(parts.values()):
            save_file({key: held[key] for key in held if parts[key] == part}, model / part)
        (model / f"{OLD}.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
        (model / "model.safetensors").unlink()
    else:
        (model / "model.safetensors").rename(model / f"{OLD}.safetensors")
    quantize(model, store)
    assert_exact(store, truth, "symmetric", "F16", {128})


def test_groups_without_g_idx_follow_each_other(tmp_path):
    truth = packed_directory(tmp_path / "model", gptq(64, g_idx=False), settings(64))
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "affine", "F32", {64})


def test_act_order_is_decoded_and_said(tmp_path):
    layout = gptq(32, symmetric=True, act_order=True)
    truth = packed_directory(tmp_path / "model", layout, settings(32, True, desc_act=True))
    source = opened(tmp_path / "model")
    for name, weight in truth.items():
        assert torch.equal(source.read(f"{name}.weight"), weight.float())
    report = quantize(tmp_path / "model", tmp_path / "store")
    assert report.decoded.keys() == truth.keys() and not report.taken_over
    assert set(report.decoded.values()) == {"codes in act-order, which desc_act=False or static groups would avoid"}
    assert {report.forms[name] for name in truth} == {Form("symmetric", 64, 8)}
    assert all(0 < report.errors[name] < 0.01 for name in truth), "a second rounding to 4 bits loses 0.07"


def test_desc_act_with_static_groups_is_exact(tmp_path):
    truth = packed_directory(tmp_path / "model", gptq(32, True), settings(32, True, desc_act=True, static_groups=True))
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "symmetric", "F16", {32})


def test_groups_in_another_order_that_lie_side_by_side_are_exact(tmp_path):
    def layout(module, rows, columns):
        parts, _ = gptq(32)(module, rows, columns)
        matrix = drawn(module, rows, columns, 32, False)
        groups = matrix.groups[::-1].copy()
        return parts | {"g_idx": torch.from_numpy(groups.astype(np.int32))}, matrix._replace(groups=groups).weight()

    truth = packed_directory(tmp_path / "model", layout, settings(32, desc_act=True))
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "affine", "F32", {32})


@pytest.mark.parametrize("version", [1, 2])
def test_other_widths_are_exact(tmp_path, version):
    """As the setting ``dynamic`` gives them to single layers."""
    widths = {"q_proj": 2, "up_proj": 3, "down_proj": 8}

    def bits_of(module):
        return widths.get(module.rpartition(".")[2], 4)

    truth = packed_directory(tmp_path / "model", gptq(32, version=version, of=bits_of), settings(32, version=version))
    source = opened(tmp_path / "model")
    for name, weight in truth.items():
        read = source.read(f"{name}.weight")
        assert read.bits == max(4, bits_of(name)), "2 and 3 bits fit into 4"
        assert torch.equal(decode(read, torch.float32), weight.float()), name
    report = quantize(tmp_path / "model", tmp_path / "store")
    assert set(report.taken_over) == truth.keys() and not report.decoded


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_16_are_held_by_8_bits(tmp_path, symmetric):
    truth = packed_directory(tmp_path / "model", gptq(16, symmetric), settings(16, symmetric))
    quantize(tmp_path / "model", tmp_path / "store")
    form = ("symmetric", "F16") if symmetric else ("affine", "F32")
    assert_exact(tmp_path / "store", truth, *form, {16})


def test_groups_of_20_are_decoded(tmp_path):
    truth = packed_directory(tmp_path / "model", gptq(20), settings(20))
    source = opened(tmp_path / "model")
    assert all(torch.equal(source.read(f"{name}.weight"), weight.float()) for name, weight in truth.items())
    assert set(source.decoded.values()) == {"codes in groups of 20"}


def test_the_command_says_what_was_decoded(mebp, tmp_path):
    layouts = {True: gptq(20), False: gptq()}
    layout = lambda name, *rest: layouts["down" in name](name, *rest)  # noqa: E731
    packed_directory(tmp_path / "model", layout, settings())
    code, _, err = mebp("quantize", tmp_path / "model", tmp_path / "store")
    infos = Store(tmp_path / "store").matrices
    worst = max(info.relative_error for name, info in infos.items() if "down" in name)
    assert code == 0
    assert f"2 of 15 matrices are codes in groups of 20 in {tmp_path / 'model'}, decoded and rounded to 8 bits: " in err
    assert f"relative error up to {worst:.3f}" in err and "1 of 15 matrices are floats" in err


def test_the_command_says_that_codes_were_given_up_for_another_form(mebp, tmp_path):
    packed_directory(tmp_path / "model", gptq(), settings())
    code, _, err = mebp("quantize", tmp_path / "model", tmp_path / "store", "--scheme=symmetric")
    assert code == 0 and "1 of 15 matrices are floats" in err and "taken over" not in err
    assert "14 of 15 matrices are codes of 4 bits, affine, groups of 32 in" in err


def test_older_files_state_it_beside_the_config(tmp_path):
    truth = packed_directory(tmp_path / "model", gptq(32), {})
    (tmp_path / "model" / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "affine", "F32", {32})


Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory that tests copy."""
    directory = tmp_path_factory.mktemp("gptq") / "model"
    packed_directory(directory, gptq(32), settings(32))
    return directory


def test_biases_of_zeros_without_a_place_are_left_out(whole, tmp_path, recwarn):
    directory = edited(whole, tmp_path / "model", {f"{Q}.bias": torch.zeros(96, dtype=torch.float16)})
    opened(directory)
    assert not recwarn.list
    directory = edited(whole, tmp_path / "other", {f"{Q}.bias": torch.ones(96, dtype=torch.float16)})
    with pytest.warns(UserWarning, match=f"has no {Q}.bias: left out"):
        opened(directory)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.qzeros": None}, f"lacks {Q}.qzeros"),
        ({f"{Q}.scales": None}, f"lacks {Q}.scales"),
        ({f"{Q}.qweight": None}, f"lacks {Q}.weight"),
        ({f"{Q}.weight": torch.ones(96, 96)}, f"has both {Q}.weight and {Q}.qweight"),
        ({f"{Q}.qweight": torch.zeros(13, 96, dtype=torch.int32)}, "qweight has 13 words along dimension 0"),
        ({f"{Q}.qweight": torch.zeros(12, 95, dtype=torch.int32)}, r"qweight is I32 \(12, 95\), wanted I32 \(12, 96\)"),
        ({f"{Q}.qweight": torch.zeros(12, 96)}, "qweight is F32"),
        ({f"{Q}.qweight": torch.zeros(96, dtype=torch.int32)}, "wanted 2 dimensions"),
        ({f"{Q}.qzeros": torch.zeros(3, 11, dtype=torch.int32)}, r"qzeros is I32 \(3, 11\), wanted I32 \(3, 12\)"),
        ({f"{Q}.scales": torch.ones(2, 96)}, r"qzeros is I32 \(3, 12\), wanted I32 \(2, 12\)"),
        ({f"{Q}.scales": torch.ones(3, 96, dtype=torch.int32)}, "scales is I32"),
        ({f"{Q}.scales": torch.full((3, 96), float("nan"))}, "damaged: scales must be finite"),
        ({f"{Q}.scales": torch.full((3, 96), float("inf")).half()}, "damaged: scales must be finite"),
        ({f"{Q}.g_idx": torch.zeros(95, dtype=torch.int32)}, "g_idx is I32"),
        ({f"{Q}.g_idx": torch.full((96,), 3, dtype=torch.int32)}, "g_idx has groups from 3 to 3, wanted 0 to 2"),
        ({f"{Q}.g_idx": torch.arange(96, dtype=torch.int32) // 32 - 1}, "g_idx has groups from -1 to 1"),
    ],
    ids=str,
)
def test_damage_is_one_line(whole, tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message) as caught:
        quantize(edited(whole, tmp_path / "model", tensors), tmp_path / "store")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


def test_a_truncated_file(whole, tmp_path):
    file = edited(whole, tmp_path / "model", {}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        quantize(tmp_path / "model", tmp_path / "store")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"checkpoint_format": "marlin"}, "format 'marlin', which is not supported: save it in the format gptq"),
        ({"format": "gptq_p", "checkpoint_format": None}, "'gptq_p'"),
        ({"is_marlin_format": True}, "'marlin'"),
        ({"checkpoint_format": ["gptq"]}, "format ['gptq']"),
        ({"activation": "w4afp8"}, "activations quantised as 'w4afp8'"),
    ],
    ids=str,
)
def test_variants_that_are_refused(whole, tmp_path, stated, message):
    directory = edited(whole, tmp_path / "model", {}, **settings(32, **stated))
    with pytest.raises(ValueError, match="quantization_config has .*" + re.escape(message)):
        opened(directory)
