"""Gives up, in a forked child of the warm parent, every right that a program must not have, each without return.

`Confinement` is made once by the warm parent (`parent.py`), under bubblewrap or not, and entered by each child before
it reads its program. It needs no privilege and installs:

- resource limits: CPU time, memory, file size, open files, no core dumps;
- where mounts can be made (as root, in bubblewrap, or where users may have namespaces): every file system read-only,
  and for each child a folder of its own in memory, of bounded size, which nobody else sees and which ends with it;
- as root: a user of its own without rights (a user number derived from the process number);
- Landlock (Linux 5.13): files can be read only where Python lies, and written only in the folder of its own;
- a seccomp filter: no process, exec, socket, namespace, mount, key, change of mode or owner, no devices, no way into
  another process, and none to have the kernel send it a signal, by whatever call (`kill`, a file's or socket's owner,
  a lease, a timer, a queue). Without a folder of its own a child can make or change no file at all.

It refuses to start the program unless the filter holds, and either Landlock, or a user of its own, or bubblewrap does.
"""

import ctypes
import os
import resource
import struct
import sys
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 22, 38
CAP_DAC_READ_SEARCH = 2
CLONE_NEWNS, CLONE_NEWUSER, CLONE_THREAD = 0x20000, 0x10000000, 0x10000
SYS_MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MS_PRIVATE, MS_NOSUID_NODEV = 442, 0x8000, 1, 1 << 18, 6
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446

# Rights of linux/landlock.h, by bit. Execution is granted nowhere.
READ = 1 << 2 | 1 << 3  # files, folders
OF_FILES = 1 << 1 | 1 << 2 | 1 << 14  # write, read, truncate
# And: remove files and folders, make folders, regular files and symbolic links, rename.
READ_WRITE = READ | OF_FILES | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13

MAX_THREADS = 32  # of a program; where only their sum can be bounded, of as many programs as run at once
MAX_AT_ONCE = 32

# System call numbers from arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
# pidfd_send_signal ... pidfd_open, openat2, pidfd_getfd, process_madvise, mount_setattr ... fchmodat2
UNIFIED = [424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 437, 438, 440, 442, 447, 448, 452]
FORBIDDEN = {
    "x86_64": {
        "process": [57, 58, 59, 322],  # fork, vfork, execve, execveat
        "signal": [62, 200, 234, 129, 297, 222, 244],  # kill ... rt_tgsigqueueinfo, timer_create, mq_notify
        "other processes": [101, 310, 311, 312, 256, 279, 141, 142, 144, 203, 251, 314],  # ptrace ... sched_setattr
        "network": [41, 42, 49],  # socket, connect, bind
        "devices": [133, 259, 319],  # mknod, mknodat, memfd_create
        "memory that outlives": [29, 64, 68, 240, 248, 249, 250],  # shmget, semget, msgget, mq_open, keys
        "namespaces and mounts": [155, 161, 165, 166, 272, 304, 308],
        "kernel": [103, 135, 154, 157, 206, 298, 317, 321, 323],  # syslog, personality, modify_ldt, prctl ...
        "mode, owner, times": [90, 91, 92, 93, 94, 132, 188, 189, 190, 235, 260, 261, 268, 280],
    },
    "aarch64": {
        "process": [221, 281],
        "signal": [129, 130, 131, 138, 240, 107, 184],
        "other processes": [117, 270, 271, 272, 238, 239, 140, 118, 119, 122, 30, 274],
        "network": [198, 200, 203],
        "devices": [33, 279],
        "memory that outlives": [194, 190, 186, 180, 217, 218, 219],
        "namespaces and mounts": [39, 40, 41, 51, 97, 265, 268],
        "kernel": [116, 92, 167, 0, 241, 277, 280, 282],
        "mode, owner, times": [5, 6, 7, 52, 53, 54, 55, 88],
    },
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Calls that depend on an argument: prlimit on oneself only, and the others as `filter_program` says.
PRLIMIT, FCNTL, IOCTL, CLONE = ({"x86_64": x, "aarch64": a} for x, a in ((302, 261), (72, 25), (16, 29), (56, 220)))
CLONE3 = 435  # its flags lie in memory: answered as if it did not exist, so that threads are made by clone
# What changes files, where a program has no folder of its own: creat, mkdir, link, symlink, rename, unlink, truncate.
CHANGES_FILES = {
    "x86_64": [85, 83, 258, 86, 265, 88, 266, 82, 264, 316, 87, 263, 84, 76],
    "aarch64": [34, 37, 36, 38, 276, 35, 45],
}
OPEN = {"x86_64": [(2, 1), (257, 2)], "aarch64": [(56, 2)]}  # open and openat, with the place of their flags
WRITES = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_WRONLY and O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE
# Allowed: duplicates, flags of descriptor and file, locks, pipe sizes; not an owner, signal, lease or notice.
FCNTL_ALLOWED = [0, 1, 2, 3, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034]
F_SETFL, O_ASYNC = 4, 0x2000
IOCTL_ALLOWED = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
FIRST_UNKNOWN_CALL = 463  # calls newer than this list, and x86's second table (0x40000000 and up), are refused


def set_limits(limits: dict[str, Any], num_tasks: int) -> None:
    """Resource limits of this process; the hard limits too, so that they cannot be raised again."""
    for kind, value in {
        resource.RLIMIT_AS: limits["memory_mib"] * 2**20,
        resource.RLIMIT_FSIZE: limits["file_mib"] * 2**20,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: num_tasks,
        resource.RLIMIT_CORE: 0,
        getattr(resource, "RLIMIT_MSGQUEUE", 12): 0,
    }.items():
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))


def set_capabilities(kept: int) -> None:
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    rights = ctypes.create_string_buffer(struct.pack("6I", kept, kept, 0, 0, 0, 0))
    if libc.capset(header, rights):
        raise OSError(ctypes.get_errno(), "capset")


def leave_root(keep_reading: bool) -> bool:
    """Become a user without rights, if this process may; `keep_reading` past file modes is for `set_capabilities`."""
    try:
        os.setgroups([])  # the first to fail where users cannot be changed, before anything has been
    except PermissionError:  # a container, or bubblewrap's namespace, without the right to change users
        return False
    user = 40000 + os.getpid() % 20000
    libc.prctl(PR_SET_KEEPCAPS, int(keep_reading), 0, 0, 0)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    return True


def protect_files(folder: str) -> bool:
    """Make every file system read-only for this process and its children; False where it may not, or Linux is old.

    Each child can then have a folder of its own in memory (`own_folder`).
    """
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS):
        # Root that may not make mounts could do so as root of a namespace, but then not become another user.
        if user == 0 or libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
            return False
        for name, text in ("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1"):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    attributes = struct.pack("4Q", MOUNT_ATTR_RDONLY, 0, MS_PRIVATE, 0)
    if libc.syscall(SYS_MOUNT_SETATTR, -1, b"/", AT_RECURSIVE, attributes, len(attributes)):
        return False
    return own_folder(folder)


def own_folder(folder: str) -> bool:
    """Mount an empty file system in memory, of at most 16 MiB and 1,000 files."""
    options = b"size=16m,nr_inodes=1000,mode=777"
    return libc.mount(b"program", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, options) == 0


def landlock_rules(paths: dict[int, int], version: int) -> int:
    """A Landlock ruleset that allows each path, an open descriptor, its rights, and nothing else."""
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    # Version 6 also keeps signals and abstract sockets inside; the fields after the first came with later versions.
    fields = [handled] if version < 4 else [handled, 3] if version < 6 else [handled, 3, 3]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = libc.syscall(SYS_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for path, allowed in paths.items():
        if libc.syscall(SYS_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed & handled, path), 0):
            raise OSError(ctypes.get_errno(), "landlock_add_rule")
    return int(ruleset)


def filter_program(machine: str, own_files: bool, landlock: bool, threads: bool) -> Any:
    """The seccomp filter, which answers EPERM to every forbidden system call, as the struct that prctl takes."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    call, argument = 0, lambda number: 16 + 8 * number  # offsets in struct seccomp_data; the lower half of an argument
    Lines = list[tuple[int, int, int, int]]

    def only(place: int, values: list[int]) -> Lines:
        """Allowed with one of these values as an argument, and refused with another."""
        return [
            (load, 0, 0, argument(place)),
            *[line for value in values for line in ((equal, 0, 1, value), (give, 0, 0, allow))],
            (give, 0, 0, refuse),
        ]

    def bits(place: int, which: int, with_bits: int, without: int) -> Lines:
        return [(load, 0, 0, argument(place)), (any_bit, 0, 1, which), (give, 0, 0, with_bits), (give, 0, 0, without)]

    set_flags = [(load, 0, 0, argument(1)), (equal, 0, 4, F_SETFL), *bits(2, O_ASYNC, refuse, allow)]
    forbidden = UNIFIED + sum(FORBIDDEN[machine].values(), [])
    rules = [(PRLIMIT[machine], only(0, [0])), (IOCTL[machine], only(1, IOCTL_ALLOWED))]
    rules += [(FCNTL[machine], set_flags + only(1, FCNTL_ALLOWED)), (CLONE3, [(give, 0, 0, absent)])]
    if threads:
        rules.append((CLONE[machine], bits(0, CLONE_THREAD, allow, refuse)))
    else:
        forbidden.append(CLONE[machine])
    if not own_files:
        forbidden += CHANGES_FILES[machine]
        if not landlock:
            rules += [(number, bits(place, WRITES, refuse, allow)) for number, place in OPEN[machine]]
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (give, 0, 0, kill), (load, 0, 0, call)]
    program += [(at_least, 0, 1, FIRST_UNKNOWN_CALL), (give, 0, 0, refuse)]
    for number, body in [(number, [(give, 0, 0, refuse)]) for number in forbidden] + rules:
        program += [(equal, 0, len(body), number), *body]
    program.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    return header, code  # the header points to the code, which must not be freed


def readable_by_all(path: str) -> bool:
    while path != os.path.dirname(path):
        if os.stat(path).st_mode & 0o005 != 0o005:
            return False
        path = os.path.dirname(path)
    return True


class Confinement:
    """What confines the children of this process: prepared once, then entered by each of them."""

    def __init__(self, readable: list[str], bubblewrap: bool) -> None:
        self.bubblewrap, self.parent = bubblewrap, os.getpid()
        folders = [path for path in ("/tmp", "/var/tmp", "/mnt", "/srv") if os.path.isdir(path)]
        self.folder = next((path for path in folders if not any(each.startswith(path) for each in readable)), "/")
        self.own_files = self.folder != "/" and protect_files(self.folder)
        self.own_user_namespace = os.geteuid() != 0 and (bubblewrap or self.own_files)
        # Nobody without rights may look into this process or its children: no /proc/<number>/mem, no ptrace.
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "no_new_privs")
        self.landlock = max(libc.syscall(SYS_LANDLOCK_CREATE, None, 0, 1), 0)
        self.paths = {}
        for path, allowed in (dict.fromkeys(readable, READ) | {"/dev/null": READ_WRITE}).items():
            if os.path.exists(path):
                self.paths[os.open(path, os.O_PATH)] = allowed if os.path.isdir(path) else allowed & OF_FILES
        self.keep_reading = self.landlock > 0 and not readable_by_all(readable[0])
        machine = os.uname().machine
        known = machine in FORBIDDEN and sys.byteorder == "little"
        files = (machine, self.own_files, self.landlock > 0)
        self.filters = {threads: filter_program(*files, threads) for threads in (True, False)} if known else {}

    def enter(self, limits: dict[str, Any]) -> list[str]:
        """Give up rights in this process, and return the names of the layers that hold."""
        layers = ["bubblewrap"] if self.bubblewrap else []
        if self.own_files:
            if libc.unshare(CLONE_NEWNS) or not own_folder(self.folder):
                raise OSError(ctypes.get_errno(), "a folder of its own")
            os.chdir(self.folder)
            layers.append("own files")
        else:
            os.chdir("/")
        is_other_user = os.geteuid() == 0 and leave_root(self.keep_reading)
        set_capabilities(1 << CAP_DAC_READ_SEARCH if is_other_user and self.keep_reading else 0)
        if is_other_user:
            layers.append("own user")
        libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
        if os.getppid() != self.parent:
            os._exit(1)  # it ended before this process asked to end with it
        # Tasks are counted by user: of a user of one's own, or of one that is counted anew in a namespace. Root's and
        # those of the trainer's user are not, so threads are refused there.
        num_tasks = MAX_THREADS if is_other_user else MAX_AT_ONCE * MAX_THREADS if self.own_user_namespace else 0
        set_limits(limits, num_tasks)
        layers.append("resource limits")
        if self.landlock:
            own = {os.open(".", os.O_PATH): READ_WRITE} if self.own_files else {}
            ruleset = landlock_rules(self.paths | own, self.landlock)
            if libc.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0):
                raise OSError(ctypes.get_errno(), "landlock_restrict_self")
            for fd in [ruleset, *own]:
                os.close(fd)
            layers.append("landlock")
        if self.filters:
            if libc.prctl(PR_SET_SECCOMP, 2, self.filters[num_tasks > 0][0], 0, 0):
                raise OSError(ctypes.get_errno(), "seccomp")
            layers.append("seccomp")
        if "seccomp" not in layers or not {"landlock", "own user", "bubblewrap"} & set(layers):
            raise OSError(f"this machine cannot confine a program, it has only: {', '.join(layers)}")
        return layers
