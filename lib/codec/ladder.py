"""What each context of an entropy model is worth: held-out bits of fixed latents."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from lib.codec.likelihood import gaussian_bits
from lib.codec.mlic import CONTEXTS, MLICv2
from lib.codec.model import ImageCodec
from lib.train.fit import fit

LADDER = {
    "hyperprior": {"contexts": (), "parts": ()},
    "+ channel": {"contexts": ("channel",), "parts": ()},
    "+ inter": {"contexts": ("channel", "inter"), "parts": ()},
    "+ intra, local": {"contexts": CONTEXTS, "parts": ()},
    "+ reweighting": {"contexts": CONTEXTS, "parts": ("cr",)},
    "+ rotary": {"contexts": CONTEXTS, "parts": ("cr", "rope")},
    "+ HGCP": {"contexts": CONTEXTS, "parts": ("cr", "rope", "hgcp")},
}  # each with all that the ones before have; "+ rotary" replaces the bias of the local context


class Rung(NamedTuple):
    """One configuration.

    Attributes:
        model: trained.
        bits: held-out bits a latent place: of each slice, then of the hyper-latents, (slices + 1,).
    """

    model: MLICv2
    bits: torch.Tensor


@torch.no_grad()
def held_out_bits(model: ImageCodec, latents: torch.Tensor, rates) -> torch.Tensor:
    """Mean bits a place of rounded latents, of each slice and of the hyper-latents, (slices + 1,), mean over rate points."""
    total = torch.zeros(model.entropy.slices + 1)
    for rate in rates:
        y = latents * model._gain(model.log_gain, rate)
        z, hyper = model.hyper_parameters(y)
        _, means, scales = model.entropy(y, hyper)
        bits = gaussian_bits(torch.round(y - means), scales) * (scales > 0)
        total[:-1] += torch.stack([part.sum() for part in bits.chunk(model.entropy.slices, 1)])
        total[-1] += model.prior.bits(model.prior.quantise(z)).sum()
    return total / (len(rates) * latents[:, 0].numel())


def entropy_ladder(
    codec: ImageCodec,
    latents: torch.Tensor,
    held_out: torch.Tensor,
    configs: Mapping[str, dict] = LADDER,
    *,
    root: str = "+ channel",
    steps: tuple[int, int] = (150, 100),
    learning_rates: tuple[float, float] = (5e-3, 4e-3),
    batch_size: int = 6,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Rung]:
    """Train one `MLICv2` for each configuration on fixed latents, with the same batches, and measure held-out bits.

    Transforms and gains are those of `codec` and stay as they are; entropy models and hyperpriors, which start as that of `codec`, are
    trained. The configuration `root` is trained first, for `steps[0]` steps. Those that have all its contexts, itself among them, go on from there for `steps[1]` steps, at first as the same
    function (`MultiReferenceEntropyModel.widen`); the others have their own first part. So all have had as many steps.

    Args:
        codec: a trained codec.
        latents, held_out: what `codec.analysis` gives, (n, M, h, w).
        configs: for each name the arguments of `MLICv2`: `parts`, `contexts`, `refine`.
        root: name of the configuration to begin with.
        steps: before and after the branching.
        learning_rates: of Adam, in the two parts; each rises and falls once.
        batch_size: images, each at a random rate point.
        seed: of everything random.
        progress: show bars.

    Raises:
        ValueError: a root that is no configuration.
    """
    if root not in configs:
        raise ValueError(f"root must be one of {list(configs)}, got {root!r}")

    def make(name):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MLICv2(codec.N, codec.M, codec.entropy.slices, lambdas=codec.lambdas, **configs[name])
        model.adopt(codec)
        for part in (model.analysis, model.synthesis, model.log_gain, model.log_inverse_gain):
            part.requires_grad_(False)
        return model

    def train(model, part, name):
        count, rate, generator = steps[part], learning_rates[part], torch.Generator().manual_seed(seed + part)
        batches = (
            (
                latents[torch.randint(len(latents), (batch_size,), generator=generator)],
                torch.randint(len(model.lambdas), (batch_size,), generator=generator),
            )
            for _ in range(count)
        )
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, count, pct_start=0.1)
        with torch.random.fork_rng(devices=[]):  # the noise of training
            torch.manual_seed(seed + part)
            fit(
                model, MLICv2.latent_loss, batches, optimizer=optimizer, schedule=schedule, steps=count,
                clip_norm=1.0, progress=progress, desc=name,
            )  # fmt: skip

    start = make(root)
    train(start, 0, f"{root}, before branching")
    theirs = start.entropy.widths(1, 1).keys()
    rungs = {}
    for name in configs:
        model = make(name)
        if theirs <= model.entropy.widths(1, 1).keys():
            model.entropy.widen(start.entropy)
            for part in ("hyper_analysis", "hyper_synthesis", "prior"):
                getattr(model, part).load_state_dict(getattr(start, part).state_dict())
        else:
            train(model, 0, f"{name}, before branching")
        train(model, 1, name)
        bits = held_out_bits(model, held_out, range(len(codec.lambdas)))
        rungs[name] = Rung(model.requires_grad_(False), bits)
    return rungs
