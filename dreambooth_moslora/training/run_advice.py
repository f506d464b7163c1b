"""Verdict on a run's metrics, advice on which flag to try next, and how to resume a run that ended
early.

    load_run_metrics(run folder) -> RunMetrics --VERDICTS--> one sentence
                                               --ADVICE_RULES--> sentences, most important first
                                               --format_resume_command--> a command

Thresholds come from the twelve trainings of `assets/studies/recipe` (six subjects with prior
preservation, which learn well, and six without, whose class became the subject), and from runs of
the embedded base with faults made on purpose.
"""

import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.defaults import DEFAULT_EXPOSURES
from dreambooth_moslora.plan.steps import EXPOSURES_ADVICE, MIN_EXPOSURES
from dreambooth_moslora.precision import FP16_OVERFLOW_ADVICE
from dreambooth_moslora.settings.prompts import get_class_word
from dreambooth_moslora.settings.subject_kinds import get_subject_kind
from dreambooth_moslora.settings.toy_bases import is_toy
from dreambooth_moslora.training.best_step import find_best_step
from dreambooth_moslora.training.run_metrics import MIN_LIKENESS_GAIN, RunMetrics

INSTALLED_PROGRAM = "dreambooth-moslora"
TRAIN_SCRIPT = "train_dreambooth.py"
MAX_ADVICE_LINES = 3
"""Of advice at the end of a run."""
NO_ADVICE = "No problem was detected in the scores. Look at the contact sheet yourself."
NOT_SCORED_NOTE = "Not scored. Run"
MIN_FINAL_LIKENESS = 0.6
"""Below it a subject is not recognised for certain: 0.61 at least in `assets/studies/recipe`."""
MIN_RISE_SHARE = 0.1
"""Of the likeness gained, in a run's last third: then more steps would help."""
MAX_SCORE_DROP = 0.03
"""Since the best step. A score from six pictures varies by about as much."""
MAX_CLASS_SHIFT = 1 / 3
"""Of the way from the base's class to the subject: below 0 in good runs, about 1 without prior
preservation."""
MAX_DRIFT = 1.5
"""Of the base's own spread: 0.3 to 1.3 in good runs, 1.4 to 4.0 without prior preservation."""
MIN_PROMPT_SHARE = 0.75
"""CLIP-T over the base's: 0.79 to 1.06 in runs that show the place, below 0.3 in others."""
MIN_BARE_LIKENESS = 1 / 2
"""Of the likeness gained: 0.15 without the bare prompt, 1.11 with a third of the exposures."""
BARE_SHARES = (0.25, 0.5)
"""Shares of the instance prompt to try, one after the other."""
MAX_BACKGROUND_LEAK = 0.25
"""Runs that kept their prompts, in all studies: 0.23 at most,
but for one subject, the tall cactus, with 0.31 to 0.46."""
MAX_CONTENT_LEAK = 0.1
"""Share of pictures with a thing that came with a style, above the base's."""
MIN_PHOTO_LIKENESS = 1 / 2
"""Of the likeness that photos have to each other: 0.31 at most for a photo of another toy, 0.83 at
least in the eight sample sets."""
MAX_CONFUSION = 0.25
"""Of the way from one subject to the other: 0.03 to 0.07 in a good run, 1/2 for the base."""
NON_FINITE_PATTERN = re.compile(
    r"the (?:loss|gradient) is \S+ at step \d+|the adapter is not finite after step \d+"
)
"""How a run fails whose numbers are no longer finite."""


def explain_steps(run: RunMetrics) -> Iterator[str]:
    """Yield advice on numbers that are not finite, and on too few steps or scores."""
    # Numbers that are no longer finite.
    non_finite = NON_FINITE_PATTERN.search(run.message) if run.state == "failed" else None
    if non_finite:
        rate = run.config.learning_rate
        alternative = f", or {FP16_OVERFLOW_ADVICE}" if run.config.mixed_precision == "fp16" else ""
        yield f"{non_finite[0]}: try --learning_rate {rate / 3:.1g} (it was {rate:g}){alternative}"

    # Too few steps, or none that anybody looked at.
    if is_too_short(run):
        exposures = f"each photo was shown {run.exposures:.0f} times, and {EXPOSURES_ADVICE}"
        yield f"{exposures}: try --exposures_per_photo {DEFAULT_EXPOSURES}"
    if run.step and not run.scores and run.state != "failed":
        yield describe_missing_scores(run)


def describe_missing_scores(run: RunMetrics) -> str:
    """Return how a run without scores gets some."""
    command = shlex.join([*spell_command("evaluate"), str(run.folder)])
    every = max(1, run.step // 5)
    return f"{NOT_SCORED_NOTE}: {command}, or give the next training --evaluate_steps {every}"


def explain_photos(run: RunMetrics) -> Iterator[str]:
    """Photos that show something else, which those of a style should."""
    likeness_by_photo = run.photo_likeness
    if not likeness_by_photo or get_subject_kind(run.config).is_style:
        return
    usual = median(likeness_by_photo.values())
    odd = [
        name for name in likeness_by_photo if likeness_by_photo[name] < MIN_PHOTO_LIKENESS * usual
    ]
    if odd:
        likeness = max(likeness_by_photo[name] for name in odd)
        flags = shlex.join(["--leave_out", *run.config.leave_out, *odd])
        them = "it" if len(odd) == 1 else "them"
        yield (
            f"{' and '.join(odd)} may show something else (DINO {likeness:.2f} to the others; "
            f"{usual:.2f} is usual here): look at {them}, and try {flags}"
        )


def explain_prompt(run: RunMetrics) -> Iterator[str]:
    """Yield advice on what came along with the subject: whole photos, or their surroundings."""
    config = run.config
    fewer = f"--max_train_steps {max(1, run.step * 2 // 3)}"

    # Whole photos.
    if run.copy_alarm:
        more = f"--crops_per_photo {max(8, 2 * config.crops_per_photo)}"
        copied = f"{run.scores.get('copied', 0.0):.0%} of the pictures repeat a photo"
        yield f"{copied}: try {more}, or fewer steps ({fewer})"

    # Their surroundings, which those of a style share. Only photos with masks have a leak.
    if get_subject_kind(config).is_style:
        return
    came = "the photos' surroundings came along"
    prompt_ratio = run.scores.get("clip_t_of_base", 1.0)
    leak = run.scores.get("background_leak")
    remedy = "add masks (name.mask.png beside each photo) and captions that name the surroundings"
    if leak is not None:
        lower = "--unmasked_weight 0" if config.unmasked_weight else fewer
        remedy = f"try {lower}, and captions that name the surroundings"
    if prompt_ratio < MIN_PROMPT_SHARE:
        yield f"{came} (CLIP-T is {prompt_ratio:.2f} of the base's): {remedy}"
    elif leak is not None and leak > MAX_BACKGROUND_LEAK:
        yield f"{came} (leak {leak:.2f}; 0 is none): {remedy}"


def explain_style(run: RunMetrics) -> Iterator[str]:
    """Yield advice on a thing that came along with a style."""
    more = run.scores.get("leak", 0.0) - run.scores.get("leak_base", 0.0)
    if more > MAX_CONTENT_LEAK:
        thing = f"“{run.leaked}”" if run.leaked else "a thing of the style's pictures"
        yield (
            f"{thing} comes with the style (unasked in {run.scores['leak']:.0%} of the pictures): "
            "say it in the captions of the pictures that show it, add pictures without it, or try "
            f"--max_train_steps {max(1, run.step * 2 // 3)}"
        )


def explain_bare_prompt(run: RunMetrics) -> Iterator[str]:
    """Yield advice on an instance prompt that does not show the subject without a place."""
    config = run.config
    moved = run.compute_shift("dino_bare")
    if moved is None or moved >= MIN_BARE_LIKENESS:
        return

    # A larger share of that prompt where captions lack it, else less that holds the class.
    shares = [share for share in BARE_SHARES if share > config.bare_prompt_share]
    if shares and run.without_bare_prompt:
        remedy = f"--instance_prompt_share {shares[0]:g}"
    elif config.with_prior_preservation and config.prior_loss_weight:
        remedy = f"--prior_loss_weight {config.prior_loss_weight / 2:g}"
    else:
        remedy = f"--exposures_per_photo {compute_more_exposures(run)}"
    prompts = " and ".join(f"“{subject.instance_prompt}”" for subject in config.each_subject)
    yield (
        f"{prompts} alone shows {max(moved, 0):.0%} of the likeness "
        f"that prompts with places show: try {remedy}"
    )


def explain_class(run: RunMetrics) -> Iterator[str]:
    """Other things that became the subject. One remedy is said once."""
    config = run.config
    word = get_class_word(config) or "thing"

    # More that holds the class, or something that does.
    if config.with_prior_preservation:
        remedy = f"--prior_loss_weight {2 * config.prior_loss_weight or 1:g}"
    elif get_subject_kind(config).is_style:  # which has no class
        remedy = f"--max_train_steps {max(1, run.step * 2 // 3)}"
    else:
        prompt = config.class_prompt or f"a photo of a {word}"
        remedy = f'--with_prior_preservation --prior adapter_off --class_prompt "{prompt}"'

    # Things of the subject's class, or other things.
    moved = run.compute_shift("pres")
    spread = run.scores.get("drift_of_spread", 0.0)
    if moved is not None and moved > MAX_CLASS_SHIFT:
        yield (
            f"every {word} turns into yours ({min(moved, 1.0):.0%} of the way to it): try {remedy}"
        )
    elif spread > MAX_DRIFT:
        # The base's answers hold other things only if prompts name some.
        holds_class = config.with_prior_preservation and config.prior == "adapter_off"
        if holds_class and not config.prior_prompts:
            remedy = "--prior_prompts"
        yield (
            f"pictures of other things changed, {spread:.1f} times what a new seed changes: "
            f"try {remedy}"
        )

    # Another subject of the run.
    confusion = run.scores.get("confusion", 0.0)
    if confusion > MAX_CONFUSION:
        more = max(compute_more_exposures(run), DEFAULT_EXPOSURES)
        yield (
            f"subjects are taken for each other (confusion {confusion:.2f}; "
            f"0: told apart as their photos are): try --exposures_per_photo {more}, "
            "and another rare word for each subject"
        )


def explain_length(run: RunMetrics) -> Iterator[str]:
    """Yield advice on a score that fell since its best step, and on a likeness that still rose in
    the last third."""
    # Too long.
    if len(run.score) > 1:
        last, score = run.score[-1]
        best = find_best_step(run.score)
        if best.score - score > MAX_SCORE_DROP:
            yield (
                f"the score fell from {best.score:.2f} at step {best.step} "
                f"to {score:.2f} at step {last}: "
                f"use best/, or try --max_train_steps {best.step}"
            )

    # Too short. Not of a style, which DINO does not see, nor for pictures that repeat photos, nor
    # where `explain_steps` says it.
    if get_subject_kind(run.config).is_style:
        return
    start = run.scores.get("dino_base")
    if start is not None and len(run.likeness) > 2 and not run.copy_alarm and not is_too_short(run):
        last, end = run.likeness[-1]
        two_thirds = [pair for pair in run.likeness if pair[0] <= last * 2 / 3]
        before, earlier = two_thirds[-1] if two_thirds else run.likeness[0]
        if end - start > 0 and end - earlier > MIN_RISE_SHARE * (end - start):
            yield (
                f"likeness still rose at the end (DINO {earlier:.2f} at step {before}, "
                f"{end:.2f} at step {last}): "
                f"try --exposures_per_photo {compute_more_exposures(run)}"
            )


def is_too_short(run: RunMetrics) -> bool:
    """Return whether photos were shown too rarely, which `explain_steps` says; False for a run that
    has shown none."""
    return run.exposures is not None and 0 < run.exposures < MIN_EXPOSURES


def compute_more_exposures(run: RunMetrics) -> int:
    """Half as many exposures again, rounded up to tens; after a short run the usual number."""
    if is_too_short(run):
        return DEFAULT_EXPOSURES

    # The flag counts those of a photo of the largest subject.
    exposures = run.exposures or DEFAULT_EXPOSURES
    if run.exposures and run.largest_subject_photos:
        exposures *= run.photos / (len(run.config.subjects) * run.largest_subject_photos)
    return math.ceil(0.15 * exposures) * 10


def get_likeness_change(run: RunMetrics) -> tuple[float, float] | None:
    """Return the likeness to the photos before training and now, 0 to 1; None if it was not
    measured."""
    before, now = run.scores.get("dino_base"), run.scores.get("dino")
    if get_subject_kind(run.config).is_style:  # the base has none of it, and 1 is all of it
        before, now = 0.0, run.scores.get("style")
    if before is None or now is None:
        return None
    return max(before, 0.0), min(max(now, 0.0), 1.0)


LIKENESS = "likeness to the photos rose from {before:.0%} to {now:.0%}"
VERDICTS: tuple[tuple[Callable[[RunMetrics, float, float], bool], str], ...] = (
    (
        lambda run, before, now: now - before < MIN_LIKENESS_GAIN,
        "It hardly learned your {thing}: likeness to the photos was {before:.0%}, and is {now:.0%}",
    ),
    (
        lambda run, before, now: (run.compute_shift("pres") or 0.0) > MAX_CLASS_SHIFT,
        f"Every {{word}} turns into yours; {LIKENESS}",
    ),
    (lambda run, before, now: run.copy_alarm, f"Its images repeat your photos; {LIKENESS}"),
    (
        lambda run, before, now: now < MIN_FINAL_LIKENESS or is_too_short(run),
        f"It has only begun to learn your {{thing}}: {LIKENESS}",
    ),
    (lambda run, before, now: True, LIKENESS.capitalize()),
)
"""(whether it applies to a run with this likeness before and now, verdict): the first counts."""
TOY_LIMIT = (
    "The practice model draws only its own toys: it cannot learn photos of anything else, "
    "whatever the scores say"
)
LOOK_ADVICE = "Look for yourself: are the images like your photos?"


def judge_run(run: RunMetrics) -> str:
    """Return the verdict on a run, in a few sentences, for the page and the terminal."""
    verdict = f"It has no score: {run.no_score}" if run.no_score else describe_missing_scores(run)
    change = get_likeness_change(run)
    if change is not None:
        before, now = change
        template = next(text for applies, text in VERDICTS if applies(run, before, now))
        verdict = template.format(
            before=before,
            now=now,
            word=get_class_word(run.config) or "thing",
            thing="style" if get_subject_kind(run.config).is_style else "subject",
        )
    lines = [verdict]
    if is_toy(run.config.pretrained_model_name_or_path):
        lines.append(TOY_LIMIT)
    return f"{'. '.join(lines)}. {LOOK_ADVICE}"


ADVICE_RULES = (
    explain_steps,
    explain_photos,
    explain_style,
    explain_prompt,
    explain_bare_prompt,
    explain_class,
    explain_length,
)
"""The most important first."""


def list_resume_hints(run: RunMetrics) -> list[str]:
    """Return how to resume a run that ended early, which stands before all figures and advice. A
    loss that is not finite would come again, so such a run gets none."""
    is_over = run.state == "done" or run.is_training
    if is_over or NON_FINITE_PATTERN.search(run.message):
        return []
    if run.saved:
        return [format_resume_command(run)]
    achieved = "saved" if run.step else "trained"
    return [f"nothing was {achieved}; to start again: {format_train_command(run)}"]


def spell_command(command: str) -> list[str]:
    """Return the beginning of a command line, spelled as this program was called."""
    program = Path(sys.argv[0])
    if program.name == TRAIN_SCRIPT and command == "train":
        return ["python", str(program)]
    if program.stem == INSTALLED_PROGRAM:
        return [INSTALLED_PROGRAM, command]
    return ["python", "-m", "dreambooth_moslora", command]


def format_resume_command(run: RunMetrics) -> str:
    """Return the whole command that resumes a stopped run."""
    return f"to go on: {format_train_command(run)} --resume_from_checkpoint latest"


def format_train_command(run: RunMetrics) -> str:
    """Return the command that trains with the run's own settings, in its folder."""
    argv = spell_command("train")
    if run.processes > 1:
        argv = ["accelerate", "launch", "--multi_gpu", TRAIN_SCRIPT]
    argv += ["--config", str(RunDir(run.folder).config_path)]

    # The folder may have been moved since.
    if Path(run.config.output_dir).resolve() != run.folder.resolve():
        argv += ["--output_dir", str(run.folder)]
    return shlex.join(argv)


def list_advice(run: RunMetrics) -> list[str]:
    """Return a sentence for each fault: what to try next."""
    return [sentence for rule in ADVICE_RULES for sentence in rule(run)]


def list_closing_advice(run: RunMetrics) -> list[str]:
    """Up to three lines of advice for the end of a run, the most important first. That it has no
    score is part of its verdict."""
    advice = [line for line in list_advice(run) if not line.startswith(NOT_SCORED_NOTE)]
    return advice[:MAX_ADVICE_LINES] or [NO_ADVICE] * bool(run.scores)
