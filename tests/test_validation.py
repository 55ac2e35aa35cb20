"""`python -m benchmarks.validation`: what it shares, what it repeats, and what it says of the trends."""

import functools
import json
from concurrent.futures import Future

import pytest
import torch
import torch.nn.functional as F

from benchmarks import curves, expected, validation
from benchmarks.sharing import sharing
from kdkernels.trainer import images, lab, recipes, report
from kdkernels.trainer.lab import Lab, Update


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(images.Pairs.__init__, "__defaults__", (200, 100, 0.15, 1.0, 0))
    monkeypatch.setattr(lab, "Pairs", functools.cache(images.Pairs))


def test_two_recipes_from_end_to_end(small, monkeypatch, tmp_path, capsys):
    """In this process; then again, when nothing is left to do; then with a recipe that fails."""

    class Processes:
        def __init__(self, jobs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, task):
            ran.append(task)
            done: Future = Future()
            done.set_result(function(task))
            return done

    ran: list = []
    monkeypatch.setattr(validation, "processes", Processes)
    places = {f"--{name}": str(tmp_path / name) for name in ("out", "cache", "results")}
    given = ["--recipe", "kd", "ttm", "--seeds", "2", "--share", "0.004", *(x for pair in places.items() for x in pair)]
    assert validation.main(given) == 0
    assert ran == [("kd", 0), ("ttm", 0), ("kd", 1), ("ttm", 1)]
    record = json.loads((tmp_path / "results/validation.json").read_text())
    assert [one["recipe"] for one in record["recipes"]] == ["kd", "ttm"] and "torch" in record["machine"]
    first, second = record["recipes"]
    assert first["arms"]["KD"] == second["arms"]["KD"] and len(second["arms"]["TTM"]) == 2
    assert len(list((tmp_path / "out/common").glob("kd-*.safetensors"))) == 2  # one a seed, of both recipes
    table = (tmp_path / "results/validation.md").read_text()
    assert table in capsys.readouterr().out and recipes.claim(recipes.load("kd")) in table
    assert sum(line.startswith("|") and " > " in line for line in table.splitlines()) == 3
    beside = json.loads((tmp_path / "results/validation-curves.json").read_text())["recipes"]
    assert len(beside) == 5 and all(one["float32"]["relative"] < 1e-4 for one in beside.values())
    assert all(one["float64"]["relative"] < 1e-9 and len(one["float64"]["fused"]) == 1 for one in beside.values())
    for name in ("validation", "validation-curves"):
        assert (tmp_path / f"results/{name}.png").read_bytes().startswith(b"\x89PNG")

    ran.clear()
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    record["recipes"][1]["commit"] = "earlier"
    (tmp_path / "results/validation.json").write_text(json.dumps(record))
    assert validation.main(["--recipe", "kd", *given[3:], "--no-curves"]) == 0 and not ran  # and ttm stays
    again = json.loads((tmp_path / "results/validation.json").read_text())
    assert again["recipes"] == record["recipes"] and again["commit"] == first["commit"]
    assert f"commit {first['commit']} (kd), commit earlier (ttm)" in (tmp_path / "results/validation.md").read_text()
    assert validation.main([*given, "--no-curves"]) == 0 and not ran
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}

    monkeypatch.setattr(recipes.load("wttm"), "run", lambda lab: 1 / 0)
    assert validation.main(["--recipe", "kd", "wttm", *given[3:], "--no-curves"]) == 1
    assert "ZeroDivisionError: division by zero" in (tmp_path / "results/validation.md").read_text()


def test_what_cannot_be_run_is_said_before_anything_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(validation, "run_all", lambda *_: 1 / 0)
    places = {name: tmp_path / name for name in ("out", "cache", "results")}
    (tmp_path / "file").write_text("")
    wrong = [({"recipe": "nope"}, "unknown recipe 'nope'; known: abkd")]
    wrong += [({name: tmp_path / "file/below"}, "file/below cannot be written to") for name in places]
    for changed, message in wrong:
        with pytest.raises(SystemExit, match="2"):
            validation.main([f"--{name}={value}" for name, value in (places | changed).items()])
        assert message in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 500 << 20}))
    with pytest.raises(SystemExit, match="2"):
        validation.main([f"--{name}={value}" for name, value in places.items()])
    assert "too little room" in capsys.readouterr().err


def test_only_equal_runs_are_shared(small, tmp_path):
    """Equal by name, settings and first loss; finding out leaves a net as it was, and is not done to what has begun."""
    trained, spent = [], dict(teachers=0.0)

    def train(self, name, net, updates, **options):
        before = (self.folder / f"{name}.safetensors").exists()
        found = Lab.train(self, name, net, updates, **options)
        trained.append((self.folder.name, before))
        return found

    share = sharing(train, tmp_path / "common", spent)

    def run(folder, scale=1.0, **options):
        here = Lab(tmp_path / folder, tmp_path / "cache", 0, report.silent)
        net = here.student()
        update = Update(lambda b: scale * F.cross_entropy(net(b.images), b.labels), list(net.parameters()))
        return share(here, "net", net, [update], steps=2, **options).state_dict()

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))

    first, other = run("a"), run("b")
    assert trained == [("a", False), ("b", True)] and same(first, other)
    assert not same(first, run("c", scale=2.0)) and not same(first, run("d", size=32))
    assert trained[2:] == [("c", False), ("d", False)]
    plain = Lab(tmp_path / "e", tmp_path / "cache", 0, report.silent)
    net = plain.student()
    update = Update(lambda b: F.cross_entropy(net(b.images), b.labels), list(net.parameters()))
    assert same(first, plain.train("net", net, [update], steps=2).state_dict())
    assert same(first, run("a")) and trained[-1] == ("a", True)
    run("cache")
    assert spent["teachers"] > 0 and not list((tmp_path / "cache").glob("net-*"))


def test_the_slowest_lose_seeds_first():
    times = {"quick": 10.0, "slow": 100.0, "middle": 40.0}
    assert validation.fitting(times, 3, 1000) == dict.fromkeys(times, 3)
    assert validation.fitting(times, 3, 360) == {"quick": 3, "slow": 2, "middle": 3}
    assert validation.fitting(times, 3, 200) == {"quick": 3, "slow": 1, "middle": 1}
    assert validation.fitting(times, 3, 0) == dict.fromkeys(times, 1)


def test_the_textbook_of_a_curve_is_another_computation(small, monkeypatch, tmp_path):
    """A kernel that was wrong by a thousandth would show."""
    fused, textbook = curves.pairs()["kd"]
    monkeypatch.setattr(curves, "pairs", lambda: {"kd": (lambda *row: 1.001 * fused(*row), textbook)})
    assert curves.measure(tmp_path, tmp_path, share=0.004)["kd"]["float32"]["relative"] > 5e-4


@pytest.mark.parametrize("name", recipes.names())
def test_a_docstring_expects_what_was_measured(name):
    """To its last digit: `python -m benchmarks.expected --write` after a run of `benchmarks.validation`."""
    recipe, found = recipes.load(name), expected.records(validation.ROOT / "benchmarks/results/validation.json")
    assert expected.said(recipe.__doc__) == expected.wanted(recipe, found.get(name, {}))


def test_docstrings_are_filled_in(monkeypatch, tmp_path, capsys):
    recipe = type("Recipe", (), dict(TREND=[("A", "B"), ("A", "C")], __file__=tmp_path / "one.py"))
    recipe.__doc__ = "Of a paper.\n\nExpected (mean of 2 seeds):\n\n    A 1.0 > B 0.0: yes\n"
    recipe.__file__.write_text(f'"""{recipe.__doc__}"""\n\nimport math\n')
    monkeypatch.setattr(expected.recipes, "names", lambda: ["one"])
    monkeypatch.setattr(expected.recipes, "load", lambda name: recipe)
    record = {"recipe": "one", "arms": {"A": [2.04, 2.14, 2.0], "B": [1.0, 1.1, 1.2]}}
    (tmp_path / "validation.json").write_text(json.dumps({"recipes": [record]}))
    assert expected.main(["--write", "--results", str(tmp_path / "validation.json")]) == 0
    new = "Expected (mean of 3 seeds):\n\n    A 2.1 > B 1.1: yes\n    A > C: not measured yet\n"
    assert capsys.readouterr().out == f"one\n{new}\n"
    assert recipe.__file__.read_text() == f'"""Of a paper.\n\n{new}"""\n\nimport math\n'


def test_the_large_vocabulary_goes_on_with_the_runs_that_have_begun(monkeypatch, tmp_path):
    commands = []

    def run(command, check):
        commands.append(command)
        out = next(x for x in tmp_path.iterdir() if str(x) in command)
        table = {"cross-entropy only": {"acceptance": 0.5}, "distilled": {"acceptance": 0.5 + len(commands) / 100}}
        (out / "results.json").write_text(json.dumps({"table": table}))

    for loss in validation.FULL:
        for seed in range(2):
            (tmp_path / f"full-{loss}-{seed}").mkdir()
    (tmp_path / "full-jsd-1" / "config.json").write_text("{}")
    monkeypatch.setattr(validation.subprocess, "run", run)
    found = validation.large(type("Options", (), dict(out=tmp_path, cache="c", seeds=2, share=0.1)))
    assert found["arms"]["wttm"] == pytest.approx([51, 55]) and found["arms"]["cross-entropy"] == [50, 50]
    assert [x["holds"] for x in found["trend"]] == ["within noise"] * 2 + ["yes"] * 2  # 3, 4, 5, 6 +- 4
    assert commands[-1][3:] == ["distill", "--resume", str(tmp_path / "full-jsd-1")]
    assert commands[0][3:8] == ["distill", "--loss", "wttm", "--seed", "0"]
    assert commands[0][-4:] == ["--steps", "15", "--teacher-steps", "100"]
