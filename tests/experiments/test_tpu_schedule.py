"""What is read of a TPU kernel's schedule: on a small text, and on kernels whose products are known."""

import importlib.util
from pathlib import Path

import pytest

from experiments.kernels.tpu_schedule import CORES, UNITS, Kernel, compile_kernels, estimate, read_kernel, report
from qwen_jax.errors import InputError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)

# A grid of 8 steps with a guard in which are a branch and a loop, as the compiler writes them; `...` is a bundle of no
# interest. Branches have four delay slots.
_BUNDLES = """
0 LH {%s1 = smov 0}
1 LB > {%s2 = sadd 1 /* a comment } of
two lines */}
2 > {1 = sbr.rel (%p1) target bundleno = 32 (0x20), region = 40  ;;  %s3 = sadd 1}
3-7 > {...}
8 > {2 = sbr.rel (%p2) target bundleno = 15 (0xf), region = 41}
9-12 > {...}
13-14 > {TraceMeStart(masked)}
15 PF > {...}
16 > {3 = sbr.rel (%p3) target bundleno = 31 (0x1f), region = 42}
17-20 > {...}
21-25 LB >> {...}
26 >> {4 = sbr.rel (!%p4) target bundleno = 21 (0x15), region = 43}
27-30 >> {...}
31 PF > {...}
32 PF > {%p5 = scmp.ge.s32.totalorder %s2, 10 /* loop exit test */}
33 > {5 = sbr.rel (!%p5) target bundleno = 1 (0x1), region = 44}
34-37 > {...}
38 {...}
"""
_TOTAL = 39
_SIZES = {"kernel": 2, "grid": 12, "step": 13, "step.0": 2, "step.1": 0, "step.1.0": 10}
_ALLOCATIONS = """
  #allocation1 [shape = 'f32[256,256]{1,0:T(8,128)}', space=vmem, size = 0x40000, scoped, tag = 'scratch operand']
  #allocation2_spill [shape = 'u8[4096]{0}', space=vmem, size = 0x1000, scoped, tag = 'spilled vreg']
  #allocation3 [shape = 'u8[512]{0}', space=smem, size = 0x200, scoped, tag = 'prefetched SMEM operand 0']
"""


def _text() -> str:
    lines = ["LB: loop body", "= control target key end"]
    for line in _BUNDLES.strip().splitlines():
        if not line[0].isdigit():
            lines.append(line)
            continue
        where, _, rest = line.partition(" ")
        first, _, last = where.partition("-")
        label, _, text = rest.partition("{")
        words = label.split()
        kind = next((word for word in words if word.isalpha()), "")
        depth = next((word for word in words if ">" in word), "")
        for i in range(int(first), int(last or first) + 1):
            name = f"0x{i:x}" if i else "0"
            lines.append(f"{name:>6} {kind or '  '}: {depth} {{ {text}".replace("...}", "}"))
    return "\n".join(lines)


def _units(rows: int = _TOTAL) -> str:
    table = "\n".join(" ".join(str((i * j) % 3) for j in range(len(UNITS))) for i in range(rows))
    return f"== CAPACTIY:\n{', '.join(UNITS)}\n 4 3 4 2 1 3 3 1 1 2\n== UTILIZATION:\n{table}\n"


def _kernel(allocations: str = _ALLOCATIONS, scopes: str = "") -> Kernel:
    return read_kernel("toy.1", "v5p", _text(), _units(), allocations, scopes)


def test_regions_share_out_every_bundle_once() -> None:
    kernel = _kernel()
    assert {region.name: region.bundles for region in kernel.regions} == _SIZES
    assert sum(_SIZES.values()) == _TOTAL
    for j in range(len(UNITS)):
        assert sum(region.slots[j] for region in kernel.regions) == sum((i * j) % 3 for i in range(_TOTAL))
    parents = {region.name: region.parent for region in kernel.regions}
    assert parents == {"kernel": "", "grid": "kernel", "step": "grid"} | {
        "step.0": "step",
        "step.1": "step",
        "step.1.0": "step.1",
    }
    assert [region.name for region in kernel.regions if region.kind == "loop"] == ["grid", "step.1.0"]


def test_memory_and_cores() -> None:
    kernel = _kernel()
    assert (kernel.vmem, kernel.vmem_spilled, kernel.cores) == (0x41000, 0x1000, 2)
    assert _kernel("  $region3 (PrimaryCoreRegion): #{toy.1} parent=0 // pred_region").cores == 1


def test_a_region_is_called_by_the_scope_in_it() -> None:
    named = _kernel(scopes=_text())
    assert [region.name for region in named.regions] == ["kernel", "grid", "step", "masked", "step.1", "step.1.0"]
    # Where recording names changed the regions, they can't be matched.
    other = _text().replace("target bundleno = 15 ", "target bundleno = 9 ")
    assert [region.name for region in _kernel(scopes=other).regions] == list(_SIZES)


def test_time_is_bundles_by_executions() -> None:
    kernel = _kernel()
    runs = {"step": 100, "step.0": 7, "step.1": 93, "step.1.0": 1000}
    cycles = 2 * 2 + 12 * (100 + 2 * 2) + 13 * 100 + 2 * 7 + 10 * 1000
    result = estimate(kernel, runs)
    assert result.schedule == pytest.approx(cycles / 2 / CORES["v5p"].clock)
    assert result.assumed == ("kernel", "grid")
    assert sum(result.part(region) for region in kernel.regions) == pytest.approx(1)
    # 2.765 TB/s are a chip's, which both cores share.
    assert estimate(kernel, runs, 2.765e12).seconds == pytest.approx(1)
    assert "| step.0 | 7 | 2 |" in report(result)


def test_trips_of_a_grid_are_known_and_two_of_them_only_fill_the_pipeline() -> None:
    result = estimate(_kernel(), {"step.1.0": 0})
    assert result.executions == {"kernel": 2, "grid": 20, "step": 16, "step.0": 16, "step.1": 16, "step.1.0": 0}


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(InputError, match=r"step\.1\.0 of toy\.1, whose trips are not known"):
        estimate(_kernel(), {})
    with pytest.raises(InputError, match=r"which are kernel, grid, step.*masked"):
        estimate(_kernel(), {"masked": 1})
    with pytest.raises(InputError, match=r"Expected 39 rows of 10 units for toy\.1; got \(38, 10\)"):
        read_kernel("toy.1", "v5p", _text(), _units(_TOTAL - 1), "")


_TOY = """
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def kernel(trips, x, o, acc):
    i = pl.program_id(1)

    @pl.when(i == 0)
    def _():
        with jax.named_scope("init"):
            acc[: x.shape[0]] = jnp.zeros(x.shape)

    def add(_, carry):
        with jax.named_scope("add"):
            acc[: x.shape[0]] += jnp.dot(x[...], x[...], preferred_element_type=jnp.float32)

    jax.lax.fori_loop(0, trips[i], add, None)

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        with jax.named_scope("finish"):
            o[...] = acc[: x.shape[0]].astype(o.dtype)


def build(n, semantics, scratch=0):
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(2, 8),
            in_specs=[pl.BlockSpec((n, n), lambda h, i, trips: (i, 0))],
            out_specs=pl.BlockSpec((n, n), lambda h, i, trips: (h, 0)),
            scratch_shapes=[pltpu.VMEM((n + scratch, n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((2 * n, n), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics, "arbitrary")),
        name="toy",
    )
    return call, [jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((8 * n, n), jnp.bfloat16)]
"""


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "semantics", "cores", "rows"),
    [("v5p:2x2x1", "parallel", 2, 1), ("v5p:2x2x1", "arbitrary", 1, 1), ("v6e:2x2", "parallel", 1, 2)],
)
def test_the_matrix_unit_is_busy_as_long_as_a_product_needs(
    topology: str, semantics: str, cores: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot of the unit is so many rows of a product with a matrix of the unit's size."""
    (tmp_path / "toy_kernel.py").write_text(_TOY)
    monkeypatch.syspath_prepend(tmp_path)
    n = 256
    (kernel,) = compile_kernels("toy_kernel:build", topology, {"n": n, "semantics": semantics}, scopes=True)
    assert kernel.cores == cores
    assert {"init", "add", "finish"} <= {region.name for region in kernel.regions}
    assert kernel.products == ["add"]
    assert kernel["add"].slots[UNITS.index("MXU")] == n**3 / CORES[kernel.chip].mxu_width ** 2 / rows
    assert kernel["add"].kind == "loop"
    assert kernel["grid"].trips == 2 * 8 // cores + 2
    # The scratch, and two windows of the input and of the output.
    assert kernel.vmem - kernel.vmem_spilled >= n * n * (4 + 2 * 2 + 2 * 2)


@needs_libtpu
def test_what_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_kernel.py").write_text(_TOY)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"(?s)toy_kernel:build .* does not compile for v5p:2x2x1: .*vmem"):
        compile_kernels("toy_kernel:build", "v5p:2x2x1", {"n": 256, "semantics": "parallel", "scratch": 2**20})
