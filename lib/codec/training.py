"""Training a codec in seconds: a linear start, the entropy model on fixed latents, then everything."""

import torch

from lib.codec.model import ImageCodec
from lib.codec.transforms import principal_start
from lib.train.fit import fit


def train_codec(
    codec: ImageCodec,
    crops: torch.Tensor,
    *,
    latent_steps: int = 160,
    joint_steps: int = 40,
    learning_rates: tuple[float, float] = (5e-3, 1e-3),
    batch_size: int = 6,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train `codec` in place; each image of a batch gets a random rate point.

    The transforms start as principal components (`lib.codec.principal_start`), so their latents are good from the first step.
    While they stay as they are, entropy model, hyper-transforms and gains are trained on latents computed once, with batches
    of four times the size; then everything is trained.

    Args:
        codec: as constructed.
        crops: (n, 3, height, width) in [0, 1], sides divisible by 64.
        latent_steps, joint_steps: of the two parts.
        learning_rates: of the two parts, for Adam; they rise and fall once.
        batch_size: of the second part.
        seed: of the order of crops and of the rate points. Noise comes from torch's own generator.
        progress: show a bar.
    """
    generator = torch.Generator().manual_seed(seed)

    def batches(data, size, steps):
        for _ in range(steps):
            places = torch.randint(len(data), (size,), generator=generator)
            yield data[places], torch.randint(len(codec.lambdas), (size,), generator=generator)

    principal_start(codec.analysis, codec.synthesis, crops[:200])
    with torch.no_grad():
        latents = torch.cat([codec.analysis(part) for part in crops.split(32)])
        spread = latents.std((0, 2, 3)) * codec.log_gain.mean(0).exp()
        codec.entropy.spread.copy_(spread.view(-1, 1, 1))
    transforms = {id(p) for part in (codec.analysis, codec.synthesis) for p in part.parameters()}
    fixed = [p for p in codec.parameters() if id(p) not in transforms]
    for loss, data, size, steps, rate, parameters in (
        (ImageCodec.latent_loss, latents, 4 * batch_size, latent_steps, learning_rates[0], fixed),
        (ImageCodec.loss, crops, batch_size, joint_steps, learning_rates[1], list(codec.parameters())),
    ):
        if not steps:
            continue
        optimizer = torch.optim.Adam(parameters, lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
        fit(
            codec, loss, batches(data, size, steps), optimizer=optimizer, schedule=schedule, steps=steps,
            clip_norm=1.0, progress=progress, desc="training a codec",
        )  # fmt: skip
