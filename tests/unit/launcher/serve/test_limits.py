"""The server among clients that are slow, silent, greedy or many, and at its end."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import openai
import pytest
from helpers.served import Served, post, response, served, until

from biroute.launcher.serve.limits import Limits

SHORT = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
# Two megabytes.
LONG = {"prompt": "ab", "max_tokens": 90, "temperature": 0, "n": 12, "logprobs": 20, "stream": True}


def deaf(one: Served, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """A client that asks, and takes a few kilobytes at most."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", one.server.port))
    connection.settimeout(20)
    connection.sendall(post(body, path))
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed, or reset."""
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def trickle(connection: socket.socket, data: bytes) -> None:
    """Send byte by byte, as long as they are taken."""
    try:
        for byte in data * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
    except OSError:
        pass


def test_a_request_must_be_there_whole_in_time() -> None:
    with served(limits=Limits(receive_seconds=0.5, idle_seconds=0.5)) as one:
        began = time.monotonic()
        silent, head, idle = one.raw(b""), one.raw(b"GET /health HTTP/1.1\r\n"), one.raw(SHORT)
        body = one.raw(post({"prompt": "a" * 5000})[:150])
        for connection in (head, body):
            threading.Thread(target=trickle, args=[connection, b"a"], daemon=True).start()
        assert response(idle)[0].startswith(b"HTTP/1.1 200")
        for connection in (head, body):
            start, content = response(connection)
            assert start.startswith(b"HTTP/1.1 408 Request Timeout")
            assert json.loads(content)["error"]["message"] == "the request was not there whole after 0.5 s"
        assert (rest(silent), rest(idle)) == (b"", b"")  # no request, no answer
        assert 0.4 < time.monotonic() - began < 15
        one.gate.close()  # the answer may take longer
        asked = one.raw(post({"prompt": "a", "max_tokens": 2}))
        time.sleep(0.8)
        one.gate.open()
        assert response(asked)[0].startswith(b"HTTP/1.1 200")
        until(lambda: 'path="other",status="408"} 2' in one.server.service.metrics.as_text())


def test_a_body_is_read_as_far_as_it_may_be() -> None:
    with served(limits=Limits(body_bytes=500_000)) as one:
        text = "a" * 400_000
        whole = json.dumps({"prompt": text}).encode()
        chunks = b"".join(b"1000\r\n%s\r\n" % whole.ljust(409_600)[n : n + 4096] for n in range(0, 409_600, 4096))
        with one.raw(CHUNKED + chunks + b"0\r\n\r\n") as connection:
            assert json.loads(response(connection)[1])["count"] == 400_000
        for end in (b"0\r\n\r\n", b""):  # it is refused before it ends
            with one.raw(CHUNKED + chunks + chunks + end) as connection:
                head, body = response(connection)
            assert head.startswith(b"HTTP/1.1 413") and b"more than 500000 bytes" in body
        # The client writes all before it reads: it must get its answer, not a reset connection.
        for headers in ({}, {"Connection": "close"}):
            status, content, _ = one.ask("POST", "/v1/completions", b"a" * 20_000_000, **headers)
            assert (status, content["error"]["message"]) == (413, "the body has 20000000 bytes; send at most 500000")
        waits = one.raw(post({"prompt": text * 2}).partition(b"\r\n\r\n")[0] + b"\r\nExpect: 100-continue\r\n\r\n")
        assert response(waits)[0].startswith(b"HTTP/1.1 413")
        waits = one.raw(post({"prompt": "a"})[:-15] + b"")
        waits.close()  # in the middle of its body
        until(lambda: 'path="/v1/completions",status="499"} 1' in one.server.service.metrics.as_text())


def test_a_client_that_reads_nothing_holds_up_nobody_and_is_dropped() -> None:
    with served(limits=Limits(send_seconds=0.6, unsent_bytes=4096), queue=30) as one:
        stream = deaf(one, LONG)
        big = deaf(one, {"prompt": "ab" * 500_000}, "/tokenize")
        until(lambda: one.metric("biroute_generated_tokens_total") > 20)
        assert one.complete(prompt="b", max_tokens=5)["usage"]["completion_tokens"] == 5
        until(lambda: 'completions",status="499"} 1' in one.server.service.metrics.as_text())
        assert one.server.wait_for_answers(10)
        assert one.metric("biroute_running") == 0
        assert not rest(big).endswith(b"}") and not rest(stream).endswith(b"0\r\n\r\n")


def test_a_stream_that_is_not_read_ends_with_an_error_and_frees_its_place() -> None:
    with served(limits=Limits(events_behind=300, unsent_bytes=4096), queue=8) as one:
        stream = deaf(one, LONG)
        until(lambda: one.metric("biroute_cancelled_total") > 0)
        until(lambda: one.metric("biroute_running") + one.metric("biroute_waiting") == 0)
        answer = rest_of_stream(stream)
        assert json.loads(answer[-1])["error"]["message"] == "the stream was not read as fast as it was written"
        assert len(answer) < 12 * 90


def rest_of_stream(connection: socket.socket) -> list[bytes]:
    """The events of a stream, until its end."""
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n"):
        piece = connection.recv(65536)
        assert piece, data[-300:]
        data += piece
    return [part.partition(b"\n\n")[0] for part in data.split(b"data: ")[1:]]


def test_more_connections_than_are_taken_are_told_so() -> None:
    with served(limits=Limits(connections=3)) as one:
        idle = [one.raw(b"") for _ in range(3)]
        with one.raw(SHORT) as further:
            head, body = response(further)
        assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in head.lower()
        assert json.loads(body)["error"]["message"] == "more than 3 connections; try again later"
        idle.pop().close()
        until(lambda: one.raw(SHORT).recv(12) == b"HTTP/1.1 200")


def test_many_clients_at_once_get_what_each_gets_alone() -> None:
    with served(max_batch=4, queue=64) as one:
        client = openai.OpenAI(base_url=one.address, api_key="none", max_retries=0)
        together: dict[int, Any] = {}

        def ask(number: int) -> None:
            chunks = client.completions.create(
                model="tiny", prompt=f"text {number}", max_tokens=8, seed=number, stream=True, logprobs=0
            )
            choices = [choice for chunk in chunks for choice in chunk.choices]
            assert choices[-1].finish_reason
            together[number] = (
                "".join(choice.text for choice in choices),
                [value for choice in choices for value in choice.logprobs.token_logprobs],
            )

        one.gate.close()
        threads = [threading.Thread(target=ask, args=[number]) for number in range(40)]
        for thread in threads:
            thread.start()
        until(lambda: one.metric("biroute_waiting") == 36)
        one.gate.open()
        for thread in threads:
            thread.join(60)
        for number in range(40):
            (alone,) = one.complete(prompt=f"text {number}", max_tokens=8, seed=number, logprobs=0)["choices"]
            assert together[number] == (alone["text"], alone["logprobs"]["token_logprobs"])


def test_an_error_behind_the_first_event_ends_the_stream(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret path")

    with served() as one:
        monkeypatch.setattr(one.worker.model, "step", broken)
        asked = {"prompt": "a", "max_tokens": 5, "stream": True, "logprobs": 0}
        status, text, _ = one.ask("POST", "/v1/completions", asked)
        events = [json.loads(event) for event in text.split("data: ")[1:]]
        assert status == 200 and [list(event)[-1] for event in events] == ["choices", "error"]
        assert "secret" not in text and "secret path" in capsys.readouterr().err
        monkeypatch.setattr(one.worker.model, "prefill", broken)
        assert one.ask("POST", "/v1/completions", asked)[0] == 500


def test_a_model_that_does_not_stop_in_time_leaves_no_client_without_an_answer() -> None:
    with served(max_batch=1, queue=1, limits=Limits(answer_seconds=0.1, close_seconds=0.1)) as one:
        one.gate.close()
        asked = {"prompt": "a", "max_tokens": 50, "logprobs": 0}
        stream, waits = (one.raw(post({**asked, "stream": begun})) for begun in (True, False))
        until(lambda: one.metric("biroute_generated_tokens_total") == 1 and one.metric("biroute_waiting") == 1)
        half = one.raw(post({"prompt": "a"})[:-3])
        one.worker.stop(0.1)
        assert one.ask("POST", "/v1/completions", {"prompt": "a"})[0] == 503
        assert not one.server.wait_for_answers()
        one.server.stop()
        assert json.loads(rest_of_stream(stream)[-1])["error"]["message"] == "the server is stopping; try again later"
        for connection in (waits, half):
            head, body = response(connection)
            assert head.startswith(b"HTTP/1.1 503") and b"the server is stopping" in body
        with pytest.raises(ConnectionRefusedError):
            one.raw(b"")


def test_methods_and_addresses_that_others_use() -> None:
    with served() as one:
        for method in ("HEAD", "PUT", "OPTIONS", "DELETE"):
            for path, allowed in (("/health", "GET"), ("/v1/models/tiny", "GET"), ("/v1/completions", "POST")):
                status, content, headers = one.ask(method, path, {})
                assert (status, headers["Allow"]) == (405, allowed)
                assert method == "HEAD" or f"takes {allowed}, not {method}" in content["error"]["message"]
        whole = SHORT.replace(b"/health", b"http://localhost/health?a=1")
        assert response(one.raw(whole))[0].startswith(b"HTTP/1.1 200")
        # What proxies write changes nothing: not who may ask, and not what there is.
        forwarded = {"X-Forwarded-Host": "localhost", "Forwarded": "host=localhost", "X-Forwarded-Prefix": "/x"}
        assert one.ask("GET", "/health", Host="evil.example", **forwarded)[0] == 403
        assert one.ask("GET", "/x/health", **forwarded)[0] == 404
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "a"}
        assert one.ask("GET", "/health", **upgrade)[0] == 200
        assert one.ask("GET", "/health/")[0] == 404
