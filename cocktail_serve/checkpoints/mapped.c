/* Files mapped into memory that may be cut short under us.
 *
 * Reading a page of a mapping that lies beyond its file's end is SIGBUS, which ends the process. Here it marks the
 * mapping as lost and puts pages of zeros in its place, so that who reads it comes to an end, asks, and throws away
 * what it made. (Wayland's library and systemd's journal keep their processes alive in the same way.) What is no
 * mapping of ours goes to the handler that was there before.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_MAPPINGS 65536 /* more than Linux lets a process have by default */

struct mapping {
    _Atomic uintptr_t begin;
    _Atomic size_t length; /* 0: free */
    atomic_int is_lost;
};

static struct mapping mappings[MAX_MAPPINGS];
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER; /* by who maps and unmaps; the handler waits for nobody */
static atomic_int num_used; /* mappings beyond were never used */
static atomic_int num_libraries_reading;
static atomic_int num_pages_lost;
static atomic_int is_passed_on;
static struct sigaction previous;

static int put_zeros(uintptr_t begin, size_t length) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE; /* nothing is written there */
#endif
    return mmap((void *)begin, length, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;
}

static int put_zeros_around(uintptr_t address) {
    int used = atomic_load(&num_used);
    for (int i = 0; i < used; i++) {
        uintptr_t begin = atomic_load(&mappings[i].begin);
        size_t length = atomic_load(&mappings[i].length);
        if (address - begin < length) {
            atomic_store(&mappings[i].is_lost, 1);
            return put_zeros(begin, length);
        }
    }
    if (atomic_load(&num_libraries_reading)) {
        uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
        atomic_fetch_add(&num_pages_lost, 1);
        return put_zeros(address & ~(page - 1), page);
    }
    return 0;
}

/* Once: a handler that restores us and raises the signal again must not find itself here. */
static void pass_on(int number, siginfo_t *info, void *context) {
    int has_handler = (previous.sa_flags & SA_SIGINFO) || (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN);
    if (!has_handler || atomic_exchange(&is_passed_on, 1)) {
        signal(number, SIG_DFL);
        if (info->si_code <= 0)
            raise(number); /* sent by somebody; a fault repeats itself */
    } else if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else {
        previous.sa_handler(number);
    }
}

static void on_bus_error(int number, siginfo_t *info, void *context) {
    int callers = errno;
    if (info->si_code <= 0 || !put_zeros_around((uintptr_t)info->si_addr))
        pass_on(number, info, context);
    errno = callers;
}

/* Makes the handler the process's, also where another was set since the last call. */
void cocktail_guard(void) {
    struct sigaction current, ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    sigemptyset(&ours.sa_mask);
    pthread_mutex_lock(&changing);
    sigaction(SIGBUS, NULL, &current);
    if (!(current.sa_flags & SA_SIGINFO) || current.sa_sigaction != on_bus_error) {
        previous = current;
        atomic_store(&is_passed_on, 0);
        sigaction(SIGBUS, &ours, NULL);
    }
    pthread_mutex_unlock(&changing);
}

/* The whole of a file, private; NULL where it cannot be mapped. `place` is what the other calls want. */
void *cocktail_map(int file, size_t length, int *place) {
    /* writable, which torch wants; nothing is written, so nothing is copied */
    void *begin = length ? mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0) : MAP_FAILED;
    if (begin == MAP_FAILED)
        return NULL;
    pthread_mutex_lock(&changing);
    int free = 0;
    while (free < MAX_MAPPINGS && atomic_load(&mappings[free].length))
        free++;
    if (free < MAX_MAPPINGS) {
        atomic_store(&mappings[free].is_lost, 0);
        atomic_store(&mappings[free].begin, (uintptr_t)begin);
        atomic_store(&mappings[free].length, length);
        if (free >= atomic_load(&num_used))
            atomic_store(&num_used, free + 1);
    } else {
        munmap(begin, length);
        begin = NULL;
    }
    pthread_mutex_unlock(&changing);
    *place = free;
    return begin;
}

int cocktail_is_lost(int place) { return atomic_load(&mappings[place].is_lost); }

void cocktail_unmap(int place) {
    pthread_mutex_lock(&changing);
    size_t length = atomic_load(&mappings[place].length);
    void *begin = (void *)atomic_load(&mappings[place].begin);
    atomic_store(&mappings[place].length, 0); /* before the addresses are somebody else's */
    munmap(begin, length);
    pthread_mutex_unlock(&changing);
}

/* Between `1` and `-1` a library reads files that it maps itself: any page lost then, whose file nobody told us, is
 * zeros too. Returns how many pages were lost so far. */
int cocktail_library_reads(int change) {
    atomic_fetch_add(&num_libraries_reading, change);
    return atomic_load(&num_pages_lost);
}
