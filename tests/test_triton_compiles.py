"""Every Triton kernel compiled for real targets, which the interpreter does not do; run as a script it prints a table.

    python tests/test_triton_compiles.py        registers and spilled bytes of each kernel
    python tests/compiled.py                    and has the tests know them until a source changes
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from compiled import ROOT, compiled, key_of

NAME = "Triton"
CAPABILITIES = (80, 90, 100)
ROW = "n s_a s_b t_a t_b args_row B vocab ignore width grad_row weight_row scale_row N K k count room G".split()
KINDS = dict(high="fp32", low="fp32", tau="fp32", mask_ptr="*u8", near="*i8", done_ptr="*i32", cells="*i32")
KINDS |= dict.fromkeys(("total_ptr", "factor_ptr", "floats"), "*fp32")
KINDS |= dict.fromkeys(("label_ptr", "classes_ptr", "sorted_ptr", "order_ptr", "top_ptr", "packed_ptr"), "*i64")
KINDS |= dict.fromkeys(("group_ptr", "start_ptr"), "*i64") | dict(ints="*i32")
KINDS |= dict.fromkeys(("tables", "longs"), "*i64") | dict(also=("*fp64",) * 6 + ("i32", "i32"))


def _signature(kernel, dtype, constants):
    own = dict.fromkeys(("s_ptr", "t_ptr", "to_ptr", "x_ptr"), f"*{dtype}") | KINDS
    wide = "*i64" if "LOWEST" in kernel.arg_names else "*fp64"
    own["out_ptr"] = f"*{dtype}" if "grad_ptr" in kernel.arg_names else wide
    kind = lambda n: "constexpr" if n in constants else "i32" if n in ROW else own.get(n, "*fp64")  # noqa: E731
    return {name: kind(name) for name in kernel.arg_names}


def _rank_variants():
    from kdkernels import DKDLoss, ForwardKLLoss, KDLoss, LogitMSELoss
    from kdkernels.backends.triton import _second, triton_compare
    from kdkernels.backends.triton_groups import group_kernel, group_spread_kernel
    from kdkernels.backends.triton_orders import kendall_kernel, plackett_kernel
    from kdkernels.backends.triton_pearson import pearson_kernel
    from kdkernels.backends.triton_ranks import spearman_kernel
    from kdkernels.backends.triton_sorted import spearman_sorted_kernel, top_kernel
    from kdkernels.backends.triton_tape import compiled as tape
    from kdkernels.backends.triton_uld import uld_kernel

    row = dict(HAS_LABEL=True, HAS_MASK=True, GRADIENT=True)
    some = dict(HAS_TOP=True, **row)
    for dtype in ("bf16", "fp32"):
        by_bits = dtype == "bf16"
        tile = dict(BY_BITS=by_bits, HALF=(False, False)) | (dict(near=None) if by_bits else {})
        tile["BLOCK"], tile["BINS"], warps = triton_compare.tile_of(by_bits, False)
        alone = dict(also=None, POINTS=None, TAPE=None, **tile, **some)
        yield f"spearman {dtype}", spearman_kernel, dtype, alone, warps
        tile["BLOCK"], tile["BINS"], warps = triton_compare.tile_of(by_bits, True)
        for loss in (ForwardKLLoss(), KDLoss(), DKDLoss(), LogitMSELoss()):
            code, K = loss._single.code, int(loss._single.code[0])
            points = (K, 1 << (K - 1).bit_length(), loss._uses.teacher, _second(code))
            own = dict(POINTS=points, TAPE=tape(code.numpy().tobytes()), HAS_TOP=False)
            yield f"together {dtype} {type(loss).__name__}", spearman_kernel, dtype, tile | row | own, warps
    yield "pearson", pearson_kernel, "bf16", dict(PROBS=True, SIDE=0, BLOCK=2048, **row), 8
    for name, kernel, dtype, constants in (
        ("spearman_sorted", spearman_sorted_kernel, "fp32", some),
        ("spearman_sorted", spearman_sorted_kernel, "bf16", dict(near=None, **some)),
        ("top", top_kernel, "bf16", dict(LOWEST=16, HAS_MASK=True)),
        ("plackett", plackett_kernel, "bf16", dict(TEACHER=True, **some)),
        ("kendall", kendall_kernel, "bf16", dict(ALL=True, **some)),
        ("kendall", kendall_kernel, "bf16", dict(ALL=False, **some)),
        ("uld", uld_kernel, "bf16", dict(SIDE=0, **row, HAS_TOP=False)),
    ):
        block, warps = triton_compare.TILES[name]
        yield name, kernel, dtype, dict(BLOCK=block, **constants), warps
    for by_label in (True, False):
        tile = dict(BY_LABEL=by_label, HAS_LABEL=True, HAS_MASK=True)
        yield f"groups by_label={by_label}", group_kernel, "bf16", dict(BLOCK=1024, **tile), 4
        for side in (0, 1):
            wide = dict(SIDE=side, BLOCK=2048, **tile)
            yield f"group spread by_label={by_label} {side}", group_spread_kernel, "bf16", wide, 8


def _variants(capability):
    """(name, kernel, dtype, constants, warps)."""
    from kdkernels import DKDLoss, ForwardKLLoss, JSDLoss, KDLoss, SkewKLLoss
    from kdkernels.backends.triton import _elements, _second
    from kdkernels.backends.triton_buckets import bucket_kernel, bucket_spread_kernel
    from kdkernels.backends.triton_elements import reduce_kernel
    from kdkernels.backends.triton_rows import rows_kernel
    from kdkernels.backends.triton_separable import compiled, sums_kernel
    from kdkernels.backends.triton_slopes import spread_kernel
    from kdkernels.backends.triton_step import begin_kernel, rescale_kernel, step_kernel
    from kdkernels.backends.triton_tape import compiled as tape

    none = dict(PHI=None, SIDE=0)
    some = dict(HAS_TEACHER=True, HAS_LABEL=True, HAS_MASK=False, BLOCK=2048)
    for dtype in ("fp32", "bf16"):
        for align in (16, 1):
            for points, second in ((2, False), (5, False), (4, True)):
                tile = dict(K=points, KP=1 << (points - 1).bit_length(), SECOND=second, ALIGN=align, **some)
                yield f"reduce {dtype} K={points} second={second} align={align}", reduce_kernel, dtype, tile, 8
            yield f"spread {dtype} align={align}", spread_kernel, dtype, dict(ALIGN=align, **none, **some), 8
        for loss in (JSDLoss(), SkewKLLoss()):
            phi, tile = compiled(_elements(loss._single.code).tolist()), dict(ALIGN=16, HAS_MASK=False, BLOCK=1024)
            name = type(loss).__name__
            for whole in (True, False):
                variant = dict(PHI=phi, WHOLE=whole, **tile)
                yield f"sums {dtype} {name} whole={whole}", sums_kernel, dtype, variant, 8 if capability < 90 else 4
            yield f"spread {dtype} {name}", spread_kernel, dtype, dict(PHI=phi, SIDE=0, ALIGN=16, **some), 8
        tile = dict(TAIL=True, LABEL=True, HAS_MASK=True, ALIGN=16, BLOCK=2048)
        yield f"bucket {dtype}", bucket_kernel, dtype, dict(KP=64, **tile), 8
        yield f"bucket spread {dtype}", bucket_spread_kernel, dtype, tile, 4
    # Of a row of its own: the tape, and what depends on it.
    for loss in (ForwardKLLoss(), KDLoss(), DKDLoss(), ForwardKLLoss(standardize=True)):
        code, name = loss._single.code, type(loss).__name__ + " standardized" * loss.standardize
        K, second = int(code[0]), _second(code)
        own = dict(TAPE=tape(code.numpy().tobytes()), K=K)
        tile = dict(**own, KP=1 << (K - 1).bit_length(), SECOND=second, HAS_WEIGHT=True, **some)
        for dtype, align, add in (("fp32", 16, False), ("bf16", 1, True)):
            variant = dict(ALIGN=align, ADD=add, **tile)
            yield f"step {dtype} {name} align={align} add={add}", step_kernel, dtype, variant, 8
        for sides in (1, 2):
            yield f"rows {name} sides={sides}", rows_kernel, "fp64", dict(SIDES=sides, ROWS=32, **own), 1
    for labels in (True, False):
        yield f"begin labels={labels}", begin_kernel, "fp64", dict(HAS_LABEL=labels, BLOCK=1024), 4
    yield "rescale", rescale_kernel, "bf16", dict(BLOCK=2048), 8
    yield from _rank_variants()


def _registers(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills) a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    return int(found[1]), int(found[2]) + int(found[3])


def main(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, kernel, dtype, constants, warps in _variants(capability):
        signature = _signature(kernel, dtype, constants)
        aligned = [n for n in kernel.arg_names if n.endswith("_ptr") or n in ROW[1:5]]
        aligned = aligned if constants.get("ALIGN") == 16 else []
        attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps))
        registers, spilled = _registers(built.asm["cubin"])
        print(f"sm_{capability} {name}: {registers} registers, {spilled} bytes spilled", flush=True)


def key() -> str:
    import triton

    of_losses = [ROOT / f"kdkernels/{x}.py" for x in ("tape", "elements", "separable", "logpartition", "loss", "ops")]
    return key_of([*ROOT.glob("kdkernels/backends/triton*.py"), *of_losses, Path(__file__)], triton.__version__)


def table(capability: int) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, str(capability)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spills(capability):
    lines = compiled(f"{NAME} {capability}", key(), lambda: table(capability))
    assert len(lines) == len(list(_variants(capability)))
    assert all(line.endswith(" 0 bytes spilled") for line in lines), lines


if __name__ == "__main__":
    for target in sys.argv[1:] or CAPABILITIES:
        main(int(target))
