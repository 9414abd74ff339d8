// Adds to the time of day the seconds that stand in a file, for a program that loads this before the C library.
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset;

__attribute__((constructor)) static void open_offset(void) {
	int file = open(getenv("CLOCK_OFFSET"), O_RDONLY);
	offset = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
	if (offset == MAP_FAILED) {
		abort();
	}
}

int clock_gettime(clockid_t clock, struct timespec *now) {
	int result = (int)syscall(SYS_clock_gettime, clock, now);
	if (clock == CLOCK_REALTIME && offset) {
		now->tv_sec += *offset;
	}
	return result;
}
