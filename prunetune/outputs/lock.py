"""One process in a folder at a time: a lock that goes with the process, however that ends."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shlex
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunetune.outputs.errors import OutputError
from prunetune.screen import say

LOCK = ".prunetune.lock"
SHARED = "PRUNETUNE_LOCK"
"""Environment variable by which a launcher lets its rank 0 into the folder that it has locked."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def lock_folder(folder: Path) -> tuple[int, bool, str]:
    """Lock a folder; return the open file, whether this process owns it, and the lock's token.

    Raises:
        OutputError: if another process holds it, naming that one.
    """
    path = folder / LOCK
    token = os.environ.get(SHARED, "")
    launched = bool(token) and _holder(path).get("token") == token
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = flock(number, share=launched)
        except BlockingIOError:
            os.close(number)
            raise OutputError(_in_use(folder, _holder(path))) from None
        if launched:
            return _kept(number, taken), False, token
        if not taken:
            say(
                f"{folder}: this file system has no locks, so nothing keeps a second run out of the folder; "
                "see to it that there is only one"
            )
            break
        # Its holder may have removed it between our opening and locking; then this is a lock that nobody else sees.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(number)):
                break
        os.close(number)
    token = secrets.token_hex(8)
    try:
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps(_myself(token)).encode() + b"\n", 0)
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        os.close(number)
        raise
    return _kept(number, taken), True, token


def _kept(number: int, locked: bool) -> int:
    """Return a lock's open file, or -1 where there are no locks."""
    if locked:
        return number
    os.close(number)
    return -1


def flock(number: int, share: bool) -> bool:
    """Take a lock; return False where there are none, and raise BlockingIOError if somebody else has it."""
    import fcntl  # which not every system has, and most commands don't need

    try:
        fcntl.flock(number, (fcntl.LOCK_SH if share else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _myself(token: str) -> dict[str, Any]:
    """Return what a lock says of its holder."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300],
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "token": token,
    }


def _holder(path: Path) -> dict[str, Any]:
    """Return what a lock says, or nothing if it says nothing yet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if {"pid", "host", "since", "command"} <= holder.keys():
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
    return f"{folder} is in use by {who}; wait until it has ended, stop it, or choose another output folder"
