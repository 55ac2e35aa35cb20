"""The settings as flags of a command."""

import dataclasses
import typing
from pathlib import Path

from .config import Config, flag

DEFAULTS = Config()
PATHS = ("text", "tokenizer", "out", "cache", "teacher_cache")
HELP = {
    "loss": "a loss of the catalogue by its short name or its class: wttm, WTTMLoss (see `kdkernels losses`)",
    "temperature": "the student's temperature, and the teacher's unless given (default for TTM and WTTM: 1/gamma, with "
    "a teacher temperature of 1, so that the loss is least where student and teacher agree)",
}


def add_settings(one, without=()):
    """A flag for each field of Config; -> {group: its flags}."""
    groups: dict[str, typing.Any] = {}
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if not field.metadata or field.name in without or field.metadata["group"] in without:
            continue
        name = field.metadata["group"]
        groups[name] = groups.get(name) or one.add_argument_group(name)
        default, kind = getattr(DEFAULTS, field.name), hints[field.name]
        several = isinstance(default, list)
        note = "" if default in ("", []) else f" (default: {' '.join(map(str, default)) if several else default})"
        kind, count = (typing.get_args(kind)[0], {"nargs": "+"}) if several else (kind, {})
        shown = "PATH" if kind is str and field.name in PATHS else kind.__name__.upper()
        help = f"{HELP.get(field.name, field.metadata['help'])}{note}"
        groups[name].add_argument(flag(field.name), type=kind, metavar=shown, help=help, **count)
    return groups


def absolute(typed):
    """The settings with paths that mean the same in any folder."""
    paths = ("tokenizer", "cache", "teacher_cache")
    typed = typed | {name: str(Path(typed[name]).absolute()) for name in paths if typed.get(name)}
    return typed | ({"text": [str(Path(p).absolute()) for p in typed["text"]]} if "text" in typed else {})
