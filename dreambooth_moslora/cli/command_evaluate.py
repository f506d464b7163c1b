"""Commands `evaluate` and `explain`.

`evaluate RUN_OR_FILE --photos DIR` writes report.html and scores.json of one adapter. `explain RUN`
tells what a run's figures mean, and which flag to try next.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.library_notes import disable_library_notes
from dreambooth_moslora.cli.terminal import create_bar, print_loading
from dreambooth_moslora.disk.contents import explain_read_error, read_json, read_small_text
from dreambooth_moslora.disk.paths import expand_user_path, find_asset
from dreambooth_moslora.disk.run_folder import RunDir, find_weights
from dreambooth_moslora.disk.safetensors_header import read_header
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.photos.folder import build_photo_report, log_strays, require_photo_folder
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.plan.validation import check_references, require_output_folder
from dreambooth_moslora.settings import (
    config_files,
    metric_kinds,
    setting_names,
    subject_kinds,
    train_config,
)
from dreambooth_moslora.settings.family_facts import get_text_options
from dreambooth_moslora.training import run_advice
from dreambooth_moslora.training.run_metrics import RunMetrics, load_run_metrics

if TYPE_CHECKING:
    from dreambooth_moslora.evaluation.metrics import Encoders
    from dreambooth_moslora.evaluation.protocol import EvaluationPlan
    from dreambooth_moslora.evaluation.scoring import Evaluation, Evaluator
    from dreambooth_moslora.generation.pipeline import SubjectPipeline


EVALUATE_EPILOG = """examples:
  evaluate runs/dog
  evaluate dog.safetensors --photos photos/dog --base stabilityai/stable-diffusion-xl-base-1.0"""
"""End of the help."""


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    # What to judge; most of it is read from the run or the file
    parser.epilog = EVALUATE_EPILOG
    parser.add_argument(
        "adapter", metavar="RUN_OR_FILE", help="a run folder, its best/ folder, or a LoRA file"
    )
    parser.add_argument(
        "--photos",
        metavar="DIR",
        help="the real photos (default: those that the run was trained on)",
    )
    parser.add_argument(
        *setting_names.list_flags("pretrained_model_name_or_path"),
        dest="base",
        metavar="BASE",
        help='base model (default: what the run or the file says; "toy" is the embedded one)',
    )
    parser.add_argument(
        "--instance_prompt", help='"a photo of sks dog" (default: what the run or the file says)'
    )
    parser.add_argument(
        "--class_word", help="the kind of thing it is (default: read from the prompt)"
    )
    parser.add_argument(
        "--reference",
        action="store_true",
        help="also generate with the base and photos as references, without the adapter and with "
        "it, and say whether training was worth it; for families that take references",
    )
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="where the report goes (default: evaluation/ in the run; for its best/ "
        "best_evaluation/)",
    )

    # How to judge it
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--prompts",
        default="auto",
        help="auto (default), object, live, person, toy, style, toy_style, or a text file with a "
        "prompt on each line, {} for the subject",
    )
    group.add_argument(
        "--num_prompts", type=int, help="how many of them to use, evenly spread (default: all)"
    )
    group.add_argument(
        "--images_per_prompt",
        type=int,
        default=4,
        help="images of each, of seeds 0, 1, … (default: 4)",
    )
    group.add_argument(
        "--class_images", type=int, default=16, help="images of the bare class (default: 16)"
    )
    group.add_argument(
        "--inference_steps", type=int, default=25, help="denoising steps (default: 25)"
    )
    group.add_argument(
        "--guidance_scale",
        type=float,
        help="how closely to follow prompts (default: the base's own)",
    )
    group.add_argument(
        "--scale", type=float, default=1.0, help="the adapter's strength (default: 1)"
    )
    for flag, title in (("--clip", "CLIP"), ("--dino", "DINOv2")):
        group.add_argument(
            flag,
            default="",
            help=f"{title} by hub id or folder (default: ViT-L/14 and dinov2-base, for the toy "
            "its own)",
        )


def run_evaluate(args: argparse.Namespace) -> int:
    """Generate, score and report. Raises UserError."""
    # Check the arguments before torch is imported.
    check_paths(args)
    folder = require_output_folder(args.output_dir or get_default_folder(args))
    config = resolve_config(args)
    base = args.base or Base.of_run(config)
    if args.reference:
        check_references(Base.find(base), config, "--reference")
    print_loading()
    from dreambooth_moslora.evaluation import report
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    disable_library_notes()

    # Plan the evaluation of each subject by its photos.
    photo_report = build_photo_report(config)
    log_strays(photo_report)
    subjects = config.each_subject
    photos_by_subject = report.split_photos(photo_report.photos, len(subjects))
    plans = [
        build_plan(args, subject, subject_photos)
        for subject, subject_photos in zip(subjects, photos_by_subject)
    ]

    # Load the pipeline and the encoders.
    pipeline = SubjectPipeline.from_base(base)
    name = pipeline.load_adapter(find_asset(args.adapter))
    guidance = args.guidance_scale
    if guidance is None:
        guidance = pipeline.guidance_scale
    evaluators = report.build_evaluators(
        subjects=subjects,
        photos=photo_report.photos,
        plans=plans,
        encoders=load_device_encoders(args, config, pipeline),
        size_px=pipeline.resolution_px,
    )

    # Generate and score the images of each subject.
    evaluations = evaluate_subjects(args, config, evaluators, pipeline, name, guidance)

    # Write the report, and print its summary.
    context = report.ReportContext(
        adapter=name,
        base=pipeline.base_name,
        encoders=evaluators[0].encoders.names,
        inference_steps=evaluators[0].plan.inference_steps,
        guidance_scale=guidance,
        adapter_scale=args.scale,
    )
    files = report.write_reports(
        folder=folder, evaluators=evaluators, evaluations=evaluations, context=context
    )
    merged = report.merge_evaluations(evaluations)
    print(format_summary(merged))
    print(
        run_advice.judge_run(
            RunMetrics(
                config,
                scores=merged.list_logged_scores(),
                copy_alarm=merged.alarm.raised,
                no_score=merged.no_score,
            )
        )
    )
    for evaluation in evaluations:
        if evaluation.beside:
            print(f"{'references':18} {evaluation.beside.verdict}")
    for file in files:
        print(file)
    return 0


def load_device_encoders(
    args: argparse.Namespace, config: train_config.TrainConfig, pipeline: "SubjectPipeline"
) -> "Encoders":
    """Load the encoders that score the images, on the device where the pipeline generates them."""
    from dreambooth_moslora.base import families
    from dreambooth_moslora.evaluation import metrics

    return metrics.load_encoders(
        config.pretrained_model_name_or_path,
        args.clip,
        args.dino,
        families.get_denoiser(pipeline.pipeline).device,
        subject_kinds.has_face_subject(config.each_subject),
    )


def evaluate_subjects(
    args: argparse.Namespace,
    config: train_config.TrainConfig,
    evaluators: "list[Evaluator]",
    pipeline: "SubjectPipeline",
    name: str,
    guidance: float,
) -> "list[Evaluation]":
    """Return the evaluation of each subject, with one bar over all images.

    args: of the command
    config: the run's settings
    evaluators: of the subjects
    pipeline: that generates the images
    name: of the adapter in it
    guidance: scale of all images
    """
    from dreambooth_moslora.evaluation import reference_arms, scoring

    # Reference images are generated without the adapter and with it.
    plans = [evaluator.plan for evaluator in evaluators]
    image_count = sum(map(count_images, plans))
    if args.reference:
        image_count += 2 * sum(len(plan.subject_requests) for plan in plans)
    with create_bar(image_count, "generating images", "image") as bar:
        evaluate = partial(
            scoring.evaluate_adapter,
            pipeline,
            name,
            on_picture=bar.update,
            guidance_scale=guidance,
            text_options=get_text_options(config),
        )
        evaluations = [evaluate(evaluator, scale=args.scale) for evaluator in evaluators]
        if args.reference:
            for evaluator, evaluation in zip(evaluators, evaluations):
                evaluation.beside = reference_arms.evaluate_arms(
                    evaluator, evaluation, evaluate, args.scale
                )
    return evaluations


def check_paths(args: argparse.Namespace) -> None:
    """Raise UserError for a missing file or folder, before torch is imported."""
    path = Path(find_asset(args.adapter))
    if not any(RunDir(folder).config_path.is_file() for folder in (path, path.parent)):
        find_weights(path)
    if args.photos:
        require_photo_folder(Path(find_asset(args.photos)))
    if args.base:
        Base.find(args.base)


def count_images(plan: "EvaluationPlan") -> int:
    """Return how many images are generated, with the adapter and by the base."""
    shared_count = len(plan.subject_requests) + plan.class_images + len(plan.unrelated_requests)
    return 2 * shared_count + len(plan.bare_requests)


def resolve_config(args: argparse.Namespace) -> train_config.TrainConfig:
    """Return the settings to evaluate: arguments, then the run folder's configuration, then the
    file's header. Raises UserError."""
    settings = infer_settings(Path(find_asset(args.adapter)))

    # Several subjects come from the run alone.
    if settings.get("subjects"):
        if args.photos or args.instance_prompt or args.class_word:
            raise UserError(
                "it has several subjects, which are judged together: leave out --photos, "
                "--instance_prompt and --class_word."
            )
        if args.base:
            settings["pretrained_model_name_or_path"] = args.base
        return train_config.TrainConfig.from_dict(settings)

    # A single subject: arguments override the run or the file.
    overrides = {}
    for name, flag, value in (
        ("pretrained_model_name_or_path", "--base", args.base),
        ("instance_prompt", "--instance_prompt", args.instance_prompt),
        ("instance_data_dir", "--photos", args.photos),
    ):
        overrides[name] = value or settings.get(name)
        if not overrides[name]:
            raise UserError(f"{args.adapter} does not say it: give {flag}.")
    if args.class_word:
        overrides["class_word"] = args.class_word

    # Masks and captions that the run has made belong to its photos, not to others.
    if args.photos:
        folder = Path(find_asset(args.photos))
        left_out = [name for name in settings.get("leave_out", ()) if (folder / name).exists()]
        overrides |= {"masks": "given", "captions": "given", "leave_out": left_out}
    return train_config.TrainConfig.from_dict(settings | overrides)


def infer_settings(path: Path) -> dict:
    """Return the settings of the run with the file or folder, or else those in the header of a file
    that this program has published."""
    from dreambooth_moslora.lora.metadata import parse_metadata

    # A run's folder, which may have been moved, or a folder in it
    for folder in (path, path.parent):
        config = RunDir(folder).config_path
        if config.is_file():
            return config_files.drop_removed_settings(read_json(config)) | {
                "output_dir": str(folder)
            }

    # A file alone
    metadata = parse_metadata(read_header(find_weights(path)).metadata)
    if metadata is None or not metadata.trigger_words:
        return {}
    base = "toy" if metadata.base_id == "toy-sdxl" else metadata.base_id
    settings = {"pretrained_model_name_or_path": base}
    if metadata.subject_prompts:  # several subjects: the user must choose one
        return settings
    settings["instance_prompt"] = f"a photo of {metadata.trigger_words[0]}"
    settings["class_word"] = metadata.class_word
    if metadata.resolution_px:
        settings["resolution"] = metadata.resolution_px
    return settings


def build_plan(
    args: argparse.Namespace, subject: train_config.TrainConfig, photos: Sequence[Photo]
) -> "EvaluationPlan":
    """Return the flags' plan for a subject, without places that its photos' captions name. Raises
    UserError."""
    from dreambooth_moslora.evaluation.protocol import build_subject_plan, pick_evenly

    file = expand_user_path(args.prompts)
    plan = build_subject_plan(
        subject,
        photos,
        "auto" if file.is_file() else args.prompts,
        seeds=tuple(range(args.images_per_prompt)),
        class_images=args.class_images,
        inference_steps=args.inference_steps,
    )

    # A file of the user replaces the prompts.
    if file.is_file():
        try:
            lines = map(str.strip, read_small_text(file).splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {file}: {explain_read_error(error)}.") from error
        plan = replace(plan, templates=tuple(filter(None, lines)))

    if args.num_prompts:
        plan = replace(plan, templates=pick_evenly(plan.templates, args.num_prompts))
    return plan


def get_default_folder(args: argparse.Namespace) -> Path:
    """Return the default folder of the report. For `best/` or a checkpoint it is a sibling, as the
    run replaces or removes these."""
    path = expand_user_path(args.adapter)
    run_dir = RunDir(path)
    parent = RunDir(path.parent)
    is_whole = path.is_dir() and (run_dir.config_path.is_file() or not parent.config_path.is_file())
    return run_dir.evaluation_dir if is_whole else path.with_name(f"{path.stem}_evaluation")


def format_summary(evaluation: "Evaluation") -> str:
    """Return the scores in words, one a line, with their 95 % intervals and the base's own."""
    lines = []
    for name, line in metric_kinds.describe_scores(evaluation.list_logged_scores()).items():
        if name in evaluation.tables:
            interval = evaluation.interval(name)
            if interval.low is not None:  # a single value has none
                line += f" ({interval.low:.0%} to {interval.high:.0%})"
        base_name = metric_kinds.METRICS[name].base
        if base_name in evaluation.tables:
            line += f"; the base's images {evaluation.mean(base_name):.0%}"
        lines.append(line)
    if evaluation.score is None:
        lines.append(f"no score: {evaluation.no_score}")
    return "\n".join(lines)


STATE_PHRASES = {"done": "it ended", "interrupted": "it was stopped", "failed": "it failed"}
"""State of a run -> begin of the first line of `explain`."""


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `explain`."""
    parser.add_argument(
        "run", metavar="RUN", help="a run folder; its scores, if any, are those of its evaluations"
    )


def run_explain(args: argparse.Namespace) -> int:
    """Print what a run's figures mean. Raises UserError for a folder without a run."""
    run_metrics = load_run_metrics(RunDir(args.run))

    # Say how far the run came.
    exposures = ""
    if run_metrics.exposures is not None:
        exposures = (
            f"; each of {run_metrics.photos:g} photos was shown {run_metrics.exposures:.0f} times"
        )
    is_early = (
        run_metrics.planned_steps is not None and run_metrics.step < run_metrics.planned_steps
    )
    steps = (
        f"{run_metrics.step} of {run_metrics.planned_steps} steps"
        if is_early
        else f"{run_metrics.step} steps"
    )
    print(
        escape_control_characters(
            f"{STATE_PHRASES.get(run_metrics.state, 'it has not ended')} after {steps}{exposures}"
        )
    )

    # Say what its evaluation found, or why it has no score.
    if run_metrics.scores or run_metrics.no_score:
        print(escape_control_characters(run_advice.judge_run(run_metrics)))
    if run_metrics.verdict:
        print(escape_control_characters(f"beside reference images: {run_metrics.verdict}"))

    # Print how to resume, and the advice.
    hints = run_advice.list_resume_hints(run_metrics)
    advice = run_advice.list_advice(run_metrics)
    for line in hints:
        print(escape_control_characters(line))
    if not (hints or advice):
        print(run_advice.NO_ADVICE)
    if advice:
        print(escape_control_characters("\n  ".join(["what to try next", *advice])))
    return 0
