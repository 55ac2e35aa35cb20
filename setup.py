"""Compiles csrc/: kdkernels/_cpu always, kdkernels/_cuda where nvcc and a CUDA build of torch are both there.

KDKERNELS_CUDA=auto|0|1 (default auto): 0 leaves CUDA out, 1 insists on it and fails with what is missing.
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS mean what they mean to torch's extension builder.
Both libraries use torch's stable ABI and no Python API: one binary serves Python >= 3.10 and later torch versions.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # an sdist or the metadata is made without it
    torch = None

ROOT = Path(__file__).resolve().parent
# Never -ffast-math: a library linked with it flushes denormals in the whole process, and it assumes inf and NaN away.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",  # bits of numbers are added as integers
    "-fopenmp-simd",
    "-Wno-psabi",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--threads=2"]


def sources(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def use_cxx():
    """Find the C++ compiler, check that it will do, and make every later step (compile, link) use that one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    cxx = next((name for name in names if shutil.which(name.split()[0])), None)
    if cxx is None:
        sys.exit(f"kdkernels: no C++ compiler ({', '.join(names)}): install g++ or clang, or name one in CXX")
    probe = [*cxx.split(), "-std=c++20", "-fopenmp-simd", "-x", "c++", "-dM", "-E", os.devnull]
    macros = subprocess.run(probe, capture_output=True, text=True)
    if macros.returncode or "__GNUC__" not in macros.stdout:
        sys.exit(f"kdkernels: {cxx} does not take the C++20 that gcc >= 11 and clang >= 14 do. {macros.stderr.strip()}")
    os.environ["CXX"] = cxx


def nvcc_major():
    home = cpp_extension.CUDA_HOME
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if not nvcc:
        return None
    release = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return release and release.group(1)


def missing_for_cuda():
    """What stands between this machine and the CUDA library; nothing when it can be built."""
    missing, nvcc, wanted = [], nvcc_major(), torch.version.cuda
    if not sources("csrc/cuda/*.cu"):
        missing.append("CUDA sources (csrc/cuda/*.cu)")
    if not wanted:
        missing.append(f"a CUDA build of torch (this one is {torch.__version__})")
    if not nvcc:
        missing.append("nvcc (put it on PATH or set CUDA_HOME)")
    elif wanted and nvcc != wanted.split(".")[0]:
        missing.append(f"an nvcc of torch's CUDA {wanted} (this one is of CUDA {nvcc})")
    return missing


def wants_cuda():
    switch = os.environ.get("KDKERNELS_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        sys.exit(f"kdkernels: KDKERNELS_CUDA={switch!r}: must be auto, 0 or 1")
    missing = missing_for_cuda() if switch != "0" else []
    if switch == "1" and missing:
        sys.exit(f"kdkernels: KDKERNELS_CUDA=1, but these are missing: {'; '.join(missing)}")
    return switch != "0" and not missing


def extension(name, files, make, **flags):
    return make(
        f"kdkernels.{name}",
        files,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
        py_limited_api=True,
    )


def cpu():
    return extension("_cpu", sources("csrc/cpu/*.cpp"), cpp_extension.CppExtension, cxx=CXX_FLAGS)


def cuda():
    recent = tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 8)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX" if recent else "8.0;9.0a;9.0+PTX")
    files = sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
    return extension("_cuda", files, cpp_extension.CUDAExtension, cxx=[*CXX_FLAGS, "-DUSE_CUDA"], nvcc=NVCC_FLAGS)


class NeedsTorch(build_ext):
    """Stands in for the builder where torch is not installed; says so when it is really asked to build."""

    def run(self):
        sys.exit("kdkernels: torch >= 2.11 is needed to build: install it first (pip install torch==2.13.0)")


def builder():
    class Build(cpp_extension.BuildExtension):
        """torch's builder, checking its surroundings first and keeping object files between editable builds."""

        def finalize_options(self):
            self.distribution.ext_modules = [cpu(), *([cuda()] if wants_cuda() else [])]
            super().finalize_options()

        def run(self):
            use_cxx()
            if self.editable_mode or self.inplace:
                self.build_temp = str(ROOT / "build" / "objects")
            try:
                super().run()
            except RuntimeError as error:  # the compiler has said why; a traceback through the builder would bury it
                sys.exit(f"kdkernels: {error}")

    return Build


setup(
    ext_modules=[Extension("kdkernels._cpu", sources("csrc/cpu/*.cpp"), py_limited_api=True)],
    cmdclass={"build_ext": builder() if torch else NeedsTorch},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
