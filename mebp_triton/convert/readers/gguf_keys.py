"""Turns the metadata keys of a GGUF file into settings of the model's config, by rules.

A file states its model as keys named after the architecture: ``llama.rope.freq_base``. Each key has a rule: it is set
in the config, must say what the model computes anyway, or has no effect on the model. A key without a rule is refused,
because the model would then be another one than llama.cpp runs. ``gguf_architectures.py`` has the table of rules.

Absent keys take llama.cpp's defaults, not those of transformers, whose configs have the numbers of one checkpoint.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .gguf_header import DOWNLOAD, Length
from .gguf_undo import Undo

Settings = dict[str, Any]
REQUIRED = object()


@dataclass(frozen=True)
class Set:
    """A key whose value is the setting ``name``.

    Attributes:
        absent: the setting of a file without the key, or a function of the settings so far; ``REQUIRED`` refuses it.
        read: makes the setting of the value.
        each_layer: whether the value may be a list with a number for each layer.
    """

    name: str
    absent: Any = REQUIRED
    read: Callable[[Any], Any] = lambda value: value
    each_layer: bool = False


@dataclass(frozen=True)
class Only:
    """A key that must agree with what the model computes.

    Attributes:
        fits: whether it does, from the value and the settings so far.
        wanted: the values that do, in words.
    """

    fits: Callable[[Any, Settings], bool]
    wanted: str


@dataclass(frozen=True)
class Unused:
    """A key that does not change the logits, and why."""

    why: str


Rule = Set | Only | Unused


@dataclass(frozen=True)
class Architecture:
    """The rules of one architecture.

    Attributes:
        model_type: its name in transformers.
        keys: the rules by the keys' names behind the architecture's, in the order in which they are applied.
        rope: "full" where all of a head is rotated, "partial" where a part may be, "local" where sliding layers have a
            base of their own, "kinds" where they have heads of their own as well; None without RoPE.
        factors: whether tensors of the file may hold RoPE's factors: "freqs", "long" or both.
        scaled: the kinds of scaling, linear and YaRN, that transformers has for it.
        yarn_multiplier: what makes YaRN's ``mscale_all_dim`` of the key ``rope.scaling.yarn_log_multiplier``; None
            where the key is not read.
        fixed: settings that are the same in every file.
        tensors: settings that are true where there is a tensor ``blk.0.NAME``; with a ``!`` before NAME, where not.
        derived: settings that follow from the others, in order. Settings that begin with ``_`` are for these alone;
            ``_tensors`` are the names of the file's tensors. ``model_type`` takes the place of the attribute.
        vocabularies: settings beside ``vocab_size`` that are the size of the vocabulary.
        undo: what undoes the converter's changes, by the ends of GGUF's names; see ``gguf_undo.py``.
        names: GGUF's names, without ``blk.N.``, of parameters that the ``gguf`` package does not know, by the ends of
            the parameters' names. Of several, a file has those that it has: their rows lie below each other in the
            parameter, in this order.
        adapterless: GGUF's names, without ``blk.N.``, of matrices whose adapters llama.cpp reads and does not apply.
        interleaved: whether the rows of several tensors take turns in the parameter instead.
        joined: what undoes the converter's changes of rows that lie in several tensors, by the end of the first's name.
    """

    model_type: str
    keys: dict[str, Rule]
    rope: str | None = "full"
    factors: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset({"linear", "yarn"})
    yarn_multiplier: float | None = None
    fixed: Settings = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    derived: dict[str, Callable[[Settings], Any]] = field(default_factory=dict)
    vocabularies: tuple[str, ...] = ()
    undo: dict[str, Undo] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    adapterless: frozenset[str] = frozenset()
    interleaved: bool = False
    joined: dict[str, Undo] = field(default_factory=dict)


def one_of(*values: Any) -> Only:
    return Only(lambda value, _: value in values, " or ".join(map(str, values)))


def same_as(name: str) -> Callable[[Settings], Any]:
    return lambda settings: settings[name]


def equal(name: str) -> Only:
    return Only(lambda value, settings: value == settings[name], f"the value of {name}")


def head_size(settings: Settings) -> int:
    """The width of a head where no key gives it."""
    return int(settings["hidden_size"]) // max(1, int(settings["num_attention_heads"]))


def width_of_head(settings: Settings) -> int:
    """The width of a head, given or not."""
    return int(settings.get("head_dim") or head_size(settings))


YARN_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
# RoPE's keys, which gguf_rope.py reads together.
ROPE = {
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    YARN_MULTIPLIER,
}
# Namespaces of llama.cpp for functions that no model here has.
FOREIGN = ("adapter.", "clip.", "diffusion.", "xielu.")
NOT_HERE = "which the model in transformers does not have; give the model as safetensors"


def settings_of(
    known: Architecture, arch: str, metadata: dict[str, Any], tensors: Iterable[str], path: str
) -> Settings:
    """The settings that a file's keys and the presence of tensors give, apart from RoPE's.

    Args:
        known: the rules of the file's architecture ``arch``.
        path: the file, for messages.

    Raises:
        ValueError: a key is missing, unknown, or asks for what the model does not compute.
    """
    have = set(tensors)
    settings: Settings = {"_tensors": have} | copy.deepcopy(known.fixed)  # a config writes into what it is given
    settings |= {
        name: (f"blk.0.{tensor.lstrip('!')}" in have) != tensor.startswith("!")
        for name, tensor in known.tensors.items()
    }
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"{path}: general.type is {kind!r:.100}, wanted model; give the model as safetensors")
    # All other keys that are not the architecture's are names, licences, and the tokenizer's.
    for key, value in metadata.items():
        own = key.removeprefix(arch + ".") if key.startswith(arch + ".") else None
        unknown = own is not None and own not in known.keys and not (known.rope and own in ROPE)
        unknown |= own == YARN_MULTIPLIER and known.yarn_multiplier is None
        if unknown or key.startswith(FOREIGN):
            raise ValueError(f"{path}: {key} is {value!r:.100}, {NOT_HERE}")
    for key, rule in known.keys.items():
        _apply(rule, f"{arch}.{key}", metadata.get(f"{arch}.{key}"), settings, path)
    if settings["num_hidden_layers"] > len(have):  # before a list of that length is made
        raise ValueError(
            f"{path}: {arch}.block_count is {settings['num_hidden_layers']}, more than it has tensors; {DOWNLOAD}"
        )
    for name, derive in known.derived.items():
        try:
            settings[name] = derive(settings)
        except ValueError as error:
            raise ValueError(f"{path}: {arch}.{error}") from error
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def is_number(value: Any) -> bool:
    """Whether a key's value is a finite number, and no array's length."""
    return isinstance(value, int | float) and not isinstance(value, Length) and math.isfinite(value)


def _apply(rule: Rule, key: str, value: Any, settings: Settings, path: str) -> None:
    if isinstance(rule, Unused):
        return
    if value is None:
        if isinstance(rule, Set):
            if rule.absent is REQUIRED:
                raise ValueError(f"{path} lacks {key}; give a complete GGUF, or the model as safetensors")
            settings[rule.name] = rule.absent(settings) if callable(rule.absent) else rule.absent
        return
    items = value if isinstance(value, list) else [value]
    if not items or not all(map(is_number, items)):
        raise ValueError(f"{path}: {key} is {value!r:.100}, wanted a number; {DOWNLOAD}")
    if isinstance(value, list):
        layers = settings.get("num_hidden_layers", len(value))
        if len(value) != layers:
            raise ValueError(f"{path}: {key} has {len(value)} numbers for {layers} layers; {DOWNLOAD}")
        if not (isinstance(rule, Set) and rule.each_layer):
            if any(item != value[0] for item in value):
                raise ValueError(f"{path}: {key} differs between layers, {NOT_HERE}")
            value = value[0]
    if isinstance(rule, Only):
        if not rule.fits(value, settings):
            raise ValueError(f"{path}: {key} is {value!r:.100}, wanted {rule.wanted}; give the model as safetensors")
        return
    try:
        settings[rule.name] = rule.read(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {key} is {value!r:.100} ({error}), {NOT_HERE}") from error
