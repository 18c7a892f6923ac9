"""LoRA over an int4 weight: configuration, the differentiable op, the layers."""

import dataclasses
import math

import peft
import pytest
import torch
from allocations import Allocations
from torch import nn

from mebp_triton.kernels import ops, panel, reference
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import SCHEMES
from mebp_triton.layers.int4_module import AbsentWeight, Int4Embedding, replace_embedding
from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear
from mebp_triton.layers.lora_config import UNSUPPORTED, LoraConfig, as_lora_config, lora_config_from_dict
from mebp_triton.layers.lora_function import LoraOperand, int4_lora_linear, int4_lora_linears
from mebp_triton.layers.shared_input import SharedInput


def make_weight(n=9, k=70, scheme="symmetric", group_size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    scales = (0.1 * torch.randn(groups, n, generator=generator)).half()
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    minimum = torch.randn(groups, n, generator=generator).half() if scheme == "affine" else None
    codebook = torch.randn(16, generator=generator) if scheme == "codebook" else None
    return Int4Weight.from_codes(codes, scales, group_size, minimum, codebook)


def normal(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(x, weight, bias, a, b, scaling):
    """The formula, for autograd to differentiate."""
    y = x @ reference.decode(weight, x.dtype).t()
    y = y if bias is None else y + bias.to(x.dtype)
    return y + scaling * (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()


def operands(dtype=torch.float64, n=9, k=70, rank=3, lead=(2, 4)):
    shapes = {"x": (*lead, k), "bias": (n,), "a": (rank, k), "b": (n, rank)}
    return {
        name: normal(*shape, dtype=dtype, seed=i).requires_grad_(True) for i, (name, shape) in enumerate(shapes.items())
    }


class TestConfig:
    def test_defaults_scale_by_alpha_over_rank(self):
        assert LoraConfig(r=8, lora_alpha=24).scaling("any") == 3
        assert LoraConfig(r=16, lora_alpha=24, use_rslora=True).scaling("any") == 6

    def test_what_is_not_said(self):
        config = LoraConfig()
        assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (16, 32, 0.0, "all-linear")
        assert (config.exclude_modules, config.use_rslora, config.rank_pattern, config.alpha_pattern) == (
            None,
            False,
            {},
            {},
        )
        for frozen in (config, LoraOperand(make_weight(), None, torch.ones(1, 70), torch.ones(9, 1), 1.0)):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(frozen, dataclasses.fields(frozen)[0].name, None)

    def test_patterns_match_as_in_peft(self):
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            rank_pattern={"q_proj": 4, r"layers\.[01]\.mlp\..*": 2, "^model.layers.0.o_proj": 1},
            alpha_pattern={"layers.1.q_proj": 2},
        )
        paths = {
            "model.layers.0.q_proj": (4, 4),
            "model.layers.1.q_proj": (4, 0.5),
            "model.layers.1.xq_proj": (8, 2),
            "model.layers.1.q_proj.inner": (8, 2),
            "model.layers.1.mlp.up": (2, 8),
            "model.layers.2.mlp.up": (8, 2),
            "model.layers.0.o_proj": (1, 16),
            "base.model.layers.0.o_proj": (8, 2),
        }
        from peft.utils.other import get_pattern_key

        for path, (rank, scaling) in paths.items():
            assert (config.rank(path), config.scaling(path)) == (rank, scaling), path
            theirs = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), 8)
            assert rank == theirs, path

    def test_the_first_pattern_that_matches_counts(self):
        config = LoraConfig(r=8, rank_pattern={"q_proj": 4, "layers.0.q_proj": 2})
        assert config.rank("layers.0.q_proj") == 4

    @pytest.mark.parametrize(
        ("target", "exclude", "chosen"),
        [
            ("all-linear", None, {"h.0.q", "h.0.xq", "h.0.mlp.up", "h.1.q", "q"}),
            (("q",), None, {"h.0.q", "h.1.q", "q"}),
            (["0.q", "mlp.up"], None, {"h.0.q", "h.0.mlp.up"}),
            (r".*\.q", None, {"h.0.q", "h.1.q"}),
            (r"h\.0\..*", "h.0.q", {"h.0.xq", "h.0.mlp.up"}),
            ("all-linear", ("q",), {"h.0.xq", "h.0.mlp.up"}),
            ("q", None, {"q"}),
        ],
    )
    def test_targets(self, target, exclude, chosen):
        config = LoraConfig(target_modules=target, exclude_modules=exclude)
        paths = ["h.0.q", "h.0.xq", "h.0.mlp.up", "h.1.q", "q"]
        assert {path for path in paths if config.targets(path)} == chosen

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"r": 0}, "at least 1, got 0"),
            ({"r": -2}, "at least 1"),
            ({"r": 2.0}, "whole number"),
            ({"r": True}, "whole number"),
            ({"rank_pattern": {"q": 0}}, "at least 1"),
            ({"lora_dropout": 1.0}, "lora_dropout"),
            ({"lora_dropout": -0.1}, "lora_dropout"),
            ({"lora_alpha": math.nan}, "finite"),
            ({"alpha_pattern": {"q": math.inf}}, "finite"),
            ({"target_modules": []}, "empty"),
            ({"target_modules": ""}, "empty"),
        ],
    )
    def test_errors(self, values, message):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**values)

    @pytest.mark.parametrize("values", [{"target_modules": "("}, {"rank_pattern": {"(": 3}}])
    def test_what_is_no_regular_expression(self, values):
        config = LoraConfig(**values)
        with pytest.raises(ValueError, match="not a regular expression"):
            config.targets("q")
            config.rank("q")

    def test_from_peft(self):
        theirs = peft.LoraConfig(
            r=4,
            lora_alpha=12,
            target_modules=["v", "q"],
            exclude_modules=["x"],
            lora_dropout=0.25,
            use_rslora=True,
            rank_pattern={"q": 2},
            alpha_pattern={"q": 3},
        )
        ours = as_lora_config(theirs)
        assert (ours.r, ours.lora_alpha, ours.lora_dropout, ours.use_rslora) == (4, 12, 0.25, True)
        assert (ours.target_modules, ours.exclude_modules) == (("q", "v"), ("x",))
        assert (ours.rank_pattern, ours.alpha_pattern) == ({"q": 2}, {"q": 3})
        assert as_lora_config(ours) is ours
        assert as_lora_config(peft.LoraConfig(target_modules=r".*\.q")).target_modules == r".*\.q"

    def test_of_pefts_what_depends_on_the_model_or_starts_elsewhere_is_refused(self):
        with pytest.raises(ValueError, match="without target_modules depends on the architecture"):
            as_lora_config(peft.LoraConfig(r=4))
        for start in (False, "gaussian"):
            with pytest.raises(ValueError, match=f"init_lora_weights={start!r} is not supported: leave it at True"):
                as_lora_config(peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=start))

    @pytest.mark.parametrize("config", [{"r": 4}, 3, peft.IA3Config()])
    def test_what_is_no_lora(self, config):
        with pytest.raises(ValueError, match="lora must be|only LORA"):
            as_lora_config(config)

    @pytest.mark.parametrize(
        "values",
        [
            {"use_dora": True},
            {"lora_bias": True},
            {"bias": "lora_only"},
            {"modules_to_save": ["lm_head"]},
            {"layers_to_transform": [0]},
            {"layers_to_transform": 0},
            {"layer_replication": [[0, 2]]},
            {"target_parameters": ["experts"]},
            {"trainable_token_indices": [1]},
            {"alora_invocation_tokens": [1]},
            {"init_lora_weights": "pissa"},
            {"init_lora_weights": "pissa_niter_16"},
            {"init_lora_weights": "olora"},
            {"init_lora_weights": "loftq"},
            {"velora_config": {}},
        ],
        ids=str,
    )
    def test_what_only_pefts_layers_can_do_is_refused(self, values):
        with pytest.raises(ValueError, match=f"uses {next(iter(values))}="):
            lora_config_from_dict({"peft_type": "LORA", "r": 4} | values)

    def test_pefts_defaults_are_accepted(self):
        values = vars(peft.LoraConfig(r=3, target_modules=["q"]))
        assert lora_config_from_dict(values).r == 3
        for name, unused in UNSUPPORTED.items():
            for value in unused:
                lora_config_from_dict({"peft_type": "LORA", name: value})


class TestOp:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_gradcheck(self, scheme):
        weight = make_weight(4, 33, scheme)
        given = operands(n=4, k=33, rank=2, lead=(1, 2))

        def function(x, bias, a, b):
            return int4_lora_linear(x, weight, bias, a, b, 1.5)

        assert torch.autograd.gradcheck(function, tuple(given.values()), atol=1e-7, rtol=1e-6)

    @pytest.mark.parametrize("wanted", ["x", "bias", "a", "b", "x a b bias", "a b"])
    def test_gradients_of_what_requires_them(self, wanted):
        weight, given = make_weight(), operands()
        for name, tensor in given.items():
            tensor.requires_grad_(name in wanted.split())
        asked = [given[name] for name in wanted.split()]
        ours = int4_lora_linear(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
        truth = plain(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        dy = normal(*ours.shape, dtype=torch.float64, seed=9)
        for found, exact in zip(
            torch.autograd.grad(ours, asked, dy), torch.autograd.grad(truth, asked, dy), strict=True
        ):
            torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize(
        "limit", [{torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}], ids=["limits"]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_as_exact_as_torch_in_the_same_dtype(self, dtype, limit):
        weight = make_weight(90, 200)
        given = operands(dtype, n=90, k=200, rank=8, lead=(3, 40))
        wide = {name: tensor.detach().double().requires_grad_(True) for name, tensor in given.items()}
        twin = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in given.items()}
        dy = normal(3, 40, 90, dtype=dtype, seed=9)
        results = []
        for function, set_ in ((int4_lora_linear, given), (plain, twin), (plain, wide)):
            y = function(set_["x"], weight, set_["bias"], set_["a"], set_["b"], 2.0)
            grads = torch.autograd.grad(y, list(set_.values()), dy.to(y.dtype))
            results.append({"y": y, **dict(zip(set_, grads, strict=True))})
        for name, truth in results[2].items():
            ours, theirs = ((result[name].double() - truth).norm() / truth.norm() for result in results[:2])
            assert ours <= limit[dtype], name
            assert ours <= 2 * theirs + torch.finfo(dtype).eps / 2, name

    @pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_adapter_and_activations_of_different_dtypes(self, activations, adapter):
        weight, given = make_weight(), operands(torch.float32)
        x = given["x"].detach().to(activations).requires_grad_(True)
        a, b = (given[name].detach().to(adapter).requires_grad_(True) for name in ("a", "b"))
        y = int4_lora_linear(x, weight, None, a, b, 1.5)
        y.float().square().sum().backward()
        assert (y.dtype, x.grad.dtype, a.grad.dtype, b.grad.dtype) == (activations, activations, adapter, adapter)
        twin = [tensor.detach().double().requires_grad_(True) for tensor in (x, a, b)]
        plain(twin[0], weight, None, *twin[1:], 1.5).square().sum().backward()
        for name, ours, truth in zip("xab", (x, a, b), twin, strict=True):
            assert (ours.grad.double() - truth.grad).norm() < 0.02 * truth.grad.norm(), name

    def test_adapter_gradients_are_accumulated_in_float32(self):
        """4096 tokens of gradient 2^-9 each: a bfloat16 sum would stop at 0.5 or so."""
        weight = make_weight(2, 64)
        x = torch.ones(4096, 64, dtype=torch.bfloat16)
        a, b = torch.full((1, 64), 1 / 64).requires_grad_(True), torch.ones(2, 1).requires_grad_(True)
        y = int4_lora_linear(x, weight, None, a, b, 1.0)
        y.backward(torch.full_like(y, 2**-9))
        torch.testing.assert_close(b.grad, torch.full((2, 1), 8.0))
        torch.testing.assert_close(a.grad, torch.full((1, 64), 16.0))

    def test_stride_0_and_transposed_gradients(self):
        weight, given = make_weight(), operands()
        asked = list(given.values())
        for loss in (lambda y: y.sum(), lambda y: (y.transpose(0, 1) * normal(4, 2, 9, dtype=torch.float64)).sum()):
            ours = torch.autograd.grad(loss(int4_lora_linear(asked[0], weight, *asked[1:], 1.5)), asked)
            truth = torch.autograd.grad(loss(plain(asked[0], weight, *asked[1:], 1.5)), asked)
            for found, exact in zip(ours, truth, strict=True):
                torch.testing.assert_close(found, exact)

    def test_non_contiguous_and_expanded_inputs(self):
        weight, given = make_weight(), operands()
        wide = normal(140, 2, 4, dtype=torch.float64)
        for x in (wide[::2].permute(1, 2, 0), wide[:70, :1, :1].permute(1, 2, 0).expand(2, 4, 70)):
            x = x.detach().requires_grad_(True)
            args = (given["bias"], given["a"], given["b"], 1.5)
            ours = torch.autograd.grad(int4_lora_linear(x, weight, *args).square().sum(), [x, given["a"]])
            truth = torch.autograd.grad(plain(x, weight, *args).square().sum(), [x, given["a"]])
            for found, exact in zip(ours, truth, strict=True):
                torch.testing.assert_close(found, exact)

    def test_used_twice_and_added_to_what_is_there(self):
        weight, given = make_weight(9, 9), operands(n=9, k=9)
        for tensor in given.values():
            tensor.grad = torch.ones_like(tensor)
        args = (given["bias"], given["a"], given["b"], 0.5)
        int4_lora_linear(int4_lora_linear(given["x"], weight, *args), weight, *args).square().sum().backward()
        exact = torch.autograd.grad(
            plain(plain(given["x"], weight, *args), weight, *args).square().sum(), list(given.values())
        )
        for tensor, truth in zip(given.values(), exact, strict=True):
            torch.testing.assert_close(tensor.grad, truth + 1)

    @pytest.mark.parametrize("lead", [(0,), (2, 0), (1,), (1, 1)])
    def test_no_token_and_one(self, lead):
        weight, given = make_weight(), operands(lead=lead)
        y = int4_lora_linear(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
        truth = plain(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
        torch.testing.assert_close(y, truth)
        y.sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in given.values())

    def test_one_vector(self):
        weight, given = make_weight(), operands(lead=())
        args = (given["bias"], given["a"], given["b"], 1.5)
        asked = list(given.values())
        y = int4_lora_linear(given["x"], weight, *args)
        ours, truth = (torch.autograd.grad(f.square().sum(), asked) for f in (y, plain(given["x"], weight, *args)))
        for found, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(found, exact)

    def test_autocast_of_the_forward_holds_for_the_backward(self):
        weight, given = make_weight(), operands(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = int4_lora_linear(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()  # autocast is off here
        assert all(tensor.grad.dtype == torch.float32 for tensor in given.values())
        x = given["x"].detach().bfloat16().requires_grad_(True)
        again = int4_lora_linear(x, weight, given["bias"], given["a"], given["b"], 1.5)
        assert torch.equal(again, y)
        assert torch.equal(torch.autograd.grad(again.float().sum(), x)[0].float(), given["x"].grad)

    def test_a_scaler_sees_that_float16_overflowed_and_skips(self):
        """A gradient beyond float16 is infinite, not clamped and not NaN alone, and the scale falls."""
        module, x = layer(), normal(4, 70).requires_grad_(True)
        with torch.no_grad():
            module.lora_B.normal_(0, 0.1)
        optimizer = torch.optim.AdamW([module.lora_A, module.lora_B], lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
        changed, scales = [], []
        for _ in range(8):
            before = module.lora_B.detach().clone()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                y = module(x)
            assert y.dtype == torch.float16
            scaler.scale(y.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            changed.append(not torch.equal(before, module.lora_B))
            scales.append(scaler.get_scale())
        assert not changed[0] and scales[0] == 2.0**17 and changed[-1]
        assert all(parameter.isfinite().all() for parameter in module.parameters())

    def test_a_known_output_is_the_result_and_has_the_same_gradients(self):
        weight, given = make_weight(), operands()
        args = (given["x"], weight, given["bias"], given["a"], given["b"], 1.5, "auto")
        dy = normal(2, 4, 9, dtype=torch.float64)
        real = int4_lora_linear(*args)
        unused = int4_lora_linear(*args, known=torch.full_like(real, float("nan")))
        assert unused.isnan().all() and (unused.shape, unused.dtype) == (real.shape, real.dtype)
        asked = list(given.values())
        for found, exact in zip(
            torch.autograd.grad(unused, asked, dy), torch.autograd.grad(real, asked, dy), strict=True
        ):
            assert torch.equal(found, exact)

    def test_nothing_of_the_weights_size_is_allocated(self, monkeypatch):
        n, k = 400, 512
        monkeypatch.setitem(panel.PANEL_ELEMENTS, "cpu", 4 * k)
        weight, given = make_weight(n, k), operands(torch.float32, n=n, k=k, lead=(4,))
        allocations = Allocations()

        def watched(function):
            # A custom operation hides what it does from a mode around it.
            def call(*args):
                with allocations:
                    return function(*args)

            return call

        for name in ("int4_matmul_panel", "int4_matmul_dx_panel"):
            monkeypatch.setattr(ops, name, watched(getattr(ops, name)))
        with allocations:
            y = int4_lora_linear(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
            y.square().sum().backward()
        assert 4 * k <= allocations.largest <= n * k // 16


class TestSeveral:
    """Several layers with one input, each with its own height, rank, scaling, bias; not every output is used."""

    SIZES = ((9, 3, 1.5, True), (5, 1, -0.5, False), (12, 2, 2.0, True))

    @pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,), (2,), (1, 2)], ids=str)
    @pytest.mark.parametrize("wanted", ["x bias a b", "bias", "b", "a bias"])
    def test_outputs_and_gradients(self, used, wanted):
        weights = [make_weight(n, 70, scheme, seed=n) for (n, *_), scheme in zip(self.SIZES, SCHEMES, strict=True)]
        x = normal(2, 4, 70, dtype=torch.float64).requires_grad_("x" in wanted)
        asked, ops = [x] if "x" in wanted else [], []
        for (n, rank, scaling, with_bias), weight in zip(self.SIZES, weights, strict=True):
            given = operands(n=n, rank=rank)
            tensors = {name: given[name].detach() for name in ("bias", "a", "b")}
            if not with_bias:
                tensors["bias"] = None
            for name, tensor in tensors.items():
                if tensor is not None and name in wanted.split():
                    asked.append(tensor.requires_grad_(True))
            ops.append(LoraOperand(weight, tensors["bias"], tensors["a"], tensors["b"], scaling))
        ours = int4_lora_linears(x, ops)
        truth = [plain(x, o.weight, o.bias, o.lora_a, o.lora_b, o.scaling) for o in ops]
        for found, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        used = [place for place in used if truth[place].requires_grad]
        dys = [normal(2, 4, self.SIZES[place][0], dtype=torch.float64, seed=20 + place) for place in used]
        if not used:
            return
        found = torch.autograd.grad([ours[place] for place in used], asked, dys, allow_unused=True)
        exact = torch.autograd.grad([truth[place] for place in used], asked, dys, allow_unused=True)
        assert any(gradient is not None for gradient in exact)
        for one, other in zip(found, exact, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-11, atol=1e-11)


def layer(scheme="symmetric", bias=True, **options):
    options = {"rank": 3, "scaling": 2.0, "generator": torch.Generator().manual_seed(0)} | options
    return Int4LoRALinear(make_weight(scheme=scheme), normal(9) if bias else None, torch.float32, **options)


class TestLayers:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_linear(self, scheme, bias):
        weight, bias = make_weight(scheme=scheme), normal(9) if bias else None
        module, x = Int4Linear(weight, bias, torch.float32), normal(2, 3, 70)
        torch.testing.assert_close(module(x), reference.matmul(x, weight, bias))
        assert isinstance(module, nn.Linear)
        assert module.weight.dtype == torch.uint8 and module.weight.data_ptr() == weight.packed.data_ptr()
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert module.int4().scheme == scheme and scheme in repr(module)

    def test_peft_takes_it_for_a_linear_layer(self):
        holder = nn.ModuleDict({"q": Int4Linear(make_weight(), None, torch.float32)})
        wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q"]), holder)
        x = normal(4, 70)
        nn.init.normal_(wrapped["q"].lora_B["default"].weight)
        y = wrapped["q"](x)
        y.sum().backward()
        lora = [wrapped["q"].lora_A["default"].weight, wrapped["q"].lora_B["default"].weight]
        truth = plain(x, make_weight(), None, *lora, wrapped["q"].scaling["default"])
        torch.testing.assert_close(y, truth)
        for parameter, exact in zip(lora, torch.autograd.grad(truth.sum(), lora), strict=True):
            torch.testing.assert_close(parameter.grad, exact)

    def test_a_new_adapter_changes_nothing_and_is_that_of_peft(self):
        module, x = layer(), normal(4, 70)
        assert torch.equal(module(x), Int4Linear(make_weight(), normal(9), torch.float32)(x))
        assert not module.lora_B.any()
        bound = 1 / math.sqrt(70)  # kaiming_uniform_ with a = sqrt(5)
        assert module.lora_A.abs().max() <= bound and module.lora_A.std() > 0.4 * bound
        assert [name for name, p in module.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
        assert torch.equal(layer().lora_A, module.lora_A)

    def test_adapter_dtype(self):
        assert layer(adapter_dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16

    def test_dropout_is_on_the_input_of_the_lora_branch_only(self):
        module, x = layer(dropout=0.5), normal(4, 70).requires_grad_(True)
        nn.init.normal_(module.lora_B)
        module.train()
        torch.manual_seed(5)
        y = module(x)
        dy = normal(4, 9, seed=3)
        y.backward(dy)
        torch.manual_seed(5)
        dropped = nn.functional.dropout(x, 0.5)
        twin = x @ reference.decode(make_weight(), torch.float32).t() + normal(9)
        twin = twin + 2.0 * (dropped @ module.lora_A.t()) @ module.lora_B.t()
        torch.testing.assert_close(y, twin)
        asked = [x, module.lora_A, module.lora_B]
        for tensor, truth in zip(asked, torch.autograd.grad(twin, asked, dy), strict=True):
            torch.testing.assert_close(tensor.grad, truth)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_under_torchs_own_checkpointing(self, reentrant):
        """Which hands out what is saved for the backward pass only once."""
        module = layer()
        nn.init.normal_(module.lora_B)
        x = normal(4, 70).requires_grad_()
        asked, dy = (x, module.lora_A, module.lora_B), normal(4, 9)
        truth = torch.autograd.grad(module(x), asked, dy)
        torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant).backward(dy)
        assert all(torch.equal(tensor.grad, expected) for tensor, expected in zip(asked, truth, strict=True))

    def test_dropout_rests_outside_of_training(self):
        module, x = layer(dropout=0.9).eval(), normal(4, 70)
        nn.init.normal_(module.lora_B)
        assert torch.equal(module(x), module(x))

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_another_dtype_or_device_leaves_the_weight_what_it_is(self, scheme):
        """Its scales would be rounded, its codes be no codes."""
        module, weight = layer(scheme), make_weight(scheme=scheme)
        x = normal(4, 70)
        expected = module(x)
        module.to(torch.bfloat16)
        assert module.lora_A.dtype == module.lora_B.dtype == module.bias.dtype == torch.bfloat16
        for name, tensor in module.int4().tensors().items():
            assert torch.equal(tensor, weight.tensors()[name]) and tensor.dtype == weight.tensors()[name].dtype, name
        torch.testing.assert_close(module(x), expected, rtol=0.01, atol=0.02)
        module.to("meta")
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
        assert module.int4().scales.dtype == torch.float16

    def test_repr(self):
        assert "in_features=70, out_features=9, symmetric, G=32, r=3" in repr(layer())

    def test_weights_are_replaced_from_outside(self):
        module, x = layer("affine"), normal(4, 70)
        other = make_weight(scheme="codebook", seed=7)
        module.set_int4(other)
        torch.testing.assert_close(module(x), reference.matmul(x, other, normal(9)))
        assert module.int4().scheme == "codebook"

    @pytest.mark.parametrize("module", [Int4Linear(make_weight(), None, torch.float32), layer()])
    def test_under_autocast(self, module):
        with torch.autocast("cpu", torch.bfloat16):
            assert module(normal(4, 70)).dtype == torch.bfloat16
            assert module(normal(4, 70, dtype=torch.float64)).dtype == torch.float64

    @pytest.mark.parametrize("kind", ["frozen", "adapted", "dropout", "siblings"])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
    def test_integers_are_no_activations(self, kind, dtype):
        """nn.Linear raises too; code that casts to ``layer.weight.dtype`` would get garbage otherwise."""
        weight = make_weight()
        layer = Int4Linear(weight, None, torch.float32)
        if kind != "frozen":
            layer = Int4LoRALinear(weight, None, torch.float32, 3, 1.0, dropout=0.5 * (kind == "dropout"))
        if kind == "siblings":
            layer.shared_input = SharedInput([layer, Int4LoRALinear(weight, None, torch.float32, 3, 1.0)])
        with pytest.raises(TypeError, match=f"x is {dtype}, wanted a floating dtype.* must stay float"):
            layer(torch.ones(2, 70).to(dtype))


class Scaled(nn.Embedding):
    """As Gemma's: what a subclass does to the rows has to stay."""

    def forward(self, ids):
        return super().forward(ids) * 3


class TestEmbedding:
    @pytest.mark.parametrize(("kind", "factor"), [(nn.Embedding, 1), (Scaled, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_replaced_in_place(self, kind, factor, dtype):
        module, weight = kind(30, 70, padding_idx=0), make_weight(30, 70)
        replace_embedding(module, weight, dtype, "auto")
        ids = torch.tensor([[0, 3], [29, 3]])
        assert isinstance(module, kind) and isinstance(module, Int4Embedding)
        assert torch.equal(module(ids), reference.decode(weight, dtype)[ids] * factor)
        assert module.num_embeddings == 30 and module.padding_idx == 0
        assert not list(module.parameters())

    def test_its_weight_has_a_shape_but_no_memory(self):
        module = nn.Embedding(30, 70)
        replace_embedding(module, make_weight(30, 70), torch.bfloat16, "auto")
        assert (tuple(module.weight.shape), module.weight.dtype) == ((30, 70), torch.bfloat16)
        assert isinstance(module.weight, AbsentWeight)

    def test_rows_that_come_from_elsewhere(self):
        module, weight, asked = nn.Embedding(30, 70), make_weight(30, 70), []

        class Rows:
            def gather(self, ids):
                asked.append(ids)
                return weight.gather(ids.reshape(-1))

        replace_embedding(module, weight, torch.float32, "auto")
        ids = torch.tensor([[4, 0, 29], [4, 7, 1]])
        whole = module(ids)
        module.rows = Rows()
        assert torch.equal(module(ids), whole) and len(asked) == 1 and asked[0] is ids
