"""The compiler that is loaded late treats functions as one that was there before they were decorated."""

import subprocess
import sys

import pytest

LATE = """
import sys, torch
from mebp_triton.cli.lazy_compiler import load_compiler_late
load_compiler_late()
module = torch._dynamo

@torch.compiler.disable
def opaque(x):
    "A text."
    return x.sin()

@torch.compiler.disable(recursive=False)
def outer(x):
    return x.cos()

@torch.compiler.allow_in_graph
def whole(x):
    return x + x.tanh()

@torch.compiler.assume_constant_result
def five():
    return 5

def function(x):
    return whole(outer(opaque(x + 1) + 1) + five())

x = torch.arange(3.0)
expected = function(x)
assert opaque.__doc__ == "A text." and not hasattr(module, "__nothing__")
import torch._dynamo._trace_wrapped_higher_order_op
assert "torch._dynamo.eval_frame" not in sys.modules
"""
COMPILED = """
targets = []
def backend(graph, inputs):
    targets.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
    return graph.forward

assert torch.equal(torch.compile(function, backend=backend)(x), expected)
assert len(targets) == 3 and whole in targets[-1], targets
assert not any(target in (torch.sin, torch.cos, torch.tanh) for graph in targets for target in graph)
assert torch.equal(opaque(x), x.sin())
"""
SUBMODULE = "import torch._dynamo.config\n"
REFUSED = """
import importlib.machinery, sys, torch
from mebp_triton.cli.lazy_compiler import load_compiler_late
name = "torch._dynamo._trace_wrapped_higher_order_op"
class Finder:
    def find_spec(self, asked, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if asked == name else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        torch._dynamo.config
sys.meta_path.insert(0, Finder())
load_compiler_late()
assert not [name for name in sys.modules if name.startswith("torch._dynamo")] and "_dynamo" not in vars(torch)
"""
LOADED = """
assert sys.modules["torch._dynamo"] is torch._dynamo is module and type(module) is type(sys)
assert module.eval_frame is sys.modules["torch._dynamo.eval_frame"]
load_compiler_late()
assert torch._dynamo is module
"""


PROGRAMS = {
    "a function is compiled": LATE + COMPILED + LOADED,
    "a submodule is imported": LATE + SUBMODULE + LOADED,
    "its own submodule needs it": REFUSED,
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_it_is_the_compiler_as_soon_as_it_is_needed(program):
    """In a process of its own, as torch's compiler is loaded in this one; that takes two or three seconds."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
