"""Machines for tests: Linux network namespaces on one switch, each with a folder and an sshd of its own.

On each machine ``/srv`` is that machine's folder and the folders of all others are hidden; names resolve
through its own ``/etc/hosts``; ``ssh`` and ``scp`` between them are OpenSSH's, with real keys. All traffic
stays inside.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

HOME = Path("/srv")
"""Where every machine sees its own folder."""

_ENTER = 'mount --bind "$0" /srv && mount -t tmpfs none "$1" && cd "/srv/$2" && shift 2 && exec "$@"'


def missing() -> str | None:
    """Return why machines cannot be made here; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    for program, package in (
        ("ip", "iproute2"),
        ("scp", "openssh-client"),
        ("ssh-keygen", "openssh-client"),
        ("sshd", "openssh-server"),
    ):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            return f"needs the program {program} (Debian: {package})"
    probe = f"flep{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "needs the right to make network namespaces"
    mount = subprocess.run(["ip", "netns", "exec", probe, "mount", "-t", "tmpfs", "none", HOME])
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return "needs the right to mount" if mount.returncode else None


def ip(*arguments: str) -> None:
    """Run ``ip ARGUMENTS``."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Machines:
    """The machines of one test.

    Attributes
    ----------
    folder
        Holds one folder a machine, and what the test keeps for itself.
    addresses
        Their IPv4 addresses, all in one /24, by name; a machine is known to the others as
        ``NAME.example.org``.
    """

    folder: Path
    addresses: dict[str, str]
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Machines:
        """Build the switch, the machines and their sshd."""
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever runs and remove everything outside of ``folder``."""
        for child in self.started.values():
            if child.poll() is None:
                child.kill()
            child.wait()
        self._stack.close()

    def home(self, name: str) -> Path:
        """Return the folder that the machine sees as ``/srv``, as the test sees it."""
        return self.folder / "machines" / name

    def command(self, name: str, *command: str, cwd: str = ".") -> list[str]:
        """Return what runs ``command`` on a machine, in a folder relative to its ``/srv``."""
        inside = ["sh", "-c", _ENTER, str(self.home(name)), str(self.folder), cwd, *command]
        return ["ip", "netns", "exec", self._namespace(name), *inside]

    def run(
        self, name: str, *command: str, cwd: str = ".", timeout: float = 400
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a machine to its end."""
        return subprocess.run(
            self.command(name, *command, cwd=cwd), capture_output=True, text=True, timeout=timeout
        )

    def shell(self, name: str, line: str, *, cwd: str = ".", timeout: float = 400) -> str:
        """Run a line in a machine's shell, with this Python's commands on the PATH; return what it prints."""
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        done = self.run(name, "env", f"PATH={path}", "bash", "-euc", line, cwd=cwd, timeout=timeout)
        assert done.returncode == 0, f"{name}: {line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, key: str, name: str, line: str, *, cwd: str = ".") -> subprocess.Popen[bytes]:
        """Start a line on a machine; its output goes to the log of ``key``."""
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        with self._log(key).open("ab") as log:
            child = subprocess.Popen(
                self.command(name, "env", f"PATH={path}", "bash", "-c", f"exec {line}", cwd=cwd),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started[key] = child
        return child

    def log(self, key: str) -> str:
        """Return what was printed so far."""
        path = self._log(key)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, key: str, text: str, timeout: float = 400) -> None:
        """Wait until ``text`` has been printed."""
        deadline = time.monotonic() + timeout
        while text not in self.log(key):
            alive = self.started[key].poll() is None
            assert time.monotonic() < deadline and (alive or text in self.log(key)), (
                f"{key} never said {text!r}:\n{self.log(key)}"
            )
            time.sleep(0.1)

    def wait(self, key: str, timeout: float = 600) -> int:
        """Wait for an end; return the exit status."""
        try:
            return self.started[key].wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{key} did not end:\n{self.log(key)}") from None

    def _log(self, key: str) -> Path:
        return self.folder / f"{key}.log"

    def _namespace(self, name: str) -> str:
        return f"flep{os.getpid()}{name}"

    def _build(self) -> None:
        switch = self._namespace("switch")
        ip("netns", "add", switch)
        self._stack.callback(ip, "netns", "del", switch)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        keys = self.folder / "ssh"
        keys.mkdir()
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", keys / key], check=True)
        public = (keys / "host.pub").read_text().split()[:2]
        known = "".join(f"{name}.example.org {' '.join(public)}\n" for name in self.addresses)
        (keys / "known_hosts").write_text(known)
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{address} {name}.example.org\n" for name, address in self.addresses.items()
        )
        for number, (name, address) in enumerate(self.addresses.items()):
            self._build_one(name, address, f"v{number}", hosts)
            self._start_sshd(name)

    def _build_one(self, name: str, address: str, link: str, hosts: str) -> None:
        space, switch = self._namespace(name), self._namespace("switch")
        ip("netns", "add", space)
        self._stack.callback(ip, "netns", "del", space)
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", link, "type", "veth", "peer", "eth0", "netns", space)
        ip("-n", switch, "link", "set", link, "master", "switch")
        ip("-n", switch, "link", "set", link, "up")
        ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        # `ip netns exec` puts what lies here in the place of the same name in /etc.
        etc = Path("/etc/netns") / space
        ssh = self.home(name) / ".ssh"
        ssh.mkdir(parents=True)
        for file in ("host", "user", "user.pub", "known_hosts"):
            shutil.copy(self.folder / "ssh" / file, ssh / file)
        (etc / "ssh").mkdir(parents=True)
        self._stack.callback(shutil.rmtree, etc)
        (etc / "hosts").write_text(hosts)
        (etc / "ssh" / "ssh_config").write_text(
            f"IdentityFile {HOME}/.ssh/user\nUserKnownHostsFile {HOME}/.ssh/known_hosts\n"
            "StrictHostKeyChecking yes\nBatchMode yes\nUser root\n"
        )
        # Relative paths of scp begin in the machine's folder.
        (etc / "ssh" / "sshd_config").write_text(
            f"HostKey {HOME}/.ssh/host\nAuthorizedKeysFile {HOME}/.ssh/user.pub\nStrictModes no\n"
            "PermitRootLogin prohibit-password\nUsePAM no\nPidFile none\n"
            f"ListenAddress {self.addresses[name]}\nSubsystem sftp internal-sftp -d {HOME}\n"
        )

    def _start_sshd(self, name: str) -> None:
        # sshd wants this folder for its unprivileged half; the service of the distribution makes it.
        prepare = 'mkdir -p /run/sshd && exec "$(command -v sshd || echo /usr/sbin/sshd)" -D -e'
        with self._log(f"sshd-{name}").open("ab") as log:
            child = subprocess.Popen(
                self.command(name, "sh", "-c", prepare), stdout=log, stderr=subprocess.STDOUT
            )
        self._stack.callback(child.wait)
        self._stack.callback(child.send_signal, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while "Server listening" not in self.log(f"sshd-{name}"):
            assert child.poll() is None and time.monotonic() < deadline, self.log(f"sshd-{name}")
            time.sleep(0.05)
