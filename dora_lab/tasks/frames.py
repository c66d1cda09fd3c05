"""Frozen features of clips by id, from VALUE's release: a vector of each frame, a frame every 1.5 s. Imports no torch.

They lie in ``vis_features/<set>/clip-vit/<id>.npz``, sets "tv", "how2" and "yc2", array ``features`` (frames, width) of
CLIP ViT-B/32 (VALUE-Leaderboard/DataRelease), and are read one by one.

Shape suffixes: N frames of a clip, F numbers of one, R frames that a model reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.io.files import inside

if TYPE_CHECKING:
    import numpy as np

VARIANT = "clip-vit"


def gather(root: Path, name: str, ids: Collection[str], width: int) -> Iterator[tuple[str, np.ndarray]]:
    """(id, features (frames, width) in float32) of every clip that is asked for, once, in the order of their names.

    Raises LoadError, naming file and clip: before anything is read for a clip that is not there; when it comes to them
    for a file that is broken (of any kind), numbers that are not finite, no frames and another width.
    """
    folder = Path(root) / "vis_features" / name / VARIANT
    try:
        files = {key: inside(folder, f"{key}.npz", folder) for key in sorted({*ids})}
    except CheckpointError as error:
        raise LoadError(str(error)) from None
    if missing := [key for key, file in files.items() if not file.is_file()]:
        raise LoadError(
            f"{folder}: {len(missing)} of the clips asked for are not there, the first is '{missing[0]}' "
            f"({missing[0]}.npz); fetch them, or give the folder that the annotations belong to"
        )
    return ((key, _read(file, key, width)) for key, file in files.items())


def _read(file: Path, key: str, width: int) -> np.ndarray:
    import numpy as np

    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as held:
            found = held["features"]
        if not isinstance(found, np.ndarray):  # a member that is no array comes as bytes
            raise ValueError("it is no array")
    except Exception as error:  # a damaged zip has a dozen kinds: of zlib's, of a method that nobody knows, ...
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
        raise LoadError(f"{file}: the features of '{key}' cannot be read ({reason}); fetch it again") from None
    if found.dtype not in (np.float16, np.float32) or found.ndim != 2 or not len(found) or found.shape[1] != width:
        raise LoadError(
            f"{file}: the features of '{key}' are {found.shape} in {found.dtype}, expected (frames, {width}) in "
            "float16 or float32"
        )
    if not np.isfinite(found).all():
        raise LoadError(f"{file}: the features of '{key}' hold numbers that are not finite; fetch it again")
    return found.astype(np.float32)


def resized(features_NF: np.ndarray, frames: int) -> np.ndarray:
    """(N, F) -> (frames, F): zeros behind fewer, the largest of each of as many spans of more.

    The spans are those of torch's AdaptiveMaxPool1d: as even as they can be, they may share a frame.
    """
    import numpy as np

    count, width = features_NF.shape
    if count <= frames:
        return np.concatenate([features_NF, np.zeros((frames - count, width), features_NF.dtype)])
    return np.stack([features_NF[k * count // frames : -(-(k + 1) * count // frames)].max(0) for k in range(frames)])
