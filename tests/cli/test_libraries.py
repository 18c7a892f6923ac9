"""What a command imports before its work, each in a process of its own, as it is for a user."""

import json
import subprocess
import sys

from commands import adapter, answer, evaluate

# On a CPU these would take as long to import as all that is used. ``torch._dynamo`` itself is a placeholder.
UNUSED = ["torch._dynamo.eval_frame", "torch._inductor", "torch.distributed.tensor", "sympy", "triton", "datasets"]
COMMAND = f"""
import gc, json, sys
from mebp_triton.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    code = main()
    assert not code, code
    imported = [name for name in {UNUSED} if name in sys.modules]
    print(chr(0), json.dumps([imported, gc.isenabled(), gc.get_freeze_count() > 9999]), chr(0))
import triton
from mebp_triton.cli.libraries import load_libraries
load_libraries("train")
"""


def test_generate_and_eval_import_only_what_they_use(mebp, world):
    """With the answers of a process that has all libraries. One process for both commands: to start takes seconds."""
    generate = ["generate", world / "store", adapter(world), "--prompt=the cat sees", "--max-new-tokens=3", "--json"]
    given = [[str(word) for word in command] for command in (evaluate(world, world / "store", "--json"), generate)]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, json.dumps(given)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr  # as Triton says at the end of a process that never collects its objects
    evaluated, imported, generated, imported_then = map(json.loads, done.stdout.rstrip("\0\n").split("\0"))
    assert imported == [[], True, True]
    assert imported_then == [["sympy"], True, True]  # an adapter has torch run the model without data
    assert evaluated | {"peak_rss_bytes": 0} == answer(mebp(*given[0])) | {"peak_rss_bytes": 0}
    assert generated == answer(mebp(*given[1]))
