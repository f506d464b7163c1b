/* Faults at file operations, for benchmarks/faults.py. Preloaded; a forked child arms it through ctypes.

   cc -shared -fPIC -O1 -o fault_shim.so fault_shim.c -ldl

   Every operation on a path below `prefix` is counted. The one with the number `at` fails, is cut short, or is
   the process's last; with `sticky`, so do all later ones that need room on the disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OFF, COUNT, FAIL, CUT, KILL, TORN };

static int mode = OFF, error_number, sticky, trace_fd = -1;
static long at, counted, clock_at, clock_reads, clock_shift;
static char prefix[4096];

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = dlsym(RTLD_NEXT, #name)

void fault_arm(int new_mode, long new_at, int new_error, int new_sticky, const char *below, const char *trace) {
    strncpy(prefix, below, sizeof prefix - 1);
    at = new_at, error_number = new_error, sticky = new_sticky, counted = 0;
    if (trace[0]) trace_fd = open(trace, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    mode = new_mode;
}

void fault_clock(long new_at, long new_shift) { clock_at = new_at, clock_shift = new_shift, clock_reads = 0; }

static const char *path_of(int fd, char *room, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, room, size - 1);
    room[length < 0 ? 0 : length] = 0;
    return room;
}

/* Whether this operation is the chosen one. It does not return where the process is to end. */
static int chosen(const char *kind, const char *path, int needs_room) {
    if (mode == OFF || strncmp(path, prefix, strlen(prefix))) return 0;
    long number = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    if (trace_fd >= 0) dprintf(trace_fd, "%s\t%s\n", kind, path);
    if (mode == COUNT) return 0;
    if (number != at && !(sticky && number > at && needs_room)) return 0;
    if (mode == KILL) kill(getpid(), SIGKILL);
    return 1;
}

static int refused(const char *kind, const char *path, int needs_room) {
    if (!chosen(kind, path, needs_room) || mode == CUT || mode == TORN) return 0;
    errno = error_number;
    return 1;
}

static int refused_open(const char *path, int flags) {
    int old = errno, writes = (flags & O_ACCMODE) != O_RDONLY;
    if (refused(writes ? "create" : "open", path, flags & O_CREAT)) return 1;
    errno = old;
    return 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        return refused_open(path, flags) ? -1 : real(path, flags, bits); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        return refused_open(path, flags) ? -1 : real(folder, path, flags, bits); \
    }
OPENAT(openat)
OPENAT(openat64)

static ssize_t cut(ssize_t (*real)(int, const void *, size_t), int fd, const void *from, size_t size) {
    ssize_t done = real(fd, from, size > 1 ? size / 2 : size);
    if (mode == TORN) kill(getpid(), SIGKILL);
    return done;
}

ssize_t write(int fd, const void *from, size_t size) {
    REAL(write);
    char room[4096];
    if (mode == OFF || !chosen("write", path_of(fd, room, sizeof room), 1)) return real(fd, from, size);
    if (mode == CUT || mode == TORN) return cut(real, fd, from, size);
    if (error_number == ENOSPC && sticky == 1 && size > 1) { /* a full disk takes what still fits */
        sticky = 2;
        return real(fd, from, size / 2);
    }
    errno = error_number;
    return -1;
}

ssize_t read(int fd, void *to, size_t size) {
    REAL(read);
    char room[4096];
    if (mode == OFF || !chosen("read", path_of(fd, room, sizeof room), 0)) return real(fd, to, size);
    if (mode == CUT || mode == TORN) return real(fd, to, size > 1 ? size / 2 : size);
    errno = error_number;
    return -1;
}

int fsync(int fd) {
    REAL(fsync);
    char room[4096];
    return mode != OFF && refused("fsync", path_of(fd, room, sizeof room), 1) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return refused("rename", to, 0) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t bits) {
    REAL(mkdir);
    return refused("mkdir", path, 1) ? -1 : real(path, bits);
}

int unlink(const char *path) {
    REAL(unlink);
    return refused("unlink", path, 0) ? -1 : real(path);
}

int rmdir(const char *path) {
    REAL(rmdir);
    return refused("rmdir", path, 0) ? -1 : real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    char room[4096];
    if (mode != OFF && refused("unlinkat", path_of(folder, room, sizeof room), 0)) return -1;
    return real(folder, path, flags);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    REAL(clock_gettime);
    int result = real(clock, time);
    if (clock == CLOCK_REALTIME && clock_at && ++clock_reads >= clock_at) time->tv_sec += clock_shift;
    return result;
}
