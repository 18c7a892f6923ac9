"""The passes of a step: micro-batches add up to one batch, and what is not finite is named where it began."""

import json
import math
import weakref

import pytest
import torch
from graph_plays import Taped, with_graphs
from models import randomize_adapter
from runs import adapter_of, metrics, trainer, word_tokenizer

from mebp_triton.data.batching import collate, valid_tokens
from mebp_triton.data.loading import load_data
from mebp_triton.data.packing import pack
from mebp_triton.system.errors import NotFinite, RunError
from mebp_triton.training.step import StepInputs


def inputs_of(batches, step=0, tokens=None):
    return StepInputs(step, batches, tokens or sum(map(valid_tokens, batches)), 1e-3, [0, 1, 2])


def gradients_of(made):
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


# --- micro-batches --------------------------------------------------------------------------------------------------


def ragged(tmp_path):
    """Rows with prompts and completions of many lengths."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": " ".join(["the cat sees the moon"] * (1 + n % 4)), "completion": " and nothing" * (1 + n % 3)}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(path, word_tokenizer(), 48)


def test_accumulation_over_ragged_rows_is_one_big_batch(store, tmp_path):
    """In float64: a division by micro-batches instead of tokens is 1e-2 off."""
    data = ragged(tmp_path)
    assert len({len(example.input_ids) for example in data}) > 3
    wide = {"dtype": torch.float64, "adapter_dtype": torch.float64}
    made = []
    for size, accumulated in ((6, 1), (1, 6), (2, 3)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        made.append(trainer(store, data, tmp_path / f"run-{size}", max_steps=3, load_options=wide, **sizes))
        made[-1].train()
    names = ("loss", "grad_norm", "tokens", "token_accuracy")
    whole = metrics(made[0], *names)
    for other in made[1:]:
        for ours, theirs in zip(metrics(other, *names), whole, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10)
        for name, tensor in adapter_of(made[0]).items():
            torch.testing.assert_close(adapter_of(other)[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [{"selection_mode": "exact", "selected_ratio": 0.34, "checkpoints": "host"}, {"optim": "mezo"}, {"packing": True}],
)
def test_joined_micro_batches_take_the_same_steps_and_read_weights_once(store, data, tmp_path, settings):
    """Rows are padded, to a few lengths in a step, or packed."""
    rows = pack(data, 24) if settings.get("packing") else ragged(tmp_path)
    wide = {"dtype": torch.float64, "adapter_dtype": torch.float64}
    made = {}
    for joined in (False, True):
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "join_micro_batches": joined}
        output = tmp_path / f"run-{joined}"
        made[joined] = trainer(store, rows, output, max_steps=3, load_options=wide, **sizes, **settings)
        made[joined].train()
        assert made[joined]._joins_micro_batches() == joined
    names = ("loss", "tokens", "token_accuracy")
    for ours, theirs in zip(metrics(made[True], *names), metrics(made[False], *names), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    for name, tensor in adapter_of(made[False]).items():
        torch.testing.assert_close(adapter_of(made[True])[name], tensor, rtol=0, atol=1e-8)
    paged = [sum(count for (count,) in metrics(made[joined], "bytes_paged")) for joined in (True, False)]
    assert 0 < paged[0] < paged[1]
    if settings.get("packing"):  # rows of one length, so each pass reads the weights once
        assert paged[1] == 3 * paged[0]


def test_joined_micro_batches_never_take_more_passes_than_one_by_one(store, tmp_path):
    """Also where no two rows are of like length; an optimizer that steps in the backward pass would step twice."""
    options = {"per_device_train_batch_size": 4, "optimizer_in_backward": True, "join_micro_batches": True}
    made = trainer(store, ragged(tmp_path), tmp_path / "run", max_steps=3, **options)
    made.train()
    assert metrics(made, "blocks_forward", "blocks_recompute") == [(3, 3)] * 3


def test_a_run_whose_blocks_are_graphs_is_the_same_to_the_bit(store, data, tmp_path):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "recompute_granularity": "full"}
    made = [
        trainer(
            store, pack(data, 24), tmp_path / name, max_steps=5, selection_mode="exact", selected_ratio=0.67, **sizes
        )
        for name in ("plain", "graphs")
    ]
    graphs = with_graphs(made[1].model, Taped())
    for one in made:
        assert one._joins_micro_batches()
        one.train()
    assert graphs.played > 20
    names = ("loss", "grad_norm", "bytes_paged", "blocks_recompute")
    assert metrics(made[0], *names) == metrics(made[1], *names)
    for name, tensor in adapter_of(made[0]).items():
        assert torch.equal(adapter_of(made[1])[name], tensor)


def test_weights_are_paged_as_often_as_for_one_micro_batch(store, data, tmp_path):
    paged = []
    for count in (1, 4):
        output = tmp_path / str(count)
        made = trainer(store, data, output, max_steps=2, gradient_accumulation_steps=count)
        made.train()
        paged.append(metrics(made, "bytes_paged", "blocks_forward", "blocks_recompute"))
    assert paged[0] == paged[1] and paged[0][0][0] > 0


def test_a_model_whose_rows_cannot_be_told_apart_takes_its_micro_batches_one_by_one(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=1, gradient_accumulation_steps=2)
    made.model.mebp.engine.row_places = None
    made.train()
    assert metrics(made, "blocks_forward") == [(6,)]


def test_micro_batches_do_not_wait_for_each_other(store, data, tmp_path):
    """What waits for a backward pass is gone before the next micro-batch's is kept, unless they are joined."""
    options = {"gradient_accumulation_steps": 3, "checkpoints": "device", "join_micro_batches": False}
    made = trainer(store, data, tmp_path / "run", max_steps=2, **options)
    waiting, alive, most = made.model.mebp.engine.block_inputs, [], []
    original = waiting.save

    def save(tensor):
        kept = original(tensor)
        alive.append(weakref.ref(kept))
        most.append(sum(one() is not None for one in alive))
        return kept

    waiting.save = save
    made.train()
    assert len(alive) == 2 * 3 * 3 and max(most) == 3


@pytest.mark.parametrize("mode", ["full", "identity"])
def test_a_micro_batch_without_labels_changes_nothing(store, data, tmp_path, mode):
    made = trainer(store, data, tmp_path / "run", max_steps=1, selection_mode=mode)
    randomize_adapter(made.model)
    made.model.train()
    good, masked = (collate([data[place]], 0) for place in (0, 1))
    masked["labels"] = torch.full_like(masked["labels"], -100)
    seen = []
    for batches in ([good], [masked, good, masked]):
        numbers = made.update.passes.forward_and_backward(inputs_of(batches))
        seen.append((numbers, gradients_of(made)))
        made.model.zero_grad()
    assert seen[0][0] == seen[1][0] and math.isfinite(seen[0][0][0])
    assert seen[0][1].keys() == seen[1][1].keys() and any(gradient.any() for gradient in seen[0][1].values())
    assert all(torch.equal(seen[1][1][name], gradient) for name, gradient in seen[0][1].items())


def test_a_step_that_fails_leaves_the_loss_a_mean_again(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=1)
    batch = collate([data[0]], 0)
    mean = made.model(**batch, use_cache=False).loss.item()
    with torch.no_grad():
        made.parameters[0].fill_(math.nan)
    with pytest.raises(NotFinite):
        made.update.passes.forward_and_backward(inputs_of([batch], tokens=1000))
    with torch.no_grad():
        made.parameters[0].fill_(0)
    assert made.model(**batch, use_cache=False).loss.item() == pytest.approx(mean)


def test_a_forward_pass_draws_its_dropout_from_its_seed(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=1, lora_dropout=0.5)
    randomize_adapter(made.model)
    made.model.train()
    inputs = inputs_of([collate([data[0]], 0)])
    one, again, other = (made.update.passes.forward(inputs, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert not gradients_of(made)


# --- what is not finite ---------------------------------------------------------------------------------------------


def test_the_first_output_that_is_not_finite_is_named(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=6, save_steps=100)

    def spoil(result):
        if result.step == 2:
            layer = made.model.get_submodule("model.layers.1.self_attn.o_proj")
            layer.register_forward_hook(lambda module, inputs, output: output * math.inf)

    with pytest.raises(
        RunError, match=r"at step 3, first model.layers.1.self_attn.o_proj \(block 1\): lower"
    ) as caught:
        made.train(spoil)
    assert str(made.run.checkpoint) in str(caught.value), "the state before the step was kept"
    assert json.loads((made.run.checkpoint / "state.json").read_text())["step"] == 3


def test_the_origin_is_looked_for_with_the_numbers_that_the_step_drew(store, data, tmp_path):
    """A layer that breaks at random is named, not one that breaks another time."""
    made = trainer(store, data, tmp_path / "run", max_steps=20, save_steps=100)
    layers = [made.model.get_submodule(f"model.layers.{index}.mlp.down_proj") for index in (0, 2)]
    seen = []

    def maybe(module, inputs, output):
        broken = torch.rand(()) < 0.2
        seen.append((layers.index(module), bool(broken)))
        return output * math.nan if broken else output

    for layer in layers:
        layer.register_forward_hook(maybe)
    with pytest.raises(RunError, match="loss is nan") as caught:
        made.train()
    index = next(index for index, broken in seen if broken)
    assert f"first model.layers.{2 * index}.mlp.down_proj" in str(caught.value)


def test_a_loss_that_is_broken_alone_is_said_to_be(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=1)
    loss = made.model.loss_function
    made.model.loss_function = lambda *args, **kwargs: loss(*args, **kwargs) * math.nan
    with pytest.raises(NotFinite, match="loss is nan at step 7, first in the loss itself$"):
        made.update.passes.forward_and_backward(inputs_of([collate([data[0]], 0)], step=7))


def test_a_norm_that_overflows_is_told_from_a_gradient_that_is_not_finite(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=1)
    passes, parameter = made.update.passes, made.parameters[0]
    passes.check_gradients(1e30, 3)
    parameter.grad = torch.full_like(parameter, 1e38)
    with pytest.raises(NotFinite, match="norm is inf at step 3: every gradient is finite, but the sum"):
        passes.check_gradients(math.inf, 3)
    parameter.grad[0, 0] = math.nan
    with pytest.raises(NotFinite, match=r"norm is nan at step 3, first .*layers\.0\..* \(block 0\)"):
        passes.check_gradients(math.nan, 3)
