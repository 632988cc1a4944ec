"""Become another program: `python -m benchmarks.execute PROGRAM ARGUMENT...`; a server then ends with the benchmark."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.execvp(sys.argv[1], sys.argv[1:])
