"""A file that shrinks between the check and the read: one line, exit code 1, whichever thread reads it."""

import os
import signal
import subprocess
import sys

import pytest

READERS = {
    "torch": "mapped.bytes.view(torch.int64).sum()",
    "torch, in several threads": "torch.set_num_threads(4); mapped.bytes.view(torch.float32).exp().sum()",
    "numpy, with the lock held": "mapped.bytes.numpy()[-1]",
    "a thread": "import threading; t = threading.Thread(target=lambda: mapped.bytes.sum()); t.start(); t.join()",
}
PROGRAM = """
import os, sys, torch
from pathlib import Path
from mebp_triton.files import MappedFile
from mebp_triton.lost_pages import ending_with_a_line
path = Path(sys.argv[1])
mapped = MappedFile(path, path.stat().st_size)
with ending_with_a_line():
    os.truncate(path, 4096)
    {read}
print("went on")
"""


@pytest.mark.parametrize("name", READERS)
def test_a_file_cut_short_while_it_is_read(name, tmp_path):
    path = tmp_path / "block.safetensors"
    path.write_bytes(bytes(16 << 20))
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    command = [sys.executable, "-c", PROGRAM.format(read=READERS[name]), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr == (f"mebp: error: {path} was cut short while it was in use: what was saved before is whole\n")


def test_other_lost_pages_are_named_for_what_they_are(tmp_path):
    program = PROGRAM.format(read="os.kill(os.getpid(), 7)").replace("os.truncate(path, 4096)", "pass")
    (tmp_path / "x").write_bytes(bytes(8192))
    command = [sys.executable, "-c", program, str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "a page of a mapped file cannot be read: the disk failed" in done.stderr


def test_afterwards_all_is_as_before(tmp_path):
    program = PROGRAM.format(read="pass") + "\nos.kill(os.getpid(), 7)\n"
    (tmp_path / "x").write_bytes(bytes(8192))
    command = [sys.executable, "-c", program, str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGBUS and done.stdout == "went on\n"
