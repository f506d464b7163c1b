"""The evaluation of an adapter with several subjects as files: likeness between subjects, their pictures, and pairs.

scores.json, report.html    all subjects: likeness and confusion as matrices, pictures by subject, pairs
subject_1/, subject_2/ …    the report of each alone, as for an adapter with one subject
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.evaluation.evaluate import Evaluator
from dreambooth_moslora.evaluation.html_page import page, pictures, section, table
from dreambooth_moslora.evaluation.intervals import bootstrap_mean
from dreambooth_moslora.evaluation.metrics import photo_fidelity
from dreambooth_moslora.evaluation.report import ReportContext, scores_json, with_interval, write_report
from dreambooth_moslora.evaluation.scores import Evaluation
from dreambooth_moslora.evaluation.subjects import Together, in_all, pooled

__all__ = ["confusion_lines", "write_subject_reports"]

MEANING = (
    "Confusion says how far the pictures of one subject (row) went from its own photos to another's (column), by DINO. "
    "0: told apart as the photos are; 1: as if the other had been asked for; 1/2: near neither. In brackets the 95 % "
    "interval, behind it the same of the base's pictures, which know no subject."
)
SHOWN = 8
"""Pictures of each subject in the common report; its own report has them all."""


def write_subject_reports(
    folder: Path,
    evaluators: Sequence[Evaluator],
    found: Sequence[Evaluation],
    together: Sequence[Together],
    about: ReportContext,
) -> None:
    """Write `folder`/scores.json and report.html for all, and those of each subject in a folder of its own."""
    fidelities = [photo_fidelity(one.photos.dino) for one in evaluators]
    for number, (evaluator, one, fidelity) in enumerate(zip(evaluators, found, fidelities), start=1):
        write_report(folder / f"subject_{number}", one, about, evaluator.photos.pictures, fidelity)
    scores = subjects_json(found, together, about, fidelities)
    atomic_write(folder / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / "report.html", subjects_html(evaluators, found, together, about))


def subjects_json(
    found: Sequence[Evaluation], together: Sequence[Together], about: ReportContext, fidelities: Sequence[float]
) -> dict:
    """`scores_json` over all subjects, with that of each in `subjects`, and `confusion` and `together`."""
    whole = scores_json(pooled(found), about, float("nan"))
    whole = {name: value for name, value in whole.items() if name not in ("subject", "per_prompt")}
    return {
        **whole,
        "subjects": [scores_json(one, about, fidelity) for one, fidelity in zip(found, fidelities)],
        "confusion": [entry(one, words) for one in found for words in rivals_of(one, found)],
        "together": [
            {"words": list(pair.words), **{n: bootstrap_mean(t).to_dict() for n, t in pair.tables.items()}}
            for pair in together
        ],
    }


def entry(found: Evaluation, words: str) -> dict:
    """One cell of both matrices: pictures `of` a subject, compared with the photos of the subject `with`."""
    names = {
        "confusion": f"confusion_with {words}",
        "confusion_base": f"confusion_with {words}_base",
        "dino_own": "dino",
        "dino_other": f"dino_to {words}",
    }
    intervals = {key: found.interval(name).to_dict() for key, name in names.items()}
    return {"of": words_of(found), "with": words, **intervals}


def words_of(found: Evaluation) -> str:
    return found.plan.subject.words


def rivals_of(one: Evaluation, found: Sequence[Evaluation]) -> list[str]:
    return [words_of(other) for other in found if other is not one]


def confusion_lines(found: Sequence[Evaluation]) -> list[str]:
    """For the terminal: each subject against each other one."""
    lines = []
    for one in found:
        for words in rivals_of(one, found):
            own, other = one.mean("dino"), one.mean(f"dino_to {words}")
            likeness = f"DINO {own:.3f} to its own photos, {other:.3f} to the other's"
            said = with_interval(one, f"confusion_with {words}")
            lines.append(f"confusion of “{words_of(one)}” with “{words}”: {said}  ({likeness})")
    return lines


def subjects_html(
    evaluators: Sequence[Evaluator], found: Sequence[Evaluation], together: Sequence[Together], about: ReportContext
) -> str:
    plan, names = found[0].plan, " and ".join(f"“{words_of(one)}”" for one in found)
    text = (
        f"{names} by the base {about.base}: {len(plan.templates)} prompts × {len(plan.seeds)} seeds of each, "
        f"{plan.inference_steps} steps at guidance {about.guidance_scale:g}. Encoders: {' and '.join(about.encoders)}."
    )
    parts = [
        f'<p class="faint">{escape(text)}</p>',
        section("Are they told apart?", f"<p>{escape(MEANING)}</p>", confusion_table(found)),
        section("DINO of the pictures (row) to the photos (column)", likeness_table(found)),
        section("Scores of each", score_table(found)),
        *(subject_section(evaluator, one) for evaluator, one in zip(evaluators, found)),
        *(together_section(pair) for pair in together),
    ]
    return page(f"Fidelity of {about.adapter}", parts)


def confusion_table(found: Sequence[Evaluation]) -> str:
    def cell(one: Evaluation, other: Evaluation) -> str:
        if one is other:
            return "–"
        name = f"confusion_with {words_of(other)}"
        return f"{with_interval(one, name)}, base {one.mean(name + '_base'):.3f}"

    return matrix(found, cell)


def likeness_table(found: Sequence[Evaluation]) -> str:
    return matrix(
        found, lambda one, other: with_interval(one, "dino" if one is other else f"dino_to {words_of(other)}")
    )


def matrix(found: Sequence[Evaluation], cell) -> str:
    rows = [[words_of(one), *(cell(one, other) for other in found)] for one in found]
    return table(["", *(words_of(one) for one in found)], rows)


def score_table(found: Sequence[Evaluation]) -> str:
    names = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "pres": "PRES", "drift": "Drift"}
    known = in_all(found, names)
    rows = [[words_of(one), *(with_interval(one, name) for name in known), f"{one.score:.3f}"] for one in found]
    return table(["", *(names[name] for name in known), "Score"], rows)


def subject_section(evaluator: Evaluator, found: Evaluation) -> str:
    firsts = found.pictures["subject"][:: len(found.plan.seeds)][:SHOWN]
    words = words_of(found)
    return section(
        f"“{words}”", "Its photos:", pictures(evaluator.photos.pictures[:SHOWN]), "New ones:", pictures(firsts, words)
    )


def together_section(pair: Together) -> str:
    rows = []
    for name, words in zip(("first", "second"), pair.words):
        ours, base = (bootstrap_mean(pair.tables[name + end]) for end in ("", "_base"))
        rows.append((f"DINO to “{words}”", f"{ours.mean:.3f} [{ours.low:.3f}, {ours.high:.3f}]", base.mean))
    said = " and ".join(f"“{words}”" for words in pair.words)
    return section(
        f"{said} in one prompt",
        table(("", "Adapter", "Base, without the tokens"), rows),
        "Adapter:",
        pictures(pair.pictures, said),
        "Base:",
        pictures(pair.base_pictures, "base"),
    )
