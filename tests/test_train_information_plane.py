"""The information plane of a network while it trains."""

import pytest
import torch
import torch.nn.functional as F

from lib.information import akde_mi, ebab_mi
from lib.models import mlp
from lib.train import InformationPlane, fit

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def test_records_what_the_estimators_say():
    torch.manual_seed(0)
    model = mlp((3, 5, 4, 2), "tanh")
    estimators = {"bins": ebab_mi, "kernels": akde_mi}
    plane = InformationPlane(X, Y, ["2", "4"], estimators, rounds=(0, 2))
    plane(model)
    with torch.no_grad():
        hidden = model[:3](X), model[:5](X)
    for layer, activity in zip(("2", "4"), hidden, strict=True):
        for name, estimator in estimators.items():
            assert plane.records[layer][name] == [estimator(activity, Y)]
    model.train()
    fit(model, lambda m, x, y: F.cross_entropy(m(x), y), (X, Y),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01), epochs=3, callbacks=[plane])  # fmt: skip
    assert plane.measured == [0, 2]
    assert all(len(pairs) == 2 for by_name in plane.records.values() for pairs in by_name.values())
    model.train()
    InformationPlane(X, Y, ["2"], {"bins": ebab_mi})(model)
    assert model.training


def test_log_rounds():
    rounds = InformationPlane.log_rounds(100, 6)
    assert rounds[:2] == [0, 1] and rounds[-1] == 100 and len(rounds) == 6
    assert rounds == sorted(set(rounds)) and InformationPlane.log_rounds(1, 9) == [0, 1]
    assert InformationPlane.log_rounds(7, 2) == [0, 7]
    with pytest.raises(ValueError):
        InformationPlane.log_rounds(0, 5)


def test_bad_input():
    for arguments in (
        (X, Y, [], {"bins": ebab_mi}), (X, Y, "2", {"bins": ebab_mi}), (X, Y, ["2"], {}),
        (X, Y[:3], ["2"], {"bins": ebab_mi}),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            InformationPlane(*arguments)
    with pytest.raises(ValueError, match="no layer"):
        InformationPlane(X, Y, ["nine"], {"bins": ebab_mi})(mlp((3, 4, 2)))
