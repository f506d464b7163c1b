"""`python -m dreambooth_moslora explain RUN`: what a run's figures mean, and which flag to try next."""

import argparse
from typing import TYPE_CHECKING

from dreambooth_moslora.core import spelled_out

if TYPE_CHECKING:
    from dreambooth_moslora.training.explain import Figures

HELP = "say what a run's figures mean, and which flag to try next"
STATES = {"done": "it ended", "interrupted": "it was stopped", "failed": "it failed"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder; its scores, if any, are those of its evaluations")


def run(args: argparse.Namespace) -> int:
    from dreambooth_moslora.disk.run_folder import RunDir
    from dreambooth_moslora.training.explain import NOTHING, advice_after, figures_of, meanings

    found = figures_of(RunDir(args.run))
    advice = advice_after(found) or [NOTHING]
    parts = {"": [summary(found)], "what the figures mean": meanings(found), "what to try next": advice}
    for title, lines in parts.items():
        if title and lines:
            print(f"{title}")
        for line in lines:
            print(spelled_out(f"  {line}" if title else line))
    return 0


def summary(found: "Figures") -> str:
    text = f"{STATES.get(found.state, 'it has not ended')} after {found.step} steps"
    return (
        text
        if found.exposures is None
        else f"{text}; each of {found.photos} photos was shown {found.exposures:.0f} times"
    )
