"""Adapters that a run has not changed are named; blocks whose turn has not come are told from these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import model_directory, text_data, trainer

from mebp_triton.training import run_directory
from mebp_triton.training.finetune import finetune
from mebp_triton.training.untrained import Untrained, describe_unreached, untrained


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Any:
    return text_data(tmp_path_factory.mktemp("data"), count=6)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "draw_plots", lambda *_: [])


def test_a_layer_that_gets_no_gradient_is_named(shared_store: Any, data: Any, tmp_path: Path) -> None:
    """The second block's MLP is cut off from the loss, as a tower for images is."""
    made = trainer(shared_store("llama"), data, tmp_path / "run", max_steps=2)
    block = made.model.model.layers[1]
    block.mlp.register_forward_hook(lambda module, args, output: output.detach())
    summary = finetune(made, None)
    assert summary is not None
    names = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert summary["layers_without_gradient"] == names and summary["blocks_never_selected"] is None
    line = describe_unreached(names, 2)
    assert line.startswith(
        f"no gradient came to {', '.join(names)} in 2 steps: the adapters of these 3 layers add nothing"
    )
    assert "its adapter adds nothing" in describe_unreached(names[:1], 2)


def test_blocks_that_wait_for_their_turn_are_not_named(shared_store: Any, data: Any, tmp_path: Path) -> None:
    settings = {"selection_mode": "identity", "selected_ratio": 0.34}
    made = trainer(shared_store("llama"), data, tmp_path / "run", max_steps=1, **settings)
    summary = finetune(made, None)
    assert summary is not None and summary["layers_without_gradient"] is None and summary["blocks_never_selected"] == 2


def test_steps_that_change_nothing_tell_nothing(shared_store: Any, data: Any, tmp_path: Path) -> None:
    made = trainer(shared_store("llama"), data, tmp_path / "run", max_steps=1)
    rows = [
        {"selected_blocks": [0, 1, 2], "learning_rate": 0.0, "skipped": False},
        {"selected_blocks": [0, 1, 2], "learning_rate": 1.0, "skipped": True},
    ]
    assert untrained(made.model, rows) == Untrained([], 3)
    with torch.no_grad():
        made.model.model.layers[0].self_attn.q_proj.lora_B[0, 0] = 1
    found = untrained(made.model, [{"selected_blocks": [0], "learning_rate": 1.0, "skipped": False}])
    assert len(found.unreached) == 6 and found.waiting == 2 and "model.layers.0.self_attn.k_proj" in found.unreached


def test_train_says_it_and_the_way_it_names_works(mebp: Any, tmp_path: Path) -> None:
    """Gemma 3n of two streams: no gradient comes through the gates of its inputs per layer."""
    model_directory(tmp_path / "model", "gemma3n_text")
    put = tmp_path / "text.txt"
    put.write_text("the cat sees the moon . " * 20)
    flags = ("--max-steps=2", "--max-length=16", "--lora-r=2", "--learning-rate=1e-2", f"--train-file={put}")
    code, _, err = mebp("train", tmp_path / "model", *flags, f"--output-dir={tmp_path / 'run'}")
    assert code == 0 and "no gradient came to model.layers.0.per_layer_input_gate" in err, err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    left_out = f"--exclude-modules={','.join(record['layers_without_gradient'])}"
    code, _, err = mebp("train", tmp_path / "run-store", *flags, left_out, f"--output-dir={tmp_path / 'again'}")
    assert code == 0 and "no gradient came" not in err, err
