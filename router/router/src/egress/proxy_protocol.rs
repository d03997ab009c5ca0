//! PROXY protocol version 2: tells the target who the client is. Pure.
//!
//! <https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt>, section 2.2.

use std::net::{IpAddr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, on behalf of a client.
const COMMAND_PROXY: u8 = 0x21;
/// Version 2, on the proxy's own behalf: there is no client address.
const COMMAND_LOCAL: u8 = 0x20;
const FAMILY_UNSPECIFIED: u8 = 0x00;
const FAMILY_TCP4: u8 = 0x11;
const FAMILY_TCP6: u8 = 0x21;
/// An opaque id of the connection, to match logs.
const TLV_UNIQUE_ID: u8 = 0x05;

/// The header for a connection from `client` to `target`, with the flow's id.
pub(super) fn header(client: Option<SocketAddr>, target: SocketAddr, flow_id: &[u8]) -> Vec<u8> {
    let (command, family, mut body) = match client {
        None => (COMMAND_LOCAL, FAMILY_UNSPECIFIED, Vec::new()),
        Some(client) => {
            let (family, body) = addresses(client, target);
            (COMMAND_PROXY, family, body)
        }
    };
    // Ids are 16 bytes; a longer one of a peer is cut to what the length field holds.
    let id = &flow_id[..flow_id.len().min(128)];
    body.push(TLV_UNIQUE_ID);
    body.extend(length(id.len()));
    body.extend(id);
    let mut header = SIGNATURE.to_vec();
    header.extend([command, family]);
    header.extend(length(body.len()));
    header.extend(body);
    header
}

fn addresses(client: SocketAddr, target: SocketAddr) -> (u8, Vec<u8>) {
    let mut body = Vec::with_capacity(36);
    let family = match (client.ip().to_canonical(), target.ip().to_canonical()) {
        (IpAddr::V4(client), IpAddr::V4(target)) => {
            body.extend(client.octets());
            body.extend(target.octets());
            FAMILY_TCP4
        }
        (client, target) => {
            body.extend(v6_octets(client));
            body.extend(v6_octets(target));
            FAMILY_TCP6
        }
    };
    body.extend(client.port().to_be_bytes());
    body.extend(target.port().to_be_bytes());
    (family, body)
}

fn v6_octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn length(len: usize) -> [u8; 2] {
    u16::try_from(len).expect("invariant: addresses and one short TLV").to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_family_and_of_two() {
        let client = "192.0.2.1:1000".parse().unwrap();
        let header_v4 = header(Some(client), "127.0.0.1:80".parse().unwrap(), b"id");
        assert_eq!(header_v4[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x11");
        assert_eq!(header_v4[16..], *b"\xc0\0\x02\x01\x7f\0\0\x01\x03\xe8\0\x50\x05\0\x02id");
        let header_v6 = header(Some(client), "[::1]:80".parse().unwrap(), b"");
        assert_eq!(header_v6[12..16], *b"\x21\x21\x00\x27");
        assert_eq!(header_v6[16..32], *b"\0\0\0\0\0\0\0\0\0\0\xff\xff\xc0\0\x02\x01");
    }

    #[test]
    fn without_a_client_the_proxy_speaks_for_itself() {
        let header = header(None, "127.0.0.1:80".parse().unwrap(), &[7; 500]);
        assert_eq!(header[12..16], [0x20, 0, 0, 131]);
    }
}
