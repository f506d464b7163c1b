"""The left half of the Train tab: the widgets of photos, words and run, under the names of `TrainForm`."""

from typing import Any

import gradio as gr

from dreambooth_moslora.core.config import MIXERS
from dreambooth_moslora.ui.html_snippets import faint
from dreambooth_moslora.ui.photo_uploads import PHOTO_TYPES
from dreambooth_moslora.ui.train_form import PRESETS, TrainForm
from dreambooth_moslora.ui.train_watch import picture_rows

__all__ = ["train_widgets"]

ABOUT_MASKS = "A mask goes along as name.mask.png beside name.jpg: only what is white in it is learned."


def train_widgets() -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields under the names of TrainForm, and the other widgets."""
    gr.Markdown("### 1 · Photos", elem_classes="step")
    photos = gr.File(
        file_count="multiple",
        file_types=PHOTO_TYPES,
        label="4 to 10 photos of one subject",
        height=130,
        elem_id="photos",
    )
    gr.HTML(faint(ABOUT_MASKS))
    make_masks = gr.Checkbox(
        False, label="Make masks", info="finds the subject in photos that have none", elem_id="make_masks"
    )
    remarks = gr.HTML(visible=False, elem_id="remarks")
    crops = picture_rows("Crops", "crops", object_fit="cover", buttons=["fullscreen"])
    gr.Markdown("### 2 · Words", elem_classes="step")
    with gr.Row():
        token = gr.Textbox("sks", label="Token", info="a rare word", min_width=110, elem_id="token")
        class_word = gr.Textbox(
            label="Class word", info="what it is", placeholder="dog", min_width=110, elem_id="class_word"
        )
    prompts = gr.HTML(visible=False, elem_id="prompts")
    with gr.Accordion("Captions (optional)", open=False):
        captions = gr.Textbox(
            "", label="Captions", info="one line for each photo, in order", lines=4, elem_id="captions"
        )
    gr.Markdown("### 3 · Run", elem_classes="step")
    preset = gr.Radio(list(PRESETS), value="standard", label="Length", elem_id="preset")
    prior = gr.Checkbox(False, label="Prior preservation", info="keeps the class as it was; slower", elem_id="prior")
    fields = {"token": token, "class_word": class_word, **more_fields(), "preset": preset}
    fields |= {"prior_preservation": prior, "captions": captions, "make_masks": make_masks}
    with gr.Row(elem_classes="tight"):
        start = gr.Button("Start training", variant="primary", scale=2, elem_id="start")
        estimate = gr.Button("Estimate cost", scale=1, min_width=132, elem_id="estimate")
    cost = gr.HTML("", label="Cost", elem_id="cost")
    others = {"photos": photos, "remarks": remarks, "crops": crops, "prompts": prompts, "start": start}
    return {name: fields[name] for name in TrainForm.__dataclass_fields__}, others | {
        "estimate": estimate,
        "cost": cost,
    }


def more_fields() -> dict[str, Any]:
    with gr.Accordion("More settings", open=False, elem_id="more_training"):
        run_name = gr.Textbox("", label="Name of the run", placeholder="from the class word", elem_id="run_name")
        with gr.Row():
            steps = gr.Number(0, label="Steps", info="0: by length", precision=0, min_width=100, elem_id="train_steps")
            rank = gr.Number(0, label="Rank", info="0: by length", precision=0, min_width=100)
        with gr.Row():
            learning_rate = gr.Number(0, label="Learning rate", info="0: by length", min_width=100)
            seed = gr.Number(0, label="Seed", precision=0, min_width=100)
        mixer = gr.Dropdown(list(MIXERS), value="orthogonal", label="Mixer", info="“none” trains a plain LoRA")
    return {
        "run_name": run_name,
        "steps": steps,
        "rank": rank,
        "learning_rate": learning_rate,
        "seed": seed,
        "mixer": mixer,
    }
