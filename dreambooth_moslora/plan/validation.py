"""Validate the settings of a run, for `--dry_run` and training alike, without loading a model or
torch.

`check_folders`: a run must not write over photos, nor over files that no run has made.
`validate_run`: the settings fit the base and each other, the packages that they need are installed,
and the GPU has the memory.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk import queue, run_folder
from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.disk.safetensors_header import read_header
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.photos.folder import require_photo_folder
from dreambooth_moslora.plan.base_size import BaseSize, find_base_size
from dreambooth_moslora.plan.memory_plans import check_memory
from dreambooth_moslora.settings import (
    family_facts,
    field_facts,
    rules,
    subject_kinds,
    train_config,
)
from dreambooth_moslora.settings.family_facts import SDXL, FamilyFacts

UNREADABLE_PREFIX = "add_embedding."
"""Diffusers reads no such layers from a kohya file: they cannot be verified."""


def check_layers(
    targets: Iterable[str],
    layers: Mapping[str, int],
    use_dora: bool,
    facts: FamilyFacts = SDXL,
) -> None:
    """Raise UserError for names of layers that get no adapter.

    targets: the names in `--target_modules`
    layers: the path of each layer of the denoiser -> dimensions of its weight
    use_dora: which is for linear layers alone
    facts: of the family
    """
    for name in targets:
        # The layers of that name.
        matching_layers = [layer for layer in layers if field_facts.is_target(layer, name)]
        if not matching_layers:
            usual = "to_q, to_k, to_v and to_out.0 are those of attention."
            if facts.denoiser != "unet":
                usual = f"diffusers' script takes {', '.join(facts.targets)}."
            hint = format_layer_hint(name, layers) or usual
            raise UserError(
                f"--target_modules {name}: {facts.denoiser_name} has no such layer; {hint}"
            )

        # Each of them can have the adapter.
        for layer in matching_layers:
            # The published file could not name it.
            if layer.startswith(UNREADABLE_PREFIX):
                raise UserError(
                    f"--target_modules {name}: {layer} has no name in kohya's files; name others, "
                    "or blocks: down_blocks.* mid_block.* up_blocks.*"
                )
            if use_dora and layers[layer] > 2:
                raise UserError(
                    f"--use_dora: {layer} is a convolution; leave {name} out of --target_modules."
                )


def format_layer_hint(name: str, layers: Iterable[str]) -> str:
    """Return a question with the nearest layer's path, or last name; else ""."""
    names = set(layers) if "." in name else {get_last_name(layer) for layer in layers}
    close = field_facts.find_nearest_name(field_facts.expand_layer_name(name), sorted(names))
    return f"did you mean {close}?" if close else ""


def check_patterns(config: train_config.TrainConfig, layers: Iterable[str]) -> None:
    """Raise UserError for a pattern that matches no layer with an adapter. `layers` are all of the
    denoiser's."""
    adapted = [layer for layer in layers if field_facts.is_adapted(layer, config.target_modules)]
    for flag in ("rank_pattern", "alpha_pattern"):
        for text in getattr(config, flag):
            name = field_facts.parse_pattern(flag, text)[0]
            if not any(field_facts.is_pattern_match(layer, name) for layer in adapted):
                hint = format_layer_hint(name, adapted) or "--target_modules says which have one."
                raise UserError(f"--{flag} {text}: no layer with an adapter has that name; {hint}")


def get_last_name(path: str) -> str:
    """Return the last name of a path: `….attn1.to_q` -> `to_q`, `….attn1.to_out.0` ->
    `to_out.0`."""
    *_, parent, name = f".{path}".split(".")
    return f"{parent}.{name}" if name.isdigit() else name


def check_folders(config: train_config.TrainConfig) -> None:
    """Raise UserError when the run folder is unsuitable or gives the adapter no name. Creates
    nothing."""
    if not config.output_dir.strip():
        raise UserError("--output_dir is empty: name a folder for the run.")

    # A run would fill the root or the home folder with files.
    run_path = Path(config.output_dir).resolve()
    if run_path in (Path(run_path.anchor), Path(os.path.expanduser("~")).resolve()):
        raise UserError(
            f"--output_dir {config.output_dir} is {run_path} itself: "
            "name a folder of the run's own."
        )

    # What lies there already, and what else the run reads and writes.
    run_dir = run_folder.RunDir(config.output_dir)
    run_folder.check_name(run_dir.name)
    for subject in config.each_subject:
        check_photo_folders(subject, run_dir)
        check_writable_folders(subject)
    check_foreign_files(run_dir)
    queue.check_no_links(run_dir.path, "--output_dir")


def check_photo_folders(config: train_config.TrainConfig, run_dir: run_folder.RunDir) -> None:
    """Raise UserError for photos at the top of the run folder, or where a run replaces and moves
    its own files."""
    photos = config.instance_data_dir
    images = config.class_data_dir
    if photos and images and Path(photos).resolve() == Path(images).resolve():
        raise UserError(
            "--class_data_dir is the folder of --instance_data_dir: the class is not the subject."
        )

    # Photos inside the run's folder: at its top they would be mixed with what it writes.
    home = run_dir.path.resolve()
    for name in ("instance_data_dir", "class_data_dir"):
        value = getattr(config, name)
        folder = Path(value).resolve() if value else None
        if folder is None or not folder.is_relative_to(home):
            continue
        if folder == home:
            raise UserError(
                f"--output_dir {config.output_dir} is the folder of --{name}: a run needs one "
                "of its own."
            )

        # Folders in it may be its class images, or folders that no run touches.
        first = folder.relative_to(home).parts[0]
        run_folders = [
            run_dir.samples_dir,
            run_dir.best_dir,
            run_dir.last_dir,
            run_dir.masks_dir,
            run_dir.evaluation_dir,
        ]
        if name != "class_data_dir":
            run_folders.append(run_dir.class_images_dir)
        is_checkpoint = run_folder.parse_checkpoint_step(Path(first)) is not None
        if is_checkpoint or first in {path.name for path in run_folders}:
            raise UserError(
                f"--{name} {value}: the run writes to {first} in its folder; keep the photos "
                "elsewhere."
            )


def check_writable_folders(config: train_config.TrainConfig) -> None:
    """Raise UserError when a folder that the run writes to cannot be written."""
    for name, folder in config.output_folders.items():
        require_writable(name, str(folder))

    # Class images that are there may lie where nobody can write.
    images = config.class_data_dir
    if images and not Path(images).is_dir():
        require_writable("class_data_dir", images)


def require_writable(name: str, value: str) -> None:
    """Raise UserError unless a file can be made there: permissions alone do not tell."""
    try:
        TemporaryFile(dir=find_existing_folder(Path(value))).close()
    except OSError as error:
        raise UserError(f"--{name} {value}: cannot be written: {error.strerror}.") from error


def require_output_folder(path: str | Path) -> Path:
    """Return the folder of --output_dir, checked before any image is generated. Raises UserError
    when it cannot be written."""
    folder = expand_user_path(path)
    require_writable("output_dir", str(folder))
    return folder


def find_existing_folder(path: Path) -> Path:
    """Return the path itself, or its nearest existing parent."""
    path = Path(os.path.abspath(path))
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_foreign_files(run_dir: run_folder.RunDir) -> None:
    """Raise UserError for a model card or images that have a run's file names but come from no
    run."""
    if not run_dir.path.is_dir():
        return
    # The card first: it says which pictures are the run's.
    card = run_dir.read_card()
    if card is not None and not run_folder.is_card(card):
        raise UserError(
            f"{run_dir.card_path} is not a run's and would be overwritten: name another "
            "--output_dir."
        )
    run_images = run_folder.list_card_pictures(card or "")
    for path in sorted(run_dir.path.glob("image_*.png")):
        if path.name not in run_images:
            raise UserError(
                f"{path} is not a run's and would be taken for its picture: name another "
                "--output_dir."
            )


def validate_run(
    config: train_config.TrainConfig, base: Base, *, is_later: bool = False
) -> BaseSize:
    """Validate settings, and memory unless `is_later`. Returns the base's size. Raises
    UserError."""
    validate_settings(config, base)
    size = find_base_size(base, config.target_modules)
    if not is_later:
        check_memory(config, size)
    return size


def validate_settings(config: train_config.TrainConfig, base: Base) -> None:
    """Raise UserError for settings that do not fit the base or each other; memory is not
    checked."""
    # What the settings alone tell, before the base is looked at.
    if config.instance_data_dir:
        require_photo_folder(Path(config.instance_data_dir))
    devices.check_bf16(config)

    # Ranks that the mixer can have.
    ranks = [config.rank]
    for text in config.rank_pattern:
        ranks.append(int(field_facts.parse_pattern("rank_pattern", text)[1]))
    for rank in ranks:
        train_config.check_rank(config.mixer, rank)

    # What else is named: the place on the hub, and files to begin with.
    if config.push_to_hub:
        check_hub_upload(config)
    if config.init_adapter and not config.resume_from_checkpoint:
        check_init_adapter(config.init_adapter)
    if config.companion and not Path(config.companion).exists():
        raise UserError(f"--companion {config.companion}: there is no such file.")

    # The base, and the layers that get an adapter.
    base.check()
    check_adapted_layers(config, base)
    check_text_layers(config.text_encoder_out_layers, base)
    rules.require_packages(config)


def check_adapted_layers(config: train_config.TrainConfig, base: Base) -> None:
    """Raise UserError for layers that the base lacks or that cannot have this adapter. They are not
    known before the base's files are here."""
    shapes = base.denoiser_shapes
    weights = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    layers = {name.removesuffix(".weight"): len(shape) for name, shape in weights.items()}
    if layers:
        check_layers(config.target_modules, layers, config.use_dora, base.facts)
        check_patterns(config, layers)


def check_text_layers(numbers: Sequence[str], base: Base) -> None:
    """Raise UserError where the text encoder's layers of these numbers, side by side, are not as
    wide as the transformer's input. Widths are not known before the base's files are here."""
    input_shape = base.denoiser_shapes.get("context_embedder.weight")
    encoder = base.shapes.get("text_encoder", {}).get("model.embed_tokens.weight")
    if not (numbers and input_shape and encoder):
        return
    layer_count = input_shape[1] // encoder[1]
    if len(numbers) != layer_count:
        raise UserError(
            f"--text_encoder_out_layers: {len(numbers)} given; this base's transformer reads "
            f"{layer_count}."
        )


def check_distilled(base: Base, companion: str | None) -> None:
    """Raise UserError for a distilled base without the LoRA that undoes it."""
    if base.distilled and not companion:
        raise UserError(
            f"--base {base.name}: {base.distilled}, or give the LoRA that undoes it as --companion."
        )


def check_base_settings(config: train_config.TrainConfig, base: Base) -> None:
    """Raise UserError for settings that the base's family cannot follow, and for a distilled base
    without the LoRA that undoes it."""
    if base.facts is not None:
        check_family(config, base.facts)
        check_sides(config, base.facts)
    check_distilled(base, config.companion)


def check_sides(config: train_config.TrainConfig, facts: FamilyFacts) -> None:
    """Raise UserError for crops whose sides the family's patches do not divide."""
    for name in ("resolution", "bucket_reso_steps"):
        px = getattr(config, name) or 0
        if px % facts.multiple_px:
            near = max(1, px // facts.multiple_px) * facts.multiple_px
            raise UserError(
                f"--{name} {px}: {facts.title} needs multiples of {facts.multiple_px} px, "
                f"such as {near}."
            )


def check_family(config: train_config.TrainConfig, facts: FamilyFacts) -> None:
    """Raise UserError for a setting of other models, with the family's name."""
    # Which settings these are.
    is_flow = facts.style == "flow"
    foreign_settings = family_facts.UNET_SETTINGS if is_flow else family_facts.FLOW_SETTINGS
    foreign_settings += tuple(
        name for name in family_facts.TEXT_OPTIONS if name not in facts.text_options
    )
    if not facts.has_level_shift:
        foreign_settings += ("shift_timesteps",)
    if config.train_text_encoder and not facts.adapted_encoders:
        foreign_settings += ("train_text_encoder",)

    # The first that was given.
    for name in foreign_settings:
        flag = rules.format_flag(config, name)
        if flag:
            raise UserError(f"{flag} is not for {facts.title}; leave it out.")

    # Flow models are trained in bf16 or fp32.
    if is_flow:
        devices.check_bf16(config, instead="no")
    if is_flow and devices.get_precision(config) == "fp16":
        instead = devices.choose_family_precision(facts) if devices.has_gpu() else "bf16"
        raise UserError(f"--mixed_precision fp16: {facts.title} overflows in fp16; give {instead}.")


def check_init_adapter(adapter: str) -> None:
    """Raise UserError for a missing or damaged adapter."""
    try:
        if not Path(adapter).exists():
            raise UserError("there is no such file or folder")
        read_header(run_folder.find_weights(adapter))
    except UserError as error:
        raise UserError(f"--init_adapter {adapter}: {error}.") from error


def check_hub_upload(config: train_config.TrainConfig) -> None:
    """Raise UserError for a name or token that the hub rejects; an unreachable hub is no error."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(config.hub_model_id or run_folder.RunDir(config.output_dir).name)
    except HFValidationError as error:
        raise UserError(f"--hub_model_id: {format_error(error)}") from error
    try:
        if not is_offline_mode():
            HfApi(token=config.hub_token).whoami()
    except Exception as error:  # the client passes on the HTTP library's errors
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401 or isinstance(error, LocalTokenNotFoundError):
            raise UserError(f"--push_to_hub: {format_error(error)}") from error


def check_references(base: Base, config: train_config.TrainConfig, flag: str) -> None:
    """Raise UserError for a base that takes no reference images, and for a style. `flag` is the
    option that asks for them."""
    if base.facts is None or not base.facts.takes_references:
        title = base.facts.title if base.facts else base.public_name
        raise UserError(f"{flag}: {title} takes no reference pictures; leave it out.")
    if any(subject_kinds.get_subject_kind(subject).is_style for subject in config.each_subject):
        raise UserError(f"{flag} is for a subject, not for a style; leave it out.")
