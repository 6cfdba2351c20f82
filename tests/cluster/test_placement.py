"""Placement is a pure function: a table of clusters, and what each site gets there."""

from functools import partial

import pytest

from cluster.placement import ActorOptions, Node, SiteNeeds, plan, preflight, site_resource
from fedsam_core.errors import ClusterError

needs_of = partial(SiteNeeds, cpus=1)

LAPTOP = (Node("laptop", cpus=4),)
WORKSTATION = (Node("ws", cpus=16, gpus=2),)
HOSPITALS = (
    Node("head", cpus=2),
    Node("a", cpus=4, gpus=1, resources={"site_A": 1}),
    Node("b", cpus=4, gpus=0, resources={"site_B": 1}),
)


@pytest.mark.parametrize(
    ("nodes", "needs", "expected"),
    [
        (LAPTOP, needs_of(), {"A": (1, 0, {}), "B": (1, 0, {})}),
        (WORKSTATION, needs_of(cpus=4), {"A": (4, 1, {}), "B": (4, 1, {})}),
        (WORKSTATION, needs_of(gpus=0.5), {"A": (1, 0.5, {}), "B": (1, 0.5, {})}),
        (WORKSTATION, needs_of(gpus=0), {"A": (1, 0, {}), "B": (1, 0, {})}),
        # Fewer GPUs than sites: shares, as equal as they can be.
        ((Node("one", 8, 1),), needs_of(), {"A": (1, 0.5, {}), "B": (1, 0.5, {})}),
        # Pinned: a site has a GPU only if its own node has one.
        (HOSPITALS, needs_of(), {"A": (1, 1, {"site_A": 0.001}), "B": (1, 0, {"site_B": 0.001})}),
        (HOSPITALS, needs_of(pin="never", gpus=0), {"A": (1, 0, {}), "B": (1, 0, {})}),
    ],
)
def test_plan(nodes, needs, expected):
    wanted = plan(["B", "A"], nodes, needs)
    assert list(wanted) == ["A", "B"]
    assert wanted == {site: ActorOptions(*options) for site, options in expected.items()}
    preflight(["B", "A"], nodes, needs)


@pytest.mark.parametrize(
    ("nodes", "needs", "says"),
    [
        ((), needs_of(), ["no living node", "ray start --head"]),
        # 4 CPUs hold one site of 3 CPUs, not two.
        (LAPTOP, needs_of(cpus=3), ["site B needs 3 CPU", "laptop 1 of 4 CPU", "lower cpus"]),
        (LAPTOP, needs_of(gpus=1), ["site A needs", "site B needs", "0 of 0 GPU", "lower gpus"]),
        ((Node("two", 8, 1),), needs_of(gpus=0.6), ["site B needs 1 CPU and 0.6 GPU", "lower gpus"]),
        ((Node("one", 8, 1),), needs_of(gpus=1), ["site B needs", "0 of 1 GPU", "fraction"]),
        # CPUs here and GPUs there do not help a single actor.
        ((Node("c", 8, 0), Node("g", 0, 2)), needs_of(), ["site A needs 1 CPU and 1 GPU on one node"]),
        (LAPTOP, needs_of(pin="always"), ["site A needs the resource site_A", "site_B", "no site_* resource"]),
        # Site B must not land on the node of site A because its own is away.
        (HOSPITALS[:2], needs_of(), ["site B needs the resource site_B", "the cluster has site_A", "--resources"]),
        (HOSPITALS, needs_of(gpus=1), ["site B needs 1 CPU and 1 GPU", "its nodes", "b 4 of 4 CPU and 0 of 0 GPU"]),
    ],
)
def test_preflight_names_what_is_missing(nodes, needs, says):
    with pytest.raises(ClusterError) as caught:
        preflight(["A", "B"], nodes, needs)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message


def test_preflight_names_every_site_that_does_not_fit():
    with pytest.raises(ClusterError) as caught:
        preflight(["A", "B", "C", "D"], HOSPITALS, needs_of())
    assert "site_C" in str(caught.value)
    assert "site_D" in str(caught.value)


def test_a_share_of_a_gpu_does_not_spread_over_two():
    nodes = (Node("ws", cpus=16, gpus=2),)
    preflight("ABCD", nodes, needs_of(gpus=0.5))
    preflight("ABCDEFGHIJ", nodes, needs_of(gpus=0.2))
    preflight("AB", nodes, needs_of(gpus=0.6))
    with pytest.raises(ClusterError, match=r"site C needs 1 CPU and 0\.6 GPU"):
        preflight("ABC", nodes, needs_of(gpus=0.6))
    with pytest.raises(ValueError, match="whole number"):
        needs_of(gpus=1.5)


def test_sites_share_what_gpus_their_own_nodes_have():
    def shares(sites, *nodes):
        preflight(sites, nodes, needs_of())
        return [options.gpus for options in plan(sites, nodes, needs_of()).values()]

    assert shares("ABC", Node("one", 16, 1)) == [0.3333] * 3
    assert shares("ABCDE", Node("two", 16, 2)) == [0.3333] * 5  # three on the first, two on the second
    assert shares("ABC", Node("a", 4, 1), Node("b", 4, 2)) == [1] * 3
    own = Node("ab", 8, 1, {"site_A": 1, "site_B": 1}), Node("c", 8, 1, {"site_C": 1}), Node("head", 2, 4)
    assert shares("ABC", *own) == [0.5, 0.5, 1]
    # Of a site's nodes the most crowded one decides.
    several = Node("one", 8, 1, {"site_A": 1, "site_B": 1, "site_C": 1}), Node("two", 8, 1, {"site_A": 1})
    assert shares("ABC", *several) == [0.3333] * 3
    # A node of its own without a GPU does not take the other's away.
    mixed = Node("a", 4, 1, {"site_A": 1}), Node("a2", 4, 0, {"site_A": 1}), Node("b", 4, 1, {"site_B": 1})
    assert shares("AB", *mixed) == [1, 1]
    for sites in (6, 7, 9, 15):  # finer than Ray's parts: it cuts off
        preflight("ABCDEFGHIJKLMNO"[:sites], (Node("one", 16, 1),), needs_of(gpus=1 / sites))


def test_a_site_id_stands_in_the_resource_as_it_is():
    assert site_resource("site-a") == "site_site-a"
    with pytest.raises(ClusterError, match="cannot name a Ray resource"):
        site_resource("a b")
