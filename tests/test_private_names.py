"""Private names of libraries that the package uses: each has a reason, and is in the library."""

import argparse
import ast
import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import gradio
import pytest
import torch
import transformers
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraModel

PACKAGE = Path(__file__).parents[1] / "dreambooth_moslora"


def add_hook() -> torch.nn.Module:
    return accelerate.hooks.add_hook_to_module(torch.nn.Linear(1, 1), accelerate.hooks.ModelHook())


def build_lora_layer() -> Linear:
    return Linear(torch.nn.Linear(1, 1), "default", LoraConfig(r=1), r=1)


PRIVATE_NAMES: dict[str, tuple[Callable[[], Any], str]] = {
    "_ConvNd": (lambda: torch.nn.modules.conv, "the common class of all convolutions"),
    "_buffers": (torch.nn.Module, "replaces meta tensors, which register_buffer would rename"),
    "_compiled_call_impl": (torch.nn.Module, "Module.compile has no opposite"),
    "_create_and_replace": (lambda: LoraModel, "PEFT has no hook for a mixer: `patch_peft`"),
    "_data": (lambda: gradio.EventData(None, {}), "reading a missing key of an event raises"),
    "_dict_from_json_file": (
        lambda: diffusers.DiffusionPipeline,
        "reads the index of a modular pipeline, which describes its parts in another way",
    ),
    "_disable_adapters": (build_lora_layer, "PEFT's method changes the gradient flags too"),
    "_dynamo": (lambda: torch, "limits the number of graphs, and names the backend"),
    "_execution_device": (lambda: diffusers.DiffusionPipeline, "the device of offloaded models"),
    "_exit": (lambda: os, "public: ends a process although its threads do not end"),
    "_forward_hooks": (torch.nn.Module, "a fused layer would skip them"),
    "_forward_pre_hooks": (torch.nn.Module, "a fused layer would skip them"),
    "_get_signature_keys": (lambda: diffusers.DiffusionPipeline, "parts of an empty pipeline"),
    "_get_signature_types": (lambda: diffusers.DiffusionPipeline, "the class of a family's VAE"),
    "_hf_hook": (add_hook, "the device on which an offloaded model computes"),
    "_hf_peft_config_loaded": (
        lambda: diffusers.UNet2DConditionModel,
        "diffusers' methods for adapters require it",
    ),
    "_is_mkldnn_bf16_supported": (lambda: torch.ops.mkldnn, "whether the CPU computes bf16"),
    "_load_from_state_dict": (torch.nn.Module, "the documented place to refuse a foreign weight"),
    "_no_split_modules": (lambda: transformers.CLIPTextModel, "classes of repeated blocks"),
    "_get_qwen3_vl_prompt_embeds": (
        lambda: Flux3TextEncoderStep,
        "encodes a prompt without the state of a modular pipeline",
    ),
    "_option_string_actions": (
        argparse.ArgumentParser,
        "argparse does not list the flags that it knows",
    ),
    "_parameters": (torch.nn.Module, "replaces meta tensors, also those with tied weights"),
    "_queue": (gradio.Blocks, "gradio has no setting for the limits of a session: `protect_queue`"),
    "_repeated_blocks": (lambda: diffusers.UNet2DConditionModel, "classes of repeated blocks"),
    "_reset_state": (
        lambda: accelerate.state.AcceleratorState,
        "another run of this process may have another precision",
    ),
    "_save_to_state_dict": (torch.nn.Module, "writes the placeholder of a mixer's weight"),
    "_server": (
        lambda: import_module("grpc.aio"),
        "Ray Serve has no setting for the address of its ports",
    ),
}
"""Name -> what has it, and why the public interface is not enough."""
OPTIONAL = {"_server": "grpc.aio"}
"""Name -> module that may be missing."""
ACCESSORS = ("getattr", "hasattr", "setattr", "delattr")


def is_private(name: str) -> bool:
    return bool(re.match("_[^_]", name))


def list_definitions(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module defines, also as attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def list_uses(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a module imports or looks up, by attribute or by string; those
    of a parent class with a dot."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr + "." * (ast.unparse(node.value) == "super()")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ACCESSORS:
            names = [str(getattr(node.args[1], "value", ""))]
        yield from filter(is_private, names)


def test_each_private_name_of_a_library_is_listed_with_a_reason():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    defined = {name for tree in trees for name in list_definitions(tree)}
    used = {name for tree in trees for name in list_uses(tree)} - defined
    assert {name.rstrip(".") for name in used} == PRIVATE_NAMES.keys()


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_the_library_still_has_the_private_name(name):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    get_owner, _ = PRIVATE_NAMES[name]
    assert hasattr(get_owner(), name)
