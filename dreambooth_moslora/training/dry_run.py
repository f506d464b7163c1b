"""A plan in words: the report of `--dry_run`, and the advice that a run and the page show too.

`plan.checks` holds what forbids a run.
"""

import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

from dreambooth_moslora.adapters.metadata import DORA_NOTE
from dreambooth_moslora.core import public_name
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.photos.captions import load_captioner
from dreambooth_moslora.photos.crops import crop_rule, examine
from dreambooth_moslora.photos.folder import PhotoReport, bare_prompt_line
from dreambooth_moslora.photos.masks import segmenter_name, sought_word
from dreambooth_moslora.photos.photo import Photo, quoted
from dreambooth_moslora.plan.checks import check_folders, nearest_existing
from dreambooth_moslora.plan.memory import GIB, Estimate, plan_lines, speed_here
from dreambooth_moslora.plan.plan import Plan, make_plan
from dreambooth_moslora.plan.steps import FEW_EXPOSURES, StepPlan, uses_class_images
from dreambooth_moslora.settings.prompts import subject_of
from dreambooth_moslora.settings.rules import remarks
from dreambooth_moslora.settings.subjects import each_subject
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.class_images import shares

DEFAULTS = {item.name: item.default for item in fields(TrainConfig)}


def advice(plan: Plan) -> list[str]:
    """Lines of advice; none of them forbids the run."""
    dora = [DORA_NOTE] * plan.config.use_dora
    return [*remarks(plan.config), *exposure_advice(plan.steps), *disk_advice(plan.config, plan.cost), *dora]


def exposure_advice(steps: StepPlan) -> list[str]:
    if steps.exposures_a_photo >= FEW_EXPOSURES:
        return []
    seen = f"each photo is seen about {steps.exposures_a_photo:.0f} times"
    return [f"{seen}, and a subject needs 100 or more: set --exposures_per_photo or --max_train_steps"]


def disk_advice(config: TrainConfig, cost: Estimate) -> list[str]:
    free = free_disk_gib(config)
    if free >= cost.disk_gib:
        return []
    return [f"the disk has too little room: the run writes {cost.disk_gib:.2f} GiB, {free:.1f} GiB are free"]


def free_disk_gib(config: TrainConfig) -> float:
    """GiB free on the disk of the run folder, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(Path(config.output_dir))).free / GIB


def differs(config: TrainConfig, name: str) -> bool:
    """Whether a setting differs from its default."""
    return getattr(config, name) != DEFAULTS[name]


def describe_run(config: TrainConfig, report: PhotoReport | None = None) -> str:
    """The report of `--dry_run`; `report` is given where the photos were read before.

    Raises UserError for whatever training would refuse before it loads the base.
    """
    check_folders(config)
    if config.resume_from_checkpoint:
        from dreambooth_moslora.training.checkpoint import resume_point

        resume_point(config, RunDir(config.output_dir))
    plan = make_plan(config, report)
    config, report = plan.config, examine(plan.photo_report, config.resolution)
    made = [*caption_lines(config, report), *mask_lines(config, report)]
    speed = f"speed: {speed_here(config, plan.steps.total_steps).sentence()}"
    sections = {
        "settings": settings_lines(config),
        "photos": [*photo_lines(report), *bucket_lines(config, report.photos), *made],
        "steps": step_lines(plan),
        "cost (estimated)": [*cost_lines(plan), *plan_lines(config, plan.cost.size), speed],
        "remarks": advice(plan),
    }
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in sections.items() if lines)


def settings_lines(config: TrainConfig) -> list[str]:
    """The settings as TOML; those that differ from the default are marked."""
    values = config.to_dict()
    changed = {name for name in DEFAULTS if differs(config, name)}
    shown = {name: value for name, value in values.items() if value is not None}
    return [f"{name} = {as_toml(value)}" + ("  # set" if name in changed else "") for name, value in shown.items()]


def as_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {as_toml(one)}" for name, one in value.items()) + "}"
    return "[" + ", ".join(map(as_toml, value)) + "]" if isinstance(value, list) else repr(value)


def photo_lines(report: PhotoReport) -> list[str]:
    lines = []
    for photo in report.photos:
        about = f"{photo.path.name}  {photo.size_px[1]} x {photo.size_px[0]}  {quoted(photo)}"
        lines.append("; ".join([about, *photo.reasons]))
    return lines + [f"left out: {item.path.name}  {item.reason}" for item in report.skipped]


def bucket_lines(config: TrainConfig, photos: list[Photo]) -> list[str]:
    """With `--enable_bucket`: how many photos are cropped to each size, and how many class images are drawn in it."""
    if not config.enable_bucket:
        return []
    rule = crop_rule(config)
    counts = Counter(rule.target(photo.size_px) for photo in photos)
    found = [f"cropped to {sizes_in_words(counts)}"]
    if uses_class_images(config):
        drawn = Counter(shares(counts, config.num_class_images))
        found.append(f"class images, where none are given, in the same proportion: {sizes_in_words(drawn)}")
    return found


def sizes_in_words(counts: Counter[tuple[int, int]]) -> str:
    """The most frequent size first."""
    return ", ".join(f"{width} x {height} px ({count})" for (height, width), count in counts.most_common())


def caption_lines(config: TrainConfig, report: PhotoReport) -> list[str]:
    """The share of the instance prompt, and what `--captions auto` would do. Raises UserError when no class word is
    known."""
    lines = list(filter(None, [bare_prompt_line(config, report.photos)]))
    bare = sum(not photo.is_captioned for photo in report.photos)
    if config.captions == "auto" and bare:
        captioner = load_captioner(each_subject(config)[0])
        lines.append(f"captions: {bare} photos have none of their own; {captioner.name} makes them before training")
    return lines


def mask_lines(config: TrainConfig, report: PhotoReport) -> list[str]:
    """What `--masks auto` would do. Raises UserError when no word says what to look for."""
    bare = [photo for photo in report.photos if photo.mask_path is None]
    if config.masks != "auto" or not bare:
        return []
    subjects = each_subject(config)
    words = dict.fromkeys(sought_word(subjects[photo.subject]) for photo in bare)
    sought = f", looking for {', '.join(f'“{word}”' for word in words)}" if any(words) else ""
    name = public_name(segmenter_name(config))
    return [f"masks: {len(bare)} photos have none; {name} makes them before training{sought}"]


def step_lines(plan: Plan) -> list[str]:
    config, steps = plan.config, plan.steps
    lines = [steps.sentence()]
    if config.crops_per_photo > 1:
        lines.append(f"{config.crops_per_photo} crops of each photo take turns, one an epoch")
    subjects = each_subject(config)
    if config.with_prior_preservation:
        source = f"{config.num_class_images} class images" if config.prior == "class_images" else "the base's answer"
        prompts = ", ".join(f"“{prompt}”" for prompt in dict.fromkeys(one.class_prompt for one in subjects))
        lines.append(f"as many prior examples beside them, from {source} to {prompts}")
    for one, count in zip(subjects, steps.photo_counts):
        subject = subject_of(one)
        words = f"token “{subject.token}”, class “{subject.class_word}”"
        seen = f", {count} photos seen about {steps.exposures_a_subject / count:.0f} times each"
        lines.append(f"“{one.instance_prompt}”: {words}{seen}" if config.subjects else words)
    return lines


def cost_lines(plan: Plan) -> list[str]:
    cost, known = plan.cost, "counted in its files"
    if not cost.size.is_measured:
        known = "taken to be SDXL's, with the adapter on attention alone, as its files are not here"
    return [
        f"adapter: {cost.adapter_parameters:,} parameters on {cost.size.adapted_layers} layers; base: {known}",
        f"memory: encoding {cost.encoding_gib:.2f} GiB, training {cost.training_gib:.2f} GiB, "
        f"samples {cost.sampling_gib:.2f} GiB",
        f"disk: {cost.disk_gib:.2f} GiB, {cost.checkpoint_gib:.3f} GiB a checkpoint; "
        f"free: {free_disk_gib(plan.config):.1f} GiB",
    ]
