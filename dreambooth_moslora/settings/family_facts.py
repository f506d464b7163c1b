"""Facts of each family of models without loading one: its pipeline's parts and usual settings.

A base names its family by the class of its pipeline (`model_index.json`). How a family encodes and
predicts is in `base.families`. No other code asks for a family by name.

Sources: diffusers 0.42, its pipelines' defaults and its `examples/dreambooth` scripts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.setting_names import list_settings

PX_PER_TOKEN = 16 * 16
"""Pixels of an image token of a transformer."""


@dataclass(frozen=True)
class ActivationMemory:
    """GiB of one image of 1024 px in bf16, without weights and gradients.

    Counted on a model of so many `parameters`, with the targets below at rank 16
    (`benchmarks.family_memory`). `sampling_gib` is with PEFT's own layers, and of both passes, with
    and without the prompt, where the family's pipeline makes them as one.
    """

    full_gib: float
    recomputed_gib: float
    sampling_gib: float
    parameters: float
    text_tokens: int = 512


@dataclass(frozen=True)
class PublishedModel:
    """Published model.

    parameters: of its denoiser
    block_parameters, largest_block: those in linear layers of its blocks, and of the largest block
    adapted_layers, adapted_widths: default targets, and the sum of their inputs and outputs
    encoders, vae: parameters of its text encoders and VAE
    """

    hub_id: str
    parameters: int
    block_parameters: int
    largest_block: int
    adapted_layers: int
    adapted_widths: int
    encoders: int
    vae: int = 83_653_863
    streamed: int | None = None
    """Part of `block_parameters` that `--stream_blocks` streams: all, except refiner blocks."""


CLIP_L_PARAMETERS = 123_060_480
CLIP_G_PARAMETERS = 694_659_840
T5_XXL_PARAMETERS = 4_762_310_656
QWEN3_06B_PARAMETERS = 596_049_920
ANIMA_CONDITIONER_PARAMETERS = 134_663_680
QWEN3_4B_PARAMETERS = 4_022_468_096
QWEN3_8B_PARAMETERS = 8_190_735_360
GEMMA2_2B_PARAMETERS = 2_614_341_888
"""Parameters of text encoders that several models share."""
CLIP_LAYERS = {"text_encoder": (48, 73_728), "text_encoder_2": (128, 327_680)}
"""Component -> the layers of CLIP-L and CLIP-G that `--train_text_encoder` adapts, and the sum of
their inputs and outputs."""


@dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """Facts of one family.

    name: of its recipe in `assets/configs`
    title: for sentences, cards and the page
    """

    name: str
    title: str
    pipeline: str  # Class of the pipeline.
    model: str  # Class of the model that denoises.
    editing_pipelines: tuple[str, ...] = ()
    """Pipelines of editing models with the same denoiser. These are trained and drawn without a
    reference image, as the family's other models."""
    editing_models: tuple[str, ...] = ()  # Their hub ids; all are as large as the first model.
    memory: ActivationMemory | None  # None for UNets, which scale with SDXL's.
    recomputed_gib: float = 0.51
    """GiB of a recomputed step of one image of 1024 px, for a UNet as large as SDXL's."""
    denoiser: str = "transformer"
    """The pipeline's attribute of that model; it begins the keys of adapter files."""
    encoders: tuple[str, ...] = ("text_encoder",)
    tokenizer: str = "tokenizer"  # The pipeline's component that reads prompts.
    further_parts: tuple[str, ...] = ("scheduler",)
    """Parts with a configuration, besides these and the VAE."""
    adapted_encoders: tuple[str, ...] = ()
    """Text encoders whose LoRA diffusers loads, and which `--train_text_encoder` adapts."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    style_layers: tuple[str, ...] = ()
    """Names for `--target_modules` of the blocks that hold style, where they are known."""
    style: str = "flow"
    """Prediction of the denoiser: `flow`, n - x of z = (1 - σ)x + σn, or `ddpm`, noise or velocity.
    """
    weighting_scheme: str = "none"  # This and the next: defaults of diffusers' script.
    precondition_outputs: bool = False
    has_level_shift: bool = False
    """Whether its scheduler makes the noise levels of larger images noisier."""
    text_options: tuple[str, ...] = ("max_sequence_length",)
    """Settings that are arguments of the pipeline's `encode_prompt`."""
    guidance: float = 4.0
    guidance_name: str = "guidance_scale"
    """The pipeline's argument for the weight of the prompt against the empty one."""
    no_guidance: float = 1.0  # Its value that uses the prompt alone.
    has_negative: bool = True
    """Whether it samples with a negative prompt; else the guidance is an input of the model."""
    resolution_px: int = 1024
    multiple_px: int = 16  # Sides of images are multiples of this.
    needs_sizes: bool = False  # Whether the photo's size and crop condition the denoiser.
    takes_references: bool = False  # Whether its pipeline also takes images of the subject.
    modelspec: str = ""
    """Name of the architecture in the header of a file in kohya's form."""
    kohya_version: str = ""
    article: str = "a"
    hub_tag: str = ""
    licence: str = ""
    decoder_bytes_per_pixel: int = 4300
    """Upper bound of the VAE decoder's peak in fp32, without weights, for a pixel of the image.

    Half precision needs half. SDXL's counts 3,072; the remainder is workspace of cuDNN."""
    tile_px: int = 256  # Side of the smallest tiles in which its VAE works.
    marker_tensor: str = ""
    """Tensor by which this family's single files are recognised, in the layout of its authors."""
    file_parts: tuple[tuple[str, str], ...] = ()
    """Parts beside the transformer in a single file, and what begins the names of their tensors."""
    counted_blocks: str = ""
    """Pattern of a block's number in a single file, which may have more than the published model.
    """
    models: tuple[PublishedModel, ...] = ()
    """Models whose sizes are known before a download (`benchmarks.family_memory`)."""
    original_names: tuple[tuple[str, str], ...] = ()
    """Parts of layers' names in diffusers and in the original layout, in which the published file
    has them. Empty where ComfyUI reads diffusers' names."""
    not_in_comfyui: str = ""
    """Why ComfyUI, "it", does not read the published file; "" where it does."""
    loading: str = '({base}, torch_dtype=torch.{dtype}).to("cuda")'
    """Rest of the line that loads the base after `from_pretrained` in the snippet of a model card.
    """
    call: str = ""
    """Further arguments of the pipeline's call in the snippet of a model card."""

    @property
    def denoiser_name(self) -> str:
        """Name of the denoiser for sentences about its layers."""
        return "the UNet" if self.denoiser == "unet" else f"{self.title}'s transformer"


JOINT_ATTENTION_LAYERS = tuple(
    f"attn.{name}"
    for name in (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
)
"""Layers of the joint attention of images and texts, as diffusers' scripts for SD 3 and FLUX.1 name
them."""
FEED_FORWARD_LAYERS = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
"""Layers of the feed-forward blocks, which diffusers' script for FLUX.1 adapts too."""
ANIMA_NAMES = (
    ("transformer_blocks.", "blocks."),
    ("norm1.linear_", "adaln_modulation_self_attn."),
    ("norm2.linear_", "adaln_modulation_cross_attn."),
    ("norm3.linear_", "adaln_modulation_mlp."),
    ("norm_out.linear_", "final_layer.adaln_modulation."),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_q", ".q_proj"),
    (".to_k", ".k_proj"),
    (".to_v", ".v_proj"),
    (".to_out.0", ".output_proj"),
    ("ff.net.0.proj", "mlp.layer1"),
    ("ff.net.2", "mlp.layer2"),
    ("patch_embed.proj", "x_embedder.proj.1"),
    ("proj_out", "final_layer.linear"),
    ("time_embed.t_embedder", "t_embedder.1"),
)
MODULAR_LOADING = '({base})\npipe.load_components(dtype=torch.{dtype})\npipe.to("cuda")'
FLUX3_LOADING = (
    '({base})\nblocks = pipe.blocks\nblocks.sub_blocks.pop("prompt_upsampler")  # prompts as given'
    f"\npipe = blocks.init_pipeline{MODULAR_LOADING}"
)
UNET_FACTS = {
    "model": "UNet2DConditionModel",
    "denoiser": "unet",
    "style": "ddpm",
    "multiple_px": 8,
    "text_options": (),
    "memory": None,
}

FAMILIES = (
    FamilyFacts(
        name="sdxl",
        title="SDXL",
        pipeline="StableDiffusionXLPipeline",
        encoders=("text_encoder", "text_encoder_2"),
        adapted_encoders=("text_encoder", "text_encoder_2"),
        guidance=5.0,
        needs_sizes=True,
        style_layers=("blora_style",),
        marker_tensor="label_emb.0.0.weight",
        modelspec="stable-diffusion-xl-v1-base",
        kohya_version="sdxl_base_v1-0",
        article="an",
        hub_tag="stable-diffusion-xl",
        licence="OpenRAIL++",
        models=(
            PublishedModel(
                hub_id="stabilityai/stable-diffusion-xl-base-1.0",
                parameters=2_567_463_684,
                block_parameters=2_183_987_200,
                largest_block=34_734_080,
                adapted_layers=560,
                adapted_widths=1_451_520,
                encoders=CLIP_L_PARAMETERS + CLIP_G_PARAMETERS,
            ),
        ),
        **UNET_FACTS,
    ),
    FamilyFacts(
        name="sd1",
        title="Stable Diffusion 1.5",
        pipeline="StableDiffusionPipeline",
        adapted_encoders=("text_encoder",),
        guidance=7.5,
        resolution_px=512,
        recomputed_gib=1.45,
        modelspec="stable-diffusion-v1",
        kohya_version="sd_v1",
        hub_tag="stable-diffusion",
        marker_tensor="cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        licence="OpenRAIL",
        models=(
            PublishedModel(
                hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
                parameters=859_520_964,
                block_parameters=242_196_480,
                largest_block=31_457_280,
                adapted_layers=128,
                adapted_widths=199_296,
                encoders=CLIP_L_PARAMETERS,
            ),
        ),
        **UNET_FACTS | {"text_options": ("clip_skip",)},
    ),
    FamilyFacts(
        name="sd3",
        title="Stable Diffusion 3.5",
        pipeline="StableDiffusion3Pipeline",
        model="SD3Transformer2DModel",
        encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        adapted_encoders=("text_encoder", "text_encoder_2"),
        targets=JOINT_ATTENTION_LAYERS,
        weighting_scheme="logit_normal",
        precondition_outputs=True,
        marker_tensor="joint_blocks.0.context_block.adaLN_modulation.1.bias",
        guidance=7.0,
        licence="Stability Community",
        memory=ActivationMemory(
            full_gib=7.313,
            recomputed_gib=0.618,
            sampling_gib=0.352,
            parameters=2.243e9,
            text_tokens=333,
        ),
        models=(
            PublishedModel(
                hub_id="stabilityai/stable-diffusion-3.5-medium",
                parameters=2_243_171_520,
                block_parameters=2_222_456_832,
                largest_block=101_449_728,
                adapted_layers=191,
                adapted_widths=586_752,
                encoders=CLIP_L_PARAMETERS + CLIP_G_PARAMETERS + T5_XXL_PARAMETERS,
            ),
            PublishedModel(
                hub_id="stabilityai/stable-diffusion-3.5-large",
                parameters=8_056_627_520,
                block_parameters=8_014_315_520,
                largest_block=212_926_464,
                adapted_layers=303,
                adapted_widths=1_473_792,
                encoders=CLIP_L_PARAMETERS + CLIP_G_PARAMETERS + T5_XXL_PARAMETERS,
            ),
        ),
    ),
    FamilyFacts(
        name="flux",
        title="FLUX.1",
        pipeline="FluxPipeline",
        model="FluxTransformer2DModel",
        editing_pipelines=("FluxKontextPipeline",),
        editing_models=("black-forest-labs/FLUX.1-Kontext-dev",),
        encoders=("text_encoder", "text_encoder_2"),
        adapted_encoders=("text_encoder",),
        targets=(*JOINT_ATTENTION_LAYERS, *FEED_FORWARD_LAYERS),
        guidance=3.5,
        has_negative=False,
        marker_tensor="vector_in.in_layer.weight",
        has_level_shift=True,
        licence="FLUX.1 dev Non-Commercial",
        memory=ActivationMemory(
            full_gib=26.373,
            recomputed_gib=2.163,
            sampling_gib=0.651,
            parameters=11.901e9,
        ),
        models=(
            PublishedModel(
                hub_id="black-forest-labs/FLUX.1-dev",
                parameters=11_901_408_320,
                block_parameters=11_834_228_736,
                largest_block=339_738_624,
                adapted_layers=342,
                adapted_widths=2_801_664,
                encoders=CLIP_L_PARAMETERS + T5_XXL_PARAMETERS,
            ),
        ),
    ),
    FamilyFacts(
        name="flux2",
        title="FLUX.2 klein",
        pipeline="Flux2KleinPipeline",
        model="Flux2Transformer2DModel",
        targets=(
            "to_k",
            "to_q",
            "to_v",
            "to_out.0",
            "to_qkv_mlp_proj",
            "single_transformer_blocks.*.attn.to_out",
        ),
        has_level_shift=True,
        takes_references=True,
        text_options=("max_sequence_length", "text_encoder_out_layers"),
        marker_tensor="single_stream_modulation.lin.weight",
        licence="Apache-2.0 (4B), FLUX Non-Commercial (9B)",
        memory=ActivationMemory(
            full_gib=16.204,
            recomputed_gib=1.690,
            sampling_gib=1.311,
            parameters=3.876e9,
        ),
        models=(
            PublishedModel(
                hub_id="black-forest-labs/FLUX.2-klein-base-4B",
                parameters=3_875_544_576,
                block_parameters=3_680_501_760,
                largest_block=245_366_784,
                adapted_layers=60,
                adapted_widths=1_044_480,
                encoders=QWEN3_4B_PARAMETERS,
            ),
            PublishedModel(
                hub_id="black-forest-labs/FLUX.2-klein-base-9B",
                parameters=9_078_581_248,
                block_parameters=8_724_152_320,
                largest_block=436_207_616,
                adapted_layers=80,
                adapted_widths=1_736_704,
                encoders=QWEN3_8B_PARAMETERS,
            ),
        ),
    ),
    FamilyFacts(
        name="flux3",
        title="FLUX 3 klein",
        pipeline="Flux3ModularPipeline",
        model="Flux3Transformer2DModel",
        targets=tuple(
            f"{blocks}.*.attn.{layer}"
            for blocks in ("mode_blocks.image", "txt_mode_blocks", "single_transformer_blocks")
            for layer in ("to_q", "to_k", "to_v", "to_out.0")
        ),
        further_parts=(),  # diffusers makes the scheduler by its block's configuration
        loading=FLUX3_LOADING,
        text_options=("max_sequence_length", "text_encoder_out_layers"),
        guidance=3.5,
        marker_tensor="early_stream_modulations.image.lin.weight",
        licence="FLUX 3 (not for commercial use above a limit of revenue)",
        not_in_comfyui="its map of FLUX 3 is not known here",
        memory=ActivationMemory(
            full_gib=15.948,
            recomputed_gib=1.630,
            sampling_gib=0.589,
            parameters=5.538e9,
            text_tokens=80,
        ),
        models=(
            PublishedModel(
                hub_id="black-forest-labs/flux-3-image-klein-base",
                parameters=5_538_458_368,
                block_parameters=5_275_385_856,
                largest_block=122_683_392,
                adapted_layers=152,
                adapted_widths=933_888,
                encoders=4_437_815_808,
            ),
        ),
    ),
    FamilyFacts(
        name="z_image",
        title="Z-Image",
        pipeline="ZImagePipeline",
        model="ZImageTransformer2DModel",
        marker_tensor="layers.0.adaLN_modulation.0.weight",
        guidance=5.0,
        no_guidance=0.0,
        licence="Apache-2.0",
        memory=ActivationMemory(
            full_gib=29.732,
            recomputed_gib=2.088,
            sampling_gib=0.941,
            parameters=6.155e9,
            text_tokens=64,
        ),
        models=(
            PublishedModel(
                hub_id="Tongyi-MAI/Z-Image",
                parameters=6_154_908_736,
                block_parameters=6_142_033_920,
                largest_block=180_879_360,
                streamed=5_426_380_800,
                adapted_layers=136,
                adapted_widths=1_044_480,
                encoders=QWEN3_4B_PARAMETERS,
            ),
        ),
    ),
    FamilyFacts(
        name="qwen_image",
        title="Qwen-Image",
        pipeline="QwenImagePipeline",
        model="QwenImageTransformer2DModel",
        editing_pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        editing_models=(
            "Qwen/Qwen-Image-Edit",
            "Qwen/Qwen-Image-Edit-2509",
            "Qwen/Qwen-Image-Edit-2511",
        ),
        guidance_name="true_cfg_scale",
        call=', negative_prompt=" "',
        marker_tensor="txt_norm.weight",
        has_level_shift=True,
        decoder_bytes_per_pixel=6_930,
        licence="Apache-2.0",
        memory=ActivationMemory(
            full_gib=25.915,
            recomputed_gib=2.028,
            sampling_gib=0.405,
            parameters=20.430e9,
            text_tokens=64,
        ),
        models=tuple(
            PublishedModel(
                hub_id=name,
                parameters=20_430_401_088,
                block_parameters=20_384_317_440,
                largest_block=339_738_624,
                adapted_layers=240,
                adapted_widths=1_474_560,
                encoders=8_292_166_656,
                vae=126_892_531,
            )
            for name in ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512")
        ),
    ),
    FamilyFacts(
        name="qwen_image21",
        title="Qwen-Image-2.1",
        pipeline="QwenImage21Pipeline",
        model="QwenImage21Transformer2DModel",
        tokenizer="processor",
        text_options=(),
        guidance=1.0,
        guidance_name="true_cfg_scale",
        multiple_px=32,
        has_level_shift=True,
        marker_tensor="txt_in.text_norm.weight",
        takes_references=True,
        decoder_bytes_per_pixel=12_870,
        licence="Qwen Research",
        memory=ActivationMemory(
            full_gib=27.68,
            recomputed_gib=2.10,
            sampling_gib=0.574,
            parameters=7.115e9,
            text_tokens=64,
        ),
        models=(
            PublishedModel(
                hub_id="Qwen/Qwen-Image-2.1",
                parameters=7_115_124_736,
                block_parameters=6_979_321_856,
                largest_block=218_103_808,
                adapted_layers=128,
                adapted_widths=1_048_576,
                encoders=8_767_123_696,
                vae=337_740_404,
            ),
        ),
    ),
    FamilyFacts(
        name="anima",
        title="Anima",
        pipeline="AnimaModularPipeline",
        model="CosmosTransformer3DModel",
        encoders=("text_encoder", "text_conditioner"),
        further_parts=("t5_tokenizer", "scheduler"),
        targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        weighting_scheme="logit_normal",
        marker_tensor="llm_adapter.embed.weight",
        file_parts=(("text_conditioner", "llm_adapter."),),
        counted_blocks=r"(?:net\.)?blocks\.(\d+)\.",
        original_names=ANIMA_NAMES,
        loading=MODULAR_LOADING,
        decoder_bytes_per_pixel=6_930,
        article="an",
        licence="CircleStone Labs Non-Commercial",
        memory=ActivationMemory(
            full_gib=13.068,
            recomputed_gib=0.943,
            sampling_gib=0.411,
            parameters=1.956e9,
        ),
        models=(
            PublishedModel(
                hub_id="circlestone-labs/Anima-Base-v1.0-Diffusers",
                parameters=1_956_405_248,
                block_parameters=1_937_768_448,
                largest_block=69_206_016,
                adapted_layers=280,
                adapted_widths=1_433_600,
                encoders=QWEN3_06B_PARAMETERS + ANIMA_CONDITIONER_PARAMETERS,
                vae=126_892_531,
            ),
        ),
    ),
    FamilyFacts(
        name="krea2",
        title="Krea 2",
        pipeline="Krea2Pipeline",
        model="Krea2Transformer2DModel",
        marker_tensor="txtfusion.projector.weight",
        has_level_shift=True,
        guidance=4.5,
        no_guidance=0.0,
        decoder_bytes_per_pixel=6_930,
        licence="Krea 2 Community",
        memory=ActivationMemory(
            full_gib=29.449,
            recomputed_gib=2.956,
            sampling_gib=0.676,
            parameters=12.820e9,
            text_tokens=64,
        ),
        models=(
            PublishedModel(
                hub_id="krea/Krea-2-Raw",
                parameters=12_820_073_036,
                block_parameters=12_155_092_992,
                largest_block=434_110_464,
                adapted_layers=128,
                adapted_widths=1_200_128,
                encoders=4_437_815_808,
                vae=126_892_531,
            ),
        ),
    ),
    FamilyFacts(
        name="lumina2",
        title="Lumina 2",
        pipeline="Lumina2Pipeline",
        model="Lumina2Transformer2DModel",
        marker_tensor="layers.0.adaLN_modulation.1.weight",
        licence="Apache-2.0",
        not_in_comfyui="it has q, k and v of Lumina 2 in one matrix, and maps none of these names",
        memory=ActivationMemory(
            full_gib=18.880,
            recomputed_gib=2.626,
            sampling_gib=0.472,
            parameters=2.610e9,
            text_tokens=64,
        ),
        models=(
            PublishedModel(
                hub_id="Alpha-VLLM/Lumina-Image-2.0",
                parameters=2_609_769_152,
                block_parameters=2_599_944_192,
                largest_block=87_293_952,
                streamed=2_269_642_752,
                adapted_layers=120,
                adapted_widths=460_800,
                encoders=GEMMA2_2B_PARAMETERS,
            ),
        ),
    ),
    FamilyFacts(
        name="sana",
        title="Sana",
        pipeline="SanaPipeline",
        model="SanaTransformer2DModel",
        targets=("to_q", "to_k", "to_v"),
        call=", complex_human_instruction=None",
        marker_tensor="blocks.0.cross_attn.q_linear.weight",
        guidance=4.5,
        multiple_px=32,
        licence="NSCL",
        not_in_comfyui="it has no Sana",
        decoder_bytes_per_pixel=3_340,  # 2,312 in fp32, in which attention always computes
        tile_px=512,
        memory=ActivationMemory(
            full_gib=3.245,
            recomputed_gib=0.254,
            sampling_gib=0.125,
            parameters=1.604e9,
            text_tokens=0,
        ),
        models=tuple(
            PublishedModel(
                hub_id=f"Efficient-Large-Model/Sana_1600M_1024px_{kind}diffusers",
                parameters=1_604_462_752,
                block_parameters=802_816_000,
                largest_block=40_140_800,
                adapted_layers=120,
                adapted_widths=537_600,
                encoders=GEMMA2_2B_PARAMETERS,
                vae=312_250_275,
            )
            for kind in ("", "BF16_")
        ),
    ),
)
SDXL = FAMILIES[0]
"""Family of a base that does not name one, and of the default base."""
SDXL_HUB_ID = SDXL.models[0].hub_id
UNET_SETTINGS = list_settings("family", "unet")
"""Settings that only UNets obey."""
FLOW_SETTINGS = list_settings("family", "flow")
"""Settings that only transformers obey."""
TEXT_OPTIONS = tuple(dict.fromkeys(name for facts in FAMILIES for name in facts.text_options))
"""Settings that are arguments of some pipeline's `encode_prompt`."""
MODELS_BY_HUB_ID = {
    model.hub_id.lower(): (facts, model)
    for facts in FAMILIES
    for model in (
        *facts.models,
        *(replace(facts.models[0], hub_id=hub_id) for hub_id in facts.editing_models),
    )
}
"""Hub id in lower case -> family and model."""
FACTS_BY_PIPELINE = {
    pipeline: facts for facts in FAMILIES for pipeline in (facts.pipeline, *facts.editing_pipelines)
}
DENOISERS = tuple(dict.fromkeys(facts.denoiser for facts in FAMILIES))
"""Components of adapter files that are no text encoder: `unet` and `transformer`."""


def get_text_options(settings: object) -> dict[str, Any]:
    """Return the values of `TEXT_OPTIONS` that are set in a run's settings or a command's
    arguments."""
    values = {name: getattr(settings, name) for name in TEXT_OPTIONS}
    return {name: value for name, value in values.items() if value not in (None, ())}


def get_facts(pipeline: str) -> FamilyFacts:
    """Return the family of a pipeline's class. Raises UserError for an unknown class."""
    if pipeline not in FACTS_BY_PIPELINE:
        titles = ", ".join(facts.title for facts in FAMILIES)
        raise UserError(
            f"a base of the class {pipeline} cannot be trained here: take one of {titles}."
        )
    return FACTS_BY_PIPELINE[pipeline]


def get_denoiser_facts(model: str, config: Mapping[str, Any]) -> FamilyFacts:
    """Return the family of a denoiser's class and configuration. Raises UserError."""
    candidates = [facts for facts in FAMILIES if facts.model == model]
    if not candidates:
        raise UserError(f"{model} is not a model of a family that can be trained here.")
    # SDXL and Stable Diffusion 1.5 have UNets of one class; SDXL's is conditioned on sizes.
    is_first = len(candidates) == 1 or config.get("addition_embed_type") == "text_time"
    return candidates[0] if is_first else candidates[1]
