"""Report of `--dry_run`, and the advice on a plan that a run and the page show too.

`plan.validation` holds what forbids a run.
"""

import json
import shutil
from pathlib import Path

from dreambooth_moslora.base.devices import GIB
from dreambooth_moslora.disk import queue, run_folder
from dreambooth_moslora.lora.metadata import get_dora_note
from dreambooth_moslora.photos import caption_variants, folder, photo_file, synthetic
from dreambooth_moslora.photos.quality import find_photo_faults
from dreambooth_moslora.plan.base_size import BaseSize
from dreambooth_moslora.plan.memory_plans import format_chosen_plan, format_plans
from dreambooth_moslora.plan.plan import RunPlan, make_plan
from dreambooth_moslora.plan.speed import choose_local_speed
from dreambooth_moslora.plan.steps import EXPOSURES_ADVICE, MIN_EXPOSURES
from dreambooth_moslora.plan.validation import check_folders, find_existing_folder
from dreambooth_moslora.settings import lr_schedules, rules, setting_names, train_config
from dreambooth_moslora.settings.config_files import DEFAULTS
from dreambooth_moslora.settings.prompts import parse_subject


def list_plan_advice(plan: RunPlan) -> list[str]:
    """Return a sentence for each setting that is allowed but probably a mistake."""
    config, steps = plan.config, plan.steps
    lines = rules.list_remarks(config)

    # The number of steps.
    exposures = steps.exposures_per_photo
    if exposures < MIN_EXPOSURES:
        lines.append(
            f"each photo is seen about {exposures:.0f} times, and {EXPOSURES_ADVICE}: "
            "set --exposures_per_photo or --max_train_steps"
        )
    warm_up = config.lr_warmup_steps
    if lr_schedules.is_schedule_setting(config, "lr_warmup_steps") and warm_up >= steps.total_steps:
        lines.append(
            f"the learning rate rises for {warm_up} steps, and the run has {steps.total_steps}: "
            "set --lr_warmup_steps"
        )

    # Who can load the files.
    if config.use_dora:
        facts = plan.base.facts
        is_unet = facts is None or facts.denoiser == "unet"
        lines.append(get_dora_note(has_kohya_file=is_unet))
    return lines


def describe_disk_lack(plan: RunPlan) -> list[str]:
    """Return a sentence if the disk has no room for the run."""
    needed, free = plan.cost.disk_gib, measure_free_disk_gib(plan.config)
    if needed <= free:
        return []
    return [
        f"the disk has too little room: the run writes {needed:.2f} GiB, {free:.1f} GiB are free"
    ]


def measure_free_disk_gib(config: train_config.TrainConfig) -> float:
    """GiB free on the disk of the run folder, which need not exist yet."""
    return shutil.disk_usage(find_existing_folder(Path(config.output_dir))).free / GIB


def describe_run(
    config: train_config.TrainConfig,
    report: folder.PhotoReport | None = None,
    *,
    is_verbose: bool = False,
) -> str:
    """Return the report of `--dry_run`: what the run costs, its steps, its photos and remarks;
    with `is_verbose` also every memory plan, the speed settings and the changed settings.

    Raises UserError for what training would refuse.
    """
    # Whatever a run would refuse before it loads the base.
    check_folders(config)
    queue.check_unlocked(Path(config.output_dir))
    plan = make_plan(config, report)
    changes = {}
    if config.resume_from_checkpoint:
        from dreambooth_moslora.training import checkpoint

        resumed = checkpoint.find_resume_point(plan.config, run_folder.RunDir(config.output_dir))
        if resumed is not None:
            path, position = resumed
            digests = folder.hash_files(plan.photo_report)
            lines = checkpoint.list_changes(position, plan.config, digests)
            changes = {f"changed since {path.name}": lines}

    # The sections, each with the settings as the plan has completed them.
    report = find_photo_faults(plan.photo_report, config.resolution)
    config = plan.config
    costs, settings_section = [*format_costs(plan), *format_chosen_plan(config)], {}
    if is_verbose:
        speed = choose_local_speed(config, plan.steps.total_steps).describe()
        costs += [*format_plans(config, plan.cost.size), f"speed: {speed}"]
        title = "settings that are not the defaults (--help_all shows those)"
        settings_section = {title: format_changed_settings(config)}
    sections = {
        "not enough room": describe_disk_lack(plan),
        **changes,
        "cost (estimated)": costs,
        "steps": format_steps(plan),
        "photos": format_photos(config, report),
        **settings_section,
        "remarks": [*report.remarks, *list_plan_advice(plan)],
    }
    blocks = []
    if plan.base.suggestion:
        blocks.append(
            f"{plan.base.suggestion}Nothing is known of {plan.base.name}: it is planned as SDXL."
        )
    for title, lines in sections.items():
        if lines:
            blocks.append("\n  ".join([title, *lines]))
    if not is_verbose:
        blocks.append("--verbose also lists the other memory plans and the changed settings.")
    return "\n\n".join(blocks)


def format_changed_settings(config: train_config.TrainConfig) -> list[str]:
    """List the run's settings that differ from the defaults, and those without a default."""
    values = config.to_dict() | {"dry_run": False}

    # What `train` requires has no default, unless several subjects have their own.
    required = {*setting_names.list_settings("required")}
    if config.subjects:
        required -= {*setting_names.list_settings("per_subject")}
    return [
        f"{name} = {json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
        if value != DEFAULTS[name] or name in required
    ]


def format_photos(config: train_config.TrainConfig, report: folder.PhotoReport) -> list[str]:
    """Return a line for each photo and each skipped file, and the instance prompt's share."""
    # Captions that all photos share stand once.
    captions = {photo_file.format_captions(photo) for photo in report.photos}
    lines = [f"all: {next(iter(captions))}"] if len(captions) == 1 else []

    # The photos, and the files that are no photos.
    for photo in report.photos:
        height, width = photo.size_px
        description = f"{photo.path.name}  {width} x {height}"
        if len(captions) > 1:
            description += f"  {photo_file.format_captions(photo)}"
        lines.append("; ".join([description, *photo.reasons]))
    lines += [f"left out: {item.path.name}  {item.reason}" for item in report.skipped]
    if share := caption_variants.describe_bare_prompts(config, report.photos):
        lines.append(share)
    return [*lines, *synthetic.describe_synthetic(report.photos, config.synthetic_weight)]


def format_steps(plan: RunPlan) -> list[str]:
    """Return the length of the run, and each subject's token, class and exposures per photo."""
    config, steps = plan.config, plan.steps
    lines = [steps.describe()]
    for subject_config, count in zip(config.each_subject, steps.photo_counts):
        subject = parse_subject(subject_config)
        line = f"token “{subject.token}”"
        if subject.class_word:  # a style has none
            line += f", class “{subject.class_word}”"
        if config.subjects:
            exposures = (
                f"{count} photos seen about {steps.exposures_per_subject / count:.0f} times each"
            )
            line = f"“{subject_config.instance_prompt}”: {line}, {exposures}"
        lines.append(line)
    return lines


def format_costs(plan: RunPlan) -> list[str]:
    """Return the adapter's size, and the memory and disk that the run needs."""
    cost, size = plan.cost, plan.cost.size

    # The adapter.
    layers = size.adapted_layers
    if plan.config.train_text_encoder:
        layers += size.text_layers
    parameters = f"{cost.adapter_parameters:,} parameters on {layers} layers"

    # Memory, and disk.
    memory = (
        f"encoding {cost.encoding_gib:.2f} GiB, training {cost.training_gib:.2f} GiB, "
        f"samples {cost.sampling_gib:.2f} GiB"
    )
    disk = f"{cost.disk_gib:.2f} GiB, {cost.checkpoint_gib:.3f} GiB a checkpoint"
    return [
        f"adapter: {parameters}; base: {describe_base_size(size)}",
        f"memory: {memory}",
        f"disk: {disk}; free: {measure_free_disk_gib(plan.config):.1f} GiB",
    ]


def describe_base_size(size: BaseSize) -> str:
    """Describe where the numbers of a base come from."""
    if size.is_measured:
        return "counted in its files"
    facts = size.family
    layers = "attention alone" if facts.style == "ddpm" else "its usual layers"

    # The published model of its family, or the nearest that is known.
    of = f"{facts.title}'s"
    why = "as its files are not here"
    if size.is_assumed:
        why = "as its size is not known without its .safetensors files"
        if size.hub_id:
            of = f"that of {size.hub_id}"
        else:
            why += ", nor its family, which the hub does not tell"
    return f"taken to be {of}, with the adapter on {layers}, {why}"
