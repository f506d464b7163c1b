"""ComfyUI's workflows in `assets/comfyui`: they link nodes that ComfyUI has, and their model passes
through the LoRA."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "assets" / "comfyui").glob("*.json"))
MODEL, CLIP, VAE, COND, LATENT, IMAGE = "MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE"
TEXT, WHOLE, NUMBER = str, int, float
LORA = {"model": MODEL, "lora_name": TEXT, "strength_model": NUMBER}
SIZE = {"width": WHOLE, "height": WHOLE, "batch_size": WHOLE}
NODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": TEXT}, (MODEL, CLIP, VAE)),
    "UNETLoader": ({"unet_name": TEXT, "weight_dtype": TEXT}, (MODEL,)),
    "CLIPLoader": ({"clip_name": TEXT, "type": TEXT, "device": TEXT}, (CLIP,)),
    "DualCLIPLoader": (
        {"clip_name1": TEXT, "clip_name2": TEXT, "type": TEXT, "device": TEXT},
        (CLIP,),
    ),
    "VAELoader": ({"vae_name": TEXT}, (VAE,)),
    "LoraLoader": (LORA | {"clip": CLIP, "strength_clip": NUMBER}, (MODEL, CLIP)),
    "LoraLoaderModelOnly": (LORA, (MODEL,)),
    "ModelSamplingAuraFlow": ({"model": MODEL, "shift": NUMBER}, (MODEL,)),
    "CLIPTextEncode": ({"text": TEXT, "clip": CLIP}, (COND,)),
    "FluxGuidance": ({"conditioning": COND, "guidance": NUMBER}, (COND,)),
    "ConditioningZeroOut": ({"conditioning": COND}, (COND,)),
    "EmptyLatentImage": (SIZE, (LATENT,)),
    "EmptySD3LatentImage": (SIZE, (LATENT,)),
    "KSampler": (
        {"model": MODEL, "positive": COND, "negative": COND, "latent_image": LATENT}
        | {"seed": WHOLE, "steps": WHOLE, "cfg": NUMBER, "denoise": NUMBER}
        | {"sampler_name": TEXT, "scheduler": TEXT},
        (LATENT,),
    ),
    "VAEDecode": ({"samples": LATENT, "vae": VAE}, (IMAGE,)),
    "SaveImage": ({"images": IMAGE, "filename_prefix": TEXT}, (IMAGE,)),
}
"""Class of a node -> types of its inputs and of its outputs, by `nodes.py` and `comfy_extras` of
ComfyUI in 2026."""


def load_nodes(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def list_sources(nodes: dict[str, dict[str, Any]], name: str, kind: str) -> Iterator[str]:
    """Yield the classes of the nodes through which this type comes to a node, the nearest first."""
    inputs = nodes[name]["inputs"]
    types, _ = NODES[nodes[name]["class_type"]]
    for key, type_ in types.items():
        if type_ == kind:
            yield nodes[inputs[key][0]]["class_type"]
            yield from list_sources(nodes, inputs[key][0], kind)


def test_there_is_a_workflow_for_each_model_of_the_page():
    assert [path.stem for path in WORKFLOWS] == ["flux", "sdxl", "z_image"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_node_has_its_inputs_and_each_link_its_type(path):
    nodes = load_nodes(path)
    for node in nodes.values():
        types, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == types.keys()
        for key, type_ in types.items():
            value = node["inputs"][key]
            if isinstance(type_, str):
                source, slot = value
                assert NODES[nodes[source]["class_type"]][1][slot] == type_
            else:
                assert type(value) is type_
    linked = {v[0] for node in nodes.values() for v in node["inputs"].values() if type(v) is list}
    assert {nodes[name]["class_type"] for name in nodes.keys() - linked} == {"SaveImage"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_model_passes_through_the_lora(path):
    nodes = load_nodes(path)
    (sampler,) = [name for name, node in nodes.items() if node["class_type"] == "KSampler"]
    *_, lora, loader = list_sources(nodes, sampler, MODEL)
    assert lora.startswith("LoraLoader") and loader in ("CheckpointLoaderSimple", "UNETLoader")
    texts = [name for name, node in nodes.items() if node["class_type"] == "CLIPTextEncode"]
    for text in texts if path.stem == "sdxl" else ():
        assert next(list_sources(nodes, text, CLIP)) == "LoraLoader"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_page_names_the_files_that_the_workflow_loads(path):
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    values = [value for node in load_nodes(path).values() for value in node["inputs"].values()]
    files = [value for value in values if str(value).endswith(".safetensors")]
    assert files and all(file in page for file in [*files, f"assets/comfyui/{path.name}"])
    assert "a photo of a sks dog on the beach" in values
