"""`kdkernels doctor`: what works on this machine."""

import importlib.metadata
import os
import platform
from pathlib import Path

ADVICE = {
    "cpu": "reinstall with a C++ compiler and ninja: pip install --no-build-isolation .",
    "triton": "TRITON_INTERPRET=1 runs it in its interpreter, without a GPU and slowly",
    "cuda": "needs a CUDA build of torch, nvcc and an NVIDIA GPU when kdkernels is built",
}
MISSING = {"triton": "pip install 'kdkernels[triton]' (Linux)"}


def run_doctor(options):
    """Say which backends run here and why the others do not, with versions, devices, instruction set and threads.
    The exit status is 1 if KDKERNELS_BACKEND names a backend that cannot run here."""
    import torch

    import kdkernels as kd
    from kdkernels import backends

    print(f"kdkernels  {version()} in {Path(kd.__file__).parent}")
    print(f"python     {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "rich", "matplotlib"):
        print(f"{name:<10} {installed(name)}")
    isa = getattr(getattr(backends, "cpu", None), "isa", torch.backends.cpu.get_cpu_capability)
    print(f"cpu        {processor()}, instruction set {isa()}, {torch.get_num_threads()} threads of {os.cpu_count()}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        print(f"gpu {index}      {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    libraries = sorted(p for p in Path(kd.__file__).parent.rglob("*") if p.suffix in (".so", ".pyd", ".dylib"))
    print(f"libraries  {', '.join(map(str, libraries)) or 'none built'}")
    states, forced = kd.available_backends(), os.environ.get("KDKERNELS_BACKEND")
    state = states.get(forced, f"there is no such backend; known: {', '.join(states)}") if forced else "ok"
    refused = "" if state == "ok" else f", and every loss raises: {state}"
    print(f"forced     {f'KDKERNELS_BACKEND={forced}{refused}' if forced else 'none'}")
    print("backends")
    for name, state in states.items():
        print(f"  {name:<10} {state}")
        advice = MISSING.get(name) if state.startswith("needs the module") else ADVICE.get(name)
        if state != "ok" and advice and not state.startswith("no such kernels"):
            print(f"  {'':<10} -> {advice}")
    return 1 if refused else 0


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return (
            "not installed"
            if name in ("torch", "triton", "numpy")
            else "not installed (pip install 'kdkernels[train]')"
        )


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
