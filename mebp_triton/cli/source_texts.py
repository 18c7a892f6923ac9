"""The texts that ``mebp quantize`` takes: one to calibrate with, and one on which source and store are compared."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mebp_triton.convert.calibration import CALIBRATION_WINDOWS

from .console import progress_bar, say
from .flags import MAX_LENGTH

if TYPE_CHECKING:
    from mebp_triton.convert.quantize import QuantizeReport
    from mebp_triton.data.tokenized import TokenizedData
    from mebp_triton.training.evaluation import Evaluation

# Windows are evenly spaced over so many times the tokens that are used: a larger file is not read to its end.
SPREAD = 64


class SourceTexts:
    """The files of ``--calibration-file`` and ``--validation-file``; see ``flags.add_calibration``.

    Raises:
        ValueError: one of them is not there, or is no text; or neither is given for which a flag is meant.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from mebp_triton.data.sources import check_source

        self.arguments = arguments
        self._validation: TokenizedData | None = None
        for name, file in (
            ("calibration-file", arguments.calibration_file),
            ("validation-file", arguments.validation_file),
        ):
            if file is not None:
                check_source(file, name)
        _check_flags_are_used(arguments)

    def read(self, companions: Path) -> TokenizedData | None:
        """Reads both by the tokenizer in ``companions``. Returns the text to calibrate with, or None without one."""
        from mebp_triton.data.loading import load_data
        from mebp_triton.system.memory import return_free_memory

        from .inference import check_length, load_tokenizer, read_validation

        given, data = self.arguments, None
        if given.validation_file is None and given.calibration_file is None:
            return None
        check_length(companions, given.max_length)
        tokenizer = load_tokenizer(companions)
        if given.validation_file is not None:
            self._validation = read_validation(tokenizer, given)
            say(f"{given.validation_file}: {self._validation.report.describe()}")
        if given.calibration_file is not None:
            data = load_data(
                given.calibration_file,
                tokenizer,
                given.max_length,
                name="calibration-file",
                most_tokens=SPREAD * given.calibration_windows * given.max_length,
            )
            used = min(len(data), given.calibration_windows)
            say(f"{given.calibration_file}: {data.report.describe()}; {used} of them are used, evenly spaced")
        del tokenizer
        return_free_memory()  # a tokenizer may take more than any block will
        return data

    def evaluations(self, source: str, store: Path) -> dict[str, Evaluation]:
        """The evaluations of ``source`` and ``store`` on the same windows; empty without a text for that."""
        from mebp_triton.convert.calibration.source_loss import SourceLoss
        from mebp_triton.convert.calibration.source_run import SourceRun
        from mebp_triton.training.evaluation import evaluate

        from .inference import evaluate_with_progress, load_for_inference

        data, windows = self._validation, self.arguments.max_eval_windows
        if data is None:
            return {}
        with progress_bar("running the source") as update, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say of the source was said when it was quantized
            run = SourceRun.of_path(source, data, windows, Path(tempfile.gettempdir()))
            score = SourceLoss(run, update)
            of_source = evaluate(
                run.model,
                data,
                windows,
                lambda done, total: update(done, total, task="evaluating the source"),
                score=score,
            )
            del run, score
        of_store = evaluate_with_progress(load_for_inference(store), data, windows, "evaluating the store")
        return {"source": of_source, "store": of_store}


def _check_flags_are_used(arguments: argparse.Namespace) -> None:
    """Raises ValueError where a flag says how to use a file that is not given: who forgot the file must hear of it."""
    calibration, validation = arguments.calibration_file is not None, arguments.validation_file is not None
    for flag, given, used, files in (
        ("calibration_windows", CALIBRATION_WINDOWS, calibration, "--calibration-file"),
        ("max_eval_windows", None, validation, "--validation-file"),
        ("max_length", MAX_LENGTH, calibration or validation, "--calibration-file or --validation-file"),
    ):
        if getattr(arguments, flag) != given and not used:
            raise ValueError(f"{flag} {getattr(arguments, flag)} has nothing to be used for: give {files} as well")


def as_values(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """The evaluations as entries of the command's answer."""
    values: dict[str, Any] = {}
    for name, found in evaluations.items():
        values |= {f"loss_{name}": found.loss, f"perplexity_{name}": found.perplexity}
        values |= {f"token_accuracy_{name}": found.token_accuracy, "tokens": found.tokens, "windows": found.windows}
    return values


def describe(evaluations: dict[str, Evaluation]) -> str:
    """The evaluations in one line."""
    losses = [f"of the {name} {found.loss:.4f}" for name, found in evaluations.items()]
    found = evaluations["store"]
    return f"loss {', '.join(losses)}; {found.tokens:,} tokens in {found.windows} windows"


def describe_calibration(report: QuantizeReport) -> list[str]:
    """The linear layers by what a calibration did to them, in lines."""
    from mebp_triton.models.names import enumerate_names

    found = (
        (report.compensated, "were rounded so that what they give on the text changes little"),
        (
            report.weighted,
            "read more columns than the memory has room for: these do not make up for each other's errors, and each "
            "counts by its inputs alone",
        ),
        (report.unseen, "are linear layers that the text never reaches, and were rounded without it"),
    )
    return [
        f"{len(names)} of {len(report.errors)} matrices {what} ({enumerate_names(names)})"
        for names, what in found
        if names
    ]
