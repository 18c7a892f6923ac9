"""Stores of random weights: their shapes, their bytes by seed, a whole tokenizer, and a training on one."""

import importlib
import json
import math

import pytest
import torch
from models import tiny_config
from transformers import AutoConfig, AutoTokenizer

import mebp_triton as mebp
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store

TEXT = "The training of language models: 3.14159, Grüße, 你好 🎉\n\tx  y \x00\n"
VOCABULARY = 600
# As the models' pages say. Gemma-3-4B is counted without its vision tower and projector.
PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": 3_880_263_168,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
}


@pytest.fixture
def make_store(bench_path):
    return importlib.import_module("make_store")


@pytest.fixture
def make(make_store, tmp_path):
    """Writes a store of a tiny model through the command line's own function."""

    def write(name, *options, architecture="llama", **changes):
        directory = tmp_path / f"config-{name}"
        tiny_config(architecture, **({"vocab_size": VOCABULARY} | changes)).save_pretrained(directory)
        make_store.main(["--config", str(directory), "--output", str(tmp_path / name), *options])
        return tmp_path / name

    return write


def test_every_published_model_is_here(bench_path):
    assert importlib.import_module("random_store").MODELS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_number_of_parameters(bench_path, name):
    settings = importlib.import_module("random_store").MODELS[name]
    model = build_skeleton(AutoConfig.for_model(**settings), torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_store_can_be_trained_from_the_command_line(make, mebp, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    options = ["--output-dir", tmp_path / "run", "--max-steps", "1", "--max-length", "32", "--json"]
    code, out, err = mebp("train", make("store"), "--train-file", tmp_path / "text.txt", *options)
    assert code == 0, err
    assert json.loads(out)["steps"] == 1


@pytest.mark.parametrize(
    ("architecture", "scheme"), [("llama", "symmetric"), ("gemma3_text", "codebook"), ("gpt2", "affine")]
)
def test_an_untrained_model_knows_nothing_and_has_finite_gradients(make, architecture, scheme):
    model = mebp.load(
        make("store", "--scheme", scheme, "--group-size", "32", architecture=architecture),
        mebp.LoraConfig(r=2, lora_alpha=2),
    ).train()
    ids = torch.arange(40)[None] * 7 % VOCABULARY
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(math.log(VOCABULARY), rel=0.05)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("scheme", ["symmetric", "affine", "codebook"])
@pytest.mark.parametrize("options", [[], ["--two-level"]], ids=["", "two levels"])
def test_weights_have_the_size_of_initialised_ones(make, scheme, options):
    """K is no multiple of 64, and the padding follows the format."""
    store = Store(make("store", "--scheme", scheme, "--group-size", "128", *options))
    assert {info.scale_dtype for info in store.matrices.values()} == {"I8" if options else "F16"}
    assert {(info.scheme, info.group_size) for info in store.matrices.values()} == {(scheme, 128)}
    weight = store.weight("model.embed_tokens")
    assert weight.shape == (VOCABULARY, 48)
    values = decode(weight, torch.float32)
    assert values.std().item() == pytest.approx(0.02, rel=0.03)
    assert abs(values.mean().item()) < 0.001
    padding = weight.packed[:, 16:] >> 4
    assert (padding == (8 if scheme == "symmetric" else 0)).all()


def test_the_seed_decides_every_byte(make):
    first, again, other = make("first"), make("again"), make("other", "--seed", "1")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    different = {name for name in names if (first / name).read_bytes() != (other / name).read_bytes()}
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert different >= {"shared.safetensors", "block-00000.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("size", [257, VOCABULARY, 40_000])
def test_the_tokenizer_has_every_id_and_brings_text_back(make_store, tmp_path, size):
    config = tiny_config("qwen2", vocab_size=size, eos_token_id=2)
    make_store.make_tokenizer(config, seed=0).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert sorted(tokenizer.get_vocab().values()) == list(range(size)) and len(tokenizer) == size
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) > 0.9 * size and min(ids) < 0.1 * size


def test_a_vocabulary_of_merges_needs_fewer_tokens(make_store):
    sizes = (257, VOCABULARY, 40_000)
    lengths = [
        len(make_store.make_tokenizer(tiny_config("qwen2", vocab_size=size), seed=0)(TEXT)["input_ids"])
        for size in sizes
    ]
    assert lengths[0] == len(TEXT.encode())
    assert lengths[0] > lengths[1] > lengths[2]


@pytest.mark.parametrize("eos", [None, 900, [1, 2]])
def test_an_end_token_exists_whatever_the_config_names(make_store, eos):
    tokenizer = make_store.make_tokenizer(tiny_config("qwen2", vocab_size=300, eos_token_id=eos), seed=0)
    assert 0 <= tokenizer.eos_token_id < 300 and len(tokenizer) == 300


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: (path / "store" / "x").mkdir(parents=True), "store exists already"),
        (lambda path: (path / "config.json").unlink(), "config.json does not exist"),
        (lambda path: (path / "config.json").write_text("{"), "is not a usable config"),
        (lambda path: tiny_config("llama").save_pretrained(path), "vocab_size must be at least 257"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(make_store, tmp_path, capsys, prepare, message):
    tiny_config("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path)
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        make_store.main(["--config", str(tmp_path), "--output", str(tmp_path / "store")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
