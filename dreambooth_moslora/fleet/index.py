"""`index.html` of a fleet: each subject's contact sheet, likeness and alarms, the most urgent subjects first.

It is one file without scripts. Small pictures are embedded, and links lead to files beside it. It contains no
path of the machine.
"""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.errors import spelled_out
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.evaluation.html_page import page, picture
from dreambooth_moslora.fleet.records import INDEX_NAME
from dreambooth_moslora.fleet.status import Row, cost_of, status_lines

__all__ = ["write_index"]

SHEET_PX = 320
MOST_SHEETS = 500
"""Contact sheets in the page. The most urgent subjects come first, so those without a sheet matter least."""
PATH = re.compile(r"(?<![\w/\\])(?:[A-Za-z]:)?(?:[\\/][^\\/:;,'\"()]*(?=[\\/]))*[\\/][^\\/\s:;,'\"()]+[\\/]?")
"""A space inside a folder's name belongs to the path; a space in the last part ends it."""
HEADER = ("Subject", "State", "Likeness (DINO)", "What to look at", "Contact sheet")


def write_index(out: Path, rows: Sequence[Row]) -> Path:
    """Write the page of `rows`, in their order (that of `status.rows_of`). Returns the file."""
    title = f"Fleet of {len(rows)} subjects"
    about = f'<p class="faint">{escape(status_lines(rows)[0])}; cost: {escape(cost_of([r.record for r in rows]))}</p>'
    body = "".join(html_of(out, row, has_sheet=number < MOST_SHEETS) for number, row in enumerate(rows))
    head = "".join(f"<th>{name}</th>" for name in HEADER)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    atomic_write(out / INDEX_NAME, page(title, [about, table]))
    return out / INDEX_NAME


def html_of(out: Path, row: Row, *, has_sheet: bool) -> str:
    looks = [row.record.message, *row.alarms]
    said = "<br>".join(escape(without_paths(spelled_out(text), out)) for text in looks if text)
    likeness = "" if row.likeness is None else f"{row.likeness:.3f}"
    kind = {"failed": "bad", "done": "bad" if row.alarms else "good"}.get(row.record.state, "faint")
    far = f" at step {row.step}" if row.step and row.record.state != "done" else ""
    cells = [
        f"<b>{escape(spelled_out(row.name))}</b><br><span class='faint'>{escape(row.words)}</span>",
        f'<span class="{kind}">{row.record.state}</span>{far}',
        likeness,
        said,
        sheet_of(RunDir(out / row.name)) if has_sheet else "",
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def sheet_of(run_dir: RunDir) -> str:
    """A small contact sheet that links to the full one; empty when there is none that can be read."""
    path = run_dir.contact_sheet_path
    try:
        with Image.open(path) as sheet:
            shown = picture(sheet, f"contact sheet of {run_dir.path.name}", side_px=SHEET_PX)
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    return f'<a href="{quote(run_dir.path.name)}/{quote(path.name)}">{shown}</a>'


def without_paths(text: str, out: Path) -> str:
    """The message with each path cut to its last part."""
    for place in {str(out), str(out.resolve())}:
        text = text.replace(f"{place}/", "")
    return PATH.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], text)
