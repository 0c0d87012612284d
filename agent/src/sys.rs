//! The agent's only `unsafe`: what must happen between fork and exec, and a system call without a safe form.
//!
//! Owns: children that die with the thread that started them. Must not decide what is started.

#![expect(unsafe_code, reason = "pre_exec and ioprio_set have no safe form")]

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};

/// Starts a child that the kernel kills when the calling *thread* ends: call it from one that never does.
pub(crate) fn spawn_bound(command: &mut Command) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec only two system calls are made; both are async-signal-safe and nothing is
    // allocated, locked or unwound.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have ended before the line above took effect.
            if getppid() == Some(parent) {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
    command.spawn()
}

const IOPRIO_WHO_PROCESS: libc::c_int = 1;

/// Sets the I/O priority of one thread to the kernel's number.
pub(crate) fn set_io_priority(thread: i32, value: i32) -> io::Result<()> {
    // SAFETY: three integers; the kernel checks them and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, thread, value) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
