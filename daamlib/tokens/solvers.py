"""Two ways to a minimum of an `Objective`: Newton's method where it is convex, NovoGrad where it is not."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .objective import Objective
from .token import OptimizedToken

NEWTON_BYTES = 2**32  # of a Hessian and its factor
QUADRATIC = 1e-12  # squared Newton decrement below which one full step more reaches the precision of float64
STEP = 2.0  # of NovoGrad: the length of its first steps; chosen by trial on the bundled model, on separate scenes
DAMPING = 0.01  # of NovoGrad's coordinates, as a part of the mean variance of A's rows; likewise

EXACT = 10**9  # of pixels times squared unknowns: a Hessian of fewer is quickly computed of all pixels
SAMPLES = 4  # pixels an unknown of the Hessian that preconditions
NEAR, MOST_PRODUCTS = 1e-2, 100  # of a step by conjugate gradients: its relative error, and the products that it takes

Vectors = Callable[[torch.Tensor], torch.Tensor]
Solution = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[float]]  # x, (K, 1) bias and scale, losses


def token_of(
    objective: Objective,
    solution: Solution,
    *,
    method: str,
    info: Mapping[str, Any],
    started: float,
    channels_of: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> OptimizedToken:
    """Return the token of a solution: scale and bias are those of plain maps, `channels_of` makes its embedding of x.

    Raises ValueError if the solution is not finite.
    """
    x, bias, scale, losses = solution
    last = objective(x.requires_grad_(), bias, scale)
    (gradient,) = torch.autograd.grad(last, x)
    x = x.detach()
    scale = scale / objective.unit
    bias = bias - scale * objective.centre_of(objective.maps(x))
    if not all(values.isfinite().all() for values in (x, bias, scale, last, gradient)):
        raise ValueError(
            f"the optimisation ended in values that are not finite, with weight_decay={objective.weight_decay!r}"
        )
    return OptimizedToken(
        embedding=channels_of(x).float().cpu(),
        method=method,
        words=objective.words,
        rows=objective.rows,
        scale=tuple(scale.flatten().tolist()),
        bias=tuple(bias.flatten().tolist()),
        losses=(*losses, last.item()),
        gradient_norm=(gradient.norm() * objective.start.norm()).item(),
        seconds=time.perf_counter() - started,
        info=info,
    )


def newton(
    objective: Objective,
    iterations: int,
    max_bytes: int = NEWTON_BYTES,
    *,
    tolerance: float = QUADRATIC,
    first: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Solution:
    """Newton's method with a backtracking line search for LDAAM with "bce": iteratively reweighted least squares.

    The unknowns are theta_k = (x_k / unit_k, b_k), the features of a pixel its row f of [A - mean, 1] with the weight
    c, and p its probabilities softmax(theta f), or sigmoid(theta f). The Hessian is

        H_kl = sum c (delta_kl p_k - p_k p_l) f f^T + delta_kl D_k                      (softmax)
        H_kk = sum c p_k (1 - p_k) f f^T / K + D_k,   H_kl = 0 for k != l               (sigmoid)

    with D_k = 2 w unit_k^2 / |x_0|^2 for the unknowns of x_k, and 0 for b_k. The offset o of keys with a bias, less its
    mean, is added to theta f in units of unit_k. The default tolerance is the precision of float64, so that the result
    does not depend on the order in which a processor adds.

    With a sigmoid, at Stable Diffusion's size, the Hessian of some pixels preconditions conjugate gradients for the
    step; the minimum is the same. It ends after 10 to 30 iterations, and at `iterations`, from the embeddings and bias
    `first` of a similar fit or from the objective's. Returns x, the bias, the scale 1, and the objective before every
    iteration. Raises ValueError if the Hessian and its factor are larger than `max_bytes`.
    """
    _require_memory(objective, max_bytes)
    features = objective.matrix - objective.matrix.mean(dim=0)
    features = torch.cat([features.T, features.new_ones(1, len(features))])  # (n, P)
    x, bias = first or (objective.start, objective.first_bias)
    theta = torch.cat([x / objective.unit, bias], dim=1)

    def value(theta: torch.Tensor) -> torch.Tensor:
        return objective(theta[:, :-1] * objective.unit, theta[:, -1:])

    losses = []
    for _ in range(iterations):
        theta.requires_grad_()
        here = value(theta)
        (gradient,) = torch.autograd.grad(here, theta)
        losses.append(here.item())
        with torch.no_grad():
            step = _step(objective, features, theta, gradient)
            if objective.multiclass:  # a softmax does not change if all biases do by one number
                step[:, -1] -= step[:, -1].mean()
            decrement, length = (step * gradient).sum(), 1.0
            while decrement > tolerance and length > 1e-9:
                if value(theta - length * step) <= here - 0.25 * length * decrement:
                    break
                length /= 2
            theta = theta - length * step
        if not decrement > tolerance:
            break
    theta = theta.detach()
    return theta[:, :-1] * objective.unit, theta[:, -1:], torch.ones_like(theta[:, -1:]), losses


def _require_memory(objective: Objective, max_bytes: int) -> None:
    """Raise ValueError if the Hessian and its factor are larger than `max_bytes`."""
    count, unknowns = len(objective.start), objective.start.shape[1] + 1
    numbers = (count * unknowns) ** 2 // (1 if objective.multiclass else count)
    needed = 2 * numbers * torch.float64.itemsize
    if needed > max_bytes:
        raise ValueError(
            f"Newton's method for {count} classes of {unknowns} unknowns each needs {needed / 1e9:.1f} GB, max_bytes "
            f"allows {max_bytes / 1e9:.1f}: fit fewer classes at once, each by itself (multiclass=False, "
            'background=False), with loss="dice", which needs no Hessian, or give a larger max_bytes'
        )


def _step(objective: Objective, features: torch.Tensor, theta: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """H^-1 g. Of many pixels by conjugate gradients, preconditioned by the Hessian of some of them."""
    offset = (objective.offset - objective.offset.mean()) / objective.unit  # (K, P)
    logits, (count, n) = theta @ features + offset, theta.shape
    decay = 2 * objective.weight_decay * objective.unit.square() / objective.start.square().sum()
    decay = torch.cat([decay.expand(-1, n - 1), torch.zeros_like(decay)], dim=1)  # (K, n)
    if objective.multiclass:
        weights = objective.weights * objective.targets.sum(dim=0)  # pixels of no class: 0
        return _factored(_softmax_hessian(features, logits.softmax(dim=0), weights), decay)(gradient)
    p = logits.sigmoid()
    weights = objective.weights * p * (1 - p) / count  # (K, P)
    stride = 1 if features.shape[1] * n**2 < EXACT else max(1, features.shape[1] // (SAMPLES * n))
    some = features[:, ::stride].contiguous()
    of_some = _factored(torch.stack([(some * w) @ some.T for w in stride * weights[:, ::stride]]), decay)
    if stride == 1:
        return of_some(gradient)
    return conjugate_gradients(lambda v: (weights * (v @ features)) @ features.T + decay * v, gradient, of_some)


def _softmax_hessian(features: torch.Tensor, p: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(1, K n, K n), the Hessian of all classes without D, of (K, P) probabilities and (P,) weights."""
    count, n = len(p), len(features)
    hessian = features.new_zeros(count, n, count, n)
    for k in range(count):
        for other in range(k + 1):
            block = (features * (weights * p[k] * (float(k == other) - p[other]))) @ features.T
            hessian[k, :, other] = hessian[other, :, k] = block
    return hessian.view(1, count * n, count * n)


def _factored(hessian: torch.Tensor, decay: torch.Tensor) -> Vectors:
    """The function g -> H^-1 g; a ridge at the rounding of float64, or as much as H needs to be positive definite.

    H, which is large, is changed in place.
    """
    hessian.diagonal(dim1=1, dim2=2).add_(decay.view(len(hessian), -1))
    scale = hessian.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(hessian.dtype).tiny).rsqrt()
    scaled = hessian.mul_(scale[:, :, None]).mul_(scale[:, None])  # of a unit diagonal
    diagonal = scaled.diagonal(dim1=1, dim2=2).clone()
    for ridge in (1e-13, 1e-11, 1e-9, 1e-7):
        scaled.diagonal(dim1=1, dim2=2).copy_(diagonal + ridge)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not failed.any():
            break

    def solve(gradient: torch.Tensor) -> torch.Tensor:
        right = (scale * gradient.reshape(scale.shape))[:, :, None]
        return (scale * torch.cholesky_solve(right, factor)[:, :, 0]).view_as(gradient)

    return solve


def conjugate_gradients(product: Vectors, right: torch.Tensor, precondition: Vectors) -> torch.Tensor:
    """H^-1 g of H v = `product`(v), as near as the next step of Newton's method needs."""
    solution, residual, direction = torch.zeros_like(right), right, precondition(right)
    length = first = (residual * direction).sum()
    for _ in range(MOST_PRODUCTS):
        if not length > NEAR**2 * first:
            break
        changed = product(direction)
        along = length / (direction * changed).sum()
        solution, residual = solution + along * direction, residual - along * changed
        scaled = precondition(residual)
        before, length = length, (residual * scaled).sum()
        direction = scaled + length / before * direction
    return solution


def novograd(objective: Objective, iterations: int) -> Solution:
    """NovoGrad: momentum of gradients over a running mean of their length (Ginsburg et al. 2019, arXiv:1905.11286).

    The step warms up, and falls to zero at the end; there is no rate to find for a new model. No step depends on
    comparing values, so rounding errors are not amplified. The coordinates are those where the covariance of A's rows
    is round. Returns as `newton` does, with the scale learned.
    """
    start = objective.start
    rows = objective.matrix - objective.matrix.mean(dim=0)
    covariance = rows.T @ rows / len(rows)
    covariance = covariance / covariance.diagonal().mean()
    factor = torch.linalg.cholesky(covariance + DAMPING * torch.eye(len(covariance)).to(covariance))
    basis = start.square().mean().sqrt() * torch.linalg.inv(factor).to(start)
    v = torch.zeros_like(start, requires_grad=True)
    bias = objective.first_bias.requires_grad_()
    # A negative scale would turn the map over, dark where the class is: its logarithm is learned. The scale of a map
    # that starts upside down would only fall to zero, where x has no gradient any more: it is fixed at first.
    log_scale = torch.zeros_like(bias, requires_grad=True)
    parameters = [(v, STEP, 0), (bias, 0.1, 0)]
    if objective.centre is not None:  # LDAAM's embedding includes the scale
        parameters.append((log_scale, 0.1, (iterations + 1) // 2))
    momentum = [torch.zeros_like(parameter) for parameter, _, _ in parameters]
    square = [torch.zeros((), dtype=v.dtype, device=v.device)] * len(parameters)
    losses = []
    for i in range(iterations):
        value = objective(start + v @ basis, bias, log_scale.exp())
        learned = [parameter for parameter, _, _ in parameters]
        gradients = torch.autograd.grad(value, learned, materialize_grads=True)  # "cross_entropy" has no bias
        losses.append(value.item())
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (i + 1) / iterations - 0.3) / 0.7))
        rate = min(1.0, (i + 1) / max(8, iterations / 10), fall)
        for k, ((parameter, step, begins), gradient) in enumerate(zip(parameters, gradients, strict=True)):
            square[k] = 0.95 * square[k] + 0.05 * gradient.square().sum()
            length = (square[k] / (1 - 0.95 ** (i + 1))).sqrt() + torch.finfo(gradient.dtype).tiny
            momentum[k] = 0.9 * momentum[k] + 0.1 * gradient / length
            if i >= begins:
                with torch.no_grad():
                    parameter -= step * rate * momentum[k] / (1 - 0.9 ** (i + 1))
    return (start + v @ basis).detach(), bias.detach(), log_scale.detach().exp(), losses
