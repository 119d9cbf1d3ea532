"""lib.models against the same mathematics written out another way."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.attention.kinds import KINDS
from lib.data import DIGIT_NAMES, CharTokenizer
from lib.models import CNN, GPT, TwoTower, mlp
from lib.models.gpt import SoftmaxAttention
from lib.models.mlp import ACTIVATIONS
from lib.models.two_tower import encode_names


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# --- mlp


@pytest.mark.parametrize("activation, function", [("relu", F.relu), ("gelu", F.gelu), ("tanh", torch.tanh)])
def test_mlp_by_hand(activation, function):
    model = mlp((6, 5, 4, 3), activation)
    (w1, b1), (w2, b2), (w3, b3) = [(p.weight, p.bias) for p in model if hasattr(p, "weight")]
    x = torch.randn(7, 2, 3)
    hidden = function(function(x.flatten(1) @ w1.T + b1) @ w2.T + b2)
    torch.testing.assert_close(model[:-1](x), hidden)
    torch.testing.assert_close(model(x), hidden @ w3.T + b3)


def test_mlp_of_two_sizes_is_linear():
    model = mlp((4, 2))
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(model(x + y) + model(torch.zeros(3, 4)), model(x) + model(y))


def test_mlp_errors():
    for sizes in ((), (4,), (4, 0, 2)):
        with pytest.raises(ValueError, match="at least two positive widths"):
            mlp(sizes)
    for sizes in ((4, 2), (4, 3, 2)):
        with pytest.raises(ValueError, match="activation must be one of .*'swish'"):
            mlp(sizes, "swish")
    assert all(mlp((2, 2, 2), name)(torch.ones(1, 2)).isfinite().all() for name in ACTIVATIONS)


# --- cnn


def test_cnn_classifies_its_features():
    model = CNN(7, in_channels=3, image_size=6, channels=(4, 5), width=9)
    images = torch.randn(2, 3, 6, 6)
    assert model.stem(images).shape == (2, 5, 3, 3)
    features = model.features(images)
    assert features.shape == (2, 9) and features.min() >= 0
    torch.testing.assert_close(model(images), features @ model.head.weight.T + model.head.bias)
    # one image does not depend on the others, in either mode
    torch.testing.assert_close(model(images)[:1], model.eval()(images[:1]))


@pytest.mark.parametrize("size", [0, 7])
def test_cnn_image_size(size):
    with pytest.raises(ValueError, match="image_size must be even"):
        CNN(image_size=size)


# --- gpt


def gpt(**options):
    return GPT(11, **({"context": 8, "dim": 12, "depth": 2, "num_heads": 3} | options)).eval()


def test_gpt_sees_no_future():
    model = gpt(depth=3)
    tokens = torch.randint(11, (2, 8))
    logits = model(tokens)
    for position in range(8):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        moved = (model(changed) - logits).abs().amax(-1) > 0
        assert not moved[:, :position].any()
        assert moved[:, position:].all()  # and it does see the past


def test_gpt_equals_attention_written_out():
    """Every head by itself, positions in a loop, in float64."""
    model = gpt().double()
    for parameter in model.parameters():  # biases start at zero: move them, so that each counts
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(11, (1, 6))

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    stream = model.embedding.weight[tokens[0]] + model.positions.weight[:6]  # (seq, dim)
    for block in model.blocks:
        projected = (
            norm(block.attention_norm, stream) @ block.attention.qkv.weight.T + block.attention.qkv.bias
        )
        heads = []
        for head in range(3):
            q, k, v = (projected[:, part * 12 + head * 4 : part * 12 + head * 4 + 4] for part in range(3))
            rows = []
            for position in range(6):
                scores = torch.stack([q[position] @ k[past] / 2 for past in range(position + 1)])
                weights = scores.exp() / scores.exp().sum()
                rows.append(sum(weight * v[past] for past, weight in enumerate(weights)))
            heads.append(torch.stack(rows))
        stream = stream + torch.cat(heads, 1) @ block.attention.out.weight.T + block.attention.out.bias
        hidden = norm(block.mlp_norm, stream) @ block.mlp[0].weight.T + block.mlp[0].bias
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        stream = stream + hidden @ block.mlp[2].weight.T + block.mlp[2].bias
    expected = norm(model.norm, stream)
    torch.testing.assert_close(model.features(tokens)[0], expected)
    torch.testing.assert_close(model(tokens)[0], expected @ model.head.weight.T)


def test_gpt_hook_on_qkv_gives_each_heads_queries_and_keys():
    model, seen = gpt(), {}
    for layer, block in enumerate(model.blocks):
        block.attention.qkv.register_forward_hook(
            lambda module, args, out, layer=layer: seen.update({layer: out})
        )
    model(torch.randint(11, (2, 5)))
    assert sorted(seen) == [0, 1]
    attention = model.blocks[1].attention
    assert (attention.num_heads, attention.head_dim) == (3, 4)
    for part, split in enumerate(attention.split(seen[1])):
        assert split.shape == (2, 3, 5, 4)
        for head in range(3):
            start = part * 12 + head * 4
            assert torch.equal(split[:, head], seen[1][..., start : start + 4])


def test_gpt_returns_what_is_asked_for():
    model = gpt()
    tokens, targets = torch.randint(11, (2, 5)), torch.randint(11, (2, 5))
    targets[0, 3] = -100
    logits = model(tokens)
    with_loss, loss, hidden = model(tokens, targets, return_hidden=True)
    assert logits.shape == (2, 5, 11) and hidden.shape == (2, 5, 12) and loss.shape == ()
    torch.testing.assert_close(with_loss, logits)
    torch.testing.assert_close(hidden, model.features(tokens))
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    kept = [log_p[i, j, targets[i, j]] for i in range(2) for j in range(5) if (i, j) != (0, 3)]
    torch.testing.assert_close(loss, -sum(kept) / 9)
    assert torch.equal(model(tokens, targets)[1], loss) and torch.equal(
        model(tokens, return_hidden=True)[1], hidden
    )


def test_gpt_starts_near_the_uniform_distribution():
    loss = GPT(100, 16)(torch.randint(100, (8, 16)), torch.randint(100, (8, 16)))[1].item()
    assert loss == pytest.approx(math.log(100), abs=0.2)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"activation": "swish"}, ValueError, "activation must be one of"),
        ({"dim": 10}, ValueError, "multiple of num_heads, got 10 and 3"),
        ({"depth": 0}, ValueError, "depth must be at least 1"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ({"positions": "sines"}, ValueError, "positions must be learned, rotary or none"),
        ({"norm": "batch"}, ValueError, "norm must be one of"),
        ({"attention": "sharp"}, ValueError, "attention must be a factory or one of"),
        ({"heads": 3}, TypeError, "heads"),
    ],
)
def test_gpt_options(options, error, message):
    with pytest.raises(error, match=message):
        gpt(**options)


@pytest.mark.parametrize("shape", [(5,), (2, 9), (2, 0), (1, 2, 3)])
def test_gpt_token_shapes(shape):
    with pytest.raises(ValueError, match="tokens must be"):
        gpt()(torch.zeros(shape, dtype=torch.long))


def test_gpt_positions():
    tokens = torch.randint(11, (2, 30))
    for positions in ("rotary", "none"):  # longer than the context of 8
        model = gpt(positions=positions, dim=12, num_heads=3).double()
        assert model(tokens).shape == (2, 30, 11)
        assert model.positions is None
    twice = torch.tensor([[4, 4, 4, 4]])
    logits = model(twice)  # without positions nothing tells equal tokens apart
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))
    logits = gpt(positions="rotary").double()(torch.tensor([[4, 7, 4, 4]]))
    assert (logits[:, 2] - logits[:, 3]).abs().max() > 1e-6


@pytest.mark.parametrize("attention", sorted(KINDS))
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_gpt_with_each_kind_of_attention(attention, positions):
    torch.manual_seed(0)
    model = gpt(attention=attention, positions=positions, context=16).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(11, (2, 9))
    logits = model(tokens)
    assert logits.shape == (2, 9, 11) and logits.isfinite().all()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    moved = (model(changed) - logits).abs().amax((0, 2)) > 1e-12
    assert moved.tolist() == [False] * 5 + [True] * 4
    # decoding with a cache, in pieces, reads the same
    cache, pieces = model.start(2), []
    for piece in tokens.split([4, 1, 3, 1], 1):
        out, cache = model.extend(piece, cache)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), logits)
    loss = model(tokens, tokens)[1]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gpt_takes_factories():
    made = []

    class Mean(SoftmaxAttention):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), 7.0))

        def forward(self, q, k, v):
            return v.cumsum(-2)[..., -q.shape[-2] :, :] * self.weight.mean() / 7

    def factory(**shape):
        made.append(shape)
        return Mean()

    model = gpt(attention=factory, mlp=lambda dim, activation: nn.Linear(dim, dim), norm="none")
    assert made == [
        {"dim": 12, "num_heads": 3, "context": 8, "layer": layer, "depth": 2} for layer in range(2)
    ]
    assert (model.blocks[0].attention.kind.weight == 7).all()  # initial values stay
    stream = model.embed(torch.tensor([[1, 2, 3]]))
    for block in model.blocks:
        v = block.attention.project(stream)[2].cumsum(2)
        stream = stream + block.attention.out(v.transpose(1, 2).flatten(2))
        stream = stream + stream @ block.mlp.weight.T + block.mlp.bias
    torch.testing.assert_close(model.features(torch.tensor([[1, 2, 3]])), stream)


# --- two towers


@pytest.fixture
def towers():
    tokenizer = CharTokenizer(DIGIT_NAMES)
    return TwoTower(len(tokenizer), 5, dim=8).eval(), encode_names(DIGIT_NAMES, tokenizer)


def test_encode_names():
    tokenizer = CharTokenizer("enotw")
    assert encode_names(["two", "one", "e"], tokenizer).tolist() == [[3, 4, 2], [2, 1, 0], [0, 5, 5]]
    for names in ("two", [], ["one", ""]):
        with pytest.raises(ValueError, match="non-empty sequence"):
            encode_names(names, tokenizer)
    with pytest.raises(ValueError, match="'z'"):
        encode_names(["zen"], tokenizer)


def test_towers_return_unit_vectors_and_logits_are_cosines(towers):
    model, names = towers
    images = torch.rand(4, 1, 8, 8)
    image_vectors, name_vectors = model.encode_images(images), model.encode_names(names)
    assert image_vectors.shape == (4, 8) and name_vectors.shape == (10, 8)
    for vectors in (image_vectors, name_vectors):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    assert model.temperature.item() == pytest.approx(0.07)
    cosines = F.cosine_similarity(image_vectors.unsqueeze(1), name_vectors.unsqueeze(0), dim=-1)
    torch.testing.assert_close(model(images, names), cosines / 0.07, atol=1e-5, rtol=1e-4)


def test_padding_does_not_count_and_order_does(towers):
    model, _ = towers
    tokenizer = CharTokenizer(DIGIT_NAMES)
    alone = model.encode_names(encode_names(["one"], tokenizer))
    padded = model.encode_names(encode_names(["one", "three"], tokenizer))[:1]
    torch.testing.assert_close(alone, padded)
    assert (model.encode_names(encode_names(["eno"], tokenizer)) - alone).abs().max() > 1e-3
    with pytest.raises(ValueError, match="at most 5 characters, got 6"):
        model.encode_names(encode_names(["eleven"], CharTokenizer("elvn")))


def test_loss_of_different_names_rewards_the_diagonal(towers):
    model, names = towers
    images = torch.rand(10, 1, 8, 8)
    logits = model(images, names)
    rows, columns = logits.softmax(1).diagonal(), logits.softmax(0).diagonal()
    torch.testing.assert_close(model.loss(images, names), -(rows * columns).log().mean() / 2)


def test_loss_of_equal_names_is_that_of_a_target_spread_over_them(towers):
    model, names = towers
    labels = [3, 1, 3, 7, 3]
    images = torch.rand(5, 1, 8, 8)
    logits = model(images, names[labels]).tolist()
    total = 0.0
    for matrix in (logits, list(zip(*logits, strict=True))):
        for i, row in enumerate(matrix):
            log_sum = math.log(sum(math.exp(value) for value in row))
            equal = [j for j in range(5) if labels[j] == labels[i]]
            total -= sum(row[j] - log_sum for j in equal) / len(equal)
    assert model.loss(images, names[labels]).item() == pytest.approx(total / 10, rel=1e-4)


def test_every_parameter_of_the_towers_learns_and_the_temperature_is_bounded(towers):
    model, names = towers
    model.loss(torch.rand(10, 1, 8, 8), names).backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters()
    )
    model.log_scale.data.fill_(50.0)
    assert model.temperature.item() == pytest.approx(0.01)


def test_gpt_cache_gives_the_logits_of_the_whole_prefix():
    torch.manual_seed(0)
    model = gpt().double()
    tokens = torch.randint(11, (3, 8))
    whole = model(tokens)
    logits, cache = model.extend(tokens[:, :3], model.start(3))
    torch.testing.assert_close(logits, whole[:, :3])
    more, cache = model.extend(tokens[:, 3:6], cache)
    torch.testing.assert_close(more, whole[:, 3:6])
    for position in (6, 7):
        one, cache = model.step(tokens[:, position], cache)
        torch.testing.assert_close(one, whole[:, position])
    picked, _ = model.extend(tokens[[2, 2], 6:], model.extend(tokens[:, :6], model.start(3))[1][[2, 2]])
    torch.testing.assert_close(picked, whole[[2, 2], 6:])


def test_gpt_cache_refuses_what_does_not_fit():
    model = gpt()
    with pytest.raises(ValueError, match="within the context of 8"):
        model.extend(torch.zeros(2, 9, dtype=torch.long), model.start(2))
    with pytest.raises(ValueError, match=r"tokens must be \(2, new >= 1\)"):
        model.extend(torch.zeros(3, 1, dtype=torch.long), model.start(2))
