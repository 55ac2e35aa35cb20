"""`kdkernels bench`: its flags. What measures is in benchmarks/ of the repository, which is not installed."""

import importlib
import sys
from pathlib import Path

from .trainer.config import UserError

DESCRIPTION = (
    "Losses of the catalogue on every backend that runs here, beside the formula in eager torch, torch.compile of it "
    "and other libraries that have the loss, in turns in one run: ms (median, quartiles), GB/s, percent of a copy's "
    "bandwidth, exponentials/s, peak bytes, error against float64. Needs a clone of the repository."
)
EPILOG = (
    "Killed, the same command goes on: what is in the --json file and was measured at this commit on this machine is "
    "not measured again. Most of the time goes into torch.compile's compiling. Peers: pip install liger-kernel trl "
    "torchtune torchsort flash-linear-attention. --peers writes benchmarks/results/peers-DEVICE.json and "
    "benchmarks/pages/peers.md. example: kdkernels bench --loss jsd --shape 64x128256 --dtype bfloat16"
)


def shape(text):
    """'64x32000', as it is; anything else raises what argparse tells the user."""
    rows, cross, classes = text.partition("x")
    if not (cross and rows.isdecimal() and classes.isdecimal() and int(rows) and int(classes) > 1):
        raise ValueError(text)
    return text


def add_flags(parser):
    import torch

    add = parser.add_argument
    add("--loss", nargs="+", metavar="NAME", help="losses whose class name contains one of these (default: all)")
    add("--backend", nargs="+", metavar="NAME", choices=("cpu", "cuda", "triton", "reference"),
        help="of these four (default: all that run on the device; the reference with --quick alone)")  # fmt: skip
    add("--shape", nargs="+", type=shape, metavar="NxV",
        help="rows x classes (default: 64x32000, 4096x1000, 16x131072)")  # fmt: skip
    add("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), metavar="NAME",
        help="float32, bfloat16, float16 (default: the first two; of the default shapes 4096x1000 "
        "the first, 16x131072 the second)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, metavar="INT", help="torch's threads (default: as torch has it)")
    add("--quick", action="store_true", help="64x4000 float32, about a second a cell, no torch.compile")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--again", action="store_true", help="measure again what the --json file has")
    add("--peers", action="store_true", help="instead, the table of every peer beside kdkernels")
    add("--json", type=Path, metavar="FILE", help="what was measured; an earlier call's stays (written cell by cell)")
    add("--plot", type=Path, metavar="FILE", help="draw times over eager's, and shares of the copy's bandwidth")
    return parser


def add_bench(commands):
    one = commands.add_parser("bench", help="losses beside eager torch, torch.compile and other libraries",
                              description=DESCRIPTION, epilog=EPILOG)  # fmt: skip
    add_flags(one).set_defaults(run=run_bench)


def run_bench(options):
    """Hand over to benchmarks/ of the repository this package lies in."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "bench.py").exists():
        raise UserError("bench needs a clone of the repository: benchmarks/ and tests/ are not installed. There: "
                        "pip install -e '.[bench]', then kdkernels bench")  # fmt: skip
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.peers_table" if options.peers else "benchmarks.bench").run(options)
