"""lib.data.context: a graph counted by networkx, and the moments of the denoising task."""

import networkx
import pytest
import torch

from lib.data import graph_transitions, relevance_denoising


def test_transitions_are_those_of_the_random_walk():
    graph = networkx.karate_club_graph()
    walk = graph_transitions(list(graph.edges), len(graph))
    adjacency = torch.tensor(networkx.to_numpy_array(graph, weight=None), dtype=torch.float32)
    torch.testing.assert_close(walk, adjacency / adjacency.sum(1, keepdim=True))
    with pytest.raises(ValueError, match="different nodes in 0..2"):
        graph_transitions([(0, 3)], 3)
    with pytest.raises(ValueError, match="different nodes"):
        graph_transitions([(1, 1)], 3)
    with pytest.raises(ValueError, match="every node needs an edge, 2 has none"):
        graph_transitions([(0, 1)], 3)


def test_denoising_contexts():
    generator = torch.Generator().manual_seed(0)
    x, u, relevant = relevance_denoising(6000, 8, 5, noise=0.5, generator=generator)
    assert x.shape == (6000, 8, 5) and u.shape == (6000, 4) and relevant.shape == (6000, 8)
    assert torch.equal(relevant, x[..., 0].abs() > 0.6745)
    assert relevant.float().mean().item() == pytest.approx(0.5, abs=0.01)
    error = (x[..., 1:] - u[:, None])[relevant]
    assert error.mean().item() == pytest.approx(0, abs=0.02)
    assert error.std().item() == pytest.approx(0.5, abs=0.01)
    other = x[..., 1:][~relevant]
    assert other.std().item() == pytest.approx(1.25**0.5, abs=0.02)
    product = (x[..., 1:] * u[:, None])[~relevant].mean().item()
    assert product == pytest.approx(0, abs=0.02)
    again = relevance_denoising(6000, 8, 5, noise=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0], x)
    with pytest.raises(ValueError, match="dim at least 2"):
        relevance_denoising(3, dim=1)
