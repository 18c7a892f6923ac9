"""Rows from files: from one file, a directory with a file per split, or a dataset that ``save_to_disk`` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mebp_triton.system import strict_json

from .rows import COLUMNS
from .text_rows import csv_rows, json_rows, jsonl_rows

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
WANTED = "a .txt, .jsonl, .json, .csv or .parquet file"
# The names of the split in a directory, by what the file is for.
SPLITS = {"train-file": ("train",), "calibration-file": ("train",), "validation-file": ("validation", "valid")}
# What datasets' save_to_disk writes beside one dataset, and beside several splits.
DATASET, DATASETS = "dataset_info.json", "dataset_dict.json"
BATCH_ROWS = 256
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
# Behind the split's name, in a file of a dataset of the hub: its number, how many there are, and perhaps a checksum.
SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?")


def check_source(path: str | Path, name: str = "train-file") -> list[Path]:
    """Finds the file, the directory of a saved dataset, or the shards in their order, that ``path`` means.

    Args:
        path: a file (``SUFFIXES``); a directory that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote; or
            a directory with ``train.jsonl`` and ``valid.jsonl`` (or of the other suffixes, or ``validation``), or with
            shards, ``train-00000-of-00002.parquet``, there or in its ``data``, as a dataset of the hub has them.
        name: "train-file", "calibration-file" or "validation-file": the split of a directory that is meant, and the
            name in errors.

    Raises:
        ValueError: there is no such thing.
    """
    path = Path(path)
    where = f"{name} {path}"
    if path.is_dir() and not (path / DATASET).is_file():
        found = _split(path, SPLITS.get(name, (name,)), where)
        if len(found) > 1:
            return found
        path, where = found[0], f"{name} {found[0]}"
    if path.is_dir() and (path / DATASET).is_file():
        return [path]
    if not path.is_file():
        problem = "is a special file" if path.exists() else "no such file"
        raise ValueError(f"{where}: {problem}; give {WANTED}")
    if path.suffix.lower() in COMPRESSED:
        raise ValueError(f"{where}: is compressed; unpack it, and give {WANTED}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{where}: unknown suffix {path.suffix!r}; give {WANTED}")
    return [path]


def _split(directory: Path, names: tuple[str, ...], where: str) -> list[Path]:
    """The one entry of ``directory`` that has one of ``names``, without its suffix; or the shards of that name."""
    saved = (directory / DATASETS).is_file()
    entries = [name if saved else f"{name}{suffix}" for name in names for suffix in SUFFIXES[: 1 if saved else None]]
    folders = [folder for folder in (directory, directory / "data") if folder.is_dir()][: 1 if saved else None]
    for folder in folders:
        paths = [folder / entry for entry in entries if (folder / entry).exists()]
        if len(paths) > 1:
            both = " and ".join(path.name for path in paths)
            raise ValueError(f"{where}: is a directory with {both}; name the one that is meant")
        if found := paths or _shards(folder, names, where):
            return found
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        if path.suffix.lower() in COMPRESSED and path.name.startswith(names):
            raise ValueError(
                f"{where}: is a directory with {path.relative_to(directory)}, which is compressed; unpack it"
            )
    kind = "with saved datasets" if saved else "and no saved dataset"
    raise ValueError(f"{where}: is a directory {kind}, without {' or '.join(entries)}; give {WANTED}")


def _shards(directory: Path, names: tuple[str, ...], where: str) -> list[Path]:
    """The files of a split that is cut into shards, in their order; none where there are no shards."""
    found: dict[tuple[str, str, str], dict[int, Path]] = {}
    for path in sorted(directory.iterdir()):
        for name in names:
            shard = SHARD.fullmatch(path.stem[len(name) :]) if path.stem.startswith(name) else None
            if shard and path.suffix in SUFFIXES[1:]:  # a text would be cut between two words
                same = found.setdefault((name, shard[2], path.suffix), {}).setdefault(int(shard[1]), path)
                if same != path:
                    raise ValueError(
                        f"{where}: has {same.name} and {path.name} in {directory}; leave one of them there"
                    )
    if len(found) > 1:
        both = " and ".join(f"{name}-*-of-{count}{suffix}" for name, count, suffix in found)
        raise ValueError(f"{where}: has {both} in {directory}; leave one of them there")
    for (name, count, suffix), shards in found.items():
        missing = next((number for number in range(int(count)) if number not in shards), None)
        if missing is not None:
            raise ValueError(
                f"{where}: has {len(shards)} of the {int(count)} files {name}-*-of-{count}{suffix} in {directory}; "
                f"the one of number {missing} is missing: put it there"
            )
        return [shards[number] for number in range(int(count))]
    return []


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Reads the rows of a path that ``check_source`` returned, one after the other.

    Yields:
        The row's number, from 1 (in a ``.jsonl`` or ``.csv`` file, its line), and the row.

    Raises:
        ValueError: the file is broken; ``BrokenRow`` where it is known at which row.
    """
    if path.is_dir():
        return _dataset_rows(path)
    readers = {".jsonl": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": _parquet_rows}
    return readers[path.suffix.lower()](path)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("needs the pyarrow package; pip install 'mebp-triton[datasets]'") from error

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in COLUMNS] or names  # a table may have large columns beside them
            unread = dict.fromkeys(set(names) - set(wanted), ...)  # named as keys without effect, whatever they hold
            for batch in file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
                batch.validate(full=True)  # Arrow would follow a bent offset out of the buffer
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_none(row) | unread
    except (pyarrow.ArrowException, OSError) as error:  # Arrow's own OSError has no number
        raise ValueError(f"cannot be read as parquet ({_line(error)}); write it again") from error


def _dataset_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("needs the datasets package; pip install 'mebp-triton[datasets]'") from error

    try:
        _check_saved(path)
        dataset = datasets.load_from_disk(str(path)).with_format(None)  # all columns, as Python's own values
        dataset.data.table.validate(full=True)  # Arrow would follow a bent offset out of the file
        for number, row in enumerate(dataset, start=1):
            yield number, _without_none(row)
    except Exception as error:  # datasets trusts its own JSON, and so may raise anything
        raise ValueError(f"cannot be read as a saved dataset ({_line(error)}); save it again") from error


def _check_saved(path: Path) -> None:
    """Raises TypeError where a saved dataset names no files, or one outside of its directory."""
    state = strict_json.read_json(path / "state.json")
    if not isinstance(state, dict) or not isinstance(state.get("_data_files"), list):
        raise TypeError("state.json names no data files")
    for entry in state["_data_files"]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or set(name) & set("/\\\0") or not (path / name).is_file():
            raise TypeError(f"state.json names {name!r:.100}, which is no file of this directory")


def _line(error: Exception) -> str:
    """An error in one line, with its kind."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _without_none(value: Any) -> Any:
    """The value without the keys whose value is None: Arrow gives all rows the same keys."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
