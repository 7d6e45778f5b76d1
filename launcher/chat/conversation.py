"""A conversation with a trained model: what was said, and the next answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from biroute.configs.errors import UsageError
from biroute.launcher.generate.chat_template import STOP, AnswerStream, Message, render
from biroute.launcher.generate.continuation import Continuation, Prompt, continue_prompts
from biroute.launcher.generate.settings import Settings
from biroute.launcher.generate.trained import Say, Trained


@dataclass
class Answer:
    """What the model said, and the tokens that it saw and added; a stop text is not among those."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    text: str = ""


class Conversation:
    """Messages in their order.

    Attributes:
        messages: what was said, the system's words first, if there are any.
        last: the last answer; None before the first.
    """

    def __init__(self, trained: Trained, settings: Settings, system: str | None = None) -> None:
        """Begin.

        Args:
            trained: the model.
            settings: of the answers; each answer draws with a seed of its own, counted up from that.
            system: what stands before everything else.
        """
        self._trained, self._settings = trained, settings
        self._system = [] if system is None else [Message("system", system)]
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but for the system's words."""
        self.messages = list(self._system)
        self.last: Answer | None = None
        self._turn = 0

    def ask(self, text: str, show: Callable[[str], None], say: Say) -> None:
        """Say something, and let the model answer.

        An answer that Ctrl-C (KeyboardInterrupt) stops counts as far as it was shown.

        Args:
            text: what is said.
            show: called with each piece of the answer.
            say: called with a line if messages have to be left out.

        Raises:
            UsageError: the text alone is too long; the conversation is as it was.
        """
        messages = [*self.messages, Message("user", text)]
        tokens = self._fitting(messages, say)
        answer, stream = Answer(tokens), AnswerStream()

        def on_text(continuation: Continuation, piece: str) -> None:
            piece = stream.push(piece)
            answer.text += piece
            answer.tokens = tuple(choice.token for choice in continuation.tokens)
            show(piece)

        settings = replace(self._settings, stop=(*self._settings.stop, STOP), seed=self._settings.seed + self._turn)
        trained = self._trained
        self.messages, self.last, self._turn = messages, answer, self._turn + 1
        try:
            continue_prompts(trained.model, trained.tokenizer, [Prompt(0, text, tokens)], settings, on_text=on_text)
        finally:
            self.messages.append(Message("assistant", answer.text.rstrip()))

    def _fitting(self, messages: list[Message], say: Say) -> tuple[int, ...]:
        """Drop the oldest messages, in place, until the rest has room for an answer; returns the prompt's tokens."""
        longest = self._trained.config.model.sequence_length
        first, dropped = len(self._system), 0
        while True:
            tokens = tuple(self._trained.tokenizer.encode(render(messages)))
            alone = len(messages) == first + 1
            if len(tokens) + self._settings.max_tokens <= longest or (alone and len(tokens) < longest):
                break
            if alone:
                raise UsageError(
                    f"this makes {len(tokens)} tokens, but the model was trained with sequences of {longest}, with "
                    "the answer; say less"
                )
            del messages[first]
            dropped += 1
        if dropped:
            say(f"(the model's sequences have {longest} tokens: the {dropped} oldest messages are left out)")
        return tokens
