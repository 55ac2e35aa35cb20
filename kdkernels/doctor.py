"""`kdkernels doctor`: what works on this machine."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

INDEX = "https://pytorch.org/get-started names the index of each build"


def advice(name, state):
    """-> what to do, a line each, so that a backend which cannot run here does."""
    import torch

    if state == "ok" or state.startswith("no such kernels"):
        return []
    if name == "triton" and state.startswith("needs the module"):
        return ["in a clone: pip install '.[triton]' (Linux)"]
    if name == "cpu":
        return ["reinstall with a C++ compiler and ninja: pip install --no-build-isolation ."]
    if name not in ("triton", "cuda"):
        return []
    steps = [] if torch.version.cuda else [f"a CUDA build of torch, for an NVIDIA GPU ({INDEX})"]
    if name == "triton":
        steps = [] if torch.version.cuda or torch.version.hip else [*steps, "or a ROCm build of torch, for an AMD GPU"]
        return [*steps, "TRITON_INTERPRET=1 runs it in its interpreter, without a GPU and slowly"]
    if torch.version.hip:
        return ["CUDA C++ is for NVIDIA GPUs; Triton runs on this torch's"]
    steps += [] if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else [
        f"nvcc{f' of CUDA {torch.version.cuda}' if torch.version.cuda else ''} on PATH, or CUDA_HOME"
    ]  # fmt: skip
    steps += [] if torch.cuda.is_available() else ["an NVIDIA GPU, Ampere or later, and its driver"]
    return [*steps, "then: KDKERNELS_CUDA=1 pip install --no-build-isolation ."]


def build():
    """The build of torch, as far as GPUs go."""
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def run_doctor(options):
    """Say which backends run here, why the others do not and how to get them, with versions, devices and threads.
    The exit status is 1 if KDKERNELS_BACKEND names a backend that cannot run here."""
    import torch

    import kdkernels as kd
    from kdkernels import backends

    print(f"kdkernels  {version()} in {Path(kd.__file__).parent}")
    print(f"python     {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "rich", "matplotlib"):
        print(f"{name:<10} {installed(name)}")
    print(f"build      torch for {build()}")
    isa = getattr(getattr(backends, "cpu", None), "isa", torch.backends.cpu.get_cpu_capability)
    print(f"cpu        {processor()}, instruction set {isa()}, {torch.get_num_threads()} threads of {os.cpu_count()}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        print(f"gpu {index}      {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    if not torch.cuda.device_count():
        print("gpu        none that torch sees")
    libraries = sorted(p for p in Path(kd.__file__).parent.rglob("*") if p.suffix in (".so", ".pyd", ".dylib"))
    print(f"libraries  {', '.join(map(str, libraries)) or 'none built'}")
    states, forced = kd.available_backends(), os.environ.get("KDKERNELS_BACKEND")
    state = states.get(forced, f"there is no such backend; known: {', '.join(states)}") if forced else "ok"
    refused = "" if state == "ok" else f", and every loss raises: {state}"
    print(f"forced     {f'KDKERNELS_BACKEND={forced}{refused}' if forced else 'none'}")
    print("backends")
    for name, state in states.items():
        print(f"  {name:<10} {state}")
        for step in advice(name, state):
            print(f"  {'':<10} -> {step}")
    return 1 if refused else 0


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        how = "" if name in ("torch", "triton", "numpy") else " (in a clone: pip install '.[train]')"
        return f"not installed{how}"


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version():
    try:
        return importlib.metadata.version("kdkernels")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
