"""``mebp generate``: the text that transformers would generate, and what is refused."""

import pytest
import torch
from commands import adapter, answer, assert_refused
from models import decoded_model
from runs import word_tokenizer

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
    code, out, _ = mebp(*command)
    assert code == 0 and out.split() == f"the cat sees {expected('the cat sees')}".split()


def test_a_chat(mebp, command, expected):
    assert answer(mebp(*command, "--chat", "--json"))["completion"] == expected("the cat sees and ")


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
    "no probability": (lambda w, t: [w / "store", "--prompt=a", "--top-p=0"], ["top_p", "0.0"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, name):
    typed, parts = MISTAKES[name]
    assert_refused(mebp, ["generate", *typed(world, tmp_path)], parts, world, tmp_path)
