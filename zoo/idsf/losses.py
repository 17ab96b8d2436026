"""Pairwise ranking loss and the penalty on the vectors of a batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking: mean of -log sigmoid(positive - negative); ln 2 for equal scores.

    Args:
        positive: Scores `(batch,)`.
        negative: Scores `(batch, num_negatives)`.
    """
    return -F.logsigmoid(positive.float()[:, None] - negative.float()).mean()


def ranking_loss(users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """`bpr_loss` of vectors whose inner products are the scores.

    Args:
        users: `(batch, d)`.
        positives: `(batch, d)`.
        negatives: `(batch, num_negatives, d)`.
    """
    return bpr_loss((users * positives).sum(-1), (users[:, None] * negatives).sum(-1))


def batch_penalty(*vectors: Tensor) -> Tensor:
    """Half the mean squared length of vectors, added up over several batches of them (section 2.6).

    Args:
        vectors: `(batch, d)`, or `(batch, num_negatives, d)`, whose mean over the negatives counts.
    """
    total = vectors[0].new_zeros(())
    for part in vectors:
        total = total + part.float().square().sum(-1).mean() / 2
    return total
