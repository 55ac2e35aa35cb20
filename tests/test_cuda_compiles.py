"""Every CUDA kernel compiled for every architecture, without a GPU; run as a script it prints a table.

    python tests/test_cuda_compiles.py [80 90a 100]      registers and spilled bytes of each kernel
    python tests/compiled.py                             and has the tests know them until a source changes
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiled import ROOT, compiled, key_of

NAME = "CUDA"
ARCHITECTURES = ("80", "90a", "100")
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))


def nvcc() -> list[str]:
    """CUDA_HOME's compiler, the one that the package nvidia-cuda-nvcc brings, or the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    packaged = next((str(p) for p in (Path(p, "nvidia/cu13/bin/nvcc") for p in sys.path) if p.exists()), None)
    found = shutil.which("nvcc", path=f"{home}/bin") if home else packaged or shutil.which("nvcc")
    assert found, "no nvcc: set CUDA_HOME, or pip install '.[test]'"
    return [found]


def key() -> str:
    version = subprocess.run([*nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return key_of([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*"), Path(__file__)], version)


def kernels(source: Path, architecture: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes spilled by it and by what it calls) of one source file."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", target, "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = [*nvcc(), *flags, "-c", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found, name, spilled = [], "", 0
    for line in done.stderr.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            name, spilled = entry[1], 0
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled += int(spills[1]) + int(spills[2])
        elif used := re.search(r"Used (\d+) registers", line):
            found.append((name, int(used[1]), spilled))
    return found


def table(architecture: str) -> list[tuple[str, int, int]]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda source: kernels(source, architecture), SOURCES) for row in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_spills(architecture):
    found = compiled(f"{NAME} {architecture}", key(), lambda: table(architecture))
    assert len(found) == 43
    assert not [row for row in found if row[2]]


if __name__ == "__main__":
    for target in sys.argv[1:] or ARCHITECTURES:
        for name, registers, spilled in table(target):
            print(f"sm_{target} {name}: {registers} registers, {spilled} bytes spilled", flush=True)
