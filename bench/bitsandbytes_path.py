"""The two ways in which bitsandbytes decodes NF4 on a CPU: by AVX-512, or one weight after another.

Its library asks the processor once and keeps the answer in static variables; no setting changes it. So that both ways
can be timed on one machine, ``without_avx512`` overwrites those variables. As a script it trains as
``mebp_triton.cli.peft_baseline`` does, on the second way:

    python bench/bitsandbytes_path.py SETTINGS
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASKED = "has_avx512f_cpu"
GUARD = "_ZGV"  # begins the name of a variable that tells whether another one has been set


def _library() -> ctypes.CDLL:
    from bitsandbytes.cextension import lib

    return lib._lib


def path() -> str | None:
    """The way that bitsandbytes takes here: "avx512" or "scalar"; None where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    asked = getattr(_library(), ASKED)
    asked.restype = ctypes.c_bool
    return "avx512" if asked() else "scalar"


@functools.cache
def symbols(file: Path) -> dict[str, int]:
    """Names and addresses in the symbol table of a 64-bit ELF file; empty where it was stripped."""
    data = file.read_bytes()
    (start,), (size, count) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + size * index) for index in range(count)]
    found = {}
    for _, kind, _, _, offset, length, link, _, _, step in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for place in range(offset, offset + length, step):
            name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", data, place)
            found[data[names + name : data.index(b"\0", names + name)].decode()] = value
    return found


@contextmanager
def without_avx512() -> Iterator[None]:
    """While active, bitsandbytes decodes as on a processor without AVX-512.

    Raises:
        RuntimeError: the library has no names for the variables.
    """
    library = _library()
    known = symbols(Path(library._name))
    variables = {name: value for name, value in known.items() if "has_avx512" in name and name.startswith("_Z")}
    if not variables or ASKED not in known:
        raise RuntimeError(f"{library._name} does not name what it knows of the processor: its path cannot be chosen")
    address = ctypes.cast(getattr(library, ASKED), ctypes.c_void_p).value
    assert address is not None
    bytes_of = {name: ctypes.c_uint8.from_address(address - known[ASKED] + value) for name, value in variables.items()}
    before = {name: variable.value for name, variable in bytes_of.items()}
    try:
        for name, variable in bytes_of.items():
            variable.value = name.startswith(GUARD)
        yield
    finally:
        for name, variable in bytes_of.items():
            variable.value = before[name]


def main() -> None:
    from mebp_triton.cli.peft_baseline import train

    with without_avx512():
        print(json.dumps(train(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
