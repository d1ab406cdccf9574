"""Slices that kernels of a compiled program read in place are found where they do not begin at 256 bytes."""

import pytest

from experiments.kernels.operand_starts import kernels_with_slices, slices_off

# Lines of a program that jax 0.11.2 compiled for an H200, shortened: a kernel of columns [start, start + 256) of a row.
STATIC = """
%dynamic-slice-fusion (p0: s32[4,640]) -> s32[256] {{
  %p0 = s32[4,640]{{1,0}} parameter(0), metadata={{scheduling_name="p0"}}
  %slice.0 = s32[1,256]{{1,0}} slice(%p0), slice={{[{row}:{row}], [{start}:640]}}, metadata={{op_name="jit(f)/slice"}}
  %bitcast.5 = s32[256]{{0}} bitcast(%slice.0), metadata={{op_name="jit(f)/slice"}}
  ROOT %mpmd_map.0 = s32[256]{{0}} custom-call(%bitcast.5), custom_call_target="mosaic_gpu_v2"
}}

ENTRY %main.1 (x.1: s32[4,640]) -> s32[256] {{
  %x.1 = s32[4,640]{{1,0}} parameter(0)
  %copied = s32[1,3]{{1,0}} slice(%x.1), slice={{[0:1], [1:4]}}
  ROOT %dynamic_slice_fusion = s32[256]{{0}} fusion(%x.1), kind=kCustom, calls=%dynamic-slice-fusion
}}
"""
DYNAMIC = """
%dynamic-slice-fusion.1 (p0: bf16[4,2,{columns}], p1: s32[], p2: bf16[4,2,{columns}]) -> bf16[4,2,{columns}] {{
  %p0 = bf16[4,2,{columns}]{{2,1,0}} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = bf16[1,2,{columns}]{{2,1,0}} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={{1,2,{columns}}}
  %cast = bf16[2,{columns}]{{1,0}} bitcast(%part)
  %kernel = bf16[1,2,{columns}]{{2,1,0}} custom-call(%cast), custom_call_target="mosaic_gpu_v2"
  %p2 = bf16[4,2,{columns}]{{2,1,0}} parameter(2)
  ROOT %into = bf16[4,2,{columns}]{{2,1,0}} dynamic-update-slice(%p2, %kernel, %p1, %zero, %zero)
}}
"""


@pytest.mark.parametrize(("row", "start"), [(0, 0), (0, 64), (1, 0), (3, 128), (0, 3), (2, 1), (1, 63)])
def test_a_slice_with_constant_starts(row, start):
    found = slices_off(STATIC.format(row=row, start=start))
    offset = 4 * (640 * row + start)
    if offset % 256:
        (line,) = found
        assert f"begins {offset} bytes from the start" in line
    else:
        assert not found
    assert kernels_with_slices(STATIC.format(row=row, start=start)) == 1


@pytest.mark.parametrize("columns", [64, 65, 96, 128])
def test_slices_whose_starts_are_known_when_it_runs(columns):
    """A row of the first axis has 4 x columns bytes: what is read and what is written may begin at each multiple."""
    found = slices_off(DYNAMIC.format(columns=columns))
    assert [f"multiple of {4 * columns} bytes" in line for line in found] == [True] * (2 if 4 * columns % 256 else 0)


def test_a_program_without_kernels_of_slices():
    text = STATIC.format(row=0, start=3).replace("mosaic_gpu_v2", "__cublas$gemm")
    assert (slices_off(text), kernels_with_slices(text)) == ([], 0)
