"""Perplexity and divergence in one pass over the head are those of whole tables of log-probabilities."""

import copy
import math

import pytest
import torch
from models import save_tiny_model
from transformers import AutoModelForCausalLM


@pytest.fixture
def divergence(bench_path):
    import divergence

    return divergence


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 90, (1, 33), generator=generator) for _ in range(5)]


@pytest.fixture
def tiny(tmp_path):
    """A tiny model by its architecture."""
    return lambda name: AutoModelForCausalLM.from_pretrained(save_tiny_model(name, tmp_path / name)).eval()


def whole(source, model, texts, every):
    """By every log-probability in float64."""
    losses, divergences, same = [], [], []
    for ids in texts:
        p, q = (each(ids).logits[0, :-1:every].double().log_softmax(-1) for each in (source, model))
        losses.append(-q.gather(1, ids[0, 1::every, None])[:, 0])
        divergences.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
    loss, kl, top1 = (float(torch.cat(each).mean()) for each in (losses, divergences, same))
    return {"perplexity": math.exp(loss), "kl": kl, "top1": top1}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("changed", ["layers", "head and layers"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_the_figures_are_those_of_whole_tables(divergence, texts, tiny, name, changed, every):
    source = tiny(name)
    model = copy.deepcopy(source)
    for path, parameter in model.named_parameters():
        if "layers." in path or changed != "layers":
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    reference = divergence.Reference(
        texts, every, divergence.hidden_states(source, texts, every), source.get_output_embeddings().weight.clone()
    )
    expected = whole(source, model, texts, every)
    assert reference.compare(model) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected["kl"] > 1e-3
    assert reference.compare(source) == pytest.approx(whole(source, source, texts, every), rel=1e-5, abs=1e-6)


def test_a_head_with_soft_capping_is_refused(divergence, texts, tiny):
    divergence.check_head(tiny("llama"), texts[0])
    with pytest.raises(ValueError, match="after the head"):
        divergence.check_head(tiny("gemma3_text"), texts[0])


def test_windows_begin_with_bos_and_do_not_overlap(divergence):
    class Words:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [int(word) for word in text.split()]}

    found = divergence.windows(Words(), "10 11 12 13 14 15 16", 2, 3)
    assert [each.tolist() for each in found] == [[[1, 10, 11, 12]], [[1, 13, 14, 15]]]
    with pytest.raises(ValueError, match="7 tokens"):
        divergence.windows(Words(), "10 11 12 13 14 15 16", 2, 4)
