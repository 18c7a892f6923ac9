"""BlockAdamW against torch's AdamW, bit for bit; what happens to blocks that a step did not select."""

import itertools
from contextlib import nullcontext
from unittest.mock import Mock

import bitsandbytes
import pytest
import torch
from late_copies import LateStreams
from models import batch, tiny_store
from pairs import pairs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mebp_triton
from mebp_triton.store.optimizer_state import Moments
from mebp_triton.store.residency import RESIDENCIES
from mebp_triton.training.optimizers import adamw
from mebp_triton.training.optimizers.adamw import BlockAdamW, block_groups

SHAPES = [[(4, 6), (6,)], [(3, 5)], [], [(2, 2, 2), (1,), (7,)]]
RATES = [1e-2 * (1 - step / 40) for step in range(20)]


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in group] for group in SHAPES]


def set_gradients(groups, step, dtype=None, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in itertools.chain(*groups):
        grad = scale * torch.randn(parameter.shape, generator=generator)
        parameter.grad = grad.to(dtype or parameter.dtype)


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments_of(optimizer, index):
    with optimizer.moments.open(index) as (first, second):
        return [m.clone() for m in first], [v.clone() for v in second]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(itertools.chain(*left), itertools.chain(*right), strict=True))


# --- against torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residency", "weight_decay", "dtype"), pairs(RESIDENCIES, [0.0, 0.1], [torch.float32, torch.float64])
)
def test_twenty_steps_equal_torchs_adamw_bit_for_bit(residency, weight_decay, dtype, tmp_path):
    ours, theirs = parameters(dtype), parameters(dtype)
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = BlockAdamW(ours, residency=residency, directory=tmp_path, **options)
    reference = torch.optim.AdamW([{"params": group} for group in theirs], **options, fused=True)
    for step, rate in enumerate(RATES):
        for groups, each in ((ours, optimizer), (theirs, reference)):
            set_gradients(groups, step)
            set_rate(each, rate)
            each.step()
        assert same(ours, theirs), f"step {step}"
    for index, group in enumerate(theirs):
        first, second = moments_of(optimizer, index)
        for place, parameter in enumerate(group):
            state = reference.state[parameter]
            assert torch.equal(first[place], state["exp_avg"]) and torch.equal(second[place], state["exp_avg_sq"])
            assert optimizer.steps[index][place] == state["step"] == len(RATES)


def selections(steps, seed=0):
    """Random ones, some of them empty, and a long gap for every group."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [set(torch.nonzero(torch.rand(4, generator=generator) < 0.3).flatten().tolist()) for _ in range(steps)]
    return [one if not 60 <= step < 100 else set() for step, one in enumerate(drawn)]


@pytest.mark.parametrize(
    ("residency", "weight_decay", "dtype"), pairs(RESIDENCIES, [0.0, 0.1], [torch.float32, torch.float64])
)
def test_momentum_is_torchs_adamw_with_zero_gradients_for_the_unselected(residency, weight_decay, dtype, tmp_path):
    """At every one of 200 steps: what the moments lag behind is caught up with, and the parameters do not lag."""
    ours, theirs = parameters(dtype), parameters(dtype)
    options = {"weight_decay": weight_decay, "eps": 1e-4}
    optimizer = BlockAdamW(ours, residency=residency, directory=tmp_path, **options)
    reference = torch.optim.AdamW([{"params": group} for group in theirs], **options, fused=True)
    chosen = selections(200)
    assert set().union(*chosen) == {0, 1, 2, 3} and not all(chosen)
    for step, selected in enumerate(chosen):
        set_gradients(ours, step)  # gradients that lie about in unselected blocks do not count
        set_gradients(theirs, step)
        for index, group in enumerate(theirs):
            for parameter in group:
                if index not in selected:
                    parameter.grad.zero_()
        for each in (optimizer, reference):
            set_rate(each, 1e-2 * (1 - step / 250))
        optimizer.step(selected=selected)
        reference.step()
        mine, other = (torch.cat([p.detach().flatten() for p in itertools.chain(*groups)]) for groups in (ours, theirs))
        limit = {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
        assert (mine - other).abs().max() <= limit * other.abs().max(), f"step {step}"
    assert any(optimizer.lag)
    for index, group in enumerate(theirs):
        for place, parameter in enumerate(group):
            assert optimizer.steps[index][place] + optimizer.lag[index] == reference.state[parameter]["step"] == 200


@pytest.mark.parametrize("way", ["export_state", "state_dict"])
def test_a_resume_in_the_middle_of_a_lag_gives_the_same_bits(way, tmp_path):
    chosen = selections(120)

    def run(optimizer, groups, steps):
        for step in steps:
            set_gradients(groups, step)
            optimizer.step(selected=chosen[step])

    straight = parameters()
    run(BlockAdamW(straight, lr=1e-2, weight_decay=0.1, directory=tmp_path), straight, range(120))
    cut = parameters()
    first = BlockAdamW(cut, lr=1e-2, weight_decay=0.1, directory=tmp_path)
    run(first, cut, range(80))
    assert any(first.lag)
    second = BlockAdamW(cut, lr=1e-2, weight_decay=0.1, directory=tmp_path)
    if way == "export_state":
        second.import_state(first.export_state())
    else:
        second.load_state_dict(first.state_dict())
    run(second, cut, range(80, 120))
    assert same(straight, cut)


def test_momentum_moves_a_block_without_a_gradient_and_leaves_its_moments_alone(tmp_path):
    groups = parameters()
    optimizer = BlockAdamW(groups, lr=1e-2, directory=tmp_path)
    set_gradients(groups, 0)
    optimizer.step()
    before = [p.detach().clone() for p in groups[1]]
    first, second = moments_of(optimizer, 1)
    optimizer.zero_grad()
    optimizer.step(selected={0})
    assert not torch.equal(groups[1][0], before[0])
    later_first, later_second = moments_of(optimizer, 1)
    assert torch.equal(later_first[0], first[0]) and torch.equal(later_second[0], second[0])
    assert optimizer.steps[1][0] == 1 and optimizer.lag == [0, 1, 0, 1]
    groups[1][0].grad = torch.zeros_like(groups[1][0])
    optimizer.step(selected={1})
    later_first, later_second = moments_of(optimizer, 1)
    assert torch.allclose(later_first[0], 0.81 * first[0], rtol=1e-6)
    assert torch.allclose(later_second[0], 0.999**2 * second[0], rtol=1e-6)
    assert optimizer.steps[1][0] == 3 and optimizer.lag[1] == 0


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_none_leaves_everything_of_an_unselected_block_alone(residency, tmp_path):
    groups = parameters()
    optimizer = BlockAdamW(
        groups, lr=1e-2, weight_decay=0.5, unselected_update="none", residency=residency, directory=tmp_path
    )
    set_gradients(groups, 0)
    optimizer.step()
    before = [p.detach().clone() for p in groups[3]], *moments_of(optimizer, 3)
    for step in range(1, 4):
        set_gradients(groups, step)
        optimizer.step(selected={0, 1})
    assert same(before, (groups[3], *moments_of(optimizer, 3)))
    assert [float(step) for step in optimizer.steps[3]] == [1, 1, 1]
    assert [float(step) for step in optimizer.steps[0]] == [4, 4]


def test_the_skipped_steps_do_not_enter_the_bias_correction_of_none(tmp_path):
    """A block selected at steps 0 and 5 of six is one that was trained twice."""
    ours, theirs = parameters(), parameters()
    optimizer = BlockAdamW(ours, unselected_update="none", directory=tmp_path)
    reference = torch.optim.AdamW(theirs[1], weight_decay=0.0, fused=True)
    for step in range(6):
        set_gradients(ours, step)
        optimizer.step(selected={1} if step in (0, 5) else {0})
    for step in (0, 5):
        set_gradients(theirs, step)
        reference.step()
    assert torch.equal(ours[1][0], theirs[1][0])


@pytest.mark.parametrize("update", ["momentum", "none"])
def test_a_selected_parameter_without_a_gradient_is_left_alone_as_in_torch(update, tmp_path):
    ours, theirs = parameters(), parameters()
    optimizer = BlockAdamW(ours, weight_decay=0.3, unselected_update=update, directory=tmp_path)
    reference = torch.optim.AdamW([{"params": group} for group in theirs], weight_decay=0.3, fused=True)
    for step in range(5):
        for groups, each in ((ours, optimizer), (theirs, reference)):
            set_gradients(groups, step)
            groups[0][1].grad = None
            if step % 2:
                groups[1][0].grad = None
            each.step()
    assert same(ours, theirs)
    assert optimizer.steps[0][1] == 0 and optimizer.steps[1][0] == 3 and optimizer.steps[0][0] == 5


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_keep_float32_moments(residency, dtype, tmp_path):
    """The step is taken in float32 from what the parameter holds, and rounded once."""
    ours = parameters(dtype)
    optimizer = BlockAdamW(ours, weight_decay=0.1, residency=residency, directory=tmp_path)
    wide = [[nn.Parameter(p.detach().float()) for p in group] for group in ours]
    reference = torch.optim.AdamW([{"params": group} for group in wide], weight_decay=0.1, fused=True)
    for step in range(8):
        set_gradients(ours, step, scale=1e-3)  # its square is lost in float16
        for narrow, full in zip(itertools.chain(*ours), itertools.chain(*wide), strict=True):
            full.grad = narrow.grad.float()
        optimizer.step()
        reference.step()
        with torch.no_grad():
            for narrow, full in zip(itertools.chain(*ours), itertools.chain(*wide), strict=True):
                full.copy_(full.to(dtype))
                assert narrow.dtype == dtype and torch.equal(narrow.float(), full), f"step {step}"
    assert all(buffer.dtype == torch.float32 for buffer in optimizer.moments.buffers if buffer.numel())
    first, second = moments_of(optimizer, 0)
    assert torch.equal(first[0], reference.state[wide[0][0]]["exp_avg"])
    assert torch.equal(second[0], reference.state[wide[0][0]]["exp_avg_sq"]) and second[0].all()


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_that_are_not_selected_are_stepped_in_float32(residency, dtype, tmp_path):
    ours = parameters(dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
    optimizer = BlockAdamW(ours, residency=residency, directory=tmp_path, **options)
    wide = [[nn.Parameter(p.detach().float()) for p in group] for group in ours]
    reference = torch.optim.AdamW([{"params": group} for group in wide], **options, fused=True)
    moved = twice = 0
    for step in range(6):
        before = [p.detach().clone() for p in ours[1]]
        set_gradients(ours, step)
        optimizer.step(selected={0, 3} if step else {0, 1, 3})
        with torch.no_grad():
            for place, parameter in enumerate(wide[1]):
                parameter.grad = ours[1][place].grad.float() if step == 0 else torch.zeros_like(parameter)
        reference.step()
        with torch.no_grad():
            for narrow, full in zip(ours[1], wide[1], strict=True):
                torch.testing.assert_close(narrow.float(), full, rtol=torch.finfo(dtype).eps, atol=0)
                twice += int((narrow != full.to(dtype)).sum())
                full.copy_(narrow)
        moved += not torch.equal(before[0], ours[1][0])
    assert moved == 6, "a step of zero gradient moves them too"
    assert twice <= 2, f"of 90 values, {twice} were rounded more than once"
    assert optimizer.lag[1] == 5 and optimizer.steps[1][0] == 1


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="unselected update must be one of momentum, none, got 'zero'"):
        BlockAdamW(parameters(), unselected_update="zero", directory=tmp_path)
    with pytest.raises(ValueError, match="optimizer state must be one of"):
        BlockAdamW(parameters(), residency="disk", directory=tmp_path)
    with pytest.raises(ValueError, match="closure"):
        BlockAdamW(parameters(), directory=tmp_path).step(lambda: 0.0)


class Calls(TorchDispatchMode):
    """While active, counts the calls of torch's fused step, how many parameters each takes, and what is copied."""

    def __init__(self):
        super().__init__()
        self.sizes, self.copied, self.others = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._fused_adamw_.default:
            self.sizes.append(len(args[0]))
        if func is torch.ops.aten.copy_.default:
            self.copied.append(tuple(args[0].shape))
        self.others += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resident_groups_are_stepped_in_one_call(dtype, tmp_path):
    groups = parameters(dtype)
    optimizer = BlockAdamW(groups, weight_decay=0.1)
    for step, selected in enumerate((None, {0, 3}, {1}, None)):
        set_gradients(groups, step)
        with Calls() as calls:
            optimizer.step(selected=selected)
        assert calls.sizes == [sum(len(groups[index]) for index in (range(4) if selected is None else selected))]
        assert calls.others < 90, "operations on one parameter each"
    one_by_one = BlockAdamW(groups, residency="host", directory=tmp_path)
    set_gradients(groups, 9)
    with Calls() as calls:
        one_by_one.step()
    assert calls.sizes == [2, 1, 3]


def test_steps_that_are_copied_to_the_device(monkeypatch):
    """As on a GPU, where the fused step counts on in a copy: ours are on the CPU and count as well."""
    made = []
    for copied in (True, False):
        groups = parameters()
        optimizer = BlockAdamW(groups, weight_decay=0.1)
        if copied:
            monkeypatch.setattr(optimizer, "_steps_on", optimizer._copied_steps)
        for step, selected in enumerate((None, {0}, {1, 3}, None)):
            set_gradients(groups, step)
            if step == 1:
                groups[0][1].grad = None
            optimizer.step(selected=selected)
        made.append((groups, optimizer))
    assert same(made[0][0], made[1][0]) and made[0][1].steps == made[1][1].steps
    assert [float(one) for one in made[0][1].steps[0]] == [4, 3]


def test_steps_are_copied_only_where_they_changed(monkeypatch):
    """A copy to a GPU waits for all that it has to do."""
    groups = parameters()
    optimizer, twin = BlockAdamW(groups), BlockAdamW(parameters())
    monkeypatch.setattr(optimizer, "_steps_on", optimizer._copied_steps)

    def copies(selected):
        set_gradients(groups, 0)
        with Calls() as calls:
            optimizer.step(selected=selected)
        return calls.copied.count((sum(map(len, groups)),))

    assert [copies(selected) for selected in (None, None, {0}, None, None)] == [1, 0, 0, 1, 0]
    twin.import_state(optimizer.export_state())
    optimizer.import_state(twin.export_state())
    assert copies(None) == 1
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        patch.setattr(adamw, "adamw", Mock(side_effect=RuntimeError("planted")))
        copies(None)
    assert copies(None) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("selected", [None, {0}])
def test_a_step_counts_as_a_change_of_every_parameter(selected, dtype):
    """By which autograd, and a block, refuse a backward pass through what is not there any more."""
    groups = parameters(dtype)
    optimizer = BlockAdamW(groups)
    for step in range(2):
        set_gradients(groups, step)
        before = [parameter._version for parameter in itertools.chain(*groups)]
        optimizer.step(selected=selected if step else None)
        assert all(p._version > old for p, old in zip(itertools.chain(*groups), before, strict=True))


def test_groups_of_other_settings_are_stepped_apart():
    ours, theirs = parameters(), parameters()
    optimizer = BlockAdamW(ours)
    reference = torch.optim.AdamW([{"params": group} for group in theirs], weight_decay=0.0, fused=True)
    for index in (1, 3):
        for each in (optimizer, reference):
            each.param_groups[index] |= {"lr": 0.5, "weight_decay": 0.25}
    for step in range(3):
        for groups, each in ((ours, optimizer), (theirs, reference)):
            set_gradients(groups, step)
            with Calls() as calls:
                each.step()
        if step == 0:
            assert calls.sizes == [2, 1, 3]
    assert same(ours, theirs)


@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_temporaries_are_bounded(limit, monkeypatch):
    """Where all groups would need copies, or roots of their moments, batches of groups have them in turn."""
    monkeypatch.setattr(adamw, "TEMPORARIES", limit)
    groups, twins = parameters(torch.bfloat16), parameters(torch.bfloat16)
    batched, reference = BlockAdamW(groups), BlockAdamW(twins, residency="host")
    for step, selected in enumerate((None, {0}, {1, 3}, set(), None)):
        for each, optimizer in ((groups, batched), (twins, reference)):
            set_gradients(each, step)
            with Calls() as calls:
                optimizer.step(selected=selected)
            if optimizer is batched and selected is None:
                assert len(calls.sizes) == (3 if limit == 1 else 1)
    assert same(groups, twins) and batched.steps == reference.steps and batched.lag == reference.lag


# --- in 8 bits ------------------------------------------------------------------------------------------------------


def wide_parameters():
    generator = torch.Generator().manual_seed(0)
    return [[nn.Parameter(torch.randn(64, 128, generator=generator)) for _ in range(2)] for _ in range(2)]


def test_eight_bits_train_as_bitsandbytes_adamw8bit(tmp_path):
    """Not to the bit: bitsandbytes rounds some values on the CPU to the second nearest code."""
    ours, theirs, exact = wide_parameters(), wide_parameters(), wide_parameters()
    optimizer = BlockAdamW(ours, lr=1e-2, weight_decay=0.1, directory=tmp_path, eight_bit=True)
    peer = bitsandbytes.optim.AdamW8bit(itertools.chain(*theirs), lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(itertools.chain(*exact), lr=1e-2, weight_decay=0.1, fused=True)
    start = [parameter.detach().clone() for parameter in itertools.chain(*ours)]
    for step in range(20):
        for groups, each in ((ours, optimizer), (theirs, peer), (exact, reference)):
            set_gradients(groups, step)
            each.step()
    moved = [parameter.detach() - old for parameter, old in zip(itertools.chain(*exact), start, strict=True)]

    def distance(groups):
        ends = zip(itertools.chain(*groups), start, moved, strict=True)
        return max(float((p.detach() - old - way).norm() / way.norm()) for p, old, way in ends)

    print(f"from AdamW in float32: ours {distance(ours):.4f}, bitsandbytes {distance(theirs):.4f}")
    assert distance(ours) < 0.05
    assert distance(ours) < 1.1 * distance(theirs)
    encoded = sum(buffer.nbytes for buffer in optimizer.moments.buffers)
    assert encoded == 4 * 64 * 128 * (2 + 2 * 4 / 256)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_coasting_in_eight_bits_is_a_step_with_a_zero_gradient(residency, tmp_path):
    """The second moment must not become 0 where the first is not: a step with no gradient would be endless."""
    ours, theirs = wide_parameters(), wide_parameters()
    optimizer = BlockAdamW(ours, lr=1e-2, residency=residency, directory=tmp_path, eight_bit=True)
    reference = torch.optim.AdamW(itertools.chain(*theirs), lr=1e-2, fused=True)
    for step in range(12):
        selected = {0, 1} if step == 0 else {step % 2}
        for groups, each in ((ours, {"selected": selected}), (theirs, {})):
            set_gradients(groups, step)
            for index, parameter in enumerate(itertools.chain(*groups)):
                parameter.grad[0] *= 1e-6  # beside large ones of the same 256
                if index // 2 not in selected:
                    parameter.grad = torch.zeros_like(parameter) if groups is theirs else None
            (optimizer if groups is ours else reference).step(**each)
    for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        apart = (mine - other).detach().abs()
        assert apart[1:].max() < 2e-2, "twelve steps of 1e-2"
        assert apart[0].max() < 12e-2, "small ones go less far, and never further"


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_restored_optimizer_in_eight_bits_goes_on_bit_for_bit(residency, tmp_path):
    ours, theirs = wide_parameters(), wide_parameters()
    first = BlockAdamW(ours, residency=residency, directory=tmp_path, eight_bit=True)
    for step in range(3):
        set_gradients(ours, step)
        first.step(selected={step % 2})
    second = BlockAdamW(theirs, residency="device", eight_bit=True)
    second.import_state(first.export_state())
    with torch.no_grad():
        for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
            other.copy_(mine)
    for step in range(3, 6):
        for groups, each in ((ours, first), (theirs, second)):
            set_gradients(groups, step)
            each.step(selected={step % 2})
    assert same(ours, theirs)
    with pytest.raises(ValueError, match="does not fit block 0"):
        BlockAdamW(wide_parameters()).import_state(first.export_state())


# --- in the backward pass -------------------------------------------------------------------------------------------


def loss_of(groups, step, without=()):
    """A loss through the groups in order, whose gradients depend on the parameters; ``without``: not in it."""
    generator = torch.Generator().manual_seed(2000 + step)
    total = torch.zeros(())
    for place, parameter in enumerate(itertools.chain(*groups)):
        weight = torch.randn(parameter.shape, generator=generator)
        if place not in without:
            total = total * 0.7 + (parameter.float() - weight).square().sum()
    return total


@pytest.mark.parametrize(
    ("residency", "update", "dtype"), pairs(RESIDENCIES, ["momentum", "none"], [torch.float32, torch.bfloat16])
)
def test_steps_in_the_backward_pass_equal_steps_after_it_bit_for_bit(residency, update, dtype, tmp_path):
    made = []
    for within in (True, False):
        groups = parameters(dtype)
        optimizer = BlockAdamW(
            groups, weight_decay=0.1, unselected_update=update, residency=residency, directory=tmp_path
        )
        for step, rate in enumerate(RATES[:6]):
            selected = None if step == 0 else {0, 3} if step % 2 else {1, 2}
            for index, group in enumerate(groups):
                for parameter in group:
                    parameter.requires_grad_(selected is None or index in selected)
            loss = loss_of(groups, step, without=(3,) if step == 5 else ())
            set_rate(optimizer, rate)
            if within:
                with optimizer.step_in_backward(selected) as norms:
                    loss.backward()
                assert len(norms) == (3 if selected is None else 2 if step % 2 else 1)
                assert all(parameter.grad is None for parameter in itertools.chain(*groups))
            else:
                loss.backward()
                optimizer.step(selected=selected)
                optimizer.zero_grad()
        made.append((groups, optimizer))
    (ours, one), (theirs, other) = made
    assert same(ours, theirs) and one.steps == other.steps
    assert all(torch.equal(left, right) for left, right in zip(one.moments.buffers, other.moments.buffers, strict=True))


@pytest.mark.parametrize(("within", "eight_bit", "seed"), pairs([False, True], [False, True], [None, 0]))
def test_moments_that_come_and_go_beside_the_computation(within, eight_bit, seed, tmp_path):
    made = []
    streams = LateStreams(seed)
    for beside in (True, False):
        groups = parameters()
        optimizer = BlockAdamW(groups, residency="host", directory=tmp_path, eight_bit=eight_bit)
        if beside:
            optimizer.moments = Moments(groups, "host", tmp_path, eight_bit, lambda device: streams)
        with streams if beside else nullcontext():
            for step, selected in enumerate([None, {0, 3}, {1, 2}, None]):
                loss = loss_of(groups, step, without=(3,) if step == 1 else ())
                with optimizer.step_in_backward(selected) if within else nullcontext():
                    loss.backward()
                if not within:
                    optimizer.step(selected=selected)
                optimizer.zero_grad()
            made.append((groups, optimizer.export_state()))
    (ours, state), (theirs, other) = made
    assert same(ours, theirs) and all(torch.equal(state[name], other[name]) for name in other)
    assert streams.copies > 20


def test_in_the_backward_pass_moments_come_while_lower_blocks_are_differentiated(tmp_path):
    streams, groups = LateStreams(), parameters()
    optimizer = BlockAdamW(groups, residency="host", directory=tmp_path)
    optimizer.moments = Moments(groups, "host", tmp_path, streams=lambda device: streams)
    with streams, optimizer.step_in_backward():
        loss_of(groups, 0).backward()
    alone = set(range(1, streams.copies + 1)) - streams.beside
    assert streams.copies == 2 * 3, "nothing is copied for the block without parameters"
    assert alone == {1, streams.copies}, "the moments of the top block come when they are needed; the last ones go"


def test_state_that_is_read_while_moments_are_on_their_way_to_the_host(tmp_path):
    streams, groups = LateStreams(), parameters()
    optimizer = BlockAdamW(groups, residency="host", directory=tmp_path)
    optimizer.moments = Moments(groups, "host", tmp_path, streams=lambda device: streams)
    with streams:
        states = []
        for step in range(2):
            loss_of(groups, step).backward()
            optimizer.step()
            states.append(optimizer.export_state())
        optimizer.step()
        assert streams.pending, "copies are under way"
        optimizer.import_state(states[0])
        found = optimizer.export_state()
    assert all(torch.equal(found[name], value) for name, value in states[0].items())
    assert not all(torch.equal(found[name], value) for name, value in states[1].items())


def test_the_gradients_of_one_block_exist_at_a_time(tmp_path):
    model = mebp_triton.load(tiny_store("llama", tmp_path), lora=mebp_triton.LoraConfig(r=2))
    groups = block_groups(model, model.mebp.engine)
    optimizer = BlockAdamW(groups, lr=1e-2, directory=tmp_path)
    before = [[parameter.detach().clone() for parameter in group] for group in groups]
    order = []

    def look(index, norm):
        order.append(index)
        for other, group in enumerate(groups):
            assert all((parameter.grad is not None) == (other == index) for parameter in group)
            assert all(torch.equal(p, b) for p, b in zip(group, before[other], strict=True)) == (other <= index)

    with optimizer.step_in_backward(on_norm=look) as norms:
        model(**batch()).loss.backward()
        assert order == [2, 1, 0] and all(norm > 0 for norm in norms)
    assert not any(parameter.grad is not None for group in groups for parameter in group)
    assert not any(parameter._post_accumulate_grad_hooks for group in groups for parameter in group)


def test_each_group_is_clipped_by_its_own_norm(tmp_path):
    ours, theirs = parameters(), parameters()
    optimizer = BlockAdamW(ours, directory=tmp_path)
    reference = torch.optim.AdamW(
        [{"params": group} for group in theirs if group], lr=1e-3, weight_decay=0.0, fused=True
    )
    seen = {}
    for step in range(4):
        with optimizer.step_in_backward(None, 0.5, seen.__setitem__) as norms:
            loss_of(ours, step).backward()
        loss_of(theirs, step).backward()
        expected = [float(torch.nn.utils.clip_grad_norm_(group, 0.5)) for group in theirs if group]
        reference.step()
        reference.zero_grad()
        assert sorted(norms) == sorted(expected) and min(norms) > 0.5
        assert [seen[index] for index in sorted(seen)] == expected
    assert same(ours, theirs)


def test_a_group_without_any_gradient_is_not_stepped(tmp_path):
    groups, seen = parameters(), {}
    optimizer = BlockAdamW(groups, weight_decay=0.5, directory=tmp_path)
    before = [parameter.detach().clone() for parameter in groups[1]]
    with optimizer.step_in_backward(on_norm=seen.__setitem__) as norms:
        loss_of(groups, 0, without=(2,)).backward()
    assert sorted(seen) == [0, 3] and len(norms) == 2
    assert same([groups[1]], [before]) and optimizer.steps[1][0] == 0


def test_a_norm_that_is_refused_stops_the_pass_before_that_step(tmp_path):
    groups = parameters()
    optimizer = BlockAdamW(groups, directory=tmp_path)
    before = [[parameter.detach().clone() for parameter in group] for group in groups]

    def refuse(index, norm):
        if index == 1:
            raise ArithmeticError("planted")

    with pytest.raises(ArithmeticError, match="planted"), optimizer.step_in_backward(on_norm=refuse):
        loss_of(groups, 0).backward()
    assert same([groups[1]], [before[1]]) and not any(optimizer.steps[1])
    assert not any(parameter._post_accumulate_grad_hooks for parameter in itertools.chain(*groups))


def test_a_second_backward_pass_is_an_error(tmp_path):
    groups = parameters()
    optimizer = BlockAdamW(groups, directory=tmp_path)
    with pytest.raises(RuntimeError, match="only one backward pass"), optimizer.step_in_backward():
        for step in range(2):
            loss_of(groups, step).backward()


# --- saving and restoring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residency", "dtype", "way"), pairs(RESIDENCIES, [torch.float32, torch.bfloat16], ["export_state", "state_dict"])
)
def test_a_restored_optimizer_goes_on_bit_for_bit(residency, dtype, way, tmp_path):
    straight = parameters(dtype)
    optimizer = BlockAdamW(straight, weight_decay=0.1, residency=residency, directory=tmp_path)
    for step in range(4):
        set_gradients(straight, step)
        optimizer.step(selected={0, step % 3})
    state = getattr(optimizer, way)()
    resumed = [[nn.Parameter(p.detach().clone()) for p in group] for group in straight]
    other = BlockAdamW(resumed, weight_decay=0.1, residency=residency, directory=tmp_path)
    buffers = [buffer.data_ptr() for buffer in other.moments.buffers]
    dtypes = [buffer.dtype for buffer in other.moments.buffers]
    if way == "export_state":
        other.import_state(state)
    else:
        other.load_state_dict(state)
    assert [buffer.data_ptr() for buffer in other.moments.buffers] == buffers, "no longer backed by their map"
    assert [buffer.dtype for buffer in other.moments.buffers] == dtypes
    if residency == "file":
        slots = [slot.bytes.data_ptr() for slot in other.moments.slots]
        assert slots == buffers
    for step in range(4, 8):
        for groups, each in ((straight, optimizer), (resumed, other)):
            set_gradients(groups, step)
            each.step(selected={0, step % 3})
    assert same(straight, resumed)
    assert optimizer.steps == other.steps


def test_an_export_is_a_copy(tmp_path):
    groups = parameters()
    optimizer = BlockAdamW(groups, directory=tmp_path)
    state = optimizer.export_state()
    set_gradients(groups, 0)
    optimizer.step()
    assert not any(tensor.any() for tensor in state.values())
    optimizer.import_state(state)
    state["moments.0"].fill_(3)
    state["steps.0"].fill_(3)
    assert not moments_of(optimizer, 0)[0][0].any() and optimizer.steps[0][0] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("moments.3"),
        lambda state: state.pop("steps.3"),
        lambda state: state.pop("lag.3"),
        lambda state: state.update({"moments.3": state["moments.3"][:-1]}),
        lambda state: state.update({"moments.3": state["moments.3"].half()}),
        lambda state: state.update({"steps.3": state["steps.3"][:-1]}),
        lambda state: state.clear(),
    ],
)
def test_a_state_of_another_model_is_refused_and_nothing_is_taken_from_it(change, tmp_path):
    groups = parameters()
    optimizer = BlockAdamW(groups, directory=tmp_path)
    set_gradients(groups, 0)
    optimizer.step()
    state = optimizer.export_state()
    before = optimizer.export_state()
    for name in state:
        state[name] = state[name] + 1
    change(state)
    with pytest.raises(ValueError, match="does not fit block"):
        optimizer.import_state(state)
    after = optimizer.export_state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_group_of_another_model_is_refused_too(tmp_path):
    groups = parameters()
    optimizer = BlockAdamW(groups, directory=tmp_path)
    set_gradients(groups, 0)
    optimizer.step()
    before = optimizer.export_state()
    good = optimizer.export_group(0)
    for name, value in (
        ("moments", good["moments"][:1]),
        ("moments", good["moments"].half()),
        ("steps", good["steps"][:1]),
    ):
        with pytest.raises(ValueError, match="does not fit block 0"):
            optimizer.import_group(0, good | {name: value})
    assert all(torch.equal(before[name], after) for name, after in optimizer.export_state().items())


def test_an_lr_scheduler_of_torch_drives_it(tmp_path):
    optimizer = BlockAdamW(parameters(), lr=1.0, directory=tmp_path)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.125] * 4
    restored = BlockAdamW(parameters(), lr=1.0, directory=tmp_path)
    restored.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in restored.param_groups] == [0.125] * 4


# --- groups ---------------------------------------------------------------------------------------------------------


def test_block_groups(tmp_path):
    model = mebp_triton.load(tiny_store("llama", tmp_path), lora=mebp_triton.LoraConfig(r=2))
    groups = block_groups(model, model.mebp.engine)
    assert len(groups) == 3
    grouped = [id(parameter) for group in groups for parameter in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for index, group in enumerate(groups):
        assert len(group) == 14
        own = {id(p) for p in model.model.layers[index].parameters()}
        assert {id(p) for p in group} <= own
    extra = nn.Parameter(torch.zeros(3))
    model.register_parameter("extra", extra)
    assert [len(group) for group in block_groups(model, model.mebp.engine)] == [14, 14, 14, 1]
    assert block_groups(model, model.mebp.engine)[-1][0] is extra
