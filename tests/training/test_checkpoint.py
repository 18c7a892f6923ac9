"""Checkpoints: a resumed run ends at the same bits; one that does not fit or is damaged changes nothing."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import faults
import pytest
import safetensors.torch
import torch
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
    sentences,
    trainer,
    word_tokenizer,
)

from mebp_triton.data.loading import load_data
from mebp_triton.data.packing import pack
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.models.adapter import adapter_tensors
from mebp_triton.store.manifest import accept_companions
from mebp_triton.store.reader import Store
from mebp_triton.system import strict_json, temporaries
from mebp_triton.system.errors import RunError
from mebp_triton.training.checkpoint import Checkpoint, Position, store_fingerprint
from mebp_triton.training.finetune import finetune
from mebp_triton.training.processes import ALONE
from mebp_triton.training.run_directory import RunDirectory
from mebp_triton.training.settings import FACTS


def checkpoint_of(made, run=None, fingerprints=None, **changes):
    """``made``'s checkpoint, but for another run directory, other data, or other settings. No model is loaded."""
    settings = dataclasses.replace(made.config, **changes)
    given = made.checkpoint.fingerprints | (fingerprints or {})
    return Checkpoint(made.model, made.update, made.selection, settings, run or made.run, ALONE, given)


@pytest.fixture(scope="module")
def other(store, data, tmp_path_factory):
    """A trainer that has taken no step, to read checkpoints with."""
    return trainer(store, data, tmp_path_factory.mktemp("other") / "run", **DEMANDING)


@pytest.fixture
def copied(interrupted, tmp_path):
    """A run directory like the interrupted one, which a test may change."""
    return RunDirectory(shutil.copytree(interrupted, tmp_path / "run"), resume=True)


# --- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["file", "host", "device"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(store, data, straight, copied, residency):
    places = dict.fromkeys(("weights", "checkpoints", "optimizer_state"), residency)
    torch.manual_seed(12345)  # a new process has another random state
    made = resumed(store, data, copied.directory, **DEMANDING, **places, join_micro_batches=True)
    assert made.step == 4 and made.selection.step == 4
    assert [row["step"] for row in made.run.read_metrics()] == [0, 1, 2, 3]
    made.train()
    assert metrics(made, *NUMBERS) == metrics(straight, *NUMBERS)
    ours = checkpoint_tensors(made.run.checkpoint)
    assert_same_tensors(ours, checkpoint_tensors(straight.run.checkpoint))
    kinds = {"/".join(name.split("/")[:2]) for name in ours if not name.startswith("optimizer")}
    assert kinds == {"state/adapter", "state/random"} and "optimizer-00002/moments" in ours
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
    again = resumed(store, data, tmp_path / "run", **settings)
    again.train()
    ours = checkpoint_tensors(again.run.checkpoint)
    assert ours["optimizer-00002/moments"].dtype == torch.uint8
    assert_same_tensors(ours, checkpoint_tensors(whole.run.checkpoint))
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
    again = resumed(store, rows_in(tmp_path), tmp_path / "run", **settings)
    again.train()
    assert metrics(again, *NUMBERS) == metrics(whole, *NUMBERS)
    assert_same_tensors(checkpoint_tensors(again.run.checkpoint), checkpoint_tensors(whole.run.checkpoint))
    assert sum(result["tokens"] for result in again.run.read_metrics()) > 0
    wider = pack(load_data(tmp_path / "rows.jsonl", word_tokenizer(), 24), 48)
    with pytest.raises(ValueError, match="cannot resume: the training data changed"):
        resumed(store, wider, tmp_path / "run", **settings)


def test_the_saved_adapter_is_the_checkpoints(straight):
    saved = safetensors.torch.load_file(straight.run.adapter / "adapter_model.safetensors")
    state = checkpoint_tensors(straight.run.checkpoint)
    assert saved and all(torch.equal(tensor, state[f"state/adapter/{name}"]) for name, tensor in saved.items())


# --- what a resumed run must share ----------------------------------------------------------------------------------

CHANGES = {
    "train_file": "other.txt",
    "validation_file": "v.txt",
    "chat_template": "template.jinja",
    "output_dir": "elsewhere",
    "max_steps": 9,
    "num_train_epochs": 2,
    "max_length": 20,
    "packing": True,
    "completion_only_loss": False,
    "assistant_only_loss": True,
    "max_eval_windows": 2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "lora_r": 8,
    "lora_alpha": 4.0,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "target_modules": "q_proj",
    "exclude_modules": "q_proj",
    "target_parameters": "experts.down_proj",
    "rank_pattern": '{"q_proj": 2}',
    "alpha_pattern": '{"q_proj": 2}',
    "adapter": "elsewhere",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "weight_decay": 0.0,
    "max_grad_norm": 2.0,
    "optim": "adamw_8bit",
    "on_nan": "skip",
    "mezo_epsilon": 1e-2,
    "seed": 7,
    "selection_mode": "exact",
    "selected_ratio": 0.67,
    "selection_schedule": "strided",
    "unselected_update": "none",
    "weights": "host",
    "checkpoints": "host",
    "optimizer_state": "host",
    "recompute_granularity": "selective",
    "mlp_chunk_tokens": 64,
    "join_micro_batches": False,
    "block_graphs": True,
    "optimizer_in_backward": True,
    "return_freed_memory": True,
    "memory_budget": "1GiB",
    "device": "cuda",
    "dtype": "bfloat16",
    "backend": "panel",
    "save_steps": 3,
    "report_to": "wandb",
    "eval_steps": 2,
    "save_best": True,
    "early_stopping_patience": 3,
    "early_stopping_threshold": 0.5,
}


def test_every_setting_is_changed_below(other):
    assert CHANGES.keys() == FACTS.keys()
    assert not [name for name, value in CHANGES.items() if getattr(other.config, name) == value]


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_with_another_setting_is_refused_unless_it_is_free(interrupted, copied, other, name):
    change = {name: CHANGES[name]}
    if name == "optimizer_in_backward":
        change["gradient_accumulation_steps"] = 1
    if name == "block_graphs":
        change["device"] = "cuda"  # no setting that a run is bound to
    if name in ("eval_steps", "save_best", "early_stopping_patience"):
        change |= {"validation_file": "v.txt", "eval_steps": 2}
    changed = checkpoint_of(other, copied, **change)
    # With max_steps, the number of epochs says nothing.
    if FACTS[name].resume == "free" or name == "num_train_epochs":
        assert changed.resume(copied.checkpoint, other.course).step == 4
        return
    with pytest.raises(ValueError, match=f"cannot resume: ({'|'.join(change)}) was .* and now is "):
        changed.resume(interrupted / "checkpoint", other.course)


# The settings of a run, those of a longer one, and the step at which the first one is resumed as the second one.
LONGER = {
    "constant": ({"max_steps": 4}, {"max_steps": 8}, {"lr_scheduler_type": "constant", "warmup_steps": 2}),
    "shorter": ({"max_steps": 12}, {"max_steps": 8}, {"lr_scheduler_type": "constant"}),
    "epochs": ({"num_train_epochs": 2}, {"num_train_epochs": 3}, {"lr_scheduler_type": "constant", "max_steps": 0}),
    "warming up": ({"max_steps": 9}, {"max_steps": 8}, {"lr_scheduler_type": "cosine", "warmup_steps": 5}),
}


@pytest.mark.parametrize("kind", LONGER)
def test_a_run_made_longer_equals_one_that_was_planned_so(store, data, tmp_path, kind):
    planned, instead, shared = LONGER[kind]
    shared = DEMANDING | {"gradient_accumulation_steps": 1, "save_steps": 4} | shared
    whole = trainer(store, data, tmp_path / "whole", **shared | instead)
    whole.train()
    made = trainer(store, data, tmp_path / "run", **shared | planned)
    if made.total_steps > 8:
        with pytest.raises(Crash):
            made.train(crash_at(5))
    else:
        assert finetune(made, None)["steps"] == made.total_steps
    again = resumed(store, data, tmp_path / "run", **shared | instead)
    assert 0 < again.step < again.total_steps == whole.total_steps
    assert finetune(again, None)["steps"] == whole.total_steps
    assert metrics(again, *NUMBERS) == metrics(whole, *NUMBERS)
    assert_same_tensors(checkpoint_tensors(again.run.checkpoint), checkpoint_tensors(whole.run.checkpoint))


def test_the_record_of_a_run_that_goes_on_is_gone_until_it_ends(store, data, tmp_path):
    settings = {"lr_scheduler_type": "constant", "save_steps": 1}
    finetune(trainer(store, data, tmp_path / "run", max_steps=1, **settings), None)
    again = resumed(store, data, tmp_path / "run", max_steps=3, **settings)
    assert finetune(again, None, should_stop=lambda: 15) is None
    assert again.step == 2 and not again.run.record.exists()


def test_a_length_that_makes_other_steps_is_refused(interrupted, copied, other):
    with pytest.raises(ValueError, match="max_steps was 8 and now is 3, which makes 3 steps, and 4 are taken already"):
        checkpoint_of(other, copied, max_steps=3).resume(copied.checkpoint, other.course)
    with pytest.raises(ValueError) as refused:
        checkpoint_of(other, copied, max_steps=16).resume(copied.checkpoint, other.course)
    assert "by the cosine schedule, step 3 would have had the learning rate 0.00494 and had 0.00467" in str(
        refused.value
    )
    assert str(refused.value).endswith(f"start a new run with --adapter {copied.directory}")


def test_an_optimizer_without_state_does_not_go_on_from_one_with(interrupted, other):
    changed = checkpoint_of(other, optim="mezo", selection_mode="full")
    with pytest.raises(ValueError, match="cannot resume: optim was 'adamw' and now is 'mezo'"):
        changed.resume(interrupted / "checkpoint", other.course)


def test_a_setting_newer_than_the_checkpoint_had_its_default_then(copied, other):
    edit(lambda state: state["config"].__delitem__("optimizer_in_backward"))(copied.checkpoint)
    assert checkpoint_of(other, copied).resume(copied.checkpoint, other.course).step == 4
    changed = checkpoint_of(other, copied, optimizer_in_backward=True, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="cannot resume: gradient_accumulation_steps was 2 and now is 1"):
        changed.resume(copied.checkpoint, other.course)
    edit(lambda state: state["config"].update(gradient_accumulation_steps=1))(copied.checkpoint)
    with pytest.raises(ValueError, match="cannot resume: optimizer_in_backward was False and now is True"):
        changed.resume(copied.checkpoint, other.course)


def test_resuming_on_other_data_or_another_model_is_refused(store, data, interrupted, other):
    ids = data.ids.copy()
    ids[len(ids) // 2] += 1  # one token
    with pytest.raises(ValueError, match="cannot resume: the training data changed"):
        changed = TokenizedData(ids, data.trained, data.offsets, data.report)
        resumed(store, changed, interrupted, **DEMANDING)
    changed = checkpoint_of(other, fingerprints={"model": 1})
    with pytest.raises(ValueError, match="cannot resume: the model changed"):
        changed.resume(interrupted / "checkpoint", other.course)


def test_a_models_fingerprint_is_of_its_weights_and_its_config(shared_store, store, tmp_path):
    """By another config, the same weights are another model."""
    changed = Path(shutil.copytree(store, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    accept_companions(changed)
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    stores = (store, copy, changed, shared_store("llama", seed=5))
    fingerprints = [store_fingerprint(Store(one)) for one in stores]
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 3


def test_a_trainers_checkpoint_names_its_own_model(store, straight):
    fingerprints = straight.checkpoint.fingerprints
    assert fingerprints == {"training data": straight.data.checksum(), "model": store_fingerprint(Store(store))}


# --- what is damaged ------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def fresh(store, data, tmp_path_factory):
    """One trainer for all damage: none of it may reach the trainer."""
    return trainer(store, data, tmp_path_factory.mktemp("fresh") / "run", **DEMANDING)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(fresh, copied, name):
    before = adapter_of(fresh)
    DAMAGE[name](copied.checkpoint)
    with pytest.raises(ValueError) as caught:
        fresh.resume(copied.checkpoint)
    assert str(copied.checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    assert_same_tensors(adapter_of(fresh), before)
    assert fresh.step == 0


@pytest.mark.parametrize("damage", ["removed", "cut to a line", "a line twice", "without the first"])
def test_metrics_that_are_not_whole_are_told(copied, other, damage):
    lines = copied.metrics.read_text().splitlines(keepends=True)
    if damage == "removed":
        copied.metrics.unlink()
    else:
        left = {"cut to a line": lines[:1], "a line twice": [*lines[:2], *lines[1:4]], "without the first": lines[1:]}
        copied.metrics.write_text("".join(left[damage]))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl does not have each step before 4 once"):
        checkpoint_of(other, copied).resume(copied.checkpoint, other.course)


@pytest.fixture(scope="module")
def moved(store, data, interrupted, tmp_path_factory):
    """The directory of a run that went on from another one's step 4, and died after its own checkpoint at 6."""
    made = trainer(store, data, tmp_path_factory.mktemp("moved") / "run", **DEMANDING | {"save_steps": 3})
    made.resume(interrupted / "checkpoint")
    with pytest.raises(Crash):
        made.train(crash_at(7))
    return made.run.directory


@pytest.mark.parametrize("damage", [b"", b"\0\0\n"])
def test_metrics_begin_anew_in_another_directory(other, moved, tmp_path, recwarn, damage):
    """Damage after the checkpoint does not matter there either."""
    run = RunDirectory(shutil.copytree(moved, tmp_path / "run"), resume=True)
    with open(run.metrics, "ab") as file:
        file.write(damage)
    position = checkpoint_of(other, run).resume(run.checkpoint, other.course)
    assert (position.step, position.first_step) == (6, 4)
    assert [row["step"] for row in run.read_metrics()] == [4, 5]
    assert not [str(one.message) for one in recwarn if "metrics" in str(one.message)]


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(store, data, other, copied, tmp_path):
    """Every operation on the way fails once. The run then has the old checkpoint, or the new one, and goes on."""
    writer = trainer(store, data, tmp_path / "writer", **DEMANDING)
    writer.resume(copied.checkpoint)
    old = adapter_of(writer)
    for parameter in writer.parameters:
        parameter.data.add_(1)
    new, seen = adapter_of(writer), []
    for at in itertools.count(1):
        run = RunDirectory(shutil.copytree(copied.directory, tmp_path / f"run-{at}"), resume=True)
        try:
            with faults.failing(at):
                checkpoint_of(writer, run).save(Position(5))
            break
        except OSError as error:
            assert "No space left" in str(error)
        step = checkpoint_of(other, run).resume(run.checkpoint, other.course).step
        seen.append(step)
        assert_same_tensors(adapter_of(other), {4: old, 5: new}[step])
        saved = safetensors.torch.load_file(run.adapter / "adapter_model.safetensors")
        assert all(torch.equal(tensor, adapter_tensors(other.model)[name]) for name, tensor in saved.items())
        left = [path for path in run.directory.rglob("*") if path.name.startswith(temporaries.TEMPORARY_PREFIX)]
        assert not left, f"operation {at} leaves {left}"
    assert set(seen) == {4, 5} and seen == sorted(seen)


def test_an_adapter_that_is_not_finite_takes_no_checkpoints_place(store, data, tmp_path):
    made = trainer(store, data, tmp_path / "run", max_steps=6, save_steps=2)

    def spoil(result):
        if result.step == 3:
            with torch.no_grad():
                made.parameters[0][0, 0] = math.inf

    with pytest.raises(RunError, match=r"lora_A \(block 0\) is not finite after step 4: the last checkpoint is kept"):
        made.train(spoil)
    assert json.loads((made.run.checkpoint / "state.json").read_text())["step"] == 2
    assert made.checkpoint.resume(made.run.checkpoint, made.course).step == 2


def test_a_checkpoint_between_two_renames_is_found_again(copied, other):
    copied.checkpoint.rename(copied.directory / ".mebp-old-checkpoint")
    assert checkpoint_of(other, copied).resume(copied.checkpoint, other.course).step == 4


def test_a_run_that_died_between_its_last_checkpoint_and_its_adapter(store, data, straight, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight.run.directory, output)
    whole = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(output / "adapter")
    summary = finetune(resumed(store, data, output, **DEMANDING), None)
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert summary["train_loss_last"] == straight.run.read_metrics()[-1]["loss"]


def test_an_older_adapter_is_replaced_by_the_checkpoints(straight, other, tmp_path):
    run = RunDirectory(shutil.copytree(straight.run.directory, tmp_path / "run"), resume=True)
    wanted, weights = adapter_tensors(straight.model), run.adapter / "adapter_model.safetensors"
    safetensors.torch.save_file({name: torch.zeros_like(tensor) for name, tensor in wanted.items()}, weights)
    checkpoint_of(other, run).resume(run.checkpoint, other.course)
    assert_same_tensors(safetensors.torch.load_file(weights), wanted)
