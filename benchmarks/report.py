"""Tables and picture of a result that was measured before: `python -m benchmarks.report RESULT.json [--svg FILE]`."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.markdown import page
from benchmarks.plot import picture
from benchmarks.results import load


@click.command()
@click.argument("json_file", type=click.Path(dir_okay=False, exists=True, path_type=Path))
@click.option("--svg", "svg_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw it into this file, too.")
def report(json_file: Path, svg_file: Path | None) -> None:
    """Print the tables of a result as Markdown."""
    result = load(json_file)
    if result is None:
        raise click.UsageError(f"There is no {json_file}.")
    click.echo(page(result))
    if svg_file is not None:
        svg_file.write_text(picture(result))


if __name__ == "__main__":
    report()
