"""Copies a bitsandbytes wheel and leaves one of its CUDA libraries in it, for a machine that gets it by hand.

    python bench/one_cuda_wheel.py bitsandbytes-0.50.0-py3-none-manylinux_2_24_x86_64.whl 130 OUTPUT_DIRECTORY

With all its libraries a wheel is ten times as large. The number is the CUDA version without its point: 130 for 13.0.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(cuda|rocm|xpu)(\d*).*\.(so|dll|dylib)$")


def strip(wheel: Path, cuda: str, output: Path) -> Path:
    """Writes the smaller wheel into ``output``; returns its path.

    Raises:
        ValueError: the wheel has no library for that version of CUDA; the message names those it has.
    """
    target = output / wheel.name
    if target.resolve() == wheel.resolve():
        raise ValueError(f"{output} is where {wheel.name} lies: name another directory")
    with zipfile.ZipFile(wheel) as source:
        libraries = {name: found for name in source.namelist() if (found := LIBRARY.match(name))}
        gone = {name for name, found in libraries.items() if found[1] != "cuda" or found[2] != cuda}
        if len(gone) == len(libraries):
            versions = sorted(found[2] for found in libraries.values() if found[1] == "cuda")
            raise ValueError(f"{wheel.name} has no library for CUDA {cuda!r}, only for {', '.join(versions) or 'none'}")
        output.mkdir(parents=True, exist_ok=True)
        try:
            _copy(source, target, gone)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return target


def _copy(source: zipfile.ZipFile, target: Path, gone: set[str]) -> None:
    """Writes ``source`` without the files ``gone``, which its record does not name any more."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        for item in source.infolist():
            if item.filename in gone:
                continue
            data = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                kept = [line for line in data.decode().splitlines() if line.split(",")[0] not in gone]
                data = ("\n".join(kept) + "\n").encode()
            made.writestr(item, data)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("cuda", help="for example 130")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args(given)
    try:
        target = strip(arguments.wheel, arguments.cuda, arguments.output)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        parser.error(str(error) if str(arguments.wheel.name) in str(error) else f"{arguments.wheel}: {error}")
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB, of {arguments.wheel.stat().st_size / 2**20:.1f}")


if __name__ == "__main__":
    main()
