"""The benchmarks that compute a table or a figure: what each says of numbers that are known."""

import json

from benchmarks import one_word, several_subjects


def test_a_row_a_subject_and_the_mean_with_its_interval(tmp_path, capsys):
    likeness, drift, seconds = (0.98, 0.90, 0.94), (0.5, 0.7, 0.6), (200, 220, 210)
    subjects = ("bear", "rocket", "train")
    for number, subject in enumerate(subjects):
        relative = {"dino_of_ceiling": likeness[number], "drift_of_spread": drift[number]}
        relative |= {"clip_t_of_ceiling": 1.01, "sharpness_of_ceiling": 0.9}
        judged = {"judge_colour2": {"mean": 1.0}, "judge_ornaments": {"mean": 0.75}}
        (tmp_path / subject / "evaluation").mkdir(parents=True)
        scores = json.dumps({"relative": relative, "scores": judged})
        (tmp_path / subject / "evaluation" / "scores.json").write_text(scores)
        (tmp_path / f"{subject}.json").write_text(json.dumps({"seconds": seconds[number]}))
    one_word.main(
        ["--subjects", *subjects, "--out", str(tmp_path), "--json", str(tmp_path / "all.json")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| bear | 0.980 | 0.500 | 1.010 | 0.900 | 1.000 | 0.750 | 200 |"
    assert lines[5].startswith("| mean | 0.940 [0.") and lines[5].endswith("| 210 |")
    found = json.loads((tmp_path / "all.json").read_text())
    assert list(found) == list(subjects) and list(found["bear"]) == list(one_word.COLUMNS)


def test_companions_are_compared_by_subject():
    def scored(likeness, drift):
        relative = {"dino_of_ceiling": likeness, "drift_of_spread": drift, "clip_t_of_ceiling": 1.0}
        taken = {"confusion": {"mean": 0.25}, "confusion_base": {"mean": 0.5}}
        return {"relative": relative, "scores": taken}

    alone = {"duck": scored(0.9, 0.5), "bear": scored(0.8, 0.7)}
    together = {"bear": scored(0.7, 0.9), "duck": scored(0.8, 0.7)}
    *_, difference = several_subjects.table(alone, together).splitlines()
    _, _, likeness, clip_t, drift, _ = difference.split("|")
    assert likeness.strip() == "-0.100 [-0.100, -0.100]"
    assert clip_t.strip() == "+0.000 [+0.000, +0.000]"
    assert drift.strip() == "+0.200 [+0.200, +0.200]"
    assert several_subjects.confusion(together) == (
        "confusion with the companion: 0.250 [0.250, 0.250], of the base 0.500 [0.500, 0.500]"
    )


def test_two_subjects_train_as_many_steps_of_each_as_one_alone(tmp_path):
    one = several_subjects.config_of(["duck"], tmp_path / "one")
    two = several_subjects.config_of(["duck", "rocket"], tmp_path / "two")
    assert two.max_train_steps == 2 * one.max_train_steps
    assert [subject.instance_prompt for subject in two.each_subject] == [
        "a photo of a sks duck",
        "a photo of a sks rocket",
    ]
    assert one.instance_data_dir == two.each_subject[0].instance_data_dir
