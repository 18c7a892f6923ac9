"""JSON that is strict, and seals that tell every change."""

import pytest

from mebp_triton.system.errors import FileError
from mebp_triton.system.strict_json import parse_json, read_json, read_sealed, sealed, write_json


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
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_a_seal_tells_every_change(tmp_path):
    value = {"step": 4, "ratio": 1.0, "names": ["a", None, True], "deep": {"x": -0.0, "y": 1e-30}}
    path = tmp_path / "state.json"
    write_json(path, sealed(value))
    assert read_sealed(path) == value
    text = path.read_text()
    for old, new in (("4", "5"), ("1.0", "1"), ("-0.0", "0.0"), ("null", "false"), ('"a"', '"b"'), ("deep", "weep")):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(FileError, match="damaged or was changed"):
            read_sealed(path)
    for seal in ({}, {"SEAL": 1}, {"seal": None}, {"seal": True}, {"seal": str(sealed(value)["seal"])}):
        write_json(path, value | seal)
        with pytest.raises(FileError, match="damaged or was changed"):
            read_sealed(path)
    path.write_text("[1]")
    with pytest.raises(FileError, match="wanted an object"):
        read_sealed(path)
