"""Families of models: how each encodes prompts and images, and how its denoiser is called.

    encode_prompts(pipe, prompts)             list of B `TextEmbedding`
    collate(texts)                            the batch as keyword arguments (B, …), for the
                                              pipeline's call and for `predict`
    encode_latents(vae, pixels)               z (B, C, h, w), normalised as the denoiser expects
    predict(denoiser, z, t, time_ids, **text) (B, C, h, w): noise, velocity, or n - x of a flow

A prompt's encoding is a dict by the names of the pipeline's arguments. It is cached, batched, and
passed to the denoiser and the pipeline alike, so no other module needs to know what is in it.
`tests/base/test_families.py` compares each family with its own pipeline.
"""

import inspect
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
"""Encoding of one prompt, by the names of the pipeline's arguments: prompt_embeds (T, D),
pooled_prompt_embeds (P), …"""
UNGUIDED_OPTIONS = {"do_classifier_free_guidance": False}
"""Options of an `encode_prompt` that would otherwise encode the empty prompt as well."""


class Family:
    """Defaults that most flow families share.

    facts: the family's row
    embedded_guidance: guidance scale that a model with embedded guidance gets in training
    options: further arguments of the pipeline's `encode_prompt`, such as `max_sequence_length`
    """

    names: tuple[str, ...] = ("prompt_embeds",)
    """Names of the results of `encode_prompt`, in their order; "" for an unused one."""
    encoding: Mapping[str, Any] = {}
    """Arguments that this pipeline's `encode_prompt` always gets."""
    layout: str = ""
    """Version of the text embeddings' layout in caches. After a change of layout it must change
    too, so that cached embeddings are encoded again."""

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
        """Encode each prompt by itself, so that no encoding depends on the length of another one.
        Gradients reach the encoders if they are enabled."""
        return [self.encode_prompt(pipe, prompt) for prompt in prompts]

    def encode_prompt(self, pipe: DiffusionPipeline, prompt: str) -> TextEmbedding:
        """Encode one prompt by the pipeline's `encode_prompt`."""
        values = pipe.encode_prompt(
            prompt, device=self.get_encoder_device(pipe), **self.encoding, **self.options
        )
        text = {}
        for name, value in zip(self.names, values):
            if name and value is not None:
                text[name] = value[0]
        return text

    def encode_negative(self, pipe: DiffusionPipeline, prompt: str) -> TextEmbedding:
        """Encode the negative prompt, which may be empty."""
        return self.encode_prompts(pipe, [prompt])[0]

    def get_encoder_device(self, pipe: DiffusionPipeline) -> torch.device:
        """Return the device on which the text encoders compute."""
        return get_device(getattr(pipe, self.facts.encoders[-1]))

    def collate(self, texts: Sequence[TextEmbedding]) -> dict[str, Any]:
        """Stack B text embeddings into tensors (B, …), by the names of the pipeline's arguments."""
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    def add_negative(
        self, text_embeddings: dict[str, Any], negative_embeddings: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the pipeline's arguments for a batch of prompts and their negative prompts."""
        if not self.facts.has_negative:
            return text_embeddings
        return text_embeddings | {
            f"negative_{name}": value for name, value in negative_embeddings.items()
        }

    def encode_conditioning(
        self, pipe: DiffusionPipeline, prompt: str, negative_prompt: str, count: int = 1
    ) -> dict[str, Any]:
        """Encode a prompt and its negative prompt, as the pipeline's arguments for `count`
        images."""
        embedding = self.encode_prompts(pipe, [prompt])[0]
        negative_embedding = self.encode_negative(pipe, negative_prompt)
        return self.add_negative(
            self.collate([embedding] * count), self.collate([negative_embedding] * count)
        )

    def add_references(
        self,
        text_embeddings: dict[str, Any],
        prompts: Sequence[str],
        references: Sequence[Image.Image],
        side_px: int,
    ) -> dict[str, Any]:
        """Return the pipeline's arguments with reference images of the subject.

        text_embeddings: batch of the prompts' embeddings
        side_px: side of the images to generate
        """
        return text_embeddings | {"image": list(references)}

    def encode_latents(self, vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to the posterior's mean (B, C, h, w), fp32."""
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        return (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def decode_latents(self, vae: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
        """Decode latents to pixels (B, 3, H, W), about in [-1, 1]: the inverse of `encode_latents`.
        Only modular pipelines need it; others decode themselves."""
        raise NotImplementedError

    def predict(
        self,
        denoiser: torch.nn.Module,
        z: torch.Tensor,
        t: torch.Tensor,
        time_ids: torch.Tensor | None,
        **text_embeddings: Any,
    ) -> torch.Tensor:
        """Return the denoiser's prediction (B, C, h, w): noise, velocity, or n - x of a flow.

        denoiser: the pipeline's UNet or transformer
        z: noisy latents (B, C, h, w)
        t: timesteps (B,) in the scheduler's unit, 0 to 1000
        time_ids: original size, top left corner and target size in px (B, 6); unused except by SDXL
        text_embeddings: result of `collate`
        """
        raise NotImplementedError

    def predict_by_length(
        self,
        denoiser: torch.nn.Module,
        z: torch.Tensor,
        t: torch.Tensor,
        texts: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Predict (B, C, h, w) for B texts (T, …) without padding, those of equal length together.
        No attention needs a mask then, with which it has slower kernels."""
        rows_by_length: dict[int, list[int]] = {}
        for row, text in enumerate(texts):
            rows_by_length.setdefault(len(text), []).append(row)
        if len(rows_by_length) == 1:
            return self.predict_equal_lengths(denoiser, z, t, torch.stack(list(texts)))
        prediction = torch.empty_like(z)
        for rows in rows_by_length.values():
            prompt_embeds = torch.stack([texts[row] for row in rows])
            prediction[rows] = self.predict_equal_lengths(denoiser, z[rows], t[rows], prompt_embeds)
        return prediction

    def predict_equal_lengths(
        self,
        denoiser: torch.nn.Module,
        z: torch.Tensor,
        t: torch.Tensor,
        prompt_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """Predict (B, C, h, w) for texts (B, T, …) without padding, where `predict` goes by their
        lengths."""
        raise NotImplementedError

    def select_photo_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the inputs that are arguments of this family's `predict`; other families may have
        more."""
        arguments = inspect.signature(self.predict).parameters
        return {name: tensor for name, tensor in inputs.items() if name in arguments}

    def get_guidance(
        self, denoiser: torch.nn.Module, count: int, device: torch.device
    ) -> torch.Tensor | None:
        """Return the guidance scale (count,) of a model with embedded guidance, None for a model
        without."""
        if not denoiser.config.guidance_embeds:
            return None
        return torch.full((count,), self.embedded_guidance, device=device)


class UNetFamily(Family):
    """UNets. Their latents are scale·z, or scale·(z - mean)/std for a VAE that states its latents'
    statistics (Playground)."""

    def encode_latents(self, vae, pixels):
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, deviation = get_latent_statistics(vae, z.device)
        return (z - mean) / deviation * vae.config.scaling_factor


class SDXL(UNetFamily):
    """SDXL, which encodes the empty prompt as zeros where its pipeline's configuration says so."""

    def encode_prompts(self, pipe, prompts):
        device = self.get_encoder_device(pipe)
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        if pipe.config.force_zeros_for_empty_prompt:
            has_text = torch.tensor([bool(prompt) for prompt in prompts], device=device)
            embeds = torch.where(has_text[:, None, None], embeds, 0)
            pooled = torch.where(has_text[:, None], pooled, 0)
        return [{"prompt_embeds": e, "pooled_prompt_embeds": p} for e, p in zip(embeds, pooled)]

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, pooled_prompt_embeds):
        added = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
        return denoiser(z, t, prompt_embeds, added_cond_kwargs=added).sample


class SD1(UNetFamily):
    """SD 1.5 and 2.1, without time ids and pooled text."""

    encoding = {"num_images_per_prompt": 1} | UNGUIDED_OPTIONS

    def encode_prompt(self, pipe, prompt):
        """Encode one prompt, with `clip_skip` by an earlier layer, which diffusers cannot read with
        transformers 5."""
        skipped = self.options.get("clip_skip")
        if skipped is None:
            return super().encode_prompt(pipe, prompt)

        # Tokenize, padded to the encoder's length.
        tokens = pipe.tokenizer(
            prompt,
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )

        # As diffusers does: the earlier layer's states, and then the encoder's last norm.
        encoder = pipe.text_encoder
        output = encoder(
            tokens.input_ids.to(self.get_encoder_device(pipe)), output_hidden_states=True
        )
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return {"prompt_embeds": norm(output.hidden_states[-1 - skipped])[0]}

    def predict(self, denoiser, z, t, time_ids, prompt_embeds):
        return denoiser(z, t, prompt_embeds).sample


class SD3(Family):
    """SD 3, with one prompt for all three encoders."""

    names = ("prompt_embeds", "", "pooled_prompt_embeds")
    encoding = {"prompt_2": None, "prompt_3": None} | UNGUIDED_OPTIONS

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, pooled_prompt_embeds):
        return denoiser(z, prompt_embeds, pooled_prompt_embeds, t, return_dict=False)[0]


class Flux(Family):
    """FLUX.1. Latents are packed into tokens of 2 x 2; the position ids of text tokens are zero."""

    names = ("prompt_embeds", "pooled_prompt_embeds")

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, pooled_prompt_embeds):
        height, width = z.shape[-2:]
        tokens = denoiser(
            pack_latents(z),
            prompt_embeds,
            pooled_prompt_embeds,
            t / 1000,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=z.device),
            img_ids=build_position_ids(height // 2, width // 2, axes=3, device=z.device),
            guidance=self.get_guidance(denoiser, len(z), z.device),
            return_dict=False,
        )[0]
        return unpack_latents(tokens, z)


class Flux2(Family):
    """FLUX.2. The VAE's latents are packed 2 x 2 into channels, and normalised by the statistics of
    a batch norm. A text embedding is several encoder layers side by side, three by default."""

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
        # The position ids of text tokens count along an axis of their own.
        text_ids = torch.zeros(prompt_embeds.shape[1], 4, device=z.device)
        text_ids[:, 3] = torch.arange(len(text_ids), device=z.device)

        height, width = z.shape[-2:]
        image_ids = build_position_ids(height, width, axes=4, device=z.device)
        tokens = denoiser(
            z.flatten(2).mT,
            prompt_embeds,
            t / 1000,
            img_ids=image_ids.expand(len(z), -1, -1),
            txt_ids=text_ids.expand(len(z), -1, -1),
            guidance=self.get_guidance(denoiser, len(z), z.device),
            return_dict=False,
        )[0]
        return tokens[:, : len(image_ids)].mT.reshape(z.shape)


class Flux3(Flux2):
    """FLUX 3. Its transformer attends to the padding of a text, whose length is part of what it was
    trained on, so texts of equal length are predicted together."""

    def collate(self, texts):
        return {"prompt_embeds": [text["prompt_embeds"] for text in texts]}

    def decode_latents(self, vae, z):
        # The inverse of `encode_latents`, step by step.
        mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
        variance = vae.bn.running_var.float().view(1, -1, 1, 1)
        z = z * (variance + vae.config.batch_norm_eps).sqrt() + mean
        z = torch.nn.functional.pixel_shuffle(z, 2)
        return vae.decode(z.to(vae.device, vae.dtype), return_dict=False)[0]

    def predict(self, denoiser, z, t, time_ids, prompt_embeds):
        return self.predict_by_length(denoiser, z, t, prompt_embeds)

    def predict_equal_lengths(self, denoiser, z, t, prompt_embeds):
        text_ids = torch.zeros(prompt_embeds.shape[1], 4, device=z.device)
        text_ids[:, 3] = torch.arange(len(text_ids), device=z.device)

        # It was trained with half the usual distance between image tokens.
        image_ids = build_position_ids(*z.shape[-2:], axes=4, device=z.device) / 2
        tokens = denoiser(
            z.flatten(2).mT, prompt_embeds, t / 1000, image_ids, text_ids, return_dict=False
        )[0]
        return tokens.mT.reshape(z.shape)


class ZImage(Family):
    """Z-Image. Texts of unequal length stay a list. Time runs backwards, so that the prediction is
    negated."""

    encoding = UNGUIDED_OPTIONS

    def collate(self, texts):
        return {"prompt_embeds": [text["prompt_embeds"] for text in texts]}

    def predict(self, denoiser, z, t, time_ids, prompt_embeds):
        images = list(z[:, :, None])  # each with an axis for frames
        output = denoiser(images, (1000 - t) / 1000, prompt_embeds, return_dict=False)[0]
        return -torch.stack(output)[:, :, 0]


class QwenImage(Family):
    """Qwen-Image. A mask marks the tokens of each text among its padding, of which the denoiser
    sees neither. The VAE has an axis for frames."""

    def collate(self, texts):
        embeds = [text["prompt_embeds"] for text in texts]
        lengths = torch.tensor([len(rows) for rows in embeds])

        # Texts of one length need no mask.
        mask = None
        if lengths.min() < lengths.max():
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(embeds[0].device)
        return {"prompt_embeds": pad_sequence(embeds, batch_first=True), "prompt_embeds_mask": mask}

    def add_negative(self, text_embeddings, negative_embeddings):
        """Return the pipeline's arguments, with a mask for each prompt: without one the pipeline
        warns, though it drops a mask that hides nothing."""
        return super().add_negative(
            pad_text_embeddings(text_embeddings), pad_text_embeddings(negative_embeddings)
        )

    def encode_latents(self, vae, pixels):
        frames = pixels[:, :, None].to(vae.device, vae.dtype)
        z = vae.encode(frames).latent_dist.mode()[:, :, 0].float()
        mean, deviation = get_latent_statistics(vae, z.device)
        return (z - mean) / deviation

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, prompt_embeds_mask):
        return self.predict_by_length(
            denoiser, z, t, remove_padding(prompt_embeds, prompt_embeds_mask)
        )

    def predict_equal_lengths(self, denoiser, z, t, prompt_embeds):
        shape = (1, z.shape[-2] // 2, z.shape[-1] // 2)
        tokens = denoiser(
            pack_latents(z), prompt_embeds, None, t / 1000, [[shape]] * len(z), return_dict=False
        )[0]
        return unpack_latents(tokens, z)


class Krea2(QwenImage):
    """Krea 2. Its pipeline pads each text to 512 tokens, in the middle of the text. All text tokens
    have the same position id and masked ones are ignored, so the denoiser's prediction is the same
    without padding, for less computation."""

    names = ("prompt_embeds", "prompt_embeds_mask")
    layout = "without padding"

    def encode_prompt(self, pipe, prompt):
        text = super().encode_prompt(pipe, prompt)
        return {"prompt_embeds": text["prompt_embeds"][text["prompt_embeds_mask"]]}

    def add_negative(self, text_embeddings, negative_embeddings):
        """Return the pipeline's arguments, with prompts and negative prompts padded to equal
        length: the pipeline takes the position ids of the prompts for both."""
        length = max(
            text_embeddings["prompt_embeds"].shape[1], negative_embeddings["prompt_embeds"].shape[1]
        )
        return super().add_negative(
            pad_text_embeddings(text_embeddings, length),
            pad_text_embeddings(negative_embeddings, length),
        )

    def predict_equal_lengths(self, denoiser, z, t, prompt_embeds):
        height, width = z.shape[-2:]
        text_ids = torch.zeros(prompt_embeds.shape[1], 3, device=z.device)
        image_ids = build_position_ids(height // 2, width // 2, axes=3, device=z.device)
        tokens = denoiser(
            pack_latents(z),
            prompt_embeds,
            t / 1000,
            torch.cat([text_ids, image_ids]),
            return_dict=False,
        )[0]
        return unpack_latents(tokens, z)


class Anima(QwenImage):
    """Anima. Its transformer attends to the padding of a text too, so there is no mask."""

    def collate(self, texts):
        # All are as long as the conditioner's minimum, unless a text is longer.
        embeds = [text["prompt_embeds"] for text in texts]
        return {"prompt_embeds": pad_sequence(embeds, batch_first=True)}

    def add_negative(self, text_embeddings, negative_embeddings):
        return Family.add_negative(self, text_embeddings, negative_embeddings)

    def decode_latents(self, vae, z):
        mean, deviation = get_latent_statistics(vae, z.device)
        frames = (z * deviation + mean)[:, :, None]
        return vae.decode(frames.to(vae.device, vae.dtype), return_dict=False)[0][:, :, 0]

    def predict(self, denoiser, z, t, time_ids, prompt_embeds):
        # The mask marks no padding of the images; its size in px is not used.
        return denoiser(
            z[:, :, None],
            t / 1000,
            prompt_embeds,
            padding_mask=torch.zeros_like(z[:1, :1]),
            return_dict=False,
        )[0][:, :, 0]


class QwenImage21(QwenImage):
    """Qwen-Image 2.1. The image's tokens follow the longest text of a batch in one sequence: their
    positions are right for texts of equal length alone. The VAE's fourth channel is opacity."""

    def add_references(self, text_embeddings, prompts, references, side_px):
        """Return the pipeline's arguments with the prompts themselves, as its text encoder reads
        the reference images too."""
        return {
            "prompt": list(prompts),
            "negative_prompt": [""] * len(prompts),
            "image": list(references),
            "output_resolution": side_px,
        }

    def encode_latents(self, vae, pixels):
        opaque = torch.ones_like(pixels[:, :1])
        return super().encode_latents(vae, torch.cat([pixels, opaque], dim=1))

    def predict_equal_lengths(self, denoiser, z, t, prompt_embeds):
        height, width = z.shape[-2:]

        # Each position of the sequence is one text token or four image tokens.
        text_mask = torch.zeros(prompt_embeds.shape[:2], dtype=torch.bool, device=z.device)
        image_mask = text_mask.new_ones(len(z), height * width // 4)
        tokens = denoiser(
            z.flatten(2).mT,
            prompt_embeds,
            t / 1000,
            [[(1, height, width)]] * len(z),
            torch.cat([text_mask, image_mask], dim=1),
            return_dict=False,
        )[0]
        return tokens[:, -height * width :].mT.reshape(z.shape)


class Lumina2(Family):
    """Lumina 2. Time runs backwards, so that the prediction is negated. A negative prompt, and an
    empty one, is encoded without the system prompt."""

    names = ("prompt_embeds", "prompt_attention_mask")
    encoding = UNGUIDED_OPTIONS

    def encode_prompt(self, pipe, prompt):
        return super().encode_prompt(pipe, prompt) if prompt else self.encode_negative(pipe, "")

    def encode_negative(self, pipe, prompt):
        # The results are the prompt's two, and then the negative prompt's.
        values = pipe.encode_prompt(
            "", negative_prompt=prompt, device=self.get_encoder_device(pipe), **self.options
        )[2:]
        return {name: value[0] for name, value in zip(self.names, values)}

    def predict(self, denoiser, z, t, time_ids, prompt_embeds, prompt_attention_mask):
        return self.predict_by_length(
            denoiser, z, t, remove_padding(prompt_embeds, prompt_attention_mask)
        )

    def predict_equal_lengths(self, denoiser, z, t, prompt_embeds):
        # It reads the texts' lengths from a mask.
        mask = prompt_embeds.new_ones(prompt_embeds.shape[:2], dtype=torch.bool)
        return -denoiser(z, 1 - t / 1000, prompt_embeds, mask, return_dict=False)[0]


class Sana(Lumina2):
    """Sana, which encodes prompts as Lumina 2 does. Its VAE returns latents, not a distribution."""

    def add_negative(self, text_embeddings, negative_embeddings):
        """Return the pipeline's arguments, without its resolution binning: the pipeline would
        otherwise generate at the nearest usual size and rescale the image."""
        arguments = super().add_negative(text_embeddings, negative_embeddings)
        return arguments | {"negative_prompt": None, "use_resolution_binning": False}

    def encode_latents(self, vae, pixels):
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent.float()
        return z * vae.config.scaling_factor

    def predict_equal_lengths(self, denoiser, z, t, prompt_embeds):
        time = t * denoiser.config.timestep_scale
        return denoiser(z, prompt_embeds, time, return_dict=False)[0]


def drop_unused_negative(
    facts: FamilyFacts, arguments: dict[str, Any], guidance: float
) -> dict[str, Any]:
    """Drop the negative prompt's arguments from a pipeline's call whose guidance scale ignores
    them."""
    if guidance > facts.no_guidance:
        return arguments
    return {name: value for name, value in arguments.items() if not name.startswith("negative_")}


def pad_text_embeddings(text_embeddings: dict[str, Any], length: int = 0) -> dict[str, Any]:
    """Pad a batch of texts to at least `length` tokens, with a mask also if it hides nothing."""
    embeds, mask = text_embeddings["prompt_embeds"], text_embeddings["prompt_embeds_mask"]
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    padding = (0, max(0, length - embeds.shape[1]))
    return {
        # `pad` counts axes from the last: those behind the tokens get no padding.
        "prompt_embeds": torch.nn.functional.pad(embeds, (0, 0) * (embeds.ndim - 2) + padding),
        "prompt_embeds_mask": torch.nn.functional.pad(mask, padding),
    }


def remove_padding(
    prompt_embeds: torch.Tensor, mask: torch.Tensor | None
) -> Sequence[torch.Tensor]:
    """Return the texts of a batch (B, T, …), each without its padding, which comes last.

    mask: (B, T), true for the tokens of a text; None for texts without padding
    """
    if mask is None:
        return list(prompt_embeds)
    return [text[:length] for text, length in zip(prompt_embeds, mask.sum(1).tolist())]


def pack_latents(z: torch.Tensor) -> torch.Tensor:
    """Pack each patch of 2 x 2 into a token: (B, C, h, w) -> (B, h/2·w/2, 4C)."""
    b, c, h, w = z.shape
    patches = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h * w // 4, 4 * c)


def unpack_latents(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Invert `pack_latents`, to the shape of `like`."""
    b, c, h, w = like.shape
    return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def build_position_ids(h: int, w: int, axes: int, device: torch.device) -> torch.Tensor:
    """Return the position ids (h·w, axes): row and column of each token in axes 1 and 2."""
    position_ids = torch.zeros(h, w, axes, device=device)
    position_ids[..., 1] = torch.arange(h, device=device)[:, None]
    position_ids[..., 2] = torch.arange(w, device=device)
    return position_ids.view(h * w, axes)


FAMILY_CLASSES: dict[str, type[Family]] = {
    "sdxl": SDXL,
    "sd1": SD1,
    "sd3": SD3,
    "flux": Flux,
    "flux2": Flux2,
    "flux3": Flux3,
    "z_image": ZImage,
    "qwen_image": QwenImage,
    "qwen_image21": QwenImage21,
    "anima": Anima,
    "krea2": Krea2,
    "lumina2": Lumina2,
    "sana": Sana,
}
ARGUMENT_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "text_encoder_out_layers": lambda layers: tuple(map(int, layers)),
    "clip_skip": lambda layer: layer - 1,  # diffusers counts those that are left out
}
"""Setting -> function from its value to the argument of `encode_prompt`, where they differ."""


def build_encoding_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `encode_prompt` for the settings of `TEXT_OPTIONS`. An empty setting
    means the base's default."""
    return {
        name: ARGUMENT_CONVERTERS.get(name, lambda same: same)(value)
        for name, value in settings.items()
        if value
    }


def build_family(pipe: DiffusionPipeline, **options: Any) -> Family:
    """Build the family of a loaded base. `options` are arguments of `Family`. Raises UserError for
    an unknown pipeline."""
    facts = get_facts(type(pipe).__name__)
    return FAMILY_CLASSES[facts.name](facts, **options)


def cast_embedding(text: TextEmbedding, device: torch.device, dtype: torch.dtype) -> TextEmbedding:
    """Move a text embedding to the device and dtype. Masks keep their dtype."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in text.items()
    }


def get_denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """Return the pipeline's UNet or transformer."""
    return getattr(pipe, get_facts(type(pipe).__name__).denoiser)


def list_block_classes(model: torch.nn.Module) -> tuple[str, ...]:
    """List the class names of the repeated blocks, which hold nearly all weights, by the attributes
    of diffusers or transformers."""
    repeated = getattr(model, "_repeated_blocks", None)
    return tuple(repeated or getattr(model, "_no_split_modules", None) or ())
