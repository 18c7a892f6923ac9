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

# The rooms from the ground up, and the files of each from the ground up. A file may import what stands before it here:
# files of lower rooms, and earlier files of its own. docs/architecture.md says what each room knows.
FLOORS = {
    "kernels": """names layout decode running_softmax split reference configs softmax_tile bitsandbytes accuracy launch
        quantize tables matmul matmul_dx embedding panel cross_entropy routing ops functions""",
    "autotune": "sass shapes cost_model space compile timing ceilings log rank measure results tune report",
    "layers": "lora_config lora_function int4_module linear shared_input deferred_logits head loss",
    "system": """errors foreign_errors units temporaries random_state reading atomic strict_json safetensors_file mapped_file
        scratch memory machine storage signals""",
    "store": """residency waiting dynamic8 block_inputs optimizer_state manifest reader pages arena placement table_rows""",
    "data": "tokenized text chat rows sources batching packing loading",
    "blocks": "options runner call leaks replay recompute backward mlp_chunks hooks selection engine",
    "models": "skeleton config names adapter saving build discover load",
    "huggingface": "int4_config peft_layer bitsandbytes_layers model_layers quantizer replace selection_callback",
    "convert": """companions readers.source readers.gguf_header readers.gguf readers.safetensors_dir readers.bitsandbytes
        readers.int4_dir readers.merged_store readers writers.store writers.model_directory quantize merge""",
    "training": """processes nonfinite optimizers.schedules optimizers.mezo optimizers.adamw evaluation settings
        run_settings settings_file plots run_directory plan.live_bytes plan.inventory plan.traced_model plan.phases
        plan.planner step updates checkpoint trainer finetune gradient_check""",
    "cli": """console flags inference peft_baseline doctor.advice doctor.findings commands.quantize commands.verify
        commands.eval commands.generate commands.merge planning commands.plan commands.tune training_run commands.train
        commands.doctor commands.demo parser main __main__""",
}
ORDER = [f"mebp_triton.{room}.{file}" for room, files in FLOORS.items() for file in files.split()]
# What each folder may import besides the standard library and the rooms below.
OUTSIDE = {"kernels": {"torch", "triton"}, "autotune": {"torch", "triton", "filelock", "matplotlib"}}

# Modules without a test of the same name, and why.
TESTED_ELSEWHERE = {
    **{
        f"mebp_triton/commands/{name}.py": "what the commands do is tested through the command, in test_cli"
        for name in ("common", "demo", "doctor", "eval", "generate", "quantize", "train", "verify")
    },
    "mebp_triton/cli/peft_baseline.py": "transformers + PEFT for comparison; test_trainer holds our steps against the same loop",
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
    """What this file must not import: what does not stand below it in ``FLOORS``, and what its folder must not know."""
    name = module_name(path)
    below = ORDER[: ORDER.index(name)] if name in ORDER else []
    for imported, line in imports(path) if name != "mebp_triton" else ():  # the face of all rooms
        root = imported.partition(".")[0]
        fine = root not in {"kernels", "autotune", "tests", "bench", "pytest", "support", "models", "runs"}
        if root == "mebp_triton":
            home = home_of(imported)
            fine = home is None or home == name or home in below or is_package(home)
            if fine and home is not None and within(home, "mebp_triton.autotune"):
                fine = within(name, "mebp_triton.autotune") or name == "mebp_triton.cli.commands.tune"
        elif path.parts[0] in OUTSIDE:
            fine = root in sys.stdlib_module_names | OUTSIDE[path.parts[0]]
        if not fine:
            yield f"{path}:{line} imports {imported}"


MODULES = {module_name(path): path for path in SOURCES}


def home_of(imported):
    """The module of this package that an import comes from; None for a name of the package ``mebp_triton`` itself."""
    parts = imported.split(".")
    found = next(".".join(parts[:count]) for count in range(len(parts), 0, -1) if ".".join(parts[:count]) in MODULES)
    return None if found == "mebp_triton" else found


def is_package(name):
    """Whether ``name`` is a package that imports nothing at once, so that importing it is no import of its files."""
    path = MODULES[name]
    return path.name == "__init__.py" and name not in ORDER and not any(True for _ in imports(path))


def test_every_file_has_its_place():
    empty = {name for name in MODULES if name not in ORDER and (name == "mebp_triton" or is_package(name))}
    rooms = {f"mebp_triton.{room}" for room in FLOORS}
    assert MODULES.keys() - empty - rooms == set(ORDER) - rooms, "a file is missing in FLOORS, or gone"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_down_only(path):
    assert not list(wrong_imports(path))


def test_no_packages_import_each_other_in_a_circle():
    """``FLOORS`` forbids circles of files; the packages within a room could still need each other."""
    needs = {}
    for name, path in MODULES.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for imported, _ in imports(path):
            home = home_of(imported) if imported.partition(".")[0] == "mebp_triton" else None
            if home is not None:
                other = home if MODULES[home].name == "__init__.py" else home.rpartition(".")[0]
                if not within(other, package) and not within(package, other):
                    needs.setdefault(package, set()).add(other)
    assert not circle(needs)


def circle(needs):
    """Names that need each other, in a row; empty if there are none."""

    def follow(name, way):
        if name in way:
            return way[way.index(name) :]
        for other in sorted(needs.get(name, ())):
            if found := follow(other, [*way, name]):
                return found
        return []

    return next(filter(None, (follow(name, []) for name in sorted(needs))), [])


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_the_rule_sees_what_is_wrong():
    """Planted imports, each in a file where it is forbidden."""
    for place, text in (
        ("kernels/layout.py", "from mebp_triton.layers.lora_config import LoraConfig"),
        ("kernels/layout.py", "from ..layers.lora_config import LoraConfig"),
        ("kernels/layout.py", "from .panel import spans"),
        ("kernels/ops.py", "def f():\n    import transformers"),
        ("kernels/ops.py", "from mebp_triton.autotune import compile"),
        ("kernels/ops.py", "import filelock"),
        ("autotune/tune.py", "from mebp_triton.training import trainer"),
        ("autotune/tune.py", "import kernels.ops"),
        ("autotune/tune.py", "import transformers"),
        ("mebp_triton/store/reader.py", "from tests.models import tiny_store"),
        ("mebp_triton/store/reader.py", "from mebp_triton.blocks.engine import BlockEngine"),
        ("mebp_triton/store/reader.py", "def f():\n    from .arena import Stager"),
        ("mebp_triton/training/trainer.py", "def f():\n    from mebp_triton.autotune import compile"),
        ("mebp_triton/training/trainer.py", "from kernels import ops"),
    ):
        path = Path(place)
        whole, TREES[path] = TREES[path], ast.parse(text)
        try:
            assert list(wrong_imports(path)), text
        finally:
            TREES[path] = whole


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
