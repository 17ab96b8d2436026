"""Two versions of a title in one line, with what was taken out and what was put in."""

from __future__ import annotations

from difflib import SequenceMatcher


def marked(before: str, after: str) -> str:
    """One line of both: `[-out-]` and `{+in+}`, letter by letter.

    Example:
        >>> marked("Mario Kart", "Mari-o Krt")
        'Mari{+-+}o K[-a-]rt'
    """
    parts = []
    for kind, low, high, start, end in SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(before[low:high])
            continue
        if high > low:
            parts.append(f"[-{before[low:high]}-]")
        if end > start:
            parts.append(f"{{+{after[start:end]}+}}")
    return "".join(parts)
