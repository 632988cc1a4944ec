"""`python -m zrmq` is the command `zrmq`."""

from __future__ import annotations

from zrmq.cli.entry import main

if __name__ == "__main__":
    main()
