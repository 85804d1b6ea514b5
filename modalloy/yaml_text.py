"""YAML of strangers: words, numbers, lists and mappings of a bounded text, without aliases that multiply or tags that run.

The size of the text, the depth, and the number of values are bounded, aliased ones counted wherever they are named.
"""

import math
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from modalloy.errors import RecipeError, shown

MAX_BYTES = 1_000_000
MAX_VALUES = 20_000
MAX_DEPTH = 20
MAX_WORD = 4_000  # characters of one value, as long as a path can be
TAG = "tag:yaml.org,2002:"
WORDS, NUMBERS = {f"{TAG}str", f"{TAG}bool", f"{TAG}null"}, {f"{TAG}int", f"{TAG}float"}
KINDS = {ScalarNode: WORDS | NUMBERS, SequenceNode: {f"{TAG}seq"}, MappingNode: {f"{TAG}map"}}
MERGE = f"{TAG}merge"


def parse_yaml(text: str) -> Any:
    """The content of a YAML text: None, truth values, numbers, texts, and lists and dictionaries (of texts) of these.

    Raises:
        RecipeError: it is no YAML, or more than this; the message says what, where, and begins in lower case.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"is larger than {MAX_BYTES:,} characters; write less")
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(f"{error.problem or error.context}".split())[:200]
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"not valid YAML ({problem}{_place(mark)}); correct the file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"not valid YAML ({reason}); correct the file") from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which counts what it makes, and refuses what YAML would guess."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.count = 0
        self.sizes: dict[str, int] = {}  # values under an anchor, those of its aliases included

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """A value and all that is in it."""
        event = self.peek_event()
        anchor, before = event.anchor, self.count
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias and anchor in self.anchors:
            if anchor not in self.sizes:
                raise _refused(f"*{anchor} stands inside what it names", event)
            self.count += self.sizes[anchor]
        self.count += 1
        self.depth += 1
        if self.count > MAX_VALUES:
            raise _refused(f"more than {MAX_VALUES:,} values, aliased ones counted", event)
        if self.depth > MAX_DEPTH:
            raise _refused(f"nested more than {MAX_DEPTH} deep", event)
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        if not is_alias and anchor is not None:
            self.sizes[anchor] = self.count - before
        return node

    def compose_scalar_node(self, anchor: Any) -> ScalarNode:
        """A word or a number, which must be one that its tag allows."""
        event = self.peek_event()
        node = super().compose_scalar_node(anchor)
        self._check_tag(node, event)
        if len(node.value) > (MAX_WORD if node.tag in WORDS else 100):
            raise _refused(f"{shown(node.value)} is longer than any value", event)
        if any(not (char.isprintable() or char in "\t\n" or char.isspace()) for char in node.value):
            raise _refused(f"{shown(node.value)} holds characters that are no text", event)
        found = self.resolve(ScalarNode, node.value, (True, False))
        if (
            node.tag != f"{TAG}str"
            and node.tag not in (found, MERGE)
            and (node.tag, found) != (f"{TAG}float", f"{TAG}int")
        ):
            raise _refused(f"{shown(node.value)} is no {node.tag.removeprefix(TAG)}", event)
        return node

    def compose_sequence_node(self, anchor: Any) -> SequenceNode:
        """A list."""
        event = self.peek_event()
        node = super().compose_sequence_node(anchor)
        self._check_tag(node, event)
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """A mapping, of whose keys none is given twice; the last would win."""
        event = self.peek_event()
        node = super().compose_mapping_node(anchor)
        self._check_tag(node, event)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag not in (f"{TAG}str", MERGE):
                found = key.value if isinstance(key, ScalarNode) else "a list or mapping"
                raise _refused(f"the key {shown(found)} is no word, and keys must be words; put it between quotes", key)
            if key.value in keys:
                raise _refused(f"{shown(key.value)} is given twice", key)
            keys.add(key.value)
        return node

    def construct_yaml_int(self, node: ScalarNode) -> int:
        """A whole number of at most 64 bits."""
        number = super().construct_yaml_int(node)
        if not -(2**63) <= number < 2**63:
            raise _refused(f"{shown(node.value)} is larger than any number here", node)
        return int(number)

    def construct_yaml_float(self, node: ScalarNode) -> float:
        """A number; infinite only if it is written so."""
        number = float(super().construct_yaml_float(node))
        if math.isinf(number) and "inf" not in node.value.lower():
            raise _refused(f"{shown(node.value)} is larger than any number here", node)
        return number

    def _check_tag(self, node: Node, event: Any) -> None:
        allowed = KINDS[type(node)] | ({MERGE} if isinstance(node, ScalarNode) else set())
        if node.tag not in allowed:
            if node.tag == f"{TAG}timestamp" and event.tag is None:
                raise _refused(f"{shown(node.value)} is read as a date; put it between quotes", event)
            raise _refused(f"the tag {shown(node.tag.replace(TAG, '!!'))} does not fit its value", event)


_Loader.add_constructor(f"{TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{TAG}float", _Loader.construct_yaml_float)


def _refused(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """The error of a value or event, with its place."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _place(mark: yaml.Mark | None) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
