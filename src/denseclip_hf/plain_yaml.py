"""YAML (and so JSON) from strangers: plain values, nothing executed, nothing that grows."""

from typing import Any

import yaml


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, by which a few lines can stand for billions of values."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases (&, *) are not read")
        return super().compose_node(parent, index)


def load_plain_yaml(text: str) -> Any:
    """
    The value that a text in YAML stands for.

    Raises:
        ValueError: with YAML's own words, if it is no YAML, nested too deeply, or has aliases.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


__all__ = ["load_plain_yaml"]
