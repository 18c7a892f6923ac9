"""``mebp merge``: turns a store and its adapter into a model directory, or into a store again."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mebp_triton.cli.console import answer, progress_bar, readable, say, two_columns
from mebp_triton.cli.flags import FORM_FLAGS, add_adapter, add_quantization, add_validation, asked_form
from mebp_triton.kernels.names import FLOAT_NAMES
from mebp_triton.system.units import MIB

if TYPE_CHECKING:
    from mebp_triton.data.tokenized import TokenizedData
    from mebp_triton.store.reader import Store

ENOUGH = 0.9  # the part of what training won that a merge should keep


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="a store made by mebp quantize")
    parser.add_argument("output", metavar="OUT", help="the directory to make")
    add_adapter(parser, "none, the store's decoded weights")
    parser.add_argument("--dtype", choices=FLOAT_NAMES, help="dtype of the model directory (default: the config's)")
    parser.add_argument(
        "--as-store",
        action="store_true",
        help="make a store: matrices that the adapter changes are rounded to their own levels, or, where that loses "
        f"too much, quantized anew; {', '.join(FORM_FLAGS)} imply this",
    )
    add_quantization(parser)
    add_validation(
        parser,
        required=False,
        use="show what merging costs: the loss on this text before and after (--as-store: default the run's)",
    )


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.cli.starting_adapter import say_doubt
    from mebp_triton.convert.merge import merge
    from mebp_triton.models.adapter import read_adapter_config
    from mebp_triton.store.reader import Store
    from mebp_triton.system import atomic

    as_store = arguments.as_store or any(asked_form(arguments).values())
    if as_store and arguments.dtype is not None:
        raise ValueError(
            f"--dtype makes a model directory, and --as-store, {', '.join(FORM_FLAGS)} make a store: choose one"
        )
    store, output = Store(arguments.store), Path(arguments.output)  # refuses what is no store before the text is read
    atomic.check_absent(output)
    if arguments.adapter is not None:
        read_adapter_config(arguments.adapter)  # its faults show before anything is measured
    text, why_not = _text(store, arguments, as_store)
    value: dict[str, Any] = {"output": arguments.output, "adapter": arguments.adapter}
    if text is not None:
        value |= text.losses(store, arguments.adapter)
    if as_store:
        value |= _into_store(store, output, text, value, arguments)
    else:
        with progress_bar("merging") as update:
            value["dtype"] = merge(store, output, arguments.adapter, arguments.dtype, update)
        if text is not None:
            value["loss_merged"] = _plain_loss(output, value["dtype"], text)
    say_doubt(arguments.adapter, store)
    value["bytes"] = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if text is not None and arguments.adapter is not None:
        value["kept"] = _kept(value)
        say(_verdict(value, arguments, as_store))
    if why_not is not None:
        say(f"the merge is not measured ({why_not}): give a text by --validation-file")
    rows = value | {"tried": None, "kept": None if value.get("kept") is None else f"{value['kept']:.1%}"}
    answer(arguments, value, two_columns(arguments.output, readable(rows)))


@dataclass(frozen=True)
class _Text:
    """The text that a merge is measured on: the windows of a file, and how many of them are evaluated."""

    name: str
    data: TokenizedData
    windows: int | None = None

    def loss(self, store: Store | Path, adapter: str | None, task: str, update: Callable[..., None]) -> float:
        """The loss of a store; ``update`` shows the progress of the ``task``."""
        from mebp_triton.cli.inference import load_for_inference
        from mebp_triton.training.evaluation import evaluate

        model = load_for_inference(store, adapter)
        return evaluate(model, self.data, self.windows, lambda done, total: update(done, total, task=task)).loss

    def losses(self, store: Store, adapter: str | None) -> dict[str, Any]:
        """The losses before the merge, under the names of the command's answer."""
        losses: dict[str, Any] = {"measured_on": self.name}
        with progress_bar("evaluating") as update:
            if adapter is not None:
                losses["loss_untrained"] = self.loss(store, None, "evaluating the store", update)
            losses["loss_with_adapter"] = self.loss(store, adapter, "evaluating it with the adapter", update)
        return losses


def _text(store: Store, arguments: argparse.Namespace, as_store: bool) -> tuple[_Text | None, str | None]:
    """The text that was given, or, for an adapter that becomes part of a store, the text it was trained on.

    Returns:
        The text, and why there is none where the second kind is not at hand.
    """
    from mebp_triton.cli.inference import load_run_text, load_validation

    if arguments.validation_file is not None:
        data = load_validation(store.directory, arguments)
        return _Text(arguments.validation_file, data, arguments.max_eval_windows), None
    if not as_store or arguments.adapter is None:
        return None, None
    try:
        found = load_run_text(store.directory, arguments.adapter)
    except ValueError as error:
        return None, str(error)
    return (None, "the adapter lies in no run directory") if found is None else (_Text(*found), None)


def _into_store(
    store: Store, output: Path, text: _Text | None, losses: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Makes the store, in other forms too where none was asked for and its own lose too much."""
    from mebp_triton.convert.merge import merge_to_measured_store, merge_to_store
    from mebp_triton.convert.recipe import Recipe
    from mebp_triton.kernels.names import DEFAULT_FORMS, Form

    asked = asked_form(arguments)
    recipe = Recipe(**asked, scale_search=arguments.scale_search)
    value: dict[str, Any] = {}
    with progress_bar("merging") as update:
        if text is None:
            report = merge_to_store(store, output, arguments.adapter, recipe, update)
        else:
            forms: list[Form] = []
            highest = math.inf
            if arguments.adapter is not None and not any(asked.values()):
                own = {info.form for info in store.block_matrices()}
                forms = [form for form in DEFAULT_FORMS.values() if own != {form}]
                won = losses["loss_untrained"] - losses["loss_with_adapter"]
                highest = losses["loss_with_adapter"] + (1 - ENOUGH) * won if won > 0 else math.inf
            attempts = merge_to_measured_store(
                store,
                output,
                arguments.adapter,
                forms,
                lambda made: text.loss(made, None, "evaluating the merged store", update),
                highest,
                recipe,
                update,
            )
            report = attempts[-1].report
            value["loss_merged"] = attempts[-1].loss
            value["tried"] = [
                (made.form._asdict() if made.form else {name: asked[name] for name in Form._fields})
                | {"bytes": made.nbytes, "loss": made.loss}
                for made in attempts
            ]
    if text is not None and attempts[-1].form is not None:
        kept, own_levels = attempts[-1], next(made for made in attempts if made.form is None)
        say(
            f"the adapter's matrices were quantized anew ({kept.form}): {kept.nbytes / MIB:.1f} MiB and loss "
            f"{kept.loss:.4g}; with their own levels {own_levels.nbytes / MIB:.1f} MiB and {own_levels.loss:.4g}"
        )
    anew = {name: error for name, error in report.errors.items() if name not in report.taken_over}
    return value | {"quantized_anew": len(anew), "relative_error_worst": max(anew.values(), default=0.0)}


def _kept(value: dict[str, Any]) -> float | None:
    """The part of what training won that the merged model still has; None where training won nothing on this text."""
    won = value["loss_untrained"] - value["loss_with_adapter"]
    return (value["loss_untrained"] - value["loss_merged"]) / won if won > 0 else None


def _verdict(value: dict[str, Any], arguments: argparse.Namespace, as_store: bool) -> str:
    """Returns a line about the effect of the merge on the loss."""
    measured = (
        f"loss on {value['measured_on']}: {value['loss_untrained']:.4g} untrained, {value['loss_with_adapter']:.4g} "
        f"with the adapter, {value['loss_merged']:.4g} merged"
    )
    if value["kept"] is None:
        return f"{measured}; the adapter does not lower it, so give another text by --validation-file"
    if value["kept"] >= ENOUGH:
        return f"{measured}: {value['kept']:.1%} of what training won is kept"
    tried = [
        f"{made['bits'] or 'own'} bits, {made['scheme'] or 'own scheme'}, groups of "
        f"{made['group_size'] or 'own size'}: {made['bytes'] / MIB:.1f} MiB, loss {made['loss']:.4g}"
        for made in value.get("tried", [])
    ]
    way = f"`mebp merge {arguments.store} OUT --adapter {arguments.adapter}` makes a model directory, which keeps it"
    if not as_store:
        way = "--dtype float32 keeps it"
    elif asked := [flag for flag, value in zip(FORM_FLAGS, asked_form(arguments).values(), strict=True) if value]:
        way = f"leave {' and '.join(asked)} out, or: {way}"
    lost = f"warning: {1 - value['kept']:.1%} of what training won is lost: {measured}"
    return f"{lost}{' (tried ' + '; '.join(tried) + ')' if tried else ''}; {way}"


def _plain_loss(directory: Path, dtype: str, text: _Text) -> float:
    """The loss by transformers alone, in the dtype that was written. The whole model is in memory."""
    import torch
    import transformers

    from mebp_triton.kernels.tables import DTYPES
    from mebp_triton.system.machine import resolve_device
    from mebp_triton.training.evaluation import evaluate, plain_score

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False
    )
    device: Any = torch.device(resolve_device(None))
    return evaluate(model.to(device), text.data, text.windows, score=plain_score).loss
