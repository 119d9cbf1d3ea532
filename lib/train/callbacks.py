"""Callbacks for `lib.train.fit`."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from lib.train.fit import History


class DSECallback:
    """Records diffusion spectral entropy and information of hidden layers while a model trains.

    Give it to `lib.train.fit` in `callbacks=`, or call it by hand as `callback(model)`, for example once before
    training. Each measurement sends all points through the model in eval mode and reads the outputs of the layers,
    flattened to (N, d). The random subsets of `dsmi` are the same at every measurement, and the inputs are clustered
    once, so that a curve moves because the representation moves.

    Args:
        loader: held-out points: a pair of tensors (inputs, labels), or an iterable of such batches. Read once. Points
            that the model trains on would show what it memorised.
        layers: names of submodules, as in `model.named_modules()`.
        sigma: bandwidth, the same for all measurements; None takes `lib.information.sigma_rule` of each layer at its
            first measurement and keeps it. A callable is asked at every measurement, which hides changes of scale.
        t: steps of the walk.
        n_clusters: clusters of the inputs; 0 leaves DSMI(Z; X) out.
        repeats: random subsets for each label.
        rounds: which calls to measure at, counted from 0; all by default.

    Attributes:
        records: for each layer a dict of lists with one entry for each measurement: `"dse"`, `"dsmi_y"`, `"dsmi_x"`
            (in bits) and `"sigma"`.
        measured: the numbers of the calls that were measured.
        clusters: labels of the clustered inputs, (N,), or None.

    Raises:
        ValueError: no layers, no points, inputs and labels of unequal number, or a layer that the model lacks or
            does not use.
    """

    def __init__(
        self,
        loader: Sequence[torch.Tensor] | Iterable,
        layers: Sequence[str],
        *,
        sigma: float | Callable[[torch.Tensor], float] | None = None,
        t: float = 1,
        n_clusters: int = 10,
        repeats: int = 5,
        rounds: Collection[int] | None = None,
    ):
        if isinstance(layers, str) or not len(layers):
            raise ValueError(f"layers must be a list of at least one name, got {layers!r}")
        pair = isinstance(loader, tuple | list) and all(isinstance(part, torch.Tensor) for part in loader)
        batches = [tuple(loader)] if pair else [tuple(batch) for batch in loader]
        if not batches or any(len(batch) != 2 or len(batch[0]) != len(batch[1]) for batch in batches):
            raise ValueError("loader must hold (inputs, labels) of equal number")
        self._inputs = [inputs for inputs, _ in batches]
        self._labels = torch.cat([labels for _, labels in batches])
        self._sigma, self._t, self._n_clusters, self._repeats = sigma, t, n_clusters, repeats
        self._rounds, self._calls, self._fixed = rounds, 0, {}
        self.clusters: torch.Tensor | None = None
        self.measured: list[int] = []
        self.records = {layer: {"dse": [], "dsmi_y": [], "dsmi_x": [], "sigma": []} for layer in layers}

    def __call__(self, model: nn.Module, history: History | None = None) -> None:
        call, self._calls = self._calls, self._calls + 1
        if self._rounds is not None and call not in self._rounds:
            return
        from lib.information import (
            dse,
            dsmi,
            sigma_rule,
        )  # here: the rooms of lib do not import each other in circles

        for layer, points in _layer_outputs(model, self.records, self._inputs, len(self._labels)).items():
            if callable(self._sigma):
                sigma = self._sigma(points)
            elif self._sigma is not None:
                sigma = self._sigma
            else:
                if layer not in self._fixed:
                    self._fixed[layer] = sigma_rule(points)
                sigma = self._fixed[layer]
            settings = {"sigma": sigma, "t": self._t}
            information = {"repeats": self._repeats, **settings}
            record = self.records[layer]
            record["sigma"].append(sigma)
            record["dse"].append(dse(points, **settings))
            generator = torch.Generator().manual_seed(0)
            record["dsmi_y"].append(dsmi(points, self._labels, generator=generator, **information)[0])
            if self._n_clusters:
                inputs = torch.cat(self._inputs).flatten(1) if self.clusters is None else None
                generator = torch.Generator().manual_seed(0)
                value, self.clusters = dsmi(
                    points,
                    inputs,
                    n_clusters=self._n_clusters,
                    clusters=self.clusters,
                    generator=generator,
                    **information,
                )
                record["dsmi_x"].append(value)
        self.measured.append(call)


class InformationPlane:
    """Records where each hidden layer stands in the information plane while a model trains.

    Give it to `lib.train.fit` in `callbacks=`, or call it by hand as `plane(model)`: once before training, and for each
    member of `lib.train.fit_ensemble`. A measurement sends all inputs through the model in eval mode.

    Args:
        inputs: all of them, (n, ...): each is one equally likely value of X.
        labels: (n,), of a discrete type.
        layers: names of submodules, as in `model.named_modules()`.
        estimators: names and functions `(layer (n, d), labels) -> (I(X;T), I(T;Y))`, such as
            `{"EBAB": lib.information.ebab_mi}`.
        rounds: which calls to measure at, counted from 0; all by default. See `log_rounds`.

    Attributes:
        records: for each layer and estimator the list of pairs (I(X;T), I(T;Y)), one for each measurement.
        measured: the numbers of the calls that were measured.

    Raises:
        ValueError: no layers, no estimators, inputs and labels of unequal number, or a layer that the model lacks.
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        layers: Sequence[str],
        estimators: Mapping[str, Callable],
        *,
        rounds: Collection[int] | None = None,
    ):
        if isinstance(layers, str) or not len(layers):
            raise ValueError(f"layers must be a list of at least one name, got {layers!r}")
        if not len(estimators):
            raise ValueError("give at least one estimator")
        if len(inputs) != len(labels) or not len(inputs):
            raise ValueError(
                f"inputs and labels must be of equal number >= 1, got {len(inputs)} and {len(labels)}"
            )
        self._inputs, self._labels, self._estimators = inputs, labels, dict(estimators)
        self._rounds, self._calls = rounds, 0
        self.measured: list[int] = []
        self.records = {layer: {name: [] for name in self._estimators} for layer in layers}

    def __call__(self, model: nn.Module, history: History | None = None) -> None:
        call, self._calls = self._calls, self._calls + 1
        if self._rounds is not None and call not in self._rounds:
            return
        outputs = _layer_outputs(model, self.records, [self._inputs], len(self._labels))
        for layer, activity in outputs.items():
            for name, estimator in self._estimators.items():
                self.records[layer][name].append(estimator(activity, self._labels))
        self.measured.append(call)

    @staticmethod
    def log_rounds(total: int, count: int) -> list[int]:
        """At most `count` call numbers from 0 to `total`, both included, dense at first and sparse later."""
        if total < 1 or count < 2:
            raise ValueError(f"total must be at least 1 and count at least 2, got {total} and {count}")
        return sorted(
            {0} | {round(total ** (k / (count - 2))) for k in range(count - 1)} if count > 2 else {0, total}
        )


@torch.no_grad()
def _layer_outputs(
    model: nn.Module, layers: Collection[str], batches: Sequence[torch.Tensor], rows: int
) -> dict[str, torch.Tensor]:
    """The outputs of named submodules, flattened to (rows, d), over all batches, in eval mode."""
    modules = dict(model.named_modules())
    missing = [layer for layer in layers if layer not in modules]
    if missing:
        raise ValueError(f"the model has no layer {missing}; it has {[name for name in modules if name]}")
    outputs = {layer: [] for layer in layers}
    hooks = [
        modules[layer].register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        for layer, kept in outputs.items()
    ]
    was_training = model.training
    model.eval()
    try:
        for inputs in batches:
            model(inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    counts = {layer: sum(len(part) for part in kept) for layer, kept in outputs.items()}
    if any(count != rows for count in counts.values()):
        raise ValueError(f"layers must give one row for each of {rows} points, got {counts}")
    return {layer: torch.cat(kept).flatten(1) for layer, kept in outputs.items()}
