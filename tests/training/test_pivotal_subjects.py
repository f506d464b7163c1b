"""Pivotal tuning of several subjects: each has new tokens of its own, in a file of its own."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from dreambooth_moslora.adapters.new_tokens import AttachedTokens, read_tokens
from dreambooth_moslora.base.load import encode_text, load_pipeline
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.settings.prompts import learnt_words, spelled, spellings_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.adapters import fresh_tokens
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.ui.generate_form import summary_of
from tests.helpers.tiny_training import paint_photos, tiny_config

DOG = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
CAT = {"instance_prompt": "a photo of zwx cat", "class_prompt": "a photo of a cat", "initializer_concept": "th cat on"}
BOTH = "a photo of a sks dog and a zwx cat"
FILES = ["pets_emb.safetensors", "pets_2_emb.safetensors"]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run of six steps, whose tokens are learnt in the first three; checkpoints after each."""
    folder = tmp_path_factory.mktemp("runs")
    tables = [{"instance_data_dir": str(paint_photos(folder / one["instance_prompt"])), **one} for one in (DOG, CAT)]
    steps = {"subjects": tables, "max_train_steps": 6, "checkpointing_steps": 1, "train_text_encoder_ti": True}
    config = tiny_config(base, None, folder / "pets", **steps)
    train(config)
    return config


@pytest.fixture(scope="module")
def live(run, base):
    """A pipeline that knows both subjects' tokens."""
    pipeline = load_pipeline(base)
    pipeline.set_progress_bar_config(disable=True)
    AttachedTokens(pipeline, [read_tokens(path) for path in RunDir(run.output_dir).tokens_paths])
    return pipeline


@pytest.mark.slow
def test_each_subject_has_tokens_of_its_own_which_are_learnt_together_up_to_the_pivot(run, base):
    started = fresh_tokens(run, load_pipeline(base))
    words = load_pipeline(base).tokenizer(CAT["initializer_concept"], add_special_tokens=False).input_ids
    assert [tokens.word for tokens in started] == ["sks", "zwx"]
    assert [tokens.count for tokens in started] == [2, len(words)] and len(words) != 2
    folder = RunDir(run.output_dir)
    for name, tokens in zip(("moslora_emb", "moslora_2_emb"), started, strict=True):
        files = [load_file(folder.checkpoint_path(step) / f"{name}.safetensors") for step in (2, 3, 4, 6)]
        for key, rows in zip(("clip_l", "clip_g"), tokens.rows.values(), strict=True):
            second, third, fourth, last = (file[key] for file in files)
            assert not (torch.equal(rows, second) or torch.equal(second, third))
            assert torch.equal(third, fourth) and torch.equal(third, last)


@pytest.mark.slow
def test_stock_diffusers_loads_the_files_by_the_lines_of_the_card(run, base, live):
    folder = RunDir(run.output_dir)
    card = folder.read_card()
    lines = [line for line in card.splitlines() if "load_textual_inversion" in line or "load_file" in line]
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    exec("\n".join(lines).replace("path/to/this/folder", str(folder.path)), {"pipe": pipe})
    spelt = spellings_of({"sks": 2, "zwx": read_tokens(folder.tokens_paths[1]).count})
    for prompt in (DOG["instance_prompt"], CAT["instance_prompt"], BOTH):
        stock, ours = encode_text(pipe, [spelled(prompt, spelt)]), encode_text(live, [prompt])
        assert torch.equal(stock.embeds, ours.embeds) and torch.equal(stock.pooled, ours.pooled)
    assert spelt["zwx"].startswith("<s2><s3>") and "write `<s0><s1>` in its place" in card
    assert f"write `{spelt['zwx']}` in its place, in ComfyUI `embedding:pets_2_emb`" in card


@pytest.mark.slow
def test_each_file_is_proved_and_named_by_the_adapters_header(run, tmp_path, capsys):
    folder = RunDir(run.output_dir)
    exported = next(e for e in folder.read_metrics() if e["type"] == "export")
    assert exported["files"][-2:] == FILES
    assert [proof["outputs"] for proof in exported["proof"]["file_proofs"][-2:]] == [0.0, 0.0]
    for path in (folder.adapter_path, folder.kohya_path):
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["moslora"])["tokens"]
        assert [(note["word"], note["file"]) for note in notes] == list(zip(("sks", "zwx"), FILES, strict=True))
    assert main(["export", str(folder.checkpoint_path(6)), "--out", str(tmp_path), "--name", "pets"]) == 0
    assert all((tmp_path / file).read_bytes() == (folder.path / file).read_bytes() for file in FILES)
    assert main(["info", str(folder.adapter_path)]) == 0
    assert f"2 for the word sks, in {FILES[0]}; " in capsys.readouterr().out


@pytest.mark.slow
def test_the_subject_pipeline_takes_the_tokens_of_both_and_says_which_are_missing(run, base, live, tmp_path, caplog):
    pipeline = SubjectPipeline.from_base(base)
    pipeline.activate(((pipeline.load_adapter(run.output_dir), 1.0),))
    whole = encode_text(pipeline.pipeline, [BOTH]).embeds
    assert torch.equal(whole, encode_text(live, [BOTH]).embeds)
    for file in (RunDir(run.output_dir).adapter_path.name, FILES[0]):
        shutil.copy(RunDir(run.output_dir).path / file, tmp_path)
    alone = tmp_path / RunDir(run.output_dir).adapter_path.name
    assert summary_of(alone).sentence().endswith(f"its new tokens are missing: {FILES[1]} belongs beside it")
    pipeline.activate(((pipeline.load_adapter(alone, "alone"), 1.0),))
    assert f"knows 'zwx' by new tokens, and their file {FILES[1]} is not beside it" in caplog.text
    dogs = [encode_text(one, [DOG["instance_prompt"]]).embeds for one in (pipeline.pipeline, live)]
    assert torch.equal(*dogs) and not torch.equal(encode_text(pipeline.pipeline, [BOTH]).embeds, whole)


@pytest.mark.parametrize(
    ("cat", "says"),
    [
        ({"instance_prompt": "a photo of sks cat"}, "'sks', 'sks': each subject needs a rare word of its own"),
        ({"token_abstraction": "a photo"}, "it is in a prompt of the class too, 'a photo of a dog'"),
        ({"token_abstraction": "TOK"}, "the instance prompt has no word 'TOK'"),
        ({"class_prompt": "a photo of a sks"}, "--token_abstraction sks: it is in a prompt of the class too"),
    ],
)
def test_words_that_cannot_be_told_apart_are_refused(cat, says):
    tables = [{"instance_data_dir": "dog", **DOG}, {"instance_data_dir": "cat", **CAT, **cat}]
    with pytest.raises(UserError, match=says):
        learnt_words(TrainConfig(subjects=tables, train_text_encoder_ti=True))


def test_a_word_inside_another_or_inside_a_spelling_stays():
    spelt = spellings_of({"sk": 1, "s0": 2})
    assert spelled("sk, s0, (sk) and s0's; desks", spelt) == "<s0>, <s1><s2>, (<s0>) and <s1><s2>'s; desks"


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_words_alone(run, tmp_path):
    checkpoint = RunDir(run.output_dir).checkpoint_path(4)
    dog, cat = run.subjects
    there = {"output_dir": str(tmp_path / "pets"), "resume_from_checkpoint": str(checkpoint)}
    with pytest.raises(UserError, match="--token_abstraction: checkpoint-4 has sks zwx; you ask for sks cat"):
        train(replace(run, **there, subjects=(dog, replace(cat, token_abstraction="cat", class_prompt="a photo"))))
    broken = shutil.copytree(checkpoint, tmp_path / "checkpoint-4")
    (broken / "moslora_2_emb.safetensors").unlink()
    with pytest.raises(UserError, match="is damaged"):
        train(replace(run, **there | {"resume_from_checkpoint": str(broken)}))
