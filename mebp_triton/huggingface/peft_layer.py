"""PEFT over our frozen layers: the layer that PEFT makes of an ``Int4Linear``, and how PEFT learns of it.

A single active adapter without dropout runs fused (``int4_lora_linear``). Everything else that PEFT's own layers do by
adapters on their input and output runs as the frozen layer and PEFT's two small ones. State dicts are PEFT's.

PEFT is an optional package and slow to import, so it is imported only by what is called with it. Whoever asks whether a
model has layers of PEFT looks into ``sys.modules``: without PEFT there are none.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear
from mebp_triton.layers.lora_config import UNSUPPORTED
from mebp_triton.layers.lora_function import int4_lora_linear

if TYPE_CHECKING:
    PeftInt4Linear: Any


# Settings that change what a layer computes. PEFT does what the others of ``UNSUPPORTED`` ask for around the layers.
VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "init_lora_weights",
)


# PEFT's methods, other than LoRA, that only add to the input and the output of a layer and never read its weight.
BESIDE_THE_WEIGHT = ("adalora", "fourierft", "ia3", "oft", "road", "vera")


def register_peft() -> None:
    """Lets ``get_peft_model`` and ``PeftModel.from_pretrained`` make a ``PeftInt4Linear`` of every ``Int4Linear``.

    Without it they make PEFT's own layer, which computes the same numbers, but not fused. Methods other than LoRA that
    compute with the weight itself are refused. It holds for the whole process; calling it again changes nothing.
    """
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    create: Any = LoraModel._create_new_module
    if getattr(create, "knows_int4", False):
        return
    layer_class, inject = peft_int4_linear(), BaseTuner.inject_adapter

    # PEFT has custom modules per config only. Every config gets ours on its way, and a mapping of the user's own wins.
    @functools.wraps(create)
    def create_new_module(lora_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        lora_config._register_custom_module({Int4Linear: layer_class} | (lora_config._custom_modules or {}))
        return create(lora_config, *args, **kwargs)

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        for path, wrapper in peft_wrappers(model).items():
            if isinstance(wrapper.get_base_layer(), Int4Linear):
                check_method(wrapper, path)
        return result

    create_new_module.knows_int4 = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)  # type: ignore[method-assign]
    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


def register_where_installed() -> None:
    """Calls ``register_peft`` if PEFT is installed."""
    if importlib.util.find_spec("peft") is not None:
        register_peft()


def peft_wrappers(model: nn.Module) -> dict[str, Any]:
    """The layers that PEFT put around other layers to add an adapter, by path."""
    peft: Any = sys.modules.get("peft")
    kind = () if peft is None else peft.tuners.tuners_utils.BaseTunerLayer
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


def modules_of_peft(model: nn.Module) -> set[nn.Module]:
    """The modules that PEFT owns in ``model``.

    They are its layers without the ones inside, and the modules that it trains whole (``modules_to_save``). Of those,
    the original belongs to PEFT as well, because every further adapter gets a copy of it.
    """
    peft: Any = sys.modules.get("peft")
    owned: set[nn.Module] = set()
    for wrapper in peft_wrappers(model).values():
        owned |= set(wrapper.modules()) - set(wrapper.get_base_layer().modules())
    if peft is not None:
        copied = [m for m in model.modules() if isinstance(m, peft.utils.other.AuxiliaryTrainingWrapper)]
        owned.update(module for wrapper in copied for module in wrapper.modules())
    return owned


def is_lora_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of PEFT that adds LoRA to another one."""
    peft: Any = sys.modules.get("peft")
    if peft is None or isinstance(module, peft.tuners.adalora.AdaLoraLayer):
        return False
    return isinstance(module, peft.tuners.lora.LoraLayer)


def check_method(wrapper: Any, path: str) -> None:
    """Raises ValueError where ``wrapper``, a layer of PEFT, computes with the weight of the layer inside."""
    method = type(wrapper).__module__.split(".")[-2]
    if not is_lora_layer(wrapper) and method not in BESIDE_THE_WEIGHT:
        raise ValueError(
            f"{path}: PEFT's {method} computes with the weight itself, which an int4 layer does not have as a float "
            f"tensor; use LoRA, or one of {', '.join(BESIDE_THE_WEIGHT)}, on the model loaded anew"
        )


def check_wrapper(wrapper: Any, path: str) -> None:
    """Raises ValueError where ``wrapper``, PEFT's layer over a linear layer, could not stay one over an int4 layer."""
    check_method(wrapper, path)
    if wrapper.merged:
        raise ValueError(f"{path}: the adapter {wrapper.merged_adapters[0]!r} is merged; call unmerge_adapter() first")
    if not is_lora_layer(wrapper):
        return
    if type(wrapper).__name__ not in ("Linear", "Linear4bit", "PeftInt4Linear"):
        raise ValueError(f"{path}: adapters of PEFT's {type(wrapper).__name__} are not supported")
    variants = [name for name, variant in wrapper.lora_variant.items() if variant is not None]
    variants += [name for name, used in wrapper.use_dora.items() if used]
    if variants:
        raise ValueError(
            f"{path}: the adapter {variants[0]!r} is a variant of LoRA (DoRA, say), which is not supported"
        )


def fuse_lora_layers(model: nn.Module) -> None:
    """Turns PEFT's LoRA layers over int4 layers into ours, in place: adapters, optimizers and names stay."""
    for wrapper in peft_wrappers(model).values():
        if is_lora_layer(wrapper) and type(wrapper.base_layer) is Int4Linear:
            wrapper.__class__ = peft_int4_linear()


class _OverInt4(nn.Module):
    """The part of ``PeftInt4Linear`` that PEFT is not needed for: how an adapter computes over an int4 weight."""

    # PEFT's ``LoraLayer`` sets these.
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    _check_forward_args: Any
    _mixed_batch_forward: Any
    _cast_input_dtype: Any

    fan_in_fan_out = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            return self.base_layer(x)
        if names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=names, **kwargs)
        active, base = [name for name in self.active_adapters if name in self.lora_A], self.base_layer
        if len(active) == 1 and self._can_fuse(active[0]):
            a, b = self._adapter(active[0])
            scaling = self.scaling[active[0]]
            return int4_lora_linear(x, base.int4(), base.bias, a.weight, b.weight, scaling, base.backend)
        y = base(x)
        dtype = y.dtype
        for name in active:
            a, b = self._adapter(name)
            inside = self.lora_dropout[name](self._cast_input_dtype(x, a.weight.dtype))
            y = y + b(a(inside)) * self.scaling[name]
        return y.to(dtype)

    def _adapter(self, name: str) -> tuple[Any, Any]:
        """The modules of A ``[R, K]`` and B ``[N, R]``."""
        return self.lora_A[name], self.lora_B[name]

    def _can_fuse(self, adapter: str) -> bool:
        """Whether the fused operation computes what the separate modules would, and nobody watches these."""
        (a, b), dropout = self._adapter(adapter), self.lora_dropout[adapter]
        plain = type(self.base_layer) is Int4Linear and type(a) is type(b) is nn.Linear and b.bias is None
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        return plain and not drops and not any(is_watched(module) for module in (self.base_layer, a, b, dropout))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The product that ``adapter`` adds to the weight, ``[N, K]``; PEFT combines adapters by it."""
        a, b = self._adapter(adapter)
        return b.weight @ a.weight * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            "an int4 weight cannot take an adapter in: save the adapter with save_pretrained, and merge it into "
            "the unquantised model by PEFT, or into a store by `mebp merge`"
        )


@functools.cache
def peft_int4_linear() -> Any:
    """Makes the class ``PeftInt4Linear`` on the first call: it inherits from PEFT, which is imported then."""
    from peft.tuners.lora import LoraLayer

    parameters = inspect.signature(LoraLayer.update_layer).parameters
    takes_config = "config" in parameters  # since PEFT 0.19; before, every setting is an argument of its own

    class PeftInt4Linear(_OverInt4, LoraLayer):  # type: ignore[misc]
        """PEFT's LoRA layer over an ``Int4Linear``: ``[..., K]`` -> ``[..., N]``.

        ``merge`` raises: an int4 weight cannot take an adapter in.
        """

        def __init__(
            self, base_layer: nn.Module, adapter_name: str, r: int = 0, lora_alpha: float = 1, **kwargs: Any
        ) -> None:
            if isinstance(base_layer, Int4LoRALinear):
                raise ValueError("the layer has an adapter of mebp_triton already; make the model without lora=")
            if kwargs.get("parameter_name") is not None:
                raise ValueError("LoRA over int4 weights does not support target_parameters: use target_modules")
            nn.Module.__init__(self)
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            given = kwargs if takes_config else {name: value for name, value in kwargs.items() if name in parameters}
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, **given)

        def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
            settings = vars(kwargs["config"]) if takes_config else kwargs
            for name in VARIANTS:
                value = settings.get(name)
                # An adapter's file may say "orthogonal". But PEFT makes such an adapter in the dtype of the weight,
                # and the bytes of packed codes cannot hold it.
                if value is not None and (value not in UNSUPPORTED[name] or value == "orthogonal"):
                    raise ValueError(f"LoRA over int4 weights does not support {name}={value!r}: leave it out")
            super().update_layer(adapter_name, r, *args, **kwargs)

    # Unpickling looks for the class by this name in this module; ``__getattr__`` below answers.
    PeftInt4Linear.__qualname__ = "PeftInt4Linear"
    return PeftInt4Linear


def is_watched(module: nn.Module) -> bool:
    """Whether ``module`` has hooks or another forward than its class's, so that it has to be called itself."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def __getattr__(name: str) -> Any:
    if name == "PeftInt4Linear":
        return peft_int4_linear()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
