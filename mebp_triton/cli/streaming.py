"""Text that is shown while a model makes it, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class TextStream(BaseStreamer):
    """The ``streamer`` of a ``generate`` call: collects the new text, and shows what no later token can change.

    Held back are characters of which not all bytes are there, and what may be the beginning of one of ``ends``.

    Args:
        stops: the tokens that end the answer, and are none of its text, special or not.
        ends: texts that end the answer, and are none of it. ``is_ended`` is a stopping criterion.
        show: given the text in parts; None shows nothing.

    Attributes:
        ids: the new tokens. times: when each came, in seconds since this was made.
        ended: whether one of ``ends`` has come.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Collection[int] = (),
        ends: Collection[str] = (),
        show: Callable[[str], None] | None = None,
    ) -> None:
        self.tokenizer, self.stops, self.ends, self.show = tokenizer, stops, ends, show
        self.ids: list[int] = []
        self.times: list[float] = []
        self.ended = False
        self.text = ""
        self._shown, self._has_prompt, self._started = 0, False, time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Takes the prompt, and then one token after the other."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.ids += value.tolist()
        self.times.append(time.perf_counter() - self._started)
        self._take(last=False)

    def end(self) -> None:
        """Shows the rest."""
        self._take(last=True)

    def is_ended(self, ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        """Whether one of ``ends`` has come, for each of the rows ``ids`` ``[1, tokens]``."""
        return torch.full((len(ids),), self.ended, device=ids.device)

    def _take(self, last: bool) -> None:
        kept = [token for token in self.ids if token not in self.stops]
        # Cleaned up, a text would lose spaces that were shown already, and those before punctuation marks.
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if places := [text.index(end) for end in self.ends if end in text]:
            text, self.ended = text[: min(places)], True
        self.text = text
        sure = len(text) if last else self._sure(text)
        if self.show is not None and sure > self._shown:
            self.show(text[self._shown : sure])
        self._shown = max(self._shown, sure)

    def _sure(self, text: str) -> int:
        """How many characters stay as they are, whatever follows."""
        sure = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        longest = max(map(len, self.ends), default=0)
        begun = (
            place
            for place in range(max(0, sure - longest + 1), sure)
            if any(end.startswith(text[place:sure]) for end in self.ends)
        )
        return next(begun, sure)
