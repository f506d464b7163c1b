"""Prepares all inputs of the training loop: the base, and encoded photos and prompts.

    photos -> base -> class images -> latents and text embeddings -> encoders leave memory
    photos -> encoders -> latents and text embeddings -> encoders leave memory -> denoiser      (flow models)

The processes share the encoding. Afterwards each finds every encoding in its memory or on its machine's disk. Files are
written by the process that encodes; on a machine that does not see them, one process writes them again.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin
from torch import nn

from dreambooth_moslora.adapters.basis import Basis, read_basis
from dreambooth_moslora.adapters.init_adapter import read_start
from dreambooth_moslora.adapters.lora_file import AdapterWeights
from dreambooth_moslora.adapters.moslora import disabled, matrix_layers
from dreambooth_moslora.base.families import Family, Text, denoiser_of, family_of
from dreambooth_moslora.base.files import SMALL_BASE_PX, base_folder
from dreambooth_moslora.base.load import TextProducts, default_resolution
from dreambooth_moslora.core import UserError, content_key, default_cache_dir
from dreambooth_moslora.disk.processes import give_freed_memory_back
from dreambooth_moslora.photos.photo import Photo, crop_rule
from dreambooth_moslora.plan.checks import check_family, check_layers, check_patterns
from dreambooth_moslora.plan.memory import USABLE
from dreambooth_moslora.plan.processes import DTYPES, agreed, on_each, share_out
from dreambooth_moslora.settings.families import facts_of
from dreambooth_moslora.settings.prompts import learnt_words, word_pattern
from dreambooth_moslora.settings.rules import weighting_flags
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.adapters import named_basis
from dreambooth_moslora.training.frozen_base import (
    LoadBase,
    PromptCache,
    TensorCache,
    Tensors,
    fingerprint,
    load_base,
    load_denoiser_of,
    waits_for_encoders,
    warn_of_slow_precision,
)
from dreambooth_moslora.training.made_before import class_photos_of_each
from dreambooth_moslora.training.objective import NoiseSchedule
from dreambooth_moslora.training.photo_stream import (
    PhotoEncoder,
    SubjectStreams,
    TrainBatch,
    collate,
    instance_streams,
    prior_streams,
)
from dreambooth_moslora.training.reporter import RunContext, free_unused_memory

Entries = dict[str, Callable[[], Tensors]]
"""Keys in a cache, each with the function that computes its value."""


@dataclass
class TrainInputs:
    """Inputs of the loop. `prior` is None without class images; `prompt_embeds` serves frozen text encoders,
    `text_products` a UNet that caches cross-attention. `start` holds the weights that a fresh adapter begins with, or
    None; `basis` is that of `--basis`."""

    pipeline: DiffusionPipeline
    family: Family
    schedule: NoiseSchedule
    photos: list[Photo]
    instance: SubjectStreams
    prior: SubjectStreams | None
    prompt_embeds: PromptCache
    dtype: torch.dtype
    start: AdapterWeights | None = None
    text_products: TextProducts | None = None
    basis: Basis | None = None

    @property
    def denoiser(self) -> nn.Module:
        return denoiser_of(self.pipeline)

    def batch_at(self, micro_batch: int, size: int, next_micro_batch: int) -> TrainBatch:
        """Micro-batch number `micro_batch` of the run: `size` instance images, and as many class images, if any.
        `next_micro_batch` is the one that this process will ask for next; its photos are read ahead."""
        streams = [self.instance] if self.prior is None else [self.instance, self.prior]
        samples = [s.at(position) for s in streams for position in range(micro_batch * size, (micro_batch + 1) * size)]
        for stream in streams:
            for position in range(next_micro_batch * size, (next_micro_batch + 1) * size):
                stream.read_ahead(position)
        return collate(samples, size)


def prepare(
    config: TrainConfig,
    context: RunContext,
    photos: list[Photo],
    sample_count: int,
    prompts: list[str],
    is_fresh: bool = True,
    load: LoadBase | None = None,
) -> TrainInputs:
    """Load the base, generate class images, and encode what the run's first `sample_count` samples show. `prompts`
    will be drawn later; they are encoded while the text encoders are in memory. `is_fresh`: the run does not resume
    an adapter. `load` loads the base, by default `load_base`. Raises UserError and StopRequestedError."""
    device = context.accelerator.device
    context.report.phase("loading")
    dtype = DTYPES[context.accelerator.mixed_precision]
    is_late = load is None and waits_for_encoders(config)
    pipeline = (
        load_base(config, dtype, device, has_denoiser=False) if is_late else (load or load_base)(config, dtype, device)
    )
    schedule = noise_schedule(pipeline.scheduler, config.do_edm_style_training)
    for flag in weighting_flags(config) if schedule.style == "edm" else ():  # the base may be one without the flag
        raise UserError(f"{flag}: this base was made in EDM style, which weighs noise levels itself; leave it out.")
    family = family_of_run(config, pipeline)
    check_family(config, family.facts)
    if not is_late:
        start, basis = check_denoiser(config, context, pipeline, is_fresh)
    context.stop_if_asked()
    class_photos = class_photos_of_each(config, context, pipeline, photos) if config.draws_class_images else []
    options = config.dataloader_num_workers, config.unmasked_weight, family
    encoder = PhotoEncoder(pipeline.vae.to(device), cache_of(config), crop_rule(config), *options)
    instance = instance_streams(config, photos, encoder)
    prior = prior_streams(config, class_photos, encoder, instance) if class_photos else None
    prompt_embeds = prompt_cache(config, pipeline)
    streams = [stream for stream in (instance, prior) if stream is not None]
    encode_photos(context, streams, sample_count)
    release_vae(config, pipeline, encoder)
    free_unused_memory(device)
    move_encoders(pipeline, family, device)
    encode_prompts(config, context, streams, prompt_embeds, prompts)
    release_encoders(config, pipeline, prompt_embeds)
    free_unused_memory(device)
    give_freed_memory_back()
    if is_late:
        load_denoiser_of(config, pipeline, dtype, device)
        start, basis = check_denoiser(config, context, pipeline, is_fresh)
    denoiser = denoiser_of(pipeline)
    products = TextProducts(denoiser, device) if config.cache_cross_attention else None
    denoiser.to(device)
    return TrainInputs(
        pipeline, family, schedule, photos, instance, prior, prompt_embeds, dtype, start, products, basis
    )


def check_denoiser(
    config: TrainConfig, context: RunContext, pipeline: DiffusionPipeline, is_fresh: bool
) -> tuple[AdapterWeights | None, Basis | None]:
    """What a fresh adapter starts with, and its basis. Raises UserError for layers that the denoiser lacks."""
    if context.accelerator.is_main_process:
        warn_of_slow_precision(pipeline, context.accelerator.device)
    layers = {path: layer.weight.ndim for path, layer in matrix_layers(denoiser_of(pipeline)).items()}
    check_layers(config.target_modules, layers, config.use_dora)
    check_patterns(config, layers)
    start = None
    if is_fresh and config.init_adapter is not None:
        start = read_start(config.init_adapter, pipeline, config.pretrained_model_name_or_path, config.use_dora)
    if config.basis is None:
        return start, None
    with named_basis():
        return start, read_basis(config.basis, base_folder(config), config.variant)


def family_of_run(config: TrainConfig, pipeline: DiffusionPipeline) -> Family:
    """The family, with the run's options of encoding and of embedded guidance."""
    options: dict[str, Any] = {}
    if config.max_sequence_length is not None:
        options["max_sequence_length"] = config.max_sequence_length
    if config.text_encoder_out_layers:
        options["text_encoder_out_layers"] = tuple(map(int, config.text_encoder_out_layers))
    return family_of(pipeline, told_guidance=config.guidance_scale, options=options)


def noise_schedule(scheduler: SchedulerMixin, edm_style: bool = False) -> NoiseSchedule:
    """The noise levels that a base was trained with, from its scheduler's configuration. EDM bases force EDM style.
    Raises UserError for a base that predicts neither noise nor velocity."""
    if "FlowMatch" in type(scheduler).__name__:
        fresh = type(scheduler).from_config(scheduler.config)
        share = fresh.sigmas[: len(fresh.timesteps)].double()  # of the noise
        return NoiseSchedule((share / (1 - share)).float(), fresh.timesteps, "flow", "flow")
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


def too_slow_for_samples(config: TrainConfig, pipeline: DiffusionPipeline, device: torch.device) -> bool:
    """Whether samples would take minutes each, on a CPU with a large base, and were not asked for."""
    prompts = [subject.validation_prompt for subject in config.each_subject]
    asked = (config.num_validation_images, *prompts, config.validation_steps)
    is_large = default_resolution(pipeline) > SMALL_BASE_PX
    return device.type == "cpu" and is_large and all(setting is None for setting in asked)


def cache_of(config: TrainConfig) -> TensorCache | None:
    if config.caching == "off":
        return None
    if config.caching == "memory":
        return TensorCache()
    return TensorCache((Path(config.cache_dir) if config.cache_dir else default_cache_dir()) / "encoded")


def prompt_cache(config: TrainConfig, pipeline: DiffusionPipeline) -> PromptCache:
    """Prompts encoded without the text encoders' adapters: a file that cannot be read is encoded anew in training."""
    family = family_of_run(config, pipeline)
    encoders = [getattr(pipeline, name) for name in family.facts.encoders]
    identity = "+".join([family.facts.name, *map(fingerprint, encoders)])
    if pipeline.config.get("force_zeros_for_empty_prompt"):  # it decides the encoding of ""
        identity += "+zeros"

    def encode(prompts: list[str]) -> list[Text]:
        with ExitStack() as stack:
            for encoder in encoders:
                stack.enter_context(disabled(encoder))
            return family.texts(pipeline, prompts)

    return PromptCache(encode, cache_of(config) or TensorCache(), identity)


def move_encoders(pipeline: DiffusionPipeline, family: Family, device: torch.device) -> None:
    """Move the text encoders to `device` if they fit there."""
    encoders = [getattr(pipeline, name) for name in family.facts.encoders]
    place = device_with_room(encoders, device)
    for encoder in encoders:
        encoder.to(place)


def device_with_room(models: Sequence[nn.Module], device: torch.device) -> torch.device:
    """`device`, or the CPU where a GPU lacks the memory for these models."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(weight.numel() * weight.element_size() for model in models for weight in model.parameters())
    return device if needed <= USABLE * free else torch.device("cpu")


def encode_photos(context: RunContext, streams: list[SubjectStreams], sample_count: int) -> None:
    """Fill the cache with every crop that the run's first `sample_count` samples show. Raises UserError when photos
    cannot be read or differ between processes, and StopRequestedError."""
    encoder = streams[0].encoder
    if encoder.cache is None:
        return

    def crops() -> Entries:
        return dict(encoder.entry(*view) for stream in streams for view in stream.views_ahead(sample_count))

    entries = same_everywhere(context, crops, "crops")
    for _ in context.report.counted("caching", fill(encoder.cache, context, entries), len(entries)):
        pass


def encode_prompts(
    config: TrainConfig,
    context: RunContext,
    streams: list[SubjectStreams],
    prompt_embeds: PromptCache,
    prompts: Iterable[str],
) -> None:
    """Fill the cache with every caption and prompt that the run will use. Raises UserError and StopRequestedError."""
    captions = {*prompts, ""}
    for stream in streams:
        captions |= stream.captions
    for subject in config.each_subject:
        captions |= {subject.class_prompt, *config.prior_prompts} if subject.class_prompt else set()
    learnt = [word_pattern(word) for word in learnt_words(config)]
    plain = [caption for caption in sorted(captions) if not any(pattern.search(caption) for pattern in learnt)]
    entries = same_everywhere(context, lambda: dict(prompt_embeds.entry(caption) for caption in plain), "prompts")
    for _ in fill(prompt_embeds.cache, context, entries):
        pass


def same_everywhere(context: RunContext, find: Callable[[], Entries], kind: str) -> Entries:
    """What this process finds to encode. Raises UserError when processes find different keys."""
    return agreed(context.accelerator, find, lambda found: f"{len(found)} {kind} ({content_key(keys=[*found])[:8]})")


def fill(cache: TensorCache, context: RunContext, entries: Entries) -> Iterator[int]:
    """Compute what the cache lacks of `entries`, which all processes have alike; yields how many are done."""
    accelerator = context.accelerator
    keeps = cache.folder is None or accelerator.is_local_main_process

    def values(keys: Sequence[str]) -> Generator[Tensors, None, None]:
        for key in keys:
            context.raise_if_asked()
            yield cache.get(key, entries[key])

    found = share_out(accelerator, list(entries), values)
    for number, (key, tensors) in enumerate(zip(entries, found, strict=True), start=1):
        if accelerator.num_processes > 1:
            on_each(accelerator, partial(cache.put, key, tensors) if keeps else bool)
        yield number


def release_encoders(config: TrainConfig, pipeline: DiffusionPipeline, prompt_embeds: PromptCache) -> None:
    """Free the text encoders unless they are trained."""
    if not config.keeps_text_encoders:
        prompt_embeds.release_encoders()
        pipeline.register_modules(**dict.fromkeys(facts_of(type(pipeline).__name__).encoders))


def release_vae(config: TrainConfig, pipeline: DiffusionPipeline, encoder: PhotoEncoder) -> None:
    """Free the VAE unless a step, sample or score needs it; the last two find it on the CPU."""
    if config.caching != "off" and (config.sample_count or config.is_scored):
        pipeline.vae.to("cpu")
    elif config.caching != "off":
        pipeline.register_modules(vae=None)
        encoder.vae = None
