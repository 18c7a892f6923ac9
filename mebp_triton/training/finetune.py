"""A whole run: evaluate, train, evaluate again, and write the results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.system.memory import peak_resident_bytes

from .course import row_widths
from .evaluation import Evaluation, evaluate
from .trainer import StepResult, Trainer
from .untrained import untrained


def finetune(
    trainer: Trainer,
    validation: TokenizedData | None,
    on_step: Callable[[StepResult], None] = lambda result: None,
    on_evaluation: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], int] = lambda: 0,
    on_evaluated: Callable[[int, Evaluation, bool], None] = lambda step, found, best: None,
) -> dict[str, Any] | None:
    """Evaluates, trains, evaluates again, and writes ``run.json`` and the plots.

    Args:
        trainer: at the first step, or resumed.
        validation: the data of the evaluations; None for no evaluation.
        on_step, should_stop: see ``Trainer.train``.
        on_evaluation: called with (windows done, windows in all).
        on_evaluated: see ``Trainer.train``; called for the evaluations before and after as well.

    Returns:
        The results in ``run.json``. None if ``should_stop`` ended the training: then ``run.json`` is not written.
    """
    config, run = trainer.config, trainer.run
    resumed_at = trainer.step
    evaluated = None if validation is None else lambda: _evaluate(trainer, validation, on_evaluation)
    before = run.saved_evaluation(trainer.interim.identity) if resumed_at else evaluated and evaluated()
    if not resumed_at:
        run.save_evaluation(before, trainer.interim.identity)
        if before is not None:
            on_evaluated(0, before, False)
    if not trainer.finished:
        run.reopen()
    started = time.perf_counter()
    results = trainer.train(on_step, should_stop, evaluated, on_evaluated)
    if trainer.stopped:
        return None
    train_seconds = time.perf_counter() - started - trainer.interim.seconds
    standing, after = trainer.position.standing, trainer.interim.last
    if after is None or standing.evaluated_at != trainer.step:
        after = evaluated and evaluated()
        if after is not None:
            on_evaluated(trainer.step, after, False)
    rows = run.read_metrics()
    never = untrained(trainer.model, rows)
    tokens = sum(result.tokens for result in results)
    seconds = [result.seconds for result in results]
    on_device = trainer.watch.peak_device_bytes()
    peaks = trainer.processes.highest(peak_resident_bytes(), trainer.watch.peak_anonymous, on_device or 0)
    resident, anonymous, allocated = map(int, peaks)
    summary = {
        "loss_before": before and before.loss,
        "loss_after": after and after.loss,
        "token_accuracy_before": before and before.token_accuracy,
        "token_accuracy_after": after and after.token_accuracy,
        "perplexity_before": before and before.perplexity,
        "perplexity_after": after and after.perplexity,
        "steps": trainer.step,
        "resumed_at_step": resumed_at or None,
        "stopped_early": True if trainer.step < trainer.total_steps else None,
        "best_step": standing.best_step,
        "best_eval_loss": standing.best_loss,
        "best_adapter": run.best.name if standing.kept else None,
        "steps_not_finite": sum(row.get("not_finite") is not None for row in rows),
        "train_loss_last": rows[-1]["loss"] if rows else None,
        "tokens_per_second": tokens / train_seconds if results else None,
        "seconds_per_step_median": statistics.median(seconds) if seconds else None,
        "trainable_parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "layers_without_gradient": never.unreached or None,
        "blocks_never_selected": never.waiting or None,
        "processes": trainer.processes.size,
        "peak_rss_bytes": resident,
        "peak_rss_anonymous_bytes": anonymous,
        "peak_device_bytes": None if on_device is None else allocated,
        "planned_peak_bytes": trainer.planned_peak_bytes,
        "selected_ratio": trainer.selection.ratio,
        "selection_mode": config.selection_mode,
        "backend": resolve_backend(trainer.model.mebp.backend, trainer.device),
    }
    run.finish(summary, config, trainer.data.report, trainer.watch, trainer.position.start)
    return summary


def _evaluate(trainer: Trainer, data: TokenizedData, progress: Callable[[int, int], None]) -> Evaluation:
    config = trainer.config
    return evaluate(
        trainer.model, data, config.max_eval_windows, progress, trainer.processes, widths=row_widths(config)
    )
