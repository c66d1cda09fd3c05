"""`dora-lab` or `python -m dora_lab`. Light until a run begins: no torch is imported here."""

from __future__ import annotations

import sys

import typer

from dora_lab.commands import inspect, models, plot, results, run  # noqa: F401  (each adds its commands)
from dora_lab.commands.app import app
from dora_lab.io.text import shown


def main() -> None:
    """Entry point of `dora-lab`: an error that explains itself is printed without a traceback."""
    try:
        app()
    except ValueError as error:  # all our errors about input are; their text says what to do
        typer.echo(shown(f"error: {error}"), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
