/* Strike a process at one call that changes a folder: a library for LD_PRELOAD.

     cc -shared -fPIC -O1 -o calls.so torture_calls.c -ldl
     torture_arm(folder, number, action, argument, trace)

   Every call that changes something below `folder` is counted and written to the file descriptor
   `trace`, one line a call. At call `number` (from 1) the action happens:

     'k'  SIGKILL to the process, before the call
     'h'  half of the bytes are written, then SIGKILL (a write alone; other calls as 'k')
     'e'  the call fails with the errno `argument`, this once
     'f'  the call fails with the errno `argument`, and so does each later call that needs space
     's'  the signal `argument` is sent to the process, and the call goes on
     'r'  reading: opening for reading and reading are counted instead, and the call fails once

   A close that fails has closed the descriptor, as on Linux. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum verdict { GO, FAIL, HALF };
enum needs { NOTHING, SPACE, READING };

static char folder[PATH_MAX];
static long number, count;
static int action, argument, trace = -1;

void torture_arm(const char *below, long at, int what, int with, int log) {
    snprintf(folder, sizeof folder, "%s", below);
    number = at, action = what, argument = with, trace = log, count = 0;
}

static void locate(int directory, const char *path, char *found) {
    char start[PATH_MAX] = "", link[64];
    if (path != NULL && path[0] == '/') {
        snprintf(found, PATH_MAX, "%s", path);
        return;
    }
    if (directory == AT_FDCWD) {
        if (getcwd(start, sizeof start) == NULL) start[0] = 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t size = readlink(link, start, sizeof start - 1);
        start[size < 0 ? 0 : size] = 0;
    }
    size_t used = (size_t)snprintf(found, PATH_MAX, "%s", start);
    if (path != NULL && used < PATH_MAX) snprintf(found + used, PATH_MAX - used, "/%s", path);
}

/* Count a call, and decide what becomes of it. */
static enum verdict strike(const char *call, int needs, int directory, const char *path) {
    char place[PATH_MAX], line[PATH_MAX + 32];
    int before = errno;
    if (!folder[0] || (needs == READING) != (action == 'r')) return GO;
    locate(directory, path, place);
    errno = before;
    size_t size = strlen(folder);
    if (strncmp(place, folder, size) != 0 || (place[size] != '/' && place[size] != 0)) return GO;
    count++;
    int length = snprintf(line, sizeof line, "%s %s\n", call, place + size);
    if (trace >= 0) syscall(SYS_write, trace, line, length);
    errno = before;
    if (count == number) {
        if (action == 'h' && strcmp(call, "write") == 0) return HALF;
        if (action == 'k' || action == 'h') kill(getpid(), SIGKILL);
        if (action == 's') kill(getpid(), argument);
        if (strchr("efr", action)) return errno = argument, FAIL;
    }
    if (action == 'f' && number > 0 && count > number && needs == SPACE) return errno = argument, FAIL;
    return GO;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int changes(int flags) {
    return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
}

static int opening(int flags) {
    return !changes(flags) ? READING : (flags & O_CREAT) ? SPACE : NOTHING;
}

#define OPEN(name)                                                                       \
    int name(const char *path, int flags, ...) {                                         \
        va_list rest;                                                                    \
        va_start(rest, flags);                                                           \
        int mode = va_arg(rest, int);                                                    \
        va_end(rest);                                                                    \
        if (strike("open", opening(flags), AT_FDCWD, path) == FAIL)                      \
            return -1;                                                                   \
        return REAL(name)(path, flags, mode);                                            \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                     \
    int name(int directory, const char *path, int flags, ...) {                          \
        va_list rest;                                                                    \
        va_start(rest, flags);                                                           \
        int mode = va_arg(rest, int);                                                    \
        va_end(rest);                                                                    \
        if (strike("open", opening(flags), directory, path) == FAIL)                     \
            return -1;                                                                   \
        return REAL(name)(directory, path, flags, mode);                                 \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *data, size_t size) {
    enum verdict found = strike("write", SPACE, file, NULL);
    if (found == FAIL) return -1;
    if (found == HALF) {
        REAL(write)(file, data, size / 2);
        kill(getpid(), SIGKILL);
    }
    return REAL(write)(file, data, size);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    enum verdict found = strike("write", SPACE, file, NULL);
    if (found == FAIL) return -1;
    if (found == HALF) {
        REAL(pwrite64)(file, data, size / 2, at);
        kill(getpid(), SIGKILL);
    }
    return REAL(pwrite64)(file, data, size, at);
}

ssize_t writev(int file, const struct iovec *pieces, int num_pieces) {
    enum verdict found = strike("write", SPACE, file, NULL);
    if (found == FAIL) return -1;
    if (found == HALF) {
        REAL(writev)(file, pieces, num_pieces / 2);
        kill(getpid(), SIGKILL);
    }
    return REAL(writev)(file, pieces, num_pieces);
}

ssize_t read(int file, void *data, size_t size) {
    if (strike("read", READING, file, NULL) == FAIL) return -1;
    return REAL(read)(file, data, size);
}

ssize_t pread64(int file, void *data, size_t size, off64_t at) {
    if (strike("read", READING, file, NULL) == FAIL) return -1;
    return REAL(pread64)(file, data, size, at);
}

/* Calls on a descriptor: a close is counted where the file was open for writing. */
int close(int file) {
    int before = errno, flags = folder[0] ? fcntl(file, F_GETFL) : 0;
    errno = before;
    int fails = flags > 0 && changes(flags) && strike("close", NOTHING, file, NULL) == FAIL;
    int failure = errno, closed = REAL(close)(file);
    return fails ? (errno = failure, -1) : closed;
}

#define ON_FILE(name, call, ...)                                     \
    {                                                                \
        if (strike(call, NOTHING, file, NULL) == FAIL) return -1;          \
        return REAL(name)(file, ##__VA_ARGS__);                      \
    }
int fsync(int file) ON_FILE(fsync, "fsync")
int fdatasync(int file) ON_FILE(fdatasync, "fsync")
int ftruncate(int file, off_t size) ON_FILE(ftruncate, "truncate", size)
int ftruncate64(int file, off64_t size) ON_FILE(ftruncate64, "truncate", size)

/* Calls on names; what is renamed or linked counts under its new name. */
#define ON_NAME(name, call, needs, directory, place, ...)                          \
    {                                                                                    \
        if (strike(call, needs, directory, place) == FAIL) return -1;              \
        return REAL(name)(__VA_ARGS__);                                                  \
    }
extern int renameat2(int, const char *, int, const char *, unsigned);
int rename(const char *from, const char *to)
    ON_NAME(rename, "rename", NOTHING, AT_FDCWD, to, from, to)
int renameat(int a, const char *from, int b, const char *to)
    ON_NAME(renameat, "rename", NOTHING, b, to, a, from, b, to)
int renameat2(int a, const char *from, int b, const char *to, unsigned flags)
    ON_NAME(renameat2, "rename", NOTHING, b, to, a, from, b, to, flags)
int link(const char *from, const char *to) ON_NAME(link, "link", SPACE, AT_FDCWD, to, from, to)
int linkat(int a, const char *from, int b, const char *to, int flags)
    ON_NAME(linkat, "link", SPACE, b, to, a, from, b, to, flags)
int symlink(const char *what, const char *to) ON_NAME(symlink, "link", SPACE, AT_FDCWD, to, what, to)
int mkdir(const char *path, mode_t mode) ON_NAME(mkdir, "mkdir", SPACE, AT_FDCWD, path, path, mode)
int mkdirat(int at, const char *path, mode_t mode)
    ON_NAME(mkdirat, "mkdir", SPACE, at, path, at, path, mode)
int unlink(const char *path) ON_NAME(unlink, "unlink", NOTHING, AT_FDCWD, path, path)
int unlinkat(int at, const char *path, int flags)
    ON_NAME(unlinkat, "unlink", NOTHING, at, path, at, path, flags)
int rmdir(const char *path) ON_NAME(rmdir, "rmdir", NOTHING, AT_FDCWD, path, path)
int truncate(const char *path, off_t size)
    ON_NAME(truncate, "truncate", NOTHING, AT_FDCWD, path, path, size)
