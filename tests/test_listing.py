"""The catalogue's table: complete, its formulas in LaTeX, its costs those that the kernels show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from benchmarks.pages.reference import latex
from benchmarks.rows import tilts
from kdkernels.listing import EXPONENTIALS, cost, spelled_cost
from kdkernels.trainer.losses import describe

CATALOGUE = sorted(kd.catalogue().items())


@pytest.mark.parametrize("name, cls", CATALOGUE)
def test_every_loss_has_its_formula_paper_and_cost(name, cls):
    _, formula, paper = describe(cls)
    assert re.match("`[^`]+`", cls.__doc__) and "`" not in formula
    assert re.search(r"(19|20)\d\d", paper)
    assert re.search(r"\d* exp", spelled_cost(cls()))
    if name != "AKLLoss":  # which has points, and more to do
        assert (cost(cls()) is None) == bool(cls.work)


@pytest.mark.parametrize("name", [name for name, cls in CATALOGUE if cost(cls()) and not hasattr(cls, "phi")])
def test_the_exponentials_are_those_of_the_kernels(name):
    """Points with weights, and those whose coefficients in the gradient are not all 0, as the C++ finds them."""
    loss = kd.catalogue()[name]()
    s, t = torch.randn(2, 1, 50)
    statistics, gradient = tilts(loss, s, t, torch.tensor([3]))
    found = cost(loss)
    assert (found.statistics, found.gradient) == tuple(sum(any(pair) for pair in x) for x in (statistics, gradient))


def test_the_exponentials_of_phi():
    class Squared(kd.SeparableLoss):
        def phi(self, log_q, log_p):
            return (kd.tape.exp(log_q) - kd.tape.exp(log_p)) ** 2

    assert len(EXPONENTIALS) == 5
    assert cost(Squared()) == (3, 2 + 2, 1 + 2)  # both log-partitions; q and p once each in either sweep
    assert cost(kd.BrierLoss()).moved == cost(kd.CrossEntropyLoss()).moved == 2


@pytest.mark.parametrize("name, cls", CATALOGUE)
def test_every_formula_is_mathematics(name, cls):
    for formula in re.findall("`([^`]+)`", cls.__doc__.split("\n")[0]):
        written = latex(formula)
        assert written.count("{") == written.count("}") and written.count("(") == formula.count("(") - len(
            re.findall(r"\^\(|sqrt\(", formula)
        )


@pytest.mark.parametrize(
    "formula, written",
    [
        ("p_i^(1 - alpha) / 2", r"p_{i}^{1 - \alpha} / 2"),
        ("KL(p^ || q), p^_i = sqrt(p_i)", r"\mathrm{KL}(\hat{p} \parallel q),\quad \hat{p}_{i} = \sqrt{p_{i}}"),
        ("sum_{j: t_j <= t_i} e^{s_j}", r"\sum_{j: t_{j} \le t_{i}}\,e^{s_{j}}"),
        ("q_.k q_(i)", r"q_{\cdot k}\,q_{(i)}"),
        ("P'_g ~ P_g", r"P^{\prime}_{g} \propto P_{g}"),
    ],
)
def test_formulas_as_latex(formula, written):
    assert latex(formula) == written


@pytest.mark.parametrize("formula", ["nonsense(p)", "p & q", "KL(p; q)"])
def test_what_is_no_formula_is_refused(formula):
    with pytest.raises(ValueError, match=r"nonsense|cannot read"):
        latex(formula)


def test_the_reference_is_built_and_has_every_loss_with_its_formula_set(tmp_path):
    """In a process of its own: it rewrites docstrings."""
    build = [sys.executable, "-m", "benchmarks.pages.reference", "--out", str(tmp_path)]
    done = subprocess.run(build, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "kdkernels.html").read_text()
    for name, _ in CATALOGUE:
        (section,) = re.findall(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
        assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in section, name
        assert f'<a href="#{name}">{name}</a></td><td><math' in page, name  # in the table of the catalogue
    for module in ("parallel", "tape", "metrics", "cache"):
        assert (tmp_path / "kdkernels" / f"{module}.html").exists(), module
