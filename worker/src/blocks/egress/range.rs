//! What kind of address it is: the special-purpose registries of IANA, and the addresses that clouds reserve for
//! themselves. No policy here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// What an address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Reached over the internet.
    Public,
    /// Reached inside an organisation.
    Private,
    /// For something else than serving others; the text ends a sentence that says why it is refused.
    Special(&'static str),
}

const LOOPBACK: &str = "it is a loopback address";
const LINK_LOCAL: &str = "it is a link-local address";
const UNSPECIFIED: &str = "it is an unspecified address";
const MULTICAST: &str = "it is a multicast address";
const DOCUMENTATION: &str = "it is a documentation address";
const TRANSLATED: &str = "it is an address of a translation range";
const METADATA: &str = "it is an address of a cloud's metadata service";
const RESERVED: &str = "it is an address of a reserved range";

/// Searched from the top: a narrower range stands above the one that it lies in.
const SPECIAL: [(IpNet, &str); 34] = [
    (v4(0, 0, 0, 0, 32), UNSPECIFIED),
    (v4(0, 0, 0, 0, 8), RESERVED),
    (v4(127, 0, 0, 0, 8), LOOPBACK),
    (v4(169, 254, 0, 0, 16), LINK_LOCAL),
    (v4(192, 0, 0, 0, 24), RESERVED),
    (v4(192, 0, 2, 0, 24), DOCUMENTATION),
    (v4(192, 88, 99, 0, 24), TRANSLATED),
    (v4(198, 18, 0, 0, 15), RESERVED),
    (v4(198, 51, 100, 0, 24), DOCUMENTATION),
    (v4(203, 0, 113, 0, 24), DOCUMENTATION),
    (v4(224, 0, 0, 0, 4), MULTICAST),
    (v4(240, 0, 0, 0, 4), RESERVED),
    // The metadata services outside link-local: Alibaba, Azure, AWS, Google.
    (v4(100, 100, 100, 200, 32), METADATA),
    (v4(168, 63, 129, 16, 32), METADATA),
    (v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0], 32), METADATA),
    (v6([0xfd20, 0xce, 0, 0, 0, 0, 0, 0], 32), METADATA),
    (v6([0, 0, 0, 0, 0, 0, 0, 0], 128), UNSPECIFIED),
    (v6([0, 0, 0, 0, 0, 0, 0, 1], 128), LOOPBACK),
    (v6([0, 0, 0, 0, 0, 0, 0, 0], 96), TRANSLATED),
    (v6([0, 0, 0, 0, 0xffff, 0, 0, 0], 96), TRANSLATED),
    (v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96), TRANSLATED),
    (v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48), TRANSLATED),
    (v6([0, 0, 0, 0, 0, 0, 0, 0], 8), RESERVED),
    (v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64), RESERVED),
    (v6([0x100, 0, 0, 1, 0, 0, 0, 0], 64), RESERVED),
    (v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32), TRANSLATED),
    (v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23), RESERVED),
    (v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32), DOCUMENTATION),
    (v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20), DOCUMENTATION),
    (v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16), TRANSLATED),
    (v6([0x5f00, 0, 0, 0, 0, 0, 0, 0], 16), RESERVED),
    (v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), LINK_LOCAL),
    (v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10), RESERVED),
    (v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), MULTICAST),
];

const PRIVATE: [IpNet; 5] = [
    v4(10, 0, 0, 0, 8),
    v4(100, 64, 0, 0, 10),
    v4(172, 16, 0, 0, 12),
    v4(192, 168, 0, 0, 16),
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
];

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix)
}

const fn v6(segments: [u16; 8], prefix: u8) -> IpNet {
    let [a, b, c, d, e, f, g, h] = segments;
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h)), prefix)
}

/// What one face of an address is for.
pub(super) fn kind(face: IpAddr) -> Kind {
    if let Some((_, reason)) = SPECIAL.iter().find(|(net, _)| net.contains(&face)) {
        return Kind::Special(reason);
    }
    if PRIVATE.iter().any(|net| net.contains(&face)) { Kind::Private } else { Kind::Public }
}

/// All that an address may mean to the network: itself, and the IPv4 addresses that it carries inside. One that is
/// only mapped is the IPv4 address: that is what the kernel dials.
pub(super) fn faces(ip: IpAddr) -> Vec<IpAddr> {
    match ip {
        IpAddr::V4(_) => vec![ip],
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(mapped) => vec![mapped.into()],
            None => std::iter::once(ip).chain(embedded(v6).into_iter().map(IpAddr::V4)).collect(),
        },
    }
}

fn embedded(ip: Ipv6Addr) -> Vec<Ipv4Addr> {
    let segments = ip.segments();
    let [_, first, second, .., sixth, seventh, last_high, last_low] = segments;
    let low = ipv4(last_high, last_low);
    let mut found = Vec::new();
    match segments {
        // ::1 and :: are themselves, not 0.0.0.1 and 0.0.0.0.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => {}
        // Compatible, translated (SIIT), NAT64 and its local-use range.
        [0, 0, 0, 0, 0, 0, ..]
        | [0, 0, 0, 0, 0xffff, 0, ..]
        | [0x64, 0xff9b, 0, 0, 0, 0, ..]
        | [0x64, 0xff9b, 1, ..] => {
            found.push(low);
        }
        // Teredo: the server in clear, the client inverted.
        [0x2001, 0, server_high, server_low, ..] => {
            found.push(ipv4(server_high, server_low));
            found.push(ipv4(!last_high, !last_low));
        }
        // 6to4.
        [0x2002, ..] => found.push(ipv4(first, second)),
        _ => {}
    }
    // ISATAP, below any prefix.
    if matches!((sixth, seventh), (0 | 0x200, 0x5efe)) {
        found.push(low);
    }
    found
}

fn ipv4(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low))
}

/// Whether two addresses may be one machine's same door. All that leads to this machine is one place.
pub(super) fn is_same(one: IpAddr, other: IpAddr) -> bool {
    let others = faces(other);
    faces(one).iter().any(|face| others.iter().any(|other| face == other || is_here(*face) && is_here(*other)))
}

fn is_here(face: IpAddr) -> bool {
    face.is_loopback() || face.is_unspecified()
}
