//! The only `unsafe` of this binary: what Linux offers and safe crates don't.
//!
//! Owns the proof obligations, one SAFETY comment per block. Must not decide anything.
#![expect(unsafe_code, reason = "the one file of this binary that may")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Sets variables of this process's environment that candle reads.
///
/// Call it before the first thread starts.
pub(crate) fn set_environment_before_threads(variables: &[(&str, String)]) -> io::Result<()> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("{threads} threads run already")));
    }
    for (name, value) in variables {
        // SAFETY: this is the only thread (just counted), so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
    Ok(())
}

/// A kernel timer that stops this process, whatever any thread of it does.
pub(crate) struct Fence(libc::timer_t);

// SAFETY: a timer id is a number to the kernel; any thread of the process may use it.
unsafe impl Send for Fence {}

impl Fence {
    /// Makes the timer and arms it: SIGSTOP to this process at `at`, CLOCK_BOOTTIME nanoseconds. It fires on a stopped
    /// process too, and at once when `at` has passed.
    pub(crate) fn arm(at: u64) -> io::Result<Self> {
        // SAFETY: sigevent is plain data for which all zeroes are valid.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGSTOP;
        let mut id: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both pointers are to live variables of the right types.
        if unsafe { libc::timer_create(libc::CLOCK_BOOTTIME, &raw mut event, &raw mut id) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let fence = Self(id);
        fence.set(at)?;
        Ok(fence)
    }

    /// Moves the fence.
    pub(crate) fn set(&self, at: u64) -> io::Result<()> {
        // 0 would disarm it.
        let at = at.max(1);
        let part = |value: u64| libc::time_t::try_from(value).map_err(io::Error::other);
        let when = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: part(at / 1_000_000_000)?,
                tv_nsec: part(at % 1_000_000_000)?,
            },
        };
        // SAFETY: the timer lives as long as `self`, `when` is a live itimerspec, and the old value is not asked for.
        if unsafe { libc::timer_settime(self.0, libc::TIMER_ABSTIME, &raw const when, std::ptr::null_mut()) }
            == 0
        {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// The user at the other end of a socket, by the kernel's word. The safe way in rustix takes a peer of another pid
/// namespace, whose number reads 0, for an error: in a pod the agent is one.
pub(crate) fn peer_user(stream: &std::os::unix::net::UnixStream) -> io::Result<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).map_err(io::Error::other)?;
    // SAFETY: `peer` is a live ucred and `length` its size; the kernel writes at most that many bytes.
    let failed = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    if failed == 0 {
        Ok(peer.uid)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Calls `act` from a thread of its own when this process is asked to end (SIGTERM), instead of ending it.
///
/// Call it before the first thread starts: the signal must be blocked in all of them.
pub(crate) fn on_termination(act: impl FnOnce() + Send + 'static) -> io::Result<()> {
    // SAFETY: sigset_t is plain data; sigemptyset and sigaddset initialise it before it is read.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        set
    };
    // SAFETY: `set` is a live signal set, and the old mask is not asked for.
    let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut signal = 0;
            // SAFETY: both point to live variables of the right types.
            if unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
                act();
            }
        })
        .map(drop)
}

/// Whether one thread (0 = the calling one) takes no processor away from another at the moment it wakes up, nice value and
/// all else as they were.
pub(crate) fn set_batch(thread: i32, batch: bool) -> io::Result<()> {
    let policy = if batch {
        libc::SCHED_BATCH
    } else {
        libc::SCHED_OTHER
    };
    // The kernel's `sched_param` of both policies: a priority of 0.
    let priority: libc::c_int = 0;
    // SAFETY: the last argument is a live integer that the kernel reads.
    let result = unsafe { libc::syscall(libc::SYS_sched_setscheduler, thread, policy, &raw const priority) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

const IOPRIO_WHO_PROCESS: libc::c_int = 1;

/// Sets the I/O priority of one thread (0 = the calling one) to the kernel's number.
pub(crate) fn set_io_priority(thread: i32, value: i32) -> io::Result<()> {
    // SAFETY: three integers; the kernel checks them.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, thread, value) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The kernel's number of a thread's I/O priority.
pub(crate) fn io_priority(thread: i32) -> io::Result<i32> {
    // SAFETY: two integers; the kernel checks them.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, thread) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        i32::try_from(result).map_err(io::Error::other)
    }
}

/// Makes the child that this command starts end with the *thread* that starts it, and closes to it every descriptor but
/// the three standard ones.
pub(crate) fn tie_to_this_thread(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    let parent = rustix::process::getpid();
    let before_exec = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // The parent may have gone before the call above.
        if rustix::process::getppid() != Some(parent) {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe));
        }
        // SAFETY: marks descriptors close-on-exec and touches no memory.
        let closed = unsafe {
            libc::syscall(
                libc::SYS_close_range,
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            )
        };
        if closed != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls only: no allocation, no lock.
    unsafe { command.pre_exec(before_exec) };
}

/// Bytes of a file's first `length` that are in the page cache; looking brings none in.
#[cfg(test)]
pub(crate) fn cached(file: &std::fs::File, length: usize) -> io::Result<usize> {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    // SAFETY: takes a number and answers with one.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let page = usize::try_from(page).map_err(io::Error::other)?;
    let mut here = vec![0_u8; length.div_ceil(page)];
    // SAFETY: a fresh mapping at an address that the kernel chooses; `here` has a byte for each of its pages; it is
    // unmapped once, and nothing looks into it.
    unsafe {
        let address = mmap(
            std::ptr::null_mut(),
            length,
            ProtFlags::READ,
            MapFlags::PRIVATE,
            file,
            0,
        )?;
        let found = libc::mincore(address, length, here.as_mut_ptr());
        let error = io::Error::last_os_error();
        munmap(address, length)?;
        if found != 0 {
            return Err(error);
        }
    }
    Ok(here.iter().filter(|page| **page & 1 == 1).count() * page)
}
