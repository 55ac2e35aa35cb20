"""The command line: kdkernels distill | recipes | cache | losses | doctor."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

from .backends import BackendUnavailable
from .listing import print_catalogue, run_losses
from .trainer.config import QUICK, Config, UserError, flag
from .trainer.flags import HELP, absolute, add_settings

# Constructor arguments of losses that are common enough for a flag of their own; --set reaches the rest.
SHORT_FORMS = "gamma alpha beta tau temperature teacher_temperature kd_weight ce_weight".split()

def main(arguments=None):
    """-> the exit status: 0, 1 from a doctor who found something, or 2 with a line on stderr for something the user
    can put right."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (UserError, BackendUnavailable) as error:
        print(f"kdkernels: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written to: the message names the path
        print(f"kdkernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = "`--resume RUN_DIR` goes on from the last checkpoint"
        again = "the same command goes on" if options.run is run_cache else resume
        print(f"kdkernels: interrupted; {again}", file=sys.stderr)
        return 130


def parser():
    top = argparse.ArgumentParser(prog="kdkernels", description="Fused knowledge-distillation losses for torch.")
    top.add_argument("--version", action="version", version=f"kdkernels {version()}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_distill(commands)
    add_cache(commands)
    one = commands.add_parser("recipes", help="the published systems that `distill --recipe` reproduces",
                              description=run_recipes.__doc__)  # fmt: skip
    one.set_defaults(run=run_recipes)
    one = commands.add_parser(
        "losses", help="the catalogue: name, formula, paper, needs, points, cost", description=run_losses.__doc__
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
    one.add_argument("--recipe", metavar="NAME", help="instead, reproduce a published system on small images (see "
                     "`kdkernels recipes`); with --seeds, --out, --cache and --threads alone")  # fmt: skip
    one.add_argument("--seeds", type=int, metavar="INT", help="of a recipe (default: 3)")
    groups = add_settings(one)
    for name in SHORT_FORMS:
        groups["loss"].add_argument(
            flag(name), type=float, metavar="FLOAT", help=HELP.get(name, f"the loss's {name}, if it has one")
        )
    groups["loss"].add_argument("--set", action="append", metavar="NAME=VALUE", help="any other argument of the loss")


def add_cache(commands):
    one = commands.add_parser(
        "cache",
        help="a teacher's top-k log-probabilities on disk, to distil from",
        description="Write the k most likely tokens of a teacher at every position that `kdkernels distill` with the "
        "same settings will train its students on, and the mass of all others. Killed, the same command goes on.",
        epilog="example: kdkernels cache --quick --top-k 64 --out cache && kdkernels distill --quick --teacher-cache "
        "cache",
        argument_default=argparse.SUPPRESS,
    )
    one.set_defaults(run=run_cache)
    one.add_argument("--out", metavar="PATH", required=True, help="the folder to write, or to go on with")
    one.add_argument("--quick", action="store_true", help="the small run of `kdkernels distill --quick`")
    one.add_argument("--teacher", metavar="PATH", default="", help="a teacher-*.safetensors of the cache folder, or a "
                     "folder of a Hugging Face language model (safetensors, tokenizer.json) for training code of your "
                     "own (default: the teacher of these settings, trained if it is not there)")  # fmt: skip
    one.add_argument("--top-k", type=int, metavar="INT", default=64, help="tokens of each position (default: 64)")
    one.add_argument("--temperature", type=float, metavar="FLOAT", default=1.0,
                     help="the teacher's temperature in the loss to come (default: 1)")  # fmt: skip
    add_settings(one, without=("loss", "teacher_cache", "tail", "val_tokens", "curve_tokens", "keep_layers", "lr",
                               "eval_every", "out"))  # fmt: skip


def run_cache(options):
    """Collect the settings and write the cache."""
    own = ("run", "quick", "teacher", "top_k", "temperature")
    typed = absolute({k: v for k, v in vars(options).items() if k not in own})

    from .trainer.caching import write_cache

    cfg = Config(**(QUICK | typed if "quick" in options else typed))
    write_cache(cfg, options.top_k, options.temperature, options.teacher)


def run_recipes(options):
    """List the published systems, one a line: name, claim, paper."""
    from .trainer import recipes

    rows = [[name, (one := recipes.load(name)).CLAIM, one.SOURCE] for name in recipes.names()]
    print_catalogue(["--recipe", "claim", "paper"], rows, "kdkernels distill --recipe NAME runs one.")


def run_distill(options):
    """Collect the settings and run the trainer."""
    if "recipe" in options:
        from .trainer.reproduce import command

        return command(options)
    if "seeds" in options:
        raise UserError("--seeds belongs to --recipe")
    typed = {k: v for k, v in vars(options).items() if k not in ("run", "quick", "resume", "set")}
    loss_options = {name: typed.pop(name) for name in SHORT_FORMS if name in typed}
    loss_options |= dict(assignment(text) for text in getattr(options, "set", []))
    typed |= {"loss_options": loss_options} if loss_options else {}
    typed = absolute(typed)

    from .trainer.distill import distill

    cfg = settled(options, QUICK | typed if "quick" in options else typed)
    distill(cfg, resume="resume" in options)
    return 0


def settled(options, typed):
    """-> the Config of a run whose loss and backend exist: to be said before an hour of training, not after."""
    import torch

    from .backends import pick
    from .trainer.distill import read_run
    from .trainer.losses import make_loss, resolve

    resume = "resume" in options
    if resume and "out" in typed:
        raise UserError("--out and --resume exclude each other: a resumed run stays in its folder")
    try:
        cfg = read_run(options.resume, typed) if resume else Config(**typed)
        make_loss(cfg.loss, cfg.loss_options)  # as it was typed: messages about what was typed
        loss = make_loss(cfg.loss, resolve(cfg.loss, cfg.loss_options))
        pick(torch.empty(1, 1, device="cuda" if cfg.device.startswith("cuda") and torch.cuda.is_available() else "cpu"))
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if loss.reduction == "none":
        raise UserError('--set reduction="none": training needs one number; use "mean", "sum" or "batchmean"')
    cfg.out = cfg.out or str(Path("runs") / f"{cfg.loss}-{time.strftime('%Y%m%d-%H%M%S')}")
    return cfg


def assignment(text):
    """'name=value' -> (name, value); the value is read as JSON: 0.5, true, null, "text"."""
    name, equals, value = text.partition("=")
    try:
        return name.strip().replace("-", "_"), json.loads(value if equals else "")
    except ValueError:
        raise UserError(f'--set {text}: expected NAME=VALUE with a number, true, false, null or "text"') from None


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
        return "not installed" + ("" if name in ("torch", "triton", "numpy") else " (pip install 'kdkernels[train]')")


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
