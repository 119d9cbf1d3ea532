"""The compact network: shapes, its skip block, size."""

import pytest
import torch

from lib.models import InvertedResidual, MobileNet, SkipBlock


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("size, maps", [((16, 16), (4, 4)), ((15, 9), (4, 3)), ((1, 1), (1, 1))])
def test_shapes(skip, size, maps):
    model = MobileNet(3, 7, skip=skip, in_channels=2).eval()
    images = torch.rand(5, 2, *size)
    last = model.maps(images)
    assert last.shape == (5, 12, *maps) and (last >= 0).all()
    torch.testing.assert_close(model(images), model.classify(last))
    torch.testing.assert_close(model.classify(last), model.head(last.flatten(2).mean(2)))
    assert model(images).shape == (5, 7)


def test_every_parameter_has_a_gradient():
    model = MobileNet(2, 3, skip=True)
    model(torch.rand(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_skip_block_is_the_only_difference():
    models = []
    for skip in (False, True):
        torch.manual_seed(0)
        models.append(MobileNet(8, 10, skip=skip))
    plain, skipped = (model.state_dict() for model in models)
    assert models[0].skip is None
    assert all(torch.equal(skipped[name], value) for name, value in plain.items())
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    # expansion to 48 channels, depthwise 3 x 3, projection to 16, a normalisation after each
    assert sizes[1] - sizes[0] == 8 * 48 + 9 * 48 + 48 * 16 + 2 * (48 + 48 + 16)
    assert 2500 < sizes[0] < 3500


def test_skip_block():
    block = SkipBlock(3, 5, 2).eval()
    early = torch.rand(2, 3, 8, 6)
    pooled = early.unflatten(3, (3, 2)).unflatten(2, (4, 2)).mean((3, 5))
    torch.testing.assert_close(block(early, (4, 3)), block.core(pooled))
    assert not block.core.residual and sum(isinstance(m, torch.nn.ReLU) for m in block.modules()) == 2


def test_skip_block_carries_the_early_maps():
    """With the deep path silenced the last maps still depend on the image."""
    torch.manual_seed(0)
    images = torch.rand(2, 1, 16, 16)
    for skip, depends in ((True, True), (False, False)):
        model = MobileNet(4, 3, skip=skip).eval()
        torch.nn.init.zeros_(model.late.layers[-1].weight)
        assert torch.allclose(*model.maps(images)) != depends


def test_inverted_residual():
    block = InvertedResidual(4, 4, 2)
    torch.nn.init.zeros_(block.layers[-1].weight)
    images = torch.rand(3, 4, 5, 5)
    torch.testing.assert_close(block(images), images)  # a silent block is the identity
    assert InvertedResidual(4, 6, 2, 2)(images).shape == (3, 6, 3, 3)
    assert not InvertedResidual(4, 6, 2).residual


@pytest.mark.parametrize("arguments", [(0, 10), (4, 0)])
def test_bad_input(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        MobileNet(*arguments)
