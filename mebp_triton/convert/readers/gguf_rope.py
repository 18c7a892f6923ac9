"""Makes the RoPE settings of a config from a GGUF file's keys and tensors.

llama.cpp turns a pair of coordinates by ``position * base**(-2i/d) / (scale * factor[i])``, where the factors come from
a tensor; YaRN mixes scaled and unscaled frequencies and multiplies queries and keys. transformers has the same under
the names in ``rope_scaling``. What it cannot express is refused.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .gguf_header import DOWNLOAD
from .gguf_keys import NOT_HERE, ROPE, YARN_MULTIPLIER, Architecture, Settings, is_number, width_of_head

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# YaRN's numbers, which no key may change.
YARN = {
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}
# The lengths and factors that Llama 3.1 and all its descendants have.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_settings(
    known: Architecture,
    stated: dict[str, Any],
    settings: Settings,
    factors: dict[str, np.ndarray],
) -> Settings:
    """The config's settings for RoPE.

    Args:
        known: the file's architecture.
        stated: the values of the file's keys, by the keys' names without the architecture's.
        settings: the settings that are known already.
        factors: the file's tensors of RoPE's factors, each ``[rotated / 2]``.

    Raises:
        ValueError: the frequencies cannot be had in transformers. The message begins with the key or tensor.
    """
    if known.rope is None:
        return {}
    for key, value in stated.items():
        if key in ROPE and key != "rope.scaling.type" and not is_number(value):
            raise ValueError(f"{key} is {value!r:.100}, wanted a number; {DOWNLOAD}")
        if key.startswith("rope.freq_base") and value <= 0:
            raise ValueError(f"{key} is {value}, wanted more than 0; {DOWNLOAD}")
    if known.rope == "kinds":
        return {"rope_parameters": _of_kinds(stated, settings, factors)}
    head = width_of_head(settings)
    rotated = int(stated.get("rope.dimension_count", head))
    result: Settings = {"rope_theta": float(stated.get("rope.freq_base", 10000.0))}
    if known.rope == "partial":
        result["partial_rotary_factor"] = rotated / max(1, head)
        if not 0 < rotated <= head or int(head * result["partial_rotary_factor"]) != rotated:
            raise ValueError(f"rope.dimension_count is {rotated} of {head}, {NOT_HERE}")
    elif rotated != head:
        raise ValueError(f"rope.dimension_count is {rotated}, wanted {head}; give the model as safetensors")
    _set_local(known, stated, settings, result)
    shape = (rotated // 2,)
    for name, values in factors.items():
        if values.shape != shape:
            raise ValueError(f"{name} has shape {values.shape}, wanted {shape}; give the model as safetensors")
    if LONG in factors or SHORT in factors or stated.get("rope.scaling.type") == "longrope":
        if FREQS in factors:
            raise ValueError(f"{FREQS} stands beside other factors, {NOT_HERE}")
        result["rope_scaling"] = _longrope(stated, settings, factors)
        return result
    if known.rope == "local" and stated.get("rope.scaling.attn_factor", 1.0) != 1.0:  # meant for all layers
        raise ValueError(f"rope.scaling.attn_factor is {stated['rope.scaling.attn_factor']}, {NOT_HERE}")
    scaling = _from_keys(known, stated, settings)
    if FREQS in factors:
        found = from_factors(factors[FREQS].astype(np.float64), result["rope_theta"])
        if scaling and found:
            raise ValueError(f"{FREQS} stands beside rope.scaling.type {scaling['rope_type']}, {NOT_HERE}")
        scaling = scaling or found
    elif scaling and scaling["rope_type"] not in known.scaled:
        raise ValueError(f"{_factor_key(stated)} is {_factor(stated)}, {NOT_HERE}")
    if scaling:
        result["rope_scaling"] = scaling
    return result


def _set_local(known: Architecture, stated: dict[str, Any], settings: Settings, result: Settings) -> None:
    """Sets the base of layers with a sliding window, where they have their own."""
    local = stated.get("rope.freq_base_swa")
    if known.rope == "local":
        result["rope_local_base_freq"] = 10000.0 if local is None else float(local)
    elif local is not None and settings.get("sliding_window") and not math.isclose(local, result["rope_theta"]):
        raise ValueError(f"rope.freq_base_swa is {local}, wanted {result['rope_theta']}; give the model as safetensors")


def _factor_key(stated: dict[str, Any]) -> str:
    """The key of the linear factor: the old one counts only without the new one."""
    return "rope.scaling.factor" if "rope.scaling.factor" in stated else "rope.scale_linear"


def _factor(stated: dict[str, Any]) -> float:
    return float(stated.get(_factor_key(stated), 0.0)) or 1.0


def _of_kinds(stated: dict[str, Any], settings: Settings, factors: dict[str, np.ndarray]) -> Settings:
    """RoPE of sliding layers and of the others, which leave the last coordinates of a head as they are.

    A file says so by factors of 1, and then enormous ones.
    """
    if (factor := _factor(stated)) != 1.0 or stated.get("rope.scaling.type", "none") != "none":
        raise ValueError(f"{_factor_key(stated)} is {factor}, {NOT_HERE}")
    values = factors.get(FREQS)
    pairs = settings["global_head_dim"] // 2
    if values is None or values.shape != (pairs,):
        shape = "missing" if values is None else f"of shape {values.shape}"
        raise ValueError(f"{FREQS} is {shape}, wanted ({pairs},); give a complete GGUF")
    turned = int((values == 1.0).sum())
    if not (values[:turned] == 1.0).all() or not (values[turned:] > 1e20).all():
        raise ValueError(f"{FREQS} holds factors other than 1 and 1e30, {NOT_HERE}")
    theta, local = (float(stated.get(key, 10000.0)) for key in ("rope.freq_base", "rope.freq_base_swa"))
    whole = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": turned / pairs}
    return {"full_attention": whole, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _from_keys(known: Architecture, stated: dict[str, Any], settings: Settings) -> Settings | None:
    """The scaling that keys alone describe; None where there is none."""
    beta = settings.pop("llama_4_scaling_beta", 0.0)
    kind = stated.get("rope.scaling.type", "linear")
    factor = _factor(stated)
    attention = float(stated.get("rope.scaling.attn_factor", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type is {kind!r:.100}, {NOT_HERE}")
    if not 0 < factor < math.inf:
        raise ValueError(f"{_factor_key(stated)} is {factor}; {DOWNLOAD}")
    for key, neutral in YARN.items():
        if float(stated.get(key, neutral)) not in (neutral, -1.0):  # llama.cpp itself reads them for few architectures
            raise ValueError(f"{key} is {stated[key]}, wanted {neutral}; give the model as safetensors")
    if kind == "yarn":
        result = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(
                stated.get("rope.scaling.original_context_length") or settings["max_position_embeddings"]
            ),
            "attention_factor": attention * _mscale(factor, 1.0),
        }
        if known.yarn_multiplier is not None:
            result |= _mscales(float(stated.get(YARN_MULTIPLIER, 0.0)) * known.yarn_multiplier, factor, attention)
        return result | ({"llama_4_scaling_beta": beta} if beta else {})
    if beta:
        raise ValueError(f"attention.temperature_scale is {beta} with rope.scaling.type {kind}, {NOT_HERE}")
    if attention != 1.0:
        raise ValueError(f"rope.scaling.attn_factor is {attention} with rope.scaling.type {kind}, {NOT_HERE}")
    if kind == "none" and factor != 1.0:
        raise ValueError(f"rope.scaling.factor is {factor} with rope.scaling.type none, {NOT_HERE}")
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _mscale(factor: float, multiplier: float) -> float:
    """YaRN's factor of queries and keys: 1 where nothing is scaled."""
    return 1.0 if factor <= 1.0 else 1.0 + 0.1 * multiplier * math.log(factor)


def _mscales(over_all: float, factor: float, attention: float) -> Settings:
    """YaRN's factors where attention's scores have one of their own: DeepSeek divides RoPE's by it."""
    if attention != 1.0:
        raise ValueError(f"rope.scaling.attn_factor is {attention}, {NOT_HERE}")
    over_all = round(over_all, 6)  # a file has float32
    in_rope = _mscale(factor, 1.0) / _mscale(factor, over_all) if over_all in (0.0, 1.0) else 1.0
    return {"attention_factor": in_rope, "mscale_all_dim": over_all or 1.0}


def _longrope(stated: dict[str, Any], settings: Settings, factors: dict[str, np.ndarray]) -> Settings:
    for name in (LONG, SHORT):
        if name not in factors:
            raise ValueError(
                f"{name} is missing: rope.scaling.type longrope is {LONG} and {SHORT}; give a complete GGUF"
            )
    kind = stated.get("rope.scaling.type", "longrope")
    if kind not in ("longrope", "linear", "none"):
        raise ValueError(f"rope.scaling.type is {kind!r:.100} beside {LONG}, {NOT_HERE}")
    if (factor := _factor(stated)) != 1.0:
        raise ValueError(f"{_factor_key(stated)} is {factor} beside {LONG}, {NOT_HERE}")
    original = int(stated.get("rope.scaling.original_context_length") or settings["max_position_embeddings"])
    settings["original_max_position_embeddings"] = original
    return {
        "rope_type": "longrope",
        "long_factor": factors[LONG].tolist(),
        "short_factor": factors[SHORT].tolist(),
        "original_max_position_embeddings": original,
        "factor": settings["max_position_embeddings"] / original,
        "attention_factor": float(stated.get("rope.scaling.attn_factor", 1.0)),
    }


def from_factors(factors: np.ndarray, theta: float) -> Settings | None:
    """The scaling that gives ``factors`` (float64 ``[rotated / 2]``), by which frequencies are divided; None for ones.

    Equal factors are linear scaling. Llama 3's grow from 1 to a largest one between two wavelengths.

    Raises:
        ValueError: neither gives them.
    """
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise ValueError(f"{FREQS} holds a number that is no factor; download the file again")
    if np.allclose(factors, factors[0], rtol=1e-5):
        factor = float(factors[0])
        return None if math.isclose(factor, 1.0, rel_tol=1e-5) else {"rope_type": "linear", "factor": factor}
    largest = float(factors.max())
    rounded = round(largest * 64) / 64  # factors are stored in float32
    scaling = {"rope_type": "llama3", "factor": rounded if math.isclose(rounded, largest, rel_tol=1e-5) else largest}
    scaling |= LLAMA3
    if not np.allclose(llama3_factors(scaling, theta, len(factors)), factors, rtol=1e-4):
        raise ValueError(f"{FREQS} holds factors that no scaling in transformers gives; give the model as safetensors")
    return scaling


def llama3_factors(scaling: Settings, theta: float, count: int) -> np.ndarray:
    """Llama 3's factors (float64 ``[count]``): 1 for short wavelengths, ``factor`` for long ones, smooth between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(count) / count)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
