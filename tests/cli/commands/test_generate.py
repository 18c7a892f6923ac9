"""``mebp generate``: the text that transformers would generate, and what is refused."""

import json
import re
import shutil
import signal

import pytest
import torch
from commands import adapter, answer, assert_refused, tell_at_call
from models import decoded_model
from runs import CHAT, word_tokenizer

from mebp_triton.cli.commands.generate import generate
from mebp_triton.cli.streaming import TextStream
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter import save_adapter
from mebp_triton.models.load import load


@pytest.fixture(scope="module")
def expected(world):
    """What transformers makes of a text with the store's decoded weights: six tokens, the likeliest each time."""
    tokenizer, model = word_tokenizer(), decoded_model(world / "store")

    def continuation(text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    return continuation


@pytest.fixture(scope="module")
def command(world):
    return ["generate", world / "store", "--prompt=the cat sees", "--max-new-tokens=6"]


def test_the_likeliest_text(mebp, command, expected):
    assert answer(mebp(*command, "--json")) == {"prompt": "the cat sees", "completion": expected("the cat sees")}
    code, out, err = mebp(*command)
    assert (code, out) == (0, expected("the cat sees") + "\n")  # the answer alone: a script may take it as it is
    assert re.fullmatch(
        r"6 tokens: the first after \d+\.\d\d s, then \d+\.\d tokens/s; cut off at --max-new-tokens\n", err
    )


def test_a_chat(mebp, command, expected):
    assert answer(mebp(*command, "--chat", "--json"))["completion"] == expected("the cat sees and ")
    told = [*command, "--chat", "--system=some water ."]
    assert answer(mebp(*told, "--json"))["completion"] == expected("some water . and the cat sees and ")
    assert mebp(*told)[1] == expected("some water . and the cat sees and ") + "\n"


@pytest.fixture(scope="module")
def wordy(shared_store):
    """A store whose model says nothing but words: "nothing the the house house house" after "the cat sees and"."""
    return shared_store(seed=12, config={"vocab_size": len(word_tokenizer())})


@pytest.fixture(scope="module")
def loaded(wordy):
    return load(wordy), word_tokenizer()


def templated(loaded, template, prompt="the cat sees", **options):
    """What ``generate`` makes of a chat under another template, and the parts that it shows."""
    model, tokenizer = loaded
    tokenizer.chat_template, shown = template, []
    return generate(model, tokenizer, prompt, 6, chat=True, show=shown.append, **options), shown


def test_an_answer_ends_at_the_text_by_which_the_template_ends_turns(loaded):
    whole, _ = templated(loaded, CHAT)
    words = whole.text.split()
    assert not whole.ended and whole.tokens == 6 and len(words) > 2
    turn = "{{ m.content }}{{ ' " + words[-2] + "' if m.role == 'assistant' else ' and ' }}"
    cut, shown = templated(loaded, "{% for m in messages %}" + turn + "{% endfor %}")
    first = whole.text.partition(words[-2])[0]
    assert cut.text == "".join(shown) == first and cut.ended and cut.tokens < 6
    assert "cut off" in whole.describe() and "cut off" not in cut.describe()


def test_a_system_message_is_never_left_out(loaded):
    deaf = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="no place for a system's message: say it in --prompt instead"):
        templated(loaded, deaf, system="a dog")
    assert templated(loaded, deaf, prompt="a dog the cat sees")[0].tokens  # the way that it names
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(ValueError, match="no system.*leave out --system, and say it in --prompt"):
        templated(loaded, refusing, system="a dog")
    assert templated(loaded, refusing)[0].tokens


def test_a_prompt_is_never_left_out(loaded):
    with pytest.raises(ValueError, match="writes nothing of the prompt: generate without --chat"):
        templated(loaded, "{% for m in messages %}the cat {% endfor %}")
    parts = (
        "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }} and {% endfor %}{% endfor %}"
    )
    assert templated(loaded, parts)[0].text == templated(loaded, CHAT)[0].text  # as models of images have it


def test_an_empty_answer_has_a_hint(mebp, world, tmp_path):
    """Models that were trained on chats alone end at once where no turn is opened."""
    store = shutil.copytree(world / "store", tmp_path / "store")
    ids = word_tokenizer()("the cat sees", return_tensors="pt").input_ids
    first = int(decoded_model(store).generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1])
    (store / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    assert mebp("verify", store, "--accept-changes")[0] == 0
    code, out, err = mebp("generate", store, "--prompt=the cat sees", "--max-new-tokens=1")  # it ends just in time
    assert (code, out) == (0, "\n") and err.startswith("1 tokens: the first after ")
    assert "--chat puts the prompt into it" in err and "cut off" not in err
    assert "--chat puts" not in mebp("generate", store, "--prompt=the cat sees", "--chat", "--max-new-tokens=6")[2]


# Settings of a generation config that make several texts, or more than one token at a time; and what is written then.
SEARCHES = [
    {"num_beams": 4},
    {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"num_return_sequences": 2, "do_sample": True},
    {"return_dict_in_generate": True, "output_scores": True},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_early_exit": 1},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "high"},
    {"force_words_ids": [[4]]},
]


@pytest.fixture
def under(loaded, monkeypatch):
    """What ``generate`` makes of "the cat sees and" under settings of the model's own generation config."""
    model, tokenizer = loaded

    def answer(tokens, settings, **options):
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(model.generation_config, name, value, raising=False)
            return generate(model, tokenizer, "the cat sees and", tokens, **options)

    return answer


def test_the_models_own_settings_of_a_search(under):
    expected = under(3, {}).text
    for settings in SEARCHES:
        answer = under(3, settings, temperature=0.001 * ("do_sample" in settings))
        assert answer.text == expected and answer.tokens == 3, settings


def test_the_models_own_stop_strings(under):
    whole = under(6, {}).text
    word = whole.split()[2]
    for strings in (word, ["never said", word]):
        answer = under(6, {"stop_strings": strings})
        assert answer.text == whole.partition(word)[0] and answer.ended and answer.tokens < 6
    answer = under(6, {"max_time": 0.0})
    assert answer.tokens == 1 and "cut off" not in answer.describe()


def test_a_prompt_that_the_locale_cannot_spell(mebp, command):
    assert answer(mebp(*command, "--prompt=the cat sees \udcc3\udca9", "--json"))["prompt"] == "the cat sees é"
    code, out, err = mebp(*command, "--prompt=the cat \udcff")
    assert code == 2 and not out and "--prompt is not UTF-8" in err and err.count("\n") == 1


def test_an_interrupted_text_ends_its_line(mebp, wordy, monkeypatch):
    tell_at_call(monkeypatch, TextStream, "put", signal.SIGINT, at=4)
    code, out, err = mebp("generate", wordy, "--prompt=the cat sees and", "--max-new-tokens=6")
    assert code == 130 and out == "nothing the\n" and err == "mebp: interrupted\n"


def test_samples_depend_on_the_seed_alone(mebp, command):
    sampled = [*command, "--temperature=2", "--top-p=0.95", "--json"]
    first = answer(mebp(*sampled, "--seed=1"))["completion"]
    assert answer(mebp(*sampled, "--seed=1"))["completion"] == first
    assert any(answer(mebp(*sampled, f"--seed={seed}"))["completion"] != first for seed in (2, 3))
    # Of so little probability only the likeliest token is left.
    narrow = [*command, "--temperature=2", "--top-p=0.000001", "--json"]
    assert answer(mebp(*narrow)) == answer(mebp(*command, "--json"))


def test_an_adapter(mebp, world, command, tmp_path):
    plain = answer(mebp(*command, "--json"))["completion"]
    strong = load(world / "store", LoraConfig(r=2), seed=1)
    with torch.no_grad():
        for parameter in (parameter for parameter in strong.parameters() if parameter.requires_grad):
            parameter.normal_(std=0.5)
    save_adapter(strong, tmp_path / "adapter")
    assert answer(mebp(*command, f"--adapter={tmp_path / 'adapter'}", "--json"))["completion"] != plain
    assert isinstance(answer(mebp(*command, adapter(world), "--json"))["completion"], str)


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_text_is_made_of_logits_that_are_not_finite(mebp, world, tmp_path, temperature):
    model = load(world / "store", LoraConfig(r=2))
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.fill_(1e25)  # each is finite
    save_adapter(model, tmp_path / "adapter")
    prompt = ["--prompt=a dog", "--max-new-tokens=3", f"--temperature={temperature}", "--json"]
    code, out, err = mebp("generate", world / "store", f"--adapter={tmp_path / 'adapter'}", *prompt)
    assert code == 1 and not out and "the logits after 2 tokens are not finite" in err and err.count("\n") == 1


MISTAKES = {
    "no store": (lambda w, t: [t / "none", "--prompt=the"], ["none is not a directory"]),
    "no adapter": (lambda w, t: [w / "store", "--prompt=the", f"--adapter={t / 'none'}"], ["is not an adapter"]),
    "an empty prompt": (lambda w, t: [w / "store", "--prompt="], ["--prompt is empty"]),
    "no prompt": (lambda w, t: [w / "store"], ["--prompt"]),
    "no new tokens": (lambda w, t: [w / "store", "--prompt=a", "--max-new-tokens=0"], ["--max-new-tokens", "got 0"]),
    "more tokens than the model takes": (
        lambda w, t: [w / "store", "--prompt=the cat", "--max-new-tokens=63"],
        ["65 tokens", "64"],
    ),
    "a seed too large": (lambda w, t: [w / "store", "--prompt=the", f"--seed={1 << 63}"], ["--seed must lie in"]),
    "a negative temperature": (lambda w, t: [w / "store", "--prompt=a", "--temperature=-1"], ["temperature", "-1.0"]),
    "a temperature near 0": (lambda w, t: [w / "store", "--prompt=a", "--temperature=1e-4"], ["temperature", "0.0001"]),
    "a system's message without a chat": (
        lambda w, t: [w / "store", "--prompt=the", "--system=a"],
        ["--system needs --chat"],
    ),
    "no probability": (lambda w, t: [w / "store", "--prompt=a", "--top-p=0"], ["--top-p must be in", "0.0"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, name):
    typed, parts = MISTAKES[name]
    assert_refused(mebp, ["generate", *typed(world, tmp_path)], parts, world, tmp_path)
