"""What a file is, looked at before anything else reads it: plain names, hashes, safetensors headers (standard library).

The safetensors library accepts a header that names a tensor twice (the last one wins) and says of every other file that
its header is too large. Here such a file is refused, and what it is instead is named.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dora_lab.io.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes, the format's own limit; of an index too
PICKLED = (".bin", ".pt", ".pth")
LONGEST = 255  # bytes of a file's name
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
# bits per number
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip
# first bytes of what is offered in the place of weights: what it is, what to do
_OTHERS = (
    (b"version https://git-lfs", "a git-LFS pointer, not the weights; fetch them with `git lfs pull`"),
    (b"<", "a web page, not weights; the download went wrong, fetch it again"),
    (b"PK\x03\x04", "a zip or a pickle of torch, which can run code when it is read; convert it to safetensors"),
    (b"\x80\x02", "a pickle, which can run code when it is read; convert it to safetensors"),
    (b"\x80\x04", "a pickle, which can run code when it is read; convert it to safetensors"),
    (b"GGUF", "a GGUF file; convert it to safetensors"),
)


def no_folder(path: Path) -> str:
    """What is wrong with a path that should be a folder and is none."""
    return f"{path} is a file; give the folder that it is in" if Path(path).is_file() else f"{path}: no such folder"


def sha256(file: Path) -> str:
    """SHA-256 (64 hex digits) of a file's content."""
    content = hashlib.sha256()
    with Path(file).open("rb") as stream:
        while block := stream.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def hash_bytes(content: bytes) -> str:
    """SHA-256 (64 hex digits) of bytes at hand."""
    return hashlib.sha256(content).hexdigest()


def hash_files(files: Mapping[str, Path]) -> str:
    """SHA-256 (64 hex digits) over names and contents; the names are the keys, so where the files lie is no matter."""
    whole = hashlib.sha256()
    for name, file in files.items():
        state = file.stat()
        whole.update(f"{name}\0{_hash_of(file, state.st_size, state.st_mtime_ns)}\n".encode())
    return whole.hexdigest()


@cache
def _hash_of(file: Path, size: int, changed: int) -> str:
    """Hash of one file; `size` and `changed` (time of change) only tell the cache when it has to be read again."""
    return sha256(file)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, strictly; ValueError says why there is none.

    Refused are what Python's own reader lets pass: a key twice (the last one would win), NaN and infinity, written out
    or as a number too large, other encodings than UTF-8, and nesting deeper than the stack.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if text.startswith("\ufeff"):
            raise ValueError("a byte order mark before its text; save it as UTF-8 without one")
        return _STRICT.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_whole(text: bytes) -> Any:
    """As `parse_json`, and no text in it is half a character: JSON can escape one alone, no table can hold it."""
    value = parse_json(text)
    if b"\\ud" in text or b"\\uD" in text:  # pairs of them are characters
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"half a character ({error.object[error.start]!r})") from None
    return value


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder; nothing larger than `MAX_HEADER` is read.

    Raises CheckpointError, naming the file, for a name that leads out of the folder, for what is no plain file (a
    device never ends), and for what is no JSON object.
    """
    file = inside(folder, name, folder)
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: {'is no plain file' if file.exists() else 'no such file'}")
        if (size := file.stat().st_size) > MAX_HEADER:
            raise CheckpointError(f"{file}: {size} bytes are no {name}; fetch the folder again")
        value = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise (
            error
            if isinstance(error, CheckpointError)
            else CheckpointError(f"{file}: cannot be read as JSON ({error}); fetch the folder again")
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: a JSON {type(value).__name__}, expected an object; fetch the folder again")
    return value


def inside(folder: Path, name: str, where: Path) -> Path:
    """The file of that name in a folder, whether or not it exists; `where` is the file that named it.

    Raises CheckpointError for a name that leads out of the folder: with a slash, "..", a NUL, or through a link (the
    hub's cache is made of links, within itself; these are followed).
    """
    if not name or name in (".", "..") or Path(name).name != name or "\0" in name or "\\" in name:
        raise CheckpointError(f"{where}: names a file outside its folder: {name!r:.200}; fetch the folder again")
    if len(name.encode(errors="replace")) > LONGEST or not name.isprintable():
        raise CheckpointError(f"{where}: names a file as no file can be named: {name!r:.200}; fetch the folder again")
    file, home = Path(folder) / name, Path(folder).resolve()
    if file.is_symlink():
        target = file.resolve()
        if target.parent not in (home, home.parent.parent / "blobs"):
            raise CheckpointError(f"{file}: a link that leaves its folder, to {target}; put the file itself there")
    return file


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers fills a model from: the single one, or else its index's; [] for neither.

    Other files of that ending may lie beside them: shards of an earlier saving, another program's copy.

    Raises CheckpointError for a folder that transformers reads otherwise (an adapter beside the model is put on it in
    silence, `transformers_weights` in config.json names other files), and as `index` does.
    """
    folder = Path(folder)
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder}: {ADAPTER} lies beside the model, and transformers would put that adapter on it; move the "
            "adapter's files to a folder of their own"
        )
    other = None
    if (folder / "config.json").is_file():
        other = read_object(folder, "config.json").get("transformers_weights")
        if other not in (None, SINGLE, INDEX):
            raise CheckpointError(
                f"{folder}: config.json asks for other weights (transformers_weights = {other!r:.80}); load the model "
                "and save it in a folder of its own"
            )
    if other != INDEX and (single := inside(folder, SINGLE, folder)).is_file():
        return [single]
    if not inside(folder, INDEX, folder).is_file():
        return []
    return [folder / name for name in sorted({*index(folder).values()})]


def index(folder: Path) -> dict[str, str]:
    """The shard of each tensor, by name, from a folder's index.

    Raises CheckpointError for a file that is no index, and one that names a file outside its folder or more files than
    there are.
    """
    file = inside(folder, INDEX, folder)
    table = read_object(folder, INDEX).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{file}: not an index of shards (no table weight_map of names); fetch it again")
    names = {*table.values()}
    if (there := sum(1 for _ in Path(folder).iterdir())) < len(names) > 1000:  # else the first that lacks is told
        raise CheckpointError(f"{file}: names {len(names)} shards, the folder has {there} files; fetch it again")
    for name in sorted(names):
        inside(folder, name, file)
    return table


def verify(manifest: Path) -> dict[str, Any]:
    """A manifest, {"files": {name: sha256, ...}, ...}, every file of it in the same folder as it was.

    Raises CheckpointError for one that is none, names a file outside its folder, or whose files have changed since.
    """
    try:
        table = parse_json(manifest.read_bytes())
        files = dict(table["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{manifest}: not a manifest; save it again, or delete it to go unchecked") from None
    for name, wanted in files.items():
        part = inside(manifest.parent, name, manifest)
        if not part.is_file() or sha256(part) != wanted:
            raise CheckpointError(f"{part}: missing or changed since it was saved; fetch the folder again")
    return table


def refuse_what_is_no_weights(file: Path) -> None:
    """Raise CheckpointError for a file that is missing or is plainly something else: pointer, web page, pickle."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        with file.open("rb") as handle:
            head = handle.read(64)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if not head:
        raise CheckpointError(f"{file}: is empty; fetch it again")
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= min(MAX_HEADER, file.stat().st_size - 8):
        return  # of safetensors: a header's length, whatever its bytes look like, and a header
    for start, words in _OTHERS:
        if head.lstrip().startswith(start) and file.suffix not in PICKLED:
            raise CheckpointError(f"{file}: {words}")


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a safetensors file: {name: ("F32", (4, 16)), ...}; the payload is not read.

    Raises CheckpointError for a file that is something else, is cut off, or whose header does not describe its bytes:
    a name twice, a shape of another size than its place, places that overlap or leave gaps.
    """
    refuse_what_is_no_weights(file)
    whole = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if whole < 8 or length > min(MAX_HEADER, whole - 8):
            raise _broken(file, f"it has {whole} bytes and a header of {length}")
        text = handle.read(length)
    try:
        table = parse_json(text)
        table.pop("__metadata__", None)
        found = {name: _place(name, entry) for name, entry in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _broken(file, str(error)) from None
    end = 0
    for name, (_, _, start, stop) in sorted(found.items(), key=lambda pair: pair[1][2:]):
        if start != end:
            raise _broken(file, f"'{name}' begins at byte {start}, the tensor before it ends at {end}")
        end = stop
    if end != whole - 8 - length:
        raise _broken(file, f"its tensors have {end} bytes, the file has {whole - 8 - length} for them")
    return {name: (kind, shape) for name, (kind, shape, _, _) in found.items()}


def metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors; {} if nothing. Raises CheckpointError as `header`."""
    header(file)
    with file.open("rb") as handle:
        found = parse_json(handle.read(int.from_bytes(handle.read(8), "little"))).get("__metadata__")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is there twice")
    return table


def _no_value(text: str) -> float:
    raise ValueError(f"{text} is not a value")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_value(text)


# made once: `json.loads` with hooks makes one for each of a stream's lines, a quarter of their reading
_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_value, parse_float=_finite)


def _place(name: str, entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, first byte, byte after the last) of one tensor."""
    kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"'{name}' has a shape or a place that is no whole number")
    if kind not in _BITS:
        raise ValueError(f"'{name}' has the unknown type {kind!r:.40}")
    if (math.prod(shape) * _BITS[kind] + 7) // 8 != stop - start:
        raise ValueError(f"'{name}' of shape {shape}, {kind}, has {stop - start} bytes")
    return kind, shape, start, stop


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a whole safetensors file ({why:.200}); fetch it again")
