"""What compiling the GPU's kernels has shown, so that the same sources need not be compiled again for a test.

    python tests/compiled.py        compiles what has changed, and records it in compiled.json

A record belongs to the contents of the sources and the compiler's version; without one that fits, a test compiles.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).parent / "compiled.json"


def key_of(sources: Iterable[Path], version: str) -> str:
    digest = hashlib.sha256(version.encode())
    for path in sorted(sources):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compiled(name: str, key: str, run: Callable[[], list]) -> list:
    """What run() returns, or did when the same was compiled."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    entry = known.get(name, {})
    return entry["kernels"] if entry.get("key") == key else run()


def main() -> None:
    import test_cuda_compiles as cuda
    import test_triton_compiles as triton

    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for module, targets in ((cuda, cuda.ARCHITECTURES), (triton, triton.CAPABILITIES)):
        for target in targets:
            name, key = f"{module.NAME} {target}", module.key()
            if known.get(name, {}).get("key") != key:
                known[name] = {"key": key, "kernels": module.table(target)}
                print(f"{name}: {len(known[name]['kernels'])} kernels", flush=True)
            FILE.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
