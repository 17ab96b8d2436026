"""Generated posts and replies with emotions whose rule is known."""

from __future__ import annotations

import numpy as np

from datamodules.sources.dialogue_sets import Parts
from datamodules.sources.dialogue_turns import Dialogues

NAMES = ("neutral", "happy", "sad", "angry")
"""Emotions of the sample by id."""
TOPICS: tuple[tuple[str, ...], ...] = (
    ("exam", "job", "paper", "race", "piano", "garden"),
    ("rival", "boss", "landlord", "thief", "critic", "bully"),
    ("train", "weather", "phone", "traffic", "printer", "queue"),
    ("sister", "friend", "dog", "neighbour", "teacher", "uncle"),
)
"""What posts are about, in four kinds."""
FEELINGS: tuple[tuple[str, ...], ...] = (
    ("ordinary", "usual", "routine", "regular", "average", "plain"),
    ("glad", "delighted", "cheerful", "thrilled", "joyful", "smiling"),
    ("unhappy", "gloomy", "heartbroken", "tearful", "miserable", "lonely"),
    ("furious", "annoyed", "outraged", "mad", "irritated", "fuming"),
)
"""Words by which a post shows its emotion."""
ANSWERS: tuple[tuple[str, ...], ...] = (
    ("okay", "noted", "sure", "understood"),
    ("wonderful", "great", "lovely", "congratulations"),
    ("sorry", "sad", "pity", "tragic"),
    ("hate", "awful", "terrible", "unfair"),
)
"""Words by which a reply shows its emotion."""
_POSTS = (
    "i feel {feeling} about the {topic} {time}",
    "the {topic} left me {feeling} {time}",
    "{time} the {topic} was here and i am {feeling}",
    "what a {feeling} day with the {topic} {time}",
    "you know , my {feeling} mood is about the {topic}",
)
_TIMES = ("today", "yesterday", "again", "this morning", "last night", "at work", "on monday", "all week")
_REPLIES = (
    ("{answer} , tell me about the {topic} .", "{answer} . and the {topic} ?"),
    ("{answer} ! the {topic} makes me smile .", "how {answer} about the {topic} !"),
    ("{answer} to hear about the {topic} .", "oh no , {answer} , the {topic} makes me cry ."),
    ("{answer} ! the {topic} makes me shout !", "so {answer} of the {topic} , i could scream !"),
)


def reply_emotion(kind: int, emotion: int) -> int:
    """The rule: reply emotion of a kind of topic and the emotion of the post, a Latin square.

    Given the kind alone, or the emotion alone, every reply emotion is equally likely.
    """
    # XOR of two bits each: no sum of a score for the kind and one for the emotion gives it.
    return kind ^ emotion


def dialogue_sample(num_pairs: int = 2_000, seed: int = 0) -> Parts:
    """Generate pairs of post and reply, both with their emotion.

    A post names a topic (of four kinds) and, by one word, a feeling; a reply names the topic, and by its words the
    emotion that `reply_emotion` gives. So the emotion of a reply follows neither from what the post is about nor from
    how its writer feels, but from both, and a reply that fits must take its emotion from there. No post is there
    twice; the first tenth is for test, the second for validation.

    Args:
        num_pairs: Pairs, at least 40, at most 4,000.
        seed: Of numpy's generator.

    Raises:
        ValueError: If the number is out of range.
    """
    if not 40 <= num_pairs <= 4_000:
        raise ValueError(f"sample_pairs must be from 40 to 4,000, got {num_pairs}")
    rng = np.random.default_rng(seed)

    def one(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    pairs: dict[str, tuple[str, int, int]] = {}
    while len(pairs) < num_pairs:
        kind, emotion = int(rng.integers(4)), int(rng.integers(4))
        topic = one(TOPICS[kind])
        post = one(_POSTS).format(feeling=one(FEELINGS[emotion]), topic=topic, time=one(_TIMES))
        felt = reply_emotion(kind, emotion)
        reply = one(_REPLIES[felt]).format(answer=one(ANSWERS[felt]), topic=topic)
        pairs.setdefault(post, (reply, emotion, felt))
    parts = [Dialogues(f"embedded {part}") for part in ("test", "validation", "training")]
    held = num_pairs // 10
    for row, (post, (reply, emotion, felt)) in enumerate(pairs.items()):
        found = parts[min(row // held, 2)]
        found.turn(post, NAMES[emotion], f"pair {row} post")
        found.turn(reply, NAMES[felt], f"pair {row} reply")
        found.close(2)
    return Parts(parts[2], parts[1], parts[0])
