"""lib.codec: the contexts of MLICv2, its entropy model and codec, selective maps, token mixing, annealing."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lib import codec
from lib.attention import RoPE2D, linear_softmax_attention
from lib.book import ROOT
from lib.codec.mlic import CONTEXTS, PARTS


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stirred(module, seed=0, size=0.2):
    """All parameters moved at random, so that nothing that starts at zero hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn(p.shape, generator=generator)
    return module


# --- linear softmax attention, rotary positions


def test_linear_softmax_attention_is_a_stochastic_matrix():
    q, k, v = draw(2, 5, 3).double(), draw(2, 7, 3, seed=1).double(), draw(2, 7, 4, seed=2).double()
    matrix = torch.einsum("bic,bjc->bij", q.softmax(2), k.softmax(1))
    assert torch.allclose(matrix.sum(-1), torch.ones(2, 5).double())
    assert torch.allclose(linear_softmax_attention(q, k, v), matrix @ v)
    ones = linear_softmax_attention(q, k, torch.ones_like(v))
    assert torch.allclose(ones, torch.ones_like(ones))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(linear_softmax_attention, inputs)
    with pytest.raises(ValueError, match="do not fit"):
        linear_softmax_attention(q, k, v[:, :3])


def test_rope2d_knows_differences_only():
    rope = RoPE2D(6).double()
    with torch.no_grad():
        rope.log_theta.copy_(torch.tensor([2.0, 3.0]))
    q, k = draw(6).double(), draw(6, seed=1).double()
    Q, K = (rope(x[:, None, None].expand(6, 5, 7)) for x in (q, k))
    for dy, dx in ((1, 0), (0, 2), (2, -3)):
        products = {
            round((Q[:, y, x] @ K[:, y + dy, x + dx]).item(), 9) for y in range(3) for x in range(3, 5)
        }
        assert len(products) == 1
    assert torch.allclose(Q.norm(dim=0), q.norm().expand(5, 7))
    # neither diagonal is blind
    steps = [(Q[:, 1, 1] @ K[:, 1 + i, 1 + j]).item() for i, j in ((0, 0), (1, 1), (1, -1), (-1, 1))]
    assert len({round(s, 6) for s in steps}) == 4
    rope(draw(6, 2, 2).double()).square().sum().backward()
    Q[0].sum().backward()
    assert (rope.log_theta.grad != 0).all()
    for bad in (3, 0):
        with pytest.raises(ValueError, match="even"):
            RoPE2D(bad)
    with pytest.raises(ValueError, match="must be"):
        rope(draw(4, 2, 2))


# --- contexts: what may and what may not be read


def reads(function, x):
    """Which entries of x (1, c, h, w) the output depends on, and which of its places depend on x."""
    x = x.clone().requires_grad_()
    out = function(x)
    grad = torch.autograd.grad(out.square().sum(), x)[0]
    return grad.abs().sum((0, 1)) > 0


def test_contexts_read_what_they_may():
    board = codec.checkerboard(6, 4)
    previous, current, hyper = draw(1, 3, 6, 4), codec.keep(draw(1, 3, 6, 4, seed=1), 0), draw(1, 8, 6, 4)
    inter = stirred(codec.LinearGlobalInter(3, 3))
    assert inter(previous).shape == (1, 6, 6, 4) and reads(inter, previous).all()
    intra = stirred(codec.LinearGlobalIntra(3))
    out = intra(previous, current)
    assert out.shape == (1, 6, 6, 4)
    assert reads(lambda x: intra(x, current), previous).all()
    assert reads(lambda x: intra(previous, codec.keep(x, 0)), current)[board].all()
    for parity in (0, 1):
        hgcp = stirred(codec.HGCP(8, 3, parity))
        arguments = () if parity == 0 else (current,)
        assert hgcp(hyper, *arguments).shape == (1, 6, 6, 4)
        assert reads(lambda x, h=hgcp, a=arguments: h(x, *a), hyper).all()
        with pytest.raises(ValueError, match="anchors"):
            hgcp(hyper, *(() if parity else (current,)))
    assert reads(lambda x: hgcp(hyper, codec.keep(x, 0)), current)[board].all()


def test_global_intra_against_the_explicit_matrix():
    intra = stirred(codec.LinearGlobalIntra(3, dim=4, heads=1)).double()
    previous = draw(1, 3, 4, 4).double()
    anchors = codec.keep(draw(1, 3, 4, 4, seed=1).double(), 0)
    q = codec.squeeze(intra.query(codec.keep(previous, 1)), 1)[0]
    k = codec.squeeze(intra.key(codec.keep(previous, 0)), 0)[0]
    v = codec.squeeze(intra.value(anchors), 0)[0]
    matrix = q.softmax(0).T @ k.softmax(1)  # (non-anchors, anchors)
    assert torch.allclose(matrix.sum(1), torch.ones(8).double())
    expected = intra.out(codec.unsqueeze((v @ matrix.T)[None], 1, 4, 4))
    assert torch.allclose(intra(previous, anchors), expected)


@pytest.mark.parametrize("rope", [False, True])
def test_local_window(rope):
    local = stirred(codec.LocalWindowContext(3, rope=rope))
    anchors = codec.keep(draw(1, 3, 7, 8), 0)
    out = local(anchors)
    assert out.shape == (1, 6, 7, 8) and (out[..., codec.checkerboard(7, 8)] == 0).all()
    # the place (3, 3) is no anchor: it reads the 12 anchors within two steps, and no other place
    x = anchors.clone().requires_grad_()
    grad = torch.autograd.grad(local(x)[0, :, 3, 3].square().sum(), x)[0]
    read = grad[0].abs().sum(0) > 0
    expected = torch.zeros(7, 8, dtype=torch.bool)
    expected[1:6, 1:6] = codec.checkerboard(7, 8)[1:6, 1:6]
    inside = read & codec.checkerboard(7, 8)
    assert (inside == expected).all() and expected.sum() == 12
    assert torch.isfinite(local(torch.zeros(1, 3, 1, 1))).all()
    with pytest.raises(ValueError, match="odd"):
        codec.LocalWindowContext(3, window=4)


def test_reweighting_starts_as_the_identity_and_does_not_stay():
    weigh = codec.ContextReweighting(6)
    x = draw(2, 6, 3, 4)
    assert torch.equal(weigh(x), x)
    stirred(weigh)
    q, k, v = weigh.qkv(x).flatten(2).chunk(3, 1)
    u = x + weigh.mix(((q @ k.mT / 12**0.5).softmax(-1) @ v).view_as(x))
    assert torch.allclose(weigh(x), u + weigh.strength * torch.sigmoid(weigh.gate.net(u)) * u)


def test_token_mixing_starts_as_the_identity():
    for block in (codec.SimpleTokenMixing(5), codec.ResidualConvolutions(5)):
        x = draw(2, 5, 6, 7)
        assert torch.equal(block(x), x)
        assert not torch.allclose(stirred(block)(x), x)
        block(x).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in block.parameters())


# --- the entropy model


def small(parts=PARTS[1:], contexts=CONTEXTS, seed=0):
    torch.manual_seed(seed)
    model = codec.MultiReferenceEntropyModel(8, 2, hyper=16, parts=parts, contexts=contexts)
    model.spread.fill_(0.2)  # scales around the threshold of the selective maps
    return stirred(model, seed, 0.1).requires_grad_(False)


def test_nothing_is_read_before_it_is_decoded():
    """Change one latent: nothing that is coded before it, and in the same pass, may change."""
    model = small(parts=("hgcp", "cr", "rope"))
    y, hyper = 3 * draw(1, 8, 4, 4), draw(1, 16, 4, 4, seed=1)
    order = torch.zeros(8, 4, 4)
    for i in range(2):
        order[4 * i : 4 * i + 4] = 2 * i + (~codec.checkerboard(4, 4)).float()
    _, means, scales = model(y, hyper)
    for channel, row, column in ((0, 0, 1), (1, 1, 1), (5, 2, 1), (7, 2, 2)):
        changed = y.clone()
        changed[0, channel, row, column] += 5
        _, means2, scales2 = model(changed, hyper)
        same = (means == means2)[0] & (scales == scales2)[0]
        assert same[order <= order[channel, row, column]].all()
        if order[channel, row, column] < 3:
            assert not same[order > order[channel, row, column]].any()


@pytest.mark.parametrize("parts", [(), PARTS[1:]])
def test_symbols_come_back(parts):
    model = small(parts)
    y, hyper = 2 * draw(1, 8, 4, 6), draw(1, 16, 4, 6, seed=1)
    encoder = codec.SymbolEncoder()
    decoded = model.encode(y, hyper, encoder)
    decoder = codec.SymbolDecoder(encoder.finish())
    assert torch.equal(model.decode(hyper, decoder), decoded) and decoder.is_finished()
    straight, means, scales = model(y, hyper)
    assert torch.allclose(straight, decoded, atol=1e-5)
    if parts:
        skipped = scales == 0
        assert 0 < skipped.sum() < skipped.numel()


def test_widen_computes_the_same():
    narrow, wide = small((), ("channel",), 1), small(("hgcp", "cr", "gsc"), CONTEXTS, 2)
    for module in wide.modules():  # reweighting starts as the identity
        if isinstance(module, codec.ContextReweighting):
            for part in (module.strength, module.mix.weight, module.mix.bias):
                part.zero_()
    wide.widen(narrow)
    y, hyper = draw(2, 8, 4, 4), draw(2, 16, 4, 4, seed=1)
    wide.selective = torch.nn.ModuleList()
    for a, b in zip(narrow(y, hyper), wide(y, hyper), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="same"):
        wide.widen(codec.MultiReferenceEntropyModel(8, 4, hyper=16))


def test_entropy_model_rejects():
    with pytest.raises(ValueError, match="unknown.*stm"):
        codec.MultiReferenceEntropyModel(8, 2, hyper=16, parts=("stm",))
    with pytest.raises(ValueError, match="gsc"):
        small(()).selection_loss(draw(1, 8, 4, 4), draw(1, 16, 4, 4))


# --- selective maps


def test_selective_map():
    scale = torch.tensor([0.11, 0.29, 0.31, 1.0, 5.0]).view(1, 5, 1, 1)
    expected = 2 * norm.sf(0.5 / scale.numpy())
    assert np.allclose(codec.chance_of_nonzero(scale), expected, atol=1e-6)
    select = codec.SelectiveMap(3, 5)
    logits = select(draw(1, 3, 1, 1), torch.zeros_like(scale), scale)
    assert select.coded(logits).flatten().tolist() == [False, False, True, True, True]


def test_selection_loss_is_cross_entropy():
    model = small()
    y, hyper = draw(1, 8, 4, 4), draw(1, 16, 4, 4, seed=1)
    _, means, _ = model(y, hyper)
    chances = torch.zeros_like(y)
    rows = []

    def observe(i, parity, mean, logits):
        rows.append(codec.keep(torch.sigmoid(logits), parity))

    model.walk(hyper, lambda i, p, m, s: torch.round(y.chunk(2, 1)[i] - m) + m, observe=observe)
    chances = torch.cat([rows[0] + rows[1], rows[2] + rows[3]], 1)
    nonzero = torch.round(y - means) != 0
    expected = -torch.where(nonzero, chances, 1 - chances).log().mean()
    assert torch.allclose(model.selection_loss(y, hyper), expected, atol=1e-5)


# --- the codec


def test_files_come_back_in_another_process(tmp_path):
    torch.manual_seed(0)
    model = codec.MLICv2(8, 8, 2, heads=(2, 2, 2)).requires_grad_(False)
    images = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 128)
    codec.principal_start(model.analysis, model.synthesis, images[0])
    stirred(model.entropy, size=0.05)
    files = [model.encode(x[0, :, :50], 1) for x in images]
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for i, (file, _) in enumerate(files):
        (tmp_path / f"{i}.bin").write_bytes(file)
    program = f"""
import torch
from pathlib import Path
from lib import codec
folder = Path({str(tmp_path)!r})
model = codec.MLICv2(8, 8, 2, heads=(2, 2, 2)).requires_grad_(False)
model.load_state_dict(torch.load(folder / "model.pt"))
torch.save([model.decompress((folder / f"{{i}}.bin").read_bytes()) for i in range(2)], folder / "images.pt")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    for image, (_, shown) in zip(torch.load(tmp_path / "images.pt"), files, strict=True):
        assert torch.equal(image, shown)
    out = model(torch.nn.functional.pad(images[0][:, :, :50], (0, 0, 0, 14), mode="replicate"), 1)
    stream = 8 * len(codec.unpack(files[0][0]).streams[0])
    assert abs(stream - (out.latent_bits + out.hyper_bits).item()) < 0.03 * stream + 32


def test_adopt():
    torch.manual_seed(0)
    other = codec.s2lic(8, 8, 2, heads=(2, 2, 2))
    model = codec.MLICv2(8, 8, 2, heads=(2, 2, 2), parts=())
    model.adopt(other)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.latents(x, 2), other.latents(x, 2))
    with pytest.raises(ValueError, match="same"):
        codec.MLICv2(8, 16, 2, heads=(2, 2, 2)).adopt(other)


def test_entropy_ladder():
    torch.manual_seed(0)
    base = codec.s2lic(8, 8, 2, heads=(2, 2, 2)).requires_grad_(False)
    latents = draw(4, 8, 4, 4)
    configs = {"a": {"parts": (), "contexts": ()}, "b": {"parts": ("hgcp",), "contexts": CONTEXTS}}
    rungs = codec.entropy_ladder(base, latents, latents, configs, root="a", steps=(2, 2), progress=False)
    for rung in rungs.values():
        y = base.log_gain[3].exp().view(-1, 1, 1) * latents
        _, bits, hyper_bits = rung.model.code(y)
        total = codec.held_out_bits(rung.model, latents, [3]).sum() * 4 * 16
        assert torch.allclose(total, (bits + hyper_bits).sum(), rtol=1e-4)
    with pytest.raises(ValueError, match="root"):
        codec.entropy_ladder(base, latents, latents, configs, root="c")


# --- annealing


def test_rounding_chances_against_numpy():
    v, tau = torch.tensor([0.2, 1.7, -0.4, 3.0]).double(), 0.5
    floor = np.floor(v.numpy())
    down, up = (np.exp(-np.arctanh(np.minimum(d, 1 - 1e-4)) / tau) for d in (v - floor, 1 - (v - floor)))
    assert np.allclose(codec.rounding_logits(v, tau).softmax(-1)[:, 1], up / (down + up), atol=1e-6)
    many = v.expand(20_000, 4)
    sample = codec.gumbel_round(many, tau, torch.Generator().manual_seed(0))
    frequency = (sample - torch.from_numpy(floor) > 0.5).double().mean(0)
    assert np.allclose(frequency, up / (down + up), atol=0.015)  # the larger of two is the Gumbel-max sample
    cold = codec.gumbel_round(many[:50], 1e-3, torch.Generator().manual_seed(0))
    assert torch.allclose(cold, torch.round(many[:50]), atol=1e-3)
    with pytest.raises(ValueError, match="tau"):
        codec.gumbel_round(v, 0)


def test_rounding_has_a_gradient_and_a_schedule():
    v = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    sample = lambda v: codec.gumbel_round(v, 0.4, torch.Generator().manual_seed(1))  # noqa: E731
    grad = torch.autograd.grad(sample(v)[:2].sum(), v)[0]
    numeric = (sample(v + 1e-6) - sample(v - 1e-6)) / 2e-6
    assert torch.allclose(grad[:2], numeric[:2], rtol=1e-4) and (grad[:2] > 0).all()
    assert codec.annealed_temperature(0, 2000) == codec.annealed_temperature(700, 2000) == 0.5
    assert math.isclose(codec.annealed_temperature(1700, 2000), 0.5 * math.exp(-1))


@pytest.mark.parametrize("method", ["gumbel", "straight-through"])
def test_refinement_leaves_the_model_alone_and_lowers_the_cost(method):
    torch.manual_seed(0)
    model = codec.s2lic(8, 8, 2, heads=(2, 2, 2)).requires_grad_(False)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), (64, 64), mode="bicubic")[0].clamp(0, 1)
    codec.principal_start(model.analysis, model.synthesis, image[None])

    def fingerprint():
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.state_dict().values())).hexdigest()

    before = fingerprint()
    generator = torch.Generator().manual_seed(0)
    found = codec.sga_refine(model, image, 3, steps=15, lr=0.03, method=method, generator=generator)
    assert fingerprint() == before and found.history.shape == (15, 3)
    file, shown = model.encode_latents(found.y, found.z, 3, (64, 64))
    assert torch.equal(model.decompress(file), shown)
    cost = found.history[:, 0] + model.lambdas[3] * 255**2 * found.history[:, 1]
    assert cost[-3:].mean() < cost[:3].mean()
    y = model.latents(image[None], 3)
    z = model.hyper_analysis(y / model.entropy.spread)
    plain, shown = model.encode_latents(y, z, 3, (64, 64))
    assert (plain, True) == (model.encode(image, 3)[0], torch.equal(shown, model.encode(image, 3)[1]))


def test_annealing_rejects():
    model = codec.s2lic(8, 8, 2, heads=(2, 2, 2))
    with pytest.raises(ValueError, match="method"):
        codec.sga_refine(model, torch.rand(3, 64, 64), method="none")
    with pytest.raises(ValueError, match="divisible"):
        codec.sga_refine(model, torch.rand(3, 60, 64))
    with pytest.raises(ValueError, match="do not fit"):
        model.encode_latents(draw(1, 8, 4, 4), draw(1, 8, 2, 2), 0, (64, 64))


# --- gradients: nothing on the way to the inputs and the parameters is cut


@pytest.mark.parametrize(
    "make, channels",
    [
        (lambda: codec.multi_reference.ConvolutionalContext(3, 2, hidden=4), (3,)),
        (lambda: codec.multi_reference.LinearGlobalInter(3, 2, dim=4), (3,)),
        (lambda: codec.multi_reference.LinearGlobalIntra(2, dim=4), (2, 2)),
        (lambda: codec.multi_reference.HGCP(3, 2, 0, dim=4), (3,)),
        (lambda: codec.multi_reference.HGCP(3, 2, 1, dim=4), (3, 2)),
        (lambda: codec.multi_reference.LocalWindowContext(2, window=3, dim=4), (2,)),
        (lambda: codec.multi_reference.LocalWindowContext(2, window=3, dim=8, rope=True), (2,)),
        (lambda: codec.multi_reference.ContextReweighting(3), (3,)),
        (lambda: codec.context.ChannelContext(3, 2, hidden=4), (3,)),
        (lambda: codec.context.LocalContext(2, kernel=3), (2,)),
    ],
)
def test_gradients_of_the_contexts(make, channels):
    torch.manual_seed(0)
    module = stirred(make().double())
    inputs = [draw(1, c, 4, 4, seed=i).double().requires_grad_() for i, c in enumerate(channels)]
    parameters = dict(module.named_parameters())

    def out(*tensors):
        named = dict(zip(parameters, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(module, named, tensors[: len(inputs)])

    assert torch.autograd.gradcheck(out, (*inputs, *parameters.values()), fast_mode=True)
