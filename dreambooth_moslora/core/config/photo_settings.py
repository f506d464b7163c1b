"""Settings of the training material: the base model, the photos of the subject, and prior preservation of its class."""

from dataclasses import dataclass

from dreambooth_moslora.core.config.fields import Prompt, grouped
from dreambooth_moslora.core.config.subject_tables import SubjectTable

__all__ = ["PhotoSettings"]

INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact")

of_base = grouped("base model")
of_photos = grouped("photos")
of_prior = grouped("prior preservation")


@dataclass(frozen=True)
class PhotoSettings:
    """The first part of `core.config.TrainConfig`, which converts and checks the values."""

    pretrained_model_name_or_path: str = of_base(
        "toy", 'base model: a diffusers folder, a hub id, a .safetensors checkpoint, or "toy" (embedded)', required=True
    )
    pretrained_vae_model_name_or_path: str | None = of_base(None, "another VAE than the base's own: folder or hub id")
    revision: str | None = of_base(None, "branch, tag or commit of the base on the hub")
    variant: str | None = of_base(None, 'which files of the base to load, for example "fp16"')
    cache_dir: str | None = of_base(None, "where downloads, and encodings with --caching disk, are kept")

    instance_data_dir: str | None = of_photos(None, "folder with the photos of the subject")
    dataset_name: str | None = of_photos(None, "instead of a folder: a data set, on the hub or local")
    dataset_config_name: str | None = of_photos(None, "configuration of --dataset_name")
    image_column: str = of_photos("image", "column of --dataset_name that holds the images")
    caption_column: str | None = of_photos(None, "column of --dataset_name that holds the captions")
    leave_out: tuple[Prompt, ...] = of_photos((), "file names of photos to leave out")
    instance_prompt: str = of_photos(
        "a photo of sks object", 'the subject in words, with its rare token: "a photo of sks dog"', required=True
    )
    subjects: tuple[SubjectTable, ...] = of_photos(
        (), "several subjects in one run: a folder with a folder of each (`sks dog`), a .json list, or in TOML tables"
    )
    token: str | None = of_photos(None, "the rare word in the instance prompt (default: found in it)")
    class_word: str | None = of_photos(None, "the kind of thing it is (default: found in the prompts)")
    caption_prefix: str | None = of_photos(None, "words before each photo's own captions; the instance prompt stays")
    caption_suffix: str | None = of_photos(None, "words after each photo's own captions")
    captions: str = of_photos(
        "given",
        "given: those beside the photos; auto: photos without one get one made before training, in the run folder "
        "(no gain was shown on three sample subjects)",
        choices=("given", "auto"),
    )
    caption_model: str | None = of_photos(
        None,
        "vision-language model that makes captions: hub id or folder (default: Qwen/Qwen3-VL-2B-Instruct; the toy's "
        "own CLIP)",
    )
    shuffle_caption: bool = of_photos(False, "show the tags of a caption, between commas, in changing orders")
    keep_tokens: int = of_photos(0, "tags at a caption's start that --shuffle_caption leaves in place", low=0)
    caption_dropout: float = of_photos(
        0.0, "share of exposures with an empty caption, of photos and not of class images", low=0, high=1
    )
    instance_prompt_share: float | None = of_photos(
        None,
        "share of exposures with the instance prompt, of photos whose captions lack it (default: 1/3; 0 with "
        "--caption_column, whose captions are used as they are)",
        low=0,
        high=1,
    )
    repeats: int = of_photos(1, "how often an epoch shows each photo", low=1, high=10**6)
    resolution: int = of_photos(1024, "side of the square crops, px, a multiple of 8", low=8)
    enable_bucket: bool = of_photos(
        False, "crop each photo to a rectangle of its own shape and of the square's area, instead of to the square"
    )
    bucket_reso_steps: int | None = of_photos(
        None, "sides of such rectangles are multiples of this, px (default: 64; 8 up to a resolution of 256)", low=8
    )
    center_crop: bool = of_photos(False, "crop the middle of each photo instead of a random place")
    random_flip: bool = of_photos(False, "mirror photos at random")
    crops_per_photo: int = of_photos(1, "different crops taken of each photo", low=1, high=1000)
    crop_zoom: float = of_photos(
        1.0, "enlarge each crop by a random factor up to this; 1: crops are as wide as the photo", low=1, high=4
    )
    image_interpolation_mode: str = of_photos("lanczos", "filter of the resizing", choices=INTERPOLATIONS)
    alpha: str = of_photos(
        "mask", "transparent photos go on white; mask: the opaque part is the subject", choices=("mask", "white")
    )
    unmasked_weight: float = of_photos(
        0.2,
        "loss weight of the parts that a mask (name.mask.png) leaves out; it is always 0 for transparent parts",
        low=0,
        high=1,
    )
    masks: str = of_photos(
        "given",
        "given: those beside the photos; auto: photos without one get a mask made before training, in the run folder",
        choices=("given", "auto"),
    )
    mask_model: str | None = of_photos(
        None, "CLIPSeg that makes masks: hub id or folder (default: CIDAS/clipseg-rd64-refined; the toy's own net)"
    )
    mask_prompt: str | None = of_photos(None, "what CLIPSeg looks for in the photos (default: the class word)")

    with_prior_preservation: bool = of_prior(False, "preserve what the base knows of the class")
    prior: str = of_prior(
        "class_images",
        "class_images: train on pictures of the class; adapter_off: on the frozen base's own answer, no pictures",
        choices=("class_images", "adapter_off"),
    )
    class_prompt: str | None = of_prior(None, 'the class in words: "a photo of a dog"')
    prior_prompts: tuple[Prompt, ...] = of_prior(
        (), "other prompts that adapter_off preserves too: every second image draws one of them"
    )
    class_data_dir: str | None = of_prior(None, "folder with class images (default: in the run folder)")
    num_class_images: int = of_prior(100, "class images wanted; missing ones are generated", low=1)
    prior_loss_weight: float = of_prior(1.0, "weight of the prior loss", low=0)
    sample_batch_size: int = of_prior(4, "images generated at once", low=1, high=4096)
    prior_generation_precision: str | None = of_prior(
        None, "precision of that generation", choices=("no", "fp32", "fp16", "bf16")
    )
