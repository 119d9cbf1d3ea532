"""How `lib.losses.linear` works: three autograd functions which hold a tile of the logits at a time, never all.

They share their arguments: `hidden` (tokens, dim), `weight` (num_classes, dim), `bias` or None, `targets` of the rows that
have a loss, `rows` (which rows of `hidden` these are; None for all) and a dictionary of options.
"""

import functools

import torch

_TILE_ELEMENTS = 1 << 23  # logits held at a time where the caller asks for no block size: 32 MB in float32


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """In what sums are formed: float32 for half precision."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def _take(matrix, rows, start, stop, dtype):
    """Rows `start` to `stop` of the selected ones: a view where nothing is selected, else a small copy."""
    part = matrix[start:stop] if rows is None else matrix[rows[start:stop]]
    return part.to(dtype)


def target_logits(hidden, weight, bias, targets, rows, softcap=None):
    dtype, parts = accumulator(hidden.dtype), []
    piece = max(1, (1 << 19) // max(1, hidden.shape[1]))  # gathers 2 MB at a time
    for start in range(0, len(targets), piece):
        own = targets[start : start + piece]
        vectors = _take(hidden, rows, start, start + piece, dtype)
        parts.append(torch.linalg.vecdot(vectors, weight[own].to(dtype)))
        if bias is not None:
            parts[-1] = parts[-1] + bias[own].to(dtype)
    own = torch.cat(parts) if parts else hidden.new_zeros(0, dtype=dtype)
    return own if softcap is None else softcap * torch.tanh(own / softcap)


def _tile_logits(vectors, weight, bias, softcap, buffer, with_slope):
    """Logits of one tile, written into `buffer`. Returns them, and the derivative of the soft cap where it is wanted."""
    logits = buffer[: len(vectors) * len(weight)].view(len(vectors), len(weight))
    if bias is None:
        torch.mm(vectors, weight.T, out=logits)
    else:
        torch.addmm(bias, vectors, weight.T, out=logits)
    if softcap is None:
        return logits, None
    logits.div_(softcap).tanh_()
    slope = (logits * logits).neg_().add_(1) if with_slope else None
    return logits.mul_(softcap), slope


class _Barrier(torch.autograd.Function):
    """The identity on a gradient, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError(
            "the gradient of linear_cross_entropy cannot be differentiated again; use impl='torch' for that"
        )


def _differentiable_once(backward):
    """Make a second derivative an error. (PyTorch's `once_differentiable` passes over it in silence where the upstream
    gradient is a constant, as it is in a gradient penalty.)"""

    @functools.wraps(backward)
    def guarded(ctx, *upstream):
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return grads
        inputs = [x for x in (*ctx.saved_tensors[:3], *upstream) if x is not None]
        return tuple(grad if grad is None else _Barrier.apply(grad, *inputs) for grad in grads)

    return guarded


class OnePass(torch.autograd.Function):
    """A summed loss whose gradients are finished in the forward pass: each chunk's logits are computed once.

    The upstream gradient of a scalar is a scalar, so it can be multiplied to the gradients afterwards. A chunk is some
    tokens against the whole vocabulary.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, scale, options):
        softcap, blocks, smoothing = options["softcap"], options["blocks"], options["smoothing"]
        wants = [options["gradients"] and needed for needed in ctx.needs_input_grad[:3]]
        # what is asked for as a gradient is allocated in any case, so it is where the sums are formed
        grads = [
            torch.zeros_like(part) if want else None
            for part, want in zip((hidden, weight, bias), wants, strict=True)
        ]
        d_hidden, d_weight, d_bias = grads
        count, num_classes = len(targets), len(weight)
        elements = (
            _TILE_ELEMENTS if softcap is None else _TILE_ELEMENTS // 2
        )  # a soft cap needs its slope kept
        step = min(count, blocks[0] if blocks else max(1, elements // num_classes))
        buffer = hidden.new_empty(step * num_classes)
        lse, total = hidden.new_empty(count), hidden.new_zeros(())
        for start in range(0, count, step):
            stop = min(start + step, count)
            vectors, own = _take(hidden, rows, start, stop, hidden.dtype), targets[start:stop, None]
            logits, slope = _tile_logits(vectors, weight, bias, softcap, buffer, any(wants))
            own_logits = logits.gather(1, own)
            if smoothing:  # the mean logit under the target distribution
                own_logits = own_logits.mul_(1 - smoothing).add_(
                    logits.mean(1, keepdim=True), alpha=smoothing
                )
            top = logits.amax(1, keepdim=True)
            logits.sub_(top).exp_()  # from here on the buffer holds exp(logits - top), then the gradient
            mass = logits.sum(1, keepdim=True)
            lse[start:stop] = top.add_(mass.log()).squeeze(1)
            total += (top - own_logits).sum()
            if not any(wants):
                continue
            logits.mul_(scale / mass)
            if smoothing:
                logits.sub_(scale * smoothing / num_classes)
            logits.scatter_add_(1, own, torch.full_like(mass, -scale * (1 - smoothing)))
            if slope is not None:
                logits.mul_(slope)
                slope = None  # before the next one is made
            if d_hidden is not None:
                if rows is None:
                    torch.mm(logits, weight, out=d_hidden[start:stop])
                else:
                    d_hidden[rows[start:stop]] = logits @ weight
            if d_weight is not None:
                d_weight.addmm_(logits.T, vectors)
            if d_bias is not None:
                d_bias += logits.sum(0)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, lse)
        ctx.gradients, ctx.scale, ctx.options = grads, scale, options
        return total * scale

    @staticmethod
    @_differentiable_once
    def backward(ctx, upstream):
        if ctx.gradients is not None:
            grads, ctx.gradients = ctx.gradients, None  # handed out, no copy stays behind
            return *(grad if grad is None else grad.mul_(upstream) for grad in grads), None, None, None, None
        tensors = ctx.saved_tensors  # a second backward pass, through a retained graph: compute them anew
        factor = (upstream * ctx.scale).expand(len(tensors[-1]))
        grads = tiled_backward(tensors, factor, None, ctx.needs_input_grad, ctx.options)
        return *grads, None, None, None, None


def _tile_shape(options, count, num_classes):
    if options["blocks"]:
        rows, columns = options["blocks"]
    elif options["eps"] is None:
        rows, columns = 512, _TILE_ELEMENTS // 512
    else:
        rows, columns = 128, 256  # a tile is skipped as a whole: smaller ones are skipped more often
    return max(1, min(rows, count)), min(columns, num_classes)


def _vocabulary_order(hidden, weight, bias, rows):
    """The classes by falling mean logit. The mean over tokens of `c . e` is `c . mean(e)`: one vector, no tiles."""
    dtype = accumulator(hidden.dtype)
    mean = (hidden if rows is None else hidden[rows]).mean(0, dtype=dtype)
    pieces = [weight[start : start + 8192].to(dtype) @ mean for start in range(0, len(weight), 8192)]
    logits = torch.cat(pieces)
    return torch.argsort(logits if bias is None else logits + bias, descending=True, stable=True)


class Tiled(torch.autograd.Function):
    """Loss and log-sum-exp of each row, by tiles; the backward pass recomputes the tiles and may skip some."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, options):
        dtype, softcap, smoothing = accumulator(hidden.dtype), options["softcap"], options["smoothing"]
        count, num_classes = len(targets), len(weight)
        step, width = _tile_shape(options, count, num_classes)
        buffer = hidden.new_empty(step * width, dtype=dtype)
        mean = hidden.new_zeros(count if smoothing else 0, dtype=dtype)
        lse = hidden.new_full((count,), -torch.inf, dtype=dtype)
        lowest = torch.finfo(dtype).min  # in place of a maximum of -inf, which a tile of masked classes has
        for first in range(0, num_classes, width):
            columns = slice(first, first + width)
            part = weight[columns].to(dtype)
            offset = None if bias is None else bias[columns].to(dtype)
            for start in range(0, count, step):
                stop = min(start + step, count)
                logits, _ = _tile_logits(
                    _take(hidden, rows, start, stop, dtype), part, offset, softcap, buffer, False
                )
                if smoothing:
                    mean[start:stop] += logits.sum(1) / num_classes
                top = logits.amax(1, keepdim=True).clamp_(min=lowest)
                partial = logits.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1))
                lse[start:stop] = torch.logaddexp(lse[start:stop], partial)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        own = target_logits(hidden, weight, bias, targets, rows, softcap)
        return lse - ((1 - smoothing) * own + smoothing * mean if smoothing else own), lse

    @staticmethod
    @_differentiable_once
    def backward(ctx, upstream, upstream_lse):
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
        upstream = torch.zeros_like(tensors[-1]) if upstream is None else upstream
        return *tiled_backward(tensors, upstream, upstream_lse, needed, ctx.options), None, None, None


def tiled_backward(tensors, upstream, upstream_lse, needed, options):
    """Gradients from the saved log-sum-exp. A class block is the outer loop, so its gradient is written once."""
    hidden, weight, bias, targets, rows, lse = tensors
    dtype, softcap, eps, stats = lse.dtype, options["softcap"], options["eps"], options["stats"]
    (filter_hidden, filter_weight), smoothing = options["filters"], options["smoothing"]
    count, num_classes = len(targets), len(weight)
    step, width = _tile_shape(options, count, num_classes)
    d_hidden = torch.zeros_like(hidden, dtype=dtype) if needed[0] else None
    d_weight = torch.zeros_like(weight) if needed[1] else None
    d_bias = torch.zeros_like(bias) if needed[2] else None
    order, places = None, targets  # the place of each target's class in the order of the tiles
    if eps is not None and options["sort"] and count:
        order = _vocabulary_order(hidden, weight, bias, rows)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[
            targets
        ]
    factor = (upstream if upstream_lse is None else upstream + upstream_lse)[:, None]
    buffer = hidden.new_empty(step * width, dtype=dtype)
    for first in range(0, num_classes if count else 0, width):
        columns = slice(first, first + width) if order is None else order[first : first + width]
        part = weight[columns].to(dtype)
        offset = None if bias is None else bias[columns].to(dtype)
        in_place = order is None and weight.dtype == dtype
        d_part = None if d_weight is None else d_weight[columns] if in_place else torch.zeros_like(part)
        d_offset = None if d_bias is None else torch.zeros_like(offset)
        for start in range(0, count, step):
            stop = min(start + step, count)
            vectors = _take(hidden, rows, start, stop, dtype)
            tile, slope = _tile_logits(vectors, part, offset, softcap, buffer, True)
            tile.sub_(lse[start:stop, None]).exp_()  # the softmax
            place = places[start:stop, None] - first
            inside = (place >= 0) & (place < len(part))
            place = place.clamp(0, len(part) - 1)
            largest = tile.max() if eps is not None and upstream_lse is not None else None
            if smoothing:
                tile.sub_(smoothing / num_classes)
            share = inside * (1 - smoothing)
            tile.scatter_add_(1, place, -share.to(dtype))  # softmax - target distribution
            if stats is not None:
                stats.blocks_seen += 1
            idle = False
            if eps is not None:
                low, high = torch.aminmax(tile)
                idle = (high < eps) & (low > -eps)  # false for NaN, which must not be lost
                if largest is not None:  # a softmax matters where it is near the target distribution too
                    idle &= largest < eps
                idle = bool(idle)
            use_hidden = d_hidden is not None and not (idle and filter_hidden)
            use_weight = (d_part is not None or d_offset is not None) and not (idle and filter_weight)
            if not (use_hidden or use_weight):
                if stats is not None:
                    stats.blocks_skipped += 1
                continue
            tile.mul_(factor[start:stop])
            if upstream_lse is not None:
                tile.scatter_add_(1, place, share.to(dtype) * upstream_lse[start:stop, None])
                if smoothing:
                    tile.add_(upstream_lse[start:stop, None], alpha=smoothing / num_classes)
            if slope is not None:
                tile.mul_(slope)
                slope = None  # before the next one is made
            if use_hidden:
                if rows is None:
                    d_hidden[start:stop].addmm_(tile, part)
                else:
                    d_hidden.index_add_(0, rows[start:stop], tile @ part)
            if use_weight and d_part is not None:
                d_part.addmm_(tile.T, vectors)
            if use_weight and d_offset is not None:
                d_offset += tile.sum(0)
        if d_part is not None and not in_place:
            d_weight[columns] = d_part.to(weight.dtype)
        if d_offset is not None:
            d_bias[columns] = d_offset.to(bias.dtype)
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


class Fused(torch.autograd.Function):
    """The same through the Triton kernels."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, options):
        from kernels import cut_cross_entropy as kernel

        shared = dict(bias=bias, rows=rows, softcap=options["softcap"], blocks=options["blocks"])
        smoothing = options["smoothing"]
        negative = kernel.indexed_neg_dot(hidden, weight, targets, **shared)
        if smoothing:
            lse, mean = kernel.lse_forward(hidden, weight, with_mean=True, **shared)
            negative = negative.mul_(1 - smoothing).sub_(smoothing * mean)
        else:
            lse = kernel.lse_forward(hidden, weight, **shared)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return negative.add_(lse), lse

    @staticmethod
    @_differentiable_once
    def backward(ctx, upstream, upstream_lse):
        from kernels import cut_cross_entropy as kernel

        hidden, weight, bias, targets, rows, lse = ctx.saved_tensors
        options, needed = ctx.options, ctx.needs_input_grad
        order = None
        if options["eps"] is not None and options["sort"] and len(targets):
            order = _vocabulary_order(hidden, weight, bias, rows)
        upstream = torch.zeros_like(lse) if upstream is None else upstream
        eps = options["eps"]
        *grads, kept = kernel.cut_cross_entropy_backward(
            hidden, weight, targets, lse, upstream, bias=bias, rows=rows, softcap=options["softcap"],
            blocks=options["blocks"], order=order, filter_eps=eps, filters=options["filters"],
            upstream_lse=upstream_lse, label_smoothing=options["smoothing"], needed=needed[:3],
        )  # fmt: skip
        if options["stats"] is not None and any(needed[:3]):
            options["stats"].blocks_seen += kept.numel()
            wanted = (needed[0], needed[1] or needed[2])  # a tile that one of them keeps is not skipped
            if all(filtered for filtered, need in zip(options["filters"], wanted, strict=True) if need):
                options["stats"].blocks_skipped += kept.numel() - int(kept.sum())
        return *grads, None, None, None
