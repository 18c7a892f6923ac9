"""JSON without duplicate keys, NaN or infinity; objects that carry a checksum of themselves."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .atomic import write_bytes
from .errors import FileError
from .reading import read_bytes

SEAL = "seal"
# The errors of Python code that reads JSON of another form than it expects.
MALFORMED: tuple[type[Exception], ...] = (LookupError, TypeError, AttributeError, ValueError, OverflowError)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file. ValueError where a number in ``value`` is not finite."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object for ``json.loads``. ValueError where a key stands twice."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r:.100} stands twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is larger than any number")
    return number


def parse_json(data: bytes | str, what: str) -> Any:
    """Parses JSON. FileError, which names ``what``, for duplicate keys, NaN, infinity, or what is no JSON."""
    try:
        return json.loads(data, object_pairs_hook=no_duplicates, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{what} is not valid JSON: {error}") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file. FileError where it is none, or not strict."""
    return parse_json(read_bytes(path), str(path))


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``value`` with a seal: the checksum of all the rest, which ``read_sealed`` compares."""
    body = {key: item for key, item in value.items() if key != SEAL}
    text = json.dumps(json.loads(json.dumps(body)), sort_keys=True)
    return body | {SEAL: zlib.crc32(text.encode())}


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file, without its seal. FileError where the seal is missing or broken."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a JSON {type(value).__name__}, wanted an object")
    if value != sealed(value):
        raise FileError(f"{path} is damaged or was changed: its checksum differs")
    del value[SEAL]
    return value
