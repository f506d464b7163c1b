"""Settings of each memory plan of `--memory`."""

MEMORY_PLANS: dict[str, dict[str, object]] = {
    "full": {},
    "recompute_ff": {"recompute_feed_forward": True},
    "recompute": {"gradient_checkpointing": True},
    "stream": {"gradient_checkpointing": True, "stream_blocks": True},
    "int8": {"gradient_checkpointing": True, "base_quantization": "int8"},
    "int8_stream": {
        "gradient_checkpointing": True,
        "base_quantization": "int8",
        "stream_blocks": True,
    },
    "nf4": {"gradient_checkpointing": True, "base_quantization": "nf4"},
    "nf4_stream": {
        "gradient_checkpointing": True,
        "base_quantization": "nf4",
        "stream_blocks": True,
    },
}
"""Plans of `--memory`, from exact to coarse weights, and those of equal weights from the fastest to
the leanest; the last is the fallback when none fits."""
MEMORY_PLAN_SETTINGS = (
    *dict.fromkeys(name for plan in MEMORY_PLANS.values() for name in plan),
    "streamed_share",
    "images_at_once",
)
"""Settings that a plan of `--memory` decides, besides the precision."""
