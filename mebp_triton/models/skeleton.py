"""A transformers model without weights, and which of its modules become int4.

Quantizing and loading ask here alike, so that a store has exactly the matrices that loading looks for.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mebp_triton.system.foreign_errors import is_out_of_memory

from .direct_reads import directly_read
from .experts import FusedExperts, fused_experts
from .language_part import leave_out_other_parts, whole_class
from .names import parameter_aliases
from .plain_linear import is_plain_linear

Role = Literal["linear", "embedding", "head", "expert"]

# Names that transformers gives to the layers that choose a token's experts. Rounding them would change the choice.
ROUTERS = ("gate", "router")


class _NoRandomNumbers(TorchFunctionMode):
    """While active, a tensor on the meta device is not filled with random numbers: torch imports sympy for that."""

    # By name: of Tensor, of torch.nn.init, and what transformers puts in the place of those.
    FILLING = ("normal_", "uniform_", "kaiming_uniform_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__name__", "") in self.FILLING:
            tensor: Tensor = args[0] if args else named["tensor"]
            if tensor.device.type == "meta":
                return tensor
        return func(*args, **named)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While active, new parameters are on the meta device, and buffers are real: a config defines them, no checkpoint.

    ``torch.device("meta")`` would take the buffers along. accelerate's ``init_empty_weights`` does the same as this but
    is an optional package, and transformers has had a copy of it in some versions only.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(nn.Module, "register_parameter", register))
        for kind in (nn.Linear, nn.Embedding):
            patches.enter_context(mock.patch.object(kind, "__init__", _made_on_meta(kind.__init__)))
        yield


def _made_on_meta(init: Callable[..., None]) -> Callable[..., None]:
    """``init`` of a module that has parameters alone, which makes them on the meta device to begin with.

    Memory for a model's matrices, even if nobody writes to it, leaves gaps in glibc's heap, and makes it keep tensors
    of up to 32 MiB there: a run's peak would be tens of MiB higher, and another one each time.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def made(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get("device") is None:
            bound.arguments["device"] = "meta"
        init(*bound.args, **bound.kwargs)

    return made


def build_skeleton(
    config: Any, dtype: torch.dtype, attn_implementation: str | None = None, other_parts: bool = False
) -> Any:
    """Builds the model of ``config`` by transformers' own code: in eval mode, its parameters frozen and on "meta".

    Of a model for text and images that is no causal model as a whole, the other parts are left out.

    Args:
        config: a transformers config.
        dtype: the dtype of the parameters.
        attn_implementation: as in transformers; its default for None.
        other_parts: whether to keep the other parts.

    Raises:
        ValueError: transformers cannot make a causal language model of ``config``.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    is_whole = whole_class(config) is not None
    kind: Any = AutoModelForImageTextToText if is_whole else AutoModelForCausalLM
    with _parameters_on_meta(), _NoRandomNumbers():
        try:
            model = kind.from_config(config, dtype=dtype, trust_remote_code=False, **options)
        except Exception as error:  # modelling code meets a config that contradicts itself with any kind of error
            if is_out_of_memory(error):
                raise
            first_line = (str(error).strip().splitlines() or [""])[0]
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"transformers cannot make a causal language model of this config: {kind}{first_line}"
            ) from error
    if is_whole and not other_parts:
        leave_out_other_parts(model)
    model.requires_grad_(False)
    return model.eval()


def meta_model(config: Any) -> Any:
    """Builds the model of ``config`` on the meta device, for ``run_on_meta``."""
    # The config is copied because building a model writes its dtype and attention into it.
    model = build_skeleton(copy.deepcopy(config), torch.float32, "eager").to("meta")
    for experts in fused_experts(model):
        # Which experts run is in the data, and their products do not run on the meta device.
        model.get_submodule(experts.path).forward = _without_data
    return model


def _without_data(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    """Stands for the forward of experts: what they give has the shape of what they get."""
    return torch.empty_like(hidden_states)


class _Autocast(torch.autocast):
    """An autocast that the meta device has as well: transformers 4 asks for one there, and torch has none."""

    def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **options)


def run_on_meta(model: Any, rows: int = 1) -> None:
    """Runs ``meta_model``'s modelling code over two tokens without computing, so that hooks see who gets which tensor.

    Args:
        rows: how many such rows of two tokens the batch has.

    Raises:
        ValueError: the model's code does not run on the meta device.
    """
    ids = torch.zeros(rows, 2, dtype=torch.int64, device="meta")
    mask = torch.zeros(rows, 1, 2, 2, device="meta")
    try:
        with mock.patch.object(torch, "autocast", _Autocast):
            model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    except Exception as error:  # modelling code may raise anything, and loading a model must not depend on this
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{type(model).__name__} does not run on the meta device: {reason}") from None


@dataclass(frozen=True)
class Int4Site:
    """A module that becomes int4, or one matrix of an expert that lies in a tensor with others.

    Attributes:
        name: its path in the model. That of an expert's matrix is ``EXPERTS.3.gate_up_proj``.
        role: "linear", "embedding", "head" or "expert".
        out_features, in_features: the shape ``[out, in]`` of its int4 weight.
        transposed: whether its float weight is ``[in, out]`` instead (GPT-2's Conv1D).
    """

    name: str
    role: Role
    out_features: int
    in_features: int
    transposed: bool = False

    @property
    def is_table(self) -> bool:
        """Whether it has a row for each token of the vocabulary."""
        return self.role in ("embedding", "head")

    @property
    def parameter(self) -> str:
        """The name of the float parameter that it is, or is a slice of."""
        if self.role != "expert":
            return f"{self.name}.weight"
        path, _, parameter = self.name.rpartition(".")
        return f"{path.rpartition('.')[0]}.{parameter}"


class Stored(Protocol):
    """The tensors of a store, by name.

    Attributes:
        matrices: the modules that are int4.
        floats: the parameters and buffers that are not.
    """

    @property
    def matrices(self) -> Collection[str]: ...

    @property
    def floats(self) -> Collection[str]: ...


def kept_modules(model: Any) -> Callable[[str], bool]:
    """Returns a predicate on module paths: True where a layer is to stay float, whoever may have its weight.

    Those are the routers, and what transformers lists as kept in float32. An entry of its lists is some parts of a path
    ("wo", "indexer.weights_proj"), perhaps with a parameter's name ("gate.weight"). It keeps all that lies inside.
    """
    names = [*ROUTERS, *_listed(model, "_keep_in_fp32_modules"), *_listed(model, "_keep_in_fp32_modules_strict")]
    return lambda path: contains_any(f"{path}.weight", names)


def float32_tensors(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Returns a predicate on tensor names: True where ``from_pretrained(..., dtype=dtype)`` keeps float32."""
    names: list[str] = []
    if dtype in (torch.float16, torch.bfloat16):
        names += _listed(model, "_keep_in_fp32_modules_strict")
    if dtype == torch.float16:
        names += _listed(model, "_keep_in_fp32_modules")
    return lambda path: contains_any(path, names)


def _listed(model: Any, attribute: str) -> list[str]:
    return list(getattr(model, attribute, None) or ())


def contains_any(path: str, names: Iterable[str]) -> bool:
    """Whether ``path`` has one of ``names`` in it, as one or more whole parts in a row."""
    return any(f".{name}." in f".{path}." for name in names)


def int4_sites(model: Any, stored: Stored | None = None) -> tuple[list[Int4Site], bool]:
    """Lists the modules that become int4, and tells whether the head is tied to the embedding.

    They are the input embedding, the head, every linear layer but ``kept_modules`` and ``directly_read``, and every
    matrix of ``fused_experts``. A tied head is not listed since it has no weight of its own. Subclasses of
    ``nn.Linear`` stay float, unless they compute the same (``is_plain_linear``).

    Args:
        model: a transformers model.
        stored: a store of that model. A layer that it has in float stays float, and one that it has in int4 is listed
            even if it is read directly, which older stores do not heed.

    Raises:
        ValueError: the model has no plain embedding and linear head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not is_plain_linear(head) or not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} has no plain embedding and linear head "
            f"({type(embedding).__name__}, {type(head).__name__}); such models are not supported"
        )
    tied = head.weight is embedding.weight
    kept, read = kept_modules(model), directly_read(model)
    sites: list[Int4Site] = []
    experts = {found.path: found for found in fused_experts(model)}

    def stays_float(name: str) -> bool:
        if stored is None:
            return name in read
        return f"{name}.weight" in stored.floats or (name in read and name not in stored.matrices)

    for name, module in model.named_modules():
        if module is embedding:
            sites.append(Int4Site(name, "embedding", *module.weight.shape))
        elif module is head:
            if not tied:
                sites.append(Int4Site(name, "head", *module.weight.shape))
        elif name in experts:
            sites += _expert_sites(experts[name], kept, stored)
        elif kept(name) or stays_float(name) or not is_plain_linear(module):
            continue
        elif isinstance(module, nn.Linear):
            sites.append(Int4Site(name, "linear", *module.weight.shape))
        else:
            inputs, outputs = module.weight.shape
            sites.append(Int4Site(name, "linear", outputs, inputs, transposed=True))
    return sites, tied


def _expert_sites(experts: FusedExperts, kept: Callable[[str], bool], stored: Stored | None) -> Iterator[Int4Site]:
    """The matrices of ``experts``, one expert after the other; older stores have them in float."""
    floats = {name for name in experts.shapes if kept(f"{experts.path}.{name}")}
    if stored is not None:
        floats |= {name for name in experts.shapes if f"{experts.path}.{name}" in stored.floats}
    if floats:
        return
    for expert, parameter in experts.matrices():
        shape = experts.shapes[parameter]
        yield Int4Site(experts.matrix(expert, parameter), "expert", *shape, transposed=experts.transposed)


def linear_names(sites: Iterable[Int4Site]) -> list[str]:
    """The names of the linear layers among ``sites``: those that may have an adapter."""
    return [site.name for site in sites if site.role == "linear"]


def float_names(model: Any, sites: list[Int4Site]) -> list[str]:
    """The names of the parameters that stay float: norms, biases, and all that is not the weight of a site."""
    int4 = {site.parameter for site in sites}
    return [name for name, names in parameter_aliases(model).items() if int4.isdisjoint(names)]
