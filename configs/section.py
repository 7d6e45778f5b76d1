"""What all sections of a configuration have in common, and what may change when a run resumes."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic.fields import FieldInfo

# identity: another value makes it another run, so a resume refuses it unless train.accept_changes names the field.
# recipe: how training goes on; taken, and said. free: where and how the same training runs.
OnResume = Literal["identity", "recipe", "free"]
# For `json_schema_extra` of fields that are not of their section's kind.
IDENTITY: dict[str, JsonValue] = {"on_resume": "identity"}
RECIPE: dict[str, JsonValue] = {"on_resume": "recipe"}
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section. Unknown keys are errors, and values do not change after loading."""

    on_resume: ClassVar[OnResume] = "free"  # of the fields that do not say otherwise

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, values: Any) -> Any:
        """Refuse or mend values that would be taken for something else: see `_number` and `_path`."""
        if not isinstance(values, dict):
            return values
        taken = dict(values)
        for name, value in values.items():
            wanted = str(cls.model_fields[name].annotation) if name in cls.model_fields else ""
            if isinstance(value, list):
                taken[name] = [_as_meant(name, element, wanted) for element in value]
            else:
                taken[name] = _as_meant(name, value, wanted)
        return taken


def _as_meant(name: str, value: Any, wanted: str) -> Any:
    if isinstance(value, bool) and wanted and "bool" not in wanted:
        raise ValueError(f"{name}={str(value).lower()} is neither a number nor a text; give the value itself")
    if not isinstance(value, str):
        return value
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        # Linux ends names at a NUL, and Python cannot write half a character, long after this could be told.
        raise ValueError(f"{name}={value!r} has a NUL or bytes that are not UTF-8; write it without them")
    if re.search(r"\b(int|float)\b", wanted):
        return _number(name, value)
    return _path(name, value) if "Path" in wanted else value


def _number(name: str, text: str) -> str | int:
    """Refuse `steps: 010`, which is 8 in YAML 1.1; take `steps: 1e3`."""
    if re.fullmatch(r"[-+]?0[0-9_]+", text):
        raise ValueError(f"{name}={text} begins with a zero; write {int(text)}")
    if re.fullmatch(r"[-+]?[0-9.]+e[+]?[0-9]+", text, re.IGNORECASE) and float(text).is_integer():
        return int(float(text))
    return text


def _path(name: str, text: str) -> str:
    """Take `~/x` for what it is in the home folder; refuse `s3://x`, which would become a folder called `s3:`."""
    if "://" in text:
        raise ValueError(f"{name}={text} is not on this machine; name a folder or file that it sees")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise ValueError(f"{name}={text}: no such user, or one without a home folder; write the whole path") from None


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
