"""Training text: files -> token rows -> batches, in an order that a resumed run finds again.

``sources`` reads files, ``text`` and ``rows`` make tokens and masks of what they hold, ``tokenized`` keeps them (in
memory or in a file), ``packing`` puts several rows into one, ``batching`` orders and pads them.
"""

from .batching import batches, batches_per_epoch, collate, epoch_order, evenly_spaced, valid_tokens
from .loading import load_data
from .packing import PackedData, check_packing, pack
from .rows import ROW_KINDS, Masking
from .sources import check_source
from .tokenized import IGNORE_INDEX, DataReport, Example, TokenizedData

__all__ = [
    "IGNORE_INDEX",
    "ROW_KINDS",
    "DataReport",
    "Example",
    "Masking",
    "PackedData",
    "TokenizedData",
    "batches",
    "batches_per_epoch",
    "check_packing",
    "check_source",
    "collate",
    "epoch_order",
    "evenly_spaced",
    "load_data",
    "pack",
    "valid_tokens",
]
