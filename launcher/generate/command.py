"""The work of `biroute generate`: load the model, continue the prompts, print."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from biroute.configs.errors import UsageError
from biroute.launcher.generate.continuation import Continuation, Prompt, continue_prompts, encode_prompts
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.output import Terminal, as_json, summary
from biroute.launcher.generate.settings import Settings
from biroute.launcher.generate.trained import Say, Trained, open_trained


@dataclass(frozen=True)
class Request:
    """What `biroute generate` was asked for, besides how tokens are chosen; the fields are its options."""

    model: ModelChoice
    texts: Sequence[str]
    samples: int = 1
    batch_size: int = 8
    document_start: bool = False
    truncate: bool = False
    echo: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("batch-size", self.batch_size)):
            if value < 1:
                raise UsageError(f"--{name}={value} is out of range; use at least 1")


def generate(request: Request, settings: Settings, say: Say) -> str:
    """Continue the prompts; what is to be read goes to the standard output.

    Args:
        request: what to continue, with which model.
        settings: how.
        say: called with a line about each thing that the user should know.

    Returns:
        The JSON to print; empty if the texts have been printed.

    Raises:
        UsageError: as in `open_trained` and `encode_prompts`.
    """
    trained = open_trained(request.model, say)
    prompts = _encode(request, settings, trained, say)
    terminal = Terminal(prompts, echo=request.echo)
    began = time.perf_counter()
    answers = continue_prompts(
        trained.model, trained.tokenizer, prompts, settings,
        batch_size=request.batch_size, on_text=(lambda *_: None) if request.as_json else terminal.on_text,
    )  # fmt: skip
    say(f"{trained.checkpoint}: {summary(answers, time.perf_counter() - began)}")
    if request.as_json:
        return as_json(answers, trained.tokenizer, _about(request, settings, trained, answers))
    return ""


def _encode(request: Request, settings: Settings, trained: Trained, say: Say) -> list[Prompt]:
    longest = trained.config.model.sequence_length
    prompts = encode_prompts(
        request.texts, trained.tokenizer, longest,
        samples=request.samples, document_start=request.document_start,
        keep_last=max(1, longest - settings.max_tokens) if request.truncate else None, say=say,
    )  # fmt: skip
    for prompt in prompts:
        room = longest - len(prompt.tokens)
        if prompt.sample == 0 and room < settings.max_tokens:
            say(
                f"prompt {prompt.number} has {len(prompt.tokens)} tokens; the model's sequences of {longest} have "
                f"room for {room} more, not for --max-tokens={settings.max_tokens}"
            )
    return prompts


def _about(
    request: Request, settings: Settings, trained: Trained, answers: Sequence[Continuation]
) -> dict[str, object]:
    return {
        "checkpoint": str(trained.checkpoint),
        "step": trained.meta.progress.step,
        "precision": request.model.precision,
        "exact": trained.model.exact,
        "settings": asdict(settings),
    }
