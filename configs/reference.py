"""Generate the configuration reference from the schema (`python -m biroute.configs.reference`, see `make docs`)."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from biroute.configs.cluster_profile import ClusterProfile
from biroute.configs.schema import RunConfig
from biroute.configs.section import Section, on_resume, section_of

_HEAD = """# Configuration reference

Made from `configs/schema.py` by `make docs`; do not edit.
A configuration is a YAML file with these sections. Any field can be set on the command line as `section.field=value`.

What may change when a run resumes from its checkpoint: *identity* makes it another run and is refused, unless
`train.accept_changes` names the field; *recipe* is taken and said; *free* is taken. The sources and how they became a
dataset are compared by the checksums of its shards, so `data.sources` and `data.tokenizer` are free by themselves.
"""

_PROFILE = """
# Cluster profile

A YAML file of its own, named by `slurm.profile`; every field is optional. Made from `configs/cluster_profile.py`.

"""


def reference() -> str:
    """Return the whole reference as Markdown."""
    return _HEAD + "".join(_section("", RunConfig)) + _PROFILE + "".join(_fields(ClusterProfile, resume=False))


def _section(prefix: str, section: type[Section]) -> Iterator[str]:
    if any(_nested(field) is None for field in section.model_fields.values()):
        yield f"\n## `{prefix.rstrip('.')}`\n\n{(section.__doc__ or '').strip()}\n\n"
        yield from _fields(section)
    for name, field in section.model_fields.items():
        nested = _nested(field)
        if nested is not None:
            mark = "[]" if str(field.annotation).startswith("tuple") else ""
            yield from _section(f"{prefix}{name}{mark}.", nested)


def _fields(section: type[Section], resume: bool = True) -> Iterator[str]:
    """Yield a table of the fields; `resume`: also say what may change on a resume."""
    columns = ["field", "type", "default", *(["on resume"] if resume else []), "meaning"]
    yield f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n"
    for name, field in section.model_fields.items():
        if _nested(field) is None:
            kind = [on_resume(section, field)] if resume else []
            cells = [f"`{name}`", _type(field), _default(field), *kind, str(field.description)]
            yield f"| {' | '.join(cells)} |\n"


def _nested(field: FieldInfo) -> type[Section] | None:
    nested = section_of(field.annotation)
    return nested if isinstance(nested, type) and issubclass(nested, Section) else None


_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text"}


def _type(field: FieldInfo) -> str:
    text = _words(field.annotation, list(field.metadata))
    return text.replace("|", "\\|")


def _words(annotation: Any, limits: list[Any]) -> str:
    """Describe the values that a field takes, in words for people who write YAML."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):  # an optional field
        return _words(next(inner for inner in arguments if inner is not type(None)), limits)
    if origin is Annotated:
        return _words(arguments[0], [*limits, *arguments[1:]])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return "names and values"
    if origin is tuple:
        return f"list of {_words(arguments[0], [])}s"
    name = "path" if issubclass(annotation, Path) else _NAMES[annotation]
    bounds = [
        f" {sign} {getattr(limit, attribute)}"
        for limit in limits
        for sign, attribute in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le"))
        if hasattr(limit, attribute)
    ]
    return name + "".join(bounds)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "derived"
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or field.default == "":
        return "empty"
    if field.default in ((), {}):
        return "none"
    return f"`{field.default}`"


if __name__ == "__main__":
    print(reference(), end="")
