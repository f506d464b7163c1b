"""Make a picture of several runs: for each a photo, and its adapter's images of four places that no
photo shows.

    python -m tools.subject_sheet runs/bear runs/rocket --out assets/pictures/recipe.jpg

The places and seeds are fixed, so that nothing is chosen by eye. A run is one of the embedded base.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.pictures import SheetRow, draw_contact_sheet
from toybox.measures.grades import generate_places

__all__ = ["main", "build_rows"]


def build_rows(runs: list[Path]) -> Iterator[SheetRow]:
    """Build a row of five pictures for each run."""
    subject = SubjectPipeline.from_base("toy")
    for run in runs:
        settings = json.loads(RunDir(run).config_path.read_text(encoding="utf-8"))
        photo = min(Path(settings["instance_data_dir"]).glob("*.jpg"))
        images = generate_places(subject, run, settings["instance_prompt"])
        yield SheetRow(run.name.replace("_", " "), [Image.open(photo), *images])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="a JPEG")
    args = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        draw_contact_sheet(list(build_rows(args.runs)), Path(folder) / "sheet.png", tile_px=128)
        Image.open(Path(folder) / "sheet.png").save(args.out, quality=88)
    print(args.out)


if __name__ == "__main__":
    main()
