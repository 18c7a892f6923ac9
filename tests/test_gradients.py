"""Loss and every LoRA gradient against transformers + PEFT on the decoded weights."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    batch,
    our_gradients,
    peft_gradients,
    peft_model,
    randomize_adapter,
    relative_rms,
    tiny_store,
)

import mebp_triton as mebp

TOLERANCE = 1e-5  # relative RMS, float32


def both(store: Any, lora: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """Our model and PEFT's, with the same weights and adapter."""
    lora = {"r": 4, "lora_alpha": 8} | (lora or {})
    dtype = options.get("dtype", torch.float32)
    model = mebp.load(store, mebp.LoraConfig(**lora), **options)
    randomize_adapter(model)
    lora.pop("target_modules", None)  # peft_model takes those of our model
    return model, peft_model(store, model, dtype, **lora)


def assert_same_gradients(model: Any, wrapped: Any, tolerance: float = TOLERANCE) -> None:
    ours, theirs = our_gradients(model), peft_gradients(wrapped)
    assert ours.keys() == theirs.keys() and ours
    for name, truth in theirs.items():
        assert ours[name] is not None, name
        assert truth.norm() > 0, f"{name}: a zero gradient compares nothing"
        assert relative_rms(ours[name], truth) <= tolerance, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_peft(architecture: str) -> None:
    store = tiny_store(architecture)
    cases = [("device", "device", 2, "right"), ("file", "file", 3, "left"), ("host", "host", 1, None)]
    for weights, checkpoints, rows, padding in cases:
        model, wrapped = both(store, weights=weights, checkpoints=checkpoints)
        # Twice: the second recompute leaves out the product that no gradient needs.
        for seed in (1, 2):
            examples = batch(rows, padding=padding, seed=seed)
            model.zero_grad()
            wrapped.zero_grad()
            ours, theirs = model(**examples).loss, wrapped(**examples).loss
            ours.backward()
            theirs.backward()
            assert abs(ours.item() - theirs.item()) <= TOLERANCE * theirs.item()
            assert_same_gradients(model, wrapped)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_accumulation_is_the_mean_over_all_tokens(architecture: str) -> None:
    model, wrapped = both(tiny_store(architecture))
    micro_batches = [batch(2, 20, seed=3), batch(3, 9, "left", seed=4)]
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches]
    assert tokens[0] != tokens[1]
    model.mebp.loss.normalizer = sum(tokens)
    for examples, count in zip(micro_batches, tokens, strict=True):
        model(**examples).loss.backward()
        (wrapped(**examples).loss * count / sum(tokens)).backward()
    assert_same_gradients(model, wrapped)


@pytest.mark.parametrize("scheme", ["symmetric", "affine", "codebook"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_scheme_and_group_size(scheme: str, group_size: int) -> None:
    model, wrapped = both(tiny_store("llama", scheme=scheme, group_size=group_size))
    examples = batch()
    model(**examples).loss.backward()
    wrapped(**examples).loss.backward()
    assert_same_gradients(model, wrapped)


def test_float64() -> None:
    options = {"dtype": torch.float64, "adapter_dtype": torch.float64}
    model, wrapped = both(tiny_store("qwen2"), **options)
    examples = batch()
    for _ in range(2):
        model.zero_grad()
        model(**examples).loss.backward()
    # The model's own loss is computed in float32 (`logits.float()`), so the truth is taken from its logits.
    logits = wrapped(input_ids=examples["input_ids"], attention_mask=examples["attention_mask"]).logits
    targets = examples["labels"][:, 1:].reshape(-1)
    torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets).backward()
    assert_same_gradients(model, wrapped, 1e-9)


def test_rank_stabilized_scaling() -> None:
    model, wrapped = both(tiny_store("llama"), {"r": 9, "use_rslora": True})
    examples = batch()
    model(**examples).loss.backward()
    wrapped(**examples).loss.backward()
    assert_same_gradients(model, wrapped)


@pytest.mark.parametrize(("architecture", "dropout"), [("llama", 0.3), ("gpt2", 0.0), ("opt", 0.2)])
def test_dropout_draws_the_same_mask_again(architecture: str, dropout: float) -> None:
    """gpt2 and opt have dropout of their own. The engine must give what plain autograd gives from the same seed."""
    store = tiny_store(architecture)
    results = []
    for plain in (False, True):
        model = mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout))
        randomize_adapter(model)
        model.train()
        if plain:
            model.mebp.engine.remove()
        losses = []
        for seed in (5, 6):
            model.zero_grad()
            torch.manual_seed(seed)
            loss = model(**batch(), use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
        results.append((losses, our_gradients(model), torch.rand(1)))
    assert results[0][0] == results[1][0] and len(set(results[0][0])) == 2
    for name, truth in results[1][1].items():
        assert relative_rms(results[0][1][name], truth) <= TOLERANCE, name
    assert torch.equal(results[0][2], results[1][2]), "the recompute left the generator elsewhere"


def test_restarting_positions_make_separate_documents() -> None:
    model, wrapped = both(tiny_store("llama"))
    ids = batch(1, 20, None)["input_ids"]
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    for one in (model, wrapped):
        # With a cache, which training here never has, transformers would let the documents see each other.
        one(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
    assert_same_gradients(model, wrapped)
    model.zero_grad()
    model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
    assert_same_gradients(model, wrapped)


def test_bfloat16_is_near() -> None:
    store = tiny_store("llama")
    model, wrapped = both(store, dtype=torch.bfloat16)
    exact = peft_model(store, model, torch.float32, r=4, lora_alpha=8)
    examples = batch()
    for one in (model, wrapped, exact):
        one(**examples).loss.backward()
    ours, theirs, truth = our_gradients(model), peft_gradients(wrapped), peft_gradients(exact)
    worst = max(relative_rms(ours[name], truth[name]) for name in truth)
    peers = max(relative_rms(theirs[name], truth[name]) for name in truth)
    assert worst <= 2 * peers, f"error {worst} against transformers + PEFT's own {peers} in bfloat16"


def test_a_peft_config_is_taken() -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = mebp.load(tiny_store("llama"), config)
    assert {name.split(".")[-3] for name in our_gradients(model)} == {"q_proj", "down_proj"}
    assert all(tensor.shape[0] == 3 for name, tensor in model.named_parameters() if name.endswith("lora_A"))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "opt"])
def test_padding_has_no_influence(architecture: str, padding: str) -> None:
    """Which token pads, how much of it there is, and on which side."""
    model = mebp.load(tiny_store(architecture), mebp.LoraConfig(r=4, lora_alpha=8))
    randomize_adapter(model)
    tight = batch(1, 12, None)
    model(**tight).loss.backward()
    truth = our_gradients(model)
    for token, amount in ((0, 5), (2, 5), (2, 9)):
        side = (amount, 0) if padding == "left" else (0, amount)
        # Of padding on the left, the last token would have the first real one as its target.
        tight["labels"][:, 0] = -100
        padded = {
            name: torch.nn.functional.pad(tensor, side, value={"input_ids": token, "labels": -100}.get(name, 0))
            for name, tensor in tight.items()
        }
        model.zero_grad()
        model(**padded).loss.backward()
        for name, grad in our_gradients(model).items():
            assert relative_rms(grad, truth[name]) <= TOLERANCE, (name, token, amount)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_selection_gives_the_true_gradients_of_the_selected(architecture: str) -> None:
    """Also below blocks whose last product is left out of the recompute, and after selections have changed."""
    model, wrapped = both(tiny_store(architecture))
    examples = batch()
    wrapped(**examples).loss.backward()
    truth = peft_gradients(wrapped)
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="exact")
    for _ in range(4):
        (index,) = selection.selected
        model.zero_grad()
        model(**examples).loss.backward()
        for name, grad in our_gradients(model).items():
            inside = f".{index}." in name
            assert (grad is not None) == inside, name
            assert not inside or relative_rms(grad, truth[name]) <= TOLERANCE, name
        selection.advance()


def test_a_lora_that_leaves_out_the_last_layers_of_a_block() -> None:
    """Then something that is not LoRA follows the last LoRA layer, and its output is needed."""
    store = tiny_store("llama")
    for targets in (["q_proj"], ["o_proj", "k_proj"], ["up_proj"]):
        model, wrapped = both(store, {"target_modules": targets})
        for seed in (1, 2):
            examples = batch(seed=seed)
            model.zero_grad()
            wrapped.zero_grad()
            model(**examples).loss.backward()
            wrapped(**examples).loss.backward()
            assert_same_gradients(model, wrapped)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4.57 saves Gemma 3n by other names")
@pytest.mark.parametrize("options", [{}, {"recompute_granularity": "selective"}, {"weights": "file"}], ids=str)
def test_keys_and_values_that_blocks_share(options: dict[str, Any]) -> None:
    """The last block of Gemma 3n has the keys and values of the one before it."""
    model, wrapped = both(tiny_store("gemma3n_text"), {"target_modules": ["q_proj", "k_proj", "v_proj"]}, **options)
    for _ in range(2):
        model.zero_grad()
        model(**batch()).loss.backward()
    wrapped(**batch(), use_cache=False).loss.backward()
    assert_same_gradients(model, wrapped)


@pytest.mark.parametrize("use_cache", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
def test_a_model_without_attention(use_cache: dict[str, bool]) -> None:
    """Its cache is of another kind; training makes none."""
    model, wrapped = both(tiny_store("lfm2"), {"target_modules": ["in_proj", "w1"]})
    output = model(**batch(), **use_cache)
    output.loss.backward()
    wrapped(**batch(), use_cache=False).loss.backward()
    assert_same_gradients(model, wrapped)
    assert output.past_key_values is None


def test_hidden_states_between_blocks_have_their_gradient() -> None:
    model, wrapped = both(tiny_store("llama"))
    for one in (model, wrapped):
        output = one(**batch(), output_hidden_states=True)
        (output.loss + sum(state.square().mean() for state in output.hidden_states[:-1])).backward()
    assert_same_gradients(model, wrapped)


@pytest.mark.parametrize(
    ("architecture", "flag"), [("granitemoe", "output_router_logits"), ("llama", "output_attentions")]
)
def test_what_a_block_computes_within_is_not_handed_out_while_training(architecture: str, flag: str) -> None:
    """Router logits make an auxiliary loss: it would be in the loss, and not in the gradient."""
    model, _ = both(tiny_store(architecture), attn_implementation="eager")
    with pytest.raises(ValueError, match=f"{flag}=True: what a block computes within has no gradient"):
        model(**batch(), **{flag: True})
    with torch.no_grad():
        assert model(**batch(), **{flag: True})[flag.removeprefix("output_")] is not None
    setattr(model.config, flag, True)
    with pytest.raises(ValueError, match=flag):
        model.model(batch()["input_ids"])
    model(**batch(), **{flag: False}).loss.backward()
    model.requires_grad_(False)
    assert not model(**batch()).loss.requires_grad
