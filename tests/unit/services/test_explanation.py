"""Explanations of a permission: the shortest paths of roles, however many there are."""

from __future__ import annotations

import random
import time
from itertools import islice, pairwise

from api.services.explanation import GrantPath, shortest_paths


def brute_force(
    given: list[str], includes: dict[str, list[str]], grants: dict[str, list[str]]
) -> list[GrantPath]:
    """Return what ``shortest_paths`` should, by looking at every path."""
    paths = [(role,) for role in given]
    seen, found = set(given), []
    while paths:
        found += [GrantPath(path, one) for path in paths for one in grants.get(path[-1], ())]
        steps = [(*path, role) for path in paths for role in includes.get(path[-1], ())]
        paths = [path for path in steps if path[-1] not in seen]
        seen |= {path[-1] for path in paths}
    return sorted(found, key=lambda one: (len(one.roles), one.roles, one.permission))


def test_it_yields_every_shortest_path_in_order() -> None:
    """On random graphs, circles included, exactly what looking at every path finds."""
    chosen = random.Random(1)
    names = [f"r{n}" for n in range(9)]
    for _ in range(300):
        includes = {name: chosen.sample(names, chosen.randint(0, 4)) for name in names}
        given = chosen.sample(names, chosen.randint(0, 3))
        grants = {name: ["*", "a:b"][: chosen.randint(1, 2)] for name in chosen.sample(names, 3)}
        assert list(shortest_paths(given, includes, grants)) == brute_force(given, includes, grants)


def test_a_large_graph_takes_a_few_milliseconds() -> None:
    """500 roles in layers of 10 with 4,900 includes have 10^50 shortest paths."""
    layers = [[f"{depth:02}-{n}" for n in range(10)] for depth in range(50)]
    includes = {role: below for layer, below in pairwise(layers) for role in layer}
    grants = {role: ["docs:read"] for role in layers[-1]}
    took = []
    for _ in range(5):
        began = time.perf_counter()
        found = list(islice(shortest_paths(layers[0], includes, grants), 21))
        took.append(time.perf_counter() - began)
    assert len(found) == 21
    assert found[0].roles == tuple(layer[0] for layer in layers)
    assert min(took) < 0.02


def test_many_targets_of_a_large_graph_take_as_long() -> None:
    """What every second role grants is found level by level, without a look at all of them."""
    layers = [[f"{depth:02}-{n}" for n in range(10)] for depth in range(50)]
    includes = {role: below for layer, below in pairwise(layers) for role in layer}
    grants = {layer[0]: ["docs:read"] for layer in layers[::2]}
    began = time.perf_counter()
    found = list(islice(shortest_paths(layers[0], includes, grants), 21))
    assert time.perf_counter() - began < 0.1
    assert [len(one.roles) for one in found] == [1] + [3] * 20


def test_a_chain_longer_than_the_stack_has_its_path() -> None:
    """5,000 roles, each of which includes the next."""
    includes = {f"r{n}": [f"r{n + 1}"] for n in range(5_000)}
    (found,) = shortest_paths(["r0"], includes, {"r5000": ["a:b"]})
    assert len(found.roles) == 5_001
