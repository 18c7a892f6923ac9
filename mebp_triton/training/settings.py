"""The settings of a training run, each declared once: its default, its help, its range, and who depends on it.

``TrainConfig`` is what a user asks for; the command line and the settings file are derived from its fields.
``run_settings.resolve`` turns it into what runs. Names and meanings are those of transformers, TRL and PEFT where they
have one. Importing this imports no torch, so that ``mebp --help`` is quick.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from mebp_triton.blocks.options import Granularity, Mode, Schedule, UnselectedUpdate
from mebp_triton.data.masking import Masking
from mebp_triton.kernels.names import Backend
from mebp_triton.kernels.names import FloatName as Dtype
from mebp_triton.layers.lora_config import ALL_AND_EXPERTS, ALL_LINEAR, LoraConfig
from mebp_triton.store.residency import Residency
from mebp_triton.system.units import parse_size

from .facts import Facts, check_range, check_type, setting
from .optimizers.schedules import SchedulerType
from .optimizers.table import OPTIMIZERS, Optim

OnNan = Literal["stop", "skip"]
REPORTERS = ("tensorboard", "wandb", "mlflow", "trackio")

NEEDED = ("train_file", "output_dir")  # every run must have these, although a plan needs neither

# The facts that all settings share which say where something lies.
PLACE: dict[str, Any] = {"on_cpu": "file", "on_gpu": "device", "resume": "free", "chosen": True}


@dataclass(frozen=True)
class TrainConfig:
    """What a user asks of a training run. Every field is a flag of ``mebp train``; None leaves a choice open.

    Raises:
        ValueError: a value is out of its range, or two settings contradict each other.
    """

    train_file: str = setting(
        "", "what to train on: .txt, .jsonl, .json, .csv, .parquet, or a directory of datasets (docs/data.md)"
    )
    validation_file: str | None = setting(
        None, "what to evaluate on, before and after the training", resume="free", evaluated=True
    )
    output_dir: str = setting("", "the run directory: results, adapter, checkpoint, plots", resume="free")
    max_steps: int = setting(0, "optimizer steps; 0 for num_train_epochs passes over the data", least=0)
    num_train_epochs: int = setting(1, "passes over the training file, if max_steps is 0", least=1)
    max_length: int = setting(512, "tokens per example", least=2, traced=True, evaluated=True)
    packing: bool = setting(
        False, "put several training rows into one of max_length, which do not see each other", traced=True
    )
    completion_only_loss: bool | None = setting(None, "mask prompts (default: where rows have prompt and completion)")
    assistant_only_loss: bool = setting(False, "mask all chat messages but the assistant's")
    chat_template: str | None = setting(
        None, "a file with the chat template (Jinja) to train with; the adapter keeps it", resume="free"
    )
    max_eval_windows: int | None = setting(
        None, "evaluate on this many evenly spaced windows; all by default", least=1, resume="free", evaluated=True
    )
    per_device_train_batch_size: int = setting(1, "examples per forward pass", least=1, traced=True)
    gradient_accumulation_steps: int = setting(1, "forward passes per optimizer step", least=1)
    lora_r: int = setting(16, "LoRA rank", least=1, most=4096, traced=True)
    lora_alpha: float = setting(32.0, "LoRA scale: alpha / r")
    lora_dropout: float = setting(0.0, "dropout on the LoRA branch's input", least=0, below=1, traced=True)
    use_rslora: bool = setting(False, "LoRA scale alpha / sqrt(r)")
    target_modules: str = setting(
        "all-linear",
        "all-linear, all-linear-and-experts, names separated by commas, or a regular expression",
        traced=True,
    )
    target_parameters: str | None = setting(
        None,
        "parameters with all experts of a mixture, each of which gets an adapter; names separated by commas",
        traced=True,
    )
    exclude_modules: str | None = setting(
        None, "modules left out of target_modules, written in the same way", traced=True
    )
    rank_pattern: str | None = setting(
        None, """other ranks by regular expression, as JSON: {"q_proj": 8}""", traced=True
    )
    alpha_pattern: str | None = setting(None, """other alphas by regular expression, as JSON: {"q_proj": 16}""")
    adapter: str | None = setting(
        None,
        "start from the weights and the shape of this adapter: a run directory, or one in PEFT's format",
        resume="free",
    )
    learning_rate: float = setting(2e-4, "peak learning rate", above=0)
    lr_scheduler_type: SchedulerType = setting("linear", "decay after the warm-up")
    warmup_steps: int = setting(0, "steps of linear warm-up", least=0)
    weight_decay: float = setting(0.0, "decoupled weight decay", least=0)
    max_grad_norm: float = setting(1.0, "clip the gradient's global norm; 0 for no clipping", least=0)
    optim: Optim = setting(
        "adamw", "; ".join(f"{name}: {optimizer.help}" for name, optimizer in OPTIMIZERS.items()), traced=True
    )
    on_nan: OnNan = setting("stop", "what a loss or gradient that is not finite does: stop, or skip", resume="free")
    mezo_epsilon: float = setting(1e-3, "finite-difference step of mezo", above=0)
    seed: int = setting(
        42, "seed of the adapter, the data order, dropout, selection and mezo", least=0, most=(1 << 63) - 1
    )
    selection_mode: Mode = setting(
        "full", "how the gradient passes blocks that are not selected at a step", traced=True
    )
    selected_ratio: float = setting(
        0.5, "the part of the blocks that a step trains, unless selection_mode is full", above=0, most=1
    )
    selection_schedule: Schedule = setting("cyclic", "which blocks a step trains")
    unselected_update: UnselectedUpdate = setting("momentum", "what AdamW does to blocks that are not selected")
    weights: Residency | None = setting(
        None,
        "where weights lie: device, host or file (default: file on a CPU)",
        traced=True,
        **PLACE,
    )
    checkpoints: Residency | None = setting(
        None,
        "where block inputs wait (default: file on a CPU)",
        **PLACE,
    )
    optimizer_state: Residency | None = setting(
        None,
        "where AdamW's moments lie (default: file on a CPU)",
        **PLACE,
    )
    recompute_granularity: Granularity | None = setting(
        None,
        "full keeps each block's input; selective its linear layers' outputs too (default: selective if it fits)",
        on_cpu="full",
        on_gpu="full",
        resume="free",
        chosen=True,
    )
    mlp_chunk_tokens: int | None = setting(
        None,
        "run the MLPs by chunks of this many tokens; 0 for whole (default)",
        least=0,
        on_cpu=0,
        on_gpu=0,
        chosen=True,
    )
    join_micro_batches: bool | None = setting(
        None,
        "a step's micro-batches go through each block together, so weights are read once (default: if they are paged)",
        chosen=True,
    )
    block_graphs: bool = setting(
        False,
        "on a CUDA device: run blocks by CUDA graphs, and pad rows to one of eight widths (not measured yet)",
        resume="free",
    )
    optimizer_in_backward: bool = setting(False, "step each block as soon as its gradients exist, and free them")
    return_freed_memory: bool | None = setting(
        None,
        "on a CPU: large freed tensors go back to the system at once, a lower peak, slower (default: off)",
        on_cpu=False,
        on_gpu=False,
        resume="free",
        chosen=True,
    )
    memory_budget: str | None = setting(
        None, "limit of memory, 900MiB or 4GB: what is not set by hand is chosen to stay inside", resume="free"
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:1, ...; by default a GPU if there is one", resume="free", traced=True
    )
    dtype: Dtype | None = setting(
        None,
        "dtype of activations (default: bfloat16 on a GPU, float32 on a CPU)",
        on_cpu="float32",
        on_gpu="bfloat16",
        traced=True,
    )
    backend: Backend = setting("auto", "kernels: triton, panel (plain torch), or auto", resume="free", traced=True)
    eval_steps: int = setting(
        0, "evaluate on the validation file every so many steps; 0 for before and after only", least=0, resume="free"
    )
    save_best: bool = setting(
        False, "keep the adapter of the evaluation with the lowest loss in adapter_best/", resume="free"
    )
    early_stopping_patience: int | None = setting(
        None, "end after so many evaluations in a row that did not improve", least=1, resume="free"
    )
    early_stopping_threshold: float = setting(
        0.0, "how much lower a loss must be to count as improved", least=0, resume="free"
    )
    report_to: str = setting(
        "none", "trackers, separated by commas: tensorboard, wandb, mlflow, trackio; or none", resume="free"
    )
    save_steps: int = setting(
        100, "write a resumable checkpoint every so many steps, and at the end", least=1, resume="free"
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, value in vars(self).items():
            check_type(name, hints[name], value)
            if value is not None:
                check_range(name, FACTS[name], value)
        if self.memory_budget is not None:
            parse_size("memory_budget", self.memory_budget)
        if contradiction := next(self._contradictions(), None):
            raise ValueError(contradiction)
        self.lora()

    def _contradictions(self) -> Iterator[str]:
        """Yields a message for every contradiction between settings that are each right alone."""
        if self.eval_steps and self.validation_file is None:
            yield f"eval_steps {self.eval_steps} needs a validation_file to evaluate on"
        for name in ("save_best", "early_stopping_patience"):
            if getattr(self, name) and not self.eval_steps:
                yield f"{name} compares evaluations during the training: give eval_steps as well"
        if wrong := [name for name in self.reporters() if name not in REPORTERS]:
            yield f"report_to must be none, or of {', '.join(REPORTERS)}, separated by commas, got {wrong[0]!r:.200}"
        optimizer, in_backward = OPTIMIZERS[self.optim], self.optimizer_in_backward
        if self.lora_alpha == 0:
            yield "lora_alpha must not be 0: nothing would be trained"
        if self.dtype == "float16" and optimizer.gradients:
            yield "dtype 'float16' loses small gradients: train in bfloat16 or float32"
        if not optimizer.gradients and self.selection_mode != "full":
            yield f"selection_mode {self.selection_mode!r} needs gradients, and optim {self.optim!r} makes none"
        if not optimizer.in_backward and in_backward:
            yield f"optimizer_in_backward does not work with optim {self.optim!r}: leave one of them out"
        if not optimizer.gradients and self.on_nan == "skip":
            yield (
                f"optim {self.optim!r} moves the parameters to and fro before it knows the loss, which rounds them, so "
                "it cannot skip a step: use on_nan 'stop'"
            )
        if self.block_graphs and self.device == "cpu":
            yield "block_graphs records CUDA graphs, and this run is on a CPU: leave it out"
        if self.block_graphs and self.recompute_granularity == "selective":
            yield "block_graphs does not work with recompute_granularity 'selective': leave one of them out"
        if in_backward and self.on_nan == "skip":
            yield (
                "optimizer_in_backward has stepped upper blocks before a lower block's gradient is not finite, and "
                "on_nan 'skip' cannot undo that: leave one of them out"
            )
        if in_backward and self.gradient_accumulation_steps != 1:
            yield (
                "optimizer_in_backward takes a step in every backward pass, so it needs gradient_accumulation_steps 1, "
                f"got {self.gradient_accumulation_steps}: leave one of them out"
            )

    def lora(self) -> LoraConfig:
        """Returns the adapter that the settings describe. ValueError where a pattern is none."""
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=_modules(self.target_modules),
            exclude_modules=_modules(self.exclude_modules) if self.exclude_modules else None,
            target_parameters=_names(self.target_parameters) if self.target_parameters else None,
            use_rslora=self.use_rslora,
            rank_pattern=_pattern("rank_pattern", self.rank_pattern),
            alpha_pattern=_pattern("alpha_pattern", self.alpha_pattern),
        )

    def reporters(self) -> list[str]:
        """Returns the trackers to report to."""
        return [] if self.report_to == "none" else [name.strip() for name in self.report_to.split(",")]

    def masking(self) -> Masking:
        """Returns the rule by which tokens enter the loss."""
        return Masking(self.completion_only_loss, self.assistant_only_loss)


FACTS: dict[str, Facts] = {item.name: item.metadata["facts"] for item in dataclasses.fields(TrainConfig)}
FREE_ON_RESUME = frozenset(name for name, facts in FACTS.items() if facts.resume == "free")
TRACED_BY = tuple(name for name, facts in FACTS.items() if facts.traced)
CHOSEN = tuple(name for name, facts in FACTS.items() if facts.chosen)
EVALUATED = tuple(name for name, facts in FACTS.items() if facts.evaluated)


def _modules(text: str) -> str | list[str]:
    """Returns modules as ``LoraConfig`` takes them: a list if ``text`` consists of names and commas."""
    names = _names(text)
    plain = all(name.replace(".", "").replace("_", "").isalnum() for name in names)
    return names if plain and text not in (ALL_LINEAR, ALL_AND_EXPERTS) else text


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _pattern(name: str, text: str | None) -> dict[str, Any]:
    """Parses values by regular expression. ValueError where ``text`` is no JSON object; ``LoraConfig`` checks more."""
    try:
        pattern = json.loads(text or "{}")
    except ValueError:
        pattern = None
    if not isinstance(pattern, dict):
        raise ValueError(f"""{name} must be a JSON object such as {{"q_proj": 8}}, got {text!r:.200}""")
    return pattern
