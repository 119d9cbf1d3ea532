"""Images of letters in the fonts that come with matplotlib: many small classes, each in sixteen styles."""

import math
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

GLYPH_STYLES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
_CANVAS = 56  # pixels; letters are drawn large, moved, and averaged down


def glyphs(
    num_classes: int | None = None, *, copies: int = 1, size: int = 14, jitter: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images of Latin, Greek, Cyrillic and phonetic letters, one class a letter: an offline stand-in for Omniglot.

    The letters are those without a decomposition (no accents) that all sixteen styles of `GLYPH_STYLES` hold; of letters which
    DejaVu Sans draws alike only the first in Unicode order is kept. Styles of a class differ in weight, slant, serifs and width.
    Each image is moved by a random affine map: at `jitter=1` up to 12 degrees of rotation, 15 % of size, 0.15 of shear and
    8 % of the side in either direction, all uniform.

    Args:
        num_classes: how many letters, drawn without replacement; None takes all, in Unicode order.
        copies: images of every letter in every style, at least 1; each has its own jitter.
        size: height and width: 56 or one of its divisors.
        jitter: factor of the random movements, at least 0; 0 leaves the letters centred.
        seed: of the classes and of the jitter; the global random state is not touched.

    Returns:
        Images, float32 in [0, 1], white on black, (num_classes * 16 * copies, 1, size, size), ordered by class, then by style, then
        by copy; their labels, int64; and the letter of each label.

    Raises:
        ValueError: more classes than letters, or an argument out of range.
    """
    letters = _letters()
    if num_classes is not None and not 1 <= num_classes <= len(letters):
        raise ValueError(f"num_classes must lie in 1..{len(letters)}, got {num_classes}")
    if copies < 1 or size < 1 or _CANVAS % size or not jitter >= 0:
        raise ValueError(
            f"copies must be at least 1, size a divisor of {_CANVAS} and jitter at least 0, "
            f"got {copies}, {size} and {jitter}"
        )
    generator = torch.Generator().manual_seed(seed)
    if num_classes is not None:
        letters = [letters[i] for i in torch.randperm(len(letters), generator=generator)[:num_classes]]
    images = [
        _move(torch.stack([_draw(letter, style) for style in GLYPH_STYLES]), copies, jitter, generator)
        for letter in letters
    ]
    images = F.avg_pool2d(torch.cat(images), _CANVAS // size)
    labels = torch.arange(len(letters)).repeat_interleave(len(GLYPH_STYLES) * copies)
    return images, labels, list(letters)


@cache
def _font(style):
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{style}.ttf"
    return ImageFont.truetype(str(path), 40), frozenset(FT2Font(str(path)).get_charmap())


def _draw(letter, style):
    image = Image.new("L", (_CANVAS, _CANVAS))
    middle = _CANVAS / 2
    ImageDraw.Draw(image).text((middle, middle), letter, 255, font=_font(style)[0], anchor="mm")
    return torch.from_numpy(np.asarray(image).copy()).float() / 255


@cache
def _letters():
    common = frozenset.intersection(*(_font(style)[1] for style in GLYPH_STYLES))
    kept = {}
    for letter in map(chr, sorted(common)):
        if unicodedata.category(letter) in ("Lu", "Ll", "Lo") and not unicodedata.decomposition(letter):
            kept.setdefault(_draw(letter, GLYPH_STYLES[0]).numpy().tobytes(), letter)
    return tuple(kept.values())


def _move(images, copies, jitter, generator):
    """Random affine maps of (n, side, side) images; returns (n * copies, 1, side, side)."""
    images = images.repeat_interleave(copies, 0)[:, None]
    if jitter == 0:
        return images
    draws = jitter * (2 * torch.rand(5, len(images), generator=generator) - 1)
    angle, size, shear = math.radians(12) * draws[0], 1 + 0.15 * draws[1], 0.15 * draws[2]
    cos, sin = angle.cos() * size, angle.sin() * size
    shift = 0.16 * draws[3:]  # the axes of affine_grid are two units long
    rows = (torch.stack([cos, shear - sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
