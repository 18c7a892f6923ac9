"""``train --adapter``: a run that starts from an adapter of ours or of PEFT's, and one of those that is resumed."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from commands import QUICK, adapter_bytes, answer, assert_one_line, assert_refused, before_step, record, tell, train
from transformers import AutoModelForCausalLM

from mebp_triton.cli.starting_adapter import doubt, fill_in
from mebp_triton.convert.quantize import quantize
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter import adapter_tensors, load_adapter, read_adapter_config
from mebp_triton.models.adapter_seal import read_adapter_tensors
from mebp_triton.models.load import load
from mebp_triton.store.manifest import BaseModel
from mebp_triton.store.reader import Store
from mebp_triton.training.settings import TrainConfig

HELD_OUT = "--validation-file={}/held-out.txt"
FRESH = [flag for flag in QUICK if "lora-r" not in flag]  # the rank comes from the adapter
SLOW = "--learning-rate=0.002"  # so that a step is one down


def going_on(world, place, *flags, adapter=None, output="more"):
    files = [f"--train-file={world / 'train.txt'}", f"--output-dir={place / output}"]
    return ["train", world / "store", *files, *FRESH, f"--adapter={adapter or world / 'run'}", *flags]


@pytest.fixture(scope="module")
def peft_adapter(world, tmp_path_factory):
    """An adapter that PEFT wrote, with everything that a flag of ``train`` cannot say about a rank."""
    place = tmp_path_factory.mktemp("peft") / "theirs"
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.25,
        target_modules=["q_proj", "v_proj", "up_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"up_proj": 3},
        task_type="CAUSAL_LM",
        init_lora_weights="gaussian",
    )
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(place)
    return place


def test_a_run_starts_where_another_ended_and_says_so(mebp, world, tmp_path):
    """Its loss before training is that after the other's; its optimizer and its schedule are new."""
    value = answer(mebp(*going_on(world, tmp_path, HELD_OUT.format(world), SLOW, "--json")))
    found, first = record(tmp_path / "more"), record(world / "run")
    assert value["loss_before"] == first["loss_after"] and value["loss_after"] < value["loss_before"]
    assert found["settings"]["lora_r"] == 2 and found["steps"] == 3
    start = found["start"]
    assert start["adapter"] == str(world / "run" / "adapter") and start["base_model_name_or_path"]
    again = answer(mebp(*going_on(world, tmp_path, SLOW, "--json", adapter=world / "run" / "adapter", output="again")))
    assert record(tmp_path / "again")["start"] == start and again["steps"] == 3
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "more")


def test_an_adapter_of_pefts_keeps_its_shape(mebp, world, peft_adapter, tmp_path):
    same = ['--rank-pattern={"v_proj":2}', "--target-modules=v_proj,up_proj,q_proj"]  # written in another way
    code, _, err = mebp(*going_on(world, tmp_path, *same, adapter=peft_adapter))
    assert code == 0, err
    ours, theirs = read_adapter_config(tmp_path / "more" / "adapter"), read_adapter_config(peft_adapter)
    tensors, before = read_adapter_tensors(tmp_path / "more" / "adapter"), read_adapter_tensors(peft_adapter)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {k: v.shape for k, v in before.items()}
    for path in {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in before}:
        assert (ours.rank(path), ours.scaling(path)) == (theirs.rank(path), theirs.scaling(path)), path
    assert ours.lora_dropout == 0.25
    trained = [name for name, tensor in before.items() if not torch.equal(tensor, tensors[name])]
    assert trained
    model = load(world / "store", ours)
    load_adapter(model, tmp_path / "more" / "adapter")
    assert adapter_tensors(model).keys() == before.keys()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", exclude_modules=("q_proj",)),
        LoraConfig(target_modules=("q_proj",), rank_pattern={"q": 4}, alpha_pattern={"q": 2.5}),
        LoraConfig(target_modules=r".*\.(q|v)_proj", use_rslora=True, exclude_modules=r".*1.*"),
        LoraConfig(target_modules="q_proj"),  # an expression, which matches that path alone
        LoraConfig(target_modules=("layers.0.q proj", "x+")),
        LoraConfig(target_modules=(), target_parameters=("experts.up_proj", "layers.1.experts.down_proj")),
    ],
)
def test_settings_describe_the_adapter_as_its_config_does(monkeypatch, config):
    monkeypatch.setattr("mebp_triton.cli.starting_adapter.read_adapter_config", lambda directory: config)
    made = TrainConfig(**fill_in({"adapter": "somewhere"})).lora()
    for path in (
        "q_proj",
        "model.layers.0.q_proj",
        "model.layers.1.v_proj",
        "m.layers.0.q proj",
        "m.x+",
        "m.xx",
        "0.experts.up_proj",
    ):
        assert made.targets(path) == config.targets(path), path
        assert made.targets_parameter(path) == config.targets_parameter(path), path
        assert (made.rank(path), made.scaling(path)) == (config.rank(path), config.scaling(path)), path


def test_an_interrupted_run_resumes_without_the_adapter_it_started_from(mebp, world, tmp_path, monkeypatch):
    """The start may be gone; a different one in its place, or another shape, is refused."""
    shutil.copytree(world / "run" / "adapter", tmp_path / "start")
    whole = going_on(world, tmp_path, "--json", "--lora-dropout=0.1", adapter=tmp_path / "start", output="whole")
    assert answer(mebp(*whole))["steps"] == 3
    command = going_on(world, tmp_path, "--json", "--lora-dropout=0.1", adapter=tmp_path / "start")
    with monkeypatch.context() as patch:
        before_step(patch, 1, lambda: tell(15))
        assert mebp(*command)[0] == 143
    without = [part for part in command if not str(part).startswith("--adapter")]
    other = [*without, f"--adapter={tmp_path / 'whole'}", "--resume"]
    assert_refused(mebp, other, ["the run started from", "leave --adapter out to go on"], tmp_path)
    assert_refused(
        mebp, [*without, "--resume", "--lora-r=4"], ["--lora-r 4 contradicts the adapter of the run"], tmp_path
    )
    shutil.rmtree(tmp_path / "start")
    value = answer(mebp(*without, "--resume"))
    assert value["resumed_at_step"] == 2
    assert adapter_bytes(tmp_path / "more") == adapter_bytes(tmp_path / "whole")
    assert record(tmp_path / "more")["start"] == record(tmp_path / "whole")["start"]


def test_a_run_that_cannot_be_made_longer_names_a_way_that_works(mebp, world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    command = [part for part in train(world, tmp_path, "--max-steps=6") if not str(part).startswith("--max-steps=3")]
    result = mebp(*command, "--resume")
    assert_one_line(result, "--max-steps was 3 and now is 6: by the linear schedule, step 1 would have had")
    way = result[2].strip().rpartition("start a new run with ")[2].split()
    files = [f"--train-file={world / 'train.txt'}", f"--output-dir={tmp_path / 'more'}"]
    assert answer(mebp("train", world / "store", *files, *FRESH, *way, "--json"))["steps"] == 3


MISTAKES = {
    "another rank": (["--lora-r=4"], ["--lora-r 4 contradicts the adapter", "which has 2: leave it out"]),
    "other targets": (["--target-modules=q_proj"], ["--target-modules q_proj contradicts the adapter"]),
    "another scaling": (["--use-rslora"], ["--use-rslora True contradicts the adapter"]),
    "no adapter": (["--adapter={}/wide"], ["wide is not an adapter: it has no adapter_config.json"]),
    "another model's": ([], ["does not fit this model"]),
    "a run that did not start so": (["--resume", "--output-dir={}/run"], ["the run did not start from an adapter"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mebp, world, tmp_path, name):
    flags, parts = MISTAKES[name]
    typed = going_on(world, tmp_path, *(flag.format(world) for flag in flags))
    if name == "another model's":
        typed[1] = world / "wide" / "store"
    assert_refused(mebp, typed, parts, world, tmp_path)


@pytest.mark.parametrize("given", ["eval", "generate", "merge"])
def test_a_command_says_that_an_adapter_was_trained_on_other_weights(mebp, world, tmp_path, given):
    """The shapes fit, and the answers would be nonsense without a word."""
    quantize(world / "model", tmp_path / "other", "affine", 32)
    flags = {
        "eval": [HELD_OUT.format(world), "--max-length=24", "--max-eval-windows=1"],
        "generate": ["--prompt=the cat", "--max-new-tokens=1"],
        "merge": [tmp_path / "out"],
    }
    for store, doubted in ((tmp_path / "other", True), (world / "store", False)):
        code, _, err = mebp(given, store, *flags[given], f"--adapter={world / 'run'}")
        assert code == 0 and ("was trained on other weights than this store's" in err) == doubted
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_an_adapter_of_another_base_is_doubted(world, peft_adapter, tmp_path):
    store = Store(world / "store")
    assert doubt(str(world / "run" / "adapter"), store) is None
    other = shutil.copytree(world / "run", tmp_path / "run")
    assert doubt(str(other / "adapter"), Store(world / "wide" / "store")).endswith(
        "of another model, or quantized in another way"
    )
    copied = shutil.copytree(peft_adapter, tmp_path / "theirs")
    for base, fits in (("org/model", True), ("/models/model/", True), ("org/model-Instruct", False), (None, True)):
        config = json.loads((copied / "adapter_config.json").read_text())
        (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        found = doubt(str(copied), store)
        assert (found is None) == fits, base
    assert doubt(str(copied), store) is None
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/Small-1.5"}))
    assert doubt(str(copied), store) is not None
    store.base = BaseModel("org/Small-1.5", "0123abc")  # a directory in the hub's cache has the commit's name
    assert doubt(str(copied), store) is None


def test_a_base_is_known_by_its_checksum_whatever_its_name_is(world, tmp_path):
    lonely = str(shutil.copytree(world / "run" / "adapter", tmp_path / "lonely"))
    store = Store(world / "store")
    store.base = replace(store.base, name_or_path="elsewhere")
    assert doubt(lonely, store) is None
    store.base = replace(store.base, crc32=1)
    assert doubt(lonely, store).endswith(f"and {store.directory} was made of other weights, elsewhere")
