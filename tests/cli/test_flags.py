"""Flags that commands share: settings become flags, and what a flag cannot take is said."""

import argparse
import importlib.util
from dataclasses import dataclass, field
from typing import Literal

import pytest

from mebp_triton.cli import flags


@dataclass
class Settings:
    steps: int = field(default=3, metadata={"help": "how many"})
    learning_rate: float = field(default=0.5, metadata={"help": "how fast"})
    mode: Literal["soft", "hard"] = field(default="soft", metadata={"help": "how"})
    place: Literal["here", "there"] | None = field(default=None, metadata={"help": "where"})
    packing: bool = field(default=False, metadata={"help": "whether to pack"})
    masking: bool | None = field(default=None, metadata={"help": "whether to mask"})
    output_dir: str = field(default="", metadata={"help": "what for"})


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="x", exit_on_error=False)
    flags.add_settings(parser, Settings)
    return parser


def test_every_setting_is_a_flag_and_one_not_given_is_left_out(parser):
    assert vars(parser.parse_args([])) == {}
    given = ["--steps=7", "--learning-rate=1e-3", "--mode=hard", "--place=there", "--packing", "--no-masking"]
    assert vars(parser.parse_args([*given, "--output-dir=run"])) == {
        "steps": 7,
        "learning_rate": 1e-3,
        "mode": "hard",
        "place": "there",
        "packing": True,
        "masking": False,
        "output_dir": "run",
    }


@pytest.mark.parametrize("wrong", ["--steps=many", "--learning-rate=fast", "--mode=medium", "--place=nowhere"])
def test_a_value_of_another_kind_is_refused(parser, wrong):
    with pytest.raises(argparse.ArgumentError, match=wrong.split("=")[1]):
        parser.parse_args([wrong])


def test_help_shows_defaults(parser):
    text = " ".join(parser.format_help().split())
    for part in ("--steps STEPS how many (default: 3)", "--learning-rate RATE how fast (default: 0.5)"):
        assert part in text
    assert "whether to pack (default: off)" in text and "how (default: soft)" in text
    assert "(default: None)" not in text and text.endswith("--output-dir DIR what for")


def test_at_least_one():
    assert flags.at_least_one("12") == 12
    for wrong in ("0", "-3", "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be a whole number of at least 1, got {wrong}"):
            flags.at_least_one(wrong)


def test_shared_flags_and_their_defaults():
    parser = argparse.ArgumentParser()
    flags.add_quantization(parser)
    flags.add_inference(parser)
    flags.add_validation(parser, required=False, use="the text")
    assert vars(parser.parse_args([])) == {
        "scheme": None,
        "group_size": None,
        "bits": None,
        "embedding_bits": None,
        "scale_search": True,
        "adapter": None,
        "device": None,
        "backend": "auto",
        "dtype": None,
        "validation_file": None,
        "max_length": 512,
        "completion_only_loss": None,
        "assistant_only_loss": False,
        "max_eval_windows": None,
    }


def test_where_a_plot_goes(tmp_path, monkeypatch):
    def path(given):
        return flags.plot_path(argparse.Namespace(plot=given))

    assert path(None) is None and path(str(tmp_path / "a.png")) == tmp_path / "a.png"
    for wrong in (tmp_path, tmp_path / "nowhere" / "a.png"):
        with pytest.raises(ValueError, match=f"--plot {wrong} names no file in an existing directory"):
            path(str(wrong))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--plot needs the package matplotlib: pip install 'mebp-triton\[plots\]'"):
        path(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("message", "spelled"),
    [
        ("max_length must be at least 2", "--max-length must be at least 2"),
        ("train-file a.txt: no such file", "--train-file a.txt: no such file"),
        ("a.txt: raise max_length (now 9): cut", "a.txt: raise --max-length (now 9): cut"),
        ("give eval_steps, or max_length", "give eval_steps, or --max-length"),  # no flag of this command
        ("runs/max_length: no 'max_length' or \"max_length\"", "runs/max_length: no 'max_length' or \"max_length\""),
        ("device must be cpu", "--device must be cpu"),
        ("no device is here", "no device is here"),
        ("give --max-length, a smaller max_lengths", "give --max-length, a smaller max_lengths"),
    ],
)
def test_settings_in_a_message_are_spelled_as_flags(message, spelled):
    assert flags.with_flags(message, {"max_length", "train_file", "device"}) == spelled
