"""What all sections of a configuration have in common, and what may change when a run resumes."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, model_validator
from pydantic.fields import FieldInfo

# identity: another value makes it another run, so a resume refuses it unless train.accept_changes names the field.
# recipe: how training goes on; taken, and said. free: where and how the same training runs.
OnResume = Literal["identity", "recipe", "free"]
# For `json_schema_extra` of fields that are not of their section's kind.
IDENTITY: dict[str, JsonValue] = {"on_resume": "identity"}
RECIPE: dict[str, JsonValue] = {"on_resume": "recipe"}


class Section(BaseModel):
    """Base of every section. Unknown keys are errors, and values do not change after loading."""

    on_resume: ClassVar[OnResume] = "free"  # of the fields that do not say otherwise

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_number_by_accident(cls, values: Any) -> Any:
        """`tensor: true` would be taken for 1, and `steps: 010` may mean 10 or, as YAML 1.1 has it, 8."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and "bool" not in str(field.annotation):
                raise ValueError(f"{name}={str(value).lower()} is neither a number nor a text; give the value itself")
            is_number = field is not None and re.search(r"\b(int|float)\b", str(field.annotation))
            if is_number and isinstance(value, str) and re.fullmatch(r"[-+]?0[0-9_]+", value):
                raise ValueError(f"{name}={value} begins with a zero; write {int(value)}")
        return values


def fields_on_resume(section: type[Section], prefix: str = "") -> Iterator[tuple[str, OnResume]]:
    """Yield (dotted name, kind) of every field below a section."""
    for name, field in section.model_fields.items():
        nested = section_of(field.annotation)
        if isinstance(nested, type) and issubclass(nested, Section):
            yield from fields_on_resume(nested, f"{prefix}{name}.")
        else:
            yield prefix + name, on_resume(section, field)


def on_resume(section: type[Section], field: FieldInfo) -> OnResume:
    """Return of which kind a field of `section` is."""
    extra = field.json_schema_extra
    own = extra.get("on_resume") if isinstance(extra, dict) else None
    return own or section.on_resume  # type: ignore[return-value]


def section_of(annotation: Any) -> Any:
    """Return the Section inside an annotation such as `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return next(section_of(inner) for inner in typing.get_args(annotation) if inner not in (type(None), ...))
    return annotation
