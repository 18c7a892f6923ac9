"""The names by which users choose how blocks are recomputed and selected. Imports nothing, so that parsing is quick."""

from __future__ import annotations

from typing import Literal

Granularity = Literal["full", "selective"]
GRANULARITIES: tuple[Granularity, ...] = ("full", "selective")
Mode = Literal["full", "identity", "exact", "freeze"]
MODES: tuple[Mode, ...] = ("full", "identity", "exact", "freeze")
Schedule = Literal["cyclic", "strided", "random", "importance"]
SCHEDULES: tuple[Schedule, ...] = ("cyclic", "strided", "random", "importance")
UnselectedUpdate = Literal["momentum", "none"]
UNSELECTED_UPDATES: tuple[UnselectedUpdate, ...] = ("momentum", "none")
