"""Write the configuration reference from the schema: `python -m biroute.configs.reference`, see `make docs`."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Annotated, Any, Union

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from biroute.configs.load import section_of
from biroute.configs.schema import RunConfig, Section

_HEAD = """# Configuration reference

Made from `configs/schema.py` by `make docs`; do not edit.
A configuration is a YAML file with these sections. Any field can be set on the command line, `section.field=value`.
"""


def reference() -> str:
    """The whole reference as Markdown."""
    return _HEAD + "".join(_section("", RunConfig))


def _section(prefix: str, section: type[Section]) -> Iterator[str]:
    inner: list[tuple[str, type[Section]]] = []
    rows = []
    for name, field in section.model_fields.items():
        nested = section_of(field.annotation)
        if isinstance(nested, type) and issubclass(nested, Section):
            mark = "[]" if str(field.annotation).startswith("tuple") else ""
            inner.append((f"{prefix}{name}{mark}", nested))
        else:
            rows.append(f"| `{name}` | {_type(field)} | {_default(field)} | {field.description} |\n")
    if rows:
        yield f"\n## `{prefix.rstrip('.')}`\n\n{(section.__doc__ or '').strip()}\n\n"
        yield "| field | type | default | meaning |\n| --- | --- | --- | --- |\n"
        yield from rows
    for name, nested in inner:
        yield from _section(f"{name}.", nested)


def _type(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if typing.get_origin(annotation) is Union:  # an optional field
        annotation = next(inner for inner in typing.get_args(annotation) if inner is not type(None))
    limits = list(field.metadata)
    if typing.get_origin(annotation) is Annotated:
        annotation, *inner_limits = typing.get_args(annotation)
        limits += inner_limits
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    for long, short in (("typing.", ""), ("pathlib.", ""), ("Literal", "one of "), (" | None", "")):
        name = name.replace(long, short)
    for limit in limits:
        for sign, attribute in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le")):
            if hasattr(limit, attribute):
                name += f" {sign} {getattr(limit, attribute)}"
    return name.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "derived"
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or field.default == "":
        return "empty"
    return f"`{field.default}`"


if __name__ == "__main__":
    print(reference(), end="")
