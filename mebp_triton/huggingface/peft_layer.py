"""PEFT over our frozen layers: the layer that PEFT makes of an ``Int4Linear``, and how PEFT learns of it.

A single active adapter without dropout runs fused (``int4_lora_linear``); anything else that PEFT's own layers can do
by adapters on their input and output runs as the frozen layer and PEFT's two small ones. State dicts are PEFT's.
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


# Settings that change what a layer computes. The others of ``UNSUPPORTED`` are PEFT's to do around the layers.
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


# PEFT's methods, but LoRA, whose layers leave the weight to the layer within: they add to its input and output.
BESIDE_THE_WEIGHT = ("adalora", "fourierft", "ia3", "oft", "road", "vera")


def register_peft() -> None:
    """Lets ``get_peft_model`` and ``PeftModel.from_pretrained`` make ``PeftInt4Linear`` of every ``Int4Linear``.

    Without it they make PEFT's own layer: the same numbers, but not fused. Methods other than LoRA that compute with
    the weight itself are refused. For the whole process; calling it again changes nothing.
    """
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    create: Any = LoraModel._create_new_module
    if getattr(create, "knows_int4", False):
        return
    layer, inject = peft_layer(), BaseTuner.inject_adapter

    @functools.wraps(create)
    def create_new_module(lora_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        lora_config._register_custom_module({Int4Linear: layer} | (lora_config._custom_modules or {}))
        return create(lora_config, *args, **kwargs)

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        for path, wrapper in adapted_layers(model).items():
            if isinstance(wrapper.get_base_layer(), Int4Linear):
                check_method(wrapper, path)
        return result

    create_new_module.knows_int4 = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)  # type: ignore[method-assign]
    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


def register_where_installed() -> None:
    if importlib.util.find_spec("peft") is not None:
        register_peft()


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that PEFT put around others, to add an adapter, by path."""
    peft: Any = sys.modules.get("peft")
    kind = () if peft is None else peft.tuners.tuners_utils.BaseTunerLayer
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


def added_modules(model: nn.Module) -> set[nn.Module]:
    """What PEFT put into ``model``: its layers but not those within, and modules that it trains whole, with the
    original, of which every further adapter gets a copy."""
    peft: Any = sys.modules.get("peft")
    added: set[nn.Module] = set()
    for wrapper in adapted_layers(model).values():
        added |= set(wrapper.modules()) - set(wrapper.get_base_layer().modules())
    if peft is not None:
        copied = [m for m in model.modules() if isinstance(m, peft.utils.other.AuxiliaryTrainingWrapper)]
        added.update(module for wrapper in copied for module in wrapper.modules())
    return added


def is_lora_layer(module: nn.Module) -> bool:
    """Whether PEFT made ``module`` of another one, to add LoRA to it."""
    peft: Any = sys.modules.get("peft")
    if peft is None or isinstance(module, peft.tuners.adalora.AdaLoraLayer):
        return False
    return isinstance(module, peft.tuners.lora.LoraLayer)


def check_method(wrapper: Any, path: str) -> None:
    """ValueError where ``wrapper``, a layer of PEFT, computes with the weight of the layer within."""
    method = type(wrapper).__module__.split(".")[-2]
    if not is_lora_layer(wrapper) and method not in BESIDE_THE_WEIGHT:
        raise ValueError(
            f"{path}: PEFT's {method} computes with the weight itself, which an int4 layer does not have as a float "
            f"tensor; use LoRA, or one of {', '.join(BESIDE_THE_WEIGHT)}, on the model loaded anew"
        )


def check_adapted_layer(wrapper: Any, path: str) -> None:
    """ValueError where ``wrapper``, a layer of PEFT over a linear layer, cannot be one over an int4 layer."""
    check_method(wrapper, path)
    if wrapper.merged:
        raise ValueError(f"{path}: the adapter {wrapper.merged_adapters[0]!r} is merged; call unmerge_adapter() first")
    if not is_lora_layer(wrapper):
        return
    if type(wrapper).__name__ not in ("Linear", "Linear4bit", "PeftInt4Linear"):
        raise ValueError(f"{path}: adapters of PEFT's {type(wrapper).__name__} are not supported")
    odd = [name for name, variant in wrapper.lora_variant.items() if variant is not None]
    odd += [name for name, used in wrapper.use_dora.items() if used]
    if odd:
        raise ValueError(f"{path}: the adapter {odd[0]!r} is a variant of LoRA (DoRA, say), which is not supported")


def fuse_lora_layers(model: nn.Module) -> None:
    """Turns PEFT's LoRA layers over int4 layers into ours, in place: adapters, optimizers and names stay."""
    for wrapper in adapted_layers(model).values():
        if is_lora_layer(wrapper) and type(wrapper.base_layer) is Int4Linear:
            wrapper.__class__ = peft_layer()


@functools.cache
def peft_layer() -> Any:
    """The class ``PeftInt4Linear``: peft, which it inherits from, is imported on the first call."""
    from peft.tuners.lora import LoraLayer

    takes_config = "config" in inspect.signature(LoraLayer.update_layer).parameters  # since PEFT 0.19
    known = inspect.signature(LoraLayer.update_layer).parameters

    class PeftInt4Linear(nn.Module, LoraLayer):  # type: ignore[misc]
        """PEFT's LoRA layer over an ``Int4Linear``: ``[..., K]`` -> ``[..., N]``.

        ``merge`` raises: an int4 weight cannot take an adapter in.
        """

        fan_in_fan_out = False

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
            given = kwargs if takes_config else {name: value for name, value in kwargs.items() if name in known}
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, **given)

        def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
            settings = vars(kwargs["config"]) if takes_config else kwargs
            for name in VARIANTS:
                value = settings.get(name)
                # An adapter's file may say "orthogonal"; PEFT makes such a one in the dtype of the weight, bytes here.
                if value is not None and (value not in UNSUPPORTED[name] or value == "orthogonal"):
                    raise ValueError(f"LoRA over int4 weights does not support {name}={value!r}: leave it out")
            super().update_layer(adapter_name, r, *args, **kwargs)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._check_forward_args(x, *args, **kwargs)
            names = kwargs.pop("adapter_names", None)
            if self.disable_adapters:
                return self.base_layer(x)
            if names is not None:
                return self._mixed_batch_forward(x, *args, adapter_names=names, **kwargs)
            active = [name for name in self.active_adapters if name in self.lora_A]
            base: Any = self.base_layer
            if len(active) == 1 and self._fuses(active[0]):
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

        def _fuses(self, adapter: str) -> bool:
            """Whether the fused operation does what the separate modules would."""
            (a, b), dropout = self._adapter(adapter), self.lora_dropout[adapter]
            plain = type(self.base_layer) is Int4Linear and type(a) is type(b) is nn.Linear and b.bias is None
            drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
            return plain and not drops and not any(watched(module) for module in (self.base_layer, a, b, dropout))

        def get_delta_weight(self, adapter: str) -> Tensor:
            """What ``adapter`` adds to the weight, ``[N, K]``: PEFT's combinations by SVD ask for it."""
            a, b = self._adapter(adapter)
            return b.weight @ a.weight * self.scaling[adapter]

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise NotImplementedError(
                "an int4 weight cannot take an adapter in: save the adapter with save_pretrained, and merge it into "
                "the unquantised model by PEFT, or into a store by `mebp merge`"
            )

    # So that a pickled layer is found again; see ``__getattr__`` below.
    PeftInt4Linear.__qualname__ = "PeftInt4Linear"
    return PeftInt4Linear


def watched(module: nn.Module) -> bool:
    """Whether someone hooked into ``module`` or put something in its forward's place: it must be called then."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def __getattr__(name: str) -> Any:
    if name == "PeftInt4Linear":
        return peft_layer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
