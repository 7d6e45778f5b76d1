"""Text that is shown: without passwords, and without characters that would command the terminal."""

from __future__ import annotations

import json
import re
from typing import Any

# Control characters and the marks that reverse the direction of text; tab and line break are harmless.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# user:password@ or token@ before a host, whose last @ ends it; and secrets among the parameters of a URI.
_USER_INFO = re.compile(r"://([^/\s:@]*)(:?)[^/\s]*@")
_PARAMETER = re.compile(
    r"([?&;][\w.-]*(?:password|passwd|pwd|passphrase|token|secret|api_?key)=)[^&;#\s'\"]+", re.IGNORECASE
)


def without_password(text: str) -> str:
    """Return `text` with every password and token masked that stands in a URI."""
    text = _USER_INFO.sub(lambda match: f"://{match[1]}:***@" if match[2] else "://***@", text)
    return _PARAMETER.sub(r"\1***", text)


def printable_json(value: Any) -> str:
    """Format a value as one line of JSON, text of any script as it is, control characters as JSON escapes them."""
    return _COMMANDS.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def printable(text: str) -> str:
    r"""Return `text` with control characters spelled, such as `\x1b`, rather than sent to the terminal.

    What a run folder, a log or a dataset holds may come from somebody else, and an escape sequence can set the
    window's title or the clipboard.
    """
    return _COMMANDS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
