"""The rows of the study: each is a setting of the selection, and runs with several seeds."""

from __future__ import annotations

from typing import Any

# Settings of every run. The learning rate is constant after the warm-up, so that a run can be evaluated early.
COMMON: dict[str, Any] = {
    "max_length": 128,
    "lora_r": 8,
    "lora_alpha": 16.0,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 5,
    "save_steps": 10**6,
    "recompute_granularity": "selective",
}
STEPS = 40  # after which runs are compared for equal steps
# (ratio, steps): runs up to this ratio make so many steps, which take at least the time of full's STEPS.
LONGEST = ((0.3, 64), (0.6, 58), (1.0, 46))
PAIRS = 15  # timed steps of each side
RATIOS = (0.25, 0.5, 0.75)


def _row(mode: str, ratio: float = 1.0, schedule: str = "cyclic", update: str = "momentum") -> dict[str, Any]:
    return {
        "selection_mode": mode,
        "selected_ratio": ratio,
        "selection_schedule": schedule,
        "unselected_update": update,
    }


def _name(row: dict[str, Any]) -> str:
    if row["selection_mode"] == "full":
        return "full"
    parts = [row["selection_mode"], f"{row['selected_ratio']:g}"]
    if row["selection_mode"] != "freeze":
        parts += [row["selection_schedule"], row["unselected_update"]]
    return "-".join(parts)


def _named(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {_name(row): row for row in rows}


# The rows that the conclusion rests on: three modes at three ratios, and full.
MODES = _named([_row("full"), *(_row(mode, ratio) for mode in ("identity", "exact", "freeze") for ratio in RATIOS)])
# Schedules and update policies, with half of the blocks selected.
SCHEDULES = _named(
    [_row(mode, 0.5, schedule) for mode in ("identity", "exact") for schedule in ("strided", "random", "importance")]
    + [_row(mode, 0.5, "cyclic", "none") for mode in ("identity", "exact")]
)
# Baselines: two random blocks per step with their own moments, as in LISA (arXiv 2403.17919), which draws them less
# often; and MeZO.
BASELINES = _named([_row("exact", 0.067, "random", "none")])
BASELINES["mezo"] = {"optim": "mezo", "learning_rate": 1e-4}
# The rows that are timed. Another is as fast as the one that differs in its update or its order alone: ``timed_as``.
TIMED = {name: row for name, row in (MODES | BASELINES).items() if name != "full"}
TIMED |= {name: SCHEDULES[name] for name in SCHEDULES if name.endswith("momentum") and "importance" not in name}
HALVES = {name: MODES[name] for name in MODES if name == "full" or "-0.5" in name}
# Is a mode behind only because the learning rate suits full?
RATES = {f"{name}-lr{rate:g}": row | {"learning_rate": rate} for rate in (2e-4, 1e-3) for name, row in HALVES.items()}

# 4-bit weights, short runs: where does training diverge? float16 is refused for AdamW, in every mode.
DIVERGENCE = {
    f"{mode}-{dtype}-lr{rate:g}-alpha{alpha:g}": _row(mode, 0.5 if mode != "full" else 1.0)
    | {"dtype": dtype, "learning_rate": rate, "lora_alpha": alpha}
    for mode in ("full", "identity")
    for dtype, rate, alpha in [
        ("float32", 5e-4, 16.0),
        ("float32", 5e-3, 16.0),
        ("float32", 2e-2, 16.0),
        ("float32", 5e-4, 128.0),
        ("float32", 5e-3, 128.0),
        ("bfloat16", 5e-4, 16.0),
        ("bfloat16", 2e-2, 16.0),
    ]
}

# By part: its rows, its text and its seeds.
PARTS: dict[str, tuple[dict[str, dict[str, Any]], str, tuple[int, ...]]] = {
    "modes": (MODES, "language", (0, 1, 2)),
    "schedules": (SCHEDULES, "language", (0, 1, 2)),
    "baselines": (BASELINES, "language", (0, 1, 2)),
    "rates": (RATES, "language", (0,)),
    "instructions": (HALVES, "instructions", (0, 1, 2)),
    "divergence": (DIVERGENCE, "language", (0,)),
}


def timed_as(name: str) -> str:
    """The name of the row in TIMED whose steps take as long as this one's."""
    for mine, timed in (("importance", "random"), ("cyclic-none", "cyclic-momentum")):
        name = name.replace(mine, timed)
    return name
