"""The cuda backend on the CPU: its kernels in the emulator of tests/emulator/, behind the operators of the real one."""

import ctypes
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from kdkernels.backends import cuda

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-math-errno", "-Wno-unknown-pragmas", "-DKD_EMULATED",
         "-DKD_DISPATCH=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{TESTS}", f"-I{CSRC}",
         f"-I{TORCH / 'include'}"]  # fmt: skip
LINK = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-Wl,--no-undefined", "-lc10"]


def build() -> Path:
    """The library, compiled once for each state of the sources."""
    sources = sorted([*CSRC.glob("cuda/*"), *CSRC.glob("*.h"), *TESTS.glob("emulator/*.h")])
    cxx = os.environ.get("CXX", "g++").split()
    state = hashlib.sha256(repr((cxx, FLAGS, LINK, torch.__version__)).encode())
    for path in sources:
        state.update(path.name.encode() + path.read_bytes())
    library = TESTS.parent / "build" / "emulated" / f"cuda-{state.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        print("compiling the CUDA kernels for the emulator", file=sys.stderr)
        units = [path for path in sources if path.suffix in (".cu", ".cpp")]
        objects = [library.with_name(f"{library.stem}-{path.stem}-{os.getpid()}.o") for path in units]
        pairs = zip(units, objects, strict=True)
        commands = [[*cxx, *FLAGS, "-x", "c++", "-c", str(unit), "-o", str(o)] for unit, o in pairs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        part = library.with_suffix(f".{os.getpid()}")
        _run([*cxx, "-shared", *map(str, objects), "-o", str(part), *LINK])
        part.replace(library)  # whole or not at all
        for o in objects:
            o.unlink()
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def install() -> None:
    """Makes `cuda` a backend for tensors on the CPU."""
    cuda.LIBRARY, cuda.DEVICES = build(), ("cpu",)


@contextmanager
def machine(**settings):
    """Within it the emulated device has these `processors`, `shared` bytes a block, `major` capability and `seed`.

    Yields a function: the largest cluster launched so far.
    """
    library = ctypes.CDLL(str(cuda.LIBRARY))
    settings["widest"] = 0
    variables = {name: ctypes.c_int.in_dll(library, f"kd_emulator_{name}") for name in settings}
    before = {name: variable.value for name, variable in variables.items()}
    for name, value in settings.items():
        variables[name].value = value
    try:
        yield lambda: variables["widest"].value
    finally:
        for name, value in before.items():
            variables[name].value = value
