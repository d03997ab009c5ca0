//! The little a WAN box knows of what it carries: Ethernet frames with IP in them.

/// Ethernet header, bytes.
const ETHERNET: usize = 14;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const ICMP_HEADER: usize = 8;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const UDP: u8 = 17;
/// What an error message quotes of the packet it is about: enough for any host to find the socket.
const QUOTED: usize = 64;
const HOPS: u8 = 64;

/// Length of the IP packet in a frame, if there is one.
pub(super) fn ip_len(frame: &[u8]) -> Option<usize> {
    let ip = frame.get(ETHERNET..)?;
    matches!(frame[12..14], [0x08, 0x00] | [0x86, 0xdd]).then_some(ip.len())
}

/// Whether a frame carries UDP, not looking behind extension headers.
pub(super) fn is_udp(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.get(ETHERNET + 9) == Some(&UDP),
        Some([0x86, 0xdd]) => frame.get(ETHERNET + 6) == Some(&UDP),
        _ => false,
    }
}

/// The frame that tells the sender of another that its packet must be smaller, as if its destination said so.
pub(super) fn too_large(frame: &[u8], mtu: u16) -> Option<Vec<u8>> {
    let (header, ip) = frame.split_at_checked(ETHERNET)?;
    let mut reply = [&header[6..12], &header[..6], &header[12..14]].concat();
    let quoted = &ip[..ip.len().min(QUOTED)];
    match header[12..14] {
        [0x08, 0x00] => reply.extend(fragmentation_needed(ip, quoted, mtu)?),
        [0x86, 0xdd] => reply.extend(packet_too_big(ip, quoted, mtu)?),
        _ => return None,
    }
    Some(reply)
}

fn fragmentation_needed(ip: &[u8], quoted: &[u8], mtu: u16) -> Option<Vec<u8>> {
    let addresses = ip.get(12..20)?;
    let total = u16::try_from(IPV4_HEADER + ICMP_HEADER + quoted.len()).ok()?;
    let mut packet = vec![0; IPV4_HEADER];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[8] = HOPS;
    packet[9] = ICMP;
    packet[12..16].copy_from_slice(&addresses[4..]);
    packet[16..20].copy_from_slice(&addresses[..4]);
    let sum = checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum);
    // Destination unreachable, fragmentation needed.
    let mut message = vec![3, 4, 0, 0, 0, 0];
    message.extend(mtu.to_be_bytes());
    message.extend(quoted);
    let sum = checksum(&[&message]);
    message[2..4].copy_from_slice(&sum);
    packet.extend(message);
    Some(packet)
}

fn packet_too_big(ip: &[u8], quoted: &[u8], mtu: u16) -> Option<Vec<u8>> {
    let addresses = ip.get(8..IPV6_HEADER)?;
    let len = u16::try_from(ICMP_HEADER + quoted.len()).ok()?;
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(len.to_be_bytes());
    packet.extend([ICMPV6, HOPS]);
    packet.extend(&addresses[16..]);
    packet.extend(&addresses[..16]);
    let mut message = vec![2, 0, 0, 0];
    message.extend(u32::from(mtu).to_be_bytes());
    message.extend(quoted);
    let pseudo = [&packet[8..], &[0, 0], &len.to_be_bytes(), &[0, 0, 0, ICMPV6]].concat();
    let sum = checksum(&[&pseudo, &message]);
    message[2..4].copy_from_slice(&sum);
    packet.extend(message);
    Some(packet)
}

/// The checksum of the internet protocols (RFC 1071) over parts of even length, but for the last.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [.., high, low] = (!sum).to_be_bytes();
    [high, low]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_rfc() {
        let example = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&[&example]), (!0xddf2_u16).to_be_bytes());
        assert_eq!(checksum(&[&example[..4], &example[4..]]), checksum(&[&example]));
    }

    #[test]
    fn an_error_goes_back_to_the_sender_and_quotes_what_it_is_about() {
        for (kind, header, from, address) in
            [([0x08, 0x00], IPV4_HEADER, 12, 4), ([0x86, 0xdd], IPV6_HEADER, 8, 16)]
        {
            let mut frame = [[1; 6], [2; 6]].concat();
            frame.extend(kind);
            frame.extend((0..=255).cycle().take(1_500));
            let told = too_large(&frame, 1_280).unwrap();
            assert_eq!(told[..12], [[2; 6], [1; 6]].concat());
            assert!(!is_udp(&told));
            let (old, new) = (&frame[ETHERNET..], &told[ETHERNET..]);
            assert_eq!(new[from..][..address], old[from + address..][..address], "source");
            assert_eq!(new[from + address..][..address], old[from..][..address], "destination");
            assert_eq!(new[header + ICMP_HEADER..], old[..QUOTED]);
            assert_eq!(ip_len(&told), Some(header + ICMP_HEADER + QUOTED));
        }
        assert_eq!(too_large(&[0; 20], 1_280), None);
        assert_eq!(too_large(&[0; 3], 1_280), None);
    }
}
