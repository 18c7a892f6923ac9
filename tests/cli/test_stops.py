"""A model stops where the chats that it was trained on end an answer, and a training that cannot teach it says so."""

import json

import pytest
from commands import answer, assert_refused, train
from models import decoded_model
from runs import WORDS, model_directory, run_store, word_tokenizer

from mebp_triton.cli.stops import find_row_ends, stop_where_rows_end
from mebp_triton.convert.quantize import quantize
from mebp_triton.data.loading import load_data
from mebp_triton.data.masking import Masking
from mebp_triton.models.generation import stop_ids
from mebp_triton.models.load import load

USER = "{% if message.role != 'assistant' %}{{ message.content }} and {% else %}{{ message.content }}"
TEMPLATE = "{% for message in messages %}" + USER + " END {% endif %}{% endfor %}"
CHATS = [
    {"messages": [{"role": "user", "content": "the cat sees"}, {"role": "assistant", "content": text}]}
    for text in ("the moon", "nothing", "a red house and some water")
]
STOP = "generation_config.json"


def words_after(store, text, count=8):
    tokenizer = word_tokenizer()
    ids = tokenizer(text, return_tensors="pt").input_ids
    output = decoded_model(store).generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return output[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A store whose tokenizer ends a turn by a word that its model says without being taught to.

    ``place``: the directory with ``store`` and ``chats.jsonl``; ``before``: what the model says first; ``token``: the
    id of the word, which is a special token and no EOS.
    """
    place = tmp_path_factory.mktemp("chatty")
    sizes = {"vocab_size": len(word_tokenizer()), "seed": 2}  # every id is a word, and the model says several
    said = words_after(run_store(place / "untold", **sizes), "the cat sees and")
    words = word_tokenizer().convert_ids_to_tokens(said)
    at = next(index for index in range(2, len(said)) if words[index] in WORDS and said[index] not in said[:index])
    model_directory(place / "model", **sizes)
    settings = json.loads((place / "model" / STOP).read_text())
    (place / "model" / STOP).write_text(json.dumps(settings | {"repetition_penalty": 1.0}))
    tokenizer = word_tokenizer(TEMPLATE.replace("END", words[at]))
    tokenizer.add_special_tokens({"additional_special_tokens": [words[at]]})
    tokenizer.save_pretrained(place / "model")
    quantize(place / "model", place / "store", group_size=32)
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return place, word_tokenizer().decode(said[:at], skip_special_tokens=True), said[at]


def eos_of(directory):
    return json.loads((directory / STOP).read_text())["eos_token_id"]


def generated(mebp, store, *flags):
    return answer(mebp("generate", store, "--prompt=the cat sees and", "--max-new-tokens=8", "--json", *flags))[
        "completion"
    ]


def test_a_chat_stops_without_a_training(mebp, chatty):
    """With --chat the template tells; without it nothing does."""
    place, before, _ = chatty
    assert len(generated(mebp, place / "store").split()) > len(before.split())
    chat = mebp("generate", place / "store", "--prompt=the cat sees", "--chat", "--max-new-tokens=8")
    assert chat[:2] == (0, before + "\n") and "cut off" not in chat[2]


def test_a_run_says_where_its_model_stops(mebp, world, chatty, tmp_path):
    place, before, token = chatty
    run = tmp_path / "run"
    code, _, err = mebp(
        *train(world, tmp_path, "--learning-rate=1e-9", store=place / "store", train_file=place / "chats.jsonl")
    )
    (line,) = [line for line in err.splitlines() if STOP in line]
    assert code == 0 and line.startswith("3 rows train ") and f"(token {token}) as an end" in line
    assert eos_of(run) == eos_of(run / "adapter") == [2, token]
    adapter = f"--adapter={run / 'adapter'}"
    assert generated(mebp, place / "store", adapter) == before  # without --chat as well

    assert mebp("merge", place / "store", tmp_path / "merged", adapter)[0] == 0
    merged = json.loads((tmp_path / "merged" / STOP).read_text())
    assert merged["eos_token_id"] == [2, token] and merged["repetition_penalty"] == 1.0
    assert mebp("merge", place / "store", tmp_path / "again", adapter, "--as-store")[0] == 0
    assert eos_of(tmp_path / "again") == [2, token]
    assert mebp("verify", tmp_path / "again")[0] == 0
    # Where nothing was trained to stop, the store's own config stays.
    assert mebp("merge", place / "store", tmp_path / "plain")[0] == 0 and eos_of(tmp_path / "plain") == 2


# The template, the rows, further options; and what is said.
UNLEARNT = {
    "a mark that leaves the end out": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %} </s>{% endfor %}",
        CHATS,
        {"assistant_only_loss": True},
        "no row trains </s>, which ends an answer, so the model will not learn to stop: 0 rows are cut",
    ),
    "rows that are cut": (TEMPLATE.replace("END", "</s>"), CHATS, {"length": 4}, ": 3 rows are cut at --max-length"),
    "plain text": (
        TEMPLATE.replace("END", "moon ."),
        CHATS,
        {},
        "ends an answer by the text 'moon .', which is no token",
    ),
    "no end": (TEMPLATE.replace("END", ""), CHATS, {}, "writes nothing behind a last answer: the model will not learn"),
    "the next turn's header": (
        "{% for m in messages %}{{ '<s>' if m.role == 'user' else '<unk>' }} {{ m.content }} {% endfor %}",
        CHATS,
        {},
        "writes nothing behind a last answer; only <s>, which begins the next turn, ends one",
    ),
    "an end that is trained": (TEMPLATE.replace("END", "</s>"), CHATS, {}, None),
    "strings": (TEMPLATE, [{"prompt": "the cat", "completion": " sees"}], {}, None),
    "chats behind other rows": (
        TEMPLATE.replace("END", ""),
        [{"messages": []}, {"text": "the cat sees"}, *CHATS],
        {},
        "writes nothing behind a last answer: the model will not learn",
    ),
    "Alpaca's rows": (
        TEMPLATE.replace("END", ""),
        [{"instruction": "the cat", "output": "sees"}],
        {},
        "writes nothing behind a last answer: the model will not learn",
    ),
}


@pytest.fixture
def lines_of(shared_store, tmp_path):
    """What is said of rows under a tokenizer, and where the model then stops."""

    def said(tokenizer, rows, length=24, **masking):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = load(shared_store())
        data = load_data(tmp_path / "rows.jsonl", tokenizer, length, masking=Masking(**masking))
        lines = list(stop_where_rows_end(model, data, find_row_ends(data, tokenizer)))
        return lines, stop_ids(model)

    return said


@pytest.mark.parametrize("name", UNLEARNT)
def test_what_is_not_learnt_is_said(lines_of, name):
    template, rows, options, part = UNLEARNT[name]
    lines, stops = lines_of(word_tokenizer(template), rows, **options)
    assert stops == [2]
    if part is None:
        assert lines == []
    else:
        (line,) = lines
        assert part in line and "\n" not in line


def test_rows_of_strings_with_the_template_written_out(lines_of):
    """The turn's end is trained there as well, before EOS."""
    tokenizer = word_tokenizer(TEMPLATE.replace("END", "moon"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["moon"]})
    moon = tokenizer.convert_tokens_to_ids("moon")
    (line,), stops = lines_of(tokenizer, [{"text": "the cat sees moon"}, {"text": "a dog"}])
    assert stops == [2, moon] and line.startswith(f"1 rows train moon (token {moon}) as an end")


def test_an_eos_of_the_tokenizer_alone(lines_of):
    """The tokenizer closes rows of strings by its own EOS, which the model may not know."""
    tokenizer = word_tokenizer(None)
    tokenizer.eos_token = "nothing"
    (line,), stops = lines_of(tokenizer, [{"text": "the cat sees"}])
    assert stops == [2, tokenizer.eos_token_id] and "1 rows train nothing" in line
    tokenizer.eos_token = None
    (line,), stops = lines_of(tokenizer, [{"text": "the cat sees"}])
    assert stops == [2] and line.startswith("the tokenizer has no end-of-sequence token")


def test_answers_that_the_template_leaves_out(mebp, world, tmp_path):
    """Refused; the way that the line names is taken."""
    model = model_directory(tmp_path / "model")
    word_tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }} {% endfor %}").save_pretrained(model)
    quantize(model, tmp_path / "store", group_size=32)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    command = train(world, tmp_path, "--max-steps=1", store=tmp_path / "store", train_file=tmp_path / "rows.jsonl")
    assert_refused(mebp, command, ["writes nothing of what an answer says", "--chat-template"], tmp_path)
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("END", "</s>"))
    assert mebp(*command, f"--chat-template={tmp_path / 'other.jinja'}")[0] == 0
