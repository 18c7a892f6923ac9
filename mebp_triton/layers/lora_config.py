"""Which layers get an adapter, with which rank and scaling. Names and meanings are those of PEFT."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import regex

ALL_LINEAR, ALL_AND_EXPERTS = "all-linear", "all-linear-and-experts"
MATCH_SECONDS = 1.0  # time limit for matching one path; an honest expression takes microseconds
LONGEST_EXPRESSION = 1 << 14  # characters
MOST_REPEATS = 100_000  # limit on the product of all fixed counts of an expression


@dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter. LoRA: arXiv 2106.09685; names and meanings are those of ``peft.LoraConfig``.

    Attributes:
        r: the rank, at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: the probability of dropout on the input of the LoRA branch, in training mode.
        target_modules: "all-linear" (every linear layer except the head; see ``layers``), "all-linear-and-experts"
            (those, and every parameter that has the experts of a mixture), a list of names (a module matches if its
            path is the name or ends with "." + name), or one regular expression that must match the whole path.
        exclude_modules: modules left out of that choice, written in the same way.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead (arXiv 2312.03732).
        rank_pattern, alpha_pattern: other values of ``r`` and ``lora_alpha`` by regular expression. An expression must
            match the whole path, or the end of it after a dot; the first one that matches counts.
        target_parameters: names of parameters with all experts of a mixture, written as a list of modules is. Each
            expert gets an adapter of its own. The weight of a linear layer stands for the layer.
        layers: paths of the layers that "all-linear" stands for in a model. It is no setting of PEFT's: ``load`` finds
            them, and a resumed run has those that it began with.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    exclude_modules: str | tuple[str, ...] | list[str] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: tuple[str, ...] | list[str] | None = None
    layers: frozenset[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name} must map regular expressions to numbers, got {pattern!r:.100}")
        for key, rank in ((None, self.r), *self.rank_pattern.items()):
            if type(rank) is not int or not 1 <= rank < 1 << 31:
                what = "lora rank r" if key is None else f"rank_pattern {key!r:.100}"
                raise ValueError(f"{what} must be a whole number of at least 1, got {rank!r:.100}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r:.100}")
        for key, alpha in ((None, self.lora_alpha), *self.alpha_pattern.items()):
            if not _is_number(alpha) or not abs(alpha) < 1e30:
                what = "lora_alpha" if key is None else f"alpha_pattern {key!r:.100}"
                raise ValueError(f"{what} must be finite, got {alpha!r:.100}")
        if type(self.use_rslora) is not bool:
            raise ValueError(f"use_rslora must be true or false, got {self.use_rslora!r:.100}")
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty: name modules, or use 'all-linear'")
        for name in ("target_modules", "exclude_modules"):
            wanted = getattr(self, name)
            names = wanted if isinstance(wanted, list | tuple) else [wanted or ""]
            if not all(isinstance(module, str) for module in names):
                raise ValueError(f"{name} must be names, or one regular expression, got {wanted!r:.100}")
        parameters = self.target_parameters or ()
        if not isinstance(parameters, list | tuple) or not all(isinstance(name, str) for name in parameters):
            raise ValueError(f"target_parameters must be names, got {parameters!r:.100}")

    def rank(self, path: str) -> int:
        """The rank of the adapter at module path ``path``."""
        return _pattern_value(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        """The alpha of the adapter at module path ``path``."""
        return _pattern_value(self.alpha_pattern, path, self.lora_alpha)

    def scaling(self, path: str) -> float:
        """The factor by which the update of the layer at ``path`` is multiplied."""
        alpha = self.alpha(path)
        rank = self.rank(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def unmatched_patterns(self, paths: Iterable[str]) -> list[str]:
        """The keys of both patterns that match none of ``paths``, each with its pattern's name."""
        known = list(paths)
        return [
            f"{name} {key!r:.100}"
            for name in ("rank_pattern", "alpha_pattern")
            for key in getattr(self, name)
            if not any(_pattern_value({key: True}, path, False) for path in known)
        ]

    def targets(self, path: str) -> bool:
        """Whether the linear layer at ``path`` gets an adapter. The head, which never does, is not asked about."""
        if self.exclude_modules and _matches(self.exclude_modules, path):
            return False
        if self.takes_all_linear:
            return self.layers is None or path in self.layers
        return _matches(self.target_modules, path) or _matches(tuple(self.target_parameters or ()), f"{path}.weight")

    @property
    def takes_all_linear(self) -> bool:
        """Whether every linear layer is meant, whatever it is called."""
        return self.target_modules in (ALL_LINEAR, ALL_AND_EXPERTS)

    def targets_parameter(self, path: str) -> bool:
        """Whether the experts in the parameter at ``path`` get adapters."""
        if self.exclude_modules and _matches(self.exclude_modules, path):
            return False
        return self.target_modules == ALL_AND_EXPERTS or _matches(tuple(self.target_parameters or ()), path)


def as_lora_config(config: Any) -> LoraConfig:
    """Returns a ``LoraConfig`` for one of ours or a ``peft.LoraConfig``.

    Raises:
        ValueError: ``config`` is neither, or uses a setting that only PEFT's own layers support.
    """
    if isinstance(config, LoraConfig):
        return config
    if getattr(config, "peft_type", None) is None:
        raise ValueError(f"lora must be a LoraConfig of mebp_triton or of peft, got {type(config).__name__}")
    values = {key: value for key, value in vars(config).items() if value is not None}
    ours = lora_config_from_dict(values)
    if "target_modules" not in values and not values.get("target_parameters"):
        raise ValueError("peft.LoraConfig without target_modules depends on the architecture: name the modules")
    if values.get("init_lora_weights", True) is not True:
        raise ValueError(f"init_lora_weights={values['init_lora_weights']!r} is not supported: leave it at True")
    return ours


# PEFT's settings that change what an adapter computes, each with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": ([], ()),
    "layer_replication": ([], ()),
    "trainable_token_indices": ([], {}, ()),
    "layers_to_transform": ([], ()),
    "bias": ("none",),
    "use_bdlora": (False,),
    "alora_invocation_tokens": ([], ()),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    # Every other initialisation (PiSSA, OLoRA, CorDA, LoftQ) changes the base weights as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}

# PEFT's settings that change nothing here whatever their value: some concern only the start of a training.
WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"}
WITHOUT_EFFECT |= {"inference_mode", "fan_in_fan_out", "layers_pattern", "megatron_config", "megatron_core"}
WITHOUT_EFFECT |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
WITHOUT_EFFECT |= {"runtime_config", "ensure_weight_tying"}


def lora_config_from_file(values: dict[str, Any]) -> LoraConfig:
    """Reads the fields of an ``adapter_config.json``, which, unlike an object of PEFT, may lack some or have others.

    Raises:
        ValueError: a required field is missing, or a field is unknown and set, or see ``lora_config_from_dict``.
    """
    modules = "target_parameters" if values.get("target_parameters") else "target_modules"
    for key in ("r", "lora_alpha", modules):
        if values.get(key) is None:
            raise ValueError(f"it has no {key}")
    known = _settings() | UNSUPPORTED.keys() | WITHOUT_EFFECT
    for key in sorted(values.keys() - known):
        if values[key] not in (None, False, [], {}):
            raise ValueError(f"the adapter uses {key!r:.100}, which is not known here; train it without")
    return lora_config_from_dict(values)


def lora_config_from_dict(values: dict[str, Any]) -> LoraConfig:
    """Makes a ``LoraConfig`` of the fields of PEFT's config.

    Raises:
        ValueError: the adapter is no LoRA, or uses a setting that changes what it computes and is not supported.
    """
    kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
    if kind != "LORA":
        raise ValueError(f"the adapter is of type {kind!r:.100}; only LORA is supported")
    for key, unused in UNSUPPORTED.items():
        value = values.get(key)
        # The types are compared too, since 0 == False and 1 == True in Python.
        if value is not None and not any(type(value) is type(off) and value == off for off in unused):
            way = "train it without"
            if key in ("modules_to_save", "trainable_token_indices"):
                way = "use PEFT's own functions on load(..., head='float', embedding='float')"
            raise ValueError(f"the adapter uses {key}={value!r:.100}, which is not supported; {way}")
    ours = {key: value for key, value in values.items() if key in _settings() and value is not None}
    if values.get("target_modules") is None and ours.get("target_parameters"):
        ours["target_modules"] = ()
    for key in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(ours.get(key), set | list | tuple):
            ours[key] = tuple(sorted(ours[key], key=str))
    return LoraConfig(**ours)


def _settings() -> set[str]:
    """The names of PEFT's settings that a ``LoraConfig`` has."""
    return {item.name for item in fields(LoraConfig)} - {"layers"}


def _matches(wanted: str | tuple[str, ...] | list[str], path: str) -> bool:
    if isinstance(wanted, str):
        return _fullmatch(wanted, path)
    return any(path == name or path.endswith("." + name) for name in wanted)


def _pattern_value(pattern: dict[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if _fullmatch(rf"(.*\.)?({key})", path)), default)


@lru_cache(maxsize=1 << 16)
def _fullmatch(expression: str, path: str) -> bool:
    """``re.fullmatch`` with a time limit, since an expression may come from a file: ``(a|aa)+$`` takes 2^n steps.

    ``re`` has no time limit, so ``regex`` does the matching. It understands what ``re`` compiles in the same way,
    except for its fuzzy and POSIX forms, which no path needs and which are refused.
    """
    try:
        # Compiling an expression unrolls its fixed counts: "a{1000000000}" would take all memory.
        counts = [int(count[:9]) for count in re.findall(r"\{([0-9]+)", expression)]
        long = len(expression) > LONGEST_EXPRESSION or math.prod(filter(None, counts)) > MOST_REPEATS
        if long or re.search(r"\{[^0-9,]|\[\[:", expression):
            raise re.error("too long, or in a form that is not supported")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
            return regex.fullmatch(expression, path, timeout=MATCH_SECONDS) is not None
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{expression!r:.100} is not a regular expression: {error}") from None
    except TimeoutError:
        raise ValueError(
            f"{expression!r:.100} takes too long to match {path}: write it without nested repeats"
        ) from None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
