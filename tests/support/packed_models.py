"""Tiny model directories with packed codes, laid out by hand as other tools do it, and the weights that they mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from models import save_tiny_model
from runs import word_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mebp_triton.convert.readers import open_source
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store

# Sizes that groups of 64 and of 128 do not divide.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "intermediate_size": 160, "tie_word_embeddings": True},
    "qwen2": {"hidden_size": 96, "intermediate_size": 160, "tie_word_embeddings": False},
    "phi3": {"hidden_size": 96, "intermediate_size": 160},
    "gpt2": {"n_embd": 96, "n_inner": 160},
    "qwen3_moe": {"hidden_size": 96, "num_experts": 3},
}
# Gives the tensors of a module by the ends of their names, and its weight ``[N, K]`` in float64.
Layout = Callable[[str, int, int], tuple[dict[str, Tensor], Tensor]]


class Drawn(NamedTuple):
    """A random matrix: codes ``[N, K]``, zeros and scales ``[groups, N]``, and the group of each column ``[K]``."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    def weight(self) -> Tensor:
        """``(code - zero) * scale`` ``[N, K]`` in float64, which is exact."""
        zeros, scales = self.zeros[self.groups].T, self.scales.astype(np.float64)[self.groups].T
        return torch.from_numpy((self.codes - zeros) * scales)


def seed_of(module: str) -> np.random.Generator:
    return np.random.default_rng(list(module.encode()))


def drawn(
    module: str, rows: int, columns: int, group_size: int, symmetric: bool, bits: int = 4, act_order: bool = False
) -> Drawn:
    """A random matrix for a module. A ``group_size`` of -1 makes a row one group."""
    random, size = seed_of(module), columns if group_size == -1 else group_size
    groups = np.arange(columns) // size
    count = int(groups[-1]) + 1
    zeros = random.integers(0, 1 << bits, (count, rows))
    scales = random.uniform(0.002, 0.02, (count, rows)).astype(np.float16)
    codes = random.integers(0, 1 << bits, (rows, columns))
    groups = random.permutation(groups) if act_order else groups
    return Drawn(codes, np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros, scales, groups)


def bit_fields(values: np.ndarray, bits: int, word: int = 32) -> np.ndarray:
    """``[..., n]`` numbers as fields of ``bits`` bits, one after another from the lowest bit of the first word up."""
    fields = (values[..., None].astype(np.uint64) >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    flat = fields.reshape(*values.shape[:-1], -1)
    flat = np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % word)])
    words = flat.reshape(*flat.shape[:-1], -1, word) << np.arange(word, dtype=np.uint64)
    return words.sum(-1, dtype=np.uint64).astype(np.uint32 if word == 32 else np.uint8)


def int32(words: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def coded_modules(directory: Path, head: bool = False) -> dict[str, tuple[int, int]]:
    """The linear layers of a model's blocks, and its head if asked for: their ``(N, K)``."""
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (head or module is not model.get_output_embeddings()):
            modules[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            modules[name] = (module.weight.shape[1], module.weight.shape[0])
    return modules


def packed_directory(
    directory: Path,
    layout: Layout,
    config: dict[str, Any],
    architecture: str = "llama",
    dtype: torch.dtype = torch.float16,
    head: bool = False,
    extra: tuple[str, ...] = (),
    **sizes: Any,
) -> dict[str, Tensor]:
    """Writes a model of two blocks in a packed layout, with a tokenizer.

    Args:
        directory: the model directory to make.
        layout: lays out one module.
        config: what its ``config.json`` has beside the model's own settings.
        architecture, sizes: the model.
        dtype: that of the tensors that are not packed.
        head: whether the head is packed as well.
        extra: more modules that are packed, such as embeddings.

    Returns:
        The weight ``[N, K]`` of every packed module in float64.
    """
    two_blocks = {"n_layer" if architecture == "gpt2" else "num_hidden_layers": 2}
    save_tiny_model(architecture, directory, **(two_blocks | SIZES[architecture] | sizes))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(directory / "model.safetensors").items()}
    shapes = coded_modules(directory, head) | {name: tuple(tensors[f"{name}.weight"].shape) for name in extra}
    truth = {}
    for module, (rows, columns) in shapes.items():
        tensors.pop(f"{module}.weight", None)
        parts, truth[module] = layout(module, rows, columns)
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    word_tokenizer().save_pretrained(directory)
    edit_config(directory, **config)
    return truth


def edit_config(directory: Path, **changes: Any) -> None:
    """Changes settings in ``config.json``; None takes one away."""
    file = directory / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edited(source: Path, target: Path, tensors: dict[str, Tensor | None], **changes: Any) -> Path:
    """A copy with some tensors replaced, or taken away, and settings changed."""
    shutil.copytree(source, target)
    values = load_file(target / "model.safetensors") | tensors
    save_file({k: v for k, v in values.items() if v is not None}, target / "model.safetensors", {"format": "pt"})
    edit_config(target, **changes)
    return target


def assert_exact(
    directory: Path, truth: dict[str, Tensor], scheme: str, scale_dtype: str | None, group_sizes: set[int]
) -> None:
    """Checks that every packed matrix is in the store at ``directory`` to the bit, in this form.

    A ``scale_dtype`` of None is either: products of few bits may happen to fit into float16.
    """
    store = Store(directory)
    for name, weight in truth.items():
        info = store.matrices[name]
        assert (info.scheme, info.relative_error) == (scheme, 0) and scale_dtype in (None, info.scale_dtype), name
        assert info.group_size in group_sizes, name
        assert torch.equal(decode(store.weight(name)), weight), name
        assert torch.equal(decode(store.weight(name), torch.float32), weight.float()), name


def opened(directory: Path) -> Any:
    """The source of a directory, bound to its model."""
    source = open_source(directory)
    source.bind(build_skeleton(source.config, torch.float32))
    return source
