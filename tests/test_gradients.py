"""Loss and every LoRA gradient against transformers + PEFT on the decoded weights."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    MIXTURES,
    assert_same,
    batch,
    decoded_model,
    loaded,
    our_gradients,
    peft_gradients,
    peft_model,
    relative_rms,
)
from runs import two_level_store

import mebp_triton as mebp
from mebp_triton.blocks.runner import find_blocks
from mebp_triton.kernels.names import FORMS, Form
from mebp_triton.models.adapter import PREFIX, load_adapter, read_adapter_config
from mebp_triton.store.reader import Store

TOLERANCE = 1e-5  # relative RMS, float32
# Their linear attention magnifies roundings: with plain torch on both sides the gradients differ by 1.06e-5, with norms
# by compiled code by 2.3e-5, while no norm's own error is above torch's (``tests/kernels/test_native_rows.py``).
MAGNIFYING = dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), 4e-5)


def both(store: Any, lora: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """Our model and PEFT's, with the same weights and adapter."""
    lora = {"r": 4, "lora_alpha": 8} | (lora or {})
    model = loaded(store, lora, **options)
    lora.pop("target_modules", None)  # peft_model takes those of our model
    return model, peft_model(store, model, options.get("dtype", torch.float32), **lora)


def assert_same_gradients(model: Any, wrapped: Any, tolerance: float = TOLERANCE) -> None:
    assert_same(our_gradients(model), peft_gradients(wrapped), tolerance)


def run(*models: Any, **examples: Any) -> list[float]:
    """One step of each model; the losses."""
    losses = []
    for model in models:
        model.zero_grad()
        loss = model(**examples).loss
        loss.backward()
        losses.append(loss.item())
    return losses


needs_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules, or lie otherwise")
MIXTURE = pytest.param("qwen3_moe", marks=needs_5)

PLACES = [("device", "device"), ("file", "file"), ("host", "host")]
BATCHES = [(2, "right"), (3, "left"), (1, None)]  # rows, and the side on which they are padded
# Each architecture with weights and block inputs in one of the places, those that differ most in all of them.
CASES = [(name, places) for name in ("llama", "qwen2", "gpt2") for places in PLACES]
CASES += [(name, PLACES[at % 3]) for at, name in enumerate(ARCHITECTURES) if name not in ("llama", "qwen2", "gpt2")]
CASES += [pytest.param(name, PLACES[at % 3], marks=needs_5) for at, name in enumerate(MIXTURES, 1)]


@pytest.mark.parametrize(("architecture", "places"), CASES)
def test_equal_to_peft(shared_store: Any, architecture: str, places: tuple[Any, Any], tmp_path: Any) -> None:
    weights, checkpoints = places
    model, wrapped = both(
        shared_store(architecture), weights=weights, checkpoints=checkpoints, scratch_directory=tmp_path
    )
    # The second recompute and all later ones leave out the product that no gradient needs.
    for seed, (rows, padding) in enumerate(BATCHES):
        ours, theirs = run(model, wrapped, **batch(rows, padding=padding, seed=seed))
        assert abs(ours - theirs) <= TOLERANCE * theirs
        assert_same_gradients(model, wrapped, MAGNIFYING.get(architecture, TOLERANCE))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, MIXTURE])
def test_exact_selection_gives_the_true_gradients_of_the_selected(shared_store: Any, architecture: str) -> None:
    """Also below blocks whose last product is left out of the recompute, and after selections have changed."""
    model, wrapped = both(shared_store(architecture))
    examples = batch()
    run(wrapped, **examples)
    truth = peft_gradients(wrapped)
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="exact")
    for _ in range(4):
        (index,) = selection.selected
        run(model, **examples)
        expected = {name: grad if f".{index}." in name else None for name, grad in truth.items()}
        assert_same(our_gradients(model), expected, TOLERANCE)
        selection.advance()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", MIXTURE])
def test_accumulation_is_the_mean_over_all_tokens(shared_store: Any, architecture: str) -> None:
    model, wrapped = both(shared_store(architecture))
    micro_batches = [batch(2, 20, seed=3), batch(3, 9, "left", seed=4)]
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches]
    assert tokens[0] != tokens[1]
    model.mebp.loss.normalizer = sum(tokens)
    for examples, count in zip(micro_batches, tokens, strict=True):
        model(**examples).loss.backward()
        (wrapped(**examples).loss * count / sum(tokens)).backward()
    assert_same_gradients(model, wrapped)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form(shared_store: Any, form: Form) -> None:
    model, wrapped = both(shared_store("llama", **form._asdict()))
    run(model, wrapped, **batch())
    assert_same_gradients(model, wrapped)


@pytest.mark.parametrize("form", [Form("affine", 32), Form("symmetric", 16, 8)], ids=str)
def test_scales_of_two_levels(shared_store: Any, form: Form, tmp_path: Any) -> None:
    source = shared_store("llama", config={"intermediate_size": 300}).parent / "model"  # more than 256 columns
    store = two_level_store(source, tmp_path / "store", form)
    model, wrapped = both(store, weights="file")
    run(model, wrapped, **batch())
    assert_same_gradients(model, wrapped)
    assert {info.scale_dtype for info in Store(store).matrices.values()} == {"I8"}


def test_float64(shared_store: Any) -> None:
    model, wrapped = both(shared_store("qwen2"), dtype=torch.float64, adapter_dtype=torch.float64)
    examples = batch()
    for _ in range(2):
        run(model, **examples)
    # The model's own loss is computed in float32 (`logits.float()`), so the truth is taken from its logits.
    logits = wrapped(input_ids=examples["input_ids"], attention_mask=examples["attention_mask"]).logits
    targets = examples["labels"][:, 1:].reshape(-1)
    torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets).backward()
    assert_same_gradients(model, wrapped, 1e-9)


def test_rank_stabilized_scaling(shared_store: Any) -> None:
    model, wrapped = both(shared_store("llama"), {"r": 9, "use_rslora": True})
    run(model, wrapped, **batch())
    assert_same_gradients(model, wrapped)


@pytest.mark.parametrize(("architecture", "dropout"), [("llama", 0.3), ("gpt2", 0.0), ("opt", 0.2)])
def test_dropout_draws_the_same_mask_again(shared_store: Any, architecture: str, dropout: float) -> None:
    """gpt2 and opt have dropout of their own. The engine must give what plain autograd gives from the same seed."""
    results = []
    for plain in (False, True):
        model = loaded(shared_store(architecture), {"lora_dropout": dropout}).train()
        if plain:
            model.mebp.engine.remove()
        losses = []
        for seed in (5, 6):
            torch.manual_seed(seed)
            losses += run(model, **batch(), use_cache=False)
        results.append((losses, our_gradients(model), torch.rand(1)))
    assert results[0][0] == results[1][0] and len(set(results[0][0])) == 2
    assert_same(results[0][1], results[1][1], TOLERANCE)
    assert torch.equal(results[0][2], results[1][2]), "the recompute left the generator elsewhere"


def test_restarting_positions_make_separate_documents(shared_store: Any) -> None:
    model, wrapped = both(shared_store("llama"))
    ids = batch(1, 20, None)["input_ids"]
    examples = {"input_ids": ids, "labels": ids, "position_ids": torch.cat((torch.arange(8), torch.arange(12)))[None]}
    # With a cache, which training here never has, transformers would let the documents see each other.
    run(model, wrapped, **examples, use_cache=False)
    assert_same_gradients(model, wrapped)
    run(model, **examples)
    assert_same_gradients(model, wrapped)


def test_bfloat16_is_near(shared_store: Any) -> None:
    store = shared_store("llama")
    model, wrapped = both(store, dtype=torch.bfloat16)
    exact = peft_model(store, model, torch.float32, r=4, lora_alpha=8)
    run(model, wrapped, exact, **batch())
    ours, theirs, truth = our_gradients(model), peft_gradients(wrapped), peft_gradients(exact)
    worst = max(relative_rms(ours[name], truth[name]) for name in truth)
    peers = max(relative_rms(theirs[name], truth[name]) for name in truth)
    assert worst <= 2 * peers, f"error {worst} against transformers + PEFT's own {peers} in bfloat16"


def test_a_peft_config_is_taken(shared_store: Any) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = mebp.load(shared_store("llama"), config)
    assert {name.split(".")[-3] for name in our_gradients(model)} == {"q_proj", "down_proj"}
    assert all(tensor.shape[0] == 3 for name, tensor in model.named_parameters() if name.endswith("lora_A"))


@pytest.mark.parametrize(
    ("architecture", "padding"), [("llama", "left"), ("gemma3_text", "right"), ("opt", "left"), ("opt", "right")]
)
def test_padding_has_no_influence(shared_store: Any, architecture: str, padding: str) -> None:
    """Which token pads, how much of it there is, and on which side."""
    model = loaded(shared_store(architecture))
    tight = batch(1, 12, None)
    run(model, **tight)
    truth = our_gradients(model)
    # After padding on the left, the last token of the padding would have the first real one as its target.
    tight["labels"][:, 0] = -100
    for token, amount in ((0, 5), (2, 5), (2, 9)):
        side = (amount, 0) if padding == "left" else (0, amount)
        padded = {
            name: torch.nn.functional.pad(tensor, side, value={"input_ids": token, "labels": -100}.get(name, 0))
            for name, tensor in tight.items()
        }
        run(model, **padded)
        assert_same(our_gradients(model), truth, TOLERANCE)


def test_a_lora_that_leaves_out_the_last_layers_of_a_block(shared_store: Any) -> None:
    """Then something that is not LoRA follows the last LoRA layer, and its output is needed."""
    for targets in (["q_proj"], ["o_proj", "k_proj"], ["up_proj"]):
        model, wrapped = both(shared_store("llama"), {"target_modules": targets})
        for seed in (1, 2):
            run(model, wrapped, **batch(seed=seed))
            assert_same_gradients(model, wrapped)


@needs_5
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_adapters_on_experts(shared_store: Any, architecture: str, tmp_path: Any) -> None:
    """PEFT loads them from our files, and has the same loss and the same gradients."""
    store = shared_store(architecture)
    lora = {"target_modules": "all-linear-and-experts", "rank_pattern": {"experts.down_proj": 3}}
    model = loaded(store, lora, weights="file")
    mebp.save_adapter(model, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(decoded_model(store), tmp_path, is_trainable=True)
    for padding in ("left", None):
        ours, theirs = run(model, **batch(padding=padding)), run(wrapped, **batch(padding=padding))
        assert abs(ours[0] - theirs[0]) <= TOLERANCE * theirs[0]
        assert_same_gradients(model, wrapped)
    assert sum(".experts." in name for name in our_gradients(model)) == 2 * 2 * 3
    fresh = mebp.load(store, read_adapter_config(tmp_path))
    load_adapter(fresh, tmp_path)
    assert fresh(**batch()).loss.item() == model(**batch()).loss.item()


@needs_5
@pytest.mark.parametrize("options", [{"recompute_granularity": "selective"}, {"block_rows": 1}], ids=str)
def test_experts_are_brought_in_for_both_passes(shared_store: Any, options: dict[str, Any]) -> None:
    """The recompute asks for those of the forward pass; few tokens have few."""
    model, wrapped = both(shared_store("qwen3_moe"), weights="file", **options)
    waiting, counts = model.mebp.engine.waiting, []
    for examples in (batch(), batch(1, 3, None)):
        for _ in range(2):
            run(model, **examples)
            counts.append(waiting.pop_experts())
        if examples["input_ids"].numel() > 3:
            run(wrapped, **examples)
            assert_same_gradients(model, wrapped)
    everything = 2 * 3 * 6  # both passes of three blocks of six experts
    assert counts[0] == counts[1] == everything > counts[2] == counts[3] > 0
    with torch.no_grad():
        model(**batch(1, 3, None))
    assert waiting.pop_experts() == counts[3] // 2


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4.57 saves Gemma 3n by other names")
@pytest.mark.parametrize("options", [{}, {"recompute_granularity": "selective"}, {"weights": "file"}], ids=str)
def test_keys_and_values_that_blocks_share(shared_store: Any, options: dict[str, Any]) -> None:
    """The last block of Gemma 3n has the keys and values of the one before it."""
    model, wrapped = both(shared_store("gemma3n_text"), {"target_modules": ["q_proj", "k_proj", "v_proj"]}, **options)
    for _ in range(2):
        run(model, **batch())
    run(wrapped, **batch(), use_cache=False)
    assert_same_gradients(model, wrapped)


FAMILIES = ["falcon", "bert", "zamba2", "nemotron_h"]
if transformers.__version__ >= "5":
    FAMILIES += ["gemma4_text", "olmo_hybrid"]


@pytest.mark.parametrize(("at", "architecture"), enumerate(FAMILIES))
def test_families_whose_modules_are_unusual(shared_store: Any, at: int, architecture: str, tmp_path: Any) -> None:
    """Padding, accumulation, residency and selection; see also ``tests/bench/test_families.py``."""
    weights, checkpoints = PLACES[at % 3]
    granularity = ("selective", "full")[at % 2]
    places = {"weights": weights, "checkpoints": checkpoints, "scratch_directory": tmp_path}
    model, wrapped = both(shared_store(architecture), **places, recompute_granularity=granularity)
    for seed, (rows, padding) in enumerate(BATCHES[:2]):
        examples = batch(rows, padding=padding, seed=seed) | {"use_cache": False}
        model(**examples).loss.backward()
        wrapped(**examples).loss.backward()
    assert_same_gradients(model, wrapped, 2 * TOLERANCE)
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="exact")
    run(model, wrapped, **batch(), use_cache=False)
    blocks = f"{PREFIX}{find_blocks(model)[0]}."
    (selected,) = (f"{blocks}{index}." for index in selection.selected)
    expected = {
        name: grad if name.startswith(selected) or not name.startswith(blocks) else None
        for name, grad in peft_gradients(wrapped).items()
    }
    assert_same(our_gradients(model), expected, 2 * TOLERANCE)


def test_a_model_without_attention(shared_store: Any) -> None:
    model, wrapped = both(shared_store("lfm2"), {"target_modules": ["in_proj", "w1"]})
    run(model, **batch())
    run(wrapped, **batch(), use_cache=False)
    assert_same_gradients(model, wrapped)


def test_hidden_states_between_blocks_have_their_gradient(shared_store: Any) -> None:
    model, wrapped = both(shared_store("llama"))
    for one in (model, wrapped):
        output = one(**batch(), output_hidden_states=True)
        (output.loss + sum(state.square().mean() for state in output.hidden_states[:-1])).backward()
    assert_same_gradients(model, wrapped)
