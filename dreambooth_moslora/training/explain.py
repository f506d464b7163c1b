"""What a run's figures mean: the best step, the best scale, and which flag to try next.

    figures_of(run folder) -> Figures --RULES--> sentences, the most important first
                                      --leads--> what comes before them: how to go on,
                                                 what cannot be learnt

Thresholds come from the twelve trainings of `assets/studies/recipe` (six subjects with prior
preservation, which learn well, and six without, whose class became the subject), and from runs of
the embedded base with faults made on purpose.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk import queue
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import SUBJECT_FILE, find_asset
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import folder, photo_file
from dreambooth_moslora.plan.choices import PRACTICE, on_a_gpu
from dreambooth_moslora.plan.plan import FEW_EXPOSURES
from dreambooth_moslora.precision import LIKE_FP32
from dreambooth_moslora.settings import measures, table
from dreambooth_moslora.settings.prompts import class_word_of
from dreambooth_moslora.settings.toys import is_toy
from dreambooth_moslora.values import is_finite_number

STALLED_AFTER = 3
"""Evaluations without a better score, after which early stopping is suggested."""


@dataclass(frozen=True)
class BestStep:
    """The step with the best score, and how many evaluations came `since`."""

    step: int
    score: float
    since: int

    def advice(self, early_stopping: int | None) -> str | None:
        """One line when the score has not risen for a while; None otherwise."""
        if self.since < (early_stopping or STALLED_AFTER):
            return None
        line = (
            f"the score has not risen for {self.since} evaluations; "
            f"best was {self.score:.3f} at step {self.step}"
        )
        if early_stopping:
            return f"{line}: stopping early, as --early_stopping {early_stopping} asks"
        return f"{line} (kept in best/); --early_stopping {STALLED_AFTER} would stop here"


def best_of(evaluations: Sequence[tuple[int, float]]) -> BestStep:
    """The best of (step, score) pairs; the earliest wins a tie. Raises ValueError when empty."""
    step, score = max(evaluations, key=lambda pair: (pair[1], -pair[0]))
    since = sum(later > step for later, _ in evaluations)
    return BestStep(step=step, score=score, since=since)


SCALES = (0.4, 0.6, 0.8, 1.0, 1.2)
"""Those that are tried. Training uses 1; smaller ones hardly show the subject, larger ones burn."""
EQUAL = 0.99
"""Scores of at least this fraction of the best count as equal; the scale nearest to 1 wins."""
USABLE = 0.95
"""Scales of at least this fraction of the best score are usable."""


@dataclass(frozen=True)
class ScaleChoice:
    """The best scale of an adapter.

    best: the scale
    low, high: the ends of the usable scales
    scores: scale -> score, which decided
    """

    best: float
    low: float
    high: float
    scores: dict[float, float]


def choose_scale(scores: Mapping[float, float]) -> ScaleChoice | None:
    """Choose from scale -> score. None when no scale shows the subject."""
    highest = max(scores.values())
    if highest <= 0:
        return None
    equal = [scale for scale in scores if scores[scale] >= EQUAL * highest]
    best = min(equal, key=lambda scale: abs(scale - 1))

    # Usable is what lies without a gap beside it: first up, then down.
    usable = [best]
    scales = sorted(scores)
    place = scales.index(best)
    for side in (scales[place + 1 :], scales[:place][::-1]):
        for scale in side:
            if scores[scale] < USABLE * highest:
                break
            usable.append(scale)
    return ScaleChoice(
        best=best,
        low=min(usable),
        high=max(usable),
        scores=dict(sorted(scores.items())),
    )


LEAST_LIKENESS = 0.1
"""A rise over the base below which distances from class to subject are not measured."""
NO_SCORES = ("step", "time", "photos")
"""Fields of an evaluation that are not scores."""


@dataclass(frozen=True)
class Figures:
    """What a run has measured.

    config: its settings
    state, message: how it ended, as its last event says
    step: the last that was taken; `skipped` counts those that fp16 repeated
    photos: how many; `largest` counts those of the largest of several subjects
    nearness: the mean cosine of photos to the nearest other
    without_bare_prompt: photos whose captions lack the instance prompt
    scores: the latest
    copy_alarm: whether pictures repeat photos
    likeness, score: (step, value) of each evaluation
    processes: that trained together
    time: of the last event, in seconds
    planned: its optimizer steps
    saved: the step of the newest checkpoint; 0 without one
    is_training: whether another process trains it now
    is_practice: whether the embedded base learns from photographs
    folder: the run's
    leaked: the thing that came with a style
    """

    config: table.TrainConfig
    state: str = ""
    message: str = ""
    step: int = 0
    skipped: int = 0
    photos: int | None = None
    largest: int | None = None
    nearness: float | None = None
    without_bare_prompt: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    copy_alarm: bool = False
    likeness: Sequence[tuple[int, float]] = ()
    score: Sequence[tuple[int, float]] = ()
    processes: int = 1
    time: float = 0.0
    planned: int | None = None
    saved: int = 0
    is_training: bool = False
    is_practice: bool = False
    folder: Path = Path()
    leaked: str = ""

    @property
    def exposures(self) -> float | None:
        """How often each photo was shown."""
        if not self.photos:
            return None
        photos_a_step = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return self.step * photos_a_step * self.processes / self.photos

    def moved(self, name: str) -> float | None:
        """How far `pres` (the class) or `dino_bare` moved: 0 as the base draws the class, 1 at the
        subject."""
        here = self.scores.get(name)
        start, end = self.scores.get("pres_base"), self.scores.get("dino")
        if here is None or start is None or end is None or end - start < LEAST_LIKENESS:
            return None
        return (here - start) / (end - start)


def figures_from(
    records: Sequence[Mapping[str, Any]], config: table.TrainConfig, photos: Mapping[str, int] = {}
) -> Figures:
    """Figures from the lines of `metrics.jsonl`, read with care: a line may lack any field.
    `photos` is what is known of the photos, for a run whose evaluations do not tell it."""

    def of_kind(kind: str) -> list[Mapping[str, Any]]:
        return [event for event in records if event.get("type") == kind]

    def last_of(kind: str) -> Mapping[str, Any]:
        return [{}, *of_kind(kind)][-1]

    # A resumed run has several starts and ends; the last ones count.
    start, end = last_of("start"), last_of("end")
    steps = of_kind("step")
    taken = [event.get("step") or 0 for event in steps if not event.get("skipped")]
    saved = [event.get("step") or 0 for event in of_kind("checkpoint")]

    # The latest scores, and what that evaluation says of the photos.
    scored = of_kind("evaluation")
    last = last_of("evaluation")
    about = {**photos, **as_table(last.get("photos"))}
    count, largest = number(about.get("count")), number(about.get("largest"))
    return Figures(
        config=config,
        state=str(end.get("state", "")),
        message=str(end.get("message", "")),
        step=max(taken, default=0),
        skipped=sum(bool(event.get("skipped")) for event in steps),
        photos=None if count is None else int(count),
        largest=None if largest is None else int(largest),
        nearness=number(about.get("nearness")),
        without_bare_prompt=int(number(about.get("without_bare_prompt")) or 0),
        scores=numbers({name: value for name, value in last.items() if name not in NO_SCORES}),
        copy_alarm=last.get("copy_alarm") is True,
        likeness=curve(scored, "dino"),
        score=curve(scored, "score"),
        processes=int(number(start.get("processes")) or 1),
        time=max((number(event.get("time")) or 0.0 for event in records), default=0.0),
        planned=int(number(start.get("max_train_steps")) or 0) or None,
        saved=max(saved, default=0),
    )


def curve(scored: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each evaluation, sorted; a step that was scored twice counts once."""
    values = {event.get("step") or 0: number(event.get(name)) for event in scored}
    return sorted((step, value) for step, value in values.items() if value is not None)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are numbers."""
    found = {name: number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def number(value: Any) -> float | None:
    """The value as a number; None for anything else, and for NaN and infinity."""
    return float(value) if is_finite_number(value) else None


def figures_of(run_dir: RunDir, photos: Sequence[photo_file.Photo] | None = None) -> Figures:
    """A run's figures: events, configuration, and a newer report of `evaluate`. Raises UserError
    for no run."""
    for path in (run_dir.config_path, run_dir.metrics_path):
        if not path.is_file():
            raise UserError(f"{run_dir.path} holds no run: {path.name} is not there.")
    config = known_config(read_json(run_dir.config_path))

    # The photos, if they are still here.
    if photos is None:
        with suppress(UserError):
            photos = folder.photo_report(config).photos
    facts = {}
    if photos:
        facts["count"] = len(photos)
        facts["without_bare_prompt"] = sum(photo.bare_prompt is not None for photo in photos)
        if len(config.subjects) > 1:
            facts["largest"] = max(photo_file.counts_of(photos))

    # What the run wrote, and what it is now.
    found = replace(
        figures_from(run_dir.read_metrics(), config, facts),
        is_training=is_held(run_dir),
        is_practice=is_practice(config),
        folder=run_dir.path,
    )
    return with_report(found, run_dir)


def is_held(run_dir: RunDir) -> bool:
    """Whether a run trains there now, or nobody can tell."""
    try:
        queue.check_free(run_dir.path)
    except (UserError, OSError):
        return True
    return False


def is_practice(config: table.TrainConfig) -> bool:
    """Whether the embedded base was trained on one folder of photos that are not of its world, as
    `train PHOTOS WORD` does without a GPU. False where the folder is gone."""
    if config.subjects or not config.instance_data_dir:
        return False
    if not is_toy(config.pretrained_model_name_or_path):
        return False
    photos = Path(find_asset(config.instance_data_dir))
    is_of_its_world = (photos / SUBJECT_FILE).is_file()
    return photos.is_dir() and not is_of_its_world


def known_config(values: Mapping[str, Any]) -> table.TrainConfig:
    """A run's configuration, without settings that are unknown here. Raises UserError for
    impossible values."""
    known = {name: value for name, value in values.items() if name in table.FIELD_TYPES}
    return table.TrainConfig.from_dict(known)


def with_report(found: Figures, run_dir: RunDir) -> Figures:
    """The figures, with the scores of a newer `evaluation/scores.json`. Raises UserError if that is
    damaged."""
    path = run_dir.evaluation_dir / "scores.json"
    if not path.is_file():
        return found

    # An older one is of an adapter that is gone; another scale, or one of several subjects, is
    # another question.
    report = read_json(path)
    if (number(report.get("time")) or 0.0) < found.time:
        return found
    is_of_one = len(found.config.subjects) > 1 and "subjects" not in report
    if is_of_one or as_table(report.get("protocol")).get("adapter_scale", 1) != 1:
        return found

    # Its scores, by the names that an evaluation in training gives them.
    intervals = as_table(report.get("scores"))
    alarm = as_table(report.get("copy_alarm"))
    values = {name: as_table(interval).get("mean") for name, interval in intervals.items()}
    values |= as_table(report.get("relative"))
    values |= {"copied": alarm.get("share"), "score": report.get("score")}
    return replace(
        found,
        scores=numbers(values),
        copy_alarm=alarm.get("raised") is True,
        leaked=str(report.get("leaked") or ""),
    )


def as_table(value: Any) -> Mapping[str, Any]:
    """The value if it is a table, else an empty one."""
    return value if isinstance(value, Mapping) else {}


MOST_LINES = 3
"""Of advice at the end of a run."""
NOTHING = "nothing: no figure stands out"
NOT_SCORED = "nothing was scored"
USUAL_EXPOSURES = 200
"""Exposures of a photo: the recipes show each of five photos 192 to 400 times."""
SKIPPED_SHARE = 0.05
"""fp16 skips a few steps while it finds its scale; more is lost training time."""
RISE_LEFT = 0.1
"""Of the likeness gained, in a run's last third: then more steps would help."""
SCORE_LOST = 0.03
"""Since the best step. A score from six pictures varies by about as much."""
CLASS_MOVED = 1 / 3
"""Of the way from the base's class to the subject: below 0 in good runs, about 1 without prior
preservation."""
DRIFTED = 1.5
"""Of the base's own spread: 0.4 to 1.3 in good runs, 1.6 to 2.2 without prior preservation."""
PROMPT_KEPT = 0.75
"""CLIP-T over the base's: 0.79 to 1.06 in runs that show the place, below 0.3 in others."""
BARE_SHOWN = 1 / 2
"""Of the likeness gained: 0.15 without the bare prompt, 1.11 with a third of the exposures."""
BARE_SHARES = (0.25, 0.5)
"""Shares of the instance prompt to try, one after the other."""
LEAK = 0.05
"""A leak above this is mentioned with a lost prompt."""
LEAK_ALONE = 0.25
"""A leak above this is named by itself. Runs that kept their prompts, in all studies: 0.23 at most,
but for one subject, the tall cactus, with 0.31 to 0.46."""
CONTENT_LEAK = 0.1
"""Share of pictures with a thing that came with a style, above the base's."""
FACE_LEARNT = 0.6
"""Of the photos' own likeness of faces. Not measured on a trained person yet."""
FACES_LOST = 0.2
"""Share of pictures without a face, above the base's."""
CONFUSED = 0.25
"""Of the way from one subject to the other: 0.03 to 0.07 in a good run, 1/2 for the base."""
FEW_PHOTOS = 3
"""Fewer show a subject from too few sides."""
ALIKE = 0.9
"""Mean cosine of photos to the nearest other: 0.65 to 0.75 for the samples', 1 for equal frames."""
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
    if run.skipped > SKIPPED_SHARE * (run.step + run.skipped) and run.skipped >= 5:
        yield f"fp16 overflowed in {run.skipped} steps, which were done again: try {LIKE_FP32}"

    # Too few steps, or none that anybody looked at.
    if is_short(run):
        seen = f"each photo was shown {run.exposures:.0f} times, and a subject needs 100 or more"
        yield f"{seen}: try --exposures_per_photo {USUAL_EXPOSURES}"
    if run.step and not run.scores and run.state != "failed":
        every = max(1, run.step // 5)
        yield (
            f"{NOT_SCORED}: the command `evaluate` does it now, "
            f"--evaluate_steps {every} during the next run"
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

    # Their surroundings. Only photos with masks have a leak.
    came = "the photos' surroundings came along"
    kept = run.scores.get("clip_t_of_base", 1.0)
    leak = run.scores.get("background_leak")
    remedy = "add masks (name.mask.png beside each photo) and captions that name the surroundings"
    if leak is not None:
        lower = "--unmasked_weight 0" if config.unmasked_weight else fewer
        remedy = f"try {lower}, and captions that name the surroundings"
    if kept < PROMPT_KEPT:
        measured = f", leak {leak:.2f}" if leak is not None and leak > LEAK else ""
        yield f"{came} (CLIP-T is {kept:.2f} of the base's{measured}): {remedy}"
    elif leak is not None and leak > LEAK_ALONE:
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


def about_the_face(run: Figures) -> Iterator[str]:
    """A person whose costume was learnt in place of the face, or whose face is not shown."""
    clothes = "--captions auto --describe clothes"
    share = run.scores.get("identity_share")
    rise = run.scores.get("dino", 0.0) - run.scores.get("dino_base", 0.0)
    if share is not None and share < FACE_LEARNT and rise > LEAST_LIKENESS:
        yield (
            f"a costume was learnt, not the face (the face has {max(share, 0):.0%} of the photos' "
            f"own likeness, DINO {run.scores['dino']:.2f}): try {clothes}, with photos in other "
            "clothes and nearer to the face"
        )
    hidden = run.scores.get("no_face", 0.0) - run.scores.get("no_face_base", 0.0)
    if hidden > FACES_LOST:
        yield (
            f"{run.scores['no_face']:.0%} of the pictures show no face, "
            f"{hidden:.0%} more than the base's: try --max_train_steps "
            f"{max(1, run.step * 2 // 3)}, and photos that show the face larger"
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
    else:
        prompt = config.class_prompt or f"a photo of a {word}"
        remedy = f'--with_prior_preservation --prior adapter_off --class_prompt "{prompt}"'

    # Things of the subject's class, or other things.
    moved = run.moved("pres")
    spread = run.scores.get("drift_of_spread", 0.0)
    if moved is not None and moved > CLASS_MOVED:
        yield (
            f"every {word} turns into yours (PRES went {min(moved, 1.0):.0%} of the way): "
            f"try {remedy}"
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


def about_length_and_photos(run: Figures) -> Iterator[str]:
    """A score that fell since its best step, a likeness that still rose in the last third, details
    that are not learnt, and too few photos."""
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

    # Too short. Not for pictures that repeat photos, nor where `about_the_steps` says it.
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

    # Too few photos, or one photo many times.
    if run.photos is not None and run.photos < FEW_PHOTOS:
        plural = "" if run.photos == 1 else "s"
        yield (
            f"{run.photos} photo{plural}: a subject needs 3 to 10, "
            "in several places and from several sides"
        )
    if run.nearness is not None and run.nearness > ALIKE:
        more = f"--crops_per_photo {max(8, 2 * run.config.crops_per_photo)} --crop_zoom 1.3"
        alike = f"the photos are nearly one picture (likeness among them {run.nearness:.2f})"
        yield f"{alike}: add some in other places, or try {more}"


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
    about_the_style,
    about_the_face,
    about_the_prompt,
    about_the_bare_prompt,
    about_the_class,
    about_length_and_photos,
)
"""The most important first."""


def leads(run: Figures) -> list[str]:
    """What stands before all figures and advice: what the base cannot learn, and how a run that
    ended early goes on."""
    found = []

    # What no flag can change.
    if run.is_practice:
        word = class_word_of(run.config) or "subject"
        cannot = f"the base is {PRACTICE}, which cannot draw a real {word}"
        found.append(f"{cannot}. {on_a_gpu(run.config.instance_data_dir, word)}")

    # A run that was cut off. A loss that is not finite would come again.
    is_over = run.state == "done" or run.is_training
    if is_over or BROKEN.search(run.message):
        return found
    if run.saved:
        found.append(to_go_on(run))
    else:
        made = "saved" if run.step else "trained"
        found.append(f"nothing was {made}; to start again: {command_of(run)}")
    return found


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
    """Up to three lines of advice for the end of a run, the most important first; none for a run
    without scores."""
    if not run.scores:
        return []
    return advice_after(run)[:MOST_LINES] or [NOTHING]


def meanings(run: Figures) -> list[str]:
    """The latest scores in plain words, one line each."""
    known = {
        "dino_base": math.nan,
        "identity_of_photos": math.nan,
        **run.scores,
        "class_word": class_word_of(run.config) or "thing",
    }
    if (moved := run.moved("pres")) is not None:
        known["class_moved"] = max(moved, 0)
    rows = [row for name, row in measures.MEASURES.items() if row.sentence and name in known]
    return [row.sentence.format_map(known) for row in rows]
