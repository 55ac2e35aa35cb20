"""The scripts behind the docs' pages, in miniature: that they run, and draw and write down what the pages show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainer import place  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent
pytest.importorskip("matplotlib")

# In a process of their own: the trainer sets threads and determinism.
MINIATURE = """
import sys
from pathlib import Path
from benchmarks import rank_distillation
from benchmarks.pages import rank_gradients

place, out = map(Path, sys.argv[1:])

class Small(rank_distillation.Config):
    def __init__(self, **settings):
        super().__init__(**settings | dict(
            text=[str(place / "text")], tokenizer=str(place / "tokenizer.json"), cache=str(out / "cache"), threads=1,
            hidden=32, ffn=64, heads=2, layers=2, keep_layers=[0], seq_len=32, batch=4, teacher_steps=20))

rank_distillation.Config = rank_gradients.Config = Small
rank_distillation.main(["--seeds", "2", "--steps", "3", "--weights", "0.5", "--top-k", "16", "--val-tokens", "128",
                        "--json", str(out / "distillation.json")])
rank_gradients.main(["--tokens", "96", "--rows", "2", "--steps", "3", "--out", str(out / "page"),
                     "--json", str(out / "gradients.json")])
"""


def numbers(x):
    if isinstance(x, dict | list):
        for part in x.values() if isinstance(x, dict) else x:
            yield from numbers(part)
    elif isinstance(x, float):
        yield x


def test_ranks_in_miniature(place, tmp_path):  # noqa: F811
    done = subprocess.run([sys.executable, "-c", MINIATURE, place, tmp_path], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mean ± sd of 2 seeds" in done.stdout and "the same minus KL alone" in done.stdout
    found = json.loads((tmp_path / "distillation.json").read_text())
    assert len(found["seeds"]) == 2 and list(found["summary"]) == ["KL", "KL + 0.5 Spearman top 16"]
    assert found["before"]["teacher"]["rho"] == pytest.approx(1) and found["before"]["teacher"]["kl"] == 0
    gradients = json.loads((tmp_path / "gradients.json").read_text())
    assert gradients["losses"]["Spearman"]["share"]["share"][-1] == pytest.approx(1)
    assert all(abs(x) < 1e300 for x in [*numbers(found), *numbers(gradients)])  # a NaN is not
    drawn = {path.name for path in (tmp_path / "page").iterdir() if path.stat().st_size > 5000}
    assert drawn == {path.name for path in (ROOT / "benchmarks/pages").glob("rank_gradients_*.png")}


@pytest.mark.parametrize("name", ["alpha_beta", "bayes_teacher"])
def test_figures_are_drawn_from_stored_numbers(name, tmp_path):
    stored = json.loads((ROOT / f"benchmarks/results/{name.replace('_', '-')}.json").read_text())
    __import__(f"benchmarks.pages.{name}", fromlist=["draw"]).draw(stored, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
