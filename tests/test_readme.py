"""Every block of Python in the README runs, and says what it says; so do the examples it names."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import kdkernels as kd
from benchmarks.examples import plain
from kdkernels import cli

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "benchmarks" / "pages"
README = (ROOT / "README.md").read_text()
WRITTEN = ["README.md", *(str(x.relative_to(ROOT)) for x in PAGES.glob("*.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def names(group=None):
    """What the blocks take for granted: a batch, a head, hidden states, a group of ranks."""
    torch.manual_seed(0)
    rows, classes, width = 6, 300, 8
    student_logits, teacher_logits = torch.randn(2, rows, classes)
    return dict(
        kdkernels=kd, torch=torch, F=F, T=2.0, s=student_logits.requires_grad_(), t=teacher_logits,
        student_logits=student_logits, teacher_logits=teacher_logits, labels=torch.randint(classes, (rows,)),
        loss_fn=kd.ForwardKLLoss(), loss=kd.ForwardKLLoss(), logits=(student_logits * 1.0),
        hidden=torch.randn(rows, width, requires_grad=True), teacher_hidden=torch.randn(rows, width),
        student_columns=student_logits, teacher_columns=teacher_logits, tensor_parallel_group=group,
        lm_head=torch.nn.Linear(width, classes, bias=False), teacher_head=torch.randn(classes, width),
    )  # fmt: skip


@pytest.mark.parametrize("block", [x for x in BLOCKS if "torchrun" not in x])  # that one is in test_parallel.py
def test_every_block_of_the_readme_runs(block, group):
    given = names(group)
    exec(textwrap.dedent(block), given)
    for value in (given.get("value"), given.get("loss")):
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all() and value > 0
    for cls in [x for x in given.values() if isinstance(x, type) and issubclass(x, kd.BaseLoss)]:
        s, t = given["s"].detach(), given["t"]
        assert cls()(s, t) > 0 and abs(cls()(t, t)) < 1e-6


def test_the_drop_in_is_the_same_number():
    """Both sides of the first diff are run."""
    lines = next(x for x in DIFFS if "F.kl_div" in x).splitlines()
    found = []
    for sign in "-+":
        given = names()
        exec("\n".join(line[1:] for line in lines if line[:1] == sign), given)
        (gradient,) = torch.autograd.grad(given["loss"], given["s"])
        found.append((given["loss"], gradient))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("page", WRITTEN)
def test_links_lead_somewhere(page):
    found = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    gone = [x for x in found if "://" not in x and not ((ROOT / page).parent / x.strip()).exists()]
    assert not gone


@pytest.mark.parametrize("page", [*WRITTEN, "CONTRIBUTING.md"])
def test_commands_exist_and_have_these_flags(page):
    text = (ROOT / page).read_text()
    assert [x for x in re.findall(r"python -m (benchmarks[\w.]*\w)", text) if not importlib.util.find_spec(x)] == []
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)) <= {*targets, "PYTHON"}
    (commands,) = (x.choices for x in cli.parser()._actions if isinstance(x.choices, dict))
    for command, rest in re.findall(r"(?:^|`|-m )kdkernels ([a-z]+)( [^`\n]*)?[`\n]", text, re.MULTILINE):
        assert set(re.findall(r"--[a-z-]+", rest)) <= commands[command]._option_string_actions.keys(), (command, rest)


def test_the_gallery_is_whole():
    gallery = (PAGES / "gallery.md").read_text()
    figures = [*PAGES.glob("*.png"), *(ROOT / "benchmarks" / "results").glob("*.png")]
    assert [x.name for x in figures if f"]({os.path.relpath(x, PAGES)})" not in gallery] == []


def test_eight_lines_are_eight():
    block = next(x for x in BLOCKS if "(kdkernels.Loss)" in x)
    own = block[block.index("class ") :].split("\n\n\n")[0]
    assert len([line for line in own.splitlines() if line.strip()]) <= 8


def test_plain_pytorch_learns():
    losses = plain.example(steps=20)
    assert losses[-1] < 0.9 * losses[0]


def test_lightning_learns():
    """In a process of its own: Lightning's own deprecation warnings are not ours."""
    code = "from benchmarks.examples.lightning import example; x = example(10); assert x[-1] < 0.8 * x[0], x"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
