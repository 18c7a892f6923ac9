"""Prints as JSON what one block costs: the bytes that it keeps for the backward pass, and the time of each operation.

    python bench/profile_block.py [--hidden 896 --inner 4864 --heads 14 --kv-heads 2 --tokens 256 --dtype float32]

This shows whether fusing small operations (RMSNorm, SwiGLU, RoPE) would pay on a device.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

import mebp_triton as mebp


def build(arguments: argparse.Namespace, directory: Path) -> Any:
    """Makes a store of one block with random weights, and loads its model."""
    config = transformers.LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_hidden_layers=1,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        vocab_size=256,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory / "model")
    mebp.quantize(str(directory / "model"), directory / "store", scale_search=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora = mebp.LoraConfig(r=16, lora_alpha=16)
    return mebp.load(directory / "store", lora, device=device, dtype=getattr(torch, arguments.dtype))


def kept(run: Any) -> Counter[str]:
    """Bytes that a forward pass keeps for its backward pass, by shape and dtype; shared storage counts once."""
    sizes: Counter[str] = Counter()
    seen = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and not isinstance(tensor, torch.nn.Parameter):
            seen.add(storage.data_ptr())
            sizes[f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("hidden", 896), ("inner", 4864), ("heads", 14), ("kv-heads", 2), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = build(arguments, Path(directory))
        ids = torch.randint(0, 256, (1, arguments.tokens), device=model.device)

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        step()
        engine = model.mebp.engine
        engine.remove()
        sizes = kept(lambda: model(input_ids=ids, labels=ids))
        with torch.profiler.profile() as profile:
            for _ in range(5):
                step()
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        times[event.key] += event.self_cpu_time_total / 5e3
    total = sum(times.values())
    result = {
        "settings": vars(arguments) | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "kept_mib": {key: round(size / 2**20, 3) for key, size in sizes.most_common(20)},
        "kept_mib_total": round(sum(sizes.values()) / 2**20, 2),
        "milliseconds": {key: round(time, 2) for key, time in times.most_common(20)},
        "milliseconds_total": round(total, 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
