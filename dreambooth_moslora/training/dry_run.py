"""A plan in words: the report of `--dry_run`, and the advice that a run and the page show too.

`plan.checks` holds what forbids a run.
"""

import shutil
from collections import Counter
from pathlib import Path

from dreambooth_moslora.base.machine import GIB
from dreambooth_moslora.disk import queue, run_folder
from dreambooth_moslora.disk.paths import public_name
from dreambooth_moslora.lora.metadata import dora_note
from dreambooth_moslora.photos import captions, folder, masks, photo_file
from dreambooth_moslora.photos.examine import examine
from dreambooth_moslora.plan.checks import check_folders, nearest_existing
from dreambooth_moslora.plan.memory import BYTES, BaseSize, plan_lines, precision_of, speed_here
from dreambooth_moslora.plan.plan import FEW_EXPOSURES, Plan, make_plan, shares
from dreambooth_moslora.settings import rules, table
from dreambooth_moslora.settings.prompts import subject_of
from dreambooth_moslora.settings.sources import DEFAULTS


def advice(plan: Plan) -> list[str]:
    lines, seen, needed = (
        rules.remarks(plan.config),
        plan.steps.exposures_a_photo,
        plan.cost.disk_gib,
    )
    if seen < FEW_EXPOSURES:
        many = "a subject needs 100 or more: set --exposures_per_photo or --max_train_steps"
        lines.append(f"each photo is seen about {seen:.0f} times, and {many}")
    warm_up, steps = plan.config.lr_warmup_steps, plan.steps.total_steps
    if plan.config.lr_scheduler != "constant" and warm_up >= steps:
        lines.append(
            f"the learning rate rises for {warm_up} steps, and the run has {steps}: set --lr_warmup_steps"
        )
    facts = plan.base.facts
    if (
        facts is not None
        and facts.has_negative
        and (flag := rules.given_flag(plan.config, "guidance_scale"))
    ):
        lines.append(
            f"{flag} has no effect with {facts.title}, which is told no guidance in training"
        )
    if (free := free_disk_gib(plan.config)) < needed:
        lines.append(
            f"the disk has too little room: the run writes {needed:.2f} GiB, {free:.1f} GiB are free"
        )
    is_unet = facts is None or facts.denoiser == "unet"
    return lines + [dora_note(has_kohya_file=is_unet)] * plan.config.use_dora


def free_disk_gib(config: table.TrainConfig) -> float:
    """GiB free on the disk of the run folder, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(Path(config.output_dir))).free / GIB


def describe_run(config: table.TrainConfig, report: folder.PhotoReport | None = None) -> str:
    """The report of `--dry_run`, with settings as TOML. Raises UserError for what training would
    refuse."""
    check_folders(config)
    queue.check_free(Path(config.output_dir))
    plan = make_plan(config, report)
    if config.resume_from_checkpoint:
        from dreambooth_moslora.training.checkpoint import resume_point

        resume_point(plan.config, run_folder.RunDir(config.output_dir))
    config, report = plan.config, examine(plan.photo_report, config.resolution)
    speed = f"speed: {speed_here(config, plan.steps.total_steps).sentence()}"
    sections = {
        "cost (estimated)": [*cost_lines(plan), *plan_lines(config, plan.cost.size), speed],
        "steps": step_lines(plan),
        "photos": [*photo_lines(config, report), *made_lines(config, report)],
        "settings that are not the defaults (--help_all shows those)": changed_lines(config),
        "remarks": advice(plan),
    }
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in sections.items() if lines)


def changed_lines(config: table.TrainConfig) -> list[str]:
    """Those of the run that this one tells of. What `train` requires has no default, but several
    subjects their own."""
    values, required = config.to_dict() | {"dry_run": False}, {*table.named("required")}
    required -= {*table.named("per_subject")} if config.subjects else set()
    shown = {
        name: value for name, value in values.items() if value != DEFAULTS[name] or name in required
    }
    return [f"{name} = {as_toml(value)}" for name, value in shown.items()]


def as_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {as_toml(one)}" for name, one in value.items()) + "}"
    return "[" + ", ".join(map(as_toml, value)) + "]" if isinstance(value, list) else repr(value)


def photo_lines(config: table.TrainConfig, report: folder.PhotoReport) -> list[str]:
    """A line for each photo; with `--enable_bucket` the sizes of the crops, and of class images."""
    lines = []
    for photo in report.photos:
        about = f"{photo.path.name}  {photo.size_px[1]} x {photo.size_px[0]}  {photo_file.quoted(photo)}"
        lines.append("; ".join([about, *photo.reasons]))
    lines += [f"left out: {item.path.name}  {item.reason}" for item in report.skipped]
    if config.enable_bucket:
        rule = photo_file.crop_rule(config)
        counts = Counter(rule.target(photo.size_px) for photo in report.photos)
        lines.append(f"cropped to {sizes_in_words(counts)}")
        if config.draws_class_images:
            drawn = Counter(shares(counts, config.num_class_images))
            lines.append(
                f"class images, where none are given, in the same proportion: {sizes_in_words(drawn)}"
            )
    return lines


def sizes_in_words(counts: Counter[tuple[int, int]]) -> str:
    return ", ".join(
        f"{width} x {height} px ({count})" for (height, width), count in counts.most_common()
    )


def made_lines(config: table.TrainConfig, report: folder.PhotoReport) -> list[str]:
    """The instance prompt's share, and what would be made. Raises UserError when no word says what
    to look for."""
    subjects, made = config.each_subject, "makes them before training"
    lines = list(filter(None, [folder.bare_prompt_line(config, report.photos)]))
    bare = sum(not photo.is_captioned for photo in report.photos)
    if config.captions == "auto" and bare:
        captioner = captions.load_captioner(subjects[0])
        lines.append(f"captions: {bare} photos have none of their own; {captioner.name} {made}")
    bare = [photo for photo in report.photos if photo.mask_path is None]
    if config.masks == "auto" and bare:
        words = dict.fromkeys(masks.sought_word(subjects[photo.subject]) for photo in bare)
        sought = f", looking for {', '.join(f'“{word}”' for word in words)}" if any(words) else ""
        name = public_name(masks.segmenter_name(config))
        lines.append(f"masks: {len(bare)} photos have none; {name} {made}{sought}")
    return lines


def step_lines(plan: Plan) -> list[str]:
    config, steps = plan.config, plan.steps
    lines = [steps.sentence()]
    if config.crops_per_photo > 1:
        lines.append(f"{config.crops_per_photo} crops of each photo take turns, one an epoch")
    subjects = config.each_subject
    if config.with_prior_preservation:
        source = (
            f"{config.num_class_images} class images"
            if config.prior == "class_images"
            else "the base's answer"
        )
        prompts = ", ".join(
            f"“{prompt}”" for prompt in dict.fromkeys(one.class_prompt for one in subjects)
        )
        if config.prior == "adapter_off" and config.prior_prompts:
            prompts += f" or, for about half of them, to one of --prior_prompts ({len(config.prior_prompts)})"
        lines.append(f"as many prior examples beside {beside(config)}, from {source} to {prompts}")
    for one, count in zip(subjects, steps.photo_counts):
        subject = subject_of(one)
        words = f"token “{subject.token}”, class “{subject.class_word}”"
        seen = f", {count} photos seen about {steps.exposures_a_subject / count:.0f} times each"
        lines.append(f"“{one.instance_prompt}”: {words}{seen}" if config.subjects else words)
    return lines


def beside(config: table.TrainConfig) -> str:
    """What has prior examples beside it, and where some have none, the images that a process passes
    in a step."""
    if config.prior_every == 1:
        return "them"
    found = (config.mean_images_a_micro_batch, config.images_a_micro_batch)
    mean, whole = (images * config.gradient_accumulation_steps for images in found)
    share = f"one of {config.prior_every} micro-batches, at {config.prior_every} times the weight"
    return f"{share} ({mean:g} images a step instead of {whole})"


def cost_lines(plan: Plan) -> list[str]:
    cost, size = plan.cost, plan.cost.size
    memory = f"encoding {cost.encoding_gib:.2f} GiB, training {cost.training_gib:.2f} GiB, "
    memory += f"samples {cost.sampling_gib:.2f} GiB"
    if size.family.style == "flow":
        encoders = size.text_encoders * BYTES[precision_of(plan.config)] / GIB
        memory += f"; text encoders {encoders:.2f} GiB, gone before training, on the CPU where the GPU lacks that"
    layers = size.adapted_layers + size.text_layers * plan.config.train_text_encoder
    disk = f"{cost.disk_gib:.2f} GiB, {cost.checkpoint_gib:.3f} GiB a checkpoint"
    return [
        f"adapter: {cost.adapter_parameters:,} parameters on {layers} layers; base: {base_in_words(size)}",
        f"memory: {memory}",
        f"disk: {disk}; free: {free_disk_gib(plan.config):.1f} GiB",
    ]


def base_in_words(size: BaseSize) -> str:
    """Where the numbers of a base come from."""
    if size.is_measured:
        return "counted in its files"
    facts = size.family
    of, layers = (
        f"{facts.title}'s",
        "attention alone" if facts.style == "ddpm" else "its usual layers",
    )
    why = "as its files are not here"
    if size.is_assumed:
        of = f"that of {size.hub_id}" if size.hub_id else of
        why = "as its size is not known without its .safetensors files"
        why += "" if size.hub_id else ", nor its family, which the hub does not tell"
    return f"taken to be {of}, with the adapter on {layers}, {why}"
