"""Copies what lies beside a model's weights: the config, the generation config, and the tokenizer's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mebp_triton.store.manifest import COMPANIONS
from mebp_triton.system.foreign_errors import one_line


def write_companions(config: dict[str, Any], source: Path, directory: Path) -> None:
    """Writes ``config`` as ``config.json``, and copies the other files beside the weights in ``source``.

    Files are copied byte for byte: a tokenizer object would write them as its version of transformers does.

    Raises:
        ValueError: one of the JSON files is not valid.
    """
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    Path(directory, "config.json").write_text(text, encoding="utf-8")
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                if file.suffix == ".json":
                    with one_line(f"{file} is not valid JSON", "download it again"):
                        json.loads(file.read_text(encoding="utf-8"))
                target = Path(directory, file.relative_to(source))
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
