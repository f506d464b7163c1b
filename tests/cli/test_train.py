"""The command `train` before it trains: its help, the base's own resolution, and what it refuses without a trace."""

import pytest

from dreambooth_moslora.base import files
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.train import parse_train_config, train_main
from dreambooth_moslora.disk.queue import locked
from dreambooth_moslora.settings.table import SETTINGS
from tests.helpers.tiny import RESOLUTION_PX
from tests.helpers.tiny_training import paint_photos


@pytest.fixture
def flags(tmp_path):
    photos, run = paint_photos(tmp_path / "photos"), tmp_path / "run"
    return ["--instance_data_dir", str(photos), "--instance_prompt", "a photo of a sks dog", "--output_dir", str(run)]


def test_help_shows_the_flags_in_daily_use_and_help_all_shows_each(capsys):
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            main(["train", flag])
        shown[flag] = capsys.readouterr().out
    assert all(f"  --{name} " in shown["--help_all"] for name in SETTINGS)
    assert len(shown["--help"].splitlines()) < 60 < len(shown["--help_all"].splitlines())
    assert "train photos/dog dog" in shown["--help"] and "--help_all" in shown["--help"]


@pytest.mark.parametrize("words", ["train --help", "train --help_all", "check --help", "verify --help", "fleet --help"])
def test_no_help_calls_a_flag_required_that_its_own_example_leaves_out(words, capsys):
    with pytest.raises(SystemExit):
        main(words.split())
    shown = " ".join(capsys.readouterr().out.split())
    assert "(required)" not in shown
    exceptions = ("PHOTOS WORD)", "PHOTOS WORD, --dataset_name or --subjects)", "PHOTOS WORD or --subjects)")
    said = [f"(needed as a flag or by --config, except with {exception}" in shown for exception in exceptions]
    assert said == [words.startswith("train")] * 3
    assert ("(needed as a flag or by --config)" in shown) == words.startswith("fleet")


@pytest.mark.parametrize(("given", "px"), [([], RESOLUTION_PX), (["--resolution", "128"], 128)])
def test_a_base_that_was_trained_smaller_has_its_own_resolution(given, px, flags, tiny_base):
    assert parse_train_config([*flags, "--pretrained_model_name_or_path", str(tiny_base), *given]).resolution == px


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (401, "asks for a login"),
        (404, "has no such model"),
        (500, "has none"),
        (OSError("no route"), "does not answer"),
        (None, "is not asked, as HF_HUB_OFFLINE is set"),
    ],
)
def test_a_base_that_the_hub_does_not_give_is_refused_at_once_and_leaves_no_folder(
    answer, why, flags, tmp_path, monkeypatch, capsys
):
    class Session:
        def get(self, url, **options):
            asked.append(options["timeout"])
            if isinstance(answer, Exception):
                raise answer
            return type("Answer", (), {"status_code": answer})()

    asked = []
    files.hub_index.cache_clear()
    if answer is not None:
        monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    assert train_main([*flags, "--pretrained_model_name_or_path", "nobody/a-model-1.0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line and "hf download nobody/a-model-1.0" in line
    assert asked == ([5] if answer is not None else []) and not (tmp_path / "run").exists()


def test_a_dry_run_is_refused_where_training_would_be(flags, tiny_base, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    words = [*flags, "--pretrained_model_name_or_path", str(tiny_base), "--dry_run"]
    assert train_main(words) == 0
    with locked(tmp_path / "run"):
        assert train_main(words) == 2
    assert "is training there" in capsys.readouterr().err
    assert train_main(words) == 0
