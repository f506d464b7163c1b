"""What `app.py` is told wrongly ends in one line and code 2."""

import pytest

from dreambooth_moslora.ui.app import main, templates_for


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none/below"])
def test_runs_that_can_lie_nowhere_are_told(tmp_path, capsys, place):
    (tmp_path / "file").write_text("x")
    assert main(["--runs_dir", str(tmp_path / place)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --runs_dir") and told.count("\n") == 1


@pytest.mark.parametrize("port", ["99999", "-1", "0"])
def test_a_port_that_is_none_is_told(tmp_path, capsys, port):
    assert main(["--runs_dir", str(tmp_path), "--server_port", port]) == 2
    assert capsys.readouterr().err == f"error: --server_port {port} is not a port; choose one from 1 to 65535\n"


@pytest.mark.parametrize("base", ["toy", "some/base"])
def test_every_base_has_prompt_templates_with_a_place_for_the_subject(base):
    assert templates_for(base) and all("{}" in template for template in templates_for(base))
