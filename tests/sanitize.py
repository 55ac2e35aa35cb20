"""The C++ kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

    python tests/sanitize.py [address] [thread]      `make sanitize`; g++ and its sanitizer libraries
    python tests/sanitize.py quick                   in a minute: what .ci/run does

Builds csrc/cpu into build/sanitize/ (objects are kept, and made again when csrc/ changes) and runs sanitized.py there
against a package whose every other file is a link to the real one. torch is not instrumented and its OpenMP is unknown
to ThreadSanitizer: there the kernels get their threads from sanitized_threads.cpp, plain ones that it follows.

Every instruction set runs under AddressSanitizer. Its vectors are one source, tiles.inl, which has all checks of
UndefinedBehaviorSanitizer in the baseline's form and only those of casts in the wider ones, whose intrinsics take long
to compile with more. ThreadSanitizer sees the baseline's: the wider ones write where these do.

Quick: unoptimised, the baseline's vectors; the files that QUICK says, the others as `make` made them.
"""

import ast
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
CXX = os.environ.get("CXX", "g++")
# Outlined checks, and none for null or what its pointers overflow, compile in a third of the time.
CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]
SMALL = ["-fno-sanitize=null,pointer-overflow,object-size,vptr", *CALLS]
KINDS = {
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", *SMALL],
    "thread": ["-fsanitize=thread"],
}
TILES = {  # vectors of wider instruction sets: no integers to speak of
    "address": ["-fsanitize=address,float-cast-overflow", "-fno-sanitize-recover=all", *SMALL],
    "thread": [],
}
QUICK = {"address": lambda name: not name.startswith("tiles_avx"),
         "thread": lambda name: name in ("ops", "ranks", "tiles_base")}  # fmt: skip
ISAS = {"address": (3, 2, 1, 0), "thread": (0,)}  # what KDKERNELS_ISA says; all but the first in the quick form
# Leaks: an interpreter that exits leaves much behind.
OPTIONS = {
    "address": dict(ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1", UBSAN_OPTIONS="print_stacktrace=1"),
    "thread": dict(TSAN_OPTIONS="ignore_noninstrumented_modules=1:halt_on_error=1:report_signal_unsafe=0"),
}


def flags(optimise: str) -> list[str]:
    """Those of setup.py, but for what hides the lines of a report or takes long to compile."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    assigned = [x for x in tree.body if isinstance(x, ast.Assign)]
    [found] = [ast.literal_eval(x.value) for x in assigned if x.targets[0].id == "CXX_FLAGS"]
    kept = [flag for flag in found if flag not in ("-O3", "-g0")]
    return [*kept, optimise, "-g1", "-fPIC", "-fno-omit-frame-pointer"]


def compiled(source: Path, folder: Path, kind: str, quick: bool) -> Path:
    if quick and source.parent.name == "cpu" and not QUICK[kind](source.stem):
        return ROOT / "build" / "objects" / "csrc" / "cpu" / f"{source.stem}.o"
    target = folder / f"{source.stem}.o"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
        include = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
        vectors = source.stem.startswith("tiles_avx")
        how = [*flags("-O0" if quick else "-O1"), *(TILES if vectors else KINDS)[kind]]
        subprocess.run([CXX, *how, *include, "-c", source, "-o", target], check=True)
    return target


def build(kind: str, quick: bool) -> Path:
    """-> a folder with a package kdkernels on sanitized kernels."""
    folder = ROOT / "build" / "sanitize" / (f"{kind}-quick" if quick else kind)
    (folder / "kdkernels").mkdir(parents=True, exist_ok=True)
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), TESTS / "sanitized_threads.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        *objects, threads = pool.map(lambda source: compiled(source, folder, kind, quick), sources)
        objects.sort(key=lambda path: folder not in path.parents)  # of a function in several the first is taken
    libraries = f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"
    link = [CXX, "-shared", *KINDS[kind]]
    subprocess.run([*link, *objects, *libraries, "-o", folder / "kdkernels" / "_cpu.abi3.so"], check=True)
    subprocess.run([*link, threads, "-o", folder / "threads.so"], check=True)
    for path in (ROOT / "kdkernels").iterdir():
        link_to = folder / "kdkernels" / path.name
        if path.suffix != ".so" and path.name != "__pycache__" and not link_to.exists():
            link_to.symlink_to(path)
    return folder


def runtime(kind: str) -> str:
    names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[kind]
    asked = [[CXX, f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(x, capture_output=True, text=True, check=True).stdout.strip() for x in asked]
    if missing := [path for path in found if not Path(path).is_absolute()]:
        sys.exit(f"{CXX} has no {', '.join(missing)}: install its sanitizer libraries")
    return ":".join([*found, "libstdc++.so.6"])  # the runtimes look for the C++ library when they start


def run(kind: str, quick: bool) -> int:
    folder = build(kind, quick)
    preload = runtime(kind) + (f":{folder / 'threads.so'}" if kind == "thread" else "")
    python = dict(PYTHONPATH=f"{folder}:{TESTS}", PYTHONDONTWRITEBYTECODE="1", PYTHONMALLOC="malloc")
    environment = {**os.environ, **OPTIONS[kind], **python, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1"}
    wrapper = ["setarch", "-R"] if shutil.which("setarch") else []  # some versions' shadow memory needs fixed addresses
    for place, isa in enumerate((0,) if quick else ISAS[kind]):
        command = [*wrapper, sys.executable, str(TESTS / "sanitized.py"), kind, *(["quick"] if quick or place else [])]
        done = subprocess.run(command, env=environment | dict(KDKERNELS_ISA=str(isa)), cwd=folder)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    quick = "quick" in sys.argv
    sys.exit(max(run(kind, quick) for kind in [x for x in sys.argv[1:] if x != "quick"] or KINDS))
