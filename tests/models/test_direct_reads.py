"""Layers whose weight the modelling code reads itself stay float, and a step over them is transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    SETTINGS,
    assert_same,
    batch,
    decoded_model,
    loaded,
    peft_gradients,
    peft_model,
    save_composite_model,
    save_tiny_model,
    step,
    tiny_config,
    tiny_store,
)
from runs import model_directory, word_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import mebp_triton as mebp
from mebp_triton.convert.merge import merge, merge_to_store
from mebp_triton.models import build, direct_reads, skeleton, targets
from mebp_triton.models.adapter_seal import read_adapter_tensors
from mebp_triton.models.direct_reads import directly_read
from mebp_triton.models.kept_float import READ
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store
from mebp_triton.training.plan.inventory import Inventory

MIXERS = {"out_proj"}
READS = {
    "gemma3n_text": {"correction_coefs", "prediction_coefs"},
    "mamba": {"x_proj", "dt_proj", "out_proj"},
    "falcon_mamba": {"x_proj", "dt_proj", "out_proj"},
    "mamba2": MIXERS,
    "bamba": MIXERS,
    "falcon_h1": MIXERS,
    "nemotron_h": MIXERS,
    "granitemoehybrid": MIXERS,
    "zamba2": MIXERS,
    "rwkv": {"attention.output", "feed_forward.value"},
}


def read_layers(model: Any) -> set[str]:
    """Without the head, whose int4 weight has the dtype of activations."""
    layers = {path: model.get_submodule(path) for path in directly_read(model)}
    head = model.get_output_embeddings()
    return {path for path, layer in layers.items() if type(layer) is nn.Linear and layer is not head}


@pytest.mark.parametrize("architecture", list(SETTINGS))
def test_the_layers_that_modelling_code_reads(architecture: str) -> None:
    """Bloom's reads are for shards that its config does not ask for; all others read facts alone, such as a dtype."""
    model = build_skeleton(tiny_config(architecture), torch.float32)
    paths = read_layers(model)
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    ends = {end: {name for name in linear if name.endswith(f".{end}")} for end in READS.get(architecture, ())}
    assert all(ends.values()) and paths == set().union(*ends.values())


def test_a_setting_that_leads_to_a_read_counts() -> None:
    model = build_skeleton(tiny_config("bloom", pretraining_tp=2, slow_but_exact=True), torch.float32)
    assert {path.rpartition(".")[2] for path in read_layers(model)} == {"dense", "dense_4h_to_h"}


class _Recording(torch.overrides.TorchFunctionMode):
    """Notes the linear layers whose weight is computed with outside of their own forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside: list[nn.Module] = []
        linear = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
        # A tied head's weight is read by the embedding.
        self.owners = {part.weight.data_ptr(): (name, part) for name, part in linear if name != "lm_head"}
        self.read: set[str] = set()
        for _, module in self.owners.values():
            module.register_forward_pre_hook(lambda module, _: self.inside.append(module))
            module.register_forward_hook(lambda *_: self.inside.pop() and None)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        computes = function.__name__ not in ("__get__", "size", "dim", "numel", "data_ptr")
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        with torch._C.DisableTorchFunction():
            for tensor in tensors if computes else ():
                name, owner = self.owners.get(tensor.data_ptr(), ("", None))
                if owner is not None and owner not in self.inside:
                    self.read.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["gemma3n_text", "mamba", "falcon_mamba", "bamba", "bloom", "llama", "opt"])
def test_what_a_step_reads_is_found(architecture: str) -> None:
    """A step of transformers' own model is watched; the source may show more, for kernels that are not here."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(architecture)).train()
    found = read_layers(model)
    recording = _Recording(model)
    with recording:
        model(**batch(), use_cache=False).loss.backward()
    assert recording.read <= found
    assert bool(recording.read) == (architecture in ("gemma3n_text", "mamba", "falcon_mamba"))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other = nn.Linear(4, 4), nn.Linear(4, 4)


class Reader(nn.Module):
    """One read in every form, and what is none."""

    shards, exact, name = 1, False, None

    def __init__(self) -> None:
        super().__init__()
        self.chain, self.called, self.alias, self.shape_only = Inner(), nn.Linear(4, 4), nn.Linear(4, 4), Inner()
        self.walked = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.picked = nn.ModuleList([nn.Linear(4, 4)])
        self.numbered = nn.ModuleList([Inner()])
        self.first, self.second = (nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2))
        self.off, self.on, self.training_only, self.unknown = (nn.Linear(4, 4) for _ in range(4))
        self.set_up, self.cast_to = nn.Linear(4, 4), nn.Linear(4, 4)

    def _init_weights(self) -> None:
        self.set_up.weight.data.zero_()

    def forward(self, x: Any, flag: bool = False) -> Any:
        x = self.called(x) @ self.chain.proj.weight
        layer = self.alias
        x = x @ layer.weight
        layer = None
        for part in self.walked:
            x = nn.functional.linear(x, part.weight)
        x = x.to(dtype=self.cast_to.weight.dtype)
        if x.dtype != self.shape_only.proj.weight.dtype:
            x = x + self.shape_only.other.weight.shape[0]
        x = x @ self.picked[0].weight
        for _, part in enumerate(self.numbered[:1]):
            x = x @ part.other.weight
        for _, (one, other) in enumerate(zip(reversed(self.first), self.second, strict=True)):
            x = one(x) @ other.weight
        if self.shards > 1 and flag:
            x = x @ self.off.weight
        elif not self.exact:
            x = x @ self.on.weight
        if self.training:
            x = x @ self.training_only.weight
        return x @ self.unknown.weight if flag or self.name is None else x


def test_every_form_of_a_read() -> None:
    wanted = {"chain.proj", "alias", "walked.0", "walked.1", "picked.0", "on", "training_only", "unknown"}
    wanted |= {"numbered.0.other", "second.0", "cast_to"}
    assert directly_read(Reader()) == wanted
    assert directly_read(nn.Sequential(Reader()).train()) == {f"0.{name}" for name in wanted}
    sharded = Reader()
    sharded.shards = 2
    assert directly_read(sharded) == wanted | {"off"}


def test_code_without_a_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: Any) -> str:
        raise OSError("could not get source code")

    direct_reads._reads_of.cache_clear()
    direct_reads._reads_in.cache_clear()
    monkeypatch.setattr(direct_reads.inspect, "getsource", nowhere)
    try:
        with pytest.warns(UserWarning, match=r"the source of .*test_direct_reads\.Reader\.forward is not there"):
            assert directly_read(Reader()) == set()
    finally:
        direct_reads._reads_of.cache_clear()
        direct_reads._reads_in.cache_clear()


@pytest.mark.parametrize("architecture", ["gemma3n_text", "mamba", "bamba"])
def test_a_training_step_gets_the_gradients_of_peft(shared_store: Any, architecture: str) -> None:
    """In training mode, where AltUp and the mixers read weights."""
    store = shared_store(architecture)
    model = loaded(store).train()
    ours = step(model)
    reference = peft_model(store, model, r=4, lora_alpha=8).train()
    reference(**batch(), use_cache=False).loss.backward()
    theirs: dict[str, Any] = {name: grad for name, grad in peft_gradients(reference).items()}
    silent = {name for name, grad in theirs.items() if grad is None or not grad.any()}
    assert all(ours[name] is None or not ours[name].any() for name in silent)
    assert_same(
        {name: grad for name, grad in ours.items() if name not in silent},
        {name: grad for name, grad in theirs.items() if name not in silent},
        1e-5,
    )


def test_weights_that_evaluation_scales_in_place(shared_store: Any) -> None:
    """RWKV divides the weights of its upper blocks for evaluation, and multiplies them again for training."""
    store = shared_store("rwkv")
    before = {path: path.read_bytes() for path in store.iterdir()}
    model, reference = loaded(store), decoded_model(store)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.zeros_(parameter)
    for training in (False, True, False):
        wanted = reference.train(training)(batch()["input_ids"], use_cache=False).logits
        with torch.no_grad():
            ours = model.train(training)(batch()["input_ids"], use_cache=False).logits
        assert torch.allclose(ours, wanted, atol=1e-5), training
    assert {path: path.read_bytes() for path in store.iterdir()} == before


def test_quantizing_counts_them(tmp_path: Path) -> None:
    save_tiny_model("mamba", tmp_path / "model")
    report = mebp.quantize(tmp_path / "model", tmp_path / "store", group_size=32)
    store = Store(tmp_path / "store")
    sizes = store.float_sizes()
    read = [name for name in store.floats if name.split(".")[-2] in READS["mamba"] and name.endswith("weight")]
    assert len(read) == 9 and report.kept_float[READ].matrices == 9
    assert report.kept_float[READ].bytes == sum(sizes[name] for name in read)


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A store of Mamba in which all linear layers are int4, as they were before reads were looked for."""
    with monkeypatch.context() as patch:
        patch.setattr(skeleton, "directly_read", lambda model: set())
        store = tiny_store("mamba", tmp_path)
    assert {name.rpartition(".")[2] for name in Store(store).matrices} > READS["mamba"]
    return store


def test_an_older_store_is_decoded_where_its_int4_weights_are_read(older: Path) -> None:
    with pytest.warns(UserWarning, match="9 matrices are decoded to float, since the modelling code reads"):
        model = loaded(older).train()
    assert {name.split(".")[-2] for name in our_layers(model)} == {"in_proj"}
    wanted = decoded_model(older).train()(**batch(), use_cache=False).loss
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
    assert torch.allclose(model(**batch(), use_cache=False).loss, wanted, rtol=1e-5)


def our_layers(model: Any) -> list[str]:
    return [f"{name}.lora_A" for name, module in model.named_modules() if hasattr(module, "lora_A")]


def test_an_older_adapter_keeps_its_layers(older: Path) -> None:
    """An adapter on out_proj was trained without fused kernels, and goes on as it was."""
    with pytest.warns(UserWarning, match="3 adapters lie on layers whose weight the modelling code reads itself"):
        model = loaded(older, {"target_modules": ["in_proj", "out_proj"]})
    assert {name.split(".")[-2] for name in our_layers(model)} == {"in_proj", "out_proj"}


def test_an_older_store_is_merged(older: Path, tmp_path: Path) -> None:
    wanted = decoded_model(older)(**batch()).logits
    merge(older, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(**batch()).logits, wanted, atol=1e-5)
    merge_to_store(older, tmp_path / "anew")
    assert torch.allclose(decoded_model(tmp_path / "anew")(**batch()).logits, wanted, atol=1e-5)
    assert not {name for name in Store(tmp_path / "anew").matrices if "out_proj" in name}


def test_planning_sees_the_same_layers(shared_store: Any) -> None:
    store = Store(shared_store("mamba"))
    planned = Inventory.of_config(tiny_config("mamba"), group_size=32)
    assert planned.matrices.keys() == store.matrices.keys() and planned.floats.keys() == store.floats.keys()


def test_a_target_that_stays_float_is_refused_by_its_name(shared_store: Any) -> None:
    """Without it, as the message says, the adapter is made."""
    store = shared_store("mamba2")
    with pytest.raises(ValueError, match=r"'out_proj' matches only layers that stay float, such as .*mixer\.out_proj"):
        mebp.load(store, mebp.LoraConfig(target_modules=["in_proj", "out_proj"]))
    model = mebp.load(store, mebp.LoraConfig(target_modules=["in_proj"]))
    assert {name.split(".")[-2] for name in our_layers(model)} == {"in_proj"}


@pytest.mark.parametrize("architecture", ["mamba2", "gemma3"])
def test_a_run_keeps_the_layers_that_all_linear_meant_when_it_began(
    mebp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Its checkpoint has adapters that all-linear leaves out by now; the memory plan counts those of now."""
    if architecture == "gemma3":
        save_composite_model("gemma3", tmp_path / "model")
        word_tokenizer().save_pretrained(tmp_path / "model")
    else:
        model_directory(tmp_path / "model", architecture)
    (tmp_path / "text.txt").write_text("the cat sees the moon . " * 20)
    flags = ("--max-length=16", "--lora-r=2", "--learning-rate=1e-2", "--lr-scheduler-type=constant")
    flags = (*flags, f"--train-file={tmp_path / 'text.txt'}", f"--output-dir={tmp_path / 'run'}")
    with monkeypatch.context() as patch:
        patch.setattr(skeleton, "directly_read", lambda model: set())
        patch.setattr(build, "directly_read", lambda model: set())
        patch.setattr(targets, "directly_read", lambda model: set())
        patch.setattr(targets, "unreached_by_text", lambda *_: frozenset())
        assert mebp("train", tmp_path / "model", *flags, "--max-steps=1")[0] == 0
    before = read_adapter_tensors(tmp_path / "run" / "adapter")
    code, _, err = mebp("train", tmp_path / "run-store", *flags, "--max-steps=2", "--resume")
    assert code == 0 and "resuming at step 1 of 2" in err and "the model:" not in err, err
    said = {"mamba2": "3 adapters lie on layers whose weight", "gemma3": "no gradient came to model.vision_tower"}
    assert said[architecture] in err
    after = read_adapter_tensors(tmp_path / "run" / "adapter")
    assert before.keys() == after.keys() and any("out_proj" in name for name in after)
    assert not torch.equal(*(adapter[next(name for name in after if "lora_B" in name)] for adapter in (before, after)))
