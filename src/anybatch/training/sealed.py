"""JSON that holds its own checksum, so that no byte of it can change unseen.

    text   = canonical JSON of {..., sha256}
    sha256 = SHA-256 of the canonical JSON of the rest

A text is read only if it equals, byte for byte, the canonical text of what it says.
"""

import hashlib
import json
from typing import Any

from anybatch.limits import read_json

__all__ = ["seal", "unseal"]


def seal(body: dict[str, Any]) -> bytes:
    """Write a JSON object with its checksum."""
    checksum = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical({**body, "sha256": checksum})


def unseal(data: bytes) -> dict[str, Any] | None:
    """Read what `seal` has written, without the checksum; None if any byte of it differs."""
    try:
        body = dict(read_json(data))
        del body["sha256"]
        return body if seal(body) == data else None
    except (ValueError, KeyError, TypeError):
        return None  # no JSON, no object or no checksum


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
