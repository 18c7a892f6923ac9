"""PTX as text becomes instructions; what is not understood is refused with its line."""

import pytest
from ptx_kernels import kernel_of

from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.emulator.parser import Address, Label, Number, Pair, Register, Special, Symbol, Vector, parse


def last(body):
    """The last instruction before the return, and the kernel."""
    kernel = kernel_of(body)
    return kernel.code[-2], kernel


def test_the_frame_of_a_kernel():
    kernel = kernel_of("")
    assert (kernel.name, kernel.params, kernel.threads) == ("k", [("k_param_0", 8)], 64)
    assert kernel.shared == {"global_smem": 0} and kernel.shared_bytes == 0
    assert kernel.code[-1].name == "ret" and kernel.registers.count("%p0") == 1 and "%rd18" in kernel.registers


def test_operands():
    one, _ = last("ld.global.v4.b32 {%r5, _, %r6, %r7}, [%rd1+-16];")
    vector, address = one.operands
    assert isinstance(vector, Vector) and vector.items[1] is None and vector.items[0].bits == 32
    assert isinstance(address, Address) and isinstance(address.base, Register) and address.offset == -16
    assert one.parts == ["ld", "global", "v4", "b32"]
    texts = {"mov.b32 %r5, 0f3F800000;": Number(0x3F800000), "mov.b32 %r5, -1;": Number(-1)}
    texts |= {"mov.b32 %r5, 0x10U;": Number(16), "mov.b32 %r5, 017;": Number(15), "mov.b32 %r5, 0;": Number(0)}
    texts |= {"mov.u32 %r5, %nctaid.y;": Special("nctaid.y"), "mov.b32 %r5, global_smem;": Symbol("global_smem")}
    for text, wanted in texts.items():
        assert last(text)[0].operands[1] == wanted, text
    assert isinstance(last("setp.le.bf16x2 %p1|%p2, %r1, %r2;")[0].operands[0], Pair)


def test_guards_labels_and_scopes():
    body = "$L1:\n{ .reg .b32 inner; mov.b32 inner, %r1; }\n@!%p3 bra.uni $L1;"
    one, kernel = last(body)
    assert one.guard is not None and one.guard[1] and kernel.registers[one.guard[0].index] == "%p3"
    assert one.operands == [Label("$L1")] and kernel.code[kernel.labels["$L1"]].operands[0].bits == 32
    with pytest.raises(NotModelled, match="inner is not declared|operand not understood|not modelled"):
        kernel_of("{ .reg .b32 %inner; }\nmov.b32 %r1, %inner;")


def test_comments_do_not_move_lines():
    plain, _ = last("\n\nmov.b32 %r5, 1;")
    commented, _ = last("/* two\nlines */ // and\nmov.b32 %r5, /* inside */ 1; // behind\n")
    assert plain.text == commented.text == "mov.b32 %r5, 1" and plain.line == commented.line


def test_source_lines_of_inlined_functions():
    text = """.visible .entry k()
.reqntid 32
{
	.loc	1 12 0                          // a.py:12
	ret;
	.loc	2 7 3, function_name $L__info_string0, inlined_at 1 13 4
	ret;
}
	.file	1 "/somewhere/a.py"
	.file	2 "/somewhere/b.py"
"""
    first, second = parse(text).code
    assert (first.source, second.source) == ("a.py:12", "b.py:7 < a.py:13")
    assert (first.line, second.line) == (5, 7)


@pytest.mark.parametrize(
    "body",
    [
        ".local .align 4 .b8 stack[16];",
        "bra $L9;",
        "mov.b32 %r5, %nothing;",
        "123;",
        ".reg .b7 %x<3>;",
        "mov.b32 %r5, 1.5;",
    ],
)
def test_what_is_not_understood(body):
    with pytest.raises(NotModelled):
        kernel_of(body)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".visible .entry a() { ret; }\n.visible .entry b() { ret; }",
        ".func f() { ret; }\n.visible .entry a() { ret; }",
        ".global .align 4 .b8 x[4];\n.visible .entry a() { .reg .b32 %r<2>; mov.b32 %r1, x; ret; }",
        ".visible .entry a(.param .align 8 .b7 x) { ret; }",
    ],
)
def test_modules_of_other_kinds(text):
    with pytest.raises(NotModelled):
        parse(text)


def test_a_variable_that_no_instruction_reads():
    assert parse(".global .align 1 .b8 _$_str[2] = {95, 0};\n.visible .entry a() { ret; }").name == "a"
