"""Reads settings from a YAML or JSON file, which stands in for flags."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mebp_triton.system import errors, reading, strict_json

from .settings import TrainConfig

CONFIG_FILE_LIMIT = 1 << 20


def _parse_yaml(data: bytes) -> Any:
    """Parses plain values by name. Aliases are refused, since with them a short file can make gigabytes."""
    loader = yaml.SafeLoader(data)
    try:
        node = loader.get_single_node()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            raise ValueError(f"setting {next(key for key in keys if keys.count(key) > 1)!r:.100} stands twice")
        if not all(isinstance(part, yaml.ScalarNode) for pair in pairs for part in pair):
            raise ValueError("every setting is a name and one plain value")
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _problem(error: Exception) -> str:
    """Returns the fault in one line: PyYAML's own message has several, and calls the file a byte string."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"position {error.position}: {error.reason}"
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    parts = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    return f"line {mark.line + 1}, column {mark.column + 1}: {', '.join(parts)}"


def read_config_file(path: Path | str) -> dict[str, Any]:
    """Reads a YAML or JSON file of settings, whose keys are the flags' names with dashes or underscores.

    Returns:
        The values by setting; ``TrainConfig`` checks them.

    Raises:
        ValueError: the file cannot be read, or a key is no setting. Then the message names the nearest one.
    """
    path = Path(path)
    data = reading.read_bytes(path, CONFIG_FILE_LIMIT)
    try:
        values = strict_json.parse_json(data, str(path)) if path.suffix == ".json" else _parse_yaml(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, errors.FileError):
            raise
        raise ValueError(f"{path} is not valid YAML: {_problem(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold settings by name, got {type(values).__name__}")
    known = [item.name for item in dataclasses.fields(TrainConfig)]
    kinds = get_type_hints(TrainConfig)
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"{path}: unknown setting {key!r:.100}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if name in settings:
            raise ValueError(f"{path}: setting {name!r} stands twice")
        if value is not None and type(value) not in (str, int, float, bool):
            raise ValueError(f"{path}: setting {name!r} must be one value, got {type(value).__name__}")
        if name == "memory_budget" and type(value) is int:
            value = str(value)  # bytes
        if kinds[name] is float and isinstance(value, str):  # for YAML 1.1, 2e-4 is a word
            with contextlib.suppress(ValueError):
                value = float(value)
        settings[name] = value
    return settings
