"""The table of `benchmarks.one_word`."""

import json

from benchmarks import one_word


def test_a_row_a_subject_and_the_mean_with_its_interval(tmp_path, capsys):
    figures = {
        "bear": {"likeness": 0.98, "drift": 0.5, "seconds": 200},
        "rocket": {"likeness": 0.90, "drift": 0.7, "seconds": 220},
        "train": {"likeness": 0.94, "drift": 0.6, "seconds": 210},
    }
    for subject, row in figures.items():
        (tmp_path / f"{subject}.json").write_text(json.dumps(row))
    one_word.main(["--subjects", *figures, "--out", str(tmp_path), "--json", str(tmp_path / "all.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| bear | 0.980 | 0.500 | 200 |"
    assert lines[5].startswith("| mean | 0.940 [0.") and lines[5].endswith("| 210 |")
    assert json.loads((tmp_path / "all.json").read_text()) == figures
