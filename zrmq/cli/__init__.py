"""The command `zrmq`: one file per command group. The only part that draws on a terminal."""
