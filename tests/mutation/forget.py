"""Forget one setting at a time, and see whether the test that shows its effect fails: `make mutate`.

    python tests/mutation/forget.py [--only optim] [--out table.md]

In a copy of the tree the field reads as its default, whatever the user wrote. `tests/helpers/fields.py` names the
test of each field.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from mutate import ROOT, copy_tree, passes

sys.path.insert(0, str(ROOT / "tests"))
from helpers.fields import SHOWN_BY, all_fields

FORGET = '''

def _forget(section: type, name: str) -> None:
    """Let a field read as its default: a property of the class hides what its instances hold."""
    field = section.model_fields[name]
    required = {{"name": "forgotten", "paths": ("forgotten",)}}

    def read(self: object) -> object:
        if field.is_required():
            return required[name]
        return field.get_default(call_default_factory=True, validated_data=self.__dict__)

    setattr(section, name, property(read))


_forget({section}, "{name}")
'''


def forgotten(section: type, name: str, test: str, tree: Path) -> bool:
    """Does the test fail on the copy in which a field is forgotten?"""
    module = tree / Path(*section.__module__.split(".")[1:]).with_suffix(".py")
    original = module.read_text(encoding="utf-8")
    module.write_text(original + FORGET.format(section=section.__name__, name=name), encoding="utf-8")
    try:
        return not passes([f"tests/{test}"], tree)
    finally:
        module.write_text(original, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="beginning of the fields to try")
    parser.add_argument("--out", type=Path, help="file for the table")
    given = parser.parse_args()
    rows = ["| setting | test | without it |", "| --- | --- | --- |"]
    unseen = 0
    with tempfile.TemporaryDirectory(prefix="biroute-forget-") as folder:
        copy_tree(Path(folder))
        tried = [field for field in all_fields() if field[0].startswith(given.only)]
        tests = list(dict.fromkeys(f"tests/{SHOWN_BY[path]}" for path, _, _ in tried))
        if not passes(tests, Path(folder)):
            sys.exit("these tests fail before any setting is forgotten")
        for path, section, name in tried:
            fails = forgotten(section, name, SHOWN_BY[path], Path(folder))
            unseen += not fails
            rows.append(f"| {path} | {SHOWN_BY[path]} | {'fails' if fails else 'PASSES'} |")
            sys.stdout.write(rows[-1] + "\n")
            sys.stdout.flush()
    summary = f"{len(tried) - unseen} of {len(tried)} settings: their test fails without them"
    sys.stdout.write(summary + "\n")
    if given.out:
        given.out.write_text("\n".join([*rows, "", summary, ""]), encoding="utf-8")
    sys.exit(1 if unseen else 0)


if __name__ == "__main__":
    main()
