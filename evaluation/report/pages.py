"""What pages that work from a disk have in common: a policy that lets nothing in, and data that stays data."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any


def content_policy(style: str, script: str) -> str:
    """Return a page's content policy: this very style and script, pictures in the page, and no network at all."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def in_script(data: dict[str, Any]) -> str:
    """Return data as JSON that can't end the element it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text
