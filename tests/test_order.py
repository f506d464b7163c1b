"""The order of the files of tests."""

from tests.helpers.order import LONGEST, TESTS


def test_the_longest_files_begin_first(request):
    found = list(dict.fromkeys(item.path for item in request.session.items))
    long = [TESTS / name for name in LONGEST]
    assert all(path.is_file() for path in long)
    expected = [path for path in long if path in found]
    assert found[: len(expected)] == expected


def test_each_file_stays_together_and_those_of_most_tests_come_before_others(request):
    paths = [item.path for item in request.session.items]
    changes = [path for path, before in zip(paths, [None, *paths]) if path != before]
    assert len(changes) == len(set(paths))
    counts = [paths.count(path) for path in changes if str(path.relative_to(TESTS)) not in LONGEST]
    assert counts == sorted(counts, reverse=True)
