"""Prompts from the command line or a file, checked. No torch."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from biroute.configs.errors import UsageError

_FIELD = "prompt"


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """Return the prompts of `--prompt` or of `--prompts`, of which there must be exactly one.

    Raises:
        UsageError: both or neither are given, a prompt is empty, or the file cannot be read or is not UTF-8.
    """
    if (prompt is None) == (file is None):
        both = "both are given" if prompt is not None else "neither is given"
        raise UsageError(f"use --prompt TEXT or --prompts FILE: {both}")
    if file is not None:
        return _of_file(file)
    assert prompt is not None
    _check(prompt, "--prompt")
    return [prompt]


def _of_file(file: Path) -> list[str]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--prompts={file}: {error.strerror}; name a text file, or a .jsonl file") from None
    data = data.removeprefix(codecs.BOM_UTF8)  # no part of the first prompt
    # Only \n ends a line: other line breaks of Unicode may be part of a prompt.
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    prompts = [_of_line(line, f"{file}, line {number}", file.suffix) for number, line in enumerate(lines, 1)]
    if not prompts:
        raise UsageError(f"--prompts={file}: the file is empty; write one prompt a line")
    return prompts


def _of_line(line: bytes, place: str, suffix: str) -> str:
    try:
        text = line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise UsageError(
            f"{place}: not UTF-8 (byte 0x{wrong:02x} at position {error.start + 1}); convert the file to UTF-8"
        ) from None
    if suffix == ".jsonl":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(f'{place}: not JSON; write {{"{_FIELD}": "..."}} in each line') from None
        prompt = found.get(_FIELD) if isinstance(found, dict) else None
        if not isinstance(prompt, str):
            raise UsageError(f'{place}: no text "{_FIELD}"; write {{"{_FIELD}": "..."}} in each line')
        text = prompt
    _check(text, place)
    return text


def _check(text: str, place: str) -> None:
    if not text:
        raise UsageError(f"{place}: the prompt is empty; give a text to continue")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{place}: the prompt is not valid UTF-8; give it in UTF-8") from None
