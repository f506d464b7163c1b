"""An evaluation as files: `scores.json` for programs, `report.html` for people."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from dreambooth_moslora import __version__
from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.pictures import render
from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.evaluation.evaluate import Evaluation
from dreambooth_moslora.settings.measures import MEASURES
from dreambooth_moslora.training.explain import ScaleChoice


@dataclass(frozen=True)
class ReportContext:
    """What was judged, as the report names it, without paths. `encoders` are the names of CLIP and DINO.

    `scale`: the result of --sweep_scale.
    """

    adapter: str
    base: str
    encoders: tuple[str, str]
    inference_steps: int
    guidance_scale: float
    diversity: str = "DINO distance"
    scale: ScaleChoice | None = None


def scores_json(found: Evaluation, about: ReportContext, photo_fidelity: float) -> dict:
    """All measurements, JSON-ready: means with 95 % intervals, and each prompt's means."""
    plan = found.plan
    return {
        "format": 1,
        "version": __version__,
        "adapter": about.adapter,
        "base": about.base,
        "encoders": {**dict(zip(("clip", "dino"), about.encoders)), "diversity": about.diversity},
        "subject": asdict(plan.subject),
        "protocol": {
            "prompts": len(plan.templates),
            "seeds": list(plan.seeds),
            "class_images": plan.class_images,
            "unrelated_prompts": len(plan.unrelated),
            "inference_steps": plan.inference_steps,
            "guidance_scale": about.guidance_scale,
            "interval": "95 %, crossed bootstrap over prompts and seeds",
        },
        "scores": {name: found.interval(name).to_dict() for name in found.tables},
        "dino_of_photos": None if math.isnan(photo_fidelity) else round(photo_fidelity, 4),
        "relative": found.relative(),
        "copy_alarm": asdict(found.alarm),
        "score": round(found.score, 4),
        **({"scale": asdict(about.scale)} if about.scale else {}),
        "per_prompt": per_prompt(found),
        "seconds": round(found.seconds, 1),
    }


def per_prompt(found: Evaluation) -> list[dict]:
    """Means over the seeds for each prompt of the subject, from every table with such rows."""
    tables = {}
    for name, values in found.tables.items():
        has_rows = values.ndim == 2 and len(values) == len(found.plan.templates)
        if has_rows and not name.startswith(("drift", "class", "dino_bare")):
            tables[name] = values
    rows = []
    for number, prompt in enumerate(found.plan.texts):
        means = {name: round(float(values[number].mean()), 4) for name, values in tables.items()}
        rows.append({"prompt": prompt, **means})
    return rows


def report_html(found: Evaluation, about: ReportContext, photos: list[Image.Image], photo_fidelity: float) -> str:
    """The page: verdict, scores, photos, every prompt by adapter and base, the picture nearest to a copy."""
    return render(
        "evaluation.html",
        title=f"Fidelity of {about.adapter}",
        found=found,
        about=about,
        photos=photos,
        scores=score_rows(found, photo_fidelity),
        shares=[(MEASURES[name].title, f"{value:.3f}") for name, value in shares_of(found).items()],
        truths=rows_beside(found, [name for name, row in MEASURES.items() if row.truth], ("_ceiling", "_floor")),
        judged=rows_beside(found, [name for name, row in MEASURES.items() if row.kind == "judge"], ("_ceiling",)),
        by_prompt=prompt_table(found),
        copied=metrics.COPIED,
        alarm_share=metrics.ALARM_SHARE,
    )


def score_rows(found: Evaluation, photo_fidelity: float) -> list[tuple]:
    """Title, the adapter's mean, the base's, that of the photos themselves, and the meaning of each measure."""
    rows = []
    for name, row in MEASURES.items():
        if row.title and row.kind == "score" and name in found.tables:
            own = photo_fidelity if name == "dino" and not math.isnan(photo_fidelity) else ""
            base = found.interval(row.base) if row.base in found.tables else ""
            rows.append((row.title, found.interval(name), base, own, row.help))
    return rows


def shares_of(found: Evaluation) -> dict[str, float]:
    """The scores relative to their scales, where those were measured."""
    known = {**found.relative(), "copied": found.alarm.share}
    return {name: known[name] for name in MEASURES if name in known}


def rows_beside(found: Evaluation, names: Sequence[str], ends: Sequence[str]) -> list[tuple]:
    """Title, mean and the means beside it (NAME_ceiling, NAME_floor) of each measure that was compared with them."""
    rows = []
    for name in names:
        tables = [name + end for end in ("", *ends)]
        if all(table in found.tables for table in tables):
            row = MEASURES[name]
            rows.append((row.truth or row.title, *map(found.interval, tables)))
    return rows


def prompt_table(found: Evaluation) -> tuple[list[str], list[list]]:
    """Header and rows of each prompt's means."""
    rows = per_prompt(found)
    names = ["prompt", *(name for name, row in MEASURES.items() if (row.title or row.truth) and name in rows[0])]
    return [name.replace("_", " ") for name in names], [[row[name] for name in names] for row in rows]


def write_report(
    folder: Path, found: Evaluation, about: ReportContext, photos: list[Image.Image], photo_fidelity: float
) -> None:
    """Write `folder`/scores.json and `folder`/report.html, each completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = scores_json(found, about, photo_fidelity)
    atomic_write(folder / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / "report.html", report_html(found, about, photos, photo_fidelity))
