"""Random resized crops whose parameters are kept, so that a crop can be made again, and boxes of crops pasted into others."""

import math

import torch


def crop_parameters(
    n: int,
    height: int,
    width: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw the parameters of random resized crops: top, left, height, width in pixels, and flip (0 or 1).

    The share of the area is uniform, the ratio width / height uniform in its logarithm; sides are rounded, and cut to
    the image where they exceed it. The corner is uniform among those at which the crop lies within the image.

    Args:
        n: how many.
        height, width: of the images.
        area: least and largest share of the image's area, in (0, 1].
        ratio: least and largest width / height, positive.
        flip: probability of mirroring left and right.
        generator: of all draws.

    Returns:
        int64 (n, 5), as `random_resized_crop` takes them.

    Raises:
        ValueError: sizes below 1, ranges that are empty or out of bounds, a flip that is no probability.
    """
    if n < 0 or height < 1 or width < 1:
        raise ValueError(f"n must be at least 0, height and width at least 1, got {n}, {height} and {width}")
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"area must be a range within (0, 1], got {area}")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio must be a range of positive numbers, got {ratio}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability, got {flip}")
    draws = torch.rand(n, 5, generator=generator, dtype=torch.float64)
    pixels = (area[0] + (area[1] - area[0]) * draws[:, 0]) * height * width
    log_ratio = math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draws[:, 1]
    tall = (pixels / log_ratio.exp()).sqrt().round().clamp(1, height)
    wide = (pixels * log_ratio.exp()).sqrt().round().clamp(1, width)
    top = (draws[:, 2] * (height - tall + 1)).floor()
    left = (draws[:, 3] * (width - wide + 1)).floor()
    return torch.stack([top, left, tall, wide, draws[:, 4] < flip], 1).long()


def random_resized_crop(images: torch.Tensor, parameters: torch.Tensor, size: int) -> torch.Tensor:
    """Cut a box out of each image, resize it to `size` x `size` and mirror it where its flip says so.

    Bilinear with antialiasing: as `torch.nn.functional.interpolate(crop, mode="bilinear", antialias=True)` of each crop,
    but all crops at once, by two batched matrix products. Nothing from outside the box enters. The result depends on
    the arguments alone, so stored parameters make the same crop again.

    Args:
        images: (n, channels, height, width), floating point.
        parameters: integers (n, 5): top, left, height, width in pixels and flip, 0 or 1.
        size: height and width of the result.

    Returns:
        (n, channels, size, size).

    Raises:
        TypeError: parameters that are not integers.
        ValueError: another shape or dtype, boxes that are empty or leave the image, flips other than 0 and 1, a size
            below 1.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point (n, channels, height, width), got {images.dtype} {tuple(images.shape)}"
        )
    if parameters.is_floating_point() or parameters.dtype == torch.bool:
        raise TypeError(f"parameters must be integers, got {parameters.dtype}")
    if parameters.shape != (len(images), 5):
        raise ValueError(f"parameters must be ({len(images)}, 5), got {tuple(parameters.shape)}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    parameters = parameters.long()
    top, left, tall, wide, flip = parameters.unbind(1)
    if len(images) and not (
        (parameters >= 0).all()
        and (torch.minimum(tall, wide) >= 1).all()
        and (top + tall <= images.shape[2]).all()
        and (left + wide <= images.shape[3]).all()
        and (flip <= 1).all()
    ):
        raise ValueError(
            "each row of parameters must be a box of at least one pixel within the image and a flip, 0 or 1"
        )
    rows = _resize_matrix(top, tall, images.shape[2], size, images.dtype)  # (n, size, height)
    columns = _resize_matrix(left, wide, images.shape[3], size, images.dtype)  # (n, size, width)
    columns = torch.where(flip.bool()[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images @ columns[:, None].mT


def paste_box(
    first: torch.Tensor,
    second: torch.Tensor,
    first_labels: torch.Tensor,
    second_labels: torch.Tensor,
    *,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste a random box of the second image over the same place of the first, and mix the labels by area.

    The box has the shape of the image; its share of the area is drawn uniformly from [0, 1], as in CutMix with
    alpha = 1, and its sides are rounded to pixels. The labels are weighed by the pixels that each image really has, so
    a label says what is in the picture. Works under `torch.vmap` with `randomness="different"` and no generator.

    Args:
        first, second: (n, channels, height, width).
        first_labels, second_labels: distributions (n, C).
        generator: of the boxes.

    Returns:
        Mixed images (n, channels, height, width) and labels (n, C).

    Raises:
        ValueError: shapes that do not fit.

    Reference: the box of Yun et al., CutMix, 2019.
    """
    if first.dim() != 4 or first.shape != second.shape:
        raise ValueError(
            f"both images must be (n, channels, height, width), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    n, _, height, width = first.shape
    if first_labels.dim() != 2 or first_labels.shape != second_labels.shape or len(first_labels) != n:
        raise ValueError(
            f"both labels must be ({n}, C), got {tuple(first_labels.shape)} and {tuple(second_labels.shape)}"
        )
    share, down, right = torch.rand(3, n, 1, generator=generator).to(first)
    tall, wide = (share.sqrt() * height).round(), (share.sqrt() * width).round()  # (n, 1)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    row = torch.arange(height, device=first.device)
    column = torch.arange(width, device=first.device)
    inside = ((row >= top) & (row < top + tall))[:, :, None] & ((column >= left) & (column < left + wide))[
        :, None, :
    ]
    kept = 1 - tall * wide / (height * width)  # lambda, (n, 1)
    images = torch.where(inside[:, None], second, first)
    return images, kept * first_labels + (1 - kept) * second_labels


def selfmix(
    crops: torch.Tensor, labels: torch.Tensor, *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each crop with another crop of the SAME image (`paste_box`), and their two labels by area.

    Args:
        crops: (images, crops, channels, height, width), at least two crops an image.
        labels: of each crop, not of the image: (images, crops, C).
        generator: of partners and boxes.

    Returns:
        Crops and labels of the same shapes.

    Raises:
        ValueError: shapes that do not fit, or one crop an image.

    Reference: Shen, FerKD: Surgical Label Adaptation for Efficient Distillation, 2023, SelfMix.
    """
    return _mix(crops, labels, 1, generator)


def cutmix(
    crops: torch.Tensor, labels: torch.Tensor, *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each crop with a crop of ANOTHER image (`paste_box`), and their two labels by area.

    All images are shifted by the same number of places to their partners.

    Args:
        crops: (images, crops, channels, height, width), at least two images.
        labels: of each crop, (images, crops, C).
        generator: of partners and boxes.

    Returns:
        Crops and labels of the same shapes.

    Raises:
        ValueError: shapes that do not fit, or one image.

    Reference: Yun et al., CutMix, 2019.
    """
    return _mix(crops, labels, 0, generator)


def _mix(crops, labels, dim, generator):
    if crops.dim() != 5 or labels.dim() != 3 or labels.shape[:2] != crops.shape[:2]:
        raise ValueError(
            "crops must be (images, crops, channels, height, width) and labels (images, crops, C), got "
            f"{tuple(crops.shape)} and {tuple(labels.shape)}"
        )
    places = crops.shape[dim]
    if places < 2:
        raise ValueError(
            f"mixing needs two {'crops of each image' if dim else 'images'} at least, got {places}"
        )
    # a shift by 1 to places - 1 is never the crop itself; by index, since vmap cannot roll by a random number
    move = 1 + (torch.rand(1, generator=generator) * (places - 1)).floor().long().clamp(max=places - 2)
    partner = (torch.arange(places) + move) % places
    partner = partner.to(crops.device)
    mixed, mixed_labels = paste_box(
        crops.flatten(0, 1),
        crops.index_select(dim, partner).flatten(0, 1),
        labels.flatten(0, 1),
        labels.index_select(dim, partner).flatten(0, 1),
        generator=generator,
    )
    return mixed.reshape(crops.shape), mixed_labels.reshape(labels.shape)


def _resize_matrix(start, length, whole, size, dtype):
    """Weights (n, size, whole) that resize the pixels start to start + length of an axis to `size` pixels."""
    start, length = start[:, None, None].double(), length[:, None, None].double()
    scale = length / size
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(whole, device=start.device)
    # the triangle of bilinear interpolation, as wide as the step between two results where that exceeds a pixel
    weights = (1 - (pixel + 0.5 - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weights = weights.masked_fill((pixel < start) | (pixel >= start + length), 0)
    return (weights / weights.sum(2, keepdim=True)).to(dtype)
