"""How far the domains' distributions of x_hat lie apart, over the global batch (CIKM'23).

The paper's L_reg is a sum of JS(p(x_hat_i) || p(x_hat_j)) with MMD as the alternative; it defines
neither p nor the kernel. What is chosen here is ours, and it is chosen so that the value depends
neither on the number of ranks nor on the order of the rows: all ranks return the same value,
computed from `reduction.sum` of statistics (see `reduction`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .reduction import Reduction, full_precision

_LAST = torch.iinfo(torch.int64).max


def js_divergence(x: Tensor, domain: Tensor, valid: Tensor, num_domains: int, reduction: Reduction) -> Tensor:
    """Mean Jensen-Shannon divergence over pairs of domains.

        p_k = mean of softmax(x_b) over the valid rows b of domain k in the global batch
        JS(p_i, p_j) = H((p_i + p_j) / 2) - (H(p_i) + H(p_j)) / 2      natural log, in [0, ln 2]

    and the mean over unordered pairs whose domains are both present; 0 without such a pair. Only
    `[K, H' + 1]` sums and counts travel.

    Args:
        x: x_hat `[B, H']`.
        domain: int64 `[B]`.
        valid: bool `[B]`.
        num_domains: K.
        reduction: sums over ranks.

    Returns:
        Scalar, at least float32, equal on all ranks.
    """
    x = full_precision(x)
    rows = F.one_hot(domain, num_domains).to(x.dtype) * valid[:, None]
    # A masked row may hold anything, and 0 * inf is not 0.
    p = torch.softmax(torch.where(valid[:, None], x, x.new_zeros(())), 1)
    totals = reduction.sum(rows.t() @ torch.cat([p, p.new_ones(len(p), 1)], 1))
    counts = totals[:, -1:]
    present = counts[:, 0] > 0
    # An absent domain gets the even distribution: the entropy of zeros has no finite gradient.
    p = torch.where(present[:, None], totals[:, :-1] / counts.clamp_min(1), 1.0 / x.shape[1])
    first, second = torch.triu_indices(num_domains, num_domains, 1, device=x.device).unbind(0)
    entropy = _entropy(p)
    js = _entropy((p[first] + p[second]) / 2) - (entropy[first] + entropy[second]) / 2
    both = (present[first] & present[second]).to(js.dtype)
    return (js * both).sum() / both.sum().clamp_min(1)


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(1)


def mmd(
    x: Tensor,
    domain: Tensor,
    valid: Tensor,
    row: Tensor,
    num_domains: int,
    samples: int,
    kernels: int,
    reduction: Reduction,
) -> Tensor:
    """Mean unbiased maximum mean discrepancy over pairs of domains, multi-kernel RBF.

        k(a, b) = mean_m exp(-|a - b|^2 / (s 2^(m - (M - 1) / 2))),   m = 0 .. M - 1
        MMD^2(i, j) = mean_{a != a'} k(a, a') + mean_{b != b'} k(b, b') - 2 mean_{a, b} k(a, b)

    with s the median of the squared distances between all different sampled rows, detached. It is
    an unbiased estimate, so it can be slightly negative. Pairs count whose domains both have two
    sampled rows or more; 0 without such a pair. Time and memory grow with the square of the sampled rows.

    At most `samples` rows of a domain are used: those with the smallest hash of (row number,
    key), the key being the sum of the global batch's row numbers, so that other rows are chosen
    in another batch but the same ones on any number of ranks. A rank offers its `samples` smallest
    hashes (an integer `gather`); what is chosen is filled in by one `sum` of `[K, samples, H' + 1]`.

    Args:
        x: x_hat `[B, H']`.
        domain: int64 `[B]`.
        valid: bool `[B]`.
        row: int64 `[B]`, number of the row in the data set.
        num_domains: K.
        samples: at most this many rows of a domain.
        kernels: M.
        reduction: sums over and gathers from ranks.

    Returns:
        Scalar, at least float32, equal on all ranks.
    """
    points, chosen = _sample(full_precision(x), domain, valid, row, num_domains, samples, reduction)
    counts = chosen.sum(1)
    usable = counts >= 2
    # Of the K * samples places most may be empty.
    used = (chosen & usable[:, None]).flatten().nonzero()[:, 0]
    flat = points.flatten(0, 1)[used]
    # |a|^2 + |b|^2 - 2ab loses digits far from the origin; distances do not move with the centre.
    flat = flat - flat.detach().sum(0) / max(len(flat), 1)
    squares = (flat * flat).sum(1)
    distances = (squares[:, None] + squares[None, :] - 2 * flat @ flat.t()).clamp_min(0)
    itself = torch.eye(len(flat), dtype=torch.bool, device=x.device)
    median = distances.detach().masked_fill(itself, torch.nan).nanmedian()
    scale = torch.where(median > 0, median, torch.ones_like(median))
    factors = [2.0 ** (m - (kernels - 1) / 2) for m in range(kernels)]
    similarity = sum(torch.exp(distances / (-factor * scale)) for factor in factors) / kernels
    members = F.one_hot(used // samples, num_domains).to(similarity.dtype)
    blocks = members.t() @ similarity.masked_fill(itself, 0) @ members

    counts = counts.to(blocks.dtype)
    within = blocks.diagonal() / (counts * (counts - 1)).clamp_min(1)
    across = blocks / (counts[:, None] * counts[None, :]).clamp_min(1)
    first, second = torch.triu_indices(num_domains, num_domains, 1, device=x.device).unbind(0)
    value = within[first] + within[second] - 2 * across[first, second]
    both = (usable[first] & usable[second]).to(value.dtype)
    return (value * both).sum() / both.sum().clamp_min(1)


def _sample(
    x: Tensor, domain: Tensor, valid: Tensor, row: Tensor, num_domains: int, samples: int, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """The global batch's chosen rows, `[K, samples, H']` sorted by hash, and which slots are real."""
    key = reduction.gather(torch.where(valid, row, 0).sum()).sum()
    hashes = _mix(row + _mix(key))
    mine = valid[None, :] & (domain[None, :] == torch.arange(num_domains, device=x.device)[:, None])
    offers = torch.where(mine, hashes[None, :], _LAST)
    # Fixed shapes: a rank with fewer rows offers empty slots too.
    offers = torch.cat([offers, offers.new_full((num_domains, samples), _LAST)], 1)
    offers, source = torch.topk(offers, samples, dim=1, largest=False, sorted=True)

    everyone = reduction.gather(offers)
    slots = everyone.transpose(0, 1).flatten(1).sort(1).values[:, :samples]
    chosen = slots != _LAST
    # A row that two ranks (or one, twice) hold has as many slots, each filled with the mean of its
    # copies, so that no slot has to know which rank owns it.
    match = ((slots[:, :, None] == offers[:, None, :]) & chosen[:, :, None]).to(x.dtype)
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    values = padded[source.clamp_max(len(x))]
    values = torch.where((offers != _LAST)[:, :, None], values, values.new_zeros(()))
    filled = reduction.sum(torch.cat([match @ values, match.sum(2, keepdim=True)], 2))
    return filled[:, :, :-1] / filled[:, :, -1:].clamp_min(1), chosen


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser, a bijection of int64: distinct rows have distinct hashes."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right; `>>` alone is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
