"""The emulator that runs CUDA kernels on the CPU: right kernels pass in every order of threads, planted bugs do not."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "emulator"
SEEDS = range(16)
RIGHT, WRONG, EXCEPTION = range(3)
# What is said about a bug; None where it is enough that the result of some order of threads is wrong, or says so.
BUGS = {
    "block sum": {
        "missing barrier": None,
        "missing second barrier": None,
        "divergent barrier": "sync.. at line .*, others at",
        "two places": "sync.. at line .*, others at",
        "thread left early": "has ended|ends while others wait in sync",
        "lane without shuffle": "deadlock: 31 threads wait in .*shuffle",
        "write beyond the end": "beyond the end of its shared memory",
        "unaligned load": "load16.*not aligned",
        "load of shared memory": "shared memory where global memory",
    },
    "all-reduce": {
        "missing cluster barrier": None,
        "not started": "may not have started",
        "already ended": None,
        "no such rank": "no block of this rank",
        "remote out of bounds": "not within the shared memory",
    },
    "histogram": {
        "not cleared": None,
        "global add": "add_global.*shared memory where global memory",
        "add out of bounds": "add_shared.*not within the shared memory",
        "counts not awaited": None,
        "load of no rank": "load_remote.*no block of this rank",
        "leaves early": "load_remote.*other block has ended|deadlock|waits in",
    },
    "pipeline": {
        "missing wait": None,
        "wrong parity": None,
        "stage still read": None,
        "expects too little": "more bytes arrive",
        "expects too much": "deadlock: 64 threads wait in barrier_wait",
        "unaligned copy": "bulk_copy.*not aligned",
        "odd size": "not a multiple of 16",
        "copy out of bounds": "not within the shared memory",
        "uninitialised mbarrier": "not initialised",
        "init without barrier": "not initialised",
        "copies in flight": "before its bulk copies have landed",
    },
}


# Both ways of changing stacks; on most processors they are one.
@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def library(request, tmp_path_factory):
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulator is for Linux")
    built = tmp_path_factory.mktemp("emulator") / f"{request.param}.so"
    switch = ["-DKD_EMULATOR_UCONTEXT"] if request.param == "ucontext" else []
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-x", "c++", "-O1", "-fPIC", "-shared", *switch,
               f"-I{HERE}", str(HERE / "selftest.cu"), "-o", str(built)]  # fmt: skip
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(built))
    library.narrowed.argtypes = [ctypes.c_float, ctypes.c_int]
    library.widened.restype = ctypes.c_float
    return library


def outcome(library, kernel, bug, seed):
    ctypes.c_int.in_dll(library, "kd_emulator_seed").value = seed
    message = (ctypes.c_char * 512).in_dll(library, "kd_emulator_error")
    message.value = b""
    return library.selftest(kernel.encode(), bug.encode()), message.value.decode()


@pytest.mark.parametrize("kernel", BUGS)
def test_right_kernels_pass(library, kernel):
    for seed in SEEDS:
        assert outcome(library, kernel, "", seed) == (RIGHT, ""), seed


@pytest.mark.parametrize(("kernel", "bug"), [(kernel, bug) for kernel in BUGS for bug in BUGS[kernel]])
def test_planted_bugs_are_caught(library, kernel, bug):
    outcomes = [outcome(library, kernel, bug, seed) for seed in SEEDS]
    codes = {code for code, _ in outcomes}
    assert codes & {WRONG, EXCEPTION} and codes <= {RIGHT, WRONG, EXCEPTION}
    said = [message for code, message in outcomes if code == EXCEPTION]
    if BUGS[kernel][bug]:
        assert said and all(re.search(BUGS[kernel][bug], message) for message in said), said
    assert outcome(library, kernel, "", 0) == (RIGHT, "")  # nothing stays behind


def test_an_error_can_be_a_code_instead(library):
    throws = ctypes.c_int.in_dll(library, "kd_emulator_throws")
    throws.value = 0
    try:
        assert outcome(library, "pipeline", "odd size", 0) == (
            719, "block 0 thread 0: bulk_copy(): the size is not a multiple of 16")  # fmt: skip
    finally:
        throws.value = 1


def test_shapes_that_a_device_refuses(library):
    def shape(blocks=1, threads=32, shared=0, cluster=1, prepares=False, wide=False):
        return library.shape(int(prepares), int(wide), blocks, threads, shared, cluster)

    assert shape() == shape(blocks=3, threads=1024) == shape(blocks=16, cluster=8, shared=48 << 10) == 0
    for wrong in (dict(threads=1056), dict(threads=48), dict(threads=0), dict(blocks=0), dict(blocks=6, cluster=4)):
        assert shape(**wrong) == 9, wrong
    assert shape(shared=(48 << 10) + 16) == 1  # that, and clusters of more than 8, need prepare()
    assert shape(blocks=16, cluster=16) == 9
    assert shape(prepares=True, shared=232448 + 16) == 1
    assert shape(blocks=16, threads=1024, shared=232448, cluster=16, prepares=True, wide=True) == 0
    major = ctypes.c_int.in_dll(library, "kd_emulator_major")
    major.value = 8
    try:
        assert shape(blocks=2, cluster=2) == 9
    finally:
        major.value = 9


@pytest.mark.parametrize(("bits", "dtype"), [(16, torch.float16), (0, torch.bfloat16)], ids=str)
def test_formats(library, bits, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    wide = torch.tensor([library.widened(i, bits) for i in range(2**16)])
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    # The middles between neighbours, what is next to the middles, and beyond the ends.
    ends = torch.tensor([torch.inf, -torch.inf])
    middle = every[every.isfinite()].double().unique().unfold(0, 2, 7).mean(1).float()
    x = torch.cat([middle, *(middle.nextafter(end) for end in ends), ends, torch.tensor([torch.nan, 3.4e38, 65520])])
    got = torch.tensor([library.narrowed(v, bits) for v in x.tolist()], dtype=torch.int32).to(torch.uint16)
    torch.testing.assert_close(got.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
