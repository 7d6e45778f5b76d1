"""Read a configuration from a YAML file, apply `section.field=value` overrides, and validate it."""

from __future__ import annotations

import copy
import datetime
import difflib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from biroute.configs.errors import UsageError
from biroute.configs.files import write_atomically
from biroute.configs.given_file import read_given
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig
from biroute.configs.section import section_of


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads `24:00:00` as text; YAML 1.1 takes it for the base-60 number 86400."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """Refuse a key that is no name, or is given twice: YAML would drop the first one without a word."""
    lines: dict[Any, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):  # Python has no dictionary with such keys
            raise yaml.YAMLError(f"a list or section is no key, in line {line}; write a name before the colon")
        if key.value in lines:
            raise yaml.YAMLError(f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}; join them")
        lines[key.value] = line
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


# Resolvers are grouped by first character. Base-60 numbers are the only scalars with a colon that are not dates; a
# number with a leading zero is octal in YAML 1.1, and `Section` refuses it where a number belongs.
_TEXT = re.compile(r"^[-+]?([0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|0[0-9_]+)$")
_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", _TEXT), *resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Parse YAML text into plain values.

    Raises:
        yaml.YAMLError: the text is not valid YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # no such day, a number of 5,000 digits, 20,000 brackets
        raise yaml.YAMLError(str(error).split(";")[0]) from None


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration, apply the overrides and check everything.

    Args:
        path: the YAML file.
        overrides: texts of the form `section.field=value`.

    Raises:
        UsageError: the file is missing or not YAML, or a key is unknown, or a value has the wrong type or range; all
            problems are reported in one line.
    """
    tree = _read_yaml(Path(path))
    before = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(tree, override)
    return config_from_tree(tree, str(path), before if overrides else None)


def config_from_tree(tree: dict[str, Any], origin: str, before: dict[str, Any] | None = None) -> RunConfig:
    """Build a configuration from plain values.

    Args:
        tree: nested dictionaries of plain values.
        origin: what error messages name as the source, usually a file.
        before: `tree` without what the command line changed; None if it changed nothing. Only what is wrong with it,
            too, comes from `origin`.

    Raises:
        UsageError: a key is unknown, or a value has the wrong type or range.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        source = "command line" if before is not None and not _problems(error) & _problems_of(before) else origin
        raise UsageError(f"{source}: {explain_problems(error, RunConfig)}") from None


def _problems_of(tree: dict[str, Any]) -> set[str]:
    try:
        RunConfig.model_validate(tree)
    except ValidationError as error:
        return _problems(error)
    return set()


def _problems(error: ValidationError) -> set[str]:
    return {f"{problem['loc']} {problem['type']} {problem['msg']}" for problem in error.errors()}


def explain_problems(error: ValidationError, section: type[BaseModel]) -> str:
    """Summarize in one line what pydantic found wrong with the values of `section`."""
    # default_factory_not_called concerns a default derived from another field, which is reported itself.
    found = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
    return "; ".join(_explain(problem, section) for problem in found)


def dump_config(config: RunConfig) -> str:
    """Format the resolved configuration as YAML, from which `load_config` restores an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write_config(path: Path, config: RunConfig) -> None:
    """Write the resolved configuration to a file, which others cannot read if a URI in it has a password.

    Raises:
        OSError: the file cannot be written.
    """
    text = dump_config(config)
    write_atomically(path, text.encode(), private=without_password(text) != text)


def flatten(config: RunConfig) -> dict[str, str]:
    """Map dotted field names to values as text, for MLflow's parameters."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = str(value)

    walk("", config.model_dump(mode="json"))
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        shipped = resources.files("biroute.configs").joinpath(path.name)
        hint = f"; BiRoute includes one of that name: {shipped}" if shipped.is_file() else ""
        raise UsageError(f"{path}: no such configuration file{hint}")
    try:
        tree = parse_yaml(read_given(path))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UsageError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected sections such as 'model:' and 'train:', found {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise UsageError(f"override {override!r} is not of the form section.field=value, such as train.steps=100")
    value = _override_value(text, keys, override)
    if isinstance(value, dict) and _is_section(keys):
        raise UsageError(
            f"override {override[:80]!r}: {name} is a section; set its fields, such as {name}.FIELD=VALUE"
        )
    branch = tree
    for depth, key in enumerate(keys[:-1]):
        inner = branch.setdefault(key, {})
        if inner is None:
            inner = branch[key] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
        branch = inner
    branch[keys[-1]] = value


def _override_value(text: str, keys: Sequence[str], override: str) -> Any:
    """Read the value of an override: YAML, but a text or path is what was written, such as 2024, a #b or ` a`."""
    try:
        value = text if _has_comment(text) else parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        if _is_text(keys):
            return text
        shown = text if len(text) < 80 else f"{text[:60]}..."
        raise UsageError(f"override {override[:80]!r}: {shown!r} is not a YAML value; quote it") from None
    if _is_text(keys) and isinstance(value, str):
        return text if _is_plain(text) else value
    return text if _is_text(keys) and isinstance(value, int | float | datetime.date) else value


def _is_text(keys: Sequence[str]) -> bool:
    """Does this field of a configuration hold a text or a path?"""
    return _kind_of(keys) in (str, Path)


def _is_section(keys: Sequence[str]) -> bool:
    """Is this a section, of which a mapping would reset all fields that it leaves out?"""
    kind = _kind_of(keys)
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _kind_of(keys: Sequence[str]) -> Any:
    """Return the type of a field of a configuration; None if there is no such field."""
    model: Any = RunConfig
    for key in keys:
        if not (isinstance(model, type) and issubclass(model, BaseModel) and key in model.model_fields):
            return None
        model = section_of(model.model_fields[key].annotation)
    return model


def _is_plain(text: str) -> bool:
    """Is this a text without quotes, of which YAML would cut off the blanks at either end?"""
    node = yaml.compose(text, _Loader)
    return isinstance(node, yaml.ScalarNode) and node.style is None


def _has_comment(text: str) -> bool:
    """Would YAML cut a plain value off at a `#`? In an override nothing is a comment."""
    node = yaml.compose(text, _Loader)
    if node is None:
        return bool(text.strip())
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.end_mark.index < len(text.rstrip())


def _explain(problem: Any, section: type[BaseModel]) -> str:
    """Format one pydantic error as `field=value: message`, with a suggestion for an unknown key."""
    location = problem["loc"]
    name = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(section, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"unknown key {name}; {hint}"
    message = _what_is_wanted(problem["type"], problem["input"]) or problem["msg"].removeprefix("Value error, ")
    if not location and not isinstance(problem["input"], dict | BaseModel):
        return f"expected lines of the form 'field: value', found a {type(problem['input']).__name__}"
    if isinstance(problem["input"], dict | BaseModel):
        return f"{name}: {message}" if name else message
    return f"{name} {message}" if problem["input"] is None else f"{name}={problem['input']!r}: {message}"


def _what_is_wanted(kind: str, value: Any) -> str:
    """Say in words for people who write YAML what is wrong with the type of a value; empty for other problems."""
    if kind in ("model_type", "model_attributes_type"):
        return "a section, not a value; set its fields"
    if value is None and kind.endswith("_type"):
        return "is empty; give a value, or leave the line out for the default"
    if kind in ("string_type", "path_type"):
        scalar = isinstance(value, int | float | datetime.date)
        return (
            f"not a text; put it in quotes: '{value}'"
            if scalar
            else "not a text but a list or section; put it in quotes"
        )
    if kind in ("int_parsing", "int_type", "int_from_float"):
        try:
            whole = float(value)
        except (TypeError, ValueError):
            return "not a whole number"
        return f"not a whole number; write {whole:.0f}" if whole.is_integer() else "not a whole number"
    if kind in ("float_parsing", "float_type"):
        return "not a number"
    if kind in ("tuple_type", "list_type"):
        return f"not a list; write [{value}]"
    return ""


def _known_keys(section: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    model: Any = section
    for part in location:
        if isinstance(part, str):
            model = section_of(model.model_fields[part].annotation)
    return list(model.model_fields)
