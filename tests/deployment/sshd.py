"""An OpenSSH server of the test's own: keys, port, configuration, home and programs in a temporary directory."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
# What the host has on its PATH; whatever else it needs, a test adds.
PROGRAMS = ("cat", "chmod", "find", "grep", "head", "mkdir", "mv", "nohup", "rm", "rsync", "setsid", "sh", "sleep")
PROGRAMS += ("tail", "tar", "uname")
SECONDS_TO_START = 10.0


class Host:
    """A host on 127.0.0.1, reached by the configuration file that `options` names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.bin = root / "bin"
        self.log = root / "sshd.log"
        self.identity = root / 'my "100%" key it\'s'
        self.known_hosts = root / "known_hosts"
        self.ssh_config = root / "ssh_config"
        for directory in (self.home, self.bin):
            directory.mkdir(parents=True)
        for program in PROGRAMS:
            (self.bin / program).symlink_to(str(shutil.which(program)))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._configure()

    @property
    def options(self) -> list[str]:
        """What `flashcore deploy` needs to come here."""
        return ["--port", str(self.port), "--identity", str(self.identity), "--ssh-config", str(self.ssh_config)]

    def install(self, name: str, script: str) -> None:
        """Puts a shell script on the host's PATH, in place of what was there."""
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def know_key(self, key: str) -> None:
        """Makes this public key the one that the client knows for the host."""
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {key}\n")

    def start(self) -> None:
        """Starts to listen."""
        if os.geteuid() == 0:
            # Where a server of root's changes to before a login; a system's service makes it at its start.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with self.log.open("ab") as log:
            command = [str(SSHD), "-D", "-e", "-f", str(self.root / "sshd_config")]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + SECONDS_TO_START
        while self._process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"sshd did not start:\n{self.log.read_text()}")

    def stop(self) -> None:
        """Stops to listen and cuts what is connected."""
        if self._process is not None:
            self.cut()
            self._process.kill()
            self._process.wait()
            self._process = None

    def cut(self) -> None:
        """Kills the server's processes of every connection, not what they started."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        for pid in session_processes(self._process.pid):
            os.kill(pid, signal.SIGKILL)

    def refusal(self) -> str:
        """The end of the server's log if a plain login fails, else nothing."""
        # In ssh's own words, not the product's: a fault of those must fail tests, not skip them.
        key = self.root / "key"
        key.symlink_to(self.identity)
        options = ["-o", "RemoteCommand=none", "-o", "ControlPath=none", "-o", "BatchMode=yes", "-i", str(key)]
        login = ["ssh", "-F", str(self.ssh_config), "-p", str(self.port), *options, "127.0.0.1", "true"]
        if subprocess.run(login, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
            return ""
        return " | ".join(self.log.read_text().splitlines()[-3:])

    def connections(self) -> int:
        """How many have logged in so far."""
        return self.log.read_text().count("Accepted publickey")

    def _configure(self) -> None:
        host_key = self.root / "host_key"
        make_key(host_key)
        make_key(self.identity)
        (self.root / "authorized_keys").write_text(Path(f"{self.identity}.pub").read_text())
        self.know_key(Path(f"{host_key}.pub").read_text())
        # A new connection takes half as long with this key exchange.
        (self.root / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nPidFile none\n"
            f"AuthorizedKeysFile {self.root}/authorized_keys\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUseDNS no\nMaxStartups 100\n"
            f"KexAlgorithms curve25519-sha256\nAcceptEnv *\nSetEnv HOME={self.home} PATH={self.bin}\n"
        )
        # What users may have set and a deployment must bear.
        self.ssh_config.write_text(
            f"Host *\nUser {getpass.getuser()}\nUserKnownHostsFile {self.known_hosts}\n"
            "GlobalKnownHostsFile none\nIdentityAgent none\nSendEnv *\nStrictHostKeyChecking no\n"
            f"ControlMaster auto\nControlPath {self.root}/c\nControlPersist yes\nRemoteCommand false\n"
        )


def make_key(path: Path) -> None:
    """Makes a key pair without a passphrase."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def session_processes(listener: int) -> list[int]:
    """The server's own descendants, by /proc."""
    parents: dict[int, tuple[int, str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, after = stat.read_text().rpartition(")")
        except OSError:
            continue
        pid, _, name = before.partition(" (")
        parents[int(pid)] = (int(after.split()[1]), name)

    def descends(pid: int) -> bool:
        parent = parents.get(pid, (0, ""))[0]
        return parent == listener or (parent in parents and descends(parent))

    return [pid for pid, (_, name) in parents.items() if name.startswith("sshd") and descends(pid)]
