"""Studies which blocks to train: the loss of each mode, ratio, schedule and update policy, in equal steps and time.

    python bench/study/run.py speed speed-256 --train-file valid.txt --validation-file test.txt     # on a quiet machine
    python bench/study/run.py modes schedules baselines rates instructions divergence bias ... --workers 2
    python bench/study/report.py                                                           # docs/selection.md's figures

SmolLM2-135M is trained on WikiText-2, and on questions about Python's language reference (the text of CPython's
``help``). Every finished run becomes a file in ``bench/results/study``; a run whose file is there is not repeated. In
full's time a faster row makes more steps: its runs are longer, and the report interpolates by the times of ``speed``.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from grid import COMMON, HALVES, LONGEST, MODES, PAIRS, PARTS, STEPS, TIMED

import mebp_triton as mebp
from mebp_triton.blocks.options import Schedule
from mebp_triton.blocks.selection import select_blocks
from mebp_triton.cli.commands.demo import find_model
from mebp_triton.data.loading import load_data
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.system import strict_json
from mebp_triton.system.errors import RunError
from mebp_triton.system.machine import environment
from mebp_triton.system.memory import peak_resident_bytes
from mebp_triton.training.evaluation import evaluate
from mebp_triton.training.run_directory import RunDirectory
from mebp_triton.training.run_settings import RunSettings, resolve
from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.trainer import Trainer

RESULTS = Path(__file__).resolve().parent.parent / "results" / "study"
EVALUATED = 24  # windows of held-out text
BIASED: tuple[Schedule, ...] = ("cyclic", "strided")


def write_instructions(directory: Path) -> tuple[Path, Path]:
    """Writes questions about Python's language reference, with its paragraphs as answers.

    Returns:
        The files of training rows and of held-out rows: those of every fourth topic.
    """
    from pydoc_data.topics import topics

    paths = directory / "instructions-train.jsonl", directory / "instructions-test.jsonl"
    rows: tuple[list[str], list[str]] = ([], [])
    for number, (topic, text) in enumerate(sorted(topics.items())):
        question = f"Explain the topic {topic!r} of the Python language reference.\n"
        for paragraph in text.split("\n\n")[:6]:
            answer = " ".join(paragraph.split())
            if len(answer) > 40:
                rows[number % 4 == 3].append(json.dumps({"prompt": question, "completion": answer}))
    for path, lines in zip(paths, rows, strict=True):
        path.write_text("\n".join(lines) + "\n")
    return paths


def prepared(
    store: Path, training: TokenizedData, row: dict[str, Any], seed: int, steps: int, scratch: Path
) -> Trainer:
    """Makes a model and its trainer, which writes no checkpoints: no run of the study is resumed."""
    settings = settings_of(row, seed, steps, scratch / "run")
    model = mebp.load(
        store,
        settings.lora(),
        weights="file",
        checkpoints="device",
        dtype=settings.dtype,
        seed=settings.seed,
        scratch_directory=scratch,
        recompute_granularity=settings.recompute_granularity,
    )
    trainer = Trainer(model, training, settings, RunDirectory(scratch / "run"))
    trainer.checkpoint.save = lambda position: None  # type: ignore[method-assign]
    return trainer


def settings_of(row: dict[str, Any], seed: int, steps: int, run: Path) -> RunSettings:
    places: dict[str, Any] = {"device": "cpu", "output_dir": str(run), "train_file": "text", "checkpoints": "device"}
    return resolve(TrainConfig(**(COMMON | row | places), seed=seed, max_steps=steps))


def train(
    store: Path, texts: Sequence[Path], row: dict[str, Any], seed: int, steps: int, evaluated: Sequence[int]
) -> dict[str, Any]:
    """Runs ``steps``, and evaluates the held-out text after the steps of ``evaluated``."""
    training, held_out = (tokenized(store, path, (COMMON | row)["max_length"]) for path in texts)
    found: dict[str, Any] = {"settings": row, "seed": seed, "evaluations": {}, "losses": [], "seconds": []}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = prepared(store, training, row, seed, steps, Path(scratch))

        def keep(result: Any) -> None:
            found["losses"].append(result.loss)
            found["seconds"].append(result.seconds)
            if result.step + 1 in evaluated:
                after = evaluate(trainer.model, held_out, EVALUATED)
                found["evaluations"][result.step + 1] = [after.loss, after.token_accuracy]

        try:
            trainer.train(keep)
        except RunError as error:  # a loss or a gradient is not finite: the divergence part looks for this
            found["diverged"] = str(error)
        found["peak_rss_bytes"] = peak_resident_bytes()
    return found


@functools.lru_cache(4)
def tokenized(store: Path, path: Path, max_length: int = COMMON["max_length"]) -> TokenizedData:
    from transformers import AutoTokenizer

    return load_data(path, AutoTokenizer.from_pretrained(store), max_length)


def speed(store: Path, texts: Sequence[Path]) -> dict[str, Any]:
    """Times a step of every row in TIMED beside one of full's."""
    return _beside_full(store, texts, TIMED, {})


def speed_256(store: Path, texts: Sequence[Path]) -> dict[str, Any]:
    """Times the rows with half of the blocks at 256 tokens, for both granularities of the recompute.

    SystemExit unless the losses of all first steps are the same bits.
    """
    halves = {name: row for name, row in HALVES.items() if name != "full"}
    found = {}
    for granularity in ("selective", "full"):
        longer = {"max_length": 256, "recompute_granularity": granularity}
        found[granularity] = taken = _beside_full(store, texts, halves, longer)
        firsts = {loss for losses in taken["first_losses"].values() for loss in losses}
        if len(firsts) != 1:
            raise SystemExit(f"the same weights gave other losses: {firsts}")
    return found


def _beside_full(
    store: Path, texts: Sequence[Path], rows: dict[str, dict[str, Any]], more: dict[str, Any]
) -> dict[str, Any]:
    """Times each row in ``PAIRS`` of a step of full and one of its own, after a first step of both.

    Other work on the machine comes and goes within minutes, and slows both steps of a pair. ``PAIRS`` steps are whole
    rounds of every schedule.

    Returns:
        By row: the seconds of both sides, the row's sum relative to full's, and the losses of the first steps.
    """
    found: dict[str, Any] = {"seconds": {}, "relative": {}, "first_losses": {}}
    training = tokenized(store, texts[0], (COMMON | more).get("max_length"))
    for name, row in rows.items():
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            sides = [
                prepared(store, training, kind | more, 0, 1, Path(place))
                for kind, place in ((MODES["full"], first), (row, second))
            ]
            results: list[list[Any]] = [[], []]
            for step in range(PAIRS + 1):
                for side, taken in zip(sides, results, strict=True):
                    side.total_steps = step + 1
                    taken += side.train()
        seconds = [[result.seconds for result in taken[1:]] for taken in results]
        found["seconds"][name] = seconds
        found["relative"][name] = sum(seconds[1]) / sum(seconds[0])
        found["first_losses"][name] = [taken[0].loss for taken in results]
        print(name, f"{found['relative'][name]:.3f} of full's {statistics.fmean(seconds[0]):.3f} s", flush=True)
    return found


def bias(store: Path, texts: Sequence[Path], batches: int = 3) -> dict[str, Any]:
    """Compares each selected block's gradient with the true one, by cosine and ratio of norms."""
    training = tokenized(store, texts[0])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = prepared(store, training, MODES["full"], 0, 30, Path(scratch))
        trainer.train()  # B is zero before, and so is A's gradient
        model = trainer.model.train()
        engine = model.mebp.engine
        rows = []
        for number in range(batches):
            ids = training[number * 7].input_ids[None]
            engine.treatment = lambda index: "train"
            truth = gradients(model, ids)
            for ratio in (0.25, 0.5, 0.75):
                for schedule in BIASED:
                    for place in range(len(engine.blocks)):
                        selected = select_blocks(place, len(truth), ratio, schedule)
                        engine.treatment = lambda index, chosen=selected: "train" if index in chosen else "identity"
                        found = gradients(model, ids)
                        for index in selected:
                            a, b = found[index].double(), truth[index].double()
                            cosine = float(a @ b / (a.norm() * b.norm()))
                            rows.append([number, ratio, schedule, index, cosine, float(a.norm() / b.norm())])
            print(f"batch {number + 1} of {batches}", flush=True)
    return {"columns": ["batch", "ratio", "schedule", "block", "cosine", "norm_ratio"], "rows": rows}


def gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The LoRA gradient of every block as one vector; empty where a block has none."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    engine = model.mebp.engine
    found = []
    for index in range(len(engine.blocks)):
        grads = [p.grad.flatten() for p in engine.trainable(index) if p.grad is not None]
        found.append(torch.cat(grads) if grads else torch.zeros(0))
    return found


MEASUREMENTS = {"speed": speed, "speed-256": speed_256, "bias": bias}


def evaluated_after(name: str, part: str) -> list[int]:
    """The steps after which a run is evaluated: ``STEPS``, and for equal time as many as a fast row makes."""
    if part not in ("modes", "baselines", "schedules") or name == "full":
        return [STEPS]
    ratio = PARTS[part][0][name].get("selected_ratio", 1.0)
    return [STEPS, next(steps for most, steps in LONGEST if ratio <= most)]


def work(job: dict[str, Any]) -> str:
    """Makes one run and writes its file; for a process of its own."""
    torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    texts, evaluated = [Path(path) for path in job["texts"]], job["steps"]
    found = train(Path(job["store"]), texts, job["row"], job["seed"], max(evaluated), evaluated)
    path = Path(job["path"])
    strict_json.write_json(path, found | {"threads": job["threads"]})
    last = next(reversed(found["evaluations"].values()), [math.nan])[0]
    return f"{path.stem}: {last:.4f} in {time.perf_counter() - started:.0f} s"


def jobs_of(part: str, store: Path, texts: dict[str, Sequence[Path]], threads: int) -> list[dict[str, Any]]:
    rows, text, seeds = PARTS[part]
    jobs = []
    for seed in seeds:
        for name, row in rows.items():
            path = RESULTS / part / f"{name}-seed{seed}.json"
            job = {"store": str(store), "texts": [str(one) for one in texts[text]], "row": row, "seed": seed}
            job |= {"steps": evaluated_after(name, part), "path": str(path), "threads": threads}
            if not path.exists():
                jobs.append(job)
    return jobs


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*MEASUREMENTS, *PARTS])
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--validation-file", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=0, help="of each; as many as torch takes by default")
    arguments = parser.parse_args(given)
    threads = arguments.threads or max(1, torch.get_num_threads() // arguments.workers)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "smollm2"
        command = [sys.executable, "-m", "mebp_triton.cli", "quantize", str(find_model()), str(store), "--json"]
        subprocess.run(command, check=True, capture_output=True)
        language = (arguments.train_file.resolve(), arguments.validation_file.resolve())
        texts = {"language": language, "instructions": write_instructions(Path(scratch))}
        for part in arguments.parts:
            if part in MEASUREMENTS:
                found = MEASUREMENTS[part](store, language)
                strict_json.write_json(
                    RESULTS / f"{part}.json", found | {"threads": threads, "environment": environment()}
                )
                continue
            (RESULTS / part).mkdir(parents=True, exist_ok=True)
            jobs = jobs_of(part, store, texts, threads)
            with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
                for line in pool.imap(work, jobs):
                    print(part, line, flush=True)


if __name__ == "__main__":
    main()
