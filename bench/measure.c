/*
 * measure -o FILE [-l LOG] [-s DIRECTORY] COMMAND [ARGUMENT...]
 *
 * Runs one command and writes what it cost to FILE as one JSON object: wall clock from fork to wait4, processor time and
 * peak resident memory of the command and of the children it waited for, and how long the file system of DIRECTORY
 * takes to write back what the command left dirty. The command's output goes to LOG.
 *
 * A program of its own because Linux carries the peak memory of the forking process over exec: a command started
 * by Node would never seem smaller than Node.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static long long us(struct timeval time) { return time.tv_sec * 1000000LL + time.tv_usec; }

int main(int count, char **arguments) {
  const char *result = NULL, *log = "/dev/null", *directory = NULL;
  int option;
  while ((option = getopt(count, arguments, "+o:l:s:")) != -1) {
    if (option == 'o') result = optarg;
    else if (option == 'l') log = optarg;
    else if (option == 's') directory = optarg;
    else return 2;
  }
  if (result == NULL || optind == count) {
    fputs("usage: measure -o FILE [-l LOG] [-s DIRECTORY] COMMAND [ARGUMENT...]\n", stderr);
    return 2;
  }
  int output = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0600), input = open("/dev/null", O_RDONLY);
  int synced = directory == NULL ? -1 : open(directory, O_RDONLY | O_DIRECTORY);
  if (output < 0 || input < 0 || (directory != NULL && synced < 0)) {
    perror("measure");
    return 2;
  }
  long long start = now_ns();
  pid_t child = fork();
  if (child < 0) {
    perror("measure: fork");
    return 2;
  }
  if (child == 0) {
    dup2(input, 0);
    dup2(output, 1);
    dup2(output, 2);
    execvp(arguments[optind], arguments + optind);
    _exit(127);
  }
  int status;
  struct rusage usage;
  if (wait4(child, &status, 0, &usage) < 0) {
    perror("measure: wait4");
    return 2;
  }
  long long wall = now_ns() - start, sync = 0;
  if (synced >= 0) {
    start = now_ns();
    if (syncfs(synced) < 0) perror("measure: syncfs");
    sync = now_ns() - start;
  }
  FILE *file = fopen(result, "w");
  if (file == NULL) {
    perror("measure: result");
    return 2;
  }
  fprintf(file,
          "{\"wallNs\":%lld,\"syncNs\":%lld,\"userUs\":%lld,\"systemUs\":%lld,\"maxRssKiB\":%ld,\"exitCode\":%d,"
          "\"signal\":%d}\n",
          wall, sync, us(usage.ru_utime), us(usage.ru_stime), usage.ru_maxrss, WIFEXITED(status) ? WEXITSTATUS(status) : -1,
          WIFSIGNALED(status) ? WTERMSIG(status) : 0);
  return fclose(file) == 0 ? 0 : 2;
}
