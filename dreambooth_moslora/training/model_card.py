"""The model card, and the push of a finished adapter to the hub.

The card says what the adapter shows, how to load it, how it was made, and how exactly its files reload. It is meant
to be shared: it contains no path, no photo and nothing about a photo.

The push, when asked for, sends the adapter's files, the card and its pictures. Photos, the contact sheet (which
shows them), checkpoints, class images and the configuration (which holds paths) stay on this machine.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCardData

from dreambooth_moslora import __version__
from dreambooth_moslora.adapters.metadata import AdapterMetadata, dora_table
from dreambooth_moslora.core import one_line, public_name
from dreambooth_moslora.disk.run_folder import (
    KOHYA_SUFFIX,
    MIXERS_NAME,
    PUBLISHED_NAME,
    SIGNATURE,
    TOKENS_SUFFIX,
    RunDir,
)
from dreambooth_moslora.settings.families import DENOISERS, FAMILIES, Facts, facts_of_model
from dreambooth_moslora.settings.prompts import spelled, spellings_of, token_names
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.explain import BestStep

if TYPE_CHECKING:
    from dreambooth_moslora.adapters.proof import Proof

STRENGTH = "## Strength"


@dataclass(frozen=True)
class CardFacts:
    """What the card says beyond the configuration. `images` are (file name, prompt) of the pictures beside it."""

    name: str
    step: int
    max_train_steps: int
    adapter: AdapterMetadata
    proof: "Proof"
    images: tuple[tuple[str, str], ...] = ()
    scores: dict[str, float] | None = None
    best: BestStep | None = None


def model_card(config: TrainConfig, facts: CardFacts) -> str:
    """The text of README.md: YAML front matter for the hub, then sections."""
    method = (
        "a MoSLoRA adapter (arXiv 2406.11909), folded into plain LoRA" if config.mixer != "none" else "a plain LoRA"
    )
    prompts = prompts_of(config)
    words = ", ".join(f"`{word}`" for word in facts.adapter.trigger_words or prompts)
    count = "One subject" if len(prompts) == 1 else f"{len(prompts)} subjects"
    family = f"{family_in(facts).article} {family_in(facts).title}"
    unfinished = "" if facts.step >= facts.max_train_steps else f" Training stopped at step {facts.step}."
    sections = [
        front_matter(config, facts),
        f"# {facts.name}: {family} adapter for {' and '.join(f'“{prompt}”' for prompt in prompts)}",
        f"{count}, learnt from a few photos by DreamBooth, as {method}. Trigger words: {words}.{unfinished}",
        "\n".join(f"![{prompt}]({file})" for file, prompt in facts.images),
        usage(config, facts),
        strength(facts.adapter.best_scale, facts.adapter.usable_scales, family_in(facts)),
        training_table(config, facts),
        f"## Proof\n\n{facts.proof.sentence()}.",
        score_table(facts),
        f"{SIGNATURE} {__version__}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(config: TrainConfig, facts: CardFacts) -> str:
    """The card's YAML block for the hub."""
    known = {"base_model": facts.adapter.base_id} if "/" in facts.adapter.base_id else {}
    if facts.images:
        known["widget"] = [{"text": prompt, "output": {"url": file}} for file, prompt in facts.images]
    tag = family_in(facts).hub_tag or family_in(facts).name
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=", ".join(prompts_of(config)),
        tags=["text-to-image", "diffusers", "lora", "moslora", "dreambooth", tag, "template:sd-lora"],
        **known,
    )
    return f"---\n{data.to_yaml()}\n---"


def prompts_of(config: TrainConfig) -> list[str]:
    """The instance prompt of each subject."""
    return [subject.instance_prompt for subject in config.each_subject]


def family_in(facts: CardFacts) -> Facts:
    """The family of the adapted denoiser."""
    for model in (facts.adapter.structures.get(name) for name in DENOISERS):
        if model:
            return facts_of_model(model["class"], model["config"])
    return FAMILIES[0]


def usage(config: TrainConfig, facts: CardFacts) -> str:
    """How to load it; of DoRA, which programs read the kohya file as what."""
    base_id = facts.adapter.base_id if "/" in facts.adapter.base_id else "path/to/the/base"
    notes = facts.adapter.tokens
    prompt = spelled(prompts_of(config)[0], spellings_of({note["word"]: note["count"] for note in notes}))
    family = family_in(facts)
    readers = f"`{facts.name}{KOHYA_SUFFIX}` is the same adapter for ComfyUI, AUTOMATIC1111, Fooocus and InvokeAI."
    if family.denoiser != "unet":
        readers = "ComfyUI reads the same file."
    elif config.use_dora:
        many = "is for other programs, and with DoRA not the same adapter in all of them:"
        readers = f"`{facts.name}{KOHYA_SUFFIX}` {many}\n\n{dora_table()}"
    asked = repr(prompt) if family.denoiser == "unet" else f"prompt={prompt!r}"  # some pipelines' first is a picture
    dtype = "bfloat16" if family.style == "flow" else "float16"
    return f"""## Use

```python
import torch
from diffusers import {family.pipeline}

pipe = {family.pipeline}.from_pretrained({base_id!r}, torch_dtype=torch.{dtype}).to("cuda")
pipe.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")
{token_lines(notes)}image = pipe({asked}{family.call}).images[0]
```

{readers}\
{about_tokens(notes)}"""


def token_lines(notes: Sequence[dict]) -> str:
    """Lines of the snippet that load new tokens."""
    if not notes:
        return ""
    lines = ["", "from safetensors.torch import load_file"]
    for note, names in zip(notes, token_names(note["count"] for note in notes), strict=True):
        lines += ["", f'new, names = load_file("path/to/this/folder/{note["file"]}"), {names}']
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            parts = f"text_encoder=pipe.text_encoder{end}, tokenizer=pipe.tokenizer{end}"
            lines.append(f'pipe.load_textual_inversion(new["{key}"], token=names, {parts})')
    return "\n".join([*lines, ""])


def about_tokens(notes: Sequence[dict]) -> str:
    said = ""
    for note, names in zip(notes, token_names(note["count"] for note in notes)):
        stem = note["file"].removesuffix(".safetensors")
        said += (
            f"\n\nThe word “{note['word']}” stands for {note['count']} new tokens, which are in `{note['file']}` and "
            f"belong to the adapter: in diffusers write `{''.join(names)}` in its place, in ComfyUI `embedding:{stem}` "
            f"and in AUTOMATIC1111 `{stem}`, with the file in their folder of embeddings."
        )
    return said


def strength(best: float | None, usable: tuple[float, ...], family: Facts = FAMILIES[0]) -> str:
    """The scale to load the adapter at; "" when it was not measured."""
    if best is None:
        return ""
    around = f"; from {usable[0]:g} to {usable[-1]:g} the score stays near it" if len(set(usable)) > 1 else ""
    how = f"`pipe(…, cross_attention_kwargs={{'scale': {best:g}}})`"
    if family.denoiser != "unet":
        how = f"`pipe.set_adapters(pipe.get_active_adapters(), {best:g})`"
    return f"{STRENGTH}\n\nScale {best:g} scored best{around}. In diffusers: {how}."


def with_strength(text: str, best: float, usable: tuple[float, float]) -> str:
    """A card with this `strength` instead of an earlier one, or before the training table."""
    kept = re.sub(rf"{STRENGTH}\n\n[^\n]*\n\n", "", text)
    loaded = next((facts for facts in FAMILIES if f"import {facts.pipeline}\n" in text), FAMILIES[0])
    return kept.replace("## Training\n", f"{strength(best, usable, loaded)}\n\n## Training\n", 1)


def training_table(config: TrainConfig, facts: CardFacts) -> str:
    trained = "UNet" if family_in(facts).denoiser == "unet" else "transformer"
    if config.train_text_encoder:
        count = len(family_in(facts).adapted_encoders)
        trained += " and both text encoders" if count == 2 else " and text encoder"
    prior = f"{config.prior}, weight {config.prior_loss_weight}" if config.with_prior_preservation else "none"
    start = {"Began with": public_name(config.init_adapter)} if config.init_adapter else {}
    ranks = sorted({facts.adapter.rank, *facts.adapter.ranks.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    mixer = f"alone, on the basis {facts.adapter.basis['kind']}" if facts.adapter.basis else config.mixer
    rows = {
        "Base": facts.adapter.base_id,
        **start,
        "Adapter": f"rank {rank}, alpha {facts.adapter.alpha:g}, mixer {mixer}, {trained}",
        "Steps": f"{facts.step} of {facts.max_train_steps}",
        "Resolution": f"{config.resolution} px",
        "Batch": f"{config.train_batch_size} × {config.gradient_accumulation_steps} accumulated",
        "Learning rate": f"{config.learning_rate:g}, {config.lr_scheduler}, {config.optimizer}",
        "Prior preservation": prior,
        "Seed": config.seed,
    }
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def score_table(facts: CardFacts) -> str:
    if not facts.scores:
        return ""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in facts.scores.items())
    best = ""
    if facts.best is not None:
        best = (
            f"\n\nBest step: {facts.best.step}, score {facts.best.score:.3f} (DINO × CLIP-T as a share of the base's × "
            "share of pictures that copy no photo); that adapter is in `best/`."
        )
    return f"## Scores of the last evaluation\n\n| | |\n|---|---|\n{rows}{best}"


logger = logging.getLogger(__name__)

PUBLIC_FILES = [PUBLISHED_NAME, MIXERS_NAME, f"*{KOHYA_SUFFIX}", f"*{TOKENS_SUFFIX}", "README.md", "image_*.png"]


def public_files(run_dir: Path) -> list[str]:
    """Names of the files at the top of the run folder that may be uploaded."""
    return sorted(p.name for p in run_dir.iterdir() if p.is_file() and any(map(p.match, PUBLIC_FILES)))


def push(run_dir: Path, repo_id: str | None, token: str | None) -> str | None:
    """Create the model repository if it is missing, and upload `public_files`. Returns the repository's address. When
    the hub cannot be reached or refuses, it logs a warning and returns None: the run is complete without it."""
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id or RunDir(run_dir).name, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=run_dir,
            # patterns that match only these names, even with brackets in them
            allow_patterns=[escape(name) for name in public_files(run_dir)],
            commit_message="Upload the adapter",
        )
    except Exception as error:  # the client passes on the HTTP library's errors
        again = "--push_to_hub --resume_from_checkpoint latest tries again"
        logger.warning(
            "the adapter is in %s but could not be pushed to the hub (%s); %s", run_dir, one_line(error), again
        )
        return None
    return str(url)
