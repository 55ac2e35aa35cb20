"""The trainer end to end on a tiny model: results, kill and resume, damage, cache."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import kdkernels as kd

TINY = (
    "--hidden 32 --ffn 64 --heads 2 --layers 2 --keep-layers 0 --seq-len 32 --batch 8 --teacher-batch 8 --threads 1 "
    "--teacher-steps 60 --teacher-lr 1e-2 --steps 30 --lr 3e-3 --eval-every 15 --checkpoint-every 5 "
    "--curve-tokens 256 --val-tokens 2048"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a little text and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "text").mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in "argparse ast bdb calendar cmd codecs copy csv dis enum heapq inspect pdb shutil string".split():
        shutil.copy(library / f"{name}.py", folder / "text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(path) for path in sorted((folder / "text").iterdir())], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def command(*arguments):
    return [sys.executable, "-m", "kdkernels", "distill", *map(str, arguments)]


def environment():
    """Separate processes: the trainer sets threads, determinism and the allocator of the process it runs in."""
    here = str(Path(kd.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}


def run(*arguments, **options):
    return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, **options)


def fresh(place, out, cache):
    places = {"--text": place / "text", "--tokenizer": place / "tokenizer.json", "--out": out, "--cache": cache}
    return [*TINY, *(part for pair in places.items() for part in pair)]


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run."""
    done = run(*fresh(place, place / "whole", place / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "whole", done.stdout


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def table_of(folder):
    return json.loads((folder / "results.json").read_text())["table"]


def test_results(whole):
    folder, shown = whole
    table = table_of(folder)
    teacher, start, ce, distilled = table.values()
    assert list(table)[-1] == "distilled, WTTMLoss"
    assert "WTTMLoss(gamma=0.5, temperature=2, teacher_temperature=1)" in shown
    assert teacher["kl"] == 0 and teacher["agreement"] == 1 and teacher["acceptance"] == pytest.approx(1, abs=1e-5)
    for figures in (start, ce, distilled):
        assert figures["kl"] > 0 and figures["ce"] > 0
        assert 0 < figures["acceptance"] < 1 and 0 < figures["agreement"] < 1
    assert distilled["kl"] < 0.7 * ce["kl"] and distilled["kl"] < 0.7 * start["kl"]
    assert distilled["acceptance"] > ce["acceptance"] + 0.01
    assert all(word in shown for word in ("held-out text", "validation CE", "KL to teacher", "distilled", "tok/s"))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*"))


def test_journal(whole):
    found = records(whole[0])
    assert [r["step"] for r in found if r["stage"] == "teacher"] == list(range(1, 61))
    student = [r["step"] for r in found if r["stage"] == "student" and "loss" in r]
    assert student == list(range(1, 31))
    assert [r["step"] for r in found if "held_out" in r] == [0, 15, 30]


@pytest.mark.parametrize("stage, steps", [("teacher", 60), ("student", 30)])
def test_kill_and_resume(place, whole, stage, steps, tmp_path):
    """Killed at a random step, the last journal line cut short: the resumed run ends in the same bytes."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    if stage == "student":  # the teacher is not what is tested: take the finished one
        shutil.copytree(place / "cache", cache)
    at = random.randrange(2, steps - 2)
    kill_at_step(command(*fresh(place, out, cache)), out / "metrics.jsonl", stage, at)
    assert not (out / "results.json").exists(), f"finished before it could be killed at {stage} step {at}"
    with open(out / "metrics.jsonl", "a") as journal:
        journal.write('{"stage": "student", "st')
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (out / f".checkpoint.safetensors.{gone.pid}.tmp").write_bytes(b"half")

    done = run("--resume", out)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = place / "whole"
    for name in ("ce.safetensors", "distilled.safetensors"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), f"{name}, killed at {stage} step {at}"
    assert table_of(out) == table_of(reference)
    assert not list(out.glob(".*"))
    mine, theirs = ([r for r in records(f) if r["stage"] in (stage, "student")] for f in (out, reference))
    assert mine == theirs


def kill_at_step(arguments, journal, stage, step):
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        wanted = f'"stage": "{stage}", "step": {step},'
        while not (journal.exists() and wanted in journal.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, f"never reached {stage} step {step}"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_damaged_checkpoint_and_cached_teacher(place, whole, tmp_path):
    """One run on the cached teacher, stopped by a checkpoint with a flipped bit."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    for name in ("results.json", "ce.safetensors"):
        (out / name).unlink()
    path = out / "checkpoint.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    before = {p.name: p.stat().st_mtime_ns for p in (place / "cache").iterdir()}
    done = run("--resume", out)
    assert done.returncode == 2 and str(path) in done.stderr and "damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert "teacher: 1/" not in done.stdout  # not trained again
    assert {p.name: p.stat().st_mtime_ns for p in (place / "cache").iterdir()} == before

    path.write_bytes(raw[: len(raw) // 2])
    done = run("--resume", out)
    assert done.returncode == 2 and str(path) in done.stderr and "damaged" in done.stderr


def test_finished_run_shows_its_table(whole):
    done = run("--resume", whole[0])
    assert done.returncode == 0 and "held-out text" in done.stdout


def test_full_disk(place, tmp_path):
    """A file that may not grow stands for a disk that is full."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run(*fresh(place, tmp_path / "out", tmp_path / "cache"), preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"cannot write {tmp_path / 'cache'}" in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []
