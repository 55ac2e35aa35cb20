"""The catalogue against the textbook, on every backend, in every dtype."""

import pytest
from accuracy import BF16, F16, F32, F64, LOWER, ON_BACKENDS, batch, faults, has_kernels, run, run_with
from textbook import CASES
from textbook_ranks import CASES as RANK_CASES

import kdkernels as kd

every_case = pytest.mark.parametrize("case", CASES, ids=str)
DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)]
in_dtypes = pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda d: "+".join(dict.fromkeys(str(x).removeprefix("torch.") for x in d))
)

ROWS = 1024
REGIMES = {
    "V=1": dict(N=ROWS, V=1),
    "V=2": dict(N=ROWS, V=2, scale=3.0),
    "V=3": dict(N=ROWS, V=3, scale=3.0),
    "scale 0.01": dict(N=ROWS, V=48, scale=0.01),
    "scale 1": dict(N=ROWS, V=48),
    "scale 50": dict(N=ROWS, V=48, scale=50.0),
    "offset 300": dict(N=ROWS, V=48, offset=300.0),
    "saturated": dict(N=ROWS, V=33, saturated=60.0),
}
WIDE = {F32: {"V=1000": dict(N=ROWS, V=1000, scale=3.0), "V=50257": dict(N=6, V=50257, scale=4.0)}}
WIDE[F64] = WIDE[BF16] = {"V=1000": dict(N=40, V=1000, scale=3.0), "V=50257": dict(N=2, V=50257, scale=4.0)}


def check(case, backend, dtypes, regimes):
    if not has_kernels(case, "cpu" if backend in LOWER else backend):
        with pytest.raises((kd.BackendUnavailable, TypeError), match=r"no kernels for|float64"):
            run(case, "cpu" if backend in LOWER else backend, batch(2, 5, s_dtype=dtypes[0], t_dtype=dtypes[1]))
        return
    found = []
    for name, regime in regimes.items():
        if regime["V"] < 3 and case.options.get("standardize"):
            continue  # one class has no deviation, and two always the same z-scores
        rows = batch(**regime, s_dtype=dtypes[0], t_dtype=dtypes[1])
        got = run_with(backend, case, regime, *dtypes) if backend in LOWER else run(case, backend, rows)
        found += [f"{name}: {fault}" for fault in faults(case, rows, got)]
    assert not found, "\n".join([f"{case} on {backend}", *found])


def test_every_loss_has_a_textbook_line_and_back():
    by_themselves = {"DISTLoss", "LTKDLoss", "SinkhornLoss", "ULDLoss"}  # in test_ranks, test_longtail, test_separable
    assert {case.name for case in (*CASES, *RANK_CASES)} | by_themselves == set(kd.catalogue())


# The first decorator varies fastest: backends share the textbook's work.
@pytest.mark.parametrize("backend", ["reference", "cpu", *LOWER])
@in_dtypes
@every_case
def test_agrees_with_the_textbook(case, dtypes, backend):
    check(case, backend, dtypes, REGIMES)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@every_case
def test_wide_rows_agree_with_the_textbook(case, dtype):
    backend = "cpu" if has_kernels(case, "cpu") else "reference"
    check(case, backend, (dtype, dtype), WIDE[dtype])


@in_dtypes
@every_case
def test_triton_agrees_with_the_textbook(case, dtypes):
    if dtypes[0] == F64 and has_kernels(case, "triton"):
        return refuses_float64("triton", case)
    check(case, "triton", dtypes, {"small": dict(N=3, V=37, scale=4.0)})


@in_dtypes
@every_case
def test_cuda_agrees_with_the_textbook(case, dtypes):
    """Fewer rows: they are emulated where there is no GPU."""
    if dtypes[0] == F64 and has_kernels(case, "cuda"):
        return refuses_float64("cuda", case)
    check(case, "cuda", dtypes, {name: {**regime, "N": 64} for name, regime in REGIMES.items()})
    check(case, "cuda", dtypes, {"V=1001": dict(N=16, V=1001, scale=3.0), "V=10007": dict(N=2, V=10007, scale=4.0)})


def refuses_float64(backend, case):
    with pytest.raises(TypeError, match="float64"):
        run(case, backend, batch(2, 5))


@pytest.mark.parametrize("case", [c for backend, c in ON_BACKENDS if backend == "triton"], ids=str)
def test_triton_agrees_in_every_regime(case):
    """Few rows: the interpreter is slow."""
    check(case, "triton", (F32, F32), {name: {**regime, "N": 8} for name, regime in REGIMES.items()})
