"""`explain RUN`: what a run's figures mean, and which flag to try next."""

import argparse

from dreambooth_moslora.core import spelled_out
from dreambooth_moslora.disk.run_folder import RunDir

STATES = {"done": "it ended", "interrupted": "it was stopped", "failed": "it failed"}


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder; its scores, if any, are those of its evaluations")


def run_explain(args: argparse.Namespace) -> int:
    from dreambooth_moslora.training.explain import NOTHING, advice_after, figures_of, meanings

    found = figures_of(RunDir(args.run))
    shown = "" if found.exposures is None else f"; each of {found.photos} photos was shown {found.exposures:.0f} times"
    print(spelled_out(f"{STATES.get(found.state, 'it has not ended')} after {found.step} steps{shown}"))
    advice = advice_after(found) or [NOTHING]
    for title, lines in {"what the figures mean": meanings(found), "what to try next": advice}.items():
        if lines:
            print("\n".join([title, *(spelled_out(f"  {line}") for line in lines)]))
    return 0
