"""The benchmarks that compute a table or a figure: what each says of numbers that are known."""

import json

from benchmarks import one_word


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
