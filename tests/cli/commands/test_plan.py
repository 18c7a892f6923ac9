"""``mebp plan``: its answer as JSON, table and picture, and a user's mistakes."""

import json
import shutil

import pytest
from models import tiny_store
from PIL import Image

from mebp_triton.cli.main import main
from mebp_triton.training.plan.phases import COMPONENTS
from mebp_triton.training.settings import CHOSEN

SETTINGS = ["--device=cpu", "--max-length=32", "--lora-r=4"]


@pytest.fixture(scope="module")
def store():
    return tiny_store("llama")


@pytest.fixture
def plan(capsys):
    """Runs ``mebp plan``: exit code, standard output, standard error."""

    def run(*arguments):
        capsys.readouterr()
        code = main(["plan", *(str(argument) for argument in arguments)])
        return code, *capsys.readouterr()

    return run


def test_json(plan, store):
    code, out, err = plan(store, *SETTINGS, "--json")
    value = json.loads(out)
    assert code == 0 and not err
    assert value["planned_peak_bytes"] == value["host_peak_bytes"] == sum(value["components"].values())
    assert value["device_peak_bytes"] is None and value["device"] == []
    assert set(value["components"]) == set(COMPONENTS) and set(value["chosen"]) == set(CHOSEN)
    assert value["planned_peak_bytes"] == max(moment["total_bytes"] for moment in value["host"])
    assert value["moment"] in [moment["moment"] for moment in value["host"]]
    assert value["settings"]["lora_r"] == 4 and value["file_bytes"]["store"] > 0


@pytest.mark.parametrize("columns", [80, 200])
def test_table(plan, store, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = plan(store, *SETTINGS)
    assert code == 0 and "planned peak" in out and "files: store" in out
    assert max(map(len, out.splitlines())) <= columns
    assert all(f"\n {name} " in out for name in ("framework", "LoRA", "gradients", "activations", "allocator", "total"))
    assert all(word in out for word in ("embedding", "forward", "backward", "optimizer")), "words are cut"


def test_a_model_or_its_config_is_planned_as_the_store_that_it_would_be(plan, store, tmp_path):
    config = tmp_path / "config.json"
    shutil.copy(store / "config.json", config)
    peaks = []
    for given in (store, tmp_path, config):
        options = [] if given == store else ["--group-size=32"]
        code, out, _ = plan(given, *SETTINGS, *options, "--json")
        value = json.loads(out)
        del value["components"]["framework"]
        peaks.append(sum(value["components"].values()))
        assert code == 0
    assert max(peaks) - min(peaks) < 1 << 20


def test_picture(plan, store, tmp_path):
    path = tmp_path / "plan.png"
    code, _, _ = plan(store, *SETTINGS, "--memory-budget=8GiB", f"--plot={path}", "--json")
    with Image.open(path) as image:
        assert code == 0 and image.format == "PNG" and image.width > 600


def test_a_budget_chooses(plan, store):
    value = json.loads(plan(store, *SETTINGS, "--memory-budget=8GiB", "--json")[1])
    assert value["chosen"]["weights"] == "device" and value["planned_peak_bytes"] < 8 << 30
    value = json.loads(plan(store, *SETTINGS, "--memory-budget=8GiB", "--weights=file", "--json")[1])
    assert value["chosen"]["weights"] == "file" and value["chosen"]["checkpoints"] == "device"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-budget=1MiB"], "memory_budget 1 MiB is too small: the smallest plan needs "),
        (["--memory-budget=lots"], "memory_budget must be a size such as 900MiB, 1.5GiB or 4GB, got 'lots'"),
        (["--max-length=100000"], "max_length 100000 is longer than the 64 tokens that the model takes"),
        (["--plot=/nowhere/a.png"], "--plot /nowhere/a.png names no file in an existing directory"),
        (["--target-modules=nothing"], "target_modules"),
    ],
)
def test_mistakes(plan, store, arguments, message):
    code, out, err = plan(store, *SETTINGS, *arguments)
    assert code == 2 and not out and message in err and err.count("\n") == 1


def test_what_is_no_model(plan, tmp_path):
    code, _, err = plan(tmp_path / "absent", *SETTINGS)
    assert code == 2 and "does not exist" in err
