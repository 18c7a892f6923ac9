"""Components are the sizes of real tensors."""

import dataclasses
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES
from plans import SMALL, at, planner

from mebp_triton.models.load import load
from mebp_triton.store.manifest import SHARED
from mebp_triton.store.optimizer_state import Moments
from mebp_triton.store.reader import Store
from mebp_triton.system import machine
from mebp_triton.training.optimizers.adamw import block_groups
from mebp_triton.training.plan import phases
from mebp_triton.training.run_settings import resolve
from mebp_triton.training.settings import TrainConfig

MIB = 1 << 20


@pytest.mark.parametrize(
    ("architecture", "optim"), [*((name, "adamw") for name in ARCHITECTURES), ("llama", "adamw_8bit")]
)
def test_components_are_the_sizes_of_the_models_tensors(shared_store, architecture, optim):
    store = shared_store(architecture)
    opened = Store(store)
    places = dict.fromkeys(("weights", "optimizer_state", "checkpoints"), "device")
    settings = resolve(TrainConfig(**SMALL, **places, optim=optim))
    plan = planner(store, framework=0).predict(settings)
    model = load(store, settings.lora(), checkpoints="device", recompute_granularity="selective")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    components = at(plan, "backward of the lowest block")
    assert components["LoRA"] == components["gradients"] == sum(parameter.nbytes for parameter in trained)
    moments = Moments(block_groups(model, model.mebp.engine), "device", Path("unused"), optim == "adamw_8bit")
    assert components["optimizer state"] == sum(buffer.nbytes for buffer in moments.buffers)
    assert components["weights of blocks"] == sum(
        file.mapped.size for name, file in opened.files.items() if name != SHARED
    )
    assert components["other weights"] == opened.files[SHARED].mapped.size
    floats = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    assert components["float parameters"] >= sum(parameter.nbytes for parameter in floats)
    assert plan.files == {"store": opened.nbytes()}


def test_what_waits_is_what_is_saved(store, plans):
    """Checkpoints and kept outputs, against what the engine gives to its store."""
    settings = resolve(TrainConfig(**SMALL, recompute_granularity="selective"))
    plan = plans.predict(settings)
    model = load(store, settings.lora(), recompute_granularity="selective").train()
    sizes = []
    original = model.mebp.engine.block_inputs.save
    model.mebp.engine.block_inputs.save = lambda tensor: sizes.append(tensor.nbytes) or original(tensor)
    ids = torch.ones(1, settings.max_length, dtype=torch.int64)
    model(input_ids=ids, labels=ids)
    hidden = 4 * settings.max_length * model.config.hidden_size
    blocks = model.config.num_hidden_layers
    assert plan.files["checkpoints"] == blocks * hidden
    assert plan.files["checkpoints"] + plan.files["kept outputs"] == sum(sizes)


def test_weights_in_files_count_one_block(store, plans):
    opened, plan = Store(store), plans.predict(resolve(TrainConfig(**SMALL)))
    largest = max(file.mapped.size for name, file in opened.files.items() if name != SHARED)
    assert at(plan, "backward of the lowest block")["weights of blocks"] == largest
    assert at(plan, "optimizer step")["weights of blocks"] == 0
    assert at(plan, "backward of the lowest block")["optimizer state"] == 0
    group = at(plan, "optimizer step")
    assert group["optimizer state"] == 2 * group["LoRA"] // 3  # of one of three blocks
    assert {one.components["optimizer state"] for one in plan.host} == {0, group["optimizer state"]}


def test_settings_move_the_component_they_are_about(plans):
    def components(phase="backward of the lowest block", **changes):
        return at(plans.predict(resolve(TrainConfig(**SMALL | changes))), phase)

    plain = components()
    assert components(lora_r=8)["LoRA"] == 2 * plain["LoRA"]
    one_third = components(selection_mode="identity", selected_ratio=0.34)
    assert one_third["gradients"] == plain["gradients"] // 3 and one_third["LoRA"] == plain["LoRA"]
    assert components(optimizer_in_backward=True)["gradients"] == plain["gradients"] // 3
    top = "backward of the top block"
    assert components(top)["gradients"] == plain["gradients"] // 3
    assert components(top, gradient_accumulation_steps=2)["gradients"] == plain["gradients"]
    assert components(per_device_train_batch_size=4)["activations"] > 2 * plain["activations"]
    kept = components(top, checkpoints="device", recompute_granularity="selective")
    assert kept["kept outputs"] > kept["checkpoints"] > 0 == plain["checkpoints"]
    assert components(mlp_chunk_tokens=8)["activations"] < plain["activations"]
    assert components(return_freed_memory=True)["allocator"] < plain["allocator"]
    mezo = plans.predict(resolve(TrainConfig(**SMALL, optim="mezo")))
    assert {phase.components["gradients"] for phase in mezo.host} == {0}
    assert "checkpoints" not in mezo.files and mezo.peak < plans.predict(resolve(TrainConfig(**SMALL))).peak


def test_a_device_has_phases_of_its_own(store, monkeypatch):
    """Nothing here runs there: the sizes are those of the tensors."""
    opened = Store(store)
    resolved = resolve(TrainConfig(**SMALL))
    settings = dataclasses.replace(
        resolved, device="cuda", dtype="bfloat16", weights="host", checkpoints="host", optimizer_state="device"
    )
    monkeypatch.setattr(machine, "is_unified", lambda device: False)
    plan = planner(store, framework=7 * MIB).predict(settings)
    assert plan.device and plan.peak == plan.device_peak.total and not plan.shared
    components = at(plan, "backward of the lowest block")
    blocks = [file.mapped.size for name, file in opened.files.items() if name != SHARED]
    assert components["framework"] == phases.product_workspaces(torch.device("cuda"), False) == 64 * MIB
    assert components["checkpoints"] == 2 * 2 * 32 * 48, "two block inputs are on their way"
    assert components["allocator"] == 0
    assert components["weights of blocks"] == 2 * max(blocks)
    assert components["optimizer state"] == 2 * components["LoRA"]
    host = plan.host_peak.components
    assert host["weights of blocks"] == sum(blocks) and host["framework"] == 7 * MIB
    assert host["checkpoints"] == 3 * 2 * 32 * 48
    kept = planner(store, framework=7 * MIB).predict(dataclasses.replace(settings, recompute_granularity="selective"))
    widest = max(info.shape[0] for name, info in opened.matrices.items() if ".layers." in name)
    assert at(kept, "loss")["checkpoints"] == 2 * 2 * 32 * widest > components["checkpoints"]
    moved = planner(store, framework=7 * MIB).predict(dataclasses.replace(settings, optimizer_state="host"))
    assert at(moved, "embedding")["optimizer state"] == 0
    # Of one of three blocks: those that are used, and those that come and go.
    assert at(moved, "optimizer step")["optimizer state"] == 3 * components["optimizer state"] // 3


def test_where_memory_is_shared_the_context_of_cuda_is_part_of_the_peak(plans, monkeypatch):
    settings = dataclasses.replace(resolve(TrainConfig(**SMALL)), device="cuda", dtype="bfloat16")
    found = {}
    for unified in (True, False):
        monkeypatch.setattr(machine, "is_unified", lambda device, unified=unified: unified)
        found[unified] = plans.predict(settings)
    assert found[True].peak == found[False].peak + found[True].host_peak.total + phases.CUDA_CONTEXT
    taken = [found[shared].device_peak.components["framework"] for shared in (True, False)]
    assert taken[0] - taken[1] == phases.CUDA_CONTEXT > 300 * MIB


def test_products_have_a_workspace_for_each_thread_and_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, size in (((8, 7), 8_519_680), ((9, 0), 32 * MIB)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for graphs, count in ((False, 2), (True, 4)):
            assert phases.product_workspaces(torch.device("cuda"), graphs) == count * size


def test_graphs_of_blocks_keep_the_memory_of_a_pass(store, monkeypatch):
    settings = dataclasses.replace(resolve(TrainConfig(**SMALL)), device="cuda", dtype="bfloat16")
    monkeypatch.setattr(machine, "is_unified", lambda device: False)
    plans = planner(store, framework=7 * MIB)
    plain = plans.predict(settings)
    graphs = plans.predict(dataclasses.replace(settings, block_graphs=True))
    more = [a.total - b.total for a, b in zip(graphs.device, plain.device, strict=True)]
    passes = at(plain, "backward of the lowest block")["activations"] - at(plain, "embedding")["activations"]
    lora = at(plain, "backward of the lowest block")["LoRA"] // 3
    assert len(set(more)) == 1 and more[0] >= passes + 3 * lora
    assert graphs.host == plain.host
    mezo = plans.predict(dataclasses.replace(settings, block_graphs=True, optim="mezo"))
    assert at(mezo, "loss")["block graphs"] > 0, "of forward passes"


def test_only_the_last_block_is_adapted(store, plans):
    target = r"model\.layers\.2\..*_proj"
    plan = plans.predict(resolve(TrainConfig(**SMALL, target_modules=target)))
    components = at(plan, "backward of the lowest block")
    model = load(store, plan.settings.lora())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert components["LoRA"] == components["gradients"] == trained


def test_linear_layers_outside_of_blocks_are_resident_and_counted(shared_store):
    store = shared_store("opt", config={"word_embed_proj_dim": 32})
    model = load(store, weights="file")
    outside = [module for name, module in model.named_modules() if name.endswith(("project_in", "project_out"))]
    assert len(outside) == 2
    size = sum(module.int4().nbytes for module in outside)
    plan = planner(store).predict(resolve(TrainConfig(**SMALL)))
    assert at(plan, "optimizer step")["other weights"] == size
    table = model.get_input_embeddings().int4().nbytes
    assert size < table, "the whole file would be more than these"


def test_blocks_below_the_lowest_adapted_one_keep_nothing(store, plans):
    target = r"model\.layers\.2\..*_proj"
    settings = resolve(TrainConfig(**SMALL, target_modules=target, recompute_granularity="full"))
    plan = plans.predict(settings)
    model = load(store, settings.lora()).train()
    sizes = []
    original = model.mebp.engine.block_inputs.save
    model.mebp.engine.block_inputs.save = lambda tensor: sizes.append(tensor.nbytes) or original(tensor)
    ids = torch.ones(1, settings.max_length, dtype=torch.int64)
    model(input_ids=ids, labels=ids)
    assert len(sizes) == 1 and plan.files["checkpoints"] == sizes[0]


def test_rows_that_are_gathered_count_on_the_host(store, plans, monkeypatch):
    settings = dataclasses.replace(resolve(TrainConfig(**SMALL)), device="cuda", dtype="bfloat16", weights="file")
    monkeypatch.setattr(machine, "is_unified", lambda device: False)
    table = Store(store).weight("model.embed_tokens")
    host = plans.predict(settings).host_peak.components
    assert host["other weights"] >= table.nbytes, "a small table comes in whole, by the pages around its rows"
