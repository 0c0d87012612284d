//! `gogrid-worker confined`: tries what a worker must not be able to do, from where workers run.
//!
//! Owns: the attempts. Run it in the `workers` container of an agent's pod. Must not leave anything behind where an attempt
//! succeeds.

use crate::sandbox;
use std::fs::OpenOptions;
use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

/// Where no model file has any business.
const PLACES: [&str; 5] = ["/", "/usr/bin", "/etc", "/var", "/proc/sys/kernel"];
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
const PATIENCE: Duration = Duration::from_secs(3);

/// Prints one line an attempt; whether all of them were refused.
pub(crate) fn report(api_server: SocketAddr) -> io::Result<bool> {
    sandbox::deny_internet()?;
    let mut attempts = vec![
        (
            format!("connect to {api_server}"),
            TcpStream::connect_timeout(&api_server, PATIENCE).map(drop),
        ),
        (
            "open an IPv6 socket".to_owned(),
            UdpSocket::bind("[::1]:0").map(drop),
        ),
        (
            "read a service account's token".to_owned(),
            std::fs::read(TOKEN).map(drop),
        ),
    ];
    attempts.extend(
        PLACES
            .iter()
            .map(|place| (format!("write to {place}"), write_to(Path::new(place)))),
    );
    let mut all_refused = true;
    for (what, outcome) in attempts {
        if let Err(error) = &outcome {
            println!("refused: {what}: {error}");
        } else {
            println!("ALLOWED: {what}");
        }
        all_refused &= outcome.is_err();
    }
    Ok(all_refused)
}

fn write_to(place: &Path) -> io::Result<()> {
    let path = place.join("gogrid-confined");
    OpenOptions::new().write(true).create_new(true).open(&path)?;
    std::fs::remove_file(path)
}
