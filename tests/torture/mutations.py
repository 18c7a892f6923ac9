"""Ways to bend a file at random: its bytes, its JSON, a safetensors or GGUF header, or something else in its place."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = 4096


@dataclass(frozen=True)
class Mutation:
    """One way to bend a file.

    Attributes:
        apply: bends a file, by a random draw.
        takes: whether it can bend a file.
        forges: whether the checksums that cover the file match afterwards.
        changes_others: whether it changes files beside the given one.
    """

    name: str
    apply: Callable[[Path, random.Random], None]
    takes: Callable[[Path], bool] = lambda path: True
    forges: bool = False
    changes_others: bool = False


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".log") and path.stat().st_size > 2


def _is_jsonl(path: Path) -> bool:
    return path.suffix == ".jsonl"


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


# --- bytes ----------------------------------------------------------------------------------------------------------


def flip_bit(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_bits_in_front(path: Path, draw: random.Random) -> None:
    """Flips several bits within the first 512 bytes, where headers lie."""
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(min(len(data), 512))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def overwrite(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    length = min(draw.choice((1, 4, 8, 64)), len(data) - start)
    data[start : start + length] = draw.randbytes(length)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    size = path.stat().st_size
    os.truncate(path, draw.choice((0, 1, 7, 8, size - 1, size // 2, draw.randrange(size))) % size)


def extend(path: Path, draw: random.Random) -> None:
    length = draw.choice((1, 8, 64, PAGE))
    with open(path, "ab") as file:
        file.write(draw.choice((bytes(length), draw.randbytes(length), b" " * length)))


def zero_page(path: Path, draw: random.Random) -> None:
    """Zeros a page, as a file system may after a crash; in a small file, an eighth of it."""
    data = bytearray(path.read_bytes())
    length = min(PAGE, max(len(data) // 8, 1))
    start = draw.randrange(0, max(len(data) - length, 1))
    data[start : start + length] = bytes(length)
    path.write_bytes(data)


def remove_bytes(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    start = draw.randrange(len(data))
    path.write_bytes(data[:start] + data[start + draw.choice((1, 3, 16, PAGE)) :])


def repeat(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() * 2)


# --- something else in place of a file --------------------------------------------------------------------------------


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def directory_instead(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def fifo_instead(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def link_instead(path: Path, draw: random.Random) -> None:
    """Puts a link there: to nothing, to itself, to a device without end, or to another file of the directory."""
    others = [other.name for other in sorted(path.parent.iterdir()) if other != path and other.is_file()]
    target = draw.choice(["nothing", path.name, "/dev/zero", "/dev/full", *others[:4]])
    path.unlink()
    path.symlink_to(target)


def swap(path: Path, draw: random.Random) -> None:
    others = [
        other
        for other in sorted(path.parent.iterdir())
        if other != path and other.is_file() and other.suffix == path.suffix
    ]
    other = draw.choice(others)
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def add(path: Path, draw: random.Random) -> None:
    """Adds a file beside it that transformers would read, and that was not there."""
    names = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
    lacking = [name for name in names if not (path.parent / name).exists()]
    name = draw.choice(lacking)
    texts = ("{}", '{"eos_token": "a"}', "[]", "") if name.endswith(".json") else ("{{ messages }}", "")
    (path.parent / name).write_text(draw.choice(texts))


def _has_other(path: Path) -> bool:
    return any(other != path and other.is_file() and other.suffix == path.suffix for other in path.parent.iterdir())


# --- JSON -----------------------------------------------------------------------------------------------------------

MARK = "@hostile@"
HOSTILE = [
    *("null", "true", "false", "0", "1", "-1", "1.5", "-0.0", "1e308", "1e999", "NaN", "Infinity", "-Infinity"),
    *(str(1 << power) for power in (16, 31, 32, 40, 63, 64)),
    *("1" + "0" * 400, "1" + "0" * 5000),
    *('""', '"0"', '"../../etc/passwd"', '"/etc/passwd"', r'"a\u0000b"', r'"\ud800"', '"' + "x" * 100_000 + '"'),
    *("[]", "{}", "[[]]", "[null]", '[1, "a"]', "[" * 50_000 + "]" * 50_000, '{"a":' * 3000 + "1" + "}" * 3000),
    *('"(a+)+$"', r'"((.*)*)*x"', r'".*(.*)*(\\w+)*$"', '"model.layers"', '"os.system"'),
]


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    if isinstance(value, dict):
        found += [place for key, item in value.items() for place in _places(item, (*at, key))]
    if isinstance(value, list):
        found += [place for index, item in enumerate(value[:50]) for place in _places(item, (*at, index))]
    return found


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value


def bend_json(text: str, draw: random.Random) -> str:
    """Replaces, removes, repeats, renames, exchanges or slightly changes one value."""
    value = json.loads(text)
    places = _places(value)
    if not places:
        return draw.choice(HOSTILE)
    place = draw.choice(places)
    # Otherwise long lists, such as a vocabulary, would take nearly all draws.
    place = draw.choice([place, draw.choice([one for one in places if len(one) <= 2])])
    holder, key = _at(value, place[:-1]), place[-1]
    way = draw.choice(("hostile", "hostile", "hostile", "nudge", "nudge", "delete", "repeat", "rename", "exchange"))
    if way == "nudge" and type(holder[key]) in (int, float):
        holder[key] = draw.choice((holder[key] + 1, holder[key] - 1, holder[key] * 2, -holder[key], float(holder[key])))
        return json.dumps(value)
    if way == "delete":
        del holder[key]
        return json.dumps(value)
    if way == "rename" and isinstance(holder, dict):
        holder[draw.choice((key + "x", key[1:], "../" + key, key.upper()))] = holder.pop(key)
        return json.dumps(value)
    if way == "exchange":
        other = draw.choice(places)
        its, mine = _at(value, other), holder[key]
        if not (place[: len(other)] == other or other[: len(place)] == place):
            holder[key] = its
            _at(value, other[:-1])[other[-1]] = mine
        return json.dumps(value)
    if way == "repeat" and isinstance(holder, dict):
        its = json.dumps(holder[key])
        holder[key] = MARK
        twice = f"{its}, {json.dumps(key)}: {draw.choice((its, draw.choice(HOSTILE)))}"
        return json.dumps(value).replace(json.dumps(MARK), twice, 1)
    holder[key] = MARK
    return json.dumps(value).replace(json.dumps(MARK), draw.choice(HOSTILE), 1)


def json_value(path: Path, draw: random.Random) -> None:
    path.write_text(bend_json(path.read_text(), draw), errors="surrogatepass")


def json_document(path: Path, draw: random.Random) -> None:
    path.write_text(draw.choice([*HOSTILE, "", "{", "\ufeff{}", "[1]", '{"a": 1, "a": 2}', "// {}"]))


def json_line(path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines()
    place = draw.randrange(len(lines))
    lines[place] = draw.choice((bend_json(lines[place], draw), draw.choice(HOSTILE), lines[place][:-3], ""))
    path.write_text("\n".join(lines) + "\n")


def text_lines(path: Path, draw: random.Random) -> None:
    """Exchanges or repeats a line, or replaces it by one that YAML or a template treats specially."""
    lines = path.read_text().splitlines() or [""]
    bombs = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    bombs += [f"{new}: &{new} [{', '.join(['*' + old] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    special = ["!!python/object/apply:os.system ['touch /tmp/x']", "? [a, b]\n: 1", "<<: {lora_r: 3}", "lora_r: [1"]
    special += ["lora_r: 2", "lora_r: *a", "{% for i in range(100000) %}x{% endfor %}", "{{ ''.__class__.__mro__ }}"]
    special += ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "\x00", "[" * 5000, "\n".join([*bombs, "lora_r: *i"])]
    place = draw.randrange(len(lines))
    lines[place] = draw.choice((lines[place] * 2, lines[place] + "\n" + lines[place], draw.choice(special)))
    path.write_text("\n".join(lines) + "\n")


# --- safetensors ----------------------------------------------------------------------------------------------------


def _split(path: Path) -> tuple[str, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length].decode(), data[8 + length :]


def _join(path: Path, header: str, data: bytes, length: int | None = None) -> None:
    raw = header.encode(errors="surrogatepass")
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(((len(raw) if length is None else length) % (1 << 64)).to_bytes(8, "little") + raw + data)


def header_length(path: Path, draw: random.Random) -> None:
    header, data = _split(path)
    size = path.stat().st_size
    hostile = (0, 1, 2, len(header) - 1, len(header) + 1, size - 8, size, 1 << 26, 1 << 31, 1 << 40, 1 << 63, -1)
    _join(path, header, data, draw.choice(hostile))


def header_value(path: Path, draw: random.Random) -> None:
    header, data = _split(path)
    _join(path, bend_json(header, draw), data)


def header_offsets(path: Path, draw: random.Random) -> None:
    """Makes a tensor's offsets, shape or dtype wrong: overlapping, negative, reversed, far outside, ..."""
    header, data = _split(path)
    value = json.loads(header)
    names = [name for name in value if name != "__metadata__"]
    name = draw.choice(names)
    begin, end = value[name]["data_offsets"]
    size = end - begin
    ways = [
        {"data_offsets": [0, size]},
        {"data_offsets": [begin - size, begin]},
        {"data_offsets": [end, begin]},
        {"data_offsets": [-size, 0]},
        {"data_offsets": [len(data), len(data) + size]},
        {"data_offsets": [1 << 62, (1 << 62) + size]},
        {"data_offsets": [begin, end + 1]},
        {"shape": [1 << 32, 1 << 32]},
        {"shape": [-1, -size]},
        {"shape": [0], "data_offsets": [begin, begin]},
        {"shape": [float(length) for length in value[name]["shape"]]},
        {"shape": [*value[name]["shape"], 1]},
        {"shape": value[name]["shape"][::-1]},
        {"dtype": draw.choice(("F64", "F32", "F16", "BF16", "U8", "I8", "BOOL", "I64", "F8_E4M3", "C64", "", "f32"))},
    ]
    value[name] |= draw.choice(ways)
    _join(path, json.dumps(value), data)


def header_names(path: Path, draw: random.Random) -> None:
    """Renames a tensor to a path or an odd name, lists one twice, or adds an empty one whose other sides are huge."""
    header, data = _split(path)
    value = json.loads(header)
    name = draw.choice([name for name in value if name != "__metadata__"])
    new = draw.choice(("../../x", "/etc/passwd", "", "x\0y", "__metadata__", name + ".weight", "a" * 70_000))
    way = draw.choice(("rename", "add", "empty", "twice", "metadata"))
    if way == "rename":
        value = {new if key == name else key: item for key, item in value.items()}
    if way == "add":
        value[new] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    if way == "empty":
        sides = draw.choice(([1 << 62], [1 << 62, 1 << 62], [1 << 63], [1 << 70]))
        value[draw.choice((new, "x"))] = {"dtype": "F32", "shape": [0, *sides], "data_offsets": [0, 0]}
    if way == "metadata":
        value["__metadata__"] = draw.choice(([], "x", {"format": 1}, {"format": "tf"}, {"a": {"b": "c"}}, None))
    text = json.dumps(value)
    if way == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(value[name])}}}"
    _join(path, text, data)


FLOATS = {"F16": ("<e", 2), "F32": ("<f", 4), "F64": ("<d", 8)}


def numbers(path: Path, draw: random.Random) -> None:
    """Puts NaN, infinity, a negative zero or the largest number in place of one or all numbers of a float tensor."""
    header, data = _split(path)
    value = json.loads(header)
    wanted = {name: item for name, item in value.items() if name != "__metadata__" and item["dtype"] in FLOATS}
    wanted = {name: item for name, item in wanted.items() if item["data_offsets"][1] > item["data_offsets"][0]}
    if not wanted:
        return
    item = wanted[draw.choice(sorted(wanted))]
    begin, end = item["data_offsets"]
    form, size = FLOATS[item["dtype"]]
    largest = {"F16": 65504.0, "F32": 3.4e38, "F64": 1.7e308}[item["dtype"]]
    number = struct.pack(form, draw.choice((float("nan"), float("inf"), -float("inf"), -0.0, largest)))
    changed = bytearray(data)
    count = (end - begin) // size
    for place in [draw.randrange(count)] if draw.random() < 0.7 else range(count):
        changed[begin + place * size : begin + (place + 1) * size] = number
    _join(path, header, bytes(changed))


# --- GGUF -----------------------------------------------------------------------------------------------------------


def _gguf_header_size(data: bytes) -> int:
    return data.rfind(b"ffn_up.weight") + 64


def gguf_number(path: Path, draw: random.Random) -> None:
    """Turns two, four or eight bytes of the header into a number that a reader may trip over."""
    data = bytearray(path.read_bytes())
    place = draw.randrange(4, _gguf_header_size(data))
    size = draw.choice((2, 4, 8))
    number = draw.choice((0, 1, 2, 255, 1 << 15, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40, 1 << 63, -1))
    data[place : place + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
    path.write_bytes(data)


def gguf_setting(path: Path, draw: random.Random) -> None:
    """Changes the number or the count that belongs to a key."""
    data = bytearray(path.read_bytes())
    keys = [b"llama.block_count", b"llama.embedding_length", b"llama.attention.head_count", b"llama.vocab_size"]
    keys += [b"llama.context_length", b"llama.feed_forward_length", b"llama.attention.head_count_kv"]
    keys += [b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges", b"general.alignment"]
    keys += [b"tokenizer.ggml.token_type", b"llama.attention.layer_norm_rms_epsilon"]
    keys += [b"split.no", b"split.count", b"split.tensors.count"]
    key = draw.choice([key for key in keys if key in data])
    place = data.find(key) + len(key)
    place += draw.choice((0, 4, 4, 4, 8))
    number = draw.choice((0, 1, 3, 7, 1 << 8, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1))
    data[place : place + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)


def gguf_numbers(path: Path, draw: random.Random) -> None:
    """Puts NaN or infinity, as float16 or float32, somewhere into the data."""
    data = bytearray(path.read_bytes())
    start = _gguf_header_size(data)
    place = draw.randrange(start, len(data) - 4) & ~1
    number = draw.choice((b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"))
    data[place : place + len(number)] = number
    path.write_bytes(data)


# --- forged checksums -----------------------------------------------------------------------------------------------


def forge(path: Path) -> None:
    """Makes the checksums match the files again, as somebody would who wants the files believed."""
    from mebp_triton.system import reading, strict_json

    manifest, state = path.parent / "manifest.json", path.parent / "state.json"
    if manifest.exists():
        value = json.loads(manifest.read_text())
        for name, entry in value["files"].items():
            if (path.parent / name).is_file():
                entry["bytes"] = (path.parent / name).stat().st_size
                entry["crc32"] = reading.file_checksums(path.parent / name)
        manifest.write_text(json.dumps(strict_json.sealed(value)))
    if state.exists():
        value = json.loads(state.read_text())
        for name in value["crc32"]:
            value["crc32"][name] = reading.file_checksums(path.parent / name)
        state.write_text(json.dumps(strict_json.sealed(value)))


def forging(bend: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    def apply(path: Path, draw: random.Random) -> None:
        bend(path, draw)
        forge(path)

    return apply


def forged_json(path: Path, draw: random.Random) -> None:
    """Changes a value of a sealed file, and renews the seal where that is possible."""
    from mebp_triton.system import strict_json

    text = bend_json(path.read_text(), draw)
    try:
        value = json.loads(text)
        text = json.dumps(strict_json.sealed(value)) if isinstance(value, dict) else text
    except (ValueError, RecursionError, TypeError):
        pass
    path.write_text(text, errors="surrogatepass")


def _has_checksum(path: Path) -> bool:
    beside = (path.parent / "manifest.json").exists() or (path.parent / "state.json").exists()
    return _is_safetensors(path) and beside


def _is_sealed(path: Path) -> bool:
    return path.name == "manifest.json" or (path.name == "state.json" and path.parent.name == "checkpoint")


MUTATIONS = [
    Mutation("a bit flipped", flip_bit),
    Mutation("bits flipped in front", flip_bits_in_front),
    Mutation("bytes overwritten", overwrite),
    Mutation("truncated", truncate),
    Mutation("extended", extend),
    Mutation("a page of zeros", zero_page),
    Mutation("bytes removed", remove_bytes),
    Mutation("written twice", repeat),
    Mutation("removed", remove),
    Mutation("a directory instead", directory_instead),
    Mutation("a FIFO instead", fifo_instead),
    Mutation("a link instead", link_instead),
    Mutation("two files exchanged", swap, _has_other, changes_others=True),
    Mutation("a file added", add, lambda path: path.name == "manifest.json", changes_others=True),
    *[Mutation("JSON value", json_value, _is_json)] * 4,
    Mutation("JSON document", json_document, _is_json),
    Mutation("JSON line", json_line, _is_jsonl),
    Mutation("lines of text", text_lines, lambda path: path.suffix in (".yaml", ".txt", ".jinja")),
    Mutation("header length", header_length, _is_safetensors),
    Mutation("header value", header_value, _is_safetensors),
    Mutation("header offsets", header_offsets, _is_safetensors),
    Mutation("header names", header_names, _is_safetensors),
    Mutation("NaN and others", numbers, _is_safetensors),
    Mutation("forged: header value", forging(header_value), _has_checksum, forges=True),
    Mutation("forged: header offsets", forging(header_offsets), _has_checksum, forges=True),
    Mutation("forged: header names", forging(header_names), _has_checksum, forges=True),
    Mutation("forged: NaN and others", forging(numbers), _has_checksum, forges=True),
    Mutation("forged: a bit flipped", forging(flip_bit), _has_checksum, forges=True),
    Mutation("forged: JSON value", forged_json, _is_sealed, forges=True),
    Mutation("GGUF number", gguf_number, _is_gguf),
    Mutation("GGUF setting", gguf_setting, _is_gguf),
    Mutation("GGUF setting", gguf_setting, _is_gguf),
    Mutation("GGUF NaN and others", gguf_numbers, _is_gguf),
]
