"""`generate` as a person calls it."""

import pytest
from safetensors.torch import save_file

from dreambooth_moslora.cli.main import main


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_black_picture_is_explained_as_on_the_page(tiny_base, state, tmp_path, capsys):
    save_file({key: value * 1e30 for key, value in state.items()}, tmp_path / "huge.safetensors")
    words = ["--base", tiny_base, "--prompt", "a dog", "--steps", "1", "--output_dir", tmp_path / "out"]
    for adapter, said in (("huge", True), (None, False)):
        given = ["--adapter", tmp_path / f"{adapter}.safetensors"] if adapter else []
        assert main(["generate", *map(str, [*words, *given])]) == 0
        black = "note: of the pictures, 1 of them is black: an adapter's values or its scale are too large"
        assert (black in capsys.readouterr().err) == said
