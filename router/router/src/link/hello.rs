//! The first exchange on a link: who is there, which protocol, what the link is called.

use super::{Peer, stream::MessageReader};
use aws_lc_rs::digest::{SHA256, digest};
use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use rustls_pki_types::CertificateDer;
use skein_core::{LinkId, RouterId};
use skein_trust::{Admitted, PeerError, RouterTls, Usage};
use skein_wire::{
    framing::{self, FramingError},
    proto::routing::{LinkHello, LinkMessage, link_message::Message},
};
use std::{future::Future, time::Duration};

/// Oldest protocol of a link this router speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// Newest protocol of a link this router speaks.
pub const PROTOCOL_MAX: u32 = 1;
/// From the end of the handshake to the neighbour's hello, besides a few round trips: covers retransmissions on a bad path.
/// A path that breaks right after the handshake keeps other endpoints waiting for no longer.
const HELLO_TIMEOUT: Duration = Duration::from_secs(1);
/// Round trips, as the handshake has measured them, that the hello may take in addition.
const HELLO_ROUND_TRIPS: u32 = 6;
/// Length of a link nonce.
pub(super) const NONCE_LEN: usize = 8;
/// Binds the frames' keys to their purpose.
const KEYS_LABEL: &[u8] = b"EXPORTER-skein-frames/1";
/// Application close codes.
pub(super) const CLOSED: VarInt = VarInt::from_u32(0);
pub(super) const REFUSED: VarInt = VarInt::from_u32(1);
/// The path does not carry frames of the smallest size.
pub(super) const TOO_SMALL: VarInt = VarInt::from_u32(2);
/// Nothing has come from the neighbour for too long.
pub(super) const SILENT: VarInt = VarInt::from_u32(3);

/// Why a connection did not become a link.
#[derive(Debug, thiserror::Error)]
pub(super) enum HelloError {
    #[error("the peer does not complete the handshake")]
    Timeout,
    #[error("{0}")]
    Peer(#[from] PeerError),
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("the peer closed the control stream")]
    Ended,
    #[error("{0}")]
    Framing(#[from] FramingError),
    #[error("the peer's first message is not a hello")]
    NotAHello,
    #[error(
        "no common protocol: the peer speaks {theirs_min} to {theirs_max}, this router {PROTOCOL_MIN} to \
         {PROTOCOL_MAX}"
    )]
    Version { theirs_min: u32, theirs_max: u32 },
    #[error("the peer's hello contradicts its certificate")]
    Contradiction,
    #[error("the endpoint is this router itself")]
    Myself,
    #[error("the TLS library exports no keys")]
    Keys,
}

/// A neighbour that has said hello.
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) peer: Peer,
    pub(super) hello: LinkHello,
    pub(super) id: LinkId,
    pub(super) send: SendStream,
    pub(super) reader: MessageReader,
}

/// Who is at the other end, by its certificate.
pub(super) fn admitted(connection: &Connection) -> Result<Admitted, PeerError> {
    let alpn = connection
        .handshake_data()
        .and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
        .and_then(|data| data.protocol);
    skein_trust::admit(alpn.as_deref(), chain(connection).as_deref())
}

fn chain(connection: &Connection) -> Option<Vec<CertificateDer<'static>>> {
    connection.peer_identity()?.downcast().ok().map(|chain| *chain)
}

/// The certificate of a neighbour whose last statement has expired is good for nothing before it has shown a new one.
fn check_introduction(
    connection: &Connection,
    usage: Usage,
    hello: &LinkHello,
    tls: &RouterTls,
) -> Result<(), HelloError> {
    let chain = chain(connection).ok_or(PeerError::Missing)?;
    Ok(tls.introduced(&chain, usage, &hello.statements)?)
}

/// The neighbour, if it is a router.
pub(super) fn neighbour(admitted: Admitted, myself: RouterId) -> Result<Peer, HelloError> {
    let Admitted::Link(identity) = admitted else { return Err(HelloError::NotAHello) };
    let name = identity.router_name().unwrap_or_default().to_owned();
    let router = identity.router.ok_or(PeerError::Missing)?;
    if router == myself {
        return Err(HelloError::Myself);
    }
    Ok(Peer { site: identity.site, router, name })
}

/// Says hello as the dialling side.
///
/// # Cancel safety
/// Cancelled, the connection is of no further use.
pub(super) async fn dial(
    connection: &Connection,
    peer: Peer,
    mine: LinkHello,
    tls: &RouterTls,
) -> Result<Greeted, HelloError> {
    let exchange = async {
        let (mut send, recv) = connection.open_bi().await?;
        let nonce = mine.link_nonce.clone();
        write_hello(&mut send, mine).await?;
        let (hello, reader) = read_hello(recv, &peer).await?;
        check_introduction(connection, Usage::Server, &hello, tls)?;
        let id = link_id(&nonce, &hello.link_nonce);
        Ok(Greeted { peer, hello, id, send, reader })
    };
    within(connection, exchange).await
}

/// Answers the hello of the dialling side.
///
/// # Cancel safety
/// Cancelled, the connection is of no further use.
pub(super) async fn accept(
    connection: &Connection,
    peer: Peer,
    mine: LinkHello,
    tls: &RouterTls,
) -> Result<Greeted, HelloError> {
    let exchange = async {
        let (mut send, recv) = connection.accept_bi().await?;
        let (hello, reader) = read_hello(recv, &peer).await?;
        check_introduction(connection, Usage::Client, &hello, tls)?;
        let id = link_id(&hello.link_nonce, &mine.link_nonce);
        write_hello(&mut send, mine).await?;
        Ok(Greeted { peer, hello, id, send, reader })
    };
    within(connection, exchange).await
}

/// Stream errors hide the peer's reason for closing; the connection has it.
async fn within<T>(
    connection: &Connection,
    exchange: impl Future<Output = Result<T, HelloError>>,
) -> Result<T, HelloError> {
    let limit = HELLO_TIMEOUT + connection.rtt() * HELLO_ROUND_TRIPS;
    let outcome = tokio::time::timeout(limit, exchange).await;
    match outcome.unwrap_or(Err(HelloError::Timeout)) {
        Err(HelloError::Ended) => {
            Err(connection.close_reason().map_or(HelloError::Ended, HelloError::Connection))
        }
        outcome => outcome,
    }
}

async fn write_hello(send: &mut SendStream, hello: LinkHello) -> Result<(), HelloError> {
    let mut bytes = bytes::BytesMut::new();
    framing::encode(&LinkMessage { message: Some(Message::Hello(hello)) }, &mut bytes);
    send.write_all(&bytes).await.map_err(|_| HelloError::Ended)
}

async fn read_hello(
    recv: RecvStream,
    peer: &Peer,
) -> Result<(LinkHello, MessageReader), HelloError> {
    let mut reader = MessageReader::new(recv);
    let message = reader.next().await.map_err(|error| match error {
        super::stream::ReadError::Framing(error) => HelloError::Framing(error),
        super::stream::ReadError::Decode(_) => HelloError::NotAHello,
        super::stream::ReadError::Ended => HelloError::Ended,
    })?;
    let Some(Message::Hello(hello)) = message.message else { return Err(HelloError::NotAHello) };
    let (theirs_min, theirs_max) = (hello.protocol_min, hello.protocol_max);
    if theirs_min > PROTOCOL_MAX || theirs_max < PROTOCOL_MIN {
        return Err(HelloError::Version { theirs_min, theirs_max });
    }
    let consistent = hello.router_id == peer.router.0
        && hello.site_id == peer.site.0
        && hello.link_nonce.len() == NONCE_LEN;
    if consistent { Ok((hello, reader)) } else { Err(HelloError::Contradiction) }
}

/// Both sides contribute, so that neither can choose another link's id.
fn link_id(dialler: &[u8], accepter: &[u8]) -> LinkId {
    let digest = digest(&SHA256, &[dialler, accepter].concat());
    let mut id = [0; 8];
    id.copy_from_slice(&digest.as_ref()[..8]);
    LinkId(u64::from_be_bytes(id))
}

/// Keys of the frames: from the dialling side, from the accepting side.
pub(super) fn frame_keys(
    connection: &Connection,
    id: LinkId,
) -> Result<([u8; 16], [u8; 16]), HelloError> {
    let (mut dialler, mut accepter) = ([0; 16], [0; 16]);
    for (key, side) in [(&mut dialler, b'd'), (&mut accepter, b'a')] {
        let mut context = [side; 9];
        context[1..].copy_from_slice(&id.0.to_be_bytes());
        connection
            .export_keying_material(key, KEYS_LABEL, &context)
            .map_err(|_| HelloError::Keys)?;
    }
    Ok((dialler, accepter))
}
