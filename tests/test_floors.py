"""The order of rooms and files, read off the imports; declared dependencies; every module has its test."""

import ast
import re
import sys
from pathlib import Path

from sources import ROOT, SOURCES, TREES, check, imports, module_name

# The rooms from the ground up, and the files of each from the ground up. A file may import what stands before it here:
# files of lower rooms, and earlier files of its own. docs/architecture.md says what each room knows.
FLOORS = {
    "kernels": """names layout decode_bytes decode weight_tiles running_softmax reference configs bitsandbytes
        accuracy workspace native native_rows launch softmax_tile split group_fit scales compensation quantize rounding
        tables
        product_tiles matmul matmul_dx expert_table expert_products embedding rms_norm rope gated_activation panel
        cross_entropy routing lora_gradients token_products ops functions""",
    "autotune": """emulator.faults emulator.floats emulator.bit_operations emulator.parser emulator.number_types
        emulator.operations emulator.global_memory emulator.shared_memory emulator.matrix emulator.counts emulator.state
        emulator.thread_steps emulator.memory_steps emulator.matrix_steps emulator.group_steps emulator.machine
        emulator.tensors emulator.driver sass shapes compile timing ceilings measure cases small_operations
        expert_cases correctness execute cost_model space log rank results shipping tune report""",
    "layers": """lora_config stacked_adapters lora_function experts int4_module linear shared_input deferred_logits head
        loss""",
    "system": """errors foreign_errors units temporaries random_state reading atomic strict_json safetensors_file
        mapped_file scratch memory machine pinned storage signals""",
    "store": """residency waiting dynamic8 side_copies block_inputs optimizer_state manifest reader experts pages
        arena placement table_rows""",
    "data": """tokenized text masking messages template chat foreign_rows rows text_rows sources turn_end batching
        packing loading""",
    "blocks": """options runner call leaks replay recompute static_buffers static_block static_passes graph_players
        graph_checks graphs backward row_chunks mlp_chunks hooks selection engine""",
    "models": """adapter_directory direct_reads experts language_part names plain_linear skeleton kept_float config
        generation adapter_config adapter_seal adapter saving discover row_places targets build operation_kernels
        fused_operations small_attention load""",
    "huggingface": "int4_config peft_layer bitsandbytes_layers model_layers quantizer replace selection_callback",
    "convert": """companions readers.source readers.coded_matrix readers.gguf_header readers.gguf_parts
        readers.gguf_undo readers.gguf_keys readers.gguf_rules readers.gguf_mixtures readers.gguf_hybrids
        readers.gguf_gemma4
        readers.gguf_architectures readers.gguf_layout readers.gguf_rope readers.gguf_tokenizer readers.gguf_blocks
        readers.gguf readers.quantization readers.conversions readers.expert_matrices readers.safetensors_dir
        readers.mxfp4 readers.bitsandbytes readers.int4_dir readers.packed_dir readers.gptq readers.awq
        readers.auto_round readers.mlx readers.compressed_tensors readers.hqq readers.merged_store readers writers.store
        writers.model_directory writers.gguf_file writers.gguf_adapter writers.gguf_model writers.peft_adapter
        calibration.source_weights calibration.stream calibration.source_run calibration.source_loss
        calibration.layer_inputs calibration.expert_inputs calibration.calibration recipe bit_budget quantize
        other_parts merge export""",
    "training": """processes nonfinite optimizers.schedules optimizers.mezo optimizers.tensor_lists optimizers.adamw
        optimizers.table evaluation facts settings run_settings settings_file plots run_directory plan.live_bytes
        plan.inventory plan.stand_ins plan.traced_model plan.expert_bytes plan.phases plan.planner course standing step
        reporting updates checkpoint interim trainer untrained finetune gradient_check""",
    "cli": """console lazy_compiler suggestions flags starting_adapter chat_template inference source_texts
        peft_baseline streaming doctor.advice doctor.findings commands.quantize commands.verify commands.eval
        commands.generate commands.merge commands.export planning commands.plan commands.tune stops training_texts
        training_run commands.train commands.doctor commands.demo parser libraries main __main__""",
}
ORDER = [f"mebp_triton.{room}.{file}" for room, files in FLOORS.items() for file in files.split()]
# What each folder may import besides the standard library and the rooms below.
OUTSIDE = {"kernels": {"torch", "triton"}, "autotune": {"torch", "triton", "numpy", "filelock", "matplotlib"}}

# No file of the package may import these: names that are another package's when installed, and what only tests have.
NEVER = {"kernels", "autotune", "tests", "bench", "pytest", "support", "models", "runs"}

# What pyproject.toml calls by another name than Python does, and what our dependencies themselves depend on.
IMPORT_NAMES = {"pyyaml": "yaml"}
COMES_WITH = {
    "jinja2": "torch",
    "tokenizers": "transformers",
    "huggingface_hub": "transformers",
    "pyarrow": "datasets",
}
ONLY_WITHIN_FUNCTIONS = {"gguf", "libgguf", "matplotlib", "peft", "accelerate", "bitsandbytes", "datasets", "pyarrow"}


def within(name, package):
    return name == package or name.startswith(package + ".")


MODULES = {module_name(path): path for path in SOURCES}


def home_of(imported):
    """The module of this package that an import comes from; None for a name of the package ``mebp_triton`` itself."""
    parts = imported.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    home = next(name for name in names if name in MODULES)
    return None if home == "mebp_triton" else home


def is_plain_package(name):
    """Whether ``name`` is a package that imports nothing itself: to import it is not to import its files."""
    path = MODULES[name]
    return path.name == "__init__.py" and name not in ORDER and not any(imports(path, TREES[path]))


def wrong_imports(path, tree):
    """Imports of what does not stand below the file in ``FLOORS``, and of what its folder must not know."""
    name = module_name(path)
    if name == "mebp_triton":  # the face of all rooms
        return
    below = ORDER[: ORDER.index(name)] if name in ORDER else []
    for line, imported in imports(path, tree):
        root = imported.partition(".")[0]
        fine = root not in NEVER
        if root == "mebp_triton":
            home = home_of(imported)
            fine = home is None or home == name or home in below or is_plain_package(home)
            if home is not None and within(home, "mebp_triton.autotune"):
                fine = fine and (within(name, "mebp_triton.autotune") or name == "mebp_triton.cli.commands.tune")
        elif path.parts[0] in OUTSIDE:
            fine = root in sys.stdlib_module_names | OUTSIDE[path.parts[0]]
        if not fine:
            yield line, f"imports {imported}"


def test_every_file_has_its_place():
    empty = {name for name in MODULES if name not in ORDER and (name == "mebp_triton" or is_plain_package(name))}
    rooms = {f"mebp_triton.{room}" for room in FLOORS}
    assert MODULES.keys() - empty - rooms == set(ORDER) - rooms, "a file is missing in FLOORS, or gone"
    assert len(set(ORDER)) == len(ORDER)


def test_imports_go_down_only():
    check(wrong_imports)


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
        assert list(wrong_imports(Path(place), ast.parse(text))), text


def test_no_packages_import_each_other_in_a_circle():
    """``FLOORS`` forbids circles of files; the packages within a room could still need each other."""
    needs = {}
    for name, path in MODULES.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for _, imported in imports(path, TREES[path]):
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


# --- dependencies ---------------------------------------------------------------------------------------------------


def declared():
    """Import names of the dependencies in pyproject.toml, optional ones included, without those for tests."""
    text = (ROOT / "pyproject.toml").read_text()
    project = text[text.index("dependencies = [") : text.index("test = [")]
    names = [re.split(r"[<>=\[;~! ]", entry)[0].lower() for entry in re.findall(r'"([^"]+)"', project)]
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_every_import_is_a_declared_dependency():
    known = declared() | set(sys.stdlib_module_names) | {"mebp_triton"}

    def undeclared(path, tree):
        for line, imported in imports(path, tree):
            root = imported.partition(".")[0]
            if root not in known and COMES_WITH.get(root) not in known:
                yield line, f"imports {imported}"

    check(undeclared)
    assert list(undeclared(Path("kernels/ops.py"), ast.parse("import numba")))


def optional_at_the_top(path, tree):
    """Imports of optional packages that run when the file is imported."""
    top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
    for line, imported in imports(path, top):
        if imported.partition(".")[0] in ONLY_WITHIN_FUNCTIONS:
            yield line, f"imports {imported}"


def test_optional_packages_are_imported_only_where_they_are_used():
    check(optional_at_the_top)
    assert list(optional_at_the_top(Path("kernels/ops.py"), ast.parse("if x:\n    import peft")))


# --- the tree -------------------------------------------------------------------------------------------------------


def test_file_of(path):
    inside = path.parts[1:-1] if path.parts[0] == "mebp_triton" else path.parts[:-1]
    return Path("tests", *inside, f"test_{path.name}")


test_file_of.__test__ = False  # pytest would take it for a test


def test_every_module_has_a_test_of_its_name():
    modules = [path for path in SOURCES if path.name != "__init__.py"]
    missing = [str(test_file_of(path)) for path in modules if not (ROOT / test_file_of(path)).exists()]
    assert not missing, "missing:\n" + "\n".join(missing)


def test_tests_are_no_package_and_no_conftest_lies_at_the_root():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


def test_mapped_folders_hold_packages_that_are_listed():
    rooms = {"kernels": set(), "autotune": {"emulator"}}
    for folder, within in rooms.items():
        parents = {path.parent.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        assert parents == {Path(), *map(Path, within)}
        assert all((ROOT / folder / parent / "__init__.py").exists() for parent in parents)


def test_the_package_shows_few_entries():
    """A newcomer sees the rooms, and nothing beside them."""
    entries = sorted(path.name for path in (ROOT / "mebp_triton").iterdir() if path.name != "__pycache__")
    assert len(entries) <= 12, entries
