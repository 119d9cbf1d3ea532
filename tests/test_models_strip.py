import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.book import load_reference
from lib.models import CGSMM, LSMM, ChannelMixing, StripMLP, TokenMixing, strip_mlp
from lib.models.strip import DiagonalPosition


def explicit(layer, maps):
    """Loops over channels, places and taps."""
    if layer.axis == "col":
        maps = maps.transpose(2, 3)
    out = torch.zeros_like(maps)
    inner = layer.channels // layer.groups
    for c in range(layer.channels):
        for h in range(layer.size):
            out[:, c, h] = layer.bias[c % inner]
            for tap in range(layer.width):
                row = h + tap - layer.width // 2
                if 0 <= row < layer.size:
                    out[:, c, h] += maps[:, c, row] @ layer.weight[c % inner, tap]
    return out.transpose(2, 3) if layer.axis == "col" else out


@pytest.mark.parametrize("axis", ["row", "col"])
@pytest.mark.parametrize(("channels", "size", "groups", "width"), [(6, 5, 3, 3), (4, 3, 1, 5), (4, 2, 4, 1)])
def test_strip_layer_equals_loops(axis, channels, size, groups, width):
    layer = StripMLP(channels, size, axis, groups=groups, width=width).double()
    maps = torch.randn(2, channels, size, size, dtype=torch.float64).transpose(2, 3).requires_grad_()
    torch.testing.assert_close(layer(maps), explicit(layer, maps))
    given = torch.randn(2, channels, size, size, dtype=torch.float64)
    variables = (maps, layer.weight, layer.bias)
    mine = torch.autograd.grad((layer(maps) * given).sum(), variables)
    loops = torch.autograd.grad((explicit(layer, maps) * given).sum(), variables)
    torch.testing.assert_close(mine, loops)
    assert layer(maps[:0]).shape == (0, channels, size, size)


def test_strip_layer_equals_the_reference_and_a_grouped_convolution():
    layer = StripMLP(8, 5, groups=2).double()
    maps = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    reference = load_reference("strip-mlp", "strip_rows")(maps, layer.weight, layer.bias)
    torch.testing.assert_close(layer(maps), reference)
    folded = maps.view(3, 2, 4, 5, 5).permute(0, 2, 4, 1, 3).reshape(3, 20, 2, 5)
    kernel = layer.weight.permute(0, 3, 2, 1).reshape(20, 5, 1, 3)
    out = F.conv2d(folded, kernel, layer.bias.flatten(), padding=(0, 1), groups=4)
    torch.testing.assert_close(
        layer(maps), out.view(3, 4, 5, 2, 5).permute(0, 3, 1, 4, 2).reshape(3, 8, 5, 5)
    )


def test_cascade_step_by_step():
    layer = CGSMM(8, 4).double().eval()
    layer.norm.running_mean.normal_()
    maps = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    rows = layer.fuse_row(torch.cat([layer.row(layer.row_position(maps)), maps], 1))
    rows = F.gelu(layer.norm(rows))
    expected = layer.fuse_col(torch.cat([maps, layer.col(layer.col_position(rows))], 1))
    torch.testing.assert_close(layer(maps), expected)
    table = layer.row_position.table
    added = DiagonalPosition.forward(layer.row_position, torch.zeros_like(maps))
    assert torch.equal(added[0, :, 0, 2], table[:, 3 + 2]) and torch.equal(added[0, :, 3, 1], table[:, 3 - 2])


def test_local_mixing_is_a_convex_combination():
    layer = LSMM(6).double()
    maps = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    branches, weights = layer.branches(maps)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 6, dtype=torch.float64))
    torch.testing.assert_close(branches[:, :, 2], maps)
    torch.testing.assert_close(layer(maps), torch.einsum("ncbhw,ncb->nchw", branches, weights))


def test_channel_mixing_against_its_formula_and_on_silent_maps():
    layer = ChannelMixing(4).double()
    nn.init.normal_(layer.gamma), nn.init.normal_(layer.beta)
    maps = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    hidden = F.gelu(layer.widen(layer.norm(layer.spread(maps).permute(0, 2, 3, 1))))
    norms = torch.linalg.vector_norm(hidden, dim=(1, 2), keepdim=True)
    hidden = layer.gamma * hidden * norms / (norms.mean(3, keepdim=True) + 1e-6) + layer.beta + hidden
    torch.testing.assert_close(layer(maps), layer.narrow(hidden).permute(0, 3, 1, 2))
    nn.init.zeros_(layer.widen.weight), nn.init.zeros_(layer.widen.bias)
    layer(maps).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_network_carries_every_merging_to_every_later_stage():
    net = strip_mlp(1, 3, (8, 16, 32, 64), (1, 1, 1, 1), 16, 1).eval()
    assert net(torch.randn(2, 1, 16, 16)).shape == (2, 3)
    assert [len(carriers) for carriers in net.carriers] == [0, 1, 2]
    for merge in net.merges[1:]:  # only the carried path is left
        nn.init.zeros_(merge.weight)
    images = torch.randn(1, 1, 16, 16, requires_grad=True)
    net(images).sum().backward()
    assert images.grad.abs().sum() > 0
    count = sum(parameter.numel() for parameter in strip_mlp(1, 3, (8,), (0,), 4, 2).parameters())
    assert count == 4 * 8 + 2 * 8 + 3 * 8 + 3


def test_drop_path_only_in_training():
    net = strip_mlp(1, 3, (8,), (2,), 4, 1, drop_path=0.5)
    images = torch.randn(4, 1, 4, 4)
    net.eval()
    assert torch.equal(net(images), net(images))
    net.train()
    torch.manual_seed(0)
    one, two = net(images), net(images)
    assert not torch.equal(one, two)
    change = torch.ones(4000, 1, 1, 1)
    dropped = net._drop(change)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and abs(dropped.mean() - 1) < 0.1


@pytest.mark.parametrize("mixers", ["both", "global", "local"])
def test_token_mixing_learns_in_every_part(mixers):
    layer = TokenMixing(16, 4, mixers=mixers)
    layer(torch.randn(2, 16, 4, 4)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StripMLP(6, 4), "groups must divide"),
        (lambda: StripMLP(8, 4, width=2), "odd"),
        (lambda: StripMLP(8, 0), "size must be"),
        (lambda: StripMLP(8, 4, "both"), "axis"),
        (lambda: StripMLP(8, 4)(torch.zeros(1, 8, 5, 5)), "maps must be"),
        (lambda: StripMLP(8, 4)(torch.zeros(8, 4, 4)), "maps must be"),
        (lambda: LSMM(1), "channels"),
        (lambda: TokenMixing(8, 4, mixers="none"), "mixers"),
        (lambda: TokenMixing(9, 4), "even"),
        (lambda: ChannelMixing(4, kernel_size=4), "odd"),
        (lambda: strip_mlp(1, 3, (8, 16), (1,), 8, 2), "one entry"),
        (lambda: strip_mlp(1, 3, (8, 16), (1, 1), 6, 2), "multiple of patch"),
        (lambda: strip_mlp(1, 3, (8, 16, 24), (1, 1, 1), 8, 2), "multiples"),
        (lambda: strip_mlp(1, 3, (8,), (1,), 8, 2, drop_path=1.0), "drop_path"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
