"""Settings from a file: YAML or JSON, one plain value each, and a bad file is one line that names it."""

import json
import re

import pytest

from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.settings_file import read_config_file

SETTINGS = {"max-steps": 7, "learning_rate": 0.001, "use-rslora": True, "validation_file": None, "optim": "adamw"}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ""])
def test_a_file_of_settings_with_dashes_or_underscores(write, suffix):
    path = write(f"run{suffix}", json.dumps(SETTINGS))
    settings = read_config_file(path)
    assert settings == {name.replace("-", "_"): value for name, value in SETTINGS.items()}
    assert read_config_file(str(path)) == settings


def test_yaml(write):
    path = write("run.yaml", "# a run\nmax-steps: 7\nlearning-rate: 2e-4\nlora_alpha: 1.6e+1\nuse_rslora: true\n")
    settings = read_config_file(path)
    assert settings == {"max_steps": 7, "learning_rate": 2e-4, "lora_alpha": 16.0, "use_rslora": True}
    TrainConfig(**settings)


@pytest.mark.parametrize("key", ["learning-rat", "learning_rat"])
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_an_unknown_setting_suggests_the_nearest(write, key, suffix):
    path = write("run" + suffix, json.dumps({key: 1}))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: unknown setting '{key}'; did you mean 'learning_r"):
        read_config_file(path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.yaml", "max-steps: [1", "is not valid YAML: line 1, column 14: while parsing a flow sequence, expected"),
        ("a.yaml", "x: 1\na: b: c", "is not valid YAML: line 2, column 5: mapping values are not allowed here"),
        ("a.yaml", b"max-steps: \xff\xfe\xfa", "is not valid YAML: position 11: invalid start byte"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("a.yaml", "", "should hold settings by name, got NoneType"),
        ("a.yaml", "- max-steps", "should hold settings by name, got list"),
        ("a.yaml", "max-steps: 1\nmax_steps: 2", "setting 'max_steps' stands twice"),
        ("a.yaml", "3: 4", "unknown setting 3"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", '{"seed": 1, "seed": 2}', "is not valid JSON: key 'seed' stands twice"),
        ("a.json", '{"learning_rate": NaN}', "is not valid JSON"),
        ("a.json", b"\xff", "is not valid JSON"),
        ("a.json", "7", "should hold settings by name, got int"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(write, name, content, problem):
    path = write(name, content)
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        read_config_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "byte string" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"run\.yaml does not exist"):
        read_config_file(tmp_path / "run.yaml")


def test_wrong_values_in_a_file(write):
    settings = read_config_file(write("a.yaml", "learning-rate: fast\nseed: 1.5\n"))
    with pytest.raises(ValueError, match="learning_rate must be of type float, got 'fast'"):
        TrainConfig(**{"learning_rate": settings["learning_rate"]})
    with pytest.raises(ValueError, match="seed must be of type int, got 1.5"):
        TrainConfig(**{"seed": settings["seed"]})


def test_a_budget_in_a_file_may_be_a_number_of_bytes(tmp_path):
    (tmp_path / "settings.yaml").write_text("memory_budget: 629145600\n")
    assert TrainConfig(**read_config_file(tmp_path / "settings.yaml")).memory_budget == "629145600"


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (BOMB + "lora_r: *l\n", "one plain value"),
        ("lora_r: [1, 2]", "one plain value"),
        ("? [lora_r]\n: 1", "one plain value"),
        ("lora_r: 2\nlora_r: 4", "'lora_r' stands twice"),
        ("[" * 20_000, "not valid YAML"),
        ("lora_r: !!python/name:os.system", "not valid YAML"),
        ("lora_r: " + "x" * 100_000, "lora_r must be of type int"),
        ("lora_r: " + "9" * 5000, "."),
        ("\0", "not valid YAML"),
    ],
)
def test_a_hostile_file_is_one_short_line(write, content, problem):
    path = write("a.yaml", content)
    with pytest.raises(ValueError, match=problem) as caught:
        TrainConfig(**read_config_file(path))
    assert len(str(caught.value)) < 600


def test_a_list_in_a_json_file_is_refused(write):
    with pytest.raises(ValueError, match="'lora_r' must be one value, got list"):
        read_config_file(write("a.json", '{"lora_r": [1]}'))
