"""Bases that were distilled to a few steps, which are not ones to train."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.settings.family_facts import FamilyFacts

DISTILLED_NAME = re.compile(r"turbo|schnell|lightning|hyper-sd")
"""Names of models that sample in a few steps."""
UNDISTILLED_NAME = re.compile(r"(?<![a-z])de[-_ ]?(turbo|distill)")
"""Names of models that were trained back to many steps, such as Z-Image-De-Turbo: they are bases.
"""


def explain_distilled(index: Mapping[str, Any], name: str, facts: FamilyFacts) -> str:
    """Return why a base is not one to train, by its index and name; "" if it is.

    An adapter undoes what few-step models have learnt, or learns a subject that is anybody's.
    """
    # Of a path, only the base's folder counts, and the model's folder in the hub's cache.
    parts = Path(name.lower()).parts
    cached = [part for part in parts if part.startswith("models--")]
    model_name = " ".join([*parts[-1:], *cached])

    # "De-turbo" contains "turbo", but is a base.
    match = DISTILLED_NAME.search(model_name)
    if index.get("is_distilled"):
        reason = "it is"
    elif match and not UNDISTILLED_NAME.search(model_name):
        reason = f"“{match[0]}” says that it is"
    else:
        return ""
    bases = " or ".join(model.hub_id for model in facts.models)
    return f"{reason} distilled to a few steps: train the base model of its family, {bases}"
