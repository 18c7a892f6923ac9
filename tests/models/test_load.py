"""``load``: a store becomes a transformers model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from int4_models import from_pretrained
from models import assert_same, batch, decoded_model, loaded, randomize_adapter, relative_rms, step
from runs import word_tokenizer

import mebp_triton as mebp
from mebp_triton.blocks.mlp_chunks import ChunkedMLP
from mebp_triton.layers.int4_module import Int4Module
from mebp_triton.store.manifest import accept_companions
from mebp_triton.store.reader import Store


@pytest.fixture(scope="module")
def store(shared_store: Any) -> Path:
    return shared_store("qwen2")


@pytest.fixture(scope="module")
def decoded(store: Path) -> Any:
    return decoded_model(store)


def copy_of(store: Path, target: Path, file: str, content: str | None) -> Path:
    """A copy of a store with another file beside its weights, or without it."""
    shutil.copytree(store, target)
    (target / file).unlink() if content is None else (target / file).write_text(content)
    accept_companions(target)
    return target


def test_it_is_what_from_pretrained_would_return(store: Path, decoded: Any) -> None:
    model = mebp.load(store, mebp.LoraConfig(r=2))
    assert type(model).__name__ == "Qwen2ForCausalLM" and not model.training
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(name.endswith(("lora_A", "lora_B")) for name in trainable)
    assert not any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers()))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, decoded(input_ids=ids).logits, atol=1e-5)


def test_a_tied_head_can_be_tied_again(shared_store: Any) -> None:
    """lm-eval does it to every model that it is given."""
    model, ids = mebp.load(shared_store("llama")), torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.tie_weights()
        assert torch.equal(model(input_ids=ids).logits, before)
    for options in ({}, {"embedding": "float"}):
        model, other = mebp.load(shared_store("llama"), **options), torch.nn.Embedding(97, 48)
        model.set_input_embeddings(other)
        if options:  # the way that the message names
            model.tie_weights()
            assert model.get_output_embeddings().weight is other.weight
        else:
            with pytest.raises(ValueError, match=r"cannot be tied to another embedding: use load\(.*embedding='float'"):
                model.tie_weights()


def test_it_generates_what_the_decoded_model_does(store: Path, decoded: Any) -> None:
    ids = torch.arange(3, 9)[None]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = mebp.load(store, weights="file").generate(input_ids=ids, **options)
    assert torch.equal(ours, decoded.generate(input_ids=ids, **options))


def test_a_config_that_contradicts_the_weights(store: Path, tmp_path: Path) -> None:
    """It is compared with the checksums first; then, if the user accepted it, with the weights."""
    config = json.loads((store / "config.json").read_text()) | {"vocab_size": 98}
    shutil.copytree(store, tmp_path / "changed")
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not what it was when the store was made"):
        mebp.load(tmp_path / "changed")
    for vocabulary, message in (
        (98, "the config says"),
        (1 << 20, "vocab_size is .* more than the weights have"),
    ):
        text = json.dumps(config | {"vocab_size": vocabulary})
        with pytest.raises(ValueError, match=message):
            mebp.load(copy_of(store, tmp_path / str(vocabulary), "config.json", text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "disk"}, "weights must be one of"),
        ({"checkpoints": "disk"}, "checkpoints must be one of"),
        ({"adapter_dtype": torch.float16}, "adapter_dtype must be float32 or bfloat16"),
        ({"backend": "cuda"}, "backend must be"),
        ({"blocks": "model.nothing"}, "is no module"),
        ({"recompute_granularity": "half"}, "recompute_granularity must be full or selective, got 'half'"),
        ({"mlp_chunk_tokens": -1}, "mlp_chunk_tokens must be a whole number"),
        ({"block_graphs": True}, "block_graphs records CUDA graphs, and this model is on cpu: leave it out"),
        ({"block_graphs": "no"}, "block_graphs must be True or False, got 'no'"),
        ({"block_rows": 0, "lora": mebp.LoraConfig(target_modules=["nope"])}, "block_rows must be a number of rows"),
        ({"head": "int8"}, "head must be int4 or float, got 'int8'"),
        ({"lora": mebp.LoraConfig(target_modules=["q_proj", "nope"])}, "'nope' matches no linear layer"),
        ({"lora": mebp.LoraConfig(target_modules=["lm_head"])}, "'lm_head' matches no linear layer"),
        ({"dtype": "bf17"}, "dtype must be float32, bfloat16 or float16, got 'bf17'"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16, got 'int8'"),
        ({"dtype": "nn"}, "dtype must be float32, bfloat16 or float16, got 'nn'"),
    ],
    ids=str,
)
def test_wrong_arguments(store: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mebp.load(store, **options)


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        mebp.load(tmp_path / "none")


def test_a_dtype_may_be_named_as_in_transformers(store: Path) -> None:
    assert mebp.load(store, dtype="bfloat16").dtype == torch.bfloat16


def test_an_opened_store_is_taken_as_it_is(store: Path) -> None:
    opened = Store(store)
    assert mebp.load(opened).mebp.store is opened


def test_arguments_reach_the_parts_that_they_are_for(store: Path, tmp_path: Path) -> None:
    model = mebp.load(
        store,
        mebp.LoraConfig(r=2),
        checkpoints="file",
        scratch_directory=tmp_path,
        adapter_dtype=torch.bfloat16,
        attn_implementation="eager",
        recompute_granularity="selective",
        mlp_chunk_tokens=5,
        backend="panel",
    )
    assert model.config._attn_implementation == "eager" and model.mebp.engine.keep_outputs
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {module.tokens for module in model.modules() if isinstance(module, ChunkedMLP)} == {5}
    assert {module.backend for module in model.modules() if isinstance(module, Int4Module)} == {"panel"}
    assert model.mebp.engine.block_inputs.directory == tmp_path


def test_the_generation_config_is_the_stores(store: Path, tmp_path: Path) -> None:
    """Chat models end their turns with a token that config.json does not name."""
    ids = torch.arange(3, 9)[None]
    written = mebp.load(store).generate(input_ids=ids, max_new_tokens=8, pad_token_id=0)[0, 6:].tolist()
    name = "generation_config.json"
    settings = json.loads((store / name).read_text())
    settings |= {"eos_token_id": [2, written[2]], "repetition_penalty": 1.0}
    model = mebp.load(copy_of(store, tmp_path / "with", name, json.dumps(settings)))
    assert model.generation_config.eos_token_id == [2, written[2]]
    stopped = model.generate(input_ids=ids, max_new_tokens=8, pad_token_id=0)[0, 6:].tolist()
    assert stopped == written[: written.index(written[2]) + 1] and len(stopped) < 8
    assert mebp.load(copy_of(store, tmp_path / "without", name, None)).generation_config.eos_token_id == 2


@pytest.mark.parametrize("content", ["{", "[]", "[1]", '"text"'])
def test_a_damaged_generation_config(store: Path, tmp_path: Path, content: str) -> None:
    damaged = copy_of(store, tmp_path / "store", "generation_config.json", content)
    message = r"generation_config\.json is not a usable generation config .*; compare it"
    with pytest.raises(ValueError, match=message) as caught:
        mebp.load(damaged)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("weights", "name"), [("device", "lm_head"), ("file", "embed_tokens")])
def test_peft_cannot_train_an_int4_table_whole(store: Path, tmp_path: Path, weights: Any, name: str) -> None:
    """It would copy the table, train nothing, and save packed codes as an adapter."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[name], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"modules_to_save.*head='float'"):
        peft.get_peft_model(mebp.load(store, weights=weights), config)
    # An adapter that was trained elsewhere is refused as well.
    peft.get_peft_model(decoded_model(store), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"modules_to_save.*head='float'"):
        peft.PeftModel.from_pretrained(mebp.load(store, weights=weights), tmp_path)
    with pytest.raises(ValueError, match="modules_to_save"):
        mebp.load(store, mebp.read_adapter_config(tmp_path))


def test_peft_can_train_a_float_head(store: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(mebp.load(store, head="float"), config)
    truth = peft.get_peft_model(decoded_model(store), config)
    truth.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    ids = torch.arange(3, 15)[None]
    for one in (model, truth):
        one(input_ids=ids, labels=ids).loss.backward()
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    gradients = [dict(one.named_parameters())[name].grad for one in (model, truth)]
    assert relative_rms(*gradients) < 1e-5
    model.save_pretrained(tmp_path)
    assert set(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")) >= {
        "base_model.model.lm_head.weight"
    }


# --- new tokens -----------------------------------------------------------------------------------------------------

ROWS = torch.randn(3, 48, generator=torch.Generator().manual_seed(5)) * 0.15  # of three new tokens
TOKENS = [5, 97, 98, 99]


def with_new_tokens(model: Any) -> Any:
    model.resize_token_embeddings(100, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[97:] = ROWS
    return model


def training_tokens(model: Any, **options: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(model, config)
    randomize_adapter(wrapped)
    return wrapped


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # the first one's head is tied
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": TOKENS},
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["tokens", "both", "whole"],
)
def test_new_tokens_are_trained_and_saved_as_peft_does(
    shared_store: Any, tmp_path: Path, architecture: str, options: Any
) -> None:
    store = shared_store(architecture)
    ours = with_new_tokens(mebp.load(store, checkpoints="file", weights="file", head="float", embedding="float"))
    ours = training_tokens(ours, **options)
    theirs = training_tokens(with_new_tokens(decoded_model(store)), **options)
    examples = batch()
    examples["input_ids"][0, :4] = examples["labels"][0, :4] = torch.tensor(TOKENS)
    gradients = []
    for model in (ours, theirs):
        model.train()(**examples, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("embed_tokens" in name for name in gradients[0])
    assert_same(*gradients, tolerance=1e-5)

    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(with_new_tokens(decoded_model(store)), tmp_path)
    with torch.no_grad():
        expected = ours.eval()(input_ids=examples["input_ids"]).logits
        assert expected.shape[-1] == 100
        assert torch.allclose(again.eval()(input_ids=examples["input_ids"]).logits, expected, atol=1e-5)


def test_lora_on_int4_tables_is_that_of_peft(shared_store: Any) -> None:
    gradients = []
    for model in (mebp.load(shared_store("llama")), decoded_model(shared_store("llama"))):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
        randomize_adapter(wrapped)
        wrapped(**batch(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad})
    assert_same(*gradients, tolerance=1e-5)


def test_an_int4_table_keeps_its_size(store: Path) -> None:
    """And every way out that the message names is one: see above, and ``test_a_resized_model_is_a_source``."""
    model, way = mebp.load(store), r"load\(\.\.\., head='float', embedding='float'\)"
    for arguments in ({"new_num_tokens": 100}, {"new_num_tokens": 90}, {"pad_to_multiple_of": 8}):
        with pytest.raises(ValueError, match=rf"an int4 embedding and head of 97 tokens cannot get \d+: use {way}"):
            model.resize_token_embeddings(**arguments)
    assert model.resize_token_embeddings(97) is model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.config.vocab_size == 97
    with pytest.raises(ValueError, match="an int4 head of 97 tokens cannot get 100"):
        mebp.load(store, embedding="float").resize_token_embeddings(100)
    for options in ({"trainable_token_indices": [5]}, {"modules_to_save": ["embed_tokens"]}):
        with pytest.raises((ValueError, RuntimeError), match=way):
            training_tokens(mebp.load(store), **options)(**batch(), use_cache=False)
        with pytest.raises(ValueError, match=f"use PEFT's own functions on {way}"):
            mebp.load(store, peft.LoraConfig(target_modules=["q_proj"], **options))
    with pytest.raises(ValueError, match="embedding must be int4 or float, got 'half'"):
        mebp.load(store, embedding="half")  # type: ignore[arg-type]


def test_a_resized_model_is_a_source(shared_store: Any, tmp_path: Path) -> None:
    model = with_new_tokens(from_pretrained(shared_store("llama").parent / "model"))
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    mebp.quantize(tmp_path / "model", tmp_path / "store", group_size=32)
    assert mebp.load(tmp_path / "store").get_input_embeddings().weight.shape == (100, 48)


def test_an_adapter_has_no_place_for_new_rows(store: Path, tmp_path: Path) -> None:
    model = with_new_tokens(mebp.load(store, mebp.LoraConfig(r=2), head="float", embedding="float"))
    for save in (model.save_pretrained, lambda place: mebp.save_adapter(model, place)):
        with pytest.raises(ValueError, match=r"embed_tokens has 100 tokens, in the store 97, .* train by PEFT"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("architecture", "weights"), [("llama", "file"), ("gemma3_text", "device"), ("qwen2", "file")])
def test_float_tables_compute_the_same(shared_store: Any, architecture: str, weights: Any) -> None:
    store = shared_store(architecture)
    model = loaded(store, head="float", embedding="float", weights=weights)
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    assert not any(isinstance(table, Int4Module) for table in tables)
    tied = model.config.tie_word_embeddings
    model.tie_weights()
    assert (tables[0].weight is tables[1].weight) == tied
    assert_same(step(model), step(loaded(store)), tolerance=1e-5)


# --- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "file", "checkpoints": "file"},
        {"checkpoints": "host", "recompute_granularity": "selective", "mlp_chunk_tokens": 5},
        {"head": "float", "embedding": "float"},
    ],
    ids=["files", "selective", "float"],
)
def test_a_copy_is_independent_and_has_the_same_gradients(shared_store: Any, options: Any) -> None:
    model = loaded(shared_store("llama"), **options)
    expected = step(model)
    selection = mebp.LayerCyclicManager(model, ratio=0.4)
    twin = copy.deepcopy(model)
    selection.advance()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.mebp.loss.normalizer, model.mebp.engine.observer = 1e9, lambda *_: pytest.fail("the original ran")
    assert_same(step(twin), expected)
    assert twin.mebp.engine is not model.mebp.engine and twin.mebp.store is model.mebp.store
    with torch.no_grad():
        out = twin(**batch())  # the head of the copy defers its logits, and nobody else's
        assert torch.isfinite(out.logits + 0).all() and out.loss.isfinite()
    names = {name for name, p in twin.named_parameters() if not p.requires_grad}
    assert names <= set(twin._ddp_params_and_buffers_to_ignore)


def test_pefts_adapters_name_the_model_that_the_store_was_made_of(shared_store: Any, tmp_path: Path) -> None:
    store = shared_store("qwen2")
    wrapped = peft.get_peft_model(mebp.load(store), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    named = again.peft_config["default"].base_model_name_or_path
    assert Path(named).resolve() == (store.parent / "model").resolve()


def test_a_copy_under_peft(shared_store: Any, tmp_path: Path) -> None:
    model = training_tokens(mebp.load(shared_store("qwen2"), weights="file"))
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    losses = [one(**batch(), use_cache=False).loss for one in (model, twin)]
    losses[1].backward()
    assert losses[0] == losses[1]
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)


def test_a_model_is_not_pickled(store: Path, tmp_path: Path) -> None:
    """But what the message names works: ``test_saving.py::test_only_the_adapter_is_saved``."""
    with pytest.raises(TypeError, match="a model of load cannot be pickled.*save its adapter by save_pretrained"):
        torch.save(mebp.load(store, mebp.LoraConfig(r=2)), tmp_path / "model.pt")
