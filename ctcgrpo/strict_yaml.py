"""YAML that means what it says. YAML lets a key come twice and keeps the last: a section would be dropped without a word."""

from __future__ import annotations

from typing import Any

import yaml


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice in one section", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also for keys that stand twice, endless nesting, and dates that are none."""
    try:
        return yaml.load(text, _UniqueKeys)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply to be read") from None
    except ValueError as error:  # from what makes dates and numbers of what looks like one
        raise yaml.YAMLError(str(error)) from None
