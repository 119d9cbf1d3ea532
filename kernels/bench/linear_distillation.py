"""Distillation losses between two linear classifiers, without the logits of either."""

import importlib.util

import torch
import torch.nn.functional as F

FULL = {"tokens": 8192, "dim": 2048, "teacher_dim": 4096, "classes": 128256}
SMALL = {"tokens": 512, "dim": 64, "teacher_dim": 128, "classes": 32768}
SIZES = {
    "cpu": [{"loss": loss, **SMALL} for loss in ("kd", "nkd", "binary_kl")],
    "cuda": [
        {"loss": "kd", "tokens": 2048, "dim": 1024, "teacher_dim": 2048, "classes": 32768},
        *({"loss": loss, **FULL} for loss in ("kd", "nkd", "binary_kl")),
    ],
}
TEMPERATURE, GAMMA = 2.0, 1.5


def inputs(device, dtype, loss, tokens, dim, teacher_dim, classes):
    def classifier(size):
        return torch.randn(classes, size, device=device, dtype=dtype) / size**0.5

    return {
        "hidden": torch.randn(tokens, dim, device=device, dtype=dtype, requires_grad=True),
        "weight": classifier(dim).requires_grad_(),
        "teacher_hidden": torch.randn(tokens, teacher_dim, device=device, dtype=dtype),
        "teacher_weight": classifier(teacher_dim),
        "targets": torch.randint(classes, (tokens,), device=device),
    }


def _kd(student, teacher, targets):
    soft = (teacher / TEMPERATURE).softmax(1)
    return -(TEMPERATURE**2) * (soft * (student / TEMPERATURE).log_softmax(1)).sum(1).mean()


def _nkd(student, teacher, targets):
    index = targets[:, None]
    own = teacher.log_softmax(1).gather(1, index).exp() * student.log_softmax(1).gather(1, index)
    # the target's logit far below all others in place of leaving it out
    student, teacher = (x.scatter(1, index, -1e4) for x in (student, teacher))
    return GAMMA * _kd(student, teacher, targets) - own.mean()


def _binary_kl(student, teacher, targets):
    s, t = student / TEMPERATURE, teacher / TEMPERATURE
    coins = t.sigmoid() * (t - s) + F.softplus(s) - F.softplus(t)
    return TEMPERATURE**2 * coins.sum(1).mean()


def peers(device, loss, tokens, dim, teacher_dim, classes):
    from lib.distill import linear_distillation

    impl = "triton" if device == "cuda" else "chunked"
    on_logits = {"kd": _kd, "nkd": _nkd, "binary_kl": _binary_kl}[loss]
    result = {
        "torch": lambda hidden, weight, teacher_hidden, teacher_weight, targets: on_logits(
            hidden @ weight.T, teacher_hidden @ teacher_weight.T, targets
        ),
        f"book, {impl}": lambda **tensors: linear_distillation(
            **tensors, loss=loss, temperature=TEMPERATURE, gamma=GAMMA, impl=impl
        ),
    }
    if device == "cuda" and loss == "kd" and importlib.util.find_spec("liger_kernel"):

        def chunks(hidden, weight, teacher_hidden, teacher_weight, targets, compiled=True):
            """It computes the gradients in every forward pass."""
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            # beta = 0 is the divergence of the student from the teacher: kd without the teacher's entropy, over h^2
            options = dict(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE)
            liger = LigerFusedLinearJSDLoss(**options, compiled=compiled)
            found = liger(hidden, weight, teacher_hidden, teacher_weight, targets, None, None)
            return TEMPERATURE**2 * (found[0] if isinstance(found, tuple) else found)

        result["liger-kernel, chunked"] = chunks
    return result


def work(element_bytes, loss, tokens, dim, teacher_dim, classes):
    student, teacher, logits = (tokens + classes) * dim, (tokens + classes) * teacher_dim, tokens * classes
    return {
        # strips of both logits in float32 are written and read once
        "forward_bytes": (student + teacher) * element_bytes + 16 * logits,
        "forward_flops": 2 * logits * (dim + teacher_dim),
        # the same again; the gradient of a strip written and read twice; the gradients
        "backward_bytes": (2 * student + teacher + 3 * logits) * element_bytes + 16 * logits,
        "backward_flops": 2 * logits * (3 * dim + teacher_dim),  # the logits again, and two products
    }
