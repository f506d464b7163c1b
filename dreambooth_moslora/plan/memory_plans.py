"""Choose the memory plan of `--memory`: precision, recomputation, caching and quantisation, by a
row of `settings.memory_presets.MEMORY_PLANS`.

It only adds to the user's settings; on a GPU it also chooses half precision, unless the user set
one. `auto` is the first plan that is possible and fits the GPU's free memory, so the one with the
least quantised weights; without a GPU it is the first of all. It streams no more blocks than do not
fit, and passes by a plan whose copies would take longer than the computation. On Apple's, whose
attention keeps all scores, it is always one that recomputes.

Gradients of the plans differ at most by rounding, but for quantised plans, and so do those of one
large pass and of several small ones (`--images_at_once`). A plan fits if its smallest pass does:
photos and their prior one after the other keep half the activations, and recompute nothing. Then
the largest pass that fits is chosen.

A plan is identified by its settings alone, never by its name.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import psutil

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan.agreement import get_min_free_gib
from dreambooth_moslora.plan.base_size import BaseSize, find_base_size
from dreambooth_moslora.plan.memory import (
    estimate_memory,
    estimate_streamed_gib,
    is_streaming_hidden,
)
from dreambooth_moslora.settings import (
    family_facts,
    memory_presets,
    rules,
    setting_names,
    train_config,
)

MIN_CHECKED_GIB = 2.0
"""Runs that need less fit every GPU: then neither the driver is asked nor PyTorch loaded."""
USABLE_RATIO = 0.9
"""Usable fraction of the free memory: libraries' workspaces and fragmentation take the rest."""
# Of the host's memory, for streamed blocks: as much as Windows lets a driver pin.
MAX_HOST_RATIO = 0.5
LOADED_BASE_SETTINGS = {
    "recompute_feed_forward",
    "gradient_checkpointing",
    "base_quantization",
    "stream_blocks",
    "streamed_share",
}
"""Settings that a run can take on before its first update (`TrainStep.apply_settings`)."""
STREAMED_SHARES = tuple(percent / 100 for percent in range(5, 105, 5))
"""Shares of the blocks, of which `auto` streams the smallest that fits."""
MemoryPlan = Mapping[str, Any]
"""The settings of a plan, as a row of `MEMORY_PLANS` names them."""


def choose_memory_settings(
    config: train_config.TrainConfig, base: Base, free_gib: float | None = None
) -> dict[str, Any]:
    """Return the settings that `--memory` chooses; none without that option.

    free_gib: of the GPU, if another process will train; without it all processes of the run must
    call this

    Raises UserError for damaged files.
    """
    if config.memory is None:
        return {}
    free = get_min_free_gib() if free_gib is None else free_gib
    saved_plan = read_saved_plan(config)
    if saved_plan is not None:
        return saved_plan
    size = find_base_size(base, config.target_modules)
    precision = choose_precision_settings(config, size.family, free)
    return precision | choose_plan_settings(replace(config, **precision), size, free)


def read_saved_plan(config: train_config.TrainConfig) -> dict[str, Any] | None:
    """Return the plan of a run that is resumed with the same `--memory`; None for a fresh run, and
    for another `--memory`. Another plan would change the result's bytes."""
    run_dir = RunDir(config.output_dir)
    if not config.resume_from_checkpoint or run_dir.find_latest_checkpoint() is None:
        return None
    with suppress(UserError):  # the folder has no settings
        saved = read_json(run_dir.config_path)
        if saved.get("memory") == config.memory:
            # What a word of `--memory` decides, but for what was given.
            plan_settings = setting_names.SETTINGS["memory"].metadata["replaces"]
            names = [name for name in plan_settings if not rules.format_flag(config, name)]
            return {name: saved[name] for name in names if name in saved}
    return None


def reset_plan_settings(config: train_config.TrainConfig) -> train_config.TrainConfig:
    """Return the settings with the defaults in place of those of a plan."""
    names = [name for name in memory_presets.MEMORY_PLAN_SETTINGS if name != "images_at_once"]
    return replace(config, **{name: setting_names.SETTINGS[name].default for name in names})


def choose_precision_settings(
    config: train_config.TrainConfig, facts: family_facts.FamilyFacts, free_gib: float | None
) -> dict[str, str]:
    """Return half precision on a GPU, if the family has one there, unless the user set a
    precision."""
    is_given = config.mixed_precision is not None or devices.get_precision(config) != "no"
    if free_gib is None or is_given:
        return {}
    return {"mixed_precision": devices.choose_family_precision(facts)}


def choose_plan_settings(
    config: train_config.TrainConfig, size: BaseSize, free_gib: float | None
) -> dict[str, Any]:
    """Return the settings of the plan that `--memory` names, or with `auto` of the one that it
    chooses for the smallest pass, with the largest pass that fits."""
    passes = list_pass_settings(config)
    plan = get_plan_settings(config, choose_plan(config, size, free_gib))
    if free_gib is None:
        return plan
    if config.memory == "auto":
        plan |= choose_streamed_share(replace(config, **plan, **passes[-1]), size, free_gib)
    for images in passes:
        tried = replace(config, **plan, **images)
        if estimate_memory(tried, size, 1).peak_gib <= USABLE_RATIO * free_gib:
            return plan | images
    return plan | passes[-1]


def choose_plan(config: train_config.TrainConfig, size: BaseSize, free_gib: float | None) -> str:
    """Return the name of the plan: that of `--memory`, or for `auto` the first whose smallest pass
    fits. If its copies would take longer than the computation it is the next, and if none is left
    the leanest that is possible, which a later check may refuse."""
    if config.memory != "auto":
        return config.memory
    if free_gib is None:
        return next(iter(memory_presets.MEMORY_PLANS))
    smallest = replace(config, **list_pass_settings(config)[-1])
    plans = list_possible_plans(smallest, size, free_gib)
    fitting = {
        name: tried
        for name, tried in plans.items()
        if estimate_memory(tried, size, 1).peak_gib <= USABLE_RATIO * free_gib
    }
    for name, tried in fitting.items():
        if is_streaming_hidden(tried, size):
            return name
    return list(fitting or plans)[-1]


def choose_streamed_share(
    config: train_config.TrainConfig, size: BaseSize, free_gib: float
) -> dict[str, float]:
    """Return the smallest share of the blocks to stream with which these settings fit, or 1, as a
    setting; none for settings without streaming, and for a share of the user."""
    if not config.stream_blocks or config.streamed_share < 1:
        return {}
    for share in STREAMED_SHARES:
        tried = replace(config, streamed_share=share)
        if estimate_memory(tried, size, 1).peak_gib <= USABLE_RATIO * free_gib:
            return {"streamed_share": share}
    return {}


def list_pass_settings(config: train_config.TrainConfig) -> list[dict[str, int]]:
    """Return the passes to choose from, as settings: all images of a step together, half of them,
    and so on down to one.

    There is no choice if `--images_at_once` is set, or if texts are trained, which takes a
    micro-batch. A pass of one micro-batch sets nothing.
    """
    if config.images_at_once is not None or rules.list_exclusions("images_at_once", config):
        return [{}]
    image_counts = []
    images = config.gradient_accumulation_steps * config.images_per_micro_batch
    while images not in image_counts:
        image_counts.append(images)
        images = math.ceil(images / 2)
    usual = config.images_per_micro_batch
    return [{} if images == usual else {"images_at_once": images} for images in image_counts]


def get_plan_settings(config: train_config.TrainConfig, name: str) -> dict[str, Any]:
    """Return the settings that the plan adds to the user's; a quantisation of the user stays."""
    plan = dict(memory_presets.MEMORY_PLANS[name])
    if config.base_quantization != "none":
        plan.pop("base_quantization", None)
    return plan


def estimate_plans(config: train_config.TrainConfig, size: BaseSize) -> dict[str, float]:
    """Return {plan: peak memory in GiB}, for the plans that these settings and packages allow."""
    plans = list_possible_plans(config, size)
    return {name: estimate_memory(tried, size, 1).peak_gib for name, tried in plans.items()}


def list_possible_plans(
    config: train_config.TrainConfig, size: BaseSize, free_gib: float | None = None
) -> dict[str, train_config.TrainConfig]:
    """Return {plan: the settings with it}, for the plans that these settings, packages and the
    host's memory allow.

    free_gib: of the GPU, beyond which blocks are streamed; None to stream them all
    """
    plans = {}
    for name, plan in memory_presets.MEMORY_PLANS.items():
        if not is_plan_possible(name, config, size.family):
            continue
        tried = replace(config, **get_plan_settings(config, name))
        if free_gib is not None:
            tried = replace(tried, **choose_streamed_share(tried, size, free_gib))
        # Blocks may need more than the host has. Those in 4 bit take a quarter: nothing takes less.
        if "stream_blocks" in plan and plan.get("base_quantization") != "nf4":
            host_gib = tried.streamed_share * estimate_streamed_gib(tried, size)
            if host_gib > MAX_HOST_RATIO * measure_host_gib():
                continue
        plans[name] = tried
    return plans


def measure_host_gib() -> float:
    """Return the memory of this machine per process of the run, GiB: each keeps its own blocks."""
    return psutil.virtual_memory().total / devices.GIB / devices.get_local_world_size()


def is_plan_possible(
    name: str, config: train_config.TrainConfig, facts: family_facts.FamilyFacts
) -> bool:
    """Return whether a run can take this plan, with its settings, its family and the installed
    packages."""
    plan = memory_presets.MEMORY_PLANS[name]
    # Apple's attention keeps all scores unless blocks are recomputed; it has no bitsandbytes, and
    # its GPU computes in the host's memory.
    is_in_4_bit, is_streamed = plan.get("base_quantization") == "nf4", "stream_blocks" in plan
    if devices.is_on_apple() and ("gradient_checkpointing" not in plan or is_streamed):
        return False
    if is_in_4_bit and (devices.is_on_apple() or not find_spec("bitsandbytes")):
        return False
    if facts.style == "flow" and any(setting in family_facts.UNET_SETTINGS for setting in plan):
        return False

    # The rules between settings.
    with suppress(UserError):
        return bool(replace(config, **get_plan_settings(config, name)))
    return False


def find_leaner_settings(
    config: train_config.TrainConfig, facts: family_facts.FamilyFacts
) -> tuple[str, dict[str, Any]] | None:
    """Return a flag and its settings that take less memory, and to which a loaded base can change;
    None if there is none.

    Half as many images at once come first, as nothing is computed twice; then twice as many
    streamed blocks, or the next plan.
    """
    images = math.ceil(config.images_per_pass / 2)
    if images < config.images_per_pass and not rules.list_exclusions("images_at_once", config):
        return f"--images_at_once {images}", {"images_at_once": images}

    if config.stream_blocks and config.streamed_share < 1:
        share = min(1.0, 2 * config.streamed_share)
        return f"--streamed_share {share:g}", {"streamed_share": share}

    # Go on after the leanest plan whose settings the run has.
    later = []
    for name, plan in memory_presets.MEMORY_PLANS.items():
        if all(getattr(config, key) == value for key, value in plan.items()):
            later = []
        elif can_switch_plan(plan, config) and is_plan_possible(name, config, facts):
            later.append(name)
    if not later:
        return None

    # Layers in 8 bit cannot become those in 4 bit, which take less: they come last.
    name = min(
        later, key=lambda name: memory_presets.MEMORY_PLANS[name].get("base_quantization") == "int8"
    )

    # A block that is recomputed as a whole would recompute its feed-forward part twice.
    settings = {"recompute_feed_forward": False} | get_plan_settings(config, name)
    return f"--memory {name}", settings


def can_switch_plan(plan: MemoryPlan, config: train_config.TrainConfig) -> bool:
    """Return whether a base that is loaded for these settings can change to the plan."""
    # Layers are quantised once. DoRA's magnitudes are those of the dense weights, and streamed ones
    # cannot be quantised.
    kind, loaded = plan.get("base_quantization", "none"), config.base_quantization
    is_fixed = loaded != "none" or config.use_dora or config.stream_blocks
    if kind not in ("none", loaded) and is_fixed:
        return False

    # Blocks in half precision may need more than the host has.
    is_streamed_dense = "stream_blocks" in plan and kind == "none"
    return plan.keys() <= LOADED_BASE_SETTINGS and not is_streamed_dense


def format_chosen_plan(config: train_config.TrainConfig) -> list[str]:
    """Return a line for `--dry_run`: the plan that these settings are, and the GPU's free memory;
    none without `--memory`."""
    if config.memory is None:
        return []
    # The settings of a lean plan contain those of plans before it.
    matching = [
        name
        for name, plan in memory_presets.MEMORY_PLANS.items()
        if all(getattr(config, key) == value for key, value in plan.items())
    ]
    free = devices.measure_free_gpu_gib()
    free_text = "there is no GPU here" if free is None else f"{free:.1f} GiB are free"
    return [
        f"memory plan: {matching[-1]}{format_weights(config)}; {free_text} "
        f"(--memory {config.memory})"
    ]


def format_weights(config: train_config.TrainConfig) -> str:
    """Return how the base's weights are kept, in parentheses, if blocks are streamed."""
    if not config.stream_blocks:
        return ""
    kind = config.base_quantization
    precision = devices.get_precision(config) if kind == "none" else kind
    name = "fp32" if precision == "no" else precision
    return f" (weights in {name}, {config.streamed_share:.0%} of the blocks streamed)"


def format_plans(config: train_config.TrainConfig, size: BaseSize) -> list[str]:
    """Return a line: the memory that each plan needs, and how many images pass at once; none
    without `--memory`."""
    if config.memory is None:
        return []
    plans = estimate_plans(reset_plan_settings(config), size)
    needs = ", ".join(f"{name} {cost:.1f} GiB" for name, cost in plans.items())
    passes = (
        f"{config.images_per_pass} of a step's "
        f"{config.images_per_micro_batch * config.gradient_accumulation_steps}"
    )
    return [f"memory plans: {needs}; {passes} images pass at once"]


def check_memory(config: train_config.TrainConfig, size: BaseSize) -> None:
    """Raise UserError, with settings that fit, for a base of known size that needs more memory than
    can be used, by the same bound as `--memory auto`."""
    need = estimate_memory(config, size, 1).peak_gib
    is_known = size.is_measured or (bool(size.hub_id) and not size.is_assumed)
    if need < MIN_CHECKED_GIB or not is_known:
        return
    free = devices.measure_free_gpu_gib()
    if free is not None and need > USABLE_RATIO * free:
        family_suffix = f" of {size.family.title}" if size.family.memory else ""
        raise UserError(
            f"this run{family_suffix} needs about {need:.1f} GiB of GPU memory "
            f"and {free:.1f} GiB are free, "
            f"of which it can use {USABLE_RATIO * free:.1f}: "
            f"{format_memory_advice(config, size, free)}"
        )


def format_memory_advice(config: train_config.TrainConfig, size: BaseSize, free_gib: float) -> str:
    """Return the smallest change to these settings that fits."""
    # A resumed run's plan is kept by the same word, so that another word must be named.
    start = config
    is_kept = config.memory == "auto" and read_saved_plan(config) is not None
    if is_kept:
        start = replace(reset_plan_settings(config), images_at_once=None)

    # What `--memory auto` would choose.
    tried = replace(start, memory="auto")
    tried = replace(tried, **choose_precision_settings(tried, size.family, free_gib))
    word = choose_plan(tried, size, free_gib) if is_kept else "auto"
    tried = replace(tried, **choose_plan_settings(tried, size, free_gib))
    cost = estimate_memory(tried, size, 1).peak_gib
    if cost <= USABLE_RATIO * free_gib:
        return f"give --memory {word} (then {cost:.1f} GiB)."
    return f"give a smaller --resolution than {config.resolution}, or free the GPU."
