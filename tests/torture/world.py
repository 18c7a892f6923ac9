"""One small instance of everything that a command reads: stores, models, adapters, an interrupted run, data, tables.

python tests/torture/world.py DIRECTORY        # which the scripts beside this one take as --world
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forked import command, forked, import_all

STEPS, SAVED_AT = 6, 3
TRAIN = [f"--max-steps={STEPS}", f"--save-steps={SAVED_AT}", "--max-length=24", "--lora-r=2", "--learning-rate=0.01"]
TRAIN += ["--device=cpu", "--json"]
SETTINGS: dict[str, Any] = {"max_steps": 2, "max_length": 24, "lora_r": 2, "learning_rate": 0.01, "device": "cpu"}
PROBLEM = {"kernel": "matmul", "m": 16, "n": 128, "k": 128, "scheme": "symmetric", "group_size": 64}


@contextlib.contextmanager
def scratch_and_world(name: str, given: Path | None) -> Iterator[tuple[Path, Path]]:
    """Yields a new directory, removed afterwards, and the world: the ``given`` one, or a new one in there."""
    with tempfile.TemporaryDirectory(prefix=f"mebp-{name}-") as place:
        root = Path(place)
        root.chmod(0o755)  # another user reads there too
        import_all()
        if given is None:
            (root / "world").mkdir()
            make_world(root / "world")
        yield root, given.absolute() if given else root / "world"


def must(what: str, work: Callable[[], Any]) -> None:
    """Runs ``work`` in a child, so that the parent starts no thread; RuntimeError if it fails."""

    def run() -> int:
        found = work()
        return found if isinstance(found, int) else 0

    ended = forked(run, seconds=300)
    if ended.signal or ended.code:
        raise RuntimeError(f"{what}: {ended.err[-2000:]}")


def make_world(root: Path) -> None:
    """Fills ``root``, an empty directory."""
    must("model", lambda: _models(root))
    must("store", command(["quantize", root / "model", root / "store", "--group-size=32"]))
    must("nf4 store", command(["quantize", root / "bnb", root / "nf4-store"]))
    must("8-bit store", lambda: _wide_codes(root))
    must("two-level store", lambda: _two_levels(root))
    must("data", lambda: _data(root / "data"))
    must("adapter", lambda: _adapters(root))
    must("run", lambda: _interrupted_run(root))
    must("tables", lambda: _tables(root / "tables"))
    for path in root.rglob("*"):  # another user reads them
        path.chmod(0o755 if path.is_dir() else 0o644)
    (root / "settings").mkdir()
    (root / "settings" / "settings.json").write_text(json.dumps(SETTINGS))
    lines = "".join(f"{name}: {value}\n" for name, value in SETTINGS.items())
    (root / "settings" / "settings.yaml").write_text(f"# a run\n{lines}target_modules: all-linear\n")


def make_wide(root: Path) -> None:
    """Adds a model of 100 MB with its store and adapter."""

    def made() -> None:
        import torch
        from models import randomize_adapter
        from runs import model_directory

        from mebp_triton import LoraConfig, load, quantize
        from mebp_triton.models.adapter import save_adapter

        model_directory(root / "wide-model", hidden_size=768, intermediate_size=3072)
        quantize(root / "wide-model", root / "wide-store", group_size=32)
        model = load(root / "wide-store", LoraConfig(r=8, lora_alpha=8), dtype=torch.float32)
        randomize_adapter(model)
        save_adapter(model, root / "wide-adapter")

    must("wide model", made)


def _wide_codes(root: Path) -> None:
    from mebp_triton import quantize

    quantize(root / "model", root / "8-bit-store", "affine", 16, bits=8)


def _two_levels(root: Path) -> None:
    from runs import two_level_store

    from mebp_triton.kernels.names import Form

    two_level_store(root / "model", root / "two-level-store", Form("affine", 32))


def _models(root: Path) -> None:
    import torch
    from gguf_files import llama_of_every_type, llama_tensors, write
    from models import bnb_directory
    from runs import model_directory, word_tokenizer
    from transformers import AutoModelForCausalLM

    from mebp_triton import Int4Config

    model_directory(root / "model")
    AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).save_pretrained(
        root / "sharded", max_shard_size="60KB"
    )
    model = AutoModelForCausalLM.from_pretrained(
        root / "model", quantization_config=Int4Config(scheme="affine", group_size=32), dtype=torch.float32
    )
    model.save_pretrained(root / "int4")
    bnb_directory(root / "made", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True).rename(root / "bnb")
    for name in ("sharded", "int4"):
        word_tokenizer().save_pretrained(root / name)
    _packed_directories(root)
    (root / "gguf").mkdir()
    write(root / "gguf" / "tiny.gguf", "llama", llama_tensors())
    (root / "gguf-parts").mkdir()
    write(root / "gguf-parts" / "tiny.gguf", "llama", llama_of_every_type(), hidden=256, ffn=256, tensors_each=8)


def _packed_directories(root: Path) -> None:
    import packed_layouts
    from packed_models import packed_directory

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    int4 = {"bits": 4, "group_size": 32}
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    compressed = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
    for name, layout, config in (
        ("gptq", packed_layouts.gptq(), {"quant_method": "gptq", "desc_act": False} | int4),
        ("awq", packed_layouts.awq(), {"quant_method": "awq", "version": "gemm"} | int4),
        ("mlx", packed_layouts.mlx_affine(32), int4),
        ("compressed", packed_layouts.compressed(32, False), {"quant_method": "compressed-tensors"} | compressed),
        ("hqq", packed_layouts.hqq(), {"quant_method": "hqq"}),
    ):
        packed_directory(root / name, layout, {"quantization_config": config}, **sizes)


def _data(place: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet
    from runs import sentences

    place.mkdir()
    (place / "train.txt").write_text(sentences(60))
    (place / "valid.txt").write_text(sentences(12, seed=9))
    rows = [{"prompt": sentences(1, seed), "completion": sentences(1, seed + 100)} for seed in range(20)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    texts = [{"text": sentences(2, seed)} for seed in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), place / "texts.parquet")
    datasets.Dataset.from_list(texts).save_to_disk(str(place / "saved"))


def _adapters(root: Path) -> None:
    import peft
    from models import peft_model, randomize_adapter

    from mebp_triton import LoraConfig, load
    from mebp_triton.models.adapter import save_adapter

    lora = LoraConfig(r=2, lora_alpha=6, rank_pattern={"q_proj": 3}, target_modules=["q_proj", "v_proj", "down_proj"])
    model = load(root / "store", lora)
    randomize_adapter(model)
    save_adapter(model, root / "adapter")
    wrapped = peft_model(root / "store", model, r=2, lora_alpha=6, rank_pattern={"q_proj": 3})
    assert isinstance(wrapped, peft.PeftModel)
    wrapped.save_pretrained(root / "peft-adapter")


def _interrupted_run(root: Path) -> None:
    """Leaves a run directory as an interruption between the checkpoint and the last step leaves it."""
    from mebp_triton.cli.main import main

    appended = 0

    def interrupt(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal appended
        if event == "open" and str(arguments[0]).endswith("metrics.jsonl") and arguments[1] == "a":
            appended += 1
            if appended == SAVED_AT + 2:
                raise KeyboardInterrupt

    sys.addaudithook(interrupt)
    data = root / "data"
    texts = [f"--train-file={data / 'train.txt'}", f"--validation-file={data / 'valid.txt'}"]
    code = main(["train", str(root / "store"), *texts, f"--output-dir={root / 'run'}", *TRAIN])
    assert code == 130 and (root / "run" / "checkpoint" / "state.json").exists()
    rows = [json.loads(line)["step"] for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(SAVED_AT + 1))


def _tables(place: Path) -> None:
    from mebp_triton.autotune.ceilings import Ceilings
    from mebp_triton.autotune.log import Log, Record, Trial, log_path
    from mebp_triton.kernels.configs import TileConfig
    from mebp_triton.kernels.tables import SHIPPED, parse_table, table_to_json
    from mebp_triton.system import strict_json

    place.mkdir()
    value = json.loads((SHIPPED / "sm_87.json").read_text())
    entries = list(parse_table(value, "sm_87").values())[:6]
    strict_json.write_json(place / "sm_87.json", table_to_json("sm_87", entries))
    log = Log("sm_87", ceilings={"a board": Ceilings(60.0, {"float16": 5.0})})
    for entry in entries:
        trials = (Trial(entry.route, 12.5, 11.0, (11.0, 12.0)), Trial(TileConfig(16, 64, 64), 20.0, reason="slower"))
        log.records[entry.problem] = Record(entry.problem, trials, "a board", dict(entry.versions), 16)
    strict_json.write_json(log_path(place / "sm_87.json"), log.to_json())


def copy_into(source: Path, target: Path) -> None:
    """Copies a file or a directory; links stay links."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    import_all()
    make_world(directory)
