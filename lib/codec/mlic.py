"""MLICv2: the multi-reference entropy model, and the codec around it."""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from lib.codec.checkerboard import ANCHOR, OTHER, keep, squeeze
from lib.codec.coder import SymbolDecoder, SymbolEncoder
from lib.codec.context import EntropyParameters
from lib.codec.likelihood import SCALE_MIN, gaussian_bits, gaussian_tables, scale_index
from lib.codec.model import ImageCodec
from lib.codec.multi_reference import (
    HGCP,
    ContextReweighting,
    ConvolutionalContext,
    LinearGlobalInter,
    LinearGlobalIntra,
    LocalWindowContext,
)
from lib.codec.selective import SelectiveMap
from lib.codec.slices import SliceEntropyModel
from lib.codec.token_mixing import SimpleTokenMixing
from lib.codec.transforms import ResidualSwinV2

CONTEXTS = ("channel", "inter", "intra", "local")
PARTS = ("stm", "hgcp", "cr", "rope", "gsc")


class MultiReferenceEntropyModel(SliceEntropyModel):
    """Means and scales from many references, slice by slice, each in two passes; see `SliceEntropyModel`.

    Anchors of a slice see the hyper-parameters and, from the second slice on, channel and global inter-slice context. The
    others see the local context of the anchors too, and the global intra-slice context.

    Args:
        channels, slices, hyper, refine: as there.
        contexts: which of `"channel"`, `"inter"`, `"intra"`, `"local"`.
        parts: which of MLICv2's additions: `"hgcp"` (global context of the first slice), `"cr"` (every context is reweighted),
            `"rope"` (rotary positions in the local context), `"gsc"` (symbols that the decoder expects to be zero are not coded).

    Raises:
        ValueError: an unknown context or part.
    """

    def __init__(
        self,
        channels: int,
        slices: int,
        *,
        hyper: int,
        contexts: Iterable[str] = CONTEXTS,
        parts: Iterable[str] = PARTS[1:],
        refine: bool = True,
    ):
        super().__init__(channels, slices, hyper=hyper, inter=(), intra=(), refine=refine)
        contexts, parts = set(contexts), set(parts)
        if unknown := (contexts - set(CONTEXTS)) | (parts - set(PARTS[1:])):
            raise ValueError(f"contexts are {CONTEXTS}, parts {PARTS[1:]}; unknown: {sorted(unknown)}")
        size = channels // slices
        self.contexts = nn.ModuleList()  # for each slice: of anchors, of others
        self.parameters_of, self.selective = nn.ModuleList(), nn.ModuleList()
        for i in range(slices):
            anchors, others = nn.ModuleDict(), nn.ModuleDict()
            if i and "channel" in contexts:
                anchors["channel"] = ConvolutionalContext(i * size, size)
            if i and "inter" in contexts:
                anchors["inter"] = LinearGlobalInter(i * size, size)
            if not i and "hgcp" in parts:
                anchors["hgcp"], others["hgcp_others"] = (HGCP(hyper, size, p) for p in (ANCHOR, OTHER))
            if i and "intra" in contexts:
                others["intra"] = LinearGlobalIntra(size)
            if "local" in contexts:
                others["local"] = LocalWindowContext(size, rope="rope" in parts)
            widths = [hyper + sum(c.out_channels for c in anchors.values())]
            widths.append(widths[0] + sum(c.out_channels for c in others.values()))
            if "cr" in parts:
                for group in (anchors, others):
                    group.update(
                        {f"{k}_weights": ContextReweighting(c.out_channels) for k, c in group.items()}
                    )
            self.contexts.append(nn.ModuleList([anchors, others]))
            self.parameters_of.append(nn.ModuleList(EntropyParameters(n, size) for n in widths))
            if "gsc" in parts:
                self.selective.append(nn.ModuleList(SelectiveMap(n, size) for n in widths))

    def _context(self, i, parity, earlier, previous, current, hyper):
        """All contexts of a pass, by name, in the order in which the networks read them."""
        group, arguments = self.contexts[i][parity], {
            "channel": (earlier,), "inter": (earlier,), "hgcp": (hyper,), "hgcp_others": (hyper, current),
            "intra": (previous, current), "local": (current,),
        }  # fmt: skip
        out = {}
        for name, values in arguments.items():
            if name in group:
                context = group[name](*values)
                out[name] = group[f"{name}_weights"](context) if f"{name}_weights" in group else context
        return out

    def widths(self, i: int, parity: int) -> dict[str, int]:
        """Channels of all that the parameters of a pass are made of, in order."""
        widths = {"hyper": self.hyper}
        for group in self.contexts[i][: parity + 1]:
            for name in ("channel", "inter", "hgcp", "hgcp_others", "intra", "local"):
                if name in group:
                    widths[name] = group[name].out_channels
        return widths

    def walk(
        self,
        hyper: torch.Tensor,
        quantise: Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        observe: Callable | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Go through all slices and passes in coding order; see `SliceEntropyModel.walk`.

        A scale of zero, in what `quantise` gets and in what is returned, says that the symbol is not coded: its value
        is the mean.

        Args:
            hyper, quantise: as there.
            observe: called as `observe(slice, parity, mean, logits)` with those of `SelectiveMap`.
        """
        done, means, scales = [], [], []
        spreads = self.spread.chunk(self.slices)
        means_of_hyper = hyper[:, : self.channels]
        for i in range(self.slices):
            earlier = torch.cat(done, 1) / torch.cat(spreads[:i]) if i else None
            previous = done[-1] / spreads[i - 1] if i else None
            inputs, current, mean_slice, scale_slice = [hyper], 0, 0, 0
            for parity in (ANCHOR, OTHER):
                anchors = current / spreads[i] if parity == OTHER else None
                inputs += self._context(i, parity, earlier, previous, anchors, hyper).values()
                seen = torch.cat(inputs, 1)
                mean, scale = self.parameters_of[i][parity](seen)
                mean, scale = mean * spreads[i], SCALE_MIN + scale * spreads[i]
                if self.selective:
                    select = self.selective[i][parity]
                    logits = select(seen, mean, scale)
                    if observe is not None:
                        observe(i, parity, mean, logits)
                    coded = select.coded(logits)
                    scale = scale * coded
                    values = torch.where(coded, quantise(i, parity, mean, scale), mean)
                else:
                    values = quantise(i, parity, mean, scale)
                current = current + keep(values, parity)
                if self.refine:
                    known = torch.cat([*done, current], 1) / torch.cat(spreads[: i + 1])
                    guess = self.refine[i][parity](torch.cat([means_of_hyper, known], 1))
                    current = current + keep(guess, parity)
                mean_slice, scale_slice = mean_slice + keep(mean, parity), scale_slice + keep(scale, parity)
            done.append(current)
            means.append(mean_slice)
            scales.append(scale_slice)
        return torch.cat(done, 1), torch.cat(means, 1), torch.cat(scales, 1)

    def encode(self, y: torch.Tensor, hyper: torch.Tensor, encoder: SymbolEncoder) -> torch.Tensor:
        """Push the symbols of one image's latents (1, channels, h, w); returns what the decoder will decode."""
        tables, parts = gaussian_tables(), y.chunk(self.slices, 1)

        def quantise(i, parity, mean, scale):
            symbols = torch.round(parts[i] - mean)
            coded = squeeze(scale, parity) > 0
            indexes = squeeze(scale_index(scale), parity)[coded]
            encoder.push(squeeze(symbols, parity)[coded].long().numpy(), indexes.numpy(), tables)
            return symbols + mean

        return self.walk(hyper, quantise)[0]

    def decode(self, hyper: torch.Tensor, decoder: SymbolDecoder) -> torch.Tensor:
        """Pull the symbols of one image's latents: (1, channels, h, w)."""
        tables = gaussian_tables()

        def quantise(i, parity, mean, scale):
            coded = (scale > 0) & (keep(torch.ones_like(scale), parity) > 0)
            symbols = torch.zeros_like(mean)
            indexes = scale_index(scale)[coded]
            symbols[coded] = torch.from_numpy(decoder.pull(indexes.numpy(), tables)).to(mean.dtype)
            return symbols + mean

        return self.walk(hyper, quantise)[0]

    def selection_loss(self, y: torch.Tensor, hyper: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy, in nats a symbol, of the selective maps against which symbols are not zero.

        Raises:
            ValueError: a model without selective maps.
        """
        if not self.selective:
            raise ValueError("this model has no selective maps: it needs the part 'gsc'")
        parts, losses = y.chunk(self.slices, 1), []

        def observe(i, parity, mean, logits):
            nonzero = (torch.round(parts[i] - mean) != 0).to(logits.dtype)
            loss = F.binary_cross_entropy_with_logits(logits, nonzero, reduction="none")
            losses.append(squeeze(loss, parity).sum())

        self.walk(hyper, lambda i, p, mean, scale: torch.round(parts[i] - mean) + mean, observe=observe)
        return sum(losses) / y.numel()

    @torch.no_grad()
    def widen(self, smaller: "MultiReferenceEntropyModel") -> None:
        """Take over a model with fewer contexts: until it is trained, this one computes the same.

        Networks of the same name and shape are copied; the columns of new contexts are set to zero.

        Raises:
            ValueError: other channels, slices or hyper-parameters.
        """
        if any(getattr(self, n) != getattr(smaller, n) for n in ("channels", "slices", "hyper")):
            raise ValueError("channels, slices and hyper-parameters must be the same")
        theirs, mine = smaller.state_dict(), self.state_dict()
        for name, value in mine.items():
            if name in theirs and theirs[name].shape == value.shape:
                value.copy_(theirs[name])
        for i in range(self.slices):
            for parity in (ANCHOR, OTHER):
                old, new = (m.parameters_of[i][parity].net for m in (smaller, self))
                sources = dict(_columns(smaller.widths(i, parity)))
                nn.init.zeros_(new[0].weight)
                for name, columns in _columns(self.widths(i, parity)):
                    if name in sources:
                        new[0].weight[:, columns] = old[0].weight[:, sources[name]]


def _columns(widths):
    start = 0
    for name, width in widths.items():
        yield name, slice(start, start + width)
        start += width


class MLICv2(ImageCodec):
    """MLICv2 (Jiang et al. 2025): token mixing transforms and the multi-reference entropy model; coder and file of `ImageCodec`.

    Args:
        N, M: channels of the transforms and of the latents; the paper's are 192 and 320.
        slices: of the latents; the paper's are 10.
        parts: which additions to MLIC++: `"stm"` (`SimpleTokenMixing` in place of SwinV2 blocks), and those of
            `MultiReferenceEntropyModel`.
        contexts, refine: as there.
        options: of `ImageCodec`.

    Raises:
        ValueError: an unknown context or part.
    """

    def __init__(
        self,
        N: int = 24,
        M: int = 40,
        slices: int = 5,
        *,
        parts: Iterable[str] = PARTS,
        contexts: Iterable[str] = CONTEXTS,
        refine: bool = True,
        **options,
    ):
        parts = set(parts)
        entropy = MultiReferenceEntropyModel(M, slices, hyper=2 * M, contexts=contexts, parts=parts - {"stm"})
        super().__init__(entropy, N, **options)
        self.own_transforms = "stm" in parts
        if self.own_transforms:
            for transform in (self.analysis, self.synthesis):
                replace_groups(transform, lambda: nn.Sequential(*(SimpleTokenMixing(N) for _ in range(2))))

    def symbol_bits(self, residual: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As `ImageCodec.symbol_bits`; a scale of 0 marks a symbol that is not coded."""
        return torch.where(scale > 0, gaussian_bits(residual, scale), torch.zeros_like(scale))

    def adopt(self, codec: ImageCodec) -> None:
        """Copy gains, units, hyperprior and, unless this model has transforms of its own, transforms of another codec.

        Raises:
            ValueError: another number of channels or rate points.
        """
        if (self.N, self.M, self.lambdas) != (codec.N, codec.M, codec.lambdas):
            raise ValueError("the codecs must have the same channels and rate points")
        for name in ("hyper_analysis", "hyper_synthesis", "prior"):
            setattr(self, name, copy.deepcopy(getattr(codec, name)).requires_grad_(True))
        if not self.own_transforms:
            self.analysis, self.synthesis = copy.deepcopy(codec.analysis), copy.deepcopy(codec.synthesis)
        with torch.no_grad():
            self.log_gain.copy_(codec.log_gain)
            self.log_inverse_gain.copy_(codec.log_inverse_gain)
            self.entropy.spread.copy_(codec.entropy.spread)


def replace_groups(transform: nn.Sequential, make: Callable[[], nn.Module]) -> None:
    """Put what `make` makes in the place of each group of SwinV2 blocks."""
    for i, layer in enumerate(transform):
        if isinstance(layer, ResidualSwinV2):
            transform[i] = make()
