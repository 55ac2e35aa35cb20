"""The harness of the benchmarks: turns, cells, what goes on where it was stopped, tables made of JSON."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import textbook
import torch

import kdkernels as kd
from benchmarks import adversarial, bench, eager, harness, peers, readme
from kdkernels import cli

ROOT = Path(__file__).parents[1]
CATALOGUE = sorted(kd.catalogue())


@pytest.mark.parametrize("name", [*CATALOGUE, "SymmetricKL"])
def test_the_eager_formula_of_every_loss_is_the_loss(name):
    s, t, y = bench.inputs("7x60", "float64", "cpu")
    loss, formula = eager.pair(name, 60)
    t = t if loss.needs_teacher else None
    with kd.use_backend("reference"):
        value = loss(s, t, y)
    expected = formula(s, t, y)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (value, expected)), rtol=1e-6, atol=1e-10)


def test_contenders_take_turns_and_one_that_fails_costs_nothing():
    calls = []
    contenders = {"a": lambda: calls.append("a"), "bad": lambda: 1 / 0, "b": lambda: calls.append("b")}
    found = harness.turns(contenders, least=0, repeats=4)
    turns = ["".join(calls[-2 * k :][:2]) for k in (4, 3, 2, 1)]
    assert {"ab", "ba"} >= set(turns) and len(found["a"]) == len(found["b"]) == 4
    assert found["bad"].startswith("ZeroDivisionError")
    with pytest.raises(RuntimeError, match="bad: ZeroDivisionError"):
        harness.interleaved(contenders, least=0, repeats=1)


def test_slow_contenders_get_fewer_turns():
    found = harness.turns({"slow": lambda: time.sleep(0.02)}, least=0, repeats=100, seconds=0.05)
    assert 2 <= len(found["slow"]) < 20 and min(found["slow"]) >= 20


def test_what_is_quick_is_called_again_within_its_turn():
    calls = []
    found = harness.turns({"a": lambda: calls.append(time.sleep(0.002))}, least=0, repeats=3, turn=0.01)
    assert len(found["a"]) == 3 and 6 < len(calls) < 20 and min(found["a"]) >= 2


def test_peak_and_traffic_are_bytes():
    x = torch.ones(1000)
    assert 8000 <= harness.peak_bytes(lambda: (x + 1) * 2) < 8200  # scalars too
    assert harness.traffic(lambda: (x + 1).view(10, 100) * 2) == 16000


@pytest.fixture
def quick_peers(monkeypatch):
    """Without those that take seconds to import."""
    monkeypatch.setattr(peers, "PEERS", [p for p in peers.PEERS if not p.name.startswith(("TRL", "Liger"))])


def test_a_cell_names_every_contender_with_its_error(quick_peers):
    cell = bench.measure("ForwardKLLoss", "4x200", "float32", "cpu", ["cpu", "reference"], compiled=False, seconds=0.2)
    found = cell["contenders"]
    assert {"kdkernels cpu", "kdkernels cpu, out=", "kdkernels reference", "eager"} <= set(found)
    for who, one in found.items():
        assert one["low"] <= one["ms"] <= one["high"] and one["errors"]["gradient"] < 1e-5, (who, one)
        assert one["errors"]["value"] < 1e-5 and one["gb_s"] > 0 and one["of_copy"] > 0
    assert found["eager"]["of_eager"] == 1 and found["eager"]["moved"] > found["kdkernels cpu"]["moved"] >= 12
    assert found["kdkernels cpu, out="]["peak"] < 800 < found["eager"]["peak"]
    assert found["kdkernels cpu"]["exp_s"] > 0 and cell["missing"].keys() <= {p.name for p in peers.PEERS}


def test_an_error_is_seen():
    s, t, y = bench.inputs("4x50", "float64", "cpu")
    exact = bench.truth("ForwardKLLoss", s, t, y)
    right, wrong = (harness.step(lambda s, t, f=f: f * kd.ForwardKLLoss()(s, t), s, t) for f in (1, 1.01))
    assert max(bench.errors(right, s, None, exact).values()) < 1e-12
    assert min(bench.errors(wrong, s, None, exact).values()) == pytest.approx(0.01)


def test_what_was_measured_stays_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "found.json"
    harness.Results(path).keep("a", {"x": 1})
    later = harness.Results(path)
    assert later.known == {"a"} and harness.Results(path, again=True).known == set()
    later.keep("b", {"x": 2})
    monkeypatch.setattr(harness, "commit", lambda: "another")
    third = harness.Results(path)
    assert third.known == set() and third.cells["a"]["x"] == 1
    third.keep("a", {"x": 3})
    found = json.loads(path.read_text())
    assert found["runs"][found["cells"]["a"]["run"]]["commit"] == "another"
    assert found["runs"][found["cells"]["b"]["run"]]["commit"] != "another"


def test_the_command(tmp_path, capsys, monkeypatch, quick_peers):
    path, plot = tmp_path / "b.json", tmp_path / "b.png"
    asked = ["bench", "--loss", "tvd", "--quick", "--shape", "4x100", "--json", str(path), "--plot", str(plot)]
    monkeypatch.setattr(harness, "commit", lambda: "this")
    assert cli.main(asked) == 0
    assert "TVDLoss 4x100 float32" in capsys.readouterr().out and plot.stat().st_size > 1000
    monkeypatch.setattr(bench, "measure", None)  # nothing is left to do
    assert cli.main(asked) == 0
    (run,), about = json.loads(path.read_text())["runs"], harness.about()
    assert run["machine"] == about["machine"] and run["versions"] == about["versions"]


@pytest.mark.parametrize("wrong", [["--shape", "64"], ["--shape", "0x5"], ["--dtype", "int8"], ["--backend", "tpu"]])
def test_the_command_refuses(wrong):
    with pytest.raises(SystemExit):
        cli.main(["bench", *wrong])


def test_without_the_repository_it_says_so(tmp_path, monkeypatch, capsys):
    from kdkernels import benchmarking

    monkeypatch.setattr(benchmarking, "__file__", str(tmp_path / "kdkernels" / "benchmarking.py"))
    assert cli.main(["bench", "--quick"]) == 2
    assert "needs a clone of the repository" in capsys.readouterr().err


def test_adversarial_inputs_tell_a_good_loss_from_a_bad_one():
    good = adversarial.survived(kd.ForwardKLLoss(), "ForwardKLLoss")
    assert {k for k, v in good.items() if v != "ok"} <= {"bfloat16, extremes"}  # log z is lost beside 3e38
    naive = adversarial.survived(lambda s, t, y: eager.loss("ForwardKLLoss")[0](s, t, y), "ForwardKLLoss")
    assert naive["masked in the teacher"] == naive["no rows"] == "NaN" and naive["all ties"] == "ok"
    swapped = adversarial.survived(kd.ReverseKLLoss(), "ForwardKLLoss")
    assert swapped["bfloat16"] == "wrong" and swapped["teacher = student"] == "ok"
    raising = adversarial.survived(lambda s, t, y: s.nothing, "ForwardKLLoss")
    assert set(raising.values()) == {"raises AttributeError"}


def test_features_are_tried():
    ours = adversarial.features(kd.ForwardKLLoss, "ForwardKLLoss")
    assert ours == {"temperature": True, "ignored labels": True, "float64": True, "teacher's gradient": True,
                    "double backward": False}  # fmt: skip
    plain = adversarial.features(lambda: textbook.Case("ForwardKLLoss", textbook.forward_kl).loss, "ForwardKLLoss")
    assert plain["double backward"] and not plain["temperature"]


def test_a_peer_that_is_wrong_or_missing_is_no_contender():
    wrong = peers.Peer("wrong", "ForwardKLLoss", lambda: lambda s, t, y=None: s.sum())
    gone = peers.Peer("gone", "ForwardKLLoss", lambda: peers.of("no_such_library", "loss"))
    assert peers.made(wrong)[0] is None and "where the textbook gives" in peers.made(wrong)[1]
    assert peers.made(gone) == (None, "ModuleNotFoundError: No module named 'no_such_library'")
    assert peers.made(SimpleNamespace(gpu=True)) == (None, "needs a GPU")
    function, _ = peers.made(next(p for p in peers.PEERS if p.name == "torch linear_ce"))
    assert function


def test_tables_agree_with_what_was_measured():
    """`python -m benchmarks.readme` has nothing to write."""
    text = (ROOT / "README.md").read_text()
    assert readme.made(text) == text
    assert readme.peers_page(readme.of("peers-cpu")) == readme.PAGE.read_text()
    assert readme.speed_page() == readme.PAGE.with_name("speed.md").read_text()
    gallery = readme.GALLERY.read_text()
    assert readme.made(gallery, readme.IN_GALLERY) == gallery


def test_tables_name_every_run_that_a_cell_is_of_and_say_why_a_time_is_missing():
    run = dict(machine="A", versions={}, load=1.0)
    runs = [run | dict(commit="one"), run | dict(commit="two"), run | dict(commit="two", load=3.0)]
    timed = {"ms": 1.0, "peak": 1, "moved": 1, "errors": {"gradient": 0.0}}
    found = {"kdkernels cpu": timed, "slow": {"error": "Error: no memory"}}
    cell = dict(shape="2x3", dtype="float32", contenders=found)
    cells = {f"TVDLoss logits {k}": cell | dict(missing={"gone": "no such module"}, run=k) for k in range(3)}
    page = readme.peers_page({"runs": runs, "cells": cells})
    assert "| slow | Error: no memory | Error: no memory |" in page and "| gone | no such module |" in page
    assert "commit one; load of the machine 1.0" in page and "commit two; load of the machine 1.0 to 3.0" in page
    assert "commit one" not in readme.where({"runs": runs, "cells": {"b": cells["TVDLoss logits 1"]}})


def test_microkernels_fail_on_a_regression(tmp_path):
    """In units of eager torch; the stored ratio is lowered, as if the kernel had been faster."""
    here = [sys.executable, "-m", "pytest", "benchmarks/test_micro.py", "-q", "-p", "no:cacheprovider", "-k",
            "exponential and 2048", f"--benchmark-storage=file://{tmp_path}"]  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist

    def run(*more):
        return subprocess.run([*here, *more], cwd=ROOT, env=alone, capture_output=True, text=True, check=False)

    assert run("--benchmark-save=baseline").returncode == 0
    (path,) = tmp_path.rglob("*.json")
    stored = json.loads(path.read_text())
    stored["benchmarks"][0]["stats"]["median"] /= 100
    path.write_text(json.dumps(stored))
    done = run("--benchmark-compare", "--benchmark-compare-fail=median:900%")
    assert done.returncode != 0 and "Performance has regressed" in done.stdout + done.stderr
