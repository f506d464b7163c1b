"""Prepares all inputs of the training loop: the base, and encoded photos and prompts.

    photos -> base -> class images -> latents and text embeddings -> encoders leave memory

A flow model's encoders have to go before its denoiser comes:

    photos -> encoders -> latents and text embeddings -> encoders leave memory -> denoiser

The processes share the encoding, after which each finds every encoding in its memory or on its
machine's disk.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from dreambooth_moslora.base import devices, families, load
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.digests import hash_parts
from dreambooth_moslora.base.streaming import StreamedBlocks
from dreambooth_moslora.disk.contents import hash_file, hash_values
from dreambooth_moslora.disk.processes import release_freed_memory
from dreambooth_moslora.disk.run_folder import find_weights
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import reader
from dreambooth_moslora.method import moslora
from dreambooth_moslora.photos.augment import build_crop_rule
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.plan import distributed, validation
from dreambooth_moslora.plan.memory_plans import USABLE_RATIO
from dreambooth_moslora.settings import train_config
from dreambooth_moslora.settings.family_facts import FamilyFacts, get_facts, get_text_options
from dreambooth_moslora.training import class_images, dataset, encoding_cache, objective, reporter

CacheEntries = dict[str, Callable[[], encoding_cache.Tensors]]
"""Keys in a cache, each with the function that computes its value."""
COMPANION = "companion"
"""Among the digests of a base's parts: that of what lies under the adapter."""


@dataclass
class TrainInputs:
    """What a run trains on.

    pipeline: the base, without the parts that have left memory
    family: how its kind of pipeline is called
    schedule: its noise levels
    photos: of all subjects
    instance_dataset: the photos as they are drawn
    prior_dataset: the class images as they are drawn; None without any
    text_cache: texts of frozen text encoders
    dtype: of the frozen base
    initial_weights: what a fresh adapter begins with, if a file gives it
    base_identity: digests of its parts (`identify_base`)
    """

    pipeline: DiffusionPipeline
    family: families.Family
    schedule: objective.NoiseSchedule
    photos: list[Photo]
    instance_dataset: dataset.SubjectsDataset
    prior_dataset: dataset.SubjectsDataset | None
    text_cache: encoding_cache.TextEmbeddingCache
    dtype: torch.dtype
    initial_weights: reader.AdapterWeights | None = None
    base_identity: dict[str, str] = field(default_factory=dict)

    @property
    def denoiser(self) -> torch.nn.Module:
        return families.get_denoiser(self.pipeline)

    def collate_batch(self, positions: Iterable[int]) -> dataset.TrainBatch:
        """The instance images at these positions, and as many class images if there are any."""
        instance = [self.instance_dataset.get_sample(position) for position in positions]
        prior = []
        if self.prior_dataset is not None:
            prior = [self.prior_dataset.get_sample(position) for position in positions]
        return dataset.collate([*instance, *prior], instance_count=len(instance))


def prepare_inputs(
    config: train_config.TrainConfig,
    base: Base,
    context: reporter.RunContext,
    photos: list[Photo],
    sample_count: int,
    prompts: list[str],
    is_fresh: bool = True,
) -> TrainInputs:
    """Load the base, generate class images, and encode photos and prompts.

    config: the run's settings
    base: what to load
    context: the run's folder, processes and reporter
    photos: of all subjects
    sample_count: how many photos the run draws; their crops are encoded
    prompts: what later samples and scores will ask for
    is_fresh: whether no adapter is resumed

    Raises UserError and StopRequestedError.
    """
    device = context.accelerator.device
    dtype = distributed.PRECISION_DTYPES[context.accelerator.mixed_precision]

    # The base. A flow model's denoiser waits where it can: with the encoders it would be too large.
    context.report.report_phase("loading")
    needs_both = config.train_text_encoder or config.uses_class_images
    is_late = base.is_flow and not needs_both
    pipeline = encoding_cache.load_base(config, base, dtype, device, has_denoiser=not is_late)

    # Whether it can be trained so: before the long work, with all that its files have told.
    schedule = build_noise_schedule(pipeline.scheduler, config.do_edm_style_training)
    options = families.build_encoding_options(get_text_options(config))
    family = families.build_family(
        pipeline, embedded_guidance=config.guidance_scale, options=options
    )
    validation.check_family(config, family.facts)
    if not is_late:
        start = check_target_layers(config, context, pipeline, is_fresh)
    parts = [*family.facts.encoders, "vae"]
    if not is_late:
        parts.append(family.facts.denoiser)
    digests = identify_base(config, base, family.facts, parts)
    context.raise_if_stop_requested()

    # Latents and texts. What encoded them leaves memory.
    streams = build_datasets(config, context, pipeline, family, photos, digests)
    encode_photos(context, streams, sample_count)
    release_vae(config, context, pipeline, streams[0].encoder)
    prompt_embeds = build_text_cache(config, pipeline, family, digests)
    move_encoders(pipeline, family, device)
    encode_prompts(config, context, streams, prompt_embeds, prompts)
    release_encoders(config, context, pipeline, family, prompt_embeds)

    # The denoiser has the memory for itself.
    if is_late:
        load.load_denoiser(pipeline, base, dtype)
        encoding_cache.finish_denoiser(config, pipeline, dtype, device)
        start = check_target_layers(config, context, pipeline, is_fresh)
        digests |= identify_base(config, base, family.facts, [family.facts.denoiser])
    denoiser = families.get_denoiser(pipeline)
    if config.stream_blocks:
        # By the name that its weights have: `to` copies those on "cpu" to "cpu:0", each by itself.
        device = StreamedBlocks(denoiser, device).places[0].device
    denoiser.to(device)
    return TrainInputs(
        pipeline=pipeline,
        family=family,
        schedule=schedule,
        photos=photos,
        instance_dataset=streams[0],
        prior_dataset=streams[1] if len(streams) > 1 else None,
        text_cache=prompt_embeds,
        dtype=dtype,
        initial_weights=start,
        base_identity=digests,
    )


def build_datasets(
    config: train_config.TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    family: families.Family,
    photos: list[Photo],
    digests: Mapping[str, str],
) -> list[dataset.SubjectsDataset]:
    """The photos as they are drawn, and then the class images, if there are any. Raises UserError
    and StopRequestedError."""
    # Class images, drawn by the whole base.
    class_photos = []
    if config.uses_class_images:
        class_photos = class_images.make_class_photos(config, context, pipeline, photos, digests)

    # Both are cropped and encoded alike.
    encoder = dataset.PhotoEncoder(
        vae=pipeline.vae.to(context.accelerator.device),
        cache=open_cache(config),
        rule=build_crop_rule(config),
        unmasked_weight=config.unmasked_weight,
        family=family,
        synthetic_weight=config.synthetic_weight,
        vae_digest=digests.get("vae", ""),
    )
    instance = dataset.build_instance_dataset(config, photos, encoder)
    if not class_photos:
        return [instance]
    return [instance, dataset.build_prior_dataset(config, class_photos, encoder, instance)]


def identify_base(
    config: train_config.TrainConfig, base: Base, facts: FamilyFacts, parts: Sequence[str]
) -> dict[str, str]:
    """Return the digests by which these parts of the base, and its companion, are recognised: of
    their dense files, in whatever precision they are held. Raises OSError for a file that cannot be
    read."""
    digests = hash_parts(base, facts, parts, config.cache_folder)
    if config.companion:
        digests[COMPANION] = hash_file(find_weights(config.companion))
    return digests


def check_target_layers(
    config: train_config.TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    is_fresh: bool,
) -> reader.AdapterWeights | None:
    """What a fresh adapter starts with. Raises UserError for layers that the denoiser lacks."""
    if context.accelerator.is_main_process:
        encoding_cache.warn_of_slow_precision(pipeline, context.accelerator.device)
    found = moslora.get_matrix_layers(families.get_denoiser(pipeline))
    layers = {path: layer.weight.ndim for path, layer in found.items()}
    facts = get_facts(type(pipeline).__name__)
    validation.check_layers(config.target_modules, layers, config.use_dora, facts)
    validation.check_patterns(config, layers)

    # A resumed run has its start in the checkpoint.
    if not is_fresh or config.init_adapter is None:
        return None
    return reader.read_start(config.init_adapter, pipeline, config.use_dora)


def build_noise_schedule(
    scheduler: SchedulerMixin, edm_style: bool = False
) -> objective.NoiseSchedule:
    """A base's noise levels by its scheduler's configuration. Raises UserError for an unknown
    prediction."""
    # A solver that draws flows, such as Sana's, has the levels of the plain flow scheduler.
    if scheduler.config.get("use_flow_sigmas"):
        scheduler = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps,
            shift=scheduler.config.flow_shift,
        )

    # Flow: the scheduler's sigma is the noise's share s, so the ratio is s / (1 - s).
    if "FlowMatch" in type(scheduler).__name__:
        fresh = type(scheduler).from_config(scheduler.config)
        share = fresh.sigmas[: len(fresh.timesteps)].double()
        line = (
            compute_shift_line(scheduler.config) if scheduler.config.use_dynamic_shifting else None
        )
        return objective.NoiseSchedule(
            sigmas=(share / (1 - share)).float(),
            timesteps=fresh.timesteps,
            prediction_type="flow",
            style="flow",
            shift_line=line,
        )

    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the base predicts `{kind}`: only epsilon and v_prediction bases can be trained."
        )

    # A base made in EDM style tells its sigmas itself.
    if "EDM" in type(scheduler).__name__:
        fresh = type(scheduler).from_config(scheduler.config)
        return objective.NoiseSchedule(
            sigmas=fresh.sigmas[: len(fresh.timesteps)],
            timesteps=fresh.timesteps,
            prediction_type=kind,
            style="edm",
            sigma_data=scheduler.config.sigma_data,
        )

    # Any other has the levels of DDPM, whatever solver draws with it. EDM needs a finite sigma
    # where the base has zero terminal SNR; the bound is diffusers'.
    alphas = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    if edm_style:
        alphas = alphas.clamp(min=2**-24)
    return objective.NoiseSchedule.from_alphas(alphas, kind, "edm" if edm_style else "ddpm")


def compute_shift_line(config: Mapping[str, float]) -> tuple[float, float]:
    """Slope and intercept through a scheduler's two points, as its pipelines compute the shift."""
    least, most = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    slope = (high - low) / (most - least)
    return slope, low - slope * least


def open_cache(config: train_config.TrainConfig) -> encoding_cache.EncodingCache | None:
    """Where encodings are kept, by `--caching`: nowhere, in memory or on disk."""
    if config.caching == "off":
        return None
    if config.caching == "memory":
        return encoding_cache.EncodingCache()
    return encoding_cache.EncodingCache(config.cache_folder / "encoded")


def build_text_cache(
    config: train_config.TrainConfig,
    pipeline: DiffusionPipeline,
    family: families.Family,
    digests: Mapping[str, str],
) -> encoding_cache.TextEmbeddingCache:
    """Prompts encoded without the text encoders' adapters: a file that cannot be read is encoded
    anew in training. `digests` are of the base's parts; one that lacks an encoder's is answered by
    its weights in memory."""
    encoders = [getattr(pipeline, name) for name in family.facts.encoders]

    # All that decides an encoding; `force_zeros_for_empty_prompt` decides that of "".
    identity = family.facts.name
    for name, encoder in zip(family.facts.encoders, encoders):
        digest = digests.get(name) or encoding_cache.digest_tensors(encoder.state_dict())
        identity += f"+{digest} {encoder.dtype}"
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        identity += "+zeros"
    if family.layout:
        identity += f"+{family.layout}"
    if options := families.build_encoding_options(get_text_options(config)):
        identity += f"+{sorted(options.items())}"

    def encode(prompts: list[str]) -> list[families.TextEmbedding]:
        with ExitStack() as stack:
            for encoder in encoders:
                stack.enter_context(moslora.disable_adapters(encoder))
            return family.encode_prompts(pipeline, prompts)

    return encoding_cache.TextEmbeddingCache(
        encode, open_cache(config) or encoding_cache.EncodingCache(), identity
    )


def move_encoders(
    pipeline: DiffusionPipeline, family: families.Family, device: torch.device
) -> None:
    """Move the text encoders to `device` if they fit there."""
    encoders = [getattr(pipeline, name) for name in family.facts.encoders]
    place = choose_device(encoders, device)
    for encoder in encoders:
        encoder.to(place)


def choose_device(models: Sequence[torch.nn.Module], device: torch.device) -> torch.device:
    """`device`, or the CPU where a GPU lacks the memory for these models."""
    free_gib = devices.measure_free_gib(device)
    needed = 0
    for model in models:
        needed += sum(weight.numel() * weight.element_size() for weight in model.parameters())
    fits = free_gib is None or needed <= USABLE_RATIO * free_gib * devices.GIB
    return device if fits else torch.device("cpu")


def encode_photos(
    context: reporter.RunContext, streams: list[dataset.SubjectsDataset], sample_count: int
) -> None:
    """Fill the cache, if there is one, with every crop of the first `sample_count` samples. Raises
    UserError and StopRequestedError."""
    encoder = streams[0].encoder
    if encoder.cache is None:
        return

    def collect_crops() -> CacheEntries:
        found = {}
        for stream in streams:
            found |= dict(
                encoder.build_crop_entry(*view) for view in stream.list_crops(sample_count)
            )
        return found

    entries = require_same_entries(context, collect_crops, "crops")
    for _ in context.report.report_counts(
        "caching", fill_cache(encoder.cache, context, entries), len(entries)
    ):
        pass


def encode_prompts(
    config: train_config.TrainConfig,
    context: reporter.RunContext,
    streams: list[dataset.SubjectsDataset],
    prompt_embeds: encoding_cache.TextEmbeddingCache,
    prompts: Iterable[str],
) -> None:
    """Fill the cache with every caption and prompt that the run will use. Raises UserError and
    StopRequestedError."""
    # All that the run will say: "" is for dropped captions and for guidance.
    captions = {*prompts, ""}.union(*(stream.captions for stream in streams))
    for subject in config.each_subject:
        if subject.class_prompt:
            captions |= {subject.class_prompt, *config.prior_prompts}

    def collect_prompts() -> CacheEntries:
        return dict(prompt_embeds.build_entry(caption) for caption in sorted(captions))

    entries = require_same_entries(context, collect_prompts, "prompts")
    for _ in fill_cache(prompt_embeds.cache, context, entries):
        pass


def require_same_entries(
    context: reporter.RunContext, find: Callable[[], CacheEntries], kind: str
) -> CacheEntries:
    """What this process finds to encode. Raises UserError when processes find different keys."""
    return distributed.require_agreement(
        context.accelerator,
        find,
        lambda found: f"{len(found)} {kind} ({hash_values(keys=[*found])[:8]})",
    )


def fill_cache(
    cache: encoding_cache.EncodingCache, context: reporter.RunContext, entries: CacheEntries
) -> Iterator[int]:
    """Compute what the cache lacks of `entries`, which all processes have alike; yields how many
    are done."""
    accelerator = context.accelerator

    # Each process has its own memory, and each machine its own disk.
    keeps = cache.folder is None or accelerator.is_local_main_process

    def compute_values(keys: Sequence[str]) -> Generator[encoding_cache.Tensors, None, None]:
        for key in keys:
            context.raise_if_local_stop()
            yield cache.get(key, entries[key])

    found = distributed.share_work(accelerator, list(entries), compute_values)
    for number, (key, tensors) in enumerate(zip(entries, found, strict=True), start=1):
        if accelerator.num_processes > 1:
            distributed.run_on_each(
                accelerator, partial(cache.put, key, tensors) if keeps else bool
            )
        yield number


def release_vae(
    config: train_config.TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    encoder: dataset.PhotoEncoder,
) -> None:
    """Free the VAE unless a step, sample or score needs it; the last two find it on the CPU."""
    if config.caching != "off" and (config.sample_count or config.is_scored):
        pipeline.vae.to("cpu")
    elif config.caching != "off":
        pipeline.register_modules(vae=None)
        encoder.vae = None
    reporter.free_unused_memory(context.accelerator.device)


def release_encoders(
    config: train_config.TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    family: families.Family,
    prompt_embeds: encoding_cache.TextEmbeddingCache,
) -> None:
    """Free the text encoders, unless the steps need them."""
    if not config.train_text_encoder:
        prompt_embeds.release_encoders()
        pipeline.register_modules(**dict.fromkeys(family.facts.encoders))
    reporter.free_unused_memory(context.accelerator.device)
    release_freed_memory()
