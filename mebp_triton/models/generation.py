"""Where a model stops: the end tokens of its generation config, and those that a training adds to them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mebp_triton.system import strict_json

from .config import read_json_object

GENERATION_CONFIG = "generation_config.json"
STOPS = "eos_token_id"
REMEDY = "compare it with the model's original"


def stop_ids(model: Any) -> list[int]:
    """The ids at which ``model.generate`` stops, in the order of its generation config."""
    return _as_list(getattr(getattr(model, "generation_config", None), STOPS, None))


def stop_strings(model: Any) -> list[str]:
    """The texts at which the generation config has ``model.generate`` stop; it needs a tokenizer for them."""
    return _as_list(getattr(getattr(model, "generation_config", None), "stop_strings", None))


def add_stops(model: Any, ids: Iterable[int]) -> None:
    """Has ``model.generate`` of a model of ``load`` stop at these ids too; ``save_adapter`` keeps them."""
    stops = stop_ids(model)
    added = [token for token in dict.fromkeys(ids) if token not in stops]
    if added and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = stops + added
        model.mebp.stops = [*model.mebp.stops, *added]  # a new list: copies of the model may share the old one


def saved_stops(directory: Path | str) -> list[int]:
    """The ids at which the generation config in ``directory`` stops; none where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(directory) / GENERATION_CONFIG
    if not path.exists():
        return []
    ids = _as_list(read_json_object(path, REMEDY).get(STOPS))
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{path}: {STOPS} is {ids!r:.100}, wanted token ids; {REMEDY}")
    return ids


def write_stops(directory: Path, base: Path, stops: Iterable[int]) -> None:
    """Writes the generation config of ``base`` into ``directory``, stopping at ``stops`` too.

    Where ``base`` has none, the tokens that its config names go into a new one, as transformers derives it.
    """
    path = base / GENERATION_CONFIG
    if path.exists():
        values = read_json_object(path, REMEDY)
    else:
        config = read_json_object(base / "config.json", REMEDY)
        inner = config.get("text_config")
        config |= inner if isinstance(inner, dict) else {}
        values = {
            name: config[name] for name in ("bos_token_id", STOPS, "pad_token_id") if config.get(name) is not None
        }
    values[STOPS] = list(dict.fromkeys([*_as_list(values.get(STOPS)), *stops]))
    strict_json.write_json(directory / GENERATION_CONFIG, values)


def _as_list(values: Any) -> list[Any]:
    """A setting as a list: it may be absent, one value or several."""
    return [] if values is None else list(values) if isinstance(values, list | tuple) else [values]
