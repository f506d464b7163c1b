"""A measure is one row: whoever adds it finds it in the report, on the terminal, in the log, the plot and the card."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from dreambooth_moslora.cli.evaluate import summary
from dreambooth_moslora.disk.events import StepEvaluated, event_of
from dreambooth_moslora.evaluation.evaluate import Evaluator
from dreambooth_moslora.evaluation.report import ReportContext, report_html
from dreambooth_moslora.settings.measures import MEASURES, Measure
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.explain import figures_from, meanings
from dreambooth_moslora.training.model_card import score_table
from dreambooth_moslora.training.publish import draw_fidelity
from tests.evaluation.test_evaluate import PLAN, TOY, stub_pictures, toy_pictures

ABOUT = ReportContext("mine", "toy", ("clip", "dino"), 2, 7.0)
SMILE = Measure(
    "Smile",
    base="smile_base",
    help="does it smile?",
    summary=True,
    logged=True,
    curve="smiles",
    sentence="it smiles on {smile:.0%} of the pictures",
)
LIKE_BASE = Measure("Smile, share of the base's", "share", share=("smile", "smile_base"), logged=True)


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(MEASURES, "smile", SMILE)
    monkeypatch.setitem(MEASURES, "smile_of_base", LIKE_BASE)


def test_a_row_of_the_table_is_all_that_a_measure_needs(added, encoders):
    photos = toy_pictures(TOY, ["on grass", "on the beach"])
    found = Evaluator(PLAN, encoders, photos)(lambda requests, on: stub_pictures(requests))
    found.tables |= {"smile": np.full((3, 2), 0.625), "smile_base": np.full((3, 2), 0.5)}

    html = report_html(found, ABOUT, photos)
    for text in ("Smile", "0.625 [0.625, 0.625]", "0.500 [0.500, 0.500]", "does it smile?", "1.250"):
        assert f">{text}<" in html
    assert "smile              0.625" in summary(found)

    scores = found.logged()
    assert (scores["smile"], scores["smile_of_base"]) == (0.625, 1.25)
    event = {"type": StepEvaluated.kind, "step": 3, "best": {"step": 3, "score": 0.1, "since": 0}, **scores}
    axes = Figure().subplots()
    draw_fidelity(axes, [event_of(event)])
    assert "smiles" in axes.get_legend_handles_labels()[1]
    assert "| smile | 0.625 |" in score_table(SimpleNamespace(scores=event_of(event).scores, best=None))
    assert "it smiles on 62% of the pictures" in meanings(figures_from([event], TrainConfig()))


def test_every_measure_that_has_a_scale_or_a_base_names_tables_that_exist():
    known = {*MEASURES, "clip_i_base", "diversity_base", "class_diversity_base", "sharpness"}
    known |= {f"{name}_ceiling" for name in ("dino", "clip_t", "sharpness")}
    assert {name for row in MEASURES.values() for name in (row.base, *(row.share or ())) if name} <= known
