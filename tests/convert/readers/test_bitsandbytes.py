"""4-bit bitsandbytes directories, as transformers saves them: every weight as bitsandbytes itself decodes it."""

import json
import shutil

import bitsandbytes
import pytest
import torch
from models import bnb_directory, relative_rms
from runs import word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.readers import open_source
from mebp_triton.convert.readers.bitsandbytes import BitsandbytesDirectory
from mebp_triton.kernels.reference import decode
from mebp_triton.models.load import load
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    return bnb_directory(tmp_path_factory.mktemp("nf4"), bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def decoded_by_bitsandbytes(directory):
    """Every 4-bit layer's weight ``[out, in]`` in the checkpoint's dtype.

    Straight from the file: transformers 4.57 loads a quantised storage of another dtype wrongly.
    """
    tensors, decoded = load_file(directory / "model.safetensors"), {}
    for key in [key.partition(".quant_state.")[0] for key in tensors if ".quant_state." in key]:
        parts = {name: tensor for name, tensor in tensors.items() if name.startswith(key + ".")}
        state = bitsandbytes.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        weight = bitsandbytes.functional.dequantize_4bit(tensors[key], state)
        decoded[key.removesuffix(".weight")] = weight
    return decoded


def opened(directory):
    source = open_source(directory)
    source.bind(build_skeleton(source.config, torch.float32))
    return source


def assert_refused(directory, *words):
    with pytest.raises(ValueError) as caught:
        source = opened(directory)
        for name in source._keys:
            source.read(name)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def edited(source, target, **tensors):
    """A copy with some tensors replaced, or taken away."""
    shutil.copytree(source, target)
    values = load_file(target / "model.safetensors") | tensors
    save_file({k: v for k, v in values.items() if v is not None}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("architecture", "dtype", "kind", "double"),
    [
        ("llama", torch.float32, "nf4", False),
        ("llama", torch.bfloat16, "nf4", True),
        ("llama", torch.float32, "fp4", True),
        ("llama", torch.float16, "fp4", False),
        ("gpt2", torch.bfloat16, "nf4", True),
    ],
)
def test_weights_decode_to_what_bitsandbytes_makes_of_them(tmp_path, architecture, dtype, kind, double):
    options = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    directory = bnb_directory(tmp_path, architecture, dtype, **options)
    report = quantize(directory, tmp_path / "store")
    truth, store = decoded_by_bitsandbytes(directory), Store(tmp_path / "store")
    assert set(report.taken_over) == truth.keys() and len(truth) == (21 if architecture == "llama" else 12)
    for name, weight in truth.items():
        info = store.matrices[name]
        assert (info.scheme, info.group_size, info.scale_dtype, info.relative_error) == ("codebook", 64, "F32", 0)
        assert weight.dtype == dtype and torch.equal(decode(store.weight(name), dtype), weight), name


def test_a_quantised_storage_of_another_dtype(tmp_path):
    directory = bnb_directory(tmp_path, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    assert load_file(directory / "model.safetensors")[f"{name}.weight"].dtype == torch.bfloat16
    weight = opened(directory).read(f"{name}.weight")
    assert torch.equal(decode(weight, torch.float32), decoded_by_bitsandbytes(directory)[name])


def test_skipped_modules_are_floats_that_are_quantised_as_the_rest(tmp_path):
    skipped = ["model.layers.1.mlp", "lm_head"]
    directory = bnb_directory(tmp_path, skip=skipped, bnb_4bit_quant_type="nf4")
    report = quantize(directory, tmp_path / "store")
    own = {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")} | {"model.embed_tokens"}
    assert set(report.errors) - set(report.taken_over) == own
    floats, store = load_file(directory / "model.safetensors"), Store(tmp_path / "store")
    for name in own:
        assert store.matrices[name].scheme == ("symmetric" if "embed" in name else "codebook")
        assert 0 < relative_rms(decode(store.weight(name)), floats[f"{name}.weight"]) < 0.15


def test_what_is_asked_for_wins(nf4, tmp_path):
    report = quantize(nf4, tmp_path / "store", scheme="symmetric", group_size=32)
    assert not report.taken_over and {form.scheme for form in report.forms.values()} == {"symmetric"}


def test_the_store_computes_what_transformers_computes(nf4, tmp_path):
    """But for the embedding, which bitsandbytes leaves in 16 bits and a store does not: here it is put in."""
    quantize(nf4, tmp_path / "store")
    ours = load(tmp_path / "store")
    theirs = AutoModelForCausalLM.from_pretrained(nf4, dtype=torch.float32, device_map={"": "cpu"})
    table = decode(Store(tmp_path / "store").weight("model.embed_tokens"), torch.float32)
    theirs.get_input_embeddings().weight.data.copy_(table)
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs.train()  # there is no dropout; on some CPUs bitsandbytes rounds to bfloat16 in eval mode
        assert relative_rms(ours(ids).logits, theirs(ids).logits) < 1e-5


def test_companions_say_nothing_of_bitsandbytes(nf4, tmp_path):
    source = open_source(nf4)
    assert isinstance(source, BitsandbytesDirectory)
    assert not hasattr(source.config, "quantization_config") and source.description == "bitsandbytes directory model"
    source.save_companions(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path)("the cat").input_ids == word_tokenizer()("the cat").input_ids


def test_rows_that_blocks_and_groups_straddle_cannot_be_taken_over(tmp_path):
    directory = bnb_directory(tmp_path, config={"hidden_size": 48})
    with pytest.raises(ValueError, match=r"layers\.0\.\w+\.\w+\.weight: in_features 48 and blocks of 64 weights"):
        quantize(directory, tmp_path / "store")
    assert not (tmp_path / "store").exists()


# --- what is wrong with a file --------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({STATE: None}, (Q, "U8", "unquantised")),
        ({f"{Q}.absmax": None}, (Q, "damaged", "absmax")),
        ({f"{Q}.nested_absmax": torch.ones(0)}, (Q, "damaged")),
        ({f"{Q}.absmax": torch.zeros(3, dtype=torch.uint8)}, (Q, "absmax has 3 elements, wanted 64")),
        ({f"{Q}.nested_quant_map": torch.full((256,), float("nan"))}, (Q, "absmax is not finite")),
        ({Q: torch.zeros(5, 1, dtype=torch.uint8)}, (Q, "packed has 5 elements, wanted 2048")),
        ({f"{Q}.quant_map": torch.zeros(8)}, (Q, "codebook must be")),
        ({STATE: as_bytes("{")}, ("not valid JSON",)),
        ({STATE: as_bytes("[]")}, (Q, "damaged")),
        ({STATE: as_bytes('{"blocksize": 0, "shape": [64, 64]}')}, (Q, "must be positive")),
        ({STATE: as_bytes('{"blocksize": 18446744073709551616, "shape": [64, 64]}')}, (Q, "wanted 1")),
        ({STATE: as_bytes('{"blocksize": 64, "shape": [64, 64], "nested_blocksize": 0, "nested_offset": 0}')}, (Q,)),
        ({STATE: as_bytes('{"blocksize": 64, "shape": [64]}')}, (Q,)),
        ({STATE: as_bytes('{"blocksize": 64.0, "shape": [64, 64]}')}, (Q, "positive integers")),
        ({STATE: as_bytes('{"blocksize": 64, "shape": [64, 64], "nested_blocksize": -256, "nested_offset": 0}')}, (Q,)),
        ({f"{Q}.quant_map": torch.full((16,), float("inf"))}, (Q, "codebook must be finite")),
    ],
)
def test_damage_is_one_line(nf4, tmp_path, tensors, words):
    assert_refused(edited(nf4, tmp_path / "model", **tensors), *words)


def test_another_shape_than_the_config_says(nf4, tmp_path):
    text = '{"blocksize": 64, "shape": [32, 128]}'
    directory = edited(nf4, tmp_path / "model", **{STATE: as_bytes(text), f"{Q}.absmax": torch.ones(64)})
    assert_refused(directory, "(32, 128)", "(64, 64)", "do not belong together")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, ("8 bits", "load_in_4bit")),
        ({"load_in_4bit": None}, ("no stated bits", "load_in_4bit")),
        ({"quant_method": "torchao"}, ("torchao", "not supported yet")),
    ],
)
def test_other_quantisations(nf4, tmp_path, change, words):
    directory = edited(nf4, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= change
    (directory / "config.json").write_text(json.dumps(config))
    assert_refused(directory, *words)
