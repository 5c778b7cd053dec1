"""Images of allowed hosts: never of a private address, no redirects, a limit of bytes and of time.

The address is looked up once, checked, and the very same one is connected to: a name that resolves to a public address
when it is checked and to this machine when it is fetched gains nothing.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from prunetune.reading import one_line
from prunetune.serving.errors import Refused, bad

SECONDS = 10.0
"""For looking up, connecting and reading together."""
_PIECE = 65536


def fetch(url: str, hosts: Sequence[str], most: int, where: str) -> bytes:
    """Return what a URL holds.

    Args:
        url: http or https.
        hosts: whose URLs are fetched.
        most: bytes that are read.
        where: the field, for messages.

    Raises:
        Refused: 400 for another host, a private address or too many bytes; 502 if it can't be had.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if host not in {allowed.lower() for allowed in hosts} or parts.username is not None:
        raise bad("image_url_refused", f"{where}: URLs of {host or 'no host'} are not fetched; send a data: URL", where)
    try:
        return _read(parts.scheme, host, parts.port, _target(parts.path, parts.query), most, where)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Refused(502, "image_not_fetched", f"{where}: {host}: {one_line(error)}", where) from error


def _target(path: str, query: str) -> str:
    return (path or "/") + (f"?{query}" if query else "")


def public_address(host: str, port: int, where: str) -> str:
    """Return a host's address.

    Raises:
        Refused: if any of its addresses is private, loopback, link-local or reserved.
        OSError: if there is none.
    """
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for address in sorted(found):
        if not ipaddress.ip_address(address).is_global:
            raise bad("image_url_refused", f"{where}: {host} is a private address; send a data: URL", where)
    return sorted(found)[0]


def _read(scheme: str, host: str, port: int | None, target: str, most: int, where: str) -> bytes:
    secure = scheme == "https"
    port = port or (443 if secure else 80)
    until = time.monotonic() + SECONDS
    address = public_address(host, port, where)
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    raw = socket.create_connection((address, port), timeout=SECONDS)
    connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
    try:
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "prunetune"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise OSError(f"status {answer.status}, and redirects are not followed")
        content = bytearray()
        while piece := answer.read1(_PIECE):
            content += piece
            if len(content) > most:
                raise bad("image_too_large", f"{where}: {host} sends more than {most:,} bytes", where)
            if time.monotonic() > until:
                raise OSError(f"took more than {SECONDS:g} s")
        return bytes(content)
    finally:
        connection.close()
