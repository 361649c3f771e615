"""What a file system does, in lines that must be the same on any: run in a directory of its own."""
import errno, fcntl, os, stat, sys

os.chdir(sys.argv[1])
SEED, ROUNDS = 20240, int(sys.argv[2])


def tell(what, act):
    try:
        print(what, act())
    except OSError as error:
        print(what, errno.errorcode[error.errno])


def make(name, data=b""):
    with open(name, "wb") as file:
        file.write(data)


def read(name):
    with open(name, "rb") as file:
        return file.read()


def names():
    os.makedirs("names")
    all_bytes = bytes(b for b in range(1, 256) if b != ord("/"))
    made = [b"n" * 255, all_bytes[:200], all_bytes[200:], b" ", b"\n", b"...", b"-rf"]
    for name in made:
        make(b"names/" + name, name)
    listed = sorted(os.listdir(b"names"))
    tell("names", lambda: listed == sorted(made) and all(read(b"names/" + name) == name for name in made))
    tell("too long", lambda: make(b"names/" + b"n" * 256))


def many():
    os.makedirs("many")
    for number in range(2000):
        os.close(os.open("many/%d" % number, os.O_CREAT | os.O_EXCL))
    tell("many", lambda: len(os.listdir("many")))
    for number in range(0, 2000, 2):
        os.unlink("many/%d" % number)
    tell("fewer", lambda: len(os.listdir("many")))


def links():
    make("a", b"one")
    os.link("a", "b")
    with open("b", "ab") as file:
        file.write(b" two")
    os.symlink("a", "s")
    os.symlink("/etc/hostname", "out")
    os.symlink("../../../../../../etc/hostname", "up")
    tell("links", lambda: (os.stat("a").st_nlink, read("a"), read("s"), os.stat("a").st_ino == os.stat("b").st_ino))
    tell("no follow", lambda: os.open("s", os.O_NOFOLLOW))
    own = read("/etc/hostname")
    tell("out is the container's", lambda: read("out") == own and read("up") == own)
    tell("link to a directory", lambda: os.link(".", "d"))
    os.unlink("a")
    tell("unlinked", lambda: (os.stat("b").st_nlink, os.path.exists("s"), os.path.lexists("s")))


def renames():
    os.makedirs("r/full/x")
    os.makedirs("r/empty")
    os.makedirs("r/dir")
    make("r/file", b"file")
    make("r/other", b"other")
    held = open("r/other", "rb")
    tell("over a file", lambda: os.rename("r/file", "r/other"))
    tell("the old one is held", lambda: held.read())
    tell("over an empty directory", lambda: os.rename("r/dir", "r/empty"))
    tell("over a full directory", lambda: os.rename("r/empty", "r/full"))
    tell("file over directory", lambda: os.rename("r/other", "r/full"))
    tell("directory over file", lambda: os.rename("r/full", "r/other"))
    tell("into itself", lambda: os.rename("r/full", "r/full/x/y"))
    tell("rmdir full", lambda: os.rmdir("r/full"))
    tell("unlink directory", lambda: os.unlink("r/full"))
    held_dir = os.open("r/empty", os.O_RDONLY)
    os.rmdir("r/empty")
    tell("in a removed directory", lambda: os.open("x", os.O_CREAT | os.O_RDWR, dir_fd=held_dir))


def attributes():
    make("m", b"x")
    for mode in (0, 0o777, 0o4755, 0o2750, 0o1777):
        os.chmod("m", mode)
        tell("mode", lambda: oct(stat.S_IMODE(os.stat("m").st_mode)))
    os.chown("m", 1234, 5678)
    tell("owner", lambda: (os.stat("m").st_uid, os.stat("m").st_gid))
    os.utime("m", ns=(1_000_000_001, 2_000_000_002))
    tell("times", lambda: (os.stat("m").st_atime_ns, os.stat("m").st_mtime_ns))
    tell("set", lambda: os.setxattr("m", "user.k", b"v" * 100))
    tell("create", lambda: os.setxattr("m", "user.k", b"w", os.XATTR_CREATE))
    tell("get", lambda: (os.getxattr("m", "user.k") == b"v" * 100, [n for n in os.listxattr("m") if n.startswith("user.")]))
    tell("remove", lambda: os.removexattr("m", "user.k"))
    tell("gone", lambda: os.getxattr("m", "user.k"))


def contents():
    with open("sparse", "wb") as file:
        file.seek(10 << 20)
        file.write(b"end")
    tell("sparse", lambda: (os.stat("sparse").st_size, os.stat("sparse").st_blocks < 1024))
    file = os.open("sparse", os.O_RDWR)
    tell("hole", lambda: os.pread(file, 4, 1 << 20))
    tell("allocate", lambda: os.posix_fallocate(file, 11 << 20, 4096))
    os.ftruncate(file, 5)
    tell("cut", lambda: (os.fstat(file).st_size, os.pread(file, 100, 0)))
    os.close(file)
    file = os.open("mapped", os.O_CREAT | os.O_RDWR)
    os.ftruncate(file, 8192)
    os.pwrite(file, b"back", 0)
    direct = "dd if=mapped of=direct bs=4096 iflag=direct oflag=direct 2>/dev/null && cmp mapped direct"
    tell("direct", lambda: os.system(direct))
    append = os.open("mapped", os.O_WRONLY | os.O_APPEND)
    os.write(append, b"x")
    tell("appended", lambda: os.fstat(file).st_size)
    os.unlink("mapped")
    tell("after unlink", lambda: (os.pread(file, 4, 0), os.fstat(file).st_nlink))


def locks():
    file = open("lock", "w")

    def child(act):
        pid = os.fork()
        if pid == 0:
            try:
                with open("lock", "r+") as again:
                    act(again)
                os._exit(0)
            except OSError as error:
                os._exit(error.errno)
        return errno.errorcode.get(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "got it")

    for name, lock in (("flock", fcntl.flock), ("lockf", fcntl.lockf)):
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tell(name, lambda: child(lambda again: lock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)))
        lock(file, fcntl.LOCK_UN)
        tell(name, lambda: child(lambda again: lock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)))


def special():
    os.mkfifo("fifo")
    tell("fifo", lambda: stat.S_ISFIFO(os.stat("fifo").st_mode))
    pid = os.fork()
    if pid == 0:
        with open("fifo", "w") as end:
            end.write("through")
        os._exit(0)
    tell("through", lambda: open("fifo").read())
    os.waitpid(pid, 0)
    tell("block device", lambda: os.mknod("disk", stat.S_IFBLK | 0o666, os.makedev(254, 0)) or os.open("disk", os.O_RDONLY))
    tell("memory", lambda: os.mknod("mem", stat.S_IFCHR | 0o666, os.makedev(1, 1)) or os.open("mem", os.O_RDONLY))


def random_operations():
    """Like fsx: one file, any operation at any place, compared with what it must be."""
    state = SEED

    def below(limit):
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (state >> 33) % limit

    kinds = ("write", "write", "read", "read", "truncate", "reopen", "append", "fallocate", "copy")
    model = bytearray()
    file = os.open("fsx", os.O_CREAT | os.O_RDWR)
    for number in range(ROUNDS):
        kind = kinds[below(len(kinds))]
        at, length = below(1 << 17), 1 + below(1 << 14)
        data = bytes([below(256)]) * length
        if kind == "write":
            model.extend(bytes(max(0, at + length - len(model))))
            model[at : at + length] = data
            os.pwrite(file, data, at)
        elif kind == "append":
            os.pwrite(file, data, len(model))
            model.extend(data)
        elif kind == "truncate":
            model = bytearray(model[:at].ljust(at, b"\0"))
            os.ftruncate(file, at)
        elif kind == "fallocate":
            os.posix_fallocate(file, at, length)
            model.extend(bytes(max(0, at + length - len(model))))
        elif kind == "copy" and length <= len(model) <= at:
            os.copy_file_range(file, file, length, 0, at)
            model.extend(bytes(at - len(model)))
            model.extend(model[:length])
        elif kind == "reopen":
            os.fsync(file)
            os.close(file)
            file = os.open("fsx", os.O_RDWR)
        elif os.pread(file, length, at) != bytes(model[at : at + length]):
            return "operation %d reads something else" % number
        if os.fstat(file).st_size != len(model):
            return "operation %d (%s) leaves another size" % (number, kind)
    return os.pread(file, len(model) + 1, 0) == bytes(model)


for part in (names, many, links, renames, attributes, contents, locks, special):
    part()
tell("random", random_operations)
