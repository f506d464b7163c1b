"""Export of an adapter to files for diffusers and for other programs.

A published adapter is always folded: ΔW = up·down with the scale included and alpha = rank. Such a
file is correct without metadata, in any version of diffusers and in kohya's form.

    live adapter --fold--> LowRank --publish-->

        pytorch_lora_weights.safetensors    for diffusers
        <name>.kohya.safetensors            for other programs

    live adapter --save_raw--> moslora_weights.safetensors --load_raw--> the same, bit for bit

A file is published only after a stock loader has read it back and computed the same (`verify`).
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dreambooth_moslora.disk.atomic import make_scratch_directory
from dreambooth_moslora.disk.run_folder import KOHYA_SUFFIX, PUBLISHED_NAME, check_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import key_names, safetensors_file
from dreambooth_moslora.lora.key_names import PEFT_KEYS, format_key
from dreambooth_moslora.lora.lora_settings import PEFT_SETTINGS_KEY
from dreambooth_moslora.lora.metadata import AdapterMetadata, get_dora_note, get_most_common
from dreambooth_moslora.lora.verify import MAX_DIFFERENCES, FileProof, Proof, verify_file
from dreambooth_moslora.method import moslora
from dreambooth_moslora.method.mixer import Components, Folded, LowRank, Tensors
from dreambooth_moslora.settings.family_facts import DENOISERS, FamilyFacts

FILE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Value of the setting -> dtype of a published file."""


def publish(
    components: Components,
    out_dir: str | Path,
    name: str,
    metadata: AdapterMetadata,
    dtype: torch.dtype = torch.float32,
    *,
    adapter_name: str = "default",
) -> Proof:
    """Write both published files, or neither: each is verified first.

    components: the models that the live adapter is on
    out_dir: folder of the files
    name: beginning of the files' names
    metadata: for their headers
    dtype: of the files
    adapter_name: of the adapter in the models

    Raises UserError for a difference beyond the dtype's bound, and for NaN.
    """
    check_name(name)

    # Fold into a plain LoRA, under the paths that other programs know.
    folded = {
        component: {
            key_names.get_published_path(component, path): layer
            for path, layer in moslora.fold(model, adapter_name).items()
        }
        for component, model in components.items()
    }

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with make_scratch_directory(out_dir) as scratch:
        # Write to a scratch folder, and let a stock loader read each file.
        written = write_published(folded, folder=scratch, name=name, metadata=metadata, dtype=dtype)
        proofs = [verify_file(path, components, adapter_name) for path in written]

        # `not … <=` also refuses NaN.
        for proof in proofs:
            if not proof.largest <= MAX_DIFFERENCES[dtype]:
                raise UserError(
                    f"{proof.file} was not published: reloaded by {proof.loader} it differs "
                    f"from the live adapter by {proof.largest:.2e} (relative, worst in "
                    f"{proof.worst}), and {dtype} explains at most {MAX_DIFFERENCES[dtype]:.0e}"
                )

        # All files are correct: move them to the output folder.
        for path in written:
            path.replace(out_dir / path.name)
    return build_proof(tuple(proofs), dtype, folded)


def write_published(
    folded: Folded,
    folder: Path,
    name: str,
    metadata: AdapterMetadata,
    dtype: torch.dtype,
) -> list[Path]:
    """Write diffusers' file, and for a UNet a file in kohya's names, which ComfyUI needs.

    folded: the plain LoRA
    folder: of the files
    name: of the adapter, for kohya's file
    metadata: of the adapter; its ranks and alphas are replaced by those of the folded adapter
    dtype: of the files

    Returns the paths of the files. Raises UserError for NaN and infinity.
    """
    # The scale is in `up`, so alpha is the rank.
    ranks = {
        f"{component}.{path}": layer.rank
        for component, layers in folded.items()
        for path, layer in layers.items()
    }
    rank = get_most_common(ranks.values())
    ranks = {path: layer_rank for path, layer_rank in ranks.items() if layer_rank != rank}
    metadata = replace(metadata, rank=rank, alpha=rank, ranks=ranks, alphas=ranks, use_rslora=False)

    if dtype == torch.float16:
        folded = map_layers(folded, normalize_factors)

    # diffusers' file. The loader of a transformer needs PEFT's settings in the header too.
    header = {"format": "pt"} | replace(metadata, structures={}).header
    padded = pad_ranks(folded)
    head = dict(header)
    if "unet" not in folded:
        head[PEFT_SETTINGS_KEY] = json.dumps(build_peft_settings(padded), indent=2, sort_keys=True)
    tensors = build_published_tensors(padded, dtype, metadata.family)
    files = [(folder / PUBLISHED_NAME, tensors, head)]

    # kohya's file, only for a UNet
    if "unet" in folded:
        path = folder / f"{name}{KOHYA_SUFFIX}"
        head = header | key_names.build_kohya_header(name, metadata, folded)
        files.append((path, key_names.build_kohya_tensors(folded, dtype), head))

    # Rounding to the dtype may have made infinities.
    for path, tensors, head in files:
        safetensors_file.check_finite(tensors, f"the adapter in {dtype}")
        safetensors_file.write_safetensors(path, tensors, head)
    return [path for path, _, _ in files]


def map_layers(folded: Folded, change: Callable[[LowRank], LowRank]) -> Folded:
    """Return the adapter with each layer changed."""
    return {
        component: {path: change(layer) for path, layer in layers.items()}
        for component, layers in folded.items()
    }


def build_peft_settings(folded: Folded) -> dict[str, object]:
    """Return `component.name` -> setting of PEFT's LoraConfig, for layers of one rank.

    Alpha is the rank, as the scale is in `up`. Paths have no `text_model.`, as in new versions of
    transformers.
    """
    settings: dict[str, object] = {}
    for component, layers in folded.items():
        rank = next(iter(layers.values())).rank
        component_settings = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": sorted(path.removeprefix("text_model.") for path in layers),
            "use_dora": any(layer.magnitude is not None for layer in layers.values()),
            "use_rslora": False,
            "lora_bias": False,
        }
        settings |= {f"{component}.{name}": value for name, value in component_settings.items()}
    return settings


def build_published_tensors(folded: Folded, dtype: torch.dtype, facts: FamilyFacts) -> Tensors:
    """Return the tensors under PEFT's keys, which diffusers reads since 0.22.

    The family's `facts` name the layers.
    DoRA's magnitudes stay in fp32.
    """
    tensors = {}
    for component, layers in folded.items():
        for path, layer in layers.items():
            name = key_names.format_published_name(component, path, facts)
            tensors[format_key(PEFT_KEYS, name, "down")] = layer.down.to(dtype)
            tensors[format_key(PEFT_KEYS, name, "up")] = layer.up.to(dtype)
            if layer.magnitude is not None:
                # For a UNet every version of diffusers adds `.weight`, and old ones need that; the
                # loader of transformers does not add it.
                suffix = "" if component in DENOISERS else ".weight"
                tensors[format_key(PEFT_KEYS, name, "magnitude") + suffix] = layer.magnitude
    return tensors


def pad_ranks(folded: Folded) -> Folded:
    """Pad all projections with zeros to the file's largest rank: old versions of diffusers use one
    alpha for all ranks."""
    rank = max(layer.rank for layers in folded.values() for layer in layers.values())

    def pad(layer: LowRank) -> LowRank:
        missing = rank - layer.rank
        rows = layer.down.new_zeros(missing, *layer.down.shape[1:])
        columns = layer.up.new_zeros(len(layer.up), missing, *layer.up.shape[2:])
        return LowRank(
            down=torch.cat([layer.down, rows]),
            up=torch.cat([layer.up, columns], dim=1),
            magnitude=layer.magnitude,
        )

    return map_layers(folded, pad)


def normalize_factors(layer: LowRank) -> LowRank:
    """Move a power of two between up and down, which is exact, to make them similar in size.

    Otherwise fp16 would round the small `up` of early steps to 0.
    """
    up, down = layer.up.abs().max(), layer.down.abs().max()
    if min(up, down) == 0:
        return layer
    factor = torch.exp2(((down / up).log2() / 2).round())
    return LowRank(down=layer.down / factor, up=layer.up * factor, magnitude=layer.magnitude)


def build_proof(proofs: tuple[FileProof, ...], dtype: torch.dtype, folded: Folded) -> Proof:
    """Return the proof of all files of one dtype, with notes for other programs."""
    layers = [layer for by_path in folded.values() for layer in by_path.values()]
    has_dora = any(layer.magnitude is not None for layer in layers)
    return Proof(
        dtype=next(name for name, file_dtype in FILE_DTYPES.items() if file_dtype == dtype),
        bound=MAX_DIFFERENCES[dtype],
        projections=len(layers),
        file_proofs=proofs,
        notes=(get_dora_note(has_kohya_file="unet" in folded),) if has_dora else (),
    )
