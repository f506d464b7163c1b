"""Base model of a run, and the facts that its files state.

    Base.find("toy")                  the embedded base
    Base.find("models/sdxl")          a diffusers folder
    Base.find("model.safetensors")    a single file
    Base.find("owner/model")          an id of the hub
    Base.of(config)                   the base that a run's settings name

Each fact is read from the base's files at its first use, and cached. This module neither loads the
model nor imports torch: `base.load` does.
"""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from dreambooth_moslora.base import model_files
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import expand_user_path, get_public_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import distillation, family_facts, toy_bases
from dreambooth_moslora.settings.train_config import TrainConfig

BASE_SETTINGS = {
    "name": "pretrained_model_name_or_path",
    "revision": "revision",
    "cache_dir": "cache_dir",
    "variant": "variant",
    "vae": "pretrained_vae_model_name_or_path",
}
"""Field of `Base` -> setting that gives it."""
LOGIN_MESSAGE = "asks for a login: accept its terms on its page, then `hf auth login`"
HUB_ERRORS = {401: LOGIN_MESSAGE, 403: LOGIN_MESSAGE, 404: "has no such model"}
"""HTTP status -> text that follows "the hub" in a message."""
OTHER_BASE_ADVICE = "give the folder of a base, or a .safetensors file"
HUB_TIMEOUT_SEC = 5
Shapes = dict[str, list[int]]
"""Tensor's name -> its shape."""


@dataclass(frozen=True)
class Base:
    """Base model. Create it by `find` or `of`.

    name: folder, file or hub id, as the user gave it
    source: local folder, local single file, or hub
    path: of the folder or file; None for the hub
    revision, cache_dir: of a hub id, as huggingface_hub takes them
    variant: of the weight files, such as fp16; None for the plain ones
    vae: name of an autoencoder that replaces the base's
    """

    name: str
    source: Literal["folder", "file", "hub"]
    path: Path | None
    revision: str | None = None
    cache_dir: str | None = None
    variant: str | None = None
    vae: str | None = None

    @classmethod
    def find(cls, name: "str | Path | Base", **options: Any) -> "Base":
        """Find the base of this name, or return the base that is passed.

        options: `revision`, `cache_dir`, `variant` and `vae`

        Raises UserError for a missing base and for a damaged file.
        """
        if isinstance(name, Base):
            return name
        path = find_path(name)
        source = "hub"
        if path is not None:
            source = "file" if path.is_file() else "folder"
        return cls(name=str(name), source=source, path=path, **options)

    @classmethod
    def of(cls, settings: TrainConfig | Mapping[str, Any]) -> "Base":
        """Find the base that a run's settings name. Raises UserError as `find` does."""
        values = settings if isinstance(settings, Mapping) else vars(settings)
        return cls.find(**{field: values.get(setting) for field, setting in BASE_SETTINGS.items()})

    @classmethod
    def of_run(cls, config: TrainConfig) -> "Base":
        """Find a finished run's base for generation, in any variant. A run that was moved away from
        its cache uses the default cache. Raises UserError as `find` does."""
        has_cache = config.cache_dir and Path(config.cache_dir).is_dir()
        cache_dir = config.cache_dir if has_cache else None
        name = config.pretrained_model_name_or_path
        return cls.find(name, revision=config.revision, cache_dir=cache_dir)

    @property
    def public_name(self) -> str:
        """Name without the private part of a path."""
        return get_public_name(self.name)

    @property
    def is_toy(self) -> bool:
        """True for an embedded base."""
        return toy_bases.is_toy(self.name)

    @property
    def load_path(self) -> str | Path:
        """Path or hub id from which diffusers loads the base."""
        return self.path or self.name

    @property
    def version(self) -> dict[str, str | None]:
        """Revision and cache, as options of huggingface_hub and diffusers."""
        return {"revision": self.revision, "cache_dir": self.cache_dir}

    @property
    def file(self) -> Path | None:
        """Single file of the base; None for a folder or hub id."""
        return self.path if self.source == "file" else None

    @cached_property
    def folder(self) -> Path | None:
        """Diffusers folder, also in the hub's cache; None for a single file, and until the hub's
        denoiser is fetched."""
        if self.source != "hub":
            return self.path if self.source == "folder" else None

        # The cache may hold the index alone. A denoiser's configuration shows that it holds more.
        if self._cache_folder is None:
            return None
        configs = [self._cache_folder / part / "config.json" for part in family_facts.DENOISERS]
        return self._cache_folder if any(config.is_file() for config in configs) else None

    @cached_property
    def _cache_folder(self) -> Path | None:
        """Folder of the hub's cache that has at least the base's index."""
        return model_files.find_indexed_snapshot(self.name, **self.version)

    @property
    def configs(self) -> Path | None:
        """Folder with the configuration: the base's folder, or the one beside a single file."""
        return model_files.find_configs(self.file) if self.file else self.folder

    @cached_property
    def _index_or_reason(self) -> dict | str | None:
        """Result of `index`, or the reason why the hub does not return it."""
        # Request the hub's index only if this machine has none.
        folder = self._cache_folder if self.source == "hub" else self.configs
        if folder is not None:
            return read_json(model_files.find_index(folder))
        return fetch_index(self.name, self.revision) if self.source == "hub" else None

    @property
    def index(self) -> dict | None:
        """Content of the file that lists the parts, perhaps from the hub; None if neither this
        machine nor the hub has it. Raises UserError for a damaged one."""
        return self._index_or_reason if isinstance(self._index_or_reason, dict) else None

    @property
    def unreachable(self) -> str | None:
        """Message that neither this machine nor the hub has the base; None if one has. This may
        send a request to the hub."""
        if not isinstance(self._index_or_reason, str):
            return None
        return (
            f"{self.suggestion}the base {self.name} is not on this machine, and the hub "
            f"{self._index_or_reason}: {OTHER_BASE_ADVICE}, "
            f"or fetch it with `hf download {self.name}` where there is a connection."
        )

    @property
    def suggestion(self) -> str:
        """Beginning of a message about an unknown hub id that nearly is a published model's; else
        ""."""
        if self.source != "hub" or self.facts is not None:
            return ""
        ids = [model.hub_id for _, model in family_facts.MODELS_BY_HUB_ID.values()]
        near = difflib.get_close_matches(self.name, ids, n=1, cutoff=0.85)
        return f"did you mean {near[0]}? " if near else ""

    @cached_property
    def published(self) -> tuple[family_facts.FamilyFacts, family_facts.PublishedModel] | None:
        """Family and row of a hub id in the table of published models; None for another base."""
        if self.source != "hub":
            return None
        return family_facts.MODELS_BY_HUB_ID.get(self.name.lower())

    @cached_property
    def facts(self) -> family_facts.FamilyFacts | None:
        """Row of the base's family; None for an unlisted hub id that cannot be fetched. Raises
        UserError for a family that cannot be trained."""
        # A published model needs no request to the hub.
        if self.published and not self._cache_folder:
            return self.published[0]
        if self.index is not None:
            return model_files.get_index_facts(self.index)

        # The tensors' names decide the family of a single file without configurations beside it.
        return model_files.detect_file_facts(self.file, self.tensors) if self.file else None

    @property
    def is_flow(self) -> bool:
        """True if the base is trained by flow matching."""
        return self.facts is not None and self.facts.style == "flow"

    @cached_property
    def distilled(self) -> str:
        """Reason why the base counts as distilled, which should not be trained; "" otherwise."""
        # Offline only the name of a hub id can be examined.
        facts = self.facts or model_files.detect_hub_facts(self.name)
        if facts is None or facts.style == "ddpm":
            return ""

        # Models in the table are not distilled, so their index is not needed.
        index = None if self.published else self.index
        return distillation.explain_distilled(index or {}, self.name, facts)

    @cached_property
    def tensors(self) -> Shapes:
        """Tensor's name -> shape in a single file; {} for another format than safetensors. Raises
        UserError for a damaged file."""
        return model_files.read_shapes(self.file) if self.file else {}

    @cached_property
    def shapes(self) -> dict[str, Shapes]:
        """Part -> tensor's name -> shape, of the denoiser, the text encoders and the VAE in the
        base's folder; {} without a folder, and for a part without .safetensors files. Raises
        UserError for a damaged file."""
        if self.folder is None or self.facts is None:
            return {}
        parts = (self.facts.denoiser, *self.facts.encoders, "vae")
        return {
            part: model_files.read_folder_shapes(self.folder / part, self.variant) for part in parts
        }

    @property
    def denoiser_shapes(self) -> Shapes:
        """Shapes of the denoiser."""
        return self.shapes.get(self.facts.denoiser, {}) if self.facts else {}

    @cached_property
    def resolution_px(self) -> int:
        """Side in px of the base's training images, by its files; the default of `resolution` for a
        base of unknown family, and for one that a later check refuses."""
        if self.is_toy:
            return toy_bases.RESOLUTION_PX
        with suppress(UserError):
            # The UNet's configuration overrides the family's resolution.
            if self.configs and (side := model_files.read_unet_resolution(self.configs)):
                return side
            if self.facts:
                return self.facts.resolution_px
        return TrainConfig.resolution

    @property
    def guidance(self) -> float:
        """Guidance scale of the base's images, unless another is given."""
        facts = self.facts or family_facts.SDXL
        return facts.no_guidance + toy_bases.TOY_GUIDANCE if self.is_toy else facts.guidance

    @cached_property
    def local_variant(self) -> str | None:
        """Variant on this machine if the plain files are not, preferably `fp16`: a training by
        `sdxl.toml` fetches that variant alone."""
        if self.folder is None:
            return None
        folder = self.folder / self.facts.denoiser
        is_plain = any("." not in file.stem for file in model_files.list_weight_files(folder))
        variants = [] if is_plain else model_files.list_variants(folder)
        return "fp16" if "fp16" in variants else next(iter(variants), None)

    @property
    def weights_gib(self) -> float:
        """Size of the weight files that are loaded, GiB. Raises OSError for a broken link."""
        weights = [self.file] if self.file else []
        for part in self.folder.glob("*/") if self.folder else ():
            weights += model_files.list_weight_files(part)
        return sum(file.stat().st_size for file in weights) / 2**30

    def check(self) -> None:
        """Raise UserError for a family that cannot be trained, an incomplete folder, and a file in
        an unsupported quantized format. Files on the hub are not checked."""
        facts = self.facts  # raises for a family that cannot be trained

        # Check a quantized file: of a whole UNet checkpoint, only the UNet may be quantized.
        if self.file and model_files.group_quantized(self.file):
            from dreambooth_moslora.base.quantized_files import QuantizedFile  # with torch

            quantized = QuantizedFile(self.file)
            if facts.style == "ddpm" and (outside := quantized.other_layers):
                raise UserError(
                    f"{self.file} is quantized outside the UNet too ({outside[0]:.100}), "
                    "which is not read here: take the same model in fp16."
                )
            quantized.check()
        if self.source != "folder":
            return

        # Check that all parts are there: models, the VAE unless it is replaced, and tokenizers.
        models = [facts.denoiser, *facts.encoders]
        if not self.vae:
            models.insert(1, "vae")
        tokenizers = [part.replace("text_encoder", facts.tokenizer) for part in facts.encoders]
        for part in (*models, *tokenizers, *facts.further_parts):
            if not any((self.folder / part).glob("*.json")):
                raise UserError(
                    f"{self.folder} is not a whole base model: "
                    f"{self.folder / part} is missing or has no configuration."
                )

        # Check that the weights are there, whole, and not quantised already.
        for part in models:
            model_files.check_is_dense(self.folder / part)
            if not model_files.list_weight_files(self.folder / part, self.variant):
                raise UserError(
                    f"{self.folder / part} has no weights: "
                    "there is neither a .safetensors nor a .bin file in it."
                )
        _ = self.shapes  # raises for a damaged file


def find_path(name: str | Path) -> Path | None:
    """Return the folder or file of this name; None for an id of the hub. Raises UserError for
    neither."""
    # Look up an embedded base by its short name.
    if toy := toy_bases.TOY_FOLDERS.get(str(name)):
        if not (toy / model_files.INDEX_NAME).is_file():
            raise UserError(
                f"the embedded base is missing: {toy} has no {model_files.INDEX_NAME}; "
                "clone or install it again."
            )
        return toy

    # Look for a local folder or file, which must hold a model.
    path = expand_user_path(name)
    if path.is_dir():
        if not model_files.find_index(path):
            raise UserError(f"{path} is not a diffusers model: it has no {model_files.INDEX_NAME}.")
        return path
    if path.is_file():
        if path.suffix not in model_files.SINGLE_FILE_SUFFIXES:
            raise UserError(f"{path} is neither a diffusers folder nor a .safetensors checkpoint.")
        model_files.read_shapes(path)  # raises for a damaged file
        return path

    # Anything else must be a valid id of the hub.
    if not model_files.is_hub_id(str(name)):
        raise UserError(
            f"the base {name} does not exist: "
            "give a diffusers folder, a .safetensors file or a hub id."
        )
    return None


@cache
def fetch_index(hub_id: str, revision: str | None) -> dict | str:
    """Fetch a base's index from the hub; return the reason where that fails. There is one request
    for each name of an index, of at most `HUB_TIMEOUT_SEC`: loading a base repeats its requests for
    minutes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import OfflineModeIsEnabled, build_hf_headers, get_session

    try:
        for name in model_files.INDEX_NAMES:
            url = hf_hub_url(hub_id, name, revision=revision)
            response = get_session().get(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT_SEC)
            if response.status_code != 404:
                break
        if response.status_code != 200:
            return HUB_ERRORS.get(response.status_code, "has none")
        index = response.json()
    except OfflineModeIsEnabled:
        return "is not asked, as HF_HUB_OFFLINE is set"
    except Exception:  # the client passes on the HTTP library's errors
        return "does not answer"
    return index if isinstance(index, dict) else "has none"
