"""Names of temporaries: what a crash left is removed, and what a living process uses is not."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from mebp_triton.system.atomic import atomic_path
from mebp_triton.system.temporaries import TEMPORARY_PREFIX, remove_leftovers, temporary_prefix


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path):
    """A save is killed in the middle; the next start removes its temporaries, and only those."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mebp_triton.system.atomic import atomic_path, replace_directory\n"
        "def write(directory):\n"
        "    (directory / 'half').write_bytes(b'x')\n"
        "    with atomic_path(Path(sys.argv[1]) / 'name') as temporary:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "replace_directory(Path(sys.argv[1]) / 'checkpoint', write)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 2 and all(entry.name.startswith(TEMPORARY_PREFIX) for entry in left)
    (tmp_path / "kept").write_text("mine")
    other_machine = tmp_path / f"{TEMPORARY_PREFIX}{'0' * 16}-1-abc"
    other_machine.write_text("of another machine")
    with atomic_path(tmp_path / "name") as living:  # a write removes what lies beside its target
        assert set(tmp_path.iterdir()) == {living, tmp_path / "kept", other_machine}
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == {living, tmp_path / "kept", other_machine}


def test_leftovers_are_told_from_what_is_in_use(tmp_path):
    """By machine, boot, process, and whether the process of that number is the one that wrote."""
    origin, mine = temporary_prefix().removeprefix(TEMPORARY_PREFIX).removesuffix("-").split("-")
    machine, boot = origin[:8], origin[8:]
    start = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    assert len(origin) == 16 and mine == f"{os.getpid()}.{start}" and int(start) > 0
    started, long_ago = psutil.boot_time(), 1e8
    cases = {  # origin, process and its start, when written: whether it is left
        (machine + boot, mine, None): False,
        (machine + boot, mine, long_ago): False,  # the clock was set
        (machine + boot, f"{os.getpid()}.7", None): True,  # a number that was used again
        (machine + boot, f"{1 << 30}.7", None): True,
        (machine + boot, f"{os.getpid()}.", None): True,
        (machine + boot, 1 << 30, None): True,
        (machine + "0" * 8, 1 << 30, started - 5): True,  # an earlier boot, after a loss of power
        (machine + "0" * 8, 1 << 30, None): False,  # another container
        ("0" * 8 + boot, 1 << 30, long_ago): False,
        ("0" * 16, os.getpid(), long_ago): False,
        ("", os.getpid(), long_ago): False,
    }
    for kind in (Path.touch, Path.mkdir):
        for (origin, process, written), is_left in cases.items():
            path = tmp_path / f"{TEMPORARY_PREFIX}{origin}-{process}-abc"
            kind(path)
            if written is not None:
                os.utime(path, (written, written))
            remove_leftovers(tmp_path)
            assert path.exists() != is_left, (origin, process, written)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_where_starts_are_not_told_a_process_of_that_number_is_taken_for_the_one(tmp_path):
    """A system that hides the starts of processes, and is otherwise this one."""
    root = tmp_path / "root"
    (root / "proc/self/ns").mkdir(parents=True)
    (root / "proc/self/ns/pid").symlink_to(os.readlink("/proc/self/ns/pid"))
    (root / "proc/sys/kernel/random").mkdir(parents=True)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    (root / "proc/sys/kernel/random/boot_id").write_text(boot_id)
    ended = tmp_path / temporary_prefix().replace(f"-{os.getpid()}.", f"-{1 << 30}.")
    ended.touch()
    with atomic_path(tmp_path / "name") as living:
        assert temporary_prefix(root) == living.name[: living.name.index(".", len(TEMPORARY_PREFIX))] + ".-"
        remove_leftovers(tmp_path, root)
        assert living.exists() and not ended.exists()
        (root / f"proc/{os.getpid()}").mkdir()
        (root / f"proc/{os.getpid()}/stat").write_text(f"{os.getpid()} (x) " + " ".join(map(str, range(30))))
        remove_leftovers(tmp_path, root)
        assert not living.exists(), "its start is another one's"
        living.touch()
