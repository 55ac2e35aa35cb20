"""Published systems, one file each: what they claim, and whether it holds here.

A recipe is a module with `run(lab) -> {arm: figure}`, a docstring, of which a paragraph is "Claim: ", what the paper
says, in a sentence, and another what to expect (`python -m benchmarks.expected`), and

    SOURCE   the paper
    FIGURE   what is measured; more is better
    TREND    [(better arm, worse arm), ...]: what the claim says of the arms
    LAB      where it works, if not on images
    WHOLE    why its batches cannot be cut into parts, if they cannot
"""

import importlib
import pkgutil

from ..config import UserError


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str):
    if name not in names():
        raise UserError(f"unknown recipe {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def claim(recipe) -> str:
    """What its docstring says that the paper says."""
    [paragraph] = [one for one in recipe.__doc__.split("\n\n") if one.startswith("Claim: ")]
    return " ".join(paragraph.removeprefix("Claim: ").split())
