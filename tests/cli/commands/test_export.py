"""``mebp export``: what it says it made, and what is refused with one line."""

import pytest
from commands import adapter, answer, assert_refused

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")


@pytest.mark.parametrize(("kind", "error"), [("F32", 0), ("F16", 3e-4)])
def test_an_adapter_for_llama_cpp(world, mebp, tmp_path, kind, error):
    out = tmp_path / "a.gguf"
    value = answer(mebp("export", world / "store", out, adapter(world), "--to=gguf-lora", f"--type={kind}", "--json"))
    assert value["bytes"] == out.stat().st_size and value["type"] == kind and value["base"] is None
    assert value["relative_error"] <= error and value["use"] == f"llama-server -m BASE.gguf --lora {out}"
    names = {tensor.name for tensor in gguf.GGUFReader(out).tensors}
    assert "blk.2.attn_q.weight.lora_b" in names and len(names) == 42


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--to=gguf-lora"], ["--to gguf-lora needs an adapter: give --adapter RUN"]),
        (["--to=peft2", "ADAPTER"], ["invalid choice: 'peft2'"]),
        (["--to=gguf-lora", "ADAPTER", "--base=none.gguf"], ["none.gguf"]),
    ],
)
def test_what_is_refused(world, mebp, tmp_path, arguments, parts):
    arguments = [adapter(world) if word == "ADAPTER" else word for word in arguments]
    assert_refused(mebp, ["export", world / "store", tmp_path / "a.gguf", *arguments], parts, world, tmp_path)
