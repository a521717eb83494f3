/* Preloaded into a process, records in order what it does to the files of one folder, and can make
 * the disk fail. Environment:
 *   RECORD_FOLDER  the folder, with a slash at its end
 *   RECORD_FILE    gets the record; without it nothing is recorded
 *   RECORD_FULL    while a file of this name exists, writes fail with ENOSPC
 *   RECORD_BROKEN  while a file of this name exists, fsyncs fail with EIO
 * The record is a sequence of lines, "<op> <file> <number> <number>"; "write <file> <offset> <size>"
 * is followed by size bytes. An fsync is recorded when it begins. Writes through mmap (SQLite's
 * -shm) are not recorded: SQLite does not rely on them after a crash. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MAX_FILES 4096

static char *names[MAX_FILES];
static int record = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const char *name_in_folder(const char *path) {
    const char *folder = getenv("RECORD_FOLDER");
    if (!folder || !path || strncmp(path, folder, strlen(folder)) != 0) return NULL;
    return path + strlen(folder);
}

static const char *name_of(int fd) { return fd >= 0 && fd < MAX_FILES ? names[fd] : NULL; }

static int is_set(const char *variable) {
    const char *path = getenv(variable);
    return path && access(path, F_OK) == 0;
}

/* With the lock held. */
static void note(const char *op, const char *name, long a, long b, const void *data) {
    char line[512];
    struct iovec parts[2] = {{line, 0}, {(void *)data, data ? (size_t)b : 0}};
    if (record < 0) {
        const char *path = getenv("RECORD_FILE");
        if (!path) return;
        record = REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    }
    parts[0].iov_len = snprintf(line, sizeof line, "%s %s %ld %ld\n", op, name, a, b);
    if (writev(record, parts, 2) < 0) abort();
}

static int opened(int fd, const char *path) {
    const char *name = name_in_folder(path);
    if (fd >= 0 && fd < MAX_FILES) {
        free(names[fd]);
        names[fd] = name ? strdup(name) : NULL;
    }
    return fd;
}

#define OPEN(function)                                     \
    int function(const char *path, int flags, ...) {       \
        va_list rest;                                      \
        va_start(rest, flags);                             \
        int mode = va_arg(rest, int);                      \
        va_end(rest);                                      \
        return opened(REAL(function)(path, flags, mode), path); \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    if (fd >= 0 && fd < MAX_FILES) {
        free(names[fd]);
        names[fd] = NULL;
    }
    return REAL(close)(fd);
}

static ssize_t written(const char *name, ssize_t size, const void *data, long offset) {
    if (name && size > 0) note("write", name, offset, size, data);
    return size;
}

#define PWRITE(function, offset_type)                                                   \
    ssize_t function(int fd, const void *data, size_t size, offset_type offset) {       \
        const char *name = name_of(fd);                                                 \
        if (!name) return REAL(function)(fd, data, size, offset);                       \
        if (is_set("RECORD_FULL")) return errno = ENOSPC, -1;                           \
        pthread_mutex_lock(&lock);                                                      \
        ssize_t done = written(name, REAL(function)(fd, data, size, offset), data, offset); \
        pthread_mutex_unlock(&lock);                                                    \
        return done;                                                                    \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t size) {
    const char *name = name_of(fd);
    if (!name) return REAL(write)(fd, data, size);
    pthread_mutex_lock(&lock);
    ssize_t done = written(name, REAL(write)(fd, data, size), data, -1);
    pthread_mutex_unlock(&lock);
    return done;
}

#define TRUNCATE(function, offset_type)                             \
    int function(int fd, offset_type size) {                        \
        const char *name = name_of(fd);                             \
        if (!name) return REAL(function)(fd, size);                 \
        pthread_mutex_lock(&lock);                                  \
        int failed = REAL(function)(fd, size);                      \
        if (!failed) note("truncate", name, size, 0, NULL);         \
        pthread_mutex_unlock(&lock);                                \
        return failed;                                              \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(function)                                              \
    int function(int fd) {                                          \
        const char *name = name_of(fd);                             \
        if (!name) return REAL(function)(fd);                       \
        if (is_set("RECORD_BROKEN")) return errno = EIO, -1;        \
        pthread_mutex_lock(&lock);                                  \
        note("sync", name, 0, 0, NULL);                             \
        pthread_mutex_unlock(&lock);                                \
        return REAL(function)(fd);                                  \
    }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
    const char *name = name_in_folder(path);
    pthread_mutex_lock(&lock);
    int failed = REAL(unlink)(path);
    if (!failed && name) note("unlink", name, 0, 0, NULL);
    pthread_mutex_unlock(&lock);
    return failed;
}
