"""An evaluation as files: `scores.json` for programs, `report.html` for people."""

import json
import math
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from PIL import Image

from dreambooth_moslora import __version__
from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.pictures import page, picture, pictures, section, table
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
    parts = [
        introduction(found, about),
        section("Scores", score_table(found, photo_fidelity), relative_table(found), cost(found)),
        *([section("Strength", f"<p>{escape(about.scale.sentence())}.</p>")] if about.scale else []),
        *([section("Against the truth of the toy world", *truth_tables(found))] if "truth" in found.tables else []),
        section("The photos", pictures(photos)),
        section("Each prompt: the adapter, and the base without the subject", prompt_rows(found)),
        section("Is anything copied?", copies(found, photos)),
        *other_pictures(found),
        section("Per prompt", prompt_table(found)),
    ]
    return page(f"Fidelity of {about.adapter}", parts)


def introduction(found: Evaluation, about: ReportContext) -> str:
    words = escape(found.plan.subject.words)
    text = (
        f"“{words}” by the base {escape(about.base)}: {len(found.plan.templates)} prompts × {len(found.plan.seeds)} "
        f"seeds, {found.plan.inference_steps} steps each at guidance {about.guidance_scale:g}. "
        f"Encoders: {escape(' and '.join(about.encoders))}. "
        f"DIV is {about.diversity}. Intervals are 95 %, over prompts and seeds."
    )
    kind = "bad" if found.alarm.raised else "good"
    alarm = (
        f"Copy alarm: {found.alarm.share:.0%} of the pictures repeat a photo."
        if found.alarm.raised
        else "No copy alarm: the pictures are new ones."
    )
    score = f"Score {found.score:.3f} = DINO × CLIP-T as a share of the base's × share of pictures that copy no photo."
    return f'<p class="faint">{text}</p><p><b>{score}</b> <span class="{kind}">{alarm}</span></p>'


def score_table(found: Evaluation, photo_fidelity: float) -> str:
    rows = []
    for name, row in MEASURES.items():
        if row.title and row.kind == "score" and name in found.tables:
            own = photo_fidelity if name == "dino" and not math.isnan(photo_fidelity) else ""
            base_value = with_interval(found, row.base) if row.base in found.tables else ""
            rows.append((row.title, with_interval(found, name), base_value, own, row.help))
    return table(("Measure", "Adapter", "Base", "Photos", "Meaning"), rows)


def relative_table(found: Evaluation) -> str:
    """The scores relative to their scales, where those were measured."""
    scales = {**found.relative(), "copied": found.alarm.share}
    return table(("On its own scale", "Value"), [(MEASURES[n].title, f"{v:.3f}") for n, v in scales.items()])


def with_interval(found: Evaluation, name: str) -> str:
    interval = found.interval(name)
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def cost(found: Evaluation) -> str:
    count = sum(map(len, found.pictures.values()))
    return f'<p class="faint">{count} pictures and their scores took {found.seconds:.0f} s.</p>'


def truth_tables(found: Evaluation) -> list[str]:
    rows = [
        (row.truth, *(with_interval(found, name + end) for end in ("", "_ceiling", "_floor")))
        for name, row in MEASURES.items()
        if row.truth and name in found.tables
    ]
    header = ("Measure", "Adapter", "Ceiling: true renders", "Floor: others of the kind")
    judged = [
        (row.title, *(with_interval(found, name + end) for end in ("", "_ceiling")))
        for name, row in MEASURES.items()
        if row.kind == "judge" and name in found.tables
    ]
    asked = ("The judge reads", "Share right", "Ceiling: true renders")
    return [table(header, rows), *([table(asked, judged)] if judged else [])]


def prompt_rows(found: Evaluation) -> str:
    seeds = len(found.plan.seeds)
    rows = []
    for row, prompt in enumerate(found.plan.texts):
        some = slice(row * seeds, (row + 1) * seeds)
        ours, base = found.pictures["subject"][some], found.pictures["subject_base"][some]
        left, right = pictures(ours, f"adapter: {prompt}"), pictures(base, f"base: {prompt}")
        rows.append(f"<tr><td>{escape(prompt)}</td><td>{left}</td><td>{right}</td></tr>")
    return f"<table><tr><th>Prompt</th><th>Adapter</th><th>Base</th></tr>{''.join(rows)}</table>"


def copies(found: Evaluation, photos: list[Image.Image]) -> str:
    alarm = found.alarm
    text = (
        f"The picture nearest to a photo has copy index {alarm.largest:.2f}; beside it that photo. A picture counts "
        f"as a copy above {metrics.COPIED}, the alarm goes off when more than {metrics.ALARM_SHARE:.0%} are."
    )
    both = picture(found.pictures["subject"][alarm.picture], "picture") + picture(photos[alarm.photo], "photo")
    return f'<p>{text}</p><div class="tiles">{both}</div>'


def other_pictures(found: Evaluation) -> list[str]:
    titles = {
        "bare": f"The instance prompt alone: “{escape(found.plan.bare_prompt)}”",
        "class": "The bare class (PRES)",
        "unrelated": "Unrelated prompts (drift)",
    }
    sections = []
    for name, title in titles.items():
        if name in found.pictures:
            base = found.pictures.get(f"{name}_base")
            beside = ["Base:", pictures(base)] if base else []
            sections.append(section(title, "Adapter:", pictures(found.pictures[name]), *beside))
    return sections


def prompt_table(found: Evaluation) -> str:
    rows = per_prompt(found)
    names = ["prompt", *(name for name, row in MEASURES.items() if (row.title or row.truth) and name in rows[0])]
    return table([n.replace("_", " ") for n in names], [[row[n] for n in names] for row in rows])


def write_report(
    folder: Path, found: Evaluation, about: ReportContext, photos: list[Image.Image], photo_fidelity: float
) -> None:
    """Write `folder`/scores.json and `folder`/report.html, each completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = scores_json(found, about, photo_fidelity)
    atomic_write(folder / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / "report.html", report_html(found, about, photos, photo_fidelity))
