"""Finds photos that hurt: a short run with all photos and one without each, at equal steps, prompts, seeds and noise.

Runs without a photo differ only in its turns, which the other photos take (`subject_streams.taking_turns`).

With L(run, j) the mean DINO cosine of a run's pictures to photo j, the effect of photo i on likeness is

    mean over j ≠ i of L(all, j)  -  mean over j ≠ i of L(without i, j)

minus the mean of the other photos' effects. Below zero, pictures are more like the other photos without photo
i. The effect on the leak is the same with the photos' backgrounds (`metrics.background_leak`): above zero, the
other backgrounds leak less without photo i.

Each run is also random. The other photos' effects show by how much: the interval is that of one more draw (a
prediction interval with Student's t). It is so wide that in 95 of 100 sets of equally good photos none stands
out (Bonferroni's correction).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from matplotlib.figure import Figure

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.evaluation.intervals import Interval
from dreambooth_moslora.evaluation.studies.stats import Result
from dreambooth_moslora.evaluation.studies.study import Protocol, Study
from dreambooth_moslora.evaluation.studies.study_subject import StudySubject

__all__ = ["LEAST_PHOTOS", "PhotoEffect", "effect_plot", "effects_of", "study_without_each", "table_of", "verdict"]

LEAST_PHOTOS = 4
"""With fewer photos, at most two others would show how much runs differ by chance."""
ALL = "all"
PROTOCOL = Protocol(num_prompts=6, images_per_prompt=2, class_images=1, unrelated=1, inference_steps=12)
OWN = ("instance_data_dir", "instance_prompt", "class_prompt", "output_dir", "rank", "seed", "learning_rate")
"""Settings that the study itself sets."""
HURTS, HARMLESS = "#d1453b", "#2a6fdb"


@dataclass(frozen=True)
class PhotoEffect:
    """The effect of the photo `name` on likeness and, if photos have masks, on the leak."""

    name: str
    likeness: Interval
    leak: Interval | None

    @property
    def hurts(self) -> bool:
        return self.likeness.high < 0 or (self.leak is not None and self.leak.low > 0)


def study_without_each(config: TrainConfig, names: Sequence[str], protocol: Protocol = PROTOCOL) -> Study:
    """An arm with all photos, and one without each of `names`. Raises UserError for too few of them."""
    if len(names) < LEAST_PHOTOS:
        raise UserError(f"--leave_one_out needs at least {LEAST_PHOTOS} photos, and there are {len(names)}.")
    arms = {ALL: {}, **{f"without_{number}": {"leave_out": [name]} for number, name in enumerate(names)}}
    subject = StudySubject(config.instance_data_dir, config.instance_prompt, config.class_prompt)
    shared = {name: value for name, value in config.to_dict().items() if name not in OWN}
    return Study(
        (subject,),
        arms,
        shared,
        seeds=(config.seed or 0,),
        ranks=(config.rank,),
        learning_rates=(config.learning_rate,),
        reference=ALL,
        budget="rank",
        protocol=protocol,
    )


def effects_of(names: Sequence[str], results: Sequence[Result]) -> list[PhotoEffect]:
    """The effect of each photo, from the results of all arms. Raises UserError when one of them is missing."""
    by_arm = {result.cell.arm: result.pictures for result in results}
    arms = [ALL, *(f"without_{number}" for number in range(len(names)))]
    if missing := [arm for arm in arms if arm not in by_arm]:
        raise UserError(f"{len(missing)} of the {len(arms)} short runs failed; run it again to try them again.")
    tables = {}
    for measure in ("likeness", "leak"):
        rows = [by_arm[arm].get(f"{measure}_by_photo") for arm in arms]
        tables[measure] = None if None in rows else intervals_of(np.array(rows))
    likeness, leak = tables["likeness"], tables["leak"]
    return [PhotoEffect(name, likeness[number], leak and leak[number]) for number, name in enumerate(names)]


def intervals_of(means: np.ndarray) -> list[Interval]:
    """The effect of each photo with its interval. `means` (1 + P, P): the run with all photos, then those
    without each, to each of P photos."""
    count = means.shape[1]
    apart = ~np.eye(count, dtype=bool)
    effects = np.array([(means[0] - means[1 + i])[apart[i]].mean() for i in range(count)])
    found = []
    for number, effect in enumerate(effects):
        others = effects[apart[number]]
        reach = others.std(ddof=1) * np.sqrt(1 + 1 / len(others)) * student_point(len(others) - 1, 0.025 / count)
        middle = effect - others.mean()
        found.append(Interval(float(middle), float(middle - reach), float(middle + reach)))
    return found


@cache
def student_point(degrees: int, tail: float) -> float:
    """The point that Student's t with `degrees` degrees of freedom exceeds with probability `tail`.

    With t = √ν·tan θ its density is proportional to cos(θ)^(ν-1), which is summed over a grid.
    """
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos((angles[1:] + angles[:-1]) / 2) ** (degrees - 1)
    below = np.concatenate([[0], density.cumsum() / density.sum()])
    return float(np.sqrt(degrees) * np.tan(np.interp(1 - tail, below, angles)))


def table_of(effects: Sequence[PhotoEffect]) -> str:
    """One line per photo, as text."""
    width = max(len(effect.name) for effect in effects)
    lines = [f"{'photo':<{width}}  {'effect on likeness':<26}  {'effect on the leak':<26}"]
    for effect in effects:
        leak = spelled(effect.leak) if effect.leak else "(needs masks)"
        mark = "hurts" if effect.hurts else ""
        lines.append(f"{effect.name:<{width}}  {spelled(effect.likeness):<26}  {leak:<26}  {mark}".rstrip())
    return "\n".join(lines)


def spelled(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def verdict(effects: Sequence[PhotoEffect]) -> str:
    """What to do, in one line."""
    bad = [effect for effect in effects if effect.hurts]
    if not bad:
        return "no photo stands out: none does more harm than chance explains"
    names = " ".join(f'"{effect.name}"' for effect in bad)
    return f"pictures are more like the other photos, or show less of their backgrounds, with --leave_out {names}"


def effect_plot(effects: Sequence[PhotoEffect]) -> Figure:
    """Effects with their intervals, one panel per measure; photos that hurt are red."""
    measures = {"likeness": "likeness: left of 0 hurts"}
    if all(effect.leak for effect in effects):
        measures["leak"] = "leak: right of 0 hurts"
    figure = Figure(figsize=(5 * len(measures), 1.4 + 0.34 * len(effects)), layout="constrained")
    rows = list(range(len(effects)))[::-1]
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, (measure, title) in zip(panels, measures.items()):
        for row, effect in zip(rows, effects):
            found = getattr(effect, measure)
            reach = [[found.mean - found.low], [found.high - found.mean]]
            colour = HURTS if effect.hurts else HARMLESS
            axis.errorbar(found.mean, row, xerr=reach, fmt="o", capsize=3, color=colour)
        axis.axvline(0, color="#888", linewidth=1)
        axis.set(title=title, xlabel="effect of having the photo")
        axis.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(rows, [effect.name for effect in effects])
    return figure
