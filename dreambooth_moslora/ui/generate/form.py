"""The generation form as a value: the widgets' values under the API's names, to GenerationParams and back."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.adapter_files import NONE
from dreambooth_moslora.generation.limits import MAX_STEPS
from dreambooth_moslora.generation.params import GenerationParams, draw_seed

__all__ = ["MAX_IMAGES", "NONE", "RANGES", "GenerateForm", "code_snippet", "size_choices"]

MAX_IMAGES = 8
RANGES = {"steps": (1, MAX_STEPS), "guidance_scale": (0, 30), "scale": (-2, 2)}
"""Ranges of the sliders, narrower than a program's, so that usual values are easy to set."""
RATIOS = {"Square": (1, 1), "Portrait": (7 / 8, 9 / 8), "Tall": (13 / 16, 19 / 16)}


@dataclass(frozen=True)
class GenerateForm:
    """The fields have the names and order of the API's arguments. `size` is "width x height" px."""

    prompt: str = ""
    negative_prompt: str = ""
    adapter: str = NONE
    scale: float = 1.0
    adapter_2: str = NONE
    scale_2: float = 1.0
    adapter_3: str = NONE
    scale_3: float = 1.0
    seed: int = -1
    steps: int = 25
    guidance_scale: float | None = None
    size: str = ""
    num_images: int = 1
    scheduler: str = "euler"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "GenerateForm":
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def params(self) -> GenerationParams:
        """The parameters; a negative or empty seed is drawn here. Raises UserError for values that cannot be
        generated."""
        width, height = parse_size(self.size)
        for name in ("adapter", "adapter_2", "adapter_3", "scheduler"):
            if not isinstance(word := getattr(self, name) or "", str):
                raise UserError(f"{name} must be a name, not {word!r:.30}")
        if not 1 <= _whole(self.num_images, "images") <= MAX_IMAGES:
            raise UserError(f"{self.num_images} images were requested; the page makes 1 to {MAX_IMAGES} at a time")
        return GenerationParams(
            prompt=str(self.prompt or ""),
            negative_prompt=str(self.negative_prompt or ""),
            seed=draw_seed(-1 if self.seed is None else _whole(self.seed, "seed")),
            steps=_whole(self.steps, "steps"),
            guidance_scale=self.guidance_scale,
            height_px=height,
            width_px=width,
            num_images=_whole(self.num_images, "images"),
            adapters=self._adapters(),
            scheduler=str(self.scheduler or ""),
        )

    def _adapters(self) -> tuple[tuple[str, float], ...]:
        slots = ((self.adapter, self.scale), (self.adapter_2, self.scale_2), (self.adapter_3, self.scale_3))
        return tuple((name, scale) for name, scale in slots if name and name != NONE)

    @classmethod
    def from_params(cls, params: GenerationParams) -> "GenerateForm":
        """The form that gives these parameters again. Adapters beyond the third become tags in the prompt."""
        slots = {}
        for number, (name, scale) in enumerate(params.adapters[:3]):
            suffix = f"_{number + 1}" if number else ""
            slots |= {f"adapter{suffix}": name, f"scale{suffix}": scale}
        tags = "".join(f" <lora:{name}:{scale:g}>" for name, scale in params.adapters[3:])
        return cls(
            prompt=params.prompt + tags,
            negative_prompt=params.negative_prompt,
            seed=params.seed,
            steps=params.steps,
            guidance_scale=params.guidance_scale,
            size=format_size(params.width_px, params.height_px),
            num_images=min(params.num_images, MAX_IMAGES),
            scheduler=params.scheduler,
            **slots,
        )


def format_size(width: int | None, height: int | None) -> str:
    return f"{width} x {height}" if width and height else ""


def parse_size(text: str) -> tuple[int | None, int | None]:
    """ "832 x 1216" -> (832, 1216); empty -> the base's own size. Raises UserError."""
    if text is None or text == "" or (isinstance(text, str) and not text.strip()):
        return None, None
    try:
        width, height = (int(part) for part in text.lower().replace("×", "x").split("x"))
    except (ValueError, AttributeError) as error:  # a program may send anything but text
        raise UserError(f"the size {text!r:.30} is not understood; write it like 832 x 1216") from error
    return width, height


def size_choices(resolution_px: int) -> list[tuple[str, str]]:
    """(label, value) of the presets around a base's own resolution, all multiples of 8 px."""
    choices = []
    for name, (w, h) in RATIOS.items():
        width, height = (round(resolution_px * ratio / 8) * 8 for ratio in (w, h))
        choices.append((f"{name} {width} × {height}", format_size(width, height)))
        if width != height:
            wide = "Landscape" if name == "Portrait" else "Wide"
            choices.append((f"{wide} {height} × {width}", format_size(height, width)))
    return choices


def _whole(value: Any, name: str) -> int:
    """An integer: browsers send 7.0 for 7, and a client may send NaN. Raises UserError."""
    is_whole = value.is_integer() if isinstance(value, float) else isinstance(value, int)
    if isinstance(value, bool) or not is_whole:
        raise UserError(f"{name} must be a whole number, not {value!r:.30}")
    return int(value)


def code_snippet(params: GenerationParams, base: str, adapter_files: Mapping[str, str]) -> str:
    """Python that makes the same pictures. `adapter_files` gives the file name of each adapter."""
    loads = "".join(
        f"pipeline.load_adapter({adapter_files.get(name, name + '.safetensors')!r}, name={name!r})\n"
        for name, _ in params.adapters
    )
    shown = {key: value for key, value in params.to_dict().items() if value != _default(key)}
    shown["adapters"] = params.adapters
    arguments = "".join(f"    {key}={value!r},\n" for key, value in shown.items() if value != ())
    return (
        "from dreambooth_moslora import GenerationParams, SubjectPipeline\n\n"
        f"pipeline = SubjectPipeline.from_base({base!r})\n{loads}"
        f"params = GenerationParams(\n{arguments})\n"
        "for event in pipeline.generate(params):\n"
        '    if hasattr(event, "save"):\n'
        '        event.save(f"image_{event.params.seed}.png")\n'
    )


def _default(name: str) -> Any:
    return next(field.default for field in fields(GenerationParams) if field.name == name)
