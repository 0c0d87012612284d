//! What pool and workers can't do whatever they are made to do: reach a network.
//!
//! Owns: the seccomp filter, inherited by everything that the pool starts. Must not depend on where it runs: a container
//! runtime's own filter comes on top.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::io;

/// From now on this process and its children can open sockets to processes on this machine and to the kernel only.
///
/// Call it before the first thread starts: threads that run already keep their rights.
pub(crate) fn deny_internet() -> io::Result<()> {
    let program = filter().map_err(io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let other_than = |family: libc::c_int| {
        let family = u64::try_from(family).unwrap_or(0);
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family)
    };
    // Drivers talk to the kernel by netlink.
    let internet = SeccompRule::new(vec![other_than(libc::AF_UNIX)?, other_than(libc::AF_NETLINK)?])?;
    let rules = [
        (libc::SYS_socket, vec![internet]),
        // Its operations open sockets as well, and no filter sees them.
        (libc::SYS_io_uring_setup, vec![]),
    ];
    let refuse = SeccompAction::Errno(u32::try_from(libc::EACCES).unwrap_or(1));
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules.into(), SeccompAction::Allow, refuse, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn internet_sockets_are_refused_and_those_on_this_machine_are_not() {
        // On a thread of its own: the filter stays for as long as its thread lives.
        std::thread::spawn(|| {
            assert!(TcpListener::bind("127.0.0.1:0").is_ok(), "before");
            deny_internet().unwrap();
            for refused in [
                TcpListener::bind("127.0.0.1:0").map(drop),
                TcpListener::bind("[::1]:0").map(drop),
                UdpSocket::bind("127.0.0.1:0").map(drop),
            ] {
                assert_eq!(
                    refused.unwrap_err().kind(),
                    io::ErrorKind::PermissionDenied,
                    "an internet socket"
                );
            }
            UnixDatagram::unbound().unwrap();
        })
        .join()
        .unwrap();
    }
}
