"""What differs between families of models: how they encode a prompt and a picture, and how their
denoiser is called.

    texts(pipe, prompts)                       one `TextEmbedding` a prompt
    arguments(texts)                           these as a batch: arguments of the pipeline's call
                                               and of `predict`
    latents(vae, pixels)                       (B, C, h, w), normalised as the denoiser expects
    predict(denoiser, z, t, crops, **words)    (B, C, h, w): noise or velocity, or n - x of a flow

A prompt's encoding is a dict by the names of the pipeline's own arguments. It is cached, batched,
given to the denoiser and to the pipeline alike, so nothing else needs to know what is in it.
`tests/base/test_families.py` compares each family with its own pipeline.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from dreambooth_moslora.base.decode import get_latent_statistics
from dreambooth_moslora.base.devices import get_device
from dreambooth_moslora.settings.family_facts import FamilyFacts, get_facts

TextEmbedding = dict[str, torch.Tensor]
"""One prompt, by the names of the pipeline's arguments: prompt_embeds (T, D), pooled_prompt_embeds
(P), …"""
UNGUIDED_OPTIONS = {"do_classifier_free_guidance": False}
"""For an `encode_prompt` that would encode an empty prompt too."""


class Family:
    """What most flow families share.

    facts: of the family
    embedded_guidance: what a model with embedded guidance is told in training
    options: further arguments of the pipeline's `encode_prompt`, such as `max_sequence_length`
    """

    names: tuple[str, ...] = ("prompt_embeds",)
    """The results of `encode_prompt`, in their order; "" is not used."""
    encoding: Mapping[str, Any] = {}
    """Arguments that this pipeline's `encode_prompt` wants besides."""
    layout: str = ""
    """How its texts are kept. Another way needs another word: what older caches hold is then
    encoded anew."""

    def __init__(
        self,
        facts: FamilyFacts,
        embedded_guidance: float = 1.0,
        options: dict[str, Any] | None = None,
    ):
        self.facts = facts
        self.embedded_guidance = embedded_guidance
        self.options = options or {}

    def encode_prompts(
        self, pipe: DiffusionPipeline, prompts: Sequence[str]
    ) -> list[TextEmbedding]:
        """Each prompt by itself, so that no encoding depends on the length of the others. Gradients
        reach the encoders if they are enabled."""
        return [self.encode_prompt(pipe, prompt) for prompt in prompts]

    def encode_prompt(self, pipe: DiffusionPipeline, prompt: str) -> TextEmbedding:
        """One prompt, encoded by its pipeline."""
        found = pipe.encode_prompt(
            prompt, device=self.get_encoder_device(pipe), **self.encoding, **self.options
        )
        text = {}
        for name, value in zip(self.names, found):
            if name and value is not None:
                text[name] = value[0]
        return text

    def encode_negative(self, pipe: DiffusionPipeline, prompt: str) -> TextEmbedding:
        """What pictures are drawn against. Where it is encoded by other rules, an empty prompt is,
        too."""
        return self.encode_prompts(pipe, [prompt])[0]

    def get_encoder_device(self, pipe: DiffusionPipeline) -> torch.device:
        """Where the text encoders compute."""
        return get_device(getattr(pipe, self.facts.encoders[-1]))

    def collate(self, texts: Sequence[TextEmbedding]) -> dict[str, Any]:
        """A batch of texts, by the names of the pipeline's arguments."""
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    def add_negative(
        self, text_embeddings: dict[str, Any], negative_embeddings: dict[str, Any]
    ) -> dict[str, Any]:
        """The pipeline's arguments for pictures of `words`, drawn against `empty`."""
        if not self.facts.has_negative:
            return text_embeddings
        return text_embeddings | {
            f"negative_{name}": value for name, value in negative_embeddings.items()
        }

    def add_references(
        self,
        text_embeddings: dict[str, Any],
        prompts: Sequence[str],
        references: Sequence[Image.Image],
        side_px: int,
    ) -> dict[str, Any]:
        """The pipeline's arguments for pictures of `words`, which are those of the prompts, with
        pictures that show the subject. `side_px` is that of the pictures to draw."""
        return text_embeddings | {"image": list(references)}

    def encode_latents(self, vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], encoded to the mean of the posterior, fp32."""
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        return (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def predict(
        self,
        denoiser: torch.nn.Module,
        z: torch.Tensor,
        t: torch.Tensor,
        time_ids: torch.Tensor | None,
        **text_embeddings: Any,
    ) -> torch.Tensor:
        """What the denoiser answers, (B, C, h, w).

        denoiser: the pipeline's UNet or transformer
        z: noisy latents (B, C, h, w)
        t: (B,), as in the scheduler
        time_ids: (B, 6), original size, corner and size in pixels; None for a family without them
        text_embeddings: of `arguments`
        """
        raise NotImplementedError

    def get_guidance(
        self, denoiser: torch.nn.Module, count: int, device: torch.device
    ) -> torch.Tensor | None:
        """What a model with embedded guidance is told, (count,); None for another model."""
        if not denoiser.config.guidance_embeds:
            return None
        return torch.full((count,), self.embedded_guidance, device=device)


class UNetFamily(Family):
    """Denoisers that are UNets: scale·z, or scale·(z - mean)/std of a VAE with its latents'
    statistics (Playground)."""

    def encode_latents(self, vae, pixels):
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        if statistics := get_latent_statistics(vae, z.device):
            mean, deviation = statistics
            z = (z - mean) / deviation
        return z * vae.config.scaling_factor


class SDXL(UNetFamily):
    """SDXL uses zeros for the empty prompt where its pipeline says so."""

    def encode_prompts(self, pipe, prompts):
        device = self.get_encoder_device(pipe)
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        if pipe.config.force_zeros_for_empty_prompt:
            said = torch.tensor([bool(prompt) for prompt in prompts], device=device)
            embeds = torch.where(said[:, None, None], embeds, 0)
            pooled = torch.where(said[:, None], pooled, 0)
        return [{"prompt_embeds": e, "pooled_prompt_embeds": p} for e, p in zip(embeds, pooled)]

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, pooled_prompt_embeds):
        added = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
        return denoiser(z, t, prompt_embeds, added_cond_kwargs=added).sample


class SD1(UNetFamily):
    """SD 1.5 and 2.1: no sizes and no pooled text."""

    encoding = {"num_images_per_prompt": 1} | UNGUIDED_OPTIONS

    def encode_prompt(self, pipe, prompt):
        """With `clip_skip` by another layer than the last, which diffusers cannot read with
        transformers 5."""
        skipped = self.options.get("clip_skip")
        if skipped is None:
            return super().encode_prompt(pipe, prompt)
        tokens = pipe.tokenizer(
            prompt,
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        encoder = pipe.text_encoder
        found = encoder(
            tokens.input_ids.to(self.get_encoder_device(pipe)), output_hidden_states=True
        )
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return {"prompt_embeds": norm(found.hidden_states[-1 - skipped])[0]}

    def predict(self, denoiser, z, t, time_ids, prompt_embeds):
        return denoiser(z, t, prompt_embeds).sample


class SD3(Family):
    """One prompt for all three encoders."""

    names = ("prompt_embeds", "", "pooled_prompt_embeds")
    encoding = {"prompt_2": None, "prompt_3": None} | UNGUIDED_OPTIONS

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, pooled_prompt_embeds):
        return denoiser(z, prompt_embeds, pooled_prompt_embeds, t, return_dict=False)[0]


class Flux(Family):
    """Latents are packed into tokens of 2 x 2. Tokens of a text have no place: theirs is zero."""

    names = ("prompt_embeds", "pooled_prompt_embeds")

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, pooled_prompt_embeds):
        height, width = z.shape[-2:]
        found = denoiser(
            pack_latents(z),
            prompt_embeds,
            pooled_prompt_embeds,
            t / 1000,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=z.device),
            img_ids=build_position_ids(height // 2, width // 2, axes=3, device=z.device),
            guidance=self.get_guidance(denoiser, len(z), z.device),
            return_dict=False,
        )[0]
        return unpack_latents(found, z)


class Flux2(Family):
    """The VAE's latents are packed 2 x 2 into channels, and normalised by the statistics of a batch
    norm. A text is several layers of its encoder side by side, three by default."""

    def encode_latents(self, vae, pixels):
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()

        # Each patch of 2 x 2 becomes four channels: (B, 4C, h/2, w/2).
        b, c, h, w = z.shape
        patches = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        z = patches.reshape(b, 4 * c, h // 2, w // 2)

        mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
        variance = vae.bn.running_var.float().view(1, -1, 1, 1)
        return (z - mean) * (variance + vae.config.batch_norm_eps).rsqrt()

    def predict(self, denoiser, z, t, time_ids, prompt_embeds):
        # A token of the text has its number as its place, on an axis of its own.
        words = torch.zeros(prompt_embeds.shape[1], 4, device=z.device)
        words[:, 3] = torch.arange(len(words), device=z.device)

        height, width = z.shape[-2:]
        places = build_position_ids(height, width, axes=4, device=z.device)
        found = denoiser(
            z.flatten(2).mT,
            prompt_embeds,
            t / 1000,
            img_ids=places.expand(len(z), -1, -1),
            txt_ids=words.expand(len(z), -1, -1),
            guidance=self.get_guidance(denoiser, len(z), z.device),
            return_dict=False,
        )[0]
        return found[:, : len(places)].mT.reshape(z.shape)


class ZImage(Family):
    """Texts of unequal length stay a list. Time runs backwards, and the answer is negated."""

    encoding = UNGUIDED_OPTIONS

    def collate(self, texts):
        return {"prompt_embeds": [text["prompt_embeds"] for text in texts]}

    def predict(self, denoiser, z, t, time_ids, prompt_embeds):
        # A list of pictures, each with an axis for frames.
        pictures = list(z[:, :, None])
        found = denoiser(pictures, (1000 - t) / 1000, prompt_embeds, return_dict=False)[0]
        return -torch.stack(found)[:, :, 0]


class QwenImage(Family):
    """A mask tells the texts of a batch from what fills them up. The VAE has an axis for frames."""

    def collate(self, texts):
        embeds = [text["prompt_embeds"] for text in texts]
        lengths = torch.tensor([len(rows) for rows in embeds])

        # Attention without a mask has faster kernels, so texts of one length get none.
        mask = None
        if lengths.min() < lengths.max():
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(embeds[0].device)
        return {"prompt_embeds": pad_sequence(embeds, batch_first=True), "prompt_embeds_mask": mask}

    def add_negative(self, text_embeddings, negative_embeddings):
        """With masks for all: without one the pipeline warns, though it drops a mask that hides
        nothing."""
        return super().add_negative(
            pad_text_embeddings(text_embeddings), pad_text_embeddings(negative_embeddings)
        )

    def encode_latents(self, vae, pixels):
        frames = pixels[:, :, None].to(vae.device, vae.dtype)
        z = vae.encode(frames).latent_dist.mode()[:, :, 0].float()
        mean, deviation = get_latent_statistics(vae, z.device)
        return (z - mean) / deviation

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, prompt_embeds_mask):
        shape = (1, z.shape[-2] // 2, z.shape[-1] // 2)
        found = denoiser(
            pack_latents(z),
            prompt_embeds,
            prompt_embeds_mask,
            t / 1000,
            [shape] * len(z),
            return_dict=False,
        )[0]
        return unpack_latents(found, z)


class Krea2(QwenImage):
    """Its pipeline fills each text up to 512 tokens, in the middle of the text. All tokens of a
    text have one place and none reads what is masked. So a text without padding is the same to the
    denoiser, at less work."""

    names = ("prompt_embeds", "prompt_embeds_mask")
    layout = "without padding"

    def encode_prompt(self, pipe, prompt):
        found = super().encode_prompt(pipe, prompt)
        return {"prompt_embeds": found["prompt_embeds"][found["prompt_embeds_mask"]]}

    def add_negative(self, text_embeddings, negative_embeddings):
        """Both of one length: the pipeline gives them the places of the first."""
        longest = max(
            one["prompt_embeds"].shape[1] for one in (text_embeddings, negative_embeddings)
        )
        return super().add_negative(
            pad_text_embeddings(text_embeddings, longest),
            pad_text_embeddings(negative_embeddings, longest),
        )

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, prompt_embeds_mask):
        height, width = z.shape[-2:]
        words = torch.zeros(prompt_embeds.shape[1], 3, device=z.device)
        picture = build_position_ids(height // 2, width // 2, axes=3, device=z.device)
        found = denoiser(
            pack_latents(z),
            prompt_embeds,
            t / 1000,
            torch.cat([words, picture]),
            encoder_attention_mask=prompt_embeds_mask,
            return_dict=False,
        )[0]
        return unpack_latents(found, z)


class QwenImage21(QwenImage):
    """One sequence of text and then picture, whose tokens lie after the longest text of a batch. So
    that a picture lies where it does alone, texts of one length are predicted together. The VAE has
    opacity as its fourth channel."""

    def add_references(self, text_embeddings, prompts, references, side_px):
        """Its encoder sees them too, so that the pipeline encodes all prompts."""
        return {
            "prompt": list(prompts),
            "negative_prompt": [""] * len(prompts),
            "image": list(references),
            "output_resolution": side_px,
        }

    def encode_latents(self, vae, pixels):
        opaque = torch.ones_like(pixels[:, :1])
        return super().encode_latents(vae, torch.cat([pixels, opaque], dim=1))

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, prompt_embeds_mask):
        if prompt_embeds_mask is None:
            return self.predict_equal_lengths(denoiser, z, t, prompt_embeds)
        lengths = prompt_embeds_mask.sum(1).tolist()
        found = torch.empty_like(z)
        for length in sorted(set(lengths)):
            rows = [row for row, other in enumerate(lengths) if other == length]
            said = prompt_embeds[rows, :length]
            found[rows] = self.predict_equal_lengths(denoiser, z[rows], t[rows], said)
        return found

    def predict_equal_lengths(
        self,
        denoiser: torch.nn.Module,
        z: torch.Tensor,
        t: torch.Tensor,
        prompt_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """As `predict`, of texts (B, T, D) without padding."""
        height, width = z.shape[-2:]

        # A place of the sequence is a token of the text or four of the picture.
        in_text = torch.zeros(prompt_embeds.shape[:2], dtype=torch.bool, device=z.device)
        in_picture = in_text.new_ones(len(z), height * width // 4)
        found = denoiser(
            z.flatten(2).mT,
            prompt_embeds,
            t / 1000,
            [[(1, height, width)]] * len(z),
            torch.cat([in_text, in_picture], dim=1),
            return_dict=False,
        )[0]
        return found[:, -height * width :].mT.reshape(z.shape)


class Lumina2(Family):
    """Time runs backwards, and the answer is negated. Its encoder is not instructed before a
    negative prompt."""

    names = ("prompt_embeds", "prompt_attention_mask")
    encoding = UNGUIDED_OPTIONS

    def encode_prompt(self, pipe, prompt):
        return super().encode_prompt(pipe, prompt) if prompt else self.encode_negative(pipe, "")

    def encode_negative(self, pipe, prompt):
        # The results are those of the prompt, and then those of the negative one.
        found = pipe.encode_prompt(
            "", negative_prompt=prompt, device=self.get_encoder_device(pipe), **self.options
        )[2:]
        return {name: value[0] for name, value in zip(self.names, found)}

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, prompt_attention_mask):
        found = denoiser(z, 1 - t / 1000, prompt_embeds, prompt_attention_mask, return_dict=False)
        return -found[0]


class Sana(Lumina2):
    """Encodes as Lumina 2 does. Its VAE gives one latent, not a distribution."""

    def add_negative(self, text_embeddings, negative_embeddings):
        """At the size that is asked for: by itself the pipeline draws at a usual size and scales
        the picture."""
        found = super().add_negative(text_embeddings, negative_embeddings)
        return found | {"negative_prompt": None, "use_resolution_binning": False}

    def encode_latents(self, vae, pixels):
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent.float()
        return z * vae.config.scaling_factor

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, prompt_attention_mask):
        options = {"encoder_attention_mask": prompt_attention_mask, "return_dict": False}
        return denoiser(z, prompt_embeds, t * denoiser.config.timestep_scale, **options)[0]


def drop_unused_negative(
    facts: FamilyFacts, arguments: dict[str, Any], guidance: float
) -> dict[str, Any]:
    """The arguments of a call with this guidance: those of the negative prompt only where it uses
    them."""
    if guidance > facts.no_guidance:
        return arguments
    return {name: value for name, value in arguments.items() if not name.startswith("negative_")}


def pad_text_embeddings(text_embeddings: dict[str, Any], length: int = 0) -> dict[str, Any]:
    """Texts with a mask, also where it hides nothing, and of at least `length` tokens."""
    embeds, mask = text_embeddings["prompt_embeds"], text_embeddings["prompt_embeds_mask"]
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    lacking = max(0, length - embeds.shape[1])
    behind_tokens = (0, 0) * (embeds.ndim - 2) + (0, lacking)
    return {
        "prompt_embeds": torch.nn.functional.pad(embeds, behind_tokens),
        "prompt_embeds_mask": torch.nn.functional.pad(mask, (0, lacking)),
    }


def pack_latents(z: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h/2·w/2, 4C): each patch of 2 x 2 becomes a token."""
    b, c, h, w = z.shape
    patches = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h * w // 4, 4 * c)


def unpack_latents(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`packed` backwards, to the shape of `like`."""
    b, c, h, w = like.shape
    return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def build_position_ids(h: int, w: int, axes: int, device: torch.device) -> torch.Tensor:
    """(h·w, axes): row and column of each token in axes 1 and 2."""
    places = torch.zeros(h, w, axes, device=device)
    places[..., 1] = torch.arange(h, device=device)[:, None]
    places[..., 2] = torch.arange(w, device=device)
    return places.view(h * w, axes)


FAMILY_CLASSES: dict[str, type[Family]] = {
    "sdxl": SDXL,
    "sd1": SD1,
    "sd3": SD3,
    "flux": Flux,
    "flux2": Flux2,
    "z_image": ZImage,
    "qwen_image": QwenImage,
    "qwen_image21": QwenImage21,
    "krea2": Krea2,
    "lumina2": Lumina2,
    "sana": Sana,
}
"""The facts' name -> the family's class."""
ARGUMENT_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "text_encoder_out_layers": lambda layers: tuple(map(int, layers)),
    "clip_skip": lambda layer: layer - 1,  # diffusers counts those that are left out
}
"""Setting -> what turns its value into the argument, where the two differ."""


def build_encoding_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `encode_prompt` that settings of `TEXT_OPTIONS` mean. An empty one is the
    base's own."""
    options = {}
    for name, value in settings.items():
        if value:
            options[name] = (
                ARGUMENT_CONVERTERS[name](value) if name in ARGUMENT_CONVERTERS else value
            )
    return options


def build_family(pipe: DiffusionPipeline, **options: Any) -> Family:
    """The family of a loaded base; `about` are arguments of `Family`. Raises UserError for an
    unknown one."""
    facts = get_facts(type(pipe).__name__)
    return FAMILY_CLASSES[facts.name](facts, **options)


def cast_embedding(text: TextEmbedding, device: torch.device, dtype: torch.dtype) -> TextEmbedding:
    """The text on the device; masks keep their type."""
    found = {}
    for name, one in text.items():
        found[name] = one.to(device, dtype if one.is_floating_point() else one.dtype)
    return found


def get_denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The pipeline's UNet or transformer."""
    return getattr(pipe, get_facts(type(pipe).__name__).denoiser)


def list_block_classes(model: torch.nn.Module) -> tuple[str, ...]:
    """Class names of the blocks that are repeated, as diffusers or transformers lists them: they
    hold nearly all weights."""
    repeated = getattr(model, "_repeated_blocks", None)
    whole = getattr(model, "_no_split_modules", None)
    return tuple(repeated or whole or ())
