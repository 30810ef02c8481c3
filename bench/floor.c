/*
 * floor UPPER LOWER: the yardstick of `bench merge`.
 *
 * Folds an upper of a kernel overlay into the lower beneath it, in place, with one thread, no journal and as few
 * system calls as a correct result allows: one rename per moved object, one unlink per removed one, one listxattr
 * per object that stays (the kernel leaves trusted.overlay.origin on what it copied up), and the upper's owner, mode,
 * xattrs and times on each directory that both layers have. The upper is empty afterwards.
 *
 * It gives the kernel's view for uppers without redirects, metacopies, index links and emulated chattr flags, on one
 * file system; for others it stops with a message (exit code 3) before it moves the object in question. It keeps no
 * promise about crashes: it is what the same job costs at least, and nothing to run on data.
 *
 * -n NAMESPACE  whose marks count: trusted (default) or user
 * -r            also remove the emptied upper directory itself
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

struct record {
  unsigned long long ino;
  long long offset;
  unsigned short length;
  unsigned char type;
  char name[];
};

enum { LISTING_BYTES = 1 << 16, NAMES_BYTES = 1 << 16 };

static const char *prefix = "trusted.overlay.";
static size_t prefix_length;
/* The kernel makes all whiteouts of one upper hard links of one inode, so one stat tells for all of them. */
static unsigned long long whiteout_ino;

static void stop(int code, const char *format, ...) {
  int saved = errno;
  va_list arguments;
  va_start(arguments, format);
  fputs("floor: ", stderr);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (code == 1) fprintf(stderr, ": %s", strerror(saved));
  fputc('\n', stderr);
  exit(code);
}

static void *allocate(size_t size) {
  void *memory = malloc(size);
  if (memory == NULL) stop(1, "out of memory");
  return memory;
}

static int is_mark(const char *name) { return strncmp(name, prefix, prefix_length) == 0; }

static int is_dot(const char *name) {
  return name[0] == '.' && (name[1] == '\0' || (name[1] == '.' && name[2] == '\0'));
}

static unsigned char type_of(int directory, const struct record *entry) {
  if (entry->type != DT_UNKNOWN) return entry->type;
  struct stat status;
  if (fstatat(directory, entry->name, &status, AT_SYMLINK_NOFOLLOW) < 0) stop(1, "stat %s", entry->name);
  return IFTODT(status.st_mode);
}

static int is_whiteout(int directory, const struct record *entry) {
  if (entry->ino == whiteout_ino) return 1;
  struct stat status;
  if (fstatat(directory, entry->name, &status, AT_SYMLINK_NOFOLLOW) < 0) stop(1, "stat %s", entry->name);
  if (status.st_rdev != makedev(0, 0)) return 0;
  whiteout_ino = entry->ino;
  return 1;
}

/* Names of the directories met in one listing: they are entered after the files, so that one fchdir serves all. */
struct names {
  char *bytes;
  size_t used, room;
};

static void remember(struct names *names, const char *name) {
  size_t length = strlen(name) + 1;
  if (names->used + length > names->room) {
    names->room = names->room == 0 ? 4096 : names->room * 2;
    names->bytes = realloc(names->bytes, names->room);
    if (names->bytes == NULL) stop(1, "out of memory");
  }
  memcpy(names->bytes + names->used, name, length);
  names->used += length;
}

static void remove_tree(int parent, const char *name) {
  int directory = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
  if (directory < 0) stop(1, "open %s", name);
  char *listing = allocate(LISTING_BYTES);
  long bytes;
  while ((bytes = syscall(SYS_getdents64, directory, listing, LISTING_BYTES)) > 0)
    for (long at = 0; at < bytes;) {
      struct record *entry = (struct record *)(listing + at);
      at += entry->length;
      if (is_dot(entry->name)) continue;
      if (entry->type == DT_DIR) remove_tree(directory, entry->name);
      else if (unlinkat(directory, entry->name, 0) < 0) {
        if (errno != EISDIR) stop(1, "unlink %s", entry->name);
        remove_tree(directory, entry->name);
      }
    }
  if (bytes < 0) stop(1, "list %s", name);
  free(listing);
  close(directory);
  if (unlinkat(parent, name, AT_REMOVEDIR) < 0) stop(1, "rmdir %s", name);
}

/* Takes the marks off a non-directory `name` of the current directory. */
static void strip(const char *name) {
  char list[NAMES_BYTES];
  ssize_t length = llistxattr(name, list, sizeof list);
  if (length < 0 && errno != ENOTSUP) stop(1, "list the xattrs of %s", name);
  for (char *mark = list; mark < list + length; mark += strlen(mark) + 1) {
    if (!is_mark(mark)) continue;
    const char *kind = mark + prefix_length;
    if (strcmp(kind, "origin") != 0) stop(3, "%s carries %s, which the floor does not handle", name, mark);
    if (lremovexattr(name, mark) < 0) stop(1, "remove %s from %s", mark, name);
  }
}

/* Reads the names of a directory's xattrs into `list` (NAMES_BYTES). Returns whether the directory is opaque. */
static int read_marks(int directory, const char *name, char *list, ssize_t *length) {
  int opaque = 0;
  *length = flistxattr(directory, list, NAMES_BYTES);
  if (*length < 0 && errno != ENOTSUP) stop(1, "list the xattrs of %s", name);
  for (char *mark = list; mark < list + *length; mark += strlen(mark) + 1) {
    if (!is_mark(mark)) continue;
    const char *kind = mark + prefix_length;
    if (strcmp(kind, "opaque") == 0) {
      char value[2];
      ssize_t size = fgetxattr(directory, mark, value, sizeof value);
      opaque = size == 1 && value[0] == 'y';
      if (size == 1 && value[0] == 'x') stop(3, "%s may hold xattr whiteouts, which the floor does not handle", name);
    } else if (strcmp(kind, "origin") != 0 && strcmp(kind, "impure") != 0 && strcmp(kind, "uuid") != 0)
      stop(3, "%s carries %s, which the floor does not handle", name, mark);
  }
  return opaque;
}

/*
 * Cleans a directory that will be moved whole: no marks and no whiteouts anywhere in it. `list` holds the names of
 * its xattrs and is overwritten. The current directory changes.
 */
static void clean_tree(int directory, const char *name, char *list, ssize_t length) {
  for (char *mark = list; mark < list + length; mark += strlen(mark) + 1)
    if (is_mark(mark) && fremovexattr(directory, mark) < 0) stop(1, "remove %s from %s", mark, name);
  if (fchdir(directory) < 0) stop(1, "enter %s", name);
  char *listing = allocate(LISTING_BYTES);
  struct names children = {0};
  struct stat before;
  int removed = 0;
  long bytes;
  while ((bytes = syscall(SYS_getdents64, directory, listing, LISTING_BYTES)) > 0)
    for (long at = 0; at < bytes;) {
      struct record *entry = (struct record *)(listing + at);
      at += entry->length;
      if (is_dot(entry->name)) continue;
      unsigned char type = type_of(directory, entry);
      if (type == DT_DIR) remember(&children, entry->name);
      else if (type == DT_CHR && is_whiteout(directory, entry)) {
        if (removed++ == 0 && fstat(directory, &before) < 0) stop(1, "stat %s", name);
        if (unlinkat(directory, entry->name, 0) < 0) stop(1, "unlink %s", entry->name);
      } else strip(entry->name);
    }
  if (bytes < 0) stop(1, "list %s", name);
  free(listing);
  for (char *child = children.bytes; child < children.bytes + children.used; child += strlen(child) + 1) {
    int inner = openat(directory, child, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (inner < 0) stop(1, "open %s", child);
    read_marks(inner, child, list, &length);
    clean_tree(inner, child, list, length);
    close(inner);
  }
  free(children.bytes);
  if (removed > 0) futimens(directory, (struct timespec[]){before.st_atim, before.st_mtim});
}

/* Gives the lower directory what the upper one shows in the view: owner, mode, xattrs. Times come last, see merge. */
static void copy_meta(int upper, int lower, const struct stat *status, char *list, ssize_t length, const char *name) {
  char *old_list = allocate(NAMES_BYTES), *value = allocate(NAMES_BYTES);
  ssize_t old_length = flistxattr(lower, old_list, NAMES_BYTES);
  for (char *old = old_list; old < old_list + old_length; old += strlen(old) + 1) {
    int kept = 0;
    for (char *now = list; now < list + length; now += strlen(now) + 1) kept |= strcmp(now, old) == 0 && !is_mark(now);
    if (!kept && fremovexattr(lower, old) < 0) stop(1, "remove %s from %s", old, name);
  }
  struct stat old_status;
  if (fstat(lower, &old_status) < 0) stop(1, "stat %s", name);
  if (old_status.st_uid != status->st_uid || old_status.st_gid != status->st_gid)
    if (fchown(lower, status->st_uid, status->st_gid) < 0) stop(1, "chown %s", name);
  if (old_status.st_mode != status->st_mode || old_status.st_uid != status->st_uid)
    if (fchmod(lower, status->st_mode & 07777) < 0) stop(1, "chmod %s", name);
  for (char *now = list; now < list + length; now += strlen(now) + 1) {
    if (is_mark(now)) continue;
    ssize_t size = fgetxattr(upper, now, value, NAMES_BYTES);
    if (size < 0 || fsetxattr(lower, now, value, size, 0) < 0) stop(1, "copy %s to %s", now, name);
  }
  free(old_list);
  free(value);
}

static void merge(int upper, int lower, const char *name, char *list, ssize_t length, int parent, int remove_upper);

/* One directory of the upper against whatever the lower holds under that name. `list` is a buffer of NAMES_BYTES. */
static void merge_directory(int upper, int lower, const char *name, char *list) {
  ssize_t length;
  int above = openat(upper, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
  if (above < 0) stop(1, "open %s", name);
  if (!read_marks(above, name, list, &length)) {
    int below = openat(lower, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (below >= 0) {
      merge(above, below, name, list, length, upper, 1);
      close(below);
      close(above);
      return;
    }
    if (errno != ENOENT && errno != ENOTDIR && errno != ELOOP) stop(1, "open %s of the lower", name);
  }
  clean_tree(above, name, list, length);
  close(above);
  if (renameat(upper, name, lower, name) == 0) return;
  if (errno == ENOTEMPTY || errno == EEXIST) remove_tree(lower, name);
  else if (errno != ENOTDIR || unlinkat(lower, name, 0) < 0) stop(1, "rename %s", name);
  if (renameat(upper, name, lower, name) < 0) stop(1, "rename %s", name);
}

/*
 * Merges two open directories; `list` holds the names of the upper one's xattrs. The current directory changes.
 * `parent` holds the upper directory itself under `name`.
 */
static void merge(int upper, int lower, const char *name, char *list, ssize_t length, int parent, int remove_upper) {
  struct stat status;
  /* Before anything leaves: renaming children out of the upper directory changes its times. */
  if (fstat(upper, &status) < 0) stop(1, "stat %s", name);
  if (fchdir(upper) < 0) stop(1, "enter %s", name);
  char *listing = allocate(LISTING_BYTES);
  struct names children = {0};
  long bytes;
  while ((bytes = syscall(SYS_getdents64, upper, listing, LISTING_BYTES)) > 0)
    for (long at = 0; at < bytes;) {
      struct record *entry = (struct record *)(listing + at);
      at += entry->length;
      if (is_dot(entry->name)) continue;
      unsigned char type = type_of(upper, entry);
      if (type == DT_DIR) {
        remember(&children, entry->name);
        continue;
      }
      if (type == DT_CHR && is_whiteout(upper, entry)) {
        if (unlinkat(lower, entry->name, 0) < 0 && errno != ENOENT) {
          if (errno != EISDIR) stop(1, "unlink %s of the lower", entry->name);
          remove_tree(lower, entry->name);
        }
        if (unlinkat(upper, entry->name, 0) < 0) stop(1, "unlink %s", entry->name);
        continue;
      }
      strip(entry->name);
      if (renameat(upper, entry->name, lower, entry->name) < 0) {
        if (errno != EISDIR) stop(1, "rename %s", entry->name);
        remove_tree(lower, entry->name);
        if (renameat(upper, entry->name, lower, entry->name) < 0) stop(1, "rename %s", entry->name);
      }
    }
  if (bytes < 0) stop(1, "list %s", name);
  free(listing);
  copy_meta(upper, lower, &status, list, length, name);
  for (char *child = children.bytes; child < children.bytes + children.used; child += strlen(child) + 1)
    merge_directory(upper, lower, child, list);
  free(children.bytes);
  if (remove_upper && unlinkat(parent, name, AT_REMOVEDIR) < 0) stop(1, "rmdir %s", name);
  /* After the removal, for the upper may have been moved into the lower beforehand (-r). */
  if (futimens(lower, (struct timespec[]){status.st_atim, status.st_mtim}) < 0) stop(1, "set the times of %s", name);
}

int main(int count, char **arguments) {
  int remove_upper = 0, option;
  while ((option = getopt(count, arguments, "n:r")) != -1) {
    if (option == 'n' && strcmp(optarg, "user") == 0) prefix = "user.overlay.";
    else if (option == 'n' && strcmp(optarg, "trusted") == 0) prefix = "trusted.overlay.";
    else if (option == 'r') remove_upper = 1;
    else optind = count;
  }
  if (count - optind != 2) stop(2, "usage: floor [-n trusted|user] [-r] UPPER LOWER");
  prefix_length = strlen(prefix);
  /* Two descriptors per level of the tree. */
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
  int upper = open(arguments[optind], O_RDONLY | O_DIRECTORY), lower = open(arguments[optind + 1], O_RDONLY | O_DIRECTORY);
  if (upper < 0) stop(1, "open %s", arguments[optind]);
  if (lower < 0) stop(1, "open %s", arguments[optind + 1]);
  int start = open(".", O_RDONLY | O_DIRECTORY);
  if (start < 0) stop(1, "open the current directory");
  char *list = allocate(NAMES_BYTES);
  ssize_t length;
  read_marks(upper, arguments[optind], list, &length); /* opaque means nothing on the root of a layer */
  merge(upper, lower, arguments[optind], list, length, start, remove_upper);
  return 0;
}
