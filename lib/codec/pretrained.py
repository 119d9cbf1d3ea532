"""The book's trained codecs, made once and kept in the zoo's cache."""

import torch
from torch import nn

from lib.codec.ladder import LADDER, entropy_ladder
from lib.codec.metrics import psnr
from lib.codec.mlic import MLICv2
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
    return cached("image_codec", _build_codec, _train_codec, seed=seed)


def codec_ladder(seed: int = 0) -> nn.Module:
    """One `lib.codec.MLICv2` for each configuration of `lib.codec.LADDER`, around the transforms of `image_codec(0)`.

    Trained once (about a minute of one core), as `image_codec`. All have the same steps and batches
    (`lib.codec.entropy_ladder`), which `seed` decides. `metrics` holds the held-out bits a latent place of each, for the middle
    256 x 384 pixels of the held-out photographs and all rate points.
    """
    return cached("codec_ladder", _build_ladder, _train_ladder, seed=seed)


def _build_codec() -> nn.Module:
    return s2lic(24, 40, 5)


def _train_codec(model: nn.Module, seed: int) -> dict[str, float]:
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


def _build_ladder() -> nn.Module:
    return nn.ModuleDict({name: MLICv2(24, 40, 5, refine=False, **config) for name, config in LADDER.items()})


def _train_ladder(models: nn.Module, seed: int) -> dict[str, float]:
    codec, middles = image_codec(0), []
    for image in photographs("held out").values():
        top, left = (image.shape[1] - 256) // 2, (image.shape[2] - 384) // 2
        middles.append(image[:, top : top + 256, left : left + 384])
    with torch.no_grad():
        crops = photograph_crops(160, size=128, seed=seed)
        latents = torch.cat([codec.analysis(part) for part in crops.split(32)])
        held_out = codec.analysis(torch.stack(middles))
    configs = {name: {"refine": False, **config} for name, config in LADDER.items()}
    rungs = entropy_ladder(codec, latents, held_out, configs, seed=seed)
    for name, rung in rungs.items():
        models[name].load_state_dict(rung.model.state_dict())
    return {name: rung.bits.sum().item() for name, rung in rungs.items()}
