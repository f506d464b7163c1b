"""Two real processes whose GPUs have different memory free, or that are given different flags."""

import json

import pytest

from dreambooth_moslora.plan.memory import STOCK_SDXL, in_lines
from tests.helpers.ranks import ended_ranks
from tests.helpers.tiny_training import paint_photos, tiny_config


@pytest.fixture
def ends(tmp_path, free_port):
    """Play scenes; returns what became of each in both processes, and what each process said."""

    def play(*scenes: dict) -> tuple[list[tuple[dict, dict]], list[str]]:
        (tmp_path / "scenes.json").write_text(json.dumps(scenes))
        said = [words for _, words in ended_ranks("tests.helpers.two_cards", free_port, str(tmp_path / "scenes.json"))]
        both = [json.loads((tmp_path / f"cards_{rank}.json").read_text()) for rank in (0, 1)]
        assert [len(played) for played in both] == [len(scenes)] * 2, said
        return list(zip(*both, strict=True)), said

    return play


def settings_of(folder) -> dict:
    return json.loads((folder / "train_config.json").read_text())


@pytest.mark.slow
def test_cards_with_different_memory_free_train_one_adapter_by_the_smaller(ends, tiny_base, tmp_path):
    photos, file = paint_photos(tmp_path / "photos"), tmp_path / "config.json"
    one_word = [str(photos), "dog", "--pretrained_model_name_or_path", str(tiny_base), "--resolution", "64"]
    one_word += ["--max_train_steps", "2", "--num_validation_images", "0", "--report_to", "none"]
    one_word += ["--output_dir", str(tmp_path / "word")]
    planned = tiny_config(tiny_base, photos, tmp_path / "plan", max_train_steps=2, memory="auto")
    file.write_text(json.dumps(planned.to_dict()))
    played, said = ends(
        {"free": [23.2, 20.8], "flags": [one_word, one_word]},
        {"free": [23.2, 0.01], "flags": [["--config", str(file), "--cache_cross_attention"]] * 2},
    )
    for main, other in played:
        assert main == other and main["code"] == 0 and main["adapter"], said
    assert settings_of(tmp_path / "word")["rank"] == 16
    assert settings_of(tmp_path / "plan")["gradient_checkpointing"] is True
    assert "sdxl_16gb.toml for 21 GiB of free GPU memory" in said[0]


@pytest.mark.slow
def test_different_flags_and_a_card_that_is_too_small_end_both_in_one_line(ends, tiny_base, tmp_path):
    photos, file = paint_photos(tmp_path / "photos"), tmp_path / "config.json"
    file.write_text(json.dumps(tiny_config(tiny_base, photos, tmp_path / "run").to_dict()))
    own = ["--config", str(file)]
    sdxl = [*own, "--pretrained_model_name_or_path", STOCK_SDXL, "--resolution", "1024", "--mixed_precision", "bf16"]
    pairs = [
        [[*own, "--rank", "2"], [*own, "--rank", "4"]],
        [own, [*own, "--rank", "many"]],
        [[*own, "--memory", "auto"], own],
        [[str(photos), "dog"], [str(photos), "cat"]],
        [sdxl, sdxl],
    ]
    played, said = ends(*({"free": [23.2, 3.0], "flags": pair} for pair in pairs))
    assert all(end == {"code": 2, "adapter": None} for both in played for end in both), said
    main, other = ([line for line in words.splitlines() if line.startswith("error: ")] for words in said)
    assert len(main) == len(other) == len(pairs), said
    same = "give all processes the same flags and files."
    assert main[0] == other[0] == f"error: process 1 has --rank 4, and the main process --rank 2: {same}"
    assert main[1] == f"error: process 1 ended: {other[1].removeprefix('error: ')}" and "many" in other[1]
    assert main[2] == f"error: process 1 has --memory None, and the main process --memory 'auto': {same}"
    assert main[3] == f"error: process 1 has cat, and the main process dog: {same}"
    assert main[4] == f"error: process 1 ended: {other[4].removeprefix('error: ')}" and "3.0 GiB are free" in other[4]
    assert not any("Traceback" in words for words in said)


def test_processes_may_differ_in_their_number_their_cache_and_how_a_number_is_written():
    own = {"local_rank": 1, "cache_dir": "/disk", "hub_token": "secret", "rank": "8"}
    assert in_lines(own) == in_lines({"rank": 8}) != in_lines({})
