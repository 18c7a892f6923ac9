"""The store: what is written is what is read, and every way its files can be wrong is an error that names the file."""

import itertools
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from stores import (
    BLOCK,
    EIGHT_BITS,
    FLOATS,
    GOLDEN,
    NORM,
    TWO_LEVEL,
    WEIGHTS,
    edit,
    flip,
    int4,
    one_matrix,
    refuses,
    reseal,
)

from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.kernels.layout import unpack
from mebp_triton.kernels.reference import decode
from mebp_triton.store.manifest import MANIFEST, SHARED
from mebp_triton.store.reader import Store, open_store
from mebp_triton.system import reading
from mebp_triton.system.errors import FileError
from mebp_triton.system.reading import CHECKSUM_CHUNK

# --- what was written is what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS | EIGHT_BITS | TWO_LEVEL)
def test_a_weight_is_what_was_written(golden, two_level, name):
    opened, written = Store(golden if name in WEIGHTS else two_level), (WEIGHTS | EIGHT_BITS | TWO_LEVEL)[name]
    found = opened.weight(name)
    assert found.form == written.form == opened.matrices[name].form and found.shape == written.shape
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


def test_the_bytes_of_codes_of_8_bits(mixed):
    """A byte for each column, in order; 128 in the padding of the symmetric scheme, 0 in that of the affine one."""
    opened = Store(mixed)
    for name, weight in EIGHT_BITS.items():
        file = opened.files[BLOCK]
        packed, rows, columns = file.tensor(f"{name}.packed"), *weight.shape
        assert packed.shape == (rows, -(-columns // 64) * 64)
        scales = file.tensor(f"{name}.scales").double().t().repeat_interleave(weight.group_size, 1)[:, :columns]
        decoded = packed[:, :columns].double()
        if weight.minimum is None:
            decoded = (decoded - 128) * scales
        else:
            minimum = file.tensor(f"{name}.minimum").double().t().repeat_interleave(weight.group_size, 1)
            decoded = decoded * scales + minimum[:, :columns]
        assert torch.equal(decoded, decode(opened.weight(name)))
        assert (packed[:, columns:] == (128 if weight.minimum is None else 0)).all()


def test_the_bytes_of_scales_of_two_levels(two_level):
    """A signed byte for each group, and a float16 number for each 256 columns, which multiply."""
    opened = Store(two_level)
    for name, weight in TWO_LEVEL.items():
        file, (rows, columns) = opened.files[BLOCK], weight.shape
        assert opened.matrices[name].scale_dtype == "I8"

        def numbers(part, name=name, file=file, columns=columns, size=weight.group_size):
            steps, supers = (file.tensor(f"{name}.{start}{part}") for start in ("", "super_"))
            assert (steps.dtype, supers.dtype) == (torch.int8, torch.float16) and len(supers) == -(-columns // 256)
            every = [tensor.double().t().repeat_interleave(each, 1) for tensor, each in ((steps, size), (supers, 256))]
            return every[0][:, :columns] * every[1][:, :columns]

        codes = unpack(file.tensor(f"{name}.packed"), columns).double()
        if weight.scheme == "affine":
            decoded = codes * numbers("scales") + numbers("minimum")
        elif weight.scheme == "codebook":
            decoded = file.tensor(f"{name}.codebook").double()[codes.long()] * numbers("scales")
        else:
            decoded = (codes - 128) * numbers("scales")
        assert torch.equal(decoded, decode(opened.weight(name))) and decoded.shape == (rows, columns)


def test_damaged_super_scales_are_noticed(two_level):
    start, name = Store(two_level).files[BLOCK], "model.layers.0.g.super_minimum"
    data = bytearray((two_level / BLOCK).read_bytes())
    place = start.start + start.entries[name][2]
    data[place : place + 2] = struct.pack("<e", float("inf"))
    (two_level / BLOCK).write_bytes(data)
    with pytest.raises(FileError, match="is damaged: checksum of bytes 0 to"):
        Store(two_level).files[BLOCK].verify()
    reseal(two_level)
    with pytest.raises(FileError, match=f"{name} is not finite"):
        Store(two_level).files[BLOCK].verify()


@pytest.mark.parametrize("part", ["packed", "scales", "minimum"])
def test_damaged_codes_of_8_bits_are_noticed(mixed, part):
    start = Store(mixed).files[BLOCK]
    flip(mixed / BLOCK, start.start + start.entries[f"model.layers.0.f.{part}"][2])
    with pytest.raises(FileError, match="is damaged: checksum of bytes 0 to"):
        Store(mixed).files[BLOCK].verify()


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
    one_matrix(tmp_path, 4096, 4096)
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


def test_an_opened_store_is_not_opened_again(golden):
    opened = open_store(golden)
    assert isinstance(opened, Store) and open_store(opened) is opened and open_store(str(golden)) is not opened


# --- flipped bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [-1, -50, -400])
def test_a_flipped_bit_is_found_on_first_use_and_by_verify(copied, place):
    flip(copied / BLOCK, place)
    for use in (
        lambda opened: opened.float_tensor("model.layers.0.norm.weight"),
        lambda opened: opened.files[BLOCK].verify(),
        lambda opened: opened.files[BLOCK].verify(again=True),
    ):
        with pytest.raises(FileError, match="is damaged: checksum of bytes 0 to") as caught:
            use(Store(copied))
        assert str(copied / BLOCK) in str(caught.value)
    Store(copied).files[SHARED].verify()


def test_verify_names_the_chunk_and_looks_again_when_told(tmp_path):
    one_matrix(tmp_path, 2048, 2048)
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
    one_matrix(tmp_path, 1, 64)
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
def test_a_truncated_file_is_refused_at_opening(copied, name, keep):
    size = (copied / name).stat().st_size
    os.truncate(copied / name, keep if keep >= 0 else size + keep)
    refuses(copied, name, "cut short or changed")


def test_extra_bytes_are_refused(copied):
    with open(copied / BLOCK, "ab") as file:
        file.write(b"\0")
    refuses(copied, BLOCK, "cut short or changed")
    write_header(copied, lambda header: None)  # now the manifest agrees with the size
    refuses(copied, BLOCK, "1 bytes after the last tensor")


def test_a_file_cut_short_after_opening_is_noticed_before_it_is_read(copied):
    opened = Store(copied)
    opened.files[BLOCK].verify()
    os.truncate(copied / BLOCK, 10)
    for use in (
        lambda: opened.files[BLOCK].verify(),
        lambda: opened.float_tensor("model.layers.0.norm.weight"),
    ):
        with pytest.raises(FileError, match=BLOCK):
            use()  # reading its pages would end the process with SIGBUS


def test_missing_files(copied, tmp_path):
    with pytest.raises(FileError, match="is not a directory"):
        Store(tmp_path / "nothing")
    with pytest.raises(FileError, match="is not a directory"):
        Store(copied / BLOCK)
    (copied / BLOCK).unlink()
    refuses(copied, BLOCK, "does not exist")
    os.mkfifo(copied / BLOCK)
    refuses(copied, BLOCK, "not a regular file")  # and does not wait for a writer
    (copied / MANIFEST).unlink()
    with pytest.raises(FileError, match=r"is not a store: it has no manifest\.json; make one with `mebp quantize`"):
        Store(copied)
    os.mkfifo(copied / MANIFEST)
    refuses(copied, MANIFEST, "not a regular file")


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
    reseal(directory)


A = "model.layers.0.a.packed"


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
def test_a_wrong_header_is_refused(copied, name):
    write_header(copied, HEADERS[name])
    refuses(copied, BLOCK)


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
def test_a_header_that_is_not_strict_json_is_refused(copied, raw):
    write_header(copied, lambda header: None, raw=raw)
    refuses(copied, BLOCK)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 26) + 8, 1 << 40, (1 << 63) + 1, (1 << 64) - 1])
def test_a_header_length_that_does_not_fit_is_refused(copied, length):
    write_header(copied, lambda header: None, length=length)
    refuses(copied, BLOCK, "header length")


def test_a_tensor_out_of_alignment_is_refused(copied):
    """A header of odd length leaves float tensors where torch cannot view them."""
    data = (copied / BLOCK).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip(b" ")
    text += b" " * (1 - len(text) % 2)
    text = text if len(text) % 2 else text + b" "
    data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    (copied / BLOCK).write_bytes(data)
    reseal(copied)
    refuses(copied, BLOCK)


@pytest.mark.parametrize(
    "name", ["model.layers.0.a.scales", "model.layers.0.b.minimum", "model.layers.0.c.codebook", NORM]
)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_though_the_checksums_agree(copied, name, number):
    opened = Store(copied).files[BLOCK]
    dtype, _, begin, _ = opened.entries[name]
    data = bytearray((copied / BLOCK).read_bytes())
    raw = torch.tensor([number], dtype=dtype).view(torch.uint8).numpy().tobytes()
    data[opened.start + begin : opened.start + begin + len(raw)] = raw
    (copied / BLOCK).write_bytes(data)
    reseal(copied)
    with pytest.raises(FileError, match=f"{name} is not finite"):
        Store(copied).files[BLOCK].verify()


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
