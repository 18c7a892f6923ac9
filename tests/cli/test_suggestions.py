"""What is suggested for a flag that does not exist: one of the same command, and the right one."""

import pytest

from mebp_triton.cli.parser import COMMANDS, build_parser
from mebp_triton.cli.suggestions import ELSEWHERE, near_command, suggestion

FLAGS = [
    "--json",
    "--max-steps",
    "--max-length",
    "--memory-budget",
    "--lora-r",
    "--lora-alpha",
    "--packing",
    "--no-packing",
    "-h",
]


@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("--memory-budgte=1GiB", "; did you mean --memory-budget?"),
        ("--MAX_STEPS", "; did you mean --max-steps?"),
        ("--budget", "; did you mean --memory-budget?"),  # a word of one flag alone
        ("--max", ""),  # a word of several
        ("--rank", "; did you mean --lora-r?"),  # PEFT's name
        ("--lr", ""),  # the name of a flag that this command lacks, and of nothing near
        ("--store", "; STORE is given without a flag"),
        ("--model", "; STORE is given without a flag"),  # what others call it
        ("--model_name_or_path=x", "; STORE is given without a flag"),
        ("--output-dir", "; OUT is given without a flag"),
        ("--stor", ""),
        ("--no-packng", "; did you mean --no-packing?"),
        ("-n", ""),
        ("more", ""),
    ],
)
def test_a_flag(word, end):
    assert suggestion(word, FLAGS, ["STORE", "OUT"]) == end


def test_a_command():
    assert near_command("generat", COMMANDS) == "; did you mean generate?" and near_command("x", COMMANDS) == ""


@pytest.fixture(scope="module")
def parsers():
    (parsers,) = [action.choices for action in build_parser()._actions if isinstance(action.choices, dict)]
    for parser in parsers.values():
        with pytest.raises(SystemExit):  # a command's flags are there once it has parsed
            parser.parse_args(["--help"])
    return parsers


def test_names_of_other_programs_lead_to_flags_that_exist(parsers):
    flags = {name: set(parser._option_string_actions) for name, parser in parsers.items()}
    assert {f"--{own}" for own in ELSEWHERE} <= set().union(*flags.values())
    for command, own in flags.items():
        for word in (f"--{other}" for others in ELSEWHERE.values() for other in others):
            end = suggestion(word, own)
            assert not end or end.removeprefix("; did you mean ").removesuffix("?") in own, (command, word)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_with_a_wrong_letter_is_found_again(parsers, command, mebp):
    """Also where something is missing, which the mistyped flag may have been meant to give."""
    for flag in [flag for flag in parsers[command]._option_string_actions if flag.startswith("--")]:
        wrong = f"{flag[:-1]}{'x' if flag[-1] != 'x' else 'y'}" if len(flag) > 6 else f"{flag}x"
        code, out, err = mebp(command, f"{wrong}=1")
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert f"unrecognized arguments: {wrong}=1; did you mean --" in err, err
        assert err.split("did you mean ")[1].split("?")[0] in parsers[command]._option_string_actions
