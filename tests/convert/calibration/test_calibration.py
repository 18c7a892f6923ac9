"""A block's inputs are those that the stored blocks below it give, and its rounding changes little of what it gives."""

import pytest
import torch
import transformers
from models import decoded_model, save_tiny_model
from source_runs import random_rows, source_run, whole_model
from transformers import AutoModelForCausalLM

from mebp_triton.convert.calibration import calibration as module
from mebp_triton.convert.calibration.calibration import Calibration
from mebp_triton.convert.calibration.source_run import SourceRun
from mebp_triton.convert.quantize import Recipe, quantize, write_store
from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.kernels.names import FORMS

DATA = random_rows(8, 32)


def layer_inputs(model, names):
    """What linear layers of a whole model read on all rows of ``DATA``, ``[tokens, K]``."""
    seen = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
    with torch.no_grad():
        for row in range(len(DATA)):
            model(input_ids=DATA[row].input_ids[None], use_cache=False)
    return {name: torch.cat(calls) for name, calls in seen.items()}


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt2", "granitemoe"])
def test_inputs_are_those_of_the_whole_model(architecture, tmp_path):
    run = source_run(tmp_path, architecture, DATA)
    calibration = Calibration(run)
    names = [name for name in calibration._leader if name.startswith(run.path) and ".experts." not in name]
    expected = layer_inputs(whole_model(tmp_path), names)
    for index in range(len(run.stream.runner.blocks)):
        with calibration.block():
            for name in names:
                if name.startswith(f"{run.path}.{index}."):
                    rows, found = expected[name].double(), calibration.inputs(name)
                    assert found.tokens == len(rows)
                    torch.testing.assert_close(found.sums.double(), rows.t() @ rows, rtol=1e-4, atol=1e-4)
                else:
                    assert calibration.inputs(name) is None


@pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules in transformers 4")
def test_experts_are_rounded_by_what_their_tokens_are(tmp_path):
    """Less than by plain rounding changes in what the experts of a block give; those without tokens are counted."""
    source = save_tiny_model("qwen3_moe", tmp_path / "model", num_hidden_layers=1, num_experts=8)
    changes = {}
    for name, options in {"plain": {}, "calibrated": {"calibration": lambda _: DATA}}.items():
        report = quantize(source, tmp_path / name, group_size=32, **options)
        exact, rounded = AutoModelForCausalLM.from_pretrained(source), decoded_model(tmp_path / name)
        experts = [model.model.layers[0].mlp.experts for model in (exact, rounded)]
        given = []
        experts[0].register_forward_pre_hook(lambda _, args, given=given: given.append(args))
        with torch.no_grad():
            for row in range(len(DATA)):
                exact(input_ids=DATA[row].input_ids[None], use_cache=False)
            pairs = [[module(*args) for module in experts] for args in list(given)]
        changes[name] = float(sum((ours - truth).square().sum() for truth, ours in pairs))
    assert changes["calibrated"] < 0.8 * changes["plain"]
    names = {name for name in report.forms if ".experts." in name}
    assert len(names) == 16 and names <= {*report.compensated, *report.unseen}
    few = quantize(source, tmp_path / "few", group_size=32, calibration=lambda _: random_rows(1, 3))
    assert len([name for name in few.unseen if ".experts." in name]) >= 2 * 2


def test_layers_with_one_input_share_it(tmp_path):
    calibration = Calibration(source_run(tmp_path, "llama", DATA))
    with calibration.block():
        at = [calibration.inputs(f"model.layers.0.self_attn.{name}_proj") for name in "qkvo"]
        assert at[0] is at[1] is at[2] is not at[3]
        factors = [calibration.columns(f"model.layers.0.self_attn.{name}_proj").factor for name in "qkv"]
        assert factors[0] is factors[1] is factors[2]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_layers_give_changes_less_than_by_plain_rounding(architecture, tmp_path):
    """On the inputs that each layer has in the store, with biases and transposed weights."""
    source = save_tiny_model(architecture, tmp_path / "model")
    made = {}
    for name, options in {"plain": {}, "calibrated": {"calibration": lambda _: DATA}}.items():
        report = quantize(source, tmp_path / name, group_size=32, **options)
        exact, rounded = AutoModelForCausalLM.from_pretrained(source), decoded_model(tmp_path / name)
        names = [name for name, form in report.forms.items() if "layers" in name or ".h." in name]
        total = 0.0
        for layer, x in layer_inputs(decoded_model(tmp_path / name), names).items():
            with torch.no_grad():
                truth = exact.get_submodule(layer)(x)
                change = rounded.get_submodule(layer)(x) - truth
            total += float(change.square().sum() / truth.square().sum())
        made[name] = total, report
    assert made["calibrated"][0] < 0.75 * made["plain"][0]
    assert set(made["calibrated"][1].compensated) == set(names)
    assert not made["calibrated"][1].unseen and not made["calibrated"][1].weighted
    assert not made["plain"][1].compensated


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_can_be_calibrated(form, tmp_path):
    source = save_tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    asked = {"scheme": form.scheme, "group_size": form.group_size, "bits": form.bits}
    report = quantize(source, tmp_path / "store", **asked, calibration=lambda _: DATA)
    assert {report.forms[name] for name in report.compensated} == {form} and len(report.compensated) == 7


def test_products_that_do_not_fit_leave_the_squares(tmp_path):
    """The widest layers of a block go first; the work on one takes twice its size."""
    run = source_run(tmp_path, "llama", DATA)
    size = 4 * 48 * 48
    calibration = Calibration(run, most_bytes=3 * size + 2 * size)
    with calibration.block():
        assert [
            calibration.columns(f"model.layers.0.{name}").factor is not None
            for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
        ] == [True, True, True, False]
        down = calibration.columns("model.layers.0.mlp.down_proj")
        assert down.importance.shape == (80,) and (down.importance > 0).all()


def test_the_report_names_layers_without_products(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 0)
    source = save_tiny_model("llama", tmp_path / "model")
    report = quantize(source, tmp_path / "store", calibration=lambda _: DATA)
    assert len(report.weighted) == 21 and not report.compensated


def test_the_model_that_moves_on_is_the_one_that_is_stored(tmp_path, monkeypatch):
    """The inputs of each block are those of the finished store, on embeddings that are not rounded."""
    seen, original = {}, Calibration.columns

    def columns(self, name):
        seen[name] = self.inputs(name)
        return original(self, name)

    monkeypatch.setattr(Calibration, "columns", columns)
    quantize(save_tiny_model("llama", tmp_path / "model"), tmp_path / "store", calibration=lambda _: DATA)
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(3)]
    model = decoded_model(tmp_path / "store")
    model.set_input_embeddings(AutoModelForCausalLM.from_pretrained(tmp_path / "model").get_input_embeddings())
    for name, rows in layer_inputs(model, names).items():
        rows = rows.double()
        torch.testing.assert_close(seen[name].sums.double(), rows.t() @ rows, rtol=1e-3, atol=1e-3)


def test_codes_that_are_taken_over_need_no_run(shared_store, tmp_path):
    """Nothing is collected for layers that are not rounded."""
    source, made = MergedStore(shared_store("llama")), []

    def follow(directory):
        made.append(Calibration(SourceRun(source, DATA, None, directory)))
        made[0].run.stream.pass_through = None  # a call of it fails
        return made[0]

    report = write_store(source, tmp_path / "again", Recipe(None, None), None, None, lambda *_: None, None, follow)
    assert made and len(report.taken_over) == len(report.errors)
    assert not report.compensated and not report.unseen
