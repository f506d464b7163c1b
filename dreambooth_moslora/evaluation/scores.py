"""The result of an evaluation: tables of scores, their means and intervals, and the pictures behind them."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.evaluation.intervals import Interval, bootstrap_mean
from dreambooth_moslora.evaluation.protocol import EvaluationPlan

__all__ = ["Evaluation", "RELATIVE", "Tables"]

Tables = dict[str, np.ndarray]
RELATIVE = {
    "dino_of_ceiling": "DINO, share of true renders'",
    "clip_t_of_base": "CLIP-T, share of the base's",
    "clip_t_of_ceiling": "CLIP-T, share of true renders'",
    "pres_gain": "PRES above the base's, in its standard deviations",
    "drift_of_spread": "Drift, share of the base's spread",
    "class_diversity_of_base": "DIV of the bare class, share of the base's",
    "sharpness_of_ceiling": "Sharpness of the toy, share of true renders' after the autoencoder",
    "copied": "Share of copies",
}


@dataclass
class Evaluation:
    """Tables of scores by name, each (prompts, seeds), (prompts, 1) or (pictures,), and the pictures behind them."""

    plan: EvaluationPlan
    tables: Tables
    alarm: metrics.CopyAlarm
    score: float
    seconds: float
    pictures: dict[str, list[Image.Image]] = field(repr=False, default_factory=dict)

    def mean(self, name: str) -> float:
        return float(self.tables[name].mean())

    def interval(self, name: str) -> Interval:
        return bootstrap_mean(self.tables[name])

    def means(self) -> dict[str, float]:
        """All scores as plain numbers, rounded, for the log of a training run."""
        found = {name: round(float(table.mean()), 4) for name, table in self.tables.items()}
        copies = {"copied": round(self.alarm.share, 4), "copy_alarm": self.alarm.raised}
        return {**found, **self.relative(), **copies, "score": round(self.score, 4)}

    def relative(self) -> dict[str, float]:
        """Scores relative to their scales: the base's score, the ceiling (toy world), or the base's own spread.

        pres_gain is PRES above the base's, in standard deviations of the base's pictures.
        """
        shares = {
            "clip_t_of_base": ("clip_t", "clip_t_base"),
            "clip_t_of_ceiling": ("clip_t", "clip_t_ceiling"),
            "dino_of_ceiling": ("dino", "dino_ceiling"),
            "drift_of_spread": ("drift", "drift_base_spread"),
            "sharpness_of_ceiling": ("sharpness", "sharpness_ceiling"),
            "class_diversity_of_base": ("class_diversity", "class_diversity_base"),
        }
        found = {}
        for name, (measure, whole) in shares.items():
            if whole in self.tables and self.mean(whole):
                found[name] = self.mean(measure) / self.mean(whole)
        own = self.tables.get("pres_base", np.zeros(0))
        if own.size > 1 and (deviation := float(own.std(ddof=1))):
            found["pres_gain"] = (self.mean("pres") - self.mean("pres_base")) / deviation
        return {name: round(value, 4) for name, value in found.items()}
