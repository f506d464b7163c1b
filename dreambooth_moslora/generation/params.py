"""The parameters of a picture: schedulers, limits, and how a PNG carries its recipe. It needs no torch.

Every PNG has two text chunks: `parameters`, the text that A1111 and its relatives read, and
`dreambooth_moslora`, exact JSON: `GenerationParams.from_png(path)` gives the same picture again. What other programs
write, A1111's text in PNG chunks or EXIF and ComfyUI's graph, is only read, and pixels are never decoded.
"""

import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.families import TEXT_OPTIONS
from dreambooth_moslora.settings.table import TrainConfig

PNG_KEY = "dreambooth_moslora"
FORMAT_VERSION = 1
MAX_SEED = 2**32 - 1
SIZE_STEP_PX = 8
LIMITS = {"seed": (0, MAX_SEED), "steps": (1, 200), "guidance_scale": (0.0, 50.0), "num_images": (1, 64)}
LIMITS |= {"height_px": (SIZE_STEP_PX, 4096), "width_px": (SIZE_STEP_PX, 4096)}
MAX_PROMPT_CHARACTERS = 5000
MAX_ADAPTERS = 8
LORA_TAG = re.compile(r"<lora:([^<>]{1,200})>")
TWO_SCALES = re.compile(r"<lora:([^:<>]+):([^:<>]+):([^:<>]+)>")  # A1111's: the text encoders' and the UNet's
NEGATIVE = re.compile(r"(?:^|\n)Negative prompt:")
SETTING = re.compile(r'([\w+/-][\w +/-]{0,60}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
MAX_SETTINGS_CHARACTERS = 10_000  # Of another program's settings: bounds the regex on hostile text
EXIF_IFD, USER_COMMENT, MAKE, MODEL = 0x8769, 0x9286, 0x010F, 0x0110
MAX_EXIF_BYTES = 4 * 1024**2
ENCODINGS = {b"ASCII\0\0\0": ("utf-8",), b"UNICODE\0": ("utf-16-be", "utf-16-le"), b"\0" * 8: ("utf-8",)}
"""Of EXIF's UserComment, by its first eight bytes. The order of UTF-16's bytes is not said: the first that gives the
word "Steps:" is taken."""
SAMPLERS = {"euler": "Euler", "euler_ancestral": "Euler a", "dpmpp_2m": "DPM++ 2M", "uni_pc": "UniPC"}
SAMPLERS |= {"dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_2m_sde_gpu": "DPM++ 2M SDE"}
"""ComfyUI's name -> A1111's."""
DENOISING = "Denoising strength"  # A1111's name of what ComfyUI calls denoise
MAX_NODES = 64  # On the way from the sampler to its model, or to a text
MAX_STEPS = 100  # Most steps on a machine that draws for many users: more would block the queue
MAX_AREA = 4  # Largest area relative to the base's own: larger pictures take much longer and repeat themselves


@dataclass(frozen=True)
class Scheduler:
    title: str  # in other programs ("Sampler" in A1111)
    class_name: str  # of diffusers
    options: Mapping[str, Any] = field(default_factory=dict)


KARRAS = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}
KARRAS |= {"use_exponential_sigmas": False, "use_beta_sigmas": False}
SCHEDULERS = {
    "euler": Scheduler("Euler", "EulerDiscreteScheduler"),
    "dpmpp_2m_karras": Scheduler("DPM++ 2M Karras", "DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde_karras": Scheduler(
        "DPM++ 2M SDE Karras",
        "DPMSolverMultistepScheduler",
        KARRAS | {"algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": Scheduler("UniPC", "UniPCMultistepScheduler"),
}
"""Schedulers by this program's names. One seed decides all noise of a picture, also that which DPM++ 2M SDE adds
after each step, so that later steps correct what earlier ones did."""


@dataclass(frozen=True)
class Provenance:
    """The files and programs that made a picture, without paths and facts about photos or the machine."""

    base: str = ""
    adapter_sha256: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class GenerationParams:
    """Everything that decides the pixels, given base and adapters. Sizes are px; None means the base's own, also for
    guidance and scheduler. Image i has the seed `seed + i`, whatever `num_images` is. `text_options` are settings of
    training, such as max_sequence_length: without them those of the adapters' runs are taken; an empty one is the
    base's own. Raises UserError on a value that cannot be generated."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance_scale: float | None = None
    height_px: int | None = None
    width_px: int | None = None
    num_images: int = 1
    adapters: tuple[tuple[str, float], ...] = field(default=())
    scheduler: str | None = None
    text_options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(text := getattr(self, name), str):
                raise UserError(f"{name} must be text, not {type(text).__name__}")
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise UserError(f"{name} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed")
            check_characters(text, name)
        if not self.prompt.strip():
            raise UserError("the prompt is empty; write what the picture should show")
        for name, (low, high) in LIMITS.items():
            _check_number(name, getattr(self, name), low, high, whole=name != "guidance_scale")
        for name in ("height_px", "width_px"):
            if (size := getattr(self, name)) is not None and size % SIZE_STEP_PX:
                raise UserError(f"{name} is {size}; it must be a multiple of {SIZE_STEP_PX}")
        if self.scheduler is not None and (not isinstance(self.scheduler, str) or self.scheduler not in SCHEDULERS):
            raise UserError(f"scheduler {self.scheduler!r:.60} is unknown; choose one of {', '.join(SCHEDULERS)}")
        object.__setattr__(self, "adapters", _checked_adapters(self.adapters))
        object.__setattr__(self, "text_options", _checked_text_options(self.text_options))

    def for_image(self, index: int) -> "GenerationParams":
        """The parameters of image `index` alone, for its PNG."""
        return replace(self, seed=(self.seed + index) % (MAX_SEED + 1), num_images=1)

    def apply_tags(self) -> "GenerationParams":
        """Turn `<lora:name:0.8>` in the prompt into an adapter; a tag overrides the scale chosen elsewhere."""
        prompt, tags = split_lora_tags(self.prompt)
        adapters = tuple((dict(self.adapters) | dict(tags)).items())
        return replace(self, prompt=prompt, adapters=adapters) if tags else self

    def to_dict(self) -> dict[str, Any]:
        """Leaves out `text_options` when there are none, so that other pictures keep their bytes."""
        shown = asdict(self) | {"adapters": [list(pair) for pair in self.adapters]}
        options = dict(shown.pop("text_options"))
        return shown | ({"text_options": options} if options else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationParams":
        """Raises UserError for an unknown name or a value of the wrong type: anyone may have written the PNG."""
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise UserError(f"unknown generation parameter {unknown[0]!r}")
        if "prompt" not in values:
            raise UserError("the recipe has no prompt")
        return cls(**values)

    def to_png_text(self, provenance: Provenance | None = None) -> dict[str, str]:
        """Text chunks for the PNG of this one image: key -> text."""
        provenance = provenance or Provenance()
        recipe = {
            "format": FORMAT_VERSION,
            "params": self.to_dict(),
            "base": provenance.base,
            "adapter_sha256": dict(provenance.adapter_sha256),
            "versions": dict(provenance.versions),
        }
        return {"parameters": _a1111_text(self, provenance), PNG_KEY: json.dumps(recipe, ensure_ascii=False)}

    @classmethod
    def from_png(cls, path: str | Path) -> "GenerationParams":
        """The parameters in a PNG of this or an A1111-style program. Raises UserError when it has none."""
        return read_recipe(path).params


@dataclass(frozen=True)
class Recipe:
    params: GenerationParams
    provenance: Provenance
    exact: bool  # it is ours
    remarks: tuple[str, ...] = ()  # what another program's asks for and is not here


def draw_seed(seed: int) -> int:
    """`seed` itself, or a random one if it is negative."""
    return secrets.randbelow(2**31) if seed < 0 else int(seed)


def split_lora_tags(prompt: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """ "a dog <lora:rex:0.8>" -> ("a dog", (("rex", 0.8),)). A tag without a number means 1; equal names add up. Raises
    UserError for a tag that is not read."""
    tags = added(map(tag_of, LORA_TAG.findall(prompt)))
    return (re.sub(r"\s{2,}", " ", LORA_TAG.sub("", prompt)).strip(), tags) if tags else (prompt, ())


def tag_of(text: str) -> tuple[str, float]:
    """ "rex:0.8" -> ("rex", 0.8); two equal scales, the text encoders' and the UNet's, are one. Raises UserError."""
    name, *scales = text.split(":")
    try:
        (scale,) = set(map(float, scales)) or {1.0}
    except ValueError:
        raise UserError(f"<lora:{text:.100}> is not read here: write <lora:NAME:SCALE> with one number") from None
    return name.strip(), scale


def added(pairs: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Each name once, with the sum of its scales."""
    total: dict[str, float] = {}
    for name, scale in pairs:
        total[name] = total.get(name, 0.0) + scale
    return tuple(total.items())


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a PNG, JPEG or WebP; pixels are not decoded. Raises UserError for a file without one."""
    return recipe_in(texts_in(Path(path)), Path(path).name)


def recipe_in(text: Mapping[str, str], name: str) -> Recipe:
    """The recipe in the texts of the picture `name`. Raises UserError when they hold no parameters."""
    if PNG_KEY in text:
        return _own_recipe(text[PNG_KEY])
    if "parameters" in text:
        return _parse_a1111(text["parameters"])
    if "prompt" in text:
        found = values_of_graph(text["prompt"])
        tags = _checked_adapters(added(found["loras"]))
        return _foreign_recipe(found["prompt"], found["negative"], tags, found)
    raise UserError(f"{name} carries no generation parameters; was it saved again by another program?")


def texts_in(path: Path) -> dict[str, str]:
    """Name -> text of a PNG's chunks; of a JPEG or WebP `parameters` (A1111's) and `prompt` (ComfyUI's), if they are
    there. Raises UserError for any other file, and for a damaged one."""
    try:
        with path.open("rb") as file:
            is_webp = (start := file.read(12))[:4] == b"RIFF" and start[8:] == b"WEBP"
        if is_webp:  # Pillow would make room for all pixels
            return texts_in_exif(exif_of_webp(path))
        with PIL.Image.open(path, formats=["PNG", "JPEG"]) as image:
            if image.format == "PNG":
                return {key: value for key, value in image.info.items() if isinstance(value, str)}
            return texts_in_exif(image.info.get("exif", b""))
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{path.name} claims far too many pixels; it is not opened") from error
    except FileNotFoundError:
        raise UserError(f"{path.name}: there is no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path.name} is not a readable PNG, JPEG or WebP file") from error


def exif_of_webp(path: Path) -> bytes:
    """The content of its EXIF chunk; empty without one."""
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"EXIF":
                return file.read(min(size, MAX_EXIF_BYTES))
            file.seek(size + size % 2, 1)
    return b""


def texts_in_exif(content: bytes) -> dict[str, str]:
    """Raises UserError for EXIF that is damaged."""
    exif = PIL.Image.Exif()
    try:
        exif.load(content)
        comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
        words = [exif.get(tag) for tag in (MAKE, MODEL)]
    except Exception as error:  # Pillow's readers of hostile EXIF raise errors of all kinds
        raise UserError("the EXIF of the picture is damaged") from error
    found = {"parameters": comment_text(comment)} if isinstance(comment, bytes | str) and comment else {}
    named = [word.partition(":") for word in words if isinstance(word, str)]
    return found | {name: text for name, colon, text in named if colon and name in ("prompt", "workflow")}


def comment_text(comment: bytes | str) -> str:
    """The text of an EXIF comment; "" for an encoding that is not known."""
    if isinstance(comment, str):
        return comment
    texts = [comment[8:].decode(name, "replace") for name in ENCODINGS.get(comment[:8], ())]
    return next((text for text in texts if "Steps:" in text), texts[0] if texts else "").rstrip("\0")


def values_of_graph(text: str) -> dict[str, Any]:
    """What ComfyUI's graph says of the picture, in the words of A1111's line of settings, with `prompt`, `negative` and
    `loras`. Raises UserError for a graph without a sampler, or a damaged one."""
    try:
        graph = json.loads(text)
        inputs = [node["inputs"] for node in graph.values() if isinstance(node.get("inputs"), dict)]
        sampler = next(one for one in inputs if one.keys() >= {"seed", "cfg", "positive"})
        return dict(values_of_sampler(graph, sampler))
    except UserError:
        raise
    except StopIteration:
        raise UserError("the picture's graph has no sampler that is known, so its settings cannot be read") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError("the graph inside the picture is damaged") from error


def values_of_sampler(graph: Mapping[str, Any], sampler: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "prompt", text_at(graph, sampler.get("positive"))
    yield "negative", text_at(graph, sampler.get("negative"))
    yield "loras", tuple(loras_before(graph, sampler.get("model")))
    for name, key in (("Seed", "seed"), ("Steps", "steps"), ("CFG scale", "cfg")):
        if not isinstance(sampler.get(key), list):  # else it comes from another node
            yield name, str(sampler[key])
    if not isinstance(denoise := sampler.get("denoise", 1), list):
        yield DENOISING, str(denoise)
    name, schedule = str(sampler.get("sampler_name", "")), str(sampler.get("scheduler", "normal"))
    yield "Sampler", SAMPLERS.get(name, name)
    yield "Schedule type", "" if schedule == "normal" else schedule.capitalize()
    size = node_at(graph, sampler.get("latent_image"))
    if isinstance(size.get("width"), int) and isinstance(size.get("height"), int):
        yield "Size", f"{size['width']}x{size['height']}"


def node_at(graph: Mapping[str, Any], link: Any) -> Mapping[str, Any]:
    """The inputs of the node that a link ["number", output] names; {} for none."""
    node = graph.get(str(link[0])) if isinstance(link, list) and link else None
    return node["inputs"] if node else {}


def text_at(graph: Mapping[str, Any], link: Any) -> str:
    """The text of the encoder that a link names, which may be a link itself; "" for none."""
    for _ in range(MAX_NODES):
        found = node_at(graph, link)
        link = next((found[key] for key in ("text", "text_g", "string", "value") if key in found), "")
        if isinstance(link, str):
            return link
    return ""


def loras_before(graph: Mapping[str, Any], link: Any) -> Iterator[tuple[str, float]]:
    """(name, strength) of the LoRA loaders on the way to the model, rgthree's of several too. Raises UserError."""
    for _ in range(MAX_NODES):
        found = node_at(graph, link)
        several = [one for one in found.values() if isinstance(one, dict) and one.get("on")]
        loaded = [(one["lora"], one["strength"]) for one in several if one.get("lora") not in (None, "None")]
        with suppress(KeyError):
            loaded.append((found["lora_name"], found["strength_model"]))
        for file, strength in loaded:
            name = Path(file.replace("\\", "/")).stem
            if isinstance(strength, list) and (strength := node_at(graph, strength).get("value")) is None:
                raise UserError(f"the picture's graph computes the strength of {name!r:.60}, which is not read here")
            yield name, float(strength)
        link = found.get("model")


def _own_recipe(text: str) -> Recipe:
    try:
        recipe = json.loads(text)
        json.dumps(recipe, ensure_ascii=False).encode("utf-8")  # a name may hold half a surrogate pair
        parts = [(recipe.get(key) or {}).items() for key in ("adapter_sha256", "versions")]
        pairs = [tuple((str(name), str(value)) for name, value in part) for part in parts]
        provenance = Provenance(str(recipe.get("base", "")), *pairs)
        return Recipe(GenerationParams.from_dict(recipe["params"]), provenance, exact=True)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError("the recipe inside the PNG is damaged") from error


def check_characters(text: str, name: str) -> None:
    """Raises UserError for half a surrogate pair: JSON can hold it, but files, pages and tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds {text[error.start]!r}, which is not a character; remove it") from error


def _check_number(name: str, value: Any, low: float, high: float, *, whole: bool) -> None:
    if value is None and name in ("guidance_scale", "height_px", "width_px"):
        return
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r:.40}")
    if not low <= value <= high:
        raise UserError(f"{name} is {value}; it must lie between {low} and {high}")


def _checked_adapters(adapters: Any) -> tuple[tuple[str, float], ...]:
    try:
        pairs = tuple((name, float(scale)) for name, scale in adapters)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"adapters must be pairs of name and scale, not {adapters!r:.60}") from error
    if len(pairs) > MAX_ADAPTERS:
        raise UserError(f"{len(pairs)} adapters are too many; at most {MAX_ADAPTERS} can be combined")
    for name, scale in pairs:
        if not isinstance(name, str) or not name or not abs(scale) <= 10:
            raise UserError(f"adapter {name!r:.60} with scale {scale} is not usable; scales lie between -10 and 10")
    if len(dict(pairs)) != len(pairs):
        raise UserError("an adapter is named twice; give each one scale")
    return pairs


def _checked_text_options(options: Any) -> tuple[tuple[str, Any], ...]:
    """Names and values, as `TrainConfig` has them."""
    try:
        options = dict(options)
    except (TypeError, ValueError) as error:
        raise UserError(f"text_options must be names with values, not {options!r:.60}") from error
    for name, value in options.items():
        if name not in TEXT_OPTIONS:
            raise UserError(f"the text option {name!r:.60} is unknown; there are {', '.join(TEXT_OPTIONS)}")
        if len(str(value)) > MAX_PROMPT_CHARACTERS:
            raise UserError(f"{name} is longer than {MAX_PROMPT_CHARACTERS} characters")
        check_characters(str(value), name)
    config = TrainConfig.from_dict(options)
    return tuple((name, getattr(config, name)) for name in options)


def _a1111_text(params: GenerationParams, provenance: Provenance) -> str:
    """The text for other programs: prompt with tags, negative prompt, one line of settings."""
    tags = "".join(f" <lora:{name}:{scale:g}>" for name, scale in params.adapters)
    hashes = ", ".join(f"{name}: {sha[:12]}" for name, sha in provenance.adapter_sha256)
    settings = {
        "Steps": params.steps,
        "Sampler": SCHEDULERS[params.scheduler].title if params.scheduler else "",
        "CFG scale": "" if params.guidance_scale is None else f"{params.guidance_scale:g}",
        "Seed": params.seed,
        "Size": f"{params.width_px}x{params.height_px}" if params.width_px and params.height_px else "",
        "Model": provenance.base,
        "Lora hashes": f'"{hashes}"' if hashes else "",
        "Version": f"{PNG_KEY} {dict(provenance.versions).get(PNG_KEY, '')}".strip(),
    }
    line = ", ".join(f"{key}: {value}" for key, value in settings.items() if value != "")
    negative = f"\nNegative prompt: {params.negative_prompt}" if params.negative_prompt else ""
    return f"{params.prompt}{tags}{negative}\n{line}"


def _parse_a1111(text: str) -> Recipe:
    """Prompt, negative prompt, tags and the known settings; others stay at their defaults."""
    body, _, line = text.strip().rpartition("\n")
    if "Steps:" not in line:
        body, line = text, ""
    prompt, negative, *_ = [*NEGATIVE.split(body, maxsplit=1), ""]
    settings = {key.strip(): value.strip().strip('"') for key, value in SETTING.findall(line[:MAX_SETTINGS_CHARACTERS])}
    apart = [tag[0] for tag in TWO_SCALES.finditer(prompt) if tag[2].strip() != tag[3].strip()]
    prompt, tags = split_lora_tags(TWO_SCALES.sub(r"<lora:\1:\3>", prompt).strip())
    recipe = _foreign_recipe(prompt, negative, tags, settings)
    said = tuple(f"{tag} has two scales; the UNet's replaces the text encoders'" for tag in apart)
    return replace(recipe, remarks=recipe.remarks + said)


def _foreign_recipe(
    prompt: str, negative: str, tags: tuple[tuple[str, float], ...], settings: Mapping[str, str]
) -> Recipe:
    """The recipe of another program's words; `settings` as A1111 writes them. Raises UserError."""
    sampler = _sampler_of(settings)
    name = _nearest_scheduler(sampler) if sampler else None
    values = {"prompt": prompt, "negative_prompt": negative.strip(), "adapters": tags, "scheduler": name}
    names = {"Steps": ("steps", int), "Seed": ("seed", int), "CFG scale": ("guidance_scale", float)}
    try:
        for key, (own, kind) in names.items():
            if key in settings:
                values[own] = kind(settings[key])
        if "Size" in settings:
            values["width_px"], values["height_px"] = (int(n) for n in settings["Size"].split("x"))
        began_elsewhere = float(settings.get(DENOISING, 1)) < 1
    except ValueError as error:
        raise UserError("the settings inside the picture are damaged") from error
    ours = SCHEDULERS[name].title if name else ""
    remarks = () if sampler == ours else (f"the sampler {sampler} is not available; {ours} replaces it",)
    if (seed := values.get("seed", 0)) > MAX_SEED:  # ComfyUI's have up to 64 bits
        values["seed"] = seed % (MAX_SEED + 1)
        remarks += (f"the seed {seed} is beyond {MAX_SEED}; {values['seed']} replaces it",)
    if began_elsewhere:
        strength = f"{DENOISING.lower()} {settings[DENOISING]}"
        remarks += (f"it was made from another picture, or a smaller one ({strength}); here it begins at noise",)
    return Recipe(GenerationParams.from_dict(values), Provenance(), exact=False, remarks=remarks)


def _sampler_of(settings: Mapping[str, str]) -> str:
    """The sampler with its schedule, in older programs' form; "Automatic" is the sampler's own schedule."""
    sampler, schedule = settings.get("Sampler", ""), settings.get("Schedule type", "")
    if schedule == "Automatic":
        schedule = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential"}.get(sampler, "")
    return f"{sampler} {schedule}".strip()


def _nearest_scheduler(sampler: str) -> str:
    """That of the sampler, with whatever schedule: of the longest title that its own begins with; else Euler."""
    solvers = {known.title.removesuffix(" Karras"): name for name, known in SCHEDULERS.items()}
    near = [title for title in solvers if f"{sampler} ".startswith(f"{title} ")]
    return solvers[max(near, key=len)] if near else "euler"


def check_size(params: GenerationParams, resolution_px: int) -> None:
    """Raises UserError for a picture that is too large. `resolution_px` is the base's own side."""
    height, width = params.height_px or resolution_px, params.width_px or resolution_px
    if height * width > MAX_AREA * resolution_px**2:
        side = int(MAX_AREA**0.5 * resolution_px)
        raise UserError(f"{width} x {height} px is too large for this base; at most {side} x {side} px are drawn")


def check_steps(params: GenerationParams) -> None:
    """Raises UserError for a picture with too many steps."""
    if params.steps > MAX_STEPS:
        raise UserError(f"{params.steps} steps are too many; at most {MAX_STEPS} are drawn")


@dataclass(frozen=True)
class Step:
    index: int
    num_images: int
    step: int  # of `steps`, from 1
    steps: int
    eta_sec: float  # for all remaining images


@dataclass(frozen=True)
class Image:
    index: int
    pixels: PIL.Image.Image
    params: GenerationParams  # of this one image
    provenance: Provenance
    is_censored: bool = False  # blackened by the base's safety checker

    def save(self, path: str | Path) -> Path:
        Path(path).write_bytes(self.png())
        return Path(path)

    def png(self) -> bytes:
        file = BytesIO()
        self.pixels.save(file, format="PNG", pnginfo=recipe_text(self.params, self.provenance))
        return file.getvalue()


TOO_LARGE = "an adapter's values or its scale are too large for this base"
CENSORED = "the base's safety checker blackens what it takes for unsafe; try another seed or prompt"


def about_black(pictures: Iterable[Image]) -> str:
    """How many are black and why, "" for none: too large values give black pictures, not errors."""
    black = Counter(CENSORED if one.is_censored else TOO_LARGE for one in pictures if one.pixels.getbbox() is None)
    which = {why: "1 of them is" if count == 1 else f"{count} of them are" for why, count in black.items()}
    return "; ".join(f"{these} black: {why}" for why, these in which.items())


def recipe_text(params: GenerationParams, provenance: Provenance) -> PngInfo:
    text = PngInfo()
    for key, value in params.to_png_text(provenance).items():
        text.add_itxt(key, value)
    return text
