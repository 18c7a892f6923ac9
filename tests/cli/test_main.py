"""The command: what each answers, and that a user's mistake is one line, exit code 2, and nothing written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import decoded_model
from runs import run_store, sentences, word_tokenizer

from mebp_triton import __version__
from mebp_triton.autotune.log import Trial
from mebp_triton.autotune.report import describe_route
from mebp_triton.cli import commands
from mebp_triton.cli.main import main
from mebp_triton.convert import merge
from mebp_triton.kernels import tables
from mebp_triton.kernels.configs import Problem
from mebp_triton.kernels.tables import read_table
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter import save_adapter
from mebp_triton.models.load import load
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic, temporaries
from mebp_triton.training import evaluation as evaluate_module
from mebp_triton.training.trainer import RunError, Trainer

COMMANDS = ["quantize", "train", "plan", "eval", "generate", "merge", "tune", "verify", "doctor", "demo"]
OUT_OF_MEMORY = "mebp: error: out of memory: give --memory-budget, shorter rows or a smaller batch\n"
QUICK = ["--max-steps=3", "--max-length=24", "--lora-r=2", "--learning-rate=0.01", "--device=cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Stores, models, texts and a finished run; tests write elsewhere."""
    root = tmp_path_factory.mktemp("world")
    run_store(root)  # root/model, root/store
    run_store(root / "wide", hidden_size=64)
    run_store(root / "gpt2", "gpt2")
    (root / "train.txt").write_text(sentences(60))
    (root / "held-out.txt").write_text(sentences(12, seed=9))
    main(["train", str(root / "store"), *texts(root), f"--output-dir={root / 'run'}", *QUICK, "--json"])
    return root


def texts(root):
    return [f"--train-file={root / 'train.txt'}", f"--validation-file={root / 'held-out.txt'}"]


def answer(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def tree(*roots):
    """All that lies there, and of files when they were written."""
    paths = [path for root in roots for path in root.rglob("*")]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None for path in paths}


# --- what the commands answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(mebp, command):
    code, out, err = mebp(*([] if command is None else [command]), "--help")
    assert code == 0 and not err and out.startswith("usage: mebp")
    if command is None:
        assert all(name in out for name in COMMANDS)
    else:
        assert f"usage: mebp {command}" in out and "--json" in out and "--debug" in out


def test_version(mebp):
    assert mebp("--version") == (0, f"mebp {__version__}\n", "")


def test_quantize(mebp, world, tmp_path):
    value = answer(mebp("quantize", world / "model", tmp_path / "store", "--group-size=32", "--json"))
    opened = Store(tmp_path / "store")
    assert value["matrices"] == len(opened.matrices) == len(value["relative_error"]) == 22
    assert value["schemes"] == ["symmetric"] and value["taken_over"] == 0
    assert value["relative_error_worst"] == max(value["relative_error"].values()) < 0.15
    assert value["relative_error"] == {name: info.relative_error for name, info in opened.matrices.items()}
    code, out, _ = mebp("quantize", world / "model", tmp_path / "other", "--scheme=affine", "--no-scale-search")
    assert code == 0 and "q_proj" in out and "affine" in out
    plain = Store(tmp_path / "other").matrices
    assert {info.scheme for info in plain.values()} == {"affine"} and {i.group_size for i in plain.values()} == {64}


def test_train_writes_a_run(mebp, world, tmp_path):
    value = answer(mebp("train", world / "store", *texts(world), f"--output-dir={tmp_path / 'run'}", *QUICK, "--json"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {key: record[key] for key in value} == value and value["steps"] == 3
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "metrics.jsonl", "adapter", "checkpoint", "loss.png", "memory.png"} <= names
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert record["settings"]["lora_r"] == 2 and record["settings"]["learning_rate"] == 0.01


def test_the_same_command_gives_the_same_run(world, mebp, tmp_path):
    value = answer(mebp("train", world / "store", *texts(world), f"--output-dir={tmp_path / 'run'}", *QUICK, "--json"))
    record = json.loads((world / "run" / "run.json").read_text())
    for key in ("loss_before", "loss_after", "train_loss_last", "token_accuracy_after"):
        assert value[key] == record[key], key


def test_eval_of_the_adapter_is_what_the_run_said(mebp, world):
    record = json.loads((world / "run" / "run.json").read_text())
    held_out = f"--validation-file={world / 'held-out.txt'}"
    common = ["eval", world / "store", held_out, "--max-length=24", "--json"]
    after = answer(mebp(*common, f"--adapter={world / 'run' / 'adapter'}"))
    assert (after["loss"], after["token_accuracy"]) == (record["loss_after"], record["token_accuracy_after"])
    before = answer(mebp(*common))
    assert (before["loss"], before["token_accuracy"]) == (record["loss_before"], record["token_accuracy_before"])
    assert after["loss"] < before["loss"]
    assert answer(mebp(*common, "--max-eval-windows=2"))["windows"] == 2
    code, out, _ = mebp(*common[:-1])
    assert code == 0 and "perplexity" in out


def test_a_directory_of_chats_is_masked_and_packed(mebp, world, tmp_path):
    """By flags and by a file; and ``eval`` finds the loss that the run said, with the same mask."""
    texts = sentences(30).split(" . ")
    for name, some in (("train.jsonl", texts[:24]), ("valid.jsonl", texts[24:])):
        rows = [{"instruction": text, "output": text} for text in some]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", world / "store", f"--train-file={tmp_path}", f"--validation-file={tmp_path}", *QUICK, "--json"]
    code, out, err = mebp(*command, f"--output-dir={tmp_path / 'run'}", "--packing", "--assistant-only-loss")
    assert code == 0, err
    assert "24 converted" in err and "packed into" in err and "masked)" in err
    value, record = json.loads(out), json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["masked_tokens"] > 0 < record["data"]["packed_rows"] < record["data"]["rows"] == 24
    assert record["settings"]["packing"] and record["settings"]["assistant_only_loss"]
    common = ["eval", world / "store", f"--validation-file={tmp_path}", "--max-length=24", "--json"]
    masked, whole = (
        answer(mebp(*common, *more)) for more in (["--assistant-only-loss"], ["--no-completion-only-loss"])
    )
    assert (masked["loss"], masked["tokens"] < whole["tokens"]) == (value["loss_before"], True)
    (tmp_path / "settings.yaml").write_text("packing: true\nassistant-only-loss: true\n")
    again = answer(mebp(*command, f"--output-dir={tmp_path / 'again'}", f"--config={tmp_path / 'settings.yaml'}"))
    assert again["loss_after"] == value["loss_after"]


def test_packing_a_model_that_would_leak_writes_nothing(mebp, world, tmp_path):
    run_store(tmp_path, "opt")
    before = tree(tmp_path)
    command = ["train", tmp_path / "store", *texts(world), f"--output-dir={tmp_path / 'run'}", *QUICK, "--packing"]
    code, _, err = mebp(*command)
    assert code == 2 and "train models of type opt without packing" in err.splitlines()[-1]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_text_is_made_of_logits_that_are_not_finite(mebp, world, tmp_path, temperature):
    model = load(world / "store", LoraConfig(r=2))
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.fill_(1e25)  # each is finite
    save_adapter(model, tmp_path / "adapter")
    prompt = ["--prompt=a dog", "--max-new-tokens=3", f"--temperature={temperature}", "--json"]
    code, out, err = mebp("generate", world / "store", f"--adapter={tmp_path / 'adapter'}", *prompt)
    assert code == 1 and not out and "the logits after 2 tokens are not finite" in err and err.count("\n") == 1


def test_generate(mebp, world):
    tokenizer = word_tokenizer()
    ids = tokenizer("the cat sees", return_tensors="pt").input_ids
    plain = decoded_model(world / "store").generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    wanted = tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    common = ["generate", world / "store", "--prompt=the cat sees", "--max-new-tokens=6"]
    assert answer(mebp(*common, "--json")) == {"prompt": "the cat sees", "completion": wanted}
    code, out, _ = mebp(*common)
    assert code == 0 and wanted in out
    sampled = [*common, "--temperature=2", "--top-p=0.95", "--json"]
    first = answer(mebp(*sampled, "--seed=1"))["completion"]
    assert answer(mebp(*sampled, "--seed=1"))["completion"] == first
    assert any(answer(mebp(*sampled, f"--seed={seed}"))["completion"] != first for seed in (2, 3))
    chat = answer(mebp(*common, "--chat", "--json"))["completion"]
    templated = tokenizer("the cat sees and ", return_tensors="pt").input_ids
    theirs = decoded_model(world / "store").generate(templated, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert chat == tokenizer.decode(theirs[0, templated.shape[1] :], skip_special_tokens=True)
    adapted = answer(mebp(*common, f"--adapter={world / 'run' / 'adapter'}", "--json"))
    assert isinstance(adapted["completion"], str)


def test_verify(mebp, world):
    value = answer(mebp("verify", world / "store", "--json"))
    size = sum(path.stat().st_size for path in (world / "store").glob("*.safetensors"))
    assert value == {"store": str(world / "store"), "files": 4, "bytes": size, "whole": True}
    code, out, _ = mebp("verify", world / "store")
    assert code == 0 and "all agree" in out


def test_changed_companions_are_taken_when_that_is_meant(mebp, world, tmp_path):
    store = Path(shutil.copytree(world / "store", tmp_path / "store"))
    (store / "chat_template.jinja").write_text("{{ messages }}")
    code, _, err = mebp("verify", store)
    assert code == 2 and f"`mebp verify --accept-changes {store}`" in err
    code, _, err = mebp("verify", "--accept-changes", store)
    assert code == 0 and "chat_template.jinja is taken as it is" in err
    assert mebp("verify", store)[0] == 0


def test_what_a_library_prints_is_no_part_of_the_answer(world, tmp_path):
    """tokenizers writes to standard output, past Python, that it ignores a key."""
    store = Path(shutil.copytree(world / "store", tmp_path / "store"))
    text = (store / "tokenizer.json").read_text()
    (store / "tokenizer.json").write_text(text.replace('"normalized"', '"normalised": true, "normalized"', 1))
    assert main(["verify", "--accept-changes", str(store)]) == 0
    command = [
        sys.executable,
        "-m",
        "mebp_triton.cli.main",
        "generate",
        str(store),
        "--prompt=a dog",
        "--max-new-tokens=1",
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["prompt"] == "a dog", done
    assert "normalised" in done.stderr


@pytest.mark.parametrize("limit", [1 << 28, 1 << 30])
def test_an_address_space_that_the_libraries_do_not_fit_into(limit):
    program = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
        "from mebp_triton.cli import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"mebp: error: the address space is limited to {limit >> 20} MiB, of which")
    assert len(done.stderr.splitlines()) == 1


def test_a_budget_chooses_and_is_kept(mebp, world, tmp_path):
    arguments = ["train", world / "store", *texts(world), *QUICK, f"--output-dir={tmp_path / 'run'}"]
    code, _, err = mebp(*arguments, "--memory-budget=4GiB")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert code == 0 and "planned peak " in err and "weights device" in err
    assert record["settings"]["weights"] == "device" and record["settings"]["memory_budget"] == "4GiB"
    assert 0 < record["planned_peak_bytes"] < 4 << 30


def test_a_budget_that_is_too_small_writes_nothing(mebp, world, tmp_path):
    arguments = ["train", world / "model", *texts(world), *QUICK, f"--output-dir={tmp_path / 'run'}"]
    code, out, err = mebp(*arguments, "--memory-budget=10MiB")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "memory_budget 10 MiB is too small: the smallest plan needs" in err
    assert not list(tmp_path.iterdir())


def test_every_run_is_planned(world):
    record = json.loads((world / "run" / "run.json").read_text())
    assert record["planned_peak_bytes"] > 0
    assert record["settings"]["recompute_granularity"] in ("full", "selective")


def test_a_model_that_cannot_be_planned_for_is_trained(mebp, world, tmp_path, monkeypatch):
    def failing(*args):
        raise RuntimeError("no")

    monkeypatch.setattr("mebp_triton.training.plan.traced_model.TracedModel.run", failing)
    arguments = ["train", world / "store", *texts(world), *QUICK, f"--output-dir={tmp_path / 'run'}"]
    code, _, err = mebp(*arguments)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert code == 0 and "no peak is predicted: a model of type llama cannot be traced: RuntimeError: no" in err
    assert record["planned_peak_bytes"] is None
    code, _, err = mebp(*arguments[:-1], f"--output-dir={tmp_path / 'other'}", "--memory-budget=4GiB")
    assert code == 2 and "cannot be traced" in err and not (tmp_path / "other").exists()


def test_doctor_with_a_store(mebp, world, tmp_path):
    value = answer(mebp("doctor", world / "store", f"--scratch-directory={tmp_path}", "--json"))
    code, out, _ = mebp("doctor", world / "store", f"--scratch-directory={tmp_path}")
    hidden = [name for name in value if name.endswith(("_bytes", "_bytes_per_second"))]
    assert code == 0 and hidden and "scratch_in_memory" in value
    shown = [*hidden, "scratch_in_memory", "scratch_on_card"]
    assert not any(line.strip().startswith(name.replace("_", " ") + " ") for name in shown for line in out.splitlines())
    assert mebp("doctor", tmp_path)[0] == 2


def test_doctor(mebp):
    assert answer(mebp("doctor", "--json"))["self_test"].startswith("int4 products passed")
    code, out, _ = mebp("doctor")
    assert code == 0 and "self test" in out and torch.__version__.split("+")[0] in out


def test_a_model_is_quantized_first_into_a_store_beside_the_run(mebp, world, tmp_path):
    command = ["train", world / "model", *texts(world), f"--output-dir={tmp_path / 'run'}", *QUICK, "--json"]
    code, out, err = mebp(*command)
    assert code == 0 and "is not a store: quantizing it into" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-store"]
    assert json.loads(out)["steps"] == 3 and len(Store(tmp_path / "run-store").matrices) == 22
    shutil.rmtree(tmp_path / "run")
    one_line(mebp(*command), "run-store is there from an earlier run: --resume takes it")  # of another model, perhaps
    code, again, err = mebp(*command, "--resume")
    assert code == 0 and "was quantized before: using" in err
    assert json.loads(again)["loss_after"] == json.loads(out)["loss_after"]
    other = ["--validation-file", str(world / "train.txt")]
    code, _, err = mebp(*command, *other, "--resume")
    assert code == 2 and "has ended, evaluated with validation_file" in err and err.endswith("use `mebp eval`\n")
    code, ended, err = mebp(*command, "--resume")
    assert code == 0 and "nothing is left to do" in err and json.loads(ended) == json.loads(again)


def test_a_store_beside_the_run_that_is_another_models_is_not_used(mebp, world, tmp_path):
    (tmp_path / "run-store").mkdir()
    shutil.copytree(world / "store", tmp_path / "run-store", dirs_exist_ok=True)
    shutil.copytree(world / "wide" / "model", tmp_path / "another")
    before = tree(tmp_path)
    for source, flags in (
        (tmp_path / "another", []),
        (world / "model", ["--scheme=affine"]),
        (world / "model", ["--group-size=128"]),
    ):
        flags = [*flags, f"--output-dir={tmp_path / 'run'}", "--resume"]
        (tmp_path / "run").mkdir()
        result = mebp("train", source, *texts(world), *QUICK, *flags)
        (tmp_path / "run").rmdir()
        code, _, err = result
        assert code == 2 and "run-store is a store of" in err.splitlines()[-1]
    assert tree(tmp_path) == before


def test_resuming_through_the_command(mebp, world, tmp_path):
    """One process ends after two of four steps, another goes on; the run equals one that never stopped.

    With chunks that are not named again: they change the order of sums, so the run keeps them.
    """
    command = ["train", str(world / "store"), *texts(world), *QUICK, "--json", "--lora-dropout=0.1"]
    command[command.index("--max-steps=3")] = "--max-steps=4"
    chunks = "--mlp-chunk-tokens=12"
    whole = answer(mebp(*command, chunks, f"--output-dir={tmp_path / 'whole'}"))
    code = (
        "import sys, os\n"
        "from mebp_triton import trainer\n"
        "real = trainer.Trainer._one_step\n"
        "trainer.Trainer._one_step = lambda self, b: os._exit(9) if self.step == 3 else real(self, b)\n"
        "from mebp_triton.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [*command, f"--output-dir={tmp_path / 'cut'}", "--save-steps=2"]
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments, chunks], capture_output=True, env=quiet(), check=False
    )
    assert child.returncode == 9
    assert not (tmp_path / "cut" / "run.json").exists()
    code, out, err = mebp(*arguments, "--resume")
    assert code == 0 and "resuming at step 2 of 4" in err
    resumed = json.loads(out)
    assert resumed["resumed_at_step"] == 2
    for key in ("loss_before", "loss_after", "train_loss_last", "steps"):
        assert resumed[key] == whole[key], key
    # At its end: nothing is left to do, and what it found stays.
    record = (tmp_path / "cut" / "run.json").read_bytes()
    code, out, err = mebp(*arguments, "--resume")
    assert code == 0 and "nothing is left to do" in err and json.loads(out) == resumed
    assert (tmp_path / "cut" / "run.json").read_bytes() == record
    # From a checkpoint elsewhere, into a new directory.
    checkpoint = tmp_path / "cut" / "checkpoint"
    result = mebp(*command, f"--output-dir={tmp_path / 'new'}", f"--resume-from-checkpoint={checkpoint}")
    assert answer(result)["loss_after"] == whole["loss_after"]
    code, _, err = mebp(
        *command, f"--output-dir={tmp_path / 'other'}", f"--resume-from-checkpoint={checkpoint}", "--mlp-chunk-tokens=8"
    )
    assert code == 2 and "mlp_chunk_tokens was 12 and now is 8" in err


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(mebp, world, tmp_path):
    command = ["train", str(world / "store"), *texts(world), *QUICK, f"--output-dir={tmp_path / 'run'}"]
    code = (
        "import sys, os\n"
        "from mebp_triton import trainer\n"
        "real = trainer.Trainer._one_step\n"
        "trainer.Trainer._one_step = lambda self, b: os._exit(9) if self.step == 1 else real(self, b)\n"
        "from mebp_triton.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    child = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, env=quiet(), check=False)
    assert child.returncode == 9 and (tmp_path / "run" / "metrics.jsonl").exists()
    code, _, err = mebp(*command, "--resume")
    assert code == 0 and "has no checkpoint yet: starting from the beginning" in err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize("left", [[], ["evaluation_before.json"]])
def test_a_run_that_ended_before_its_first_step_starts_again(mebp, world, tmp_path, left):
    command = ["train", str(world / "store"), *texts(world), *QUICK, f"--output-dir={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    for name in left:
        shutil.copy(world / "run" / name, tmp_path / "run")
    code, _, err = mebp(*command, "--resume")
    assert code == 0 and "has no checkpoint yet: starting from the beginning" in err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_directory_that_is_no_run_is_not_started_in(mebp, world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    one_line(mebp(*train(world, tmp_path, "--resume")), "there is no checkpoint in", "to resume from")
    assert tree(tmp_path) == before


def test_resuming_a_finished_run_touches_no_file(mebp, world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    before = tree(tmp_path)
    value = answer(mebp(*train(world, tmp_path, f"--validation-file={world / 'held-out.txt'}", "--resume", "--json")))
    assert value["steps"] == 3 and tree(tmp_path) == before


def test_a_run_directory_in_use_is_refused(mebp, world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "new").mkdir()
    before = tree(tmp_path)
    with atomic.locked(tmp_path / "run"), atomic.locked(tmp_path / "new"):
        line = "run is in use by another process: wait for its end, or choose another place"
        one_line(mebp(*train(world, tmp_path, "--resume")), line)
        one_line(mebp(*train(world, tmp_path, output="new")), "new is in use by another process")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "found"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_do_not_spin_unless_they_are_told_to(given, found):
    """Set before torch, and with it OpenMP, is loaded."""
    code = (
        "import os, sys\n"
        "from mebp_triton.cli import main, share_cores\n"
        "assert 'torch' not in sys.modules\n"
        "main(['verify', 'nowhere'])\n"
        "assert 'torch' in sys.modules\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | given, check=True)
    assert done.stdout.strip() == found


def quiet():
    return os.environ | {"OMP_NUM_THREADS": "1"}


# --- mistakes -------------------------------------------------------------------------------------------------------


def one_line(result, *parts):
    code, out, err = result
    assert code == 2, (code, err)
    assert out == ""
    assert err.startswith("mebp: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for part in parts:
        assert part in err, err


def train(world, tmp_path, *flags, store=None, output="run", train_file=None):
    train_file = world / "train.txt" if train_file is None else train_file
    return [
        "train", store or world / "store", f"--train-file={train_file}", f"--output-dir={tmp_path / output}", *QUICK,
        *flags,
    ]  # fmt: skip


def put(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / name


def without(world, tmp_path, *names, source="model"):
    copy = tmp_path / "copy"
    shutil.copytree(world / source, copy, ignore=shutil.ignore_patterns(*names))
    return copy


def cut(world, tmp_path):
    copy = without(world, tmp_path, source="store")
    os.truncate(copy / "block-00001.safetensors", 500)
    return copy


def flipped(world, tmp_path):
    copy = without(world, tmp_path, source="store")
    content = bytearray((copy / "block-00001.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "block-00001.safetensors").write_bytes(content)
    return copy


def pickled(world, tmp_path):
    copy = without(world, tmp_path, "*.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return copy


def remote_code(world, tmp_path):
    copy = without(world, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text("raise SystemExit('ran code of the checkpoint')")
    return copy


def offline(path, *flags):
    return ["tune", "--offline", "--target=sm_87", f"--output={path / 'sm_87.json'}", *flags]


def evaluate(world, store, *flags):
    return ["eval", store, f"--validation-file={world / 'held-out.txt'}", "--max-length=24", *flags]


# Each: what is typed (given the world and a place for files), and what the line must name.
MISTAKES = {
    "missing store": (lambda w, t: ["verify", t / "none"], ["none is not a directory"]),
    "missing store to train": (lambda w, t: train(w, t, store=t / "none"), ["none does not exist"]),
    "missing store to evaluate": (lambda w, t: evaluate(w, t / "none"), ["none is not a directory"]),
    "missing store to generate": (lambda w, t: ["generate", t / "none", "--prompt=the"], ["none is not a directory"]),
    "an empty directory as store": (lambda w, t: ["verify", t], ["no manifest.json; make one with `mebp quantize`"]),
    "a file as store": (lambda w, t: ["verify", w / "train.txt"], ["train.txt is not a directory"]),
    "a truncated store": (lambda w, t: ["verify", cut(w, t)], ["block-00001.safetensors has 500 bytes", "cut short"]),
    "training a truncated store": (lambda w, t: train(w, t, store=cut(w, t)), ["has 500 bytes and should have"]),
    "evaluating a truncated store": (lambda w, t: evaluate(w, cut(w, t)), ["has 500 bytes and should have"]),
    "verifying a flipped bit": (lambda w, t: ["verify", flipped(w, t)], ["block-00001.safetensors is damaged"]),
    "no config.json": (lambda w, t: ["quantize", without(w, t, "config.json"), t / "o"], ["config.json is missing"]),
    "training without config.json": (lambda w, t: train(w, t, store=without(w, t, "config.json")), ["no manifest"]),
    "only pickles": (lambda w, t: ["quantize", pickled(w, t), t / "o"], ["only pickled weights (pytorch_model.bin)"]),
    "training pickles": (lambda w, t: train(w, t, store=pickled(w, t)), ["only pickled weights"]),
    "code in the checkpoint": (lambda w, t: ["quantize", remote_code(w, t), t / "o"], ["'mine'", "never run"]),
    "training its code": (lambda w, t: train(w, t, store=remote_code(w, t)), ["'mine'", "never run"]),
    "no weights": (lambda w, t: ["quantize", without(w, t, "*.safetensors"), t / "o"], ["neither model.safetensors"]),
    "quantizing a text": (lambda w, t: ["quantize", w / "train.txt", t / "o"], ["train.txt"]),
    "quantizing nothing": (lambda w, t: ["quantize", t / "none", t / "o"], ["none does not exist"]),
    "quantizing onto something": (lambda w, t: ["quantize", w / "model", w / "store"], ["store exists already"]),
    "an unknown scheme": (lambda w, t: ["quantize", w / "model", t / "o", "--scheme=nf4"], ["'nf4'", "symmetric"]),
    "an unknown group size": (lambda w, t: ["quantize", w / "model", t / "o", "--group-size=48"], ["48", "32"]),
    "options for a store": (lambda w, t: train(w, t, "--scheme=affine"), ["--scheme and --group-size are for models"]),
    "no tokenizer": (
        lambda w, t: train(w, t, store=without(w, t, "tokenizer*", source="store")),
        ["tokenizer", "does not exist"],
    ),
    "a missing training file": (lambda w, t: train(w, t, train_file=t / "none.txt"), ["none.txt: no such file"]),
    "no training file": (lambda w, t: ["train", w / "store", f"--output-dir={t / 'run'}"], ["--train-file is missing"]),
    "no output directory": (lambda w, t: ["train", w / "store", "--train-file=a.txt"], ["--output-dir is missing"]),
    "an empty file": (lambda w, t: train(w, t, train_file=put(t, "a.txt", "")), ["a.txt: nothing to train on"]),
    "an empty validation file": (
        lambda w, t: train(w, t, f"--validation-file={put(t, 'v.txt', '')}"),
        ["validation-file", "v.txt: nothing to evaluate"],
    ),
    "an unknown suffix": (lambda w, t: train(w, t, train_file=put(t, "a.csv", "a,b")), ["unknown suffix '.csv'"]),
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
    "a model too short": (lambda w, t: train(w, t, "--max-length=65"), ["max_length 65", "64 tokens"]),
    "a model not quantized yet too short": (
        lambda w, t: train(w, t, "--max-length=65", store=w / "model"),
        ["max_length 65", "64 tokens"],
    ),
    "evaluating too long": (lambda w, t: evaluate(w, w / "store", "--max-length=65"), ["max_length 65", "64"]),
    "evaluating nothing": (lambda w, t: evaluate(w, w / "store", "--max-eval-windows=0"), ["--max-eval-windows", "0"]),
    "evaluating a missing file": (
        lambda w, t: ["eval", w / "store", f"--validation-file={t / 'none.txt'}"],
        ["none.txt: no such file"],
    ),
    "evaluating without a file": (lambda w, t: ["eval", w / "store"], ["--validation-file"]),
    "rank 0": (lambda w, t: train(w, t, "--lora-r", "0"), ["lora_r must be at least 1, got 0"]),
    "a negative rate": (lambda w, t: train(w, t, "--learning-rate=-1"), ["learning_rate must be positive, got -1.0"]),
    "a rate of nan": (lambda w, t: train(w, t, "--learning-rate=nan"), ["learning_rate must be finite, got nan"]),
    "a word for a number": (lambda w, t: train(w, t, "--max-steps=many"), ["--max-steps", "'many'"]),
    "dropout 1": (lambda w, t: train(w, t, "--lora-dropout=1"), ["lora_dropout must lie in [0, 1), got 1.0"]),
    "an unknown mode": (lambda w, t: train(w, t, "--selection-mode=some"), ["--selection-mode", "'some'", "identity"]),
    "mezo with a selection": (lambda w, t: train(w, t, "--optim=mezo", "--selection-mode=exact"), ["'mezo'"]),
    "modules that are not there": (lambda w, t: train(w, t, "--target-modules=c_attn"), ["c_attn", "matches no"]),
    "a broken pattern": (lambda w, t: train(w, t, "--target-modules=(q"), ["(q", "not a regular expression"]),
    "an unknown flag": (lambda w, t: train(w, t, "--learning-rat=1"), ["did you mean --learning-rate?"]),
    "an abbreviated flag": (lambda w, t: train(w, t, "--learning=1"), ["unrecognized arguments: --learning=1"]),
    "an unknown command": (lambda w, t: ["trian", w / "store"], ["'trian'", "train"]),
    "no command": (lambda w, t: [], ["COMMAND"]),
    "a device that is not here": (lambda w, t: train(w, t, "--device=cuda:99"), ["'cuda:99' is not here"]),
    "a device that is none": (lambda w, t: train(w, t, "--device=gpu"), ["device must be", "'gpu'"]),
    "evaluating on no device": (lambda w, t: evaluate(w, w / "store", "--device=gpu"), ["device must be", "'gpu'"]),
    "a backend that cannot": (lambda w, t: train(w, t, "--backend=triton"), ["'triton'", "panel"]),
    "a used run directory": (lambda w, t: train(w, w, output="run"), ["run exists already"]),
    "a file as run directory": (lambda w, t: train(w, w, output="train.txt"), ["train.txt exists already"]),
    "resuming nothing": (lambda w, t: train(w, t, "--resume"), ["there is no checkpoint in", "to resume from"]),
    "resuming from elsewhere": (lambda w, t: train(w, t, f"--resume-from-checkpoint={t}"), ["there is no checkpoint"]),
    "resuming with another rank": (
        lambda w, t: train(w, w, "--lora-r=4", "--resume"),
        ["cannot resume: lora_r was 2 and now is 4"],
    ),
    "two ways to resume": (
        lambda w, t: train(w, w, "--resume", f"--resume-from-checkpoint={w / 'run' / 'checkpoint'}"),
        ["--resume and --resume-from-checkpoint"],
    ),
    "resuming into a used directory": (
        lambda w, t: train(w, w, f"--resume-from-checkpoint={w / 'run' / 'checkpoint'}", output="wide"),
        ["wide exists already"],
    ),
    "resuming elsewhere with another rank": (
        lambda w, t: train(w, t, f"--resume-from-checkpoint={w / 'run' / 'checkpoint'}", "--lora-r=4"),
        ["cannot resume: lora_r was 2 and now is 4"],
    ),
    "an adapter of another family": (
        lambda w, t: evaluate(w, w / "gpt2" / "store", f"--adapter={w / 'run' / 'adapter'}"),
        ["matches no linear layer"],
    ),
    "an adapter of another width": (
        lambda w, t: evaluate(w, w / "wide" / "store", f"--adapter={w / 'run' / 'adapter'}"),
        ["does not fit this model", "shape"],
    ),
    "no adapter": (lambda w, t: evaluate(w, w / "store", f"--adapter={t}"), ["is no adapter", "adapter_config.json"]),
    "generating with no adapter": (
        lambda w, t: ["generate", w / "store", "--prompt=the", f"--adapter={t / 'none'}"],
        ["is no adapter"],
    ),
    "an empty prompt": (lambda w, t: ["generate", w / "store", "--prompt="], ["--prompt is empty"]),
    "no prompt": (lambda w, t: ["generate", w / "store"], ["--prompt"]),
    "no new tokens": (lambda w, t: ["generate", w / "store", "--prompt=a", "--max-new-tokens=0"], ["got 0"]),
    "more tokens than the model takes": (
        lambda w, t: ["generate", w / "store", "--prompt=the cat", "--max-new-tokens=63"],
        ["65 tokens", "64"],
    ),
    "a seed too large": (
        lambda w, t: ["generate", w / "store", "--prompt=the", f"--seed={1 << 63}"],
        ["--seed must lie in"],
    ),
    "a negative temperature": (lambda w, t: ["generate", w / "store", "--prompt=a", "--temperature=-1"], ["-1.0"]),
    "a missing settings file": (lambda w, t: train(w, t, f"--config={t / 'a.yaml'}"), ["a.yaml does not exist"]),
    "an unknown setting": (
        lambda w, t: train(w, t, f"--config={put(t, 'a.yaml', 'lora-rr: 3')}"),
        ["unknown setting 'lora-rr'; did you mean 'lora_r'?"],
    ),
    "tuning without a device": (
        lambda w, t: ["tune", "--shapes=64x64", f"--output={t / 'a.json'}"],
        ["no CUDA device here", "--offline --target sm_87"],
    ),
    "tuning for another device": (lambda w, t: ["tune", "--shapes=64x64", "--target=sm_90"], ["no CUDA device here"]),
    "tuning offline for nobody": (lambda w, t: ["tune", "--offline", "--shapes=64x64"], ["such as --target sm_87"]),
    "an unknown target": (lambda w, t: ["tune", "--offline", "--target=h100", "--shapes=64x64"], ["'h100'", "sm_90"]),
    "tuning for no shapes": (lambda w, t: offline(t), ["--store DIR, --model DIR_OR_CONFIG or --shapes"]),
    "tuning for two things": (lambda w, t: offline(t, "--shapes=4x4", f"--store={w / 'store'}"), ["not allowed with"]),
    "a shape that is none": (lambda w, t: offline(t, "--shapes=64x64x64"), ["NxK", "'64x64x64'"]),
    "an M of zero": (lambda w, t: offline(t, "--shapes=64x64", "--m=0"), ["'0'", "1..4096"]),
    "a limit of zero": (lambda w, t: offline(t, "--shapes=64x64", "--limit=0"), ["--limit must be at least 1, got 0"]),
    "tuning for a missing store": (lambda w, t: offline(t, f"--store={t / 'none'}"), ["none is not a directory"]),
    "tuning for a missing model": (lambda w, t: offline(t, f"--model={t / 'none'}"), ["none does not exist"]),
    "tuning for a broken config": (
        lambda w, t: offline(t, f"--model={put(t, 'config.json', '{')}"),
        ["config.json is not valid JSON"],
    ),
    "tuning for foreign code": (
        lambda w, t: offline(t, f"--model={remote_code(w, t)}"),
        ["needs code from the checkpoint, which is never run"],
    ),
    "a directory as table": (
        lambda w, t: ["tune", "--offline", "--target=sm_87", "--shapes=64x64", f"--output={t}"],
        ["is a directory", "--output"],
    ),
    "a report of nothing": (
        lambda w, t: ["tune", "--report", "--target=sm_87", f"--output={t / 'a.json'}"],
        ["nothing was tuned for sm_87 yet", "a.json"],
    ),
    "a report that tunes": (lambda w, t: offline(t, "--report"), ["--report tunes nothing"]),
    "a report of no device": (lambda w, t: ["tune", "--report"], ["such as --target sm_87"]),
    "a demo of no steps": (lambda w, t: ["demo", "--max-steps=0", f"--output-dir={t / 'd'}"], ["--max-steps", "got 0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, monkeypatch, name):
    if "tun" in name or "report" in name:  # what these do depends on the machine
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    typed, parts = MISTAKES[name]
    arguments = typed(world, tmp_path)
    before = tree(world, tmp_path)
    one_line(mebp(*arguments), *parts)
    assert tree(world, tmp_path) == before


def test_a_mistake_as_json_is_no_json(mebp, world, tmp_path):
    one_line(mebp("verify", tmp_path / "none", "--json"), "none is not a directory")


def test_a_damaged_block_is_found_in_the_step_that_uses_it(mebp, world, tmp_path):
    """Not a user's mistake alone: loading may have begun, but no adapter comes of it."""
    code, out, err = mebp(*train(world, tmp_path, store=flipped(world, tmp_path)))
    assert code == 2 and "block-00001.safetensors is damaged: checksum of bytes" in err and out == ""
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "run.json").exists()


def test_in_a_process_of_its_own(world, tmp_path):
    """As a shell sees it: nothing but the line on standard error, no traceback, no library's chatter."""
    program = [sys.executable, "-m", "mebp_triton.cli.main"]
    child = subprocess.run(
        [*program, "train", str(world / "store"), "--train-file=none.txt", f"--output-dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        env=quiet(),
        check=False,
    )
    assert child.returncode == 2 and child.stdout == ""
    assert child.stderr == "mebp: error: train-file none.txt: no such file; give a .txt, .jsonl or .parquet file\n"
    child = subprocess.run(
        [*program, *evaluate(world, str(world / "store"), "--json")],
        capture_output=True,
        text=True,
        env=quiet(),
        check=False,
    )
    assert child.returncode == 0 and json.loads(child.stdout)["windows"] == 4
    assert "Traceback" not in child.stderr and "Warning" not in child.stderr


# --- tune -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def few_candidates(monkeypatch):
    """Three, so that compiling takes seconds."""
    from mebp_triton.autotune import rank

    real = rank.candidates
    monkeypatch.setattr(rank, "candidates", lambda problem, target: real(problem, target)[:3])


def test_tune_offline(mebp, tmp_path, monkeypatch, no_device, few_candidates):
    """From nothing to the table that a launch reads, the report and the plot."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["tune", "--offline", "--target=sm_87", "--shapes=256x128", "--m=16", "--limit=2"]
    value = answer(mebp(*command, "--json"))
    table = tmp_path / "mebp-triton" / "tables" / "sm_87.json"
    assert value["table"] == str(table) and value["architecture"] == "sm_87" and value["tuned"] == 2
    assert [(row["kernel"], row["m"], row["n"], row["k"]) for row in value["rows"]] == [
        ("matmul", 16, 256, 128),
        ("matmul_dx", 16, 256, 128),
    ]
    assert all(row["provenance"] == "static" and row["device"] is None and row["of_copy"] < 1 for row in value["rows"])
    assert len(read_table(table, "sm_87")) == 2
    tables.forget_tables()
    problem = Problem("matmul", 10, 256, 128)
    assert describe_route(tables.choose(problem, "sm_87")) == value["rows"][0]["route"]
    # What was ranked is not ranked again; the report shows it.
    assert answer(mebp(*command, "--json"))["tuned"] == 0
    reported = answer(mebp("tune", "--report", "--target=sm_87", "--json", f"--plot={tmp_path / 'plot.png'}"))
    # With all that is shipped.
    assert [row for row in reported["rows"] if row in value["rows"]] == value["rows"]
    assert list(reported["ceilings"]) == ["data sheet"] and all(row["gb_s"] > 0 for row in reported["rows"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = mebp("tune", "--report", "--target=sm_87", "--shapes=256x128", "--m=16")
    assert code == 0 and "256x128" in out and "predicted" in out and err == ""
    one_line(mebp("tune", "--report", "--target=sm_87", "--shapes=262144x128"), "no such entry")
    tables.forget_tables()


def ranked_problems(monkeypatch):
    """Nothing is compiled: what would have been ranked, problem by problem."""
    from mebp_triton.cli.commands import tune

    asked = []

    def model_rank(architecture, limit=None, progress=None):
        return lambda problem: asked.append(problem) or [Trial(None, 1.0)]

    monkeypatch.setattr(tune, "model_rank", model_rank)
    return asked


def test_tune_for_a_store(mebp, world, tmp_path, monkeypatch, no_device):
    asked = ranked_problems(monkeypatch)
    answer(mebp(*offline(tmp_path, f"--store={world / 'store'}", "--m=16", "--json")))
    info = next(iter(Store(world / "store").matrices.values()))
    assert {(p.scheme, p.group_size, p.dtype) for p in asked} == {(info.scheme, info.group_size, torch.bfloat16)}
    # All shapes of so small a model lie in the smallest buckets, but for the fused gate and up.
    assert {(p.kernel, p.n, p.k) for p in asked} >= {(kernel, 160, 48) for kernel in ("matmul", "matmul_dx")}
    assert len(read_table(tmp_path / "sm_87.json", "sm_87")) == len(asked)


@pytest.mark.parametrize(
    ("target", "flag", "dtype"),
    [("sm_75", [], torch.float16), ("sm_90", [], torch.bfloat16), ("sm_75", ["--dtype=float32"], torch.float32)],
)
def test_tune_for_a_config(mebp, world, tmp_path, monkeypatch, no_device, target, flag, dtype):
    asked = ranked_problems(monkeypatch)
    command = ["tune", "--offline", f"--target={target}", f"--output={tmp_path / 'table.json'}", "--scheme=affine"]
    answer(mebp(*command, f"--model={world / 'model' / 'config.json'}", "--group-size=128", "--json", *flag))
    assert {(p.scheme, p.group_size, p.dtype) for p in asked} == {("affine", 128, dtype)}
    assert {p.m for p in asked} == set(tables.M_BUCKETS)


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("loss is nan"), 1, "mebp: error: loss is nan\n"),
        (RuntimeError("two\nlines"), 1, "mebp: error: RuntimeError: two lines (--debug shows where)\n"),
        (KeyError("x"), 1, "mebp: error: KeyError: 'x' (--debug shows where)\n"),
        (OSError(28, "No space left"), 1, "mebp: error: [Errno 28] No space left (--debug shows where)\n"),
        (OSError(28, "No space left", "run"), 1, "mebp: error: [Errno 28] No space left: 'run'\n"),
        (MemoryError(), 1, OUT_OF_MEMORY),
        (RuntimeError("can't allocate memory: you tried to allocate 8 bytes"), 1, OUT_OF_MEMORY),
        (ValueError("a\n  mistake"), 2, "mebp: error: a mistake\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "mebp: error: [Errno 2] No such file: 'x'\n"),
        (PermissionError(13, "Permission denied", "x"), 2, "mebp: error: [Errno 13] Permission denied: 'x'\n"),
        (KeyboardInterrupt(), 130, "mebp: interrupted\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_every_failure_has_its_exit_code(mebp, world, monkeypatch, error, code, line):
    def fail(arguments):
        raise error

    monkeypatch.setattr("mebp_triton.cli.commands.verify.run", fail)
    assert mebp("verify", world / "store") == (code, "", line)
    if isinstance(error, Exception) and not isinstance(error, BrokenPipeError):
        with pytest.raises(type(error)):
            main(["verify", "x", "--debug"])


def test_an_interrupted_training_says_how_to_go_on(mebp, world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mebp_triton.cli.commands.train.run", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    line = "mebp: interrupted; --resume goes on from the last checkpoint\n"
    assert mebp(*train(world, tmp_path)) == (130, "", line)


def test_an_interrupted_tuning_says_how_to_go_on(mebp, monkeypatch):
    monkeypatch.setattr("mebp_triton.cli.commands.tune.run", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert mebp("tune") == (130, "", "mebp: interrupted; the same command goes on\n")


# --- signals --------------------------------------------------------------------------------------------------------


def tell(number):
    os.kill(os.getpid(), number)


def told(monkeypatch, owner, name, number, at=1):
    """The ``at``-th call of a function is told by a signal, before it does what it does."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            tell(number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_told_to_stop_finishes_the_step_and_goes_on_from_there(
    mebp, world, tmp_path, monkeypatch, number, code
):
    command = ["train", world / "store", *texts(world), *QUICK, f"--output-dir={tmp_path / 'run'}", "--json"]
    with monkeypatch.context() as patch:
        told(patch, Trainer, "_one_step", number, at=2)
        found, out, err = mebp(*command)
    assert (found, out) == (code, "")
    assert err.splitlines()[-1] == "mebp: interrupted after step 2 of 3; --resume goes on from there"
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoint", "adapter", "metrics.jsonl", "evaluation_before.json"}
    value, whole = answer(mebp(*command, "--resume")), json.loads((world / "run" / "run.json").read_text())
    assert value["resumed_at_step"] == 2
    for key in ("loss_before", "loss_after", "train_loss_last", "token_accuracy_after", "steps"):
        assert value[key] == whole[key], key
    bytes_of = [path / "adapter" / "adapter_model.safetensors" for path in (tmp_path / "run", world / "run")]
    assert bytes_of[0].read_bytes() == bytes_of[1].read_bytes()


def test_a_training_that_is_told_twice_exits_at_once(mebp, world, tmp_path):
    """In the third step, with a checkpoint after the second; and again while that of the third is written."""
    command = ["train", str(world / "store"), *texts(world), *QUICK, f"--output-dir={tmp_path / 'run'}"]
    code = (
        "import os, signal, sys\n"
        "from mebp_triton import files, trainer\n"
        "def tell():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "real, finish = trainer.Trainer._one_step, files._finish_directory\n"
        "trainer.Trainer._one_step = lambda self, b: (self.step == 2 and tell(), real(self, b))[1]\n"
        "reached = []\n"
        "def finishing(directory):\n"
        "    finish(directory)\n"
        "    reached.append(1)\n"
        "    if len(reached) == 2:\n"
        "        tell()\n"
        "files._finish_directory = finishing\n"
        "from mebp_triton.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, *command, "--save-steps=2"],
        capture_output=True,
        text=True,
        env=quiet(),
        check=False,
    )
    assert (
        child.returncode == 143 and child.stderr.endswith("mebp: stopped at once\n") and "Traceback" not in child.stderr
    )
    assert json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())["step"] == 2
    assert answer(mebp(*command, "--resume", "--save-steps=2", "--json"))["resumed_at_step"] == 2
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(temporaries.TEMPORARY_PREFIX)]


@pytest.mark.parametrize("place", ["loading", "evaluating before", "evaluating after"])
def test_a_training_interrupted_outside_of_its_steps(mebp, world, tmp_path, monkeypatch, place):
    command = ["train", world / "store", *texts(world), *QUICK, f"--output-dir={tmp_path / 'run'}"]
    owner, name, at = {
        "loading": (commands.train, "load", 1),
        "evaluating before": (evaluate_module, "collate", 1),
        "evaluating after": (evaluate_module, "collate", 7),
    }[place]
    with monkeypatch.context() as patch:
        told(patch, owner, name, signal.SIGTERM, at)
        code, out, err = mebp(*command)
    assert (code, out) == (143, "")
    assert err.splitlines()[-1] == "mebp: interrupted; --resume goes on from the last checkpoint"
    if place == "evaluating after":
        assert answer(mebp(*command, "--resume", "--json"))["steps"] == 3
    else:
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["quantize", "merge", "merge a store", "tune", "eval", "parsing"])
def test_other_commands_end_with_one_line_and_leave_nothing(
    mebp, world, tmp_path, monkeypatch, name, number, code, no_device
):
    from mebp_triton.cli import main as main_module
    from mebp_triton.cli.commands import tune
    from mebp_triton.convert import quantize

    adapter = f"--adapter={world / 'run' / 'adapter'}"
    arguments, owner, function, at = {
        "quantize": (["quantize", world / "model", tmp_path / "out"], quantize, "quantize_matrix", 9),
        "merge": (["merge", world / "store", tmp_path / "out", adapter], merge, "_rounded", 9),
        "merge a store": (
            ["merge", world / "store", tmp_path / "out", adapter, "--as-store"],
            quantize,
            "quantize_matrix",
            9,
        ),
        "tune": (offline(tmp_path, "--shapes=256x128", "--m=16"), tune, "_tune", 1),
        "eval": (evaluate(world, world / "store"), evaluate_module, "collate", 2),
        "parsing": (["doctor"], main_module, "_build_parser", 1),
    }[name]
    told(monkeypatch, owner, function, number, at)
    found, out, err = mebp(*arguments)
    hint = "; the same command goes on" if name == "tune" else ""
    assert (found, out, err.splitlines()[-1]) == (code, "", f"mebp: interrupted{hint}")
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_a_run_whose_loss_is_not_a_number_exits_with_1(mebp, world, tmp_path):
    code, out, err = mebp(*train(world, tmp_path, "--learning-rate=1e30", "--max-grad-norm=0"))
    assert code == 1 and out == ""
    assert err.splitlines()[-1].startswith("mebp: error: ") and " at step " in err.splitlines()[-1]


def test_every_command_is_tried_above():
    atomic = {path.stem for path in Path(commands.__file__).parent.glob("*.py")}
    assert atomic - {"__init__", "common"} == set(COMMANDS)
