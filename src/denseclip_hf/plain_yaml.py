"""YAML (and so JSON) from strangers: plain values, nothing executed, nothing that grows without bound."""

import math
import re
from typing import Any

import yaml


MAX_VALUES = 100_000


class _PlainLoader(yaml.SafeLoader):
    """YAML in which aliases count as what they stand for: by them a few lines can stand for billions of values."""

    def __init__(self, stream):
        super().__init__(stream)
        self.values, self.sizes = 0.0, {}

    def compose_node(self, parent, index):
        is_alias, before = self.check_event(yaml.AliasEvent), self.values
        node = super().compose_node(parent, index)
        self.values += self.sizes.get(id(node), math.inf) if is_alias else 1  # one that holds itself has no end
        if self.values > MAX_VALUES:
            raise yaml.YAMLError(f"with what its aliases (&, *) stand for it has more than {MAX_VALUES} values")
        self.sizes.setdefault(id(node), self.values - before)
        return node


class _ExponentLoader(_PlainLoader):
    """In which 1e-3 is a number, as in JSON and YAML 1.2, not a text, as in YAML 1.1."""


_ExponentLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_plain_yaml(text: str, exponents: bool = False) -> Any:
    """
    The value that a text in YAML stands for.

    Args:
        text (`str`): YAML, or JSON, which is YAML too.
        exponents (`bool`, defaults to `False`): 1e-3 is a number, as in JSON, not a text, as in YAML 1.1.

    Raises:
        ValueError: with YAML's own words, if it is no YAML, nested too deeply, or has more than `MAX_VALUES` values,
            counting each alias as what it stands for.
    """
    try:
        return yaml.load(text, _ExponentLoader) if exponents else yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    except (LookupError, AttributeError, TypeError, ArithmeticError) as error:  # `!!bool maybe`, say
        raise ValueError("a value is none of the kind that its tag (!!) names") from error


__all__ = ["load_plain_yaml"]
