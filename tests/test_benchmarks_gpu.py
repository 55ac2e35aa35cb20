"""The command for a GPU machine, rehearsed: a slip in it would waste time on a device."""

import json

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.report import lines

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the command itself can be run here")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    main(["--dry-run", "--out", str(out)])
    return json.loads((out / "gpu-dry-run.json").read_text()), out


def test_every_step_finishes_and_finds_nothing_wrong(result):
    steps = result[0]["steps"]
    assert list(steps) == ["check cuda 1", "check cuda 2", "check triton", "measure"]
    for name, step in steps.items():
        assert step["code"] == 0, step["output_tail"]
        assert step["finished"] and step["seconds"] > 0
        if name != "measure":
            assert step["checked"] == step["planned"] > 0 and not step["faults"]
            assert set(step["properties"].values()) == {"ok"}


def test_measurements_have_every_mode_and_contender(result):
    found = result[0]["steps"]["measure"]
    assert found["done"] == found["planned"] and not found["errors"]
    assert found["contenders"] == ["cuda 1", "cuda 2"]
    assert {(c["loss"], c["mode"]) for c in found["cells"]} == {
        (loss, mode) for loss in ("KD", "ForwardKL") for mode in ("step", "half", "out", "forward")
    }
    for cell in found["cells"]:
        assert all(isinstance(ms, float) for ms in cell["ms"].values()), cell["ms"]
        assert cell["roof"]["bytes"] > 0 and cell["roof"]["exp"] > 0
    assert "eager" in found["cells"][0]["ms"] and "wall" in found["cells"][0]


def test_the_table_fits_a_short_log(result):
    table = list(lines(result[0]["steps"]["measure"]))
    assert len(table) == 2 and all(len(line) < 160 for line in table), table
    assert "eager" in table[0] and "forward" in table[0]


def test_a_result_can_be_drawn_later(result):
    image = result[1] / "gpu-dry-run.png"
    image.unlink()
    main(["--plot", str(result[1] / "gpu-dry-run.json")])
    assert image.stat().st_size > 1000
