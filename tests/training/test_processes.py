"""Two processes take the steps of one with twice the micro-batches; what goes wrong in one ends both, with one line."""

import json
import math
import os
import subprocess
import sys

import pytest
import ranks
import safetensors.torch
import torch
from models import peft_gradients, peft_model, randomize_adapter
from runs import assert_same_tensors, checkpoint_tensors, run_store, sentences, text_data, trainer, word_tokenizer

from mebp_triton.cli.main import main
from mebp_triton.data.batching import batches, collate, valid_tokens
from mebp_triton.data.loading import load_data
from mebp_triton.training import run_directory
from mebp_triton.training.processes import ALONE, Processes, joined

DOUBLE = {"load_options": {"dtype": torch.float64, "adapter_dtype": torch.float64}}
SELECTED = {"selected_ratio": 0.34}
SCENARIOS = {
    "full": {"per_device_train_batch_size": 2, "weight_decay": 0.05, "max_grad_norm": 0.2, "warmup_steps": 1},
    "identity": {"selection_mode": "identity", "selection_schedule": "random", **SELECTED},
    # The norms count only when every block has been selected once.
    "exact": {"selection_mode": "exact", "selection_schedule": "importance", "max_steps": 5, **SELECTED},
    "freeze": {"selection_mode": "freeze", "unselected_update": "none", **SELECTED},
    "mezo": {"optim": "mezo", "learning_rate": 1e-4},
    # Three times three rows, four a step: of the last step, one process has a row and the other none.
    "epochs": {"max_steps": 0, "num_train_epochs": 3, "lr_scheduler_type": "cosine"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store and its texts; ``short`` has the same with a shorter text."""
    root = tmp_path_factory.mktemp("world")
    run_store(root)
    (root / "short").mkdir()
    (root / "short" / "store").symlink_to(root / "store")
    for place, count in ((root, 40), (root / "short", 10)):
        (place / "train.txt").write_text(sentences(count))
        (place / "held-out.txt").write_text(sentences(6, seed=9))
    return root


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(run_directory, "draw_plots", lambda *_: [])


def arguments(root, output, *more):
    texts = [f"--train-file={root / 'train.txt'}", f"--validation-file={root / 'held-out.txt'}"]
    quick = [
        "--max-steps=4",
        "--max-length=24",
        "--lora-r=4",
        "--learning-rate=0.005",
        "--device=cpu",
        "--save-steps=2",
    ]
    return ["train", str(root / "store"), *texts, f"--output-dir={output}", *quick, *more]


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def loaded(output, what, rank=0):
    return safetensors.torch.load_file(ranks.beside(output, what, rank))


def bytes_in(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def ended_well(processes):
    assert [process.code for process in processes] == [0] * len(processes), [process.err for process in processes]


def ended_with(processes, code, line):
    """The first process's one line; the others say nothing."""
    assert [process.code for process in processes] == [code] * len(processes), [process.err for process in processes]
    lines = [text for text in processes[0].err.splitlines() if text.startswith("mebp:")]
    assert len(lines) == 1 and line in lines[0], processes[0].err
    assert not any(process.err for process in processes[1:]) and not any(process.out for process in processes)


# --- the same steps -------------------------------------------------------------------------------------------------


def settings_of(scenario):
    return {"max_steps": 3, **SCENARIOS[scenario], **DOUBLE}


def root_of(world, scenario):
    return world / "short" if scenario == "epochs" else world


@pytest.fixture(scope="module")
def both(world, tmp_path_factory):
    """The runs of all scenarios by two processes, two micro-batches each."""
    outputs = tmp_path_factory.mktemp("both")
    more = {"gradient_accumulation_steps": 2}
    runs = [(root_of(world, name), outputs / name, settings_of(name) | more) for name in SCENARIOS]
    ended_well(ranks.run_ranks(ranks.trainings, outputs / "log", runs))
    return outputs


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_take_the_steps_of_one_with_twice_the_micro_batches(world, both, tmp_path, scenario):
    """In float64: losses, accuracies, tokens, norms, evaluations and the final adapter.

    What is communicated are the gradients of the blocks that were selected, and a number for each of their parameters.
    """
    both, alone = both / scenario, tmp_path / "alone"
    settings = settings_of(scenario) | {"gradient_accumulation_steps": 4}
    made = ranks.train_with(ALONE, root_of(world, scenario), alone, settings)
    if scenario == "epochs":
        assert made.total_steps == 3 and 3 * len(made.data) % 4 == 1
    names = ["loss", "token_accuracy", "tokens", "grad_norm", "learning_rate"]
    ours, truth = rows(both), rows(alone)
    blocks = made.model.mebp.engine
    sizes = [8 * sum(p.numel() + 1 for p in blocks.trainable(index)) for index in range(len(blocks.blocks))]
    trained = 1 if "selection_mode" in settings else 3
    assert len(ours) == len(truth) == made.total_steps
    for row, expected in zip(ours, truth, strict=True):
        for name in names:
            assert row[name] is expected[name] or row[name] == pytest.approx(expected[name], rel=1e-9), name
        assert row["selected_blocks"] == expected["selected_blocks"] and len(row["selected_blocks"]) == trained
        assert row["reduced_bytes"] == (
            0 if scenario == "mezo" else sum(sizes[place] for place in row["selected_blocks"])
        )
    for name, tensor in loaded(alone, "adapter").items():
        torch.testing.assert_close(loaded(both, "adapter")[name], tensor, rtol=0, atol=1e-9)
        assert torch.equal(loaded(both, "adapter", 1)[name], loaded(both, "adapter")[name])
    record, expected = (json.loads((output / "run.json").read_text()) for output in (both, alone))
    assert record["processes"] == 2 and expected["processes"] == 1
    for name in ("loss_before", "loss_after", "token_accuracy_after", "perplexity_after"):
        assert record[name] == pytest.approx(expected[name], rel=1e-9)
    assert all("reduced_bytes" not in row for row in truth)


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_the_summed_gradients_are_those_of_peft_over_the_global_batch(world, tmp_path, mode):
    """Micro-batches of unequal length: each token counts once, wherever it lies. In float64."""
    settings = {"selection_mode": mode, **SELECTED, "max_steps": 1, "gradient_accumulation_steps": 3}
    settings |= {"per_device_train_batch_size": 2, "max_grad_norm": 0.0, **DOUBLE}
    output = tmp_path / "run"
    ended_well(ranks.run_ranks(ranks.train, tmp_path / "log", world, output, settings))
    data = text_data(world)
    made = trainer(world / "store", data, tmp_path / "other", **settings)
    randomize_adapter(made.model)
    wrapped = peft_model(world / "store", made.model, torch.float64, r=4, lora_alpha=8.0)
    stream = batches(data, 2, made.config.seed)
    micro = [collate(next(stream), 0) for _ in range(6)]
    tokens = [valid_tokens(batch) for batch in micro]
    assert len(set(tokens)) > 1
    for batch in micro:
        labels = batch.pop("labels")[:, 1:].reshape(-1)
        logits = wrapped(**batch).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").div(sum(tokens)).backward()
    truth = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): gradient
        for name, gradient in peft_gradients(wrapped).items()
    }
    (row,) = rows(output)
    for rank in range(2):
        gradients = loaded(output, "gradients", rank)
        selected = {name for name in truth if int(name.split(".")[2]) in row["selected_blocks"]}
        assert gradients.keys() == selected and (mode == "full") == (selected == truth.keys())
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, truth[name], rtol=1e-9, atol=1e-12)
    assert row["grad_norm"] == pytest.approx(math.hypot(*(float(truth[name].norm()) for name in selected)), rel=1e-9)


def test_a_resumed_run_of_two_ends_at_the_bits_of_an_uninterrupted_one(world, tmp_path):
    """With dropout, of which each process draws its own, and a selection that hangs on norms."""
    settings = {"max_steps": 6, "save_steps": 2, "lora_dropout": 0.3, "gradient_accumulation_steps": 2}
    settings |= {"selection_mode": "identity", "selection_schedule": "importance", **SELECTED}
    settings |= {"validation_file": "held-out.txt", "eval_steps": 1, "save_best": True, "early_stopping_patience": 6}
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def run(output, *options):
        return ranks.run_ranks(ranks.train, tmp_path / "log", world, output, settings, *options)

    ended_well(run(whole))
    assert "crashed" in run(cut, False, 5)[0].err
    assert json.loads((cut / "checkpoint" / "state.json").read_text())["step"] == 4
    ended_well(run(cut, True))
    truth = checkpoint_tensors(whole / "checkpoint")
    assert_same_tensors(checkpoint_tensors(cut / "checkpoint"), truth)
    states = [truth[f"state/random/cpu{other}"] for other in ("", "-1")]
    assert not torch.equal(*states)  # they drew dropout of their own
    numbers = ("step", "loss", "eval_loss", "eval_windows", "best", "not_improved")
    found, expected = ([[row.get(name) for name in numbers] for row in rows(run)] for run in (cut, whole))
    assert found == expected and [row[0] for row in found] == [step for step in range(6) for _ in ("step", "eval")]
    held_out = load_data(world / "held-out.txt", word_tokenizer(), 24)
    tokens = sum(valid_tokens(collate([held_out[place]], 0)) for place in range(len(held_out)))
    assert {row.get("eval_tokens") for row in rows(cut)} == {None, tokens}, "each window is evaluated by one process"
    assert list(bytes_in(cut / "adapter_best").values()) == list(bytes_in(whole / "adapter_best").values())
    other = trainer(world / "store", text_data(world), cut, resume=True, **settings)
    with pytest.raises(ValueError, match="cannot resume: the run had 2 processes and now has 1"):
        other.resume(other.run.checkpoint)


# --- the command ----------------------------------------------------------------------------------------------------


def torchrun(root, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *command], cwd=root, env=environment, capture_output=True, text=True, timeout=120)


def test_torchrun_trains_like_one_process(world, tmp_path):
    ended = torchrun(tmp_path, "-m", "mebp_triton.cli", *arguments(world, tmp_path / "both", "--json"))
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)  # one answer, not two
    assert summary["processes"] == 2 and summary["steps"] == 4
    twice = arguments(world, tmp_path / "alone", "--gradient-accumulation-steps=2")
    assert main(twice) == 0
    ours, truth = rows(tmp_path / "both"), rows(tmp_path / "alone")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in truth], abs=1e-5)
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("both", "alone")]
    ours, expected = map(safetensors.torch.load_file, adapters)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    made = [{path.name for path in (tmp_path / name).iterdir() if path.suffix != ".png"} for name in ("both", "alone")]
    assert made[0] == made[1]


def test_a_model_is_quantized_once_and_a_finished_run_stays_as_it_was(world, tmp_path):
    given = arguments(world, tmp_path / "run", "--group-size=32")
    given[1] = str(world / "model")
    ended = ranks.run_ranks(ranks.command, tmp_path / "log", given)
    ended_well(ended)
    assert "quantizing it into" in ended[0].err and not ended[1].err and not ended[1].out
    before = bytes_in(tmp_path / "run")
    ended = ranks.run_ranks(ranks.command, tmp_path / "log", [*given, "--resume"])
    ended_well(ended)
    assert "nothing is left to do" in ended[0].err and "loss after" in ended[0].out and not ended[1].out
    assert bytes_in(tmp_path / "run") == before


def test_transformers_trainer_takes_the_steps_of_one_process(world, tmp_path):
    """In ``DistributedDataParallel``, with blocks that are not selected, and rows of unequal length."""
    checkpointing = {"gradient_checkpointing": True}
    modes = (None, "identity")

    def runs(place, options):
        return [(tmp_path / f"{place}-{mode}", mode, checkpointing | options(mode)) for mode in modes]

    both = runs("both", lambda mode: {"ddp_find_unused_parameters": mode is not None})
    ended_well(ranks.run_ranks(ranks.hugging_face, tmp_path, world / "store", both))
    ranks.hugging_face(world / "store", runs("alone", lambda mode: {"gradient_accumulation_steps": 2}))
    for mode in modes:
        truth = loaded(tmp_path / f"alone-{mode}", "adapter")
        for rank in range(2):
            for name, tensor in loaded(tmp_path / f"both-{mode}", "adapter", rank).items():
                torch.testing.assert_close(tensor, truth[name], rtol=0, atol=1e-5)


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "how", "code", "line"),
    [
        (0, "mistake", 2, "the value 3 is wrong: give 4"),
        (1, "mistake", 2, "process 1: the value 3 is wrong: give 4"),
        (1, "bug", 1, "process 1: KeyError: 'some key'"),
        (1, "nan", 1, "error: loss is nan at step 2, first "),
        (1, "drift", 1, "error: the adapters of the processes differ after step 4, and must not"),
    ],
)
def test_what_goes_wrong_in_one_process_ends_both_with_one_line(world, tmp_path, rank, how, code, line):
    run = tmp_path / "run"
    ended = ranks.run_ranks(ranks.command, tmp_path / "log", arguments(world, run), rank, how)
    ended_with(ended, code, line)
    assert json.loads((run / "checkpoint" / "state.json").read_text())["step"] == 2
    assert not (run / "run.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_does_not_leave_the_other_waiting(world, tmp_path, rank):
    given = arguments(world, tmp_path / "run")
    ended = ranks.run_ranks(ranks.command, tmp_path / "log", given, rank, "killed")
    assert ended[rank].code == -9 and ended[1 - rank].code == 1
    assert "mebp: error: another process of this run is gone" in ended[1 - rank].err


TOLD = ["--selection-mode=exact", "--selection-schedule=importance", "--lora-dropout=0.1"]


@pytest.fixture(scope="module")
def untold(world, tmp_path_factory):
    """A run that nobody stopped."""
    whole = tmp_path_factory.mktemp("untold") / "run"
    ended_well(ranks.run_ranks(ranks.command, whole.parent / "log", arguments(world, whole, *TOLD)))
    return whole


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_told_to_stop_ends_both_after_the_same_step(world, untold, tmp_path, rank):
    """In the third step, after which no checkpoint is due; then on to the bits of a run that nobody stopped."""
    run = tmp_path / "run"
    ended = ranks.run_ranks(ranks.command, tmp_path / "log", arguments(world, run, *TOLD), rank, "told")
    assert [process.code for process in ended] == [143, 143]
    assert ended[0].err.splitlines()[-1] == "mebp: interrupted after step 3 of 4; --resume goes on from there"
    assert not any(process.out for process in ended) and "interrupted" not in ended[1].err
    assert json.loads((run / "checkpoint" / "state.json").read_text())["step"] == 3
    ended_well(ranks.run_ranks(ranks.command, tmp_path / "log", arguments(world, run, *TOLD, "--resume")))
    assert_same_tensors(checkpoint_tensors(run / "checkpoint"), checkpoint_tensors(untold / "checkpoint"))
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(untold)]


@pytest.mark.parametrize("step", [2, 4])
def test_a_process_that_is_told_to_stop_while_all_evaluate_leaves_them_together(world, untold, tmp_path, step):
    """The others wait for its part of the evaluation, also of that after the last step."""
    command = arguments(world, tmp_path / "run", *TOLD, "--eval-steps=2", "--save-best")
    ended = ranks.run_ranks(ranks.command, tmp_path / "log", command, 1, "told evaluating", step)
    if step == 2:
        assert ended[0].err.splitlines()[-1] == "mebp: interrupted after step 3 of 4; --resume goes on from there"
        ended = ranks.run_ranks(ranks.command, tmp_path / "log", [*command, "--resume"])
    ended_well(ended)
    found, metrics = json.loads((tmp_path / "run" / "run.json").read_text()), rows(tmp_path / "run")
    assert [row["step"] for row in metrics if "eval_loss" in row] == [1, 3]
    assert found["loss_after"] == metrics[-1]["eval_loss"] == found["best_eval_loss"]
    assert found["loss_after"] == json.loads((untold / "run.json").read_text())["loss_after"]
    kept, last = (tmp_path / "run" / name / "adapter_model.safetensors" for name in ("adapter_best", "adapter"))
    assert kept.read_bytes() == last.read_bytes()


def test_a_users_mistake_is_one_line_and_nothing_is_written(world, tmp_path):
    """One that every process sees, and one that the first sees alone."""
    run = tmp_path / "run"
    given = arguments(world, run, "--target-modules=nothing")
    line = "--target-modules 'nothing' matches no linear layer"
    ended_with(ranks.run_ranks(ranks.command, tmp_path / "log", given), 2, line)
    assert not run.exists()
    run.mkdir()
    (run / "something").touch()
    ended_with(ranks.run_ranks(ranks.command, tmp_path / "log", arguments(world, run)), 2, "exists already")
    assert [path.name for path in run.iterdir()] == ["something"]


def test_processes_with_different_files_do_not_start(world, tmp_path):
    (tmp_path / "other.txt").write_text(sentences(40, seed=5))
    given = arguments(world, tmp_path / "run")
    other = [*given, f"--train-file={tmp_path / 'other.txt'}"]
    ended = ranks.run_ranks(ranks.command_of_rank, tmp_path / "log", [given, other])
    ended_with(ended, 2, "the training data is not the same in all processes")


def test_torchrun_ends_with_the_error_of_the_process_that_failed(world, tmp_path):
    ended = torchrun(tmp_path, "-m", "mebp_triton.cli", *arguments(world, tmp_path / "run", "--lora-r=5000"))
    lines = [line for line in ended.stderr.splitlines() if line.startswith("mebp:")]
    assert ended.returncode and lines == ["mebp: error: --lora-r must be at most 4096, got 5000"]


# --- what they tell each other --------------------------------------------------------------------------------------


def test_what_processes_tell_each_other(tmp_path):
    ended_well(ranks.run_ranks(ranks.sums, tmp_path, tmp_path))


def test_one_process_communicates_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as processes:
        assert processes is ALONE and not torch.distributed.is_initialized()
    assert ALONE.sum(3, 0.1) == [3, 0.1] and ALONE.exchange(5) == [[5]] and ALONE.same(1) and ALONE.seed(7) == 7
    assert ALONE.device("cuda:1") == "cuda:1" and ALONE.device(None) is None
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = gradient = torch.ones(2)
    assert ALONE.sum_gradients([[parameter]]) == 0 and parameter.grad is gradient


def test_every_process_takes_its_own_gpu_and_seed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    other = Processes(rank=5, size=8, local_rank=1)
    assert other.device(None) == other.device("cuda") == "cuda:1" and other.device("cpu") == "cpu"
    with pytest.raises(
        ValueError, match="device 'cuda:0' is one GPU, and each of 8 processes takes its own: give cuda"
    ):
        other.device("cuda:0")
    assert len({Processes(rank, 8).seed(42) for rank in range(8)}) == 8
    assert all(torch.Generator().manual_seed(Processes(rank, 8).seed((1 << 63) - 1)) for rank in range(8))


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set: start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "WORLD_SIZE is 2 and RANK is 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
    ],
)
def test_half_an_environment_is_a_mistake(monkeypatch, environment, line):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=line), joined():
        pass
