"""AdamW's moments: zeros at first, kept where they were put, in float32 whatever the parameters are."""

import os

import pytest
import torch
from faults import failing
from late_copies import LateStreams, MissingWait

from mebp_triton.store.optimizer_state import Moments
from mebp_triton.store.residency import RESIDENCIES


def groups(dtype=torch.float32):
    return [
        [torch.zeros(3, 5, dtype=dtype), torch.zeros((), dtype=dtype)],
        [],
        [torch.zeros(0, 4, dtype=dtype), torch.zeros(1000, 7, dtype=dtype)],
    ]


def fill(first, second, number):
    for place, (m, v) in enumerate(zip(first, second, strict=True)):
        m.fill_(10 * number + place + 1)
        v.fill_(-10 * number - place - 1)


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_changes_are_kept_and_no_group_touches_another(residency, dtype, tmp_path):
    parameters = groups(dtype)
    moments = Moments(parameters, residency, tmp_path)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for number, group in enumerate(parameters):
        with moments.open(number) as (first, second):
            assert [m.shape for m in first] == [v.shape for v in second] == [p.shape for p in group]
            assert all(m.dtype == wide or not group for m in (*first, *second))
            assert not any(m.any() for m in (*first, *second)), "not zero at first"
            fill(first, second, number)
    for _ in range(2):
        for number, group in enumerate(parameters):
            with moments.open(number) as (first, second):
                for place in range(len(group)):
                    assert (first[place] == 10 * number + place + 1).all()
                    assert (second[place] == -10 * number - place - 1).all()


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_an_error_within_loses_nothing(residency, tmp_path):
    moments = Moments(groups(), residency, tmp_path)
    with pytest.raises(ZeroDivisionError), moments.open(0) as (first, second):
        fill(first, second, 3)
        1 / 0  # noqa: B018
    with moments.open(0) as (first, _):
        assert (first[0] == 31).all()


def test_a_file_is_nameless_allocated_and_holds_the_buffers(tmp_path):
    moments = Moments(groups(), "file", tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert moments.slots is not None and len(moments.slots) == 3
    for buffer, slot in zip(moments.buffers, moments.slots, strict=True):
        assert buffer.data_ptr() == slot.bytes.data_ptr()
        assert buffer.nbytes == slot.bytes.numel()


def test_a_closed_file_group_is_not_resident(tmp_path):
    parameters = [[torch.zeros(1 << 20)]]
    moments = Moments(parameters, "file", tmp_path)
    with moments.open(0) as (first, second):
        fill(first, second, 1)
        inside = _resident(moments)
    assert inside >= 8 << 20
    assert _resident(moments) == 0
    with moments.open(0) as (first, _):
        assert (first[0] == 11).all()


def _resident(moments):
    """Resident bytes of the mapping that holds the first buffer."""
    address, resident, inside = moments.buffers[0].data_ptr(), 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                begin, end = (int(part, 16) for part in head.split("-"))
                inside = begin <= address < end
            elif inside and line.startswith("Rss:"):
                resident += int(line.split()[1]) * 1024
    return resident


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_moments_of_parameters_on_a_gpu_come_back_from_wherever_they_lie(residency, tmp_path):
    parameters = [[parameter.cuda() for parameter in group] for group in groups()]
    moments = Moments(parameters, residency, tmp_path)
    for number in (0, 2):
        with moments.open(number) as (first, second):
            assert all(m.device.type == "cuda" for m in (*first, *second))
            fill(first, second, number)
    assert moments.buffers[0].device.type == ("cuda" if residency == "device" else "cpu")
    for number in (0, 2):
        with moments.open(number) as (first, second):
            for place in range(len(first)):
                assert (first[place] == 10 * number + place + 1).all()
                assert (second[place] == -10 * number - place - 1).all()


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_moments_come_to_where_the_parameters_are(residency, eight_bit, tmp_path):
    """On a device without memory: what is not changed is not copied back from there."""
    moments = Moments([[torch.empty(3, 5, device="meta")], []], residency, tmp_path, eight_bit)
    assert moments.buffers[0].device.type == ("meta" if residency == "device" else "cpu")
    assert moments.buffers[1].device.type == "cpu"
    if eight_bit:
        return  # decoding asks for values
    with moments.open(0, changes=False) as (first, second):
        assert [tensor.device.type for tensor in (*first, *second)] == ["meta", "meta"]
    with moments.open(1) as (first, second):
        assert first == second == []
    if residency != "device":
        with pytest.raises(NotImplementedError, match="meta"), moments.open(0):
            pass  # what changed is copied back, which a device without memory cannot


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eight_bits_are_rounded_when_a_group_closes_unless_nothing_changed(residency, dtype, tmp_path):
    moments = Moments(groups(dtype), residency, tmp_path, eight_bit=True)
    for number in (0, 2):
        with moments.open(number) as (first, second):
            assert all(m.dtype == dtype and not m.any() for m in (*first, *second))
            for place, (m, v) in enumerate(zip(first, second, strict=True)):
                m.fill_(-1.0 - number - place)
                v.fill_(4.0 + number)
    before = [buffer.clone() for buffer in moments.buffers]
    for number in (0, 2):
        with moments.open(number, changes=False) as (first, second):
            for place, (m, v) in enumerate(zip(first, second, strict=True)):
                torch.testing.assert_close(m, torch.full_like(m, -1.0 - number - place), rtol=0.02, atol=0)
                assert (v == 4.0 + number).all(), "the largest of its 256 is exact"
                m.zero_(), v.zero_()
    assert all(torch.equal(buffer, old) for buffer, old in zip(moments.buffers, before, strict=True))


def test_dropping_loses_nothing(tmp_path):
    for residency in RESIDENCIES:
        moments = Moments(groups(), residency, tmp_path)
        with moments.open(0) as (first, second):
            fill(first, second, 1)
        moments.drop(0)
        assert (moments.buffers[0][:15] == 11).all()


def test_a_full_disk_is_an_error_at_the_start(tmp_path):
    with failing(1, operations=[(os, "posix_fallocate")]), pytest.raises(OSError, match="No space"):
        Moments(groups(), "file", tmp_path)


def test_an_unknown_residency(tmp_path):
    with pytest.raises(ValueError, match="optimizer state must be one of device, host, file, got 'disk'"):
        Moments(groups(), "disk", tmp_path)


def stepped(moments, streams, order):
    """Opens groups in this order, the next one coming meanwhile, and adds to their moments. Returns the buffers."""
    for index, following in zip(order, [*order[1:], None], strict=True):
        moments.prefetch([index] if following is None else [index, following])
        with moments.open(index) as (first, second):
            for m, v in zip(first, second, strict=True):
                m.mul_(0.5).add_(index + 1.0)
                v.mul_(0.5).add_(index + 2.0)
    moments.prefetch([])
    moments.settle(0)
    return [buffer.clone() for buffer in moments.buffers]


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("seed", [None, 0])
def test_moments_come_and_go_beside_the_computation(seed, eight_bit, tmp_path):
    parameters, order = [[torch.zeros(300)] for _ in range(4)], [0, 1, 2, 3, 1, 1, 0]
    with LateStreams(seed) as streams:
        ours = Moments(parameters, "host", tmp_path, eight_bit, streams=lambda device: streams)
        found = stepped(ours, streams, order)
        beside = set(streams.beside)
    expected = stepped(Moments(parameters, "host", tmp_path, eight_bit), None, order)
    assert all(map(torch.equal, found, expected))
    if seed is None:  # all but the first and the last, with nothing to compute before or after
        assert len(beside) >= streams.copies - 2


@pytest.mark.parametrize("forgotten", ["computing", "copying"])
def test_moments_for_which_nobody_waits(forgotten, tmp_path):
    parameters, order = [[torch.zeros(300)] for _ in range(4)], [0, 1, 2, 3, 0]
    with LateStreams(forgotten=forgotten) as streams:
        ours = Moments(parameters, "host", tmp_path, streams=lambda device: streams)
        try:
            found = stepped(ours, streams, order)
        except MissingWait:
            return
    expected = stepped(Moments(parameters, "host", tmp_path), None, order)
    assert not all(map(torch.equal, found, expected))


def test_what_was_brought_before_a_change_is_not_used(tmp_path):
    with LateStreams() as streams:
        moments = Moments([[torch.zeros(3)]], "host", tmp_path, streams=lambda device: streams)
        with moments.open(0) as (first, second):
            moments.prefetch([0])
            fill(first, second, 1)
        with moments.open(0) as (first, _):
            assert (first[0] == 11).all()
        moments.prefetch([0])
        moments.settle(0)
        moments.buffers[0].fill_(5.0)  # as when a checkpoint is read
        with moments.open(0) as (first, _):
            assert (first[0] == 5).all()
