"""The work of `biroute chat`: read a line, let the model answer, until the input ends."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from biroute.configs.errors import UsageError
from biroute.configs.messages import printable
from biroute.launcher.chat.brief_routes import brief_routes
from biroute.launcher.chat.conversation import Conversation
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.settings import Settings
from biroute.launcher.generate.trained import Say, Trained, open_trained

HELP = """/reset   forget the conversation
/routes  which regions were read for the last answer
/help    these lines
/quit    end, as Ctrl-D does
Ctrl-C stops an answer. Anything else is said to the model."""

# Bytes of a line. What is read of a line that never ends, as `yes | tr -d '\n'` writes one, must not fill the memory.
LONGEST_LINE = 1 << 24


@dataclass(frozen=True)
class Request:
    """What `biroute chat` was asked for; the fields are its options."""

    model: ModelChoice
    system: str | None


def chat(request: Request, settings: Settings, say: Say) -> None:
    """Talk until the input ends.

    Args:
        request: with which model.
        settings: how it answers.
        say: called with a line about each thing that the user should know.

    Raises:
        UsageError: as in `open_trained`.
    """
    trained = open_trained(request.model, say)
    say(f"{trained.checkpoint}: a base model, which continues a script of User and Assistant; /help, /quit")
    conversation = Conversation(trained, settings, request.system)
    if sys.stdin.isatty():
        # Its import gives input() the arrow keys and the history.
        import readline  # noqa: F401
    while True:
        try:
            line = _read_line().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # nobody types, so this is meant for the command
                raise
            print()  # as in a shell: the line is dropped
            continue
        except UnicodeDecodeError:
            say("this line is not UTF-8")
            continue
        except UsageError as error:
            say(str(error))
            continue
        if line == "/quit":
            return
        if line:
            _answer(line, conversation, trained, say)


def _read_line() -> str:
    """Return the next line of the input, asked for where somebody types it.

    Raises:
        EOFError: there is none.
        UnicodeDecodeError: it is not UTF-8.
        UsageError: it is longer than any model reads; it is left out.
    """
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            print()  # behind the prompt
            raise
    # As bytes: a line that is not UTF-8 would else take all the others of its block with it.
    line = sys.stdin.buffer.readline(LONGEST_LINE + 1)
    if not line:
        raise EOFError
    if len(line) > LONGEST_LINE:
        while line and not line.endswith(b"\n"):
            line = sys.stdin.buffer.readline(LONGEST_LINE)
        raise UsageError(f"this line is longer than {LONGEST_LINE:,} bytes, and left out; say less")
    return line.decode()


def _answer(line: str, conversation: Conversation, trained: Trained, say: Say) -> None:
    """Do what a line asks for, until that is done or Ctrl-C stops it."""
    try:
        _do(line, conversation, trained, say)
    except KeyboardInterrupt:
        print(flush=True)
        say("(stopped)")


def _do(line: str, conversation: Conversation, trained: Trained, say: Say) -> None:
    if not line.startswith("/"):
        _talk(line, conversation, say)
    elif line == "/reset":
        conversation.reset()
        say("(forgotten)")
    elif line == "/help":
        print(HELP, flush=True)
    elif line == "/routes":
        if conversation.last is None or not conversation.last.tokens:  # or Ctrl-C came before the first one
            say("(no answer yet)")
            return
        for one in brief_routes(trained.model, trained.tokenizer, conversation.last):
            print(printable(one), flush=True)
    else:
        say(f"{line.split()[0]} is no command; /help lists them")


def _talk(line: str, conversation: Conversation, say: Say) -> None:
    def show(piece: str) -> None:
        sys.stdout.write(printable(piece))
        sys.stdout.flush()

    try:
        line.encode()
        conversation.ask(line, show, say)
        print(flush=True)
    except UnicodeEncodeError:
        say("this line is not UTF-8")
    except UsageError as error:
        say(str(error))
