"""Losses of the heads with missing labels and class weights, against torch and the formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dre_fast.nn.supervised import class_weights, supervised_loss
from dre_fast.nn.survival import cox_loss, hazard_loss

NAN = float("nan")
G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 3, generator=G)


def test_weighted_multiclass_is_the_mean_of_torch():
    target, weight = torch.tensor([0, 2, -1, 1, 2, -1]), torch.tensor([0.2, 3.0, 1.0])
    got = supervised_loss("multiclass", LOGITS, target, weight=weight)
    torch.testing.assert_close(got, F.cross_entropy(LOGITS, target, weight=weight, ignore_index=-1))
    # a single label of a light class: the weight cancels
    one = torch.tensor([0, -1, -1, -1, -1, -1])
    got = supervised_loss("multiclass", LOGITS, one, weight=weight)
    torch.testing.assert_close(got, F.cross_entropy(LOGITS[:1], one[:1]))
    plain = supervised_loss("multiclass", LOGITS, target)
    torch.testing.assert_close(plain, F.cross_entropy(LOGITS, target, ignore_index=-1))


def test_weighted_columns_leave_missing_labels_out():
    target = torch.tensor([[1, 0, NAN], [0, NAN, 1], [NAN, 1, 0], [1, 1, 1], [0, 0, NAN], [NAN, NAN, NAN]])
    weight, there = torch.tensor([2.0, 0.5, 4.0]), ~torch.isnan(target)
    each = F.binary_cross_entropy_with_logits(
        LOGITS, target.nan_to_num(), pos_weight=weight, reduction="none"
    )
    got = supervised_loss("multilabel", LOGITS, target, weight=weight)
    torch.testing.assert_close(got, each[there].mean())
    got = supervised_loss("binary", LOGITS[:, :1], target[:, 0], weight=weight[:1])
    torch.testing.assert_close(got, each[:, 0][there[:, 0]].mean())


@pytest.mark.parametrize(
    ("kind", "target", "options"),
    [
        ("multiclass", torch.full((6,), -1), {"weight": torch.ones(3)}),
        ("multilabel", torch.full((6, 3), NAN), {"weight": torch.ones(3)}),
        ("survival", torch.full((6, 2), NAN), {"method": "hazard", "edges": (1.0, 2.0)}),
    ],
)
def test_no_label_is_zero_with_a_graph(kind, target, options):
    logits = LOGITS.clone().requires_grad_()
    loss = supervised_loss(kind, logits, target, **options)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(6, 3))


def test_survival_leaves_missing_labels_out():
    target = torch.tensor([[5.0, 1], [NAN, NAN], [3, 0], [2, 1], [NAN, NAN], [9, 1]])
    time, event = target[[0, 2, 3, 5]].unbind(1)
    got = supervised_loss("survival", LOGITS[:, :1], target)
    torch.testing.assert_close(got, cox_loss(LOGITS[[0, 2, 3, 5], 0], time, event))
    got = supervised_loss("survival", LOGITS, target, method="hazard", edges=(3.0, 6.0))
    torch.testing.assert_close(got, hazard_loss(LOGITS[[0, 2, 3, 5]], time, event, (3.0, 6.0)))


def test_inverse_weights():
    target = torch.tensor([0] * 6 + [1] * 3 + [3] * 1 + [-1] * 5)
    weight = class_weights("multiclass", target, 4, "inverse")
    # 1/6, 1/3 and 1 have mean 1/2; class 2 has no slide
    torch.testing.assert_close(weight, torch.tensor([1 / 3, 2 / 3, 1.0, 2.0]))
    columns = torch.tensor([[1, 1, 0], [0, 1, NAN], [0, NAN, 0], [0, 1, NAN]])
    torch.testing.assert_close(
        class_weights("multilabel", columns, 3, "inverse"), torch.tensor([3.0, 1.0, 1.0])
    )
    torch.testing.assert_close(class_weights("binary", columns[:, 0], 1, "inverse"), torch.tensor([3.0]))
    assert class_weights("binary", columns[:, 0], 1, "none") is None


def test_effective_weights():
    target = torch.tensor([0] * 2000 + [1] * 20)
    raw = [0.001 / (1 - 0.999**2000), 0.001 / (1 - 0.999**20)]
    mean = sum(raw) / 2
    weight = class_weights("multiclass", target, 2, "effective")
    torch.testing.assert_close(weight, torch.tensor([raw[0] / mean, raw[1] / mean]))
    # beyond a thousand slides more of them hardly count: far from 100 to 1
    torch.testing.assert_close(
        class_weights("binary", target.float(), 1, "effective"), torch.tensor([raw[1] / raw[0]])
    )
    assert 40 < raw[1] / raw[0] < 50
    few = torch.tensor([0.0] * 3 + [1.0])  # with few slides it is the inverse frequency
    torch.testing.assert_close(
        class_weights("binary", few, 1, "effective"), torch.tensor([3.0]), rtol=2e-3, atol=0
    )


def test_balance_makes_classes_count_alike():
    # Constant logits fitted to unbalanced labels settle at the base rate; with weights at one half.
    target = torch.tensor([0] * 9 + [1])
    for kind, goal in (("multiclass", torch.zeros(1, 2)), ("binary", torch.zeros(1, 1))):
        labels = target if kind == "multiclass" else target.float()
        logits = goal.requires_grad_()
        weight = class_weights(kind, labels, logits.shape[1], "inverse")
        supervised_loss(kind, logits.expand(10, -1), labels, weight=weight).backward()
        torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_what_does_not_fit_is_refused():
    target = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"kind must be one of multiclass.*'regression'"):
        supervised_loss("regression", LOGITS, target)
    with pytest.raises(ValueError, match=r"survival target \(6,\) does not fit"):
        supervised_loss("survival", LOGITS[:, :1], target.float())
    with pytest.raises(ValueError, match="method must be cox or hazard"):
        supervised_loss("survival", LOGITS[:, :1], torch.ones(6, 2), method="weibull")
    with pytest.raises(ValueError, match="one logit, got 3"):
        supervised_loss("survival", LOGITS, torch.ones(6, 2))
    with pytest.raises(ValueError, match=r"weights \(2,\) do not fit a multiclass task with 3 logits"):
        supervised_loss("multiclass", LOGITS, target, weight=torch.ones(2))
    with pytest.raises(ValueError, match="weights"):
        supervised_loss("survival", LOGITS[:, :1], torch.ones(6, 2), weight=torch.ones(1))
    with pytest.raises(ValueError, match="'log'"):
        class_weights("binary", target.float(), 1, "log")
    with pytest.raises(ValueError, match="survival task has no classes"):
        class_weights("survival", torch.ones(6, 2), 1, "inverse")
