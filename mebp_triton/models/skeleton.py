"""A transformers model without weights, and which of its modules become int4: shared by quantizing and loading."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mebp_triton.system.foreign_errors import is_out_of_memory

Role = Literal["linear", "embedding", "head"]

# What transformers calls the layers that choose a token's experts; rounding them would change the choice.
ROUTERS = ("gate", "router")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made within live on the meta device; buffers, which configs and not checkpoints define, are real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", register):
        yield


def build_skeleton(config: Any, dtype: torch.dtype, attn_implementation: str | None = None) -> Any:
    """The model of ``config`` in ``dtype`` from transformers' own code, its parameters on the meta device, frozen."""
    named = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _parameters_on_meta():
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **named)
        except Exception as error:  # a config that contradicts itself shows as anything in a model's own code
            if is_out_of_memory(error):
                raise
            first_line = (str(error).strip().splitlines() or [""])[0]
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"transformers makes no causal language model of this config: {kind}{first_line}"
            ) from error
    model.requires_grad_(False)
    return model.eval()


def meta_model(config: Any) -> Any:
    """The model of ``config`` on the meta device, for ``run_on_meta``."""
    # A copy: building a model writes its dtype and attention into the config.
    return build_skeleton(copy.deepcopy(config), torch.float32, "eager").to("meta")


class _Autocast(torch.autocast):
    """For the meta device too: transformers 4 asks for it there, and torch has none."""

    def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **options)


def run_on_meta(model: Any) -> None:
    """Runs ``meta_model``'s modelling code over two tokens, without a number: for hooks that see who gets what.

    Raises:
        ValueError: the model cannot be run like that.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, 2, 2, device="meta")
    try:
        with mock.patch.object(torch, "autocast", _Autocast):
            model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    except Exception as error:  # a model's own code may raise anything, and loading it must not depend on this
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{type(model).__name__} does not run on the meta device: {reason}") from None


@dataclass(frozen=True)
class Int4Site:
    """A module that becomes int4. ``transposed``: its float weight is ``[in, out]`` (GPT-2's Conv1D)."""

    name: str
    role: Role
    out_features: int
    in_features: int
    transposed: bool = False


def kept_modules(model: Any) -> Callable[[str], bool]:
    """Tells by its path in ``model`` whether a linear layer stays float: transformers lists it as in need of float32,
    or it is a router.

    An entry of the lists is some parts of a path ("wo", "indexer.weights_proj"), perhaps with a parameter's name
    ("gate.weight"); a module has all that lies in it kept with it.
    """
    names = [*ROUTERS, *_listed(model, "_keep_in_fp32_modules"), *_listed(model, "_keep_in_fp32_modules_strict")]
    return lambda path: named(f"{path}.weight", names)


def float32_tensors(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Tells by its path whether ``from_pretrained(..., dtype=dtype)`` leaves a float tensor of ``model`` in float32."""
    names: list[str] = []
    if dtype in (torch.float16, torch.bfloat16):
        names += _listed(model, "_keep_in_fp32_modules_strict")
    if dtype == torch.float16:
        names += _listed(model, "_keep_in_fp32_modules")
    return lambda path: named(path, names)


def _listed(model: Any, attribute: str) -> list[str]:
    return list(getattr(model, attribute, None) or ())


def named(path: str, names: Iterable[str]) -> bool:
    """Whether one of ``names`` is ``path``, or whole parts of it in a row."""
    return any(f".{name}." in f".{path}." for name in names)


def int4_sites(model: Any) -> tuple[list[Int4Site], bool]:
    """Every linear layer but those kept, the input embedding and the head; and whether the head is the embedding's.

    A tied head is not listed: it has no weight of its own.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(head) is not nn.Linear or not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} has no plain embedding and linear head "
            f"({type(embedding).__name__}, {type(head).__name__}); such models are not supported"
        )
    tied = head.weight is embedding.weight
    kept, sites = kept_modules(model), []
    for name, module in model.named_modules():
        if module is embedding:
            sites.append(Int4Site(name, "embedding", *module.weight.shape))
        elif module is head:
            if not tied:
                sites.append(Int4Site(name, "head", *module.weight.shape))
        elif kept(name):
            continue
        elif type(module) is nn.Linear:
            sites.append(Int4Site(name, "linear", *module.weight.shape))
        elif type(module) is Conv1D:
            inputs, outputs = module.weight.shape
            sites.append(Int4Site(name, "linear", outputs, inputs, transposed=True))
    return sites, tied


def float_names(model: Any, sites: list[Int4Site]) -> list[str]:
    """Parameters that stay float: norms, biases, and whatever is neither a linear layer nor the embedding."""
    int4 = {f"{site.name}.weight" for site in sites}
    return [name for name, _ in model.named_parameters() if name not in int4]
