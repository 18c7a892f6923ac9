"""A budget of bits goes to the layers whose rounding harms most."""

import pytest
import torch
from models import save_tiny_model
from runs import sentences, word_tokenizer
from safetensors.torch import load_file, save_file

from mebp_triton.convert.bit_budget import LayerCost, choose_wide
from mebp_triton.convert.quantize import quantize
from mebp_triton.data.loading import load_data
from mebp_triton.kernels.names import DEFAULT_FORM, DEFAULT_FORMS, Form
from mebp_triton.store.reader import Store

FORMS = DEFAULT_FORM, DEFAULT_FORMS[8]


def cost(error, weights=800):
    """A layer with 5 bits a weight, or 9."""
    return LayerCost(weights, weights * 5 // 8, weights * 9 // 8, error)


def test_the_most_harm_for_a_bit_goes_first_and_the_budget_lasts():
    costs = {
        "a.up": cost(0.01),
        "b.up": cost(0.03),
        "small": cost(0.01, 80),
        "large": cost(0.03, 8000),
        "c.up": cost(0.0),
    }
    assert choose_wide(costs, 5.0, *FORMS) == set()
    assert choose_wide(costs, 9.0, *FORMS) == costs.keys()
    whole = sum(layer.weights for layer in costs.values())
    assert choose_wide(costs, 5 + 4 * 80 / whole, *FORMS) == {"small"}
    assert choose_wide(costs, 5 + 4 * 880 / whole, *FORMS) == {"small", "b.up"}
    # The large layer is worth more than the one without an error, which fits where it does not.
    assert choose_wide(costs, 5 + 4 * 2480 / whole, *FORMS) == costs.keys() - {"large"}


def test_kinds_of_layers_count_by_the_harm_that_was_measured():
    costs = {f"model.layers.0.self_attn.{kind}": cost(0.01) for kind in ("q_proj", "v_proj", "o_proj", "dense")}
    order = []
    for count in range(1, 5):
        order += choose_wide(costs, 5 + count, *FORMS) - set(order)
    assert [name.rpartition(".")[2] for name in order] == ["v_proj", "dense", "o_proj", "q_proj"]


@pytest.mark.parametrize("bits", [4.99, 9.01, float("nan"), float("inf"), -1.0])
def test_what_is_possible_is_said(bits):
    with pytest.raises(ValueError, match="must be 5 to 9, got .* 4 bits, codebook, .* 8 bits, symmetric"):
        choose_wide({"a": cost(0.01)}, bits, *FORMS)


@pytest.fixture
def uneven(tmp_path):
    """A model with one layer whose weights have a few large ones in every group."""
    source = save_tiny_model("llama", tmp_path / "model", num_hidden_layers=2)
    tensors = load_file(source / "model.safetensors")
    hard = "model.layers.1.mlp.up_proj.weight"
    tensors[hard][:, ::32] *= 30
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    word_tokenizer().save_pretrained(source)
    return source, hard.removesuffix(".weight")


def test_a_store_gets_what_was_asked_for_and_no_more(uneven, tmp_path):
    source, hard = uneven
    seen = []
    report = quantize(source, tmp_path / "store", bits_per_weight=8.0, progress=lambda *pair: seen.append(pair))
    matrices = Store(tmp_path / "store").matrices
    assert report.bits_per_weight(report.linear) <= 8.0 and set(report.linear) == matrices.keys() - {
        "model.embed_tokens"
    }
    forms = {name: matrices[name].form for name in report.linear}
    assert set(forms.values()) == {*FORMS} and forms[hard] == DEFAULT_FORMS[8]
    assert seen == [(done, 29) for done in range(1, 30)], "14 layers are read twice, the embedding once"
    plain = quantize(source, tmp_path / "plain")
    assert report.bits_per_weight(report.linear) + 0.5 > 8.0 > plain.bits_per_weight(plain.linear)


def test_the_form_that_was_asked_for_holds_for_both_widths(uneven, tmp_path):
    options = {"scheme": "affine", "group_size": 64, "embedding_bits": 4}
    report = quantize(uneven[0], tmp_path / "store", bits_per_weight=8.0, scale_search=False, **options)
    assert report.forms.pop("model.embed_tokens") == Form("affine", 64)
    assert set(report.forms.values()) == {Form("affine", 64), Form("affine", 64, 8)}
    report = quantize(uneven[0], tmp_path / "codebook", bits_per_weight=8.0, scale_search=False, scheme="codebook")
    assert {report.forms[name] for name in report.linear} == {Form("codebook", 32), DEFAULT_FORMS[8]}


def test_a_text_tells_which_layers_matter(uneven, tmp_path):
    """The layer with the large error reads nothing: what it loses is never seen."""
    source, hard = uneven
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(sentences(20))
    text = load_data(tmp_path / "text.txt", word_tokenizer(), 24)
    options = {"bits_per_weight": 8.0, "scale_search": False}
    blind = quantize(source, tmp_path / "blind", **options)
    seeing = quantize(source, tmp_path / "seeing", calibration=lambda companions: text, **options)
    assert (blind.forms[hard].bits, seeing.forms[hard].bits) == (8, 4)
    assert seeing.bits_per_weight(seeing.linear) <= 8.0 and seeing.compensated


def test_a_source_with_codes_and_a_width_beside_the_budget_are_refused(uneven, tmp_path):
    from models import bnb_directory

    nf4 = bnb_directory(tmp_path, bnb_4bit_quant_type="nf4")
    with pytest.raises(ValueError, match="bits_per_weight is for models of 16 or 32 bits, and .* has codes already"):
        quantize(nf4, tmp_path / "store", bits_per_weight=6.0)
    with pytest.raises(ValueError, match="give no other width"):
        quantize(uneven[0], tmp_path / "store", bits_per_weight=6.0, bits=4)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("bits", [3.0, 20.0, float("nan")])
def test_what_no_choice_can_keep_is_refused_before_a_layer_is_read(uneven, tmp_path, bits):
    seen = []
    with pytest.raises(ValueError, match=f"bits_per_weight must be .*, got {bits}"):
        quantize(uneven[0], tmp_path / "store", bits_per_weight=bits, progress=lambda *pair: seen.append(pair))
    assert not seen and not (tmp_path / "store").exists()


def test_scales_that_float16_cannot_hold_are_counted(tmp_path):
    source = save_tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = quantize(source, tmp_path / "store", bits_per_weight=8.0, scale_search=False)
    assert report.bits_per_weight(report.linear) <= 8.0
    assert Store(tmp_path / "store").weight("model.layers.0.mlp.up_proj").scales.dtype == torch.float32
