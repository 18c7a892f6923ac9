"""Runs the model of a source on a text, with the float weights of one block in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mebp_triton.blocks.runner import find_blocks
from mebp_triton.convert.readers import open_source
from mebp_triton.convert.readers.source import Source
from mebp_triton.data.batching import collate, evenly_spaced
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.models.config import check_vocabulary
from mebp_triton.models.discover import unreached_by_text
from mebp_triton.models.skeleton import build_skeleton, int4_sites, linear_names
from mebp_triton.store.block_inputs import FileBlockInputs

from .source_weights import SourceWeights
from .stream import BlockStream


class SourceRun:
    """The model of a bound source in float32, run block by block on windows of a text.

    The outputs of the blocks wait in a file without a name.

    Args:
        source: an opened source, bound to a skeleton of its config.
        data: the text.
        most_windows: how many windows, evenly spaced; None for all.
        scratch: the directory of the file.
        blocks: the path of the block list, where it is not found by itself.

    Attributes:
        model: the model.
        path: the path of the block list.
        stream: the windows, on their way through the model.

    Raises:
        ValueError: the text has tokens that the model does not have, or the source is damaged.
    """

    def __init__(
        self, source: Source, data: TokenizedData, most_windows: int | None, scratch: Path, blocks: str | None = None
    ) -> None:
        check_vocabulary(source.config, data, "the text")
        self.model = build_skeleton(copy.deepcopy(source.config), torch.float32)
        self.path, stack = find_blocks(self.model, blocks)
        batches = [collate([data[place]], pad_token_id=0) for place in evenly_spaced(data, most_windows)]
        for batch in batches:
            del batch["labels"]
        self.weights = SourceWeights(source, self.model)
        linear = linear_names(int4_sites(self.model)[0])
        unreached = unreached_by_text(source.config, self.path, linear)
        self.weights.load_rest(self.path, unreached, torch.cat([batch["input_ids"].flatten() for batch in batches]))
        self.stream = BlockStream(self.model, stack, batches, FileBlockInputs(scratch))

    @classmethod
    def of_path(cls, source: Path | str, data: TokenizedData, most_windows: int | None, scratch: Path) -> SourceRun:
        """The run of a model directory or a GGUF file."""
        opened = open_source(source)
        opened.bind(build_skeleton(copy.deepcopy(opened.config), torch.float32))
        return cls(opened, data, most_windows, scratch)

    @property
    def prefix(self) -> str:
        """How the names of the next block's parameters begin."""
        return f"{self.path}.{self.stream.next}."

    @contextmanager
    def block(self) -> Iterator[None]:
        """While active, the next block's float weights are in place."""
        prefix = self.prefix
        self.weights.load(prefix)
        try:
            yield
        finally:
            self.weights.unload(prefix)
