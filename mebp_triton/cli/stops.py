"""Has a model stop where its training data end an answer, and says where it would not learn to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.data.turn_end import TurnEnd, find_turn_end, rows_that_train
from mebp_triton.models.generation import GENERATION_CONFIG, add_stops, stop_ids


@dataclass(frozen=True)
class RowEnds:
    """How the rows of a training file end.

    Attributes:
        turn: what the chat template writes behind an answer; None if that is not known.
        eos: the tokenizer's end-of-sequence token, which closes rows of strings.
        names: the tokens' texts by id.
    """

    turn: TurnEnd | None
    eos: int | None
    names: dict[int, str]


def find_row_ends(data: TokenizedData, tokenizer: Any) -> RowEnds:
    """Finds how the rows of ``data`` end, under the tokenizer's chat template.

    Raises:
        ValueError: there are chats among them, and the template leaves answers out.
    """
    eos = tokenizer.eos_token_id
    try:
        turn = find_turn_end(tokenizer)
    except ValueError:
        if data.report.chat_rows:
            raise
        turn = None  # nothing is trained by this template
    ids = {*(turn.tokens + turn.next_tokens if turn else ()), *([] if eos is None else [eos])}
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in ids}
    return RowEnds(turn, eos, names)


def stop_where_rows_end(model: Any, data: TokenizedData, ends: RowEnds) -> Iterator[str]:
    """Has ``model`` stop at the tokens that end a row and are trained; yields what the user must know, in lines."""
    stops = stop_ids(model)
    turn_stop = None if ends.turn is None else ends.turn.stop(stops)
    for token in dict.fromkeys([turn_stop, ends.eos]):
        if token is not None and token not in stops and (count := rows_that_train(data, [token])):
            add_stops(model, [token])
            yield (
                f"{count:,} rows train {ends.names[token]} (token {token}) as an end, where the model does not stop: "
                f"the run's and the adapter's {GENERATION_CONFIG} name it too"
            )
    if data.report.string_rows and ends.eos is None:
        yield "the tokenizer has no end-of-sequence token, so no row ends, and the model will not learn to stop"
    if data.report.chat_rows and ends.turn is not None:
        yield from _unlearnt(data, ends, ends.turn, turn_stop)


def _unlearnt(data: TokenizedData, ends: RowEnds, turn: TurnEnd, stop: int | None) -> Iterator[str]:
    """Why a model that learns these chats will not learn to stop, if so."""
    if stop is None and turn.text:
        yield (
            f"the chat template ends an answer by the text {turn.text!r:.80}, which is no token of its own: "
            "`mebp generate --chat` stops there, other programs need it as a stop string"
        )
    elif stop is None or not turn.tokens:
        only = "" if stop is None else f"; only {ends.names[stop]}, which begins the next turn, ends one"
        yield (
            f"the chat template writes nothing behind a last answer{only}: the model will not learn to stop there; "
            "have the template write eos_token behind it"
        )
    elif not rows_that_train(data, turn.tokens):
        yield (
            f"no row trains {ends.names[stop]}, which ends an answer, so the model will not learn to stop: "
            f"{data.report.truncated_rows:,} rows are cut at --max-length, and a template's {{% generation %}} mark "
            "must take it in"
        )
