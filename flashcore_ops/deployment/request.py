"""What `flashcore deploy` was asked for."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from flashcore_ops.deployment.remote import Destination, host_path
from flashcore_ops.errors import OptionError
from flashcore_ops.hub import is_hub_id

DEFAULT_DIRECTORY = "~/.cache/flashcore/deploy"


@dataclass(frozen=True)
class DeployRequest:
    """The arguments of `flashcore deploy`, as they were typed. `directory` and `python` are the host's."""

    destination: Destination
    model: str | None = None
    random: str | None = None
    dtype: str | None = None
    baseline: bool = False
    directory: str = DEFAULT_DIRECTORY
    python: str = "python3"
    output: Path = Path("flashcore-validation")
    rerun: bool = False

    def check(self) -> None:
        """Raises OptionError for a value that can be refused before the host is reached."""
        host, user = self.destination.host, self.destination.user
        # ssh would read a leading dash as an option, and rsync takes no ssh:// address.
        if not re.fullmatch(r"([^-\s/][^\s/]*@)?[^-\s/@][^\s/@]*", host):
            raise OptionError.explain(
                "HOST",
                expected="a name of ssh's configuration, a host name, or an IP address",
                got=repr(host),
                fix="Pass the port and the user as --port and --user.",
            )
        if user is not None and ("@" in host or user == "" or user.startswith("-")):
            raise OptionError.explain(
                "--user", expected="one user name", got=f"{user!r} for {host}", fix="Name the user once."
            )
        for option, path in (("--identity", self.destination.identity), ("--ssh-config", self.destination.ssh_config)):
            if path is not None and not path.is_file():
                raise OptionError.explain(option, expected="a file", got=f"none at {path}", fix="Check the path.")
        if not self.directory or re.match(r"~[^/]", self.directory) or "\0" in self.directory:
            raise OptionError.explain(
                "--directory",
                expected="a path on the host, absolute or below the home directory",
                got=repr(self.directory),
                fix="Write it as /path or ~/path.",
            )
        if self.output.exists() and not self.output.is_dir():
            raise OptionError.explain(
                "--output", expected="a directory", got=f"a file, {self.output}", fix="Choose another path."
            )
        self._check_model()

    def _check_model(self) -> None:
        if self.model is None:
            return
        if self.random is not None:
            raise OptionError.explain(
                "--random", expected="no MODEL beside it", got=repr(self.model), fix="Pass one of the two."
            )
        if self.is_on_host:
            return
        if Path(self.model).exists() or not is_hub_id(self.model):
            raise OptionError.explain(
                "MODEL",
                expected="a hub id, or a directory on the host as /path or ~/path",
                got=repr(self.model),
                fix="Weights are not copied: put them on the host and pass their path there.",
            )

    @property
    def is_on_host(self) -> bool:
        """Whether MODEL is a directory on the host."""
        return self.model is not None and self.model.startswith(("/", "~/"))

    @property
    def hub_id(self) -> str | None:
        """MODEL where it is one of the hub."""
        return None if self.is_on_host else self.model

    def validate_arguments(self) -> str:
        """What the host's shell passes to `flashcore validate`, all but the output.

        Example:
            >>> DeployRequest(Destination("gpu"), model="~/my models/8b", dtype="float16").validate_arguments()
            '--dtype=float16 -- "$HOME"/\\'my models/8b\\''
        """
        options = [f"--{name}={value}" for name, value in (("random", self.random), ("dtype", self.dtype)) if value]
        words = [shlex.quote(option) for option in options] + ["--baseline"] * self.baseline
        if self.model is not None:
            words += ["--", host_path(self.model) if self.is_on_host else shlex.quote(self.model)]
        return " ".join(words)
