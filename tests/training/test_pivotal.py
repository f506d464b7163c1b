"""Pivotal tuning of one and of several subjects: only the new rows move, and what is published is
what was learnt."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from dreambooth_moslora.base.load import encode_text, load_pipeline
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.lora.metadata import AdapterMetadata, notes_in
from dreambooth_moslora.lora.new_tokens import AttachedTokens, NewTokens, read_tokens
from dreambooth_moslora.lora.raw_file import read_tensors
from dreambooth_moslora.settings.prompts import learnt_words, spelled, spellings_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import adapters
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.optimizer import make_optimizer, parameter_groups
from tests.helpers.tiny import embeds_of, equal, pooled_of
from tests.helpers.tiny_training import logged, paint_photos, tiny_config

PROMPT = "a photo of sks dog"
DOG = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
CAT = {
    "instance_prompt": "a photo of zwx cat",
    "class_prompt": "a photo of a cat",
    "initializer_concept": "th cat on",
}
BOTH = "a photo of a sks dog and a zwx cat"
LEARNT = {"train_text_encoder_ti": True, "instance_data_dir": "dog"}


def test_gradients_reach_the_new_rows_alone_and_other_prompts_are_encoded_as_before(base):
    pipeline, prompts = load_pipeline(base), ["a photo of a dog", "two desks", ""]
    plain = encode_text(pipeline, prompts)
    before = {name: value.clone() for name, value in pipeline.text_encoder_2.state_dict().items()}
    rows = {
        p: torch.nn.Parameter(torch.randn(2, w))
        for p, w in (("text_encoder", 16), ("text_encoder_2", 32))
    }
    attached = AttachedTokens(pipeline, [NewTokens("sks", rows)])
    assert equal(plain, encode_text(pipeline, prompts))
    assert attached.spelled("sks, two desks and sks's") == "<s0><s1>, two desks and <s0><s1>'s"
    cond = encode_text(pipeline, [PROMPT, "a photo of a dog"])
    (embeds_of(cond).sum() + pooled_of(cond).square().sum()).backward()
    assert all(bool(found.grad.ne(0).any(dim=1).all()) for found in rows.values())
    others = [w for m in (pipeline.text_encoder, pipeline.text_encoder_2) for w in m.parameters()]
    assert all(w.grad is None for w in others if not any(w is found for found in rows.values()))
    attached.detach()
    after = pipeline.text_encoder_2.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


@pytest.fixture(scope="module")
def run(base, photos, tmp_path_factory):
    """A run of five steps, whose tokens are learnt in the first two; checkpoints after each."""
    prior = {"with_prior_preservation": True, "prior": "adapter_off", "checkpointing_steps": 1}
    config = tiny_config(
        base, photos, tmp_path_factory.mktemp("runs") / "dog", train_text_encoder_ti=True, **prior
    )
    train(config)
    return config


@pytest.fixture(scope="module")
def pets(base, tmp_path_factory):
    """A run of six steps, whose tokens are learnt in the first three; checkpoints after each."""
    folder = tmp_path_factory.mktemp("runs")
    tables = [
        {"instance_data_dir": str(paint_photos(folder / one["instance_prompt"])), **one}
        for one in (DOG, CAT)
    ]
    steps = {
        "subjects": tables,
        "max_train_steps": 6,
        "checkpointing_steps": 1,
        "train_text_encoder_ti": True,
    }
    config = tiny_config(base, None, folder / "pets", **steps)
    train(config)
    return config


@pytest.fixture(params=["run", pytest.param("pets", marks=pytest.mark.slow)])
def either(request):
    """The run of one subject or that of two."""
    return request.getfixturevalue(request.param)


def rows_at(config, step):
    return load_file(RunDir(config.output_dir).checkpoint_path(step) / "moslora_emb.safetensors")


def test_each_subject_has_tokens_of_its_own_which_are_learnt_up_to_the_pivot_and_rest_after_it(
    either, base
):
    folder, started = RunDir(either.output_dir), adapters.fresh_tokens(either, load_pipeline(base))
    words = (
        load_pipeline(base)
        .tokenizer(CAT["initializer_concept"], add_special_tokens=False)
        .input_ids
    )
    assert [(one.word, one.count) for one in started] == [("sks", 2), ("zwx", len(words))][
        : len(started)
    ]
    pivot, last = either.max_train_steps // 2, either.max_train_steps
    for name, tokens in zip(("moslora_emb", "moslora_2_emb"), started):
        steps = (pivot - 1, pivot, pivot + 1, last)
        files = [load_file(folder.checkpoint_path(step) / f"{name}.safetensors") for step in steps]
        for key, rows in zip(("clip_l", "clip_g"), tokens.rows.values(), strict=True):
            before, learnt, after, end = (file[key] for file in files)
            assert rows.shape == before.shape and not (
                torch.equal(rows, before) or torch.equal(before, learnt)
            )
            assert torch.equal(learnt, after) and torch.equal(learnt, end)


def by_the_card(run, base):
    """Stock diffusers with the files of new tokens, loaded by the lines of the run's card; and the
    card."""
    folder = RunDir(run.output_dir)
    card = folder.read_card()
    lines = [
        line
        for line in card.splitlines()
        if "load_textual_inversion" in line or "load_file" in line
    ]
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    exec("\n".join(lines).replace("path/to/this/folder", str(folder.path)), {"pipe": pipe})
    return pipe, card


def test_the_files_are_proved_and_a_stock_diffusers_encodes_the_same_with_them(
    either, base, tmp_path, capsys
):
    folder, pipeline = RunDir(either.output_dir), load_pipeline(base)
    paths, (stock, card), (exported,) = (
        folder.tokens_paths,
        by_the_card(either, base),
        logged(folder.path, "export"),
    )
    headers = [
        read_tensors(file)[1]["moslora"] for file in (folder.adapter_path, folder.kohya_path)
    ]
    notes = [json.loads(header)["tokens"] for header in headers]
    tokens, names = [read_tokens(path) for path in paths], [path.name for path in paths]
    assert names == [f"{folder.path.name}_emb.safetensors", "pets_2_emb.safetensors"][: len(paths)]
    assert exported["files"][-len(paths) :] == names
    assert all(proof["largest"] == 0.0 for proof in exported["proof"]["file_proofs"][-len(paths) :])
    told = [
        (note["word"], note["count"], note["file"])
        for note in (notes[0] if len(paths) > 1 else notes[:1])
    ]
    assert told == [(one.word, one.count, name) for one, name in zip(tokens, names, strict=True)]
    assert notes[0] == notes[1]
    plain, before = encode_text(pipeline, [PROMPT]), len(pipeline.tokenizer)
    AttachedTokens(pipeline, tokens)
    prompts = [PROMPT, CAT["instance_prompt"], BOTH][: 2 * len(paths) - 1]
    assert len(pipeline.tokenizer) == before + sum(one.count for one in tokens)
    spelt = spellings_of({one.word: one.count for one in tokens})
    assert spelled(PROMPT, spelt) == "a photo of <s0><s1> dog" and not equal(
        encode_text(pipeline, [PROMPT]), plain
    )
    for prompt in prompts:
        assert equal(encode_text(stock, [spelled(prompt, spelt)]), encode_text(pipeline, [prompt]))
    for one, name in zip(tokens, names, strict=True):
        assert f'load_file("path/to/this/folder/{name}")' in card and spelt[one.word] in card
        assert f"embedding:{name.removesuffix('.safetensors')}" in card
    last = folder.checkpoint_path(either.max_train_steps)
    assert main(["export", str(last), "--out", str(tmp_path), "--name", folder.path.name]) == 0
    assert all(
        (tmp_path / name).read_bytes() == (folder.path / name).read_bytes() for name in names
    )
    assert main(["info", str(folder.adapter_path)]) == 0
    assert f"2 for the word sks, in {names[0]}" in capsys.readouterr().out


def test_tokens_begin_as_the_words_of_a_concept_and_after_the_pivot_no_optimizer_moves_the_rows(
    run, base
):
    """Prodigy moves even groups whose learning rate is 0."""
    config, pipeline = replace(run, initializer_concept="th dog"), load_pipeline(base)
    (started,) = adapters.fresh_tokens(config, pipeline)
    ids = pipeline.tokenizer("th dog", add_special_tokens=False).input_ids
    assert started.count == len(ids) != config.num_new_tokens_per_abstraction
    assert torch.equal(
        started.rows["text_encoder"], pipeline.text_encoder.get_input_embeddings().weight[ids]
    )
    config = replace(run, optimizer="Prodigy", learning_rate=1.0)
    learnt = adapters.LearntTokens(config, pipeline, None, 4, None)
    optimizer = make_optimizer(config, parameter_groups(config, {}, 1, learnt.parameters))
    rows, moved = learnt.parameters[0], []
    for step in range(4):
        before = rows.detach().clone()
        with learnt.step(step):
            rows.grad += step < 2
            optimizer.step()
        moved.append(not torch.equal(before, rows))
        optimizer.zero_grad()
    assert moved == [True, True, False, False]


def words(pipeline, name, scale=1.0):
    """The encoded prompt while the adapter acts."""
    pipeline.activate(((name, scale),))
    return embeds_of(encode_text(pipeline.pipeline, [PROMPT]))


def test_the_subject_pipeline_takes_tokens_by_itself_but_no_others_and_no_word_twice(
    run, base, tmp_path, caplog
):
    folder = RunDir(run.output_dir)
    pipeline = SubjectPipeline.from_base(base)
    plain = embeds_of(encode_text(pipeline.pipeline, [PROMPT]))
    whole = words(pipeline, pipeline.load_adapter(folder.path))
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(folder.adapter_path.read_bytes())
    assert torch.equal(words(pipeline, pipeline.load_adapter(alone)), plain) and not torch.equal(
        whole, plain
    )
    assert "dog_emb.safetensors is not beside it" in caplog.text
    (tmp_path / "dog_emb.safetensors").write_bytes(folder.tokens_paths[0].read_bytes())
    assert torch.equal(words(pipeline, pipeline.load_adapter(alone)), whole)
    assert torch.equal(words(pipeline, "dog", scale=0.0), plain)
    assert torch.equal(words(pipeline, pipeline.load_adapter(folder.checkpoint_path(5))), whole)
    (tmp_path / "dog_emb.safetensors").write_bytes(
        (folder.checkpoint_path(1) / "moslora_emb.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match="not the file of new tokens that belongs to other"):
        pipeline.load_adapter(alone.rename(tmp_path / "other.safetensors"))
    pipeline = SubjectPipeline.from_base(base)
    pair = tuple(
        (pipeline.load_adapter(path), 1.0) for path in (folder.path, folder.checkpoint_path(1))
    )
    with pytest.raises(UserError, match="'sks': use one of them at a time"):
        pipeline.activate(pair)


def test_another_setting_does_not_go_on_from_a_checkpoint(run, tmp_path):
    checkpoint = str(RunDir(run.output_dir).checkpoint_path(3))
    for changes, says in (
        ({"train_text_encoder_ti": False}, "--train_text_encoder_ti: checkpoint-3 has True"),
        (
            {"num_new_tokens_per_abstraction": 3},
            "--num_new_tokens_per_abstraction: checkpoint-3 has 2",
        ),
        ({"token_abstraction": "photo"}, "photo"),
    ):
        with pytest.raises(UserError, match=says):
            train(
                replace(
                    run,
                    output_dir=str(tmp_path / "dog"),
                    resume_from_checkpoint=checkpoint,
                    **changes,
                )
            )


def test_other_files_hold_no_tokens_and_a_header_names_no_file_elsewhere(tmp_path):
    for tensors, says in (
        ({"clip_l": torch.ones(2, 16)}, "clip_l and clip_g"),
        ({"clip_l": torch.ones(2, 16), "clip_g": torch.ones(3, 32)}, "as many rows"),
        ({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 32) / 0}, "not finite|NaN|inf"),
    ):
        save_file(tensors, tmp_path / "a_emb.safetensors", {"moslora_word": "sks"})
        with pytest.raises(UserError, match=says):
            read_tokens(tmp_path / "a_emb.safetensors")
    note = {"word": "sks", "count": 2, "file": "dog_emb.safetensors", "sha256": "0" * 64}
    elsewhere = note | {"file": "../dog.safetensors"}
    for notes, found in (
        ((note,), (note,)),
        ((note, note), (note, note)),
        ((elsewhere,), ()),
        ((note, elsewhere), ()),
    ):
        written = json.loads(AdapterMetadata(4, 4.0).to_json()) | {"tokens": notes}
        assert notes_in({"moslora": json.dumps(written)}) == found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"token_abstraction": "TOK"}, "the instance prompt has no word 'TOK'"),
        ({"token_abstraction": "sks,TOK"}, "one word is learnt"),
        ({"token_abstraction": "dog"}, "it is in a prompt of the class too"),
        (
            {"cat": {"instance_prompt": "a photo of sks cat"}},
            "'sks', 'sks': each subject needs a rare word of its own",
        ),
        (
            {"cat": {"token_abstraction": "a photo"}},
            "it is in a prompt of the class too, 'a photo of a dog'",
        ),
        ({"cat": {"token_abstraction": "TOK"}}, "the instance prompt has no word 'TOK'"),
        (
            {"cat": {"class_prompt": "a photo of a sks"}},
            "--token_abstraction sks: it is in a prompt of the class too",
        ),
    ],
)
def test_a_word_that_cannot_be_learnt_is_refused(changes, says):
    given = LEARNT | DOG | changes
    if cat := given.pop("cat", None):
        tables = [{"instance_data_dir": "dog", **DOG}, {"instance_data_dir": "cat", **CAT, **cat}]
        given = {"subjects": tables, "train_text_encoder_ti": True}
    with pytest.raises(UserError, match=says):
        learnt_words(TrainConfig(**given))


def test_the_word_is_diffusers_own_where_the_prompt_has_it_and_stays_inside_another():
    for prompt, word in (("a photo of sks dog", "sks"), ("a toy in the style of TOK", "TOK")):
        assert learnt_words(
            TrainConfig(**LEARNT, class_prompt="a dog", instance_prompt=prompt)
        ) == (word,)
    spelt = spellings_of({"sk": 1, "s0": 2})
    assert (
        spelled("sk, s0, (sk) and s0's; desks", spelt)
        == "<s0>, <s1><s2>, (<s0>) and <s1><s2>'s; desks"
    )
