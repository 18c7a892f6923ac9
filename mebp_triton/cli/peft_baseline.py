"""The same training by transformers + PEFT, for comparison.

Run in a process of its own, so that its peak memory is its own: ``python -m mebp_triton.cli.peft_baseline SETTINGS``
with the settings of ``train`` as JSON. Data, order, schedule and evaluation are those of ``mebp train``. The rest is
plain autograd with gradient checkpointing, and torch's AdamW.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mebp_triton.data.batching import batches, collate
from mebp_triton.data.loading import load_data
from mebp_triton.huggingface.replace import replace_linears
from mebp_triton.system.memory import peak_resident_bytes
from mebp_triton.training.evaluation import WindowScore, evaluate, plain_score
from mebp_triton.training.optimizers.schedules import learning_rate

# Bases whose bitsandbytes layers are replaced by ours (``replace_linears``); nothing else of this package is used.
REPLACED = "+mebp"
BASES = ("float32", "bfloat16", "nf4-float32", "nf4-bfloat16", f"nf4-float32{REPLACED}", f"nf4-bfloat16{REPLACED}")


def load_base(settings: dict[str, Any]) -> Any:
    """The base model: of a GGUF file, decoded, or of a model directory in one of ``BASES``."""
    import transformers

    base = settings.get("base", "float32")
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    dtype = torch.bfloat16 if "bfloat16" in base else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if "gguf" in settings:
        path = Path(settings["gguf"])
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    if base.startswith("nf4"):
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return transformers.AutoModelForCausalLM.from_pretrained(settings["model"], **options)


def with_adapter(base: Any, settings: dict[str, Any]) -> Any:
    """PEFT's model: LoRA on every linear layer of ``base``, with gradient checkpointing."""
    import peft

    base.config.use_cache = False
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings["seed"])
    model = peft.get_peft_model(base, config)
    return replace_linears(model) if settings.get("base", "").endswith(REPLACED) else model


def score(model: Any, batch: dict[str, torch.Tensor]) -> WindowScore:
    """``plain_score`` for a model that goes on training afterwards."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # On CPUs with AVX512-BF16, bitsandbytes (0.50) takes an evaluation as the beginning of inference for good:
            # it packs the weights for a bfloat16 product that has no gradient, also when training goes on.
            module.train()
    return plain_score(model, batch)


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains and returns the numbers that ``run.json`` has of a run, with the losses and seconds of all steps.

    Args:
        settings: model or gguf, tokenizer, train_file, max_steps, max_length, lora_r, lora_alpha, learning_rate,
            warmup_steps, seed; optionally base (one of ``BASES``), validation_file, max_eval_windows.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["tokenizer"], trust_remote_code=False)
    data = load_data(settings["train_file"], tokenizer, settings["max_length"])
    validation = settings.get("validation_file")
    held_out = load_data(validation, tokenizer, settings["max_length"]) if validation else None
    windows = settings.get("max_eval_windows")
    model = with_adapter(load_base(settings), settings)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings["learning_rate"], weight_decay=0.0)
    before = evaluate(model, held_out, windows, score=score) if held_out is not None else None
    seconds, losses, tokens = [], [], 0
    steps = settings["max_steps"]
    for step, examples in zip(range(steps), batches(data, 1, settings["seed"]), strict=False):
        started = time.perf_counter()
        batch = collate(examples, pad_token_id=0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings["learning_rate"], "linear", settings["warmup_steps"], steps)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += int((batch["labels"][:, 1:] != -100).sum())
        seconds.append(time.perf_counter() - started)
    after = evaluate(model, held_out, windows, score=score) if held_out is not None else None
    return {
        "loss_before": before and before.loss,
        "loss_after": after and after.loss,
        "token_accuracy_before": before and before.token_accuracy,
        "token_accuracy_after": after and after.token_accuracy,
        "train_losses": losses,
        "step_seconds": seconds,
        "seconds_per_step_median": statistics.median(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "peak_rss_bytes": peak_resident_bytes(),
    }


if __name__ == "__main__":
    print(json.dumps(train(json.loads(sys.argv[1]))))
