"""``mebp plan``: its answer as JSON, table and picture, and what is refused."""

import io
import json
import shutil

import pytest
from commands import answer, assert_refused
from PIL import Image
from rich.console import Console

from mebp_triton.cli.commands.plan import as_json, draw, table
from mebp_triton.cli.planning import planner_of
from mebp_triton.models.config import read_config
from mebp_triton.training.plan.phases import COMPONENTS
from mebp_triton.training.settings import CHOSEN, TrainConfig

SETTINGS = ["--device=cpu", "--max-length=32", "--lora-r=4"]


@pytest.fixture(scope="module")
def plan(world):
    settings = TrainConfig(device="cpu", max_length=32, lora_r=4, memory_budget="8GiB")
    return planner_of(world / "store", read_config(world / "store", ""), {}).resolve(settings)


# --- what is shown --------------------------------------------------------------------------------------------------


def test_json(plan):
    value = json.loads(json.dumps(as_json(plan)))
    assert value["planned_peak_bytes"] == value["host_peak_bytes"] == sum(value["components"].values())
    assert value["device_peak_bytes"] is None and value["device"] == []
    assert set(value["components"]) == set(COMPONENTS) and set(value["chosen"]) == set(CHOSEN)
    assert value["planned_peak_bytes"] == max(moment["total_bytes"] for moment in value["host"])
    assert value["moment"] in [moment["moment"] for moment in value["host"]]
    assert value["settings"]["lora_r"] == 4 and value["file_bytes"]["store"] > 0


@pytest.mark.parametrize("columns", [80, 200])
def test_table(plan, columns):
    shown = io.StringIO()
    Console(file=shown, width=columns).print(table(plan))
    out = shown.getvalue()
    assert "planned peak" in out and "files: store" in out
    assert max(map(len, out.splitlines())) <= columns
    assert all(f"\n {name} " in out for name in ("framework", "LoRA", "gradients", "activations", "allocator", "total"))
    assert all(word in out for word in ("embedding", "forward", "backward", "optimizer")), "words are cut"


def test_picture(plan, tmp_path):
    draw(plan, tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        assert image.format == "PNG" and image.width > 600


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_shows_all_three(mebp, world, tmp_path):
    command = ["plan", world / "store", *SETTINGS]
    value = answer(mebp(*command, "--memory-budget=8GiB", f"--plot={tmp_path / 'plan.png'}", "--json"))
    assert value["settings"]["max_length"] == 32 and (tmp_path / "plan.png").exists()
    code, out, err = mebp(*command)
    assert code == 0 and "planned peak" in out and "\n total " in out and not err


def test_a_model_or_its_config_is_planned_as_the_store_that_it_would_be(mebp, world, tmp_path):
    store = world / "store"
    config = tmp_path / "config.json"
    shutil.copy(store / "config.json", config)
    peaks = []
    for given in (store, tmp_path, config):
        options = [] if given == store else ["--group-size=32"]
        value = answer(mebp("plan", given, *SETTINGS, *options, "--json"))
        del value["components"]["framework"]
        peaks.append(sum(value["components"].values()))
    assert max(peaks) - min(peaks) < 1 << 20


def test_a_budget_chooses(mebp, world):
    command = ["plan", world / "store", *SETTINGS, "--memory-budget=8GiB", "--json"]
    value = answer(mebp(*command))
    assert value["chosen"]["weights"] == "device" and value["planned_peak_bytes"] < 8 << 30
    value = answer(mebp(*command, "--weights=file"))
    assert value["chosen"]["weights"] == "file" and value["chosen"]["checkpoints"] == "device"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-budget=1MiB"], "--memory-budget 1MiB is too small: the smallest plan needs "),
        (["--memory-budget=1KiB"], "--memory-budget 1KiB is too small: the smallest plan needs "),
        (["--memory-budget=lots"], "--memory-budget must be a size such as 900MiB, 1.5GiB or 4GB, got 'lots'"),
        (["--max-length=100000"], "--max-length 100000 is longer than the 64 tokens that the model takes"),
        (["--plot=/nowhere/a.png"], "--plot /nowhere/a.png names no file in an existing directory"),
        (["--target-modules=nothing"], "--target-modules 'nothing'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, arguments, message):
    assert_refused(mebp, ["plan", world / "store", *SETTINGS, *arguments], [message], world, tmp_path)


def test_what_is_no_model(mebp, tmp_path):
    parts = ["absent", "give a transformers model directory or its config.json"]
    assert_refused(mebp, ["plan", tmp_path / "absent", *SETTINGS], parts, tmp_path)
