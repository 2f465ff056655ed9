"""What a deployment has done on a host, kept there in one file so that the next one skips it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Mark:
    """A step that was finished for what `key` stands for, and what it found."""

    key: str
    found: str


@dataclass(frozen=True)
class State:
    """The marks of finished steps by their names, in the order of the steps, and the GPU that they were made with."""

    gpu: str | None = None
    marks: dict[str, Mark] = field(default_factory=dict)

    def found(self, step: str, key: str) -> str | None:
        """What the step found when it was done for `key`; None if it was not.

        Example:
            >>> state = State().with_mark("copy", Mark("abc", "3 files"))
            >>> state.found("copy", "abc"), state.found("copy", "def")
            ('3 files', None)
        """
        mark = self.marks.get(step)
        return mark.found if mark is not None and mark.key == key else None

    def with_mark(self, step: str, mark: Mark) -> State:
        """The state once the step is done."""
        return replace(self, marks={**self.marks, step: mark})

    def until(self, step: str) -> State:
        """The state while the step is under way: what was done after it no longer counts.

        Example:
            >>> state = State(marks={name: Mark("abc", "") for name in ("copy", "environment", "smoke test")})
            >>> list(state.until("environment").marks)
            ['copy']
        """
        names = list(self.marks)
        kept = names[: names.index(step)] if step in self.marks else names
        return replace(self, marks={name: self.marks[name] for name in kept})

    def to_json(self) -> str:
        """The text of the file."""
        marks = {name: [mark.key, mark.found] for name, mark in self.marks.items()}
        return json.dumps({"gpu": self.gpu, "marks": marks})

    @classmethod
    def from_json(cls, text: str) -> State:
        """Reads the file; one that is missing, cut short or of another form counts as nothing done.

        Example:
            >>> state = State("H100").with_mark("copy", Mark("abc", "3 files"))
            >>> State.from_json(state.to_json()) == state
            True
            >>> State.from_json(state.to_json()[:9]) == State.from_json("[]") == State()
            True
        """
        try:
            content: Any = json.loads(text)
            marks = {str(name): Mark(str(key), str(found)) for name, (key, found) in content["marks"].items()}
            return cls(gpu=content["gpu"], marks=marks)
        except (AttributeError, KeyError, TypeError, ValueError):
            return cls()
