"""A training run of ``mebp train``: from the arguments to texts, plan, store, model, steps and ``run.json``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch

from mebp_triton.cli.chat_template import template_of_run
from mebp_triton.cli.commands.quantize import quantize_with_progress
from mebp_triton.cli.console import progress_bar, say
from mebp_triton.cli.flags import FORM_FLAGS, asked_form
from mebp_triton.cli.inference import model_config
from mebp_triton.cli.planning import describe, planner_of, settings_of
from mebp_triton.cli.starting_adapter import doubt, start_record
from mebp_triton.cli.stops import RowEnds, stop_where_rows_end
from mebp_triton.cli.training_texts import begun_at, begun_with, load_texts
from mebp_triton.convert.quantize import base_model
from mebp_triton.convert.readers import open_source
from mebp_triton.data.sources import check_source
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.models.adapter import CHAT_TEMPLATE, restore_adapter
from mebp_triton.models.generation import add_stops, saved_stops, write_stops
from mebp_triton.models.kept_float import describe_kept_float, kept_float
from mebp_triton.models.load import load
from mebp_triton.store.manifest import MANIFEST, SHARED
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic
from mebp_triton.system.errors import CannotTrace, Interrupted
from mebp_triton.system.memory import peak_resident_bytes, return_free_memory, return_large_freed_memory
from mebp_triton.system.signals import noting
from mebp_triton.system.units import MIB, parse_size
from mebp_triton.training.checkpoint import adapted_layers
from mebp_triton.training.evaluation import Evaluation
from mebp_triton.training.finetune import finetune
from mebp_triton.training.plan.planner import Plan
from mebp_triton.training.processes import Processes
from mebp_triton.training.reporting import Reports, check_reporters
from mebp_triton.training.run_directory import OthersRunDirectory, RunDirectory
from mebp_triton.training.run_settings import RunSettings, resolve
from mebp_triton.training.settings import NEEDED, TrainConfig
from mebp_triton.training.trainer import StepResult, Trainer
from mebp_triton.training.untrained import describe_unreached


def train(arguments: argparse.Namespace, processes: Processes) -> tuple[Path, dict[str, Any] | Interrupted]:
    """Trains; returns the run directory, and what ``run.json`` says of the run, or the signal that ended it."""
    asked = _asked(arguments)
    asked = dataclasses.replace(asked, device=processes.device(asked.device))
    # A device or a backend that is not here shows before anything is read.
    device = torch.device(resolve(asked).device)
    resolve_backend(asked.backend, device)
    if processes.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
    check_reporters(asked.reporters())
    checkpoint = Path(arguments.resume_from_checkpoint) if arguments.resume_from_checkpoint else None
    if arguments.resume and checkpoint is not None:
        raise ValueError("--resume and --resume-from-checkpoint are two ways to say the same: give one")
    # A run goes on from its own checkpoint in its own directory. Another run's checkpoint begins a new directory.
    inside = checkpoint is not None and checkpoint.resolve().is_relative_to(Path(asked.output_dir).resolve())
    goes_on = arguments.resume or inside
    begun = Path(asked.output_dir).is_dir() or (_store_beside(asked) / MANIFEST).exists()
    run = (RunDirectory if processes.is_first else OthersRunDirectory)(asked.output_dir, goes_on)
    with run.writing():
        if processes.is_first and not goes_on:
            atomic.check_absent(run.directory)  # again, now that it is locked: another command may have been quicker
        if arguments.resume:
            checkpoint = run.checkpoint
        if goes_on:
            processes.first(lambda: atomic.finish_replacing(run.checkpoint))
        elif checkpoint is not None:
            checkpoint = atomic.locate_directory(checkpoint)
        if checkpoint is not None and not (checkpoint / "state.json").exists():
            if not (arguments.resume and begun and run.is_before_checkpoint()):
                raise ValueError(f"there is no checkpoint in {checkpoint} to resume from")
            say(f"{run.directory} has no checkpoint yet: starting from the beginning")
            checkpoint = None
        return run.directory, _train_in(run, checkpoint, asked, arguments, processes)


def _train_in(
    run: RunDirectory,
    checkpoint: Path | None,
    asked: TrainConfig,
    arguments: argparse.Namespace,
    processes: Processes,
) -> dict[str, Any] | Interrupted:
    if checkpoint is not None:
        begun = {name: value for name, value in begun_with(checkpoint).items() if getattr(asked, name) is None}
        asked = dataclasses.replace(asked, **begun)
    check_source(asked.train_file)
    if asked.validation_file:
        check_source(asked.validation_file, "validation-file")
    given = Path(arguments.store)
    store = _open_if_store(given, arguments)
    beside = None if checkpoint is None else checkpoint.parent / run.adapter.name
    template = template_of_run(asked.chat_template, [beside, Path(asked.adapter) if asked.adapter else None])
    began = processes.share({"began": begun_at(checkpoint)})["began"]
    # A directory has the tokenizer already. Then texts are read first, so that their faults show at once.
    texts = load_texts(given, asked, template, began) if given.is_dir() else None
    # A model directory is planned for before it is quantized, so that too small a budget shows at once.
    plan = _plan(store or given, arguments, asked) if given.is_dir() else None
    # The other processes find the store that the first one has just made, as a resumed run finds its own.
    goes_on = arguments.resume or checkpoint is not None or not processes.is_first
    store = store or processes.first(lambda: _quantized(given, arguments, asked, goes_on))
    data, validation, ends, dated = texts or load_texts(store.directory, asked, template, began)
    if not given.is_dir():
        plan = _plan(store, arguments, asked)
    settings = resolve(asked) if plan is None else plan.settings
    if plan is not None and asked.memory_budget is not None:
        say(describe(plan))
    # A choice depends on the memory that is free here, so the first process makes it for all.
    shared = processes.share(dataclasses.asdict(settings)) | {"device": settings.device}
    settings = RunSettings(**shared)
    _prepare_process(settings, plan)
    # Older versions took more layers for "all-linear": a run keeps those that it began with.
    layers = None if checkpoint is None else adapted_layers(checkpoint)
    model = load(
        store,
        dataclasses.replace(settings.lora(), layers=layers),
        weights=settings.weights,
        checkpoints=settings.checkpoints,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
        seed=settings.seed,
        scratch_directory=run.directory,
        recompute_granularity=settings.recompute_granularity,
        mlp_chunk_tokens=settings.mlp_chunk_tokens,
        block_rows=settings.per_device_train_batch_size if settings.join_micro_batches else None,
        block_graphs=settings.block_graphs,
    )
    if (given / MANIFEST).exists():  # else it was said when the store was made
        for line in describe_kept_float(kept_float(model, store.float_sizes()), store.nbytes()):
            say(line)
    if checkpoint is None and asked.adapter:
        restore_adapter(model, asked.adapter)
    trainer = Trainer(model, data, settings, run, processes=processes)
    if checkpoint is None:
        run.cut_metrics(0)
        trainer.position.start = _start(asked.adapter, store) if asked.adapter else None
    else:
        trainer.resume(checkpoint)
    trainer.position.began = dated
    if template is not None and processes.is_first:
        run.adapter.mkdir(exist_ok=True)
        atomic.write_bytes(run.adapter / CHAT_TEMPLATE, template.encode())
    trainer.planned_peak_bytes = None if plan is None else plan.peak
    say(f"{settings.train_file}: {data.report.describe()}")
    if validation is not None:
        say(f"{settings.validation_file}: {validation.report.describe()}")
    _stop_where_rows_end(model, data, ends, run, processes)
    if checkpoint is not None:
        say(f"resuming at step {trainer.step} of {trainer.total_steps}")
        if trainer.finished and (summary := run.summary(trainer.interim.identity)) is not None:
            early = ", since the run stopped early; --early-stopping-patience left out or higher goes on"
            say(f"nothing is left to do{early if summary['stopped_early'] else ''}")
            return summary
    return _train_with_progress(trainer, validation)


def _stop_where_rows_end(
    model: Any, data: TokenizedData, ends: RowEnds, run: RunDirectory, processes: Processes
) -> None:
    """Has the model stop where the rows end, and where the adapter stopped from which the run began; says so."""
    add_stops(model, saved_stops(run.adapter))
    for line in stop_where_rows_end(model, data, ends):
        say(line)
    if model.mebp.stops and processes.is_first:
        write_stops(run.directory, model.mebp.store.directory, model.mebp.stops)


def _start(adapter: str, store: Store) -> dict[str, Any]:
    """The record of the adapter that the run starts from, and a line if it may be another model's."""
    if reason := doubt(adapter, store):
        say(f"{reason}: compare the loss before training with what it should be")
    record = start_record(adapter)
    say(f"starting from {record['adapter']}")
    return record


def _asked(arguments: argparse.Namespace) -> TrainConfig:
    """The settings as the user gave them. ValueError where one that every run needs is missing."""
    asked = settings_of(arguments)
    for name in NEEDED:
        if not getattr(asked, name):
            raise ValueError(f"{name} is missing: give it as a flag, or in the file of --config")
    return asked


def _plan(given: Store | Path, arguments: argparse.Namespace, asked: TrainConfig) -> Plan | None:
    """The plan. A model that cannot be traced has none, which one line says; with a budget that is an error."""
    directory = given.directory if isinstance(given, Store) else given
    try:
        return planner_of(given, model_config(directory), asked_form(arguments)).resolve(asked)
    except CannotTrace as error:
        if asked.memory_budget is not None:
            raise
        say(f"no peak is predicted: {error}")
        return None


def _prepare_process(settings: RunSettings, plan: Plan | None) -> None:
    """Sets this process's allocators as the settings ask, and the limit of the device's memory."""
    return_free_memory()  # the tokenizer and the trace have left much of it behind
    if settings.return_freed_memory and not return_large_freed_memory():
        say("return_freed_memory needs glibc, and this is another C library: freed memory may be kept")
    device = torch.device(settings.device)
    if settings.memory_budget is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        budget = parse_size("memory_budget", settings.memory_budget)
        if plan is not None and plan.shared:
            budget -= plan.host_peak.total
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


def _open_if_store(given: Path, arguments: argparse.Namespace) -> Store | None:
    """Opens ``given`` if it is a store; None for a model. ValueError for neither, or a store that cannot be used."""
    if not (given / MANIFEST).exists() and not (given.is_dir() and not (given / "config.json").exists()):
        if not given.is_file():  # a GGUF file is slow to open, so its faults show when it is quantized
            open_source(given)
        return None
    store = Store(given)
    if any(asked_form(arguments).values()):
        raise ValueError(f"{', '.join(FORM_FLAGS)} are for models that are quantized first; {given} is a store")
    return store


def _store_beside(asked: TrainConfig) -> Path:
    return Path(asked.output_dir.rstrip("/") + "-store")


def _quantized(given: Path, arguments: argparse.Namespace, asked: TrainConfig, goes_on: bool) -> Store:
    """The store beside the run: made of the model ``given`` now, or found there by a run that goes on."""
    beside = _store_beside(asked)
    if not (beside / MANIFEST).exists():
        outside = ", outside of the memory budget" if asked.memory_budget is not None else ""
        line = f"{given} is not a store: quantizing it into {beside}{outside}"
        quantize_with_progress(str(given), beside, arguments, line)
        return Store(beside)
    if not goes_on:
        raise ValueError(
            f"{beside} is there from an earlier run: --resume takes it; or give it in place of the model, or remove it"
        )
    store, wanted = Store(beside), open_source(given).description
    # Models often have the same directory name. A store of an older version does not know more than that.
    other = store.source != wanted or store.base not in (None, base_model(given))
    matrices = store.matrices.values()
    linear = store.block_matrices()
    other |= arguments.scheme not in (None, *{info.scheme for info in linear})
    other |= arguments.group_size not in (None, *{info.group_size for info in linear})
    other |= arguments.bits not in (None, *{info.bits for info in linear})
    other |= arguments.embedding_bits not in (None, *{info.bits for info in matrices if info.file == SHARED})
    if other:
        known = store.source if store.base is None else f"{store.source} ({store.base.name_or_path})"
        raise ValueError(
            f"{beside} is a store of {known}, and {given} is another model, or {' or '.join(FORM_FLAGS)} differ: give "
            f"{beside} in place of the model to go on with it, or remove it"
        )
    say(f"{given} was quantized before: using {beside}")
    return store


def _say_what_was_best(trainer: Trainer, summary: dict[str, Any]) -> None:
    """Says why the training ended early, which evaluation was the best, and where its adapter is."""
    standing, run, after, before = trainer.position.standing, trainer.run, summary["loss_after"], summary["loss_before"]
    if standing.best_step is None or standing.best_loss is None:
        return
    if summary["stopped_early"]:
        count = "an evaluation" if standing.not_improved == 1 else f"{standing.not_improved} evaluations in a row"
        say(f"stopped early, after step {trainer.step} of {trainer.total_steps}: {count} did not improve")
    where = f"its adapter is not in {run.best}" + ("" if trainer.config.save_best else ", where --save-best keeps it")
    if standing.kept or standing.best_step == trainer.step:
        where = f"its adapter is {run.best if standing.kept else run.adapter}"
    say(f"the best evaluation was after step {standing.best_step}, with loss {standing.best_loss:.4f}: {where}")
    if after is not None and after < standing.best_loss:
        say(f"the loss after the last step is lower still, {after:.4f}: its adapter is {run.adapter}")
    if before is not None and before <= standing.best_loss:
        say(f"no evaluation was better than before the training, with loss {before:.4f}")


def _train_with_progress(trainer: Trainer, validation: Any) -> dict[str, Any] | Interrupted:
    recent: deque[float] = deque(maxlen=10)
    names = trainer.config.reporters() if trainer.processes.is_first else []
    per_epoch = trainer.course.batches_per_epoch / trainer.course.per_step
    reports = Reports(names, trainer.config, trainer.run.directory, trainer.model, trainer.total_steps, per_epoch)
    with reports, progress_bar("training") as update, noting(announce=trainer.processes.is_first) as noted:

        def on_step(result: StepResult) -> None:
            if result.loss is not None:
                recent.append(result.loss)
            if result.not_finite is not None:
                say(f"skipped: {result.not_finite}")
            mean = statistics.fmean(recent) if recent else math.nan
            note = (
                f"loss {mean:.3f}  {result.tokens / max(result.seconds, 1e-9):.0f} tok/s  "
                f"peak {peak_resident_bytes() / MIB:.0f} MiB"
            )
            update(result.step + 1, trainer.total_steps, note)
            reports.on_step(result)

        def on_evaluation(done: int, total: int) -> None:
            during = trainer.position.standing.is_due(trainer.config, trainer.step)
            # At once, since an evaluation can simply be repeated; but during the training, other processes wait for it.
            if (number := noted()) and not (during and trainer.processes.size > 1):
                raise Interrupted(number)
            update(done, total, task="evaluating" + ("" if during else " after" if trainer.step else " before"))

        def on_evaluated(step: int, found: Evaluation, best: bool) -> None:
            reports.on_evaluated(step, found)
            if trainer.config.eval_steps:
                say(f"after step {step}: evaluation loss {found.loss:.4f}{', the best so far' if best else ''}")

        summary = finetune(trainer, validation, on_step, on_evaluation, noted, on_evaluated)
    if summary is not None:
        _say_what_was_best(trainer, summary)
        if unreached := summary["layers_without_gradient"]:
            say(describe_unreached(unreached, trainer.step))
        return summary
    after = f"interrupted after step {trainer.step} of {trainer.total_steps}"
    return Interrupted(trainer.stopped, f"{after}; --resume goes on from there")
