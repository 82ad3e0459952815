"""Class names: what is one, and when two are the same."""

from collections.abc import Mapping, Sequence


def same_name(name: str) -> str:
    """What two names share if they are the same: capital letters and runs of whitespace make no difference."""
    return " ".join(name.split()).casefold()


def class_names(names: Mapping | Sequence[str]) -> list[str]:
    """
    The K class names, in the order of their ids.

    Args:
        names (`dict` from ids 0 … K-1, integers or digits, to names; or a sequence of names): each a text of its own.

    Raises:
        ValueError: if ids are not 0 … K-1; for no class, a name that is empty or no text, or one that appears twice.
    """
    if isinstance(names, Mapping):
        by_id = {str(index): name for index, name in names.items()}
        if by_id.keys() != set(map(str, range(len(names)))):
            raise ValueError(f"class ids must be 0 … {len(names) - 1} without gaps, got {list(names)}.")
        names = [by_id[str(index)] for index in range(len(by_id))]
    one_each = names if isinstance(names, str) else [[name] for name in names]
    return [phrasings[0] for phrasings in class_phrasings(one_each)]


def class_phrasings(words: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """
    K classes, each as a list of its phrasings, as they were given.

    Raises:
        ValueError: for no class, one that is empty or no text, or one that appears twice (in any order of phrasings).
    """
    if isinstance(words, str) or not words:
        raise ValueError(f"class names must be a list of texts, at least one, got {words!r}.")
    classes = [list(word) if isinstance(word, (list, tuple)) else [word] for word in words]
    seen = set()
    for number, phrasings in enumerate(classes, 1):
        if not phrasings or not all(isinstance(text, str) and text.strip() for text in phrasings):
            raise ValueError(f"class name {number} of {len(classes)} is empty or no text: {phrasings}.")
        read = frozenset(map(same_name, phrasings))
        if read in seen:
            raise ValueError(f"{phrasings[0]!r} appears twice (case and whitespace are ignored): keep one.")
        seen.add(read)
    return classes


__all__ = ["class_names", "class_phrasings", "same_name"]
