"""Finds out whether this machine may read a model of the hub. Prints one line, never a token.

Usage: python -m flashcore_ops.deployment.on_host.hub_access MODEL
"""

from __future__ import annotations

import sys

import httpx
from huggingface_hub import HfApi, get_token, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from flashcore_ops.deployment.hub import Access


def main(model: str) -> int:
    """Prints what was found about the hub id `model` and returns it as an exit status."""
    access, found = hub_access(model)
    print(found)
    return int(access)


def hub_access(model: str) -> tuple[Access, str]:
    """Whether `model` can be read with what this machine is logged in as, and that in words."""
    api = HfApi()
    try:
        info = api.model_info(model, timeout=10)
        if not (info.gated or info.private):
            return Access.READABLE, "open model, no login needed"
        # A gated model's page is public; its files are not.
        api.auth_check(model)
        return Access.READABLE, f"readable as {account(api)}"
    except GatedRepoError:
        if get_token() is None:
            return Access.LOGIN, "gated model, and this machine is not logged in"
        return Access.TERMS, f"gated model, and {account(api)} has no access to it"
    except (RepositoryNotFoundError, HFValidationError):
        return Access.NOT_FOUND, "no such model on the hub, or a private one"
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return Access.READABLE, "hub not reached, model is in this machine's cache"
        return Access.UNREACHABLE, f"hub not reached ({type(error).__name__})"
    except HfHubHTTPError as error:
        status = error.response.status_code
        return (Access.LOGIN if status == 401 else Access.UNREACHABLE), f"the hub answered with HTTP status {status}"


def account(api: HfApi) -> str:
    """The name that the hub knows this machine's login by."""
    try:
        return str(api.whoami()["name"])
    except (httpx.TransportError, HfHubHTTPError):
        return "an account that the hub does not name"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
