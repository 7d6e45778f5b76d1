"""The work of `biroute routes`: read the text, run the model over it, write the page or the JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.files import write_atomically
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.trained import Say, Trained, open_trained
from biroute.launcher.routes.page import page
from biroute.launcher.routes.record import read_routes
from biroute.launcher.routes.report import layers_report, text_report


@dataclass(frozen=True)
class Request:
    """What `biroute routes` was asked for; the fields are its options. `out`: None writes no page."""

    model: ModelChoice
    text: str
    text_name: str
    max_tokens: int | None = None
    out: Path | None = None
    as_json: bool = False


def show_routes(request: Request, say: Say) -> str:
    """Write the page, if one is wanted.

    Args:
        request: which model, which text, what to write.
        say: called with a line about each thing that the user should know.

    Returns:
        The JSON to print; empty if none is wanted.

    Raises:
        UsageError: as in `open_trained`, or the page cannot be written.
    """
    trained = open_trained(request.model, say)
    report = make_report(request, trained, say)
    if request.out is not None:
        try:
            write_atomically(request.out, page(report).encode())
        except OSError as error:
            raise UsageError(f"--out={request.out}: {error.strerror}; name a file in a folder of yours") from None
        say(f"{request.out}: routes of {len(report['tokens'])} tokens by {trained.checkpoint}")
    return json.dumps(report) if request.as_json else ""


def make_report(request: Request, trained: Trained, say: Say) -> dict[str, Any]:
    """Return what the JSON and the page hold; a text that is too long is cut, and that is said.

    Args:
        request: the text, and how much of it.
        trained: the model.
        say: called with a line if the text is cut.
    """
    model = trained.config.model
    tokens = trained.tokenizer.encode(request.text)
    longest = min(model.sequence_length, request.max_tokens or model.sequence_length)
    if len(tokens) > longest:
        why = "--max-tokens" if longest == request.max_tokens else "as many as the model's sequences have"
        say(f"{request.text_name}: only the first {longest} of its {len(tokens)} tokens are shown ({why})")
    shown = tokens[:longest]
    size = model.attention.region_size
    return {
        "run": str(request.model.run),
        "checkpoint": str(trained.checkpoint),
        "step": trained.meta.progress.step,
        "precision": request.model.precision,
        "text_name": request.text_name,
        "tokens_of_text": len(tokens),
        **text_report(shown, trained.tokenizer, size),
        "layers": layers_report(read_routes(trained.model, shown), size),
    }
