"""The command line: kdkernels distill | losses | doctor."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
import typing
from pathlib import Path

from .backends import BackendUnavailable
from .trainer.config import QUICK, Config, UserError, flag

DEFAULTS = Config()
PATHS = ("text", "tokenizer", "out", "cache")
# Constructor arguments of losses that are common enough for a flag of their own; --set reaches the rest.
SHORT_FORMS = "gamma alpha beta tau temperature teacher_temperature kd_weight ce_weight".split()

HELP = {"temperature": "the student's temperature, and the teacher's unless given (default for TTM and WTTM: 1/gamma, "
        "with a teacher temperature of 1, so that the loss is least where student and teacher agree)"}  # fmt: skip


def main(arguments=None):
    """-> the exit status: 0, or 2 with a line on stderr for something the user can put right."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (UserError, BackendUnavailable) as error:
        print(f"kdkernels: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written to: the message names the path
        print(f"kdkernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kdkernels: interrupted; `--resume RUN_DIR` goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def parser():
    top = argparse.ArgumentParser(prog="kdkernels", description="Fused knowledge-distillation losses for torch.")
    top.add_argument("--version", action="version", version=f"kdkernels {version()}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_distill(commands)
    one = commands.add_parser(
        "losses", help="the catalogue: name, formula, paper, points", description=run_losses.__doc__
    )
    one.set_defaults(run=run_losses)
    one = commands.add_parser("doctor", help="what works on this machine, and what to do about the rest",
                              description=run_doctor.__doc__)  # fmt: skip
    one.set_defaults(run=run_doctor)
    return top


def version():
    try:
        return importlib.metadata.version("kdkernels")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def add_distill(commands):
    one = commands.add_parser(
        "distill",
        help="train a small teacher, distil a student from it, compare",
        description="Train a small Llama-style teacher on real text, cut a student from its layers, and distil the "
        "student beside a cross-entropy-only one on the same batches.",
        epilog="example: kdkernels distill --quick --loss alphabeta --alpha 0.2 --beta 0.7",
        argument_default=argparse.SUPPRESS,  # what was typed is told apart from what was not: --resume needs that
    )
    one.set_defaults(run=run_distill)
    one.add_argument("--quick", action="store_true", help="a small run: about two minutes on two cores")
    one.add_argument("--resume", metavar="RUN_DIR", help="go on with a run that was killed")
    groups: dict[str, typing.Any] = {}
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if not field.metadata:
            continue
        name = field.metadata["group"]
        groups[name] = groups.get(name) or one.add_argument_group(name)
        default, kind = getattr(DEFAULTS, field.name), hints[field.name]
        several = isinstance(default, list)
        note = "" if default in ("", []) else f" (default: {' '.join(map(str, default)) if several else default})"
        kind, count = (typing.get_args(kind)[0], {"nargs": "+"}) if several else (kind, {})
        shown = "PATH" if kind is str and field.name in PATHS else kind.__name__.upper()
        groups[name].add_argument(
            flag(field.name), type=kind, metavar=shown, help=field.metadata["help"] + note, **count
        )
    for name in SHORT_FORMS:
        groups["loss"].add_argument(
            flag(name), type=float, metavar="FLOAT", help=HELP.get(name, f"the loss's {name}, if it has one")
        )
    groups["loss"].add_argument("--set", action="append", metavar="NAME=VALUE", help="any other argument of the loss")


def run_distill(options):
    """Collect the settings and run the trainer."""
    typed = {k: v for k, v in vars(options).items() if k not in ("run", "quick", "resume", "set")}
    loss_options = {name: typed.pop(name) for name in SHORT_FORMS if name in typed}
    loss_options |= dict(assignment(text) for text in getattr(options, "set", []))
    typed |= {"loss_options": loss_options} if loss_options else {}
    typed |= {name: str(Path(typed[name]).absolute()) for name in ("tokenizer", "cache") if typed.get(name)}
    typed |= {"text": [str(Path(p).absolute()) for p in typed["text"]]} if "text" in typed else {}

    import torch

    from .backends import pick
    from .trainer.distill import distill, read_run

    pick(torch.empty(1, 1))  # a backend that cannot run is to be said before an hour of training, not after
    if "resume" in options:
        if "out" in typed:
            raise UserError("--out and --resume exclude each other: a resumed run stays in its folder")
        return distill(read_run(options.resume, QUICK | typed if "quick" in options else typed), resume=True)
    cfg = Config(**(QUICK | typed if "quick" in options else typed))
    cfg.out = cfg.out or str(Path("runs") / f"{cfg.loss}-{time.strftime('%Y%m%d-%H%M%S')}")
    return distill(cfg)


def assignment(text):
    """'name=value' -> (name, value); the value is read as JSON: 0.5, true, null, "text"."""
    name, equals, value = text.partition("=")
    try:
        return name.strip().replace("-", "_"), json.loads(value if equals else "")
    except ValueError:
        raise UserError(f"--set {text}: expected NAME=VALUE with a number, true, false or null") from None


def run_losses(options):
    """List every loss of the catalogue: its name, formula, paper and the points of the log-partition it needs."""
    import kdkernels as kd

    from .trainer.losses import describe
    from .trainer.report import print_table

    rows = [describe(cls) for cls in kd.catalogue().values()]
    print_table("losses", ["name", "formula", "paper", "points"], rows)


ADVICE = {
    "cpu": "reinstall with a C++ compiler and ninja: pip install --no-build-isolation .",
    "triton": "pip install triton (Linux); without a GPU it runs in its interpreter: TRITON_INTERPRET=1",
    "cuda": "needs a CUDA build of torch, nvcc and an NVIDIA GPU when kdkernels is built",
}


def run_doctor(options):
    """Say which backends run here and why the others do not, with versions, devices, instruction set and threads."""
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
    print(f"forced     KDKERNELS_BACKEND={os.environ.get('KDKERNELS_BACKEND', '')}")
    print("backends")
    for name, state in kd.available_backends().items():
        print(f"  {name:<10} {state}")
        if state != "ok" and name in ADVICE and not state.startswith("no such kernels"):
            print(f"  {'':<10} -> {ADVICE[name]}")


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
