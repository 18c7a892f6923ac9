"""One-pass cross-entropy over an int4 head, against torch on all logits."""

import pytest
import torch
from allocations import Allocations
from pairs import pairs
from torch.nn import functional

from mebp_triton.kernels import cross_entropy, panel, reference
from mebp_triton.kernels.cross_entropy import int4_cross_entropy_panel
from mebp_triton.kernels.names import FORMS
from mebp_triton.kernels.workspace import Workspace, use_workspace

CHAINS = {
    "plain": (1.0,),
    "scale": (0.4,),
    "softcap": (1 / 3, 3.0),
    "scaled-softcap": (0.5 / 3, 3.0 * 2),
    "two-tanh": (0.5, 2.0, 1.5),
    "negative": (-0.7,),
}


def on_all_logits(hidden, weight, targets, bias=None, factors=(1.0,), ignore_index=-100):
    """The same results as the operation's, from all logits by torch's own operations in the dtype of ``hidden``."""
    hidden = hidden.detach().requires_grad_(True)
    logits = reference.matmul(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * factors[0]
    for factor in factors[1:]:
        logits = torch.tanh(logits) * factor
    losses = functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), hidden)
    return losses.detach(), grad, logits.argmax(-1)


TILES = (1, 8, 64)


@pytest.fixture(params=TILES, ids=lambda tile: f"tile-{tile}")
def tile(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "VOCABULARY_TILE", request.param)


def some_targets(count, vocabulary, device, every=4):
    """Random targets; each ``every``-th is masked."""
    targets = torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(3))
    targets[::every] = -100
    return targets.to(device)


@pytest.mark.parametrize(
    ("chain", "with_bias", "form", "tile"),
    pairs(list(CHAINS), [False, True], [form for form in FORMS if form.group_size in (16, 32)], TILES),
    indirect=["tile"],
    ids=str,
)
def test_float64(make_weight, normal, device, form, tile, chain, with_bias):
    factors = CHAINS[chain]
    weight = make_weight(37, 70, form.group_size, form.scheme, bits=form.bits)
    hidden, targets = normal(11, 70, dtype=torch.float64), some_targets(11, 37, device)
    bias = normal(37, dtype=torch.float64) if with_bias else None
    losses, grad, argmax = int4_cross_entropy_panel(hidden, weight, targets, bias, factors=factors)
    truth = on_all_logits(hidden, weight, targets, bias, factors)
    assert losses.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(losses, truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, truth[1], rtol=1e-10, atol=1e-12)
    valid = targets != -100
    assert torch.equal(argmax[valid], truth[2][valid])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_as_exact_as_torch_in_the_same_dtype(monkeypatch, make_weight, normal, device, dtype, name):
    monkeypatch.setattr(cross_entropy, "VOCABULARY_TILE", 64)
    weight = make_weight(150, 130, 64, "affine")
    hidden, targets = normal(40, 130, dtype=dtype), some_targets(40, 150, device)
    losses, grad, _ = int4_cross_entropy_panel(hidden, weight, targets, factors=CHAINS[name])
    same = on_all_logits(hidden, weight, targets, factors=CHAINS[name])
    truth = on_all_logits(hidden.double(), weight, targets, factors=CHAINS[name])
    for what, ours, torchs, exact in zip(("loss", "grad"), (losses, grad), same, truth, strict=False):
        assert ours.dtype == torch.float32
        error, allowed = (ours.double() - exact).norm(), (torchs.double() - exact).norm()
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps * exact.norm(), what
        # In half precision the exponential magnifies the rounding of the logits, so only torch's error is a limit.
        assert dtype != torch.float32 or error <= 1e-6 * exact.norm(), what


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 1023, 1024, 1025, 2100])
def test_vocabularies_around_the_tile(make_weight, normal, device, vocabulary):
    weight = make_weight(vocabulary, 64)
    hidden, targets = normal(6, 64, dtype=torch.float64), some_targets(6, vocabulary, device)
    targets[1], targets[2] = 0, vocabulary - 1
    losses, grad, _ = int4_cross_entropy_panel(hidden, weight, targets)
    truth = on_all_logits(hidden, weight, targets)
    torch.testing.assert_close(losses, truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, truth[1], rtol=1e-10, atol=1e-12)


def test_every_token_is_a_target_once(make_weight, normal, device, tile):
    weight, targets = make_weight(37, 64), torch.arange(37, device=device)
    hidden = normal(1, 64, dtype=torch.float64).expand(37, 64)
    losses, _, _ = int4_cross_entropy_panel(hidden, weight, targets)
    assert (-losses).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_masked_tokens_have_no_loss_gradient_or_argmax(make_weight, normal, device):
    weight, targets = make_weight(37, 70), some_targets(11, 37, device)
    hidden = normal(11, 70)
    hidden[targets == -100] = float("nan")  # must not be read
    losses, grad, argmax = int4_cross_entropy_panel(hidden, weight, targets)
    masked = targets == -100
    assert not losses[masked].any() and not grad[masked].any() and (argmax[masked] == -1).all()
    assert (losses[~masked] > 0).all() and grad[~masked].isfinite().all() and (argmax[~masked] >= 0).all()


@pytest.mark.parametrize("count", [0, 5])
def test_no_valid_target(make_weight, normal, device, count):
    targets = torch.full((count,), -100, device=device)
    losses, grad, argmax = int4_cross_entropy_panel(normal(count, 70), make_weight(37, 70), targets)
    assert torch.equal(losses, torch.zeros(count, device=device))
    assert torch.equal(grad, torch.zeros(count, 70, device=device))
    assert (argmax == -1).all() and argmax.shape == (count,)


def test_ignore_index_may_be_a_token(make_weight, normal, device):
    weight, hidden = make_weight(37, 70), normal(8, 70, dtype=torch.float64)
    targets = torch.tensor([5, 0, 7, 0, 1, 2, 0, 36], device=device)
    losses, grad, _ = int4_cross_entropy_panel(hidden, weight, targets, ignore_index=0)
    truth = on_all_logits(hidden, weight, targets, ignore_index=0)
    torch.testing.assert_close(losses, truth[0])
    torch.testing.assert_close(grad, truth[1])


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e30])
def test_huge_logits_do_not_overflow(make_weight, normal, device, tile, scale):
    weight, targets = make_weight(37, 70), some_targets(11, 37, device)
    hidden = normal(11, 70) * scale
    losses, grad, _ = int4_cross_entropy_panel(hidden, weight, targets)
    truth = on_all_logits(hidden.double(), weight, targets)
    torch.testing.assert_close(losses.double(), truth[0], rtol=1e-5, atol=1e-5 * scale)
    assert grad.isfinite().all()
    decided = (truth[1] - grad.double()).norm() / truth[1].norm()
    assert decided < 1e-3


@pytest.mark.parametrize("direction", [1, -1])
def test_the_maximum_may_rise_or_fall_over_the_tiles(monkeypatch, make_weight, device, direction):
    """With sorted logits the running maximum moves in every tile, or in the first one only."""
    monkeypatch.setattr(cross_entropy, "VOCABULARY_TILE", 5)
    weight, hidden = make_weight(37, 64), torch.zeros(3, 64, dtype=torch.float64, device=device)
    bias = direction * torch.linspace(-300, 300, 37, dtype=torch.float64, device=device)
    targets = torch.tensor([0, 18, 36], device=device)
    losses, grad, argmax = int4_cross_entropy_panel(hidden, weight, targets, bias)
    truth = on_all_logits(hidden, weight, targets, bias)
    torch.testing.assert_close(losses, truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, truth[1], rtol=1e-12, atol=1e-12)
    assert (argmax == (36 if direction == 1 else 0)).all()


def test_among_equal_logits_the_first_is_the_most_likely(make_weight, device, tile):
    bias = torch.zeros(37, device=device)
    bias[[9, 20, 21, 36]] = 4.0
    hidden, targets = torch.zeros(4, 64, device=device), torch.tensor([9, 20, 21, 36], device=device)
    losses, _, argmax = int4_cross_entropy_panel(hidden, make_weight(37, 64), targets, bias)
    assert (argmax == 9).all()
    assert (losses == losses[0]).all()


def test_without_a_gradient_the_loss_is_the_same(make_weight, normal, device, scheme):
    weight, targets, hidden = make_weight(37, 70, 32, scheme), some_targets(11, 37, device), normal(11, 70)
    with_grad = int4_cross_entropy_panel(hidden, weight, targets)
    without = int4_cross_entropy_panel(hidden, weight, targets, need_grad=False)
    assert torch.equal(with_grad[0], without[0]) and torch.equal(with_grad[2], without[2])
    assert without[1].shape == (0, 70)


def test_operands_are_left_as_they_are(make_weight, normal, device):
    weight, targets, hidden, bias = make_weight(37, 70), some_targets(11, 37, device), normal(11, 70), normal(37)
    before = [tensor.clone() for tensor in (hidden, targets, bias, *weight.tensors().values())]
    int4_cross_entropy_panel(hidden, weight, targets, bias, factors=(0.5, 2.0))
    for tensor, old in zip((hidden, targets, bias, *weight.tensors().values()), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("view", ["step", "transposed", "expanded"])
def test_strides_of_hidden(make_weight, normal, device, view):
    wide = normal(140, 140, dtype=torch.float64)
    hidden = {"step": wide[:22:2, ::2], "transposed": wide.t()[:11, :70], "expanded": wide[:1, :70].expand(11, 70)}[
        view
    ]
    weight, targets = make_weight(37, 70), some_targets(11, 37, device)
    ours = int4_cross_entropy_panel(hidden, weight, targets)
    truth = on_all_logits(hidden, weight, targets)
    torch.testing.assert_close(ours[0], truth[0])
    torch.testing.assert_close(ours[1], truth[1])


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("factors", [CHAINS["plain"], CHAINS["softcap"]], ids=["plain", "softcap"])
def test_no_logits_and_no_decoded_head_are_allocated(monkeypatch, make_weight, normal, device, factors):
    tokens, vocabulary, width = 64, 1000, 64
    monkeypatch.setattr(cross_entropy, "VOCABULARY_TILE", 32)
    weight, targets = make_weight(vocabulary, width), some_targets(tokens, vocabulary, device)
    with Allocations() as allocations:
        int4_cross_entropy_panel(normal(tokens, width), weight, targets, factors=factors)
    assert 0 < allocations.largest <= tokens * width
    assert allocations.largest < tokens * vocabulary // 8


@pytest.mark.usefixtures("plain_torch")
def test_the_head_is_decoded_once(monkeypatch, make_weight, normal, device, tile):
    rows = []
    decode = panel.PanelDecoder.__call__
    monkeypatch.setattr(
        panel.PanelDecoder, "__call__", lambda self, *span: rows.append((self.weight, *span)) or decode(self, *span)
    )
    weight, targets = make_weight(37, 70), some_targets(11, 37, device)
    int4_cross_entropy_panel(normal(11, 70), weight, targets)
    spans = [(start, stop) for of, start, stop, *_ in rows if of is weight]
    assert sum(stop - start for start, stop in spans) == 37
    assert sorted(spans) == spans and spans[0][0] == 0


@pytest.mark.usefixtures("plain_torch")
def test_wide_heads_have_shorter_tiles(make_weight, normal, device):
    weight, targets = make_weight(37, 640), some_targets(11, 37, device)
    with use_workspace(Workspace(64, 64)), Allocations() as allocations:
        losses, _, _ = int4_cross_entropy_panel(normal(11, 640), weight, targets)
    assert allocations.largest <= 11 * 640
    assert torch.allclose(losses, on_all_logits(normal(11, 640), weight, targets)[0], atol=1e-4)


@pytest.mark.usefixtures("triton_kernels")
# For the kernel, chains with a tanh differ in their slopes alone, so one of them meets all other settings.
@pytest.mark.parametrize(
    ("chain", "logits", "with_bias"),
    [*pairs(["plain", "scaled-softcap"], [1, 8 * 11, 1 << 22], [False, True])]
    + [("scale", 8 * 11, False), ("softcap", 1 << 22, True), ("two-tanh", 8 * 11, True), ("negative", 1, False)],
)
def test_by_kernels(make_weight, normal, device, monkeypatch, chain, logits, with_bias):
    """Kernels that decode and sum up give the same losses, gradients and argmax."""
    factors = CHAINS[chain]
    monkeypatch.setattr(cross_entropy, "LOGITS", logits)
    monkeypatch.setattr(cross_entropy, "VOCABULARY_TILE", 5)
    weight, bias = make_weight(37, 70, 32), normal(37) if with_bias else None
    hidden, targets = normal(11, 70), some_targets(11, 37, device)
    found = int4_cross_entropy_panel(hidden, weight, targets, bias, factors=factors, by_kernel=True)
    plain = int4_cross_entropy_panel(hidden, weight, targets, bias, factors=factors)
    for name, ours, theirs in zip(("losses", "grad", "argmax"), found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    half = int4_cross_entropy_panel(hidden.half(), weight, targets, bias, factors=factors, by_kernel=True)
    torch.testing.assert_close(half[0], plain[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(half[1], plain[1], rtol=5e-2, atol=5e-2)
