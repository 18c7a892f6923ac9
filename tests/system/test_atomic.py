"""Writes that fail, and processes that die, at every operation: the old state or the new one is left."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from faults import failing, full, half_written

from mebp_triton.system.atomic import (
    append_line,
    atomic_directory,
    atomic_path,
    check_absent,
    check_place,
    existing_parent,
    finish_replacing,
    locate_directory,
    locked,
    replace_directory,
    write_bytes,
)
from mebp_triton.system.errors import FileError
from mebp_triton.system.temporaries import TEMPORARY_PREFIX


def tree(root):
    """Every path below ``root`` and what it holds."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


def no_temporaries(root):
    assert not [path for path in root.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]


# --- the three ways to write: each with its old state, what it does, and its new state -------------------------------


def file_before(root):
    (root / "value.json").write_text("old")


def file_write(root):
    write_bytes(root / "value.json", b"new value")


def directory_before(root):
    pass


def directory_write(root):
    with atomic_directory(root / "store") as temporary:
        write_bytes(temporary / "a", b"first")
        (temporary / "b").write_bytes(b"second")


def replaced_before(root):
    (root / "checkpoint").mkdir()
    (root / "checkpoint" / "state").write_text("old")


def replaced_write(root):
    def write(directory):
        write_bytes(directory / "state", b"new")
        write_bytes(directory / "more", b"2")

    replace_directory(root / "checkpoint", write)


WAYS = {
    "file": (file_before, file_write),
    "directory": (directory_before, directory_write),
    "replaced": (replaced_before, replaced_write),
}


@pytest.fixture(params=WAYS)
def way(request, tmp_path):
    before, write = WAYS[request.param]
    finished = tmp_path / "finished"
    finished.mkdir()
    before(finished)
    old = tree(finished)
    write(finished)
    root = tmp_path / "tried"
    root.mkdir()
    before(root)
    return root, old, tree(finished), write


def attempts(way, fault):
    """Runs the write with the n-th operation failing, for every n; yields the directory after each failure."""
    root, _, _, write = way
    for n in range(1, 100):
        place = root.with_name(f"try-{n}")
        shutil.copytree(root, place)
        with failing(n, fault) as count, contextlib.suppress(OSError):
            write(place)
        if count.operations < n:
            assert n > 5, "the operations are not the module's any more"
            return
        yield n, place
    raise AssertionError("never finished")


@pytest.mark.parametrize("fault", [full, half_written])
def test_failing_at_any_operation_leaves_old_or_new(way, fault):
    _, old, new, _ = way
    seen = []
    for n, place in attempts(way, fault):
        no_temporaries(place)
        # Only a directory whose last sync failed has its predecessor kept beside it.
        left = {name: value for name, value in tree(place).items() if ".mebp-old-" not in name}
        assert left in (old, new), f"operation {n}"
        seen.append(left == new)
        finish_replacing(place / "checkpoint")
        assert tree(place) == left
    assert seen == sorted(seen), "old again after new"
    assert not seen[0]


def test_a_failed_write_can_be_tried_again(way):
    _, _, new, write = way
    for _, place in attempts(way, full):
        shutil.rmtree(place / "store", ignore_errors=True)  # a new directory may have appeared: that one refuses
        write(place)
        assert tree(place) == new


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_dying_at_any_operation_leaves_old_or_new(way):
    root, old, new, write = way
    reached_the_end = False
    for n in range(1, 100):
        place = root.with_name(f"died-{n}")
        shutil.copytree(root, place)
        child = os.fork()
        if child == 0:
            with failing(n, lambda *arguments, **options: os._exit(7)):
                try:
                    write(place)
                finally:
                    os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            reached_the_end = True
            break
        finish_replacing(place / "checkpoint")
        left = {
            name: value for name, value in tree(place).items() if not name.split("/")[0].startswith(TEMPORARY_PREFIX)
        }
        assert left in (old, new), f"operation {n}"
        if left == old:  # temporaries of the dead process are in nobody's way
            write(place)
            assert new.items() <= tree(place).items()
    assert reached_the_end and n > 5


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert tree(tmp_path) == {"file": b"old"}
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "store") as temporary:
        (temporary / "file").write_text("half")
        1 / 0  # noqa: B018
    assert tree(tmp_path) == {"file": b"old"}

    def write(directory):
        (directory / "file").write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(KeyboardInterrupt):
        replace_directory(tmp_path / "checkpoint", write)
    assert tree(tmp_path) == {"file": b"old", "checkpoint": None}


def test_data_is_synced_before_the_rename_and_the_directory_after_it(tmp_path, monkeypatch):
    log = []
    real_replace, real_fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(f"rename {Path(b).name}"), real_replace(a, b)))

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        log.append("sync directory" if path.is_dir() else f"sync {path.stat().st_size}")
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(tmp_path / "a", b"12345")
    assert log == ["sync 5", "rename a", "sync directory"]
    log.clear()
    with atomic_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_bytes(b"123")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "y").write_bytes(b"1")
    rename = log.index("rename d")
    assert {"sync 3", "sync 1", "sync directory"} <= set(log[:rename])
    assert log[:rename].count("sync directory") == 2, "a sub-directory's entries are not synced"
    assert log[rename + 1 :] == ["sync directory"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    previous = os.umask(mask)
    try:
        write_bytes(tmp_path / "file", b"x")
        with atomic_directory(tmp_path / "store"):
            pass
        replace_directory(tmp_path / "checkpoint", lambda directory: None)
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"file": 0o666 & ~mask, "store": 0o777 & ~mask, "checkpoint": 0o777 & ~mask}


# --- directories ----------------------------------------------------------------------------------------------------


def test_recover_directory(tmp_path):
    path, old = tmp_path / "checkpoint", tmp_path / ".mebp-old-checkpoint"
    finish_replacing(path)
    assert not path.exists()
    old.mkdir()
    (old / "state").write_text("old")
    finish_replacing(path)  # died between the two renames
    assert tree(tmp_path) == {"checkpoint": None, "checkpoint/state": b"old"}
    old.mkdir()
    finish_replacing(path)  # died after the second
    assert tree(tmp_path) == {"checkpoint": None, "checkpoint/state": b"old"}
    mine = tmp_path / "checkpoint.old"
    mine.mkdir()
    finish_replacing(path)
    replace_directory(path, lambda directory: (directory / "state").write_text("new"))
    assert tree(tmp_path) == {"checkpoint": None, "checkpoint/state": b"new", "checkpoint.old": None}


def test_check_absent(tmp_path):
    check_absent(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    check_absent(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for used in (tmp_path / "full", tmp_path / "full" / "x"):
        with pytest.raises(FileError, match="exists already"):
            check_absent(used)
        with pytest.raises(FileError, match="exists already"), atomic_directory(used):
            pass
    assert tree(tmp_path) == {"empty": None, "full": None, "full/x": b""}


def test_check_place(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = tree(tmp_path)
    check_place(tmp_path)
    check_place(tmp_path / "new" / "newer")
    for place, problem in (
        (tmp_path / "file", "file is no directory"),
        (tmp_path / "file" / "a" / "b", "file is no directory, so that .*/a/b cannot be made in it"),
        (tmp_path / "link", "link is a broken link"),
        (tmp_path / "link" / "a", "link is a broken link, so that"),
    ):
        with pytest.raises(FileError, match=problem):
            check_place(place)
    for place in (tmp_path / "file" / "a", tmp_path / "link"):
        with pytest.raises(FileError, match="choose another place"), atomic_directory(place):
            pass
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(FileError, match="may not be written into"):
        check_absent(tmp_path / "new" / "newer")
    assert tree(tmp_path) == before


def test_an_atomic_directory_takes_an_empty_ones_place(tmp_path):
    (tmp_path / "store").mkdir()
    with atomic_directory(tmp_path / "store") as temporary:
        (temporary / "x").touch()
    with atomic_directory(tmp_path / "deep" / "er"):
        pass
    assert tree(tmp_path) == {"store": None, "store/x": b"", "deep": None, "deep/er": None}


def test_directories_that_were_made_for_nothing_go_again(tmp_path):
    (tmp_path / "there").mkdir()
    for place in ("there/store", "x/y/store", "there/z/store"):
        with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / place):
            1 / 0  # noqa: B018
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with atomic_directory(tmp_path / "x" / "y" / "store"):
        pass
    assert (tmp_path / "x" / "y" / "store").is_dir()


def test_where_the_content_lies_after_a_crash(tmp_path):
    place, old = tmp_path / "checkpoint", tmp_path / ".mebp-old-checkpoint"
    assert locate_directory(place) == place
    old.mkdir()
    assert locate_directory(place) == old and old.exists()
    place.mkdir()
    assert locate_directory(place) == place


def test_existing_parent(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (".", "gone/further", "file/inside"):
        assert existing_parent(tmp_path / path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert existing_parent(Path("gone")) == tmp_path


def test_append_line(tmp_path):
    for step in range(2):
        append_line(tmp_path / "log", json.dumps({"step": step}))
    assert (tmp_path / "log").read_text() == '{"step": 0}\n{"step": 1}\n'


# --- several processes ----------------------------------------------------------------------------------------------


def test_a_lock_is_one_processes_and_ends_with_it(tmp_path):
    hold = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mebp_triton.system.atomic import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(FileError, match="is in use by another process: wait for its end"), locked(tmp_path):
            pass
        child.kill()
    with locked(tmp_path), pytest.raises(FileError, match="in use"), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_locks_is_named(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(FileError, match="cannot be locked .No locks available.: choose"), locked(tmp_path):
        pass


def test_a_directory_that_was_replaced_is_not_locked(tmp_path, monkeypatch):
    """Another process gave it back between our opening and our locking it."""
    place = tmp_path / "run"
    for again in (False, True):
        place.mkdir()

        def flock(handle, how, again=again):
            place.rmdir()
            if again:
                (tmp_path / "other").mkdir()
                (tmp_path / "other").rename(place)

        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(FileError, match="in use"), locked(place):
            pass


def test_of_two_that_make_one_directory_the_first_wins(tmp_path):
    with pytest.raises(FileError, match="store was made by another process meanwhile"):  # noqa: SIM117
        with atomic_directory(tmp_path / "store") as slower:
            (slower / "file").write_text("slower")
            with atomic_directory(tmp_path / "store") as quicker:
                (quicker / "file").write_text("quicker")
    assert tree(tmp_path) == {"store": None, "store/file": b"quicker"}
    with pytest.raises(FileError, match="made by another"), atomic_directory(tmp_path / "other"):
        (tmp_path / "other").write_text("a file")
    assert (tmp_path / "other").read_text() == "a file"


# --- messages -------------------------------------------------------------------------------------------------------


def test_a_failed_write_names_the_file_and_not_its_temporary(tmp_path, monkeypatch):
    class OfRust(Exception):
        pass

    def full_in_rust(directory):
        raise OfRust("I/O error: No space left on device (os error 28)")

    writes = {
        "value": lambda path: write_bytes(path, b"1"),
        "checkpoint": lambda path: replace_directory(path, full_in_rust),
        "metrics.jsonl": lambda path: append_line(path, "{}"),
    }
    monkeypatch.setattr(os, "fsync", full)
    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: full() if str(a[0]).endswith(".jsonl") else real(*a, **k))
    for name, write in writes.items():
        with pytest.raises(OSError, match="No space left on device") as caught:
            write(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name) and caught.value.errno == 28
    assert list(tmp_path.iterdir()) == []
