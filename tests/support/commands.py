"""What tests of the command share: arguments, checks of what comes of them, and runs that a signal or a kill ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mebp_triton.cli.main import main
from mebp_triton.system import atomic
from mebp_triton.training.step import Passes, StepInputs

Result = tuple[int, str, str]  # exit code, standard output, standard error
QUICK = ["--max-steps=3", "--max-length=24", "--lora-r=2", "--learning-rate=0.02", "--device=cpu"]


# --- arguments ------------------------------------------------------------------------------------------------------


def texts(world: Path) -> list[str]:
    return [f"--train-file={world / 'train.txt'}", f"--validation-file={world / 'held-out.txt'}"]


def train(
    world: Path,
    place: Path,
    *flags: str,
    store: Path | None = None,
    output: str = "run",
    train_file: Path | None = None,
) -> list[Any]:
    """A short training without evaluation, into a directory of ``place``."""
    files = [f"--train-file={train_file or world / 'train.txt'}", f"--output-dir={place / output}"]
    return ["train", store or world / "store", *files, *QUICK, *flags]


def evaluate(world: Path, store: Path, *flags: str) -> list[Any]:
    return ["eval", store, f"--validation-file={world / 'held-out.txt'}", "--max-length=24", *flags]


def tune_offline(place: Path, *flags: str) -> list[Any]:
    return ["tune", "--offline", "--target=sm_87", f"--output={place / 'sm_87.json'}", *flags]


def adapter(world: Path) -> str:
    return f"--adapter={world / 'run' / 'adapter'}"


# --- files ----------------------------------------------------------------------------------------------------------


def put(place: Path, name: str, content: str | bytes) -> Path:
    (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return place / name


def without(world: Path, place: Path, *names: str, source: str = "model") -> Path:
    """A copy of the world's model, or of its store, that lacks some files."""
    return Path(shutil.copytree(world / source, place / "copy", ignore=shutil.ignore_patterns(*names)))


def truncated(world: Path, place: Path) -> Path:
    """A copy of the store with a block cut short."""
    copy = without(world, place, source="store")
    os.truncate(copy / "block-00001.safetensors", 500)
    return copy


def flipped(world: Path, place: Path) -> Path:
    """A copy of the store with one bit changed."""
    copy = without(world, place, source="store")
    content = bytearray((copy / "block-00001.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "block-00001.safetensors").write_bytes(content)
    return copy


def pickled(world: Path, place: Path) -> Path:
    """A model whose weights are pickled."""
    copy = without(world, place, "*.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return copy


def with_remote_code(world: Path, place: Path) -> Path:
    """A model that names code of its own."""
    copy = without(world, place)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text("raise SystemExit('ran code of the checkpoint')")
    return copy


def tree(*roots: Path) -> dict[Path, tuple[int, int] | None]:
    """All paths below ``roots``; of files their sizes, and when they were written."""
    paths = [path for root in roots for path in root.rglob("*")]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None for path in paths}


# --- what comes of a command ----------------------------------------------------------------------------------------


def answer(result: Result) -> Any:
    """The JSON that a command printed."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def assert_one_line(result: Result, *parts: str) -> None:
    """A user's mistake: exit code 2, and one line that has all ``parts``."""
    code, out, err = result
    assert code == 2, (code, err)
    assert out == ""
    assert err.startswith("mebp: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for part in parts:
        assert part in err, err


def assert_refused(mebp: Callable[..., Result], arguments: list[Any], parts: list[str], *places: Path) -> None:
    """A user's mistake, after which ``places`` are as they were before."""
    before = tree(*places)
    assert_one_line(mebp(*arguments), *parts)
    assert tree(*places) == before


def record(run: Path) -> Any:
    """What ``run.json`` holds."""
    return json.loads((run / "run.json").read_text())


def metrics(run: Path) -> list[Any]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


# --- signals and kills ----------------------------------------------------------------------------------------------


def tell(number: int) -> None:
    os.kill(os.getpid(), number)


def tell_at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, at: int = 1) -> None:
    """Sends signal ``number`` to this process before the ``at``-th call of a function."""
    real, calls = getattr(owner, name), []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == at:
            tell(number)
        return real(*arguments, **options)

    patch.setattr(owner, name, call)


def before_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Has ``act`` called before the passes of training step ``step``, from 0."""
    real = Passes.forward_and_backward

    def passes(self: Passes, inputs: StepInputs) -> Any:
        if inputs.step == step:
            act()
        return real(self, inputs)

    patch.setattr(Passes, "forward_and_backward", passes)


def killed_before_step(step: int, arguments: list[str]) -> None:
    """For a process of its own: ``mebp``, which ends without a word before step ``step``."""
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, step, lambda: os._exit(9))
        sys.exit(main(arguments))


def told_twice(arguments: list[str]) -> None:
    """For a process of its own: ``mebp``, told to end in the third step, and again in the next checkpoint's writing."""
    replace, checkpoints = atomic.replace_directory, []

    def replacing(path: Path, write: Callable[[Path], None]) -> None:
        def writing(directory: Path) -> None:
            write(directory)
            checkpoints.append(directory)
            if path.name == "checkpoint" and len(checkpoints) == 2:
                tell(signal.SIGTERM)

        replace(path, writing)

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 2, lambda: tell(signal.SIGTERM))
        patch.setattr(atomic, "replace_directory", replacing)
        sys.exit(main(arguments))
