"""The noise levels that a base was trained with, from its scheduler's configuration."""

from diffusers import (
    DDPMScheduler,
    SchedulerMixin,
)

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.training.step.objective import NoiseSchedule

__all__ = ["noise_schedule"]


def noise_schedule(scheduler: SchedulerMixin, edm_style: bool = False) -> NoiseSchedule:
    """The noise levels that a base was trained with, from its scheduler's configuration. EDM bases force EDM style.

    Raises UserError for a base that predicts neither noise nor velocity.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"the base predicts `{kind}`: only epsilon and v_prediction bases can be trained.")
    if "EDM" in type(scheduler).__name__:
        fresh = type(scheduler).from_config(scheduler.config)
        sigmas = fresh.sigmas[: len(fresh.timesteps)]
        return NoiseSchedule(sigmas, fresh.timesteps, kind, "edm", scheduler.config.sigma_data)
    alphas = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    if edm_style:
        alphas = alphas.clamp(min=2**-24)  # a zero-terminal-SNR base: as diffusers does, EDM needs a finite sigma
    return NoiseSchedule.from_alphas(alphas, kind, "edm" if edm_style else "ddpm")
