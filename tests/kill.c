/* Ends a process with SIGKILL at the n-th system call that changes files below a folder, for tests of restarts.

   Preloaded; armed by jlt_arm, or in the processes that an armed one starts by JLT_KILL="counter file:n:folder". The
   counter is shared by all of them. n = 0 only counts. A write at which the process ends is made by half. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long *counter;
static long target;
static char folder[PATH_MAX];

void jlt_arm(const char *file, long at, const char *below) {
    int fd = open(file, O_RDWR);
    long *shared = mmap(0, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    target = at;
    strncpy(folder, below, PATH_MAX - 1);
    counter = shared;
}

__attribute__((constructor)) static void begin(void) {
    char *text = getenv("JLT_KILL"), file[PATH_MAX], below[PATH_MAX];
    long at;
    if (text && sscanf(text, "%[^:]:%ld:%s", file, &at, below) == 3) jlt_arm(file, at, below);
}

static int due(void) { return __sync_add_and_fetch(counter, 1) == target; }

static void end(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int is_below(int at, const char *path) {
    char link[64], place[PATH_MAX];
    if (!counter) return 0;
    if (path && path[0] == '/') return !strncmp(path, folder, strlen(folder));
    if (at == AT_FDCWD) return getcwd(place, PATH_MAX) && !strncmp(place, folder, strlen(folder));
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t size = readlink(link, place, PATH_MAX - 1);
    return size > 0 && (place[size] = 0, !strncmp(place, folder, strlen(folder)));
}

#define REAL(name) static typeof(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define WHERE(at, path) if (is_below(at, path) && due()) end()
#define FILE_CALL(name, declared, passed) \
    int name declared { REAL(name); WHERE(AT_FDCWD, path); return real passed; }
#define PLACE_CALL(name, declared, passed) int name declared { REAL(name); WHERE(at, path); return real passed; }
#define DESCRIPTOR_CALL(name, declared, passed) int name declared { REAL(name); WHERE(fd, 0); return real passed; }

FILE_CALL(unlink, (const char *path), (path))
FILE_CALL(rmdir, (const char *path), (path))
FILE_CALL(mkdir, (const char *path, mode_t mode), (path, mode))
FILE_CALL(chmod, (const char *path, mode_t mode), (path, mode))
FILE_CALL(rename, (const char *path, const char *other), (path, other))
PLACE_CALL(unlinkat, (int at, const char *path, int flags), (at, path, flags))
PLACE_CALL(mkdirat, (int at, const char *path, mode_t mode), (at, path, mode))
PLACE_CALL(renameat, (int at, const char *path, int to, const char *other), (at, path, to, other))
DESCRIPTOR_CALL(fsync, (int fd), (fd))
DESCRIPTOR_CALL(fchmod, (int fd, mode_t mode), (fd, mode))
DESCRIPTOR_CALL(ftruncate, (int fd, off_t size), (fd, size))
DESCRIPTOR_CALL(ftruncate64, (int fd, off64_t size), (fd, size))
DESCRIPTOR_CALL(posix_fallocate, (int fd, off_t start, off_t size), (fd, start, size))
DESCRIPTOR_CALL(posix_fallocate64, (int fd, off64_t start, off64_t size), (fd, start, size))

#define OPEN_CALL(name, declared, at, ...) \
    int name declared { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) WHERE(at, path); \
        return real(__VA_ARGS__, flags, mode); \
    }
OPEN_CALL(open, (const char *path, int flags, ...), AT_FDCWD, path)
OPEN_CALL(open64, (const char *path, int flags, ...), AT_FDCWD, path)
OPEN_CALL(openat, (int at, const char *path, int flags, ...), at, at, path)
OPEN_CALL(openat64, (int at, const char *path, int flags, ...), at, at, path)

ssize_t write(int fd, const void *content, size_t size) {
    REAL(write);
    if (fd > 2 && is_below(fd, 0) && due()) {
        real(fd, content, size / 2);
        end();
    }
    return real(fd, content, size);
}

ssize_t sendfile(int fd, int from, off_t *start, size_t size) {
    REAL(sendfile);
    WHERE(fd, 0);
    return real(fd, from, start, size);
}

ssize_t copy_file_range(int from, off64_t *start, int fd, off64_t *at, size_t size, unsigned flags) {
    REAL(copy_file_range);
    WHERE(fd, 0);
    return real(from, start, fd, at, size, flags);
}
