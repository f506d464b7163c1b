"""Noise schedule of a base, by the configuration of its scheduler: DDPM, EDM or a flow."""

from collections.abc import Mapping

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.training import objective


def build_noise_schedule(
    scheduler: SchedulerMixin, edm_style: bool = False, flow_shift: float | None = None
) -> objective.NoiseSchedule:
    """Build a base's noise schedule from its scheduler's configuration.

    scheduler: the base's
    edm_style: clamp the levels to finite ones, which EDM needs
    flow_shift: of a flow's levels, in place of the scheduler's

    Raises UserError for an unknown prediction type.
    """
    # A solver for flows, such as Sana's, has the levels of the plain flow scheduler.
    is_flow = "FlowMatch" in type(scheduler).__name__
    is_flow_solver = scheduler.config.get("use_flow_sigmas", False)
    if is_flow_solver or (is_flow and flow_shift is not None):
        scheduler = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps,
            shift=flow_shift or scheduler.config.flow_shift,
        )

    # Flow: the scheduler's sigma is the noise's share s, so the ratio is s / (1 - s).
    if is_flow or is_flow_solver:
        fresh = type(scheduler).from_config(scheduler.config)
        share = fresh.sigmas[: len(fresh.timesteps)].double()
        shift_line = None
        if scheduler.config.use_dynamic_shifting:
            shift_line = compute_shift_line(scheduler.config)
        return objective.NoiseSchedule(
            sigmas=(share / (1 - share)).float(),
            timesteps=fresh.timesteps,
            prediction_type="flow",
            style="flow",
            shift_line=shift_line,
        )

    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the base predicts `{kind}`: only epsilon and v_prediction bases can be trained."
        )

    # The scheduler of a base trained in EDM style has its sigmas.
    if "EDM" in type(scheduler).__name__:
        fresh = type(scheduler).from_config(scheduler.config)
        return objective.NoiseSchedule(
            sigmas=fresh.sigmas[: len(fresh.timesteps)],
            timesteps=fresh.timesteps,
            prediction_type=kind,
            style="edm",
            sigma_data=scheduler.config.sigma_data,
        )

    # Any other has the levels of DDPM, whatever solver samples with it. EDM needs a finite sigma
    # where the base has zero terminal SNR; the bound is diffusers'.
    alphas = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    if edm_style:
        alphas = alphas.clamp(min=2**-24)
    return objective.NoiseSchedule.from_alphas(alphas, kind, "edm" if edm_style else "ddpm")


def compute_shift_line(config: Mapping[str, float]) -> tuple[float, float]:
    """Compute slope and intercept of the line through a scheduler's two points, as its pipelines
    compute the shift."""
    min_tokens, max_tokens = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    slope = (high - low) / (max_tokens - min_tokens)
    return slope, low - slope * min_tokens
