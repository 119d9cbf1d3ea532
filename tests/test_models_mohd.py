"""lib.models.mohd against dense masked computation in float64, explicit matrices and nn.Linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.book import load_reference
from lib.models import GPT, BlockDiagonal, MoHDFFN, MoHDLinear, Monarch, balance_loss, route_groups


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_route_by_hand():
    # softmax of the logarithms of 1, 4, 3, 2 (of 10): the shared group 0 stays although it is the smallest
    x = torch.tensor([[1.0, 4.0, 3.0, 2.0], [4.0, 1.0, 2.0, 3.0]]).log()
    gate, loss = route_groups(x, torch.eye(4), 1, 2)
    assert torch.allclose(gate, torch.tensor([[0.1, 0.4, 0, 0], [0.4, 0, 0, 0.3]]))
    p = (torch.tensor([4.0, 3, 2]) / 9 + torch.tensor([1.0, 2, 3]) / 6) / 2
    assert loss.item() == pytest.approx(3 * (p[0] + p[2]).item() / 2)
    _, raw = route_groups(x, torch.eye(4), 1, 2, renormalise=False)
    assert raw.item() == pytest.approx(3 * (0.25 + 0.25) / 2)


def test_route_at_the_ends():
    x, centroids = torch.randn(2, 5, 3), torch.randn(6, 3)
    everything, _ = route_groups(x, centroids, 0, 6)
    assert torch.allclose(everything.sum(-1), torch.ones(2, 5))
    gate, loss = route_groups(x, centroids, 4, 4)
    assert loss == 0 and (gate[..., 4:] == 0).all() and (gate[..., :4] > 0).all()
    _, loss = route_groups(x, torch.zeros(6, 3), 2, 5)  # even probabilities
    assert loss.item() == pytest.approx(3)
    for shared, active in ((-1, 2), (3, 2), (0, 7), (0, 0)):
        with pytest.raises(ValueError, match="counts"):
            route_groups(x, centroids, shared, active)
    with pytest.raises(ValueError, match="centroids"):
        route_groups(x, centroids[:, :2], 1, 2)


def test_monarch_is_the_product_of_kronecker_blocks_and_permutations():
    layer = Monarch(12, 3, 4).double()
    first, second = torch.block_diag(*layer.first), torch.block_diag(*layer.second)
    swap = torch.zeros(12, 12, dtype=torch.float64)
    for outer in range(4):
        for inner in range(3):
            swap[inner * 4 + outer, outer * 3 + inner] = 1
    expected = swap.T @ second @ swap @ first
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ expected.T)
    assert torch.allclose(layer.matrix(), expected)
    assert (expected != 0).all() and not (torch.block_diag(*layer.first)[:3, 3:] != 0).any()
    assert torch.autograd.gradcheck(layer, x[:1, :2].clone().requires_grad_())
    with pytest.raises(ValueError, match="b1"):
        Monarch(12, 5, 2)


def test_block_diagonal_mixes_inside_its_groups_only():
    layer = BlockDiagonal(12, 3).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ torch.block_diag(*layer.blocks).T)
    with pytest.raises(ValueError, match="multiple"):
        BlockDiagonal(12, 5)


def test_everything_on_and_an_even_router_is_a_linear_layer():
    layer = MoHDLinear(5, 12, 4, 1, 4, None)
    nn.init.zeros_(layer.centroids)
    x = torch.randn(3, 5)
    assert torch.allclose(layer(x), F.linear(x, layer.weight), atol=1e-6)


@pytest.mark.parametrize("fusion", ["monarch", "blockdiag", None])
@pytest.mark.parametrize("shared, active", [(0, 2), (2, 2), (1, 3), (4, 4)])
@pytest.mark.parametrize("scaling, unit_shared", [(True, False), (False, False), (True, True)])
def test_gathered_is_masked_is_the_reference(fusion, shared, active, scaling, unit_shared):
    x = torch.randn(2, 7, 5, dtype=torch.float64).mT.contiguous().mT.requires_grad_()
    ffn = MoHDFFN(
        5, 12, 4, shared, active, fusion, scaling, activation="gelu", unit_shared=unit_shared
    ).double()
    for layer, linear in ((ffn.up, ffn.up), (ffn, ffn.up)):
        found = []
        for gather in (False, True):
            linear.gather = gather
            y = layer(x)
            parameters = [x, *layer.parameters()]
            grads = torch.autograd.grad(
                y.square().sum() + linear.auxiliary, parameters, materialize_grads=True
            )
            found.append([y, linear.auxiliary, *grads])
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))
    if not unit_shared and scaling:
        reference = load_reference("mixture-of-hidden-dimensions", "mohd")
        y, auxiliary = reference(x, ffn.up.weight, ffn.up.centroids, shared, active)
        assert torch.allclose(ffn.up.fusion(y) if fusion else y, ffn.up(x))
        assert torch.allclose(auxiliary, ffn.up.auxiliary)
    if fusion == "monarch":
        reference = load_reference("mixture-of-hidden-dimensions", "monarch")
        y = torch.randn(3, 12, dtype=torch.float64)
        assert torch.allclose(reference(y, ffn.up.fusion.first, ffn.up.fusion.second), ffn.up.fusion(y))


def test_gathered_reads_only_the_active_rows():
    for fusion in (None, "blockdiag"):
        ffn = MoHDFFN(5, 12, 4, 1, 2, fusion, gather=True)
        x = torch.randn(1, 5)
        expected = ffn(x)
        gate, _ = route_groups(x, ffn.up.centroids, 1, 2)
        off = (gate[0] == 0).repeat_interleave(3)
        ffn.up.weight.data[off] = torch.nan
        ffn.down.weight.data[:, off] = torch.nan
        assert torch.equal(ffn(x), expected)
        ffn.up.gather = False
        assert ffn(x).isnan().all()


def test_activated_parameters_are_those_with_a_gradient():
    for fusion in (None, "blockdiag", "monarch"):
        ffn = MoHDFFN(5, 12, 4, 1, 2, fusion)
        ffn(torch.randn(1, 5)).square().sum().backward()
        used = sum((p.grad != 0).sum().item() for p in ffn.parameters())
        assert used == ffn.activated_parameters()


def test_scaling_and_unit_gates():
    layer = MoHDLinear(5, 12, 4, 1, 2, None).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    gate, _ = route_groups(x, layer.centroids, 1, 2)
    gain, _ = layer.gains(x)
    assert torch.allclose(gain, gate * 4 * gate.sum(-1, keepdim=True))
    layer.unit_shared = True
    unit, _ = layer.gains(x)
    assert (unit[:, 0] == 1).all() and torch.equal(unit[:, 1:], gain[:, 1:])


def test_in_a_language_model_with_a_cache_and_the_balance_loss():
    model = GPT(
        9,
        8,
        dim=16,
        depth=2,
        num_heads=2,
        mlp=lambda dim, activation: MoHDFFN(dim, 4 * dim, 8, 2, 4, activation=activation),
    )
    model.blocks[1].attention.out = MoHDLinear(16, 16, 4, 1, 2)
    with pytest.raises(ValueError, match="called"):
        balance_loss(model)
    tokens = torch.randint(9, (3, 8))
    logits = model(tokens)
    layers = [model.blocks[0].mlp.up, model.blocks[1].mlp.up, model.blocks[1].attention.out]
    assert balance_loss(model).item() == pytest.approx(sum(layer.auxiliary.item() for layer in layers))
    (logits.square().mean() + balance_loss(model)).backward()
    assert all(layer.centroids.grad.abs().sum() > 0 for layer in layers)
    cache, pieces = model.start(3), []
    for token in tokens.unbind(1):
        out, cache = model.step(token, cache)
        pieces.append(out)
    assert torch.allclose(torch.stack(pieces, 1), logits, atol=1e-5)
    with pytest.raises(ValueError, match="called"):
        balance_loss(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"hidden": 13}, "multiple"),
        ({"shared": 3}, "counts"),
        ({"active": 9}, "counts"),
        ({"fusion": "dense"}, "fusion"),
        ({"activation": "sigmoid"}, "activation"),
    ],
)
def test_bad_input(bad, message):
    good = {"dim": 5, "hidden": 12, "groups": 4, "shared": 1, "active": 2}
    with pytest.raises(ValueError, match=message):
        MoHDFFN(**(good | bad))
