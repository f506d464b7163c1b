"""Metrics of an adapter: one row each, for reports, logs, plots, cards and studies.

The formulas are in `evaluation/metrics.py`, and `evaluation/scoring.py` computes a table of each
metric by its name. Rows stand in the order in which people see them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

CLIP_REPO = "openai/clip-vit-large-patch14"
DINO_REPO = "facebook/dinov2-base"
"""Encoders that score images of all bases but the embedded ones."""
MIN_LIKENESS = 0.42
"""DINO's cosine to a photo below which an image does not show its subject (`enlarge`).

It makes the fewest errors on renders of sixteen toys, by the toys' own DINO: 1 of 320 of their own
views is below it, and 5 of 192 of other toys are above. It was not measured on photographs."""
YUNET = ("opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx")
SFACE = ("opencv/face_recognition_sface", "face_recognition_sface_2021dec.onnx")
"""Repositories and files of the models that find and compare faces."""


@dataclass(frozen=True)
class Metric:
    """Metric, with the tables and plots that show it; "" or False where they do not."""

    title: str = ""  # its name in reports; a row without one is in no table of a report
    kind: Literal["score", "share"] = "score"
    base: str = ""  # the metric of the base's own images, shown beside it
    photos: str = ""  # that of the photos among themselves
    help: str = ""  # meaning
    better: str = ""  # higher, lower, or near which value
    share: tuple[str, str] | None = None  # two metrics: it is the ratio of their means
    # whether evaluations during training write it into the run's events, and so into the card
    logged: bool = False
    curve: str = ""  # its label on the plots in a run's folder
    phrase: str = ""  # what stands before its value, in %, on the page and in the terminal
    # a study compares the values, shows the score of each arm, or also shows the differences
    study: Literal["", "values", "scores", "differences"] = ""
    column: str = ""  # its title in a study's tables, if not `title`
    panel: str = ""  # its title on a study's plots, if it is on them
    pictures: bool = False  # whether a study also compares single images by it


METRICS = {
    # Scores of the encoders, beside those of the base's own images.
    "dino": Metric(
        title="DINO",
        base="dino_base",
        help="likeness to the photos; tells subjects of one class apart",
        better="higher",
        logged=True,
        curve="subject",
        study="differences",
        panel="subject (DINO)",
        pictures=True,
        phrase="likeness to the photos",
    ),
    "dino_base": Metric(logged=True),
    "dino_bare": Metric(
        title="DINO, bare prompt",
        base="pres_base",
        help="likeness at the instance prompt alone, without a place",
        better="near DINO",
        logged=True,
        curve="bare prompt",
        study="differences",
        panel="bare prompt (DINO)",
        phrase="likeness without a place",
    ),
    # Style: how strong it is, and which content leaks with it.
    "style": Metric(
        title="Style",
        help="how far other content went to the photos' style; 0: the base's, 1: theirs",
        logged=True,
        curve="style",
        study="differences",
        panel="style",
        phrase="strength of the style",
    ),
    "leak": Metric(
        title="Content leak",
        base="leak_base",
        help="share of the pictures in which a thing of the style's pictures appears unasked",
        logged=True,
        curve="leak",
        study="differences",
        phrase="content that came along",
    ),
    "leak_base": Metric(logged=True),
    # Person: likeness of the face, where one is found.
    "identity": Metric(
        title="Identity",
        base="identity_base",
        photos="identity_of_photos",
        better="higher",
        help="likeness of the face to the photos' faces, in the pictures that show one",
        logged=True,
        curve="face",
        study="differences",
        panel="face",
        phrase="likeness of the face",
    ),
    "identity_base": Metric(logged=True),
    "identity_of_photos": Metric(logged=True),
    "no_face": Metric(
        title="No face",
        base="no_face_base",
        better="lower",
        help="share of the pictures in which no face is found; the identity leaves these out",
        logged=True,
        study="values",
    ),
    "no_face_base": Metric(logged=True),
    "clip_i": Metric(
        title="CLIP-I",
        base="clip_i_base",
        help="likeness to the photos, as CLIP sees it",
        better="higher",
        logged=True,
        study="values",
    ),
    "clip_t": Metric(
        title="CLIP-T",
        base="clip_t_base",
        help="does the picture show what the prompt says? (token left out)",
        better="higher",
        logged=True,
        curve="prompt",
        study="differences",
        panel="prompt (CLIP-T)",
        pictures=True,
    ),
    "clip_t_base": Metric(),
    "diversity": Metric(
        title="DIV",
        base="diversity_base",
        help="difference between pictures of one prompt",
        better="near the base's",
        logged=True,
        study="scores",
    ),
    "pres": Metric(
        title="PRES",
        base="pres_base",
        help="likeness of the bare class to the subject",
        better="lower",
        logged=True,
        study="differences",
    ),
    "pres_base": Metric(logged=True),
    "drift": Metric(
        title="Drift",
        base="drift_base_spread",
        help="change of unrelated pictures; beside it, the base's own from seed to seed",
        better="lower",
        logged=True,
        study="differences",
    ),
    "drift_base_spread": Metric(),
    "copy_index": Metric(
        title="Copy index",
        help="0: no nearer to a photo than the photos are to each other; 1: it is the photo",
        better="lower",
    ),
    "background_leak": Metric(
        title="Background leak",
        help="nearness to the photos' backgrounds gained over the base; needs masks",
        better="near zero",
        logged=True,
        study="differences",
        column="Leak",
    ),
    "confusion": Metric(
        title="Confusion",
        base="confusion_base",
        help=(
            "how far it looks like another subject of the adapter; 0: no more than the photos "
            "do, 1: as if that one had been asked for"
        ),
        better="lower",
        logged=True,
    ),
    "confusion_base": Metric(),
    # Only for the embedded base: likeness to true renders in the same place.
    "truth": Metric(logged=True, study="values"),
    # Ratios of these, by which runs on different subjects compare.
    "dino_of_ceiling": Metric(
        title="DINO, share of true renders'",
        kind="share",
        share=("dino", "dino_ceiling"),
        logged=True,
        study="values",
    ),
    "identity_share": Metric(
        title="Identity, share of the photos' own",
        kind="share",
        share=("identity", "identity_of_photos"),
        logged=True,
        study="values",
    ),
    "clip_t_of_base": Metric(
        title="CLIP-T, share of the base's",
        kind="share",
        share=("clip_t", "clip_t_base"),
        logged=True,
        study="values",
        phrase="prompts followed as by the base",
    ),
    "clip_t_of_ceiling": Metric(
        title="CLIP-T, share of true renders'",
        kind="share",
        share=("clip_t", "clip_t_ceiling"),
        study="values",
    ),
    "drift_of_spread": Metric(
        title="Drift, share of the base's spread",
        kind="share",
        share=("drift", "drift_base_spread"),
        logged=True,
        study="values",
    ),
    "sharpness_of_ceiling": Metric(
        title="Sharpness of the toy, share of true renders' after the autoencoder",
        kind="share",
        share=("toy_sharpness", "toy_sharpness_ceiling"),
        study="values",
    ),
    "copied": Metric(
        title="Share of copies",
        kind="share",
        logged=True,
        curve="copies",
        study="values",
        phrase="copies of photos",
    ),
    # Result of the others: the single number by which a run is judged.
    "score": Metric(
        title="Score",
        logged=True,
        curve="score",
        study="differences",
        panel="score",
        phrase="score",
    ),
}
"""By the name that `scores.json` and a run's events give it."""


def describe_scores(scores: Mapping[str, float]) -> dict[str, str]:
    """Return metric -> words with its value in %, for those of the scores that are told of a
    run."""
    return {
        name: f"{row.phrase} {scores[name]:.0%}"
        for name, row in METRICS.items()
        if row.phrase and name in scores
    }


def describe_likeness(names: Collection[str]) -> str:
    """Return a description of likeness in the score (`scoring.compute_fidelity`), by the metrics'
    names."""
    if "style" in names:
        return "style × (1 − the content leak above the base's)"
    return "the mean of DINO and the face's likeness" if "no_face" in names else "DINO"
