"""What is printed of names that somebody else chose."""

from dreambooth_moslora.core.errors import spelled_out


def test_letters_that_turn_the_direction_of_a_line_are_spelled_out():
    """`gpj.exe` behind U+202E reads as `exe.jpg` on a terminal."""
    assert spelled_out("a\u202egpj.exe\u2069 \u200fa\x1b[0m\x85\r") == r"a\u202egpj.exe\u2069 \u200fa\x1b[0m\x85\x0d"


def test_letters_of_every_script_stay():
    text = "café 雪 шар כלב 👩\u200d🚀\n\t"
    assert spelled_out(text) == text
