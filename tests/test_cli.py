"""The command line: help, doctor, losses, and errors that say what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kdkernels as kd
from kdkernels.cli import main


def fails(capsys, *arguments):
    """-> the message of a run that must end with status 2."""
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_help_and_version(capsys):
    for arguments, words in {
        ("--help",): ["distill", "losses", "doctor"],
        ("distill", "--help"): "--quick --resume --loss --gamma --set (default: --checkpoint-every".split(),
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
    """One line that says why, and `doctor` still answers."""
    if kd.available_backends().get(name) == "ok":
        pytest.xfail(f"{name} runs here")
    environment = {**os.environ, "KDKERNELS_BACKEND": name}
    run = [sys.executable, "-m", "kdkernels"]
    quick = [*run, "distill", "--quick", "--out", str(tmp_path / "run"), "--cache", str(tmp_path)]
    failed = subprocess.run(quick, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and name in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
    assert subprocess.run([*run, "doctor"], env=environment, capture_output=True, check=False).returncode == 0


def test_unknown_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["distill", "--gama", "0.5"])
    assert end.value.code == 2 and "--gama" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name, state in kd.available_backends().items():
        assert f"{name:<10} {state}" in shown
    assert "instruction set" in shown and "threads" in shown


def test_losses(capsys):
    assert main(["losses"]) == 0
    shown = capsys.readouterr().out
    for name, cls in kd.catalogue().items():
        assert name in shown
        assert cls.__doc__.split()[0] in shown


def test_unknown_loss_and_option(capsys):
    message = fails(capsys, "distill", "--loss", "wtm")
    assert "'wtm'" in message and "wttm" in message and "renyi" in message
    message = fails(capsys, "distill", "--loss", "renyi", "--gamma", "0.5")
    assert "'gamma'" in message and "alpha" in message and "ce_weight" in message
    assert "--set alpha" in fails(capsys, "distill", "--set", "alpha")


def test_every_loss_has_a_short_name():
    from kdkernels.trainer.losses import loss_class, make_loss, short

    for name, cls in kd.catalogue().items():
        assert loss_class(short(name)) is loss_class(name) is cls
        assert isinstance(make_loss(name, {}), cls)


def test_settings_that_cannot_work(capsys):
    assert "--hidden" in fails(capsys, "distill", "--hidden", "30")
    assert "--keep-layers" in fails(capsys, "distill", "--keep-layers", "0", "7")
    assert "--dtype" in fails(capsys, "distill", "--dtype", "float8")
    assert "--steps" in fails(capsys, "distill", "--steps", "-1")


def test_missing_extra(capsys, monkeypatch):
    from kdkernels.trainer import distill

    monkeypatch.setattr(distill, "find", lambda name: None if name == "transformers" else name)
    message = fails(capsys, "distill")
    assert "transformers" in message and "pip install 'kdkernels[train]'" in message


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
