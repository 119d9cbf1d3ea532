"""lib.codec: coder, likelihoods, checkerboard, container, contexts, transforms, metrics, and the whole codec."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from skimage.io import imread
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lib import codec
from lib.book import ROOT
from lib.codec.slices import SliceEntropyModel
from lib.codec.transforms import to_windows
from lib.data import photographs


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- tables and coder


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50).filter(lambda p: sum(p) > 0))
def test_integer_frequencies(p):
    f = codec.integer_frequencies(p)
    assert f.sum() == 2**16 and f.min() >= 1
    assert np.abs(f / 2**16 - np.array(p) / sum(p)).max() <= (len(p) + 1) / 2**16


def test_integer_frequencies_reject():
    for bad in ([], [0.0], [-1.0, 2.0], [math.nan], [[1.0]]):
        with pytest.raises(ValueError, match="probabilities"):
            codec.integer_frequencies(bad)
    with pytest.raises(ValueError, match="do not fit"):
        codec.integer_frequencies(np.ones(5), precision=2)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-(2**31) + 1, 2**31 - 1) | st.integers(-5, 5), st.integers(0, 63)), max_size=60
    )
)
def test_any_symbols_come_back(pairs):
    symbols, indexes = (np.array([p[i] for p in pairs], dtype=np.int64) for i in (0, 1))
    tables, encoder = codec.gaussian_tables(), codec.SymbolEncoder()
    half = len(pairs) // 2
    encoder.push(symbols[:half], indexes[:half], tables)
    encoder.push(symbols[half:], indexes[half:], tables)
    stream = encoder.finish()
    assert stream == encoder.finish()
    decoder = codec.SymbolDecoder(stream)
    assert (decoder.pull(indexes[:half], tables) == symbols[:half]).all()
    assert (decoder.pull(indexes[half:], tables) == symbols[half:]).all()
    assert decoder.is_finished()
    assert tables.bits(symbols, indexes) - 1 <= 8 * len(stream) <= tables.bits(symbols, indexes) * 1.01 + 64


def test_coder_rejects():
    tables, encoder = codec.gaussian_tables(), codec.SymbolEncoder()
    with pytest.raises(ValueError, match="indexes are|indexes \\("):
        encoder.push(np.zeros(2, int), np.zeros(3, int), tables)
    with pytest.raises(ValueError, match="integers"):
        encoder.push(np.zeros(2), np.zeros(2, int), tables)
    with pytest.raises(ValueError, match="0 ... 63"):
        encoder.push(np.zeros(1, int), np.array([64]), tables)
    with pytest.raises(ValueError, match="32 bits"):
        encoder.push(np.array([2**31]), np.array([0]), tables)
    with pytest.raises(ValueError, match="4 bytes"):
        codec.SymbolDecoder(b"abc")
    with pytest.raises(ValueError, match="offsets"):
        codec.Tables([np.array([2**15, 2**15])], [])
    with pytest.raises(ValueError, match="table 0"):
        codec.Tables([np.array([1, 2])], [0])


# --- likelihoods


def test_gaussian_bits_against_scipy():
    r, s = 4 * draw(500).double(), 0.5 + draw(500, seed=1).double().abs()
    r = r.clamp(-4 * s, 4 * s)
    exact = norm.cdf((0.5 - abs(r.numpy())) / s.numpy()) - norm.cdf((-0.5 - abs(r.numpy())) / s.numpy())
    given = codec.gaussian_bits(r, s)
    assert np.allclose(given.numpy(), -np.log2(exact), rtol=1e-6)
    assert torch.equal(codec.gaussian_bits(-r, s), given)
    # in float32 the tail is still right
    assert codec.gaussian_bits(torch.tensor(5.0), torch.tensor(1.0)).item() == pytest.approx(
        -math.log2(norm.sf(4.5) - norm.sf(5.5)), rel=1e-4
    )
    assert codec.gaussian_bits(torch.tensor(300.0), torch.tensor(0.5)).isfinite()
    r = r[:20].clone().requires_grad_(True)
    s = s[:20].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(codec.gaussian_bits, (r, s))
    far = torch.tensor([50.0], requires_grad=True)
    codec.gaussian_bits(far, torch.tensor(1.0)).backward()
    assert far.grad > 1


def test_scale_index_is_the_nearest_level():
    levels = codec.scale_levels()
    assert torch.equal(codec.scale_index(levels), torch.arange(64))
    scale = torch.exp(6 * torch.rand(200, generator=torch.Generator().manual_seed(0)) - 2.5)
    nearest = (scale.double().log()[:, None] - levels.log()).abs().argmin(1)
    assert torch.equal(codec.scale_index(scale), nearest)
    assert codec.scale_index(torch.tensor([1e-9, 1e9])).tolist() == [0, 63]


def test_gaussian_tables_follow_the_density():
    tables = codec.gaussian_tables()
    for index in (0, 20, 40, 63):
        scale = codec.scale_levels()[index].item()
        k = np.arange(tables.offsets[index], -tables.offsets[index] + 1)
        pmf = norm.cdf((k + 0.5) / scale) - norm.cdf((k - 0.5) / scale)
        assert np.abs(tables.frequencies[index][:-1] / 2**16 - pmf).sum() < 0.05
        bits = -(pmf * np.log2(tables.frequencies[index][:-1] / 2**16)).sum()
        assert bits <= -(pmf * np.log2(pmf.clip(1e-300))).sum() + 0.01


def test_factorized_prior():
    prior = codec.FactorizedPrior(3)
    with torch.no_grad():
        prior.location += draw(3, 3)
        prior.weight += draw(3, 3, seed=1)
    z = torch.arange(-40, 41).float().view(1, 1, -1, 1).expand(1, 3, -1, 1)
    total = (2 ** -prior.bits(z)).sum((0, 2, 3))
    assert torch.allclose(total, torch.ones(3), atol=1e-4)
    weight = prior.weight.softmax(-1)
    at_median = weight * torch.sigmoid((prior.medians()[:, None] - prior.location) / prior.log_scale.exp())
    assert torch.allclose(at_median.sum(-1), torch.full((3,), 0.5), atol=1e-5)
    x = (2 * draw(2, 3, 4, 4)).requires_grad_(True)
    quantised = prior.quantise(x)
    steps = quantised - prior.medians().view(-1, 1, 1)
    assert torch.allclose(steps, steps.round(), atol=1e-5) and (quantised - x).abs().max() <= 0.5001
    assert torch.equal(torch.autograd.grad(quantised.sum(), x)[0], torch.ones_like(x))
    prior.bits(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in prior.parameters())
    tables = prior.tables(reach=20)
    symbols = steps.round().long().clamp(-20, 20)
    channel = np.broadcast_to(np.arange(3)[:, None, None], symbols.shape[1:])
    ideal = prior.bits(symbols + prior.medians().view(-1, 1, 1))[0].sum().item()
    assert tables.bits(symbols[0].numpy(), channel) == pytest.approx(ideal, rel=0.03)


# --- checkerboard and container


@pytest.mark.parametrize("height, width", [(4, 4), (3, 5), (1, 1), (1, 6)])
def test_checkerboard(height, width):
    x = draw(2, 3, height, width)
    parts = [codec.keep(x, parity) for parity in (0, 1)]
    assert torch.equal(parts[0] + parts[1], x) and (parts[0] * parts[1] == 0).all()
    assert not codec.checkerboard(height, width)[0, 0]  # anchors: i + j odd
    for parity in (0, 1):
        squeezed = codec.squeeze(x, parity)
        assert torch.equal(codec.unsqueeze(squeezed, parity, height, width), parts[parity])
    with pytest.raises(ValueError, match="parity"):
        codec.checkerboard(2, 2, 2)
    with pytest.raises(ValueError, match="places"):
        codec.unsqueeze(torch.zeros(99), 0, 4, 4)


def test_container():
    file = codec.pack(37, 65535, 5, [b"abc", b"", b"defg"])
    assert codec.unpack(file) == (37, 65535, 5, (b"abc", b"", b"defg"))
    for place in range(len(file)):
        for bit in (0, 7):
            damaged = bytearray(file)
            damaged[place] ^= 1 << bit
            with pytest.raises(ValueError):
                codec.unpack(bytes(damaged))
    for cut in range(len(file)):
        with pytest.raises(ValueError):
            codec.unpack(file[:cut])
    with pytest.raises(ValueError, match="cannot store"):
        codec.pack(70000, 1, 0, [])


# --- transforms


def test_window_attention_is_scaled_cosine():
    attention = codec.WindowAttention(6, 2, 2)
    x = draw(3, 4, 6)
    q, k, v = (part.view(3, 4, 2, 3).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    cosine = F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    bias = 16 * torch.sigmoid(attention.bias(attention.coordinates)).permute(2, 0, 1)
    expected = ((10 * cosine + bias).softmax(-1) @ v).transpose(1, 2).reshape(3, 4, 6)
    assert torch.allclose(attention(x), attention.out(expected), atol=1e-5)
    with torch.no_grad():
        attention.log_inverse_tau.fill_(50.0)  # tau stays at 0.01 or above
    assert attention(x).isfinite().all()
    with pytest.raises(ValueError, match="heads"):
        codec.WindowAttention(6, 2, 4)


def test_windows_and_shift_mask():
    x = torch.arange(64.0).view(1, 8, 8, 1)
    windows = to_windows(x, 4)
    assert windows.shape == (4, 16, 1) and windows[1, 0, 0] == 4 and windows[2, 0, 0] == 32
    mask = codec.shift_mask(8, 8, 4, 2)
    assert mask[0].all() and not mask[1].all() and not mask[2].all()
    # True exactly for pairs whose places are near in the image before the roll
    place = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).roll(
        (-2, -2), (0, 1)
    )
    place = to_windows(place[None], 4)
    near = (place[:, :, None] - place[:, None]).abs().max(-1).values < 4
    assert torch.equal(mask, near)


def test_swin_block():
    block = codec.SwinV2Block(8, 4, 2, shifted=True)
    x = draw(2, 8, 12, 8)
    assert torch.equal(block(x), x)  # starts as the identity
    for norm_layer in block.norms:
        torch.nn.init.ones_(norm_layer.weight)
    changed = x.clone()
    changed[0, 0, 0] += 1
    moved = (block(changed) - block(x)).abs().sum(-1)
    assert (
        moved[0, 0, 0] > 0 and moved[0, 2:].max() == 0 and moved[0, :, 2:].max() == 0 and moved[1].max() == 0
    )
    plain = codec.SwinV2Block(8, 4, 2)
    plain.load_state_dict(block.state_dict())
    assert not torch.allclose(plain(x), block(x))
    with pytest.raises(ValueError, match="divisible by the window"):
        block(draw(1, 6, 8, 8))


def test_principal_start_is_a_projection():
    torch.manual_seed(0)
    rows = torch.linspace(0, 1, 64)
    images = (draw(20, 3, 1, 1) * rows.view(1, 1, -1, 1) + draw(20, 3, 1, 1, seed=1) * rows).sigmoid()
    analysis, synthesis = codec.Analysis(12, 40), codec.Synthesis(12, 40)
    codec.principal_start(analysis, synthesis, images)
    shown = synthesis(analysis(images))
    assert shown.shape == images.shape
    assert (shown - images).square().mean() < 0.02 * images.var()
    y = analysis(images)
    assert torch.allclose(analysis(shown), y, atol=0.05 * y.abs().max().item())


# --- contexts and slices


def test_channel_context_mixes_channels():
    torch.manual_seed(0)
    context = codec.ChannelContext(8, 4)
    x = draw(2, 8, 3, 5)
    assert context(x).shape == (2, 8, 3, 5) and context.out_channels == 8
    q, k, v = context.qkv(x).flatten(2).chunk(3, 1)
    weights = (F.cosine_similarity(q[:, :, None], k[:, None], dim=-1)).softmax(-1)
    mixed = context.mix(torch.einsum("bij,bjn->bin", weights, v).view_as(x))
    assert torch.allclose(context(x), context.head(x + mixed), atol=1e-5)


def test_global_context_reads_moved_places():
    torch.manual_seed(0)
    context = codec.GlobalInterContext(8, 4, reach=1.5)
    x = draw(2, 8, 6, 4)
    assert context(x).shape == (2, 4, 6, 4)
    q = context.query(x)
    places = context.sampling_places(q)
    assert places.shape == (2, 6, 2)
    reference = torch.tensor([[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5], [4.5, 0.5], [4.5, 2.5]])
    assert (places - reference).abs().max() <= 1.5 and (places - reference).abs().max() > 0
    # the values at the moved places, by hand
    with torch.no_grad():
        context.offset[-1].weight.zero_()
    read = x[:, :, :2, :2].mean((2, 3))  # the first place lies in the middle of four
    keys_values = context.key_value(read[:, :, None])
    seen = []
    hook = context.key_value.register_forward_hook(lambda module, inputs, output: seen.append(output))
    context(x).sum().backward()
    hook.remove()
    assert torch.allclose(seen[0][:, :, 0], keys_values[:, :, 0], atol=1e-5)
    assert context.offset[-1].weight.grad.abs().sum() > 0 and context.slope.grad.abs().sum() > 0
    assert context(draw(1, 8, 1, 1)).isfinite().all()


def model_of(channels=8, slices=2, hyper=16, **options):
    torch.manual_seed(1)
    model = SliceEntropyModel(channels, slices, hyper=hyper, **options)
    for pair in model.refine:
        for refine in pair:
            torch.nn.init.normal_(refine.net[-1].weight, std=0.3)
    return model


def test_walk_is_causal():
    """Parameters of a pass depend on nothing that is decoded in it or later."""
    model = model_of(intra=(codec.LocalContext,))
    hyper, y = draw(1, 16, 4, 4), 3 * draw(1, 8, 4, 4, seed=3)
    _, means, scales = model(y, hyper)
    for s in range(2):
        for parity in (0, 1):
            other = y.clone()
            other[:, 4 * s : 4 * s + 4] += 5 * codec.keep(torch.ones(4, 4, 4), parity)
            _, moved_means, moved_scales = model(other, hyper)
            same = torch.isclose(means, moved_means, atol=1e-6) & torch.isclose(
                scales, moved_scales, atol=1e-6
            )
            assert same[:, : 4 * s].all()  # earlier slices
            assert codec.squeeze(same[:, 4 * s : 4 * s + 4], parity).all()  # its own pass
            later = codec.squeeze(same[:, 4 * s : 4 * s + 4], 1)
            if parity == 0:
                assert not later.any()  # anchors help the others
            if s == 0:
                assert not same[:, 4:].any()


def test_refinement_is_bounded_and_rounding_is_around_the_mean():
    model = model_of()
    y, hyper = 3 * draw(1, 8, 4, 4, seed=3), draw(1, 16, 4, 4)
    decoded, means, scales = model(y, hyper)
    rounded = torch.round(y - means) + means
    correction = decoded - rounded
    assert 0 < correction.abs().max() <= 0.5 and scales.min() >= 0.11
    y = y.clone().requires_grad_(True)
    decoded = model_of(refine=False)(y, hyper)[0]
    assert torch.allclose(torch.autograd.grad(decoded.sum(), y)[0], torch.ones_like(y), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"intra": (codec.LocalContext,)}, {"inter": (), "refine": False}])
def test_slices_encode_and_decode(shape, options):
    model = model_of(**options).requires_grad_(False)
    hyper, y = draw(1, 16, *shape), 30 * draw(1, 8, *shape, seed=3)
    encoder = codec.SymbolEncoder()
    seen = model.encode(y, hyper, encoder)
    assert torch.equal(seen, model(y, hyper)[0]) or torch.allclose(seen, model(y, hyper)[0], atol=1e-5)
    decoder = codec.SymbolDecoder(encoder.finish())
    assert torch.equal(model.decode(hyper, decoder), seen) and decoder.is_finished()


def test_slice_model_rejects():
    with pytest.raises(ValueError, match="slices"):
        SliceEntropyModel(8, 3, hyper=16)
    with pytest.raises(ValueError, match="refine"):
        SliceEntropyModel(8, 2, hyper=0)
    bare = SliceEntropyModel(8, 2, hyper=0, inter=(), refine=False)
    assert bare(draw(2, 8, 4, 4), torch.zeros(2, 0, 4, 4))[0].shape == (2, 8, 4, 4)


# --- the whole codec


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = codec.s2lic(8, 8, 2, intra=(codec.LocalContext,), lambdas=(0.01, 0.1))
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(F.avg_pool2d(images, 8), scale_factor=8, mode="bilinear")
    codec.train_codec(model, images, latent_steps=20, joint_steps=3, batch_size=2, progress=False)
    return model.eval().requires_grad_(False), images


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (1, 1)])
def test_codec_round_trip(small, size):
    model, images = small
    image = (
        images[0, :, :1, :1].expand(3, *size) if size == (1, 1) else F.interpolate(images[:1], size=size)[0]
    )
    for rate in (0, 1):
        file, shown = model.encode(image, rate)
        assert torch.equal(model.decompress(file), shown) and shown.shape == image.shape
        assert file == model.compress(image, rate)


def test_codec_bits_are_those_of_the_file(small):
    model, images = small
    for rate in (0, 1):
        out = model(images[:1], rate)
        bits = (out.latent_bits + out.hyper_bits).item()
        payload = 8 * (len(model.compress(images[0], rate)) - 19)
        assert payload <= 1.05 * bits + 128 and payload >= 0.95 * bits - 64
        shown = model.encode(images[0], rate)[1]
        assert torch.allclose(shown, out.images[0].clamp(0, 1), atol=1e-4)
    a, b = (model(images, rate) for rate in (0, 1))
    assert (b.latent_bits > a.latent_bits).all() and codec.psnr(b.images, images) > codec.psnr(
        a.images, images
    )
    mixed = model(images[:2], torch.tensor([0, 1]))
    assert torch.allclose(mixed.latent_bits, torch.stack([a.latent_bits[0], b.latent_bits[1]]), rtol=1e-3)


def test_codec_gradients_reach_everything():
    torch.manual_seed(0)
    model = codec.s2lic(8, 8, 2, intra=(codec.LocalContext,))
    for name, p in model.named_parameters():  # leave the identities that training starts from
        if not name.startswith(("prior", "log")):
            torch.nn.init.normal_(p, std=0.2)
    model.loss(torch.rand(6, 3, 64, 64), torch.arange(6)).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    # softmax over places ignores what all keys share
    assert not [name for name in missing if "qkv.bias" not in name]


def test_codec_rejects(small):
    model, images = small
    with pytest.raises(ValueError, match="image must be"):
        model.compress(images)
    with pytest.raises(ValueError, match="rate"):
        model.compress(images[0], 2)
    file = model.compress(images[0])
    with pytest.raises(ValueError, match="checksum"):
        model.decompress(file[:-1] + bytes([file[-1] ^ 1]))
    stream = codec.unpack(file).streams[0]
    with pytest.raises(ValueError, match="does not end"):
        model.decompress(codec.pack(64, 64, 0, [stream + b"\1\2\3\4"]))


def test_fresh_process_decodes(small, tmp_path):
    model, images = small
    file, shown = model.encode(images[1], 1)
    torch.save((model.state_dict(), shown), tmp_path / "model.pt")
    (tmp_path / "image.bin").write_bytes(file)
    program = f"""
import torch
from lib import codec
state, shown = torch.load({str(tmp_path / "model.pt")!r})
model = codec.s2lic(8, 8, 2, intra=(codec.LocalContext,), lambdas=(0.01, 0.1)).eval()
model.load_state_dict(state)
assert torch.equal(model.decompress(open({str(tmp_path / "image.bin")!r}, "rb").read()), shown)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


# --- metrics


def test_psnr_and_ssim_against_skimage():
    x = F.interpolate(
        torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), size=48, mode="bilinear"
    )
    y = (x + 0.05 * draw(1, 3, 48, 48)).clamp(0, 1)
    a, b = (t[0].permute(1, 2, 0).double().numpy() for t in (x, y))
    assert codec.psnr(x, y) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-3)
    assert codec.psnr(x, x) == math.inf
    oracle = structural_similarity(
        a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2
    )
    assert codec.ms_ssim(x, y, levels=1).item() == pytest.approx(oracle, abs=1e-4)
    assert codec.ms_ssim(x, x, levels=2).item() == pytest.approx(1.0)
    assert codec.ms_ssim(x, y, levels=3).item() > codec.ms_ssim(x, y, levels=1).item()
    with pytest.raises(ValueError, match="levels"):
        codec.ms_ssim(x, y)
    with pytest.raises(ValueError, match="one shape"):
        codec.psnr(x, y[0])


def test_bd_rate():
    quality = [30.0, 32.0, 34.0, 37.0]
    anchor = ([0.1, 0.2, 0.4, 0.9], quality)
    half = ([0.05, 0.1, 0.2, 0.45], quality)
    for method in ("pchip", "akima", "cubic"):
        assert codec.bd_rate(anchor, half, method=method) == pytest.approx(-50)
    assert codec.bd_rate(half, anchor) == pytest.approx(100)
    with pytest.raises(ValueError, match="four"):
        codec.bd_rate(([1, 2, 3], [1, 2, 3]), anchor)
    with pytest.raises(ValueError, match="rise"):
        codec.bd_rate(([1, 2, 3, 4], [1, 2, 2, 4]), anchor)
    with pytest.raises(ValueError, match="share"):
        codec.bd_rate(anchor, ([0.1, 0.2, 0.4, 0.9], [36.0, 38, 40, 42]))


# --- the chapter's reference cells


def test_reference_cells_agree():
    from lib.book import load_reference

    name = "channelwise-image-codec"
    rans_encode, rans_decode = (load_reference(name, f"rans_{way}") for way in ("encode", "decode"))
    frequencies = codec.integer_frequencies([0.7, 0.2, 0.1])
    stream = np.random.default_rng(0).choice(2, size=2000, p=[0.8, 0.2])
    state, words = rans_encode(stream.tolist(), frequencies.tolist(), 16)
    assert rans_decode(state, words, 2000, frequencies.tolist(), 16) == stream.tolist()
    encoder = codec.SymbolEncoder()
    encoder.push(stream, np.zeros_like(stream), codec.Tables([frequencies], [0]))
    assert abs(8 * len(encoder.finish()) - 32 - 16 * len(words)) <= 32

    torch.manual_seed(0)
    context = codec.GlobalInterContext(8, 4, heads=1).double()
    torch.nn.init.zeros_(context.key_value.bias)
    x = draw(8, 6, 4).double().requires_grad_(True)
    q = context.query(x[None])
    keys, values = context.key_value.weight[:, :, 0].chunk(2)
    read = load_reference(name, "deformable_read")(
        x, q[0], context.sampling_places(q)[0], keys, values, F.softplus(context.slope[0])
    )
    pair = context(x[None]), context.out(read[None])
    assert torch.allclose(*pair, atol=1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in pair]
    assert torch.allclose(*gradients, atol=1e-10)


@pytest.mark.parametrize("form", ["JPEG", "WebP"])
def test_conventional_files_open_elsewhere(form):
    image = photographs("held out")["coffee"][:, 100:148, 200:264]
    file, shown = codec.conventional(image, form, 80)
    read = torch.from_numpy(imread(io.BytesIO(file)).copy()).permute(2, 0, 1) / 255
    assert torch.equal(read, shown) and shown.shape == image.shape
    assert codec.psnr(shown, image) > 25
    assert len(codec.conventional(image, form, 10)[0]) < len(file)
    with pytest.raises(ValueError, match="JPEG or WebP"):
        codec.conventional(image, "GIF", 10)
    with pytest.raises(ValueError, match="image"):
        codec.conventional(image[None], form, 10)
