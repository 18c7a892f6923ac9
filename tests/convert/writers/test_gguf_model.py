"""A merged GGUF file: the base's keys and tensors, and matrices that are the store's with what the adapter adds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import randomize_adapter, relative_rms

import mebp_triton as mebp
from mebp_triton.convert.export import export_gguf_adapter, export_gguf_model
from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.readers.gguf import GgufFile
from mebp_triton.convert.readers.gguf_header import read_header
from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.convert.writers.gguf_file import Planned, pair, write_gguf
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_files import gpt2_tensors, llama_tensors, write  # noqa: E402
from gguf_models import write_variant  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``base.gguf``, of many types, its ``store``, and an ``adapter`` on some layers."""
    place = tmp_path_factory.mktemp("merged")
    write(place / "base.gguf", "llama", llama_tensors())
    quantize(place / "base.gguf", place / "store")
    model = mebp.load(place / "store", mebp.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    mebp.save_adapter(model, place / "adapter")
    return place


def bound(source: Any) -> Any:
    source.bind(build_skeleton(source.config, torch.float32))
    return source


def values(source: Any, name: str) -> torch.Tensor:
    """A parameter ``[out, in]``, whatever holds it."""
    value = source.read(name)
    if isinstance(value, Int4Weight):
        return decode(value, torch.float32)
    return value.float().t() if name.split(".")[-2][:2] == "c_" and value.dim() == 2 else value.float()


def keys(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def assert_merged(path: Path, store: Path, adapter: Path | None, near: float) -> None:
    """Every parameter that our own reader finds in the file is the merged one."""
    found, wanted = bound(GgufFile(path)), bound(MergedStore(store, adapter))
    names = [*wanted.sites, *wanted.store.floats]
    assert names
    for name in names:
        assert relative_rms(values(found, name), values(wanted, name)) <= near, name


def test_in_float32_it_is_the_merged_model(llama: Path, tmp_path: Path) -> None:
    report, ends = export_gguf_model(llama / "store", tmp_path / "a.gguf", llama / "adapter", "F32")
    assert_merged(tmp_path / "a.gguf", llama / "store", llama / "adapter", 0)
    assert set(report.kinds) == {"F32"} and report.relative_error == report.lost == 0 and not ends
    before, after = keys(llama / "base.gguf"), keys(tmp_path / "a.gguf")
    assert after.pop("general.file_type") == 0
    assert after == before


def test_codes_that_stay_are_copied_and_others_say_what_they_lose(llama: Path, tmp_path: Path) -> None:
    report, _ = export_gguf_model(llama / "store", tmp_path / "a.gguf", llama / "adapter", "Q4_1")
    base, made = read_header(llama / "base.gguf"), read_header(tmp_path / "a.gguf")
    assert made.tensors["blk.0.attn_q.weight"].kind == "Q4_1" and base.tensors["blk.0.attn_q.weight"].kind == "Q4_0"
    data = {header.path: header.path.read_bytes() for header in (base, made)}
    for name in ("token_embd.weight", "blk.1.attn_k.weight", "output_norm.weight"):
        old, new = base.tensors[name], made.tensors[name]
        assert old.kind == new.kind
        assert data[old.path][old.offset :][: old.nbytes] == data[new.path][new.offset :][: new.nbytes], name
    assert_merged(tmp_path / "a.gguf", llama / "store", llama / "adapter", 0.1)
    assert 0.01 < report.relative_error < 0.1 and report.lost is not None and 0.01 < report.lost < 10
    finer, _ = export_gguf_model(llama / "store", tmp_path / "b.gguf", llama / "adapter", "Q8_0")
    assert finer.lost is not None and finer.lost < report.lost / 5
    assert keys(tmp_path / "a.gguf")["general.file_type"] == 3 and keys(tmp_path / "b.gguf")["general.file_type"] == 7


def test_what_is_lost_counts_each_change_once_also_where_a_matrix_is_two_tensors(tmp_path: Path) -> None:
    base, store = write_variant(tmp_path / "base.gguf", "granitehybrid", "plain"), tmp_path / "store"
    quantize(base, store, bits=8, scale_search=False)
    model = mebp.load(store, mebp.LoraConfig(r=4, target_modules=["input_linear"]))
    randomize_adapter(model, 0, 0.1)
    mebp.save_adapter(model, tmp_path / "adapter")
    report, _ = export_gguf_model(store, tmp_path / "a.gguf", tmp_path / "adapter", "Q8_0")
    found = bound(GgufFile(tmp_path / "a.gguf"))
    merged, plain = bound(MergedStore(store, tmp_path / "adapter")), bound(MergedStore(store))
    changed = [name for name, site in merged.sites.items() if merged.delta(site) is not None]
    rounding = sum((values(found, name) - values(merged, name)).square().sum() for name in changed)
    change = sum((values(merged, name) - values(plain, name)).square().sum() for name in changed)
    assert changed and report.lost == pytest.approx(float(rounding / change) ** 0.5, rel=1e-3)


def test_parts_become_one_file_and_a_transposed_model_one_too(llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "base.gguf", "llama", llama_tensors(), tensors_each=8)
    part = tmp_path / "base-00002-of-00003.gguf"
    for target, base in (("a.gguf", part), ("b.gguf", None)):
        export_gguf_model(llama / "store", tmp_path / target, llama / "adapter", base=base)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    write(tmp_path / "gpt2.gguf", "gpt2", gpt2_tensors())
    quantize(tmp_path / "gpt2.gguf", tmp_path / "store")
    export_gguf_model(tmp_path / "store", tmp_path / "c.gguf", kind="F32", base=tmp_path / "gpt2.gguf")
    assert_merged(tmp_path / "c.gguf", tmp_path / "store", None, 0)


def test_a_base_of_other_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    for name, what in (("token_embd", "model.embed_tokens"), ("output_norm", "model.norm")):
        other = shutil.copy(llama / "base.gguf", tmp_path / "other.gguf")
        entry = read_header(other).tensors[f"{name}.weight"]
        data = np.memmap(other, np.uint8, "r+", entry.offset, (entry.nbytes,))
        data[:] = data[::-1] if name == "token_embd" else (-data.view(np.float32)).view(np.uint8)
        data.flush()
        with pytest.raises(ValueError, match=f"is not the model that the store was made of: {what}.weight differs"):
            export_gguf_model(llama / "store", tmp_path / "a.gguf", base=other)
        assert not (tmp_path / "a.gguf").exists()


def test_a_base_that_changed_or_is_gone_is_named(llama: Path, tmp_path: Path) -> None:
    base, store = shutil.copy(llama / "base.gguf", tmp_path / "base.gguf"), tmp_path / "store"
    quantize(base, store)
    assert not export_gguf_adapter(store, tmp_path / "a.gguf", llama / "adapter").changed
    with open(base, "ab") as file:
        file.write(b"more")
    assert export_gguf_adapter(store, tmp_path / "b.gguf", llama / "adapter").changed
    assert not export_gguf_adapter(store, tmp_path / "c.gguf", llama / "adapter", base=base).changed  # was asked for
    base.unlink()
    with pytest.raises(ValueError, match=r"\(.*base.gguf: gone\), and a GGUF file needs keys .* by --base"):
        export_gguf_model(store, tmp_path / "d.gguf", llama / "adapter")


def test_a_base_that_was_replaced_since_is_compared_too(llama: Path, tmp_path: Path) -> None:
    """The file stands where the store was made of it, and has other weights now."""
    base = shutil.copy(llama / "base.gguf", tmp_path / "base.gguf")
    quantize(base, tmp_path / "store")
    entry = read_header(base).tensors["output_norm.weight"]
    data = np.memmap(base, np.float32, "r+", entry.offset, entry.shape)
    data[:] *= -1
    data.flush()
    with pytest.raises(ValueError, match="is not the model that the store was made of: model.norm.weight differs"):
        export_gguf_model(tmp_path / "store", tmp_path / "a.gguf")


@pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules, or lie otherwise")
@pytest.mark.parametrize("which", ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"])
def test_experts_of_other_weights_are_refused(tmp_path: Path, which: str) -> None:
    base, store = write_variant(tmp_path / "base.gguf", "qwen3moe", "plain"), tmp_path / "store"
    quantize(base, store, scale_search=False)
    export_gguf_model(store, tmp_path / "a.gguf", base=shutil.copy(base, tmp_path / "same.gguf"))
    entry = read_header(base).tensors[f"blk.0.{which}.weight"]
    data = np.memmap(base, np.uint8, "r+", entry.offset, (entry.nbytes,))
    data[:] = np.concatenate(np.split(data, entry.shape[0])[::-1])
    data.flush()
    with pytest.raises(ValueError, match=r"is not the model that the store was made of: .*experts\.\d+\..* differs"):
        export_gguf_model(store, tmp_path / "b.gguf", base=base)


def test_template_and_end_are_the_adapters(llama: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(llama / "adapter", tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 7, 9]}))
    _, ends = export_gguf_model(llama / "store", tmp_path / "a.gguf", adapter, "Q8_0")
    found = keys(tmp_path / "a.gguf")
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["tokenizer.ggml.eot_token_id"] == 7 and found["general.quantization_version"] == 2 and ends == [9]


def changed(source: Path, target: Path, pairs: dict[str, Any], copies: dict[str, str]) -> Path:
    """A copy of a GGUF file with other keys, and with copies of tensors under other names."""
    base, data = read_header(source), source.read_bytes()
    kept = [data[begin:end] for key, (begin, end) in base.places.items() if key not in pairs]
    entries = dict(base.tensors) | {name: base.tensors[copied] for name, copied in copies.items()}
    parts = {name: np.frombuffer(data, np.uint8, each.nbytes, each.offset) for name, each in entries.items()}
    planned = [Planned(name, each.kind, each.shape) for name, each in entries.items()]
    write_gguf(target, [*kept, *(pair(*item) for item in pairs.items())], planned, lambda name: [parts[name]])
    return target


def test_templates_for_tools_go_too_and_ends_that_keys_have_stay(llama: Path, tmp_path: Path) -> None:
    keys_of = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    changed(llama / "base.gguf", tmp_path / "base.gguf", keys_of | {"tokenizer.ggml.eot_token_id": 7}, {})
    adapter = shutil.copytree(llama / "adapter", tmp_path / "adapter")
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 7, 9]}))
    for target, wanted in (("a.gguf", keys_of), ("b.gguf", {"tokenizer.chat_template": "{{ messages }}"})):
        _, ends = export_gguf_model(llama / "store", tmp_path / target, adapter, "Q8_0", tmp_path / "base.gguf")
        found = {key: value for key, value in keys(tmp_path / target).items() if "template" in key}
        assert found == wanted and ends == [9]
        (adapter / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_tied_head_that_the_base_has_as_a_tensor_is_the_embedding_again(
    llama: Path, tmp_path: Path, kind: str
) -> None:
    base = changed(llama / "base.gguf", tmp_path / "base.gguf", {}, {"output.weight": "token_embd.weight"})
    export_gguf_model(llama / "store", tmp_path / "a.gguf", llama / "adapter", kind, base)
    embedding, head = (
        gguf.dequantize(tensor.data, tensor.tensor_type)
        for name in ("token_embd.weight", "output.weight")
        for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors
        if tensor.name == name
    )
    assert relative_rms(torch.from_numpy(head), torch.from_numpy(embedding)) < 0.01
