"""What a host's access to a model of the hub means, and what to do where there is none."""

from __future__ import annotations

from enum import IntEnum


class Access(IntEnum):
    """The exit status of `on_host.hub_access`."""

    READABLE = 0
    LOGIN = 3
    TERMS = 4
    NOT_FOUND = 5
    UNREACHABLE = 6


FIXES: dict[int, str] = {
    Access.LOGIN: "Run `{directory}/project/.venv/bin/hf auth login` on the host. Tokens are never copied there.",
    Access.TERMS: "Accept the model's terms at https://huggingface.co/{model} with that account, or log in on the host "
    "with another.",
    Access.NOT_FOUND: "Check the name; for a private model, run `hf auth login` on the host.",
    Access.UNREACHABLE: "Check the host's connection, or put the model there and pass its directory.",
}
OTHER_FIX = "The output below says what failed."


def fix_for(status: int, model: str, directory: str) -> str:
    """What to do after `on_host.hub_access` ended with `status`; `directory` is the deployment's on the host.

    Example:
        >>> fix_for(3, "owner/gated", "~/deploy")
        'Run `~/deploy/project/.venv/bin/hf auth login` on the host. Tokens are never copied there.'
    """
    return FIXES.get(status, OTHER_FIX).format(model=model, directory=directory)
