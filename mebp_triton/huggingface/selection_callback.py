"""Lets Hugging Face's ``Trainer`` train a selection of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mebp_triton.blocks.options import UnselectedUpdate
from mebp_triton.blocks.selection import LayerCyclicManager
from mebp_triton.system import strict_json

SAVED = "selection.json"


class SelectionCallback(TrainerCallback):
    """Advances a selection with every optimizer step, saves it in the trainer's checkpoints, and resumes from them.

    Args:
        selection: the selection of the model that is trained.
        unselected_update: what happens to blocks that are not selected; see ``LayerCyclicManager.attach``.

    Raises:
        ValueError: (when training resumes) the checkpoint lacks the norms by which blocks are selected.
    """

    def __init__(self, selection: LayerCyclicManager, unselected_update: UnselectedUpdate = "momentum") -> None:
        self.selection, self.unselected_update = selection, unselected_update

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step > 0:
            saved = Path(args.output_dir, f"checkpoint-{state.global_step}", SAVED)
            if saved.exists():
                self.selection.load_state_dict(strict_json.read_sealed(saved))
            elif self.selection.schedule == "importance":
                raise ValueError(f"cannot resume: {saved} is missing, and its norms decide what is selected")
            else:
                self.selection.load_state_dict(self.selection.state_dict() | {"step": state.global_step})
        self.selection.attach(optimizer, self.unselected_update)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        directory = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and directory.is_dir():
            strict_json.write_json(directory / SAVED, strict_json.sealed(self.selection.state_dict()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.selection.detach()
