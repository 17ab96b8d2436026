"""What the modules of this room ask of a batch, whoever made it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.eacm.selector import Selection

PAD_ID, UNK_ID, EOS_ID, GO_ID = 0, 1, 2, 3
"""Special words, as the dialogue tokenizers have them."""


class Dialogues(Protocol):
    """Posts, replies and their emotions."""

    @property
    def post_ids(self) -> Tensor:
        """int64 `(batch, post length)`, filled with 0 on the right."""

    @property
    def post_mask(self) -> Tensor:
        """Bool `(batch, post length)`, False on padding."""

    @property
    def reply_in(self) -> Tensor:
        """int64 `(batch, reply length)`: GO, then the reply."""

    @property
    def reply_out(self) -> Tensor:
        """int64 `(batch, reply length)`: the reply, then EOS."""

    @property
    def reply_mask(self) -> Tensor:
        """Bool `(batch, reply length)`, False on padding."""

    @property
    def post_emotion(self) -> Tensor:
        """float32 `(batch, num_emotions)`, multi-hot."""

    @property
    def reply_emotion(self) -> Tensor:
        """float32 `(batch, num_emotions)`, multi-hot."""

    @property
    def post_emotion_known(self) -> Tensor:
        """Bool `(batch,)`."""

    @property
    def reply_emotion_known(self) -> Tensor:
        """Bool `(batch,)`."""

    @property
    def keys(self) -> Tensor:
        """int64 `(batch,)`: what random numbers of a row depend on."""

    @property
    def post_text(self) -> list[str]:
        """The posts."""

    @property
    def reply_text(self) -> list[str]:
        """The replies."""


class Scored(NamedTuple):
    """What a model makes of posts with given replies.

    Attributes:
        nll: float32 `(batch,)`, negative log-likelihood of the reply.
        tokens: int64 `(batch,)`, its tokens.
        selection: Emotions that the model chose; None for a model that chooses none.
        emotion: float32 `(batch, num_emotions)`, the distribution that steered it; None without one.
        penalty: A scalar that is added to the loss; None without one.
    """

    nll: Tensor
    tokens: Tensor
    selection: Selection | None = None
    emotion: Tensor | None = None
    penalty: Tensor | None = None


class Answers(NamedTuple):
    """Replies of a model, in words.

    Attributes:
        words: For each post its replies, best first, each a list of words.
        scores: float32 `(posts, replies)`.
        emotion: float32 `(posts, num_emotions)`, the distribution that steered them; None without one.
    """

    words: list[list[list[str]]]
    scores: Tensor
    emotion: Tensor | None
