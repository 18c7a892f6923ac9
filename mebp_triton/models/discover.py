"""Runs a model without data to find out which layers read one input, and which MLPs can run by chunks of tokens.

So no architecture is named here: what differs between them is seen in the calls of their own code.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from mebp_triton.blocks.mlp_chunks import chunk_mlp
from mebp_triton.kernels.configs import MOST_MEMBERS
from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.layers.shared_input import SharedInput

from .plain_linear import is_plain_linear
from .skeleton import Int4Site, int4_sites, meta_model, run_on_meta


def shared_inputs(config: Any) -> list[list[Int4Site]]:
    """Groups the decoder's linear layers by parent and input, in the order of their calls.

    The model of ``config`` is run on the meta device, and layers that are handed the same tensor read one input.

    Raises:
        ValueError: the modelling code cannot be run on the meta device.
    """
    model = meta_model(config)
    groups: dict[tuple[int, str], list[Int4Site]] = {}
    inputs = []  # all inputs are kept alive: the id of a freed one could come again

    def watch(site: Int4Site) -> None:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs.append(arguments[0])
            groups.setdefault((id(arguments[0]), site.name.rpartition(".")[0]), []).append(site)

        model.get_submodule(site.name).register_forward_pre_hook(hook)

    for site in int4_sites(model)[0]:
        if site.role == "linear":
            watch(site)
    run_on_meta(model)
    return list(groups.values())


def join_shared_inputs(model: nn.Module, config: Any) -> None:
    """Lets the adapted layers of ``model`` that read one input be computed together.

    ``model`` may lack blocks that the model of ``config`` has.
    """
    try:
        groups = shared_inputs(config)
    except ValueError as error:
        warnings.warn(f"{error}; layers that share an input are computed one by one", stacklevel=4)
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    for sites in groups:
        layers = [modules[site.name] for site in sites if isinstance(modules.get(site.name), Int4LoRALinear)]
        if 1 < len(layers) <= MOST_MEMBERS and len(set(layers)) == len(layers):
            shared = SharedInput(layers)
            for layer in layers:
                layer.shared_input = shared


def unreached_by_text(config: Any, blocks: str, linear: list[str]) -> frozenset[str]:
    """Finds the linear layers that a model never calls when it is given text alone, by path.

    These are the layers outside of the decoder's blocks, in a tower for images say, and whole blocks. Within a block
    that runs, what runs may depend on the tokens, as with experts.

    Args:
        config: the model's config.
        blocks: the path of the block list in the model.
        linear: the layers in question.
    """
    unit_of = {name: _unit(name, blocks) for name in linear}
    if all(unit != name for name, unit in unit_of.items()) and config.get_text_config() is config:
        return frozenset()  # a decoder alone, all of whose layers are in blocks
    model, called = meta_model(config), set[str]()
    for unit in set(unit_of.values()):
        model.get_submodule(unit).register_forward_pre_hook(lambda *_, unit=unit: called.add(unit))
    try:
        run_on_meta(model)
    except ValueError:  # what lies beside the decoder is a tower, in a model that has other inputs than text
        decoder = blocks.rpartition(".")[0]
        whole = config.get_text_config() is config
        called = {unit for unit in unit_of.values() if whole or unit.startswith(f"{decoder}.")}
    return frozenset(name for name, unit in unit_of.items() if unit not in called)


def _unit(name: str, blocks: str) -> str:
    """The block that the layer ``name`` is in, or the layer itself."""
    inside = name.startswith(f"{blocks}.")
    return ".".join(name.split(".")[: blocks.count(".") + 2]) if inside else name


MLP_NAMES = frozenset({"mlp", "ffn", "feed_forward"})


def find_mlps(config: Any, blocks: str) -> list[str]:
    """Finds the MLPs that can run by chunks of tokens, by path.

    Such a module has the name of an MLP and linear layers of its own, but no attention, no experts and no other
    parameters. Its block gives it one tensor, and it returns one of the same shape.

    Args:
        config: the model's config.
        blocks: the path of the block list in the model.

    Raises:
        ValueError: the modelling code cannot be run on the meta device.
    """
    model = meta_model(config)
    fits: dict[str, bool] = {}

    def watch(path: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            fits[path] = fits.get(path, True) and alone and output.shape == args[0].shape

        module.register_forward_hook(hook, with_kwargs=True)

    for path, module in model.get_submodule(blocks).named_modules(prefix=blocks):
        if path.rpartition(".")[2] in MLP_NAMES and _is_mlp(module):
            watch(path, module)
    run_on_meta(model)
    paths = [path for path, fit in fits.items() if fit]
    return [path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths)]


def _is_mlp(module: nn.Module) -> bool:
    inside = list(module.modules())
    linear = [part for part in inside if is_plain_linear(part)]
    others = [part for part in inside if part not in linear]
    if any("attention" in type(part).__name__.lower() or isinstance(part, nn.ModuleList) for part in others):
        return False
    return len(linear) > 1 and not any(part._parameters for part in others)


def install_mlp_chunks(model: Any, stack: nn.ModuleList, tokens: int | None) -> None:
    """Lets the MLPs in the blocks ``stack`` of ``model`` run by chunks of ``tokens``. 0 or None leaves them whole.

    The block engine has to be made after this, since it looks for such MLPs.

    Raises:
        ValueError: ``tokens`` is not a number of tokens.
    """
    if tokens is None or tokens == 0:
        return
    if type(tokens) is not int or tokens < 0:
        raise ValueError(f"mlp_chunk_tokens must be a whole number of tokens, or 0 for whole MLPs, got {tokens!r}")
    blocks = next(path for path, module in model.named_modules() if module is stack)
    name = type(model).__name__
    try:
        paths = find_mlps(model.config, blocks)
    except ValueError as error:
        warnings.warn(f"{error}; its MLPs run whole, mlp_chunk_tokens={tokens} changes nothing", stacklevel=3)
        return
    for path in paths:
        chunk_mlp(model.get_submodule(path), tokens)
    prefixes = [f"{blocks}.{index}." for index in range(len(stack))]
    without = sum(not any(path.startswith(prefix) for path in paths) for prefix in prefixes)
    if without:
        warnings.warn(
            f"{without} of {len(stack)} blocks of {name} have no MLP that can run by chunks of tokens: theirs run "
            f"whole, whatever mlp_chunk_tokens is",
            stacklevel=3,
        )
