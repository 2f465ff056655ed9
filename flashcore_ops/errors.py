"""Typed errors. Every message says what was expected, what came, and what to do."""

from __future__ import annotations

from typing import Self


class FlashCoreError(Exception):
    """Base of every error that FlashCore raises on purpose."""

    @classmethod
    def explain(cls, subject: str, *, expected: str, got: str, fix: str) -> Self:
        """Builds the error from its three parts.

        Example:
            >>> str(ShapeError.explain("query", expected="4 dims", got="3", fix="Add a batch dim."))
            'query: expected 4 dims, got 3. Add a batch dim.'
        """
        return cls(f"{subject}: expected {expected}, got {got}. {fix}")


class ShapeError(FlashCoreError, ValueError):
    """A tensor has the wrong rank or size."""


class DtypeError(FlashCoreError, TypeError):
    """A tensor has a dtype that is not supported or does not match the others."""


class DeviceError(FlashCoreError, ValueError):
    """Tensors live on different devices, or a device that was asked for is not there or too small."""


class LayoutError(FlashCoreError, ValueError):
    """A tensor's strides or memory cannot be served."""


class OptionError(FlashCoreError, ValueError):
    """A scalar argument is out of range, or two options exclude each other."""


class GradientError(FlashCoreError, RuntimeError):
    """An inference-only op was asked for gradients."""


class CapacityError(FlashCoreError, ValueError):
    """More tokens than the KV cache holds."""


class UnsupportedModelError(FlashCoreError, ValueError):
    """A model, or one of its settings, that FlashCore cannot serve."""


class MaskError(FlashCoreError, ValueError):
    """An attention mask that is malformed or cannot be represented."""


class MissingDependencyError(FlashCoreError, ImportError):
    """An optional package is needed and not installed."""


class DeploymentError(FlashCoreError, RuntimeError):
    """A step of a deployment to another host failed; its text carries the command and what it said."""

    exit_status = 2


class ValidationFailedError(DeploymentError):
    """The validation ran on the host and did not pass."""

    exit_status = 1


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without the stop or colon at its end.

    Example:
        >>> first_line(ValueError("a shape:\\nand more"))
        'a shape'
    """
    return (str(error).strip().splitlines() or [""])[0].rstrip(".: ")
