"""The flag or command that was probably meant by one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What other programs call the flags of ours, without the dashes.
ELSEWHERE = {
    "adapter": ("lora", "lora-path", "adapter-path", "adapter-name-or-path", "peft"),
    "chat": ("apply-chat-template", "conversation"),
    "gradient-accumulation-steps": ("grad-accum", "accumulate-grad-batches", "gas"),
    "group-size": ("block-size", "blocksize", "groupsize"),
    "learning-rate": ("lr",),
    "lora-alpha": ("alpha",),
    "lora-r": ("rank", "lora-rank", "r"),
    "m": ("tokens", "num-tokens", "batch-sizes"),
    "max-length": ("max-seq-length", "max-seq-len", "seq-len", "cutoff-len", "context-length", "ctx-size"),
    "max-new-tokens": ("max-tokens", "n-predict", "n-tokens", "max-length"),
    "max-steps": ("steps", "iters", "num-steps", "max-iters"),
    "num-train-epochs": ("epochs", "num-epochs", "n-epochs"),
    "output-dir": ("output", "out", "save-path", "adapter-path", "output-path"),
    "per-device-train-batch-size": ("batch-size", "bs", "micro-batch-size", "train-batch-size"),
    "save-steps": ("save-every", "save-interval"),
    "scheme": ("quant-type", "quantization", "qtype"),
    "system": ("system-prompt", "sys"),
    "temperature": ("temp",),
    "train-file": ("data", "dataset", "train-data", "dataset-name", "train-path", "train"),
    "validation-file": (
        "data",
        "dataset",
        "eval-data",
        "eval-file",
        "validation-data",
        "valid-file",
        "test-file",
        "file",
    ),
    "warmup-steps": ("warmup", "num-warmup-steps"),
}
# The same for arguments without a flag, by what the command's help calls them.
MODELS = ("model", "store", "model-path", "model-dir", "model-name-or-path", "base-model", "m")
POSITIONALS = {"STORE": MODELS, "SRC": MODELS, "MODEL": MODELS, "OUT": ("output", "output-dir", "out-dir", "o")}


def suggestion(word: str, flags: Iterable[str], positionals: Iterable[str] = ()) -> str:
    """Returns a suggestion for the flag ``word``, as the end of a message; empty where nothing is near.

    Args:
        flags: the flags of the command, of which one is suggested.
        positionals: its arguments that are given without a flag.
    """
    if not word.startswith("-"):
        return ""
    name = word.partition("=")[0].lstrip("-").lower().replace("_", "-")
    for positional in positionals:
        if name in (positional.lower(), *POSITIONALS.get(positional, ())):
            return f"; {positional} is given without a flag"
    names = {flag.lstrip("-"): flag for flag in flags if flag.startswith("--")}
    elsewhere = [own for own, others in ELSEWHERE.items() if name in others and own in names]
    part_of = [own for own in names if name in own.split("-") and not own.startswith("no-")]
    near = difflib.get_close_matches(name, names, n=1)
    if name in names:
        near = [name]
    elif elsewhere:
        near = elsewhere[:1]
    elif len(part_of) == 1 and not near:
        near = part_of
    return f"; did you mean {names[near[0]]}?" if near else ""


def near_command(word: str, commands: Iterable[str]) -> str:
    """The command that was meant by ``word``, as the end of a message; empty where none is near."""
    near = difflib.get_close_matches(word.lower(), commands, n=1)
    return f"; did you mean {near[0]}?" if near else ""
