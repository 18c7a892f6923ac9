"""The quantization config of ``from_pretrained`` and ``save_pretrained``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from mebp_triton.kernels.layout import LAYOUT
from mebp_triton.kernels.names import Scheme, fill_form
from mebp_triton.kernels.quantize import check_form

METHOD = "mebp_int4"


@register_quantization_config(METHOD)
class Int4Config(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a model; in the ``config.json`` of a saved one, how it was quantized.

    Weights are quantized from the values that they have in the ``dtype`` given to ``from_pretrained``.

    Args:
        scheme, group_size, scale_search: as in ``quantize``; "codebook" is NF4.
        bits: the width of codes, 4 or 8.
        modules_to_not_convert: modules that stay float with all they hold: paths, or some parts of paths in a row
            ("layers.0.mlp", "q_proj"). Embedding and heads always stay float.
        layout: the layout of the packed codes; ``save_pretrained`` writes it.
        float32_scales: layers whose scales float16 cannot hold; ``save_pretrained`` writes them.

    Raises:
        ValueError: a value does not fit.
    """

    def __init__(
        self,
        scheme: Scheme | None = None,
        group_size: int | None = None,
        scale_search: bool = True,
        modules_to_not_convert: Iterable[str] | None = None,
        layout: str = LAYOUT,
        float32_scales: Iterable[str] = (),
        quant_method: str = METHOD,
        bits: int = 4,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is not a setting of Int4Config")
        scheme, group_size, bits = fill_form(scheme, group_size, bits)
        check_form(scheme, group_size, bits)
        if layout != LAYOUT:
            raise ValueError(f"int4 weights of layout {layout!r} cannot be read, only {LAYOUT!r}: quantize anew")
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        self.quant_method: Any = METHOD
        self.scheme, self.group_size, self.scale_search, self.bits = scheme, group_size, scale_search, bits
        self.modules_to_not_convert = _list_of_names("modules_to_not_convert", modules_to_not_convert or ())
        self.layout, self.float32_scales = layout, _list_of_names("float32_scales", float32_scales)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them, with ``bits`` only where it is not 4: older versions know no other width."""
        return {name: value for name, value in super().to_dict().items() if (name, value) != ("bits", 4)}


def _list_of_names(what: str, names: Iterable[str]) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) and name for name in listed):
        raise ValueError(f"{what} must be a list of module names, got {listed!r}")
    return listed
