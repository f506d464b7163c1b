"""Which orders are drawn together, and in which order."""

from dreambooth_moslora.extras.serving.drawer import Batches


def taken(batches: Batches) -> list[list]:
    found = []
    while batch := batches.take():
        found.append(batch)
    return found


def test_a_batch_is_the_longest_waiting_item_and_others_of_its_key():
    batches = Batches(3)
    for item in ("a1", "b1", "a2", "a3", "c1", "a4", "b2"):
        batches.put(item[0], item)
    assert len(batches) == 7
    assert taken(batches) == [["a1", "a2", "a3"], ["b1", "b2"], ["c1"], ["a4"]]
    assert len(batches) == 0 and batches.take() == []


def test_a_favourite_does_not_keep_another_waiting():
    batches = Batches(2)
    for item in ("a1", "a2", "a3", "b1"):
        batches.put(item[0], item)
    order = []
    for number in range(4, 20):
        batches.put("a", f"a{number}")
        order += batches.take()
        if "b1" in order:
            break
    assert order == ["a1", "a2", "a3", "a4", "b1"]
