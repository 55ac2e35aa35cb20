"""What the kernels cost beside eager torch, torch.compile and the machine itself."""

import sys
from pathlib import Path

_tests = str(Path(__file__).resolve().parents[1] / "tests")  # textbook.py and allocations.py
if _tests not in sys.path:
    sys.path.append(_tests)
