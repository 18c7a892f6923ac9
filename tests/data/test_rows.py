"""Rows: what their keys mean, and what of them is trained."""

import json

import pytest
from texts import ANSWER, CHATML, QUESTION, byte_bpe, encode, rows
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mebp_triton.data.chat import Masking
from mebp_triton.data.loading import load_data


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


def test_tokenizer_without_eos_appends_nothing(bare, write):
    lines = [{"text": "The cat"}, {"prompt": "two", "completion": " plus"}]
    (text, _), (pair, labels) = rows(load_data(write("x.jsonl", lines), bare, 99))
    assert text == encode(bare, "The cat") and pair == encode(bare, "two plus")
    assert labels[-1] == pair[-1]
    assert len(load_data(write("x.txt", "The cat sat"), bare, 99)) == 1


def test_chat_template_missing_or_refusing(bare, write):
    for row in ({"messages": QUESTION}, {"prompt": QUESTION, "completion": ANSWER}):
        with pytest.raises(ValueError, match="x.jsonl:1: chat messages, but the tokenizer has no chat template"):
            load_data(write("x.jsonl", [row]), bare, 99)
    strict = byte_bpe("{{ raise_exception('Roles must\nalternate') }}")
    with pytest.raises(ValueError, match=r"x.jsonl:1: the chat template refuses .*\(Roles must alternate\)"):
        load_data(write("x.jsonl", [{"messages": QUESTION}]), strict, 99)


# --- masking --------------------------------------------------------------------------------------------------------

TALK = [{"role": "system", "content": "Be short."}, *QUESTION, *ANSWER, {"role": "user", "content": "And three?"}]
TALK += [{"role": "assistant", "content": "Five."}]
# The same text as CHATML's, with the assistant's turns marked.
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}",
)
ASSISTANT = Masking(assistant_only_loss=True)


def trained_text(tokenizer, labels):
    """What is trained, a stretch after the other."""
    stretches, inside = [], False
    for label in labels:
        if label != -100:
            stretches = [*stretches[:-1], [*stretches[-1], label]] if inside else [*stretches, [label]]
        inside = label != -100
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_a_template_that_closes_the_conversation_with_eos(write):
    """As Phi-3's. The token that closes it is the last turn's."""
    tokenizer = byte_bpe(CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"), eos_token="<|pad|>")
    ((ids, labels),) = rows(load_data(write("x.jsonl", [{"messages": TALK}]), tokenizer, 999, masking=ASSISTANT))
    assert trained_text(tokenizer, labels) == ["four.<|im_end|>\n", "Five.<|im_end|>\n<|pad|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
def test_the_assistants_turns_alone_are_trained(write, template):
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    path = write("x.jsonl", [{"messages": TALK}])
    ((whole, everything),) = rows(load_data(path, tokenizer, 999))
    ((ids, labels),) = rows(load_data(path, tokenizer, 999, masking=ASSISTANT))
    assert ids == whole == everything
    assert trained_text(tokenizer, labels) == ["four.<|im_end|>\n", "Five.<|im_end|>\n"]
    assert [label for label in labels if label != -100] == encode(tokenizer, "four.<|im_end|>\nFive.<|im_end|>\n")


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
@pytest.mark.parametrize(
    "completion_only, stretches",
    [(None, ["Five.<|im_end|>\n"]), (True, ["Five.<|im_end|>\n"]), (False, ["four.<|im_end|>\n", "Five.<|im_end|>\n"])],
)
def test_a_prompts_own_assistant_turns(write, template, completion_only, stretches):
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    path = write("x.jsonl", [{"prompt": TALK[:2] + ANSWER, "completion": TALK[3:]}])
    masking = Masking(completion_only, assistant_only_loss=True)
    ((_, labels),) = rows(load_data(path, tokenizer, 999, masking=masking))
    assert trained_text(tokenizer, labels) == stretches
    ((_, labels),) = rows(load_data(path, tokenizer, 999, masking=Masking(completion_only)))
    text = tokenizer.decode([label for label in labels if label != -100])
    assert text.endswith("Five.<|im_end|>\n") and ("Be short" in text) == (completion_only is False)


@pytest.mark.parametrize("empty", [{"messages": []}, {"conversations": [], "system": "Be short."}])
def test_a_conversation_of_nothing_is_dropped_and_counted(write, empty):
    data = load_data(write("x.jsonl", [empty, {"messages": TALK}]), byte_bpe(), 999)
    assert len(data) == 1 and data.report.dropped_rows == 1


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_message_of_calls_alone_has_an_empty_content_for_the_template(write, content):
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    row = {"messages": [{"role": "assistant", "tool_calls": calls} | content, {"role": "user", "content": "two"}]}
    tokenizer = byte_bpe()
    ((ids, _),) = rows(load_data(write("x.jsonl", [row]), tokenizer, 999))
    whole = "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
    assert ids == encode(tokenizer, whole)


HEADED = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nassistant<|im_end|>\n' }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [CHATML, HEADED, MARKED, CHATML.split("{% if add_gen")[0]], ids=range(4))
def test_an_answer_that_begins_a_conversation_is_trained_without_its_header(write, template):
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    talk = [{"role": "assistant", "content": "four."}, *TALK[1:2], {"role": "assistant", "content": "Five."}]
    ((_, labels),) = rows(load_data(write("x.jsonl", [{"messages": talk}]), tokenizer, 999, masking=ASSISTANT))
    found = trained_text(tokenizer, labels)
    assert found[0] == "four.<|im_end|>\n" and found[1].endswith("Five.<|im_end|>\n") and len(found) == 2


def test_rows_of_strings_begin_as_the_tokenizer_begins_a_text(write):
    core = byte_bpe().backend_tokenizer
    core.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    (pad, end), cat, dog = (2, 1), encode(tokenizer, "the cat"), encode(tokenizer, " sat")
    path = write("x.jsonl", [{"text": "the cat"}, {"prompt": "the cat", "completion": " sat"}])
    first, second = rows(load_data(path, tokenizer, 99))
    assert first == ([pad, *cat, end], [pad, *cat, end])
    assert second == ([pad, *cat, *dog, end], [-100] * (1 + len(cat)) + [*dog, end])


def test_a_template_that_rewrites_earlier_turns_is_an_error_that_names_the_row(write):
    """As Qwen3's: only the last answer has a thought."""
    thinking = CHATML.replace(
        "message['content'] +",
        "('<think>' if loop.last and message.role == 'assistant' else '') + message['content'] +",
    )
    tokenizer = byte_bpe(thinking, eos_token="<|im_end|>")
    with pytest.raises(
        ValueError, match=r"x.jsonl:2: the chat template writes message 3, .*\{% generation %\}"
    ) as error:
        load_data(write("x.jsonl", [{"messages": TALK[:3]}, {"messages": TALK}]), tokenizer, 999, masking=ASSISTANT)
    assert "\n" not in str(error.value)
    ((_, labels),) = rows(load_data(write("x.jsonl", [{"messages": TALK[:3]}]), tokenizer, 999, masking=ASSISTANT))
    assert trained_text(tokenizer, labels) == ["<think>four.<|im_end|>\n"]


def test_a_token_across_the_beginning_of_a_turn_is_cut(write):
    """The header ends in a newline, and so begins the answer: as one text they would be one token."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "/": 3, "//": 4}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Punctuation("contiguous")
    template = "{% for m in messages %}{{ m['role'][0].replace('u', 'b') + '/' + m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}a/{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)
    row = {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "/b"}]}
    assert encode(tokenizer, "a//b") == [1, 4, 2]
    ((ids, labels),) = rows(load_data(write("x.jsonl", [row]), tokenizer, 99, masking=ASSISTANT))
    assert ids == [2, 3, 0, 3, 3, 2]  # "b/ba/" as at inference, and then "/b"
    assert labels == [-100, -100, -100, -100, 3, 2]


def test_completion_only_loss_by_hand(tokenizer, write):
    row = {"prompt": "What is two plus two?", "completion": " four."}
    path = write("x.jsonl", [row])
    ((ids, masked),) = rows(load_data(path, tokenizer, 99, masking=Masking(True)))
    assert rows(load_data(path, tokenizer, 99)) == [(ids, masked)] and -100 in masked
    assert rows(load_data(path, tokenizer, 99, masking=Masking(False))) == [(ids, ids)]


@pytest.mark.parametrize(
    "row, masking, message",
    [
        ({"text": "a"}, Masking(True), "x.jsonl:1: completion_only_loss needs 'prompt' and 'completion', and this is"),
        ({"text": "a"}, ASSISTANT, "x.jsonl:1: assistant_only_loss needs chat messages, and this is text"),
        ({"messages": QUESTION}, Masking(True), "x.jsonl:1: completion_only_loss needs .* this row has messages"),
        ({"prompt": "a", "completion": "b"}, ASSISTANT, "x.jsonl:1: assistant_only_loss needs chat messages"),
    ],
)
def test_a_row_that_cannot_be_masked_as_wanted(tokenizer, write, row, masking, message):
    with pytest.raises(ValueError, match=message):
        load_data(write("x.jsonl", [row]), tokenizer, 99, masking=masking)


def test_text_cannot_be_masked(tokenizer, write):
    for masking in (Masking(True), ASSISTANT):
        with pytest.raises(ValueError, match="x.txt: .* this is text: leave it out"):
            load_data(write("x.txt", "The cat"), tokenizer, 99, masking=masking)


def test_marks_need_a_fast_tokenizer(write, monkeypatch):
    tokenizer = byte_bpe(MARKED, eos_token="<|im_end|>")
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match="x.jsonl:1: .*needs a fast tokenizer"):
        load_data(write("x.jsonl", [{"messages": TALK}]), tokenizer, 99, masking=ASSISTANT)


# --- rows of other projects -----------------------------------------------------------------------------------------


def test_sharegpt_conversations_are_messages(tokenizer, write):
    turns = [("human", TALK[1]), ("gpt", TALK[2]), ("user", TALK[3]), ("assistant", TALK[4])]
    spoken = [{"from": who, "value": message["content"]} for who, message in turns]
    forms = [
        {"conversations": [{"from": "system", "value": "Be short."}, *spoken]},
        {"conversations": spoken, "system": "Be short."},
        {"conversations": TALK},
    ]
    wanted = rows(load_data(write("m.jsonl", [{"messages": TALK}]), tokenizer, 999, masking=ASSISTANT))
    data = load_data(write("x.jsonl", forms), tokenizer, 999, masking=ASSISTANT)
    assert rows(data) == wanted * 3
    assert data.report.converted_rows == 3 and "3 converted" in data.report.describe()


def test_alpaca_rows_are_prompt_and_completion(tokenizer, bare, write):
    lines = [
        {"instruction": "Add.", "input": "two two", "output": "four", "history": []},
        {"instruction": "Add.", "output": "four", "system": None},
        {"instruction": "Add.", "input": "", "output": "four", "system": "Be short."},
    ]
    answer = [{"role": "assistant", "content": "four"}]
    chats = [
        {"prompt": [{"role": "user", "content": "Add.\ntwo two"}], "completion": answer},
        {"prompt": [{"role": "user", "content": "Add."}], "completion": answer},
        {"prompt": [TALK[0], {"role": "user", "content": "Add."}], "completion": answer},
    ]
    path, same = write("x.jsonl", lines), write("y.jsonl", chats)
    assert rows(load_data(path, tokenizer, 999)) == rows(load_data(same, tokenizer, 999))
    assert load_data(path, tokenizer, 999).report.converted_rows == 3
    assert rows(load_data(path, tokenizer, 999, masking=ASSISTANT)) == rows(load_data(path, tokenizer, 999))

    (first, labels), (second, _) = rows(load_data(write("z.jsonl", lines[:2]), bare, 999))
    text = bare.decode(first)
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\ntwo two\n\n### Response:\nfour")
    assert trained_text(bare, labels) == ["four"]
    assert bare.decode(second).endswith("### Instruction:\nAdd.\n\n### Response:\nfour") and "Input" not in bare.decode(
        second
    )


@pytest.mark.parametrize(
    "row, message",
    [
        ({"conversations": {}}, "'conversations' must be a list of turns, got dict"),
        ({"conversations": ["hi"]}, "a turn of 'conversations' must be an object with 'from' and 'value', got str"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "is from 'function_call'; known are human"),
        ({"conversations": [{"from": "human"}]}, "the 'content' of a message of 'messages' must be a string"),
        ({"instruction": "a", "output": 5}, "'output' must be a string, got int 5"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "'history' beside 'instruction' is not supported",
        ),
        ({"messages": QUESTION, "tools": "[{"}, "'tools' is a string that is not JSON"),
    ],
)
def test_broken_rows_of_other_projects(tokenizer, write, row, message):
    with pytest.raises(ValueError, match=f"x.jsonl:1: .*{message}"):
        load_data(write("x.jsonl", [row]), tokenizer, 99)


def test_a_system_without_a_template_is_refused(bare, write):
    with pytest.raises(ValueError, match="x.jsonl:1: 'system' beside 'instruction' needs a chat template"):
        load_data(write("x.jsonl", [{"instruction": "a", "output": "b", "system": "c"}]), bare, 99)


def test_tools_may_be_json_in_a_string(write):
    tokenizer = byte_bpe("{{ tools[0]['name'] if tools else 'none' }} " + CHATML, eos_token="<|im_end|>")
    tools = [{"name": "plus", "parameters": {}}]
    forms = [{"messages": QUESTION, "tools": tools}, {"messages": QUESTION, "tools": json.dumps(tools)}]
    first, second = rows(load_data(write("x.jsonl", forms), tokenizer, 99))
    assert first == second
    assert rows(load_data(write("y.jsonl", [{"messages": QUESTION, "tools": ""}]), tokenizer, 99)) != [first]
