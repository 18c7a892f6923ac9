"""The project's kernels, compiled as for a launch and executed; and errors planted into them, which must be noticed."""

import importlib
import warnings
from dataclasses import replace

import pytest
import torch
from ptx_mutations import mutations
from triton.runtime.jit import JITFunction

from mebp_triton.autotune.emulator.driver import Emulator, compiler_for
from mebp_triton.autotune.emulator.faults import Fault, NotModelled
from mebp_triton.kernels import accuracy, reference
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.embedding import int4_embedding_triton
from mebp_triton.kernels.matmul import int4_matmul_triton
from mebp_triton.kernels.matmul_dx import int4_matmul_dx_group_triton
from mebp_triton.kernels.running_softmax import RunningSoftmax
from mebp_triton.kernels.softmax_tile import update_softmax

CPU = torch.device("cpu")
FORWARD = TileConfig(16, 64, 64, num_warps=4, num_stages=3)
# On sm_90, products of four warps.
LARGE = TileConfig(64, 64, 64, num_warps=4, num_stages=3)
BACKWARD = TileConfig(32, 32, 64, num_warps=4, num_stages=2)


def random(*shape, dtype, seed):
    return accuracy.normal(*shape, dtype=dtype, device=CPU, generator=torch.Generator().manual_seed(seed))


def weight(n, k, scheme="symmetric", group_size=64):
    """Rows of a larger weight: the rows around them may not be read."""
    generator = torch.Generator().manual_seed(0)
    return accuracy.random_weight(n + 16, k, CPU, scheme, group_size, generator=generator).rows(8, 8 + n)


def poisoned(make, *args, **kwargs):
    """Calls a launcher whose outputs start as NaN."""
    real = torch.empty

    def empty(*args, **kwargs):
        made = real(*args, **kwargs)
        made.untyped_storage().fill_(0xFF)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        return make(*args, **kwargs)


def forward(config=FORWARD, dtype=torch.bfloat16, m=17):
    """A ragged product with everything on, and the verdict on it."""
    w, n, k, r = weight(70, 200), 70, 200, 8
    shapes = ((m, k + 24), (n,), (m, r), (n, r + 4))
    operands = [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    # Rows of views: what lies between them may not be read.
    operands[0], operands[3] = operands[0][:, :k], operands[3][:, :r]
    y = poisoned(int4_matmul_triton, operands[0], w, *operands[1:], config)
    truth = reference.matmul(operands[0].double(), w, *(one.double() for one in operands[1:]))
    return accuracy.judge(y, reference.matmul(operands[0], w, *operands[1:]), truth, product=True)


def backward(config=BACKWARD, dtype=torch.float16, m=17, scheme="affine"):
    """The gradient of two weights' input, from views with a stride, and the verdict on it."""
    ws, k, r = [weight(70, 100, scheme, 32), weight(34, 100, scheme, 32)], 100, 4
    dys = [random(m, 80, dtype=dtype, seed=seed)[:, : w.out_features] for seed, w in enumerate(ws)]
    g, a = random(m, 2 * r, dtype=dtype, seed=5), random(2 * r, k, dtype=dtype, seed=6)
    dx = poisoned(int4_matmul_dx_group_triton, dys, ws, g, a, config)
    pairs = list(zip(dys, ws, strict=True))
    truth = sum(reference.matmul_dx(dy.double(), w) for dy, w in pairs) + g.double() @ a.double()
    wide = sum(dy.float() @ reference.decode(w, dtype).float() for dy, w in pairs) + g.float() @ a.float()
    return accuracy.judge(dx, wide.to(dtype), truth, product=True)


@pytest.mark.parametrize("target", [80, 90])
def test_products(target):
    with Emulator(target) as emulator:
        verdicts = [
            forward(FORWARD if target == 80 else LARGE),
            backward(),
        ]
    assert all(verdict["ok"] for verdict in verdicts), verdicts
    names = {one.parts[0] for launch in emulator.launches for one in launch.compiled.kernel.code}
    assert {80: {"mma", "ldmatrix", "cp"}, 90: {"wgmma", "fence", "cp"}}[target] <= names
    assert [launch.name for launch in emulator.launches] == ["_matmul_kernel", "_matmul_dx_kernel"]
    assert emulator.launches[0].grid == (4 if target == 80 else 2, 1, 1)


def test_a_split_reduction_on_the_smallest_block():
    """Two launches: parts of the sums, and their sum."""
    with Emulator(80) as emulator:
        verdict = forward(TileConfig(16, 16, 64, num_warps=2, num_stages=2, split=2), dtype=torch.float16, m=3)
    assert verdict["ok"], verdict
    assert [launch.name for launch in emulator.launches] == ["_matmul_kernel", "_sum_parts_kernel"]
    assert emulator.launches[0].grid == (5, 2, 1)


def test_rows_on_a_gpu_without_asynchronous_copies():
    w, ids = weight(50, 200, "affine"), torch.tensor([3, 49, -1, 0, 2**62])
    with Emulator(75):
        rows = poisoned(int4_embedding_triton, ids, w, torch.bfloat16)
    assert torch.equal(rows[[0, 1, 3]], reference.embedding(ids[[0, 1, 3]], w, torch.bfloat16))
    assert rows[[2, 4]].isnan().all()


def test_the_softmax_tile_of_bfloat16():
    """On sm_120, with packed float32 arithmetic; in a chain of two tiles."""
    targets, z = torch.tensor([3, 40, 0]), random(3, 61, dtype=torch.bfloat16, seed=1) * 8
    ours, exact = RunningSoftmax(targets, torch.float32, 1.0), RunningSoftmax(targets, torch.float64, 1.0)
    with Emulator(120), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [update_softmax(ours, z[:, first:stop].clone(), None, first) for first, stop in ((0, 31), (31, 61))]
    wanted = [exact.update(z[:, first:stop].double(), None, first)[0] for first, stop in ((0, 31), (31, 61))]
    for (p, _), truth in zip(found, wanted, strict=True):
        verdict = accuracy.judge(p, truth.to(p.dtype), truth)
        assert verdict["ok"], verdict
    for name in ("maximum", "total", "at_target", "argmax"):
        assert torch.allclose(getattr(ours, name).double(), getattr(exact, name).double(), rtol=1e-6)


def test_a_target_with_tensor_memory_is_refused_by_the_instruction():
    with Emulator(100) as emulator, pytest.raises(NotModelled, match=r"matmul.*tcgen05\.alloc"):
        forward(TileConfig(16, 64, 64, num_warps=4, num_stages=2), m=16)
    assert not emulator.launches


def test_launches_are_the_compilers_again_afterwards():
    before = JITFunction.run
    with pytest.raises(RuntimeError, match="stop"), Emulator(80):
        assert JITFunction.run is not before
        raise RuntimeError("stop")
    assert JITFunction.run is before


def test_a_kernel_is_compiled_once_in_a_process():
    with Emulator(80) as emulator:
        forward()
        forward()
    first, second = emulator.launches
    assert first.compiled is second.compiled and second.compile_s < 0.5
    assert compiler_for(80) is Emulator(80).compiler


def test_machine_code_is_made_when_it_is_asked_for(monkeypatch):
    """Executing PTX needs none."""
    made = []
    backend = type(compiler_for(80).backend)
    make = backend.make_cubin
    monkeypatch.setattr(backend, "make_cubin", lambda self, *args: made.append(args) or make(self, *args))
    with Emulator(80) as emulator:
        forward(TileConfig(16, 32, 64, num_warps=2, num_stages=2))
    compiled = emulator.launches[0].compiled
    assert not made
    assert compiled.cubin.startswith(b"\x7fELF") and compiled.cubin is compiled.cubin
    assert compiled.warnings == [] and len(made) == 1


def test_warnings_of_the_assembler_are_read(capsys):
    """Its log has other lines too, and none of it is printed."""
    with Emulator(80) as emulator:
        forward(TileConfig(16, 32, 64, num_warps=2, num_stages=2))
    compiled = emulator.launches[0].compiled
    code, log = compiled.assemble(compiled.ptx)
    assert code == compiled.cubin and "registers" in log and "spill" in log
    lines = ["ptxas info    : (C7515) Potential Performance Loss", "ptxas info    : Used 8 registers", "warning: x"]
    told = replace(compiled, assemble=lambda ptx: (b"", "\n".join(lines)))
    assert told.warnings == [lines[0], lines[2]]
    assert capsys.readouterr().out == ""


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="from 75 on, such as 87, got 70"):
        Emulator(70)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"), Emulator(80):
        pass
    monkeypatch.delenv("TRITON_INTERPRET")
    with Emulator(80):
        pass


def test_an_unknown_option_is_refused_as_by_a_launch():
    kernel = importlib.import_module("mebp_triton.kernels.split")._sum_parts_kernel
    with Emulator(80), pytest.raises(KeyError, match="num_wraps"):
        kernel[(1,)](torch.zeros(8), torch.zeros(4), 4, 4, SPLIT=2, BLOCK_SIZE=64, num_wraps=4, enable_fp_fusion=False)


def test_counts_of_chosen_blocks():
    with Emulator(80, count=True) as emulator:
        forward()
    whole = emulator.launches[0].counts
    with Emulator(80, count=True, blocks=lambda grid: torch.tensor([[0, 0, 0]]).numpy()) as one:
        forward()
    part = one.launches[0].counts
    assert (whole.blocks, part.blocks) == (4, 1)
    # Each warp multiplies 16 x 64 x 208 numbers, 8 ranks included, in pieces of 16 x 8 x 16; 64 of those are padding.
    assert part.per_warp()["matrix"] == whole.per_warp()["matrix"] > 0
    assert 3 < whole.executed.sum() / part.executed.sum() <= 4
    assert {access.instruction.parts[1] for access in whole.to_global.values()} >= {"global", "async"}
    assert all(access.parts >= access.least > 0 for access in whole.to_shared.values())


# --- planted errors -------------------------------------------------------------------------------------------------


def noticed(target, run, mutation):
    """How a planted error shows: the kind of a fault, "wrong result", or nothing."""
    with Emulator(target, edit=lambda ptx: mutation.apply(ptx) if "sum_parts" not in ptx else ptx):
        try:
            return "" if run()["ok"] else "wrong result"
        except Fault as fault:
            return fault.kind


def planted(target, run):
    """The mutations of a kernel, by kind."""
    with Emulator(target) as emulator:
        run()
    kinds = {}
    for mutation in mutations(emulator.launches[0].compiled.ptx):
        kinds.setdefault(mutation.kind, []).append(mutation)
    return kinds


KINDS = ["guard dropped", "address moved", "transposition", "matrices exchanged", "wrong selector", "stride left out"]


def test_planted_errors_are_noticed():
    """Two of each kind. Some cannot be noticed: a barrier may be redundant, a second mask may hide the first."""
    kinds = planted(80, forward)
    chosen = [kinds[kind][0] for kind in ("barrier removed", "bound one too far")] + kinds["one group less waited for"]
    for kind in KINDS:
        chosen += [kinds[kind][0], kinds[kind][len(kinds[kind]) // 2]]
    outcomes = {mutation: noticed(80, forward, mutation) for mutation in chosen}
    assert all(outcomes.values()), outcomes
    assert {"shared race", "out of bounds", "wrong result"} <= set(outcomes.values())


def test_errors_around_asynchronous_products_are_noticed():
    def run():
        return forward(LARGE)

    kinds = planted(90, run)
    chosen = [kinds["proxy fence removed"][0], kinds["register fence removed"][0]]
    chosen += [kinds["one group less waited for"][-1], kinds["descriptor moved"][0]]
    outcomes = {mutation.kind: noticed(90, run, mutation) for mutation in chosen}
    assert all(outcomes.values()), outcomes
