"""Three-dimensional images: generated phantoms, pairs of crops, mixing, and the NRRD files of the Left Atrium data."""

import gzip
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

NRRD_TYPES = {
    "uchar": "u1", "unsigned char": "u1", "uint8": "u1", "char": "i1", "signed char": "i1", "int8": "i1",
    "short": "i2", "int16": "i2", "ushort": "u2", "unsigned short": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "unsigned int": "u4", "uint32": "u4", "float": "f4", "double": "f8",
}  # fmt: skip


def paired_crops(
    volume: torch.Tensor, size: int | tuple[int, int, int], *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two crops of a volume at independent places, and where they overlap (Liu 2022, arXiv 2203.14523).

    Args:
        volume: (..., depth, height, width), such as channels of which one is the label.
        size: of the crops in voxels, one number or one for each axis.
        generator: of the places.

    Returns:
        crop a and crop b, (..., *size); the overlap in the coordinates of crop a and in those of crop b, (3, 2)
        integers, start and stop on each axis. `a[box_a]` and `b[box_b]` are the same voxels. If the crops do not meet,
        all entries of both boxes are 0.

    Raises:
        ValueError: a volume of fewer than three dimensions, or a crop that is larger than it.
    """
    if volume.dim() < 3:
        raise ValueError(f"volume must be (..., depth, height, width), got {tuple(volume.shape)}")
    edges, shape = (size,) * 3 if isinstance(size, int) else tuple(size), volume.shape[-3:]
    if len(edges) != 3 or any(not 1 <= edge <= length for edge, length in zip(edges, shape, strict=False)):
        raise ValueError(f"size must be within 1 and {tuple(shape)}, got {edges}")
    size = torch.tensor(edges)
    room = torch.tensor(shape) - size
    at_a, at_b = ((torch.rand(3, generator=generator) * (room + 1)).long() for _ in range(2))
    crops = [
        volume[(..., *(slice(t, t + s) for t, s in zip(at.tolist(), size.tolist(), strict=True)))]
        for at in (at_a, at_b)
    ]
    low, high = torch.maximum(at_a, at_b), torch.minimum(at_a, at_b) + size
    if bool((low >= high).any()):
        low, high = torch.zeros(3).long(), torch.zeros(3).long()
        at_a = at_b = low
    return *crops, torch.stack([low - at_a, high - at_a], 1), torch.stack([low - at_b, high - at_b], 1)


def cutmix3d(
    images: torch.Tensor,
    *others: torch.Tensor,
    alpha: float = 4.0,
    full_depth: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, ...]:
    """Paste a box of another volume of the batch into each volume, the same box in every tensor given.

    The share pasted is 1 - m with m drawn from Beta(alpha, alpha), once for the batch; the place differs.

    Args:
        images: (batch, channels, d1, d2, d3).
        others: whatever has to stay aligned with the images, such as the peer's logits: (batch, ..., d1, d2, d3).
        alpha: of the Beta distribution, positive.
        full_depth: whether the box runs through all of the last axis, with sides sqrt(1 - m) on the other two, as the
            authors' code has it. False: sides of (1 - m)^(1/3) on all three axes.
        generator: of share, places and partners.

    Returns:
        The mixed tensors, in the order given.

    Raises:
        ValueError: shapes that do not fit, or an alpha that is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    shape = images.shape
    for tensor in (images, *others):
        if tensor.dim() < 4 or tensor.shape[0] != shape[0] or tensor.shape[-3:] != shape[-3:]:
            raise ValueError(
                f"all tensors must be (batch, ..., d1, d2, d3) as {tuple(shape)}, got {tuple(tensor.shape)}"
            )
    draw = int(torch.randint(2**31, (), generator=generator))  # torch has no beta variable with a generator
    share = 1 - np.random.default_rng(draw).beta(alpha, alpha)
    partner = torch.randperm(shape[0], generator=generator)
    ratios = (share**0.5, share**0.5, 1.0) if full_depth else (share ** (1 / 3),) * 3
    sides = [round(length * ratio) for length, ratio in zip(shape[-3:], ratios, strict=True)]
    mixed = [tensor.clone() for tensor in (images, *others)]
    for i in range(shape[0]):
        starts = [
            int(torch.rand((), generator=generator) * (length - side + 1))
            for length, side in zip(shape[-3:], sides, strict=True)
        ]
        box = (..., *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))
        for tensor, source in zip(mixed, (images, *others), strict=True):
            tensor[i][box] = source[partner[i]][box]
    return tuple(mixed)


def phantoms(
    n: int, *, seed: int = 0, context: str = "normal", size: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated scans of a body with a bright column, an organ and a look-alike.

    Organ and look-alike are ellipsoids of one size and of one mean intensity. The organ has a fine texture, the
    look-alike is smooth. In the normal anatomy the organ is on the low side of the column on the second axis and the
    look-alike on the other; `"moved"` swaps the two. Every scan has its own geometry, noise and smooth bias.

    Args:
        n: how many.
        seed: of everything.
        context: `"normal"` or `"moved"`.
        size: edge of the cubes in voxels, at least 12.

    Returns:
        images (n, 1, size, size, size) float32, standardised one by one; labels (n, size, size, size), 1 in the organ.

    Raises:
        ValueError: an unknown context, fewer than 1 scan, or a size below 12.
    """
    if context not in ("normal", "moved"):
        raise ValueError(f"context must be 'normal' or 'moved', got {context!r}")
    if n < 1 or size < 12:
        raise ValueError(f"n must be at least 1 and size at least 12, got {n} and {size}")
    rng = np.random.default_rng([seed, ("normal", "moved").index(context)])
    scans = [_phantom(rng, context == "moved", size) for _ in range(n)]
    images, labels = (np.stack(parts) for parts in zip(*scans, strict=True))
    return torch.from_numpy(images[:, None].astype(np.float32)), torch.from_numpy(labels.astype(np.int64))


def _phantom(rng, moved, size):
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1)
    unit = size / 16  # lengths below are for an edge of 16 voxels

    def ellipsoid(center, radii):
        return (((grid - center) / radii) ** 2).sum(-1) < 1

    middle = np.full(3, (size - 1) / 2) + rng.uniform(-0.7, 0.7, 3) * unit
    image = 0.8 * ellipsoid(middle, unit * rng.uniform(7.0, 8.0, 3))
    column = middle + [0, rng.uniform(-0.5, 0.5) * unit, 0]
    image[((grid - column)[..., 1:] ** 2).sum(-1) < (1.6 * unit) ** 2] = rng.uniform(1.8, 2.6)
    radii = unit * rng.uniform(2.2, 3.2, 3)
    sides = []
    for way in (-1, 1):
        apart, along = way * 4.6 + rng.uniform(-0.4, 0.4), rng.uniform(-1.5, 1.5)
        offset = [rng.uniform(-2, 2), along, apart] if moved else [rng.uniform(-2, 2), apart, along]
        sides.append(ellipsoid(column + unit * np.array(offset), radii))
    organ, other = sides
    other &= ~organ
    texture = np.where(grid.sum(-1) % 2, 1.0, -1.0)
    level = rng.uniform(1.2, 1.6)
    image[organ] = level + rng.uniform(0.25, 0.55) * texture[organ]
    image[other] = level
    bias = gaussian_filter(rng.standard_normal(image.shape), 4 * unit)
    image = image * (1 + 0.1 * bias / bias.std()) + rng.uniform(0.15, 0.35) * rng.standard_normal(image.shape)
    return (image - image.mean()) / image.std(), organ


def nrrd(path: str | Path) -> torch.Tensor:
    """A three-dimensional image in an attached NRRD file, the format of the Left Atrium challenge.

    Args:
        path: a `.nrrd` file, raw or gzip encoded.

    Returns:
        The voxels in the order of the file's axes (its first axis is the fastest), float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an attached NRRD file of a known type, or its length is not what its header says.
    """
    content = Path(path).read_bytes()
    head, _, data = content.partition(b"\n\n")
    if not head.startswith(b"NRRD"):
        raise ValueError(f"{path}: an NRRD file starts with 'NRRD', got {content[:4]!r}")
    fields = dict(
        line.split(": ", 1)
        for line in head.decode("ascii", "replace").replace("\r", "").splitlines()[1:]
        if ": " in line and not line.startswith("#")
    )
    kind, encoding = fields.get("type", ""), fields.get("encoding", "")
    if kind not in NRRD_TYPES or encoding not in ("raw", "gzip", "gz") or "data file" in fields:
        raise ValueError(f"{path}: only attached raw or gzip data of {sorted(set(NRRD_TYPES))}, got {fields}")
    if encoding != "raw":
        data = gzip.decompress(data)
    sizes = [int(number) for number in fields.get("sizes", "").split()]
    order = ">" if fields.get("endian") == "big" else "<"
    dtype = np.dtype(order + NRRD_TYPES[kind])
    if not sizes or len(data) != dtype.itemsize * int(np.prod(sizes)):
        raise ValueError(f"{path}: {len(data)} bytes do not fill {sizes} voxels of {kind}")
    voxels = np.frombuffer(data, dtype).reshape(sizes, order="F")
    return torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))
