"""A wheel with one of its CUDA libraries."""

import importlib
import zipfile

import pytest

NAMES = ("cpu", "cuda118", "cuda130", "rocm72", "xpu2026")


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    files = {f"bitsandbytes/libbitsandbytes_{name}.so": name for name in NAMES} | {"bitsandbytes/__init__.py": "x = 1"}
    record = "".join(f"{name},sha256=x,1\n" for name in [*files, "bitsandbytes-1.dist-info/RECORD"])
    with zipfile.ZipFile(path, "w") as made:
        for name, content in (files | {"bitsandbytes-1.dist-info/RECORD": record}).items():
            made.writestr(name, content)
    return path


@pytest.fixture
def tool(bench_path):
    return importlib.import_module("one_cuda_wheel")


def test_the_other_libraries_are_gone_from_the_wheel_and_its_record(tool, wheel, tmp_path):
    with zipfile.ZipFile(tool.strip(wheel, "130", tmp_path / "out")) as made:
        names = set(made.namelist())
        record = made.read("bitsandbytes-1.dist-info/RECORD").decode()
        assert made.testzip() is None and made.read("bitsandbytes/__init__.py") == b"x = 1"
    kept = {"bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so"}
    assert names == kept | {"bitsandbytes/__init__.py", "bitsandbytes-1.dist-info/RECORD"}
    assert {line.split(",")[0] for line in record.splitlines()} == names


def test_a_version_that_is_not_there_is_refused_and_nothing_written(tool, wheel, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(wheel), "13", str(tmp_path / "out")])
    assert "has no library for CUDA '13', only for 118, 130" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="name another directory"):
        tool.strip(wheel, "130", tmp_path)


def test_a_wheel_that_is_none_is_named(tool, tmp_path, capsys):
    (tmp_path / "text.whl").write_text("no zip")
    with pytest.raises(SystemExit) as ended:
        tool.main([str(tmp_path / "text.whl"), "130", str(tmp_path / "out")])
    assert ended.value.code == 2 and "text.whl: File is not a zip file" in capsys.readouterr().err


def test_a_damaged_wheel_leaves_nothing_behind(tool, wheel, tmp_path):
    content = wheel.read_bytes()
    wheel.write_bytes(content.replace(b"x = 1", b"x = 2"))  # its checksum is the old one's
    with pytest.raises(zipfile.BadZipFile):
        tool.strip(wheel, "130", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
