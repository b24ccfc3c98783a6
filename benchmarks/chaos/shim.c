/* Preloaded: writes below a folder that fail, and a clock that jumps.
 *
 * CHAOS_ROOT    writes below this folder are counted, in each process
 * CHAOS_AT      from the n-th of them on, writes fail (0: none)
 * CHAOS_ERRNO   with this error
 * CHAOS_ONCE    only the n-th fails; half of it is written before
 * CHAOS_CLOCK   the wall clock jumps by so many seconds to and fro, at every call
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static long count;

static const char *setting(const char *name) { return getenv(name); }

static long number(const char *name) {
    const char *text = setting(name);
    return text ? atol(text) : 0;
}

/* 0: go on; 1: fail; 2: write half, and fail the next */
static int fails(int fd) {
    const char *root = setting("CHAOS_ROOT");
    long at = number("CHAOS_AT"), now;
    char link[64], path[4096];
    ssize_t size;
    if (!root || !at) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    if (strncmp(path, root, strlen(root))) return 0;
    now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (setting("CHAOS_ONCE")) return now == at ? 2 : now == at + 1;
    return now >= at;
}

static ssize_t refuse(void) {
    errno = number("CHAOS_ERRNO");
    return -1;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    int how = fails(fd);
    if (how == 1) return refuse();
    return real(fd, data, how == 2 && size > 1 ? size / 2 : size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    REAL(pwrite);
    int how = fails(fd);
    if (how == 1) return refuse();
    return real(fd, data, how == 2 && size > 1 ? size / 2 : size, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    int how = fails(fd);
    if (how == 1) return refuse();
    return real(fd, data, how == 2 && size > 1 ? size / 2 : size, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int number_of_parts) {
    REAL(writev);
    return fails(fd) ? refuse() : real(fd, parts, number_of_parts);
}

static time_t jump(void) {
    static long calls;
    long by = number("CHAOS_CLOCK");
    if (!by) return 0;
    return __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) % 3 * by - by;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday);
    int result = real(now, zone);
    now->tv_sec += jump();
    return result;
}

time_t time(time_t *now) {
    REAL(time);
    time_t result = real(NULL) + jump();
    if (now) *now = result;
    return result;
}
