"""The codecs that everybody has, as a baseline."""

import io

import numpy as np
import torch
from PIL import Image

OPTIONS = {"JPEG": {"optimize": True}, "WebP": {"method": 6}}  # the slowest and smallest


def conventional(image: torch.Tensor, form: str, quality: int) -> tuple[bytes, torch.Tensor]:
    """A JPEG or WebP file of an image, and the image that it shows.

    Args:
        image: (3, height, width) in [0, 1].
        form: `"JPEG"` or `"WebP"`.
        quality: Pillow's, from 0 to 100.

    Returns:
        The file, and (3, height, width) in [0, 1].

    Raises:
        ValueError: something that is no image, or an unknown form or quality.
    """
    if image.ndim != 3 or len(image) != 3 or not image.is_floating_point() or not image.numel():
        raise ValueError(f"an image must be (3, height, width) of floats, got {tuple(image.shape)}")
    if form not in OPTIONS or not 0 <= quality <= 100:
        raise ValueError(f"form must be JPEG or WebP and quality in 0 ... 100, got {form!r} and {quality!r}")
    pixels = (image.detach().clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, quality=quality, **OPTIONS[form])
    shown = np.array(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
    return buffer.getvalue(), torch.from_numpy(shown).permute(2, 0, 1) / 255
