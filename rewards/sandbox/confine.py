"""Runs inside the sandbox, before the program: gives up every right that the program must not have, then becomes it.

`rewards.sandbox` starts it as `python -c <this text> <settings as JSON>` with the program's text as standard input, in
the program's own folder, under bubblewrap or not. It needs no privilege and installs, each without return:

- resource limits: CPU time, memory, file size, open files, no core dumps, no further process or thread;
- as root: a user of its own without rights (a user number derived from the process number);
- Landlock (Linux 5.13): files can be read only where Python lies, and written only in the program's folder, in which
  no folders, links or devices can be made;
- a seccomp filter: no process, thread, exec, socket, namespace, mount, key, change of mode or owner, no folders, links
  or devices, no way into another process, and none to have the kernel send it a signal, by whatever call (`kill`, a
  file's or socket's owner, a lease, a timer, a queue).

It refuses to start the program unless the filter holds, and either Landlock, or a user of its own, or bubblewrap does.
"""

import ctypes
import json
import os
import resource
import struct
import sys

REFUSED = 125  # exit code: the machine offers too little to confine a program

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
CAP_DAC_READ_SEARCH = 2
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446

# Rights of linux/landlock.h, by bit. Execution is granted nowhere.
READ = 1 << 2 | 1 << 3  # files, folders
READ_WRITE = READ | 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14  # and: write, remove, make regular files, truncate

# System call numbers from arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
# pidfd_send_signal ... clone3, openat2, pidfd_getfd, process_madvise, mount_setattr, memfd_secret, mrelease, fchmodat2
UNIFIED = [424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 435, 437, 438, 440, 442, 447, 448, 452]
FORBIDDEN = {
    "x86_64": {
        "process": [56, 57, 58, 59, 322],  # clone, fork, vfork, execve, execveat
        "signal": [62, 200, 234, 129, 297, 222, 244],  # kill ... rt_tgsigqueueinfo, timer_create, mq_notify
        "other processes": [101, 310, 311, 312, 256, 279, 141, 142, 144, 203, 251, 314],  # ptrace ... sched_setattr
        "network": [41, 42, 49],  # socket, connect, bind
        "folders, links, devices": [83, 258, 133, 259, 86, 265, 88, 266, 319],  # mkdir ... symlinkat, memfd_create
        "memory that outlives": [29, 64, 68, 240, 248, 249, 250],  # shmget, semget, msgget, mq_open, keys
        "namespaces and mounts": [155, 161, 165, 166, 272, 304, 308],
        "kernel": [
            103,
            135,
            154,
            157,
            206,
            298,
            317,
            321,
            323,
        ],  # syslog, personality, modify_ldt, prctl ...
        "mode, owner, times": [90, 91, 92, 93, 94, 132, 188, 189, 190, 235, 260, 261, 268, 280],
    },
    "aarch64": {
        "process": [220, 221, 281],
        "signal": [129, 130, 131, 138, 240, 107, 184],
        "other processes": [117, 270, 271, 272, 238, 239, 140, 118, 119, 122, 30, 274],
        "network": [198, 200, 203],
        "folders, links, devices": [34, 33, 37, 36, 279],
        "memory that outlives": [194, 190, 186, 180, 217, 218, 219],
        "namespaces and mounts": [39, 40, 41, 51, 97, 265, 268],
        "kernel": [116, 92, 167, 0, 241, 277, 280, 282],
        "mode, owner, times": [5, 6, 7, 52, 53, 54, 55, 88],
    },
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Calls that depend on an argument: prlimit on oneself only, and the others as `filter_program` says.
PRLIMIT, FCNTL, IOCTL = ({"x86_64": x, "aarch64": a} for x, a in ((302, 261), (72, 25), (16, 29)))
# Allowed: duplicates, flags of descriptor and file, locks, pipe sizes; not an owner, signal, lease or notice.
FCNTL_ALLOWED = [0, 1, 2, 3, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034]
F_SETFL, O_ASYNC = 4, 0x2000
IOCTL_ALLOWED = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
FIRST_UNKNOWN_CALL = 463  # calls newer than this list, and x86's second table (0x40000000 and up), are refused


def set_limits(settings):
    """Resource limits of this process; the hard limits too, so that they cannot be raised again."""
    for name, value in {
        "RLIMIT_AS": settings["memory_bytes"],
        "RLIMIT_FSIZE": settings["file_bytes"],
        "RLIMIT_NOFILE": settings["open_files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_MSGQUEUE": 0,
    }.items():
        resource.setrlimit(getattr(resource, name, resource.RLIMIT_CORE), (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (settings["cpu_seconds"], settings["cpu_seconds"] + 1))


def leave_root(keep_reading):
    """Become a user without rights; with `keep_reading` it reads past file modes, so far as Landlock lets it."""
    os.setgroups([])  # the first to fail where users cannot be changed, before anything has been
    user = 40000 + os.getpid() % 20000
    os.chown(".", user, user)
    libc.prctl(PR_SET_KEEPCAPS, int(keep_reading), 0, 0, 0)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    kept = 1 << CAP_DAC_READ_SEARCH if keep_reading else 0
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    rights = ctypes.create_string_buffer(struct.pack("6I", kept, kept, 0, 0, 0, 0))
    if libc.capset(header, rights):
        raise OSError(ctypes.get_errno(), "capset")


def landlock_version():
    return max(libc.syscall(SYS_LANDLOCK_CREATE, None, 0, 1), 0)


def restrict_files(readable):
    """Landlock: read below `readable`, read and write in the current folder, nothing else."""
    version = landlock_version()
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    # Version 6 also keeps signals and abstract sockets inside; the fields after the first came with later versions.
    fields = [handled] if version < 4 else [handled, 3] if version < 6 else [handled, 3, 3]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = libc.syscall(SYS_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    rights = dict.fromkeys(readable, READ) | {".": READ_WRITE, "/dev/null": READ_WRITE}
    for path, allowed in rights.items():
        if not os.path.exists(path):
            continue
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed &= handled if os.path.isdir(path) else handled & (1 << 1 | 1 << 2 | 1 << 14)
        if libc.syscall(SYS_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, folder), 0):
            raise OSError(ctypes.get_errno(), "landlock_add_rule")
        os.close(folder)
    if libc.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)


def filter_calls(machine):
    """A seccomp filter that answers EPERM to every forbidden system call; irrevocable."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    call, argument = 0, lambda number: 16 + 8 * number  # offsets in struct seccomp_data; the lower half of an argument

    def only(place, values):
        """Allowed with one of these values as an argument, and refused with another."""
        return [
            (load, 0, 0, argument(place)),
            *[line for value in values for line in ((equal, 0, 1, value), (give, 0, 0, allow))],
            (give, 0, 0, refuse),
        ]

    def without(place, bits):
        return [(load, 0, 0, argument(place)), (any_bit, 0, 1, bits), (give, 0, 0, refuse), (give, 0, 0, allow)]

    set_flags = [(load, 0, 0, argument(1)), (equal, 0, 4, F_SETFL), *without(2, O_ASYNC)]
    rules = [(PRLIMIT[machine], only(0, [0])), (IOCTL[machine], only(1, IOCTL_ALLOWED))]
    rules.append((FCNTL[machine], set_flags + only(1, FCNTL_ALLOWED)))
    forbidden = UNIFIED + sum(FORBIDDEN[machine].values(), [])
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (give, 0, 0, kill), (load, 0, 0, call)]
    program += [(at_least, 0, 1, FIRST_UNKNOWN_CALL), (give, 0, 0, refuse)]
    for number, body in [(number, [(give, 0, 0, refuse)]) for number in forbidden] + rules:
        program += [(equal, 0, len(body), number), *body]
    program.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    if libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def readable_by_all(path):
    while path != os.path.dirname(path):
        if os.stat(path).st_mode & 0o005 != 0o005:
            return False
        path = os.path.dirname(path)
    return True


def confine(settings):
    """Give up rights, and return the names of the layers that hold."""
    layers = ["bubblewrap"] if settings["bubblewrap"] else []
    landlock = landlock_version() > 0
    if os.geteuid() == 0:
        try:
            leave_root(keep_reading=landlock and not readable_by_all(settings["readable"][0]))
            layers.append("own user")
        except PermissionError:  # a container, or bubblewrap's namespace, without the right to change users
            pass
    libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    set_limits(settings)
    layers.append("resource limits")
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if landlock:
        restrict_files(settings["readable"])
        layers.append("landlock")
    machine = os.uname().machine
    if machine in FORBIDDEN and sys.byteorder == "little":
        filter_calls(machine)
        layers.append("seccomp")
    return layers


def main():
    settings = json.loads(sys.argv[1])
    source = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    try:
        layers = confine(settings)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"the sandbox could not be set up: {error}\n")
        sys.exit(REFUSED)
    if "seccomp" not in layers or not {"landlock", "own user", "bubblewrap"} & set(layers):
        sys.stderr.write(f"this machine cannot confine a program, it has only: {', '.join(layers)}\n")
        sys.exit(REFUSED)
    if settings["report"]:
        import fractions  # noqa: F401 - a program can still read Python's own library

        sys.stdout.write(json.dumps(layers))
        return
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


main()
