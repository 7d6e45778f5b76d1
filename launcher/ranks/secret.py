"""The secret of a run, by which its ranks recognize each other before they talk.

    <run>/.secret      64 hexadecimal digits, which only the run's user can read

Whoever reaches the port of the rendezvous could otherwise join as a rank. Each rank proves that it knows the secret
(an HMAC of two nonces, over the store of the rendezvous), and so does rank 0. What follows, the traffic of gloo and
NCCL, is neither encrypted nor authenticated: see docs/security.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from biroute.configs.errors import UsageError
from biroute.configs.files import create_once
from biroute.launcher.attempts.journal import make_run_dir
from biroute.launcher.attempts.run_files import SECRET

_DIGITS = 64
_REFUSED = "refused"
_SECONDS_TO_HEAR = 10.0  # that rank 0 has refused
_SECONDS_TO_WRITE = 30.0  # until all of a new secret is seen through a slow network file system


def run_secret(run_dir: Path) -> bytes:
    """Read the secret of a run; the first of its ranks makes one.

    Raises:
        UsageError: the folder cannot be written, or others can read or have made the secret.
    """
    make_run_dir(run_dir)
    path = run_dir / SECRET
    try:
        create_once(path, secrets.token_hex(_DIGITS // 2).encode(), private=True)
        deadline = time.monotonic() + _SECONDS_TO_WRITE
        while True:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                status, content = os.fstat(descriptor), file.read(_DIGITS + 1)
            if len(content) >= _DIGITS or time.monotonic() > deadline:
                break
            time.sleep(0.05)  # another rank writes it
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; the ranks need it to recognize each other") from None
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise UsageError(f"{path} is not a file that only you can read; remove it, and a new one is made")
    if len(content) != _DIGITS:
        raise UsageError(f"{path} has {len(content)} bytes, not {_DIGITS}; remove it, and a new one is made")
    return content


def prove(store: dist.Store, secret: bytes, rank: int, world_size: int) -> None:
    """Prove to the others that this rank belongs to the run, and check that rank 0 and, on rank 0, all others do.

    Raises:
        UsageError: a rank does not know the secret; raised on rank 0, and on those that do know it.
        dist.DistStoreError: a rank did not answer before the store's timeout.
    """
    nonce = secrets.token_hex(16)
    store.set(f"biroute/nonce/{rank}", nonce)
    if rank != 0:
        nonces = (store.get("biroute/nonce/0"), nonce.encode())
        store.set(f"biroute/proof/{rank}", _proof(secret, "proof", rank, *nonces))
        answer = store.get(f"biroute/answer/{rank}")
        store.set(f"biroute/heard/{rank}", "")
        if answer == _REFUSED.encode():
            raise UsageError(
                "rank 0 does not start, because a rank does not know the secret of this run: see its message"
            )
        if not hmac.compare_digest(answer, _proof(secret, "answer", rank, *nonces).encode()):
            raise UsageError(f"rank 0 does not know the secret of this run; {_REMEDY}")
        return
    strangers = list[int]()
    answers = dict[int, str]()
    for other in range(1, world_size):
        nonces = (nonce.encode(), store.get(f"biroute/nonce/{other}"))
        expected = _proof(secret, "proof", other, *nonces).encode()
        if not hmac.compare_digest(store.get(f"biroute/proof/{other}"), expected):
            strangers.append(other)
        answers[other] = _proof(secret, "answer", other, *nonces)
    for other, proof in answers.items():
        store.set(f"biroute/answer/{other}", _REFUSED if strangers else proof)
    if strangers:
        friends = [f"biroute/heard/{other}" for other in answers if other not in strangers]
        with contextlib.suppress(RuntimeError):  # the store ends with this process: they must have read it by then
            store.wait(friends, timedelta(seconds=_SECONDS_TO_HEAR))
        raise UsageError(f"rank {strangers[0]} does not know the secret of this run; {_REMEDY}")


_REMEDY = (
    f"its train.run_dir is another folder ({SECRET} in it differs), or it is somebody else's process: give all ranks "
    "one shared folder, and another MASTER_PORT if this happens again"
)


def _proof(secret: bytes, what: str, rank: int, first: bytes, own: bytes) -> str:
    digest = hmac.new(secret, f"{what} {rank} ".encode(), hashlib.sha256)
    for nonce in (first, own):
        digest.update(len(nonce).to_bytes(4, "big") + nonce)
    return digest.hexdigest()
