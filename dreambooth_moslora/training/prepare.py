"""Prepare the inputs of the training loop: the base, and encoded photos and prompts.

    photos -> base -> class images -> latents and text embeddings -> encoders leave memory

The encoders of a flow model leave memory before its denoiser is loaded:

    photos -> encoders -> latents and text embeddings -> encoders leave memory -> denoiser

Several processes share the encoding. Afterwards each has every encoding, in its memory or on its
machine's disk.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import DiffusionPipeline

from dreambooth_moslora.base import devices, families, load
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.digests import hash_parts
from dreambooth_moslora.base.streaming import StreamedBlocks
from dreambooth_moslora.disk.contents import hash_file, hash_values
from dreambooth_moslora.disk.processes import release_freed_memory
from dreambooth_moslora.disk.run_folder import find_weights
from dreambooth_moslora.lora import reader
from dreambooth_moslora.method import moslora
from dreambooth_moslora.photos.augment import build_crop_rule
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.plan import distributed, validation
from dreambooth_moslora.plan.memory_plans import USABLE_RATIO
from dreambooth_moslora.settings import train_config
from dreambooth_moslora.settings.family_facts import FamilyFacts, get_facts, get_text_options
from dreambooth_moslora.training import (
    base_loading,
    class_images,
    dataset,
    encoding_cache,
    noise_schedule,
    objective,
    reporter,
)

CacheEntries = dict[str, Callable[[], encoding_cache.Tensors]]
"""Keys of a cache, each with the function that computes its value."""
COMPANION = "companion"
"""Name of the companion's digest among those of the base's parts."""


@dataclass
class TrainInputs:
    """Base, data loader and text embeddings of a run.

    pipeline: the base, without the parts that have left memory
    family: encodes prompts and calls the denoiser
    schedule: the base's noise levels
    photos: of all subjects
    dataloader: batches of photos and class images
    text_cache: text embeddings of frozen text encoders
    dtype: of the frozen base
    streamed_blocks: of the denoiser; None if none is streamed
    initial_weights: of a fresh adapter, if a file gives them
    base_identity: digests of the base's parts (`identify_base`)
    """

    pipeline: DiffusionPipeline
    family: families.Family
    schedule: objective.NoiseSchedule
    photos: list[Photo]
    dataloader: dataset.TrainDataLoader
    text_cache: encoding_cache.TextEmbeddingCache
    dtype: torch.dtype
    streamed_blocks: StreamedBlocks | None = None
    initial_weights: reader.AdapterWeights | None = None
    base_identity: dict[str, str] = field(default_factory=dict)

    @property
    def denoiser(self) -> torch.nn.Module:
        return families.get_denoiser(self.pipeline)


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
    base: which base to load
    context: the run's folder, processes and reporter
    photos: of all subjects
    sample_count: samples of the whole run; their crops are encoded
    prompts: of later samples and scores
    is_fresh: whether no adapter is resumed

    Raises UserError and StopRequestedError.
    """
    device = context.accelerator.device
    dtype = distributed.PRECISION_DTYPES[context.accelerator.mixed_precision]

    # The base. A flow model's denoiser is loaded after its encoders have left memory, if possible.
    context.report.report_phase("loading")
    if context.accelerator.is_main_process:
        base_loading.warn_of_slow_precision(base, dtype, device)
    needs_both = config.train_text_encoder or config.uses_class_images
    is_late = base.is_flow and not needs_both
    pipeline = base_loading.load_base(config, base, dtype, device, has_denoiser=not is_late)

    # Checks, before the long work. A base that is refused costs no encoding.
    schedule = noise_schedule.build_noise_schedule(
        pipeline.scheduler, config.do_edm_style_training, config.flow_shift
    )
    options = families.build_encoding_options(get_text_options(config))
    family = families.build_family(
        pipeline, embedded_guidance=config.guidance_scale, options=options
    )
    validation.check_family(config, family.facts)
    parts = [*family.facts.encoders, "vae"]
    if not is_late:
        check_target_layers(config, pipeline)
        parts.append(family.facts.denoiser)
    digests = identify_base(config, base, family.facts, parts)
    context.raise_if_stop_requested()

    # Latents and text embeddings. The VAE and the encoders then leave memory.
    dataloader = load_photos(config, context, pipeline, family, photos, digests)
    fill_latents_cache(context, dataloader, sample_count)
    release_vae(config, context, pipeline, dataloader.instance.encoder)
    text_cache = build_text_cache(config, pipeline, family, digests)
    move_encoders(pipeline, family, device)
    fill_text_cache(config, context, dataloader, text_cache, prompts)
    release_encoders(config, context, pipeline, family, text_cache)

    # The denoiser has the memory to itself.
    if is_late:
        load_late_denoiser(config, base, pipeline, dtype, device)
        digests |= identify_base(config, base, family.facts, [family.facts.denoiser])
    streamed_blocks = place_denoiser(config, pipeline, device)
    initial_weights = None
    if is_fresh and config.init_adapter is not None:
        initial_weights = reader.read_start(config.init_adapter, pipeline, config.use_dora)
    return TrainInputs(
        pipeline=pipeline,
        family=family,
        schedule=schedule,
        photos=photos,
        dataloader=dataloader,
        text_cache=text_cache,
        dtype=dtype,
        streamed_blocks=streamed_blocks,
        initial_weights=initial_weights,
        base_identity=digests,
    )


def load_late_denoiser(
    config: train_config.TrainConfig,
    base: Base,
    pipeline: DiffusionPipeline,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Load the denoiser of a pipeline whose encoders have left memory. Raises UserError for a layer
    that it lacks."""
    load.load_denoiser(pipeline, base, dtype)
    base_loading.finish_denoiser(config, pipeline, dtype, device)
    check_target_layers(config, pipeline)


def place_denoiser(
    config: train_config.TrainConfig, pipeline: DiffusionPipeline, device: torch.device
) -> StreamedBlocks | None:
    """Move the denoiser to `device`, except blocks that are streamed, which are returned."""
    denoiser = families.get_denoiser(pipeline)
    streamed_blocks = None
    if config.stream_blocks:
        streamed_blocks = StreamedBlocks(denoiser, device, share=config.streamed_share)
        # The device as its weights name it: `to` would copy each weight from "cpu" to "cpu:0".
        device = streamed_blocks.buffers[0].device
    denoiser.to(device)
    return streamed_blocks


def load_photos(
    config: train_config.TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    family: families.Family,
    photos: list[Photo],
    digests: Mapping[str, str],
) -> dataset.TrainDataLoader:
    """Build the data loader of the photos, and of class images, which are generated where they are
    missing. Raises UserError and StopRequestedError."""
    class_photos = []
    if config.uses_class_images:
        class_photos = class_images.make_class_photos(config, context, pipeline, photos, digests)
    encoder = dataset.PhotoEncoder(
        vae=pipeline.vae.to(context.accelerator.device),
        cache=open_cache(config),
        rule=build_crop_rule(config),
        unmasked_weight=config.unmasked_weight,
        family=family,
        synthetic_weight=config.synthetic_weight,
        vae_digest=digests.get("vae", ""),
    )
    return dataset.build_dataloader(config, photos, class_photos, encoder)


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


def check_target_layers(config: train_config.TrainConfig, pipeline: DiffusionPipeline) -> None:
    """Raise UserError if the denoiser lacks a layer that the settings name."""
    matrix_layers = moslora.get_matrix_layers(families.get_denoiser(pipeline))
    dimensions = {path: layer.weight.ndim for path, layer in matrix_layers.items()}
    facts = get_facts(type(pipeline).__name__)
    validation.check_layers(config.target_modules, dimensions, config.use_dora, facts)
    validation.check_patterns(config, dimensions)


def open_cache(config: train_config.TrainConfig) -> encoding_cache.EncodingCache | None:
    """Open the cache of encodings by `--caching`: None, in memory or on disk."""
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
    """Build the cache of text embeddings of the frozen text encoders, whose adapters are off for
    it.

    digests: of the base's parts; an encoder without one is recognised by its weights in memory
    """
    encoders = [getattr(pipeline, name) for name in family.facts.encoders]

    # All that an embedding depends on; `force_zeros_for_empty_prompt` decides that of "".
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
    encoder_device = choose_device(encoders, device)
    for encoder in encoders:
        encoder.to(encoder_device)


def choose_device(models: Sequence[torch.nn.Module], device: torch.device) -> torch.device:
    """Return `device`, or the CPU where a GPU lacks the memory for these models."""
    free_gib = devices.measure_free_gib(device)
    needed_bytes = 0
    for model in models:
        needed_bytes += sum(weight.numel() * weight.element_size() for weight in model.parameters())
    fits = free_gib is None or needed_bytes <= USABLE_RATIO * free_gib * devices.GIB
    return device if fits else torch.device("cpu")


def fill_latents_cache(
    context: reporter.RunContext, dataloader: dataset.TrainDataLoader, sample_count: int
) -> None:
    """Fill the latents cache, if there is one, with every crop of the first `sample_count` samples.
    Raises UserError and StopRequestedError."""
    encoder = dataloader.instance.encoder
    if encoder.cache is None:
        return

    def collect_crops() -> CacheEntries:
        entries = {}
        for source in dataloader.datasets:
            crops = source.list_crops(sample_count)
            entries |= dict(encoder.build_crop_entry(photo, plan) for photo, plan in crops)
        return entries

    entries = require_same_entries(context, collect_crops, "crops")
    counts = fill_cache(encoder.cache, context, entries)
    for _ in context.report.report_counts("caching", counts, len(entries)):
        pass


def fill_text_cache(
    config: train_config.TrainConfig,
    context: reporter.RunContext,
    dataloader: dataset.TrainDataLoader,
    text_cache: encoding_cache.TextEmbeddingCache,
    prompts: Iterable[str],
) -> None:
    """Fill the cache of text embeddings with every caption and prompt that the run will use. Raises
    UserError and StopRequestedError."""
    # "" is for dropped captions and for guidance.
    captions = {*prompts, ""}.union(*(source.captions for source in dataloader.datasets))
    for subject in config.each_subject:
        if subject.class_prompt:
            captions |= {subject.class_prompt, *config.prior_prompts}

    def collect_prompts() -> CacheEntries:
        return dict(text_cache.build_entry(caption) for caption in sorted(captions))

    entries = require_same_entries(context, collect_prompts, "prompts")
    for _ in fill_cache(text_cache.cache, context, entries):
        pass


def require_same_entries(
    context: reporter.RunContext, collect: Callable[[], CacheEntries], kind: str
) -> CacheEntries:
    """Return what this process collects to encode. Raises UserError where processes collect
    different keys."""
    return distributed.require_agreement(
        context.accelerator,
        collect,
        lambda entries: f"{len(entries)} {kind} ({hash_values(keys=[*entries])[:8]})",
    )


def fill_cache(
    cache: encoding_cache.EncodingCache, context: reporter.RunContext, entries: CacheEntries
) -> Iterator[int]:
    """Compute the missing values of `entries`, which are the same in all processes. Yields how many
    are done."""
    accelerator = context.accelerator

    # Each process has its own memory, and each machine its own disk.
    keeps_values = cache.folder is None or accelerator.is_local_main_process

    def compute_values(keys: Sequence[str]) -> Generator[encoding_cache.Tensors, None, None]:
        for key in keys:
            context.raise_if_local_stop()
            yield cache.get(key, entries[key])

    values = distributed.share_work(accelerator, list(entries), compute_values)
    for number, (key, tensors) in enumerate(zip(entries, values, strict=True), start=1):
        if accelerator.num_processes > 1:
            keep_value = partial(cache.put, key, tensors) if keeps_values else bool
            distributed.run_on_each(accelerator, keep_value)
        yield number


def release_vae(
    config: train_config.TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    encoder: dataset.PhotoEncoder,
) -> None:
    """Free the VAE, or move it to the CPU where samples or scores need it later; with `--caching
    off` it stays."""
    if config.caching != "off" and (config.sample_count or config.is_scored):
        pipeline.vae.to("cpu")
    elif config.caching != "off":
        pipeline.register_modules(vae=None)
        encoder.vae = None
    devices.free_unused_memory(context.accelerator.device)


def release_encoders(
    config: train_config.TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    family: families.Family,
    text_cache: encoding_cache.TextEmbeddingCache,
) -> None:
    """Free the text encoders, unless they are trained."""
    if not config.train_text_encoder:
        text_cache.release_encoders()
        pipeline.register_modules(**dict.fromkeys(family.facts.encoders))
    devices.free_unused_memory(context.accelerator.device)
    release_freed_memory()
