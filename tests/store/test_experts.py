"""Experts in a block's file: each is one range of bytes, read, verified and counted when it is asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import BLOCK, flip, int4

from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.kernels.expert_table import experts_of
from mebp_triton.store.arena import Stager
from mebp_triton.store.experts import ExpertPlaces, MappedExperts, StoredExperts, spans_of
from mebp_triton.store.placement import place_weights
from mebp_triton.store.reader import Store
from mebp_triton.store.waiting import Waiting
from mebp_triton.system import reading
from mebp_triton.system.errors import FileError

NAMES = [(f"layers.0.experts.{expert}.up", f"layers.0.experts.{expert}.down") for expert in range(6)]
CPU = torch.device("cpu")


class Holder:
    source: Any = None


def store_of(directory: Path, rows: int = 1500, columns: int = 1024, group: int = 64, seed: int = 0) -> Store:
    """A block with a linear layer and six experts, each of which is larger than a chunk that has a checksum."""
    directory.mkdir()
    writer = StoreWriter(directory, "a test", tied_head=False)
    matrices = {"layers.0.q": int4("symmetric", 1)}
    for number, pair in enumerate(NAMES, seed):
        up, down = int4("symmetric", number, rows, columns, group), int4("codebook", number, 64, 70)
        matrices |= {pair[0]: up, pair[1]: down}
    experts = {name for pair in NAMES for name in pair}
    floats = {"layers.0.norm": torch.ones(4)}
    writer.write_file(BLOCK, {name: (weight, 0.0) for name, weight in matrices.items()}, floats, experts)
    writer.finish()
    return Store(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of(tmp_path_factory.mktemp("experts") / "store").directory


def tensors(weights: list[Any]) -> list[torch.Tensor]:
    return [tensor for pair in weights for weight in pair for tensor in weight.tensors().values()]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(tensors(ours), tensors(theirs), strict=True))


def test_an_expert_is_one_range_of_bytes(directory: Path, tmp_path: Path) -> None:
    """Unless a tensor would not be aligned so; then an expert is several."""
    opened = Store(directory)
    spans = MappedExperts(opened, opened.files[BLOCK], NAMES, Waiting()).spans
    assert [len(one) for one in spans] == [1] * 6
    assert all(one[0][1] == other[0][0] for one, other in zip(spans, spans[1:], strict=False))
    odd = store_of(tmp_path / "odd", 5, 64, 128)
    scattered = MappedExperts(odd, odd.files[BLOCK], NAMES, Waiting())
    assert {len(one) for one in scattered.spans} != {1}
    assert same(scattered.bring(range(6)), StoredExperts(odd, NAMES).bring(range(6)))


@pytest.mark.parametrize("residency", ["device", "host", "file", "arena"])
def test_experts_are_brought_in_when_they_are_asked_for(directory: Path, residency: Any) -> None:
    opened, waiting, holder = Store(directory), Waiting(), Holder()
    file = opened.files[BLOCK]
    stager = Stager(CPU, waiting, file.data().numel()) if residency == "arena" else None
    where = "file" if residency == "arena" else residency
    pages = place_weights(opened, BLOCK, {}, where, CPU, stager, waiting, [ExpertPlaces(holder, NAMES)])
    whole = StoredExperts(Store(directory), NAMES).bring(range(6))
    size, rest = (
        sum(end - begin for begin, end in spans_of(file, [name for name in file.entries if wanted(name)]))
        for wanted in (lambda name: ".experts.2." in name, lambda name: ".experts." not in name)
    )
    # An arena still has what it had, as long as no other block took it.
    expected = {"file": [2, 2], "arena": [2, 0]}.get(residency, [0, 0])
    for experts in expected:
        with pages:
            assert same(holder.source.bring([2, 4]), [whole[2], whole[4]])
            assert same(holder.source.bring([2]), [whole[2]])
        assert waiting.pop_experts() == experts
        assert waiting.pop_paged() == (2 * size + rest if experts else 0)
    pages.prefetch()


def test_the_experts_of_the_last_pass_are_read_ahead(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recompute needs just these."""
    opened, holder, asked = Store(directory), Holder(), set[tuple[int, int]]()
    file = opened.files[BLOCK]
    pages = place_weights(opened, BLOCK, {}, "file", CPU, None, Waiting(), [ExpertPlaces(holder, NAMES)])
    monkeypatch.setattr(file.mapped, "read_ahead", lambda begin, end: asked.add((begin, end)))
    for experts in ([0, 3], [2, 4]):
        with pages:
            holder.source.bring(experts)
        asked.clear()
        pages.prefetch()
        spans = [[(file.start + begin, file.start + end) for begin, end in one] for one in holder.source.spans]
        assert [expert for expert, one in enumerate(spans) if asked.issuperset(one)] == experts


@pytest.mark.parametrize("residency", ["host", "file"])
def test_blocks_that_take_turns_in_an_arena_have_their_own_experts(tmp_path: Path, residency: Any) -> None:
    """The same numbers of experts, of three blocks in two arenas: what another block left there counts for nothing."""
    stores = [store_of(tmp_path / f"{block}", 64, 128, seed=10 * block) for block in range(3)]
    waiting, holders = Waiting(), [Holder() for _ in stores]
    stager = Stager(CPU, waiting, max(store.files[BLOCK].data().numel() for store in stores))
    blocks = [
        place_weights(store, BLOCK, {}, residency, CPU, stager, waiting, [ExpertPlaces(holder, NAMES)])
        for store, holder in zip(stores, holders, strict=True)
    ]
    for block in (0, 1, 2, 2, 1, 0):
        with blocks[block]:
            assert same(holders[block].source.bring([1, 3]), StoredExperts(stores[block], NAMES).bring([1, 3]))
    assert waiting.pop_experts() == 2 * 4  # the second 2 and the second 1 are there still


def test_experts_that_are_always_there_are_views_of_one_copy(directory: Path) -> None:
    """So a launch takes them together, and knows them again."""
    store = Store(directory)
    source = StoredExperts(store, NAMES, store.files[BLOCK].data().clone())
    assert same(source.bring([4, 1]), StoredExperts(store, NAMES).bring([4, 1]))
    firsts, seconds = zip(*source.bring(range(6)), strict=True)
    for weights in (firsts, seconds):
        experts = experts_of(weights)
        assert experts is not None and experts.count == 6
    assert source.bring([4])[0][0] is firsts[4]


def test_only_what_is_asked_for_is_verified(directory: Path, tmp_path: Path) -> None:
    """A damaged expert is found when it is used, and by who verifies the whole file."""
    damaged = store_of(tmp_path / "store").directory
    begin, end = spans_of(
        Store(damaged).files[BLOCK], [name for name in Store(damaged).files[BLOCK].entries if ".experts.3." in name]
    )[0]
    start = Store(damaged).files[BLOCK].start
    flip(damaged / BLOCK, start + (begin + end) // 2)
    opened, waiting, holder = Store(damaged), Waiting(), Holder()
    assert torch.equal(opened.float_tensor("layers.0.norm"), torch.ones(4))
    pages = place_weights(opened, BLOCK, {}, "file", CPU, None, waiting, [ExpertPlaces(holder, NAMES)])
    assert end - begin < reading.CHECKSUM_CHUNK * 2
    with pages:
        holder.source.bring([0, 5])
        with pytest.raises(FileError, match="checksum of bytes"):
            holder.source.bring([3])
    with pytest.raises(FileError, match="checksum of bytes"):
        opened.files[BLOCK].verify()


def test_experts_that_are_not_finite(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    directory.mkdir()
    writer = StoreWriter(directory, "a test", tied_head=False)
    bad = int4("symmetric", 1)
    bad.scales[0, 0] = torch.inf
    matrices = {
        NAMES[0][0]: int4("symmetric", 0),
        NAMES[0][1]: int4("symmetric", 2),
        NAMES[1][0]: bad,
        NAMES[1][1]: bad,
    }
    writer.write_file(BLOCK, {name: (weight, 0.0) for name, weight in matrices.items()}, {}, set(matrices))
    writer.finish()
    opened, holder = Store(directory), Holder()
    pages = place_weights(opened, BLOCK, {}, "file", CPU, None, Waiting(), [ExpertPlaces(holder, NAMES[:2])])
    with pages:
        holder.source.bring([0])
        with pytest.raises(FileError, match=r"experts\.1\..*is not finite"):
            holder.source.bring([1])


def test_copies_of_a_model_have_experts_of_their_own(directory: Path) -> None:
    opened, waiting, holder = Store(directory), Waiting(), Holder()
    stager = Stager(CPU, waiting, opened.files[BLOCK].data().numel())
    pages = place_weights(opened, BLOCK, {}, "file", CPU, stager, waiting, [ExpertPlaces(holder, NAMES)])
    twin_pages, twin = copy.deepcopy((pages, holder))
    assert twin.source.pages is twin_pages and twin.source is not holder.source
    with twin_pages:
        assert same(twin.source.bring([1]), StoredExperts(opened, NAMES).bring([1]))
    assert not stager.arenas
