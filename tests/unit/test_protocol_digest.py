"""The digest that servers and clients of all releases have in common."""

from __future__ import annotations

import subprocess
import sys
from hashlib import blake2b

from zrmq.protocol.digest import digest


def test_it_is_what_everybody_has() -> None:
    for content in (b"", b"a", bytes(range(256)) * 100):
        assert digest(content) == int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def test_a_server_does_without_openssl() -> None:
    """Which is a tenth of its memory."""
    program = "import sys, zrmq.cli.roles, zrmq.broker, zrmq.nameserver; print('_hashlib' in sys.modules, 'ssl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False False\n"
