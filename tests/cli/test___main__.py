"""``python -m mebp_triton.cli`` is the command."""

import subprocess
import sys

from mebp_triton import __version__


def test_it_answers_and_ends_with_the_commands_exit_code(tmp_path):
    for arguments, code, out in ((["--version"], 0, f"mebp {__version__}\n"), (["frobnicate"], 2, "")):
        command = [sys.executable, "-m", "mebp_triton.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert (done.returncode, done.stdout) == (code, out), done.stderr
