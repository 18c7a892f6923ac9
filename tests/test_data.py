"""Data room: files to rows, masks, padding, and an order that resumes."""

import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mebp_triton import data as data_module
from mebp_triton.data import (
    SPLIT_REGEXES,
    Example,
    batches,
    batches_per_epoch,
    collate,
    epoch_order,
    evenly_spaced,
    load_data,
    valid_tokens,
)

SENTENCES = [
    "The cat sat on the mat and looked at the dog.",
    "What is two plus two? Two plus two is four.",
    "user system assistant answer question, a short text about tokens\n",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "What is two plus two?"}]
ANSWER = [{"role": "assistant", "content": "four."}]


def byte_bpe(chat_template=CHATML, **special):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe(eos_token="<|im_end|>", pad_token="<|pad|>")


@pytest.fixture(scope="module")
def bare():
    """No eos, no pad, no chat template."""
    return byte_bpe(chat_template=None)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows(data):
    """``(ids, labels)`` of every row, as lists."""
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in data]


def text_data(tokenizer, write, tokens, max_length):
    """``tokens`` tokens of plain text in windows."""
    text = tokenizer.decode(encode(tokenizer, " ".join(SENTENCES) * 20)[:tokens])
    assert len(encode(tokenizer, text)) == tokens
    return load_data(write("text.txt", text), tokenizer, max_length)


# Plain text


@pytest.mark.parametrize("tail", [0, 1, 2, 7])
def test_txt_windows_are_the_whole_text_in_order(tokenizer, write, tail):
    data = text_data(tokenizer, write, 3 * 8 + tail, 8)
    ids = encode(tokenizer, (" ".join(SENTENCES) * 20))[: 3 * 8 + tail]
    kept = 24 + (tail if tail >= 2 else 0)
    assert [token for row, _ in rows(data) for token in row] == ids[:kept]
    assert [len(row) for row, _ in rows(data)] == [8, 8, 8] + [tail] * (tail >= 2)
    assert all(ids == labels for ids, labels in rows(data))
    report = data.report
    assert (report.rows, report.tokens, report.dropped_rows, report.truncated_rows) == (len(data), kept, tail == 1, 0)
    assert report.trained_tokens == kept - len(data)


def test_txt_is_tokenised_whole_and_without_special_tokens(write):
    # A pre-tokeniser that joins lines, and a post-processor that would add tokens.
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a\nb": 1, "[BOS]": 2}, unk_token="[UNK]"))
    from tokenizers.processors import TemplateProcessing

    core.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 2)])
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="[BOS]")
    assert encode(tokenizer, "a\nb") == [1] and tokenizer("a\nb")["input_ids"] == [2, 1]
    assert rows(load_data(write("x.txt", "a\nb a\nb"), tokenizer, 8)) == [([1, 1], [1, 1])]


def with_pre_tokenizer(tokenizer, pre_tokenizer, normalizer=None, added=()):
    """The same vocabulary behind another pre-tokeniser."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.normalizer = normalizer
    core.add_tokens(list(added))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer  # transformers 4 resets add_prefix_space when it is built
    return tokenizer


def byte_level(regex=None, prefix=False):
    if regex is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CUTTABLE = {
    "gpt2": (byte_level(),),
    "llama3": (byte_level(SPLIT_REGEXES[0]),),
    "qwen2": (byte_level(SPLIT_REGEXES[1]), normalizers.NFC()),
    "smollm2": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),),
}


ATOMS = [*"\n\n\naB1. \t\u0301\u00e9\x1c\u3000中 ", "'s", "23", "!?", "  ", "\r\n"]


@pytest.fixture(scope="module")
def greedy():
    """Byte BPE that joins whatever its pre-tokeniser lets it, newlines and letters too."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([first + second for first in ATOMS for second in ATOMS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def awkward_text(seed, length):
    return "".join(np.random.default_rng(seed).choice(ATOMS, length))


@pytest.mark.parametrize("name", CUTTABLE)
def test_txt_in_pieces_has_the_ids_of_the_whole(greedy, write, monkeypatch, name):
    monkeypatch.setattr(data_module, "PIECE_CHARS", 1)
    tokenizer = with_pre_tokenizer(greedy, *CUTTABLE[name])
    text = awkward_text(99, 20_000)
    assert len(list(data_module._pieces(tokenizer, text))) > 100
    path = write("x.txt", text)
    whole = encode(tokenizer, path.read_text(encoding="utf-8"))
    data = load_data(path, tokenizer, 10**6)
    assert data.ids.tolist() == whole


@pytest.mark.parametrize(
    "parts",
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),),
        (byte_level(prefix=True),),
        (byte_level(r"\s*[^\s]+"),),
        (pre_tokenizers.Metaspace(),),
        (pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), byte_level()]),),
        (None,),
        (byte_level(), normalizers.Prepend("_")),
        (byte_level(), None, [AddedToken("<x>", lstrip=True)]),
        (byte_level(), None, [AddedToken("<x>", rstrip=True)]),
        (byte_level(), None, [AddedToken("1b", single_word=True)]),
        (byte_level(), None, [AddedToken(".\nB")]),
        (byte_level(), None, [AddedToken("Be")]),
    ],
)
def test_other_tokenisers_get_the_text_whole(greedy, monkeypatch, parts):
    monkeypatch.setattr(data_module, "PIECE_CHARS", 1)
    tokenizer = with_pre_tokenizer(greedy, *parts)
    assert list(data_module._pieces(tokenizer, "a.\nB.\nB <x>")) == ["a.\nB.\nB <x>"]


def test_byte_order_mark_is_no_text(tokenizer, write):
    plain = rows(load_data(write("a.txt", "The cat sat"), tokenizer, 8))
    assert rows(load_data(write("b.txt", b"\xef\xbb\xbfThe cat sat"), tokenizer, 8)) == plain
    line = json.dumps({"text": "The cat sat"}).encode()
    assert rows(load_data(write("c.jsonl", b"\xef\xbb\xbf" + line), tokenizer, 99)) == rows(
        load_data(write("d.jsonl", line), tokenizer, 99)
    )


def test_text_longer_than_the_models_context_is_no_warning(tokenizer, write, caplog):
    short = byte_bpe(eos_token="<|im_end|>", model_max_length=4)
    load_data(write("x.txt", " ".join(SENTENCES)), short, 4)
    assert not caplog.records


# Rows of jsonl


def test_text_row_ends_in_eos_once(tokenizer, write):
    eos = tokenizer.eos_token_id
    ids = encode(tokenizer, "The cat sat on")
    path = write("x.jsonl", [{"text": "The cat sat on"}, {"text": "The cat sat on<|im_end|>"}])
    assert rows(load_data(path, tokenizer, 99)) == [(ids + [eos],) * 2] * 2


def test_completion_alone_is_trained(tokenizer, write):
    prompt, completion = "What is two plus two?", " four."
    head, rest = encode(tokenizer, prompt), encode(tokenizer, completion) + [tokenizer.eos_token_id]
    data = load_data(write("x.jsonl", [{"prompt": prompt, "completion": completion}]), tokenizer, 99)
    assert rows(data) == [(head + rest, [-100] * len(head) + rest)]
    assert data.report.trained_tokens == len(rest)


def test_prompt_ids_are_those_of_inference_where_a_token_straddles(tokenizer, write):
    prompt, completion = "The ca", "t sat"
    assert encode(tokenizer, prompt + completion)[: len(encode(tokenizer, prompt))] != encode(tokenizer, prompt)
    ((ids, labels),) = rows(load_data(write("x.jsonl", [{"prompt": prompt, "completion": completion}]), tokenizer, 99))
    head = len(encode(tokenizer, prompt))
    assert ids[:head] == encode(tokenizer, prompt) and labels[:head] == [-100] * head
    assert tokenizer.decode(ids[head:-1]) == completion and labels[head:] == ids[head:]


def test_completion_gets_no_space_that_is_not_there(write):
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "▁a": 1, "b": 2, "▁b": 3, ":": 4}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert encode(tokenizer, "b") == [3]
    data = load_data(write("x.jsonl", [{"prompt": "a:", "completion": "b"}]), tokenizer, 99)
    assert rows(data) == [([1, 4, 2], [-100, -100, 2])]


def test_messages_go_through_the_template_and_are_all_trained(tokenizer, write):
    text = "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\nfour.<|im_end|>\n"
    data = load_data(write("x.jsonl", [{"messages": QUESTION + ANSWER}]), tokenizer, 99)
    assert rows(data) == [(encode(tokenizer, text),) * 2]  # nothing appended: the template closes each message


def test_prompt_and_completion_of_messages(tokenizer, write):
    head = encode(tokenizer, "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n")
    rest = encode(tokenizer, "four.<|im_end|>\n")
    data = load_data(write("x.jsonl", [{"prompt": QUESTION, "completion": ANSWER}]), tokenizer, 99)
    assert rows(data) == [(head + rest, [-100] * len(head) + rest)]


def test_template_whose_answer_header_differs(write):
    """Templates of reasoning models open the answer with a thought that a given answer does not have."""
    template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    head = encode(tokenizer, "<|im_start|>user\nWhat is two plus two?<|im_end|>\n")
    data = load_data(write("x.jsonl", [{"prompt": QUESTION, "completion": ANSWER}]), tokenizer, 99)
    assert data[0].labels.tolist().count(-100) == len(head)

    counting = byte_bpe("{{ messages | length }}" + CHATML, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="x.jsonl:1: the chat template writes 'prompt' differently"):
        load_data(write("x.jsonl", [{"prompt": QUESTION, "completion": ANSWER}]), counting, 99)


def test_tools_reach_the_template(write):
    tokenizer = byte_bpe("{{ tools[0]['name'] if tools else 'none' }} " + CHATML, eos_token="<|im_end|>")
    lines = [{"messages": QUESTION}, {"messages": QUESTION, "tools": [{"name": "plus", "parameters": {}}]}]
    data = load_data(write("x.jsonl", lines), tokenizer, 99)
    assert [tokenizer.decode(ids)[:5] for ids, _ in rows(data)] == ["none ", "plus "]


def test_one_file_mixes_kinds_and_skips_blank_lines(tokenizer, write):
    lines = [{"text": "The cat"}, {"prompt": "two", "completion": " plus"}, {"messages": QUESTION, "source": 3}]
    alone = [rows(load_data(write("one.jsonl", [line]), tokenizer, 99))[0] for line in lines]
    content = "\n\r\n".join(json.dumps(line) for line in lines) + "\n  \n"
    assert rows(load_data(write("mixed.JSONL", content), tokenizer, 99)) == alone


def test_only_newlines_end_a_row(tokenizer, write):
    line = json.dumps({"text": "The\u2028cat\x85sat"}, ensure_ascii=False)
    assert len(load_data(write("x.jsonl", line), tokenizer, 99)) == 1


def test_rows_are_cut_and_a_fully_masked_one_is_dropped(tokenizer, write):
    row = {"prompt": "What is two plus two?", "completion": " Two plus two is four."}
    head = len(encode(tokenizer, row["prompt"]))
    (whole, _), *_ = rows(load_data(write("x.jsonl", [row]), tokenizer, 99))
    good = {"text": "The cat"}

    def at(max_length):
        return load_data(write("x.jsonl", [row, good]), tokenizer, max_length)

    cut = at(head + 1)  # one token of the completion is left
    assert rows(cut)[0] == (whole[: head + 1], [-100] * head + [whole[head]])
    assert (cut.report.rows, cut.report.truncated_rows, cut.report.dropped_rows) == (2, 1, 0)
    for max_length in (head, head - 1):
        report = at(max_length).report
        assert (report.rows, report.truncated_rows, report.dropped_rows) == (1, 0, 1)
    assert at(len(whole)).report.truncated_rows == 0
    assert at(len(whole) - 1).report.truncated_rows == 1


def test_a_first_token_is_nothing_to_train(tokenizer, bare, write):
    # "T" alone is one token: with eos a row of two, without it nothing is predicted.
    path = write("x.jsonl", [{"text": "The cat"}, {"text": "T"}, {"text": ""}, {"prompt": "", "completion": "T"}])
    assert [len(ids) for ids, _ in rows(load_data(path, tokenizer, 99))][1:] == [2, 2]
    assert load_data(path, bare, 99).report.dropped_rows == 3


def test_tokenizer_without_eos_appends_nothing(bare, write):
    lines = [{"text": "The cat"}, {"prompt": "two", "completion": " plus"}]
    (text, _), (pair, labels) = rows(load_data(write("x.jsonl", lines), bare, 99))
    assert text == encode(bare, "The cat") and pair == encode(bare, "two plus")
    assert labels[-1] == pair[-1]
    assert len(load_data(write("x.txt", "The cat sat"), bare, 99)) == 1


def test_storage_is_flat_and_lean(tokenizer, write):
    data = text_data(tokenizer, write, 100, 8)
    assert (data.ids.dtype, data.trained.dtype) == (np.int32, np.bool_)
    assert data.ids.nbytes + data.trained.nbytes == 5 * data.report.tokens
    example = data[0]
    assert example.input_ids.dtype == example.labels.dtype == torch.int64
    example.input_ids.zero_(), example.labels.zero_()
    assert data[0].input_ids.any() and data[0].labels.any()  # an example is a copy
    with pytest.raises(IndexError):
        data[len(data)]


def test_report_agrees_with_the_rows(tokenizer, write):
    lines = [{"text": s} for s in SENTENCES] + [{"prompt": s, "completion": s} for s in SENTENCES]
    data = load_data(write("x.jsonl", [*lines, {"messages": QUESTION}, {"text": ""}]), tokenizer, 15)
    report = data.report
    assert report.tokens == sum(len(ids) for ids, _ in rows(data))
    assert report.trained_tokens == sum(valid_tokens(collate([example], None)) for example in data)
    assert report.rows + report.dropped_rows == 8 and report.truncated_rows > 0
    assert report.describe() == (
        f"{report.rows} rows, {report.tokens} tokens ({report.trained_tokens} trained), "
        f"{report.truncated_rows} rows truncated, {report.dropped_rows} dropped"
    )


# Errors


GOOD = '{"text": "The cat"}\n'


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("x.csv", "a,b", "unknown suffix '.csv'; give a .txt or .jsonl"),
        ("x", "a", "unknown suffix ''"),
        ("x.txt", "", "nothing to train on, it is empty"),
        ("x.jsonl", "\n\n", "nothing to train on, it is empty"),
        ("x.jsonl", '{"text": ""}\n', "nothing to train on, all 1 rows are too short"),
        ("x.jsonl", [{"prompt": SENTENCES[0] * 9, "completion": "a"}], r"fully masked; .* max-length \(now 99\)"),
        ("x.txt", b"caf\xe9 cat", "x.txt: not UTF-8"),
        ("x.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}', "x.jsonl:2: not UTF-8"),
        ("x.jsonl", GOOD + '{"text": "\\ud800 cat"}', "x.jsonl:2: not UTF-8"),
        ("x.jsonl", GOOD + "\n" + '{"text": "The cat}', "x.jsonl:3: broken JSON"),
        ("x.jsonl", GOOD + "[" * 100_000, "x.jsonl:2: broken JSON"),
        ("x.jsonl", GOOD + "[1, 2]", r"x.jsonl:2: a row must be a JSON object, got list \[1, 2\]"),
        ("x.jsonl", GOOD + '{"title": "a", "body": "b"}', r"x.jsonl:2: unknown row, with the keys \['body', 'title'\]"),
        ("x.jsonl", GOOD + '{"prompt": "a"}', r"x.jsonl:2: unknown row, with the keys \['prompt'\]"),
        ("x.jsonl", GOOD + '{"text": "a", "messages": []}', "x.jsonl:2: row of more than one kind"),
        ("x.jsonl", GOOD + '{"text": 5}', "x.jsonl:2: 'text' must be a string, got int 5"),
        ("x.jsonl", GOOD + '{"prompt": "a", "completion": null}', "two strings or two lists .* 'a' and NoneType None"),
        ("x.jsonl", GOOD + '{"prompt": "a", "completion": []}', "two strings or two lists"),
        ("x.jsonl", [{"prompt": QUESTION, "completion": []}], "x.jsonl:1: 'completion' must be a list of messages"),
        ("x.jsonl", GOOD + '{"messages": "hi"}', "x.jsonl:2: 'messages' must be a list of messages"),
        ("x.jsonl", GOOD + '{"messages": []}', "not empty"),
        ("x.jsonl", GOOD + '{"messages": ["hi"]}', "must be an object with 'role' and 'content', got str 'hi'"),
        ("x.jsonl", GOOD + '{"messages": [{"content": "hi"}]}', "must be an object with 'role' and 'content'"),
        ("x.jsonl", GOOD + '{"messages": [{"role": "user", "content": 5}]}', "must be a string, got int 5"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tokenizer, write, file, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_data(write(file, content), tokenizer, 99, name="validation-file")
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    assert str(caught.value).startswith("validation-file /")


def test_missing_file_and_directory(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="train-file .*gone.txt: no such file"):
        load_data(tmp_path / "gone.txt", tokenizer, 8)
    with pytest.raises(ValueError, match="is a directory"):
        load_data(str(tmp_path), tokenizer, 8)


def test_max_length_below_two(tokenizer, write):
    with pytest.raises(ValueError, match="max-length must be at least 2.* got 1"):
        load_data(write("x.txt", "The cat"), tokenizer, 1)


def test_chat_template_missing_or_refusing(bare, write):
    for row in ({"messages": QUESTION}, {"prompt": QUESTION, "completion": ANSWER}):
        with pytest.raises(ValueError, match="x.jsonl:1: chat messages, but the tokenizer has no chat template"):
            load_data(write("x.jsonl", [row]), bare, 99)
    strict = byte_bpe("{{ raise_exception('Roles must\nalternate') }}")
    with pytest.raises(ValueError, match=r"x.jsonl:1: the chat template refuses .*\(Roles must alternate\)"):
        load_data(write("x.jsonl", [{"messages": QUESTION}]), strict, 99)


# Windows, padding


@pytest.mark.parametrize(
    "total, count, indices",
    [(10, 3, [0, 3, 6]), (7, 4, [0, 1, 3, 5]), (5, 1, [0]), (3, 3, [0, 1, 2]), (3, 9, [0, 1, 2]), (3, None, [0, 1, 2])],
)
def test_evenly_spaced(total, count, indices):
    assert evenly_spaced(range(total), count) == indices


def test_evenly_spaced_refuses_none_at_all():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        evenly_spaced(range(5), 0)


def example(ids, masked=0):
    ids = torch.tensor(ids)
    labels = ids.clone()
    labels[:masked] = -100
    return Example(ids, labels)


@pytest.mark.parametrize("pad", [0, 7, None])
def test_collate_goes_by_position(pad):
    """7 stands for pad = eos: it is in the rows too, as is 0."""
    long, short = example([5, 0, 7, 6, 7], masked=2), example([0, 3, 7])
    batch = collate([long, short], pad)
    assert batch["input_ids"].tolist() == [[5, 0, 7, 6, 7], [0, 3, 7, pad or 0, pad or 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 6, 7], [0, 3, 7, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}

    left = collate([long, short], pad, padding_side="left")
    assert left["input_ids"].tolist() == [[5, 0, 7, 6, 7], [pad or 0, pad or 0, 0, 3, 7]]
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    # The row's first token now stands after a pad: it must not become a target.
    assert left["labels"].tolist() == [[-100, -100, 7, 6, 7], [-100, -100, -100, 3, 7]]
    assert valid_tokens(batch) == valid_tokens(left) == 3 + 2
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'top'"):
        collate([long], pad, padding_side="top")


def test_gradients_do_not_depend_on_padding():
    """Sum of a bigram model's losses, by hand: the same for each row alone, padded left, and padded right."""
    examples = [example([1, 2, 3, 4, 2], masked=2), example([3, 0]), example([4, 4, 1])]

    def gradient(batch):
        table = torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5).sin().requires_grad_()
        logits = table[batch["input_ids"]]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        loss.backward()
        return table.grad

    alone = sum(gradient(collate([each], 0)) for each in examples)
    for side in ("left", "right"):
        for pad in (0, 2, 4):
            torch.testing.assert_close(gradient(collate(examples, pad, side)), alone, rtol=1e-12, atol=1e-12)


def test_valid_tokens_of_masked_and_single():
    assert valid_tokens(collate([example([1, 2, 3], masked=3)], 0)) == 0
    assert valid_tokens(collate([example([1])], 0)) == 0
    assert valid_tokens(collate([example([1, 2, 3]), example([1, 2], masked=1)], 0)) == 3


# Order


def test_epoch_order_is_a_permutation_fixed_by_its_arguments():
    order = epoch_order(50, seed=3, epoch=2)
    assert sorted(order.tolist()) == list(range(50))
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert epoch_order(50, seed=3, epoch=2).tolist() == order.tolist()
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])
    others = [list(range(50)), epoch_order(50, 3, 1).tolist(), epoch_order(50, 2, 2).tolist()]
    others.append(epoch_order(50, 2, 3).tolist())  # seed and epoch must not be added up
    assert order.tolist() not in others
    # Golden: a checkpoint resumed with another version of this code or of numpy finds its order.
    assert epoch_order(8, seed=42, epoch=1).tolist() == [1, 2, 5, 3, 6, 0, 4, 7]


def drain(batches):
    return [[each.input_ids.tolist() for each in batch] for batch in batches]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 20])
def test_every_resume_point_gives_the_rest(tokenizer, write, batch_size):
    data = text_data(tokenizer, write, 8 * 8, 8)
    whole = drain(batches(data, batch_size, seed=5, epochs=3))
    per_epoch = batches_per_epoch(len(data), batch_size)
    assert len(whole) == 3 * per_epoch
    for start in range(len(whole) + 2):
        assert drain(batches(data, batch_size, seed=5, start_batch=start, epochs=3)) == whole[start:]
    assert drain(batches(data, batch_size, seed=6, epochs=3)) != whole

    everything = sorted(ids for ids, _ in rows(data))
    epochs = [sum(whole[e * per_epoch : (e + 1) * per_epoch], []) for e in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == [data[int(i)].input_ids.tolist() for i in epoch_order(len(data), 5, 1)]


def test_batches_without_end(tokenizer, write):
    data = text_data(tokenizer, write, 5 * 8, 8)
    endless = batches(data, 2, seed=0, start_batch=4)
    tail = [next(endless) for _ in range(5)]
    assert drain(tail) == drain(batches(data, 2, seed=0, epochs=3))[4:]
    assert [len(batch) for batch in tail] == [2, 1, 2, 2, 1]  # the partial batch of an epoch is kept


def test_order_refuses_nonsense_at_once(tokenizer, write):
    data = text_data(tokenizer, write, 16, 8)
    for arguments, message in (
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"start_batch": -1}, "start_batch must be at least 0.* got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            batches(data, **{"batch_size": 2, "seed": 0, **arguments})
    assert [batches_per_epoch(count, 4) for count in (1, 4, 5, 8)] == [1, 1, 2, 2]
