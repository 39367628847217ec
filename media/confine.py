"""
A process gives up what decoding does not need: network, files, other processes, secrets, memory.

Called once, when everything is imported and before the first foreign byte is read. The limits on
descriptors, files and memory hold on every Unix. On Linux the kernel also ends the process with its
parent, and a filter leaves it the few system calls that computing takes; what else it asks for is
refused (EPERM), so that code of an attacker can neither reach a host nor touch a file or a process.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1

# By machine: its word for the kernel's audit, `seccomp`, and the calls that are left.
# Sources: linux/arch/x86/entry/syscalls/syscall_64.tbl and linux/include/uapi/asm-generic/unistd.h.
_X86_64: Final = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "nanosleep": 35, "getitimer": 36, "setitimer": 38, "getpid": 39,
    "exit": 60, "gettimeofday": 96, "getrusage": 98, "times": 100, "getppid": 110,
    "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204,
    "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "set_robust_list": 273, "getrandom": 318, "membarrier": 324, "rseq": 334,
}  # fmt: skip
_AARCH64: Final = {
    "close": 57, "lseek": 62, "read": 63, "write": 64, "pread64": 67, "ppoll": 73,
    "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99,
    "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113,
    "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
    "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
    "rt_sigreturn": 139, "times": 153, "getrusage": 165, "gettimeofday": 169, "getpid": 172,
    "getppid": 173, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "madvise": 233,
    "getrandom": 278, "membarrier": 283, "rseq": 293,
}  # fmt: skip
# Calls whose arguments are looked at: mmap, mprotect, clone, clone3, tgkill, prlimit64.
_MACHINES: Final = {
    "x86_64": (0xC000003E, 317, _X86_64, (9, 10, 56, 435, 234, 302)),
    "aarch64": (0xC00000B7, 277, _AARCH64, (222, 226, 220, 435, 131, 261)),
}


def die_with_parent(parent: int) -> None:
    """End when the thread that started this process ends; at once if it has."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def confine(max_bytes: int | None) -> bool:
    """
    Give up everything but computing on what is mapped and open.

    Args:
        max_bytes: of address space, for good; `lower_memory` moves within it. None: nobody knows how
            much there is already.

    Returns:
        Whether the kernel's filter is on, besides the limits.
    """
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        resource.setrlimit(what, (0, 0))  # what is open stays open; nothing can be opened
    if max_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    return sys.platform == "linux" and _filter_calls()


def lower_memory(max_bytes: int) -> None:
    """Bound the address space until the next call, at most by what `confine` left."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (min(max_bytes, most), most))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW: Final = 0x7FFF0000
_REFUSE: Final = 0x00050000  # and the error number
_NUMBER, _MACHINE, _FIRST, _SECOND, _THIRD = 0, 4, 16, 24, 32  # offsets in struct seccomp_data
_PROT_EXEC: Final = 4
_CLONE_THREAD: Final = 0x10000


def _filter_calls() -> bool:
    if platform.machine() not in _MACHINES:
        return False
    program = _build_program(*_MACHINES[platform.machine()])
    filled = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: how many instructions of 8 bytes, and where they are.
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(filled))
    seccomp = _MACHINES[platform.machine()][1]
    libc = _libc()
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    failed: int = libc.syscall(
        seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, header
    )
    return failed == 0


def _build_program(
    audit: int, _: int, plain: dict[str, int], looked_at: tuple[int, int, int, int, int, int]
) -> bytes:
    """The filter, in the kernel's classic BPF: each rule returns by itself, so no jump is long."""
    refuse, unknown = _REFUSE | errno.EPERM, _REFUSE | errno.ENOSYS
    mmap, mprotect, clone, clone3, tgkill, prlimit64 = looked_at
    code = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, refuse),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # x86's second table of the same calls
        (_RETURN, 0, 0, refuse),
    ]
    for number in sorted(plain.values()):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    # Memory that can be run would be an attacker's; threads are libwebp's; a process may abort itself.
    for number in (mmap, mprotect):
        code += _rule(number, (_THIRD, _ANY_BIT, _PROT_EXEC), if_so=refuse, if_not=_ALLOW)
    code += _rule(clone, (_FIRST, _ANY_BIT, _CLONE_THREAD), if_so=_ALLOW, if_not=refuse)
    code += [(_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, unknown)]  # glibc goes on with clone
    code += _rule(tgkill, (_FIRST, _EQUAL, os.getpid()), if_so=_ALLOW, if_not=refuse)
    code += [
        (_EQUAL, 0, 6, prlimit64),  # only its own, and only memory
        (_LOAD, 0, 0, _FIRST),
        (_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, _SECOND),
        (_EQUAL, 0, 1, resource.RLIMIT_AS),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, refuse),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


Instruction = tuple[int, int, int, int]


def _rule(
    number: int, question: tuple[int, int, int], *, if_so: int, if_not: int
) -> list[Instruction]:
    """Judge one call by an argument."""
    offset, comparison, value = question
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, offset),
        (comparison, 0, 1, value),
        (_RETURN, 0, 0, if_so),
        (_RETURN, 0, 0, if_not),
    ]
