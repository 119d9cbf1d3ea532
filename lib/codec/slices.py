"""The coding order of slices and checkerboard passes: one loop for training, encoder and decoder."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lib.codec.checkerboard import ANCHOR, OTHER, keep, squeeze, unsqueeze
from lib.codec.coder import SymbolDecoder, SymbolEncoder
from lib.codec.context import (
    ChannelContext,
    EntropyParameters,
    GlobalInterContext,
    LatentResidualPrediction,
)
from lib.codec.likelihood import SCALE_MIN, gaussian_tables, scale_index


class SliceEntropyModel(nn.Module):
    """Means and scales of latents, slice by slice, each in two passes.

    For slice i the anchors' parameters come from hyper-parameters and the contexts of all earlier slices; those of the
    other places may use the anchors too. Everything is computed from decoded values, so encoder and decoder do the
    same arithmetic.

    Args:
        channels: of the latents.
        slices: how many; `channels` must be divisible.
        hyper: channels of the hyper-parameters; 0 for none.
        inter: makers of contexts of earlier slices, called `make(previous_channels, slice_channels)`; the module takes the
            earlier slices, (batch, previous_channels, h, w), and has an attribute `out_channels`.
        intra: makers of contexts of a slice's anchors, called `make(slice_channels)`.
        refine: whether a `LatentResidualPrediction` follows each pass; it needs hyper-parameters, whose first
            `channels` channels it reads.

    Raises:
        ValueError: channels that are not divisible, or `refine` without hyper-parameters.
    """

    def __init__(
        self,
        channels: int,
        slices: int,
        *,
        hyper: int,
        inter: Sequence[Callable[[int, int], nn.Module]] = (ChannelContext, GlobalInterContext),
        intra: Sequence[Callable[[int], nn.Module]] = (),
        refine: bool = True,
    ):
        super().__init__()
        if slices < 1 or channels % slices:
            raise ValueError(f"{channels} channels cannot be cut into {slices} slices")
        if refine and hyper < channels:
            raise ValueError(f"refine reads {channels} hyper means, but there are {hyper} hyper-parameters")
        self.channels, self.slices, self.hyper = channels, slices, hyper
        size = channels // slices
        # typical size of each channel: networks read latents in these units and answer in them
        self.register_buffer("spread", torch.ones(channels, 1, 1))
        self.inter, self.intra = nn.ModuleList(), nn.ModuleList()
        self.parameters_of = nn.ModuleList()  # for each slice: of anchors, of others
        self.refine = nn.ModuleList()
        for i in range(slices):
            earlier = nn.ModuleList(make(i * size, size) for make in inter) if i else nn.ModuleList()
            within = nn.ModuleList(make(size) for make in intra)
            inputs = hyper + sum(context.out_channels for context in earlier)
            more = sum(context.out_channels for context in within)
            self.inter.append(earlier)
            self.intra.append(within)
            self.parameters_of.append(
                nn.ModuleList(EntropyParameters(max(1, n), size) for n in (inputs, inputs + more))
            )
            if refine:
                self.refine.append(
                    nn.ModuleList(LatentResidualPrediction(channels + (i + 1) * size, size) for _ in range(2))
                )

    def walk(
        self,
        hyper: torch.Tensor,
        quantise: Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Go through all slices and passes in coding order.

        Args:
            hyper: hyper-parameters, (batch, hyper, h, w).
            quantise: called as `quantise(slice, parity, mean, scale)`, all (batch, channels / slices, h, w); returns the decoded
                values of that pass, of which only those at the places of the parity are used.

        Returns:
            The decoded latents (refined where there is refinement), and the means and scales that were used, each
            (batch, channels, h, w).
        """
        done, means, scales = [], [], []
        spreads = self.spread.chunk(self.slices)
        means_of_hyper = hyper[:, : self.channels]
        for i in range(self.slices):
            inputs = [hyper] if self.hyper else []
            if i:
                earlier = torch.cat(done, 1) / torch.cat(spreads[:i])
                inputs += [context(earlier) for context in self.inter[i]]
            inputs = inputs or [hyper.new_zeros(len(hyper), 1, *hyper.shape[2:])]
            current = mean_slice = scale_slice = 0
            for parity in (ANCHOR, OTHER):
                if parity == OTHER:
                    inputs = inputs + [context(current / spreads[i]) for context in self.intra[i]]
                mean, scale = self.parameters_of[i][parity](torch.cat(inputs, 1))
                mean, scale = mean * spreads[i], SCALE_MIN + scale * spreads[i]
                current = current + keep(quantise(i, parity, mean, scale), parity)
                if self.refine:
                    known = torch.cat([*done, current], 1) / torch.cat(spreads[: i + 1])
                    seen = torch.cat([means_of_hyper, known], 1)
                    current = current + keep(self.refine[i][parity](seen), parity)
                mean_slice, scale_slice = mean_slice + keep(mean, parity), scale_slice + keep(scale, parity)
            done.append(current)
            means.append(mean_slice)
            scales.append(scale_slice)
        return torch.cat(done, 1), torch.cat(means, 1), torch.cat(scales, 1)

    def forward(
        self, y: torch.Tensor, hyper: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`walk` with rounding around the means, whose gradient is that of the identity: for training and measurement."""
        parts = y.chunk(self.slices, 1)

        def quantise(i, parity, mean, scale):
            return parts[i] + (torch.round(parts[i] - mean) + mean - parts[i]).detach()

        return self.walk(hyper, quantise)

    def encode(self, y: torch.Tensor, hyper: torch.Tensor, encoder: SymbolEncoder) -> torch.Tensor:
        """Push the symbols of one image's latents (1, channels, h, w); returns what the decoder will decode."""
        tables, parts = gaussian_tables(), y.chunk(self.slices, 1)

        def quantise(i, parity, mean, scale):
            symbols = torch.round(parts[i] - mean)
            indexes = squeeze(scale_index(scale), parity)
            encoder.push(squeeze(symbols, parity).long().numpy(), indexes.numpy(), tables)
            return symbols + mean

        return self.walk(hyper, quantise)[0]

    def decode(self, hyper: torch.Tensor, decoder: SymbolDecoder) -> torch.Tensor:
        """Pull the symbols of one image's latents: (1, channels, h, w)."""
        tables = gaussian_tables()

        def quantise(i, parity, mean, scale):
            indexes = squeeze(scale_index(scale), parity)
            symbols = torch.from_numpy(decoder.pull(indexes.numpy(), tables)).to(mean.dtype)
            return unsqueeze(symbols, parity, *mean.shape[2:]) + mean

        return self.walk(hyper, quantise)[0]
