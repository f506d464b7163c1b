"""Publishes an adapter, and notes its best scale in a published file.

A published adapter is always folded: ΔW = up·down with the scale included and alpha = rank. Such a
file is correct without metadata, in any version of diffusers and in kohya's form.

live adapter --fold--> LowRank --reduce_layers--> --publish--> pytorch_lora_weights.safetensors   for diffusers
                                                                   <name>.kohya.safetensors           for others
                                                               [<name>_emb.safetensors            new tokens, for
                                                                <name>_2_emb.safetensors          each subject]
             --save_raw--> moslora_weights.safetensors --load_raw--> the same adapter, bit for bit

A file is published only after a stock loader has read it back and computed the same (`proof`).

`fold_peft` does so without a base for a language model's adapter, which PEFT has saved:

    lora_A.weight (r, in)   lora_B.up (out, r)   lora_B.mixer (r, r)   ->   lora_A.weight   lora_B.weight = B·M (out, r)
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dreambooth_moslora.disk.atomic import atomic_write, scratch_directory
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.run_folder import (
    KOHYA_SUFFIX,
    PEFT_CONFIG,
    PUBLISHED_NAME,
    check_name,
    tokens_name,
)
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import describe, key_names, lycoris, new_tokens, raw_file
from dreambooth_moslora.lora.key_names import PEFT_KEYS, spell
from dreambooth_moslora.lora.lora_settings import PEFT_SETTINGS
from dreambooth_moslora.lora.metadata import AdapterMetadata, dora_note, metadata_in, most_common
from dreambooth_moslora.lora.proof import BOUNDS, FileProof, Proof, check_reduction, prove_file
from dreambooth_moslora.method import mixer, moslora
from dreambooth_moslora.method.mixer import Components, Folded, LowRank, Tensors, untied
from dreambooth_moslora.settings.families import DENOISERS
from dreambooth_moslora.settings.table import KRONECKER


def note_scale(path: Path, best: float, usable: tuple[float, float]) -> bool:
    """Write the scale; False for a file of another program. Raises UserError for a broken file, and
    OSError."""
    tensors, header = raw_file.read_tensors(path)
    facts = metadata_in(header)
    if facts is None or raw_file.RAW_KEY in tensors:
        return False
    raw_file.write_file(
        path, tensors, header | replace(facts, best_scale=best, usable_scales=usable).header
    )
    return True


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

RANKS_NOTE = (
    "the ranks differ after the reduction, and old versions of diffusers (0.29 is known) give such projections one "
    "scale in pytorch_lora_weights.safetensors: load the kohya file there, which is right in both"
)


def publish(
    components: Components,
    out_dir: str | Path,
    name: str,
    metadata: AdapterMetadata,
    dtype: torch.dtype = torch.float32,
    *,
    keep: float = 1.0,
    adapter_name: str = "default",
    tokens: Sequence[new_tokens.NewTokens] = (),
    prove: Callable[[Sequence[Path]], tuple[FileProof, ...]] | None = None,
) -> Proof:
    """Write both published files into `out_dir`, or neither: each is verified first. New `tokens`
    are written beside them; `prove` verifies these. `keep` below 1 reduces each projection's rank
    to keep that fraction of ‖ΔW‖². Raises UserError for a difference beyond the dtype's bound, NaN,
    and a merged adapter."""
    check_name(name)
    check_publishable(components, dtype, adapter_name)
    folded: Folded = {}
    for component, model in components.items():
        layers = moslora.fold(model, adapter_name)
        folded[component] = {
            key_names.published_path(component, path): layer for path, layer in layers.items()
        }
    kept = expected = None
    if keep != 1.0:
        folded, kept, expected = reduced(folded, components, adapter_name, keep)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    metadata = replace(metadata, tokens=new_tokens.notes_of(tokens, name))
    with scratch_directory(out_dir) as scratch:
        written = write_published(folded, scratch, name, metadata, dtype, pad=keep == 1.0)
        proofs = tuple(prove_file(path, components, adapter_name, expected) for path in written)
        paths = [scratch / tokens_name(name, number) for number in range(len(tokens))]
        for path, of_one in zip(paths, tokens):
            new_tokens.write_tokens(path, of_one)
        proofs += prove(paths) if prove and paths else ()
        for proof in proofs:
            if not proof.largest <= BOUNDS[dtype]:
                raise UserError(
                    f"{proof.file} was not published: reloaded by {proof.loader} it differs from the live adapter by "
                    f"{proof.largest:.2e} (relative, worst in {proof.worst}), and {dtype} explains at most "
                    f"{BOUNDS[dtype]:.0e}"
                )
        for path in (*paths, *written):
            path.replace(out_dir / path.name)
    return report(proofs, dtype, folded, kept)


def check_publishable(components: Components, dtype: torch.dtype, adapter_name: str) -> None:
    """Raises UserError for a merged adapter, an unknown dtype, and an adapter that the files cannot
    hold."""
    raw_file.check_storable(components, adapter_name)
    if dtype not in BOUNDS:
        raise UserError(f"a LoRA file is written in {', '.join(DTYPES)}, not {dtype}")
    for path, layer in raw_file.all_layers(components, adapter_name).items():
        if layer.merged:
            raise UserError(f"{path} is merged into the base; unmerge the adapter before saving it")


def reduced(
    folded: Folded, components: Components, adapter_name: str, keep: float
) -> tuple[Folded, float, Tensors]:
    """The layers in lower rank, the fraction of Σ‖ΔW‖² that is left, and `component.path` -> the ΔW
    (out, in) or (out, in, h, w) that the files must hold. Raises UserError when more is lost than
    `keep` allows."""
    for component, layers in folded.items():
        for path, layer in layers.items():
            matrices = {f"{component}.{path}.0": layer.down, f"{component}.{path}.1": layer.up}
            raw_file.check_finite(matrices, "the adapter")
    folded, kept = describe.reduce_layers(folded, keep)
    names = [name.partition(".") for name in raw_file.all_layers(components, adapter_name)]
    expected = {
        f"{part}.{path}": folded[part][key_names.published_path(part, path)].delta
        for part, _, path in names
    }
    check_reduction(components, adapter_name, expected, keep)
    return folded, kept, expected


def write_published(
    folded: Folded,
    folder: Path,
    name: str,
    metadata: AdapterMetadata,
    dtype: torch.dtype,
    *,
    pad: bool,
) -> list[Path]:
    """Write diffusers' file, and a UNet's in kohya's names, which ComfyUI needs. `pad`: diffusers'
    has one rank."""
    ranks = {
        f"{c}.{path}": layer.rank for c, layers in folded.items() for path, layer in layers.items()
    }
    rank = most_common(ranks.values())
    others = {path: r for path, r in ranks.items() if r != rank}
    metadata = replace(
        metadata, rank=rank, alpha=rank, ranks=others, alphas=others, use_rslora=False
    )
    if dtype == torch.float16:
        folded = {
            c: {path: balanced(layer) for path, layer in layers.items()}
            for c, layers in folded.items()
        }
    header = {"format": "pt"} | replace(metadata, structures={}).header
    filled = padded(folded) if pad else folded
    settings = (
        {}
        if "unet" in folded
        else {PEFT_SETTINGS: json.dumps(peft_settings(filled), indent=2, sort_keys=True)}
    )
    files = [(folder / PUBLISHED_NAME, published_tensors(filled, dtype), header | settings)]
    if "unet" in folded:
        head = header | key_names.kohya_header(name, metadata, folded)
        files.append(
            (folder / f"{name}{KOHYA_SUFFIX}", key_names.kohya_tensors(folded, dtype), head)
        )
    for path, tensors, head in files:
        raw_file.check_finite(tensors, f"the adapter in {dtype}")
        raw_file.write_file(path, tensors, head)
    return [path for path, _, _ in files]


def peft_settings(folded: Folded) -> dict[str, object]:
    """`component.name` -> a setting of LoraConfig: alpha is the rank, as the scale is in `up`; no
    `text_model.`."""
    settings: dict[str, object] = {}
    for component, layers in folded.items():
        ranks = {path.removeprefix("text_model."): layer.rank for path, layer in layers.items()}
        rank = most_common(ranks.values())
        others = {path: of_one for path, of_one in ranks.items() if of_one != rank}
        use_dora = any(layer.magnitude is not None for layer in layers.values())
        of_component = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
        }
        of_component |= {
            "target_modules": sorted(ranks),
            "use_dora": use_dora,
            "use_rslora": False,
            "lora_bias": False,
        }
        settings |= {f"{component}.{name}": value for name, value in of_component.items()}
    return settings


def published_tensors(folded: Folded, dtype: torch.dtype = torch.float32) -> Tensors:
    """The tensors under PEFT's keys, which diffusers reads since 0.22. DoRA's magnitudes stay fp32."""
    tensors = {}
    for component, layers in folded.items():
        for path, layer in layers.items():
            name = f"{component}.{path}"
            tensors[spell(PEFT_KEYS, name, "down")] = layer.down.to(dtype)
            tensors[spell(PEFT_KEYS, name, "up")] = layer.up.to(dtype)
            if layer.magnitude is not None:
                # For a UNet every diffusers adds `.weight`, and old ones need that; transformers'
                # loader does not.
                suffix = "" if component in DENOISERS else ".weight"
                tensors[spell(PEFT_KEYS, name, "magnitude") + suffix] = layer.magnitude
    return tensors


def padded(folded: Folded) -> Folded:
    """All projections at the file's largest rank, with zeros: old diffusers uses one alpha for all
    ranks."""
    rank = max(layer.rank for layers in folded.values() for layer in layers.values())

    def pad(layer: LowRank) -> LowRank:
        missing = rank - layer.rank
        rows = layer.down.new_zeros(missing, *layer.down.shape[1:])
        columns = layer.up.new_zeros(len(layer.up), missing, *layer.up.shape[2:])
        return LowRank(
            torch.cat([layer.down, rows]),
            torch.cat([layer.up, columns], dim=1),
            magnitude=layer.magnitude,
        )

    return {c: {path: pad(layer) for path, layer in layers.items()} for c, layers in folded.items()}


def balanced(layer: LowRank) -> LowRank:
    """Move a power of two between up and down, which is exact: fp16 would round the small `up` of
    early steps to 0."""
    sizes = layer.up.abs().max(), layer.down.abs().max()
    if min(sizes) == 0:
        return layer
    factor = torch.exp2(((sizes[1] / sizes[0]).log2() / 2).round())
    return LowRank(layer.down / factor, layer.up * factor, magnitude=layer.magnitude)


def report(
    proofs: tuple[FileProof, ...], dtype: torch.dtype, folded: Folded, kept: float | None
) -> Proof:
    """The proof of all files, with notes for other programs. `kept`: of Σ‖ΔW‖² after a reduction,
    else None."""
    layers = [layer for c in folded.values() for layer in c.values()]
    has_several_ranks = kept is not None and len({layer.rank for layer in layers}) > 1
    has_dora = any(layer.magnitude is not None for layer in layers)
    return Proof(
        dtype=next(name for name, d in DTYPES.items() if d == dtype),
        bound=BOUNDS[dtype],
        projections=len(layers),
        file_proofs=proofs,
        rank_sum=sum(layer.rank for layer in layers),
        kept=1.0 if kept is None else kept,
        notes=(dora_note(has_kohya_file="unet" in folded),) * has_dora
        + (RANKS_NOTE,) * has_several_ranks,
    )


def load_published(path: str | Path) -> tuple[Tensors, AdapterMetadata | None]:
    """Tensors of a LoRA file, and its metadata if this program wrote it. Raises UserError for a
    broken file."""
    path = Path(path)
    tensors, header = raw_file.read_tensors(path / PUBLISHED_NAME if path.is_dir() else path)
    raw_file.check_finite(tensors, path.name)
    return tensors, metadata_in(header)


WEIGHTS = "adapter_model.safetensors"
OWN_SETTINGS = ("mixer", "train_mixer", "mixer_seed", "mixer_factor")
UP, MIXER, WEIGHT, DOWN = ".lora_B.up", ".lora_B.mixer", ".lora_B.weight", ".lora_A.weight"
TIED = ".lora_A.tied"  # of a LoKr


def fold_peft(source: Path, out: Path) -> int:
    """Write the folder's adapter folded into `out`; returns how many layers were. Raises UserError."""
    if not (source / PEFT_CONFIG).is_file():
        raise UserError(
            f"{source} holds no {PEFT_CONFIG}: give the folder that PEFT's save_pretrained wrote"
        )
    settings = read_json(source / PEFT_CONFIG)
    if settings.get("peft_type") != moslora.SAVED_TYPE:
        raise UserError(
            f"{source} is of the type {settings.get('peft_type')!r:.40}, which PEFT loads as it is"
        )
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out} is the adapter itself; give another folder")
    tensors, header = raw_file.read_tensors(source / WEIGHTS)
    raw_file.check_finite(tensors, WEIGHTS)
    modules = [key.removesuffix(UP) for key in tensors if key.endswith(UP)]
    plain = {key: tensor for key, tensor in tensors.items() if not key.endswith((UP, MIXER, TIED))}
    for module in modules:
        plain[module + DOWN], plain[module + WEIGHT] = folded_layer(module, tensors)
    settings = {name: value for name, value in settings.items() if name not in OWN_SETTINGS} | {
        "peft_type": "LORA"
    }
    raw_file.write_file(out / WEIGHTS, plain, header)
    atomic_write(out / PEFT_CONFIG, json.dumps(settings, indent=2, sort_keys=True).encode())
    return len(modules)


def folded_layer(module: str, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B·M (out, r), or (r, in, h, w) and (out, r, 1, 1). Raises UserError for a
    broken module."""
    is_tied = module + TIED in tensors
    down, mixed, up = (
        tensors.get(module + part) for part in (TIED if is_tied else DOWN, MIXER, UP)
    )
    is_whole = (
        down is not None
        and mixed is not None
        and up.ndim == mixed.ndim == 2
        and up.shape[1] == len(down)
    )
    if not is_whole or (down.ndim != 2 if is_tied else mixed.shape != (len(down), len(down))):
        raise UserError(f"{WEIGHTS} is broken: {module:.100} is not whole")
    matrices = down.double(), mixed.double(), up.double()
    down, mixed, up = untied(*matrices) if is_tied else matrices
    product = (up @ mixed).to(dtype := tensors[module + UP].dtype)
    return down.to(dtype), product.view(*product.shape, *(1,) * (down.ndim - 2)).contiguous()


# Largest relative difference of a layer's ΔW in the file from the trained one: fp32's rounding
LOKR_BOUND = 1e-5


def write_lokr(
    source: Path, file: Path, title: str = "", tokens: Sequence[new_tokens.NewTokens] = ()
) -> int:
    """Write and prove a raw file's LoKr in LyCORIS' names, for ComfyUI; diffusers reads those of
    Z-Image and FLUX.2. New `tokens` are written beside it, in files named by the title. Returns the
    layers. Raises UserError."""
    tensors, facts = raw_file.read_raw(source)
    if facts.mixer != KRONECKER:
        raise UserError(
            f"{source.name} is no LoKr: `--mixer kronecker` trains one; export it without --for lycoris"
        )
    components = raw_file.by_module(tensors)
    names, content = {}, {}
    for component, modules in components.items():
        for path, parts in modules.items():
            module, public = f"{component}.{path}", key_names.published_path(component, path)
            is_kohya = component in key_names.KOHYA_PREFIXES
            name = f"{component}.{public}"
            if is_kohya:
                name = key_names.kohya_name(component, public, components)
            rank, alpha = facts.ranks.get(module, facts.rank), facts.alphas.get(module, facts.alpha)
            scale = mixer.nominal_scale(alpha, rank, facts.use_rslora)
            own = {
                "lokr_w1": parts["mixer"],
                "lokr_w2_a": parts["lora_B"],
                "lokr_w2_b": parts["lora_A"],
            }
            if is_kohya:
                own["alpha"] = torch.tensor(scale * len(parts["lora_A"]))
            else:  # a transformer's, which diffusers reads where it has no alpha
                own["lokr_w1"] = scale * own["lokr_w1"]
            if "magnitude" in parts:
                own["dora_scale"] = parts["magnitude"][:, None]
            content |= {f"{name}.{part}": tensor.contiguous() for part, tensor in own.items()}
            names[module] = name
    raw_file.write_file(
        file, content, replace(facts, tokens=new_tokens.notes_of(tokens, title)).header
    )
    for number, of_one in enumerate(tokens):
        new_tokens.write_tokens(file.with_name(tokens_name(title, number)), of_one)
    written, _ = raw_file.read_tensors(file)
    for module, name in names.items():
        component, path = module.split(".", 1)
        wanted = raw_file.matrices_from(components[component][path], facts, module).fold().delta
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in written.items()
            if key.startswith(f"{name}.")
        }
        up, down = lycoris.lora_of(own, tuple(wanted.shape))
        if not (up @ down - wanted).norm() <= LOKR_BOUND * wanted.norm():
            raise UserError(
                f"{file.name}: {module} differs from the trained adapter; the file is not to be used"
            )
    return len(names)
