//! Which network addresses a download may contact. Owns the classification and the allow-list; connecting only to an
//! address that was checked here is `http`'s duty.

use crate::error::StoreError;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an address is not part of the public Internet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressClass {
    /// This machine.
    Loopback,
    /// "Any address"; connects to this machine.
    Unspecified,
    /// This link; cloud metadata services live here.
    LinkLocal,
    /// A private network, unique-local and carrier-grade NAT addresses included.
    Private,
    /// A group of machines, or all of them.
    Multicast,
    /// Reserved, for documentation or for benchmarks.
    Reserved,
    /// The Kubernetes API server.
    ApiServer,
}

impl std::fmt::Display for AddressClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Loopback => "a loopback address",
            Self::Unspecified => "the unspecified address",
            Self::LinkLocal => "a link-local address",
            Self::Private => "a private address",
            Self::Multicast => "a multicast address",
            Self::Reserved => "a reserved address",
            Self::ApiServer => "the API server",
        })
    }
}

/// The class of an address that is not public; `None` for a public one. Addresses that carry an IPv4 address within
/// them (mapped, compatible, 6to4, NAT64, Teredo) are judged by it.
pub fn classify(address: IpAddr) -> Option<AddressClass> {
    match address {
        IpAddr::V4(address) => classify_v4(address),
        IpAddr::V6(address) => classify_v6(address),
    }
}

fn classify_v4(address: Ipv4Addr) -> Option<AddressClass> {
    match address.octets() {
        [0, ..] => Some(AddressClass::Unspecified),
        [127, ..] => Some(AddressClass::Loopback),
        [169, 254, ..] => Some(AddressClass::LinkLocal),
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] => Some(AddressClass::Private),
        [224..=239, ..] | [255, 255, 255, 255] => Some(AddressClass::Multicast),
        [192, 0, 0 | 2, _] | [198, 18 | 19, ..] | [198, 51, 100, _] | [203, 0, 113, _] | [240..=255, ..] => {
            Some(AddressClass::Reserved)
        }
        _ => None,
    }
}

fn classify_v6(address: Ipv6Addr) -> Option<AddressClass> {
    if address.is_unspecified() {
        return Some(AddressClass::Unspecified);
    }
    if address.is_loopback() {
        return Some(AddressClass::Loopback);
    }
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        classify_v4(Ipv4Addr::new(a, b, c, d))
    };
    match address.segments() {
        // Mapped (::ffff:0:0/96), compatible (::/96), translated (::ffff:0:0:0/96), NAT64 (64:ff9b::/96).
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x2002, high, low, ..] => v4(high, low),
        // Teredo carries the client's address inverted.
        [0x2001, 0, _, _, _, _, high, low] => v4(!high, !low),
        [0x64, 0xff9b, 1, ..] | [0xfc00..=0xfdff | 0xfec0..=0xfeff, ..] => Some(AddressClass::Private),
        [0xfe80..=0xfebf, ..] => Some(AddressClass::LinkLocal),
        [0xff00..=0xffff, ..] => Some(AddressClass::Multicast),
        // Only 2000::/3 is global; the rest, documentation (2001:db8::/32, 3fff::/20) and discard-only are not.
        [0x2001, 0xdb8, ..] | [0x3fff, 0..=0x0fff, ..] => Some(AddressClass::Reserved),
        [0x2000..=0x3fff, ..] => None,
        _ => Some(AddressClass::Reserved),
    }
}

/// What may be contacted in spite of its class, and what may not in any case.
#[derive(Clone, Debug, Default)]
pub struct AddressPolicy {
    hosts: Vec<String>,
    networks: Vec<Network>,
    api_servers: Vec<IpAddr>,
}

#[derive(Clone, Copy, Debug)]
struct Network {
    address: IpAddr,
    prefix: u32,
}

impl Network {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix.parse::<u32>().ok()?)),
            None => (text, None),
        };
        let address = address.parse::<IpAddr>().ok()?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.unwrap_or(width);
        (prefix <= width).then_some(Self { address, prefix })
    }

    fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => same_prefix(
                u128::from(network.to_bits()) << 96,
                u128::from(address.to_bits()) << 96,
                self.prefix,
            ),
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                same_prefix(network.to_bits(), address.to_bits(), self.prefix)
            }
            _ => false,
        }
    }

    fn is_single(&self) -> bool {
        self.prefix == if self.address.is_ipv4() { 32 } else { 128 }
    }
}

fn same_prefix(left: u128, right: u128, prefix: u32) -> bool {
    (left ^ right).leading_zeros() >= prefix
}

impl AddressPolicy {
    /// `allow` holds host names, addresses and networks (`10.2.0.0/16`) that may be contacted although they are not
    /// public. `api_servers` are refused unless the allow-list names their host or exactly that address; a network
    /// that merely contains them is not enough.
    pub fn new(
        allow: impl IntoIterator<Item = impl AsRef<str>>,
        api_servers: impl IntoIterator<Item = IpAddr>,
    ) -> Result<Self, StoreError> {
        let mut policy = Self {
            api_servers: api_servers
                .into_iter()
                .map(|address| address.to_canonical())
                .collect(),
            ..Self::default()
        };
        for entry in allow {
            let entry = entry.as_ref().trim();
            if let Some(network) = Network::parse(entry) {
                policy.networks.push(network);
            } else if is_host_name(entry) {
                policy.hosts.push(normal(entry));
            } else {
                let why = format!("{entry:?} is neither a host name nor an address nor a network");
                return Err(StoreError::InvalidConfiguration {
                    what: "allow-list entry",
                    why,
                });
            }
        }
        Ok(policy)
    }

    /// Whether `address`, found under `host`, may be contacted.
    pub fn check(&self, host: &str, address: IpAddr) -> Result<(), StoreError> {
        let address = address.to_canonical();
        let host_allowed = self.hosts.contains(&normal(host));
        let api_server = self.api_servers.contains(&address);
        let class = if api_server {
            Some(AddressClass::ApiServer)
        } else {
            classify(address)
        };
        let address_allowed = self
            .networks
            .iter()
            .any(|network| network.contains(address) && (!api_server || network.is_single()));
        match class {
            Some(class) if !host_allowed && !address_allowed => Err(StoreError::AddressRefused {
                host: host.to_owned(),
                address,
                class,
            }),
            _ => Ok(()),
        }
    }

    /// Resolves `host` and checks every address it has: one refused address refuses the host, so that a name with a
    /// public and a private address cannot be used to reach the private one. The result is not empty.
    pub async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, StoreError> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let addresses: Vec<SocketAddr> = if let Ok(address) = bare.parse::<IpAddr>() {
            vec![SocketAddr::new(address, port)]
        } else {
            let unresolved = |source| StoreError::Unresolved {
                host: host.to_owned(),
                source,
            };
            tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((bare, port)))
                .await
                .map_err(|_| unresolved(None))?
                .map_err(|source| unresolved(Some(source)))?
                .collect()
        };
        if addresses.is_empty() {
            return Err(StoreError::Unresolved {
                host: host.to_owned(),
                source: None,
            });
        }
        for address in &addresses {
            self.check(bare, address.ip())?;
        }
        Ok(addresses)
    }
}

fn normal(host: &str) -> String {
    host.trim_end_matches('.').to_ascii_lowercase()
}

fn is_host_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}
