//! `skein-wire` for simulated routers, some of which are of a later minor version: what they say on control streams and before flows has fields that
//! are not known yet, and between the messages of control streams there are others of kinds that are not known yet.

pub use skein_wire::*;

use std::{cell::RefCell, collections::BTreeSet, net::IpAddr};

thread_local! {
    static LATER: RefCell<BTreeSet<IpAddr>> = const { RefCell::new(BTreeSet::new()) };
}

/// From now on the routers on this host, as far as they are simulated by this thread, are of a later version.
pub fn speak_later(host: IpAddr) {
    LATER.with_borrow_mut(|later| later.insert(host));
}

fn is_later() -> bool {
    LATER.with_borrow(|later| {
        !later.is_empty() && skein_netsim::current().is_some_and(|host| later.contains(&host.ip()))
    })
}

/// As in `skein-wire`, but for what later versions add.
pub mod framing {
    use bytes::{BufMut as _, BytesMut};
    use prost::Message;
    pub use skein_wire::framing::{Decoder, FramingError, MESSAGE_LEN_MAX};
    use std::any::type_name;

    const UNKNOWN_LEN: u8 = 9;
    /// Field 1,000, a number, and field 2,000, three bytes.
    const UNKNOWN: [u8; UNKNOWN_LEN as usize] =
        [0xc0, 0x3e, 0x2a, 0x82, 0x7d, 0x03, b'n', b'e', b'w'];

    /// Appends `message` to `out`, length first.
    pub fn encode<M: Message>(message: &M, out: &mut BytesMut) {
        if !super::is_later() {
            return skein_wire::framing::encode(message, out);
        }
        let len = message.encoded_len() + UNKNOWN.len();
        prost::encode_length_delimiter(len, out).expect("invariant: BytesMut grows as needed");
        message.encode(out).expect("invariant: BytesMut grows as needed");
        out.put_slice(&UNKNOWN);
        // What is said once is followed by payload; on control streams a message may follow.
        if type_name::<M>().ends_with("LinkMessage") || type_name::<M>().ends_with("SessionMessage")
        {
            out.put_u8(UNKNOWN_LEN);
            out.put_slice(&UNKNOWN);
        }
    }
}
