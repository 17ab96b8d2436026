"""CoSeRec and CL4SRec: the same training with other views."""

from __future__ import annotations

from typing import Any

from zoo.ticoserec.module import TiCoSeRec


class CoSeRec(TiCoSeRec):
    """CoSeRec (Liu et al., 2021): the five operators at random places, nobody exempt, an inserted item before its twin.

    Args:
        num_items: Catalogue size V.
        positions: Places chosen at "random".
        insert_side: New items stand "before" the chosen one.
        exempt_ratio: Share of users left alone.
        kwargs: All other arguments of `TiCoSeRec`.
    """

    def __init__(
        self,
        num_items: int,
        positions: str = "random",
        insert_side: str = "before",
        exempt_ratio: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_items, positions=positions, insert_side=insert_side, exempt_ratio=exempt_ratio, **kwargs)


class CL4SRec(TiCoSeRec):
    """CL4SRec (Xie et al., 2022): random crop, mask and reorder, compared at the last item.

    Args:
        num_items: Catalogue size V.
        positions: Places chosen at "random".
        exempt_ratio: Share of users left alone.
        short_ops: Operators for short sequences.
        long_ops: Operators for long sequences.
        view_repr: What of a view is compared.
        kwargs: All other arguments of `TiCoSeRec`.
    """

    def __init__(
        self,
        num_items: int,
        positions: str = "random",
        exempt_ratio: float = 0.0,
        short_ops: str = "CMR",
        long_ops: str = "CMR",
        view_repr: str = "last",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_items,
            positions=positions,
            exempt_ratio=exempt_ratio,
            short_ops=short_ops,
            long_ops=long_ops,
            view_repr=view_repr,
            **kwargs,
        )
