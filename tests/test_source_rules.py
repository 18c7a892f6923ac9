"""The house rules, read off the sources: nothing runs what a file says, errors are not swallowed, files stay short."""

import ast
import re
from pathlib import Path

import pytest
from sources import ROOT, TREES, check, imports

# --- no code from data ----------------------------------------------------------------------------------------------

RUN_CODE = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "runpy",
    "code",
    "imp",
}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
CALLS |= {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"}
CALLS |= {"np.load", "numpy.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"}
CALLS |= {"importlib.reload", "importlib.util.spec_from_file_location", "get_class_from_dynamic_module"}
CALLS |= {"jinja2.Environment", "jinja2.Template", "load_dataset", "datasets.load_dataset"}
# Keyword arguments that may have this value only.
KEYWORDS = {"trust_remote_code": "False", "allow_pickle": "False", "weights_only": "True", "shell": "False"}
AUTO_CLASS = re.compile(r"\bAuto\w+\.from_(pretrained|config)$")
PATTERN_CALL = re.compile(r"^(re|regex)\.(compile|match|fullmatch|search|sub|findall|finditer|split)$")
# Calls that are right although the rule cannot see why.
ALLOWED = {
    # Names of this package: its public ones, the readers of its table, and its commands, which argparse has compared
    # with its choices.
    "mebp_triton/__init__.py": {"importlib.import_module(f'.{_HOMES[name]}', __name__)"},
    "mebp_triton/convert/readers/__init__.py": {"importlib.import_module(f'.{module}', __package__)"},
    "mebp_triton/cli/parser.py": {"importlib.import_module(f'.commands.{self.prog.split()[-1]}', __package__)"},
    # An adapter's expression, which is matched within a time limit.
    "mebp_triton/layers/lora_config.py": {
        "re.compile(expression)",
        "regex.fullmatch(expression, path, timeout=MATCH_SECONDS)",
    },
    # A name of a module, taken literally.
    "mebp_triton/convert/readers/safetensors_dir.py": {r"re.match(f'{re.escape(parent)}\\.\\d+\\.', key)"},
    # transformers' own patterns, which belong to its classes.
    "mebp_triton/models/names.py": {"re.search(pattern, name)"},
}


def code_from_data(path, tree):
    """Calls and imports that could run something that a model, an adapter, a dataset or a settings file names."""
    for line, name in imports(path, tree):
        if name.partition(".")[0] in RUN_CODE:
            yield line, f"imports {name}"
    allowed = ALLOWED.get(str(path), ())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node) in allowed:
            continue
        called, whole = ast.unparse(node.func), ast.unparse(node)
        is_constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
        if called in CALLS:
            yield node.lineno, f"calls {called}"
        if called.endswith("import_module") and not is_constant:
            yield node.lineno, f"imports a module by a name that is no constant: {whole}"
        if PATTERN_CALL.match(called) and not is_constant:
            yield node.lineno, f"takes a value for a regular expression: {whole}"
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        for keyword, value in named.items():
            if keyword in KEYWORDS and value != KEYWORDS[keyword]:
                yield node.lineno, f"{keyword}={value}"
        # Without it transformers asks at the terminal whether to run the checkpoint's code.
        if AUTO_CLASS.search(called) and "trust_remote_code" not in named:
            options = None in named and '"trust_remote_code": False' in (ROOT / path).read_text()
            if not options:
                yield node.lineno, f"{called} without trust_remote_code=False"


def test_no_source_can_run_what_a_file_says():
    check(code_from_data)


def test_no_allowance_is_left_over():
    for path, allowed in ALLOWED.items():
        calls = {ast.unparse(node) for node in ast.walk(TREES[Path(path)]) if isinstance(node, ast.Call)}
        assert allowed <= calls, path


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from marshal import loads",
        "torch.load(path, weights_only=True)",
        "safe(path, weights_only=False)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=value)",
        "transformers.AutoModelForCausalLM.from_config(config)",
        "np.load(path)",
        "f(path, allow_pickle=True)",
        "yaml.load(data, Loader=yaml.Loader)",
        "importlib.import_module(config['library'])",
        "re.fullmatch(pattern, name)",
        "datasets.load_dataset(path)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_planted_code_from_data_is_seen(text):
    assert list(code_from_data(Path("mebp_triton/planted.py"), ast.parse(text)))


# --- errors ---------------------------------------------------------------------------------------------------------


def swallowed_errors(path, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            is_silent = all(isinstance(line, ast.Pass) for line in node.body)
            if not caught:
                yield node.lineno, "bare except"
            elif is_silent and caught in ("Exception", "BaseException"):
                yield node.lineno, f"passes over every {caught}"


def test_no_error_is_swallowed_whole():
    check(swallowed_errors)
    for text in ("try: f()\nexcept: g()", "try: f()\nexcept Exception: pass"):
        assert list(swallowed_errors(Path("planted.py"), ast.parse(text)))


# --- sizes and docstrings -------------------------------------------------------------------------------------------

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 80


def long_files_and_functions(path, tree):
    """Files and functions beyond the limits; Triton's kernels cannot be taken apart, and have none."""
    lines = max((node.end_lineno for node in tree.body), default=0)
    if lines > MOST_LINES:
        yield lines, f"ends here, more than {MOST_LINES} lines down"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if length > MOST_LINES_OF_A_FUNCTION and not is_kernel:
                yield node.lineno, f"{node.name} has {length} lines, more than {MOST_LINES_OF_A_FUNCTION}"


def test_files_and_functions_are_short():
    check(long_files_and_functions)
    many = "    pass\n" * MOST_LINES_OF_A_FUNCTION
    assert list(long_files_and_functions(Path("planted.py"), ast.parse(f"def f():\n{many}")))
    assert not list(long_files_and_functions(Path("planted.py"), ast.parse(f"@triton.jit\ndef f():\n{many}")))
    assert list(long_files_and_functions(Path("planted.py"), ast.parse("x = 0\n" * (MOST_LINES + 1))))


# A docstring stands alone: these openers take their subject from a name or a line elsewhere.
OPENERS = re.compile(r"(Of|By|That of|Those) |Within[,:]")


def docstrings_that_do_not_stand_alone(path, tree):
    """Modules without a docstring, and docstrings that begin as if something had been said before."""
    if not ast.get_docstring(tree):
        yield 1, "has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if OPENERS.match(text):
                yield getattr(node, "lineno", 1), f"begins with {' '.join(text.split()[:3])!r}"


def test_docstrings_stand_alone():
    check(docstrings_that_do_not_stand_alone)
    texts = (
        "x = 1",
        '"""Of all models."""',
        '"""A."""\ndef f():\n    "Within: NaN."',
        '"""A."""\nclass B:\n    "Those above."',
    )
    for text in texts:
        assert list(docstrings_that_do_not_stand_alone(Path("planted.py"), ast.parse(text))), text
    assert not list(docstrings_that_do_not_stand_alone(Path("planted.py"), ast.parse('"""Bytes within a page."""')))
