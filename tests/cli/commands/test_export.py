"""``mebp export``: what it says it made, and what is refused with one line."""

import json
import shutil

import pytest
from commands import adapter, answer, assert_refused

from mebp_triton.convert.quantize import quantize

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_files import llama_tensors, write  # noqa: E402


@pytest.mark.parametrize(("kind", "error"), [("F32", 0), ("F16", 3e-4)])
def test_an_adapter_for_llama_cpp(world, mebp, tmp_path, kind, error):
    out = tmp_path / "a.gguf"
    value = answer(mebp("export", world / "store", out, adapter(world), "--to=gguf-lora", f"--type={kind}", "--json"))
    assert value["bytes"] == out.stat().st_size and value["type"] == kind and value["base"] is None
    assert value["relative_error"] <= error and value["use"] == f"llama-server -m BASE.gguf --lora {out}"
    names = {tensor.name for tensor in gguf.GGUFReader(out).tensors}
    assert "blk.2.attn_q.weight.lora_b" in names and len(names) == 42


def test_an_adapters_own_template_is_named(world, mebp, tmp_path):
    own = shutil.copytree(world / "run" / "adapter", tmp_path / "adapter")
    (own / "chat_template.jinja").write_text("{{ messages }}")
    code, _, err = mebp("export", world / "store", tmp_path / "a.gguf", f"--adapter={own}", "--to=gguf-lora")
    assert code == 0 and f"--chat-template-file {own / 'chat_template.jinja'}" in err


def test_a_whole_model_for_llama_cpp(mebp, tmp_path):
    write(tmp_path / "base.gguf", "llama", llama_tensors())
    quantize(tmp_path / "base.gguf", tmp_path / "store")
    out = tmp_path / "a.gguf"
    code, printed, err = mebp("export", tmp_path / "store", out, "--to=gguf", "--type=Q8_0", "--json")
    value = json.loads(printed)
    assert code == 0 and value["bytes"] == out.stat().st_size and 0 < value["copied_tensors"] < 20
    assert "not all matrices are Q8_0 (" in err and "rounding_beside_adapter" in value
    assert value["use"] == f"llama-server -m {out}"


def test_what_rounding_undoes_is_said(world, mebp, tmp_path):
    write(tmp_path / "base.gguf", "llama", llama_tensors())
    quantize(tmp_path / "base.gguf", tmp_path / "store")
    text = f"--train-file={world / 'train.txt'}"
    settings = ["--max-steps=1", "--max-length=24", "--lora-r=2", "--device=cpu", f"--output-dir={tmp_path / 'run'}"]
    assert mebp("train", tmp_path / "store", text, *settings)[0] == 0
    flags = [f"--adapter={tmp_path / 'run'}", "--to=gguf"]
    code, _, err = mebp("export", tmp_path / "store", tmp_path / "a.gguf", *flags, "--type=Q4_0")
    assert code == 0 and "warning: what rounding to Q4_0 changed is " in err and "--to gguf-lora keeps all of it" in err
    code, _, err = mebp("export", tmp_path / "store", tmp_path / "b.gguf", *flags, "--type=F32")
    assert code == 0 and "warning: what rounding" not in err


def test_an_adapter_for_servers(world, mebp, tmp_path):
    code, printed, err = mebp("export", world / "store", tmp_path / "out", adapter(world), "--to=peft", "--json")
    value, base = json.loads(printed), str(world / "model")
    assert code == 0 and (value["base"], value["rank"], value["ranks_or_scalings_made_equal"]) == (base, 2, False)
    assert value["use"].startswith(f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules mine=")
    assert "of the store's 22 matrices were rounded" in err and value["rounded_matrices"] == 22
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == base


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--to=gguf-lora"], ["--to gguf-lora needs an adapter: give --adapter RUN"]),
        (["--to=peft2", "ADAPTER"], ["invalid choice: 'peft2'"]),
        (["--to=gguf-lora", "ADAPTER", "--base=none.gguf"], ["none.gguf"]),
        (["--to=gguf-lora", "ADAPTER", "--type=Q4_0"], ["--type must be one of F32, BF16, F16 for an adapter"]),
        (["--to=gguf", "ADAPTER"], ["give a GGUF file of the base model by --base"]),
        (["--to=peft", "ADAPTER", "--type=F16"], ["--type and --base are for GGUF files: leave them out"]),
    ],
)
def test_what_is_refused(world, mebp, tmp_path, arguments, parts):
    arguments = [adapter(world) if word == "ADAPTER" else word for word in arguments]
    assert_refused(mebp, ["export", world / "store", tmp_path / "a.gguf", *arguments], parts, world, tmp_path)
