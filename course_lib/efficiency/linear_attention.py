r"""Linear attention: no softmax, and so sums over the keys that all queries share.

==============================  ================================================  ==========================
name                            in which order it multiplies                      source
==============================  ================================================  ==========================
``linear_attention_by_scores``  queries with keys first: ``[T, T]`` in memory     Katharopoulos et al. 2020,
                                                                                  arXiv:2006.16236
``linear_attention``            keys with values first: ``[d, d]``                the same, section 3.2
``causal_linear_attention``     the same, as running sums                         the same, section 3.3
``linear_step``                 the same, a token at a time: a recurrent network  the same, section 3.4
``linear_products``             the multiplications that it takes
==============================  ================================================  ==========================

Queries, keys and values are ``[N, heads, T, d]``. It is another function than softmax attention: a network has to be
trained with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from course_lib.lab.arguments import at_least


def positive_features(x: Tensor) -> Tensor:
    """Return ``elu(x) + 1``: above 0, so that its products do for weights."""
    return F.elu(x) + 1


def linear_attention_by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
) -> Tensor:
    r"""Return the mean of the values with the weights
    :math:`\phi(q) \cdot \phi(k_j)`, all of them in memory.
    """
    scores = positive_features(q) @ positive_features(k).mT
    if causal:
        scores = scores.tril(k.shape[-2] - q.shape[-2])
    return scores @ v / scores.sum(-1, keepdim=True)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Return the same, ``[N, heads, queries, d]``, by products in another order.

    .. math:: \frac{\phi(q) \left(\sum_j \phi(k_j) v_j^\top\right)}
        {\phi(q) \cdot \sum_j \phi(k_j)}

    The sums are ``[d, d]`` and ``[d]`` and serve all queries: time grows with T, not
    with its square. No softmax: another function, for a network trained with it.
    """
    fq, fk = positive_features(q), positive_features(k)
    memory = fk.mT @ v  # [N, heads, d, d]
    total = fk.sum(-2, keepdim=True).mT  # [N, heads, d, 1]
    return (fq @ memory) / (fq @ total)


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same when each token sees those up to itself: the sums are running ones.

    All of them at once are ``[T, d, d]``; practice goes through them in chunks.
    """
    fq, fk = positive_features(q), positive_features(k)
    memory = (fk[..., :, None] * v[..., None, :]).cumsum(-3)  # [N, heads, T, d, d]
    total = fk.cumsum(-2)  # [N, heads, T, d]
    weighted = (fq[..., None, :] @ memory).squeeze(-2)
    return weighted / (fq * total).sum(-1, keepdim=True)


class LinearState(NamedTuple):
    """All that linear attention remembers of the tokens so far: ``[N, heads, d, d]`` and ``[N, heads, d]``."""

    memory: Tensor
    total: Tensor


def linear_step(state: LinearState | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[LinearState, Tensor]:
    """Return the state after one more token, and what the token sees, ``[N, heads, d]``.

    None begins.
    """
    fq, fk = positive_features(q), positive_features(k)
    memory, total = fk[..., :, None] * v[..., None, :], fk
    if state is not None:
        memory, total = state.memory + memory, state.total + total
    weighted = (fq[..., None, :] @ memory).squeeze(-2)
    return LinearState(memory, total), weighted / (fq * total).sum(-1, keepdim=True)


def linear_products(tokens: int, width: int) -> int:
    """Return the multiplications of one head: ``tokens width (2 width + 1)``.

    Softmax attention takes ``2 tokens tokens width``: more as soon as there are more
    tokens than a head is wide.

    Raises
    ------
    ValueError : a number is below 1.
    """
    at_least(1, tokens=tokens, width=width)
    return tokens * width * (2 * width + 1)
