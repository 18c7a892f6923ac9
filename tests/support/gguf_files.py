"""Tiny GGUF files of random weights, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

Q4_0, Q4_1, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0"))
F16, F32, BF16 = (gguf.GGMLQuantizationType[name] for name in ("F16", "F32", "BF16"))
HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
# Where the float16 numbers of a block lie, for the types that the gguf package reads and does not write.
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}


def alphabet() -> list[str]:
    """The 256 letters of a byte-level vocabulary: printable bytes are themselves, the others count up from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


TOKENS = [*alphabet(), "th", "the", "<|end|>", "<|pad|>"]


def llama_of(kind: object, hidden: int, ffn: int, tied: bool) -> dict[str, tuple[tuple[int, ...], object]]:
    """The tensors of a llama whose matrices are all of one type."""
    tensors = {"token_embd.weight": ((len(TOKENS), hidden), kind), "output_norm.weight": ((hidden,), F32)}
    if not tied:
        tensors["output.weight"] = ((len(TOKENS), hidden), kind)
    kv = hidden // HEADS * KV_HEADS
    rows = {"attn_q": hidden, "attn_k": kv, "attn_v": kv, "attn_output": hidden, "ffn_gate": ffn, "ffn_up": ffn}
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}.weight": ((count, hidden), kind) for name, count in rows.items()}
        tensors[f"blk.{layer}.ffn_down.weight"] = ((hidden, ffn), kind)
        tensors |= {f"blk.{layer}.{name}_norm.weight": ((hidden,), F32) for name in ("attn", "ffn")}
    return tensors


def llama_of_every_type() -> dict[str, tuple[tuple[int, ...], object]]:
    """The tensors of a llama of width 256 in all types that are taken over bit for bit, and one that is not."""
    kinds = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ2_0"]
    tensors = llama_of(None, 256, 256, tied=True)
    matrices = [name for name, (shape, _) in tensors.items() if len(shape) == 2]
    types = {name: kinds[place % len(kinds)] for place, name in enumerate(matrices)}
    return tensors | {name: (tensors[name][0], gguf.GGMLQuantizationType[kind]) for name, kind in types.items()}


def llama_tensors() -> dict[str, tuple[tuple[int, ...], object]]:
    kv = HIDDEN // HEADS * KV_HEADS
    tensors = {"token_embd.weight": ((len(TOKENS), HIDDEN), Q8_0), "output_norm.weight": ((HIDDEN,), F32)}
    for layer in range(LAYERS):
        kinds = (Q4_0, Q4_1) if layer == 0 else (Q4_1, Q4_0)
        tensors |= {
            f"blk.{layer}.attn_norm.weight": ((HIDDEN,), F32),
            f"blk.{layer}.attn_q.weight": ((HIDDEN, HIDDEN), kinds[0]),
            f"blk.{layer}.attn_k.weight": ((kv, HIDDEN), kinds[1]),
            f"blk.{layer}.attn_v.weight": ((kv, HIDDEN), F16),
            f"blk.{layer}.attn_output.weight": ((HIDDEN, HIDDEN), kinds[0]),
            f"blk.{layer}.ffn_norm.weight": ((HIDDEN,), F32),
            f"blk.{layer}.ffn_gate.weight": ((FFN, HIDDEN), kinds[1]),
            f"blk.{layer}.ffn_up.weight": ((FFN, HIDDEN), BF16),
            f"blk.{layer}.ffn_down.weight": ((HIDDEN, FFN), kinds[0]),  # K = 96 is no multiple of 64
        }
    return tensors


def gpt2_tensors() -> dict[str, tuple[tuple[int, ...], object]]:
    """A GPT-2 of 1024 positions and an MLP of width 4 * HIDDEN."""
    tensors = {
        "token_embd.weight": ((len(TOKENS), HIDDEN), Q4_1),
        "position_embd.weight": ((1024, HIDDEN), F32),
        "output_norm.weight": ((HIDDEN,), F32),
        "output_norm.bias": ((HIDDEN,), F32),
    }
    matrices = {"attn_qkv": (3 * HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
    matrices |= {"ffn_up": (4 * HIDDEN, HIDDEN), "ffn_down": (HIDDEN, 4 * HIDDEN)}
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            tensors |= {f"blk.{layer}.{name}.{part}": ((HIDDEN,), F32) for part in ("weight", "bias")}
        for name, shape in matrices.items():
            tensors[f"blk.{layer}.{name}.weight"] = (shape, Q4_0)
            tensors[f"blk.{layer}.{name}.bias"] = (shape[:1], F32)
    return tensors


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Bytes ``[..., row]`` of a tensor of ``kind``: any bytes are a block, if its scales are finite."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // weights, size), dtype=np.uint8)
    for place in HALVES.get(kind.name, ()):
        scales = random.normal(size=(*blocks.shape[:-1], 1)).astype(np.float16)
        blocks[..., place : place + 2] = scales.view(np.uint8)
    if kind.name == "MXFP4":
        blocks[..., 0] = random.integers(120, 130, blocks.shape[:-1])
    return blocks.reshape(*shape[:-1], -1)


def blocks_of(kind: gguf.GGMLQuantizationType, values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Bytes of ``values`` in a type, or random ones if the gguf package does not write it."""
    writes_not = kind.name in HALVES or kind.name == "MXFP4"
    return random_blocks(kind, values.shape, random) if writes_not else gguf.quantize(values, kind)


def write(
    path: Path,
    arch: str,
    tensors: dict,
    tokenizer: bool = True,
    context: int = 32,
    hidden: int = HIDDEN,
    ffn: int = FFN,
    tensors_each: int = 0,
    **numbers: int,
) -> Path:
    """A GGUF file of random weights, most of them quantised by the gguf package.

    With ``tensors_each`` it becomes parts of so many tensors each, and ``path`` is the start of their names.
    """
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_each)
    writer.add_name("tiny")
    writer.add_context_length(1024 if arch == "gpt2" else context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(4 * hidden if arch == "gpt2" else ffn)
    writer.add_head_count(HEADS)
    if arch == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(len(TOKENS))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
        writer.add_token_merges(["t h", "th e"])
        writer.add_bos_token_id(len(TOKENS) - 2)
        writer.add_eos_token_id(len(TOKENS) - 2)
        writer.add_pad_token_id(len(TOKENS) - 1)
        writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in numbers.items():
        writer.add_uint32(key.replace("_", "."), value)
    random = np.random.default_rng(0)
    for name, (shape, kind) in tensors.items():
        data = blocks_of(kind, random.normal(size=shape).astype(np.float32), random)
        writer.add_tensor(name, data, raw_dtype=None if kind in (F16, F32) else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
