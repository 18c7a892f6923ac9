"""Data parallel training: several processes, one run, under ``torchrun`` or ``accelerate launch``.

Every process holds the whole model and adapter and takes its part of each global batch. Gradients of the selected
blocks are summed, and all take the same optimizer step. The first process alone writes.

All communication begins with ``exchange``: every process gives a few numbers, and says whether it has failed. A process
that fails takes part in one more exchange, in which it says so. The others learn it in their next exchange, wherever
they are, and end with its error. So one failure ends all, and no process waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mebp_triton.system.errors import FailedProcess, LostProcess, RunError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # how long to wait for a process that lives and does not answer
NUMBERS = 4  # the most that one exchange takes of each process
MESSAGE_BYTES = 1024  # of the error that a failed process sends
SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that no two of 2**64 processes have the same seed


class Processes:
    """The processes of a run, seen from one of them. If it is alone, nothing is communicated.

    Args:
        rank: the number of this process, from 0.
        size: how many processes there are.
        local_rank: the number of this process on its machine, which picks its GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, name: str | None) -> str | None:
        """Returns the device that ``name`` means here: each process of several takes its own GPU.

        Raises:
            ValueError: ``name`` is one GPU, and there are several processes.
        """
        if self.size == 1 or name == "cpu" or (name is None and not torch.cuda.is_available()):
            return name
        if name not in (None, "cuda"):
            raise ValueError(f"device {name!r} is one GPU, and each of {self.size} processes takes its own: give cuda")
        return f"cuda:{self.local_rank}"

    def seed(self, seed: int) -> int:
        """Returns the seed of what this process draws for itself, as dropout; that of the first process is ``seed``."""
        return (seed + self.rank * SEED_STRIDE) % (1 << 64)

    def exchange(self, *numbers: float) -> list[list[float]]:
        """Returns the numbers that every process gives, in the order of ranks.

        Raises:
            FailedProcess: one of them has failed.
            LostProcess: one of them is gone.
        """
        return [list(numbers)] if self.size == 1 else self._exchange(numbers)

    def _exchange(self, numbers: Sequence[float], code: int = 0, message: str = "") -> list[list[float]]:
        assert len(numbers) <= NUMBERS
        # A gather needs the same shape everywhere, also of a process that failed and has no numbers to give.
        mine = torch.zeros(1 + NUMBERS, dtype=torch.float64)
        mine[: 1 + len(numbers)] = torch.tensor([float(code), *map(float, numbers)], dtype=torch.float64)
        rows = [row.tolist() for row in self.gather(mine)]
        failed = [rank for rank, row in enumerate(rows) if row[0]]
        if failed:
            line = message.encode()[:MESSAGE_BYTES]
            texts = self.gather(torch.tensor(list(line.ljust(MESSAGE_BYTES, b"\0")), dtype=torch.uint8))
            text = bytes(texts[failed[0]].tolist()).rstrip(b"\0").decode(errors="ignore")
            raise FailedProcess(failed[0], int(rows[failed[0]][0]), text)
        return [row[1 : 1 + len(numbers)] for row in rows]

    def sum(self, *numbers: float) -> list[float]:
        """Returns each number's sum over the processes, with the same bits in all."""
        return [sum(column) for column in zip(*self.exchange(*numbers), strict=True)]

    def highest(self, *numbers: float) -> list[float]:
        """Returns each number's maximum over the processes."""
        return [max(column) for column in zip(*self.exchange(*numbers), strict=True)]

    def same(self, number: float) -> bool:
        """Whether every process has this number."""
        return all(row == [number] for row in self.exchange(number))

    def first(self, action: Callable[[], T]) -> T:
        """Calls ``action`` in the first process and then in the others, which find what the first one made."""
        if self.is_first:
            result = action()
            self.exchange()
            return result
        self.exchange()
        return action()

    def share(self, value: dict[str, Any]) -> dict[str, Any]:
        """Returns the first process's ``value`` in all processes. JSON must be able to hold it."""
        data = json.dumps(value).encode()
        size = int(self.exchange(len(data))[0][0])
        if self.size > 1:
            shared = torch.tensor(list(data if self.is_first else bytes(size)), dtype=torch.uint8)
            _answered(lambda: dist.broadcast(shared, src=0))
            data = bytes(shared.tolist())
        value = json.loads(data)
        return value

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns every process's ``tensor``, in the order of ranks; all are on the CPU and of one shape and dtype."""
        if self.size == 1:
            return [tensor]
        rows = [torch.empty_like(tensor) for _ in range(self.size)]
        _answered(lambda: dist.all_gather(rows, tensor))
        return rows

    @torch.no_grad()
    def sum_gradients(self, groups: Sequence[Sequence[nn.Parameter]]) -> int:
        """Replaces every gradient by its sum over the processes, computed in float32 (float64 for float64).

        A parameter without a gradient counts as zero. One that has none in any process stays without.

        Args:
            groups: groups of parameters, the same in every process. Each group is summed in one call.

        Returns:
            The bytes that this process handed to all-reduce.
        """
        handed = 0
        for group in groups if self.size > 1 else ():
            if not group:
                continue
            dtype = torch.promote_types(group[0].dtype, torch.float32)
            # A last number for each parameter counts the processes in which it has a gradient.
            parts = [torch.zeros_like(p, dtype=dtype) if p.grad is None else p.grad.to(dtype) for p in group]
            present = torch.tensor([p.grad is not None for p in group], dtype=dtype, device=group[0].device)
            flat = torch.cat([*(part.reshape(-1) for part in parts), present])
            self.exchange()
            _answered(lambda flat=flat: dist.all_reduce(flat))  # type: ignore[misc]
            *sums, counts = flat.split([*(p.numel() for p in group), len(group)])
            for parameter, total, count in zip(group, sums, counts.tolist(), strict=True):
                parameter.grad = total.view_as(parameter).to(parameter.dtype) if count else None
            handed += flat.nbytes
        return handed

    def fail(self, error: Exception, debug: bool = False) -> NoReturn:
        """Tells the other processes of ``error``, unless they know. The first then raises it; others exit silently.

        They exit after the first: a launcher stops all processes when one exits, and the first must print its line.
        """
        if isinstance(error, LostProcess):
            raise error
        failed = error if isinstance(error, FailedProcess) else self._announce(error)
        if failed.rank == self.rank and (self.is_first or debug):
            raise error
        if self.is_first:
            line = f"process {failed.rank}: {failed.message}"
            raise (ValueError(line) if failed.code == 2 else RunError(line)) from None
        with contextlib.suppress(RuntimeError):  # nothing is ever sent: this ends when the first process does
            dist.recv(torch.zeros(1), src=0)
        raise SystemExit(failed.code)

    def _announce(self, error: Exception) -> FailedProcess:
        """Takes part in an exchange as failed; returns the failure that all processes agree on."""
        known = isinstance(error, ValueError | OSError | RunError)
        line = " ".join(f"{'' if known else type(error).__name__ + ': '}{error}".split())
        try:
            self._exchange((), 2 if isinstance(error, ValueError) else 1, line)
        except FailedProcess as failed:
            return failed
        except LostProcess:
            raise error from None
        raise AssertionError("an exchange with a failed process raises")


ALONE = Processes()


def _answered(communicate: Callable[[], Any]) -> None:
    """Calls ``communicate``. torch's error, as for a closed connection, becomes a LostProcess."""
    try:
        communicate()
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise LostProcess(f"another process of this run is gone or does not answer ({reason})") from error


@contextmanager
def joined(debug: bool = False) -> Iterator[Processes]:
    """While active, this process is one of those that the environment describes, and it leaves when all are done.

    The launcher sets ``WORLD_SIZE``, ``RANK`` and ``LOCAL_RANK``. An error in any process ends all: see
    ``Processes.fail``.

    Args:
        debug: a process that failed raises its own error, for the traceback.

    Raises:
        ValueError: the environment is incomplete or wrong.
    """
    size, rank = _from_environment("WORLD_SIZE", 1), _from_environment("RANK", 0)
    if size == 1:
        yield ALONE
        return
    if "RANK" not in os.environ or not 0 <= rank < size:
        given = os.environ.get("RANK", "not set")
        raise ValueError(f"WORLD_SIZE is {size} and RANK is {given}: start with torchrun, which sets both")
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    processes = Processes(rank, size, _from_environment("LOCAL_RANK", rank))
    try:
        yield processes
        processes.exchange()
    except Exception as error:  # whatever ends one process must be told to the others, which wait
        processes.fail(error, debug)
    dist.destroy_process_group()


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}: start with torchrun, which sets it")
    return int(text)
