"""The command ``mebp``: parsing, messages and exit codes. What each command does lies in ``commands/``.

Exit codes: 0 done; 1 the run failed; 2 the user's mistake, one line that says what to do; 130 and 143 interrupted by
Ctrl-C and SIGTERM. A traceback only with ``--debug``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import importlib
import os
import resource
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from . import __version__
from .signals import interrupting

# A path that cannot be: the user's to mend.
PATH_MISTAKES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


# Of torch and all it loads, threads' stacks among it; and of what comes after that.
LIBRARIES_ADDRESS_SPACE, LEAST_ADDRESS_SPACE = 2 << 30, 64 << 20


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors and a word on what was probably meant."""

    def error(self, message: str) -> NoReturn:
        for word in message.split():
            if message.startswith("unrecognized arguments") and word.startswith("--"):
                known = [option for action in self._all_actions() for option in action.option_strings]
                near = difflib.get_close_matches(word.split("=")[0], known, n=1)
                message += f"; did you mean {near[0]}?" if near else ""
                break
        print(f"mebp: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def _all_actions(self) -> list[argparse.Action]:
        actions = list(self._actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    actions += parser._actions
        return actions


def _add_settings(parser: argparse.ArgumentParser, settings: type, but: frozenset[str] = frozenset()) -> None:
    """One flag per field of a dataclass; unset flags stay out of the namespace."""
    hints = get_type_hints(settings)
    for item in dataclasses.fields(settings):
        if item.name in but:
            continue
        flag, kind = "--" + item.name.replace("_", "-"), hints[item.name]
        options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": item.metadata["help"]}
        if item.default not in (None, ""):
            options["help"] += f" (default: {item.default})"
        parts = get_args(kind) if get_origin(kind) not in (None, Literal) else (kind,)
        kind = next(part for part in parts if part is not type(None))
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), **options)
        else:
            parser.add_argument(flag, type=kind, metavar=item.name.split("_")[-1].upper(), **options)


def _build_parser() -> argparse.ArgumentParser:
    from .config import TrainConfig
    from .kernels.layout import GROUP_SIZES, SCHEMES
    from .kernels.ops import BACKENDS
    from .kernels.tables import DTYPES

    parser = _Parser(prog="mebp", description="Fine-tune 4-bit language models with LoRA by true gradients.")
    parser.add_argument("--version", action="version", version=f"mebp {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[common], allow_abbrev=False)

    quantize = command("quantize", "make an int4 store from a model directory or a GGUF file")
    quantize.add_argument(
        "source", metavar="SRC", help="model directory (safetensors; 4-bit bitsandbytes too), or .gguf"
    )
    quantize.add_argument("store", metavar="OUT", help="the store directory to make")
    _add_quantize_options(quantize, SCHEMES, GROUP_SIZES)

    train = command("train", "fine-tune a store, or a model that is quantized first")
    train.add_argument("store", metavar="STORE", help="a store, a model directory or a .gguf file")
    train.add_argument("--config", metavar="FILE", help="YAML or JSON file of these settings; flags win")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output-dir")
    train.add_argument("--resume-from-checkpoint", metavar="DIR", help="go on from this checkpoint directory")
    _add_settings(train, TrainConfig)
    _add_quantize_options(train, SCHEMES, GROUP_SIZES)

    plan = command("plan", "predict the peak memory of a training run, or choose settings for a memory budget")
    plan.add_argument("model", metavar="MODEL", help="a store, a model directory or a config.json")
    plan.add_argument("--config", metavar="FILE", help="YAML or JSON file of train's settings; flags win")
    plan.add_argument("--plot", metavar="FILE", help="draw the moments of a step as a PNG")
    _add_settings(plan, TrainConfig)
    _add_quantize_options(plan, SCHEMES, GROUP_SIZES)

    evaluate = command("eval", "loss, perplexity and token accuracy on a file")
    generate = command("generate", "continue a prompt")
    for sub in (evaluate, generate):
        sub.add_argument("store", metavar="STORE", help="a store made by mebp quantize")
        sub.add_argument("--adapter", metavar="DIR", help="adapter in PEFT's format")
        sub.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
        sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of activations")
        sub.add_argument("--backend", choices=BACKENDS, default="auto", help="kernels (default: auto)")
    _add_validation_options(evaluate, required=True, help=".txt, .jsonl, .parquet, or a directory")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    generate.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1.0)")
    generate.add_argument("--seed", type=int, default=42, help="of sampling (default: 42)")

    tune = command("tune", "find the fastest kernel configurations for this device, or for one that is not here")
    _add_tune_options(tune, SCHEMES, GROUP_SIZES, tuple(DTYPES))

    merge = command("merge", "make a 16- or 32-bit model directory of a store and its adapter, or a store again")
    merge.add_argument("store", metavar="STORE", help="a store made by mebp quantize")
    merge.add_argument("output", metavar="OUT", help="the directory to make")
    merge.add_argument("--adapter", metavar="DIR", help="adapter in PEFT's format; without one: the decoded weights")
    merge.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: the config's)")
    merge.add_argument(
        "--as-store",
        action="store_true",
        help="a store again: what was adapted is quantized anew (so do the next three)",
    )
    _add_quantize_options(merge, SCHEMES, GROUP_SIZES)
    _add_validation_options(merge, required=False, help="what merging costs: the loss on it, before and after")

    verify = command("verify", "check every byte of a store against its checksums")
    verify.add_argument("store", metavar="STORE")
    verify.add_argument(
        "--accept-changes", action="store_true", help="take the config and the tokenizer beside the weights as they are"
    )
    doctor = command("doctor", "what this machine has, and what is missing")
    doctor.add_argument("store", metavar="STORE", nargs="?", help="measured too, and compared with the memory here")
    doctor.add_argument("--scratch-directory", metavar="DIR", help="where files of a run would lie")
    doctor.add_argument(
        "--gradients", action="store_true", help="kernels and gradients on this device against float64, a minute"
    )
    doctor.add_argument("--device", help="of --gradients: cpu, cuda, ...; by default a GPU if there is one")
    doctor.add_argument("--backend", choices=BACKENDS, default="auto", help="of --gradients (default: auto)")
    demo = command("demo", "the whole path on a real 135M model: quantize, train, evaluate, generate")
    demo.add_argument("--output-dir", default="mebp-demo", metavar="DIR", help="(default: mebp-demo)")
    demo.add_argument("--max-steps", type=int, default=40, metavar="N", help="optimizer steps (default: 40)")
    demo.add_argument("--compare", action="store_true", help="the same with transformers + PEFT, side by side")
    return parser


def _add_tune_options(
    parser: argparse.ArgumentParser, schemes: Sequence[str], group_sizes: Sequence[int], dtypes: Sequence[str]
) -> None:
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--store", metavar="DIR", help="tune for the layers of a store, its scheme and group size")
    shapes.add_argument("--model", metavar="DIR_OR_CONFIG", help="for those of a model directory or a config.json")
    shapes.add_argument("--shapes", metavar="NxK,...", help="for weights of these sizes (out x in features)")
    parser.add_argument("--m", metavar="M,...", help="numbers of tokens (default: one for every bucket of the tables)")
    parser.add_argument("--dtype", choices=dtypes, help="of activations (default: bfloat16; float16 before sm_80)")
    parser.add_argument(
        "--scheme", choices=schemes, help="how codes become weights (default: the store's, or symmetric)"
    )
    parser.add_argument(
        "--group-size", type=int, choices=group_sizes, help="weights per scale (default: the store's, or 64)"
    )
    parser.add_argument("--target", metavar="SM", help="architecture, such as sm_87 (default: this device's)")
    parser.add_argument("--offline", action="store_true", help="compile and rank for --target; nothing is measured")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="candidates to measure (default: 8), or with --offline to keep (all)"
    )
    parser.add_argument("--output", metavar="FILE", help="the table to write (default: the user's own)")
    parser.add_argument("--report", action="store_true", help="show what was found before; tune nothing")
    parser.add_argument("--plot", metavar="FILE", help="draw achieved bandwidth and rate as a PNG")
    parser.add_argument("--force", action="store_true", help="again, even what was found before")


def _add_validation_options(parser: argparse.ArgumentParser, required: bool, help: str) -> None:
    parser.add_argument("--validation-file", required=required, metavar="FILE", help=help)
    parser.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens per window (default: 512)")
    parser.add_argument("--completion-only-loss", action=argparse.BooleanOptionalAction, help="as in train")
    parser.add_argument(
        "--assistant-only-loss", action=argparse.BooleanOptionalAction, default=False, help="as in train"
    )
    parser.add_argument("--max-eval-windows", type=int, metavar="N", help="evenly spaced windows; all by default")


def _add_quantize_options(parser: argparse.ArgumentParser, schemes: Sequence[str], group_sizes: Sequence[int]) -> None:
    parser.add_argument(
        "--scheme", choices=schemes, help="how codes become weights (default: the source's, or symmetric)"
    )
    parser.add_argument(
        "--group-size", type=int, choices=group_sizes, help="weights per scale (default: the source's, or 64)"
    )
    parser.add_argument(
        "--scale-search",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="search each scale for the least squared error (default: on)",
    )


def share_cores() -> None:
    """Lets OpenMP's threads wait for each other by sleeping, soon, and not by spinning. Before torch is imported.

    By default libgomp spins for milliseconds: beside one other busy process on as many cores as threads, the one that
    spins keeps the one it waits for from running, and a step takes 30 times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def check_address_space() -> None:
    """OSError where ``ulimit -v`` leaves less than the libraries take: they would end the process each in its own way.

    Some of them, and Python itself, do not get over a failed allocation of a few bytes; a tensor's is an exception.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    least = LEAST_ADDRESS_SPACE if "torch" in sys.modules else LIBRARIES_ADDRESS_SPACE
    if limit == resource.RLIM_INFINITY or not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        left = limit - int(file.read().split()[0]) * resource.getpagesize()
    if left < least:
        raise OSError(
            errno.ENOMEM,
            f"the address space is limited to {limit >> 20} MiB, of which {max(left, 0) >> 20} are left and "
            f"{least >> 20} needed: raise it (ulimit -v), and limit memory by --memory-budget",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``mebp``; returns the exit code."""
    try:
        check_address_space()
    except OSError as error:
        print(f"mebp: error: {error.strerror}", file=sys.stderr)
        return 1
    share_cores()
    arguments = argparse.Namespace(command="", debug=False)
    try:
        with interrupting():
            _build_parser().parse_args(argv, arguments)
            warnings.showwarning = lambda message, *_: print(f"mebp: warning: {message}", file=sys.stderr)
            from .lost_pages import ending_with_a_line

            with ending_with_a_line():
                importlib.import_module(f".commands.{arguments.command}", __package__).run(arguments)
        return 0
    except KeyboardInterrupt as interruption:
        hints = {"train": "; --resume goes on from the last checkpoint", "tune": "; the same command goes on"}
        line = str(interruption) or f"interrupted{hints.get(arguments.command, '')}"
        print(f"mebp: {line}", file=sys.stderr)
        return 128 + getattr(interruption, "number", signal.SIGINT)
    except BrokenPipeError:
        return 1
    except Exception as error:  # every failure becomes one line; --debug shows where it came from
        if arguments.debug:
            raise
        from .evaluate import RunError
        from .memory import is_out_of_memory

        users = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in PATH_MISTAKES)
        # What says all there is to say: a full disk, and what file it was, among them.
        known = users or isinstance(error, RunError) or (isinstance(error, OSError) and error.filename is not None)
        line = " ".join(str(error).split())
        if is_out_of_memory(error):
            known, line = True, "out of memory: give --memory-budget, shorter rows or a smaller batch"
        elif not known and not isinstance(error, OSError):
            line = f"{type(error).__name__}: {line}"
        print(f"mebp: error: {line}{'' if known else ' (--debug shows where)'}", file=sys.stderr)
        return 2 if users else 1


if __name__ == "__main__":
    sys.exit(main())
