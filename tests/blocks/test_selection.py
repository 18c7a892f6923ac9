"""Which blocks a step trains, and that the others are passed as said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from models import (
    assert_same,
    batch,
    decoded_model,
    loaded,
    our_gradients,
    peft_gradients,
    peft_model,
    relative_rms,
    step,
)

import mebp_triton as mebp
from mebp_triton.blocks.options import MODES, SCHEDULES
from mebp_triton.blocks.selection import gradient_norm, sample_blocks, select_blocks, selected_count


@pytest.fixture(scope="module")
def store(shared_store: Any) -> Any:
    return shared_store("llama")


@pytest.fixture(scope="module")
def shared_model(store: Any) -> Any:
    return loaded(store)


@pytest.fixture
def model(shared_model: Any) -> Iterator[Any]:
    """One model for all tests here, before and after without a selection."""
    shared_model.zero_grad()
    yield shared_model
    manager = getattr(shared_model.mebp.engine.treatment, "__self__", None)
    if manager is not None:
        manager.remove()


@pytest.fixture(scope="module")
def truth(store: Any) -> Any:
    """The loss and the gradients without a selection."""
    model = loaded(store)
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return loss, our_gradients(model)


@pytest.mark.parametrize("schedule", [schedule for schedule in SCHEDULES if schedule != "importance"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.75, 1.0])
def test_every_schedule_covers_every_block(schedule: Any, count: int, ratio: float) -> None:
    size = min(count, max(1, round(ratio * count)))
    seen: list[frozenset[int]] = [select_blocks(step, count, ratio, schedule, seed=3) for step in range(2 * count)]
    assert {len(chosen) for chosen in seen} == {size}
    assert frozenset().union(*seen) == frozenset(range(count))
    if schedule != "strided":  # windows and deals cover all within one round
        assert frozenset().union(*seen[: -(-count // size)]) == frozenset(range(count))


def test_random_follows_the_seed_and_only_the_seed() -> None:
    def draws(seed: int) -> list[frozenset[int]]:
        return [select_blocks(step, 12, 0.25, "random", seed) for step in range(8)]

    torch.manual_seed(0)
    first = draws(1)
    torch.manual_seed(1)
    assert draws(1) == first != draws(2)
    assert len(set(first)) > 4


def test_a_sample_grows_with_the_norms_and_leaves_none_out() -> None:
    norms = [4.0, 1.0, 1.0, 0.0, 2.0, 1.0]
    draws = [sample_blocks(step, norms, 1 / 3, seed=7) for step in range(3000)]
    assert {len(draw) for draw in draws} == {selected_count(6, 1 / 3)} == {2}
    assert draws[:50] == [sample_blocks(step, norms, 1 / 3, seed=7) for step in range(50)]
    assert draws[:50] != [sample_blocks(step, norms, 1 / 3, seed=8) for step in range(50)]
    often = [sum(index in draw for draw in draws) / len(draws) for index in range(6)]
    assert often[0] > often[4] > often[1] > often[3] > 0.02
    assert abs(often[1] - often[2]) < 0.05
    # One of six: the probability is the weight itself, four fifths by norm and a fifth even.
    single = [sample_blocks(step, norms, 0.1, seed=7) for step in range(6000)]
    for index, norm in enumerate(norms):
        expected = 0.8 * norm / 9 + 0.2 / 6
        assert abs(sum(index in draw for draw in single) / len(single) - expected) < 0.025


def test_blocks_without_a_norm_count_as_the_largest() -> None:
    draws = [sample_blocks(step, [None, 3.0, None, 0.0], 0.25) for step in range(3000)]
    often = [sum(index in draw for draw in draws) / 3000 for index in range(4)]
    assert max(often[:3]) - min(often[:3]) < 0.05 and often[3] < 0.1
    assert {frozenset({index}) for index in range(4)} == {sample_blocks(step, [None] * 4, 0.25) for step in range(99)}
    assert {frozenset({index}) for index in range(3)} == {sample_blocks(step, [0.0] * 3, 0.3) for step in range(99)}


def test_running_norms(model: Any) -> None:
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="exact", schedule="importance")
    selection.record_norms({0: 2.0, 1: float("nan")})
    selection.record_norms({0: 4.0, 2: 1.0})
    assert selection.norms == [pytest.approx(0.9 * 2 + 0.1 * 4), None, 1.0]
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert gradient_norm(parameters) == 0.0
    parameters[0].grad, parameters[2].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert gradient_norm(parameters) == pytest.approx(5.0)
    half = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    half.grad = torch.full((4,), 6e4, dtype=torch.float16)
    assert gradient_norm([half]) == pytest.approx(12e4, rel=1e-3), "beyond float16"


def test_defaults(model: Any) -> None:
    selection = mebp.LayerCyclicManager(model)
    assert (selection.ratio, selection.mode, selection.schedule, selection.seed) == (0.5, "identity", "cyclic", 0)
    assert selection.norms == [None] * 3 and selection.step == 0 and len(selection.selected) == 2
    assert [select_blocks(step, 12, 0.25, "random") for step in range(4)] == [
        select_blocks(step, 12, 0.25, "random", seed=0) for step in range(4)
    ]
    assert [sample_blocks(step, [1.0] * 12, 0.25) for step in range(4)] == [
        sample_blocks(step, [1.0] * 12, 0.25, seed=0) for step in range(4)
    ]
    with pytest.raises(ValueError, match="schedule must be one of cyclic, strided, random, importance, got 'spiral'"):
        select_blocks(0, 3, 0.5, "spiral")  # type: ignore[arg-type]


def test_cyclic_windows() -> None:
    assert [sorted(select_blocks(step, 5, 0.4, "cyclic")) for step in range(4)] == [[0, 1], [2, 3], [0, 4], [1, 2]]


@pytest.mark.parametrize("mode", MODES)
def test_ratio_one_is_full_to_the_bit(model: Any, truth: Any, mode: Any) -> None:
    mebp.LayerCyclicManager(model, ratio=1.0, mode=mode)
    assert_same(step(model), truth[1])


@pytest.mark.parametrize("mode", ["identity", "exact", "freeze"])
def test_only_selected_blocks_get_gradients_and_the_forward_is_exact(model: Any, truth: Any, mode: Any) -> None:
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode)
    loss = model(**batch(), use_cache=False).loss
    assert torch.equal(loss, truth[0])
    loss.backward()
    assert selection.selected == (frozenset({2}) if mode == "freeze" else frozenset({0}))
    for name, grad in our_gradients(model).items():
        inside = any(f".layers.{index}." in name for index in selection.selected)
        assert (grad is not None) == inside
        if inside:
            # Exact where every block above is passed truly; identity leaves out what the blocks above would do.
            assert torch.equal(grad, truth[1][name]) == (mode != "identity")


def test_freeze_always_takes_the_topmost(model: Any) -> None:
    selection = mebp.LayerCyclicManager(model, ratio=2 / 3, mode="freeze")
    for _ in range(4):
        assert selection.selected == frozenset({1, 2})
        selection.advance()


def test_on_plain_transformers_and_peft_models(store: Any) -> None:
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    for model in (decoded_model(store).requires_grad_(True), peft.get_peft_model(decoded_model(store), config)):
        selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="exact")
        selection.advance()
        model(**batch()).loss.backward()
        blocks = {index: {p.grad is not None for p in selection.engine.trainable(index)} for index in range(3)}
        assert blocks == {0: {False}, 1: {True}, 2: {False}}
        model.zero_grad()
        selection.remove()
        model(**batch()).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and ".layers." in n)


def test_state_goes_on_where_it_was(model: Any) -> None:
    options: dict[str, Any] = {"ratio": 1 / 3, "mode": "exact", "schedule": "random", "seed": 4}
    first = mebp.LayerCyclicManager(model, **options)
    for _ in range(5):
        first.advance()
    state, later = first.state_dict(), []
    for _ in range(6):
        later.append(first.selected)
        first.advance()
    first.remove()
    second = mebp.LayerCyclicManager(model, **options)
    second.load_state_dict(state)
    for selected in later:
        assert second.selected == selected
        second.advance()
    with pytest.raises(ValueError, match="of 2 blocks, this one of 3"):
        second.load_state_dict(state | {"norms": [None] * 2})
    for key, other in (("mode", "freeze"), ("ratio", 0.5), ("schedule", "cyclic"), ("seed", 5)):
        with pytest.raises(ValueError, match=f"the saved selection has {key} {other!r}, this one {options[key]!r}"):
            second.load_state_dict(state | {key: other})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "half"}, "mode must be one of full, identity, exact, freeze, got 'half'"),
        ({"schedule": "spiral"}, "selection schedule must be one of cyclic, strided, random, importance, got 'spiral'"),
        ({"schedule": "spiral", "mode": "freeze"}, "selection schedule must be one of"),
        ({"ratio": 0}, r"\(0, 1\], got 0"),
        ({"ratio": 1.5}, "got 1.5"),
        ({"ratio": float("nan")}, "got nan"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mebp.LayerCyclicManager(torch.nn.Module(), **options)


def test_identity_of_a_real_model_equals_a_detached_residual(store: Any) -> None:
    """Against plain autograd on transformers + PEFT in float64, with the skipped blocks' output detached."""
    model = loaded(store, dtype=torch.float64, adapter_dtype=torch.float64)
    wrapped = peft_model(store, model, torch.float64, r=4, lora_alpha=8)
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="identity")
    for trained in range(3):
        model.zero_grad()
        wrapped.zero_grad()
        model(**batch()).loss.backward()
        hooks = [
            block.register_forward_hook(lambda _, args, out: args[0] + (out - args[0]).detach())
            for index, block in enumerate(wrapped.base_model.model.model.layers)
            if index != trained
        ]
        examples = batch()
        logits = wrapped(input_ids=examples["input_ids"], attention_mask=examples["attention_mask"]).logits
        targets = examples["labels"][:, 1:].reshape(-1)
        torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 97), targets).backward()
        for hook in hooks:
            hook.remove()
        truth = peft_gradients(wrapped)
        for name, grad in our_gradients(model).items():
            inside = f".layers.{trained}." in name
            assert (grad is not None) == inside
            assert not inside or relative_rms(grad, truth[name]) < 1e-9, name
        selection.advance()


@pytest.mark.parametrize("mode", ["identity", "exact", "freeze"])
def test_a_peft_model_alone_has_the_gradients_of_ours(store: Any, model: Any, mode: Any) -> None:
    ours, theirs = model, peft_model(store, model, r=4, lora_alpha=8)
    for model in (ours, theirs):
        selection = mebp.LayerCyclicManager(model, ratio=0.6, mode=mode)
        selection.advance()
        model(**batch()).loss.backward()
    truth = peft_gradients(theirs)
    for name, grad in our_gradients(ours).items():
        assert (grad is None) == (truth[name] is None), name
        assert grad is None or relative_rms(grad, truth[name]) < 1e-5, name


def test_micro_batches_of_a_step_share_a_selection_and_the_next_step_does_not(model: Any) -> None:
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="exact")
    for trained in range(3):
        for seed in (1, 2):
            model(**batch(seed=seed)).loss.backward()
        touched = {name.split(".layers.")[1][0] for name, grad in our_gradients(model).items() if grad is not None}
        assert touched == {str(trained)}
        model.zero_grad()
        selection.advance()


def test_removed_it_trains_every_block_and_keeps_our_engine(model: Any) -> None:
    model.mebp.engine.counters.pop_counts()
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3)
    selection.remove()
    model(**batch()).loss.backward()
    assert all(grad is not None for grad in our_gradients(model).values())
    assert model.mebp.engine.counters.recompute == 3


def test_one_selection_at_a_time(model: Any) -> None:
    first = mebp.LayerCyclicManager(model, ratio=1 / 3)
    with pytest.raises(ValueError, match="has a selection already"):
        mebp.LayerCyclicManager(model, ratio=1 / 3)
    first.remove()
    second = mebp.LayerCyclicManager(model, ratio=1 / 3)
    first.remove()  # that of another is left alone
    assert [model.mebp.engine.treatment(index) for index in range(3)].count("train") == len(second.selected) == 1
