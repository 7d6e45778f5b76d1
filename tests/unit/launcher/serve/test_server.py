"""The server: what it answers, also to clients that are wrong, gone or too many."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from helpers.served import ByteTokenizer, Served, post, response, served, until

from biroute.launcher.generate.continuation import Prompt, continue_prompts
from biroute.launcher.generate.settings import Settings


@pytest.fixture(scope="module")
def tiny() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture
def client(tiny: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=tiny.address, api_key="none", max_retries=0)


def expected(tiny: Served, prompt: str, settings: Settings, sample: int = 0) -> Any:
    tokenizer: Any = ByteTokenizer()
    (answer,) = continue_prompts(
        tiny.worker.model, tokenizer, [Prompt(0, prompt, tuple(prompt.encode()), sample)], settings
    )
    return answer


def test_openai_completes_as_biroute_generate_does(tiny: Served, client: openai.OpenAI) -> None:
    settings = Settings(max_tokens=9, temperature=0.7, top_p=0.9, seed=5)
    done = client.completions.create(
        model="tiny", prompt=["To be", "床"], max_tokens=9, temperature=0.7, top_p=0.9, seed=5, n=2, logprobs=2
    )
    found = [expected(tiny, prompt, settings, sample) for prompt in ("To be", "床") for sample in (0, 1)]
    assert [choice.text for choice in done.choices] == [one.text for one in found]
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (8, sum(len(one.tokens) for one in found))
    for choice, one in zip(done.choices, found, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx([token.log_probability for token in one.tokens])
        assert choice.finish_reason == ("length" if one.reason == "max_tokens" else "stop")


def test_echo_has_the_log_probability_of_each_token_of_the_prompt(tiny: Served, client: openai.OpenAI) -> None:
    """As lm-eval asks: beside one forward pass over prompt and answer."""
    prompt = "To be 床"
    done = client.completions.create(
        model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1
    )
    (choice,) = done.choices
    assert choice.text.startswith(prompt) and choice.logprobs is not None
    found = choice.logprobs
    whole = [*prompt.encode(), expected(tiny, prompt, Settings(max_tokens=1, temperature=0)).tokens[0].token]
    with torch.no_grad():
        logits = tiny.worker.model.layers(torch.tensor([whole + [0] * (-len(whole) % 8)]))[:, 0]
    log_probabilities = logits[:, : ByteTokenizer.vocab_size].double().log_softmax(-1)
    wanted = [float(log_probabilities[n, token]) for n, token in enumerate(whole[1:])]
    assert found.token_logprobs is not None and found.top_logprobs is not None and found.text_offset is not None
    assert found.token_logprobs[0] is None and found.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    assert len(found.token_logprobs) == len(whole)
    for n, top in enumerate(found.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(float(log_probabilities[n].max()), abs=1e-4)
    assert found.tokens is not None
    assert found.tokens[:2] == ["T", "o"] and found.tokens[6] == "bytes:\\xe5" and found.text_offset[:3] == [0, 1, 2]


def test_only_the_prompt_is_looked_at_with_no_token_to_generate(tiny: Served) -> None:
    done = tiny.complete(prompt="x" * 96, echo=True, logprobs=0, max_tokens=0)
    assert done["choices"][0]["text"] == "x" * 96 and done["usage"]["completion_tokens"] == 0
    assert len(done["choices"][0]["logprobs"]["token_logprobs"]) == 96


def test_a_stream_has_the_pieces_of_the_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "To be", "max_tokens": 12, "seed": 3, "n": 2, "echo": True}
    whole = client.completions.create(**options)
    texts, reasons, usage = ["", ""], ["", ""], None
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.text for choice in whole.choices] and usage == whole.usage
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_stop_texts_are_left_out(tiny: Served, client: openai.OpenAI) -> None:
    text = expected(tiny, "To be", Settings(max_tokens=20, seed=3)).text
    done = client.completions.create(model="tiny", prompt="To be", max_tokens=20, seed=3, stop=[text[4:6], "\0\0\0"])
    assert (done.choices[0].text, done.choices[0].finish_reason) == (text[: text.index(text[4:6])], "stop")


def test_chat_is_a_script_that_the_model_continues(tiny: Served, client: openai.OpenAI) -> None:
    settings = Settings(max_tokens=8, seed=2, stop=("\nUser:",))
    one = expected(tiny, "Be brief.\n\nUser: Who?\nAssistant:", settings)
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    done = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=8, seed=2, logprobs=True, top_logprobs=2
    )
    (choice,) = done.choices
    assert choice.message.role == "assistant" and choice.message.content == one.text.lstrip()
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
        [token.log_probability for token in one.tokens]
    )
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    pieces = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, seed=2, stream=True, stream_options={"include_usage": True}
    )
    deltas = [chunk.choices[0].delta for chunk in pieces if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    with pytest.raises(openai.BadRequestError, match=r"prompt has 118 tokens, .* sequences of 96") as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 101}])
    assert error.value.param == "messages"


def test_models_and_a_wrong_one(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="model='gpt' is not served here; use 'tiny'"):
        client.completions.create(model="gpt", prompt="a")


WRONG: list[tuple[Any, str | None, str]] = [
    ({}, "prompt", "prompt is missing"),
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": ["a", ""]}, "prompt", "prompt is empty"),
    ({"prompt": []}, "prompt", "prompt=[]: give a text"),
    ({"prompt": [["a"]]}, "prompt", "give a text, tokens"),
    ({"prompt": [1, 320]}, "prompt", "prompt has the token 320; this model has tokens 0 to 319"),
    ({"prompt": [True]}, "prompt", "give a text, tokens"),
    ({"prompt": "\ud800"}, "prompt", "prompt is no valid Unicode"),
    ({"prompt": "x" * 96}, "prompt", "the prompt has 96 tokens, but the model was trained with sequences of 96"),
    ({"prompt": "a", "max_tokens": "7"}, "max_tokens", 'max_tokens="7": '),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens=0 asks for nothing"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "max_tokens=true"),
    ({"prompt": "a", "temperature": -1}, "temperature", "temperature=-1: "),
    ({"prompt": "a", "temperature": float("nan")}, "temperature", "temperature=NaN: "),
    ({"prompt": "a", "top_p": 0}, "top_p", "top_p=0: "),
    ({"prompt": "a", "n": 0}, "n", "n=0: "),
    ({"prompt": "a", "n": 100}, "n", "ask for 100 texts; this server takes at most 12"),
    ({"prompt": "a", "seed": 2**63}, "seed", "seed=9223372036854775808: "),
    ({"prompt": "a", "stop": ""}, "stop", 'stop="": give a text'),
    ({"prompt": "a", "stop": "\ud800"}, "stop", "stop is no valid Unicode"),
    ({"prompt": "a", "stop": ["b"] * 17}, "stop", "stop has 17 texts; use at most 16"),
    ({"prompt": "a", "stream": "yes"}, "stream", 'stream="yes"'),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "stream_options.x is unknown"),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "presence_penalty is not supported"),
    ({"prompt": "a", "maxtokens": 5}, "maxtokens", "maxtokens is unknown; leave it out"),
    (b"{", None, "the body is not JSON"),
    (b"\xff", None, "the body is not JSON"),
    (b"[" * 100_000, None, "the body is not JSON"),
    (b"[1]", None, "the body is not a JSON object"),
]


@pytest.mark.parametrize(("body", "param", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_a_wrong_field_is_named(tiny: Served, body: Any, param: str | None, message: str) -> None:
    status, content, _ = tiny.ask("POST", "/v1/completions", body)
    assert status == 400
    error = content["error"]
    assert error["param"] == param and message in error["message"] and "Traceback" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "tool", "content": "a"}], "messages.0.role"),
        (["a"], "messages.0.role"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "messages.1.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
    ],
)
def test_a_wrong_message_is_named(tiny: Served, messages: Any, param: str) -> None:
    status, content, _ = tiny.ask("POST", "/v1/chat/completions", {"messages": messages})
    assert (status, content["error"]["param"]) == (400, param)


def test_fields_that_ask_for_nothing_are_taken_and_further_ones_act(tiny: Served) -> None:
    plain = tiny.complete(prompt="a", max_tokens=6, seed=1)["choices"]
    neutral = {"user": "me", "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": None}
    assert tiny.complete(prompt="a", max_tokens=6, seed=1, **neutral)["choices"] == plain
    greedy = tiny.complete(prompt=[97], max_tokens=6, temperature=0)["choices"]
    for further in ({"top_k": 1}, {"min_p": 1.0}):
        assert tiny.complete(prompt="a", max_tokens=6, seed=1, **further)["choices"] == greedy != plain
    settings = Settings(max_tokens=6, temperature=0, repetition_penalty=50.0)
    penalized = tiny.complete(prompt="a", max_tokens=6, temperature=0, repetition_penalty=50.0)["choices"]
    assert penalized[0]["text"] == expected(tiny, "a", settings).text


@pytest.mark.parametrize(
    ("request_bytes", "status", "message"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "there is nothing at /nothing"),
        (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, "takes POST, not GET"),
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405, "takes GET, not POST"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 411, "Content-Length"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400, "Content-Length"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n",
            413,
            "the body has 99999999 bytes",
        ),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403, "Host: evil.example is not this machine"),
        (b"GET /health HTTP/1.1\r\nHost: [::1\r\n\r\n", 403, "is not this machine"),
        (b"nonsense\r\n\r\n", 400, ""),
        (b"GET http://[/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "there is nothing at http://[/health"),
        (b"POST //[ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", 404, "there is nothing at //["),
        (b"GET /health HTTP/9\r\n\r\n", 400, ""),
        (b"\x16\x03\x01\x02\r\n\r\n", 400, ""),
        (b"GET /" + b"a" * 400_000 + b" HTTP/1.1\r\n\r\n", 414, ""),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 400_000 + b"\r\n\r\n", 431, ""),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501, ""),
        (post({}).replace(b"Content-Length: 2", b"Transfer-Encoding: chunked") + b"\r\n", 400, "chunk"),
    ],
)
def test_broken_requests_get_an_error_object(
    tiny: Served, request_bytes: bytes, status: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with tiny.raw(request_bytes) as connection:
        head, body = response(connection)
    assert message in json.loads(body)["error"]["message"]
    assert head.startswith(b"HTTP/1.1 %d" % status) or status == 400
    assert tiny.ask("GET", "/health")[:2] == (200, {"status": "ok"})
    assert not caplog.records  # nor does the terminal show anything of it


def test_a_connection_takes_several_requests(tiny: Served) -> None:
    with tiny.raw(post({"prompt": "a", "max_tokens": 1}) * 3) as connection:
        answers = b""
        while answers.count(b'"usage"') < 3:
            answers += connection.recv(65536)
    assert answers.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_gone_frees_its_place(stream: bool) -> None:
    with served(max_batch=1, queue=1) as one:
        one.gate.close()
        connection = one.raw(post({"prompt": "a", "max_tokens": 90, "stream": stream, "temperature": 0}))
        until(lambda: one.metric("biroute_running") == 1 or one.metric("biroute_generated_tokens_total") == 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        until(lambda: bool(one.server.service.metrics.as_text().count('status="499"')))
        one.gate.open()
        until(lambda: one.metric("biroute_cancelled_total") == 1)
        assert one.metric("biroute_running") == 0 and one.metric("biroute_generated_tokens_total") < 5
        assert one.complete(prompt="b", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_client_that_has_gone_frees_its_place_while_tokens_come_fast() -> None:
    with served(max_batch=1, queue=1) as one:
        step, steps, running = one.worker.model.step, list[int](), list[int]()

        def close_first(*arguments: Any) -> Any:
            steps.append(0)
            running.append(one.metric("biroute_running"))
            if len(steps) == 3:
                connection.close()
            time.sleep(0.01)
            return step(*arguments)

        one.worker.model.step = close_first  # type: ignore[method-assign]
        connection = one.raw(post({"prompt": "a", "max_tokens": 90, "temperature": 0}))
        until(lambda: len(steps) >= 3 and one.metric("biroute_running") == 0)
        assert one.metric("biroute_cancelled_total") == 1 and len(steps) < 60
        assert set(running) == {1}  # also in the middle of a step


def test_a_full_queue_says_when_to_try_again() -> None:
    with served(max_batch=1, queue=1) as one:
        one.gate.close()
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(one.complete(prompt="a", max_tokens=5, seed=1)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        # Not the first one, before it runs: there would still be a place.
        until(lambda: one.metric("biroute_generated_tokens_total") == 1 and one.metric("biroute_waiting") == 1)
        status, content, headers = one.ask("POST", "/v1/completions", {"prompt": "b"})
        assert (status, content["error"]["code"]) == (429, "queue_full") and int(headers["Retry-After"]) >= 1
        one.gate.open()
        for thread in threads:
            thread.join(20)
        assert len(answers) == 2 and answers[0]["choices"] == answers[1]["choices"]
        assert one.metric("biroute_rejected_total") == 1
        one.complete(prompt="b", max_tokens=2)


def test_requests_at_the_same_time_get_what_each_gets_alone(tiny: Served) -> None:
    bodies = [{"prompt": "abc" * n, "max_tokens": 10, "seed": n, "temperature": 0.8} for n in range(1, 8)]
    alone = [tiny.complete(**body)["choices"] for body in bodies]
    together: dict[int, Any] = {}
    tiny.gate.close()
    threads = [
        threading.Thread(target=lambda n=n, body=body: together.update({n: tiny.complete(**body)["choices"]}))  # type: ignore[misc]
        for n, body in enumerate(bodies)
    ]
    for thread in threads:
        thread.start()
    until(lambda: tiny.metric("biroute_waiting") >= 2)
    tiny.gate.open()
    for thread in threads:
        thread.join(30)
    assert [together[n] for n in range(len(bodies))] == alone


def test_a_stop_ends_what_runs_with_what_it_has_and_refuses_what_waits() -> None:
    with served(max_batch=1, queue=2) as one:
        one.gate.close()
        answers: dict[str, Any] = {}

        def ask(name: str) -> None:
            answers[name] = one.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 50, "temperature": 0})

        first = threading.Thread(target=ask, args=["first"])
        first.start()
        until(lambda: one.metric("biroute_generated_tokens_total") == 1)
        second = threading.Thread(target=ask, args=["second"])
        second.start()
        until(lambda: one.metric("biroute_waiting") == 1)
        stop = threading.Thread(target=one.worker.stop, args=[20])
        stop.start()
        until(lambda: not one.worker.alive)
        assert one.ask("GET", "/health")[0] == 503 and one.ask("POST", "/v1/completions", {"prompt": "a"})[0] == 503
        one.gate.open()
        for thread in (stop, first, second):
            thread.join(20)
        assert one.server.wait_for_answers(5)
    status, content, _ = answers["first"]
    assert status == 200 and content["choices"][0]["finish_reason"] == "abort"
    assert 1 <= content["usage"]["completion_tokens"] <= 3
    assert answers["second"][0] == 503 and answers["second"][2]["Retry-After"] == "5"


def test_an_error_inside_is_no_traceback_and_the_server_goes_on(
    tiny: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret path")

    for name in ("prefill", "step"):
        with monkeypatch.context() as patch:
            patch.setattr(tiny.worker.model, name, broken)
            status, content, _ = tiny.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 5})
            assert status == 500 and "secret" not in json.dumps(content), name
            assert content["error"]["type"] == "server_error" and "secret path" in capsys.readouterr().err
    tiny.complete(prompt="a", max_tokens=2)
    assert tiny.metric("biroute_running") == 0


def test_metrics_are_what_prometheus_reads(tiny: Served) -> None:
    tiny.complete(prompt="a", max_tokens=1)
    status, text, headers = tiny.ask("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        assert line.startswith("# ") or (name.startswith("biroute_") and float(value) >= 0)
    assert 'biroute_requests_total{path="/v1/completions",status="200"}' in text
