//! Loopback ports for programs that are started again at the same address.
//!
//! Owns: choosing them below the range that the kernel itself gives to connections and to port 0: there, what runs beside
//! a test can take the port of a program that is down, even a connection that looks for that program. Must not: serve.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result};

/// Below it are well-known services.
const LOWEST: u16 = 10_000;
/// Ports that one process may try, a block of its own among those of processes with near ids.
const BLOCK: u16 = 128;

/// The lowest port that the kernel gives to whoever asks for any.
fn kernels_own() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let lowest = range.split_whitespace().next().and_then(|low| low.parse().ok());
    lowest.unwrap_or(32_768).max(LOWEST + BLOCK)
}

/// An address on loopback at which nothing listens, and that is given to nobody else.
pub fn fixed() -> Result<SocketAddr> {
    static TRIED: AtomicU16 = AtomicU16::new(0);
    let blocks = (kernels_own() - LOWEST) / BLOCK;
    let block = u16::try_from(std::process::id() % u32::from(blocks))?;
    loop {
        let next = TRIED.fetch_add(1, Ordering::Relaxed);
        let next = (next < BLOCK).then(|| LOWEST + block * BLOCK + next);
        let port = next.with_context(|| format!("this process has tried all of its {BLOCK} ports"))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fixed_address_is_free_given_once_and_below_what_the_kernel_gives_away() {
        let taken = TcpListener::bind(fixed().unwrap()).unwrap();
        let next = fixed().unwrap();
        assert_ne!(taken.local_addr().unwrap(), next);
        let any = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!((LOWEST..any.port()).contains(&next.port()), "{next} and {any}");
    }
}
