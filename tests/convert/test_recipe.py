"""A matrix gets the form that is asked for, and otherwise one that fits what it is."""

import pytest
import torch

from mebp_triton.convert.recipe import TABLE_FORM, Recipe, scale_dtype_of
from mebp_triton.kernels.names import DEFAULT_FORM, DEFAULT_FORMS, FORMS, Form
from mebp_triton.kernels.quantize import quantize_matrix


@pytest.mark.parametrize(
    ("asked", "source", "form"),
    [
        ({}, Form("symmetric", 16, 8), Form("symmetric", 16, 8)),
        ({"scheme": "affine"}, Form("symmetric", 16, 8), Form("affine", 16, 8)),
        ({"group_size": 64}, Form("symmetric", 16, 8), Form("symmetric", 64, 8)),
        # A codebook has 4 bits, and codes of 4 bits have no groups of 16.
        ({"scheme": "codebook"}, Form("symmetric", 16, 8), Form("codebook", 32)),
        ({"bits": 4}, Form("symmetric", 16, 8), DEFAULT_FORM),
        ({"bits": 8}, Form("codebook", 64), DEFAULT_FORMS[8]),
        ({"bits": 8, "scheme": "affine", "group_size": 16}, DEFAULT_FORM, Form("affine", 16, 8)),
        ({"embedding_bits": 4}, DEFAULT_FORM, DEFAULT_FORM),
    ],
)
def test_what_is_asked_for_goes_together_with_the_rest(asked, source, form):
    assert Recipe(**asked).form(source) == form


@pytest.mark.parametrize("form", [form for form in FORMS if form.bits == 4], ids=str)
def test_scales_have_two_levels_where_that_saves_bytes(form):
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    size = {dtype: quantize_matrix(weight, *form[:2], False, dtype)[0].nbytes for dtype in (torch.float16, torch.int8)}
    assert scale_dtype_of(form) == min(size, key=size.__getitem__)  # float16 of two that are as small


def test_embedding_and_head_have_a_width_of_their_own():
    for role in ("embedding", "head"):
        assert Recipe("symmetric", 64, bits=4).form(TABLE_FORM, role) == TABLE_FORM
        assert Recipe("symmetric", 64, embedding_bits=8).form(TABLE_FORM, role) == TABLE_FORM
        assert Recipe("symmetric", 64, embedding_bits=4).form(TABLE_FORM, role) == Form("symmetric", 64)
        assert Recipe("codebook", embedding_bits=4).form(TABLE_FORM, role) == Form("codebook", 32)
        assert Recipe(group_size=16, bits=8, embedding_bits=4).form(TABLE_FORM, role) == DEFAULT_FORM
        assert Recipe("symmetric", 64, bits=4).takes(Form("affine", 32, 8), role), "nothing is asked of it"
        assert not Recipe(embedding_bits=4).takes(TABLE_FORM, role)


def test_codes_that_are_as_asked_for_are_taken_over_and_others_become_what_is_asked_for():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    coded = quantize_matrix(weight, "affine", 32)[0]
    assert Recipe("affine").apply(coded, DEFAULT_FORM) == (coded, 0.0)
    assert Recipe("symmetric").apply(coded, DEFAULT_FORM, "head") == (coded, 0.0)
    anew, error = Recipe("symmetric").apply(coded, DEFAULT_FORM)
    assert anew.form == Form("symmetric", 32) and 0 < error < 0.15
    wide, error = Recipe(embedding_bits=8).apply(coded, TABLE_FORM, "head")
    assert wide.form == TABLE_FORM and 0 < error < 0.01
