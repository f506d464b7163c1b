"""The measures of an adapter: one row each, from which reports, logs, plots, cards and studies
follow.

The formulas are in `evaluation/metrics.py`, and `evaluation/score_tables.py` computes a table of
each measure by its name. Rows stand in the order in which people see them.
"""

from dataclasses import dataclass
from typing import Literal

CLIP, DINO = "openai/clip-vit-large-patch14", "facebook/dinov2-base"  # Score pictures of SDXL


@dataclass(frozen=True)
class Measure:
    title: str = ""  # its name in reports; a row without one is in no table of a report
    # scores, shares of a scale, answers of the toy's judge
    kind: Literal["score", "share", "judge"] = "score"
    base: str = ""  # the measure of the base's own pictures that stands beside it
    help: str = ""  # what it means
    share: tuple[str, str] | None = None  # (measure, whole): it is the ratio of these two means
    # its title beside the toy's true renders (NAME_ceiling) and other individuals (NAME_floor)
    truth: str = ""
    summary: bool = False  # whether `evaluate` prints it
    # whether evaluations during training write it into the run's events, and so into the card
    logged: bool = False
    curve: str = ""  # its label on plots of a run, short enough for a phone
    sentence: str = ""  # what `explain` says of it, with fields for any score
    # what a study does with it: compares the values, shows
    study: Literal["", "values", "scores", "differences"] = ""
    # the score of each arm, or the differences too
    column: str = ""  # its title in a study's tables, if not `title`
    panel: str = ""  # its title on a study's plots, if it is drawn there
    pictures: bool = False  # whether a study also compares single pictures by it


# fmt: off
MEASURES = {
    "dino": Measure("DINO", base="dino_base", help="likeness to the photos; tells subjects of one class apart",
        truth="DINO to the photos", summary=True, logged=True, curve="subject",
        sentence="likeness to the photos (DINO) {dino:.2f}; the base's own pictures have {dino_base:.2f}",
        study="differences", panel="subject (DINO)", pictures=True),
    "dino_base": Measure(logged=True),
    "dino_bare": Measure("DINO, bare prompt", base="pres_base",
        help="likeness at the instance prompt alone; near DINO is good", summary=True, logged=True, curve="bare prompt",
        sentence="likeness at the bare instance prompt (DINO) {dino_bare:.2f}", study="differences",
        panel="bare prompt (DINO)"),
    "clip_i": Measure("CLIP-I", base="clip_i_base", help="likeness to the photos, as CLIP sees it", summary=True,
        logged=True, study="values"),
    "clip_t": Measure("CLIP-T", base="clip_t_base", help="does the picture show what the prompt says? (token left out)",
        truth="CLIP-T", summary=True, logged=True, curve="prompt", study="differences", panel="prompt (CLIP-T)",
        pictures=True),
    "clip_t_base": Measure(summary=True),
    "diversity": Measure("DIV", base="diversity_base",
        help="difference between pictures of one prompt; higher is more varied", summary=True, logged=True,
        study="scores"),
    "pres": Measure("PRES", base="pres_base", help="likeness of the bare class to the subject; near the base's is good",
        summary=True, logged=True, study="differences"),
    "pres_base": Measure(summary=True, logged=True),
    "class_diversity": Measure("DIV of the class", base="class_diversity_base",
        help="difference between pictures of the bare class, by DINO; near the base's is good"),
    "drift": Measure("Drift", base="drift_base_spread",
        help="change of unrelated pictures; beside it, the base's own from seed to seed", summary=True, logged=True,
        study="differences"),
    "drift_base_spread": Measure(summary=True),
    "copy_index": Measure("Copy index",
        help="0: no nearer to a photo than the photos are to each other; 1: it is the photo"),
    "background_leak": Measure("Background leak",
        help="nearness to the photos' backgrounds gained over the base; 0 is none", logged=True, study="differences",
        column="Leak"),
    "confusion": Measure("Confusion", base="confusion_base",
        help="with the adapter's other subjects; 0: told apart as the photos are, 1: as if the other had been "
        "asked for", summary=True, logged=True, study="differences"),
    "confusion_base": Measure(summary=True, study="scores", column="Confusion of the base"),
    "truth": Measure(truth="Likeness to true renders in the place", logged=True, study="values"),
    "judge_kind": Measure("kind", "judge"),
    "judge_colour": Measure("main colour", "judge"),
    "judge_colour2": Measure("second colour", "judge"),
    "judge_ornaments": Measure("ornaments (all that it wears, and no others)", "judge"),
    "judge_place": Measure("place", "judge"),
    "dino_of_ceiling": Measure("DINO, share of true renders'", "share", share=("dino", "dino_ceiling"), logged=True,
        study="values"),
    "clip_t_of_base": Measure("CLIP-T, share of the base's", "share", share=("clip_t", "clip_t_base"), logged=True,
        sentence="agreement with the prompt (CLIP-T) {clip_t_of_base:.2f} of the base's", study="values"),
    "clip_t_of_ceiling": Measure("CLIP-T, share of true renders'", "share", share=("clip_t", "clip_t_ceiling"),
        study="values"),
    "pres_gain": Measure("PRES above the base's, in its standard deviations", "share", logged=True, study="values"),
    "drift_of_spread": Measure("Drift, share of the base's spread", "share", share=("drift", "drift_base_spread"),
        logged=True, sentence="pictures of other things changed by {drift_of_spread:.2f} of what a new seed changes",
        study="values"),
    "class_diversity_of_base": Measure("DIV of the bare class, share of the base's", "share",
        share=("class_diversity", "class_diversity_base"), study="values"),
    "sharpness_of_ceiling": Measure("Sharpness of the toy, share of true renders' after the autoencoder", "share",
        share=("sharpness", "sharpness_ceiling"), study="values"),
    "copied": Measure("Share of copies", "share", logged=True, curve="copies",
        sentence="copies of a photo: {copied:.0%} of the pictures", study="values"),
    "score": Measure("Score", logged=True, curve="score", sentence="score {score:.3f}: likeness × prompt × no copy",
        study="differences", panel="score"),
    "class_moved": Measure(sentence="a bare {class_word} went {class_moved:.0%} of the way to yours (PRES)"),
}
"""By the name that `scores.json` and a run's events give it. For PRES, drift, confusion and copies,
less is better."""
# fmt: on


def curves() -> dict[str, str]:
    return {name: row.curve for name, row in MEASURES.items() if row.curve}
