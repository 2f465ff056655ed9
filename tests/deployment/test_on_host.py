"""What a deployment runs on the host: the smoke test and the question to the hub."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("huggingface_hub")
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from flashcore_ops.deployment.hub import FIXES, Access, fix_for
from flashcore_ops.deployment.on_host import hub_access, smoke


def test_smoke_test_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main("cpu") == 0
    assert "attention on cpu" in capsys.readouterr().out


def test_smoke_test_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "attention", lambda query, key, value: query)
    assert smoke.main("cpu") == 1


def test_smoke_test_without_the_gpu_that_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert smoke.main("cuda") == 1
    assert "nvidia-smi sees a GPU and torch" in capsys.readouterr().out


def answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind("refused", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


OPEN = SimpleNamespace(gated=False, private=False)
GATED = SimpleNamespace(gated="manual", private=False)


@pytest.mark.parametrize(
    ("info", "auth", "token", "expected"),
    [
        (OPEN, answer(GatedRepoError, 403), None, (Access.READABLE, "open model, no login needed")),
        (GATED, None, "hf_secret", (Access.READABLE, "readable as someone")),
        (
            GATED,
            answer(GatedRepoError, 401),
            None,
            (Access.LOGIN, "gated model, and this machine is not logged in"),
        ),
        (
            GATED,
            answer(GatedRepoError, 403),
            "hf_secret",
            (Access.TERMS, "gated model, and someone has no access to it"),
        ),
        (
            answer(RepositoryNotFoundError, 404),
            None,
            None,
            (Access.NOT_FOUND, "no such model on the hub, or a private one"),
        ),
        (answer(HfHubHTTPError, 401), None, "hf_secret", (Access.LOGIN, "the hub answered with HTTP status 401")),
        (answer(HfHubHTTPError, 503), None, None, (Access.UNREACHABLE, "the hub answered with HTTP status 503")),
        (httpx.ConnectError("no route"), None, None, (Access.UNREACHABLE, "hub not reached (ConnectError)")),
    ],
)
def test_hub_access(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    info: Any,
    auth: HfHubHTTPError | None,
    token: str | None,
    expected: tuple[Access, str],
) -> None:
    def tell(result: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    api = SimpleNamespace(
        model_info=lambda model, timeout: tell(info),
        auth_check=lambda model: tell(auth),
        whoami=lambda: {"name": "someone"},
    )
    monkeypatch.setattr(hub_access, "HfApi", lambda: api)
    monkeypatch.setattr(hub_access, "get_token", lambda: token)
    monkeypatch.setattr(hub_access, "try_to_load_from_cache", lambda model, name: None)
    assert hub_access.main("owner/model") == expected[0]
    assert capsys.readouterr().out == expected[1] + "\n"


def test_a_cached_model_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, timeout: float) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(hub_access, "HfApi", lambda: SimpleNamespace(model_info=refuse))
    monkeypatch.setattr(hub_access, "try_to_load_from_cache", lambda model, name: f"/cache/{name}")
    access, found = hub_access.hub_access("owner/model")
    assert access == Access.READABLE
    assert "cache" in found


def test_every_refusal_has_a_fix() -> None:
    assert FIXES.keys() == set(Access) - {Access.READABLE}
    for status in (*Access, 1):
        assert "{" not in fix_for(status, "owner/model", "~/deploy")
