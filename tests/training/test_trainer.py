"""The training loop: it learns, takes the steps of a plain loop, stops when told, and skips broken steps or ends."""

import dataclasses
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import peft_model, randomize_adapter
from runs import (
    DEMANDING,
    NUMBERS,
    Crash,
    adapter_of,
    assert_same_tensors,
    checkpoint_tensors,
    crash_at,
    metrics,
    resumed,
    text_data,
    trainer,
)

from mebp_triton.data.batching import batches, collate
from mebp_triton.data.packing import pack
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.store.pages import Pages
from mebp_triton.system import atomic
from mebp_triton.system.errors import RunError
from mebp_triton.training.finetune import finetune
from mebp_triton.training.optimizers.schedules import learning_rate
from mebp_triton.training.trainer import MOST_SKIPPED

# --- it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "identity", "exact", "freeze"])
def test_training_lowers_the_loss(store, data, tmp_path, mode):
    made = trainer(store, data, tmp_path / "run", max_steps=20, selection_mode=mode, learning_rate=2e-2)
    losses = [result.loss for result in made.train()]
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.7


def test_it_takes_the_steps_of_transformers_peft_and_torch(store, data, tmp_path):
    """The same batches, schedule, clipping and decay by a plain loop; the decoded weights under PEFT's layers."""
    made = trainer(
        store,
        data,
        tmp_path / "run",
        max_steps=6,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        warmup_steps=1,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        max_grad_norm=0.5,
        learning_rate=1e-2,
    )
    randomize_adapter(made.model)
    wrapped = peft_model(store, made.model, r=4, lora_alpha=8.0)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    stream = batches(data, 2, made.config.seed)
    for result in made.train():
        micro = [collate(next(stream), 0) for _ in range(2)]
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
        losses = [wrapped(**b).loss * int((b["labels"][:, 1:] != -100).sum()) / tokens for b in micro]
        sum(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(result.step, 1e-2, "cosine", 1, 6)
        optimizer.step()
        optimizer.zero_grad()
        assert result.tokens == tokens
        assert result.loss == pytest.approx(float(sum(losses)), rel=1e-5)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    theirs = {name.replace(".default.weight", ".weight"): p for name, p in wrapped.named_parameters()}
    for name, ours in adapter_of(made).items():
        torch.testing.assert_close(ours, theirs[name].detach(), rtol=1e-3, atol=2e-5)


def test_epochs_become_steps(store, data, tmp_path):
    made = trainer(
        store, data, tmp_path / "run", num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    per_epoch = -(-len(data) // 2)
    assert made.total_steps == -(-3 * per_epoch // 2)
    assert trainer(store, data, tmp_path / "other", max_steps=5, num_train_epochs=3).total_steps == 5


def test_metrics_have_a_line_per_step_with_the_schedules_rate(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=5, warmup_steps=2, selection_mode="exact")
    results = made.train()
    rows = [json.loads(line) for line in made.run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row, result in zip(rows, results, strict=True):
        assert {key: row[key] for key in dataclasses.asdict(result)} == dataclasses.asdict(result)
        assert row["learning_rate"] == learning_rate(row["step"], 5e-3, "linear", 2, 5)
        assert row["peak_rss_bytes"] > 1 << 20 and row["seconds"] > 0 and not row["skipped"]
    assert [row["selected_blocks"] for row in rows] == [[0, 1], [0, 2], [1, 2], [0, 1], [0, 2]]


@pytest.mark.parametrize(
    "change", [{"lora_dropout": 0.0}, {"selection_schedule": "cyclic"}, {"seed": 1}, {"warmup_steps": 0}], ids=str
)
def test_every_demanding_setting_matters(store, data, straight, tmp_path, change):
    """Otherwise runs that should be the same could be, for want of anything that makes them differ."""
    made = trainer(store, data, tmp_path / "run", **(DEMANDING | change))
    with pytest.raises(Crash):
        made.train(crash_at(4))
    assert metrics(made, "loss") != metrics(straight, "loss")[:4]


def test_the_padding_token_does_not_matter(store, data, tmp_path):
    losses = []
    for pad in (0, 5):
        made = trainer(store, data, tmp_path / str(pad), max_steps=3, per_device_train_batch_size=3)
        made.pad_token_id = pad
        losses.append([replace(result, seconds=0) for result in made.train()])
    assert losses[0] == losses[1]


def test_packing_a_model_that_would_leak_writes_nothing(shared_store, tmp_path):
    with pytest.raises(ValueError, match="train models of type opt without packing"):
        trainer(shared_store("opt"), pack(text_data(tmp_path), 24), tmp_path / "run", packing=True)
    assert not any((tmp_path / "run").iterdir())


# --- it stops, and goes on ------------------------------------------------------------------------------------------


def test_a_run_that_is_told_to_stop_writes_a_checkpoint_and_goes_on_from_there(store, data, straight, tmp_path):
    """After the third step, which no checkpoint was due at, and after the fourth, where one was."""
    output, told = tmp_path / "run", []
    made = trainer(store, data, output, **DEMANDING)
    assert len(made.train(told.append, lambda: 15 * (len(told) == 3))) == 3
    assert made.stopped == 15 and made.step == 3 and (output / "adapter" / "adapter_config.json").exists()
    again = resumed(store, data, output, **DEMANDING)
    assert finetune(again, None, should_stop=lambda: 2) is None
    assert again.stopped == 2 and again.step == 4 and not again.run.record.exists()
    last = resumed(store, data, output, **DEMANDING)
    last.train()
    assert metrics(last, *NUMBERS) == metrics(straight, *NUMBERS) and last.stopped == 0
    assert_same_tensors(checkpoint_tensors(last.run.checkpoint), checkpoint_tensors(straight.run.checkpoint))


def test_a_run_resumed_at_its_end_does_nothing(store, data, straight):
    before = checkpoint_tensors(straight.run.checkpoint)
    made = resumed(store, data, straight.run.directory, **DEMANDING)
    assert made.train() == []
    assert_same_tensors(checkpoint_tensors(straight.run.checkpoint), before)
    assert len(made.run.read_metrics()) == 8


def test_another_process_that_writes_into_the_run_is_named(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", **DEMANDING)
    with atomic.locked(tmp_path / "run"), pytest.raises(ValueError, match="run is in use by another process"):
        made.train()
    assert made.run.read_metrics() == [] and made.step == 0


def test_a_used_run_directory_is_refused(store, data, straight):
    with pytest.raises(ValueError, match="exists already"):
        trainer(store, data, straight.run.directory, **DEMANDING)


def test_a_run_leaves_nothing_but_its_files(straight):
    names = sorted(path.name for path in straight.run.directory.iterdir())
    assert names == ["adapter", "checkpoint", "metrics.jsonl"]
    optimizer = [f"optimizer-{index:05d}.safetensors" for index in range(3)]
    names = sorted(path.name for path in straight.run.checkpoint.iterdir())
    assert names == [*optimizer, "state.json", "state.safetensors"]
    assert not straight.model.training


# --- steps that cannot be taken -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw", "mezo"])
def test_a_step_with_every_label_masked_is_skipped(store, data, tmp_path, optim):
    blank = TokenizedData(data.ids, np.zeros_like(data.trained), data.offsets, data.report)
    made = trainer(store, blank, tmp_path / "run", max_steps=2, weight_decay=0.5, optim=optim)
    randomize_adapter(made.model)
    before = adapter_of(made)
    results = made.train()
    assert [(r.skipped, r.loss, r.tokens, r.grad_norm) for r in results] == [(True, 0.0, 0, None)] * 2
    assert_same_tensors(adapter_of(made), before)
    if optim == "adamw":
        assert not any(step for steps in made.update.optimizer.steps for step in steps)
    assert made.step == 2 and len(made.run.read_metrics()) == 2


def test_rows_of_two_tokens(store, tmp_path):
    made = trainer(store, text_data(tmp_path, max_length=2), tmp_path / "run", max_steps=3)
    assert [result.tokens for result in made.train()] == [1, 1, 1]


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "mezo"])
def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_checkpoint(store, data, tmp_path, optim):
    settings = {"max_steps": 6, "save_steps": 2, "optim": optim}
    made = trainer(store, data, tmp_path / "run", **settings)

    def spoil(result):
        if result.step == 2:
            with torch.no_grad():
                made.parameters[0].fill_(float("nan"))

    with pytest.raises(RunError, match="loss is nan at step 3") as caught:
        made.train(spoil)
    assert "\n" not in str(caught.value)
    assert json.loads((made.run.checkpoint / "state.json").read_text())["step"] == 2
    saved = checkpoint_tensors(made.run.checkpoint)
    assert all(torch.isfinite(tensor).all() for name, tensor in saved.items() if name.startswith("state/adapter"))
    assert [row["step"] for row in made.run.read_metrics()] == [0, 1, 2]
    assert len(resumed(store, data, tmp_path / "run", **settings).train()) == 4


def spoil_gradients(made, steps):
    """At those steps the gradient of block 1's down projection becomes NaN; block 0 gets its own from it."""
    passes = made.update.passes
    named = made.model.named_parameters()
    spoiled = next(p for name, p in named if "layers.1.mlp.down_proj" in name and "lora_B" in name)
    original = passes.forward_and_backward

    def forward_and_backward(inputs):
        numbers = original(inputs)
        if inputs.step in steps:
            for parameter in (*made.model.mebp.engine.trainable(0), spoiled):
                parameter.grad = torch.full_like(parameter, math.nan)
        return numbers

    passes.forward_and_backward = forward_and_backward


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=2)
    before = adapter_of(made)
    spoil_gradients(made, {0})
    with pytest.raises(RunError, match=r"gradient norm is nan at step 0, first .*down_proj.*lora_B.* \(block 1\): low"):
        made.train()
    assert_same_tensors(adapter_of(made), before)
    assert not made.run.checkpoint.exists() and made.run.read_metrics() == []


def test_a_run_stopped_by_a_gradient_goes_on_from_before_that_step(store, data, straight, tmp_path):
    """To the bit, dropout and selection included, as if nothing had been."""
    made = trainer(store, data, tmp_path / "run", **DEMANDING)
    spoil_gradients(made, {6})
    with pytest.raises(RunError, match="gradient norm is nan at step 6") as caught:
        made.train()
    assert f"the state before this step is in {made.run.checkpoint}" in str(caught.value)
    again = resumed(store, data, tmp_path / "run", **DEMANDING)
    assert again.step == 6, "checkpoints are written every fourth step"
    again.train()
    assert_same_tensors(checkpoint_tensors(again.run.checkpoint), checkpoint_tensors(straight.run.checkpoint))


@pytest.mark.parametrize("residency", ["file", "device"])
def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(store, data, tmp_path, residency):
    made = trainer(store, data, tmp_path / "run", max_steps=6, on_nan="skip", optimizer_state=residency)
    spoil_gradients(made, {2, 4})
    states = []

    def keep(result):
        state = {name: tensor.clone() for name, tensor in made.update.optimizer.export_state().items()}
        states.append(adapter_of(made) | state)

    made.train(keep)
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(states, states[1:], strict=False)]
    assert changed == [True, False, True, False, True]
    rows = made.run.read_metrics()
    assert [row["skipped"] for row in rows] == [False, False, True, False, True, False]
    assert rows[2]["loss"] is None and "layers.1.mlp.down_proj" in rows[2]["not_finite"]
    assert rows[3]["not_finite"] is None and math.isfinite(rows[5]["loss"])


def test_skipping_comes_to_an_end_and_its_count_goes_on_when_resumed(store, data, tmp_path):
    settings = {"max_steps": 40, "on_nan": "skip", "save_steps": 5}
    made = trainer(store, data, tmp_path / "run", **settings)
    spoil_gradients(made, range(3, 40))
    with pytest.raises(Crash):
        made.train(crash_at(7))
    again = resumed(store, data, tmp_path / "run", **settings)
    assert again.step == 5 and again.position.skipped_in_a_row == 2
    spoil_gradients(again, range(3, 40))
    with pytest.raises(RunError, match=f"gradient norm is nan at step {3 + MOST_SKIPPED}"):
        again.train()


def test_what_is_skipped_in_a_row_is_counted_anew_after_a_good_step(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=16, on_nan="skip", save_steps=100)
    spoil_gradients(made, {*range(1, 7), *range(8, 15)})
    assert sum(result.skipped for result in made.train()) > MOST_SKIPPED


# --- where things lie, and what is left out -------------------------------------------------------------------------


def test_every_residency_gives_the_same_losses_bit_for_bit(store, data, tmp_path):
    seen = []
    for number, places in enumerate(
        [("device", "device", "device"), ("file", "host", "host"), ("host", "file", "file"), ("file", "file", "device")]
    ):
        chosen = dict(zip(("weights", "checkpoints", "optimizer_state"), places, strict=True))
        chosen["join_micro_batches"] = True  # by default it depends on where weights lie, and draws other dropout masks
        made = trainer(store, data, tmp_path / str(number), **DEMANDING | {"max_steps": 3}, **chosen)
        made.train()
        seen.append((metrics(made, "loss", "grad_norm"), checkpoint_tensors(made.run.checkpoint)))
    for losses, tensors in seen[1:]:
        assert losses == seen[0][0]
        assert_same_tensors(tensors, seen[0][1])


@pytest.mark.parametrize(
    ("mode", "recomputed", "passed", "kept"),
    [("full", 3, 0, 3), ("identity", 1, 1, 1), ("exact", 2, 0, 2), ("freeze", 1, 0, 1)],
)
def test_the_counters_of_a_step_show_what_was_skipped(store, data, tmp_path, mode, recomputed, passed, kept):
    """Counts one step with one of three blocks selected: the middle one, but for "freeze"."""
    made = trainer(store, data, tmp_path / "run", max_steps=2, selection_mode=mode, selected_ratio=0.34)
    engine = made.model.mebp.engine
    entered: list[int] = []
    engine.pages = [Noted(pages, index, entered) for index, pages in enumerate(engine.pages)]
    made.train(lambda result: result.step == 0 and entered.clear())
    row = made.run.read_metrics()[1]
    assert row["selected_blocks"] == {"full": [0, 1, 2], "freeze": [2]}.get(mode, [1])
    names = ("blocks_forward", "blocks_recompute", "blocks_identity", "blocks_checkpoint")
    assert tuple(row[name] for name in names) == (3, recomputed, passed, kept)
    again = {"full": [2, 1, 0], "identity": [1], "exact": [2, 1], "freeze": [2]}[mode]
    assert entered == [0, 1, 2, *again], "what is not recomputed is not read"


class Noted(Pages):
    """Pages that note when they are entered."""

    def __init__(self, pages, index, entered):
        self.pages, self.index, self.entered = pages, index, entered

    def __enter__(self):
        self.entered.append(self.index)
        self.pages.__enter__()

    def __exit__(self, *error):
        self.pages.__exit__(*error)

    def prefetch(self):
        self.pages.prefetch()
