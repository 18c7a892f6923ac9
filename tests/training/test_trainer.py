"""Whole runs on a tiny model: they learn, they resume to the same bits, and they fail without spoiling anything."""

import dataclasses
import json
import math
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from models import peft_model, randomize_adapter
from runs import run_store, sentences, text_data, trainer, word_tokenizer

from mebp_triton.data.batching import batches, collate
from mebp_triton.data.loading import load_data
from mebp_triton.data.packing import pack
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.models.adapter import adapter_tensors, save_adapter
from mebp_triton.store.manifest import accept_companions
from mebp_triton.store.pages import Pages
from mebp_triton.system import atomic, strict_json, temporaries
from mebp_triton.system.errors import RunError
from mebp_triton.training.finetune import finetune
from mebp_triton.training.optimizers.schedules import learning_rate

# Whatever could make a resumed run differ: dropout, accumulation, a random selection, data of several epochs.
DEMANDING = {
    "max_steps": 8,
    "lora_dropout": 0.2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "selection_mode": "identity",
    "selection_schedule": "random",
    "selected_ratio": 0.34,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.05,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return run_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return text_data(tmp_path_factory.mktemp("data"))


def tensors_of(checkpoint):
    """Of all files of a checkpoint."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found |= {f"{path.stem}/{name}": tensor for name, tensor in safetensors.torch.load_file(path).items()}
    return found


def metrics(made, *names):
    rows = made.run.read_metrics()
    return [tuple(row[name] for name in names) for row in rows]


def adapter_of(made):
    return {name: tensor.clone() for name, tensor in adapter_tensors(made.model).items()}


class Crash(BaseException):
    """As if the process were killed."""


def crash_at(step):
    def on_step(result):
        if result.step == step:
            raise Crash

    return on_step


# --- it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "identity", "exact", "freeze"])
def test_training_lowers_the_loss(store, data, tmp_path, mode):
    made = trainer(store, data, tmp_path / "run", max_steps=40, selection_mode=mode, learning_rate=1e-2)
    losses = [result.loss for result in made.train()]
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.7


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


# --- it resumes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(store, data, tmp_path_factory):
    """Eight steps in one go."""
    made = trainer(store, data, tmp_path_factory.mktemp("straight") / "run", **DEMANDING)
    made.train()
    return made


@pytest.fixture(scope="module")
def interrupted(store, data, tmp_path_factory):
    """A run directory whose process died in the sixth step, with a checkpoint after the fourth."""
    output = tmp_path_factory.mktemp("interrupted") / "run"
    made = trainer(store, data, output, **DEMANDING)
    with pytest.raises(Crash):
        made.train(crash_at(5))
    with open(made.run.metrics, "a") as file:
        file.write('{"step": 6, "lo')
    return output


def test_the_data_lasts_several_epochs(data):
    assert 2 * len(data) < 8 * 2 * 2, "otherwise resuming across epochs is not tried"


@pytest.mark.parametrize("residency", ["file", "host", "device"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(store, data, straight, interrupted, tmp_path, residency):
    output = tmp_path / "run"
    shutil.copytree(interrupted, output)
    places = dict.fromkeys(("weights", "checkpoints", "optimizer_state"), residency)
    torch.manual_seed(12345)  # a new process has another random state
    made = trainer(store, data, output, resume=True, **DEMANDING, **places)
    made.resume(made.run.checkpoint)
    assert made.step == 4 and made.selection.step == 4
    assert [row["step"] for row in made.run.read_metrics()] == [0, 1, 2, 3]
    made.train()
    names = ("step", "loss", "token_accuracy", "tokens", "grad_norm", "learning_rate", "selected_blocks", "skipped")
    assert metrics(made, *names) == metrics(straight, *names)
    ours, theirs = tensors_of(made.run.checkpoint), tensors_of(straight.run.checkpoint)
    assert ours.keys() == theirs.keys()
    rooms = {"/".join(name.split("/")[:2]) for name in ours if not name.startswith("optimizer")}
    assert rooms == {"state/adapter", "state/random"} and "optimizer-00002/moments" in ours
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert any(tensor.any() for name, tensor in ours.items() if "lora_B" in name)


def test_a_resumed_run_with_moments_in_eight_bits_equals_an_uninterrupted_one(store, data, straight, tmp_path):
    settings = DEMANDING | {"optim": "adamw_8bit"}
    whole = trainer(store, data, tmp_path / "whole", **settings)
    whole.train()
    assert metrics(whole, "loss")[:2] == metrics(straight, "loss")[:2]
    assert metrics(whole, "loss")[-1] == pytest.approx(metrics(straight, "loss")[-1], rel=1e-2)
    assert metrics(whole, "loss") != metrics(straight, "loss")
    made = trainer(store, data, tmp_path / "run", **settings)
    with pytest.raises(Crash):
        made.train(crash_at(5))
    again = trainer(store, data, tmp_path / "run", resume=True, **settings)
    again.resume(again.run.checkpoint)
    again.train()
    ours, theirs = tensors_of(again.run.checkpoint), tensors_of(whole.run.checkpoint)
    assert ours["optimizer-00002/moments"].dtype == torch.uint8
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(again, "loss") == metrics(whole, "loss")


def test_a_packed_run_from_a_file_resumes_to_the_numbers_of_one_in_memory(store, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": sentences(count % 3 + 1, count).strip()}) + "\n" for count in range(22))
    )
    settings = DEMANDING | {"packing": True}

    def rows_in(scratch):
        return pack(load_data(tmp_path / "rows.jsonl", word_tokenizer(), 24, scratch=scratch), 24)

    data = rows_in(None)
    assert 2 * len(data) < 8 * 2 * 2 and len(data) < 22
    whole = trainer(store, data, tmp_path / "whole", **settings)
    whole.train()
    made = trainer(store, rows_in(tmp_path), tmp_path / "run", **settings)
    with pytest.raises(Crash):
        made.train(crash_at(5))
    again = trainer(store, rows_in(tmp_path), tmp_path / "run", resume=True, **settings)
    again.resume(again.run.checkpoint)
    again.train()
    names = ("step", "loss", "token_accuracy", "tokens", "grad_norm", "selected_blocks")
    assert metrics(again, *names) == metrics(whole, *names)
    ours, theirs = tensors_of(again.run.checkpoint), tensors_of(whole.run.checkpoint)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert sum(result["tokens"] for result in again.run.read_metrics()) > 0
    with pytest.raises(ValueError, match="the training data changed"):
        other = pack(load_data(tmp_path / "rows.jsonl", word_tokenizer(), 24), 48)
        trainer(store, other, tmp_path / "run", resume=True, **settings).resume(again.run.checkpoint)


def test_packing_a_model_that_would_leak_writes_nothing(tmp_path):
    leaking = run_store(tmp_path / "opt", "opt")
    with pytest.raises(ValueError, match="train models of type opt without packing"):
        trainer(leaking, pack(text_data(tmp_path), 24), tmp_path / "run", packing=True)
    assert not any((tmp_path / "run").iterdir())


def test_dropout_and_selection_really_matter_to_that_comparison(store, data, straight, tmp_path):
    for change in ({"lora_dropout": 0.0}, {"selection_schedule": "cyclic"}, {"seed": 1}, {"warmup_steps": 0}):
        made = trainer(store, data, tmp_path / str(next(iter(change))), **(DEMANDING | change))
        made.train()
        assert metrics(made, "loss") != metrics(straight, "loss"), change


def test_a_run_resumed_at_its_end_does_nothing(store, data, straight):
    before = tensors_of(straight.run.checkpoint)
    made = trainer(store, data, straight.run.directory, resume=True, **DEMANDING)
    made.resume(made.run.checkpoint)
    assert made.train() == []
    after = tensors_of(straight.run.checkpoint)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(made.run.read_metrics()) == 8


def test_a_run_that_is_told_to_stop_writes_a_checkpoint_and_goes_on_from_there(store, data, straight, tmp_path):
    """After the third step, which no checkpoint was due at, and after the fourth, where one was."""
    output, told = tmp_path / "run", []
    made = trainer(store, data, output, **DEMANDING)
    assert len(made.train(told.append, lambda: 15 * (len(told) == 3))) == 3
    assert made.stopped == 15 and made.step == 3 and (output / "adapter" / "adapter_config.json").exists()
    again = trainer(store, data, output, resume=True, **DEMANDING)
    again.resume(again.run.checkpoint)
    assert finetune(again, None, should_stop=lambda: 2) is None
    assert again.stopped == 2 and again.step == 4 and not again.run.record.exists()
    last = trainer(store, data, output, resume=True, **DEMANDING)
    last.resume(last.run.checkpoint)
    last.train()
    names = ("step", "loss", "token_accuracy", "tokens", "grad_norm", "learning_rate", "selected_blocks", "skipped")
    assert metrics(last, *names) == metrics(straight, *names) and last.stopped == 0
    theirs = tensors_of(straight.run.checkpoint)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors_of(last.run.checkpoint).items())


def test_a_run_that_died_between_its_last_checkpoint_and_its_adapter(store, data, straight, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight.run.directory, output)
    whole = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(output / "adapter")
    made = trainer(store, data, output, resume=True, **DEMANDING)
    made.resume(made.run.checkpoint)
    summary = finetune(made, None)
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert summary["train_loss_last"] == straight.run.read_metrics()[-1]["loss"]


def test_another_process_that_writes_into_the_run_is_named(store, data, interrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(interrupted, output)
    made = trainer(store, data, output, resume=True, **DEMANDING)
    made.resume(made.run.checkpoint)
    before = made.run.read_metrics()
    with atomic.locked(output), pytest.raises(ValueError, match="run is in use by another process"):
        made.train()
    assert made.run.read_metrics() == before and made.step == 4


def test_a_checkpoint_between_two_renames_is_found_again(store, data, interrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(interrupted, output)
    (output / "checkpoint").rename(output / ".mebp-old-checkpoint")
    made = trainer(store, data, output, resume=True, **DEMANDING)
    made.resume(made.run.checkpoint)
    assert made.step == 4


CHANGES = [
    ("learning_rate", 1e-3),
    ("lora_alpha", 4.0),
    ("lora_r", 8),
    ("seed", 7),
    ("max_steps", 9),
    ("gradient_accumulation_steps", 1),
    ("per_device_train_batch_size", 1),
    ("selection_mode", "exact"),
    ("selected_ratio", 0.67),
    ("unselected_update", "none"),
    ("lr_scheduler_type", "linear"),
    ("weight_decay", 0.0),
    ("lora_dropout", 0.1),
    ("optim", "mezo"),
    ("optim", "adamw_8bit"),
    ("max_grad_norm", 2.0),
    ("max_length", 20),
    ("dtype", "bfloat16"),
    ("packing", True),
    ("completion_only_loss", False),
    ("assistant_only_loss", True),
]


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_resuming_with_another_setting_is_refused(store, data, interrupted, name, value):
    settings = DEMANDING | {name: value}
    if name == "optim":
        settings["selection_mode"] = "full"
    made = trainer(store, data, interrupted, resume=True, **settings)
    with pytest.raises(ValueError, match="cannot resume: (" + name + "|selection_mode) was .* and now is"):
        made.resume(made.run.checkpoint)
    assert made.step == 0


def test_what_may_change_may_change(store, data, interrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(interrupted, output)
    free = {"save_steps": 3, "validation_file": "v.txt", "max_eval_windows": 2, "backend": "panel", "weights": "host"}
    made = trainer(store, data, output, resume=True, **(DEMANDING | free))
    made.resume(made.run.checkpoint)
    assert made.step == 4


def test_resuming_on_other_data_is_refused(store, data, interrupted, tmp_path):
    other = text_data(tmp_path, seed=1)
    made = trainer(store, other, interrupted, resume=True, **DEMANDING)
    with pytest.raises(ValueError, match="cannot resume: the training data changed"):
        made.resume(made.run.checkpoint)
    ids = data.ids.copy()
    ids[len(ids) // 2] += 1  # one token
    made = trainer(
        store, TokenizedData(ids, data.trained, data.offsets, data.report), interrupted, resume=True, **DEMANDING
    )
    with pytest.raises(ValueError, match="cannot resume: the training data changed"):
        made.resume(made.run.checkpoint)


def test_resuming_on_another_model_is_refused(data, interrupted, tmp_path):
    made = trainer(run_store(tmp_path, seed=5), data, interrupted, resume=True, **DEMANDING)
    with pytest.raises(ValueError, match="cannot resume: the model changed"):
        made.resume(made.run.checkpoint)


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit(change):
    def damage(checkpoint):
        state = json.loads((checkpoint / "state.json").read_text())
        changed = change(state)
        made = state if changed is None else changed
        (checkpoint / "state.json").write_text(json.dumps(strict_json.sealed(made) if isinstance(made, dict) else made))

    return damage


DAMAGE = {
    "a flipped bit": lambda c: flip(c / "state.safetensors"),
    "a flipped bit in the header": lambda c: flip(c / "state.safetensors", 30),
    "cut short": lambda c: (c / "state.safetensors").write_bytes((c / "state.safetensors").read_bytes()[:-7]),
    "empty": lambda c: (c / "state.safetensors").write_bytes(b""),
    "a flipped bit in the optimizer's state": lambda c: flip(c / "optimizer-00001.safetensors"),
    "a file of the optimizer's state is missing": lambda c: (c / "optimizer-00001.safetensors").unlink(),
    "no checksum of a file": edit(lambda state: state["crc32"].pop("optimizer-00001.safetensors") and None),
    "no tensors": lambda c: (c / "state.safetensors").unlink(),
    "no state": lambda c: (c / "state.json").unlink(),
    "state is no JSON": lambda c: (c / "state.json").write_text('{"step": 4'),
    "state is a list": edit(lambda state: [state]),
    "no step": edit(lambda state: state.pop("step") and None),
    "a step past the end": edit(lambda state: state.update(step=99)),
    "a negative step": edit(lambda state: state.update(step=-1)),
    "a step as text": edit(lambda state: state.update(step="4")),
    "no checksums": edit(lambda state: state.pop("crc32") and None),
    "no settings": edit(lambda state: state.pop("config") and None),
    "an unknown setting": edit(lambda state: state["config"].update(color="red")),
    "no selection": edit(lambda state: state.pop("selection") and None),
    "no fingerprints": edit(lambda state: state.pop("fingerprints") and None),
    "nothing at all": shutil.rmtree,
    "another step, and the seal of this one": lambda c: (c / "state.json").write_text(
        (c / "state.json").read_text().replace('"step": 4', '"step": 3')
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(store, data, interrupted, tmp_path, name):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(interrupted / "checkpoint", checkpoint)
    DAMAGE[name](checkpoint)
    made = trainer(store, data, tmp_path / "run", **DEMANDING)
    before = adapter_of(made)
    with pytest.raises(ValueError) as caught:
        made.resume(checkpoint)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    after = adapter_of(made)
    assert all(torch.equal(after[tensor], before[tensor]) for tensor in before) and made.step == 0


def test_a_setting_newer_than_the_checkpoint_had_its_default_then(store, data, interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    edit(lambda state: state["config"].__delitem__("optimizer_in_backward"))(tmp_path / "run" / "checkpoint")
    made = trainer(store, data, tmp_path / "run", resume=True, **DEMANDING)
    made.resume(made.run.checkpoint)
    settings = DEMANDING | {"optimizer_in_backward": True, "gradient_accumulation_steps": 1}
    made = trainer(store, data, tmp_path / "run", resume=True, **settings)
    with pytest.raises(ValueError, match="cannot resume: "):
        made.resume(made.run.checkpoint)


@pytest.mark.parametrize("at", range(1, 10))
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(store, data, tmp_path, monkeypatch, at):
    made = trainer(store, data, tmp_path / "run", max_steps=4, save_steps=2)

    def full_disk_at_the_second(result):
        if result.step == 3:
            count = iter(range(1, 100))
            real = os.replace

            def replace(*paths):
                if next(count) == at:
                    raise OSError(28, "No space left on device")
                real(*paths)

            monkeypatch.setattr(os, "replace", replace)

    with pytest.raises(OSError, match="No space"):
        made.train(full_disk_at_the_second)
    monkeypatch.undo()
    again = trainer(store, data, tmp_path / "run", resume=True, max_steps=4, save_steps=2)
    again.resume(again.run.checkpoint)
    # Tensors, three of the optimizer, state, the old one away, the new one in its place; then the adapter's own two.
    assert again.step == (2 if at <= 7 else 4)
    again.train()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(temporaries.TEMPORARY_PREFIX)]


def test_the_saved_adapter_is_the_checkpoints(straight):
    saved = safetensors.torch.load_file(straight.run.adapter / "adapter_model.safetensors")
    state = tensors_of(straight.run.checkpoint)
    assert saved and all(torch.equal(tensor, state[f"state/adapter/{name}"]) for name, tensor in saved.items())


# --- accumulation ---------------------------------------------------------------------------------------------------


def ragged(tmp_path, tokenizer):
    rows = []
    for number in range(12):
        words = " ".join(["the cat sees the moon"] * (1 + number % 4))
        rows.append({"prompt": words, "completion": " and nothing" * (1 + number % 3)})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(path, tokenizer, 48)


def test_accumulation_over_ragged_rows_is_one_big_batch(store, tmp_path):
    """In float64: a division by micro-batches instead of tokens is 1e-2 off."""
    data = ragged(tmp_path, word_tokenizer())
    assert len({len(example.input_ids) for example in data}) > 3
    wide = {"dtype": torch.float64, "adapter_dtype": torch.float64}
    made = []
    for size, accumulated in ((6, 1), (1, 6), (2, 3)):
        made.append(
            trainer(
                store,
                data,
                tmp_path / f"run-{size}",
                max_steps=3,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulated,
                load_options=wide,
            )
        )
        made[-1].train()
    whole = metrics(made[0], "loss", "grad_norm", "tokens", "token_accuracy")
    for other in made[1:]:
        for ours, theirs in zip(metrics(other, "loss", "grad_norm", "tokens", "token_accuracy"), whole, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10)
        for name, tensor in adapter_of(made[0]).items():
            torch.testing.assert_close(adapter_of(other)[name], tensor, rtol=0, atol=1e-9)


# --- steps that cannot be taken -------------------------------------------------------------------------------------


def masked(data, rows):
    """``data`` with nothing to train in these rows."""
    trained = data.trained.copy()
    for row in rows:
        trained[data.offsets[row] : data.offsets[row + 1]] = False
    return TokenizedData(data.ids, trained, data.offsets, data.report)


@pytest.mark.parametrize("optim", ["adamw", "mezo"])
def test_a_step_with_every_label_masked_is_skipped(store, data, tmp_path, optim):
    blank = masked(data, range(len(data)))
    made = trainer(store, blank, tmp_path / "run", max_steps=2, weight_decay=0.5, optim=optim)
    randomize_adapter(made.model)
    before = adapter_of(made)
    results = made.train()
    assert [(r.skipped, r.loss, r.tokens, r.grad_norm) for r in results] == [(True, 0.0, 0, None)] * 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_of(made).items())
    if optim == "adamw":
        assert not any(step for steps in made.update.optimizer.steps for step in steps)
    assert made.step == 2 and len(made.run.read_metrics()) == 2


@pytest.mark.parametrize("mode", ["full", "identity"])
def test_a_masked_micro_batch_changes_nothing(store, data, tmp_path, mode):
    order = [row for row in range(len(data))]
    made = []
    for name, chosen in (("with", masked(data, order[::2])), ("all", data)):
        made.append(
            trainer(
                store,
                chosen,
                tmp_path / name,
                max_steps=6,
                gradient_accumulation_steps=2,
                selection_mode=mode,
                learning_rate=1e-2,
            )
        )
        made[-1].train()
    tokens = [row[0] for row in metrics(made[0], "tokens")]
    assert 0 < sum(tokens) < sum(row[0] for row in metrics(made[1], "tokens"))
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(made[0]).values())
    assert all(math.isfinite(row[0]) for row in metrics(made[0], "loss"))


def test_rows_of_two_tokens(store, data, tmp_path):
    short = text_data(tmp_path, max_length=2)
    made = trainer(store, short, tmp_path / "run", max_steps=3)
    assert [result.tokens for result in made.train()] == [1, 1, 1]


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "mezo"])
def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_checkpoint(store, data, tmp_path, optim):
    made = trainer(store, data, tmp_path / "run", max_steps=6, save_steps=2, optim=optim)

    def spoil(result):
        if result.step == 2:
            with torch.no_grad():
                made.parameters[0].fill_(float("nan"))

    with pytest.raises(RunError, match="loss is nan at step 3") as caught:
        made.train(spoil)
    assert "\n" not in str(caught.value)
    state = json.loads((made.run.checkpoint / "state.json").read_text())
    assert state["step"] == 2
    assert all(torch.isfinite(t).all() for n, t in tensors_of(made.run.checkpoint).items() if n.startswith("adapter"))
    assert [row["step"] for row in made.run.read_metrics()] == [0, 1, 2]
    again = trainer(store, data, tmp_path / "run", resume=True, max_steps=6, save_steps=2, optim=optim)
    again.resume(again.run.checkpoint)
    assert len(again.train()) == 4


def spoiling(made, monkeypatch, steps):
    """At those steps the gradient of block 1's down projection becomes NaN; block 0 gets its own from it."""
    passes, parameter = made.update.passes, spoiled_of(made)
    original = passes.forward_and_backward

    def forward_and_backward(inputs):
        found = original(inputs)
        if made.step in steps:
            for other in (*made.model.mebp.engine.trainable(0), parameter):
                other.grad = torch.full_like(other, math.nan)
        return found

    monkeypatch.setattr(passes, "forward_and_backward", forward_and_backward)


def spoiled_of(made):
    return next(p for n, p in made.model.named_parameters() if "layers.1.mlp.down_proj" in n and "lora_B" in n)


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(store, data, tmp_path, monkeypatch):
    made = trainer(store, data, tmp_path / "run", max_steps=2)
    before = adapter_of(made)
    spoiling(made, monkeypatch, {0})
    with pytest.raises(RunError, match=r"gradient norm is nan at step 0, first .*down_proj.*lora_B.* \(block 1\): low"):
        made.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_of(made).items())
    assert not made.run.checkpoint.exists() and made.run.read_metrics() == []


def test_the_first_output_that_is_not_finite_is_named(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=6, save_steps=100)
    broken = []

    def spoil(result):
        if result.step == 2:
            layer = made.model.get_submodule("model.layers.1.self_attn.o_proj")
            broken.append(layer.register_forward_hook(lambda module, inputs, output: output * math.inf))

    with pytest.raises(
        RunError, match=r"at step 3, first model.layers.1.self_attn.o_proj \(block 1\): lower"
    ) as caught:
        made.train(spoil)
    assert str(made.run.checkpoint) in str(caught.value), "the state before the step was kept"
    assert json.loads((made.run.checkpoint / "state.json").read_text())["step"] == 3


def test_a_run_stopped_by_a_gradient_goes_on_from_before_that_step(store, data, straight, tmp_path, monkeypatch):
    """To the bit, dropout and selection included, as if nothing had been."""
    made = trainer(store, data, tmp_path / "run", **DEMANDING)
    spoiling(made, monkeypatch, {6})
    with pytest.raises(RunError, match="gradient norm is nan at step 6"):
        made.train()
    again = trainer(store, data, tmp_path / "run", resume=True, **DEMANDING)
    again.resume(again.run.checkpoint)
    assert again.step == 6, "checkpoints are written every fourth step"
    again.train()
    ours, theirs = tensors_of(again.run.checkpoint), tensors_of(straight.run.checkpoint)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("residency", ["file", "device"])
def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(store, data, tmp_path, monkeypatch, residency):
    made = trainer(store, data, tmp_path / "run", max_steps=6, on_nan="skip", optimizer_state=residency)
    spoiling(made, monkeypatch, {2, 4})
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


@pytest.mark.parametrize("damage", ["removed", "cut to a line", "a line twice", "without the first"])
def test_metrics_that_are_not_whole_are_told(store, data, tmp_path, damage):
    made = trainer(store, data, tmp_path / "run", max_steps=6, save_steps=4)
    with pytest.raises(Crash):
        made.train(crash_at(4))
    lines = made.run.metrics.read_text().splitlines(keepends=True)
    if damage == "removed":
        made.run.metrics.unlink()
    else:
        left = {"cut to a line": lines[:1], "a line twice": [*lines[:2], *lines[1:4]], "without the first": lines[1:]}
        made.run.metrics.write_text("".join(left[damage]))
    again = trainer(store, data, tmp_path / "run", resume=True, max_steps=6, save_steps=4)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl does not have each step before 4 once"):
        again.resume(again.run.checkpoint)


def gone_on_elsewhere(store, data, root):
    """A run that went on from step 3 of another one, and was interrupted after its checkpoint at 6: its directory."""
    made = trainer(store, data, root / "run", max_steps=8, save_steps=3)
    with pytest.raises(Crash):
        made.train(crash_at(4))
    other = trainer(store, data, root / "other", max_steps=8, save_steps=3)
    other.resume(made.run.checkpoint)
    with pytest.raises(Crash):
        other.train(crash_at(7))
    return other.run


def resumed_elsewhere(store, data, run):
    last = trainer(store, data, run.directory, resume=True, max_steps=8, save_steps=3)
    last.resume(last.run.checkpoint)
    return last


def test_metrics_begin_anew_in_another_directory(store, data, tmp_path, recwarn):
    last = resumed_elsewhere(store, data, gone_on_elsewhere(store, data, tmp_path))
    assert last.step == 6 and [row["step"] for row in last.run.read_metrics()] == [3, 4, 5]
    assert not [str(w.message) for w in recwarn if "metrics" in str(w.message)]


def test_damaged_metrics_after_the_checkpoint_are_no_matter_there_either(store, data, tmp_path):
    run = gone_on_elsewhere(store, data, tmp_path)
    with open(run.metrics, "ab") as metrics:
        metrics.write(b"\0\0\n")
    last = resumed_elsewhere(store, data, run)
    assert [row["step"] for row in last.run.read_metrics()] == [3, 4, 5]


def test_an_adapter_that_is_not_finite_takes_no_checkpoints_place(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=6, save_steps=2)

    def spoil(result):
        if result.step == 3:
            with torch.no_grad():
                made.parameters[0][0, 0] = math.inf

    with pytest.raises(RunError, match=r"lora_A \(block 0\) is not finite after step 4: the last checkpoint is kept"):
        made.train(spoil)
    assert json.loads((made.run.checkpoint / "state.json").read_text())["step"] == 2
    again = trainer(store, data, tmp_path / "run", resume=True, max_steps=6, save_steps=2)
    again.resume(again.run.checkpoint)


def test_another_config_is_another_model(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=6, save_steps=2)
    with pytest.raises(Crash):
        made.train(crash_at(3))
    changed = Path(shutil.copytree(store, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    accept_companions(changed)
    again = trainer(changed, data, tmp_path / "run", resume=True, max_steps=6, save_steps=2)
    with pytest.raises(ValueError, match="cannot resume: the model changed"):
        again.resume(again.run.checkpoint)


def test_the_count_of_skipped_steps_goes_on_when_resumed(store, data, tmp_path, monkeypatch):
    settings = {"max_steps": 40, "on_nan": "skip", "save_steps": 5}
    made = trainer(store, data, tmp_path / "run", **settings)
    spoiling(made, monkeypatch, set(range(3, 40)))
    with pytest.raises(Crash):
        made.train(crash_at(9))
    again = trainer(store, data, tmp_path / "run", resume=True, **settings)
    again.resume(again.run.checkpoint)
    spoiling(again, monkeypatch, set(range(3, 40)))
    with pytest.raises(RunError, match="gradient norm is nan at step 13"):
        again.train()


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


def test_skipping_comes_to_an_end(store, data, tmp_path, monkeypatch):
    made = trainer(store, data, tmp_path / "run", max_steps=40, on_nan="skip")
    spoiling(made, monkeypatch, set(range(3, 40)))
    with pytest.raises(RunError, match="gradient norm is nan at step 13"):
        made.train()


# --- the optimizer in the backward pass -----------------------------------------------------------------------------

WITHIN = DEMANDING | {"gradient_accumulation_steps": 1, "optimizer_in_backward": True, "max_grad_norm": 0.0}


@pytest.mark.parametrize("update", ["momentum", "none"])
@pytest.mark.parametrize("mode", ["full", "identity", "exact", "freeze"])
def test_stepping_in_the_backward_pass_changes_no_bit(store, data, tmp_path, mode, update):
    settings = WITHIN | {"max_steps": 5, "selection_mode": mode, "unselected_update": update}
    made = []
    for within in (True, False):
        made.append(trainer(store, data, tmp_path / str(within), **(settings | {"optimizer_in_backward": within})))
        made[-1].train()
    names = ("step", "loss", "token_accuracy", "tokens", "learning_rate", "selected_blocks")
    assert metrics(made[0], *names) == metrics(made[1], *names)
    for ours, theirs in zip(metrics(made[0], "grad_norm"), metrics(made[1], "grad_norm"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5) and ours[0] > 0
    ours, theirs = (tensors_of(one.run.checkpoint) for one in made)
    assert ours.keys() == theirs.keys()
    rooms = {"/".join(name.split("/")[:2]) for name in ours if not name.startswith("optimizer")}
    assert rooms == {"state/adapter", "state/random"} and "optimizer-00002/moments" in ours
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_resuming_with_the_optimizer_in_the_backward_pass(store, data, tmp_path):
    settings = WITHIN | {"max_grad_norm": 0.3}
    straight = trainer(store, data, tmp_path / "straight", **settings)
    straight.train()
    made = trainer(store, data, tmp_path / "cut", **settings)
    with pytest.raises(Crash):
        made.train(crash_at(5))
    again = trainer(store, data, tmp_path / "cut", resume=True, **settings)
    again.resume(again.run.checkpoint)
    assert again.step == 4
    again.train()
    assert metrics(again, "loss", "grad_norm") == metrics(straight, "loss", "grad_norm")
    ours, theirs = (tensors_of(one.run.checkpoint) for one in (again, straight))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_with_the_optimizer_in_the_backward_pass_each_block_is_clipped_by_its_own_norm(
    store, data, tmp_path, monkeypatch
):
    settings = {"max_steps": 3, "optimizer_in_backward": True, "learning_rate": 1e-2}
    losses, seen = {}, []
    clip = torch.nn.utils.clip_grads_with_norm_

    def noted(parameters, most, total):
        seen.append((len(parameters), most))
        return clip(parameters, most, total)

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", noted)
    for limit in (0.0, 0.05, 1e9):
        made = trainer(store, data, tmp_path / str(limit), max_grad_norm=limit, **settings)
        seen.clear()
        made.train()
        assert seen == [(14, limit or math.inf)] * 9  # three blocks, three steps
        losses[limit] = metrics(made, "loss", "grad_norm")
    assert losses[0.0] == losses[1e9] != losses[0.05]
    assert losses[0.0][0] == losses[0.05][0], "the norm is that before clipping"


def test_a_loss_that_is_not_a_number_ends_the_run_before_any_block_is_stepped(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=6, save_steps=2, optimizer_in_backward=True)
    stepped = []

    def spoil(result):
        if result.step == 2:
            with torch.no_grad():
                made.parameters[0].fill_(float("nan"))
            stepped.append([[float(step) for step in steps] for steps in made.update.optimizer.steps])

    with pytest.raises(RunError, match="loss is nan at step 3"):
        made.train(spoil)
    assert [[float(step) for step in steps] for steps in made.update.optimizer.steps] == stepped[0]
    again = trainer(store, data, tmp_path / "run", resume=True, max_steps=6, save_steps=2, optimizer_in_backward=True)
    again.resume(again.run.checkpoint)
    assert len(again.train()) == 4


def test_a_blocks_gradient_that_is_not_finite_ends_the_run_before_its_step(store, data, tmp_path):
    """Those above it have been stepped by then: the last checkpoint has none of it."""
    made = trainer(store, data, tmp_path / "run", max_steps=2, optimizer_in_backward=True)
    made.model.model.layers[1].mlp.up_proj.lora_A.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(RunError, match=r"norm is (inf|nan) at step 0, first .*1.mlp.up_proj.lora_A \(block 1\): lower"):
        made.train()
    assert [max(map(float, steps)) for steps in made.update.optimizer.steps] == [0, 0, 1]
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(made).values())
    assert not made.run.checkpoint.exists() and made.run.read_metrics() == []


# --- where things lie -----------------------------------------------------------------------------------------------


def test_every_residency_gives_the_same_losses_bit_for_bit(store, data, tmp_path):
    settings = DEMANDING | {"max_steps": 4}
    seen = []
    for number, places in enumerate(
        [("device",) * 3, ("host",) * 3, ("file",) * 3, ("file", "host", "device"), ("host", "file", "host")]
    ):
        chosen = dict(zip(("weights", "checkpoints", "optimizer_state"), places, strict=True))
        made = trainer(store, data, tmp_path / str(number), **settings, **chosen)
        made.train()
        seen.append((metrics(made, "loss", "grad_norm"), tensors_of(made.run.checkpoint)))
    for losses, tensors in seen[1:]:
        assert losses == seen[0][0]
        assert all(torch.equal(tensor, seen[0][1][name]) for name, tensor in tensors.items())


def test_a_run_leaves_nothing_but_its_files(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=2)
    made.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "checkpoint", "metrics.jsonl"]
    optimizer = [f"optimizer-{index:05d}.safetensors" for index in range(3)]
    found = sorted(path.name for path in made.run.checkpoint.iterdir())
    assert found == [*optimizer, "state.json", "state.safetensors"]
    assert not made.model.training


# --- mezo -----------------------------------------------------------------------------------------------------------


def test_mezo_runs_repeats_and_resumes(store, data, tmp_path):
    settings = {"optim": "mezo", "max_steps": 6, "save_steps": 3, "learning_rate": 1e-3, "lora_dropout": 0.1}
    runs = []
    for name in ("one", "two"):
        made = trainer(store, data, tmp_path / name, **settings)
        assert made.update.state_groups == 0
        results = made.train()
        assert all(math.isfinite(r.loss) and r.grad_norm is None and 0 <= r.token_accuracy <= 1 for r in results)
        runs.append((metrics(made, "loss", "token_accuracy"), adapter_of(made)))
    assert runs[0][0] == runs[1][0]
    made = trainer(store, data, tmp_path / "cut", **settings)
    with pytest.raises(Crash):
        made.train(crash_at(4))
    again = trainer(store, data, tmp_path / "cut", resume=True, **settings)
    again.resume(again.run.checkpoint)
    assert again.step == 3
    again.train()
    assert metrics(again, "loss", "token_accuracy") == runs[0][0]
    for name, tensor in adapter_of(again).items():
        assert torch.equal(tensor, runs[0][1][name])
    assert not any(name.startswith("optimizer") for name in tensors_of(again.run.checkpoint))


def test_mezo_draws_other_directions_at_every_step_and_seed(store, data, tmp_path):
    drawn, dropped = [], []
    for seed in (0, 1):
        made = trainer(
            store, data, tmp_path / str(seed), optim="mezo", max_steps=4, lora_dropout=0.1, seed=seed, save_steps=9
        )
        passes = made.update.passes
        original = passes.forward

        def forward(inputs, seed, original=original):
            numbers = original(inputs, seed)
            drawn.append(seed)
            dropped.append(torch.random.get_rng_state().sum().item())
            return numbers

        passes.forward = forward
        made.train()
    assert drawn[0::2] == drawn[1::2] and len(set(drawn)) == 8
    # Both passes of a step drop the same.
    assert dropped[0::2] == dropped[1::2] and len(set(dropped)) == 8


def test_mezo_counts_the_tokens_of_every_micro_batch(store, data, tmp_path):
    seen = []
    for optim in ("adamw", "mezo"):
        made = trainer(
            store,
            data,
            tmp_path / optim,
            optim=optim,
            max_steps=4,
            gradient_accumulation_steps=3,
            learning_rate=1e-12,
            mezo_epsilon=1e-6,
        )
        made.train()
        seen.append([row["token_accuracy"] for row in made.run.read_metrics()])
    assert seen[0] == pytest.approx(seen[1]) and any(seen[0])


def test_mezo_learns_something(store, data, tmp_path):
    made = trainer(
        store, data, tmp_path / "run", optim="mezo", max_steps=150, learning_rate=2e-3, lr_scheduler_type="constant",
        per_device_train_batch_size=4, save_steps=1000,
    )  # fmt: skip
    losses = [result.loss for result in made.train()]
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.02


# --- the whole run --------------------------------------------------------------------------------------------------

PROMISED = {
    "loss_before",
    "loss_after",
    "token_accuracy_before",
    "token_accuracy_after",
    "steps",
    "tokens_per_second",
    "seconds_per_step_median",
    "peak_rss_bytes",
    "peak_rss_anonymous_bytes",
    "peak_device_bytes",
    "planned_peak_bytes",
    "selected_ratio",
    "selection_mode",
    "backend",
}


def test_a_whole_run(store, data, tmp_path):
    held_out = text_data(tmp_path, count=10, seed=9)
    made = trainer(
        store, data, tmp_path / "run", max_steps=12, selection_mode="identity", selected_ratio=0.67, learning_rate=1e-2
    )
    seen = []
    summary = finetune(made, held_out, on_evaluation=lambda done, total: seen.append((done, total)))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record.keys() >= PROMISED
    assert {key: record[key] for key in summary} == summary
    assert record["loss_after"] < record["loss_before"]
    assert 0 <= record["token_accuracy_before"] < record["token_accuracy_after"] <= 1
    assert record["perplexity_after"] == pytest.approx(math.exp(record["loss_after"]))
    assert (record["steps"], record["selected_ratio"], record["selection_mode"]) == (12, 0.67, "identity")
    assert record["backend"] == "panel"  # what ran, not what was asked for
    assert record["peak_device_bytes"] is None
    assert record["peak_rss_bytes"] >= record["peak_rss_anonymous_bytes"] > 1 << 20
    rows = made.run.read_metrics()
    assert record["seconds_per_step_median"] == pytest.approx(float(np.median([row["seconds"] for row in rows])))
    spent = sum(row["tokens"] for row in rows) / record["tokens_per_second"]
    assert spent >= sum(row["seconds"] for row in rows)
    assert record["settings"]["selected_ratio"] == 0.67 and record["settings"]["weights"] == "file"
    assert record["data"]["rows"] == len(data)
    assert {"torch", "python", "mebp-triton", "transformers"} <= record["environment"]["versions"].keys()
    windows = len(held_out)
    assert seen == [(i + 1, windows) for i in range(windows)] * 2
    for name in ("loss.png", "memory.png", "time_per_block.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n"), name
    assert record["plots"] == ["loss.png", "memory.png", "time_per_block.png"]


def test_without_a_validation_file_the_evaluations_are_null(store, data, tmp_path):
    summary = finetune(trainer(store, data, tmp_path / "run", max_steps=1), None)
    assert [summary[f"{what}_{when}"] for what in ("loss", "token_accuracy") for when in ("before", "after")] == [
        None
    ] * 4
    assert summary["selected_ratio"] == 1.0
    assert summary["train_loss_last"] > 0


def test_evaluating_does_not_change_the_training(store, data, tmp_path):
    held_out = text_data(tmp_path, count=10, seed=9)
    made = [trainer(store, data, tmp_path / name, **DEMANDING) for name in ("with", "without")]
    finetune(made[0], held_out)
    finetune(made[1], None)
    assert metrics(made[0], "loss") == metrics(made[1], "loss")


def test_an_adapter_that_could_not_be_written_after_its_checkpoint_is_written_by_resuming(
    store, data, tmp_path, monkeypatch
):
    """The checkpoint of the last step was whole, and ``adapter/`` still that of the one before."""
    made = trainer(store, data, tmp_path / "run", max_steps=4, save_steps=2)

    def full(model, directory):
        if made.step == 4:
            raise OSError(28, "No space left on device")
        save_adapter(model, directory)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("mebp_triton.training.checkpoint.save_adapter", full)
        made.train()
    wanted, weights = adapter_tensors(made.model), made.run.adapter / "adapter_model.safetensors"
    assert not all(torch.equal(tensor, wanted[name]) for name, tensor in safetensors.torch.load_file(weights).items())
    again = trainer(store, data, tmp_path / "run", resume=True, max_steps=4, save_steps=2)
    again.resume(again.run.checkpoint)
    assert again.train() == []
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in safetensors.torch.load_file(weights).items())


def test_a_resumed_run_keeps_the_evaluation_from_before(store, data, tmp_path):
    held_out = text_data(tmp_path, count=10, seed=9)
    whole = finetune(trainer(store, data, tmp_path / "whole", **DEMANDING), held_out)
    made = trainer(store, data, tmp_path / "cut", **DEMANDING)
    with pytest.raises(Crash):
        finetune(made, held_out, on_step=crash_at(5))
    again = trainer(store, data, tmp_path / "cut", resume=True, **DEMANDING)
    again.resume(again.run.checkpoint)
    summary = finetune(again, held_out)
    for key in ("loss_before", "loss_after", "token_accuracy_before", "token_accuracy_after", "steps"):
        assert summary[key] == whole[key], key
    assert summary["resumed_at_step"] == 4 and whole["resumed_at_step"] is None


def test_a_used_run_directory_is_refused(store, data, straight):
    with pytest.raises(ValueError, match="exists already"):
        trainer(store, data, straight.run.directory, **DEMANDING)


def test_the_padding_token_does_not_matter(store, data, tmp_path):
    losses = []
    for pad in (0, 5):
        made = trainer(store, data, tmp_path / str(pad), max_steps=3, per_device_train_batch_size=3)
        made.pad_token_id = pad
        losses.append([replace(result, seconds=0) for result in made.train()])
    assert losses[0] == losses[1]


def test_micro_batches_do_not_wait_for_each_other(store, data, tmp_path):
    """What waits for a backward pass is gone before the next micro-batch's is kept."""
    made = trainer(store, data, tmp_path / "run", max_steps=2, gradient_accumulation_steps=3, checkpoints="device")
    checkpoints, alive, most = made.model.mebp.engine.block_inputs, [], []
    original = checkpoints.save

    def save(tensor):
        checkpoint = original(tensor)
        alive.append(weakref.ref(checkpoint))
        most.append(sum(one() is not None for one in alive))
        return checkpoint

    checkpoints.save = save
    made.train()
    assert len(alive) == 2 * 3 * 3 and max(most) == 3


# --- what is skipped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "recomputed", "passed", "kept"),
    [("full", 3, 0, 3), ("identity", 1, 1, 1), ("exact", 2, 0, 2), ("freeze", 1, 0, 1)],
)
def test_the_counters_of_a_step_show_what_was_skipped(store, data, tmp_path, mode, recomputed, passed, kept):
    """Of one step with one of three blocks selected: the middle one, but for "freeze"."""
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
