"""The book's trained codec, made once and kept in the zoo's cache."""

import torch
from torch import nn

from lib.codec.metrics import psnr
from lib.codec.model import s2lic
from lib.codec.training import train_codec
from lib.data.photographs import photograph_crops, photographs
from lib.models.zoo import cached


def image_codec(seed: int = 0) -> nn.Module:
    """A small `lib.codec.s2lic` (24 and 40 channels, 5 slices, six rate points), trained on crops of `photographs("train")`.

    Trained once (some twenty seconds of one core), then loaded: see `lib.models.zoo.cached`, also for what it returns and
    raises. `metrics["psnr"]` and `metrics["bits_per_pixel"]` are those of the middle 256 x 256 pixels of the held-out
    photographs at rate point 2, by likelihood.
    """
    return cached("image_codec", _build, _train, seed=seed)


def _build() -> nn.Module:
    return s2lic(24, 40, 5)


def _train(model: nn.Module, seed: int) -> dict[str, float]:
    train_codec(model, photograph_crops(600, size=64, seed=seed), seed=seed)
    middles = []
    for image in photographs("held out").values():
        top, left = ((side - 256) // 2 for side in image.shape[1:])
        middles.append(image[:, top : top + 256, left : left + 256])
    images = torch.stack(middles)
    with torch.no_grad():
        out = model(images, 2)
    bits = (out.latent_bits + out.hyper_bits).mean().item()
    return {"psnr": psnr(out.images.clamp(0, 1), images), "bits_per_pixel": bits / 256**2}
