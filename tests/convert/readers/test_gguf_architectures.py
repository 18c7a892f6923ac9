"""What llama.cpp computes of a GGUF file, the imported model computes too, or the file is refused.

``bench/gguf_reference.py`` asked llama.cpp; its answers are in ``bench/results/gguf-llama-cpp.json``.
"""

import json

import pytest
import torch
import transformers
from sources import ROOT
from torch.nn.functional import gelu
from transformers import AutoModelForCausalLM

from mebp_triton.convert.readers import open_source

pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_models import IDS, LENGTHS, MODELS, OTHERS, PROMPT, variants, write_variant  # noqa: E402

from mebp_triton.convert.readers.gguf_architectures import ARCHITECTURES  # noqa: E402

REFERENCE = json.loads((ROOT / "bench/results/gguf-llama-cpp.json").read_text())
# llama.cpp chooses between short and long factors by its context, transformers by the text; and llama.cpp says itself
# that it leaves out Phi-3's window.
LONG_TEXT_ONLY = {"longrope", "long factors alone"}
NEEDS_5 = {"qwen2moe", "qwen3moe", "minimax-m2", "phi3", "mistral3", "qwen35", "qwen35moe", "deepseek2"}
NEEDS_5 |= {"granitemoe", "granitehybrid", "gpt-oss", "gemma4", "qwen3next", "lfm2moe"}
# llama.cpp gives the queries and keys of linear attention the epsilon of the norms, and transformers 1e-6.
OTHERWISE = {("phi3", "attention.sliding_window"), ("qwen35", "epsilon"), ("qwen35moe", "epsilon")}
OTHERWISE |= {("qwen3next", "epsilon")}
OLD = {"nemotron"} if transformers.__version__ < "5" else set()  # scales no RoPE of it
# Files that llama.cpp does not open, for reasons that do not concern the function.
READ_ALONE = {
    *(
        ("qwen2moe", "tied"),
        ("stablelm", "tied"),
        ("nemotron", "tied"),
        ("minimax-m2", "tied"),
        ("nemotron", "wide heads"),
        ("gpt-oss", "tied"),
        ("deepseek2", "no key heads"),
    ),
    ("gemma2", "no caps"),
    *((arch, "attention.sliding_window_pattern") for arch in ("gemma2", "gemma3", "gpt-oss")),
}

GEMMA = {"gemma2", "gemma3"}
SLIDING = GEMMA | {"gpt-oss"}
GRANITE = {"granite", "granitemoe", "granitehybrid"}
QWEN35 = {"qwen35", "qwen35moe", "qwen3next"}
# Who reads the files that all others refuse, and who refuses the files that all others read.
READ_BY: dict[str, set[str]] = {name: set() for name in OTHERS} | {
    **dict.fromkeys(("type none", "yarn with betas", "yarn with yarn_attn_factor", "yarn with ext_factor"), set()),
    **dict.fromkeys(("linear with attn_factor", "other factors", "factors and linear", "queries' biases alone"), set()),
    **dict.fromkeys(("longrope beside factors", "longrope without factors", "long factors alone"), set()),
    **dict.fromkeys(("longrope and linear", "output bias", "head norms"), set()),
    **dict.fromkeys(("temperature alone", "version 2 with groups"), set()),
    "half a head": {"phi3", "stablelm", "nemotron", "minimax-m2", "deepseek2"} | QWEN35,
    "a factor tensor": {"llama", "mistral3", "granite"},
    "biases": {"llama", "nemotron"},
    "attention.sliding_window": SLIDING | {"phi3", "gemma4"},
    "attention.sliding_window_pattern": SLIDING,
    **dict.fromkeys(("attention.scale", "logit_scale", "embedding_scale", "residual_scale"), GRANITE),
    "expert_weights_scale": {"deepseek2"},
    "nextn_predict_layers": QWEN35,
    "attn_logit_softcapping": {"gemma2"},
    "final_logit_softcapping": GEMMA | {"gemma4"},
    "expert_weights_norm": {"qwen3moe", "qwen35moe", "qwen3next", "deepseek2"},
    "expert_gating_func": {"minimax-m2", "deepseek2", "lfm2moe"},
    "use_parallel_residual": {"stablelm"},
    "vocab_size": {*MODELS},
    "pooling_type": MODELS.keys() - {"mamba"},
    "tensor_data_layout": MODELS.keys() - {"mamba"},
    "rope.scaling.finetuned": MODELS.keys() - {"bloom", "gpt2", "mamba"},
}
LINEAR = ("linear", "linear by its old key", "a factor without a type")
REFUSED_BY: dict[str, set[str]] = {name: {"phi3", "deepseek2", "gemma4"} | OLD for name in LINEAR} | {
    **dict.fromkeys(("yarn", "yarn of the context"), {"phi3", "gemma4"} | OLD),
    "yarn with attn_factor": {"phi3", "gemma3", "mistral3", "deepseek2", "gemma4"} | OLD,
    "no key heads": {"phi3", "falcon", "lfm2", "lfm2moe", "minimax-m2", "smollm3", "granitehybrid", "gemma4"} | QWEN35,
    "wide heads": {"qwen2", "qwen2moe", "phi3", "starcoder2", "stablelm", "falcon", "lfm2", "minimax-m2", "smollm3"}
    | GRANITE
    | QWEN35
    | {"gpt-oss", "deepseek2", "gemma4", "lfm2moe"},
    "base of sliding layers": {"gemma2", "gpt-oss"},
    "epsilon": {"deepseek2"},
}


def is_refused(arch, name):
    return arch not in READ_BY[name] if name in READ_BY else arch in REFUSED_BY.get(name, ())


def bound(path):
    source = open_source(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    source.bind(model)
    return source


def computed(source) -> list[list[float]]:
    """The log-probabilities of ``IDS`` after each of ``LENGTHS`` tokens."""
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if source.has(name):
                tensor.copy_(source.read(name))
        logits = [model(torch.tensor([PROMPT[:length]])).logits[0, -1] for length in LENGTHS]
    return [values.log_softmax(-1)[list(IDS)].tolist() for values in logits]


class TableOfGelu(torch.nn.Module):
    """GELU as ggml has it, in a table of float16: Gemma 4, whose scores are not scaled, makes its errors large."""

    def forward(self, x):
        return gelu(x.half().float(), approximate="tanh").half().float()


def distance(ours, theirs) -> float:
    return max(abs(a - b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True))


@pytest.mark.filterwarnings("ignore:.*predict further tokens")
@pytest.mark.parametrize("arch", MODELS)
def test_the_model_computes_what_llama_cpp_does_or_its_key_is_refused(arch, tmp_path, monkeypatch):
    """A file whose config and weights are the plain file's is compared by them alone."""
    if arch in NEEDS_5 and transformers.__version__ < "5":
        pytest.skip("transformers 4 has another layout of experts, and no factor of attention for Phi-3")
    if arch == "gemma4":
        monkeypatch.setattr(transformers.activations.GELUTanh, "forward", TableOfGelu.forward)
    wanted = REFERENCE[f"logits {arch}"]
    assert wanted.keys() == variants(arch).keys()
    plain, plain_config, wrong = wanted["plain"], None, {}
    for name, (keys, tensors) in variants(arch).items():
        path = write_variant(tmp_path / "tiny.gguf", arch, name)
        reference = plain if wanted[name] == "plain" else wanted[name]
        try:
            source = bound(path)
            config = source.config.to_dict()
            ours = plain if config == plain_config and not tensors else computed(source)
        except ValueError as error:
            message = str(error)
            changed = [*keys, *tensors, "lacks model.layers"]
            if (
                "\n" in message
                or not is_refused(arch, name)
                or not (reference is None or any(part in message for part in changed))
            ):
                wrong[name] = message
            continue
        if is_refused(arch, name):
            wrong[name] = "not refused"
        plain_config = plain_config or config
        start = 1 if name in LONG_TEXT_ONLY else 0
        if reference is None:
            if (arch, name) not in READ_ALONE:
                wrong[name] = "read"
        elif not distance(ours[start:], reference[start:]) < 1e-3 and (arch, name) not in OTHERWISE:
            wrong[name] = distance(ours, reference)
    assert not wrong


def test_every_architecture_has_its_files():
    assert ARCHITECTURES.keys() == MODELS.keys()
