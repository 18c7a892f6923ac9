"""What each sub-command of ``mebp`` does. Messages and progress go to standard error, answers to standard output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import adapter, files, siblings
from .allocator import return_free_memory, return_large_freed_memory
from .config import TrainConfig, parse_size, resolve_device
from .convert import QuantizeReport, quantize
from .data import TokenizedData, load_data
from .evaluate import evaluate
from .importers import one_line, open_source
from .kernels.ops import resolve_backend
from .kernels.tables import M_BUCKETS, architecture_of, bucket, load_tables, user_table_path
from .memory import peak_resident_bytes
from .model import load
from .planning.command import describe, planner_of, settings_of
from .planning.command import run_plan as run_plan
from .planning.planner import CannotTrace, Plan
from .report import MIB, RunDirectory
from .skeleton import build_skeleton, int4_sites
from .stores.format import MANIFEST, Store
from .trainer import StepResult, Trainer, finetune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
console = Console(stderr=True)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """Yields ``update(done, total, note="", task=description)``; every task has a bar of its own.

    Nothing is shown before the first update, and nothing stays of a bar that a user's mistake ended.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(*columns, console=console)
    tasks: dict[str, Any] = {}

    def update(done: int, total: int, note: str = "", task: str = description) -> None:
        if task not in tasks:
            bar.start()
            tasks[task] = bar.add_task(task, total=total, note=note)
        bar.update(tasks[task], completed=done, total=total, note=note)

    finish = bar.stop
    try:
        yield update
    except ValueError:
        bar.live.transient = True
        finish = bar.live.stop
        raise
    finally:
        if tasks:
            finish()


def answer(arguments: argparse.Namespace, value: dict[str, Any], table: Table) -> None:
    """The command's result: JSON where asked for, a table otherwise."""
    if arguments.json:
        print(json.dumps(value, indent=2))
    else:
        Console().print(table)


def two_columns(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


# --- quantize -------------------------------------------------------------------------------------------------------


def quantize_with_progress(source: str, store: Path, arguments: argparse.Namespace) -> QuantizeReport:
    with progress_bar("quantizing") as update:
        return quantize(
            source,
            store,
            scheme=arguments.scheme,
            group_size=arguments.group_size,
            scale_search=arguments.scale_search,
            progress=update,
        )


def run_quantize(arguments: argparse.Namespace) -> None:
    report = quantize_with_progress(arguments.source, Path(arguments.store), arguments)
    value = {
        "store": arguments.store,
        "matrices": len(report.errors),
        "taken_over": len(report.taken_over),
        "schemes": sorted(set(report.schemes.values())),
        "int4_bytes": report.int4_bytes,
        "float_bytes": report.float_bytes,
        "relative_error_worst": max(report.errors.values()),
        "relative_error": report.errors,
    }
    table = Table(title=f"{arguments.store}: {report.int4_bytes / MIB:.1f} MiB int4", title_justify="left")
    for heading in ("layer", "matrices", "scheme", "relative error, median", "worst"):
        table.add_column(heading)
    kinds: dict[str, list[str]] = {}
    for name in report.errors:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    for kind, names in kinds.items():
        errors = [report.errors[name] for name in names]
        schemes = ", ".join(sorted({report.schemes[name] for name in names}))
        median = statistics.median(errors)
        table.add_row(kind, str(len(names)), schemes, f"{median:.4f}", f"{max(errors):.4f}")
    answer(arguments, value, table)


# --- train ----------------------------------------------------------------------------------------------------------


def run_train(arguments: argparse.Namespace) -> None:
    settings = _train_config(arguments)
    config = settings.resolved()
    resolve_backend(config.backend, torch.device(config.device or "cpu"))
    checkpoint = Path(arguments.resume_from_checkpoint) if arguments.resume_from_checkpoint else None
    if arguments.resume and checkpoint is not None:
        raise ValueError("--resume and --resume-from-checkpoint are two ways to say the same: give one")
    # A checkpoint of another run goes on in a new directory; that of this run, in its own.
    inside = checkpoint is not None and checkpoint.resolve().is_relative_to(Path(config.output_dir).resolve())
    run = RunDirectory(config.output_dir, resume=arguments.resume or inside)
    if arguments.resume:
        checkpoint = run.checkpoint
        files.recover_directory(checkpoint)
    if checkpoint is not None and not (checkpoint / "state.json").exists():
        if not (arguments.resume and run.metrics.exists()):
            raise ValueError(f"there is no checkpoint in {checkpoint} to resume from")
        console.print(
            f"{run.directory} has no checkpoint yet: starting from the beginning", highlight=False, soft_wrap=True
        )
        run.cut_metrics(0)
        checkpoint = None
    if checkpoint is not None and settings.mlp_chunk_tokens is None:
        # Chunks change the order of sums: the run goes on with those that it, or its plan, began with.
        begun = files.read_json(checkpoint / "state.json")
        chunks = begun.get("config", {}).get("mlp_chunk_tokens") if isinstance(begun, dict) else None
        settings = dataclasses.replace(settings, mlp_chunk_tokens=chunks)
    for name in (config.train_file, config.validation_file):
        if name is not None:
            files.check_regular(Path(name))
    given = Path(arguments.store)
    is_store = _is_store(given, arguments)
    # Where the tokenizer lies there already, the texts are read first: what is wrong with them shows at once.
    texts = _load_texts(given, config) if given.is_dir() else None
    # A model directory is planned for before it is quantized, so that a budget too small shows at once.
    plan = _plan(given, arguments, settings) if given.is_dir() else None
    store = given if is_store else _quantized(given, arguments, config)
    data, validation = texts or _load_texts(store, config)
    if not given.is_dir():
        plan = _plan(store, arguments, settings)
    if plan is not None:
        config = plan.settings
        if config.memory_budget is not None:
            console.print(describe(plan), highlight=False, soft_wrap=True)
    _keep_to(config, plan)
    model = load(
        store,
        config.lora(),
        weights=config.weights or "device",
        checkpoints=config.checkpoints or "device",
        device=config.device or "cpu",
        dtype=DTYPES[config.dtype or "float32"],
        backend=config.backend,
        seed=config.seed,
        scratch_directory=run.directory,
        recompute_granularity=config.recompute_granularity or "full",
        mlp_chunk_tokens=config.mlp_chunk_tokens,
    )
    trainer = Trainer(model, data, config, run)
    trainer.planned_peak_bytes = None if plan is None else plan.peak
    if checkpoint is not None:
        try:
            trainer.resume(checkpoint)
        except ValueError:
            run.discard_if_empty()
            raise
    console.print(f"{config.train_file}: {data.report.describe()}", highlight=False, soft_wrap=True)
    if checkpoint is not None:
        console.print(f"resuming at step {trainer.step} of {trainer.total_steps}", highlight=False)
        if trainer.step == trainer.total_steps and (summary := run.summary()) is not None:
            console.print("nothing is left to do", highlight=False)
            return answer(arguments, summary, two_columns(str(run.directory), _readable(summary)))
    summary = _train_with_progress(trainer, validation)
    answer(arguments, summary, two_columns(str(run.directory), _readable(summary)))


def _train_config(arguments: argparse.Namespace) -> TrainConfig:
    """As set, not resolved."""
    settings = settings_of(arguments)
    for name in ("train_file", "output_dir"):
        if not getattr(settings, name):
            raise ValueError(f"--{name.replace('_', '-')} is missing")
    return settings


def _plan(given: Path, arguments: argparse.Namespace, settings: TrainConfig) -> Plan | None:
    """None, with a line that says so, for a model that cannot be planned for; without a budget it still trains."""
    try:
        return planner_of(given, _model_config(given), arguments.scheme, arguments.group_size).resolve(settings)
    except CannotTrace as error:
        if settings.memory_budget is not None:
            raise
        console.print(f"no peak is predicted: {error}", highlight=False, soft_wrap=True)
        return None


def _keep_to(settings: TrainConfig, plan: Plan | None) -> None:
    """What the settings ask of this process."""
    return_free_memory()  # of the tokenizer and the trace
    if settings.return_freed_memory and not return_large_freed_memory():
        console.print("return_freed_memory needs glibc, and this is another C library: freed memory may be kept")
    device = torch.device(settings.device or "cpu")
    if settings.memory_budget is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        budget = parse_size("memory_budget", settings.memory_budget)
        if plan is not None and plan.shared:
            budget -= plan.host_peak.total
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


def _is_store(given: Path, arguments: argparse.Namespace) -> bool:
    """Whether ``given`` is a store and not a model. ValueError if it is neither, or a store that cannot be used."""
    if not (given / MANIFEST).exists() and not (given.is_dir() and not (given / "config.json").exists()):
        if not given.is_file():  # a GGUF file takes its time to open
            open_source(given)
        return False
    Store(given)
    if arguments.scheme or arguments.group_size:
        raise ValueError(f"--scheme and --group-size are for models that are quantized first; {given} is a store")
    return True


def _load_texts(directory: Path, config: TrainConfig) -> tuple[TokenizedData, TokenizedData | None]:
    """The training and the validation file, tokenized by what lies in ``directory``."""
    tokenizer = load_tokenizer(directory)
    _check_length(directory, config.max_length)
    data = load_data(config.train_file, tokenizer, config.max_length)
    if not config.validation_file:
        return data, None
    return data, load_data(config.validation_file, tokenizer, config.max_length, name="validation-file")


def _quantized(given: Path, arguments: argparse.Namespace, config: TrainConfig) -> Path:
    """A store beside the run, made from the model ``given``, now or by an earlier try."""
    beside = Path(config.output_dir.rstrip("/") + "-store")
    if not (beside / MANIFEST).exists():
        outside = ", outside of the memory budget" if config.memory_budget is not None else ""
        note = f"{given} is not a store: quantizing it into {beside}{outside}"
        console.print(note, highlight=False, soft_wrap=True)
        quantize_with_progress(str(given), beside, arguments)
        return beside
    found, wanted = Store(beside), open_source(given).description
    matrices = found.matrices.values()
    other = found.source != wanted
    other |= arguments.scheme not in (None, *{info.scheme for info in matrices})
    other |= arguments.group_size not in (None, *{info.group_size for info in matrices})
    if other:
        raise ValueError(f"{beside} is a store of {found.source} made with other options: remove it, or train in it")
    console.print(f"{given} was quantized before: using {beside}", highlight=False, soft_wrap=True)
    return beside


def _train_with_progress(trainer: Trainer, validation: Any) -> dict[str, Any]:
    recent: deque[float] = deque(maxlen=10)
    with progress_bar("training") as update:

        def on_step(result: StepResult) -> None:
            recent.append(result.loss)
            note = (
                f"loss {statistics.fmean(recent):.3f}  {result.tokens / max(result.seconds, 1e-9):.0f} tok/s  "
                f"peak {peak_resident_bytes() / MIB:.0f} MiB"
            )
            update(result.step + 1, trainer.total_steps, note)

        def on_evaluation(done: int, total: int) -> None:
            update(done, total, task="evaluating " + ("after" if recent else "before"))

        return finetune(trainer, validation, on_step, on_evaluation)


def _readable(summary: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for name, value in summary.items():
        if value is None:
            continue
        if name.endswith("_bytes"):
            rows[name.removesuffix("_bytes").replace("_", " ")] = f"{value / MIB:.1f} MiB"
        else:
            rows[name.replace("_", " ")] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return rows


# --- eval, generate -------------------------------------------------------------------------------------------------


def load_tokenizer(store: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(store, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{store} has no usable tokenizer: {reason}") from None


def _check_length(store: Path, max_length: int) -> None:
    config = transformers.AutoConfig.from_pretrained(store, trust_remote_code=False).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ValueError(f"max_length {max_length} is longer than the {longest} tokens that the model takes")


def load_for_inference(store: Path, arguments: argparse.Namespace) -> Any:
    """The model with its adapter, weights where inference wants them."""
    device = resolve_device(arguments.device)
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    lora = adapter.read_adapter_config(arguments.adapter) if arguments.adapter else None
    model = load(
        store,
        lora,
        weights="file" if device == "cpu" else "device",
        device=device,
        dtype=DTYPES[dtype],
        backend=arguments.backend,
    )
    if arguments.adapter:
        adapter.load_adapter(model, arguments.adapter)
    return model


def run_eval(arguments: argparse.Namespace) -> None:
    store = Path(arguments.store)
    Store(store)
    files.check_regular(Path(arguments.validation_file))
    if arguments.max_eval_windows is not None and arguments.max_eval_windows < 1:
        raise ValueError(f"--max-eval-windows must be at least 1, got {arguments.max_eval_windows}")
    _check_length(store, arguments.max_length)
    tokenizer = load_tokenizer(store)
    data = load_data(arguments.validation_file, tokenizer, arguments.max_length, name="validation-file")
    model = load_for_inference(store, arguments)
    with progress_bar("evaluating") as update:
        result = evaluate(model, data, arguments.max_eval_windows, update)
    value = dataclasses.asdict(result) | {"perplexity": result.perplexity, "peak_rss_bytes": peak_resident_bytes()}
    answer(arguments, value, two_columns(arguments.validation_file, _readable(value)))


def run_generate(arguments: argparse.Namespace) -> None:
    store = Path(arguments.store)
    Store(store)
    if not arguments.prompt:
        raise ValueError("--prompt is empty")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if not 0 <= arguments.seed < 1 << 63:
        raise ValueError(f"--seed must lie in 0..2**63-1, got {arguments.seed}")
    tokenizer = load_tokenizer(store)
    model = load_for_inference(store, arguments)
    torch.manual_seed(arguments.seed)
    streamer = None if arguments.json else transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    text = generate_text(
        model,
        tokenizer,
        arguments.prompt,
        arguments.max_new_tokens,
        chat=arguments.chat,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        streamer=streamer,
    )
    if arguments.json:
        print(json.dumps({"prompt": arguments.prompt, "completion": text}))


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    chat: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
) -> str:
    """The continuation alone."""
    if not 0 <= temperature <= 100 or 0 < temperature < 1e-3 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be 0 or in [0.001, 100] and top_p in (0, 1], got {temperature} and {top_p}")
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template: generate without --chat")
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    encoded = {name: encoded[name].to(model.mebp.device) for name in ("input_ids", "attention_mask")}
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = encoded["input_ids"].shape[1] + max_new_tokens
    if longest is not None and length > longest:
        raise ValueError(
            f"prompt and new tokens together are {length} tokens, more than the {longest} that the model takes"
        )
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        output = model.generate(
            **encoded, max_new_tokens=max_new_tokens, pad_token_id=pad, streamer=streamer, **sampling
        )
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


# --- tune -----------------------------------------------------------------------------------------------------------


def run_tune(arguments: argparse.Namespace) -> None:
    from .autotune import report
    from .autotune.tune import Results

    architecture = _tuned_architecture(arguments)
    path = Path(arguments.output) if arguments.output else user_table_path(architecture)
    if path.is_dir():
        raise ValueError(f"{path} is a directory: --output names the table's file")
    results = Results(path, architecture, files.write_json)
    if not arguments.report:
        results.check()
    if arguments.plot and (Path(arguments.plot).is_dir() or not Path(arguments.plot).absolute().parent.is_dir()):
        raise ValueError(f"--plot {arguments.plot} names no file in an existing directory")
    problems = _tuned_problems(arguments, architecture)
    tuned = [] if arguments.report else _tune(arguments, problems, results)
    log, table = results.log(), results.table()
    if arguments.report and not arguments.output:
        # As a launch finds them: the shipped ones, and over them the user's own.
        table = load_tables(architecture)
    if problems:
        wanted = {bucket(problem) for problem in problems}
        table = {problem: entry for problem, entry in table.items() if problem in wanted}
    if arguments.report and not table:
        raise ValueError(f"nothing was tuned for {architecture} yet, {path} has no such entry: run `mebp tune` first")
    rows = report.rows(table, log, report.nominal_ceilings(architecture))
    ceilings = report.ceilings_of(rows, log, report.nominal_ceilings(architecture))
    if arguments.plot:
        with files.atomic_path(Path(arguments.plot)) as temporary:
            report.draw(rows, ceilings, f"int4 kernels on {architecture}", temporary)
    value = {
        "architecture": architecture,
        "table": str(path),
        "tuned": len(tuned),
        "ceilings": {name: dataclasses.asdict(ceiling) for name, ceiling in ceilings.items()},
        "rows": [row.to_json() for row in rows],
    }
    shipped = arguments.report and not arguments.output
    answer(arguments, value, _tune_table(f"kernels on {architecture}" if shipped else str(path), rows))


def _tuned_architecture(arguments: argparse.Namespace) -> str:
    """That of --target, or of this machine's device. ValueError for one that cannot be tuned for here."""
    from .autotune.static import SHARED_LIMITS

    here = architecture_of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else ""
    targets = [f"sm_{target}" for target in SHARED_LIMITS]
    if arguments.target is not None and arguments.target not in (*targets, here):
        raise ValueError(f"--target must be one of {', '.join(targets)}, got {arguments.target!r}")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {arguments.limit}")
    if arguments.report and (arguments.offline or arguments.force):
        raise ValueError("--report tunes nothing: leave out --offline and --force")
    if (arguments.offline or arguments.report) and (arguments.target or here):
        return arguments.target or here
    if arguments.offline or arguments.report:
        raise ValueError("there is no CUDA device here: name an architecture, such as --target sm_87")
    if not here:
        raise ValueError("there is no CUDA device here to measure on: use --offline --target sm_87 (or another one)")
    if arguments.target not in (None, here):
        raise ValueError(f"--target is {arguments.target}, and the device here is {here}: add --offline")
    return here


def _tuned_problems(arguments: argparse.Namespace, architecture: str) -> list[Any]:
    """One for every bucket of the layers asked for; none only with --report."""
    from .autotune import shapes
    from .autotune.tune import target_of

    dtype = DTYPES[arguments.dtype or ("bfloat16" if target_of(architecture) >= 80 else "float16")]
    tokens = shapes.parse_tokens(arguments.m) if arguments.m else M_BUCKETS
    kinds = [(arguments.scheme or "symmetric", arguments.group_size or 64)]
    if arguments.shapes:
        pairs = shapes.parse_shapes(arguments.shapes)
    elif arguments.model:
        pairs = shapes.with_groups(_shared_inputs(_model_config(Path(arguments.model))))
    elif arguments.store:
        store = Store(Path(arguments.store))
        pairs = shapes.with_groups(_shared_inputs(_model_config(store.directory)))
        found = {(info.scheme, info.group_size) for info in store.matrices.values()}
        kinds = sorted({(arguments.scheme or scheme, arguments.group_size or size) for scheme, size in found})
    elif arguments.report:
        return []
    else:
        raise ValueError("say what to tune for: --store DIR, --model DIR_OR_CONFIG or --shapes NxK,...")
    return [problem for kind in kinds for problem in shapes.problems(pairs, tokens, *kind, dtype)]


def _model_config(given: Path) -> Any:
    """The config of a model or store directory, or in a config.json. Nothing is fetched, and none of its code runs."""
    path = given / "config.json" if given.is_dir() else given
    files.check_regular(path)
    with one_line(f"{path} is not a usable config", "give a transformers model directory or its config.json"):
        return transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)


def _shared_inputs(config: Any) -> list[list[tuple[int, int]]]:
    """(N, K) of the decoder's linear layers, those that read the same input together."""
    try:
        groups = siblings.shared_inputs(config)
    except ValueError as error:
        console.print(f"{error}; each layer is tuned alone", highlight=False, soft_wrap=True)
        model = build_skeleton(config, torch.float32, "eager")
        groups = [[site] for site in int4_sites(model)[0] if site.role == "linear"]
    return [[(site.out_features, site.in_features) for site in group] for group in groups]


def _tune(arguments: argparse.Namespace, problems: list[Any], results: Any) -> list[Any]:
    from .autotune import tune

    with progress_bar("ranking" if arguments.offline else "measuring") as update:

        def on_compilation(done: int, total: int) -> None:
            update(done, total, task="compiling")

        if arguments.offline:
            rank = tune.model_rank(results.architecture, arguments.limit, on_compilation)
            return tune.tune_offline(problems, results, rank, arguments.force, update)
        machine = tune.Machine.of(torch.device("cuda", torch.cuda.current_device()))
        rank = tune.model_rank(results.architecture, None, on_compilation)
        return tune.tune(problems, machine, results, rank, arguments.limit or tune.LIMIT, arguments.force, update)


def _tune_table(title: str, rows: list[Any]) -> Table:
    predicted = any(row.provenance == "static" for row in rows)
    title += "\n* predicted, and held against the data sheet: nothing was measured" if predicted else ""
    table = Table(title=title, title_justify="left")
    for heading in ("kernel", "M", "N x K", "route", "us", "GB/s (of copy)", "TFLOP/s (of matmul)", "next best"):
        table.add_column(heading, overflow="fold")

    def rate(value: float | None, share: float | None) -> str:
        return "" if value is None else f"{value:.3g}" + ("" if share is None else f" ({share:.0%})")

    for row in rows:
        lost = [f"{loss.route} {loss.slower_by:+.0%}" for loss in row.lost if loss.slower_by is not None]
        table.add_row(
            row.kernel,
            str(row.m),
            f"{row.n}x{row.k}",
            row.route,
            f"{row.time_us:.1f}" + ("*" if row.provenance == "static" else ""),
            rate(row.gb_s, row.of_copy),
            rate(row.tflop_s, row.of_matmul),
            lost[0] if lost else "",
        )
    return table


# --- verify, doctor, demo -------------------------------------------------------------------------------------------


def run_verify(arguments: argparse.Namespace) -> None:
    store = Store(arguments.store)
    with progress_bar("verifying") as update:
        for done, file in enumerate(store.files.values()):
            file.verify(again=True)
            file.mapped.drop()
            update(done + 1, len(store.files))
    value = {"store": arguments.store, "files": len(store.files), "bytes": store.nbytes(), "whole": True}
    rows = {"files": len(store.files), "size": f"{store.nbytes() / MIB:.1f} MiB", "checksums": "all agree"}
    answer(arguments, value, two_columns(arguments.store, rows))


def run_doctor(arguments: argparse.Namespace) -> None:
    from .doctor import examine

    findings = examine(
        Path(arguments.store) if arguments.store else None,
        Path(arguments.scratch_directory) if arguments.scratch_directory else None,
    )
    hidden = ("advice", "scratch_in_memory", "scratch_on_card")
    rows = {
        name: value
        for name, value in findings.items()
        if name not in hidden and not name.endswith(("_bytes", "_bytes_per_second"))
    }
    table = two_columns("this machine", {key.replace("_", " "): value for key, value in rows.items()})
    answer(arguments, findings, table)
    if not arguments.json:
        for line in findings["advice"]:
            Console().print(f"- {line}", highlight=False)


def run_demo(arguments: argparse.Namespace) -> None:
    from .demo import demonstrate

    value, table = demonstrate(Path(arguments.output_dir), arguments.max_steps, arguments.compare, console)
    answer(arguments, value, table)
