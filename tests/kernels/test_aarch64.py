"""What the kernels become on AArch64, read as assembly: LLVM writes code for it on any processor."""
from __future__ import annotations

import re

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from edge_runtime.kernels.attention_block import Block
from edge_runtime.kernels.attention_pages import page_step
from edge_runtime.kernels.attention_softmax import Visible
from edge_runtime.kernels.isa import named
from edge_runtime.kernels.kv_record import RecordLayout
from edge_runtime.kernels.matmul_tiles import make_micro
from edge_runtime.kernels.rows import int8_row, norm_row, silu_row
from edge_runtime.kernels.tiles import FORMATS, weight_bias
from edge_runtime.kernels.vector_ir import Emit, i64, micro_kernel

DOTPROD = named("dotprod")


def assembly(kernel, isa=DOTPROD, triple="aarch64-unknown-linux-gnu", features="+neon,+dotprod,+fp-armv8") -> str:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module(name="kernel")
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * kernel.arity), "kernel")
    builder = ir.IRBuilder(function.append_basic_block())
    kernel.body(Emit(builder, isa), *function.args)
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    machine = llvm.Target.from_triple(triple).create_target_machine(features=features, opt=3)
    return machine.emit_assembly(parsed)


def count(text: str, instruction: str) -> int:
    return len(re.findall(rf"^\s+{instruction}\b", text, re.MULTILINE))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_products_use_dot_products(name):
    text = assembly(make_micro(FORMATS[name], 2))
    # 8 steps of 16 rows are 32 registers of sums, for each of two columns; nothing is summed byte by byte.
    assert count(text, "sdot") == 64
    assert count(text, "smull") == count(text, "umull") == count(text, "mla") == 0
    assert weight_bias(DOTPROD) == 0


def test_a_row_kernel_is_vector_code():
    for kernel in (int8_row, norm_row, silu_row):
        text = assembly(kernel)
        assert count(text, "bl") == 0, "a call into a library"
        assert count(text, r"f(mul|mla|add|div)\s+v\d+") or count(text, "fmla") or count(text, "fmul")


def test_attention_uses_dot_products():
    block = Block(RecordLayout("int8", 64), 4)
    step = micro_kernel(lambda e, page, following, state, temp, first, tokens: page_step(
        e, block, page, following, state, temp, Visible("tokens", first, tokens)))
    text = assembly(step)
    assert count(text, "sdot") >= 16
    assert count(text, "bl") == 0


def test_x86_sets_use_their_own_instructions():
    micro = make_micro(FORMATS["Q4_0"], 2)
    x86 = dict(triple="x86_64-unknown-linux-gnu")
    vnni = assembly(micro, named("avx512vnni"), features="+avx512f,+avx512bw,+avx512vl,+avx512vnni,+f16c,+fma", **x86)
    assert count(vnni, "vpdpbusd") == 16
    avxvnni = assembly(micro, named("avxvnni"), features="+avx2,+avxvnni,+f16c,+fma", **x86)
    assert count(avxvnni, r"(\{vex\}\s+)?vpdpbusd") == 32 and "zmm" not in avxvnni
    avx2 = assembly(micro, named("avx2"), features="+avx2,+f16c,+fma", **x86)
    assert count(avx2, "vpmaddubsw") == 32 and "zmm" not in avx2
