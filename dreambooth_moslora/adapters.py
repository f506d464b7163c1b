"""Adapter files: read any LoRA file (ours, diffusers', kohya's), check that it fits the base, put it into the pipeline.

file --read_adapter--> AdapterWeights --check_fits--> --install--> a PEFT adapter under its content's name
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dreambooth_moslora.adapter_file import AdapterFacts, component_tensors, read_raw
from dreambooth_moslora.base import architecture
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.proof import published_name

__all__ = ["AdapterWeights", "adapter_name", "check_fits", "find_weights", "install", "read_adapter"]

PUBLISHED_NAME, RAW_NAME = "pytorch_lora_weights.safetensors", "moslora_weights.safetensors"
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Cross-attention width of the UNet -> the family that has it."""
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA file's content in diffusers' naming. `sha256` is the file's; `tensors` keys start with a component."""

    file_name: str
    sha256: str
    tensors: dict[str, Tensor]
    network_alphas: dict[str, float] | None
    peft_metadata: dict | None
    header: dict[str, str]

    @property
    def key(self) -> str:
        """The name inside PEFT: by content, so that one file under two names is loaded once."""
        return f"sha_{self.sha256[:16]}"


def find_weights(path: str | Path) -> Path:
    """The safetensors file of an adapter: itself, the published one of a run, the raw one of a checkpoint.

    Raises UserError when there is none, and for any format that can carry code (pickles).
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / (PUBLISHED_NAME if (path / PUBLISHED_NAME).is_file() else RAW_NAME)
    if not path.is_file():
        raise UserError(f"there is no adapter file {path}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path.name} is not a .safetensors file; other formats can carry code and are not opened")
    return path


def adapter_name(path: str | Path) -> str:
    """`runs/dog` and the file in it are called "dog", its checkpoint "dog@500", and `cat.safetensors` "cat"."""
    file = find_weights(path)
    folder = file.parent.resolve()
    if file.name not in (PUBLISHED_NAME, RAW_NAME):
        return file.stem
    is_checkpoint = folder.name.startswith("checkpoint-")
    return f"{folder.parent.name}@{folder.name.removeprefix('checkpoint-')}" if is_checkpoint else folder.name


def read_adapter(path: str | Path, pipeline: StableDiffusionXLPipeline) -> AdapterWeights:
    """Raises UserError when the file is missing, is no safetensors file or holds no LoRA that we know."""
    file = find_weights(path)
    header, keys = _read_header(file)
    if "raw_format" in keys:
        weights = AdapterWeights(file.name, _sha256(file), fold_raw(file), None, None, header)
    else:
        weights = _read_published(file, header, pipeline)
    _check_content(weights)
    return weights


def fold_raw(file: Path) -> dict[str, Tensor]:
    """A checkpoint's A, M, B as a plain LoRA in diffusers' naming: down = A, up = s·B·M, alpha = rank."""
    tensors, facts = read_raw(file)
    folded: dict[str, Tensor] = {}
    for component in COMPONENTS:
        for path, parts in component_tensors(tensors, component).items():
            up = parts["lora_B"] @ parts["mixer"] if "mixer" in parts else parts["lora_B"]
            name = f"{component}.{published_name(component, path)[1]}"
            folded[f"{name}.lora_A.weight"] = parts["lora_A"]
            folded[f"{name}.lora_B.weight"] = up * _raw_scale(facts, f"{component}.{path}")
            if "magnitude" in parts:
                folded[f"{name}.lora_magnitude_vector.weight"] = parts["magnitude"]
    return folded


def _raw_scale(facts: AdapterFacts, path: str) -> float:
    """s = alpha / r, or alpha / sqrt(r) for rsLoRA."""
    rank, alpha = facts.ranks.get(path, facts.rank), facts.alphas.get(path, facts.alpha)
    return alpha / (rank**0.5 if facts.use_rslora else rank)


def _read_published(file: Path, header: dict[str, str], pipeline: StableDiffusionXLPipeline) -> AdapterWeights:
    try:
        tensors, alphas, metadata = pipeline.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            unet_config=pipeline.unet.config,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
    except (ValueError, KeyError, IndexError, AttributeError, OSError) as error:
        raise UserError(f"{file.name} is not a LoRA file that diffusers can read: {_one_line(error)}") from error
    return AdapterWeights(file.name, _sha256(file), tensors, alphas, metadata, header)


def check_fits(weights: AdapterWeights, pipeline: StableDiffusionXLPipeline, base_name: str) -> None:
    """Raises UserError that names both architectures when any projection has no place of its size in the base."""
    for component in COMPONENTS:
        model = getattr(pipeline, component, None)
        modules = dict(model.named_modules()) if model is not None else {}
        for path, (rank, inputs, outputs) in _projections(weights, component).items():
            module = modules.get(path, modules.get(path.removeprefix("text_model.")))  # transformers 5 has dropped it
            if inputs != _width(module, "in") or outputs != _width(module, "out"):
                raise UserError(
                    f"{weights.file_name} was made for another base: it is for {_describe_weights(weights)}, "
                    f"and {base_name} is {_describe_base(pipeline)} (first misfit: {component}.{path}, rank {rank})"
                )


def install(weights: AdapterWeights, pipeline: StableDiffusionXLPipeline) -> None:
    """Add the adapter to the pipeline's components, under `weights.key`."""
    options = {"adapter_name": weights.key, "metadata": weights.peft_metadata, "_pipeline": pipeline}
    present = {key.split(".", 1)[0] for key in weights.tensors}
    alphas = weights.network_alphas
    if "unet" in present:
        pipeline.load_lora_into_unet(weights.tensors, network_alphas=alphas, unet=pipeline.unet, **options)
    for component in set(COMPONENTS[1:]) & present:
        pipeline.load_lora_into_text_encoder(
            weights.tensors, alphas, getattr(pipeline, component), prefix=component, **options
        )


def _read_header(file: Path) -> tuple[dict[str, str], set[str]]:
    """The file's own metadata, and the names of its tensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {}), set(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file.name} is not a whole safetensors file: {_one_line(error)}") from error


def _check_content(weights: AdapterWeights) -> None:
    foreign = sorted({key.split(".", 1)[0] for key in weights.tensors} - set(COMPONENTS))
    if foreign or not weights.tensors:
        raise UserError(
            f"{weights.file_name} is not an adapter for an SDXL UNet: "
            + (f"it holds {foreign[0]!r:.60}" if foreign else "it is empty")
        )
    if not any(_projections(weights, component) for component in COMPONENTS):
        raise UserError(f"{weights.file_name} holds no LoRA projection")
    for key, tensor in weights.tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{weights.file_name} is broken: {key:.100} has NaN or infinite values")


def _projections(weights: AdapterWeights, component: str) -> dict[str, tuple[int, int, int]]:
    """Module path -> (rank, input width, output width) of one component's LoRA pairs."""
    prefix = f"{component}."
    part = {k.removeprefix(prefix): v for k, v in weights.tensors.items() if k.startswith(prefix)}
    if not part:
        return {}
    if not any(".lora_A." in key for key in part):
        convert = convert_unet_state_dict_to_peft if component == "unet" else convert_state_dict_to_peft
        part = {_plain(key): value for key, value in convert(part).items()}
    found = {}
    for key, down in part.items():
        path, is_down, _ = key.partition(".lora_A.")
        up = part.get(key.replace(".lora_A.", ".lora_B."))
        if is_down and (up is None or down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]):
            raise UserError(f"{weights.file_name} is broken: {path:.100} is half there")
        if is_down:
            found[path] = (down.shape[0], down.shape[1], up.shape[0])
    return found


def _plain(key: str) -> str:
    """Older diffusers files name the projections through `processor.to_q_lora`."""
    return re.sub(r"\.processor\.(to_\w+?)(\.0)?_lora\.", r".\1\2.", key)


def _width(module: nn.Module | None, side: str) -> int | None:
    """Input or output width of a linear or convolution layer, also when PEFT has wrapped it."""
    module = getattr(module, "base_layer", module)
    for name in (f"{side}_features", f"{side}_channels"):
        if hasattr(module, name):
            return getattr(module, name)
    return None


def _describe_weights(weights: AdapterWeights) -> str:
    projections = _projections(weights, "unet")
    cross = {inputs for path, (_, inputs, _) in projections.items() if path.endswith("attn2.to_k")}
    widths = {outputs for path, (_, _, outputs) in projections.items() if ".attn1." in path or ".attn2." in path}
    return _describe(max(cross, default=0), sorted(widths))


def _describe_base(pipeline: StableDiffusionXLPipeline) -> str:
    facts = architecture(pipeline.unet)
    return _describe(facts["cross_attention_dim"], sorted(_attention_widths(pipeline.unet)))


def _attention_widths(unet: nn.Module) -> set[int]:
    return {_width(module, "out") for name, module in unet.named_modules() if name.endswith("attn1.to_q")}


def _describe(cross: int, widths: list[int]) -> str:
    family = f"{FAMILIES[cross]}, " if cross in FAMILIES else ""
    seen = f"cross-attention width {cross}" if cross else "no cross-attention"
    return f"a UNet with {family}{seen}, attention widths {', '.join(map(str, widths)) or 'unknown'}"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
