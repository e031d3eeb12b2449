/* Faults of a disk, beneath Python and TensorStore alike: loaded by LD_PRELOAD.

   Calls on paths below `root` are counted; those numbered first..last take the action.
   A descriptor's path is what /proc says of it. Not armed, every call goes straight on.
   Limits: Linux, glibc; io_uring and mmap are not seen (nothing here writes by them). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, SYNC = 4, RENAME = 8, MKDIR = 16, CLOSE = 32 };
enum { COUNT, KILL, FAIL, SHORT, SLEEP, SPACE };

static char root[PATH_MAX];
static size_t root_size;
static atomic_int armed, ops, action;
static atomic_long calls, acted, first, last, value;

void fault_arm(const char *path, int ops_, int action_, long first_, long last_,
               long value_) {
  armed = 0;
  strncpy(root, path, sizeof root - 1);
  root_size = strlen(root);
  ops = ops_;
  action = action_;
  first = first_;
  last = last_;
  value = value_;
  calls = 0;
  acted = 0;
  armed = 1;
}

void fault_disarm(void) { armed = 0; }
long fault_calls(void) { return calls; }
long fault_acted(void) { return acted; }

static int is_below(const char *path) {
  return path && !strncmp(path, root, root_size);
}

static int is_descriptor_below(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return is_below(path);
}

/* 0: go on. -1: fail with errno set. -2: write half. n > 0: write n bytes. */
static ssize_t meet(int op, int is_ours, size_t size) {
  if (!is_ours || !(ops & op)) return 0;
  long number = ++calls;
  if (number < first || number > last) return 0;
  switch (action) {
    case KILL:
      kill(getpid(), SIGKILL);
      for (;;) pause();
    case FAIL:
      acted++;
      errno = (int)value;
      return -1;
    case SHORT:
      acted++;
      return -2;
    case SLEEP: {
      acted++;
      struct timespec rest = {value / 1000, value % 1000 * 1000000};
      while (nanosleep(&rest, &rest) && errno == EINTR);
      return 0;
    }
    case SPACE: {
      if (op == WRITE) {
        long left = atomic_fetch_sub(&value, (long)size);
        if (left >= (long)size) return 0;
        acted++;
        if (left > 0) return left;
      } else if (op != MKDIR && op != OPEN) {
        return 0;
      } else if (value > 0) {
        return 0;
      } else {
        acted++;
      }
      errno = ENOSPC;
      return -1;
    }
    default:
      return 0;
  }
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define PLAIN(fd) (!armed || !is_descriptor_below(fd))

static int is_writing(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT); }

#define OPENED(NAME)                                                             \
  int NAME(const char *path, int flags, ...) {                                   \
    va_list rest;                                                                \
    va_start(rest, flags);                                                       \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;      \
    va_end(rest);                                                                \
    if (armed && is_writing(flags) && meet(OPEN, is_below(path), 0)) return -1;  \
    return REAL(NAME)(path, flags, mode);                                        \
  }
OPENED(open)
OPENED(open64)

#define OPENED_AT(NAME)                                                          \
  int NAME(int folder, const char *path, int flags, ...) {                       \
    va_list rest;                                                                \
    va_start(rest, flags);                                                       \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;      \
    va_end(rest);                                                                \
    if (armed && is_writing(flags) && meet(OPEN, is_below(path), 0)) return -1;  \
    return REAL(NAME)(folder, path, flags, mode);                                \
  }
OPENED_AT(openat)
OPENED_AT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
  ssize_t met = PLAIN(fd) ? 0 : meet(WRITE, 1, size);
  if (met == -1) return -1;
  if (met) size = met == -2 ? (size + 1) / 2 : (size_t)met;
  return REAL(write)(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  size_t size = 0;
  for (int i = 0; i < count; i++) size += parts[i].iov_len;
  ssize_t met = PLAIN(fd) ? 0 : meet(WRITE, 1, size);
  if (met == -1) return -1;
  if (!met) return REAL(writev)(fd, parts, count);
  size = met == -2 ? (parts[0].iov_len + 1) / 2 : (size_t)met;
  if (size > parts[0].iov_len) size = parts[0].iov_len;
  return REAL(write)(fd, parts[0].iov_base, size);
}

#define WRITTEN_AT(NAME, OFFSET)                                                 \
  ssize_t NAME(int fd, const void *data, size_t size, OFFSET at) {               \
    ssize_t met = PLAIN(fd) ? 0 : meet(WRITE, 1, size);                          \
    if (met == -1) return -1;                                                    \
    if (met) size = met == -2 ? (size + 1) / 2 : (size_t)met;                    \
    return REAL(NAME)(fd, data, size, at);                                       \
  }
WRITTEN_AT(pwrite, off_t)
WRITTEN_AT(pwrite64, off64_t)

#define SYNCED(NAME)                                                             \
  int NAME(int fd) {                                                             \
    return !PLAIN(fd) && meet(SYNC, 1, 0) ? -1 : REAL(NAME)(fd);                 \
  }
SYNCED(fsync)
SYNCED(fdatasync)

int close(int fd) {
  if (PLAIN(fd)) return REAL(close)(fd);
  ssize_t met = meet(CLOSE, 1, 0);
  int error = errno, done = REAL(close)(fd); /* Linux closes it even so. */
  if (!met) return done;
  errno = error;
  return -1;
}

int rename(const char *from, const char *to) {
  return armed && meet(RENAME, is_below(to), 0) ? -1 : REAL(rename)(from, to);
}

int renameat(int from_fd, const char *from, int to_fd, const char *to) {
  if (armed && meet(RENAME, is_below(to), 0)) return -1;
  return REAL(renameat)(from_fd, from, to_fd, to);
}

int mkdir(const char *path, mode_t mode) {
  return armed && meet(MKDIR, is_below(path), 0) ? -1 : REAL(mkdir)(path, mode);
}
