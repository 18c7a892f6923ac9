"""Several processes of one run on this machine, and what they run: the tests of distributed training.

The processes are forked from a server that has imported everything: that takes a tenth of a second, not ten.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from models import batch, randomize_adapter
from runs import trainer, word_tokenizer

import mebp_triton as mebp
import mebp_triton.cli.training_run
from mebp_triton.cli import main
from mebp_triton.data.loading import load_data
from mebp_triton.models.adapter import adapter_layers, adapter_tensors
from mebp_triton.training import finetune as finetune_module
from mebp_triton.training import processes as processes_module
from mebp_triton.training import run_directory
from mebp_triton.training.finetune import finetune
from mebp_triton.training.processes import joined
from mebp_triton.training.step import Passes, StepInputs
from mebp_triton.training.trainer import Trainer
from mebp_triton.training.updates import AfterBackward


@dataclass
class Ended:
    """A process: its exit code, negative for a signal, and what it wrote to standard output and standard error."""

    code: int | None
    out: str
    err: str


def run_ranks(body: Any, root: Path, *arguments: Any, size: int = 2, seconds: float = 240) -> list[Ended]:
    """``body(*arguments)`` as each of ``size`` processes; AssertionError if they do not end in time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["everything", "ranks"])
    with pytest.MonkeyPatch.context() as patched:  # the server looks nowhere else for what to import
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root.mkdir(parents=True, exist_ok=True)
    given = [(rank, size, port, root, body, arguments) for rank in range(size)]
    processes = [context.Process(target=_run_rank, args=one) for one in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hung:
        processes[rank].kill()
        processes[rank].join()
    texts = [[(root / f"{name}-{rank}").read_text() for name in ("out", "err")] for rank in range(size)]
    assert not hung, f"processes {hung} hang: {texts}"
    return [Ended(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]


def _run_rank(rank: int, size: int, port: int, root: Path, body: Any, arguments: tuple[Any, ...]) -> None:
    for name, handle in (("out", 1), ("err", 2)):
        file = os.open(root / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, handle)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    run_directory.draw_plots = lambda *_: []  # most of the time of so short a run
    processes_module.TIMEOUT = timedelta(minutes=10)  # longer than a test waits: none may end by it
    body(*arguments)


# --- what they run --------------------------------------------------------------------------------------------------


def train(root: Path, output: Path, settings: dict[str, Any], resume: bool = False, crash: int = -1) -> None:
    """A run with the store and texts of ``root``; beside it, each process's first gradients and last adapter."""
    with joined() as processes:
        train_with(processes, root, output, settings, resume, crash)


def trainings(runs: list[tuple[Path, Path, dict[str, Any]]]) -> None:
    """Several runs, one after the other: the ``root``, ``output`` and ``settings`` of ``train`` for each."""
    with joined() as processes:
        for root, output, settings in runs:
            train_with(processes, root, output, settings)


def train_with(
    processes: Any, root: Path, output: Path, settings: dict[str, Any], resume: bool = False, crash: int = -1
) -> Trainer:
    data, held_out = (load_data(root / name, word_tokenizer(), 24) for name in ("train.txt", "held-out.txt"))
    made = trainer(root / "store", data, output, resume, processes=processes, **settings)
    if resume:
        made.resume(made.run.checkpoint)
    else:
        randomize_adapter(made.model)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        if not gradients:
            for name, layer in adapter_layers(made.model).items():
                for part in ("lora_A", "lora_B"):
                    if (gradient := getattr(layer, part).grad) is not None:
                        gradients[f"{name}.{part}"] = gradient.clone()

    if isinstance(made.update, AfterBackward):
        made.update.optimizer.register_step_pre_hook(keep)

    def on_step(result: Any) -> None:
        if result.step == crash:
            raise RuntimeError("crashed")

    finetune(made, held_out, on_step)
    tensors = {name: tensor.contiguous() for name, tensor in adapter_tensors(made.model).items()}
    safetensors.torch.save_file(gradients, beside(output, "gradients", processes.rank))
    safetensors.torch.save_file(tensors, beside(output, "adapter", processes.rank))
    return made


def beside(output: Path, what: str, rank: int) -> Path:
    return output.with_name(f"{output.name}-{what}-{rank}.safetensors")


def command(arguments: list[str], broken_rank: int = -1, how: str = "", at_step: int = 2) -> None:
    """``mebp``, without a plan; in one process, the passes of step ``at_step`` go wrong, or its evaluation is told."""
    passes, evaluate = Passes.forward_and_backward, finetune_module._evaluate

    def broken(self: Passes, inputs: StepInputs) -> tuple[float, float]:
        if inputs.step == at_step and self.processes.rank == broken_rank:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "told":
                os.kill(os.getpid(), signal.SIGTERM)
            if how == "mistake":
                raise ValueError("the value 3 is wrong: give 4")
            if how == "bug":
                raise KeyError("some key")
            if how in ("nan", "drift"):
                with torch.no_grad():  # one weight is no number, or a bit off
                    trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                    trained[-1][0, 0] += torch.nan if how == "nan" else 1e-6
        return passes(self, inputs)

    def told(trainer: Trainer, *rest: Any) -> Any:
        if how == "told evaluating" and trainer.step == at_step and trainer.processes.rank == broken_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer, *rest)

    finetune_module._evaluate = told
    Passes.forward_and_backward = broken  # type: ignore[method-assign]
    mebp_triton.cli.training_run._plan = lambda *_: None
    sys.exit(main.main(arguments))


def command_of_rank(given: list[list[str]]) -> None:
    """``mebp`` with other arguments in each process."""
    command(given[int(os.environ["RANK"])])


def command_alone(given: list[list[str]]) -> None:
    """``mebp`` with other arguments in each process, which know nothing of each other."""
    arguments = given[int(os.environ["RANK"])]
    os.environ["WORLD_SIZE"] = "1"
    command(arguments)


def sums(root: Path) -> None:
    """Everything that processes tell each other, by numbers that tell the ranks apart."""
    with joined() as processes:
        rank = processes.rank
        assert processes.exchange(rank, 0.1) == [[0.0, 0.1], [1.0, 0.1]]
        assert processes.sum(1 + rank, 0.5) == [3.0, 1.0] and processes.highest(rank, -rank) == [1.0, 0.0]
        assert processes.same(0xFFFFFFFF) and not processes.same(rank)
        assert processes.share({"from": rank, "text": "ä" * 3000}) == {"from": 0, "text": "ä" * 3000}
        assert [int(row[1]) for row in processes.gather(torch.tensor([7, rank]))] == [0, 1]
        made = root / "made"
        existed = processes.first(lambda: made.exists() or made.touch())
        assert existed is (None if rank == 0 else True)
        only_one = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
        both, none = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
        both.grad = torch.tensor([1.0, 2.0, torch.inf]) * (1 + rank)
        only_one.grad = torch.full((2, 2), 1.5, dtype=torch.bfloat16) if rank == 1 else None
        handed = processes.sum_gradients([[only_one, none], [], [both]])
        assert handed == (4 + 3 + 2 + 3 + 1) * 4  # two presences, then one
        assert none.grad is None and both.grad.tolist() == [3.0, 6.0, torch.inf]
        assert only_one.grad.dtype == torch.bfloat16 and only_one.grad.flatten().tolist() == [1.5] * 4


def hugging_face(store: Path, runs: list[tuple[Path, Any, dict[str, Any]]]) -> None:
    """transformers' Trainer around the model of ``load``; several processes: in ``DistributedDataParallel``.

    ``runs`` have an output, the mode of the selection (None for none), and arguments of the trainer.
    """
    for output, mode, options in runs:
        _hugging_face(store, output, mode, options)


def _hugging_face(store: Path, output: Path, mode: Any, options: dict[str, Any]) -> None:
    model = mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8.0), weights="file", seed=3)
    randomize_adapter(model)
    callbacks = []
    if mode is not None:
        callbacks = [mebp.SelectionCallback(mebp.LayerCyclicManager(model, ratio=0.34, mode=mode))]
    examples = [batch(rows=1, length=12 + 2 * (seed % 4), padding=None, seed=seed) for seed in range(12)]
    rows = [{name: tensor[0] for name, tensor in example.items()} for example in examples]
    chosen = transformers.TrainingArguments(
        str(output),
        use_cpu=True,
        report_to=[],
        seed=1,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=1,
        **options,
    )
    made = transformers.Trainer(model, chosen, train_dataset=rows, callbacks=callbacks)
    made.train()
    both = (named(remove_duplicate=False) for named in (model.named_parameters, model.named_buffers))
    names = {name for one in both for name, _ in one}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names.difference(model._ddp_params_and_buffers_to_ignore) == trained
    rank = int(os.environ.get("RANK", "0"))
    losses = torch.tensor([row["loss"] for row in made.state.log_history if "loss" in row], dtype=torch.float64)
    tensors = {name: tensor.contiguous() for name, tensor in adapter_tensors(model).items()}
    safetensors.torch.save_file({"losses": losses, **tensors}, beside(output, "adapter", rank))


# --- programs -------------------------------------------------------------------------------------------------------


def run_script(path: Path, arguments: Sequence[object], log: Path, seconds: float = 900) -> Ended:
    """Runs a Python file as ``python PATH ARGUMENTS`` would, in a process that has everything imported."""
    (ended,) = run_ranks(script, log, path, [str(one) for one in arguments], size=1, seconds=seconds)
    return ended


def script(path: Path, arguments: list[str]) -> None:
    """Becomes the program at ``path``, for ``run_script``."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    sys.argv[:] = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
