"""Settings around the training: memory and speed, samples and scores, the run folder, and the hub."""

from dataclasses import dataclass

from dreambooth_moslora.core.config.fields import grouped
from dreambooth_moslora.core.config.training_settings import TrainingSettings

__all__ = ["MEMORY_WORDS", "RunSettings"]

TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio", "aim", "mlflow", "clearml", "dvclive", "swanlab")
PRECISIONS = ("no", "fp16", "bf16")
MEMORY_WORDS = ("auto", "full", "full_cached", "recompute", "recompute_cached", "nf4")

of_memory = grouped("memory and speed")
of_samples = grouped("samples and evaluation")
of_run = grouped("run folder")
of_hub = grouped("hub")


@dataclass(frozen=True)
class RunSettings(TrainingSettings):
    """The last part of `core.config.TrainConfig`; with those it inherits, it has all settings."""

    memory: str | None = of_memory(
        None,
        "one word for the next flags: one of the plans, from the fastest to the leanest, or auto, the first that fits "
        "the GPU",
        choices=MEMORY_WORDS,
    )
    mixed_precision: str | None = of_memory(
        None, "precision of the frozen base (default: what `accelerate config` says)", choices=PRECISIONS
    )
    base_quantization: str = of_memory("none", "keep the frozen UNet in 4 or 8 bit", choices=("none", "nf4", "int8"))
    gradient_checkpointing: bool = of_memory(False, "less memory, slower steps: recompute activations")
    cache_cross_attention: bool = of_memory(
        False, "keep cross-attention's to_k and to_v off the GPU: their output for each prompt is computed once"
    )
    caching: str = of_memory(
        "memory", "keep encoded photos in memory, on disk for later runs, or encode each step",
        choices=("memory", "disk", "off"),
    )  # fmt: skip
    dataloader_num_workers: int = of_memory(0, "processes that read photos when nothing is cached", low=0, high=1024)
    allow_tf32: bool = of_memory(False, "faster, less exact fp32 products on Nvidia GPUs")
    compile: str = of_memory(
        "auto", "compile the UNet's transformer blocks (torch.compile): auto on a GPU where the run is long enough",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    enable_xformers_memory_efficient_attention: bool = of_memory(False, "accepted: PyTorch's own attention is used")
    local_rank: int = of_memory(-1, "set by the launcher of several processes")

    validation_prompt: str | None = of_samples(None, "prompt of the sample images (default: the instance prompt)")
    num_validation_images: int | None = of_samples(
        None, "sample images each time (default: 4; none on a CPU with a base as large as SDXL)", low=0, high=1000
    )
    validation_epochs: int = of_samples(50, "epochs between samples", low=1)
    validation_steps: int | None = of_samples(None, "steps between samples; overrides --validation_epochs", low=1)
    evaluate_steps: int | None = of_samples(None, "steps between scores of fidelity; 0: never (default: never)", low=0)
    find_scale: bool = of_samples(
        False, "at the end, score the adapter at several scales; the best goes into its header and card"
    )
    early_stopping: int | None = of_samples(
        None, "stop when the score has not risen for this many evaluations (default: only warn)", low=1
    )

    output_dir: str = of_run("lora-dreambooth-model", "the run folder")
    output_kohya_format: bool = of_run(False, "accepted: the file for ComfyUI and A1111 is always written")
    checkpointing_steps: int = of_run(500, "steps between checkpoints", low=1)
    checkpoints_total_limit: int | None = of_run(None, "numbered checkpoints to keep", low=1)
    resume_from_checkpoint: str | None = of_run(None, 'a checkpoint folder, or "latest"')
    logging_dir: str = of_run("logs", "folder of the trackers' logs inside the run folder")
    report_to: str = of_run("tensorboard", "tracker for numbers and samples", choices=(*TRACKERS, "all", "none"))
    dry_run: bool = of_run(False, "print the plan and its cost, and exit")

    push_to_hub: bool = of_hub(False, "upload the adapter and its card when done; never the photos")
    hub_token: str | None = of_hub(None, "token for the upload (default: that of `hf auth login`)", secret=True)
    hub_model_id: str | None = of_hub(None, "repository to upload to (default: the run folder's name)")
