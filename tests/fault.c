/* An LD_PRELOAD shim that counts, kills at, refuses or records the calls that change a folder on disk.
 *
 * tests/faults.py compiles it, arms it through the fault_* functions at the end, and reads its log.
 * A call counts when it concerns a path under the armed root, links resolved. Not seen: stores through
 * mmap, calls that libc makes inside itself (fopen and fwrite), and changes of mode, owner or time.
 */
#undef _FORTIFY_SOURCE /* its inline wrappers would stand where ours must */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* The same numbers are Kind and Call in faults.py. */
enum { OFF = -1, COUNT, KILL, ENOSPC_ONCE, EIO_ONCE, FULL, DEAD, TRACE, NO_LOCKS };
enum { FAILED, WRITE, TRUNCATE, CREATE, SYNC, RENAME, LINK, SYMLINK, UNLINK, MKDIR };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static volatile int kind = OFF;
static long at, count;
static char root[PATH_MAX];
static int log_fd = -1;

/* What the call at hand concerns, resolved; each thread has its own. */
static __thread char one[PATH_MAX], two[PATH_MAX];

/* The function that stands behind ours. */
#define NEXT(name)                                                                                          \
    ({                                                                                                      \
        static __typeof__(&name) next;                                                                      \
        if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name);                                       \
        next;                                                                                               \
    })

/* Which path? */

static int inside(const char *path) {
    size_t length = strlen(root);
    return !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int of_fd(int fd, char *out) {
    char proc[64];
    if (kind == OFF) return 0;
    snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(proc, out, PATH_MAX - 1);
    out[length < 0 ? 0 : length] = 0;
    return length > 0 && inside(out);
}

/* `follow` resolves a link that the last name may be, as open does; rename and unlink mean the link. */
static int of_path(int dir, const char *path, int follow, char *out) {
    char whole[PATH_MAX + 64];
    if (kind == OFF) return 0;
    if (*path == '/') snprintf(whole, sizeof whole, "%s", path);
    else if (dir == AT_FDCWD) snprintf(whole, sizeof whole, "./%s", path);
    else snprintf(whole, sizeof whole, "/proc/self/fd/%d/%s", dir, path);
    if (follow) return realpath(whole, out) && inside(out);
    for (size_t end = strlen(whole); end > 1 && whole[end - 1] == '/'; end--) whole[end - 1] = 0;
    char *name = strrchr(whole, '/');
    *name++ = 0;
    if (!realpath(*whole ? whole : "/", out)) return 0;
    size_t used = strlen(out);
    snprintf(out + used, PATH_MAX - used, "/%s", name);
    return inside(out);
}

/* What becomes of it? Both are called with the lock held. */

static int verdict(int needs_space) {
    long number = ++count;
    if (at < 1 || number < at) return 0;
    if (kind == KILL) kill(getpid(), SIGKILL);
    if (kind == FULL) return needs_space ? ENOSPC : 0;
    if (kind == DEAD) return EIO;
    return number > at ? 0 : kind == ENOSPC_ONCE ? ENOSPC : kind == EIO_ONCE ? EIO : 0;
}

static void emit(const void *data, size_t size) {
    for (const char *next = data; size;) {
        ssize_t written = NEXT(write)(log_fd, next, size);
        if (written < 0) abort(); /* a trace with a hole in it would prove nothing */
        next += written, size -= written;
    }
}

static const char *relative(const char *path) {
    if (!inside(path)) return path; /* absolute: the other end of a move out of the root or into it */
    path += strlen(root);
    return path + (*path == '/');
}

/* A record: op, lengths of both paths and of the data, offset, length; the paths; the data. */
static void note(int op, const char *from, const char *to, int64_t offset, int64_t length,
                 const struct iovec *data) {
    from = relative(from), to = to ? relative(to) : "";
    uint32_t sizes[4] = {op, strlen(from), strlen(to), data ? length : 0};
    int64_t place[2] = {offset, length};
    emit(sizes, sizeof sizes), emit(place, sizeof place);
    emit(from, sizes[1]), emit(to, sizes[2]);
    for (size_t left = sizes[3]; left; data++) { /* a write may have been shorter than it was asked to be */
        size_t part = data->iov_len < left ? data->iov_len : left;
        emit(data->iov_base, part);
        left -= part;
    }
}

static void note_name(int op) { note(op, one, NULL, 0, 0, NULL); }

/* Of the open file itself where the path is empty. */
static int64_t size_of(int fd, const char *path) {
    struct stat now;
    return fstatat(fd, path, &now, AT_EMPTY_PATH) ? 0 : now.st_size;
}

/* Where `done` bytes went: to the file's position if no offset is given, to the end of one that appends. */
static void note_write(int fd, int64_t offset, ssize_t done, const struct iovec *data) {
    if (fcntl(fd, F_GETFL) & O_APPEND) offset = size_of(fd, "") - done;
    else if (offset < 0) offset = lseek(fd, 0, SEEK_CUR) - done;
    note(WRITE, one, NULL, offset, done, data);
}

/* A function of libc, with ours around it. The lock makes the log's order that of the calls. */
#define GUARD(counted, needs_space, call, record)                                                           \
    do {                                                                                                    \
        if (!(counted)) return call;                                                                        \
        pthread_mutex_lock(&lock);                                                                          \
        __typeof__(call) result = -1;                                                                       \
        int error = verdict(needs_space);                                                                   \
        if (error) errno = error;                                                                           \
        else result = call;                                                                                 \
        error = errno;                                                                                      \
        if (kind == TRACE && result < 0) note_name(FAILED);                                                 \
        else if (kind == TRACE) record;                                                                     \
        pthread_mutex_unlock(&lock);                                                                        \
        errno = error;                                                                                      \
        return result;                                                                                      \
    } while (0)
#define AROUND(type, name, parameters, counted, needs_space, record, ...)                                   \
    type name parameters { GUARD(counted, needs_space, NEXT(name)(__VA_ARGS__), record); }

/* Data. On 64 bits each name with 64 in it is the same function again. */

#define WRITES(name, parameters, offset, parts, ...)                                                        \
    AROUND(ssize_t, name, parameters, of_fd(fd, one), 1, note_write(fd, offset, result, parts), __VA_ARGS__)
#define DATA &(struct iovec){(void *)data, n}
WRITES(write, (int fd, const void *data, size_t n), -1, DATA, fd, data, n)
WRITES(pwrite, (int fd, const void *data, size_t n, off_t at), at, DATA, fd, data, n, at)
WRITES(pwrite64, (int fd, const void *data, size_t n, off_t at), at, DATA, fd, data, n, at)
WRITES(writev, (int fd, const struct iovec *v, int n), -1, v, fd, v, n)
WRITES(pwritev, (int fd, const struct iovec *v, int n, off_t at), at, v, fd, v, n, at)
WRITES(pwritev64, (int fd, const struct iovec *v, int n, off_t at), at, v, fd, v, n, at)
WRITES(pwritev2, (int fd, const struct iovec *v, int n, off_t at, int how), at, v, fd, v, n, at, how)
WRITES(pwritev64v2, (int fd, const struct iovec *v, int n, off_t at, int how), at, v, fd, v, n, at, how)

/* The bytes that went from file to file are read again where they came from: opening the target once more,
 * and closing it, would drop the locks that SQLite holds on it. */
static char copied[1 << 20];
static void note_copy(int in, off_t from, int fd, off_t to, ssize_t done) {
    if (pread(in, copied, done, from) != done) abort();
    note_write(fd, to, done, &(struct iovec){copied, done});
}
#define POSITION(in, given) ((given) ? *(given) : lseek(in, 0, SEEK_CUR))
#define FEWER(n) (kind == TRACE && (n) > sizeof copied ? sizeof copied : (n))
#define SENDFILE(name)                                                                                      \
    ssize_t name(int fd, int in, off_t *at, size_t n) {                                                     \
        off_t from = POSITION(in, at);                                                                      \
        GUARD(of_fd(fd, one), 1, NEXT(name)(fd, in, at, FEWER(n)), note_copy(in, from, fd, -1, result));    \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)
ssize_t copy_file_range(int in, off64_t *at, int fd, off64_t *place, size_t n, unsigned flags) {
    off_t from = POSITION(in, at), to = place ? *place : -1;
    GUARD(of_fd(fd, one), 1, NEXT(copy_file_range)(in, at, fd, place, FEWER(n), flags),
          note_copy(in, from, fd, to, result));
}

AROUND(int, fsync, (int fd), of_fd(fd, one), 0, note_name(SYNC), fd)
AROUND(int, fdatasync, (int fd), of_fd(fd, one), 0, note_name(SYNC), fd)

#define NOTE_SIZE(fd, path) note(TRUNCATE, one, NULL, 0, size_of(fd, path), NULL)
AROUND(int, ftruncate, (int fd, off_t n), of_fd(fd, one), n > size_of(fd, ""), NOTE_SIZE(fd, ""), fd, n)
AROUND(int, ftruncate64, (int fd, off_t n), of_fd(fd, one), n > size_of(fd, ""), NOTE_SIZE(fd, ""), fd, n)
AROUND(int, truncate, (const char *path, off_t n), of_path(AT_FDCWD, path, 1, one),
       n > size_of(AT_FDCWD, path), NOTE_SIZE(AT_FDCWD, path), path, n)
AROUND(int, truncate64, (const char *path, off_t n), of_path(AT_FDCWD, path, 1, one),
       n > size_of(AT_FDCWD, path), NOTE_SIZE(AT_FDCWD, path), path, n)
/* Holes that fallocate punches are not recorded, only the size that it leaves. */
AROUND(int, fallocate, (int fd, int how, off_t at, off_t n), of_fd(fd, one), 1,
       NOTE_SIZE(fd, ""), fd, how, at, n)
AROUND(int, fallocate64, (int fd, int how, off_t at, off_t n), of_fd(fd, one), 1,
       NOTE_SIZE(fd, ""), fd, how, at, n)
#define POSIX_FALLOCATE(name) /* it returns the error */                                                    \
    static int guarded_##name(int fd, off_t at, off_t n) {                                                  \
        GUARD(of_fd(fd, one), 1, (errno = NEXT(name)(fd, at, n)) ? -1 : 0, NOTE_SIZE(fd, ""));              \
    }                                                                                                       \
    int name(int fd, off_t at, off_t n) { return guarded_##name(fd, at, n) ? errno : 0; }
POSIX_FALLOCATE(posix_fallocate)
POSIX_FALLOCATE(posix_fallocate64)

/* Names. */

/* CREATE, TRUNCATE, or 0 where opening changes nothing. */
static int opens(int dir, const char *path, int flags) {
    struct stat now;
    if (kind == OFF || !(flags & (O_CREAT | O_TRUNC))) return 0;
    if (fstatat(dir, path, &now, 0)) return (flags & O_CREAT) && of_path(dir, path, 0, one) ? CREATE : 0;
    if (!(flags & O_TRUNC) || ((flags & O_CREAT) && (flags & O_EXCL))) return 0;
    return of_path(dir, path, 1, one) ? TRUNCATE : 0;
}
#define OPEN(name, dir, parameters, ...)                                                                    \
    int name parameters {                                                                                   \
        va_list rest;                                                                                       \
        va_start(rest, flags);                                                                              \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                             \
        va_end(rest);                                                                                       \
        int op = opens(dir, path, flags);                                                                   \
        GUARD(op, op == CREATE, NEXT(name)(__VA_ARGS__, mode), note_name(op));                              \
    }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN(openat, dir, (int dir, const char *path, int flags, ...), dir, path, flags)
OPEN(openat64, dir, (int dir, const char *path, int flags, ...), dir, path, flags)
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define NAMED(op, space, dir, name, parameters, ...)                                                        \
    AROUND(int, name, parameters, of_path(dir, path, 0, one), space, note_name(op), __VA_ARGS__)
NAMED(UNLINK, 0, AT_FDCWD, unlink, (const char *path), path)
NAMED(UNLINK, 0, AT_FDCWD, rmdir, (const char *path), path)
NAMED(UNLINK, 0, dir, unlinkat, (int dir, const char *path, int flags), dir, path, flags)
NAMED(MKDIR, 1, AT_FDCWD, mkdir, (const char *path, mode_t mode), path, mode)
NAMED(MKDIR, 1, dir, mkdirat, (int dir, const char *path, mode_t mode), dir, path, mode)

/* A link's text is its data. */
#define NOTE_TEXT note(SYMLINK, one, NULL, 0, strlen(text), &(struct iovec){(void *)text, strlen(text)})
AROUND(int, symlink, (const char *text, const char *path), of_path(AT_FDCWD, path, 0, one), 1,
       NOTE_TEXT, text, path)
AROUND(int, symlinkat, (const char *text, int dir, const char *path), of_path(dir, path, 0, one), 1,
       NOTE_TEXT, text, dir, path)

/* Of two names either may be outside the root. An exchange by renameat2 is recorded as a plain rename. */
#define TWO(op, space, from, to, name, parameters, ...)                                                     \
    AROUND(int, name, parameters, of_path(from, old, 0, one) | of_path(to, new, 0, two), space,             \
           note(op, one, two, 0, 0, NULL), __VA_ARGS__)
#define AT int from, const char *old, int to, const char *new
TWO(RENAME, 0, AT_FDCWD, AT_FDCWD, rename, (const char *old, const char *new), old, new)
TWO(RENAME, 0, from, to, renameat, (AT), from, old, to, new)
TWO(RENAME, 0, from, to, renameat2, (AT, unsigned how), from, old, to, new, how)
TWO(LINK, 1, AT_FDCWD, AT_FDCWD, link, (const char *old, const char *new), old, new)
TWO(LINK, 1, from, to, linkat, (AT, int how), from, old, to, new, how)

/* Locks change nothing on the disk and are not counted. */

static int no_locks(int fd) { return kind == NO_LOCKS && of_fd(fd, one); }
int flock(int fd, int how) {
    if (!no_locks(fd)) return NEXT(flock)(fd, how);
    errno = ENOLCK;
    return -1;
}
#define FCNTL(name)                                                                                         \
    int name(int fd, int command, ...) {                                                                    \
        va_list rest;                                                                                       \
        va_start(rest, command);                                                                            \
        void *argument = va_arg(rest, void *);                                                              \
        va_end(rest);                                                                                       \
        int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK;                    \
        if (!locks || !no_locks(fd)) return NEXT(name)(fd, command, argument);                              \
        errno = ENOLCK;                                                                                     \
        return -1;                                                                                          \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

/* What faults.py calls. */

int fault_arm(const char *folder, long at_call, int how) {
    pthread_mutex_lock(&lock);
    kind = OFF;
    int failed = !realpath(folder, root);
    at = at_call, count = 0;
    if (!failed) kind = how;
    pthread_mutex_unlock(&lock);
    return -failed;
}
int fault_trace(const char *folder, const char *log) {
    log_fd = NEXT(open)(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    return log_fd < 0 ? -1 : fault_arm(folder, 0, TRACE);
}
long fault_count(void) { return count; }
void fault_disarm(void) {
    pthread_mutex_lock(&lock); /* a call under way in another thread ends first, and with it its record */
    kind = OFF;
    if (log_fd >= 0) close(log_fd);
    log_fd = -1;
    pthread_mutex_unlock(&lock);
}
