//! What every decoder must hold on any bytes.
//!
//! Each function takes bytes as an attacker would send them and panics when a property does not hold. Not panicking is
//! the first of them; where something can be encoded again, it must come out the same.

use bytes::BytesMut;
use prost::Message;
use rustls_pki_types::CertificateDer;
use skein_api::{Token, parse_documents, parse_stored, to_yaml};
use skein_core::{Handle, Label, Pin, SiteId};
use skein_trust::{
    Issuer, SpiffeId, VerifiedAnswer, peer_identity, verify_answer, verify_claim,
    verify_endorsement, verify_revocation, verify_statement,
};
use skein_wire::{
    association, config, convert, datagram,
    frame::{Control, FragmentHead, Header, Key, Opener, Template, advance, reroute, seal},
    framing::{Decoder, MESSAGE_LEN_MAX, encode},
    proto,
};

/// Takes bytes as an attacker would send them; panics if a property does not hold.
pub type Target = fn(&[u8]);

/// Targets by name, as corpus directories and libFuzzer binaries are called.
pub const TARGETS: [(&str, Target); 11] = [
    ("frame", frame),
    ("framing", framing),
    ("datagram", datagram),
    ("association", association),
    ("record", record),
    ("link_message", link_message),
    ("session", session),
    ("claim", claim),
    ("certificate", certificate),
    ("config", router_config),
    ("resources", resources),
];

/// Frames as they arrive on the port: header, labels, fragments, control payloads; and on their way through a transit.
pub fn frame(data: &[u8]) {
    let mut frame = data.to_vec();
    if let Ok(header) = Header::parse(&frame) {
        assert!(header.len <= frame.len());
        assert!(header.pin.0 < 16 && header.position < 32);
        assert!(header.labels_after_next(&frame).count() <= 23);
        if header.next_label(&frame).is_some() {
            advance(&mut frame);
            let next = Header::parse(&frame).expect("a frame stays one on its way");
            assert_eq!((next.source, next.pin, next.len), (header.source, header.pin, header.len));
        }
        let key = Key::new([7; 16]);
        seal(&mut frame, &key, header.epoch, 1);
        Opener::new(key).open(&frame).expect("what is sealed opens");
        frame[header.len - 1] ^= 1;
        Opener::new(Key::new([7; 16])).open(&frame).expect_err("what is changed does not");
    }
    let labels: Vec<Label> =
        data.chunks_exact(2).map(|pair| Label(u16::from_be_bytes([pair[0], pair[1]]))).collect();
    if let Ok(template) = Template::data(Handle(1), Pin(0), &labels) {
        assert!(Header::parse(template.bytes()).is_ok());
    }
    let mut rerouted = data.to_vec();
    if Header::parse(&rerouted).is_ok() && reroute(&mut rerouted, &labels).is_ok() {
        assert!(Header::parse(&rerouted).is_ok());
    }
    if let Some(control) = Control::decode(data) {
        let mut encoded = Vec::new();
        control.encode(Handle(1), 0, &mut encoded);
        assert_eq!(Control::decode(&encoded), Some(control));
    }
    if let Some((head, piece)) = FragmentHead::split(data) {
        assert!(head.index < head.count && !piece.is_empty());
    }
}

/// A stream cut into messages: how its bytes arrive must not matter.
pub fn framing(data: &[u8]) {
    let Some((&step, stream)) = data.split_first() else { return };
    let messages = |step: usize| {
        let mut decoder = Decoder::new(MESSAGE_LEN_MAX);
        let mut messages = Vec::new();
        for piece in stream.chunks(step) {
            decoder.push(piece);
            loop {
                match decoder.next_message() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(error) => return (messages, Some(error)),
                }
            }
        }
        (messages, decoder.finish().err())
    };
    let whole = messages(stream.len().max(1));
    assert!(whole.0.iter().all(|message| message.len() <= MESSAGE_LEN_MAX));
    assert_eq!(messages(usize::from(step).max(1)), whole);
}

/// A stream cut into datagrams: how its bytes arrive must not matter, and what comes out makes the same stream again.
pub fn datagram(data: &[u8]) {
    let Some((&step, stream)) = data.split_first() else { return };
    let datagrams = |step: usize| {
        let mut decoder = datagram::Decoder::default();
        let (mut datagrams, mut out) = (Vec::new(), vec![0; 16 << 10]);
        for piece in stream.chunks(step) {
            decoder.push(piece);
            loop {
                match decoder.next_batch(&mut out) {
                    Ok(Some(batch)) => {
                        datagrams.extend(out[..batch.len].chunks(batch.stride).map(<[u8]>::to_vec));
                    }
                    Ok(None) => break,
                    Err(error) => return (datagrams, Some(error)),
                }
            }
        }
        (datagrams, None)
    };
    let whole = datagrams(stream.len().max(1));
    let again: Vec<u8> = whole
        .0
        .iter()
        .flat_map(|datagram| {
            let prefix = datagram::prefix(datagram.len()).expect("a length that datagrams have");
            [&prefix, &datagram[..]].concat()
        })
        .collect();
    assert!(stream.starts_with(&again));
    assert_eq!(datagrams(usize::from(step).max(1)), whole);
}

/// A datagram of an association as a frame, and a stream cut into records: how its bytes arrive must not matter, and a record that is
/// passed over takes nothing else along.
pub fn association(data: &[u8]) {
    if let Some(frame) = association::decode(bytes::Bytes::copy_from_slice(data)) {
        let header_len = association::header_len(frame.flow, frame.piece);
        assert!(header_len + frame.payload.len() <= data.len());
        if frame.flow < 1 << 60 {
            let again = association::encode(frame.flow, frame.piece, &frame.payload);
            assert_eq!(association::decode(again), Some(frame));
        }
    }
    let Some((&step, stream)) = data.split_first() else { return };
    let datagrams = |step: usize| {
        let mut records = association::Records::default();
        let mut datagrams = Vec::new();
        for piece in stream.chunks(step) {
            records.push(piece);
            loop {
                match records.next_datagram() {
                    Ok(Some(datagram)) => datagrams.push(datagram),
                    Ok(None) => break,
                    Err(error) => return (datagrams, Some(error)),
                }
            }
            let held_max = records.held_len_max().expect("no error was found before");
            assert!(held_max <= association::RECORD_PREFIX_LEN + association::PAYLOAD_LEN_MAX);
        }
        (datagrams, None)
    };
    let whole = datagrams(stream.len().max(1));
    let again = whole.0.iter().filter_map(|datagram| association::record(datagram));
    assert!(stream.starts_with(&again.collect::<Vec<_>>().concat()));
    assert_eq!(datagrams(usize::from(step).max(1)), whole);
}

/// Records as a neighbour floods them. The first two bytes say how long the body is.
pub fn record(data: &[u8]) {
    let Some((&length, rest)) = data.split_first_chunk() else { return };
    let (body, signature) = rest.split_at(usize::from(u16::from_be_bytes(length)).min(rest.len()));
    if let Ok(record) = convert::parse_record(body, signature) {
        assert_eq!(&record.sealed.body[..], body);
        let draft = skein_core::RecordDraft {
            key: record.key,
            sequence: record.sequence,
            lifetime_s: record.lifetime_s,
            payload: record.payload.clone(),
        };
        let again = convert::encode_body(&draft).expect("what was parsed fits");
        let again = convert::parse_record(&again, signature).expect("what is encoded is parsed");
        assert_eq!((again.key, again.sequence), (record.key, record.sequence));
        assert_eq!(again.payload, record.payload);
    }
    let record =
        proto::routing::Record { body: body.to_vec().into(), signature: signature.to_vec().into() };
    if let Ok(verified) = verify_statement(&record) {
        assert_eq!(verified.statement.site_id, verified.site.0);
    }
    let issuer = Issuer { site: SiteId([1; 32]), key: [2; 32], rotations: 0 };
    assert!(verify_endorsement(&record, &issuer).is_err());
    assert!(verify_revocation(&record, &issuer).is_err());
}

/// Messages on a link's control stream.
pub fn link_message(data: &[u8]) {
    let Ok(message) = proto::routing::LinkMessage::decode(data) else { return };
    let Ok(Some(parsed)) = convert::parse_message(&message) else { return };
    let encoded = proto::routing::LinkMessage::from(&parsed);
    assert_eq!(convert::parse_message(&encoded), Ok(Some(parsed)));
}

/// Messages of sessions: hello, control, and the head of each flow.
pub fn session(data: &[u8]) {
    fn round_trips<M: Message + Default + PartialEq>(data: &[u8]) {
        let Ok(message) = M::decode(data) else { return };
        let mut framed = BytesMut::new();
        encode(&message, &mut framed);
        let mut decoder = Decoder::new(2 * MESSAGE_LEN_MAX + data.len());
        decoder.push(&framed);
        let bytes = decoder.next_message().expect("well framed").expect("whole");
        assert!(M::decode(bytes).as_ref() == Ok(&message));
    }
    round_trips::<proto::session::SessionHello>(data);
    round_trips::<proto::session::SessionMessage>(data);
    round_trips::<proto::session::FlowOpen>(data);
    round_trips::<proto::session::FlowReply>(data);
}

/// Claims and their answers, before anything is known of the other side.
pub fn claim(data: &[u8]) {
    let (issuer, redeemer) = (SiteId([1; 32]), SiteId([2; 32]));
    // The exporter of no connection: nobody can have signed over it.
    assert!(verify_claim(data, issuer, &[3; 32], 1_800_000_000).is_err());
    let answer = verify_answer(data, issuer, redeemer, 1_800_000_000);
    assert!(!matches!(answer, Ok(VerifiedAnswer::Accepted(_))), "no key hashes to that issuer");
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(token) = text.parse::<Token>()
    {
        assert_eq!(token.encode().parse::<Token>().as_ref(), Ok(&token));
    }
}

/// Certificates as peers present them, and the ids in them.
pub fn certificate(data: &[u8]) {
    let leaf = CertificateDer::from(data);
    if let Ok(identity) = peer_identity(&[leaf]) {
        assert_eq!(identity.router.is_some(), identity.router_name().is_some());
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Some(id) = SpiffeId::parse(text)
    {
        assert_eq!(id.to_string(), text);
    }
}

/// Configurations as a router receives them.
pub fn router_config(data: &[u8]) {
    let Ok(mut config) = proto::control::RouterConfig::decode(data) else { return };
    config::canonicalise(&mut config);
    let mut again = config.clone();
    config::canonicalise(&mut again);
    assert!(again == config, "the canonical form is its own");
    let mut assembler = config::Assembler::default();
    let mut assembled = None;
    for chunk in config::snapshot(1, &config) {
        assembled = assembler.push(&chunk).expect("a snapshot assembles");
    }
    let (version, assembled) = assembled.expect("it has a last chunk");
    assert!(version == 1 && assembled == config);
}

/// YAML as users write it, and as sites have kept it.
pub fn resources(data: &[u8]) {
    let asked = parse_documents(data);
    let Ok(resources) = parse_stored(data) else { return assert!(asked.is_err()) };
    assert!(asked.is_err() || asked.as_ref() == Ok(&resources), "what is taken is kept as it is");
    let text = to_yaml(&resources);
    let again = parse_documents(text.as_bytes()).expect("what was written is read");
    assert_eq!(again, resources);
}
