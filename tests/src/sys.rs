//! The only unsafe code of this crate: two calls into libc that have no safe face.
#![expect(unsafe_code, reason = "fork hooks and exit hooks have no safe interface")]

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Result, ensure};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

/// Makes the child die with SIGKILL when the thread that spawns it ends, however that comes about.
pub(crate) fn die_with_spawner(command: &mut Command) {
    let parent: Pid = getpid();
    let hook = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the line above took effect; then nobody would ever send the signal.
        if getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::Error::from(rustix::io::Errno::SRCH))
        }
    };
    // SAFETY: between fork and exec the hook makes two system calls and builds an error from a number: it takes no
    // lock and allocates nothing, so it is sound in the child of a process with many threads.
    unsafe { command.pre_exec(hook) };
}

/// Runs `hook` when the process ends by returning from `main` or by `exit`.
pub(crate) fn at_exit(hook: extern "C" fn()) -> Result<()> {
    // SAFETY: `hook` is a plain function that lives for ever and, being `extern "C"`, can't unwind into libc.
    let failed = unsafe { libc::atexit(hook) };
    ensure!(failed == 0, "libc takes no more exit hooks");
    Ok(())
}

/// From now on that process can't end: killed, it stays as it was in its last moment, until the calling thread ends.
pub(crate) fn hold_at_its_end(pid: i32) -> io::Result<()> {
    // SAFETY: takes numbers only; the calling thread becomes the tracer of another process.
    let failed = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0_usize, libc::PTRACE_O_TRACEEXIT) };
    if failed == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// I/O priority of a thread: class << 13 | level, as `ioprio_get(2)` answers.
pub(crate) fn io_priority(thread: u32) -> io::Result<i64> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: takes two integers and touches no memory of ours.
    let answer = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, thread) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

/// A system call that does nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Feint {
    /// Its number.
    pub(crate) call: i64,
    /// Only with this third argument.
    pub(crate) third: Option<u32>,
    /// What the kernel answers; 0 = "done".
    pub(crate) errno: i32,
}

/// Where a filter finds the low half of a call's third argument.
const THIRD_ARGUMENT: u32 = 16 + 2 * 8;

/// From now on these system calls of this process and its children do nothing.
pub(crate) fn feign(feints: &[Feint]) -> io::Result<()> {
    let statement = |code, k| libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    };
    let jump = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    let code = |parts: u32| u16::try_from(parts).map_err(io::Error::other);
    let load = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS)?;
    let equal = code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K)?;
    let answer = code(libc::BPF_RET | libc::BPF_K)?;
    let mut filter = vec![];
    for feint in feints {
        let number = u32::try_from(feint.call).map_err(io::Error::other)?;
        let errno = u32::try_from(feint.errno).map_err(io::Error::other)?;
        filter.push(statement(load, 0));
        filter.push(jump(equal, number, if feint.third.is_some() { 3 } else { 1 }));
        if let Some(third) = feint.third {
            filter.push(statement(load, THIRD_ARGUMENT));
            filter.push(jump(equal, third, 1));
        }
        filter.push(statement(answer, libc::SECCOMP_RET_ERRNO | errno));
    }
    filter.push(statement(answer, libc::SECCOMP_RET_ALLOW));
    let len = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog {
        len,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: `program` points at `filter`, which lives until after the calls; the kernel copies it.
    let installed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
    };
    if installed {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Bytes of a file that are in the page cache; looking brings none in.
pub(crate) fn cached_bytes(file: &std::fs::File) -> io::Result<u64> {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    if length == 0 {
        return Ok(0);
    }
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
    let pages = here.iter().filter(|page| **page & 1 == 1).count();
    u64::try_from(pages * page).map_err(io::Error::other)
}
