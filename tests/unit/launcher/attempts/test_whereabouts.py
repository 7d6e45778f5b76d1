"""Where a rank is, by frames of real threads: in a collective, waiting for its GPU, or elsewhere."""

from __future__ import annotations

import _thread
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType

import pytest
import torch

from biroute.launcher.attempts.whereabouts import Whereabouts, find_rank, uses_gpu, where_in

# One function a line that a rank may hang in, in a call into C, as torch's methods are: it has no frame of its own.
SOURCE = """
def item(x): return x.item(60)
def chained(x): return [int(size) for size in x.tolist(60)]
def lines(x): return (x
    .tolist(
        60
    ))
def convert(x): return float(x)
def truth(x): return bool(x)
def done(x): return x.read(int(60))
def read(x): x.read(60)
def several(x): x.item; x.read(60)
def collect(x): gather(x)
"""


class Slow:
    """Hangs in C where a tensor waits for the device, until `end`."""

    def __init__(self) -> None:
        lock = _thread.allocate_lock()
        lock.acquire()
        self.item = self.tolist = self.read = lock.acquire
        self.end = lock.release


class Value:
    """Hangs below `float` and `bool`, in frames that a tensor has not."""

    def __init__(self, slow: Slow) -> None:
        self._slow = slow

    def __float__(self) -> float:
        return float(self._slow.read(60))

    def __bool__(self) -> bool:
        return self._slow.read(60)


@pytest.fixture
def ours(tmp_path: Path) -> ModuleType:
    """A module of BiRoute's with the functions above."""
    path = tmp_path / "step.py"
    path.write_text(SOURCE)
    module = ModuleType("biroute.launcher.train.step")
    exec(compile(SOURCE, str(path), "exec"), module.__dict__)
    return module


@contextmanager
def hanging(act: Callable[[Slow], object], start: Callable[..., object] | None = None) -> Iterator[int]:
    """Run an action in another thread, which hangs; gives the thread's number."""
    slow, ended, number = Slow(), threading.Event(), list[int]()

    def run() -> None:
        number.append(threading.get_ident())
        with contextlib.suppress(Exception):
            act(slow)
        ended.set()

    if start is None:
        threading.Thread(target=run, daemon=True).start()
    else:
        start(run, ())
    deadline = time.monotonic() + 30
    last: tuple[FrameType, int] | None = None
    while time.monotonic() < deadline:
        time.sleep(0.05)
        frame = sys._current_frames().get(number[0]) if number else None
        if frame is not None and last == (frame, frame.f_lasti):
            break  # it has not moved
        last = (frame, frame.f_lasti) if frame is not None else None
    try:
        yield number[0]
    finally:
        slow.end()
    assert ended.wait(30)


def frame_of(thread: int, out: int = 0) -> FrameType:
    frame = sys._current_frames()[thread]
    for _ in range(out):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame


@pytest.mark.parametrize(
    ("name", "waits"),
    [("item", True), ("chained", True), ("lines", True), ("done", False), ("read", False), ("several", False)],
)
def test_a_call_that_needs_a_result_waits_for_the_gpu(ours: ModuleType, name: str, waits: bool) -> None:
    with hanging(getattr(ours, name)) as thread:
        found = where_in(frame_of(thread), on_gpu=True)
        assert (found.collective, found.for_gpu) == ("", waits)
        assert found.place.startswith("launcher/train/step.py:")
        assert found.place.endswith(f" in {name}")
        assert not where_in(frame_of(thread), on_gpu=False).for_gpu, "a CPU computes in the call itself"


@pytest.mark.parametrize(("name", "inside"), [("convert", 1), ("truth", 1)])
def test_a_conversion_of_a_tensor_waits_for_the_gpu(ours: ModuleType, name: str, inside: int) -> None:
    with hanging(lambda slow: getattr(ours, name)(Value(slow))) as thread:
        assert where_in(frame_of(thread, out=inside), on_gpu=True).for_gpu
        assert not where_in(frame_of(thread), on_gpu=True).for_gpu, "its innermost line reads"


def test_a_collective_that_itself_needs_a_result_is_a_collective(ours: ModuleType) -> None:
    """As those of objects do, which read sizes from the device."""
    torchs = ModuleType("torch.distributed.distributed_c10d")
    exec(compile(SOURCE, ours.item.__code__.co_filename, "exec"), torchs.__dict__)
    ours.__dict__["gather"] = torchs.item
    with hanging(ours.collect) as thread:
        found = where_in(frame_of(thread), on_gpu=True)
    assert found == Whereabouts("item", "launcher/train/step.py:13 in collect", False)


def test_a_thread_without_source_or_frames_is_elsewhere() -> None:
    module = ModuleType("biroute.launcher.train.step")
    exec(SOURCE, module.__dict__)
    with hanging(module.item) as thread:
        assert where_in(frame_of(thread), on_gpu=True) == Whereabouts("", "launcher/train/<string>:2 in item", False)
    assert where_in(None, on_gpu=True) == find_rank({}, 1, on_gpu=True) == Whereabouts("", "", False)


def test_a_file_that_torch_reads_is_not_the_gpu(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights")
    with hanging(lambda _: torch.load(tmp_path / "weights")) as thread:
        try:
            assert frame_of(thread).f_globals["__name__"] == "torch.serialization"
            assert not where_in(frame_of(thread), on_gpu=True).for_gpu
        finally:
            os.close(os.open(tmp_path / "weights", os.O_WRONLY))


@contextmanager
def in_backward() -> Iterator[int]:
    """A thread, as the main thread of a rank, that is in autograd. Yields its number."""
    ended = threading.Event()
    weight = torch.ones(900, 900, requires_grad=True)

    def compute() -> None:
        while not ended.is_set():
            (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    assert thread.ident is not None
    try:
        yield thread.ident
    finally:
        ended.set()
        thread.join()


def sample(main: int, on_gpu: bool) -> Whereabouts:
    """Where the rank is at a moment at which its main thread is in autograd."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        frames = sys._current_frames()
        del frames[threading.get_ident()]  # the test's own: a rank has one main thread
        if frames[main].f_globals["__name__"].startswith("torch.autograd"):
            return find_rank(frames, main, on_gpu)
        time.sleep(0.001)
    raise TimeoutError


def test_backward_waits_for_the_gpu_if_its_thread_is_not_in_python() -> None:
    with in_backward() as main:
        assert sample(main, on_gpu=True).for_gpu
        assert not sample(main, on_gpu=False).for_gpu


def test_backward_is_where_the_thread_of_autograd_is(ours: ModuleType) -> None:
    """C++ starts that thread: its outermost frame is not Python's own."""
    with in_backward() as main:
        with hanging(ours.item):  # some other thread, such as one that loads data
            assert sample(main, on_gpu=True).place == ""
        with hanging(ours.read, start=_thread.start_new_thread):
            found = sample(main, on_gpu=True)
        assert (found.place, found.for_gpu) == ("launcher/train/step.py:11 in read", False), "stuck, and named so"


def test_another_thread_does_not_count_outside_of_backward(ours: ModuleType) -> None:
    with hanging(ours.item) as main, hanging(ours.read, _thread.start_new_thread):
        assert find_rank(sys._current_frames(), main, on_gpu=True).place.endswith("in item")


def test_whether_this_process_uses_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uses_gpu() == torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert uses_gpu()
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert not uses_gpu(), "torch is half imported"
    monkeypatch.delitem(sys.modules, "torch")
    assert not uses_gpu(), "and torch is not imported for it"


MEET = """
import _thread, sys, threading, time
from datetime import timedelta
import torch
from biroute.launcher.attempts.whereabouts import find_rank, where_in
from biroute.launcher.ranks.environment import RankEnvironment
from biroute.launcher.ranks.rendezvous import _handshake
number = []
def meet():
    number.append(threading.get_ident())
    try:
        _handshake(RankEnvironment(0, 0, 2, file=sys.argv[1]), "gloo", timedelta(seconds=60), None)
    except Exception:
        pass
_thread.start_new_thread(meet, ())
weight = torch.ones(900, 900, requires_grad=True)
def compute():
    while True:
        (weight @ weight).sum().backward()
main = threading.Thread(target=compute, daemon=True)
main.start()
def show(look):
    deadline = time.monotonic() + 45
    while time.monotonic() < deadline:
        frames = sys._current_frames()
        del frames[threading.get_ident()]
        found = look(frames)
        if found.collective:
            break
        time.sleep(0.01)
    print(*found, sep="|", flush=True)
show(lambda frames: where_in(frames.get(number[0]) if number else None, True))
show(lambda frames: find_rank(frames, main.ident, True))
import os
os._exit(0)
"""


def test_a_collective_of_the_rank_itself_and_of_its_backward(tmp_path: Path) -> None:
    """A real store that nobody answers: what a rank waits in when others never come."""
    done = subprocess.run(
        [sys.executable, "-c", MEET, str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    itself, of_backward = (line.split("|") for line in done.stdout.splitlines())
    for collective, place, for_gpu in (itself, of_backward):
        assert (collective, for_gpu) == ("init_process_group", "False"), done.stderr
        assert place.startswith("launcher/ranks/rendezvous.py:")
        assert place.endswith("in _handshake")
