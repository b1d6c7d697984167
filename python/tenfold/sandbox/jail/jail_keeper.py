# SPDX-License-Identifier: Apache-2.0
"""The keeper of a sandbox, and what its descendants do to confine themselves.

Three processes: the keeper (waits, ends everything when time is up, says what happened), a first process of
the new process namespace (its end ends all others in it), and the one that runs the program. None of them
sees anything of the trainer's memory, environment or open files.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time

import jail_driver
import jail_linux as linux

_GRACE = 1.0


def _attempt(what, *arguments) -> bool:
    try:
        what(*arguments)
    except OSError:
        return False
    return True


class Jail:
    """What confines the program here; ``protection`` names the means for each purpose, or ``none``."""

    def __init__(self, spec: dict) -> None:
        self.spec, self.limits = spec, spec["limits"]
        self.without = set(spec["without"])
        self.protection = dict.fromkeys(
            ("network", "processes", "signals", "files", "disk"), "none"
        )
        self.uid = os.geteuid()
        self.drop: int | None = None
        self.read_only = False

    def enter(self) -> None:
        """Namespaces, which all processes below share; then decides on what each has to do itself."""
        protection, limits = self.protection, self.limits
        spaces = "namespaces" not in self.without
        # Root needs no user namespace, and without one may give the program a user id of its own.
        owner = spaces and self.uid != 0 and _attempt(linux.own_user, self.uid, os.getegid())
        if spaces and self.uid == 0 and not _attempt(linux.unshare, linux.NEWNET):
            owner = _attempt(linux.own_user, 0, 0)
        elif spaces and self.uid == 0:
            protection["network"] = "namespace"
        if spaces and protection["network"] == "none" and _attempt(linux.unshare, linux.NEWNET):
            protection["network"] = "namespace"
        if self.uid == 0 and not owner and self.spec["droppable"] and "drop" not in self.without:
            self.drop = 1_000_000 + os.getpid()
        if spaces and _attempt(linux.unshare, linux.NEWPID):
            protection["signals"] = "namespace"
        for flag in (linux.NEWIPC, linux.NEWUTS) if spaces else ():
            _attempt(linux.unshare, flag)
        folder = self.spec["folder"]
        if spaces and _attempt(linux.unshare, linux.NEWNS):
            who = self.uid if self.drop is None else self.drop
            if _attempt(linux.private_folder, folder, limits["disk_bytes"], who):
                protection["disk"] = "memory file system"
                self.read_only = _attempt(linux.read_only, folder)
        if protection["disk"] == "none":
            protection["disk"] = "size of each file"
            if self.drop is not None:
                os.chown(folder, self.drop, self.drop)
        filters = linux.seccomp_known() and "seccomp" not in self.without
        self.filters = filters
        if filters:
            protection["network"] = protection["network"].replace("none", "") + " seccomp"
            if protection["signals"] == "none":
                protection["signals"] = "seccomp"
        protection["network"] = protection["network"].strip().replace(" ", " and ")
        # The kernel does not count root's processes.
        self.counted = self.uid != 0 or self.drop is not None
        if self.counted:
            protection["processes"] = "limit"
        elif filters:
            protection["processes"] = "no new ones"
        # Landlock lets owners change modes and times of files that they may not open.
        if (
            "landlock" not in self.without
            and linux.landlock_version() > 0
            and (self.read_only or filters)
        ):
            protection["files"] = "Landlock"
        self.owner = owner

    def missing(self) -> list[str]:
        """What was required and is not there."""
        return [name for name in self.spec["require"] if self.protection[name] == "none"]

    def become(self) -> None:
        """Takes the user id of its own, where there is one."""
        if self.drop is not None and self.drop != os.geteuid():
            os.setgroups([])
            os.setresgid(self.drop, self.drop, self.drop)
            os.setresuid(self.drop, self.drop, self.drop)

    def confine(self) -> None:
        """The program's own process gives up what it can do. Whatever fails here ends it."""
        limits = self.limits
        already = 0
        if self.counted and not self.owner and self.drop is None:
            already = linux.tasks_of(self.uid)
        self.become()
        linux.drop_capabilities()
        linux.no_new_privileges()
        linux.die_with_parent(signal.SIGKILL)
        linux.limit("CPU", limits["cpu_seconds"], limits["cpu_seconds"] + 1)
        linux.limit("AS", limits["memory_bytes"])
        linux.limit("FSIZE", limits["file_bytes"])
        linux.limit("NOFILE", limits["open_files"])
        linux.limit("CORE", 0)
        linux.limit("MEMLOCK", 0)
        linux.limit("MSGQUEUE", 0)
        if self.counted:
            # The keeper and the first process count where they have the same user.
            keepers = 0 if already else 1 if self.drop is not None else 2
            linux.limit("NPROC", limits["processes"] + already + keepers)
        if self.protection["files"] == "Landlock":
            linux.landlock(self.spec["readable"], [self.spec["folder"], "/dev/null"])
        if self.filters:
            linux.seccomp(
                deny_others=self.protection["signals"] == "seccomp",
                deny_forks=not self.counted or limits["processes"] == 1,
                deny_attributes=not self.read_only,
            )


def _program(jail: Jail, status: int, result: int) -> None:
    """Never returns. A failure to confine is told on ``status``, which the program does not see."""
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        jail.confine()
    except BaseException as error:
        broken = f"{type(error).__name__}: {error}"
        os.write(status, (json.dumps({"broken": broken}) + "\n").encode())
        os._exit(code)
    try:
        os.close(status)
        code = jail_driver.run(jail.spec["task"], result)
    finally:
        os._exit(code)


def _first(jail: Jail, status: int, result: int) -> None:
    """The first process of the namespace: waits for the program and takes its exit over. Never returns."""
    jail.become()  # so that it has nothing to offer either
    linux.die_with_parent(signal.SIGKILL)
    os.setsid()  # the keeper is in no process group that the program can name
    program = os.fork()
    if program == 0:
        _program(jail, status, result)
    os.close(status)
    os.close(result)
    os.closerange(0, 3)
    while True:
        pid, found = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(found)
            os._exit(code if code >= 0 else 128 - code)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:  # a kernel without this file
        return []


def _end_all(deadline: float) -> None:
    """Ends every descendant: children, and again those that become children by it."""
    while time.monotonic() < deadline:
        try:
            for pid in _children():
                os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.001)
        except ChildProcessError:
            return


def _keep(child: int, seconds: float, stop: set) -> dict:
    """Waits for the child until the time is up or a signal says stop; nothing is left when it returns."""
    start, status, ended = time.monotonic(), None, ""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    while status is None:
        left = start + seconds - time.monotonic()
        got = signal.sigtimedwait(stop, max(0.0, left))
        pid, found, usage = os.wait4(child, os.WNOHANG)
        if pid == child:
            status = found
        elif got is None or got.si_signo != signal.SIGCHLD:
            ended = "time" if got is None else "stopped"
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
        else:  # an adopted orphan
            _reap_others(child)
    took = time.monotonic() - start
    _end_all(time.monotonic() + _GRACE)
    code = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    return {"exit": code if code >= 0 else 128 - code, "ended": ended, "seconds": took,
            "cpu_seconds": cpu, "memory_bytes": usage.ru_maxrss * 1024}  # fmt: skip


def _reap_others(child: int) -> None:
    for pid in _children():
        if pid != child:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue


def main(spec_file: int, status_file: int, result: int) -> None:
    """The keeper."""
    stop = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    linux.die_with_parent(signal.SIGTERM)
    with os.fdopen(spec_file, "rb") as file:
        spec = json.loads(file.read())
    if os.getppid() != spec["parent"]:
        os._exit(1)
    os.umask(0o077)
    jail = Jail(spec)
    jail.enter()
    state = {"protection": jail.protection, "refused": jail.missing()}
    if not state["refused"]:
        linux.adopt_orphans()
        child = os.fork()
        if child == 0:
            if jail.protection["signals"] == "namespace":
                _first(jail, status_file, result)
            _program(jail, status_file, result)
        os.close(result)
        null = os.open("/dev/null", os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        state |= _keep(child, spec["limits"]["wall_seconds"], stop)
    with os.fdopen(status_file, "w") as file:
        file.write(json.dumps(state))
