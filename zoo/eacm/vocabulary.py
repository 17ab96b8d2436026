"""Words of posts and replies: the dialogue tokenizers, kept as text in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class DialogueVocabulary:
    """Tokenizers of posts and replies, and the names of emotions.

    Attributes:
        post: A `tokenizers.Tokenizer`.
        reply: A `tokenizers.Tokenizer`; the same as `post` for a shared vocabulary.
        label_names: Names of the emotions by class; empty if they have none.

    Args:
        post: Its tokenizer.
        reply: Its tokenizer.
        label_names: Names by class.
    """

    def __init__(self, post: Any, reply: Any, label_names: Sequence[str] = ()) -> None:
        self.post, self.reply, self.label_names = post, reply, list(label_names)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {"post": self.post.to_str(), "reply": self.reply.to_str(), "label_names": self.label_names}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> DialogueVocabulary:
        """What `to_dict` wrote."""
        from tokenizers import Tokenizer

        post = Tokenizer.from_str(content["post"])
        reply = post if content["reply"] == content["post"] else Tokenizer.from_str(content["reply"])
        return cls(post, reply, content["label_names"])

    @classmethod
    def of(cls, data: Any) -> DialogueVocabulary | None:
        """Those of a datamodule; None if it has none."""
        post, reply = getattr(data, "post_tokenizer", None), getattr(data, "reply_tokenizer", None)
        if post is None or reply is None:
            return None
        return cls(post, reply, getattr(data, "label_names", ()))

    def same_as(self, other: DialogueVocabulary) -> bool:
        """Whether words and emotions have the same ids there."""
        return (
            self.post.get_vocab() == other.post.get_vocab()
            and self.reply.get_vocab() == other.reply.get_vocab()
            and self.label_names == other.label_names
        )

    def encode_posts(self, texts: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
        """Posts as ids.

        Args:
            texts: Posts.
            max_length: Most words of a post; the last ones are kept. None for all.

        Returns:
            Ids int64 and mask bool, both `(posts, longest)`.

        Raises:
            ValueError: If a post has no word.
        """
        rows = [encoding.ids for encoding in self.post.encode_batch(list(texts))]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"a post without any word: {text!r}")
        if max_length is not None:
            rows = [row[-max_length:] for row in rows]
        longest = max((len(row) for row in rows), default=0)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        return ids, ids.ne(0)

    def reply_words(self, tokens: Sequence[int]) -> list[str]:
        """Words of ids of a reply."""
        return [self.reply.id_to_token(token) for token in tokens]
