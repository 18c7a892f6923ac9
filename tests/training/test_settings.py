"""Settings: every wrong one is named with its value and what is allowed, from a flag or from a file."""

import dataclasses
import json
import re
from typing import Any

import pytest
import torch

from mebp_triton.cli.parser import build_parser
from mebp_triton.cli.planning import settings_of
from mebp_triton.system.machine import resolve_device
from mebp_triton.system.units import parse_size
from mebp_triton.training.run_settings import resolve
from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.settings_file import read_config_file

FIELDS = {item.name for item in dataclasses.fields(TrainConfig)}
WRONG: list[tuple[str, Any, str]] = [
    ("max_steps", -1, "at least 0"),
    ("max_steps", 1 << 31, "at most 2147483647"),
    ("warmup_steps", 1 << 40, "at most 2147483647"),
    ("num_train_epochs", 0, "at least 1"),
    ("max_length", 1, "at least 2"),
    ("max_eval_windows", 0, "at least 1"),
    ("per_device_train_batch_size", 0, "at least 1"),
    ("gradient_accumulation_steps", 0, "at least 1"),
    ("gradient_accumulation_steps", -3, "at least 1"),
    ("lora_r", 0, "at least 1"),
    ("lora_r", 4097, "at most 4096"),
    ("lora_r", 8.0, "type int"),
    ("lora_r", True, "type int"),
    ("lora_r", "8", "type int"),
    ("lora_r", None, "type int"),
    ("lora_alpha", "16", "type float"),
    ("lora_alpha", float("nan"), "finite"),
    ("lora_alpha", float("inf"), "finite"),
    ("lora_dropout", 1.0, "in [0, 1)"),
    ("lora_dropout", -0.1, "in [0, 1)"),
    ("lora_dropout", float("nan"), "finite"),
    ("use_rslora", 1, "type bool"),
    ("use_rslora", "yes", "type bool"),
    ("target_modules", ["q_proj"], "type str"),
    ("learning_rate", 0.0, "larger than 0"),
    ("learning_rate", -1e-4, "larger than 0"),
    ("learning_rate", float("nan"), "finite"),
    ("learning_rate", float("inf"), "finite"),
    ("learning_rate", True, "type float"),
    ("lr_scheduler_type", "polynomial", "one of linear, cosine, constant"),
    ("lr_scheduler_type", None, "one of linear, cosine, constant"),
    ("lr_scheduler_type", ["linear"], "one of linear, cosine, constant"),
    ("warmup_steps", -1, "at least 0"),
    ("weight_decay", -0.1, "at least 0"),
    ("weight_decay", float("inf"), "finite"),
    ("max_grad_norm", -1.0, "at least 0"),
    ("max_grad_norm", float("nan"), "finite"),
    ("optim", "sgd", "one of adamw, adamw_8bit, mezo"),
    ("mezo_epsilon", 0.0, "larger than 0"),
    ("on_nan", "go on", "one of stop, skip"),
    ("seed", -1, "at least 0"),
    ("seed", 1 << 63, "at most 9223372036854775807"),
    ("selection_mode", "partial", "one of full, identity, exact, freeze"),
    ("selected_ratio", 0.0, "in (0, 1]"),
    ("selected_ratio", 1.5, "in (0, 1]"),
    ("selected_ratio", float("nan"), "finite"),
    ("selection_schedule", "spiral", "one of cyclic, strided, random"),
    ("unselected_update", "zero", "one of momentum, none"),
    ("weights", "disk", "one of device, host, file"),
    ("checkpoints", "disk", "one of device, host, file"),
    ("optimizer_state", "disk", "one of device, host, file"),
    ("recompute_granularity", "partial", "one of full, selective"),
    ("mlp_chunk_tokens", -1, "at least 0"),
    ("mlp_chunk_tokens", 64.0, "type int"),
    ("optimizer_in_backward", 1, "type bool"),
    ("return_freed_memory", "yes", "type bool"),
    ("packing", 1, "type bool"),
    ("completion_only_loss", "yes", "type bool"),
    ("assistant_only_loss", 1, "type bool"),
    ("memory_budget", 900, "type str"),
    ("memory_budget", "", "a size such as 900MiB, 1.5GiB or 4GB"),
    ("memory_budget", "much", "a size such as 900MiB, 1.5GiB or 4GB"),
    ("memory_budget", "4 XB", "a size such as 900MiB, 1.5GiB or 4GB"),
    ("memory_budget", "-1GB", "a size such as 900MiB, 1.5GiB or 4GB"),
    ("memory_budget", "1e9", "a size such as 900MiB, 1.5GiB or 4GB"),
    ("memory_budget", "0", "between 1 byte and 2**60"),
    ("memory_budget", "9" * 400, "between 1 byte and 2**60"),
    ("dtype", "float8", "one of float32, bfloat16, float16"),
    ("backend", "cuda", "one of auto, triton, panel"),
    ("save_steps", 0, "at least 1"),
    ("train_file", 5, "type str"),
    ("validation_file", 5, "type str"),
    ("output_dir", None, "type str"),
    ("device", 0, "type str"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_wrong_value_names_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(name) and allowed in message
    assert message.endswith((f"got {value!r}", f"got {value}")) and "\n" not in message


@pytest.mark.parametrize("other", [{"optim": "mezo"}, {"optimizer_in_backward": True}])
def test_steps_that_cannot_be_left_out(other):
    with pytest.raises(ValueError, match="on_nan"):
        TrainConfig(on_nan="skip", **other)
    TrainConfig(on_nan="stop", **other)


def test_every_setting_is_tried_above():
    assert {name for name, _, _ in WRONG} == FIELDS


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("900MiB", 900 << 20),
        ("1.5 GiB", 3 << 29),
        ("4GB", 4 * 10**9),
        ("4gb", 4 * 10**9),
        (" 512 kib ", 512 << 10),
        ("123456", 123456),
        ("7B", 7),
        ("0.5TiB", 1 << 39),
    ],
)
def test_sizes(text, size):
    assert parse_size("memory_budget", text) == size
    TrainConfig(memory_budget=text)


def test_what_could_not_train_is_refused():
    with pytest.raises(ValueError, match="lora_alpha must not be 0"):
        TrainConfig(lora_alpha=0)
    with pytest.raises(ValueError, match="dtype 'float16' loses small gradients"):
        TrainConfig(dtype="float16")
    TrainConfig(dtype="float16", optim="mezo")


def test_mezo_has_no_gradient_to_select():
    with pytest.raises(ValueError, match="selection_mode 'identity' needs gradients, and optim 'mezo' makes none"):
        TrainConfig(optim="mezo", selection_mode="identity")
    TrainConfig(optim="mezo")


def test_the_edges_are_allowed():
    TrainConfig(
        max_steps=0, max_length=2, lora_alpha=16, max_grad_norm=0, weight_decay=0, selected_ratio=1, lora_dropout=0
    )
    TrainConfig(max_eval_windows=None, device=None, weights=None, validation_file=None, seed=(1 << 63) - 1)


# --- what depends on the machine ------------------------------------------------------------------------------------


def test_on_a_cpu_everything_lies_in_files():
    config = resolve(TrainConfig(device="cpu", checkpoints="host"))
    assert (config.device, config.dtype) == ("cpu", "float32")
    assert (config.weights, config.checkpoints, config.optimizer_state) == ("file", "host", "file")
    assert (config.mlp_chunk_tokens, config.return_freed_memory) == (0, False)
    assert config.recompute_granularity == "full"  # a plan may choose otherwise
    assert resolve(TrainConfig(device="cpu", return_freed_memory=False)).return_freed_memory is False
    assert resolve(config) == config
    kept = resolve(TrainConfig(device="cpu", dtype="bfloat16", weights="device"))
    assert (kept.dtype, kept.weights) == ("bfloat16", "device")


def test_on_a_gpu_everything_lies_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = resolve(TrainConfig())
    assert (config.device, config.dtype) == ("cuda", "bfloat16")
    assert (config.weights, config.checkpoints, config.optimizer_state) == ("device",) * 3
    assert config.return_freed_memory is False
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="device 'cuda:2' is not here: torch sees 2 GPUs"):
        resolve_device("cuda:2")


def test_a_device_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device(None) == "cpu"
    with pytest.raises(ValueError, match="device 'cuda' is not here: torch sees 0 GPUs"):
        resolve(TrainConfig(device="cuda"))
    for name in ("gpu", "meta", "mps", "", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CPU"):
        with pytest.raises(ValueError, match=f"device must be cpu, cuda or cuda:N, got {name!r}"):
            resolve(TrainConfig(device=name))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("self_attn.q_proj,up_proj", ["self_attn.q_proj", "up_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"model\.layers\.[0-3]\..*", r"model\.layers\.[0-3]\..*"),
    ],
)
def test_target_modules(text, wanted):
    assert TrainConfig(target_modules=text).targets() == wanted


# --- files ----------------------------------------------------------------------------------------------------------

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
        ("a.yaml", "max-steps: [1", "is not valid YAML"),
        ("a.yaml", "a: b: c", "is not valid YAML"),
        ("a.yaml", b"max-steps: \xff\xfe\xfa", "is not valid YAML"),
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
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"run\.yaml does not exist"):
        read_config_file(tmp_path / "run.yaml")


def test_wrong_values_in_a_file(write):
    settings = read_config_file(write("a.yaml", "learning-rate: fast\nseed: 1.5\n"))
    with pytest.raises(ValueError, match="learning_rate must be of type float, got 'fast'"):
        TrainConfig(**{"learning_rate": settings["learning_rate"]})
    with pytest.raises(ValueError, match="seed must be of type int, got 1.5"):
        TrainConfig(**{"seed": settings["seed"]})


# --- flags ----------------------------------------------------------------------------------------------------------


def parse(*flags):
    return settings_of(build_parser().parse_args(["train", "store", *flags]))


NEEDED = ("--train-file=t.txt", "--output-dir=run", "--device=cpu")


def test_flags_win_over_the_file_and_the_file_over_defaults(write):
    text = "max-steps: 7\nlora-r: 4\nuse-rslora: true\nselected_ratio: 0.25\nvalidation-file: v.txt\n"
    path = write("run.yaml", text)
    config = parse(*NEEDED, f"--config={path}", "--max-steps=9", "--no-use-rslora", "--selection-mode", "exact")
    assert (config.max_steps, config.lora_r, config.use_rslora) == (9, 4, False)
    assert (config.selected_ratio, config.selection_mode, config.validation_file) == (0.25, "exact", "v.txt")
    assert config.learning_rate == TrainConfig().learning_rate
    assert config.weights is None and resolve(config).weights == "file"


def test_a_flag_that_repeats_the_default_wins_as_well(write):
    path = write("run.yaml", "max-steps: 7\n")
    assert parse(*NEEDED, f"--config={path}", "--max-steps=0").max_steps == 0


def test_a_file_may_hold_all_of_it(write):
    assert parse(f"--config={write('a.json', json.dumps({'train-file': 'a', 'output-dir': 'b'}))}").train_file == "a"


def test_every_setting_has_a_flag_that_sets_it():
    """Each with a value that is not the default."""
    values: dict[str, Any] = {
        "max_steps": 3,
        "num_train_epochs": 2,
        "max_length": 9,
        "max_eval_windows": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 5,
        "lora_r": 3,
        "lora_alpha": 1.5,
        "lora_dropout": 0.25,
        "target_modules": "q_proj",
        "learning_rate": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.125,
        "max_grad_norm": 0.5,
        "mezo_epsilon": 0.25,
        "on_nan": "skip",
        "seed": 1,
        "selection_mode": "freeze",
        "selected_ratio": 0.75,
        "selection_schedule": "random",
        "unselected_update": "none",
        "weights": "host",
        "checkpoints": "host",
        "optimizer_state": "host",
        "recompute_granularity": "full",
        "mlp_chunk_tokens": 64,
        "memory_budget": "4GB",
        "dtype": "bfloat16",
        "backend": "panel",
        "save_steps": 7,
        "train_file": "t",
        "validation_file": "v",
        "output_dir": "o",
        "device": "cpu",
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    switches = {"use_rslora", "optimizer_in_backward", "return_freed_memory"}
    switches |= {"packing", "completion_only_loss", "assistant_only_loss"}
    config = parse(*flags, "--optim=adamw")
    assert {name: getattr(config, name) for name in values} == values
    required = ("--train-file=t", "--output-dir=o")
    config = parse(*required, *(f"--{name.replace('_', '-')}" for name in switches))  # not with accumulation
    assert all(getattr(config, name) for name in switches) and values.keys() | switches | {"optim"} == FIELDS
    defaults = TrainConfig()
    assert all(getattr(defaults, name) != value for name, value in values.items())


def test_what_the_optimizer_in_the_backward_pass_refuses():
    with pytest.raises(ValueError, match="optimizer_in_backward .* needs gradient_accumulation_steps 1, got 3"):
        TrainConfig(optimizer_in_backward=True, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="optimizer_in_backward steps by gradients, and optim 'mezo' makes none"):
        TrainConfig(optimizer_in_backward=True, optim="mezo")


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
