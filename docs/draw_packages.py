"""Draw docs/images/packages.svg from the imports themselves: `make docs`.

Every room (package) is a box with its number of files and lines, on the floor that the import contract in
pyproject.toml gives it. A line is drawn from a room to each room that it imports. The same tree gives the same bytes.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "packages.svg"
TOP = ("configs", "model", "parallel", "data_pipeline", "launcher", "slurm")
WIDTH, BOX_HEIGHT, FLOOR_HEIGHT, MARGIN = 1180, 44, 86, 20


def rooms() -> dict[str, tuple[int, int]]:
    """Room (`launcher.train`) -> files and lines of its own modules."""
    found = {}
    for top in TOP:
        for folder in sorted({path.parent for path in (ROOT / top).rglob("*.py")}):
            modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules)
            if modules:
                found[".".join(folder.relative_to(ROOT).parts)] = (len(modules), lines)
    return found


def imports(all_rooms: dict[str, tuple[int, int]]) -> set[tuple[str, str]]:
    """(room, room that it imports), lazily inside functions or not."""
    arrows = set()
    for room in all_rooms:
        for path in (ROOT / room.replace(".", "/")).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for name in _names(node):
                    target = (
                        _room_of(name.removeprefix("biroute."), all_rooms) if name.startswith("biroute.") else None
                    )
                    if target and target != room:
                        arrows.add((room, target))
    return arrows


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def _room_of(name: str, all_rooms: dict[str, tuple[int, int]]) -> str | None:
    parts = name.split(".")
    return next((room for n in range(len(parts), 0, -1) if (room := ".".join(parts[:n])) in all_rooms), None)


def floors(all_rooms: dict[str, tuple[int, int]]) -> list[list[str]]:
    """Rooms by floor, the highest first, as the import contract orders them; rooms of a package as its own does."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = [layer.replace("biroute.", "").split(" | ") for layer in contracts[0]["layers"]]
    inner: dict[str, list[str]] = {}
    for contract in contracts[1:]:
        for container in contract.get("containers", []):
            names = [name for layer in contract["layers"] for name in layer.split(" | ")]
            inner[container.removeprefix("biroute.")] = names
    found = []
    for layer in layers:
        row = []
        for top in layer:
            mine = [room for room in all_rooms if room == top or room.startswith(f"{top}.")]
            order = inner.get(top, [])
            row += sorted(mine, key=lambda room, order=order, top=top: (_place(room, top, order), room))
        found.append(row)
    return found


def _place(room: str, top: str, order: list[str]) -> int:
    part = room.removeprefix(f"{top}.").split(".")[0] if room != top else ""
    return order.index(part) if part in order else -1


def draw() -> str:
    """The picture as SVG text."""
    all_rooms = rooms()
    rows = floors(all_rooms)
    boxes: dict[str, tuple[float, float, float]] = {}
    for number, row in enumerate(rows):
        width = (WIDTH - 2 * MARGIN) / len(row)
        for place, room in enumerate(row):
            box_width = min(width - 12, 190)
            boxes[room] = (
                MARGIN + place * width + (width - box_width) / 2,
                MARGIN + number * FLOOR_HEIGHT,
                box_width,
            )
    height = 2 * MARGIN + len(rows) * FLOOR_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for source, target in sorted(imports(all_rooms)):
        (x, y, w), (x2, y2, w2) = boxes[source], boxes[target]
        below = y2 > y
        parts.append(
            f'<line x1="{x + w / 2:.0f}" y1="{y + BOX_HEIGHT if below else y + BOX_HEIGHT / 2:.0f}" '
            f'x2="{x2 + w2 / 2:.0f}" y2="{y2 if below else y2 + BOX_HEIGHT / 2:.0f}" '
            'stroke="#9db2cc" stroke-width="0.8"/>'
        )
    for room, (x, y, w) in boxes.items():
        files, lines = all_rooms[room]
        parts += [
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{BOX_HEIGHT}" rx="5" '
            'fill="#eef3fa" stroke="#34526f"/>',
            f'<text x="{x + w / 2:.0f}" y="{y + 18:.0f}" text-anchor="middle" font-size="12">{room}</text>',
            f'<text x="{x + w / 2:.0f}" y="{y + 34:.0f}" text-anchor="middle" font-size="10" fill="#555">'
            f"{files} files, {max(1, round(lines / 100)) / 10:.1f}k lines</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    sys.stdout.write(f"{PICTURE.relative_to(ROOT)}\n")
