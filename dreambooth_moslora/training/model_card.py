"""Model card of an adapter, and its images.

The card says what the adapter shows, how to load it, how it was made, and how exactly its files
reload; it contains no path, no photo and nothing about a photo but that a model made it.
"""

import re
from dataclasses import dataclass, replace

from huggingface_hub import ModelCardData

from dreambooth_moslora import __version__
from dreambooth_moslora.base.families import build_encoding_options
from dreambooth_moslora.disk import run_folder
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.paths import get_public_name
from dreambooth_moslora.lora.metadata import AdapterMetadata, format_dora_table
from dreambooth_moslora.lora.verify import Proof
from dreambooth_moslora.pictures import render, write_png
from dreambooth_moslora.settings import family_facts, metric_kinds, toy_bases, train_config
from dreambooth_moslora.settings.prompts import list_pair_prompts
from dreambooth_moslora.training.best_step import BestStep
from dreambooth_moslora.training.samples import Sample

MAX_CARD_IMAGES = 6
"""Pictures on a card, but for at least two samples."""


@dataclass(frozen=True)
class CardFacts:
    """Facts of a run that its card tells.

    name: of the run folder, and of the files
    step: optimizer steps of the adapter; `max_train_steps` are those of the whole run
    adapter: what its file's header says
    proof: how exactly its files reload
    images: (file name, prompt) of the images beside the card
    scores: the latest
    best: the best step, if its adapter was kept
    synthetic_lines: sentences about photos that a model made
    """

    name: str
    step: int
    max_train_steps: int
    adapter: AdapterMetadata
    proof: Proof
    images: tuple[tuple[str, str], ...] = ()
    scores: dict[str, float] | None = None
    best: BestStep | None = None
    synthetic_lines: tuple[str, ...] = ()


def render_model_card(config: train_config.TrainConfig, facts: CardFacts) -> str:
    """Render README.md by the template `card.md`; empty sections are left out."""
    adapter = facts.adapter
    prompts = list_instance_prompts(config)

    text = render(
        "card.md",
        config=config,
        facts=facts,
        adapter=adapter,
        prompts=prompts,
        family=facts.adapter.family,
        kind=describe_kind(facts),
        call=format_call(facts),
        front=render_front_matter(config, facts),
        loading=format_loading(adapter),
        prompt=repr(prompts[0]),
        kohya=f"{facts.name}{run_folder.KOHYA_SUFFIX}",
        dora_table=format_dora_table(),
        began_with=get_public_name(config.init_adapter or ""),
        companion=get_public_name(config.companion or ""),
        scores=format_score_table(facts),
        signature=f"{run_folder.CARD_SIGNATURE} {__version__}.",
    )

    # Sections that are left out leave empty lines.
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def render_front_matter(config: train_config.TrainConfig, facts: CardFacts) -> str:
    """Return the YAML at the head of the card, which the hub reads."""
    # The hub links the base, whose id has an owner, and shows the images.
    recipe_fields = {}
    if "/" in facts.adapter.base_id:
        recipe_fields["base_model"] = facts.adapter.base_id
    if facts.images:
        recipe_fields["widget"] = [
            {"text": prompt, "output": {"url": file}} for file, prompt in facts.images
        ]
    tag = facts.adapter.family.hub_tag or facts.adapter.family.name
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=", ".join(list_instance_prompts(config)),
        tags=[
            "text-to-image",
            "diffusers",
            "lora",
            "moslora",
            "dreambooth",
            tag,
            "template:sd-lora",
        ],
        **recipe_fields,
    )
    return f"---\n{data.to_yaml()}\n---"


def list_instance_prompts(config: train_config.TrainConfig) -> list[str]:
    """Return the instance prompt of each subject."""
    return [subject.instance_prompt for subject in config.each_subject]


def describe_kind(facts: CardFacts) -> str:
    """Describe for the title what the adapter is of."""
    if toy_bases.is_toy(facts.adapter.base_id):
        return f"a practice adapter of the embedded base `{facts.adapter.base_id}`"
    family = facts.adapter.family
    return f"{family.article} {family.title} adapter"


def format_loading(adapter: AdapterMetadata) -> str:
    """Format the end of the line that loads the base, after `from_pretrained`."""
    family = adapter.family
    return family.loading.format(
        base=repr(adapter.base_id if "/" in adapter.base_id else "path/to/the/base"),
        dtype="bfloat16" if family.style == "flow" else "float16",
    )


def format_call(facts: CardFacts) -> str:
    """Format the end of the pipeline's call after the prompt: the family's arguments and the run's
    text options."""
    # The text options that the run set.
    recipe = facts.adapter.recipe
    text_options = {name: recipe[name] for name in family_facts.TEXT_OPTIONS if recipe.get(name)}
    arguments = "".join(
        f", {name}={value!r}" for name, value in build_encoding_options(text_options).items()
    )

    # A transformer does not tell its side, and the embedded one's is not the usual one.
    family = facts.adapter.family
    if toy_bases.is_toy(facts.adapter.base_id) and family.style == "flow":
        arguments += f", height={toy_bases.RESOLUTION_PX}, width={toy_bases.RESOLUTION_PX}"
    return f"{family.call}{arguments}).images[0]"


def format_score_table(facts: CardFacts) -> str:
    """Return the scores as a section of the card; "" without any."""
    if not facts.scores:
        return ""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in facts.scores.items())
    best = ""
    likeness = metric_kinds.describe_likeness(facts.scores)
    if facts.best is not None:
        best = (
            f"\n\nBest step: {facts.best.step}, score {facts.best.score:.3f} "
            f"({likeness} × CLIP-T as a share of the base's × share of pictures that copy no "
            "photo); "
            "that adapter is in the run's `best/`, which is not uploaded."
        )
    return f"## Scores of the last evaluation\n\n| | |\n|---|---|\n{rows}{best}"


def write_card(
    config: train_config.TrainConfig,
    run_dir: run_folder.RunDir,
    facts: CardFacts,
    samples: list[Sample],
    contexts: list[Sample],
) -> None:
    """Write README.md and its images. Old images go first: at all times a card names every
    image.

    config: the run's settings
    run_dir: where they are written
    facts: what the card says
    samples: the samples at the end
    contexts: the new contexts
    """
    images = pick_card_images(config, samples, contexts)
    for stale in run_folder.list_card_pictures(run_dir.read_card() or ""):
        (run_dir.path / stale).unlink(missing_ok=True)

    # The card names its images before they are there.
    names = [(f"image_{number}.png", item[0].prompt) for number, item in enumerate(images)]
    write_atomic(run_dir.card_path, render_model_card(config, replace(facts, images=tuple(names))))
    for (name, _), (_, image) in zip(names, images):
        write_png(run_dir.path / name, image)


def pick_card_images(
    config: train_config.TrainConfig, samples: list[Sample], contexts: list[Sample]
) -> list[Sample]:
    """Pick the card's images: samples and new contexts; of several subjects the first sample of
    each prompt, then pairs."""
    if len(config.subjects) <= 1:
        return [*samples[: max(2, MAX_CARD_IMAGES - len(contexts))], *contexts]
    first_of_each = {request.prompt: (request, image) for request, image in reversed(samples)}
    pairs = list_pair_prompts(config)
    together = [sample for sample in contexts if sample[0].prompt in pairs]
    return [*reversed(first_of_each.values()), *together]
