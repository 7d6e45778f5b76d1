"""One HTML page that shows the routes of a text, complete in itself.

The text comes from somebody's file, so nothing in it may act: it stands on the page as JSON without a character that
could end its element, the page's script makes text nodes of it, and a content security policy lets the browser run
that one script only and load nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

_TEMPLATE = "page.html"
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_HASH_PLACE, _DATA_PLACE = "@SCRIPT_HASH@", "@DATA@"
_ACTIVE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(report: dict[str, Any]) -> str:
    """Return the page as HTML.

    Args:
        report: what `--json` prints.
    """
    template = files("biroute.launcher.routes").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    script = _SCRIPT.search(template)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    # The data come last, so that no text can hold the place of something else.
    return template.replace(_HASH_PLACE, f"sha256-{digest}").replace(_DATA_PLACE, _harmless(json.dumps(report)))


def _harmless(text: str) -> str:
    """Return JSON in ASCII, without the characters that mean something in HTML: they stand in strings only."""
    for character, escape in _ACTIVE.items():
        text = text.replace(character, escape)
    return text
