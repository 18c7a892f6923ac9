"""The parser: help, version and mistakes, answered at once; and each command's flags, taken from its own module."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mebp_triton import __version__
from mebp_triton.cli import commands
from mebp_triton.cli.parser import COMMANDS, build_parser

HEAVY = ("torch", "transformers", "numpy", "rich")
# Arguments, the exit code, and a part of what is printed.
AT_ONCE = [
    ([], 2, "mebp: error: give a command, mebp --help lists the commands"),
    (["--help"], 0, "usage: mebp"),
    (["--version"], 0, f"mebp {__version__}"),
    (["trian", "store"], 2, "mebp: error: there is no command 'trian'; did you mean train?"),
    *[([name, "--help"], 0, f"usage: mebp {name}") for name in COMMANDS],
    (
        ["train", "store", "--learning-rat=1"],
        2,
        "unrecognized arguments: --learning-rat=1; did you mean --learning-rate?",
    ),
    (["verify", "store", "--accept-change"], 2, "did you mean --accept-changes?"),
]


def test_no_answer_of_the_parser_imports_a_library():
    """All in one new process: what one of them imported, a later one would not be seen to import."""
    code = (
        "import contextlib, io, json, sys\n"
        "from mebp_triton.cli.main import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):\n"
        "        try: main(arguments)\n"
        "        except SystemExit as end: code = end.code\n"
        f"    print(json.dumps([code, text.getvalue(), [name for name in {HEAVY} if name in sys.modules]]))\n"
    )
    given = json.dumps([arguments for arguments, _, _ in AT_ONCE])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True)
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ended) == len(AT_ONCE)
    for (arguments, code, part), (found, text, imported) in zip(AT_ONCE, ended, strict=True):
        assert not imported, f"{arguments} imports {imported}"
        assert found == code and part in text, (arguments, found, text)


def test_help_lists_the_commands(mebp):
    code, out, err = mebp("--help")
    assert code == 0 and not err
    lines = [line.split(maxsplit=1)[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "]
    assert lines == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(mebp, command):
    code, out, err = mebp(command, "--help")
    assert code == 0 and not err
    assert out.startswith(f"usage: mebp {command} ") and "--json" in out and "--debug" in out
    assert " ".join(out.split()).count(COMMANDS[command]) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_has_a_help(command):
    parser = build_parser()
    (subparsers,) = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    with pytest.raises(SystemExit):
        subparsers[command].parse_args(["--help"])
    for action in subparsers[command]._actions:
        assert action.help, f"{command}: {action.dest}"


def test_every_command_has_its_module():
    places = {path.stem for path in Path(commands.__file__).parent.glob("*.py")}
    assert places - {"__init__"} == set(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["TRAIN", "store"], "there is no command 'TRAIN'; did you mean train?"),
        (["--versoin"], "unrecognized arguments: --versoin; did you mean --version?"),
        (["-x"], "unrecognized arguments: -x: mebp --help lists the commands"),
        (
            ["--json", "train"],
            "unrecognized arguments: --json: flags are written behind the command, as in mebp train ... --json",
        ),
        (["tune", "--tokens", "0"], "unrecognized arguments: --tokens 0; did you mean --m?"),
        (["train", "store", "-lr", "3"], "unrecognized arguments: -lr 3; did you mean --learning-rate?"),
        (["--debug", "frobnicate"], "there is no command 'frobnicate': mebp --help lists the commands"),
        (["verify", "s", "--lora-r=3"], "unrecognized arguments: --lora-r=3"),  # a flag of another command
        (["verify", "s", "more", "--jso"], "unrecognized arguments: more --jso; did you mean --json?"),
        (["train", "s", "--learning=1"], "unrecognized arguments: --learning=1"),  # flags are not abbreviated
        (["--verson", "verify", "s"], "unrecognized arguments: --verson; did you mean --version?"),
        (["verify"], "the following arguments are required: STORE"),
        (["generate", "s", "--promt", "hi"], "unrecognized arguments: --promt; did you mean --prompt?"),
        (["generate", "s", "--n-best=2"], "unrecognized arguments: --n-best=2; the following arguments are required"),
        (["generate", "--store", "s", "--prompt=a"], "unrecognized arguments: --store; STORE is given without a flag"),
        (
            ["generate", "s", "--prompt", "-hello"],
            "argument --prompt: expected one argument; a value that begins with - is written --prompt=-hello",
        ),
        (["generate", "s", "--prompt", "--chat"], "argument --prompt: expected one argument\n"),
        (
            ["--json", "verify", "s"],
            "unrecognized arguments: --json: flags are written behind the command, as in mebp verify ... --json",
        ),
    ],
)
def test_what_cannot_be_parsed_is_one_line(mebp, arguments, line):
    code, out, err = mebp(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"mebp: error: {line}") and err.count("\n") == 1
    if "did you mean" not in line:
        assert "did you mean --lora" not in err


def test_a_parser_may_be_used_again():
    parser = build_parser()
    first, second = (parser.parse_args(["verify", "store", *more]) for more in ([], ["--json"]))
    assert (first.json, second.json, second.command, second.store) == (False, True, "verify", "store")
    from mebp_triton.cli.commands import verify

    assert first.run is second.run is verify.run
