"""How the hour of visitors compares memory."""

import psutil

from benchmarks.visitors import WEIGHTS, Day, memory_figures


def test_memory_is_compared_only_since_every_action_and_every_visitor_was_seen():
    day = Day(psutil.Process(), minutes=1, steps=1)
    day.sample(clients=2)
    assert "not compared" in memory_figures(day)["memory"]
    for name in WEIGHTS:
        day.seconds[name].append(1.0)
    day.acted.add(1)
    day.sample(clients=2)
    assert day.warm_from is None
    day.acted.add(2)
    day.sample(clients=2)
    day.memory += [100.0, 100.0, 500.0, 100.0, 300.0, 102.0, 101.0, 101.0]
    figures = memory_figures(day)
    assert figures["memory since, change (%)"] == 1.0
    assert figures["memory since, 95th percentile and highest (MiB)"].endswith("500.0")
