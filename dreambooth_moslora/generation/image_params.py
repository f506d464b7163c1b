"""Parameters of an image: schedulers, limits, and the recipe in a PNG. Needs no torch.

Every PNG has two text chunks: `parameters`, the text that A1111 and related programs read, and
`dreambooth_moslora`, exact JSON, from which `GenerationParams.from_png(path)` gives the same image
again.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.disk.contents import parse_json
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.family_facts import TEXT_OPTIONS, FamilyFacts
from dreambooth_moslora.settings.train_config import TrainConfig

PNG_KEY = "dreambooth_moslora"
FORMAT_VERSION = 1
MAX_SEED = 2**32 - 1
SIZE_STEP_PX = 8
"""Sides are multiples of this: the VAE halves them three times."""
PARAM_LIMITS = {
    "seed": (0, MAX_SEED),
    "steps": (1, 200),
    "guidance_scale": (0.0, 50.0),
    "num_images": (1, 64),
    "height_px": (SIZE_STEP_PX, 4096),
    "width_px": (SIZE_STEP_PX, 4096),
}
MAX_PROMPT_CHARACTERS = 5000
MAX_ADAPTERS = 8
LORA_TAG_PATTERN = re.compile(r"<lora:([^<>]{1,200})>")
"""`<lora:name:0.8>`, as A1111 writes it."""
MAX_STEPS = 100
"""Largest number of steps on a machine that serves many users: more would block the queue."""
MAX_AREA_RATIO = 4
"""Largest area relative to the base's default: larger images take much longer and repeat
themselves."""


@dataclass(frozen=True)
class Scheduler:
    """Noise scheduler, as this program offers it."""

    title: str  # its name in other programs ("Sampler" in A1111)
    class_name: str  # of diffusers
    options: Mapping[str, Any] = field(default_factory=dict)


KARRAS_OPTIONS = {
    "algorithm_type": "dpmsolver++",
    "use_karras_sigmas": True,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
"""Options of DPM++ on Karras' noise levels; diffusers allows one kind of levels at a time."""
SCHEDULERS = {
    "euler": Scheduler(title="Euler", class_name="EulerDiscreteScheduler"),
    "dpmpp_2m_karras": Scheduler(
        title="DPM++ 2M Karras",
        class_name="DPMSolverMultistepScheduler",
        options=KARRAS_OPTIONS,
    ),
    "dpmpp_2m_sde_karras": Scheduler(
        title="DPM++ 2M SDE Karras",
        class_name="DPMSolverMultistepScheduler",
        options=KARRAS_OPTIONS | {"algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": Scheduler(title="UniPC", class_name="UniPCMultistepScheduler"),
}
"""Schedulers by this program's names. One seed decides all noise of an image, also the noise that
DPM++ 2M SDE adds after each step."""


@dataclass(frozen=True)
class Provenance:
    """Files and programs that made an image, without paths and without facts about photos or the
    machine."""

    base: str = ""
    adapter_sha256: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class GenerationParams:
    """Parameters that decide the pixels, for a given base and adapters.

    seed: of the first image; image i has `seed + i`, whatever `num_images` is
    guidance_scale, scheduler: None means the base's default
    height_px, width_px: px; None means the base's default
    adapters: names, or pairs of a name and a scale; stored as pairs
    text_options: settings of training, such as max_sequence_length; by default those of the
        adapters' runs. An empty value is the base's default

    Raises UserError for a value that cannot be generated.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance_scale: float | None = None
    height_px: int | None = None
    width_px: int | None = None
    num_images: int = 1
    adapters: str | Sequence[str | tuple[str, float]] = ()
    scheduler: str | None = None
    text_options: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()

    def __post_init__(self) -> None:
        # Check every field, also its type: anyone may have written the PNG.
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(self, name))
        if not self.prompt.strip():
            raise UserError("the prompt is empty; write what the image should show")

        for name, (low, high) in PARAM_LIMITS.items():
            _check_number(name, getattr(self, name), low, high, whole=name != "guidance_scale")
        for name in ("height_px", "width_px"):
            size = getattr(self, name)
            if size is not None and size % SIZE_STEP_PX:
                raise UserError(f"{name} is {size}; it must be a multiple of {SIZE_STEP_PX}")

        # A list of JSON cannot be looked up in a dictionary.
        if self.scheduler not in (None, *SCHEDULERS):
            raise UserError(
                f"scheduler {self.scheduler!r:.60} is unknown; "
                f"choose one of {', '.join(SCHEDULERS)}"
            )

        # The class is frozen and hashable: lists and dictionaries of JSON become tuples.
        object.__setattr__(self, "adapters", _parse_adapters(self.adapters))
        object.__setattr__(self, "text_options", _parse_text_options(self.text_options))

    def for_image(self, index: int) -> "GenerationParams":
        """Return the parameters of image `index` alone, for its PNG."""
        return replace(self, seed=(self.seed + index) % (MAX_SEED + 1), num_images=1)

    def apply_tags(self) -> "GenerationParams":
        """Turn `<lora:name:0.8>` in the prompt into an adapter; a tag overrides the scale in
        `adapters`."""
        prompt, tags = parse_lora_tags(self.prompt)
        if not tags:
            return self
        adapters = tuple((dict(self.adapters) | dict(tags)).items())
        return replace(self, prompt=prompt, adapters=adapters)

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters as JSON values. Empty `text_options` are left out, so that the
        bytes of other images do not change."""
        values = asdict(self) | {"adapters": [list(pair) for pair in self.adapters]}
        text_options = dict(values.pop("text_options"))
        return values | ({"text_options": text_options} if text_options else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationParams":
        """Create parameters from JSON values. Raises UserError for an unknown name or a value of
        the wrong type: anyone may have written the PNG."""
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise UserError(f"unknown generation parameter {unknown[0]!r}")
        if "prompt" not in values:
            raise UserError("the recipe has no prompt")
        return cls(**values)

    def to_png_text(self, provenance: Provenance | None = None) -> dict[str, str]:
        """Return the text chunks for the PNG of this one image: key -> text."""
        provenance = provenance or Provenance()
        recipe = {
            "format": FORMAT_VERSION,
            "params": self.to_dict(),
            "base": provenance.base,
            "adapter_sha256": dict(provenance.adapter_sha256),
            "versions": dict(provenance.versions),
        }
        return {
            "parameters": _format_a1111_text(self, provenance),
            PNG_KEY: json.dumps(recipe, ensure_ascii=False),
        }

    @classmethod
    def from_png(cls, path: str | Path) -> "GenerationParams":
        """Read the parameters in a PNG of this program. Raises UserError when it has none."""
        return read_recipe(path).params


@dataclass(frozen=True)
class StoredRecipe:
    """JSON in a PNG, with unchecked values."""

    params: dict[str, Any]
    base: str = ""
    adapter_sha256: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Recipe of an image, as its PNG tells it."""

    params: GenerationParams
    provenance: Provenance


def check_sides(sides: tuple[int, int], facts: FamilyFacts) -> None:
    """Raise UserError for sides, px, that the family's patches do not divide."""
    step = facts.multiple_px
    for side in sides:
        if side % step:
            near = max(1, side // step) * step
            raise UserError(
                f"a side of {side} px: {facts.title} needs multiples of {step}, such as {near}"
            )


def resolve_seed(seed: int) -> int:
    """Return `seed`, or a random one if it is negative."""
    return secrets.randbelow(2**31) if seed < 0 else int(seed)


def parse_lora_tags(prompt: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """Split a prompt into its text and its tags. Raises UserError for a malformed tag.

    "a dog <lora:rex:0.8>" -> ("a dog", (("rex", 0.8),))
    """
    tags = dict(map(parse_lora_tag, LORA_TAG_PATTERN.findall(prompt)))
    if not tags:
        return prompt, ()

    # A removed tag leaves two spaces behind.
    bare_prompt = LORA_TAG_PATTERN.sub("", prompt)
    return re.sub(r"\s{2,}", " ", bare_prompt).strip(), tuple(tags.items())


def parse_lora_tag(text: str) -> tuple[str, float]:
    """Parse "rex:0.8" as ("rex", 0.8); the default scale is 1. Raises UserError."""
    name, colon, scale = text.partition(":")
    try:
        return name.strip(), float(scale) if colon else 1.0
    except ValueError:
        raise UserError(
            f"<lora:{text:.100}> cannot be read: write <lora:NAME:SCALE> with one number"
        ) from None


def read_recipe(path: str | Path) -> Recipe:
    """Read the recipe in a PNG, without decoding pixels. Raises UserError for any other file, and
    for one without a recipe or with a damaged one."""
    # Read the text chunk. A file of another kind may raise any of these errors.
    name = Path(path).name
    try:
        with PIL.Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(PNG_KEY)
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file") from None
    except (PIL.Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name} is not a readable PNG file") from error
    if not isinstance(text, str):
        raise UserError(
            f"{name} carries no recipe of this program; was it saved again by another one?"
        )

    # Check the types here, and the values in GenerationParams.
    try:
        stored = parse_json(text, StoredRecipe)
    except UserError as error:
        raise UserError(f"the recipe inside the PNG is damaged: {error}") from error
    return Recipe(
        params=GenerationParams.from_dict(stored.params),
        provenance=Provenance(
            base=stored.base,
            adapter_sha256=tuple(stored.adapter_sha256.items()),
            versions=tuple(stored.versions.items()),
        ),
    )


def _check_text(name: str, text: Any) -> None:
    """Raise UserError for a value that is no text, is too long or has broken characters."""
    if not isinstance(text, str):
        raise UserError(f"{name} must be text, not {type(text).__name__}")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{name} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed"
        )
    check_characters(text, name)


def check_characters(text: str, name: str) -> None:
    """Raise UserError for half a surrogate pair: JSON can hold it, but files, pages and tokenizers
    cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} holds {text[error.start]!r}, which is not a character; remove it"
        ) from error


def _check_number(name: str, value: Any, low: float, high: float, *, whole: bool) -> None:
    """Raise UserError for a value that is no number between `low` and `high`."""
    # None stands for the base's default. A bool is an int to Python.
    if value is None and name in ("guidance_scale", "height_px", "width_px"):
        return
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r:.40}")
    if not low <= value <= high:
        raise UserError(f"{name} is {value}; it must lie between {low} and {high}")


def _parse_adapters(adapters: Any) -> tuple[tuple[str, float], ...]:
    """Return pairs of name and scale; a name alone gets scale 1. Raises UserError."""
    # Bring every spelling into pairs.
    items = [adapters] if isinstance(adapters, str) else adapters
    try:
        if isinstance(items, Mapping):
            raise TypeError
        items = [(item, 1.0) if isinstance(item, str) else item for item in items]
        pairs = tuple((name, float(scale)) for name, scale in items)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"adapters must be names, or pairs of name and scale, not {adapters!r:.60}"
        ) from error

    # Check the number of adapters, and their names and scales.
    if len(pairs) > MAX_ADAPTERS:
        raise UserError(
            f"{len(pairs)} adapters are too many; at most {MAX_ADAPTERS} can be combined"
        )
    for name, scale in pairs:
        # `not … <=` is also true for NaN.
        if not isinstance(name, str) or not name or not abs(scale) <= 10:
            raise UserError(
                f"adapter {name!r:.60} with scale {scale} is not usable; "
                "scales lie between -10 and 10"
            )
    if len(dict(pairs)) != len(pairs):
        raise UserError("an adapter is named twice; give each one scale")
    return pairs


def _parse_text_options(options: Any) -> tuple[tuple[str, Any], ...]:
    """Return names and values, with the types of `TrainConfig`. Raises UserError."""
    try:
        options = dict(options)
    except (TypeError, ValueError) as error:
        raise UserError(f"text_options must be names with values, not {options!r:.60}") from error
    for name in options:
        if name not in TEXT_OPTIONS:
            raise UserError(
                f"the text option {name!r:.60} is unknown; there are {', '.join(TEXT_OPTIONS)}"
            )

    # Values get the types of the settings, such as a tuple of layers.
    config = TrainConfig.from_dict(options)
    return tuple((name, getattr(config, name)) for name in options)


def _format_a1111_text(params: GenerationParams, provenance: Provenance) -> str:
    """Return the text for other programs: prompt with tags, negative prompt, one line of
    settings."""
    # Format what has several values.
    tags = "".join(f" <lora:{name}:{scale:g}>" for name, scale in params.adapters)
    hashes = ", ".join(f"{name}: {sha[:12]}" for name, sha in provenance.adapter_sha256)
    has_size = params.width_px and params.height_px
    version = dict(provenance.versions).get(PNG_KEY, "")

    # A1111's names, in its order; unknown values are left out.
    settings = {
        "Steps": params.steps,
        "Sampler": SCHEDULERS[params.scheduler].title if params.scheduler else "",
        "CFG scale": "" if params.guidance_scale is None else f"{params.guidance_scale:g}",
        "Seed": params.seed,
        "Size": f"{params.width_px}x{params.height_px}" if has_size else "",
        "Model": provenance.base,
        "Lora hashes": f'"{hashes}"' if hashes else "",
        "Version": f"{PNG_KEY} {version}".strip(),
    }
    line = ", ".join(f"{key}: {value}" for key, value in settings.items() if value != "")
    negative = f"\nNegative prompt: {params.negative_prompt}" if params.negative_prompt else ""
    return f"{params.prompt}{tags}{negative}\n{line}"


def check_size(params: GenerationParams, resolution_px: int) -> None:
    """Raise UserError for an image that is too large. `resolution_px` is the base's default
    side."""
    height = params.height_px or resolution_px
    width = params.width_px or resolution_px
    if height * width > MAX_AREA_RATIO * resolution_px**2:
        side = int(MAX_AREA_RATIO**0.5 * resolution_px)
        raise UserError(
            f"{width} x {height} px is too large for this base; "
            f"at most {side} x {side} px are allowed"
        )


def check_steps(params: GenerationParams) -> None:
    """Raise UserError for an image with too many steps."""
    if params.steps > MAX_STEPS:
        raise UserError(f"{params.steps} steps are too many; at most {MAX_STEPS} are allowed")


@dataclass(frozen=True)
class Step:
    """Event: one denoising step is done."""

    index: int  # of the image, from 0
    num_images: int
    step: int  # of `steps`, from 1
    steps: int
    eta_sec: float  # for all remaining images


@dataclass(frozen=True)
class Image:
    """Event: an image is finished."""

    index: int  # from 0
    pixels: PIL.Image.Image
    params: GenerationParams  # of this one image
    provenance: Provenance

    def save(self, path: str | Path) -> Path:
        Path(path).write_bytes(self.png())
        return Path(path)

    def png(self) -> bytes:
        """Return the bytes of the PNG, with the recipe."""
        text = PngInfo()
        for key, value in self.params.to_png_text(self.provenance).items():
            text.add_itxt(key, value)
        file = BytesIO()
        self.pixels.save(file, format="PNG", pnginfo=text)
        return file.getvalue()


def describe_black_images(images: Iterable[Image]) -> str:
    """Return how many are black and why, or "" for none: too large values give black images, not
    errors."""
    count = sum(image.pixels.getbbox() is None for image in images)
    if not count:
        return ""
    subject = "1 of them is" if count == 1 else f"{count} of them are"
    return (
        f"{subject} black: an adapter's values or its scale are too large for this base, or the "
        "base's safety checker took it for unsafe"
    )
