"""What planning and training share: settings from flags and files, a planner for what is given, a plan in a line."""

import argparse
import shutil

import pytest
from commands import put
from packed_layouts import hqq
from packed_models import packed_directory

from mebp_triton.cli.planning import describe, planner_of, settings_of
from mebp_triton.convert.recipe import TABLE_FORM
from mebp_triton.kernels.names import Form
from mebp_triton.models.config import read_config
from mebp_triton.store.reader import Store
from mebp_triton.training.settings import TrainConfig


def test_flags_win_over_the_file(tmp_path):
    path = put(tmp_path, "settings.yaml", "lora-r: 3\nmax_steps: 5\nlearning_rate: 1e-3\n")
    given = argparse.Namespace(config=str(path), lora_r=7, store="store", json=False, scheme=None)
    assert settings_of(given) == TrainConfig(lora_r=7, max_steps=5, learning_rate=1e-3)
    assert settings_of(argparse.Namespace(config=None, max_steps=2)) == TrainConfig(max_steps=2)
    assert settings_of(argparse.Namespace(config=None)).weights is None


@pytest.fixture(scope="module")
def planners(world, tmp_path_factory):
    """For a store, given by name and opened, and for the store that would be made of a config."""
    config = read_config(world / "store", "")
    alone = tmp_path_factory.mktemp("config")
    shutil.copy(world / "store" / "config.json", alone)
    return [planner_of(given, config, {"group_size": 32}) for given in (world / "store", Store(world / "store"), alone)]


def test_a_store_is_planned_for_as_it_is_and_a_model_as_it_would_be(planners):
    named, opened, would_be = [planner.inventory for planner in planners]
    assert named == opened
    assert named.files == would_be.files and named.matrices.keys() == would_be.matrices.keys()
    assert would_be.matrices["model.layers.0.mlp.up_proj"].group_size == 32
    assert would_be.matrices["model.embed_tokens"].form == TABLE_FORM
    headers = 4096  # of each file, at most
    assert all(0 <= size - would_be.sizes[name] < headers for name, size in named.sizes.items())


def test_a_model_whose_tensors_alone_show_that_it_is_quantised(tmp_path):
    packed_directory(tmp_path, hqq(64), {}, hidden_size=128, intermediate_size=192)
    planned = planner_of(tmp_path, read_config(tmp_path, ""), {}).inventory
    assert {info.form for info in planned.matrices.values()} == {Form("affine", 64), TABLE_FORM}


def test_a_plan_in_a_line(planners):
    asked = TrainConfig(max_length=24, lora_r=2, device="cpu", mlp_chunk_tokens=8, return_freed_memory=True)
    plan = planners[0].resolve(asked)
    line = describe(plan)
    assert line.startswith(f"planned peak {plan.peak / (1 << 20):.0f} MiB: weights file, checkpoints file, ")
    assert "optimizer state file" in line and "recompute granularity " in line
    assert line.endswith(", MLPs by 8 tokens, freed memory returned") and "\n" not in line
