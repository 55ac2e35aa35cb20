"""The command line: kdkernels distill | recipes | cache | probe | bench | losses | doctor."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from .backends import BackendUnavailable
from .benchmarking import add_bench, run_bench
from .doctor import run_doctor, version
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
        same = options.run in (run_cache, run_bench) or "recipe" in options
        print(f"kdkernels: interrupted; {'the same command goes on' if same else resume}", file=sys.stderr)
        return 130


def parser():
    top = argparse.ArgumentParser(prog="kdkernels", description="Fused knowledge-distillation losses for torch.")
    top.add_argument("--version", action="version", version=f"kdkernels {version()}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_distill(commands)
    add_cache(commands)
    add_probe(commands)
    add_bench(commands)
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
    one.add_argument("--recipe", metavar="NAME", help="instead, reproduce a published system at a small size (see "
                     "`kdkernels recipes`); with --seeds, --out, --cache, --threads, --accumulate and "
                     "--dtype alone, under torchrun too")  # fmt: skip
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
                               "eval_every", "out", "parallel"))  # fmt: skip


def add_probe(commands):
    one = commands.add_parser(
        "probe",
        help="how a student deviates from its teacher",
        description="Where a student is surer than its teacher and where less: the slope of logit(q_c) on logit(p_c), "
        "c the teacher's first choice, residuals by tail, agreement, calibration, conditional mutual information, "
        "entropies. On held-out text, or on test pictures for the files of a recipe of images.",
        epilog="example: kdkernels probe runs/demo",
    )
    one.set_defaults(run=run_probe)
    one.add_argument("paths", nargs="+", metavar="PATH", help="a finished run folder of `kdkernels distill`; or two "
                     "safetensors files of a recipe, the student's and (in the cache folder) its teacher's")
    one.add_argument("--tokens", type=int, default=4096, metavar="INT", help="held-out tokens (default: 4096)")
    one.add_argument("--alpha", type=float, default=0.5, help="order of the Renyi entropy (default: 0.5)")
    one.add_argument("--out", default="", metavar="PATH", help="folder to write (default: probe, beside the files)")


def run_probe(options):
    """Measure, print the tables, write probe.json and a plot for each student."""
    from .trainer.probe import command

    return command(options)


def run_cache(options):
    """Collect the settings and write the cache."""
    own = ("run", "quick", "teacher", "top_k", "temperature")
    typed: dict[str, Any] = absolute({k: v for k, v in vars(options).items() if k not in own})

    from .trainer.caching import write_cache

    cfg = Config(**(QUICK | typed if "quick" in options else typed))
    write_cache(cfg, options.top_k, options.temperature, options.teacher)


def run_recipes(options):
    """List the published systems, one a line: name, claim, paper."""
    from .trainer import recipes

    rows = [[name, recipes.claim(one := recipes.load(name)), one.SOURCE] for name in recipes.names()]
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
