"""Copies of sample subjects with another rare word: two subjects of one run need a word each, and
all have `sks`.

python -m tools.another_word rocket --word zwx --out runs/zwx

It is for `assets/configs/two_subjects.toml`.
"""

import argparse
import json
import shutil
from pathlib import Path

__all__ = ["main"]

PHOTOS = Path("assets/subjects")


def write(source: Path, folder: Path, word: str) -> None:
    """Photos and masks as they are; captions and subject.json with the other word."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    facts = json.loads((source / "subject.json").read_text(encoding="utf-8"))
    for path in folder.glob("*.txt"):
        path.write_text(
            path.read_text(encoding="utf-8").replace(facts["token"], word), encoding="utf-8"
        )
    (folder / "subject.json").write_text(
        json.dumps({**facts, "token": word}, indent=2) + "\n", encoding="utf-8"
    )


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("subjects", nargs="+")
    options.add_argument("--word", required=True)
    options.add_argument("--out", type=Path, required=True)
    chosen = options.parse_args(arguments)
    for subject in chosen.subjects:
        write(PHOTOS / subject, chosen.out / subject, chosen.word)


if __name__ == "__main__":
    main()
