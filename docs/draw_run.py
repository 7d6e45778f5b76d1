"""Draw docs/images/run.svg, the way of `biroute train` through the modules: `make docs`.

An arrow stands where a module imports the next one, or names it in the command of a new process; a step for which
neither is true is an error. What a module does is the first sentence of its docstring, and what else it uses are its
other imports, so the same tree gives the same bytes.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "run.svg"
PROCESSES = {
    "the command: one process, without torch": (
        "launcher.cli.main",
        "launcher.start.train",
        "launcher.start.local",
    ),
    "each rank: one process per GPU": (
        "launcher.start.worker",
        "launcher.start.rank",
        "launcher.train.session",
        "launcher.train.trainer",
        "parallel.engine.engine",
        "model.language_model",
        "model.block",
        "model.attention.core",
    ),
}
WIDTH, BOX_WIDTH, BOX_HEIGHT, STEP, MARGIN = 1180, 430, 66, 92, 20


def modules_of(tree: ast.Module) -> set[str]:
    """Modules of BiRoute that a module imports, at its top or inside functions, or starts by name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from biroute.room import module` and `from biroute.room.module import name` both name a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        else:
            continue
        found |= {
            name.removeprefix("biroute.") for name in names if name.startswith("biroute.") and _path(name).exists()
        }
    return found


def _path(module: str) -> Path:
    return ROOT / f"{module.removeprefix('biroute.').replace('.', '/')}.py"


def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def _sentence(tree: ast.Module) -> str:
    first = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ").replace("`", "")
    return first.split(". ")[0].rstrip(".") + "."


def check_steps() -> None:
    """Raise ValueError where a module neither imports nor starts the next one."""
    for module, following in pairwise([module for modules in PROCESSES.values() for module in modules]):
        if following not in modules_of(_tree(module)):
            raise ValueError(f"{module} neither imports nor starts {following}: change PROCESSES in docs/draw_run.py")


def draw() -> str:
    """The picture as SVG text."""
    check_steps()
    on_the_way = {module for modules in PROCESSES.values() for module in modules}
    parts: list[str] = []
    y = MARGIN
    for process, modules in PROCESSES.items():
        height = len(modules) * STEP + 22
        parts += [
            f'<rect x="{MARGIN}" y="{y}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="8" fill="none" '
            'stroke="#9db2cc" stroke-dasharray="6 4"/>',
            _text(MARGIN + 12, y + 18, 12, "#34526f", process),
        ]
        y += 28
        for module in modules:
            tree = _tree(module)
            parts += _box(module, _sentence(tree), sorted(modules_of(tree) - on_the_way), y)
            y += STEP
        y += 14
    arrows = _arrows()
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + MARGIN}" font-family="sans-serif">'
        f'<rect width="{WIDTH}" height="{y + MARGIN}" fill="white"/>'
    )
    return "\n".join([head, *arrows, *parts, "</svg>", ""])


def _arrows() -> list[str]:
    """A line with a head from each box to the next."""
    tops, y = [], MARGIN
    for modules in PROCESSES.values():
        tops += [y + 28 + number * STEP for number in range(len(modules))]
        y += 28 + len(modules) * STEP + 14
    x = 2 * MARGIN + BOX_WIDTH // 2
    return [
        f'<path d="M{x} {above + BOX_HEIGHT} V{below - 5} m-5 -6 l5 6 l5 -6" fill="none" stroke="#34526f"/>'
        for above, below in pairwise(tops)
    ]


def _box(module: str, sentence: str, uses: list[str], y: int) -> list[str]:
    x = 2 * MARGIN
    lines = textwrap.wrap(sentence, 74)[:2]
    used = textwrap.wrap("uses " + ", ".join(uses), 118)
    return [
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" fill="#eef3fa" stroke="#34526f"/>',
        _text(x + 10, y + 20, 13, "black", f"{module.replace('.', '/')}.py"),
        *(_text(x + 10, y + 38 + 16 * number, 11, "#333", line) for number, line in enumerate(lines)),
        *(_text(x + BOX_WIDTH + 16, y + 14 + 14 * number, 11, "#555", line) for number, line in enumerate(used)),
    ]


def _text(x: int, y: int, size: int, colour: str, text: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}">{escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    sys.stdout.write(f"{PICTURE.relative_to(ROOT)}\n")
