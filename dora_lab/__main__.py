"""`dora-lab` or `python -m dora_lab`. Light until a run begins: no torch is imported here."""

from __future__ import annotations

from dora_lab import distributed
from dora_lab.commands import inspect, judge, models, plot, results, run  # noqa: F401  (each adds its commands)
from dora_lab.commands.app import app
from dora_lab.commands.ending import run_to_end


def main() -> None:
    """Entry point of `dora-lab`: an error that explains itself is printed without a traceback."""
    try:
        run_to_end(app)
    except SystemExit as end:
        distributed.leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    distributed.leave(0)


if __name__ == "__main__":
    main()
