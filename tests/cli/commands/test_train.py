"""``mebp train``: a run and its directory, and what is refused. ``test_training_run`` has what ends a run early."""

import json
import re

import pytest
import transformers
from commands import (
    QUICK,
    adapter_bytes,
    answer,
    assert_refused,
    flipped,
    metrics,
    pickled,
    put,
    record,
    texts,
    train,
    tree,
    truncated,
    with_remote_code,
    without,
)
from runs import run_store, sentences

# --- a run ----------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(world):
    """The run was made when ``world`` was, with its plots."""
    run = world / "run"
    names = {path.name for path in run.iterdir()}
    assert {"run.json", "metrics.jsonl", "adapter", "checkpoint", "loss.png", "memory.png"} <= names
    assert [row["step"] for row in metrics(run)] == [0, 1, 2]
    found = record(run)
    assert found["settings"]["lora_r"] == 2 and found["settings"]["learning_rate"] == 0.02 and found["steps"] == 3
    assert found["planned_peak_bytes"] > 0
    assert found["settings"]["recompute_granularity"] in ("full", "selective")
    assert found["loss_after"] < found["loss_before"]


def test_the_same_command_gives_the_same_run_and_answers_with_its_record(mebp, world, tmp_path):
    value = answer(mebp("train", world / "store", *texts(world), f"--output-dir={tmp_path / 'run'}", *QUICK, "--json"))
    found, first = record(tmp_path / "run"), record(world / "run")
    assert {key: found[key] for key in value} == value and value["steps"] == 3
    for key in ("loss_before", "loss_after", "train_loss_last", "token_accuracy_after"):
        assert value[key] == first[key], key
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(world / "run")


def test_a_directory_of_chats_is_masked_and_packed(mebp, world, tmp_path):
    """By flags and by a file; and ``eval`` finds the loss that the run said, with the same mask."""
    talk = sentences(30).split(" . ")
    for name, some in (("train.jsonl", talk[:24]), ("valid.jsonl", talk[24:])):
        rows = [{"instruction": text, "output": text} for text in some]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", world / "store", f"--train-file={tmp_path}", f"--validation-file={tmp_path}", *QUICK, "--json"]
    code, out, err = mebp(*command, f"--output-dir={tmp_path / 'run'}", "--packing", "--assistant-only-loss")
    assert code == 0, err
    assert "24 converted" in err and "packed into" in err and "masked)" in err
    assert f"{tmp_path}: {len(talk) - 24} rows" in err, "what became of the validation file"
    value, found = json.loads(out), record(tmp_path / "run")
    assert found["data"]["masked_tokens"] > 0 < found["data"]["packed_rows"] < found["data"]["rows"] == 24
    assert found["settings"]["packing"] and found["settings"]["assistant_only_loss"]
    common = ["eval", world / "store", f"--validation-file={tmp_path}", "--max-length=24", "--json"]
    masked, whole = (
        answer(mebp(*common, *more)) for more in (["--assistant-only-loss"], ["--no-completion-only-loss"])
    )
    assert (masked["loss"], masked["tokens"] < whole["tokens"]) == (value["loss_before"], True)
    put(tmp_path, "settings.yaml", "packing: true\nassistant-only-loss: true\n")
    again = answer(mebp(*command, f"--output-dir={tmp_path / 'again'}", f"--config={tmp_path / 'settings.yaml'}"))
    assert again["loss_after"] == value["loss_after"]


def test_packing_a_model_that_would_leak_writes_nothing(mebp, world, tmp_path):
    run_store(tmp_path, "opt")
    before = tree(tmp_path)
    code, _, err = mebp(*train(world, tmp_path, "--packing", store=tmp_path / "store"))
    assert code == 2 and "train models of type opt without packing" in err.splitlines()[-1]
    assert tree(tmp_path) == before


def test_a_loss_that_is_not_a_number_fails_the_run(mebp, world, tmp_path):
    code, out, err = mebp(*train(world, tmp_path, "--learning-rate=1e30", "--max-grad-norm=0"))
    assert code == 1 and out == ""
    assert err.splitlines()[-1].startswith("mebp: error: ") and " at step " in err.splitlines()[-1]


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_a_damaged_block_is_found_in_the_step_that_uses_it(mebp, world, tmp_path):
    """Loading may have begun, so something may have been written; but no adapter comes of it."""
    code, out, err = mebp(*train(world, tmp_path, store=flipped(world, tmp_path)))
    assert code == 2 and "block-00001.safetensors is damaged: checksum of bytes" in err and out == ""
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "run.json").exists()


def checkpoint(world):
    return f"--resume-from-checkpoint={world / 'run' / 'checkpoint'}"


def test_help_says_what_must_be_given(mebp):
    code, out, _ = mebp("train", "--help")
    named = re.findall(r"^  (--[a-z-]+) [A-Z]+ ((?:.*\n   )*.*)", out, re.M)
    needed = [flag for flag, text in named if "required, here or in --config" in " ".join(text.split())]
    assert (code, needed) == (0, ["--train-file", "--output-dir"])


def test_a_file_that_is_no_model_is_not_said_to_be_quantized(mebp, world, tmp_path):
    command = train(world, tmp_path, store=put(tmp_path, "model.gguf", b"GGUF and no more"))
    assert_refused(mebp, command, ["model.gguf"], tmp_path)


MISTAKES = {
    "no store": (lambda w, t: train(w, t, store=t / "none"), ["none does not exist"]),
    "a truncated store": (lambda w, t: train(w, t, store=truncated(w, t)), ["has 500 bytes and should have"]),
    "no config.json": (lambda w, t: train(w, t, store=without(w, t, "config.json")), ["no manifest"]),
    "pickles": (lambda w, t: train(w, t, store=pickled(w, t)), ["only pickled weights"]),
    "code in the checkpoint": (lambda w, t: train(w, t, store=with_remote_code(w, t)), ["'mine'", "never run"]),
    "options for a store": (lambda w, t: train(w, t, "--scheme=affine"), ["--embedding-bits are for models"]),
    "no tokenizer": (
        lambda w, t: train(w, t, store=without(w, t, "tokenizer*", source="store")),
        ["tokenizer", "does not exist"],
    ),
    "a missing training file": (lambda w, t: train(w, t, train_file=t / "none.txt"), ["none.txt: no such file"]),
    "no training file": (lambda w, t: ["train", w / "store", f"--output-dir={t / 'run'}"], ["--train-file is missing"]),
    "no output directory": (
        lambda w, t: ["train", w / "store", "--train-file=a.txt"],
        ["--output-dir is missing: give"],
    ),
    "an empty file": (
        lambda w, t: train(w, t, train_file=put(t, "a.txt", "")),
        ["a.txt: nothing to train on, it is empty; add text"],
    ),
    "an empty validation file": (
        lambda w, t: train(w, t, f"--validation-file={put(t, 'v.txt', '')}"),
        ["--validation-file", "v.txt: nothing to evaluate"],
    ),
    "an unknown suffix": (lambda w, t: train(w, t, train_file=put(t, "a.tsv", "a\tb")), ["unknown suffix '.tsv'"]),
    "broken JSONL": (
        lambda w, t: train(w, t, train_file=put(t, "a.jsonl", '{"text": "the cat"}\n{"text": \n')),
        ["a.jsonl:2: broken JSON"],
    ),
    "JSONL of other keys": (lambda w, t: train(w, t, train_file=put(t, "a.jsonl", '{"x": 1}\n')), ["'text'"]),
    "not UTF-8": (lambda w, t: train(w, t, train_file=put(t, "a.txt", b"\xff\xfe\x00\xd8")), ["a.txt", "UTF-8"]),
    "bad data for a model not quantized yet": (
        lambda w, t: train(w, t, store=w / "model", train_file=put(t, "a.txt", "")),
        ["a.txt: nothing to train on"],
    ),
    "a model too short": (lambda w, t: train(w, t, "--max-length=65"), ["--max-length 65", "64 tokens"]),
    "a model not quantized yet too short": (
        lambda w, t: train(w, t, "--max-length=65", store=w / "model"),
        ["--max-length 65", "64 tokens"],
    ),
    "rank 0": (lambda w, t: train(w, t, "--lora-r", "0"), ["--lora-r must be at least 1, got 0"]),
    "a negative rate": (
        lambda w, t: train(w, t, "--learning-rate=-1"),
        ["--learning-rate must be larger than 0, got -1.0"],
    ),
    "a rate of nan": (lambda w, t: train(w, t, "--learning-rate=nan"), ["--learning-rate must be finite, got nan"]),
    "a word for a number": (lambda w, t: train(w, t, "--max-steps=many"), ["--max-steps", "'many'"]),
    "dropout 1": (lambda w, t: train(w, t, "--lora-dropout=1"), ["--lora-dropout must be in [0, 1), got 1.0"]),
    "an unknown mode": (lambda w, t: train(w, t, "--selection-mode=some"), ["--selection-mode", "'some'", "identity"]),
    "mezo with a selection": (lambda w, t: train(w, t, "--optim=mezo", "--selection-mode=exact"), ["'mezo'"]),
    "modules that are not there": (lambda w, t: train(w, t, "--target-modules=c_attn"), ["c_attn", "matches no"]),
    "a broken pattern": (lambda w, t: train(w, t, "--target-modules=(q"), ["(q", "not a regular expression"]),
    "an unknown flag": (lambda w, t: train(w, t, "--learning-rat=1"), ["did you mean --learning-rate?"]),
    "a device that is not here": (lambda w, t: train(w, t, "--device=cuda:99"), ["'cuda:99' is not here"]),
    "a device that is none": (lambda w, t: train(w, t, "--device=gpu"), ["device must be", "'gpu'"]),
    "a backend that cannot": (lambda w, t: train(w, t, "--backend=triton"), ["'triton'", "panel"]),
    "a used run directory": (lambda w, t: train(w, w, output="run"), ["run exists already"]),
    "a file as run directory": (lambda w, t: train(w, w, output="train.txt"), ["train.txt exists already"]),
    "resuming nothing": (lambda w, t: train(w, t, "--resume"), ["there is no checkpoint in", "to resume from"]),
    "resuming from elsewhere": (lambda w, t: train(w, t, f"--resume-from-checkpoint={t}"), ["there is no checkpoint"]),
    "resuming with another rank": (
        lambda w, t: train(w, w, "--lora-r=4", "--resume"),
        ["cannot resume: --lora-r was 2 and now is 4"],
    ),
    "two ways to resume": (
        lambda w, t: train(w, w, "--resume", checkpoint(w)),
        ["--resume and --resume-from-checkpoint"],
    ),
    "resuming into a used directory": (lambda w, t: train(w, w, checkpoint(w), output="wide"), ["wide exists already"]),
    "resuming elsewhere with another rank": (
        lambda w, t: train(w, t, checkpoint(w), "--lora-r=4"),
        ["cannot resume: --lora-r was 2 and now is 4"],
    ),
    "a missing settings file": (lambda w, t: train(w, t, f"--config={t / 'a.yaml'}"), ["a.yaml does not exist"]),
    "an unknown setting": (
        lambda w, t: train(w, t, f"--config={put(t, 'a.yaml', 'lora-rr: 3')}"),
        ["unknown setting 'lora-rr'; did you mean 'lora_r'?"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, name):
    typed, parts = MISTAKES[name]
    assert_refused(mebp, typed(world, tmp_path), parts, world, tmp_path)


@pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules in transformers 4")
def test_a_mixture_whose_experts_are_trained(mebp, world, tmp_path):
    """It is trained, resumed, and started from."""
    store, run = run_store(tmp_path, "qwen3_moe"), tmp_path / "run"
    command = ["train", store, *texts(world), *QUICK[1:], "--target-modules=all-linear-and-experts", "--json"]
    first = answer(mebp(*command, f"--output-dir={run}", "--max-steps=1"))
    assert all(row["experts_paged"] > 0 for row in metrics(run))
    resumed = answer(mebp(*command, f"--output-dir={run}", "--resume", "--max-steps=2"))
    assert resumed["loss_after"] < first["loss_after"] < first["loss_before"]
    given = [f"--adapter={run}", "--max-steps=1", "--max-length=24", f"--output-dir={tmp_path / 'more'}", "--json"]
    assert answer(mebp("train", store, *texts(world), *given))["loss_before"] == resumed["loss_after"]
