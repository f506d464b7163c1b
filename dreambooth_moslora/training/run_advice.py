"""What a run's figures mean: which flag to try next, and how a run that ended early goes on.

    figures.figures_of(run folder) -> Figures --RULES--> sentences, the most important first
                                              --to_go_on--> the command that resumes it

Thresholds come from the twelve trainings of `assets/studies/recipe` (six subjects with prior
preservation, which learn well, and six without, whose class became the subject), and from runs of
the embedded base with faults made on purpose.
"""

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.defaults import USUAL_EXPOSURES
from dreambooth_moslora.plan.plan import FEW_EXPOSURES, NEEDED_EXPOSURES
from dreambooth_moslora.precision import LIKE_FP32
from dreambooth_moslora.settings.prompts import class_word_of
from dreambooth_moslora.settings.subject_kinds import kind_of
from dreambooth_moslora.training.best_step import best_of
from dreambooth_moslora.training.run_metrics import Figures

MOST_LINES = 3
"""Of advice at the end of a run."""
NOTHING = "nothing: no figure stands out"
NOT_SCORED = "nothing was scored"
RISE_LEFT = 0.1
"""Of the likeness gained, in a run's last third: then more steps would help."""
SCORE_LOST = 0.03
"""Since the best step. A score from six pictures varies by about as much."""
CLASS_MOVED = 1 / 3
"""Of the way from the base's class to the subject: below 0 in good runs, about 1 without prior
preservation."""
DRIFTED = 1.5
"""Of the base's own spread: 0.3 to 1.3 in good runs, 1.4 to 4.0 without prior preservation."""
PROMPT_KEPT = 0.75
"""CLIP-T over the base's: 0.79 to 1.06 in runs that show the place, below 0.3 in others."""
BARE_SHOWN = 1 / 2
"""Of the likeness gained: 0.15 without the bare prompt, 1.11 with a third of the exposures."""
BARE_SHARES = (0.25, 0.5)
"""Shares of the instance prompt to try, one after the other."""
LEAK = 0.25
"""Runs that kept their prompts, in all studies: 0.23 at most,
but for one subject, the tall cactus, with 0.31 to 0.46."""
CONTENT_LEAK = 0.1
"""Share of pictures with a thing that came with a style, above the base's."""
ODD_PHOTO = 1 / 2
"""Of the likeness that photos have to each other: 0.31 at most for a photo of another toy, 0.83 at
least in the eight sample sets."""
CONFUSED = 0.25
"""Of the way from one subject to the other: 0.03 to 0.07 in a good run, 1/2 for the base."""
BROKEN = re.compile(
    r"the (?:loss|gradient) is \S+ at step \d+|the adapter is not finite after step \d+"
)
"""How a run fails whose numbers are no longer finite."""


def about_the_steps(run: Figures) -> Iterator[str]:
    """What failed, and what was too rare."""
    # Numbers that are no longer finite.
    found = BROKEN.search(run.message) if run.state == "failed" else None
    if found:
        rate = run.config.learning_rate
        other = f", or {LIKE_FP32}" if run.config.mixed_precision == "fp16" else ""
        yield f"{found[0]}: try --learning_rate {rate / 3:.1g} (it was {rate:g}){other}"

    # Too few steps, or none that anybody looked at.
    if is_short(run):
        seen = f"each photo was shown {run.exposures:.0f} times, and {NEEDED_EXPOSURES}"
        yield f"{seen}: try --exposures_per_photo {USUAL_EXPOSURES}"
    if run.step and not run.scores and run.state != "failed":
        every = max(1, run.step // 5)
        yield (
            f"{NOT_SCORED}: the command `evaluate` does it now, "
            f"--evaluate_steps {every} during the next run"
        )


def about_the_photos(run: Figures) -> Iterator[str]:
    """Photos that show something else, which those of a style should."""
    found = run.photo_likeness
    if not found or kind_of(run.config).is_style:
        return
    usual = median(found.values())
    odd = [name for name in found if found[name] < ODD_PHOTO * usual]
    if odd:
        likeness = max(found[name] for name in odd)
        flags = shlex.join(["--leave_out", *run.config.leave_out, *odd])
        them = "it" if len(odd) == 1 else "them"
        yield (
            f"{' and '.join(odd)} may show something else (DINO {likeness:.2f} to the others; "
            f"{usual:.2f} is usual here): look at {them}, and try {flags}"
        )


def about_the_prompt(run: Figures) -> Iterator[str]:
    """What came along with the subject: whole photos, or their surroundings."""
    config = run.config
    fewer = f"--max_train_steps {max(1, run.step * 2 // 3)}"

    # Whole photos.
    if run.copy_alarm:
        more = f"--crops_per_photo {max(8, 2 * config.crops_per_photo)}"
        copied = f"{run.scores.get('copied', 0.0):.0%} of the pictures repeat a photo"
        yield f"{copied}: try {more}, or fewer steps ({fewer})"

    # Their surroundings, which those of a style share. Only photos with masks have a leak.
    if kind_of(config).is_style:
        return
    came = "the photos' surroundings came along"
    kept = run.scores.get("clip_t_of_base", 1.0)
    leak = run.scores.get("background_leak")
    remedy = "add masks (name.mask.png beside each photo) and captions that name the surroundings"
    if leak is not None:
        lower = "--unmasked_weight 0" if config.unmasked_weight else fewer
        remedy = f"try {lower}, and captions that name the surroundings"
    if kept < PROMPT_KEPT:
        yield f"{came} (CLIP-T is {kept:.2f} of the base's): {remedy}"
    elif leak is not None and leak > LEAK:
        yield f"{came} (leak {leak:.2f}; 0 is none): {remedy}"


def about_the_style(run: Figures) -> Iterator[str]:
    """A thing that came along with a style."""
    more = run.scores.get("leak", 0.0) - run.scores.get("leak_base", 0.0)
    if more > CONTENT_LEAK:
        thing = f"“{run.leaked}”" if run.leaked else "a thing of the style's pictures"
        yield (
            f"{thing} comes with the style (unasked in {run.scores['leak']:.0%} of the pictures): "
            "say it in the captions of the pictures that show it, add pictures without it, or try "
            f"--max_train_steps {max(1, run.step * 2 // 3)}"
        )


def about_the_bare_prompt(run: Figures) -> Iterator[str]:
    """An instance prompt that does not show the subject without a place."""
    config = run.config
    moved = run.moved("dino_bare")
    if moved is None or moved >= BARE_SHOWN:
        return

    # A larger share of that prompt where captions lack it, else less that holds the class.
    shares = [share for share in BARE_SHARES if share > config.bare_share]
    if shares and run.without_bare_prompt:
        remedy = f"--instance_prompt_share {shares[0]:g}"
    elif config.with_prior_preservation and config.prior_loss_weight:
        remedy = f"--prior_loss_weight {config.prior_loss_weight / 2:g}"
    else:
        remedy = f"--exposures_per_photo {more_exposures(run)}"
    prompts = " and ".join(f"“{one.instance_prompt}”" for one in config.each_subject)
    yield (
        f"{prompts} alone shows {max(moved, 0):.0%} of the likeness "
        f"that prompts with places show: try {remedy}"
    )


def about_the_class(run: Figures) -> Iterator[str]:
    """Other things that became the subject. One remedy is said once."""
    config = run.config
    word = class_word_of(config) or "thing"

    # More that holds the class, or something that does.
    if config.with_prior_preservation:
        remedy = f"--prior_loss_weight {2 * config.prior_loss_weight or 1:g}"
    elif kind_of(config).is_style:  # which has no class
        remedy = f"--max_train_steps {max(1, run.step * 2 // 3)}"
    else:
        prompt = config.class_prompt or f"a photo of a {word}"
        remedy = f'--with_prior_preservation --prior adapter_off --class_prompt "{prompt}"'

    # Things of the subject's class, or other things.
    moved = run.moved("pres")
    spread = run.scores.get("drift_of_spread", 0.0)
    if moved is not None and moved > CLASS_MOVED:
        yield (
            f"every {word} turns into yours ({min(moved, 1.0):.0%} of the way to it): try {remedy}"
        )
    elif spread > DRIFTED:
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
    if confusion > CONFUSED:
        more = max(more_exposures(run), USUAL_EXPOSURES)
        yield (
            f"subjects are taken for each other (confusion {confusion:.2f}; "
            f"0: told apart as their photos are): try --exposures_per_photo {more}, "
            "and another rare word for each subject"
        )


def about_the_length(run: Figures) -> Iterator[str]:
    """A score that fell since its best step, and a likeness that still rose in the last third."""
    # Too long.
    if len(run.score) > 1:
        last, score = run.score[-1]
        best = best_of(run.score)
        if best.score - score > SCORE_LOST:
            yield (
                f"the score fell from {best.score:.2f} at step {best.step} "
                f"to {score:.2f} at step {last}: "
                f"use best/, or try --max_train_steps {best.step}"
            )

    # Too short. Not of a style, which DINO does not see, nor for pictures that repeat photos, nor
    # where `about_the_steps` says it.
    if kind_of(run.config).is_style:
        return
    start = run.scores.get("dino_base")
    if start is not None and len(run.likeness) > 2 and not run.copy_alarm and not is_short(run):
        last, end = run.likeness[-1]
        two_thirds = [pair for pair in run.likeness if pair[0] <= last * 2 / 3]
        before, earlier = two_thirds[-1] if two_thirds else run.likeness[0]
        if end - start > 0 and end - earlier > RISE_LEFT * (end - start):
            yield (
                f"likeness still rose at the end (DINO {earlier:.2f} at step {before}, "
                f"{end:.2f} at step {last}): "
                f"try --exposures_per_photo {more_exposures(run)}"
            )


def is_short(run: Figures) -> bool:
    """Whether its photos were shown too rarely, which `about_the_steps` says; not of a run that has
    shown none."""
    return run.exposures is not None and 0 < run.exposures < FEW_EXPOSURES


def more_exposures(run: Figures) -> int:
    """Half as many exposures again, rounded up to tens; after a short run the usual number."""
    if is_short(run):
        return USUAL_EXPOSURES

    # The flag counts those of a photo of the largest subject.
    shown = run.exposures or USUAL_EXPOSURES
    if run.exposures and run.largest:
        shown *= run.photos / (len(run.config.subjects) * run.largest)
    return math.ceil(0.15 * shown) * 10


RULES = (
    about_the_steps,
    about_the_photos,
    about_the_style,
    about_the_prompt,
    about_the_bare_prompt,
    about_the_class,
    about_the_length,
)
"""The most important first."""


def leads(run: Figures) -> list[str]:
    """How a run that ended early goes on, which stands before all figures and advice. A loss that
    is not finite would come again."""
    is_over = run.state == "done" or run.is_training
    if is_over or BROKEN.search(run.message):
        return []
    if run.saved:
        return [to_go_on(run)]
    made = "saved" if run.step else "trained"
    return [f"nothing was {made}; to start again: {command_of(run)}"]


def to_go_on(run: Figures) -> str:
    """The whole command that resumes a stopped run."""
    return f"to go on: {command_of(run)} --resume_from_checkpoint latest"


def command_of(run: Figures) -> str:
    """The command that trains with the run's own settings, in its folder."""
    words = ["python", "-m", "dreambooth_moslora", "train"]
    if run.processes > 1:
        words = ["accelerate", "launch", "--multi_gpu", "train_dreambooth.py"]
    words += ["--config", str(RunDir(run.folder).config_path)]

    # The folder may have been moved since.
    if Path(run.config.output_dir).resolve() != run.folder.resolve():
        words += ["--output_dir", str(run.folder)]
    return shlex.join(words)


def advice_after(run: Figures) -> list[str]:
    """What to try next: one sentence for each fault."""
    return [sentence for rule in RULES for sentence in rule(run)]


def closing_advice(run: Figures) -> list[str]:
    """Up to three lines of advice for the end of a run, the most important first."""
    return advice_after(run)[:MOST_LINES] or [NOTHING]
