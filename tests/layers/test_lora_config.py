"""Which layers get an adapter, with which rank and scaling; what of PEFT is understood and what is refused."""

import dataclasses
import math
import warnings
from types import SimpleNamespace

import peft
import pytest

from mebp_triton.layers import lora_config
from mebp_triton.layers.lora_config import (
    UNSUPPORTED,
    LoraConfig,
    as_lora_config,
    lora_config_from_dict,
    lora_config_from_file,
)


def test_defaults_scale_by_alpha_over_rank():
    assert LoraConfig(r=8, lora_alpha=24).scaling("any") == 3
    assert LoraConfig(r=16, lora_alpha=24, use_rslora=True).scaling("any") == 6


def test_defaults():
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (16, 32, 0.0, "all-linear")
    rest = (config.exclude_modules, config.use_rslora, config.rank_pattern, config.alpha_pattern)
    assert rest == (None, False, {}, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 8


def test_patterns_match_as_in_peft():
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"q_proj": 4, r"layers\.[01]\.mlp\..*": 2, "^model.layers.0.o_proj": 1},
        alpha_pattern={"layers.1.q_proj": 2},
    )
    paths = {
        "model.layers.0.q_proj": (4, 4),
        "model.layers.1.q_proj": (4, 0.5),
        "model.layers.1.xq_proj": (8, 2),
        "model.layers.1.q_proj.inner": (8, 2),
        "model.layers.1.mlp.up": (2, 8),
        "model.layers.2.mlp.up": (8, 2),
        "model.layers.0.o_proj": (1, 16),
        "base.model.layers.0.o_proj": (8, 2),
    }
    from peft.utils.other import get_pattern_key

    for path, (rank, scaling) in paths.items():
        assert (config.rank(path), config.scaling(path)) == (rank, scaling), path
        theirs = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), 8)
        assert rank == theirs, path


def test_the_first_pattern_that_matches_counts():
    config = LoraConfig(r=8, rank_pattern={"q_proj": 4, "layers.0.q_proj": 2})
    assert config.rank("layers.0.q_proj") == 4


@pytest.mark.parametrize(
    ("target", "exclude", "chosen"),
    [
        ("all-linear", None, {"h.0.q", "h.0.xq", "h.0.mlp.up", "h.1.q", "q"}),
        (("q",), None, {"h.0.q", "h.1.q", "q"}),
        (["0.q", "mlp.up"], None, {"h.0.q", "h.0.mlp.up"}),
        (r".*\.q", None, {"h.0.q", "h.1.q"}),
        (r"h\.0\..*", "h.0.q", {"h.0.xq", "h.0.mlp.up"}),
        ("all-linear", ("q",), {"h.0.xq", "h.0.mlp.up"}),
        ("q", None, {"q"}),
    ],
)
def test_targets(target, exclude, chosen):
    config = LoraConfig(target_modules=target, exclude_modules=exclude)
    paths = ["h.0.q", "h.0.xq", "h.0.mlp.up", "h.1.q", "q"]
    assert {path for path in paths if config.targets(path)} == chosen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "at least 1, got 0"),
        ({"r": -2}, "at least 1"),
        ({"r": 2.0}, "whole number"),
        ({"r": True}, "whole number"),
        ({"r": 1 << 31}, "whole number"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern .q. must be a whole number of at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"lora_alpha": math.nan}, "finite"),
        ({"alpha_pattern": {"q": math.inf}}, "alpha_pattern .q. must be finite, got inf"),
        ({"target_modules": []}, "empty"),
        ({"target_modules": ""}, "empty"),
    ],
)
def test_errors(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


@pytest.mark.parametrize(
    "values",
    [{"target_modules": "("}, {"rank_pattern": {"(": 3}}, {"target_modules": r"\pL"}],  # PEFT's re has no \p
)
def test_an_expression_that_is_not_regular(values):
    config = LoraConfig(**values)
    with pytest.raises(ValueError, match="not a regular expression"):
        config.targets("q")
        config.rank("q")


def test_from_peft():
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["v", "q"],
        exclude_modules=["x"],
        lora_dropout=0.25,
        use_rslora=True,
        rank_pattern={"q": 2},
        alpha_pattern={"q": 3},
    )
    ours = as_lora_config(theirs)
    assert (ours.r, ours.lora_alpha, ours.lora_dropout, ours.use_rslora) == (4, 12, 0.25, True)
    assert (ours.target_modules, ours.exclude_modules) == (("q", "v"), ("x",))
    assert (ours.rank_pattern, ours.alpha_pattern) == ({"q": 2}, {"q": 3})
    assert as_lora_config(ours) is ours
    assert as_lora_config(peft.LoraConfig(target_modules=r".*\.q")).target_modules == r".*\.q"


def test_pefts_settings_that_depend_on_the_model_or_change_its_weights_are_refused():
    with pytest.raises(ValueError, match="without target_modules depends on the architecture"):
        as_lora_config(peft.LoraConfig(r=4))
    for start in (False, "gaussian"):
        with pytest.raises(ValueError, match=f"init_lora_weights={start!r} is not supported: leave it at True"):
            as_lora_config(peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=start))


@pytest.mark.parametrize("config", [{"r": 4}, 3, peft.IA3Config()])
def test_configs_of_anything_but_lora_are_refused(config):
    with pytest.raises(ValueError, match="lora must be|only LORA"):
        as_lora_config(config)


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"use_dora": 0},
        {"use_qalora": True},
        {"use_bdlora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"velora_config": {}},
    ],
    ids=str,
)
def test_settings_that_only_pefts_layers_support_are_refused(values):
    with pytest.raises(ValueError, match=f"uses {next(iter(values))}="):
        lora_config_from_dict({"peft_type": "LORA", "r": 4} | values)


def test_pefts_defaults_are_accepted():
    values = vars(peft.LoraConfig(r=3, target_modules=["q"]))
    assert lora_config_from_dict(values).r == 3
    for name, unused in UNSUPPORTED.items():
        for value in unused:
            lora_config_from_dict({"peft_type": "LORA", name: value})


def test_a_file_must_have_what_defines_an_adapter():
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v", "q"]}
    assert lora_config_from_file(whole) == LoraConfig(r=4, lora_alpha=8, target_modules=("q", "v"))
    for key in ("r", "lora_alpha", "target_modules"):
        with pytest.raises(ValueError, match=f"it has no {key}"):
            lora_config_from_file(whole | {key: None})


def test_an_unknown_setting_of_a_file_is_refused_if_it_is_used():
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "q"}
    for unused in (None, False, [], {}):
        lora_config_from_file(whole | {"some_new_method": unused})
    with pytest.raises(ValueError, match="uses 'some_new_method', which is not known here"):
        lora_config_from_file(whole | {"some_new_method": True})
    lora_config_from_file(whole | {"inference_mode": True, "task_type": "CAUSAL_LM"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_pattern": [4]}, "rank_pattern must map regular expressions to numbers"),
        ({"alpha_pattern": {3: 4}}, "alpha_pattern must map"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"target_modules": [3]}, "target_modules must be names"),
        ({"exclude_modules": ("q", None)}, "exclude_modules must be names"),
    ],
)
def test_values_of_the_wrong_type(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(a|aa)+$", "takes too long to match .*: write it without nested repeats"),
        ("(a{1000}){1000}", "too long"),
        ("a" * (1 << 14) + "b", "too long"),
        ("a{e<=1}", "not supported"),
        ("[[:alpha:]]", "not supported"),
    ],
)
def test_an_expression_cannot_take_forever_or_all_memory(expression, message, monkeypatch):
    monkeypatch.setattr(lora_config, "MATCH_SECONDS", 0.05)
    with pytest.raises(ValueError, match=message):
        LoraConfig(target_modules=expression).targets("a" * 64 + "b")
    assert LoraConfig(target_modules="a{1000}").targets("a" * 1000)


def test_an_expression_that_looks_odd_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoraConfig(target_modules="[[a]b").targets("[b")


def test_an_older_pefts_config_lacks_settings():
    old = SimpleNamespace(peft_type="LORA", r=4, lora_alpha=8, target_modules=["q"])
    assert as_lora_config(old) == LoraConfig(r=4, lora_alpha=8, target_modules=("q",))


def test_the_layers_of_all_linear_can_be_listed():
    layers = frozenset({"model.layers.0.fc1"})
    assert not LoraConfig(layers=layers).targets("model.vision.fc1")
    assert LoraConfig(layers=layers).targets("model.layers.0.fc1")
    assert LoraConfig().targets("model.vision.fc1")
    assert LoraConfig(target_modules=["fc1"], layers=layers).targets("model.vision.fc1")
    with pytest.raises(ValueError, match="uses 'layers', which is not known"):
        lora_config_from_file({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["a"], "layers": ["b"]})


def test_parameters_with_experts_are_targets_as_modules_are():
    """By the end of their path, or the whole of it; PEFT's config may name no module then."""
    peft_like = {
        "peft_type": "LORA",
        "r": 4,
        "target_modules": None,
        "target_parameters": ["experts.up", "h.1.experts.down"],
    }
    config = lora_config_from_dict(peft_like)
    assert config.target_parameters == ("experts.up", "h.1.experts.down") and not config.targets("h.0.q")
    targeted = {
        path
        for path in ("h.0.experts.up", "h.0.experts.down", "h.1.experts.down", "h.0.xexperts.up")
        if config.targets_parameter(path)
    }
    assert targeted == {"h.0.experts.up", "h.1.experts.down"}
    everything = LoraConfig(target_modules="all-linear-and-experts", exclude_modules=["down"])
    assert everything.targets("h.0.q") and everything.targets_parameter("h.0.experts.up")
    assert not everything.targets_parameter("h.0.experts.down") and not LoraConfig().targets_parameter("h.0.experts.up")
    for wrong in ("experts.up", [3]):
        with pytest.raises(ValueError, match="target_parameters must be names"):
            LoraConfig(target_parameters=wrong)
