"""The texts of a training run as tokens, and what a resumed run takes over before it has read its checkpoint."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from mebp_triton.data.loading import load_data
from mebp_triton.data.packing import pack
from mebp_triton.data.template import may_write_date
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.system import atomic, strict_json
from mebp_triton.training.settings import TrainConfig

from .chat_template import describe_training, use_template
from .console import say
from .inference import check_length, load_tokenizer
from .stops import RowEnds, find_row_ends


def begun_at(checkpoint: Path | None) -> str:
    """When the run of a checkpoint began, in ISO's form; now for a run without one, or with one that does not know."""
    began = None if checkpoint is None else strict_json.read_sealed(checkpoint / "state.json").get("began")
    return began if isinstance(began, str) else datetime.now().isoformat()


def begun_with(checkpoint: Path) -> dict[str, Any]:
    """The settings that order the sums of a run, as it was begun with, by choice or by its plan."""
    settings = strict_json.read_sealed(checkpoint / "state.json").get("config")
    if not isinstance(settings, dict):
        return {}
    # An older version joined nothing.
    return {"mlp_chunk_tokens": settings.get("mlp_chunk_tokens")} | {
        "join_micro_batches": settings.get("join_micro_batches", False)
    }


def load_texts(
    directory: Path, asked: TrainConfig, template: str | None, began: str
) -> tuple[TokenizedData, TokenizedData | None, RowEnds, str | None]:
    """The training and the validation file as tokens, by the tokenizer in ``directory``, with another chat template.

    Says what the template makes of rows that a user would not expect. Returns also how the training file's rows end,
    and ``began`` where a template may have written that date.

    Args:
        began: when the run began, in ISO's form.
    """
    tokenizer = load_tokenizer(directory)
    if template is not None:
        use_template(tokenizer, template, f"chat-template {asked.chat_template or 'of the adapter'}")
    check_length(directory, asked.max_length)

    def tokenized(path: str, name: str) -> TokenizedData:
        return load_data(
            path, tokenizer, asked.max_length, name=name, masking=asked.masking(), scratch=scratch, date=date
        )

    date = datetime.fromisoformat(began)
    scratch = atomic.existing_parent(Path(asked.output_dir))
    data = tokenized(asked.train_file, "train-file")
    validation = tokenized(asked.validation_file, "validation-file") if asked.validation_file else None
    ends = find_row_ends(data, tokenizer)
    for line in describe_training(tokenizer, data.report, date):
        say(line)
    templates = tokenizer.chat_template or ""
    dated = any(map(may_write_date, templates.values() if isinstance(templates, dict) else [templates]))
    data = pack(data, asked.max_length) if asked.packing else data
    return data, validation, ends, began if dated else None
