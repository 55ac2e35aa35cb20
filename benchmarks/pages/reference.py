"""The API reference, from the docstrings: `python -m benchmarks.pages.reference` (`make docs`) writes build/docs.

pdoc makes the pages. What a loss's docstring has in backquotes in its first line is its formula, and is set as
mathematics: plain text to LaTeX here, LaTeX to MathML by latex2mathml, which a browser draws without scripts.
"""

import argparse
import inspect
import re
import tempfile
import warnings
from pathlib import Path

import torch

import kdkernels as kd
from kdkernels import listing
from kdkernels.trainer.losses import describe

MODULES = "kdkernels", r"!kdkernels\.backends\..+", "kdkernels.parallel"
GREEK = "alpha beta gamma epsilon mu rho tau".split()
FUNCTIONS = {"log": r"\log", "exp": r"\exp", "sqrt": r"\sqrt", "tanh": r"\tanh", "sum": r"\sum", "||": r"\parallel",
             "<=": r"\le", "~": r"\propto"}  # fmt: skip
NAMES = "KL CE Pearson Spearman softmax rank mean sgn std head tail between within".split()
PIECES = re.compile(r"[A-Za-z]+|\d+|\|\||<=|\s+|[-+*/=~'|.,:()\[\]{}_^]")
OPERATORS = {*"+-*/=,:", "||", "<=", *(FUNCTIONS[x] for x in ("||", "<=", "~")), "~"}
# What a loss declares is described at its base class, not again in every class of the catalogue.
TEMPLATE = """{% extends "default/module.html.jinja2" %}
{% macro is_public(doc) %}{% if (doc.qualname.split(".")[0] not in catalogue or doc.name in ("__init__", doc.qualname))
and doc.name != "extra_repr" and not doc.docstring.startswith("Alias for field") %}
{{- default_is_public(doc) }}{% endif %}{% endmacro %}"""
CLOSING = {"(": ")", "[": "]", "{": "}"}


def latex(formula: str) -> str:
    """'sum_i p_i^(1 - alpha)' -> LaTeX.

    Raises:
        ValueError: something in it is neither a letter, a number, an operator nor a name that is known.
    """
    pieces = PIECES.findall(formula)
    if "".join(pieces) != formula:
        raise ValueError(f"cannot read {formula!r}")
    return re.sub(r", (?=[^,()]+ = )", r",\\quad ", "".join(_written(pieces)))


def _written(pieces: list[str]) -> list[str]:
    out: list[str] = []
    while pieces:
        piece = pieces.pop(0)
        if piece.isspace():
            apart = out[-1] in OPERATORS or pieces[0] in OPERATORS  # which bring their own space
            out.append(" " if apart else r"\,")
        elif piece == "^" and (not pieces or not re.match(r"[A-Za-z0-9({]", pieces[0])):
            out[-1] = rf"\hat{{{out[-1]}}}"  # p^ is p with a hat
        elif piece == "'":
            out[-1] += r"^{\prime}"
        elif piece in "^_" or piece == "sqrt":
            out += [FUNCTIONS.get(piece, piece), "{", *_argument(pieces, piece), "}"]
        else:
            out.append(_symbol(piece))
    return out


def _argument(pieces: list[str], of: str) -> list[str]:
    """What an index, an exponent or a root applies to: the brackets behind it, or one piece."""
    if pieces[0] not in CLOSING:
        first = pieces.pop(0)
        letters = " ".join(first) if first.isalpha() and first not in (*GREEK, *NAMES) else first
        inner = [letters, *([pieces.pop(0)] if first == "." else [])]  # q_ik has two indices, and so has q_.k
        return [_symbol(x) for x in " ".join(inner).split()]
    opening, depth, inner = pieces[0], 0, []
    while True:
        piece = pieces.pop(0)
        depth += (piece == opening) - (piece == CLOSING[opening])
        inner.append(piece)
        if not depth:
            break
    bare = opening == "{" or of != "_"  # an index (i) keeps its brackets: of a sorted row
    return _written(inner[1:-1] if bare else inner)


def _symbol(piece: str) -> str:
    if piece in FUNCTIONS:
        return FUNCTIONS[piece]
    if piece in GREEK:
        return rf"\{piece}"
    if piece in NAMES:
        return rf"\mathrm{{{piece}}}"
    if len(piece) > 1 and piece.isalpha():
        raise ValueError(f"no symbol for {piece!r}")
    return r"\cdot " if piece == "." else piece


def mathematics(doc: str) -> str:
    """A docstring, the formulas of its first line set: the first by itself, others within the text."""
    from latex2mathml.converter import convert

    line, *rest = doc.split("\n")
    whole, *others = re.findall("`([^`]+)`", line)
    text = line.replace(f"`{whole}`", "", 1).lstrip(" ,.:;")
    for formula in others:
        text = text.replace(f"`{formula}`", convert(latex(formula)))
    return "\n".join([convert(latex(whole), display="block"), "", text[:1].upper() + text[1:], *rest])


def catalogue() -> str:
    """The losses as a table: name, formula, paper, points and cost."""
    from latex2mathml.converter import convert

    rows = []
    for name, cls in kd.catalogue().items():
        formula = re.search("`([^`]+)`", cls.__doc__ or "")
        assert formula, name
        paper = describe(cls)[2].replace("&", "&amp;")
        cells = [f'<a href="#{name}">{name}</a>', f"{convert(latex(formula[1]))}<br><small>{paper}</small>",
                 listing.spelled_cost(cls())]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{x}</th>" for x in ("loss", "value of a row", "cost"))
    table = "\n".join(['<table style="font-size: 85%">', f"<tr>{head}</tr>", *rows, "</table>"])
    return f"{table}\n\n{listing.COST}"


def write(to: Path) -> None:
    import pdoc

    notation = "q = softmax(s / T) is the student, p = softmax(t / T) the teacher, y the label."
    kd.__doc__ = f"{kd.__doc__}\n\n{notation}\n\n{catalogue()}"
    for cls in kd.catalogue().values():
        cls.__doc__ = mathematics(cls.__doc__ or "")
    for cls in (x for x in vars(kd).values() if inspect.isclass(x) and issubclass(x, torch.nn.Module)):
        cls.__init__.__doc__ = "Its own options; `**options` are those that are shared."
    pdoc.render.env.globals["catalogue"] = set(kd.catalogue())
    with tempfile.TemporaryDirectory() as templates, warnings.catch_warnings():
        (Path(templates) / "module.html.jinja2").write_text(TEMPLATE)
        pdoc.render.configure(docformat="google", include_undocumented=False, template_directory=Path(templates),
                              footer_text=f"kdkernels {kd.__version__}")  # fmt: skip
        warnings.filterwarnings("ignore", "Error parsing type annotation")  # of named tuples: shown as they are written
        pdoc.pdoc(*MODULES, output_directory=to)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/docs"))
    write(parser.parse_args().out)
