"""Continue prompts with a trained model: as many at a time as wanted, of any lengths, each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.tokenizer import Tokenizer
from biroute.launcher.generate.sampling import Choice, choose_token, uniform_numbers
from biroute.launcher.generate.settings import Settings
from biroute.launcher.generate.text_stream import TextStream
from biroute.model.decode.cached_model import CachedModel, CachedSequence

# end_of_document: the model ended the text; model_length: the sequence is as long as those of training.
Reason = Literal["end_of_document", "stop", "max_tokens", "model_length"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens."""

    number: int
    text: str
    tokens: tuple[int, ...]
    sample: int = 0  # samples of a prompt draw other numbers


@dataclass
class Continuation:
    """What the model made of a prompt."""

    prompt: Prompt
    tokens: list[Choice] = field(default_factory=list)  # with the end of document or stop text, if there was one
    text: str = ""
    reason: Reason | None = None  # None: it goes on
    stopped_at: str | None = None


# Called with a continuation and the piece of text that has been added; at its end once more, with `reason` set.
OnText = Callable[[Continuation, str], None]


def encode_prompts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    longest: int,
    *,
    samples: int = 1,
    document_start: bool = False,
    keep_last: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Prompt]:
    """Turn prompts into tokens, and check that the model can take them.

    Args:
        texts: the prompts.
        tokenizer: the model's.
        longest: tokens of a sequence of the model.
        samples: continuations of each prompt.
        document_start: put the end of a document before each prompt, as if the prompt began one.
        keep_last: cut what is longer than this from the prompt's beginning, and say so; None: refuse a prompt that
            leaves no room for a token.
        say: called with a line about each prompt that is cut.

    Raises:
        UsageError: a prompt is too long.
    """
    prompts = []
    for number, text in enumerate(texts):
        tokens = [*([tokenizer.eos_id] if document_start else []), *tokenizer.encode(text)]
        if keep_last is not None and len(tokens) > keep_last:
            say(f"prompt {number}: only the last {keep_last} of its {len(tokens)} tokens are used (--truncate)")
            tokens = tokens[-keep_last:]
        if len(tokens) >= longest:
            raise UsageError(
                f"prompt {number} has {len(tokens)} tokens, but the model was trained with sequences of {longest}, "
                "with the continuation; shorten the prompt, or use --truncate to keep only its end"
            )
        prompts += [Prompt(number, text, tuple(tokens), sample) for sample in range(samples)]
    return prompts


class Running:
    """A sequence that is being continued.

    Attributes:
        answer: its continuation so far.
        sequence: what it has left in the model's cache.
    """

    def __init__(self, prompt: Prompt, sequence: CachedSequence, settings: Settings) -> None:
        """Begin behind a prompt, which `sequence` holds already."""
        self.answer, self.sequence, self.settings = Continuation(prompt), sequence, settings
        self.stream = TextStream(settings.stop)
        self._numbers = uniform_numbers(settings.seed, prompt.sample)

    def take(self, logits_V: Tensor, tokenizer: Tokenizer, longest: int) -> str:
        """Choose the next token; returns the text that it adds. `reason` is set when it was the last."""
        answer, settings = self.answer, self.settings
        seen = [*answer.prompt.tokens, *(choice.token for choice in answer.tokens)]
        # Rows of the vocabulary behind the tokenizer's are padding, and no token.
        choice = choose_token(logits_V[: tokenizer.vocab_size], seen, settings, next(self._numbers))
        answer.tokens.append(choice)
        piece = self.stream.push(tokenizer.decode_bytes([choice.token]))
        answer.stopped_at = self.stream.stopped_at
        if choice.token == tokenizer.eos_id:
            answer.reason = "end_of_document"
        elif answer.stopped_at is not None:
            answer.reason = "stop"
        elif len(answer.tokens) >= settings.max_tokens:
            answer.reason = "max_tokens"
        elif len(seen) + 1 >= longest:
            answer.reason = "model_length"
        if answer.reason is not None:
            piece += self.stream.finish()
        answer.text = self.stream.text
        return piece


def continue_prompts(
    model: CachedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    batch_size: int = 8,
    on_text: OnText = lambda *_: None,
) -> list[Continuation]:
    """Continue all prompts; a place that becomes free goes to the next one.

    A continuation depends on its prompt, sample and settings only, not on the others, to the bit (see
    `biroute.model.decode.cached_model`).

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        prompts: from `encode_prompts`.
        settings: how to continue.
        batch_size: sequences at a time.
        on_text: told of each piece of text.

    Returns:
        The continuations in the order of the prompts.
    """
    waiting, running, answers = iter(prompts), list[Running](), list[Continuation]()
    longest = model.model.sequence_length

    def advance(one: Running, logits_V: Tensor) -> None:
        piece = one.take(logits_V, tokenizer, longest)
        if piece or one.answer.reason:
            on_text(one.answer, piece)
        if one.answer.reason is None:
            running.append(one)

    while True:
        for prompt in _next_ones(waiting, batch_size, running):
            sequence, logits_V = model.prefill(prompt.tokens)
            one = Running(prompt, sequence, settings)
            answers.append(one.answer)
            advance(one, logits_V)
        if not running:
            return answers
        going, running[:] = list(running), []
        logits_BV = model.step([one.sequence for one in going], [one.answer.tokens[-1].token for one in going])
        for one, logits_V in zip(going, logits_BV, strict=True):
            advance(one, logits_V)


def _next_ones(waiting: Iterator[Prompt], batch_size: int, running: list[Running]) -> Iterator[Prompt]:
    """Yield prompts as long as there is room among those that run, which grow with them."""
    while len(running) < batch_size:
        prompt = next(waiting, None)
        if prompt is None:
            return
        yield prompt
