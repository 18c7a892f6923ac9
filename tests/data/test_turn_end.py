"""Where a chat template ends an answer, for templates of the kinds that models come with; and which rows train it."""

import json

import numpy as np
import pytest
from runs import word_tokenizer

from mebp_triton.data.loading import load_data
from mebp_triton.data.masking import Masking
from mebp_triton.data.packing import pack
from mebp_triton.data.turn_end import TurnEnd, find_turn_end, rows_that_train

TURNS = "{% for message in messages %}"
# Templates as the families have them, of the tokenizer's special tokens; <s> is 1, </s> 2, <end> and <call> are new.
TEMPLATES = {
    "ChatML": TURNS + "{{ message.role }} {{ message.content }} <end>\n{% endfor %}",
    "Llama 2": TURNS + "{% if message.role == 'user' %}<s> {{ message.content }} {% else %}"
    "{{ message.content.strip() }} </s>{% endif %}{% endfor %}",
    "Phi-3": TURNS + "{{ message.content }}<end>\n{% endfor %}</s>",
    "Command": TURNS + "{{ message.content }}<call><end>{% endfor %}",
    "GLM": TURNS + "<{{ 'call' if message.role == 'user' else 'end' }}>{{ message.content }}{% endfor %}",
    "gpt-oss": TURNS + "{{ message.content }}{{ '</s>' if loop.last else '<end>' }}{% endfor %}",
    "plain text": TURNS + "{{ message.content }} ### dog\n{% endfor %}",
    "nothing": TURNS + "{{ message.content }}\n{% endfor %}",
}


@pytest.fixture(scope="module")
def tokenizer():
    made = word_tokenizer()
    made.add_tokens(["<end>", "<call>"])  # not special: some checkpoints add their end so
    return made


def end_of(tokenizer, template):
    tokenizer.chat_template = template
    return find_turn_end(tokenizer)


def test_what_stands_behind_an_answer(tokenizer):
    end, call = tokenizer.convert_tokens_to_ids(["<end>", "<call>"])
    expected = {
        "ChatML": (TurnEnd((end,), "<end>", (end,)), end),
        "Llama 2": (TurnEnd((2,), "</s>", (2, 1)), 2),
        "Phi-3": (TurnEnd((end, 2), "<end>\n</s>", (end,)), 2),
        "Command": (TurnEnd((call, end), "<call><end>", (call, end)), call),
        "GLM": (TurnEnd((), "", (call,)), call),
        "gpt-oss": (TurnEnd((2,), "</s>", (end,)), 2),
        "plain text": (TurnEnd((), "### dog", ()), None),
        "nothing": (TurnEnd((), "", ()), None),
    }
    for name, template in TEMPLATES.items():
        found = end_of(tokenizer, template)
        assert (found, found.stop([2])) == expected[name], name
    # A stop of the model's own goes before the first token of the template.
    assert end_of(tokenizer, TEMPLATES["Command"]).stop([0, end]) == end


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ 1 / 0 }}"])
def test_a_template_that_takes_no_plain_chat(tokenizer, template):
    assert end_of(tokenizer, template) is None


def test_a_template_that_leaves_answers_out(tokenizer):
    with pytest.raises(ValueError, match="writes nothing of what an answer says; give another by --chat-template"):
        end_of(tokenizer, TURNS + "x{% endfor %}")


def test_a_template_of_parts(tokenizer):
    """Models of images take contents as lists alone."""
    part = "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end_of(tokenizer, TURNS + part + "<end>\n{% endfor %}") == TurnEnd((end,), "<end>", (end,))


def test_rows_that_train_a_token(tokenizer, tmp_path, monkeypatch):
    """Counted by whole rows, masked tokens left out; in chunks, and in packed data, it is the same."""
    tokenizer.chat_template = TEMPLATES["ChatML"]
    end = tokenizer.convert_tokens_to_ids("<end>")
    prompt = [{"role": "user", "content": "the cat sees"}]
    long = "one tall tree follows the long road and forgets some water"
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": text}]} for text in ("a", long, "dog")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def count(tokens, **masking):
        data = load_data(tmp_path / "rows.jsonl", tokenizer, 12, masking=Masking(**masking))
        assert rows_that_train(pack(data, 24), tokens) == rows_that_train(data, tokens)
        return rows_that_train(data, tokens)

    assert count([end]) == 2  # the second row is cut before its end
    assert count([end], completion_only_loss=False) == 3  # then its question's end is trained
    assert count([2]) == 0 and count([2, end]) == 2 and count([]) == 0
    tokenizer.chat_template = TEMPLATES["Llama 2"]
    assert count([1], completion_only_loss=False) == 0  # every row begins with it, and nothing predicts that
    tokenizer.chat_template = TEMPLATES["ChatML"]
    monkeypatch.setattr("mebp_triton.data.turn_end.CHECKSUM_CHUNK", np.int64(3))
    assert count([end]) == 2
