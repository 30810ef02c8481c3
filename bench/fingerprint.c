/*
 * fingerprint DIRECTORY: everything two equal trees have in common, one record per entry.
 *
 * Each record is `path TAB type mode uid gid size mtime rdev content xattrs TAB device:inode:links NUL`. Content is a
 * 64-bit FNV-1a of the bytes of a file or of the target of a symlink; xattrs is one of their sorted names and values.
 * Size is left out of directories, where it belongs to the file system. The last field is for finding hard links
 * and differs between equal trees. `bench` reads this to say where the result of a merge is not the kernel's view.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

static char path[1 << 16];

static uint64_t hash(uint64_t state, const void *bytes, size_t count) {
  for (const unsigned char *at = bytes; count-- > 0; at++) state = (state ^ *at) * 0x100000001b3ULL;
  return state;
}

static const uint64_t seed = 0xcbf29ce484222325ULL;

static void stop(const char *what) {
  fprintf(stderr, "fingerprint: %s %s: %s\n", what, path, strerror(errno));
  exit(1);
}

static int by_name(const void *left, const void *right) { return strcmp(*(char *const *)left, *(char *const *)right); }

static uint64_t hash_xattrs(const char *name) {
  static char list[1 << 16], value[1 << 16];
  char *names[1024];
  int count = 0;
  ssize_t length = llistxattr(name, list, sizeof list);
  if (length < 0 && errno != ENOTSUP) stop("xattrs of");
  for (char *at = list; at < list + length && count < 1024; at += strlen(at) + 1) names[count++] = at;
  qsort(names, count, sizeof *names, by_name);
  uint64_t state = seed;
  for (int index = 0; index < count; index++) {
    ssize_t size = lgetxattr(name, names[index], value, sizeof value);
    if (size < 0) stop("xattr of");
    state = hash(hash(state, names[index], strlen(names[index]) + 1), value, size);
  }
  return state;
}

static uint64_t hash_content(int directory, const char *name, const struct stat *status) {
  static char bytes[1 << 18];
  uint64_t state = seed;
  if (S_ISLNK(status->st_mode)) {
    ssize_t size = readlinkat(directory, name, bytes, sizeof bytes);
    if (size < 0) stop("readlink");
    return hash(state, bytes, size);
  }
  if (!S_ISREG(status->st_mode)) return 0;
  int file = openat(directory, name, O_RDONLY | O_NOFOLLOW);
  if (file < 0) stop("open");
  ssize_t size;
  while ((size = read(file, bytes, sizeof bytes)) > 0) state = hash(state, bytes, size);
  if (size < 0) stop("read");
  close(file);
  return state;
}

static void walk(int parent, const char *name, size_t length) {
  struct stat status;
  if (fstatat(parent, name, &status, AT_SYMLINK_NOFOLLOW) < 0) {
    /* The kernel can list a whiteout that it then says does not exist. */
    if (errno == ENOENT) return;
    stop("stat");
  }
  if (fchdir(parent) < 0) stop("enter the parent of");
  int is_directory = S_ISDIR(status.st_mode);
  printf("%s\t%c %o %u %u %lld %lld.%09ld %llx %016llx %016llx\t%llx:%llu:%lu", length == 0 ? "." : path + 1,
         is_directory              ? 'd'
         : S_ISREG(status.st_mode) ? 'f'
         : S_ISLNK(status.st_mode) ? 'l'
                                   : 's',
         status.st_mode, status.st_uid, status.st_gid, is_directory ? 0LL : (long long)status.st_size,
         (long long)status.st_mtim.tv_sec, status.st_mtim.tv_nsec, (unsigned long long)status.st_rdev,
         (unsigned long long)hash_content(parent, name, &status), (unsigned long long)hash_xattrs(name),
         (unsigned long long)status.st_dev, (unsigned long long)status.st_ino, (unsigned long)status.st_nlink);
  putchar('\0');
  if (!is_directory) return;
  int directory = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
  DIR *stream = directory < 0 ? NULL : fdopendir(directory);
  if (stream == NULL) stop("open");
  for (struct dirent *entry; (entry = readdir(stream)) != NULL;) {
    if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
    size_t room = sizeof path - length;
    size_t added = snprintf(path + length, room, "/%s", entry->d_name);
    if (added >= room) {
      errno = ENAMETOOLONG;
      stop("open");
    }
    walk(directory, entry->d_name, length + added);
    path[length] = '\0';
  }
  closedir(stream);
}

int main(int count, char **arguments) {
  if (count != 2) {
    fputs("usage: fingerprint DIRECTORY\n", stderr);
    return 2;
  }
  int root = open(arguments[1], O_RDONLY | O_DIRECTORY);
  if (root < 0) stop(arguments[1]);
  walk(root, ".", 0);
  return fflush(stdout) == 0 ? 0 : 1;
}
