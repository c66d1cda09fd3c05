"""The hub: a model or data set at a pinned commit, from its cache first, and what to do where there is no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora_lab.io.errors import LoadError


def snapshot(name: str, revision: str | None, kind: str, files: Sequence[str], pin: str, instead: str) -> Path:
    """The cached folder of a hub repository (`kind` "model" or "dataset") at `revision`, fetched if it is not there.

    files: patterns of what is fetched; pin: how a user names the commit; instead: how to do without the hub. Raises
    LoadError for a revision that is no commit (a branch moves, so it would not say what a run was) and for what cannot
    be fetched.
    """
    from huggingface_hub import constants, snapshot_download

    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise LoadError(
            f"{kind} '{name}': revision {revision!r} is no commit (40 hex digits); find it with `python -c \"from "
            f"huggingface_hub import HfApi; print(HfApi().{kind}_info('{name}').sha)\"`, then {pin}; or {instead}"
        )
    try:  # the cache first: a pinned commit that is there needs no network
        return Path(snapshot_download(name, revision=revision, repo_type=kind, local_files_only=True))
    except Exception:
        pass
    try:
        return Path(snapshot_download(name, revision=revision, repo_type=kind, allow_patterns=list(files)))
    except Exception as error:
        include = " ".join(f"'{pattern}'" for pattern in files)
        fetch = f"hf download {name} --repo-type {kind} --revision {revision} --include {include}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise LoadError(
            f"{kind} '{name}' at revision {revision} is not in the hub's cache, {constants.HF_HUB_CACHE}, and could "
            f"not be fetched ({type(error).__name__}: {reason}); where there is a network (and, for a gated one, after "
            f"`hf auth login`), `{fetch}`, then bring the folder {kind}s--{name.replace('/', '--')} of the cache here; "
            f"or {instead}"
        ) from None


def saved_folder(name: str) -> Path:
    """The folder of a model or adapter that somebody names: one that is here, or a hub id ("org/name@revision").

    Without a revision the hub's main branch is taken, as the cache has it. Raises LoadError for what is neither.
    """
    if Path(name).exists():
        return Path(name)
    place, _, revision = name.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", place):
        raise LoadError(f"{name}: no such folder, and no hub id (org/name)")
    from huggingface_hub import constants, snapshot_download

    wanted: dict[str, Any] = {
        "revision": revision or None,
        "allow_patterns": ["*.json", "*.safetensors", "adapter_model*"],
    }
    try:  # the cache first
        return Path(snapshot_download(place, local_files_only=True, **wanted))
    except Exception:
        pass
    try:
        return Path(snapshot_download(place, **wanted))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise LoadError(
            f"model '{place}' at revision {revision or 'main'} is not in the hub's cache, {constants.HF_HUB_CACHE}, "
            f"and could not be fetched ({type(error).__name__}: {reason}); check the name, or give a folder"
        ) from None
