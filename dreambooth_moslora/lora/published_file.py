"""Publishes an adapter, and notes its best scale in a published file.

A published adapter is always folded: ΔW = up·down with the scale included and alpha = rank. Such a
file is correct without metadata, in any version of diffusers and in kohya's form.

    live adapter --fold--> LowRank --reduce_layers--> --publish-->

        pytorch_lora_weights.safetensors    for diffusers
        <name>.kohya.safetensors            for others
        <name>_emb.safetensors              new tokens, if there are any,
        <name>_2_emb.safetensors            one file for each subject

    live adapter --save_raw--> moslora_weights.safetensors --load_raw--> the same, bit for bit

A file is published only after a stock loader has read it back and computed the same (`proof`).

`fold_peft` folds a language model's adapter, which PEFT has saved, without a base:

    lora_A.weight (r, in)                            ->  lora_A.weight, unchanged
    lora_B.up (out, r) and lora_B.mixer (r, r)       ->  lora_B.weight = B·M (out, r)
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
    """Write the scale into a published file's header; False for a file of another program. Raises
    UserError for a broken file, and OSError."""
    tensors, header = raw_file.read_tensors(path)
    facts = metadata_in(header)
    if facts is None or raw_file.RAW_KEY in tensors:
        return False
    facts = replace(facts, best_scale=best, usable_scales=usable)
    raw_file.write_file(path, tensors, header | facts.header)
    return True


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The name of a setting -> the dtype of a published file."""

RANKS_NOTE = (
    "the ranks differ after the reduction, and old versions of diffusers (0.29 is known) "
    "give such projections one scale in pytorch_lora_weights.safetensors: "
    "load the kohya file there, which is right in both"
)
"""What is said of a UNet's files with several ranks."""


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
    """Write both published files, or neither: each is verified first.

    components: the models that the live adapter is on
    out_dir: where the files go
    name: how the names of the files begin
    metadata: for their headers
    dtype: of the files
    keep: below 1, each projection's rank is reduced to keep that fraction of ‖ΔW‖²
    adapter_name: which one, if the models have several
    tokens: new tokens, which are written beside the adapter
    prove: verifies the files of these

    Raises UserError for a difference beyond the dtype's bound, NaN, and a merged adapter.
    """
    check_name(name)
    check_publishable(components, dtype, adapter_name)

    # Fold into a plain LoRA, under the names that other programs know.
    folded: Folded = {}
    for component, model in components.items():
        folded[component] = {}
        for path, layer in moslora.fold(model, adapter_name).items():
            folded[component][key_names.published_path(component, path)] = layer

    # A reduced adapter is compared with what was left of it, which was compared with the live one.
    kept = expected = None
    if keep != 1.0:
        folded, kept, expected = reduced(folded, components, adapter_name, keep)

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    metadata = replace(metadata, tokens=new_tokens.notes_of(tokens, name))
    with scratch_directory(out_dir) as scratch:
        # Write aside, and let a stock loader read each file.
        written = write_published(
            folded,
            folder=scratch,
            name=name,
            metadata=metadata,
            dtype=dtype,
            pad=keep == 1.0,
        )
        proofs = [prove_file(path, components, adapter_name, expected) for path in written]

        # The same for new tokens.
        paths = [scratch / tokens_name(name, number) for number in range(len(tokens))]
        for path, of_one in zip(paths, tokens):
            new_tokens.write_tokens(path, of_one)
        if prove and paths:
            proofs += prove(paths)

        # NaN is no difference that is small enough, hence `not … <=`.
        for proof in proofs:
            if not proof.largest <= BOUNDS[dtype]:
                raise UserError(
                    f"{proof.file} was not published: reloaded by {proof.loader} it differs "
                    f"from the live adapter by {proof.largest:.2e} (relative, worst in "
                    f"{proof.worst}), and {dtype} explains at most {BOUNDS[dtype]:.0e}"
                )

        # All are right: now they get their places.
        for path in (*paths, *written):
            path.replace(out_dir / path.name)
    return report(tuple(proofs), dtype, folded, kept)


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
    """The adapter in lower ranks.

    folded: the whole adapter
    components, adapter_name: the live one, for comparison
    keep: the fraction of each projection's ‖ΔW‖² that is kept

    Returns the layers, the fraction of Σ‖ΔW‖² that is left, and `component.path` -> the ΔW (out,
    in) or (out, in, h, w) that the files must hold. Raises UserError for NaN, and when more is lost
    than `keep` allows.
    """
    # The decomposition would fail at NaN without naming the layer.
    for component, layers in folded.items():
        for path, layer in layers.items():
            matrices = {f"{component}.{path}.0": layer.down, f"{component}.{path}.1": layer.up}
            raw_file.check_finite(matrices, "the adapter")
    folded, kept = describe.reduce_layers(folded, keep)

    expected = {}
    for name in raw_file.all_layers(components, adapter_name):
        component, _, path = name.partition(".")
        layer = folded[component][key_names.published_path(component, path)]
        expected[name] = layer.delta
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
    """Write diffusers' file, and a UNet's in kohya's names, which ComfyUI needs.

    folded: the plain LoRA
    folder: where the files go
    name: of the adapter, for kohya's file
    metadata: of the adapter; ranks and alphas become those of the folded one
    dtype: of the files
    pad: whether all projections in diffusers' file have one rank

    Returns the paths of the files. Raises UserError for NaN and infinity.
    """
    # The scale is in `up`, so alpha is the rank.
    ranks = {}
    for component, layers in folded.items():
        for path, layer in layers.items():
            ranks[f"{component}.{path}"] = layer.rank
    rank = most_common(ranks.values())
    others = {path: own for path, own in ranks.items() if own != rank}
    metadata = replace(
        metadata, rank=rank, alpha=rank, ranks=others, alphas=others, use_rslora=False
    )

    if dtype == torch.float16:
        folded = each_layer(folded, balanced)

    # diffusers' file. A transformer's loader needs PEFT's settings in the header too.
    header = {"format": "pt"} | replace(metadata, structures={}).header
    filled = padded(folded) if pad else folded
    head = dict(header)
    if "unet" not in folded:
        head[PEFT_SETTINGS] = json.dumps(peft_settings(filled), indent=2, sort_keys=True)
    files = [(folder / PUBLISHED_NAME, published_tensors(filled, dtype), head)]

    # kohya's file, of a UNet alone.
    if "unet" in folded:
        path = folder / f"{name}{KOHYA_SUFFIX}"
        head = header | key_names.kohya_header(name, metadata, folded)
        files.append((path, key_names.kohya_tensors(folded, dtype), head))

    for path, tensors, head in files:
        raw_file.check_finite(tensors, f"the adapter in {dtype}")
        raw_file.write_file(path, tensors, head)
    return [path for path, _, _ in files]


def each_layer(folded: Folded, change: Callable[[LowRank], LowRank]) -> Folded:
    """The adapter with each layer changed."""
    result: Folded = {}
    for component, layers in folded.items():
        result[component] = {path: change(layer) for path, layer in layers.items()}
    return result


def peft_settings(folded: Folded) -> dict[str, object]:
    """`component.name` -> a setting of PEFT's LoraConfig. Alpha is the rank, as the scale is in
    `up`. Paths are without `text_model.`, as new versions of transformers have them."""
    settings: dict[str, object] = {}
    for component, layers in folded.items():
        ranks = {path.removeprefix("text_model."): layer.rank for path, layer in layers.items()}
        rank = most_common(ranks.values())
        others = {path: own for path, own in ranks.items() if own != rank}
        of_component = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(ranks),
            "use_dora": any(layer.magnitude is not None for layer in layers.values()),
            "use_rslora": False,
            "lora_bias": False,
        }
        settings |= {f"{component}.{name}": value for name, value in of_component.items()}
    return settings


def published_tensors(folded: Folded, dtype: torch.dtype = torch.float32) -> Tensors:
    """The tensors under PEFT's keys, which diffusers reads since 0.22. DoRA's magnitudes stay in
    fp32."""
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
            down=torch.cat([layer.down, rows]),
            up=torch.cat([layer.up, columns], dim=1),
            magnitude=layer.magnitude,
        )

    return each_layer(folded, pad)


def balanced(layer: LowRank) -> LowRank:
    """Move a power of two between up and down, which is exact: fp16 would round the small `up` of
    early steps to 0."""
    up, down = layer.up.abs().max(), layer.down.abs().max()
    if min(up, down) == 0:
        return layer
    factor = torch.exp2(((down / up).log2() / 2).round())
    return LowRank(down=layer.down / factor, up=layer.up * factor, magnitude=layer.magnitude)


def report(
    proofs: tuple[FileProof, ...], dtype: torch.dtype, folded: Folded, kept: float | None
) -> Proof:
    """The proof of all files, with notes for other programs.

    proofs: of each file
    dtype: of the files
    folded: what they hold
    kept: the fraction of Σ‖ΔW‖² that is left after a reduction; None without one
    """
    layers = []
    for of_component in folded.values():
        layers += of_component.values()

    notes = []
    if any(layer.magnitude is not None for layer in layers):
        notes.append(dora_note(has_kohya_file="unet" in folded))
    if kept is not None and len({layer.rank for layer in layers}) > 1:
        notes.append(RANKS_NOTE)

    names = {one: name for name, one in DTYPES.items()}
    return Proof(
        dtype=names[dtype],
        bound=BOUNDS[dtype],
        projections=len(layers),
        file_proofs=proofs,
        rank_sum=sum(layer.rank for layer in layers),
        kept=1.0 if kept is None else kept,
        notes=tuple(notes),
    )


def load_published(path: str | Path) -> tuple[Tensors, AdapterMetadata | None]:
    """Tensors of a LoRA file, and its metadata if this program wrote it. Raises UserError for a
    broken file."""
    path = Path(path)
    file = path / PUBLISHED_NAME if path.is_dir() else path
    tensors, header = raw_file.read_tensors(file)
    raw_file.check_finite(tensors, path.name)
    return tensors, metadata_in(header)


WEIGHTS = "adapter_model.safetensors"
"""PEFT's file of weights, beside its settings."""
OWN_SETTINGS = ("mixer", "train_mixer", "mixer_seed", "mixer_factor")
"""Settings that PEFT's LoraConfig does not have."""
DOWN = ".lora_A.weight"
UP = ".lora_B.up"
MIXER = ".lora_B.mixer"
"""A module's A, B and M in that file."""
TIED = ".lora_A.tied"
"""A₂ of a LoKr."""
WEIGHT = ".lora_B.weight"
"""B of a plain LoRA."""


def fold_peft(source: Path, out: Path) -> int:
    """Write the adapter of the folder `source` into `out`, folded. Returns how many layers were
    folded. Raises UserError for another folder, and for broken weights."""
    # The settings say what it is: PEFT reads other types by itself.
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

    # Layers without a mixer stay as they are.
    tensors, header = raw_file.read_tensors(source / WEIGHTS)
    raw_file.check_finite(tensors, WEIGHTS)
    modules = [key.removesuffix(UP) for key in tensors if key.endswith(UP)]
    plain = {key: tensor for key, tensor in tensors.items() if not key.endswith((UP, MIXER, TIED))}
    for module in modules:
        plain[module + DOWN], plain[module + WEIGHT] = folded_layer(module, tensors)
    # The settings of a plain LoRA, in any PEFT.
    settings = {name: value for name, value in settings.items() if name not in OWN_SETTINGS}
    settings["peft_type"] = "LORA"
    raw_file.write_file(out / WEIGHTS, plain, header)
    atomic_write(out / PEFT_CONFIG, json.dumps(settings, indent=2, sort_keys=True).encode())
    return len(modules)


def folded_layer(module: str, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B·M (out, r), or (r, in, h, w) and (out, r, 1, 1). Raises UserError for a
    broken module."""
    is_tied = module + TIED in tensors
    down = tensors.get(module + (TIED if is_tied else DOWN))
    mixed, up = tensors.get(module + MIXER), tensors[module + UP]
    dtype = up.dtype
    if not are_whole(down, mixed, up, is_tied=is_tied):
        raise UserError(f"{WEIGHTS} is broken: {module:.100} is not whole")

    # Multiply in fp64, so that the product is rounded once.
    down, mixed, up = down.double(), mixed.double(), up.double()
    if is_tied:
        down, mixed, up = untied(down=down, mixer=mixed, up=up)
    product = (up @ mixed).to(dtype)

    # For a convolution, `up` is a kernel of 1 x 1.
    product = product.view(*product.shape, *(1,) * (down.ndim - 2))
    return down.to(dtype), product.contiguous()


def are_whole(
    down: torch.Tensor | None, mixed: torch.Tensor | None, up: torch.Tensor, *, is_tied: bool
) -> bool:
    """Whether A, M and B are all there and fit one another; with `is_tied` A₂, W₁ and B₂."""
    if down is None or mixed is None:
        return False
    if not up.ndim == mixed.ndim == 2 or up.shape[1] != len(down):
        return False
    if is_tied:
        return down.ndim == 2
    return mixed.shape == (len(down), len(down))


LOKR_BOUND = 1e-5
"""Largest relative difference of a layer's ΔW in the file from the trained one: fp32's rounding."""


def write_lokr(
    source: Path, file: Path, title: str = "", tokens: Sequence[new_tokens.NewTokens] = ()
) -> int:
    """Write and prove a raw file's LoKr in LyCORIS' names, for ComfyUI. diffusers reads those of
    Z-Image and FLUX.2.

    source: the raw file
    file: what is written
    title: how the names of the tokens' files begin
    tokens: new tokens, which are written beside it

    Returns how many layers were written. Raises UserError for another adapter, and for a file that
    holds another change of the weights than the trained one.
    """
    tensors, facts = raw_file.read_raw(source)
    if facts.mixer != KRONECKER:
        raise UserError(
            f"{source.name} is no LoKr: `--mixer kronecker` trains one; "
            "export it without --for lycoris"
        )

    # Each module under its name for other programs: kohya's for a UNet and its encoders.
    components = raw_file.by_module(tensors)
    names, content = {}, {}
    for component, modules in components.items():
        is_kohya = component in key_names.KOHYA_PREFIXES
        for path, parts in modules.items():
            module = f"{component}.{path}"
            public = key_names.published_path(component, path)
            name = f"{component}.{public}"
            if is_kohya:
                name = key_names.kohya_name(component, public, components)
            names[module] = name

            own = lokr_of(parts, facts, module, has_alpha=is_kohya)
            for part, tensor in own.items():
                content[f"{name}.{part}"] = tensor.contiguous()

    facts_here = replace(facts, tokens=new_tokens.notes_of(tokens, title))
    raw_file.write_file(file, content, facts_here.header)
    for number, of_one in enumerate(tokens):
        new_tokens.write_tokens(file.with_name(tokens_name(title, number)), of_one)

    # Prove: what the file's tensors multiply to is what was trained.
    written, _ = raw_file.read_tensors(file)
    for module, name in names.items():
        component, path = module.split(".", 1)
        wanted = raw_file.matrices_from(components[component][path], facts, module).fold().delta
        own = {}
        for key, value in written.items():
            if key.startswith(f"{name}."):
                own[key.removeprefix(f"{name}.")] = value
        up, down = lycoris.lora_of(own, tuple(wanted.shape))
        if not (up @ down - wanted).norm() <= LOKR_BOUND * wanted.norm():
            raise UserError(
                f"{file.name}: {module} differs from the trained adapter; "
                "the file is not to be used"
            )
    return len(names)


def lokr_of(parts: Tensors, facts: AdapterMetadata, module: str, *, has_alpha: bool) -> Tensors:
    """One module's tensors in LyCORIS' names.

    parts: W₁, A₂ and B₂, as a raw file has them
    facts: the raw file's metadata
    module: `component.path`
    has_alpha: whether the scale is in an alpha. diffusers reads a transformer's where it has none;
        the scale is in W₁ then
    """
    rank, alpha = facts.ranks.get(module, facts.rank), facts.alphas.get(module, facts.alpha)
    scale = mixer.nominal_scale(alpha, rank, facts.use_rslora)
    own = {
        "lokr_w1": parts["mixer"],
        "lokr_w2_a": parts["lora_B"],
        "lokr_w2_b": parts["lora_A"],
    }
    if has_alpha:
        own["alpha"] = torch.tensor(scale * len(parts["lora_A"]))
    else:
        own["lokr_w1"] = scale * own["lokr_w1"]
    if "magnitude" in parts:
        own["dora_scale"] = parts["magnitude"][:, None]
    return own
