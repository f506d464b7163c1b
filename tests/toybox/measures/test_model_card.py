"""The model card: figures of parts that were trained again, lines of the old card for all others."""

import json

from toybox.measures.model_card import PARTS, QUESTIONS, card

SHARES = {name: 0.9 for name in QUESTIONS if name != "ornaments_worn"}
INTERVALS = {name: [0.81, 0.95, 70] for name in SHARES}


def scores() -> dict:
    values = SHARES | {"intervals": INTERVALS}
    generated = values | {"swd": {"128_px": 30.0, "mean": 31.0}}
    return {"guidance": 2.5, "seen combinations": {"generated": generated, "renders": values}}


def test_a_part_in_work_replaces_its_lines_and_the_others_stay(tmp_path):
    (tmp_path / "judge").mkdir()
    logs = [{"step": 50, "loss": 4.0, "step_sec": 1.0}, {"step": 1000, "loss": 0.5, "step_sec": 1.8}]
    (tmp_path / "judge" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logs))
    (tmp_path / "judge" / "report.json").write_text(json.dumps({"kind_accuracy": 0.99}))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(scores()))
    rows = [f"| {PARTS['vae']} | 5000 | 0.9 | 0.235 → 0.151 |", f"- {PARTS['vae']}: psnr_db 31.3"]
    shipped = "- as shipped, on fresh renders: vae_psnr_db 30.83"
    found = card(tmp_path, "\n".join([*rows, shipped, f"- {PARTS['judge']}: kind_accuracy 0.1"])).splitlines()
    assert {*rows, shipped} <= set(found)
    assert f"| {PARTS['judge']} | 1000 | 0.5 | 4.000 → 0.500 |" in found
    assert f"- {PARTS['judge']}: kind_accuracy 0.99" in found and f"- {PARTS['judge']}: kind_accuracy 0.1" not in found
    share = "90.0 [81.0, 95.0] of 70"
    cells = " | ".join("–" if name == "ornaments_worn" else share for name in QUESTIONS)
    assert f"| seen combinations | renders | {cells} |" in found
    assert not any(line.startswith("On two cores") for line in found)
    clock = "On two cores: 0.26 s to load, 3.05 s for four images."
    assert clock in card(tmp_path, clock).splitlines(), "no timings were taken: the old ones stay"
    taken = scores() | {"timings": {"load_sec": 0.3, "four_images_sec": 4}}
    (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(taken))
    assert "On two cores: 0.3 s to load, 4 s for four images." in card(tmp_path, clock).splitlines()
    assert "Sliced Wasserstein distance to renders, seen combinations: 128 px 30.0, mean 31.0." in found


def test_groups_that_were_not_measured_again_keep_their_rows(tmp_path):
    rows = ["| held-out combinations | generated | 98.2 % | 93.8 % | 100.0 % | 92.5 % |"]
    rows += ["| held-out combinations | renders | 99.0 % | 97.8 % | 99.8 % | 96.8 % |"]
    distance = "Sliced Wasserstein distance to renders, held-out combinations: 128 px 31.5, mean 30.3."
    old = "\n".join([*rows, "| seen combinations | renders | 1 % | 1 % | 1 % | 1 % |", distance])
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(scores()))
    found = card(tmp_path, old)
    assert {*rows, distance} <= set(found.splitlines()) and "| 1 % |" not in found
    again = card(tmp_path / "nothing", found)
    assert again == found, "a second run without measurements changes nothing"
