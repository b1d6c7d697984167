# SPDX-License-Identifier: Apache-2.0
"""Linux's means to confine a process, called without any library: namespaces, Landlock, seccomp, limits.

Runs inside the sandbox's own interpreter (``python -I -S``), never in the trainer; the standard library
only. Each function either does what it says or raises OSError. Sources: the manual pages unshare(2),
landlock(7), seccomp(2), capabilities(7), prctl(2), getrlimit(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 1, 22, 24, 28
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 2, 4, 0x4000, 0x40000

# System calls that a program of the kind judged here never needs; with EPERM they fail like any other.
# (x86_64, aarch64); None: the machine has no such call.
_DENIED = {
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "personality": (135, 92), "quotactl": (179, 60), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "iopl": (172, None), "ioperm": (173, None), "syslog": (103, 116),
    # Memory that RLIMIT_AS does not count.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190),
}  # fmt: skip
# What reaches other processes by their ids.
_OTHERS = {
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "process_madvise": (440, 440), "kcmp": (312, 272),
}  # fmt: skip
# What changes files without opening them for writing, which Landlock does not see.
_ATTRIBUTES = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
_FORKS = {"fork": (57, None), "vfork": (58, None)}
_TGKILL, _CLONE, _CLONE3 = (234, 131), (56, 220), (435, 435)
_PRLIMIT, _FCNTL = (302, 261), (72, 25)
_OWN_COMMANDS = (
    8,
    10,
    15,
)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: the kernel signals on behalf of who asks
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, *values: int) -> None:
    words = [ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)[:4]]
    _check(_LIBC.prctl(option, *words), f"prctl {option}")


def unshare(flags: int) -> None:
    """Leaves the namespaces that ``flags`` name."""
    _check(_LIBC.unshare(ctypes.c_int(flags)), "unshare")


def own_user(uid: int, gid: int) -> None:
    """Enters a user namespace in which this process keeps its ids, and nobody else has any."""
    unshare(NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                       ("gid_map", f"{gid} {gid} 1")):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def private_folder(path: str, size: int, owner: int) -> None:
    """Mounts an empty memory file system of at most ``size`` bytes there, seen by this namespace only."""
    _check(_LIBC.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount")
    options = f"size={size},nr_inodes=4096,mode=0700,uid={owner},gid={owner}".encode()
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    _check(_LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", flags, options), "mount tmpfs")
    os.chdir(path)


def read_only(but: str) -> None:
    """Every mount of this namespace is for reading only, but the one at ``but``."""
    for path, flags, clear in (
        (b"/", 0x8000, 0),
        (but.encode(), 0, 1),
    ):  # AT_RECURSIVE; MOUNT_ATTR_RDONLY
        attributes = struct.pack("QQQQ", 1 - clear, clear, 0, 0)
        size = ctypes.c_size_t(len(attributes))
        _check(_LIBC.syscall(442, -100, path, flags, attributes, size), "mount_setattr")


def die_with_parent(number: int) -> None:
    """Lets the kernel send this process a signal when its parent is gone."""
    _prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Orphaned descendants become children of this process, so that it can end them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def drop_capabilities() -> None:
    """No capability now, and none from running a program; a no-op for who has none."""
    for capability in range(64):
        if _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break
    # NOROOT and NO_SETUID_FIXUP, locked: uid 0 is an ordinary user. Not permitted without CAP_SETPCAP,
    # which those without capabilities do not need.
    _LIBC.prctl(_PR_SET_SECUREBITS, 0b1111, 0, 0, 0)
    header = struct.pack("Ii", 0x20080522, 0)
    _check(_LIBC.capset(header, bytes(24)), "capset")


def no_new_privileges() -> None:
    """Set-uid programs give nothing any more."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def landlock_version() -> int:
    """Version of the kernel's Landlock; 0 where it is missing or off."""
    return max(0, _LIBC.syscall(444, None, 0, 1))


def landlock(readable: list[str], writable: list[str]) -> None:
    """Files: reading below ``readable`` and anything but running programs below ``writable``.

    Also, where the kernel can: no TCP, no signals to and no abstract sockets of processes outside.
    """
    version = landlock_version()
    if version < 1:
        raise OSError(errno.ENOSYS, "Landlock is not available")
    bits = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    handled = (1 << bits) - 1
    attributes = struct.pack("QQQ", handled, 3, 3)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _check(_LIBC.syscall(444, attributes, ctypes.c_size_t(size), 0), "landlock")
    file_bits = (1 << 1 | 1 << 2 | 1 << 14 | 1 << 15) & handled
    try:
        for paths, access in ((readable, 1 << 2 | 1 << 3), (writable, handled & ~1)):
            for path in paths:
                try:
                    opened = os.open(path, 0o10000000 | os.O_CLOEXEC)  # O_PATH
                except OSError:
                    continue
                allowed = access if os.path.isdir(path) else access & file_bits
                rule = struct.pack("=Qi", allowed, opened)
                _check(_LIBC.syscall(445, ruleset, 1, rule, 0), f"landlock rule {path}")
                os.close(opened)
        no_new_privileges()
        _check(_LIBC.syscall(446, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def seccomp_known() -> bool:
    """Are this machine's system call numbers in the tables here?"""
    return os.uname().machine in _MACHINES and struct.calcsize("P") == 8


def seccomp(deny_others: bool, deny_forks: bool, deny_attributes: bool) -> None:
    """Denies ``_DENIED``; what reaches other processes; new processes (not threads); attributes of files."""
    if not seccomp_known():
        raise OSError(errno.ENOSYS, f"no system call numbers of {os.uname().machine}")
    column, arch = _MACHINES[os.uname().machine]
    load, jump_equal, jump_above, jump_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | errno.EPERM)
    code = [
        (load, 0, 0, 4), (jump_equal, 1, 0, arch), (give, 0, 0, 0x80000000),
        (load, 0, 0, 0), (jump_above, 0, 1, 0x40000000), refuse,
    ]  # fmt: skip
    names = dict(_DENIED)
    for asked, group in (
        (deny_others, _OTHERS),
        (deny_forks, _FORKS),
        (deny_attributes, _ATTRIBUTES),
    ):
        names |= group if asked else {}
    for numbers in names.values():
        number = numbers[column]
        if number is not None:
            code += [(jump_equal, 0, 1, number), refuse]

    def by_argument(number: int, at: int, values: tuple, found: tuple, else_: tuple) -> None:
        """``found`` if that argument's low word is one of the values."""
        tests = [t for value in values for t in ((jump_equal, 0, 1, value), found)]
        code.extend(
            [(jump_equal, 0, len(tests) + 2, number), (load, 0, 0, 16 + 8 * at), *tests, else_]
        )

    if deny_others:  # signals to itself (raise, abort), its own limits
        by_argument(_TGKILL[column], 0, (os.getpid(),), allow, refuse)
        by_argument(_PRLIMIT[column], 0, (0, os.getpid()), allow, refuse)
        by_argument(_FCNTL[column], 1, _OWN_COMMANDS, refuse, allow)
    if deny_forks:  # clone for threads only; clone3 hides its flags: libc falls back to clone
        code += [(jump_equal, 0, 1, _CLONE3[column]), (give, 0, 0, 0x00050000 | errno.ENOSYS),
                 (jump_equal, 0, 4, _CLONE[column]), (load, 0, 0, 16),
                 (jump_set, 0, 1, 0x10000), allow, refuse]  # fmt: skip
    code.append(allow)
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
    fprog = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
    no_new_privileges()
    _check(_LIBC.prctl(_PR_SET_SECCOMP, 2, fprog, 0, 0), "seccomp")


def tasks_of(uid: int) -> int:
    """How many threads a user runs now, as far as /proc shows them."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def limit(name: str, value: int, hard: int | None = None) -> None:
    """Sets a resource limit, never above the one in force."""
    number = getattr(resource, f"RLIMIT_{name}")
    ceiling = resource.getrlimit(number)[1]
    values = [value, value if hard is None else hard]
    if ceiling != resource.RLIM_INFINITY:
        values = [min(v, ceiling) for v in values]
    resource.setrlimit(number, (values[0], values[1]))
