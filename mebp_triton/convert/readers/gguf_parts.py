"""Reads the headers of a model that lies in one GGUF file or in several parts, as ``llama-gguf-split`` makes them.

Part 2 of 3 is named ``PREFIX-00002-of-00003.gguf``. The first part has the metadata; each states its number.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from mebp_triton.models.names import enumerate_names

from .gguf_header import DOWNLOAD, Entry, Header, read_header

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
MOST_PARTS = 65535  # the numbers have 16 bits
ALL = "download all parts of one model into one folder, and keep their names"


def read_model(path: Path) -> Header:
    """Reads the header of a model: the metadata of its first part, and the tensors of all parts.

    Args:
        path: the model's file, or any of its parts.

    Raises:
        ValueError: a file cannot be read (see ``read_header``), or the parts are not those of one model.
    """
    header = read_header(path)
    count = header.metadata.get(COUNT, 1)
    if count in (0, 1):
        return header
    paths = _paths(path, header.metadata.get(NUMBER), count)
    parts = [read_header(each) for each in paths]
    first = parts[0]
    tensors: dict[str, Entry] = {}
    for number, part in enumerate(parts):
        _check_part(part, number, count, first)
        for name, entry in part.tensors.items():
            if name in tensors:
                raise ValueError(f"{tensors[name].path} and {part.path} both have {name}; {ALL}")
            tensors[name] = entry
    stated = first.metadata.get(TENSORS, len(tensors))
    if stated != len(tensors):
        raise ValueError(f"{first.path}: {TENSORS} is {stated!r:.100}, its parts have {len(tensors)}; {ALL}")
    return Header(first.path, first.metadata, tensors, first.places)


def _paths(path: Path, number: Any, count: Any) -> list[Path]:
    """The files of all parts, by the name and the stated number of one of them. All of them are there."""
    if type(count) is not int or type(number) is not int or not 0 <= number < count <= MOST_PARTS:
        raise ValueError(f"{path} has damaged numbers: {NUMBER} is {number!r:.100} of {count!r:.100}; {DOWNLOAD}")
    ending = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if not path.name.endswith(ending):
        raise ValueError(f"{path} is part {number + 1} of {count}, and its name must end with {ending}; {ALL}")
    prefix = path.name.removesuffix(ending)
    paths = [path.with_name(f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf") for index in range(count)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise ValueError(
            f"{path} is part {number + 1} of {count}, but beside it is no {enumerate_names(missing)}; {ALL}"
        )
    others = glob.glob(glob.escape(str(path).removesuffix(ending)) + "-" + "[0-9]" * 5 + f"-of-{count:05d}.gguf")
    extra = sorted(set(others) - {str(each) for each in paths})
    if extra:
        raise ValueError(f"{extra[0]} cannot be one of {count} parts; {ALL}")
    return paths


def _check_part(part: Header, number: int, count: int, first: Header) -> None:
    """Raises ValueError where a file is not what its name says, or belongs to another model than the first part."""
    model = "general.architecture"
    wanted = {NUMBER: number, COUNT: count, TENSORS: first.metadata.get(TENSORS)}
    if model in part.metadata:  # which only the first part must state
        wanted[model] = first.metadata.get(model)
    for key, value in wanted.items():
        stated = part.metadata.get(key)
        if stated != value:
            raise ValueError(
                f"{part.path} is not part {number + 1} of {count} of this model: {key} is {stated!r:.100}, "
                f"not {value!r:.100}; {ALL}"
            )
