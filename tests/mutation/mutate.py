"""Make small mistakes in the core, one at a time, and see whether the tests notice: `make mutate`.

    python tests/mutation/mutate.py [--count 60] [--seed 0] [--only model/attention] [--out table.md]

Each mistake is made in a copy of the tree; the tests of that module run on the copy until the first failure. What
survives is either a gap in the tests or no mistake at all; docs/testing.md lists the last run and explains the
latter.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "model", "parallel", "data_pipeline", "launcher", "slurm")
LAST_OUTPUT = "last_output.txt"
TIMEOUT_SECONDS = 1800.0  # for tests of a tree without mistakes; with one they get five times what they took

BI_LEVEL = ["tests/unit/model/attention/test_bi_level.py", "tests/unit/model/attention/test_causality.py"]
# Module or folder -> the tests that should notice, quickest first.
CORE: dict[str, list[str]] = {
    "model/attention/routing.py": ["tests/unit/model/attention/test_routing.py"],
    "model/attention/bi_level.py": BI_LEVEL,
    "model/attention/partial.py": BI_LEVEL,
    "model/attention/tiles.py": BI_LEVEL,
    "model/attention/band.py": BI_LEVEL,
    "model/attention/masked.py": BI_LEVEL,
    "model/decode/pages.py": ["tests/unit/model/decode"],
    "model/decode/attention.py": ["tests/unit/model/decode"],
    "model/attention/core.py": [
        "tests/unit/model/attention/test_core.py",
        "tests/unit/model/decode",
        "tests/distributed/model",
    ],
    "model/attention/key_smear.py": ["tests/unit/model/attention/test_key_smear.py", "tests/unit/model/attention"],
    "model/attention/rope.py": ["tests/distributed/model/test_oracles.py"],
    "model/attention/block_sparse": ["tests/unit/model/attention/block_sparse"],
    "model/block.py": ["tests/distributed/model"],
    "model/language_model.py": ["tests/distributed/model", "tests/distributed/parallel/test_layouts.py"],
    "model/flops.py": ["tests/distributed/model"],
    "model/norm.py": ["tests/distributed/model/test_oracles.py", "tests/distributed/parallel/test_layouts.py"],
    "parallel/region/plan.py": ["tests/unit/parallel/region", "tests/distributed/parallel/region"],
    "parallel/region/transfers.py": ["tests/unit/parallel/region", "tests/distributed/parallel/region"],
    "parallel/region/attention.py": ["tests/distributed/parallel/region"],
    "parallel/region/transport.py": ["tests/distributed/parallel/region"],
    "parallel/region/shard.py": ["tests/distributed/parallel/region"],
    "parallel/checkpoint": ["tests/unit/parallel/checkpoint", "tests/distributed/parallel/checkpoint"],
    "data_pipeline/read/order.py": ["tests/unit/data_pipeline/read"],
    "launcher/attempts": ["tests/unit/launcher/attempts", "tests/unit/slurm"],
    "launcher/generate": ["tests/unit/launcher/generate", "tests/unit/launcher/cli/test_generate.py"],
    "launcher/train/schedule.py": ["tests/unit/launcher/train"],
}
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
# Arguments that only cost time or memory, or that are the default on every machine of today; and `**arguments`.
NO_EFFECT = {None, "encoding", "mmap", "eviction_policy", "cache_modifier", "num_warps", "num_stages"}


@dataclass(frozen=True)
class Mutant:
    """One mistake: where, what, and the module's source with it."""

    path: str
    line: int
    what: str
    source: str


def mutants(path: str) -> Iterator[Mutant]:
    """All mistakes that are tried in a module."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    hints = {id(part) for node in ast.walk(tree) for part in hints_of(node)}
    for number, node in enumerate(ast.walk(tree)):
        for what in changes(node) if id(node) not in hints else ():
            wrong = copy.deepcopy(tree)
            place = next(other for at, other in enumerate(ast.walk(wrong)) if at == number)
            before = ast.unparse(place)
            apply(place, what)
            text = f"`{shorten(before)}` -> `{shorten(ast.unparse(place))}`"
            yield Mutant(path, getattr(node, "lineno", 0), text, ast.unparse(wrong) + "\n")


def hints_of(node: ast.AST) -> Iterator[ast.AST]:
    """Annotations and decorators: what type checkers and compilers read changes no result."""
    hints = [getattr(node, "annotation", None), getattr(node, "returns", None), *getattr(node, "decorator_list", ())]
    for hint in hints:
        if hint is not None:
            yield from ast.walk(hint)


def changes(node: ast.AST) -> list[str]:
    """Names of the mistakes that can be made at a node."""
    if isinstance(node, ast.Compare):
        return [f"operator {i}" for i, operator in enumerate(node.ops) if type(operator) in SWAPPED]
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPPED:
        return ["operator"]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert | ast.USub):
        return ["drop the sign"]
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        return ["constant"]
    if isinstance(node, ast.If | ast.IfExp):
        return ["negate"]
    if isinstance(node, ast.Call) and node.keywords:
        return [f"drop argument {i}" for i, keyword in enumerate(node.keywords) if keyword.arg not in NO_EFFECT]
    return []


def apply(node: ast.AST, what: str) -> None:
    """Make the mistake `what` at a node, in place."""
    if isinstance(node, ast.Compare):
        number = int(what.split()[1])
        node.ops[number] = SWAPPED[type(node.ops[number])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else node.op
        if isinstance(node.op, ast.Not | ast.Invert):
            node.operand = ast.UnaryOp(ast.Not() if isinstance(node.op, ast.Not) else ast.Invert(), node.operand)
    elif isinstance(node, ast.Constant):
        node.value = (not node.value) if isinstance(node.value, bool) else node.value + 1  # type: ignore[operator]
    elif isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Call):
        del node.keywords[int(what.split()[2])]


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= 70 else line[:67] + "...").replace("|", "\\|")


def tests_of(path: str) -> list[str]:
    return next(tests for module, tests in CORE.items() if path == module or path.startswith(f"{module}/"))


def passes(tests: list[str], tree: Path, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Run tests on the copy."""
    environment = {**os.environ, "PYTHONPATH": str(tree / ".types"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return False  # a loop that never ends
    (tree / LAST_OUTPUT).write_text(done.stdout + done.stderr, encoding="utf-8")
    return done.returncode == 0


def verdict(mutant: Mutant, tree: Path, timeout: float) -> str:
    """Run the module's tests on the copy with the mistake in it."""
    original = (tree / mutant.path).read_text(encoding="utf-8")
    (tree / mutant.path).write_text(mutant.source, encoding="utf-8")
    try:
        return "survived" if passes(tests_of(mutant.path), tree, timeout) else "killed"
    finally:
        (tree / mutant.path).write_text(original, encoding="utf-8")


def copy_tree(target: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".types" / "biroute").mkdir(parents=True)
    for package in PACKAGES:
        (target / ".types" / "biroute" / package).symlink_to(target / package)


def modules(only: str | None) -> list[str]:
    found = []
    for module in CORE:
        paths = sorted((ROOT / module).glob("*.py")) if (ROOT / module).is_dir() else [ROOT / module]
        found += [path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"]
    return [path for path in found if not only or path.startswith(only)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="mistakes to try")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--only", help="beginning of the paths to try")
    parser.add_argument("--out", type=Path, help="file for the table")
    given = parser.parse_args()
    chosen = [mutant for path in modules(given.only) for mutant in mutants(path)]
    random.Random(given.seed).shuffle(chosen)
    rows = ["| place | mistake | verdict |", "| --- | --- | --- |"]
    survived = 0
    with tempfile.TemporaryDirectory(prefix="biroute-mutate-") as folder:
        copy_tree(Path(folder))
        # Tests that fail without any mistake would "kill" every one.
        seconds: dict[str, float] = {}
        for path in {tests_of(mutant.path)[-1]: mutant.path for mutant in chosen[: given.count]}.values():
            began = time.monotonic()
            if not passes(tests_of(path), Path(folder)):
                print((Path(folder) / LAST_OUTPUT).read_text(encoding="utf-8")[-3000:])
                sys.exit(f"the tests of {path} fail before any mistake is made: {' '.join(tests_of(path))}")
            seconds[tests_of(path)[-1]] = time.monotonic() - began
        for mutant in chosen[: given.count]:
            found = verdict(mutant, Path(folder), 5 * seconds[tests_of(mutant.path)[-1]])
            survived += found == "survived"
            rows.append(f"| {mutant.path}:{mutant.line} | {mutant.what} | {found} |")
            sys.stdout.write(rows[-1] + "\n")
            sys.stdout.flush()
    tried = min(given.count, len(chosen))
    summary = (
        f"{tried - survived} of {tried} killed ({100 * (tried - survived) / max(1, tried):.0f} %), seed {given.seed}"
    )
    sys.stdout.write(summary + "\n")
    if given.out:
        given.out.write_text("\n".join([*rows, "", summary, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
