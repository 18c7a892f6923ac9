"""A model directory is read by its names and shards, or refused for every way in which it can be wrong."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from models import tiny_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
)

from mebp_triton.convert.readers import open_source

LLAMA = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def saved(path: Path, config=None, dtype=torch.float32, **options):
    """A random model, saved by transformers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**LLAMA, tie_word_embeddings=False)).to(dtype)
    model.save_pretrained(path, **options)
    return model


def assert_reads(path: Path, model) -> None:
    source = open_source(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        source.bind(on_meta(source.config))
    for name, parameter in model.named_parameters():
        value = source.read(name)
        assert value.dtype == parameter.dtype, name
        assert torch.equal(value, parameter), name


def edit(file: Path, **changes) -> None:
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        source = open_source(path)
        source.bind(on_meta(source.config))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_single_file_is_returned_in_its_own_dtype(tmp_path, dtype):
    assert_reads(tmp_path, saved(tmp_path, dtype=dtype))


def test_one_file_beside_old_shards_is_what_transformers_reads(tmp_path):
    saved(tmp_path, max_shard_size="20KB")
    torch.manual_seed(7)
    other = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, tie_word_embeddings=False))
    save_file(other.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(
        UserWarning, match=r"model\.safetensors is read, as transformers does, and the shards of .* are not"
    ):
        assert_reads(tmp_path, other)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, other.lm_head.weight)


def test_shards(tmp_path):
    model = saved(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_reads(tmp_path, model)


def test_reading_one_tensor_opens_only_its_shard(tmp_path):
    model = saved(tmp_path, max_shard_size="20KB")
    source = open_source(tmp_path)
    source.bind(on_meta(source.config))
    name = "model.norm.weight"
    shard = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    for other in tmp_path.glob("*.safetensors"):
        if other.name != shard:
            other.unlink()
    assert torch.equal(source.read(name), model.get_parameter(name))


def test_links_as_a_hub_cache_has_them(tmp_path):
    model = saved(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert_reads(tmp_path / "snapshot", model)


def test_tied_head_need_not_be_stored(tmp_path):
    model = saved(tmp_path, LlamaConfig(**LLAMA, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_reads(tmp_path, model)


def test_tied_table_stored_under_its_other_name(tmp_path):
    model = saved(tmp_path, LlamaConfig(**LLAMA, tie_word_embeddings=True))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_reads(tmp_path, model)


def test_prefix_is_added_to_stored_names(tmp_path):
    """GPT-2 as the hub has it: saved from the base model."""
    model = saved(tmp_path, GPT2Config(**GPT2))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    assert_reads(tmp_path, model)


def test_prefix_is_removed_from_stored_names(tmp_path):
    model = saved(tmp_path)
    source = open_source(tmp_path)
    source.bind(on_meta(source.config).model)
    assert torch.equal(source.read("norm.weight"), model.model.norm.weight)


def test_buffers_are_read_where_stored(tmp_path):
    """A persistent buffer may be absent and of any dtype; one that is not persistent is never looked for."""
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.counts": torch.arange(3)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    model = on_meta(source.config)
    model.model.register_buffer("counts", torch.zeros(3))
    model.model.register_buffer("absent", torch.zeros(3))
    source.bind(model)
    assert source.has("model.counts") and source.has("model.norm.weight")
    assert not source.has("model.absent") and not source.has("model.rotary_emb.inv_freq")
    assert torch.equal(source.read("model.counts"), torch.arange(3))


def test_config_names_the_class_and_no_path(tmp_path):
    saved(tmp_path)
    edit(tmp_path / "config.json", architectures=None, auto_map={"AutoModelForCausalLM": "code.Model"})
    source = open_source(tmp_path)
    assert source.config.architectures == ["LlamaForCausalLM"]
    assert type(on_meta(source.config)).__name__ == "LlamaForCausalLM"
    assert not hasattr(source.config, "auto_map")
    assert source.description == f"safetensors directory {tmp_path.name}"
    assert str(tmp_path) not in source.config.to_json_string(use_diff=False)


def test_missing_parameters_are_named(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1." not in k}, tmp_path / "model.safetensors")
    assert_refused(tmp_path, "model.layers.1.self_attn.q_proj.weight", "and 6 more")


def test_pieces_that_nobody_joins(tmp_path):
    """A model whose experts are in one tensor, and a checkpoint with pieces for which transformers has no rule."""
    config = tiny_config("llama4_text", num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    prefix = "model.layers.0.feed_forward.experts"
    for expert, part in enumerate(tensors.pop(f"{prefix}.down_proj")):
        tensors[f"{prefix}.{expert}.w2.weight"] = part.contiguous()
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_refused(tmp_path, "experts.down_proj is stored in pieces", "such experts are not supported")


def test_wrong_shape_names_parameter_got_and_wanted(tmp_path):
    saved(tmp_path)
    edit(tmp_path / "config.json", vocab_size=49)
    source = open_source(tmp_path)
    source.bind(on_meta(source.config))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight has shape \(48, 32\), the model wants \(49, 32\)"):
        source.read("model.embed_tokens.weight")


def test_integer_weights_are_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_refused(tmp_path, "model.norm.weight", "I8", "unquantised")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/model.safetensors", "a\\b.safetensors", "x.bin", 3]
)
def test_index_must_name_plain_files(tmp_path, name):
    saved(tmp_path / "inside")
    (tmp_path / "inside" / "a").mkdir()
    for place in (tmp_path, tmp_path / "inside" / "a"):
        save_file({"model.norm.weight": torch.ones(32)}, place / "model.safetensors")
    (tmp_path / "inside" / "model.safetensors").unlink()
    index = tmp_path / "inside" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert_refused(tmp_path / "inside", repr(name), "plain")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_broken_index(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert_refused(tmp_path, "model.safetensors.index.json")


def test_index_that_promises_too_much(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    weight_map = {"model.norm.weight": "part.safetensors", "model.ghost": "part.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(tmp_path, "model.ghost")


def test_a_tensor_lies_in_the_shard_that_the_index_names(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in parts.items() for name in held}}))
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    open_source(tmp_path)
    save_file({name: tensors[name] for name in names[2:]}, tmp_path / "b.safetensors")
    assert_refused(tmp_path, "b.safetensors", names[2], "which model.safetensors.index.json has in a.safetensors")


def test_a_name_twice_in_a_header(tmp_path):
    saved(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)["model.norm.weight"]).encode()
    twice = header[:-1] + b', "model.norm.weight": ' + entry + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])
    assert_refused(tmp_path, "model.norm.weight", "stands twice")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(tmp_path, keep):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(tmp_path, "model.safetensors", "download it again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_never_opened(tmp_path, name):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    assert_refused(tmp_path, name, "pickled", "safetensors")


# --- a config that says less than the weights -----------------------------------------------------------------------


def test_layers_that_the_config_leaves_out_are_told(tmp_path):
    saved(tmp_path)
    edit(tmp_path / "config.json", num_hidden_layers=1)
    source = open_source(tmp_path)
    with pytest.warns(UserWarning, match=r"has no model\.layers\.1\..*, .* and 6 more: left out"):
        source.bind(on_meta(source.config))


def test_what_old_checkpoints_hold_beside_is_not_told(tmp_path):
    model = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_reads(tmp_path, model)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_there_as_well(tmp_path, same):
    model = saved(tmp_path, LlamaConfig(**LLAMA, tie_word_embeddings=True))
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    if not same:
        head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if same:
        assert_reads(tmp_path, model)
    else:
        assert_refused(tmp_path, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings")


def test_an_attention_of_transformers_own_is_none(tmp_path):
    model = saved(tmp_path)
    edit(tmp_path / "config.json", attn_implementation="eager")
    assert_reads(tmp_path, model)


# --- what other modules check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 4000}, ("num_hidden_layers is 4000", "more than the weights have")),
        ({"vocab_size": 10**12}, ("vocab_size", "more than any model has", "compare it with the model's original")),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("decoder-only",)),
        ({"quantization_config": {"quant_method": "torchao"}}, ("torchao", "not supported yet", "unquantised")),
        ({"compression_config": {"format": "dense"}}, ("compression_config (unnamed)", "unquantised")),
    ],
    ids=str,
)
def test_configs_that_cannot_be_used(tmp_path, changes, words):
    saved(tmp_path)
    edit(tmp_path / "config.json", **changes)
    assert_refused(tmp_path, *words)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_fifo_does_not_block(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert_refused(tmp_path, name, "regular file")


def test_a_directory_without_weights(tmp_path):
    LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    assert_refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize(
    "names",
    [["adapter_model"], ["model-00001-of-00002"], ["one", "two"], ["model-00001-of-00002", "model-00002-of-00002"]],
    ids=str,
)
def test_files_of_which_none_is_surely_the_model(tmp_path, names):
    saved(tmp_path)
    for name in names:
        shutil.copy(tmp_path / "model.safetensors", tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors").unlink()
    assert_refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("beside", ["adapter_model", "model-00001-of-00002"])
def test_the_only_file_may_have_any_name(tmp_path, beside):
    model = saved(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / f"{beside}.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "ours.safetensors")
    assert_reads(tmp_path, model)


def test_companions_are_those_of_the_model(tmp_path):
    saved(tmp_path / "source")
    edit(tmp_path / "source" / "config.json", auto_map={"AutoConfig": "code.Config"}, architectures=None)
    (tmp_path / "source" / "generation_config.json").write_text("{}")
    (tmp_path / "target").mkdir()
    open_source(tmp_path / "source").save_companions(tmp_path / "target")
    assert sorted(file.name for file in (tmp_path / "target").iterdir()) == ["config.json", "generation_config.json"]
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    assert AutoConfig.from_pretrained(tmp_path / "target").hidden_size == LLAMA["hidden_size"]
