"""The map of the house: floors and arrows of a package made for the test, and the picture of the real one."""

from pathlib import Path

import pytest
from matplotlib.text import Text

from tools.house import PACKAGE, arrows_of, draw, floors_of, import_graph, is_reachable, purpose_of, report

FILES = {
    "__init__.py": "from house.cellar import stone",
    "cellar/__init__.py": '"""Stones."""',
    "cellar/stone.py": "import json",
    "room/__init__.py": '"""Rooms.\n\nMore of them."""',
    "room/door.py": "from house.cellar.stone import x\nfrom house.room import wall\n",
    "room/wall.py": "def late():\n    import house.cellar.stone\n",
    "roof/__init__.py": '"""Roofs."""',
    "roof/tile.py": "from house.cellar import stone\nfrom house.room.door import knob\n",
}


@pytest.fixture
def house(tmp_path) -> Path:
    root = tmp_path / "house"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_floors_and_arrows_are_those_of_the_imports(house):
    graph = import_graph(house)
    assert graph["room.door"] == {"cellar.stone", "room.wall"} and graph["room.wall"] == {"cellar.stone"}
    assert floors_of(graph) == {"cellar": 1, "room": 2, "roof": 3}
    assert arrows_of(graph) == {("room", "cellar"): 2, ("roof", "cellar"): 1, ("roof", "room"): 1}
    assert report(graph).startswith("3 floors, 3 packages, 7 files, 3 arrows")


def test_an_arrow_is_faint_when_others_lead_there(house):
    arrows = arrows_of(import_graph(house))
    assert is_reachable("roof", "cellar", arrows)
    assert not is_reachable("roof", "room", arrows) and not is_reachable("room", "cellar", arrows)


def test_packages_in_a_circle_are_named(house):
    (house / "cellar" / "stone.py").write_text("import house.roof.tile", encoding="utf-8")
    with pytest.raises(ValueError, match="cellar, roof, room"):
        floors_of(import_graph(house))


def test_the_purpose_is_the_first_line(house):
    assert purpose_of("room", house) == "Rooms."


def test_the_picture_names_every_module():
    graph = import_graph(PACKAGE)
    drawn = "\n".join(text.get_text() for text in draw(graph, PACKAGE).findobj(Text)).split()
    names = {name.rpartition(".")[2] for name in graph} - {"__init__"}
    assert names <= {word.rpartition("/")[2] for word in drawn}
    assert {name.partition(".")[0] for name in graph} <= set(drawn)
