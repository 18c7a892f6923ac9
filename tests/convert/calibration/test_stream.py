"""A block gets, and hands on, what it does where the whole model runs at once."""

import pytest
import torch
from source_runs import source_run, whole_model


def block_calls(model, blocks, batches):
    """The tensors among the arguments of each block, window by window, as hooks see them."""
    calls, hooks = {}, []
    for index, block in enumerate(blocks):

        def hook(_, args, kwargs, index=index):
            tensors = [*args, *(value for _, value in sorted(kwargs.items()))]
            flat = [part for value in tensors for part in (value if isinstance(value, tuple) else [value])]
            calls.setdefault(index, []).append([part.clone() for part in flat if isinstance(part, torch.Tensor)])

        hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    return calls, hooks


# Layers of two kinds with masks of their own; keys and values shared through a container; a hidden state of four
# dimensions; learnt positions; blocks that give tuples.
@pytest.mark.parametrize("architecture", ["gemma3_text", "gemma4_text", "gemma3n_text", "gpt2", "gpt_neox"])
def test_blocks_are_called_as_by_the_whole_model(architecture, tmp_path):
    run = source_run(tmp_path, architecture)
    ours, _ = block_calls(run.model, run.stream.runner.blocks, run.stream.batches)
    for _ in run.stream.runner.blocks:
        with run.block():
            run.stream.advance()
    model = whole_model(tmp_path)
    theirs, _ = block_calls(model, model.get_submodule(run.path), run.stream.batches)
    with torch.no_grad():
        for batch in run.stream.batches:
            model(**batch, use_cache=False)
    assert len(ours) == len(theirs) == len(run.stream.runner.blocks)
    for index, windows in theirs.items():
        # Hooks are called again while later blocks have their turn.
        for window, (expected, got) in enumerate(zip(windows, ours[index][: len(windows)], strict=True)):
            assert len(expected) == len(got) > 0
            for one, other in zip(expected, got, strict=True):
                torch.testing.assert_close(other, one, msg=f"block {index}, window {window}")


def test_a_pass_through_changes_nothing(tmp_path):
    run = source_run(tmp_path, "llama")
    seen = []
    # Hooks behind a block are not called: its pass ends in it.
    run.stream.runner.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with run.block():
        run.stream.pass_through()
        assert run.stream.next == 0
        run.stream.advance()
    assert run.stream.next == 1
    half = len(seen) // 2
    assert half == len(run.stream.batches) and all(map(torch.equal, seen[:half], seen[half:]))


def test_the_blocks_get_their_own_forward_back(tmp_path):
    run = source_run(tmp_path, "llama")
    run.stream.runner.remove()
    assert all("forward" not in vars(block) for block in run.stream.runner.blocks)
