"""Manifests that contradict themselves or the files, and companions that were changed: each is an error."""

import json

import pytest
import torch
from stores import BLOCK, COLUMNS, NORM, ROWS, edit, int4, refuses

from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.store.manifest import MANIFEST, SHARED, accept_companions, block_file, dtype_name
from mebp_triton.store.reader import Store
from mebp_triton.system.errors import FileError


def test_names():
    assert block_file(7) == "block-00007.safetensors"
    assert [dtype_name(dtype) for dtype in (torch.uint8, torch.float16, torch.bfloat16)] == ["U8", "F16", "BF16"]


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
    "the version of wider codes": top("format_version", 2),
    "a later version": top("format_version", 3),
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
    "bytes as scales": matrix("scale_dtype", "I8"),
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
def test_a_manifest_that_contradicts_itself_or_the_files_is_refused(copied, name):
    edit(copied, MANIFESTS[name])
    with pytest.raises(FileError) as caught:
        Store(copied)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


WIDE = "model.layers.0.e"
MIXED = {
    "no width": lambda entries: entries[WIDE].pop("bits"),
    "half the width": lambda entries: entries[WIDE].update(bits=4, group_size=32),
    "a width that is none": lambda entries: entries[WIDE].update(bits=6),
    "a width as text": lambda entries: entries[WIDE].update(bits="8"),
    "a width with a point": lambda entries: entries[WIDE].update(bits=8.0),
    "true as the width": lambda entries: entries[WIDE].update(bits=True),
    "a codebook of 8 bits": lambda entries: entries[WIDE].update(scheme="codebook"),
    "groups of 8": lambda entries: entries[WIDE].update(group_size=8),
    "groups of 32": lambda entries: entries[WIDE].update(group_size=32),
    "groups of 16 with 4 bits": lambda entries: entries[M].update(group_size=16),
    "8 bits where there are 4": lambda entries: entries[M].update(bits=8),
    "a minimum too many": lambda entries: entries["model.layers.0.f"].update(scheme="symmetric"),
    "a minimum too few": lambda entries: entries[WIDE].update(scheme="affine"),
    "columns of the codes of 4 bits": lambda entries: entries[WIDE].update(shape=[ROWS, 140]),
}


@pytest.mark.parametrize("name", MIXED)
def test_codes_of_8_bits_are_what_the_manifest_says(mixed, name):
    edit(mixed, lambda manifest: MIXED[name](manifest["matrices"]) and None)
    with pytest.raises(FileError) as caught:
        Store(mixed)
    assert str(mixed) in str(caught.value) and "\n" not in str(caught.value)


def test_the_version_tells_that_there_are_codes_of_8_bits(mixed, golden):
    """A reader of version 1 would take their bytes for codes of 4 bits, and is told by the version that it must not."""
    manifests = [json.loads((place / MANIFEST).read_text()) for place in (mixed, golden)]
    assert [manifest["format_version"] for manifest in manifests] == [2, 1]
    assert {name: entry.get("bits") for name, entry in manifests[0]["matrices"].items()} == {
        "model.layers.0.a": None,
        "model.layers.0.e": 8,
        "model.layers.0.f": 8,
    }
    edit(mixed, lambda manifest: manifest.update(format_version=1))
    refuses(mixed, MANIFEST, "format_version is 1, its matrices are of 2")


G = "model.layers.0.g"
TWO_LEVEL = {
    "one level": lambda entries: entries[G].update(scale_dtype="F16"),
    "another scheme": lambda entries: entries[G].update(scheme="symmetric"),
    "another group size": lambda entries: entries[G].update(group_size=64),
    "fewer columns": lambda entries: entries["model.layers.0.h"].update(shape=[ROWS, 256]),
    "a stretch more": lambda entries: entries["model.layers.0.i"].update(shape=[ROWS, 513]),
    "two levels where there is one": lambda entries: entries[M].update(scale_dtype="I8"),
}


@pytest.mark.parametrize("name", TWO_LEVEL)
def test_scales_of_two_levels_are_what_the_manifest_says(two_level, name):
    edit(two_level, lambda manifest: TWO_LEVEL[name](manifest["matrices"]) and None)
    refuses(two_level, BLOCK, r"should be|is not in manifest\.json")


@pytest.mark.parametrize("version", [1, 2])
def test_the_version_tells_that_there_are_scales_of_two_levels(two_level, version):
    manifest = json.loads((two_level / MANIFEST).read_text())
    assert manifest["format_version"] == 3
    edit(two_level, lambda manifest: manifest.update(format_version=version))
    refuses(two_level, MANIFEST, f"format_version is {version}, its matrices are of 3")


@pytest.mark.parametrize("key", ["format", "format_version", "layout", "source", "tied_head", "files", "matrices"])
def test_a_manifest_without_a_key_is_refused(copied, key):
    edit(copied, lambda manifest: {name: value for name, value in manifest.items() if name != key})
    refuses(copied, MANIFEST)


def test_a_scheme_is_what_the_manifest_says_and_not_what_lies_about(copied):
    """A minimum beside a symmetric matrix would decode it as an affine one."""
    edit(copied, lambda manifest: manifest["matrices"]["model.layers.0.b"].update(scheme="symmetric"))
    with pytest.raises(FileError, match=BLOCK):
        Store(copied)


@pytest.mark.parametrize("text", ['{"format": "mebp-int4-store", "format": "x"}', "[NaN]", "{", "", "[" * 100000])
def test_a_manifest_that_is_not_strict_json_is_refused(copied, text):
    (copied / MANIFEST).write_text(text)
    refuses(copied, MANIFEST, "not valid JSON")


@pytest.mark.parametrize(
    "change",
    [{"group_size": 32.0}, {"group_size": True}, {"scale_dtype": "BF16"}, {"scale_dtype": "U8"}, {"scheme": 1}],
)
def test_a_matrix_is_what_a_matrix_can_be(copied, change):
    edit(copied, lambda manifest: manifest["matrices"]["model.layers.0.a"].update(change))
    refuses(copied, MANIFEST, "matrix 'model.layers.0.a' is malformed")


@pytest.mark.parametrize(
    "entry",
    [{"name_or_path": 1, "revision": None}, {"name_or_path": "a", "revision": 2}, {"name_or_path": "a"}, "a", [1]],
)
def test_a_base_model_has_a_name_and_a_revision(copied, entry):
    edit(copied, lambda manifest: manifest.update(base_model=entry))
    refuses(copied, MANIFEST, "malformed")


def test_a_manifest_is_sealed(copied):
    text = (copied / MANIFEST).read_text()
    (copied / MANIFEST).write_text(text.replace('"a test"', '"a text"'))
    refuses(copied, MANIFEST, "damaged or was changed")
    (copied / MANIFEST).write_text(text.replace('"seal"', '"zeal"'))
    refuses(copied, MANIFEST, "damaged or was changed")


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
def test_a_companion_that_was_added_is_refused_until_it_is_accepted(copied, name):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("{}")
    refuses(copied, name, "was not there when the store was made")
    assert accept_companions(copied) == [name]
    assert name in Store(copied).companions


@pytest.mark.parametrize("name", ["../x.json", "/etc/hostname", "a/../../x"])
def test_companions_lie_inside_the_store(copied, name):
    edit(copied, lambda manifest: manifest.update(companions={name: [1]}))
    refuses(copied, MANIFEST, "is no path inside the store")
