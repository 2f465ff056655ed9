"""Names of models on the Hugging Face hub."""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id.

    Example:
        >>> [is_hub_id(name) for name in ("owner/name", "gpt2", "./model", "a/b/c")]
        [True, True, False, False]
    """
    return _HUB_ID.fullmatch(name) is not None
