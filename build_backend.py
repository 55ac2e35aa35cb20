"""PEP 517 backend: setuptools, building against the torch that the target environment already has.

Build isolation hides that environment's packages, so torch named as a build requirement would be downloaded a second
time: gigabytes, and perhaps not the version the result will run with. These hooks look it up where isolation hid it,
put its folder last on the path, and ask for a torch of their own only when there is none (or one too old to use).
"""

import site
import sys
import sysconfig
from importlib.metadata import distributions

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no torch)

MIN_TORCH = (2, 11)


def _folders():
    """The package folders of the interpreter, also those that build isolation took off the path."""
    yield from (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"))
    yield from site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's own packages
        yield site.getusersitepackages()


def _torch_folder():
    for folder in dict.fromkeys(_folders()):
        for torch in distributions(name="torch", path=[folder]):
            if tuple(map(int, torch.version.split(".")[:2])) >= MIN_TORCH:
                return folder
    return None


def _requirements():
    return ["ninja"] if _torch_folder() else ["ninja", "numpy", f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"]


def _show_torch():
    folder = _torch_folder()
    if folder and folder not in sys.path:
        sys.path.append(folder)  # last: the isolated setuptools and ninja go first


def get_requires_for_build_wheel(config_settings=None):
    return _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _requirements()


def get_requires_for_build_sdist(config_settings=None):
    return []


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _show_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _show_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
