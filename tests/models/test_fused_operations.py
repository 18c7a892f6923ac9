"""Which small operations of which architecture get kernels, that wrong ones do not, and what a piece has to survive."""

import copy
import functools
from collections import Counter

import pytest
import torch
from interpreted import triton_kernels  # noqa: F401 - a fixture
from models import COMMON, GQA, SETTINGS, assert_same, batch, loaded, step
from torch import nn
from transformers import AutoConfig

from mebp_triton.blocks.runner import find_blocks
from mebp_triton.kernels import gated_activation, native, reference, rms_norm, rope
from mebp_triton.layers.int4_module import Int4Module
from mebp_triton.models.fused_operations import install_fused_operations
from mebp_triton.models.skeleton import build_skeleton

MORE = {
    "gemma2": GQA | {"sliding_window": 8},
    "olmo2": COMMON,
    "smollm3": COMMON | {"no_rope_layers": [1, 1, 0]},
    "cohere": COMMON,
}
# Of three blocks, in bfloat16.
FOUND = {
    "llama": {"norm, twice": 6, "MLP, silu": 3, "rotary": 3},
    "qwen2": {"norm, twice": 6, "MLP, silu": 3, "rotary": 3},
    "qwen3": {"norm, twice": 12, "MLP, silu": 3, "rotary": 3},
    "mistral": {"norm, twice": 6, "MLP, silu": 3, "rotary": 3},
    "granite": {"norm, twice": 6, "MLP, silu": 3, "rotary": 3},
    "smollm3": {"norm, twice": 6, "MLP, silu": 3, "rotary": 3},
    "phi3": {"norm, twice": 6, "MLP, silu": 3, "rotary": 3},  # one layer for gate and up
    "olmo2": {"norm, once": 12, "MLP, silu": 3, "rotary": 3},  # angles in float32
    "gemma2": {"norm, offset": 12, "MLP, gelu_tanh": 3, "rotary": 3},
    "gemma3_text": {"norm, offset": 18, "MLP, gelu_tanh": 3, "rotary": 3},
    "gpt_neox": {"rotary": 3},  # of a part of the columns
    "phi": {"rotary": 3},
    "cohere": {"MLP, silu": 3},  # pairs of neighbouring columns; a norm that subtracts the mean
    "gpt2": {},
    "opt": {},
}


@pytest.mark.parametrize("architecture", FOUND)
def test_what_is_found(architecture):
    config = AutoConfig.for_model(architecture, **(MORE | SETTINGS)[architecture])
    _, stack = find_blocks(build_skeleton(config, torch.bfloat16))
    assert install_fused_operations(stack, "cuda", torch.bfloat16) == FOUND[architecture]


# --- what is not the same -------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Llama's, and what a subclass changes."""

    def __init__(self, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16), requires_grad=False)
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class OtherEps(Norm):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class OtherRounding(Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps).to(x.dtype))


class Centred(Norm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Dropping(Norm):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Biased(Norm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16), requires_grad=False)


class MLP(nn.Module):
    """Llama's, and what a subclass changes."""

    def __init__(self, kind=nn.SiLU):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(8, 160, bias=False, dtype=torch.bfloat16) for _ in "ab")
        self.w2 = nn.Linear(160, 8, bias=False, dtype=torch.bfloat16)
        self.act, self.dropout = kind(), nn.Dropout(0.5)

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class UpFirst(MLP):
    def forward(self, x):
        return self.w2(self.w3(x) * self.act(self.w1(x)))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Scaled(MLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x) * 1.05)


class Normed(MLP):
    def forward(self, x):
        return super().forward(x / 2)


class DropsAfter(MLP):
    def forward(self, x):
        return self.dropout(super().forward(x))


class DropsInside(MLP):
    def forward(self, x):
        return self.w2(self.dropout(self.act(self.w1(x)) * self.w3(x)))


class TwoGates(MLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.act(self.w3(x)))


class Clamped(MLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x).clamp(max=10)) * self.w3(x))


class ReadsAWeight(MLP):
    def forward(self, x):
        return super().forward(x.to(self.w2.weight.dtype))


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Norm(), "norm, twice"),
        (Norm(0.0), "norm, twice"),
        (Norm().float(), None),
        (OtherEps(), None),
        (OtherRounding(), None),
        (Centred(), None),
        (Dropping(), None),
        (Biased(), None),
        (MLP(), "MLP, silu"),
        (MLP(nn.GELU), "MLP, gelu"),
        (MLP(lambda: nn.GELU(approximate="tanh")), "MLP, gelu_tanh"),
        (UpFirst(), "MLP, silu"),
        (MLP(QuickGELU), None),
        (MLP(nn.Sigmoid), None),
        (Scaled(), None),
        (Normed(), None),
        (DropsAfter(), None),
        (DropsInside(), None),
        (TwoGates(), None),
        (Clamped(), None),
        (ReadsAWeight(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
@pytest.mark.parametrize("training", [False, True])
def test_modules_that_are_and_are_not_the_same(module, found, training):
    module = copy.deepcopy(module).train(training)
    assert install_fused_operations(module, "cpu", torch.bfloat16) == ({found: 1} if found else {})


def half(x):
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def rotated(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def keeping_dtype(q, k, cos, sin):
    return tuple(x.to(q.dtype) for x in rotated(q, k, cos, sin))


def other_sign(q, k, cos, sin):
    return rotated(q, k, cos, -sin)


def other_halves(q, k, cos, sin):
    return rotated(q, k, cos.roll(cos.shape[-1] // 2, -1), sin)


def other_rounding(q, k, cos, sin):
    return tuple(x.to(q.dtype) for x in rotated(q.float(), k.float(), cos.float(), sin.float()))


def keys_alone(q, k, cos, sin):
    return q, rotated(q, k, cos, sin)[1]


def third(q, k, cos, sin):
    return (*rotated(q, k, cos, sin), q)


class Attention(nn.Module):
    def forward(self, *tensors):
        return rotated(*tensors)


def decorated(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        return function(*args, **kwargs)

    return run


class Decorated(nn.Module):
    @decorated
    def forward(self, *tensors):
        return rotated(*tensors)


class KeepsDtype(nn.Module):
    def forward(self, *tensors):
        return keeping_dtype(*tensors)


class Signs(nn.Module):
    def forward(self, *tensors):
        return other_sign(*tensors)


class Halves(nn.Module):
    def forward(self, *tensors):
        return other_halves(*tensors)


class Rounds(nn.Module):
    def forward(self, *tensors):
        return other_rounding(*tensors)


class Keys(nn.Module):
    def forward(self, *tensors):
        return keys_alone(*tensors)


class Third(nn.Module):
    def forward(self, *tensors):
        return third(*tensors)


NOTED = []


def note(*tensors):
    NOTED.append(tensors)


class Noted(nn.Module):
    def forward(self, *tensors):
        note(*tensors)


@pytest.mark.parametrize("kind", [Attention, Decorated, Signs, Halves, Rounds, Keys, Third])
def test_functions_that_are_and_are_not_the_same(kind):
    found = install_fused_operations(kind(), "cpu", torch.bfloat16)
    assert found == ({"rotary": 1} if kind in (Attention, Decorated) else {})


# --- what a piece survives ------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Plain torch stands for the kernels. Counts what would have been launched. Models are loaded without any."""
    counts = Counter()
    monkeypatch.setattr("mebp_triton.models.load.has_kernels", lambda *_: False)

    def count(module, name, function):
        def run(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, f"{name}_triton", run)

    def gradient(function):
        def run(dy, *args, inputs):
            leaves = [x.detach().requires_grad_(True) for x in args[:inputs]]
            with torch.enable_grad():
                return torch.autograd.grad(function(*leaves, *args[inputs:]), leaves, dy)

        return run

    def turned(q, k, cos, sin, inverse=False):
        if inverse:
            return gradient(reference.rope)((q, k), torch.empty_like(q), torch.empty_like(k), cos, sin, inputs=2)
        return reference.rope(q, k, cos, sin)

    norm, gated = gradient(reference.rms_norm), gradient(reference.gated_activation)
    count(rms_norm, "rms_norm", reference.rms_norm)
    count(rms_norm, "rms_norm_dx", lambda dy, *args: norm(dy, *args, inputs=1)[0])
    count(gated_activation, "gated_activation", reference.gated_activation)
    count(gated_activation, "gated_activation_backward", lambda dy, *args: gated(dy, *args, inputs=2))
    count(rope, "rope", turned)
    return counts


def with_pieces(store, **options):
    model = loaded(store, **options)
    assert install_fused_operations(find_blocks(model)[1], "cpu", torch.float32)
    return model


def numbers(architecture):
    """How many norms, MLPs and rotary embeddings a model of three blocks has."""
    return [sum(n for name, n in FOUND[architecture].items() if name[0] == kind) for kind in "nMr"]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "phi3", "gpt_neox"])
def test_gradients_are_the_same(shared_store, launches, architecture):
    store = shared_store(architecture)
    wanted = step(loaded(store))
    assert not launches
    assert_same(step(with_pieces(store)), wanted, tolerance=1e-5)
    norms, mlps, rotary = numbers(architecture)
    # Forward, recompute, backward. The gradient of the first block's input is not needed, so its first norm has none.
    assert launches["rms_norm"] == 2 * norms and launches["rms_norm_dx"] == max(norms - 1, 0)
    assert launches["gated_activation"] == 2 * mlps and launches["gated_activation_backward"] == mlps
    assert launches["rope"] == 3 * rotary


def test_a_selective_recompute(shared_store, launches):
    store = shared_store("llama")
    whole = step(with_pieces(store))
    assert_same(step(with_pieces(store, recompute_granularity="selective")), whole)


def test_a_loaded_model_runs_the_kernels(monkeypatch, shared_store, triton_kernels):  # noqa: F811
    """In Triton's interpreter, with MLPs by chunks."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    examples = batch(1, 4, None)
    store = shared_store("llama", config={"num_hidden_layers": 1})
    model = loaded(store, backend="triton", mlp_chunk_tokens=3)
    assert sum(hasattr(module, "fused") for module in model.modules()) == 3
    for module in model.modules():
        if isinstance(module, Int4Module):
            module.backend = "panel"  # the products have tests of their own, and take long
    assert_same(step(model, **examples), step(loaded(store), **examples), tolerance=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3"])
def test_on_a_cpu_compiled_code_runs_unless_it_is_off(shared_store, architecture):
    store = shared_store(architecture)
    model = loaded(store)
    found = Counter(module.fused.where.backend for module in model.modules() if hasattr(module, "fused"))
    assert found == {"panel": sum(numbers(architecture)[:2])}
    with native.using("off"):
        plain = loaded(store)
        assert not any(hasattr(module, "fused") for module in plain.modules())
        wanted = step(plain)
    assert_same(step(model), wanted, tolerance=1e-5)


def test_a_copy_has_pieces_of_its_own(shared_store, launches):
    model = with_pieces(shared_store("llama"))
    twin = copy.deepcopy(model)
    mlp, own = twin.model.layers[0].mlp, model.model.layers[0].mlp
    assert mlp.passed_by[0][1] is mlp.act_fn is not own.act_fn
    wanted = step(model)
    launches.clear()
    assert_same(step(twin), wanted)
    assert launches["gated_activation"] == 6


def test_a_norm_that_is_trained_runs_its_own_code(shared_store, launches):
    model, plain = with_pieces(shared_store("llama")), loaded(shared_store("llama"))
    for one in (model, plain):
        one.model.layers[1].input_layernorm.weight.requires_grad_(True)
    assert_same(step(model), step(plain), tolerance=1e-5)
    gradients = [one.model.layers[1].input_layernorm.weight.grad for one in (model, plain)]
    torch.testing.assert_close(*gradients)
    assert launches["rms_norm"] == 2 * 5


def test_a_norm_whose_parameter_is_another_thing_runs_its_own_code(launches):
    norm, x = Norm(), torch.randn(2, 64).bfloat16()
    install_fused_operations(norm, "cpu", torch.bfloat16)
    norm.shift = nn.Parameter(torch.ones(()))
    assert torch.equal(norm(x), Norm.forward(norm, x)) and launches["rms_norm"] == 1
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Tanh())
    assert torch.equal(norm(x), Norm.forward(norm, x)) and launches["rms_norm"] == 1


@pytest.mark.parametrize("kind", [Attention, Decorated])
def test_other_activations_run_the_modules_own_code(launches, kind):
    norm, mlp, attention = Norm(), MLP(), kind()
    parts = nn.ModuleList([norm, mlp, attention])
    install_fused_operations(parts, "cpu", torch.bfloat16)
    q, angles = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(2, 1, 5, 8).bfloat16()
    norm(torch.randn(2, 64).bfloat16()), mlp(torch.randn(2, 8).bfloat16()), attention(q, q, *angles)
    assert launches == {"rms_norm": 1, "gated_activation": 1, "rope": 1}
    x = torch.randn(2, 64)
    assert torch.equal(norm(x), Norm.forward(norm, x))
    attention(q.float(), q.float(), *angles.float())
    attention(q.transpose(1, 2), q.transpose(1, 2), *angles, 2)
    attention(q, q, *angles.float())  # gives float32, which the kernel does not
    mlp.float()(torch.randn(2, 8))
    with pytest.raises(RuntimeError, match="size"):
        attention(q, q, *angles[..., :4])  # as without the kernel
    assert sum(launches.values()) == 3


def test_angles_as_wide_as_they_were_tried(launches):
    attention = KeepsDtype()
    install_fused_operations(attention, "cpu", torch.bfloat16)
    q, angles = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(2, 1, 5, 8)
    for dtype in (torch.float32, torch.bfloat16):
        own = KeepsDtype.forward(attention, q, q, *angles.to(dtype))
        assert all(map(torch.equal, attention(q, q, *angles.to(dtype)), own))
    assert launches["rope"] == 2


@pytest.mark.parametrize("kind", [MLP, UpFirst])
def test_which_layer_is_the_gate(launches, kind):
    mlp, x = kind(), torch.randn(2, 8).bfloat16()
    install_fused_operations(mlp, "cpu", torch.bfloat16)
    assert torch.equal(mlp(x), kind.forward(mlp, x)) and launches["gated_activation"] == 1


def test_hooks_see_what_they_wait_for(launches):
    mlp, seen = MLP(), []
    install_fused_operations(mlp, "cpu", torch.bfloat16)
    x = torch.randn(2, 8).bfloat16()
    wanted = mlp(x)
    for module in (mlp, mlp.w1, mlp.w2):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    assert torch.equal(mlp(x), wanted) and seen == [mlp.w1, mlp.w2, mlp] and launches["gated_activation"] == 2
    mlp.act.register_forward_hook(lambda module, *_: seen.append(module))
    assert torch.equal(mlp(x), wanted) and seen[3:] == [mlp.w1, mlp.act, mlp.w2, mlp]
    mlp.act = nn.Tanh()
    assert torch.equal(mlp(x), MLP.forward(mlp, x)) and launches["gated_activation"] == 2


def test_a_hook_on_the_gradient_of_an_activation(launches):
    mlp, seen = MLP(), []
    install_fused_operations(mlp, "cpu", torch.bfloat16)
    mlp.act.register_full_backward_hook(lambda *_: seen.append(1))
    mlp(torch.randn(2, 8).bfloat16().requires_grad_()).sum().backward()
    assert seen and not launches


def test_a_compiler_sees_the_modules_own_code(monkeypatch, launches):
    norm = Norm()
    install_fused_operations(norm, "cpu", torch.bfloat16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    norm(torch.randn(2, 64).bfloat16())
    assert not launches


def test_generating_with_a_cache(shared_store, launches):
    ids = batch(1, 6, None)["input_ids"]
    texts = [
        model.generate(ids, max_new_tokens=5, do_sample=False)
        for model in (loaded(shared_store("qwen3")), with_pieces(shared_store("qwen3")))
    ]
    assert torch.equal(*texts) and launches["rope"] == 3 * 5


def test_nothing_else_happens():
    """No random number is drawn, no mode is changed, and no function is called that does not look like a rotation."""
    modules = nn.ModuleList([Norm(), Dropping(), DropsInside(), Noted()])
    before, modes = torch.get_rng_state(), [module.training for module in modules.modules()]
    install_fused_operations(modules.eval(), "cpu", torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before) and not NOTED
    assert not any(module.training for module in modules.modules()) and all(modes)
