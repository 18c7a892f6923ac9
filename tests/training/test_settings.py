"""Settings: every wrong one is named with its value and what is allowed; every one has its facts and its flag."""

import dataclasses
import subprocess
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from mebp_triton.cli.parser import build_parser
from mebp_triton.cli.planning import settings_of
from mebp_triton.system.units import parse_size
from mebp_triton.training.settings import CHOSEN, EVALUATED, FACTS, FREE_ON_RESUME, TRACED_BY, Facts, TrainConfig

FIELDS = {item.name for item in dataclasses.fields(TrainConfig)}
WRONG: list[tuple[str, Any, str]] = [
    ("max_steps", -1, "at least 0"),
    ("max_steps", 1 << 31, "at most 2147483647"),
    ("max_steps", 10**400, "at most 2147483647"),
    ("learning_rate", 10**400, "at most 2147483647"),
    ("lora_alpha", -(10**400), "at least -2147483647"),
    ("seed", 10**400, "at most 9223372036854775807"),
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
    ("exclude_modules", ["q_proj"], "type str"),
    ("target_parameters", ["experts.up_proj"], "type str"),
    ("rank_pattern", {"q_proj": 8}, "type str"),
    ("rank_pattern", "q_proj=8", "a JSON object such as"),
    ("alpha_pattern", "[8]", "a JSON object such as"),
    ("adapter", 5, "type str"),
    ("chat_template", 5, "type str"),
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
    ("join_micro_batches", 1, "type bool"),
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
    ("eval_steps", -1, "at least 0"),
    ("report_to", "comet", "none, or of tensorboard, wandb, mlflow, trackio, separated by commas"),
    ("save_best", 1, "type bool"),
    ("early_stopping_patience", 0, "at least 1"),
    ("early_stopping_threshold", -0.1, "at least 0"),
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


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_setting_refuses_what_is_not_of_its_type(name):
    with pytest.raises(ValueError, match=rf"^{name} must be (of type|one of) .*, got \[\{{\}}\]$"):
        TrainConfig(**{name: [{}]})


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


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"device": "cpu"}, "records CUDA graphs, and this run is on a CPU: leave it out"),
        ({"recompute_granularity": "selective"}, "does not work with recompute_granularity 'selective'"),
    ],
)
def test_block_graphs_need_a_device_and_full_recomputes(other, message):
    with pytest.raises(ValueError, match=f"block_graphs {message}"):
        TrainConfig(block_graphs=True, **other)
    TrainConfig(block_graphs=True, device="cuda", recompute_granularity="full")
    TrainConfig(block_graphs=True, device="cuda", optim="mezo")


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


def test_what_needs_evaluations_says_so():
    with pytest.raises(ValueError, match="eval_steps 5 needs a validation_file"):
        TrainConfig(eval_steps=5)
    for name in ("save_best", "early_stopping_patience"):
        with pytest.raises(ValueError, match=f"{name} compares evaluations during the training: give eval_steps"):
            TrainConfig(validation_file="v.txt", **{name: True if name == "save_best" else 2})


def test_the_edges_are_allowed():
    TrainConfig(
        max_steps=0, max_length=2, lora_alpha=16, max_grad_norm=0, weight_decay=0, selected_ratio=1, lora_dropout=0
    )
    TrainConfig(max_eval_windows=None, device=None, weights=None, validation_file=None, seed=(1 << 63) - 1)


def test_what_the_optimizer_in_the_backward_pass_refuses():
    with pytest.raises(ValueError, match="optimizer_in_backward .* needs gradient_accumulation_steps 1, got 3"):
        TrainConfig(optimizer_in_backward=True, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="optimizer_in_backward does not work with optim 'mezo'"):
        TrainConfig(optimizer_in_backward=True, optim="mezo")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("all-linear", "all-linear"),
        ("all-linear-and-experts", "all-linear-and-experts"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("self_attn.q_proj,up_proj", ["self_attn.q_proj", "up_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"model\.layers\.[0-3]\..*", r"model\.layers\.[0-3]\..*"),
    ],
)
def test_target_modules(text, wanted):
    assert TrainConfig(target_modules=text).lora().target_modules == wanted


# --- facts ----------------------------------------------------------------------------------------------------------


def test_every_setting_has_its_facts():
    assert FACTS.keys() == FIELDS and all(isinstance(facts, Facts) and facts.help for facts in FACTS.values())


def test_the_lists_that_follow_from_them():
    assert set(FREE_ON_RESUME) == {
        "output_dir",
        "validation_file",
        "max_eval_windows",
        "weights",
        "checkpoints",
        "optimizer_state",
        "save_steps",
        "backend",
        "device",
        "recompute_granularity",
        "chat_template",
        "memory_budget",
        "return_freed_memory",
        "on_nan",
        "adapter",
        "block_graphs",
        "report_to",
        "eval_steps",
        "save_best",
        "early_stopping_patience",
        "early_stopping_threshold",
    }
    assert set(TRACED_BY) == {
        "max_length",
        "per_device_train_batch_size",
        "packing",
        "lora_r",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "rank_pattern",
        "optim",
        "selection_mode",
        "device",
        "dtype",
        "backend",
        "weights",
    }
    # A plan is described by its first four choices, in this order.
    assert CHOSEN == (
        "weights",
        "checkpoints",
        "optimizer_state",
        "recompute_granularity",
        "mlp_chunk_tokens",
        "join_micro_batches",
        "return_freed_memory",
    )
    assert set(EVALUATED) == {"validation_file", "max_eval_windows", "max_length"}


def test_declaring_settings_imports_no_heavy_library():
    program = "import sys, mebp_triton.training.settings; print({'torch', 'transformers'} & sys.modules.keys())"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "set()"


# --- flags ----------------------------------------------------------------------------------------------------------


def parse(*flags):
    return settings_of(build_parser().parse_args(["train", "store", *flags]))


NEEDED = ("--train-file=t.txt", "--output-dir=run", "--device=cpu")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max-steps: 7\nlora-r: 4\nuse-rslora: true\nselected_ratio: 0.25\nvalidation-file: v.txt\n")
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(file):
    config = parse(*NEEDED, f"--config={file}", "--max-steps=9", "--no-use-rslora", "--selection-mode", "exact")
    assert (config.max_steps, config.lora_r, config.use_rslora) == (9, 4, False)
    assert (config.selected_ratio, config.selection_mode, config.validation_file) == (0.25, "exact", "v.txt")
    assert config.learning_rate == TrainConfig().learning_rate and config.weights is None


def test_a_flag_that_repeats_the_default_wins_as_well(file):
    assert parse(*NEEDED, f"--config={file}", "--max-steps=0").max_steps == 0


def test_every_setting_has_a_flag_that_sets_it():
    """Each with a value that is not the default, alone, since some contradict each other."""
    parser, kinds = build_parser(), get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        kind = next(part for part in (*get_args(kinds[item.name]), kinds[item.name]) if part is not type(None))
        if get_origin(kinds[item.name]) is Literal:
            kind = kinds[item.name]
        flag = f"--{item.name.replace('_', '-')}"
        if kind is bool:
            value, given = not item.default, flag if not item.default else flag.replace("--", "--no-")
        else:
            choices = get_args(kind) or (7 if kind is int else 0.25 if kind is float else "some",)
            value = next(choice for choice in choices if choice != item.default)
            given = f"{flag}={value}"
        found = vars(parser.parse_args(["train", "store", given]))
        assert {name: found[name] for name in FIELDS & found.keys()} == {item.name: value}, given
        assert type(found[item.name]) is type(value)
