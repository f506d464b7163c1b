"""The base model of a run: found once, from its name, and handed on.

    Base.find("toy")                  the embedded base
    Base.find("models/sdxl")          a diffusers folder
    Base.find("model.safetensors")    a single file
    Base.find("owner/model")          an id of the hub
    Base.of(config)                   what a run's settings name

Each fact is read from the base's files when it is first asked for, and kept. Nothing here loads the
model or imports torch: `base.load` does.
"""

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
from dreambooth_moslora.settings import family_facts, toy_bases
from dreambooth_moslora.settings.train_config import TrainConfig

BASE_SETTINGS = {
    "name": "pretrained_model_name_or_path",
    "revision": "revision",
    "cache_dir": "cache_dir",
    "variant": "variant",
    "vae": "pretrained_vae_model_name_or_path",
}
"""What decides which base a run has, and the setting that says it."""
LOGIN_MESSAGE = "asks for a login: accept its terms on its page, then `hf auth login`"
HUB_ERRORS = {401: LOGIN_MESSAGE, 403: LOGIN_MESSAGE, 404: "has no such model"}
"""HTTP status -> what follows "the hub" in a message."""
OTHER_BASE_ADVICE = "give the folder of a base, or a .safetensors file"
"""What helps where nobody has a base."""
HUB_TIMEOUT_SEC = 5
"""How long the hub's answer is waited for."""
Shapes = dict[str, list[int]]
"""Tensor's name -> its shape."""


@dataclass(frozen=True)
class Base:
    """A base model. Make it by `find` or `of`.

    name: as it was given
    source: a folder or a single file that is here, or an id of the hub
    path: of the folder or file; None for the hub
    revision, cache_dir: of a hub id, as huggingface_hub takes them
    variant: whose weight files are loaded, such as fp16; None for the plain ones
    vae: the name of another autoencoder
    """

    name: str
    source: Literal["folder", "file", "hub"]
    path: Path | None
    revision: str | None = None
    cache_dir: str | None = None
    variant: str | None = None
    vae: str | None = None

    @classmethod
    def find(cls, name: "str | Path | Base", **places: Any) -> "Base":
        """The base of that name; a base is itself. `places`: `revision`, `cache_dir`, `variant` and
        `vae`. Raises UserError for one that is missing, and for a damaged file."""
        if isinstance(name, Base):
            return name
        path = find_path(name)
        source = "hub"
        if path is not None:
            source = "file" if path.is_file() else "folder"
        return cls(name=str(name), source=source, path=path, **places)

    @classmethod
    def of(cls, settings: TrainConfig | Mapping[str, Any]) -> "Base":
        """The base that a run's settings name. Raises UserError as `find` does."""
        given = settings if isinstance(settings, Mapping) else vars(settings)
        places = {field: given.get(setting) for field, setting in BASE_SETTINGS.items()}
        del places["name"]
        return cls.find(given[BASE_SETTINGS["name"]], **places)

    @classmethod
    def of_run(cls, config: TrainConfig) -> "Base":
        """The same to draw with after the run, which may have been moved away from its cache, by
        whichever of the base's files are here. Raises UserError as `find` does."""
        cache_dir = config.cache_dir
        if not cache_dir or not Path(cache_dir).is_dir():
            cache_dir = None
        name = config.pretrained_model_name_or_path
        return cls.find(name, revision=config.revision, cache_dir=cache_dir)

    @property
    def public_name(self) -> str:
        """Without what is private of a path."""
        return get_public_name(self.name)

    @property
    def is_toy(self) -> bool:
        """Whether it is an embedded base."""
        return toy_bases.is_toy(self.name)

    @property
    def place(self) -> str | Path:
        """What diffusers loads it from."""
        return self.path or self.name

    @property
    def version(self) -> dict[str, str | None]:
        """Which one of the hub, and in which cache: options of huggingface_hub and diffusers."""
        return {"revision": self.revision, "cache_dir": self.cache_dir}

    @property
    def file(self) -> Path | None:
        """The single file that it is."""
        return self.path if self.source == "file" else None

    @cached_property
    def folder(self) -> Path | None:
        """Its diffusers folder, also in the hub's cache; None for a single file, and until the
        hub's denoiser is fetched."""
        if self.source != "hub":
            return self.path if self.source == "folder" else None

        # The cache may hold an index alone. A denoiser's configuration says that there is more.
        if self._cache_folder is None:
            return None
        configs = [self._cache_folder / part / "config.json" for part in family_facts.DENOISERS]
        return self._cache_folder if any(config.is_file() for config in configs) else None

    @cached_property
    def _cache_folder(self) -> Path | None:
        """Where the hub's cache has its index, and perhaps no more of it."""
        return model_files.find_snapshot(self.name, model_files.INDEX_NAME, **self.version)

    @property
    def configs(self) -> Path | None:
        """The folder that has its configuration: its own, or the one beside a single file."""
        return model_files.find_configs(self.file) if self.file else self.folder

    @cached_property
    def _index_or_reason(self) -> dict | str | None:
        """`index`, or why the hub does not give it."""
        # What is on this machine comes first: the hub is asked only where nothing is.
        home = self._cache_folder if self.source == "hub" else self.configs
        if home is not None:
            return read_json(home / model_files.INDEX_NAME)
        return fetch_index(self.name, self.revision) if self.source == "hub" else None

    @property
    def index(self) -> dict | None:
        """Its `model_index.json`, for which the hub may be asked; None where nobody has it. Raises
        UserError for a damaged one."""
        return self._index_or_reason if isinstance(self._index_or_reason, dict) else None

    @property
    def unreachable(self) -> str | None:
        """Why neither this machine nor the hub has it; None if one has. The hub may be asked."""
        if not isinstance(self._index_or_reason, str):
            return None
        return (
            f"the base {self.name} is not on this machine, and the hub {self._index_or_reason}: "
            f"{OTHER_BASE_ADVICE}, "
            f"or fetch it with `hf download {self.name}` where there is a connection."
        )

    @cached_property
    def known(self) -> tuple[family_facts.FamilyFacts, family_facts.PublishedModel] | None:
        """The family and the published model, of an id that is known without its files."""
        return (
            family_facts.MODELS_BY_HUB_ID.get(self.name.lower()) if self.source == "hub" else None
        )

    @cached_property
    def facts(self) -> family_facts.FamilyFacts | None:
        """Its family; None for a hub id that is not known and cannot be asked for. Raises UserError
        for a family that cannot be trained."""
        # A published model needs no question to the hub.
        if self.known and not self._cache_folder:
            return self.known[0]
        if self.index is not None:
            return model_files.get_index_facts(self.index)

        # A single file without configurations beside it tells its family by its tensors' names.
        return model_files.detect_file_facts(self.file, self.tensors) if self.file else None

    @property
    def is_flow(self) -> bool:
        """Whether it is trained by flow matching."""
        return self.facts is not None and self.facts.style == "flow"

    @cached_property
    def distilled(self) -> str:
        """Why it is a distilled base, which is not one to train; "" for another."""
        # Offline the name alone tells what a hub id is.
        facts = self.facts or model_files.detect_hub_facts(self.name)
        if facts is None or facts.style == "ddpm":
            return ""
        # A model that is known is no distilled one, so its index need not be asked for.
        index = None if self.known else self.index
        return family_facts.explain_distilled(index or {}, self.name, facts)

    @cached_property
    def tensors(self) -> Shapes:
        """Tensor's name -> shape in a single file; {} for a format that does not tell them. Raises
        UserError for a damaged file."""
        return model_files.read_shapes(self.file) if self.file else {}

    @cached_property
    def shapes(self) -> dict[str, Shapes]:
        """Part -> tensor's name -> shape, of the denoiser, the text encoders and the VAE in its
        folder; {} without a folder, and for a part without .safetensors files. Raises UserError for
        a damaged file."""
        if self.folder is None or self.facts is None:
            return {}
        parts = (self.facts.denoiser, *self.facts.encoders, "vae")
        return {
            part: model_files.read_folder_shapes(self.folder / part, self.variant) for part in parts
        }

    @property
    def denoiser_shapes(self) -> Shapes:
        """Those of the denoiser alone."""
        return self.shapes.get(self.facts.denoiser, {}) if self.facts else {}

    @cached_property
    def resolution_px(self) -> int:
        """The side in px of the pictures that it was trained on, by its files. The usual one for a
        base that is not known yet, and for one that cannot be used, which is refused later."""
        if self.is_toy:
            return toy_bases.RESOLUTION_PX
        with suppress(UserError):
            # The UNet's own configuration knows it better than the family.
            side = model_files.read_unet_resolution(self.configs) if self.configs else None
            if not side and self.facts:
                side = self.facts.resolution_px
            if side:
                return side
        return TrainConfig.resolution

    @cached_property
    def variant_here(self) -> str | None:
        """The variant whose files are here where the plain ones are not, `fp16` before others. A
        training by `sdxl.toml` fetches that variant alone."""
        if self.folder is None:
            return None
        home = self.folder / self.facts.denoiser
        is_plain = any("." not in file.stem for file in model_files.list_weight_files(home))
        variants = [] if is_plain else model_files.list_variants(home)
        return "fp16" if "fp16" in variants else next(iter(variants), None)

    @property
    def weights_gib(self) -> float:
        """Of the files that would be loaded, GiB. Raises OSError for a link whose file is gone."""
        weights = []
        if self.folder:
            for part in self.folder.iterdir():
                if part.is_dir():
                    weights += model_files.list_weight_files(part)
        if self.file:
            weights.append(self.file)
        return sum(file.stat().st_size for file in weights) / 2**30

    def check(self) -> None:
        """Raises UserError for a family that cannot be trained, a folder that is no whole base, and
        a file in a quantized format that is not read. What the hub has, or has not fetched yet, is
        not looked at."""
        facts = self.facts  # raises for a family that cannot be trained
        if self.file and model_files.group_quantized(self.file):
            from dreambooth_moslora.base.quantized_files import QuantizedFile  # with torch

            quantized = QuantizedFile(self.file)
            if facts.style == "ddpm" and quantized.others:
                raise UserError(
                    f"{self.file} is quantized outside the UNet too ({quantized.others[0]:.100}), "
                    "which is not read here: take the same model in fp16."
                )
            quantized.check()
        if self.source != "folder":
            return

        # What the family needs: models, with another VAE not the base's own, and their tokenizers.
        models = [facts.denoiser, *facts.encoders]
        if not self.vae:
            models.insert(1, "vae")
        tokenizers = [part.replace("text_encoder", facts.tokenizer) for part in facts.encoders]
        for part in (*models, *tokenizers, "scheduler"):
            if not any((self.folder / part).glob("*.json")):
                missing = f"{self.folder / part} is missing or has no configuration"
                raise UserError(f"{self.folder} is not a whole base model: {missing}.")

        # The weights are there, whole, and not quantised already.
        for part in models:
            model_files.check_is_dense(self.folder / part)
            model_files.check_weights(self.folder / part, self.variant)
        _ = self.shapes  # raises for a damaged file


def find_path(name: str | Path) -> Path | None:
    """The folder or file of that name; None for an id of the hub. Raises UserError for neither."""
    # An embedded base, by its short name.
    if toy := toy_bases.TOY_FOLDERS.get(str(name)):
        if not (toy / model_files.INDEX_NAME).is_file():
            lack = f"{toy} has no {model_files.INDEX_NAME}"
            raise UserError(f"the embedded base is missing: {lack}; clone or install it again.")
        return toy

    # A folder or a file that is here, each of which must be a model's.
    path = expand_user_path(name)
    if path.is_dir():
        if not (path / model_files.INDEX_NAME).is_file():
            raise UserError(f"{path} is not a diffusers model: it has no {model_files.INDEX_NAME}.")
        return path
    if path.is_file():
        if path.suffix not in model_files.SINGLE_FILE_SUFFIXES:
            raise UserError(f"{path} is neither a diffusers folder nor a .safetensors checkpoint.")
        model_files.read_shapes(path)  # which refuses a damaged one
        return path

    # Anything else is on the hub, if it could be a name there.
    if not model_files.is_hub_id(str(name)):
        instead = "give a diffusers folder, a .safetensors file or a hub id"
        raise UserError(f"the base {name} does not exist: {instead}.")
    return None


@cache
def fetch_index(hub_id: str, revision: str | None) -> dict | str:
    """The `model_index.json` that the hub gives, or why it does not. It is asked once, and waited
    for only `HUB_TIMEOUT_SEC`: loading a base asks it again for minutes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import OfflineModeIsEnabled, build_hf_headers, get_session

    url = hf_hub_url(hub_id, model_files.INDEX_NAME, revision=revision)
    try:
        answer = get_session().get(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT_SEC)
        if answer.status_code != 200:
            return HUB_ERRORS.get(answer.status_code, "has none")
        index = answer.json()
    except OfflineModeIsEnabled:
        return "is not asked, as HF_HUB_OFFLINE is set"
    except Exception:  # the client passes on the HTTP library's errors
        return "does not answer"
    return index if isinstance(index, dict) else "has none"
