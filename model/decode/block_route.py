"""The routes of causal query blocks: `choose_regions` of training with less to read and fewer operations.

Training's choice goes by affinities that are summed in fp64 and rounded to fp32. Products in fp32, of half the bytes,
almost always tell which are the largest. How far those can be off is known; if that could make a difference, the
regions that are near enough are compared in fp64, so the route is the same.

Shapes: G key/value heads, r query heads of each, R regions up to the block's own, n descriptors of a region, D head
size, K slots of a route, f slots that are free to choose, M regions that are compared in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biroute.model.attention.routing import LARGEST_DESCRIPTOR, exact_mean, top_regions
from biroute.model.attention.rule import RouteRule


class BlockRouter:
    """Chooses the routes of the query blocks of one region, one after the other.

    What all of them share is prepared once: which descriptors are compared, and which regions need not be.
    """

    def __init__(self, keys_GED: Tensor, rule: RouteRule, largest_norm: float) -> None:
        """Take what is known before the first block.

        Args:
            keys_GED: fp32 [G, R * n, D], the `key_descriptors` up to those of the own region, which may be anything
                finite.
            rule: how regions are chosen: causal, by affinity.
            largest_norm: no descriptor of a region before the own one is longer.
        """
        self._keys_GED, self._rule, self._largest_norm = keys_GED, rule, largest_norm
        count = rule.descriptors_per_region
        regions = keys_GED.shape[1] // count
        # Those that are routed always, which are not compared: the first one, and the last ones with the own region.
        self._first, last = int(rule.attention_sink), regions - 1 - int(rule.force_previous)
        self._num_free = rule.topk - self._first - (regions - last) if regions > rule.topk else 0
        route_GK = torch.full((len(keys_GED), rule.topk), -1, device=keys_GED.device)
        if regions <= rule.topk:  # there is nothing to choose
            route_GK[:, :regions] = torch.arange(regions, device=keys_GED.device)
        else:
            route_GK[:, : self._first] = 0
            route_GK[:, self._first + self._num_free :] = torch.arange(last, regions, device=keys_GED.device)
        self._route_1G1K = route_GK[None, :, None]
        self._free_Gf = route_GK[:, self._first : self._first + self._num_free]
        self._free_GDE = keys_GED[:, self._first * count : last * count].transpose(1, 2)

    def choose(self, query_GD: Tensor, longest: float) -> Tensor:
        """Choose the regions of one block.

        Args:
            query_GD: fp32, the block's `query_descriptors`.
            longest: the norm of all of them together, which no single one passes.

        Returns:
            The regions of the route, int64 [1, G, 1, K], the own one last and the others in any order: sorting them
            takes as long as finding them, see `ascending`. If there are fewer than K, -1 = empty follows. The next
            call writes over it.
        """
        if self._num_free == 0:
            return self._route_1G1K
        rough_GR = _affinities(query_GD, self._free_GDE, self._rule)
        value_Gk, region_Gk = rough_GR.topk(self._num_free + 1)
        doubt = _largest_error(query_GD.shape[1], self._largest_norm * longest)
        if not all(values[-2] - values[-1] > doubt for values in value_Gk.tolist()):
            return self._choose_in_doubt(query_GD, doubt)
        self._free_Gf.copy_(region_Gk.narrow(1, 0, self._num_free))
        if self._first:
            self._free_Gf.add_(self._first)
        return self._route_1G1K

    def _choose_in_doubt(self, query_GD: Tensor, doubt: float) -> Tensor:
        """Return the route [1, G, 1, K] where products in fp32 do not tell it."""
        rule = self._rule
        rough_GR = _affinities(query_GD, self._keys_GED.transpose(1, 2), rule)
        _force(rough_GR, rule)
        least_G1 = rough_GR.topk(rule.topk).values[:, -1:]
        near_M = (rough_GR >= least_G1 - doubt).any(0).nonzero()[:, 0]
        return _route_among(near_M, query_GD, self._keys_GED, rule, rough_GR == torch.inf)


def ascending(route: Tensor) -> Tensor:
    """Return the route [1, G, 1, K] that `BlockRouter` chose as `choose_regions` gives it: in ascending order."""
    return route.clone() if bool((route < 0).any()) else route.sort(3).values


def route_of_block(query_GD: Tensor, keys_GED: Tensor, rule: RouteRule, largest_norm: float) -> Tensor:
    """Choose the regions of one block by itself, in ascending order; see `BlockRouter`, whose arguments these are."""
    longest = float(torch.linalg.vector_norm(query_GD, dtype=torch.float64))
    return ascending(BlockRouter(keys_GED, rule, largest_norm).choose(query_GD, longest))


def query_of_block(q_1GrD: Tensor) -> tuple[Tensor, float]:
    """Return the `query_descriptors` [G, D] of the block that begins with these queries, and the norm of them all."""
    mean_1GD = q_1GrD.sum(2, dtype=torch.float64).div_(q_1GrD.shape[2])
    longest = float(torch.linalg.vector_norm(mean_1GD))
    if longest < LARGEST_DESCRIPTOR:  # so none is NaN, and none to be clamped
        return mean_1GD.float().squeeze(0), longest
    query_GD = exact_mean(q_1GrD, (2,))[0]
    return query_GD, float(torch.linalg.vector_norm(query_GD, dtype=torch.float64))


def _route_among(near_M: Tensor, query_GD: Tensor, keys_GED: Tensor, rule: RouteRule, forced_GR: Tensor) -> Tensor:
    """Return the route [1, G, 1, K] among some regions, by their affinities in fp64."""
    near_GMnD = keys_GED.unflatten(1, (-1, rule.descriptors_per_region)).index_select(1, near_M)
    near_GDE = near_GMnD.flatten(1, 2).double().transpose(1, 2)
    score_GM = _affinities(query_GD.double(), near_GDE, rule).float()
    score_GM.masked_fill_(forced_GR[:, near_M], torch.inf)
    return near_M[top_regions(score_GM[None, :, None], rule.topk)]


def _affinities(query_GD: Tensor, keys_GDE: Tensor, rule: RouteRule) -> Tensor:
    """Return [G, R]: the largest product of a query with any of a region's n descriptors."""
    products_G1E = torch.bmm(query_GD.unsqueeze(1), keys_GDE)
    count = rule.descriptors_per_region
    # Pooling is a maximum over many short rows, in less than half the time of `amax`.
    return (products_G1E if count == 1 else torch.max_pool1d(products_G1E, count)).squeeze(1)


def _largest_error(size: int, largest_product: float) -> float:
    """Return by how much the difference of two affinities in fp32 may be off, with descriptors of `size` elements.

    A sum of D products is off by at most D u |q| |k|, u = 2^-24 (Higham 2002, section 3.1), and rounding the fp64 sum
    by u |q| |k|; results below 2^-126 may be taken for 0.
    """
    return 2.1 * (size + 2) * (2.0**-24 * largest_product + 2.0**-125)


def _force(score_GR: Tensor, rule: RouteRule) -> None:
    """Put the regions that are always chosen before all others."""
    score_GR[:, -2 if rule.force_previous else -1 :] = torch.inf
    if rule.attention_sink:
        score_GR[:, 0] = torch.inf
