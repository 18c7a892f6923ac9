"""Which tokens of a row enter the loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Masking:
    """Which tokens of a row enter the loss; the names are TRL's.

    Attributes:
        completion_only_loss: train only the completion of ``prompt`` + ``completion``. None does so for rows that have
            them. True also refuses other rows. False trains the prompt as well.
        assistant_only_loss: train only the assistant's turns in chat messages. Every row must have messages.
    """

    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False

    def check_text(self) -> None:
        """Raises ValueError where plain text, which has no parts, cannot be masked as wanted."""
        if self.completion_only_loss:
            raise ValueError("completion_only_loss needs 'prompt' and 'completion', and this is text: leave it out")
        if self.assistant_only_loss:
            raise ValueError("assistant_only_loss needs chat messages, and this is text: leave it out")
