"""Which backend a name means, and which route a launch takes."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from mebp_triton.kernels import embedding, functions, reference, routing
from mebp_triton.kernels.configs import PANEL, Panel, Problem, TileConfig, default_config
from mebp_triton.kernels.functions import int4_embedding, int4_matmul, int4_matmul_dx
from mebp_triton.kernels.names import BACKENDS
from mebp_triton.kernels.routing import (
    Routes,
    default_route,
    find_expert_route,
    find_route,
    resolve_backend,
    routed,
    routed_over_experts,
    routes_of,
)
from mebp_triton.kernels.tables import Entry, architecture_of, bucket, table_to_json, user_table_path


def test_auto_means_panels_on_the_cpu_and_triton_on_a_gpu(monkeypatch):
    assert resolve_backend("auto", torch.device("cpu")) == "panel"
    assert resolve_backend("panel", torch.device("cuda")) == "panel"
    assert resolve_backend("auto", torch.device("cuda")) == ("triton" if routing.has_triton() else "panel")
    monkeypatch.setattr(routing, "has_triton", lambda: False)
    assert resolve_backend("auto", torch.device("cuda")) == "panel"
    with pytest.raises(ValueError, match="not installed"):
        resolve_backend("triton", torch.device("cuda"))


@pytest.mark.skipif(not routing.has_triton(), reason="needs the package triton")
def test_triton_on_the_cpu_is_an_error_outside_of_its_interpreter(monkeypatch, make_weight):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = make_weight(7, 70).to("cpu")
    ids = torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda: int4_matmul(torch.zeros(3, 70), weight, backend="triton"),
        lambda: int4_matmul_dx(torch.zeros(3, 7), weight, backend="triton"),
        lambda: int4_embedding(ids, weight, torch.float32, backend="triton"),
    ):
        with pytest.raises(ValueError, match="runs on a GPU"):
            call()


@pytest.mark.parametrize("backend", ["cuda", "", "Triton"])
def test_unknown_backends(backend):
    with pytest.raises(ValueError, match=f"one of {', '.join(BACKENDS)}, got {backend!r}"):
        resolve_backend(backend, torch.device("cpu"))


def test_bfloat16_before_sm_80_goes_by_panels(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, wanted in (((7, 5), "panel"), ((8, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert resolve_backend("auto", torch.device("cuda"), torch.bfloat16) == wanted
        assert resolve_backend("auto", torch.device("cuda"), torch.float16) == "triton"


TILE, SUMS = TileConfig(32, 64, 64, 8, 3, split=2, weight_left=False), TileConfig(16, 64, 64, scale_sums=True)
PROBLEM = Problem("matmul", 64, 2048, 1024)


def table_of(routes):
    """A table from a mapping of problems to routes."""
    return {problem: Entry(problem, route, "static", 12.5, None, {}) for problem, route in routes.items()}


def test_the_bucket_and_the_nearest_size():
    near, many = replace(PROBLEM, n=8192), replace(PROBLEM, m=4096)
    table = table_of({PROBLEM: TILE, near: TileConfig(64, 64, 64), many: Panel(64)})
    assert find_route(replace(PROBLEM, m=50, n=2100, k=900), table) == TILE
    assert find_route(replace(PROBLEM, n=512), table) == TILE
    assert find_route(replace(PROBLEM, n=16384), table) == TileConfig(64, 64, 64)
    assert find_route(replace(many, n=512, m=10_000), table) == Panel(64)
    for other in (
        replace(PROBLEM, dtype=torch.float32),
        replace(PROBLEM, kernel="matmul_dx"),
        replace(PROBLEM, m=16),
    ):
        assert find_route(other, table) == default_route(other)
    assert find_route(PROBLEM, {}) == default_route(PROBLEM)


def test_what_stands_in_for_what():
    half, affine = replace(PROBLEM, dtype=torch.float16), replace(PROBLEM, scheme="affine", group_size=32)
    table = table_of({half: TileConfig(16, 16, 64), affine: TileConfig(16, 32, 64), PROBLEM: SUMS})
    assert find_route(PROBLEM, table) == SUMS
    assert find_route(half, table) == TileConfig(16, 16, 64)
    assert find_route(replace(PROBLEM, group_size=128), table) == SUMS
    assert find_route(replace(PROBLEM, scheme="affine", group_size=128), table) == TileConfig(16, 32, 64)
    wide = replace(PROBLEM, bits=8)
    assert find_route(wide, table) == SUMS, "4 bits stand in for 8"
    assert find_route(replace(wide, group_size=16), table) == replace(SUMS, scale_sums=False)
    own = table_of({wide: TileConfig(16, 16, 128)}) | table
    assert find_route(wide, own) == find_route(replace(wide, scheme="affine"), own) == TileConfig(16, 16, 128)
    assert find_route(replace(PROBLEM, scheme="affine"), own) == TileConfig(16, 32, 64)
    # The symmetric scheme stands in for a codebook, whose sums cannot be scaled.
    assert find_route(replace(PROBLEM, scheme="codebook"), table) == replace(SUMS, scale_sums=False)


def test_without_a_table_many_tokens_go_by_panels():
    few, many = (Problem("matmul", m, 4096, 4096) for m in (511, 512))
    assert default_route(few) == default_config(few)
    assert default_route(many) == PANEL
    assert default_route(replace(many, dtype=torch.float32)) == PANEL


def test_before_sm80_a_library_has_the_tensor_cores():
    few, more = (Problem("matmul", m, 4096, 4096, dtype=torch.float16) for m in (16, 17))
    for architecture, route in (("sm_75", Panel), ("sm_80", TileConfig), ("gfx942", TileConfig)):
        routes = routes_of(architecture)
        assert type(routes.choose(few)) is TileConfig
        assert type(routes.choose(more)) is route, architecture


def test_what_a_device_has_no_room_for_is_not_chosen_again():
    other, third = replace(PROBLEM, n=8192), replace(PROBLEM, m=16)
    routes = Routes(table_of({PROBLEM: TILE, third: SUMS}))
    assert routes.choose(other) == TILE and routes.choose(third) == SUMS
    routes.refuse(PROBLEM)
    assert routes.choose(PROBLEM) == default_config(PROBLEM)
    assert routes.choose(other) == default_config(other) and routes.choose(third) == SUMS
    with pytest.raises(ValueError, match="even the default"):
        routes.refuse(PROBLEM)


def test_the_tables_of_an_architecture_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    routes_of.cache_clear()
    path = user_table_path("sm_81")
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_text(json.dumps(table_to_json("sm_81", table_of({PROBLEM: TILE}).values())))
    assert routes_of("sm_81").choose(PROBLEM) == TILE and routes_of("sm_82").choose(PROBLEM) == default_config(PROBLEM)
    path.unlink()
    assert routes_of("sm_81").choose(PROBLEM) == TILE
    routes_of.cache_clear()
    assert routes_of("sm_81").choose(PROBLEM) == default_config(PROBLEM)
    routes_of.cache_clear()


def test_what_does_not_fit_the_device_gives_way_to_the_default(make_weight, normal, monkeypatch):
    """The first launch warns; later ones take the default at once."""
    big, tried = TileConfig(128, 128, 64), []
    routes = Routes(table_of({bucket(Problem("matmul", 5, 20, 70, dtype=torch.float32)): big}))
    monkeypatch.setattr(routing, "routes_of", lambda architecture: routes)

    def launch(route):
        tried.append(route)
        if route == big:
            raise OutOfResources(300_000, 101_376, "shared memory")
        return "a result"

    weight, default = make_weight(20, 70), TileConfig(16, 64, 64, 4, 3)
    with pytest.warns(UserWarning, match="does not fit this device .* tune again"):
        assert routed("matmul", normal(5, 70), [weight], launch) == "a result"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert routed("matmul", normal(5, 70), [weight], launch) == "a result"
    assert tried == [big, default, default]


@pytest.mark.parametrize("mib", [1, 16])
def test_panels_have_the_size_that_the_table_gives(make_weight, normal, monkeypatch, mib):
    """Slices of whole tiles; the sums, which are exact here, do not depend on it."""
    (n, k), decoded = (1100, 1152), []

    def decode_rows(weight, out):
        decoded.append(tuple(weight.shape))
        return out.copy_(reference.decode(weight, out.dtype))

    weight = replace(make_weight(n, k), scales=torch.ones(k // 64, n, dtype=torch.float16))
    problems = [bucket(Problem(kernel, 3, n, k, dtype=torch.float32)) for kernel in ("matmul", "matmul_dx")]
    routes = Routes(table_of(dict.fromkeys(problems, Panel(mib))))
    monkeypatch.setattr(routing, "routes_of", lambda architecture: routes)
    monkeypatch.setattr(embedding, "decode_rows_triton", decode_rows)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, dy = normal(3, k).round(), normal(3, n).round()
    y = functions.int4_matmul(x, weight, backend="triton")
    # A panel of 1 MiB has 2^19 weights: 455 rows of this K, and 476 columns of this N.
    assert decoded == ([(n, k)] if mib == 16 else [(384, k), (384, k), (332, k)])
    decoded.clear()
    dx = functions.int4_matmul_dx(dy, weight, backend="triton")
    across = [384, 384, 384] if mib == 1 else [k]
    assert decoded == [(n, columns) for columns in across]
    decoded.clear()
    grouped = functions.int4_matmul_dx_group([dy, dy], [weight, weight], backend="triton")
    assert len(decoded) == 2 * len(across)
    matrix = reference.decode(weight, torch.float32)
    assert torch.equal(y, x @ matrix.t()) and torch.equal(dx, dy @ matrix) and torch.equal(grouped, 2 * dx)


def test_a_group_is_one_problem(make_weight, normal, monkeypatch):
    """Its N is the sum of the members' rows."""
    asked = []
    monkeypatch.setattr(routing, "routes_of", lambda architecture: asked.append(architecture) or Routes({}))
    weights = [make_weight(20, 70, 32, "affine"), make_weight(33, 70, 32, "affine")]
    wanted = default_config(Problem("matmul", 100, 53, 70, "affine", 32, torch.float32))
    assert routed("matmul", normal(100, 70), weights, lambda route: route) == wanted
    assert asked == [architecture_of(weights[0].device)]


def test_experts_take_tiles_unless_each_has_many_tokens():
    """Panels of their small weights are slower than panels of a large one, of which a table knows."""
    many = Problem("matmul", 1024, 4096, 1024)
    table = table_of(
        {
            replace(PROBLEM, m=16): TILE,
            replace(PROBLEM, n=1024): TILE,
            PROBLEM: PANEL,
            replace(many, n=1024): TILE,
            many: PANEL,
        }
    )
    unsplit = replace(TILE, split=1)
    assert find_expert_route(replace(PROBLEM, m=16), table) == unsplit
    assert find_route(PROBLEM, table) == PANEL and find_expert_route(PROBLEM, table) == unsplit
    assert find_expert_route(many, table) == PANEL
    assert find_expert_route(PROBLEM, {}) == default_config(PROBLEM)
    assert find_expert_route(replace(PROBLEM, m=512), {}) == PANEL, "nothing is known of so many tokens"
    assert find_expert_route(PROBLEM, {}, tensor_cores=False) == PANEL


def test_experts_have_routes_of_their_own_by_buckets(monkeypatch):
    routes = Routes(table_of({PROBLEM: TILE}))
    monkeypatch.setattr(routing, "routes_of", lambda architecture: routes)
    for m, n in ((33, 2040), (64, 2100)):
        found = routed_over_experts(replace(PROBLEM, m=m, n=n), torch.device("cpu"), lambda route: route)
        assert found == replace(TILE, split=1)
    assert routes.choose(PROBLEM) == TILE
    assert routes.over_experts.choose.cache_info().currsize == 1
