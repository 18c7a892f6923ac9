"""The store: what is written is what is read, and every way a store can be wrong is an error that names the file."""

import itertools
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch

from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.store.manifest import MANIFEST, SHARED, accept_companions, block_file
from mebp_triton.store.reader import Store
from mebp_triton.system import reading, strict_json
from mebp_triton.system.errors import FileError
from mebp_triton.system.reading import CHECKSUM_CHUNK

ROWS, COLUMNS, GROUP = 5, 70, 32
BLOCK = block_file(0)
GOLDEN = bytes(range(100, 164))  # one row of 128 codes


def int4(scheme, seed=0, rows=ROWS, columns=COLUMNS, group_size=GROUP, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    shape = -(-columns // group_size), rows
    return Int4Weight.from_codes(
        codes,
        torch.randn(shape, generator=generator).to(dtype),
        group_size,
        minimum=torch.randn(shape, generator=generator).to(dtype) if scheme == "affine" else None,
        codebook=torch.randn(16, generator=generator) if scheme == "codebook" else None,
    )


WEIGHTS = {
    "model.layers.0.a": int4("symmetric", 1),
    "model.layers.0.b": int4("affine", 2),
    "model.layers.0.c": int4("codebook", 3),
    "model.layers.0.d": int4("symmetric", 4, 3, 129, 128, torch.float32),
}
FLOATS = {
    "model.layers.0.norm.weight": torch.randn(7, generator=torch.Generator().manual_seed(0)),
    "model.layers.0.half": torch.arange(3.0).half(),
    "model.layers.0.brain": torch.arange(4.0).bfloat16(),
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    directory = tmp_path_factory.mktemp("golden")
    writer = StoreWriter(directory, "a test", tied_head=True)
    writer.write_file(BLOCK, {name: (weight, 0.125) for name, weight in WEIGHTS.items()}, FLOATS)
    embedding = Int4Weight(
        torch.tensor(list(GOLDEN), dtype=torch.uint8).view(1, 64), torch.tensor([[2.0], [-0.5]]), 128, 64
    )
    writer.write_file(SHARED, {"model.embed": (embedding, 0.0)}, {})
    writer.finish()
    return directory


@pytest.fixture
def store(golden, tmp_path):
    return Path(shutil.copytree(golden, tmp_path / "store"))


def refuses(directory, name, match=None):
    """Opening fails with one line that names the file."""
    with pytest.raises(FileError, match=match) as caught:
        Store(directory)
    assert str(directory / name) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# --- what was written is what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_is_what_was_written(golden, name):
    opened, written = Store(golden), WEIGHTS[name]
    found = opened.weight(name)
    assert found.scheme == written.scheme and found.shape == written.shape and found.group_size == written.group_size
    assert found.tensors().keys() == written.tensors().keys()
    for part, tensor in written.tensors().items():
        assert found.tensors()[part].dtype == tensor.dtype
        assert torch.equal(found.tensors()[part], tensor), part
    assert torch.equal(decode(found), decode(written))
    assert opened.matrices[name].relative_error == 0.125


def test_a_weight_may_be_views_of_a_copy_of_the_data_section(golden):
    opened = Store(golden)
    copy = opened.files[BLOCK].data().clone()
    opened.files[BLOCK].mapped.drop()
    for name, written in WEIGHTS.items():
        found = opened.weight(name, copy)
        assert torch.equal(decode(found), decode(written))
        inside = range(copy.data_ptr(), copy.data_ptr() + copy.numel())
        assert all(tensor.data_ptr() in inside for tensor in found.tensors().values()), "not a view"


def test_floats_keep_their_dtype(golden):
    opened = Store(golden)
    for name, tensor in FLOATS.items():
        found = opened.float_tensor(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_the_bytes_on_disk(golden):
    """The format is a promise: this is how version 1 lies in a file, whatever the code says."""
    data = (golden / SHARED).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    assert header.keys() == {"model.embed.packed", "model.embed.scales"}
    assert header["model.embed.packed"]["dtype"] == "U8" and header["model.embed.packed"]["shape"] == [1, 64]
    begin, end = header["model.embed.packed"]["data_offsets"]
    assert data[8 + length + begin : 8 + length + end] == GOLDEN
    begin, end = header["model.embed.scales"]["data_offsets"]
    assert struct.unpack("<2f", data[8 + length + begin : 8 + length + end]) == (2.0, -0.5)
    # Byte j of a chunk: column j in its low nibble, column j + 32 in its high one.
    values = decode(Store(golden).weight("model.embed"))[0].tolist()
    for column in range(128):
        byte = GOLDEN[column // 64 * 32 + column % 32]
        code = byte >> 4 if column % 64 >= 32 else byte & 15
        assert values[column] == (code - 8) * (2.0 if column < 64 else -0.5)
    manifest = json.loads((golden / MANIFEST).read_text())
    assert manifest["format"] == "mebp-int4-store" and manifest["format_version"] == 1
    assert manifest["layout"] == "planar64-v1" and manifest["checksum_chunk_bytes"] == 1048576
    assert manifest["tied_head"] is True and manifest["source"] == "a test"
    assert manifest["files"][SHARED] == {"bytes": len(data), "crc32": reading.checksums(data)}
    assert manifest["matrices"]["model.embed"] == {
        "file": SHARED,
        "scheme": "symmetric",
        "shape": [1, 128],
        "group_size": 64,
        "scale_dtype": "F32",
        "relative_error": 0.0,
    }
    assert manifest["floats"] == dict.fromkeys(FLOATS, BLOCK)


def test_what_opening_says(golden):
    opened = Store(golden)
    assert opened.tied_head and opened.source == "a test"
    assert opened.nbytes() == sum((golden / name).stat().st_size for name in (BLOCK, SHARED))
    opened.drop()
    assert torch.equal(decode(opened.weight("model.layers.0.a")), decode(WEIGHTS["model.layers.0.a"]))


def test_a_store_without_its_manifest_is_none(tmp_path):
    writer = StoreWriter(tmp_path, "a test", False)
    writer.write_file(BLOCK, {"m": (int4("symmetric"), 0.0)}, {})
    with pytest.raises(FileError, match="is not a store"):
        Store(tmp_path)
    writer.finish()
    assert not Store(tmp_path).tied_head


def resident_bytes(path):
    """Of the mappings of ``path`` in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_opening_reads_no_weight(tmp_path):
    writer = StoreWriter(tmp_path, "a test", False)
    writer.write_file(BLOCK, {"m": (int4("symmetric", rows=4096, columns=4096), 0.0)}, {})
    writer.finish()
    path = tmp_path / BLOCK
    with open(path, "r+b") as file:  # were the weights read, this would be noticed
        file.seek(-(1 << 20), os.SEEK_END)
        file.write(os.urandom(1 << 20))
    opened = Store(tmp_path)
    most = 3 << 20  # of 8 MiB: the header's page, and what the kernel maps around it (2 MiB where pages are huge)
    assert resident_bytes(path) <= most
    weight = opened.weight("m")
    assert weight.shape == (4096, 4096) and resident_bytes(path) <= most
    assert int(weight.packed.view(-1)[:: 1 << 12].sum()) > 0
    assert resident_bytes(path) > 2 * most, "the measure is blind"
    opened.drop()
    assert resident_bytes(path) == 0
    with pytest.raises(FileError, match="is damaged"):
        opened.files[BLOCK].verify()


# --- flipped bits ---------------------------------------------------------------------------------------------------


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("place", [-1, -50, -400])
def test_a_flipped_bit_is_found_on_first_use_and_by_verify(store, place):
    flip(store / BLOCK, place)
    for use in (
        lambda opened: opened.float_tensor("model.layers.0.norm.weight"),
        lambda opened: opened.files[BLOCK].verify(),
        lambda opened: opened.files[BLOCK].verify(again=True),
    ):
        with pytest.raises(FileError, match="is damaged: checksum of bytes 0 to") as caught:
            use(Store(store))
        assert str(store / BLOCK) in str(caught.value)
    Store(store).files[SHARED].verify()


def test_verify_names_the_chunk_and_looks_again_when_told(tmp_path):
    writer = StoreWriter(tmp_path, "a test", False)
    writer.write_file(BLOCK, {"m": (int4("symmetric", rows=2048, columns=2048), 0.0)}, {})
    writer.finish()
    opened = Store(tmp_path)
    file = opened.files[BLOCK]
    file.verify()
    path = tmp_path / BLOCK
    with open(path, "r+b") as handle:
        handle.seek(CHECKSUM_CHUNK + 5)
        handle.write(b"\xa5\x5a")
    file.verify()  # once is enough for a run
    file.mapped.drop()
    with pytest.raises(FileError, match=f"bytes {CHECKSUM_CHUNK} to {2 * CHECKSUM_CHUNK} differs"):
        file.verify(again=True)


def test_every_single_flipped_bit_is_found(tmp_path):
    """In a small file all of them are tried: each is refused at opening or by its checksum."""
    writer = StoreWriter(tmp_path, "a test", False)
    writer.write_file(BLOCK, {"m": (int4("symmetric", rows=1, columns=64), 0.0)}, {})
    writer.finish()
    data = (tmp_path / BLOCK).read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        (tmp_path / BLOCK).write_bytes(changed)
        with pytest.raises(FileError, match=BLOCK):
            Store(tmp_path).files[BLOCK].verify()


# --- files that are cut, too long, missing or no files --------------------------------------------------------------


@pytest.mark.parametrize("name", [BLOCK, SHARED])
@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1])
def test_a_truncated_file_is_refused_at_opening(store, name, keep):
    size = (store / name).stat().st_size
    os.truncate(store / name, keep if keep >= 0 else size + keep)
    refuses(store, name, "cut short or changed")


def test_extra_bytes_are_refused(store):
    with open(store / BLOCK, "ab") as file:
        file.write(b"\0")
    refuses(store, BLOCK, "cut short or changed")
    write_header(store, lambda header: None)  # now the manifest agrees with the size
    refuses(store, BLOCK, "1 bytes after the last tensor")


def test_a_file_cut_short_after_opening_is_noticed_before_it_is_read(store):
    opened = Store(store)
    opened.files[BLOCK].verify()
    os.truncate(store / BLOCK, 10)
    for use in (
        lambda: opened.files[BLOCK].verify(),
        lambda: opened.float_tensor("model.layers.0.norm.weight"),
    ):
        with pytest.raises(FileError, match=BLOCK):
            use()  # reading its pages would end the process with SIGBUS


def test_missing_files(store, tmp_path):
    with pytest.raises(FileError, match="is not a directory"):
        Store(tmp_path / "nothing")
    with pytest.raises(FileError, match="is not a directory"):
        Store(store / BLOCK)
    (store / BLOCK).unlink()
    refuses(store, BLOCK, "does not exist")
    os.mkfifo(store / BLOCK)
    refuses(store, BLOCK, "not a regular file")  # and does not wait for a writer
    (store / MANIFEST).unlink()
    with pytest.raises(FileError, match=r"is not a store: it has no manifest\.json; make one with `mebp quantize`"):
        Store(store)
    os.mkfifo(store / MANIFEST)
    refuses(store, MANIFEST, "not a regular file")


# --- headers --------------------------------------------------------------------------------------------------------


def write_header(directory, change, raw=None, length=None):
    """Rewrites the block's header and tells the manifest, as who means harm would."""
    path = directory / BLOCK
    data = path.read_bytes()
    old = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + old])
    changed = change(header)
    text = raw if raw is not None else json.dumps(header if changed is None else changed).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text) if length is None else length) + text + data[8 + old :]
    path.write_bytes(data)
    edit(directory, lambda m: m["files"].update({BLOCK: {"bytes": len(data), "crc32": reading.checksums(data)}}))


def edit(directory, change):
    """Changes the manifest, and seals it again."""
    manifest = json.loads((directory / MANIFEST).read_text())
    changed = change(manifest)
    changed = changed if isinstance(changed, dict | list) else manifest
    sealed = strict_json.sealed(changed) if isinstance(changed, dict) else changed
    (directory / MANIFEST).write_text(json.dumps(sealed))


A, NORM = "model.layers.0.a.packed", "model.layers.0.norm.weight"


def offsets(name, begin, end):
    return lambda header: header[name].update(data_offsets=[begin, end])


def put(name, key, value):
    return lambda header: header[name].update({key: value})


HEADERS = {
    "negative offset": offsets(A, -8, 0),
    "negative span": offsets(NORM, 28, 0),
    "offset past the end": offsets(A, 1 << 40, (1 << 40) + 320),
    "overlap": lambda header: header[NORM].update(data_offsets=[0, 28]),
    "gap": lambda header: header.pop("model.layers.0.half"),
    "huge shape": put(A, "shape", [1 << 62, 1 << 62]),
    "shape of another size": put(NORM, "shape", [8]),
    "negative shape": put(NORM, "shape", [-7]),
    "two negatives": put(NORM, "shape", [-7, -1]),
    "boolean in a shape": put(NORM, "shape", [7, True]),
    "boolean as an offset": lambda header: header[NORM].update(data_offsets=[False, 28]),
    "fraction in a shape": put(NORM, "shape", [7.0]),
    "text as a shape": put(NORM, "shape", "7"),
    "number as a shape": put(NORM, "shape", 7),
    "object as a shape": put(NORM, "shape", {}),
    "nothing as a shape": put(NORM, "shape", None),
    "an empty tensor with a side beyond 63 bits": lambda header: header.update(
        x={"dtype": "F32", "shape": [0, 1 << 70], "data_offsets": [0, 0]}
    ),
    "an empty tensor with strides beyond 63 bits": lambda header: header.update(
        x={"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}
    ),
    "one offset": put(NORM, "data_offsets", [0]),
    "three offsets": put(NORM, "data_offsets", [0, 28, 28]),
    "text as offsets": put(NORM, "data_offsets", "ab"),
    "unknown dtype": put(NORM, "dtype", "F8"),
    "list as a dtype": put(NORM, "dtype", ["F32"]),
    "no dtype": lambda header: header[NORM].pop("dtype"),
    "wrong dtype of packed": put(A, "dtype", "I8"),
    "entry is a list": lambda header: header.update({NORM: []}),
    "entry is null": lambda header: header.update({NORM: None}),
    "header is a list": lambda header: [header],
    "header is a number": lambda header: 12345678,
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_header_is_refused(store, name):
    write_header(store, HEADERS[name])
    refuses(store, BLOCK)


def test_two_tensors_over_the_same_bytes_are_refused(tmp_path):
    """Sizes, shapes and ends all fit; only that one lies over the other is wrong."""
    writer = StoreWriter(tmp_path, "a test", False)
    writer.write_file(BLOCK, {}, {"a": torch.zeros(6)})
    writer.finish()
    edit(tmp_path, lambda manifest: manifest["floats"].update(b=BLOCK))
    write_header(tmp_path, lambda header: header.update(b=header["a"]))
    refuses(tmp_path, BLOCK, "overlap")
    write_header(tmp_path, lambda header: header["b"].update(shape=[3], data_offsets=[12, 24]))
    refuses(tmp_path, BLOCK, "overlap")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}',
        b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [1e400], "data_offsets": [0, 0]}}',
        b'{"a": ' * 3000,
        b"[" * 60000,
        b"\xff\xff\xff\xff",
        b"{}\0\0\0\0\0\0",
    ],
)
def test_a_header_that_is_not_strict_json_is_refused(store, raw):
    write_header(store, lambda header: None, raw=raw)
    refuses(store, BLOCK)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 26) + 8, 1 << 40, (1 << 63) + 1, (1 << 64) - 1])
def test_a_header_length_that_does_not_fit_is_refused(store, length):
    write_header(store, lambda header: None, length=length)
    refuses(store, BLOCK, "header length")


def test_a_header_longer_than_any_real_one_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("mebp_triton.system.safetensors_file.HEADER_LIMIT", 64)
    writer = StoreWriter(tmp_path, "a test", False)
    writer.write_file(BLOCK, {"m": (int4("symmetric"), 0.0)}, {})
    writer.finish()
    monkeypatch.setattr(
        strict_json, "parse_json", lambda data, what: pytest.fail("parsed") if what != MANIFEST else None
    )
    with pytest.raises(FileError, match="header length"):
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        monkeypatch.setattr(strict_json, "read_json", lambda path: manifest)
        Store(tmp_path)


def test_a_tensor_out_of_alignment_is_refused(store):
    """A header of odd length leaves float tensors where torch cannot view them."""
    data = (store / BLOCK).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip(b" ")
    text += b" " * (1 - len(text) % 2)
    text = text if len(text) % 2 else text + b" "
    data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    (store / BLOCK).write_bytes(data)
    edit(store, lambda m: m["files"].update({BLOCK: {"bytes": len(data), "crc32": reading.checksums(data)}}))
    refuses(store, BLOCK)


# --- manifests ------------------------------------------------------------------------------------------------------

M = "model.layers.0.a"


def matrix(key, value):
    return lambda manifest: manifest["matrices"][M].update({key: value})


def of_file(key, value):
    return lambda manifest: manifest["files"][BLOCK].update({key: value})


def top(key, value):
    return lambda manifest: manifest.update({key: value})


def renamed(name):
    def change(manifest):
        manifest["files"][name] = manifest["files"].pop(BLOCK)
        for entry in manifest["matrices"].values():
            entry["file"] = name if entry["file"] == BLOCK else entry["file"]
        manifest["floats"] = dict.fromkeys(manifest["floats"], name)

    return change


MANIFESTS = {
    "another format": top("format", "gguf"),
    "a later version": top("format_version", 2),
    "a version as text": top("format_version", "1"),
    "true as the version": top("format_version", True),
    "a version with a point": top("format_version", 1.0),
    "another layout": top("layout", "planar64-v2"),
    "another chunk": top("checksum_chunk_bytes", 1 << 21),
    "true as the chunk": top("checksum_chunk_bytes", True),
    "tied_head as text": top("tied_head", "yes"),
    "tied_head as a number": top("tied_head", 1),
    "files is a list": top("files", []),
    "matrices is a list": top("matrices", []),
    "floats is a list": top("floats", [1]),
    "floats is null": top("floats", None),
    "a list": lambda manifest: [manifest],
    "no floats": lambda manifest: manifest.pop("floats") and None,
    "a file of no size": of_file("bytes", 0),
    "a negative size": of_file("bytes", -1),
    "a size as text": of_file("bytes", "1"),
    "true as the size": of_file("bytes", True),
    "no checksums": of_file("crc32", []),
    "checksums of another number": of_file("crc32", [1, 2]),
    "checksum as a number": of_file("crc32", 5),
    "checksum as text": of_file("crc32", "a"),
    "a checksum that is no number": of_file("crc32", [None]),
    "a file with a path": renamed("../secret.safetensors"),
    "a file with an absolute path": renamed("/etc/secret.safetensors"),
    "a file below": renamed("sub/block.safetensors"),
    "a file of another kind": renamed("block.bin"),
    "a file with a NUL in its name": renamed("block\0.safetensors"),
    "a matrix of an unknown file": matrix("file", "block-00009.safetensors"),
    "a matrix of another file": matrix("file", SHARED),
    "an unknown scheme": matrix("scheme", "ternary"),
    "a scheme that needs more": matrix("scheme", "affine"),
    "a list as the scheme": matrix("scheme", []),
    "another group size": matrix("group_size", 64),
    "an unknown group size": matrix("group_size", 33),
    "true as the group size": matrix("group_size", True),
    "one row more": matrix("shape", [ROWS + 1, COLUMNS]),
    "columns past the padding": matrix("shape", [ROWS, 129]),
    "columns that need less": matrix("shape", [ROWS, 64]),
    "no columns": matrix("shape", [ROWS, 0]),
    "negative rows": matrix("shape", [-ROWS, COLUMNS]),
    "true rows": matrix("shape", [True, COLUMNS]),
    "three dimensions": matrix("shape", [ROWS, COLUMNS, 1]),
    "a shape as text": matrix("shape", "ab"),
    "a huge shape": matrix("shape", [1 << 70, 1 << 70]),
    "another scale dtype": matrix("scale_dtype", "F32"),
    "an unknown scale dtype": matrix("scale_dtype", "F8"),
    "a list as the scale dtype": matrix("scale_dtype", []),
    "an error as text": matrix("relative_error", "small"),
    "a key too many": matrix("color", "red"),
    "a key too few": lambda manifest: manifest["matrices"][M].pop("scheme") and None,
    "a matrix as a list": lambda manifest: manifest["matrices"].update({M: []}),
    "a matrix that is not there": lambda manifest: manifest["matrices"].update(x=manifest["matrices"][M]),
    "a float that is not there": lambda manifest: manifest["floats"].update(x=BLOCK),
    "a float of an unknown file": lambda manifest: manifest["floats"].update({NORM: "x"}),
    "a float in another file": lambda manifest: manifest["floats"].update({NORM: SHARED}),
    "a float whose file is a list": lambda manifest: manifest["floats"].update({NORM: []}),
    "a tensor that nothing names": lambda manifest: manifest["floats"].pop(NORM) and None,
    "a matrix less": lambda manifest: manifest["matrices"].pop(M) and None,
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_contradicts_itself_or_the_files_is_refused(store, name):
    edit(store, MANIFESTS[name])
    with pytest.raises(FileError) as caught:
        Store(store)
    assert str(store) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["format", "format_version", "layout", "source", "tied_head", "files", "matrices"])
def test_a_manifest_without_a_key_is_refused(store, key):
    edit(store, lambda manifest: {name: value for name, value in manifest.items() if name != key})
    refuses(store, MANIFEST)


def test_a_scheme_is_what_the_manifest_says_and_not_what_lies_about(store):
    """A minimum beside a symmetric matrix would decode it as an affine one."""
    edit(store, lambda manifest: manifest["matrices"]["model.layers.0.b"].update(scheme="symmetric"))
    with pytest.raises(FileError, match=BLOCK):
        Store(store)


@pytest.mark.parametrize("text", ['{"format": "mebp-int4-store", "format": "x"}', "[NaN]", "{", "", "[" * 100000])
def test_a_manifest_that_is_not_strict_json_is_refused(store, text):
    (store / MANIFEST).write_text(text)
    refuses(store, MANIFEST, "not valid JSON")


def test_random_damage_is_an_error_or_nothing_but_never_a_crash(golden, tmp_path):
    """Bytes of manifest and header changed at random: opening works, or refuses with one line."""
    draw = random.Random(0)
    refused = 0
    for attempt, name in itertools.product(range(60), (MANIFEST, BLOCK)):
        directory = Path(shutil.copytree(golden, tmp_path / f"{name}-{attempt}"))
        data = bytearray((directory / name).read_bytes())
        reach = len(data) if name == MANIFEST else 8 + int.from_bytes(data[:8], "little")
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(reach)] = draw.choice((draw.randrange(256), ord(draw.choice('0123456789"[]{},:'))))
        (directory / name).write_bytes(data)
        try:
            Store(directory)
        except FileError as error:
            assert str(directory) in str(error) and "\n" not in str(error)
            refused += 1
        shutil.rmtree(directory)
    assert refused > 60


# --- what lies beside the weights -----------------------------------------------------------------------------------


def test_a_companion_that_was_changed_is_refused_until_it_is_accepted(tmp_path):
    (tmp_path / "config.json").write_text('{"rope_theta": 10000.0}')
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "chat.jinja").write_text("{{ messages }}")
    writer = StoreWriter(tmp_path, "a test", False)
    writer.write_file(BLOCK, {"m": (int4("symmetric"), 0.0)}, {})
    writer.finish()
    assert json.loads((tmp_path / MANIFEST).read_text())["companions"].keys() == {"config.json", "templates/chat.jinja"}
    (tmp_path / "README.md").write_text("mine")  # what nobody reads may be added
    Store(tmp_path)
    (tmp_path / "config.json").write_text('{"rope_theta": 18000.0}')
    refuses(tmp_path, "config.json", "is not what it was when the store was made")
    assert accept_companions(tmp_path) == ["README.md", "config.json"]
    Store(tmp_path)
    (tmp_path / "templates" / "chat.jinja").unlink()
    refuses(tmp_path, "templates/chat.jinja", "does not exist")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "additional_chat_templates/tool.jinja"])
def test_a_companion_that_was_added_is_refused_until_it_is_accepted(store, name):
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).write_text("{}")
    refuses(store, name, "was not there when the store was made")
    assert accept_companions(store) == [name]
    assert name in Store(store).companions


@pytest.mark.parametrize("name", ["../x.json", "/etc/hostname", "a/../../x"])
def test_companions_lie_inside_the_store(store, name):
    edit(store, lambda manifest: manifest.update(companions={name: [1]}))
    refuses(store, MANIFEST, "is no path inside the store")


@pytest.mark.parametrize(
    "change",
    [{"group_size": 32.0}, {"group_size": True}, {"scale_dtype": "BF16"}, {"scale_dtype": "U8"}, {"scheme": 1}],
)
def test_a_matrix_is_what_a_matrix_can_be(store, change):
    edit(store, lambda manifest: manifest["matrices"]["model.layers.0.a"].update(change))
    refuses(store, MANIFEST, "matrix 'model.layers.0.a' is malformed")


def test_a_manifest_is_sealed(store):
    text = (store / MANIFEST).read_text()
    (store / MANIFEST).write_text(text.replace('"a test"', '"a text"'))
    refuses(store, MANIFEST, "damaged or was changed")
    (store / MANIFEST).write_text(text.replace('"seal"', '"zeal"'))
    refuses(store, MANIFEST, "damaged or was changed")


@pytest.mark.parametrize(
    "name", ["model.layers.0.a.scales", "model.layers.0.b.minimum", "model.layers.0.c.codebook", NORM]
)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_though_the_checksums_agree(store, name, number):
    opened = Store(store).files[BLOCK]
    dtype, _, begin, _ = opened.entries[name]
    data = bytearray((store / BLOCK).read_bytes())
    raw = torch.tensor([number], dtype=dtype).view(torch.uint8).numpy().tobytes()
    data[opened.start + begin : opened.start + begin + len(raw)] = raw
    (store / BLOCK).write_bytes(data)
    edit(store, lambda m: m["files"].update({BLOCK: {"bytes": len(data), "crc32": reading.checksums(data)}}))
    with pytest.raises(FileError, match=f"{name} is not finite"):
        Store(store).files[BLOCK].verify()
