"""Short names and command-line options to losses, and the catalogue as a table."""

import inspect
import re

import kdkernels as kd

from ..options import signature
from .config import UserError

SYMBOLS = {"temperature": "T", "teacher_temperature": "teacher T"}


def short(name):
    """'WTTMLoss', 'wttm', 'forward-kl' -> 'wttm', 'wttm', 'forwardkl'."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("loss")


def loss_class(name):
    known = {short(full): cls for full, cls in kd.catalogue().items()}
    if short(name) not in known:
        raise UserError(f"unknown loss {name!r}; known: {', '.join(sorted(known))}")
    return known[short(name)]


def options_of(cls):
    """{name: default} of everything its constructor takes, its base classes' shared options included."""
    return {p.name: p.default for p in signature(cls).parameters.values()}


def resolve(name, options):
    """The options with what the trainer adds: TTM and WTTM get temperature=1/gamma, teacher_temperature=1.

    On their own they are least where the student's logits are gamma times the teacher's: a flattened copy, far from
    the teacher in KL and acceptance. With the student's temperature at 1/gamma they are least at the teacher itself.
    Either temperature given by the user switches this off.
    """
    known = options_of(loss_class(name))
    gamma = options.get("gamma", known.get("gamma"))
    if "teacher_temperature" not in known:  # DISTLoss, whose gamma is a weight
        return dict(options)
    if not gamma or gamma < 0 or {"temperature", "teacher_temperature"} & set(options):
        return dict(options)
    return {"gamma": gamma, **options, "temperature": 1 / gamma, "teacher_temperature": 1.0}


def make_loss(name, options):
    """The loss as a module. UserError for an unknown loss or option, listing the known ones."""
    cls = loss_class(name)
    known = options_of(cls)
    for option in options:
        if option not in known:
            raise UserError(f"{cls.__name__} has no option {option!r}; known: {', '.join(sorted(known))}")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{cls.__name__}: {error}") from None


def plain(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def call(loss, options):
    """'WTTMLoss(gamma=0.5, temperature=2, teacher_temperature=1)': what to write to get this loss."""
    return f"{type(loss).__name__}({', '.join(f'{name}={plain(value)}' for name, value in options.items())})"


def label(loss, options):
    """'WTTM (gamma 0.5, T 2, teacher T 1)': the loss in the table and in the legend of the curves."""
    shown = ", ".join(f"{SYMBOLS.get(name, name)} {plain(value)}" for name, value in options.items())
    return type(loss).__name__.removesuffix("Loss") + (f" ({shown})" if shown else "")


def describe(cls):
    """-> name, formula, paper, from the class itself."""
    text = inspect.getdoc(cls) or ""
    paper = "; ".join(re.findall(r"\[([^\[\]]*(?:19|20)\d\d[^\[\]]*)\]", text))
    formula = re.sub(r"\s*\[[^\[\]]*(?:19|20)\d\d[^\[\]]*\]", "", text.split("\n")[0]).replace("`", "").strip()
    return cls.__name__, formula, paper
