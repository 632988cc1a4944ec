"""A short digest of bytes: the same in every process and release, as others compare it. Not for secrets."""

from __future__ import annotations

try:  # hashlib has it from there, and brings OpenSSL along: 3.6 MB of memory in every process
    from _blake2 import blake2b
except ImportError:  # a Python built without it
    from hashlib import blake2b


def digest(content: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")
