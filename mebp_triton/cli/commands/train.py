"""``mebp train``: fine-tunes a store, or a model that is quantized first."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch

from mebp_triton.cli.console import answer, console, progress_bar, readable, two_columns
from mebp_triton.cli.inference import DTYPES, check_length, load_tokenizer, model_config
from mebp_triton.convert.readers import open_source
from mebp_triton.data.loading import load_data
from mebp_triton.data.packing import pack
from mebp_triton.data.sources import check_source
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.models.load import load
from mebp_triton.store.manifest import MANIFEST
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic, strict_json
from mebp_triton.system.errors import CannotTrace, Interrupted
from mebp_triton.system.memory import peak_resident_bytes, return_free_memory, return_large_freed_memory
from mebp_triton.system.signals import noting
from mebp_triton.system.units import MIB, parse_size
from mebp_triton.training.finetune import finetune
from mebp_triton.training.plan.planner import Plan
from mebp_triton.training.processes import Processes, joined
from mebp_triton.training.run_directory import OthersRunDirectory, RunDirectory
from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.trainer import StepResult, Trainer

from .plan import describe, planner_of, settings_of
from .quantize import quantize_with_progress


def run(arguments: argparse.Namespace) -> None:
    with joined(arguments.debug) as processes:
        console.quiet = not processes.is_first
        directory, ended = _train(arguments, processes)
    if isinstance(ended, Interrupted):
        raise ended if processes.is_first else SystemExit(128 + ended.number)
    if processes.is_first:
        answer(arguments, ended, two_columns(str(directory), readable(ended)))


def _train(arguments: argparse.Namespace, processes: Processes) -> tuple[Path, dict[str, Any] | Interrupted]:
    """The run directory, and what ``run.json`` says of the run, or what ended it after a step."""
    settings = _train_config(arguments)
    settings = dataclasses.replace(settings, device=processes.device(settings.device))
    config = settings.resolved()
    device = torch.device(config.device or "cpu")
    resolve_backend(config.backend, device)
    if processes.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
    checkpoint = Path(arguments.resume_from_checkpoint) if arguments.resume_from_checkpoint else None
    if arguments.resume and checkpoint is not None:
        raise ValueError("--resume and --resume-from-checkpoint are two ways to say the same: give one")
    # A checkpoint of another run goes on in a new directory; that of this run, in its own.
    inside = checkpoint is not None and checkpoint.resolve().is_relative_to(Path(config.output_dir).resolve())
    goes_on = arguments.resume or inside
    begun = Path(config.output_dir).is_dir() or (_store_beside(config) / MANIFEST).exists()
    run = (RunDirectory if processes.is_first else OthersRunDirectory)(config.output_dir, goes_on)
    with run.writing():
        if processes.is_first and not goes_on:
            atomic.check_absent(run.directory)  # again: another process may have been quicker
        if arguments.resume:
            checkpoint = run.checkpoint
        if goes_on:
            processes.first(lambda: atomic.finish_replacing(run.checkpoint))
        elif checkpoint is not None:
            checkpoint = atomic.locate_directory(checkpoint)
        if checkpoint is not None and not (checkpoint / "state.json").exists():
            if not (arguments.resume and begun and run.is_before_checkpoint()):
                raise ValueError(f"there is no checkpoint in {checkpoint} to resume from")
            note = f"{run.directory} has no checkpoint yet: starting from the beginning"
            console.print(note, highlight=False, soft_wrap=True)
            checkpoint = None
        return run.directory, _train_in(run, checkpoint, settings, arguments, processes)


def _train_in(
    run: RunDirectory,
    checkpoint: Path | None,
    settings: TrainConfig,
    arguments: argparse.Namespace,
    processes: Processes,
) -> dict[str, Any] | Interrupted:
    config = settings.resolved()
    if checkpoint is not None and settings.mlp_chunk_tokens is None:
        # Chunks change the order of sums: the run goes on with those that it, or its plan, began with.
        begun = strict_json.read_sealed(checkpoint / "state.json").get("config")
        chunks = begun.get("mlp_chunk_tokens") if isinstance(begun, dict) else None
        settings = dataclasses.replace(settings, mlp_chunk_tokens=chunks)
    check_source(config.train_file)
    if config.validation_file:
        check_source(config.validation_file, "validation-file")
    given = Path(arguments.store)
    is_store = _is_store(given, arguments)
    # Where the tokenizer lies there already, the texts are read first: what is wrong with them shows at once.
    texts = _load_texts(given, config) if given.is_dir() else None
    # A model directory is planned for before it is quantized, so that a budget too small shows at once.
    plan = _plan(given, arguments, settings) if given.is_dir() else None
    goes_on = arguments.resume or checkpoint is not None or not processes.is_first  # which has just made the store
    store = given if is_store else processes.first(lambda: _quantized(given, arguments, config, goes_on))
    data, validation = texts or _load_texts(store, config)
    if not given.is_dir():
        plan = _plan(store, arguments, settings)
    if plan is not None:
        config = plan.settings
        if config.memory_budget is not None:
            console.print(describe(plan), highlight=False, soft_wrap=True)
    # What was chosen by the memory that is free here is the first process's to choose.
    config = dataclasses.replace(TrainConfig(**processes.share(dataclasses.asdict(config))), device=config.device)
    _keep_to(config, plan)
    model = load(
        store,
        config.lora(),
        weights=config.weights or "device",
        checkpoints=config.checkpoints or "device",
        device=config.device or "cpu",
        dtype=DTYPES[config.dtype or "float32"],
        backend=config.backend,
        seed=config.seed,
        scratch_directory=run.directory,
        recompute_granularity=config.recompute_granularity or "full",
        mlp_chunk_tokens=config.mlp_chunk_tokens,
    )
    trainer = Trainer(model, data, config, run, processes=processes)
    if checkpoint is None:
        run.cut_metrics(0)
    else:
        trainer.resume(checkpoint)
    trainer.planned_peak_bytes = None if plan is None else plan.peak
    console.print(f"{config.train_file}: {data.report.describe()}", highlight=False, soft_wrap=True)
    if checkpoint is not None:
        console.print(f"resuming at step {trainer.step} of {trainer.total_steps}", highlight=False)
        if trainer.step == trainer.total_steps and (summary := run.summary(trainer.evaluated)) is not None:
            console.print("nothing is left to do", highlight=False)
            return summary
    return _train_with_progress(trainer, validation)


def _train_config(arguments: argparse.Namespace) -> TrainConfig:
    """As set, not resolved."""
    settings = settings_of(arguments)
    for name in ("train_file", "output_dir"):
        if not getattr(settings, name):
            raise ValueError(f"--{name.replace('_', '-')} is missing")
    return settings


def _plan(given: Path, arguments: argparse.Namespace, settings: TrainConfig) -> Plan | None:
    """None, with a line that says so, for a model that cannot be planned for; without a budget it still trains."""
    try:
        return planner_of(given, model_config(given), arguments.scheme, arguments.group_size).resolve(settings)
    except CannotTrace as error:
        if settings.memory_budget is not None:
            raise
        console.print(f"no peak is predicted: {error}", highlight=False, soft_wrap=True)
        return None


def _keep_to(settings: TrainConfig, plan: Plan | None) -> None:
    """What the settings ask of this process."""
    return_free_memory()  # of the tokenizer and the trace
    if settings.return_freed_memory and not return_large_freed_memory():
        console.print("return_freed_memory needs glibc, and this is another C library: freed memory may be kept")
    device = torch.device(settings.device or "cpu")
    if settings.memory_budget is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        budget = parse_size("memory_budget", settings.memory_budget)
        if plan is not None and plan.shared:
            budget -= plan.host_peak.total
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


def _is_store(given: Path, arguments: argparse.Namespace) -> bool:
    """Whether ``given`` is a store and not a model. ValueError if it is neither, or a store that cannot be used."""
    if not (given / MANIFEST).exists() and not (given.is_dir() and not (given / "config.json").exists()):
        if not given.is_file():  # a GGUF file takes its time to open
            open_source(given)
        return False
    Store(given)
    if arguments.scheme or arguments.group_size:
        raise ValueError(f"--scheme and --group-size are for models that are quantized first; {given} is a store")
    return True


def _load_texts(directory: Path, config: TrainConfig) -> tuple[TokenizedData, TokenizedData | None]:
    """The training and the validation file, tokenized by what lies in ``directory``."""
    tokenizer = load_tokenizer(directory)
    check_length(directory, config.max_length)

    def tokenized(path: str, name: str) -> TokenizedData:
        return load_data(path, tokenizer, config.max_length, name=name, masking=config.masking(), scratch=scratch)

    scratch = atomic.existing_parent(Path(config.output_dir))
    data = tokenized(config.train_file, "train-file")
    validation = tokenized(config.validation_file, "validation-file") if config.validation_file else None
    return pack(data, config.max_length) if config.packing else data, validation


def _store_beside(config: TrainConfig) -> Path:
    return Path(config.output_dir.rstrip("/") + "-store")


def _quantized(given: Path, arguments: argparse.Namespace, config: TrainConfig, goes_on: bool) -> Path:
    """A store beside the run, made from the model ``given`` now, or when the run that goes on was begun."""
    beside = _store_beside(config)
    if not (beside / MANIFEST).exists():
        outside = ", outside of the memory budget" if config.memory_budget is not None else ""
        note = f"{given} is not a store: quantizing it into {beside}{outside}"
        console.print(note, highlight=False, soft_wrap=True)
        quantize_with_progress(str(given), beside, arguments)
        return beside
    if not goes_on:
        raise ValueError(
            f"{beside} is there from an earlier run: --resume takes it, or give it as the model, or remove it"
        )
    found, wanted = Store(beside), open_source(given).description
    matrices = found.matrices.values()
    other = found.source != wanted
    other |= arguments.scheme not in (None, *{info.scheme for info in matrices})
    other |= arguments.group_size not in (None, *{info.group_size for info in matrices})
    if other:
        raise ValueError(f"{beside} is a store of {found.source} made with other options: remove it, or train in it")
    console.print(f"{given} was quantized before: using {beside}", highlight=False, soft_wrap=True)
    return beside


def _train_with_progress(trainer: Trainer, validation: Any) -> dict[str, Any] | Interrupted:
    recent: deque[float] = deque(maxlen=10)
    with progress_bar("training") as update, noting(announce=trainer.processes.is_first) as noted:

        def on_step(result: StepResult) -> None:
            if result.loss is not None:
                recent.append(result.loss)
            if result.not_finite is not None:
                console.print(f"skipped: {result.not_finite}", highlight=False, soft_wrap=True)
            mean = statistics.fmean(recent) if recent else math.nan
            note = (
                f"loss {mean:.3f}  {result.tokens / max(result.seconds, 1e-9):.0f} tok/s  "
                f"peak {peak_resident_bytes() / MIB:.0f} MiB"
            )
            update(result.step + 1, trainer.total_steps, note)

        def on_evaluation(done: int, total: int) -> None:
            if number := noted():
                raise Interrupted(number)  # no step is lost
            update(done, total, task="evaluating " + ("after" if recent else "before"))

        summary = finetune(trainer, validation, on_step, on_evaluation, noted)
    if summary is not None:
        return summary
    after = f"interrupted after step {trainer.step} of {trainer.total_steps}"
    return Interrupted(trainer.stopped, f"{after}; --resume goes on from there")
