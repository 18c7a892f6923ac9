"""A store with a tokenizer, a text to train on, a trainer, and ways to look at a run: what tests of runs share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from models import save_tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mebp_triton.convert.quantize import quantize, write_store
from mebp_triton.convert.readers import open_source
from mebp_triton.convert.recipe import Recipe
from mebp_triton.data.loading import load_data
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.kernels.names import Form
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.models.adapter import adapter_tensors
from mebp_triton.models.load import load
from mebp_triton.training.processes import ALONE
from mebp_triton.training.run_directory import OthersRunDirectory, RunDirectory
from mebp_triton.training.run_settings import resolve
from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.trainer import Trainer

SUBJECTS = ["the cat", "a dog", "my friend", "this old ship", "one tall tree"]
VERBS = ["sees", "likes", "follows", "finds", "forgets"]
OBJECTS = ["the moon", "a red house", "some water", "the long road", "nothing"]
WORDS = sorted({word for phrase in (*SUBJECTS, *VERBS, *OBJECTS) for word in phrase.split()} | {".", "and"})
CHAT = "{% for message in messages %}{{ message['content'] }} and {% endfor %}"


def sentences(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    parts = [f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)} ." for _ in range(count)]
    return " ".join(parts) + "\n"


def word_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<s>", "</s>", "<unk>"]  # at the ids of the tiny models' configs
    core = Tokenizer(WordLevel({word: i for i, word in enumerate([*specials, *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **named)


def model_directory(directory: Path, architecture: str = "llama", seed: int = 0, **config: Any) -> Path:
    """A model with a tokenizer, as a user would download it."""
    save_tiny_model(architecture, directory, seed, **config)
    word_tokenizer().save_pretrained(directory)
    return directory


def run_store(root: Path, architecture: str = "llama", seed: int = 0, **config: Any) -> Path:
    quantize(model_directory(root / "model", architecture, seed, **config), root / "store", group_size=32)
    return root / "store"


class SharedStores:
    """Tiny stores that tests only read, each made once for all tests of this process.

    A store's directory has the name ``store``; the model with its tokenizer lies beside it as ``model``. A test that
    changes anything copies the store first.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stores: dict[str, Path] = {}
        self.written: dict[Path, tuple[int, int]] = {}

    def __call__(self, architecture: str = "llama", *, seed: int = 0, config: Any = None, **options: Any) -> Path:
        """The store of a tiny model; ``config`` changes the model's, ``options`` are ``quantize``'s."""
        key = repr((architecture, seed, sorted((config or {}).items()), sorted(options.items())))
        if key not in self.stores:
            place = self.root / f"{architecture}-{len(self.stores)}"
            model = model_directory(place / "model", architecture, seed, **(config or {}))
            quantize(model, place / "store", **({"group_size": 32} | options))
            self.stores[key] = place / "store"
            self.written |= self.stamps(place)
        return self.stores[key]

    def stamps(self, place: Path) -> dict[Path, tuple[int, int]]:
        """Size and time of the last change of every file below ``place``."""
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in place.rglob("*") if path.is_file()}


def two_level_store(model: Path, target: Path, form: Form) -> Path:
    """The store of a model directory whose matrices all have scales of two levels."""
    source = open_source(model)
    read = source.read

    def coded(name: str) -> Any:
        value = read(name)
        if value.dim() != 2:
            return value
        return quantize_matrix(value, form.scheme, form.group_size, bits=form.bits, scale_dtype=torch.int8)[0]

    source.read = coded  # type: ignore[method-assign]
    write_store(source, target, Recipe(None, None), None, None, lambda done, total: None)
    return target


def text_data(root: Path, count: int = 40, seed: int = 0, max_length: int = 24) -> TokenizedData:
    path = root / f"text-{count}-{seed}.txt"
    path.write_text(sentences(count, seed))
    return load_data(path, word_tokenizer(), max_length)


def trainer(store: Path, data: TokenizedData, output: Path, resume: bool = False, **settings: Any) -> Trainer:
    """A new model and trainer, as ``mebp train`` makes them. ``load_options`` go to ``load``."""
    options, processes = settings.pop("load_options", {}), settings.pop("processes", ALONE)
    chosen: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8.0, "learning_rate": 5e-3, "device": "cpu", "save_steps": 4}
    config = resolve(TrainConfig(train_file="text.txt", output_dir=str(output), **(chosen | settings)))
    run = RunDirectory(output, resume=resume) if processes.is_first else OthersRunDirectory(output)
    lora = config.lora()
    assert config.weights and config.checkpoints
    places: dict[str, Any] = {"weights": config.weights, "checkpoints": config.checkpoints}
    if config.join_micro_batches:
        places["block_rows"] = config.per_device_train_batch_size
    model = load(store, lora, seed=config.seed, scratch_directory=output, **places, **options)
    return Trainer(model, data, config, run, processes=processes)


# --- looking at a run, and ending it --------------------------------------------------------------------------------

# Whatever could make a resumed run differ: dropout, accumulation, a random selection, data of several epochs.
DEMANDING: dict[str, Any] = {
    "max_steps": 8,
    "lora_dropout": 0.2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "selection_mode": "identity",
    "selection_schedule": "random",
    "selected_ratio": 0.34,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.05,
}
# All of a line of metrics that two runs with the same numbers must share.
NUMBERS = ("step", "loss", "token_accuracy", "tokens", "grad_norm", "learning_rate", "selected_blocks", "skipped")


class Crash(BaseException):
    """As if the process were killed."""


def crash_at(step: int) -> Callable[[Any], None]:
    """A callback for ``Trainer.train`` that ends the process's work after ``step``, before anything is written."""

    def on_step(result: Any) -> None:
        if result.step == step:
            raise Crash

    return on_step


def resumed(store: Path, data: TokenizedData, output: Path, **settings: Any) -> Trainer:
    """A new trainer that goes on from the checkpoint in ``output``."""
    made = trainer(store, data, output, resume=True, **settings)
    made.resume(made.run.checkpoint)
    return made


def metrics(made: Trainer, *names: str) -> list[tuple[Any, ...]]:
    """The named values of every line of the run's metrics."""
    return [tuple(row[name] for name in names) for row in made.run.read_metrics()]


def adapter_of(made: Trainer) -> dict[str, Tensor]:
    """A copy of the adapter's tensors."""
    return {name: tensor.clone() for name, tensor in adapter_tensors(made.model).items()}


def checkpoint_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of all files of a checkpoint, by ``FILE/NAME``."""
    files = {path.stem: safetensors.torch.load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))}
    return {f"{file}/{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Fails where the names differ, or a bit of a tensor."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
