"""Counts kernel launches and host time per layer and pass of a training step, ours and the peer's, without a GPU.

    python bench/launches.py --output bench/results/launches-cpu.json --name NAME

The peer is transformers + PEFT + bitsandbytes NF4 with double quantisation and gradient checkpointing. Both sides run
LoRA of rank 16 on all linear layers in bfloat16, and differ in depth by one layer, whose share is the difference.

Launches are counted at the sizes of Qwen2.5-3B, 256 tokens. Every operation of torch that reaches a device counts as
the kernels that its CUDA code launches (``launch_meter``); Triton's and bitsandbytes' launches are counted where the
driver or the compiled library would be called. Large products are not computed.

Host time is that of the same calls at a tiny width, where arithmetic takes next to nothing. Triton's and bitsandbytes'
own host code runs, and the launch itself takes no time on any side. What torch's CPU kernels take is in it; it stands
for what its CUDA kernels take to launch. (oneDNN, which takes longer than that to begin a product, is switched off.) It
is the processor's time of the thread that trains, without what other programs take. The sides take turns, and each
figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from launch_meter import Meter, recompute_apart
from machine import commit, processor, unwritable
from random_store import QWEN2_5, write_random_store
from stub_bitsandbytes import StubBitsandbytes
from stub_device import StubDevice
from torch import Tensor

import mebp_triton as mebp
from mebp_triton.blocks.graph_players import SameCall
from mebp_triton.blocks.graphs import BlockGraphs
from mebp_triton.blocks.runner import find_blocks
from mebp_triton.cli.peft_baseline import with_adapter
from mebp_triton.store.arena import ArenaPages, Stager
from mebp_triton.store.manifest import block_file
from mebp_triton.store.placement import host_copy
from mebp_triton.system.machine import environment
from mebp_triton.training.optimizers.adamw import BlockAdamW, block_groups
from mebp_triton.training.optimizers.tensor_lists import clip, total_norm

PHASES = ("forward", "recompute", "backward", "update")
# Multiprocessors of an H200, by which bitsandbytes chooses.
MULTIPROCESSORS = 132
LORA = {"lora_r": 16, "lora_alpha": 16, "seed": 0}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2 model and of a step."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    tokens: int

    def config(self, layers: int) -> Any:
        sizes = {key: value for key, value in asdict(self).items() if key != "tokens"}
        return transformers.AutoConfig.for_model(
            **QWEN2_5 | sizes | {"vocab_size": 512, "num_hidden_layers": layers, "bos_token_id": 1, "eos_token_id": 1}
        )


QWEN2_5_3B = Shape(2048, 11008, 16, 2, 256)
TINY = Shape(64, 64, 4, 2, 2)

Step = Callable[[], None]
# A model, the update of a step, and the tensors that lie in host memory.
Made = tuple[Any, Callable[[], None], list[Tensor]]


def ours(shape: Shape, layers: int, directory: Path) -> Made:
    """Our model of random weights, and the update of a step."""
    store = directory / f"{shape.hidden_size}-{layers}"
    if not store.exists():
        write_random_store(shape.config(layers), store, torch.device("cpu"))
    lora = mebp.LoraConfig(r=LORA["lora_r"], lora_alpha=LORA["lora_alpha"])
    model = mebp.load(store, lora, dtype=torch.bfloat16, backend="triton").train()
    groups = block_groups(model, model.mebp.engine)
    parameters = [parameter for group in groups for parameter in group]
    optimizer = BlockAdamW(groups)

    def update() -> None:
        total = total_norm(parameters)
        clip(parameters, 1.0, total, float(total))
        optimizer.step()
        optimizer.zero_grad()

    return model, update, [step for steps in optimizer.steps for step in steps]


def ours_paged(shape: Shape, layers: int, directory: Path) -> Made:
    """Ours with the weights in host memory, from where they go to two arenas in turns."""
    model, update, on_host = ours(shape, layers, directory)
    store, engine = model.mebp.store, model.mebp.engine
    path, _ = find_blocks(model)
    files = [store.files[block_file(index)] for index in range(layers)]
    stager = Stager(torch.device("cpu"), engine.waiting, max(file.data().numel() for file in files))
    for index, file in enumerate(files):
        prefix = f"{path}.{index}."
        named = {name: model.get_submodule(name) for name in store.matrices if name.startswith(prefix)}
        engine.pages[index] = ArenaPages(store, file, named, stager, host_copy(file, stager.device))
    return model, update, on_host


class OneLaunch(SameCall):
    """Stands for a player of CUDA graphs: a pass is recorded, and playing it is one launch of an empty kernel."""

    def __init__(self) -> None:
        self.launch = torch.empty(1).zero_

    def record(self, function: Callable[[], None]) -> Callable[[], Any]:
        return self.launch


def ours_as_graphs(shape: Shape, layers: int, directory: Path) -> Made:
    """``ours_paged`` with the passes of blocks recorded. Nothing is computed, so their bits are not compared."""
    made = ours_paged(shape, layers, directory)
    engine = made[0].mebp.engine
    engine.graphs = BlockGraphs(engine.blocks, OneLaunch(), prove=False)
    return made


def peer(shape: Shape, layers: int, directory: Path) -> Made:
    """The peer's model of random weights, and the update of a step."""
    from gpu.training import quantize_linears

    model = transformers.AutoModelForCausalLM.from_config(shape.config(layers), dtype=torch.bfloat16)
    quantize_linears(model, torch.bfloat16)
    model = with_adapter(model, LORA).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, update, []


SIDES: dict[str, Callable[[Shape, int, Path], Made]] = {
    "mebp": ours,
    "mebp_paged": ours_paged,
    "mebp_graphs": ours_as_graphs,
    "peer": peer,
}


def step_of(meter: Meter, made: Made, tokens: int) -> Step:
    """A whole step of a side, its phases told to the meter."""
    model, update, on_host = made
    meter.on_host.update(tensor.data_ptr() for tensor in on_host)
    ids = torch.arange(tokens)[None] % model.config.vocab_size

    def step() -> None:
        with meter.during("forward"):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        with meter.during("backward"):
            loss.backward()
        with meter.during("update"):
            update()

    return step


@contextmanager
def stubs(meter: Meter, target: int, with_peer: bool, fused: bool | None) -> Iterator[None]:
    """While active, nothing is launched, and torch takes the ways on CPU tensors that it takes on a GPU's."""
    block = transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer
    with ExitStack() as stack:
        stack.enter_context(StubDevice(target, meter.launched))
        stack.enter_context(recompute_apart(meter, block))
        if with_peer:
            device = (MULTIPROCESSORS, target // 10, target % 10)
            library = stack.enter_context(StubBitsandbytes(device, meter.launched, fused))
            meter.implementations = library.implementations
        # On a GPU, norms and optimizers take lists of tensors at a time.
        for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
            supported = f"{module}._get_foreach_kernels_supported_devices"
            stack.enter_context(mock.patch(supported, lambda: ["cpu"]))
        yield


def count(side: str, shape: Shape, target: int, directory: Path) -> dict[str, Any]:
    """Launches of one layer by phase, and the operations behind them."""
    meters = []
    for layers in (2, 3):
        meter = Meter()
        with stubs(meter, target, side == "peer", fused=None):
            step = step_of(meter, SIDES[side](shape, layers, directory), shape.tokens)
            step()  # finds out what a recompute can leave out
            step()  # records the passes of blocks, where they are recorded
            meter.reset()
            with meter:
                step()
        meters.append(meter)
        gc.collect()
    less, more = meters
    operations: dict[str, dict[str, int]] = {phase: {} for phase in PHASES}
    for (phase, name), number in sorted(more.operations.items()):
        if share := number - less.operations[phase, name]:
            operations[phase][name] = share
    return {
        "launches": {phase: more.launches[phase] - less.launches[phase] for phase in PHASES},
        "waits": {phase: more.waits[phase] - less.waits[phase] for phase in PHASES},
        "operations": operations,
        "beside_layers": {phase: 3 * less.launches[phase] - 2 * more.launches[phase] for phase in PHASES},
        "waits_beside_layers": {phase: 3 * less.waits[phase] - 2 * more.waits[phase] for phase in PHASES},
    }


DEPTHS = (2, 8)


def host_times(sides: list[str], shape: Shape, target: int, directory: Path, rounds: int) -> dict[str, Any]:
    """Microseconds of one layer by phase: each side's rounds, which were taken in turns."""
    meter = Meter()
    with stubs(meter, target, "peer" in sides, fused=False), torch.backends.mkldnn.flags(enabled=False):
        steps = {}
        for side in sides:
            for layers in DEPTHS:
                steps[side, layers] = step_of(meter, SIDES[side](shape, layers, directory), shape.tokens)
                steps[side, layers]()
                steps[side, layers]()
        samples: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in steps}
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for key, step in steps.items():
                    meter.reset()
                    step()
                    samples[key].append({phase: 1e6 * meter.seconds[phase] for phase in PHASES})
        finally:
            gc.enable()
    few, many = DEPTHS
    result: dict[str, Any] = {}
    for side in sides:
        pairs = list(zip(samples[side, few], samples[side, many], strict=True))
        shares = {phase: [(b[phase] - a[phase]) / (many - few) for a, b in pairs] for phase in PHASES}
        result[side] = {
            "microseconds": {phase: statistics.median(values) for phase, values in shares.items()},
            "microseconds_of_rounds": {
                phase: [round(value, 1) for value in values] for phase, values in shares.items()
            },
        }
    return result


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the results, whose other entries stay")
    parser.add_argument("--name", default="now", help="the entry of the file")
    parser.add_argument("--target", type=int, default=90, help="the compute capability by which routes are chosen")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args(given)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    known: dict[str, Any] = {}
    if arguments.output is not None:
        try:
            known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        except (OSError, ValueError) as error:
            parser.error(f"--output {arguments.output} has no results to add to: {error}")
        if (problem := unwritable(arguments.output)) is not None:
            parser.error(f"--output cannot be written: {problem}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        root = Path(scratch)
        counts = {side: count(side, QWEN2_5_3B, arguments.target, root) for side in arguments.sides}
        times = host_times(arguments.sides, TINY, arguments.target, root, arguments.rounds)
    record = {
        "sides": {side: counts[side] | times[side] for side in arguments.sides},
        "settings": {"shape": asdict(QWEN2_5_3B), "shape_of_times": asdict(TINY), "target": arguments.target, **LORA},
        "environment": environment() | {"processor": processor(), "commit": commit(), "threads": 1},
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(known | {arguments.name: record}, indent=1) + "\n")
    for side, row in record["sides"].items():
        times = {phase: round(value) for phase, value in row["microseconds"].items()}
        print(side, "launches", row["launches"], "host us", times, "waits", row["waits"], row["waits_beside_layers"])


if __name__ == "__main__":
    main()
