"""The left half of the Train tab: photos, a word and a button; other fields, named as in `TrainForm`, are folded."""

from typing import Any

import gradio as gr

from dreambooth_moslora.core.config.run_settings import MEMORY_WORDS
from dreambooth_moslora.core.config.training_settings import MIXERS
from dreambooth_moslora.core.run_files.adapter_files import NONE
from dreambooth_moslora.core.toy import is_toy
from dreambooth_moslora.training.planning.choices import TOKEN, encoders_are_here
from dreambooth_moslora.ui.app_state import AT_ONCE
from dreambooth_moslora.ui.train.form import OWN_FIELDS, PRESETS, TOKENS_RATE, TrainForm
from dreambooth_moslora.ui.train.masks import mask_widgets
from dreambooth_moslora.ui.train.subject_widgets import photo_widgets, subject_widgets

__all__ = ["train_widgets"]

FINDS_SUBJECT = "finds the subject in photos that have none"
SAYS_PLACE = "says the surroundings of photos that have no line"
FROM_HUB = "; {} from the hub once"
PRIOR_LABELS = [("the base", "adapter_off"), ("class images", "class_images")]
NARROW = {"min_width": 110}


def train_widgets(base: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields under the names of TrainForm, and the other widgets."""
    gr.Markdown("### 1 · Photos", elem_classes="step")
    others = photo_widgets()
    gr.Markdown("### 2 · One word", elem_classes="step")
    class_word = gr.Textbox(label="What the photos show", placeholder="dog", elem_id="class_word")
    prompts = gr.HTML(visible=False, elem_id="prompts")
    further, boxes = subject_widgets()
    with gr.Row(elem_classes="tight"):
        start = gr.Button("Start training", variant="primary", elem_id="start")
    with gr.Row(elem_classes="tight"):
        queue = gr.Button("Add to queue", min_width=132, elem_id="add_to_queue")
        estimate = gr.Button("Estimate cost", min_width=132, elem_id="estimate")
    cost = gr.HTML("", label="Cost", elem_id="cost")
    with gr.Accordion("More settings", open=False, elem_id="more_training"):
        others |= (like := like_widgets())
        more = {"like": like["like"]} | word_fields(base) | class_fields() | mask_fields(base)
        masks = mask_widgets()
        more |= adapter_fields(base)
    fields = {"class_word": class_word, **more}
    others |= {"prompts": prompts, "start": start, "queue": queue, "estimate": estimate, "cost": cost}
    return {name: fields[name] for name in OWN_FIELDS} | further, others | boxes | masks


def like_widgets() -> dict[str, Any]:
    """A file whose settings fill the form, and the line about it."""
    with gr.Row(elem_classes="tight"):
        like = gr.Dropdown(
            [NONE],
            value=NONE,
            label="Train like",
            info="an adapter whose settings fill this form",
            allow_custom_value=True,
            elem_id="train_like",
            scale=4,
        )
        upload = gr.UploadButton(
            "Upload", file_types=[".safetensors"], scale=0, min_width=88, elem_id="upload_like", size="md"
        )
    said = gr.HTML("", visible=False, elem_id="like_said")
    return {"like": like, "upload_like": upload, "like_said": said}


def word_fields(base: str) -> dict[str, Any]:
    with gr.Row():
        token = gr.Textbox(TOKEN, label="Token", info="a rare word", elem_id="token", **NARROW)
        run_name = gr.Textbox("", label="Name of the run", info="may be empty", elem_id="run_name", **NARROW)
    captions = gr.Textbox(
        "", label="Captions", info="one line for each photo, in order; may be left out", lines=2, elem_id="captions"
    )
    fetched = "" if is_toy(base) else FROM_HUB.format("Qwen3-VL comes")
    make_captions = gr.Checkbox(False, label="Write captions", info=SAYS_PLACE + fetched, elem_id="make_captions")
    preset = gr.Radio(
        list(PRESETS), value="standard", label="Length", info="half, once, twice the recipe's", elem_id="preset"
    )
    with gr.Row():
        steps = gr.Number(0, label="Steps", info="0: by length", precision=0, elem_id="train_steps", **NARROW)
        seed = gr.Number(0, label="Seed", info="also of the crops", precision=0, elem_id="train_seed", **NARROW)
    return {
        "token": token,
        "run_name": run_name,
        "captions": captions,
        "make_captions": make_captions,
        "preset": preset,
        "steps": steps,
        "seed": seed,
    }


def class_fields() -> dict[str, Any]:
    prior = gr.Checkbox(
        True, label="Keep the class", info="without it, its whole kind turns into yours; slower", elem_id="prior"
    )
    with gr.Row():
        source = gr.Dropdown(
            PRIOR_LABELS, value="adapter_off", label="Kept by", info="what it is held to", elem_id="prior_by", **NARROW
        )
        weight = gr.Number(0, label="Prior weight", info="0: by recipe", elem_id="prior_weight", **NARROW)
    return {"prior_preservation": prior, "prior": source, "prior_weight": weight}


def mask_fields(base: str) -> dict[str, Any]:
    fetched = "" if is_toy(base) else FROM_HUB.format("CLIPSeg comes")
    make_masks = gr.Checkbox(is_toy(base), label="Make masks", info=FINDS_SUBJECT + fetched, elem_id="make_masks")
    outside = gr.Slider(
        0,
        1,
        TrainForm.unmasked_weight,
        step=0.05,
        label="Weight outside the mask",
        info="0: the surroundings are not learned at all",
        elem_id="unmasked_weight",
    )
    return {"make_masks": make_masks, "unmasked_weight": outside}


def adapter_fields(base: str) -> dict[str, Any]:
    is_here = encoders_are_here(base)
    fetched = "" if is_here else FROM_HUB.format("CLIP and DINOv2 are not here and come, 2 GB,")
    scores = gr.Checkbox(
        is_here, label="Scores", info=f"measures on the way and keeps the best step{fetched}", elem_id="scores"
    )
    tokens = token_fields()
    start = gr.Dropdown(
        [NONE],
        value=NONE,
        label="Begin with",
        info="an adapter to go on from, with these photos; “none”: from nothing",
        allow_custom_value=True,
        elem_id="begin_with",
    )
    with gr.Row():
        rank = gr.Number(0, label="Rank", info="0: by recipe", precision=0, elem_id="rank", **NARROW)
        learning_rate = gr.Number(0, label="Learning rate", info="0: by recipe", elem_id="learning_rate", **NARROW)
    with gr.Row():
        mixer = gr.Dropdown(
            list(MIXERS), value="orthogonal", label="Mixer", info="“none”: LoRA", elem_id="mixer", **NARROW
        )
        memory = gr.Dropdown(
            list(MEMORY_WORDS),
            value="auto",
            label="Memory",
            info="nf4 needs least",
            visible=not is_toy(base),
            elem_id="memory",
            **NARROW,
        )
    fields = {"scores": scores, "rank": rank, "learning_rate": learning_rate, "mixer": mixer, "memory": memory}
    return tokens | fields | {"begin_with": start}


def token_fields() -> dict[str, Any]:
    """Pivotal tuning: the tick, and what belongs to it while it is set."""
    tick = gr.Checkbox(
        False,
        label="New tokens",
        info="learns the token anew in both text encoders, beside the adapter; on the toys likeness did not rise",
        elem_id="new_tokens",
    )
    with gr.Row(visible=False, elem_id="token_box") as box:
        words = gr.Textbox(
            "", label="They begin as", info="words like it; or empty", elem_id="tokens_begin_as", **NARROW
        )
        rate = gr.Number(
            TOKENS_RATE,
            label="Their learning rate",
            info="1e-4 to 1e-3",
            elem_id="tokens_rate",
            **NARROW,
        )
    tick.change(lambda is_set: gr.Row(visible=is_set), tick, box, **AT_ONCE)
    return {"new_tokens": tick, "tokens_begin_as": words, "tokens_learning_rate": rate}
