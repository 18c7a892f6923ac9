"""Errors name the instruction, once it is known."""

from ptx_kernels import instruction

from mebp_triton.autotune.emulator.faults import Fault, NotModelled


def test_a_fault_names_the_instruction_when_the_machine_has_added_it():
    bare = Fault("misaligned", "4 bytes at 2")
    assert (str(bare), bare.instruction) == ("4 bytes at 2", None)
    full = Fault(bare.kind, bare.message, instruction("ld.global.b32"))
    assert str(full) == "misaligned: 4 bytes at 2\n  at line 1 (test.py:1): ld.global.b32"
    assert full.kind == "misaligned" and full.instruction.name == "ld.global.b32"


def test_what_is_not_modelled_is_a_value_error():
    assert issubclass(NotModelled, ValueError) and not issubclass(Fault, ValueError)
