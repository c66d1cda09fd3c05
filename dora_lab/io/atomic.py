"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `file` when the block ends well.

    A reader, or a crash at any moment, sees the old file or the new. The name does not end as `file` does: a writer
    that goes by endings has to be told the format.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(file):
            yield temporary
        fsync(temporary)
        os.replace(temporary, file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    fsync(file.parent)  # the renaming itself must reach the disk too


def of_disk(error: BaseException) -> bool:
    """Whether a write failed: torch's and safetensors' writers have errors of their own for what the system says."""
    writers = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream error", "os error")
    return isinstance(error, OSError) or any(word in str(error) for word in writers)


@contextlib.contextmanager
def disk_errors(file: Path) -> Iterator[None]:
    """While a library writes `file`, what the disk refuses is raised as OSError, whatever the library raises for it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not of_disk(error):
            raise
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = int(said[1]) if said else errno.EIO
        raise OSError(number, f"could not be written: {error}", str(file)) from error


def write_text(file: Path, text: str) -> None:
    """Replace `file` whole by `text` in UTF-8, its ends of line as they are."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Replace `file` whole by `content`."""
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def fsync(path: Path) -> None:
    """Bring a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
