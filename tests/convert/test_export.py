"""What is exported computes in the real llama.cpp what transformers + PEFT computes on the decoded weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from llama_cpp import Question, divergence, log_probabilities
from models import decoded_model, randomize_adapter
from transformers import AutoTokenizer

from mebp_triton.cli.commands.demo import find_model
from mebp_triton.convert.export import export_gguf_adapter, export_gguf_model, export_peft_adapter
from mebp_triton.convert.merge import merge_to_store
from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.readers.gguf_header import read_header
from mebp_triton.convert.readers.gguf_layout import GgufLayout
from mebp_triton.convert.writers.gguf_file import Planned, pair, write_gguf
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter import save_adapter
from mebp_triton.models.load import load
from mebp_triton.system.errors import FileError

pytest.importorskip("gguf", reason="the gguf extra is not installed")
peft = pytest.importorskip("peft")

from gguf_models import PROMPT, write_variant  # noqa: E402

# Rows permuted, all scalings and ranks; a gate of one row; transposed; rows of heads apart; columns that change places;
# one matrix in two tensors.
LORA: dict[str, dict[str, Any]] = {
    "llama": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3.0, "up_proj": 0.0}},
    "qwen2moe": {},
    "gpt2": {},
    "bloom": {},
    "qwen35": {},
    "granitehybrid": {},
}


class Made(NamedTuple):
    """A base model, its store and an adapter, and what transformers computes with PEFT and without."""

    base: Path
    store: Path
    adapter: Path
    plain: np.ndarray
    wanted: np.ndarray


def adapted(store: Path, directory: Path, scale: float = 0.15, **lora: Any) -> Path:
    model = load(store, LoraConfig(r=4, lora_alpha=6, **lora))
    randomize_adapter(model, 0, scale)
    save_adapter(model, directory)
    return directory


@torch.no_grad()
def answers(model: Any, ids: list[int]) -> np.ndarray:
    return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    gc.freeze()  # a tokenizer that is converted collects garbage, which takes long with all libraries loaded
    models = {}
    for arch, lora in LORA.items():
        place = tmp_path_factory.mktemp(arch)
        base = write_variant(place / "base.gguf", arch, "plain")
        quantize(base, place / "store", bits=8, scale_search=False)
        adapter = adapted(place / "store", place / "adapter", **lora)
        model = decoded_model(place / "store")
        plain = answers(model, PROMPT)
        wanted = answers(peft.PeftModel.from_pretrained(model, adapter), PROMPT)
        models[arch] = Made(base, place / "store", adapter, plain, wanted)
    yield models
    gc.unfreeze()


def test_llama_cpp_applies_the_adapter_as_peft_does(made: dict[str, Made], tmp_path: Path) -> None:
    questions = []
    for arch, model in made.items():
        target = tmp_path / f"{arch}.gguf"
        assert export_gguf_adapter(model.store, target, model.adapter).base == model.base
        questions.append(Question(model.base, PROMPT, (target,)))
    with pytest.MonkeyPatch.context() as patch:  # the control: rows in the order of transformers
        patch.setattr(GgufLayout, "row_order", lambda self, name, shape, transposed: torch.arange(shape[0]))
        for arch in ("llama", "bloom"):
            export_gguf_adapter(made[arch].store, tmp_path / f"{arch}-plain.gguf", made[arch].adapter)
            questions.append(Question(made[arch].base, PROMPT, (tmp_path / f"{arch}-plain.gguf",)))
    for arch, model in made.items():
        export_gguf_model(model.store, tmp_path / f"{arch}-merged.gguf", model.adapter, "F16")
        questions.append(Question(tmp_path / f"{arch}-merged.gguf", PROMPT))
    found = log_probabilities(*questions)
    for model, got, merged in zip(made.values(), found, found[-len(made) :], strict=False):
        assert divergence(model.plain, model.wanted) > 0.02, "the adapter does nothing"
        assert max(divergence(model.wanted, got), divergence(model.wanted, merged)) < 1e-3, model.base
    for arch, got in zip(("llama", "bloom"), found[len(made) :], strict=False):
        assert divergence(made[arch].wanted, got) > 1e-2, f"the order of {arch}'s rows does not matter"


def shallow(source: Path, target: Path, blocks: int) -> Path:
    """A GGUF file of the first blocks of a model."""
    header = read_header(source)
    data = source.read_bytes()
    pairs = [data[begin:end] for key, (begin, end) in header.places.items() if not key.endswith(".block_count")]
    pairs.append(pair(f"{header.metadata['general.architecture']}.block_count", blocks))
    kept = [entry for name, entry in header.tensors.items() if name[:4] != "blk." or int(name.split(".")[1]) < blocks]
    parts = {entry.name: np.frombuffer(data, np.uint8, entry.nbytes, entry.offset) for entry in kept}
    planned = [Planned(entry.name, entry.kind, entry.shape) for entry in kept]
    write_gguf(target, pairs, planned, lambda name: [parts[name]])
    return target


def test_a_real_model_in_4_bits_and_in_float32(tmp_path: Path) -> None:
    """The first two blocks of SmolLM2, whose Q4_1 codes the store has bit for bit; 50 positions of a text."""
    try:
        file = find_model()
    except ValueError as error:
        pytest.skip(str(error))
    base, store, target = shallow(file, tmp_path / "base.gguf", 2), tmp_path / "store", tmp_path / "adapter.gguf"
    quantize(base, store)
    adapter = adapted(store, tmp_path / "adapter", 0.05, alpha_pattern={"[qk]_proj": 60})
    ids = AutoTokenizer.from_pretrained(store)(topics["with"]).input_ids[:50]
    model = decoded_model(store)
    plain, wanted = answers(model, ids), answers(peft.PeftModel.from_pretrained(model, adapter), ids)
    export_gguf_adapter(store, target, adapter)
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("F32", "F16")}
    export_gguf_model(store, files["F32"], kind="F32")
    export_gguf_model(store, files["F16"], adapter)
    with pytest.MonkeyPatch.context() as patch:  # the control: rows of queries and keys in the order of transformers
        patch.setattr(GgufLayout, "row_order", lambda self, name, shape, transposed: torch.arange(shape[0]))
        export_gguf_adapter(store, tmp_path / "control.gguf", adapter)
    narrow, wide, control, merged = log_probabilities(
        Question(base, ids, (target,)),
        Question(files["F32"], ids, (target,)),
        Question(files["F32"], ids, (tmp_path / "control.gguf",)),
        Question(files["F16"], ids),
    )
    assert divergence(plain, wanted) > 0.02 and plain.shape == (50, 49152)
    assert divergence(wanted, narrow) < 1e-2
    assert max(divergence(wanted, wide), divergence(wanted, merged)) < 1e-3 < 2e-3 < divergence(wanted, control)


def test_an_adapter_for_vllm_and_sglang_is_the_same_under_peft(made: dict[str, Made], tmp_path: Path) -> None:
    model = made["llama"]  # with patterns, which are folded in
    report = export_peft_adapter(model.store, tmp_path / "served", model.adapter)
    assert (report.rank, report.rank_limit, report.made_equal) == (4, 8, True)
    assert report.base.name_or_path == str(model.base) and report.base.crc32 is not None
    rounded, worst = report.rounded
    assert rounded == 16 and 0 < worst < 0.02
    served = peft.PeftModel.from_pretrained(decoded_model(model.store), tmp_path / "served")
    assert divergence(model.wanted, answers(served, PROMPT)) < 1e-9


def test_names_come_from_the_config_where_no_file_is_at_hand(made: dict[str, Made], tmp_path: Path) -> None:
    model = made["llama"]
    by_file, moved = tmp_path / "a.gguf", model.base.with_name("moved.gguf")
    export_gguf_adapter(model.store, by_file, model.adapter)
    model.base.rename(moved)
    try:
        assert export_gguf_adapter(model.store, tmp_path / "b.gguf", model.adapter).base is None
        assert export_gguf_adapter(model.store, tmp_path / "c.gguf", model.adapter, base=moved).base == moved
    finally:
        moved.rename(model.base)
    assert by_file.read_bytes() == (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_what_does_not_fit_is_refused(made: dict[str, Made], shared_store: Any, tmp_path: Path) -> None:
    llama, target = made["llama"], tmp_path / "a.gguf"
    with pytest.raises(ValueError, match="base.gguf is of architecture 'gpt2', and the store is a llama: give its"):
        export_gguf_adapter(llama.store, target, llama.adapter, base=made["gpt2"].base)
    narrow = write_variant(tmp_path / "narrow.gguf", "llama", "no key heads")
    with pytest.raises(ValueError, match=r"narrow.gguf has no matrix for model.layers.0.self_attn.k_proj of \d+ x"):
        export_gguf_adapter(llama.store, target, llama.adapter, base=narrow)
    with pytest.raises(ValueError, match="type must be one of F32, BF16, F16 for an adapter, got 'Q8_0'"):
        export_gguf_adapter(llama.store, target, llama.adapter, "Q8_0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GgufLayout, "applies_adapters", lambda self, name: not name.endswith("1.ffn_up.weight"))
        with pytest.raises(ValueError, match="does not apply adapters to blk.1.ffn_up.weight .model.layers.1"):
            export_gguf_adapter(llama.store, target, llama.adapter)
    phi = shared_store("phi")
    with pytest.raises(ValueError, match="of a phi model is not known here: make a model directory by `mebp merge`"):
        export_gguf_adapter(phi, target, adapted(phi, tmp_path / "adapter"))
    with pytest.raises(ValueError, match="type must be one of F32, .*, Q4_0, got 'Q2_K'"):
        export_gguf_model(llama.store, target, llama.adapter, "Q2_K")
    with pytest.raises(ValueError, match="needs keys and a tokenizer from another one: give a GGUF file of the base"):
        export_gguf_model(shared_store("llama"), target)
    merge_to_store(llama.store, tmp_path / "merged", llama.adapter)
    with pytest.raises(ValueError, match="does not say what it was made of, so no server could be told the base"):
        export_peft_adapter(tmp_path / "merged", tmp_path / "served", llama.adapter)
    with pytest.raises(FileError, match="names no file in an existing directory"):
        export_gguf_adapter(llama.store, tmp_path / "none" / "a.gguf", llama.adapter)
    with pytest.raises(FileError, match="exists already"):
        export_gguf_adapter(llama.store, tmp_path, llama.adapter)
    with pytest.raises(FileError, match=r"names no file in an existing directory: .*base.gguf is a file"):
        export_gguf_adapter(llama.store, llama.base / "a.gguf", llama.adapter)
    for given, what in ((tmp_path, "is a directory"), (tmp_path / "none.gguf", "is no file")):
        for export in (export_gguf_adapter, export_gguf_model):
            with pytest.raises(FileError, match=rf"--base .* {what}: give a GGUF file of the base model"):
                export(llama.store, target, llama.adapter, base=given)
    assert not target.exists()
