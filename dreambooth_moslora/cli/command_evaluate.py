"""`evaluate RUN_OR_FILE --photos DIR`: report.html and scores.json of one adapter. `explain RUN`:
what a run's figures mean, and which flag to try next."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.terminal import create_bar, disable_library_notes, print_loading
from dreambooth_moslora.disk.contents import explain_read_error, read_json, read_small_text
from dreambooth_moslora.disk.paths import expand_user_path, find_asset
from dreambooth_moslora.disk.run_folder import RunDir, find_weights, read_header
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.photos.folder import build_photo_report, log_strays, require_photo_folder
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.plan.validation import check_references, require_output_folder
from dreambooth_moslora.settings import config_files, metric_kinds, subject_kinds, train_config
from dreambooth_moslora.settings.family_facts import get_text_options
from dreambooth_moslora.training import run_advice
from dreambooth_moslora.training.run_metrics import load_run_metrics

if TYPE_CHECKING:
    from dreambooth_moslora.evaluation.metrics import Encoders
    from dreambooth_moslora.evaluation.protocol import EvaluationPlan
    from dreambooth_moslora.evaluation.scoring import Evaluation, Evaluator
    from dreambooth_moslora.generation.pipeline import SubjectPipeline


EVALUATE_EPILOG = """examples:
  evaluate runs/dog
  evaluate dog.safetensors --photos photos/dog --base stabilityai/stable-diffusion-xl-base-1.0"""


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    # What to judge; the run or the file says most of it
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
        *train_config.list_flags("pretrained_model_name_or_path"),
        dest="base",
        metavar="BASE",
        help='base model (default: what the run or the file says; "toy" is the embedded one)',
    )
    parser.add_argument(
        "--instance_prompt", help='"a photo of sks dog" (default: what the run or the file says)'
    )
    parser.add_argument(
        "--class_word", help="the kind of thing it is (default: found in the prompt)"
    )
    about_reference = (
        "also draw by the base with photos as references, without the adapter and with it, and say "
        "whether training was worth it; for families that take references"
    )
    parser.add_argument("--reference", action="store_true", help=about_reference)
    about_folder = (
        "where the report goes (default: evaluation/ in the run; for its best/ best_evaluation/)"
    )
    parser.add_argument("--output_dir", metavar="DIR", help=about_folder)

    # How to judge it
    group = parser.add_argument_group("protocol")
    about = (
        "auto (default), object, live, person, toy, style, toy_style, or a text file with a prompt "
        "on each line, {} for the subject"
    )
    group.add_argument("--prompts", default="auto", help=about)
    group.add_argument(
        "--num_prompts", type=int, help="how many of them to use, evenly spread (default: all)"
    )
    about = "pictures of each, of seeds 0, 1, … (default: 4)"
    group.add_argument("--images_per_prompt", type=int, default=4, help=about)
    group.add_argument(
        "--class_images", type=int, default=16, help="pictures of the bare class (default: 16)"
    )
    group.add_argument(
        "--inference_steps", type=int, default=25, help="denoising steps (default: 25)"
    )
    about_guidance = "how closely to follow prompts (default: the base's own)"
    group.add_argument("--guidance_scale", type=float, help=about_guidance)
    group.add_argument(
        "--scale", type=float, default=1.0, help="the adapter's strength (default: 1)"
    )
    about = "by hub id or folder (default: ViT-L/14 and dinov2-base, for the toy its own)"
    group.add_argument("--clip", default="", help=f"CLIP {about}")
    group.add_argument("--dino", default="", help=f"DINOv2 {about}")


def run_evaluate(args: argparse.Namespace) -> int:
    """Draw, score and report. Raises UserError."""
    # All that can be wrong with the arguments, before torch is imported
    check_paths(args)
    folder = require_output_folder(args.output_dir or get_default_folder(args))
    config = resolve_config(args)
    base = args.base or Base.of_run(config)
    if args.reference:
        check_references(Base.find(base), config, "--reference")
    print_loading()
    from dreambooth_moslora.base import load
    from dreambooth_moslora.evaluation import report
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    disable_library_notes()

    # The photos, and what is asked of each subject
    folders = build_photo_report(config)
    log_strays(folders)
    subjects = config.each_subject
    of_each = report.split_photos(folders.photos, len(subjects))
    plans = [build_plan(args, subject, own) for subject, own in zip(subjects, of_each)]

    # The models: what draws, and what looks
    pipeline = SubjectPipeline.from_base(base)
    name = pipeline.load_adapter(find_asset(args.adapter))
    guidance = args.guidance_scale
    if guidance is None:
        guidance = load.get_default_guidance(pipeline.pipeline)
    evaluators = report.build_evaluators(
        subjects=subjects,
        photos=folders.photos,
        plans=plans,
        encoders=load_device_encoders(args, config, pipeline),
        size_px=pipeline.resolution_px,
    )

    # Pictures and scores of each subject
    found = evaluate_subjects(args, config, evaluators, pipeline, name, guidance)

    # The files, and the figures on the terminal
    about = report.ReportContext(
        adapter=name,
        base=pipeline.base_name,
        encoders=evaluators[0].encoders.names,
        inference_steps=evaluators[0].plan.inference_steps,
        guidance_scale=guidance,
        adapter_scale=args.scale,
    )
    files = report.write_reports(
        folder=folder, evaluators=evaluators, evaluations=found, context=about
    )
    print(format_summary(report.merge_evaluations(found)))
    for one in found:
        if one.beside:
            print(f"{'references':18} {one.beside.verdict}")
    for file in files:
        print(file)
    return 0


def load_device_encoders(
    args: argparse.Namespace, config: train_config.TrainConfig, pipeline: "SubjectPipeline"
) -> "Encoders":
    """What looks at the pictures, on the device where the pipeline draws them."""
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
    """The evaluation of each subject, with one bar over all pictures.

    args: of the command
    config: the run's settings
    evaluators: of the subjects
    pipeline: that draws
    name: of the adapter in it
    guidance: of all pictures
    """
    from dreambooth_moslora.evaluation import reference_arms, scoring

    # References are drawn without the adapter and with it.
    plans = [evaluator.plan for evaluator in evaluators]
    count = sum(map(count_images, plans))
    if args.reference:
        count += 2 * sum(len(plan.subject_requests) for plan in plans)
    with create_bar(count, "drawing pictures", "picture") as shown:
        judge = partial(
            scoring.evaluate_adapter,
            pipeline,
            name,
            on_picture=shown.update,
            guidance_scale=guidance,
            text_options=get_text_options(config),
        )
        found = [judge(evaluator, scale=args.scale) for evaluator in evaluators]
        if args.reference:
            for evaluator, one in zip(evaluators, found):
                one.beside = reference_arms.evaluate_arms(evaluator, one, judge, args.scale)
    return found


def check_paths(args: argparse.Namespace) -> None:
    """Raises UserError for a file or folder that is not there, before torch is imported."""
    path = Path(find_asset(args.adapter))
    if not any(RunDir(folder).config_path.is_file() for folder in (path, path.parent)):
        find_weights(path)
    if args.photos:
        require_photo_folder(Path(find_asset(args.photos)))
    if args.base:
        Base.find(args.base)


def count_images(plan: "EvaluationPlan") -> int:
    """How many pictures are drawn, by the adapter and by the base."""
    by_both = len(plan.subject_requests) + plan.class_images + len(plan.unrelated_requests)
    return 2 * by_both + len(plan.bare_requests)


def resolve_config(args: argparse.Namespace) -> train_config.TrainConfig:
    """What to evaluate, from the arguments, the run folder's configuration and the file's header.
    Raises UserError."""
    known = infer_settings(Path(find_asset(args.adapter)))

    # Several subjects, as the run has them
    if known.get("subjects"):
        if args.photos or args.instance_prompt or args.class_word:
            raise UserError(
                "it has several subjects, which are judged together: leave out --photos, "
                "--instance_prompt and --class_word."
            )
        if args.base:
            known = known | {"pretrained_model_name_or_path": args.base}
        return train_config.TrainConfig.from_dict(known)

    # A single one: what the arguments say, else what the run or the file says
    base = args.base or known.get("pretrained_model_name_or_path")
    prompt = args.instance_prompt or known.get("instance_prompt")
    photos = args.photos or known.get("instance_data_dir")
    for value, flag in ((base, "--base"), (prompt, "--instance_prompt"), (photos, "--photos")):
        if not value:
            raise UserError(f"{args.adapter} does not say it: give {flag}.")
    chosen = {
        "pretrained_model_name_or_path": base,
        "instance_prompt": prompt,
        "instance_data_dir": photos,
    }
    if args.class_word:
        chosen["class_word"] = args.class_word

    # Masks and captions that the run has made belong to its own photos.
    if args.photos:
        there = Path(find_asset(photos))
        left_out = [name for name in known.get("leave_out", ()) if (there / name).exists()]
        chosen |= {
            "masks": "given",
            "captions": "given",
            "leave_out": left_out,
        }
    return train_config.TrainConfig.from_dict(known | chosen)


def infer_settings(path: Path) -> dict:
    """The settings of the run with the file or folder; else those in the header of a file that we
    published."""
    from dreambooth_moslora.lora.metadata import parse_metadata

    # A run's folder, which may have been moved, or one in it
    for folder in (path, path.parent):
        config = RunDir(folder).config_path
        if config.is_file():
            return config_files.drop_removed_settings(read_json(config)) | {
                "output_dir": str(folder)
            }

    # A file alone
    facts = parse_metadata(read_header(find_weights(path)))
    if facts is None or not facts.trigger_words:
        return {}
    base = "toy" if facts.base_id == "toy-sdxl" else facts.base_id
    known = {"pretrained_model_name_or_path": base}
    if facts.subject_prompts:  # of several the user must choose one
        return known
    known["instance_prompt"] = f"a photo of {facts.trigger_words[0]}"
    known["class_word"] = facts.class_word
    if facts.resolution_px:
        known["resolution"] = facts.resolution_px
    return known


def build_plan(
    args: argparse.Namespace, subject: train_config.TrainConfig, photos: Sequence[Photo]
) -> "EvaluationPlan":
    """The flags' plan for a subject, without places in its photos' captions. Raises UserError."""
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

    # The user's own prompts
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
    """Where the report goes by default. That of `best/` or of a checkpoint lies beside it, as the
    run replaces or removes these."""
    path = expand_user_path(args.adapter)
    home = RunDir(path)
    parent = RunDir(path.parent)
    is_whole = path.is_dir() and (home.config_path.is_file() or not parent.config_path.is_file())
    return home.evaluation_dir if is_whole else path.with_name(f"{path.stem}_evaluation")


def format_summary(evaluation: "Evaluation") -> str:
    """The chosen measures and the score, one a line."""
    lines = []
    for name, row in metric_kinds.METRICS.items():
        if row.summary and name in evaluation.tables:
            lines.append(f"{name:18} {evaluation.interval(name)}")
    alarm = "no copy alarm"
    if evaluation.alarm.raised:
        alarm = f"copy alarm: {evaluation.alarm.share:.0%} of the pictures are copies"
    score = (
        f"{evaluation.score:.3f}"
        if evaluation.score is not None
        else f"none: {evaluation.no_score}"
    )
    return "\n".join([*lines, f"{'score':18} {score}  ({alarm})"])


# State of a run -> how `explain` begins
STATE_PHRASES = {"done": "it ended", "interrupted": "it was stopped", "failed": "it failed"}


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="a run folder; its scores, if any, are those of its evaluations"
    )


def run_explain(args: argparse.Namespace) -> int:
    """Print what a run's figures point to. Raises UserError for a folder without a run."""
    found = load_run_metrics(RunDir(args.run))

    # How far it came
    shown = ""
    if found.exposures is not None:
        shown = f"; each of {found.photos:g} photos was shown {found.exposures:.0f} times"
    is_early = found.planned_steps is not None and found.step < found.planned_steps
    steps = f"{found.step} of {found.planned_steps} steps" if is_early else f"{found.step} steps"
    print(
        escape_control_characters(
            f"{STATE_PHRASES.get(found.state, 'it has not ended')} after {steps}{shown}"
        )
    )

    if found.verdict:
        print(escape_control_characters(f"beside reference pictures: {found.verdict}"))

    # How it goes on, and the advice
    leads = run_advice.list_resume_hints(found)
    advice = run_advice.list_advice(found)
    for line in leads:
        print(escape_control_characters(line))
    if not (leads or advice):
        advice = [run_advice.NO_ADVICE]
    if advice:
        print(escape_control_characters("\n  ".join(["what to try next", *advice])))
    return 0
