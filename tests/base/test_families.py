"""Each family computes what its own pipeline computes. A random tiny pipeline proves sign, time,
places and masks."""

import inspect
import os
import re
import subprocess
import sys

import diffusers
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dreambooth_moslora.base.families import (
    FAMILY_CLASSES,
    build_encoding_options,
    build_family,
    drop_unused_negative,
    unpack_latents,
)
from dreambooth_moslora.base.load import get_pipeline_class
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.method.fast_linear import WorkingCopies, enable_fast_path
from dreambooth_moslora.method.moslora import (
    MoSLoraConfig,
    disable_layers,
    get_adapter_layers,
    get_matrix_layers,
    inject,
    list_adapter_parameters,
)
from dreambooth_moslora.settings.family_facts import FAMILIES, FamilyFacts, get_facts
from dreambooth_moslora.settings.field_facts import is_adapted
from tests.helpers.tiers import slow_but
from tests.helpers.tiny_families import TINY_FAMILIES, TinyFamily, tiny_pipeline

NAMES = slow_but(("flux", "z_image"), TINY_FAMILIES)
PX = 64
PROMPTS = list(TinyFamily.prompts)
CROPS = torch.tensor([[PX, PX, 0, 0, PX, PX]] * 2, dtype=torch.float32)
each = pytest.mark.parametrize("loaded", NAMES, indirect=True)


@pytest.fixture
def loaded(request, tmp_path):
    pipe, row = tiny_pipeline(request.param, tmp_path), TINY_FAMILIES[request.param]
    options = build_encoding_options(row.settings) | row.instructed
    return pipe, build_family(pipe, embedded_guidance=3.5, options=options)


def pixels() -> Tensor:
    return torch.rand(2, 3, PX, PX, generator=torch.Generator().manual_seed(0)) * 2 - 1


def as_taken(family, z: Tensor) -> Tensor:
    """Latents as the pipeline's argument `latents`."""
    as_tokens = TINY_FAMILIES[family.facts.name].as_tokens
    return as_tokens(z) if as_tokens else z


def list_prompts(family) -> list[str]:
    return list(TINY_FAMILIES[family.facts.name].prompts)


def as_latents(rows: Tensor, like: Tensor) -> Tensor:
    """A pipeline's latents (B, tokens, channels) or (B, C, h, w), as (B, C, h, w)."""
    if rows.ndim == 4:
        return rows
    return (
        rows.mT.reshape(like.shape)
        if rows.shape[-1] == like.shape[1]
        else unpack_latents(rows, like)
    )


def unguided(family) -> dict:
    scale = family.embedded_guidance if not family.facts.has_negative else family.facts.no_guidance
    return {family.facts.guidance_name: scale, "height": PX, "width": PX}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
@each
def test_a_prediction_is_that_of_the_pipelines_step(loaded):
    ours, theirs, _ = steps_of_both(*loaded, list_prompts(loaded[1]))
    assert relative(ours, theirs) < 2e-6


class AttentionMasks(TorchFunctionMode):
    """Collects the masks that attentions get."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.masks.append(args[3] if len(args) > 3 else kwargs.get("attn_mask"))
        return function(*args, **kwargs)


@torch.no_grad()
@each
def test_no_attention_gets_a_mask_for_prompts_of_unequal_length(loaded):
    """Kernels without one are faster. Two families have one for the attention of a text to itself:
    Lumina 2's hides nothing, Qwen-Image 2.1's is causal."""
    pipe, family = loaded
    denoiser, texts = getattr(pipe, family.facts.denoiser), family.encode_prompts(pipe, PROMPTS)
    z, t = family.encode_latents(pipe.vae, pixels()), torch.tensor([300.0, 700.0])
    with AttentionMasks() as attention:
        family.predict(denoiser, z, t, CROPS, **family.collate(texts))
    masks = [mask for mask in attention.masks if mask is not None]
    assert len(attention.masks) > len(masks)
    if family.facts.name in ("lumina2", "qwen_image21"):
        lengths = [len(text["prompt_embeds"]) for text in texts]
        assert all(mask.shape[-1] <= max(lengths) for mask in masks)
    else:
        assert not masks


@torch.no_grad()
@pytest.mark.parametrize("loaded", ["krea2"], indirect=True)
def test_krea_2_encodes_without_padding(loaded):
    pipe, family = loaded
    padded = dict(zip(family.names, pipe.encode_prompt(PROMPTS)))
    lengths = padded["prompt_embeds_mask"].sum(1)
    unpadded = family.collate(family.encode_prompts(pipe, PROMPTS))
    assert unpadded["prompt_embeds"].shape[1] == lengths.max() < padded["prompt_embeds"].shape[1]
    assert unpadded["prompt_embeds_mask"].sum(1).tolist() == lengths.tolist()


def steps_of_both(pipe, family, prompts: list[str]) -> tuple[Tensor, Tensor, list]:
    """Our prediction and the pipeline's at its first step, and the calls of the denoiser: the
    pipeline's three, then ours; each its arguments, the named ones and the result."""
    denoiser = getattr(pipe, family.facts.denoiser)
    text = family.collate(family.encode_prompts(pipe, prompts))
    noise = torch.randn(
        family.encode_latents(pipe.vae, pixels()).shape, generator=torch.Generator().manual_seed(1)
    )
    calls, steps = [], []
    denoiser.register_forward_hook(lambda module, *call: calls.append(call), with_kwargs=True)

    def on_step(pipe, number, t, tensors):
        steps.append((float(t), tensors["latents"].clone()))
        return tensors

    options = {
        "num_inference_steps": 3,
        "output_type": "latent",
        "callback_on_step_end": on_step,
        **unguided(family),
    }
    pipe(**text, latents=as_taken(family, noise).clone(), **options)
    t, after = torch.full((2,), steps[0][0]), as_latents(steps[0][1], noise)
    if family.facts.style == "ddpm":
        (z, *_), _, output = calls[0]
        theirs = output[0]
    else:
        z, theirs = noise, (after - noise) / (pipe.scheduler.sigmas[1] - pipe.scheduler.sigmas[0])
    return family.predict(denoiser, z, t, CROPS, **text), theirs, calls


class DecodedError(Exception):
    """Ends a pipeline's call with what it gives the VAE."""


@torch.no_grad()
@each
def test_the_pipeline_decodes_latents_to_the_posteriors_mean(loaded, monkeypatch):
    """If the denoiser predicts zeros, a flow's latents do not change."""
    pipe, family = loaded
    z = family.encode_latents(pipe.vae, pixels())

    def decode(decoded: Tensor, *_, **__):
        raise DecodedError(decoded)

    if family.facts.style == "ddpm":
        decoded = z / pipe.vae.config.scaling_factor
    else:
        monkeypatch.setattr(pipe.vae, "decode", decode)
        getattr(pipe, family.facts.denoiser).register_forward_hook(
            lambda m, a, output: zeros_like(output)
        )
        text = family.collate(family.encode_prompts(pipe, list_prompts(family)))
        with pytest.raises(DecodedError) as reached:
            pipe(
                **text,
                latents=as_taken(family, z).clone(),
                num_inference_steps=2,
                **unguided(family),
            )
        decoded = reached.value.args[0]
    images = pixels()
    if pipe.vae.config.get("in_channels") == 4:
        images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)  # opaque
    encoded = pipe.vae.encode(images[:, :, None] if decoded.ndim == 5 else images)
    assert (
        relative(
            decoded, encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        )
        < 2e-6
    )


def zeros_like(output):
    first = output[0]
    return (
        [torch.zeros_like(latent) for latent in first]
        if isinstance(first, list)
        else torch.zeros_like(first),
    )


@torch.no_grad()
@each
def test_prompts_of_unequal_length_are_independent_in_a_batch(loaded):
    pipe, family = loaded
    denoiser, texts = getattr(pipe, family.facts.denoiser), family.encode_prompts(pipe, PROMPTS)
    z, t = family.encode_latents(pipe.vae, pixels()), torch.tensor([300.0, 700.0])
    together = family.predict(denoiser, z, t, CROPS, **family.collate(texts))
    for row in range(2):
        rows = slice(row, row + 1)
        alone = family.predict(
            denoiser, z[rows], t[rows], CROPS[rows], **family.collate(texts[rows])
        )
        assert relative(together[rows], alone) < 1e-5


@each
def test_recomputation_changes_no_gradient(loaded):
    pipe, family = loaded
    denoiser = getattr(pipe, family.facts.denoiser).train()
    weights = [layer.weight for layer in denoiser.modules() if isinstance(layer, torch.nn.Linear)]
    gradients = [compute_gradients(family, pipe, weights)]
    denoiser.enable_gradient_checkpointing()
    gradients.append(compute_gradients(family, pipe, weights))
    assert [plain is None for plain in gradients[0]] == [
        recomputed is None for recomputed in gradients[1]
    ]
    pairs = [pair for pair in zip(*gradients) if pair[0] is not None]
    assert (
        len(pairs) > 10
        and max(
            relative(plain, recomputed) for plain, recomputed in pairs if recomputed.norm() > 1e-9
        )
        < 1e-4
    )


def predict(family, pipe) -> Tensor:
    """Return the prediction for two prompts."""
    with torch.no_grad():
        text = family.collate(family.encode_prompts(pipe, PROMPTS))
        z = family.encode_latents(pipe.vae, pixels())
    denoiser = getattr(pipe, family.facts.denoiser)
    return family.predict(denoiser, z, torch.tensor([300.0, 700.0]), CROPS, **text)


def compute_gradients(family, pipe, weights: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients of the mean squared prediction for two prompts."""
    for weight in weights:
        weight.requires_grad_().grad = None
    predict(family, pipe).square().mean().backward()
    return [weight.grad for weight in weights]


@torch.no_grad()
@each
def test_images_of_cached_embeddings_equal_the_pipelines(loaded):
    """Images are guided, and generated alone and in a batch."""
    pipe, family = loaded
    prompts = list_prompts(family)
    parameters = inspect.signature(pipe.__call__).parameters
    negative = "a cat" if family.facts.has_negative and "negative_prompt" in parameters else ""
    arguments = {"prompt": [*prompts], **family.options} | (
        {"negative_prompt": [negative] * 2} if negative else {}
    )
    arguments |= {name: False for name in ("use_resolution_binning",) if name in parameters}

    def draw(rows: list[int], **text) -> Tensor:
        seeds = [torch.Generator().manual_seed(row) for row in rows]
        options = {
            family.facts.guidance_name: family.facts.guidance,
            "num_inference_steps": 2,
            "output_type": "pt",
        }
        text = drop_unused_negative(family.facts, text, family.facts.guidance)
        return pipe(**text, generator=seeds, height=PX, width=PX, **options).images

    theirs, texts, empty = (
        draw([0, 1], **arguments),
        family.encode_prompts(pipe, prompts),
        family.encode_negative(pipe, negative),
    )
    pipe.register_modules(**dict.fromkeys(family.facts.encoders))

    def collate_rows(rows: list[int]) -> dict:
        return family.add_negative(
            family.collate([texts[row] for row in rows]), family.collate([empty] * len(rows))
        )

    pair, single = draw([0, 1], **collate_rows([0, 1])), draw([0], **collate_rows([0]))
    assert (
        pair.shape[0] == 2 and relative(pair[:1], single) < 1e-4 and relative(pair, theirs) < 1e-4
    )


def test_the_facts_of_a_family_fit_its_diffusers_classes():
    assert {facts.name for facts in FAMILIES} == FAMILY_CLASSES.keys() == TINY_FAMILIES.keys()
    for facts in FAMILIES:
        assert hasattr(diffusers, facts.pipeline)
        kind = get_pipeline_class(facts)
        assert {facts.denoiser, *facts.encoders} <= inspect.signature(
            kind.__init__
        ).parameters.keys()
        assert {facts.guidance_name} <= inspect.signature(kind.__call__).parameters.keys()
        assert set(facts.text_options) <= inspect.signature(kind.encode_prompt).parameters.keys()
        adapted = {facts.denoiser, *facts.adapted_encoders}
        assert adapted == {*kind._lora_loadable_modules} - {"text_conditioner"}  # it stays frozen
        assert (facts.memory is None) == (facts.denoiser == "unet")
    with pytest.raises(TypeError, match="memory"):
        FamilyFacts(name="new", title="New", pipeline="NewPipeline", model="NewTransformer2DModel")
    with pytest.raises(
        UserError, match="class ChromaPipeline cannot be trained here: take one of SDXL"
    ):
        get_facts("ChromaPipeline")


@each
def test_the_fused_path_has_the_gradients_of_peft(loaded):
    """With the adapter disabled, the prediction is the base's bit for bit."""
    pipe, family = loaded
    denoiser = getattr(pipe, family.facts.denoiser)
    paths = [path for path in get_matrix_layers(denoiser) if is_adapted(path, family.facts.targets)]
    of_base = predict(family, pipe)
    inject(
        denoiser,
        MoSLoraConfig(r=2, target_modules="|".join(map(re.escape, paths)), mixer="orthogonal"),
    )
    weights = [weight for _, weight in list_adapter_parameters(denoiser)]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn_like(weight))
    slow = compute_gradients(family, pipe, weights)
    assert enable_fast_path(denoiser) == len(paths)
    with WorkingCopies(denoiser).attach_copies() as step:
        compute_gradients(family, pipe, weights)
        step.collect()
    fast = [weight.grad for weight in weights]
    assert (
        max(relative(fused, plain) for fused, plain in zip(fast, slow) if plain is not None) < 1e-4
    )
    with disable_layers(list(get_adapter_layers(denoiser).values())):
        assert torch.equal(predict(family, pipe), of_base)


HUB = """
import http.server, json, os, threading
asked = []
class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        # the client asks the hub about itself too
        asked.extend([self.path] * self.path.endswith("model_index.json"))
        content = json.dumps({"_class_name": "ZImagePipeline"}).encode()
        self.send_response(200 if "Z-Image" in self.path else 404)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *words):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from dreambooth_moslora.base.base import Base
for _ in range(2):
    told = Base.find("some/Z-Image").facts.name, Base.find("some/other").facts
print(*told, asked)
"""


def test_the_family_of_a_hub_id_is_requested_once():
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    result = subprocess.run(
        [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=True
    )
    requests = (
        "['/some/Z-Image/resolve/main/model_index.json', "
        "'/some/other/resolve/main/model_index.json', "
        "'/some/other/resolve/main/modular_model_index.json']"
    )
    assert result.stdout.strip() == f"z_image None {requests}"
