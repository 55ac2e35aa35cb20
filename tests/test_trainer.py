"""The trainer end to end on a tiny model: results, kill and resume, damage, cache."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import transformers
from tensorboard.backend.event_processing import event_accumulator
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import kdkernels as kd
from kdkernels.trainer.config import Config
from kdkernels.trainer.data import Corpus

TINY = (
    "--hidden 32 --ffn 64 --heads 2 --layers 2 --keep-layers 0 --seq-len 32 --batch 8 --teacher-batch 8 --threads 1 "
    "--teacher-steps 60 --teacher-lr 1e-2 --steps 30 --lr 3e-3 --eval-every 15 --checkpoint-every 5 "
    "--curve-tokens 256 --val-tokens 2048"
).split()

KILLS = [
    "teacher 3",  # before the first checkpoint
    "teacher 33",  # between two
    "student 0",  # during the first measurement
    "student 3",  # after it, before the first checkpoint
    "student 12",  # between two
    "checkpoint.safetensors 3",  # written, not yet in its place
    "ce.safetensors 1",  # after the last checkpoint, the final table not yet written
    "results.json 1",
]


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


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """call(*arguments, kill="", command="distill", ranks=1) -> exit status, output of the first rank. A process of its
    own, without the seconds that importing takes: it is forked from one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kdkernels.trainer.caching", "transformers.models.llama.modeling_llama", "matplotlib.pyplot", "rich", "pytest"]
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    log = tmp_path_factory.mktemp("forked") / "log"

    def call(*arguments, kill="", command="distill", ranks=1):
        given = [command, *map(str, arguments)]
        world = [{}] if ranks == 1 else [started(rank, ranks, log.parent / "port") for rank in range(ranks)]
        logs = [log.with_suffix(f".{rank}") for rank in range(ranks)]
        processes = [context.Process(target=child, args=(given, *one, kill)) for one in zip(logs, world, strict=True)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            process.kill()  # nothing happens to one that has ended
            process.join()
        return processes[0].exitcode, logs[0].read_text()

    return call


def started(rank, ranks, folder):
    """The environment that torchrun gives a rank, at a port that is free."""
    if rank == 0:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            folder.write_text(str(free.getsockname()[1]))
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
            "MASTER_PORT": folder.read_text()}  # fmt: skip


def child(arguments, log, variables, kill):
    os.environ.update(variables)
    from kdkernels.cli import main
    from kdkernels.trainer import caching

    caching.SHARD_BYTES = 1 << 18  # the caches here are small
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if kill:
        arm(*kill.split())
    sys.exit(main(arguments))


def arm(what, number):
    """Die of SIGKILL when a stage has half a step's record on disk, or before a file takes its place that often."""
    from kdkernels.trainer import checkpoint

    write, replace, places = checkpoint.Journal.write, os.replace, []

    def write_half(journal, **record):
        write(journal, **record)
        if (record["stage"], record["step"]) == (what, int(number)):
            os.truncate(journal.path, journal.path.stat().st_size - 20)
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_late(source, target):
        places.append(Path(target).name)
        if places[-1] == what and places.count(what) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    checkpoint.Journal.write, os.replace = write_half, replace_late


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
    assert list(table)[-1] == "distilled: WTTM (gamma 0.5, T 2, teacher T 1)"
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


@pytest.mark.parametrize("kill", KILLS)
def test_kill_and_resume(place, whole, forked, kill, tmp_path):
    """The resumed run ends in the same bytes, wherever it was killed."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    teacher_too = kill.startswith("teacher")
    if not teacher_too:  # the teacher is not what is tested: take the finished one
        shutil.copytree(place / "cache", cache)
        [teacher] = cache.glob("teacher-*")
        teacher.with_suffix(".partial.safetensors").write_bytes(b"of a run killed before it could remove this")
    status, shown = forked(*fresh(place, out, cache), kill=kill)
    assert status == -signal.SIGKILL, shown

    status, shown = forked("--resume", out)
    assert status == 0, shown
    for name in ("checkpoint.safetensors", "ce.safetensors", "distilled.safetensors"):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes(), name
    assert table_of(out) == table_of(whole[0])
    stages = {"teacher", "student"} if teacher_too else {"student"}
    assert records(out) == [r for r in records(whole[0]) if r["stage"] in stages]
    assert contents(cache) == contents(place / "cache")
    assert not list(out.glob(".*"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resume_with_another_cache(place, whole, forked, tmp_path):
    """The teacher is trained again; its records still stand before the students'."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (out / "results.json").unlink()
    status, shown = forked("--resume", out, "--cache", tmp_path / "cache")
    assert status == 0, shown
    assert records(out) == records(whole[0]) and table_of(out) == table_of(whole[0])


def test_damaged_checkpoint_and_cached_teacher(place, whole, forked, tmp_path):
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
    status, shown = forked("--resume", out)
    assert status == 2 and str(path) in shown and "damaged" in shown
    assert "Traceback" not in shown
    assert "teacher: 1/" not in shown  # not trained again
    assert {p.name: p.stat().st_mtime_ns for p in (place / "cache").iterdir()} == before

    path.write_bytes(raw[: len(raw) // 2])
    status, shown = forked("--resume", out)
    assert status == 2 and str(path) in shown and "damaged" in shown


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 3), ("fsdp", 2)])
def test_ranks(place, whole, forked, kind, ranks, tmp_path):
    """They learn what one learns from the same batches, and go on after a kill in the same bytes. FSDP2 by torchrun."""
    flags = [*fresh(place, tmp_path / "out", place / "cache"), "--parallel", kind]
    if kind == "fsdp":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*torchrun, *command(*flags)[1:]], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("held-out text") == 1, done.stdout + done.stderr
    else:
        status, shown = forked(*flags, ranks=ranks)
        assert status == 0, shown
    near(tmp_path / "out", whole[0])
    flags[flags.index("--out") + 1] = tmp_path / "killed"
    status, shown = forked(*flags, kill="student 12", ranks=ranks)
    assert status == -signal.SIGKILL, shown
    status, shown = forked("--resume", tmp_path / "killed", ranks=ranks)
    assert status == 0, shown
    for name in ("ce.safetensors", "distilled.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert records(tmp_path / "killed") == records(tmp_path / "out")
    check_board(tmp_path / "killed")


def near(folder, whole):
    """The same losses and table to rounding."""
    mine, theirs = ([r for r in records(x) if r["stage"] == "student"] for x in (folder, whole))
    for a, b in zip(mine, theirs, strict=True):
        assert a.get("loss", {}) == pytest.approx(b.get("loss", {}), rel=1e-4)
    for figures, others in zip(table_of(folder).values(), table_of(whole).values(), strict=True):
        assert figures == pytest.approx(others, abs=2e-3)


def test_accumulated_gradients(place, whole, forked, tmp_path):
    """Three parts, of which the last has fewer rows: what one part learns."""
    status, shown = forked(*fresh(place, tmp_path / "out", place / "cache"), "--accumulate", "3")
    assert status == 0 and "distilled agreement 0." in shown, shown
    near(tmp_path / "out", whole[0])
    check_board(tmp_path / "out")


def check_board(folder):
    """TensorBoard has what the journal has, once."""
    found = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    journal = [r for r in records(folder) if r["stage"] == "student"]
    for name in ("ce", "distilled"):
        losses = [(r["step"], r["loss"][name]) for r in journal if "loss" in r]
        held = [(r["step"], r["held_out"][name]["agreement"]) for r in journal if "held_out" in r]
        assert len(losses) == 30 and len(held) == 3
        for tag, want in ((f"student/loss/{name}", losses), (f"student/held_out/{name}/agreement", held)):
            points = found.Scalars(tag)
            assert [point.step for point in points] == [step for step, _ in want]
            assert [point.value for point in points] == pytest.approx([value for _, value in want])


def test_finished_run_shows_its_table(whole):
    done = run("--resume", whole[0])
    assert done.returncode == 0 and "held-out text" in done.stdout


def test_probe_of_a_run(place, whole, forked, tmp_path):
    """The figures that the run's own table has too; and what it says of a folder that lacks something."""
    status, shown = forked(whole[0], "--tokens", "2048", "--out", tmp_path / "probe", command="probe")
    assert status == 0 and "distilled: logit(q_c) = " in shown, shown
    saved, table = json.loads((tmp_path / "probe" / "probe.json").read_text()), table_of(whole[0])
    for name, row in (("ce", "cross-entropy only"), ("distilled", list(table)[-1])):
        figures = saved[name]
        assert figures["student"]["cross_entropy"] == pytest.approx(table[row]["ce"], rel=1e-5)
        assert figures["teacher"]["cross_entropy"] == pytest.approx(table["teacher"]["ce"], rel=1e-5)
        for key in ("kl", "agreement", "acceptance"):
            assert figures[key] == pytest.approx(table[row][key], rel=1e-4)
        assert (tmp_path / "probe" / f"{name}.png").exists()
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    status, shown = forked(tmp_path / "run", command="probe")
    assert status == 2 and "has not finished" in shown, shown


def test_full_disk(place, tmp_path):
    """A file that may not grow stands for a disk that is full."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run(*fresh(place, tmp_path / "out", tmp_path / "cache"), preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"cannot write {tmp_path / 'cache'}" in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def cached(place, cache, out, *more):
    """The flags of `kdkernels cache`: the run's, but for what belongs to its students."""
    students = ("--keep-layers", "--lr", "--eval-every", "--curve-tokens", "--val-tokens")
    given = [str(x) for x in fresh(place, out, cache)]
    return [x for pair in zip(given[::2], given[1::2], strict=True) if pair[0] not in students for x in pair] + [*more]


@pytest.fixture(scope="module")
def teacher_cache(place, whole, forked):
    """The 12 most likely of all tokens, written by a run that was killed twice."""
    flags = cached(place, place / "cache", place / "top-12", "--top-k", "12")
    for kill in ("shard-00001.safetensors 1", "index.json 2"):
        status, shown = forked(*flags, kill=kill, command="cache")
        assert status == -signal.SIGKILL, shown
        with pytest.raises(kd.cache.CacheError, match="not complete"):
            kd.cache.Reader(place / "top-12")
    status, shown = forked(*flags, command="cache")
    assert status == 0 and "240 sequences of 32 tokens, 12 of 400 classes" in shown, shown
    return place / "top-12"


def test_a_cache_of_a_killed_run_is_that_of_a_whole_one(place, teacher_cache, forked, tmp_path):
    """With the teacher's file given, from another folder of text and teachers."""
    [teacher] = (place / "cache").glob("teacher-*")
    flags = cached(place, tmp_path / "cache", tmp_path / "out", "--top-k", "12", "--teacher", teacher)
    status, shown = forked(*flags, command="cache")
    assert status == 0 and "teacher: " not in shown, shown
    assert contents(tmp_path / "out") == contents(teacher_cache)
    status, shown = forked(*flags, command="cache")
    assert status == 0 and contents(tmp_path / "out") == contents(teacher_cache)


def test_a_cache_of_a_hugging_face_model(place, forked, tmp_path):
    """With more classes than the tokenizer: they are padding. Only whole models of the right size are taken."""
    config = transformers.LlamaConfig(vocab_size=448, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    model, folder = transformers.LlamaForCausalLM(config).eval(), tmp_path / "model"
    model.save_pretrained(folder)
    shutil.copy(place / "tokenizer.json", folder)
    flags = cached(place, tmp_path / "cache", tmp_path / "out", "--top-k", "9", "--teacher", folder, "--steps", "3")
    at = flags.index("--tokenizer")
    del flags[at : at + 2]
    status, shown = forked(*flags, command="cache")
    assert status == 0 and "24 sequences of 32 tokens, 9 of 400 classes" in shown, shown
    reader = kd.cache.Reader(tmp_path / "out")
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    corpus = Corpus(Config(text=[given["--text"]], tokenizer=str(folder / "tokenizer.json"), cache=given["--cache"],
                           seq_len=32, batch=8, teacher_batch=8, seed=int(given.get("--seed", 0))))  # fmt: skip
    inputs, _ = corpus.load(lambda *_: None).batch(1, 2, 8)
    with torch.no_grad():
        want = kd.SparseTeacher.from_logits(model(inputs[5:6]).logits[0], 9, vocab_size=400)
    got = reader.example(21, inputs[5])
    assert torch.equal(got.indices, want.indices) and (got.log_tail - want.log_tail).abs().max() < 1e-3
    for spoil, message in [(dict(max_position_embeddings=16), "its max_position_embeddings is 16"),
                           (dict(vocab_size=300), "(size mismatch|lack|vocab_size is 300)"),
                           (dict(num_hidden_layers=2), "lack 9 of the model's weights")]:  # fmt: skip
        transformers.LlamaConfig.from_dict(config.to_dict() | spoil).save_pretrained(folder)
        status, shown = forked(*flags, "--out", tmp_path / "other", command="cache")
        assert status == 2 and re.search(message, shown) and "Traceback" not in shown, shown
    (folder / "model.safetensors").unlink()
    status, shown = forked(*flags, command="cache")
    assert status == 2 and "no .safetensors file" in shown, shown


def test_distilled_from_a_cache(place, whole, teacher_cache, forked, tmp_path):
    """The student without a teacher is the same to the last bit, the other one learns as from the whole teacher."""
    flags = [*fresh(place, tmp_path / "out", place / "cache"), "--teacher-cache", teacher_cache]
    status, shown = forked(*flags, kill="student 12")
    assert status == -signal.SIGKILL, shown
    status, shown = forked("--resume", tmp_path / "out")
    assert status == 0, shown
    assert (tmp_path / "out" / "ce.safetensors").read_bytes() == (whole[0] / "ce.safetensors").read_bytes()
    name = "distilled: WTTM (gamma 0.5, T 2, teacher T 1)"
    mine, theirs = table_of(tmp_path / "out"), table_of(whole[0])
    assert mine["cross-entropy only"] == theirs["cross-entropy only"]
    assert mine[name]["kl"] < 0.7 * theirs["cross-entropy only"]["kl"]
    assert "tail='spread'" in shown


def test_a_cache_of_all_classes_is_the_teacher(place, whole, forked, tmp_path):
    """But for the rounding of its log-probabilities to float16; in parts of a batch too."""
    out = tmp_path / "all"
    status, shown = forked(*cached(place, place / "cache", out, "--top-k", "400"), command="cache")
    assert status == 0, shown
    flags = [*fresh(place, tmp_path / "out", place / "cache"), "--teacher-cache", out, "--accumulate", "3"]
    status, shown = forked(*flags)
    assert status == 0, shown
    mine, theirs = ([r["loss"]["distilled"] for r in records(x) if r["stage"] == "student" and "loss" in r]
                    for x in (tmp_path / "out", whole[0]))  # fmt: skip
    assert mine == pytest.approx(theirs, rel=5e-3) and mine[0] == pytest.approx(theirs[0], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "--teacher-cache: .* another cache: its (teacher|data) is"),
        (["--batch", "4"], "another cache: its data is .*8 x 32', not '.*4 x 32'"),
        (["--steps", "31"], "--teacher-cache must be a cache of 248 sequences or more"),
        (["--loss", "kd", "--temperature", "2"], "tail at temperature 1, and the loss has a teacher at 2"),
        (["--loss", "spearman"], "SpearmanLoss compares classes one by one"),
        (["--teacher-cache", "nowhere"], "nowhere has no teacher cache"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(place, teacher_cache, forked, tmp_path, flags, message):
    given = [*fresh(place, tmp_path / "out", place / "cache"), "--teacher-cache", teacher_cache, *flags]
    status, shown = forked(*given)
    assert status == 2 and re.search(message, shown) and "Traceback" not in shown, shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "401"], "--top-k must be between 1 and the 400 tokens, got 401"),
        (["--temperature", "0"], "temperature must be > 0, got 0"),
        (["--teacher", "nowhere"], "--teacher nowhere: no such file"),
        (["--top-k", "11"], "another cache: its k is 12, not 11"),
    ],
)
def test_a_cache_that_cannot_be_written(place, teacher_cache, forked, flags, message):
    status, shown = forked(*cached(place, place / "cache", teacher_cache, "--top-k", "12", *flags), command="cache")
    assert status == 2 and message in shown and "Traceback" not in shown, shown


def test_a_teacher_of_something_else(place, whole, forked, tmp_path):
    [text] = (place / "cache").glob("text-*")
    flags = cached(place, place / "cache", tmp_path / "out", "--teacher", text)
    status, shown = forked(*flags, command="cache")
    assert status == 2 and "not a teacher of this version of kdkernels" in shown, shown
