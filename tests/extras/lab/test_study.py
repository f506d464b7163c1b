"""A study's file, its cells and what its results say, on made-up results whose answers are
known."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.evaluation.reference_arms import VERDICT_TRAIN
from dreambooth_moslora.extras.lab import comparison
from dreambooth_moslora.extras.lab.command_compare import build_study as study_of_words
from dreambooth_moslora.extras.lab.command_compare import compare_arguments
from dreambooth_moslora.extras.lab.comparison import (
    CellResult,
    choose_best_rates,
    compare_arms,
    summarize_arms,
)
from dreambooth_moslora.extras.lab.study import Cell, Study, StudySubject, load_study
from dreambooth_moslora.extras.lab.study_report import (
    build_outcome_rows,
    format_finding,
    plot_differences,
)
from tests.helpers.command_line import parse_train_config

MIXERS = Path(__file__).parents[3] / "assets" / "studies" / "mixers.toml"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("a", "b", "t"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "subject.json").write_text('{"token": "sks", "class_word": "duck"}')
    monkeypatch.chdir(tmp_path)


def study_text(
    extra: str = "", arms: str = "[arms.lora]\nmixer = 'none'\n[arms.mix]\nmixer = 'identity'\n"
) -> str:
    return f"""
[study]
subjects = ["a", "b"]
tuning_subjects = ["t"]
learning_rates = [1e-4, 1e-3]
ranks = [4]
{extra}
[train]
resolution = 64
{arms}"""


def study_of(text: str) -> Study:
    Path("study.toml").write_text(text, encoding="utf-8")
    return load_study(Path("study.toml"))


def test_cells_are_all_combinations_and_tuning_has_its_subjects():
    study = study_of(study_text())
    tuning = study.list_tuning_cells()
    tests = study.list_test_cells({("lora", 4): 1e-4, ("mix", 4): 1e-3})
    assert len(tuning) == 2 * 2 and {cell.subject for cell in tuning} == {"t"}
    assert len(tests) == len(set(tests)) == 2 * 2 * 2 and {cell.subject for cell in tests} == {
        "a",
        "b",
    }
    assert {(cell.arm, cell.learning_rate) for cell in tests} == {("lora", 1e-4), ("mix", 1e-3)}
    cells = [Cell("test", arm, 4, "a", 7, 1e-3) for arm in ("lora", "mix")]
    lora, mix = (study.build_config(cell, 4, Path("run")).to_dict() for cell in cells)
    assert {name for name in lora if lora[name] != mix[name]} == {"mixer"}, (
        "arms differ only in what they say"
    )
    assert lora["seed"] == 7 and lora["instance_prompt"] == "a photo of a sks duck"


def test_the_digest_follows_every_setting_that_matters():
    study = study_of(study_text())
    cell = Cell("test", "mix", 4, "a", 0, 1e-3)
    changed = [
        replace(study, train={"resolution": 128}),
        replace(study, arms={**study.arms, "mix": {"mixer": "kaiming"}}),
        replace(study, budget="rank"),
    ]
    assert study.digest(cell) not in {changed_study.digest(cell) for changed_study in changed}
    assert study.digest(cell) == replace(study, seeds=(5,)).digest(cell)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (study_text("colour = 1"), "unknown study.colour"),
        (study_text(arms="[arms.mix]\nmixer = 'identity'"), "none of its arms"),
        (study_text(arms="[arms.lora]\nmixer = 'nine'"), "choose one of"),
        (study_text(arms="[arms.lora]\nmixxer = 'none'"), "did you mean `mixer`"),
        (study_text("budget = 'money'"), "choose one of parameters, rank"),
        (study_text().replace('["t"]', '["a"]'), "names a twice"),
        (study_text().replace('["t"]', "[]"), "need tuning_subjects"),
        (study_text().replace('"b"', '"nowhere"'), "no such folder"),
        (study_text().replace('["t"]', "5"), "tuning_subjects is a list of folders"),
        (study_text().replace('"b"', "5"), "a folder, or a table of texts"),
        (study_text().replace('"b"', '{instance_prompt = "x"}'), "has no photos"),
        (
            study_text().replace('"b"', '{photos = "b", clas_prompt = "x"}'),
            "photos, instance_prompt, class_prompt",
        ),
        (
            study_text().replace("ranks = [4]", "ranks = 4"),
            "ranks is a list of whole numbers from 1 on",
        ),
        (study_text().replace("1e-4", "'fast'"), "learning_rates is a list of numbers"),
        (study_text("tie = 'x'"), "tie is a number"),
        (study_text("reference = ['lora']"), "none of its arms"),
        (study_text(arms="[arms]\nlora = 'none'"), "arms.lora is a table"),
        (study_text(arms="[arms.lora]\nlearning_rate = 'fast'"), "learning_rate"),
        (
            study_text(arms="[arms.lora]\n[evaluation]\nnum_prompts = 0"),
            "num_prompts is a whole number from 1 on",
        ),
        (study_text(arms="[arms.lora]\n[evaluation]\nclip = 3"), "clip is a text"),
        (
            study_text().replace(
                "resolution = 64", "pretrained_model_name_or_path = 'no/such/base'"
            ),
            "base no/such",
        ),
        (
            study_text(arms="[arms.lora]\npretrained_model_name_or_path = 'toy-zimage'"),
            "arm lora has another base",
        ),
        (study_text(arms="[arms.lora]\nrevision = 'fp16'"), "arm lora has another base"),
        (study_text(arms="[arms.lora]\nby_references = true"), "takes no reference pictures"),
        (
            study_text(arms="[arms.lora]\nby_references = 'no'"),
            "arms.lora.by_references is true or false, not 'no'",
        ),
        (study_text().replace("[train]", "[train]\nby_references = true"), "unknown setting"),
        ("study = 5", "study is a table"),
        ("[study", "not valid TOML"),
        ("", "no subjects"),
    ],
)
def test_mistakes_are_found_before_the_first_training(text, complaint):
    with pytest.raises(UserError, match=complaint):
        study_of(text)


def test_runs_are_of_the_base_s_own_size_unless_it_is_given():
    """As `train` and a fleet have it; by the table's default a study would train the 128 px base at
    1024 px."""
    bare = study_text().replace("resolution = 64\n", "")
    for text, sides in ((bare, [128, 128]), (bare + "resolution = 64\n", [128, 64])):
        study = study_of(text)
        cells = study.list_test_cells(study.get_first_rates())[:2]
        assert [study.build_config(cell, 4, Path("run")).resolution for cell in cells] == sides
        assert "resolution" not in study.train, (
            "the digest of an arm that has a size is what it was"
        )


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "valid JSON"),
        ("[]", "names and values"),
        ("{}", "must name"),
        (None, 'photos = "a", instance_prompt'),
    ],
)
def test_a_damaged_subject_is_one_line(text, complaint):
    Path("a/subject.json").unlink()
    if text is not None:
        Path("a/subject.json").write_text(text)
    with pytest.raises(UserError, match=complaint):
        study_of(study_text())
    assert StudySubject.from_entry("b").class_prompt == "a photo of a duck"
    assert (
        text
        or StudySubject.from_entry({"photos": "a", "instance_prompt": "a photo of zwx cat"}).name
        == "a"
    )


def test_the_shipped_study_is_the_one_that_was_promised(monkeypatch):
    monkeypatch.chdir(MIXERS.parents[2])
    study = load_study(MIXERS)
    assert set(load_study(MIXERS.with_name("recipe.toml")).arms) == {"recommended", "no_prior"}
    assert len(study.subjects) == len(study.seeds) == 8 and study.ranks == (4,)
    arms = {(a.get("mixer"), a.get("train_mixer", True)) for a in study.arms.values()}
    assert arms == {("none", True), ("orthogonal", True), ("kaiming", True)}


def made_up(
    rng: np.random.Generator, gains: dict[str, float], subjects=6, seeds=2
) -> tuple[Study, list[CellResult]]:
    """Results in which each arm is better than `lora` by a known gain, under large differences
    between subjects."""
    names = tuple(StudySubject(f"s{n}", "a photo of a sks duck") for n in range(subjects))
    study = Study(names, {"lora": {}, **{arm: {} for arm in gains}}, {}, seeds=tuple(range(seeds)))
    results = []
    for subject in names:
        for seed in range(seeds):
            shared = rng.normal(0.5, 0.2)
            shared_pictures = shared + rng.normal(0, 0.1, 8)
            for arm, gain in {"lora": 0.0, **gains}.items():
                scores = dict.fromkeys(
                    ("score", "dino", "clip_t", "pres"), shared + gain + rng.normal(0, 0.01)
                )
                pictures = {m: (shared_pictures + gain).tolist() for m in ("dino", "clip_t")}
                cell = Cell("test", arm, 4, subject.name, seed, 1e-4)
                results.append(CellResult(cell, scores, pictures, {"step_sec": 1.0, "rank": 4}))
    return study, results


def test_pairing_finds_a_small_gain_that_unpaired_means_cannot():
    study, results = made_up(np.random.default_rng(0), {"better": 0.05, "equal": 0.0})
    outcomes = {o.arm: o for o in compare_arms(study, results)}
    assert outcomes["better"].differences["score"].low > 0.02
    equal = outcomes["equal"].differences["score"]
    assert equal.low <= 0 <= equal.high
    means = {s.arm: s.scores["score"] for s in summarize_arms(results)}
    assert means["lora"].high > means["better"].low  # the arms' own intervals overlap


def test_one_pair_is_no_finding_whatever_its_sign():
    """As in a report that is read when one of a subject's two seeds is finished."""
    gains = {"up": 0.5, "down": -0.5}
    for size, verdicts in (
        (6, ("better", "worse")),
        (1, ("as one subject at one seed has no interval",) * 2),
    ):
        study, results = made_up(np.random.default_rng(0), gains, subjects=size, seeds=1)
        *lines, _ = format_finding(study, compare_arms(study, results)).splitlines()
        assert [line.endswith(verdict) for line, verdict in zip(lines, verdicts, strict=True)] == [
            True,
            True,
        ]


def test_each_taken_measure_has_a_column_and_a_panel():
    study, results = made_up(np.random.default_rng(0), {"other": 0.05})
    header, (row,) = build_outcome_rows(compare_arms(study, results))
    assert (
        len(header) == len(row)
        and "Δ DINO" in header
        and not {"Δ DINO, bare prompt", "Δ Leak"} & set(header)
    )
    assert titles(study, results) == ["subject (DINO)", "prompt (CLIP-T)", "score"]
    for result in results:
        result.scores.update(
            dict.fromkeys(("background_leak", "dino_bare"), 0.1 + 0.2 * (result.cell.arm != "lora"))
        )
    header, (row,) = build_outcome_rows(compare_arms(study, results))
    for name in ("Leak", "DINO, bare prompt"):
        assert row[header.index(f"Δ {name}")] == "+0.200 [+0.200, +0.200]"
    assert titles(study, results) == [
        "subject (DINO)",
        "bare prompt (DINO)",
        "prompt (CLIP-T)",
        "score",
    ]


def test_an_arm_without_a_measure_takes_no_panel_from_the_others():
    """As one that draws by references, which has no bare prompt."""
    study, results = made_up(np.random.default_rng(0), {"shown": 0.05, "other": 0.1})
    for result in results:
        if result.cell.arm != "shown":
            result.scores["dino_bare"] = 0.1
    figure = plot_differences(compare_arms(study, results), "lora")
    panels = {axis.get_title(): len(axis.containers) for axis in figure.axes}
    assert panels == {
        "subject (DINO)": 2,
        "bare prompt (DINO)": 1,
        "prompt (CLIP-T)": 2,
        "score": 2,
    }


def titles(study: Study, results: list[CellResult]) -> list[str]:
    return [
        axis.get_title() for axis in plot_differences(compare_arms(study, results), "lora").axes
    ]


def test_an_arm_of_references_has_no_rate_and_gets_the_verdict():
    """The same words and interval as of `evaluate --reference`, for each arm that trains, whichever
    arm the others are compared with."""
    study, results = made_up(np.random.default_rng(0), {"shown": -0.2, "close": 0.0})
    study = replace(
        study,
        arms=study.arms | {"shown": {"by_references": True}},
        tuning_subjects=(StudySubject("t", "a photo of a sks duck"),),
        learning_rates=(1e-4, 1e-3),
    )
    assert {cell.arm for cell in study.list_tuning_cells()} == {"lora", "close"}
    assert study.get_first_rates()["shown", 4] == 0.0
    for reference in ("lora", "shown"):
        verdicts = comparison.compare_references(replace(study, reference=reference), results)
        assert list(verdicts) == ["lora r4 against shown", "close r4 against shown"]
        assert {verdict.conclusion for verdict in verdicts.values()} == {VERDICT_TRAIN}
    assert not comparison.compare_references(
        replace(study, arms=study.arms | {"shown": {}}), results
    )


def test_wins_ties_and_losses_leave_out_incomplete_arms():
    study, results = made_up(np.random.default_rng(1), {"better": 0.5, "equal": 0.0, "worse": -0.5})
    wins = {o.arm: o.wins["dino"] for o in compare_arms(study, results)}
    assert wins == {"better": (1.0, 0.0, 0.0), "equal": (0.0, 1.0, 0.0), "worse": (0.0, 0.0, 1.0)}
    assert [o.arm for o in compare_arms(study, results[:-1])] == ["better", "equal"]
    assert "worse" not in [s.arm for s in summarize_arms(results[:-1])]


def test_each_arm_gets_the_rate_that_was_best_for_it():
    test_subject, *tuned = (StudySubject(name, "") for name in "atu")
    study = Study(
        (test_subject,), {"lora": {}, "mix": {}}, {}, tuple(tuned), learning_rates=(1e-4, 1e-3)
    )
    scores = {("lora", 1e-4): 0.2, ("lora", 1e-3): 0.4, ("mix", 1e-4): 0.3, ("mix", 1e-3): 0.3}
    results = [
        CellResult(Cell("tune", arm, 4, subject, 0, rate), {"score": score}, {}, {})
        for (arm, rate), score in scores.items()
        for subject in ("t", "u")
    ]
    own_rate_study = replace(study, arms={**study.arms, "own": {"learning_rate": 5e-4}})
    assert choose_best_rates(own_rate_study, results)["own", 4] == 5e-4 and all(
        cell.arm != "own" for cell in own_rate_study.list_tuning_cells()
    )
    # the lower one at a tie
    assert choose_best_rates(study, results) == {("lora", 4): 1e-3, ("mix", 4): 1e-4}

    # A style may have no score: that rate is left out.
    unscored = [
        replace(result, scores={}) if result.cell.learning_rate == 1e-3 else result
        for result in results
    ]
    assert choose_best_rates(study, unscored) == {("lora", 4): 1e-4, ("mix", 4): 1e-4}


def test_a_folder_and_a_word_are_a_study_of_its_mixers(capsys):
    """It trains as `train PHOTOS WORD` does, but for the mixer."""
    photos = str(MIXERS.parents[1] / "subjects" / "rocket")
    assert main(["compare", photos, "rocket", "--mixers", "none", "identity", "--dry_run"]) == 0
    cells = capsys.readouterr().out.split()
    assert cells == [
        f"test-{mixer}-r16-rocket-s{seed}-lr0.002"
        for seed in (0, 1)
        for mixer in ("none", "identity")
    ]
    parser = argparse.ArgumentParser()
    compare_arguments(parser)
    study = study_of_words(parser.parse_args([photos, "rocket"]))
    (cell, _, *_) = study.list_test_cells(study.get_first_rates())
    alone, like_train = (
        study.build_config(cell, cell.rank, Path("run")),
        parse_train_config([photos, "rocket"]),
    )
    changes = {
        "output_dir",
        "mixer",
        "num_validation_images",
        "checkpointing_steps",
        "instance_data_dir",
    }
    # the study scores at the end
    changes |= {"evaluate_steps", "validation_steps", "class_word"}
    differs = {n for n, value in like_train.to_dict().items() if value != alone.to_dict()[n]}
    assert (alone.mixer, study.reference) == ("none", "none") and differs <= changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a folder and a word"),
        (["a", "dog", "--config", "x.toml"], "give a folder and a word"),
        (["--config", "x.toml", "--mixers", "none"], "leave out --mixers"),
        (["a", "dog", "--mixers", "nothing"], "--mixers nothing: choose from orthogonal"),
    ],
)
def test_a_study_comes_from_a_file_or_a_folder(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
