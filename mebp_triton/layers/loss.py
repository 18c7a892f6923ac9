"""The loss over an int4 head, in one pass and without logits, under transformers' own modelling code.

A model's forward calls its head, changes the logits (Gemma's soft-capping, Granite's scale), and passes them to
``loss_function``. When a loss without logits is wanted, the head returns ``DeferredLogits``, which record those changes
instead of computing them, and the loss applies them tile by tile. A change that cannot be recorded computes the real
logits, so the result is exact either way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .deferred_logits import DeferredLogits, OnDemandLogits
from .head import Int4Head


class LossStatistics:
    """Counts of one loss. They stay on its device until one of them is asked for, which waits for the device.

    Attributes:
        tokens: targets that are not ignored.
        correct: those of them that were the most likely token.
    """

    def __init__(self, tokens: int | Tensor = 0, correct: int | Tensor = 0) -> None:
        self._counts = tokens, correct

    @functools.cached_property
    def _known(self) -> tuple[int, int]:
        tokens, correct = self._counts
        if isinstance(tokens, Tensor) and isinstance(correct, Tensor):
            tokens, correct = torch.stack((tokens, correct)).tolist()
        return int(tokens), int(correct)

    @property
    def tokens(self) -> int:
        return self._known[0]

    @property
    def correct(self) -> int:
        return self._known[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LossStatistics) and self._known == other._known


class OnePassLoss:
    """The cross-entropy that replaces ``model.loss_function``, for deferred and for real logits alike.

    The sum over the valid targets is divided by their number, or by ``num_items_in_batch`` if the caller passes it, or
    else by ``normalizer`` if that is set. With either of these the micro-batches of a step add up to the mean over all
    of its tokens. A batch without a valid target has loss 0 and zero gradients.

    Attributes:
        statistics: counts of the last call.
        normalizer: the number of targets to divide by; None for those of the batch.
        rows: the most rows of a batch whose tokens are multiplied by the head at once; None for all.
    """

    def __init__(self) -> None:
        self.statistics = LossStatistics()
        self.normalizer: float | None = None
        self.rows: int | None = None

    @torch.compiler.disable
    def __call__(
        self,
        logits: Any,
        labels: Tensor,
        *args: Any,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        _check_targets(shift_labels, logits.shape[-1], ignore_index)
        targets = shift_labels.reshape(-1).to(logits.device)
        if isinstance(logits, DeferredLogits):
            head = logits.head
            hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
            most = None if self.rows is None else self.rows * logits.hidden.shape[-2]
            losses, argmax = head.cross_entropy(hidden, targets, ignore_index, logits.factors, most)
        else:
            real = logits.reshape(-1, logits.shape[-1]).float()
            losses = nn.functional.cross_entropy(real, targets, ignore_index=ignore_index, reduction="none")
            argmax = real.argmax(dim=-1)
        valid = targets != ignore_index
        tokens = valid.sum()
        self.statistics = LossStatistics(tokens, ((argmax == targets) & valid).sum())
        divisor = num_items_in_batch if num_items_in_batch is not None else self.normalizer
        if divisor is None:
            divisor = tokens.clamp(min=1)
        elif isinstance(divisor, Tensor):  # a trainer counts 0 items in a batch that is masked as a whole
            divisor = divisor.to(losses.device).masked_fill(divisor.to(losses.device) == 0, 1)
        return losses.sum() / (1 if isinstance(divisor, (int, float)) and divisor == 0 else divisor)


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises ValueError for a label that is no token. Labels in host memory are checked without a wait."""
    bad = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bool(bad.any()):
        raise ValueError(
            f"label {int(targets[bad][0])} is not a token of the vocabulary 0..{vocabulary - 1}; a token without a "
            f"target is labelled {ignore_index}"
        )


@torch.compiler.disable
def _handed_out(item: Any) -> Any:
    """The item of a model's output that its caller gets: None for deferred logits while gradients are on."""
    if not isinstance(item, DeferredLogits):
        return item
    return None if torch.is_grad_enabled() else OnDemandLogits(item)


class _Deferral:
    """Makes a head defer its logits during a forward pass with labels: hooks on the model.

    It is an object, and no closures, so that a copy of the model defers those of its own head.
    """

    def __init__(self, head: Int4Head) -> None:
        self.head = head

    def before(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        wanted = kwargs.pop("return_logits", False)
        self.head.deferred = kwargs.get("labels") is not None and not wanted
        return args, kwargs

    def after(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self.head.deferred = False
        if isinstance(output, dict) and isinstance(output.get("logits"), DeferredLogits):
            return type(output)(**{key: _handed_out(value) for key, value in output.items()})
        if isinstance(output, tuple):
            return tuple(_handed_out(item) for item in output)
        return output


def install_loss(model: Any, head: Int4Head) -> OnePassLoss:
    """Makes ``model(..., labels=...)`` compute its loss in one pass over ``head``.

    ``model(..., labels=..., return_logits=True)`` computes the logits as well, in the model's own way. While gradients
    are off, the output has them as ``OnDemandLogits`` in any case.
    """
    loss, deferral = OnePassLoss(), _Deferral(head)
    model.loss_function = loss
    model.register_forward_pre_hook(deferral.before, with_kwargs=True)
    model.register_forward_hook(deferral.after, with_kwargs=True, always_call=True)
    return loss
