"""What the benchmarks compare with: each formula as a plain loop, without any of daamlib's short cuts.

They start from the same stored queries. Keys are made once, not in every step, and maps are up-sampled once they are
summed where that is possible: what a careful reader would write first.
"""

import torch
from torch.nn import functional as F


def daam(record, embeddings: torch.Tensor) -> torch.Tensor:
    """(m, d_text) -> (m, H, W): for every layer and step, products of all heads, softmax, sum over the heads."""
    maps = 0.0
    for layer in record.layers:
        keys = _keys(layer, embeddings).unflatten(1, (layer.heads, -1))
        keys = keys.permute(1, 2, 0)  # (head, d_head, m)
        total = 0.0
        for queries in layer.queries:
            queries = queries.float().unflatten(1, (layer.heads, -1)).transpose(0, 1)  # (head, h*w, d_head)
            total = total + torch.softmax(torch.bmm(queries, keys), dim=-1).sum(dim=0)
        maps = maps + upsample(total.T.unflatten(1, layer.grid), record.grid)
    return maps


def published_daam(record, by_head: list[torch.Tensor], embeddings: torch.Tensor) -> torch.Tensor:
    """(m, d_text) -> (m, H, W): the operations of the published OVAM, from queries that already lie head by head.

    by_head: (step, head, h*w, d_head) of each layer, see `by_head`; that layout is not part of what is timed.
    """
    maps = []
    for layer, queries in zip(record.layers, by_head, strict=True):
        keys = _keys(layer, embeddings).unflatten(1, (layer.heads, -1)).transpose(0, 1).contiguous()
        scores = [torch.bmm(of_step, keys.transpose(1, 2)).transpose(1, 2).contiguous() for of_step in queries]
        total = torch.stack(scores).softmax(dim=2).sum(dim=0).sum(dim=0)
        maps.append(upsample(total.unflatten(1, layer.grid), record.grid))
    return torch.stack(maps).sum(dim=0)


def by_head(record) -> list[torch.Tensor]:
    """(step, head, h*w, d_head) queries of each layer, contiguous."""
    layers = record.layers
    return [layer.queries.float().unflatten(2, (layer.heads, -1)).transpose(1, 2).contiguous() for layer in layers]


def ldaam(record, embedding: torch.Tensor) -> torch.Tensor:
    """(d_text,) -> (H, W): for every layer, step and head, the scores of one token, up-sampled, summed."""
    total = 0.0
    for layer in record.layers:
        keys = _keys(layer, embedding).unflatten(0, (layer.heads, -1))
        for queries in layer.queries:
            for query, key in zip(queries.float().unflatten(1, (layer.heads, -1)).unbind(1), keys, strict=True):
                total = total + upsample((query @ key).unflatten(0, layer.grid)[None], record.grid)[0]
    return total


def refine(record, maps: torch.Tensor) -> torch.Tensor:
    """(m, H, W) -> (m, H, W): the explicit matrix of every layer, step and head, their mean, and a product with it."""
    attention = record.self_attention
    shape = (attention.heads, -1)
    total = 0.0
    for queries, keys in zip(attention.queries.float(), attention.keys.float(), strict=True):
        for query, key in zip(queries.unflatten(1, shape).unbind(1), keys.unflatten(1, shape).unbind(1), strict=True):
            total = total + torch.softmax(query @ key.T * attention.scale, dim=-1)
    matrix = total / (len(attention.queries) * attention.heads)
    pooled = F.adaptive_avg_pool2d(maps[None], attention.grid)[0].flatten(1)
    return upsample((pooled @ matrix.T).unflatten(1, attention.grid), record.grid)


def sgd(records, masks, start: torch.Tensor, *, steps: int, lr: float, unit: float, decay: float) -> list[float]:
    """The losses of plain gradient descent on one LDAAM token: every step computes every image's map from its queries.

    Binary cross-entropy of (map - mean) / unit + bias, averaged over the images, plus decay |x - x_0|^2 / |x_0|^2. The
    heads are one product, the scores are summed before they are up-sampled. lr: of x; that of the bias is 1.
    """
    x = start.clone().requires_grad_()
    frequency = torch.stack([mask.to(start).mean() for mask in masks]).mean()
    bias = torch.log(frequency / (1 - frequency)).requires_grad_()
    losses = []
    for _ in range(steps):
        maps = []
        for record in records:
            total = 0.0
            for layer in record.layers:
                key = layer.key_weight.to(x) @ x * layer.scale
                scores = sum(queries.to(x) @ key for queries in layer.queries)
                total = total + upsample(scores.unflatten(0, layer.grid)[None], record.grid)[0]
            maps.append(total)
        mean = torch.stack(maps).mean()
        fits = [
            F.binary_cross_entropy_with_logits((heat - mean) / unit + bias, mask.to(heat))
            for heat, mask in zip(maps, masks, strict=True)
        ]
        loss = sum(fits) / len(fits) + decay * (x - start).square().sum() / start.square().sum()
        for parameter, gradient, rate in zip((x, bias), torch.autograd.grad(loss, (x, bias)), (lr, 1.0), strict=True):
            parameter.data -= rate * gradient
        losses.append(loss.item())
    return losses


def miou_curve(maps: torch.Tensor, masks: torch.Tensor, thresholds: list[float]) -> list[float]:
    """(n, h, w), (n, H, W) -> the mIoU of every threshold, one image and one threshold at a time."""
    curve = [0.0] * len(thresholds)
    for heat, mask in zip(maps, masks, strict=True):
        heat = upsample(heat[None], tuple(mask.shape))[0]
        heat = (heat - heat.min()) / (heat.max() - heat.min())
        for i, threshold in enumerate(thresholds):
            found = heat > threshold
            curve[i] += float((found & mask).sum() / (found | mask).sum()) / len(maps)
    return curve


def _keys(layer, embeddings: torch.Tensor) -> torch.Tensor:
    """(..., d_text) -> (..., channels), scaled; of transformers the layer has a bias."""
    bias = 0.0 if layer.to_k.bias is None else layer.to_k.bias.float()
    return (embeddings @ layer.key_weight.float().T + bias) * layer.scale


def upsample(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
