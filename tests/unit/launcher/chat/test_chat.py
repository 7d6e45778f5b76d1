"""A conversation: what the model sees of it, what is forgotten, and what the commands say."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.cached import cached_model, recorded_routes, tiny_config
from helpers.served import ByteTokenizer

from biroute.configs.errors import UsageError
from biroute.launcher.chat import command
from biroute.launcher.chat.brief_routes import brief_routes
from biroute.launcher.chat.conversation import Answer, Conversation
from biroute.launcher.generate.chat_template import AnswerStream, Message, render
from biroute.launcher.generate.continuation import Prompt, continue_prompts
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.settings import Settings
from biroute.launcher.generate.trained import Trained


@pytest.fixture(scope="module")
def trained() -> Any:
    config = tiny_config({"sequence_length": 96})
    return SimpleNamespace(
        config=config, model=cached_model(config), tokenizer=ByteTokenizer(), checkpoint=Path("run/step")
    )


def test_the_script_of_a_conversation() -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "Who?"),
        Message("assistant", "Me."),
        Message("user", "?"),
    ]
    assert render(messages) == "Be brief.\n\nUser: Who?\nAssistant: Me.\nUser: ?\nAssistant:"
    stream = AnswerStream()
    assert [stream.push(piece) for piece in (" ", "\n", " a", " b", "")] == ["", "", "a", " b", ""]


def test_each_answer_continues_all_that_was_said(trained: Trained) -> None:
    settings = Settings(max_tokens=6, seed=4)
    conversation, shown = Conversation(trained, settings, "S"), list[str]()
    prompt = "S\n\nUser: a\nAssistant:"
    for turn, text in enumerate(("a", "b")):
        conversation.ask(text, shown.append, shown.append)
        (expected,) = continue_prompts(
            trained.model, trained.tokenizer, [Prompt(0, "", tuple(prompt.encode()))],
            Settings(max_tokens=6, seed=4 + turn, stop=("\nUser:",)),
        )  # fmt: skip
        answer = expected.text.lstrip()
        assert "".join(shown) == answer and conversation.messages[-1] == Message("assistant", answer.rstrip())
        assert conversation.last is not None and conversation.last.prompt == tuple(prompt.encode())
        assert conversation.last.tokens == tuple(choice.token for choice in expected.tokens)
        prompt += f" {answer.rstrip()}\nUser: b\nAssistant:"
        shown.clear()
    conversation.reset()
    assert conversation.messages == [Message("system", "S")] and conversation.last is None


def test_an_answer_ends_where_the_user_would_speak(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(
        "biroute.launcher.chat.conversation.continue_prompts", lambda *given, **_: seen.append(given[3])
    )
    Conversation(trained, Settings(max_tokens=6)).ask("a", print, print)
    assert seen[0].stop == ("\nUser:",)


def test_the_oldest_messages_make_room(trained: Trained) -> None:
    conversation, said = Conversation(trained, Settings(max_tokens=16), "S"), list[str]()
    for text in ("x" * 30, "y" * 30):
        conversation.ask(text, lambda _: None, said.append)
    assert said == ["(the model's sequences have 96 tokens: the 2 oldest messages are left out)"]
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant"]
    before = list(conversation.messages)
    with pytest.raises(UsageError, match=r"this makes 120 tokens, .* sequences of 96, .* say less"):
        conversation.ask("z" * 100, lambda _: None, said.append)
    assert conversation.messages == before


def test_ctrl_c_stops_the_answer_and_keeps_what_was_shown(trained: Trained) -> None:
    conversation, shown = Conversation(trained, Settings(max_tokens=30, seed=1)), list[str]()

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("a", show, shown.append)
    assert conversation.messages[-1] == Message("assistant", "".join(shown).rstrip())
    conversation.ask("b", lambda _: None, shown.append)
    assert len(conversation.messages) == 4


def test_routes_in_brief_count_what_the_answers_tokens_chose(trained: Trained) -> None:
    prompt, tokens = tuple(b"0123456789abcdefghij" * 3), tuple(b"answer")
    lines = brief_routes(trained.model, trained.tokenizer, Answer(prompt, tokens))
    with recorded_routes(trained.model) as routes:
        trained.model.prefill([*prompt, *tokens])
    reads = [0] * 9
    for _, route in routes:
        for head in route[0].tolist():
            for token in range(59, 65):  # the routes that led to the answer's tokens, of 8 tokens a region
                for region in head[token]:
                    reads[region] += 0 <= region < token // 8 - 1
    hottest = min(range(9), key=lambda region: (-reads[region], region))
    beginning = (prompt + tokens)[hottest * 8 : hottest * 8 + 8]
    assert lines[1] == f"{reads[hottest] / (6 * 4):6.0%}  region {hottest:<4d} {bytes(beginning).decode()}"
    assert len(lines) == 1 + sum(count > 0 for count in reads)
    short = brief_routes(trained.model, trained.tokenizer, Answer(tuple(b"ab"), tuple(b"c")))
    assert short == ["(nothing was read but each token's own region and the one before it, or everything)"]


def test_the_commands(trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "open_trained", lambda *_, **__: trained)
    typed = b"/routes\n\n/help\n/what now\n\xff\nhello\n/routes\n/reset\n/routes\n/quit\nx\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
    said: list[str] = []
    request = command.Request(ModelChoice(Path("run")), None)
    command.chat(request, Settings(max_tokens=8, seed=1), said.append)
    out = capsys.readouterr().out
    assert out.startswith(command.HELP) and len(out.splitlines()) > len(command.HELP.splitlines()) + 1
    assert "region" in out or "(nothing was read" in out
    assert said[1:] == [
        "(no answer yet)",
        "/what is no command; /help lists them",
        "this line is not UTF-8",
        "(forgotten)",
        "(no answer yet)",
    ]


def test_ctrl_c_ends_what_is_being_done_and_no_conversation(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    class Input(io.BytesIO):
        """Bytes, and Ctrl-C where they end."""

        def readline(self, size: int | None = -1) -> bytes:
            return super().readline(size) or interrupted()

    monkeypatch.setattr(command, "open_trained", lambda *_, **__: trained)
    monkeypatch.setattr(command, "brief_routes", interrupted)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Input(b"hello\n/routes\n/help\n")))
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # nobody types: at the "prompt" it is meant for the command
        command.chat(command.Request(ModelChoice(Path("run")), None), Settings(max_tokens=4), said.append)
    assert said[1:] == ["(stopped)"] and capsys.readouterr().out.endswith(command.HELP + "\n")


def test_an_answer_that_was_stopped_before_its_first_token_has_no_routes(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, said = Conversation(trained, Settings(max_tokens=4)), list[str]()

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trained.model, "prefill", interrupted)
        command._answer("a", conversation, trained, said.append)
    command._answer("/routes", conversation, trained, said.append)
    assert said == ["(stopped)", "(no answer yet)"]
    assert [message.role for message in conversation.messages] == ["user", "assistant"]


def test_a_line_without_an_end_is_left_out(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "open_trained", lambda *_, **__: trained)
    monkeypatch.setattr(command, "LONGEST_LINE", 8)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/help\n" + b"x" * 50 + b"\n/reset\n" + b"y" * 9)))
    said: list[str] = []
    command.chat(command.Request(ModelChoice(Path("run")), None), Settings(max_tokens=4), said.append)
    too_long = "this line is longer than 8 bytes, and left out; say less"
    assert said[1:] == [too_long, "(forgotten)", too_long] and capsys.readouterr().out == command.HELP + "\n"
