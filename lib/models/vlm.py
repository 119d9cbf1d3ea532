"""A small vision-language model: image tokens and a prompt in front of one decoder."""

import torch
from torch import nn

from lib.models.gpt import GPT


class VLM(nn.Module):
    """Image features, projected into the embedding space of a language model and put in front of the prompt.

    Args:
        image_encoder: one image to one row of features, as `lib.models.CNN.features` does: (n, ...) to (n, width). Pass
            `nn.Identity()` to give features that were computed once by a frozen encoder.
        projector: features to vectors of the language model, (n, width) to (n, dim).
        gpt: the decoder. With learned positions the image tokens take the first ones.
    """

    def __init__(self, image_encoder: nn.Module, projector: nn.Module, gpt: GPT):
        super().__init__()
        self.image_encoder, self.projector, self.gpt = image_encoder, projector, gpt

    def visual(self, images: torch.Tensor) -> torch.Tensor:
        """Visual tokens without positions: (batch, cells, ...) to (batch, cells, dim).

        Raises:
            ValueError: not a batch of at least one image each, or an encoder or projector that returns another shape.
        """
        if images.ndim < 3 or images.shape[1] < 1:
            raise ValueError(f"images must be (batch, cells >= 1, ...), got {tuple(images.shape)}")
        rows = self.projector(self.image_encoder(images.flatten(0, 1)))
        dim = self.gpt.embedding.embedding_dim
        if rows.shape != (images.shape[0] * images.shape[1], dim):
            raise ValueError(
                f"encoder and projector must map an image to one vector of {dim} numbers, got {tuple(rows.shape)}"
            )
        return rows.unflatten(0, images.shape[:2])

    def embed(self, images: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the decoder, and the visual tokens alone.

        Args:
            images: (batch, cells, ...), what `image_encoder` reads.
            prompt: tokens, (batch, seq).

        Returns:
            (batch, cells + seq, dim), the visual tokens first, with positions; and the visual tokens, (batch, cells, dim),
            without them.

        Raises:
            ValueError: `images` and `prompt` differ in their batch, or are longer than the context.
        """
        visual = self.visual(images)
        if prompt.ndim != 2 or len(prompt) != len(visual):
            raise ValueError(f"prompt must be ({len(visual)}, seq), got {tuple(prompt.shape)}")
        words = self.gpt.embed(prompt, start=visual.shape[1])
        first = visual
        if self.gpt.positions is not None:
            first = visual + self.gpt.positions.weight[: visual.shape[1]]
        return torch.cat([first, words], 1), visual

    def forward(self, images: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Next-token logits at the positions of the prompt, (batch, seq, vocab_size)."""
        embeds, visual = self.embed(images, prompt)
        return self.gpt.head(self.gpt.transform(embeds)[:, visual.shape[1] :])
