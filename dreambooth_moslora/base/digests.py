"""Digests of a base's files, by which caches, class images and checkpoints recognise it in any
folder."""

from collections.abc import Iterable
from pathlib import Path

from dreambooth_moslora.base import model_files
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.contents import hash_files, hash_values
from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.settings.family_facts import FamilyFacts

RECORD = "digests.json"
"""File in the caches' folder that stores the digests of files."""


def hash_parts(
    base: Base, facts: FamilyFacts, parts: Iterable[str], caches: Path
) -> dict[str, str]:
    """Return part -> SHA-256 of all its files, without the parts that are not on this machine.

    base: already loaded, so that the hub's files are on this machine
    parts: names of models in the pipeline: the denoiser, text encoders, `vae`
    caches: folder that stores the digests of large files

    Raises OSError for a file that cannot be read.
    """
    digests = {}
    for part in parts:
        if paths := list_files(base, facts, part):
            digests[part] = hash_values(files=hash_files(paths, caches / RECORD))
    return digests


def list_files(base: Base, facts: FamilyFacts, part: str) -> list[Path]:
    """Return the files that decide a part: its weights, and, except for the denoiser, the
    configuration and the tokenizer. [] if its weights are not on this machine."""
    folder = find_part_folder(base, facts, part)
    is_other_vae = part == "vae" and base.vae
    is_denoiser = part == facts.denoiser

    # A UNet's single file holds all models, a transformer's file the transformer and few more.
    weights = []
    is_in_file = is_denoiser or facts.style == "ddpm" or part in dict(facts.file_parts)
    if base.file and not is_other_vae and is_in_file:
        weights = [base.file]
    elif folder:
        weights = model_files.list_weight_files(folder, None if is_other_vae else base.variant)
    if is_denoiser or not weights or folder is None:
        return weights

    # The tokenizer of text_encoder_2 is tokenizer_2, a folder beside it.
    config_files = [folder / "config.json"]
    if part in facts.encoders:
        tokenizer = folder.with_name(part.replace("text_encoder", facts.tokenizer))
        config_files += sorted(tokenizer.rglob("*"))
    return weights + [path for path in config_files if path.is_file()]


def find_part_folder(base: Base, facts: FamilyFacts, part: str) -> Path | None:
    """Return the folder of a part; None if it is not on this machine."""
    # A VAE that replaces the base's has a separate folder or hub id.
    if part == "vae" and base.vae:
        path = expand_user_path(base.vae)
        if path.is_dir():
            return path
        return model_files.find_snapshot(base.vae, "config.json", cache_dir=base.cache_dir)

    # A single file's other parts are in the folder beside it, else on the hub. Search for the hub's
    # snapshot again: loading may have fetched another one.
    root = None if base.source == "hub" else base.configs
    if root is None:
        hub_id = facts.models[0].hub_id if base.file else base.name
        root = model_files.find_indexed_snapshot(hub_id, **base.version)
    return root / part if root else None
