"""The names users choose by: schemes, group sizes, backends, dtypes. Imports nothing, so that parsing is quick."""

from __future__ import annotations

from typing import Literal, get_args

Scheme = Literal["symmetric", "affine", "codebook"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
GROUP_SIZES = (32, 64, 128)
Backend = Literal["auto", "triton", "panel"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
FloatName = Literal["float32", "bfloat16", "float16"]
FLOAT_NAMES: tuple[FloatName, ...] = get_args(FloatName)
