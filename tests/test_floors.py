"""The house rules, read off the sources: imports go down only, no file can run code, every module has its test."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kernels": "mebp_triton.kernels", "autotune": "mebp_triton.autotune", "mebp_triton": "mebp_triton"}
SOURCES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TREES = {path: ast.parse((ROOT / path).read_text()) for path in SOURCES}

# Modules without a test of the same name, and why.
TESTED_ELSEWHERE = {
    **{
        f"mebp_triton/commands/{name}.py": "what the commands do is tested through the command, in test_cli"
        for name in ("common", "demo", "doctor", "eval", "generate", "quantize", "train", "verify")
    },
    "mebp_triton/peer.py": "transformers + PEFT for comparison; test_trainer holds our steps against the same loop",
}
# What pyproject.toml calls by another name than Python does, and what our dependencies themselves depend on.
IMPORT_NAMES = {"pyyaml": "yaml"}
COMES_WITH = {
    "jinja2": "torch",
    "regex": "transformers",
    "tokenizers": "transformers",
    "huggingface_hub": "transformers",
    "pyarrow": "datasets",
}
ONLY_WITHIN_FUNCTIONS = {"gguf", "matplotlib", "peft", "accelerate", "bitsandbytes", "datasets", "pyarrow"}


def module_name(path):
    """As it is installed: kernels/ops.py is mebp_triton.kernels.ops."""
    parts = [FOLDERS[path.parts[0]], *path.with_suffix("").parts[1:]]
    return ".".join(part for part in parts if part != "__init__")


def imports(path, tree=None):
    """Absolute names of all that a file imports, anywhere in it, with the line."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(TREES[path] if tree is None else tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            yield source, node.lineno
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


def wrong_imports(path):
    """What this file must not import."""
    name = module_name(path)
    for imported, line in imports(path):
        root = imported.partition(".")[0]
        if path.parts[0] == "kernels":
            outside = sys.stdlib_module_names | {"torch", "triton"}
            fine = root in outside or within(imported, "mebp_triton.kernels")
        elif path.parts[0] == "autotune":
            floors = ("mebp_triton.kernels", "mebp_triton.autotune")
            outside = sys.stdlib_module_names | {"torch", "triton", "filelock", "matplotlib"}
            fine = root in outside or any(within(imported, f) for f in floors)
        else:
            fine = root not in {"tests", "bench", "pytest", "support", "models", "runs"}
            if within(imported, "mebp_triton.autotune"):
                fine = name == "mebp_triton.commands.tune"
        if not fine or root in ("kernels", "autotune"):
            yield f"{path}:{line} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_down_only(path):
    # `from mebp_triton.kernels import x` also reads as importing the package above it: that is no import of its own.
    assert not [line for line in wrong_imports(path) if not line.endswith(" imports mebp_triton")]


def test_the_rule_sees_what_is_wrong():
    """Planted imports, each in the floor where it is forbidden."""
    for folder, text in (
        ("kernels", "from mebp_triton.lora import LoraConfig"),
        ("kernels", "from ..lora import LoraConfig"),
        ("kernels", "def f():\n    import transformers"),
        ("kernels", "from mebp_triton.autotune import static"),
        ("autotune", "from mebp_triton import trainer"),
        ("autotune", "import kernels.ops"),
        ("kernels", "import filelock"),
        ("autotune", "import transformers"),
        ("mebp_triton", "from tests.models import tiny_store"),
        ("mebp_triton", "def f():\n    from .autotune import static"),
        ("mebp_triton", "from kernels import ops"),
    ):
        path = Path(folder) / "planted.py"
        TREES[path] = ast.parse(text)
        try:
            assert list(wrong_imports(path)), text
        finally:
            del TREES[path]


def declared():
    """Import names of the dependencies in pyproject.toml, optional ones included, without those for tests."""
    text = (ROOT / "pyproject.toml").read_text()
    project = text[text.index("dependencies = [") : text.index("test = [")]
    names = [re.split(r"[<>=\[;~! ]", entry)[0].lower() for entry in re.findall(r'"([^"]+)"', project)]
    return {IMPORT_NAMES.get(name, name) for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_import_is_a_declared_dependency(path):
    known = declared() | set(sys.stdlib_module_names) | {"mebp_triton"}
    for imported, line in imports(path):
        root = imported.partition(".")[0]
        assert root in known or COMES_WITH.get(root) in known, f"{path}:{line} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_optional_packages_are_imported_only_where_they_are_used(path):
    top = ast.Module([node for node in TREES[path].body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
    assert not [name for name, _ in imports(path, top) if name.partition(".")[0] in ONLY_WITHIN_FUNCTIONS]


# --- nothing runs what a file says ----------------------------------------------------------------------------------

RUN_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "os.system", "os.popen"}
UNSAFE_YAML = {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_file_can_make_us_run_code(path):
    text = (ROOT / path).read_text()
    assert not [name for name, _ in imports(path) if name.partition(".")[0] in RUN_CODE]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in CALLS | UNSAFE_YAML, f"{path}:{node.lineno} calls {called}"
            if re.search(r"\bAuto\w+\.from_(pretrained|config)$", called):
                named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if None in named:  # **options: said where they are made
                    named |= {"trust_remote_code": "False"} if '"trust_remote_code": False' in text else {}
                # Without it transformers asks at the terminal whether to run the checkpoint's code.
                assert named.get("trust_remote_code") == "False", f"{path}:{node.lineno}: {called} without it"
            for keyword in node.keywords:
                told = keyword.arg == "shell" and ast.unparse(keyword.value) != "False"
                assert not told, f"{path}:{node.lineno} uses a shell"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_error_is_swallowed_whole(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
            silent = all(isinstance(line, ast.Pass) for line in node.body)
            assert not (silent and ast.unparse(node.type) in ("Exception", "BaseException")), f"{path}:{node.lineno}"


# --- every module has its test --------------------------------------------------------------------------------------


def test_of(path):
    inside = path.parts[1:-1] if path.parts[0] == "mebp_triton" else path.parts[:-1]
    return Path("tests", *inside, f"test_{path.name}")


test_of.__test__ = False  # pytest would take it for a test


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=str)
def test_every_module_has_a_test_of_its_name(path):
    if str(path) in TESTED_ELSEWHERE:
        assert not (ROOT / test_of(path)).exists(), "no exception any more"
        pytest.skip(TESTED_ELSEWHERE[str(path)])
    assert (ROOT / test_of(path)).exists(), f"{test_of(path)} is missing"


def test_no_exception_is_left_over():
    assert not [name for name in TESTED_ELSEWHERE if not (ROOT / name).exists()]


def test_tests_are_no_package_and_no_conftest_lies_at_the_root():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


def test_both_mapped_folders_are_flat_packages():
    for folder in ("kernels", "autotune"):
        assert (ROOT / folder / "__init__.py").exists()
        assert not [path for path in (ROOT / folder).rglob("*.py") if path.parent != ROOT / folder]
