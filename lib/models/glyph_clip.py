"""A two-tower model of letters and their names: the book's large pre-trained model, made once and kept in the zoo's cache."""

import functools
import unicodedata

import torch
import torch.nn.functional as F
from torch import nn

from lib.data import glyphs
from lib.models.two_tower import TwoTower
from lib.models.vit import ViT
from lib.models.zoo import cached
from lib.train.fit import fit

GLYPH_CLASSES, GLYPH_COPIES = 60, (8, 4)  # copies of each letter in each style: for training, held out


def glyph_clip(seed: int = 0) -> nn.Module:
    """A `TwoTower` of letters and their Unicode names, with a transformer of six layers as its image tower.

    It is trained on the first part of `glyph_parts(seed)`: 60 letters, 14 x 14 pixels. `metrics["test_accuracy"]` is that of naming
    the images of the second part, among all 60 names. The name tower reads words, not characters: `name_words(letters)` is
    what it takes. `image_tower[0]` pads to 16 x 16, `image_tower[1]` is the `ViT`.
    """
    return cached("glyph_clip", _build, _train, seed=seed)


def glyph_parts(seed: int = 0) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[str]]:
    """The letters of `glyph_clip(seed)`: [(images, labels), ...] of its training part and of the rest, and the letter of each label.

    Images are (classes, styles, copies, 1, 14, 14), labels (classes, styles, copies): 60 classes, 16 styles, 8 and 4 copies.
    """
    copies = sum(GLYPH_COPIES)
    images, labels, letters = glyphs(GLYPH_CLASSES, copies=copies, jitter=0.6, seed=seed)
    images = images.view(GLYPH_CLASSES, -1, copies, *images.shape[1:])
    labels = labels.view(images.shape[:3])
    cut = zip(images.split(GLYPH_COPIES, 2), labels.split(GLYPH_COPIES, 2), strict=True)
    return list(cut), letters


def name_words(letters: list[str]) -> torch.Tensor:
    """The words of the Unicode names of letters as tokens for `glyph_clip`: int64, (letters, longest of all letters), padded.

    Raises:
        ValueError: a letter whose name has words that `glyphs()` does not know.
    """
    vocabulary, longest = _glyph_words()
    tokens = torch.full((len(letters), longest), len(vocabulary))
    for row, letter in zip(tokens, letters, strict=True):
        words = unicodedata.name(letter).split()
        if not set(words) <= set(vocabulary):
            raise ValueError(f"{letter!r} is no letter of glyphs()")
        row[: len(words)] = torch.tensor([vocabulary.index(word) for word in words])
    return tokens


@functools.cache
def _glyph_words() -> tuple[tuple[str, ...], int]:
    names = [unicodedata.name(letter).split() for letter in glyphs(jitter=0.0)[2]]
    return tuple(sorted(set().union(*names))), max(map(len, names))


def _build() -> nn.Module:
    vocabulary, longest = _glyph_words()
    model = TwoTower(len(vocabulary), longest)
    vit = ViT(32, image_size=16, patch_size=4, dim=48, depth=6)
    with torch.no_grad():
        # patches of mostly black images are small beside what the layers add, and would take long to be heard
        vit.patches.weight.mul_(6)
        vit.positions.normal_(std=0.5)
    model.image_tower = nn.Sequential(nn.ZeroPad2d(1), vit)
    return model


def _train(model: nn.Module, seed: int) -> dict[str, float]:
    (train, test), letters = glyph_parts(seed)
    names = name_words(letters)
    steps, batch_size = 720, 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.15)
    fit(
        model,
        # against all names: in a batch of pairs most names would be missing
        lambda model, images, labels: F.cross_entropy(model(images, names), labels),
        (train[0].flatten(0, 2), train[1].flatten()),
        optimizer=optimizer,
        schedule=schedule,
        steps=steps,
        batch_size=batch_size,
        clip_norm=1.0,
        seed=seed,
        desc="training glyph_clip",
    )
    with torch.no_grad():
        hits = model(test[0].flatten(0, 2), names).argmax(-1) == test[1].flatten()
    return {"test_accuracy": hits.float().mean().item()}
