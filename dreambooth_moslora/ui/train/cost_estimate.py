"""The cost of a run in advance: the estimate of `--dry_run`, in a card."""

from statistics import median
from typing import TYPE_CHECKING

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.ui.adapters.recipes import recipe_of
from dreambooth_moslora.ui.app_state import AppContext
from dreambooth_moslora.ui.generate.actions import format_seconds
from dreambooth_moslora.ui.html_snippets import remarks_card
from dreambooth_moslora.ui.jobs.jobs import Jobs
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.train.form import TrainForm
from dreambooth_moslora.ui.train.memory_choice import card_lines, free_gib
from dreambooth_moslora.ui.train.start import adapter_of, start_lines

if TYPE_CHECKING:
    from dreambooth_moslora.core.config.train_config import TrainConfig

__all__ = ["estimate_cost"]


def estimate_cost(ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor) -> str:
    """Each choice, then steps, time, memory and disk as HTML. Raises UserError for whatever training would refuse."""
    try:
        lines = _lines(ctx, jobs, form, visitor)
    except UserError as error:
        raise UserError(jobs.told(str(error))) from error
    return remarks_card([jobs.told(line) for line in lines])


def _lines(ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor) -> list[str]:
    from dreambooth_moslora.base.locate import base_folder
    from dreambooth_moslora.core.config.train_config import TrainConfig
    from dreambooth_moslora.photos.folder import photo_report
    from dreambooth_moslora.photos.photo import counts_of
    from dreambooth_moslora.training.planning.advice import advice
    from dreambooth_moslora.training.planning.checks import check_settings
    from dreambooth_moslora.training.planning.dry_run import cost_lines, step_lines
    from dreambooth_moslora.training.planning.estimate import estimate, size_of_base
    from dreambooth_moslora.training.planning.memory_plan import planned
    from dreambooth_moslora.training.planning.step_plan import plan_steps

    photos = visitor.photos_dir
    if not visitor.has_photos:
        raise UserError("add some photos of your subject first")
    recipe = recipe_of(ctx, form.like, visitor)
    choices = form.choices(ctx.base_name, ctx.resolution_px, photos, ctx.runs_dir / "new", recipe=recipe)
    config = planned(TrainConfig.from_dict(choices.all), free_gib())
    check_settings(config)
    counts = counts_of(photo_report(config).photos)
    plan = plan_steps(config, counts)
    size = size_of_base(base_folder(config), config.target_modules, config.variant)
    cost = estimate(config, size, plan.total_steps)
    adapter_of(ctx, form, visitor)
    return [
        *start_lines(form),
        *(words for words, _ in choices.said),
        *step_lines(config, plan),
        *time_line(jobs, config, plan.total_steps),
        *cost_lines(config, cost),
        *card_lines(config, cost),
        *advice(config, cost, plan),
    ]


def time_line(jobs: Jobs, config: "TrainConfig", total_steps: int) -> list[str]:
    """The time at the pace of this machine's newest run with the same base and size."""
    alike = (
        *("pretrained_model_name_or_path", "resolution", "train_batch_size", "gradient_accumulation_steps"),
        *("with_prior_preservation", "gradient_checkpointing", "base_quantization"),
    )
    for job in jobs.all():
        metrics = jobs.metrics(job)
        earlier = metrics.last("start").get("config", {})
        paces = [event["step_sec"] for event in metrics.of("step")[-50:] if event.get("step_sec")]
        if paces and all(earlier.get(name) == getattr(config, name) for name in alike):
            return [f"time: about {format_seconds(median(paces) * total_steps)}, at the pace of the last such run here"]
    return ["time: not known before the first run here; the page shows it after a few steps"]
