"""The names by which users choose how blocks are recomputed and selected. Imports nothing, so that parsing is quick."""

from __future__ import annotations

from typing import Literal, get_args

Granularity = Literal["full", "selective"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
Mode = Literal["full", "identity", "exact", "freeze"]
MODES: tuple[Mode, ...] = get_args(Mode)
Schedule = Literal["cyclic", "strided", "random", "importance"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
UnselectedUpdate = Literal["momentum", "none"]
UNSELECTED_UPDATES: tuple[UnselectedUpdate, ...] = get_args(UnselectedUpdate)
