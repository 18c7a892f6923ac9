"""Training text: files -> token rows -> batches, in an order that a resumed run finds again.

A ``.txt`` file is continued pre-training: tokenised as one, cut into windows. A ``.jsonl`` file has one row a line, and
its keys say what is trained: ``text`` and ``messages`` everything, ``prompt`` + ``completion`` the completion only.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
ROW_KINDS = (("text",), ("prompt", "completion"), ("messages",))
KINDS_WANTED = "'text', 'prompt' and 'completion', or 'messages'"

PIECE_CHARS = 1 << 16
CUT = re.compile(r"(?<=[!-~]\n)(?=[A-Za-z])|(?<=\n)(?= [A-Za-z])")
# Llama-3's and Qwen2's way to part words (they differ in digits); GPT-2's is built into ByteLevel.
_LETTERS, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLIT_REGEXES = (_LETTERS + r"\p{N}{1,3}" + _REST, _LETTERS + r"\p{N}" + _REST)


@dataclass(frozen=True)
class Example:
    """One row, ``[T]`` each; ``labels`` are the ids (the model shifts them), -100 where nothing is trained."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DataReport:
    """What a file became.

    Attributes:
        rows: rows kept.
        tokens: tokens in them.
        trained_tokens: those that enter the loss: trained, and not a row's first, which nothing predicts.
        truncated_rows: kept rows that were cut at the maximum length.
        dropped_rows: rows left out because no token of theirs would enter the loss.
    """

    rows: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    dropped_rows: int

    def describe(self) -> str:
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens ({self.trained_tokens:,} trained), "
            f"{self.truncated_rows:,} rows truncated, {self.dropped_rows:,} dropped"
        )


class TokenizedData:
    """Rows in two flat arrays, 5 bytes a token: lists of Python integers would take 8 to 36.

    Row ``i`` is ``ids[offsets[i] : offsets[i + 1]]``; ``trained`` has the same length as ``ids``.
    """

    def __init__(
        self, ids: NDArray[np.int32], trained: NDArray[np.bool_], offsets: NDArray[np.int64], report: DataReport
    ):
        self.ids, self.trained, self.offsets, self.report = ids, trained, offsets, report

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = slice(self.offsets[index], self.offsets[index + 1])
        input_ids = torch.from_numpy(self.ids[row].astype(np.int64))
        return Example(input_ids, input_ids.masked_fill(torch.from_numpy(~self.trained[row]), IGNORE_INDEX))


class _Rows:
    """Collects rows into growing flat arrays and counts what was cut or left out."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.ids, self.trained, self.offsets = array("i"), bytearray(), array("q", [0])
        self.trained_tokens = self.truncated = self.dropped = 0

    def add(self, ids: Sequence[int], masked: int) -> None:
        """Adds a row whose first ``masked`` tokens are not trained."""
        length = min(len(ids), self.max_length)
        entering = length - max(masked, 1)
        if entering <= 0:
            self.dropped += 1
            return
        self.truncated += length < len(ids)
        self.trained_tokens += entering
        self.ids.extend(ids[:length])
        self.trained.extend(b"\0" * masked + b"\1" * (length - masked))
        self.offsets.append(len(self.ids))

    def finish(self) -> TokenizedData:
        rows = len(self.offsets) - 1
        report = DataReport(rows, len(self.ids), self.trained_tokens, self.truncated, self.dropped)
        # Views of the growing buffers, not copies.
        ids, trained = np.frombuffer(self.ids, np.int32), np.frombuffer(self.trained, np.bool_)
        return TokenizedData(ids, trained, np.frombuffer(self.offsets, np.int64), report)


def load_data(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int, *, name: str = "train-file"
) -> TokenizedData:
    """Tokenises a file.

    Args:
        path: a UTF-8 ``.txt`` or ``.jsonl`` file.
        tokenizer: the model's. No special token is added but the end-of-sequence token that closes a ``text`` or
            string ``completion`` row; what chat messages need is up to the chat template.
        max_length: tokens; longer rows are cut, text is cut into windows of this length.
        name: what error messages call the file.

    Raises:
        ValueError: the file cannot be read, is not what its suffix says, or holds nothing to train on.
    """
    if max_length < 2:
        raise ValueError(f"max-length must be at least 2, since a row's first token is not predicted; got {max_length}")
    path, where, rows = Path(path), f"{name} {path}", _Rows(max_length)
    loaders = {".txt": _load_txt, ".jsonl": _load_jsonl}
    try:
        if not path.is_file():
            problem = "is a directory or special file" if path.exists() else "no such file"
            raise ValueError(f"{where}: {problem}; give a .txt or .jsonl file")
        if path.suffix.lower() not in loaders:
            raise ValueError(f"{where}: unknown suffix {path.suffix!r}; give a .txt or .jsonl file")
        loaders[path.suffix.lower()](path, tokenizer, rows, where)
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror}); give a readable file") from error
    data = rows.finish()
    if not len(data):
        problem = f"all {rows.dropped:,} rows are too short or fully masked" if rows.dropped else "it is empty"
        raise ValueError(f"{where}: nothing to train on, {problem}; add text, or raise max-length (now {max_length})")
    return data


def _load_txt(path: Path, tokenizer: PreTrainedTokenizerBase, rows: _Rows, where: str) -> None:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is not text
    except UnicodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); convert the file") from error
    ids = array("i")
    for piece in _pieces(tokenizer, text):
        ids.extend(_encode(tokenizer, piece))
    for start in range(0, len(ids), rows.max_length):
        rows.add(ids[start : start + rows.max_length], masked=0)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[str]:
    """Cuts a text where that does not change its ids, or not at all: a tokeniser needs some 600 bytes a token."""
    cuttable, start = _splits_at_cuts(tokenizer), 0
    while start < len(text):
        cut = CUT.search(text, start + PIECE_CHARS) if cuttable else None
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _splits_at_cuts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every ``CUT`` is certain to part two words of the pre-tokeniser, so that no token can span it.

    How the known regular expressions see a cut: newlines end a word, whether a letter, a space and a letter, or
    nothing follows (for ``x\\nY`` the run of spaces is the one newline, hence the x; of ``\\n Y`` the last space goes
    with Y). Y or `` Y`` starts a word: none takes a letter after a newline, and none looks back. Digits only splits
    further. NFC joins neither a newline, a space nor a letter to what stands before it.
    """
    if not tokenizer.is_fast:
        return False
    for token in tokenizer.added_tokens_decoder.values():
        if token.lstrip or token.rstrip or token.single_word or "\n" in token.content or token.content[:1].isalpha():
            return False  # it could span a cut, or be the Y and leave its space behind
    core: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    if core.normalizer and json.loads(core.normalizer.__getstate__())["type"] != "NFC":
        return False
    words: dict[str, Any] = json.loads(core.pre_tokenizer.__getstate__()) if core.pre_tokenizer else {"type": "none"}
    parted = False
    for part in words.get("pretokenizers", [words]):
        if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            parted |= part["use_regex"]
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            if part["pattern"].get("Regex") not in SPLIT_REGEXES:
                return False
            parted = True
        elif part["type"] != "Digits":
            return False
    return parted


def _load_jsonl(path: Path, tokenizer: PreTrainedTokenizerBase, rows: _Rows, where: str) -> None:
    with path.open("rb") as file:  # bytes, since only \n ends a row: text mode would also cut at a lone \r
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    rows.add(*_tokenize_row(tokenizer, _parse(text)))
            except UnicodeError as error:
                raise ValueError(f"{where}:{number}: not UTF-8 ({error}); convert the file") from error
            except ValueError as error:
                raise ValueError(f"{where}:{number}: {error}") from error


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, got {_shown(row)}")
    return row


def _tokenize_row(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> tuple[list[int], int]:
    """A row's ids and how many at its start are masked."""
    kinds = [kind for kind in ROW_KINDS if all(key in row for key in kind)]
    if len(kinds) != 1:
        problem = "row of more than one kind" if kinds else "unknown row"
        raise ValueError(f"{problem}, with the keys {sorted(row)}; give one of {KINDS_WANTED}")
    if kinds[0] == ("text",):
        if not isinstance(row["text"], str):
            raise ValueError(f"'text' must be a string, got {_shown(row['text'])}")
        return _with_eos(tokenizer, _encode(tokenizer, row["text"])), 0
    if kinds[0] == ("messages",):
        return _encode(tokenizer, _render(tokenizer, _messages(row, "messages"), row)), 0

    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        head, rest = _split(tokenizer, row["prompt"], row["prompt"] + row["completion"])
        return _with_eos(tokenizer, head + rest), len(head)
    if not (isinstance(row["prompt"], list) and isinstance(row["completion"], list)):
        got = f"{_shown(row['prompt'])} and {_shown(row['completion'])}"
        raise ValueError(f"'prompt' and 'completion' must be two strings or two lists of messages, got {got}")
    prompt = _messages(row, "prompt")
    whole = _render(tokenizer, prompt + _messages(row, "completion"), row)
    for header in (True, False):  # the header that opens the answer is given at inference, so it is part of the prompt
        opening = _render(tokenizer, prompt, row, add_generation_prompt=header)
        if whole.startswith(opening):
            head, rest = _split(tokenizer, opening, whole)
            return head + rest, len(head)
    raise ValueError("the chat template writes 'prompt' differently when 'completion' follows; give both as strings")


def _split(tokenizer: PreTrainedTokenizerBase, prompt: str, whole: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt exactly as at inference, and of what follows it.

    What follows is read off the whole, since some tokenisers put a space before any text they start on. Where a token
    of the whole straddles the boundary that cannot be, and the rest is tokenised alone.
    """
    head, ids = _encode(tokenizer, prompt), _encode(tokenizer, whole)
    if ids[: len(head)] == head:
        return head, ids[len(head) :]
    return head, _encode(tokenizer, whole[len(prompt) :])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    text.encode()  # half a surrogate pair, which JSON can spell, is an error here that says so
    # Not verbose: it warns of texts longer than the model's context, and those are cut here.
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _messages(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{key}' must be a list of messages, not empty, got {_shown(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message of '{key}' must be an object with 'role' and 'content', got {_shown(message)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"the 'content' of a message of '{key}' must be a string, got {_shown(content)}")
    return messages


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    row: dict[str, Any],
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError("chat messages, but the tokenizer has no chat template; set one, or give strings")
    try:
        # Rendered to text and tokenised by _encode: transformers 4 and 5 return ids in different containers.
        text = tokenizer.apply_chat_template(
            messages,
            tools=row.get("tools"),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            return_dict=False,
        )
    except (TemplateError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template refuses the messages ({reason}); change the row") from error
    assert isinstance(text, str)
    return text


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def evenly_spaced(data: Sized, count: int | None) -> list[int]:
    """Indices ``i * total // count``: the same rows every time. All of them where ``count`` is None or larger."""
    total = len(data)
    if count is None or count >= total:
        return list(range(total))
    if count < 1:
        raise ValueError(f"the number of windows must be at least 1, got {count}")
    return [i * total // count for i in range(count)]


def collate(
    examples: Sequence[Example], pad_token_id: int | None, padding_side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Pads to the longest row: ``input_ids``, ``attention_mask``, ``labels``, each ``[B, T]`` int64.

    The mask and the labels come from positions, never from ids, so the pad id may be 0, the end-of-sequence token or
    None (a tokenizer without one).
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id or 0)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        start = longest - length if padding_side == "left" else 0
        input_ids[row, start : start + length] = example.input_ids
        attention_mask[row, start : start + length] = 1
        labels[row, start : start + length] = example.labels
        if start:
            labels[row, start] = IGNORE_INDEX  # or the shift would train the row's first token, on a pad's output
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def valid_tokens(batch: Mapping[str, Tensor]) -> int:
    """Label positions that count after the causal shift: the loss's divisor."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that depends on nothing but the arguments.

    Sorted raw bits: numpy promises those streams across its versions, and those of ``permutation`` it does not.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Batches that cover ``count`` rows, a last partial one included."""
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    return -(-count // batch_size)


def batches(
    data: TokenizedData, batch_size: int, seed: int, *, start_batch: int = 0, epochs: int | None = None
) -> Iterator[list[Example]]:
    """Batches epoch after epoch, each epoch in its own order; without end where ``epochs`` is None.

    ``start_batch=k`` gives exactly the batches k, k+1, ... of a run that started at 0.
    """
    per_epoch = batches_per_epoch(len(data), batch_size)
    if start_batch < 0 or per_epoch == 0:
        raise ValueError(f"start_batch must be at least 0 and data not empty, got {start_batch} and {len(data)} rows")
    epoch_order(0, seed, 0)  # a wrong seed is an error here, not at the first batch

    def generate() -> Iterator[list[Example]]:
        epoch, first = divmod(start_batch, per_epoch)
        while epochs is None or epoch < epochs:
            order = epoch_order(len(data), seed, epoch)
            for start in range(first * batch_size, len(data), batch_size):
                yield [data[int(index)] for index in order[start : start + batch_size]]
            epoch, first = epoch + 1, 0

    return generate()
