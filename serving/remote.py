"""Images of allowed hosts: never of a private address, no redirects, a limit of bytes and of time.

The address is looked up once, checked, and the very same one is connected to: a name that resolves to a public address
when it is checked and to this machine when it is fetched gains nothing.
"""

from __future__ import annotations

import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from prunetune.reading import one_line, shown
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
    parts = split(url, where)
    host = (parts.hostname or "").lower()
    if host not in {allowed.lower() for allowed in hosts} or parts.username is not None:
        raise bad("image_url_refused", f"{where}: URLs of {host or 'no host'} are not fetched; send a data: URL", where)
    try:
        return _read(parts.scheme, host, parts.port, _target(parts.path, parts.query), most, where)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Refused(502, "image_not_fetched", f"{where}: {host}: {one_line(error)}", where) from error


def split(url: str, where: str) -> SplitResult:
    """Return the parts of a URL.

    Raises:
        Refused: 400 for what is none, such as a port above 65,535.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # checked when it is read
    except ValueError as error:
        raise bad("invalid_image_url", f"{where}: {shown(url)} is no URL ({one_line(error)})", where) from None
    return parts


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
        if not is_public(address):
            raise bad("image_url_refused", f"{where}: {host} is a private address; send a data: URL", where)
    return sorted(found)[0]


_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses that a translating router turns into the IPv4 ones that they end with."""


def is_public(address: str) -> bool:
    """Return whether an address is one host's of the open network, also where it stands for an IPv4 one."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local or found.teredo is not None:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def _looked_up(host: str, port: int, where: str) -> str:
    """Return a host's address, found in time: nothing can interrupt the system's own look-up, so a thread does it."""
    found: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(public_address(host, port, where))
        except Exception as error:
            found.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        address = found.get(timeout=SECONDS)
    except queue.Empty:
        raise OSError(f"its address was not found within {SECONDS:g} s") from None
    if isinstance(address, Exception):
        raise address
    return address


def _read(scheme: str, host: str, port: int | None, target: str, most: int, where: str) -> bytes:
    secure = scheme == "https"
    port = port or (443 if secure else 80)
    until = time.monotonic() + SECONDS
    address = _looked_up(host, port, where)
    left = max(until - time.monotonic(), 0.01)
    connection = http.client.HTTPConnection(host, port, timeout=left)
    line = socket.create_connection((address, port), timeout=left)
    # A host that sends a byte now and then, its head's among them, would never be too slow for one reading.
    late = threading.Timer(until - time.monotonic(), lambda: hang_up(line))
    late.daemon = True
    late.start()
    try:
        if secure:
            context = ssl.create_default_context()
            secured = context.wrap_socket(line, server_hostname=host, do_handshake_on_connect=False)
            line = secured
            secured.do_handshake()
        connection.sock = line
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
        late.cancel()
        connection.close()
        line.close()


def hang_up(line: socket.socket | None) -> None:
    """End a connection that another thread reads from."""
    if line is not None:
        try:
            line.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended by itself
            return
