//! Which addresses may be contacted.

use gogrid_store::{AddressClass, AddressPolicy, StoreError, classify};
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn none() -> AddressPolicy {
    AddressPolicy::new([""; 0], []).unwrap()
}

#[test]
fn addresses_that_are_not_public_have_a_class() {
    use AddressClass::{LinkLocal, Loopback, Multicast, Private, Reserved, Unspecified};
    for (text, class) in [
        ("0.0.0.0", Unspecified),
        ("0.1.2.3", Unspecified),
        ("127.0.0.1", Loopback),
        ("127.255.255.254", Loopback),
        ("10.0.0.1", Private),
        ("172.16.0.1", Private),
        ("172.31.255.255", Private),
        ("192.168.1.1", Private),
        ("100.64.0.1", Private),
        ("169.254.169.254", LinkLocal),
        ("224.0.0.1", Multicast),
        ("255.255.255.255", Multicast),
        ("240.0.0.1", Reserved),
        ("192.0.2.1", Reserved),
        ("198.18.0.1", Reserved),
        ("::", Unspecified),
        ("::1", Loopback),
        ("::ffff:127.0.0.1", Loopback),
        ("::ffff:10.0.0.1", Private),
        ("::127.0.0.1", Loopback),
        ("::ffff:0:127.0.0.1", Loopback),
        ("64:ff9b::a00:1", Private),
        ("64:ff9b:1::1", Private),
        ("2002:7f00:1::", Loopback),
        ("2001:0:0:0:0:0:80ff:fffe", Loopback),
        ("fc00::1", Private),
        ("fd12:3456::1", Private),
        ("fec0::1", Private),
        ("fe80::1", LinkLocal),
        ("ff02::1", Multicast),
        ("2001:db8::1", Reserved),
        ("100::1", Reserved),
        ("4000::1", Reserved),
    ] {
        assert_eq!(classify(ip(text)), Some(class), "{text}");
    }
    for text in [
        "1.1.1.1",
        "172.32.0.1",
        "100.128.0.1",
        "192.0.1.1",
        "2606:4700::1111",
        "::ffff:1.1.1.1",
    ] {
        assert_eq!(classify(ip(text)), None, "{text}");
    }
}

#[test]
fn a_refusal_names_host_address_and_class() {
    let error = none()
        .check("models.example", ip("::ffff:169.254.169.254"))
        .unwrap_err();
    assert_eq!(error.reason(), "AddressRefused");
    assert_eq!(
        error.to_string(),
        "models.example resolves to 169.254.169.254, which is a link-local address and not on the allow-list"
    );
}

#[test]
fn the_allow_list_takes_hosts_addresses_and_networks() {
    let policy =
        AddressPolicy::new(["Mirror.internal.", "10.2.0.0/16", "fd00::/8", "127.0.0.1"], []).unwrap();
    policy.check("mirror.internal", ip("192.168.1.1")).unwrap();
    policy.check("x", ip("10.2.255.1")).unwrap();
    policy.check("x", ip("::ffff:10.2.0.1")).unwrap();
    policy.check("x", ip("fd12::1")).unwrap();
    policy.check("x", ip("127.0.0.1")).unwrap();
    for refused in ["10.3.0.1", "127.0.0.2", "fc00::1", "192.168.1.1"] {
        assert!(policy.check("x", ip(refused)).is_err(), "{refused}");
    }
    for wrong in ["", "10.0.0.0/33", "a b", "http://x", "::/129"] {
        let error = AddressPolicy::new([wrong], []).unwrap_err();
        assert_eq!(error.reason(), "InvalidConfiguration", "{wrong}");
    }
}

#[test]
fn the_api_server_is_refused_though_its_address_is_public_or_its_network_allowed() {
    let servers = [ip("10.2.0.1"), ip("1.2.3.4")];
    let policy = AddressPolicy::new(["10.0.0.0/8"], servers).unwrap();
    policy.check("x", ip("10.2.0.2")).unwrap();
    for server in ["10.2.0.1", "1.2.3.4", "::ffff:1.2.3.4"] {
        let refused = policy.check("x", ip(server));
        assert!(
            matches!(
                refused,
                Err(StoreError::AddressRefused {
                    class: AddressClass::ApiServer,
                    ..
                })
            ),
            "{server}"
        );
    }
    AddressPolicy::new(["10.2.0.1/32"], servers)
        .unwrap()
        .check("x", ip("10.2.0.1"))
        .unwrap();
}

#[tokio::test]
async fn literal_addresses_and_local_names_are_checked_after_resolution() {
    for host in ["127.0.0.1", "[::1]", "localhost"] {
        assert!(
            matches!(
                none().resolve(host, 80).await,
                Err(StoreError::AddressRefused { .. })
            ),
            "{host}"
        );
    }
    let allowed = AddressPolicy::new(["127.0.0.1"], []).unwrap();
    assert_eq!(
        allowed.resolve("127.0.0.1", 81).await.unwrap(),
        ["127.0.0.1:81".parse().unwrap()]
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_standard_library_calls_local_is_refused(bits in any::<u32>(), high in 0_u8..8) {
        // Half of the draws are pulled into the interesting ranges.
        let first = [127_u8, 10, 169, 172, 192, 224, 0, 100][usize::from(high)];
        for address in [Ipv4Addr::from_bits(bits), Ipv4Addr::from_bits(bits & 0x00ff_ffff | u32::from(first) << 24)] {
            let local = address.is_loopback() || address.is_private() || address.is_link_local()
                || address.is_multicast() || address.is_unspecified() || address.is_broadcast()
                || address.is_documentation();
            let class = classify(IpAddr::V4(address));
            prop_assert!(!local || class.is_some(), "{address}");
            // An address inside another is judged like itself.
            let mapped = classify(IpAddr::V6(address.to_ipv6_mapped()));
            prop_assert_eq!(mapped, class);
            let [a, b, c, d] = address.octets();
            let pair = |x, y| u16::from_be_bytes([x, y]);
            let six_to_four = Ipv6Addr::new(0x2002, pair(a, b), pair(c, d), 0, 0, 0, 0, 1);
            prop_assert_eq!(classify(IpAddr::V6(six_to_four)), class);
            let nat64 = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, pair(a, b), pair(c, d));
            prop_assert_eq!(classify(IpAddr::V6(nat64)), class);
        }
    }

    #[test]
    fn whatever_is_not_global_unicast_is_refused(bits in any::<u128>()) {
        let address = Ipv6Addr::from_bits(bits);
        let local = address.is_loopback() || address.is_unspecified() || address.is_multicast()
            || address.is_unique_local() || address.is_unicast_link_local();
        prop_assert!(!local || classify(IpAddr::V6(address)).is_some());
        let global = address.segments()[0] & 0xe000 == 0x2000;
        let carries_v4 = address.to_ipv4_mapped().is_some() || address.to_ipv4().is_some()
            || address.segments()[0] == 0x64;
        prop_assert!(global || carries_v4 || classify(IpAddr::V6(address)).is_some());
    }

    #[test]
    fn a_network_contains_exactly_its_prefix(network in any::<u32>(), prefix in 0_u32..=32, flip in 0_u32..32) {
        let entry = format!("{}/{prefix}", Ipv4Addr::from_bits(network));
        // As API server the address is refused for sure unless exactly it is listed; as private one the network decides.
        let network = network & 0x00ff_ffff | 10 << 24;
        let entry10 = format!("{}/{prefix}", Ipv4Addr::from_bits(network));
        prop_assert!(AddressPolicy::new([entry], []).is_ok());
        let policy = AddressPolicy::new([entry10], []).unwrap();
        prop_assert!(policy.check("x", IpAddr::V4(Ipv4Addr::from_bits(network))).is_ok());
        let other = Ipv4Addr::from_bits(network ^ 1 << (31 - flip));
        prop_assume!(classify(IpAddr::V4(other)).is_some());
        prop_assert_eq!(policy.check("x", IpAddr::V4(other)).is_ok(), flip >= prefix);
    }
}
