"""Tables: which files are read, and what is refused."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch

from mebp_triton.kernels import tables
from mebp_triton.kernels.configs import Panel, Problem, TileConfig
from mebp_triton.kernels.tables import (
    Entry,
    architecture_of,
    bucket,
    bucket_m,
    bucket_size,
    device_architecture,
    parse_table,
    read_table,
    table_to_json,
    user_table_path,
)

TILE = TileConfig(32, 64, 64, 8, 3, split=2, weight_left=False)
ENTRY = Entry(Problem("matmul", 64, 2048, 1024), TILE, "static", 12.5, None, {"triton": "3.9.0"})
PANEL = Entry(replace(ENTRY.problem, m=4096), Panel(16), "measured", 900.0, "A GPU", {"triton": "3.9.0"})


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """Folders of the test's own: of shipped tables, and of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    return tmp_path / "shipped", user_table_path("sm_90").parent


def write(directory, *entries, architecture="sm_90"):
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / f"{architecture}.json"
    path.write_text(json.dumps(table_to_json(architecture, entries)))
    return path


def test_buckets():
    assert [bucket_m(m) for m in (0, 1, 16, 17, 33, 512, 513, 4096, 10**6)] == [
        16,
        16,
        16,
        32,
        64,
        512,
        1024,
        4096,
        4096,
    ]
    assert [bucket_size(n) for n in (1, 128, 181, 182, 896, 11008, 10**9)] == [128, 128, 128, 256, 1024, 8192, 2**18]
    assert bucket(Problem("matmul_dx", 500, 11008, 2048)) == Problem("matmul_dx", 512, 8192, 2048)


def test_round_trip():
    written = json.loads(json.dumps(table_to_json("sm_90", [PANEL, ENTRY])))
    assert parse_table(written, "sm_90") == {entry.problem: entry for entry in (ENTRY, PANEL)}


def test_the_size_of_panels_is_named_where_it_is_not_16():
    """So tables without it are read, and older versions read tables that need none."""
    larger = replace(PANEL, problem=replace(PANEL.problem, m=2048), route=Panel(64))
    written = json.loads(json.dumps(table_to_json("sm_90", [PANEL, larger])))
    assert sorted(str(entry.get("panel_mib")) for entry in written["entries"]) == ["64", "None"]
    assert parse_table(written, "sm_90") == {entry.problem: entry for entry in (PANEL, larger)}
    written["entries"] = [entry for entry in written["entries"] if "panel_mib" in entry]
    for wrong in (0, 1025, 64.0, True, "64"):
        written["entries"][0]["panel_mib"] = wrong
        with pytest.raises(ValueError, match=f"panel_mib must be an integer from 1 to 1024, got {wrong!r}"):
            parse_table(written, "sm_90")


def test_the_width_of_codes_is_named_where_it_is_not_4():
    """So tables without it are read, and older versions read tables that need none."""
    wide = replace(ENTRY, problem=replace(ENTRY.problem, group_size=16, bits=8))
    written = json.loads(json.dumps(table_to_json("sm_90", [ENTRY, wide])))
    assert sorted(str(entry.get("bits")) for entry in written["entries"]) == ["8", "None"]
    assert parse_table(written, "sm_90") == {entry.problem: entry for entry in (ENTRY, wide)}


def broken(**changes):
    value = table_to_json("sm_90", [ENTRY])
    for place, new in changes.items():
        target = value
        *parents, last = place.split("__")
        for parent in parents:
            target = target["entries"][0] if parent == "entry" else target[parent]
        if new is KeyError:
            del target[last]
        else:
            target[last] = new
    return value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"architecture": "sm_80"}, "architecture must be 'sm_90', got 'sm_80'"),
        ({"entries": {}}, "entries must be a list"),
        ({"surplus": 1}, "a table has the keys"),
        ({"entry__m": 65}, "m must be one of .* got 65"),
        ({"entry__m": True}, "m must be one of .* got True"),
        ({"entry__n": 2000}, "n must be one of"),
        ({"entry__kernel": "embedding"}, "kernel must be one of"),
        ({"entry__scheme": ["symmetric"]}, "scheme must be one of"),
        ({"entry__group_size": 16}, r"group_size must be one of \(32, 64, 128\), got 16 for codes of 4 bits"),
        ({"entry__group_size": [64]}, "scheme, group_size and bits must be a name and two integers"),
        ({"entry__bits": 8, "entry__group_size": 8}, r"group_size must be one of \(16, 32, 64, 128\), got 8 for codes"),
        (
            {"entry__bits": 8, "entry__scheme": "codebook"},
            "bits must be 4, or 8 without a codebook, got 8 for 'codebook'",
        ),
        ({"entry__bits": 6}, "bits must be 4, or 8 without a codebook, got 6"),
        ({"entry__bits": 8.0}, "scheme, group_size and bits must be a name and two integers"),
        ({"entry__bits": True}, "scheme, group_size and bits must be a name and two integers"),
        ({"entry__dtype": "float64"}, "dtype must be one of"),
        ({"entry__provenance": "guessed"}, "provenance must be one of"),
        ({"entry__time_us": float("nan")}, "time_us must be a positive number"),
        ({"entry__time_us": 0}, "time_us must be a positive number"),
        ({"entry__time_us": True}, "time_us must be a positive number"),
        ({"entry__versions": {"triton": 3}}, "versions must map names"),
        ({"entry__device": 3}, "device must be a name or null"),
        ({"entry__ir_override": "x"}, "an entry has the keys"),
        ({"entry__m": 64, "entry__route": "panel"}, "whose route is panel has no config"),
        ({"entry__panel_mib": 64}, "whose route is tile has no panel_mib"),
        ({"entry__config": KeyError}, "config has the keys"),
        ({"entry__config__ir_override": "x"}, "config has the keys"),
        ({"entry__config__block_m": 24}, "block_m must be a power of two"),
        ({"entry__config__num_warps": "8"}, "num_warps must be an integer"),
        ({"entry__config__block_k": 1 << 20}, "block_k must be at most 512, got 1048576"),
        ({"entry__config__scale_sums": True, "entry__scheme": "affine"}, "scale_sums is for matmul"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_table(broken(**changes), "sm_90")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe", b"null", b'{"format": 1}', b"[" * 100_000, json.dumps(broken(format=9)).encode()],
)
def test_garbage_is_ignored_with_a_warning(places, content):
    shipped, user = places
    write(shipped, ENTRY)
    write(user, PANEL).write_bytes(content)
    with pytest.warns(UserWarning, match="is ignored"):
        assert tables.load_tables("sm_90") == {ENTRY.problem: ENTRY}


def test_another_devices_table_is_ignored(places):
    shipped, _ = places
    write(shipped, ENTRY, architecture="sm_80").rename(shipped / "sm_90.json")
    with pytest.warns(UserWarning, match="architecture must be 'sm_90'"):
        assert tables.load_tables("sm_90") == {}


def test_a_table_that_others_may_write_to_is_ignored(places):
    _, user = places
    path = write(user, ENTRY)
    assert read_table(path, "sm_90")
    for place, mode in ((path, 0o646), (user, 0o707)):
        before = place.stat().st_mode
        place.chmod(mode)
        with pytest.warns(UserWarning, match="everybody may write"):
            assert read_table(path, "sm_90") == {}
        place.chmod(before)


def test_what_is_no_file_is_ignored(places):
    _, user = places
    path = write(user, ENTRY)
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(UserWarning, match="not a regular file"):
        assert read_table(path, "sm_90") == {}


def test_no_table_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.load_tables("sm_90") == {}


def test_the_users_own_entry_wins(places):
    shipped, user = places
    other = replace(ENTRY, route=TileConfig(16, 32, 64))
    write(shipped, ENTRY, PANEL)
    write(user, other)
    assert tables.load_tables("sm_90") == {ENTRY.problem: other, PANEL.problem: PANEL}


def test_no_home_is_no_error(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.load_tables("sm_90") == {}


def test_the_device_is_known_by_its_capability(monkeypatch):
    assert architecture_of(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 7))
    monkeypatch.setattr(torch.version, "hip", None)
    assert device_architecture.__wrapped__(torch.device("cuda", 0)) == "sm_87"


def test_a_compiler_does_not_look_for_drivers():
    """Triton's driver stands in for a device in measurements alone, and cannot be traced."""
    compiled = torch.compile(lambda x: x + len(architecture_of(x.device)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2))


def test_a_table_for_a_reader_that_believes_numbers(places):
    """Numbers that no float holds, and keys that stand twice."""
    _, user = places
    path = write(user, ENTRY)
    text = path.read_text()
    for old, new in (
        ('"time_us": 12.5', f'"time_us": 1{"0" * 400}'),
        ('"time_us": 12.5', '"time_us": 1e999'),
        ('"time_us": 12.5', '"time_us": 12.5, "time_us": 1.0'),
        ('"block_m": 32', '"block_m": 32, "block_m": 64'),
        ('"block_m": 32', f'"block_m": 1{"0" * 400}'),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.warns(UserWarning, match="is ignored") as caught:
            assert read_table(path, "sm_90") == {}
        assert len(str(caught[0].message)) < 500
    value = json.loads(text)
    value["entries"] *= 2
    path.write_text(json.dumps(value))
    with pytest.warns(UserWarning, match="two entries are for the same problem"):
        assert read_table(path, "sm_90") == {}
