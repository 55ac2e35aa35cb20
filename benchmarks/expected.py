"""What the docstrings of the recipes say is to be expected: the means of validation.json.

    python -m benchmarks.expected           # what they should say, where they say something else
    python -m benchmarks.expected --write   # makes them say it
"""

import argparse
import json
import statistics
from pathlib import Path

from kdkernels.trainer import recipes, reproduce

from .validation import ROOT

BEGIN = "Expected"


def wanted(recipe, record: dict) -> str:
    """The end of a recipe's docstring, of its record in validation.json."""
    arms = record.get("arms", {})
    measured = [pair for pair in recipe.TREND if {*pair} <= {*arms}]
    seeds = {len(arms[better]) for better, _ in measured} or {0}
    lines = [f"{BEGIN} (mean of {max(seeds)} seed{'s' * (seeds != {1})}):", ""]
    for better, worse in recipe.TREND:
        if (better, worse) in measured:
            means = [statistics.mean(arms[arm]) for arm in (better, worse)]
            holds = reproduce.holds(arms[better], arms[worse])
            lines.append(f"    {better} {means[0]:.1f} > {worse} {means[1]:.1f}: {holds}")
        else:
            lines.append(f"    {better} > {worse}: not measured yet")
    return "\n".join(lines) + "\n"


def said(text: str) -> str:
    """The same part of a docstring, as it is."""
    return text[text.index(f"\n{BEGIN}") + 1 :]


def records(path: Path) -> dict[str, dict]:
    return {one["recipe"]: one for one in json.loads(path.read_text(encoding="utf-8"))["recipes"]}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expected", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--write", action="store_true", help="change the files of the recipes")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "validation.json")
    options = parser.parse_args(arguments)
    found = records(options.results)
    for name in recipes.names():
        recipe = recipes.load(name)
        new, old = wanted(recipe, found.get(name, {})), said(recipe.__doc__)
        if new == old:
            continue
        print(f"{name}\n{new}")
        if options.write:
            path = Path(recipe.__file__)
            source = path.read_text(encoding="utf-8")
            assert source.count(old) == 1, f"{path}: its docstring is not as it was read"
            path.write_text(source.replace(old, new), encoding="utf-8")
    return 0


if __name__ == "__main__":
    main()
