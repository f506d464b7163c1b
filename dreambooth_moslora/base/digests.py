"""Digests of a base's files, by which caches, class images and checkpoints recognise it, wherever
it lies."""

from collections.abc import Iterable
from pathlib import Path

from dreambooth_moslora.base import model_files
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.contents import hash_files, hash_values
from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.settings.family_facts import FamilyFacts

RECORD = "digests.json"
"""In the folder of the caches: what each file's digest was."""


def hash_parts(
    base: Base, facts: FamilyFacts, parts: Iterable[str], caches: Path
) -> dict[str, str]:
    """Return part -> SHA-256 of all bytes that decide it; without a part whose files are not here.

    base: loaded, so that the hub's files are here
    facts: of its family
    parts: names of models in its pipeline: the denoiser, text encoders, `vae`
    caches: the folder that remembers the digests of large files

    Raises OSError for a file that cannot be read.
    """
    digests = {}
    for part in parts:
        if paths := list_files(base, facts, part):
            digests[part] = hash_values(files=hash_files(paths, caches / RECORD))
    return digests


def list_files(base: Base, facts: FamilyFacts, part: str) -> list[Path]:
    """Return the files that decide a part: its weights, and of all but the denoiser, whose weights
    tell it, the configuration and what splits prompts. [] where its weights are not here."""
    home = find_home(base, facts, part)
    is_other_vae = part == "vae" and base.vae
    is_denoiser = part == facts.denoiser

    # A single file of a UNet holds all models, that of a transformer this one alone.
    if base.file and not is_other_vae and (is_denoiser or facts.style == "ddpm"):
        weights = [base.file]
    else:
        weights = (
            model_files.list_weight_files(home, None if is_other_vae else base.variant)
            if home
            else []
        )
    if is_denoiser or not weights or home is None:
        return weights

    # The tokenizer of text_encoder_2 is tokenizer_2, a folder beside it.
    others = [home / "config.json"]
    if part in facts.encoders:
        tokenizer = home.with_name(part.replace("text_encoder", facts.tokenizer))
        others += sorted(tokenizer.rglob("*"))
    return weights + [path for path in others if path.is_file()]


def find_home(base: Base, facts: FamilyFacts, part: str) -> Path | None:
    """Return the folder of a part; None for one that is not here."""
    # Another VAE has a folder or a hub id of its own.
    if part == "vae" and base.vae:
        path = expand_user_path(base.vae)
        if path.is_dir():
            return path
        return model_files.find_snapshot(base.vae, "config.json", cache_dir=base.cache_dir)

    # Beside a single file there may be a folder of its other parts, which else are the hub's. The
    # hub's snapshot is looked for anew: loading may have fetched another one.
    root = None if base.source == "hub" else base.configs
    if root is None:
        hub_id = facts.models[0].hub_id if base.file else base.name
        root = model_files.find_snapshot(hub_id, model_files.INDEX_NAME, **base.version)
    return root / part if root else None
