"""Mutual information of images and layers: compress both, then estimate. All values are in nats."""

import math

import torch
from sklearn.decomposition import PCA
from torch import nn

from lib.information.nearest_neighbours import mutual_information


class PCACompressor:
    """The first principal components of (N, ...) samples, which are flattened.

    Args:
        latent: how many components are kept.

    Attributes:
        mean_: (features,).
        components_: (latent, features), orthonormal rows.
        variance_: of all components, falling; (min(N, features),).

    Raises:
        ValueError: `latent` below 1.
    """

    def __init__(self, latent: int):
        if latent < 1:
            raise ValueError(f"latent must be at least 1, got {latent}")
        self.latent = latent

    def fit(self, x: torch.Tensor) -> "PCACompressor":
        """Find the components of x (N, ...) and return self.

        Raises:
            ValueError: fewer samples or features than components.
        """
        flat = _flat(x)
        if self.latent > min(flat.shape):
            raise ValueError(
                f"{self.latent} components need as many samples and features, got {tuple(flat.shape)}"
            )
        pca = PCA(svd_solver="full" if flat.shape[0] < flat.shape[1] else "covariance_eigh").fit(
            flat.cpu().numpy()
        )
        self.mean_ = torch.from_numpy(pca.mean_)
        self.components_ = torch.from_numpy(pca.components_[: self.latent].copy())
        self.variance_ = torch.from_numpy(pca.explained_variance_)
        return self

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) to (N, latent), float64."""
        _fitted(self, "components_")
        return (_flat(x).cpu() - self.mean_) @ self.components_.T

    def inverse_transform(self, codes: torch.Tensor) -> torch.Tensor:
        """(N, latent) to flattened samples (N, features)."""
        _fitted(self, "components_")
        return codes @ self.components_ + self.mean_


class AutoencoderCompressor:
    """The narrow layer of a small autoencoder, trained to reconstruct (N, ...) samples, which are flattened.

    Encoder and decoder are perceptrons with the same hidden widths, in opposite order; the loss is the squared error.

    Args:
        latent: width of the narrow layer.
        hidden: widths of the encoder's hidden layers.
        epochs: passes over the samples.
        batch_size: of a step.
        lr: Adam's learning rate at the start; it falls to zero along a cosine.
        seed: of the weights and the shuffling.

    Attributes:
        encoder_: the module.
        decoder_: the module.
        error_: squared error of the reconstruction as a share of the samples' variance, on the samples of `fit`.

    Raises:
        ValueError: `latent` below 1.
    """

    def __init__(
        self,
        latent: int,
        *,
        hidden: tuple[int, ...] = (128, 64),
        epochs: int = 20,
        batch_size: int = 100,
        lr: float = 3e-3,
        seed: int = 0,
    ):
        if latent < 1:
            raise ValueError(f"latent must be at least 1, got {latent}")
        self.latent, self.hidden, self.epochs = latent, tuple(hidden), epochs
        self.batch_size, self.lr, self.seed = batch_size, lr, seed

    def fit(self, x: torch.Tensor) -> "AutoencoderCompressor":
        """Train on x (N, ...) and return self. The global random state is left as it was."""
        from lib.models.mlp import mlp  # here, since lib.train imports this package
        from lib.train.fit import fit

        flat = _flat(x).float()
        self.mean_, self.scale_ = flat.mean(0), flat.std().clamp_min(1e-12)
        z = (flat - self.mean_) / self.scale_
        sizes = (z.shape[1], *self.hidden, self.latent)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = nn.Sequential(mlp(sizes, "gelu"), mlp(sizes[::-1], "gelu")).to(z.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr, fused=True)
        steps = self.epochs * math.ceil(len(z) / self.batch_size)
        fit(
            model,
            lambda model, batch: (model(batch) - batch).square().mean(),
            (z,),
            optimizer=optimizer,
            epochs=self.epochs,
            batch_size=self.batch_size,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
            seed=self.seed,
            progress=False,
        )
        self.encoder_, self.decoder_ = model.requires_grad_(False)
        with torch.no_grad():
            self.error_ = float((model(z) - z).square().mean() / z.var(0, correction=0).mean())
        return self

    @torch.no_grad()
    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) to (N, latent), float64."""
        _fitted(self, "encoder_")
        return self.encoder_((_flat(x).float() - self.mean_) / self.scale_).double()

    @torch.no_grad()
    def inverse_transform(self, codes: torch.Tensor) -> torch.Tensor:
        """(N, latent) to flattened samples (N, features), float32."""
        _fitted(self, "decoder_")
        return self.decoder_(codes.float()) * self.scale_ + self.mean_


def lossy_mi(
    x: torch.Tensor,
    y: torch.Tensor,
    compress_x=None,
    compress_y=None,
    *,
    fit_share: float = 0.0,
    **how,
) -> tuple[float, float]:
    """Mutual information of two high-dimensional samples in nats, estimated on their codes (Butakov et al. 2023, algorithm 1).

    By the data processing inequality the codes have at most the information of what they code, so that apart from the
    estimator's own error this is a lower bound.

    Args:
        x: samples (N, ...), or labels (N,) with `x_discrete=True`.
        y: samples (N, ...), or labels (N,) with `y_discrete=True`.
        compress_x: has `fit(x)` and `transform(x)`, such as `PCACompressor`; None takes x as it is.
        compress_y: the same for y.
        fit_share: the compressors are fitted on this share of the rows, the first ones, and the information is estimated on the
            others. With 0 they have to be fitted already.
        how: everything else goes to `lib.information.mutual_information`.

    Returns:
        Information and standard error, both in nats.

    Raises:
        ValueError: different lengths, a share outside [0, 1), or what `mutual_information` refuses.
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must have one length, got {len(x)} and {len(y)}")
    if not 0 <= fit_share < 1:
        raise ValueError(f"fit_share must be in [0, 1), got {fit_share}")
    cut = int(fit_share * len(x))
    codes = []
    for samples, compressor in ((x, compress_x), (y, compress_y)):
        if compressor is None:
            codes.append(samples[cut:])
            continue
        if cut:
            compressor.fit(samples[:cut])
        codes.append(compressor.transform(samples[cut:]))
    return mutual_information(*codes, **how)


def mine(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    steps: int = 500,
    batch_size: int = 256,
    hidden: tuple[int, ...] = (64, 64),
    lr: float = 1e-3,
    held_out: float = 0.25,
    evaluations: int = 10,
    seed: int = 0,
) -> tuple[float, float]:
    """Mutual information in nats by a trained critic T (Belghazi et al. 2018), on points that it did not see.

    Maximises E_p(x,y) T - log E_p(x)p(y) exp T, with the running mean of exp T in the gradient of the logarithm, which takes
    the bias of small batches out. The value is the largest of some evaluations on held-out points, which favours it.

    Args:
        x: samples (N, ...).
        y: samples (N, ...).
        steps: of Adam.
        batch_size: of a step.
        hidden: the critic's hidden widths.
        lr: Adam's learning rate.
        held_out: the share of the points, the last ones, on which the bound is evaluated.
        evaluations: how often it is, at even distances.
        seed: of weights and batches; the global random state is left as it was.

    Returns:
        The bound and its standard error, both in nats.

    Raises:
        ValueError: different lengths, or a share that leaves one part with fewer than four points.
    """
    from lib.models.mlp import mlp  # here, since lib.models may import this package

    if len(x) != len(y):
        raise ValueError(f"x and y must have one length, got {len(x)} and {len(y)}")
    cut = len(x) - int(held_out * len(x))
    if not 4 <= cut <= len(x) - 4:
        raise ValueError(f"held_out must leave four points in each part, got {held_out} of {len(x)}")
    x, y = (
        (z - z[:cut].mean(0)) / z[:cut].std().clamp_min(1e-12) for z in (_flat(x).float(), _flat(y).float())
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = mlp((x.shape[1] + y.shape[1], *hidden, 1))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(critic.parameters(), lr=lr, fused=True)
    running, best = None, (-math.inf, math.nan)
    for step in range(1, steps + 1):
        rows = torch.randint(cut, (min(batch_size, cut),), generator=generator)
        joint, product = critic(
            torch.cat([torch.cat([x[rows], y[rows]], 1), torch.cat([x[rows], y[rows.roll(1)]], 1)])
        ).chunk(2)
        mean = product.exp().mean()
        running = mean.detach() if running is None else 0.99 * running + 0.01 * mean.detach()
        optimizer.zero_grad()
        (mean / running - joint.mean()).backward()
        optimizer.step()
        if step % max(1, steps // evaluations) == 0:
            with torch.no_grad():
                best = max(best, _donsker_varadhan(critic, x[cut:], y[cut:]))
    return best


def _donsker_varadhan(critic, x, y, shifts=4):
    joint = critic(torch.cat([x, y], 1))[:, 0]
    product = torch.cat([critic(torch.cat([x, y.roll(shift, 0)], 1))[:, 0] for shift in range(1, shifts + 1)])
    value = joint.mean() - torch.logsumexp(product, 0) + math.log(len(product))
    ratio = (product - torch.logsumexp(product, 0) + math.log(len(product))).exp()
    return float(value), float((joint.var() / len(x) + ratio.var() / len(product)).sqrt())


def _flat(x):
    if x.ndim < 2:
        raise ValueError(f"samples must have shape (N, ...), got {tuple(x.shape)}")
    return x.detach().flatten(1).double()


def _fitted(compressor, name):
    if not hasattr(compressor, name):
        raise ValueError(f"fit the {type(compressor).__name__} first")
