/* For linux.uml on processors with more register state than it knows (AMX): it writes back the part that it has read, which Linux refuses
 * (EFAULT: a whole buffer is wanted), and its init dies. Preloaded, this puts the part into the whole first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#define XSTATE 0x202
static char whole[1 << 16];
long ptrace(enum __ptrace_request request, ...) {
    va_list list; va_start(list, request);
    long pid = va_arg(list, long); void *address = va_arg(list, void *); void *data = va_arg(list, void *);
    va_end(list);
    if ((int)request == PTRACE_SETREGSET && (long)address == XSTATE) {
        struct iovec *theirs = data, all = {whole, sizeof whole};
        if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, address, &all) < 0) return -1;
        memcpy(whole, theirs->iov_base, theirs->iov_len < all.iov_len ? theirs->iov_len : all.iov_len);
        return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, address, &all);
    }
    long peeked;
    if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
        long result = syscall(SYS_ptrace, (long)request, pid, address, &peeked);
        return result < 0 ? result : (errno = 0, peeked);
    }
    return syscall(SYS_ptrace, (long)request, pid, address, data);
}
