"""Subjects that are mixers alone: finds their basis, puts it into the pipeline once, and swaps the mixers on it."""

from collections.abc import Iterable
from pathlib import Path

from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.adapters.basis import Basis, FileBasis, svd_bases
from dreambooth_moslora.adapters.files.mixer_file import Mixers
from dreambooth_moslora.adapters.mixer_swap import SwappedMixers
from dreambooth_moslora.base.locate import base_folder
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.config.training_settings import SVD
from dreambooth_moslora.core.digests import file_digest
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.run_folder import BEST_NAME

__all__ = ["MixersOnBases"]


class MixersOnBases:
    """The bases in a pipeline's UNet, by `Mixers.basis_key`. `files` are bases that the user names."""

    def __init__(self, pipeline: StableDiffusionXLPipeline):
        self.pipeline = pipeline
        self.files: list[Path] = []
        self._loaded: dict[str, SwappedMixers] = {}

    def prepare(self, mixers: Mixers, file: Path) -> None:
        """Put the basis of the mixers, read from `file`, into the UNet, unless it is there. Raises UserError."""
        if mixers.basis_key not in self._loaded:
            basis = self._find(mixers, file)
            swapped = SwappedMixers(self.pipeline.unet, basis, mixers.ranks, mixers.basis_key)
            self._loaded[mixers.basis_key] = swapped

    def show(self, chosen: Iterable[tuple[Mixers, float]]) -> set[str]:
        """Let each basis compute with the weighted sum of its chosen mixers. Returns the names of these adapters."""
        by_basis: dict[str, list] = {}
        for mixers, scale in chosen:
            by_basis.setdefault(mixers.basis_key, []).append((mixers.values, scale))
        for key, subjects in by_basis.items():
            self._loaded[key].show(subjects)
        return set(by_basis)

    def forget(self, key: str) -> None:
        """The adapter was deleted from the UNet."""
        self._loaded.pop(key, None)

    def _find(self, mixers: Mixers, file: Path) -> Basis:
        """The basis that the mixers were trained on. Raises UserError for any other."""
        note = mixers.metadata.basis
        if note["kind"] == SVD:
            return self._svd_basis(mixers)
        parents = file.absolute().parents
        near = parents[: 3 if parents[0].name == BEST_NAME else 2]
        beside = [folder / note["file"] for folder in near] if note["file"] else []
        for place in (*self.files, *beside):
            if place.is_file() and file_digest(place) == note["sha256"]:
                return FileBasis(place)
        raise UserError(
            f"{mixers.file_name} needs its basis, {note['file']!r:.60} with sha256 {note['sha256'][:12]:.12}: put it "
            "beside the file or into the folder above, or name it with --basis"
        )

    def _svd_basis(self, mixers: Mixers) -> Basis:
        """Of the base's files that the mixers were trained on: a run may have loaded another variant of them."""
        wanted, found = mixers.metadata.basis, []
        for basis in svd_bases(self._folder()):
            if basis.note == wanted:
                return basis
            found.append(basis.note["sha256"][:12])
        raise UserError(
            f"{mixers.file_name} was made for other weights: its basis is of a base with sha256 "
            f"{wanted['sha256'][:12]:.12}, and this one's is {found[0]}"
        )

    def _folder(self) -> Path | None:
        """The diffusers folder of the pipeline's base, None for a single file."""
        name = str(self.pipeline.config.get("_name_or_path") or "")
        return base_folder(TrainConfig(pretrained_model_name_or_path=name)) if name else None
