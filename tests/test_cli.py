"""The command line: help, doctor, losses, and errors that say what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels.cli import main
from kdkernels.trainer import reproduce


def fails(capsys, *arguments):
    """-> the message of a run that must end with status 2."""
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_help_and_version(capsys):
    for arguments, words in {
        ("--help",): ["distill", "cache", "losses", "doctor"],
        ("cache", "--help"): "--teacher --top-k --temperature --quick --seed".split(),
        ("distill", "--help"): "--quick --resume --loss --gamma --set (default: --checkpoint-every".split(),
        ("probe", "--help"): ["logit(q_c)", "--tokens"],
        ("doctor", "--help"): ["backends"],
        ("losses", "--help"): ["formula"],
        ("--version",): ["kdkernels"],
    }.items():
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words), shown


@pytest.mark.parametrize("name", ["cuda", "nonesuch"])
def test_a_backend_that_cannot_run(name, tmp_path):
    """One line that says why; `doctor` answers, says the same and ends with status 1."""
    if kd.available_backends().get(name) == "ok":
        pytest.xfail(f"{name} runs here")
    environment = {**os.environ, "KDKERNELS_BACKEND": name}
    run = [sys.executable, "-m", "kdkernels"]
    quick = [*run, "distill", "--quick", "--out", str(tmp_path / "run"), "--cache", str(tmp_path)]
    failed = subprocess.run(quick, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and name in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
    doctor = subprocess.run([*run, "doctor"], env=environment, capture_output=True, text=True, check=False)
    assert doctor.returncode == 1 and f"KDKERNELS_BACKEND={name}, and every loss raises" in doctor.stdout, doctor.stdout


def test_unknown_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["distill", "--gama", "0.5"])
    assert end.value.code == 2 and "--gama" in capsys.readouterr().err


def test_doctor(capsys, monkeypatch):
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name, state in kd.available_backends().items():
        assert f"{name:<10} {state}" in shown
    assert "instruction set" in shown and "threads" in shown and "forced     none\n" in shown
    monkeypatch.setenv("KDKERNELS_BACKEND", "reference")
    assert main(["doctor"]) == 0
    assert "forced     KDKERNELS_BACKEND=reference\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "state, installs", [("no GPU", False), ("needs the module triton", True), ("no such kernels", False), ("ok", False)]
)
def test_doctor_advises_to_install_triton_only_where_it_is_missing(state, installs, capsys, monkeypatch):
    monkeypatch.setattr(kd, "available_backends", lambda: {"triton": state})
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    assert main(["doctor"]) == 0
    assert ("pip install '.[triton]'" in capsys.readouterr().out) == installs


@pytest.mark.parametrize(
    "name, torch_for, gpu, words, without",
    [
        ("cuda", None, False, ["a CUDA build of torch", "nvcc on PATH", "an NVIDIA GPU", "KDKERNELS_CUDA=1"], []),
        ("cuda", "cuda", True, ["nvcc of CUDA 13.0", "KDKERNELS_CUDA=1"], ["build of torch", "an NVIDIA GPU"]),
        ("cuda", "hip", True, ["Triton runs"], ["KDKERNELS_CUDA"]),
        ("triton", None, False, ["a CUDA build of torch", "a ROCm build", "TRITON_INTERPRET=1"], []),
        ("triton", "hip", False, ["TRITON_INTERPRET=1"], ["build of torch"]),
        ("cpu", None, False, ["C++ compiler"], ["GPU"]),
    ],
)
def test_doctor_says_how_to_get_what_is_missing(name, torch_for, gpu, words, without, monkeypatch):
    from kdkernels import doctor

    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    for kind, version in (("cuda", "13.0"), ("hip", "7.1")):
        monkeypatch.setattr(torch.version, kind, version if kind == torch_for else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    said = " | ".join(doctor.advice(name, "not built"))
    assert all(word in said for word in words) and not any(word in said for word in without), said
    assert doctor.build() == {"cuda": "CUDA 13.0", "hip": "ROCm 7.1", None: "CPU only"}[torch_for]
    assert doctor.advice(name, "ok") == []


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_losses(columns, capsys, monkeypatch):
    from kdkernels.trainer.losses import short

    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["losses"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    first = {line.split()[0] for line in shown.splitlines() if line.strip()}
    for name, cls in kd.catalogue().items():
        assert f"{name}(" in shown and short(name) in first
        assert cls.__doc__.split()[0].strip("`") in shown
    for words in ("tau=0.4", "t_squared=True)", "teacher, labels", "0.5 s + 0.5 t", "Renyi 1961", "ignore_index=-100"):
        assert words in " ".join(shown.split())
    assert "Point(" not in shown


def test_losses_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["losses"]) == 0
    shown = capsys.readouterr().out
    assert "renyi\n  RenyiLoss(alpha=0.5)\n  teacher\n" in shown and "Every loss also takes" in shown


def test_points_as_they_are_spelled():
    from kdkernels.listing import spelled_point

    assert spelled_point(kd.Point(student=0.5, teacher=1)) == "0.5 s + t"
    assert spelled_point(kd.Point(student=-0.25, frozen=True)) == "-0.25 s (constant)"
    assert spelled_point(kd.Point(exclude_label=True, raw=True)) == "0 (without the label, at T = 1)"


def test_unknown_loss_and_option(capsys):
    message = fails(capsys, "distill", "--loss", "wtm")
    assert "'wtm'" in message and "wttm" in message and "renyi" in message
    message = fails(capsys, "distill", "--loss", "renyi", "--gamma", "0.5")
    assert "'gamma'" in message and "alpha" in message and "ce_weight" in message
    assert "--set alpha" in fails(capsys, "distill", "--set", "alpha")
    assert '"text"' in fails(capsys, "distill", "--set", "reduction=none")


@pytest.mark.parametrize("option, words", [
    ('reduction="none"', '"mean", "sum" or "batchmean"'), ('reduction="median"', "reduction must be"),
    ('gamma="x"', "gamma must be a number"), ("gamma=-1", "gamma must be > 0"), ("gamma=1e-320", "temperature must be"),
    ("temperature=[1]", "temperature must be a number"), ('ignore_index="a"', "ignore_index must be an int"),
])  # fmt: skip
def test_a_loss_that_cannot_be_built_or_trained_with(option, words, capsys):
    message = fails(capsys, "distill", "--loss", "WTTMLoss", "--set", option)
    assert words in message and message.count("\n") == 1


def test_errors_of_the_training_are_not_swallowed(monkeypatch, tmp_path):
    from kdkernels.trainer import distill

    def broken(cfg, resume):
        raise ValueError("in the training")

    monkeypatch.setattr(distill, "distill", broken)
    with pytest.raises(ValueError, match="in the training"):
        main(["distill", "--loss", "WTTMLoss", "--out", str(tmp_path / "run")])


def test_distill_names_both_spellings_of_a_loss(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "by its short name or its class: wttm, WTTMLoss" in shown


def test_every_loss_has_a_short_name():
    from kdkernels.trainer.losses import loss_class, make_loss, resolve, short

    for name, cls in kd.catalogue().items():
        assert loss_class(short(name)) is loss_class(name) is cls
        assert isinstance(make_loss(name, {}), cls) and isinstance(make_loss(name, resolve(name, {})), cls)


def test_settings_that_cannot_work(capsys):
    assert "--hidden" in fails(capsys, "distill", "--hidden", "30")
    assert "--keep-layers" in fails(capsys, "distill", "--keep-layers", "0", "7")
    assert "--dtype" in fails(capsys, "distill", "--dtype", "float8")
    assert "--steps" in fails(capsys, "distill", "--steps", "-1")


def test_missing_extra(capsys, monkeypatch):
    from kdkernels.trainer import distill

    monkeypatch.setattr(distill, "find", lambda name: None if name == "transformers" else name)
    message = fails(capsys, "distill")
    assert "transformers" in message and "pip install '.[train]'" in message
    monkeypatch.setattr(distill, "find", lambda name: None if name == "sklearn" else name)
    assert "missing: sklearn. " in fails(capsys, "distill", "--recipe", "kd")


def test_what_torchrun_cannot_start(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "`kdkernels cache` runs in one process" in fails(capsys, "cache", "--out", tmp_path)
    assert "DISTLoss compares the rows" in fails(capsys, "distill", "--loss", "dist", "--out", tmp_path / "run")


def test_a_recipe_for_which_there_is_no_room(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3 << 20}))
    message = fails(capsys, "distill", "--recipe", "kd", "--out", tmp_path / "run", "--cache", tmp_path)
    assert f"too little room in {tmp_path}: 3 MB free" in message and not list(tmp_path.iterdir())
    free = 3 * (reproduce.ROOM + reproduce.SHARED)  # of three seeds, students and teachers on one disk
    (tmp_path / "file").write_text("")
    wrong = {("run", "cache", 1): "too little room in", ("run", "file", 0): "file cannot be written to",
             ("file/run", "cache", 0): "file/run cannot be written to"}  # fmt: skip
    for (out, cache, less), message in wrong.items():
        monkeypatch.setattr("shutil.disk_usage", lambda path, less=less: type("Usage", (), {"free": free - less}))
        given = ["distill", "--recipe", "kd", "--out", tmp_path / out, "--cache", tmp_path / cache]
        assert message in fails(capsys, *given) and not (tmp_path / "run/config.json").exists()


def test_resume_needs_a_run(capsys, tmp_path):
    assert "no such folder" in fails(capsys, "distill", "--resume", tmp_path / "none")
    assert "no config.json" in fails(capsys, "distill", "--resume", tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    assert "not written by" in fails(capsys, "distill", "--resume", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'} is damaged" in fails(capsys, "distill", "--resume", tmp_path)


def test_resume_with_other_settings(capsys, tmp_path):
    write_run(tmp_path)
    message = fails(capsys, "distill", "--resume", tmp_path, "--steps", "7")
    assert "--steps 7" in message and "200" in message
    assert "--loss-options" in fails(capsys, "distill", "--resume", tmp_path, "--gamma", "0.9")
    assert "--out" in fails(capsys, "distill", "--resume", tmp_path, "--out", tmp_path)


def write_run(folder):
    import dataclasses

    from kdkernels.trainer.config import PLACES, Config
    from kdkernels.trainer.distill import FORMAT, environment

    settings = {k: v for k, v in dataclasses.asdict(Config(steps=200)).items() if k not in PLACES}
    record = {"format": FORMAT, "text": "", "settings": settings, "cache": "", "environment": environment()}
    (folder / "config.json").write_text(json.dumps(record))


def test_text_errors(tmp_path):
    from kdkernels.trainer.config import Config, UserError
    from kdkernels.trainer.data import Corpus, find_text

    with pytest.raises(UserError, match=r"cannot read the text .*gone"):
        find_text([str(tmp_path / "gone")])
    with pytest.raises(UserError, match="no text found"):
        find_text([str(tmp_path)])
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "short.txt").write_text("too short\n")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Corpus(Config(text=[str(tmp_path / "short.txt")], tokenizer=str(tmp_path / "tokenizer.json")))
    with pytest.raises(UserError, match="no such file"):
        Corpus(Config(text=[str(tmp_path / "short.txt")], tokenizer="nowhere.json"))


def test_too_little_text(tmp_path):
    import tokenizers

    from kdkernels.trainer.config import Config, UserError
    from kdkernels.trainer.data import Corpus

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("a")
    cfg = Config(text=[str(tmp_path / "a.txt")], tokenizer=str(tmp_path / "t.json"), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="too little text"):
        Corpus(cfg).load(lambda done, total: None)


def test_split_keeps_files_whole_and_apart():
    from kdkernels.trainer.data import split

    texts = [f"file {i}\n" * 20 for i in range(40)]
    parts = split([*texts, *texts], 0.1)
    assert sorted(parts["train"] + parts["val"]) == sorted(texts)
    assert 1 <= len(parts["val"]) <= 4
    assert parts == split(texts[::-1], 0.1)
    parts = split(["one line\n" * 100], 0.1)
    assert parts["train"][0] + parts["val"][0] == "one line\n" * 100 and len(parts["val"][0]) == 90


def test_import_is_light():
    """`import kdkernels` pulls in none of the trainer's dependencies."""
    code = (
        "import sys, kdkernels, kdkernels.cli; "
        "print([m for m in ('transformers', 'tokenizers', 'matplotlib', 'rich', 'safetensors') if m in sys.modules])"
    )
    here = Path(kd.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "name",
    ["rows", "linear", "ranks", "rank_distillation", "pages.rank_gradients", "pages.alpha_beta", "pages.bayes_teacher",
     "gpu", "validation", "expected", "curves", "bench", "peers_table"],
)  # fmt: skip
def test_benchmarks_say_what_they_measure(name):
    run = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(run, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"benchmarks.{name}" in done.stdout, done.stderr
