"""Every file operation made to fail, and the process made to die, at every n: the old state or the new one is left."""

import contextlib
import errno
import json
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch

from mebp_triton.system import atomic, errors, reading, safetensors_file, strict_json, temporaries
from mebp_triton.system import scratch as scratch_module
from mebp_triton.system.atomic import (
    atomic_directory,
    atomic_path,
    check_absent,
    finish_replacing,
    replace_directory,
    write_bytes,
)
from mebp_triton.system.errors import FileError
from mebp_triton.system.mapped_file import MappedFile
from mebp_triton.system.reading import checksums, read_bytes
from mebp_triton.system.scratch import ScratchFile
from mebp_triton.system.strict_json import parse_json, read_json, write_json
from mebp_triton.system.temporaries import TEMPORARY_PREFIX

# What the module is allowed to call on the way to a finished file.
OPERATIONS = [
    (os, "replace"),
    (os, "fsync"),
    (os, "chmod"),
    (os, "open"),
    (tempfile, "mkstemp"),
    (tempfile, "mkdtemp"),
    (Path, "write_bytes"),
]


class Operations:
    """Counts the operations above; the n-th does ``what`` instead."""

    def __init__(self, monkeypatch, fail_at, what):
        self.count, self.fail_at, self.what = 0, fail_at, what
        for owner, name in OPERATIONS:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, original):
        def operation(*args, **kwargs):
            self.count += 1
            if self.count == self.fail_at:
                self.what(args)
            return original(*args, **kwargs)

        return operation


def full(args):
    raise OSError(28, "No space left on device")


def half_written(args):
    """A write that stops in the middle, as a full disk does it."""
    if len(args) == 2 and isinstance(args[1], bytes):
        with open(args[0], "wb") as file:
            file.write(args[1][: len(args[1]) // 2])
    raise OSError(28, "No space left on device")


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
        write_json(directory / "more.json", {"step": 2})

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


def attempts(way, monkeypatch, what):
    """Runs the write with the n-th operation failing, for every n; yields the directory after each failure."""
    root, _, _, write = way
    for n in range(1, 100):
        shutil.copytree(root, root.with_name(f"try-{n}"))
        place = root.with_name(f"try-{n}")
        with monkeypatch.context() as patch:
            operations = Operations(patch, n, what)
            with contextlib.suppress(OSError):
                write(place)
        if operations.count < n:
            assert n > 5, "the operations are not the module's any more"
            return
        yield n, place
    raise AssertionError("never finished")


@pytest.mark.parametrize("what", [full, half_written])
def test_failing_at_any_operation_leaves_old_or_new(way, monkeypatch, what):
    _, old, new, _ = way
    seen = []
    for n, place in attempts(way, monkeypatch, what):
        no_temporaries(place)
        # Only a directory whose last sync failed has its predecessor kept beside it.
        left = {name: value for name, value in tree(place).items() if ".mebp-old-" not in name}
        assert left in (old, new), f"operation {n}"
        seen.append(left == new)
        finish_replacing(place / "checkpoint")
        assert tree(place) == left
    assert seen == sorted(seen), "old again after new"
    assert not seen[0]


def test_a_failed_write_can_be_tried_again(way, monkeypatch):
    _, _, new, write = way
    for _, place in attempts(way, monkeypatch, full):
        shutil.rmtree(place / "store", ignore_errors=True)  # a new directory may have appeared: that one refuses
        write(place)
        assert tree(place) == new


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_dying_at_any_operation_leaves_old_or_new(way, monkeypatch):
    root, old, new, write = way
    reached_the_end = False
    for n in range(1, 100):
        place = root.with_name(f"died-{n}")
        shutil.copytree(root, place)
        child = os.fork()
        if child == 0:
            Operations(monkeypatch, n, lambda args: os._exit(7))
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


def test_saving_over_a_mapped_file_leaves_the_map_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a" * 5000)
    mapped = MappedFile(path, 5000)
    write_bytes(path, b"b" * 10)
    assert set(mapped.bytes.tolist()) == {ord("a")}
    mapped.check()


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


def test_an_atomic_directory_takes_an_empty_ones_place(tmp_path):
    (tmp_path / "store").mkdir()
    with atomic_directory(tmp_path / "store") as temporary:
        (temporary / "x").touch()
    with atomic_directory(tmp_path / "deep" / "er"):
        pass
    assert tree(tmp_path) == {"store": None, "store/x": b"", "deep": None, "deep/er": None}


# --- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"x": {"a": 1, "b": 2, "a": 1}}',
        "[NaN]",
        "[Infinity]",
        "[-Infinity]",
        "{",
        "",
        "'a'",
        "[1,]",
        "[" * 100_000,
        '{"a":' * 50_000,
        b"\xff\xfe\x00",
        "1" * 10_000,
    ],
)
def test_strict_json(text, tmp_path):
    with pytest.raises(FileError, match="thing is not valid JSON") as caught:
        parse_json(text, "thing")
    assert len(str(caught.value)) < 1000
    path = tmp_path / "value.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError, match="value.json"):
        read_json(path)


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None, True, "ä"], "b": {}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    with pytest.raises(ValueError):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert read_json(tmp_path / "value.json") == value
    no_temporaries(tmp_path)


# --- what may be opened ---------------------------------------------------------------------------------------------


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, problem in (
        ("fifo", "not a regular file"),
        (".", "not a regular file"),
        ("nothing", "does not exist"),
        ("file/below", "does not exist"),
        ("dangling", "does not exist"),
    ):
        for use in (read_bytes, read_json, reading.check_regular, lambda path: MappedFile(path, 1)):
            with pytest.raises(FileError, match=problem):
                use(tmp_path / name)  # a FIFO would block for ever


def test_a_huge_file_is_not_read(tmp_path):
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    with pytest.raises(FileError, match="more than"):
        read_json(tmp_path / "huge")


def test_checksums():
    data = bytes(range(256)) * 3
    assert checksums(data, 300) == [zlib.crc32(data[:300]), zlib.crc32(data[300:600]), zlib.crc32(data[600:])]
    assert checksums(b"") == []
    assert len(checksums(bytes(reading.CHECKSUM_CHUNK + 1))) == 2


# --- mapped files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4095, 4097])
def test_a_mapped_file_must_have_its_size(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    with pytest.raises(FileError, match=f"has 4096 bytes and should have {size}"):
        MappedFile(path, size)


def test_a_mapped_file_notices_that_it_shrank(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    mapped = MappedFile(path, 16384)
    mapped.check()
    os.truncate(path, 100)  # reading bytes 4096.. now would end the process
    with pytest.raises(FileError, match="cut short"):
        mapped.check()


def test_a_mapped_file_reads_again_after_drop_and_never_writes(tmp_path):
    path = tmp_path / "file"
    content = os.urandom(3 * mmap.PAGESIZE + 17)
    path.write_bytes(content)
    mapped = MappedFile(path, len(content))
    assert bytes(mapped.bytes.numpy()) == content
    mapped.drop()
    assert bytes(mapped.bytes.numpy()) == content
    mapped.bytes.zero_()
    assert path.read_bytes() == content
    mapped.drop()
    assert bytes(mapped.bytes.numpy()) == content


# --- scratch --------------------------------------------------------------------------------------------------------


def test_scratch_slots_are_separate_zero_and_survive_drop(tmp_path):
    scratch = ScratchFile(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == [], "a scratch file has a name, so it would outlive the process"
    sizes = [1, 4096, 5000, 0, 3 * mmap.ALLOCATIONGRANULARITY]
    slots = [scratch.mapped_slot(size) for size in sizes]
    for number, (slot, size) in enumerate(zip(slots, sizes, strict=True)):
        assert slot.bytes.dtype == torch.uint8 and slot.bytes.shape == (size,)
        assert not slot.bytes.any()
        slot.bytes.fill_(number + 1)
        slot.drop()
    for number, slot in enumerate(slots):
        assert (slot.bytes == number + 1).all()


def test_what_is_written_to_a_slot_is_read_from_it(tmp_path, monkeypatch):
    scratch = ScratchFile(tmp_path)
    tensors = [torch.randn(37), torch.randn(3, 5).bfloat16(), torch.arange(9000, dtype=torch.uint8), torch.zeros(0)]
    slots = [scratch.slot(tensor.nbytes) for tensor in tensors]
    real_write, real_read = os.pwrite, os.preadv
    # The system may write and read less than it was asked to.
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real_write(handle, data[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda handle, views, offset: real_read(handle, [views[0][:700]], offset))
    for slot, tensor in zip(slots, tensors, strict=True):
        slot.write(tensor)
    for slot, tensor in zip(slots, tensors, strict=True):
        found = torch.empty_like(tensor)
        slot.read(found)
        assert torch.equal(found, tensor)
    with pytest.raises(errors.FileError, match="ended"):
        slots[-1].read(torch.zeros(1 << 20))


def test_a_full_disk_is_an_error_when_the_slot_is_made(tmp_path, monkeypatch):
    scratch = ScratchFile(tmp_path)
    slot = scratch.mapped_slot(10)
    taken = []

    def no_space(handle, offset, length):
        taken.append((offset, length))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(OSError, match="No space"):
            scratch.slot(5000)
    page = mmap.ALLOCATIONGRANULARITY
    assert taken == [(page, -(-5000 // page) * page)]
    scratch.mapped_slot(5000).bytes.fill_(7)  # the failed one left no hole
    assert not slot.bytes.any()


def test_slots_are_really_allocated(tmp_path):
    scratch = ScratchFile(tmp_path)
    scratch.slot(1 << 20)
    assert os.fstat(scratch._file.fileno()).st_blocks * 512 >= 1 << 20, "a sparse map dies of SIGBUS on a full disk"


def test_a_scratch_array_is_what_was_appended(tmp_path, monkeypatch):
    made = scratch_module.ScratchArray(tmp_path, np.int32)
    whole = np.arange(200_000, dtype=np.int32)
    for start in range(0, len(whole), 777):
        made.extend(whole[start : start + 777])
        assert (made[start : start + 5] == whole[start : start + 5]).all()  # what was not written yet is read too
    assert list(tmp_path.iterdir()) == [], "a scratch file has a name, so it would outlive the process"
    real_read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, views, offset: real_read(handle, [views[0][:700]], offset))
    assert len(made) == len(whole) and made[:].dtype == np.int32
    for where in (slice(None), slice(3, 9), slice(199_990, 300_000), slice(7, 7)):
        assert (made[where] == whole[where]).all() and len(made[where]) == len(whole[where])
    truths = scratch_module.ScratchArray(tmp_path, np.bool_)
    truths.extend(b"\1\0\1")
    assert truths[1:].tolist() == [False, True]


def test_a_scratch_array_on_a_full_disk_is_one_line():
    made = scratch_module.ScratchArray(Path("/tmp"), np.int32)
    made._file.close()
    made._file = open("/dev/full", "wb")  # noqa: SIM115 - closed with the test
    with pytest.raises(errors.FileError, match="cannot write a scratch file in /tmp: No space left"):
        made.extend(bytes(1 << 20))


def test_existing_parent(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (".", "gone/further", "file/inside"):
        assert atomic.existing_parent(tmp_path / path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert atomic.existing_parent(Path("gone")) == tmp_path


def test_append_line(tmp_path):
    for step in range(2):
        atomic.append_line(tmp_path / "log", json.dumps({"step": step}))
    assert (tmp_path / "log").read_text() == '{"step": 0}\n{"step": 1}\n'


# --- leftovers ------------------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path):
    """A save is killed in the middle; the next start removes its temporaries, and only those."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mebp_triton import files\n"
        "def write(directory):\n"
        "    (directory / 'half').write_bytes(b'x')\n"
        "    with files.atomic_path(Path(sys.argv[1]) / 'name') as temporary:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.replace_directory(Path(sys.argv[1]) / 'checkpoint', write)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 2 and all(entry.name.startswith(temporaries.TEMPORARY_PREFIX) for entry in left)
    (tmp_path / "kept").write_text("mine")
    other_machine = tmp_path / f"{temporaries.TEMPORARY_PREFIX}{'0' * 16}-1-abc"
    other_machine.write_text("of another machine")
    with atomic.atomic_path(tmp_path / "name") as living:  # a write removes what lies beside its target
        assert set(tmp_path.iterdir()) == {living, tmp_path / "kept", other_machine}
        temporaries.remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == {living, tmp_path / "kept", other_machine}


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
    assert atomic.locate_directory(place) == place
    old.mkdir()
    assert atomic.locate_directory(place) == old and old.exists()
    place.mkdir()
    assert atomic.locate_directory(place) == place


def test_leftovers_are_told_from_what_is_in_use(tmp_path):
    """By machine, boot, process, and whether the process of that number is the one that wrote."""
    machine, boot = temporaries._origin()[:8], temporaries._origin()[8:]
    started, long_ago = psutil.boot_time(), 1e8
    mine = temporaries.temporary_prefix().split("-")[-2]
    assert mine == f"{os.getpid()}.{temporaries._started(os.getpid())}" and int(mine.partition(".")[2]) > 0
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
        for (origin, process, written), left in cases.items():
            path = tmp_path / f"{TEMPORARY_PREFIX}{origin}-{process}-abc"
            kind(path)
            if written is not None:
                os.utime(path, (written, written))
            temporaries.remove_leftovers(tmp_path)
            assert path.exists() != left, (origin, process, written)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_where_starts_are_not_told_a_process_of_that_number_is_taken_for_the_one(tmp_path, monkeypatch):
    with atomic.atomic_path(tmp_path / "name") as living:
        monkeypatch.setattr(temporaries, "_started", lambda process: "")
        temporaries.remove_leftovers(tmp_path)
        assert living.exists()


# --- several processes ----------------------------------------------------------------------------------------------


def test_a_lock_is_one_processes_and_ends_with_it(tmp_path):
    hold = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mebp_triton import files\n"
        "with files.locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(FileError, match="is in use by another process: wait for its end"), atomic.locked(tmp_path):
            pass
        child.kill()
    with atomic.locked(tmp_path), pytest.raises(FileError, match="in use"), atomic.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_locks_is_named(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with pytest.raises(FileError, match="cannot be locked .No locks available.: choose"), atomic.locked(tmp_path):
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

        monkeypatch.setattr(atomic.fcntl, "flock", flock)
        with pytest.raises(FileError, match="in use"), atomic.locked(place):
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


# --- seals and tensors ----------------------------------------------------------------------------------------------


def test_a_seal_tells_every_change(tmp_path):
    value = {"step": 4, "ratio": 1.0, "names": ["a", None, True], "deep": {"x": -0.0, "y": 1e-30}}
    path = tmp_path / "state.json"
    write_json(path, strict_json.sealed(value))
    assert strict_json.read_sealed(path) == value
    text = path.read_text()
    for old, new in (("4", "5"), ("1.0", "1"), ("-0.0", "0.0"), ("null", "false"), ('"a"', '"b"'), ("deep", "weep")):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(FileError, match="damaged or was changed"):
            strict_json.read_sealed(path)
    for seal in ({}, {"SEAL": 1}, {"seal": None}, {"seal": True}, {"seal": str(strict_json.sealed(value)["seal"])}):
        write_json(path, value | seal)
        with pytest.raises(FileError, match="damaged or was changed"):
            strict_json.read_sealed(path)
    path.write_text("[1]")
    with pytest.raises(FileError, match="wanted an object"):
        strict_json.read_sealed(path)


TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "rng": torch.arange(5, dtype=torch.uint8),
    "lag": torch.tensor(3),
    "none": torch.zeros(0, 4),
}


def test_tensors_are_written_the_same_every_time_and_read_by_others(tmp_path):
    metadata = {"format": "pt", "z": "1", "a": "2"}
    for name in ("x", "y"):
        safetensors_file.write_safetensors(tmp_path / name, dict(reversed(TENSORS.items())), metadata)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    ours, found = safetensors_file.read_safetensors(tmp_path / "x")
    theirs = safetensors.torch.load_file(tmp_path / "x")
    assert found == metadata and ours.keys() == theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor)
        assert ours[name].dtype == theirs[name].dtype == tensor.dtype
    assert safetensors_file.read_safetensors_header(tmp_path / "x")[0]["b"][:2] == (torch.float32, (2, 3))
    safetensors.torch.save_file(TENSORS, tmp_path / "z")
    again, _ = safetensors_file.read_safetensors(tmp_path / "z")
    assert safetensors_file.tensors_checksum(again) == safetensors_file.tensors_checksum(ours)
    again["b"][1, 1] += 1
    assert safetensors_file.tensors_checksum(again) != safetensors_file.tensors_checksum(ours)


@pytest.mark.parametrize("metadata", ["[]", '{"a": 1}', '"x"'])
def test_metadata_is_texts(tmp_path, metadata):
    header = f'{{"__metadata__": {metadata}}}'.encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match="metadata"):
        safetensors_file.read_safetensors(tmp_path / "x")


def test_a_failed_write_names_the_file_and_not_its_temporary(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    class OfRust(Exception):
        pass

    def full_in_rust(directory):
        raise OfRust("I/O error: No space left on device (os error 28)")

    writes = {
        "value.json": lambda path: write_json(path, {}),
        "x.safetensors": lambda path: safetensors_file.write_safetensors(path, TENSORS),
        "checkpoint": lambda path: replace_directory(path, full_in_rust),
        "metrics.jsonl": lambda path: atomic.append_line(path, "{}"),
    }
    monkeypatch.setattr(os, "fsync", full)
    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: full() if str(a[0]).endswith(".jsonl") else real(*a, **k))
    for name, write in writes.items():
        with pytest.raises(OSError, match="No space left on device") as caught:
            write(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name) and caught.value.errno == 28
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_looked_at_is_a_file_error(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match="cannot be read"):
            read_bytes(path)
