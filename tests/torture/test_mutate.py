"""Mutation testing: the faults that are put in, and a short run."""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mutants(scripts):
    from mutants import mutants

    return mutants


def changes(mutants, source):
    return {(mutant.kind, mutant.before, mutant.after) for mutant in mutants(ast.parse(source))}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", {("comparison", "a < b", "a <= b"), ("comparison", "a < b", "a > b")}),
        ("x = a + b", {("operator", "a + b", "a - b")}),
        ("x = a @ b", {("operands", "a @ b", "b @ a")}),
        ("x = not a", {("unary", "not a", "a")}),
        ("x = a and b", {("boolean", "a and b", other) for other in ("a or b", "a", "b")}),
        ("x = True", {("constant", "True", "False")}),
        ("x = 3", {("constant", "3", "4"), ("constant", "3", "2")}),
        ("x = f(a, b)", {("arguments", "f(a, b)", "f(b, a)")}),
        ("x = a.f()", {("method", "a.f()", "a")}),
        ("x = f(a=b)", {("keyword", "a=b", "")}),
        ("x = zip(a, b, strict=True)", {("arguments", "zip(a, b, strict=True)", "zip(b, a, strict=True)")}),
        ("x = a[b:]", {("slice", "b", "")}),
        ("x = a if b else c", {("condition", "a if b else c", "a"), ("condition", "a if b else c", "c"),
                               ("condition", "b", "not b")}),
        ("a.x = b", {("statement", "a.x = b", "pass")}),
        ("raise E", {("statement", "raise E", "pass")}),
        ("with a:\n b", {("context", "a", "__import__('contextlib').nullcontext()"), ("statement", "b", "pass")}),
        ("@d\ndef f(): pass", {("decorator", "d", "")}),
        ("def f(): return a", {("return", "return a", "return None")}),
        ("assert a < 1", set()),
        ("x: 'a + 1' = b\n'text'\nraise E(f'{a + 1}')", {("statement", "raise E(f'{a + 1}')", "pass")}),
    ],
)  # fmt: skip
def test_faults(mutants, source, expected):
    assert changes(mutants, source) == expected


def test_every_mutant_differs_has_a_name_of_its_own_and_compiles(mutants):
    for path in (ROOT / "kernels" / "layout.py", ROOT / "mebp_triton" / "layers" / "lora_config.py"):
        source = path.read_text()
        made = mutants(ast.parse(source))
        assert len(made) > 100 and Counter(mutant.key for mutant in made).most_common(1)[0][1] == 1
        whole = ast.dump(ast.parse(source))
        for place in range(0, len(made), 40):
            tree = ast.parse(source)
            mutant = mutants(tree)[place]
            mutant.put_in()
            assert ast.dump(tree) != whole, mutant
            compile(tree, str(path), "exec")


def test_the_groups_name_files_that_exist(scripts):
    from mutate import GROUPS

    for group in GROUPS.values():
        assert not [name for name in group.sources if not (ROOT / name).exists()]
        assert not [name for name in group.tests if not (ROOT / "tests" / name).exists()]


def test_a_short_run(tmp_path):
    """Two files that import no torch have faults in functions, and faults that run when they are imported."""
    sources, output = ["mebp_triton/system/units.py", "mebp_triton/system/strict_json.py"], tmp_path / "result.json"
    before = [(ROOT / name).read_bytes() for name in sources]
    command = [sys.executable, ROOT / "tests" / "torture" / "mutate.py", "--sources", *sources]
    command += ["--tests", "system/test_units.py", "system/test_strict_json.py"]
    command += ["--count", "16", "--seed", "1", "--jobs", "1", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())["groups"]["own"]
    assert found["tried"] == 16 == found["killed"] + found["timed_out"] + found["survived"]
    assert found["killed"] > 8 and len(found["survivors"]) == found["survived"]
    assert [(ROOT / name).read_bytes() for name in sources] == before
