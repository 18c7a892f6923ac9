"""The command line's parser."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from mebp_triton import __version__


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


def build_parser() -> argparse.ArgumentParser:
    from mebp_triton.kernels.names import BACKENDS, GROUP_SIZES, SCHEMES
    from mebp_triton.kernels.tables import DTYPES
    from mebp_triton.training.settings import TrainConfig

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
