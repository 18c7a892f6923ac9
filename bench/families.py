"""Trains a tiny model of every causal language model that transformers has, and compares it with transformers + PEFT.

For each: a random model with the sizes of ``family_configs.py``, its checkpoint as ``save_pretrained`` writes it, a
store, two steps with weights and block inputs in files, and every gradient of the adapter beside that of PEFT on the
decoded weights. Each model has a process of its own, one after the other.

    python bench/families.py --output bench/results/families-cpu.json
    python bench/families.py --page docs/models.md    # the page's tables, from that file
    python bench/families.py llama falcon             # these alone, printed
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from family_configs import IN_TRAIN_MODE, tiny_config
from machine import ROOT
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mebp_triton as mebp
from mebp_triton.system import atomic
from mebp_triton.system.machine import environment

sys.path.append(str(ROOT / "tests" / "support"))

from models import batch, loaded, our_gradients, peft_gradients, peft_model, randomize_weights

RESULTS = ROOT / "bench" / "results" / "families-cpu.json"
TOLERANCE = 1e-5  # relative RMS, float32
LIMIT_SECONDS = 120
LENGTH = 24  # which Reformer's chunks divide


class Ended(Exception):
    """The end of an examination: what kind of end, and why, in one line."""

    def __init__(self, result: str, why: str) -> None:
        super().__init__(result, why)
        self.result, self.why = result, why


def attempt(result: str, call: Callable[[], Any], refusal: str | None = None) -> Any:
    """Returns ``call()``. Raises Ended with ``result``; with ``refusal`` for an error that a user is meant to read."""
    try:
        return call()
    except Exception as error:
        line = " ".join(str(error).split())
        if refusal is not None and isinstance(error, ValueError):
            raise Ended(refusal, line) from error
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise Ended(result, f"{type(error).__name__}: {line[:300]} ({where})") from error


def step(model: Any) -> float:
    """One forward and backward pass over two rows, one of which is padded; returns the loss."""
    model.zero_grad()
    loss = model(**batch(length=LENGTH), use_cache=False).loss
    loss.backward()
    return float(loss)


def make_model(model_type: str, directory: Path) -> None:
    """Saves a random model in ``directory`` as transformers does. Raises Ended where transformers cannot train it."""

    def trained() -> type:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
        randomize_weights(model)
        step(model.train(model_type in IN_TRAIN_MODE))
        model.save_pretrained(directory)
        return type(AutoConfig.from_pretrained(directory))

    if (kind := attempt("upstream", trained)) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Ended("upstream", f"AutoModelForCausalLM saves it with a {kind.__name__}, which it does not load")


def errors(found: dict[str, Any], truth: dict[str, Any]) -> dict[str, float]:
    """The relative RMS of each gradient's difference; a gradient that is missing is zero."""
    zero = torch.zeros(())
    found, truth = ({k: zero if g is None else g.double() for k, g in side.items()} for side in (found, truth))
    # Below a millionth of the largest gradient, float32 has nothing left of what the two sides have in common.
    least = 1e-6 * max(float(grad.norm()) for grad in truth.values())
    return {
        key: float((found[key] - grad).norm()) / max(float(grad.norm()), least, 1e-30) for key, grad in truth.items()
    }


def compare(model_type: str, directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Holds our loss and gradients beside those of PEFT, after two steps: the second recompute leaves out products."""
    store = directory / "store"
    places = {"weights": "file", "checkpoints": "file", "scratch_directory": directory}
    places |= {"dtype": dtype, "adapter_dtype": dtype}
    ours = attempt("broken", lambda: loaded(store, **places), "refused").train(model_type in IN_TRAIN_MODE)
    loss = [attempt("broken", lambda: step(ours), "refused") for _ in range(2)][-1]
    theirs = attempt("upstream", lambda: peft_model(store, ours, dtype, r=4, lora_alpha=8).to(dtype))
    their_loss = attempt("upstream", lambda: step(theirs.train(ours.training)))
    apart = errors(our_gradients(ours), peft_gradients(theirs))
    worst = max(apart, key=lambda name: apart[name] if apart[name] == apart[name] else float("inf"))
    record = {"gradients": len(apart), "worst": apart[worst], "worst_gradient": worst, "loss": loss}
    return record | {"loss_error": abs(loss - their_loss) / abs(their_loss)}


def is_equal(record: dict[str, Any]) -> bool:
    return bool(record["worst"] <= TOLERANCE and record["loss_error"] <= TOLERANCE)


def examine(model_type: str, directory: Path) -> dict[str, Any]:
    """Trains one model on both sides. Raises Ended where that is not the whole way.

    Some random models magnify every rounding. Where the sides differ in float32, float64 decides.
    """
    make_model(model_type, directory / "model")
    attempt("broken", lambda: mebp.quantize(directory / "model", directory / "store", group_size=32), "refused")
    record = decides = compare(model_type, directory)
    if not is_equal(record):
        decides = compare(model_type, directory, torch.float64)
        record["in_float64"] = {key: decides[key] for key in ("worst", "worst_gradient", "loss_error")}
    return {"result": "equal" if is_equal(decides) else "different"} | record


def train_peft_alone(model_type: str, directory: Path) -> None:
    """One step of transformers + PEFT on the float checkpoint, with adapters on all of its linear layers."""
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    step(wrapped.train(model_type in IN_TRAIN_MODE))


def record_of(model_type: str) -> dict[str, Any]:
    """The outcome for one model."""
    with tempfile.TemporaryDirectory(prefix="mebp-families-") as directory:
        try:
            try:
                record = examine(model_type, Path(directory))
            except Ended as end:
                if end.result == "broken":  # perhaps not by us
                    attempt("upstream", lambda: train_peft_alone(model_type, Path(directory)))
                raise
        except Ended as end:
            record = {"result": end.result, "why": end.why.replace(f"{directory}/", "")}
    return {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]} | record


def in_a_process(call: Callable[[], dict[str, Any]], seconds: int = LIMIT_SECONDS) -> dict[str, Any]:
    """Returns what ``call`` returns in a forked process, which the system ends after ``seconds``."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(seconds)
        with open(writer, "w") as pipe:
            json.dump(call(), pipe)
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        content = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(content) if status == 0 else {"result": "broken", "why": f"ended by {status}"}


def sweep(names: list[str]) -> dict[str, Any]:
    """The records of all ``names``; each is printed as it comes."""
    models = {}
    for name in names:
        models[name] = record = in_a_process(lambda name=name: record_of(name))
        shown = [record.get("why") or f"{record['worst']:.1e}", record.get("in_float64", "")]
        print(name, record["result"], *shown, flush=True)
    counts = {kind: sum(r["result"] == kind for r in models.values()) for kind in sorted(KINDS)}
    return {"environment": environment(None), "tolerance": TOLERANCE, "counts": counts, "models": models}


KINDS = {
    "equal": "Trained as transformers + PEFT train them",
    "refused": "Refused, with this line",
    "upstream": "Not trained by transformers + PEFT either",
    "different": "Trained differently",
    "broken": "Broken off",
}
BEGIN, END = "<!-- made by bench/families.py -->", "<!-- end of what bench/families.py makes -->"


def tables(record: dict[str, Any]) -> str:
    """The part of the page that the results make: the names of what works, and a table of what does not, and why."""
    versions = record["environment"]["versions"]
    lines = [BEGIN, f"With transformers {versions['transformers']} and peft {versions['peft']}:", ""]
    for kind, title in KINDS.items():
        models = {name: entry for name, entry in record["models"].items() if entry["result"] == kind}
        if not models:
            continue
        lines += [f"## {title}: {len(models)}", ""]
        if kind == "equal":
            lines += textwrap.wrap(", ".join(f"`{name}`" for name in models), 120, break_on_hyphens=False)
        else:
            shown = {name: entry.get("why", f"{entry.get('worst', 0):.1e}") for name, entry in models.items()}
            lines += ["| model | line |", "|---|---|"]
            lines += [f"| `{name}` | {line.replace('|', '/')} |" for name, line in shown.items()]
        lines.append("")
    return "\n".join([*lines, END])


def write_page(page: Path, record: dict[str, Any]) -> None:
    """Puts the tables of ``record`` in the place of those in ``page``."""
    text = page.read_text()
    before, after = text.index(BEGIN), text.index(END) + len(END)
    atomic.write_bytes(page, (text[:before] + tables(record) + text[after:]).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of architectures; all by default")
    parser.add_argument("--output", type=Path, help="where the results go")
    parser.add_argument("--page", type=Path, help="only writes the tables of this page, from the committed results")
    options = parser.parse_args()
    if options.page is not None:
        write_page(options.page, json.loads(RESULTS.read_text()))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    record = sweep(options.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    print(record["counts"])
    if options.output is not None:
        atomic.write_bytes(options.output, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
