"""Checks the kernels and a model's gradients against float64 on the decoded codes, on the device that will train.

The rule for numbers is that of ``kernels.accuracy.judge``: at most twice the error of torch in the same dtype, and half
a rounding, as maximum and as root mean square.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mebp_triton.convert.quantize import quantize
from mebp_triton.kernels import functions, routing
from mebp_triton.kernels.accuracy import judge, normal, random_weight
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import DEFAULT_FORMS, SCHEMES, Form
from mebp_triton.kernels.reference import cross_entropy, decode
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.layers.lora_function import int4_lora_linear
from mebp_triton.models.load import load
from mebp_triton.store.reader import Store

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (33, 1, 300)  # tails of a tile, a decoding step, several tiles
SHAPE, TABLE = (160, 200), (1100, 200)  # of a layer and of a head: no multiples of a tile; K is padded
SECONDS = 45.0  # that all checks may take


class Kind(NamedTuple):
    """A form of weights, and whether its scales have two levels."""

    form: Form
    two_level: bool = False

    def __str__(self) -> str:
        return f"{self.form}{', scales of two levels' if self.two_level else ''}"

    def random(self, n: int, k: int, device: torch.device) -> Int4Weight:
        """A random weight ``[n, k]`` of this kind."""
        scale_dtype = torch.int8 if self.two_level else torch.float16
        return random_weight(n, k, device, self.form.scheme, self.form.group_size, scale_dtype, bits=self.form.bits)


# What a new store has (linear layers in 4 bits, tables in 8), and each scheme.
KINDS = [*(Kind(form, two_level=True) for form in DEFAULT_FORMS.values()), *(Kind(Form(name, 64)) for name in SCHEMES)]
# What else foreign files bring. Most launches are alike for all kinds, so these take part in fewer.
OTHER_KINDS = [Kind(Form("symmetric", 16, 8)), Kind(Form("affine", 32, 8)), Kind(Form("affine", 32), two_level=True)]


# --- operations -----------------------------------------------------------------------------------------------------


def check_lora_layer(
    weight: Int4Weight, dtype: torch.dtype, m: int, rank: int = 16, backend: routing.Backend = "auto"
) -> dict[str, dict[str, Any]]:
    """Judges the output and all gradients of a LoRA layer for ``m`` tokens, each by its name."""
    device, (n, k), scaling = weight.device, weight.shape, 2.0
    values = {
        "x": normal(m, k, dtype=dtype, device=device),
        "bias": normal(n, dtype=dtype, device=device),
        "a": normal(rank, k, dtype=torch.float32, device=device) / k**0.5,
        "b": normal(n, rank, dtype=torch.float32, device=device),
    }
    dy = normal(m, n, dtype=dtype, device=device)

    def results(to: torch.dtype | None, layer: Callable[..., Tensor]) -> dict[str, Tensor]:
        leaves = {name: (v if to is None else v.to(to)).detach().requires_grad_() for name, v in values.items()}
        y = layer(leaves["x"], leaves["bias"], leaves["a"], leaves["b"])
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}

    def plain(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        t = x @ a.to(x.dtype).t() * scaling
        return x @ decode(weight, x.dtype).t() + bias + t @ b.to(x.dtype).t()

    ours = results(None, lambda x, bias, a, b: int4_lora_linear(x, weight, bias, a, b, scaling, backend))
    same, truth = results(None, plain), results(torch.float64, plain)
    return {name: judge(ours[name], same[name], truth[name]) for name in truth}


def check_embedding(weight: Int4Weight, dtype: torch.dtype, tokens: int, backend: routing.Backend = "auto") -> bool:
    """Whether the rows of an embedding are decoded to the bit."""
    ids = torch.randint(0, weight.shape[0], (tokens,), device=weight.device)
    return torch.equal(functions.int4_embedding(ids, weight, dtype, backend=backend), decode(weight, dtype)[ids])


def check_head(
    weight: Int4Weight, dtype: torch.dtype, tokens: int, backend: routing.Backend = "auto"
) -> tuple[float, float, dict[str, Any]]:
    """Returns the loss over an int4 head, the true loss, and the verdict on the gradient of the hidden states."""
    hidden = normal(tokens, weight.shape[1], dtype=dtype, device=weight.device)
    targets = torch.randint(0, weight.shape[0], (tokens,), device=weight.device)
    targets[1:2] = -100
    leaf, peer = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    losses, _ = functions.int4_cross_entropy(leaf, weight, targets, backend=backend)
    loss = losses.sum()
    loss.backward()
    true_loss, true_grad, _ = cross_entropy(hidden.double(), weight, targets)
    # As transformers computes it: logits in the activations' dtype, the loss in float32.
    logits = (peer @ decode(weight, dtype).t()).float()
    nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    assert leaf.grad is not None and peer.grad is not None
    return loss.item(), true_loss.item(), judge(leaf.grad, peer.grad, true_grad)


# --- a model --------------------------------------------------------------------------------------------------------


class Model:
    """A small Llama in a store, and transformers' own with the decoded weights and the same adapter, in any dtype."""

    def __init__(self, directory: Path) -> None:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=160,
            hidden_size=128,
            intermediate_size=200,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
        source = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            for parameter in source.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.08)
        source.save_pretrained(directory / "model")
        quantize(directory / "model", directory / "store")
        self.store, self.config, self.ids = directory / "store", config, torch.randint(0, 160, (2, 30))

    def gradients(
        self, device: torch.device, dtype: torch.dtype, backend: routing.Backend
    ) -> tuple[Any, dict[str, Any]]:
        """Returns loss and gradients by the engine, block by block, with weights and block inputs in files."""
        lora = LoraConfig(r=8, lora_alpha=16)
        places: dict[str, Any] = {"weights": "file", "checkpoints": "file"}
        model = load(self.store, lora, device=device, dtype=dtype, backend=backend, **places).train()
        generator = torch.Generator().manual_seed(1)
        self.adapter: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    value = 0.1 * torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(value)
                    self.adapter[name] = value
        ids = self.ids.to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    def plain_gradients(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """Returns loss and gradients by autograd alone; no code of the engine or the kernels takes part."""
        import transformers

        store = Store(self.store)
        model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=dtype, trust_remote_code=False)
        with torch.no_grad():
            for name in store.matrices:
                model.get_submodule(name).weight.copy_(decode(store.weight(name), dtype))
            for name in store.floats:
                model.get_parameter(name).copy_(store.float_tensor(name))
        model = model.to(device).train()
        leaves = {name: value.to(device, dtype).requires_grad_() for name, value in self.adapter.items()}
        for name in {name.rpartition(".")[0] for name in leaves}:
            a, b = leaves[f"{name}.lora_A"], leaves[f"{name}.lora_B"]
            model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, a=a, b=b: output + 2.0 * (inputs[0] @ a.t()) @ b.t()
            )
        ids = self.ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        wide = logits if dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(wide, ids[:, 1:].flatten())
        return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check_model(model: Model, device: torch.device, dtype: torch.dtype, backend: routing.Backend) -> dict[str, Any]:
    """Judges the loss and the adapter gradients of whole blocks, by the largest of their relative errors.

    It is held against torch's largest, since torch's error of one matrix alone may happen to be small.
    """
    loss, ours = model.gradients(device, dtype, backend)
    same_loss, same = model.plain_gradients(device, dtype)
    true_loss, truth = model.plain_gradients(torch.device("cpu"), torch.float64)
    if ours.keys() != truth.keys() or any(gradient is None for gradient in ours.values()):
        return {"ok": False, "reason": "gradients are missing"}

    def errors(loss: Any, gradients: dict[str, Any]) -> list[float]:
        pairs = [(loss, true_loss), *((gradients[name], truth[name]) for name in truth)]
        return [float((a.double().cpu() - b).norm() / b.norm()) for a, b in pairs]

    our_errors, theirs = errors(loss, ours), max(errors(same_loss, same))
    if not all(map(math.isfinite, our_errors)):  # max() of NaN and numbers may be a number
        return {"ok": False, "reason": "gradients are not finite"}
    worst = max(our_errors)
    return {"relative": worst, "torch_relative": theirs, "ok": worst <= 2 * theirs + torch.finfo(dtype).eps / 2}


# --- all of it ------------------------------------------------------------------------------------------------------


def run(device: torch.device, backend: routing.Backend = "auto", seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Runs the checks, those that training rests on first, until ``seconds`` are over.

    Returns:
        A row for every check with its name ("what"), "dtype" and "ok", which is None if there was no time for it. A
        check of numbers has "relative", the error as a part of the result's norm; a failed one may have a "reason".
    """
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng():
        torch.manual_seed(0)
        for what, dtype, check in _checks(device, backend, Path(scratch)):
            row: dict[str, Any] = {"what": what, "dtype": str(dtype).removeprefix("torch.")}
            if time.monotonic() - started > seconds:
                rows.append(row | {"ok": None})
                continue
            try:
                rows.append(row | check())
            except Exception as error:  # a missing compiler or driver is what this check must find
                line = " ".join(str(error).split())[:200]
                rows.append(row | {"ok": False, "reason": f"{type(error).__name__}: {line}"})
    return rows


def _checks(
    device: torch.device, backend: routing.Backend, scratch: Path
) -> Iterator[tuple[str, torch.dtype, Callable[[], dict[str, Any]]]]:
    """Yields the name, the dtype and the function of every check."""
    model = Model(scratch)
    for dtype in DTYPES[:2]:
        yield "gradients of blocks", dtype, partial(check_model, model, device, dtype, backend)
    for kind, dtype in product([*KINDS, *OTHER_KINDS], DTYPES):
        for what, check in (("LoRA layer", _layer), ("head", _head), ("embedding", _embedding)):
            if kind in KINDS or what != "head":
                yield f"{what}, {kind}, {TOKENS[0]} tokens", dtype, partial(check, device, backend, dtype, kind)
    for m, kind, dtype in product(TOKENS[1:], KINDS, DTYPES):
        yield f"LoRA layer, {kind}, {m} tokens", dtype, partial(_layer, device, backend, dtype, kind, m)


def _layer(
    device: torch.device, backend: routing.Backend, dtype: torch.dtype, kind: Kind, m: int = TOKENS[0]
) -> dict[str, Any]:
    verdicts = check_lora_layer(kind.random(*SHAPE, device), dtype, m, backend=backend)
    wrong = [name for name, verdict in verdicts.items() if not verdict["ok"]]
    relative = max(verdict.get("relative") or 0.0 for verdict in verdicts.values())
    row: dict[str, Any] = {"ok": not wrong, "relative": relative}
    return row | ({"reason": f"beyond the rule: {', '.join(wrong)}"} if wrong else {})


def _head(device: torch.device, backend: routing.Backend, dtype: torch.dtype, kind: Kind) -> dict[str, Any]:
    loss, truth, row = check_head(kind.random(*TABLE, device), dtype, TOKENS[0], backend)
    near = abs(loss - truth) <= 1e-2 * abs(truth)
    return {"ok": row["ok"] and near, "relative": row.get("relative")}


def _embedding(device: torch.device, backend: routing.Backend, dtype: torch.dtype, kind: Kind) -> dict[str, Any]:
    return {"ok": check_embedding(kind.random(*TABLE, device), dtype, TOKENS[0], backend)}
