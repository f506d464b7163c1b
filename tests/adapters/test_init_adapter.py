"""An adapter that begins with a file has its update before the first step, of whatever rank and mixer."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.lora_file import begin_with, read_adapter, read_start
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_parameters, fold, inject
from dreambooth_moslora.adapters.published_file import publish
from dreambooth_moslora.adapters.raw_file import save_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from dreambooth_moslora.settings.table import MIXERS
from tests.adapters.test_lora_file import worst
from tests.helpers.live_adapters import facts_of, shake
from tests.helpers.tiny import tiny_sdxl, tiny_unet
from tests.helpers.tiny_adapters import TARGETS, save_diffusers_lora, save_kohya_lora


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("tokenizer"))


def deltas(layers):
    return {path: layer.delta for path, layer in layers.items()}


def begin(file, pipeline, rank=4, mixer="orthogonal", targets=TARGETS, **options):
    """(the fresh UNet, how it began)."""
    unet = tiny_unet()
    config = {"r": rank, "lora_alpha": 3, "mixer": mixer, "mixer_seed": 5, "target_modules": list(targets)}
    inject(unet, MoSLoraConfig(**config | options))
    weights = read_start(file, pipeline, "tiny", options.get("use_dora", False))
    return unet, begin_with(weights, {"unet": unet})


def update_of(file, pipeline):
    found, scales = read_adapter(file, pipeline).parts["unet"]
    return {path: scales.alphas[path] / p.rank * p.delta for path, p in found.items()}


def ours(folder, name, **options):
    """An adapter that has moved, in the one form of ours."""
    unet = tiny_unet()
    inject(unet, MoSLoraConfig(**{"r": 4, "lora_alpha": 11, "target_modules": TARGETS} | options))
    shake(unet)
    folder.mkdir(exist_ok=True)
    if name == RAW_NAME:
        save_raw({"unet": unet}, folder / name, facts_of({"unet": unet}))
    else:
        publish({"unet": unet}, folder, "dog", facts_of({"unet": unet}))
    return folder / name, deltas(fold(unet))


@pytest.mark.slow
def test_the_update_of_each_kind_of_file_is_there_before_the_first_step(pipeline, tmp_path):
    kohya, halved = tmp_path / "kohya.safetensors", tmp_path / "halved.safetensors"
    save_kohya_lora(pipeline.unet, kohya, seed=1)
    save_file({k: t * 0.5 if k.endswith(".alpha") else t for k, t in load_file(kohya).items()}, halved)
    others = save_diffusers_lora(pipeline.unet, tmp_path / "diffusers", seed=2), kohya, halved
    files = [(file, update_of(file, pipeline)) for file in others]
    files += [ours(tmp_path / name, name) for name in (RAW_NAME, PUBLISHED_NAME, "dog.kohya.safetensors")]
    assert all(torch.allclose(files[2][1][path], update / 2) for path, update in files[1][1].items())
    for file, update in files:
        unet, start = begin(file, pipeline)
        assert worst(deltas(fold(unet)), update) < 2e-6 and start.layers == len(update), file
        assert start.deviation < 1e-6 and start.kept == 1 and not (start.anew or start.left_out), file


@pytest.mark.slow
@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {"butterfly", "kronecker"}))
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "train_mixer": False, "rank": 9}], ids=str)
def test_every_mixer_begins_as_the_run_starts_it(mixer, options, pipeline, tmp_path):
    file = save_diffusers_lora(pipeline.unet, tmp_path, seed=3)
    unet, _ = begin(file, pipeline, mixer=mixer, **options)
    assert worst(deltas(fold(unet)), update_of(file, pipeline)) < (1e-3 if mixer == "kaiming" else 2e-6)
    fresh = tiny_unet()
    settings = {"r": options.get("rank", 4), "mixer": mixer, "mixer_seed": 5, "target_modules": TARGETS}
    inject(fresh, MoSLoraConfig(**settings))
    mixers = [{n: t for n, t in model.state_dict().items() if n.endswith(".mixer")} for model in (unet, fresh)]
    assert mixers[0].keys() == mixers[1].keys() and bool(mixers[0]) == (mixer != "none")
    assert all(torch.equal(mixers[0][name], mixers[1][name]) for name in mixers[0])


@pytest.mark.slow
def test_convolutions_and_text_encoders_begin_too(dog, pipeline, tmp_path):
    file, update = ours(tmp_path, PUBLISHED_NAME, target_modules=[*TARGETS, "conv1", "conv_shortcut"])
    unet, start = begin(file, pipeline, rank=5, targets=[*TARGETS, "conv1", "conv_shortcut"])
    assert worst(deltas(fold(unet)), update) < 2e-6
    assert start.layers > len(update_of(save_diffusers_lora(pipeline.unet, tmp_path / "b"), pipeline))
    folder, components, _ = dog
    inject(pipeline.text_encoder, MoSLoraConfig(r=4, target_modules=["q_proj"]))
    start = begin_with(read_start(folder, pipeline, "tiny", False), {"text_encoder": pipeline.text_encoder})
    theirs, found = deltas(fold(components["text_encoder"])), deltas(fold(pipeline.text_encoder))
    assert worst(found, {path: theirs[path] for path in found}) < 2e-6
    assert {path.split(".")[0] for path in start.left_out} == {"unet", "text_encoder", "text_encoder_2"}


def test_a_higher_rank_is_reduced_to_the_best_of_the_runs_rank(pipeline, tmp_path):
    file = save_diffusers_lora(pipeline.unet, tmp_path, seed=4, rank=6)
    update = update_of(file, pipeline)
    unet, start = begin(file, pipeline, rank=2)
    lost = whole = 0.0
    for path, found in deltas(fold(unet)).items():
        sizes = torch.linalg.svdvals(update[path].double())
        best = float(sizes[2:].norm())
        assert float((update[path] - found).norm()) == pytest.approx(best, rel=1e-3), path
        lost, whole = lost + best**2, whole + float(sizes.norm()) ** 2
    assert start.kept == pytest.approx(1 - lost / whole, rel=1e-4) and start.deviation < 1e-6
    assert f"keeps {start.kept:.2%}" in start.sentence()


@pytest.mark.slow
def test_rows_that_a_file_fills_up_with_zeros_can_be_learnt(pipeline, tmp_path):
    """Our own files of several ranks are padded. A row that is zero in A and B has no gradient."""
    file, _ = ours(tmp_path, PUBLISHED_NAME, rank_pattern={"to_k": 1})
    unet, _ = begin(file, pipeline, rank=4)
    downs = [p for name, p in adapter_parameters(unet) if ".lora_A." in name]
    assert all((down != 0).any(1).all() for down in downs)


def test_what_is_in_one_only_is_said_in_one_line(pipeline, tmp_path):
    file = save_diffusers_lora(pipeline.unet, tmp_path)
    _, start = begin(file, pipeline, targets=["to_q", "proj_in"])
    assert all(path.endswith("proj_in") for path in start.anew) and start.anew
    assert {path.rsplit("attn", 1)[1][2:] for path in start.left_out} == {"to_k", "to_v", "to_out.0"}
    said = start.sentence()
    assert "\n" not in said and f"{len(start.anew)} layers (unet." in said and "not in the file" in said
    assert f"{start.layers} layers go on from it" in said and "not trained here" in said
    with pytest.raises(UserError, match=r"no layer of it is trained here \(it holds unet.*, the run trains unet"):
        begin(file, pipeline, targets=["proj_in"])


@pytest.mark.slow
def test_dora_goes_on_from_dora_alone(pipeline, tmp_path):
    plain = save_diffusers_lora(pipeline.unet, tmp_path / "plain")
    file, update = ours(tmp_path, PUBLISHED_NAME, use_dora=True)
    stored = {k: t for k, t in load_file(file).items() if "magnitude" in k}
    assert len(stored) == len(update)
    for one in (file, tmp_path / "dog.kohya.safetensors"):
        unet, _ = begin(one, pipeline, use_dora=True)
        found = {f"unet.{name.removesuffix('.weight')}": p for name, p in adapter_parameters(unet)}
        assert {name for name in found if "magnitude" in name} == stored.keys()
        assert all(torch.equal(found[name], stored[name]) for name in stored)
    with pytest.raises(UserError, match="it holds DoRA: give --use_dora"):
        begin(file, pipeline)
    with pytest.raises(UserError, match="it holds no DoRA: leave --use_dora out"):
        begin(plain, pipeline, use_dora=True)


@pytest.mark.slow
def test_a_start_that_would_differ_from_the_file_is_refused(pipeline, tmp_path, monkeypatch):
    """As a mixer close to singular would make it."""
    file = save_diffusers_lora(pipeline.unet, tmp_path)
    monkeypatch.setattr(
        "dreambooth_moslora.adapters.mixer.initial_mixer",
        lambda kind, rank, seed, path: torch.ones(rank, rank) + 1e-7 * torch.eye(rank).roll(1, 0),
    )
    with pytest.raises(UserError, match="away from the file, and rounding explains 1e-05: give --mixer orthogonal"):
        begin(file, pipeline)


def test_a_file_of_another_base_is_one_line(pipeline, tmp_path):
    """So are numbers beyond single precision, where a lower rank needs a singular value decomposition."""
    state = {f"unet.x.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"--init_adapter: x.safetensors was made for another base"):
        begin(tmp_path / "x.safetensors", pipeline)
    file = save_diffusers_lora(pipeline.unet, tmp_path)
    save_file({key: torch.full_like(one.double(), 1e200) for key, one in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"is broken: .* beyond single precision"):
        begin(file, pipeline, rank=2)
