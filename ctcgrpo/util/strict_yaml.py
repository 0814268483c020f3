"""YAML without duplicate keys, of bounded size.

Plain YAML silently keeps the last of duplicate keys, which would drop a section. Its aliases let a few lines expand to millions of
values.
"""

from typing import Any

import yaml

from ctcgrpo.util.naming import cut, quoted

MAX_CHARACTERS = 200_000  # of a document; the largest of this package has 38,000
MAX_VALUES = 100_000  # values of a document, each alias counted as all that it stands for
MAX_DEPTH = 50
_MAX_BITS = 1024  # of a whole number: Python refuses to print one of more than 4,300 digits


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)


class _StrictLoader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, list | dict | set):  # those are no keys, which is what the loader says
                if key in seen:
                    problem = f"duplicate key {quoted(key)} in one section"
                    raise _error(problem, node)
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_bounded_int(self, node: yaml.ScalarNode) -> int:
        value: int = self.construct_yaml_int(node)
        if value.bit_length() > _MAX_BITS:
            raise _error(f"a whole number of {value.bit_length()} bits; expected at most {_MAX_BITS}", node)
        return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_bounded_int)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they are nested; of each node once, however many aliases there are of it."""
    if id(node) in known:
        measured = known[id(node)]
        if measured is None:
            raise _error("an alias stands within its own anchor", node)
        return measured
    known[id(node)] = None
    values, depth = 1, 1
    if isinstance(node, yaml.CollectionNode):
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        for part in parts:
            more, below = _measure(part, known)
            values, depth = values + more, max(depth, below + 1)
    if values > MAX_VALUES:
        raise _error(f"more than {MAX_VALUES} values, aliases counted as what they stand for", node)
    if depth > MAX_DEPTH:
        raise _error(f"nested too deeply: more than {MAX_DEPTH} levels", node)
    known[id(node)] = values, depth
    return values, depth


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, with a message of some hundred characters, also for a text that is too large
    or nested too deeply, duplicate keys, and dates and numbers that are none."""
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"more than {MAX_CHARACTERS} characters")
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise yaml.YAMLError(f"nested too deeply: more than {MAX_DEPTH} levels") from None
    except yaml.MarkedYAMLError as error:
        error.problem = error.problem and cut(error.problem)
        error.context = error.context and cut(error.context)
        raise
    except ValueError as error:  # from what makes dates and numbers of what looks like one
        raise yaml.YAMLError(cut(str(error))) from None
