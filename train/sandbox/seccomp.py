"""A seccomp filter: system calls that no program under test needs and that make the kernel's surface large.

Namespaces hide what is outside; the filter closes what they leave open: sockets of families without namespaces (vsock,
netlink, crypto), tracing of other processes, new namespaces, key rings, BPF, io_uring, and memory that no limit counts
(memfd, System V shared memory). The format is classic BPF over `struct seccomp_data` (seccomp(2), linux/filter.h).
"""

import errno
import platform
import struct
from typing import Any

from qwen_jax.errors import InputError

# Instruction codes of classic BPF: load a word; jump if equal, greater or equal, or if any bit is set; return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
# Offsets in struct seccomp_data: system call, architecture, low half of the first argument (little endian).
_NR, _ARCH, _ARG0 = 0, 4, 16
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET. (NEWTIME is for clone3 and unshare only.)
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
# Above all families that have a number.
_AF_LAST = 64

# Machine -> (AUDIT_ARCH, column of the numbers below).
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# Name -> numbers on x86_64 and aarch64 (None: does not exist there), error.
_DENIED: dict[str, tuple[int | None, int | None, int]] = {
    "ptrace": (101, 117, errno.EPERM),
    "process_vm_readv": (310, 270, errno.EPERM),
    "process_vm_writev": (311, 271, errno.EPERM),
    "process_madvise": (440, 440, errno.EPERM),
    "pidfd_getfd": (438, 438, errno.EPERM),
    "kcmp": (312, 272, errno.EPERM),
    "unshare": (272, 97, errno.EPERM),
    "setns": (308, 268, errno.EPERM),
    "mount": (165, 40, errno.EPERM),
    "umount2": (166, 39, errno.EPERM),
    "pivot_root": (155, 41, errno.EPERM),
    "chroot": (161, 51, errno.EPERM),
    "move_mount": (429, 429, errno.EPERM),
    "open_tree": (428, 428, errno.EPERM),
    "fsopen": (430, 430, errno.EPERM),
    "fsconfig": (431, 431, errno.EPERM),
    "fsmount": (432, 432, errno.EPERM),
    "fspick": (433, 433, errno.EPERM),
    "mount_setattr": (442, 442, errno.EPERM),
    "name_to_handle_at": (303, 264, errno.EPERM),
    "open_by_handle_at": (304, 265, errno.EPERM),
    "fanotify_init": (300, 262, errno.EPERM),
    "bpf": (321, 280, errno.EPERM),
    "perf_event_open": (298, 241, errno.EPERM),
    "userfaultfd": (323, 282, errno.EPERM),
    "io_uring_setup": (425, 425, errno.ENOSYS),
    "io_uring_enter": (426, 426, errno.ENOSYS),
    "io_uring_register": (427, 427, errno.ENOSYS),
    "add_key": (248, 217, errno.EPERM),
    "request_key": (249, 218, errno.EPERM),
    "keyctl": (250, 219, errno.EPERM),
    "kexec_load": (246, 104, errno.EPERM),
    "kexec_file_load": (320, 294, errno.EPERM),
    "init_module": (175, 105, errno.EPERM),
    "finit_module": (313, 273, errno.EPERM),
    "delete_module": (176, 106, errno.EPERM),
    "syslog": (103, 116, errno.EPERM),
    "quotactl": (179, 60, errno.EPERM),
    "acct": (163, 89, errno.EPERM),
    "swapon": (167, 224, errno.EPERM),
    "swapoff": (168, 225, errno.EPERM),
    "reboot": (169, 142, errno.EPERM),
    "settimeofday": (164, 170, errno.EPERM),
    "clock_settime": (227, 112, errno.EPERM),
    "clock_adjtime": (305, 266, errno.EPERM),
    "adjtimex": (159, 171, errno.EPERM),
    "sethostname": (170, 161, errno.EPERM),
    "setdomainname": (171, 162, errno.EPERM),
    "iopl": (172, None, errno.EPERM),
    "ioperm": (173, None, errno.EPERM),
    "modify_ldt": (154, None, errno.EPERM),
    "vhangup": (153, 58, errno.EPERM),
    # Memory that neither an address space nor a resident size counts once it is unmapped.
    "memfd_create": (319, 279, errno.ENOSYS),
    "memfd_secret": (447, 447, errno.ENOSYS),
    "shmget": (29, 194, errno.ENOSYS),
    "msgget": (68, 186, errno.ENOSYS),
    "semget": (64, 190, errno.ENOSYS),
    # Its flags are in memory, where a filter cannot look. The C library then uses clone.
    "clone3": (435, 435, errno.ENOSYS),
}
_CLONE, _SOCKET = (56, 220), (41, 198)
# Bit of the numbers of the x32 calls, a second set on x86_64.
_X32 = 0x40000000


def machine() -> str:
    """The machine's architecture. Raises InputError where the filter has no table of system calls."""
    name = platform.machine()
    if name not in _MACHINES:
        raise InputError(
            f"The sandbox filters system calls on {', '.join(_MACHINES)}, not on {name}. Add the numbers of its system "
            "calls to train/sandbox/seccomp.py, or use another runner."
        )
    return name


def filter_bytes(name: str) -> bytes:
    """The filter as an array of `struct sock_filter`, as `bwrap --seccomp` reads it.

    Args:
      name: architecture, "x86_64" or "aarch64". Calls of any other one kill the process.
    """
    architecture, column = _MACHINES[name]
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL_PROCESS), (_LOAD, 0, 0, _NR)]
    if name == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for first, second, error in _DENIED.values():
        number = (first, second)[column]
        if number is not None:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
    program += [
        # clone without new namespaces.
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _ARG0),
        (_ANY_BIT, 0, 6, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        # socket only of the families that the network namespace confines.
        (_EQUAL, 0, 4, _SOCKET[column]),
        (_LOAD, 0, 0, _ARG0),
        (_EQUAL, 2, 0, _AF_UNIX),
        (_EQUAL, 1, 0, _AF_INET),
        (_EQUAL, 0, 1, _AF_INET6),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def filter_of_oci(name: str) -> dict[str, Any]:
    """The same filter as `linux.seccomp` of the OCI runtime specification, by the names of system calls.

    Args:
      name: architecture, as for `filter_bytes`.
    """

    def rule(names: list[str], error: int, *args: dict[str, Any]) -> dict[str, Any]:
        return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": error, "args": list(args)}

    def first(operator: str, value: int, other: int = 0) -> dict[str, Any]:
        return {"index": 0, "value": value, "valueTwo": other, "op": f"SCMP_CMP_{operator}"}

    errors = {error for *_, error in _DENIED.values()}
    rules = [rule([call for call, (*_, own) in _DENIED.items() if own == error], error) for error in sorted(errors)]
    # A rule may look at an argument once: new namespaces bit by bit, and each family that is not allowed.
    bits = [1 << bit for bit in range(32) if _NEW_NAMESPACES >> bit & 1]
    rules += [rule(["clone"], errno.EPERM, first("MASKED_EQ", bit, bit)) for bit in bits]
    others = [family for family in range(_AF_LAST) if family not in (_AF_UNIX, _AF_INET, _AF_INET6)]
    rules += [rule(["socket"], errno.EAFNOSUPPORT, first("EQ", family)) for family in others]
    rules.append(rule(["socket"], errno.EAFNOSUPPORT, first("GE", _AF_LAST)))
    architecture = f"SCMP_ARCH_{name.upper()}"
    return {"defaultAction": "SCMP_ACT_ALLOW", "architectures": [architecture], "syscalls": rules}
