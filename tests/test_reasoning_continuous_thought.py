import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.book import load_reference
from lib.data import visual_pointer_chase
from lib.losses import thought_loss
from lib.models import CNN, GPT, VLM
from lib.reasoning import LatentAttention, continuous_thought

SLUG = "continuous-thought"


@pytest.fixture
def parts():
    torch.manual_seed(0)
    gpt = GPT(12, 16, dim=8, depth=2, num_heads=2).double()
    for parameter in gpt.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.4)
    attention = LatentAttention(8, 2, identity=False).double()
    embeds = torch.randn(3, 5, 8, dtype=torch.float64)
    return gpt, attention, embeds


def options(variant, attention, embeds):
    more = {
        "base": {"gamma": 0.9},
        "multi": {"latent_attention": attention, "visual": embeds[:, :2], "gamma": 1.1},
        "pause": {"pause": torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)},
    }
    return {"n_thoughts": 3, "variant": variant} | more[variant]


@pytest.mark.parametrize("variant", ["base", "multi", "pause"])
def test_cached_is_the_loop_without_cache(parts, variant):
    gpt, attention, embeds = parts
    embeds.requires_grad_()
    chosen = options(variant, attention, embeds)
    results = []
    for cache in (True, False):
        thoughts, hidden = continuous_thought(gpt, embeds, cache=cache, **chosen)
        assert thoughts.shape == (3, 3, 8) and hidden.shape == (3, 4, 8)
        results.append((thoughts, hidden, *torch.autograd.grad(hidden.square().sum() + hidden.sum(), embeds)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


def test_reference_agrees_in_values_and_gradients(parts):
    reference = load_reference(SLUG, "thoughts_by_loop")
    gpt, attention, embeds = parts
    embeds.requires_grad_()
    place = gpt.positions.weight
    for variant in ("base", "multi"):
        chosen = options(variant, attention, embeds)
        feed = (lambda h: h) if variant == "base" else (lambda h: attention(h, embeds[:, :2]))
        states = reference(gpt.transform, embeds, 3, feed, chosen["gamma"], place[5:8])
        _, hidden = continuous_thought(gpt, embeds, **chosen)
        torch.testing.assert_close(hidden, states, rtol=1e-9, atol=1e-11)
        ours, theirs = (
            torch.autograd.grad(x.pow(3).sum(), embeds, retain_graph=True)[0] for x in (hidden, states)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_latent_attention_agrees_with_the_reference(parts):
    _, attention, embeds = parts
    ours = attention(embeds[:, -1], embeds)
    reference = load_reference(SLUG, "LatentAttentionReference")(8, 2).double()
    names = ("query", "attention", "norm", "back", "final_norm")
    for name, module in zip(names, reference.children(), strict=True):
        module.load_state_dict(getattr(attention, name).state_dict())
    torch.testing.assert_close(ours, reference(embeds[:, -1], embeds))


def test_identity_start_only_normalises():
    hidden, context = torch.randn(4, 8), torch.randn(4, 3, 8)
    expected = F.layer_norm(hidden, (8,))
    torch.testing.assert_close(LatentAttention(8, 2)(hidden, context), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_left_padding_does_not_change_a_row(positions):
    torch.manual_seed(1)
    gpt = GPT(12, 16, dim=8, depth=2, num_heads=2, positions=positions).double()
    attention = LatentAttention(8, 2).double()
    lengths, rows = (5, 2, 5, 4), torch.randn(4, 5, 8, dtype=torch.float64)
    padded, mask = torch.zeros_like(rows), torch.zeros(4, 5, dtype=torch.bool)
    for row, length in enumerate(lengths):
        padded[row, 5 - length :], mask[row, 5 - length :] = rows[row, :length], True
    chosen = {"n_thoughts": 2, "variant": "multi", "latent_attention": attention}
    thoughts, hidden = continuous_thought(gpt, padded, mask, visual=rows[:, :2], **chosen)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = continuous_thought(gpt, rows[one, :length], visual=rows[one, :2], **chosen)
        torch.testing.assert_close(thoughts[one], alone[0])
        torch.testing.assert_close(hidden[one], alone[1])


def test_gradient_reaches_every_thought_unless_detached(parts):
    gpt, _, embeds = parts
    embeds.requires_grad_()
    for detach in (False, True):
        thoughts, hidden = continuous_thought(gpt, embeds, n_thoughts=3, detach=detach)
        (first,) = torch.autograd.grad(hidden[0, -1, 0], embeds)
        full = continuous_thought(gpt, embeds, n_thoughts=3)[1]
        (other,) = torch.autograd.grad(full[0, -1, 0], embeds)
        assert torch.equal(first, other) != detach


def test_no_thoughts(parts):
    gpt, _, embeds = parts
    thoughts, hidden = continuous_thought(gpt, embeds, n_thoughts=0)
    assert thoughts.shape == (3, 0, 8)
    torch.testing.assert_close(hidden[:, 0], gpt.transform(embeds)[:, -1])


@pytest.mark.parametrize(
    "change",
    [
        {"n_thoughts": -1},
        {"variant": "other"},
        {"variant": "multi"},
        {"variant": "pause"},
        {"gamma": 0.0},
        {"n_thoughts": 12},
        {"mask": torch.tensor([[True] * 4 + [False]] * 3)},
        {"mask": torch.zeros(3, 5, dtype=torch.bool)},
        {"mask": torch.zeros(3, 5)},
    ],
)
def test_bad_input(parts, change):
    with pytest.raises(ValueError):
        continuous_thought(parts[0], parts[2], **{"n_thoughts": 2} | change)
    with pytest.raises(ValueError):
        continuous_thought(parts[0], parts[2][0], n_thoughts=1)
    with pytest.raises(ValueError):
        LatentAttention(8, 3)


# --- the loss


def test_loss_is_the_sum_by_hand():
    head, hidden = nn.Linear(4, 3), torch.randn(5, 4, 4)
    targets = torch.tensor([0, 1, 2, -100, 1])
    total, losses = thought_loss(head, hidden, targets, 0.25)
    by_hand = [F.cross_entropy(head(hidden[:, k]), targets) for k in range(4)]
    torch.testing.assert_close(torch.stack(losses), torch.stack(by_hand))
    torch.testing.assert_close(total, by_hand[3] + 0.25 * (by_hand[1] + by_hand[2]))
    torch.testing.assert_close(thought_loss(head, hidden[:, :1], targets)[0], by_hand[0])
    for bad in ((head, hidden[0], targets), (head, hidden, targets[:2]), (head, hidden, targets, -1.0)):
        with pytest.raises(ValueError):
            thought_loss(*bad)


# --- the model


def test_vlm_is_image_tokens_before_the_prompt():
    torch.manual_seed(0)
    encoder, projector = CNN(10, width=6), nn.Linear(6, 8)
    encoder.forward = encoder.features
    gpt = GPT(12, 16, dim=8, depth=1, num_heads=2)
    model = VLM(encoder, projector, gpt)
    images, prompt = torch.rand(2, 3, 1, 8, 8), torch.randint(12, (2, 4))
    embeds, visual = model.embed(images, prompt)
    for cell in range(3):
        torch.testing.assert_close(visual[:, cell], projector(encoder.features(images[:, cell])))
    torch.testing.assert_close(embeds[:, :3], visual + gpt.positions.weight[:3])
    torch.testing.assert_close(embeds[:, 3:], gpt.embedding(prompt) + gpt.positions.weight[3:7])
    assert model(images, prompt).shape == (2, 4, 12)
    assert VLM(nn.Identity(), projector, gpt)(torch.rand(2, 3, 6), prompt).shape == (2, 4, 12)
    with pytest.raises(ValueError):
        model.embed(images, prompt[:1])
    with pytest.raises(ValueError):
        model.visual(images[0, 0, 0])
    with pytest.raises(ValueError):
        VLM(nn.Identity(), nn.Linear(6, 7), gpt).visual(torch.rand(2, 3, 6))


# --- the task


def test_pointer_chase_by_following_the_digits():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.arange(30.0)[:, None], torch.arange(30) % 6
    task = visual_pointer_chase(5, (0, 2), images, labels, 40, generator)
    assert task.panels.shape == (40, 5, 1) and set(task.hops.tolist()) == {0, 2}
    for row in range(40):
        shown = [labels[int(value)].item() for value in task.panels[row, :, 0]]
        assert shown == task.following[row].tolist() and sorted(shown) == list(range(5))
        cell, walk = task.start[row].item(), []
        for _ in range(5):
            walk.append(shown[cell])
            cell = walk[-1]
        assert sorted(walk) == list(range(5)), "one tour through all cells"
        assert task.walk[row].tolist() == walk[:3] and task.answer[row] == walk[task.hops[row]]
    again = visual_pointer_chase(5, (0, 2), images, labels, 40, torch.Generator().manual_seed(0))
    assert torch.equal(again.panels, task.panels)
    for bad in ((1, 0), (5, 5), (5, -1), (5, ()), (7, 0)):
        with pytest.raises(ValueError):
            visual_pointer_chase(*bad, images, labels, 4)
    with pytest.raises(ValueError):
        visual_pointer_chase(5, 0, images, labels[:-1], 4)
