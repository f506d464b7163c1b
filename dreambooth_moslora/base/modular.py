"""Modular pipelines of diffusers as ordinary pipelines.

    modular_model_index.json  --from_pretrained-->  DiffusionPipeline with the same parts
    prompt  --encode_prompt-->  text embeddings  --__call__-->  images

diffusers' `ModularPipeline` has neither a callback for each step nor an argument for the guidance
scale, does not offload its models, and only warns if a part cannot be loaded. A class here has the
parts of one modular pipeline, and its name. `DiffusionPipeline` loads, saves, checks and offloads
them. Texts are encoded by the blocks of diffusers; `ModularBase.__call__` generates images by the
family's `predict` and `decode_latents`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import AnimaLoraLoaderMixin, Flux3LoraLoaderMixin
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import (
    Qwen2Tokenizer,
    Qwen3Model,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    T5TokenizerFast,
)

from dreambooth_moslora.base import families, model_files
from dreambooth_moslora.settings.family_facts import get_facts

FLUX3_SHIFT = 6.93
"""Shift of the noise levels of FLUX 3, which diffusers has in a block and not in the base's files.
"""


class ModularBase(DiffusionPipeline):
    """Ordinary pipeline with the parts of a modular one."""

    config_name = model_files.MODULAR_INDEX_NAME

    @classmethod
    def load_config(cls, path: Any, **options: Any) -> Any:
        """Read the index. diffusers' downloader asks for the ordinary one, which is not there, for
        the sake of pipelines that consist of others."""
        if str(path).endswith(model_files.INDEX_NAME):
            return {}
        return super().load_config(path, **options)

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        """Read an index as that of an ordinary pipeline: of each part its library and its class.
        Further parts, such as the one that applies the guidance, are left out."""
        index = super()._dict_from_json_file(json_file)
        parts, _ = cls._get_signature_keys(cls)
        return {"_class_name": cls.__name__} | {
            name: entry[:2] for name, entry in index.items() if name in parts
        }

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int,
        width: int,
        guidance_scale: float,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        output_type: str = "pil",
        **text_embeddings: Any,
    ) -> ImagePipelineOutput:
        """Generate images with the arguments of other pipelines.

        prompt, negative_prompt: B texts; None where their embeddings are given
        height, width: of the images, in px
        guidance_scale: weight of the prompt against the negative one
        generator: of the noise, one for each image or one for all
        latents: the noise (B, C, h, w), in place of the generator's
        callback_on_step_end: as other pipelines take it
        output_type: `latent`, `pt` or `pil`
        text_embeddings: as `encode_prompt` returns them, and those of the negative prompts, whose
            names begin with `negative_`; for prompts, options of `encode_prompt`
        """
        # Encode the prompts, unless that was done.
        names = get_facts(type(self).__name__).text_options
        options = {name: text_embeddings.pop(name) for name in names if name in text_embeddings}
        family = families.build_family(self, options=options)
        if prompt is not None:
            text_embeddings = self._encode_batch(family, prompt, negative_prompt)
        positive, negative = {}, {}
        for name, value in text_embeddings.items():
            part = negative if name.startswith("negative_") else positive
            part[name.removeprefix("negative_")] = value

        # Draw the noise in fp32.
        device, denoiser = self._execution_device, families.get_denoiser(self)
        if latents is None:
            count = len(next(iter(positive.values())))
            sides = height // self.px_per_latent, width // self.px_per_latent
            shape = (count, denoiser.config.in_channels, *sides)
            latents = randn_tensor(shape, generator, device, torch.float32)
        latents = latents.to(device)

        # Remove it step by step.
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            z, times = latents.to(denoiser.dtype), t.expand(len(latents))
            prediction = family.predict(denoiser, z, times, None, **positive)
            if negative and guidance_scale > family.facts.no_guidance:
                unguided = family.predict(denoiser, z, times, None, **negative)
                prediction = unguided + guidance_scale * (prediction - unguided)
            latents = self.scheduler.step(prediction, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step, t, {"latents": latents})
                latents = changed.get("latents", latents)

        # Decode the images. Models that take turns on the GPU leave it.
        images = latents
        if output_type != "latent":
            pixels = family.decode_latents(self.vae, latents)
            images = VaeImageProcessor().postprocess(pixels.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def _encode_batch(
        self,
        family: "families.Family",
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None,
    ) -> dict[str, Any]:
        """Return the arguments for B prompts and their negative prompts, by default empty ones."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = negative_prompt or ""
        if isinstance(negatives, str):
            negatives = [negatives] * len(prompts)
        return family.add_negative(
            family.collate(family.encode_prompts(self, prompts)),
            family.collate([family.encode_negative(self, text) for text in negatives]),
        )


class AnimaModularPipeline(ModularBase, AnimaLoraLoaderMixin):
    """Anima. Its text conditioner turns the encoder's states and the tokens of T5 into the text
    embedding, and stays frozen."""

    model_cpu_offload_seq = "text_encoder->text_conditioner->transformer->vae"

    def __init__(
        self,
        text_encoder: Qwen3Model,
        tokenizer: Qwen2Tokenizer,
        t5_tokenizer: T5TokenizerFast,
        text_conditioner: diffusers.AnimaTextConditioner,
        transformer: diffusers.CosmosTransformer3DModel,
        vae: diffusers.AutoencoderKLQwenImage,
        scheduler: diffusers.FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            t5_tokenizer=t5_tokenizer,
            text_conditioner=text_conditioner,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )

    @property
    def px_per_latent(self) -> int:
        """Pixels of a latent along a side: 8 for the published models."""
        return 2 ** len(self.vae.temperal_downsample)

    def encode_prompt(
        self, prompt: str, device: torch.device | None = None, max_sequence_length: int = 512
    ) -> tuple[torch.Tensor]:
        """Return the text embedding (1, T, D) of one prompt, padded with zeros to T >= 512."""
        texts = AnimaTextEncoderStep.encode_prompt(
            self,
            prompt,
            prepare_unconditional_embeds=False,
            max_sequence_length=max_sequence_length,
            device=device,
            dtype=self.text_conditioner.dtype,
        )
        embeds = self.text_conditioner(
            source_hidden_states=texts["qwen_prompt_embeds"],
            target_input_ids=texts["t5_input_ids"],
            target_attention_mask=texts["t5_attention_mask"],
            source_attention_mask=texts["qwen_attention_mask"],
        )
        return (embeds,)


class Flux3ModularPipeline(ModularBase, Flux3LoraLoaderMixin):
    """FLUX 3, without the model that rewrites prompts."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["scheduler"]

    def __init__(
        self,
        text_encoder: Qwen3VLForConditionalGeneration,
        tokenizer: Qwen3VLProcessor,
        transformer: diffusers.Flux3Transformer2DModel,
        vae: diffusers.AutoencoderKLFlux2,
        scheduler: diffusers.FlowMatchEulerDiscreteScheduler | None = None,
    ):
        super().__init__()
        if scheduler is None:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=FLUX3_SHIFT)
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )

    @property
    def px_per_latent(self) -> int:
        """Pixels of a patch of 2 x 2 latents along a side: 16 for the published models."""
        return 2 ** len(self.vae.config.block_out_channels)

    def encode_prompt(
        self,
        prompt: str,
        device: torch.device | None = None,
        max_sequence_length: int = 8192,
        text_encoder_out_layers: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32),
    ) -> tuple[torch.Tensor]:
        """Return the text embedding (1, T, D) of one prompt: T is a multiple of 80, and D has the
        states of these layers side by side."""
        embeds = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(
            self.text_encoder,
            self.tokenizer,
            prompt,
            device=device,
            max_sequence_length=max_sequence_length,
            hidden_states_layers=text_encoder_out_layers,
        )
        return (embeds,)
