"""The facts about the optimizers: those that are there, and one that is added, which settings and plan follow."""

import subprocess
import sys
from typing import Literal, get_args

import pytest
import torch
from plans import SMALL, at, planner

from mebp_triton.training import settings as settings_module
from mebp_triton.training.optimizers.table import OPTIMIZERS, Optim, OptimizerFacts
from mebp_triton.training.run_settings import resolve
from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.updates import UPDATES


def test_every_optimizer_has_its_name_its_facts_and_its_update():
    assert get_args(Optim) == tuple(OPTIMIZERS) == tuple(UPDATES)


def test_reading_them_imports_no_library():
    code = "import sys, mebp_triton.training.optimizers.table; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class Momentum:
    """Steps with a buffer as large as five times its largest group, so that a trace sees it."""

    def __init__(self, groups):
        self.groups = groups

    def step(self, selected=None):
        torch.empty(5 * max(sum(parameter.numel() for parameter in group) for group in self.groups))


@pytest.fixture
def added(monkeypatch):
    """Adds an optimizer named "other" with the given facts."""

    def add(**facts):
        monkeypatch.setitem(OPTIMIZERS, "other", OptimizerFacts("another one", **facts))
        monkeypatch.setattr(settings_module, "Optim", Literal[(*get_args(Optim), "other")])

    return add


def test_a_plan_follows_the_facts_of_an_optimizer_that_is_added(shared_store, added):
    added(state_bytes=lambda parameters: 12 * parameters, make=Momentum)
    plans = planner(shared_store("llama"), framework=0)
    places = {"optimizer_state": "device"}

    def step(optim):
        return at(plans.predict(resolve(TrainConfig(**SMALL, **places, optim=optim))), "optimizer step")

    adamw, other = step("adamw"), step("other")
    assert 2 * other["optimizer state"] == 3 * adamw["optimizer state"] > 0
    assert other["gradients"] == adamw["gradients"] > 0
    largest = plans.predict(resolve(TrainConfig(**SMALL, optim="other"))).host
    paged = max(phase.components["optimizer state"] for phase in largest)
    # 12 bytes of state and 5 float32 of buffer for every parameter of the largest block
    assert other["activations"] >= paged // 12 * 20


def test_a_plan_without_gradients_has_no_phase_for_them(shared_store, added):
    added(state_bytes=lambda parameters: 4 * parameters, gradients=False)
    plan = planner(shared_store("llama"), framework=0).predict(resolve(TrainConfig(**SMALL, optim="other")))
    assert not [phase for phase in plan.host if "backward" in phase.name or phase.components["gradients"]]
    assert plan.files.keys() == {"store", "optimizer state"}


def test_settings_follow_the_facts_of_an_optimizer_that_is_added(added):
    added(state_bytes=lambda parameters: 0, gradients=False)
    TrainConfig(optim="other", dtype="float16")
    for name, value in (("selection_mode", "exact"), ("on_nan", "skip"), ("optimizer_in_backward", True)):
        with pytest.raises(ValueError, match=rf"{name}.*\bother\b|\bother\b.*{name}"):
            TrainConfig(optim="other", **{name: value})
    added(state_bytes=lambda parameters: 0)
    TrainConfig(optim="other", selection_mode="exact", on_nan="skip")
    with pytest.raises(ValueError, match="optimizer_in_backward does not work with optim 'other'"):
        TrainConfig(optim="other", optimizer_in_backward=True)
