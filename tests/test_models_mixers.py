"""lib.models.mixers against the systems of lib.attention.dsf, and lib.data.mqar."""

import pytest
import torch
import torch.nn.functional as F

from lib.attention import dsf
from lib.data import mqar
from lib.models import MIXERS, MixerLM, SequenceMixer

DIM, EXPANSION = 4, 3


def as_system(mixer, u):
    """The mixer's own projections, without their bias, as a System; the output matrix is applied by the caller."""
    parts = mixer.project.weight.split(mixer.sizes)
    if mixer.kind == "linear":
        return dsf.from_linear_attention(u, *parts)
    if mixer.kind == "normalized":
        return dsf.from_normalized_attention(u, *parts[:3], parts[3][0])
    if mixer.kind == "qlstm_coupled":
        return dsf.from_qlstm(u, None, parts[1], parts[2], parts[0], forget="coupled")
    if mixer.kind in ("qlstm", "qlstm_reversed"):
        forget = "sigmoid" if mixer.kind == "qlstm" else "reversed"
        power = 1.0 if mixer.kind == "qlstm" else mixer.power.item()
        return dsf.from_qlstm(u, parts[3], parts[1], parts[2], parts[0], forget=forget, power=power)
    return None


@pytest.mark.parametrize("kind", ["linear", "normalized", "qlstm", "qlstm_reversed", "qlstm_coupled"])
def test_mixer_equals_its_system(kind):
    torch.manual_seed(0)
    mixer, u = SequenceMixer(kind, DIM, EXPANSION).double(), torch.randn(2, 6, DIM, dtype=torch.float64)
    with torch.no_grad():
        mixer.project.bias.zero_()
        if kind == "qlstm_reversed":
            mixer.power.fill_(0.4)
        torch.testing.assert_close(mixer(u), as_system(mixer, u).scan(u) @ mixer.out.weight.T)


@pytest.mark.parametrize("kind", ["s6", "ssd"])
def test_state_space_mixer_equals_its_system(kind):
    torch.manual_seed(0)
    mixer, u = SequenceMixer(kind, DIM, EXPANSION).double(), torch.randn(2, 6, DIM, dtype=torch.float64)
    with torch.no_grad():
        mixer.project.bias.zero_()
        c, b, value, delta = mixer.project.weight.split(mixer.sizes)
        value.copy_(torch.eye(DIM))  # the systems of the paper read u itself
        if kind == "s6":
            system = dsf.from_s6(u, delta, mixer.log_a, b, c)
        else:
            system = dsf.from_ssd(u, delta[0], mixer.log_a[0, 0], b, c)
        torch.testing.assert_close(mixer(u), system.scan(u) @ mixer.out.weight.T)


@pytest.mark.parametrize("kind", MIXERS)
def test_mixers_are_causal_and_trainable(kind):
    torch.manual_seed(1)
    model = MixerLM(9, kind, DIM, EXPANSION)
    tokens = torch.randint(9, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 9
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 8, 9)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    F.cross_entropy(before.flatten(0, 1), tokens.flatten()).backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
    )


def test_mixer_rejects():
    with pytest.raises(ValueError, match="kind must be"):
        SequenceMixer("lstm", 4, 2)
    with pytest.raises(ValueError, match="normalizer must be"):
        SequenceMixer("normalized", 4, 2, normalizer="tanh")


def test_convolution_can_be_left_out():
    assert MixerLM(9, "linear", 4, 2, convolution=False).convolution is None


@pytest.mark.parametrize("vocabulary, length, pairs", [(32, 32, 4), (11, 16, 4), (8, 9, 1)])
def test_mqar_targets_are_the_values_of_the_keys(vocabulary, length, pairs):
    tokens, targets = mqar(vocabulary, length, pairs, 20, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (20, length) and 0 <= tokens.min() and tokens.max() < vocabulary
    half = vocabulary // 2
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        memory = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(memory) == pairs == len(set(memory.values()))
        assert all(0 < key < half <= value for key, value in memory.items())
        asked = [place for place, value in enumerate(wanted) if value != -100]
        assert sorted(row[place] for place in asked) == sorted(memory)
        assert all(place >= 2 * pairs and memory[row[place]] == wanted[place] for place in asked)
        assert all(row[place] == 0 for place in range(2 * pairs, length) if place not in asked)


def test_mqar_filler_and_rejections():
    tokens, _ = mqar(32, 32, 4, 50, torch.Generator().manual_seed(0), random_filler=True)
    assert (tokens[:, 8:] == 0).float().mean() < 0.1
    for arguments, message in [((8, 32, 4, 1), "pairs"), ((32, 15, 4, 1), "length")]:
        with pytest.raises(ValueError, match=message):
            mqar(*arguments)
    with pytest.raises(ValueError, match="power"):
        mqar(32, 32, 4, 1, power=0.0)
